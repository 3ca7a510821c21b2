//! Devices as a person describes them: on the command line as `key=value,...`, in TOML as tables
//! with the same keys.

use std::path::PathBuf;
use std::str::FromStr;

use serde::{Deserialize, Serialize};

use super::Size;
use crate::machine::SerialMode;

/// Splits `key=value,key,...`. `,,` stands for a comma inside a value.
pub(super) fn items(text: &str) -> impl Iterator<Item = (String, Option<String>)> {
    let text = text.replace(",,", "\0");
    let items: Vec<_> = text
        .split(',')
        .map(|item| {
            let item = item.replace('\0', ",");
            match item.split_once('=') {
                Some((key, value)) => (key.to_owned(), Some(value.to_owned())),
                None => (item, None),
            }
        })
        .collect();
    items.into_iter()
}

/// The value of `key`, which is needed.
pub(super) fn need(key: &str, value: Option<String>, example: &str) -> Result<String, String> {
    value
        .filter(|value| !value.is_empty())
        .ok_or_else(|| format!("`{key}` needs a value, for example {key}={example}"))
}

pub(super) fn number(key: &str, value: Option<String>, example: &str) -> Result<u32, String> {
    let value = need(key, value, example)?;
    value
        .parse()
        .map_err(|_| format!("{key}={value}: not a whole number, use for example {key}={example}"))
}

pub(super) fn switch(key: &str, value: Option<String>) -> Result<bool, String> {
    match value.as_deref() {
        None | Some("on" | "true") => Ok(true),
        Some("off" | "false") => Ok(false),
        Some(other) => Err(format!("{key}={other}: use {key}=on or {key}=off")),
    }
}

fn size(key: &str, value: Option<String>) -> Result<Size, String> {
    let value = need(key, value, "1G")?;
    value.parse().map_err(|error| format!("{key}: {error}"))
}

pub(super) fn unknown(key: &str, known: &str) -> String {
    format!("unknown key `{key}`: the keys are {known}")
}

pub(super) fn once<T>(slot: &mut Option<T>, key: &str, value: T) -> Result<(), String> {
    match slot.replace(value) {
        None => Ok(()),
        Some(_) => Err(format!("`{key}` is given twice")),
    }
}

/// One NVMe controller with its namespaces: `[[nvme]]` and `[[nvme.namespace]]`.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, rename_all = "kebab-case")]
pub struct NvmeConfig {
    /// Serial number: 1 to 20 printable ASCII characters. Default: made from the guest's name.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub serial: Option<String>,
    /// I/O queue pairs, 1 to 64. Default: 64.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub queues: Option<u32>,
    /// Namespaces 1, 2, ...
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub namespace: Vec<NamespaceConfig>,
}

/// One NVMe namespace and where its bytes are kept. Exactly one of `path`, `memory` and `null`.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, rename_all = "kebab-case")]
pub struct NamespaceConfig {
    /// A raw image file or a block device.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub path: Option<PathBuf>,
    /// Kept in memory and lost at the end.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub memory: Option<Size>,
    /// Writes are dropped, reads give whatever is in the buffer: for measurements.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub null: Option<Size>,
    /// Writes are refused. Default: false.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub readonly: Option<bool>,
    /// Opens `path` with `O_DIRECT`. Default: false.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub direct: Option<bool>,
    /// Logical block size in bytes, 512 or 4096. Default: 512.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub lba: Option<u32>,
}

impl NamespaceConfig {
    const KEYS: &str = "path=FILE, memory=SIZE, null=SIZE, readonly, direct, lba=512|4096";

    /// Takes one item; gives it back when the key is not one of a namespace.
    fn take(&mut self, key: &str, value: Option<String>) -> Result<bool, String> {
        match key {
            "path" => once(&mut self.path, key, need(key, value, "disk.img")?.into())?,
            "memory" => once(&mut self.memory, key, size(key, value)?)?,
            "null" => once(&mut self.null, key, size(key, value)?)?,
            "readonly" => once(&mut self.readonly, key, switch(key, value)?)?,
            "direct" => once(&mut self.direct, key, switch(key, value)?)?,
            "lba" => once(&mut self.lba, key, number(key, value, "4096")?)?,
            _ => return Ok(false),
        }
        Ok(true)
    }
}

/// `--nvme path=disk.img,queues=4`: a controller with its first namespace. `--nvme disk.img` is
/// short for `--nvme path=disk.img`.
impl FromStr for NvmeConfig {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let mut nvme = NvmeConfig::default();
        let mut namespace = NamespaceConfig::default();
        for (index, (key, value)) in items(text).enumerate() {
            if namespace.take(&key, value.clone())? {
                continue;
            }
            match key.as_str() {
                "serial" => once(&mut nvme.serial, &key, need(&key, value, "DISK0")?)?,
                "queues" => once(&mut nvme.queues, &key, number(&key, value, "4")?)?,
                _ if index == 0 && value.is_none() && !key.is_empty() => {
                    once(&mut namespace.path, "path", key.into())?;
                }
                _ => {
                    let known = format!("{}, serial=, queues=", NamespaceConfig::KEYS);
                    return Err(unknown(&key, &known));
                }
            }
        }
        nvme.namespace.push(namespace);
        Ok(nvme)
    }
}

/// `--namespace nvme=0,path=more.img`: one more namespace on a controller.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct NamespaceArg {
    /// Which controller, counted from 0 in the order of the file's, then the flags'.
    pub nvme: u32,
    /// The namespace.
    pub namespace: NamespaceConfig,
}

impl FromStr for NamespaceArg {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let mut nvme = None;
        let mut namespace = NamespaceConfig::default();
        for (key, value) in items(text) {
            if key == "nvme" {
                once(&mut nvme, &key, number(&key, value, "0")?)?;
            } else if !namespace.take(&key, value)? {
                let known = format!("nvme=INDEX, {}", NamespaceConfig::KEYS);
                return Err(unknown(&key, &known));
            }
        }
        let nvme = nvme.ok_or("`nvme` is missing: say which controller gets it, nvme=0")?;
        Ok(Self { nvme, namespace })
    }
}

/// One virtio-net device: `[[net]]`. Exactly one of `tap` and `loopback`.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, rename_all = "kebab-case")]
pub struct NetConfig {
    /// An existing tap interface of the host.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub tap: Option<String>,
    /// The guest receives what it sends: for measurements.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub loopback: Option<bool>,
    /// Queue pairs, 1 to 16. Default: 1.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub pairs: Option<u32>,
    /// Hardware address. Default: made from the guest's name.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub mac: Option<String>,
}

/// `--net tap=tap0,pairs=2` or `--net loopback`.
impl FromStr for NetConfig {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let mut net = NetConfig::default();
        for (key, value) in items(text) {
            match key.as_str() {
                "tap" => once(&mut net.tap, &key, need(&key, value, "tap0")?)?,
                "loopback" => once(&mut net.loopback, &key, switch(&key, value)?)?,
                "pairs" => once(&mut net.pairs, &key, number(&key, value, "2")?)?,
                "mac" => once(&mut net.mac, &key, need(&key, value, "52:54:00:00:00:01")?)?,
                _ => {
                    return Err(unknown(&key, "tap=NAME, loopback, pairs=, mac="));
                }
            }
        }
        Ok(net)
    }
}

/// The virtio-vsock device that `ringside exec` and `ringside cp` use: `[vsock]`.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, rename_all = "kebab-case")]
pub struct VsockConfig {
    /// False leaves the device out. Default: true.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub enabled: Option<bool>,
    /// The guest's context id, from 3 on. Default: 3 (each guest's sockets are its own).
    #[serde(skip_serializing_if = "Option::is_none")]
    pub cid: Option<u32>,
    /// The Unix socket through which programs of the host reach the guest. Default: in the guest's
    /// runtime folder.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub socket: Option<PathBuf>,
}

/// `--vsock off` or `--vsock cid=3,socket=PATH`.
impl FromStr for VsockConfig {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let mut vsock = VsockConfig::default();
        for (key, value) in items(text) {
            match key.as_str() {
                "on" if value.is_none() => once(&mut vsock.enabled, &key, true)?,
                "off" if value.is_none() => once(&mut vsock.enabled, &key, false)?,
                "cid" => once(&mut vsock.cid, &key, number(&key, value, "3")?)?,
                "socket" => once(
                    &mut vsock.socket,
                    &key,
                    need(&key, value, "/tmp/guest.vsock")?.into(),
                )?,
                _ => return Err(unknown(&key, "on, off, cid=, socket=PATH")),
            }
        }
        Ok(vsock)
    }
}

/// One educational function: `[[edu]]`.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, rename_all = "kebab-case")]
pub struct EduConfig {
    /// Its name in statistics and messages. Default: `edu0`, `edu1`, ...
    #[serde(skip_serializing_if = "Option::is_none")]
    pub name: Option<String>,
    /// Address lines of its DMA engine, 12 to 64. Default: 28.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub dma_mask: Option<u32>,
}

/// `--edu`, `--edu name=card,dma-mask=32`.
impl FromStr for EduConfig {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let mut edu = EduConfig::default();
        for (key, value) in items(text).filter(|_| !text.is_empty()) {
            match key.as_str() {
                "name" => once(&mut edu.name, &key, need(&key, value, "edu0")?)?,
                "dma-mask" => once(&mut edu.dma_mask, &key, number(&key, value, "28")?)?,
                _ => return Err(unknown(&key, "name=, dma-mask=BITS")),
            }
        }
        Ok(edu)
    }
}

/// One DMA probe: `[[dma-probe]]`.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, rename_all = "kebab-case")]
pub struct ProbeConfig {
    /// Its name in statistics and messages. Default: `probe0`, `probe1`, ...
    #[serde(skip_serializing_if = "Option::is_none")]
    pub name: Option<String>,
}

/// `--dma-probe`, `--dma-probe name=tester`.
impl FromStr for ProbeConfig {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let mut probe = ProbeConfig::default();
        for (key, value) in items(text).filter(|_| !text.is_empty()) {
            match key.as_str() {
                "name" => once(&mut probe.name, &key, need(&key, value, "probe0")?)?,
                _ => return Err(unknown(&key, "name=")),
            }
        }
        Ok(probe)
    }
}

/// Where the guest's first serial port goes: `stdio`, `none` or `file:PATH`.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub struct Serial(pub SerialMode);

impl FromStr for Serial {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        match (text, text.strip_prefix("file:")) {
            ("stdio", _) => Ok(Self(SerialMode::Stdio)),
            ("none", _) => Ok(Self(SerialMode::Null)),
            (_, Some(path)) if !path.is_empty() => Ok(Self(SerialMode::File(path.into()))),
            _ => Err(format!("`{text}`: use stdio, none or file:PATH")),
        }
    }
}

impl TryFrom<String> for Serial {
    type Error = String;

    fn try_from(text: String) -> Result<Self, String> {
        text.parse()
    }
}

impl From<Serial> for String {
    fn from(serial: Serial) -> Self {
        match serial.0 {
            SerialMode::Stdio => "stdio".into(),
            SerialMode::Null => "none".into(),
            SerialMode::File(path) => format!("file:{}", path.display()),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_nvme_flag_is_a_controller_with_its_first_namespace() {
        let nvme: NvmeConfig = "disk.img,readonly,serial=S1,queues=4,lba=4096"
            .parse()
            .unwrap();
        assert_eq!(
            nvme,
            NvmeConfig {
                serial: Some("S1".into()),
                queues: Some(4),
                namespace: vec![NamespaceConfig {
                    path: Some("disk.img".into()),
                    readonly: Some(true),
                    lba: Some(4096),
                    ..NamespaceConfig::default()
                }],
            }
        );
        let named: NvmeConfig = "path=a,,b.img".parse().unwrap();
        assert_eq!(named.namespace[0].path, Some("a,b.img".into()));
    }

    #[test]
    fn a_further_namespace_names_its_controller() {
        let arg: NamespaceArg = "nvme=1,memory=64M".parse().unwrap();
        assert_eq!(
            (arg.nvme, arg.namespace.memory),
            (1, Some("64M".parse().unwrap()))
        );
        assert!("memory=64M".parse::<NamespaceArg>().is_err());
    }

    #[test]
    fn mistakes_are_explained() {
        let nvme = |text: &str| text.parse::<NvmeConfig>().unwrap_err();
        assert_eq!(
            nvme("a.img,queues=x"),
            "queues=x: not a whole number, use for example queues=4"
        );
        assert_eq!(
            nvme("a.img,queues"),
            "`queues` needs a value, for example queues=4"
        );
        assert_eq!(nvme("a.img,path=b.img"), "`path` is given twice");
        assert_eq!(
            nvme("a.img,direct=maybe"),
            "direct=maybe: use direct=on or direct=off"
        );
        assert!(nvme("a.img,speed=9").starts_with("unknown key `speed`: the keys are path=FILE"));
        assert!(nvme("").starts_with("unknown key ``"));
        assert!(nvme("memory=1Q").starts_with("memory: `1Q` is not a size"));
        let net = |text: &str| text.parse::<NetConfig>().unwrap_err();
        assert_eq!(net("tap="), "`tap` needs a value, for example tap=tap0");
        assert_eq!(
            net("bridge=br0"),
            "unknown key `bridge`: the keys are tap=NAME, loopback, pairs=, mac="
        );
        let edu = |text: &str| text.parse::<EduConfig>().unwrap_err();
        assert_eq!(
            edu("bits=3"),
            "unknown key `bits`: the keys are name=, dma-mask=BITS"
        );
        assert_eq!(edu("name="), "`name` needs a value, for example name=edu0");
        let probe = "addr=0".parse::<ProbeConfig>().unwrap_err();
        assert_eq!(probe, "unknown key `addr`: the keys are name=");
        assert_eq!(
            "com1".parse::<Serial>(),
            Err("`com1`: use stdio, none or file:PATH".into())
        );
    }
}

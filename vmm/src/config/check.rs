//! From a description to a checked machine. Looks at the host, changes nothing.

use std::collections::HashMap;
use std::fs::{self, File, OpenOptions};
use std::io::{self, Seek, SeekFrom};
use std::os::unix::fs::FileTypeExt;
use std::path::{Path, PathBuf};

use guest_images::Release;

use super::{
    Accel, BadInput, BootSource, Checked, EduConfig, GuestName, Mac, MachineConfig,
    NamespaceConfig, NetConfig, NvmeConfig, ProbeConfig, Serial, Size, VsockChoice, VsockConfig,
    image_name,
};
use crate::machine::{
    EduSpec, MAX_VCPUS, MIN_MEMORY, NamespaceSpec, NetBackendSpec, NetSpec, NvmeSpec, ProbeSpec,
    SerialMode, Storage,
};

type Result<T> = std::result::Result<T, BadInput>;

/// Least and most guest memory, in bytes; the bound is well inside the 46 bits of address that every
/// x86-64 with KVM has.
const MEMORY: (u64, u64) = (MIN_MEMORY, 16 << 40);
const MEMORY_STEP: u64 = 2 << 20;
/// `sun_path` (unix(7)) with its final zero byte.
const SOCKET_PATH_MAX: usize = 107;
/// More devices than this do not fit bus 0 beside the machine's own.
const DEVICES_MAX: usize = 24;
/// NVMe 1.4, figure 247: the namespace count is a u32; this keeps a machine's tables small.
const NAMESPACES_MAX: usize = 64;

/// Says what is wrong with a file in a way that tells the user what to do.
pub(super) fn io_problem(error: &io::Error, what: &str) -> String {
    match error.kind() {
        io::ErrorKind::NotFound => format!("no such file: give the path of {what}"),
        io::ErrorKind::PermissionDenied => {
            format!("permission denied: give {what} that this user may open")
        }
        _ => format!("cannot be opened ({error}): give {what}"),
    }
}

/// Checks a description and the host that it speaks of: files, sockets and tap interfaces.
///
/// # Errors
/// The first thing that is wrong.
pub fn check(config: &MachineConfig) -> Result<Checked> {
    let spec = check_spec(config)?;
    check_host(&spec)?;
    Ok(spec)
}

/// Checks a description by itself, without a look at the host.
///
/// # Errors
/// The first thing that is wrong.
pub fn check_spec(config: &MachineConfig) -> Result<Checked> {
    let name: GuestName = match &config.name {
        Some(name) => name
            .parse()
            .map_err(|problem: String| BadInput::new("--name", problem))?,
        None => format!("guest-{}", std::process::id())
            .parse()
            .expect("a process id makes a name"),
    };
    if let Some(cmdline) = &config.cmdline
        && cmdline.chars().any(char::is_control)
    {
        return Err(BadInput::new(
            "--cmdline",
            "control characters: use one line of text",
        ));
    }
    let tests = config.edu.len() + config.dma_probe.len();
    let devices = config.nvme.len() + config.net.len() + tests;
    if devices > DEVICES_MAX {
        return Err(BadInput::new(
            "--nvme, --net, --edu, --dma-probe",
            format!("{devices} devices: use at most {DEVICES_MAX} together"),
        ));
    }
    let control = config.control.clone();
    let vsock = vsock(config.vsock.as_ref())?;
    sockets(control.as_deref(), vsock.as_ref())?;
    let checked = Checked {
        boot: boot(config)?,
        cmdline: config.cmdline.clone().unwrap_or_default(),
        vcpus: ranged(
            "--vcpus",
            "",
            config.vcpus.unwrap_or(1),
            1,
            MAX_VCPUS.into(),
        )?,
        memory: memory(config.memory)?,
        nvme: nvme(&config.nvme, &name)?,
        net: net(&config.net, &name)?,
        edu: edu(&config.edu)?,
        dma_probe: dma_probe(&config.dma_probe),
        iommu: super::vtd::check(config.iommu.as_ref())?,
        vsock,
        serial: config
            .serial
            .clone()
            .map_or(SerialMode::Stdio, |Serial(mode)| mode),
        control,
        on_reboot: config.on_reboot.unwrap_or_default(),
        test_ports: config.test_ports.unwrap_or(false),
        accel: config.accel.unwrap_or_default(),
        trace_boot: config.trace_boot.unwrap_or(false),
        name,
    };
    names(&checked)?;
    Ok(checked)
}

fn boot(config: &MachineConfig) -> Result<BootSource> {
    match (&config.image, &config.kernel) {
        (Some(_), Some(_)) => Err(BadInput::new(
            "--image and --kernel",
            "both say what to boot: give one of them",
        )),
        (None, Some(kernel)) => Ok(BootSource::Files {
            kernel: kernel.clone(),
            initrd: config.initrd.clone(),
        }),
        (_, None) if config.initrd.is_some() => Err(BadInput::new(
            "--initrd",
            "an image has its own: give --kernel too, or leave --initrd out",
        )),
        (Some(image), None) => image_name(image)
            .map(BootSource::Image)
            .map_err(|problem| BadInput::new("--image", problem)),
        (None, None) => Ok(BootSource::Image(Release::Debian13.into())),
    }
}

/// `value` as the narrower integer, if it is in `min..=max`.
fn ranged<T: TryFrom<u32>>(option: &str, key: &str, value: u32, min: u32, max: u32) -> Result<T> {
    let narrow = T::try_from(value).ok();
    match narrow {
        Some(narrow) if (min..=max).contains(&value) => Ok(narrow),
        _ => {
            let key = if key.is_empty() {
                String::new()
            } else {
                format!("{key}=")
            };
            Err(BadInput::new(
                option,
                format!("{key}{value} is out of range: use {min} to {max}"),
            ))
        }
    }
}

fn memory(size: Option<Size>) -> Result<u64> {
    let bytes = size.map_or(512 << 20, Size::get);
    let size = Size::bytes(bytes);
    let (min, max) = MEMORY;
    if !(min..=max).contains(&bytes) {
        let problem = format!(
            "{size} is out of range: use {} to {}",
            Size::bytes(min),
            Size::bytes(max)
        );
        return Err(BadInput::new("--memory", problem));
    }
    if !bytes.is_multiple_of(MEMORY_STEP) {
        return Err(BadInput::new(
            "--memory",
            format!("{size} is not a multiple of 2M"),
        ));
    }
    Ok(bytes)
}

fn vsock(config: Option<&VsockConfig>) -> Result<Option<VsockChoice>> {
    let config = config.cloned().unwrap_or_default();
    if config.enabled == Some(false) {
        if config.cid.is_some() || config.socket.is_some() {
            return Err(BadInput::new(
                "--vsock",
                "off and settings at once: leave either out",
            ));
        }
        return Ok(None);
    }
    // Virtio 1.2, 5.10.4: 0, 1, 2 and 0xffffffff are reserved.
    let cid = ranged("--vsock", "cid", config.cid.unwrap_or(3), 3, u32::MAX - 1)?;
    Ok(Some(VsockChoice {
        cid,
        socket: config.socket,
    }))
}

fn sockets(control: Option<&Path>, vsock: Option<&VsockChoice>) -> Result<()> {
    let vsock = vsock.and_then(|vsock| vsock.socket.as_deref());
    for (option, path) in [("--control", control), ("--vsock socket", vsock)] {
        if let Some(path) = path
            && path.as_os_str().len() > SOCKET_PATH_MAX
        {
            return Err(BadInput::new(
                option,
                format!("the path has more than {SOCKET_PATH_MAX} bytes: use a shorter one"),
            ));
        }
    }
    if control.is_some() && control == vsock {
        return Err(BadInput::new(
            "--control and --vsock socket",
            "the same path: give each its own",
        ));
    }
    Ok(())
}

fn nvme(configs: &[NvmeConfig], name: &GuestName) -> Result<Vec<NvmeSpec>> {
    let mut serials = HashMap::new();
    let mut specs = Vec::new();
    for (index, config) in configs.iter().enumerate() {
        let serial = match &config.serial {
            Some(serial) => serial.clone(),
            None => {
                // The name's beginning and the controller's number, in 20 characters.
                let number = format!("-{index}");
                let start: String = name.as_str().chars().take(20 - number.len()).collect();
                start + &number
            }
        };
        // NVMe 1.4, 5.15.2.2 (Identify Controller, SN): 20 bytes, ASCII 0x20 to 0x7e (section 1.5).
        let printable = serial.bytes().all(|byte| (0x20..=0x7e).contains(&byte));
        if !(1..=20).contains(&serial.len()) || !printable || serial.trim() != serial {
            return Err(BadInput::new(
                format!("--nvme serial={serial}"),
                "not a serial number: use 1 to 20 printable ASCII characters",
            ));
        }
        if let Some(other) = serials.insert(serial.clone(), index) {
            return Err(BadInput::new(
                format!("--nvme serial={serial}"),
                format!("controllers {other} and {index} have it: give each its own"),
            ));
        }
        if config.namespace.is_empty() || config.namespace.len() > NAMESPACES_MAX {
            return Err(BadInput::new(
                format!("--nvme {index}"),
                format!(
                    "{} namespaces: give 1 to {NAMESPACES_MAX}",
                    config.namespace.len()
                ),
            ));
        }
        specs.push(NvmeSpec {
            name: format!("nvme{index}"),
            serial,
            queues: ranged("--nvme", "queues", config.queues.unwrap_or(64), 1, 64)?,
            namespaces: config
                .namespace
                .iter()
                .map(namespace)
                .collect::<Result<_>>()?,
        });
    }
    Ok(specs)
}

fn namespace(config: &NamespaceConfig) -> Result<NamespaceSpec> {
    let block_size = config.lba.unwrap_or(512);
    if ![512, 4096].contains(&block_size) {
        return Err(BadInput::new(
            format!("--nvme lba={block_size}"),
            "not a block size: use 512 or 4096",
        ));
    }
    let capacity = |key: &str, size: Size| {
        let bytes = size.get();
        if bytes == 0 || !bytes.is_multiple_of(u64::from(block_size)) || bytes > 1 << 60 {
            Err(BadInput::new(
                format!("--nvme {key}={size}"),
                format!("not a capacity: use a multiple of {block_size} bytes from 1M to 1048576T"),
            ))
        } else {
            Ok(bytes)
        }
    };
    let storage = match (&config.path, config.memory, config.null) {
        (Some(path), None, None) => Storage::File {
            path: path.clone(),
            direct: config.direct.unwrap_or(false),
            read_only: config.readonly.unwrap_or(false),
        },
        (None, Some(size), None) => Storage::Memory {
            size: capacity("memory", size)?,
        },
        (None, None, Some(size)) => Storage::Null {
            size: capacity("null", size)?,
        },
        _ => {
            return Err(BadInput::new(
                "--nvme",
                "say where the bytes are kept: exactly one of path=FILE, memory=SIZE and null=SIZE",
            ));
        }
    };
    for (key, given) in [("direct", config.direct), ("readonly", config.readonly)] {
        if given == Some(true) && config.path.is_none() {
            return Err(BadInput::new(
                format!("--nvme {key}"),
                "is for path=FILE only",
            ));
        }
    }
    Ok(NamespaceSpec {
        storage,
        block_size,
    })
}

fn net(configs: &[NetConfig], name: &GuestName) -> Result<Vec<NetSpec>> {
    let mut macs = HashMap::new();
    let mut taps = HashMap::new();
    let mut specs = Vec::new();
    for (index, config) in configs.iter().enumerate() {
        let backend = match (&config.tap, config.loopback.unwrap_or(false)) {
            (Some(tap), false) => NetBackendSpec::Tap {
                interface: interface(tap)?,
            },
            (None, true) => NetBackendSpec::Loopback,
            _ => {
                return Err(BadInput::new(
                    "--net",
                    "say what it is attached to: exactly one of tap=NAME and loopback",
                ));
            }
        };
        let mac = match &config.mac {
            Some(mac) => mac
                .parse()
                .map_err(|problem: String| BadInput::new("--net mac", problem))?,
            None => Mac::derived(name, index),
        };
        if let Some(other) = macs.insert(mac, index) {
            return Err(BadInput::new(
                format!("--net mac={mac}"),
                format!("devices {other} and {index} have it: give each its own"),
            ));
        }
        if let NetBackendSpec::Tap { interface: tap } = &backend
            && let Some(other) = taps.insert(tap.clone(), index)
        {
            return Err(BadInput::new(
                format!("--net tap={tap}"),
                format!("devices {other} and {index} have it: give each its own"),
            ));
        }
        specs.push(NetSpec {
            name: format!("net{index}"),
            backend,
            pairs: ranged("--net", "pairs", config.pairs.unwrap_or(1), 1, 16)?,
            mac: mac.octets(),
        });
    }
    Ok(specs)
}

/// Linux, `dev_valid_name`: 1 to 15 bytes, no `/`, `:` or white space, not `.` or `..`.
fn interface(name: &str) -> Result<String> {
    let bad = |c: char| c == '/' || c == ':' || c.is_whitespace() || c.is_control() || c == '%';
    if (1..=15).contains(&name.len()) && !name.contains(bad) && name != "." && name != ".." {
        Ok(name.to_owned())
    } else {
        Err(BadInput::new(
            format!("--net tap={name}"),
            "not an interface's name: use 1 to 15 characters without `/`, `:`, `%` and space",
        ))
    }
}

fn edu(configs: &[EduConfig]) -> Result<Vec<EduSpec>> {
    let spec = |(index, config): (usize, &EduConfig)| {
        Ok(EduSpec {
            name: config.name.clone().unwrap_or_else(|| format!("edu{index}")),
            dma_mask: ranged("--edu", "dma-mask", config.dma_mask.unwrap_or(28), 12, 64)?,
        })
    };
    configs.iter().enumerate().map(spec).collect()
}

fn dma_probe(configs: &[ProbeConfig]) -> Vec<ProbeSpec> {
    let name = |(index, config): (usize, &ProbeConfig)| ProbeSpec {
        name: config
            .name
            .clone()
            .unwrap_or_else(|| format!("probe{index}")),
    };
    configs.iter().enumerate().map(name).collect()
}

/// Devices' names are keys in the statistics: short words, each of its own.
fn names(checked: &Checked) -> Result<()> {
    let mut taken: HashMap<&str, &str> = HashMap::new();
    let nvme = checked.nvme.iter().map(|nvme| ("--nvme", &nvme.name));
    let net = checked.net.iter().map(|net| ("--net", &net.name));
    let edu = checked.edu.iter().map(|edu| ("--edu", &edu.name));
    let probe = checked.dma_probe.iter();
    let probe = probe.map(|probe| ("--dma-probe", &probe.name));
    if checked.vsock.is_some() {
        taken.insert("vsock", "--vsock");
    }
    for (option, name) in nvme.chain(net).chain(edu).chain(probe) {
        let known = |byte: u8| byte.is_ascii_alphanumeric() || b"._-".contains(&byte);
        if !(1..=31).contains(&name.len()) || !name.bytes().all(known) {
            return Err(BadInput::new(
                format!("{option} name={name}"),
                "not a device's name: use 1 to 31 letters, digits, `.`, `_` and `-`",
            ));
        }
        if let Some(other) = taken.insert(name, option) {
            return Err(BadInput::new(
                format!("{option} name={name}"),
                format!("a device of {other} has this name: give each its own"),
            ));
        }
    }
    Ok(())
}

fn check_host(spec: &Checked) -> Result<()> {
    if let BootSource::Files { kernel, initrd } = &spec.boot {
        readable_file("--kernel", kernel, "a bzImage or an ELF kernel")?;
        if let Some(initrd) = initrd {
            readable_file("--initrd", initrd, "an initial RAM file system")?;
        }
    }
    let mut writers: HashMap<PathBuf, bool> = HashMap::new();
    for namespace in spec.nvme.iter().flat_map(|nvme| &nvme.namespaces) {
        if let Storage::File {
            path, read_only, ..
        } = &namespace.storage
        {
            disk(path, *read_only, namespace.block_size)?;
            let file = fs::canonicalize(path).unwrap_or_else(|_| path.clone());
            let shared = writers.insert(file, !read_only);
            if shared.is_some_and(|writer| writer || !read_only) {
                return Err(BadInput::new(
                    format!("--nvme path={}", path.display()),
                    "used twice: give each namespace its own file, or make all of them readonly",
                ));
            }
        }
    }
    // In a nested host a tap interface is explained where the nested host is set up.
    if spec.accel != Accel::Nested {
        for net in &spec.net {
            if let NetBackendSpec::Tap { interface: tap } = &net.backend {
                tap_interface(tap, net.pairs)?;
            }
        }
    }
    if let SerialMode::File(path) = &spec.serial {
        output_file("--serial file:", path)?;
    }
    if let Some(trace) = spec.iommu.as_ref().and_then(|iommu| iommu.trace.as_ref()) {
        output_file("--iommu trace=", trace)?;
    }
    for (option, path) in [
        ("--control", spec.control.as_deref()),
        (
            "--vsock socket",
            spec.vsock
                .as_ref()
                .and_then(|vsock| vsock.socket.as_deref()),
        ),
    ] {
        if let Some(path) = path {
            socket_path(option, path)?;
        }
    }
    Ok(())
}

fn readable_file(option: &str, path: &Path, what: &str) -> Result<()> {
    let option = format!("{option} {}", path.display());
    let metadata =
        fs::metadata(path).map_err(|error| BadInput::new(&option, io_problem(&error, what)))?;
    if !metadata.is_file() {
        return Err(BadInput::new(
            option,
            format!("not a file: give the path of {what}"),
        ));
    }
    if metadata.len() == 0 {
        return Err(BadInput::new(
            option,
            format!("an empty file: give the path of {what}"),
        ));
    }
    File::open(path).map_err(|error| BadInput::new(&option, io_problem(&error, what)))?;
    Ok(())
}

fn disk(path: &Path, read_only: bool, block: u32) -> Result<()> {
    let what = "a raw disk image or a block device";
    let option = format!("--nvme path={}", path.display());
    let bad = |problem: String| BadInput::new(&option, problem);
    let metadata = fs::metadata(path).map_err(|error| match error.kind() {
        io::ErrorKind::NotFound => bad(format!(
            "no such file: make one with `truncate -s 1G {}`",
            path.display()
        )),
        _ => bad(io_problem(&error, what)),
    })?;
    if !metadata.is_file() && !metadata.file_type().is_block_device() {
        return Err(bad(format!("not a disk: give the path of {what}")));
    }
    let mut file = OpenOptions::new()
        .read(true)
        .write(!read_only)
        .open(path)
        .map_err(|error| match error.kind() {
            io::ErrorKind::PermissionDenied if !read_only => {
                bad("permission denied: it must be readable and writable, or add readonly".into())
            }
            _ => bad(io_problem(&error, what)),
        })?;
    let len = file
        .seek(SeekFrom::End(0))
        .map_err(|error| bad(io_problem(&error, what)))?;
    if len == 0 {
        return Err(bad(format!(
            "an empty disk: enlarge it with `truncate -s 1G {}`",
            path.display()
        )));
    }

    if !len.is_multiple_of(u64::from(block)) {
        return Err(bad(format!(
            "its size, {len} bytes, is not a multiple of lba={block}"
        )));
    }
    Ok(())
}

/// Linux, include/uapi/linux/if_tun.h.
const IFF_TAP: u32 = 0x0002;
const IFF_MULTI_QUEUE: u32 = 0x0100;

fn tap_interface(name: &str, pairs: u16) -> Result<()> {
    let option = format!("--net tap={name}");
    let bad = |problem: String| BadInput::new(&option, problem);
    let Some(index) = interface_index(name) else {
        return Err(bad(format!(
            "no such interface: make it with `ip tuntap add {name} mode tap multi_queue user $USER`"
        )));
    };
    // A process in a network namespace of its own may look at another one's /sys. What cannot be
    // looked at is found out when the interface is opened.
    let sys = Path::new("/sys/class/net").join(name);
    let seen = fs::read_to_string(sys.join("ifindex")).ok();
    if seen.and_then(|text| text.trim().parse().ok()) != Some(index) {
        return Ok(());
    }
    // Present for tun and tap interfaces alone.
    let flags = fs::read_to_string(sys.join("tun_flags"))
        .ok()
        .and_then(|text| u32::from_str_radix(text.trim().trim_start_matches("0x"), 16).ok())
        .unwrap_or(0);
    if flags & IFF_TAP == 0 {
        return Err(bad("not a tap interface: give the name of one".into()));
    }
    if pairs > 1 && flags & IFF_MULTI_QUEUE == 0 {
        return Err(bad(format!(
            "has one queue but pairs={pairs}: use pairs=1, or make it with `ip tuntap add {name} \
             mode tap multi_queue`"
        )));
    }
    OpenOptions::new()
        .read(true)
        .write(true)
        .open("/dev/net/tun")
        .map_err(|error| {
            bad(format!(
                "cannot open /dev/net/tun ({error}): ask for access to it"
            ))
        })?;
    let owner = fs::read_to_string(sys.join("owner"))
        .ok()
        .and_then(|text| text.trim().parse::<i64>().ok());
    let me = rustix::process::geteuid();
    if !me.is_root() && owner != Some(i64::from(me.as_raw())) {
        return Err(bad(format!(
            "belongs to another user: make it with `ip tuntap add {name} mode tap user $USER`"
        )));
    }
    Ok(())
}

fn interface_index(name: &str) -> Option<u32> {
    use rustix::net::{AddressFamily, SocketType, netdevice, socket};
    let socket = socket(AddressFamily::UNIX, SocketType::DGRAM, None).ok()?;
    netdevice::name_to_index(&socket, name).ok()
}

fn output_file(option: &str, path: &Path) -> Result<()> {
    let option = format!("{option}{}", path.display());
    let bad = |problem: &str| BadInput::new(&option, problem);
    if path.is_dir() {
        return Err(bad("a folder: give the path of a file"));
    }
    // Opening would create it; a file that exists can be tried, else its folder must take one.
    let writable = if path.exists() {
        OpenOptions::new().append(true).open(path).is_ok()
    } else {
        let folder = match path.parent() {
            Some(parent) if !parent.as_os_str().is_empty() => parent,
            _ => Path::new("."),
        };
        if !folder.is_dir() {
            return Err(bad("its folder does not exist: make it first"));
        }
        rustix::fs::access(folder, rustix::fs::Access::WRITE_OK).is_ok()
    };
    if writable {
        Ok(())
    } else {
        Err(bad(
            "permission denied: give a path that this user may write",
        ))
    }
}

fn socket_path(option: &str, path: &Path) -> Result<()> {
    let option = format!("{option} {}", path.display());
    let bad = |problem: &str| BadInput::new(&option, problem);
    if let Ok(metadata) = fs::symlink_metadata(path) {
        if !metadata.file_type().is_socket() {
            return Err(bad("exists and is not a socket: give a path that is free"));
        }
        if std::os::unix::net::UnixStream::connect(path).is_ok() {
            return Err(bad(
                "another program listens on it: give a path that is free",
            ));
        }
        return Ok(());
    }
    match path.parent() {
        Some(parent) if parent.as_os_str().is_empty() || parent.is_dir() => Ok(()),
        _ => Err(bad("its folder does not exist: make it first")),
    }
}

#[cfg(test)]
mod tests;

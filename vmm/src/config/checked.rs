//! A configuration that has been checked.

use std::fmt;
use std::path::{Path, PathBuf};
use std::str::FromStr;

use guest_images::ImageName;

use crate::machine::{
    EduSpec, IommuSpec, MachineSpec, NetSpec, NvmeSpec, OnReboot, ProbeSpec, SerialMode, VsockSpec,
};

/// A guest's name: 1 to 48 of `a-z A-Z 0-9 . _ -`, not starting with a dot or a dash. It is the name
/// of its runtime folder, so it is kept short enough for a Unix socket's path.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct GuestName(String);

impl GuestName {
    /// The text.
    pub fn as_str(&self) -> &str {
        &self.0
    }
}

impl FromStr for GuestName {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let known = |byte: u8| byte.is_ascii_alphanumeric() || b"._-".contains(&byte);
        if (1..=48).contains(&text.len())
            && text.bytes().all(known)
            && !text.starts_with(['.', '-'])
        {
            Ok(Self(text.to_owned()))
        } else {
            Err(format!(
                "`{text}` is not a guest's name: use 1 to 48 letters, digits, `.`, `_` or `-`, \
                 starting with a letter, a digit or `_`"
            ))
        }
    }
}

impl fmt::Display for GuestName {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

/// A unicast Ethernet address.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Mac([u8; 6]);

impl Mac {
    /// The address of interface `index` of the guest `name` when none is given: locally
    /// administered, and different for guests with different names.
    pub fn derived(name: &GuestName, index: usize) -> Self {
        // FNV-1a, 64 bits: spreads names well, and is the same in every build.
        let mut hash: u64 = 0xcbf2_9ce4_8422_2325;
        for byte in name.as_str().bytes().chain(index.to_le_bytes()) {
            hash = (hash ^ u64::from(byte)).wrapping_mul(0x0100_0000_01b3);
        }
        let [_, _, a, b, c, d, e, f] = hash.to_be_bytes();
        Self([(a & 0xfc) | 0x02, b, c, d, e, f])
    }

    /// The six octets in the order of transmission.
    pub fn octets(self) -> [u8; 6] {
        self.0
    }
}

impl FromStr for Mac {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let error =
            || format!("`{text}` is not a hardware address: use for example 52:54:00:12:34:56");
        let mut octets = [0; 6];
        let mut parts = text.split(':');
        for octet in &mut octets {
            let part = parts.next().ok_or_else(error)?;
            if part.len() != 2 || !part.bytes().all(|byte| byte.is_ascii_hexdigit()) {
                return Err(error());
            }
            *octet = u8::from_str_radix(part, 16).map_err(|_| error())?;
        }
        if parts.next().is_some() {
            return Err(error());
        }
        if octets[0] & 1 != 0 || octets == [0; 6] {
            return Err(format!(
                "`{text}` is not the address of one station: the first octet must be even and not \
                 all may be 0"
            ));
        }
        Ok(Self(octets))
    }
}

impl fmt::Display for Mac {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let [a, b, c, d, e, g] = self.0;
        write!(f, "{a:02x}:{b:02x}:{c:02x}:{d:02x}:{e:02x}:{g:02x}")
    }
}

/// An image's name, checked.
///
/// # Errors
/// It is no image's name; the text says which there are.
pub fn image_name(name: &str) -> Result<ImageName, String> {
    ImageName::parse(name).map_err(|_| {
        format!(
            "`{name}` is not an image: use debian-12, debian-13, debian-12-dpdk or debian-13-dpdk"
        )
    })
}

/// What to boot.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum BootSource {
    /// An image that Ringside builds when it is not there yet.
    Image(ImageName),
    /// Files of the host.
    Files {
        /// bzImage, ELF with a PVH entry, or multiboot.
        kernel: PathBuf,
        /// Initial RAM file system.
        initrd: Option<PathBuf>,
    },
}

/// The files to boot from, once an image has been built or found.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct BootFiles {
    /// bzImage, ELF with a PVH entry, or multiboot.
    pub kernel: PathBuf,
    /// Initial RAM file system.
    pub initrd: Option<PathBuf>,
    /// The whole kernel command line.
    pub cmdline: String,
}

/// Which KVM runs the guest.
#[derive(
    Clone,
    Copy,
    Debug,
    Default,
    PartialEq,
    Eq,
    clap::ValueEnum,
    serde::Serialize,
    serde::Deserialize,
)]
#[serde(rename_all = "kebab-case")]
pub enum Accel {
    /// The host's KVM if it can run a kernel, else nested.
    #[default]
    Auto,
    /// The host's KVM.
    Kvm,
    /// A throw-away host under QEMU's emulation, which has a real KVM: correct, not fast.
    Nested,
}

/// A checked configuration. Whoever has one need not check values again; files may still have gone
/// away.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Checked {
    /// The guest's name.
    pub name: GuestName,
    /// What to boot.
    pub boot: BootSource,
    /// Appended to the kernel's command line; may be empty.
    pub cmdline: String,
    /// 1 to [`MAX_VCPUS`](crate::machine::MAX_VCPUS).
    pub vcpus: u8,
    /// Bytes of guest memory, a multiple of 2 MiB.
    pub memory: u64,
    /// NVMe controllers; their serial numbers differ.
    pub nvme: Vec<NvmeSpec>,
    /// Network devices; their addresses and tap interfaces differ.
    pub net: Vec<NetSpec>,
    /// The IOMMU, if there is one.
    pub iommu: Option<IommuSpec>,
    /// Educational functions; the names of all devices differ.
    pub edu: Vec<EduSpec>,
    /// DMA probes.
    pub dma_probe: Vec<ProbeSpec>,
    /// The vsock device, unless it was switched off.
    pub vsock: Option<VsockChoice>,
    /// The first serial port.
    pub serial: SerialMode,
    /// The control socket; `None`: in the runtime folder.
    pub control: Option<PathBuf>,
    /// What a reset does.
    pub on_reboot: OnReboot,
    /// Ports for test kernels.
    pub test_ports: bool,
    /// Which KVM.
    pub accel: Accel,
    /// Print the times of the steps of the start.
    pub trace_boot: bool,
}

/// The virtio-vsock device, before its socket's place is known.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct VsockChoice {
    /// The guest's context id, 3 to 0xffff_fffe.
    pub cid: u32,
    /// The Unix socket for connections to the guest; `None`: in the runtime folder.
    pub socket: Option<PathBuf>,
}

impl Checked {
    /// The machine, once it is known which files it boots and where its vsock's socket is when the
    /// user has not said.
    pub fn machine(&self, boot: &BootFiles, vsock: &Path) -> MachineSpec {
        MachineSpec {
            name: self.name.to_string(),
            kernel: boot.kernel.clone(),
            initrd: boot.initrd.clone(),
            cmdline: boot.cmdline.clone(),
            vcpus: self.vcpus,
            memory: self.memory,
            nvme: self.nvme.clone(),
            net: self.net.clone(),
            edu: self.edu.clone(),
            dma_probe: self.dma_probe.clone(),
            iommu: self.iommu.clone(),
            vsock: self.vsock.as_ref().map(|choice| VsockSpec {
                cid: choice.cid.into(),
                socket: choice.socket.clone().unwrap_or_else(|| vsock.to_owned()),
            }),
            serial: self.serial.clone(),
            on_reboot: self.on_reboot,
            test_ports: self.test_ports,
            trace_boot: self.trace_boot,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_fit_a_folder() {
        for good in ["a", "debian-13", "A.b_c-9", "_x"] {
            assert!(good.parse::<GuestName>().is_ok(), "{good}");
        }
        let long = "x".repeat(49);
        for bad in ["", ".", "..", ".a", "-a", "a/b", "a b", "ä", &long] {
            assert!(bad.parse::<GuestName>().is_err(), "{bad}");
        }
    }

    #[test]
    fn addresses_are_of_one_station() {
        let mac: Mac = "52:54:00:Ab:cd:0f".parse().unwrap();
        assert_eq!(mac.octets(), [0x52, 0x54, 0, 0xab, 0xcd, 0x0f]);
        assert_eq!(mac.to_string(), "52:54:00:ab:cd:0f");
        for bad in [
            "",
            "52:54:00:00:00",
            "52:54:00:00:00:00:00",
            "52-54-00-00-00-00",
            "5:54:00:00:00:00",
            "01:00:5e:00:00:01",
            "ff:ff:ff:ff:ff:ff",
            "00:00:00:00:00:00",
            "+2:54:00:00:00:00",
        ] {
            assert!(bad.parse::<Mac>().is_err(), "{bad}");
        }
    }

    #[test]
    fn derived_addresses_differ_and_are_local_unicast() {
        let (a, b) = ("a".parse().unwrap(), "b".parse().unwrap());
        let all = [
            Mac::derived(&a, 0),
            Mac::derived(&a, 1),
            Mac::derived(&b, 0),
        ];
        for mac in all {
            assert_eq!(mac.octets()[0] & 3, 2, "{mac}");
        }
        assert!(all[0] != all[1] && all[0] != all[2] && all[1] != all[2]);
    }
}

//! What a machine is made of, after configuration has been parsed and before anything is created.

use std::path::PathBuf;

/// Most virtual CPUs a machine may have.
pub const MAX_VCPUS: u8 = 32;

/// Smallest guest memory in bytes: below it not even a kernel's early code fits.
pub const MIN_MEMORY: u64 = 16 << 20;

/// A whole machine. `Machine::new` builds it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct MachineSpec {
    /// The machine's name, for messages.
    pub name: String,
    /// bzImage, ELF with a PVH note, or multiboot.
    pub kernel: PathBuf,
    /// Initial RAM disk.
    pub initrd: Option<PathBuf>,
    /// Kernel command line, passed as it is.
    pub cmdline: String,
    /// Virtual CPUs, 1 to [`MAX_VCPUS`].
    pub vcpus: u8,
    /// Guest memory in bytes; a multiple of 4096, at least [`MIN_MEMORY`].
    pub memory: u64,
    /// NVMe controllers, in bus order.
    pub nvme: Vec<NvmeSpec>,
    /// Network interfaces, in bus order.
    pub net: Vec<NetSpec>,
    /// The IOMMU between all devices and memory.
    pub iommu: Option<IommuSpec>,
    /// Educational functions, in bus order.
    pub edu: Vec<EduSpec>,
    /// DMA probes, in bus order.
    pub dma_probe: Vec<ProbeSpec>,
    /// The virtio-vsock device.
    pub vsock: Option<VsockSpec>,
    /// What COM1 is connected to.
    pub serial: SerialMode,
    /// What a guest's reset request does.
    pub on_reboot: OnReboot,
    /// The ports that test kernels end through and learn about the machine from.
    pub test_ports: bool,
    /// Print the times of the steps from start to the first exit of the guest.
    pub trace_boot: bool,
}

/// One NVMe controller.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct NvmeSpec {
    /// The user's name for it, for messages and statistics.
    pub name: String,
    /// Serial number in Identify Controller, at most 20 ASCII characters.
    pub serial: String,
    /// I/O queue pairs offered, 1 to 64.
    pub queues: u16,
    /// Namespaces; the first has NSID 1.
    pub namespaces: Vec<NamespaceSpec>,
}

/// One namespace.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct NamespaceSpec {
    /// Where its bytes are kept.
    pub storage: Storage,
    /// Logical block size in bytes: 512 or 4096.
    pub block_size: u32,
}

/// Where a namespace's bytes are kept.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Storage {
    /// A raw image file or a block device.
    File {
        /// Its path.
        path: PathBuf,
        /// Bypass the host's page cache (`O_DIRECT`).
        direct: bool,
        /// Refuse writes.
        read_only: bool,
    },
    /// Host memory, lost at exit.
    Memory {
        /// Size in bytes.
        size: u64,
    },
    /// Nothing: reads give zeroes, writes vanish.
    Null {
        /// Size in bytes.
        size: u64,
    },
}

/// One network interface.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct NetSpec {
    /// The user's name for it, for messages and statistics.
    pub name: String,
    /// What the other end is.
    pub backend: NetBackendSpec,
    /// Queue pairs, 1 to 16.
    pub pairs: u16,
    /// MAC address.
    pub mac: [u8; 6],
}

/// The other end of a network interface.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum NetBackendSpec {
    /// The host interface of this name; created if it does not exist and the host permits.
    Tap {
        /// Interface name.
        interface: String,
    },
    /// Every packet sent comes back.
    Loopback,
}

/// An Intel VT-d remapping unit. The fields are what its capability registers will say.
#[derive(Clone, Debug, PartialEq, Eq)]
#[expect(clippy::struct_excessive_bools, reason = "each is a capability bit")]
pub struct IommuSpec {
    /// Scalable mode beside legacy mode.
    pub scalable: bool,
    /// Bits of device addresses: 39, 48 or 57.
    pub address_width: u8,
    /// Not-present entries may be cached (CAP.CM).
    pub caching_mode: bool,
    /// Page walks are coherent with CPU caches (ECAP.C).
    pub coherent: bool,
    /// Interrupt remapping.
    pub interrupt_remapping: bool,
    /// 32-bit interrupt destinations (ECAP.EIM); `None`: if the host's KVM can.
    pub x2apic: Option<bool>,
    /// Pass-through translation (ECAP.PT).
    pub pass_through: bool,
    /// First-stage tables, in scalable mode.
    pub first_stage: bool,
    /// Second-stage tables.
    pub second_stage: bool,
    /// Largest page of the tables.
    pub largest_page: LargestPage,
    /// Sets of each IOTLB, a power of two.
    pub iotlb_sets: u16,
    /// Ways of each IOTLB.
    pub iotlb_ways: u16,
    /// Fault recording registers.
    pub fault_registers: u8,
    /// Gets each access to the unit's registers.
    pub trace: Option<PathBuf>,
}

/// Largest page of the IOMMU's tables; all smaller ones are possible too.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
pub enum LargestPage {
    /// 4 KiB.
    #[serde(rename = "4K")]
    Kib4,
    /// 2 MiB.
    #[serde(rename = "2M")]
    Mib2,
    /// 1 GiB.
    #[default]
    #[serde(rename = "1G")]
    Gib1,
}

/// One educational function.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct EduSpec {
    /// The user's name for it, for messages and statistics.
    pub name: String,
    /// Address lines of its DMA engine, 12 to 64.
    pub dma_mask: u8,
}

/// One DMA probe.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ProbeSpec {
    /// The user's name for it, for messages and statistics.
    pub name: String,
}

/// The virtio-vsock device and its mapping to the host.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct VsockSpec {
    /// The guest's context id, 3 or more.
    pub cid: u64,
    /// The AF_UNIX socket on which the host connects to guest ports.
    pub socket: PathBuf,
}

/// What COM1 is connected to.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum SerialMode {
    /// Standard input and output; a terminal is put into raw mode.
    Stdio,
    /// Output to a file, which is created or truncated; no input.
    File(PathBuf),
    /// Nothing.
    Null,
}

/// What a guest's reset request does.
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
pub enum OnReboot {
    /// Ringside ends, with the exit code for a reboot.
    #[default]
    Exit,
    /// The machine is built afresh and starts again.
    Restart,
}

/// Why a run ended.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum ExitReason {
    /// The guest switched itself off (ACPI S5).
    PowerOff,
    /// The guest asked for a reset. (A triple fault is no request: it is [`ExitReason::Error`].)
    Reboot,
    /// The guest's kernel panicked.
    Panic,
    /// A test kernel is done, with this result (only with [`MachineSpec::test_ports`]).
    DebugExit(u32),
    /// The user ended it: the terminal escape, a signal or the control socket.
    Killed,
    /// The guest or KVM failed in a way that it cannot go on from; the text says how and holds the
    /// registers.
    Error(String),
}

impl ExitReason {
    /// The process's exit status for this reason. 0 is power-off; 1 and 2 are left to errors before
    /// the machine ran (2: bad configuration). A test kernel's result is 128 plus its low seven bits,
    /// so that it is none of the others.
    pub fn code(&self) -> u8 {
        match self {
            ExitReason::DebugExit(result) => 0x80 | result.to_le_bytes()[0],
            ExitReason::PowerOff => 0,
            ExitReason::Reboot => 10,
            ExitReason::Panic => 11,
            ExitReason::Error(_) => 12,
            ExitReason::Killed => 13,
        }
    }
}

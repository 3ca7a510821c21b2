//! A PCI function through vfio: container, group, device, DMA mappings, interrupts.
//!
//! Interface: the Linux kernel's Documentation/driver-api/vfio.rst and include/uapi/linux/vfio.h.

use std::ffi::{CString, c_int, c_ulong};
use std::fs::{self, File};
use std::io;
use std::os::fd::AsRawFd;
use std::os::unix::fs::FileExt;

use crate::sys::{self, Shared};

// _IO(';', 100 + n)
const GET_API_VERSION: c_ulong = 0x3b64;
const CHECK_EXTENSION: c_ulong = 0x3b65;
const SET_IOMMU: c_ulong = 0x3b66;
const GROUP_GET_STATUS: c_ulong = 0x3b67;
const GROUP_SET_CONTAINER: c_ulong = 0x3b68;
const GROUP_GET_DEVICE_FD: c_ulong = 0x3b6a;
const DEVICE_GET_INFO: c_ulong = 0x3b6b;
const DEVICE_GET_REGION_INFO: c_ulong = 0x3b6c;
const DEVICE_GET_IRQ_INFO: c_ulong = 0x3b6d;
const DEVICE_SET_IRQS: c_ulong = 0x3b6e;
const DEVICE_RESET: c_ulong = 0x3b6f;
const IOMMU_MAP_DMA: c_ulong = 0x3b71;
const IOMMU_UNMAP_DMA: c_ulong = 0x3b72;

const API_VERSION: c_int = 0;
const TYPE1_V2: c_ulong = 3;
const GROUP_VIABLE: u32 = 1;
const DEVICE_CAN_RESET: u32 = 1;
const REGION_MMAP: u32 = 4;
const DMA_READ: u32 = 1;
const DMA_WRITE: u32 = 2;
const CONFIG_REGION: u32 = 7;
const MSIX: u32 = 2;
const IRQ_DATA_NONE: u32 = 1;
const IRQ_DATA_EVENTFD: u32 = 4;
const IRQ_ACTION_TRIGGER: u32 = 32;

/// PCI's command register and its bits: memory decoding and bus mastering.
const COMMAND: u64 = 4;
const COMMAND_MEMORY_MASTER: u16 = 2 | 4;

#[repr(C)]
#[derive(Default)]
struct GroupStatus {
    argsz: u32,
    flags: u32,
}

#[repr(C)]
#[derive(Default)]
struct DeviceInfo {
    argsz: u32,
    flags: u32,
    num_regions: u32,
    num_irqs: u32,
}

#[repr(C)]
#[derive(Default)]
struct RegionInfo {
    argsz: u32,
    flags: u32,
    index: u32,
    cap_offset: u32,
    size: u64,
    offset: u64,
}

#[repr(C)]
#[derive(Default)]
struct IrqInfo {
    argsz: u32,
    flags: u32,
    index: u32,
    count: u32,
}

/// struct vfio_irq_set with room for two descriptors.
#[repr(C)]
struct IrqSet {
    argsz: u32,
    flags: u32,
    index: u32,
    start: u32,
    count: u32,
    fds: [c_int; 2],
}

#[repr(C)]
struct DmaMap {
    argsz: u32,
    flags: u32,
    vaddr: u64,
    iova: u64,
    size: u64,
}

#[repr(C)]
struct DmaUnmap {
    argsz: u32,
    flags: u32,
    iova: u64,
    size: u64,
}

/// What the kernel wants in `argsz`.
fn size<T>() -> u32 {
    size_of::<T>() as u32
}

fn context<T>(what: &str, result: io::Result<T>) -> io::Result<T> {
    result.map_err(|error| io::Error::new(error.kind(), format!("{what}: {error}")))
}

/// A function that vfio-pci is bound to, with an IOMMU domain that holds it alone.
pub struct Function {
    // The group and the device must be closed before the container, in this order.
    device: File,
    _group: File,
    container: File,
    config: u64,
}

impl Function {
    /// Opens `address` (`0000:00:02.0`), resets it, and lets it decode memory accesses and master
    /// the bus.
    pub fn open(address: &str) -> io::Result<Self> {
        let link = format!("/sys/bus/pci/devices/{address}/iommu_group");
        let group = context("no IOMMU group", fs::read_link(link))?;
        let number = group.file_name().and_then(|name| name.to_str());
        let number = number.ok_or_else(|| io::Error::other("the IOMMU group has no number"))?;
        let open = |path: &str| {
            let file = File::options().read(true).write(true).open(path);
            context(path, file)
        };
        let container = open("/dev/vfio/vfio")?;
        if sys::ioctl_value(&container, GET_API_VERSION, 0)? != API_VERSION {
            return Err(io::Error::other("unknown version of vfio"));
        }
        if sys::ioctl_value(&container, CHECK_EXTENSION, TYPE1_V2)? != 1 {
            return Err(io::Error::other("no type 1 (version 2) IOMMU"));
        }
        // Without an IOMMU the file would be called noiommu-N.
        let group = open(&format!("/dev/vfio/{number}"))?;
        let mut status = GroupStatus {
            argsz: size::<GroupStatus>(),
            flags: 0,
        };
        sys::ioctl(&group, GROUP_GET_STATUS, &mut status)?;
        if status.flags & GROUP_VIABLE == 0 {
            return Err(io::Error::other(
                "the group is not viable: another function of it has another driver",
            ));
        }
        let mut fd = container.as_raw_fd();
        context(
            "set container",
            sys::ioctl(&group, GROUP_SET_CONTAINER, &mut fd),
        )?;
        context(
            "set IOMMU",
            sys::ioctl_value(&container, SET_IOMMU, TYPE1_V2),
        )?;
        let mut name = CString::new(address)?.into_bytes_with_nul();
        let device = sys::ioctl(&group, GROUP_GET_DEVICE_FD, name.as_mut_slice());
        let device = sys::owned(context("get device", device)?);

        let mut info = DeviceInfo {
            argsz: size::<DeviceInfo>(),
            ..DeviceInfo::default()
        };
        sys::ioctl(&device, DEVICE_GET_INFO, &mut info)?;
        if info.flags & DEVICE_CAN_RESET != 0 {
            context("reset", sys::ioctl_value(&device, DEVICE_RESET, 0))?;
        }
        let mut function = Self {
            device,
            _group: group,
            container,
            config: 0,
        };
        function.config = function.region(CONFIG_REGION)?.offset;
        let mut command = [0; 2];
        let at = function.config + COMMAND;
        function.device.read_exact_at(&mut command, at)?;
        let command = u16::from_le_bytes(command) | COMMAND_MEMORY_MASTER;
        function.device.write_all_at(&command.to_le_bytes(), at)?;
        Ok(function)
    }

    fn region(&self, index: u32) -> io::Result<RegionInfo> {
        let mut info = RegionInfo {
            argsz: size::<RegionInfo>(),
            index,
            ..RegionInfo::default()
        };
        sys::ioctl(&self.device, DEVICE_GET_REGION_INFO, &mut info)?;
        Ok(info)
    }

    /// Maps the registers of a BAR.
    pub fn bar(&self, index: u32) -> io::Result<Shared> {
        let info = self.region(index)?;
        if info.flags & REGION_MMAP == 0 {
            return Err(io::Error::other(format!("BAR {index} cannot be mapped")));
        }
        let length = usize::try_from(info.size).map_err(io::Error::other)?;
        context(
            "map BAR",
            Shared::of_file(&self.device, info.offset, length),
        )
    }

    /// Lets the function read and write `memory` at `iova`.
    pub fn map(&self, memory: &Shared, iova: u64) -> io::Result<()> {
        let mut map = DmaMap {
            argsz: size::<DmaMap>(),
            flags: DMA_READ | DMA_WRITE,
            vaddr: memory.address(),
            iova,
            size: memory.len() as u64,
        };
        let result = sys::ioctl(&self.container, IOMMU_MAP_DMA, &mut map);
        context("map DMA", result).map(|_| ())
    }

    /// Takes the memory at `iova` away from the function.
    pub fn unmap(&self, memory: &Shared, iova: u64) -> io::Result<()> {
        let mut unmap = DmaUnmap {
            argsz: size::<DmaUnmap>(),
            flags: 0,
            iova,
            size: memory.len() as u64,
        };
        let result = sys::ioctl(&self.container, IOMMU_UNMAP_DMA, &mut unmap);
        context("unmap DMA", result).map(|_| ())
    }

    /// Enables the first two MSI-X vectors; each adds to its counter.
    pub fn enable_msix(&self) -> io::Result<[File; 2]> {
        let mut info = IrqInfo {
            argsz: size::<IrqInfo>(),
            index: MSIX,
            ..IrqInfo::default()
        };
        sys::ioctl(&self.device, DEVICE_GET_IRQ_INFO, &mut info)?;
        if info.count < 2 {
            return Err(io::Error::other(format!("{} MSI-X vectors", info.count)));
        }
        let events = [sys::eventfd()?, sys::eventfd()?];
        let mut set = IrqSet {
            argsz: size::<IrqSet>(),
            flags: IRQ_DATA_EVENTFD | IRQ_ACTION_TRIGGER,
            index: MSIX,
            start: 0,
            count: 2,
            fds: [events[0].as_raw_fd(), events[1].as_raw_fd()],
        };
        context(
            "enable MSI-X",
            sys::ioctl(&self.device, DEVICE_SET_IRQS, &mut set),
        )?;
        Ok(events)
    }

    /// Disables MSI-X.
    pub fn disable_msix(&self) -> io::Result<()> {
        let mut set = IrqSet {
            argsz: size::<IrqSet>() - size::<[c_int; 2]>(),
            flags: IRQ_DATA_NONE | IRQ_ACTION_TRIGGER,
            index: MSIX,
            start: 0,
            count: 0,
            fds: [-1; 2],
        };
        let result = sys::ioctl(&self.device, DEVICE_SET_IRQS, &mut set);
        context("disable MSI-X", result).map(|_| ())
    }
}

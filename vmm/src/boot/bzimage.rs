//! bzImage by the 64-bit boot protocol.

use std::fs::File;

use iommu::GuestRam;
use linux_loader::configurator::linux::LinuxBootConfigurator;
use linux_loader::configurator::{BootConfigurator, BootParams};
use linux_loader::loader::bootparam::{boot_e820_entry, boot_params, setup_header};
use linux_loader::loader::{BzImage, KernelLoader};
use std::io::{Read, Seek, SeekFrom};
use vm_memory::{ByteValued, GuestAddress};

use super::{BootError, BootFiles, Entry, load_initrd, write_command_line};
use crate::layout;
use crate::memory;

/// Offset of the setup header in the file.
const HEADER: u64 = 0x1f1;
/// `xloadflags`: the kernel has the 64-bit entry point.
const XLF_KERNEL_64: u16 = 1;
/// Offset of the 64-bit entry point from the start of the protected-mode code.
const ENTRY_64: u64 = 0x200;
/// `type_of_loader`: none of the registered ones.
const LOADER_UNDEFINED: u8 = 0xff;
/// `vid_mode`: normal.
const VIDEO_NORMAL: u16 = 0xffff;
/// First protocol version with everything that is used here.
const VERSION_MIN: u16 = 0x20c;

pub(super) fn load(
    ram: &GuestRam,
    memory: u64,
    files: &BootFiles<'_>,
    kernel: &mut File,
    rsdp: u64,
) -> Result<Entry, BootError> {
    let path = || files.kernel.to_owned();
    let header = read_header(kernel).map_err(|e| BootError::Read(path(), e))?;
    if header.version < VERSION_MIN {
        return Err(BootError::Unsupported(
            path(),
            "the kernel is older than Linux 3.8 (boot protocol 2.12)",
        ));
    }
    if header.xloadflags & XLF_KERNEL_64 == 0 {
        return Err(BootError::Unsupported(
            path(),
            "the kernel has no 64-bit entry point: an x86-64 kernel is needed",
        ));
    }

    // Where it prefers to be, it does not have to move itself.
    let start = header.pref_address.max(layout::HIGH_MEMORY);
    let low_end = memory::regions(memory)[0].1;
    let end = start
        .checked_add(u64::from(header.init_size))
        .filter(|end| *end <= low_end)
        .ok_or_else(|| {
            let needed = start.saturating_add(u64::from(header.init_size));
            BootError::TooLarge {
                file: path(),
                needed: needed.div_ceil(1 << 20),
                limit: layout::LOW_RAM_LIMIT,
                present: low_end >> 20,
            }
        })?;
    let loaded = BzImage::load(ram, Some(GuestAddress(start)), kernel, None)
        .map_err(|e| BootError::Load(path(), e))?;
    let mut hdr = loaded.setup_header.unwrap_or(header);
    let end = end.max(loaded.kernel_end);

    write_command_line(ram, files.cmdline, u64::from(header.cmdline_size))?;
    let narrow = |value: u64| u32::try_from(value).map_err(|_| BootError::Memory);
    hdr.type_of_loader = LOADER_UNDEFINED;
    hdr.vid_mode = VIDEO_NORMAL;
    hdr.cmd_line_ptr = narrow(layout::COMMAND_LINE)?;
    hdr.ramdisk_image = 0;
    hdr.ramdisk_size = 0;
    if let Some(initrd) = files.initrd {
        let limit = u64::from(header.initrd_addr_max) + 1;
        let (address, len) = load_initrd(ram, memory, initrd, end, limit)?;
        hdr.ramdisk_image = narrow(address)?;
        hdr.ramdisk_size = narrow(len)?;
    }

    let mut params = boot_params {
        hdr,
        acpi_rsdp_addr: rsdp,
        ..Default::default()
    };
    let mut table = params.e820_table;
    let map = memory::guest_map(memory);
    for (slot, &(addr, size, kind)) in table.iter_mut().zip(&map) {
        *slot = boot_e820_entry {
            addr,
            size,
            r#type: kind as u32,
        };
    }
    params.e820_table = table;
    params.e820_entries = u8::try_from(map.len()).map_err(|_| BootError::Memory)?;
    LinuxBootConfigurator::write_bootparams(
        &BootParams::new(&params, GuestAddress(layout::ZERO_PAGE)),
        ram,
    )
    .map_err(|_| BootError::Memory)?;
    Ok(Entry::Linux64 {
        rip: start + ENTRY_64,
    })
}

fn read_header(kernel: &mut File) -> std::io::Result<setup_header> {
    let mut header = setup_header::default();
    kernel.seek(SeekFrom::Start(HEADER))?;
    kernel.read_exact(header.as_mut_slice())?;
    Ok(header)
}

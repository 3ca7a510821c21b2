//! ELF by the PVH boot protocol.

use std::fs::File;

use iommu::GuestRam;
use linux_loader::configurator::pvh::PvhBootConfigurator;
use linux_loader::configurator::{BootConfigurator, BootParams};
use linux_loader::loader::elf::PvhBootCapability;
use linux_loader::loader::elf::start_info::{
    hvm_memmap_table_entry, hvm_modlist_entry, hvm_start_info,
};
use linux_loader::loader::{Elf, KernelLoader};
use vm_memory::GuestAddress;

use super::{BootError, BootFiles, Entry, load_initrd, write_command_line};
use crate::layout;
use crate::memory;

/// `hvm_start_info.magic`.
const MAGIC: u32 = 0x336e_c578;
/// `hvm_start_info.version` with a memory map.
const VERSION: u32 = 1;
/// PVH has no field for the kernel's limit; this is Linux' on x86 (`COMMAND_LINE_SIZE` less one).
const COMMAND_LINE_LIMIT: u64 = 2047;
/// The loader's idea of the image's end leaves out segments without file content, such as a separate
/// `.bss`; the initial RAM disk keeps this distance.
const BEHIND_KERNEL: u64 = 1 << 20;

pub(super) fn load(
    ram: &GuestRam,
    memory: u64,
    files: &BootFiles<'_>,
    kernel: &mut File,
    rsdp: u64,
) -> Result<Entry, BootError> {
    let path = || files.kernel.to_owned();
    let loaded = Elf::load(ram, None, kernel, None).map_err(|e| match e {
        linux_loader::loader::Error::Elf(linux_loader::loader::elf::Error::ReadKernelImage) => {
            BootError::Unsupported(
                path(),
                "the ELF file is cut short, or a segment does not fit in guest memory",
            )
        }
        e => BootError::Load(path(), e),
    })?;
    let PvhBootCapability::PvhEntryPresent(eip) = loaded.pvh_boot_cap else {
        return Err(BootError::Unsupported(
            path(),
            "the ELF file has no PVH entry (Linux needs CONFIG_PVH=y) and no multiboot header",
        ));
    };
    write_command_line(ram, files.cmdline, COMMAND_LINE_LIMIT)?;

    let map: Vec<_> = memory::guest_map(memory)
        .into_iter()
        .map(|(addr, size, kind)| hvm_memmap_table_entry {
            addr,
            size,
            type_: kind as u32,
            reserved: 0,
        })
        .collect();
    let mut info = hvm_start_info {
        magic: MAGIC,
        version: VERSION,
        cmdline_paddr: layout::COMMAND_LINE,
        rsdp_paddr: rsdp,
        memmap_paddr: layout::PVH_MEMORY_MAP,
        memmap_entries: u32::try_from(map.len()).map_err(|_| BootError::Memory)?,
        ..Default::default()
    };
    let mut modules = Vec::new();
    if let Some(initrd) = files.initrd {
        let end = loaded.kernel_end.saturating_add(BEHIND_KERNEL);
        let (paddr, size) = load_initrd(ram, memory, initrd, end, layout::LOW_RAM_LIMIT)?;
        modules.push(hvm_modlist_entry {
            paddr,
            size,
            ..Default::default()
        });
        info.nr_modules = 1;
        info.modlist_paddr = layout::PVH_MODULES;
    }
    let mut params = BootParams::new(&info, GuestAddress(layout::PVH_START_INFO));
    params.set_sections(&map, GuestAddress(layout::PVH_MEMORY_MAP));
    if !modules.is_empty() {
        params.set_modules(&modules, GuestAddress(layout::PVH_MODULES));
    }
    PvhBootConfigurator::write_bootparams(&params, ram).map_err(|_| BootError::Memory)?;
    Ok(Entry::Pvh { eip: eip.0 })
}

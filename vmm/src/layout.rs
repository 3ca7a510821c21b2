//! The guest-physical and I/O port address map, in one place.
//!
//! ```text
//! 0                  low RAM, up to 3 GiB (boot data and ACPI tables in the first MiB)
//! 0xc000_0000        32-bit PCI window
//! 0xe000_0000        ECAM, 1 MiB a bus
//! 0xfec0_0000        IOAPIC
//! 0xfed9_0000        VT-d remapping unit
//! 0xfee0_0000        local APICs; device writes here are MSIs
//! 0xfffb_d000        three pages that KVM needs on old Intel CPUs
//! 4 GiB              the rest of RAM
//! half the physical address space (at most 2^46): 64-bit PCI window
//! ```
#![forbid(unsafe_code)]

use std::ops::{Range, RangeInclusive};

use iommu::Bdf;

/// GDT of the boot state.
pub const BOOT_GDT: u64 = 0x500;
/// `hvm_start_info` (PVH).
pub const PVH_START_INFO: u64 = 0x6000;
/// Module list (PVH).
pub const PVH_MODULES: u64 = 0x6080;
/// Memory map (PVH).
pub const PVH_MEMORY_MAP: u64 = 0x6100;
/// Multiboot information; a machine boots by one protocol, so the place is PVH's.
pub const MULTIBOOT_INFO: u64 = 0x6000;
/// Module list (multiboot).
pub const MULTIBOOT_MODULES: u64 = 0x6080;
/// Memory map (multiboot).
pub const MULTIBOOT_MEMORY_MAP: u64 = 0x6100;
/// The loader's name (multiboot).
pub const MULTIBOOT_LOADER_NAME: u64 = 0x6300;
/// The module's name (multiboot), at most 255 bytes and a zero.
pub const MULTIBOOT_MODULE_NAME: u64 = 0x6400;
/// `boot_params` (64-bit boot protocol), one page.
pub const ZERO_PAGE: u64 = 0x7000;
/// Top of the boot stack; grows down towards the zero page's end.
pub const BOOT_STACK: u64 = 0x8ff0;
/// Page tables of the 64-bit boot state: one PML4, one PDPT, four directories of 2 MiB pages.
pub const BOOT_PAGE_TABLES: u64 = 0x9000;
/// Kernel command line.
pub const COMMAND_LINE: u64 = 0x2_0000;
/// Room for the command line with its terminating zero.
pub const COMMAND_LINE_ROOM: u64 = 0x1_0000;
/// End of the conventional memory that is reported as RAM.
pub const LOW_MEMORY_END: u64 = 0x9_fc00;
/// ACPI tables, in the area where firmware keeps them.
pub const ACPI_TABLES: Range<u64> = 0xe_0000..0xf_0000;
/// The BIOS's area. Nothing is there but [`RESET_VECTOR`].
pub const BIOS: Range<u64> = 0xf_0000..0x10_0000;
/// Where a guest that wants the BIOS to restart it jumps to.
pub const RESET_VECTOR: u64 = 0xf_fff0;
/// Where extended memory starts.
pub const HIGH_MEMORY: u64 = 0x10_0000;

/// RAM below 4 GiB ends here at the latest.
pub const LOW_RAM_LIMIT: u64 = 0xc000_0000;
/// Memory window for 32-bit BARs.
pub const PCI_WINDOW_32: Range<u64> = 0xc000_0000..0xe000_0000;
/// ECAM of segment 0.
pub const ECAM: Range<u64> = 0xe000_0000..0xf000_0000;
/// IOAPIC registers.
pub const IOAPIC: Range<u64> = 0xfec0_0000..0xfec0_1000;
/// Registers of the VT-d remapping unit, where Intel's chipsets have them.
pub const VTD: Range<u64> = 0xfed9_0000..0xfed9_1000;
/// Under which requester id the IOAPIC's interrupts arrive at the remapping unit: that of a function
/// which cannot exist, since all functions are on bus 0.
pub const IOAPIC_SOURCE: Bdf = match Bdf::new(0xff, 0x1f, 0) {
    Some(bdf) => bdf,
    None => unreachable!(),
};
/// Local APIC registers, at their address after reset.
pub const LOCAL_APIC: u64 = 0xfee0_0000;
/// Identity map page and TSS for KVM on Intel CPUs without unrestricted guest mode.
pub const KVM_IDENTITY_MAP: u64 = 0xfffb_c000;
/// See [`KVM_IDENTITY_MAP`].
pub const KVM_TSS: u32 = 0xfffb_d000;
/// The second part of RAM starts here.
pub const HIGH_RAM: u64 = 1 << 32;

/// Memory window for 64-bit BARs on a CPU with `physical_bits` address lines.
pub fn pci_window_64(physical_bits: u8) -> Range<u64> {
    // 2^46 is the most that four-level guest kernels map; 2^36 is the least that long mode has.
    let top = 1u64 << physical_bits.clamp(36, 46);
    top / 2..top / 4 * 3
}

/// Most RAM in bytes that fits in front of [`pci_window_64`].
pub fn max_memory(physical_bits: u8) -> u64 {
    pci_window_64(physical_bits).start - (HIGH_RAM - LOW_RAM_LIMIT)
}

/// COM1.
pub const COM1: Range<u16> = 0x3f8..0x400;
/// COM1's IOAPIC pin.
pub const COM1_PIN: u8 = 4;
/// The power button's IOAPIC pin (through a Generic Event Device).
pub const POWER_BUTTON_PIN: u8 = 9;
/// IOAPIC pin of the PCI root complex's interrupt line 0; lines 1 to 3 follow.
pub const PCI_PIN: u8 = 16;
/// Index and data port of the CMOS real-time clock.
pub const RTC: Range<u16> = 0x70..0x72;
/// Keyboard controller's command port; only its reset command is there.
pub const KEYBOARD_COMMAND: u16 = 0x64;
/// pvpanic's port, where QEMU has it.
pub const PVPANIC: u16 = 0x505;
/// QEMU's isa-debug-exit, where test kernels look for it (only with test ports).
pub const DEBUG_EXIT: Range<u16> = 0xf4..0xf8;
/// Selector and data port of QEMU's fw_cfg (only with test ports).
pub const FW_CFG: Range<u16> = 0x510..0x512;
/// ACPI sleep control register (hardware-reduced).
pub const SLEEP_CONTROL: u16 = 0x600;
/// ACPI sleep status register (hardware-reduced).
pub const SLEEP_STATUS: u16 = 0x601;
/// Reset control register.
pub const RESET_CONTROL: u16 = 0xcf9;
/// PCI configuration mechanism 1.
pub const PCI_CONFIG: Range<u16> = 0xcf8..0xd00;
/// Port window for PCI I/O BARs.
pub const PCI_IO_WINDOW: RangeInclusive<u16> = 0x1000..=0xffff;

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn nothing_overlaps() {
        let map = [
            0..LOW_RAM_LIMIT,
            PCI_WINDOW_32,
            ECAM,
            IOAPIC,
            VTD,
            LOCAL_APIC..LOCAL_APIC + 0x1000,
            KVM_IDENTITY_MAP..KVM_IDENTITY_MAP + 0x4000,
            HIGH_RAM..pci_window_64(36).start,
            pci_window_64(36),
        ];
        for pair in map.windows(2) {
            assert!(pair[0].end <= pair[1].start, "{pair:x?}");
        }
        for bits in [0, 36, 39, 40, 46, 48, 52] {
            let window = pci_window_64(bits);
            assert!(!window.is_empty() && window.start.is_multiple_of(1 << 30));
        }
    }
}

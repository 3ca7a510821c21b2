//! The reset vector: what is left of a BIOS.
//!
//! On hardware-reduced ACPI without EFI, Linux reboots by jumping to the BIOS's entry point in real
//! mode (arch/x86/kernel/reboot.c, `BOOT_BIOS`), never mind the reset register. So there is code at
//! that place, which resets the machine.

use iommu::GuestRam;
use vm_memory::{Bytes, GuestAddress, GuestMemoryError};

use crate::acpi::RESET_VALUE;
use crate::layout;

/// Writes it.
pub(super) fn write(ram: &GuestRam) -> Result<(), GuestMemoryError> {
    let [low, high] = layout::RESET_CONTROL.to_le_bytes();
    #[rustfmt::skip]
    let code = [
        0xba, low, high,        // mov dx, RESET_CONTROL
        0xb0, RESET_VALUE,      // mov al, RESET_VALUE
        0xee,                   // out dx, al
        0xf4,                   // 1: hlt
        0xeb, 0xfd,             // jmp 1b
    ];
    ram.write_slice(&code, GuestAddress(layout::RESET_VECTOR))
}

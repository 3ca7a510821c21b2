//! Registers of the boot processor at the kernel's entry point, and of every local APIC.

use iommu::GuestRam;
use kvm_bindings::{kvm_dtable, kvm_fpu, kvm_lapic_state, kvm_regs, kvm_segment, kvm_sregs};
use kvm_ioctls::{Error, VcpuFd};
use vm_memory::{Bytes, GuestAddress, GuestMemoryError};

use crate::boot::{Entry, MULTIBOOT_MAGIC};
use crate::layout;

const CR0_PE: u64 = 1;
const CR0_ET: u64 = 1 << 4;
const CR0_PG: u64 = 1 << 31;
const CR4_PAE: u64 = 1 << 5;
const EFER_LME: u64 = 1 << 8;
const EFER_LMA: u64 = 1 << 10;

const PAGE_PRESENT_WRITABLE: u64 = 0b11;
const PAGE_LARGE: u64 = 1 << 7;

/// Selectors that the 64-bit boot protocol prescribes (`__BOOT_CS`, `__BOOT_DS`).
const BOOT_CS: u16 = 0x10;
const BOOT_DS: u16 = 0x18;
const BOOT_TSS: u16 = 0x20;

/// Descriptor types (Intel SDM volume 3, 3.4.5.1 and 3.5).
const TYPE_CODE: u8 = 0xb;
const TYPE_DATA: u8 = 0x3;
const TYPE_BUSY_TSS: u8 = 0xb;

/// Offsets and values in the local APIC's register page (Intel SDM volume 3, 11.5.1).
const LVT_LINT1: usize = 0x360;
const LVT_NMI: u32 = 0x400;

/// Why a vCPU could not be set up.
#[derive(Debug, thiserror::Error)]
pub enum StateError {
    /// KVM refuses registers.
    #[error("KVM refuses the vCPU's {0}: {1}")]
    Kvm(&'static str, Error),
    /// Boot tables do not fit.
    #[error("guest memory is too small for the boot tables")]
    Memory(#[from] GuestMemoryError),
}

/// Puts the boot processor at the entry point.
///
/// # Errors
///
/// KVM refuses, or memory is tiny.
pub fn enter(vcpu: &VcpuFd, ram: &GuestRam, entry: Entry) -> Result<(), StateError> {
    let mut sregs = vcpu
        .get_sregs()
        .map_err(|e| StateError::Kvm("segments", e))?;
    let long = matches!(entry, Entry::Linux64 { .. });
    write_gdt(ram, long)?;
    let code = flat(BOOT_CS, TYPE_CODE, long);
    let data = flat(BOOT_DS, TYPE_DATA, false);
    sregs.cs = code;
    (sregs.ds, sregs.es, sregs.fs, sregs.gs, sregs.ss) = (data, data, data, data, data);
    sregs.tr = task(long);
    sregs.gdt = kvm_dtable {
        base: layout::BOOT_GDT,
        limit: 6 * 8 - 1,
        ..Default::default()
    };
    sregs.idt = kvm_dtable::default();
    if long {
        write_page_tables(ram)?;
        paging(&mut sregs);
    } else {
        (sregs.cr0, sregs.cr3, sregs.cr4, sregs.efer) = (CR0_PE | CR0_ET, 0, 0, 0);
    }
    vcpu.set_sregs(&sregs)
        .map_err(|e| StateError::Kvm("segments", e))?;

    let mut regs = kvm_regs {
        rflags: 2,
        ..Default::default()
    };
    match entry {
        Entry::Linux64 { rip } => {
            regs.rip = rip;
            regs.rsi = layout::ZERO_PAGE;
            regs.rsp = layout::BOOT_STACK;
        }
        Entry::Pvh { eip } => {
            regs.rip = eip;
            regs.rbx = layout::PVH_START_INFO;
        }
        Entry::Multiboot { eip } => {
            regs.rip = eip.into();
            regs.rax = MULTIBOOT_MAGIC.into();
            regs.rbx = layout::MULTIBOOT_INFO;
        }
    }
    vcpu.set_regs(&regs)
        .map_err(|e| StateError::Kvm("registers", e))?;
    let fpu = kvm_fpu {
        fcw: 0x37f,
        mxcsr: 0x1f80,
        ..Default::default()
    };
    vcpu.set_fpu(&fpu)
        .map_err(|e| StateError::Kvm("FPU state", e))
}

/// LINT1 is the NMI, as the MADT says. There is no 8259, so LINT0 stays masked.
///
/// # Errors
///
/// KVM refuses.
pub fn local_apic(vcpu: &VcpuFd) -> Result<(), StateError> {
    let error = |e| StateError::Kvm("local APIC", e);
    let mut apic = vcpu.get_lapic().map_err(error)?;
    write_register(&mut apic, LVT_LINT1, LVT_NMI);
    vcpu.set_lapic(&apic).map_err(error)
}

fn write_register(apic: &mut kvm_lapic_state, at: usize, value: u32) {
    for (to, from) in apic.regs[at..at + 4].iter_mut().zip(value.to_le_bytes()) {
        *to = from.cast_signed();
    }
}

fn paging(sregs: &mut kvm_sregs) {
    sregs.cr3 = layout::BOOT_PAGE_TABLES;
    sregs.cr4 = CR4_PAE;
    sregs.efer = EFER_LME | EFER_LMA;
    sregs.cr0 = CR0_PE | CR0_ET | CR0_PG;
}

/// A code or data segment that covers everything.
fn flat(selector: u16, type_: u8, long: bool) -> kvm_segment {
    kvm_segment {
        base: 0,
        limit: 0xffff_ffff,
        selector,
        type_,
        present: 1,
        db: u8::from(!long),
        s: 1,
        l: u8::from(long),
        g: 1,
        ..Default::default()
    }
}

fn task(long: bool) -> kvm_segment {
    kvm_segment {
        base: 0,
        limit: if long { 0xffff } else { 0x67 },
        selector: BOOT_TSS,
        type_: TYPE_BUSY_TSS,
        present: 1,
        ..Default::default()
    }
}

/// The descriptor that a loaded segment register comes from (Intel SDM volume 3, 3.4.5).
fn descriptor(segment: &kvm_segment) -> u64 {
    let limit = u64::from(if segment.g == 1 {
        segment.limit >> 12
    } else {
        segment.limit
    });
    (limit & 0xffff)
        | (segment.base & 0xff_ffff) << 16
        | u64::from(segment.type_) << 40
        | u64::from(segment.s) << 44
        | u64::from(segment.dpl) << 45
        | u64::from(segment.present) << 47
        | (limit >> 16 & 0xf) << 48
        | u64::from(segment.l) << 53
        | u64::from(segment.db) << 54
        | u64::from(segment.g) << 55
        | (segment.base >> 24 & 0xff) << 56
}

fn write_gdt(ram: &GuestRam, long: bool) -> Result<(), GuestMemoryError> {
    let table = [
        0,
        0,
        descriptor(&flat(BOOT_CS, TYPE_CODE, long)),
        descriptor(&flat(BOOT_DS, TYPE_DATA, false)),
        descriptor(&task(long)),
        0,
    ];
    for (at, entry) in (layout::BOOT_GDT..).step_by(8).zip(table) {
        ram.write_obj::<u64>(entry, GuestAddress(at))?;
    }
    Ok(())
}

/// Maps the first 4 GiB one to one with 2 MiB pages.
fn write_page_tables(ram: &GuestRam) -> Result<(), GuestMemoryError> {
    let root = layout::BOOT_PAGE_TABLES;
    let pointers = root + 0x1000;
    let directories = root + 0x2000;
    ram.write_obj(pointers | PAGE_PRESENT_WRITABLE, GuestAddress(root))?;
    for index in 0..4 {
        let directory = directories + index * 0x1000;
        ram.write_obj(
            directory | PAGE_PRESENT_WRITABLE,
            GuestAddress(pointers + index * 8),
        )?;
    }
    for index in 0..4 * 512 {
        ram.write_obj(
            index << 21 | PAGE_LARGE | PAGE_PRESENT_WRITABLE,
            GuestAddress(directories + index * 8),
        )?;
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn descriptors_are_the_ones_everyone_uses() {
        assert_eq!(
            descriptor(&flat(BOOT_CS, TYPE_CODE, true)),
            0x00af_9b00_0000_ffff
        );
        assert_eq!(
            descriptor(&flat(BOOT_CS, TYPE_CODE, false)),
            0x00cf_9b00_0000_ffff
        );
        assert_eq!(
            descriptor(&flat(BOOT_DS, TYPE_DATA, false)),
            0x00cf_9300_0000_ffff
        );
        assert_eq!(descriptor(&task(false)), 0x0000_8b00_0000_0067);
    }
}

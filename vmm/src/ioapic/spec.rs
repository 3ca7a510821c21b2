//! Registers of the I/O APIC (Intel 82093AA data sheet, 290566-001, section 3; the EOI register is
//! from the I/O Controller Hub 10 data sheet, 319973, 13.5.4).
#![forbid(unsafe_code)]

use bitfield_struct::bitfield;

/// Offset of the I/O register select register.
pub const IOREGSEL: u64 = 0x00;
/// Offset of the data window on the selected register.
pub const IOWIN: u64 = 0x10;
/// Offset of the EOI register: a vector written here ends its level-triggered interrupts.
pub const EOI: u64 = 0x40;

/// Index of the identification register.
pub const IOAPICID: u8 = 0x00;
/// Index of the version register.
pub const IOAPICVER: u8 = 0x01;
/// Index of the arbitration register.
pub const IOAPICARB: u8 = 0x02;
/// Index of the first half of redirection entry 0; each entry has two registers.
pub const IOREDTBL: u8 = 0x10;

/// Version from which the EOI register exists.
pub const VERSION: u32 = 0x20;

/// An entry of the redirection table (82093AA, 3.2.4).
#[bitfield(u64)]
#[derive(PartialEq, Eq)]
pub struct Redirection {
    /// Interrupt vector.
    pub vector: u8,
    /// Delivery mode, as in an MSI's data.
    #[bits(3)]
    pub delivery_mode: u8,
    /// Destination is logical.
    pub logical: bool,
    /// Read-only: the interrupt is on its way. Always clear here.
    pub delivery_status: bool,
    /// Input is active low.
    pub active_low: bool,
    /// Read-only: a level-triggered interrupt was accepted and not yet ended.
    pub remote_irr: bool,
    /// Level-triggered.
    pub level: bool,
    /// Nothing is delivered.
    pub masked: bool,
    #[bits(31)]
    __: u64,
    /// Destination APIC in the upper half. In the remappable format (VT-d rev 4.1, 5.1.5.1) bit 0 is
    /// set, and the rest is bits 14:0 of the interrupt's index.
    pub destination: u16,
}

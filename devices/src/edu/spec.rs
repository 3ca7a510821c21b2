//! Registers of QEMU's educational PCI device (QEMU, docs/specs/edu.rst), as data. Offsets are in
//! BAR 0.

#![forbid(unsafe_code)]

/// PCI vendor ID.
pub const VENDOR_ID: u16 = 0x1234;
/// PCI device ID.
pub const DEVICE_ID: u16 = 0x11e8;
/// PCI revision ID.
pub const REVISION_ID: u8 = 0x10;
/// Size of BAR 0 in bytes.
pub const BAR_LEN: u64 = 1 << 20;

/// Below this offset loads and stores have four bytes, from it on four or eight.
pub const WIDE_FROM: u64 = 0x80;

/// Identification (read-only).
pub const IDENTIFICATION: u64 = 0x00;
/// Its value: version 1.0 and "edu".
pub const IDENTIFICATION_VALUE: u32 = 0x0100_00ed;
/// Liveness check: reads as the inversion of what was written.
pub const LIVENESS: u64 = 0x04;
/// Factorial: takes a number, and holds its factorial modulo 2^32 when [`status::COMPUTING`] is clear.
pub const FACTORIAL: u64 = 0x08;
/// Status.
pub const STATUS: u64 = 0x20;
/// Interrupt status (read-only).
pub const INTERRUPT_STATUS: u64 = 0x24;
/// Interrupt raise (write-only): sets bits of the interrupt status and interrupts.
pub const INTERRUPT_RAISE: u64 = 0x60;
/// Interrupt acknowledge (write-only): clears bits of the interrupt status.
pub const INTERRUPT_ACKNOWLEDGE: u64 = 0x64;
/// DMA source address.
pub const DMA_SOURCE: u64 = 0x80;
/// DMA destination address.
pub const DMA_DESTINATION: u64 = 0x88;
/// DMA transfer count in bytes.
pub const DMA_COUNT: u64 = 0x90;
/// DMA command.
pub const DMA_COMMAND: u64 = 0x98;

/// Bits of [`STATUS`].
pub mod status {
    /// A factorial is being computed (read-only).
    pub const COMPUTING: u32 = 0x01;
    /// Raise [`interrupt::FACTORIAL`](super::interrupt::FACTORIAL) when it is there.
    pub const INTERRUPT: u32 = 0x80;
}

/// Bits of the interrupt status that the device itself sets.
pub mod interrupt {
    /// A factorial was computed.
    pub const FACTORIAL: u32 = 0x001;
    /// A DMA is over.
    pub const DMA: u32 = 0x100;
}

/// Bits of [`DMA_COMMAND`].
pub mod command {
    /// Start; set until the transfer is over.
    pub const RUN: u64 = 0x1;
    /// From the device's buffer to RAM; else from RAM to the buffer.
    pub const TO_RAM: u64 = 0x2;
    /// Raise [`interrupt::DMA`](super::interrupt::DMA) when it is over.
    pub const INTERRUPT: u64 = 0x4;
}

/// Address of the DMA buffer, as source or destination of a transfer. Loads and stores do not reach
/// it.
pub const BUFFER: u64 = 0x40000;
/// Length of the DMA buffer in bytes.
pub const BUFFER_LEN: usize = 4096;

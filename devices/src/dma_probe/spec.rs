//! Registers of the DMA probe, as data; Ringside's own. Offsets are in BAR 0.

#![forbid(unsafe_code)]

/// PCI vendor ID, of no vendor.
pub const VENDOR_ID: u16 = 0x1234;
/// PCI device ID: "DP".
pub const DEVICE_ID: u16 = 0x4450;
/// Size of BAR 0 in bytes.
pub const BAR_LEN: u64 = 0x1000;

/// Identification (read-only, four bytes).
pub const IDENTIFICATION: u64 = 0x00;
/// Its value: "DMAP" in memory order.
pub const IDENTIFICATION_VALUE: u32 = u32::from_le_bytes(*b"DMAP");
/// First address of the access.
pub const ADDRESS: u64 = 0x08;
/// Length of a read or write in bytes, 1 to [`MAX_LENGTH`].
pub const LENGTH: u64 = 0x10;
/// What is written, again and again, lowest byte first; after a read, the first eight bytes read.
pub const DATA: u64 = 0x18;
/// Command (write-only, four bytes): one of [`command`].
pub const COMMAND: u64 = 0x20;
/// Status (read-only, four bytes): one of [`status`].
pub const STATUS: u64 = 0x24;
/// Fault reason that the IOMMU gave (read-only, four bytes), with [`status::BLOCKED`]; else 0.
pub const REASON: u64 = 0x28;
/// Bytes read or written before the end or the first refused page (read-only).
pub const DONE: u64 = 0x30;

/// Longest read or write in bytes.
pub const MAX_LENGTH: u64 = 1 << 20;
/// The access is cut at multiples of this, so that [`DONE`] tells how far it came.
pub const PAGE: u64 = 4096;

/// Values of [`COMMAND`].
pub mod command {
    /// Reads memory.
    pub const READ: u32 = 1;
    /// Writes memory.
    pub const WRITE: u32 = 2;
    /// Writes the low four bytes of the data to the address, a multiple of 4: from 0xfee00000 to
    /// 0xfeefffff that is an interrupt request.
    pub const SIGNAL: u32 = 3;
}

/// Values of [`STATUS`].
pub mod status {
    /// Nothing done since the reset.
    pub const IDLE: u32 = 0;
    /// Under way.
    pub const BUSY: u32 = 1;
    /// All of it happened.
    pub const OK: u32 = 2;
    /// Bus Master Enable is clear.
    pub const BUS_MASTER_OFF: u32 = 3;
    /// Nothing answers at an address.
    pub const NO_MEMORY: u32 = 4;
    /// The IOMMU blocked it.
    pub const BLOCKED: u32 = 5;
    /// No such command, or a length or alignment that it does not take.
    pub const BAD_COMMAND: u32 = 6;
}

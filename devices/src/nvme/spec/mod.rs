//! What NVM Express Base Specification, revision 1.4 says, as data: registers (this file),
//! commands and status ([`command`]), data structures returned by Identify and Get Log Page
//! ([`data`]).
#![forbid(unsafe_code)]

pub mod command;
pub mod data;

use bitfield_struct::bitfield;

/// Controller register offsets in BAR 0 (section 3.1, figure 68).
pub mod reg {
    /// Controller Capabilities, 64 bits.
    pub const CAP: u64 = 0x00;
    /// Version.
    pub const VS: u64 = 0x08;
    /// Interrupt Mask Set.
    pub const INTMS: u64 = 0x0c;
    /// Interrupt Mask Clear.
    pub const INTMC: u64 = 0x10;
    /// Controller Configuration.
    pub const CC: u64 = 0x14;
    /// Controller Status.
    pub const CSTS: u64 = 0x1c;
    /// NVM Subsystem Reset.
    pub const NSSR: u64 = 0x20;
    /// Admin Queue Attributes.
    pub const AQA: u64 = 0x24;
    /// Admin Submission Queue Base Address, 64 bits.
    pub const ASQ: u64 = 0x28;
    /// Admin Completion Queue Base Address, 64 bits.
    pub const ACQ: u64 = 0x30;
    /// First doorbell: Submission Queue 0 Tail. With CAP.DSTRD = 0, queue y's tail doorbell is at
    /// `DOORBELLS + 8 * y` and its head doorbell 4 bytes on (sections 3.1.24 and 3.1.25).
    pub const DOORBELLS: u64 = 0x1000;
}

/// Value of the VS register for revision 1.4.0 (section 3.1.2).
pub const VERSION_1_4: u32 = 0x0001_0400;

/// Bytes in a submission queue entry: CC.IOSQES = 6 (section 4.2).
pub const SQE_BYTES: u64 = 64;
/// log2 of [`SQE_BYTES`].
pub const SQE_SHIFT: u8 = 6;
/// Bytes in a completion queue entry: CC.IOCQES = 4 (section 4.6).
pub const CQE_BYTES: u64 = 16;
/// log2 of [`CQE_BYTES`].
pub const CQE_SHIFT: u8 = 4;

/// Largest admin queue: AQA holds a 0's based 12-bit size (section 3.1.9).
pub const ADMIN_QUEUE_ENTRIES: u32 = 4096;

/// The namespace id that stands for all namespaces (section 6.1.2).
pub const NSID_BROADCAST: u32 = 0xffff_ffff;

/// Controller Capabilities (section 3.1.1, figure 69).
#[bitfield(u64)]
pub struct Cap {
    /// Maximum Queue Entries Supported, 0's based.
    pub mqes: u16,
    /// Contiguous Queues Required.
    pub cqr: bool,
    /// Arbitration Mechanism Supported beside round robin.
    #[bits(2)]
    pub ams: u8,
    #[bits(5)]
    __: u8,
    /// Timeout for CSTS.RDY changes, in 500 ms.
    pub to: u8,
    /// Doorbell Stride: 2 ^ (2 + DSTRD) bytes.
    #[bits(4)]
    pub dstrd: u8,
    /// NVM Subsystem Reset Supported.
    pub nssrs: bool,
    /// Command Sets Supported: bit 0 is the NVM command set.
    pub css: u8,
    /// Boot Partition Support.
    pub bps: bool,
    #[bits(2)]
    __: u8,
    /// Memory Page Size Minimum: 2 ^ (12 + MPSMIN).
    #[bits(4)]
    pub mpsmin: u8,
    /// Memory Page Size Maximum.
    #[bits(4)]
    pub mpsmax: u8,
    /// Persistent Memory Region Supported.
    pub pmrs: bool,
    /// Controller Memory Buffer Supported.
    pub cmbs: bool,
    #[bits(6)]
    __: u8,
}

/// Controller Configuration (section 3.1.5, figure 73).
#[bitfield(u32)]
#[derive(PartialEq, Eq)]
pub struct Cc {
    /// Enable.
    pub en: bool,
    #[bits(3)]
    __: u8,
    /// I/O Command Set Selected.
    #[bits(3)]
    pub css: u8,
    /// Memory Page Size: 2 ^ (12 + MPS).
    #[bits(4)]
    pub mps: u8,
    /// Arbitration Mechanism Selected.
    #[bits(3)]
    pub ams: u8,
    /// Shutdown Notification: 1 normal, 2 abrupt.
    #[bits(2)]
    pub shn: u8,
    /// I/O Submission Queue Entry Size, log2.
    #[bits(4)]
    pub iosqes: u8,
    /// I/O Completion Queue Entry Size, log2.
    #[bits(4)]
    pub iocqes: u8,
    __: u8,
}

/// Controller Status (section 3.1.6, figure 74).
#[bitfield(u32)]
#[derive(PartialEq, Eq)]
pub struct Csts {
    /// Ready.
    pub rdy: bool,
    /// Controller Fatal Status.
    pub cfs: bool,
    /// Shutdown Status: see [`shst`].
    #[bits(2)]
    pub shst: u8,
    /// NVM Subsystem Reset Occurred.
    pub nssro: bool,
    /// Processing Paused.
    pub pp: bool,
    #[bits(26)]
    __: u32,
}

/// Values of CSTS.SHST.
pub mod shst {
    /// No shutdown requested.
    pub const NORMAL: u8 = 0;
    /// Shutdown processing occurring.
    pub const OCCURRING: u8 = 1;
    /// Shutdown processing complete.
    pub const COMPLETE: u8 = 2;
}

/// Admin Queue Attributes (section 3.1.8, figure 76).
#[bitfield(u32)]
pub struct Aqa {
    /// Admin Submission Queue Size, 0's based.
    #[bits(12)]
    pub asqs: u16,
    #[bits(4)]
    __: u8,
    /// Admin Completion Queue Size, 0's based.
    #[bits(12)]
    pub acqs: u16,
    #[bits(4)]
    __: u8,
}

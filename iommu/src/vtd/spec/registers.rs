//! Registers of a remapping unit (section 11.4), as data. Offsets are in bytes.
#![forbid(unsafe_code)]

/// Length of the register set (11.4: one page, the fault and IOTLB registers are within it).
pub const LEN: u64 = 0x1000;

/// Version (11.4.1).
pub const VER: u64 = 0x00;
/// Capabilities, 64 bits (11.4.2).
pub const CAP: u64 = 0x08;
/// Extended capabilities, 64 bits (11.4.3).
pub const ECAP: u64 = 0x10;
/// Global Command (11.4.4.1).
pub const GCMD: u64 = 0x18;
/// Global Status (11.4.4.2).
pub const GSTS: u64 = 0x1c;
/// Root Table Address, 64 bits (11.4.5).
pub const RTADDR: u64 = 0x20;
/// Context Command, 64 bits (11.4.6.1).
pub const CCMD: u64 = 0x28;
/// Fault Status (11.4.7.1).
pub const FSTS: u64 = 0x34;
/// Fault Event Control (11.4.7.2).
pub const FECTL: u64 = 0x38;
/// Fault Event Data (11.4.7.3).
pub const FEDATA: u64 = 0x3c;
/// Fault Event Address (11.4.7.4).
pub const FEADDR: u64 = 0x40;
/// Fault Event Upper Address (11.4.7.5).
pub const FEUADDR: u64 = 0x44;
/// Invalidation Queue Head, 64 bits (11.4.9.1).
pub const IQH: u64 = 0x80;
/// Invalidation Queue Tail, 64 bits (11.4.9.2).
pub const IQT: u64 = 0x88;
/// Invalidation Queue Address, 64 bits (11.4.9.3).
pub const IQA: u64 = 0x90;
/// Invalidation Completion Status (11.4.9.4).
pub const ICS: u64 = 0x9c;
/// Invalidation Event Control (11.4.9.5).
pub const IECTL: u64 = 0xa0;
/// Invalidation Event Data (11.4.9.6).
pub const IEDATA: u64 = 0xa4;
/// Invalidation Event Address (11.4.9.7).
pub const IEADDR: u64 = 0xa8;
/// Invalidation Event Upper Address (11.4.9.8).
pub const IEUADDR: u64 = 0xac;
/// Invalidation Queue Error Record, 64 bits (11.4.9.9).
pub const IQERCD: u64 = 0xb0;
/// Interrupt Remapping Table Address, 64 bits (11.4.10.1).
pub const IRTA: u64 = 0xb8;

/// Invalidate Address, 64 bits, from the place that ECAP.IRO names (11.4.8.1.2).
pub const IVA: u64 = 0x0;
/// IOTLB Invalidate, 64 bits, from the same place (11.4.8.1.1).
pub const IOTLB: u64 = 0x8;
/// Length of the two.
pub const IOTLB_LEN: u64 = 0x10;
/// Length of a Fault Recording register; the first is at the place that CAP.FRO names (11.4.7.6).
pub const FRCD_LEN: u64 = 0x10;

/// Bits of Global Command and Global Status (11.4.4). Each status bit has its command's place.
pub mod global {
    /// Translation Enable.
    pub const TE: u32 = 1 << 31;
    /// Set Root Table Pointer.
    pub const SRTP: u32 = 1 << 30;
    /// Write Buffer Flush.
    pub const WBF: u32 = 1 << 27;
    /// Queued Invalidation Enable.
    pub const QIE: u32 = 1 << 26;
    /// Interrupt Remapping Enable.
    pub const IRE: u32 = 1 << 25;
    /// Set Interrupt Remap Table Pointer.
    pub const SIRTP: u32 = 1 << 24;
    /// Compatibility Format Interrupt.
    pub const CFI: u32 = 1 << 23;
    /// The commands that stay as they were last written; the others do something once.
    pub const LASTING: u32 = TE | QIE | IRE | CFI;
}

/// Fields of the Context Command register (11.4.6.1).
pub mod ccmd {
    /// Invalidate Context Cache.
    pub const ICC: u64 = 1 << 63;
    /// Lowest bit of the requested granularity, see [`super::granularity`].
    pub const CIRG_SHIFT: u32 = 61;
    /// Lowest bit of the actual granularity.
    pub const CAIG_SHIFT: u32 = 59;
    /// The actual granularity.
    pub const CAIG: u64 = 0b11 << CAIG_SHIFT;
    /// Lowest bit of the function mask.
    pub const FM_SHIFT: u32 = 32;
    /// Lowest bit of the source id; the domain id is below it.
    pub const SID_SHIFT: u32 = 16;
    /// What software can write.
    pub const WRITABLE: u64 = 0xe000_0003_ffff_ffff;
}

/// Fields of the IOTLB Invalidate register (11.4.8.1.1).
pub mod iotlb {
    /// Invalidate IOTLB.
    pub const IVT: u64 = 1 << 63;
    /// Lowest bit of the requested granularity, see [`super::granularity`].
    pub const IIRG_SHIFT: u32 = 60;
    /// Lowest bit of the actual granularity.
    pub const IAIG_SHIFT: u32 = 57;
    /// The actual granularity.
    pub const IAIG: u64 = 0b11 << IAIG_SHIFT;
    /// Lowest bit of the domain id.
    pub const DID_SHIFT: u32 = 32;
    /// What software can write: IVT, IIRG, drain reads and writes, domain id.
    pub const WRITABLE: u64 = 0xb003_ffff_0000_0000;
}

/// Granularities of CCMD, the IOTLB register and the context-cache and IOTLB descriptors (11.4.6.1,
/// 11.4.8.1.1, 6.5.2.1, 6.5.2.3).
pub mod granularity {
    /// Reserved; as actual granularity: the request was wrong and ignored.
    pub const RESERVED: u64 = 0b00;
    /// Everything.
    pub const GLOBAL: u64 = 0b01;
    /// One domain.
    pub const DOMAIN: u64 = 0b10;
    /// One function (context cache) or some pages of a domain (IOTLB).
    pub const SELECTIVE: u64 = 0b11;
}

/// Fields of the Invalidate Address register and of the second word of IOTLB descriptors (11.4.8.1.2,
/// 6.5.2.3).
pub mod iva {
    /// Address Mask: log2 of the number of 4 KiB pages.
    pub const AM: u64 = 0x3f;
    /// Invalidation Hint: only leaf entries have changed.
    pub const IH: u64 = 1 << 6;
    /// Address.
    pub const ADDR: u64 = !0xfff;
}

/// Bits of the Fault Status register (11.4.7.1).
pub mod fsts {
    /// Primary Fault Overflow.
    pub const PFO: u32 = 1 << 0;
    /// Primary Pending Fault: some F bit is set.
    pub const PPF: u32 = 1 << 1;
    /// Invalidation Queue Error.
    pub const IQE: u32 = 1 << 4;
    /// Lowest bit of the index of the first pending fault.
    pub const FRI_SHIFT: u32 = 8;
    /// What is cleared by writing 1. ICE and ITE are RsvdZ: no device below this unit has a device-TLB
    /// whose answers could fail.
    pub const RW1C: u32 = PFO | IQE;
}

/// Bits of the two event control registers (11.4.7.2, 11.4.9.5).
pub mod event {
    /// Interrupt Mask.
    pub const IM: u32 = 1 << 31;
    /// Interrupt Pending.
    pub const IP: u32 = 1 << 30;
    /// Message data that exists.
    pub const DATA: u32 = 0xffff;
    /// Message address bits that exist.
    pub const ADDR: u32 = !0x3;
}

/// Fields of a Fault Recording register's upper half (11.4.7.6). The lower one is the fault info.
pub mod frcd {
    /// Fault.
    pub const F: u64 = 1 << 63;
    /// Type bit 1: a read (or an atomic operation).
    pub const T1: u64 = 1 << 62;
    /// Lowest bit of the fault reason.
    pub const FR_SHIFT: u32 = 32;
    /// Fault info: page address, or from bit 48 on the interrupt index.
    pub const FI: u64 = !0xfff;
    /// Lowest bit of the interrupt index in the fault info.
    pub const FI_INDEX_SHIFT: u32 = 48;
}

/// Fields of the queue's registers (11.4.9).
pub mod queue {
    /// Offsets in IQH and IQT.
    pub const OFFSET: u64 = 0x7_fff0;
    /// Queue size in IQA: log2 of the number of 4 KiB pages.
    pub const QS: u64 = 0x7;
    /// Descriptor Width in IQA: 256 bits.
    pub const DW: u64 = 1 << 11;
    /// Base address in IQA.
    pub const BASE: u64 = !0xfff;
    /// Invalidation Wait Complete, in ICS.
    pub const IWC: u32 = 1 << 0;
}

/// Invalidation Queue Error Info, in IQERCD (11.4.9.9).
pub mod iqei {
    /// The tail points outside the queue.
    pub const TAIL: u8 = 1;
    /// A descriptor could not be read.
    pub const FETCH: u8 = 2;
    /// Unknown descriptor type.
    pub const TYPE: u8 = 3;
    /// A reserved field is not zero, or a field's value is not allowed.
    pub const RESERVED: u8 = 4;
    /// The descriptor width does not fit the translation table mode.
    pub const WIDTH: u8 = 5;
    /// The tail is not aligned to the descriptor width.
    pub const TAIL_ALIGNMENT: u8 = 6;
}

/// Fields of the Interrupt Remapping Table Address register (11.4.10.1).
pub mod irta {
    /// Table address.
    pub const TABLE: u64 = !0xfff;
    /// Extended Interrupt Mode Enable: 32-bit destinations.
    pub const EIME: u64 = 1 << 11;
    /// Size: log2 of the number of entries, less one.
    pub const SIZE: u64 = 0xf;
}

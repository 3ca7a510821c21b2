//! Bits of the capability registers (sections 11.4.2 and 11.4.3), and where this unit has the
//! registers whose place they tell.
#![forbid(unsafe_code)]

/// Offset of the Invalidate Address Register; the IOTLB Invalidate Register follows it (11.4.6). It
/// lies above all registers with a fixed place that rev 4.1 defines below 0x500.
pub const IOTLB_REGISTERS: u64 = 0x500;
/// Offset of the first Fault Recording Register (11.4.7.6); each has [`FAULT_RECORD_BYTES`].
pub const FAULT_RECORDING_REGISTERS: u64 = 0x600;
/// Bytes in one Fault Recording Register.
pub const FAULT_RECORD_BYTES: u64 = 16;
/// The most Fault Recording Registers that fit between [`FAULT_RECORDING_REGISTERS`] and the virtual
/// command registers at 0xe00, so that the register set is one page.
pub const MAX_FAULT_RECORDS: u16 = 128;

/// Capability Register, CAP_REG (11.4.2).
pub mod cap {
    /// ND: 16-bit domain ids.
    pub const ND_64K: u64 = 6;
    /// CM: caching mode, not-present and faulting entries may be cached.
    pub const CM: u64 = 1 << 7;
    /// SAGAW: bit of the 39-bit width (3-level tables).
    pub const SAGAW_39: u64 = 1 << 9;
    /// SAGAW: bit of the 48-bit width (4-level tables).
    pub const SAGAW_48: u64 = 1 << 10;
    /// SAGAW: bit of the 57-bit width (5-level tables).
    pub const SAGAW_57: u64 = 1 << 11;
    /// MGAW: shift of the maximum guest address width, less one.
    pub const MGAW_SHIFT: u32 = 16;
    /// FRO: shift of the offset of the Fault Recording Registers, in 16-byte units.
    pub const FRO_SHIFT: u32 = 24;
    /// SSLPS: second-stage pages of 2 MiB.
    pub const SSLPS_2M: u64 = 1 << 34;
    /// SSLPS: second-stage pages of 1 GiB.
    pub const SSLPS_1G: u64 = 1 << 35;
    /// PSI: page-selective invalidation.
    pub const PSI: u64 = 1 << 39;
    /// NFR: shift of the number of Fault Recording Registers, less one.
    pub const NFR_SHIFT: u32 = 40;
    /// MAMV: shift of the maximum address mask value of a page-selective invalidation.
    pub const MAMV_SHIFT: u32 = 48;
    /// DWD: invalidations drain writes.
    pub const DWD: u64 = 1 << 54;
    /// DRD: invalidations drain reads.
    pub const DRD: u64 = 1 << 55;
    /// FS1GP: first-stage pages of 1 GiB.
    pub const FS1GP: u64 = 1 << 56;
    /// FS5LP: 5-level first-stage tables.
    pub const FS5LP: u64 = 1 << 60;
}

/// Extended Capability Register, ECAP_REG (11.4.3).
pub mod ecap {
    /// C: walks snoop the processor caches (root, context, legacy second-stage and interrupt tables).
    pub const C: u64 = 1 << 0;
    /// QI: queued invalidation.
    pub const QI: u64 = 1 << 1;
    /// DT: device-TLBs.
    pub const DT: u64 = 1 << 2;
    /// IR: interrupt remapping.
    pub const IR: u64 = 1 << 3;
    /// EIM: extended interrupt mode (x2APIC).
    pub const EIM: u64 = 1 << 4;
    /// PT: pass-through.
    pub const PT: u64 = 1 << 6;
    /// SC: snoop control, the SNP bit of second-stage entries.
    pub const SC: u64 = 1 << 7;
    /// IRO: shift of the offset of the IOTLB registers, in 16-byte units.
    pub const IRO_SHIFT: u32 = 8;
    /// MHMV: shift of the maximum handle mask value of an interrupt-entry-cache invalidation.
    pub const MHMV_SHIFT: u32 = 20;
    /// SRS: supervisor requests.
    pub const SRS: u64 = 1 << 31;
    /// SMTS: scalable mode.
    pub const SMTS: u64 = 1 << 43;
    /// SSADS: accessed and dirty bits in second-stage tables.
    pub const SSADS: u64 = 1 << 45;
    /// SSTS: second-stage translation in scalable mode.
    pub const SSTS: u64 = 1 << 46;
    /// FSTS: first-stage translation.
    pub const FSTS: u64 = 1 << 47;
    /// SMPWCS: walks of PASID tables and page tables snoop the processor caches in scalable mode.
    pub const SMPWCS: u64 = 1 << 48;
    /// RPS: the RID_PASID field of scalable context entries.
    pub const RPS: u64 = 1 << 49;
    /// ADMS: abort-DMA mode.
    pub const ADMS: u64 = 1 << 52;
    /// RPRIVS: the RID_PRIV field of scalable context entries.
    pub const RPRIVS: u64 = 1 << 53;
}

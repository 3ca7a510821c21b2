//! Entries of the remapping tables (chapter 9): bits, field masks and reserved bits.
//!
//! An entry that is longer than 64 bits is a sequence of qwords. Reserved masks cover what is reserved
//! always; a pointer is also reserved at and above the host address width ([`beyond`]), and some bits
//! are reserved unless a capability is reported: the walks check those.
#![forbid(unsafe_code)]

/// Bytes in a table, log2: each root, context, PASID or page table is one 4 KiB page.
pub const PAGE_SHIFT: u8 = 12;
/// Bits of an address that one level of page tables translates.
pub const LEVEL_BITS: u8 = 9;
/// The pointer in an entry: bits 63:12.
pub const POINTER: u64 = !0xfff;

/// The bits of a pointer that lie at or above a host address width of `width` bits (12 to 63).
pub const fn beyond(width: u8) -> u64 {
    !((1 << width) - 1)
}

/// Root Table Address Register, RTADDR_REG (11.4.5).
pub mod rtaddr {
    /// TTM: shift of the translation table mode.
    pub const TTM_SHIFT: u32 = 10;
    /// TTM: mask after the shift.
    pub const TTM_MASK: u64 = 3;
    /// TTM: legacy mode.
    pub const TTM_LEGACY: u64 = 0;
    /// TTM: scalable mode.
    pub const TTM_SCALABLE: u64 = 1;
    /// TTM: abort-DMA mode.
    pub const TTM_ABORT_DMA: u64 = 3;
}

/// Root entry, two qwords, one entry for each bus (9.1 and 9.2).
///
/// Legacy mode uses the first qword and reserves the second. In scalable mode the first ("lower")
/// points to the context table of devices 0 to 15, the second ("upper") to that of devices 16 to 31.
pub mod root {
    /// Bytes in an entry.
    pub const BYTES: u64 = 16;
    /// P (LP, UP): present.
    pub const PRESENT: u64 = 1 << 0;
    /// Bits that are always reserved.
    pub const RESERVED: u64 = 0xffe;
}

/// Legacy-mode context entry, two qwords, one entry for each device and function (9.3).
pub mod context {
    /// Bytes in an entry.
    pub const BYTES: u64 = 16;
    /// P: present. Qword 0.
    pub const PRESENT: u64 = 1 << 0;
    /// FPD: fault processing disable; valid in an entry that is not present too. Qword 0.
    pub const FPD: u64 = 1 << 1;
    /// TT: shift of the translation type. Qword 0.
    pub const TT_SHIFT: u32 = 2;
    /// TT: mask after the shift.
    pub const TT_MASK: u64 = 3;
    /// TT: untranslated requests go through the second stage, others are blocked.
    pub const TT_SECOND_STAGE: u64 = 0;
    /// TT: as 0, and device-TLB requests are served; needs ECAP.DT.
    pub const TT_DEVICE_TLB: u64 = 1;
    /// TT: pass-through; needs ECAP.PT. The page-table pointer is ignored.
    pub const TT_PASS_THROUGH: u64 = 2;
    /// Reserved bits of qword 0.
    pub const RESERVED_0: u64 = 0xff0;
    /// AW: mask of the address width, in qword 1: `30 + 9 * AW` bits, `2 + AW` levels.
    pub const AW_MASK: u64 = 7;
    /// DID: shift of the domain id. Qword 1.
    pub const DID_SHIFT: u32 = 8;
    /// Reserved bits of qword 1; bits 6:3 are ignored.
    pub const RESERVED_1: u64 = 0xffff_ffff_ff00_0080;
}

/// Scalable-mode context entry, four qwords (9.4).
pub mod scalable_context {
    /// Bytes in an entry.
    pub const BYTES: u64 = 32;
    /// Qwords in an entry.
    pub const QWORDS: usize = 4;
    /// P: present. Qword 0.
    pub const PRESENT: u64 = 1 << 0;
    /// FPD: fault processing disable; valid in an entry that is not present too. Qword 0.
    pub const FPD: u64 = 1 << 1;
    /// DTE: device-TLB enable, reserved unless ECAP.DT. Qword 0.
    pub const DTE: u64 = 1 << 2;
    /// PASIDE: requests with PASID are served, reserved unless ECAP.PASID. Qword 0.
    pub const PASIDE: u64 = 1 << 3;
    /// PRE: page requests are served, reserved unless ECAP.PRS. Qword 0.
    pub const PRE: u64 = 1 << 4;
    /// Reserved bits of qword 0.
    pub const RESERVED_0: u64 = 0x1e0;
    /// PDTS: shift of the size of the PASID directory, `1 << (PDTS + 7)` entries. Qword 0.
    pub const PDTS_SHIFT: u32 = 9;
    /// PDTS: mask after the shift.
    pub const PDTS_MASK: u64 = 7;
    /// RID_PASID: the PASID of requests without PASID; needs ECAP.RPS. Qword 1.
    pub const RID_PASID_MASK: u64 = 0xf_ffff;
    /// RID_PRIV: requests without PASID have supervisor privilege, reserved unless ECAP.RPRIVS.
    /// Qword 1.
    pub const RID_PRIV: u64 = 1 << 20;
    /// Reserved bits of qword 1; qwords 2 and 3 are reserved as a whole.
    pub const RESERVED_1: u64 = !0x1f_ffff;
}

/// PASID directory entry, one qword (9.5).
pub mod pasid_directory {
    /// Bytes in an entry.
    pub const BYTES: u64 = 8;
    /// P: present.
    pub const PRESENT: u64 = 1 << 0;
    /// FPD: fault processing disable; valid in an entry that is not present too.
    pub const FPD: u64 = 1 << 1;
    /// Reserved bits.
    pub const RESERVED: u64 = 0xffc;
    /// Bits of a PASID below its directory index: entries in one PASID table, log2.
    pub const INDEX_SHIFT: u32 = 6;
}

/// PASID table entry, eight qwords (9.6).
pub mod pasid {
    /// Bytes in an entry.
    pub const BYTES: u64 = 64;
    /// Qwords in an entry.
    pub const QWORDS: usize = 8;
    /// Mask of a PASID's index in its PASID table.
    pub const INDEX_MASK: u64 = 0x3f;
    /// P: present. Qword 0.
    pub const PRESENT: u64 = 1 << 0;
    /// FPD: fault processing disable; valid in an entry that is not present too. Qword 0.
    pub const FPD: u64 = 1 << 1;
    /// AW: shift of the second stage's address width. Qword 0.
    pub const AW_SHIFT: u32 = 2;
    /// AW: mask after the shift.
    pub const AW_MASK: u64 = 7;
    /// SSEE: execute permission in the second stage, reserved unless ECAP.ERS. Qword 0.
    pub const SSEE: u64 = 1 << 5;
    /// PGTT: shift of the translation type. Qword 0.
    pub const PGTT_SHIFT: u32 = 6;
    /// PGTT: mask after the shift.
    pub const PGTT_MASK: u64 = 7;
    /// PGTT: first stage only; needs ECAP.FSTS.
    pub const PGTT_FIRST: u64 = 1;
    /// PGTT: second stage only; needs ECAP.SSTS.
    pub const PGTT_SECOND: u64 = 2;
    /// PGTT: nested; needs ECAP.NEST.
    pub const PGTT_NESTED: u64 = 3;
    /// PGTT: pass-through; needs ECAP.PT.
    pub const PGTT_PASS_THROUGH: u64 = 4;
    /// SSADE: accessed and dirty bits in the second stage, reserved unless ECAP.SSADS. Qword 0.
    pub const SSADE: u64 = 1 << 9;
    /// Reserved bits of qword 0.
    pub const RESERVED_0: u64 = 0xc00;
    /// DID: mask of the domain id, in qword 1.
    pub const DID_MASK: u64 = 0xffff;
    /// PWSNP: walks snoop the processor caches, reserved unless ECAP.SMPWCS. Qword 1.
    pub const PWSNP: u64 = 1 << 23;
    /// PGSNP: accesses snoop the processor caches, reserved unless ECAP.SC. Qword 1.
    pub const PGSNP: u64 = 1 << 24;
    /// CD: cache disable, reserved unless ECAP.MTS. Qword 1.
    pub const CD: u64 = 1 << 25;
    /// EMTE: extended memory type enable, reserved unless ECAP.MTS. Qword 1.
    pub const EMTE: u64 = 1 << 26;
    /// Reserved bits of qword 1; EMT, PWT, PCD and PAT are ignored without ECAP.MTS.
    pub const RESERVED_1: u64 = 0x7f_0000;
    /// SRE: requests with supervisor privilege are served, reserved unless ECAP.SRS. Qword 2.
    pub const SRE: u64 = 1 << 0;
    /// ERE: execute requests are served, reserved unless ECAP.ERS. Qword 2.
    pub const ERE: u64 = 1 << 1;
    /// FSPM: shift of the first-stage paging mode. Qword 2.
    pub const FSPM_SHIFT: u32 = 2;
    /// FSPM: mask after the shift.
    pub const FSPM_MASK: u64 = 3;
    /// FSPM: 4-level tables.
    pub const FSPM_4_LEVEL: u64 = 0;
    /// FSPM: 5-level tables; needs CAP.FS5LP.
    pub const FSPM_5_LEVEL: u64 = 1;
    /// WPE: write protect enable, reserved unless ECAP.SRS. Qword 2.
    pub const WPE: u64 = 1 << 4;
    /// EAFE: extended accessed flag enable, reserved unless ECAP.EAFS. Qword 2.
    pub const EAFE: u64 = 1 << 7;
    /// Reserved bits of qword 2; NXE and SMEP are ignored without ECAP.ERS. Qwords 3 to 7 are reserved
    /// as a whole.
    pub const RESERVED_2: u64 = 0xf00;
}

/// Second-stage paging entries, one qword (9.8).
pub mod second_stage {
    /// R: read.
    pub const READ: u64 = 1 << 0;
    /// W: write.
    pub const WRITE: u64 = 1 << 1;
    /// PS: this entry maps a page of 2 MiB (level 2) or 1 GiB (level 3).
    pub const PAGE_SIZE: u64 = 1 << 7;
    /// A: accessed, with SSADE.
    pub const ACCESSED: u64 = 1 << 8;
    /// D: dirty, in entries that map a page, with SSADE.
    pub const DIRTY: u64 = 1 << 9;
    /// SNP: snoop, in entries that map a page; reserved in others, and in legacy mode unless ECAP.SC.
    pub const SNOOP: u64 = 1 << 11;
    /// The address, before the host address width is applied.
    pub const ADDRESS: u64 = 0x000f_ffff_ffff_f000;
    /// Bits that are reserved in every entry.
    pub const RESERVED: u64 = 1 << 62;
}

/// First-stage paging entries, one qword (9.7): those of the processor.
pub mod first_stage {
    /// P: present.
    pub const PRESENT: u64 = 1 << 0;
    /// R/W: writes are allowed.
    pub const WRITE: u64 = 1 << 1;
    /// U/S: user-privilege requests are allowed.
    pub const USER: u64 = 1 << 2;
    /// A: accessed.
    pub const ACCESSED: u64 = 1 << 5;
    /// D: dirty, in entries that map a page.
    pub const DIRTY: u64 = 1 << 6;
    /// PS: this entry maps a page of 2 MiB (level 2) or 1 GiB (level 3). In a 4 KiB entry this is PAT.
    pub const PAGE_SIZE: u64 = 1 << 7;
    /// PAT of a large page, ignored.
    pub const LARGE_PAT: u64 = 1 << 12;
    /// The address, before the host address width is applied.
    pub const ADDRESS: u64 = 0x000f_ffff_ffff_f000;
}

//! Invalidation descriptors (section 6.5.2), as data. Word 0 is the first eight bytes; the upper two
//! words of 256-bit descriptors are reserved in all types.
#![forbid(unsafe_code)]

/// Type bits 3:0.
pub const TYPE_LOW: u64 = 0xf;
/// Type bits 6:4 are here.
pub const TYPE_HIGH: u64 = 0x7 << 9;
/// How far right the upper type bits go.
pub const TYPE_HIGH_SHIFT: u32 = 5;
/// Lowest bit of the granularity.
pub const G_SHIFT: u32 = 4;
/// Granularity.
pub const G: u64 = 0b11 << G_SHIFT;
/// Lowest bit of the domain id.
pub const DID_SHIFT: u32 = 16;

/// Descriptor types.
pub mod kind {
    /// Context-cache invalidate (6.5.2.1).
    pub const CONTEXT: u64 = 1;
    /// IOTLB invalidate (6.5.2.3).
    pub const IOTLB: u64 = 2;
    /// Device-TLB invalidate (6.5.2.5).
    pub const DEVICE_TLB: u64 = 3;
    /// Interrupt entry cache invalidate (6.5.2.7).
    pub const INTERRUPT: u64 = 4;
    /// Invalidation wait (6.5.2.8).
    pub const WAIT: u64 = 5;
    /// PASID-based IOTLB invalidate (6.5.2.4).
    pub const PASID_IOTLB: u64 = 6;
    /// PASID-cache invalidate (6.5.2.2).
    pub const PASID_CACHE: u64 = 7;
    /// PASID-based device-TLB invalidate (6.5.2.6).
    pub const PASID_DEVICE_TLB: u64 = 8;
}

/// Context-cache invalidate (6.5.2.1).
pub mod context {
    /// Lowest bit of the source id.
    pub const SID_SHIFT: u32 = 32;
    /// Lowest bit of the function mask.
    pub const FM_SHIFT: u32 = 48;
    /// Reserved in word 0.
    pub const RESERVED: u64 = 0xfffc_0000_0000_f1c0;
}

/// PASID-cache invalidate (6.5.2.2).
pub mod pasid_cache {
    /// Granularity: all PASIDs of a domain.
    pub const DOMAIN: u64 = 0;
    /// Granularity: one PASID of a domain.
    pub const PASID: u64 = 1;
    /// Granularity: everything.
    pub const GLOBAL: u64 = 3;
    /// Reserved in word 0.
    pub const RESERVED: u64 = 0xfff0_0000_0000_f1c0;
}

/// IOTLB invalidate (6.5.2.3); word 1 is laid out as the Invalidate Address register.
pub mod iotlb {
    /// Reserved in word 0.
    pub const RESERVED: u64 = 0xffff_ffff_0000_f100;
    /// Reserved in word 1.
    pub const RESERVED_1: u64 = 0xf80;
}

/// PASID-based IOTLB invalidate (6.5.2.4); word 1 as in [`iotlb`].
pub mod pasid_iotlb {
    /// Granularity: all translations of a PASID.
    pub const PASID: u64 = 2;
    /// Granularity: some pages of a PASID.
    pub const PAGES: u64 = 3;
    /// Reserved in word 0.
    pub const RESERVED: u64 = 0xfff0_0000_0000_f1c0;
}

/// Device-TLB invalidate (6.5.2.5).
pub mod device_tlb {
    /// Reserved in word 0.
    pub const RESERVED: u64 = 0x000f_0000_ffe0_01f0;
    /// Reserved in word 1.
    pub const RESERVED_1: u64 = 0xffe;
}

/// PASID-based device-TLB invalidate (6.5.2.6).
pub mod pasid_device_tlb {
    /// Reserved in word 1; word 0 has no reserved bits.
    pub const RESERVED_1: u64 = 0x7fe;
}

/// Interrupt entry cache invalidate (6.5.2.7).
pub mod interrupt {
    /// Granularity: only the indices named.
    pub const SELECTIVE: u64 = 1 << 4;
    /// Lowest bit of the index mask: log2 of the number of entries.
    pub const IM_SHIFT: u32 = 27;
    /// Index mask, shifted down.
    pub const IM: u64 = 0x1f;
    /// Lowest bit of the interrupt index.
    pub const IIDX_SHIFT: u32 = 32;
    /// Reserved in word 0.
    pub const RESERVED: u64 = 0xffff_0000_07ff_f1e0;
}

/// Invalidation wait (6.5.2.8).
pub mod wait {
    /// Interrupt Flag: raise the invalidation completion event.
    pub const IF: u64 = 1 << 4;
    /// Status Write.
    pub const SW: u64 = 1 << 5;
    /// Fence Flag.
    pub const FN: u64 = 1 << 6;
    /// Page-request Drain; reserved without page request support.
    pub const PD: u64 = 1 << 7;
    /// Lowest bit of the status data.
    pub const DATA_SHIFT: u32 = 32;
    /// Reserved in word 0.
    pub const RESERVED: u64 = 0xffff_f100;
    /// Reserved in word 1; the rest is the status address.
    pub const RESERVED_1: u64 = 0x3;
}

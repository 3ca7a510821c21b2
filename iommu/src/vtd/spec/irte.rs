//! Interrupt requests and interrupt remapping table entries, as data (sections 5.1, 9.10).
#![forbid(unsafe_code)]

/// Fields of an interrupt request (5.1.2).
pub mod request {
    /// The address bits that make a write an interrupt request, and what they hold.
    pub const RANGE_MASK: u64 = !0xf_ffff;
    /// See [`RANGE_MASK`].
    pub const RANGE: u64 = 0xfee0_0000;
    /// Interrupt Format, in the address: remappable.
    pub const FORMAT: u64 = 1 << 4;
    /// Subhandle Valid, in the address.
    pub const SHV: u64 = 1 << 3;
    /// Handle bit 15, in the address.
    pub const HANDLE_15: u64 = 1 << 2;
    /// Lowest address bit of the handle's other bits.
    pub const HANDLE_SHIFT: u32 = 5;
    /// The handle's other bits, shifted down.
    pub const HANDLE: u64 = 0x7fff;
    /// Subhandle, in the data.
    pub const SUBHANDLE: u32 = 0xffff;
    /// Reserved in the data of a request with subhandle.
    pub const DATA_RESERVED: u32 = !SUBHANDLE;
}

/// Length of an entry in bytes (9.10).
pub const LEN: u64 = 16;

/// Lower word of an entry in remapped format (9.10).
pub mod low {
    /// Present.
    pub const P: u64 = 1 << 0;
    /// Fault Processing Disable.
    pub const FPD: u64 = 1 << 1;
    /// Destination Mode: logical.
    pub const DM: u64 = 1 << 2;
    /// Redirection Hint.
    pub const RH: u64 = 1 << 3;
    /// Trigger Mode: level.
    pub const TM: u64 = 1 << 4;
    /// Lowest bit of the delivery mode.
    pub const DLM_SHIFT: u32 = 5;
    /// Delivery mode, shifted down.
    pub const DLM: u64 = 0x7;
    /// IRTE Mode: posted.
    pub const IM: u64 = 1 << 15;
    /// Lowest bit of the vector.
    pub const VECTOR_SHIFT: u32 = 16;
    /// Lowest bit of a 32-bit destination.
    pub const DST_SHIFT: u32 = 32;
    /// Lowest bit of an 8-bit destination.
    pub const DST_XAPIC_SHIFT: u32 = 40;
    /// Reserved.
    pub const RESERVED: u64 = 0xff00_7000;
    /// Reserved without Extended Interrupt Mode.
    pub const RESERVED_XAPIC: u64 = 0xffff_00ff_0000_0000;
    /// Delivery modes that do not exist, one bit each.
    pub const RESERVED_DLM: u64 = 1 << 0b011 | 1 << 0b110;
}

/// Upper word of an entry (9.10).
pub mod high {
    /// Source id.
    pub const SID: u64 = 0xffff;
    /// Lowest bit of the Source-id Qualifier.
    pub const SQ_SHIFT: u32 = 16;
    /// Lowest bit of the Source Validation Type.
    pub const SVT_SHIFT: u32 = 18;
    /// Reserved.
    pub const RESERVED: u64 = !0xf_ffff;
    /// Source Validation Type: none.
    pub const SVT_NONE: u64 = 0b00;
    /// Source Validation Type: the id as [`SQ_SHIFT`]'s field qualifies it.
    pub const SVT_ID: u64 = 0b01;
    /// Source Validation Type: bus number from bits 15:8 to bits 7:0 of the source id.
    pub const SVT_BUS: u64 = 0b10;
}

/// Fields of the message to a local APIC (Intel SDM volume 3, 11.11).
pub mod message {
    /// Lowest address bit of the destination's lower eight bits.
    pub const DST_SHIFT: u32 = 12;
    /// Redirection Hint, in the address.
    pub const RH: u64 = 1 << 3;
    /// Destination Mode: logical, in the address.
    pub const DM: u64 = 1 << 2;
    /// Upper destination bits are in address bits 63:40 (KVM's x2APIC message format).
    pub const DST_HIGH_SHIFT: u32 = 32;
    /// Lowest data bit of the delivery mode.
    pub const DLM_SHIFT: u32 = 8;
    /// Level assert, in the data.
    pub const ASSERT: u32 = 1 << 14;
    /// Trigger Mode: level, in the data.
    pub const TM: u32 = 1 << 15;
}

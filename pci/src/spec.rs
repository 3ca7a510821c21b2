//! Registers of a PCI Express function and of the root complex, as data.
//!
//! Section numbers are those of the PCI Express Base Specification 6.0 unless another document is
//! named. Offsets are in bytes; capability registers are counted from the capability's first byte.

#![forbid(unsafe_code)]

/// Length of a function's configuration space (7.2.2).
pub const CONFIG_SPACE_LEN: usize = 4096;
/// Length of its part that CF8/CFC reaches and that holds the capability list (7.2.1).
pub const LEGACY_CONFIG_LEN: usize = 256;
/// First offset of the space for capabilities (7.5.1.1, figure 7-3).
pub const FIRST_CAPABILITY: u8 = 0x40;

/// Vendor ID (7.5.1.1.1).
pub const VENDOR_ID: u16 = 0x00;
/// Device ID (7.5.1.1.2).
pub const DEVICE_ID: u16 = 0x02;
/// Command register (7.5.1.1.3).
pub const COMMAND: u16 = 0x04;
/// Status register (7.5.1.1.4).
pub const STATUS: u16 = 0x06;
/// Revision ID (7.5.1.1.5).
pub const REVISION_ID: u16 = 0x08;
/// Class code, three bytes: programming interface, sub-class, base class (7.5.1.1.6).
pub const CLASS_CODE: u16 = 0x09;
/// Cache line size: read-write, without effect on a PCI Express function (7.5.1.1.7).
pub const CACHE_LINE_SIZE: u16 = 0x0c;
/// Header type (7.5.1.1.9).
pub const HEADER_TYPE: u16 = 0x0e;
/// Base address register 0; the others follow, four bytes each (7.5.1.2.1).
pub const BAR0: u16 = 0x10;
/// Number of base address registers of a type 0 header.
pub const BARS: u8 = 6;
/// Subsystem vendor ID (7.5.1.2.3).
pub const SUBSYSTEM_VENDOR_ID: u16 = 0x2c;
/// Subsystem ID (7.5.1.2.3).
pub const SUBSYSTEM_ID: u16 = 0x2e;
/// Capabilities pointer (7.5.1.1.11).
pub const CAPABILITIES_POINTER: u16 = 0x34;
/// Interrupt line: read-write scratch of the system software (7.5.1.1.12).
pub const INTERRUPT_LINE: u16 = 0x3c;
/// Interrupt pin: 0 when the function uses no INTx (7.5.1.1.13).
pub const INTERRUPT_PIN: u16 = 0x3d;

/// Bits of the command register (7.5.1.1.3).
pub mod command {
    /// Memory Space Enable.
    pub const MEMORY: u16 = 1 << 1;
    /// Bus Master Enable.
    pub const BUS_MASTER: u16 = 1 << 2;
    /// Interrupt Disable.
    pub const INTX_DISABLE: u16 = 1 << 10;
    /// The bits that can be written. I/O Space Enable is hardwired to 0 in a function without I/O
    /// BARs; Parity Error Response and SERR# Enable may be in a root complex integrated endpoint
    /// without event collector; the rest does not apply to PCI Express.
    pub const WRITABLE: u16 = MEMORY | BUS_MASTER | INTX_DISABLE;
}

/// Bits of the status register (7.5.1.1.4).
pub mod status {
    /// Interrupt Status.
    pub const INTERRUPT: u16 = 1 << 3;
    /// Capabilities List.
    pub const CAPABILITIES: u16 = 1 << 4;
}

/// Bits of the header type register (7.5.1.1.9).
pub mod header_type {
    /// The device has functions besides this one.
    pub const MULTI_FUNCTION: u8 = 1 << 7;
}

/// Bits of a base address register (7.5.1.2.1).
pub mod bar {
    /// Memory at any 64-bit address; the next register is the upper half.
    pub const MEMORY_64: u32 = 0b10 << 1;
    /// Reads have no side effects and writes may be merged.
    pub const PREFETCHABLE: u32 = 1 << 3;
    /// The bits that are no address.
    pub const FLAGS: u32 = 0xf;
    /// Smallest range that a memory BAR may ask for.
    pub const MIN_SIZE: u64 = 128;
    /// Largest range of a 32-bit BAR: one writable bit must remain.
    pub const MAX_SIZE_32: u64 = 1 << 31;
    /// Largest range of a 64-bit BAR here: half of the largest x86 physical address space.
    pub const MAX_SIZE_64: u64 = 1 << 51;
}

/// Capability IDs (PCI Code and ID Assignment 1.11, 2).
pub mod capability {
    /// PCI Power Management Interface.
    pub const POWER_MANAGEMENT: u8 = 0x01;
    /// MSI.
    pub const MSI: u8 = 0x05;
    /// Vendor-Specific.
    pub const VENDOR_SPECIFIC: u8 = 0x09;
    /// PCI Express.
    pub const EXPRESS: u8 = 0x10;
    /// MSI-X.
    pub const MSIX: u8 = 0x11;
    /// Offset of the next capability's offset in every capability.
    pub const NEXT: u16 = 1;
}

/// Power management capability (7.5.2).
pub mod power {
    /// Length of the capability.
    pub const LEN: usize = 8;
    /// Power Management Capabilities (7.5.2.1).
    pub const CAPABILITIES: u16 = 2;
    /// Version of the PCI Power Management specification: 1.2.
    pub const VERSION: u16 = 3;
    /// Power Management Control/Status (7.5.2.2).
    pub const CONTROL: u16 = 4;
    /// PowerState field of the control register.
    pub const STATE: u8 = 0b11;
    /// Fully on.
    pub const D0: u8 = 0;
    /// Off but for configuration space.
    pub const D3_HOT: u8 = 3;
    /// No_Soft_Reset: going from `D3hot` to D0 keeps the function's state.
    pub const NO_SOFT_RESET: u16 = 1 << 3;
}

/// PCI Express capability (7.5.3).
pub mod express {
    /// Length of the capability, version 2.
    pub const LEN: usize = 60;
    /// PCI Express Capabilities (7.5.3.2).
    pub const CAPABILITIES: u16 = 2;
    /// Capability version 2, as every version of the specification since 2.0.
    pub const VERSION: u16 = 2;
    /// Device/Port Type: root complex integrated endpoint. It has no link.
    pub const ROOT_COMPLEX_INTEGRATED_ENDPOINT: u16 = 9 << 4;
    /// Device Capabilities (7.5.3.3).
    pub const DEVICE_CAPABILITIES: u16 = 4;
    /// Role-Based Error Reporting: must be set.
    pub const ROLE_BASED_ERRORS: u32 = 1 << 15;
    /// Function Level Reset Capability.
    pub const FLR_CAPABLE: u32 = 1 << 28;
    /// Device Control (7.5.3.4).
    pub const DEVICE_CONTROL: u16 = 8;
    /// Error reporting enables (bits 0 to 3), Relaxed Ordering (4), No Snoop (11) and
    /// `Max_Read_Request_Size` (14:12). `Max_Payload_Size` is hardwired to 128 bytes.
    pub const DEVICE_CONTROL_WRITABLE: u16 = 0x781f;
    /// Device Control after reset: Relaxed Ordering, No Snoop, reads of up to 512 bytes.
    pub const DEVICE_CONTROL_RESET: u16 = 0x2810;
    /// Initiate Function Level Reset; reads as 0.
    pub const INITIATE_FLR: u16 = 1 << 15;
    /// Device Status (7.5.3.5).
    pub const DEVICE_STATUS: u16 = 10;
}

/// MSI capability with a 64-bit address and per-vector masking (7.7.1).
pub mod msi {
    /// Length of the capability.
    pub const LEN: usize = 24;
    /// Message Control (7.7.1.2).
    pub const CONTROL: u16 = 2;
    /// MSI Enable.
    pub const ENABLE: u16 = 1 << 0;
    /// Position of Multiple Message Capable: vectors asked for, as a power of two.
    pub const MULTIPLE_CAPABLE_SHIFT: u32 = 1;
    /// Position of Multiple Message Enable: vectors granted, as a power of two.
    pub const MULTIPLE_ENABLE_SHIFT: u32 = 4;
    /// Multiple Message Enable.
    pub const MULTIPLE_ENABLE: u16 = 7 << MULTIPLE_ENABLE_SHIFT;
    /// 64-bit Address Capable.
    pub const WIDE: u16 = 1 << 7;
    /// Per-Vector Masking Capable.
    pub const MASKING: u16 = 1 << 8;
    /// Message Address (7.7.1.3); its upper half follows (7.7.1.4).
    pub const ADDRESS: u16 = 4;
    /// Message Data (7.7.1.5).
    pub const DATA: u16 = 12;
    /// Mask Bits (7.7.1.7).
    pub const MASK: u16 = 16;
    /// Pending Bits (7.7.1.8).
    pub const PENDING: u16 = 20;
    /// Most vectors of a function.
    pub const MAX_VECTORS: u8 = 32;
}

/// MSI-X capability and structures (7.7.2).
pub mod msix {
    /// Length of the capability.
    pub const LEN: usize = 12;
    /// Message Control (7.7.2.2).
    pub const CONTROL: u16 = 2;
    /// Table Size field of Message Control, encoded as size - 1.
    pub const TABLE_SIZE: u16 = 0x7ff;
    /// Function Mask.
    pub const FUNCTION_MASK: u16 = 1 << 14;
    /// MSI-X Enable.
    pub const ENABLE: u16 = 1 << 15;
    /// Table Offset and BIR (7.7.2.3).
    pub const TABLE: u16 = 4;
    /// PBA Offset and BIR (7.7.2.4).
    pub const PBA: u16 = 8;
    /// BAR indicator: the low bits of the two registers above.
    pub const BIR: u32 = 7;
    /// Most vectors of a function.
    pub const MAX_VECTORS: u16 = 2048;
    /// Length of a table entry: address, upper address, data, vector control (7.7.2.5 to 7.7.2.8).
    pub const ENTRY_LEN: u64 = 16;
    /// Mask bit of Vector Control (7.7.2.8).
    pub const ENTRY_MASK: u32 = 1;
}

/// Enhanced Configuration Access Mechanism (7.2.2).
pub mod ecam {
    /// Bytes of address space of one bus.
    pub const BUS_LEN: u64 = 1 << 20;
    /// Position of the device and function number in an offset.
    pub const FUNCTION_SHIFT: u32 = 12;
}

/// PCI configuration mechanism #1 (PCI Local Bus 3.0, 3.2.2.3.2).
pub mod mechanism1 {
    /// `CONFIG_ADDRESS`: four-byte accesses only; others are not meant for it.
    pub const ADDRESS: u16 = 0xcf8;
    /// `CONFIG_DATA`: one, two or four bytes.
    pub const DATA: u16 = 0xcfc;
    /// Last port of `CONFIG_DATA`.
    pub const DATA_LAST: u16 = 0xcff;
    /// Enable bit of `CONFIG_ADDRESS`.
    pub const ENABLE: u32 = 1 << 31;
    /// The bits of `CONFIG_ADDRESS` that exist.
    pub const WRITABLE: u32 = ENABLE | 0x00ff_fffc;
}

//! Constants of the device-independent part of Virtio (OASIS Virtual I/O Device, version 1.2).

#![forbid(unsafe_code)]

/// Device status bits (2.1).
pub mod status {
    /// The driver has noticed the device.
    pub const ACKNOWLEDGE: u8 = 1;
    /// The driver knows how to drive it.
    pub const DRIVER: u8 = 2;
    /// The driver is set up; the queues are live.
    pub const DRIVER_OK: u8 = 4;
    /// Feature negotiation is complete.
    pub const FEATURES_OK: u8 = 8;
    /// The device has met an error that it cannot recover from.
    pub const NEEDS_RESET: u8 = 64;
    /// The driver has given up.
    pub const FAILED: u8 = 128;
    /// What a driver may set.
    pub const DRIVER_BITS: u8 = ACKNOWLEDGE | DRIVER | DRIVER_OK | FEATURES_OK | FAILED;
}

/// Reserved feature bits (6), as masks.
pub mod feature {
    /// Indirect descriptors (2.7.5.3).
    pub const RING_INDIRECT_DESC: u64 = 1 << 28;
    /// `used_event` and `avail_event` (2.7.7, 2.7.8).
    pub const RING_EVENT_IDX: u64 = 1 << 29;
    /// Not a legacy device.
    pub const VERSION_1: u64 = 1 << 32;
    /// Addresses go through the platform's translation.
    pub const ACCESS_PLATFORM: u64 = 1 << 33;
    /// Single queues may be reset (2.6.1).
    pub const RING_RESET: u64 = 1 << 40;
}

/// Device type numbers (5).
pub mod device_id {
    /// Network card.
    pub const NET: u16 = 1;
    /// Socket device.
    pub const VSOCK: u16 = 19;
}

/// Vendor of every virtio function (4.1.2).
pub const PCI_VENDOR: u16 = 0x1af4;
/// Device id of a non-transitional function, less the virtio device type (4.1.2.1).
pub const PCI_DEVICE_BASE: u16 = 0x1040;
/// Lowest revision id of a non-transitional function (4.1.2.1).
pub const PCI_REVISION: u8 = 1;

/// `cfg_type` of a vendor capability (4.1.4).
pub mod cap {
    /// Common configuration.
    pub const COMMON_CFG: u8 = 1;
    /// Notifications.
    pub const NOTIFY_CFG: u8 = 2;
    /// ISR status.
    pub const ISR_CFG: u8 = 3;
    /// Device-specific configuration.
    pub const DEVICE_CFG: u8 = 4;
    /// Window for access through configuration space.
    pub const PCI_CFG: u8 = 5;
    /// Length of `virtio_pci_cap`.
    pub const LEN: u8 = 16;
    /// Length of `virtio_pci_notify_cap` and of `virtio_pci_cfg_cap`.
    pub const LEN_EXTENDED: u8 = 20;
    /// Offset of `bar` from the capability's first byte.
    pub const BAR: u8 = 4;
    /// Offset of `offset`.
    pub const OFFSET: u8 = 8;
    /// Offset of `length`.
    pub const LENGTH: u8 = 12;
    /// Offset of `pci_cfg_data`.
    pub const CFG_DATA: u8 = 16;
}

/// "No interrupt" in a vector register (4.1.5.1.2).
pub const NO_VECTOR: u16 = 0xffff;

/// ISR status bits (4.1.4.5).
pub mod isr {
    /// A queue has used buffers.
    pub const QUEUE: u8 = 1;
    /// The configuration has changed.
    pub const CONFIG: u8 = 2;
}

/// Offsets in `virtio_pci_common_cfg` (4.1.4.3).
pub mod common {
    #![expect(missing_docs, reason = "the names are the specification's")]

    pub const DEVICE_FEATURE_SELECT: u64 = 0;
    pub const DEVICE_FEATURE: u64 = 4;
    pub const DRIVER_FEATURE_SELECT: u64 = 8;
    pub const DRIVER_FEATURE: u64 = 12;
    pub const CONFIG_MSIX_VECTOR: u64 = 16;
    pub const NUM_QUEUES: u64 = 18;
    pub const DEVICE_STATUS: u64 = 20;
    pub const CONFIG_GENERATION: u64 = 21;
    pub const QUEUE_SELECT: u64 = 22;
    pub const QUEUE_SIZE: u64 = 24;
    pub const QUEUE_MSIX_VECTOR: u64 = 26;
    pub const QUEUE_ENABLE: u64 = 28;
    pub const QUEUE_NOTIFY_OFF: u64 = 30;
    pub const QUEUE_DESC: u64 = 32;
    pub const QUEUE_DRIVER: u64 = 40;
    pub const QUEUE_DEVICE: u64 = 48;
    pub const QUEUE_NOTIFY_DATA: u64 = 56;
    pub const QUEUE_RESET: u64 = 58;
    /// Length of the structure.
    pub const LEN: usize = 60;
}

/// Split-ring layout (2.7).
pub mod ring {
    /// `avail.flags`: the driver wants no interrupts (2.7.6).
    pub const AVAIL_F_NO_INTERRUPT: u16 = 1;
    /// `used.flags`: the device wants no notifications (2.7.8).
    pub const USED_F_NO_NOTIFY: u16 = 1;
    /// Offset of the index in either ring.
    pub const INDEX: u64 = 2;
    /// Offset of the first entry in either ring.
    pub const ENTRIES: u64 = 4;
    /// Length of a used entry.
    pub const USED_ENTRY: u64 = 8;
    /// Length of an available entry.
    pub const AVAIL_ENTRY: u64 = 2;
    /// Length of a descriptor.
    pub const DESCRIPTOR: u64 = 16;
    /// Most entries of a split ring.
    pub const MAX_SIZE: u16 = 32768;
}

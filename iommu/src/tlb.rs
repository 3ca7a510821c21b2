//! The IOTLB of one worker.

/// Size of each worker's IOTLB: `sets * ways` translations.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct IotlbGeometry {
    /// Number of sets, a power of two, 1 to 65536.
    pub sets: u32,
    /// Entries in a set, 1 to 64.
    pub ways: u32,
}

impl Default for IotlbGeometry {
    /// 256 translations: 1 MiB in pages of 4 KiB, what 32 requests of 32 KiB touch.
    fn default() -> IotlbGeometry {
        IotlbGeometry { sets: 64, ways: 4 }
    }
}

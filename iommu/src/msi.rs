//! Interrupt messages: an MSI is a DMA write to a special address range, and an IOMMU may remap it.

use std::io;
use std::sync::Arc;

use crate::SourceId;

/// The address and data pair of one MSI (PCIe Base 6.0, 6.1.4).
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct MsiMessage {
    /// Address of the memory write.
    pub address: u64,
    /// Data of the memory write.
    pub data: u32,
}

/// Where MSIs go: KVM in the VMM, a recorder in tests, an interrupt remapper in between.
pub trait MsiSink: Send + Sync {
    /// Opens a line for one interrupt source, such as an MSI-X table entry of `source`.
    ///
    /// # Errors
    ///
    /// The host has no interrupt route or file descriptor left.
    fn open(&self, source: SourceId) -> io::Result<Arc<dyn MsiLine>>;

    /// Delivers one message now, without a line: a write of `source` to the interrupt address range
    /// that is not one of its vectors.
    ///
    /// # Errors
    ///
    /// The message cannot be delivered, or the host refuses it.
    fn send(&self, source: SourceId, message: MsiMessage) -> io::Result<()>;
}

/// One interrupt source. Cheap to fire, dear to retarget.
pub trait MsiLine: Send + Sync {
    /// From now on, [`MsiLine::fire`] delivers `message`.
    ///
    /// # Errors
    ///
    /// The host refuses the route; the old one stays.
    fn retarget(&self, message: MsiMessage) -> io::Result<()>;

    /// Delivers the message set last; does nothing if none was ever set.
    fn fire(&self);
}

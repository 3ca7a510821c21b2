//! The border between a function's standard part (this crate) and its device-specific part.

use std::io;

use vmm_sys_util::eventfd::EventFd;

/// Number of a base address register, 0 to 5. A 64-bit BAR goes by the number of its low half.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct BarIndex(pub u8);

/// The device-specific part of a PCI function.
///
/// Every method takes `&self`: registers that must change together sit behind a small mutex of the
/// device's own; doorbells are atomics. The bus holds no lock while it calls.
pub trait PciDevice: Send + Sync {
    /// A load from a memory BAR. `offset + data.len()` is inside the BAR; alignment and size are
    /// whatever the guest chose (1 to 8 bytes). The MSI-X table and PBA are handled before this.
    fn bar_read(&self, bar: BarIndex, offset: u64, data: &mut [u8]);

    /// A store to a memory BAR; as for [`PciDevice::bar_read`].
    fn bar_write(&self, bar: BarIndex, offset: u64, data: &[u8]);

    /// Function-level or bus reset: back to the state after power-on. On return no worker of the
    /// device touches guest memory or fires an interrupt.
    fn reset(&self);

    /// Bus Master Enable changed. When it was cleared, DMA has already been drained; when it was
    /// set, work that was refused in between may be looked at again.
    fn bus_master_changed(&self, on: bool) {
        let _ = on;
    }

    /// Stores that should wake a worker by eventfd instead of reaching [`PciDevice::bar_write`].
    /// Asked once, when the function is attached; the bus registers them wherever the BAR is mapped.
    fn io_events(&self) -> Vec<IoEvent> {
        Vec::new()
    }

    /// A load from the body of vendor-specific capability number `index` (in order of addition),
    /// at `offset` from the capability's first byte. `data` holds the stored bytes and may be changed.
    fn capability_read(&self, index: usize, offset: u8, data: &mut [u8]) {
        let _ = (index, offset, data);
    }

    /// A store to the body of vendor-specific capability number `index`, after the stored bytes have
    /// been changed as its write mask allows.
    fn capability_write(&self, index: usize, offset: u8, data: &[u8]) {
        let _ = (index, offset, data);
    }
}

/// Which length of store triggers an [`IoEvent`].
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum IoLength {
    /// Any.
    Any,
    /// Two bytes.
    U16,
    /// Four bytes.
    U32,
    /// Eight bytes.
    U64,
}

impl IoLength {
    /// Length in bytes; the least one for [`IoLength::Any`].
    pub fn bytes(self) -> u64 {
        match self {
            IoLength::Any => 1,
            IoLength::U16 => 2,
            IoLength::U32 => 4,
            IoLength::U64 => 8,
        }
    }
}

/// A store that wakes a worker.
#[derive(Debug)]
pub struct IoEvent {
    /// The BAR.
    pub bar: BarIndex,
    /// Offset in the BAR.
    pub offset: u64,
    /// Length of the store.
    pub length: IoLength,
    /// Only stores of this value; others reach [`PciDevice::bar_write`]. Not with [`IoLength::Any`].
    pub value: Option<u64>,
    /// Written when the store happens.
    pub event: EventFd,
}

/// Where [`IoEvent`]s are registered: KVM in the VMM; in tests a table that the fake guest consults.
pub trait IoEventHub: Send + Sync {
    /// Stores to guest-physical `address` now signal `event.event`.
    ///
    /// # Errors
    ///
    /// The host refuses it; stores then reach [`PciDevice::bar_write`], which must do the same work.
    fn add(&self, address: u64, event: &IoEvent) -> io::Result<()>;

    /// Undoes [`IoEventHub::add`] with the same arguments.
    fn remove(&self, address: u64, event: &IoEvent);
}

//! What a bus-master transaction passes through on its way out of a PCI function.
//!
//! Two kinds of transaction leave a function: memory accesses (DMA) and interrupt messages (MSI).
//! This crate owns both paths, because an IOMMU sits on both:
//!
//! - [`DmaSpace`]: one per function, the function's view of memory. It is gated by the command
//!   register's Bus Master Enable bit. [`DmaSpace::view`] gives each worker a [`DmaMemory`], which
//!   implements vm-memory's `GuestMemory`, so rings, PRP lists and virtio queues all take one way.
//! - [`PinnedBuffers`]: host iovecs for zero-copy I/O, held until the I/O has ended.
//! - [`MsiSink`] and [`MsiLine`]: where interrupt messages go.
//! - [`Upstream`]: what lies above a function: memory, interrupts, a [`Remapper`].
//! - [`BusMaster`]: the three together: the only handle through which a device reaches out.
//!
//! # Draining
//!
//! Whoever takes a mapping away (clears Bus Master Enable, invalidates a range of the IOTLB) must know
//! when no worker can still use it. Workers open a [`DmaSection`] around each batch; the revoker
//! publishes an [`Invalidation`] and waits until every view is either outside a section or entered one
//! after it, and until no buffer pinned before overlaps it. See [`Invalidations`].

mod addr;
mod counter;
mod drain;
mod invalidate;
mod log;
mod memory;
mod msi;
mod pin;
mod remap;
mod slices;
mod space;
mod stats;
mod tlb;
mod translate;
mod upstream;
mod view;
pub mod vtd;

pub use addr::{Bdf, Gpa, Iova, SourceId};
pub use counter::Counter;
pub use invalidate::Invalidations;
pub use memory::{DmaMemory, DmaSection};
pub use msi::{MsiLine, MsiMessage, MsiSink};
pub use pin::PinnedBuffers;
pub use remap::{Context, FaultReason, Invalidation, Mapping, Remapper, Stage};
pub use space::DmaSpace;
pub use stats::DmaStats;
pub use tlb::IotlbGeometry;
pub use upstream::{BusMaster, Upstream};

/// What `drain` and `log` are made of; loom's in their tests.
mod sync {
    pub(crate) use std::sync::atomic::{AtomicU32, AtomicU64, Ordering, fence};
    pub(crate) use std::sync::{Condvar, Mutex};
    /// Pins in one piece of a view's list: bits of a word.
    pub(crate) const SLOTS: usize = 64;
    /// Invalidations that a view may fall behind before it drops all it has.
    pub(crate) const LOG: u64 = 256;
}

/// The guest's RAM: host memory mapped at guest-physical addresses.
pub type GuestRam = vm_memory::GuestMemoryMmap<()>;

/// Direction of a transfer, seen from the device.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Access {
    /// The device reads guest memory (an NVMe write, a transmitted packet).
    Read,
    /// The device writes guest memory (an NVMe read, a received packet).
    Write,
}

/// Why a bus-master access did not happen.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum DmaError {
    /// Bus Master Enable is clear in the function's command register (PCIe Base 6.0, 7.5.1.1.3).
    #[error("bus mastering is off")]
    BusMasterOff,
    /// No RAM answers at this address (an Unsupported Request on real hardware).
    #[error("no memory at {0}, {1} bytes")]
    NotMapped(Iova, u64),
    /// The IOMMU blocked the access; unless the function's faults are disabled, it has recorded why.
    #[error("{0} is blocked by the IOMMU (fault reason {reason:#x})", reason = .1.0)]
    Fault(Iova, FaultReason),
}

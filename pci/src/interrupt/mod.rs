//! Interrupts of a function: messages (MSI, MSI-X) and the emulated wire (INTx).
//!
//! MSI and MSI-X share their vectors: a `Bank` of gates and lines, signalled through [`MsiVector`]s.
//! What differs is where the registers are (a capability, a table in a BAR) and how a message is made
//! of them; that is in `msi` and `msix`.

mod gate;
mod intx;
mod msi;
mod msix;
mod vector;

pub(crate) use intx::{Intx, IntxLines};
pub(crate) use msi::MsiRegisters;

pub use intx::{InterruptPin, IntxPin, IntxSink};
pub use msi::Msi;
pub use msix::Msix;
pub use vector::MsiVector;

/// What the gate is made of; loom's in its tests.
mod sync {
    pub(super) use std::sync::atomic::{AtomicU32, Ordering};
    pub(super) use std::thread::yield_now;
}

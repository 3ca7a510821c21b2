//! Intel VT-d (Intel Virtualization Technology for Directed I/O, architecture specification, rev 4.1).
//!
//! The tables that software builds, and how a request walks through them:
//!
//! ```text
//!               legacy mode                            scalable mode
//! RTADDR ->     root table [bus]                       root table [bus], lower or upper half
//!               context table [device, function]       context table [device, function]
//!                                                      PASID directory, PASID table [RID_PASID]
//!               second stage or pass-through           first stage, second stage or pass-through
//! ```
//!
//! - [`spec`]: what the specification says, as data: table entries, capabilities, fault reasons.
//! - [`Options`]: what this unit offers, and the capability registers that say so.
//! - [`walk`]: the walks, as functions of guest memory: no lock, no cache, no state.
//! - [`Unit`]: the unit with its registers, invalidation queue, fault recording and interrupt remapping.
//! - [`build`]: writes tables, as an operating system does; for tests, test guests and models.
//!
//! # Who does what on which thread
//!
//! - *A vCPU* writes registers. A write to the queue's tail runs the queue there and then. A wait
//!   descriptor completes when no worker uses what was invalidated before it: the vCPU looks for some
//!   microseconds, then leaves the queue to the unit's thread, which sleeps until the last I/O has let
//!   go. The same holds for Translation Enable and for invalidation by register, but there it is the
//!   status bit that waits.
//! - *A worker* asks the [`Unit`] as its [`Remapper`](crate::Remapper) when its own caches miss. It reads
//!   the latched root table address, one atomic word, walks, and records a fault if there is one.
//! - *Whoever signals an interrupt* fires a line. The line's route in the host is what its table entry
//!   said when it was read: it is the interrupt entry cache. Invalidating entries gives routes anew.
//!
//! Locks, outermost first: registers, queue, interrupt line, fault recording. None of them is
//! held while the unit's thread sleeps, and a worker never takes the first two.

pub mod build;
mod completion;
mod counters;
mod descriptor;
mod drain;
mod event;
mod fault;
mod interrupt;
mod limit;
mod line;
#[cfg(test)]
mod model;
mod options;
mod queue;
mod registers;
pub mod spec;
#[cfg(test)]
mod tests;
mod unit;
pub mod walk;

pub use crate::IotlbGeometry;
pub use counters::{InvalidationCounters, UnitCounters};
pub use options::{AddressWidths, LargePages, Options};
pub use unit::Unit;

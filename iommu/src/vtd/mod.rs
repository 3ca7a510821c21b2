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
pub mod spec;
#[cfg(test)]
mod tests;
mod unit;
pub mod walk;

pub use counters::{InvalidationCounters, UnitCounters};
pub use options::{AddressWidths, IotlbGeometry, LargePages, Options};
pub use unit::Unit;

//! What the VT-d specification, rev 4.1, says, as data: [`capability`] registers, [`tables`] and their
//! entries, and the reasons of a [`fault`]; [`registers`], [`descriptors`] of invalidations and entries
//! of the interrupt remapping table, [`irte`].
#![forbid(unsafe_code)]

pub mod capability;
pub mod descriptors;
pub mod fault;
pub mod irte;
pub mod registers;
pub mod tables;

/// First address of the interrupt address range: writes to it are interrupt requests (section 3.14).
pub const INTERRUPT_RANGE_FIRST: u64 = 0xfee0_0000;
/// Last address of the interrupt address range.
pub const INTERRUPT_RANGE_LAST: u64 = 0xfeef_ffff;

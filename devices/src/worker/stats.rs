//! What a worker has done, readable from other threads.

use iommu::Counter;

/// Totals since the worker was spawned.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct WorkerStats {
    /// Calls of `poll`.
    pub polls: u64,
    /// Units of work that they reported.
    pub work: u64,
    /// Interrupts raised.
    pub interrupts: u64,
    /// Times that the worker slept.
    pub sleeps: u64,
    /// Work found by spinning, without a sleep after the last work.
    pub spin_hits: u64,
    /// Calls of [`super::Kick::kick`], since the kick was made.
    pub kicks: u64,
    /// Kicks that found the worker asleep and cost a system call.
    pub wakes: u64,
}

/// Written by the worker's thread only.
#[derive(Default)]
#[repr(align(64))]
pub(super) struct Counters {
    pub(super) polls: Counter,
    pub(super) work: Counter,
    pub(super) interrupts: Counter,
    pub(super) sleeps: Counter,
    pub(super) spin_hits: Counter,
}

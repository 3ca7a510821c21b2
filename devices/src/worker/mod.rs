//! The one loop that runs a device queue: poll, signal, arm, sleep.
//!
//! A device gives each of its queues (or each group of queues that share a completion queue) to a
//! [`QueueTask`]; [`Worker::spawn`] runs it on a thread of its own. Everything that the task owns
//! (rings, TLB, io_uring) is then touched by that thread alone, so the data path takes no lock.
//! Other threads reach it in two ways: [`Kick::kick`] says "there is work" and costs no system call
//! while the worker is awake; [`Worker::with`] runs a closure on the worker's thread between polls.
//!
//! - [`Loop`] is the pure state machine: what to do next, given what the last poll did, the
//!   [`PollPolicy`], the [`Coalesce`] bounds and the clock. It is tested without threads.
//! - [`Worker`] is the thread that does it; the race between going to sleep and new work is handled
//!   there, once.
//!
//! # DMA sections
//!
//! The loop opens none. A task opens its own `DmaMemory::section()` inside [`QueueTask::poll`] (and
//! in `arm`, `has_work`, `disarm` and closures, where they touch guest memory) and closes it before
//! it returns. It must never sleep or wait in a section: whoever turns bus mastering off waits for
//! the section to end.

mod kick;
mod policy;
mod stats;
mod thread;

pub use kick::Kick;
pub use policy::{Clock, Coalesce, Loop, PollPolicy, Step, SystemClock};
pub use stats::WorkerStats;
pub use thread::{Worker, WorkerOptions};

/// Event sources that one task may moderate separately (virtio-net: receive and transmit).
pub const SOURCES: usize = 2;

/// What one [`QueueTask::poll`] did.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Polled {
    /// Units of work done: commands taken or completed, packets moved.
    pub work: u32,
    /// Events now visible to the guest that want an interrupt, by source.
    pub events: [u32; SOURCES],
}

/// One device queue (or the queues that share one completion queue), run by one worker.
pub trait QueueTask: Send {
    /// Does at most `budget` (at least 1) units of work. Never blocks. The loop calls it again while
    /// it reports work.
    fn poll(&mut self, budget: u32) -> Polled;

    /// Asks the guest and the back ends to notify us from now on, by [`Kick::kick`] or one of the
    /// descriptors. The loop then issues a full memory barrier and calls [`QueueTask::has_work`], so
    /// `arm` needs no barrier of its own at its end.
    fn arm(&mut self);

    /// Whether there is work now; called after [`QueueTask::arm`] and the barrier. If true, the loop
    /// polls again instead of sleeping. It must look at everything that `poll` would take work from
    /// and that was told to notify us only by `arm`.
    fn has_work(&mut self) -> bool;

    /// Undoes [`QueueTask::arm`]: we are polling, notifications are not needed. Called once after
    /// every `arm`.
    fn disarm(&mut self);

    /// Raises the interrupt for the events of `source` (below [`SOURCES`]) reported so far.
    fn interrupt(&mut self, source: usize);

    /// Appends the descriptors whose readability ends a sleep (guest notifications, back-end
    /// completions). May change between sleeps. Eventfds among them are drained by the task, in
    /// `disarm` or `poll`; a descriptor that only ever reports an error must be left out, or the
    /// worker would spin on it.
    fn fds(&self, fds: &mut Vec<std::os::fd::RawFd>);

    /// Appends the descriptors whose writability ends a sleep (a back end that answered
    /// [`std::io::ErrorKind::WouldBlock`]).
    fn write_fds(&self, _fds: &mut Vec<std::os::fd::RawFd>) {}
}

//! The one loop that runs a device queue: poll, signal, arm, sleep.

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
    /// Does at most `budget` units of work. Never blocks. The loop calls it again while it reports
    /// work.
    fn poll(&mut self, budget: u32) -> Polled;

    /// Tells the guest and the back ends to notify us; true if work has arrived meanwhile, in which
    /// case the loop polls again instead of sleeping.
    fn arm(&mut self) -> bool;

    /// Undoes [`QueueTask::arm`]: we are polling, notifications are not needed.
    fn disarm(&mut self);

    /// Raises the interrupt for the events of `source` reported so far.
    fn interrupt(&mut self, source: usize);

    /// Descriptors whose readability ends a sleep (guest notifications, back-end completions). May
    /// change between sleeps. Eventfds among them are drained by the task, in `disarm` or `poll`.
    fn fds(&self, fds: &mut Vec<std::os::fd::RawFd>);
}

/// When a worker polls instead of sleeping.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum PollPolicy {
    /// Sleeps as soon as there is no work.
    #[default]
    Interrupt,
    /// Polls for `spin` after the last work, then sleeps.
    Adaptive {
        /// How long.
        spin: std::time::Duration,
    },
    /// Never sleeps.
    Busy,
}

/// Interrupt moderation: an interrupt is raised when either bound is reached.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Coalesce {
    /// Events gathered; 1 is no moderation.
    pub max_events: u32,
    /// Age of the oldest event not yet signalled; zero is no moderation.
    pub max_delay: std::time::Duration,
}

impl Coalesce {
    /// Every event is signalled at the end of its batch.
    pub const OFF: Coalesce = Coalesce {
        max_events: 1,
        max_delay: std::time::Duration::ZERO,
    };
}

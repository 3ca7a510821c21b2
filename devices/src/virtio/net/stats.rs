//! What each queue has done.

use serde::Serialize;

use crate::worker::WorkerStats;
use iommu::Counter;

/// Totals of one queue since the device was made; resets do not clear them.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize)]
pub struct QueueStats {
    /// Packets moved.
    pub packets: u64,
    /// Their bytes, without virtio headers.
    pub bytes: u64,
    /// Packets dropped: malformed, not negotiated, refused by the back end; on receive those that
    /// the filter rejected count as [`QueueStats::filtered`] instead.
    pub drops: u64,
    /// Received packets that the driver does not want.
    pub filtered: u64,
    /// Notifications by the driver.
    pub notifications: u64,
    /// Interrupts raised.
    pub interrupts: u64,
}

/// One queue pair.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize)]
pub struct PairStats {
    /// The receive queue.
    pub receive: QueueStats,
    /// The transmit queue.
    pub transmit: QueueStats,
    /// Polls of the worker that runs the pair, since the driver activated the device; 0 if it has
    /// not.
    pub polls: u64,
    /// Times that it slept.
    pub sleeps: u64,
}

impl PairStats {
    pub(super) fn with_worker(mut self, worker: WorkerStats) -> PairStats {
        (self.polls, self.sleeps) = (worker.polls, worker.sleeps);
        self
    }
}

/// The device.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize)]
pub struct NetStats {
    /// Pairs that packets may arrive on.
    pub active_pairs: u16,
    /// The link is up.
    pub link_up: bool,
    /// Each pair.
    pub pairs: Vec<PairStats>,
    /// Packets that the back end dropped, in both directions.
    pub backend_drops: u64,
    /// Control commands taken.
    pub commands: u64,
    /// Times that the driver broke the device.
    pub faults: u64,
}

/// Written by the worker of the queue only.
#[derive(Default)]
#[repr(align(64))]
pub(super) struct QueueCounters {
    pub(super) packets: Counter,
    pub(super) bytes: Counter,
    pub(super) drops: Counter,
    pub(super) filtered: Counter,
    pub(super) notifications: Counter,
    pub(super) interrupts: Counter,
}

impl QueueCounters {
    pub(super) fn snapshot(&self) -> QueueStats {
        QueueStats {
            packets: self.packets.get(),
            bytes: self.bytes.get(),
            drops: self.drops.get(),
            filtered: self.filtered.get(),
            notifications: self.notifications.get(),
            interrupts: self.interrupts.get(),
        }
    }
}

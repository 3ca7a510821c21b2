//! What a controller has done: counters that workers write and anybody may read.

use serde::Serialize;

use iommu::Counter;

/// Counters of one queue id, over the controller's life. All but the interrupts belong to the
/// submission queue; its worker is the only writer while the queue exists.
#[derive(Default)]
#[repr(align(64))]
pub(super) struct QueueCounters {
    pub(super) commands: Counter,
    pub(super) errors: Counter,
    pub(super) reads: Counter,
    pub(super) writes: Counter,
    pub(super) bytes_read: Counter,
    pub(super) bytes_written: Counter,
    /// Of the completion queue with this id.
    pub(super) completions: Counter,
    /// Of the completion queue with this id.
    pub(super) interrupts: Counter,
}

/// Totals of one queue id since the controller was made; queues that were deleted and created
/// again count on.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize)]
pub struct QueueStats {
    /// Queue identifier; 0 is the admin queue.
    pub id: u16,
    /// Commands taken from the submission queue.
    pub commands: u64,
    /// Of them, those that ended with an error status.
    pub errors: u64,
    /// Read commands that succeeded.
    pub reads: u64,
    /// Write and Write Zeroes commands that succeeded.
    pub writes: u64,
    /// Bytes of user data read.
    pub bytes_read: u64,
    /// Bytes of user data written; Write Zeroes moves none.
    pub bytes_written: u64,
    /// Stores to the tail doorbell that were accepted.
    pub doorbells: u64,
    /// Entries posted to the completion queue with this id.
    pub completions: u64,
    /// Interrupts raised by the completion queue with this id.
    pub interrupts: u64,
}

/// A controller's counters.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize)]
pub struct NvmeStats {
    /// Queue ids that were ever used, the admin queue first.
    pub queues: Vec<QueueStats>,
    /// Errors reported by the host's storage.
    pub media_errors: u64,
    /// Entries ever added to the error log.
    pub error_entries: u64,
}

impl QueueCounters {
    /// The totals of queue `id`, whose tail doorbell was stored to `doorbells` times.
    pub(super) fn snapshot(&self, id: u16, doorbells: u64) -> QueueStats {
        QueueStats {
            id,
            commands: self.commands.get(),
            errors: self.errors.get(),
            reads: self.reads.get(),
            writes: self.writes.get(),
            bytes_read: self.bytes_read.get(),
            bytes_written: self.bytes_written.get(),
            doorbells,
            completions: self.completions.get(),
            interrupts: self.interrupts.get(),
        }
    }
}

//! Commands in flight: a slab of slots that are used again and again, so that steady I/O allocates
//! nothing.

use iommu::PinnedBuffers;

use super::queue::{CqPermit, QueueId};
use super::spec::command::Status;

/// What is left to do for a command, one back-end request at a time.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) enum Rest {
    /// Nothing after the request under way.
    #[default]
    Nothing,
    /// A Read with Force Unit Access: the flush under way, then the read.
    ReadAt(u64),
    /// Dataset Management: the ranges from this one on, then perhaps a flush.
    Ranges(usize),
    /// A flush of all namespaces: those from this index on.
    FlushFrom(usize),
}

/// What a command moves, for the counters.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) enum Kind {
    Read,
    Write,
    WriteZeroes,
    #[default]
    Other,
}

/// One command between its submission entry and its completion entry.
#[derive(Default)]
pub(super) struct Slot {
    /// Its place in the completion queue; `None` while the slot is free.
    pub(super) permit: Option<CqPermit>,
    pub(super) sq: Option<QueueId>,
    pub(super) cid: u16,
    pub(super) nsid: u32,
    /// Index of the namespace under way.
    pub(super) namespace: usize,
    pub(super) lba: u64,
    pub(super) bytes: u64,
    pub(super) kind: Kind,
    pub(super) rest: Rest,
    /// Kept for its storage, and between the requests of one command.
    pub(super) buffers: PinnedBuffers,
    /// Dataset Management ranges, byte offset and length; kept for its storage.
    pub(super) ranges: Vec<(u64, u64)>,
    pub(super) status: Option<Status>,
}

/// The slots of one worker.
pub(super) struct Slots {
    slots: Vec<Slot>,
    free: Vec<u16>,
}

impl Slots {
    /// `count` free slots.
    pub(super) fn new(count: u16) -> Slots {
        Slots {
            slots: (0..count).map(|_| Slot::default()).collect(),
            free: (0..count).rev().collect(),
        }
    }

    /// Takes a free slot.
    pub(super) fn take(&mut self) -> Option<u16> {
        self.free.pop()
    }

    /// Whether [`Slots::take`] would succeed.
    pub(super) fn has_free(&self) -> bool {
        !self.free.is_empty()
    }

    /// How many there are.
    pub(super) fn count(&self) -> u16 {
        u16::try_from(self.slots.len()).unwrap_or(u16::MAX)
    }

    /// The slot that a tag names.
    pub(super) fn get(&mut self, index: u16) -> Option<&mut Slot> {
        self.slots.get_mut(usize::from(index))
    }

    /// Gives a slot back. What it held is released; its storage stays.
    pub(super) fn give(&mut self, index: u16) {
        if let Some(slot) = self.slots.get_mut(usize::from(index)) {
            let mut buffers = std::mem::take(&mut slot.buffers);
            let mut ranges = std::mem::take(&mut slot.ranges);
            buffers.release();
            ranges.clear();
            *slot = Slot {
                buffers,
                ranges,
                ..Slot::default()
            };
            self.free.push(index);
        }
    }
}

//! The error log and asynchronous events that wait to be reported (NVM Express Base 1.4,
//! sections 5.14.1.1 and 5.2).

use std::collections::VecDeque;

use zerocopy::FromZeros;

use super::queue::QueueId;
use super::spec::command::Status;
use super::spec::command::event::{Event, KINDS};
use super::spec::data::ErrorEntry;

/// Entries kept; ELPE is one less.
pub(super) const ERROR_ENTRIES: usize = 64;

/// What an error log entry tells.
#[derive(Clone, Copy, Debug)]
pub(super) struct ErrorInfo {
    /// Submission queue; `None` if the error belongs to no command.
    pub(super) sq: Option<QueueId>,
    pub(super) cid: u16,
    pub(super) status: Status,
    pub(super) nsid: u32,
    pub(super) lba: u64,
}

/// The newest errors, newest first.
#[derive(Default)]
pub(super) struct ErrorLog {
    count: u64,
    entries: VecDeque<ErrorEntry>,
}

impl ErrorLog {
    /// Adds an entry; the oldest falls out.
    pub(super) fn add(&mut self, info: ErrorInfo) {
        self.count = self.count.wrapping_add(1);
        let mut entry = ErrorEntry::new_zeroed();
        entry.count = self.count.into();
        entry.sqid = info.sq.map_or(0xffff, |sq| sq.0).into();
        entry.cid = info.cid.into();
        entry.status = (info.status.0 << 1).into();
        // Not known to the byte.
        entry.location = 0xffff.into();
        entry.lba = info.lba.into();
        entry.nsid = info.nsid.into();
        self.entries.truncate(ERROR_ENTRIES - 1);
        self.entries.push_front(entry);
    }

    /// Entries ever added.
    pub(super) fn count(&self) -> u64 {
        self.count
    }

    /// Newest first.
    pub(super) fn entries(&self) -> impl Iterator<Item = &ErrorEntry> {
        self.entries.iter()
    }
}

/// Events that no request has reported yet.
#[derive(Default)]
pub(super) struct Events {
    waiting: VecDeque<Event>,
    /// Reported and not cleared by reading the log page: further events of the type wait.
    masked: [bool; KINDS],
}

impl Events {
    /// Records an event; false if the same one waits already.
    pub(super) fn add(&mut self, event: Event) -> bool {
        let new = !self.waiting.contains(&event);
        if new {
            self.waiting.push_back(event);
        }
        new
    }

    /// Whether [`Events::take`] would return something.
    pub(super) fn ready(&self) -> bool {
        self.waiting.iter().any(|event| !self.is_masked(*event))
    }

    /// Takes the next event that may be reported and masks its type.
    pub(super) fn take(&mut self) -> Option<Event> {
        let next = self
            .waiting
            .iter()
            .position(|event| !self.is_masked(*event))?;
        let event = self.waiting.remove(next)?;
        if let Some(masked) = self.masked.get_mut(usize::from(event.kind)) {
            *masked = true;
        }
        Some(event)
    }

    /// The log page of events of type `kind` was read without Retain Asynchronous Event.
    pub(super) fn clear(&mut self, kind: u8) {
        if let Some(masked) = self.masked.get_mut(usize::from(kind)) {
            *masked = false;
        }
    }

    fn is_masked(&self, event: Event) -> bool {
        self.masked
            .get(usize::from(event.kind))
            .is_some_and(|masked| *masked)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::nvme::spec::command::event;

    #[test]
    fn the_log_keeps_the_newest() {
        let mut log = ErrorLog::default();
        for cid in 0..100 {
            log.add(ErrorInfo {
                sq: Some(QueueId(1)),
                cid,
                status: Status::INVALID_FIELD,
                nsid: 1,
                lba: 7,
            });
        }
        assert_eq!((log.count(), log.entries().count()), (100, ERROR_ENTRIES));
        let first = log.entries().next().unwrap();
        assert_eq!(
            (first.count.get(), first.cid.get(), first.status.get()),
            (100, 99, 4)
        );
    }

    #[test]
    fn a_reported_type_waits_until_its_log_is_read() {
        let mut events = Events::default();
        assert!(events.add(event::INVALID_DOORBELL_VALUE));
        assert!(!events.add(event::INVALID_DOORBELL_VALUE));
        events.add(event::INVALID_DOORBELL_REGISTER);
        events.add(event::TEMPERATURE);
        assert_eq!(events.take(), Some(event::INVALID_DOORBELL_VALUE));
        assert_eq!(events.take(), Some(event::TEMPERATURE));
        assert_eq!(events.take(), None);
        events.clear(event::ERROR);
        assert!(events.ready());
        assert_eq!(events.take(), Some(event::INVALID_DOORBELL_REGISTER));
        assert_eq!(event::INVALID_DOORBELL_REGISTER.result(), 0x01_0000);
    }
}

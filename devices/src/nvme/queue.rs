//! Submission and completion rings (NVM Express Base 1.4, section 4.1).

use std::sync::Arc;
use std::sync::atomic::Ordering;

use iommu::{DmaError, DmaMemory, Iova};

use super::doorbell::{CqDoorbell, SqDoorbell};
use super::spec::command::{Cqe, Sqe};
use super::spec::{CQE_BYTES, SQE_BYTES};

/// Identifier of a submission or completion queue; 0 is the admin queue.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct QueueId(pub u16);

impl QueueId {
    /// The admin queue.
    pub const ADMIN: QueueId = QueueId(0);

    /// As an index.
    pub fn index(self) -> usize {
        usize::from(self.0)
    }
}

/// A submission queue as its worker sees it.
pub(super) struct SubmissionQueue {
    pub(super) id: QueueId,
    base: Iova,
    entries: u32,
    head: u32,
    doorbell: Arc<SqDoorbell>,
}

impl SubmissionQueue {
    /// An empty queue; opens its doorbell. `base` is page-aligned, `entries` at least 2.
    pub(super) fn new(
        id: QueueId,
        base: Iova,
        entries: u32,
        cq: QueueId,
        doorbell: Arc<SqDoorbell>,
    ) -> SubmissionQueue {
        doorbell.open(entries, cq);
        SubmissionQueue {
            id,
            base,
            entries,
            head: 0,
            doorbell,
        }
    }

    /// Whether the host has submitted something that was not taken.
    pub(super) fn has_entries(&self) -> bool {
        self.head != self.tail()
    }

    /// The tail doorbell. A store that raced with the making of a smaller queue may have left a
    /// value that is out of range; it counts as nothing new.
    pub(super) fn tail(&self) -> u32 {
        let tail = self.doorbell.tail.load(Ordering::Acquire);
        if tail < self.entries { tail } else { self.head }
    }

    /// The head, as completions report it.
    pub(super) fn head(&self) -> u16 {
        u16::try_from(self.head).unwrap_or(u16::MAX)
    }

    /// The entry at the head, which stays there until [`SubmissionQueue::advance`].
    pub(super) fn peek(&self, mem: &DmaMemory) -> Result<Sqe, DmaError> {
        // `base` and the ring's size were accepted as they came from the host.
        let offset = u64::from(self.head) * SQE_BYTES;
        let at = self.base.checked_add(offset);
        let at = at.ok_or(DmaError::NotMapped(self.base, SQE_BYTES))?;
        let dwords: [u32; 16] = mem.read_obj(at)?;
        Ok(Sqe(dwords.map(u32::from_le)))
    }

    /// Takes the entry at the head.
    pub(super) fn advance(&mut self) {
        self.head = (self.head + 1) % self.entries;
    }
}

impl Drop for SubmissionQueue {
    fn drop(&mut self) {
        self.doorbell.close();
    }
}

/// The right to post one completion. It must be given back by [`CompletionQueue::post`] or
/// [`CompletionQueue::cancel`].
#[must_use = "a completion slot was reserved"]
#[derive(Debug)]
pub(super) struct CqPermit(());

/// A completion queue as its worker sees it.
///
/// A slot is reserved before a submission entry is taken, so a command that was started can always
/// be completed; a full queue makes its submission queues wait.
pub(super) struct CompletionQueue {
    base: Iova,
    entries: u32,
    /// Where the next completion goes.
    tail: u32,
    /// The phase tag that marks new entries in this pass.
    phase: bool,
    /// The host's head as accepted last.
    head: u32,
    /// Permits given out.
    reserved: u32,
    /// Head doorbell values that were refused, to report each once.
    refused: Option<u32>,
    doorbell: Arc<CqDoorbell>,
    /// MSI-X vector; `None` if the queue raises no interrupts.
    pub(super) vector: Option<u16>,
}

impl CompletionQueue {
    /// An empty queue; opens its doorbell. `base` is page-aligned, `entries` at least 2.
    pub(super) fn new(
        base: Iova,
        entries: u32,
        vector: Option<u16>,
        doorbell: Arc<CqDoorbell>,
    ) -> CompletionQueue {
        doorbell.open(entries);
        CompletionQueue {
            base,
            entries,
            tail: 0,
            phase: true,
            head: 0,
            reserved: 0,
            refused: None,
            doorbell,
            vector,
        }
    }

    /// Looks at the head doorbell. False if the host claims to have consumed entries that were
    /// never posted; such a value is not accepted, and reported once.
    pub(super) fn update_head(&mut self) -> bool {
        let head = self.doorbell.head.load(Ordering::Acquire);
        if head == self.head {
            return true;
        }
        // Out of range: as for the tail of a submission queue.
        if head >= self.entries || self.distance(self.head, head) > self.posted() {
            return self.refused.replace(head) == Some(head);
        }
        self.head = head;
        self.refused = None;
        true
    }

    fn distance(&self, from: u32, to: u32) -> u32 {
        (to + self.entries - from) % self.entries
    }

    /// Entries that the host has not consumed.
    fn posted(&self) -> u32 {
        self.distance(self.head, self.tail)
    }

    /// Whether [`CompletionQueue::reserve`] would succeed by the head looked at last.
    pub(super) fn has_room(&self) -> bool {
        self.posted() + self.reserved < self.entries - 1
    }

    /// Reserves a slot, unless the queue is full.
    pub(super) fn reserve(&mut self) -> Option<CqPermit> {
        if !self.has_room() {
            return None;
        }
        self.reserved += 1;
        Some(CqPermit(()))
    }

    /// Writes a completion. On error nothing was posted and the permit comes back.
    pub(super) fn post(
        &mut self,
        mem: &DmaMemory,
        permit: CqPermit,
        cqe: Cqe,
    ) -> Result<(), (CqPermit, DmaError)> {
        match self.write(mem, cqe) {
            Ok(()) => {
                self.reserved -= 1;
                self.tail += 1;
                if self.tail == self.entries {
                    self.tail = 0;
                    self.phase = !self.phase;
                }
                Ok(())
            }
            Err(error) => Err((permit, error)),
        }
    }

    fn write(&self, mem: &DmaMemory, cqe: Cqe) -> Result<(), DmaError> {
        let error = DmaError::NotMapped(self.base, CQE_BYTES);
        let at = self.base.checked_add(u64::from(self.tail) * CQE_BYTES);
        let at = at.ok_or(error)?;
        let upper = at.checked_add(8).ok_or(error)?;
        let words = cqe.to_quadwords(self.phase);
        mem.write_obj(at, words[0].to_le())?;
        // The quadword that holds the phase tag comes last, and everything before is visible to
        // whoever sees it: the data, and the lower half of this entry.
        mem.store(upper, words[1].to_le(), Ordering::Release)
    }

    /// Gives a slot back unused: its command was not taken, or died with its queue.
    pub(super) fn cancel(&mut self, permit: CqPermit) {
        let CqPermit(()) = permit;
        self.reserved -= 1;
    }

    /// Asks for a kick when the host moves the head, or stops asking.
    pub(super) fn notify_head(&self, on: bool) {
        self.doorbell.stalled.store(on, Ordering::Relaxed);
    }
}

impl Drop for CompletionQueue {
    fn drop(&mut self) {
        self.doorbell.close();
    }
}

#[cfg(test)]
mod tests {
    use iommu::{DmaSpace, GuestRam, SourceId, Upstream};
    use vm_memory::GuestAddress;

    use super::*;
    use crate::nvme::spec::command::Status;

    fn memory() -> DmaMemory {
        let space = DmaSpace::new(
            &Upstream::memory(GuestRam::from_ranges(&[(GuestAddress(0), 0x4000)]).unwrap()),
            SourceId(0),
        );
        space.set_bus_master(true);
        space.view()
    }

    fn cqe(cid: u16) -> Cqe {
        Cqe {
            result: 0,
            sq_head: 0,
            sq_id: 1,
            cid,
            status: Status::SUCCESS,
        }
    }

    #[test]
    fn permits_bound_what_is_posted_and_the_phase_flips() {
        let mem = memory();
        let doorbell = Arc::new(CqDoorbell::default());
        let mut cq = CompletionQueue::new(Iova(0x1000), 4, None, Arc::clone(&doorbell));
        let mut next = 0;
        for round in 0..5u16 {
            let permits: Vec<_> = std::iter::from_fn(|| cq.reserve()).collect();
            assert_eq!(permits.len(), 3, "one entry stays free");
            for permit in permits {
                let at = u64::from(next % 4);
                cq.post(&mem, permit, cqe(next)).unwrap();
                let words: [u64; 2] = mem.read_obj(Iova(0x1000 + at * 16)).unwrap();
                let (got, phase) = Cqe::from_quadwords(words);
                assert_eq!(
                    (got.cid, phase),
                    (next, (next / 4) % 2 == 0),
                    "round {round}"
                );
                next += 1;
            }
            assert!(cq.reserve().is_none());
            doorbell.head.store(u32::from(next % 4), Ordering::Release);
            assert!(cq.update_head());
        }
    }

    #[test]
    fn a_head_beyond_the_tail_is_refused_once() {
        let mem = memory();
        let doorbell = Arc::new(CqDoorbell::default());
        let mut cq = CompletionQueue::new(Iova(0x1000), 8, None, Arc::clone(&doorbell));
        let permit = cq.reserve().unwrap();
        cq.post(&mem, permit, cqe(1)).unwrap();
        doorbell.head.store(2, Ordering::Release);
        assert!(!cq.update_head());
        assert!(cq.update_head(), "reported once");
        assert_eq!(cq.posted(), 1);
        doorbell.head.store(1, Ordering::Release);
        assert!(cq.update_head());
        assert_eq!(cq.posted(), 0);
    }

    #[test]
    fn a_failed_post_keeps_the_permit() {
        let mem = memory();
        let mut cq = CompletionQueue::new(Iova(0x8000), 2, None, Arc::default());
        let permit = cq.reserve().unwrap();
        let (permit, error) = cq.post(&mem, permit, cqe(1)).unwrap_err();
        assert!(matches!(error, DmaError::NotMapped(..)));
        mem.space().set_bus_master(false);
        let (permit, error) = cq.post(&mem, permit, cqe(1)).unwrap_err();
        assert_eq!(error, DmaError::BusMasterOff);
        cq.cancel(permit);
        assert!(cq.has_room());
    }
}

//! I/O queues: one task runs a completion queue and the submission queues that post to it.
//!
//! A command's way: a slot and a completion permit are reserved, the entry is read, its PRPs are
//! pinned ([`super::command`]), the request is pushed to the namespace's queue, which starts a batch
//! with one submission; completions are reaped, posted, and answered with one interrupt a batch.
//!
//! With Bus Master Enable off nothing is taken and finished commands wait in `done`; both go on when
//! it comes back.

use std::collections::VecDeque;
use std::os::fd::RawFd;
use std::sync::Arc;
use std::sync::atomic::Ordering;

use iommu::{DmaMemory, Iova};
use pci::MsiVector;

use super::command::{Action, Wait};
use super::doorbell::BadRing;
use super::events::ErrorInfo;
use super::namespace;
use super::queue::{CompletionQueue, QueueId, SubmissionQueue};
use super::shared::{NO_BURST_LIMIT, Shared};
use super::slot::{Kind, Rest, Slots};
use super::spec::command::{Cqe, Status};
use crate::block::{BlockCompletion, BlockOp, BlockQueue, BlockRequest};
use crate::worker::{Polled, QueueTask};

/// Commands that one worker has in flight at most; more wait in their submission queue.
const MAX_IN_FLIGHT: u16 = 1024;

/// The task of one completion queue id. It exists from the first creation of a queue with this id
/// until the controller is dropped; without queues it idles.
pub(super) struct IoTask {
    mem: DmaMemory,
    core: Core,
}

/// All of the task but its view of memory, so that a section of that can stay open around calls.
pub(super) struct Core {
    pub(super) shared: Arc<Shared>,
    id: QueueId,
    cq: Option<CompletionQueue>,
    vector: Option<MsiVector>,
    sqs: Vec<SubmissionQueue>,
    /// Whose turn it is.
    turn: usize,
    pub(super) slots: Slots,
    /// By namespace, opened when first used.
    disks: Vec<Option<Box<dyn BlockQueue>>>,
    /// Finished commands, to be posted.
    done: VecDeque<u16>,
    /// Bytes of a memory page.
    pub(super) page: u64,
    /// A shutdown has been notified: no new commands.
    paused: bool,
}

impl IoTask {
    pub(super) fn new(shared: Arc<Shared>, id: QueueId) -> IoTask {
        IoTask {
            mem: shared.bus.dma.view(),
            core: Core {
                disks: shared.namespaces.iter().map(|_| None).collect(),
                shared,
                id,
                cq: None,
                vector: None,
                sqs: Vec::new(),
                turn: 0,
                slots: Slots::new(0),
                done: VecDeque::new(),
                page: 4096,
                paused: false,
            },
        }
    }

    /// Creates the completion queue; there is none.
    pub(super) fn create_cq(&mut self, base: Iova, entries: u32, vector: Option<u16>, page: u64) {
        let core = &mut self.core;
        let doorbell = Arc::clone(core.shared.doorbells.cq(core.id));
        core.cq = Some(CompletionQueue::new(base, entries, vector, doorbell));
        core.vector = vector.and_then(|vector| core.shared.msix.vector(vector));
        let depth = u16::try_from(entries - 1).unwrap_or(MAX_IN_FLIGHT);
        let depth = depth.min(MAX_IN_FLIGHT);
        core.slots = Slots::new(depth);
        core.done = VecDeque::with_capacity(usize::from(depth));
        core.page = page;
        core.paused = false;
    }

    /// Creates a submission queue; the id is free.
    pub(super) fn create_sq(&mut self, id: QueueId, base: Iova, entries: u32) {
        let core = &mut self.core;
        let doorbell = Arc::clone(core.shared.doorbells.sq(id));
        let sq = SubmissionQueue::new(id, base, entries, core.id, doorbell);
        core.sqs.push(sq);
    }

    /// Deletes a submission queue after its commands have ended. Their completions are posted; one
    /// that cannot be, because bus mastering is off, counts as implicitly completed (section 5.6).
    pub(super) fn delete_sq(&mut self, id: QueueId) {
        self.drain();
        let mut polled = Polled::default();
        if self.core.running(&self.mem) {
            self.core.post(&self.mem, &mut polled);
        }
        if polled.events[0] > 0 {
            self.interrupt(0);
        }
        self.core.discard(Some(id));
        self.core.sqs.retain(|sq| sq.id != id);
    }

    /// Deletes the completion queue, which no submission queue uses any more.
    pub(super) fn delete_cq(&mut self) {
        self.reset();
    }

    /// Everything dies: on return nothing is in flight and no guest memory is touched.
    pub(super) fn reset(&mut self) {
        self.core.sqs.clear();
        self.drain();
        self.core.discard(None);
        self.core.cq = None;
        self.core.vector = None;
        self.core.disks.iter_mut().for_each(|disk| *disk = None);
        self.core.slots = Slots::new(0);
        self.core.done = VecDeque::new();
    }

    /// Waits for what is in flight and takes no new commands.
    pub(super) fn pause(&mut self) {
        self.core.paused = true;
        self.drain();
    }

    /// Waits until the back ends have nothing in flight; steps that follow are started and waited
    /// for too. Never in a section.
    pub(super) fn drain(&mut self) {
        loop {
            self.core.reap();
            self.core.submit();
            let Some(disk) = self.core.busy_disks().next() else {
                return;
            };
            namespace::wait(disk.as_ref());
        }
    }
}

impl Core {
    fn busy_disks(&mut self) -> impl Iterator<Item = &mut Box<dyn BlockQueue>> {
        self.disks
            .iter_mut()
            .flatten()
            .filter(|disk| disk.in_flight() > 0)
    }

    /// Takes submission entries, round robin with the Arbitration Burst.
    fn fetch(&mut self, mem: &DmaMemory, budget: u32) -> u32 {
        let burst = match self.shared.burst.load(Ordering::Relaxed) {
            NO_BURST_LIMIT => u32::MAX,
            log2 => 1 << log2.min(NO_BURST_LIMIT),
        };
        let mut taken = 0;
        let mut idle = 0;
        while taken < budget && idle < self.sqs.len() {
            if self.turn >= self.sqs.len() {
                self.turn = 0;
            }
            let limit = budget.min(taken.saturating_add(burst));
            let before = taken;
            let mut stuck = false;
            while taken < limit && !stuck && self.sqs[self.turn].has_entries() {
                stuck = !self.take(mem, self.turn);
                taken += u32::from(!stuck);
            }
            // Also when it got stuck: the next free slot is for another queue.
            self.turn += 1;
            idle = if taken == before { idle + 1 } else { 0 };
            if stuck {
                break;
            }
        }
        taken
    }

    /// Takes the entry at the head of a submission queue; false if that is not possible now.
    fn take(&mut self, mem: &DmaMemory, queue: usize) -> bool {
        let Some(cq) = &mut self.cq else {
            return false;
        };
        let Some(index) = self.slots.take() else {
            return false;
        };
        let Some(permit) = cq.reserve() else {
            self.slots.give(index);
            return false;
        };
        let sq = &self.sqs[queue];
        let id = sq.id;
        let started = match sq.peek(mem) {
            Ok(sqe) => {
                if let Some(slot) = self.slots.get(index) {
                    slot.sq = Some(id);
                    slot.cid = sqe.cid();
                    slot.nsid = sqe.nsid();
                }
                self.start(mem, index, &sqe)
            }
            Err(error) => {
                self.shared.ring_error(id, error);
                Err(Wait)
            }
        };
        match started {
            Ok(action) => {
                if let Some(slot) = self.slots.get(index) {
                    slot.permit = Some(permit);
                }
                self.sqs[queue].advance();
                self.shared.counters(id).commands.add(1);
                self.act(index, action);
                true
            }
            Err(Wait) => {
                if let Some(cq) = &mut self.cq {
                    cq.cancel(permit);
                }
                self.slots.give(index);
                false
            }
        }
    }

    /// Pushes a request or finishes a command.
    fn act(&mut self, index: u16, action: Action) {
        match action {
            Action::Push(op) => self.push(index, op),
            Action::Finish(status) => self.finish(index, status),
        }
    }

    fn push(&mut self, index: u16, op: BlockOp) {
        let Some(slot) = self.slots.get(index) else {
            return;
        };
        let namespace = slot.namespace;
        let with_data = matches!(op, BlockOp::Read { .. } | BlockOp::Write { .. });
        let buffers = if with_data {
            std::mem::take(&mut slot.buffers)
        } else {
            iommu::PinnedBuffers::new()
        };
        match self.disk(namespace) {
            Ok(disk) => disk.push(BlockRequest {
                op,
                buffers,
                tag: u64::from(index),
            }),
            Err(error) => {
                self.shared
                    .complain(&format!("cannot open a queue to the storage: {error}"));
                self.finish(index, Status::INTERNAL_ERROR);
            }
        }
    }

    /// The queue to a namespace's back end.
    fn disk(&mut self, namespace: usize) -> std::io::Result<&mut Box<dyn BlockQueue>> {
        let missing = || std::io::Error::other("no such namespace");
        let slot = self.disks.get_mut(namespace).ok_or_else(missing)?;
        if slot.is_none() {
            let backend = &self.shared.namespaces[namespace].backend;
            *slot = Some(Arc::clone(backend).open_queue(self.slots.count())?);
        }
        slot.as_mut().ok_or_else(missing)
    }

    /// The end of a command: it waits to be posted, and its memory is let go of.
    fn finish(&mut self, index: u16, status: Status) {
        let Some(slot) = self.slots.get(index) else {
            return;
        };
        slot.buffers.release();
        let sq = slot.sq.unwrap_or(self.id);
        let status = if status.is_success() {
            let counters = self.shared.counters(sq);
            match slot.kind {
                Kind::Read => {
                    counters.reads.add(1);
                    counters.bytes_read.add(slot.bytes);
                }
                Kind::Write => {
                    counters.writes.add(1);
                    counters.bytes_written.add(slot.bytes);
                }
                Kind::WriteZeroes => counters.writes.add(1),
                Kind::Other => {}
            }
            status
        } else {
            self.shared.fail(ErrorInfo {
                sq: Some(sq),
                cid: slot.cid,
                status,
                nsid: slot.nsid,
                lba: slot.lba,
            })
        };
        slot.status = Some(status);
        self.done.push_back(index);
    }

    /// Takes what the back ends have finished. Touches no guest memory.
    fn reap(&mut self) -> u32 {
        let mut reaped = 0;
        for namespace in 0..self.disks.len() {
            while let Some(completion) = self.disks[namespace]
                .as_mut()
                .filter(|disk| disk.in_flight() > 0)
                .and_then(|disk| disk.reap())
            {
                self.complete(completion);
                reaped += 1;
            }
        }
        reaped
    }

    fn complete(&mut self, completion: BlockCompletion) {
        let Ok(index) = u16::try_from(completion.tag) else {
            return;
        };
        let Some(slot) = self.slots.get(index) else {
            return;
        };
        // A flush brings none, and the buffers of a read that follows it are in the slot.
        if !completion.buffers.is_empty() {
            slot.buffers = completion.buffers;
        }
        let action = match completion.result {
            Ok(()) => self.next(index),
            Err(error) => {
                let status = namespace::host_status(&error, slot.kind != Kind::Read);
                if status.is_media_error() {
                    self.shared.media_errors.fetch_add(1, Ordering::Relaxed);
                }
                self.shared
                    .complain(&format!("the storage of namespace {}: {error}", slot.nsid));
                Action::Finish(status)
            }
        };
        self.act(index, action);
    }

    /// The next request of a command whose last one has succeeded.
    pub(super) fn next(&mut self, index: u16) -> Action {
        let Some(slot) = self.slots.get(index) else {
            return Action::Finish(Status::INTERNAL_ERROR);
        };
        match slot.rest {
            Rest::Nothing => Action::Finish(Status::SUCCESS),
            Rest::ReadAt(offset) => {
                slot.rest = Rest::Nothing;
                Action::Push(BlockOp::Read { offset })
            }
            Rest::Ranges(at) => match slot.ranges.get(at) {
                Some(&(offset, len)) => {
                    slot.rest = Rest::Ranges(at + 1);
                    Action::Push(BlockOp::Discard { offset, len })
                }
                None => {
                    slot.rest = Rest::Nothing;
                    if self.shared.write_cache.load(Ordering::Relaxed) {
                        Action::Finish(Status::SUCCESS)
                    } else {
                        Action::Push(BlockOp::Flush)
                    }
                }
            },
            Rest::FlushFrom(at) => {
                slot.namespace = at;
                slot.rest = if at + 1 < self.shared.namespaces.len() {
                    Rest::FlushFrom(at + 1)
                } else {
                    Rest::Nothing
                };
                Action::Push(BlockOp::Flush)
            }
        }
    }

    /// Starts what was pushed.
    fn submit(&mut self) {
        self.busy_disks().for_each(|disk| disk.submit());
    }

    /// Posts what is done.
    fn post(&mut self, mem: &DmaMemory, polled: &mut Polled) {
        let Some(cq) = &mut self.cq else {
            return;
        };
        let mut posted = 0;
        while let Some(&index) = self.done.front() {
            let Some(slot) = self.slots.get(index) else {
                break;
            };
            let (Some(permit), Some(id)) = (slot.permit.take(), slot.sq) else {
                break;
            };
            let head = self.sqs.iter().find(|sq| sq.id == id);
            let cqe = Cqe {
                result: 0,
                sq_head: head.map_or(0, SubmissionQueue::head),
                sq_id: id.0,
                cid: slot.cid,
                status: slot.status.unwrap_or(Status::INTERNAL_ERROR),
            };
            if let Err((permit, error)) = cq.post(mem, permit, cqe) {
                slot.permit = Some(permit);
                self.shared.ring_error(self.id, error);
                break;
            }
            self.done.pop_front();
            self.slots.give(index);
            posted += 1;
        }
        if posted > 0 {
            let counters = self.shared.counters(self.id);
            counters.completions.add(u64::from(posted));
            polled.work += posted;
            if cq.vector.is_some() {
                polled.events[0] += posted;
            }
        }
    }

    /// Drops finished commands unposted: those of one submission queue, or all.
    fn discard(&mut self, only: Option<QueueId>) {
        for _ in 0..self.done.len() {
            let Some(index) = self.done.pop_front() else {
                break;
            };
            let Some(slot) = self.slots.get(index) else {
                continue;
            };
            if only.is_some() && slot.sq != only {
                self.done.push_back(index);
                continue;
            }
            if let (Some(cq), Some(permit)) = (&mut self.cq, slot.permit.take()) {
                cq.cancel(permit);
            }
            self.slots.give(index);
        }
    }

    /// Whether memory and rings may be used.
    fn running(&self, mem: &DmaMemory) -> bool {
        self.cq.is_some() && mem.space().bus_master() && !self.shared.fatal.load(Ordering::Relaxed)
    }

    fn update_head(&mut self) {
        if let Some(cq) = &mut self.cq
            && !cq.update_head()
        {
            self.shared.bad_ring(self.id, BadRing::Value);
        }
    }
}

impl QueueTask for IoTask {
    fn poll(&mut self, budget: u32) -> Polled {
        let (mem, core) = (&self.mem, &mut self.core);
        let mut polled = Polled::default();
        if core.cq.is_none() {
            return polled;
        }
        core.update_head();
        polled.work += core.reap();
        if core.running(mem) {
            let _section = mem.section();
            core.post(mem, &mut polled);
            if !core.paused {
                polled.work += core.fetch(mem, budget);
            }
        }
        // Outside the section: a system call may take its time.
        core.submit();
        if core.reap() > 0 {
            // Follow-up requests of what has just ended.
            core.submit();
        }
        if !core.done.is_empty() && core.running(mem) {
            let _section = mem.section();
            core.post(mem, &mut polled);
        }
        polled
    }

    fn arm(&mut self) {
        if let Some(cq) = &self.core.cq {
            cq.notify_head(!cq.has_room());
        }
    }

    fn has_work(&mut self) -> bool {
        let (mem, core) = (&self.mem, &mut self.core);
        if !core.running(mem) {
            return false;
        }
        core.update_head();
        let room = core.cq.as_ref().is_some_and(CompletionQueue::has_room);
        let entries = core.sqs.iter().any(SubmissionQueue::has_entries);
        !core.done.is_empty() || entries && room && core.slots.has_free() && !core.paused
    }

    fn disarm(&mut self) {
        if let Some(cq) = &self.core.cq {
            cq.notify_head(false);
        }
    }

    fn interrupt(&mut self, _source: usize) {
        // The queue may have died since; then its events have too.
        if let Some(vector) = &self.core.vector {
            self.core.shared.counters(self.core.id).interrupts.add(1);
            vector.signal();
        }
    }

    fn fds(&self, fds: &mut Vec<RawFd>) {
        let disks = self.core.disks.iter().flatten();
        fds.extend(
            disks
                .filter(|disk| disk.in_flight() > 0)
                .filter_map(|disk| disk.fd()),
        );
    }
}

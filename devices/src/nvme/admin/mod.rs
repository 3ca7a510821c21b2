//! The admin queue and everything that the host asks through registers: enable, reset, shutdown.
//!
//! One task per controller. It is the only one that makes and deletes I/O queues; it talks to their
//! workers with [`crate::worker::Worker::with`], never inside a DMA section.

mod features;
mod identify;
mod log;
mod queues;

use std::collections::VecDeque;
use std::os::fd::RawFd;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::Instant;

use iommu::{DmaMemory, Iova};
use pci::MsiVector;

use self::features::Features;
use self::queues::Created;
use super::command::{Refusal, check_form};
use super::doorbell::BadRing;
use super::events::ErrorInfo;
use super::prp;
use super::queue::{CompletionQueue, CqPermit, QueueId, SubmissionQueue};
use super::regs::{Request, Setup};
use super::shared::Shared;
use super::spec::command::{Cqe, Sqe, Status, admin, high, low};
use super::workers::IoWorkers;
use super::{Config, namespace};
use crate::worker::{Polled, QueueTask};

/// Asynchronous Event Requests outstanding at most (AERL is one less).
const MAX_EVENT_REQUESTS: usize = 4;
/// Abort commands at a time (ACL is one less). They end at once, so the limit is never met.
const MAX_ABORTS: u8 = 4;

/// The admin queue's task.
pub(super) struct AdminTask {
    shared: Arc<Shared>,
    workers: Arc<IoWorkers>,
    config: Config,
    mem: DmaMemory,
    vector: Option<MsiVector>,
    queues: Option<(SubmissionQueue, CompletionQueue)>,
    /// Bytes of a memory page.
    page: u64,
    /// I/O queues that exist.
    created: Created,
    features: Features,
    /// Asynchronous Event Requests without an event, by command identifier.
    requests: VecDeque<(CqPermit, u16)>,
    /// Completions that could not be posted yet.
    done: VecDeque<(CqPermit, Cqe)>,
    /// SMART critical warnings reported last.
    warnings: u8,
    started: Instant,
}

/// How a command that was taken goes on.
enum Outcome {
    /// It ended with this result.
    Done(u32),
    /// An Asynchronous Event Request: it waits for an event.
    Keep,
}

impl AdminTask {
    pub(super) fn new(shared: Arc<Shared>, workers: Arc<IoWorkers>, config: Config) -> AdminTask {
        AdminTask {
            mem: shared.bus.dma.view(),
            vector: shared.msix.vector(0),
            created: Created::new(config.max_queue_pairs),
            features: Features::new(&config),
            shared,
            workers,
            config,
            queues: None,
            page: 4096,
            requests: VecDeque::with_capacity(MAX_EVENT_REQUESTS),
            done: VecDeque::new(),
            warnings: 0,
            started: Instant::now(),
        }
    }

    /// Function-level reset: the state after power-on.
    pub(super) fn power_on(&mut self) {
        self.teardown();
        self.shared.control.store(false, Ordering::SeqCst);
        self.shared.regs().power_on();
    }

    /// Carries out what was asked through the registers.
    fn control(&mut self) {
        loop {
            let request = self.shared.regs().request();
            match request {
                Some(Request::Reset) => {
                    self.teardown();
                    self.shared.regs().was_reset();
                }
                Some(Request::Enable(setup)) => self.enable(setup),
                Some(Request::Shutdown) => self.shut_down(),
                None => return,
            }
        }
    }

    fn enable(&mut self, setup: Setup) {
        if let Some(fault) = setup.fault() {
            self.shared.set_fatal(fault);
            return;
        }
        self.page = setup.page();
        let doorbells = &self.shared.doorbells;
        let (id, vector) = (QueueId::ADMIN, Some(0));
        let (asq, acq) = (Iova(setup.asq), Iova(setup.acq));
        let cq = CompletionQueue::new(acq, setup.cq_entries, vector, doorbells.cq(id).clone());
        let sq = SubmissionQueue::new(id, asq, setup.sq_entries, id, doorbells.sq(id).clone());
        self.queues = Some((sq, cq));
        self.shared.ready.store(true, Ordering::SeqCst);
        self.shared.regs().set_ready();
        tracing::debug!("{}: enabled", self.shared.name);
    }

    /// All queues die; what is in flight ends first. Settings go back to their defaults.
    fn teardown(&mut self) {
        self.shared.ready.store(false, Ordering::SeqCst);
        for worker in self.workers.iter() {
            worker.with(|task| task.reset());
        }
        self.requests.clear();
        self.done.clear();
        self.queues = None;
        self.created = Created::new(self.config.max_queue_pairs);
        self.features = Features::new(&self.config);
        self.features.apply(&self.shared);
        self.warnings = 0;
        *self.shared.events() = super::events::Events::default();
        self.shared.fatal.store(false, Ordering::SeqCst);
        tracing::debug!("{}: reset", self.shared.name);
    }

    /// Shutdown (section 7.6.2), normal and abrupt alike: commands in flight end, no more are taken,
    /// and everything goes to stable storage.
    fn shut_down(&mut self) {
        for worker in self.workers.iter() {
            worker.with(|task| task.pause());
        }
        for namespace in &self.shared.namespaces {
            if let Err(error) = namespace.flush() {
                self.shared.complain(&format!(
                    "flush of namespace {} at shutdown: {error}",
                    namespace.nsid
                ));
            }
        }
        self.shared.regs().shutdown_complete();
        tracing::debug!("{}: shut down", self.shared.name);
    }

    fn execute(&mut self, sqe: &Sqe) -> Result<Outcome, Refusal> {
        check_form(sqe)?;
        let result = match sqe.opcode() {
            admin::DELETE_SQ => self.delete_sq(sqe)?,
            admin::CREATE_SQ => self.create_sq(sqe)?,
            admin::GET_LOG_PAGE => self.get_log_page(sqe)?,
            admin::DELETE_CQ => self.delete_cq(sqe)?,
            admin::CREATE_CQ => self.create_cq(sqe)?,
            admin::IDENTIFY => self.identify(sqe)?,
            admin::ABORT => self.abort(sqe),
            admin::SET_FEATURES => self.set_features(sqe)?,
            admin::GET_FEATURES => self.get_features(sqe)?,
            admin::ASYNC_EVENT_REQUEST => {
                if self.requests.len() >= MAX_EVENT_REQUESTS {
                    return Err(Status::AER_LIMIT_EXCEEDED.dnr().into());
                }
                return Ok(Outcome::Keep);
            }
            _ => return Err(Status::INVALID_OPCODE.dnr().into()),
        };
        Ok(Outcome::Done(result))
    }

    /// Abort (section 5.1). An Asynchronous Event Request can be aborted; a command that has reached
    /// the host's storage cannot, and bit 0 of the result says so.
    fn abort(&mut self, sqe: &Sqe) -> u32 {
        const NOT_ABORTED: u32 = 1;
        let (sqid, cid) = (low(sqe.cdw10()), high(sqe.cdw10()));
        let found = self.requests.iter().position(|request| request.1 == cid);
        let Some(index) = found.filter(|_| sqid == QueueId::ADMIN.0) else {
            return NOT_ABORTED;
        };
        if let Some((permit, cid)) = self.requests.remove(index) {
            self.complete(permit, cid, 0, Status::ABORT_REQUESTED);
        }
        0
    }

    /// Sends `data` to the host.
    fn send(&self, sqe: &Sqe, data: &[u8]) -> Result<(), Refusal> {
        let len = u64::try_from(data.len()).unwrap_or(u64::MAX);
        let mut left = data;
        let _section = self.mem.section();
        prp::walk(
            &self.mem,
            self.page,
            sqe.prp1(),
            sqe.prp2(),
            len,
            |at, len| {
                let len = usize::try_from(len).map_or(left.len(), |len| len.min(left.len()));
                let (part, rest) = left.split_at(len);
                left = rest;
                self.mem.write(at, part)
            },
        )?;
        Ok(())
    }

    /// A command's end; it is posted with the batch.
    fn complete(&mut self, permit: CqPermit, cid: u16, result: u32, status: Status) {
        let sq_head = self.queues.as_ref().map_or(0, |(sq, _)| sq.head());
        let cqe = Cqe {
            result,
            sq_head,
            sq_id: QueueId::ADMIN.0,
            cid,
            status,
        };
        self.done.push_back((permit, cqe));
    }

    /// Takes and executes one command; false if there is none, or it cannot be taken now.
    fn take(&mut self) -> bool {
        let Some((sq, cq)) = &mut self.queues else {
            return false;
        };
        if !sq.has_entries() {
            return false;
        }
        let Some(permit) = cq.reserve() else {
            return false;
        };
        let sqe = match sq.peek(&self.mem) {
            Ok(sqe) => sqe,
            Err(error) => {
                cq.cancel(permit);
                self.shared.ring_error(QueueId::ADMIN, error);
                return false;
            }
        };
        let executed = self.execute(&sqe);
        let Some((sq, cq)) = &mut self.queues else {
            return false;
        };
        if matches!(executed, Err(Refusal::Wait)) {
            cq.cancel(permit);
            return false;
        }
        sq.advance();
        self.shared.counters(QueueId::ADMIN).commands.add(1);
        let cid = sqe.cid();
        match executed {
            Ok(Outcome::Done(result)) => self.complete(permit, cid, result, Status::SUCCESS),
            Ok(Outcome::Keep) => self.requests.push_back((permit, cid)),
            Err(Refusal::Status(status)) => {
                let status = self.shared.fail(ErrorInfo {
                    sq: Some(QueueId::ADMIN),
                    cid,
                    status,
                    nsid: sqe.nsid(),
                    lba: 0,
                });
                self.complete(permit, cid, 0, status);
            }
            // Handled above.
            Err(Refusal::Wait) => {}
        }
        true
    }

    /// Reports events to the requests that wait for them.
    fn report_events(&mut self) {
        while !self.requests.is_empty() {
            let Some(event) = self.shared.events().take() else {
                return;
            };
            if let Some((permit, cid)) = self.requests.pop_front() {
                self.complete(permit, cid, event.result(), Status::SUCCESS);
            }
        }
    }

    fn post(&mut self) -> u32 {
        let mut posted = 0;
        let Some((_, cq)) = &mut self.queues else {
            return 0;
        };
        while let Some((permit, cqe)) = self.done.pop_front() {
            if let Err((permit, error)) = cq.post(&self.mem, permit, cqe) {
                self.done.push_front((permit, cqe));
                self.shared.ring_error(QueueId::ADMIN, error);
                break;
            }
            posted += 1;
        }
        let counters = self.shared.counters(QueueId::ADMIN);
        counters.completions.add(u64::from(posted));
        posted
    }

    fn running(&self) -> bool {
        self.queues.is_some()
            && self.mem.space().bus_master()
            && !self.shared.fatal.load(Ordering::Relaxed)
    }

    fn update_head(&mut self) {
        if let Some((_, cq)) = &mut self.queues
            && !cq.update_head()
        {
            self.shared.bad_ring(QueueId::ADMIN, BadRing::Value);
        }
    }

    /// Puts every namespace on stable storage.
    fn flush_all(&self) -> Result<(), Status> {
        for namespace in &self.shared.namespaces {
            let flushed = namespace.flush();
            flushed.map_err(|error| namespace::host_status(&error, true))?;
        }
        Ok(())
    }
}

impl QueueTask for AdminTask {
    fn poll(&mut self, budget: u32) -> Polled {
        let mut polled = Polled::default();
        if self.shared.control.swap(false, Ordering::SeqCst) {
            self.control();
            polled.work += 1;
        }
        self.update_head();
        if !self.running() {
            return polled;
        }
        let mut taken = 0;
        while taken < budget && self.take() {
            taken += 1;
        }
        self.report_events();
        let posted = self.post();
        polled.work += taken + posted;
        polled.events[0] = posted;
        polled
    }

    fn arm(&mut self) {
        if let Some((_, cq)) = &self.queues {
            cq.notify_head(!cq.has_room());
        }
    }

    fn has_work(&mut self) -> bool {
        if self.shared.control.load(Ordering::SeqCst) {
            return true;
        }
        self.update_head();
        let events = !self.requests.is_empty() && self.shared.events().ready();
        let entries = self
            .queues
            .as_ref()
            .is_some_and(|(sq, cq)| sq.has_entries() && cq.has_room());
        self.running() && (events || entries || !self.done.is_empty())
    }

    fn disarm(&mut self) {
        if let Some((_, cq)) = &self.queues {
            cq.notify_head(false);
        }
    }

    fn interrupt(&mut self, _source: usize) {
        if self.queues.is_none() {
            return;
        }
        if let Some(vector) = &self.vector {
            self.shared.counters(QueueId::ADMIN).interrupts.add(1);
            vector.signal();
        }
    }

    fn fds(&self, _fds: &mut Vec<RawFd>) {}
}

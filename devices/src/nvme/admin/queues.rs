//! Create and delete I/O queues (NVM Express Base 1.4, sections 5.3 to 5.6).

use std::io;

use iommu::Iova;

use super::AdminTask;
use crate::nvme::command::Refusal;
use crate::nvme::queue::QueueId;
use crate::nvme::spec::command::{Sqe, Status, high, low};

/// CDW11: Physically Contiguous.
const CONTIGUOUS: u32 = 1;
/// Create I/O Completion Queue, CDW11: Interrupts Enabled.
const INTERRUPTS: u32 = 1 << 1;

/// A completion queue that exists.
#[derive(Clone, Copy)]
pub(super) struct CreatedCq {
    pub(super) vector: Option<u16>,
    /// Submission queues that post to it.
    users: u16,
}

/// I/O queues that exist, by id; index 0 is not used.
pub(super) struct Created {
    pub(super) cqs: Vec<Option<CreatedCq>>,
    /// The completion queue of each submission queue.
    sqs: Vec<Option<QueueId>>,
}

impl Created {
    pub(super) fn new(pairs: u16) -> Created {
        let count = usize::from(pairs) + 1;
        Created {
            cqs: vec![None; count],
            sqs: vec![None; count],
        }
    }

    /// Whether there is any I/O queue.
    pub(super) fn any(&self) -> bool {
        self.cqs.iter().any(Option::is_some)
    }

    fn cq(&mut self, id: QueueId) -> Option<&mut CreatedCq> {
        self.cqs.get_mut(id.index()).and_then(Option::as_mut)
    }

    fn sq(&self, id: QueueId) -> Option<QueueId> {
        self.sqs.get(id.index()).copied().flatten()
    }
}

impl AdminTask {
    /// What both kinds of queue have in common: id and size (0's based in the command), checked.
    fn new_queue(
        &self,
        sqe: &Sqe,
        allocated: u16,
        exists: bool,
        entry_size: bool,
    ) -> Result<(QueueId, u32, Iova), Status> {
        let (id, size) = (low(sqe.cdw10()), high(sqe.cdw10()));
        if id == 0 || id > allocated || exists {
            return Err(Status::INVALID_QUEUE_ID.dnr());
        }
        if size == 0 || size >= self.config.queue_entries || !entry_size {
            return Err(Status::INVALID_QUEUE_SIZE.dnr());
        }
        if sqe.cdw11() & CONTIGUOUS == 0 {
            return Err(Status::INVALID_FIELD.dnr());
        }
        if !sqe.prp1().is_multiple_of(self.page) {
            return Err(Status::PRP_OFFSET_INVALID.dnr());
        }
        Ok((QueueId(id), u32::from(size) + 1, Iova(sqe.prp1())))
    }

    pub(super) fn create_cq(&mut self, sqe: &Sqe) -> Result<u32, Refusal> {
        let id = QueueId(low(sqe.cdw10()));
        let exists = self.created.cq(id).is_some();
        let (_, entry_size) = self.shared.regs().entry_sizes();
        let (id, entries, base) =
            self.new_queue(sqe, self.features.cq_count, exists, entry_size)?;
        let vector = high(sqe.cdw11());
        if vector >= self.shared.msix.vectors() {
            return Err(Status::INVALID_INTERRUPT_VECTOR.dnr().into());
        }
        let vector = (sqe.cdw11() & INTERRUPTS != 0).then_some(vector);
        let coalesce = self.features.coalesce(vector);
        let page = self.page;
        let worker = self.workers.get_or_spawn(&self.shared, id);
        let worker = worker.map_err(|error| self.no_worker(&error))?;
        worker.set_coalesce(0, coalesce);
        worker.with(move |task| task.create_cq(base, entries, vector, page));
        self.created.cqs[id.index()] = Some(CreatedCq { vector, users: 0 });
        Ok(0)
    }

    fn no_worker(&self, error: &io::Error) -> Status {
        self.shared
            .complain(&format!("cannot start a queue worker: {error}"));
        Status::INTERNAL_ERROR
    }

    pub(super) fn create_sq(&mut self, sqe: &Sqe) -> Result<u32, Refusal> {
        let id = QueueId(low(sqe.cdw10()));
        let exists = self.created.sq(id).is_some();
        let (entry_size, _) = self.shared.regs().entry_sizes();
        let cq = QueueId(high(sqe.cdw11()));
        // The admin completion queue takes no I/O submission queue.
        if cq == QueueId::ADMIN {
            return Err(Status::INVALID_QUEUE_ID.dnr().into());
        }
        if self.created.cq(cq).is_none() {
            return Err(Status::COMPLETION_QUEUE_INVALID.dnr().into());
        }
        let (id, entries, base) =
            self.new_queue(sqe, self.features.sq_count, exists, entry_size)?;
        if let Some(worker) = self.workers.get(cq) {
            worker.with(move |task| task.create_sq(id, base, entries));
        }
        self.created.sqs[id.index()] = Some(cq);
        if let Some(cq) = self.created.cq(cq) {
            cq.users += 1;
        }
        Ok(0)
    }

    pub(super) fn delete_sq(&mut self, sqe: &Sqe) -> Result<u32, Refusal> {
        let id = QueueId(low(sqe.cdw10()));
        let Some(cq) = self.created.sq(id) else {
            return Err(Status::INVALID_QUEUE_ID.dnr().into());
        };
        if let Some(worker) = self.workers.get(cq) {
            worker.with(move |task| task.delete_sq(id));
        }
        self.created.sqs[id.index()] = None;
        if let Some(cq) = self.created.cq(cq) {
            cq.users -= 1;
        }
        Ok(0)
    }

    pub(super) fn delete_cq(&mut self, sqe: &Sqe) -> Result<u32, Refusal> {
        let id = QueueId(low(sqe.cdw10()));
        match self.created.cq(id) {
            None => return Err(Status::INVALID_QUEUE_ID.dnr().into()),
            Some(cq) if cq.users > 0 => return Err(Status::INVALID_QUEUE_DELETION.dnr().into()),
            Some(_) => {}
        }
        if let Some(worker) = self.workers.get(id) {
            worker.with(|task| task.delete_cq());
        }
        self.created.cqs[id.index()] = None;
        Ok(0)
    }
}

//! The workers of a controller's I/O queues.

use std::io;
use std::sync::{Arc, Mutex, OnceLock, PoisonError};

use super::io::IoTask;
use super::queue::QueueId;
use super::shared::Shared;
use crate::worker::{Kick, PollPolicy, Worker, WorkerOptions};

/// One worker for each completion queue id that was ever used. A worker outlives its queue and
/// idles until the next one with the same id, so that doorbells find it without a lock.
pub(super) struct IoWorkers {
    workers: Box<[OnceLock<Worker<IoTask>>]>,
    policy: Mutex<PollPolicy>,
}

impl IoWorkers {
    pub(super) fn new(pairs: u16, policy: PollPolicy) -> IoWorkers {
        IoWorkers {
            workers: (0..pairs).map(|_| OnceLock::new()).collect(),
            policy: Mutex::new(policy),
        }
    }

    fn slot(&self, id: QueueId) -> Option<&OnceLock<Worker<IoTask>>> {
        self.workers.get(id.index().checked_sub(1)?)
    }

    /// The worker of a completion queue, if it was ever created.
    pub(super) fn get(&self, id: QueueId) -> Option<&Worker<IoTask>> {
        self.slot(id)?.get()
    }

    /// The worker of a completion queue. Only the admin worker calls this.
    pub(super) fn get_or_spawn(
        &self,
        shared: &Arc<Shared>,
        id: QueueId,
    ) -> io::Result<&Worker<IoTask>> {
        let missing = || io::Error::other("no such queue");
        let slot = self.slot(id).ok_or_else(missing)?;
        if slot.get().is_none() {
            let kick = Kick::new()?;
            let options = WorkerOptions {
                policy: self.policy(),
                ..WorkerOptions::default()
            };
            let name = format!("{}q{}", shared.name, id.0);
            let task = IoTask::new(Arc::clone(shared), id);
            let worker = Worker::spawn(&name, &kick, task, options)?;
            shared.doorbells.set_kick(id, kick);
            // Nobody else sets it.
            let _ = slot.set(worker);
        }
        slot.get().ok_or_else(missing)
    }

    /// Those that exist.
    pub(super) fn iter(&self) -> impl Iterator<Item = &Worker<IoTask>> {
        self.workers.iter().filter_map(OnceLock::get)
    }

    /// When workers poll instead of sleeping.
    pub(super) fn policy(&self) -> PollPolicy {
        *self.policy.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Changes it for all, and for those to come.
    pub(super) fn set_policy(&self, policy: PollPolicy) {
        *self.policy.lock().unwrap_or_else(PoisonError::into_inner) = policy;
        self.iter().for_each(|worker| worker.set_policy(policy));
    }
}

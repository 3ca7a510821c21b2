//! Doorbells (NVM Express Base 1.4, sections 3.1.24 and 3.1.25): vCPU threads store, workers load.
//!
//! A store takes no lock: it checks the value against the queue's size, puts it into an atomic and
//! kicks the worker, which costs no system call while the worker is awake.

use std::sync::atomic::{AtomicBool, AtomicU16, AtomicU32, AtomicU64, Ordering, fence};
use std::sync::{Arc, OnceLock};

use super::queue::QueueId;
use crate::worker::Kick;

/// Tail of a submission queue.
#[derive(Default)]
#[repr(align(64))]
pub(super) struct SqDoorbell {
    /// Below `entries` while the queue exists.
    pub(super) tail: AtomicU32,
    /// 0: no such queue.
    entries: AtomicU32,
    /// The completion queue, whose worker is to be kicked.
    cq: AtomicU16,
    /// Stores accepted, over the controller's life.
    pub(super) rings: AtomicU64,
}

impl SqDoorbell {
    pub(super) fn open(&self, entries: u32, cq: QueueId) {
        self.tail.store(0, Ordering::Relaxed);
        self.cq.store(cq.0, Ordering::Relaxed);
        self.entries.store(entries, Ordering::Release);
    }

    pub(super) fn close(&self) {
        self.entries.store(0, Ordering::Release);
    }
}

/// Head of a completion queue.
#[derive(Default)]
#[repr(align(64))]
pub(super) struct CqDoorbell {
    /// Below `entries` while the queue exists.
    pub(super) head: AtomicU32,
    /// 0: no such queue.
    entries: AtomicU32,
    /// The worker waits for room: kick it.
    pub(super) stalled: AtomicBool,
}

impl CqDoorbell {
    pub(super) fn open(&self, entries: u32) {
        self.head.store(0, Ordering::Relaxed);
        self.stalled.store(false, Ordering::Relaxed);
        self.entries.store(entries, Ordering::Release);
    }

    pub(super) fn close(&self) {
        self.entries.store(0, Ordering::Release);
    }
}

/// What was wrong with a store.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum BadRing {
    /// The queue does not exist.
    Register,
    /// The value is not below the queue's size.
    Value,
}

/// All doorbells of a controller, and the kicks of the workers behind them.
pub(super) struct Doorbells {
    sqs: Box<[Arc<SqDoorbell>]>,
    cqs: Box<[Arc<CqDoorbell>]>,
    /// By completion queue; filled when the worker is spawned.
    kicks: Box<[OnceLock<Kick>]>,
}

impl Doorbells {
    /// Doorbells of `queues` queue pairs, the admin queue counted.
    pub(super) fn new(queues: usize) -> Doorbells {
        Doorbells {
            sqs: (0..queues).map(|_| Arc::default()).collect(),
            cqs: (0..queues).map(|_| Arc::default()).collect(),
            kicks: (0..queues).map(|_| OnceLock::new()).collect(),
        }
    }

    /// The tail doorbell of queue `id`, which is below the number of queues.
    pub(super) fn sq(&self, id: QueueId) -> &Arc<SqDoorbell> {
        &self.sqs[id.index()]
    }

    /// The head doorbell of queue `id`, which is below the number of queues.
    pub(super) fn cq(&self, id: QueueId) -> &Arc<CqDoorbell> {
        &self.cqs[id.index()]
    }

    /// From now on, stores that concern completion queue `id` kick `kick`.
    pub(super) fn set_kick(&self, id: QueueId, kick: Kick) {
        if let Some(slot) = self.kicks.get(id.index()) {
            // Set once, before the first queue with this id exists.
            let _ = slot.set(kick);
        }
    }

    /// Makes the worker of completion queue `id` poll.
    pub(super) fn kick(&self, id: QueueId) {
        if let Some(kick) = self.kicks.get(id.index()).and_then(OnceLock::get) {
            kick.kick();
        }
    }

    /// Makes every worker poll.
    pub(super) fn kick_all(&self) {
        self.kicks
            .iter()
            .filter_map(OnceLock::get)
            .for_each(Kick::kick);
    }

    /// A store of `value` to doorbell register number `index`, counted in dwords.
    pub(super) fn ring(&self, index: u64, value: u32) -> Result<(), (QueueId, BadRing)> {
        let id = u16::try_from(index / 2).unwrap_or(u16::MAX);
        let id = QueueId(id);
        // Upper half of the register is reserved.
        let value = value & 0xffff;
        let check = |entries: u32| match entries {
            0 => Err((id, BadRing::Register)),
            entries if value >= entries => Err((id, BadRing::Value)),
            _ => Ok(()),
        };
        if index.is_multiple_of(2) {
            let Some(sq) = self.sqs.get(id.index()) else {
                return Err((id, BadRing::Register));
            };
            check(sq.entries.load(Ordering::Acquire))?;
            sq.tail.store(value, Ordering::Release);
            sq.rings.fetch_add(1, Ordering::Relaxed);
            self.kick(QueueId(sq.cq.load(Ordering::Relaxed)));
        } else {
            let Some(cq) = self.cqs.get(id.index()) else {
                return Err((id, BadRing::Register));
            };
            check(cq.entries.load(Ordering::Acquire))?;
            cq.head.store(value, Ordering::Release);
            // Pairs with the barrier between a worker's `arm`, which sets `stalled`, and its
            // `has_work`, which loads the head: one of the two sees the other's store.
            fence(Ordering::SeqCst);
            if cq.stalled.load(Ordering::Relaxed) {
                self.kick(id);
            }
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn stores_are_checked_against_the_queue() {
        let bells = Doorbells::new(3);
        let kick = Kick::new().unwrap();
        bells.set_kick(QueueId(2), kick.clone());
        assert_eq!(bells.ring(2, 1), Err((QueueId(1), BadRing::Register)));
        bells.sq(QueueId(1)).open(8, QueueId(2));
        assert_eq!(bells.ring(2, 8), Err((QueueId(1), BadRing::Value)));
        assert_eq!(bells.ring(2, 0xabcd_0007), Ok(()));
        assert_eq!(bells.sq(QueueId(1)).tail.load(Ordering::Relaxed), 7);
        assert_eq!(kick.counts().0, 1);
        assert_eq!(bells.ring(6, 0), Err((QueueId(3), BadRing::Register)));
        assert_eq!(bells.ring(u64::MAX, 0).unwrap_err().1, BadRing::Register);
        bells.sq(QueueId(1)).close();
        assert_eq!(bells.ring(2, 1), Err((QueueId(1), BadRing::Register)));
    }

    #[test]
    fn head_stores_kick_only_a_stalled_worker() {
        let bells = Doorbells::new(2);
        let kick = Kick::new().unwrap();
        bells.set_kick(QueueId(1), kick.clone());
        bells.cq(QueueId(1)).open(4);
        bells.ring(3, 2).unwrap();
        assert_eq!(kick.counts().0, 0);
        bells.cq(QueueId(1)).stalled.store(true, Ordering::Relaxed);
        bells.ring(3, 3).unwrap();
        assert_eq!(kick.counts().0, 1);
    }
}

//! What the workers, the vCPU threads and the control socket share of one controller.

use std::sync::atomic::{AtomicBool, AtomicU8, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use iommu::{BusMaster, DmaError};
use pci::Msix;

use super::doorbell::{BadRing, Doorbells};
use super::events::{ErrorInfo, ErrorLog, Events};
use super::namespace::Namespace;
use super::queue::QueueId;
use super::regs::Regs;
use super::spec::NSID_BROADCAST;
use super::spec::command::Status;
use super::spec::command::event::{self, Event};
use super::stats::{NvmeStats, QueueCounters};

/// Default of the Arbitration Burst (Identify Controller RAB): 2 ^ 5 commands a turn.
pub(super) const ARBITRATION_BURST: u8 = 5;
/// The Arbitration Burst that means no limit.
pub(super) const NO_BURST_LIMIT: u8 = 7;

/// Shared state of one controller. Atomics on the data path; the mutexes guard registers, errors
/// and events.
pub(super) struct Shared {
    /// In log lines.
    pub(super) name: String,
    pub(super) bus: BusMaster,
    pub(super) msix: Arc<Msix>,
    /// By id, ascending.
    pub(super) namespaces: Vec<Namespace>,
    pub(super) doorbells: Doorbells,
    pub(super) counters: Box<[QueueCounters]>,
    regs: Mutex<Regs>,
    errors: Mutex<ErrorLog>,
    events: Mutex<Events>,
    /// The admin worker must look at the registers' requests.
    pub(super) control: AtomicBool,
    /// CSTS.RDY is set.
    pub(super) ready: AtomicBool,
    /// CSTS.CFS is set: no more DMA until the next reset.
    pub(super) fatal: AtomicBool,
    /// Volatile Write Cache feature.
    pub(super) write_cache: AtomicBool,
    /// Arbitration Burst feature, log2.
    pub(super) burst: AtomicU8,
    pub(super) media_errors: AtomicU64,
    /// Guest-triggered lines logged.
    logged: AtomicU64,
    /// Longest transfer of a command, bytes.
    pub(super) max_transfer: u64,
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    // A panic in another thread leaves plain data behind.
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

impl Shared {
    /// `queues` counts the admin queue.
    pub(super) fn new(
        bus: BusMaster,
        msix: Arc<Msix>,
        name: String,
        namespaces: Vec<Namespace>,
        config: &super::Config,
    ) -> Shared {
        let queues = usize::from(config.max_queue_pairs) + 1;
        Shared {
            name,
            bus,
            msix,
            namespaces,
            doorbells: Doorbells::new(queues),
            counters: (0..queues).map(|_| QueueCounters::default()).collect(),
            regs: Mutex::new(Regs::new(config.queue_entries)),
            errors: Mutex::default(),
            events: Mutex::default(),
            control: AtomicBool::new(false),
            ready: AtomicBool::new(false),
            fatal: AtomicBool::new(false),
            write_cache: AtomicBool::new(config.volatile_write_cache),
            burst: AtomicU8::new(ARBITRATION_BURST),
            media_errors: AtomicU64::new(0),
            logged: AtomicU64::new(0),
            max_transfer: 4096 << config.mdts,
        }
    }

    pub(super) fn regs(&self) -> MutexGuard<'_, Regs> {
        lock(&self.regs)
    }

    pub(super) fn errors(&self) -> MutexGuard<'_, ErrorLog> {
        lock(&self.errors)
    }

    pub(super) fn events(&self) -> MutexGuard<'_, Events> {
        lock(&self.events)
    }

    /// The counters of queue `id`, which is below the number of queues.
    pub(super) fn counters(&self, id: QueueId) -> &QueueCounters {
        &self.counters[id.index()]
    }

    /// The index of namespace `nsid`.
    pub(super) fn namespace(&self, nsid: u32) -> Option<usize> {
        let by_id = |namespace: &Namespace| namespace.nsid;
        self.namespaces.binary_search_by_key(&nsid, by_id).ok()
    }

    /// The highest namespace id (Identify Controller NN).
    pub(super) fn highest_nsid(&self) -> u32 {
        self.namespaces.last().map_or(0, |last| last.nsid)
    }

    /// The status of a command that needs an attached namespace (section 6.1.2 to 6.1.5): an id up
    /// to NN that is not in use is inactive, any other is invalid.
    pub(super) fn active(&self, nsid: u32) -> Result<usize, Status> {
        self.namespace(nsid).ok_or_else(|| {
            if nsid == 0 || nsid == NSID_BROADCAST || nsid > self.highest_nsid() {
                Status::INVALID_NAMESPACE.dnr()
            } else {
                Status::INVALID_FIELD.dnr()
            }
        })
    }

    /// Lets through the 1st, 2nd, 4th, 8th... guest-triggered line: a guest cannot flood the log.
    fn may_log(&self) -> bool {
        (self.logged.fetch_add(1, Ordering::Relaxed) + 1).is_power_of_two()
    }

    /// Logs something that the guest did wrong, rate limited.
    pub(super) fn complain(&self, what: &str) {
        if self.may_log() {
            tracing::warn!("{}: {what}", self.name);
        }
    }

    /// Controller Fatal Status: nothing is processed until the next reset (section 9.5).
    pub(super) fn set_fatal(&self, why: &str) {
        if !self.fatal.swap(true, Ordering::SeqCst) {
            self.regs().set_fatal();
            self.complain(&format!("fatal: {why}"));
        }
    }

    /// A ring of queue `id` could not be reached. With bus mastering off it is looked at again
    /// later; a ring outside of memory is fatal.
    pub(super) fn ring_error(&self, id: QueueId, error: DmaError) {
        if error != DmaError::BusMasterOff {
            self.set_fatal(&format!("a ring of queue {}: {error}", id.0));
        }
    }

    /// Reports an asynchronous event.
    pub(super) fn event(&self, event: Event) {
        if self.events().add(event) {
            self.doorbells.kick(QueueId::ADMIN);
        }
    }

    /// A doorbell store was refused. Without a ready controller there is nobody to tell.
    pub(super) fn bad_ring(&self, id: QueueId, why: BadRing) {
        if !self.ready.load(Ordering::Relaxed) {
            return;
        }
        let event = match why {
            BadRing::Register => event::INVALID_DOORBELL_REGISTER,
            BadRing::Value => event::INVALID_DOORBELL_VALUE,
        };
        self.errors().add(ErrorInfo {
            sq: Some(id),
            cid: 0xffff,
            status: Status::INVALID_FIELD,
            nsid: 0,
            lba: 0,
        });
        self.event(event);
        if self.may_log() {
            tracing::warn!(
                "{}: bad doorbell store for queue {}: {why:?}",
                self.name,
                id.0
            );
        }
    }

    /// A command failed: adds it to the error log and returns its status with More set.
    pub(super) fn fail(&self, info: ErrorInfo) -> Status {
        self.errors().add(info);
        self.counters(info.sq.unwrap_or(QueueId::ADMIN))
            .errors
            .add(1);
        info.status.more()
    }

    /// Every counter, for the control socket.
    pub(super) fn stats(&self) -> NvmeStats {
        let mut queues = Vec::new();
        for (id, counters) in (0..).zip(&self.counters) {
            let doorbells = self.doorbells.sq(QueueId(id)).rings.load(Ordering::Relaxed);
            let stats = counters.snapshot(id, doorbells);
            if id == 0 || stats.commands > 0 || doorbells > 0 {
                queues.push(stats);
            }
        }
        NvmeStats {
            queues,
            media_errors: self.media_errors.load(Ordering::Relaxed),
            error_entries: self.errors().count(),
        }
    }
}

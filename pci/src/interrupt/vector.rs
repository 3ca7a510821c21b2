//! Interrupt vectors, whether their messages come from an MSI capability or an MSI-X table.

use std::sync::atomic::{AtomicU32, Ordering};
use std::sync::{Arc, OnceLock};

use iommu::{Bdf, BusMaster, MsiLine, MsiMessage};

use super::gate::Gate;
use crate::log::LogLimit;

/// On a cache line of its own: each belongs to another queue's worker.
#[repr(align(64))]
struct Vector {
    gate: Gate,
    /// Set before the gate is unblocked for the first time.
    line: OnceLock<Arc<dyn MsiLine>>,
}

impl Vector {
    fn fire(&self) {
        if let Some(line) = self.line.get() {
            line.fire();
        }
    }
}

/// A function's vectors of one kind.
///
/// Signalling goes through each vector's gate and takes no lock. All else is called under the owner's
/// mutex, one thread at a time.
///
/// A line of the [`MsiSink`](iommu::MsiSink) is opened when a vector may fire for the first time,
/// so that vectors which the guest never uses cost the host nothing, and is kept from then on. It is
/// retargeted only when the vector may fire with a message other than before: a guest that masks,
/// rewrites and unmasks an entry costs one change of route.
///
/// When the host refuses a line or a route, the vector stays blocked and pending, and the host is
/// asked again at the next [`Bank::settle`].
pub(super) struct Bank {
    /// For messages: `MSI` or `MSI-X`.
    kind: &'static str,
    master: BusMaster,
    vectors: Box<[Vector]>,
    /// A vector's number is cut to these bits: a guest may grant fewer MSI vectors than there are.
    granted: AtomicU32,
    refused: LogLimit,
}

impl Bank {
    pub(super) fn new(kind: &'static str, vectors: u16, master: &BusMaster) -> Arc<Bank> {
        let vector = |_| Vector {
            gate: Gate::new(),
            line: OnceLock::new(),
        };
        Arc::new(Bank {
            kind,
            master: master.clone(),
            vectors: (0..vectors).map(vector).collect(),
            granted: AtomicU32::new(u32::MAX),
            refused: LogLimit::default(),
        })
    }

    /// Number of vectors.
    pub(super) fn len(&self) -> u16 {
        u16::try_from(self.vectors.len()).unwrap_or(u16::MAX)
    }

    /// The handle of vector `index`, or `None` if there is no such vector.
    pub(super) fn vector(self: &Arc<Self>, index: u16) -> Option<MsiVector> {
        (index < self.len()).then(|| MsiVector {
            bank: Arc::clone(self),
            index,
        })
    }

    /// From now on only the lowest `count` vectors, a power of two, are signalled: the others'
    /// signals go to the vector with the same low bits.
    pub(super) fn grant(&self, count: u32) {
        self.granted
            .store(count.saturating_sub(1), Ordering::Relaxed);
    }

    /// Whether vector `index` has been signalled and not fired. False if there is no such vector.
    pub(super) fn pending(&self, index: usize) -> bool {
        self.vectors.get(index).is_some_and(|v| v.gate.pending())
    }

    /// Nothing is pending any more.
    pub(super) fn forget(&self) {
        for vector in &self.vectors {
            vector.gate.forget();
        }
    }

    /// Lets vector `index` fire with the message `wanted`, or not at all. `target` is what its line
    /// was last told; it belongs to the caller and goes with the vector.
    pub(super) fn settle(
        &self,
        index: usize,
        target: &mut Option<MsiMessage>,
        wanted: Option<MsiMessage>,
    ) {
        let Some(vector) = self.vectors.get(index) else {
            return;
        };
        if !vector.gate.blocked() && (wanted.is_none() || *target != wanted) {
            vector.gate.block();
        }
        if let Some(message) = wanted
            && vector.gate.blocked()
            && self.make_ready(vector, index, target, message)
        {
            vector.gate.unblock(|| vector.fire());
        }
    }

    /// Opens and retargets the line of a blocked vector. False when the host refuses.
    fn make_ready(
        &self,
        vector: &Vector,
        index: usize,
        target: &mut Option<MsiMessage>,
        message: MsiMessage,
    ) -> bool {
        if *target == Some(message) {
            return true;
        }
        let line = match vector.line.get() {
            Some(line) => Ok(Arc::clone(line)),
            None => self.master.msi.open(self.master.source),
        };
        let ready = line.and_then(|line| {
            line.retarget(message)?;
            Ok(vector.line.get_or_init(|| line))
        });
        match ready {
            Ok(_) => {
                *target = Some(message);
                true
            }
            Err(error) => {
                if let Some(count) = self.refused.pass() {
                    let bdf = Bdf::from_requester_id(self.master.source.0);
                    let kind = self.kind;
                    tracing::warn!(
                        "{bdf}: the host refuses {kind} vector {index} ({error}); {count} so far"
                    );
                }
                false
            }
        }
    }

    /// The vector that signals of `index` go to.
    fn at(&self, index: u16) -> Option<&Vector> {
        let index = u32::from(index) & self.granted.load(Ordering::Relaxed);
        self.vectors.get(usize::try_from(index).ok()?)
    }
}

/// One interrupt vector, MSI or MSI-X, as its device holds it.
#[derive(Clone)]
pub struct MsiVector {
    bank: Arc<Bank>,
    index: u16,
}

impl MsiVector {
    /// Raises the interrupt; memory that the caller wrote before is visible to the guest's handler.
    ///
    /// Costs one compare-and-swap, one [`MsiLine::fire`] and one decrement; takes no lock. While the
    /// vector is masked it sets the pending bit instead, and the guest's unmask fires it once. With
    /// Bus Master Enable clear the function may not send messages: the interrupt is then held pending
    /// too, not lost, and fires when bus mastering comes back.
    ///
    /// While MSI-X is disabled the interrupt is held pending as well; while MSI is, it is dropped:
    /// the event is then [`IntxPin`](crate::IntxPin)'s to tell. When the guest has granted fewer MSI
    /// vectors than the function has, the highest ones share with the lower (see [`Msi`](super::Msi)).
    pub fn signal(&self) {
        if let Some(vector) = self.bank.at(self.index) {
            vector.gate.signal(|| vector.fire());
        }
    }

    /// What was signalled has been dealt with: if it is still pending it will not fire (6.1.4.5:
    /// software that polls a masked vector's events clears its pending bit).
    pub fn withdraw(&self) {
        if let Some(vector) = self.bank.at(self.index) {
            vector.gate.forget();
        }
    }

    /// Number of the vector.
    pub fn index(&self) -> u16 {
        self.index
    }
}

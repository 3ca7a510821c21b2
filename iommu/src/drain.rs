//! What one view shows to those who wait until it has let go of a mapping.
//!
//! Sequence numbers count the published invalidations. Who takes a mapping away publishes number `to`
//! and waits until [`Section::before`]`(to)` is false and no pin older than `to` overlaps.
//!
//! Three orderings carry this; the tests run this file under loom, which tries all interleavings and
//! reorderings that they allow.
//!
//! 1. *Enter against publish.* [`Section::enter`] stores the section word, has a `SeqCst` fence, and
//!    loads the sequence number; a publisher stores the sequence number, has a `SeqCst` fence, and
//!    loads the section word. Of the two fences one is first: either the view loads the new number and
//!    drops what it had cached before it uses it, or the publisher sees the section and waits.
//! 2. *Leave against drain.* Every store of the section word releases and [`Section::before`]
//!    acquires: who sees that a section has ended, or been followed by a newer one, also sees all that
//!    was done in it. Pins are made in sections. So a drain looks at the section first and at the pins
//!    second, and a pin that it does not see then was made in a section that it need not wait for.
//! 3. *Release against wait.* Whoever leaves a section or lets go of a pin does so, has a `SeqCst`
//!    fence, and loads the number of waiters; a waiter counts itself, has a `SeqCst` fence, and looks.
//!    Either the waiter sees the change, or it is counted and gets woken; the lock keeps the wake-up
//!    from falling between its look and its sleep.

use super::sync::{AtomicU32, AtomicU64, Condvar, Mutex, Ordering, SLOTS, fence};

/// The sequence number before any invalidation. Zero is left for "in no section".
pub(crate) const FIRST: u64 = 1;

/// Whether a view is in a section, and how old what it knew on entering was.
pub(crate) struct Section(AtomicU64);

impl Section {
    pub(crate) fn new() -> Section {
        Section(AtomicU64::new(0))
    }

    /// Opens a section of a view that has applied all invalidations up to number `seen`. Returns the
    /// number published last: if it is another, the view applies those between, then calls
    /// [`Section::renew`].
    pub(crate) fn enter(&self, sequence: &AtomicU64, seen: u64) -> u64 {
        self.0.store(seen, Ordering::Release);
        fence(Ordering::SeqCst); // Ordering 1.
        sequence.load(Ordering::Acquire)
    }

    /// All up to `seen` is applied, and nothing was accessed in the section yet.
    pub(crate) fn renew(&self, seen: u64) {
        self.0.store(seen, Ordering::Release);
    }

    pub(crate) fn leave(&self) {
        self.0.store(0, Ordering::Release); // Ordering 2.
    }

    /// Whether a section is open that was entered before invalidation `to` was known to the view.
    pub(crate) fn before(&self, to: u64) -> bool {
        let section = self.0.load(Ordering::Acquire); // Ordering 2.
        section != 0 && section < to
    }
}

/// Memory held for I/O in flight.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Pin {
    /// The view had applied the invalidations up to this one.
    pub(crate) since: u64,
    /// Domain id of the translation, or [`Pin::ANY_DOMAIN`].
    pub(crate) domain: u32,
    /// The lowest address.
    pub(crate) start: u64,
    /// The highest address, inclusive.
    pub(crate) last: u64,
}

impl Pin {
    /// The parts belong to different domains.
    pub(crate) const ANY_DOMAIN: u32 = 1 << 16;
}

#[derive(Default)]
struct Slot {
    since: AtomicU64,
    domain: AtomicU32,
    start: AtomicU64,
    last: AtomicU64,
}

/// Places for pins. A place has one owner, who alone writes it.
///
/// A reader may find a place while its owner uses it anew, and read parts of two pins. The older one
/// was released, so nothing waits for it; the younger one was made in a section that the reader has
/// not seen ended, which means (ordering 2) that it need not wait for it. So both answers are right.
pub(crate) struct Pins {
    claimed: AtomicU64,
    active: AtomicU64,
    slots: [Slot; SLOTS],
}

impl Pins {
    pub(crate) fn new() -> Pins {
        Pins {
            claimed: AtomicU64::new(0),
            active: AtomicU64::new(0),
            slots: std::array::from_fn(|_| Slot::default()),
        }
    }

    /// A place for the caller, if one is free.
    pub(crate) fn claim(&self) -> Option<usize> {
        (0..SLOTS).find(|place| {
            let bit = 1 << place;
            self.claimed.load(Ordering::Relaxed) & bit == 0
                && self.claimed.fetch_or(bit, Ordering::AcqRel) & bit == 0
        })
    }

    /// Gives the place back; it holds no pin.
    pub(crate) fn unclaim(&self, place: usize) {
        self.claimed.fetch_and(!(1 << place), Ordering::AcqRel);
    }

    /// Shows `pin`, made or widened in the section that the view has open.
    pub(crate) fn set(&self, place: usize, pin: Pin) {
        let slot = &self.slots[place];
        slot.since.store(pin.since, Ordering::Release);
        slot.domain.store(pin.domain, Ordering::Release);
        slot.start.store(pin.start, Ordering::Release);
        slot.last.store(pin.last, Ordering::Release);
        self.active.fetch_or(1 << place, Ordering::Release);
    }

    /// The I/O has ended. Releases what was done with the memory.
    pub(crate) fn release(&self, place: usize) {
        self.active.fetch_and(!(1 << place), Ordering::Release);
    }

    /// Whether `matches` is true for some pin.
    pub(crate) fn any(&self, mut matches: impl FnMut(Pin) -> bool) -> bool {
        let mut active = self.active.load(Ordering::Acquire);
        while active != 0 {
            // At most 63.
            let slot = &self.slots[active.trailing_zeros() as usize];
            active &= active - 1;
            let pin = Pin {
                since: slot.since.load(Ordering::Acquire),
                domain: slot.domain.load(Ordering::Acquire),
                start: slot.start.load(Ordering::Acquire),
                last: slot.last.load(Ordering::Acquire),
            };
            if matches(pin) {
                return true;
            }
        }
        false
    }
}

/// Those who wait for sections and pins to end.
pub(crate) struct Waiters {
    count: AtomicU32,
    lock: Mutex<()>,
    progress: Condvar,
}

impl Waiters {
    pub(crate) fn new() -> Waiters {
        Waiters {
            count: AtomicU32::new(0),
            lock: Mutex::new(()),
            progress: Condvar::new(),
        }
    }

    /// Returns when `done` is true; it is asked again after each [`Waiters::wake`].
    pub(crate) fn wait(&self, mut done: impl FnMut() -> bool) {
        self.count.fetch_add(1, Ordering::Relaxed);
        fence(Ordering::SeqCst); // Ordering 3.
        // Nothing panics with the lock held.
        let mut guard = self.lock.lock().unwrap_or_else(|e| e.into_inner());
        while !done() {
            guard = self.progress.wait(guard).unwrap_or_else(|e| e.into_inner());
        }
        drop(guard);
        self.count.fetch_sub(1, Ordering::Relaxed);
    }

    /// Something ended.
    pub(crate) fn wake(&self) {
        fence(Ordering::SeqCst); // Ordering 3.
        if self.count.load(Ordering::Relaxed) != 0 {
            drop(self.lock.lock().unwrap_or_else(|e| e.into_inner()));
            self.progress.notify_all();
        }
    }
}

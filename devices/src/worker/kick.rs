//! Waking a worker without a system call when it is awake.

use std::io;
use std::os::fd::{AsRawFd, RawFd};
use std::sync::Arc;
use std::sync::atomic::{AtomicU32, AtomicU64, Ordering};

use vmm_sys_util::eventfd::{EFD_CLOEXEC, EFD_NONBLOCK, EventFd};

/// The worker runs; nothing new.
const AWAKE: u32 = 0;
/// The worker sleeps, or is past its last look before sleeping.
const ASLEEP: u32 = 1;
/// Somebody kicked since the worker last looked.
const KICKED: u32 = 2;

/// Tells one worker that there is work.
///
/// It is made before the worker and its task, so that register handlers can hold a clone. A kick is
/// sticky: one that comes while the worker is awake makes it poll once more before it sleeps.
#[derive(Clone)]
pub struct Kick(Arc<Inner>);

/// One cache line of its own: vCPUs write it.
#[repr(align(64))]
struct Inner {
    state: AtomicU32,
    kicks: AtomicU64,
    wakes: AtomicU64,
    event: EventFd,
}

impl Kick {
    /// A kick for a worker that is yet to be spawned.
    ///
    /// # Errors
    ///
    /// The host has no file descriptor left.
    pub fn new() -> io::Result<Kick> {
        Ok(Kick(Arc::new(Inner {
            state: AtomicU32::new(AWAKE),
            kicks: AtomicU64::new(0),
            wakes: AtomicU64::new(0),
            event: EventFd::new(EFD_NONBLOCK | EFD_CLOEXEC)?,
        })))
    }

    /// Makes the worker poll. What the caller stored before is visible to that poll. A system call
    /// only if the worker sleeps.
    pub fn kick(&self) {
        let inner = &*self.0;
        inner.kicks.fetch_add(1, Ordering::Relaxed);
        if inner.state.swap(KICKED, Ordering::AcqRel) == ASLEEP {
            inner.wakes.fetch_add(1, Ordering::Relaxed);
            // Only a counter at its maximum can fail to take a write, and then it is readable.
            let _ = inner.event.write(1);
        }
    }

    /// Kicks so far, and those that had to wake a sleeping worker.
    pub fn counts(&self) -> (u64, u64) {
        (
            self.0.kicks.load(Ordering::Relaxed),
            self.0.wakes.load(Ordering::Relaxed),
        )
    }

    /// Whether a kick has come since the last call; forgets it.
    pub(super) fn take(&self) -> bool {
        self.0.state.load(Ordering::Relaxed) == KICKED
            && self.0.state.swap(AWAKE, Ordering::AcqRel) == KICKED
    }

    /// The worker's last look before it sleeps; false if a kick has come.
    ///
    /// Kicks and this exchange are all on one atomic, so they have one order: a kick before it makes
    /// it fail, and a kick after it sees `ASLEEP` and writes the eventfd. None can fall between.
    pub(super) fn try_sleep(&self) -> bool {
        self.0
            .state
            .compare_exchange(AWAKE, ASLEEP, Ordering::AcqRel, Ordering::Acquire)
            .is_ok()
    }

    /// The sleep is over; `readable` says whether [`Kick::fd`] was.
    ///
    /// A kick that has changed the state may write the eventfd only later, even in a sleep that it is
    /// not for: then there is nothing to take, but it must be read all the same, or every sleep from
    /// then on would end at once. Nothing is lost by that: between this exchange and the next
    /// [`Kick::try_sleep`] nobody decides to write.
    pub(super) fn end_sleep(&self, readable: bool) {
        // If this fails there was a kick: the state stays so for `take`.
        let _ = self
            .0
            .state
            .compare_exchange(ASLEEP, AWAKE, Ordering::AcqRel, Ordering::Acquire);
        if readable {
            // An empty eventfd is no error here.
            let _ = self.0.event.read();
        }
    }

    /// Readable when a sleeping worker was kicked.
    pub(super) fn fd(&self) -> RawFd {
        self.0.event.as_raw_fd()
    }
}

#[cfg(test)]
impl Kick {
    /// What a kicker does that was held up between its exchange and its write.
    pub(super) fn write_late(&self) {
        self.0.event.write(1).unwrap();
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_kick_is_sticky_and_writes_only_to_a_sleeper() {
        let kick = Kick::new().unwrap();
        kick.kick();
        assert!(!kick.try_sleep(), "slept over a kick");
        assert!(kick.take() && !kick.take());
        assert_eq!(kick.counts(), (1, 0));
        assert!(kick.try_sleep());
        kick.clone().kick();
        kick.kick();
        assert_eq!(kick.counts(), (3, 1), "one wake is enough");
        kick.end_sleep(true);
        assert!(kick.0.event.read().is_err(), "drained");
        assert!(kick.take());
        assert!(kick.try_sleep());
        kick.end_sleep(false);
        assert!(!kick.take());
    }

    /// The kicker was between its exchange and its write when the worker woke for another reason: the
    /// eventfd is readable with no kick to take. The sleep that it ends must drain it.
    #[test]
    fn a_late_write_ends_one_sleep_only() {
        let kick = Kick::new().unwrap();
        kick.write_late();
        assert!(kick.try_sleep());
        kick.end_sleep(true);
        assert!(kick.0.event.read().is_err());
        assert!(!kick.take());
    }
}

//! One vector's gate between signals and messages: a single atomic word.
//!
//! - `BLOCKED`: the vector must not fire now, for whichever reason: MSI(-X) is disabled, the function
//!   or the vector is masked, Bus Master Enable is clear, or the host has given no line.
//! - `PENDING`: signalled while blocked. Set only together with `BLOCKED`.
//! - the rest counts the threads between their check of `BLOCKED` and the end of firing.
//!
//! [`Gate::signal`] makes one compare-and-swap: it either counts itself in, fires and counts itself
//! out, or sets `PENDING`. Since check and consequence are one atomic step, no signal falls between
//! them. [`Gate::block`] and [`Gate::unblock`] are called by one thread at a time:
//!
//! - `block` sets `BLOCKED` and waits until the count is zero. From then on nothing fires, so what
//!   firing uses may be changed.
//! - `unblock` clears `BLOCKED` and takes `PENDING` in one step, and fires if it was set: exactly
//!   once, because only this step clears it.
//!
//! Orderings: `unblock` releases what was changed while blocked, and every `signal` that passes
//! acquires it; a `signal` that has fired releases its use, and `block` acquires that. A `signal` that
//! finds `PENDING` set already still swaps, for the same value: that releases what its caller wrote to
//! memory before, which `unblock` acquires before it fires. With a plain load instead, the guest could
//! take the interrupt, miss that data, and get no second interrupt.
//!
//! The tests run this file under loom, which tries all interleavings and all reorderings that these
//! orderings allow.

use super::sync::{AtomicU32, Ordering, yield_now};

const BLOCKED: u32 = 1 << 31;
const PENDING: u32 = 1 << 30;
const FIRING: u32 = PENDING - 1;

/// A vector's state.
pub(crate) struct Gate(AtomicU32);

impl Gate {
    /// Blocked, nothing pending.
    pub(crate) fn new() -> Gate {
        Gate(AtomicU32::new(BLOCKED))
    }

    /// Fires now, or leaves it pending.
    pub(crate) fn signal(&self, fire: impl FnOnce()) {
        let mut state = self.0.load(Ordering::Relaxed);
        loop {
            let blocked = state & BLOCKED != 0;
            let next = if blocked { state | PENDING } else { state + 1 };
            let swap =
                self.0
                    .compare_exchange_weak(state, next, Ordering::AcqRel, Ordering::Relaxed);
            match swap {
                Ok(_) if blocked => return,
                Ok(_) => break,
                Err(now) => state = now,
            }
        }
        fire();
        self.0.fetch_sub(1, Ordering::Release);
    }

    /// From the return on nothing fires. Waits for the threads that do now: they make one system call
    /// each, and hold or wait for no lock of ours.
    pub(crate) fn block(&self) {
        self.0.fetch_or(BLOCKED, Ordering::AcqRel);
        while self.0.load(Ordering::Acquire) & FIRING != 0 {
            yield_now();
        }
    }

    /// Lets signals through again; `fire` is called if one is pending.
    pub(crate) fn unblock(&self, fire: impl FnOnce()) {
        let was = self.0.fetch_and(!(BLOCKED | PENDING), Ordering::AcqRel);
        if was & PENDING != 0 {
            fire();
        }
    }

    /// Forgets a pending signal. May be called by any thread.
    pub(crate) fn forget(&self) {
        self.0.fetch_and(!PENDING, Ordering::AcqRel);
    }

    /// For the thread that blocks and unblocks: what it did last.
    pub(crate) fn blocked(&self) -> bool {
        self.0.load(Ordering::Relaxed) & BLOCKED != 0
    }

    /// The vector's bit in the pending bit array.
    pub(crate) fn pending(&self) -> bool {
        self.0.load(Ordering::Acquire) & PENDING != 0
    }
}

//! The gate of MSI and MSI-X vectors under loom: every interleaving of signals, masking, unmasking
//! and withdrawing.

/// The crate's own source, with loom's atomics.
#[path = "../src/interrupt/gate.rs"]
#[allow(dead_code, reason = "not every test uses every method")]
mod gate;

mod sync {
    pub(crate) use loom::sync::atomic::{AtomicU32, Ordering};
    pub(crate) use loom::thread::yield_now;
}

use gate::Gate;
use loom::cell::UnsafeCell;
use loom::sync::Arc;
use loom::sync::atomic::{AtomicU32, Ordering};
use loom::thread;

/// A vector whose line is a plain cell: loom reports a race if it is read while it is written.
struct Vector {
    gate: Gate,
    line: UnsafeCell<u32>,
    fired: AtomicU32,
    /// What each signaller wrote before it signalled, and which of them some firing saw.
    data: [AtomicU32; 2],
    seen: [AtomicU32; 2],
}

impl Vector {
    fn new() -> Arc<Vector> {
        let zeroes = || [AtomicU32::new(0), AtomicU32::new(0)];
        Arc::new(Vector {
            gate: Gate::new(),
            line: UnsafeCell::new(0),
            fired: AtomicU32::new(0),
            data: zeroes(),
            seen: zeroes(),
        })
    }

    fn fire(&self) {
        self.line.with(|_| ());
        self.fired.fetch_add(1, Ordering::Relaxed);
        for (data, seen) in self.data.iter().zip(&self.seen) {
            seen.fetch_or(data.load(Ordering::Relaxed), Ordering::Relaxed);
        }
    }

    fn signal(&self, who: usize) {
        self.data[who].store(1, Ordering::Relaxed);
        self.gate.signal(|| self.fire());
    }

    fn unblock(&self) {
        self.gate.unblock(|| self.fire());
    }

    /// Masks, changes the line, looks that nothing fires meanwhile, unmasks.
    fn retarget(&self) {
        self.gate.block();
        let before = self.fired.load(Ordering::Relaxed);
        self.line.with_mut(|_| ());
        assert_eq!(self.fired.load(Ordering::Relaxed), before);
        self.unblock();
    }

    fn totals(&self) -> (u32, [u32; 2]) {
        let seen = [0, 1].map(|i| self.seen[i].load(Ordering::Relaxed));
        (self.fired.load(Ordering::Relaxed), seen)
    }
}

/// Three threads have too many interleavings; those with up to three preemptions are tried.
fn bounded(test: impl Fn() + Sync + Send + 'static) {
    let mut model = loom::model::Builder::new();
    model.preemption_bound = Some(3);
    model.check(test);
}

#[test]
fn one_signal_fires_once_whatever_masking_does() {
    loom::model(|| {
        let vector = Vector::new();
        let signaller = {
            let vector = Arc::clone(&vector);
            thread::spawn(move || vector.signal(0))
        };
        vector.unblock();
        vector.retarget();
        signaller.join().unwrap();
        let (fired, [seen, _]) = vector.totals();
        assert_eq!((fired, seen), (1, 1));
    });
}

#[test]
fn a_withdrawn_signal_fires_once_or_never_and_is_not_pending() {
    loom::model(|| {
        let vector = Vector::new();
        let signaller = {
            let vector = Arc::clone(&vector);
            thread::spawn(move || {
                vector.signal(0);
                vector.gate.forget();
            })
        };
        vector.unblock();
        signaller.join().unwrap();
        let (fired, [seen, _]) = vector.totals();
        assert!(fired <= 1 && seen == fired);
        assert!(!vector.gate.pending());
        // The next one is not lost.
        vector.signal(1);
        let (now, [_, seen]) = vector.totals();
        assert_eq!((now, seen), (fired + 1, 1));
    });
}

#[test]
fn two_signallers_lose_nothing() {
    bounded(|| {
        let vector = Vector::new();
        let signallers: Vec<_> = [0, 1]
            .map(|who| {
                let vector = Arc::clone(&vector);
                thread::spawn(move || vector.signal(who))
            })
            .into();
        vector.unblock();
        for signaller in signallers {
            signaller.join().unwrap();
        }
        let (fired, seen) = vector.totals();
        // Both pending at once are one interrupt, but one that sees what both have written.
        assert!((1..=2).contains(&fired));
        assert_eq!(seen, [1, 1]);
    });
}

#[test]
fn two_signallers_and_a_retarget() {
    bounded(|| {
        let vector = Vector::new();
        vector.unblock();
        let signallers: Vec<_> = [0, 1]
            .map(|who| {
                let vector = Arc::clone(&vector);
                thread::spawn(move || vector.signal(who))
            })
            .into();
        vector.retarget();
        for signaller in signallers {
            signaller.join().unwrap();
        }
        let (fired, seen) = vector.totals();
        assert!((1..=2).contains(&fired));
        assert_eq!(seen, [1, 1]);
    });
}

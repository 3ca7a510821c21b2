//! Sections, pins and the log of invalidations under loom: every interleaving of a worker that uses a
//! mapping and of a revoker that takes it away.
//!
//! The mapped page is a plain cell that the worker writes through the mapping and the revoker writes
//! after its drain: loom reports a race if the two can meet.

#[path = "../src/drain.rs"]
#[allow(dead_code, reason = "not every test uses every method")]
mod drain;
#[path = "../src/log.rs"]
mod log;

mod sync {
    pub(crate) use loom::sync::atomic::{AtomicU32, AtomicU64, Ordering, fence};
    pub(crate) use loom::sync::{Condvar, Mutex};
    pub(crate) const SLOTS: usize = 1;
    pub(crate) const LOG: u64 = 2;
}

use drain::{FIRST, Pin, Pins, Section, Waiters};
use log::Log;
use loom::cell::UnsafeCell;
use loom::sync::Arc;
use loom::sync::atomic::{AtomicBool, Ordering};
use loom::thread;

/// All interleavings with at most three preemptions: more find nothing and take minutes.
fn model(test: impl Fn() + Sync + Send + 'static) {
    let mut builder = loom::model::Builder::new();
    builder.preemption_bound = Some(3);
    builder.check(test);
}

/// A worker's view, the table entry that maps the page, and the page.
struct Bench {
    log: Log,
    section: Section,
    pins: Pins,
    waiters: Waiters,
    mapped: AtomicBool,
    page: UnsafeCell<u32>,
}

impl Bench {
    fn new() -> Arc<Bench> {
        Arc::new(Bench {
            log: Log::new(),
            section: Section::new(),
            pins: Pins::new(),
            waiters: Waiters::new(),
            mapped: AtomicBool::new(true),
            page: UnsafeCell::new(0),
        })
    }

    /// A section of a view with a one-entry cache; true in `cached`: the page is mapped. `seen` is
    /// what it applied last. Returns whether it may use the page.
    fn enter(&self, seen: &mut u64, cached: &mut bool) -> bool {
        let now = self.log.enter(&self.section, *seen);
        if now != *seen {
            for number in *seen + 1..=now {
                // Whatever it says, or too old to say.
                let _ = self.log.read(number);
                *cached = false;
            }
            *seen = now;
            self.section.renew(now);
        }
        if !*cached {
            *cached = self.mapped.load(Ordering::Relaxed);
        }
        *cached
    }

    fn leave(&self) {
        self.section.leave();
        self.waiters.wake();
    }

    /// Unmaps, waits, and uses the page for something else.
    fn revoke(&self) {
        self.mapped.store(false, Ordering::Relaxed);
        let to = self.log.publish([1, 2, 3]);
        self.waiters
            .wait(|| !self.section.before(to) && !self.pins.any(|pin| pin.since < to));
        self.page.with_mut(|_| ());
    }
}

impl Log {
    fn enter(&self, section: &Section, seen: u64) -> u64 {
        section.enter(self.sequence(), seen)
    }
}

#[test]
fn no_section_uses_a_page_after_its_drain() {
    model(|| {
        let bench = Bench::new();
        let worker = {
            let bench = Arc::clone(&bench);
            thread::spawn(move || {
                let (mut seen, mut cached) = (FIRST, true);
                for _ in 0..2 {
                    if bench.enter(&mut seen, &mut cached) {
                        bench.page.with_mut(|_| ());
                    }
                    bench.leave();
                }
            })
        };
        bench.revoke();
        worker.join().unwrap();
    });
}

#[test]
fn no_pinned_transfer_lands_after_its_drain() {
    model(|| {
        let bench = Bench::new();
        let worker = {
            let bench = Arc::clone(&bench);
            thread::spawn(move || {
                let (mut seen, mut cached) = (FIRST, true);
                let place = bench.pins.claim().expect("a free place");
                let held = bench.enter(&mut seen, &mut cached);
                if held {
                    let pin = Pin {
                        since: seen,
                        domain: 1,
                        start: 0,
                        last: 0xfff,
                    };
                    bench.pins.set(place, pin);
                }
                bench.leave();
                // The transfer runs on outside the section.
                if held {
                    bench.page.with_mut(|_| ());
                    bench.pins.release(place);
                    bench.waiters.wake();
                }
            })
        };
        bench.revoke();
        worker.join().unwrap();
    });
}

/// Two functions' views, one drained: with a revoker each, wake-ups must reach the right one.
#[test]
fn every_waiter_is_woken() {
    model(|| {
        let bench = Bench::new();
        let mut seen = FIRST;
        bench.enter(&mut seen, &mut true);
        let revokers = [0, 1].map(|_| {
            let bench = Arc::clone(&bench);
            thread::spawn(move || {
                let to = FIRST + 1;
                bench.waiters.wait(|| !bench.section.before(to));
            })
        });
        bench.leave();
        for revoker in revokers {
            revoker.join().unwrap();
        }
    });
}

/// A reader gets an invalidation whole or not at all, also when the ring goes round under it.
#[test]
fn the_log_is_never_torn() {
    model(|| {
        let log = Arc::new(Log::new());
        let writer = {
            let log = Arc::clone(&log);
            thread::spawn(move || {
                for number in FIRST + 1..FIRST + 4 {
                    assert_eq!(log.publish([number, number, number]), number);
                }
            })
        };
        let now = log.sequence().load(Ordering::Acquire);
        for number in FIRST + 1..=now {
            if let Some(words) = log.read(number) {
                assert_eq!(words, [number; 3]);
            }
        }
        writer.join().unwrap();
        let last = FIRST + 3;
        assert_eq!(log.read(last), Some([last; 3]));
        assert_eq!(log.read(last - 2), None);
    });
}

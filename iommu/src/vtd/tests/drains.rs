//! The queue with the views of real DMA spaces.

use std::sync::atomic::AtomicU64;

use super::*;
use crate::Invalidations;
use crate::drain::Pin;
use crate::view::View;

fn bench() -> (Bench, Arc<Invalidations>, Arc<View>) {
    let mut bench = Bench::new(Options::default());
    let invalidations = Invalidations::new();
    let drain = Arc::clone(&invalidations) as Arc<dyn Drain>;
    let sink = Arc::new(Sink(Arc::clone(&bench.host)));
    bench.unit = Unit::with(bench.ram.clone(), Options::default(), sink, drain).unwrap();
    bench.queue_on(false);
    let view = Arc::new(View::new(SourceId(0x18)));
    invalidations.register(Arc::clone(&view));
    (bench, invalidations, view)
}

#[test]
fn a_wait_stands_for_pinned_memory_that_overlaps() {
    let (mut bench, invalidations, view) = bench();
    let place = view.place();
    place.set(Pin {
        since: invalidations.sequence(),
        domain: 5,
        start: 0x4000,
        last: 0x5fff,
    });
    // Other pages, another domain.
    bench.run(&[&[0x5_0032, 0x6000], &[0x6_0032, 0x4000]]);
    assert_eq!(bench.unit.counters().waits_blocked, 0);
    bench.put(&[0x5_0032, 0x5000]);
    bench.put(&[77 << 32 | 0x25, STATUS]);
    bench.kick();
    until(|| bench.unit.counters().waits_blocked == 1);
    assert_ne!(bench.load32(STATUS), 77);
    assert_eq!(bench.r64(reg::IQH), bench.tail - 16);
    place.release();
    invalidations.wake();
    until(|| bench.load32(STATUS) == 77);
}

/// A worker uses in each section what was mapped when the section began. The driver maps something
/// else, invalidates, waits, and only then takes the old away: nobody may be using it.
#[test]
fn nothing_is_used_after_its_wait() {
    let (mut bench, invalidations, view) = bench();
    let mapped = AtomicU64::new(1);
    let taken = AtomicU64::new(0);
    let stop = AtomicBool::new(false);
    let (bad, rounds) = (AtomicU64::new(0), AtomicU64::new(0));
    std::thread::scope(|scope| {
        scope.spawn(|| {
            let mut seen = invalidations.sequence();
            while !stop.load(Ordering::SeqCst) {
                let latest = invalidations.enter(&view, seen);
                if latest != seen {
                    seen = latest;
                    view.section.renew(seen);
                }
                let used = mapped.load(Ordering::SeqCst);
                let round = rounds.fetch_add(1, Ordering::SeqCst);
                // Now and then longer than a vCPU looks.
                let work = if round.is_multiple_of(16) {
                    20_000
                } else {
                    500
                };
                for _ in 0..work {
                    std::hint::spin_loop();
                }
                if taken.load(Ordering::SeqCst) >= used {
                    bad.store(used, Ordering::SeqCst);
                }
                view.section.leave();
                invalidations.wake();
            }
        });
        let _stop = Stop(&stop);
        for number in 1..150 {
            // The worker is in a section, most likely.
            let before = rounds.load(Ordering::SeqCst);
            until(|| rounds.load(Ordering::SeqCst) != before);
            mapped.store(number + 1, Ordering::SeqCst);
            bench.run(&[&[0x12, 0]]);
            taken.store(number, Ordering::SeqCst);
        }
    });
    assert_eq!(bad.into_inner(), 0, "used after it was taken away");
    assert_eq!(bench.unit.counters().waits, 149);
}

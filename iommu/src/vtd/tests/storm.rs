use std::sync::atomic::AtomicU64;

use super::*;
use crate::vtd::spec::registers::global;

const DEVICE: SourceId = SourceId(0x0018);
const CHANGES: usize = 150;

/// A host that counts by vector and takes its time to change a route.
struct Counting([AtomicU64; 256]);

impl Default for Counting {
    fn default() -> Counting {
        Counting([const { AtomicU64::new(0) }; 256])
    }
}

struct CountingSink(Arc<Counting>);

struct CountingLine(Arc<Counting>, Mutex<Option<MsiMessage>>);

impl MsiSink for CountingSink {
    fn open(&self, _source: SourceId) -> io::Result<Arc<dyn MsiLine>> {
        Ok(Arc::new(CountingLine(
            Arc::clone(&self.0),
            Mutex::new(None),
        )))
    }

    fn send(&self, _source: SourceId, message: MsiMessage) -> io::Result<()> {
        self.0.0[(message.data & 0xff) as usize].fetch_add(1, Ordering::SeqCst);
        Ok(())
    }
}

impl MsiLine for CountingLine {
    fn retarget(&self, message: MsiMessage) -> io::Result<()> {
        let mut route = self.1.lock().unwrap();
        std::thread::yield_now();
        *route = Some(message);
        Ok(())
    }

    fn fire(&self) {
        let route = self.1.lock().unwrap();
        let vector = route.expect("fired without a route").data & 0xff;
        self.0.0[vector as usize].fetch_add(1, Ordering::SeqCst);
    }
}

/// Threads fire a line while its entry changes between two vectors and not present. Each fire is
/// delivered to one of the vectors or counted as blocked, and after an invalidation has completed none
/// goes where the old entry said.
#[test]
fn no_interrupt_is_lost_or_late() {
    let host = Arc::new(Counting::default());
    let mut bench = Bench::new(Options::default());
    bench.unit = Unit::with(
        bench.ram.clone(),
        Options::default(),
        Arc::new(CountingSink(Arc::clone(&host))),
        Arc::clone(&bench.spaces) as Arc<dyn Drain>,
    )
    .unwrap();
    bench.queue_on(false);
    bench.w64(reg::IRTA, IRT | 3);
    bench.command(global::SIRTP, 0);
    bench.command(global::IRE, 0);
    let line = bench.unit.sink().open(DEVICE).unwrap();
    line.retarget(message(0xfee0_0010 | 1 << 5, 0)).unwrap();
    let count = |vector: usize| host.0[vector].load(Ordering::SeqCst);
    let (stop, fires) = (AtomicBool::new(false), AtomicU64::new(0));
    std::thread::scope(|scope| {
        for _ in 0..2 {
            scope.spawn(|| {
                while !stop.load(Ordering::SeqCst) {
                    fires.fetch_add(1, Ordering::SeqCst);
                    line.fire();
                }
            });
        }
        let _stop = Stop(&stop);
        for vector in [0x41, 0, 0x42].into_iter().cycle().take(CHANGES) {
            bench.store(IRT + 16, &[vector << 16 | u64::from(vector != 0)]);
            bench.run(&[&[1 << 32 | 0x14, 0]]);
            let stale = || (0x41..=0x42).filter(|&other| other != vector as usize);
            let before: Vec<_> = stale().map(count).collect();
            // Of three fires of two threads one has begun after the invalidation.
            let fired = fires.load(Ordering::SeqCst);
            until(|| fires.load(Ordering::SeqCst) > fired + 3);
            let after: Vec<_> = stale().map(count).collect();
            assert_eq!(before, after, "went out under the old entry");
        }
    });
    let counters = bench.unit.counters();
    let delivered = count(0x41) + count(0x42);
    assert_eq!(counters.interrupts, delivered);
    assert_eq!(delivered + counters.interrupts_blocked, fires.into_inner());
    assert!(delivered > 0 && counters.interrupts_blocked > 0);
    assert_eq!(
        counters.faults + counters.faults_lost,
        counters.interrupts_blocked
    );
    drop(line);
    assert_eq!(bench.unit.counters().interrupts, delivered);
}

/// A line that moves to another entry while that entry is invalidated is not left with the old one.
#[test]
fn a_line_that_moves_is_not_left_behind() {
    let host = Arc::new(Counting::default());
    let mut bench = Bench::new(Options::default());
    bench.unit = Unit::with(
        bench.ram.clone(),
        Options::default(),
        Arc::new(CountingSink(Arc::clone(&host))),
        Arc::clone(&bench.spaces) as Arc<dyn Drain>,
    )
    .unwrap();
    bench.queue_on(false);
    bench.w64(reg::IRTA, IRT | 3);
    bench.command(global::SIRTP, 0);
    bench.command(global::IRE, 0);
    bench.store(IRT + 16, &[0x41 << 16 | 1]);
    let line = bench.unit.sink().open(DEVICE).unwrap();
    let request = |index: u64| message(0xfee0_0010 | index << 5, 0);
    for round in 0..600u64 {
        line.retarget(request(1)).unwrap();
        let vector = 0x50 + (round & 1);
        std::thread::scope(|scope| {
            scope.spawn(|| line.retarget(request(2)).unwrap());
            bench.store(IRT + 32, &[vector << 16 | 1]);
            bench.run(&[&[2 << 32 | 0x14, 0]]);
        });
        let before = host.0[vector as usize].load(Ordering::SeqCst);
        line.fire();
        let after = host.0[vector as usize].load(Ordering::SeqCst);
        assert_eq!(after, before + 1, "round {round}");
    }
}

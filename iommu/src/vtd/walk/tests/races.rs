//! Tables that the guest changes while they are read.

use std::ops::ControlFlow;
use std::sync::atomic::AtomicBool;

use vm_memory::Bytes;

use super::*;

/// A guest that counts in ignored bits of an entry and clears its accessed and dirty bits loses no
/// count to a walk that sets them.
#[test]
fn setting_bits_loses_no_change_of_the_guest() {
    const CHANGES: u64 = 50_000;
    let ram = ram();
    let mut bed = Bed::first(&ram);
    bed.access = Access::Write;
    let at = bed.entry(12);
    let walks = AtomicU64::new(0);
    let done = AtomicBool::new(false);
    std::thread::scope(|scope| {
        scope.spawn(|| {
            let slice = ram.get_slice(GuestAddress(at.0), 8).unwrap();
            let entry = slice.get_atomic_ref::<AtomicU64>(0).unwrap();
            for change in 0..CHANGES {
                entry.fetch_add(1 << 52, Ordering::AcqRel);
                entry.fetch_and(!(1 << 5 | 1 << 6), Ordering::AcqRel);
                // On a machine with one CPU to spare the walks would otherwise never meet a change.
                if change % 500 == 0 {
                    let seen = walks.load(Ordering::Acquire);
                    while walks.load(Ordering::Acquire) < seen + 20 {
                        std::thread::yield_now();
                    }
                }
            }
            done.store(true, Ordering::Release);
        });
        while !done.load(Ordering::Acquire) {
            if let Err(fault) = bed.translate() {
                // The guest won all races of one walk.
                assert_eq!(fault.reason, FaultReason::FS_UPDATE_FAILED);
            }
            walks.fetch_add(1, Ordering::AcqRel);
        }
    });
    // 11 ignored bits, and bit 63, which is ignored too.
    assert_eq!(bed.memory.load(at) >> 52, CHANGES % (1 << 12));
}

/// Only an entry that is still what was read is changed.
#[test]
fn a_changed_entry_is_left_alone() {
    let ram = ram();
    let at = GuestAddress(0x1000);
    ram.write_obj(5_u64, at).unwrap();
    assert!(matches!(replace(&ram, at.0, 4, 7), Update::Changed));
    assert_eq!(ram.read_obj::<u64>(at).unwrap(), 5);
    assert!(matches!(replace(&ram, at.0, 5, 7), Update::Done));
    assert_eq!(ram.read_obj::<u64>(at).unwrap(), 7);
    assert!(matches!(replace(&ram, NOWHERE, 5, 7), Update::Failed));
    assert!(matches!(replace(&ram, u64::MAX, 5, 7), Update::Failed));
}

/// A context entry that is replaced while it is read is seen as one or the other, or as not present.
#[test]
fn an_entry_is_never_mixed_from_two() {
    const ROUNDS: u64 = 5000;
    let ram = ram();
    let mut bed = Bed::legacy(&ram);
    let [low, high] = [bed.context(0), bed.context(1)];
    let store = |at: Gpa, value: u64| {
        ram.store(value, GuestAddress(at.0), Ordering::Release)
            .unwrap();
    };
    let done = AtomicBool::new(false);
    std::thread::scope(|scope| {
        scope.spawn(|| {
            for round in 1..=ROUNDS {
                store(low, 0);
                store(high, round << 8 | 2);
                store(low, round << 12 | 1);
            }
            done.store(true, Ordering::Release);
        });
        let mut seen = ControlFlow::Continue(());
        while seen.is_continue() {
            if done.load(Ordering::Acquire) {
                seen = ControlFlow::Break(());
            }
            match context(&ram, &bed.options, bed.root, DEVICE) {
                Ok((context, _)) => {
                    let Stage::Second { table, .. } = context.stage else {
                        panic!("{context:?}");
                    };
                    if context.domain != DOMAIN {
                        assert_eq!(table.0 >> 12, u64::from(context.domain));
                    }
                }
                Err(fault) => assert_eq!(fault.reason, FaultReason::CONTEXT_NOT_PRESENT),
            }
        }
    });
    let (context, _) = context(&ram, &bed.options, bed.root, DEVICE).unwrap();
    assert_eq!(u64::from(context.domain), ROUNDS);
}

use super::*;
use crate::vtd::spec::registers::{event, fsts, global};
use crate::{Access, Context, DmaError, FaultReason, Gpa, Iova, Remapper, Stage};

const FRCD: u64 = 0x600;

fn context(fault_processing_disable: bool) -> Context {
    Context {
        domain: 1,
        stage: Stage::PassThrough { width: 39 },
        fault_processing_disable,
    }
}

fn bench(fault_records: u16) -> Bench {
    let bench = Bench::new(Options {
        fault_records,
        ..Options::default()
    });
    // Recording starts anew while all is off.
    bench.command(global::TE, 0);
    bench
}

fn fault(bench: &Bench, source: u16, address: u64, access: Access) {
    let error = bench
        .unit
        .beyond_width(SourceId(source), &context(false), Iova(address), access);
    assert_eq!(
        error,
        DmaError::Fault(Iova(address), FaultReason::ADDRESS_BEYOND_WIDTH)
    );
}

fn clear(bench: &Bench, index: u64) {
    bench.w32(FRCD + 16 * index + 12, 1 << 31);
}

fn fri(bench: &Bench) -> u32 {
    bench.r32(reg::FSTS) >> 8
}

#[test]
fn a_fault_is_recorded_and_cleared() {
    let bench = bench(8);
    fault(&bench, 0x1234, 0xffff_8765_4321, Access::Read);
    fault(&bench, 0x0018, 0x8000_0000_0fff, Access::Write);
    assert_eq!(bench.r32(reg::FSTS), fsts::PPF);
    assert_eq!(bench.r64(FRCD), 0xffff_8765_4000);
    assert_eq!(bench.r64(FRCD + 8), 0xc000_0004_0000_1234);
    assert_eq!(bench.r64(FRCD + 16), 0x8000_0000_0000);
    assert_eq!(bench.r64(FRCD + 24), 0x8000_0004_0000_0018);
    // Nothing but F can be written, and F only cleared.
    bench.w64(FRCD, u64::MAX);
    bench.w64(FRCD + 8, !(1 << 63));
    assert_eq!(bench.r64(FRCD + 8), 0xc000_0004_0000_1234);
    bench.w64(FRCD + 8, u64::MAX);
    assert_eq!(bench.r64(FRCD + 8), 0x4000_0004_0000_1234);
    assert_eq!(bench.r32(reg::FSTS) & fsts::PPF, fsts::PPF);
    bench.w32(reg::FSTS, fsts::PPF);
    assert_eq!(bench.r32(reg::FSTS) & fsts::PPF, fsts::PPF, "computed");
    clear(&bench, 1);
    assert_eq!(bench.r32(reg::FSTS), 0);
    assert_eq!(bench.unit.counters().faults, 2);
}

#[test]
fn first_stage_addresses_are_not_canonical() {
    let bench = bench(8);
    bench.w64(reg::RTADDR, 1 << 10);
    bench.command(global::SRTP, 0);
    let first = Context {
        stage: Stage::First {
            table: Gpa(0),
            levels: 4,
            write_protect: false,
            supervisor: false,
            walk_snoop: true,
        },
        ..context(false)
    };
    for (context, reason) in [(first, 0x80), (context(false), 0x83)] {
        let error = bench
            .unit
            .beyond_width(SourceId(1), &context, Iova(1 << 50), Access::Read);
        assert_eq!(error, DmaError::Fault(Iova(1 << 50), FaultReason(reason)));
    }
    assert_eq!(bench.r64(FRCD + 8) >> 32 & 0xff, 0x80);
    assert_eq!(bench.r64(FRCD + 24) >> 32 & 0xff, 0x83);
}

#[test]
fn disabled_fault_processing_records_nothing() {
    let bench = bench(8);
    bench
        .unit
        .beyond_width(SourceId(1), &context(true), Iova(1 << 50), Access::Read);
    assert_eq!(bench.r32(reg::FSTS), 0);
    assert_eq!(bench.unit.counters().faults, 0);
}

#[test]
fn the_records_overflow_and_wrap() {
    let bench = bench(3);
    for source in 1..=4 {
        fault(&bench, source, 1 << 47, Access::Read);
    }
    assert_eq!(bench.r32(reg::FSTS), fsts::PPF | fsts::PFO);
    // While PFO is set nothing is recorded, room or not.
    clear(&bench, 0);
    fault(&bench, 5, 1 << 47, Access::Read);
    assert_eq!(bench.r64(FRCD + 8) >> 63, 0);
    bench.w32(reg::FSTS, fsts::PFO);
    assert_eq!(bench.r32(reg::FSTS) & fsts::PFO, 0);
    fault(&bench, 6, 1 << 47, Access::Read);
    assert_eq!(bench.r64(FRCD + 8) & 0xffff, 6);
    clear(&bench, 0);
    clear(&bench, 1);
    clear(&bench, 2);
    assert_eq!(bench.r32(reg::FSTS), 0);
    // Goes on where it was, and FRI says where.
    fault(&bench, 7, 1 << 47, Access::Read);
    assert_eq!((fri(&bench), bench.r64(FRCD + 24) & 0xffff), (1, 7));
    fault(&bench, 8, 1 << 47, Access::Read);
    assert_eq!(fri(&bench), 1);
    let counters = bench.unit.counters();
    assert_eq!((counters.faults, counters.faults_lost), (6, 2));
    // With all off it starts at the first.
    clear(&bench, 1);
    clear(&bench, 2);
    bench.command(0, global::TE);
    bench.command(global::TE, 0);
    fault(&bench, 9, 1 << 47, Access::Read);
    assert_eq!((fri(&bench), bench.r64(FRCD + 8) & 0xffff), (0, 9));
}

#[test]
fn all_records_are_reachable() {
    let bench = bench(128);
    for source in 0..128 {
        fault(&bench, source, 1 << 47, Access::Read);
    }
    assert_eq!(bench.r32(reg::FSTS) & fsts::PFO, 0);
    for source in 0..128 {
        let at = FRCD + 16 * source + 8;
        assert_eq!(bench.r64(at) & 0xffff, source);
        clear(&bench, source);
    }
    assert_eq!(bench.r32(reg::FSTS), 0);
}

#[test]
fn faults_raise_the_event() {
    let bench = bench(8);
    bench.w32(reg::FEDATA, 0x21);
    bench.w32(reg::FEADDR, 0xfee0_1000);
    bench.w32(reg::FEUADDR, 0x200);
    let sent = message(0x0000_0200_fee0_1000, 0x21);
    fault(&bench, 1, 1 << 47, Access::Read);
    assert_eq!(bench.r32(reg::FECTL), event::IM | event::IP);
    assert_eq!(bench.delivered(), []);
    bench.w32(reg::FECTL, 0);
    assert_eq!(bench.r32(reg::FECTL), 0);
    assert_eq!(bench.delivered(), [sent]);
    // Some status is set already: no new condition.
    fault(&bench, 2, 1 << 47, Access::Read);
    assert_eq!(bench.delivered(), []);
    clear(&bench, 0);
    clear(&bench, 1);
    fault(&bench, 3, 1 << 47, Access::Read);
    assert_eq!(bench.delivered(), [sent]);
    clear(&bench, 2);
    // Serviced while masked: not pending any more.
    bench.w32(reg::FECTL, event::IM);
    fault(&bench, 4, 1 << 47, Access::Read);
    assert_eq!(bench.r32(reg::FECTL), event::IM | event::IP);
    clear(&bench, 3);
    assert_eq!(bench.r32(reg::FECTL), event::IM);
    bench.w32(reg::FECTL, 0);
    assert_eq!(bench.delivered(), []);
    // With another vector.
    bench.w32(reg::FEDATA, 0x22);
    fault(&bench, 5, 1 << 47, Access::Read);
    assert_eq!(bench.delivered(), [message(0x0000_0200_fee0_1000, 0x22)]);
}

#[test]
fn queue_errors_raise_the_fault_event() {
    let mut bench = bench(8);
    bench.w32(reg::FEADDR, 0xfee0_1000);
    bench.w32(reg::FECTL, 0);
    bench.queue_on(false);
    bench.put(&[0, 0]);
    bench.kick();
    assert_eq!(bench.delivered(), [message(0xfee0_1000, 0)]);
    bench.w32(reg::FSTS, fsts::IQE);
    assert_eq!(bench.delivered(), [message(0xfee0_1000, 0)]);
    // A fault beside it is no new condition.
    fault(&bench, 5, 1 << 47, Access::Read);
    assert_eq!(bench.delivered(), []);
}

#[test]
fn an_event_that_the_host_refuses_stays_pending() {
    let bench = bench(8);
    bench.w32(reg::FEADDR, 0xfee0_1000);
    bench.w32(reg::FECTL, 0);
    bench.host.refuse.store(true, Ordering::SeqCst);
    fault(&bench, 1, 1 << 47, Access::Read);
    assert_eq!(bench.r32(reg::FECTL), event::IP);
    bench.host.refuse.store(false, Ordering::SeqCst);
    bench.w32(reg::FECTL, 0);
    assert_eq!(bench.r32(reg::FECTL), 0);
    assert_eq!(bench.delivered(), [message(0xfee0_1000, 0)]);
}

/// A driver that polls finds a record valid only with all of its fields, whatever size it reads.
#[test]
fn a_record_that_is_valid_is_whole() {
    const ROUNDS: u64 = 6_000;
    let bench = bench(1);
    // The root table is empty.
    bench.command(global::TE, 0);
    std::thread::scope(|scope| {
        let driver = scope.spawn(|| {
            for round in 0..ROUNDS {
                let record = loop {
                    let record = if round % 4 < 2 {
                        bench.r64(FRCD + 8)
                    } else {
                        let high = bench.r32(FRCD + 12);
                        u64::from(high) << 32 | u64::from(bench.r32(FRCD + 8))
                    };
                    if record >> 63 != 0 {
                        break record;
                    }
                };
                let expected = if round % 2 == 0 { (4, 0x77) } else { (1, 0x88) };
                assert_eq!((record >> 32 & 0xff, record & 0xffff), expected);
                clear(&bench, 0);
            }
        });
        for round in 0..ROUNDS {
            if round % 2 == 0 {
                fault(&bench, 0x77, 1 << 47, Access::Read);
            } else {
                let error = bench.unit.context(SourceId(0x88), Iova(0), Access::Read);
                assert!(error.is_err());
            }
            until(|| bench.r32(reg::FSTS) & fsts::PPF == 0 || driver.is_finished());
        }
    });
}

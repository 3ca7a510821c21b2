use super::*;
use crate::Iova;
use crate::vtd::spec::registers::{event, fsts, global, iqei};

const WAIT: u64 = 0x25;

fn with_device_tlb() -> Options {
    Options {
        device_tlb: true,
        ..Options::default()
    }
}

#[test]
fn every_descriptor_and_granularity() {
    use Invalidation::*;
    let source = |mask| SourceContexts {
        source: SourceId(0x1234),
        mask,
    };
    let pages = |start, last| PageTranslations {
        domain: 9,
        start: Iova(start),
        last: Iova(last),
    };
    let cases: &[([u64; 2], Option<Invalidation>)] = &[
        ([0x11, 0], Some(Contexts)),
        ([0x9_0021, 0], Some(DomainContexts { domain: 9 })),
        ([0x1234_0009_0031, 0], Some(source(0))),
        ([0x1_1234_0009_0031, 0], Some(source(4))),
        ([0x2_1234_0009_0031, 0], Some(source(6))),
        ([0x3_1234_0009_0031, 0], Some(source(7))),
        ([0x9_0007, 0], Some(DomainContexts { domain: 9 })),
        ([0x5_0009_0017, 0], Some(DomainContexts { domain: 9 })),
        ([0x37, 0], Some(Contexts)),
        ([0x12, 0], Some(Translations)),
        ([0x9_00e2, 0], Some(DomainTranslations { domain: 9 })),
        ([0x9_0032, 0x7000], Some(pages(0x7000, 0x7fff))),
        ([0x9_0032, 0x7041], Some(pages(0x6000, 0x7fff))),
        (
            [0x9_0032, 0x4000_0012],
            Some(pages(0x4000_0000, 0x7fff_ffff)),
        ),
        ([0x9_0026, 0], Some(DomainTranslations { domain: 9 })),
        ([0x5_0009_0036, 0x7001], Some(pages(0x6000, 0x7fff))),
        ([0x1234_0000_0003, 0x1001], None),
        ([0x5_1234_0008, 0x1801], None),
        ([0x04, 0], None),
        ([0x0003_f800_0014, 0], None),
    ];
    for wide in [false, true] {
        let mut bench = Bench::new(with_device_tlb());
        bench.queue_on(wide);
        for (descriptor, what) in cases {
            let mut descriptor = *descriptor;
            if descriptor[0] & 0x1f == 0x14 {
                // An index mask of all ones is too large; this one is the largest.
                descriptor[0] = 0x0003_7800_0014;
            }
            bench.run(&[&descriptor]);
            assert_eq!(
                bench.spaces.take().first(),
                what.as_ref(),
                "{descriptor:x?}"
            );
            assert_eq!(bench.r32(reg::FSTS), 0, "{descriptor:x?}");
        }
        let counters = bench.unit.counters();
        assert_eq!(counters.waits, cases.len() as u64);
        assert!(counters.wait_max_ns <= counters.wait_ns);
        let q = counters.queued;
        assert_eq!(
            (q.context_global, q.context_domain, q.context_device),
            (1, 1, 4)
        );
        assert_eq!((q.pasid, q.device_tlb, q.interrupt), (3, 2, 2));
        assert_eq!((q.iotlb_global, q.iotlb_domain, q.iotlb_pages), (1, 2, 4));
    }
}

/// Expects the error `info` at the descriptor at the head, and that the queue stands there until the
/// error is cleared and goes on with what then is at the head.
fn stands(bench: &mut Bench, descriptor: &[u64], info: u8) {
    let head = bench.tail;
    bench.put(descriptor);
    let waits = bench.waits + 1;
    bench.waits = waits;
    bench.put(&[u64::from(waits) << 32 | WAIT, STATUS]);
    bench.kick();
    assert_eq!(bench.r32(reg::FSTS), fsts::IQE, "{descriptor:x?}");
    assert_eq!(bench.r64(reg::IQERCD), u64::from(info), "{descriptor:x?}");
    assert_eq!(bench.r64(reg::IQH), head, "{descriptor:x?}");
    bench.kick();
    assert_eq!(bench.r64(reg::IQH), head, "{descriptor:x?}");
    assert_ne!(bench.load32(STATUS), waits);
    // What Linux does: a descriptor that does nothing in its place.
    bench.store(
        QUEUE + head,
        &[0x8000_0000_0045, 0, 0, 0][..if bench.wide { 4 } else { 2 }],
    );
    bench.w32(reg::FSTS, fsts::IQE);
    assert_eq!(bench.r32(reg::FSTS), 0, "{descriptor:x?}");
    assert_eq!(bench.r64(reg::IQERCD), 0);
    until(|| bench.load32(STATUS) == waits);
}

#[test]
fn reserved_bits_stop_the_queue() {
    // A valid descriptor of each type and the bits of its first two words that may be set.
    let types: &[([u64; 2], [u64; 2])] = &[
        ([0x11, 0], [0x0003_ffff_ffff_0e3f, 0]),
        ([0x07, 0], [0x000f_ffff_ffff_0e3f, 0]),
        ([0x12, 0], [0x0000_0000_ffff_0eff, 0xffff_ffff_ffff_f07f]),
        ([0x26, 0], [0x000f_ffff_ffff_0e3f, 0xffff_ffff_ffff_f07f]),
        ([0x03, 0], [0xfff0_ffff_001f_fe0f, 0xffff_ffff_ffff_f001]),
        ([0x08, 0], [u64::MAX, 0xffff_ffff_ffff_f801]),
        ([0x04, 0], [0x0000_ffff_f800_0e1f, 0]),
        ([0x45, 0], [0xffff_ffff_0000_0e7f, 0xffff_ffff_ffff_fffc]),
    ];
    let mut bench = Bench::new(with_device_tlb());
    bench.queue_on(true);
    for (valid, allowed) in types {
        for bit in 0..256 {
            let mut descriptor = [valid[0], valid[1], 0, 0];
            let allowed = allowed.get(bit / 64).copied().unwrap_or(0);
            if allowed >> (bit % 64) & 1 == 0 {
                descriptor[bit / 64] |= 1 << (bit % 64);
                stands(&mut bench, &descriptor, iqei::RESERVED);
            }
        }
    }
}

#[test]
fn wrong_values_stop_the_queue() {
    let mut bench = Bench::new(with_device_tlb());
    bench.queue_on(false);
    for descriptor in [
        // Granularities that do not exist.
        [0x01, 0],
        [0x02, 0],
        [0x06, 0],
        [0x16, 0],
        [0x27, 0],
        // Address and index masks beyond the capabilities.
        [0x32, 19],
        [0x36, 63],
        [0x8000_0014, 0],
    ] {
        stands(&mut bench, &descriptor, iqei::RESERVED);
    }
    for kind in [0, 9, 10, 0xf, 0x200, 0xe0f] {
        stands(&mut bench, &[kind, 0], iqei::TYPE);
    }
    assert_eq!(bench.unit.counters().queue_errors, 8 + 6);
}

#[test]
fn types_that_are_not_offered() {
    let mut bench = Bench::new(Options {
        scalable: false,
        interrupt_remapping: false,
        ..Options::default()
    });
    bench.queue_on(false);
    for kind in [3, 4, 0x26, 7, 8] {
        stands(&mut bench, &[kind, 0], iqei::TYPE);
    }
}

#[test]
fn a_wrong_tail_stops_the_queue() {
    let mut bench = Bench::new(Options::default());
    bench.queue_on(false);
    for tail in [0x1000, 0x7_fff0] {
        bench.w64(reg::IQT, tail);
        assert_eq!(bench.r32(reg::FSTS), fsts::IQE);
        assert_eq!(bench.r64(reg::IQERCD), u64::from(iqei::TAIL));
        assert_eq!(bench.r64(reg::IQH), 0);
        bench.w64(reg::IQT, 0);
        bench.w32(reg::FSTS, fsts::IQE);
        assert_eq!(bench.r32(reg::FSTS), 0);
    }
    bench.command(0, global::QIE);
    bench.queue_on(true);
    bench.w64(reg::IQT, 0x10);
    assert_eq!(bench.r64(reg::IQERCD), u64::from(iqei::TAIL_ALIGNMENT));
}

#[test]
fn small_descriptors_stop_the_queue_in_scalable_mode() {
    let mut bench = Bench::new(Options::default());
    bench.w64(reg::RTADDR, 1 << 10);
    bench.command(global::SRTP, 0);
    bench.queue_on(false);
    bench.put(&[0x45, 0]);
    bench.kick();
    assert_eq!(bench.r64(reg::IQERCD), u64::from(iqei::WIDTH));
    assert_eq!(bench.r64(reg::IQH), 0);
    bench.w32(reg::FSTS, fsts::IQE);
    assert_eq!(bench.r32(reg::FSTS), fsts::IQE, "it is still there");
    bench.command(0, global::QIE);
    bench.w32(reg::FSTS, fsts::IQE);
    bench.queue_on(true);
    bench.run(&[&[0x11, 0]]);
}

#[test]
fn a_queue_outside_memory() {
    for base in [RAM, RAM - 0x1000 + 0x1000 * 4096, !0xfff] {
        let bench = Bench::new(Options::default());
        bench.w64(reg::IQA, base | 7);
        bench.command(global::QIE, 0);
        bench.w64(reg::IQT, 0x7_fff0);
        assert_eq!(bench.r64(reg::IQERCD), u64::from(iqei::FETCH));
        assert_eq!(bench.r64(reg::IQH), 0);
    }
}

#[test]
fn the_largest_queue_and_its_end() {
    let mut bench = Bench::new(Options::default());
    bench.w64(reg::IQA, QUEUE | 7);
    bench.command(global::QIE, 0);
    for at in (0..0x8_0000).step_by(16) {
        bench.store(QUEUE + at, &[0x45, 0]);
    }
    bench.store(QUEUE + 0x7_fff0, &[0x12, 0]);
    bench.store(QUEUE, &[0x11, 0]);
    bench.w64(reg::IQT, 0x7_fff0);
    until(|| bench.r64(reg::IQH) == 0x7_fff0);
    assert_eq!(bench.spaces.take(), [Invalidation::Contexts]);
    bench.store(QUEUE, &[7 << 32 | WAIT, STATUS]);
    bench.w64(reg::IQT, 0x10);
    until(|| bench.load32(STATUS) == 7);
    assert_eq!(bench.r64(reg::IQH), 0x10);
    assert_eq!(bench.spaces.take(), [Invalidation::Translations]);
    bench.waits = 0;
    assert_eq!(bench.unit.counters().waits, 0x8000 - 2 + 1);
}

#[test]
fn iqa_stays_while_the_queue_is_on() {
    let mut bench = Bench::new(Options::default());
    bench.queue_on(false);
    bench.w64(reg::IQA, 0);
    assert_eq!(bench.r64(reg::IQA), QUEUE);
    bench.run(&[]);
    bench.command(0, global::QIE);
    assert_eq!(bench.r64(reg::IQH), 0);
    bench.w64(reg::IQA, 0x5000);
    assert_eq!(bench.r64(reg::IQA), 0x5000);
}

#[test]
fn a_wait_stands_until_the_spaces_have_let_go() {
    let mut bench = Bench::new(Options::default());
    bench.queue_on(false);
    bench.spaces.hold(true);
    // Nothing to wait for.
    bench.run(&[]);
    let head = bench.tail;
    bench.put(&[0x12, 0]);
    bench.put(&[77 << 32 | WAIT, STATUS]);
    bench.put(&[0x11, 0]);
    // Returns although the wait cannot complete: the vCPU goes on.
    bench.kick();
    assert_eq!(bench.r64(reg::IQH), head + 16);
    // More work behind it changes nothing.
    bench.put(&[78 << 32 | WAIT, STATUS + 4]);
    bench.kick();
    until(|| bench.unit.counters().waits_blocked == 1);
    assert_eq!(bench.r64(reg::IQH), head + 16);
    assert_ne!(bench.load32(STATUS), 77);
    assert_eq!(bench.spaces.take(), [Invalidation::Translations]);
    bench.spaces.hold(false);
    until(|| bench.load32(STATUS + 4) == 78);
    assert_eq!(bench.load32(STATUS), 77);
    assert_eq!(bench.r64(reg::IQH), bench.tail);
    assert_eq!(bench.spaces.take(), [Invalidation::Contexts]);
}

/// A unit whose thread waits for the spaces, at a wait descriptor behind an invalidation.
fn standing() -> Bench {
    let mut bench = Bench::new(Options::default());
    bench.queue_on(false);
    bench.spaces.hold(true);
    bench.put(&[0x12, 0]);
    bench.put(&[77 << 32 | WAIT, STATUS]);
    bench.kick();
    until(|| bench.unit.counters().waits_blocked == 1);
    bench
}

#[test]
fn a_queue_that_is_turned_off_forgets_its_wait() {
    let mut bench = standing();
    bench.command(0, global::QIE);
    assert_eq!(bench.r64(reg::IQH), 0);
    bench.spaces.hold(false);
    bench.store(QUEUE, &[0; 4]);
    bench.queue_on(false);
    bench.run(&[&[0x11, 0]]);
    assert_eq!(bench.unit.counters().waits, 1);
}

#[test]
fn a_unit_is_dropped_while_a_wait_stands() {
    let bench = standing();
    let Bench {
        unit, spaces, ram, ..
    } = bench;
    drop(unit);
    spaces.hold(false);
    let _: u32 = ram.read_obj(GuestAddress(STATUS)).unwrap();
}

/// Whoever drops the unit may be the one who ends the I/O that its thread waits for.
#[test]
fn a_unit_is_dropped_while_the_wait_of_an_old_queue_stands() {
    let bench = standing();
    bench.command(0, global::QIE);
    let Bench { unit, spaces, .. } = bench;
    let dropped = AtomicBool::new(false);
    std::thread::scope(|scope| {
        scope.spawn(|| {
            drop(unit);
            dropped.store(true, Ordering::SeqCst);
        });
        let deadline = Instant::now() + Duration::from_secs(5);
        while !dropped.load(Ordering::SeqCst) && Instant::now() < deadline {
            std::thread::yield_now();
        }
        let in_time = dropped.load(Ordering::SeqCst);
        spaces.hold(false);
        assert!(in_time, "the drop waits for I/O");
    });
}

#[test]
fn a_status_write_outside_memory_goes_nowhere() {
    let mut bench = Bench::new(Options::default());
    bench.queue_on(false);
    for address in [RAM, 0xfee0_0000, !3] {
        bench.run(&[&[77 << 32 | WAIT, address]]);
    }
    assert_eq!(bench.r32(reg::FSTS), 0);
    assert_eq!(bench.delivered(), []);
}

#[test]
fn a_wait_raises_the_completion_event() {
    let mut bench = Bench::new(Options::default());
    bench.queue_on(false);
    bench.w32(reg::IEDATA, 0x41);
    bench.w32(reg::IEADDR, 0xfee0_3000);
    bench.w32(reg::IEUADDR, 0x0000_0100);
    let sent = message(0x0000_0100_fee0_3000, 0x41);
    // Masked: pending.
    bench.run(&[&[0x15, 0]]);
    assert_eq!(bench.r32(reg::ICS), 1);
    assert_eq!(bench.r32(reg::IECTL), event::IM | event::IP);
    assert_eq!(bench.delivered(), []);
    bench.w32(reg::IECTL, 0);
    assert_eq!(bench.r32(reg::IECTL), 0);
    assert_eq!(bench.delivered(), [sent]);
    // Not serviced: no new condition.
    bench.run(&[&[0x15, 0]]);
    assert_eq!(bench.delivered(), []);
    bench.w32(reg::ICS, 0);
    assert_eq!(bench.r32(reg::ICS), 1, "cleared by writing one");
    bench.w32(reg::ICS, 1);
    assert_eq!(bench.r32(reg::ICS), 0);
    bench.run(&[&[0x15, 0]]);
    assert_eq!(bench.delivered(), [sent]);
    // Serviced while masked: not pending any more.
    bench.w32(reg::ICS, 1);
    bench.w32(reg::IECTL, event::IM);
    bench.run(&[&[0x15, 0]]);
    bench.w32(reg::ICS, 1);
    assert_eq!(bench.r32(reg::IECTL), event::IM);
    bench.w32(reg::IECTL, 0);
    assert_eq!(bench.delivered(), []);
}

/// Context entries of scalable mode name no domain: none of them may outlive the invalidation.
#[test]
fn a_domain_selective_context_invalidation_in_scalable_mode_is_global() {
    let mut bench = Bench::new(Options::default());
    bench.queue_on(true);
    bench.run(&[&[0x9_0021, 0]]);
    bench.w64(reg::RTADDR, 1 << 10);
    bench.command(global::SRTP, 0);
    bench.run(&[&[0x9_0021, 0], &[0x9_0007, 0]]);
    let domain = Invalidation::DomainContexts { domain: 9 };
    assert_eq!(
        bench.spaces.take(),
        [domain, Invalidation::Contexts, domain]
    );
    assert_eq!(bench.unit.counters().queued.context_domain, 2);
}

use super::*;
use crate::vtd::spec::registers::global;

const IVA: u64 = 0x500;
const IOTLB: u64 = 0x508;
const FRCD: u64 = 0x600;

#[test]
fn every_register_after_reset() {
    let check = |bench: &Bench| {
        let options = Options::default();
        for offset in (0..reg::LEN + 0x100).step_by(4) {
            let expected = match offset {
                0x00 => 0x40,
                0x08 => options.capability() as u32,
                0x0c => (options.capability() >> 32) as u32,
                0x10 => options.extended_capability() as u32,
                0x14 => (options.extended_capability() >> 32) as u32,
                // Fault and invalidation events are masked.
                0x38 | 0xa0 => 0x8000_0000,
                _ => 0,
            };
            assert_eq!(bench.r32(offset), expected, "{offset:#x}");
        }
    };
    let mut bench = Bench::new(Options::default());
    check(&bench);
    for offset in (0..reg::LEN).step_by(8) {
        bench.w64(offset, 0x5a5a_a5a5_ffff_fff0);
    }
    bench.queue_on(false);
    bench.unit.reset();
    check(&bench);
    let legacy = Bench::new(Options {
        scalable: false,
        ..Options::default()
    });
    assert_eq!(legacy.r32(reg::VER), 0x10);
}

/// All ones are written to each register, four and eight bytes at a time; what sticks is compared with
/// the specification's layout.
#[test]
fn bits_that_can_be_written() {
    // Host addresses have 46 bits.
    let sticky: &[(u64, u64)] = &[
        (reg::CAP, Options::default().capability()),
        (reg::ECAP, Options::default().extended_capability()),
        (reg::RTADDR, 0x0000_3fff_ffff_fc00),
        (0x30, 0),
        // FECTL: only the mask. FEDATA: sixteen bits.
        (reg::FECTL, 0x0000_ffff_8000_0000),
        (reg::FEADDR, 0xffff_ffff_ffff_fffc),
        (0x48, 0),
        (0x60, 0),
        (reg::IQH, 0),
        (reg::IQT, 0x7_fff0),
        (reg::IQA, 0x0000_3fff_ffff_f807),
        (0x98, 0),
        (reg::IECTL, 0x0000_ffff_8000_0000),
        (reg::IEADDR, 0xffff_ffff_ffff_fffc),
        (reg::IQERCD, 0),
        (reg::IRTA, 0x0000_3fff_ffff_f80f),
        // Write-only.
        (IVA, 0),
        (FRCD, 0),
        (FRCD + 8, 0),
    ];
    let bench = Bench::new(Options::default());
    for &(offset, expected) in sticky {
        bench.w64(offset, u64::MAX);
        assert_eq!(bench.r64(offset), expected, "{offset:#x}");
        bench.w64(offset, 0);
        bench.w32(offset + 4, u32::MAX);
        bench.w32(offset, u32::MAX);
        assert_eq!(bench.r64(offset), expected, "{offset:#x}");
    }
    // The low halves of the two that do something when the high half is written.
    bench.w32(reg::CCMD, u32::MAX);
    assert_eq!(bench.r64(reg::CCMD), 0xffff_ffff);
    bench.w32(IOTLB, u32::MAX);
    assert_eq!(bench.r64(IOTLB), 0);

    let small = Bench::new(Options {
        scalable: false,
        interrupt_remapping: false,
        ..Options::default()
    });
    for (offset, expected) in [
        (reg::IQA, 0x0000_3fff_ffff_f007),
        (reg::IRTA, 0),
        (reg::FEADDR, 0xffff_fffc),
        (reg::IEADDR, 0xffff_fffc),
    ] {
        small.w64(offset, u64::MAX);
        assert_eq!(small.r64(offset), expected, "{offset:#x}");
    }
    small.w32(reg::GCMD, global::IRE | global::SIRTP | global::CFI);
    assert_eq!(small.r32(reg::GSTS), 0);
}

#[test]
fn odd_accesses_do_no_harm() {
    let bench = Bench::new(Options::default());
    let cap = Options::default().capability().to_le_bytes();
    for start in 0..8 {
        for len in 0..=(8 - start) {
            let mut data = vec![0xee; len];
            bench.unit.read(reg::CAP + start as u64, &mut data);
            assert_eq!(data, cap[start..start + len]);
        }
    }
    for (offset, len) in [
        (0x20, 1),
        (0x20, 2),
        (0x21, 4),
        (0x22, 4),
        (0x24, 8),
        (0x20, 3),
    ] {
        bench.unit.write(offset, &[0xff; 8][..len]);
        assert_eq!(bench.r64(reg::RTADDR), 0, "{offset:#x} {len}");
    }
    for offset in [reg::LEN, u64::MAX - 7, u64::MAX - 3, u64::MAX] {
        bench.unit.write(offset, &[0xff; 8]);
        bench.unit.write(offset, &[0xff; 4]);
        bench.unit.read(offset, &mut [0; 8]);
    }
}

#[test]
fn commands_show_in_the_status() {
    let bench = Bench::new(Options::default());
    bench.w32(reg::GCMD, global::SRTP);
    assert_eq!(bench.r32(reg::GSTS), global::SRTP);
    assert_eq!(bench.r32(reg::GCMD), 0, "write-only");
    bench.w32(reg::GCMD, global::SIRTP);
    // Write buffer flushing is not needed and leaves nothing behind.
    bench.w32(reg::GCMD, global::WBF | 1 << 29 | 1 << 28 | 0x7f_ffff);
    let pointers = global::SRTP | global::SIRTP;
    assert_eq!(bench.r32(reg::GSTS), pointers);
    for bit in [global::TE, global::QIE, global::IRE, global::CFI] {
        bench.w32(reg::GCMD, bit);
        assert_eq!(bench.r32(reg::GSTS), pointers | bit);
        bench.w32(reg::GCMD, 0);
        assert_eq!(bench.r32(reg::GSTS), pointers);
    }
}

#[test]
fn translation_is_on_when_nothing_in_flight_is_older() {
    let bench = Bench::new(Options::default());
    for set in [true, false] {
        let (before, after) = (u32::from(!set) * global::TE, u32::from(set) * global::TE);
        bench.spaces.hold(true);
        bench.command(after, before);
        assert_eq!(bench.r32(reg::GSTS) & global::TE, before);
        assert_eq!(bench.spaces.take(), [Invalidation::Everything]);
        bench.spaces.hold(false);
        assert_eq!(bench.r32(reg::GSTS) & global::TE, after);
    }
}

#[test]
fn context_cache_by_register() {
    let bench = Bench::new(Options::default());
    let source = |mask| Invalidation::SourceContexts {
        source: SourceId(0x0018),
        mask,
    };
    for (request, what, actual) in [
        (1 << 61, Invalidation::Contexts, 1),
        (2 << 61 | 7, Invalidation::DomainContexts { domain: 7 }, 2),
        (3 << 61 | 0x0018_0007, source(0), 3),
        (3 << 61 | 1 << 32 | 0x0018_0007, source(4), 3),
        (3 << 61 | 2 << 32 | 0x0018_0007, source(6), 3),
        (3 << 61 | 3 << 32 | 0x0018_0007, source(7), 3),
    ] {
        bench.spaces.hold(true);
        bench.w64(reg::CCMD, 1 << 63 | request);
        assert_eq!(bench.spaces.take(), [what]);
        assert_eq!(bench.r64(reg::CCMD) >> 63, 1, "not drained");
        bench.spaces.hold(false);
        assert_eq!(bench.r64(reg::CCMD), request | actual << 59);
    }
    // Written in halves; a reserved granularity is ignored and says so.
    bench.w32(reg::CCMD, 0);
    bench.w32(reg::CCMD + 4, 1 << 31);
    assert_eq!(bench.r64(reg::CCMD), 0);
    assert_eq!(bench.spaces.take(), []);
    let counters = bench.unit.counters().registers;
    let counts = (
        counters.context_global,
        counters.context_domain,
        counters.context_device,
    );
    assert_eq!(counts, (1, 1, 4));
}

#[test]
fn iotlb_by_register() {
    let bench = Bench::new(Options::default());
    let pages = |start, last| Invalidation::PageTranslations {
        domain: 5,
        start: crate::Iova(start),
        last: crate::Iova(last),
    };
    let domain = 5 << 32;
    for (address, request, what, actual) in [
        (0, 1 << 60, Invalidation::Translations, 1),
        (
            0,
            2 << 60 | domain,
            Invalidation::DomainTranslations { domain: 5 },
            2,
        ),
        (
            0x1234_5000,
            3 << 60 | domain,
            pages(0x1234_5000, 0x1234_5fff),
            3,
        ),
        // Hint bit set; four pages, the address rounded down.
        (
            0x1234_5042,
            3 << 60 | domain,
            pages(0x1234_4000, 0x1234_7fff),
            3,
        ),
        (!0xfff, 3 << 60 | domain, pages(!0xfff, u64::MAX), 3),
    ] {
        bench.spaces.hold(true);
        bench.w64(IVA, address);
        bench.w64(IOTLB, 1 << 63 | 3 << 48 | request);
        assert_eq!(bench.spaces.take(), [what]);
        assert_eq!(bench.r64(IOTLB) >> 63, 1, "not drained");
        bench.spaces.hold(false);
        assert_eq!(bench.r64(IOTLB), 3 << 48 | request | actual << 57);
    }
    // Reserved granularity; an address mask beyond CAP.MAMV.
    for (address, request) in [(0, 0), (19, 3 << 60)] {
        bench.w64(IVA, address);
        bench.w64(IOTLB, 1 << 63 | request);
        assert_eq!(bench.r64(IOTLB), request);
        assert_eq!(bench.spaces.take(), []);
    }
    let counters = bench.unit.counters().registers;
    let counts = (
        counters.iotlb_global,
        counters.iotlb_domain,
        counters.iotlb_pages,
    );
    assert_eq!(counts, (1, 1, 3));
}

#[test]
fn invalidation_by_register_is_refused_beside_the_queue_and_in_scalable_mode() {
    let mut bench = Bench::new(Options::default());
    let refused = |bench: &Bench| {
        bench.spaces.take();
        bench.w64(reg::CCMD, 1 << 63 | 1 << 61);
        assert_eq!(bench.r64(reg::CCMD), 1 << 61);
        bench.w64(IOTLB, 1 << 63 | 1 << 60);
        assert_eq!(bench.r64(IOTLB), 1 << 60);
        assert_eq!(bench.spaces.take(), []);
    };
    bench.queue_on(false);
    refused(&bench);
    bench.command(0, global::QIE);
    bench.w64(reg::RTADDR, 1 << 10);
    bench.command(global::SRTP, 0);
    refused(&bench);
}

#[test]
fn reset_turns_all_off_and_drops_the_caches() {
    let mut bench = Bench::new(Options::default());
    bench.queue_on(false);
    bench.command(global::TE, 0);
    bench.command(global::IRE, 0);
    bench.spaces.hold(true);
    bench.put(&[0x11, 0]);
    bench.put(&[0x25, STATUS]);
    bench.kick();
    assert_eq!(bench.r64(reg::IQH), 16);
    bench.spaces.take();
    bench.unit.reset();
    assert_eq!(bench.spaces.take(), [Invalidation::Everything]);
    bench.spaces.hold(false);
    assert_eq!(bench.r32(reg::GSTS), 0);
    bench.queue_on(false);
    bench.waits = 0x100;
    bench.run(&[&[0x12, 0]]);
    assert_eq!(bench.spaces.take(), [Invalidation::Translations]);
}

//! What good tables mean.

use super::*;

/// FPD of any entry on the way hides what happens from there on, and nothing before (7.1.3).
#[test]
fn fault_processing_disable() {
    let ram = ram();
    let suppressed = |mut bed: Bed<'_>, at: fn(&mut Bed<'_>) -> Gpa, spoil: fn(&mut Bed<'_>)| {
        let at = at(&mut bed);
        bed.change(at, 0, 2);
        spoil(&mut bed);
        bed.fault().suppressed
    };
    let context = |bed: &mut Bed<'_>| bed.context(0);
    let unmapped = |bed: &mut Bed<'_>| bed.iova = UNMAPPED;
    let not_present = |bed: &mut Bed<'_>| {
        let at = bed.context(0);
        bed.change(at, 1, 0);
    };
    assert!(suppressed(Bed::legacy(&ram), context, unmapped));
    assert!(suppressed(Bed::legacy(&ram), context, not_present));
    assert!(!suppressed(Bed::legacy(&ram), context, |bed| {
        bed.change(bed.root_entry(), 0, 2);
    }));

    let directory = |bed: &mut Bed<'_>| bed.directory();
    let pasid = |bed: &mut Bed<'_>| bed.pasid(0);
    for at in [context, directory, pasid] {
        assert!(suppressed(Bed::second(&ram), at, unmapped));
        assert!(suppressed(Bed::first(&ram), at, unmapped));
        assert!(suppressed(Bed::first(&ram), at, |bed| {
            let at = bed.pasid(0);
            bed.change(at, 1, 0);
        }));
    }
    assert!(!suppressed(Bed::second(&ram), pasid, not_present));
    assert!(!suppressed(Bed::second(&ram), directory, not_present));

    let mut bed = Bed::legacy(&ram);
    let at = bed.context(0);
    bed.change(at, 0, 2);
    let (context, ..) = bed.translate().unwrap();
    assert!(context.fault_processing_disable);
    assert!(beyond_width(bed.root, &context).suppressed);
}

#[test]
fn abort_dma_blocks_and_records_nothing() {
    let ram = ram();
    let mut bed = Bed::legacy(&ram);
    bed.root = Root::from_register(0xc00);
    let fault = bed.fault();
    assert_eq!(fault.reason, FaultReason::TABLE_MODE_ABORT);
    assert!(fault.suppressed);
    assert_eq!(fault.levels, Levels(0));
}

#[test]
fn what_translates_and_how_many_entries_it_takes() {
    let beds: [(Make, u32); 3] = [
        (|ram| Bed::legacy(ram), 2),
        (|ram| Bed::second(ram), 4),
        (|ram| Bed::first(ram), 4),
    ];
    for (bed, above) in beds {
        let ram = ram();
        let mut bed = bed(&ram);
        bed.access = Access::Write;
        for (iova, page, gpa, shift, levels) in [
            (PAGE.0 + 0x123, PAGE.0, TARGET, 12, 4),
            (LARGE.0 + 0x1f_ffff, LARGE.0, 2 * MIB, 21, 3),
            (HUGE.0 + 0x3fff_ffff, HUGE.0, 1 << 30, 30, 2),
        ] {
            bed.iova = Iova(iova);
            let (context, mapping, read) = bed.translate().unwrap();
            assert_eq!(context.domain, DOMAIN);
            let expected = Mapping {
                iova: Iova(page),
                gpa: Gpa(gpa),
                shift,
                read: true,
                write: true,
            };
            assert_eq!(mapping, expected);
            assert_eq!(read, Levels(above + levels));
        }
    }
}

/// Bits that software may use, and fields that do not matter, change nothing.
#[test]
fn ignored_bits() {
    let ram = ram();
    let good: [fn(&mut Bed<'_>); 6] = [
        |bed| {
            let at = bed.context(1);
            bed.change(at, 0, 0x78);
        },
        |bed| bed.change(bed.entry(12), 0, 0x3ff << 52 | 1 << 63 | 0x7c | 1 << 7),
        |bed| bed.change(bed.entry(21), 0, 0x3ff << 52 | 1 << 63 | 0x7c | 0x700),
        |bed| bed.change(bed.entry(12), 0, 1 << 11),
        |bed| {
            // Pass-through ignores the page-table pointer.
            let at = bed.context(0);
            bed.change(at, 0, 0x8 | 0xffff << 48);
        },
        |bed| {
            bed.options.address_widths.bits_57 = true;
            bed.iova = Iova(PAGE.0 + 0xfff);
        },
    ];
    for (index, change) in good.iter().enumerate() {
        let mut bed = Bed::legacy(&ram);
        change(&mut bed);
        bed.translate()
            .unwrap_or_else(|fault| panic!("{index}: {fault:?}"));
    }
    let good: [fn(&mut Bed<'_>); 5] = [
        |bed| bed.change(bed.entry(12), 0, 0xfff << 52 | 0xf98),
        |bed| bed.change(bed.entry(21), 0, 0xfff << 52 | 0xf58),
        |bed| {
            bed.iova = LARGE;
            bed.change(bed.entry(21), 0, 0xfff << 52 | 1 << 12);
        },
        |bed| {
            // The second stage's fields do not matter to the first; NXE, SMEP and memory types are
            // ignored.
            let at = bed.pasid(0);
            bed.change(at, 0, 0xffff << 48 | 7 << 2);
            let at = bed.pasid(1);
            bed.change(at, 0, 0xffff_ffff << 32 | 0xf << 28 | 1 << 27);
            let at = bed.pasid(2);
            bed.change(at, 0, 3 << 5);
        },
        |bed| {
            // An upper half that is spoilt is another table's.
            bed.change(Gpa(bed.root_entry().0 + 8), 0, 0xfff);
        },
    ];
    for (index, change) in good.iter().enumerate() {
        let mut bed = Bed::first(&ram);
        change(&mut bed);
        bed.translate()
            .unwrap_or_else(|fault| panic!("{index}: {fault:?}"));
    }
}

#[test]
fn every_source_has_its_own_entry() {
    let ram = ram();
    for scalable_mode in [false, true] {
        let mut memory = RamTables::new(&ram, Gpa(0x1000)..Gpa(4 * MIB));
        let roots = if scalable_mode {
            RootTable::scalable(&mut memory).unwrap()
        } else {
            RootTable::legacy(&mut memory).unwrap()
        };
        let sources = [
            0x0000, 0x0007, 0x0078, 0x007f, 0x0080, 0x00ff, 0x0100, 0xffff,
        ];
        for (source, domain) in sources.into_iter().zip(1..) {
            let entry = if scalable_mode {
                scalable::pass_through(domain).to_vec()
            } else {
                legacy::pass_through(2, domain).to_vec()
            };
            roots.set(&mut memory, SourceId(source), &entry).unwrap();
        }
        for (source, domain) in sources.into_iter().zip(1..) {
            let (found, _) =
                context(&ram, &Options::default(), roots.root(), SourceId(source)).unwrap();
            assert_eq!(
                found,
                Context {
                    domain,
                    stage: Stage::PassThrough { width: 46 },
                    fault_processing_disable: false,
                }
            );
        }
        let fault = context(&ram, &Options::default(), roots.root(), SourceId(0x200)).unwrap_err();
        let reason = if scalable_mode { 0x39 } else { 0x1 };
        assert_eq!((fault.reason.0, fault.levels), (reason, Levels(1)));
    }
}

/// RID_PASID selects the PASID directory entry and the PASID entry.
#[test]
fn rid_pasid() {
    let ram = ram();
    let mut bed = Bed::second(&ram);
    let table = bed.memory.page().unwrap();
    let directory = bed.directory();
    bed.memory.store(Gpa(directory.0 + 511 * 8), table.0 | 1);
    let entry = scalable::pass_through(99);
    for (offset, qword) in entry.iter().enumerate() {
        bed.memory
            .store(Gpa(table.0 + 63 * 64 + 8 * offset as u64), *qword);
    }
    let at = bed.context(1);
    bed.change(at, 0, 511 << 6 | 63);
    assert_eq!(bed.translate().unwrap().0.domain, 99);
}

/// What surrounds the interrupt range in a large page stays usable, in pieces.
#[test]
fn a_large_page_over_the_interrupt_range_is_cut() {
    let ram = ram();
    let mut bed = Bed::legacy(&ram);
    bed.iova = HUGE;
    bed.change(bed.entry(30), !0xfff, 0xc000_0000 | 1 << 7);
    for (offset, piece) in [
        (0, Some(0xc000_0000)),
        (0x3edf_ffff, Some(0xfedf_f000)),
        (0x3ee0_0000, None),
        (0x3eef_ffff, None),
        (0x3ef0_0000, Some(0xfef0_0000)),
    ] {
        bed.iova = Iova(HUGE.0 + offset);
        match (piece, bed.translate()) {
            (Some(gpa), Ok((_, mapping, _))) => {
                assert_eq!((mapping.gpa, mapping.shift), (Gpa(gpa), 12));
                assert_eq!(mapping.iova, Iova(bed.iova.0 & !0xfff));
            }
            (None, Err(fault)) => assert_eq!(fault.reason.0, 0xe),
            (piece, result) => panic!("{offset:#x}: {piece:?} {result:?}"),
        }
    }
    bed.iova = HUGE;
    bed.change(bed.entry(30), !0xfff, 0x8000_0000 | 1 << 7);
    assert_eq!(bed.translate().unwrap().1.shift, 30);
}

/// Second stage without SSADE, and legacy mode, leave the tables alone.
#[test]
fn accessed_and_dirty_bits() {
    let entries = |bed: &Bed<'_>| [39, 30, 21, 12].map(|shift| bed.memory.load(bed.entry(shift)));
    let beds: [Make; 2] = [|ram| Bed::legacy(ram), |ram| Bed::second(ram)];
    for bed in beds {
        let ram = ram();
        let mut bed = bed(&ram);
        let before = entries(&bed);
        bed.access = Access::Write;
        bed.translate().unwrap();
        assert_eq!(entries(&bed), before);
    }
    for format in [Format::First, Format::Second] {
        let ram = ram();
        let mut bed = Bed::scalable(&ram, format);
        let (accessed, dirty) = match format {
            Format::First => (1 << 5, 1 << 6),
            Format::Second => {
                let at = bed.pasid(0);
                bed.change(at, 0, 1 << 9);
                (1 << 8, 1 << 9)
            }
        };
        let mut expected = entries(&bed).map(|entry| entry | accessed);
        let (_, mapping, _) = bed.translate().unwrap();
        assert_eq!(entries(&bed), expected);
        assert!(mapping.read && !mapping.write, "clean: {mapping:?}");

        bed.access = Access::Write;
        let (_, mapping, _) = bed.translate().unwrap();
        expected[3] |= dirty;
        assert_eq!(entries(&bed), expected);
        assert!(mapping.write);

        bed.access = Access::Read;
        assert!(bed.translate().unwrap().1.write, "dirty already");

        // A request that faults leaves no trace.
        bed.iova = READ_ONLY;
        bed.access = Access::Write;
        let before = entries(&bed);
        bed.fault();
        assert_eq!(entries(&bed), before);
    }
}

#[test]
fn without_snooping_walks_bits_that_are_set_are_enough() {
    let ram = ram();
    let mut bed = Bed::first(&ram);
    bed.access = Access::Write;
    bed.translate().unwrap();
    let at = bed.pasid(1);
    bed.change(at, 1 << 23, 0);
    bed.options.scalable_coherent = false;
    bed.translate().unwrap();
}

#[test]
fn supervisor_requests() {
    let ram = ram();
    let mut bed = Bed::first(&ram);
    let at = bed.context(1);
    bed.change(at, 0, 1 << 20);
    let at = bed.pasid(2);
    bed.change(at, 0, 1);
    bed.change(bed.entry(12), 4, 0);
    bed.translate().unwrap();
    // Without WPE a supervisor writes to read-only pages.
    bed.iova = READ_ONLY;
    bed.access = Access::Write;
    assert!(bed.translate().unwrap().1.write);
}

#[test]
fn canonical_addresses_of_both_halves() {
    let ram = ram();
    let mut bed = Bed::first(&ram);
    bed.options.first_stage_5_level = true;
    for levels in [4, 5] {
        let pages = PageTable::new(&mut bed.memory, Format::First, levels).unwrap();
        let entry = scalable::first_stage(&pages, DOMAIN);
        bed.roots.set(&mut bed.memory, DEVICE, &entry).unwrap();
        let top = 1_u64 << (11 + 9 * levels);
        for iova in [0, top - 0x1000, top.wrapping_neg(), !0xfff] {
            bed.iova = Iova(iova);
            assert_eq!(bed.fault().reason, FaultReason::FS_NOT_PRESENT);
            pages
                .map(&mut bed.memory, bed.iova, Gpa(TARGET), 12, Permission::READ)
                .unwrap();
            assert_eq!(bed.translate().unwrap().1.iova, bed.iova);
        }
        for iova in [top, top.wrapping_neg() - 1] {
            bed.iova = Iova(iova);
            assert_eq!(bed.fault().reason, FaultReason::NOT_CANONICAL);
        }
    }
}

#[test]
fn identity_without_page_tables() {
    let ram = ram();
    let bed = Bed::legacy(&ram);
    let context = Context {
        domain: 0,
        stage: Stage::Off,
        fault_processing_disable: false,
    };
    let (mapping, levels) = page(
        &ram,
        &bed.options,
        bed.root,
        &context,
        Iova(u64::MAX),
        Access::Write,
    )
    .unwrap();
    assert_eq!(mapping.iova.0, mapping.gpa.0);
    assert_eq!(levels, Levels(0));
}

#[test]
fn the_builder_says_what_it_cannot_do() {
    let ram = ram();
    let mut memory = RamTables::new(&ram, Gpa(0x1000)..Gpa(0x4000));
    let pages = PageTable::new(&mut memory, Format::Second, 3).unwrap();
    let map = |memory: &mut RamTables<'_>, iova, shift| {
        pages.map(memory, Iova(iova), Gpa(0), shift, Permission::READ)
    };
    map(&mut memory, 0, 30).unwrap();
    assert_eq!(map(&mut memory, 0, 12), Err(BuildError::LargerPage));
    map(&mut memory, 1 << 30, 12).unwrap();
    assert_eq!(map(&mut memory, 2 << 30, 21), Err(BuildError::NoPage));
    assert_eq!(RootTable::legacy(&mut memory), None);
}

use super::*;
use crate::vtd::build::{Format, PageTable, Permission, RamTables, RootTable, legacy, scalable};
use crate::vtd::spec::registers::{fsts, global};
use crate::{Access, DmaError, FaultReason, Gpa, Iova, Remapper, Stage};

const FRCD: u64 = 0x600;
const DEVICE: SourceId = SourceId(0x0018);
const PAGE: u64 = 0x5000;

/// A page at [`PAGE`], readable, for [`DEVICE`] in domain 5; translation on.
fn bench(mode: impl FnOnce(&mut RamTables<'_>) -> RootTable) -> Bench {
    let bench = Bench::new(Options::default());
    let mut memory = RamTables::new(&bench.ram, Gpa(0x1000)..Gpa(0x4_0000));
    let roots = mode(&mut memory);
    bench.w64(reg::RTADDR, roots.register());
    bench.command(global::SRTP, 0);
    bench.command(global::TE, 0);
    bench
}

fn pages(memory: &mut RamTables<'_>, format: Format) -> PageTable {
    let pages = PageTable::new(memory, format, 4).unwrap();
    pages
        .map(memory, Iova(PAGE), Gpa(0x9_0000), 12, Permission::READ)
        .unwrap();
    pages
}

fn legacy_mode(memory: &mut RamTables<'_>) -> RootTable {
    let pages = pages(memory, Format::Second);
    let roots = RootTable::legacy(memory).unwrap();
    let entry = legacy::second_stage(&pages, 5);
    roots.set(memory, DEVICE, &entry).unwrap();
    roots
}

fn scalable_mode(memory: &mut RamTables<'_>) -> RootTable {
    let pages = pages(memory, Format::First);
    let roots = RootTable::scalable(memory).unwrap();
    let entry = scalable::first_stage(&pages, 5);
    roots.set(memory, DEVICE, &entry).unwrap();
    roots
}

#[test]
fn translation_and_its_faults() {
    for (mode, reasons) in [
        (
            bench(legacy_mode),
            [FaultReason::WRITE_DENIED, FaultReason::CONTEXT_NOT_PRESENT],
        ),
        (
            bench(scalable_mode),
            [
                FaultReason::SM_WRITE_DENIED,
                FaultReason::SM_CONTEXT_NOT_PRESENT,
            ],
        ),
    ] {
        let unit = &mode.unit;
        let iova = Iova(PAGE + 0x123);
        let context = unit.context(DEVICE, iova, Access::Read).unwrap();
        assert_eq!(context.domain, 5);
        let mapping = unit.walk(DEVICE, &context, iova, Access::Read).unwrap();
        assert_eq!((mapping.gpa, mapping.shift), (Gpa(0x9_0000), 12));
        assert_eq!(mode.r32(reg::FSTS), 0);
        assert_eq!(
            unit.walk(DEVICE, &context, iova, Access::Write),
            Err(DmaError::Fault(iova, reasons[0]))
        );
        assert_eq!(
            unit.context(SourceId(0x20), iova, Access::Read),
            Err(DmaError::Fault(iova, reasons[1]))
        );
        assert_eq!(mode.r32(reg::FSTS), fsts::PPF);
        let record = |index: u64| (mode.r64(FRCD + 16 * index), mode.r64(FRCD + 16 * index + 8));
        let high = |reason: FaultReason, source: SourceId| {
            1 << 63 | u64::from(reason.0) << 32 | u64::from(source.0)
        };
        assert_eq!(record(0), (PAGE, high(reasons[0], DEVICE)));
        let read = 1 << 62;
        assert_eq!(record(1), (PAGE, read | high(reasons[1], SourceId(0x20))));
        let counters = unit.counters();
        assert_eq!((counters.contexts_read, counters.walks), (2, 2));
        assert_eq!((counters.levels_read, counters.faults), (8, 2));
    }
}

#[test]
fn off_and_on_again() {
    let bench = bench(legacy_mode);
    bench.command(0, global::TE);
    let unit = &bench.unit;
    let off = unit.context(SourceId(0x20), Iova(0), Access::Read).unwrap();
    assert_eq!((off.stage, off.domain), (Stage::Off, 0));
    // A new root table counts when it is set, not when its address is written.
    bench.w64(reg::RTADDR, 3 << 10);
    bench.command(global::TE, 0);
    assert!(unit.context(DEVICE, Iova(0), Access::Read).is_ok());
    bench.command(global::SRTP, 0);
    // Abort-DMA mode blocks all and records nothing.
    assert_eq!(
        unit.context(DEVICE, Iova(0), Access::Read),
        Err(DmaError::Fault(Iova(0), FaultReason::TABLE_MODE_ABORT))
    );
    assert_eq!(bench.r32(reg::FSTS), 0);
}

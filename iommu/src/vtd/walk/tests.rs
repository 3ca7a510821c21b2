#![allow(clippy::cast_possible_truncation, clippy::cast_lossless)]

use std::ops::ControlFlow;
use std::sync::atomic::AtomicBool;

use vm_memory::Bytes;

use super::*;
use crate::vtd::build::{
    BuildError, Format, PageTable, Permission, RamTables, RootTable, TableMemory, legacy, scalable,
};

const MIB: u64 = 1 << 20;
/// Inside the host address width, but not memory.
const NOWHERE: u64 = 0x3000_0000;
/// The first bit beyond the default host address width.
const BEYOND: u64 = 1 << 46;
const DEVICE: SourceId = SourceId(0x0018);
const DOMAIN: u16 = 0x4321;

const PAGE: Iova = Iova(0x7000);
const READ_ONLY: Iova = Iova(0x8000);
const WRITE_ONLY: Iova = Iova(0x9000);
const UNMAPPED: Iova = Iova(0xa000);
const LARGE: Iova = Iova(0x4000_0000);
const HUGE: Iova = Iova(0x8000_0000);
const TARGET: u64 = 0x10_0000;

fn ram() -> GuestRam {
    GuestRam::from_ranges(&[(GuestAddress(0), 4 << 20)]).unwrap()
}

/// Tables for one device, and the request that a case makes.
struct Bed<'a> {
    ram: &'a GuestRam,
    memory: RamTables<'a>,
    options: Options,
    root: Root,
    roots: RootTable,
    pages: PageTable,
    iova: Iova,
    access: Access,
}

impl<'a> Bed<'a> {
    fn new(ram: &'a GuestRam, roots: RootTable, mut memory: RamTables<'a>, format: Format) -> Self {
        let pages = PageTable::new(&mut memory, format, 4).unwrap();
        for (iova, gpa, shift, permission) in [
            (PAGE, TARGET, 12, Permission::READ_WRITE),
            (READ_ONLY, TARGET + 0x1000, 12, Permission::READ),
            (WRITE_ONLY, TARGET + 0x2000, 12, Permission::WRITE),
            (LARGE, 2 * MIB, 21, Permission::READ_WRITE),
            (HUGE, 1 << 30, 30, Permission::READ_WRITE),
        ] {
            pages
                .map(&mut memory, iova, Gpa(gpa), shift, permission)
                .unwrap();
        }
        Bed {
            ram,
            memory,
            options: Options::default(),
            root: roots.root(),
            roots,
            pages,
            iova: PAGE,
            access: Access::Read,
        }
    }

    fn legacy(ram: &'a GuestRam) -> Self {
        let mut memory = RamTables::new(ram, Gpa(0x1000)..Gpa(0x10_0000));
        let roots = RootTable::legacy(&mut memory).unwrap();
        let mut bed = Bed::new(ram, roots, memory, Format::Second);
        let entry = legacy::second_stage(&bed.pages, DOMAIN);
        bed.roots.set(&mut bed.memory, DEVICE, &entry).unwrap();
        bed
    }

    fn scalable(ram: &'a GuestRam, format: Format) -> Self {
        let mut memory = RamTables::new(ram, Gpa(0x1000)..Gpa(0x10_0000));
        let roots = RootTable::scalable(&mut memory).unwrap();
        let mut bed = Bed::new(ram, roots, memory, format);
        let entry = match format {
            Format::First => scalable::first_stage(&bed.pages, DOMAIN),
            Format::Second => scalable::second_stage(&bed.pages, DOMAIN),
        };
        bed.roots.set(&mut bed.memory, DEVICE, &entry).unwrap();
        bed
    }

    fn first(ram: &'a GuestRam) -> Self {
        Bed::scalable(ram, Format::First)
    }

    fn second(ram: &'a GuestRam) -> Self {
        Bed::scalable(ram, Format::Second)
    }

    /// Clears and sets bits of a qword.
    fn change(&mut self, at: Gpa, clear: u64, set: u64) {
        let value = self.memory.load(at) & !clear | set;
        self.memory.store(at, value);
    }

    fn root_entry(&self) -> Gpa {
        self.roots.table
    }

    fn context(&mut self, qword: u64) -> Gpa {
        let at = self.roots.context_entry(&mut self.memory, DEVICE).unwrap();
        Gpa(at.0 + 8 * qword)
    }

    fn directory(&mut self) -> Gpa {
        let context = self.context(0);
        Gpa(self.memory.load(context) & !0xfff)
    }

    fn pasid(&mut self, qword: u64) -> Gpa {
        let at = self.roots.pasid_entry(&mut self.memory, DEVICE).unwrap();
        Gpa(at.0 + 8 * qword)
    }

    /// The page-table entry on the way to `self.iova` that maps or covers `1 << shift` bytes.
    fn entry(&self, shift: u8) -> Gpa {
        self.pages.entry(&self.memory, self.iova, shift).unwrap()
    }

    fn translate(&self) -> Result<(Context, Mapping, Levels), Fault> {
        let (context, levels) = context(self.ram, &self.options, self.root, DEVICE)?;
        let (mapping, more) = page(
            self.ram,
            &self.options,
            self.root,
            &context,
            self.iova,
            self.access,
        )?;
        Ok((context, mapping, Levels(levels.0 + more.0)))
    }

    /// The fault of the request, which must be one.
    fn fault(&self) -> Fault {
        self.translate().expect_err("a fault")
    }
}

type Make = for<'a> fn(&'a GuestRam) -> Bed<'a>;
type Case = (u8, &'static str, fn(&mut Bed<'_>));

fn run<'a>(bed: impl Fn() -> Bed<'a>, cases: &[Case]) {
    bed().translate().expect("the tables are good");
    for &(reason, name, spoil) in cases {
        let mut bed = bed();
        spoil(&mut bed);
        let fault = bed.fault();
        assert_eq!(fault.reason, FaultReason(reason), "{name}");
        assert!(!fault.suppressed, "{name}");
    }
}

#[test]
fn legacy_faults() {
    let ram = ram();
    run(
        || Bed::legacy(&ram),
        &[
            (0x30, "TTM 10", |bed| bed.root = Root::from_register(0x1800)),
            (0x30, "abort DMA, not offered", |bed| {
                bed.options.scalable = false;
                bed.root = Root::from_register(0xc00);
            }),
            (0x8, "no root table", |bed| bed.root.table = Gpa(NOWHERE)),
            (0x8, "root table at the end of the address space", |bed| {
                bed.root.table = Gpa(!0xfff);
            }),
            (0x1, "root not present", |bed| {
                bed.change(bed.root_entry(), 1, 0);
            }),
            (0xa, "root bit 1", |bed| bed.change(bed.root_entry(), 0, 2)),
            (0xa, "root bit 11", |bed| {
                bed.change(bed.root_entry(), 0, 1 << 11);
            }),
            (0xa, "root beyond host", |bed| {
                bed.change(bed.root_entry(), 0, BEYOND);
            }),
            (0xa, "root upper qword", |bed| {
                bed.change(Gpa(bed.root_entry().0 + 8), 0, 1);
            }),
            (0x9, "no context table", |bed| {
                bed.change(bed.root_entry(), !0xfff, NOWHERE);
            }),
            (0x2, "context not present", |bed| {
                let at = bed.context(0);
                bed.change(at, 1, 0);
            }),
            (0xb, "context bit 4", |bed| {
                let at = bed.context(0);
                bed.change(at, 0, 1 << 4);
            }),
            (0xb, "context bit 71", |bed| {
                let at = bed.context(1);
                bed.change(at, 0, 1 << 7);
            }),
            (0xb, "context bit 88", |bed| {
                let at = bed.context(1);
                bed.change(at, 0, 1 << 24);
            }),
            (0xb, "page table beyond host", |bed| {
                let at = bed.context(0);
                bed.change(at, 0, BEYOND);
            }),
            (0x3, "AW 0", |bed| {
                let at = bed.context(1);
                bed.change(at, 7, 0);
            }),
            (0x3, "AW of 57 bits, not offered", |bed| {
                let at = bed.context(1);
                bed.change(at, 7, 3);
            }),
            (0x3, "AW 7", |bed| {
                let at = bed.context(1);
                bed.change(at, 0, 7);
            }),
            (0x3, "TT of a device-TLB", |bed| {
                let at = bed.context(0);
                bed.change(at, 0xc, 0x4);
            }),
            (0x3, "TT reserved", |bed| {
                let at = bed.context(0);
                bed.change(at, 0xc, 0xc);
            }),
            (0x3, "pass-through, not offered", |bed| {
                bed.options.pass_through = false;
                let at = bed.context(0);
                bed.change(at, 0xc, 0x8);
            }),
            (0x3, "pass-through, AW not offered", |bed| {
                let at = bed.context(0);
                bed.change(at, 0xc, 0x8);
                let at = bed.context(1);
                bed.change(at, 7, 4);
            }),
            (0x3, "no page table", |bed| {
                let at = bed.context(0);
                bed.change(at, !0xfff, NOWHERE);
            }),
            (0x4, "address beyond 48 bits", |bed| {
                bed.iova = Iova(1 << 48)
            }),
            (0x4, "address with all bits", |bed| {
                bed.iova = Iova(u64::MAX);
            }),
            (0x4, "address beyond host, pass-through", |bed| {
                let at = bed.context(0);
                bed.change(at, 0xc, 0x8);
                bed.iova = Iova(BEYOND);
            }),
            (0x7, "no next table", |bed| {
                bed.change(bed.entry(21), !0xfff, NOWHERE);
            }),
            (0x6, "read, not mapped", |bed| bed.iova = UNMAPPED),
            (0x5, "write, not mapped", |bed| {
                bed.iova = UNMAPPED;
                bed.access = Access::Write;
            }),
            (0x6, "read, write-only", |bed| bed.iova = WRITE_ONLY),
            (0x5, "write, read-only", |bed| {
                bed.iova = READ_ONLY;
                bed.access = Access::Write;
            }),
            (0x5, "write, read-only above", |bed| {
                bed.change(bed.entry(39), 2, 0);
                bed.access = Access::Write;
            }),
            (0x6, "read, write-only above", |bed| {
                bed.change(bed.entry(30), 1, 0);
            }),
            (0x6, "nothing together", |bed| {
                bed.change(bed.entry(30), 1, 0);
                bed.change(bed.entry(12), 2, 0);
            }),
            (0xc, "page beyond host", |bed| {
                bed.change(bed.entry(12), 0, BEYOND);
            }),
            (0xc, "page bit 62", |bed| {
                bed.change(bed.entry(12), 0, 1 << 62);
            }),
            (0xc, "SNP, not offered", |bed| {
                bed.options.snoop_control = false;
                bed.change(bed.entry(12), 0, 1 << 11);
            }),
            (0xc, "SNP in a table's entry", |bed| {
                bed.change(bed.entry(21), 0, 1 << 11);
            }),
            (0xc, "table beyond host", |bed| {
                bed.change(bed.entry(30), 0, BEYOND);
            }),
            (0xc, "PS at level 4", |bed| {
                bed.change(bed.entry(39), 0, 1 << 7);
            }),
            (0xc, "2 MiB, not aligned", |bed| {
                bed.iova = LARGE;
                bed.change(bed.entry(21), 0, 1 << 12);
            }),
            (0xc, "2 MiB, not offered", |bed| {
                bed.options.large_pages.mib_2 = false;
                bed.iova = LARGE;
            }),
            (0xc, "1 GiB, not aligned", |bed| {
                bed.iova = HUGE;
                bed.change(bed.entry(30), 0, 1 << 29);
            }),
            (0xc, "1 GiB, not offered", |bed| {
                bed.options.large_pages.gib_1 = false;
                bed.iova = HUGE;
            }),
            (0xe, "first page of the interrupt range", |bed| {
                bed.change(bed.entry(12), !0xfff, 0xfee0_0000);
            }),
            (0xe, "last page of the interrupt range", |bed| {
                bed.change(bed.entry(12), !0xfff, 0xfeef_f000);
                bed.access = Access::Write;
            }),
            (0xe, "interrupt range in a large page", |bed| {
                bed.iova = LARGE;
                bed.change(bed.entry(21), !0xfff, 0xfee0_0000);
                bed.iova = Iova(LARGE.0 + 0xf_ffff);
            }),
        ],
    );
}

#[test]
fn scalable_faults_up_to_the_pasid_entry() {
    let ram = ram();
    run(
        || Bed::second(&ram),
        &[
            (0x30, "scalable mode, not offered", |bed| {
                bed.options.scalable = false;
            }),
            (0x30, "TTM 10", |bed| bed.root.mode = Mode::Reserved),
            (0x38, "no root table", |bed| bed.root.table = Gpa(NOWHERE)),
            (0x39, "root not present", |bed| {
                bed.change(bed.root_entry(), 1, 0);
            }),
            (0x3a, "root bit 11", |bed| {
                bed.change(bed.root_entry(), 0, 1 << 11);
            }),
            (0x3a, "root beyond host", |bed| {
                bed.change(bed.root_entry(), 0, BEYOND);
            }),
            (0x40, "no context table", |bed| {
                bed.change(bed.root_entry(), !0xfff, NOWHERE);
            }),
            (0x41, "context not present", |bed| {
                let at = bed.context(0);
                bed.change(at, 1, 0);
            }),
            (0x42, "context bit 5", |bed| {
                let at = bed.context(0);
                bed.change(at, 0, 1 << 5);
            }),
            (0x42, "DTE", |bed| {
                let at = bed.context(0);
                bed.change(at, 0, 1 << 2);
            }),
            (0x42, "PASIDE", |bed| {
                let at = bed.context(0);
                bed.change(at, 0, 1 << 3);
            }),
            (0x42, "PRE", |bed| {
                let at = bed.context(0);
                bed.change(at, 0, 1 << 4);
            }),
            (0x42, "context bit 85", |bed| {
                let at = bed.context(1);
                bed.change(at, 0, 1 << 21);
            }),
            (0x42, "RID_PRIV, not offered", |bed| {
                bed.options.supervisor = false;
                let at = bed.context(1);
                bed.change(at, 0, 1 << 20);
            }),
            (0x42, "context bit 128", |bed| {
                let at = bed.context(2);
                bed.change(at, 0, 1);
            }),
            (0x42, "context bit 255", |bed| {
                let at = bed.context(3);
                bed.change(at, 0, 1 << 63);
            }),
            (0x42, "directory beyond host", |bed| {
                let at = bed.context(0);
                bed.change(at, 0, BEYOND);
            }),
            (0x43, "RID_PASID beyond the directory", |bed| {
                let at = bed.context(1);
                bed.change(at, 0, 512 << 6);
            }),
            (0x50, "no directory", |bed| {
                let at = bed.context(0);
                bed.change(at, !0xfff, NOWHERE);
            }),
            (0x51, "directory entry not present", |bed| {
                let at = bed.directory();
                bed.change(at, 1, 0);
            }),
            (0x52, "directory entry bit 2", |bed| {
                let at = bed.directory();
                bed.change(at, 0, 1 << 2);
            }),
            (0x52, "directory entry beyond host", |bed| {
                let at = bed.directory();
                bed.change(at, 0, BEYOND);
            }),
            (0x58, "no PASID table", |bed| {
                let at = bed.directory();
                bed.change(at, !0xfff, NOWHERE);
            }),
            (0x59, "PASID entry not present", |bed| {
                let at = bed.pasid(0);
                bed.change(at, 1, 0);
            }),
            (0x5a, "PASID bit 10", |bed| {
                let at = bed.pasid(0);
                bed.change(at, 0, 1 << 10);
            }),
            (0x5a, "SSADE, not offered", |bed| {
                bed.options.accessed_dirty = false;
                let at = bed.pasid(0);
                bed.change(at, 0, 1 << 9);
            }),
            (0x5a, "page table beyond host", |bed| {
                let at = bed.pasid(0);
                bed.change(at, 0, BEYOND);
            }),
            (0x5a, "PASID bit 80", |bed| {
                let at = bed.pasid(1);
                bed.change(at, 0, 1 << 16);
            }),
            (0x5a, "PWSNP, not offered", |bed| {
                bed.options.scalable_coherent = false;
            }),
            (0x5a, "PGSNP, not offered", |bed| {
                bed.options.snoop_control = false;
                let at = bed.pasid(1);
                bed.change(at, 0, 1 << 24);
            }),
            (0x5a, "EMTE", |bed| {
                let at = bed.pasid(1);
                bed.change(at, 0, 1 << 26);
            }),
            (0x5a, "ERE", |bed| {
                let at = bed.pasid(2);
                bed.change(at, 0, 1 << 1);
            }),
            (0x5a, "SRE, not offered", |bed| {
                bed.options.supervisor = false;
                let at = bed.pasid(2);
                bed.change(at, 0, 1);
            }),
            (0x5a, "PASID bit 511", |bed| {
                let at = bed.pasid(7);
                bed.change(at, 0, 1 << 63);
            }),
            (0x5b, "PGTT 0", |bed| {
                let at = bed.pasid(0);
                bed.change(at, 0x1c0, 0);
            }),
            (0x5b, "nested", |bed| {
                let at = bed.pasid(0);
                bed.change(at, 0x1c0, 3 << 6);
            }),
            (0x5b, "PGTT 7", |bed| {
                let at = bed.pasid(0);
                bed.change(at, 0, 0x1c0);
            }),
            (0x5b, "pass-through, not offered", |bed| {
                bed.options.pass_through = false;
                let at = bed.pasid(0);
                bed.change(at, 0x1c0, 4 << 6);
            }),
            (0x5b, "second stage, not offered", |bed| {
                bed.options.second_stage = false;
            }),
            (0x5b, "AW of 57 bits, not offered", |bed| {
                let at = bed.pasid(0);
                bed.change(at, 7 << 2, 3 << 2);
            }),
            (0x5d, "supervisor, SRE clear", |bed| {
                let at = bed.context(1);
                bed.change(at, 0, 1 << 20);
            }),
            (0x83, "address beyond host, pass-through", |bed| {
                let at = bed.pasid(0);
                bed.change(at, 0x1c0, 4 << 6);
                bed.iova = Iova(BEYOND);
            }),
        ],
    );
}

#[test]
fn scalable_second_stage_faults() {
    let ram = ram();
    run(
        || Bed::second(&ram),
        &[
            (0x84, "address beyond 48 bits", |bed| {
                bed.iova = Iova(1 << 48);
            }),
            (0x7b, "no page table", |bed| {
                let at = bed.pasid(0);
                bed.change(at, !0xfff, NOWHERE);
            }),
            (0x78, "no next table", |bed| {
                bed.change(bed.entry(39), !0xfff, NOWHERE);
            }),
            (0x79, "not mapped", |bed| bed.iova = UNMAPPED),
            (0x79, "nothing together", |bed| {
                bed.change(bed.entry(30), 1, 0);
                bed.change(bed.entry(12), 2, 0);
            }),
            (0x7a, "page beyond host", |bed| {
                bed.change(bed.entry(12), 0, BEYOND);
            }),
            (0x7a, "PS at level 4", |bed| {
                bed.change(bed.entry(39), 0, 1 << 7);
            }),
            (0x85, "write, read-only", |bed| {
                bed.iova = READ_ONLY;
                bed.access = Access::Write;
            }),
            (0x86, "read, write-only", |bed| bed.iova = WRITE_ONLY),
            (0x87, "interrupt range", |bed| {
                bed.change(bed.entry(12), !0xfff, 0xfee0_0000);
            }),
            (0x7c, "accessed bit needed, PWSNP clear", |bed| {
                let at = bed.pasid(0);
                bed.change(at, 0, 1 << 9);
                let at = bed.pasid(1);
                bed.change(at, 1 << 23, 0);
            }),
        ],
    );
}

#[test]
fn first_stage_faults() {
    let ram = ram();
    run(
        || Bed::first(&ram),
        &[
            (0x5b, "first stage, not offered", |bed| {
                bed.options.first_stage = false;
            }),
            (0x5b, "5 levels, not offered", |bed| {
                let at = bed.pasid(2);
                bed.change(at, 0, 1 << 2);
            }),
            (0x5b, "FSPM 2", |bed| {
                let at = bed.pasid(2);
                bed.change(at, 0, 2 << 2);
            }),
            (0x5a, "page table beyond host", |bed| {
                let at = bed.pasid(2);
                bed.change(at, 0, BEYOND);
            }),
            (0x80, "not canonical, low", |bed| bed.iova = Iova(1 << 47)),
            (0x80, "not canonical, high", |bed| {
                bed.iova = Iova(0xffff_7fff_ffff_ffff);
            }),
            (0x73, "no page table", |bed| {
                let at = bed.pasid(2);
                bed.change(at, !0xfff, NOWHERE);
            }),
            (0x70, "no next table", |bed| {
                bed.change(bed.entry(21), !0xfff & !(1 << 63), NOWHERE);
            }),
            (0x71, "not mapped", |bed| bed.iova = UNMAPPED),
            (0x71, "table not present", |bed| {
                bed.change(bed.entry(39), 1, 0);
            }),
            (0x72, "page beyond host", |bed| {
                bed.change(bed.entry(12), 0, BEYOND);
            }),
            (0x72, "table beyond host", |bed| {
                bed.change(bed.entry(30), 0, 1 << 51);
            }),
            (0x72, "PS at level 4", |bed| {
                bed.change(bed.entry(39), 0, 1 << 7);
            }),
            (0x72, "1 GiB, not offered", |bed| {
                bed.options.first_stage_1g = false;
                bed.iova = HUGE;
            }),
            (0x72, "2 MiB, not aligned", |bed| {
                bed.iova = LARGE;
                bed.change(bed.entry(21), 0, 1 << 13);
            }),
            (0x81, "supervisor page", |bed| {
                bed.change(bed.entry(12), 4, 0);
            }),
            (0x81, "supervisor table, write to read-only", |bed| {
                bed.iova = READ_ONLY;
                bed.access = Access::Write;
                bed.change(bed.entry(30), 4, 0);
            }),
            (0x85, "write, read-only", |bed| {
                bed.iova = READ_ONLY;
                bed.access = Access::Write;
            }),
            (0x85, "supervisor write, read-only, WPE", |bed| {
                let at = bed.context(1);
                bed.change(at, 0, 1 << 20);
                let at = bed.pasid(2);
                bed.change(at, 0, 1 | 1 << 4);
                bed.iova = READ_ONLY;
                bed.access = Access::Write;
            }),
            (0x87, "interrupt range", |bed| {
                bed.change(bed.entry(12), 0x000f_ffff_ffff_f000, 0xfee1_2000);
            }),
            (0x90, "accessed bit needed, PWSNP clear", |bed| {
                let at = bed.pasid(1);
                bed.change(at, 1 << 23, 0);
            }),
            (0x90, "dirty bit needed, no snooping walks", |bed| {
                bed.options.scalable_coherent = false;
                let at = bed.pasid(1);
                bed.change(at, 1 << 23, 0);
                for shift in [12, 21, 30, 39] {
                    bed.change(bed.entry(shift), 0, 1 << 5);
                }
                bed.access = Access::Write;
            }),
        ],
    );
}

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

/// A guest that counts in ignored bits of an entry and clears its accessed and dirty bits loses no
/// count to a walk that sets them.
#[test]
fn setting_bits_loses_no_change_of_the_guest() {
    const ROUNDS: u64 = 5000;
    let ram = ram();
    let mut bed = Bed::first(&ram);
    bed.access = Access::Write;
    let at = bed.entry(12);
    let done = AtomicBool::new(false);
    std::thread::scope(|scope| {
        scope.spawn(|| {
            let slice = ram.get_slice(GuestAddress(at.0), 8).unwrap();
            let entry = slice.get_atomic_ref::<AtomicU64>(0).unwrap();
            for _ in 0..ROUNDS {
                entry.fetch_add(1 << 52, Ordering::AcqRel);
                entry.fetch_and(!(1 << 5 | 1 << 6), Ordering::AcqRel);
            }
            done.store(true, Ordering::Release);
        });
        while !done.load(Ordering::Acquire) {
            if let Err(fault) = bed.translate() {
                // The guest won all races of one walk.
                assert_eq!(fault.reason, FaultReason::FS_UPDATE_FAILED);
            }
        }
    });
    // 11 ignored bits, and bit 63, which is ignored too.
    assert_eq!(bed.memory.load(at) >> 52, ROUNDS % (1 << 12));
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

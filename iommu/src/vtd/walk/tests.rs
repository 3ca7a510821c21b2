//! Good tables for one device, which each test then changes.

#![allow(clippy::cast_possible_truncation, clippy::cast_lossless)]

mod faults;
mod meaning;
mod races;

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

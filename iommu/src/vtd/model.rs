//! What page tables mean, without tables: a map from pages to pages. Compared with the walks under
//! random sequences of mapping, unmapping and access.
#![allow(clippy::cast_possible_truncation)]

use std::collections::BTreeMap;

use proptest::collection::vec;
use proptest::prelude::*;
use vm_memory::GuestAddress;

use super::build::{
    Format, PageTable, Permission, RamTables, RootTable, TableMemory, legacy, scalable,
};
use super::walk::{self, Mode};
use super::{AddressWidths, Options};
use crate::{Access, FaultReason, Gpa, GuestRam, Iova, Mapping, SourceId};

const DEVICE: SourceId = SourceId(0x0100);

#[derive(Clone, Copy, Debug)]
struct Page {
    shift: u8,
    gpa: u64,
    permission: Permission,
    dirty: bool,
}

#[derive(Default)]
struct Model {
    /// Pages by their first input address.
    pages: BTreeMap<u64, Page>,
    /// What the entries that point to tables allow, when it is not everything: by the first address
    /// and the size of what is below them.
    limits: BTreeMap<(u64, u8), Permission>,
}

impl Model {
    /// First addresses of the pages that share an address with the `1 << shift` bytes at `iova`.
    fn overlapping(&self, iova: u64, shift: u8) -> Vec<u64> {
        let last = iova + ((1 << shift) - 1);
        self.pages
            .range(..=last)
            .filter(|(start, page)| *start + ((1 << page.shift) - 1) >= iova)
            .map(|(start, _)| *start)
            .collect()
    }

    fn at(&mut self, iova: u64) -> Option<(u64, &mut Page)> {
        let (start, page) = self.pages.range_mut(..=iova).next_back()?;
        (iova - *start < 1 << page.shift).then_some((*start, page))
    }

    /// What the tables above a page of `1 << shift` bytes leave of `permission`.
    fn limited(&self, iova: u64, shift: u8, permission: Permission) -> Permission {
        let mut left = permission;
        for ((start, size), limit) in &self.limits {
            if *size > shift && iova >> size == start >> size {
                left.read &= limit.read;
                left.write &= limit.write;
            }
        }
        left
    }
}

/// How the tables under test are set up.
#[derive(Clone, Copy, Debug)]
struct Setup {
    scalable: bool,
    format: Format,
    levels: u8,
    access_dirty: bool,
}

fn setups() -> Vec<Setup> {
    let mut all = Vec::new();
    for levels in [3, 4, 5] {
        for (scalable, access_dirty) in [(false, false), (true, false), (true, true)] {
            all.push(Setup {
                scalable,
                format: Format::Second,
                levels,
                access_dirty,
            });
        }
    }
    for levels in [4, 5] {
        all.push(Setup {
            scalable: true,
            format: Format::First,
            levels,
            access_dirty: true,
        });
    }
    all
}

#[derive(Clone, Debug)]
enum Step {
    Map(u64, u64, u8, Permission),
    Unmap(u64, u8),
    /// What the entry that covers `1 << shift` bytes allows, if it points to a table.
    Limit(u64, u8, Permission),
    Access(u64, Access),
}

/// Few addresses at every level, so that pages meet and replace each other; both ends of each table.
fn address() -> impl Strategy<Value = u64> {
    let index = || prop_oneof![Just(0_u64), Just(1), Just(511)];
    (index(), index(), index(), index(), index(), 0..4096_u64).prop_map(
        |(level5, level4, level3, level2, level1, offset)| {
            level5 << 48 | level4 << 39 | level3 << 30 | level2 << 21 | level1 << 12 | offset
        },
    )
}

fn step() -> impl Strategy<Value = Step> {
    let shift = prop_oneof![3 => Just(12_u8), 2 => Just(21), 1 => Just(30)];
    let permission = prop_oneof![
        1 => Just(Permission::READ),
        1 => Just(Permission::WRITE),
        2 => Just(Permission::READ_WRITE),
    ];
    let table = prop_oneof![Just(21_u8), Just(30), Just(39), Just(48)];
    // Some output lies around the interrupt range.
    let output = prop_oneof![0..1_u64 << 46, 0xfec0_0000..0xff40_0000_u64];
    let access = prop_oneof![Just(Access::Read), Just(Access::Write)];
    prop_oneof![
        3 => (address(), output, shift.clone(), permission.clone())
            .prop_map(|(iova, gpa, shift, permission)| Step::Map(iova, gpa, shift, permission)),
        1 => (address(), shift).prop_map(|(iova, shift)| Step::Unmap(iova, shift)),
        1 => (address(), table, permission)
            .prop_map(|(iova, shift, permission)| Step::Limit(iova, shift, permission)),
        6 => (address(), access).prop_map(|(iova, access)| Step::Access(iova, access)),
    ]
}

/// The tables, the model, and the check that they agree.
struct Pair<'a> {
    setup: Setup,
    options: Options,
    ram: &'a GuestRam,
    memory: RamTables<'a>,
    roots: RootTable,
    pages: PageTable,
    model: Model,
}

impl<'a> Pair<'a> {
    fn new(ram: &'a GuestRam, setup: Setup) -> Pair<'a> {
        let options = Options {
            address_widths: AddressWidths {
                bits_39: true,
                bits_48: true,
                bits_57: true,
            },
            first_stage_5_level: true,
            ..Options::default()
        };
        let mut memory = RamTables::new(ram, Gpa(0x1000)..Gpa(8 << 20));
        let pages = PageTable::new(&mut memory, setup.format, setup.levels).unwrap();
        let roots = if setup.scalable {
            RootTable::scalable(&mut memory).unwrap()
        } else {
            RootTable::legacy(&mut memory).unwrap()
        };
        let entry = match (setup.scalable, setup.format) {
            (false, _) => legacy::second_stage(&pages, 1).to_vec(),
            (true, Format::First) => scalable::first_stage(&pages, 1).to_vec(),
            (true, Format::Second) => {
                let mut entry = scalable::second_stage(&pages, 1);
                entry[0] |= u64::from(setup.access_dirty) << 9;
                entry.to_vec()
            }
        };
        roots.set(&mut memory, DEVICE, &entry).unwrap();
        Pair {
            setup,
            options,
            ram,
            memory,
            roots,
            pages,
            model: Model::default(),
        }
    }

    /// Brings an address into what the tables translate: cut, or sign-extended.
    fn fit(&self, iova: u64) -> u64 {
        let unused = 64 - (12 + 9 * u32::from(self.setup.levels));
        match self.setup.format {
            Format::Second => iova << unused >> unused,
            Format::First => {
                let signed = (iova << unused).cast_signed() >> unused;
                signed.cast_unsigned()
            }
        }
    }

    fn step(&mut self, step: &Step) {
        match *step {
            Step::Map(iova, gpa, shift, permission) => {
                let iova = self.fit(iova) >> shift << shift;
                let gpa = gpa >> shift << shift;
                self.remove(iova, shift);
                self.pages
                    .map(&mut self.memory, Iova(iova), Gpa(gpa), shift, permission)
                    .unwrap();
                let page = Page {
                    shift,
                    gpa,
                    permission,
                    dirty: false,
                };
                self.model.pages.insert(iova, page);
                // New tables allow everything, and a page has no tables.
                self.model
                    .limits
                    .retain(|(start, size), _| *size > shift || start >> shift != iova >> shift);
            }
            Step::Unmap(iova, shift) => {
                let iova = self.fit(iova) >> shift << shift;
                self.remove(iova, shift);
            }
            Step::Limit(iova, shift, permission) => {
                self.limit(self.fit(iova) >> shift << shift, shift, permission);
            }
            Step::Access(iova, access) => self.check(Iova(self.fit(iova)), access),
        }
    }

    /// First-stage entries always allow reads.
    fn limit(&mut self, iova: u64, shift: u8, permission: Permission) {
        let Some(at) = self.pages.entry(&self.memory, Iova(iova), shift) else {
            return;
        };
        let entry = self.memory.load(at);
        if shift >= 12 + 9 * self.setup.levels || entry == 0 || entry & 0x80 != 0 {
            return;
        }
        let (clear, set) = match self.setup.format {
            Format::First => (2, u64::from(permission.write) << 1),
            Format::Second => (
                3,
                u64::from(permission.read) | u64::from(permission.write) << 1,
            ),
        };
        self.memory.store(at, entry & !clear | set);
        self.model.limits.insert((iova, shift), permission);
    }

    fn remove(&mut self, iova: u64, shift: u8) {
        for start in self.model.overlapping(iova, shift) {
            let page = self.model.pages.remove(&start).unwrap();
            self.pages.unmap(&mut self.memory, Iova(start), page.shift);
        }
    }

    fn check(&mut self, iova: Iova, access: Access) {
        let found = self.walk(iova, access);
        let expected = self.expect(iova, access);
        assert_eq!(found, expected, "{iova} {access:?} {:?}", self.setup);
    }

    fn walk(&self, iova: Iova, access: Access) -> Result<Mapping, FaultReason> {
        let root = self.roots.root();
        assert_eq!(root.mode == Mode::Scalable, self.setup.scalable);
        let (context, _) = walk::context(self.ram, &self.options, root, DEVICE).unwrap();
        match walk::page(self.ram, &self.options, root, &context, iova, access) {
            Ok((mapping, levels)) => {
                assert!(levels.0 <= self.setup.levels.into());
                Ok(mapping)
            }
            Err(fault) => Err(fault.reason),
        }
    }

    fn expect(&mut self, iova: Iova, access: Access) -> Result<Mapping, FaultReason> {
        let setup = self.setup;
        let first = setup.format == Format::First;
        let (read, write) = match access {
            Access::Read => (true, false),
            Access::Write => (false, true),
        };
        let not_present = FaultReason(match (setup.scalable, first) {
            (false, _) if read => 0x6,
            (false, _) => 0x5,
            (true, true) => 0x71,
            (true, false) => 0x79,
        });
        let Some((start, page)) = self.model.at(iova.0) else {
            return Err(not_present);
        };
        let page = *page;
        let allowed = self.model.limited(iova.0, page.shift, page.permission);
        if !allowed.read && !allowed.write && !first {
            return Err(not_present);
        }
        let may_read = allowed.read || first;
        if write && !allowed.write {
            return Err(FaultReason(if setup.scalable { 0x85 } else { 0x5 }));
        }
        if read && !may_read {
            return Err(FaultReason(if setup.scalable { 0x86 } else { 0x6 }));
        }
        let interrupts = 0xfee0_0000..0xfef0_0000;
        let output = page.gpa + (iova.0 - start);
        if interrupts.contains(&output) {
            return Err(FaultReason(if setup.scalable { 0x87 } else { 0xe }));
        }
        let dirty = page.dirty || write;
        if let Some((_, page)) = self.model.at(iova.0) {
            page.dirty = dirty;
        }
        let whole = Mapping {
            iova: Iova(start),
            gpa: Gpa(page.gpa),
            shift: page.shift,
            read: may_read,
            write: allowed.write && (dirty || !setup.access_dirty),
        };
        let size = 1 << page.shift;
        if page.gpa < interrupts.end && page.gpa + size > interrupts.start {
            return Ok(Mapping {
                iova: Iova(iova.0 & !0xfff),
                gpa: Gpa(output & !0xfff),
                shift: 12,
                ..whole
            });
        }
        Ok(whole)
    }
}

proptest! {
    #![proptest_config(ProptestConfig {
        failure_persistence: None,
        ..ProptestConfig::with_cases(96)
    })]

    #[test]
    fn walks_agree_with_the_model(steps in vec(step(), 1..60)) {
        let ram = GuestRam::from_ranges(&[(GuestAddress(0), 8 << 20)]).unwrap();
        for setup in setups() {
            let mut pair = Pair::new(&ram, setup);
            for step in &steps {
                pair.step(step);
            }
            // Every page that is left, at both ends, and what lies beside it.
            let pages: Vec<_> = pair.model.pages.iter().map(|(start, page)| (*start, page.shift)).collect();
            for (start, shift) in pages {
                let last = start + ((1 << shift) - 1);
                for iova in [start.wrapping_sub(1), start, last, last.wrapping_add(1)] {
                    for access in [Access::Read, Access::Write] {
                        pair.check(Iova(pair.fit(iova)), access);
                    }
                }
            }
        }
    }
}

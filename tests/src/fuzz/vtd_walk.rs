//! The walks through VT-d tables: good tables, then any change to them, any option, any request.
//!
//! A walk that succeeds must agree with a naive reading of the same tables. One that faults must name a
//! reason of its mode and leave memory alone; a walk changes nothing but accessed and dirty bits.

use iommu::vtd::build::{
    Format, PageTable, Permission, RamTables, RootTable, TableMemory, legacy, scalable,
};
use iommu::vtd::walk::{self, Mode, Root};
use iommu::vtd::{AddressWidths, LargePages, Options};
use iommu::{Access, Context, Gpa, GuestRam, Iova, Mapping, SourceId, Stage};
use vm_memory::{Bytes, GuestAddress};

use super::Input;

/// All of memory; what points elsewhere points nowhere.
const MEMORY: u64 = 0x2_0000;
const DEVICE: SourceId = SourceId(0x00a8);
const INTERRUPTS: std::ops::RangeInclusive<u64> = 0xfee0_0000..=0xfeef_ffff;

/// What is mapped at first; requests and changes go there often.
const PAGES: [(u64, u64, u8); 5] = [
    (0x7000, 0x2_0000, 12),
    (0x20_0000, 0x60_0000, 21),
    (0x4000_0000, 0xc000_0000, 30),
    (0x7f_ffff_f000, 0x2_1000, 12),
    (0xfee0_0000, 0xfee0_0000, 21),
];

/// Runs one input.
pub fn vtd_walk(data: &[u8]) {
    let mut input = Input::new(data);
    let ram = GuestRam::from_ranges(&[(
        GuestAddress(0),
        usize::try_from(MEMORY).expect("a small memory"),
    )])
    .expect("memory");
    let mut memory = RamTables::new(&ram, Gpa(0x1000)..Gpa(0x1_8000));
    let mut bed = Bed::new(&mut memory, &mut input);
    while !input.is_empty() {
        match input.byte() % 4 {
            0 => bed.change(&mut memory, &mut input),
            1 => bed.root = Root::from_register(bed.roots.register() ^ input.u64()),
            2 => bed.options = options(&mut input),
            _ => bed.request(&ram, &mut input),
        }
    }
    bed.translate(&ram, DEVICE, Iova(PAGES[0].0), Access::Read);
}

fn options(input: &mut Input<'_>) -> Options {
    let bits = input.u16();
    let bit = |index: u32| bits >> index & 1 == 0;
    Options {
        host_address_width: input.pick(&[46, 32, 39, 52]),
        address_widths: AddressWidths {
            bits_39: true,
            bits_48: bit(0),
            bits_57: bit(1),
        },
        large_pages: LargePages {
            mib_2: bit(2),
            gib_1: bit(3),
        },
        scalable: bit(4),
        first_stage: bit(5),
        second_stage: bit(6),
        first_stage_1g: bit(7),
        first_stage_5_level: bit(8),
        accessed_dirty: bit(9),
        supervisor: bit(10),
        scalable_coherent: bit(11),
        snoop_control: bit(12),
        pass_through: bit(13),
        coherent: bit(14),
        ..Options::default()
    }
}

struct Bed {
    options: Options,
    root: Root,
    roots: RootTable,
    pages: PageTable,
}

impl Bed {
    fn new(memory: &mut RamTables<'_>, input: &mut Input<'_>) -> Bed {
        let setup = input.byte();
        let (scalable_mode, format, levels) = match setup % 9 {
            0..3 => (false, Format::Second, 3 + setup % 3),
            3..6 => (true, Format::Second, 3 + setup % 3),
            6 => (true, Format::First, 4),
            7 => (true, Format::First, 5),
            _ => (true, Format::Second, 4),
        };
        let pages = PageTable::new(memory, format, levels).expect("a page");
        for (iova, gpa, shift) in PAGES {
            pages
                .map(memory, Iova(iova), Gpa(gpa), shift, Permission::READ_WRITE)
                .expect("pages");
        }
        let roots = if scalable_mode {
            RootTable::scalable(memory)
        } else {
            RootTable::legacy(memory)
        }
        .expect("a page");
        let domain = 7;
        let entry = match (scalable_mode, format) {
            _ if setup % 9 == 8 => scalable::pass_through(domain).to_vec(),
            (false, _) => legacy::second_stage(&pages, domain).to_vec(),
            (true, Format::First) => scalable::first_stage(&pages, domain).to_vec(),
            (true, Format::Second) => scalable::second_stage(&pages, domain).to_vec(),
        };
        roots.set(memory, DEVICE, &entry).expect("pages");
        Bed {
            options: options(input),
            root: roots.root(),
            roots,
            pages,
        }
    }

    /// Changes a qword of the tables: flips a bit, stores anything, or points anywhere.
    fn change(&self, memory: &mut RamTables<'_>, input: &mut Input<'_>) {
        let (iova, _, shift) = input.pick(&PAGES);
        let at = match input.byte() % 8 {
            0 => self.entry(self.roots.table, 0x20, input),
            1 | 2 => {
                let context = self.roots.context_entry(memory, DEVICE);
                context.map_or(self.roots.table, |at| self.entry(at, 0x20, input))
            }
            3 | 4 if self.root.mode == Mode::Scalable => {
                let entry = self.roots.pasid_entry(memory, DEVICE);
                entry.map_or(self.roots.table, |at| self.entry(at, 0x40, input))
            }
            3..7 => {
                let top = 12 + 9 * (self.pages.levels - 1);
                let shift = (shift + 9 * (input.byte() % 5)).min(top);
                let entry = self.pages.entry(memory, Iova(iova), shift);
                entry.unwrap_or(self.pages.top)
            }
            _ => Gpa(u64::from(input.u16()) * 8),
        };
        let value = memory.load(at);
        let value = match input.byte() % 4 {
            0 | 1 => value ^ 1 << (input.byte() % 64),
            2 => value & 0xfff | u64::from(input.byte()) << 12,
            _ => input.u64(),
        };
        memory.store(at, value);
    }

    fn entry(&self, at: Gpa, bytes: u64, input: &mut Input<'_>) -> Gpa {
        Gpa(at.0 + u64::from(input.byte()) * 8 % bytes)
    }

    fn request(&self, ram: &GuestRam, input: &mut Input<'_>) {
        let source = if input.one_in(16) {
            SourceId(input.u16())
        } else {
            DEVICE
        };
        let iova = if input.one_in(8) {
            input.u64()
        } else {
            let (iova, _, shift) = input.pick(&PAGES);
            iova + (input.u64() & ((1 << shift) - 1))
        };
        let access = input.pick(&[Access::Read, Access::Write]);
        self.translate(ram, source, Iova(iova), access);
    }

    fn translate(&self, ram: &GuestRam, source: SourceId, iova: Iova, access: Access) {
        let before = contents(ram);
        let (context, levels) = match walk::context(ram, &self.options, self.root, source) {
            Ok(found) => found,
            Err(fault) => {
                assert!(fault.levels.0 <= 4);
                self.check_reason(fault.reason.0);
                assert_eq!(before, contents(ram), "{fault:?}");
                return;
            }
        };
        assert!(levels.0 <= 4);
        match walk::page(ram, &self.options, self.root, &context, iova, access) {
            Ok((mapping, levels)) => {
                assert!(levels.0 <= 5);
                self.check_mapping(&context, &mapping, iova, access);
                if !matches!(context.stage, Stage::Off | Stage::PassThrough { .. }) {
                    let naive = naive(ram, &context.stage, iova, access);
                    assert_eq!(mapping.gpa.0 + (iova.0 - mapping.iova.0), naive.gpa);
                    assert_eq!((mapping.read, mapping.write), (naive.read, naive.write));
                }
                check_changes(&context.stage, access, &before, &contents(ram));
            }
            Err(fault) => {
                assert!(fault.levels.0 <= 5);
                assert_eq!(fault.suppressed, context.fault_processing_disable);
                self.check_reason(fault.reason.0);
                assert_eq!(before, contents(ram), "{fault:?}");
            }
        }
    }

    fn check_reason(&self, reason: u8) {
        let of_mode = match self.root.mode {
            Mode::Legacy => (0x1..=0xe).contains(&reason) && reason != 0xd,
            Mode::Scalable if self.options.scalable => (0x38..=0x91).contains(&reason),
            Mode::AbortDma if self.options.scalable => reason == 0x33,
            _ => reason == 0x30,
        };
        assert!(of_mode, "{reason:#x} in {:?}", self.root.mode);
    }

    fn check_mapping(&self, context: &Context, mapping: &Mapping, iova: Iova, access: Access) {
        let size = 1_u64 << mapping.shift;
        assert!(matches!(mapping.shift, 12 | 21 | 30));
        assert_eq!((mapping.iova.0 % size, mapping.gpa.0 % size), (0, 0));
        assert!(mapping.iova <= iova && iova.0 - mapping.iova.0 < size);
        let last = mapping.gpa.0 + (size - 1);
        assert_eq!(last >> self.options.host_address_width, 0);
        assert!(match access {
            Access::Read => mapping.read,
            Access::Write => mapping.write,
        });
        // Without tables the address itself says that it is an interrupt.
        if !matches!(context.stage, Stage::PassThrough { .. }) {
            assert!(mapping.gpa.0 > *INTERRUPTS.end() || last < *INTERRUPTS.start());
        }
    }
}

fn contents(ram: &GuestRam) -> Vec<u8> {
    let mut bytes = vec![0; usize::try_from(MEMORY).expect("a small memory")];
    ram.read_slice(&mut bytes, GuestAddress(0)).expect("memory");
    bytes
}

/// A walk may set accessed bits, and for a write one dirty bit, where the tables keep them.
fn check_changes(stage: &Stage, access: Access, before: &[u8], after: &[u8]) {
    if before == after {
        return;
    }
    let (accessed, dirty) = match stage {
        Stage::First {
            walk_snoop: true, ..
        } => (1 << 5, 1 << 6),
        Stage::Second {
            access_dirty: true,
            walk_snoop: true,
            ..
        } => (1 << 8, 1 << 9),
        _ => (0, 0),
    };
    let mut made_dirty = 0;
    for (before, after) in before.chunks_exact(8).zip(after.chunks_exact(8)) {
        let [before, after] =
            [before, after].map(|qword| u64::from_le_bytes(qword.try_into().expect("a qword")));
        let set = after & !before;
        assert_eq!(before & !after, 0, "a bit was cleared");
        assert_eq!(set & !(accessed | dirty), 0, "a bit was set");
        made_dirty += u32::from(set & dirty != 0);
    }
    assert!(made_dirty <= u32::from(access == Access::Write));
}

struct Naive {
    gpa: u64,
    read: bool,
    write: bool,
}

/// What good tables say, without any check.
fn naive(ram: &GuestRam, stage: &Stage, iova: Iova, access: Access) -> Naive {
    let (table, levels, first) = match *stage {
        Stage::First { table, levels, .. } => (table, levels, true),
        Stage::Second { table, levels, .. } => (table, levels, false),
        Stage::Off | Stage::PassThrough { .. } => unreachable!("without tables"),
    };
    let mut at = table.0;
    let mut all = u64::MAX;
    for level in (0..levels).rev() {
        let shift = 12 + 9 * u32::from(level);
        at = at & 0x000f_ffff_ffff_f000 | (iova.0 >> shift & 0x1ff) << 3;
        at = ram.read_obj(GuestAddress(at)).expect("a table");
        all &= at;
        if level == 0 || at & 0x80 != 0 {
            let inside = (1 << shift) - 1;
            let gpa = at & 0x000f_ffff_ffff_f000 & !inside | iova.0 & inside;
            let (read, mut write, dirty) = match *stage {
                Stage::First {
                    supervisor,
                    write_protect,
                    ..
                } => (
                    true,
                    all & 2 != 0 || supervisor && !write_protect,
                    at & 1 << 6 != 0,
                ),
                Stage::Second { access_dirty, .. } => (
                    all & 1 != 0,
                    all & 2 != 0,
                    !access_dirty || at & 1 << 9 != 0,
                ),
                Stage::Off | Stage::PassThrough { .. } => unreachable!("without tables"),
            };
            write &= dirty;
            assert!(
                !first || all & 1 != 0,
                "{access:?} of a page that is not present"
            );
            return Naive { gpa, read, write };
        }
    }
    unreachable!("the lowest level maps pages")
}

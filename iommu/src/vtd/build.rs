//! Writes remapping tables, as an operating system does: for tests, test guests and fuzzing.
//!
//! The builder keeps nothing but addresses: what is mapped is in the tables. It never checks what a unit
//! offers, so that it can also write what a unit must refuse.
//!
//! ```
//! use iommu::vtd::build::{Format, PageTable, Permission, RamTables, RootTable, legacy};
//! use iommu::vtd::{Options, walk};
//! use iommu::{Access, Gpa, GuestRam, Iova, SourceId};
//! use vm_memory::GuestAddress;
//!
//! let ram = GuestRam::from_ranges(&[(GuestAddress(0), 1 << 20)])?;
//! let mut memory = RamTables::new(&ram, Gpa(0x1000)..Gpa(0x1_0000));
//! let pages = PageTable::new(&mut memory, Format::Second, 3).expect("a page");
//! pages
//!     .map(&mut memory, Iova(0x7000), Gpa(0x8_0000), 12, Permission::READ_WRITE)
//!     .expect("pages");
//! let roots = RootTable::legacy(&mut memory).expect("a page");
//! let device = SourceId(0x18);
//! roots
//!     .set(&mut memory, device, &legacy::second_stage(&pages, 5))
//!     .expect("a page");
//!
//! let options = Options::default();
//! let (context, _) = walk::context(&ram, &options, roots.root(), device).expect("a context");
//! let (mapping, _) = walk::page(
//!     &ram, &options, roots.root(), &context, Iova(0x7123), Access::Write,
//! )
//! .expect("a page");
//! assert_eq!((context.domain, mapping.gpa), (5, Gpa(0x8_0000)));
//! # Ok::<(), vm_memory::mmap::FromRangesError>(())
//! ```

use std::ops::Range;
use std::sync::atomic::Ordering;

use vm_memory::{Bytes, GuestAddress};

use super::spec::tables::{
    LEVEL_BITS, PAGE_SHIFT, POINTER, context, first_stage, pasid, pasid_directory, root, rtaddr,
    scalable_context, second_stage,
};
use super::walk::Root;
use crate::{Gpa, GuestRam, Iova, SourceId};

const PAGE_BYTES: u64 = 1 << PAGE_SHIFT;

/// Memory that tables are written to.
pub trait TableMemory {
    /// Loads an aligned qword; 0 where there is no memory.
    fn load(&self, at: Gpa) -> u64;
    /// Stores an aligned qword; nothing where there is no memory.
    fn store(&mut self, at: Gpa, value: u64);
    /// A page that is used for nothing else, filled with zeros; `None` when there is none left.
    fn page(&mut self) -> Option<Gpa>;
}

/// A range of guest RAM that tables are put into, page by page.
pub struct RamTables<'a> {
    ram: &'a GuestRam,
    free: Range<u64>,
}

impl<'a> RamTables<'a> {
    /// Tables go into `range`, whose start is page-aligned. Its pages are cleared as they are used.
    pub fn new(ram: &'a GuestRam, range: Range<Gpa>) -> RamTables<'a> {
        RamTables {
            ram,
            free: range.start.0..range.end.0,
        }
    }
}

impl TableMemory for RamTables<'_> {
    fn load(&self, at: Gpa) -> u64 {
        self.ram
            .load(GuestAddress(at.0), Ordering::Acquire)
            .unwrap_or(0)
    }

    fn store(&mut self, at: Gpa, value: u64) {
        // Where there is no memory a processor's store is lost too.
        let _ = self.ram.store(value, GuestAddress(at.0), Ordering::Release);
    }

    fn page(&mut self) -> Option<Gpa> {
        let page = self.free.start;
        let next = page.checked_add(PAGE_BYTES)?;
        if next > self.free.end {
            return None;
        }
        self.ram.write_slice(&[0; 4096], GuestAddress(page)).ok()?;
        self.free.start = next;
        Some(Gpa(page))
    }
}

/// Which page tables.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Format {
    /// First stage: the processor's.
    First,
    /// Second stage.
    Second,
}

/// What a page allows. The first stage always allows reads.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Permission {
    /// Reads.
    pub read: bool,
    /// Writes.
    pub write: bool,
}

impl Permission {
    /// Reads only.
    pub const READ: Permission = Permission {
        read: true,
        write: false,
    };
    /// Writes only (second stage).
    pub const WRITE: Permission = Permission {
        read: false,
        write: true,
    };
    /// Reads and writes.
    pub const READ_WRITE: Permission = Permission {
        read: true,
        write: true,
    };
}

/// Why something could not be written.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum BuildError {
    /// The memory has no page left for a table.
    #[error("no page is left for a table")]
    NoPage,
    /// A larger page is mapped there: unmap it first.
    #[error("a larger page is mapped there")]
    LargerPage,
}

/// A page table of some levels.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct PageTable {
    /// Its top table.
    pub top: Gpa,
    /// Its format.
    pub format: Format,
    /// 3 to 5 levels.
    pub levels: u8,
}

impl PageTable {
    /// An empty table of `levels` levels; `None` when the memory has no page left.
    pub fn new(memory: &mut impl TableMemory, format: Format, levels: u8) -> Option<PageTable> {
        Some(PageTable {
            top: memory.page()?,
            format,
            levels,
        })
    }

    /// Maps the page of `1 << shift` bytes (12, 21 or 30) at `iova` to `gpa`, and replaces what was
    /// mapped there before with this or a smaller page size. Tables above it allow everything. First
    /// stage: a user page, not accessed, not dirty.
    ///
    /// # Errors
    ///
    /// There is no page left, or a larger page is in the way.
    pub fn map(
        &self,
        memory: &mut impl TableMemory,
        iova: Iova,
        gpa: Gpa,
        shift: u8,
        permission: Permission,
    ) -> Result<(), BuildError> {
        let at = self.make(memory, iova, shift)?;
        let size = if shift > PAGE_SHIFT {
            second_stage::PAGE_SIZE
        } else {
            0
        };
        memory.store(at, gpa.0 & POINTER | size | self.bits(permission));
        Ok(())
    }

    /// Takes away what is mapped in the `1 << shift` bytes at `iova`. A larger page stays.
    pub fn unmap(&self, memory: &mut impl TableMemory, iova: Iova, shift: u8) {
        if let Some(at) = self.entry(memory, iova, shift) {
            memory.store(at, 0);
        }
    }

    /// Where the entry for `iova` in the table of entries of `1 << shift` bytes is, if there is such a
    /// table: to write into it what [`PageTable::map`] would not.
    pub fn entry(&self, memory: &impl TableMemory, iova: Iova, shift: u8) -> Option<Gpa> {
        let mut at = self.index(self.top, iova, self.levels);
        for level in (level(shift)..self.levels).rev() {
            at = self.index(self.next(memory.load(at))?, iova, level);
        }
        Some(at)
    }

    /// As [`PageTable::entry`], and makes the tables on the way.
    fn make(
        &self,
        memory: &mut impl TableMemory,
        iova: Iova,
        shift: u8,
    ) -> Result<Gpa, BuildError> {
        let mut at = self.index(self.top, iova, self.levels);
        for level in (level(shift)..self.levels).rev() {
            let entry = memory.load(at);
            let table = match self.next(entry) {
                Some(table) => table,
                None if self.maps_page(entry) => return Err(BuildError::LargerPage),
                None => {
                    let table = memory.page().ok_or(BuildError::NoPage)?;
                    memory.store(at, table.0 | self.bits(Permission::READ_WRITE));
                    table
                }
            };
            at = self.index(table, iova, level);
        }
        Ok(at)
    }

    fn index(&self, table: Gpa, iova: Iova, level: u8) -> Gpa {
        let shift = PAGE_SHIFT + LEVEL_BITS * (level - 1);
        Gpa(table.0 + (iova.0 >> shift & 0x1ff) * 8)
    }

    fn bits(&self, permission: Permission) -> u64 {
        let bit = |on: bool, bit: u64| if on { bit } else { 0 };
        match self.format {
            Format::First => {
                first_stage::PRESENT | first_stage::USER | bit(permission.write, first_stage::WRITE)
            }
            Format::Second => {
                bit(permission.read, second_stage::READ)
                    | bit(permission.write, second_stage::WRITE)
            }
        }
    }

    fn present(&self, entry: u64) -> bool {
        let bits = match self.format {
            Format::First => first_stage::PRESENT,
            Format::Second => second_stage::READ | second_stage::WRITE,
        };
        entry & bits != 0
    }

    fn maps_page(&self, entry: u64) -> bool {
        self.present(entry) && entry & second_stage::PAGE_SIZE != 0
    }

    fn next(&self, entry: u64) -> Option<Gpa> {
        (self.present(entry) && !self.maps_page(entry))
            .then_some(Gpa(entry & second_stage::ADDRESS))
    }

    /// The AW field that stands for this many levels.
    fn aw(&self) -> u64 {
        u64::from(self.levels.saturating_sub(2))
    }
}

/// The level whose entries map `1 << shift` bytes.
fn level(shift: u8) -> u8 {
    (shift - PAGE_SHIFT) / LEVEL_BITS + 1
}

/// A root table and the context tables below it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct RootTable {
    /// The root table.
    pub table: Gpa,
    scalable: bool,
}

impl RootTable {
    /// An empty root table of legacy mode.
    pub fn legacy(memory: &mut impl TableMemory) -> Option<RootTable> {
        Some(RootTable {
            table: memory.page()?,
            scalable: false,
        })
    }

    /// An empty root table of scalable mode.
    pub fn scalable(memory: &mut impl TableMemory) -> Option<RootTable> {
        Some(RootTable {
            table: memory.page()?,
            scalable: true,
        })
    }

    /// The value for RTADDR_REG.
    pub fn register(&self) -> u64 {
        let mode = if self.scalable {
            rtaddr::TTM_SCALABLE
        } else {
            rtaddr::TTM_LEGACY
        };
        self.table.0 | mode << rtaddr::TTM_SHIFT
    }

    /// What a unit makes of [`RootTable::register`].
    pub fn root(&self) -> Root {
        Root::from_register(self.register())
    }

    /// Where the context entry of `source` is; makes its table if there is none. `None` when the
    /// memory has no page left.
    pub fn context_entry(&self, memory: &mut impl TableMemory, source: SourceId) -> Option<Gpa> {
        let [bus, devfn] = source.0.to_be_bytes().map(u64::from);
        let (half, offset) = if self.scalable {
            (devfn >> 7, (devfn & 0x7f) * scalable_context::BYTES)
        } else {
            (0, devfn * context::BYTES)
        };
        let at = Gpa(self.table.0 + bus * root::BYTES + half * 8);
        Some(Gpa(table_at(memory, at)?.0 + offset))
    }

    /// Where the PASID entry of PASID 0 of `source` is (scalable mode); makes a context entry whose
    /// RID_PASID is 0, a PASID directory of 512 entries and a PASID table if there are none. `None`
    /// when the memory has no page left.
    pub fn pasid_entry(&self, memory: &mut impl TableMemory, source: SourceId) -> Option<Gpa> {
        let at = self.context_entry(memory, source)?;
        if memory.load(at) & scalable_context::PRESENT == 0 {
            // PDTS 2: `1 << 9` entries of 8 bytes are one page.
            let directory = memory.page()?;
            store_entry(
                memory,
                at,
                &[
                    directory.0 | 2 << scalable_context::PDTS_SHIFT | scalable_context::PRESENT,
                    0,
                    0,
                    0,
                ],
            );
        }
        let directory = Gpa(memory.load(at) & POINTER);
        table_at(memory, directory)
    }

    /// Writes the context entry (legacy mode, [`legacy`]) or PASID entry (scalable mode,
    /// [`scalable`]) of `source`; qwords that are not given become 0.
    ///
    /// # Errors
    ///
    /// There is no page left.
    pub fn set(
        &self,
        memory: &mut impl TableMemory,
        source: SourceId,
        entry: &[u64],
    ) -> Result<(), BuildError> {
        let (at, qwords) = if self.scalable {
            (self.pasid_entry(memory, source), pasid::QWORDS)
        } else {
            (self.context_entry(memory, source), 2)
        };
        let mut whole = [0; pasid::QWORDS];
        for (to, from) in whole.iter_mut().zip(entry) {
            *to = *from;
        }
        store_entry(
            memory,
            at.ok_or(BuildError::NoPage)?,
            whole.get(..qwords).unwrap_or(&[]),
        );
        Ok(())
    }
}

/// The table that the pointer at `at` points to; makes one if it is not present. The present bit of
/// root entries, PASID directory entries and their like is bit 0.
fn table_at(memory: &mut impl TableMemory, at: Gpa) -> Option<Gpa> {
    let entry = memory.load(at);
    if entry & pasid_directory::PRESENT != 0 {
        return Some(Gpa(entry & POINTER));
    }
    let table = memory.page()?;
    memory.store(at, table.0 | pasid_directory::PRESENT);
    Some(table)
}

/// Replaces an entry in the order that the specification asks for: not present, the rest, present.
fn store_entry(memory: &mut impl TableMemory, at: Gpa, entry: &[u64]) {
    memory.store(at, 0);
    for (&qword, offset) in entry.iter().zip((0..).step_by(8)).skip(1) {
        memory.store(Gpa(at.0 + offset), qword);
    }
    memory.store(at, entry.first().copied().unwrap_or(0));
}

/// Context entries of legacy mode, for [`RootTable::set`].
pub mod legacy {
    use super::{PageTable, context};

    /// Second-stage translation through `table`, whose levels decide AW.
    pub fn second_stage(table: &PageTable, domain: u16) -> [u64; 2] {
        [
            table.top.0 | context::TT_SECOND_STAGE << context::TT_SHIFT | context::PRESENT,
            table.aw() | u64::from(domain) << context::DID_SHIFT,
        ]
    }

    /// Pass-through; `aw` is the AW field of the largest width that the unit offers (2: 48 bits).
    pub fn pass_through(aw: u64, domain: u16) -> [u64; 2] {
        [
            context::TT_PASS_THROUGH << context::TT_SHIFT | context::PRESENT,
            aw | u64::from(domain) << context::DID_SHIFT,
        ]
    }
}

/// PASID entries of scalable mode, for [`RootTable::set`]. Walks snoop (PWSNP).
pub mod scalable {
    use super::{PageTable, pasid};

    /// First-stage translation through `table`, for requests with user privilege.
    pub fn first_stage(table: &PageTable, domain: u16) -> [u64; 3] {
        let mode = if table.levels == 5 {
            pasid::FSPM_5_LEVEL
        } else {
            pasid::FSPM_4_LEVEL
        };
        [
            pasid::PGTT_FIRST << pasid::PGTT_SHIFT | pasid::PRESENT,
            u64::from(domain) | pasid::PWSNP,
            table.top.0 | mode << pasid::FSPM_SHIFT,
        ]
    }

    /// Second-stage translation through `table`, without accessed and dirty bits.
    pub fn second_stage(table: &PageTable, domain: u16) -> [u64; 3] {
        [
            table.top.0
                | table.aw() << pasid::AW_SHIFT
                | pasid::PGTT_SECOND << pasid::PGTT_SHIFT
                | pasid::PRESENT,
            u64::from(domain) | pasid::PWSNP,
            0,
        ]
    }

    /// Pass-through.
    pub fn pass_through(domain: u16) -> [u64; 3] {
        [
            pasid::PGTT_PASS_THROUGH << pasid::PGTT_SHIFT | pasid::PRESENT,
            u64::from(domain),
            0,
        ]
    }
}

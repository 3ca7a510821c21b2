//! Machines whose devices sit below a VT-d unit.

use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use iommu::vtd::build::{Format, PageTable, Permission, RamTables, RootTable, legacy};
use iommu::vtd::spec::registers::{GCMD, RTADDR, global};
use iommu::vtd::{Options, Unit};
use iommu::{Bdf, Gpa, GuestRam, Invalidation, Invalidations, Iova, MsiSink, Upstream};

use crate::memory::PAGE_SIZE;

/// How the addresses of all functions on bus 0 are translated.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Remapping {
    /// There is no remapping unit.
    Absent,
    /// Pass-through.
    PassThrough,
    /// Second-stage tables, which map all RAM one to one in pages of 4 KiB.
    Pages,
}

/// A remapping unit and its tables, which the test may change.
pub struct RemappedMemory {
    ram: GuestRam,
    unit: Arc<Unit>,
    invalidations: Arc<Invalidations>,
    tables: PageTable,
    lock: Mutex<()>,
}

/// Domain of all functions.
const DOMAIN: u16 = 1;

impl RemappedMemory {
    /// A unit that is turned on, with tables in `space`; `regions` are mapped.
    pub(crate) fn new(
        ram: &GuestRam,
        sink: Arc<dyn MsiSink>,
        space: std::ops::Range<u64>,
        regions: &[std::ops::Range<u64>],
        pass_through: bool,
    ) -> (Arc<RemappedMemory>, Upstream) {
        let mut memory = RamTables::new(ram, Gpa(space.start)..Gpa(space.end));
        let tables = PageTable::new(&mut memory, Format::Second, 4).expect("a page");
        let pages = regions.iter().cloned().flat_map(|r| r.step_by(4096));
        for page in pages {
            tables
                .map(
                    &mut memory,
                    Iova(page),
                    Gpa(page),
                    12,
                    Permission::READ_WRITE,
                )
                .expect("room for tables");
        }
        let root = RootTable::legacy(&mut memory).expect("a page");
        let entry = if pass_through {
            legacy::pass_through(2, DOMAIN)
        } else {
            legacy::second_stage(&tables, DOMAIN)
        };
        for device in 1..Bdf::DEVICES {
            let source = Bdf::new(0, device, 0).expect("a device number").source_id();
            root.set(&mut memory, source, &entry).expect("a page");
        }
        let invalidations = Invalidations::new();
        let options = Options::default();
        let iotlb = options.iotlb;
        let unit = Unit::new(ram.clone(), options, sink, Arc::clone(&invalidations));
        let unit = unit.expect("a unit");
        unit.write(RTADDR, &root.register().to_le_bytes());
        unit.write(GCMD, &global::SRTP.to_le_bytes());
        unit.write(GCMD, &global::TE.to_le_bytes());
        let remapper = Arc::clone(&unit) as _;
        let upstream = Upstream::new(ram.clone(), unit.sink()).below(
            remapper,
            Arc::clone(&invalidations),
            iotlb,
        );
        let memory = RemappedMemory {
            ram: ram.clone(),
            unit,
            invalidations,
            tables,
            lock: Mutex::new(()),
        };
        (Arc::new(memory), upstream)
    }

    /// The unit.
    pub fn unit(&self) -> &Arc<Unit> {
        &self.unit
    }

    /// What the unit publishes to.
    pub fn invalidations(&self) -> &Arc<Invalidations> {
        &self.invalidations
    }

    fn guard(&self) -> MutexGuard<'_, ()> {
        self.lock.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Maps the page at `iova`, inside RAM, to the page at `gpa`.
    pub fn map(&self, iova: u64, gpa: Gpa) {
        let _one = self.guard();
        // The tables above it are there, since all RAM was mapped once.
        let mut memory = RamTables::new(&self.ram, Gpa(0)..Gpa(0));
        self.tables
            .map(&mut memory, Iova(iova), gpa, 12, Permission::READ_WRITE)
            .expect("inside RAM");
    }

    /// Takes the page at `iova` out of the tables; caches still have it.
    pub fn unmap(&self, iova: u64) {
        let _one = self.guard();
        let mut memory = RamTables::new(&self.ram, Gpa(0)..Gpa(0));
        self.tables.unmap(&mut memory, Iova(iova), 12);
    }

    /// Invalidates the page at `iova`; returns the numbers to drain.
    pub fn invalidate(&self, iova: u64) -> (u64, u64) {
        let since = self.invalidations.sequence();
        let to = self.invalidations.publish(Invalidation::PageTranslations {
            domain: DOMAIN,
            start: Iova(iova),
            last: Iova(iova + PAGE_SIZE - 1),
        });
        (since, to)
    }
}

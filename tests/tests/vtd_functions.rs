//! DMA and signals of real functions through a real VT-d unit, in every way that it translates.
//!
//! The tests play operating system: they write the tables and the unit's registers, and drive the
//! DMA probe and edu by theirs. Where an address is refused, what lies at its own and at the
//! translated place must keep what it had.

use std::sync::Arc;
use std::time::Instant;

use devices::dma_probe::spec::{self as probe, command, status};
use devices::dma_probe::{DmaProbe, ProbeStats};
use devices::edu::spec as edu;
use devices::edu::{Edu, EduOptions};
use iommu::vtd::build::{Format, PageTable, Permission, RamTables, RootTable, legacy, scalable};
use iommu::vtd::spec::capability::FAULT_RECORDING_REGISTERS;
use iommu::vtd::spec::registers::{self as reg, FRCD_LEN, frcd, fsts, global};
use iommu::vtd::{Options, Unit};
use iommu::{
    Bdf, FaultReason, Gpa, Invalidations, IotlbGeometry, Iova, MsiMessage, MsiSink, SourceId,
    Upstream,
};
use tests::{Delivery, DmaBuffer, GuestBar, GuestFunction, Machine, PAGE_SIZE, Side, TIMEOUT};

const PROBE_SLOT: u8 = 2;
const EDU_SLOT: u8 = 4;
const DOMAIN: u16 = 5;

/// Input addresses, with what is mapped there; first-stage tables have no write-only pages. They
/// are addresses of RAM too, which a function reaches when it is not translated.
const BOTH: u64 = 0x100_0000;
const READ_ONLY: u64 = BOTH + PAGE_SIZE;
const WRITE_ONLY: u64 = READ_ONLY + PAGE_SIZE;
const HOLE: u64 = WRITE_ONLY + PAGE_SIZE;
const INPUTS: [u64; 4] = [BOTH, READ_ONLY, WRITE_ONLY, HOLE];

/// What the pages at the input addresses themselves have.
const CANARY: u64 = 0x0ca9_a417_0ca9_a417;
/// What the mapped pages have, in the order of their input addresses.
const CONTENTS: [u64; 3] = [0xb07b_07b0, 0x5ead_5ead, 0x3217_3217];
const WRITTEN: u64 = 0x1122_3344_5566_7788;

fn source(slot: u8) -> SourceId {
    Bdf::new(0, slot, 0).expect("a slot").source_id()
}

/// A function that a test drives: its device, what it is in configuration space, its registers.
struct Function<D> {
    device: Arc<D>,
    _function: GuestFunction,
    bar: GuestBar,
}

impl<D: pci::PciDevice + 'static> Function<D> {
    fn attach(
        machine: &Arc<Machine>,
        slot: u8,
        (endpoint, device): (pci::Endpoint, Arc<D>),
    ) -> Self {
        machine.attach(endpoint, Arc::clone(&device) as _);
        let function = GuestFunction::probe(machine, slot);
        let bar = function.bar(0);
        Function {
            device,
            _function: function,
            bar,
        }
    }

    /// Waits until a register has some value.
    fn until(&self, register: u64, reached: impl Fn(u32) -> bool) -> u32 {
        let start = Instant::now();
        loop {
            let value = self.bar.read(register);
            if reached(value) {
                return value;
            }
            assert!(start.elapsed() < TIMEOUT, "register {register:#x} is stuck");
            std::thread::yield_now();
        }
    }
}

/// A fault as it is recorded.
#[derive(Debug, PartialEq, Eq)]
struct Recorded {
    source: SourceId,
    reason: FaultReason,
    /// The page's address, or an interrupt's index at bit 48.
    info: u64,
    read: bool,
}

/// Both functions below one unit.
struct Bench {
    machine: Arc<Machine>,
    unit: Arc<Unit>,
    frames: DmaBuffer,
    probe: Function<DmaProbe>,
    edu: Function<Edu>,
}

impl Bench {
    /// Translation is on, with tables that `tables` writes; it is given the pages to map.
    fn new(tables: impl FnOnce(&mut RamTables<'_>, [Gpa; 3]) -> RootTable) -> Bench {
        let machine = Machine::new();
        let ram = machine.ram().clone();
        let invalidations = Invalidations::new();
        let sink = Arc::clone(machine.interrupts()) as Arc<dyn MsiSink>;
        let unit = Unit::new(
            ram.clone(),
            Options::default(),
            sink,
            Arc::clone(&invalidations),
        )
        .expect("a unit");
        let upstream = Upstream::new(ram.clone(), unit.sink()).below(
            Arc::clone(&unit) as _,
            invalidations,
            IotlbGeometry::default(),
        );
        let bdf = |slot| Bdf::new(0, slot, 0).expect("a slot");
        let probe = DmaProbe::new("probe0", bdf(PROBE_SLOT), &upstream).expect("a probe");
        let edu = Edu::new("edu0", EduOptions::default(), bdf(EDU_SLOT), &upstream);
        let bench = Bench {
            probe: Function::attach(&machine, PROBE_SLOT, probe),
            edu: Function::attach(&machine, EDU_SLOT, edu.expect("edu")),
            frames: machine.dma(Side::High, 3),
            machine,
            unit,
        };
        for page in INPUTS {
            for at in (page..page + PAGE_SIZE).step_by(8) {
                bench.machine.write(Gpa(at), CANARY);
            }
        }
        for (page, content) in (0..).zip(CONTENTS) {
            for at in (0..PAGE_SIZE).step_by(8) {
                bench.frames.write(page * PAGE_SIZE + at, content);
            }
        }
        let space = bench.machine.dma(Side::Low, 32);
        let mut memory = RamTables::new(&ram, space.address()..space.at(space.len() - 1));
        let roots = tables(
            &mut memory,
            [0, 1, 2].map(|n| bench.frames.at(n * PAGE_SIZE)),
        );
        bench
            .unit
            .write(reg::RTADDR, &roots.register().to_le_bytes());
        bench.command(global::SRTP);
        bench.command(global::TE);
        bench
    }

    fn r32(&self, offset: u64) -> u32 {
        let mut data = [0; 4];
        self.unit.read(offset, &mut data);
        u32::from_le_bytes(data)
    }

    fn r64(&self, offset: u64) -> u64 {
        let mut data = [0; 8];
        self.unit.read(offset, &mut data);
        u64::from_le_bytes(data)
    }

    /// A command to the unit, which is over when its status says so.
    fn command(&self, bit: u32) {
        let value = self.r32(reg::GSTS) & global::LASTING | bit;
        self.unit.write(reg::GCMD, &value.to_le_bytes());
        let start = Instant::now();
        while self.r32(reg::GSTS) & bit == 0 {
            assert!(start.elapsed() < TIMEOUT, "command {bit:#x} does not end");
            std::thread::yield_now();
        }
    }

    /// The first recorded fault, which is taken out.
    fn take_fault(&self) -> Option<Recorded> {
        let status = self.r32(reg::FSTS);
        if status & fsts::PPF == 0 {
            return None;
        }
        let index = u64::from(status >> fsts::FRI_SHIFT & 0xff);
        let at = FAULT_RECORDING_REGISTERS + index * FRCD_LEN;
        let (low, high) = (self.r64(at), self.r64(at + 8));
        assert_ne!(high & frcd::F, 0);
        self.unit.write(at + 12, &(1u32 << 31).to_le_bytes());
        let [id_low, id_high, _, _, reason, ..] = high.to_le_bytes();
        Some(Recorded {
            source: SourceId(u16::from_le_bytes([id_low, id_high])),
            reason: FaultReason(reason),
            info: low,
            read: high & frcd::T1 != 0,
        })
    }

    fn no_fault(&self) {
        assert_eq!(self.take_fault(), None);
    }

    /// Exactly one fault, of a DMA.
    fn fault(&self, slot: u8, address: u64, read: bool, reason: FaultReason) {
        let expected = Recorded {
            source: source(slot),
            reason,
            info: address & !(PAGE_SIZE - 1),
            read,
        };
        assert_eq!(self.take_fault(), Some(expected), "{address:#x}");
        self.no_fault();
    }

    /// Runs a command of the probe: status, reason and bytes done.
    fn run(&self, command: u32, address: u64, length: u64) -> (u32, u32, u64) {
        let bar = &self.probe.bar;
        bar.write(probe::ADDRESS, address);
        bar.write(probe::LENGTH, length);
        bar.write(probe::COMMAND, command);
        let end = self.probe.until(probe::STATUS, |now| now != status::BUSY);
        (end, bar.read(probe::REASON), bar.read(probe::DONE))
    }

    fn works(&self, command: u32, address: u64, length: u64) {
        let done = if command == command::SIGNAL {
            0
        } else {
            length
        };
        let end = self.run(command, address, length);
        assert_eq!(end, (status::OK, 0, done), "{command} {address:#x}");
        self.no_fault();
    }

    fn set_data(&self, data: u64) {
        self.probe.bar.write(probe::DATA, data);
    }

    fn data(&self) -> u64 {
        self.probe.bar.read(probe::DATA)
    }

    /// The probe is refused at `address`: it says so, the unit has recorded it, nothing has changed.
    fn refused(&self, command: u32, address: u64, reason: FaultReason) {
        self.set_data(WRITTEN);
        let before = self.memory();
        let end = self.run(command, address, 8);
        let blocked = (status::BLOCKED, reason.0.into(), 0);
        assert_eq!(
            end,
            blocked,
            "{command} {address:#x}: {}",
            reason.describe()
        );
        self.fault(PROBE_SLOT, address, command == command::READ, reason);
        assert_eq!(self.memory(), before, "{command} {address:#x}");
    }

    /// What is in the pages that could have been reached.
    fn memory(&self) -> Vec<u64> {
        let qwords = || (0..PAGE_SIZE).step_by(8);
        let here = INPUTS
            .iter()
            .flat_map(|page| qwords().map(move |at| self.machine.read(Gpa(page + at))));
        let frames = (0..3).flat_map(|page| {
            qwords().map(move |at| self.frames.read::<u64>(page * PAGE_SIZE + at))
        });
        here.chain(frames).collect()
    }

    /// Nothing has reached the pages at the input addresses themselves.
    fn untouched(&self) {
        let count = self.memory().iter().filter(|&&q| q == CANARY).count();
        assert_eq!(count, 4 * 512);
    }

    /// A transfer of edu, from start to end.
    fn transfer(&self, from: u64, to: u64, count: u64, command: u64) {
        let bar = &self.edu.bar;
        bar.write(edu::DMA_SOURCE, from);
        bar.write(edu::DMA_DESTINATION, to);
        bar.write(edu::DMA_COUNT, count);
        bar.write(edu::DMA_COMMAND, command | edu::command::RUN);
        self.edu.until(edu::DMA_COMMAND, |now| now & 1 == 0);
    }

    fn load(&self, address: u64) {
        self.transfer(address, edu::BUFFER, 16, 0);
    }

    fn save(&self, address: u64) {
        self.transfer(edu::BUFFER, address, 16, edu::command::TO_RAM);
    }
}

/// The pages at their input addresses.
fn pages(memory: &mut RamTables<'_>, frames: [Gpa; 3], format: Format, levels: u8) -> PageTable {
    let pages = PageTable::new(memory, format, levels).expect("a page");
    let [both, read_only, write_only] = frames;
    let mut map = |iova, gpa, permission| {
        pages
            .map(memory, Iova(iova), gpa, 12, permission)
            .expect("a page");
    };
    map(BOTH, both, Permission::READ_WRITE);
    map(READ_ONLY, read_only, Permission::READ);
    if format == Format::Second {
        map(WRITE_ONLY, write_only, Permission::WRITE);
    }
    pages
}

fn both_functions(memory: &mut RamTables<'_>, roots: RootTable, entry: &[u64]) -> RootTable {
    for slot in [PROBE_SLOT, EDU_SLOT] {
        roots.set(memory, source(slot), entry).expect("a page");
    }
    roots
}

/// Second-stage tables in legacy mode, 39 bits.
fn legacy_second_stage() -> Bench {
    Bench::new(|memory, frames| {
        let pages = pages(memory, frames, Format::Second, 3);
        let roots = RootTable::legacy(memory).expect("a page");
        both_functions(memory, roots, &legacy::second_stage(&pages, DOMAIN))
    })
}

/// Second-stage tables in scalable mode, 48 bits.
fn scalable_second_stage() -> Bench {
    Bench::new(|memory, frames| {
        let pages = pages(memory, frames, Format::Second, 4);
        let roots = RootTable::scalable(memory).expect("a page");
        both_functions(memory, roots, &scalable::second_stage(&pages, DOMAIN))
    })
}

/// First-stage tables in scalable mode, 4 levels.
fn scalable_first_stage() -> Bench {
    Bench::new(|memory, frames| {
        let pages = pages(memory, frames, Format::First, 4);
        let roots = RootTable::scalable(memory).expect("a page");
        both_functions(memory, roots, &scalable::first_stage(&pages, DOMAIN))
    })
}

/// What works through tables, whatever their format.
fn translated(bench: &Bench) {
    bench.works(command::READ, BOTH, 8);
    assert_eq!(bench.data(), CONTENTS[0]);
    bench.works(command::READ, READ_ONLY + 8, 8);
    assert_eq!(bench.data(), CONTENTS[1]);
    bench.set_data(WRITTEN);
    bench.works(command::WRITE, BOTH + 16, 8);
    assert_eq!(bench.frames.read::<u64>(16), WRITTEN);
    bench.works(command::SIGNAL, BOTH + 24, 4);
    assert_eq!(bench.frames.read::<u64>(24), WRITTEN & 0xffff_ffff);
    bench.untouched();
}

/// The first page of an access is written, the second refuses.
fn half_refused(bench: &Bench, reason: FaultReason) {
    bench.set_data(WRITTEN);
    let (end, said, done) = bench.run(command::WRITE, BOTH + 2048, PAGE_SIZE);
    assert_eq!((end, said, done), (status::BLOCKED, reason.0.into(), 2048));
    bench.fault(PROBE_SLOT, READ_ONLY, false, reason);
    assert_eq!(bench.frames.read::<u64>(PAGE_SIZE - 8), WRITTEN);
    assert_eq!(bench.frames.read::<u64>(PAGE_SIZE), CONTENTS[1]);
    bench.untouched();
}

#[test]
fn legacy_second_stage_translates_and_blocks() {
    let bench = legacy_second_stage();
    translated(&bench);
    bench.set_data(WRITTEN);
    bench.works(command::WRITE, WRITE_ONLY, 8);
    assert_eq!(bench.frames.read::<u64>(2 * PAGE_SIZE), WRITTEN);
    bench.refused(command::READ, WRITE_ONLY, FaultReason::READ_DENIED);
    bench.refused(command::WRITE, READ_ONLY, FaultReason::WRITE_DENIED);
    bench.refused(command::SIGNAL, READ_ONLY, FaultReason::WRITE_DENIED);
    bench.refused(command::READ, HOLE, FaultReason::READ_DENIED);
    bench.refused(command::WRITE, HOLE, FaultReason::WRITE_DENIED);
    bench.refused(command::SIGNAL, HOLE, FaultReason::WRITE_DENIED);
    let beyond = FaultReason::ADDRESS_BEYOND_WIDTH;
    bench.refused(command::READ, 1 << 39 | BOTH, beyond);
    bench.refused(command::WRITE, 1 << 39 | BOTH, beyond);
    half_refused(&bench, FaultReason::WRITE_DENIED);
    let stats = bench.probe.device.stats();
    assert_eq!((stats.errors, stats.blocked), (9, 9));
    let counters = bench.unit.counters();
    assert_eq!((counters.faults, counters.faults_lost), (9, 0));
}

#[test]
fn scalable_second_stage_translates_and_blocks() {
    let bench = scalable_second_stage();
    translated(&bench);
    bench.refused(command::READ, WRITE_ONLY, FaultReason::SM_READ_DENIED);
    bench.refused(command::WRITE, READ_ONLY, FaultReason::SM_WRITE_DENIED);
    for command in [command::READ, command::WRITE, command::SIGNAL] {
        bench.refused(command, HOLE, FaultReason::SS_NOT_PRESENT);
        bench.refused(
            command,
            1 << 48 | BOTH,
            FaultReason::SM_ADDRESS_BEYOND_WIDTH,
        );
    }
    half_refused(&bench, FaultReason::SM_WRITE_DENIED);
}

#[test]
fn scalable_first_stage_translates_and_blocks() {
    let bench = scalable_first_stage();
    translated(&bench);
    bench.refused(command::WRITE, READ_ONLY, FaultReason::SM_WRITE_DENIED);
    bench.refused(command::SIGNAL, READ_ONLY, FaultReason::SM_WRITE_DENIED);
    for command in [command::READ, command::WRITE, command::SIGNAL] {
        bench.refused(command, HOLE, FaultReason::FS_NOT_PRESENT);
        bench.refused(command, 1 << 47 | BOTH, FaultReason::NOT_CANONICAL);
    }
    half_refused(&bench, FaultReason::SM_WRITE_DENIED);
}

/// The probe passes through; edu has no entry in the tables.
fn passed_through(bench: &Bench, beyond: FaultReason, absent: FaultReason) {
    bench.works(command::READ, BOTH, 8);
    assert_eq!(bench.data(), CANARY);
    bench.set_data(WRITTEN);
    bench.works(command::WRITE, BOTH + 16, 8);
    bench.works(command::SIGNAL, BOTH + 24, 4);
    assert_eq!(bench.machine.read::<u64>(Gpa(BOTH + 16)), WRITTEN);
    assert_eq!(bench.machine.read::<u32>(Gpa(BOTH + 24)), 0x5566_7788);
    // No memory there, but that is not the unit's concern.
    let end = bench.run(command::READ, 1 << 45, 8);
    assert_eq!(end, (status::NO_MEMORY, 0, 0));
    bench.no_fault();
    for command in [command::READ, command::WRITE, command::SIGNAL] {
        bench.refused(command, 1 << 48 | BOTH, beyond);
    }
    let before = bench.memory();
    bench.load(BOTH);
    bench.fault(EDU_SLOT, BOTH, true, absent);
    bench.save(HOLE);
    bench.fault(EDU_SLOT, HOLE, false, absent);
    assert_eq!(bench.memory(), before);
}

#[test]
fn legacy_pass_through_is_for_one_function() {
    let bench = Bench::new(|memory, _| {
        let roots = RootTable::legacy(memory).expect("a page");
        let entry = legacy::pass_through(2, DOMAIN);
        roots
            .set(memory, source(PROBE_SLOT), &entry)
            .expect("a page");
        roots
    });
    passed_through(
        &bench,
        FaultReason::ADDRESS_BEYOND_WIDTH,
        FaultReason::CONTEXT_NOT_PRESENT,
    );
}

#[test]
fn scalable_pass_through_is_for_one_function() {
    let bench = Bench::new(|memory, _| {
        let roots = RootTable::scalable(memory).expect("a page");
        let entry = scalable::pass_through(DOMAIN);
        roots
            .set(memory, source(PROBE_SLOT), &entry)
            .expect("a page");
        roots
    });
    passed_through(
        &bench,
        FaultReason::SM_ADDRESS_BEYOND_HOST,
        FaultReason::SM_CONTEXT_NOT_PRESENT,
    );
}

/// edu's 28 address lines reach memory above 4 GiB, for the unit translates; what it refuses changes
/// neither the buffer nor memory.
#[test]
fn edu_moves_what_it_may_and_nothing_else() {
    type Reasons = [FaultReason; 4];
    let modes: [(fn() -> Bench, Reasons); 3] = [
        (
            legacy_second_stage,
            [
                FaultReason::READ_DENIED,
                FaultReason::READ_DENIED,
                FaultReason::WRITE_DENIED,
                FaultReason::WRITE_DENIED,
            ],
        ),
        (
            scalable_second_stage,
            [
                FaultReason::SS_NOT_PRESENT,
                FaultReason::SM_READ_DENIED,
                FaultReason::SM_WRITE_DENIED,
                FaultReason::SS_NOT_PRESENT,
            ],
        ),
        (
            scalable_first_stage,
            [
                FaultReason::FS_NOT_PRESENT,
                FaultReason::FS_NOT_PRESENT,
                FaultReason::SM_WRITE_DENIED,
                FaultReason::FS_NOT_PRESENT,
            ],
        ),
    ];
    for (bench, [hole_read, write_only_read, read_only_write, hole_write]) in modes {
        let bench = bench();
        assert!(bench.frames.address().0 >= 4 << 30);
        bench.load(READ_ONLY);
        bench.save(BOTH + 64);
        bench.no_fault();
        assert_eq!(bench.frames.read::<u64>(64), CONTENTS[1]);
        assert_eq!(bench.frames.read::<u64>(80), CONTENTS[0]);
        let before = bench.memory();
        bench.load(HOLE);
        bench.fault(EDU_SLOT, HOLE, true, hole_read);
        // Its first half can be read, so half of it had been read when the other was refused. The first
        // stage has nothing at the second page; the second stage's must not be read.
        bench.load(WRITE_ONLY - 8);
        bench.fault(EDU_SLOT, WRITE_ONLY, true, write_only_read);
        bench.save(READ_ONLY);
        bench.fault(EDU_SLOT, READ_ONLY, false, read_only_write);
        bench.save(HOLE);
        bench.fault(EDU_SLOT, HOLE, false, hole_write);
        assert_eq!(bench.memory(), before);
        // The buffer still has what was loaded first.
        bench.save(BOTH + 128);
        assert_eq!(bench.frames.read::<u64>(128), CONTENTS[1]);
        assert_eq!(bench.frames.read::<u64>(136), CONTENTS[1]);
        let stats = bench.edu.device.stats();
        assert_eq!((stats.dma_refused, stats.dma_clamped), (4, 0));
        bench.untouched();
    }
}

/// An interrupt remapping table entry: physical destination APIC 2, from `source` only (9.10).
fn entry(vector: u64, source: SourceId) -> [u64; 2] {
    const VERIFY_ALL: u64 = 1 << 18;
    [2 << 40 | vector << 16 | 1, VERIFY_ALL | u64::from(source.0)]
}

/// The address of an interrupt request in remappable format (5.1.2.2), for an index below 32768.
fn request(index: u64) -> u64 {
    0xfee0_0010 | index << 5
}

#[test]
fn interrupt_requests_are_remapped_or_blocked() {
    let bench = legacy_second_stage();
    let sends = |address: u64, message: MsiMessage| {
        bench.works(command::SIGNAL, address, 4);
        let expected = Delivery {
            source: source(PROBE_SLOT),
            message,
        };
        assert_eq!(bench.machine.interrupts().take_log(), [expected]);
    };
    // Interrupt remapping is off: whatever is sent arrives, and is not translated as an address.
    bench.set_data(0x4041);
    let plain = MsiMessage {
        address: 0xfee0_1000,
        data: 0x4041,
    };
    sends(plain.address, plain);
    // A write of four bytes is no other thing.
    bench.works(command::WRITE, plain.address, 4);
    assert_eq!(bench.machine.interrupts().take_log().len(), 1);

    let table = bench.machine.dma(Side::Low, 1);
    for (index, entry) in [
        (5, entry(0x31, source(PROBE_SLOT))),
        (6, entry(0x32, source(EDU_SLOT))),
    ] {
        table.write(index * 16, entry[0]);
        table.write(index * 16 + 8, entry[1]);
    }
    // 256 entries; destinations of 8 bits.
    let irta = table.address().0 | 7;
    bench.unit.write(reg::IRTA, &irta.to_le_bytes());
    bench.command(global::SIRTP);
    bench.command(global::IRE);
    bench.set_data(0);
    let remapped = MsiMessage {
        address: 0xfee0_2000,
        data: 0x4031,
    };
    sends(request(5), remapped);
    let before = bench.memory();
    for (address, reason, index) in [
        (request(6), FaultReason::IR_SOURCE_DENIED, Some(6)),
        (request(7), FaultReason::IR_NOT_PRESENT, Some(7)),
        (request(256), FaultReason::IR_INDEX_BEYOND_TABLE, Some(256)),
        (plain.address, FaultReason::IR_COMPATIBILITY_BLOCKED, None),
    ] {
        let end = bench.run(command::SIGNAL, address, 4);
        assert_eq!(end, (status::BLOCKED, reason.0.into(), 0), "{address:#x}");
        let fault = bench.take_fault().expect("a fault");
        assert_eq!((fault.source, fault.reason), (source(PROBE_SLOT), reason));
        // Without an index the field is undefined.
        if let Some(index) = index {
            assert_eq!(fault.info, index << 48);
        }
        bench.no_fault();
    }
    assert!(bench.machine.interrupts().take_log().is_empty());
    assert_eq!(bench.memory(), before);
    assert_eq!(
        bench.probe.device.stats(),
        ProbeStats {
            writes: 1,
            signals: 6,
            bytes: 4,
            errors: 4,
            blocked: 4,
            ..ProbeStats::default()
        }
    );
    assert_eq!(bench.unit.counters().interrupts_blocked, 4);
}

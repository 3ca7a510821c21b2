//! How to write a PCI device and test it with the fake-guest kit: a copy engine and its driver.
//!
//! Read it from top to bottom: the specification, the device (registers on vCPU threads, work on a
//! worker), the driver, the tests. The tests play the guest; they reach the device only as a guest
//! can, through configuration space, BARs, memory and interrupts. No KVM and no kernel is needed.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU32, AtomicU64, Ordering};

use devices::worker::{Kick, Polled, QueueTask, Worker, WorkerOptions};
use iommu::{DmaError, DmaMemory, Gpa, Iova};
use pci::{
    BarIndex, BarKind, ClassCode, Endpoint, FunctionBuilder, Identity, MsiVector, PciDevice,
};
use tests::{DmaBuffer, GuestFunction, GuestVector, Machine, Side, TIMEOUT};

/// The specification, which device and driver share, and nothing else.
///
/// A ring of 16 descriptors in guest memory; the driver fills them and stores the index of the next
/// free one to the doorbell. The device copies, writes the descriptor's status and interrupts.
mod spec {
    /// Vendor and device ID.
    pub const ID: (u16, u16) = (0x1234, 0xc09e);
    /// Descriptors in the ring; one stays free, so that full and empty differ.
    pub const ENTRIES: u32 = 16;
    /// Most bytes that one descriptor copies.
    pub const MAX_LEN: u32 = 64 << 10;

    /// BAR 0: eight bytes, address of the ring.
    pub const RING: u64 = 0x00;
    /// BAR 0: four bytes, the doorbell. Index of the first descriptor that is not the device's.
    pub const TAIL: u64 = 0x08;
    /// BAR 0: four bytes, read-only: 1 after the ring could not be read or written, until reset.
    pub const FAULT: u64 = 0x0c;
    /// BAR 0: the MSI-X table and the pending bits.
    pub const MSIX_TABLE: u64 = 0x800;
    pub const MSIX_PBA: u64 = 0xc00;

    /// A descriptor: source (8 bytes), destination (8), length (4), status (4), padding (8).
    pub const DESCRIPTOR: u64 = 32;
    pub const SOURCE: u64 = 0;
    pub const DESTINATION: u64 = 8;
    pub const LENGTH: u64 = 16;
    pub const STATUS: u64 = 20;

    /// Status: written by the driver; the device has not ended it yet.
    pub const OPEN: u32 = 0;
    /// Status: copied.
    pub const DONE: u32 = 1;
    /// Status: too long, or source or destination is not memory.
    pub const ERROR: u32 = 2;
}

// ---------------------------------------------------------------------------------- The device

/// The registers. vCPU threads write them, the worker reads them, nobody waits.
#[derive(Default)]
struct Registers {
    ring: AtomicU64,
    tail: AtomicU32,
    fault: AtomicBool,
}

/// The half that lives on vCPU threads: it stores what was written, and kicks.
struct CopyEngine {
    registers: Arc<Registers>,
    worker: Worker<CopyTask>,
}

impl CopyEngine {
    /// Builds the function, starts its worker and plugs it into slot `slot`.
    fn plug(machine: &Machine, slot: u8) -> Arc<CopyEngine> {
        let identity = Identity {
            vendor: spec::ID.0,
            device: spec::ID.1,
            class: ClassCode {
                base: 0x08, // base system peripheral
                sub: 0x01,  // DMA controller
                interface: 0,
            },
            revision: 1,
            subsystem_vendor: 0,
            subsystem: 0,
        };
        // BARs that the guest can size and move, MSI-X, power management and function-level reset
        // are the bus's work. The device never sees accesses to the MSI-X structures.
        let bar = BarIndex(0);
        let builder = FunctionBuilder::new(identity)
            .bar(bar, 0x1000, BarKind::Memory32)
            .msix(1, (bar, spec::MSIX_TABLE), (bar, spec::MSIX_PBA));
        let endpoint = machine.build(builder, slot);
        let engine = Arc::new(CopyEngine::new(&endpoint));
        machine.attach(endpoint, Arc::<CopyEngine>::clone(&engine));
        engine
    }

    fn new(endpoint: &Endpoint) -> CopyEngine {
        let registers = Arc::<Registers>::default();
        let task = CopyTask {
            registers: Arc::clone(&registers),
            // The device's only way to memory, as one worker sees it.
            memory: endpoint.bus_master().dma.view(),
            vector: endpoint.msix().vector(0).expect("one vector"),
            head: 0,
            owed: false,
        };
        let kick = Kick::new().expect("eventfd");
        let options = WorkerOptions::default();
        CopyEngine {
            registers,
            worker: Worker::spawn("copy", &kick, task, options).expect("thread"),
        }
    }
}

/// The guest chooses offset and length of an access; whatever is not a register reads as zeroes and
/// ignores stores.
impl PciDevice for CopyEngine {
    fn bar_read(&self, _bar: BarIndex, offset: u64, data: &mut [u8]) {
        data.fill(0);
        let value = match offset {
            spec::RING => self.registers.ring.load(Ordering::Relaxed),
            spec::TAIL => self.registers.tail.load(Ordering::Relaxed).into(),
            spec::FAULT => self.registers.fault.load(Ordering::Relaxed).into(),
            _ => return,
        };
        for (to, from) in data.iter_mut().zip(value.to_le_bytes()) {
            *to = from;
        }
    }

    fn bar_write(&self, _bar: BarIndex, offset: u64, data: &[u8]) {
        if let (spec::RING, Ok(bytes)) = (offset, data.try_into()) {
            let ring = u64::from_le_bytes(bytes);
            self.registers.ring.store(ring, Ordering::Relaxed);
        }
        if let (spec::TAIL, Ok(bytes)) = (offset, data.try_into()) {
            // Any value is an index: a hostile guest gets at most one round of the ring.
            let tail = u32::from_le_bytes(bytes) % spec::ENTRIES;
            self.registers.tail.store(tail, Ordering::Relaxed);
            // Makes the store visible to the worker's next poll; a system call only if it sleeps.
            self.worker.kick();
        }
    }

    /// The bus has turned bus mastering off and waited: no transaction is under way.
    fn reset(&self) {
        self.worker.with(CopyTask::reset);
    }

    /// What was refused while bus mastering was off is tried again.
    fn bus_master_changed(&self, on: bool) {
        if on {
            self.worker.kick();
        }
    }
}

/// The half that lives on the worker's thread, which owns it: no lock anywhere.
struct CopyTask {
    registers: Arc<Registers>,
    memory: DmaMemory,
    vector: MsiVector,
    /// The next descriptor.
    head: u32,
    /// Descriptors have ended and the guest has not been interrupted for them.
    owed: bool,
}

impl CopyTask {
    fn reset(&mut self) {
        self.registers.ring.store(0, Ordering::Relaxed);
        self.registers.tail.store(0, Ordering::Relaxed);
        self.registers.fault.store(false, Ordering::Relaxed);
        self.head = 0;
        self.owed = false;
    }

    fn pending(&self) -> bool {
        self.head != self.registers.tail.load(Ordering::Relaxed)
            && !self.registers.fault.load(Ordering::Relaxed)
    }

    /// Carries out one descriptor. An error means that the ring itself cannot be used.
    fn descriptor(&self) -> Result<(), DmaError> {
        let ring = Iova(self.registers.ring.load(Ordering::Relaxed));
        let field = |offset| {
            let at = u64::from(self.head) * spec::DESCRIPTOR + offset;
            ring.checked_add(at).ok_or(DmaError::NotMapped(ring, at))
        };
        // Each field is read once: the guest may change it meanwhile.
        let source = self.memory.read_obj(field(spec::SOURCE)?)?;
        let destination = self.memory.read_obj(field(spec::DESTINATION)?)?;
        let len = self.memory.read_obj(field(spec::LENGTH)?)?;
        let status = match self.copy(Iova(source), Iova(destination), len) {
            Ok(()) => spec::DONE,
            Err(DmaError::BusMasterOff) => return Err(DmaError::BusMasterOff),
            Err(_) => spec::ERROR,
        };
        // Release: who sees the status sees the data.
        let at = field(spec::STATUS)?;
        self.memory.store(at, status, Ordering::Release)
    }

    fn copy(&self, source: Iova, destination: Iova, len: u32) -> Result<(), DmaError> {
        let refused = DmaError::NotMapped(source, len.into());
        if len > spec::MAX_LEN {
            return Err(refused);
        }
        let mut piece = [0; 4096];
        for start in (0..len).step_by(piece.len()) {
            let rest = usize::try_from(len - start).unwrap_or(usize::MAX);
            let (piece, _) = piece.split_at_mut(rest.min(4096));
            let at = |base: Iova| base.checked_add(start.into()).ok_or(refused);
            self.memory.read(at(source)?, piece)?;
            self.memory.write(at(destination)?, piece)?;
        }
        Ok(())
    }
}

impl QueueTask for CopyTask {
    fn poll(&mut self, budget: u32) -> Polled {
        let mut polled = Polled::default();
        while polled.work < budget && self.pending() {
            // Bus Master Enable cannot go off unnoticed inside a section: who clears it waits.
            let section = self.memory.section();
            let done = self.descriptor();
            drop(section);
            match done {
                Ok(()) => {
                    self.head = (self.head + 1) % spec::ENTRIES;
                    self.owed = true;
                    polled.work += 1;
                    polled.events[0] += 1;
                }
                Err(DmaError::BusMasterOff) => break,
                Err(_) => self.registers.fault.store(true, Ordering::Relaxed),
            }
        }
        polled
    }

    /// The doorbell always kicks, so nothing needs to be asked for before a sleep.
    fn arm(&mut self) {}

    /// Not without bus mastering: `poll` could do nothing, and the worker would spin.
    fn has_work(&mut self) -> bool {
        self.pending() && self.memory.space().bus_master()
    }

    fn disarm(&mut self) {}

    /// Called by the loop, once a batch, or as the moderation says.
    fn interrupt(&mut self, _source: usize) {
        if std::mem::take(&mut self.owed) {
            self.vector.signal();
        }
    }

    fn fds(&self, _fds: &mut Vec<std::os::fd::RawFd>) {}
}

// ---------------------------------------------------------------------------------- The driver

/// What a guest's driver would be. Its memory is real guest memory, its loads and stores go through
/// the root complex.
struct Driver {
    function: GuestFunction,
    ring: DmaBuffer,
    vector: GuestVector,
    tail: u32,
}

impl Driver {
    const SLOT: u8 = 5;

    /// Finds the function, places its BAR, enables it and sets up ring and interrupt.
    fn probe(machine: &Arc<Machine>) -> Driver {
        let function = GuestFunction::probe(machine, Self::SLOT);
        assert_eq!(function.config::<u16>(pci::spec::VENDOR_ID), spec::ID.0);
        let driver = Driver {
            // Above 4 GiB, where a device that cuts addresses off is found out.
            ring: machine.dma(Side::High, 1),
            vector: function.setup_msix(1).remove(0),
            function,
            tail: 0,
        };
        let address = driver.ring.address().0;
        driver.function.bar(0).write(spec::RING, address);
        driver
    }

    fn field(index: u32, offset: u64) -> u64 {
        u64::from(index) * spec::DESCRIPTOR + offset
    }

    /// Fills a descriptor and returns its index. The device does not know of it yet.
    fn push(&mut self, from: Gpa, to: Gpa, len: u32) -> u32 {
        let index = self.tail;
        let field = |offset| Self::field(index, offset);
        self.ring.write(field(spec::SOURCE), from.0);
        self.ring.write(field(spec::DESTINATION), to.0);
        self.ring.write(field(spec::LENGTH), len);
        self.ring.store(field(spec::STATUS), spec::OPEN);
        self.tail = (index + 1) % spec::ENTRIES;
        index
    }

    fn ring_doorbell(&self) {
        self.function.bar(0).write(spec::TAIL, self.tail);
    }

    fn status(&self, index: u32) -> u32 {
        self.ring.load(Self::field(index, spec::STATUS))
    }

    /// Sleeps on the interrupt until the descriptor has ended.
    fn wait(&self, index: u32) -> u32 {
        while self.status(index) == spec::OPEN {
            assert_ne!(self.vector.wait(TIMEOUT), 0, "no interrupt");
        }
        self.status(index)
    }

    fn copy(&mut self, from: Gpa, to: Gpa, len: u32) -> u32 {
        let index = self.push(from, to, len);
        self.ring_doorbell();
        self.wait(index)
    }
}

// ----------------------------------------------------------------------------------- The tests

fn set_up() -> (Arc<Machine>, Arc<CopyEngine>, Driver) {
    let machine = Machine::new();
    let engine = CopyEngine::plug(&machine, Driver::SLOT);
    let driver = Driver::probe(&machine);
    (machine, engine, driver)
}

/// The ring goes round more than twice, with several descriptors for each doorbell.
#[test]
fn data_arrives_and_the_guest_is_interrupted() {
    let (machine, _engine, mut driver) = set_up();
    let from = machine.dma(Side::Low, 16);
    let to = machine.dma(Side::High, 16);
    for round in 0..12u8 {
        from.fill(round + 1);
        to.fill(0);
        let len = 5000 + u32::from(round);
        let copies = [0u64, 0x5001, 0xa000].map(|at| driver.push(from.at(at), to.at(at), len));
        driver.ring_doorbell();
        for index in copies {
            assert_eq!(driver.wait(index), spec::DONE);
        }
        let expected = vec![round + 1; 5000 + usize::from(round)];
        assert_eq!(to.bytes(0xa000, expected.len()), expected);
        let behind = 0xa000 + u64::from(len);
        assert_eq!(to.read::<u8>(behind), 0, "a byte too much");
    }
}

#[test]
fn bad_descriptors_end_in_an_error_and_the_next_one_works() {
    let (machine, _engine, mut driver) = set_up();
    let page = machine.dma(Side::Low, 2);
    let (from, to) = (page.at(0), page.at(4096));
    let nowhere = Gpa(tests::layout::MMIO64.start);
    let bad = [
        (nowhere, to, 64),
        (from, nowhere, 64),
        (Gpa(u64::MAX - 8), to, 64),
        (from, Gpa(u64::MAX), 1),
        (from, to, spec::MAX_LEN + 1),
        (from, to, u32::MAX),
    ];
    for (from, to, len) in bad {
        assert_eq!(driver.copy(from, to, len), spec::ERROR);
    }
    assert_eq!(driver.copy(from, to, 4096), spec::DONE);
}

/// A ring where there is no memory cannot even hold a status: the function says so in a register.
#[test]
fn a_ring_outside_memory_is_a_fault_until_reset() {
    let (machine, engine, mut driver) = set_up();
    let page = machine.dma(Side::Low, 2);
    for ring in [tests::layout::MMIO64.start, u64::MAX - 7, 3] {
        let bar = driver.function.bar(0);
        bar.write(spec::RING, ring);
        bar.write(spec::TAIL, u32::MAX);
        // One poll on the worker's thread, so that it has seen the doorbell.
        engine.worker.with(|task| task.poll(spec::ENTRIES));
        assert_eq!(bar.read::<u32>(spec::FAULT), 1, "ring at {ring:#x}");

        driver.function.reset();
        driver = Driver::probe(&machine);
        assert_eq!(driver.function.bar(0).read::<u32>(spec::FAULT), 0);
        let status = driver.copy(page.at(0), page.at(4096), 4096);
        assert_eq!(status, spec::DONE);
    }
}

#[test]
fn nothing_moves_while_bus_mastering_is_off() {
    let (machine, engine, mut driver) = set_up();
    let page = machine.dma(Side::Low, 2);
    page.write(0, 7u8);
    driver.function.set_bus_master(false);
    let index = driver.push(page.at(0), page.at(4096), 4096);
    driver.ring_doorbell();
    let polled = engine.worker.with(|task| task.poll(spec::ENTRIES));
    assert_eq!(polled, Polled::default());
    assert_eq!(driver.status(index), spec::OPEN);
    assert_eq!(driver.vector.count(), 0);

    driver.function.set_bus_master(true);
    assert_eq!(driver.wait(index), spec::DONE);
    assert_eq!(page.read::<u8>(4096), 7);
}

/// Three descriptors with one doorbell are one batch, and a batch is one interrupt, now or later.
#[test]
fn a_masked_interrupt_is_pending_and_comes_once() {
    let (machine, _engine, mut driver) = set_up();
    let page = machine.dma(Side::Low, 2);
    driver.vector.mask();
    let copies = [0; 3].map(|_| driver.push(page.at(0), page.at(4096), 8));
    driver.ring_doorbell();
    let deadline = std::time::Instant::now() + TIMEOUT;
    while !driver.vector.pending() {
        assert!(std::time::Instant::now() < deadline, "not pending");
        std::thread::yield_now();
    }
    assert_eq!(copies.map(|index| driver.status(index)), [spec::DONE; 3]);
    assert_eq!(driver.vector.count(), 0);

    driver.vector.unmask();
    assert_eq!(driver.vector.wait(TIMEOUT), 1);
    assert!(!driver.vector.pending());
}

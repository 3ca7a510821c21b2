//! A VT-d remapping unit under a hostile driver: registers, invalidation queue, tables in memory, with
//! devices that read, write and interrupt meanwhile.
//!
//! What is demanded: nothing panics or hangs, each interrupt request is delivered or counted as blocked,
//! a translation stays within the page that it says, and after a machine reset all registers have their
//! reset values and the queue runs.

use std::sync::Arc;
use std::time::{Duration, Instant};

use iommu::vtd::spec::capability::{FAULT_RECORDING_REGISTERS, IOTLB_REGISTERS};
use iommu::vtd::spec::registers as reg;
use iommu::vtd::{Options, Unit};
use iommu::{
    Access, GuestRam, Invalidations, Iova, MsiLine, MsiMessage, MsiSink, Remapper, SourceId, Stage,
};
use vm_memory::{Bytes, GuestAddress};

use super::Input;
use crate::interrupts::Recorder;

/// Bytes of memory.
const RAM: u64 = 0x2_0000;
/// Pages with a purpose, by which the input has a chance to hit something.
const QUEUE: u64 = 0x1000;
const INTERRUPT_TABLE: u64 = 0x3000;
const ROOT: u64 = 0x4000;
const CONTEXTS: u64 = 0x5000;
const TABLES: u64 = 0x8000;
const STATUS: u64 = 0x1_f000;

/// Requester ids of the lines. The unit's own events have id 0.
const SOURCES: [u16; 3] = [0x0008, 0x0018, 0x0100];

struct Guest {
    unit: Arc<Unit>,
    ram: GuestRam,
    recorder: Arc<Recorder>,
    lines: Vec<Arc<dyn MsiLine>>,
    /// Requests that have been made of the unit.
    requests: u64,
    tail: u32,
}

/// Runs `data` as a hostile driver's accesses.
///
/// # Panics
///
/// The unit breaks one of the demands above.
pub fn vtd_unit(data: &[u8]) {
    let mut input = Input::new(data);
    let choice = input.byte();
    let on = |bit: u8| choice >> bit & 1 == 0;
    let options = Options {
        scalable: on(0),
        interrupt_remapping: on(1),
        extended_interrupt_mode: on(2),
        device_tlb: on(3),
        scalable_coherent: on(4),
        fault_records: if on(5) { 8 } else { 1 },
        host_address_width: if on(6) { 46 } else { 32 },
        ..Options::default()
    };
    let bytes = usize::try_from(RAM).expect("small");
    let ram = GuestRam::from_ranges(&[(GuestAddress(0), bytes)]).expect("memory");
    let recorder = Arc::new(Recorder::default());
    let unit = Unit::new(
        ram.clone(),
        options,
        Arc::clone(&recorder) as Arc<dyn MsiSink>,
        Invalidations::new(),
    )
    .expect("unit");
    let sink = unit.sink();
    let lines = SOURCES
        .iter()
        .map(|&source| sink.open(SourceId(source)).expect("line"))
        .collect();
    let mut guest = Guest {
        unit,
        ram,
        recorder,
        lines,
        requests: 0,
        tail: 0,
    };
    if input.byte() & 3 != 0 {
        guest.start(&mut input);
    }
    let mut steps = 0;
    while !input.is_empty() && steps < 400 {
        steps += 1;
        guest.step(&mut input);
    }
    guest.finish();
}

impl Guest {
    fn write32(&self, offset: u64, value: u32) {
        self.unit.write(offset, &value.to_le_bytes());
    }

    fn write64(&self, offset: u64, value: u64) {
        self.unit.write(offset, &value.to_le_bytes());
    }

    fn read32(&self, offset: u64) -> u32 {
        let mut data = [0; 4];
        self.unit.read(offset, &mut data);
        u32::from_le_bytes(data)
    }

    fn store(&self, address: u64, value: u64) {
        // Past the end of memory it does nothing.
        let _ = self.ram.write_obj(value, GuestAddress(address));
    }

    /// As a driver starts the unit, with a choice of modes.
    fn start(&mut self, input: &mut Input<'_>) {
        let choice = u64::from(input.byte());
        self.write64(reg::IQA, QUEUE | choice & 1 | (choice & 2) << 10);
        self.write64(reg::RTADDR, ROOT | (choice & 4) << 8);
        self.write64(reg::IRTA, INTERRUPT_TABLE | (choice & 8) << 8 | 7);
        self.write32(reg::GCMD, 0x4500_0000);
        self.write32(reg::GCMD, 0x8680_0000);
        self.write32(reg::FEADDR, 0xfee0_0000);
        self.write32(reg::FECTL, 0);
        self.write32(reg::IECTL, 0);
        self.store(ROOT, CONTEXTS | 1);
        self.store(ROOT + 8, CONTEXTS | 1);
    }

    /// An address for a table or a page: mostly one in memory.
    fn address(input: &mut Input<'_>) -> u64 {
        let page = u64::from(input.byte()) << 12;
        match input.byte() % 8 {
            0..6 => page % RAM,
            6 => RAM - 0x1000,
            _ => input.u64() & !0xfff,
        }
    }

    /// A descriptor at the tail.
    fn descriptor(&mut self, input: &mut Input<'_>) {
        let at = QUEUE + u64::from(self.tail);
        let kind = u64::from(input.byte());
        let mut low = kind & 0xf | u64::from(input.u16()) << 16 | (kind >> 4) << 4;
        let mut high = 0;
        match kind & 0xf {
            2 | 6 => high = Self::address(input) | u64::from(input.byte() % 24),
            5 => high = STATUS + u64::from(input.byte()),
            _ => low |= u64::from(input.u16()) << 32,
        }
        if input.one_in(8) {
            low ^= 1 << (input.byte() % 64);
        }
        self.store(at, low);
        self.store(at + 8, high);
        self.store(at + 16, 0);
        self.store(at + 24, 0);
        self.tail = (self.tail + if input.one_in(2) { 16 } else { 32 }) % 0x1000;
    }

    fn step(&mut self, input: &mut Input<'_>) {
        let line = usize::from(input.byte()) % self.lines.len();
        let source = SourceId(SOURCES[line]);
        match input.byte() % 16 {
            0 => {
                let offset = u64::from(input.u16() % 0x1010);
                self.write64(offset & !7, input.u64());
            }
            1 => {
                let offset = u64::from(input.u16() % 0x1010);
                self.write32(offset & !3, input.u32());
            }
            2 => {
                let registers = [
                    reg::RTADDR,
                    reg::IQA,
                    reg::IRTA,
                    reg::CCMD,
                    IOTLB_REGISTERS + reg::IOTLB,
                    IOTLB_REGISTERS + reg::IVA,
                ];
                let value = Self::address(input) | u64::from(input.u16() & 0xfff);
                self.write64(
                    input.pick(&registers),
                    value | u64::from(input.byte()) << 56,
                );
            }
            3 => {
                let bits = u32::from(input.byte()) << 24 | u32::from(input.byte() & 1) << 23;
                self.write32(reg::GCMD, bits);
            }
            4 => self.write32(
                input.pick(&[reg::FSTS, reg::ICS, reg::FECTL, reg::IECTL]),
                u32::from(input.byte()) << 24 | u32::from(input.byte()),
            ),
            5 => {
                let record = u64::from(input.byte() % 9);
                self.write32(FAULT_RECORDING_REGISTERS + 16 * record + 12, 1 << 31);
            }
            6 | 7 => self.descriptor(input),
            8 => self.write32(reg::IQT, self.tail),
            9 => {
                let index = u64::from(input.byte() % 16);
                let low = u64::from(input.u32() & 0x00ff_00ff);
                self.store(
                    INTERRUPT_TABLE + 16 * index,
                    low | u64::from(input.byte()) << 40,
                );
                let verify = u64::from(input.byte() & 0xf) << 16;
                self.store(
                    INTERRUPT_TABLE + 16 * index + 8,
                    verify | u64::from(source.0),
                );
            }
            10 => {
                let entry = u64::from(source.0 & 0xff);
                let at = CONTEXTS + 16 * entry + 8 * u64::from(input.byte() & 3);
                let value = if input.one_in(2) {
                    u64::from(input.u16())
                } else {
                    Self::address(input) | u64::from(input.byte())
                };
                self.store(at, value);
            }
            11 => {
                let at = TABLES + 8 * u64::from(input.u16() % 0x1000);
                let value = Self::address(input) | u64::from(input.byte());
                self.store(at, value);
            }
            12 => {
                let index = u64::from(input.byte() % 20);
                let message = MsiMessage {
                    address: 0xfee0_0000 | index << 5 | u64::from(input.byte() & 0x1c),
                    data: u32::from(input.byte()),
                };
                let address = if input.one_in(16) {
                    input.u64()
                } else {
                    message.address
                };
                if input.one_in(2) {
                    self.lines[line]
                        .retarget(MsiMessage { address, ..message })
                        .expect("the host takes all routes");
                } else {
                    self.requests += 1;
                    let _ = self.unit.interrupt_write(source, address, message.data);
                }
            }
            13 => {
                self.lines[line].fire();
            }
            14 => self.dma(source, input),
            _ => {
                let mut data = vec![0; usize::from(input.byte() % 12)];
                self.unit.read(u64::from(input.u16()), &mut data);
                if input.one_in(64) {
                    self.unit.reset();
                }
            }
        }
    }

    /// What a DMA space does on a miss.
    fn dma(&self, source: SourceId, input: &mut Input<'_>) {
        let access = input.pick(&[Access::Read, Access::Write]);
        let iova = Iova(Self::address(input) | u64::from(input.u16()) << 24);
        let Ok(context) = self.unit.context(source, iova, access) else {
            return;
        };
        match context.stage {
            Stage::Off => {}
            Stage::PassThrough { .. } => {
                self.unit.beyond_width(source, &context, iova, access);
            }
            Stage::First { .. } | Stage::Second { .. } => {
                if let Ok(mapping) = self.unit.walk(source, &context, iova, access) {
                    let size = 1u64 << mapping.shift;
                    assert!([12, 21, 30].contains(&mapping.shift));
                    assert_eq!((mapping.iova.0 | mapping.gpa.0) % size, 0);
                    assert!(iova.0 - mapping.iova.0 < size);
                    assert!(match access {
                        Access::Read => mapping.read,
                        Access::Write => mapping.write,
                    });
                }
            }
        }
    }

    fn finish(mut self) {
        let sent = self.recorder.take_log();
        let delivered = sent
            .iter()
            .filter(|delivery| delivery.source != SourceId(0));
        let counters = self.unit.counters();
        assert_eq!(u64::try_from(delivered.count()), Ok(counters.interrupts));
        assert!(counters.interrupts + counters.interrupts_blocked >= self.requests);

        self.unit.reset();
        for offset in (0x18..reg::LEN).step_by(4) {
            let expected = match offset {
                reg::FECTL | reg::IECTL => 1 << 31,
                _ => 0,
            };
            assert_eq!(self.read32(offset), expected, "register {offset:#x}");
        }
        self.store(STATUS, 0);
        self.store(QUEUE, 0x12);
        self.store(QUEUE + 8, 0);
        self.store(QUEUE + 16, 0x1234_5678_0000_0025);
        self.store(QUEUE + 24, STATUS);
        self.tail = 32;
        self.write64(reg::IQA, QUEUE);
        self.write32(reg::GCMD, 1 << 26);
        self.write32(reg::IQT, self.tail);
        let deadline = Instant::now() + Duration::from_secs(20);
        while self
            .ram
            .read_obj::<u32>(GuestAddress(STATUS))
            .expect("memory")
            != 0x1234_5678
        {
            assert!(Instant::now() < deadline, "the queue stands");
            std::thread::yield_now();
        }
    }
}

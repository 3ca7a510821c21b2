//! The DMA probe: reads, writes and signals at given addresses, and what its registers say.

use std::sync::Arc;
use std::time::Instant;

use devices::dma_probe::spec::{self, command, status};
use devices::dma_probe::{DmaProbe, ProbeStats};
use iommu::{Bdf, MsiMessage};
use tests::{DmaBuffer, GuestBar, GuestFunction, Machine, PAGE_SIZE, Side, TIMEOUT, layout};

const SLOT: u8 = 2;

struct Bench {
    machine: Arc<Machine>,
    device: Arc<DmaProbe>,
    function: GuestFunction,
    bar: GuestBar,
}

impl Bench {
    fn new() -> Bench {
        let machine = Machine::new();
        let bdf = Bdf::new(0, SLOT, 0).unwrap();
        let (endpoint, device) = DmaProbe::new("probe0", bdf, machine.upstream()).unwrap();
        machine.attach(endpoint, Arc::<DmaProbe>::clone(&device));
        let function = GuestFunction::probe(&machine, SLOT);
        let bar = function.bar(0);
        Bench {
            machine,
            device,
            function,
            bar,
        }
    }

    /// Runs a command to its end: the status and the bytes done.
    fn run(&self, command: u32, address: u64, length: u64) -> (u32, u64) {
        self.bar.write(spec::ADDRESS, address);
        self.bar.write(spec::LENGTH, length);
        self.bar.write(spec::COMMAND, command);
        let start = Instant::now();
        loop {
            let now: u32 = self.bar.read(spec::STATUS);
            if now != status::BUSY {
                return (now, self.bar.read(spec::DONE));
            }
            assert!(start.elapsed() < TIMEOUT, "the command does not end");
            std::thread::yield_now();
        }
    }

    fn set_data(&self, data: u64) {
        self.bar.write(spec::DATA, data);
    }

    fn data(&self) -> u64 {
        self.bar.read(spec::DATA)
    }

    fn pages(&self, count: u64) -> DmaBuffer {
        self.machine.dma(Side::High, count)
    }
}

#[test]
fn registers_have_halves_and_their_sizes() {
    let bench = Bench::new();
    assert_eq!(bench.function.config::<u32>(0), 0x4450_1234);
    assert_eq!(bench.bar.read::<u32>(0), u32::from_le_bytes(*b"DMAP"));
    for register in [spec::ADDRESS, spec::LENGTH, spec::DATA] {
        bench.bar.write(register, 0x1122_3344_5566_7788u64);
        assert_eq!(bench.bar.read::<u32>(register), 0x5566_7788);
        assert_eq!(bench.bar.read::<u32>(register + 4), 0x1122_3344);
        bench.bar.write(register + 4, 9u32);
        bench.bar.write(register, 7u32);
        bench.bar.write(register, 1u8);
        bench.bar.write(register + 2, 1u32);
        assert_eq!(bench.bar.read::<u64>(register), 0x9_0000_0007);
    }
    for (offset, value) in [(spec::COMMAND, 0u32), (spec::STATUS, 0), (0x38, u32::MAX)] {
        assert_eq!(bench.bar.read::<u32>(offset), value, "{offset:#x}");
    }
    assert_eq!(
        bench.bar.read::<u64>(spec::COMMAND),
        u64::MAX,
        "not one register"
    );
    assert_eq!(bench.bar.read::<u16>(0), u16::MAX);
}

#[test]
fn memory_is_written_with_the_pattern_and_read() {
    let bench = Bench::new();
    let pages = bench.pages(3);
    let at = pages.address().0;
    bench.set_data(0x8877_6655_4433_2211);
    let (from, len) = (at + 4093, 4096 + 9);
    assert_eq!(bench.run(command::WRITE, from, len), (status::OK, len));
    assert_eq!(pages.read::<u8>(4092), 0);
    assert_eq!(pages.read::<u64>(4093), 0x8877_6655_4433_2211);
    assert_eq!(pages.read::<u64>(4093 + 4096), 0x8877_6655_4433_2211);
    assert_eq!(pages.read::<u8>(4093 + 4104), 0x11);
    assert_eq!(pages.read::<u8>(4093 + 4105), 0);
    assert_eq!(bench.run(command::READ, from, len), (status::OK, len));
    assert_eq!(bench.data(), 0x8877_6655_4433_2211);
    assert_eq!(bench.run(command::READ, from + 1, 2), (status::OK, 2));
    assert_eq!(bench.data(), 0x3322);
    assert_eq!(
        bench.device.stats(),
        ProbeStats {
            reads: 2,
            writes: 1,
            bytes: 2 * len + 2,
            ..ProbeStats::default()
        }
    );
}

#[test]
fn an_access_ends_at_the_first_page_that_is_not_there() {
    let bench = Bench::new();
    let edge = layout::LOW_RAM.end;
    for command in [command::READ, command::WRITE] {
        let from = edge - PAGE_SIZE - 16;
        let end = bench.run(command, from, 3 * PAGE_SIZE);
        assert_eq!(end, (status::NO_MEMORY, PAGE_SIZE + 16));
        assert_eq!(bench.run(command, edge, 8), (status::NO_MEMORY, 0));
        let end = bench.run(command, u64::MAX - 3, 8);
        assert_eq!(end, (status::NO_MEMORY, 0));
    }
    assert_eq!(bench.device.stats().errors, 6);
}

#[test]
fn bus_master_off_is_told() {
    let bench = Bench::new();
    let page = bench.pages(1);
    bench.function.set_bus_master(false);
    bench.set_data(1);
    for (command, address) in [
        (command::READ, page.address().0),
        (command::WRITE, page.address().0),
        (command::SIGNAL, page.address().0),
        (command::SIGNAL, 0xfee0_0000),
    ] {
        let end = bench.run(command, address, 8);
        assert_eq!(end, (status::BUS_MASTER_OFF, 0));
    }
    assert_eq!(page.read::<u64>(0), 0);
    assert!(bench.machine.interrupts().take_log().is_empty());
}

#[test]
fn bad_commands_do_nothing() {
    let bench = Bench::new();
    let page = bench.pages(1);
    let at = page.address().0;
    bench.set_data(u64::MAX);
    for (command, address, length) in [
        (0, at, 8),
        (4, at, 8),
        (u32::MAX, at, 8),
        (command::WRITE, at, 0),
        (command::WRITE, at, spec::MAX_LENGTH + 1),
        (command::READ, at, u64::MAX),
        (command::SIGNAL, at + 2, 4),
    ] {
        let end = bench.run(command, address, length);
        assert_eq!(end, (status::BAD_COMMAND, 0));
    }
    assert_eq!(page.read::<u64>(0), 0);
}

#[test]
fn signals_are_stores_or_interrupt_requests() {
    let bench = Bench::new();
    let page = bench.pages(1);
    bench.set_data(0xffff_ffff_1234_5678);
    let end = bench.run(command::SIGNAL, page.address().0 + 4, 0);
    assert_eq!(end, (status::OK, 0));
    assert_eq!(page.read::<u64>(0), 0x1234_5678_0000_0000);
    for (address, data) in [(0xfee0_0000, 0x41), (0xfeef_fffc, 0x42)] {
        bench.set_data(data.into());
        assert_eq!(bench.run(command::SIGNAL, address, 0).0, status::OK);
        let message = MsiMessage { address, data };
        assert_eq!(bench.machine.interrupts().wait(message, TIMEOUT), 1);
    }
    let log = bench.machine.interrupts().take_log();
    let source = bench.function.bdf().source_id();
    assert!(log.len() == 2 && log.iter().all(|d| d.source == source));
    // No interrupt is requested just outside of the range.
    for address in [0xfedf_fffc, 0xfef0_0000] {
        let end = bench.run(command::SIGNAL, address, 0);
        assert_eq!(end, (status::NO_MEMORY, 0));
    }
    assert!(bench.machine.interrupts().take_log().is_empty());
}

#[test]
fn reset_puts_everything_back() {
    let mut bench = Bench::new();
    let page = bench.pages(1);
    bench.set_data(5);
    bench.run(command::WRITE, page.address().0, 8);
    bench.bar.write(spec::COMMAND, command::WRITE);
    bench.function.reset();
    bench.function = GuestFunction::probe(&bench.machine, SLOT);
    bench.bar = bench.function.bar(0);
    for register in [spec::ADDRESS, spec::LENGTH, spec::DATA, spec::DONE] {
        assert_eq!(bench.bar.read::<u64>(register), 0);
    }
    assert_eq!(bench.bar.read::<u32>(spec::STATUS), status::IDLE);
}

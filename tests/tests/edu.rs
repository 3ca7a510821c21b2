//! The educational function, driven as its students drive it.

use std::sync::Arc;
use std::time::Instant;

use devices::edu::spec::{self, command, interrupt, status};
use devices::edu::{Edu, EduError, EduOptions, EduStats};
use iommu::Bdf;
use pci::spec as pci_spec;
use tests::{DmaBuffer, GuestBar, GuestFunction, Machine, PAGE_SIZE, Side, TIMEOUT};

const SLOT: u8 = 4;
/// Line of INTA in this slot.
const LINE: usize = 0;

struct Bench {
    machine: Arc<Machine>,
    device: Arc<Edu>,
    function: GuestFunction,
    bar: GuestBar,
}

fn make(machine: &Machine, dma_mask_bits: u8) -> Result<(pci::Endpoint, Arc<Edu>), EduError> {
    let bdf = Bdf::new(0, SLOT, 0).unwrap();
    let options = EduOptions { dma_mask_bits };
    Edu::new("edu0", options, bdf, machine.upstream())
}

impl Bench {
    fn new() -> Bench {
        Bench::with_mask(EduOptions::default().dma_mask_bits)
    }

    fn with_mask(bits: u8) -> Bench {
        let machine = Machine::new();
        let (endpoint, device) = make(&machine, bits).unwrap();
        machine.attach(endpoint, Arc::<Edu>::clone(&device));
        let function = GuestFunction::probe(&machine, SLOT);
        let bar = function.bar(0);
        Bench {
            machine,
            device,
            function,
            bar,
        }
    }

    fn get(&self, register: u64) -> u32 {
        self.bar.read(register)
    }

    fn set(&self, register: u64, value: u32) {
        self.bar.write(register, value);
    }

    fn line(&self) -> bool {
        self.machine.lines().state(LINE).level
    }

    /// Reads `register` until `bits` are clear.
    fn until_clear(&self, register: u64, bits: u32) {
        let start = Instant::now();
        while self.get(register) & bits != 0 {
            assert!(start.elapsed() < TIMEOUT, "register {register:#x} is stuck");
            std::thread::yield_now();
        }
    }

    fn factorial(&self, number: u32) -> u32 {
        self.set(spec::FACTORIAL, number);
        self.until_clear(spec::STATUS, status::COMPUTING);
        self.get(spec::FACTORIAL)
    }

    /// A transfer, from start to end.
    fn dma(&self, source: u64, destination: u64, count: u64, command: u64) {
        self.bar.write(spec::DMA_SOURCE, source);
        self.bar.write(spec::DMA_DESTINATION, destination);
        self.bar.write(spec::DMA_COUNT, count);
        self.bar.write(spec::DMA_COMMAND, command | command::RUN);
        self.until_clear(spec::DMA_COMMAND, 1);
    }

    fn load(&self, page: &DmaBuffer, count: u64) {
        self.dma(page.address().0, spec::BUFFER, count, 0);
    }

    fn save(&self, page: &DmaBuffer, count: u64) {
        self.dma(spec::BUFFER, page.address().0, count, command::TO_RAM);
    }

    fn page(&self, fill: u64) -> DmaBuffer {
        let page = self.machine.dma(Side::Low, 1);
        page.write(0, fill);
        page.write(PAGE_SIZE - 8, fill);
        page
    }

    fn stats(&self, change: impl FnOnce(&mut EduStats)) {
        let mut expected = EduStats::default();
        change(&mut expected);
        assert_eq!(self.device.stats(), expected);
    }
}

#[test]
fn it_is_known_by_its_ids_and_registers() {
    let bench = Bench::new();
    assert_eq!(bench.function.config::<u32>(0), 0x11e8_1234);
    assert_eq!(bench.function.class(), 0x00_ff00);
    assert_eq!(bench.function.config::<u8>(pci_spec::REVISION_ID), 0x10);
    assert_eq!(bench.function.config::<u8>(pci_spec::INTERRUPT_PIN), 1);
    assert_eq!(bench.function.msi().capable(), 1);
    assert_eq!((bench.bar.size, bench.bar.wide), (1 << 20, false));
    assert_eq!(bench.get(0), 0x0100_00ed);
    bench.set(0, 5);
    assert_eq!(bench.get(0), 0x0100_00ed);
    bench.set(4, 0x1234_5678);
    assert_eq!(bench.get(4), 0xedcb_a987);
}

#[test]
fn accesses_have_the_documented_sizes() {
    let bench = Bench::new();
    bench.set(spec::LIVENESS, 0);
    for register in [spec::IDENTIFICATION, spec::LIVENESS, spec::STATUS] {
        assert_eq!(bench.bar.read::<u64>(register), u64::MAX);
        assert_eq!(bench.bar.read::<u16>(register), u16::MAX);
        assert_eq!(bench.bar.read::<u8>(register), u8::MAX);
    }
    bench.bar.write(spec::LIVENESS, 1u64);
    bench.bar.write(spec::LIVENESS, 1u16);
    assert_eq!(bench.get(spec::LIVENESS), u32::MAX);
    for register in [spec::DMA_SOURCE, spec::DMA_DESTINATION, spec::DMA_COUNT] {
        bench.bar.write(register, 0x1122_3344_5566_7788u64);
        assert_eq!(bench.bar.read::<u64>(register), 0x1122_3344_5566_7788);
        assert_eq!(bench.get(register), 0x5566_7788);
        assert_eq!(bench.get(register + 4), u32::MAX, "no register");
        bench.set(register, 9);
        assert_eq!(bench.bar.read::<u64>(register), 9, "set as a whole");
        bench.bar.write(register, 1u8);
        assert_eq!(bench.bar.read::<u64>(register), 9);
    }
    for unused in [0x0c, 0x60, 0x64, 0x7c, 0xa0, 0x40000, 0xf_fffc] {
        bench.set(unused, 0);
        assert_eq!(bench.get(unused), u32::MAX, "{unused:#x}");
    }
}

#[test]
fn factorials_are_computed() {
    let bench = Bench::new();
    for (number, result) in [(0, 1), (5, 120), (12, 479_001_600), (u32::MAX, 0)] {
        assert_eq!(bench.factorial(number), result);
    }
    assert_eq!(bench.get(spec::INTERRUPT_STATUS), 0);
    assert!(!bench.line());
    bench.stats(|stats| stats.factorials = 4);
}

#[test]
fn a_factorial_interrupts_when_asked() {
    let bench = Bench::new();
    bench.set(spec::STATUS, status::INTERRUPT | 0xf);
    assert_eq!(bench.get(spec::STATUS), status::INTERRUPT);
    bench.set(spec::FACTORIAL, 6);
    assert!(bench.machine.lines().wait(LINE, true, TIMEOUT));
    assert_eq!(bench.get(spec::INTERRUPT_STATUS), interrupt::FACTORIAL);
    assert_eq!(bench.get(spec::FACTORIAL), 720);
    assert!(bench.function.interrupt_status());
    bench.set(spec::INTERRUPT_ACKNOWLEDGE, interrupt::FACTORIAL);
    assert!(!bench.line() && !bench.function.interrupt_status());
    bench.set(spec::STATUS, 0);
    bench.factorial(3);
    assert!(!bench.line());
}

#[test]
fn the_pin_is_asserted_until_every_cause_is_acknowledged() {
    let bench = Bench::new();
    bench.set(spec::INTERRUPT_RAISE, 0);
    assert!(!bench.line(), "nothing to interrupt for");
    bench.set(spec::INTERRUPT_RAISE, 0x30);
    bench.set(spec::INTERRUPT_RAISE, 0x01);
    assert_eq!(bench.get(spec::INTERRUPT_STATUS), 0x31);
    bench.set(spec::INTERRUPT_ACKNOWLEDGE, 0x21);
    assert!(bench.line());
    assert_eq!(bench.get(spec::INTERRUPT_STATUS), 0x10);
    bench.set(spec::INTERRUPT_ACKNOWLEDGE, u32::MAX);
    assert!(!bench.line());
    assert_eq!(bench.machine.lines().state(LINE).changes, 2);
}

#[test]
fn with_msi_every_raise_is_a_message() {
    let bench = Bench::new();
    let message = bench.function.setup_msi();
    let count = || bench.machine.interrupts().count(message);
    bench.set(spec::INTERRUPT_RAISE, 1);
    bench.set(spec::INTERRUPT_RAISE, 1);
    let wait = || bench.machine.interrupts().wait(message, TIMEOUT);
    assert_eq!((wait(), bench.line()), (2, false));
    bench.set(spec::INTERRUPT_ACKNOWLEDGE, 1);
    assert_eq!(count(), 2);
    bench.set(spec::STATUS, status::INTERRUPT);
    bench.set(spec::FACTORIAL, 4);
    assert_eq!(wait(), 1);
    // What is acknowledged while the vector is masked is not pending any more.
    bench.function.msi().mask(1);
    bench.set(spec::INTERRUPT_RAISE, 2);
    assert_eq!(bench.function.msi().pending(), 1);
    bench.set(spec::INTERRUPT_ACKNOWLEDGE, u32::MAX);
    assert_eq!(bench.function.msi().pending(), 0);
    bench.function.msi().mask(0);
    assert_eq!(count(), 3);
}

#[test]
fn dma_moves_both_ways() {
    let bench = Bench::new();
    let (from, to) = (bench.page(0x1122_3344_5566_7788), bench.page(0));
    bench.load(&from, PAGE_SIZE);
    bench.save(&to, PAGE_SIZE);
    assert_eq!(to.read::<u64>(0), 0x1122_3344_5566_7788);
    assert_eq!(to.read::<u64>(PAGE_SIZE - 8), 0x1122_3344_5566_7788);
    // Two bytes, from the middle of the buffer to an odd address.
    from.write(0, 0xabcdu16);
    bench.dma(from.address().0, spec::BUFFER + 4094, 2, 0);
    let command = command::TO_RAM | command::INTERRUPT;
    bench.dma(spec::BUFFER + 4094, to.address().0 + 9, 2, command);
    assert_eq!(to.read::<u16>(9), 0xabcd);
    assert_eq!(to.read::<u8>(11), 0);
    assert_eq!(bench.bar.read::<u64>(spec::DMA_COMMAND), command);
    assert_eq!(bench.get(spec::INTERRUPT_STATUS), interrupt::DMA);
    assert!(bench.line());
    bench.stats(|stats| {
        (stats.dma_from_ram, stats.dma_to_ram) = (2, 2);
        (stats.dma_bytes, stats.interrupts) = (2 * 4096 + 4, 1);
    });
}

#[test]
fn a_command_without_its_start_bit_is_ignored() {
    let bench = Bench::new();
    let page = bench.page(7);
    bench.load(&page, 8);
    bench.bar.write(spec::DMA_COMMAND, command::TO_RAM);
    assert_eq!(bench.bar.read::<u64>(spec::DMA_COMMAND), 0);
}

#[test]
fn addresses_beyond_the_mask_are_cut() {
    let bench = Bench::with_mask(20);
    let (low, out) = (bench.page(0x600d), bench.page(0));
    assert!(low.address().0 < 1 << 20);
    let high = low.address().0 | 0xf << 40 | 1 << 20;
    bench.dma(high, spec::BUFFER, 8, 0);
    bench.save(&out, 8);
    assert_eq!(out.read::<u64>(0), 0x600d);
    bench.stats(|stats| {
        (stats.dma_from_ram, stats.dma_to_ram) = (1, 1);
        (stats.dma_bytes, stats.dma_clamped) = (16, 1);
    });
}

#[test]
fn a_wide_mask_reaches_all_memory() {
    let bench = Bench::with_mask(64);
    let high = bench.machine.dma(Side::High, 1);
    high.write(0, 0x1234u64);
    let out = bench.page(0);
    bench.load(&high, 8);
    bench.save(&out, 8);
    assert_eq!(out.read::<u64>(0), 0x1234);
    assert_eq!(bench.device.stats().dma_clamped, 0);
}

#[test]
fn the_mask_has_bounds() {
    let machine = Machine::new();
    for bits in [0, 11, 65, 255] {
        let error = make(&machine, bits).err().unwrap();
        assert!(
            matches!(error, EduError::DmaMask(b) if b == bits),
            "{error}"
        );
    }
    for bits in [12, 28, 64] {
        assert!(make(&machine, bits).is_ok());
    }
}

/// Refused transfers end like others, but the buffer keeps what it had.
#[test]
fn a_refused_transfer_changes_nothing_in_the_buffer() {
    let bench = Bench::with_mask(40);
    let (kept, out) = (bench.page(0x6b65_7074), bench.page(0));
    bench.load(&kept, PAGE_SIZE);
    // The second half of this one is past the end of RAM.
    let edge = tests::layout::LOW_RAM.end - 8;
    for source in [edge, tests::layout::LOW_RAM.end, (1 << 40) - 1] {
        bench.dma(source, spec::BUFFER, 16, command::INTERRUPT);
        assert_eq!(bench.get(spec::INTERRUPT_STATUS), interrupt::DMA);
        bench.set(spec::INTERRUPT_ACKNOWLEDGE, interrupt::DMA);
    }
    bench.function.set_bus_master(false);
    bench.dma(out.address().0, spec::BUFFER, 16, 0);
    bench.save(&out, 16);
    assert_eq!(out.read::<u64>(0), 0);
    bench.function.set_bus_master(true);
    bench.save(&out, PAGE_SIZE);
    assert_eq!(out.read::<u64>(0), 0x6b65_7074);
    assert_eq!(out.read::<u64>(PAGE_SIZE - 8), 0x6b65_7074);
    assert_eq!(bench.device.stats().dma_refused, 5);
}

#[test]
fn a_transfer_that_leaves_the_buffer_moves_nothing() {
    let bench = Bench::with_mask(64);
    let (kept, out) = (bench.page(0x6b65_7074), bench.page(0));
    bench.load(&kept, PAGE_SIZE);
    let ram = bench.page(0xbad).address().0;
    let buffer = spec::BUFFER;
    let ranges = [
        (buffer - 1, 2),
        (buffer, 4097),
        (buffer + 4096, 1),
        (buffer, u64::MAX),
        (u64::MAX, 1),
        (u64::MAX - 3, u64::MAX),
        (0, 8),
    ];
    for (own, count) in ranges {
        bench.dma(ram, own, count, 0);
        bench.dma(own, out.address().0, count, command::TO_RAM);
    }
    assert_eq!(out.read::<u64>(0), 0);
    bench.dma(ram, buffer + 4096, 0, 0);
    bench.save(&out, 8);
    assert_eq!(out.read::<u64>(0), 0x6b65_7074);
    assert_eq!(bench.device.stats().dma_out_of_buffer, 14);
}

#[test]
fn reset_puts_everything_back() {
    let mut bench = Bench::new();
    let (page, out) = (bench.page(1), bench.page(2));
    bench.load(&page, 8);
    bench.set(spec::LIVENESS, 1);
    bench.set(spec::STATUS, status::INTERRUPT);
    bench.factorial(5);
    bench.set(spec::INTERRUPT_RAISE, 8);
    assert!(bench.line());
    bench.function.reset();
    assert!(!bench.line());
    bench.function = GuestFunction::probe(&bench.machine, SLOT);
    bench.bar = bench.function.bar(0);
    let registers = [
        spec::LIVENESS,
        spec::FACTORIAL,
        spec::STATUS,
        spec::INTERRUPT_STATUS,
        spec::DMA_SOURCE,
        spec::DMA_DESTINATION,
        spec::DMA_COUNT,
        spec::DMA_COMMAND,
    ];
    assert_eq!(registers.map(|register| bench.get(register)), [0; 8]);
    bench.save(&out, 8);
    assert_eq!(out.read::<u64>(0), 0, "the buffer too");
}

/// Transfers and factorials while the guest resets, masks and switches bus mastering: nothing hangs,
/// and the device works afterwards.
#[test]
fn resets_in_the_middle_of_work() {
    let mut bench = Bench::new();
    let page = bench.page(3);
    for round in 0..300u32 {
        bench.set(spec::STATUS, status::INTERRUPT);
        bench.set(spec::FACTORIAL, round);
        bench.bar.write(spec::DMA_SOURCE, page.address().0);
        bench.bar.write(spec::DMA_DESTINATION, spec::BUFFER);
        bench.bar.write(spec::DMA_COUNT, PAGE_SIZE);
        bench.bar.write(spec::DMA_COMMAND, 5u32);
        match round % 3 {
            0 => bench.function.set_bus_master(round % 2 == 0),
            1 => drop(bench.function.setup_msi()),
            _ => {
                bench.function.reset();
                assert!(!bench.line(), "asserted after a reset");
                bench.function.place_bars();
                let command = pci_spec::command::MEMORY | pci_spec::command::BUS_MASTER;
                bench.function.set_command(command);
                bench.bar = bench.function.bar(0);
            }
        }
    }
    bench.function.set_bus_master(true);
    let out = bench.page(0);
    bench.until_clear(spec::DMA_COMMAND, 1);
    bench.load(&page, 8);
    bench.save(&out, 8);
    assert_eq!(out.read::<u64>(0), 3);
    assert_eq!(bench.factorial(4), 24);
}

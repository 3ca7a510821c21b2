//! An operating system's way through the bus: find, size, place, enable, move, reset.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;
use std::time::Duration;

use iommu::{Bdf, DmaError, Gpa};
use pci::{AttachError, BarIndex, RootComplex, RootError, Windows, spec};
use tests::{Call, GuestFunction, Machine, Side, TIMEOUT, TestDevice, layout};

#[test]
fn functions_are_found_and_described() {
    let machine = Machine::new();
    TestDevice::plug(&machine, 3, 5);
    let found = GuestFunction::enumerate(&machine);
    let bdfs: Vec<String> = found.iter().map(|f| f.bdf().to_string()).collect();
    assert_eq!(bdfs, ["00:00.0", "00:03.0"]);
    let function = &found[1];
    assert_eq!(function.config::<u32>(spec::VENDOR_ID), 0x5678_1234);
    assert_eq!(function.class(), 0xff_0102);
    assert_eq!(function.config::<u8>(spec::REVISION_ID), 3);
    let subsystem: u32 = function.config(spec::SUBSYSTEM_VENDOR_ID);
    assert_eq!(subsystem, 0xdef0_9abc);
    assert_eq!(function.config::<u8>(spec::INTERRUPT_PIN), 0);
    let ids: Vec<u8> = function.capabilities().iter().map(|c| c.0).collect();
    assert_eq!(
        ids,
        [
            spec::capability::POWER_MANAGEMENT,
            spec::capability::EXPRESS,
            spec::capability::MSIX,
            spec::capability::VENDOR_SPECIFIC
        ]
    );
    // No extended capabilities.
    assert_eq!(function.config::<u32>(0x100), 0);
}

#[test]
fn other_functions_show_only_with_the_multi_function_bit() {
    let machine = Machine::new();
    for number in [2, 0] {
        let bdf = Bdf::new(0, 4, number).unwrap();
        let endpoint = TestDevice::builder(1)
            .build(bdf, machine.upstream())
            .unwrap();
        let device = TestDevice::new(&endpoint);
        machine.attach(endpoint, device);
    }
    let found = GuestFunction::enumerate(&machine);
    let bdfs: Vec<String> = found.iter().map(|f| f.bdf().to_string()).collect();
    assert_eq!(bdfs, ["00:00.0", "00:04.0", "00:04.2"]);
}

#[test]
fn a_place_is_given_once_and_only_on_bus_0() {
    let machine = Machine::new();
    TestDevice::plug(&machine, 3, 1);
    for (bus, device) in [(0, 3), (1, 0), (0, 0)] {
        let bdf = Bdf::new(bus, device, 0).unwrap();
        let endpoint = TestDevice::builder(1)
            .build(bdf, machine.upstream())
            .unwrap();
        let device = TestDevice::new(&endpoint);
        let error = machine.root().attach(endpoint, device).unwrap_err();
        let wanted = if bus == 0 {
            AttachError::Occupied(bdf)
        } else {
            AttachError::NoSuchBus(bdf)
        };
        assert_eq!(error, wanted);
    }
}

#[test]
fn bars_are_sized_placed_moved_and_disabled() {
    let machine = Machine::new();
    let device = TestDevice::plug(&machine, 3, 5);
    let mut function = GuestFunction::probe(&machine, 3);
    let sizes: Vec<(u8, u64, bool)> = function
        .bars()
        .iter()
        .map(|b| (b.index, b.size, b.wide))
        .collect();
    assert_eq!(
        sizes,
        [
            (0, TestDevice::BAR0_SIZE, true),
            (2, TestDevice::BAR2_SIZE, false)
        ]
    );
    // Memory type, 64 bits, prefetchable.
    assert_eq!(function.config::<u32>(spec::BAR0) & spec::bar::FLAGS, 0xc);

    let (bar0, bar2) = (function.bar(0), function.bar(2));
    bar0.write(0x10, 0x1122_3344_5566_7788u64);
    bar2.write(0xffe, 0xabcdu16);
    assert_eq!(bar0.read::<u32>(0x14), 0x1122_3344);
    assert_eq!(bar2.read::<u8>(0xfff), 0xab);
    // Unaligned, and over the end of the BAR.
    assert_eq!(bar0.read::<u32>(0x11), 0x4455_6677);
    assert_eq!(bar2.read::<u32>(0xffe), 0xffff_abcd);
    device.take_calls();
    bar2.write(0xfff, 0x0102_0304u32);
    assert_eq!(
        device.take_calls(),
        [Call::Write(BarIndex(2), 0xfff, vec![4])]
    );

    let moved = Gpa(layout::MMIO64.end - TestDevice::BAR0_SIZE);
    function.move_bar(0, moved);
    assert_eq!(bar0.read::<u64>(0x10), u64::MAX);
    assert_eq!(function.bar(0).read::<u8>(0x10), 0x88);

    function.set_command(0);
    assert_eq!(function.bar(0).read::<u64>(0x10), u64::MAX);
    assert_eq!(function.bar(2).read::<u16>(0xffe), u16::MAX);
    function.set_command(spec::command::MEMORY);
    assert_eq!(function.bar(0).read::<u8>(0x10), 0x88);

    // Outside of the windows nothing is forwarded, and a BAR half outside is not decoded.
    for place in [
        layout::MMIO64.end,
        layout::MMIO64.start - TestDevice::BAR0_SIZE,
        0,
        u64::MAX - (TestDevice::BAR0_SIZE - 1),
    ] {
        function.move_bar(0, Gpa(place));
        let mut data = [0; 8];
        assert!(!machine.root().mmio_read(Gpa(place + 0x10), &mut data));
        assert_eq!(data, [0xff; 8]);
    }
}

#[test]
fn overlapping_bars_have_one_winner() {
    let machine = Machine::new();
    TestDevice::plug(&machine, 3, 1);
    TestDevice::plug(&machine, 5, 1);
    let mut a = GuestFunction::probe(&machine, 3);
    let mut b = GuestFunction::probe(&machine, 5);
    a.bar(0).write(0, 0xaau8);
    a.bar(2).write(0, 0xa2u8);
    b.bar(0).write(0, 0xbbu8);
    b.bar(0).write(0x1000, 0xccu8);

    // The lower function wins, whoever moved last; the loser answers where the winner does not.
    let place = layout::MMIO32.start;
    a.move_bar(2, Gpa(place));
    b.move_bar(0, Gpa(place));
    assert_eq!(b.bar(0).read::<u8>(0), 0xa2);
    assert_eq!(b.bar(0).read::<u8>(0x1000), 0xcc);
    // An access over the border gets each byte from its owner.
    a.bar(2).write(0xfff, 0x77u8);
    assert_eq!(machine.read::<u16>(Gpa(place + 0xfff)), 0xcc77);
    // Inside one function the lower BAR wins.
    a.move_bar(0, Gpa(place));
    assert_eq!(machine.read::<u8>(Gpa(place)), 0xaa);
    // The loser's event is where its BAR answers: nowhere now.
    assert_eq!(machine.events().addresses(), [place + TestDevice::DOORBELL]);
    a.set_command(0);
    assert_eq!(b.bar(0).read::<u8>(0), 0xbb);
    assert_eq!(machine.events().addresses(), [place + TestDevice::DOORBELL]);
    b.set_command(0);
    assert!(machine.events().addresses().is_empty());
}

#[test]
fn io_events_move_with_their_bar() {
    let machine = Machine::new();
    let device = TestDevice::plug(&machine, 3, 1);
    assert!(machine.events().addresses().is_empty());
    let mut function = GuestFunction::probe(&machine, 3);
    device.take_calls();
    let bar = function.bar(0);
    bar.write(TestDevice::DOORBELL, 1u32);
    assert_eq!((device.doorbell(), device.take_calls()), (1, vec![]));
    // Another length is an ordinary store.
    bar.write(TestDevice::DOORBELL, 1u64);
    assert_eq!((device.doorbell(), device.take_calls().len()), (0, 1));

    let place = layout::MMIO32.start;
    function.move_bar(0, Gpa(place));
    assert_eq!(machine.events().addresses(), [place + TestDevice::DOORBELL]);
    function.bar(0).write(TestDevice::DOORBELL, 1u32);
    assert_eq!(device.doorbell(), 1);
    function.set_command(spec::command::BUS_MASTER);
    assert!(machine.events().addresses().is_empty());
    function.bar(0).write(TestDevice::DOORBELL, 1u32);
    assert_eq!(device.doorbell(), 0);
}

#[test]
fn mechanism_1_and_ecam_show_the_same() {
    let machine = Machine::new();
    TestDevice::plug(&machine, 3, 1);
    let function = GuestFunction::enumerate(&machine).remove(1);
    let root = machine.root();
    let select = |register: u32| {
        let address = 1 << 31 | 3 << 11 | register;
        assert!(root.pio_write(0xcf8, &u32::to_le_bytes(address)));
    };
    for register in (0..256).step_by(4) {
        select(register);
        let mut dword = [0; 4];
        assert!(root.pio_read(0xcfc, &mut dword));
        let ecam: u32 = function.config(u16::try_from(register).unwrap());
        assert_eq!(u32::from_le_bytes(dword), ecam, "{register:#x}");
        for lane in 0..4 {
            let mut byte = [0];
            assert!(root.pio_read(0xcfc + lane, &mut byte));
            assert_eq!(byte[0], dword[usize::from(lane)]);
        }
        let mut word = [0; 2];
        root.pio_read(0xcfe, &mut word);
        assert_eq!(word, dword[2..]);
    }
    select(0x3c);
    assert!(root.pio_write(0xcfc, &[0x5a]));
    assert_eq!(function.config::<u8>(spec::INTERRUPT_LINE), 0x5a);
    let mut address = [0; 4];
    assert!(root.pio_read(0xcf8, &mut address));
    assert_eq!(u32::from_le_bytes(address), 1 << 31 | 3 << 11 | 0x3c);

    // Not for us: bytes of CONFIG_ADDRESS, where the reset control register is.
    assert!(!root.pio_write(0xcf9, &[6]));
    assert!(!root.pio_read(0xcf8, &mut [0]));
    // Nobody there: an absent function, another bus, the enable bit off.
    for address in [1u32 << 31 | 4 << 11, 1 << 31 | 1 << 16, 3 << 11] {
        root.pio_write(0xcf8, &address.to_le_bytes());
        let mut dword = [0; 4];
        assert!(root.pio_read(0xcfc, &mut dword));
        assert_eq!(dword, [0xff; 4]);
    }
    // Past the dword reads as ones.
    select(0);
    let mut dword = [0; 4];
    assert!(root.pio_read(0xcfe, &mut dword));
    assert_eq!(dword, [0x78, 0x56, 0xff, 0xff]);

    // ECAM: eight bytes at once, odd places, another bus, over the end.
    assert_eq!(function.config::<u64>(0) & 0xffff_ffff, 0x5678_1234);
    assert_eq!(function.config::<u32>(1) & 0xff_ffff, 0x56_7812);
    assert_eq!(
        machine.read::<u32>(Gpa(layout::ECAM.start + spec::ecam::BUS_LEN)),
        u32::MAX
    );
    assert_eq!(machine.read::<u64>(Gpa(layout::ECAM.end - 4)), u64::MAX);
}

#[test]
fn only_writable_bits_are_written() {
    let machine = Machine::new();
    TestDevice::plug(&machine, 3, 1);
    let function = GuestFunction::enumerate(&machine).remove(1);
    let before: Vec<u8> = (0..4096).map(|i| function.config(i)).collect();
    for register in (0..4096).step_by(4) {
        function.set_config(register, 0u32);
    }
    let identity = [0, 1, 2, 3, 8, 9, 10, 11, 14, 0x2c, 0x2d, 0x2e, 0x2f, 0x34];
    for register in identity {
        let value: u8 = function.config(register);
        assert_eq!(value, before[usize::from(register)]);
    }
    function.set_config(spec::COMMAND, u16::MAX);
    let command: u16 = function.config(spec::COMMAND);
    assert_eq!(command, spec::command::WRITABLE);
    function.set_config(spec::CACHE_LINE_SIZE, 0x10u8);
    assert_eq!(function.config::<u8>(spec::CACHE_LINE_SIZE), 0x10);
}

#[test]
fn vendor_capabilities_reach_the_device() {
    let machine = Machine::new();
    let device = TestDevice::plug(&machine, 3, 1);
    let function = GuestFunction::enumerate(&machine).remove(1);
    let at = function
        .capability(spec::capability::VENDOR_SPECIFIC)
        .unwrap();
    assert_eq!(function.config::<u8>(at + 2), 12);
    let body: Vec<u8> = (3..12).map(|i| function.config(at + i)).collect();
    assert_eq!(body, TestDevice::VENDOR_BODY);
    assert_eq!(device.capability_reads(), 9);

    device.take_calls();
    function.set_config(at, u32::MAX);
    function.set_config(at + 4, u32::MAX);
    function.set_config(at + 8, u64::MAX);
    assert_eq!(
        device.take_calls(),
        [
            Call::Capability(0, 3, vec![0xff]),
            Call::Capability(0, 4, vec![0xff; 4]),
            Call::Capability(0, 8, vec![0xff; 4]),
        ]
    );
    let body: Vec<u8> = (3..12).map(|i| function.config(at + i)).collect();
    assert_eq!(body, [1, 0xff, 0x0f, 4, 5, 6, 7, 8, 0xf9]);
}

#[test]
fn bus_master_gates_memory_and_interrupts() {
    let machine = Machine::new();
    let device = TestDevice::plug(&machine, 3, 2);
    let function = GuestFunction::probe(&machine, 3);
    let vectors = function.setup_msix(2);
    let page = machine.dma(Side::High, 1);
    let address = page.address().0;
    assert_eq!(device.dma_write(address, 7), Ok(()));
    assert_eq!(page.read::<u32>(0), 7);
    assert_eq!(device.take_calls(), [Call::BusMaster(true)]);

    function.set_bus_master(false);
    assert_eq!(device.take_calls(), [Call::BusMaster(false)]);
    assert_eq!(device.dma_write(address, 8), Err(DmaError::BusMasterOff));
    assert_eq!(page.read::<u32>(0), 7);
    device.signal(1);
    device.signal(1);
    assert_eq!(vectors[1].count(), 0);
    assert!(vectors[1].pending() && !vectors[0].pending());

    function.set_bus_master(true);
    assert_eq!(vectors[1].wait(TIMEOUT), 1);
    assert_eq!(vectors[0].count(), 0);
    assert!(!vectors[1].pending());
}

/// Clearing Bus Master Enable waits for I/O under way, and nothing else of the function does.
#[test]
fn draining_blocks_only_the_write_that_asks() {
    let machine = Machine::new();
    let device = TestDevice::plug(&machine, 3, 2);
    let function = GuestFunction::probe(&machine, 3);
    let vectors = function.setup_msix(1);
    let page = machine.dma(Side::Low, 1);
    let mut pinned = device.pin(page.address().0, 4096).unwrap();
    let done = Arc::new(AtomicBool::new(false));
    let revoker = {
        let (function, done) = (function.clone(), Arc::clone(&done));
        thread::spawn(move || {
            function.set_bus_master(false);
            done.store(true, Ordering::SeqCst);
        })
    };
    while device.view().read_obj::<u8>(iommu::Iova(0)).is_ok() {
        thread::yield_now();
    }
    // The drain is on. Workers signal, vCPUs use configuration space and BARs.
    device.signal(0);
    assert_eq!(vectors[0].wait(TIMEOUT), 1);
    let command: u16 = function.config(spec::COMMAND);
    assert_eq!(command & spec::command::BUS_MASTER, 0);
    function.bar(0).write(0, 1u8);
    thread::sleep(Duration::from_millis(20));
    assert!(!done.load(Ordering::SeqCst), "did not wait for the I/O");
    pinned.release();
    revoker.join().unwrap();
}

#[test]
fn function_level_reset_puts_everything_back() {
    let machine = Machine::new();
    let device = TestDevice::plug(&machine, 3, 2);
    let fresh: Vec<u8> = {
        let function = GuestFunction::enumerate(&machine).remove(1);
        (0..256).map(|i| function.config(i)).collect()
    };
    let mut function = GuestFunction::probe(&machine, 3);
    let vectors = function.setup_msix(1);
    let bar = function.bar(0);
    function.set_config(spec::INTERRUPT_LINE, 9u8);
    bar.write(0, 1u8);
    vectors[0].mask();
    device.signal(0);
    device.take_calls();

    function.reset();
    // Off the bus first, then the device.
    assert_eq!(
        device.take_calls(),
        [Call::BusMaster(false), Call::Reset { bus_master: false }]
    );
    let now: Vec<u8> = (0..256).map(|i| function.config(i)).collect();
    assert_eq!(now, fresh);
    assert_eq!(bar.read::<u8>(0), 0xff);
    assert!(machine.events().addresses().is_empty());

    // And it works again, with nothing left over from before.
    let function = GuestFunction::probe(&machine, 3);
    let vector = function.vector(0);
    let register: u8 = function.bar(0).read(0);
    assert_eq!(register, TestDevice::fresh(function.bdf(), BarIndex(0), 0));
    assert!(!vector.pending());
    assert_eq!(vector.count(), 0);
    let again = function.setup_msix(1);
    device.signal(0);
    assert_eq!(again[0].wait(TIMEOUT), 1);
    assert_eq!(vectors[0].count(), 0);
}

#[test]
fn d3hot_is_off_and_keeps_state() {
    let machine = Machine::new();
    let device = TestDevice::plug(&machine, 3, 1);
    let function = GuestFunction::probe(&machine, 3);
    let vectors = function.setup_msix(1);
    let power = function
        .capability(spec::capability::POWER_MANAGEMENT)
        .unwrap();
    let register = power + spec::power::CONTROL;
    let bar = function.bar(0);
    bar.write(0, 0x5au8);

    // States that are not there are not entered.
    for state in [1u16, 2] {
        function.set_config(register, state);
        assert_eq!(function.config::<u16>(register) & 3, 0);
    }
    function.set_config(register, 3u16);
    assert_eq!(function.config::<u16>(register), 3 | 1 << 3);
    assert_eq!(bar.read::<u8>(0), 0xff);
    assert_eq!(device.dma_write(0, 1), Err(DmaError::BusMasterOff));
    device.signal(0);
    assert_eq!(vectors[0].count(), 0);
    // The command register still says what was written.
    let command: u16 = function.config(spec::COMMAND);
    assert_eq!(command, spec::command::MEMORY | spec::command::BUS_MASTER);

    function.set_config(register, 0u16);
    assert_eq!(vectors[0].wait(TIMEOUT), 1);
    assert_eq!(bar.read::<u8>(0), 0x5a);
    assert_eq!(device.dma_write(0, 1), Ok(()));
}

#[test]
fn a_machine_reset_resets_every_function() {
    let machine = Machine::new();
    let device = TestDevice::plug(&machine, 3, 1);
    let function = GuestFunction::probe(&machine, 3);
    device.take_calls();
    machine.root().reset();
    assert_eq!(
        device.take_calls(),
        [Call::BusMaster(false), Call::Reset { bus_master: false }]
    );
    assert_eq!(function.config::<u16>(spec::COMMAND), 0);
    assert_eq!(function.config::<u64>(spec::BAR0), 0xc);
}

#[test]
fn windows_are_checked() {
    let make = |ecam, mmio32, mmio64| {
        let windows = Windows {
            ecam,
            mmio32,
            mmio64,
        };
        let machine = Machine::new();
        let hub = Arc::<tests::EventTable>::clone(machine.events());
        RootComplex::new(windows, hub, Arc::<tests::Lines>::default()).err()
    };
    let (ecam, low, high) = (layout::ECAM, layout::MMIO32, layout::MMIO64);
    assert_eq!(make(ecam.clone(), low.clone(), high.clone()), None);
    assert_eq!(make(ecam.clone(), low.clone(), 0..0), None);
    for bad in [0..0, 0x1000..0x10_1000, 0..257 << 20] {
        let error = make(bad.clone(), low.clone(), high.clone());
        assert_eq!(error, Some(RootError::Ecam(bad)));
    }
    for bad in [1 << 32..1 << 33, 0..0] {
        let error = make(ecam.clone(), bad.clone(), high.clone());
        assert_eq!(error, Some(RootError::Window(bad)));
    }
    let error = make(ecam.clone(), low.clone(), 0..0x1000);
    assert_eq!(error, Some(RootError::Window(0..0x1000)));
    let over = ecam.start..ecam.end + 1;
    let error = make(ecam.clone(), over.clone(), high);
    assert_eq!(error, Some(RootError::Overlap(ecam, over)));
}

//! MSI-X and Bus Master Enable with real threads: devices signal and write while the guest masks,
//! retargets, moves BARs and switches the function off and on.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::thread;

use iommu::{Gpa, Iova, MsiMessage};
use pci::spec;
use tests::{GuestFunction, Machine, Side, TIMEOUT, TestDevice, layout};

const ROUNDS: u32 = 2000;

/// Two workers signal one vector without pause. While it is masked nothing comes, whatever message it
/// is given; nothing is lost at the end.
#[test]
fn masking_is_exact_under_fire() {
    let machine = Machine::new();
    let device = TestDevice::plug(&machine, 3, 1);
    let function = GuestFunction::probe(&machine, 3);
    let vector = function.setup_msix(1).remove(0);
    let stop = Arc::new(AtomicBool::new(false));
    let signals = Arc::new(AtomicU64::new(0));
    let workers: Vec<_> = (0..2)
        .map(|_| {
            let (device, stop, signals) =
                (Arc::clone(&device), Arc::clone(&stop), Arc::clone(&signals));
            thread::spawn(move || {
                while !stop.load(Ordering::Relaxed) {
                    device.signal(0);
                    signals.fetch_add(1, Ordering::Relaxed);
                    thread::yield_now();
                }
            })
        })
        .collect();

    let recorder = machine.interrupts();
    let messages = [recorder.allocate(), recorder.allocate()];
    let total =
        |messages: &[MsiMessage]| -> u64 { messages.iter().map(|&m| recorder.count(m)).sum() };
    for round in 0..ROUNDS {
        match round % 3 {
            0 => vector.mask(),
            1 => function.set_msix(true, true),
            _ => function.set_bus_master(false),
        }
        let before = total(&messages);
        let [now, other] = if round % 2 == 0 {
            messages
        } else {
            [messages[1], messages[0]]
        };
        vector.set_message(now);
        thread::yield_now();
        assert_eq!(total(&messages), before, "fired while masked");
        let other_before = recorder.count(other);
        vector.unmask();
        function.set_msix(true, false);
        function.set_bus_master(true);
        assert_ne!(
            recorder.wait(now, TIMEOUT),
            0,
            "nothing fires after the unmask"
        );
        assert_eq!(
            recorder.count(other),
            other_before,
            "fired with the old message"
        );
    }
    stop.store(true, Ordering::Relaxed);
    for worker in workers {
        worker.join().unwrap();
    }
    assert!(total(&messages) + vector.count() <= signals.load(Ordering::Relaxed));
}

/// One signal against one mask and unmask, again and again: it comes exactly once.
#[test]
fn each_signal_comes_once() {
    let machine = Machine::new();
    let device = TestDevice::plug(&machine, 3, 1);
    let function = GuestFunction::probe(&machine, 3);
    let vector = function.setup_msix(1).remove(0);
    for round in 1..=u64::from(ROUNDS) {
        thread::scope(|scope| {
            scope.spawn(|| device.signal(0));
            vector.mask();
            vector.unmask();
        });
        assert_eq!(vector.count(), round);
        assert!(!vector.pending());
    }
}

/// A vCPU moves BARs and switches decoding while others access them and a worker writes memory.
/// Nothing hangs or panics; after each write that clears Bus Master Enable, memory stands still.
#[test]
fn everything_at_once() {
    let machine = Machine::new();
    let device = TestDevice::plug(&machine, 3, 1);
    TestDevice::plug(&machine, 4, 1);
    let mut function = GuestFunction::probe(&machine, 3);
    let other = GuestFunction::probe(&machine, 4);
    let page = machine.dma(Side::High, 1);
    let stop = AtomicBool::new(false);
    thread::scope(|scope| {
        scope.spawn(|| {
            let view = device.view();
            let at = Iova(page.address().0);
            let mut value = 0u64;
            while !stop.load(Ordering::Relaxed) {
                let _section = view.section();
                value += u64::from(view.write_obj(at, value).is_ok());
                device.signal(0);
            }
        });
        scope.spawn(|| {
            while !stop.load(Ordering::Relaxed) {
                for place in [layout::MMIO32.start, layout::MMIO64.start] {
                    machine.write(Gpa(place + TestDevice::TABLE + 12), 0u32);
                    machine.write(Gpa(place + TestDevice::DOORBELL), 0u32);
                    machine.read::<u64>(Gpa(place + 0xfffc));
                }
            }
        });
        scope.spawn(|| {
            while !stop.load(Ordering::Relaxed) {
                other.set_command(spec::command::MEMORY);
                other.set_command(0);
            }
        });
        for round in 0..ROUNDS {
            let place = if round % 2 == 0 {
                layout::MMIO32
            } else {
                layout::MMIO64
            };
            function.move_bar(0, Gpa(place.start));
            function.set_bus_master(false);
            let before: u64 = page.read(0);
            function.set_config(spec::INTERRUPT_LINE, 1u8);
            assert_eq!(page.read::<u64>(0), before);
            function.set_bus_master(true);
            if round % 64 == 0 {
                function.reset();
                function.place_bars();
                function.set_command(spec::command::MEMORY | spec::command::BUS_MASTER);
            }
        }
        stop.store(true, Ordering::Relaxed);
    });
    function.set_command(0);
    other.set_command(0);
    assert!(machine.events().addresses().is_empty());
}

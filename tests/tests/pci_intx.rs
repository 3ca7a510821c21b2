//! INTx and plain MSI as a guest sees them: lines shared by functions, Interrupt Disable and Interrupt
//! Status, the masks, pending bits and granted vectors of MSI.

use std::sync::Arc;
use std::thread;

use iommu::MsiMessage;
use pci::{InterruptPin, spec};
use tests::{GuestFunction, Lines, Machine, TIMEOUT, TestDevice};

fn plug(machine: &Arc<Machine>, slot: u8, pin: InterruptPin) -> (Arc<TestDevice>, GuestFunction) {
    let device = TestDevice::plug_as(machine, slot, TestDevice::legacy(4, pin));
    (device, GuestFunction::probe(machine, slot))
}

/// The message of vector `index` where `granted` vectors share `base`.
fn message(base: MsiMessage, index: u32, granted: u32) -> MsiMessage {
    MsiMessage {
        data: base.data & !(granted - 1) | index,
        ..base
    }
}

#[test]
fn pins_are_swizzled_over_four_lines() {
    let machine = Machine::new();
    let pins = [
        (1, InterruptPin::A, 1),
        (2, InterruptPin::A, 2),
        (3, InterruptPin::A, 3),
        (4, InterruptPin::A, 0),
        (5, InterruptPin::D, 0),
        (30, InterruptPin::B, 3),
    ];
    for (slot, pin, line) in pins {
        let (device, function) = plug(&machine, slot, pin);
        let number = pin as u8 + 1;
        assert_eq!(function.config::<u8>(spec::INTERRUPT_PIN), number);
        let input = Lines::FIRST_INPUT + line;
        assert_eq!(function.config::<u8>(spec::INTERRUPT_LINE), input);
        let mut expected = [false; 4];
        device.set_pin(true);
        expected[usize::from(line)] = true;
        assert_eq!(machine.lines().levels(), expected, "slot {slot}");
        device.set_pin(false);
        assert_eq!(machine.lines().levels(), [false; 4]);
    }
}

#[test]
fn a_line_is_asserted_while_any_of_its_functions_does() {
    let machine = Machine::new();
    let (a, first) = plug(&machine, 2, InterruptPin::A);
    let (b, second) = plug(&machine, 6, InterruptPin::A);
    let line = || machine.lines().state(2);
    a.set_pin(true);
    b.set_pin(true);
    a.set_pin(true);
    assert_eq!((line().level, line().changes), (true, 1));
    assert!(first.interrupt_status() && second.interrupt_status());
    a.set_pin(false);
    assert!(line().level, "the other one still asserts it");
    assert!(!first.interrupt_status() && second.interrupt_status());
    b.set_pin(false);
    assert_eq!((line().level, line().changes), (false, 2));
}

#[test]
fn interrupt_disable_hides_the_pin_but_not_its_status() {
    let machine = Machine::new();
    let (device, function) = plug(&machine, 1, InterruptPin::A);
    let disable = spec::command::INTX_DISABLE | spec::command::MEMORY;
    device.set_pin(true);
    function.set_command(disable);
    assert!(!machine.lines().state(1).level);
    assert!(function.interrupt_status());
    function.set_command(spec::command::MEMORY);
    assert!(machine.lines().state(1).level, "it is a level");
    function.set_command(disable);
    device.set_pin(false);
    assert!(!function.interrupt_status());
    function.set_command(0);
    assert!(!machine.lines().state(1).level);
}

#[test]
fn interrupt_status_is_read_only_and_in_its_byte_alone() {
    let machine = Machine::new();
    let (device, function) = plug(&machine, 1, InterruptPin::A);
    device.set_pin(true);
    function.set_config(spec::STATUS, 0xffffu16);
    assert!(function.interrupt_status());
    let whole: u32 = function.config(spec::COMMAND);
    let [_, _, low, high] = whole.to_le_bytes();
    assert_eq!(function.config::<u8>(spec::STATUS), low);
    assert_eq!(function.config::<u8>(spec::STATUS + 1), high);
    assert_eq!(low, 0x18, "interrupt status and capabilities list");
    let command = spec::command::MEMORY | spec::command::BUS_MASTER;
    assert_eq!(function.config::<u16>(spec::COMMAND), command);
}

#[test]
fn bus_master_does_not_gate_the_pin() {
    let machine = Machine::new();
    let (device, function) = plug(&machine, 1, InterruptPin::A);
    function.set_bus_master(false);
    device.set_pin(true);
    assert!(machine.lines().state(1).level);
}

#[test]
fn a_sleeping_function_asserts_nothing_and_goes_on_when_it_wakes() {
    let machine = Machine::new();
    let (device, function) = plug(&machine, 1, InterruptPin::A);
    device.set_pin(true);
    let power = function.capability(spec::capability::POWER_MANAGEMENT);
    let control = power.unwrap() + spec::power::CONTROL;
    function.set_config(control, spec::power::D3_HOT);
    assert!(!machine.lines().state(1).level);
    function.set_config(control, spec::power::D0);
    assert!(machine.lines().state(1).level);
}

#[test]
fn reset_ends_the_interrupt_without_a_glitch() {
    let machine = Machine::new();
    let (device, mut function) = plug(&machine, 1, InterruptPin::A);
    device.set_pin(true);
    let disable = spec::command::INTX_DISABLE | spec::command::MEMORY;
    function.set_command(disable);
    let before = machine.lines().state(1).changes;
    function.reset();
    assert_eq!(machine.lines().state(1).changes, before);
    assert!(!function.interrupt_status());
    assert_eq!(function.config::<u16>(spec::COMMAND), 0);
    assert_eq!(function.config::<u8>(spec::INTERRUPT_LINE), 17);
    device.set_pin(true);
    assert!(machine.lines().state(1).level);
}

#[test]
fn messages_take_the_place_of_the_pin() {
    let machine = Machine::new();
    let (device, function) = plug(&machine, 1, InterruptPin::A);
    device.set_pin(true);
    device.signal(0);
    let first = function.setup_msi();
    assert!(!machine.lines().state(1).level);
    assert!(!function.interrupt_status());
    assert_eq!(machine.interrupts().count(first), 0, "INTx told of that");
    device.signal(0);
    assert_eq!(machine.interrupts().count(first), 1);
    function.msi().control(false, 0);
    assert!(machine.lines().state(1).level, "still asserted");
    device.signal(0);
    function.msi().control(true, 0);
    assert_eq!(machine.interrupts().count(first), 1, "dropped");
}

#[test]
fn masked_vectors_are_pending_until_unmasked_or_withdrawn() {
    let machine = Machine::new();
    let (device, function) = plug(&machine, 1, InterruptPin::A);
    let msi = function.msi();
    assert_eq!(msi.capable(), 4);
    let base = message(machine.interrupts().allocate(), 0, 4);
    msi.set_message(base);
    msi.mask(0b1010);
    msi.control(true, 2);
    for vector in [0, 1, 1, 2, 3] {
        device.signal(vector);
    }
    let counts = || [0, 1, 2, 3].map(|i| machine.interrupts().count(message(base, i, 4)));
    assert_eq!(counts(), [1, 0, 1, 0]);
    assert_eq!(msi.pending(), 0b1010);
    msi.write(spec::msi::PENDING, 0u32);
    assert_eq!(msi.pending(), 0b1010, "read-only");
    assert_eq!(msi.read::<u8>(spec::msi::PENDING), 0b1010);
    device.withdraw(3);
    assert_eq!(msi.pending(), 0b0010);
    msi.mask(0);
    assert_eq!(counts(), [1, 1, 1, 0], "two signals, one message");
    assert_eq!(msi.pending(), 0);
    msi.mask(u32::MAX);
    assert_eq!(msi.read::<u32>(spec::msi::MASK), 0xf, "four vectors");
}

#[test]
fn fewer_granted_vectors_are_shared() {
    let machine = Machine::new();
    let (device, function) = plug(&machine, 1, InterruptPin::A);
    let msi = function.msi();
    let base = MsiMessage {
        address: 0xfee0_1000,
        data: 0x43,
    };
    msi.set_message(base);
    msi.mask(0b10);
    msi.control(true, 1);
    for vector in 0..4 {
        device.signal(vector);
    }
    let count = |data| machine.interrupts().count(MsiMessage { data, ..base });
    assert_eq!([0x40, 0x41, 0x42, 0x43].map(count), [0, 0, 2, 0]);
    assert_eq!(msi.pending(), 0b10);
    msi.mask(0);
    assert_eq!(count(0x43), 1);
    // More than the function has: all that it has.
    msi.control(true, 5);
    device.signal(3);
    assert_eq!(count(0x43), 2);
    device.signal(1);
    assert_eq!(count(0x41), 1);
}

#[test]
fn bus_master_gates_messages() {
    let machine = Machine::new();
    let (device, function) = plug(&machine, 1, InterruptPin::A);
    let message = function.setup_msi();
    function.set_bus_master(false);
    device.signal(0);
    assert_eq!(machine.interrupts().count(message), 0);
    assert_eq!(function.msi().pending(), 1);
    function.set_bus_master(true);
    assert_eq!(machine.interrupts().count(message), 1);
}

#[test]
fn reset_forgets_messages() {
    let machine = Machine::new();
    let (device, mut function) = plug(&machine, 1, InterruptPin::A);
    let message = function.setup_msi();
    function.msi().mask(1);
    device.signal(0);
    function.reset();
    let msi = function.msi();
    assert_eq!(
        (msi.pending(), msi.read::<u16>(spec::msi::CONTROL)),
        (0, 0x184)
    );
    assert_eq!(msi.read::<u32>(spec::msi::MASK), 0);
    function.set_command(spec::command::BUS_MASTER);
    msi.set_message(message);
    msi.control(true, 0);
    assert_eq!(machine.interrupts().count(message), 0);
}

/// Devices assert and deassert from threads of their own while the guest switches the pins off and
/// on: in the end every line is as its functions say.
#[test]
fn levels_settle_under_fire() {
    let machine = Machine::new();
    let functions: Vec<_> = [1, 5, 9, 2]
        .map(|slot| plug(&machine, slot, InterruptPin::A))
        .into();
    thread::scope(|scope| {
        for (device, _) in &functions {
            scope.spawn(move || (0..3000).for_each(|round| device.set_pin(round % 3 != 0)));
        }
        for (_, function) in &functions {
            scope.spawn(move || {
                for round in 0..3000u16 {
                    function.set_command(round % 2 * spec::command::INTX_DISABLE);
                }
            });
        }
    });
    for (device, function) in &functions {
        function.set_command(0);
        device.set_pin(true);
    }
    assert!(machine.lines().wait(1, true, TIMEOUT));
    assert_eq!(machine.lines().levels(), [false, true, true, false]);
    for (device, _) in &functions {
        device.set_pin(false);
    }
    assert_eq!(machine.lines().levels(), [false; 4]);
}

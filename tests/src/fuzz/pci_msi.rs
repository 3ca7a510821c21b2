//! MSI against a plain model: what fires, what is pending, what the registers say, how often the
//! host's routes change.

use iommu::{MsiMessage, SourceId};
use pci::{InterruptPin, spec};

use super::Input;
use crate::function::{GuestFunction, GuestMsi};
use crate::interrupts::Delivery;
use crate::machine::Machine;
use crate::test_device::TestDevice;

const SLOT: u8 = 5;
/// Line of INTC in this slot.
const LINE: usize = 3;
const VECTORS: usize = 8;

#[derive(Clone, Copy, Default)]
struct Vector {
    pending: bool,
    /// What the host's route holds.
    route: Option<MsiMessage>,
    /// May fire: not masked in any way and the host has taken the route.
    open: bool,
}

struct Model {
    vectors: [Vector; VECTORS],
    /// The capability's bytes from Message Control to Mask Bits.
    registers: [u8; 18],
    bus_master: bool,
    powered: bool,
    intx_disable: bool,
    pin: bool,
    refusing: bool,
    lines: u64,
    retargets: u64,
    fired: Vec<MsiMessage>,
}

/// Writable bits of Message Control, reserved, address, data, reserved and mask.
fn writable() -> [u8; 18] {
    let mut mask = [0; 18];
    mask[0] = 0x71;
    mask[2] = 0xfc;
    mask[3..12].fill(0xff);
    mask[14] = 0xff;
    // The data is followed by two reserved bytes.
    mask[12..14].fill(0);
    mask
}

impl Model {
    fn new() -> Model {
        let mut registers = [0; 18];
        registers[..2].copy_from_slice(&0x0186u16.to_le_bytes());
        Model {
            vectors: [Vector::default(); VECTORS],
            registers,
            bus_master: true,
            powered: true,
            intx_disable: false,
            pin: false,
            refusing: false,
            lines: 0,
            retargets: 0,
            fired: Vec::new(),
        }
    }

    fn enabled(&self) -> bool {
        self.registers[0] & 1 != 0
    }

    fn granted(&self) -> usize {
        (1 << (self.registers[0] >> 4 & 7)).min(VECTORS)
    }

    fn message(&self, index: usize) -> MsiMessage {
        let r = &self.registers;
        let data = u16::from_le_bytes([r[10], r[11]]);
        let low = u16::try_from(self.granted() - 1).expect("small");
        MsiMessage {
            address: u64::from_le_bytes(r[2..10].try_into().expect("eight")),
            data: u32::from(data & !low) | u32::try_from(index).expect("small"),
        }
    }

    /// Something changed: which vectors may fire now, and have they been waiting to?
    fn update(&mut self) {
        for index in 0..VECTORS {
            let message = self.message(index);
            let masked = self.registers[14] >> index & 1 != 0;
            let may = self.enabled() && self.bus_master && self.powered;
            let granted = self.granted();
            let vector = &mut self.vectors[index];
            vector.open = may && !masked && index < granted;
            if vector.open && vector.route != Some(message) {
                if self.refusing {
                    vector.open = false;
                    continue;
                }
                self.lines += u64::from(vector.route.is_none());
                self.retargets += 1;
                vector.route = Some(message);
            }
            if vector.open && std::mem::take(&mut vector.pending) {
                self.fired.push(message);
            }
        }
    }

    /// Changes what counts; only a change makes the vectors look again.
    fn change(&mut self, change: impl FnOnce(&mut Model)) {
        let state = |model: &Model| (model.registers, model.bus_master && model.powered);
        let (before, enabled) = (state(self), self.enabled());
        change(self);
        if self.enabled() && !enabled {
            self.forget();
        }
        if state(self) != before {
            self.update();
        }
    }

    fn forget(&mut self) {
        self.vectors.iter_mut().for_each(|v| v.pending = false);
    }

    fn signal(&mut self, index: usize) {
        let index = index % self.granted();
        let message = self.message(index);
        let vector = &mut self.vectors[index];
        if vector.open {
            self.fired.push(message);
        } else {
            vector.pending = true;
        }
    }

    fn write(&mut self, at: usize, data: &[u8]) {
        let writable = writable();
        self.change(|model| {
            for (&value, at) in data.iter().zip(at..) {
                if let Some(byte) = model.registers.get_mut(at) {
                    *byte = *byte & !writable[at] | value & writable[at];
                }
            }
        });
    }

    fn reset(&mut self) {
        let fresh = Model::new();
        self.registers = fresh.registers;
        self.vectors.iter_mut().for_each(|v| {
            *v = Vector {
                route: v.route,
                ..Vector::default()
            };
        });
        (self.bus_master, self.powered) = (false, true);
        (self.pin, self.intx_disable) = (false, false);
    }

    fn line(&self) -> bool {
        self.pin && self.powered && !self.intx_disable && !self.enabled()
    }
}

/// Runs `data` as signals of the device and writes of its driver.
///
/// # Panics
///
/// The function and the model differ.
pub fn pci_msi(data: &[u8]) {
    let machine = Machine::new();
    let vectors = u8::try_from(VECTORS).expect("small");
    let builder = TestDevice::legacy(vectors, InterruptPin::C);
    let device = TestDevice::plug_as(&machine, SLOT, builder);
    let mut function = GuestFunction::probe(&machine, SLOT);
    let msi = function.msi();
    let mut model = Model::new();

    let mut input = Input::new(data);
    let mut steps = 0;
    while !input.is_empty() && steps < 500 {
        steps += 1;
        let index = usize::from(input.byte()) % VECTORS;
        let kind = input.byte();
        match kind % 16 {
            0..4 => {
                device.signal(index);
                model.signal(index);
            }
            4 => {
                device.withdraw(index);
                let index = index % model.granted();
                model.vectors[index].pending = false;
            }
            5..7 => {
                let mask = input.byte();
                msi.mask(mask.into());
                model.write(14, &u32::from(mask).to_le_bytes());
            }
            // As a driver sets a message, one of few so that the same comes again.
            7 => {
                let data = u16::from(input.byte() % 4) << 3;
                msi.write(spec::msi::DATA, data);
                model.write(10, &data.to_le_bytes());
            }
            // Any store to the capability inside a dword.
            8 | 9 => {
                let bytes = input.bytes::<4>();
                let at = 4 * (1 + usize::from(input.byte()) % 5);
                let len = [4, 2, 1][usize::from(input.byte()) % 3];
                let register = u16::try_from(at).expect("small");
                match len {
                    4 => msi.write(register, bytes),
                    2 => msi.write(register, [bytes[0], bytes[1]]),
                    _ => msi.write(register, bytes[0]),
                }
                model.write(at - 2, &bytes[..len]);
            }
            10 | 11 => {
                let log2 = u16::from(kind >> 5);
                msi.control(kind & 16 != 0, log2);
                let control = u16::from(kind & 16 != 0) | log2 << 4;
                model.write(0, &control.to_le_bytes());
            }
            12 => {
                model.pin = kind & 16 != 0;
                device.set_pin(model.pin);
            }
            13 => {
                let (on, disable) = (kind & 16 != 0, kind & 32 != 0);
                let mut command = spec::command::MEMORY;
                command |= u16::from(on) * spec::command::BUS_MASTER;
                command |= u16::from(disable) * spec::command::INTX_DISABLE;
                function.set_command(command);
                model.intx_disable = disable;
                model.change(|m| m.bus_master = on);
            }
            14 => {
                model.refusing = kind & 16 != 0;
                machine.interrupts().refuse(model.refusing);
                // The host is not asked again before the guest does something.
            }
            _ if kind & 16 != 0 => {
                function.reset();
                model.reset();
            }
            _ => {
                let power = function.capability(spec::capability::POWER_MANAGEMENT);
                let register = power.expect("power management") + spec::power::CONTROL;
                let on = kind & 32 != 0;
                function.set_config(register, if on { 0u16 } else { 3 });
                model.change(|m| m.powered = on);
            }
        }
        compare(&machine, &function, &msi, &mut model);
    }
}

fn compare(machine: &Machine, function: &GuestFunction, msi: &GuestMsi, model: &mut Model) {
    let source = SourceId(u16::from(SLOT) << 3);
    let key = |message: &MsiMessage| (message.address, message.data);
    let mut fired: Vec<MsiMessage> = Vec::new();
    for delivery in machine.interrupts().take_log() {
        assert_eq!(delivery, Delivery { source, ..delivery });
        fired.push(delivery.message);
    }
    // Vectors unmasked together fire in any order.
    let mut expected = std::mem::take(&mut model.fired);
    fired.sort_unstable_by_key(key);
    expected.sort_unstable_by_key(key);
    assert_eq!(fired, expected);
    assert_eq!(machine.interrupts().opened(), model.lines);
    assert_eq!(machine.interrupts().retargets(), model.retargets);
    let registers: [u8; 18] =
        std::array::from_fn(|at| msi.read(u16::try_from(at).expect("small") + spec::msi::CONTROL));
    assert_eq!(registers, model.registers);
    let pending = (0..VECTORS).filter(|&index| model.vectors[index].pending && model.enabled());
    assert_eq!(
        msi.pending(),
        pending.fold(0, |bits, index| bits | 1 << index)
    );
    assert_eq!(function.interrupt_status(), model.pin && !model.enabled());
    let mut levels = [false; 4];
    levels[LINE] = model.line();
    assert_eq!(machine.lines().levels(), levels);
}

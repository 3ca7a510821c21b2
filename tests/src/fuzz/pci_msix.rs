//! MSI-X against a plain model: what fires, what is pending, what the table says, how often the
//! host's routes change.

use iommu::{MsiMessage, SourceId};
use pci::spec;

use super::Input;
use crate::function::GuestFunction;
use crate::interrupts::Delivery;
use crate::machine::Machine;
use crate::test_device::TestDevice;

const SLOT: u8 = 3;
/// Two qwords of pending bits.
const VECTORS: usize = 67;
/// The vectors that the input plays with: ends and borders.
const PLAYED: [usize; 6] = [0, 1, 2, 63, 64, 66];

#[derive(Clone, Copy, Default)]
struct Vector {
    entry: [u8; 16],
    pending: bool,
    /// What the host's route holds.
    route: Option<MsiMessage>,
    /// May fire: not masked in any way and the host has taken the route.
    open: bool,
}

impl Vector {
    fn message(&self) -> MsiMessage {
        let half = |at: usize| u32::from_le_bytes(self.entry[at..at + 4].try_into().expect("four"));
        MsiMessage {
            address: u64::from(half(4)) << 32 | u64::from(half(0)),
            data: half(8),
        }
    }
}

struct Model {
    vectors: [Vector; VECTORS],
    enable: bool,
    function_mask: bool,
    bus_master: bool,
    powered: bool,
    refusing: bool,
    lines: u64,
    retargets: u64,
    fired: Vec<MsiMessage>,
}

impl Model {
    fn new() -> Model {
        let mut vector = Vector::default();
        vector.entry[12] = 1;
        Model {
            vectors: [vector; VECTORS],
            enable: false,
            function_mask: false,
            bus_master: false,
            powered: true,
            refusing: false,
            lines: 0,
            retargets: 0,
            fired: Vec::new(),
        }
    }

    /// Something changed for this vector: may it fire now, and has it been waiting to?
    fn update(&mut self, index: usize) {
        let may = self.enable && !self.function_mask && self.bus_master && self.powered;
        let vector = &mut self.vectors[index];
        let message = vector.message();
        vector.open = may && vector.entry[12] & 1 == 0;
        if vector.open && vector.route != Some(message) {
            if self.refusing {
                vector.open = false;
                return;
            }
            self.lines += u64::from(vector.route.is_none());
            self.retargets += 1;
            vector.route = Some(message);
        }
        if vector.open && std::mem::take(&mut vector.pending) {
            self.fired.push(message);
        }
    }

    /// Changes control bits; only a change makes the vectors look again.
    fn control(&mut self, change: impl FnOnce(&mut Model)) {
        let bits = |model: &Model| {
            let may_send = model.bus_master && model.powered;
            (model.enable, model.function_mask, may_send)
        };
        let before = bits(self);
        change(self);
        if bits(self) != before {
            for index in 0..VECTORS {
                self.update(index);
            }
        }
    }

    fn signal(&mut self, index: usize) {
        let vector = &mut self.vectors[index];
        if vector.open {
            self.fired.push(vector.message());
        } else {
            vector.pending = true;
        }
    }

    fn table_write(&mut self, offset: usize, data: &[u8]) {
        for (&value, at) in data.iter().zip(offset..) {
            // Bits that do not exist read as 0.
            let mask = match at % 16 {
                0 => 0xfc,
                12 => 1,
                13..=15 => 0,
                _ => 0xff,
            };
            if let Some(vector) = self.vectors.get_mut(at / 16) {
                vector.entry[at % 16] = value & mask;
            }
        }
        for index in offset / 16..=(offset + data.len() - 1) / 16 {
            if index < VECTORS {
                self.update(index);
            }
        }
    }

    fn reset(&mut self) {
        let fresh = Model::new();
        for (vector, fresh) in self.vectors.iter_mut().zip(fresh.vectors) {
            *vector = Vector {
                route: vector.route,
                ..fresh
            };
        }
        (self.enable, self.function_mask, self.bus_master) = (false, false, false);
        self.powered = true;
    }
}

/// Runs `data` as signals of the device and writes of its driver.
///
/// # Panics
///
/// The function and the model differ.
pub fn pci_msix(data: &[u8]) {
    let machine = Machine::new();
    let vectors = u16::try_from(VECTORS).expect("small");
    let device = TestDevice::plug(&machine, SLOT, vectors);
    let mut function = GuestFunction::probe(&machine, SLOT);
    let mut model = Model::new();
    model.bus_master = true;

    let mut input = Input::new(data);
    let mut steps = 0;
    while !input.is_empty() && steps < 500 {
        steps += 1;
        let index = input.pick(&PLAYED);
        let kind = input.byte();
        match kind % 16 {
            0..4 => {
                device.signal(index);
                model.signal(index);
            }
            // As a driver masks and unmasks.
            4..7 => {
                let mask = kind & 16 != 0;
                table_write(
                    &function,
                    &mut model,
                    index * 16 + 12,
                    &[u8::from(mask), 0, 0, 0],
                );
            }
            // As a driver sets a message, one of few so that the same comes again.
            7 | 8 => {
                let data = u32::from(input.byte() % 4);
                table_write(&function, &mut model, index * 16 + 8, &data.to_le_bytes());
            }
            // Any store to the table, over its end too.
            9 | 10 => {
                let bytes = input.bytes::<8>();
                let len = usize::from(input.pick(&[4u8, 8, 1, 2, 3, 5, 6, 7]));
                let offset = index * 16 + usize::from(input.byte() % 24);
                table_write(&function, &mut model, offset, &bytes[..len]);
            }
            11 | 12 => {
                let (enable, mask) = (kind & 16 != 0, kind & 32 != 0);
                function.set_msix(enable, mask);
                model.control(|m| (m.enable, m.function_mask) = (enable, mask));
            }
            13 => {
                let on = kind & 16 != 0;
                function.set_bus_master(on);
                model.control(|m| m.bus_master = on);
            }
            14 => {
                model.refusing = kind & 16 != 0;
                machine.interrupts().refuse(model.refusing);
                // The host is not asked again before the guest does something.
            }
            _ if kind & 16 != 0 => {
                function.reset();
                model.reset();
                function.place_bars();
                function.set_command(spec::command::MEMORY);
            }
            _ => {
                let power = function.capability(spec::capability::POWER_MANAGEMENT);
                let register = power.expect("power management") + spec::power::CONTROL;
                let on = kind & 32 != 0;
                function.set_config(register, if on { 0u16 } else { 3 });
                model.control(|m| m.powered = on);
            }
        }
        compare(&machine, &function, &mut model);
    }
}

fn table_write(function: &GuestFunction, model: &mut Model, offset: usize, data: &[u8]) {
    // The BAR answers only while the function is on.
    if model.powered {
        let address = function.bar(0).address.0 + TestDevice::TABLE + offset as u64;
        // Past the table are the pending bits and then the device's registers.
        let len = data.len().min((VECTORS * 16).saturating_sub(offset));
        function.machine().store(iommu::Gpa(address), data);
        if len > 0 {
            model.table_write(offset, &data[..len]);
        }
    }
}

fn compare(machine: &Machine, function: &GuestFunction, model: &mut Model) {
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
    if !model.powered {
        return;
    }
    let bar = function.bar(0);
    let pba = TestDevice::TABLE + VECTORS as u64 * 16;
    for index in PLAYED {
        let vector = &model.vectors[index];
        let at = TestDevice::TABLE + index as u64 * 16;
        let halves: [u64; 2] = [bar.read(at), bar.read(at + 8)];
        let entry = halves.map(u64::to_le_bytes).concat();
        assert_eq!(entry, vector.entry, "table entry {index}");
        let bits: u64 = bar.read(pba + index as u64 / 64 * 8);
        assert_eq!(
            bits >> (index % 64) & 1 != 0,
            vector.pending,
            "pending bit {index}"
        );
    }
}

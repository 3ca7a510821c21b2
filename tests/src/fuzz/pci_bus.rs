//! Configuration space, BAR decoding and I/O events of three functions against a plain model.
//!
//! The model knows the registers' masks by hand, keeps no address map but asks every BAR of every
//! function in order for each byte, and shares no code with the bus.

use std::ops::Range;
use std::sync::Arc;

use iommu::{Bdf, Gpa, Iova};
use pci::BarIndex;

use super::Input;
use crate::machine::{Machine, layout};
use crate::test_device::TestDevice;

const SLOTS: [u8; 3] = [1, 2, 5];
const VECTORS: u16 = 4;
/// Where a test device's MSI-X structures are: not modelled here.
const STRUCTURES: Range<u64> = 0x8000..0x8048;
/// BARs: index, size, upper half exists.
const BARS: [(u8, u64, bool); 2] = [(0, 0x1_0000, true), (2, 0x1000, false)];

const COMMAND: u16 = 0x04;
const POWER_CONTROL: u16 = 0x44;
const DEVICE_CONTROL_HIGH: u16 = 0x51;

/// The bits that the guest can write in one byte of a test device's configuration space.
fn writable(register: u16) -> u8 {
    match register {
        0x04 => 0b110,
        0x05 => 0b100,
        0x0c | 0x3c => 0xff,
        0x12..=0x17 => 0xff,
        0x19 => 0xf0,
        0x1a | 0x1b => 0xff,
        0x44 => 0b11,
        0x50 => 0x1f,
        0x51 => 0x78,
        0x87 => 0xc0,
        0x93..0x9c => TestDevice::VENDOR_MASK[usize::from(register - 0x93)],
        _ => 0,
    }
}

struct Function {
    slot: u8,
    device: Arc<TestDevice>,
    fresh: Vec<u8>,
    config: Vec<u8>,
    memory: [Vec<u8>; 2],
    doorbells: u64,
}

impl Function {
    fn reset(&mut self) {
        self.config.clone_from(&self.fresh);
        let bdf = Bdf::new(0, self.slot, 0).expect("slot");
        self.memory = BARS.map(|(bar, size, _)| {
            let bytes = (0..size).map(|offset| TestDevice::fresh(bdf, BarIndex(bar), offset));
            bytes.collect()
        });
    }

    fn on(&self) -> bool {
        self.config[usize::from(POWER_CONTROL)] & 3 == 0
    }

    fn bus_master(&self) -> bool {
        self.on() && self.config[usize::from(COMMAND)] & 4 != 0
    }

    fn decodes(&self) -> bool {
        self.on() && self.config[usize::from(COMMAND)] & 2 != 0
    }

    fn base(&self, (bar, _, wide): (u8, u64, bool)) -> u64 {
        let at = 0x10 + usize::from(bar) * 4;
        let half = |at: usize| {
            let bytes = self.config[at..at + 4].try_into().expect("four bytes");
            u64::from(u32::from_le_bytes(bytes))
        };
        let high = if wide { half(at + 4) << 32 } else { 0 };
        high | (half(at) & !0xf)
    }

    /// A write inside one dword.
    fn write(&mut self, register: u16, data: &[u8]) {
        let power = self.config[usize::from(POWER_CONTROL)];
        let mut reset = false;
        for (&value, at) in data.iter().zip(register..) {
            if let Some(byte) = self.config.get_mut(usize::from(at)) {
                let mask = writable(at);
                *byte = (*byte & !mask) | (value & mask);
            }
            reset |= at == DEVICE_CONTROL_HIGH && value & 0x80 != 0;
        }
        let control = &mut self.config[usize::from(POWER_CONTROL)];
        if matches!(*control & 3, 1 | 2) {
            *control = power;
        }
        if reset {
            self.reset();
        }
    }
}

struct Model {
    functions: Vec<Function>,
    cf8: u32,
}

impl Model {
    fn function(&mut self, devfn: u64) -> Option<&mut Function> {
        let mut all = self.functions.iter_mut();
        all.find(|f| u64::from(f.slot) << 3 == devfn)
    }

    /// Function, BAR and offset that answer an address.
    fn winner(&self, address: u64) -> Option<(usize, usize, u64)> {
        for (f, function) in self.functions.iter().enumerate() {
            for (b, &bar) in BARS.iter().enumerate() {
                let (first, last) = (function.base(bar), function.base(bar) + (bar.1 - 1));
                let inside = |w: Range<u64>| w.contains(&first) && w.contains(&last);
                let forwarded = inside(layout::MMIO32) || inside(layout::MMIO64);
                if function.decodes() && forwarded && (first..=last).contains(&address) {
                    return Some((f, b, address - first));
                }
            }
        }
        None
    }

    /// A configuration byte; `None` if it is not modelled.
    fn config_byte(&mut self, offset: u64) -> Option<u8> {
        match self.function(offset >> 12) {
            _ if offset >> 12 == 0 => None,
            None => Some(0xff),
            Some(function) => {
                let register = usize::try_from(offset & 0xfff).expect("12 bits");
                Some(function.config.get(register).copied().unwrap_or(0))
            }
        }
    }

    fn config_write(&mut self, offset: u64, data: &[u8]) {
        let mut done = 0;
        while done < data.len() {
            let at = offset + done as u64;
            let part = (4 - usize::try_from(at % 4).expect("small")).min(data.len() - done);
            let register = u16::try_from(at & 0xfff).expect("12 bits");
            if let Some(function) = self.function(at >> 12) {
                function.write(register, &data[done..done + part]);
            }
            done += part;
        }
    }

    fn read(&mut self, address: u64, len: u64) -> Vec<Option<u8>> {
        let config = layout::ECAM.contains(&address);
        let byte = |at: u64| {
            if config {
                return self.config_byte(at - layout::ECAM.start);
            }
            match self.winner(at) {
                Some((_, 0, offset)) if STRUCTURES.contains(&offset) => None,
                Some((f, b, offset)) => {
                    let at = usize::try_from(offset).expect("small");
                    Some(self.functions[f].memory[b][at])
                }
                None => Some(0xff),
            }
        };
        (address..address + len).map(byte).collect()
    }

    fn write(&mut self, address: u64, data: &[u8]) {
        if layout::ECAM.contains(&address) {
            self.config_write(address - layout::ECAM.start, data);
            return;
        }
        if data.len() == 4
            && let Some((f, 0, TestDevice::DOORBELL)) = self.winner(address)
        {
            self.functions[f].doorbells += 1;
            return;
        }
        for (&value, at) in data.iter().zip(address..) {
            if let Some((f, b, offset)) = self.winner(at) {
                let at = usize::try_from(offset).expect("small");
                self.functions[f].memory[b][at] = value;
            }
        }
    }

    /// Where the doorbells are now.
    fn events(&self) -> Vec<u64> {
        let mut found: Vec<u64> = (0..self.functions.len())
            .filter_map(|f| {
                let address = self.functions[f].base(BARS[0]) + TestDevice::DOORBELL;
                (self.winner(address)? == (f, 0, TestDevice::DOORBELL)).then_some(address)
            })
            .collect();
        found.sort_unstable();
        found
    }

    /// The offset in ECAM of `CONFIG_DATA` byte `lane`.
    fn selected(&self, lane: u8) -> Option<u64> {
        let enabled = self.cf8 >> 31 != 0 && self.cf8 >> 16 & 0xff == 0;
        let devfn = u64::from(self.cf8 >> 8 & 0xff);
        enabled.then(|| (devfn << 12) | (u64::from(self.cf8 & 0xfc) + u64::from(lane)))
    }
}

/// Runs `data` as guest accesses to a bus with three test devices.
///
/// # Panics
///
/// The bus and the model differ.
pub fn pci_bus(data: &[u8]) {
    let machine = Machine::new();
    let functions = SLOTS.map(|slot| {
        let device = TestDevice::plug(&machine, slot, VECTORS);
        let first = layout::ECAM.start + (u64::from(slot) << 15);
        let fresh: Vec<u8> = (0..256).map(|i| machine.read(Gpa(first + i))).collect();
        let mut function = Function {
            slot,
            device,
            config: fresh.clone(),
            fresh,
            memory: Default::default(),
            doorbells: 0,
        };
        function.reset();
        function
    });
    let mut model = Model {
        functions: functions.into(),
        cf8: 0,
    };
    let mut input = Input::new(data);
    let mut step = 0;
    while !input.is_empty() && step < 500 {
        access(&machine, &mut model, &mut input);
        compare_effects(&machine, &mut model);
        step += 1;
        if step % 16 == 0 || input.is_empty() {
            compare_config(&machine, &mut model);
        }
    }
}

/// One access, made to machine and model; loads are compared.
fn access(machine: &Machine, model: &mut Model, input: &mut Input<'_>) {
    let kind = input.byte();
    let len = input.pick(&[4u8, 1, 2, 8, 3, 5, 6, 7]);
    let slot = u64::from(input.pick(&SLOTS));
    let function = usize::from(input.byte()) % SLOTS.len();
    match kind % 8 {
        // A BAR to a place where others may be.
        0 => {
            let bar = input.pick(&BARS);
            let place = input.pick(&[
                layout::MMIO32.start,
                layout::MMIO64.start,
                layout::MMIO32.end - 0x2_0000,
                layout::MMIO64.end - 0x2_0000,
                layout::ECAM.start,
                u64::MAX << 18,
            ]);
            let place = place + u64::from(input.byte() % 64) * 0x1000;
            let register = layout::ECAM.start + (slot << 15) + 0x10 + u64::from(bar.0) * 4;
            let bytes = place.to_le_bytes();
            let bytes = if bar.2 { &bytes[..] } else { &bytes[..4] };
            machine.store(Gpa(register), bytes);
            model.write(register, bytes);
        }
        // The command register, power state or device control.
        1 => {
            let register = input.pick(&[COMMAND, COMMAND, COMMAND, POWER_CONTROL, 0x50]);
            let address = layout::ECAM.start + (slot << 15) + u64::from(register);
            let value = input.u16().to_le_bytes();
            machine.store(Gpa(address), &value);
            model.write(address, &value);
        }
        // Anywhere in ECAM, mostly in a function's first 256 bytes.
        2 | 3 => {
            let offset = input.u32();
            let offset = if kind & 8 == 0 {
                slot << 15 | u64::from(offset & 0xff)
            } else {
                u64::from(offset & 0xff_ffff)
            };
            read_or_write(machine, model, input, layout::ECAM.start + offset, len);
        }
        // In or around a BAR.
        4 | 5 => {
            let bar = input.pick(&BARS);
            let base = model.functions[function].base(bar);
            let address = base.wrapping_add(u64::from(input.u16())).wrapping_sub(8);
            // RAM and the end of the address space are not the bus's.
            if address >> 32 > 4 && address < u64::MAX - 16 || layout::MMIO32.contains(&address) {
                read_or_write(machine, model, input, address, len);
            }
        }
        // A doorbell.
        6 => {
            let address = model.functions[function].base(BARS[0]) + TestDevice::DOORBELL;
            if address > layout::HIGH_RAM.end || layout::MMIO32.contains(&address) {
                let data = input.u32().to_le_bytes();
                machine.store(Gpa(address), &data);
                model.write(address, &data);
            }
        }
        // Ports.
        _ => ports(machine, model, input, slot),
    }
}

fn read_or_write(
    machine: &Machine,
    model: &mut Model,
    input: &mut Input<'_>,
    address: u64,
    len: u8,
) {
    let mut data = input.bytes::<8>();
    let data = &mut data[..usize::from(len)];
    if input.byte() & 1 == 0 {
        machine.store(Gpa(address), data);
        model.write(address, data);
    } else {
        machine.load(Gpa(address), data);
        check(data, &model.read(address, u64::from(len)), address);
    }
}

fn ports(machine: &Machine, model: &mut Model, input: &mut Input<'_>, slot: u64) {
    let register = u32::from(input.byte());
    let devfn = u32::try_from(slot << 3).expect("small");
    let address = input.pick(&[
        1 << 31 | devfn << 8 | register,
        devfn << 8 | register,
        register << 8 | 1 << 31,
        register << 24 | register << 16,
    ]);
    assert!(machine.root().pio_write(0xcf8, &address.to_le_bytes()));
    model.cf8 = address & 0x80ff_fffc;
    let mut now = [0; 4];
    assert!(machine.root().pio_read(0xcf8, &mut now));
    assert_eq!(u32::from_le_bytes(now), model.cf8);

    let lane = input.byte() % 4;
    let port = 0xcfc + u16::from(lane);
    let len = input.pick(&[1u8, 2, 4]);
    let mut data = input.bytes::<4>();
    let data = &mut data[..usize::from(len)];
    if input.byte() & 1 == 0 {
        assert!(machine.root().pio_write(port, data));
        if let Some(offset) = model.selected(lane) {
            let inside = usize::from(len.min(4 - lane));
            model.config_write(offset, &data[..inside]);
        }
    } else {
        assert!(machine.root().pio_read(port, data));
        let expected: Vec<Option<u8>> = (lane..lane + len)
            .map(|lane| match model.selected(lane) {
                Some(offset) if lane < 4 => model.config_byte(offset),
                _ => Some(0xff),
            })
            .collect();
        check(data, &expected, u64::from(port));
    }
}

fn check(data: &[u8], expected: &[Option<u8>], address: u64) {
    for (i, (&byte, expected)) in data.iter().zip(expected).enumerate() {
        if let Some(expected) = *expected {
            assert_eq!(byte, expected, "byte {i} of the load at {address:#x}");
        }
    }
}

fn compare_effects(machine: &Machine, model: &mut Model) {
    assert_eq!(machine.events().addresses(), model.events());
    for function in &mut model.functions {
        let doorbells = std::mem::take(&mut function.doorbells);
        assert_eq!(function.device.doorbell(), doorbells);
        let open = function.device.view().read_obj::<u8>(Iova(0)).is_ok();
        assert_eq!(open, function.bus_master());
        function.device.take_calls();
    }
}

fn compare_config(machine: &Machine, model: &mut Model) {
    for function in &model.functions {
        let first = layout::ECAM.start + (u64::from(function.slot) << 15);
        let now: Vec<u8> = (0..256).map(|i| machine.read(Gpa(first + i))).collect();
        assert_eq!(now, function.config, "slot {}", function.slot);
    }
}

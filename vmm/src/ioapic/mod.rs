//! The IOAPIC: 24 pins whose interrupts leave as MSIs.
//!
//! KVM keeps only the local APICs (split interrupt chip). A pin's redirection entry becomes an MSI
//! message on a line of the same kind as any device's, so that an interrupt remapper can sit in
//! between. KVM reports the end of level-triggered interrupts with an exit to user space.

mod spec;

use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use iommu::{MsiLine, MsiMessage};
use pci::IntxSink;

use crate::layout;
use spec::Redirection;

/// Input pins.
pub const PINS: u8 = 24;

/// The I/O APIC.
pub struct IoApic {
    lines: Vec<Arc<dyn MsiLine>>,
    state: Mutex<State>,
}

struct State {
    id: u32,
    select: u8,
    pins: Vec<Pin>,
}

#[derive(Clone, Copy)]
struct Pin {
    entry: Redirection,
    /// Level of the input.
    asserted: bool,
    /// An edge came while the pin was masked.
    latched: bool,
    /// What the line was last told to deliver.
    target: Option<MsiMessage>,
}

impl IoApic {
    /// An IOAPIC after reset. `lines` has one line for each pin.
    pub fn new(lines: Vec<Arc<dyn MsiLine>>) -> IoApic {
        let pin = Pin {
            entry: Redirection::new().with_masked(true),
            asserted: false,
            latched: false,
            target: None,
        };
        let pins = vec![pin; lines.len()];
        IoApic {
            lines,
            state: Mutex::new(State {
                id: 0,
                select: 0,
                pins,
            }),
        }
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Drives a pin's input. A pin that does not exist is ignored.
    pub fn set_level(&self, pin: u8, level: bool) {
        let mut state = self.state();
        if let (Some(pin), Some(line)) = (
            state.pins.get_mut(usize::from(pin)),
            self.lines.get(usize::from(pin)),
        ) {
            if level && !pin.asserted && !pin.entry.level() {
                pin.latched = true;
            }
            pin.asserted = level;
            pin.deliver(&**line);
        }
    }

    /// One edge on a pin's input.
    pub fn pulse(&self, pin: u8) {
        self.set_level(pin, true);
        self.set_level(pin, false);
    }

    /// Whether the guest lets nothing through from a pin. True for a pin that does not exist.
    pub fn is_masked(&self, pin: u8) -> bool {
        let state = self.state();
        let pin = state.pins.get(usize::from(pin));
        pin.is_none_or(|pin| pin.entry.masked())
    }

    /// The end of the interrupts with this vector, from an EOI exit or the EOI register.
    pub fn end_of_interrupt(&self, vector: u8) {
        let mut state = self.state();
        for (pin, line) in state.pins.iter_mut().zip(&self.lines) {
            if pin.entry.vector() == vector && pin.entry.remote_irr() {
                pin.entry.set_remote_irr(false);
                pin.deliver(&**line);
            }
        }
    }

    /// A load from the register page.
    pub fn read(&self, offset: u64, data: &mut [u8]) {
        let state = self.state();
        let value = match offset {
            spec::IOREGSEL => u32::from(state.select),
            spec::IOWIN => state.read(),
            _ => 0,
        };
        data.fill(0);
        for (to, from) in data.iter_mut().zip(value.to_le_bytes()) {
            *to = from;
        }
    }

    /// A store to the register page. The registers are 32 bits wide; shorter stores are extended
    /// with zeroes.
    pub fn write(&self, offset: u64, data: &[u8]) {
        let mut bytes = [0; 4];
        for (to, from) in bytes.iter_mut().zip(data) {
            *to = *from;
        }
        match offset {
            spec::IOREGSEL => self.state().select = bytes[0],
            spec::IOWIN => self.write_selected(u32::from_le_bytes(bytes)),
            spec::EOI => self.end_of_interrupt(bytes[0]),
            _ => {}
        }
    }

    fn write_selected(&self, value: u32) {
        let mut state = self.state();
        if state.select == spec::IOAPICID {
            state.id = value & 0x0f00_0000;
            return;
        }
        let Some((index, high)) = entry_half(state.select) else {
            return;
        };
        let (Some(pin), Some(line)) = (state.pins.get_mut(index), self.lines.get(index)) else {
            return;
        };
        pin.write(high, value);
        pin.deliver(&**line);
    }
}

/// The PCI lines are active low on a board; here a level is what it means.
impl IntxSink for IoApic {
    fn set_level(&self, line: u8, level: bool) {
        IoApic::set_level(self, self.input(line), level);
    }

    fn input(&self, line: u8) -> u8 {
        layout::PCI_PIN + line % 4
    }
}

impl State {
    fn read(&self) -> u32 {
        match self.select {
            spec::IOAPICID | spec::IOAPICARB => self.id,
            spec::IOAPICVER => spec::VERSION | (u32::from(PINS) - 1) << 16,
            select => entry_half(select)
                .and_then(|(index, high)| Some((self.pins.get(index)?, high)))
                .map_or(0, |(pin, high)| half(pin.entry, high)),
        }
    }
}

/// Which redirection entry, and whether its high half, a register index stands for.
fn entry_half(select: u8) -> Option<(usize, bool)> {
    let index = select.checked_sub(spec::IOREDTBL)?;
    Some((usize::from(index / 2), index % 2 == 1))
}

fn half(entry: Redirection, high: bool) -> u32 {
    let [a, b, c, d, e, f, g, h] = entry.into_bits().to_le_bytes();
    u32::from_le_bytes(if high { [e, f, g, h] } else { [a, b, c, d] })
}

impl Pin {
    fn write(&mut self, high: bool, value: u32) {
        let old = self.entry;
        let (low, high) = if high {
            (half(old, false), value)
        } else {
            (value, half(old, true))
        };
        let mut entry = Redirection::from_bits(u64::from(high) << 32 | u64::from(low));
        entry.set_delivery_status(false);
        // Switching to edge mode and back is how Linux gets rid of a stuck remote IRR.
        entry.set_remote_irr(old.remote_irr() && entry.level());
        if entry.level() {
            self.latched = false;
        }
        self.entry = entry;
    }

    fn message(&self) -> MsiMessage {
        let entry = self.entry;
        // Address and data format: Intel SDM volume 3, 11.11. Bits 63:48 of the entry are bits 19:4
        // of the address, whatever they mean: the destination's APIC id, or, for a remapping unit,
        // the format bit and the interrupt's index, with bit 11 (VT-d rev 4.1, 5.1.2.1 and 5.1.5.1).
        MsiMessage {
            address: 0xfee0_0000 | entry.into_bits() >> 48 << 4 | u64::from(entry.logical()) << 2,
            data: u32::from(entry.vector())
                | u32::from(entry.delivery_mode()) << 8
                | 1 << 14
                | u32::from(entry.level()) << 15,
        }
    }

    /// Sends what the input and the entry call for.
    fn deliver(&mut self, line: &dyn MsiLine) {
        if self.entry.masked() {
            return;
        }
        // The route is kept up to date even with nothing to send: KVM learns from it which vectors'
        // end it must report. Masked entries are left alone, which saves most route updates.
        let message = self.message();
        if self.target != Some(message) {
            match line.retarget(message) {
                Ok(()) => self.target = Some(message),
                Err(error) => {
                    tracing::warn!(%error, "an IOAPIC pin keeps its old route");
                    return;
                }
            }
        }
        if self.entry.level() {
            if self.asserted && !self.entry.remote_irr() {
                self.entry.set_remote_irr(true);
                line.fire();
            }
        } else if std::mem::take(&mut self.latched) {
            line.fire();
        }
    }
}

#[cfg(test)]
mod tests {
    use std::io;

    use super::*;

    #[derive(Default)]
    struct Recorder {
        target: Mutex<Option<MsiMessage>>,
        fired: Mutex<Vec<MsiMessage>>,
    }

    impl MsiLine for Recorder {
        fn retarget(&self, message: MsiMessage) -> io::Result<()> {
            *self.target.lock().unwrap() = Some(message);
            Ok(())
        }
        fn fire(&self) {
            let target = self.target.lock().unwrap().unwrap();
            self.fired.lock().unwrap().push(target);
        }
    }

    struct Bench {
        chip: IoApic,
        lines: Vec<Arc<Recorder>>,
    }

    impl Bench {
        fn new() -> Bench {
            let lines: Vec<_> = (0..PINS).map(|_| Arc::<Recorder>::default()).collect();
            let chip = IoApic::new(
                lines
                    .iter()
                    .map(|line| Arc::clone(line) as Arc<dyn MsiLine>)
                    .collect(),
            );
            Bench { chip, lines }
        }

        fn set(&self, register: u8, value: u32) {
            self.chip.write(0, &u32::from(register).to_le_bytes());
            self.chip.write(0x10, &value.to_le_bytes());
        }

        fn get(&self, register: u8) -> u32 {
            self.chip.write(0, &u32::from(register).to_le_bytes());
            let mut data = [0; 4];
            self.chip.read(0x10, &mut data);
            u32::from_le_bytes(data)
        }

        fn fired(&self, pin: usize) -> usize {
            self.lines[pin].fired.lock().unwrap().len()
        }
    }

    const MASKED: u32 = 1 << 16;
    const LEVEL: u32 = 1 << 15;
    const REMOTE_IRR: u32 = 1 << 14;

    #[test]
    fn reset_state() {
        let bench = Bench::new();
        assert_eq!(bench.get(1), 0x0017_0020);
        for pin in 0..PINS {
            assert_eq!(bench.get(0x10 + 2 * pin), MASKED);
            assert_eq!(bench.get(0x11 + 2 * pin), 0);
        }
        assert_eq!(bench.get(0x40), 0, "past the last entry");
    }

    #[test]
    fn edge_is_sent_as_msi_to_its_destination() {
        let bench = Bench::new();
        bench.set(0x19, 0x0300_0000);
        bench.set(0x18, 0x0831); // Logical, vector 0x31.
        bench.chip.pulse(4);
        let fired = bench.lines[4].fired.lock().unwrap().clone();
        assert_eq!(
            fired,
            [MsiMessage {
                address: 0xfee0_3004,
                data: 0x4031
            }]
        );
    }

    #[test]
    fn the_remappable_format_goes_out_as_its_index() {
        let bench = Bench::new();
        // Index 0x9234: bit 15 in bit 11 of the low half, the others in bits 31:17 of the high half,
        // with the format bit below them.
        bench.set(0x19, 0x1234 << 17 | 1 << 16);
        bench.set(0x18, 1 << 11 | 4);
        bench.chip.pulse(4);
        let fired = bench.lines[4].fired.lock().unwrap().clone();
        assert_eq!(
            fired,
            [MsiMessage {
                address: 0xfee0_0000 | 0x1234 << 5 | 1 << 4 | 1 << 2,
                data: 0x4004
            }]
        );
    }

    #[test]
    fn edge_while_masked_is_sent_once_at_unmask() {
        let bench = Bench::new();
        bench.set(0x18, MASKED | 0x31);
        bench.chip.pulse(4);
        bench.chip.pulse(4);
        assert_eq!(bench.fired(4), 0);
        bench.set(0x18, 0x31);
        assert_eq!(bench.fired(4), 1);
        bench.set(0x18, 0x31);
        assert_eq!(bench.fired(4), 1);
    }

    #[test]
    fn level_is_sent_again_after_eoi_while_asserted() {
        let bench = Bench::new();
        bench.set(0x20, LEVEL | 0x40);
        bench.chip.set_level(8, true);
        bench.chip.set_level(8, true);
        assert_eq!(bench.fired(8), 1);
        assert_eq!(bench.get(0x20), LEVEL | REMOTE_IRR | 0x40);
        bench.chip.end_of_interrupt(0x41);
        assert_eq!(bench.fired(8), 1, "another vector's end");
        bench.chip.end_of_interrupt(0x40);
        assert_eq!(bench.fired(8), 2);
        bench.chip.set_level(8, false);
        bench.chip.write(0x40, &0x40u32.to_le_bytes());
        assert_eq!(bench.fired(8), 2);
        assert_eq!(bench.get(0x20), LEVEL | 0x40);
    }

    #[test]
    fn level_while_masked_is_sent_at_unmask_only_if_still_asserted() {
        let bench = Bench::new();
        bench.set(0x20, MASKED | LEVEL | 0x40);
        bench.chip.set_level(8, true);
        bench.chip.set_level(8, false);
        bench.set(0x20, LEVEL | 0x40);
        assert_eq!(bench.fired(8), 0);
        bench.set(0x20, MASKED | LEVEL | 0x40);
        bench.chip.set_level(8, true);
        bench.set(0x20, LEVEL | 0x40);
        assert_eq!(bench.fired(8), 1);
    }

    #[test]
    fn read_only_bits_stay_and_edge_mode_clears_remote_irr() {
        let bench = Bench::new();
        bench.set(0x20, MASKED | LEVEL | REMOTE_IRR | 1 << 12 | 0x40);
        assert_eq!(bench.get(0x20), MASKED | LEVEL | 0x40);
        bench.set(0x20, LEVEL | 0x40);
        bench.chip.set_level(8, true);
        bench.set(0x20, MASKED | 0x40);
        bench.set(0x20, MASKED | LEVEL | 0x40);
        assert_eq!(bench.get(0x20), MASKED | LEVEL | 0x40);
    }

    #[test]
    fn a_moved_vector_retargets_before_the_next_interrupt() {
        let bench = Bench::new();
        bench.set(0x18, 0x31);
        bench.chip.pulse(4);
        bench.set(0x18, 0x52);
        bench.chip.pulse(4);
        let fired = bench.lines[4].fired.lock().unwrap().clone();
        assert_eq!(fired[1].data & 0xff, 0x52);
    }

    #[test]
    fn pci_lines_are_pins_16_to_19() {
        let bench = Bench::new();
        for line in 0..4 {
            let pin = usize::from(16 + line);
            bench.set(0x10 + 2 * (16 + line), 1 << 13 | LEVEL | 0x50);
            IntxSink::set_level(&bench.chip, line, true);
            assert_eq!((bench.chip.input(line), bench.fired(pin)), (16 + line, 1));
        }
    }

    #[test]
    fn odd_accesses_do_no_harm() {
        let bench = Bench::new();
        bench.chip.write(0, &[]);
        bench.chip.write(0x10, &[1]);
        bench.chip.write(0xfff, &[0xff; 8]);
        let mut data = [0xaa; 8];
        bench.chip.read(0x3, &mut data);
        assert_eq!(data, [0; 8]);
        bench.chip.set_level(200, true);
    }
}

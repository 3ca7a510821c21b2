//! INTx: the level-triggered interrupts of conventional PCI (PCIe Base 6.0, 6.1.2 and 7.5.1.1).
//!
//! A device drives its pin; the command register, MSI and MSI-X decide whether that reaches one of the
//! root complex's four lines; each line is high while any function drives it. Bus Master Enable does
//! not matter: an INTx is no memory write.
//!
//! Locks, always in this order: the device's own, a pin's, a line's, the sink's.

use std::sync::{Arc, Mutex, MutexGuard, OnceLock, PoisonError};

/// Interrupt pin of a function (7.5.1.1.13).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum InterruptPin {
    /// INTA, which every function without siblings uses.
    A,
    /// INTB.
    B,
    /// INTC.
    C,
    /// INTD.
    D,
}

impl InterruptPin {
    /// What the Interrupt Pin register reads.
    pub(crate) fn register(self) -> u8 {
        self.index() + 1
    }

    fn index(self) -> u8 {
        match self {
            InterruptPin::A => 0,
            InterruptPin::B => 1,
            InterruptPin::C => 2,
            InterruptPin::D => 3,
        }
    }
}

/// Where the root complex's four interrupt lines end: inputs of an interrupt controller.
///
/// A pin of a device on bus 0 is on line `(device + pin) % 4` (INTA is pin 0), as root ports and
/// bridges swizzle them (2.2.8.1). Firmware tables must say the same.
pub trait IntxSink: Send + Sync {
    /// Line `line`, 0 to 3, is now asserted or not. Called on changes only, one at a time for a line.
    /// Must not call into the root complex.
    fn set_level(&self, line: u8, level: bool);

    /// What the Interrupt Line register of functions on `line` tells a guest without firmware
    /// tables: the number of the interrupt controller's input.
    fn input(&self, line: u8) -> u8;
}

/// The lines of a root complex.
pub(crate) struct IntxLines {
    sink: Arc<dyn IntxSink>,
    /// Which functions drive each line, by device and function number.
    drivers: [Mutex<[u64; 4]>; 4],
}

impl IntxLines {
    pub(crate) fn new(sink: Arc<dyn IntxSink>) -> Arc<IntxLines> {
        Arc::new(IntxLines {
            sink,
            drivers: Default::default(),
        })
    }

    fn drive(&self, line: u8, devfn: u8, level: bool) {
        let Some(drivers) = self.drivers.get(usize::from(line)) else {
            return;
        };
        let mut drivers = drivers.lock().unwrap_or_else(PoisonError::into_inner);
        let before = *drivers != [0; 4];
        if let Some(word) = drivers.get_mut(usize::from(devfn / 64)) {
            let bit = 1 << (devfn % 64);
            *word = if level { *word | bit } else { *word & !bit };
        }
        let after = *drivers != [0; 4];
        if before != after {
            self.sink.set_level(line, after);
        }
    }
}

/// The way from a function's pin to its line.
struct Wire {
    lines: Arc<IntxLines>,
    line: u8,
    devfn: u8,
}

#[derive(Default)]
struct State {
    /// The device's level.
    asserted: bool,
    /// Interrupt Disable, or the function is not in D0.
    disabled: bool,
    /// MSI or MSI-X is enabled: the function must not use INTx (6.1.4.3).
    messages: bool,
    driven: bool,
}

/// A function's pin.
pub(crate) struct Intx {
    pin: InterruptPin,
    wire: OnceLock<Wire>,
    state: Mutex<State>,
}

impl Intx {
    pub(crate) fn new(pin: InterruptPin) -> Arc<Intx> {
        Arc::new(Intx {
            pin,
            wire: OnceLock::new(),
            state: Mutex::default(),
        })
    }

    /// Connects the pin of the function at `devfn` on bus 0. Returns what its Interrupt Line register
    /// is to read.
    pub(crate) fn connect(&self, lines: &Arc<IntxLines>, devfn: u8) -> u8 {
        let line = ((devfn >> 3) + self.pin.index()) % 4;
        self.wire.get_or_init(|| Wire {
            lines: Arc::clone(lines),
            line,
            devfn,
        });
        self.update(&mut self.state());
        lines.sink.input(line)
    }

    /// What configuration space says of it.
    pub(crate) fn configure(&self, disabled: bool, messages: bool) {
        let mut state = self.state();
        (state.disabled, state.messages) = (disabled, messages);
        self.update(&mut state);
    }

    /// Back to the state after power-on.
    pub(crate) fn reset(&self) {
        self.set_level(false);
    }

    /// Interrupt Status: an interrupt is pending that INTx would tell of. Interrupt Disable does not
    /// matter.
    pub(crate) fn pending(&self) -> bool {
        let state = self.state();
        state.asserted && !state.messages
    }

    fn set_level(&self, level: bool) {
        let mut state = self.state();
        state.asserted = level;
        self.update(&mut state);
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn update(&self, state: &mut State) {
        let level = state.asserted && !state.disabled && !state.messages;
        if let Some(wire) = self.wire.get()
            && level != state.driven
        {
            state.driven = level;
            wire.lines.drive(wire.line, wire.devfn, level);
        }
    }
}

/// A function's interrupt pin, as its device holds it.
///
/// The device keeps it asserted as long as there is something that the driver has not dealt with, and
/// deasserts it when the driver has. Whether that interrupts the guest is not the device's business:
/// with MSI or MSI-X enabled the level goes nowhere, and comes into force when they are disabled.
#[derive(Clone)]
pub struct IntxPin(pub(crate) Arc<Intx>);

impl IntxPin {
    /// Asserts (`true`) or deasserts the pin. The same level again does nothing.
    pub fn set_level(&self, level: bool) {
        self.0.set_level(level);
    }
}

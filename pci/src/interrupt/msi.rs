//! Plain MSI: a capability with one address, 1 to 32 vectors in the low bits of the data, mask and
//! pending bits (PCIe Base 6.0, 6.1.4 and 7.7.1).

use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use iommu::{BusMaster, MsiMessage};

use super::vector::{Bank, MsiVector};
use crate::spec;

/// What the guest has written to the capability.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct MsiRegisters {
    /// Message Control.
    pub(crate) control: u16,
    /// Message Address with its upper half.
    pub(crate) address: u64,
    /// Message Data.
    pub(crate) data: u16,
    /// Mask Bits.
    pub(crate) mask: u32,
}

impl MsiRegisters {
    /// MSI Enable.
    pub(crate) fn enabled(&self) -> bool {
        self.control & spec::msi::ENABLE != 0
    }

    /// Vectors granted to a function that has `vectors` of them. More than that, and the reserved
    /// encodings, grant them all.
    fn granted(&self, vectors: u16) -> u16 {
        let log2 = (self.control & spec::msi::MULTIPLE_ENABLE) >> spec::msi::MULTIPLE_ENABLE_SHIFT;
        (1 << log2).min(vectors.max(1))
    }

    /// The message of vector `index` of `granted`: the function changes the low bits of the data.
    fn message(&self, index: u16, granted: u16) -> MsiMessage {
        MsiMessage {
            address: self.address,
            data: u32::from((self.data & !(granted - 1)) | index),
        }
    }
}

struct Control {
    registers: MsiRegisters,
    bus_master: bool,
    /// What each vector's line was last told.
    targets: Vec<Option<MsiMessage>>,
}

/// A function's MSI vectors.
///
/// A guest may grant fewer vectors than the function has (Multiple Message Enable, 7.7.1.2). The
/// function must do with those: vector `n` then signals number `n` modulo the number granted, with
/// that one's mask and pending bit. A device with vectors for several causes therefore keeps a
/// register that says which it was.
///
/// While MSI is disabled signals are dropped, for the interrupt is then INTx's to tell; pending bits
/// are clear.
pub struct Msi {
    bank: Arc<Bank>,
    control: Mutex<Control>,
}

impl Msi {
    pub(crate) fn new(vectors: u16, master: &BusMaster) -> Arc<Msi> {
        let bank = Bank::new("MSI", vectors, master);
        bank.grant(1);
        Arc::new(Msi {
            bank,
            control: Mutex::new(Control {
                registers: MsiRegisters::default(),
                bus_master: false,
                targets: vec![None; usize::from(vectors)],
            }),
        })
    }

    /// Number of vectors; 0 for a function without MSI.
    pub fn vectors(&self) -> u16 {
        self.bank.len()
    }

    /// The handle of vector `index`, or `None` if there is no such vector.
    pub fn vector(&self, index: u16) -> Option<MsiVector> {
        self.bank.vector(index)
    }

    /// The guest has changed the registers.
    pub(crate) fn set_registers(&self, registers: MsiRegisters) {
        let mut control = self.lock();
        let was = std::mem::replace(&mut control.registers, registers);
        if registers.enabled() && !was.enabled() {
            // What came while MSI was disabled.
            self.bank.forget();
        }
        self.settle(&mut control);
    }

    /// Bus Master Enable changed. After `false` no message leaves the function.
    pub(crate) fn set_bus_master(&self, on: bool) {
        let mut control = self.lock();
        control.bus_master = on;
        self.settle(&mut control);
    }

    /// Back to the state after power-on; nothing is pending.
    pub(crate) fn reset(&self) {
        self.set_registers(MsiRegisters::default());
        self.bank.forget();
    }

    /// The Pending Bits register.
    pub(crate) fn pending(&self) -> u32 {
        let enabled = self.lock().registers.enabled();
        (0..u32::from(self.vectors()))
            .filter(|&index| enabled && self.bank.pending(usize::try_from(index).unwrap_or(0)))
            .fold(0, |bits, index| bits | 1 << index)
    }

    fn lock(&self) -> MutexGuard<'_, Control> {
        self.control.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn settle(&self, control: &mut Control) {
        let registers = control.registers;
        let granted = registers.granted(self.vectors());
        self.bank.grant(granted.into());
        let open = registers.enabled() && control.bus_master;
        for (index, target) in (0..).zip(&mut control.targets) {
            let unmasked = index < granted && registers.mask & (1 << index) == 0;
            let wanted = (open && unmasked).then(|| registers.message(index, granted));
            self.bank.settle(index.into(), target, wanted);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_low_bits_of_the_data_are_the_vector() {
        let registers = |enable: u16| MsiRegisters {
            control: enable << spec::msi::MULTIPLE_ENABLE_SHIFT,
            address: 0xfee0_1000,
            data: 0x4035,
            mask: 0,
        };
        for (enable, vectors, granted) in [(0, 8, 1), (2, 8, 4), (3, 8, 8), (5, 8, 8), (7, 32, 32)]
        {
            assert_eq!(registers(enable).granted(vectors), granted);
        }
        assert_eq!(registers(0).message(0, 1).data, 0x4035);
        assert_eq!(registers(2).message(3, 4).data, 0x4037);
        assert_eq!(registers(2).message(0, 4).data, 0x4034);
    }
}

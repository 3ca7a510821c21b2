//! MSI-X: the vector table and the pending bits (PCIe Base 6.0, 6.1.4 and 7.7.2).
//!
//! Changes of the table and of the control bits run under one mutex: they block the gate, make the
//! line ready (open it, retarget it) and unblock it. So a mask is exact, and a line is never retargeted
//! under a thread that fires it.

use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use iommu::{BusMaster, MsiMessage};

use super::vector::{Bank, MsiVector};
use crate::spec::msix::{ENTRY_LEN, ENTRY_MASK};

/// A table entry, and what its line was last told.
#[derive(Clone, Copy)]
struct Entry {
    message: MsiMessage,
    masked: bool,
    target: Option<MsiMessage>,
}

impl Entry {
    /// After reset: masked (7.7.2.8).
    const RESET: Entry = Entry {
        message: MsiMessage {
            address: 0,
            data: 0,
        },
        masked: true,
        target: None,
    };
}

struct Control {
    enable: bool,
    function_mask: bool,
    bus_master: bool,
    table: Vec<Entry>,
}

impl Control {
    fn open(&self) -> bool {
        self.enable && !self.function_mask && self.bus_master
    }
}

/// A function's MSI-X vectors.
///
/// The host's interrupt lines are opened when vectors may fire for the first time. When the host
/// refuses one, the vector stays pending, and the host is asked again at the guest's next write to the
/// entry or change of a control bit.
pub struct Msix {
    bank: Arc<Bank>,
    control: Mutex<Control>,
}

impl Msix {
    pub(crate) fn new(vectors: u16, master: &BusMaster) -> Arc<Msix> {
        Arc::new(Msix {
            bank: Bank::new("MSI-X", vectors, master),
            control: Mutex::new(Control {
                enable: false,
                function_mask: false,
                bus_master: false,
                table: vec![Entry::RESET; usize::from(vectors)],
            }),
        })
    }

    /// Number of vectors; 0 for a function without MSI-X.
    pub fn vectors(&self) -> u16 {
        self.bank.len()
    }

    /// The handle of vector `index`, or `None` if there is no such vector.
    pub fn vector(&self, index: u16) -> Option<MsiVector> {
        self.bank.vector(index)
    }

    /// MSI-X Enable and Function Mask were written.
    pub(crate) fn set_control(&self, enable: bool, function_mask: bool) {
        let mut control = self.lock();
        (control.enable, control.function_mask) = (enable, function_mask);
        self.settle_all(&mut control);
    }

    /// Bus Master Enable changed. After `false` no message leaves the function.
    pub(crate) fn set_bus_master(&self, on: bool) {
        let mut control = self.lock();
        control.bus_master = on;
        self.settle_all(&mut control);
    }

    /// Back to the state after power-on; nothing is pending.
    pub(crate) fn reset(&self) {
        let mut control = self.lock();
        (control.enable, control.function_mask) = (false, false);
        for entry in &mut control.table {
            *entry = Entry {
                target: entry.target,
                ..Entry::RESET
            };
        }
        self.settle_all(&mut control);
        self.bank.forget();
    }

    /// Reads the table; `offset` counts from its start.
    pub(crate) fn table_read(&self, offset: u64, data: &mut [u8]) {
        let control = self.lock();
        for (byte, at) in data.iter_mut().zip(offset..) {
            let (index, dword, lane) = locate(at);
            *byte = control
                .table
                .get(index)
                .map_or(0, |entry| entry.dword(dword).to_le_bytes()[lane]);
        }
    }

    /// Writes the table. An access wider than a dword changes its dwords together.
    pub(crate) fn table_write(&self, offset: u64, data: &[u8]) {
        let mut control = self.lock();
        for (&value, at) in data.iter().zip(offset..) {
            let (index, dword, lane) = locate(at);
            if let Some(entry) = control.table.get_mut(index) {
                let mut bytes = entry.dword(dword).to_le_bytes();
                bytes[lane] = value;
                entry.set_dword(dword, u32::from_le_bytes(bytes));
            }
        }
        let Some(last) = u64::try_from(data.len())
            .ok()
            .and_then(|len| offset.checked_add(len.checked_sub(1)?))
        else {
            return;
        };
        for index in locate(offset).0..=locate(last).0 {
            self.settle(&mut control, index);
        }
    }

    /// Reads the pending bit array; `offset` counts from its start.
    pub(crate) fn pba_read(&self, offset: u64, data: &mut [u8]) {
        for (byte, at) in data.iter_mut().zip(offset..) {
            let first = usize::try_from(at).unwrap_or(usize::MAX).saturating_mul(8);
            *byte = (0..8).fold(0, |bits, i| {
                bits | (u8::from(self.bank.pending(first.saturating_add(i))) << i)
            });
        }
    }

    fn lock(&self) -> MutexGuard<'_, Control> {
        self.control.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn settle_all(&self, control: &mut Control) {
        for index in 0..control.table.len() {
            self.settle(control, index);
        }
    }

    /// Brings a vector in line with its entry and the control bits.
    fn settle(&self, control: &mut Control, index: usize) {
        let open = control.open();
        if let Some(entry) = control.table.get_mut(index) {
            let wanted = (open && !entry.masked).then_some(entry.message);
            self.bank.settle(index, &mut entry.target, wanted);
        }
    }
}

impl Entry {
    fn dword(&self, dword: u64) -> u32 {
        let address = self.message.address.to_le_bytes();
        let [a, b, c, d, e, f, g, h] = address;
        match dword {
            0 => u32::from_le_bytes([a, b, c, d]),
            1 => u32::from_le_bytes([e, f, g, h]),
            2 => self.message.data,
            _ => u32::from(self.masked),
        }
    }

    fn set_dword(&mut self, dword: u64, value: u32) {
        let address = &mut self.message.address;
        match dword {
            // Bits 1:0 must be written as 0 (7.7.2.5); they are kept so.
            0 => *address = (*address & !0xffff_ffff) | u64::from(value & !3),
            1 => *address = (*address & 0xffff_ffff) | (u64::from(value) << 32),
            2 => self.message.data = value,
            _ => self.masked = value & ENTRY_MASK != 0,
        }
    }
}

/// Entry, dword in it and byte in that, of an offset in the table.
fn locate(offset: u64) -> (usize, u64, usize) {
    let entry = usize::try_from(offset / ENTRY_LEN).unwrap_or(usize::MAX);
    let lane = match offset % 4 {
        0 => 0,
        1 => 1,
        2 => 2,
        _ => 3,
    };
    (entry, offset % ENTRY_LEN / 4, lane)
}

//! MSI-X: the vector table, the pending bits, and firing (PCIe Base 6.0, 6.1.4 and 7.7.2).
//!
//! Signalling goes through each vector's `Gate` and takes no lock. Changes of the table and of the
//! control bits run under one mutex: they block the gate, make the line ready (open it, retarget it)
//! and unblock it. So a mask is exact, and a line is never retargeted under a thread that fires it.

mod gate;

use std::sync::{Arc, Mutex, MutexGuard, OnceLock, PoisonError};

use iommu::{BusMaster, MsiLine, MsiMessage};

use crate::log::LogLimit;
use crate::spec::msix::{ENTRY_LEN, ENTRY_MASK};
use gate::Gate;

/// What the gate is made of; loom's in its tests.
mod sync {
    pub(super) use std::sync::atomic::{AtomicU32, Ordering};
    pub(super) use std::thread::yield_now;
}

/// On a cache line of its own: each belongs to another queue's worker.
#[repr(align(64))]
struct Vector {
    gate: Gate,
    /// Set before the gate is unblocked for the first time.
    line: OnceLock<Arc<dyn MsiLine>>,
}

impl Vector {
    fn fire(&self) {
        if let Some(line) = self.line.get() {
            line.fire();
        }
    }
}

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
/// A line of the [`MsiSink`](iommu::MsiSink) is opened when a vector may fire for the first time,
/// so that vectors which the guest never uses cost the host nothing, and is kept from then on. It is
/// retargeted only when the vector may fire with a message other than before: a guest that masks,
/// rewrites and unmasks an entry costs one change of route.
///
/// When the host refuses a line or a route, the vector stays blocked and pending, and the host is
/// asked again at the guest's next write to the entry or change of a control bit.
pub struct Msix {
    master: BusMaster,
    vectors: Box<[Vector]>,
    control: Mutex<Control>,
    refused: LogLimit,
}

impl Msix {
    pub(crate) fn new(vectors: u16, master: &BusMaster) -> Arc<Msix> {
        let vector = |_| Vector {
            gate: Gate::new(),
            line: OnceLock::new(),
        };
        Arc::new(Msix {
            master: master.clone(),
            vectors: (0..vectors).map(vector).collect(),
            control: Mutex::new(Control {
                enable: false,
                function_mask: false,
                bus_master: false,
                table: vec![Entry::RESET; usize::from(vectors)],
            }),
            refused: LogLimit::default(),
        })
    }

    /// Number of vectors; 0 for a function without MSI-X.
    pub fn vectors(&self) -> u16 {
        u16::try_from(self.vectors.len()).unwrap_or(u16::MAX)
    }

    /// The handle of vector `index`, or `None` if there is no such vector.
    pub fn vector(self: &Arc<Self>, index: u16) -> Option<MsixVector> {
        (index < self.vectors()).then(|| MsixVector {
            msix: Arc::clone(self),
            index: usize::from(index),
        })
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
        for (vector, entry) in self.vectors.iter().zip(&mut control.table) {
            vector.gate.block();
            vector.gate.forget();
            *entry = Entry {
                target: entry.target,
                ..Entry::RESET
            };
        }
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
                let vector = self.vectors.get(first.saturating_add(i));
                bits | (u8::from(vector.is_some_and(|v| v.gate.pending())) << i)
            });
        }
    }

    fn lock(&self) -> MutexGuard<'_, Control> {
        self.control.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn settle_all(&self, control: &mut Control) {
        for index in 0..self.vectors.len() {
            self.settle(control, index);
        }
    }

    /// Brings a vector in line with its entry and the control bits.
    fn settle(&self, control: &mut Control, index: usize) {
        let open = control.open();
        let (Some(vector), Some(entry)) = (self.vectors.get(index), control.table.get_mut(index))
        else {
            return;
        };
        let wanted = open && !entry.masked;
        let blocked = vector.gate.blocked();
        if !blocked && (!wanted || entry.target != Some(entry.message)) {
            vector.gate.block();
        }
        if wanted && vector.gate.blocked() && self.make_ready(vector, entry, index) {
            vector.gate.unblock(|| vector.fire());
        }
    }

    /// Opens and retargets the line of a blocked vector. False when the host refuses.
    fn make_ready(&self, vector: &Vector, entry: &mut Entry, index: usize) -> bool {
        if entry.target == Some(entry.message) {
            return true;
        }
        let line = match vector.line.get() {
            Some(line) => Ok(Arc::clone(line)),
            None => self.master.msi.open(self.master.source),
        };
        let ready = line.and_then(|line| {
            line.retarget(entry.message)?;
            Ok(vector.line.get_or_init(|| line))
        });
        match ready {
            Ok(_) => {
                entry.target = Some(entry.message);
                true
            }
            Err(error) => {
                if let Some(count) = self.refused.pass() {
                    let bdf = iommu::Bdf::from_requester_id(self.master.source.0);
                    tracing::warn!(
                        "{bdf}: the host refuses MSI-X vector {index} ({error}); {count} so far"
                    );
                }
                false
            }
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

/// One interrupt vector, as its device holds it.
#[derive(Clone)]
pub struct MsixVector {
    msix: Arc<Msix>,
    index: usize,
}

impl MsixVector {
    /// Raises the interrupt; memory that the caller wrote before is visible to the guest's handler.
    ///
    /// Costs one compare-and-swap, one [`MsiLine::fire`] and one decrement; takes no lock. While the
    /// vector is masked or MSI-X is disabled it sets the pending bit instead, and the guest's unmask
    /// fires it once. With Bus Master Enable clear the function may not send messages: the interrupt
    /// is then held pending too, not lost, and fires when bus mastering comes back.
    pub fn signal(&self) {
        if let Some(vector) = self.msix.vectors.get(self.index) {
            vector.gate.signal(|| vector.fire());
        }
    }

    /// Number of the vector.
    pub fn index(&self) -> u16 {
        u16::try_from(self.index).unwrap_or(u16::MAX)
    }
}

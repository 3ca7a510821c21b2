//! A record of what the guest's driver does with the remapping unit, for people and for replay.
//!
//! One access a line, numbers in hexadecimal without prefix; a `#` starts a comment:
//!
//! ```text
//! w OFFSET BYTES VALUE        a register is written
//! r OFFSET BYTES VALUE        a register is read, and has VALUE
//! m ADDRESS BYTES VALUE       part of a descriptor that the driver has put into the queue
//! s ADDRESS BYTES VALUE       what a wait descriptor asks the unit to write
//! ```
//!
//! Descriptors come before the write to the queue's tail that hands them over, status writes after it.

use std::fs::File;
use std::io::{self, BufWriter, Write};
use std::path::Path;
use std::sync::{Arc, Mutex, PoisonError};

use iommu::GuestRam;
use iommu::vtd::Unit;
use vm_memory::{Bytes, GuestAddress};

/// Offset of the Invalidation Queue Tail register (VT-d rev 4.1, 11.4.9.2).
const IQT: u64 = 0x88;
/// Offset of the Invalidation Queue Address register (11.4.9.3).
const IQA: u64 = 0x90;
/// IQA: descriptors have 256 bits.
const IQA_WIDE: u64 = 1 << 11;
/// Type and flags of a wait descriptor that writes its status (6.5.2.8): type 5 in bits 3:0, with
/// bits 11:9, which extend it, clear; SW in bit 5.
const WAIT_MASK: u64 = 0xe2f;
const WAIT_STATUS: u64 = 0x025;

/// A record in a file. It outlives the guest's reboots, which are comments in it.
pub(super) struct RegisterTrace(Mutex<State>);

struct State {
    file: BufWriter<File>,
    /// Tail of the queue as last written.
    tail: u64,
}

impl RegisterTrace {
    pub(super) fn create(path: &Path) -> io::Result<Arc<RegisterTrace>> {
        let file = BufWriter::new(File::create(path)?);
        Ok(Arc::new(RegisterTrace(Mutex::new(State { file, tail: 0 }))))
    }

    /// Does `f` and writes out what it adds, so that the record is whole when the process is killed.
    /// A full disk is no reason to stop the guest: what cannot be written is left out.
    fn with(&self, f: impl FnOnce(&mut State) -> io::Result<()>) {
        let mut state = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        let _ = f(&mut state);
        let _ = state.file.flush();
    }

    pub(super) fn reset(&self) {
        self.with(|state| {
            state.tail = 0;
            writeln!(state.file, "# machine reset")
        });
    }

    pub(super) fn read(&self, offset: u64, data: &[u8]) {
        self.with(|state| state.line('r', offset, data));
    }

    /// Writes `data` to the unit and records it.
    pub(super) fn write(&self, unit: &Unit, ram: &GuestRam, offset: u64, data: &[u8]) {
        let tail = (offset == IQT).then(|| number(data));
        self.with(|state| match tail {
            Some(tail) => state.tail(unit, ram, tail, data),
            None => {
                // Setting up the queue clears its tail.
                if offset == IQA {
                    state.tail = 0;
                }
                state.line('w', offset, data)
            }
        });
        unit.write(offset, data);
    }
}

impl State {
    fn line(&mut self, kind: char, at: u64, data: &[u8]) -> io::Result<()> {
        let (len, value) = (data.len(), number(data));
        writeln!(self.file, "{kind} {at:02x} {len:x} {value:x}")
    }

    /// A write to the tail, with the descriptors that it hands over.
    fn tail(&mut self, unit: &Unit, ram: &GuestRam, tail: u64, data: &[u8]) -> io::Result<()> {
        let mut queue = [0; 8];
        unit.read(IQA, &mut queue);
        let queue = u64::from_le_bytes(queue);
        let step: u64 = if queue & IQA_WIDE != 0 { 32 } else { 16 };
        let size = 0x1000u64 << (queue & 7);
        let mut at = self.tail & !(step - 1);
        let end = tail & !(step - 1);
        let mut statuses = Vec::new();
        // A tail outside the queue is the guest's error, which the unit reports.
        while at < size && end < size && at != end {
            let address = (queue & !0xfff).saturating_add(at);
            // Outside memory there is no descriptor.
            let word = |index: u64| {
                let mut word = [0; 8];
                let place = address.checked_add(8 * index)?;
                ram.read_slice(&mut word, GuestAddress(place)).ok()?;
                Some((place, word))
            };
            for (place, word) in (0..step / 8).filter_map(word) {
                self.line('m', place, &word)?;
            }
            if let (Some((_, low)), Some((_, high))) = (word(0), word(1))
                && u64::from_le_bytes(low) & WAIT_MASK == WAIT_STATUS
            {
                let [.., a, b, c, d] = low;
                statuses.push((u64::from_le_bytes(high) & !3, [a, b, c, d]));
            }
            at = (at + step) % size;
        }
        self.tail = end;
        self.line('w', IQT, data)?;
        for (address, status) in statuses {
            self.line('s', address, &status)?;
        }
        Ok(())
    }
}

fn number(data: &[u8]) -> u64 {
    let mut bytes = [0; 8];
    for (to, from) in bytes.iter_mut().zip(data) {
        *to = *from;
    }
    u64::from_le_bytes(bytes)
}

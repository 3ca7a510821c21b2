//! The registers of the unit (section 11.4), as far as they are no business of another file.

use std::sync::atomic::Ordering;
use std::sync::{MutexGuard, PoisonError};

use super::descriptor::{contexts, half, translations};
use super::drain::{Drain, Pending};
use super::event;
use super::fault::halves;
use super::spec::capability::{FAULT_RECORDING_REGISTERS, IOTLB_REGISTERS};
use super::spec::registers::{self as reg, ccmd, global, granularity, iotlb, irta};
use super::spec::tables::rtaddr;
use super::unit::{ENABLED, Shared};
use super::walk::Mode;
use crate::{Invalidation, SourceId};

/// Version 1.0 and, with scalable mode, 4.0 (11.4.1).
const VERSION: [u32; 2] = [0x10, 0x40];

/// Registers, and commands that are under way.
#[derive(Default)]
pub(super) struct Registers {
    rtaddr: u64,
    irta: u64,
    ccmd: u64,
    iva: u64,
    iotlb: u64,
    /// Global Status when all commands are done.
    status: u32,
    /// What must be done before Global Status shows Translation Enable as it was last written.
    pub(super) enabling: Pending,
    /// What must be done before CCMD's ICC clears.
    contexts: Pending,
    /// What must be done before IOTLB's IVT clears.
    translations: Pending,
}

impl Shared {
    /// Any size and alignment. Where no register is, zeros. Of each double word all bytes are of one
    /// moment, and the upper one of a register of eight bytes is read first: while it says that a fault
    /// record is valid, the lower one does not change.
    pub(super) fn read_bytes(&self, offset: u64, data: &mut [u8]) {
        let (mut at, mut rest) = (Some(offset), data);
        while !rest.is_empty() {
            let skip = at.map_or(0, |at| usize::try_from(at % 8).unwrap_or(0));
            let (part, more) = rest.split_at_mut((8 - skip).min(rest.len()));
            match at {
                Some(at) => self.read_pair(at, part),
                None => part.fill(0),
            }
            at = at.and_then(|at| (at & !7).checked_add(8));
            rest = more;
        }
    }

    /// Reads bytes that lie in one aligned range of eight.
    fn read_pair(&self, offset: u64, data: &mut [u8]) {
        let pair = offset & !7;
        let skip = usize::try_from(offset - pair).unwrap_or(0);
        let mut bytes = [0; 8];
        let (low, high) = bytes.split_at_mut(4);
        if skip + data.len() > 4 {
            high.copy_from_slice(&self.read(pair + 4).to_le_bytes());
        }
        if skip < 4 {
            low.copy_from_slice(&self.read(pair).to_le_bytes());
        }
        for (to, from) in data.iter_mut().zip(bytes.into_iter().skip(skip)) {
            *to = from;
        }
    }

    /// Aligned, four or eight bytes.
    pub(super) fn write_bytes(&self, offset: u64, data: &[u8]) {
        if let Ok(bytes) = <[u8; 4]>::try_from(data)
            && offset.is_multiple_of(4)
        {
            self.write(offset, u32::from_le_bytes(bytes));
        } else if let Ok(bytes) = <[u8; 8]>::try_from(data)
            && offset.is_multiple_of(8)
        {
            // The upper half last: it is the one that starts an invalidation.
            let [low, high] = halves(u64::from_le_bytes(bytes));
            self.write(offset, low);
            self.write(offset + 4, high);
        }
    }

    pub(super) fn registers(&self) -> MutexGuard<'_, Registers> {
        self.registers
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
    }

    /// Address bits that exist.
    fn host_addresses(&self) -> u64 {
        let width = u32::from(self.options.host_address_width).min(63);
        (1 << width) - 1
    }

    /// Where a fault recording register's double word at `offset` is, from the first.
    fn record_offset(&self, offset: u64) -> Option<u64> {
        let length = u64::from(self.options.fault_records()) * reg::FRCD_LEN;
        offset
            .checked_sub(FAULT_RECORDING_REGISTERS)
            .filter(|&at| at < length)
    }

    /// Reads the double word at `offset`, a multiple of four.
    fn read(&self, offset: u64) -> u32 {
        let part = |value: u64| halves(value)[usize::from(offset & 4 != 0)];
        match offset & !7 {
            reg::CAP => return part(self.options.capability()),
            reg::ECAP => return part(self.options.extended_capability()),
            reg::RTADDR => return part(self.registers().rtaddr),
            reg::CCMD => return part(self.registers().ccmd(&*self.drain)),
            reg::IQH => return part(self.queue.head()),
            reg::IQT => return part(self.queue.tail()),
            reg::IQA => return part(self.queue.address()),
            reg::IQERCD => return part(u64::from(self.faults.queue_error_info())),
            reg::IRTA => return part(self.registers().irta),
            IOTLB => return part(self.registers().iotlb(&*self.drain)),
            _ => {}
        }
        match offset {
            reg::VER => VERSION[usize::from(self.options.scalable)],
            reg::GSTS => self.registers().status(&*self.drain),
            reg::FSTS => self.faults.status(),
            reg::ICS => self.queue.parts().completion.status(),
            _ => {
                if let Some(at) = event_offset(reg::FECTL, offset) {
                    self.faults.read_event(at)
                } else if let Some(at) = event_offset(reg::IECTL, offset) {
                    self.queue.parts().completion.read_event(at)
                } else if let Some(at) = self.record_offset(offset) {
                    self.faults.read_record(at)
                } else {
                    // GCMD and IVA are write-only and read as zero too.
                    0
                }
            }
        }
    }

    /// Writes the double word at `offset`, a multiple of four.
    fn write(&self, offset: u64, value: u32) {
        match offset & !7 {
            reg::RTADDR => {
                let writable = (rtaddr::TTM_MASK << rtaddr::TTM_SHIFT) | reg::queue::BASE;
                let mut registers = self.registers();
                registers.rtaddr =
                    merge(registers.rtaddr, offset, value) & writable & self.host_addresses();
                return;
            }
            reg::CCMD => return self.write_ccmd(offset, value),
            reg::IQT => {
                if offset & 4 == 0 {
                    self.queue.set_tail(value.into());
                }
                return;
            }
            reg::IQA => {
                let address = merge(self.queue.address(), offset, value);
                return self.queue.set_address(address & self.host_addresses());
            }
            reg::IRTA => {
                if self.options.interrupt_remapping {
                    let mut writable = irta::TABLE | irta::SIZE;
                    if self.options.extended_interrupt_mode {
                        writable |= irta::EIME;
                    }
                    let mut registers = self.registers();
                    registers.irta =
                        merge(registers.irta, offset, value) & writable & self.host_addresses();
                }
                return;
            }
            IVA => {
                let mut registers = self.registers();
                registers.iva = merge(registers.iva, offset, value);
                return;
            }
            IOTLB => return self.write_iotlb(offset, value),
            _ => {}
        }
        match offset {
            reg::GCMD => self.command(value),
            reg::FSTS => {
                self.faults.clear_status(value);
                self.queue.kick();
            }
            reg::ICS => self.queue.parts().completion.clear_status(value),
            _ => {
                if let Some(at) = event_offset(reg::FECTL, offset) {
                    self.faults.write_event(at, value);
                } else if let Some(at) = event_offset(reg::IECTL, offset) {
                    self.queue.parts().completion.write_event(at, value);
                } else if let Some(at) = self.record_offset(offset) {
                    self.faults.write_record(at, value);
                }
            }
        }
    }

    /// A write to Global Command (11.4.4.1).
    fn command(&self, value: u32) {
        let mut registers = self.registers();
        let changed = (value ^ registers.status) & global::LASTING;
        let on = |bit| value & bit != 0;
        if on(global::SRTP) {
            let enabled = self.root.load(Ordering::SeqCst) & ENABLED;
            self.root
                .store(registers.rtaddr | enabled, Ordering::SeqCst);
            registers.status |= global::SRTP;
        }
        if changed & global::TE != 0 {
            if on(global::TE) {
                self.root.fetch_or(ENABLED, Ordering::SeqCst);
            } else {
                self.root.fetch_and(!ENABLED, Ordering::SeqCst);
            }
            registers.status ^= global::TE;
            // Requests in flight are done before the status shows the change.
            registers
                .enabling
                .publish(&*self.drain, Invalidation::Everything);
        }
        if changed & global::QIE != 0 {
            registers.status ^= global::QIE;
            self.queue.enable(on(global::QIE));
        }
        if self.options.interrupt_remapping {
            let mut table = self.interrupts.table();
            if on(global::SIRTP) {
                table = table.latch(registers.irta);
                registers.status |= global::SIRTP;
            }
            registers.status ^= changed & (global::IRE | global::CFI);
            table = table
                .enable(registers.status & global::IRE != 0)
                .compatibility(registers.status & global::CFI != 0);
            self.interrupts.set_table(table);
        }
        if registers.status & (global::TE | global::IRE) == 0 {
            self.faults.restart();
        }
    }

    /// Register-based invalidation is for legacy mode without queue; hardware says of other requests
    /// that they were wrong and ignored (6.5.1).
    fn by_register(&self) -> bool {
        self.latched_root().mode == Mode::Legacy && !self.queue.enabled()
    }

    fn write_ccmd(&self, offset: u64, value: u32) {
        let mut registers = self.registers();
        let old = registers.ccmd;
        let new = merge(old, offset, value) & ccmd::WRITABLE;
        registers.ccmd = new & !ccmd::ICC | old & (ccmd::CAIG | ccmd::ICC);
        if offset & 4 == 0 || new & ccmd::ICC == 0 {
            return;
        }
        let wanted = new >> ccmd::CIRG_SHIFT & 0b11;
        let source = SourceId(half(new, ccmd::SID_SHIFT));
        let what = contexts(wanted, half(new, 0), source, new >> ccmd::FM_SHIFT);
        let actual = match what.filter(|_| self.by_register()) {
            Some(what) => {
                self.invalidations.context(what);
                registers.contexts.publish(&*self.drain, what);
                wanted
            }
            None => granularity::RESERVED,
        };
        registers.ccmd = new | ccmd::ICC | actual << ccmd::CAIG_SHIFT;
    }

    fn write_iotlb(&self, offset: u64, value: u32) {
        let mut registers = self.registers();
        let old = registers.iotlb;
        let new = merge(old, offset, value) & iotlb::WRITABLE;
        registers.iotlb = new & !iotlb::IVT | old & (iotlb::IAIG | iotlb::IVT);
        if offset & 4 == 0 || new & iotlb::IVT == 0 {
            return;
        }
        let wanted = new >> iotlb::IIRG_SHIFT & 0b11;
        let what = translations(wanted, half(new, iotlb::DID_SHIFT), registers.iva);
        let actual = match what.filter(|_| self.by_register()) {
            Some(what) => {
                self.invalidations.iotlb(what);
                registers.translations.publish(&*self.drain, what);
                wanted
            }
            None => granularity::RESERVED,
        };
        registers.iotlb = new | actual << iotlb::IAIG_SHIFT;
    }
}

/// Offset of the Invalidate Address register.
const IVA: u64 = IOTLB_REGISTERS + reg::IVA;
/// Offset of the IOTLB Invalidate register.
const IOTLB: u64 = IOTLB_REGISTERS + reg::IOTLB;

/// Where in a set of event registers `offset` is, from the control register.
fn event_offset(control: u64, offset: u64) -> Option<u64> {
    offset
        .checked_sub(control)
        .filter(|&at| at < event::REGISTERS)
}

/// A 64-bit register after a write to the half that `offset` is in.
fn merge(register: u64, offset: u64, value: u32) -> u64 {
    let [low, high] = halves(register).map(u64::from);
    let value = u64::from(value);
    if offset & 4 == 0 {
        high << 32 | value
    } else {
        value << 32 | low
    }
}

impl Registers {
    /// Global Status.
    fn status(&mut self, drain: &dyn Drain) -> u32 {
        if self.enabling.drained(drain) {
            self.status
        } else {
            self.status ^ global::TE
        }
    }

    /// CCMD.
    fn ccmd(&mut self, drain: &dyn Drain) -> u64 {
        if self.contexts.drained(drain) {
            self.ccmd &= !ccmd::ICC;
        }
        self.ccmd
    }

    /// The IOTLB Invalidate register.
    fn iotlb(&mut self, drain: &dyn Drain) -> u64 {
        if self.translations.drained(drain) {
            self.iotlb &= !iotlb::IVT;
        }
        self.iotlb
    }
}

//! The unit's own interrupts: fault events and invalidation completion events (sections 5.1.6, 7.2).

use std::io;
use std::sync::Arc;
use std::time::Instant;

use super::limit::Limit;
use super::spec::registers::event::{ADDR, DATA, IM, IP};
use crate::{MsiLine, MsiMessage, MsiSink, SourceId};

/// One of the four event registers, counted from the control register.
pub(super) const REGISTERS: u64 = 0x10;

/// Requester id that the unit's own messages carry. They are not remapped (5.1.6), so nothing looks
/// at it.
const SOURCE: SourceId = SourceId(0);

/// Control, data, address and upper address register of an event, and the line that it goes out on.
pub(super) struct Event {
    line: Arc<dyn MsiLine>,
    route: Option<MsiMessage>,
    upper: bool,
    masked: bool,
    pending: bool,
    data: u32,
    address: u32,
    upper_address: u32,
    log: Limit,
}

impl Event {
    /// As after reset: masked. The upper address register exists if `upper` is set.
    pub(super) fn new(sink: &dyn MsiSink, upper: bool) -> io::Result<Event> {
        Ok(Event {
            line: sink.open(SOURCE)?,
            route: None,
            upper,
            masked: true,
            pending: false,
            data: 0,
            address: 0,
            upper_address: 0,
            log: Limit::default(),
        })
    }

    pub(super) fn reset(&mut self) {
        (self.masked, self.pending) = (true, false);
        (self.data, self.address, self.upper_address) = (0, 0, 0);
    }

    /// Reads the register at `offset` from the control register.
    pub(super) fn read(&self, offset: u64) -> u32 {
        match offset {
            0x0 => (u32::from(self.masked) * IM) | (u32::from(self.pending) * IP),
            0x4 => self.data,
            0x8 => self.address,
            0xc => self.upper_address,
            _ => 0,
        }
    }

    /// Writes the register at `offset` from the control register.
    pub(super) fn write(&mut self, offset: u64, value: u32) {
        match offset {
            0x0 => {
                self.masked = value & IM != 0;
                if self.pending {
                    self.send();
                }
            }
            0x4 => self.data = value & DATA,
            0x8 => self.address = value & ADDR,
            0xc if self.upper => self.upper_address = value,
            _ => {}
        }
    }

    /// The interrupt condition has come up.
    pub(super) fn raise(&mut self) {
        self.pending = true;
        self.send();
    }

    /// Software has serviced the condition.
    pub(super) fn serviced(&mut self) {
        self.pending = false;
    }

    /// Sends the message if it is not masked. If the host refuses the route it stays pending, as for
    /// "other transient hardware conditions" (11.4.7.2), until software writes the mask again.
    fn send(&mut self) {
        if self.masked {
            return;
        }
        let message = MsiMessage {
            address: u64::from(self.upper_address) << 32 | u64::from(self.address),
            data: self.data,
        };
        if self.route != Some(message) {
            if let Err(error) = self.line.retarget(message) {
                if let Some(dropped) = self.log.allow(Instant::now()) {
                    tracing::warn!(dropped, %error, "VT-d: no route for the unit's own interrupt");
                }
                return;
            }
            self.route = Some(message);
        }
        self.pending = false;
        self.line.fire();
    }
}

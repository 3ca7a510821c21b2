//! Primary fault recording (section 7.2) and the fault event.

use std::io;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::Instant;

use super::event::Event;
use super::limit::Limit;
use super::spec::registers::{FRCD_LEN, frcd, fsts, iqei};
use crate::{Access, Bdf, FaultReason, MsiSink, SourceId};

/// A fault as it is recorded.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Fault {
    pub(super) source: SourceId,
    pub(super) reason: FaultReason,
    pub(super) what: What,
}

/// What was blocked.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum What {
    /// A memory access at this input address.
    Dma { address: u64, access: Access },
    /// An interrupt request with this index.
    Interrupt { index: u16 },
}

impl Fault {
    fn words(&self) -> [u64; 2] {
        let (info, kind) = match self.what {
            What::Dma { address, access } => (
                address & frcd::FI,
                match access {
                    Access::Read => frcd::T1,
                    Access::Write => 0,
                },
            ),
            What::Interrupt { index } => (u64::from(index) << frcd::FI_INDEX_SHIFT, 0),
        };
        let high =
            frcd::F | kind | u64::from(self.reason.0) << frcd::FR_SHIFT | u64::from(self.source.0);
        [info, high]
    }
}

/// Fault Status, Fault Recording and fault event registers, and IQERCD.
pub(super) struct Faults {
    state: Mutex<State>,
    /// IQE is set: the queue stands still. A copy for those who do not hold the lock.
    queue_error: AtomicBool,
    recorded: AtomicU64,
    lost: AtomicU64,
    queue_errors: AtomicU64,
}

struct State {
    records: Vec<[u64; 2]>,
    /// Where the next fault goes.
    next: usize,
    /// Index of the first pending fault; valid while there is one.
    first: usize,
    overflow: bool,
    queue_error: bool,
    queue_error_info: u8,
    event: Event,
    log: Limit,
}

/// What has happened since the unit was built.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) struct FaultCounts {
    pub(super) recorded: u64,
    pub(super) lost: u64,
    pub(super) queue_errors: u64,
}

impl Faults {
    /// `count` recording registers, all free.
    pub(super) fn new(sink: &dyn MsiSink, count: usize, upper: bool) -> io::Result<Faults> {
        Ok(Faults {
            state: Mutex::new(State {
                records: vec![[0; 2]; count],
                next: 0,
                first: 0,
                overflow: false,
                queue_error: false,
                queue_error_info: 0,
                event: Event::new(sink, upper)?,
                log: Limit::default(),
            }),
            queue_error: AtomicBool::new(false),
            recorded: AtomicU64::new(0),
            lost: AtomicU64::new(0),
            queue_errors: AtomicU64::new(0),
        })
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    pub(super) fn counts(&self) -> FaultCounts {
        FaultCounts {
            recorded: self.recorded.load(Ordering::Relaxed),
            lost: self.lost.load(Ordering::Relaxed),
            queue_errors: self.queue_errors.load(Ordering::Relaxed),
        }
    }

    pub(super) fn reset(&self) {
        let mut state = self.state();
        state.records.fill([0; 2]);
        (state.next, state.first) = (0, 0);
        (state.overflow, state.queue_error) = (false, false);
        state.queue_error_info = 0;
        state.event.reset();
        self.queue_error.store(false, Ordering::Release);
    }

    /// Both kinds of translation are off: recording starts at the first register again (7.2.1).
    pub(super) fn restart(&self) {
        self.state().next = 0;
    }

    /// Records `fault` and raises the fault event, unless there is no room (7.2.1).
    pub(super) fn record(&self, fault: Fault) {
        let mut state = self.state();
        state.print(&fault);
        let next = state.next;
        let free = state
            .records
            .get(next)
            .is_some_and(|[_, high]| high & frcd::F == 0);
        if state.overflow || !free {
            state.overflow = true;
            self.lost.fetch_add(1, Ordering::Relaxed);
            return;
        }
        let quiet = state.status() != 0;
        if !state.pending() {
            state.first = next;
        }
        if let Some(record) = state.records.get_mut(next) {
            *record = fault.words();
        }
        state.next = if next + 1 < state.records.len() {
            next + 1
        } else {
            0
        };
        self.recorded.fetch_add(1, Ordering::Relaxed);
        if !quiet {
            state.event.raise();
        }
    }

    /// The invalidation queue has met an error (6.5.2.10); `info` is one of [`iqei`].
    pub(super) fn queue_error(&self, info: u8, head: u64) {
        let mut state = self.state();
        let quiet = state.status() != 0;
        state.queue_error = true;
        state.queue_error_info = info;
        self.queue_error.store(true, Ordering::Release);
        self.queue_errors.fetch_add(1, Ordering::Relaxed);
        if let Some(dropped) = state.log.allow(Instant::now()) {
            tracing::warn!(
                dropped,
                "VT-d: the invalidation queue stops at {head:#x}: {}",
                describe(info)
            );
        }
        if !quiet {
            state.event.raise();
        }
    }

    /// Whether the queue stands still until software clears IQE.
    pub(super) fn queue_stopped(&self) -> bool {
        self.queue_error.load(Ordering::Acquire)
    }

    /// Fault Status.
    pub(super) fn status(&self) -> u32 {
        self.state().status()
    }

    /// A write to Fault Status.
    pub(super) fn clear_status(&self, value: u32) {
        let mut state = self.state();
        state.overflow &= value & fsts::PFO == 0;
        state.queue_error &= value & fsts::IQE == 0;
        if !state.queue_error {
            state.queue_error_info = 0;
        }
        self.queue_error.store(state.queue_error, Ordering::Release);
        state.serviced();
    }

    /// IQERCD. Without device-TLBs the source ids of ICE and ITE stay zero.
    pub(super) fn queue_error_info(&self) -> u8 {
        self.state().queue_error_info
    }

    pub(super) fn read_event(&self, offset: u64) -> u32 {
        self.state().event.read(offset)
    }

    pub(super) fn write_event(&self, offset: u64, value: u32) {
        self.state().event.write(offset, value);
    }

    /// Reads a double word of the recording registers, at `offset` from the first.
    pub(super) fn read_record(&self, offset: u64) -> u32 {
        let state = self.state();
        let Some(record) = usize::try_from(offset / FRCD_LEN)
            .ok()
            .and_then(|index| state.records.get(index))
        else {
            return 0;
        };
        let [low, high] = record.map(halves);
        match offset % FRCD_LEN {
            0x0 => low[0],
            0x4 => low[1],
            0x8 => high[0],
            _ => high[1],
        }
    }

    /// Writes a double word of the recording registers: the F bit is cleared by writing 1, and nothing
    /// else can be written.
    pub(super) fn write_record(&self, offset: u64, value: u32) {
        if offset % FRCD_LEN != 0xc || halves(frcd::F)[1] & value == 0 {
            return;
        }
        let mut state = self.state();
        if let Some([_, high]) = usize::try_from(offset / FRCD_LEN)
            .ok()
            .and_then(|index| state.records.get_mut(index))
        {
            *high &= !frcd::F;
        }
        state.serviced();
    }
}

impl State {
    fn pending(&self) -> bool {
        self.records.iter().any(|[_, high]| high & frcd::F != 0)
    }

    fn status(&self) -> u32 {
        let mut status = 0;
        if self.overflow {
            status |= fsts::PFO;
        }
        if self.queue_error {
            status |= fsts::IQE;
        }
        if self.pending() {
            status |= fsts::PPF;
            // At most 256 registers.
            status |= u32::try_from(self.first).unwrap_or(0) << fsts::FRI_SHIFT;
        }
        status
    }

    /// The message is not pending any more when software has cleared all status (11.4.7.2).
    fn serviced(&mut self) {
        if self.status() == 0 {
            self.event.serviced();
        }
    }

    fn print(&mut self, fault: &Fault) {
        let Some(dropped) = self.log.allow(Instant::now()) else {
            return;
        };
        let source = Bdf::from_requester_id(fault.source.0);
        let reason = fault.reason.0;
        let text = fault.reason.describe();
        match fault.what {
            What::Dma { address, access } => {
                let access = match access {
                    Access::Read => "read",
                    Access::Write => "write",
                };
                tracing::warn!(
                    dropped,
                    "VT-d: {source} {access} of {address:#x} blocked: {text} ({reason:#04x})"
                );
            }
            What::Interrupt { index } => tracing::warn!(
                dropped,
                "VT-d: {source} interrupt index {index:#x} blocked: {text} ({reason:#04x})"
            ),
        }
    }
}

/// What is wrong with the invalidation queue.
fn describe(info: u8) -> &'static str {
    match info {
        iqei::TAIL => "the tail is outside the queue",
        iqei::FETCH => "the descriptor cannot be read",
        iqei::TYPE => "unknown descriptor type",
        iqei::RESERVED => "reserved bits or values in the descriptor",
        iqei::WIDTH => "128-bit descriptors in scalable mode",
        iqei::TAIL_ALIGNMENT => "the tail is not aligned to 256 bits",
        _ => "no information",
    }
}

/// Low and high half.
pub(super) fn halves(value: u64) -> [u32; 2] {
    let [a, b, c, d, e, f, g, h] = value.to_le_bytes();
    [
        u32::from_le_bytes([a, b, c, d]),
        u32::from_le_bytes([e, f, g, h]),
    ]
}

//! Where interrupts end: a recorder of messages and one of line levels, which tests can wait on.

use std::collections::HashMap;
use std::io;
use std::sync::atomic::{AtomicBool, AtomicU32, AtomicU64, Ordering};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use iommu::{MsiLine, MsiMessage, MsiSink, SourceId};
use pci::IntxSink;

/// First data value that [`Recorder::allocate`] gives out, as on x86, where lower ones are
/// exceptions.
const FIRST_DATA: u32 = 0x20;

/// One message that arrived.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Delivery {
    /// Who sent it.
    pub source: SourceId,
    /// What it was.
    pub message: MsiMessage,
}

#[derive(Default)]
struct Count {
    arrived: u64,
    taken: u64,
}

#[derive(Default)]
struct Shared {
    counts: Mutex<HashMap<MsiMessage, Count>>,
    log: Mutex<Vec<Delivery>>,
    arrival: Condvar,
    retargets: AtomicU64,
    refuse: AtomicBool,
}

impl Shared {
    fn counts(&self) -> MutexGuard<'_, HashMap<MsiMessage, Count>> {
        self.counts.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn log(&self) -> MutexGuard<'_, Vec<Delivery>> {
        self.log.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn deliver(&self, source: SourceId, message: MsiMessage) {
        self.log().push(Delivery { source, message });
        self.counts().entry(message).or_default().arrived += 1;
        self.arrival.notify_all();
    }
}

/// Records interrupt messages.
#[derive(Default)]
pub struct Recorder {
    shared: Arc<Shared>,
    opened: AtomicU64,
    next: AtomicU32,
}

impl Recorder {
    /// A message that no other vector of the machine has: local APIC 0, a data value of its own.
    pub fn allocate(&self) -> MsiMessage {
        MsiMessage {
            address: 0xfee0_0000,
            data: FIRST_DATA + self.next.fetch_add(1, Ordering::Relaxed),
        }
    }

    /// Waits until `message` has arrived since the last call for it, and returns how often it has; 0
    /// if it did not within `timeout`.
    pub fn wait(&self, message: MsiMessage, timeout: Duration) -> u64 {
        let deadline = Instant::now() + timeout;
        let mut counts = self.shared.counts();
        loop {
            let count = counts.entry(message).or_default();
            let new = count.arrived - count.taken;
            let left = deadline.saturating_duration_since(Instant::now());
            if new > 0 || left.is_zero() {
                count.taken = count.arrived;
                return new;
            }
            (counts, _) = self
                .shared
                .arrival
                .wait_timeout(counts, left)
                .unwrap_or_else(PoisonError::into_inner);
        }
    }

    /// How often `message` has arrived in all.
    pub fn count(&self, message: MsiMessage) -> u64 {
        self.shared.counts().get(&message).map_or(0, |c| c.arrived)
    }

    /// All messages since the last call, in order.
    pub fn take_log(&self) -> Vec<Delivery> {
        std::mem::take(&mut self.shared.log())
    }

    /// Lines opened so far.
    pub fn opened(&self) -> u64 {
        self.opened.load(Ordering::Relaxed)
    }

    /// Changes of a line's message so far.
    pub fn retargets(&self) -> u64 {
        self.shared.retargets.load(Ordering::Relaxed)
    }

    /// From now on refuse lines and messages, as a host without free routes does, or stop refusing.
    pub fn refuse(&self, refuse: bool) {
        self.shared.refuse.store(refuse, Ordering::Relaxed);
    }

    fn check(shared: &Shared) -> io::Result<()> {
        if shared.refuse.load(Ordering::Relaxed) {
            return Err(io::Error::other("no route left"));
        }
        Ok(())
    }
}

impl MsiSink for Recorder {
    fn open(&self, source: SourceId) -> io::Result<Arc<dyn MsiLine>> {
        Self::check(&self.shared)?;
        self.opened.fetch_add(1, Ordering::Relaxed);
        Ok(Arc::new(Line {
            source,
            shared: Arc::clone(&self.shared),
            message: Mutex::new(None),
        }))
    }

    fn send(&self, source: SourceId, message: MsiMessage) -> io::Result<()> {
        Self::check(&self.shared)?;
        self.shared.deliver(source, message);
        Ok(())
    }
}

struct Line {
    source: SourceId,
    shared: Arc<Shared>,
    message: Mutex<Option<MsiMessage>>,
}

impl MsiLine for Line {
    fn retarget(&self, message: MsiMessage) -> io::Result<()> {
        Recorder::check(&self.shared)?;
        self.shared.retargets.fetch_add(1, Ordering::Relaxed);
        *self.message.lock().unwrap_or_else(PoisonError::into_inner) = Some(message);
        Ok(())
    }

    fn fire(&self) {
        let message = *self.message.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(message) = message {
            self.shared.deliver(self.source, message);
        }
    }
}

/// A line's level, and how often it has changed.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct LineState {
    /// Asserted.
    pub level: bool,
    /// Changes so far.
    pub changes: u64,
}

/// Records the levels of the root complex's four interrupt lines.
#[derive(Default)]
pub struct Lines {
    lines: Mutex<[LineState; 4]>,
    change: Condvar,
}

impl Lines {
    /// Interrupt Line register of functions on line 0.
    pub const FIRST_INPUT: u8 = 16;

    /// Line `line`, 0 to 3, now.
    pub fn state(&self, line: usize) -> LineState {
        self.lock()[line]
    }

    /// All levels.
    pub fn levels(&self) -> [bool; 4] {
        self.lock().map(|line| line.level)
    }

    /// Waits until line `line` has the level `level`; false if it has not within `timeout`.
    pub fn wait(&self, line: usize, level: bool, timeout: Duration) -> bool {
        let (lines, _) = self
            .change
            .wait_timeout_while(self.lock(), timeout, |lines| lines[line].level != level)
            .unwrap_or_else(PoisonError::into_inner);
        lines[line].level == level
    }

    fn lock(&self) -> MutexGuard<'_, [LineState; 4]> {
        self.lines.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Panics on a change that is none: that is the root complex's promise.
impl IntxSink for Lines {
    fn set_level(&self, line: u8, level: bool) {
        let mut lines = self.lock();
        let line = &mut lines[usize::from(line)];
        assert_ne!(line.level, level, "no change");
        line.level = level;
        line.changes += 1;
        self.change.notify_all();
    }

    fn input(&self, line: u8) -> u8 {
        Self::FIRST_INPUT + line
    }
}

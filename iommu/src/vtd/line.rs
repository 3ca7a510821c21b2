//! Interrupt lines behind the remapper.
//!
//! A line's route in the host is the interrupt entry cache: it holds what the table entry said when it
//! was read, until the entry cache is invalidated. Firing reads no table and takes no lock.
//!
//! A line without a route (its request was blocked when it was looked at last) looks again each time
//! it fires: blocked requests are not cached (6.1), and each one has to be recorded.
//!
//! No request is lost and none goes out under an old entry once an invalidation has returned:
//!
//! - *From one route to another.* The inner line takes the old route or the new one, never none, and
//!   after its `retarget` returned only the new one.
//! - *From a route to none.* `open` goes false, then the remapper waits until no one is between the two
//!   counts in [`Line::fire`]. The counters and `open` are sequentially consistent: who fires is either
//!   counted when the remapper looks, or comes after and sees `open` false. Then it takes the lock,
//!   which the remapper holds until it is done, and looks the entry up.
//! - *From none to a route.* Under the same lock.

use std::io;
use std::sync::atomic::{AtomicBool, AtomicU32, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, Weak};
use std::time::Instant;

use super::fault::{Fault, Faults, What};
use super::interrupt::{Blocked, Table, index, remap};
use super::limit::Limit;
use crate::{DmaError, GuestRam, Iova, MsiLine, MsiMessage, MsiSink, SourceId};

/// Value of [`Line::index`] when the line uses no table entry.
const NO_INDEX: u32 = u32::MAX;

/// The interrupt half of a unit.
pub(super) struct Remapper {
    ram: GuestRam,
    inner: Arc<dyn MsiSink>,
    faults: Arc<Faults>,
    /// [`Table`].
    table: AtomicU64,
    lines: Mutex<Vec<Weak<Line>>>,
    /// Requests that passed through lines which are gone, and those that devices wrote.
    passed: AtomicU64,
    blocked: AtomicU64,
    log: Mutex<Limit>,
}

impl Remapper {
    pub(super) fn new(ram: GuestRam, inner: Arc<dyn MsiSink>, faults: Arc<Faults>) -> Remapper {
        Remapper {
            ram,
            inner,
            faults,
            table: AtomicU64::new(0),
            lines: Mutex::new(Vec::new()),
            passed: AtomicU64::new(0),
            blocked: AtomicU64::new(0),
            log: Mutex::new(Limit::default()),
        }
    }

    pub(super) fn table(&self) -> Table {
        Table::from_bits(self.table.load(Ordering::SeqCst))
    }

    /// From now on requests are remapped with `table`.
    pub(super) fn set_table(&self, table: Table) {
        if self.table.swap(table.bits(), Ordering::SeqCst) != table.bits() {
            self.invalidate(|_| true);
        }
    }

    /// The entries whose indices `matches` are read again (6.5.2.7).
    pub(super) fn invalidate(&self, matches: impl Fn(u32) -> bool) {
        let lines: Vec<_> = {
            let mut lines = lock(&self.lines);
            lines.retain(|line| line.strong_count() > 0);
            lines.iter().filter_map(Weak::upgrade).collect()
        };
        for line in lines {
            // A line without entry has not got one out of the table either.
            if matches(line.index.load(Ordering::SeqCst)) {
                line.refresh();
            }
        }
    }

    /// Puts a line of `source` behind the remapper. It has no message yet. Unless it is `verified`, its
    /// requests pass whatever source the table entry asks for.
    pub(super) fn wrap(
        self: &Arc<Self>,
        source: SourceId,
        verified: bool,
        inner: Arc<dyn MsiLine>,
    ) -> Arc<dyn MsiLine> {
        let line = Arc::new(Line {
            remapper: Arc::clone(self),
            source,
            verified,
            inner,
            index: AtomicU32::new(NO_INDEX),
            open: AtomicBool::new(false),
            entered: AtomicU64::new(0),
            left: AtomicU64::new(0),
            blocked: AtomicU64::new(0),
            state: Mutex::new(LineState::default()),
        });
        let mut lines = lock(&self.lines);
        lines.retain(|line| line.strong_count() > 0);
        lines.push(Arc::downgrade(&line));
        line
    }

    /// A memory write of a device to the interrupt address range.
    pub(super) fn write(&self, source: SourceId, message: MsiMessage) -> Result<(), DmaError> {
        match remap(&self.ram, self.table(), Some(source), message) {
            Ok(target) => {
                self.passed.fetch_add(1, Ordering::Relaxed);
                if let Err(error) = self.inner.send(source, target)
                    && let Some(dropped) = lock(&self.log).allow(Instant::now())
                {
                    tracing::warn!(dropped, %error, "VT-d: cannot deliver an interrupt that a device wrote");
                }
                Ok(())
            }
            Err(blocked) => {
                self.block(source, message, blocked);
                let iova = Iova(message.address);
                Err(match blocked.reason {
                    Some(reason) => DmaError::Fault(iova, reason),
                    None => DmaError::NotMapped(iova, 4),
                })
            }
        }
    }

    /// Records what a blocked request calls for.
    fn block(&self, source: SourceId, message: MsiMessage, blocked: Blocked) {
        self.blocked.fetch_add(1, Ordering::Relaxed);
        let Some(reason) = blocked.reason else {
            if let Some(dropped) = lock(&self.log).allow(Instant::now()) {
                tracing::warn!(
                    dropped,
                    "VT-d: {} sends an interrupt message to {:#x}, which is not in the interrupt \
                     address range: dropped",
                    crate::Bdf::from_requester_id(source.0),
                    message.address
                );
            }
            return;
        };
        if !blocked.suppressed {
            self.faults.record(Fault {
                source,
                reason,
                what: What::Interrupt {
                    // The field has sixteen bits; only indices outside every table have more.
                    index: u16::try_from(blocked.index.unwrap_or(0)).unwrap_or(u16::MAX),
                },
            });
        }
    }

    /// Interrupt requests that passed, and that were blocked.
    pub(super) fn counts(&self) -> (u64, u64) {
        let lines = lock(&self.lines);
        let live: u64 = lines
            .iter()
            .filter_map(Weak::upgrade)
            .map(|line| line.passed())
            .sum();
        (
            live + self.passed.load(Ordering::Relaxed),
            self.blocked.load(Ordering::Relaxed),
        )
    }
}

/// Lines of this sink are remapped.
pub(super) struct RemappingSink(pub(super) Arc<Remapper>);

impl MsiSink for RemappingSink {
    fn open(&self, source: SourceId) -> io::Result<Arc<dyn MsiLine>> {
        let inner = self.0.inner.open(source)?;
        Ok(self.0.wrap(source, true, inner))
    }

    fn send(&self, source: SourceId, message: MsiMessage) -> io::Result<()> {
        self.0.write(source, message).map_err(io::Error::other)
    }
}

struct Line {
    remapper: Arc<Remapper>,
    source: SourceId,
    verified: bool,
    inner: Arc<dyn MsiLine>,
    /// The table entry named by the message, or [`NO_INDEX`].
    index: AtomicU32,
    /// The inner line's route is what the message was remapped to.
    open: AtomicBool,
    entered: AtomicU64,
    left: AtomicU64,
    blocked: AtomicU64,
    state: Mutex<LineState>,
}

#[derive(Default)]
struct LineState {
    /// What the device sends.
    message: Option<MsiMessage>,
    /// The inner line's route.
    route: Option<MsiMessage>,
}

impl Line {
    /// Remaps the message anew. Without a message there is nothing to do.
    fn refresh(&self) {
        let mut state = lock(&self.state);
        if let Err(error) = self.resolve(&mut state)
            && let Some(dropped) = lock(&self.remapper.log).allow(Instant::now())
        {
            // The line stays closed and tries again when it fires.
            tracing::warn!(dropped, %error, "VT-d: no route for a remapped interrupt");
        }
    }

    /// Reads the table entry and makes the route agree with it. `Ok(Some)` if the request is blocked.
    /// The line is open afterwards only if the request passes and the host takes the route.
    fn resolve(&self, state: &mut MutexGuard<'_, LineState>) -> io::Result<Option<Blocked>> {
        let Some(message) = state.message else {
            return Ok(None);
        };
        let table = self.remapper.table();
        // Before the entry is read: an invalidation of it finds this line, or comes before the read.
        self.index
            .store(index(table, message).unwrap_or(NO_INDEX), Ordering::SeqCst);
        let verified = self.verified.then_some(self.source);
        match remap(&self.remapper.ram, table, verified, message) {
            Ok(target) => {
                if state.route != Some(target) {
                    if let Err(error) = self.inner.retarget(target) {
                        self.close();
                        return Err(error);
                    }
                    state.route = Some(target);
                }
                self.open.store(true, Ordering::SeqCst);
                Ok(None)
            }
            Err(blocked) => {
                self.close();
                Ok(Some(blocked))
            }
        }
    }

    /// Makes those who fire take the slow way, and waits for those who do not. They are about to write
    /// to an eventfd and hold no lock.
    fn close(&self) {
        if !self.open.swap(false, Ordering::SeqCst) {
            return;
        }
        // In this order: if the younger count of entries equals the older count of exits, there was
        // nobody in between when the exits were read.
        loop {
            let left = self.left.load(Ordering::SeqCst);
            if self.entered.load(Ordering::SeqCst) == left {
                return;
            }
            std::thread::yield_now();
        }
    }

    fn passed(&self) -> u64 {
        let entered = self.entered.load(Ordering::Relaxed);
        entered.saturating_sub(self.blocked.load(Ordering::Relaxed))
    }

    fn fire_slowly(&self) {
        let mut state = lock(&self.state);
        let Some(message) = state.message else {
            self.blocked.fetch_add(1, Ordering::Relaxed);
            return;
        };
        match self.resolve(&mut state) {
            Ok(None) => self.inner.fire(),
            Ok(Some(blocked)) => {
                self.blocked.fetch_add(1, Ordering::Relaxed);
                self.remapper.block(self.source, message, blocked);
            }
            Err(error) => {
                self.blocked.fetch_add(1, Ordering::Relaxed);
                if let Some(dropped) = lock(&self.remapper.log).allow(Instant::now()) {
                    tracing::warn!(dropped, %error, "VT-d: an interrupt is lost, no route for it");
                }
            }
        }
    }
}

impl MsiLine for Line {
    fn retarget(&self, message: MsiMessage) -> io::Result<()> {
        let mut state = lock(&self.state);
        let old = state.message.replace(message);
        match self.resolve(&mut state) {
            Ok(_) => Ok(()),
            Err(error) => {
                // As the contract of `retarget` has it, the old message stays.
                state.message = old;
                let _ = self.resolve(&mut state);
                Err(error)
            }
        }
    }

    fn fire(&self) {
        self.entered.fetch_add(1, Ordering::SeqCst);
        let open = self.open.load(Ordering::SeqCst);
        if open {
            self.inner.fire();
        }
        self.left.fetch_add(1, Ordering::SeqCst);
        if !open {
            self.fire_slowly();
        }
    }
}

impl Drop for Line {
    fn drop(&mut self) {
        self.remapper
            .passed
            .fetch_add(self.passed(), Ordering::Relaxed);
    }
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

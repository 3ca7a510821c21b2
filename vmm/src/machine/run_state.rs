//! Whether the machine still runs, and why not.

use std::io;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, PoisonError};

use vmm_sys_util::eventfd::EventFd;

use super::ExitReason;

/// Shared by everything that can end the run. The first reason counts.
pub(super) struct RunState {
    reason: Mutex<Option<ExitReason>>,
    event: EventFd,
    /// Set when the machine ends: output need not be waited for any more.
    closing: Arc<AtomicBool>,
}

impl RunState {
    pub(super) fn new() -> io::Result<RunState> {
        Ok(RunState {
            reason: Mutex::new(None),
            event: EventFd::new(libc::EFD_NONBLOCK | libc::EFD_CLOEXEC)?,
            closing: Arc::default(),
        })
    }

    /// Ends the run, if nobody else has.
    pub(super) fn end(&self, reason: ExitReason) {
        self.reason
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .get_or_insert(reason);
        // A full counter wakes the main loop as well.
        let _ = self.event.write(1);
    }

    /// Why it ended, if it has.
    pub(super) fn reason(&self) -> Option<ExitReason> {
        self.reason
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .clone()
    }

    /// For another run of the same machine.
    pub(super) fn restart(&self) {
        let mut reason = self.reason.lock().unwrap_or_else(PoisonError::into_inner);
        *reason = None;
        let _ = self.event.read();
        self.closing.store(false, Ordering::Relaxed);
    }

    pub(super) fn close(&self) {
        self.closing.store(true, Ordering::Relaxed);
    }

    /// Signalled when the run ended.
    pub(super) fn event(&self) -> &EventFd {
        &self.event
    }

    pub(super) fn closing(&self) -> Arc<AtomicBool> {
        Arc::clone(&self.closing)
    }
}

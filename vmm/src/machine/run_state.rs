//! Whether the machine still runs, and why not.

use std::io;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, PoisonError};

use vmm_sys_util::eventfd::EventFd;

use super::ExitReason;

/// Shared by everything that can end the run. The first reason counts, but a reboot is no end: a
/// machine that is killed while it reboots does not come up again.
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
        let mut first = self.reason.lock().unwrap_or_else(PoisonError::into_inner);
        let overrides = *first == Some(ExitReason::Reboot) && reason == ExitReason::Killed;
        if first.is_none() || overrides {
            *first = Some(reason);
        }
        drop(first);
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

    /// For another run of the same machine after a reboot; the reason against it, if there is one.
    pub(super) fn restart(&self) -> Option<ExitReason> {
        let mut reason = self.reason.lock().unwrap_or_else(PoisonError::into_inner);
        let end = reason.take_if(|reason| *reason != ExitReason::Reboot);
        if end.is_none() {
            *reason = None;
            let _ = self.event.read();
            self.closing.store(false, Ordering::Relaxed);
        }
        end
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

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_first_reason_counts_and_a_restart_forgets_it() {
        let run = RunState::new().unwrap();
        run.end(ExitReason::Reboot);
        run.end(ExitReason::PowerOff);
        assert_eq!(run.reason(), Some(ExitReason::Reboot));
        assert_eq!(run.restart(), None);
        assert_eq!(run.reason(), None);
        run.end(ExitReason::PowerOff);
        run.end(ExitReason::Killed);
        assert_eq!(run.reason(), Some(ExitReason::PowerOff));
    }

    #[test]
    fn a_machine_killed_while_it_reboots_stays_down() {
        let run = RunState::new().unwrap();
        run.end(ExitReason::Reboot);
        // The main loop has seen the reboot and takes the machine down.
        run.end(ExitReason::Killed);
        assert_eq!(run.restart(), Some(ExitReason::Killed));
    }
}

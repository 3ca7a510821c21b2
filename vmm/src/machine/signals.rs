//! Signals that end the machine, taken by the main loop.

use std::fs::File;
use std::io::{self, Read};
use std::os::fd::FromRawFd;
use std::sync::Arc;

use event_manager::{EventOps, EventSet, Events, MutEventSubscriber};
use vmm_sys_util::signal::{block_signal, create_sigset};

use super::ExitReason;
use super::run_state::RunState;

const ENDING: [libc::c_int; 3] = [libc::SIGINT, libc::SIGTERM, libc::SIGHUP];
/// Length of `signalfd_siginfo`.
const RECORD: usize = 128;

/// Blocks the signals in this thread and in those that it starts from now on, so that they reach the
/// main loop alone.
///
/// # Errors
///
/// The host refuses.
pub(super) fn block() -> io::Result<()> {
    for signal in ENDING {
        match block_signal(signal) {
            Ok(()) | Err(vmm_sys_util::signal::Error::SignalAlreadyBlocked(_)) => {}
            Err(e) => return Err(io::Error::other(format!("blocking signals: {e}"))),
        }
    }
    Ok(())
}

/// Ends the run when one of the signals comes.
pub(super) struct Signals {
    file: File,
    run: Arc<RunState>,
}

impl Signals {
    pub(super) fn new(run: Arc<RunState>) -> io::Result<Signals> {
        Ok(Signals {
            file: signal_file()?,
            run,
        })
    }
}

#[expect(unsafe_code, reason = "signalfd has no safe wrapper here")]
fn signal_file() -> io::Result<File> {
    let set = create_sigset(&ENDING).map_err(|e| io::Error::from_raw_os_error(e.errno()))?;
    // SAFETY: the set is valid, and -1 asks for a new descriptor.
    let fd = unsafe { libc::signalfd(-1, &raw const set, libc::SFD_NONBLOCK | libc::SFD_CLOEXEC) };
    if fd < 0 {
        return Err(io::Error::last_os_error());
    }
    // SAFETY: the kernel just opened it for us, and nobody else owns it.
    Ok(unsafe { File::from_raw_fd(fd) })
}

impl MutEventSubscriber for Signals {
    fn init(&mut self, ops: &mut EventOps) {
        if let Err(error) = ops.add(Events::new(&self.file, EventSet::IN)) {
            tracing::warn!(%error, "signals are not taken");
        }
    }

    fn process(&mut self, _events: Events, _ops: &mut EventOps) {
        let mut record = [0; RECORD];
        if let Ok(RECORD) = self.file.read(&mut record) {
            self.run.end(ExitReason::Killed);
        }
    }
}

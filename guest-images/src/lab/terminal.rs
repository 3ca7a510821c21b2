//! The terminal and the signals of the outside process.

use std::io;
use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::sync::OnceLock;
use std::sync::atomic::{AtomicBool, AtomicI32, Ordering};

use rustix::pipe::PipeFlags;
use rustix::termios::{OptionalActions, Termios};

use super::wire::WindowSize;

/// A terminal in raw mode; the old mode returns when this is dropped.
#[derive(Debug)]
pub(super) struct RawMode {
    terminal: OwnedFd,
    old: Termios,
}

impl RawMode {
    /// Puts a terminal into raw mode, so that every key reaches the terminal inside.
    ///
    /// In the background this would stop the process, and keys go to somebody else anyway: then
    /// there is nothing to do.
    ///
    /// # Errors
    /// It is not a terminal.
    pub(super) fn enter(terminal: OwnedFd) -> io::Result<Option<Self>> {
        let foreground = rustix::termios::tcgetpgrp(&terminal)
            .is_ok_and(|group| group == rustix::process::getpgrp());
        if !foreground {
            return Ok(None);
        }
        let old = rustix::termios::tcgetattr(&terminal)?;
        let mut raw = old.clone();
        raw.make_raw();
        rustix::termios::tcsetattr(&terminal, OptionalActions::Now, &raw)?;
        Ok(Some(Self { terminal, old }))
    }
}

impl Drop for RawMode {
    fn drop(&mut self) {
        // A terminal that is gone has no mode.
        let _ = rustix::termios::tcsetattr(&self.terminal, OptionalActions::Drain, &self.old);
    }
}

/// The size of a terminal, or a usual one if it does not know.
pub(super) fn window_size(terminal: impl AsFd) -> WindowSize {
    match rustix::termios::tcgetwinsize(terminal) {
        Ok(size) if size.ws_row > 0 && size.ws_col > 0 => WindowSize {
            rows: size.ws_row,
            columns: size.ws_col,
        },
        _ => WindowSize {
            rows: 24,
            columns: 80,
        },
    }
}

/// Signals that are passed on to the command inside.
const FORWARDED: [libc::c_int; 5] = [
    libc::SIGINT,
    libc::SIGTERM,
    libc::SIGHUP,
    libc::SIGQUIT,
    libc::SIGWINCH,
];

/// Where the handler writes the numbers of signals.
static PIPE: OnceLock<(OwnedFd, OwnedFd)> = OnceLock::new();
static PIPE_WRITER: AtomicI32 = AtomicI32::new(-1);
static CAUGHT: AtomicBool = AtomicBool::new(false);

/// Written instead of a signal's number.
const STOP: u8 = 0;

/// The forwarded signals are caught while this lives. There can be one at a time.
#[derive(Debug)]
pub(super) struct Signals {
    old: Vec<(libc::c_int, OldAction)>,
}

struct OldAction(libc::sigaction);

impl std::fmt::Debug for OldAction {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("OldAction")
    }
}

impl Signals {
    /// Begins to catch signals. Signals that the process ignores stay ignored, as under nohup(1).
    ///
    /// # Errors
    /// They are being caught already, or a system call failed.
    pub(super) fn catch() -> io::Result<Self> {
        if CAUGHT.swap(true, Ordering::SeqCst) {
            return Err(io::Error::new(
                io::ErrorKind::ResourceBusy,
                "signals are forwarded to another command already",
            ));
        }
        let mut signals = Self { old: Vec::new() };
        let (_, writer) = match PIPE.get() {
            Some(pipe) => pipe,
            None => {
                let pipe = rustix::pipe::pipe_with(PipeFlags::CLOEXEC)?;
                PIPE.get_or_init(|| pipe)
            }
        };
        PIPE_WRITER.store(writer.as_raw_fd(), Ordering::SeqCst);
        for signal in FORWARDED {
            if let Some(old) = set_handler(signal)? {
                signals.old.push((signal, old));
            }
        }
        Ok(signals)
    }

    /// Waits for the next signal; `None` after [`Signals::stop`].
    pub(super) fn next(&self) -> Option<i32> {
        let (reader, _) = PIPE.get()?;
        let mut byte = [STOP];
        loop {
            match rustix::io::read(reader, &mut byte) {
                Err(rustix::io::Errno::INTR) => {}
                Ok(1) if byte != [STOP] => return Some(i32::from(byte[0])),
                _ => return None,
            }
        }
    }

    /// Ends the waiting in [`Signals::next`].
    pub(super) fn stop(&self) {
        if let Some((_, writer)) = PIPE.get() {
            // One byte fits unless thousands of signals wait, and then the reader is awake.
            let _ = rustix::io::write(writer, &[STOP]);
        }
    }
}

impl Drop for Signals {
    fn drop(&mut self) {
        for (signal, old) in &self.old {
            restore_handler(*signal, old);
        }
        CAUGHT.store(false, Ordering::SeqCst);
    }
}

/// Only makes async-signal-safe calls (signal-safety(7)): write(2), with errno kept.
#[expect(
    unsafe_code,
    reason = "a signal handler may not use more than system calls"
)]
extern "C" fn on_signal(signal: libc::c_int) {
    let Ok(number) = u8::try_from(signal) else {
        return;
    };
    let writer = PIPE_WRITER.load(Ordering::SeqCst);
    // SAFETY: errno's address is valid in every thread; the buffer is one live byte; the
    // descriptor is a pipe that is never closed.
    unsafe {
        let errno = libc::__errno_location();
        let saved = *errno;
        libc::write(writer, (&raw const number).cast(), 1);
        *errno = saved;
    }
}

#[expect(unsafe_code, reason = "sigaction(2) has no safe form")]
fn set_handler(signal: libc::c_int) -> io::Result<Option<OldAction>> {
    // SAFETY: an all-zero sigaction is a valid value: default action, empty mask, no flags.
    let (mut new, mut old): (libc::sigaction, libc::sigaction) =
        unsafe { (std::mem::zeroed(), std::mem::zeroed()) };
    let handler: extern "C" fn(libc::c_int) = on_signal;
    new.sa_sigaction = handler as libc::sighandler_t;
    new.sa_flags = libc::SA_RESTART;
    // SAFETY: both structures live through the calls, and the handler is a function that may run
    // at any time.
    unsafe {
        if libc::sigaction(signal, std::ptr::null(), &raw mut old) != 0 {
            return Err(io::Error::last_os_error());
        }
        if old.sa_sigaction == libc::SIG_IGN {
            return Ok(None);
        }
        if libc::sigaction(signal, &raw const new, &raw mut old) != 0 {
            return Err(io::Error::last_os_error());
        }
    }
    Ok(Some(OldAction(old)))
}

#[expect(unsafe_code, reason = "sigaction(2) has no safe form")]
fn restore_handler(signal: libc::c_int, old: &OldAction) {
    // SAFETY: the action was in force before and comes from the kernel.
    unsafe {
        libc::sigaction(signal, &raw const old.0, std::ptr::null_mut());
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use rustix::process::{Signal, getpid, kill_process};

    #[test]
    #[expect(unsafe_code, reason = "signal(2)")]
    fn signals_are_caught_in_order_and_given_back() {
        // Whoever started the tests may ignore it, as nohup does, and then it would stay so.
        // SAFETY: SIG_DFL is no handler, and no other test here uses the signal.
        unsafe { libc::signal(libc::SIGHUP, libc::SIG_DFL) };
        let signals = Signals::catch().unwrap();
        assert!(Signals::catch().is_err());
        kill_process(getpid(), Signal::WINCH).unwrap();
        assert_eq!(signals.next(), Some(libc::SIGWINCH));
        kill_process(getpid(), Signal::HUP).unwrap();
        assert_eq!(signals.next(), Some(libc::SIGHUP));
        signals.stop();
        assert_eq!(signals.next(), None);
        drop(signals);
        drop(Signals::catch().unwrap());
    }
}

//! The user's terminal: raw mode that is undone on every way out, the escape key, and output that
//! cannot hold up the end of the machine.

use std::fs::File;
use std::io::{self, Read, Write};
use std::os::fd::{AsFd, AsRawFd, OwnedFd, RawFd};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, Once, PoisonError};

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::termios::{OptionalActions, OutputModes, Termios, tcgetattr, tcsetattr};

/// The terminal to restore and its state before.
static SAVED: Mutex<Option<(OwnedFd, Termios)>> = Mutex::new(None);

/// A terminal in raw mode; dropping it restores the terminal, and so does a panic.
pub struct RawTerminal(());

impl RawTerminal {
    /// Puts standard input into raw mode if it is a terminal. Output processing stays on, so that
    /// messages of this program start their lines on the left.
    ///
    /// # Errors
    ///
    /// The terminal refuses.
    pub fn enter() -> io::Result<Option<RawTerminal>> {
        let stdin = io::stdin();
        if !rustix::termios::isatty(&stdin) {
            return Ok(None);
        }
        static HOOK: Once = Once::new();
        HOOK.call_once(|| {
            let next = std::panic::take_hook();
            std::panic::set_hook(Box::new(move |info| {
                restore();
                next(info);
            }));
        });
        let before = tcgetattr(&stdin)?;
        let mut raw = before.clone();
        raw.make_raw();
        raw.output_modes |= before.output_modes & (OutputModes::OPOST | OutputModes::ONLCR);
        let terminal = stdin.as_fd().try_clone_to_owned()?;
        *SAVED.lock().unwrap_or_else(PoisonError::into_inner) = Some((terminal, before));
        tcsetattr(&stdin, OptionalActions::Now, &raw)?;
        Ok(Some(RawTerminal(())))
    }
}

impl Drop for RawTerminal {
    fn drop(&mut self) {
        restore();
    }
}

/// Puts the terminal back as it was, if it was changed.
fn restore() {
    let saved = SAVED.lock().unwrap_or_else(PoisonError::into_inner).take();
    if let Some((terminal, before)) = saved {
        // Nothing is left to be done about an error: the terminal is gone.
        let _ = tcsetattr(&terminal, OptionalActions::Now, &before);
    }
}

/// The escape key: Ctrl-A.
const ESCAPE: u8 = 0x01;

/// What a key after the escape means.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Command {
    /// Ctrl-A x: end the machine.
    Quit,
    /// Ctrl-A h: say what the keys are.
    Help,
}

/// Text for [`Command::Help`].
pub const HELP: &str = "\nCtrl-A x  end the machine\nCtrl-A a  send Ctrl-A\nCtrl-A h  this help\n";

/// Finds escapes in what is typed.
#[derive(Debug, Default)]
pub struct EscapeFilter {
    escaped: bool,
}

impl EscapeFilter {
    /// Removes escapes from `typed`; what is left is for the guest.
    pub fn filter(&mut self, typed: &[u8]) -> (Vec<u8>, Option<Command>) {
        let mut rest = Vec::with_capacity(typed.len());
        let mut command = None;
        for &byte in typed {
            if !std::mem::take(&mut self.escaped) {
                if byte == ESCAPE {
                    self.escaped = true;
                } else {
                    rest.push(byte);
                }
                continue;
            }
            match byte {
                b'x' | b'X' => command = Some(Command::Quit),
                b'h' | b'?' => command = command.or(Some(Command::Help)),
                b'a' | ESCAPE => rest.push(ESCAPE),
                // Not a command: the guest gets both.
                other => rest.extend([ESCAPE, other]),
            }
        }
        (rest, command)
    }
}

/// Standard input as a file of our own: readable without the lock and buffer of `std::io::Stdin`.
pub struct Input {
    file: File,
}

impl Input {
    /// Duplicates standard input.
    ///
    /// # Errors
    ///
    /// It is closed.
    pub fn stdin() -> io::Result<Input> {
        let fd = io::stdin().as_fd().try_clone_to_owned()?;
        Ok(Input { file: fd.into() })
    }

    /// Reads what is there; empty at the end of the input. To be called when it is readable.
    ///
    /// # Errors
    ///
    /// Reading fails.
    pub fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        loop {
            match self.file.read(buffer) {
                Err(e) if e.kind() == io::ErrorKind::Interrupted => {}
                other => return other,
            }
        }
    }
}

impl AsRawFd for Input {
    fn as_raw_fd(&self) -> RawFd {
        self.file.as_raw_fd()
    }
}

/// Output of the serial line: waits while the other end does not take it, but not past the end of
/// the machine.
pub struct Output {
    file: File,
    closing: Arc<AtomicBool>,
}

impl Output {
    /// To `file`, until `closing` is set.
    pub fn new(file: File, closing: Arc<AtomicBool>) -> Output {
        Output { file, closing }
    }

    /// To standard output.
    ///
    /// # Errors
    ///
    /// It is closed.
    pub fn stdout(closing: Arc<AtomicBool>) -> io::Result<Output> {
        let fd = io::stdout().as_fd().try_clone_to_owned()?;
        Ok(Output::new(fd.into(), closing))
    }

    /// Waits until it can be written to; false when that is no longer wanted.
    fn wait(&self) -> io::Result<bool> {
        loop {
            let closing = self.closing.load(Ordering::Relaxed);
            let tick = Timespec {
                tv_sec: 0,
                tv_nsec: if closing { 0 } else { 100_000_000 },
            };
            let mut fds = [PollFd::new(&self.file, PollFlags::OUT)];
            match poll(&mut fds, Some(&tick)) {
                Ok(0) if closing => return Ok(false),
                Ok(0) | Err(rustix::io::Errno::INTR) => {}
                Ok(_) => return Ok(true),
                Err(e) => return Err(e.into()),
            }
        }
    }
}

impl Write for Output {
    fn write(&mut self, data: &[u8]) -> io::Result<usize> {
        loop {
            if !self.wait()? {
                return Ok(data.len());
            }
            match self.file.write(data) {
                // Somebody else made the file non-blocking and filled it meanwhile.
                Err(e) if e.kind() == io::ErrorKind::WouldBlock => {}
                other => return other,
            }
        }
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn escapes() {
        let mut filter = EscapeFilter::default();
        assert_eq!(filter.filter(b"ls\r"), (b"ls\r".to_vec(), None));
        assert_eq!(filter.filter(b"a\x01"), (b"a".to_vec(), None));
        assert_eq!(filter.filter(b"x"), (vec![], Some(Command::Quit)));
        assert_eq!(filter.filter(b"\x01a\x01\x01"), (vec![1, 1], None));
        assert_eq!(filter.filter(b"\x01k"), (b"\x01k".to_vec(), None));
        assert_eq!(
            filter.filter(b"\x01hx"),
            (b"x".to_vec(), Some(Command::Help))
        );
    }

    #[test]
    fn a_stuck_reader_does_not_hold_up_the_end() {
        let (_reader, writer) = io::pipe().unwrap();
        let closing = Arc::new(AtomicBool::new(false));
        let file = File::from(OwnedFd::from(writer));
        rustix::io::ioctl_fionbio(&file, true).unwrap();
        let mut output = Output::new(file, Arc::clone(&closing));
        let writer = std::thread::spawn(move || {
            for _ in 0..1000 {
                output.write_all(&[0; 4096]).unwrap();
            }
        });
        closing.store(true, Ordering::Relaxed);
        writer.join().unwrap();
    }
}

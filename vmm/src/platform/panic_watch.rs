//! Notices a Linux panic in what the guest prints.
//!
//! The pvpanic device is the proper way, but its driver is a module in the distributions' kernels and
//! an initramfs need not load it. Every kernel, however quiet, prints its panic on its console, so a
//! reset that follows the message is reported as a panic, and so is a kernel that prints the end of
//! its report and would then spin for ever. At worst a guest misleads its own user.

use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Mutex, PoisonError};

/// Linux kernel/panic.c.
const PANIC: &[u8] = b"Kernel panic - not syncing";
/// Linux kernel/panic.c: the last line, when it is not going to reboot.
const END: &[u8] = b"---[ end Kernel panic - not syncing";
/// The messages come early in their lines, after a time stamp at most.
const LINE_MAX: usize = 128;

/// Looks at the guest's console, byte by byte.
#[derive(Debug, Default)]
pub struct PanicWatch {
    line: Mutex<Vec<u8>>,
    seen: AtomicBool,
    last: AtomicBool,
}

impl PanicWatch {
    /// One byte of output.
    pub fn byte(&self, byte: u8) {
        let mut line = self.line.lock().unwrap_or_else(PoisonError::into_inner);
        if byte != b'\n' {
            if line.len() < LINE_MAX {
                line.push(byte);
            }
            return;
        }
        let holds = |text: &[u8]| line.windows(text.len()).any(|part| part == text);
        if holds(PANIC) {
            self.seen.store(true, Ordering::Relaxed);
            if holds(END) {
                self.last.store(true, Ordering::Relaxed);
            }
        }
        line.clear();
    }

    /// A panic message was printed.
    pub fn seen(&self) -> bool {
        self.seen.load(Ordering::Relaxed)
    }

    /// The end of a panic report was printed: the kernel will do nothing more.
    pub fn is_final(&self) -> bool {
        self.last.load(Ordering::Relaxed)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn watch(text: &str) -> (bool, bool) {
        let watch = PanicWatch::default();
        text.bytes().for_each(|byte| watch.byte(byte));
        (watch.seen(), watch.is_final())
    }

    #[test]
    fn sees_panics_and_nothing_else() {
        assert_eq!(
            watch("[    1.2] Kernel panic - not syncing: VFS: x\r\n"),
            (true, false)
        );
        assert_eq!(
            watch("a\n[ 1] ---[ end Kernel panic - not syncing: y ]---\r\n"),
            (true, true)
        );
        assert_eq!(watch("Kernel panic - not syncing"), (false, false));
        assert_eq!(watch("Kernel panic\n - not syncing\n"), (false, false));
        let long = "x".repeat(100_000);
        assert_eq!(
            watch(&(long + "Kernel panic - not syncing\n")),
            (false, false)
        );
    }
}

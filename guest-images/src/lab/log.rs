//! The end of what a nested host's kernel and QEMU say.

use std::sync::{Arc, Mutex, PoisonError};

/// How much is kept, in bytes.
const BYTES: usize = 32 * 1024;

/// How much is shown, in lines: of a kernel that lives, and of one that has died. An oops with its
/// registers and its trace takes about 60, the panic after it as many again.
const LINES: usize = 25;
const DEATH_LINES: usize = 130;

/// How the account of a kernel's death begins.
const DEATH: [&str; 6] = [
    "BUG: ",
    "Oops: ",
    "general protection fault",
    "cut here ]---",
    "kernel BUG at",
    PANIC,
];
const PANIC: &str = "Kernel panic";

/// The session's thread writes it, the session's owner may read it at any time.
#[derive(Debug, Clone, Default)]
pub(super) struct SharedLog(Arc<Mutex<Tail>>);

impl SharedLog {
    pub(super) fn push(&self, bytes: &[u8]) {
        let mut tail = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        tail.push(bytes);
    }

    /// See [`Tail::last_lines`].
    pub(super) fn last_lines(&self) -> String {
        let tail = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        tail.last_lines()
    }
}

#[derive(Debug, Default)]
struct Tail {
    bytes: Vec<u8>,
}

impl Tail {
    fn push(&mut self, bytes: &[u8]) {
        self.bytes.extend_from_slice(bytes);
        if self.bytes.len() > 2 * BYTES {
            let surplus = self.bytes.len() - BYTES;
            self.bytes.drain(..surplus);
        }
    }

    /// The last lines that say something, or those of the kernel's death from its beginning on,
    /// without what could upset a terminal.
    fn last_lines(&self) -> String {
        let text = String::from_utf8_lossy(&self.bytes);
        let lines: Vec<String> = text
            .lines()
            .map(|line| line.chars().filter(|c| !c.is_control()).collect::<String>())
            // TCG says this of every start.
            .filter(|line| !line.contains("TCG doesn't support requested feature"))
            .filter(|line| !line.trim().is_empty())
            .collect();
        let begins = |line: &String| DEATH.iter().any(|beginning| line.contains(beginning));
        let (first, count) = match lines.iter().any(|line| line.contains(PANIC)) {
            true => (lines.iter().position(begins).unwrap_or(0), DEATH_LINES),
            false => (lines.len().saturating_sub(LINES), LINES),
        };
        let shown: Vec<String> = lines.into_iter().skip(first).take(count).collect();
        shown.join("\n")
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_tail_is_bounded_and_clean() {
        let mut tail = Tail::default();
        for number in 0..100_000 {
            tail.push(format!("line {number}\r\n\n").as_bytes());
        }
        tail.push(b"x: warning: TCG doesn't support requested feature: y\n\x1b[31mlast\n");
        assert!(tail.bytes.len() <= 2 * BYTES + 100);
        let shown = tail.last_lines();
        assert_eq!(shown.lines().count(), LINES);
        assert!(shown.ends_with("line 99999\n[31mlast"));
    }

    #[test]
    fn a_panic_is_shown_with_the_oops_before_it() {
        let mut tail = Tail::default();
        tail.push(b"before\nBUG: kernel NULL pointer dereference, address: 0\nOops: Oops: 0000\n");
        tail.push("  trace\n".repeat(2 * LINES).as_bytes());
        tail.push(b"Kernel panic - not syncing: Fatal exception in interrupt\n");
        tail.push("  more\n".repeat(DEATH_LINES).as_bytes());
        let shown = tail.last_lines();
        assert!(shown.starts_with("BUG: kernel NULL pointer dereference"));
        assert!(shown.contains("Fatal exception in interrupt\n  more\n"));
        assert_eq!(shown.lines().count(), DEATH_LINES);
    }
}

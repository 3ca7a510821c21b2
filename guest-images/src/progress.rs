//! Progress of long work: a bar on a terminal, plain lines elsewhere, both on standard error.

use std::io::{self, IsTerminal, Write};
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use indicatif::{ProgressBar, ProgressStyle};

/// Where long work reports what it does. One step is under way at a time; a new step ends the one
/// before it.
pub trait Progress: Send + Sync {
    /// Begins a step and says what it is, for example "fetching packages of trixie".
    fn step(&self, what: &str);

    /// Says how much of the step is done, in percent (0 to 100).
    fn percent(&self, percent: u8);

    /// Ends the last step.
    fn done(&self);
}

/// Bar on a terminal, plain lines elsewhere.
pub fn on_stderr() -> Box<dyn Progress> {
    if io::stderr().is_terminal() {
        Box::new(Bar::new())
    } else {
        Box::new(Lines::new(io::stderr()))
    }
}

/// Reports nothing.
#[derive(Debug, Clone, Copy, Default)]
pub struct Silent;

impl Progress for Silent {
    fn step(&self, _what: &str) {}
    fn percent(&self, _percent: u8) {}
    fn done(&self) {}
}

/// A spinner that becomes a bar once a step knows its percentage. It leaves nothing behind.
struct Bar {
    current: Mutex<Option<ProgressBar>>,
    spinner: ProgressStyle,
    bar: ProgressStyle,
}

impl Bar {
    fn new() -> Self {
        // A template with a mistake cannot reach a user (a test parses both); the default style
        // shows the same facts.
        Self {
            current: Mutex::new(None),
            spinner: template(SPINNER).unwrap_or_else(ProgressStyle::default_spinner),
            bar: template(BAR).unwrap_or_else(ProgressStyle::default_bar),
        }
    }

    fn current(&self) -> MutexGuard<'_, Option<ProgressBar>> {
        self.current.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

const SPINNER: &str = "{spinner} {msg} [{elapsed}]";
const BAR: &str = "{spinner} {msg} [{bar:30}] {percent}% [{elapsed}]";

fn template(text: &str) -> Option<ProgressStyle> {
    ProgressStyle::with_template(text).ok()
}

impl Progress for Bar {
    fn step(&self, what: &str) {
        self.done();
        let bar = ProgressBar::new_spinner().with_style(self.spinner.clone());
        bar.set_message(what.to_owned());
        bar.enable_steady_tick(Duration::from_millis(120));
        *self.current() = Some(bar);
    }

    fn percent(&self, percent: u8) {
        if let Some(bar) = self.current().as_ref() {
            if bar.length().is_none() {
                bar.set_length(100);
                bar.set_style(self.bar.clone());
            }
            bar.set_position(u64::from(percent.min(100)));
        }
    }

    fn done(&self) {
        if let Some(bar) = self.current().take() {
            bar.finish_and_clear();
        }
    }
}

/// One line a step, and one every few seconds while it goes on, for logs and CI.
struct Lines<W> {
    state: Mutex<LinesState<W>>,
}

struct LinesState<W> {
    out: W,
    what: String,
    last_line: Instant,
}

/// The least time between two lines of the same step.
const LINE_PERIOD: Duration = Duration::from_secs(5);

impl<W: Write> Lines<W> {
    fn new(out: W) -> Self {
        Self {
            state: Mutex::new(LinesState {
                out,
                what: String::new(),
                last_line: Instant::now(),
            }),
        }
    }

    fn percent_at(&self, percent: u8, now: Instant) {
        let mut state = self.state();
        if now.saturating_duration_since(state.last_line) >= LINE_PERIOD {
            state.last_line = now;
            let line = format!("ringside: {} ({percent}%)", state.what);
            state.line(&line);
        }
    }

    fn state(&self) -> MutexGuard<'_, LinesState<W>> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl<W: Write> LinesState<W> {
    fn line(&mut self, line: &str) {
        // Nobody can be told that standard error is closed, and the work itself goes on.
        let _ = writeln!(self.out, "{line}");
    }
}

impl<W: Write + Send> Progress for Lines<W> {
    fn step(&self, what: &str) {
        let mut state = self.state();
        what.clone_into(&mut state.what);
        state.last_line = Instant::now();
        state.line(&format!("ringside: {what}"));
    }

    fn percent(&self, percent: u8) {
        self.percent_at(percent, Instant::now());
    }

    fn done(&self) {}
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn templates_parse() {
        assert!(template(SPINNER).is_some());
        assert!(template(BAR).is_some());
    }

    #[test]
    fn lines_are_plain_and_rare() {
        let lines = Lines::new(Vec::new());
        lines.step("fetching");
        let start = lines.state().last_line;
        lines.percent_at(10, start + Duration::from_secs(1));
        lines.percent_at(50, start + Duration::from_secs(6));
        lines.percent_at(60, start + Duration::from_secs(7));
        lines.done();
        let text = String::from_utf8(lines.state().out.clone()).unwrap();
        assert_eq!(text, "ringside: fetching\nringside: fetching (50%)\n");
    }
}

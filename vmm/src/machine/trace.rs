//! Times of the steps from the start of a machine to the guest's first exit.

use std::io::{self, Write};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Mutex, PoisonError};
use std::time::{Duration, Instant};

/// Takes the time at each step.
pub struct BootTrace {
    start: Instant,
    print: bool,
    done: AtomicBool,
    steps: Mutex<Vec<(&'static str, Duration)>>,
}

impl BootTrace {
    /// Starts the clock. With `print`, the steps go to standard error once the guest has run.
    pub fn new(print: bool) -> BootTrace {
        BootTrace {
            start: Instant::now(),
            print,
            done: AtomicBool::new(false),
            steps: Mutex::new(Vec::new()),
        }
    }

    /// `what` is done.
    pub fn step(&self, what: &'static str) {
        let at = self.start.elapsed();
        self.steps
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .push((what, at));
    }

    /// The boot processor came out of the guest for the first time: at least one guest instruction
    /// has run, and as seen from outside it ran now. Cheap after the first call.
    pub fn first_exit(&self) {
        if self.done.load(Ordering::Relaxed) || self.done.swap(true, Ordering::Relaxed) {
            return;
        }
        self.step("guest's first exit");
        if self.print {
            // Tracing is for the user's eyes; that they are closed is no reason to fail.
            let _ = io::stderr().write_all(self.to_string().as_bytes());
        }
    }

    /// Time from the start to the guest's first exit, once that has happened.
    pub fn to_first_exit(&self) -> Option<Duration> {
        if !self.done.load(Ordering::Relaxed) {
            return None;
        }
        let steps = self.steps.lock().unwrap_or_else(PoisonError::into_inner);
        steps.last().map(|(_, at)| *at)
    }
}

impl std::fmt::Display for BootTrace {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let steps = self.steps.lock().unwrap_or_else(PoisonError::into_inner);
        let mut last = Duration::ZERO;
        for (what, at) in steps.iter() {
            let millis = |time: Duration| time.as_secs_f64() * 1e3;
            let took = at.saturating_sub(last);
            writeln!(f, "{:9.3} ms  +{:.3}  {what}", millis(*at), millis(took))?;
            last = *at;
        }
        Ok(())
    }
}

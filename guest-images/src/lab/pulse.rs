//! Keeps a nested host going, and notices when it stands still: its relay is asked all the time, and
//! must answer.
//!
//! The question itself helps. Up to QEMU 10.1, VMRUN and #VMEXIT change the processor's pending
//! interrupts without the lock under which devices set them (10.2 has "add `cpu_set_interrupt()` and
//! use it treewide"). A timer interrupt that comes at that moment is lost, and with it all later ones,
//! for Linux sets its timer in the timer's interrupt. The local APIC still has it, and delivers it when
//! the next interrupt of any kind comes: that of the port by which the question arrives.

use std::time::{Duration, Instant};

/// How often the relay is asked: so long may the nested host stand still.
pub(super) const INTERVAL: Duration = Duration::from_millis(500);

/// How long it may be silent. An answer takes milliseconds; on a busy machine, or while the relay
/// writes a large disk's cache out, it can take much longer.
pub(super) const PATIENCE: Duration = Duration::from_secs(300);

/// What is to be done now.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Beat {
    /// Nothing.
    Nothing,
    /// Ask the relay for an answer.
    Ask,
    /// Give the nested host up.
    Dead,
}

#[derive(Debug)]
pub(super) struct Pulse {
    silence: Duration,
    asked_before: Duration,
    last: Instant,
}

impl Pulse {
    pub(super) fn new(now: Instant) -> Self {
        Self {
            silence: Duration::ZERO,
            asked_before: Duration::ZERO,
            last: now,
        }
    }

    /// To be called at least once per [`INTERVAL`], after what has come from the relay was handled.
    pub(super) fn tick(&mut self, now: Instant) -> Beat {
        // A longer time has passed only if this process was stopped: the answer may be there already.
        let passed = now.saturating_duration_since(self.last).min(INTERVAL);
        self.last = now;
        self.silence += passed;
        self.asked_before += passed;
        if self.silence >= PATIENCE {
            Beat::Dead
        } else if self.asked_before >= INTERVAL {
            self.asked_before = Duration::ZERO;
            Beat::Ask
        } else {
            Beat::Nothing
        }
    }

    /// The relay said something.
    pub(super) fn heard(&mut self) {
        self.silence = Duration::ZERO;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_relay_is_asked_all_the_time_and_given_up_when_it_is_silent() {
        let mut now = Instant::now();
        let mut pulse = Pulse::new(now);
        let mut after = |pulse: &mut Pulse| {
            now += INTERVAL / 2;
            pulse.tick(now)
        };
        for _ in 0..10_000 {
            assert_eq!(after(&mut pulse), Beat::Nothing);
            assert_eq!(after(&mut pulse), Beat::Ask);
            pulse.heard();
        }
        let mut questions = 0;
        loop {
            match after(&mut pulse) {
                Beat::Nothing => {}
                Beat::Ask => questions += 1,
                Beat::Dead => break,
            }
        }
        let interval = INTERVAL.as_millis();
        assert_eq!(questions, PATIENCE.as_millis() / interval - 1);
    }

    #[test]
    fn time_in_which_this_process_was_stopped_does_not_count() {
        let start = Instant::now();
        let mut pulse = Pulse::new(start);
        assert_eq!(pulse.tick(start + INTERVAL), Beat::Ask);
        assert_eq!(pulse.tick(start + 10 * PATIENCE), Beat::Ask);
    }
}

//! Keeps a guest from filling the host's log.

use std::time::{Duration, Instant};

const WINDOW: Duration = Duration::from_secs(5);
const LINES: u32 = 10;

/// Allows some lines in each window of time.
#[derive(Default)]
pub(super) struct Limit {
    start: Option<Instant>,
    lines: u32,
    dropped: u64,
}

impl Limit {
    /// Whether a line may be written at `now`; if so, how many were dropped since the last one.
    pub(super) fn allow(&mut self, now: Instant) -> Option<u64> {
        let fresh = self
            .start
            .is_none_or(|start| now.saturating_duration_since(start) >= WINDOW);
        if fresh {
            self.start = Some(now);
            self.lines = 0;
        }
        if self.lines == LINES {
            self.dropped += 1;
            return None;
        }
        self.lines += 1;
        Some(std::mem::take(&mut self.dropped))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn some_lines_in_each_window() {
        let mut limit = Limit::default();
        let now = Instant::now();
        for _ in 0..LINES {
            assert_eq!(limit.allow(now), Some(0));
        }
        assert_eq!(limit.allow(now), None);
        assert_eq!(limit.allow(now + WINDOW / 2), None);
        assert_eq!(limit.allow(now + WINDOW), Some(2));
        assert_eq!(limit.allow(now + WINDOW), Some(0));
    }
}

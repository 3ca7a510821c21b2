//! A brake on log lines that a guest can cause.

use std::sync::atomic::{AtomicU64, Ordering};

/// Lets through the 1st, 2nd, 4th, 8th... event: at most 64 lines, however long the guest tries.
#[derive(Default)]
pub(crate) struct LogLimit(AtomicU64);

impl LogLimit {
    /// Counts an event; the count so far if it is to be logged.
    pub(crate) fn pass(&self) -> Option<u64> {
        let count = self.0.fetch_add(1, Ordering::Relaxed).wrapping_add(1);
        count.is_power_of_two().then_some(count)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn passes_powers_of_two() {
        let limit = LogLimit::default();
        let passed: Vec<u64> = (0..20).filter_map(|_| limit.pass()).collect();
        assert_eq!(passed, [1, 2, 4, 8, 16]);
    }
}

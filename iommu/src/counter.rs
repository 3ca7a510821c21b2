//! Counters of the hot paths.

use std::sync::atomic::{AtomicU64, Ordering};

/// A counter with one writer at a time: reading it back and storing is enough, no locked instruction.
#[derive(Default)]
pub struct Counter(AtomicU64);

impl Counter {
    /// Adds `n`; from one thread at a time.
    pub fn add(&self, n: u64) {
        let value = self.0.load(Ordering::Relaxed).wrapping_add(n);
        self.0.store(value, Ordering::Relaxed);
    }

    /// The count so far, from any thread.
    pub fn get(&self) -> u64 {
        self.0.load(Ordering::Relaxed)
    }
}

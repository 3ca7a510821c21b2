//! The last invalidations, for readers that take no lock.
//!
//! A ring of entries, each with the number of the invalidation that it holds: zero while it is being
//! written, so that a reader who finds the same number before and after has read one whole
//! invalidation. The tests run this file under loom.

use super::sync::{AtomicU64, LOG, Ordering, fence};

use super::drain::FIRST;

/// An invalidation in words; what they mean is the caller's business.
pub(crate) type Words = [u64; 3];

#[derive(Default)]
struct Entry {
    number: AtomicU64,
    words: [AtomicU64; 3],
}

/// The ring and the number of the invalidation published last.
pub(crate) struct Log {
    sequence: AtomicU64,
    entries: Box<[Entry]>,
}

impl Log {
    pub(crate) fn new() -> Log {
        Log {
            sequence: AtomicU64::new(FIRST),
            entries: (0..LOG).map(|_| Entry::default()).collect(),
        }
    }

    /// Number of the invalidation published last.
    pub(crate) fn sequence(&self) -> &AtomicU64 {
        &self.sequence
    }

    fn entry(&self, number: u64) -> &Entry {
        // The ring's length is a `usize`, and so is the rest.
        &self.entries[usize::try_from(number % LOG).unwrap_or(0)]
    }

    /// Appends an invalidation and returns its number. One caller at a time.
    ///
    /// Has a `SeqCst` fence behind the store of the number, for ordering 1 of `drain.rs`.
    pub(crate) fn publish(&self, words: Words) -> u64 {
        let number = self.sequence.load(Ordering::Relaxed) + 1;
        let entry = self.entry(number);
        entry.number.store(0, Ordering::Relaxed);
        // A reader that sees one of the new words also sees the zero, or the new number.
        fence(Ordering::Release);
        for (to, word) in entry.words.iter().zip(words) {
            to.store(word, Ordering::Relaxed);
        }
        entry.number.store(number, Ordering::Release);
        self.sequence.store(number, Ordering::Release);
        fence(Ordering::SeqCst);
        number
    }

    /// Invalidation `number`, unless it has been overwritten.
    pub(crate) fn read(&self, number: u64) -> Option<Words> {
        let entry = self.entry(number);
        if entry.number.load(Ordering::Acquire) != number {
            return None;
        }
        let words = [0, 1, 2].map(|i| entry.words[i].load(Ordering::Relaxed));
        // Pairs with the release fence of the writer that overwrites.
        fence(Ordering::Acquire);
        (entry.number.load(Ordering::Relaxed) == number).then_some(words)
    }
}

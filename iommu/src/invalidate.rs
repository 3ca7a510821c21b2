//! Invalidations: told to all views at once, and waited for.

use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use crate::drain::{Pin, Waiters};
use crate::log::Log;
use crate::remap::Invalidation;
use crate::sync::LOG;
use crate::view::View;
use crate::{Iova, SourceId};

/// Looks of a waiter before it sleeps. Sections last some microseconds, as long as a sleep and a
/// wake-up alone.
const SPINS: u32 = 400;

/// All invalidations below one remapping unit (or of a machine without one), and who has yet to obey.
///
/// A view applies what was published since its last section when it enters the next one. So what is
/// published is *done* when every view has left the sections that it had open, and when no I/O in
/// flight uses memory that was resolved before: [`Invalidations::wait_drained`].
///
/// ```
/// # let ram = iommu::GuestRam::from_ranges(&[(vm_memory::GuestAddress(0), 0x1000)]).unwrap();
/// use iommu::{Invalidation, Invalidations};
///
/// let invalidations = Invalidations::new();
/// let since = invalidations.sequence();
/// let to = invalidations.publish(Invalidation::DomainTranslations { domain: 1 });
/// invalidations.wait_drained(since, to);
/// assert!(invalidations.drained(since, to));
/// ```
pub struct Invalidations {
    log: Log,
    publisher: Mutex<()>,
    views: Mutex<Vec<Arc<View>>>,
    waiters: Waiters,
}

impl Invalidations {
    /// Nothing published, no views.
    pub fn new() -> Arc<Invalidations> {
        Arc::new(Invalidations {
            log: Log::new(),
            publisher: Mutex::new(()),
            views: Mutex::new(Vec::new()),
            waiters: Waiters::new(),
        })
    }

    /// Number of the invalidation published last.
    pub fn sequence(&self) -> u64 {
        self.log
            .sequence()
            .load(std::sync::atomic::Ordering::Acquire)
    }

    /// Tells all views that something is no longer valid; returns its number. What made it invalid
    /// (the store to a table, the new root pointer) must have happened before. Does not wait.
    pub fn publish(&self, invalidation: Invalidation) -> u64 {
        let _one = self
            .publisher
            .lock()
            .unwrap_or_else(PoisonError::into_inner);
        self.log.publish(encode(invalidation))
    }

    /// Whether nothing uses any more what the invalidations after number `since` up to and including
    /// `to` made invalid: no view is in a section that it entered before it knew of `to`, and no
    /// memory pinned before one of them overlaps it. Context invalidations overlap all pins of their
    /// functions. Does not wait.
    pub fn drained(&self, since: u64, to: u64) -> bool {
        let from = |pin: &Pin| since.max(pin.since);
        let views = self.views();
        !views.iter().any(|view| {
            // In this order: `drain.rs`, ordering 2.
            view.section.before(to)
                || view.any_pin(|pin| self.overlaps(view.source, &pin, from(&pin), to))
        })
    }

    /// Waits until [`Invalidations::drained`].
    ///
    /// Must not be called inside a section, nor with a lock held that a worker takes in one, nor on a
    /// thread that has to end pinned I/O.
    pub fn wait_drained(&self, since: u64, to: u64) {
        self.wait(|| self.drained(since, to));
    }

    /// Waits until no section and no pin of these views is older than `to`.
    pub(crate) fn wait_views(&self, views: &[Arc<View>], to: u64) {
        self.wait(|| {
            !views
                .iter()
                .any(|view| view.section.before(to) || view.any_pin(|pin| pin.since < to))
        });
    }

    fn wait(&self, mut done: impl FnMut() -> bool) {
        for _ in 0..SPINS {
            if done() {
                return;
            }
            std::hint::spin_loop();
        }
        self.waiters.wait(done);
    }

    /// Whether one of the invalidations in (`since`, `to`] takes something of `pin` away.
    fn overlaps(&self, source: SourceId, pin: &Pin, since: u64, to: u64) -> bool {
        // One that is no longer in the log may have been anything.
        to.saturating_sub(since) > LOG
            || (since + 1..=to).any(|number| {
                self.read(number)
                    .is_none_or(|invalidation| invalidation.overlaps(source, pin))
            })
    }

    /// Invalidation `number`, unless it is too old.
    pub(crate) fn read(&self, number: u64) -> Option<Invalidation> {
        self.log.read(number).map(decode)
    }

    pub(crate) fn register(&self, view: Arc<View>) {
        let mut views = self.views();
        // Held by nobody else: neither a memory nor a pin will ever use it again.
        views.retain(|view| Arc::strong_count(view) > 1);
        views.push(view);
    }

    fn views(&self) -> MutexGuard<'_, Vec<Arc<View>>> {
        self.views.lock().unwrap_or_else(PoisonError::into_inner)
    }

    pub(crate) fn enter(&self, view: &View, seen: u64) -> u64 {
        view.section.enter(self.log.sequence(), seen)
    }

    /// A section or a pin has ended.
    pub(crate) fn wake(&self) {
        self.waiters.wake();
    }
}

impl Invalidation {
    /// Whether it takes something away that a pin of `source` uses.
    fn overlaps(&self, source: SourceId, pin: &Pin) -> bool {
        let in_domain =
            |domain: u16| pin.domain == u32::from(domain) || pin.domain == Pin::ANY_DOMAIN;
        match *self {
            Invalidation::Nothing => false,
            Invalidation::Everything | Invalidation::Contexts | Invalidation::Translations => true,
            Invalidation::DomainContexts { domain }
            | Invalidation::DomainTranslations { domain } => in_domain(domain),
            Invalidation::SourceContexts { source: id, mask } => matches(id, mask, source),
            Invalidation::PageTranslations {
                domain,
                start,
                last,
            } => in_domain(domain) && start.0 <= pin.last && pin.start <= last.0,
        }
    }
}

/// Whether `source` is one of the functions that `id` and `mask` stand for.
pub(crate) fn matches(id: SourceId, mask: u16, source: SourceId) -> bool {
    (id.0 ^ source.0) & !mask == 0
}

/// Kind in bits 0 to 15, domain 16 to 31, source 32 to 47, mask 48 to 63; start; last.
fn encode(invalidation: Invalidation) -> [u64; 3] {
    let head = |kind: u64, domain: u16, source: u16, mask: u16| {
        kind | u64::from(domain) << 16 | u64::from(source) << 32 | u64::from(mask) << 48
    };
    match invalidation {
        Invalidation::Nothing => [head(0, 0, 0, 0), 0, 0],
        Invalidation::Everything => [head(1, 0, 0, 0), 0, 0],
        Invalidation::Contexts => [head(2, 0, 0, 0), 0, 0],
        Invalidation::DomainContexts { domain } => [head(3, domain, 0, 0), 0, 0],
        Invalidation::SourceContexts { source, mask } => [head(4, 0, source.0, mask), 0, 0],
        Invalidation::Translations => [head(5, 0, 0, 0), 0, 0],
        Invalidation::DomainTranslations { domain } => [head(6, domain, 0, 0), 0, 0],
        Invalidation::PageTranslations {
            domain,
            start,
            last,
        } => [head(7, domain, 0, 0), start.0, last.0],
    }
}

fn decode([head, start, last]: [u64; 3]) -> Invalidation {
    let part = |shift: u32| u16::try_from(head >> shift & 0xffff).unwrap_or(0);
    let domain = part(16);
    match part(0) {
        0 => Invalidation::Nothing,
        2 => Invalidation::Contexts,
        3 => Invalidation::DomainContexts { domain },
        4 => Invalidation::SourceContexts {
            source: SourceId(part(32)),
            mask: part(48),
        },
        5 => Invalidation::Translations,
        6 => Invalidation::DomainTranslations { domain },
        7 => Invalidation::PageTranslations {
            domain,
            start: Iova(start),
            last: Iova(last),
        },
        _ => Invalidation::Everything,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn invalidations_survive_the_log() {
        let all = [
            Invalidation::Nothing,
            Invalidation::Everything,
            Invalidation::Contexts,
            Invalidation::DomainContexts { domain: 0xfffe },
            Invalidation::SourceContexts {
                source: SourceId(0xa5c3),
                mask: 0x8007,
            },
            Invalidation::Translations,
            Invalidation::DomainTranslations { domain: 0x8001 },
            Invalidation::PageTranslations {
                domain: 3,
                start: Iova(u64::MAX - 0xfff),
                last: Iova(u64::MAX),
            },
        ];
        let log = Invalidations::new();
        for invalidation in all {
            let number = log.publish(invalidation);
            assert_eq!(log.read(number), Some(invalidation));
        }
        let old = log.sequence();
        for _ in 0..LOG {
            assert!(log.read(old).is_some());
            log.publish(Invalidation::Nothing);
        }
        assert_eq!(log.read(old), None);
    }

    #[test]
    fn pins_wait_for_what_overlaps_them_only() {
        let log = Invalidations::new();
        let view = Arc::new(View::new(SourceId(0x18)));
        log.register(Arc::clone(&view));
        let place = view.place();
        let pin = Pin {
            since: log.sequence(),
            domain: 5,
            start: 0x4000,
            last: 0x7fff,
        };
        place.set(pin);
        let page = |domain, start, last| Invalidation::PageTranslations {
            domain,
            start: Iova(start),
            last: Iova(last),
        };
        let source = |source, mask| Invalidation::SourceContexts {
            source: SourceId(source),
            mask,
        };
        for (invalidation, waits) in [
            (Invalidation::Nothing, false),
            (page(5, 0, 0x3fff), false),
            (page(5, 0x8000, 0xffff), false),
            (page(4, 0, u64::MAX), false),
            (page(5, 0, 0x4000), true),
            (page(5, 0x7fff, 0x7fff), true),
            (page(5, 0x5000, 0x5fff), true),
            (Invalidation::DomainTranslations { domain: 4 }, false),
            (Invalidation::DomainTranslations { domain: 5 }, true),
            (Invalidation::DomainContexts { domain: 6 }, false),
            (Invalidation::DomainContexts { domain: 5 }, true),
            (source(0x19, 0), false),
            (source(0x19, 7), true),
            (Invalidation::Contexts, true),
            (Invalidation::Translations, true),
            (Invalidation::Everything, true),
        ] {
            let since = log.sequence();
            let to = log.publish(invalidation);
            assert_eq!(log.drained(since, to), !waits, "{invalidation:?}");
            // A pin made after it does not wait for it.
            place.set(Pin { since: to, ..pin });
            assert!(log.drained(since, to), "{invalidation:?}");
            place.set(pin);
        }
        // What has left the log may have been anything.
        let since = log.sequence();
        for _ in 0..=LOG {
            log.publish(Invalidation::Nothing);
        }
        assert!(!log.drained(since, log.sequence()));
        place.release();
        assert!(log.drained(FIRST, log.sequence()));
    }

    use crate::drain::FIRST;
}

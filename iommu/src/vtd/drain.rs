//! What the unit needs of those who hold translations.

use crate::{Invalidation, Invalidations};

/// Tells the DMA spaces what is no longer valid, and when they have let go of it.
pub(super) trait Drain: Send + Sync {
    /// Tells all; returns the invalidation's number, which is larger than all before. Does not wait.
    fn publish(&self, invalidation: Invalidation) -> u64;

    /// Whether nothing uses any more what the invalidations after number `since` up to and including
    /// `to` took away. Does not wait.
    fn drained(&self, since: u64, to: u64) -> bool;

    /// Waits until [`Drain::drained`].
    fn wait_drained(&self, since: u64, to: u64);
}

impl Drain for Invalidations {
    fn publish(&self, invalidation: Invalidation) -> u64 {
        Invalidations::publish(self, invalidation)
    }

    fn drained(&self, since: u64, to: u64) -> bool {
        Invalidations::drained(self, since, to)
    }

    fn wait_drained(&self, since: u64, to: u64) {
        Invalidations::wait_drained(self, since, to);
    }
}

/// Invalidations that have been published and may still have users.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) struct Pending(Option<(u64, u64)>);

impl Pending {
    /// Publishes one more.
    pub(super) fn publish(&mut self, drain: &dyn Drain, invalidation: Invalidation) {
        let number = drain.publish(invalidation);
        let since = self.0.map_or(number.saturating_sub(1), |(since, _)| since);
        self.0 = Some((since, number));
    }

    /// Whether none is left; forgets them if so.
    pub(super) fn drained(&mut self, drain: &dyn Drain) -> bool {
        if self.0.is_some_and(|(since, to)| !drain.drained(since, to)) {
            return false;
        }
        self.0 = None;
        true
    }

    /// Waits until none is left.
    pub(super) fn wait(self, drain: &dyn Drain) {
        if let Some((since, to)) = self.0 {
            drain.wait_drained(since, to);
        }
    }
}

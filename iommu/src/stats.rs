//! What the caches of a function's workers did.

use serde::Serialize;

use crate::Counter;

/// Counters of one view; its worker writes them.
#[derive(Default)]
pub(crate) struct ViewCounters {
    pub(crate) untranslated: Counter,
    pub(crate) hits: Counter,
    pub(crate) misses: Counter,
    pub(crate) walks: Counter,
    pub(crate) levels: Counter,
    pub(crate) context_misses: Counter,
    pub(crate) dropped: Counter,
}

/// What the IOTLBs and context caches of a function's workers did since the function was made. All
/// zero without a remapping unit.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize)]
pub struct DmaStats {
    /// Addresses that were looked up, one for each page that an access touches.
    pub translations: u64,
    /// Of these, those that pass through untranslated.
    pub pass_through: u64,
    /// Those that an IOTLB had, with the permission needed.
    pub iotlb_hits: u64,
    /// Those that no IOTLB had.
    pub iotlb_misses: u64,
    /// Walks through page tables, also those that ended in a fault.
    pub page_walks: u64,
    /// Table levels that the walks without fault read.
    pub walk_levels: u64,
    /// Look-ups that found the function's context cached.
    pub context_hits: u64,
    /// Look-ups that read it from the tables.
    pub context_misses: u64,
    /// IOTLB entries that invalidations took away.
    pub entries_dropped: u64,
}

impl DmaStats {
    pub(crate) fn add(&mut self, view: &ViewCounters) {
        let untranslated = view.untranslated.get();
        let (hits, misses) = (view.hits.get(), view.misses.get());
        let context_misses = view.context_misses.get();
        let translations = untranslated + hits + misses;
        self.translations += translations;
        self.pass_through += untranslated;
        self.iotlb_hits += hits;
        self.iotlb_misses += misses;
        self.page_walks += view.walks.get();
        self.walk_levels += view.levels.get();
        // A context that could not be read ends its look-up before it is counted.
        self.context_hits += translations.saturating_sub(context_misses);
        self.context_misses += context_misses;
        self.entries_dropped += view.dropped.get();
    }
}

//! Which BAR answers at which guest-physical address, and where stores signal events.
//!
//! A guest may place BARs over one another. Then the function with the lowest device and function
//! number wins, and in it the lowest BAR; the others answer where the winner does not. A BAR that is
//! not wholly inside one of the bridge's windows is not decoded: the bridge forwards nothing else.

use std::collections::BTreeMap;
use std::ops::Range;
use std::sync::{Arc, Mutex, PoisonError};

use arc_swap::ArcSwap;

use crate::function::Slot;
use crate::log::LogLimit;
use crate::{BarIndex, IoEvent, IoEventHub};

/// Where a BAR is, both ends included.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Placement {
    pub(crate) bar: BarIndex,
    pub(crate) first: u64,
    pub(crate) last: u64,
}

/// A stretch of addresses that one BAR answers.
#[derive(Clone)]
pub(crate) struct Piece {
    pub(crate) last: u64,
    pub(crate) slot: Arc<Slot>,
    pub(crate) bar: BarIndex,
    /// Offset in the BAR of the first address.
    pub(crate) offset: u64,
}

/// Pieces by first address; they do not overlap.
type Table = BTreeMap<u64, Piece>;
/// A BAR: its function's number, which is its rank, and its own.
type BarId = (u8, BarIndex);
/// An event: its function and its number in that function's list.
type EventId = (u8, usize);

#[derive(Default)]
struct Places {
    bars: BTreeMap<BarId, (Placement, Arc<Slot>)>,
    /// Events that the hub has taken, with their addresses.
    events: BTreeMap<EventId, (u64, Arc<Slot>)>,
}

/// The address map of one root bus.
pub(crate) struct AddressMap {
    windows: [Range<u64>; 2],
    hub: Arc<dyn IoEventHub>,
    /// What look-ups see. A look-up takes no lock and keeps nothing locked behind it.
    table: ArcSwap<Table>,
    places: Mutex<Places>,
    refused: LogLimit,
}

impl AddressMap {
    pub(crate) fn new(windows: [Range<u64>; 2], hub: Arc<dyn IoEventHub>) -> AddressMap {
        AddressMap {
            windows,
            hub,
            table: ArcSwap::default(),
            places: Mutex::default(),
            refused: LogLimit::default(),
        }
    }

    /// Who answers at `address`, with the offset in the BAR and how many of `len` bytes it answers.
    /// Without an answer: how many bytes nobody answers.
    pub(crate) fn find(
        &self,
        address: u64,
        len: usize,
    ) -> (Option<(Arc<Slot>, BarIndex, u64)>, usize) {
        let table = self.table.load();
        let until = |end: u64| usize::try_from(end - address).map_or(len, |n| len.min(n));
        if let Some((first, piece)) = table.range(..=address).next_back()
            && address <= piece.last
        {
            let offset = piece.offset + (address - first);
            let found = (Arc::clone(&piece.slot), piece.bar, offset);
            let len = until(piece.last).saturating_add(1).min(len);
            return (Some(found), len);
        }
        match table.range(address..).next() {
            Some((&next, _)) => (None, until(next)),
            None => (None, len),
        }
    }

    /// `slot`'s BARs are at these places and nowhere else.
    pub(crate) fn place(&self, slot: &Arc<Slot>, placements: &[Placement]) {
        let mut places = self.places.lock().unwrap_or_else(PoisonError::into_inner);
        let devfn = slot.devfn();
        places.bars.retain(|&(owner, _), _| owner != devfn);
        for placement in placements {
            if self.in_a_window(placement) {
                places
                    .bars
                    .insert((devfn, placement.bar), (*placement, Arc::clone(slot)));
            }
        }
        let table = flatten(&places.bars);
        let wanted = event_addresses(&places.bars, &table);

        // In this order no event is registered where its BAR does not answer. In between, stores
        // reach `bar_write`, which does the same work.
        let hub = &self.hub;
        places.events.retain(|id, (address, slot)| {
            let stays = wanted.get(id).is_some_and(|(at, _)| at == address);
            if !stays && let Some(event) = slot.events().get(id.1) {
                hub.remove(*address, event);
            }
            stays
        });
        self.table.store(Arc::new(table));
        for (id, (address, slot)) in wanted {
            if places.events.contains_key(&id) {
                continue;
            }
            let Some(event) = slot.events().get(id.1) else {
                continue;
            };
            match hub.add(address, event) {
                Ok(()) => {
                    places.events.insert(id, (address, slot));
                }
                Err(error) => {
                    if let Some(count) = self.refused.pass() {
                        tracing::warn!(
                            "stores to {address:#x} take the slow way, the host refuses an I/O event \
                             there ({error}); {count} so far"
                        );
                    }
                }
            }
        }
    }

    fn in_a_window(&self, placement: &Placement) -> bool {
        let inside = |w: &Range<u64>| w.contains(&placement.first) && w.contains(&placement.last);
        self.windows.iter().any(inside)
    }
}

/// Cuts away what a BAR of higher rank answers.
fn flatten(bars: &BTreeMap<BarId, (Placement, Arc<Slot>)>) -> Table {
    let mut table = Table::new();
    for (&(_, bar), (placement, slot)) in bars {
        let mut gaps = Vec::new();
        // First address that nobody before has taken yet; none past the end of the address space.
        let mut free = Some(placement.first);
        let before = table.range(..placement.first).next_back();
        for (&first, piece) in before
            .into_iter()
            .chain(table.range(placement.first..=placement.last))
        {
            let Some(from) = free else { break };
            if piece.last < from {
                continue;
            }
            if from < first {
                gaps.push((from, first - 1));
            }
            free = piece.last.checked_add(1);
        }
        if let Some(from) = free
            && from <= placement.last
        {
            gaps.push((from, placement.last));
        }
        for (first, last) in gaps {
            let piece = Piece {
                last,
                slot: Arc::clone(slot),
                bar,
                offset: first - placement.first,
            };
            table.insert(first, piece);
        }
    }
    table
}

/// Where events belong: only where their own BAR answers.
fn event_addresses(
    bars: &BTreeMap<BarId, (Placement, Arc<Slot>)>,
    table: &Table,
) -> BTreeMap<EventId, (u64, Arc<Slot>)> {
    let mut wanted = BTreeMap::new();
    for (&(devfn, bar), (placement, slot)) in bars {
        for (index, event) in slot.events().iter().enumerate() {
            if event.bar != bar {
                continue;
            }
            let Some((first, last)) = event_range(event, placement) else {
                continue;
            };
            let answers = table
                .range(..=first)
                .next_back()
                .is_some_and(|(_, p)| p.slot.devfn() == devfn && p.bar == bar && last <= p.last);
            if answers {
                wanted.insert((devfn, index), (first, Arc::clone(slot)));
            }
        }
    }
    wanted
}

/// The addresses of an event's store; none if it is not inside the BAR.
fn event_range(event: &IoEvent, placement: &Placement) -> Option<(u64, u64)> {
    let first = placement.first.checked_add(event.offset)?;
    let last = first.checked_add(event.length.bytes() - 1)?;
    (last <= placement.last).then_some((first, last))
}

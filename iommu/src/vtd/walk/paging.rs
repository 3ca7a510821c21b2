//! What both stages' page tables have in common.

use super::{Fault, Update, Walk, replace};
use crate::vtd::spec::tables::{LEVEL_BITS, PAGE_SHIFT};
use crate::vtd::spec::{INTERRUPT_RANGE_FIRST, INTERRUPT_RANGE_LAST};
use crate::{FaultReason, Gpa, Iova, Mapping};

/// The most levels a table can have.
pub(super) const MAX_LEVELS: usize = 5;

/// Whether `iova` fits into `width` bits.
pub(super) fn below(iova: Iova, width: u8) -> bool {
    iova.0.checked_shr(width.into()).unwrap_or(0) == 0
}

/// Log2 of what an entry of `level` (1 is the lowest) maps.
pub(super) fn shift(level: u8) -> u8 {
    PAGE_SHIFT + LEVEL_BITS * (level - 1)
}

/// Address of the entry for `iova` in the table at `table` of `level`.
pub(super) fn entry_address(table: u64, iova: Iova, level: u8) -> u64 {
    table + (iova.0 >> shift(level) & ((1 << LEVEL_BITS) - 1)) * 8
}

/// The address bits below a page of `level`: reserved in the entry that maps it.
pub(super) fn inside(level: u8) -> u64 {
    (1 << shift(level)) - 1
}

/// The entries that a walk went through, from the top.
#[derive(Default)]
pub(super) struct Path {
    entries: [(u64, u64); MAX_LEVELS],
    len: usize,
}

impl Path {
    pub(super) fn push(&mut self, address: u64, entry: u64) {
        if let Some(slot) = self.entries.get_mut(self.len) {
            *slot = (address, entry);
            self.len += 1;
        }
    }

    /// Sets `every` in all entries and `last` in the last, where they are not set. Returns whether the
    /// walk holds; otherwise an entry has changed since it was read, and the walk must begin again.
    pub(super) fn set(
        &self,
        walk: &Walk<'_>,
        every: u64,
        last: u64,
        reasons: &UpdateReasons,
        snoop: bool,
    ) -> Result<bool, Fault> {
        let entries = self.entries.get(..self.len).unwrap_or(&[]);
        for (index, &(address, entry)) in entries.iter().enumerate() {
            let bits = if index + 1 == self.len {
                every | last
            } else {
                every
            };
            if entry & bits == bits {
                continue;
            }
            walk.check(!snoop, reasons.no_snoop)?;
            match replace(walk.ram, address, entry, entry | bits) {
                Update::Done => {}
                Update::Changed => return Ok(false),
                Update::Failed => return Err(walk.fault(reasons.failed)),
            }
        }
        Ok(true)
    }
}

/// Faults of accessed and dirty bits.
pub(super) struct UpdateReasons {
    pub(super) no_snoop: FaultReason,
    pub(super) failed: FaultReason,
}

/// The mapping of the page at `gpa` of `level`, or the part of it that matters for `iova`: a large page
/// that overlaps the interrupt range is cut into 4 KiB pages. `None` when the output is in the range.
pub(super) fn mapping(iova: Iova, gpa: u64, level: u8, read: bool, write: bool) -> Option<Mapping> {
    let whole = inside(level);
    let in_range = |first: u64, mask: u64| {
        first <= INTERRUPT_RANGE_LAST && first | mask >= INTERRUPT_RANGE_FIRST
    };
    let (gpa, level) = if in_range(gpa, whole) {
        (gpa | iova.0 & whole & !inside(1), 1)
    } else {
        (gpa, level)
    };
    if level == 1 && in_range(gpa, inside(1)) {
        return None;
    }
    Some(Mapping {
        iova: Iova(iova.0 & !inside(level)),
        gpa: Gpa(gpa),
        shift: shift(level),
        read,
        write,
    })
}

//! Second-stage translation (VT-d rev 4.1, 3.7), in legacy and in scalable mode.

use super::paging::{Path, UpdateReasons, below, entry_address, inside, mapping, shift};
use super::{ATTEMPTS, Fault, Walk};
use crate::vtd::spec::tables::beyond;
use crate::vtd::spec::tables::second_stage::{
    ACCESSED, ADDRESS, DIRTY, PAGE_SIZE, READ, RESERVED, SNOOP, WRITE,
};
use crate::{Access, FaultReason, Gpa, Iova, Mapping};

pub(super) struct SecondStage {
    pub(super) legacy: bool,
    pub(super) table: Gpa,
    pub(super) levels: u8,
    pub(super) access_dirty: bool,
    pub(super) walk_snoop: bool,
}

/// What each condition is called in one mode.
struct Reasons {
    beyond_width: FaultReason,
    top_access: FaultReason,
    next_access: FaultReason,
    /// Neither reads nor writes; legacy mode has no reason of its own for that.
    not_present: Option<FaultReason>,
    reserved: FaultReason,
    read_denied: FaultReason,
    write_denied: FaultReason,
    interrupt_range: FaultReason,
}

const LEGACY: Reasons = Reasons {
    beyond_width: FaultReason::ADDRESS_BEYOND_WIDTH,
    top_access: FaultReason::CONTEXT_INVALID,
    next_access: FaultReason::PAGE_ENTRY_ACCESS,
    not_present: None,
    reserved: FaultReason::PAGE_ENTRY_RESERVED,
    read_denied: FaultReason::READ_DENIED,
    write_denied: FaultReason::WRITE_DENIED,
    interrupt_range: FaultReason::INTERRUPT_RANGE_OUTPUT,
};

const SCALABLE: Reasons = Reasons {
    beyond_width: FaultReason::SM_ADDRESS_BEYOND_WIDTH,
    top_access: FaultReason::SS_TABLE_ACCESS,
    next_access: FaultReason::SS_ENTRY_ACCESS,
    not_present: Some(FaultReason::SS_NOT_PRESENT),
    reserved: FaultReason::SS_RESERVED,
    read_denied: FaultReason::SM_READ_DENIED,
    write_denied: FaultReason::SM_WRITE_DENIED,
    interrupt_range: FaultReason::SM_INTERRUPT_RANGE_OUTPUT,
};

const UPDATE: UpdateReasons = UpdateReasons {
    no_snoop: FaultReason::SS_UPDATE_NO_SNOOP,
    failed: FaultReason::SS_UPDATE_FAILED,
};

impl SecondStage {
    fn reasons(&self) -> &'static Reasons {
        if self.legacy { &LEGACY } else { &SCALABLE }
    }

    pub(super) fn translate(
        &self,
        walk: &mut Walk<'_>,
        iova: Iova,
        access: Access,
    ) -> Result<Mapping, Fault> {
        let width = shift(self.levels + 1).min(walk.options.guest_address_width());
        walk.check(!below(iova, width), self.reasons().beyond_width)?;
        for _ in 0..ATTEMPTS {
            if let Some(mapping) = self.attempt(walk, iova, access)? {
                return Ok(mapping);
            }
        }
        Err(walk.fault(UPDATE.failed))
    }

    /// One walk; `None` when an entry changed before its accessed or dirty bit was set.
    fn attempt(
        &self,
        walk: &mut Walk<'_>,
        iova: Iova,
        access: Access,
    ) -> Result<Option<Mapping>, Fault> {
        let reasons = self.reasons();
        let (needed, denied) = match access {
            Access::Read => (READ, reasons.read_denied),
            Access::Write => (WRITE, reasons.write_denied),
        };
        let mut path = Path::default();
        let mut permissions = READ | WRITE;
        let mut table = self.table.0;
        let mut level = self.levels;
        let mut reason = reasons.top_access;
        let entry = loop {
            let address = entry_address(table, iova, level);
            let entry = walk.qword(address, reason)?;
            permissions &= entry;
            walk.check(permissions == 0, reasons.not_present.unwrap_or(denied))?;
            let maps_page = level == 1 || entry & PAGE_SIZE != 0;
            let reserved = self.reserved(walk, level, maps_page);
            walk.check(entry & reserved != 0, reasons.reserved)?;
            path.push(address, entry);
            if maps_page {
                break entry;
            }
            table = entry & ADDRESS;
            level -= 1;
            reason = reasons.next_access;
        };
        walk.check(permissions & needed == 0, denied)?;
        let mut write = permissions & WRITE != 0;
        if self.access_dirty {
            // The mapping is cached, so it may allow writes only once the page counts as dirty.
            write &= access == Access::Write || entry & DIRTY != 0;
        }
        let gpa = entry & ADDRESS & !inside(level);
        let read = permissions & READ != 0;
        let Some(mapping) = mapping(iova, gpa, level, read, write) else {
            return Err(walk.fault(reasons.interrupt_range));
        };
        if self.access_dirty {
            let last = if access == Access::Write { DIRTY } else { 0 };
            if !path.set(walk, ACCESSED, last, &UPDATE, self.walk_snoop)? {
                return Ok(None);
            }
        }
        Ok(Some(mapping))
    }

    /// Reserved bits of an entry of `level` that maps a page or points to a table.
    fn reserved(&self, walk: &Walk<'_>, level: u8, maps_page: bool) -> u64 {
        let options = walk.options;
        let always = RESERVED | ADDRESS & beyond(options.host_address_width);
        if !maps_page {
            return always | SNOOP;
        }
        let offered = match level {
            1 => true,
            2 => options.large_pages.mib_2,
            3 => options.large_pages.gib_1,
            _ => false,
        };
        let size = if offered { 0 } else { PAGE_SIZE };
        // Scalable mode has PGSNP in the PASID entry, and ignores SNP.
        let snoop = if self.legacy && !options.snoop_control {
            SNOOP
        } else {
            0
        };
        always | size | snoop | ADDRESS & inside(level)
    }
}

//! First-stage translation (VT-d rev 4.1, 3.6): the processor's 4- and 5-level tables.

use super::paging::{Path, UpdateReasons, entry_address, inside, mapping, shift};
use super::{ATTEMPTS, Fault, Walk};
use crate::vtd::spec::tables::beyond;
use crate::vtd::spec::tables::first_stage::{
    ACCESSED, ADDRESS, DIRTY, LARGE_PAT, PAGE_SIZE, PRESENT, USER, WRITE,
};
use crate::{Access, FaultReason, Gpa, Iova, Mapping};

pub(super) struct FirstStage {
    pub(super) table: Gpa,
    pub(super) levels: u8,
    pub(super) write_protect: bool,
    pub(super) supervisor: bool,
    pub(super) walk_snoop: bool,
}

const UPDATE: UpdateReasons = UpdateReasons {
    no_snoop: FaultReason::FS_UPDATE_NO_SNOOP,
    failed: FaultReason::FS_UPDATE_FAILED,
};

impl FirstStage {
    pub(super) fn translate(
        &self,
        walk: &mut Walk<'_>,
        iova: Iova,
        access: Access,
    ) -> Result<Mapping, Fault> {
        walk.check(
            !canonical(iova, shift(self.levels + 1)),
            FaultReason::NOT_CANONICAL,
        )?;
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
        let mut path = Path::default();
        let mut permissions = WRITE | USER;
        let mut table = self.table.0;
        let mut level = self.levels;
        let mut reason = FaultReason::FS_TABLE_ACCESS;
        let entry = loop {
            let address = entry_address(table, iova, level);
            let entry = walk.qword(address, reason)?;
            walk.check(entry & PRESENT == 0, FaultReason::FS_NOT_PRESENT)?;
            permissions &= entry;
            let maps_page = level == 1 || entry & PAGE_SIZE != 0;
            let reserved = reserved(walk, level, maps_page);
            walk.check(entry & reserved != 0, FaultReason::FS_RESERVED)?;
            path.push(address, entry);
            if maps_page {
                break entry;
            }
            table = entry & ADDRESS;
            level -= 1;
            reason = FaultReason::FS_ENTRY_ACCESS;
        };
        walk.check(
            !self.supervisor && permissions & USER == 0,
            FaultReason::USER_DENIED,
        )?;
        let may_write = permissions & WRITE != 0 || self.supervisor && !self.write_protect;
        walk.check(
            access == Access::Write && !may_write,
            FaultReason::SM_WRITE_DENIED,
        )?;
        // The mapping is cached, so it may allow writes only once the page counts as dirty.
        let write = may_write && (access == Access::Write || entry & DIRTY != 0);
        let gpa = entry & ADDRESS & !inside(level);
        let Some(mapping) = mapping(iova, gpa, level, true, write) else {
            return Err(walk.fault(FaultReason::SM_INTERRUPT_RANGE_OUTPUT));
        };
        let last = if access == Access::Write { DIRTY } else { 0 };
        if !path.set(walk, ACCESSED, last, &UPDATE, self.walk_snoop)? {
            return Ok(None);
        }
        Ok(Some(mapping))
    }
}

/// Whether all bits from the highest one of `width` on are alike.
fn canonical(iova: Iova, width: u8) -> bool {
    let high = iova.0 >> (width - 1);
    high == 0 || high == u64::MAX >> (width - 1)
}

/// Reserved bits of an entry of `level` that maps a page or points to a table. Bits 62:52 are ignored,
/// and so is bit 63 without execute requests.
fn reserved(walk: &Walk<'_>, level: u8, maps_page: bool) -> u64 {
    let always = ADDRESS & beyond(walk.options.host_address_width);
    let offered = level == 2 || level == 3 && walk.options.first_stage_1g;
    match (level, maps_page) {
        (1, _) | (_, false) => always,
        _ if offered => always | ADDRESS & inside(level) & !LARGE_PAT,
        _ => always | PAGE_SIZE,
    }
}

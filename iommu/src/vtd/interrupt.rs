//! Interrupt remapping (chapter 5): what becomes of one interrupt request.

use vm_memory::{Bytes, GuestAddress};

use super::spec::irte::{LEN, high, low, message, request};
use super::spec::registers::irta;
use crate::{FaultReason, GuestRam, MsiMessage, SourceId};

/// Interrupt remapping is on; a bit of [`Table`] that IRTA does not use.
const ENABLED: u64 = 1 << 10;
/// Compatibility format requests pass; as above.
const COMPATIBILITY: u64 = 1 << 9;

/// What governs interrupt requests, in one word: the table address, mode and size that were latched by
/// SIRTP as they are in IRTA, and whether remapping is on.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) struct Table(u64);

impl Table {
    /// From and to one word.
    pub(super) fn from_bits(bits: u64) -> Table {
        Table(bits)
    }

    pub(super) fn bits(self) -> u64 {
        self.0
    }

    /// With what IRTA holds.
    pub(super) fn latch(self, register: u64) -> Table {
        let fields = irta::TABLE | irta::EIME | irta::SIZE;
        Table(self.0 & !fields | register & fields)
    }

    /// With remapping on or off.
    pub(super) fn enable(self, on: bool) -> Table {
        Table(if on {
            self.0 | ENABLED
        } else {
            self.0 & !ENABLED
        })
    }

    /// With compatibility format requests passing or blocked.
    pub(super) fn compatibility(self, pass: bool) -> Table {
        Table(if pass {
            self.0 | COMPATIBILITY
        } else {
            self.0 & !COMPATIBILITY
        })
    }

    pub(super) fn enabled(self) -> bool {
        self.0 & ENABLED != 0
    }

    fn extended(self) -> bool {
        self.0 & irta::EIME != 0
    }

    fn entries(self) -> u64 {
        2 << (self.0 & irta::SIZE)
    }
}

/// A request that does not.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Blocked {
    /// `None`: it is no interrupt request at all but a memory write.
    pub(super) reason: Option<FaultReason>,
    /// The table entry named, if any.
    pub(super) index: Option<u32>,
    /// Fault Processing Disable in the entry: nothing is recorded.
    pub(super) suppressed: bool,
}

/// The table entry that `message` names, if it is a request in remappable format whose reserved bits
/// are clear (5.1.3).
pub(super) fn index(table: Table, message: MsiMessage) -> Option<u32> {
    let MsiMessage { address, data } = message;
    let range = address & request::RANGE_MASK == request::RANGE;
    if !table.enabled() || !range || address & request::FORMAT == 0 {
        return None;
    }
    let bits = address >> request::HANDLE_SHIFT & request::HANDLE;
    let bit_15 = u32::from(address & request::HANDLE_15 != 0) << 15;
    // Fifteen bits.
    let handle = u32::try_from(bits).unwrap_or(0) | bit_15;
    if address & request::SHV == 0 {
        return Some(handle);
    }
    (data & request::DATA_RESERVED == 0).then_some(handle + (data & request::SUBHANDLE))
}

/// What the local APICs get of `message` from `source` (5.1.3). Without a source nothing is verified.
pub(super) fn remap(
    ram: &GuestRam,
    table: Table,
    source: Option<SourceId>,
    message: MsiMessage,
) -> Result<MsiMessage, Blocked> {
    if !table.enabled() {
        return Ok(message);
    }
    let blocked = |reason, index| Blocked {
        reason,
        index,
        suppressed: false,
    };
    if message.address & request::RANGE_MASK != request::RANGE {
        return Err(blocked(None, None));
    }
    if message.address & request::FORMAT == 0 {
        if table.0 & COMPATIBILITY == 0 || table.extended() {
            return Err(blocked(Some(FaultReason::IR_COMPATIBILITY_BLOCKED), None));
        }
        return Ok(message);
    }
    let index = index(table, message)
        .ok_or_else(|| blocked(Some(FaultReason::IR_REQUEST_RESERVED), None))?;
    let error = |reason| blocked(Some(reason), Some(index));
    if u64::from(index) >= table.entries() {
        return Err(error(FaultReason::IR_INDEX_BEYOND_TABLE));
    }
    let entry = read(ram, table, index).ok_or_else(|| error(FaultReason::IR_ENTRY_ACCESS))?;
    message_of(entry, table.extended(), source).map_err(|reason| Blocked {
        suppressed: entry[0] & low::FPD != 0,
        ..error(reason)
    })
}

fn read(ram: &GuestRam, table: Table, index: u32) -> Option<[u64; 2]> {
    let address = (table.0 & irta::TABLE).checked_add(u64::from(index) * LEN)?;
    let words: [u64; 2] = ram.read_obj(GuestAddress(address)).ok()?;
    Some(words.map(u64::from_le))
}

/// What the entry makes of a request of `source`, or the reason why it does not (9.10).
fn message_of(
    [low, high]: [u64; 2],
    extended: bool,
    source: Option<SourceId>,
) -> Result<MsiMessage, FaultReason> {
    if low & low::P == 0 {
        return Err(FaultReason::IR_NOT_PRESENT);
    }
    let reserved = low::RESERVED | if extended { 0 } else { low::RESERVED_XAPIC };
    let delivery = low >> low::DLM_SHIFT & low::DLM;
    // Posted format is not among the capabilities, so its mode bit is reserved.
    if low & (reserved | low::IM) != 0
        || high & high::RESERVED != 0
        || 1 << delivery & low::RESERVED_DLM != 0
    {
        return Err(FaultReason::IR_ENTRY_RESERVED);
    }
    if source.is_some_and(|source| !allowed(high, source)) {
        return Err(FaultReason::IR_SOURCE_DENIED);
    }
    let destination = if extended {
        low >> low::DST_SHIFT
    } else {
        low >> low::DST_XAPIC_SHIFT & 0xff
    };
    let mut address = request::RANGE
        | (destination & 0xff) << message::DST_SHIFT
        | (destination & !0xff) << message::DST_HIGH_SHIFT;
    if low & low::RH != 0 {
        address |= message::RH;
    }
    if low & low::DM != 0 {
        address |= message::DM;
    }
    // Eleven bits.
    let vector = low >> low::VECTOR_SHIFT & 0xff;
    let mut data =
        u32::try_from(vector | delivery << message::DLM_SHIFT).unwrap_or(0) | message::ASSERT;
    if low & low::TM != 0 {
        data |= message::TM;
    }
    Ok(MsiMessage { address, data })
}

/// Source-id verification.
fn allowed(high: u64, source: SourceId) -> bool {
    let id = u64::from(source.0);
    let sid = high & high::SID;
    match high >> high::SVT_SHIFT & 0b11 {
        high::SVT_NONE => true,
        high::SVT_ID => {
            let ignored = match high >> high::SQ_SHIFT & 0b11 {
                0b00 => 0,
                0b01 => 0b100,
                0b10 => 0b110,
                _ => 0b111,
            };
            (sid ^ id) & !ignored == 0
        }
        high::SVT_BUS => (sid >> 8..=sid & 0xff).contains(&(id >> 8)),
        _ => false,
    }
}

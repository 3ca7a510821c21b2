//! The walks through the remapping tables (VT-d rev 4.1, chapter 3), as functions of guest memory.
//!
//! They keep nothing: no lock, no cache. Whoever calls them caches what they return and records the
//! faults. The tables are the guest's, and it may change them at any moment: every qword is loaded once,
//! atomically, and is checked in the copy that is used.

mod context;
mod first;
mod paging;
mod second;

use std::sync::atomic::{AtomicU64, Ordering};

use vm_memory::{GuestAddress, GuestMemoryBackend, VolatileMemory};

use super::Options;
use super::spec::tables::rtaddr;
use crate::{Access, Context, FaultReason, Gpa, GuestRam, Iova, Mapping, SourceId, Stage};

/// The root table in use: what RTADDR_REG held at the last Set Root Table Pointer command (11.4.5).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Root {
    /// The root table, page-aligned.
    pub table: Gpa,
    /// What the tables look like.
    pub mode: Mode,
}

/// Translation Table Mode (11.4.5).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Mode {
    /// Legacy mode.
    Legacy,
    /// Scalable mode.
    Scalable,
    /// Abort-DMA mode: there are no tables, every request is blocked.
    AbortDma,
    /// An encoding without a meaning: every request is a fault.
    Reserved,
}

impl Root {
    /// From a value of RTADDR_REG; its reserved bits 9:0 are ignored.
    pub fn from_register(value: u64) -> Root {
        Root {
            table: Gpa(value & !0xfff),
            mode: match value >> rtaddr::TTM_SHIFT & rtaddr::TTM_MASK {
                rtaddr::TTM_LEGACY => Mode::Legacy,
                rtaddr::TTM_SCALABLE => Mode::Scalable,
                rtaddr::TTM_ABORT_DMA => Mode::AbortDma,
                _ => Mode::Reserved,
            },
        }
    }
}

/// How many table entries a walk has read.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord)]
pub struct Levels(pub u32);

/// Why a walk ended without a result.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Fault {
    /// The reason to record.
    pub reason: FaultReason,
    /// The fault is neither recorded nor reported: Fault Processing Disable is set in an entry that
    /// the request reached (7.1.3, "qualified" faults), or the unit is in abort-DMA mode.
    pub suppressed: bool,
    /// Entries read until then.
    pub levels: Levels,
}

/// Reads what applies to requests without PASID of `source`: root entry, context entry and, in scalable
/// mode, the PASID directory entry and PASID entry of its RID_PASID.
///
/// # Errors
///
/// The fault that the specification names, for each entry that is missing, malformed or not in memory.
pub fn context(
    ram: &GuestRam,
    options: &Options,
    root: Root,
    source: SourceId,
) -> Result<(Context, Levels), Fault> {
    let mut walk = Walk::new(ram, options);
    let context = match root.mode {
        Mode::Legacy => walk.legacy_context(root.table, source)?,
        Mode::Scalable if options.scalable => walk.scalable_context(root.table, source)?,
        Mode::AbortDma if options.scalable => {
            walk.suppressed = true;
            return Err(walk.fault(FaultReason::TABLE_MODE_ABORT));
        }
        _ => return Err(walk.fault(FaultReason::TABLE_MODE_INVALID)),
    };
    Ok((context, walk.levels))
}

/// Translates `iova` with the page tables of `context`, which was read under `root`; without page
/// tables ([`Stage::Off`], [`Stage::PassThrough`]) the result is the identity.
///
/// A page that reaches into the interrupt address range is returned in pieces of 4 KiB, so that the rest
/// of it stays usable and the range does not.
///
/// Where accessed and dirty bits are kept the walk sets them, and the mapping allows writes only when
/// the dirty bit is set: a first write after a read walks again.
///
/// # Errors
///
/// The fault that the specification names. `access` decides which permission is needed.
pub fn page(
    ram: &GuestRam,
    options: &Options,
    root: Root,
    context: &Context,
    iova: Iova,
    access: Access,
) -> Result<(Mapping, Levels), Fault> {
    let mut walk = Walk::new(ram, options);
    walk.suppressed = context.fault_processing_disable;
    let mapping = match context.stage {
        Stage::Off => identity(iova),
        Stage::PassThrough { width } => {
            if !paging::below(iova, width) {
                return Err(beyond_width(root, context));
            }
            identity(iova)
        }
        Stage::First {
            table,
            levels,
            write_protect,
            supervisor,
            walk_snoop,
        } => first::FirstStage {
            table,
            levels,
            write_protect,
            supervisor,
            walk_snoop,
        }
        .translate(&mut walk, iova, access)?,
        Stage::Second {
            table,
            levels,
            access_dirty,
            walk_snoop,
        } => second::SecondStage {
            legacy: root.mode == Mode::Legacy,
            table,
            levels,
            access_dirty,
            walk_snoop,
        }
        .translate(&mut walk, iova, access)?,
    };
    Ok((mapping, walk.levels))
}

/// The fault of a request whose address is beyond what `context` translates, without a walk.
pub fn beyond_width(root: Root, context: &Context) -> Fault {
    let reason = match (root.mode, context.stage) {
        (Mode::Legacy, _) => FaultReason::ADDRESS_BEYOND_WIDTH,
        (_, Stage::First { .. }) => FaultReason::NOT_CANONICAL,
        (_, Stage::Second { .. }) => FaultReason::SM_ADDRESS_BEYOND_WIDTH,
        (_, Stage::Off | Stage::PassThrough { .. }) => FaultReason::SM_ADDRESS_BEYOND_HOST,
    };
    Fault {
        reason,
        suppressed: context.fault_processing_disable,
        levels: Levels(0),
    }
}

fn identity(iova: Iova) -> Mapping {
    let shift = 30;
    let start = iova.0 >> shift << shift;
    Mapping {
        iova: Iova(start),
        gpa: Gpa(start),
        shift,
        read: true,
        write: true,
    }
}

/// How often an entry is read again, or a walk begun again, because it changed under our hands. Any
/// bound will do against a guest that keeps changing it: hardware promises nothing then.
const ATTEMPTS: usize = 8;

/// One walk under way.
struct Walk<'a> {
    ram: &'a GuestRam,
    options: &'a Options,
    levels: Levels,
    suppressed: bool,
}

impl Walk<'_> {
    fn new<'a>(ram: &'a GuestRam, options: &'a Options) -> Walk<'a> {
        Walk {
            ram,
            options,
            levels: Levels(0),
            suppressed: false,
        }
    }

    fn fault(&self, reason: FaultReason) -> Fault {
        Fault {
            reason,
            suppressed: self.suppressed,
            levels: self.levels,
        }
    }

    /// The fault `reason` if `wrong`.
    fn check(&self, wrong: bool, reason: FaultReason) -> Result<(), Fault> {
        if wrong {
            Err(self.fault(reason))
        } else {
            Ok(())
        }
    }

    /// Reads the one-qword entry at `address`, or faults with `reason` where there is no memory.
    fn qword(&mut self, address: u64, reason: FaultReason) -> Result<u64, Fault> {
        self.levels.0 += 1;
        load(self.ram, address).ok_or_else(|| self.fault(reason))
    }

    /// Reads an entry of several qwords whose bit 0 is its present bit.
    ///
    /// Software makes such an entry present by writing the first qword last, so we read it first
    /// (acquire). It may also have taken the entry away and written another while we read the rest:
    /// the first qword has then changed, and we read all of it again. An entry that never stands still
    /// counts as not present: its parts are not used together.
    fn entry<const N: usize>(
        &mut self,
        address: u64,
        reason: FaultReason,
    ) -> Result<[u64; N], Fault> {
        self.levels.0 += 1;
        let read = || {
            let mut entry = [0; N];
            for _ in 0..ATTEMPTS {
                for (qword, at) in entry.iter_mut().zip((address..).step_by(8)) {
                    *qword = load(self.ram, at)?;
                    if at == address && *qword & 1 == 0 {
                        return Some(entry);
                    }
                }
                if load(self.ram, address)? == entry[0] {
                    return Some(entry);
                }
            }
            entry[0] &= !1;
            Some(entry)
        };
        read().ok_or_else(|| self.fault(reason))
    }
}

/// Loads the aligned qword at `address`; `None` where there is no memory.
fn load(ram: &GuestRam, address: u64) -> Option<u64> {
    let slice = ram
        .get_slice(GuestAddress(address), size_of::<u64>())
        .ok()?;
    let qword = slice.get_atomic_ref::<AtomicU64>(0).ok()?;
    Some(u64::from_le(qword.load(Ordering::Acquire)))
}

/// What became of an attempt to set bits in an entry.
enum Update {
    Done,
    /// The entry is not what was read any more.
    Changed,
    /// There is no memory any more.
    Failed,
}

/// Replaces the qword `old` at `address` by `new`, in one step as hardware's locked update does
/// (3.6.2), so that a change that the guest makes at the same time is not lost.
fn replace(ram: &GuestRam, address: u64, old: u64, new: u64) -> Update {
    let Ok(slice) = ram.get_slice(GuestAddress(address), size_of::<u64>()) else {
        return Update::Failed;
    };
    let Ok(qword) = slice.get_atomic_ref::<AtomicU64>(0) else {
        return Update::Failed;
    };
    let swapped = qword.compare_exchange(
        old.to_le(),
        new.to_le(),
        Ordering::AcqRel,
        Ordering::Relaxed,
    );
    if swapped.is_ok() {
        Update::Done
    } else {
        Update::Changed
    }
}

#[cfg(test)]
mod tests;

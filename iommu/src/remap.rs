//! What a remapping unit and the functions' DMA spaces say to each other.
//!
//! A [`DmaSpace`](crate::DmaSpace) asks its [`Remapper`] only on a miss: what it is told it keeps in
//! caches of its own, one set for each worker, until an [`Invalidation`] takes it away. These caches
//! are the unit's context cache, PASID cache and IOTLB: they hold stale entries as hardware does.

use crate::{Access, DmaError, Gpa, Iova, SourceId};

/// Reason code of a fault (VT-d rev 4.1, 7.1.3): what FRCD's FR field holds.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct FaultReason(pub u8);

/// What applies to all requests of a function: the contents of its context entry and of the PASID
/// entry of its requests without PASID (VT-d rev 4.1, 3.4).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Context {
    /// Tags the IOTLB entries; 0 while remapping is off.
    pub domain: u16,
    /// How addresses are translated.
    pub stage: Stage,
    /// Fault Processing Disable: faults of this function are neither recorded nor reported.
    pub fault_processing_disable: bool,
}

/// How a function's addresses are translated.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Stage {
    /// Remapping is off: every address is guest-physical.
    Off,
    /// Every address below `1 << width` is guest-physical.
    PassThrough {
        /// Width of the input addresses in bits.
        width: u8,
    },
    /// First-stage (x86) tables.
    First {
        /// PML4 or PML5 table.
        table: Gpa,
        /// 4 or 5.
        levels: u8,
        /// Write Protect Enable: supervisor writes honour the R/W bit.
        write_protect: bool,
        /// Requests are made with supervisor privilege (SRE is checked when the entry is read).
        supervisor: bool,
        /// Walks snoop the processor caches; only then may accessed and dirty bits be set.
        walk_snoop: bool,
    },
    /// Second-stage tables.
    Second {
        /// Top table.
        table: Gpa,
        /// 3, 4 or 5.
        levels: u8,
        /// Accessed and dirty bits are kept in the tables.
        access_dirty: bool,
        /// Walks snoop the processor caches; only then may accessed and dirty bits be set.
        walk_snoop: bool,
    },
}

/// One translation: a page of 4 KiB, 2 MiB or 1 GiB.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Mapping {
    /// First input address of the page.
    pub iova: Iova,
    /// First output address of the page.
    pub gpa: Gpa,
    /// Log2 of the page's size: 12, 21 or 30.
    pub shift: u8,
    /// Reads are allowed.
    pub read: bool,
    /// Writes are allowed (and, in first-stage tables, the dirty bit is set).
    pub write: bool,
}

/// What is no longer valid (VT-d rev 4.1, 6.5.2). All caches of contexts may drop more than they
/// are told to, never less.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Invalidation {
    /// Nothing: only what drains needs this, such as a function that loses Bus Master Enable.
    Nothing,
    /// Everything: contexts and translations of all functions.
    Everything,
    /// All cached contexts and PASID entries.
    Contexts,
    /// Contexts and PASID entries with this domain id.
    DomainContexts {
        /// Domain id.
        domain: u16,
    },
    /// Contexts and PASID entries of some functions: those whose id equals `source` where `mask` has
    /// no set bit.
    SourceContexts {
        /// Requester id.
        source: SourceId,
        /// Bits of the id that do not matter (FM: function number bits).
        mask: u16,
    },
    /// All translations.
    Translations,
    /// The translations of a domain.
    DomainTranslations {
        /// Domain id.
        domain: u16,
    },
    /// The translations of a domain for part of the address space.
    PageTranslations {
        /// Domain id.
        domain: u16,
        /// First address.
        start: Iova,
        /// Last address, inclusive.
        last: Iova,
    },
}

/// A remapping unit, as the DMA spaces below it see it. Called on any worker's thread, inside a
/// section: an implementation must not wait for a worker.
pub trait Remapper: Send + Sync {
    /// Reads what applies to requests of `source` from the unit's tables in memory.
    ///
    /// # Errors
    ///
    /// [`DmaError::Fault`]; it has been recorded. Errors are not cached.
    fn context(&self, source: SourceId, iova: Iova, access: Access) -> Result<Context, DmaError>;

    /// Walks the tables of `context`, which is not [`Stage::Off`] or [`Stage::PassThrough`].
    ///
    /// # Errors
    ///
    /// As for [`Remapper::context`].
    fn walk(
        &self,
        source: SourceId,
        context: &Context,
        iova: Iova,
        access: Access,
    ) -> Result<Mapping, DmaError>;

    /// An access that a cached context or mapping already forbids: records the fault and returns the
    /// error. For a mapping without permission call [`Remapper::walk`] instead: the tables may have
    /// become more permissive, which needs no invalidation.
    fn beyond_width(
        &self,
        source: SourceId,
        context: &Context,
        iova: Iova,
        access: Access,
    ) -> DmaError;

    /// Whether `iova` lies in the interrupt address range, where writes are interrupt requests
    /// (0xfee0_0000 to 0xfeef_ffff; VT-d rev 4.1, 3.14). A DMA space asks before it translates.
    fn interrupt_write(&self, source: SourceId, address: u64, data: u32) -> Result<(), DmaError>;
}

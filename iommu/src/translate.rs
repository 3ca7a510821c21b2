//! From the addresses of a function to those of the guest, with the caches of one worker.

use std::cell::Cell;
use std::sync::Arc;

use crate::invalidate::matches;
use crate::stats::ViewCounters;
use crate::tlb::{Need, Target, Tlb};
use crate::{
    Access, Context, DmaError, Invalidation, IotlbGeometry, Iova, Remapper, SourceId, Stage,
};

/// First and last address of the interrupt range (VT-d rev 4.1, 3.14), which is never translated.
const INTERRUPTS: (u64, u64) = (0xfee0_0000, 0xfeef_ffff);

/// Whether `iova` is in the interrupt address range.
#[inline]
pub(crate) fn is_interrupt(iova: u64) -> bool {
    iova.wrapping_sub(INTERRUPTS.0) <= INTERRUPTS.1 - INTERRUPTS.0
}

/// What the cached context means for an address, in a form that is quick to look at.
#[derive(Clone, Copy)]
enum Way {
    /// No context is cached.
    Unknown,
    /// There is no unit: all addresses are guest-physical, and nothing is counted.
    Straight,
    /// Addresses up to this one are guest-physical.
    Through(u64),
    /// The IOTLB's entries of this domain apply.
    Tables(u16),
}

/// One worker's caches, and the unit that fills them.
pub(crate) struct Translator {
    remapper: Option<Arc<dyn Remapper>>,
    source: SourceId,
    way: Cell<Way>,
    context: Cell<Option<Context>>,
    tlb: Tlb,
}

impl Translator {
    pub(crate) fn new(
        remapper: Option<Arc<dyn Remapper>>,
        source: SourceId,
        geometry: IotlbGeometry,
    ) -> Translator {
        let (way, geometry) = match remapper {
            Some(_) => (Way::Unknown, geometry),
            None => (Way::Straight, IotlbGeometry { sets: 1, ways: 1 }),
        };
        Translator {
            remapper,
            source,
            way: Cell::new(way),
            context: Cell::new(None),
            tlb: Tlb::new(geometry),
        }
    }

    /// The remapping unit, if there is one.
    pub(crate) fn remapper(&self) -> Option<&Arc<dyn Remapper>> {
        self.remapper.as_ref()
    }

    /// The domain whose translations apply to an access that is about to be made.
    pub(crate) fn domain(
        &self,
        iova: Iova,
        need: Need,
        counters: &ViewCounters,
    ) -> Result<u16, DmaError> {
        match self.way.get() {
            Way::Straight => Ok(0),
            Way::Tables(domain) => Ok(domain),
            _ => Ok(self.context(iova, need, counters)?.domain),
        }
    }

    /// Where `iova` leads. Called inside a section.
    #[inline]
    pub(crate) fn translate(
        &self,
        iova: u64,
        need: Need,
        counters: &ViewCounters,
    ) -> Result<Target, DmaError> {
        if is_interrupt(iova) {
            return Err(DmaError::NotMapped(Iova(iova), 1));
        }
        match self.way.get() {
            Way::Straight => Ok(straight(iova, u64::MAX)),
            Way::Tables(domain) => match self.tlb.lookup(iova, domain, need) {
                Some(target) => {
                    counters.hits.add(1);
                    Ok(clipped(iova, target))
                }
                None => self.miss(iova, need, counters),
            },
            Way::Through(last) if iova <= last => {
                counters.untranslated.add(1);
                Ok(straight(iova, last))
            }
            _ => self.miss(iova, need, counters),
        }
    }

    /// The function's context, from the cache or from the unit.
    fn context(
        &self,
        iova: Iova,
        need: Need,
        counters: &ViewCounters,
    ) -> Result<Context, DmaError> {
        if let Some(context) = self.context.get() {
            return Ok(context);
        }
        let Some(remapper) = &self.remapper else {
            return Ok(Context {
                domain: 0,
                stage: Stage::Off,
                fault_processing_disable: false,
            });
        };
        counters.context_misses.add(1);
        let context = remapper.context(self.source, iova, access(need))?;
        self.context.set(Some(context));
        self.way.set(match context.stage {
            Stage::Off => Way::Through(u64::MAX),
            Stage::PassThrough { width } => Way::Through(
                1u64.checked_shl(width.into())
                    .map_or(u64::MAX, |end| end - 1),
            ),
            Stage::First { .. } | Stage::Second { .. } => Way::Tables(context.domain),
        });
        Ok(context)
    }

    #[cold]
    fn miss(&self, iova: u64, need: Need, counters: &ViewCounters) -> Result<Target, DmaError> {
        let address = Iova(iova);
        let context = self.context(address, need, counters)?;
        let Some(remapper) = &self.remapper else {
            return Ok(straight(iova, u64::MAX));
        };
        let domain = match self.way.get() {
            Way::Through(last) => {
                counters.untranslated.add(1);
                if iova > last {
                    return Err(remapper.beyond_width(
                        self.source,
                        &context,
                        address,
                        access(need),
                    ));
                }
                return Ok(straight(iova, last));
            }
            _ => context.domain,
        };
        // The context may just have been read anew, and the translation still be there.
        if let Some(target) = self.tlb.lookup(iova, domain, need) {
            counters.hits.add(1);
            return Ok(clipped(iova, target));
        }
        counters.misses.add(1);
        let walk = |access| {
            counters.walks.add(1);
            let mapping = remapper.walk(self.source, &context, address, access)?;
            let skipped = u64::from(mapping.shift.saturating_sub(12) / 9);
            counters
                .levels
                .add(levels(&context).saturating_sub(skipped));
            Ok::<_, DmaError>(mapping)
        };
        let mut mapping = walk(access(need))?;
        // A write also finds out whether reads are allowed; if they are needed and are not, the unit
        // says so.
        if need.0 & Need::READ.0 != 0 && !mapping.read {
            mapping = walk(Access::Read)?;
        }
        self.tlb.insert(domain, &mapping);
        let offset = iova & ((1u64 << mapping.shift.min(63)) - 1);
        let target = Target {
            gpa: mapping.gpa.0.saturating_add(offset),
            room: (1u64 << mapping.shift.min(63)) - offset,
        };
        Ok(clipped(iova, target))
    }

    /// Drops what is no longer valid.
    pub(crate) fn apply(&self, invalidation: Invalidation, counters: &ViewCounters) {
        if self.remapper.is_none() {
            return;
        }
        let context_domain = self.context.get().map(|context| context.domain);
        let dropped = match invalidation {
            Invalidation::Nothing => 0,
            Invalidation::Everything => {
                self.drop_context();
                self.tlb.clear()
            }
            Invalidation::Contexts => self.drop_context(),
            Invalidation::DomainContexts { domain } if context_domain == Some(domain) => {
                self.drop_context()
            }
            Invalidation::SourceContexts { source, mask } if matches(source, mask, self.source) => {
                self.drop_context()
            }
            Invalidation::DomainContexts { .. } | Invalidation::SourceContexts { .. } => 0,
            Invalidation::Translations => self.tlb.clear(),
            Invalidation::DomainTranslations { domain } => self.tlb.drop_domain(domain),
            Invalidation::PageTranslations {
                domain,
                start,
                last,
            } => self.tlb.drop_pages(domain, start, last),
        };
        counters.dropped.add(dropped);
    }

    /// Returns the number of translations that this drops: none, as in hardware.
    fn drop_context(&self) -> u64 {
        self.context.set(None);
        self.way.set(Way::Unknown);
        0
    }
}

/// The access that a fault is recorded for.
fn access(need: Need) -> Access {
    if need.0 & Need::WRITE.0 != 0 {
        Access::Write
    } else {
        Access::Read
    }
}

fn levels(context: &Context) -> u64 {
    match context.stage {
        Stage::First { levels, .. } | Stage::Second { levels, .. } => levels.into(),
        Stage::Off | Stage::PassThrough { .. } => 0,
    }
}

/// `iova` as it is; `last` is the last address for which that is so.
#[inline]
fn straight(iova: u64, last: u64) -> Target {
    let target = Target {
        gpa: iova,
        room: (last - iova).saturating_add(1),
    };
    clipped(iova, target)
}

/// Nothing that begins below the interrupt range reaches into it.
#[inline]
fn clipped(iova: u64, target: Target) -> Target {
    if iova < INTERRUPTS.0 {
        Target {
            room: target.room.min(INTERRUPTS.0 - iova),
            ..target
        }
    } else {
        target
    }
}

//! Invalidation descriptors (section 6.5.2): from words to what they ask for.

use super::Options;
use super::spec::descriptors::{
    DID_SHIFT, G, G_SHIFT, TYPE_HIGH, TYPE_HIGH_SHIFT, TYPE_LOW, context, device_tlb, interrupt,
    iotlb, kind, pasid_cache, pasid_device_tlb, pasid_iotlb, wait,
};
use super::spec::registers::{granularity, iqei, iva};
use crate::{Invalidation, Iova, SourceId};

/// A descriptor without error.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Descriptor {
    /// Context-cache invalidate.
    Context(Invalidation),
    /// PASID-cache invalidate.
    Pasid(Invalidation),
    /// IOTLB invalidate, with or without PASID.
    Iotlb(Invalidation),
    /// Device-TLB invalidate, with or without PASID. No function has a device-TLB, so it is done.
    DeviceTlb,
    /// Interrupt entry cache invalidate, everything.
    Interrupts,
    /// Interrupt entry cache invalidate, the indices equal to `index` in all but the lowest `mask`
    /// bits.
    InterruptIndices { index: u32, mask: u32 },
    /// Invalidation wait.
    Wait {
        /// Data and address of the status write.
        status: Option<(u32, u64)>,
        /// Raise the invalidation completion event.
        interrupt: bool,
    },
}

impl Descriptor {
    /// Reads a descriptor; those of 128 bits have zeros in the upper words.
    ///
    /// # Errors
    ///
    /// One of [`iqei`].
    pub(super) fn decode(words: [u64; 4], options: &Options) -> Result<Descriptor, u8> {
        let [low, high, upper @ ..] = words;
        let kind = low & TYPE_LOW | (low & TYPE_HIGH) >> TYPE_HIGH_SHIFT;
        let offered = match kind {
            kind::CONTEXT | kind::IOTLB | kind::WAIT => true,
            kind::INTERRUPT => options.interrupt_remapping,
            kind::PASID_CACHE | kind::PASID_IOTLB => options.scalable,
            kind::DEVICE_TLB => options.device_tlb,
            kind::PASID_DEVICE_TLB => options.device_tlb && options.scalable,
            _ => false,
        };
        if !offered {
            return Err(iqei::TYPE);
        }
        if upper != [0; 2] {
            return Err(iqei::RESERVED);
        }
        let (reserved_low, reserved_high) = match kind {
            kind::CONTEXT => (context::RESERVED, !0),
            kind::PASID_CACHE => (pasid_cache::RESERVED, !0),
            kind::IOTLB => (iotlb::RESERVED, iotlb::RESERVED_1),
            kind::PASID_IOTLB => (pasid_iotlb::RESERVED, iotlb::RESERVED_1),
            kind::DEVICE_TLB => (device_tlb::RESERVED, device_tlb::RESERVED_1),
            kind::PASID_DEVICE_TLB => (0, pasid_device_tlb::RESERVED_1),
            kind::INTERRUPT => (interrupt::RESERVED, !0),
            // Without page requests there is nothing to drain (ECAP.PDS clear).
            _ => (wait::RESERVED | wait::PD, wait::RESERVED_1),
        };
        if low & reserved_low != 0 || high & reserved_high != 0 {
            return Err(iqei::RESERVED);
        }
        let granularity = (low & G) >> G_SHIFT;
        let domain = half(low, DID_SHIFT);
        match kind {
            kind::CONTEXT => contexts(
                granularity,
                domain,
                SourceId(half(low, context::SID_SHIFT)),
                low >> context::FM_SHIFT,
            )
            .map(Descriptor::Context),
            kind::PASID_CACHE => match granularity {
                // No function sends PASIDs, so only the one that stands for "without" is cached, once
                // for each function: the domain is as fine as it gets.
                pasid_cache::DOMAIN | pasid_cache::PASID => {
                    Some(Invalidation::DomainContexts { domain })
                }
                pasid_cache::GLOBAL => Some(Invalidation::Contexts),
                _ => None,
            }
            .map(Descriptor::Pasid),
            kind::IOTLB => translations(granularity, domain, high).map(Descriptor::Iotlb),
            kind::PASID_IOTLB => match granularity {
                pasid_iotlb::PASID => Some(Invalidation::DomainTranslations { domain }),
                pasid_iotlb::PAGES => pages(domain, high),
                _ => None,
            }
            .map(Descriptor::Iotlb),
            kind::DEVICE_TLB | kind::PASID_DEVICE_TLB => Some(Descriptor::DeviceTlb),
            kind::INTERRUPT if low & interrupt::SELECTIVE == 0 => Some(Descriptor::Interrupts),
            kind::INTERRUPT => {
                let mask = low >> interrupt::IM_SHIFT & interrupt::IM;
                (mask <= u64::from(Options::MAX_HANDLE_MASK)).then(|| {
                    Descriptor::InterruptIndices {
                        index: u32::from(half(low, interrupt::IIDX_SHIFT)),
                        // At most fifteen.
                        mask: u32::try_from(mask).unwrap_or(0),
                    }
                })
            }
            _ => Some(Descriptor::Wait {
                status: (low & wait::SW != 0).then(|| {
                    // The upper half of a word.
                    let data = u32::try_from(low >> wait::DATA_SHIFT).unwrap_or(0);
                    (data, high)
                }),
                interrupt: low & wait::IF != 0,
            }),
        }
        .ok_or(iqei::RESERVED)
    }
}

/// A context-cache invalidation (6.5.2.1, 11.4.6.1); `None` if the granularity is reserved.
pub(super) fn contexts(
    granularity: u64,
    domain: u16,
    source: SourceId,
    function_mask: u64,
) -> Option<Invalidation> {
    match granularity {
        granularity::GLOBAL => Some(Invalidation::Contexts),
        granularity::DOMAIN => Some(Invalidation::DomainContexts { domain }),
        granularity::SELECTIVE => Some(Invalidation::SourceContexts {
            source,
            mask: match function_mask & 0b11 {
                0b00 => 0,
                0b01 => 0b100,
                0b10 => 0b110,
                _ => 0b111,
            },
        }),
        _ => None,
    }
}

/// An IOTLB invalidation (6.5.2.3, 11.4.8.1); `address` is laid out as the Invalidate Address register.
/// `None` if the granularity or the address mask is not allowed.
pub(super) fn translations(granularity: u64, domain: u16, address: u64) -> Option<Invalidation> {
    match granularity {
        granularity::GLOBAL => Some(Invalidation::Translations),
        granularity::DOMAIN => Some(Invalidation::DomainTranslations { domain }),
        granularity::SELECTIVE => pages(domain, address),
        _ => None,
    }
}

fn pages(domain: u16, address: u64) -> Option<Invalidation> {
    let mask = address & iva::AM;
    if mask > u64::from(Options::MAX_ADDRESS_MASK) {
        return None;
    }
    let within = (1 << (12 + mask)) - 1;
    let start = address & iva::ADDR & !within;
    Some(Invalidation::PageTranslations {
        domain,
        start: Iova(start),
        last: Iova(start | within),
    })
}

/// Sixteen bits from `shift` on.
pub(super) fn half(word: u64, shift: u32) -> u16 {
    u16::try_from(word >> shift & 0xffff).unwrap_or(0)
}

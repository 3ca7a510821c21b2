//! What the unit has done, for people and benchmark results.

use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use crate::Invalidation;

/// What the unit has done since it was built.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct UnitCounters {
    /// Invalidations that came through the queue.
    pub queued: InvalidationCounters,
    /// Invalidations that came through registers.
    pub registers: InvalidationCounters,
    /// Invalidation wait descriptors that have completed.
    pub waits: u64,
    /// Time that they took from being read to completing, in nanoseconds, in all.
    pub wait_ns: u64,
    /// The longest of them, in nanoseconds.
    pub wait_max_ns: u64,
    /// Of these, waits that found a worker using what was taken away, and were left to the unit's own
    /// thread.
    pub waits_blocked: u64,
    /// Errors that stopped the invalidation queue.
    pub queue_errors: u64,
    /// Faults recorded.
    pub faults: u64,
    /// Faults lost because all recording registers were in use.
    pub faults_lost: u64,
    /// Context entries read.
    pub contexts_read: u64,
    /// Translations read from page tables.
    pub walks: u64,
    /// Page-table levels read for them.
    pub levels_read: u64,
    /// Interrupt requests that passed.
    pub interrupts: u64,
    /// Interrupt requests that were blocked.
    pub interrupts_blocked: u64,
}

/// Invalidations by type.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct InvalidationCounters {
    /// Context cache, everything.
    pub context_global: u64,
    /// Context cache, one domain.
    pub context_domain: u64,
    /// Context cache, one device.
    pub context_device: u64,
    /// PASID cache, any granularity.
    pub pasid: u64,
    /// IOTLB, everything.
    pub iotlb_global: u64,
    /// IOTLB, one domain.
    pub iotlb_domain: u64,
    /// IOTLB, pages.
    pub iotlb_pages: u64,
    /// Device-TLB.
    pub device_tlb: u64,
    /// Interrupt entry cache, any granularity.
    pub interrupt: u64,
}

/// Counts invalidations of one interface.
#[derive(Default)]
pub(super) struct InvalidationCount {
    context: [AtomicU64; 3],
    pasid: AtomicU64,
    iotlb: [AtomicU64; 3],
    device_tlb: AtomicU64,
    interrupt: AtomicU64,
}

impl InvalidationCount {
    pub(super) fn context(&self, what: Invalidation) {
        add(match what {
            Invalidation::DomainContexts { .. } => &self.context[1],
            Invalidation::SourceContexts { .. } => &self.context[2],
            _ => &self.context[0],
        });
    }

    pub(super) fn pasid(&self) {
        add(&self.pasid);
    }

    pub(super) fn iotlb(&self, what: Invalidation) {
        add(match what {
            Invalidation::DomainTranslations { .. } => &self.iotlb[1],
            Invalidation::PageTranslations { .. } => &self.iotlb[2],
            _ => &self.iotlb[0],
        });
    }

    pub(super) fn device_tlb(&self) {
        add(&self.device_tlb);
    }

    pub(super) fn interrupt(&self) {
        add(&self.interrupt);
    }

    pub(super) fn snapshot(&self) -> InvalidationCounters {
        let get = |count: &AtomicU64| count.load(Ordering::Relaxed);
        InvalidationCounters {
            context_global: get(&self.context[0]),
            context_domain: get(&self.context[1]),
            context_device: get(&self.context[2]),
            pasid: get(&self.pasid),
            iotlb_global: get(&self.iotlb[0]),
            iotlb_domain: get(&self.iotlb[1]),
            iotlb_pages: get(&self.iotlb[2]),
            device_tlb: get(&self.device_tlb),
            interrupt: get(&self.interrupt),
        }
    }
}

/// Counts wait descriptors.
#[derive(Default)]
pub(super) struct WaitCount {
    pub(super) count: AtomicU64,
    pub(super) ns: AtomicU64,
    pub(super) max_ns: AtomicU64,
    pub(super) blocked: AtomicU64,
}

impl WaitCount {
    pub(super) fn done(&self, took: Duration) {
        let ns = u64::try_from(took.as_nanos()).unwrap_or(u64::MAX);
        add(&self.count);
        self.ns.fetch_add(ns, Ordering::Relaxed);
        self.max_ns.fetch_max(ns, Ordering::Relaxed);
    }

    pub(super) fn blocked(&self) {
        add(&self.blocked);
    }
}

pub(super) fn add(count: &AtomicU64) {
    count.fetch_add(1, Ordering::Relaxed);
}

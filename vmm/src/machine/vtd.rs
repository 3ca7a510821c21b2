//! The machine's remapping unit: made from its description, reached by the vCPUs, counted.

use std::sync::{Arc, Once};

use iommu::vtd::{
    AddressWidths, InvalidationCounters, IotlbGeometry, LargePages, Options, Unit, UnitCounters,
};
use iommu::{DmaStats, GuestRam, Invalidations, MsiLine, Upstream};
use kvm_ioctls::VmFd;
use serde::Serialize;

use super::devices::Backends;
use super::vtd_trace::RegisterTrace;
use super::{IommuSpec, LargestPage, MachineError, MachineSpec};
use crate::acpi::DmarConfig;
use crate::kvm::{Host, KvmMsiSink};
use crate::layout;

impl IommuSpec {
    /// What the unit is made from, on a machine with physical addresses of `address_bits`; `x2apic`
    /// says whether interrupt destinations are 32 bits wide.
    pub(super) fn options(&self, address_bits: u8, x2apic: bool) -> Options {
        let large = self.largest_page;
        Options {
            host_address_width: address_bits.clamp(32, 52),
            address_widths: AddressWidths {
                bits_39: true,
                bits_48: self.address_width >= 48,
                bits_57: self.address_width >= 57,
            },
            large_pages: LargePages {
                mib_2: large != LargestPage::Kib4,
                gib_1: large == LargestPage::Gib1,
            },
            scalable: self.scalable,
            first_stage: self.first_stage,
            second_stage: self.second_stage,
            first_stage_1g: large == LargestPage::Gib1,
            first_stage_5_level: self.address_width >= 57,
            caching_mode: self.caching_mode,
            coherent: self.coherent,
            scalable_coherent: self.coherent,
            pass_through: self.pass_through,
            interrupt_remapping: self.interrupt_remapping,
            extended_interrupt_mode: self.interrupt_remapping && x2apic,
            iotlb: IotlbGeometry {
                sets: self.iotlb_sets.into(),
                ways: self.iotlb_ways.into(),
            },
            fault_records: self.fault_registers.into(),
            ..Options::default()
        }
    }
}

/// What the board is built on: the remapping unit if there is one, and the ways through it.
pub(super) struct Remapping {
    pub(super) unit: Option<RemappingUnit>,
    /// What the DMAR table says of the unit.
    pub(super) dmar: Option<DmarConfig>,
    /// What functions are built on.
    pub(super) upstream: Upstream,
    /// The IOAPIC's.
    pub(super) pins: Vec<Arc<dyn MsiLine>>,
}

impl Remapping {
    pub(super) fn new(
        machine: &MachineSpec,
        backends: &Backends,
        host: &Host,
        vm: &Arc<VmFd>,
        ram: &GuestRam,
        address_bits: u8,
    ) -> Result<Remapping, MachineError> {
        let sink = Arc::new(KvmMsiSink::new(Arc::clone(vm)));
        let pins = sink.open_ioapic_pins().map_err(MachineError::Interrupts)?;
        let Some(spec) = &machine.iommu else {
            return Ok(Remapping {
                unit: None,
                dmar: None,
                upstream: Upstream::new(ram.clone(), sink),
                pins,
            });
        };
        let options = spec.options(address_bits, wide_destinations(spec, host, vm)?);
        let dmar = DmarConfig {
            host_address_width: options.host_address_width,
            interrupt_remapping: options.interrupt_remapping,
        };
        let iotlb = options.iotlb;
        let invalidations = Invalidations::new();
        let unit = Unit::new(ram.clone(), options, sink, Arc::clone(&invalidations))
            .map_err(MachineError::Iommu)?;
        let remapper = Arc::clone(&unit) as _;
        let source = layout::IOAPIC_SOURCE.source_id();
        // Test kernels are written against QEMU, which does not verify its IOAPIC's requests.
        let pins = pins.into_iter().map(|pin| {
            if machine.test_ports {
                unit.wrap_unverified_line(source, pin)
            } else {
                unit.wrap_line(source, pin)
            }
        });
        Ok(Remapping {
            pins: pins.collect(),
            dmar: Some(dmar),
            upstream: Upstream::new(ram.clone(), unit.sink()).below(remapper, invalidations, iotlb),
            unit: Some(RemappingUnit::new(unit, backends.iommu_trace.clone(), ram)),
        })
    }
}

/// Whether interrupt destinations are to be 32 bits wide, on this VM from now on.
///
/// # Errors
///
/// They were asked for, and the host's KVM has none.
fn wide_destinations(spec: &IommuSpec, host: &Host, vm: &VmFd) -> Result<bool, MachineError> {
    static WARNED: Once = Once::new();
    if !spec.interrupt_remapping || spec.x2apic == Some(false) {
        return Ok(false);
    }
    let wide = host.enable_wide_destinations(vm)?;
    if !wide && spec.x2apic == Some(true) {
        return Err(MachineError::WideDestinations);
    }
    if !wide {
        WARNED.call_once(|| {
            tracing::warn!(
                "this host's KVM lacks KVM_CAP_X2APIC_API: the IOMMU remaps interrupts without EIM, \
                 so the guest's APICs stay out of x2APIC mode"
            );
        });
    }
    Ok(wide)
}

/// The unit as the vCPUs reach it.
pub(super) struct RemappingUnit {
    unit: Arc<Unit>,
    trace: Option<(Arc<RegisterTrace>, GuestRam)>,
}

impl RemappingUnit {
    /// A unit after machine reset, which reads its queue from `ram`.
    pub(super) fn new(
        unit: Arc<Unit>,
        trace: Option<Arc<RegisterTrace>>,
        ram: &GuestRam,
    ) -> RemappingUnit {
        if let Some(trace) = &trace {
            trace.reset();
        }
        let trace = trace.map(|trace| (trace, ram.clone()));
        RemappingUnit { unit, trace }
    }

    pub(super) fn unit(&self) -> &Arc<Unit> {
        &self.unit
    }

    pub(super) fn read(&self, offset: u64, data: &mut [u8]) {
        self.unit.read(offset, data);
        if let Some((trace, _)) = &self.trace {
            trace.read(offset, data);
        }
    }

    pub(super) fn write(&self, offset: u64, data: &[u8]) {
        match &self.trace {
            None => self.unit.write(offset, data),
            Some((trace, ram)) => trace.write(&self.unit, ram, offset, data),
        }
    }
}

/// What the IOMMU did, as a snapshot for people and programs.
#[derive(Clone, Debug, Default, Serialize)]
pub struct IommuStats {
    /// Addresses of all functions that were looked up.
    pub translations: u64,
    /// Of these, those that pass through untranslated.
    pub pass_through: u64,
    /// Of these, translations that an IOTLB had.
    pub iotlb_hits: u64,
    /// Of these, translations that took a walk through the tables.
    pub iotlb_misses: u64,
    /// Walks that ended with a translation.
    pub walks: u64,
    /// Levels of page tables read by walks.
    pub levels_read: u64,
    /// Context entries read.
    pub contexts_read: u64,
    /// Invalidations by type.
    pub invalidations: IommuInvalidations,
    /// Invalidation wait descriptors.
    pub waits: IommuWaits,
    /// Errors that stopped the invalidation queue.
    pub queue_errors: u64,
    /// Faults recorded.
    pub faults: u64,
    /// Faults lost because all recording registers were in use.
    pub faults_lost: u64,
    /// Interrupt requests.
    pub interrupts: IommuInterrupts,
}

/// Invalidations that came through the queue and through registers, together.
#[derive(Clone, Debug, Default, Serialize)]
pub struct IommuInvalidations {
    /// All of them.
    pub total: u64,
    /// Of these, those that came through registers.
    pub by_register: u64,
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

/// Invalidation wait descriptors.
#[derive(Clone, Debug, Default, Serialize)]
pub struct IommuWaits {
    /// Completed.
    pub count: u64,
    /// From being read to completing, in nanoseconds, in all.
    pub ns: u64,
    /// The longest, in nanoseconds.
    pub max_ns: u64,
    /// Those that found a worker using what was taken away, and had to wait for it to drain.
    pub drains: u64,
}

/// Interrupt requests of devices and of the IOAPIC.
#[derive(Clone, Debug, Default, Serialize)]
pub struct IommuInterrupts {
    /// Passed through the remapper.
    pub remapped: u64,
    /// Blocked.
    pub blocked: u64,
}

impl IommuStats {
    /// From the unit's counters and those of its functions.
    pub(super) fn new(
        unit: &UnitCounters,
        functions: impl Iterator<Item = DmaStats>,
    ) -> IommuStats {
        let (mut translations, mut pass_through, mut hits, mut misses) = (0u64, 0u64, 0u64, 0u64);
        for function in functions {
            translations = translations.saturating_add(function.translations);
            pass_through = pass_through.saturating_add(function.pass_through);
            hits = hits.saturating_add(function.iotlb_hits);
            misses = misses.saturating_add(function.iotlb_misses);
        }
        IommuStats {
            translations,
            pass_through,
            iotlb_hits: hits,
            iotlb_misses: misses,
            walks: unit.walks,
            levels_read: unit.levels_read,
            contexts_read: unit.contexts_read,
            invalidations: IommuInvalidations::new(&unit.queued, &unit.registers),
            waits: IommuWaits {
                count: unit.waits,
                ns: unit.wait_ns,
                max_ns: unit.wait_max_ns,
                drains: unit.waits_blocked,
            },
            queue_errors: unit.queue_errors,
            faults: unit.faults,
            faults_lost: unit.faults_lost,
            interrupts: IommuInterrupts {
                remapped: unit.interrupts,
                blocked: unit.interrupts_blocked,
            },
        }
    }
}

impl IommuInvalidations {
    fn new(queued: &InvalidationCounters, registers: &InvalidationCounters) -> Self {
        let sum = |field: fn(&InvalidationCounters) -> u64| {
            field(queued).saturating_add(field(registers))
        };
        let mut all = IommuInvalidations {
            context_global: sum(|count| count.context_global),
            context_domain: sum(|count| count.context_domain),
            context_device: sum(|count| count.context_device),
            pasid: sum(|count| count.pasid),
            iotlb_global: sum(|count| count.iotlb_global),
            iotlb_domain: sum(|count| count.iotlb_domain),
            iotlb_pages: sum(|count| count.iotlb_pages),
            device_tlb: sum(|count| count.device_tlb),
            interrupt: sum(|count| count.interrupt),
            total: 0,
            by_register: total(registers),
        };
        all.total = total(queued).saturating_add(all.by_register);
        all
    }
}

fn total(counters: &InvalidationCounters) -> u64 {
    let InvalidationCounters {
        context_global,
        context_domain,
        context_device,
        pasid,
        iotlb_global,
        iotlb_domain,
        iotlb_pages,
        device_tlb,
        interrupt,
    } = *counters;
    [
        context_global,
        context_domain,
        context_device,
        pasid,
        iotlb_global,
        iotlb_domain,
        iotlb_pages,
        device_tlb,
        interrupt,
    ]
    .into_iter()
    .fold(0, u64::saturating_add)
}

//! What a machine has done so far, as a snapshot for people and programs.

use std::collections::BTreeMap;
use std::sync::Arc;

use iommu::DmaStats;
use iommu::vtd::Unit;
use serde::Serialize;

use super::IommuStats;
use super::devices::Devices;
use crate::cpu::ExitCounts;
use crate::kvm::KvmStats;

/// A snapshot of a machine's counters. They are read one by one while the machine runs.
#[derive(Clone, Debug, Default, Serialize)]
pub struct MachineStats {
    /// Seconds since the machine was started; restarts do not count.
    pub uptime_s: f64,
    /// Milliseconds from the start of the machine's assembly to the guest's first exit.
    pub first_exit_ms: Option<f64>,
    /// KVM's counters of the VM, by KVM's names.
    pub vm: BTreeMap<String, u64>,
    /// Virtual CPUs by number.
    pub vcpus: Vec<VcpuStats>,
    /// The IOMMU, if the machine has one.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub iommu: Option<IommuStats>,
    /// Devices by the user's name for them.
    pub devices: BTreeMap<String, DeviceStats>,
}

/// One vCPU.
#[derive(Clone, Debug, Default, Serialize)]
pub struct VcpuStats {
    /// KVM's counters, by KVM's names: `exits` is all VM exits, `io_exits`, `mmio_exits` and so on
    /// are kinds of them. Empty where KVM has no binary statistics (before Linux 5.14).
    pub kvm: BTreeMap<String, u64>,
    /// Exits that went on to user space.
    pub user_exits: ExitCounts,
}

/// One device.
#[derive(Clone, Debug, Serialize)]
pub struct DeviceStats {
    /// `nvme`, `virtio-net`, `virtio-vsock`, `edu` or `dma-probe`.
    pub kind: &'static str,
    /// Bus, device and function number.
    pub address: String,
    /// What its workers' IOTLBs did; absent without an IOMMU.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub dma: Option<DmaStats>,
    /// Counters in the device's own form.
    pub counters: serde_json::Value,
}

type ExitCounter = Box<dyn Fn() -> ExitCounts + Send + Sync>;

/// Where the numbers of a running machine come from.
pub(super) struct Sources {
    pub(super) vm: Option<KvmStats>,
    pub(super) vcpus: Vec<(Option<KvmStats>, ExitCounter)>,
    pub(super) devices: Devices,
    pub(super) iommu: Option<Arc<Unit>>,
}

impl Sources {
    /// Fills in what it knows.
    pub(super) fn read(&self, stats: &mut MachineStats) {
        stats.vm = counters(self.vm.as_ref());
        stats.vcpus = self
            .vcpus
            .iter()
            .map(|(kvm, exits)| VcpuStats {
                kvm: counters(kvm.as_ref()),
                user_exits: exits(),
            })
            .collect();
        stats.devices = self.devices.stats();
        stats.iommu = self
            .iommu
            .as_ref()
            .map(|unit| IommuStats::new(&unit.counters(), self.devices.dma()));
    }
}

fn counters(source: Option<&KvmStats>) -> BTreeMap<String, u64> {
    source
        .and_then(|stats| stats.read().ok())
        .unwrap_or_default()
}

//! The machine's PCI devices: their back ends, opened once, and the devices, made anew at a reboot.

use std::collections::BTreeMap;
use std::sync::Arc;

use iommu::{GuestRam, MsiSink};
use pci::RootComplex;

use super::stats::DeviceStats;
use super::{MachineError, MachineSpec};

/// Storage and network attachments. They outlive a guest's reboot: a memory disk keeps its data.
pub(super) struct Backends {}

impl Backends {
    pub(super) fn open(_spec: &MachineSpec) -> Result<Backends, MachineError> {
        Ok(Backends {})
    }
}

/// The devices on the bus.
#[derive(Clone, Default)]
pub(super) struct Devices {}

impl Devices {
    pub(super) fn attach(
        _spec: &MachineSpec,
        _backends: &Backends,
        _root: &Arc<RootComplex>,
        _ram: &GuestRam,
        _sink: &Arc<dyn MsiSink>,
    ) -> Result<Devices, MachineError> {
        Ok(Devices {})
    }

    pub(super) fn stats(&self) -> BTreeMap<String, DeviceStats> {
        BTreeMap::new()
    }
}

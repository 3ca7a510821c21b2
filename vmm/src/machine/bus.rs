//! Where a vCPU's accesses outside RAM go.

use std::sync::Arc;

use iommu::Gpa;
use pci::RootComplex;

use crate::cpu::{GuestBus, Request};
use crate::ioapic::IoApic;
use crate::layout;
use crate::platform::Platform;

use super::vtd::RemappingUnit;

/// IOAPIC, remapping unit, PCI and the platform's ports. What nobody claims reads as ones and swallows stores.
pub struct MachineBus {
    pub(super) ioapic: Arc<IoApic>,
    pub(super) iommu: Option<RemappingUnit>,
    pub(super) root: Arc<RootComplex>,
    pub(super) platform: Platform,
}

impl GuestBus for MachineBus {
    fn pio_read(&self, port: u16, data: &mut [u8]) {
        if !(layout::PCI_CONFIG.contains(&port) && self.root.pio_read(port, data)) {
            self.platform.read(port, data);
        }
    }

    fn pio_write(&self, port: u16, data: &[u8]) -> Option<Request> {
        if layout::PCI_CONFIG.contains(&port) && self.root.pio_write(port, data) {
            return None;
        }
        self.platform.write(port, data)
    }

    fn mmio_read(&self, address: u64, data: &mut [u8]) {
        if layout::IOAPIC.contains(&address) {
            self.ioapic.read(address - layout::IOAPIC.start, data);
        } else if let Some(iommu) = &self.iommu
            && layout::VTD.contains(&address)
        {
            iommu.read(address - layout::VTD.start, data);
        } else if !self.root.mmio_read(Gpa(address), data) {
            data.fill(0xff);
        }
    }

    fn mmio_write(&self, address: u64, data: &[u8]) {
        if layout::IOAPIC.contains(&address) {
            self.ioapic.write(address - layout::IOAPIC.start, data);
        } else if let Some(iommu) = &self.iommu
            && layout::VTD.contains(&address)
        {
            iommu.write(address - layout::VTD.start, data);
        } else {
            self.root.mmio_write(Gpa(address), data);
        }
    }

    fn end_of_interrupt(&self, vector: u8) {
        self.ioapic.end_of_interrupt(vector);
    }
}

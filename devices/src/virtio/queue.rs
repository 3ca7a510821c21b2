//! A ring with its notification and its interrupt.

use std::os::fd::{AsRawFd, RawFd};
use std::sync::Arc;

use iommu::{DmaMemory, DmaSection};
use vmm_sys_util::eventfd::EventFd;

use super::ring::{Ring, RingError};
use super::transport::Transport;

/// One enabled queue, owned by the worker that serves it.
pub struct Virtqueue {
    /// Its index in the device.
    pub index: u16,
    /// The ring.
    pub ring: Ring,
    notify: Arc<EventFd>,
    transport: Arc<Transport>,
}

impl Virtqueue {
    pub(super) fn new(
        index: u16,
        ring: Ring,
        notify: Arc<EventFd>,
        transport: Arc<Transport>,
    ) -> Virtqueue {
        Virtqueue {
            index,
            ring,
            notify,
            transport,
        }
    }

    /// Interrupts the driver.
    pub fn interrupt(&self) {
        self.transport.queue_interrupt(self.index);
    }

    /// Forgets the driver's notifications so far; returns how many there were.
    pub fn take_notifications(&self) -> u64 {
        // Nothing to read is no error here.
        self.notify.read().unwrap_or(0)
    }

    /// Readable when the driver has notified the device, or bus mastering came back.
    pub fn fd(&self) -> RawFd {
        self.notify.as_raw_fd()
    }

    /// Hands the queued used entries to the driver and returns how many of them want an interrupt:
    /// all or none. Errors are reported; entries that a halted function cannot publish are published
    /// by the next call. In a section of `mem`.
    pub fn publish(&mut self, mem: &DmaMemory) -> u32 {
        let result = self.ring.publish(mem).and_then(|count| {
            // Not only for what is new: the driver's wish may not have been readable last time.
            let wanted = self.ring.wants_interrupt(mem)?;
            Ok(if wanted { u32::from(count.max(1)) } else { 0 })
        });
        result.unwrap_or_else(|error| {
            self.report(error);
            0
        })
    }

    /// Logs something about this queue that the guest can cause; rate limited.
    pub fn warn(&self, message: &dyn std::fmt::Display) {
        self.transport.warn(Some(self.index), message);
    }

    /// Reports a broken ring, which stops the device. A halted function is nothing to report.
    pub fn report(&self, error: RingError) {
        if let RingError::Broken(fault) = error {
            self.transport.needs_reset(Some(self.index), &fault);
        }
    }
}

/// A queue task's way to guest memory.
pub struct DmaTask {
    mem: DmaMemory,
    transport: Arc<Transport>,
}

impl DmaTask {
    /// For a device on `transport`.
    pub fn new(mem: DmaMemory, transport: &Arc<Transport>) -> DmaTask {
        DmaTask {
            mem,
            transport: Arc::clone(transport),
        }
    }

    /// The task's own view.
    pub fn mem(&self) -> &DmaMemory {
        &self.mem
    }

    /// Opens a section, if the task may work: the device is not broken and the function may master
    /// the bus. A task that may not leaves back-end descriptors out of its sleep; it is notified
    /// when bus mastering comes back.
    ///
    /// Bus mastering can go off inside the section, but then not on again before the section ends,
    /// so a failed access can be told from one outside of memory by looking once more.
    pub fn enter(&self) -> Option<DmaSection<'_>> {
        let section = self.mem.section();
        (!self.transport.is_broken() && self.mem.space().bus_master()).then_some(section)
    }
}

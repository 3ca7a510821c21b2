//! The modern PCI transport in the driver's hands (Virtio 1.2, 4.1).

use std::sync::Arc;

use pci::spec as pci_spec;
use vm_memory::ByteValued;

use super::queue::GuestQueue;
use crate::{GuestBar, GuestFunction, GuestVector, Machine};

/// Offsets in the common configuration (4.1.4.3).
pub mod common {
    #![expect(missing_docs, reason = "the names are the specification's")]

    pub const DEVICE_FEATURE_SELECT: u64 = 0;
    pub const DEVICE_FEATURE: u64 = 4;
    pub const DRIVER_FEATURE_SELECT: u64 = 8;
    pub const DRIVER_FEATURE: u64 = 12;
    pub const CONFIG_MSIX_VECTOR: u64 = 16;
    pub const NUM_QUEUES: u64 = 18;
    pub const DEVICE_STATUS: u64 = 20;
    pub const CONFIG_GENERATION: u64 = 21;
    pub const QUEUE_SELECT: u64 = 22;
    pub const QUEUE_SIZE: u64 = 24;
    pub const QUEUE_MSIX_VECTOR: u64 = 26;
    pub const QUEUE_ENABLE: u64 = 28;
    pub const QUEUE_NOTIFY_OFF: u64 = 30;
    pub const QUEUE_DESC: u64 = 32;
    pub const QUEUE_DRIVER: u64 = 40;
    pub const QUEUE_DEVICE: u64 = 48;
    pub const QUEUE_NOTIFY_DATA: u64 = 56;
    pub const QUEUE_RESET: u64 = 58;
}

/// Device status bits (2.1).
pub mod status {
    #![expect(missing_docs, reason = "the names are the specification's")]

    pub const ACKNOWLEDGE: u8 = 1;
    pub const DRIVER: u8 = 2;
    pub const DRIVER_OK: u8 = 4;
    pub const FEATURES_OK: u8 = 8;
    pub const NEEDS_RESET: u8 = 64;
    pub const FAILED: u8 = 128;
}

/// A structure in a BAR.
#[derive(Clone)]
pub struct Structure {
    /// The BAR.
    pub bar: GuestBar,
    /// Where in it.
    pub offset: u64,
    /// How long.
    pub length: u64,
}

impl Structure {
    /// A load.
    pub fn read<T: ByteValued>(&self, offset: u64) -> T {
        self.bar.read(self.offset + offset)
    }

    /// A store.
    pub fn write<T: ByteValued>(&self, offset: u64, value: T) {
        self.bar.write(self.offset + offset, value);
    }
}

/// A virtio function as its driver found it.
pub struct VirtioFunction {
    /// The PCI side.
    pub function: GuestFunction,
    /// Common configuration.
    pub common: Structure,
    /// Notifications.
    pub notify: Structure,
    /// ISR status.
    pub isr: Structure,
    /// Device-specific configuration.
    pub device: Structure,
    /// Place of the configuration access capability.
    pub window: u16,
    notify_multiplier: u32,
    /// The MSI-X vectors, unmasked, if [`VirtioFunction::setup_msix`] was called.
    pub vectors: Vec<GuestVector>,
}

impl VirtioFunction {
    /// Finds the function in slot `device`, places its BARs and reads its capabilities.
    pub fn probe(machine: &Arc<Machine>, device: u8) -> VirtioFunction {
        VirtioFunction::new(GuestFunction::probe(machine, device))
    }

    /// Reads the capabilities of a function whose BARs are placed.
    pub fn new(function: GuestFunction) -> VirtioFunction {
        assert_eq!(function.config::<u16>(pci_spec::VENDOR_ID), 0x1af4);
        let mut found: [Option<Structure>; 5] = Default::default();
        let mut notify_multiplier = 0;
        let mut window = 0;
        for (id, at) in function.capabilities() {
            if id != 9 {
                continue;
            }
            let kind: u8 = function.config(at + 3);
            let bar: u8 = function.config(at + 4);
            if kind == 2 {
                notify_multiplier = function.config(at + 16);
            }
            if kind == 5 {
                window = at;
            } else if let Some(slot @ None) = found.get_mut(usize::from(kind)) {
                *slot = Some(Structure {
                    bar: function.bar(bar),
                    offset: function.config::<u32>(at + 8).into(),
                    length: function.config::<u32>(at + 12).into(),
                });
            }
        }
        let [_, common, notify, isr, device] = found;
        let missing = "a capability of each kind";
        let device_id: u16 = function.config(pci_spec::DEVICE_ID);
        assert!(device_id >= 0x1040 && window != 0, "{missing}");
        VirtioFunction {
            function,
            common: common.expect(missing),
            notify: notify.expect(missing),
            isr: isr.expect(missing),
            device: device.expect(missing),
            window,
            notify_multiplier,
            vectors: Vec::new(),
        }
    }

    /// Enables MSI-X with `count` vectors.
    pub fn setup_msix(&mut self, count: u16) {
        self.vectors = self.function.setup_msix(count);
    }

    /// The device status.
    pub fn status(&self) -> u8 {
        self.common.read(common::DEVICE_STATUS)
    }

    /// Sets status bits, keeping those that are set.
    pub fn add_status(&self, bits: u8) {
        self.common
            .write(common::DEVICE_STATUS, self.status() | bits);
    }

    /// Resets the device; it must be done when the store returns.
    pub fn reset(&self) {
        self.common.write(common::DEVICE_STATUS, 0u8);
        assert_eq!(self.status(), 0, "the reset is not over");
    }

    /// What the device offers.
    pub fn offered(&self) -> u64 {
        let half = |select: u32| -> u64 {
            self.common.write(common::DEVICE_FEATURE_SELECT, select);
            self.common.read::<u32>(common::DEVICE_FEATURE).into()
        };
        half(0) | half(1) << 32
    }

    /// Writes the driver's features.
    pub fn accept(&self, features: u64) {
        for (select, half) in [(0u32, features & 0xffff_ffff), (1, features >> 32)] {
            self.common.write(common::DRIVER_FEATURE_SELECT, select);
            let half = u32::try_from(half).expect("half");
            self.common.write(common::DRIVER_FEATURE, half);
        }
    }

    /// Resets the device and negotiates `features`; returns whether the device took them.
    pub fn negotiate(&self, features: u64) -> bool {
        self.reset();
        self.add_status(status::ACKNOWLEDGE);
        self.add_status(status::DRIVER);
        self.accept(features);
        self.add_status(status::FEATURES_OK);
        self.status() & status::FEATURES_OK != 0
    }

    /// Tells the device that the driver is ready.
    pub fn driver_ok(&self) {
        self.add_status(status::DRIVER_OK);
    }

    /// Selects a queue and returns its maximal size.
    pub fn select(&self, queue: u16) -> u16 {
        self.common.write(common::QUEUE_SELECT, queue);
        self.common.read(common::QUEUE_SIZE)
    }

    /// Where the doorbell of a queue is.
    pub fn doorbell(&self, queue: u16) -> (GuestBar, u64) {
        self.select(queue);
        let off: u16 = self.common.read(common::QUEUE_NOTIFY_OFF);
        let at = u64::from(off) * u64::from(self.notify_multiplier);
        assert!(
            at + 2 <= self.notify.length,
            "the doorbell is in the structure"
        );
        (self.notify.bar.clone(), self.notify.offset + at)
    }

    /// Makes a queue of `size` entries (0: as large as it may be), not yet told to the device.
    pub fn make_queue(&self, index: u16, size: u16, event_idx: bool) -> GuestQueue {
        let max = self.select(index);
        let size = if size == 0 { max } else { size };
        assert!(size > 0 && size <= max, "queue {index}: {size} of {max}");
        let machine = self.function.machine();
        GuestQueue::new(machine, index, size, event_idx, self.doorbell(index))
    }

    /// Tells the device where a queue is, gives it a vector, if MSI-X has it, and enables it.
    pub fn enable_queue(&self, queue: &GuestQueue, vector: Option<u16>) {
        self.describe_queue(queue);
        if let Some(vector) = vector {
            self.common.write(common::QUEUE_MSIX_VECTOR, vector);
            assert_eq!(self.common.read::<u16>(common::QUEUE_MSIX_VECTOR), vector);
        }
        self.common.write(common::QUEUE_ENABLE, 1u16);
    }

    /// Tells the device where a queue is, in 32-bit stores.
    pub fn describe_queue(&self, queue: &GuestQueue) {
        self.select(queue.index);
        self.common.write(common::QUEUE_SIZE, queue.size());
        let registers = [
            common::QUEUE_DESC,
            common::QUEUE_DRIVER,
            common::QUEUE_DEVICE,
        ];
        for (register, address) in registers.into_iter().zip(queue.addresses()) {
            let [a, b, c, d, e, f, g, h] = address.to_le_bytes();
            self.common
                .write(register, u32::from_le_bytes([a, b, c, d]));
            self.common
                .write(register + 4, u32::from_le_bytes([e, f, g, h]));
        }
    }

    /// Reads a field of the device's configuration, again if it changed meanwhile (2.5.3.1).
    pub fn config<T: ByteValued>(&self, offset: u64) -> T {
        loop {
            let before: u8 = self.common.read(common::CONFIG_GENERATION);
            let value = self.device.read(offset);
            if before == self.common.read::<u8>(common::CONFIG_GENERATION) {
                return value;
            }
        }
    }

    /// Reads BAR 0 at `offset` through the configuration access capability; `len` is 1, 2 or 4.
    pub fn window_read(&self, bar: u8, offset: u32, len: u32) -> u32 {
        self.point_window(bar, offset, len);
        self.function.config(self.window + 16)
    }

    /// Writes BAR 0 through the configuration access capability.
    pub fn window_write(&self, bar: u8, offset: u32, len: u32, value: u32) {
        self.point_window(bar, offset, len);
        self.function.set_config(self.window + 16, value);
    }

    fn point_window(&self, bar: u8, offset: u32, len: u32) {
        self.function.set_config(self.window + 4, bar);
        self.function.set_config(self.window + 8, offset);
        self.function.set_config(self.window + 12, len);
    }
}

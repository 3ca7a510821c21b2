//! The registers of the common configuration structure (Virtio 1.2, 4.1.4.3) as plain state: what
//! the driver wrote, and what follows from it.

use super::ring::RingLayout;
use super::spec::{common as at, feature, status};
use super::transport::Transport;

/// Registers of one queue.
#[derive(Clone, Copy, Debug)]
pub(super) struct QueueRegisters {
    max_size: u16,
    pub(super) layout: RingLayout,
    pub(super) enabled: bool,
    /// The driver reset this queue and may enable it again.
    was_reset: bool,
}

impl QueueRegisters {
    fn new(max_size: u16) -> QueueRegisters {
        QueueRegisters {
            max_size,
            layout: RingLayout {
                size: max_size,
                ..RingLayout::default()
            },
            enabled: false,
            was_reset: false,
        }
    }
}

/// What a write asks the function to do.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Action {
    /// Nothing more.
    None,
    /// Reset the device.
    Reset,
    /// Ask the device about the features, and if it agrees set these status bits.
    Negotiate(u8),
    /// Set these status bits, then start the device.
    Activate(u8),
    /// Start this queue of the running device.
    StartQueue(u16),
    /// Stop this queue of the running device.
    StopQueue(u16),
}

/// All registers that the driver writes.
#[derive(Debug)]
pub(super) struct Registers {
    /// What the device offers.
    offered: u64,
    device_feature_select: u32,
    driver_feature_select: u32,
    pub(super) driver_features: u64,
    /// The driver set a feature bit that no register of ours has.
    unknown_feature: bool,
    queue_select: u16,
    pub(super) queues: Vec<QueueRegisters>,
}

impl Registers {
    pub(super) fn new(offered: u64, sizes: &[u16]) -> Registers {
        Registers {
            offered,
            device_feature_select: 0,
            driver_feature_select: 0,
            driver_features: 0,
            unknown_feature: false,
            queue_select: 0,
            queues: sizes
                .iter()
                .map(|&size| QueueRegisters::new(size))
                .collect(),
        }
    }

    /// Back to power-on.
    pub(super) fn reset(&mut self) {
        let sizes: Vec<u16> = self.queues.iter().map(|queue| queue.max_size).collect();
        *self = Registers::new(self.offered, &sizes);
    }

    /// Whether the driver's features are a subset of what is offered, with `VERSION_1`.
    pub(super) fn features_fit(&self) -> bool {
        !self.unknown_feature
            && self.driver_features & !self.offered == 0
            && self.driver_features & feature::VERSION_1 != 0
    }

    /// The whole structure as bytes; reading it has no effect.
    pub(super) fn image(&self, transport: &Transport) -> [u8; at::LEN] {
        let mut image = [0; at::LEN];
        let mut put = |offset: u64, bytes: &[u8]| {
            let at = usize::try_from(offset).unwrap_or(usize::MAX);
            if let Some(place) = image.get_mut(at..).and_then(|i| i.get_mut(..bytes.len())) {
                place.copy_from_slice(bytes);
            }
        };
        let half = |features: u64, select: u32| match select {
            0 => (features & 0xffff_ffff) as u32,
            1 => (features >> 32) as u32,
            _ => 0,
        };
        put(
            at::DEVICE_FEATURE_SELECT,
            &self.device_feature_select.to_le_bytes(),
        );
        put(
            at::DEVICE_FEATURE,
            &half(self.offered, self.device_feature_select).to_le_bytes(),
        );
        put(
            at::DRIVER_FEATURE_SELECT,
            &self.driver_feature_select.to_le_bytes(),
        );
        put(
            at::DRIVER_FEATURE,
            &half(self.driver_features, self.driver_feature_select).to_le_bytes(),
        );
        put(
            at::CONFIG_MSIX_VECTOR,
            &transport.config_vector().to_le_bytes(),
        );
        let queues = u16::try_from(self.queues.len()).unwrap_or(u16::MAX);
        put(at::NUM_QUEUES, &queues.to_le_bytes());
        put(at::DEVICE_STATUS, &[transport.status()]);
        put(at::CONFIG_GENERATION, &[transport.read_config(|| ()).1]);
        put(at::QUEUE_SELECT, &self.queue_select.to_le_bytes());
        // A queue that does not exist reads as size 0 (4.1.4.3.1).
        if let Some(queue) = self.queues.get(usize::from(self.queue_select)) {
            let index = self.queue_select;
            put(at::QUEUE_SIZE, &queue.layout.size.to_le_bytes());
            put(
                at::QUEUE_MSIX_VECTOR,
                &transport.queue_vector(index).to_le_bytes(),
            );
            put(at::QUEUE_ENABLE, &u16::from(queue.enabled).to_le_bytes());
            put(at::QUEUE_NOTIFY_OFF, &index.to_le_bytes());
            put(at::QUEUE_DESC, &queue.layout.desc.to_le_bytes());
            put(at::QUEUE_DRIVER, &queue.layout.driver.to_le_bytes());
            put(at::QUEUE_DEVICE, &queue.layout.device.to_le_bytes());
            // queue_notify_data means something only with VIRTIO_F_NOTIF_CONFIG_DATA, which is not
            // offered; queue_reset reads 0, because a reset is over before the write returns.
        }
        image
    }

    /// A store of the width that the field has (4.1.3.1); others are ignored.
    pub(super) fn write(&mut self, offset: u64, data: &[u8], transport: &Transport) -> Action {
        match *data {
            [byte] if offset == at::DEVICE_STATUS => return self.write_status(byte, transport),
            [a, b] => return self.write_u16(offset, u16::from_le_bytes([a, b]), transport),
            [a, b, c, d] => {
                let value = u32::from_le_bytes([a, b, c, d]);
                match offset {
                    at::DEVICE_FEATURE_SELECT => self.device_feature_select = value,
                    at::DRIVER_FEATURE_SELECT => self.driver_feature_select = value,
                    at::DRIVER_FEATURE => self.write_driver_feature(value, transport),
                    _ => self.write_address(offset, &value.to_le_bytes()),
                }
            }
            [_, _, _, _, _, _, _, _] if offset.is_multiple_of(8) => {
                self.write_address(offset, data);
            }
            _ => {}
        }
        Action::None
    }

    fn write_driver_feature(&mut self, value: u32, transport: &Transport) {
        if transport.status() & status::FEATURES_OK != 0 {
            return; // Negotiation is over (3.1.1, step 5).
        }
        match self.driver_feature_select {
            0 => {
                self.driver_features = self.driver_features & !0xffff_ffff | u64::from(value);
            }
            1 => {
                self.driver_features = self.driver_features & 0xffff_ffff | u64::from(value) << 32;
            }
            _ => self.unknown_feature |= value != 0,
        }
    }

    fn write_status(&mut self, value: u8, transport: &Transport) -> Action {
        use status::{ACKNOWLEDGE, DRIVER, DRIVER_OK, FAILED, FEATURES_OK, NEEDS_RESET};
        if value == 0 {
            return Action::Reset;
        }
        let now = transport.status();
        // A driver must not clear bits but by a reset (2.1.1), so only what it adds counts.
        let mut add = value & status::DRIVER_BITS & !now;
        let dead = now & (FAILED | NEEDS_RESET) != 0;
        let known = (now | add) & (ACKNOWLEDGE | DRIVER) == ACKNOWLEDGE | DRIVER;
        if dead || !known {
            add &= !(FEATURES_OK | DRIVER_OK);
        }
        if add & FEATURES_OK != 0 {
            // DRIVER_OK in the same store would skip reading FEATURES_OK back (3.1.1, step 6).
            transport.add_status(add & !(FEATURES_OK | DRIVER_OK));
            return Action::Negotiate(FEATURES_OK);
        }
        if add & DRIVER_OK != 0 {
            if now & FEATURES_OK != 0 {
                return Action::Activate(add);
            }
            add &= !DRIVER_OK;
        }
        transport.add_status(add);
        Action::None
    }

    fn write_u16(&mut self, offset: u64, value: u16, transport: &Transport) -> Action {
        match offset {
            at::CONFIG_MSIX_VECTOR => transport.set_config_vector(value),
            at::QUEUE_SELECT => self.queue_select = value,
            at::QUEUE_MSIX_VECTOR => transport.set_queue_vector(self.queue_select, value),
            at::QUEUE_SIZE => {
                if let Some(queue) = self.selected()
                    && !queue.enabled
                    && value.is_power_of_two()
                    && value <= queue.max_size
                {
                    queue.layout.size = value;
                }
            }
            at::QUEUE_ENABLE if value == 1 => return self.enable_queue(transport),
            at::QUEUE_RESET if value == 1 => return self.reset_queue(transport),
            _ => {}
        }
        Action::None
    }

    fn enable_queue(&mut self, transport: &Transport) -> Action {
        let running = transport.status() & status::DRIVER_OK != 0;
        let index = self.queue_select;
        let Some(queue) = self.selected() else {
            return Action::None;
        };
        // A running device takes only queues that were reset before (2.6.1.2).
        if queue.enabled || (running && !queue.was_reset) {
            return Action::None;
        }
        queue.enabled = true;
        queue.was_reset = false;
        if running {
            Action::StartQueue(index)
        } else {
            Action::None
        }
    }

    fn reset_queue(&mut self, transport: &Transport) -> Action {
        let running = transport.status() & status::DRIVER_OK != 0;
        let index = self.queue_select;
        let allowed = self.driver_features & feature::RING_RESET != 0;
        let Some(queue) = self.selected() else {
            return Action::None;
        };
        if !allowed || !queue.enabled || !running {
            return Action::None;
        }
        *queue = QueueRegisters {
            was_reset: true,
            ..QueueRegisters::new(queue.max_size)
        };
        Action::StopQueue(index)
    }

    /// Part of a ring address; frozen while the queue is enabled.
    fn write_address(&mut self, offset: u64, data: &[u8]) {
        let Some(queue) = self.selected().filter(|queue| !queue.enabled) else {
            return;
        };
        let field = match offset & !7 {
            at::QUEUE_DESC => &mut queue.layout.desc,
            at::QUEUE_DRIVER => &mut queue.layout.driver,
            at::QUEUE_DEVICE => &mut queue.layout.device,
            _ => return,
        };
        let mut bytes = field.to_le_bytes();
        let at = usize::from(offset & 7 != 0) * 4;
        if let Some(place) = bytes.get_mut(at..at + data.len())
            && offset.is_multiple_of(4)
        {
            place.copy_from_slice(data);
            *field = u64::from_le_bytes(bytes);
        }
    }

    fn selected(&mut self) -> Option<&mut QueueRegisters> {
        self.queues.get_mut(usize::from(self.queue_select))
    }
}

//! The PCI function of a virtio device (Virtio 1.2, 4.1): configuration structures in BAR 0, their
//! vendor capabilities, and what register writes bring about.

use std::io;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use iommu::{Bdf, DmaSpace, Upstream};
use pci::{
    BarIndex, BarKind, BuildError, Endpoint, FunctionBuilder, Identity, IoEvent, IoLength,
    PciDevice,
};
use vmm_sys_util::eventfd::{EFD_CLOEXEC, EFD_NONBLOCK, EventFd};

use super::common::{Action, Registers};
use super::queue::Virtqueue;
use super::ring::{Ring, RingError};
use super::spec::{self, cap, feature};
use super::transport::Transport;
use super::{Activation, VirtioDevice};

/// The BAR that holds everything.
const BAR: BarIndex = BarIndex(0);
/// Its size.
const BAR_SIZE: u64 = 0x8000;
/// Each structure has a page, so that notifications share none with registers.
const COMMON: u64 = 0;
const ISR: u64 = 0x1000;
const DEVICE: u64 = 0x2000;
const NOTIFY: u64 = 0x3000;
const MSIX_TABLE: u64 = 0x4000;
const MSIX_PBA: u64 = 0x6000;
/// Room of each structure.
const PAGE: u64 = 0x1000;
/// Distance of two queues' notification addresses.
const NOTIFY_MULTIPLIER: u32 = 4;
/// Most queues: what fits into the notification page.
const MAX_QUEUES: usize = 1024;
/// Most vectors: what fits before the PBA.
const MAX_VECTORS: u16 = 512;
/// Index of the configuration access capability among the vendor capabilities.
const WINDOW: usize = 4;

/// Why there is no such function. All are mistakes of the caller or limits of the host.
#[derive(Debug, thiserror::Error)]
pub enum NewError {
    /// The function's description is wrong.
    #[error(transparent)]
    Function(#[from] BuildError),
    /// No file descriptor for a queue's notification.
    #[error("queue notification: {0}")]
    Event(#[from] io::Error),
    /// A queue size is no power of two from 1 to 32768.
    #[error("queue {queue}: size {size} is no power of two from 1 to 32768")]
    QueueSize {
        /// Index of the queue.
        queue: usize,
        /// What the device says.
        size: u16,
    },
    /// More queues than the notification structure has room for.
    #[error("{0} queues; at most {MAX_QUEUES} are possible")]
    Queues(usize),
}

/// A virtio device as a PCI function.
pub struct VirtioPci {
    device: Arc<dyn VirtioDevice>,
    transport: Arc<Transport>,
    dma: Arc<DmaSpace>,
    notify: Vec<Arc<EventFd>>,
    registers: Mutex<Registers>,
    window: Mutex<Window>,
    config_len: usize,
}

impl VirtioPci {
    /// Makes the function of `device`, called `name` in log lines. Both results go to
    /// [`pci::RootComplex::attach`].
    ///
    /// # Errors
    ///
    /// The device describes queues that cannot be, or the host has no file descriptor left.
    pub fn new(
        name: &str,
        device: Arc<dyn VirtioDevice>,
        bdf: Bdf,
        upstream: &Upstream,
    ) -> Result<(Endpoint, Arc<VirtioPci>), NewError> {
        let sizes = device.queue_sizes();
        if sizes.len() > MAX_QUEUES {
            return Err(NewError::Queues(sizes.len()));
        }
        for (queue, &size) in sizes.iter().enumerate() {
            if !size.is_power_of_two() || size > spec::ring::MAX_SIZE {
                return Err(NewError::QueueSize { queue, size });
            }
        }
        let endpoint = describe(&*device, sizes.len()).build(bdf, upstream)?;
        let msix = endpoint.msix();
        let vectors = (0..msix.vectors()).filter_map(|i| msix.vector(i)).collect();
        let transport = Arc::new(Transport::new(name.to_owned(), vectors, sizes.len()));
        device.attach(&transport);
        let notify = sizes
            .iter()
            .map(|_| EventFd::new(EFD_NONBLOCK | EFD_CLOEXEC).map(Arc::new))
            .collect::<io::Result<Vec<_>>>()?;
        let function = VirtioPci {
            transport,
            dma: endpoint.bus_master().dma,
            notify,
            registers: Mutex::new(Registers::new(offered(&*device), &sizes)),
            window: Mutex::new(Window::default()),
            config_len: device.config_len(),
            device,
        };
        Ok((endpoint, Arc::new(function)))
    }

    fn registers(&self) -> MutexGuard<'_, Registers> {
        self.registers
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
    }

    fn window(&self) -> MutexGuard<'_, Window> {
        self.window.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn write_common(&self, offset: u64, data: &[u8]) {
        let mut registers = self.registers();
        match registers.write(offset, data, &self.transport) {
            Action::None => {}
            Action::Reset => self.reset_device(&mut registers),
            Action::Negotiate(bits) => {
                if registers.features_fit() && self.device.accepts(registers.driver_features) {
                    self.transport.add_status(bits);
                }
            }
            Action::Activate(bits) => {
                self.transport.add_status(bits);
                self.activate(&registers);
            }
            Action::StartQueue(index) => match self.virtqueue(&registers, index) {
                Ok(Some(queue)) => self.device.start_queue(queue),
                Ok(None) => {}
                Err(error) => self.transport.needs_reset(Some(index), &error),
            },
            Action::StopQueue(index) => {
                self.device.stop_queue(index);
                self.transport.set_queue_vector(index, spec::NO_VECTOR);
            }
        }
    }

    /// The status register reads 0 only after this, when all workers have stopped (2.4).
    fn reset_device(&self, registers: &mut Registers) {
        self.device.reset();
        registers.reset();
        self.transport.reset();
    }

    fn activate(&self, registers: &Registers) {
        let count = u16::try_from(registers.queues.len()).unwrap_or(u16::MAX);
        let mut queues = Vec::with_capacity(registers.queues.len());
        for index in 0..count {
            match self.virtqueue(registers, index) {
                Ok(queue) => queues.push(queue),
                Err(error) => return self.transport.needs_reset(Some(index), &error),
            }
        }
        let activation = Activation {
            features: registers.driver_features,
            queues,
            dma: Arc::clone(&self.dma),
        };
        if let Err(error) = self.device.activate(activation) {
            self.device.reset();
            self.transport.needs_reset(None, &error);
        }
    }

    /// Queue `index` as the driver described it; `None` if it is not enabled.
    fn virtqueue(&self, registers: &Registers, index: u16) -> Result<Option<Virtqueue>, RingError> {
        let at = usize::from(index);
        let (Some(queue), Some(notify)) = (registers.queues.get(at), self.notify.get(at)) else {
            return Ok(None);
        };
        if !queue.enabled {
            return Ok(None);
        }
        let event_idx = registers.driver_features & feature::RING_EVENT_IDX != 0;
        let mut ring = Ring::new(queue.layout, event_idx)?;
        match ring.check(&self.dma.view()) {
            // With bus mastering off, the first access will tell.
            Ok(()) | Err(RingError::Halted) => {}
            Err(error) => return Err(error),
        }
        Ok(Some(Virtqueue::new(
            index,
            ring,
            Arc::clone(notify),
            Arc::clone(&self.transport),
        )))
    }

    /// What the doorbell of a queue does when no eventfd took the store.
    fn notify(&self, offset: u64) {
        let index = usize::try_from(offset / u64::from(NOTIFY_MULTIPLIER)).unwrap_or(usize::MAX);
        if let Some(event) = self.notify.get(index) {
            // A counter at its maximum is readable all the same.
            let _ = event.write(1);
        }
    }

    fn read_device(&self, offset: u64, data: &mut [u8]) {
        if let Ok(offset) = usize::try_from(offset) {
            self.transport
                .read_config(|| self.device.config_read(offset, data));
        }
    }
}

impl PciDevice for VirtioPci {
    fn bar_read(&self, bar: BarIndex, offset: u64, data: &mut [u8]) {
        data.fill(0);
        if bar != BAR {
            return;
        }
        let at = offset % PAGE;
        match offset - at {
            COMMON => {
                let image = self.registers().image(&self.transport);
                let from = usize::try_from(at).unwrap_or(usize::MAX);
                for (to, byte) in data.iter_mut().zip(image.iter().skip(from)) {
                    *to = *byte;
                }
            }
            ISR if at == 0 => {
                if let Some(byte) = data.first_mut() {
                    *byte = self.transport.take_isr();
                }
            }
            DEVICE => self.read_device(at, data),
            _ => {}
        }
    }

    fn bar_write(&self, bar: BarIndex, offset: u64, data: &[u8]) {
        if bar != BAR {
            return;
        }
        let at = offset % PAGE;
        match offset - at {
            COMMON => self.write_common(at, data),
            DEVICE => {
                if let Ok(at) = usize::try_from(at)
                    && at < self.config_len
                {
                    self.device.config_write(at, data);
                }
            }
            NOTIFY => self.notify(at),
            _ => {}
        }
    }

    fn reset(&self) {
        self.reset_device(&mut self.registers());
        *self.window() = Window::default();
    }

    fn bus_master_changed(&self, on: bool) {
        if on {
            for event in &self.notify {
                // As in `notify`: workers look again at what they could not do.
                let _ = event.write(1);
            }
        }
    }

    fn io_events(&self) -> Vec<IoEvent> {
        let offsets = (NOTIFY..).step_by(NOTIFY_MULTIPLIER as usize);
        self.notify
            .iter()
            .zip(offsets)
            .filter_map(|(event, offset)| {
                // Without a duplicate the store takes the slow way, which does the same.
                Some(IoEvent {
                    bar: BAR,
                    offset,
                    length: IoLength::Any,
                    value: None,
                    event: event.try_clone().ok()?,
                })
            })
            .collect()
    }

    fn capability_read(&self, index: usize, offset: u8, data: &mut [u8]) {
        if index != WINDOW || !covers_data(offset, data.len()) {
            return;
        }
        let target = self.window().target();
        let mut value = [0; 4];
        if let Some((at, len)) = target
            && let Some(value) = value.get_mut(..len)
        {
            self.bar_read(BAR, at, value);
        }
        for (at, byte) in (usize::from(offset)..).zip(data) {
            if let Some(read) = at
                .checked_sub(usize::from(cap::CFG_DATA))
                .and_then(|at| value.get(at))
            {
                *byte = *read;
            }
        }
    }

    fn capability_write(&self, index: usize, offset: u8, data: &[u8]) {
        if index != WINDOW {
            return;
        }
        let (target, value) = {
            let mut window = self.window();
            window.store(offset, data);
            (window.target(), window.value())
        };
        if covers_data(offset, data.len())
            && let Some((at, len)) = target
            && let Some(value) = value.get(..len)
        {
            self.bar_write(BAR, at, value);
        }
    }
}

/// Whether an access to the capability touches `pci_cfg_data`.
fn covers_data(offset: u8, len: usize) -> bool {
    usize::from(offset) + len > usize::from(cap::CFG_DATA)
}

/// The configuration access capability as the driver wrote it (4.1.4.9).
#[derive(Default)]
struct Window([u8; cap::LEN_EXTENDED as usize]);

impl Window {
    fn store(&mut self, offset: u8, data: &[u8]) {
        for (to, from) in self.0.iter_mut().skip(usize::from(offset)).zip(data) {
            *to = *from;
        }
    }

    fn u32_at(&self, at: u8) -> u32 {
        let mut bytes = [0; 4];
        for (to, from) in bytes.iter_mut().zip(self.0.iter().skip(usize::from(at))) {
            *to = *from;
        }
        u32::from_le_bytes(bytes)
    }

    /// Offset and length of the access, if it is one that the specification allows: 1, 2 or 4 bytes,
    /// aligned, inside the virtio structures.
    fn target(&self) -> Option<(u64, usize)> {
        let (offset, length) = (self.u32_at(cap::OFFSET), self.u32_at(cap::LENGTH));
        let bar = self.0.get(usize::from(cap::BAR)).copied()?;
        let good = bar == BAR.0
            && matches!(length, 1 | 2 | 4)
            && offset.is_multiple_of(length)
            && u64::from(offset) < MSIX_TABLE;
        good.then_some((u64::from(offset), usize::try_from(length).ok()?))
    }

    fn value(&self) -> [u8; 4] {
        self.u32_at(cap::CFG_DATA).to_le_bytes()
    }
}

/// All that is offered: the device's features and the transport's.
fn offered(device: &dyn VirtioDevice) -> u64 {
    let mut features = device.features()
        | feature::VERSION_1
        | feature::ACCESS_PLATFORM
        | feature::RING_INDIRECT_DESC
        | feature::RING_EVENT_IDX;
    if device.queue_reset() {
        features |= feature::RING_RESET;
    }
    features
}

/// A vector for each queue and one for the configuration; a driver may share them if it likes.
fn describe(device: &dyn VirtioDevice, queues: usize) -> FunctionBuilder {
    let kind = device.device_type();
    let vectors = u16::try_from(queues + 1)
        .unwrap_or(u16::MAX)
        .min(MAX_VECTORS);
    let notify_len = u64::from(NOTIFY_MULTIPLIER) * queues as u64;
    let mut builder = FunctionBuilder::new(Identity {
        vendor: spec::PCI_VENDOR,
        device: spec::PCI_DEVICE_BASE + kind,
        class: device.class(),
        revision: spec::PCI_REVISION,
        subsystem_vendor: spec::PCI_VENDOR,
        subsystem: spec::PCI_DEVICE_BASE + kind,
    })
    .bar(
        BAR,
        BAR_SIZE,
        BarKind::Memory64 {
            prefetchable: false,
        },
    )
    .msix(vectors, (BAR, MSIX_TABLE), (BAR, MSIX_PBA));
    let structures = [
        (cap::COMMON_CFG, COMMON, spec::common::LEN as u64, None),
        (cap::NOTIFY_CFG, NOTIFY, notify_len, Some(NOTIFY_MULTIPLIER)),
        (cap::ISR_CFG, ISR, 1, None),
        (cap::DEVICE_CFG, DEVICE, device.config_len() as u64, None),
        (cap::PCI_CFG, 0, 0, Some(0)),
    ];
    for (kind, offset, length, extra) in structures {
        let body = capability(kind, offset, length, extra);
        let mut mask = vec![0; body.len()];
        if kind == cap::PCI_CFG {
            // bar, offset, length and pci_cfg_data; the body begins at the capability's byte 3.
            for (at, byte) in (3u8..).zip(&mut mask) {
                if at == cap::BAR || at >= cap::OFFSET {
                    *byte = 0xff;
                }
            }
        }
        builder = builder.vendor_capability(body, mask);
    }
    builder
}

/// The body of a `virtio_pci_cap`, from `cfg_type` on (4.1.4).
fn capability(kind: u8, offset: u64, length: u64, extra: Option<u32>) -> Vec<u8> {
    let word = |value: u64| u32::try_from(value).unwrap_or(u32::MAX).to_le_bytes();
    // cfg_type, bar, id, padding
    let mut body = vec![kind, BAR.0, 0, 0, 0];
    body.extend(word(offset));
    body.extend(word(length));
    if let Some(extra) = extra {
        body.extend(extra.to_le_bytes());
    }
    body
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn capabilities_have_the_specified_length() {
        assert_eq!(
            capability(cap::ISR_CFG, ISR, 1, None).len() + 3,
            usize::from(cap::LEN)
        );
        assert_eq!(
            capability(cap::PCI_CFG, 0, 0, Some(0)).len() + 3,
            usize::from(cap::LEN_EXTENDED)
        );
    }

    #[test]
    fn the_window_takes_only_aligned_accesses_inside_the_structures() {
        let target = |bar: u8, offset: u32, length: u32| {
            let mut window = Window::default();
            window.store(cap::BAR, &[bar]);
            window.store(cap::OFFSET, &offset.to_le_bytes());
            window.store(cap::LENGTH, &length.to_le_bytes());
            window.target()
        };
        assert_eq!(target(0, 0x14, 1), Some((0x14, 1)));
        assert_eq!(target(0, 0x3ffc, 4), Some((0x3ffc, 4)));
        for (bar, offset, length) in [
            (1, 0, 4),
            (0, 2, 4),
            (0, 1, 2),
            (0, 0, 0),
            (0, 0, 3),
            (0, 0, 8),
            (0, 0x4000, 4),
            (0, u32::MAX, 1),
        ] {
            assert_eq!(target(bar, offset, length), None, "{bar} {offset} {length}");
        }
    }
}

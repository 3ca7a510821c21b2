//! What a device may do to its transport, from any thread.

use std::fmt;
use std::sync::atomic::{AtomicU8, AtomicU16, AtomicU64, Ordering};
use std::sync::{Mutex, PoisonError};

use pci::MsiVector;

use super::spec::{NO_VECTOR, isr, status};

/// Interrupts, status and configuration generation of one virtio function. No method waits for a
/// worker or for the transport's register lock.
pub struct Transport {
    name: String,
    vectors: Vec<MsiVector>,
    status: AtomicU8,
    isr: AtomicU8,
    config_vector: AtomicU16,
    queue_vectors: Vec<AtomicU16>,
    /// Held while the device's configuration is read or changed.
    generation: Mutex<u8>,
    faults: AtomicU64,
    warnings: AtomicU64,
}

impl Transport {
    /// For a function with these MSI-X vectors and this many queues.
    pub(super) fn new(name: String, vectors: Vec<MsiVector>, queues: usize) -> Transport {
        Transport {
            name,
            vectors,
            status: AtomicU8::new(0),
            isr: AtomicU8::new(0),
            config_vector: AtomicU16::new(NO_VECTOR),
            queue_vectors: (0..queues).map(|_| AtomicU16::new(NO_VECTOR)).collect(),
            generation: Mutex::new(0),
            faults: AtomicU64::new(0),
            warnings: AtomicU64::new(0),
        }
    }

    /// Name of the device in log lines.
    pub fn name(&self) -> &str {
        &self.name
    }

    /// The device status register.
    pub(super) fn status(&self) -> u8 {
        self.status.load(Ordering::Acquire)
    }

    /// Sets status bits.
    pub(super) fn add_status(&self, bits: u8) {
        self.status.fetch_or(bits, Ordering::AcqRel);
    }

    /// Whether the driver must reset the device before it does anything again. Cheap; workers ask it
    /// in every poll.
    pub fn is_broken(&self) -> bool {
        self.status() & status::NEEDS_RESET != 0
    }

    /// The driver, or the host, broke the device: it stands still until it is reset. Logged at the
    /// 1st, 2nd, 4th, 8th... time, because a guest can do this without end.
    pub fn needs_reset(&self, queue: Option<u16>, reason: &dyn fmt::Display) {
        let before = self.status.fetch_or(status::NEEDS_RESET, Ordering::AcqRel);
        if before & status::NEEDS_RESET != 0 {
            return;
        }
        let count = self.faults.fetch_add(1, Ordering::Relaxed).wrapping_add(1);
        if count.is_power_of_two() {
            tracing::warn!(device = %self.name, queue, count, "device needs a reset: {reason}");
        }
        if before & status::DRIVER_OK != 0 {
            self.change_config(|| ());
        }
    }

    /// Logs something that the guest can cause, at the 1st, 2nd, 4th, 8th... time.
    pub fn warn(&self, queue: Option<u16>, message: &dyn fmt::Display) {
        let count = self
            .warnings
            .fetch_add(1, Ordering::Relaxed)
            .wrapping_add(1);
        if count.is_power_of_two() {
            tracing::warn!(device = %self.name, queue, count, "{message}");
        }
    }

    /// Times that the device needed a reset.
    pub fn faults(&self) -> u64 {
        self.faults.load(Ordering::Relaxed)
    }

    /// Runs `change`, which changes what the configuration structure says, and tells the driver. A
    /// driver that reads meanwhile sees all or nothing, or another generation (2.5.3).
    pub fn change_config(&self, change: impl FnOnce()) {
        {
            let mut generation = self.generation();
            change();
            *generation = generation.wrapping_add(1);
        }
        self.isr.fetch_or(isr::CONFIG, Ordering::AcqRel);
        self.signal(self.config_vector.load(Ordering::Acquire));
    }

    /// Runs `read` while the configuration does not change; returns its result with the generation.
    pub(super) fn read_config<R>(&self, read: impl FnOnce() -> R) -> (R, u8) {
        let generation = self.generation();
        (read(), *generation)
    }

    fn generation(&self) -> std::sync::MutexGuard<'_, u8> {
        self.generation
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
    }

    /// Interrupts the driver for queue `index`: by its vector, or without one by the ISR bit alone.
    pub(super) fn queue_interrupt(&self, index: u16) {
        let vector = self.queue_vector(index);
        if vector == NO_VECTOR {
            self.isr.fetch_or(isr::QUEUE, Ordering::AcqRel);
        } else {
            self.signal(vector);
        }
    }

    fn signal(&self, vector: u16) {
        if let Some(vector) = self.vectors.get(usize::from(vector)) {
            vector.signal();
        }
    }

    /// Reads and clears the ISR register (4.1.4.5).
    pub(super) fn take_isr(&self) -> u8 {
        self.isr.swap(0, Ordering::AcqRel)
    }

    /// A vector that exists, or `NO_VECTOR` (4.1.5.1.2.1).
    fn valid(&self, vector: u16) -> u16 {
        if usize::from(vector) < self.vectors.len() {
            vector
        } else {
            NO_VECTOR
        }
    }

    /// Vector of configuration changes.
    pub(super) fn config_vector(&self) -> u16 {
        self.config_vector.load(Ordering::Acquire)
    }

    /// Sets it; a vector that does not exist becomes `NO_VECTOR`.
    pub(super) fn set_config_vector(&self, vector: u16) {
        self.config_vector
            .store(self.valid(vector), Ordering::Release);
    }

    /// Vector of queue `index`.
    pub(super) fn queue_vector(&self, index: u16) -> u16 {
        self.queue_vectors
            .get(usize::from(index))
            .map_or(NO_VECTOR, |vector| vector.load(Ordering::Acquire))
    }

    /// Sets it; a vector that does not exist becomes `NO_VECTOR`.
    pub(super) fn set_queue_vector(&self, index: u16, vector: u16) {
        if let Some(slot) = self.queue_vectors.get(usize::from(index)) {
            slot.store(self.valid(vector), Ordering::Release);
        }
    }

    /// Back to power-on, when no worker is left. The generation goes on: a driver must notice.
    pub(super) fn reset(&self) {
        self.config_vector.store(NO_VECTOR, Ordering::Release);
        for vector in &self.queue_vectors {
            vector.store(NO_VECTOR, Ordering::Release);
        }
        self.isr.store(0, Ordering::Release);
        self.status.store(0, Ordering::Release);
    }
}

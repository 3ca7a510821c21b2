//! Virtio 1.2: the modern PCI transport, and what all virtio devices share.
//!
//! - [`VirtioDevice`] is the border: a device says what it offers, and gets its queues when the
//!   driver is ready ([`VirtioDevice::activate`]) until the driver resets it.
//! - [`VirtioPci`] is the function: configuration structures in a BAR, status, notifications,
//!   interrupts.
//! - [`Transport`] is what a device may do to its transport from any thread: raise interrupts,
//!   change its configuration space, say that the driver broke a queue.
//! - [`Ring`] is one split virtqueue seen from the device, and [`Virtqueue`] a ring with its
//!   notification and interrupt.
//!
//! # A broken queue
//!
//! A driver that breaks a ring's rules (an index that jumps, a chain that loops, a buffer outside of
//! memory) gets `DEVICE_NEEDS_RESET` and a configuration interrupt; all queues of the device stand
//! still until it resets the device (Virtio 1.2, 2.1.2). A queue that meets a function without Bus
//! Master Enable only waits: see [`RingError::Halted`].

mod buffers;
mod common;
pub mod net;
mod pci;
mod queue;
mod ring;
pub mod spec;
mod transport;
pub mod vsock;

use std::io;
use std::sync::Arc;

use ::pci::ClassCode;
use iommu::DmaSpace;

pub use buffers::{SliceStorage, Slices, advance, copy_in, copy_out, resolve};
pub use pci::{NewError, VirtioPci};
pub use queue::{DmaTask, Virtqueue};
pub use ring::{Chain, Fault, Ring, RingError, RingLayout, Segment};
pub use transport::Transport;

/// What the driver has set up, handed over when it sets `DRIVER_OK`.
pub struct Activation {
    /// The negotiated features, those of the transport among them.
    pub features: u64,
    /// The queues by index; `None` for those that the driver did not enable.
    pub queues: Vec<Option<Virtqueue>>,
    /// The function's view of memory; every worker takes its own [`DmaSpace::view`].
    pub dma: Arc<DmaSpace>,
}

/// A virtio device without its transport.
///
/// The transport calls all methods but the configuration ones with its register lock held, one at a
/// time; the workers of a device must therefore never wait for the transport.
pub trait VirtioDevice: Send + Sync {
    /// Device type (Virtio 1.2, 5).
    fn device_type(&self) -> u16;

    /// Class code of the PCI function.
    fn class(&self) -> ClassCode;

    /// The device's own feature bits. The transport adds its own (ring features, `VERSION_1`,
    /// `ACCESS_PLATFORM`).
    fn features(&self) -> u64;

    /// Whether the device works with this subset of what is offered; `VERSION_1` is in it.
    fn accepts(&self, features: u64) -> bool {
        let _ = features;
        true
    }

    /// Largest size of each queue: powers of two up to 32768.
    fn queue_sizes(&self) -> Vec<u16>;

    /// Whether single queues can be reset and enabled again: [`VirtioDevice::stop_queue`] and
    /// [`VirtioDevice::start_queue`] work.
    fn queue_reset(&self) -> bool {
        false
    }

    /// Length of the configuration structure in bytes.
    fn config_len(&self) -> usize;

    /// Reads the configuration at `offset`; bytes past the structure are left as they are (zero).
    fn config_read(&self, offset: usize, data: &mut [u8]);

    /// Writes the configuration. Most devices have nothing to write.
    fn config_write(&self, offset: usize, data: &[u8]) {
        let _ = (offset, data);
    }

    /// Called once, before anything else.
    fn attach(&self, transport: &Arc<Transport>);

    /// The driver is ready: start.
    ///
    /// # Errors
    ///
    /// The host has no resources; the device is then as after [`VirtioDevice::reset`], and the
    /// driver is told that it needs a reset.
    fn activate(&self, activation: Activation) -> io::Result<()>;

    /// Back to the state before [`VirtioDevice::activate`]. On return no worker touches guest memory
    /// or interrupts. May be called at any time.
    fn reset(&self);

    /// Stops one queue of an active device; on return nobody touches it.
    fn stop_queue(&self, index: u16) {
        let _ = index;
    }

    /// Starts one queue that was stopped.
    fn start_queue(&self, queue: Virtqueue) {
        let _ = queue;
    }
}

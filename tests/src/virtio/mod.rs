//! A virtio driver for the fake guest, written from the specification (Virtio 1.2) and not from the
//! device's code: its own capability walk, register layout and split ring.
//!
//! - [`VirtioFunction`]: the transport, as `virtio_pci_modern` sees it.
//! - [`GuestQueue`]: a split virtqueue, with raw access for drivers that misbehave.
//! - [`NetDriver`]: a network driver on both.
//! - [`Wire`]: a network back end whose other end is the test.

mod backend;
mod function;
mod net;
mod queue;

pub use backend::Wire;
pub use function::{Structure, VirtioFunction, common, status};
pub use net::{DataQueue, HEADER, NetDriver, NetSetup, features, frame, plain};
pub use queue::{GuestQueue, Part, desc_flags};

use std::time::Instant;

/// Waits until `condition` holds; panics with `what` if it does not within
/// [`TIMEOUT`](crate::TIMEOUT). For things that raise no interrupt.
pub fn eventually(what: &str, mut condition: impl FnMut() -> bool) {
    let deadline = Instant::now() + crate::TIMEOUT;
    while !condition() {
        assert!(Instant::now() < deadline, "{what}: did not happen");
        std::thread::yield_now();
    }
}

//! Network back ends: where packets come from and go to.
//!
//! A [`NetBackend`] is shared by the queue pairs of one interface; each pair's worker opens a
//! [`NetQueue`] of its own. Packets travel with their `virtio_net_hdr_v1`, so that checksums and
//! segmentation can be left to whoever does them best.
//!
//! - [`Tap`]: a Linux tap device, with one queue for each pair.
//! - [`Loopback`]: what the guest sends, it receives; nothing leaves the process.

mod loopback;
mod ring;
#[cfg(test)]
mod suite;
mod tap;

pub use loopback::Loopback;
pub use tap::{Tap, TapError};

use std::io;
use std::os::fd::RawFd;
use std::sync::Arc;

use vm_memory::VolatileSlice;

/// Length of `virtio_net_hdr_v1` (Virtio 1.2, 5.1.6), which precedes every packet on both sides of a
/// back end, with `num_buffers` set by the device on receive.
pub const HEADER_LEN: usize = 12;

/// What a back end lets the guest leave to others.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Offloads {
    /// Packets may carry partial checksums.
    pub checksum: bool,
    /// TCP segments over IPv4 larger than the MTU.
    pub tso4: bool,
    /// TCP segments over IPv6 larger than the MTU.
    pub tso6: bool,
    /// TCP segments with ECN.
    pub ecn: bool,
    /// UDP segments larger than the MTU.
    pub uso: bool,
}

/// A network attachment with up to `max_pairs` independent queue pairs.
pub trait NetBackend: Send + Sync {
    /// What the host side can take from the guest (transmit).
    fn transmit_offloads(&self) -> Offloads;

    /// What the host side may be told to hand to the guest (receive).
    fn receive_offloads(&self) -> Offloads;

    /// The guest's driver takes these on receive, now and for queues opened later.
    ///
    /// # Errors
    ///
    /// The host refuses them.
    fn set_receive_offloads(&self, offloads: Offloads) -> io::Result<()>;

    /// Number of queue pairs that can be opened.
    fn max_pairs(&self) -> u16;

    /// How many pairs, from 0 on, packets may arrive on from now on; 1 at first. Packets that wait on
    /// other pairs may be lost.
    ///
    /// # Errors
    ///
    /// There are not so many pairs, or none is asked for, or the host refuses it.
    fn set_active_pairs(&self, pairs: u16) -> io::Result<()>;

    /// Opens queue pair `index`.
    ///
    /// # Errors
    ///
    /// There is no such pair, it is open already, or the host refuses it. It can be opened again once
    /// its queue was dropped.
    fn open_queue(self: Arc<Self>, index: u16) -> io::Result<Box<dyn NetQueue>>;

    /// Packets that it dropped so far, in both directions: no room, too long, not to be had by a
    /// guest without the offload.
    fn drops(&self) -> u64;
}

/// One queue pair of a back end. Never blocks.
pub trait NetQueue: Send {
    /// Sends one packet, its [`HEADER_LEN`]-byte header first. [`io::ErrorKind::WouldBlock`]: try
    /// again when [`NetQueue::fd`] is writable. Other errors: the packet is lost.
    ///
    /// # Errors
    ///
    /// As above.
    fn send(&mut self, packet: &[VolatileSlice<'_, ()>]) -> io::Result<()>;

    /// Receives one packet with its header into `buffers`; `None` if there is none. The length is
    /// what was written. A packet that does not fit is dropped and counted, and the next one tried.
    ///
    /// # Errors
    ///
    /// The back end is gone.
    fn receive(&mut self, buffers: &[VolatileSlice<'_, ()>]) -> io::Result<Option<usize>>;

    /// Readable when a packet may have arrived since [`NetQueue::receive`] last found none. `None`
    /// while none can arrive, which changes only with the number of active pairs.
    fn fd(&self) -> Option<RawFd>;
}

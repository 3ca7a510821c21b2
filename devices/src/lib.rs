//! Device models (NVMe, virtio-net, virtio-vsock, edu, DMA probe), their block and network back ends, and the queue
//! workers that run them.
//!
//! A device has two halves. Its registers are a [`pci::PciDevice`], called on vCPU threads; they
//! store what was written and kick. Its queues are [`worker::QueueTask`]s, each owned by one
//! [`worker::Worker`]'s thread with everything that it needs: rings, its own `iommu::DmaMemory`, a
//! [`block::BlockQueue`] or [`net::NetQueue`]. So two queues share no lock on the data path.
//!
//! An I/O's way through a worker: the guest's doorbell or notification ends the worker's sleep (or
//! finds it polling); the task takes entries off its ring, resolves their addresses inside a DMA
//! section, and gives guest memory, pinned, to the back end; one system call starts the batch; the
//! completions go back onto the ring with one publication; the loop raises the interrupt, or holds
//! it back as [`worker::Coalesce`] says; and when nothing is left it arms the notifications, looks
//! once more, and sleeps, unless [`worker::PollPolicy`] has it poll on.
//!
//! Everything in guest memory is hostile: it is read once, checked, and never trusted to stay.

pub mod block;
pub mod dma_probe;
pub mod edu;
pub mod net;
pub mod nvme;
mod vectored;
pub mod virtio;
pub mod worker;

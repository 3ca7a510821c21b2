//! Device models (NVMe, virtio, platform devices), their block and network back ends, and the queue
//! workers that run them.

pub mod block;
pub mod net;
pub mod nvme;
mod vectored;
pub mod virtio;
pub mod worker;

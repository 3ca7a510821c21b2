//! The network device (Virtio 1.2, 5.1) over a [`NetBackend`](crate::net::NetBackend).
//!
//! Each queue pair has a worker; the control queue has one too. Packets move between the driver's
//! buffers and the back end without a copy. What the driver says is checked first: headers are
//! copied, validated and only then shown to the host, and frames that the receive filter rejects
//! give their buffers to the next one.
//!
//! Before `VQ_PAIRS_SET` packets arrive on pair 0 only.

mod control;
mod device;
mod filter;
mod header;
mod pair;
mod receive;
pub mod spec;
mod stats;
mod transmit;

pub use device::{Config, ConfigError, VirtioNet};
pub use filter::Mac;
pub use pair::{RECEIVE, TRANSMIT};
pub use stats::{NetStats, PairStats, QueueStats};

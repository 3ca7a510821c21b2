//! The socket device: streams between programs of the guest and programs of the host.
//!
//! Virtio 1.2, section 5.10. On the host a guest is a Unix socket, as Firecracker and Cloud
//! Hypervisor map it, so their tools work here too:
//!
//! - A program of the host connects to `PATH` and sends `CONNECT port\n`. When the guest has accepted
//!   the connection on its vsock port, it reads `OK hostport\n`, and from then on the stream. If the
//!   guest refuses, the socket is closed.
//! - A program of the guest that connects to context id 2, port P, reaches whoever listens on
//!   `PATH_P`.
//!
//! One worker runs the device. Data goes from the guest's buffers to the socket and back without a
//! copy, unless the host's program does not read: then at most [`spec::BUFFER`] bytes a connection
//! are kept, which is the credit that the guest has. The number of connections is bounded as well.
//!
//! [`VirtioVsock`] is the device; inside, `task` runs the rings, `mux` is the table of connections
//! with their sockets, and `connection` is the life of one of them.
//!
//! virtio-vsock's packet type is not used: it needs each buffer in one piece of host memory, which
//! neither an IOMMU nor a driver promises.

mod connection;
mod device;
mod mux;
pub mod spec;
mod task;
#[cfg(test)]
mod tests;

pub use device::{NewVsockError, VirtioVsock, VsockStats};

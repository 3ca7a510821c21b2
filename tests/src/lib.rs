//! The fake-guest kit: a machine without CPUs whose guest is the test.
//!
//! A [`Machine`] has RAM, a PCI root complex and an interrupt recorder. The test plays operating
//! system and driver: [`GuestFunction::enumerate`] finds functions as an OS does, places their BARs,
//! finds capabilities and sets up MSI-X; loads and stores go through [`Machine::read`] and
//! [`Machine::write`], which do what KVM does with a CPU's accesses: RAM first, then I/O events, then
//! the root complex. Nothing here looks inside a device.
//!
//! ```
//! use tests::{GuestFunction, Machine};
//!
//! let machine = Machine::new();
//! let functions = GuestFunction::enumerate(&machine);
//! // An empty machine has the host bridge only.
//! assert_eq!(functions.len(), 1);
//! assert_eq!(functions[0].class() >> 8, 0x0600);
//! ```
//!
//! `tests/tests/example_device.rs` is a worked example: a small device, its driver and its tests.
//! [`nvme`] and [`virtio`] are drivers for the real devices, [`TestDevice`] is for tests of the bus,
//! and [`fuzz`] has the bodies of the fuzz targets.

mod events;
mod function;
mod interrupts;
mod machine;
mod memory;
pub mod nvme;
mod remapping;
mod test_device;
pub mod virtio;

pub mod fuzz;

pub use events::EventTable;
pub use function::{GuestBar, GuestFunction, GuestMsi, GuestVector};
pub use interrupts::{Delivery, LineState, Lines, Recorder};
pub use machine::{Machine, layout};
pub use memory::{DmaBuffer, PAGE_SIZE, Side};
pub use remapping::{RemappedMemory, Remapping};
pub use test_device::{Call, TestDevice};

/// How long a test waits for something that must happen. Long, because it costs only failing tests.
pub const TIMEOUT: std::time::Duration = std::time::Duration::from_secs(20);

//! PCI Express functions and the bus they sit on: configuration space, BARs, capabilities, MSI-X,
//! the root complex with ECAM and the CF8/CFC mechanism.

mod device;

pub use device::{BarIndex, IoEvent, IoEventHub, IoLength, PciDevice};

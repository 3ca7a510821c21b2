//! Fuzz targets as plain functions of bytes: the bytes are what a hostile guest does.
//!
//! Each runs a device against a plain model where there is one, and panics where they differ. They
//! are run three ways: by cargo-fuzz (`tests/fuzz/`), over the seed corpus and over random bytes by
//! `cargo test`.

mod input;
mod nvme;
mod pci_bus;
mod pci_msi;
mod pci_msix;
mod virtio_net;
mod vtd_unit;
mod vtd_walk;

pub use input::Input;
pub use nvme::nvme;
pub use pci_bus::pci_bus;
pub use pci_msi::pci_msi;
pub use pci_msix::pci_msix;
pub use virtio_net::virtio_net;
pub use vtd_unit::vtd_unit;
pub use vtd_walk::vtd_walk;

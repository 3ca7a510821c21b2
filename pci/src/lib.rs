//! PCI Express functions and the bus they sit on: configuration space, BARs, capabilities, MSI-X,
//! the root complex with ECAM and the CF8/CFC mechanism.
//!
//! # Making a function
//!
//! 1. [`FunctionBuilder`] describes it and [`FunctionBuilder::build`] makes an [`Endpoint`].
//! 2. The device takes from the endpoint what it needs: [`Endpoint::bus_master`], its only way to
//!    memory, and [`MsixVector`]s from [`Endpoint::msix`].
//! 3. Endpoint and device, a [`PciDevice`], go to [`RootComplex::attach`].
//!
//! From then on the guest is in charge: it places BARs, enables decoding and bus mastering, programs
//! MSI-X, puts the function to sleep and resets it. The device only sees accesses to its BARs and
//! vendor-specific capabilities, and the calls of [`PciDevice`].
//!
//! # What a guest may rely on
//!
//! - A configuration write returns when its effects are in force. After Bus Master Enable is cleared,
//!   no DMA is under way and no interrupt message leaves; signals are held pending.
//! - A masked vector does not fire once the masking write has returned; every signal in between is
//!   fired exactly once after the unmasking. See [`Msix`].
//! - `D3hot` acts as memory decoding and bus mastering off, and keeps all state (`No_Soft_Reset`).
//! - Function-level reset: the function leaves the bus, its transactions end, [`PciDevice::reset`]
//!   runs, configuration space returns to its reset values.
//!
//! INTx is not there: the interrupt pin register reads 0.

mod builder;
mod config;
mod device;
mod function;
mod log;
mod map;
mod msix;
mod root;
pub mod spec;

pub use builder::{BarKind, BuildError, ClassCode, FunctionBuilder, Identity};
pub use device::{BarIndex, IoEvent, IoEventHub, IoLength, PciDevice};
pub use function::Endpoint;
pub use msix::{Msix, MsixVector};
pub use root::{AttachError, RootComplex, RootError, Windows};

//! PCI Express functions and the bus they sit on: configuration space, BARs, capabilities,
//! interrupts, the root complex with ECAM and the CF8/CFC mechanism.
//!
//! # Making a function
//!
//! 1. [`FunctionBuilder`] describes it and [`FunctionBuilder::build`] makes an [`Endpoint`].
//! 2. The device takes from the endpoint what it needs: [`Endpoint::bus_master`], its only way to
//!    memory, [`MsiVector`]s from [`Endpoint::msi`] or [`Endpoint::msix`], the [`IntxPin`].
//! 3. Endpoint and device, a [`PciDevice`], go to [`RootComplex::attach`].
//!
//! From then on the guest is in charge: it places BARs, enables decoding and bus mastering, programs
//! MSI or MSI-X, puts the function to sleep and resets it. The device only sees accesses to its BARs and
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
//! - INTx is level-triggered: a line is asserted while any function on it asserts its pin and may
//!   ([`IntxSink`]). A function with MSI or MSI-X enabled does not.

mod builder;
mod config;
mod device;
mod function;
mod interrupt;
mod log;
mod map;
mod root;
pub mod spec;

pub use builder::{BarKind, BuildError, ClassCode, FunctionBuilder, Identity};
pub use device::{BarIndex, IoEvent, IoEventHub, IoLength, PciDevice};
pub use function::Endpoint;
pub use interrupt::{InterruptPin, IntxPin, IntxSink, Msi, MsiVector, Msix};
pub use root::{AttachError, RootComplex, RootError, Windows};

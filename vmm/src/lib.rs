//! The virtual machine monitor: KVM, memory, boot, ACPI, machine assembly, command line.
//!
//! # From bottom to top
//!
//! - [`layout`] is the address map, in one place; [`memory`] puts RAM into it.
//! - [`kvm`] opens the host's KVM and is the border to it for devices: interrupt messages
//!   ([`kvm::KvmMsiSink`]: an irqfd and a route each) and doorbells ([`kvm::KvmIoEvents`]).
//! - [`ioapic`] is ours, because KVM keeps the local APICs alone (split interrupt chip). Its pins
//!   leave as messages through the same sink as the devices'.
//! - [`boot`] loads a bzImage or an ELF file, [`acpi`] writes the tables (hardware-reduced).
//! - [`cpu`] makes vCPUs and runs them; what they access outside RAM goes to a [`cpu::GuestBus`].
//! - [`platform`] has the devices on I/O ports, [`terminal`] the user's end of the serial line.
//! - [`machine`] puts all of it together with the PCI devices, runs it and takes it down.
//! - [`config`], [`cli`] and [`control`] are how people and programs speak to it; [`probe`] finds out
//!   whether this host's KVM can run a kernel at all.
//!
//! # Threads
//!
//! One for each vCPU; those of the devices; the control socket's; and the caller of
//! [`machine::Machine::run`], which waits for the console, signals and the end of the run.
//!
//! # How a run ends
//!
//! Whatever ends it first gives the [`machine::ExitReason`]: a store to the ACPI sleep or reset
//! register, the keyboard controller's or the BIOS's reset; a panic, reported through pvpanic or seen
//! on the console; a CPU that cannot go on; the escape key, a signal or the control socket. Then the
//! vCPUs are stopped, the devices reset (what they have in flight ends first), and the terminal
//! restored.

pub mod acpi;
pub mod boot;
pub mod cli;
pub mod config;
pub mod control;
pub mod cpu;
pub mod ioapic;
pub mod kvm;
pub mod layout;
pub mod machine;
pub mod memory;
pub mod platform;
pub mod probe;
pub mod terminal;

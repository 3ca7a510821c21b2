//! The virtual machine monitor: KVM, memory, boot, ACPI, machine assembly, command line.

pub mod cli;
pub mod config;
pub mod machine;
pub mod probe;

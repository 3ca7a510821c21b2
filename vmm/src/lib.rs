//! The virtual machine monitor: KVM, memory, boot, ACPI, machine assembly, command line.

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

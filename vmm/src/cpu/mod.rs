//! Virtual CPUs: their set-up and the threads that run them.

mod cpuid;
mod msr;
mod report;
mod state;
mod vcpu;

pub use cpuid::{CpuidTemplate, to_kvm};
pub use state::StateError;
pub use vcpu::{CpuError, ExitCounts, GuestBus, Outcome, Request, Vcpu, VcpuThread};

//! The machine: its description, its assembly and its run.

mod description;

pub use description::{
    ExitReason, MAX_VCPUS, MIN_MEMORY, MachineSpec, NamespaceSpec, NetBackendSpec, NetSpec,
    NvmeSpec, OnReboot, SerialMode, Storage, VsockSpec,
};

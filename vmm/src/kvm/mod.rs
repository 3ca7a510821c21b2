//! The host's KVM: opening it, what it can do, and the VM with its split interrupt chip.

mod io_events;
mod routes;
mod stats;

use std::io;
use std::path::Path;
use std::sync::Arc;

use kvm_bindings::{
    KVM_CAP_BINARY_STATS_FD, KVM_CAP_EXIT_ON_EMULATION_FAILURE, KVM_CAP_SPLIT_IRQCHIP,
    KVM_CAP_X2APIC_API, KVM_X2APIC_API_DISABLE_BROADCAST_QUIRK, KVM_X2APIC_API_USE_32BIT_IDS,
    kvm_enable_cap,
};
use kvm_ioctls::{Cap, Kvm, VmFd};

use crate::ioapic;
use crate::layout;

pub use io_events::KvmIoEvents;
pub use routes::KvmMsiSink;
pub use stats::KvmStats;

/// Where KVM is found.
pub const DEVICE: &str = "/dev/kvm";

/// Why this host's KVM cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum KvmError {
    /// No KVM at all.
    #[error("{DEVICE} does not exist: load the module kvm_intel or kvm_amd")]
    Missing,
    /// KVM is there, but not for this user.
    #[error("{DEVICE}: permission denied: add the user to the group kvm, or run as root")]
    Permission,
    /// Another error on opening.
    #[error("cannot open {DEVICE}: {0}")]
    Open(io::Error),
    /// An API from before 2007 or a stranger.
    #[error("{DEVICE} speaks API version {0}, not 12")]
    Api(i32),
    /// A capability that no machine runs without.
    #[error("this host's KVM lacks {0}")]
    Capability(&'static str),
    /// A call that should have worked.
    #[error("KVM: {0}: {1}")]
    Call(&'static str, kvm_ioctls::Error),
}

/// What is used, whether a machine can do without it, and the words for it.
const CAPABILITIES: &[(Cap, bool, &str)] = &[
    (Cap::UserMemory, true, "KVM_CAP_USER_MEMORY"),
    (Cap::ExtCpuid, true, "KVM_CAP_EXT_CPUID"),
    (Cap::MpState, true, "KVM_CAP_MP_STATE"),
    (Cap::SplitIrqchip, true, "KVM_CAP_SPLIT_IRQCHIP"),
    (Cap::IrqRouting, true, "KVM_CAP_IRQ_ROUTING"),
    (Cap::Irqfd, true, "KVM_CAP_IRQFD"),
    (Cap::Ioeventfd, true, "KVM_CAP_IOEVENTFD"),
    (Cap::ImmediateExit, true, "KVM_CAP_IMMEDIATE_EXIT"),
    (Cap::TscDeadlineTimer, false, "KVM_CAP_TSC_DEADLINE_TIMER"),
];

/// An open KVM that can run machines.
pub struct Host {
    kvm: Kvm,
    missing: Vec<&'static str>,
}

impl Host {
    /// Opens the host's KVM and checks it for all that a machine needs.
    ///
    /// # Errors
    ///
    /// There is none, it may not be opened, or it lacks something needed; the text says which.
    pub fn open() -> Result<Host, KvmError> {
        let kvm = Kvm::new().map_err(|e| match e.errno() {
            libc::ENOENT if !Path::new(DEVICE).exists() => KvmError::Missing,
            libc::ENODEV | libc::ENXIO => KvmError::Missing,
            libc::EACCES | libc::EPERM => KvmError::Permission,
            errno => KvmError::Open(io::Error::from_raw_os_error(errno)),
        })?;
        let version = kvm.get_api_version();
        if version != 12 {
            return Err(KvmError::Api(version));
        }
        let mut missing = Vec::new();
        for &(capability, needed, name) in CAPABILITIES {
            if !kvm.check_extension(capability) {
                if needed {
                    return Err(KvmError::Capability(name));
                }
                missing.push(name);
            }
        }
        for (capability, name) in [
            (KVM_CAP_BINARY_STATS_FD, "KVM_CAP_BINARY_STATS_FD"),
            (
                KVM_CAP_EXIT_ON_EMULATION_FAILURE,
                "KVM_CAP_EXIT_ON_EMULATION_FAILURE",
            ),
        ] {
            if kvm.check_extension_raw(capability.into()) <= 0 {
                missing.push(name);
            }
        }
        Ok(Host { kvm, missing })
    }

    /// The system file descriptor's wrapper.
    pub fn kvm(&self) -> &Kvm {
        &self.kvm
    }

    /// Capabilities that a machine can do without and that this host lacks.
    pub fn missing(&self) -> &[&'static str] {
        &self.missing
    }

    /// Creates a VM with local APICs in the kernel and the IOAPIC left to us.
    ///
    /// # Errors
    ///
    /// KVM refuses the VM or its interrupt chip.
    pub fn create_vm(&self) -> Result<Arc<VmFd>, KvmError> {
        let vm = loop {
            match self.kvm.create_vm() {
                Ok(vm) => break vm,
                Err(e) if e.errno() == libc::EINTR => {}
                Err(e) => return Err(KvmError::Call("creating a VM", e)),
            }
        };
        if self.kvm.check_extension(Cap::SetIdentityMapAddr) {
            vm.set_identity_map_address(layout::KVM_IDENTITY_MAP)
                .map_err(|e| KvmError::Call("placing the identity map", e))?;
        }
        if self.kvm.check_extension(Cap::SetTssAddr) {
            let address = usize::try_from(layout::KVM_TSS).unwrap_or(usize::MAX);
            vm.set_tss_address(address)
                .map_err(|e| KvmError::Call("placing the TSS", e))?;
        }
        let mut split = kvm_enable_cap {
            cap: KVM_CAP_SPLIT_IRQCHIP,
            ..Default::default()
        };
        split.args[0] = u64::from(ioapic::PINS);
        vm.enable_cap(&split)
            .map_err(|e| KvmError::Call("enabling the split interrupt chip", e))?;
        if !self.missing.contains(&"KVM_CAP_EXIT_ON_EMULATION_FAILURE") {
            let mut report = kvm_enable_cap {
                cap: KVM_CAP_EXIT_ON_EMULATION_FAILURE,
                ..Default::default()
            };
            report.args[0] = 1;
            if let Err(error) = vm.enable_cap(&report) {
                tracing::warn!(%error, "emulation failures will lack the instruction's bytes");
            }
        }
        Ok(Arc::new(vm))
    }

    /// From now on the upper half of an MSI's address has bits 31:8 of its destination, and 0xff is
    /// no broadcast in x2APIC mode. False if this host's KVM cannot.
    ///
    /// # Errors
    ///
    /// KVM has the capability, but refuses it.
    pub fn enable_wide_destinations(&self, vm: &VmFd) -> Result<bool, KvmError> {
        let flags = KVM_X2APIC_API_USE_32BIT_IDS | KVM_X2APIC_API_DISABLE_BROADCAST_QUIRK;
        let offered = self.kvm.check_extension_raw(KVM_CAP_X2APIC_API.into());
        if u32::try_from(offered).is_ok_and(|offered| offered & flags == flags) {
            let mut wide = kvm_enable_cap {
                cap: KVM_CAP_X2APIC_API,
                ..Default::default()
            };
            wide.args[0] = flags.into();
            vm.enable_cap(&wide)
                .map_err(|e| KvmError::Call("enabling 32-bit interrupt destinations", e))?;
            return Ok(true);
        }
        Ok(false)
    }
}

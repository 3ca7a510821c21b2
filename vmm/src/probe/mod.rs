//! Can this host's KVM run a Linux kernel? Found out by trying, not from a list of names.
//!
//! [`probe`] runs a few instructions that every kernel needs in ring 0 of a guest of its own, each
//! in a fresh machine, and looks at the result. Some KVMs emulate ring 0 in software and lack many
//! of them; a Linux guest dies on such a host after minutes, without a word.

mod host;
mod trial;

use std::fs;
use std::path::Path;

use kvm_ioctls::{Cap, Kvm};
use serde::Serialize;

pub use host::{HostCheck, State, host_checks};
pub use trial::{Outcome, Trial};

use trial::TRIALS;

/// How far the way to a KVM that can run a kernel goes on this host.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "kebab-case", tag = "state")]
pub enum Verdict {
    /// Everything that was tried works.
    CanRunLinux,
    /// `/dev/kvm` cannot be used at all.
    NoKvm {
        /// Why, and what might help.
        reason: String,
    },
    /// KVM is there, but a kernel would not run on it.
    Insufficient {
        /// Why.
        reason: String,
    },
}

/// What a capability is for.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Capability {
    /// Its name in the kernel's KVM API documentation.
    pub name: &'static str,
    /// Ringside does not run without it.
    pub needed: bool,
    /// This KVM has it.
    pub present: bool,
}

/// What was found out about this host's KVM.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Probe {
    /// The conclusion.
    pub verdict: Verdict,
    /// The loaded kernel modules that provide KVM; empty if it is built in or absent.
    pub modules: Vec<String>,
    /// The CPU announces VMX (Intel) or SVM (AMD).
    pub cpu_virtualization: bool,
    /// Capabilities; empty without KVM.
    pub capabilities: Vec<Capability>,
    /// What ring 0 can do; empty without KVM.
    pub trials: Vec<Trial>,
    /// Listed model-specific registers that KVM then does not let us read, by number.
    pub unreadable_msrs: Vec<u32>,
}

impl Probe {
    /// A kernel can run on this host's KVM.
    pub fn can_run_linux(&self) -> bool {
        self.verdict == Verdict::CanRunLinux
    }

    /// Why not, in one sentence; empty if it can.
    pub fn reason(&self) -> &str {
        match &self.verdict {
            Verdict::CanRunLinux => "",
            Verdict::NoKvm { reason } | Verdict::Insufficient { reason } => reason,
        }
    }
}

/// Linux, Documentation/virt/kvm/api.rst, by name; true: Ringside does not run without it.
const CAPABILITIES: [(&str, Cap, bool); 18] = [
    ("KVM_CAP_USER_MEMORY", Cap::UserMemory, true),
    ("KVM_CAP_SPLIT_IRQCHIP", Cap::SplitIrqchip, true),
    ("KVM_CAP_IRQ_ROUTING", Cap::IrqRouting, true),
    ("KVM_CAP_IRQFD", Cap::Irqfd, true),
    ("KVM_CAP_IOEVENTFD", Cap::Ioeventfd, true),
    ("KVM_CAP_SIGNAL_MSI", Cap::SignalMsi, true),
    ("KVM_CAP_IMMEDIATE_EXIT", Cap::ImmediateExit, true),
    ("KVM_CAP_EXT_CPUID", Cap::ExtCpuid, true),
    ("KVM_CAP_MP_STATE", Cap::MpState, true),
    ("KVM_CAP_SET_TSS_ADDR", Cap::SetTssAddr, false),
    ("KVM_CAP_TSC_DEADLINE_TIMER", Cap::TscDeadlineTimer, false),
    ("KVM_CAP_ADJUST_CLOCK", Cap::AdjustClock, false),
    ("KVM_CAP_X2APIC_API", Cap::X2ApicApi, false),
    ("KVM_CAP_READONLY_MEM", Cap::ReadonlyMem, false),
    ("KVM_CAP_IOEVENTFD_NO_LENGTH", Cap::IoeventfdNoLength, false),
    ("KVM_CAP_XCRS", Cap::Xcrs, false),
    ("KVM_CAP_TSC_CONTROL", Cap::TscControl, false),
    ("KVM_CAP_X86_SMM", Cap::X86Smm, false),
];

/// The version of the KVM API, stable since Linux 2.6.22.
const KVM_API_VERSION: i32 = 12;

/// Finds out. Takes some milliseconds on a good host and a few seconds at worst.
pub fn probe() -> Probe {
    let modules = modules();
    let cpu_virtualization = cpu_virtualization();
    let without_kvm = |reason: String| Probe {
        verdict: Verdict::NoKvm { reason },
        modules: modules.clone(),
        cpu_virtualization,
        capabilities: Vec::new(),
        trials: Vec::new(),
        unreadable_msrs: Vec::new(),
    };
    let kvm = match Kvm::new() {
        Ok(kvm) => kvm,
        Err(error) => return without_kvm(why_no_kvm(error, &modules, cpu_virtualization)),
    };
    let version = kvm.get_api_version();
    if version != KVM_API_VERSION {
        return without_kvm(format!(
            "/dev/kvm has API version {version}, not {KVM_API_VERSION}"
        ));
    }
    let capabilities = CAPABILITIES
        .map(|(name, cap, needed)| Capability {
            name,
            needed,
            present: kvm.check_extension(cap),
        })
        .to_vec();
    let trials: Vec<_> = TRIALS.iter().map(|trial| trial.run(&kvm)).collect();
    Probe {
        verdict: verdict(&capabilities, &trials),
        modules,
        cpu_virtualization,
        capabilities,
        trials,
        unreadable_msrs: trial::unreadable_msrs(&kvm).unwrap_or_default(),
    }
}

fn verdict(capabilities: &[Capability], trials: &[Trial]) -> Verdict {
    let missing: Vec<_> = capabilities
        .iter()
        .filter(|cap| cap.needed && !cap.present)
        .map(|cap| cap.name)
        .collect();
    let failed: Vec<_> = trials
        .iter()
        .filter(|trial| trial.outcome.failed())
        .map(|trial| trial.name)
        .collect();
    let reason = match (missing.as_slice(), failed.as_slice()) {
        ([], []) => return Verdict::CanRunLinux,
        ([], failed) => format!("ring 0 of its guests cannot execute {}", failed.join(", ")),
        (missing, _) => format!("it lacks {}", missing.join(", ")),
    };
    Verdict::Insufficient { reason }
}

fn why_no_kvm(error: kvm_ioctls::Error, modules: &[String], cpu_virtualization: bool) -> String {
    match error.errno() {
        libc::ENOENT | libc::ENODEV | libc::ENXIO if !cpu_virtualization => {
            "there is no usable /dev/kvm, and the CPU shows neither VMX nor SVM (switched off in \
             the firmware, or a cloud machine without nested virtualisation)"
                .to_owned()
        }
        libc::ENOENT | libc::ENODEV | libc::ENXIO if modules.is_empty() => {
            "there is no /dev/kvm though the CPU can: load the module (modprobe kvm_intel or \
             kvm_amd)"
                .to_owned()
        }
        libc::EACCES | libc::EPERM => {
            "/dev/kvm may not be opened by this user: join its group (usually \
             `sudo usermod -aG kvm $USER`, then log in again)"
                .to_owned()
        }
        _ => format!("/dev/kvm cannot be opened: {error}"),
    }
}

/// Modules of the form `kvm_*` provide the CPU's part of KVM.
fn modules() -> Vec<String> {
    let Ok(entries) = fs::read_dir("/sys/module") else {
        return Vec::new();
    };
    let mut modules: Vec<_> = entries
        .flatten()
        .filter_map(|entry| entry.file_name().into_string().ok())
        .filter(|name| name.starts_with("kvm_"))
        .collect();
    modules.sort();
    modules
}

fn cpu_virtualization() -> bool {
    cpu_flags(Path::new("/proc/cpuinfo")).is_some_and(|flags| {
        flags
            .split_ascii_whitespace()
            .any(|flag| flag == "vmx" || flag == "svm")
    })
}

fn cpu_flags(path: &Path) -> Option<String> {
    let text = fs::read_to_string(path).ok()?;
    let line = text.lines().find(|line| line.starts_with("flags"))?;
    Some(line.split_once(':')?.1.to_owned())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn capability(needed: bool, present: bool) -> Capability {
        Capability {
            name: "KVM_CAP_IRQFD",
            needed,
            present,
        }
    }

    fn trial(outcome: Outcome) -> Trial {
        Trial {
            name: "popcnt",
            needed_for: "",
            outcome,
        }
    }

    #[test]
    fn a_needed_capability_or_a_failed_trial_decides() {
        let works = trial(Outcome::Works);
        let absent = trial(Outcome::NotAnnounced);
        let fails = trial(Outcome::Fails { how: String::new() });
        let ok = verdict(&[capability(false, false)], &[works.clone(), absent]);
        assert_eq!(ok, Verdict::CanRunLinux);
        let Verdict::Insufficient { reason } = verdict(&[], &[works, fails.clone()]) else {
            panic!("a failed trial is not enough?");
        };
        assert_eq!(reason, "ring 0 of its guests cannot execute popcnt");
        let Verdict::Insufficient { reason } = verdict(&[capability(true, false)], &[fails]) else {
            panic!("a missing capability is not enough?");
        };
        assert_eq!(reason, "it lacks KVM_CAP_IRQFD");
    }

    #[test]
    fn a_missing_device_is_explained() {
        let why = |errno, modules: &[String], cpu| {
            why_no_kvm(kvm_ioctls::Error::new(errno), modules, cpu)
        };
        assert!(why(libc::ENOENT, &[], false).contains("neither VMX nor SVM"));
        assert!(why(libc::ENOENT, &[], true).contains("modprobe"));
        assert!(why(libc::EACCES, &[], true).contains("group"));
        assert!(why(libc::EBUSY, &[], true).starts_with("/dev/kvm cannot be opened"));
    }

    /// Whatever the host's KVM is, the baseline (plain integer code and a port write) runs on it,
    /// and the probe ends.
    #[test]
    fn this_host_is_probed() {
        let probe = probe();
        if let Verdict::NoKvm { reason } = &probe.verdict {
            eprintln!("skipped: {reason}");
            return;
        }
        assert_eq!(probe.trials[0].outcome, Outcome::Works, "{probe:?}");
        assert_eq!(probe.trials.len(), TRIALS.len());
        assert!(
            probe
                .capabilities
                .iter()
                .all(|cap| !cap.needed || cap.present)
        );
    }
}

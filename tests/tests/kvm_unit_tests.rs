//! The VT-d cases that VMMs are measured by: kvm-unit-tests' own binary where there is one, and the
//! same cases in the test kernel of this repository everywhere.

mod kvm_common;

use std::path::PathBuf;
use std::sync::mpsc;
use std::time::Duration;

use kvm_common::{Bare, iommu, multiboot_elf};
use vmm::machine::{EduSpec, ExitReason};

/// Far longer than these take; a case that waits for an interrupt in vain waits for ever.
const PATIENCE: Duration = Duration::from_secs(120);

/// The machine that kvm-unit-tests asks for: a remapping unit without EIM, and edu with its usual
/// 28 bits of address. `None` where there is no KVM.
fn machine(program: &str) -> Option<Bare> {
    let mut bare = Bare::new(program)?;
    bare.spec.test_ports = true;
    bare.spec.memory = 512 << 20;
    let mut unit = iommu();
    unit.x2apic = Some(false);
    bare.spec.iommu = Some(unit);
    bare.spec.edu = vec![EduSpec {
        name: "edu0".into(),
        dma_mask: 28,
    }];
    Some(bare)
}

/// Runs it to its end, or ends it when it takes too long.
fn run(bare: &Bare) -> (ExitReason, String) {
    let machine = bare.machine();
    let handle = machine.handle();
    let (done, ended) = mpsc::channel();
    let run = std::thread::spawn(move || done.send(machine.run()));
    let reason = match ended.recv_timeout(PATIENCE) {
        Ok(reason) => reason,
        Err(_) => {
            handle.kill();
            ended.recv().unwrap()
        }
    };
    run.join().unwrap().unwrap();
    (reason.unwrap(), bare.printed())
}

#[test]
fn vtd_cases_of_the_test_kernel() {
    let Some(mut bare) = machine("vtd") else {
        return;
    };
    bare.spec.kernel = multiboot_elf();
    let (reason, text) = run(&bare);
    assert_eq!(reason, ExitReason::DebugExit(0), "{text}");
    assert_eq!(text.matches("PASS: ").count(), 14, "{text}");
}

/// A case that fails has to be seen to fail: without a unit, and without the function.
#[test]
fn what_is_missing_fails() {
    let Some(mut bare) = machine("vtd") else {
        return;
    };
    bare.spec.kernel = multiboot_elf();
    bare.spec.edu.clear();
    let (reason, text) = run(&bare);
    assert_eq!(reason, ExitReason::DebugExit(1), "{text}");
    assert!(text.contains("FAIL: there is an edu function"), "{text}");
}

#[test]
fn vtd_cases_of_kvm_unit_tests() {
    let Some(folder) = std::env::var_os("RINGSIDE_KVM_UNIT_TESTS") else {
        eprintln!(
            "skipped: kvm-unit-tests is no package; `tests/kvm-unit-tests SOURCE` gets, builds and \
             runs it"
        );
        return;
    };
    let kernel = PathBuf::from(folder).join("x86/intel-iommu.flat");
    assert!(kernel.is_file(), "{} is not there", kernel.display());
    let Some(mut bare) = machine("") else { return };
    bare.spec.kernel = kernel;
    bare.spec.vcpus = 4;
    let (reason, text) = run(&bare);
    print!("{text}");
    assert_eq!(reason, ExitReason::DebugExit(0), "{text}");
    assert!(!text.contains("FAIL"), "{text}");
    for case in ["DMAR 4B memcpy test", "IR MSI", "IR IOAPIC"] {
        let passed = |line: &str| line.starts_with("PASS") && line.contains(case);
        assert!(text.lines().any(passed), "{case}:\n{text}");
    }
}

//! The remapping unit in a whole machine, with the bare guest on this host's KVM.

mod kvm_common;

use std::fs;
use std::thread;

use kvm_common::Bare;
use vmm::machine::{ExitReason, IommuSpec, LargestPage, OnReboot};

fn unit() -> IommuSpec {
    IommuSpec {
        scalable: false,
        address_width: 48,
        caching_mode: false,
        coherent: true,
        interrupt_remapping: true,
        x2apic: None,
        pass_through: true,
        first_stage: false,
        second_stage: true,
        largest_page: LargestPage::Gib1,
        iotlb_sets: 64,
        iotlb_ways: 4,
        fault_registers: 8,
        trace: None,
    }
}

#[test]
fn a_reboot_leaves_nothing_in_the_registers() {
    let Some(mut bare) = Bare::new("v") else {
        return;
    };
    let trace = bare.folder.path().join("trace");
    bare.spec.on_reboot = OnReboot::Restart;
    bare.spec.iommu = Some(IommuSpec {
        trace: Some(trace.clone()),
        ..unit()
    });
    let machine = bare.machine();
    let handle = machine.handle();
    let run = thread::spawn(move || machine.run());
    let round = "00000000\n00005000\n";
    // Between two incarnations there is nothing to count.
    let mut counted = false;
    while (bare.printed().len() < 3 * round.len() || !counted) && !run.is_finished() {
        counted |= handle.stats().iommu.is_some();
        thread::yield_now();
    }
    handle.kill();
    assert_eq!(run.join().unwrap().unwrap(), ExitReason::Killed);
    let printed = bare.printed();
    assert!(printed.starts_with(&round.repeat(3)), "{printed}");
    // The same is in the trace, with the resets in between.
    let trace = fs::read_to_string(trace).unwrap();
    let round = "# machine reset\nr 20 4 0\nw 20 4 5000\nw 24 4 0\nr 20 4 5000\n";
    assert!(trace.starts_with(&round.repeat(3)), "{trace}");
}

#[test]
fn a_machine_without_a_unit_has_nothing_there() {
    let Some(bare) = Bare::new("v") else { return };
    let (reason, text) = bare.run();
    assert_eq!(reason, ExitReason::Reboot);
    assert_eq!(text, "ffffffff\nffffffff\n");
}

/// The IOAPIC's interrupts arrive through the unit as they do without it, while remapping is off.
#[test]
fn pins_work_in_compatibility_format() {
    let Some(mut bare) = Bare::new("l") else {
        return;
    };
    bare.spec.iommu = Some(unit());
    let (_, text) = bare.run();
    assert_eq!(text, "00008031\n00000002\n");
}

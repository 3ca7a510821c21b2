//! A whole machine with the bare guest on this host's KVM: both boot protocols, ports, memory, PCI
//! configuration, processors, and every way in which a run ends.

mod kvm_common;

use std::thread;

use kvm_common::{Bare, bzimage, print};
use vmm::machine::{
    EduSpec, ExitReason, Machine, NamespaceSpec, NvmeSpec, OnReboot, ProbeSpec, Storage, VsockSpec,
};

#[test]
fn boots_by_pvh_and_prints() {
    if let Some(text) = print("o") {
        assert_eq!(text, "ok\n");
    }
}

#[test]
fn boots_by_the_64_bit_protocol_and_prints() {
    let Some(mut bare) = Bare::new("- through a bzImage") else {
        return;
    };
    bare.spec.kernel = bzimage(bare.folder.path());
    let (reason, text) = bare.run();
    assert_eq!(
        (reason, text.as_str()),
        (ExitReason::PowerOff, "- through a bzImage")
    );
}

#[test]
fn string_output_arrives_whole_and_in_order() {
    let line = format!("-{}", "0123456789".repeat(150));
    if let Some(text) = print(&line) {
        assert_eq!(text, line);
    }
}

#[test]
fn reset_and_panic_have_their_own_exit_codes() {
    for (program, reason, code) in [
        ("o", ExitReason::PowerOff, 0),
        ("r", ExitReason::Reboot, 10),
        ("b", ExitReason::Reboot, 10),
        ("p", ExitReason::Panic, 11),
        ("k", ExitReason::Panic, 11),
    ] {
        let Some(bare) = Bare::new(program) else {
            return;
        };
        let ended = bare.run().0;
        assert_eq!((&ended, ended.code()), (&reason, code), "{program}");
    }
}

#[test]
fn a_triple_fault_shows_the_reason_and_the_registers() {
    let Some(bare) = Bare::new("t") else { return };
    let (ExitReason::Error(text), _) = bare.run() else {
        panic!("no error");
    };
    assert!(text.starts_with("vCPU 0: triple fault"), "{text}");
    for name in ["rip", "cr3", "idt", "efer"] {
        assert!(text.contains(name), "{name} is missing:\n{text}");
    }
}

#[test]
fn pci_configuration_is_reached_both_ways() {
    if let Some(text) = print("e") {
        assert_eq!(text, "00081b36\n00081b36\nffffffff\n");
    }
}

#[test]
fn unclaimed_memory_reads_as_ones() {
    if let Some(text) = print("n") {
        assert_eq!(text, "ffffffff\n");
    }
}

#[test]
fn memory_above_4_gib_is_there() {
    let Some(mut bare) = Bare::new("h") else {
        return;
    };
    bare.spec.memory = (3 << 30) + (64 << 20);
    let (reason, text) = bare.run();
    assert_eq!(
        (reason, text.as_str()),
        (ExitReason::PowerOff, "600df00d\n")
    );
}

#[test]
fn cpuid_tells_the_topology() {
    let Some(mut bare) = Bare::new("c") else {
        return;
    };
    bare.spec.vcpus = 3;
    let (_, text) = bare.run();
    assert_eq!(text, "00000000\n00000003\n");
}

#[test]
fn a_second_processor_starts() {
    let Some(mut bare) = Bare::new("s") else {
        return;
    };
    bare.spec.vcpus = 2;
    let (reason, text) = bare.run();
    assert_eq!(
        (reason, text.as_str()),
        (ExitReason::PowerOff, "0000005a\n")
    );
}

#[test]
fn ioapic_pin_edge_masked_and_unmasked() {
    if let Some(text) = print("i") {
        assert_eq!(text, "00000001\n00000002\n");
    }
}

#[test]
fn ioapic_pin_level_with_end_of_interrupt() {
    if let Some(text) = print("l") {
        assert_eq!(text, "00008031\n00000002\n");
    }
}

/// The bare guest on a machine with an edu function.
fn with_edu(program: &str) -> Option<Bare> {
    let mut bare = Bare::new(program)?;
    bare.spec.edu = vec![EduSpec {
        name: "edu0".into(),
        dma_mask: 28,
    }];
    Some(bare)
}

#[test]
fn intx_comes_again_until_its_cause_is_acknowledged() {
    let Some(bare) = with_edu("x") else { return };
    let (reason, text) = bare.run();
    assert_eq!(
        (reason, text.as_str()),
        (ExitReason::PowerOff, "00000000\n0000a041\n00000004\n")
    );
}

#[test]
fn msi_comes_once_for_each_cause() {
    let Some(bare) = with_edu("m") else { return };
    let (reason, text) = bare.run();
    assert_eq!(
        (reason, text.as_str()),
        (
            ExitReason::PowerOff,
            "00000078\n00000001\nfeedface\n00000003\n"
        )
    );
}

#[test]
fn teaching_and_test_functions_have_statistics() {
    let Some(mut bare) = with_edu("z") else {
        return;
    };
    bare.spec.dma_probe = vec![ProbeSpec {
        name: "tester".into(),
    }];
    let machine = bare.machine();
    let handle = machine.handle();
    let run = thread::spawn(move || machine.run());
    let stats = loop {
        let stats = handle.stats();
        if !stats.devices.is_empty() {
            break stats;
        }
        thread::yield_now();
    };
    let (edu, probe) = (&stats.devices["edu0"], &stats.devices["tester"]);
    assert_eq!((edu.kind, edu.address.as_str()), ("edu", "00:01.0"));
    assert_eq!(
        (probe.kind, probe.address.as_str()),
        ("dma-probe", "00:02.0")
    );
    assert_eq!(edu.counters["factorials"], 0);
    assert_eq!(probe.counters["blocked"], 0);
    handle.kill();
    run.join().unwrap().unwrap();
}

#[test]
fn a_machine_is_ended_from_outside() {
    // Halted with interrupts off, in an endless loop, and with processors that were never started.
    for (program, vcpus) in [("z", 1), ("y", 1), ("z", 32)] {
        let Some(mut bare) = Bare::new(program) else {
            return;
        };
        bare.spec.vcpus = vcpus;
        let machine = bare.machine();
        let handle = machine.handle();
        let run = thread::spawn(move || machine.run());
        while handle.stats().first_exit_ms.is_none() && program == "z" && vcpus == 1 {
            thread::yield_now();
            if handle.stats().vcpus.len() == 1 {
                break;
            }
        }
        assert!(!handle.press_power_button(), "nobody listens");
        handle.kill();
        assert_eq!(run.join().unwrap().unwrap(), ExitReason::Killed);
        handle.kill(); // Too late, and harmless.
        assert!(handle.stats().vcpus.is_empty());
    }
}

#[test]
fn restart_builds_the_machine_afresh() {
    let Some(mut bare) = Bare::new("k") else {
        return;
    };
    bare.spec.on_reboot = OnReboot::Restart;
    assert_eq!(bare.run().0, ExitReason::Panic, "a panic is no reboot");
    bare.spec.cmdline = "r".into();
    // Devices are made anew: a socket that is bound, a disk that keeps its data.
    bare.spec.vsock = Some(VsockSpec {
        cid: 3,
        socket: bare.folder.path().join("vsock"),
    });
    bare.spec.nvme = vec![NvmeSpec {
        name: "disk".into(),
        serial: "1".into(),
        queues: 2,
        namespaces: vec![NamespaceSpec {
            storage: Storage::Memory { size: 1 << 20 },
            block_size: 512,
        }],
    }];
    let machine = bare.machine();
    let handle = machine.handle();
    let run = thread::spawn(move || machine.run());
    // Each incarnation starts its exit counts at zero.
    let (mut restarts, mut last) = (0, 0);
    while restarts < 3 && !run.is_finished() {
        let stats = handle.stats();
        if let Some(vcpu) = stats.vcpus.first() {
            assert_eq!(stats.devices["disk"].kind, "nvme");
            assert_eq!(stats.devices["vsock"].address, "00:02.0");
            let now = vcpu.kvm.get("exits").copied().unwrap_or(0);
            restarts += u32::from(now < last);
            last = now;
            thread::yield_now();
        }
    }
    handle.kill();
    assert_eq!(run.join().unwrap().unwrap(), ExitReason::Killed);
    assert_eq!(restarts, 3);
}

#[test]
fn statistics_count_exits() {
    let Some(bare) = Bare::new("z") else { return };
    let machine = bare.machine();
    let handle = machine.handle();
    let run = thread::spawn(move || machine.run());
    let stats = loop {
        let stats = handle.stats();
        if stats.vcpus.first().is_some_and(|v| !v.kvm.is_empty()) {
            break stats;
        }
        thread::yield_now();
    };
    assert!(stats.vcpus[0].kvm.contains_key("exits"), "{stats:?}");
    assert!(stats.vcpus[0].kvm.contains_key("mmio_exits"));
    assert!(!stats.vm.is_empty());
    handle.kill();
    run.join().unwrap().unwrap();
}

#[test]
fn impossible_machines_name_the_option() {
    let Some(bare) = Bare::new("o") else { return };
    let error = |change: &dyn Fn(&mut vmm::machine::MachineSpec)| {
        let mut spec = bare.spec.clone();
        change(&mut spec);
        match Machine::new(&spec) {
            Ok(_) => panic!("built"),
            Err(e) => (e.option(), e.to_string()),
        }
    };
    assert_eq!(error(&|s| s.vcpus = 0).0, Some("--vcpus"));
    assert_eq!(error(&|s| s.vcpus = 33).0, Some("--vcpus"));
    assert_eq!(error(&|s| s.memory = 1 << 20).0, Some("--memory"));
    assert_eq!(error(&|s| s.memory = 1 << 60).0, Some("--memory"));
    assert_eq!(error(&|s| s.memory += 1).0, Some("--memory"));
    assert_eq!(
        error(&|s| s.cmdline = "x".repeat(5000)).0,
        Some("--cmdline")
    );
    let (option, text) = error(&|s| s.kernel = "/nonexistent".into());
    assert_eq!(option, Some("--kernel"));
    assert!(text.contains("/nonexistent"), "{text}");
}

//! Test kernels on this host's KVM: started by multiboot, told about the machine, ended through the
//! debug-exit port.

mod kvm_common;

use std::fs;

use kvm_common::{Bare, multiboot_elf};
use vmm::machine::{ExitReason, NamespaceSpec, NvmeSpec, Storage};

/// A machine for the test kernel. `None` where there is no KVM.
fn test_kernel(program: &str) -> Option<Bare> {
    let mut bare = Bare::new(program)?;
    bare.spec.kernel = multiboot_elf();
    bare.spec.test_ports = true;
    Some(bare)
}

#[test]
fn starts_as_multiboot_says_and_is_told_everything() {
    let Some(mut bare) = test_kernel("info and more") else {
        return;
    };
    let module = bare.folder.path().join("module.txt");
    fs::write(&module, "NAME=value").unwrap();
    bare.spec.initrd = Some(module);
    let (reason, text) = bare.run();
    assert_eq!(reason, ExitReason::DebugExit(0), "{text}");
    assert_eq!(
        text,
        "magic 2badb002
paging and protection 00000001
interrupts and virtual-8086 00000000
flags 0000024d
lower KiB 0000027f
upper KiB 0000fc00
map 0000000000000000+000000000009fc00 00000001
map 00000000000e0000+0000000000020000 00000002
map 0000000000100000+0000000003f00000 00000001
map 00000000e0000000+0000000010000000 00000002
line multiboot-guest info and more
loader Ringside
module module.txt: NAME=value
"
    );
}

#[test]
fn fw_cfg_tells_the_machine() {
    let Some(mut bare) = test_kernel("fw_cfg") else {
        return;
    };
    bare.spec.vcpus = 3;
    let (reason, text) = bare.run();
    assert_eq!(reason, ExitReason::DebugExit(0));
    assert_eq!(
        text,
        "signature 554d4551\nprocessors 00000003\nmemory 04000000\n"
    );
}

#[test]
fn the_result_is_the_exit_code() {
    for (program, result, code) in [("x0", 0, 128), ("x1", 1, 129), ("nothing", 1, 129)] {
        let Some(bare) = test_kernel(program) else {
            return;
        };
        let reason = bare.run().0;
        assert_eq!(reason, ExitReason::DebugExit(result));
        assert_eq!(reason.code(), code);
    }
}

#[test]
fn without_test_ports_nobody_listens() {
    let Some(mut bare) = test_kernel("x0") else {
        return;
    };
    bare.spec.test_ports = false;
    let machine = bare.machine();
    let handle = machine.handle();
    let run = std::thread::spawn(move || machine.run());
    // Both its writes to the port are exits; after them it halts for good.
    let writes = || handle.stats().vcpus.first().map(|v| v.user_exits.pio_write);
    while writes() < Some(2) && !run.is_finished() {
        std::thread::yield_now();
    }
    handle.kill();
    assert_eq!(run.join().unwrap().unwrap(), ExitReason::Killed);
}

#[test]
fn pci_is_set_up_as_by_a_firmware() {
    let Some(mut bare) = test_kernel("pci") else {
        return;
    };
    let nvme = |name: &str| NvmeSpec {
        name: name.into(),
        serial: name.into(),
        queues: 2,
        namespaces: vec![NamespaceSpec {
            storage: Storage::Null { size: 1 << 20 },
            block_size: 512,
        }],
    };
    bare.spec.nvme = vec![nvme("a"), nvme("b")];
    let (reason, text) = bare.run();
    assert_eq!(reason, ExitReason::DebugExit(0), "{text}");
    let lines: Vec<_> = text.lines().collect();
    let bar = |line: &str| {
        let (rest, low) = line.rsplit_once(' ').unwrap();
        assert!(rest.ends_with("command 00000002 bar 00000000"), "{line}");
        u32::from_str_radix(low, 16).unwrap() & !15
    };
    // The host bridge has no BAR; the others lie apart in the window below 4 GiB.
    assert!(lines[0].contains("command 00000000"), "{text}");
    let (a, b) = (bar(lines[1]), bar(lines[2]));
    assert!(a >= 0xc000_0000 && b >= 0xc000_0000 && a.abs_diff(b) >= 0x1000);
    assert!(a < 0xe000_0000 && b < 0xe000_0000, "{text}");
}

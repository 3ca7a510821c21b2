//! Linux boots, in every shape that we promise, and ends as it should.

use crate::harness::{Host, image, on_host};
use guest_images::Release;

/// Boots, looks around, switches off.
fn check_boot(host: &Host, kernel: &str, initramfs: &str, vcpus: u32, version: &str) {
    let vcpus_arg = vcpus.to_string();
    let guest = host.boot(&[
        "--kernel", kernel, "--initrd", initramfs, "--vcpus", &vcpus_arg,
    ]);
    let release = guest.sh("uname -r");
    assert!(release.starts_with(version), "{release}");
    assert_eq!(guest.sh("nproc").trim(), vcpus_arg);
    let cpus = guest.sh("cat /proc/cpuinfo");
    let field = |name: &str| -> Vec<&str> {
        let lines = cpus.lines().filter(|line| line.starts_with(name));
        lines.filter_map(|line| line.split(": ").nth(1)).collect()
    };
    let all: Vec<String> = (0..vcpus).map(|id| id.to_string()).collect();
    assert_eq!(field("apicid"), all);
    assert_eq!(
        field("core id"),
        all,
        "one thread a core, all cores in one package"
    );
    assert!(field("physical id").iter().all(|id| *id == "0"));
    let clock = guest.sh("cat /sys/devices/system/clocksource/clocksource0/available_clocksource");
    assert!(clock.contains("kvm-clock"), "{clock}");
    guest.kernel_is_content();
    let done = guest.power_off();
    assert_eq!(done.code, 0, "{}", done.stderr);
}

fn check_release(release: Release, version: &str) {
    let image = image(release);
    on_host(|host| {
        let initramfs = image.initramfs.to_str().unwrap();
        for kernel in [&image.bzimage, &image.vmlinux] {
            for vcpus in [1, 4] {
                check_boot(host, kernel.to_str().unwrap(), initramfs, vcpus, version);
            }
        }
    });
}

#[test]
fn debian_12_boots_as_bzimage_and_elf_on_1_and_4_vcpus() {
    check_release(Release::Debian12, "6.1.");
}

#[test]
fn debian_13_boots_as_bzimage_and_elf_on_1_and_4_vcpus() {
    check_release(Release::Debian13, "6.12.");
}

#[test]
fn twenty_boots_in_a_row() {
    image(Release::Debian13);
    on_host(|host| {
        for _ in 0..20 {
            let guest = host.boot(&[
                "--image",
                "debian-13",
                "--vcpus",
                "2",
                "--nvme",
                "memory=16M",
            ]);
            guest.sh("dd if=/dev/nvme0n1 of=/dev/null bs=64k count=16 iflag=direct 2>&1");
            let done = guest.power_off();
            assert_eq!(done.code, 0, "{}", done.stderr);
        }
    });
}

#[test]
fn memory_lies_below_and_above_4_gib() {
    image(Release::Debian13);
    on_host(|host| {
        let guest = host.boot(&[
            "--image",
            "debian-13",
            "--memory",
            "5G",
            "--nvme",
            "memory=16M",
        ]);
        let kib = guest.sh("awk '/MemTotal/ {print $2}' /proc/meminfo");
        let kib: u64 = kib.trim().parse().unwrap();
        assert!((4_800_000..=5 << 20).contains(&kib), "{kib} KiB");
        guest.sh("dd if=/dev/nvme0n1 of=/dev/null bs=1M count=8 iflag=direct 2>&1");
        guest.kernel_is_content();
    });
}

#[test]
fn reboot_and_panic_have_their_exit_codes() {
    image(Release::Debian13);
    on_host(|host| {
        let guest = host.boot(&["--image", "debian-13"]);
        // The connection goes away with the guest, so the exit code says nothing.
        guest.try_sh("reboot -f");
        assert_eq!(guest.wait().code, 10);

        let guest = host.boot(&["--image", "debian-13"]);
        guest.try_sh("echo c > /proc/sysrq-trigger");
        assert_eq!(guest.wait().code, 11);
    });
}

#[test]
fn a_guest_restarts() {
    image(Release::Debian13);
    on_host(|host| {
        let guest = host.boot(&[
            "--image",
            "debian-13",
            "--on-reboot",
            "restart",
            "--nvme",
            "memory=16M",
            "--vcpus",
            "2",
        ]);
        for round in 0..2 {
            guest.sh(&format!("test ! -e /tmp/seen && touch /tmp/seen # {round}"));
            guest.sh("echo round | dd of=/dev/nvme0n1 oflag=direct bs=4k conv=sync 2>&1");
            guest.try_sh("reboot -f");
            // The old agent may still answer for a moment; the mark tells the two kernels apart.
            while guest.try_sh("test ! -e /tmp/seen").code != 0 {}
            assert!(
                guest.sh("head -c 5 /dev/nvme0n1").starts_with("round"),
                "the disk was kept"
            );
        }
        assert_eq!(guest.power_off().code, 0);
    });
}

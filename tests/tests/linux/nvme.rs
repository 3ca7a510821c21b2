//! Linux's own NVMe driver, nvme-cli and fio against the controller.

use crate::harness::{Guest, image, on_host};
use guest_images::Release;

const BDF: &str = "basename $(readlink -f /sys/class/nvme/nvme0/device)";

/// A background fio that verifies what it wrote; `fio_ends` collects it.
fn start_fio(guest: &Guest<'_>, seconds: u32) {
    guest.sh(&format!(
        "(fio --name=verify --filename=/dev/nvme0n1 --rw=randwrite --bs=4k --size=8M \
         --ioengine=io_uring --iodepth=16 --direct=1 --verify=crc32c --verify_backlog=64 \
         --time_based --runtime={seconds} --minimal >/tmp/fio.out 2>&1; echo $? >/tmp/fio.code) \
         </dev/null >/dev/null 2>&1 &"
    ));
}

fn fio_ends(guest: &Guest<'_>) {
    let code = guest.sh("while ! test -e /tmp/fio.code; do sleep 0.2; done; cat /tmp/fio.code");
    assert_eq!(
        code.trim(),
        "0",
        "{}",
        guest.sh("cat /tmp/fio.out; dmesg | tail -n 30")
    );
    guest.sh("rm /tmp/fio.code");
}

#[test]
fn fio_verifies_on_every_engine_and_disk() {
    image(Release::Debian13);
    on_host(|host| {
        let (file, second) = (host.disk(32), host.disk(32));
        let lba = format!("nvme=0,path={second},lba=4096");
        let guest = host.boot(&[
            "--image",
            "debian-13",
            "--vcpus",
            "2",
            "--nvme",
            &file,
            "--namespace",
            &lba,
            "--nvme",
            "memory=32M",
        ]);
        // Linux probes controllers and scans namespaces in parallel: the numbers in names need not be
        // ours.
        let disks = guest.sh(
            "for i in $(seq 50); do disks=$(ls /sys/block | grep nvme); \
             test $(echo $disks | wc -w) = 3 && break; sleep 0.2; done; echo \"$disks\"",
        );
        assert_eq!(disks.lines().count(), 3, "{disks}");
        for disk in disks.lines() {
            for engine in ["psync", "io_uring", "libaio"] {
                for direct in [0, 1] {
                    guest.sh(&format!(
                        "fio --name=v --filename=/dev/{disk} --rw=randwrite --bsrange=4k-64k \
                     --size=2M --ioengine={engine} --iodepth=8 --direct={direct} --fsync=16 \
                     --verify=crc32c --do_verify=1 --minimal"
                    ));
                }
            }
        }
        let size = guest.sh("for disk in /sys/block/nvme*; do \
             test $(cat $disk/nsid) = 2 && cat $disk/queue/logical_block_size; done; true");
        assert_eq!(size.trim(), "4096");
        guest.kernel_is_content();
        assert_eq!(guest.power_off().code, 0);
    });
}

#[test]
fn there_is_one_vector_per_queue_and_cpu() {
    image(Release::Debian13);
    on_host(|host| {
        let guest = host.boot(&[
            "--image",
            "debian-13",
            "--vcpus",
            "4",
            "--nvme",
            "memory=16M",
        ]);
        for cpu in 0..4 {
            let queue = format!("nvme0q{}", cpu + 1);
            let before = guest.interrupts()[&queue];
            guest.sh(&format!(
                "taskset -c {cpu} dd if=/dev/nvme0n1 of=/dev/null bs=4k count=50 iflag=direct 2>&1"
            ));
            let after = guest.interrupts()[&queue];
            assert!(after >= before + 50, "{queue}: {before} to {after}");
        }
    });
}

#[test]
fn nvme_cli_reads_and_sets_everything() {
    image(Release::Debian13);
    on_host(|host| {
        let disk = host.disk(32);
        let guest = host.boot(&["--image", "debian-13", "--vcpus", "2", "--nvme", &disk]);
        let list = guest.sh("nvme list -o json");
        assert!(list.contains("nvme0n1"), "{list}");
        let controller = guest.sh("nvme id-ctrl /dev/nvme0 -o json");
        let controller: serde_json::Value = serde_json::from_str(&controller).unwrap();
        assert_eq!(controller["nn"].as_u64().map(|nn| nn >= 1), Some(true));
        assert_eq!(controller["ver"].as_u64(), Some(0x1_0400));
        let namespace = guest.sh("nvme id-ns /dev/nvme0n1 -o json");
        let namespace: serde_json::Value = serde_json::from_str(&namespace).unwrap();
        assert_eq!(namespace["nsze"].as_u64(), Some(65536));
        for command in [
            "list-ns /dev/nvme0",
            "ns-descs /dev/nvme0n1",
            "smart-log /dev/nvme0",
            "error-log /dev/nvme0",
            "fw-log /dev/nvme0",
            "flush /dev/nvme0n1",
            "write-zeroes /dev/nvme0n1 -s 0 -c 7",
            "dsm /dev/nvme0n1 -d 1 -s 64 -b 64",
            "get-feature /dev/nvme0 -f 1",
            "get-feature /dev/nvme0 -f 2",
            "get-feature /dev/nvme0 -f 4",
            "get-feature /dev/nvme0 -f 5",
            "get-feature /dev/nvme0 -f 6",
            "get-feature /dev/nvme0 -f 7",
            "get-feature /dev/nvme0 -f 8",
            "get-feature /dev/nvme0 -f 9",
            "get-feature /dev/nvme0 -f 10",
            "get-feature /dev/nvme0 -f 11",
        ] {
            guest.sh(&format!("nvme {command}"));
        }
        for value in [0, 1] {
            guest.sh(&format!("nvme set-feature /dev/nvme0 -f 6 -V {value}"));
            let feature = guest.sh("nvme get-feature /dev/nvme0 -f 6");
            assert!(
                feature.contains(&format!("{value:#010x}"))
                    || feature.contains(&format!("{value:08x}")),
                "{feature}"
            );
        }
        let before = guest.sh("nvme smart-log /dev/nvme0 -o json");
        guest.sh("dd if=/dev/nvme0n1 of=/dev/null bs=1M count=8 iflag=direct 2>&1");
        let after = guest.sh("nvme smart-log /dev/nvme0 -o json");
        let reads = |log: &str| {
            let log: serde_json::Value = serde_json::from_str(log).unwrap();
            log["host_read_commands"].as_u64().unwrap()
        };
        assert!(reads(&after) > reads(&before));
        // What is not supported is refused with a status, not with a hang or a lie.
        assert_ne!(guest.try_sh("nvme format /dev/nvme0n1 -f").code, 0);
        assert_ne!(guest.try_sh("nvme get-feature /dev/nvme0 -f 0x7f").code, 0);
    });
}

#[test]
fn io_survives_controller_resets() {
    image(Release::Debian13);
    on_host(|host| {
        let disk = host.disk(16);
        let guest = host.boot(&["--image", "debian-13", "--vcpus", "2", "--nvme", &disk]);
        start_fio(&guest, 8);
        for _ in 0..5 {
            guest.sh("sleep 0.5; echo 1 > /sys/class/nvme/nvme0/reset_controller");
        }
        fio_ends(&guest);
        assert_eq!(guest.power_off().code, 0);
    });
}

#[test]
fn the_function_can_be_removed_unbound_and_found_again() {
    image(Release::Debian13);
    on_host(|host| {
        let disk = host.disk(16);
        let guest = host.boot(&["--image", "debian-13", "--vcpus", "2", "--nvme", &disk]);
        let read = "dd if=/dev/nvme0n1 of=/dev/null bs=64k count=16 iflag=direct 2>&1";
        guest.sh("echo kept | dd of=/dev/nvme0n1 oflag=direct bs=4k conv=sync 2>&1");
        let back =
            "for i in $(seq 100); do test -b /dev/nvme0n1 && exit 0; sleep 0.1; done; exit 1";
        for _ in 0..3 {
            let bdf = guest.sh(BDF);
            let bdf = bdf.trim();
            guest.sh(&format!(
            "(while :; do {read}; done) >/dev/null 2>&1 & sleep 0.3; \
             echo 1 > /sys/bus/pci/devices/{bdf}/remove; kill $! 2>/dev/null || true; echo 1 > /sys/bus/pci/rescan"
        ));
            guest.sh(back);
            guest.sh(&format!(
                "(while :; do {read}; done) >/dev/null 2>&1 & sleep 0.3; \
             echo {bdf} > /sys/bus/pci/drivers/nvme/unbind; kill $! 2>/dev/null || true; \
             echo {bdf} > /sys/bus/pci/drivers/nvme/bind"
            ));
            guest.sh(back);
            assert!(guest.sh("head -c 4 /dev/nvme0n1").starts_with("kept"));
        }
        assert_eq!(guest.power_off().code, 0);
    });
}

#[test]
fn bus_master_off_stops_io_until_the_driver_recovers() {
    image(Release::Debian13);
    on_host(|host| {
        let disk = host.disk(16);
        let guest = host.boot(&[
            "--image",
            "debian-13",
            "--vcpus",
            "2",
            "--nvme",
            &disk,
            "--cmdline",
            "nvme_core.io_timeout=3 nvme_core.admin_timeout=10",
        ]);
        let bdf = guest.sh(BDF);
        let bdf = bdf.trim();
        start_fio(&guest, 10);
        for _ in 0..2 {
            // Byte 4 of configuration space: memory (bit 1) and bus master (bit 2).
            guest.sh(&format!(
            "sleep 1; printf '\\002' | dd of=/sys/bus/pci/devices/{bdf}/config bs=1 seek=4 conv=notrunc 2>&1"
        ));
            let done = || guest.sh("awk '{print $1 + $5}' /sys/block/nvme0n1/stat");
            let first = done();
            assert_eq!(
                first,
                {
                    guest.sh("sleep 0.5");
                    done()
                },
                "I/O went on without bus mastering"
            );
            guest.sh(&format!(
            "printf '\\006' | dd of=/sys/bus/pci/devices/{bdf}/config bs=1 seek=4 conv=notrunc 2>&1"
        ));
        }
        fio_ends(&guest);
        assert_eq!(guest.power_off().code, 0);
    });
}

#[test]
fn a_full_host_disk_is_an_io_error_and_no_more() {
    image(Release::Debian13);
    on_host(|host| {
        let dir = host.path("small");
        host.shell(&format!(
            "mkdir {dir} && mount -t tmpfs -o size=4M none {dir} && truncate -s 32M {dir}/disk"
        ));
        let disk = format!("{dir}/disk");
        let guest = host.boot(&["--image", "debian-13", "--nvme", &disk]);
        let write = "dd if=/dev/urandom of=/dev/nvme0n1 bs=64k oflag=direct count=256 2>&1";
        let failed = guest.try_sh(write);
        assert_ne!(failed.code, 0, "{}", failed.stdout);
        // What was written is still there, and with room the writes work.
        guest.sh("dd if=/dev/nvme0n1 of=/dev/null bs=64k iflag=direct count=16 2>&1");
        host.shell(&format!("mount -o remount,size=64M {dir}"));
        guest.sh(write);
        assert_eq!(guest.power_off().code, 0);
        host.shell(&format!("umount {dir}"));
    });
}

#[test]
fn a_disk_has_one_writer() {
    image(Release::Debian13);
    on_host(|host| {
        let disk = host.disk(16);
        let guest = host.boot(&["--image", "debian-13", "--nvme", &disk]);
        let second = host.ringside([
            "run",
            "--accel",
            "kvm",
            "--image",
            "debian-13",
            "--nvme",
            &disk,
        ]);
        assert_eq!(second.code, 2, "{}", second.stderr);
        assert!(second.stderr.contains(&disk), "{}", second.stderr);
        assert_eq!(guest.power_off().code, 0);
    });
}

//! Linux's VT-d driver in every mode, with NVMe and virtio-net behind it.

use guest_images::Release;
use serde_json::Value;

use crate::harness::{Guest, Host, image, on_host};
use crate::net::{self, Peer, bytes, configure};

/// A way to use the unit.
struct Mode {
    name: &'static str,
    /// `--iommu`.
    unit: &'static str,
    /// Kernel parameters.
    cmdline: &'static str,
    /// What `/sys/kernel/iommu_groups/*/type` says; `None`: there are no groups.
    domain: Option<&'static str>,
    /// What the driver says of the mode it runs in.
    says: &'static str,
}

const MODES: [Mode; 6] = [
    Mode {
        name: "off",
        unit: "intel",
        cmdline: "intel_iommu=off",
        domain: None,
        says: "DMAR: IOMMU disabled",
    },
    Mode {
        name: "pass-through",
        unit: "intel",
        cmdline: "intel_iommu=on iommu=pt",
        domain: Some("identity"),
        says: "iommu: Default domain type: Passthrough",
    },
    Mode {
        name: "lazy",
        unit: "intel",
        cmdline: "intel_iommu=on iommu.strict=0",
        domain: Some("DMA-FQ"),
        says: "iommu: DMA domain TLB invalidation policy: lazy mode",
    },
    // With tables that the driver must flush from the CPU's caches.
    Mode {
        name: "strict, non-coherent",
        unit: "intel,coherent=off",
        cmdline: "intel_iommu=on iommu.strict=1",
        domain: Some("DMA"),
        says: "iommu: DMA domain TLB invalidation policy: strict mode",
    },
    Mode {
        name: "scalable",
        unit: "intel,scalable=on",
        cmdline: "intel_iommu=on,sm_on iommu.strict=1",
        domain: Some("DMA"),
        says: "DMAR: Enable scalable mode if hardware supports",
    },
    // Every buffer is copied through memory below 4 GiB.
    Mode {
        name: "bounce buffers",
        unit: "intel",
        cmdline: "intel_iommu=off swiotlb=force",
        domain: None,
        says: "software IO TLB",
    },
];

fn boot<'h>(host: &'h Host, release: Release, mode: &Mode) -> Guest<'h> {
    image(release);
    let image = match release {
        Release::Debian12 => "debian-12",
        Release::Debian13 => "debian-13",
    };
    eprintln!("{image}, {}", mode.name);
    host.boot(&[
        "--image",
        image,
        "--vcpus",
        "2",
        "--iommu",
        mode.unit,
        "--cmdline",
        mode.cmdline,
        "--nvme",
        "memory=32M",
        "--net",
        "tap=rstap,pairs=2",
    ])
}

fn count(stats: &Value, pointer: &str) -> u64 {
    let value = stats.pointer(pointer).and_then(Value::as_u64);
    value.unwrap_or_else(|| panic!("no {pointer} in {stats:#}"))
}

/// What the kernel found and how it uses it.
fn check_mode(guest: &Guest<'_>, mode: &Mode) {
    let dmesg = guest.sh("dmesg");
    assert!(dmesg.contains("ACPI: DMAR 0x"), "{dmesg}");
    assert!(
        dmesg.contains("DMAR-IR: Enabled IRQ remapping in x2apic mode"),
        "{dmesg}"
    );
    assert!(dmesg.contains(mode.says), "{}: {dmesg}", mode.name);
    let functions = guest.sh("ls /sys/bus/pci/devices | wc -l");
    let groups = guest.sh(
        "for group in /sys/kernel/iommu_groups/*; do test -d $group || continue; \
         echo $(ls $group/devices | wc -l) $(cat $group/type); done",
    );
    let groups: Vec<_> = groups.lines().collect();
    match mode.domain {
        None => assert_eq!(groups, [""; 0]),
        Some(domain) => {
            let all: usize = functions.trim().parse().expect("a number");
            assert_eq!(groups.len(), all, "one group for each function: {groups:?}");
            let expected = format!("1 {domain}");
            assert!(groups.iter().all(|group| *group == expected), "{groups:?}");
        }
    }
}

/// NVMe and the network carry what they should, and stay usable over the loss of their driver and of
/// themselves.
fn exercise(guest: &Guest<'_>) {
    guest.sh(
        "fio --name=v --filename=/dev/nvme0n1 --rw=randwrite --bsrange=4k-64k --size=2M \
         --ioengine=io_uring --iodepth=8 --direct=1 --verify=crc32c --do_verify=1 --minimal",
    );
    configure(guest);
    for reverse in ["", "--reverse"] {
        let json = guest.sh(&format!(
            "iperf3 -c {} -n 1M -P 2 {reverse} --json",
            net::HOST
        ));
        assert!(bytes(&json, "sum_sent") >= 1 << 20, "{json}");
        assert!(bytes(&json, "sum_received") > 0, "{json}");
    }
    let nvme = guest.sh("basename $(readlink -f /sys/class/nvme/nvme0/device)");
    let nvme = nvme.trim();
    let read = "dd if=/dev/nvme0n1 of=/dev/null bs=64k count=16 iflag=direct";
    let back = "for i in $(seq 100); do test -b /dev/nvme0n1 && exit 0; sleep 0.1; done; exit 1";
    let under_load = |what: &str| {
        guest.sh(&format!(
            "(while :; do {read}; done) >/dev/null 2>&1 & load=$!; sleep 0.2; {what}; code=$?; \
             kill $load 2>/dev/null; wait $load 2>/dev/null; exit $code"
        ));
    };
    under_load(&format!("echo {nvme} > /sys/bus/pci/drivers/nvme/unbind"));
    guest.sh(&format!("echo {nvme} > /sys/bus/pci/drivers/nvme/bind"));
    guest.sh(back);
    under_load(&format!("echo 1 > /sys/bus/pci/devices/{nvme}/remove"));
    guest.sh("echo 1 > /sys/bus/pci/rescan");
    guest.sh(back);
    // The controller is reset, and its queues made anew, while it works.
    under_load("echo 1 > /sys/class/nvme/nvme0/reset_controller");
    guest.sh(read);
    // Half the network's queues go while packets flow.
    guest.sh(&format!(
        "ping -i 0.01 {host} >/dev/null 2>&1 & sleep 0.2; ethtool -L eth0 combined 2 && \
         ethtool -L eth0 combined 1; code=$?; kill $!; ping -c 1 -W 20 {host} && exit $code",
        host = net::HOST
    ));
}

/// What the unit counted fits the mode.
fn check_counters(guest: &Guest<'_>, mode: &Mode) {
    let stats = guest.stats();
    assert_eq!(count(&stats, "/iommu/faults"), 0);
    assert!(count(&stats, "/iommu/interrupts/remapped") > 0);
    let translates = matches!(mode.domain, Some("DMA" | "DMA-FQ"));
    for device in ["nvme0", "net0", "vsock"] {
        let dma = |what: &str| count(&stats, &format!("/devices/{device}/dma/{what}"));
        assert_eq!(dma("iotlb_hits") > 0, translates, "{device}: {stats:#}");
        assert_eq!(dma("iotlb_misses") > 0, translates, "{device}: {stats:#}");
        assert_eq!(dma("pass_through") > 0, !translates, "{device}: {stats:#}");
    }
    let scalable = mode.unit.contains("scalable");
    assert_eq!(count(&stats, "/iommu/invalidations/pasid") > 0, scalable);
}

fn check_release(release: Release, modes: &[Mode]) {
    on_host(|host| {
        for mode in modes {
            let peer = Peer::new(host);
            let guest = boot(host, release, mode);
            check_mode(&guest, mode);
            exercise(&guest);
            check_counters(&guest, mode);
            guest.no_dma_faults();
            assert_eq!(guest.power_off().code, 0);
            drop(peer);
        }
    });
}

#[test]
fn debian_12_in_every_mode() {
    check_release(Release::Debian12, &MODES);
}

#[test]
fn debian_13_in_every_mode() {
    check_release(Release::Debian13, &MODES);
}

/// The second kernel starts with remapping off and no table of the first one's.
#[test]
fn a_reboot_leaves_no_mapping() {
    image(Release::Debian13);
    on_host(|host| {
        let guest = host.boot(&[
            "--image",
            "debian-13",
            "--on-reboot",
            "restart",
            "--iommu",
            "intel",
            "--cmdline",
            "intel_iommu=on iommu.strict=1",
            "--nvme",
            "memory=16M",
        ]);
        guest.sh("touch /tmp/seen; dd if=/dev/nvme0n1 of=/dev/null bs=64k count=16 iflag=direct");
        let before = guest.stats();
        guest.try_sh("reboot -f");
        while guest.try_sh("test ! -e /tmp/seen").code != 0 {}
        guest.sh("dd if=/dev/nvme0n1 of=/dev/null bs=64k count=16 iflag=direct");
        let after = guest.stats();
        assert_eq!(count(&after, "/iommu/faults"), 0);
        // The unit is a new one: what it counted before is gone.
        assert!(
            count(&after, "/iommu/invalidations/total")
                <= 2 * count(&before, "/iommu/invalidations/total")
        );
        guest.no_dma_faults();
        assert_eq!(guest.power_off().code, 0);
    });
}

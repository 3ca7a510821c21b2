//! Drivers in the guest's user space, through vfio and with the IOMMU on: DPDK's testpmd on
//! virtio-net, a small program of ours on NVMe. Also what the IOMMU is for: a function that is told
//! to write where nothing is mapped.

use guest_images::{ImageName, Release};

use crate::harness::{Guest, Host, image, on_host};

/// The host's end of the tap, the address that testpmd answers for, and the guest's own address;
/// 192.0.2.0/24 is for documentation (RFC 5737).
const HOST: &str = "192.0.2.1";
const TESTPMD: &str = "192.0.2.9";
const GUEST: &str = "192.0.2.2";

/// What the program reads, in MiB, bytes, and blocks.
const MIB: u32 = 4;
const BYTES: u32 = MIB << 20;
const BLOCKS: u32 = BYTES / 512;

#[test]
fn linux_6_12_with_drivers_in_user_space() {
    user_space_drivers(Release::Debian13);
}

#[test]
fn linux_6_1_with_drivers_in_user_space() {
    user_space_drivers(Release::Debian12);
}

/// A tap with the host's address, which goes when this is dropped.
struct Tap<'h>(&'h Host);

impl<'h> Tap<'h> {
    fn new(host: &'h Host) -> Tap<'h> {
        host.tool("ip", "tuntap add rsvfio mode tap vnet_hdr");
        let tap = Tap(host);
        host.tool("ip", &format!("address add {HOST}/24 dev rsvfio"));
        host.tool("ip", "link set rsvfio up");
        tap
    }
}

impl Drop for Tap<'_> {
    fn drop(&mut self) {
        // A test that failed takes the nested host with it, and a second panic would hide the first.
        if !std::thread::panicking() {
            self.0.tool("ip", "link delete rsvfio");
        }
    }
}

fn user_space_drivers(release: Release) {
    let name = ImageName {
        release,
        dpdk: true,
    };
    image(name);
    on_host(|host| {
        let tap = Tap::new(host);
        let disk = host.disk(32);
        host.shell(&format!(
            "dd if=/dev/urandom of={disk} bs=1M count={MIB} conv=notrunc status=none"
        ));
        let content = host.shell(&format!("head -c {BYTES} {disk} | sha256sum"));
        let guest = host.boot(&[
            "--image",
            &name.to_string(),
            "--vcpus",
            "2",
            "--memory",
            "768M",
            "--iommu",
            "intel",
            "--cmdline",
            "intel_iommu=on",
            "--nvme",
            &disk,
            "--net",
            "tap=rsvfio",
            "--net",
            "loopback",
        ]);
        guest.sh("modprobe vfio-pci && modprobe vfio_iommu_type1 \
                  && echo 40 > /proc/sys/vm/nr_hugepages");
        let nvme = function(&guest, "/sys/class/nvme/nvme0/device");
        let nets = ["eth0", "eth1"]
            .map(|name| function(&guest, &format!("/sys/class/net/{name}/device/..")));
        for bdf in [&nvme, &nets[0], &nets[1]] {
            let others = guest.sh(&format!(
                "ls /sys/bus/pci/devices/{bdf}/iommu_group/devices"
            ));
            assert_eq!(others.trim(), bdf, "one function per IOMMU group");
            give(&guest, bdf, "vfio-pci");
        }
        let noiommu = guest.sh("ls /dev/vfio; dmesg | grep -ci noiommu || true");
        assert!(!noiommu.contains("noiommu") && noiommu.trim().ends_with('0'));

        our_program_reads(&guest, &nvme, &content);
        testpmd_answers(&guest, host, &nets[0]);
        testpmd_forwards(&guest, &nets[1]);

        for (bdf, driver) in [
            (&nvme, "nvme"),
            (&nets[0], "virtio-pci"),
            (&nets[1], "virtio-pci"),
        ] {
            give(&guest, bdf, driver);
        }
        kernel_drivers_work(&guest, host, &content);
        guest.kernel_is_content();
        assert_eq!(faults(&guest), "");
        assert_eq!(guest.stats()["iommu"]["faults"], 0);

        give(&guest, &nvme, "vfio-pci");
        a_bad_access_faults(&guest, &nvme);
        our_program_reads(&guest, &nvme, &content);
        give(&guest, &nvme, "nvme");
        assert_eq!(guest.sh(&reads_as_before()), content);

        assert_eq!(guest.power_off().code, 0);
        drop(tap);
    });
}

/// The PCI function at or above a device.
fn function(guest: &Guest<'_>, device: &str) -> String {
    let bdf = guest.sh(&format!("basename $(readlink -f {device})"));
    bdf.trim().to_owned()
}

/// Takes a function from its driver and gives it to another.
fn give(guest: &Guest<'_>, bdf: &str, driver: &str) {
    // An empty line takes the override back.
    let only = if driver == "vfio-pci" { driver } else { "" };
    guest.sh(&format!(
        "cd /sys/bus/pci/devices/{bdf} && echo {bdf} > driver/unbind \
         && echo {only} > driver_override && echo {bdf} > /sys/bus/pci/drivers_probe"
    ));
    let bound = guest.sh(&format!(
        "basename $(readlink /sys/bus/pci/devices/{bdf}/driver)"
    ));
    assert_eq!(bound.trim(), driver);
}

/// What the kernel says of DMA that was refused.
fn faults(guest: &Guest<'_>) -> String {
    guest.sh("dmesg | grep 'DMAR: \\[' || true")
}

/// The program reads what the disk holds, with MSI-X and by polling.
fn our_program_reads(guest: &Guest<'_>, bdf: &str, content: &str) {
    let identity = guest.sh(&format!("vfio-nvme {bdf} identify"));
    assert!(identity.contains("\nblock 512\n"), "{identity}");
    for poll in ["", "--poll"] {
        // A pipe hides the exit status of what writes to it.
        let sum = guest.sh(&format!(
            "vfio-nvme {bdf} {poll} read 0 {BLOCKS} > /tmp/blocks && sha256sum < /tmp/blocks"
        ));
        assert_eq!(sum, content, "vfio-nvme {poll}");
    }
    let said = guest.sh(&format!("vfio-nvme {bdf} read 8 1 2>&1 >/dev/null"));
    assert!(
        said.contains(" 1 I/O interrupts"),
        "each command has its interrupt: {said}"
    );
}

/// Starts testpmd on a function in the guest's background, and its forwarding with the command
/// `start`; `testpmd_ends` collects it. Until then it shows its counters five times a second.
fn start_testpmd(guest: &Guest<'_>, bdf: &str, options: &str, start: &str) {
    guest.sh(&format!(
        "rm -f /tmp/stop /tmp/pmd.code; : > /tmp/pmd.out; \
         ((echo {start}; while ! test -e /tmp/stop; do echo show port stats all; sleep 0.2; done; \
           echo stop; echo quit) \
         | (dpdk-testpmd --lcores 0,1 --iova-mode=va --in-memory --no-telemetry -a {bdf} -- \
            -i --total-num-mbufs=2048 {options} >/tmp/pmd.out 2>&1; echo $? >/tmp/pmd.code)) \
         </dev/null >/dev/null 2>&1 &"
    ));
    // It forwards, or it has ended.
    guest.sh(
        "while ! grep -q 'packet forwarding packets/burst' /tmp/pmd.out; do \
         test -e /tmp/pmd.code && break; sleep 0.1; done",
    );
}

/// Ends it, and returns how many packets it has received and sent in all.
fn testpmd_ends(guest: &Guest<'_>) -> [u64; 2] {
    let code = guest.sh(
        "touch /tmp/stop; while ! test -e /tmp/pmd.code; do sleep 0.1; done; cat /tmp/pmd.code",
    );
    let said = guest.sh("tail -n 100 /tmp/pmd.out");
    assert_eq!(code.trim(), "0", "{said}");
    let count = |name: &str| {
        let line = said.lines().rfind(|line| line.contains(name));
        let word = line.and_then(|line| line.split_whitespace().nth(1));
        word.and_then(|word| word.parse().ok())
            .unwrap_or_else(|| panic!("no {name}: {said}"))
    };
    [count("RX-packets:"), count("TX-packets:")]
}

/// testpmd answers address resolution and echo requests that come from the host: what it received
/// was whole, and so was what it sent.
fn testpmd_answers(guest: &Guest<'_>, host: &Host, bdf: &str) {
    start_testpmd(guest, bdf, "--forward-mode=icmpecho", "start");
    host.tool("ping", &format!("-c 5 -i 0.2 -W 20 -s 1400 {TESTPMD}"));
    let [received, sent] = testpmd_ends(guest);
    assert!(received >= 6 && sent >= 6, "{received} in, {sent} out");
}

/// testpmd's first packets come back to it, and it sends them again, and so on.
fn testpmd_forwards(guest: &Guest<'_>, bdf: &str) {
    start_testpmd(
        guest,
        bdf,
        "--forward-mode=io --port-topology=loop",
        "start tx_first",
    );
    guest.sh("for i in $(seq 100); do \
         n=$(awk '/RX-packets:/ {n = $2} END {print n + 0}' /tmp/pmd.out); \
         test $n -ge 1000 && exit 0; sleep 0.2; done; cat /tmp/pmd.out; exit 1");
    let [received, sent] = testpmd_ends(guest);
    assert!(
        received >= 1000 && sent >= 1000,
        "{received} in, {sent} out"
    );
}

fn reads_as_before() -> String {
    let wait = "for i in $(seq 100); do test -b /dev/nvme0n1 && break; sleep 0.1; done";
    format!("{wait}; head -c {BYTES} /dev/nvme0n1 | sha256sum")
}

/// After everything, the kernel's own drivers serve the functions again.
fn kernel_drivers_work(guest: &Guest<'_>, host: &Host, content: &str) {
    assert_eq!(guest.sh(&reads_as_before()), content);
    guest.sh(&format!(
        "fio --name=v --filename=/dev/nvme0n1 --offset={}M --size=2M --rw=randwrite --bs=16k \
         --ioengine=io_uring --iodepth=8 --direct=1 --verify=crc32c --do_verify=1 --minimal",
        2 * MIB
    ));
    guest.sh(&format!(
        "for i in $(seq 100); do test -e /sys/class/net/eth0 && break; sleep 0.1; done; \
         ip address add {GUEST}/24 dev eth0 && ip link set eth0 up"
    ));
    host.tool("ping", &format!("-c 3 -i 0.2 -W 20 {GUEST}"));
}

/// The function is told to write to a page of the program's by its physical address, which its domain
/// does not map: the page stays as it was, the command fails, and there is one fault.
fn a_bad_access_faults(guest: &Guest<'_>, bdf: &str) {
    let said = guest.sh(&format!("vfio-nvme {bdf} bad-dma 2>&1"));
    assert!(said.contains("page unchanged"), "{said}");
    // Base Specification 2.0c figure 94: generic command status, data transfer error.
    assert!(said.contains("status type 0x0 code 0x04"), "{said}");
    let address = said
        .split_whitespace()
        .find_map(|word| word.strip_prefix("0x")?.strip_suffix(','))
        .unwrap_or_else(|| panic!("no address: {said}"));
    // The kernel's interrupt thread may still be writing it.
    guest.sh("for i in $(seq 50); do dmesg | grep -q 'DMAR: \\[' && break; sleep 0.1; done");
    assert_eq!(guest.stats()["iommu"]["faults"], 1);
    let faults = faults(guest);
    let function = bdf.strip_prefix("0000:").unwrap_or(bdf);
    assert_eq!(faults.lines().count(), 1, "{faults}");
    assert!(
        faults.contains("DMA Write")
            && faults.contains(&format!("[{function}]"))
            && faults.contains(&format!("fault addr 0x{address} ")),
        "{faults}{said}"
    );
}

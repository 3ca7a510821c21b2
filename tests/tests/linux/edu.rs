//! The functions that a person drives without a driver: edu, and the DMA probe, which does in a guest
//! what no driver would.

use devices::dma_probe::spec::{self as probe, command, status};
use devices::edu::spec as edu;
use guest_images::Release;

use crate::harness::{Guest, image, on_host};

/// A mebibyte of the guest's memory that its kernel leaves alone, below and above 4 GiB. Their
/// addresses are equal in the bits that edu has.
const LOW: u64 = 0x0800_0000;
const HIGH: u64 = 0x1_0800_0000;
const RESERVED: &str = "memmap=1M$0x8000000 memmap=1M$0x108000000";
/// More than 4 GiB.
const MEMORY: &str = "5G";

/// A function as the guest's kernel found it, with its registers.
struct Function<'g> {
    guest: &'g Guest<'g>,
    /// Its folder in sysfs.
    folder: String,
    /// Its address, as the kernel prints it.
    bdf: String,
    bar: u64,
}

impl<'g> Function<'g> {
    /// Finds it by its ids, turns on memory decoding and finds its BAR.
    fn find(guest: &'g Guest<'g>, vendor: u16, device: u16) -> Function<'g> {
        let folder = guest.sh(&format!(
            "for f in /sys/bus/pci/devices/*; do \
             test $(cat $f/vendor) = {vendor:#06x} && test $(cat $f/device) = {device:#06x} && \
             echo 1 > $f/enable && echo $f; done; true"
        ));
        let folder = folder.trim().to_owned();
        let bdf = folder.rsplit('/').next().expect("a name").to_owned();
        assert!(
            bdf.starts_with("0000:00:"),
            "{vendor:x}:{device:x}: {folder:?}"
        );
        let resource = guest.sh(&format!("head -n 1 {folder}/resource"));
        let start = resource.split_whitespace().next().expect("an address");
        let bar = u64::from_str_radix(start.trim_start_matches("0x"), 16);
        Function {
            guest,
            folder,
            bdf,
            bar: bar.expect("a number"),
        }
    }

    fn bus_master(&self) {
        self.guest
            .sh(&format!("setpci -s {} COMMAND=6:6", self.bdf));
    }

    /// Stores to registers, in order.
    fn set(&self, stores: &[(u64, u8, u64)]) {
        let stores = stores.iter().map(|(register, bits, value)| {
            format!(
                "busybox devmem {:#x} {bits} {value:#x}",
                self.bar + register
            )
        });
        self.guest.sh(&stores.collect::<Vec<_>>().join(" && "));
    }

    fn get(&self, register: u64, bits: u8) -> u64 {
        load(self.guest, self.bar + register, bits)
    }

    /// Loads from a register until `bits` are clear.
    fn until_clear(&self, register: u64, bits: u32) {
        self.guest.sh(&format!(
            "for i in $(seq 1000); do \
             test $(($(busybox devmem {:#x} 32) & {bits})) = 0 && exit 0; done; exit 1",
            self.bar + register
        ));
    }
}

fn load(guest: &Guest<'_>, address: u64, bits: u8) -> u64 {
    let text = guest.sh(&format!("busybox devmem {address:#x} {bits}"));
    u64::from_str_radix(text.trim().trim_start_matches("0x"), 16).expect("a number")
}

fn store(guest: &Guest<'_>, address: u64, value: u64) {
    guest.sh(&format!("busybox devmem {address:#x} 64 {value:#x}"));
}

/// Runs a command of the probe on eight bytes: status, fault reason, bytes done, data.
fn access(probe: &Function<'_>, command: u32, address: u64, data: u64) -> [u64; 4] {
    probe.set(&[
        (probe::ADDRESS, 64, address),
        (probe::LENGTH, 64, 8),
        (probe::DATA, 64, data),
        (probe::COMMAND, 32, command.into()),
    ]);
    let start = probe.bar;
    probe.guest.sh(&format!(
        "for i in $(seq 1000); do \
         test $(($(busybox devmem {:#x} 32))) != {} && exit 0; done; exit 1",
        start + probe::STATUS,
        status::BUSY
    ));
    [
        probe.get(probe::STATUS, 32),
        probe.get(probe::REASON, 32),
        probe.get(probe::DONE, 64),
        probe.get(probe::DATA, 64),
    ]
}

/// edu moves eight bytes at `from` to `to`, through its buffer.
fn edu_copies(function: &Function<'_>, from: u64, to: u64) {
    use edu::command::{RUN, TO_RAM};
    for (from, to, command) in [(from, edu::BUFFER, RUN), (edu::BUFFER, to, RUN | TO_RAM)] {
        function.set(&[
            (edu::DMA_SOURCE, 64, from),
            (edu::DMA_DESTINATION, 64, to),
            (edu::DMA_COUNT, 64, 8),
            (edu::DMA_COMMAND, 64, command),
        ]);
        function.until_clear(edu::DMA_COMMAND, 1);
    }
}

/// What a student's first steps show.
fn first_steps(guest: &Guest<'_>) {
    let edu = Function::find(guest, edu::VENDOR_ID, edu::DEVICE_ID);
    let class = guest.sh(&format!("cat {}/class", edu.folder));
    assert_eq!(class.trim(), "0x00ff00");
    // The IOAPIC's pin that the kernel evaluated _PRT to; its own number for it is another.
    let pin = guest.sh(&format!(
        "cat /sys/kernel/irq/$(cat {}/irq)/hwirq",
        edu.folder
    ));
    let pin: u32 = pin.trim().parse().expect("a number");
    assert!((16..20).contains(&pin), "{pin}");
    assert_eq!(
        edu.get(edu::IDENTIFICATION, 32),
        u64::from(edu::IDENTIFICATION_VALUE)
    );
    edu.set(&[(edu::LIVENESS, 32, 0x1234_5678)]);
    assert_eq!(edu.get(edu::LIVENESS, 32), 0xedcb_a987);
    edu.set(&[(edu::FACTORIAL, 32, 10)]);
    edu.until_clear(edu::STATUS, edu::status::COMPUTING);
    assert_eq!(edu.get(edu::FACTORIAL, 32), 3_628_800);
}

#[test]
fn edu_and_the_probe_from_a_shell() {
    image(Release::Debian13);
    on_host(|host| {
        let guest = host.boot(&[
            "--image",
            "debian-13",
            "--memory",
            MEMORY,
            "--edu",
            "--dma-probe",
            "--cmdline",
            RESERVED,
        ]);
        first_steps(&guest);
        store(&guest, LOW, 0x4c4f57);
        store(&guest, HIGH, 0x4849_4748);
        let probe = Function::find(&guest, probe::VENDOR_ID, probe::DEVICE_ID);
        let off = access(&probe, command::READ, LOW, 0);
        assert_eq!(off, [status::BUS_MASTER_OFF.into(), 0, 0, 0]);
        probe.bus_master();
        let ok = u64::from(status::OK);
        assert_eq!(
            access(&probe, command::READ, HIGH, 0),
            [ok, 0, 8, 0x4849_4748]
        );
        let data = 0x1122_3344_5566_7788;
        assert_eq!(
            access(&probe, command::WRITE, LOW + 8, data),
            [ok, 0, 8, data]
        );
        assert_eq!(load(&guest, LOW + 8, 64), data);
        // 28 address lines: edu cannot reach what is above 4 GiB, takes the low memory that has the
        // same bits, and does not say so. That is what a DMA mask and a bounce buffer are for.
        let edu = Function::find(&guest, edu::VENDOR_ID, edu::DEVICE_ID);
        edu.bus_master();
        edu_copies(&edu, HIGH, LOW + 16);
        assert_eq!(load(&guest, LOW + 16, 64), 0x4c4f57);
        edu_copies(&edu, LOW, HIGH + 24);
        assert_eq!(load(&guest, HIGH + 24, 64), 0);
        assert_eq!(load(&guest, LOW + 24, 64), 0x4c4f57);
        let stats = guest.stats();
        assert_eq!(
            stats["devices"]["edu0"]["counters"]["dma_clamped"], 2,
            "{stats:#}"
        );
        guest.kernel_is_content();
        assert_eq!(guest.power_off().code, 0);
    });
}

/// The kernel gives each function a domain of its own, empty until a driver maps something. What the
/// probe then does is a bad DMA; when its group is switched to pass-through, it is a good one.
#[test]
fn a_bad_dma_is_blocked_and_reported() {
    image(Release::Debian13);
    on_host(|host| {
        let guest = host.boot(&[
            "--image",
            "debian-13",
            "--iommu",
            "intel",
            "--edu",
            "--dma-probe",
            "--cmdline",
            "intel_iommu=on memmap=1M$0x8000000",
        ]);
        first_steps(&guest);
        let probe = Function::find(&guest, probe::VENDOR_ID, probe::DEVICE_ID);
        probe.bus_master();
        let canary = 0x0ca9_a417;
        store(&guest, LOW, canary);
        let faults = || guest.sh("dmesg | grep 'DMAR:.*fault addr' || true");
        assert_eq!(faults(), "");
        let data = 0x1122_3344_5566_7788;
        let blocked = u64::from(status::BLOCKED);
        // A write to a page without write permission (VT-d rev 4.1, 7.1.3): reason 5.
        assert_eq!(
            access(&probe, command::WRITE, LOW, data),
            [blocked, 5, 0, data]
        );
        assert_eq!(load(&guest, LOW, 64), canary);
        // The kernel prints it in its interrupt handler.
        guest.sh(
            "for i in $(seq 100); do dmesg | grep -q 'DMAR:.*fault addr' && exit 0; sleep 0.1; \
             done; exit 1",
        );
        let faults = faults();
        let bdf = probe.bdf.trim_start_matches("0000:");
        assert_eq!(faults.lines().count(), 1, "{faults}");
        for part in ["DMA Write", bdf, "fault addr 0x8000000", "reason 0x05"] {
            assert!(faults.contains(part), "{part}: {faults}");
        }
        let stats = guest.stats();
        assert_eq!(stats["iommu"]["faults"], 1, "{stats:#}");
        assert_eq!(
            stats["devices"]["probe0"]["counters"]["blocked"], 1,
            "{stats:#}"
        );
        // The same write, with permission.
        guest.sh(&format!(
            "echo identity > {}/iommu_group/type",
            probe.folder
        ));
        let ok = u64::from(status::OK);
        assert_eq!(access(&probe, command::WRITE, LOW, data), [ok, 0, 8, data]);
        assert_eq!(load(&guest, LOW, 64), data);
        assert_eq!(guest.stats()["iommu"]["faults"], 1);
        assert_eq!(guest.power_off().code, 0);
    });
}

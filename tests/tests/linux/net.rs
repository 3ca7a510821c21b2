//! virtio-net under Linux's driver, with a tap on the other side.

use guest_images::Release;

use crate::harness::{Guest, Host, image, on_host};

/// The host's end of the network; 192.0.2.0/24 is for documentation (RFC 5737).
pub const HOST: &str = "192.0.2.1";

/// A tap with the host's address and an iperf3 server; both go when this is dropped.
pub struct Peer<'h>(&'h Host);

impl<'h> Peer<'h> {
    pub fn new(host: &'h Host) -> Peer<'h> {
        host.tool("ip", "tuntap add rstap mode tap multi_queue vnet_hdr");
        let peer = Peer(host);
        host.tool("ip", &format!("address add {HOST}/24 dev rstap"));
        host.tool("ip", "link set rstap up");
        let pid = host.path("iperf3.pid");
        host.tool(
            "iperf3",
            &format!("--server --daemon --bind {HOST} --pidfile {pid}"),
        );
        peer
    }
}

impl Drop for Peer<'_> {
    fn drop(&mut self) {
        // A test that failed takes the nested host with it, and a second panic would hide the first.
        if std::thread::panicking() {
            return;
        }
        self.0.run(["pkill", "-f", "iperf3 --server"]);
        self.0.tool("ip", "link delete rstap");
    }
}

/// Gives the card its address, and waits until the host answers.
pub fn configure(guest: &Guest<'_>) {
    guest.sh("ip link set eth0 up && ip address add 192.0.2.2/24 dev eth0");
    // The first packet may wait for address resolution.
    guest.sh(&format!("ping -c 3 -W 20 {HOST}"));
}

/// Bytes of one of iperf3's sums.
pub fn bytes(json: &str, sum: &str) -> u64 {
    let json: serde_json::Value = serde_json::from_str(json).expect("iperf3 prints JSON");
    json["end"][sum]["bytes"]
        .as_u64()
        .unwrap_or_else(|| panic!("{json}"))
}

#[test]
fn tcp_flows_both_ways_with_and_without_offloads() {
    on_host(|host| {
        for release in [Release::Debian12, Release::Debian13] {
            let name = image(release);
            let name = format!(
                "debian-{}",
                if name.release == Release::Debian12 {
                    12
                } else {
                    13
                }
            );
            let peer = Peer::new(host);
            let guest = host.boot(&[
                "--image",
                &name,
                "--vcpus",
                "2",
                "--net",
                "tap=rstap,pairs=2",
            ]);
            configure(&guest);
            for features in ["on", "off"] {
                guest.sh(&format!(
                    "ethtool -K eth0 tx {features} rx {features} tso {features} gro {features}"
                ));
                for reverse in ["", "--reverse"] {
                    let json = guest.sh(&format!("iperf3 -c {HOST} -n 1M -P 2 {reverse} --json"));
                    // The receiver stops counting when the sender has handed its last byte to the
                    // kernel; on a slow host most of 1 MiB may be under way then.
                    assert!(bytes(&json, "sum_sent") >= 1 << 20, "{json}");
                    assert!(bytes(&json, "sum_received") > 0, "{json}");
                }
            }
            // Both checksum errors and packets out of shape would show here.
            let errors = guest.sh("cat /sys/class/net/eth0/statistics/rx_errors \
                               /sys/class/net/eth0/statistics/tx_errors; \
                               awk '/^Tcp:/ {n = $14} END {print n}' /proc/net/snmp");
            let errors: Vec<_> = errors.split_whitespace().collect();
            assert_eq!(errors[..2], ["0", "0"]);
            guest.kernel_is_content();
            assert_eq!(guest.power_off().code, 0);
            drop(peer);
        }
    });
}

#[test]
fn queue_counts_change_under_traffic() {
    image(Release::Debian13);
    on_host(|host| {
        let peer = Peer::new(host);
        let guest = host.boot(&[
            "--image",
            "debian-13",
            "--vcpus",
            "4",
            "--net",
            "tap=rstap,pairs=4",
        ]);
        configure(&guest);
        guest.sh(&format!(
        "(iperf3 -c {HOST} -t 10 -P 4 --json > /tmp/iperf.json 2>&1; echo $? > /tmp/iperf.code) \
         </dev/null >/dev/null 2>&1 &"
    ));
        for pairs in [2, 4, 1, 3, 1, 4] {
            guest.sh(&format!("sleep 0.5; ethtool -L eth0 combined {pairs}"));
            let now = guest.sh("ethtool -l eth0 | awk '/Combined/ {n = $2} END {print n}'");
            assert_eq!(now.trim(), pairs.to_string());
        }
        let code =
            guest.sh("while ! test -e /tmp/iperf.code; do sleep 0.2; done; cat /tmp/iperf.code");
        assert_eq!(code.trim(), "0", "{}", guest.sh("cat /tmp/iperf.json"));
        assert!(bytes(&guest.sh("cat /tmp/iperf.json"), "sum_received") > 0);
        // With one pair, the others are silent.
        guest.sh("ethtool -L eth0 combined 1");
        let before = guest.interrupts();
        guest.sh(&format!("iperf3 -c {HOST} -n 512K -P 4 --json"));
        let after = guest.interrupts();
        let grew = |name: &str| {
            let count = |all: &std::collections::BTreeMap<String, u64>| {
                all.iter()
                    .filter(|(key, _)| key.ends_with(name))
                    .map(|(_, n)| n)
                    .sum::<u64>()
            };
            count(&after) > count(&before)
        };
        assert!(grew("-input.0"));
        for pair in 1..4 {
            assert!(
                !grew(&format!("-input.{pair}")),
                "pair {pair} is off, but got packets"
            );
        }
        guest.kernel_is_content();
        assert_eq!(guest.power_off().code, 0);
        drop(peer);
    });
}

#[test]
fn the_network_function_can_be_unbound_and_removed() {
    image(Release::Debian13);
    on_host(|host| {
        let peer = Peer::new(host);
        let guest = host.boot(&[
            "--image",
            "debian-13",
            "--vcpus",
            "2",
            "--net",
            "tap=rstap,pairs=2",
        ]);
        configure(&guest);
        let bdf = guest.sh("basename $(readlink -f /sys/class/net/eth0/device/..)");
        let bdf = bdf.trim();
        let back = "for i in $(seq 100); do test -e /sys/class/net/eth0 && exit 0; sleep 0.1; done; exit 1";
        for _ in 0..2 {
            guest.sh(&format!(
                "ping -i 0.01 {HOST} >/dev/null 2>&1 & sleep 0.3; \
             echo {bdf} > /sys/bus/pci/drivers/virtio-pci/unbind; \
             echo {bdf} > /sys/bus/pci/drivers/virtio-pci/bind; kill $! 2>/dev/null || true"
            ));
            guest.sh(back);
            configure(&guest);
            guest.sh(&format!(
            "ping -i 0.01 {HOST} >/dev/null 2>&1 & sleep 0.3; \
             echo 1 > /sys/bus/pci/devices/{bdf}/remove; echo 1 > /sys/bus/pci/rescan; kill $! 2>/dev/null || true"
        ));
            guest.sh(back);
            configure(&guest);
        }
        assert_eq!(guest.power_off().code, 0);
        drop(peer);
    });
}

//! The demo itself, in a network namespace on a host whose KVM can run the guest.

use std::io::{self, Write};
use std::path::{Path, PathBuf};
use std::time::Instant;

use super::guest::{Counters, Guest};
use super::jobs::{Fio, Outcome, parse_iperf, parse_ping};
use super::network::{GUEST_ADDRESS, HOST_ADDRESS, make_tap, serve_iperf};
use super::table::{Row, render};
use super::{Done, Failure, IommuMode};

/// What to do.
pub(super) struct Plan {
    pub(super) image: String,
    /// Folder of the host's programs.
    pub(super) tools: PathBuf,
    /// Bytes that each job writes and reads.
    pub(super) size: u64,
    pub(super) tcp_seconds: u32,
    pub(super) iommu: IommuMode,
}

/// Brings the network card up, whatever the kernel called it, with both queue pairs. Prints how
/// many there are.
const NETWORK: &str = "\
for d in /sys/class/net/e*; do dev=${d##*/}; done; \
ip link set $dev up && ip address add $ADDRESS/24 dev $dev && \
ethtool -L $dev combined 2 2>/dev/null; ethtool -l $dev | awk '/Combined/ {n=$2} END {print n}'";

pub(super) fn run(plan: &Plan) -> Done {
    let folder = tempfile::Builder::new()
        .prefix("ringside-demo-")
        .tempdir()?;
    let result = perform(plan, folder.path());
    if result.is_err() {
        let tail = Guest::console_tail(folder.path());
        if !tail.is_empty() {
            let _ = writeln!(io::stderr(), "The end of the guest's console:\n{tail}\n");
        }
    }
    result.map(|()| 0)
}

fn say(line: &str) {
    // A closed standard error is no reason to fail.
    let _ = writeln!(io::stderr(), "demo: {line}");
}

fn perform(plan: &Plan, folder: &Path) -> Result<(), Failure> {
    let start = Instant::now();
    make_tap(&plan.tools)?;
    let _server = serve_iperf(&plan.tools)?;
    say(&format!(
        "booting {}: 2 vCPUs, an NVMe disk, virtio-net with 2 queue pairs, IOMMU: {}",
        plan.image, plan.iommu
    ));
    let mut guest = Guest::start(folder, &plan.image, plan.size, plan.iommu)?;
    guest.wait()?;
    say(&format!("up after {:.1} s", start.elapsed().as_secs_f64()));
    let kernel = guest.exec(&["uname", "-sr"])?;

    let mut rows = Vec::new();
    for (engine, depth) in [("psync", 1), ("io_uring", 8)] {
        for write in [true, false] {
            let job = Fio {
                engine,
                write,
                depth,
                size: plan.size,
            };
            rows.push(fio(&guest, job)?);
        }
    }
    let pairs = guest.exec(&["sh", "-c", &NETWORK.replace("$ADDRESS", GUEST_ADDRESS)])?;
    if pairs.trim() != "2" {
        let pairs = pairs.trim();
        return Err(Failure::Other(format!(
            "the network card has {pairs} active queue pairs, not 2"
        )));
    }
    rows.push(ping(&guest)?);
    rows.push(tcp(&guest, plan.tcp_seconds)?);
    let vectors = guest.vectors()?;
    let iommu = guest.counters()?.iommu;
    guest.power_off()?;

    let text = format!(
        "\n{} on {}: every block read back had the right checksum.\n\n{}\n\
         Exits are VM exits of both vCPUs (KVM's statistics), irqs those of the device, xlat are \
         translations of the\nIOMMU, hit% those that an IOTLB had, inv its invalidations, from \
         before a job's start to after its end,\nits program's start included. For the network, an \
         IO is a packet.\n\nIOMMU ({}): {} interrupts remapped, {} faults.\n\n\
         Interrupts in the guest, one vector per queue:\n{vectors}\n\n\
         Done in {:.0} s.\n",
        kernel.trim(),
        plan.image,
        render(&rows),
        plan.iommu,
        iommu.remapped,
        iommu.faults,
        start.elapsed().as_secs_f64()
    );
    io::stdout().write_all(text.as_bytes())?;
    Ok(())
}

/// Runs something between two looks at the counters.
fn counted(
    guest: &Guest,
    title: String,
    device: fn(&str) -> bool,
    job: impl FnOnce() -> Result<Outcome, Failure>,
) -> Result<(Row, Counters, Counters), Failure> {
    say(&title);
    let before = guest.counters()?;
    let outcome = job()?;
    let after = guest.counters()?;
    let sum = |counters: &Counters| -> u64 {
        let wanted = counters.interrupts.iter().filter(|(name, _)| device(name));
        wanted.map(|(_, count)| count).sum()
    };
    let row = Row {
        title,
        outcome,
        exits: after.exits.saturating_sub(before.exits),
        interrupts: sum(&after).saturating_sub(sum(&before)),
        iommu: after.iommu.since(&before.iommu),
    };
    Ok((row, before, after))
}

fn fio(guest: &Guest, job: Fio) -> Result<Row, Failure> {
    let command = job.command();
    let argv: Vec<&str> = command.iter().map(String::as_str).collect();
    let disk = |name: &str| name.starts_with("nvme");
    let run = || job.parse(&guest.exec(&argv)?);
    Ok(counted(guest, job.title(), disk, run)?.0)
}

/// A network job: its operations are the packets that went by.
fn network(
    guest: &Guest,
    title: &str,
    job: impl FnOnce() -> Result<Outcome, Failure>,
) -> Result<Row, Failure> {
    let card = |name: &str| name.starts_with("virtio") && name.contains("put");
    let (mut row, before, after) = counted(guest, title.to_owned(), card, job)?;
    row.outcome.operations = after.packets.saturating_sub(before.packets);
    Ok(row)
}

fn ping(guest: &Guest) -> Result<Row, Failure> {
    network(guest, "ping", || {
        let text = guest.exec(&["ping", "-c", "10", "-i", "0.2", HOST_ADDRESS])?;
        let (average, maximum) = parse_ping(&text)?;
        say(&format!(
            "ping: 10 of 10 came back, {average:.0} us on average, {maximum:.0} us at most"
        ));
        Ok(Outcome {
            operations: 0,
            iops: None,
            bytes_per_second: None,
            latency_us: None,
        })
    })
}

fn tcp(guest: &Guest, seconds: u32) -> Result<Row, Failure> {
    let seconds = seconds.to_string();
    network(guest, "TCP, iperf3", || {
        let text = guest.exec(&[
            "iperf3",
            "--client",
            HOST_ADDRESS,
            "--time",
            &seconds,
            "--parallel",
            "2",
            "--json",
        ])?;
        Ok(Outcome {
            operations: 0,
            iops: None,
            bytes_per_second: Some(parse_iperf(&text)?),
            latency_us: None,
        })
    })
}

//! The demo's guest: a `ringside run` of its own, seen through its sockets.

use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitStatus, Stdio};
use std::time::{Duration, Instant};

use guest_images::agent::{AgentClient, ExecSpec, Exit, Shutdown};
use serde_json::Value;

use super::Failure;
use super::IommuMode;
use super::network::TAP;
use crate::control::{Method, request};

/// How long the boot may take: nested guests are slow on a busy machine.
const BOOT: Duration = Duration::from_secs(300);
/// One attempt to reach the agent, after which it is looked whether the guest still lives.
const ATTEMPT: Duration = Duration::from_secs(2);
/// How much of the guest's console is shown when something fails.
const TAIL_LINES: usize = 25;

/// Counters at one moment.
pub(super) struct Counters {
    /// VM exits of all vCPUs.
    pub(super) exits: u64,
    /// Interrupts by their name in the guest's `/proc/interrupts`, of all vCPUs.
    pub(super) interrupts: BTreeMap<String, u64>,
    /// Packets that the guest's network card sent and received.
    pub(super) packets: u64,
    /// What the IOMMU did, for all functions.
    pub(super) iommu: IommuCounters,
}

/// What the IOMMU did.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) struct IommuCounters {
    /// Translations that an IOTLB had.
    pub(super) hits: u64,
    /// Translations that took a walk.
    pub(super) misses: u64,
    /// Invalidation descriptors without waits.
    pub(super) invalidations: u64,
    /// Interrupts that were delivered through a remapping table entry.
    pub(super) remapped: u64,
    /// Faults, of DMA and of interrupts.
    pub(super) faults: u64,
}

impl IommuCounters {
    /// What was added since `earlier`.
    pub(super) fn since(&self, earlier: &IommuCounters) -> IommuCounters {
        IommuCounters {
            hits: self.hits.saturating_sub(earlier.hits),
            misses: self.misses.saturating_sub(earlier.misses),
            invalidations: self.invalidations.saturating_sub(earlier.invalidations),
            remapped: self.remapped.saturating_sub(earlier.remapped),
            faults: self.faults.saturating_sub(earlier.faults),
        }
    }
}

pub(super) struct Guest {
    child: Child,
    folder: PathBuf,
}

impl Guest {
    /// Starts the guest with a disk of `disk` bytes; everything of it is in `folder`.
    pub(super) fn start(
        folder: &Path,
        image: &str,
        disk: u64,
        iommu: IommuMode,
    ) -> Result<Self, Failure> {
        let image_file = folder.join("disk.img");
        fs::File::create_new(&image_file)?.set_len(disk)?;
        let child = Command::new(std::env::current_exe()?)
            .args([
                "run",
                "--accel=kvm",
                "--name=demo",
                "--vcpus=2",
                "--memory=768M",
            ])
            .arg(format!("--image={image}"))
            .arg(format!("--iommu={}", iommu.unit()))
            .arg(format!(
                "--cmdline=ringside.console=off {}",
                iommu.parameters()
            ))
            .arg(format!("--nvme=path={},serial=DEMO", escape(&image_file)))
            .arg(format!("--net=tap={TAP},pairs=2"))
            .arg(format!(
                "--serial=file:{}",
                folder.join("console.log").display()
            ))
            .env("XDG_RUNTIME_DIR", folder)
            .stdin(Stdio::null())
            .spawn()?;
        Ok(Self {
            child,
            folder: folder.to_owned(),
        })
    }

    fn socket(&self, name: &str) -> PathBuf {
        self.folder.join("ringside/demo").join(name)
    }

    /// Waits until the agent answers.
    pub(super) fn wait(&mut self) -> Result<(), Failure> {
        let start = Instant::now();
        loop {
            if let Some(status) = self.child.try_wait()? {
                return Err(Failure::Other(format!("the guest ended early: {status}")));
            }
            let agent = AgentClient::connect(&self.socket("vsock"), ATTEMPT);
            match agent.and_then(AgentClient::info) {
                Ok(_) => return Ok(()),
                Err(error) if start.elapsed() > BOOT => {
                    return Err(Failure::Other(format!("the guest did not boot: {error}")));
                }
                Err(_) => {}
            }
        }
    }

    /// Runs a command; its standard output. Anything but success is an error.
    pub(super) fn exec(&self, argv: &[&str]) -> Result<String, Failure> {
        let (exit, stdout, stderr) = self.try_exec(argv)?;
        if exit == Exit::Code(0) {
            return Ok(stdout);
        }
        let how = match exit {
            Exit::Code(code) => format!("exit code {code}"),
            Exit::Signal(signal) => format!("signal {signal}"),
        };
        let mut text = format!("`{}` failed in the guest: {how}", argv.join(" "));
        for line in stderr
            .lines()
            .rev()
            .take(5)
            .collect::<Vec<_>>()
            .iter()
            .rev()
        {
            text += "\n  ";
            text += line;
        }
        Err(Failure::Other(text))
    }

    fn try_exec(&self, argv: &[&str]) -> Result<(Exit, String, String), Failure> {
        let agent = AgentClient::connect(&self.socket("vsock"), Duration::from_secs(30));
        let (exit, stdout, stderr) = agent
            .and_then(|agent| agent.output(&ExecSpec::new(argv)))
            .map_err(Failure::other)?;
        let text = |bytes: Vec<u8>| String::from_utf8_lossy(&bytes).into_owned();
        Ok((exit, text(stdout), text(stderr)))
    }

    pub(super) fn counters(&self) -> Result<Counters, Failure> {
        let seen = self.exec(&["cat", "/proc/interrupts", "/proc/net/dev"])?;
        let stats =
            request(&self.socket("control"), Method::Get, "/stats").map_err(Failure::other)?;
        Ok(Counters {
            exits: exits(&stats),
            interrupts: interrupts(&seen),
            packets: packets(&seen),
            iommu: iommu(&stats),
        })
    }

    /// The lines of `/proc/interrupts` that belong to the disk and the network card, with the head.
    pub(super) fn vectors(&self) -> Result<String, Failure> {
        let seen = self.exec(&["cat", "/proc/interrupts"])?;
        let mut lines = seen.lines();
        let mut text = lines.next().unwrap_or_default().to_owned();
        for line in lines.filter(|line| line.contains("nvme") || line.contains("virtio")) {
            text += "\n";
            text += line.trim_end();
        }
        Ok(text)
    }

    /// Switches the guest off and waits for its process.
    pub(super) fn power_off(mut self) -> Result<(), Failure> {
        AgentClient::connect(&self.socket("vsock"), Duration::from_secs(30))
            .and_then(|agent| agent.shutdown(Shutdown::PowerOff))
            .map_err(Failure::other)?;
        let status = self.wait_end(Duration::from_secs(60))?;
        if status.success() {
            Ok(())
        } else {
            Err(Failure::Other(format!(
                "the guest did not end with power-off: {status}"
            )))
        }
    }

    fn wait_end(&mut self, patience: Duration) -> Result<ExitStatus, Failure> {
        let start = Instant::now();
        loop {
            if let Some(status) = self.child.try_wait()? {
                return Ok(status);
            }
            if start.elapsed() > patience {
                return Err(Failure::Other(
                    "the guest does not switch itself off".into(),
                ));
            }
            std::thread::sleep(Duration::from_millis(50));
        }
    }

    /// The end of what the guest's console said.
    pub(super) fn console_tail(folder: &Path) -> String {
        let log = fs::read(folder.join("console.log")).unwrap_or_default();
        let log = String::from_utf8_lossy(&log);
        let lines: Vec<_> = log.lines().collect();
        let start = lines.len().saturating_sub(TAIL_LINES);
        lines.get(start..).unwrap_or_default().join("\n")
    }
}

impl Drop for Guest {
    fn drop(&mut self) {
        // Both fail only when it has ended.
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// A path as a value of a flag's key.
fn escape(path: &Path) -> String {
    path.display().to_string().replace(',', ",,")
}

fn exits(stats: &Value) -> u64 {
    let vcpus = stats.get("vcpus").and_then(Value::as_array);
    let counts = vcpus.into_iter().flatten();
    counts
        .filter_map(|vcpu| vcpu.pointer("/kvm/exits").and_then(Value::as_u64))
        .sum()
}

fn iommu(stats: &Value) -> IommuCounters {
    let count = |value: &Value, path: &str| value.pointer(path).and_then(Value::as_u64);
    let devices = || stats.get("devices").and_then(Value::as_object);
    let functions = |path: &str| -> u64 {
        let devices = devices().into_iter().flat_map(|devices| devices.values());
        devices.filter_map(|device| count(device, path)).sum()
    };
    let unit = |path: &str| count(stats, path).unwrap_or(0);
    IommuCounters {
        hits: functions("/dma/iotlb_hits"),
        misses: functions("/dma/iotlb_misses"),
        invalidations: unit("/iommu/invalidations/total"),
        remapped: unit("/iommu/interrupts/remapped"),
        faults: unit("/iommu/faults"),
    }
}

/// `/proc/interrupts` as sums over the CPUs, by the name at the end of the line.
fn interrupts(text: &str) -> BTreeMap<String, u64> {
    let mut sums = BTreeMap::new();
    for line in text.lines() {
        let Some((number, rest)) = line.split_once(':') else {
            continue;
        };
        if number.trim().parse::<u32>().is_err() {
            continue;
        }
        let mut words = rest.split_ascii_whitespace().peekable();
        let mut sum: u64 = 0;
        while let Some(count) = words.peek().and_then(|word| word.parse::<u64>().ok()) {
            sum = sum.saturating_add(count);
            words.next();
        }
        if let Some(name) = words.last() {
            let entry: &mut u64 = sums.entry(name.to_owned()).or_default();
            *entry = entry.saturating_add(sum);
        }
    }
    sums
}

/// Packets in `/proc/net/dev`, both ways, without the loopback interface's.
fn packets(text: &str) -> u64 {
    text.lines()
        .filter_map(|line| line.split_once(':'))
        .filter(|(name, _)| name.trim().starts_with('e'))
        .map(|(_, numbers)| {
            let numbers: Vec<u64> = numbers
                .split_ascii_whitespace()
                .filter_map(|number| number.parse().ok())
                .collect();
            // Receive: bytes, packets, ...; transmit begins with the ninth number.
            let at = |index: usize| numbers.get(index).copied().unwrap_or(0);
            at(1).saturating_add(at(9))
        })
        .sum()
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    #[test]
    fn interrupts_are_summed_over_the_cpus() {
        let text = "           CPU0       CPU1\n  4:  12   0   IO-APIC   4-edge      ttyS0\n \
                    25:  10   5  PCI-MSIX-0000:00:01.0   1-edge  nvme0q1\nNMI: 7 7 Non-maskable\n\
                    eth0: 100 3 0 0 0 0 0 0 200 4 0 0 0 0 0 0\n    lo: 9 9 0 0 0 0 0 0 9 9 0\n";
        let sums = interrupts(text);
        assert_eq!(sums.get("nvme0q1"), Some(&15));
        assert_eq!(sums.get("ttyS0"), Some(&12));
        assert_eq!(sums.len(), 2);
        assert_eq!(packets(text), 7);
    }

    #[test]
    fn exits_are_summed_over_the_vcpus() {
        let stats = json!({"vcpus": [{"kvm": {"exits": 5}}, {"kvm": {}}, {"kvm": {"exits": 2}}]});
        assert_eq!(exits(&stats), 7);
        assert_eq!(exits(&json!({})), 0);
    }
}

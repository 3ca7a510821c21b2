//! `ringside doctor`: what this host can do, and why.

use std::fmt::Write as _;
use std::io::{self, Write as _};

use serde::Serialize;

use super::{Done, Failure};
use crate::config::Accel;
use crate::probe::{HostCheck, Outcome, Probe, State, Verdict, host_checks, probe};

#[derive(Debug, clap::Args)]
pub(super) struct DoctorArgs {
    /// Print JSON
    #[arg(long)]
    json: bool,
}

#[derive(Serialize)]
#[serde(rename_all = "kebab-case")]
struct Report {
    kvm: Probe,
    host: Vec<HostCheck>,
    /// What `--accel auto` takes.
    accel_auto: Accel,
}

pub(super) fn main(args: &DoctorArgs) -> Done {
    let kvm = probe();
    let report = Report {
        accel_auto: if kvm.can_run_linux() {
            Accel::Kvm
        } else {
            Accel::Nested
        },
        kvm,
        host: host_checks(),
    };
    let text = if args.json {
        serde_json::to_string_pretty(&report).map_err(Failure::other)? + "\n"
    } else {
        render(&report)
    };
    io::stdout().write_all(text.as_bytes())?;
    Ok(0)
}

/// A label and what belongs to it, line by line.
fn section(text: &mut String, label: &str, lines: &[String]) {
    for (index, line) in lines.iter().enumerate() {
        let label = if index == 0 { label } else { "" };
        // Writing to a string does not fail.
        let _ = writeln!(text, "  {label:<14} {line}");
    }
}

fn render(report: &Report) -> String {
    let kvm = &report.kvm;
    let mut text = String::from("KVM\n");
    section(&mut text, "device", &[device(kvm)]);
    if !kvm.capabilities.is_empty() {
        section(&mut text, "capabilities", &capabilities(kvm));
        section(&mut text, "ring 0", &trials(kvm));
        section(&mut text, "MSRs", &[msrs(kvm)]);
    }
    text += "\nHost\n";
    for check in &report.host {
        let state = match check.state {
            State::Ok => "ok",
            State::Limited => "limited",
            State::Missing => "MISSING",
        };
        let _ = writeln!(text, "  {state:<8} {}: {}", check.name, check.detail);
    }
    text += "\nVerdict\n";
    let _ = match &kvm.verdict {
        Verdict::CanRunLinux => writeln!(text, "  This host's KVM can run a Linux kernel."),
        Verdict::NoKvm { reason } => writeln!(text, "  KVM cannot be used here: {reason}."),
        Verdict::Insufficient { reason } => writeln!(
            text,
            "  KVM is here, but a Linux kernel cannot run on it: {reason}."
        ),
    };
    text += match report.accel_auto {
        Accel::Nested => {
            "  --accel auto takes nested: a throw-away host under QEMU, for correctness, not speed.\n"
        }
        _ => "  --accel auto takes kvm.\n",
    };
    text
}

fn device(kvm: &Probe) -> String {
    let device = match kvm.verdict {
        Verdict::NoKvm { .. } => "not usable",
        _ => "/dev/kvm can be opened",
    };
    let modules = match kvm.modules.as_slice() {
        [] => "no kvm_* module is loaded".to_owned(),
        modules => format!("module {}", modules.join(", ")),
    };
    let cpu = if kvm.cpu_virtualization {
        "the CPU shows VMX or SVM"
    } else {
        "the CPU shows neither VMX nor SVM"
    };
    format!("{device}; {modules}; {cpu}")
}

fn capabilities(kvm: &Probe) -> Vec<String> {
    let names = |needed: bool| {
        let absent = kvm
            .capabilities
            .iter()
            .filter(|cap| cap.needed == needed && !cap.present);
        absent.map(|cap| cap.name).collect::<Vec<_>>()
    };
    let mut lines = vec![match names(true).as_slice() {
        [] => "all that Ringside needs are there".to_owned(),
        missing => format!("MISSING: {}", missing.join(", ")),
    }];
    if let absent @ [_, ..] = names(false).as_slice() {
        lines.push(format!("not there, and not needed: {}", absent.join(", ")));
    }
    lines
}

fn trials(kvm: &Probe) -> Vec<String> {
    let named = |wanted: &Outcome| {
        let trials = kvm.trials.iter().filter(|trial| trial.outcome == *wanted);
        trials
            .map(|trial| trial.name)
            .collect::<Vec<_>>()
            .join(", ")
    };
    let mut lines = vec![format!("works: {}", named(&Outcome::Works))];
    let absent = named(&Outcome::NotAnnounced);
    if !absent.is_empty() {
        lines.push(format!("not announced by CPUID, so not used: {absent}"));
    }
    for trial in &kvm.trials {
        if let Outcome::Fails { how } = &trial.outcome {
            lines.push(format!(
                "FAILS: {} (Linux needs it for {}): {how}",
                trial.name, trial.needed_for
            ));
        }
    }
    lines
}

fn msrs(kvm: &Probe) -> String {
    if kvm.unreadable_msrs.is_empty() {
        return "all that KVM lists can be read".to_owned();
    }
    let numbers: Vec<_> = kvm
        .unreadable_msrs
        .iter()
        .map(|index| format!("{index:#x}"))
        .collect();
    format!(
        "listed by KVM but refused, which does no harm: {}",
        numbers.join(", ")
    )
}

//! The start of a guest: ringside beside QEMU in one nested host, and on this host's own KVM.
//!
//! Beside QEMU (q35, its fastest firmware for a direct kernel boot), in one nested host, in turns:
//! the same kernel, initrd, command line, 1 vCPU, 512 MiB, one NVMe disk on a file, one virtio-net.
//! For each: the time from starting the program until the guest's first process has written to the
//! serial line; the VM exits until then (from `/sys/kernel/debug/kvm`, for both); and the resident
//! memory of the program then, without the mapping that is the guest's memory (from
//! `/proc/PID/smaps`).
//!
//! On this host's KVM: from starting the program, and from the beginning of the machine's assembly,
//! to the first exit of a tiny guest whose first instructions exit; and for the Debian kernel to the
//! entry into the guest (a software KVM may run a kernel for seconds before its first exit).
//!
//! `cargo bench --bench boot -- [--runs N] [--only nested|local]`

#[path = "../tests/kvm_common/mod.rs"]
mod kvm_common;

use std::ffi::OsString;
use std::io::{BufRead, BufReader, Read};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitCode, Stdio};
use std::time::{Duration, Instant};

use guest_images::apt::Freshness;
use guest_images::lab::{self, LabCommand, LabImage, LabSpec, Session};
use guest_images::{CacheDir, Image, Images, Release, progress};
use serde_json::{Value, json};

/// What the guest's first process writes.
const MARK: &str = "the-first-process-runs";
const MEMORY_MIB: u64 = 512;
/// The first argument of this program inside the nested host.
const INSIDE: &str = "measure-inside";
/// KVM's names for exits that are shown.
const EXITS: [&str; 5] = ["exits", "io_exits", "mmio_exits", "halt_exits", "irq_exits"];

fn main() -> ExitCode {
    // Cargo adds `--bench`.
    let mut words = std::env::args().skip(1).filter(|word| word != "--bench");
    let (mut runs, mut only) = (5, None);
    while let Some(word) = words.next() {
        let value = words.next();
        match (word.as_str(), value) {
            (lab::RELAY_COMMAND, _) => return lab::relay_main(),
            (INSIDE, Some(argv)) => {
                println!("{}", inside(&argv));
                return ExitCode::SUCCESS;
            }
            ("--runs", Some(value)) if value.parse().is_ok_and(|n: usize| n > 0) => {
                runs = value.parse().expect("it is one");
            }
            ("--only", Some(value)) if ["nested", "local"].contains(&value.as_str()) => {
                only = Some(value);
            }
            _ => {
                eprintln!("{word}: use [--runs N] [--only nested|local]");
                return ExitCode::from(2);
            }
        }
    }
    let ringside = build_ringside();
    let cache = CacheDir::discover().expect("a cache folder");
    let image = Images::new(&cache)
        .build(
            Release::Debian13,
            Freshness::Cached,
            &*progress::on_stderr(),
        )
        .expect("the image builds");
    if only.as_deref() != Some("nested") {
        local(&ringside, &image, 4 * runs);
    }
    if only.as_deref() != Some("local") {
        nested(&ringside, &image, &cache, runs);
    }
    ExitCode::SUCCESS
}

/// Builds the program as users build it.
fn build_ringside() -> PathBuf {
    let root = Path::new(env!("CARGO_MANIFEST_DIR")).join("..");
    let cargo = std::env::var_os("CARGO").unwrap_or_else(|| "cargo".into());
    let output = Command::new(cargo)
        .current_dir(root)
        .args(["build", "--release", "--package", "vmm"])
        .args(["--bin", "ringside"])
        .args(["--message-format", "json-render-diagnostics"])
        .stderr(Stdio::inherit())
        .output()
        .expect("cargo runs");
    assert!(output.status.success(), "ringside does not build");
    String::from_utf8_lossy(&output.stdout)
        .lines()
        .filter_map(|line| serde_json::from_str::<Value>(line).ok())
        .find_map(|message| Some(message["executable"].as_str()?.into()))
        .expect("cargo names the program")
}

/// Median, lowest and highest.
fn summary(mut values: Vec<f64>, digits: usize) -> String {
    values.sort_by(f64::total_cmp);
    let (low, high) = (values[0], values[values.len() - 1]);
    let median = f64::midpoint(values[(values.len() - 1) / 2], values[values.len() / 2]);
    format!("{median:.digits$} ({low:.digits$} to {high:.digits$})")
}

fn local(ringside: &Path, image: &Image, runs: usize) {
    println!("On this host's KVM, milliseconds: median (lowest to highest) of {runs} runs");
    // Entered in 64-bit mode with page tables, so that its first exit is a few instructions away.
    let folder = tempfile::tempdir().expect("a temporary folder");
    let bare = kvm_common::bzimage(folder.path());
    let devices = ["--nvme", "null=1G", "--net", "loopback"];
    let run = |kernel: &Path, rest: &[&str]| {
        let mut command = Command::new(ringside);
        command
            .args(["run", "--accel", "kvm", "--trace-boot", "--name"])
            .arg(format!("bench-{}", std::process::id()))
            .args(["--serial", "none", "--vsock", "off", "--kernel"])
            .arg(kernel)
            .args(rest)
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .stderr(Stdio::piped());
        command
    };
    for (name, devices) in [
        ("no devices", &[][..]),
        ("1 NVMe, 1 virtio-net", &devices[..]),
    ] {
        let (mut whole, mut machine) = (Vec::new(), Vec::new());
        for _ in 0..runs {
            let start = Instant::now();
            let child = run(&bare, &[]).args(devices).spawn();
            let (at, wall) = step(child.expect("ringside starts"), start, "first exit", None);
            machine.push(at);
            whole.push(wall);
        }
        println!("  tiny guest, {name}, to its first exit");
        println!("    from the program's start   {}", summary(whole, 1));
        println!("    from the machine's start   {}", summary(machine, 1));
    }
    let initrd = image.initramfs.to_str().expect("a path in UTF-8");
    for (name, kernel) in [("vmlinux", &image.vmlinux), ("bzImage", &image.bzimage)] {
        let machine = (0..runs).map(|_| {
            let start = Instant::now();
            let child = run(kernel, &["--initrd", initrd]).args(devices).spawn();
            let stop = Some(Duration::from_millis(300));
            step(
                child.expect("ringside starts"),
                start,
                "guest entered",
                stop,
            )
            .0
        });
        println!("  Debian 13 ({name}, initrd), 1 NVMe, 1 virtio-net, to the entry into the guest");
        println!(
            "    from the machine's start   {}",
            summary(machine.collect(), 1)
        );
    }
}

/// Waits for a step that `--trace-boot` prints. Returns its time in the trace and the time since
/// `start`, in milliseconds. The trace comes at the first exit: `stop` is when to make one.
fn step(mut child: Child, start: Instant, what: &str, stop: Option<Duration>) -> (f64, f64) {
    if let Some(stop) = stop {
        std::thread::sleep(stop);
        let pid = libc::pid_t::try_from(child.id()).expect("a process number");
        // SAFETY: no memory is involved; the child is not yet waited for, so the number is its.
        #[expect(unsafe_code, reason = "kill")]
        let _ = unsafe { libc::kill(pid, libc::SIGTERM) };
    }
    let stderr = BufReader::new(child.stderr.take().expect("it is piped"));
    let mut said = String::new();
    let mut found = None;
    for line in stderr.lines().map_while(Result::ok) {
        if line.contains(what) {
            let words = line.split_whitespace().next();
            let at: f64 = words.and_then(|word| word.parse().ok()).expect("a time");
            found = Some((at, start.elapsed().as_secs_f64() * 1e3));
            break;
        }
        said.push_str(&line);
        said.push('\n');
    }
    let _ = child.kill();
    let _ = child.wait();
    found.unwrap_or_else(|| panic!("no step `{what}`: {said}"))
}

fn nested(ringside: &Path, image: &Image, cache: &CacheDir, runs: usize) {
    let progress = progress::on_stderr();
    let lab = LabImage::prepare(cache, Freshness::Cached, &*progress).expect("QEMU's packages");
    let mut spec = LabSpec::new().expect("this executable's path");
    spec.memory_mib = 4096;
    let session = Session::start(spec, cache, &*progress).expect("the nested host");
    let shell = run_inside(&session, ["sh", "-c", "truncate -s 64M /tmp/disk"]);
    assert!(shell.is_empty(), "{shell}");

    let ways = [
        ("ringside", ringside_argv(ringside, image)),
        ("QEMU", qemu_argv(&lab, image)),
    ];
    let mut results = ways.each_ref().map(|_| Vec::new());
    // The first of each only fills the nested host's page cache.
    for run in 0..=runs {
        for ((_, argv), results) in ways.iter().zip(&mut results) {
            let exe = std::env::current_exe().expect("this executable");
            let argv = serde_json::to_string(argv).expect("JSON");
            let text = run_inside(&session, [exe.as_os_str(), INSIDE.as_ref(), argv.as_ref()]);
            let value: Value =
                serde_json::from_str(&text).unwrap_or_else(|_| panic!("no figures: {text}"));
            eprintln!("run {run}: {value}");
            if run > 0 {
                results.push(value);
            }
        }
    }
    println!("In one nested host, in turns: median (lowest to highest) of {runs} runs");
    for ((name, _), results) in ways.iter().zip(&results) {
        let of = |key: &str, digits| {
            let values = results.iter().filter_map(|value| value[key].as_f64());
            summary(values.collect(), digits)
        };
        println!("  {name}");
        println!("    start to first process   {} s", of("seconds", 2));
        println!("    memory above the guest's {} MiB", of("resident_mib", 1));
        println!(
            "      of it not file-backed  {} MiB",
            of("anonymous_mib", 1)
        );
        for exits in EXITS {
            println!("    {exits:<24} {}", of(exits, 0));
        }
    }
}

fn cmdline() -> String {
    format!("quiet rdinit=/usr/bin/busybox -- sh -c \"echo {MARK}; exec sleep 9999\"")
}

fn ringside_argv(ringside: &Path, image: &Image) -> Vec<String> {
    let path = |path: &Path| path.to_str().expect("a path in UTF-8").to_owned();
    let mut argv = vec![path(ringside)];
    let words = "run --accel kvm --name bench --vsock off --serial stdio --vcpus 1 \
                 --nvme /tmp/disk --net loopback";
    argv.extend(words.split_whitespace().map(str::to_owned));
    argv.extend(["--memory".into(), format!("{MEMORY_MIB}M")]);
    argv.extend(["--kernel".into(), path(&image.vmlinux)]);
    argv.extend(["--initrd".into(), path(&image.initramfs)]);
    argv.extend(["--cmdline".into(), cmdline()]);
    argv
}

fn qemu_argv(lab: &LabImage, image: &Image) -> Vec<String> {
    let program = lab.program("qemu-system-x86_64");
    let path = |path: &Path| path.to_str().expect("a path in UTF-8").to_owned();
    let mut argv = vec![path(Path::new(program.get_program()))];
    argv.extend(program.get_args().map(|word| path(Path::new(word))));
    for folder in lab.firmware() {
        argv.extend(["-L".into(), path(&folder)]);
    }
    let words = "-nodefaults -no-user-config -display none -no-reboot -machine q35 -accel kvm \
                 -cpu host -smp 1 -bios qboot.rom -serial stdio \
                 -drive if=none,id=disk,format=raw,file=/tmp/disk \
                 -device nvme,drive=disk,serial=bench \
                 -netdev hubport,id=net,hubid=0 -device virtio-net-pci,netdev=net,romfile=";
    argv.extend(words.split_whitespace().map(str::to_owned));
    argv.extend(["-m".into(), format!("{MEMORY_MIB}M")]);
    argv.extend(["-kernel".into(), path(&image.vmlinux)]);
    argv.extend(["-initrd".into(), path(&image.initramfs)]);
    // What `ringside run --kernel` puts before its --cmdline.
    let line = format!("console=ttyS0 panic=-1 {}", cmdline());
    argv.extend(["-append".into(), line]);
    argv
}

fn run_inside<S: Into<OsString>>(session: &Session, argv: impl IntoIterator<Item = S>) -> String {
    let argv: Vec<OsString> = argv.into_iter().map(Into::into).collect();
    let mut command = LabCommand::new(argv).expect("a working folder").captured();
    command.cwd = "/".into();
    command.env.retain(|(name, _)| name != "XDG_RUNTIME_DIR");
    let done = session.command(command).expect("the nested host lives");
    let stderr = String::from_utf8_lossy(&done.stderr);
    assert!(done.exit.is_success(), "in the nested host: {stderr}");
    String::from_utf8_lossy(&done.stdout).into_owned()
}

/// Starts a VMM, in the nested host, and measures until the mark appears.
fn inside(argv: &str) -> Value {
    let argv: Vec<String> = serde_json::from_str(argv).expect("a list of words");
    let start = Instant::now();
    let mut child = Command::new(&argv[0])
        .args(&argv[1..])
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .spawn()
        .expect("the VMM starts");
    let mut stdout = child.stdout.take().expect("it is piped");
    let mut said = Vec::new();
    let mut buffer = [0; 4096];
    while !said.windows(MARK.len()).any(|part| part == MARK.as_bytes()) {
        let read = stdout.read(&mut buffer).expect("the serial line");
        assert!(read > 0, "it ended: {}", String::from_utf8_lossy(&said));
        said.extend_from_slice(&buffer[..read]);
    }
    let seconds = start.elapsed().as_secs_f64();
    let mut result = json!({ "seconds": seconds });
    let counters = kvm_counters(child.id());
    for name in EXITS {
        let text = std::fs::read_to_string(counters.join(name)).expect("KVM's counter");
        let count: u64 = text.trim().parse().expect("a number");
        result[name] = count.into();
    }
    let [resident, anonymous] = memory(child.id());
    result["resident_mib"] = resident.into();
    result["anonymous_mib"] = anonymous.into();
    child.kill().expect("the VMM is ours");
    child.wait().expect("the VMM is ours");
    result
}

/// The folder of the process's only VM.
fn kvm_counters(pid: u32) -> PathBuf {
    let prefix = format!("{pid}-");
    let folders = std::fs::read_dir("/sys/kernel/debug/kvm").expect("debugfs");
    let mut folders = folders.filter_map(Result::ok);
    let of_pid = |name: OsString| name.to_string_lossy().starts_with(&prefix);
    let found = folders.find(|entry| of_pid(entry.file_name()));
    found.expect("the process has a VM").path()
}

/// MiB of memory of the process, without the guest's: resident, and of it not backed by a file
/// (what is left are the program and its libraries).
fn memory(pid: u32) -> [f64; 2] {
    let smaps = std::fs::read_to_string(format!("/proc/{pid}/smaps")).expect("smaps");
    let (mut resident, mut anonymous) = (0, 0);
    let (mut is_guest, mut guests) = (false, 0);
    for line in smaps.lines() {
        let mut words = line.split_whitespace();
        let (Some(key), Some(value)) = (words.next(), words.next()) else {
            continue;
        };
        let kib = || value.parse::<u64>().expect("a number of KiB");
        match key {
            // The first line of each mapping's.
            "Size:" => {
                is_guest = kib() == MEMORY_MIB << 10;
                guests += u32::from(is_guest);
            }
            "Rss:" if !is_guest => resident += kib(),
            "Anonymous:" if !is_guest => anonymous += kib(),
            _ => {}
        }
    }
    assert_eq!(guests, 1, "one mapping is the guest's memory");
    [resident, anonymous].map(|kib| f64::from(u32::try_from(kib).expect("not that much")) / 1024.0)
}

//! Strict translation, as Linux does it behind ringside's VT-d and behind QEMU's intel-iommu, in one
//! nested host: VM exits and executed instructions per I/O.
//!
//! Both VMMs run at the same time, each with a Debian 13 guest of its own: same kernel, initrd,
//! command line (`intel_iommu=on iommu.strict=1`: every unmap is followed by an invalidation that is
//! waited for), 1 vCPU, 512 MiB, one NVMe disk on a raw file through `io_uring`, one virtio-net on a
//! tap, served by the VMM itself. A round gives each job to one guest and then to the other, while
//! the guest without a job idles.
//!
//! * VM exits: KVM's own counters of that VM (`/sys/kernel/debug/kvm`).
//! * Instructions: all that the nested host executes (guest, VMM, host kernel and the peer of the
//!   net job), counted by a plugin in the QEMU that emulates it; half of the kernel addresses too.
//!
//! A job runs short and long; the difference of both, over the difference of their I/Os, is what one
//! I/O takes: the start of the programs cancels out. An I/O is a read or a write of 4 KiB, or for
//! ping a frame as the guest's driver counts them, or for the TCP jobs 64 KiB, as the VMMs merge
//! frames differently. The TCP jobs' peer is this program: iperf3 looks at the clock too often to be
//! counted.
//!
//! `cargo bench --bench iommu_guest -- [--rounds N] [--iommu off|intel|both]`

use std::ffi::OsString;
use std::fs::File;
use std::io::{BufRead, BufReader, Read, Write};
use std::net::{TcpListener, TcpStream};
use std::os::fd::OwnedFd;
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::process::{Child, ChildStdin, ChildStdout, Command, ExitCode, Stdio};

use guest_images::apt::Freshness;
use guest_images::lab::{self, Input, LabCommand, LabImage, LabSpec, Output, Session};
use guest_images::{CacheDir, HostTools, Image, Images, Release, progress};
use serde_json::{Value, json};

/// The first argument of this program inside the nested host.
const INSIDE: &str = "measure-inside";
/// What the guest's first process writes when it takes a command, and after each before its status.
const READY: &str = "ready-for-a-line";
/// The host's end of each tap is .1; 192.0.2.0/24 and 198.51.100.0/24 are for documentation.
const NETS: [&str; 2] = ["192.0.2", "198.51.100"];
/// Where the peer of the TCP jobs listens.
const PORT: u16 = 5201;
/// KVM's counters that are shown.
const EXITS: [&str; 4] = ["exits", "mmio_exits", "io_exits", "halt_exits"];

/// A job: its name, how many I/Os it has when short and long, and the shell line for a number.
struct Job {
    name: &'static str,
    counts: [u32; 2],
    line: fn(u32, &str) -> String,
}

fn fio(rw: &str, depth: u32, count: u32) -> String {
    format!(
        "fio --name=j --filename=/dev/nvme0n1 --rw={rw} --bs=4k --size=32M --ioengine=io_uring \
         --iodepth={depth} --direct=1 --number_ios={count} --randseed=7 --minimal >/dev/null \
         && echo ios {count}"
    )
}

/// A line that ends with the number of frames of another, in both directions, as the driver counts
/// them.
fn frames(line: &str) -> String {
    let frames = "cat /sys/class/net/eth0/statistics/rx_packets \
                  /sys/class/net/eth0/statistics/tx_packets | awk '{n += $1} END {print n}'";
    format!("n=$({frames}); {line} && echo ios $(($({frames}) - n))")
}

/// A stream of `kib` KiB that our [`serve`] takes or gives; the shell opens the connection.
fn tcp(net: &str, task: &str, kib: u32, transfer: &str) -> String {
    let ios = kib / 64;
    format!(
        "bash -c 'exec 3<>/dev/tcp/{net}.1/{PORT}; echo {task} {kib} >&3; {transfer}' \
         && echo ios {ios}"
    )
}

const JOBS: [Job; 5] = [
    Job {
        name: "fio, 4 KiB random reads, depth 1",
        counts: [50, 550],
        line: |count, _| fio("randread", 1, count),
    },
    Job {
        name: "fio, 4 KiB random writes, depth 8",
        counts: [50, 1050],
        line: |count, _| fio("randwrite", 8, count),
    },
    Job {
        name: "ping, one after the other (2 frames each)",
        counts: [50, 550],
        line: |count, net| frames(&format!("ping -q -A -c {count} {net}.1 >/dev/null")),
    },
    Job {
        name: "TCP from the guest, 64 KiB",
        counts: [1 << 10, 17 << 10],
        line: |kib, net| {
            let send = format!("dd if=/dev/zero bs=64k count={} >&3 2>/dev/null", kib / 64);
            tcp(
                net,
                "take",
                kib,
                &format!("{send}; read -r end <&3; test \"$end\" = done"),
            )
        },
    },
    Job {
        name: "TCP to the guest, 64 KiB",
        counts: [1 << 10, 17 << 10],
        line: |kib, net| {
            let bytes = u64::from(kib) << 10;
            let receive = format!("cat <&3 >/tmp/got; test $(stat -c %s /tmp/got) = {bytes}");
            tcp(net, "give", kib, &receive)
        },
    },
];

fn main() -> ExitCode {
    // Cargo adds `--bench`.
    let mut words = std::env::args().skip(1).filter(|word| word != "--bench");
    let (mut rounds, mut iommu) = (3, "intel".to_owned());
    while let Some(word) = words.next() {
        let value = words.next();
        match (word.as_str(), value) {
            (lab::RELAY_COMMAND, _) => return lab::relay_main(),
            (INSIDE, Some(plan)) => {
                inside(&plan);
                return ExitCode::SUCCESS;
            }
            ("--rounds", Some(value)) if value.parse().is_ok_and(|n: usize| n > 0) => {
                rounds = value.parse().expect("it is one");
            }
            ("--iommu", Some(value)) if ["off", "intel", "both"].contains(&value.as_str()) => {
                iommu = value;
            }
            _ => {
                eprintln!("{word}: use [--rounds N] [--iommu off|intel|both]");
                return ExitCode::from(2);
            }
        }
    }
    let cache = CacheDir::discover().expect("a cache folder");
    let ringside = build_ringside();
    let image = Images::new(&cache)
        .build(
            Release::Debian13,
            Freshness::Cached,
            &*progress::on_stderr(),
        )
        .expect("the image builds");
    for on in [false, true] {
        if iommu == "both" || (iommu == "intel") == on {
            measure(&cache, &ringside, &image, rounds, on);
        }
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

/// Compiles the counter of instructions.
fn build_plugin(folder: &Path) -> PathBuf {
    let plugin = folder.join("libinstructions.so");
    let source = Path::new(env!("CARGO_MANIFEST_DIR")).join("benches/iommu_guest/plugin.rs");
    let rustc = std::env::var_os("RUSTC").unwrap_or_else(|| "rustc".into());
    let status = Command::new(rustc)
        .args(["--edition=2024", "--crate-type=cdylib", "-Copt-level=2"])
        .args(["-Cpanic=abort", "-o"])
        .args([&plugin, &source])
        .status()
        .expect("rustc runs");
    assert!(status.success(), "the plugin does not compile");
    plugin
}

/// What a job took in one round.
#[derive(Default)]
struct Taken {
    ios: f64,
    instructions: f64,
    kernel: f64,
    exits: [f64; EXITS.len()],
}

impl Taken {
    /// The long job without the short one, per I/O.
    fn per_io(short: &Taken, long: &Taken) -> Taken {
        let ios = long.ios - short.ios;
        let part = |long: f64, short: f64| (long - short) / ios;
        Taken {
            ios,
            instructions: part(long.instructions, short.instructions),
            kernel: part(long.kernel, short.kernel),
            exits: std::array::from_fn(|index| part(long.exits[index], short.exits[index])),
        }
    }
}

/// Median, lowest and highest.
struct Summary {
    median: f64,
    low: f64,
    high: f64,
}

fn summary(results: &[Taken], of: impl Fn(&Taken) -> f64) -> Summary {
    let mut values: Vec<f64> = results.iter().map(of).collect();
    values.sort_by(f64::total_cmp);
    let (low, high) = (values[0], values[values.len() - 1]);
    let median = f64::midpoint(values[(values.len() - 1) / 2], values[values.len() / 2]);
    Summary { median, low, high }
}

fn measure(cache: &CacheDir, ringside: &Path, image: &Image, rounds: usize, iommu: bool) {
    let progress = progress::on_stderr();
    let lab = LabImage::prepare(cache, Freshness::Cached, &*progress).expect("QEMU's packages");
    let tools = HostTools::prepare(cache, &*progress).expect("network tools");
    let folder = tempfile::tempdir().expect("a temporary folder");
    let socket = folder.path().join("instructions");
    let plugin = build_plugin(folder.path());

    let mut spec = LabSpec::new().expect("this executable's path");
    spec.memory_mib = 4096;
    // With more, processors that wait for each other count more or less as luck has it.
    spec.cpus = 1;
    let mut argument = plugin.into_os_string();
    argument.push(",socket=");
    argument.push(&socket);
    spec.options.qemu_args = vec!["-plugin".into(), argument];
    let session = Session::start(spec, cache, &*progress).expect("the nested host");
    prepare(&session, &tools);
    let mut driver = Driver::start(
        &session,
        socket,
        &[
            ringside_argv(ringside, image, iommu),
            qemu_argv(&lab, image, iommu),
        ],
    );
    for (vm, net) in NETS.iter().enumerate() {
        driver.run(
            vm,
            &format!("ip address add {net}.2/24 dev eth0 && ip link set eth0 up && ping -c 2 -W 20 {net}.1"),
        );
        let groups = driver.run(vm, "ls /sys/kernel/iommu_groups | wc -l; echo ios 0");
        assert_eq!(
            groups.1.starts_with('0'),
            !iommu,
            "VM {vm} has the IOMMU that is meant: {}",
            groups.1
        );
    }
    let name = if iommu { "strict" } else { "off" };
    println!(
        "IOMMU {name}, one nested host, in turns; per I/O: median (lowest to highest) of {rounds} \
         rounds"
    );
    for job in JOBS {
        let mut results = [const { Vec::new() }; 2];
        // The first of each only fills caches.
        for round in 0..=rounds {
            for (vm, results) in results.iter_mut().enumerate() {
                let [short, long] = job
                    .counts
                    .map(|count| driver.run(vm, &(job.line)(count, NETS[vm])).0);
                let taken = Taken::per_io(&short, &long);
                eprintln!(
                    "{} round {round} vm {vm}: {:.0} I/Os, {:.0} instructions, {:.2} exits",
                    job.name, taken.ios, taken.instructions, taken.exits[0]
                );
                if round > 0 {
                    results.push(taken);
                }
            }
        }
        print(job.name, &results);
    }
    driver.end();
}

fn print(job: &str, results: &[Vec<Taken>; 2]) {
    println!("  {job}");
    let line = |what: &str, digits: usize, of: &dyn Fn(&Taken) -> f64| {
        let [ours, qemus] = results.each_ref().map(|results| summary(results, of));
        let show = |s: &Summary| {
            format!(
                "{:.digits$} ({:.digits$} to {:.digits$})",
                s.median, s.low, s.high
            )
        };
        println!(
            "    {what:<14} ringside {:<32} QEMU {:<32} {}",
            show(&ours),
            show(&qemus),
            // Hundredths per I/O are the programs around the I/Os.
            match qemus.median > 0.02 {
                true => format!("ratio {:.2}", ours.median / qemus.median),
                false => String::new(),
            }
        );
    };
    line("instructions", 0, &|taken| taken.instructions);
    line("  of a kernel", 0, &|taken| taken.kernel);
    for (index, name) in EXITS.into_iter().enumerate() {
        line(name, 2, &|taken| taken.exits[index]);
    }
}

/// Disks, taps and servers.
fn prepare(session: &Session, tools: &HostTools) {
    let tool = |name: &str| {
        let words = tools.command(name).expect("the packages have it");
        let words: Vec<_> = words.iter().map(|word| word.to_string_lossy()).collect();
        words.join(" ")
    };
    let ip = tool("ip");
    let mut script = String::from("set -e\n");
    for (vm, net) in NETS.iter().enumerate() {
        script.push_str(&format!(
            "truncate -s 64M /tmp/disk{vm}\n\
             {ip} tuntap add tap{vm} mode tap vnet_hdr\n\
             {ip} address add {net}.1/24 dev tap{vm}\n\
             {ip} link set tap{vm} up\n"
        ));
    }
    let mut command = LabCommand::new(["sh", "-c", &script]).expect("a working folder");
    command.cwd = "/".into();
    let done = session
        .command(command.captured())
        .expect("the nested host lives");
    let stderr = String::from_utf8_lossy(&done.stderr);
    assert!(done.exit.is_success(), "in the nested host: {stderr}");
}

/// The command line of both guests' kernels.
fn cmdline(iommu: bool) -> String {
    let iommu = if iommu {
        "intel_iommu=on iommu.strict=1 "
    } else {
        ""
    };
    // A terminal that neither repeats what it gets nor changes what it prints.
    let script = format!(
        "stty raw -echo; exec 2>&1; while echo {READY} $?; read -r line; do eval \"$line\"; done"
    );
    format!("quiet {iommu}ringside.run64={}", base64(script.as_bytes()))
}

/// RFC 4648 section 4.
fn base64(bytes: &[u8]) -> String {
    const ALPHABET: &[u8; 64] = b"ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789+/";
    let mut text = String::new();
    for chunk in bytes.chunks(3) {
        let byte = |at: usize| u32::from(chunk.get(at).copied().unwrap_or(0));
        let bits = byte(0) << 16 | byte(1) << 8 | byte(2);
        for at in 0..4 {
            let index = usize::try_from(bits >> (18 - 6 * at) & 63).expect("six bits");
            let padding = at > chunk.len();
            text.push(if padding {
                '='
            } else {
                char::from(ALPHABET[index])
            });
        }
    }
    text
}

fn utf8(path: &Path) -> String {
    path.to_str().expect("a path in UTF-8").to_owned()
}

fn ringside_argv(ringside: &Path, image: &Image, iommu: bool) -> Vec<String> {
    let mut argv = vec![utf8(ringside)];
    let words = "run --accel kvm --name bench --vsock off --serial stdio --vcpus 1 \
                 --memory 512M --nvme /tmp/disk0 --net tap=tap0";
    argv.extend(words.split_whitespace().map(str::to_owned));
    let kind = if iommu { "intel" } else { "off" };
    argv.extend(["--iommu".into(), kind.into()]);
    argv.extend(["--kernel".into(), utf8(&image.vmlinux)]);
    argv.extend(["--initrd".into(), utf8(&image.initramfs)]);
    argv.extend(["--cmdline".into(), cmdline(iommu)]);
    argv
}

fn qemu_argv(lab: &LabImage, image: &Image, iommu: bool) -> Vec<String> {
    let program = lab.program("qemu-system-x86_64");
    let mut argv = vec![utf8(Path::new(program.get_program()))];
    argv.extend(program.get_args().map(|word| utf8(Path::new(word))));
    for folder in lab.firmware() {
        argv.extend(["-L".into(), utf8(&folder)]);
    }
    let words = "-nodefaults -no-user-config -display none -no-reboot -accel kvm -cpu host \
                 -smp 1 -m 512M -bios qboot.rom -serial stdio -machine q35,kernel-irqchip=split";
    argv.extend(words.split_whitespace().map(str::to_owned));
    if iommu {
        let unit = "intel-iommu,intremap=on,device-iotlb=off";
        argv.extend(["-device".into(), unit.into()]);
    }
    let devices = "-drive if=none,id=disk,format=raw,file=/tmp/disk1,aio=io_uring \
                   -device nvme,drive=disk,serial=bench \
                   -netdev tap,id=net,ifname=tap1,script=no,downscript=no,vhost=off \
                   -device virtio-net-pci,netdev=net,romfile=,disable-legacy=on,iommu_platform=on";
    argv.extend(devices.split_whitespace().map(str::to_owned));
    argv.extend(["-kernel".into(), utf8(&image.vmlinux)]);
    argv.extend(["-initrd".into(), utf8(&image.initramfs)]);
    // What `ringside run --kernel` puts before its --cmdline.
    let line = format!("console=ttyS0 panic=-1 {}", cmdline(iommu));
    argv.extend(["-append".into(), line]);
    argv
}

/// Both guests, by way of this program inside the nested host.
struct Driver {
    requests: File,
    answers: BufReader<File>,
    running: lab::Running,
    socket: PathBuf,
}

impl Driver {
    fn start(session: &Session, socket: PathBuf, vmms: &[Vec<String>; 2]) -> Driver {
        let exe = std::env::current_exe().expect("this executable");
        let plan = serde_json::to_string(vmms).expect("JSON");
        let argv: [OsString; 3] = [exe.into(), INSIDE.into(), plan.into()];
        let mut command = LabCommand::new(argv).expect("a working folder");
        let (stdin, requests) = std::io::pipe().expect("a pipe");
        let (answers, stdout) = std::io::pipe().expect("a pipe");
        command.stdin = Input::File(stdin.into());
        command.stdout = Output::File(stdout.into());
        command.cwd = "/".into();
        command.env.retain(|(name, _)| name != "XDG_RUNTIME_DIR");
        let running = session.spawn(command).expect("the nested host lives");
        let mut driver = Driver {
            requests: OwnedFd::from(requests).into(),
            answers: BufReader::new(OwnedFd::from(answers).into()),
            running,
            socket,
        };
        assert_eq!(driver.answer()["up"], 2);
        driver
    }

    fn answer(&mut self) -> Value {
        let mut line = String::new();
        self.answers.read_line(&mut line).expect("an answer");
        serde_json::from_str(&line).unwrap_or_else(|_| panic!("no answer: {line}"))
    }

    /// Instructions so far: all, and those of a kernel.
    fn instructions(&self) -> [f64; 2] {
        let mut stream = UnixStream::connect(&self.socket).expect("the plugin");
        let mut counts = [0; 16];
        stream.read_exact(&mut counts).expect("two counts");
        let [user, kernel] = [0, 8].map(|at| {
            let bytes = counts[at..at + 8].try_into().expect("8 bytes");
            number(u64::from_ne_bytes(bytes))
        });
        [user + kernel, kernel]
    }

    /// Runs a line in a guest's shell; it must succeed. Returns what it took and printed.
    fn run(&mut self, vm: usize, line: &str) -> (Taken, String) {
        let before = self.instructions();
        let request = json!({ "vm": vm, "line": line });
        writeln!(self.requests, "{request}").expect("a request");
        let answer = self.answer();
        let after = self.instructions();
        assert_eq!(answer["status"], 0, "VM {vm}: {line}: {answer}");
        let said = answer["said"].as_str().expect("text").to_owned();
        let ios = said.lines().find_map(|line| line.strip_prefix("ios "));
        let ios = ios.and_then(|text| text.trim().parse().ok());
        let taken = Taken {
            ios: ios.unwrap_or(0.0),
            instructions: after[0] - before[0],
            kernel: after[1] - before[1],
            exits: EXITS.map(|name| answer[name].as_f64().expect("a counter")),
        };
        (taken, said)
    }

    fn end(self) {
        drop(self.requests);
        let done = self.running.wait().expect("the nested host lives");
        assert!(done.exit.is_success());
    }
}

/// Counts stay far below where this rounds.
#[expect(
    clippy::cast_precision_loss,
    reason = "a few units of 10^12 do not matter"
)]
fn number(count: u64) -> f64 {
    count as f64
}

/// A VMM in the nested host whose guest takes lines of shell from its serial line.
struct Vm {
    child: Child,
    stdin: ChildStdin,
    stdout: BufReader<ChildStdout>,
    counters: PathBuf,
}

/// Starts both VMMs, and passes lines on to them until there are no more.
fn inside(plan: &str) {
    let argvs: Vec<Vec<String>> = serde_json::from_str(plan).expect("two lists of words");
    for net in NETS {
        let listener = TcpListener::bind((format!("{net}.1"), PORT)).expect("a port");
        std::thread::spawn(move || {
            for stream in listener.incoming() {
                // A guest that goes away shows as its job's failure.
                let _ = stream.and_then(serve);
            }
        });
    }
    let mut vms: Vec<Vm> = argvs.iter().map(|argv| Vm::start(argv)).collect();
    println!("{}", json!({ "up": vms.len() }));
    for line in std::io::stdin().lines() {
        let request: Value = serde_json::from_str(&line.expect("a line")).expect("JSON");
        let vm = request["vm"]
            .as_u64()
            .and_then(|vm| usize::try_from(vm).ok());
        let vm = vm.and_then(|vm| vms.get_mut(vm)).expect("one of them");
        println!("{}", vm.run(request["line"].as_str().expect("a line")));
    }
    for mut vm in vms {
        vm.child.kill().expect("the VMM is ours");
        vm.child.wait().expect("the VMM is ours");
    }
}

/// Takes as many KiB as the first line says, and says so, or gives them and ends.
fn serve(stream: TcpStream) -> std::io::Result<()> {
    let mut reader = BufReader::new(stream.try_clone()?);
    let mut writer = stream;
    let mut line = String::new();
    reader.read_line(&mut line)?;
    let (task, kib) = line.trim().split_once(' ').unwrap_or_default();
    let bytes = kib.parse::<u64>().unwrap_or(0) << 10;
    match task {
        "take" => {
            std::io::copy(&mut reader.take(bytes), &mut std::io::sink())?;
            writer.write_all(b"done\n")
        }
        _ => std::io::copy(&mut std::io::repeat(0).take(bytes), &mut writer).map(|_| ()),
    }
}

impl Vm {
    fn start(argv: &[String]) -> Vm {
        let mut child = Command::new(&argv[0])
            .args(&argv[1..])
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .spawn()
            .expect("the VMM starts");
        let (stdin, stdout) = (child.stdin.take(), child.stdout.take());
        let mut stdout = BufReader::new(stdout.expect("it is piped"));
        until_ready(&mut stdout);
        let counters = kvm_counters(child.id());
        Vm {
            stdin: stdin.expect("it is piped"),
            stdout,
            counters,
            child,
        }
    }

    fn count(&self) -> [u64; EXITS.len()] {
        EXITS.map(|name| {
            let text = std::fs::read_to_string(self.counters.join(name)).expect("KVM's counter");
            text.trim().parse().expect("a number")
        })
    }

    fn run(&mut self, line: &str) -> Value {
        let before = self.count();
        // The guest's terminal is raw: a line ends as Enter ends it not, but as a file's does.
        writeln!(self.stdin, "{line}").expect("the serial line");
        let (said, status) = until_ready(&mut self.stdout);
        let after = self.count();
        let mut answer = json!({ "said": said, "status": status });
        for (index, name) in EXITS.into_iter().enumerate() {
            answer[name] = (after[index] - before[index]).into();
        }
        answer
    }
}

/// Reads until the guest takes the next line: what it said, and the status of the last.
fn until_ready(serial: &mut BufReader<ChildStdout>) -> (String, i32) {
    let mut said = String::new();
    loop {
        let mut bytes = Vec::new();
        let read = serial
            .read_until(b'\n', &mut bytes)
            .expect("the serial line");
        assert!(read > 0, "the VMM ended: {said}");
        let line = String::from_utf8_lossy(&bytes);
        if let Some((_, status)) = line.split_once(READY) {
            return (said, status.trim().parse().unwrap_or(-1));
        }
        said.push_str(&line);
    }
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

//! Real Linux guests for tests.
//!
//! The [`Host`] is a place where `ringside run` works: this machine when its KVM can run a kernel,
//! otherwise one nested host, which all tests of a process share. A [`Guest`] is a `ringside run` in
//! it; the test talks to it as a user would, with `ringside exec` and its standard output.

use std::collections::BTreeMap;
use std::ffi::{OsStr, OsString};
use std::panic::{AssertUnwindSafe, catch_unwind, resume_unwind};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitStatus, Stdio};
use std::sync::atomic::{AtomicU32, Ordering};
use std::sync::{Mutex, PoisonError};

use guest_images::apt::Freshness;
use guest_images::lab::{self, LabCommand, LabSpec, RelayProgram, Running, Session};
use guest_images::{CacheDir, HostTools, Image, ImageName, Images, progress};

/// Seconds that a guest may take to boot: ten times what it takes on a quiet machine.
const BOOT_SECONDS: &str = "60";

/// Seconds that a command may take: far more than any needs.
const COMMAND_SECONDS: &str = "300";

/// What `ringside exec` exits with when the guest does not answer.
const NOT_REACHED: u8 = 125;

/// What `timeout` exits with.
const TIMED_OUT: u8 = 124;

/// What a command did.
#[derive(Debug)]
pub struct Done {
    /// Its exit code; 128 and the signal's number if a signal ended it.
    pub code: u8,
    /// Standard output, as text.
    pub stdout: String,
    /// Standard error, as text.
    pub stderr: String,
}

impl Done {
    fn new(code: u8, stdout: &[u8], stderr: &[u8]) -> Done {
        let text = |bytes| String::from_utf8_lossy(bytes).into_owned();
        if code == TIMED_OUT {
            trouble(format!(
                "a command takes longer than {COMMAND_SECONDS} seconds: {}{}",
                text(stdout),
                text(stderr)
            ));
        }
        Done {
            code,
            stdout: text(stdout),
            stderr: text(stderr),
        }
    }
}

/// Where guests run. Borrowed through [`on_host`], one test at a time: the nested host's processors
/// are slow, and two guests at once only make both late.
pub struct Host {
    ringside: PathBuf,
    session: Option<Session>,
    /// A writable folder in the host.
    dir: PathBuf,
    next: AtomicU32,
}

/// A process that runs in the host.
enum Process {
    Direct(Child),
    Nested(Running),
}

/// The nested host, or a guest in it, is stuck or gone: the payload of a panic.
struct HostTrouble(String);

fn trouble(what: impl Into<String>) -> ! {
    std::panic::panic_any(HostTrouble(what.into()))
}

/// How often a test is tried in a nested host that gets stuck or dies, which no longer is expected
/// (see [`LabSpec::cpus`]), but an emulated machine on a busy one is not a sure thing.
const ATTEMPTS: u32 = 3;

/// Runs a test on the host, which is started and its program built at the first call.
///
/// On this machine's KVM, a test runs once. In a nested host, a test that met [`HostTrouble`] says so
/// and is run again in a new one; a test that failed for any other reason has failed.
///
/// # Panics
///
/// With the test's panic; or the program does not build or the nested host does not start.
pub fn on_host(test: impl Fn(&Host)) {
    static HOST: Mutex<Option<Host>> = Mutex::new(None);
    let mut slot = HOST.lock().unwrap_or_else(PoisonError::into_inner);
    for attempt in 1.. {
        let host = slot.get_or_insert_with(Host::start);
        let Err(panic) = catch_unwind(AssertUnwindSafe(|| test(host))) else {
            return;
        };
        let nested = host.session.is_some();
        let log = host.session.as_ref().map_or_else(String::new, |session| {
            format!("\nnested host:{}", lab::last_messages(&session.log()))
        });
        // What the test left behind goes with the nested host.
        *slot = None;
        match panic.downcast::<HostTrouble>() {
            Ok(trouble) if nested && attempt < ATTEMPTS => {
                eprintln!(
                    "attempt {attempt}: {}{log}\nagain in a new nested host",
                    trouble.0
                );
            }
            Ok(trouble) => panic!("attempt {attempt}: {}{log}", trouble.0),
            Err(panic) => resume_unwind(panic),
        }
    }
}

impl Host {
    fn start() -> Host {
        let ringside = build_ringside();
        let verdict = Command::new(&ringside)
            .args(["doctor", "--json"])
            .output()
            .expect("ringside doctor");
        let verdict: serde_json::Value =
            serde_json::from_slice(&verdict.stdout).expect("ringside doctor prints JSON");
        let session = match verdict["accel-auto"].as_str() {
            Some("kvm") => None,
            Some("nested") => {
                let mut spec = LabSpec::new().expect("this executable's path");
                spec.relay = RelayProgram {
                    executable: ringside.clone(),
                    arguments: vec![lab::RELAY_COMMAND.into()],
                };
                spec.memory_mib = 4096;
                let cache = CacheDir::discover().expect("a cache folder");
                let session = Session::start(spec, &cache, &*progress::on_stderr());
                Some(session.expect("the nested host"))
            }
            other => panic!("ringside doctor says to use {other:?}"),
        };
        let dir = std::env::temp_dir().join(format!("ringside-linux-{}", std::process::id()));
        let host = Host {
            ringside,
            session,
            dir,
            next: AtomicU32::new(0),
        };
        let dir = host
            .dir
            .to_str()
            .expect("a folder name in UTF-8")
            .to_owned();
        host.shell(&format!("mkdir -m 700 {dir}"));
        host
    }

    /// Runs a command to its end.
    pub fn run<S: AsRef<OsStr>>(&self, argv: impl IntoIterator<Item = S>) -> Done {
        self.spawn(argv).wait()
    }

    /// Runs a line of shell, which must succeed, and returns what it printed.
    pub fn shell(&self, line: &str) -> String {
        let done = self.run(["sh", "-c", line]);
        assert_eq!(done.code, 0, "{line}: {}{}", done.stdout, done.stderr);
        done.stdout
    }

    /// Runs `ringside` with these arguments to its end.
    pub fn ringside<S: AsRef<OsStr>>(&self, args: impl IntoIterator<Item = S>) -> Done {
        self.run(self.command(args))
    }

    fn command<S: AsRef<OsStr>>(&self, args: impl IntoIterator<Item = S>) -> Vec<OsString> {
        let program = self.ringside.clone().into_os_string();
        let args = args.into_iter().map(|arg| arg.as_ref().to_owned());
        let limit = ["timeout".into(), COMMAND_SECONDS.into(), program];
        limit.into_iter().chain(args).collect()
    }

    fn spawn<S: AsRef<OsStr>>(&self, argv: impl IntoIterator<Item = S>) -> Process {
        let argv: Vec<OsString> = argv
            .into_iter()
            .map(|arg| arg.as_ref().to_owned())
            .collect();
        match &self.session {
            None => {
                let child = Command::new(&argv[0])
                    .args(&argv[1..])
                    .env("XDG_RUNTIME_DIR", &self.dir)
                    .stdin(Stdio::null())
                    .stdout(Stdio::piped())
                    .stderr(Stdio::piped())
                    .spawn();
                Process::Direct(child.expect("the command starts"))
            }
            Some(session) => {
                let mut command = LabCommand::new(argv).expect("a working folder").captured();
                command.cwd = "/".into();
                command.env.retain(|(name, _)| name != "XDG_RUNTIME_DIR");
                command
                    .env
                    .push(("XDG_RUNTIME_DIR".into(), self.dir.clone().into()));
                let running = session.spawn(command);
                Process::Nested(running.unwrap_or_else(|error| trouble(error.to_string())))
            }
        }
    }

    /// A path for a new file in the host.
    pub fn path(&self, name: &str) -> String {
        let number = self.next.fetch_add(1, Ordering::Relaxed);
        format!("{}/{number}-{name}", self.dir.display())
    }

    /// Runs a network tool of Debian's in the host; it must succeed.
    pub fn tool(&self, name: &str, args: &str) -> String {
        let cache = CacheDir::discover().expect("a cache folder");
        let tools = HostTools::prepare(&cache, &*progress::on_stderr()).expect("network tools");
        let mut argv = tools.command(name).expect("the packages have it");
        argv.extend(args.split_whitespace().map(OsString::from));
        let done = self.run(argv);
        assert_eq!(
            done.code, 0,
            "{name} {args}: {}{}",
            done.stdout, done.stderr
        );
        done.stdout
    }

    /// Makes a disk image of `mib` MiB, all zeroes.
    pub fn disk(&self, mib: u32) -> String {
        let path = self.path("disk");
        self.shell(&format!("truncate -s {mib}M {path}"));
        path
    }

    /// Starts a guest; [`Guest::up`] waits for it.
    pub fn start_guest(&self, args: &[&str]) -> Guest<'_> {
        let name = format!("g{}", self.next.fetch_add(1, Ordering::Relaxed));
        let serial = self.path("serial");
        let serial_arg = format!("file:{serial}");
        let fixed = [
            "run",
            "--accel",
            "kvm",
            "--name",
            &name,
            "--serial",
            &serial_arg,
        ];
        // Its messages and its end go to a file, to be there when a test fails while it runs.
        let said = format!("{serial}.said");
        let line = format!("\"$@\" 2>{said}; code=$?; echo exit code $code >>{said}; exit $code");
        let mut argv: Vec<OsString> = vec!["sh".into(), "-c".into(), line.into(), "sh".into()];
        argv.extend(self.command(fixed.iter().chain(args)));
        let process = self.spawn(argv);
        Guest {
            host: self,
            name,
            serial,
            process: Some(process),
        }
    }

    /// Starts a guest and waits until its agent answers.
    pub fn boot(&self, args: &[&str]) -> Guest<'_> {
        let guest = self.start_guest(args);
        guest.up();
        guest
    }
}

impl Process {
    fn wait(self) -> Done {
        match self {
            Process::Direct(child) => {
                let output = child.wait_with_output().expect("the command ends");
                Done::new(exit_code(output.status), &output.stdout, &output.stderr)
            }
            Process::Nested(running) => {
                let finished = running
                    .wait()
                    .unwrap_or_else(|error| trouble(error.to_string()));
                Done::new(finished.exit.code(), &finished.stdout, &finished.stderr)
            }
        }
    }
}

fn exit_code(status: ExitStatus) -> u8 {
    use std::os::unix::process::ExitStatusExt;
    let signal = || status.signal().map(|signal| signal + 128);
    let code = status.code().or_else(signal).unwrap_or(255);
    u8::try_from(code).unwrap_or(255)
}

/// A running guest. Dropping it kills it.
pub struct Guest<'h> {
    host: &'h Host,
    name: String,
    serial: String,
    process: Option<Process>,
}

impl Guest<'_> {
    /// Waits until the agent answers, as it does after a boot.
    pub fn up(&self) {
        let args = ["exec", &self.name, "--wait", BOOT_SECONDS, "--", "true"];
        let done = self.host.ringside(args);
        if done.code != 0 {
            trouble(format!(
                "the guest does not boot: {}{}",
                done.stderr,
                self.log()
            ));
        }
    }

    /// Runs a line of shell in the guest.
    pub fn try_sh(&self, line: &str) -> Done {
        self.host
            .ringside(["exec", &self.name, "--", "sh", "-c", line])
    }

    /// Runs a line of shell in the guest, which must succeed, and returns what it printed.
    pub fn sh(&self, line: &str) -> String {
        let done = self.try_sh(line);
        if done.code == NOT_REACHED {
            let log = self.log();
            // Whatever panicked said so: that is no whim of the nested host.
            assert!(!log.contains("panic"), "{line}: {}{log}", done.stderr);
            trouble(format!("{line}: {}{log}", done.stderr));
        }
        if done.code != 0 {
            panic!(
                "in the guest, {line}: exit code {}\n{}{}{}",
                done.code,
                done.stdout,
                done.stderr,
                self.log()
            );
        }
        done.stdout
    }

    /// Asserts that the kernel has complained about nothing so far: no warning, nor worse.
    pub fn kernel_is_content(&self) {
        // The nested host has its mitigations off, and its time runs in leaps: what a kernel says of
        // that is not about our devices.
        let nested: &[&str] = match self.host.session {
            Some(_) => &[
                "Speculative Return Stack Overflow",
                "hrtimer: interrupt took",
                "clocksource",
                "Clocksource",
                "TSC",
                "sched: RT throttling",
                "rcu: INFO",
                "rcu_",
                "hogged CPU",
                "perf: interrupt took",
            ],
            None => &[],
        };
        let complaints = self.sh("dmesg -r | grep '^<[0-4]>' || true");
        let complaints: Vec<_> = complaints
            .lines()
            .filter(|line| !nested.iter().any(|known| line.contains(known)))
            .collect();
        assert!(complaints.is_empty(), "the kernel says: {complaints:#?}");
    }

    /// Asserts that the IOMMU driver has reported no fault so far.
    pub fn no_dma_faults(&self) {
        let faults =
            self.sh("dmesg | grep -E 'DMAR.*(fault status|INTR-REMAP|DMA Read|DMA Write)' || true");
        assert_eq!(faults, "", "{}", self.log());
    }

    /// The counters of the guest's machine.
    pub fn stats(&self) -> serde_json::Value {
        let done = self.host.ringside(["stats", &self.name, "--json"]);
        assert_eq!(done.code, 0, "{}", done.stderr);
        serde_json::from_str(&done.stdout).expect("ringside stats prints JSON")
    }

    /// Interrupts by the action's name (`nvme0q1`, `virtio0-input.0`), summed over the CPUs.
    pub fn interrupts(&self) -> BTreeMap<String, u64> {
        let text = self.sh("cat /proc/interrupts");
        let mut counts = BTreeMap::new();
        for line in text.lines().skip(1) {
            let mut words = line.split_whitespace().skip(1).peekable();
            let mut sum = 0;
            while let Some(count) = words.peek().and_then(|word| word.parse::<u64>().ok()) {
                sum += count;
                words.next();
            }
            if let Some(name) = words.last() {
                *counts.entry(name.to_owned()).or_default() += sum;
            }
        }
        counts
    }

    /// Waits for the end of `ringside run`.
    pub fn wait(mut self) -> Done {
        self.process.take().expect("only this takes it").wait()
    }

    /// Switches the guest off and waits for its end.
    pub fn power_off(self) -> Done {
        let done = self.host.ringside(["stop", &self.name]);
        if done.code != 0 {
            trouble(format!("no power-off: {}{}", done.stderr, self.log()));
        }
        self.wait()
    }

    /// What the guest printed on its serial line, and its counters.
    pub fn log(&self) -> String {
        let done = self.host.run(["tail", "-n", "60", &self.serial]);
        let stats = self.host.ringside(["stats", &self.name]);
        let said = format!("{}.said", self.serial);
        let said = self.host.run(["tail", "-n", "60", &said]);
        format!(
            "\nserial line:\n{}\nringside run:\n{}\nstats:\n{}",
            done.stdout, said.stdout, stats.stdout
        )
    }
}

impl Drop for Guest<'_> {
    fn drop(&mut self) {
        match self.process.take() {
            // The nested host goes, and the guest with it: see `on_host`.
            Some(Process::Nested(_)) if std::thread::panicking() => {}
            Some(process) => {
                let args = ["stop", "--kill", &self.name];
                if std::thread::panicking() {
                    // What fails here must not hide why the test failed.
                    let argv = self.host.command(args);
                    let _ = Command::new(&argv[0]).args(&argv[1..]).status();
                } else {
                    self.host.ringside(args);
                    process.wait();
                }
            }
            None => {}
        }
    }
}

/// An image, built if it is not there.
///
/// # Panics
///
/// It cannot be built.
pub fn image(name: impl Into<ImageName>) -> Image {
    let cache = CacheDir::discover().expect("a cache folder");
    Images::new(&cache)
        .build(name, Freshness::Cached, &*progress::on_stderr())
        .expect("the image builds")
}

/// Builds the program as users build it: unoptimised, it is too slow for a nested host.
fn build_ringside() -> PathBuf {
    let root = Path::new(env!("CARGO_MANIFEST_DIR"))
        .parent()
        .expect("the workspace");
    let cargo = std::env::var_os("CARGO").unwrap_or_else(|| "cargo".into());
    let output = Command::new(cargo)
        .current_dir(root)
        .args([
            "build",
            "--release",
            "--package",
            "vmm",
            "--bin",
            "ringside",
        ])
        .args(["--message-format", "json-render-diagnostics"])
        .stderr(Stdio::inherit())
        .output()
        .expect("cargo runs");
    assert!(output.status.success(), "ringside does not build");
    String::from_utf8_lossy(&output.stdout)
        .lines()
        .filter_map(|line| serde_json::from_str::<serde_json::Value>(line).ok())
        .find_map(|message| Some(PathBuf::from(message["executable"].as_str()?)))
        .expect("cargo names the program")
}

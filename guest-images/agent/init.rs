//! Process 1 of the guest.
//!
//! It sets up what programs expect, loads the modules for the devices that are there, starts the
//! server and a shell on the console, and afterwards only takes the exits of processes that
//! nobody else waits for, and waits for the power button. The kernel's command line controls it:
//!
//! * `ringside.console=off`: no shell on the console.
//! * `ringside.run="COMMAND"` or `ringside.run64=BASE64`: run this with `sh -c` on the console,
//!   print its exit status and switch the machine off.

use std::ffi::CStr;
use std::fs::{self, File};
use std::io::{self, Read};
use std::os::fd::OwnedFd;
use std::os::unix::process::{CommandExt, ExitStatusExt};
use std::path::Path;
use std::process::{Command, Stdio};
use std::thread;
use std::time::{Duration, Instant};

use crate::modules::Modules;
use crate::sys::{self, SignalSet};

const NOSUID: u64 = 2;
const NODEV: u64 = 4;
const NOEXEC: u64 = 8;

/// What is mounted where: type, target, flags (linux/mount.h), options.
const MOUNTS: [(&CStr, &CStr, u64, &CStr); 10] = [
    (c"proc", c"/proc", NOSUID | NODEV | NOEXEC, c""),
    (c"sysfs", c"/sys", NOSUID | NODEV | NOEXEC, c""),
    (c"devtmpfs", c"/dev", NOSUID, c"mode=0755"),
    (
        c"devpts",
        c"/dev/pts",
        NOSUID | NOEXEC,
        c"mode=0620,ptmxmode=0666",
    ),
    (c"tmpfs", c"/dev/shm", NOSUID | NODEV, c"mode=1777"),
    (
        c"hugetlbfs",
        c"/dev/hugepages",
        NOSUID | NODEV,
        c"mode=0700",
    ),
    (c"tmpfs", c"/tmp", NOSUID | NODEV, c"mode=1777"),
    (c"tmpfs", c"/run", NOSUID | NODEV, c"mode=0755"),
    (
        c"debugfs",
        c"/sys/kernel/debug",
        NOSUID | NODEV | NOEXEC,
        c"mode=0700",
    ),
    (
        c"tracefs",
        c"/sys/kernel/tracing",
        NOSUID | NODEV | NOEXEC,
        c"mode=0700",
    ),
];

/// How long processes have to end by themselves when the machine goes down.
const GRACE_MS: u32 = 1000;
/// A service that ended is not started again sooner than this after its last start.
const RESTART_PERIOD: Duration = Duration::from_secs(1);

/// Never returns while the guest lives.
pub fn run() -> io::Result<()> {
    let signals = SignalSet::block(&[
        sys::SIGCHLD,
        sys::SIGTERM,
        sys::SIGINT,
        sys::SIGUSR1,
        sys::SIGUSR2,
    ])?;
    set_up();
    let command_line = fs::read_to_string("/proc/cmdline").unwrap_or_default();
    let options = Options::parse(&command_line);
    if let Some(command) = &options.run {
        run_once(command);
        go_down(&signals, sys::POWER_OFF);
    }
    let mut services = Vec::new();
    // The vsock modules were loaded if the machine has such a device.
    if Path::new("/dev/vsock").exists() {
        services.push(Service::new(start_server));
    }
    if options.console && console().is_some() {
        services.push(Service::new(start_shell));
    }
    watch_power_buttons();
    supervise(&signals, &mut services)
}

fn set_up() {
    for (kind, target, flags, options) in MOUNTS {
        let path = target.to_string_lossy();
        // Some exist only once their parent is mounted; sysfs has its own.
        let _ = fs::create_dir_all(&*path);
        if let Err(error) = sys::mount(kind, target, flags, options) {
            complain(&format!("cannot mount {path}: {error}"));
        }
    }
    if let Err(error) = sys::loopback_up() {
        complain(&format!("cannot bring up lo: {error}"));
    }
    if let Err(error) = fs::write("/proc/sys/kernel/hostname", "ringside") {
        complain(&format!("cannot set the host name: {error}"));
    }
    if let Err(error) = load_modules() {
        complain(&format!("cannot load modules: {error}"));
    }
}

fn load_modules() -> io::Result<()> {
    let release = fs::read_to_string("/proc/sys/kernel/osrelease")?;
    let mut modules = Modules::read(&Path::new("/lib/modules").join(release.trim()))?;
    // Virtio devices appear once the driver of their PCI function is there.
    for bus in ["acpi", "pci", "virtio"] {
        for problem in modules.load_for_bus(bus) {
            complain(&problem);
        }
    }
    Ok(())
}

fn complain(problem: &str) {
    eprintln!("ringside-init: {problem}");
}

/// A program with the environment that a login would give it.
fn program(path: &str) -> Command {
    let mut command = Command::new(path);
    command
        .env_clear()
        .env(
            "PATH",
            "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin",
        )
        .env("HOME", "/root")
        .env("USER", "root")
        .env("TERM", "vt220")
        .current_dir("/root");
    command
}

fn run_once(command: &str) {
    match program("/bin/sh").arg("-c").arg(command).status() {
        Ok(status) => {
            let code = status.code().or(status.signal().map(|signal| 128 + signal));
            println!("ringside: exit status {}", code.unwrap_or(-1));
        }
        Err(error) => complain(&format!("cannot run the command: {error}")),
    }
}

fn start_server() -> io::Result<u32> {
    let child = program("/init").arg("serve").stdin(Stdio::null()).spawn()?;
    Ok(child.id())
}

fn start_shell() -> io::Result<u32> {
    let console = console().ok_or(io::ErrorKind::NotFound)?;
    let terminal = OwnedFd::from(File::options().read(true).write(true).open(console)?);
    let mut command = program("/bin/bash");
    command
        .arg0("-bash")
        .stdin(terminal.try_clone()?)
        .stdout(terminal.try_clone()?)
        .stderr(terminal);
    // SAFETY: between fork and exec begin_session only makes system calls and takes no lock nor
    // memory.
    unsafe { command.pre_exec(|| sys::begin_session(true)) };
    Ok(command.spawn()?.id())
}

/// The terminal behind /dev/console, which itself cannot control a session.
fn console() -> Option<String> {
    let active = fs::read_to_string("/sys/class/tty/console/active").ok()?;
    let path = format!("/dev/{}", active.split_whitespace().last()?);
    Path::new(&path).exists().then_some(path)
}

/// Starts a thread for every power button (Documentation/input/event-codes.rst of the kernel).
fn watch_power_buttons() {
    for entry in fs::read_dir("/sys/class/input")
        .into_iter()
        .flatten()
        .flatten()
    {
        let name = fs::read_to_string(entry.path().join("device/name")).unwrap_or_default();
        let device = Path::new("/dev/input").join(entry.file_name());
        if name.trim() == "Power Button"
            && let Ok(events) = File::open(device)
        {
            let watcher = thread::Builder::new().stack_size(64 << 10);
            if let Err(error) = watcher.spawn(move || watch(events)) {
                complain(&format!("cannot watch the power button: {error}"));
            }
        }
    }
}

/// Ends the machine, as `poweroff` does, when the button is pressed.
fn watch(mut events: File) {
    let mut event = [0; INPUT_EVENT];
    while events.read_exact(&mut event).is_ok() {
        if is_power_press(&event)
            && let Err(error) = sys::kill(1, sys::SIGUSR2)
        {
            complain(&format!("cannot obey the power button: {error}"));
        }
    }
}

/// The size of struct input_event (linux/input.h) on x86-64: time, type, code, value.
const INPUT_EVENT: usize = 24;

fn is_power_press(event: &[u8; INPUT_EVENT]) -> bool {
    const EV_KEY: [u8; 2] = 1_u16.to_le_bytes();
    const KEY_POWER: [u8; 2] = 116_u16.to_le_bytes();
    const PRESSED: [u8; 4] = 1_i32.to_le_bytes();
    event[16..18] == EV_KEY && event[18..20] == KEY_POWER && event[20..24] == PRESSED
}

/// A process that is started again when it ends.
struct Service {
    start: fn() -> io::Result<u32>,
    pid: Option<u32>,
    started: Option<Instant>,
}

impl Service {
    fn new(start: fn() -> io::Result<u32>) -> Self {
        Self {
            start,
            pid: None,
            started: None,
        }
    }

    /// Starts it if it is time to; says whether it waits for that.
    fn keep_running(&mut self) -> bool {
        if self.pid.is_some() {
            return false;
        }
        if self
            .started
            .is_some_and(|started| started.elapsed() < RESTART_PERIOD)
        {
            return true;
        }
        self.started = Some(Instant::now());
        match (self.start)() {
            Ok(pid) => self.pid = Some(pid),
            Err(error) => complain(&format!("cannot start a service: {error}")),
        }
        self.pid.is_none()
    }
}

fn supervise(signals: &SignalSet, services: &mut [Service]) -> io::Result<()> {
    loop {
        let mut waiting = false;
        for service in &mut *services {
            waiting |= service.keep_running();
        }
        match signals.wait(waiting.then_some(200)) {
            Some(sys::SIGCHLD) => {
                while let Some(pid) = sys::reap() {
                    for service in &mut *services {
                        if service.pid == Some(pid) {
                            service.pid = None;
                        }
                    }
                }
            }
            // What busybox's halt, poweroff and reboot send, and Ctrl-Alt-Del.
            Some(sys::SIGUSR1 | sys::SIGUSR2) => go_down(signals, sys::POWER_OFF),
            Some(sys::SIGTERM | sys::SIGINT) => go_down(signals, sys::RESTART),
            _ => {}
        }
    }
}

/// Ends all processes, writes everything to the disks and ends the machine.
fn go_down(signals: &SignalSet, how: u32) {
    // That there is nobody left to signal is what is wanted.
    let _ = sys::kill(-1, sys::SIGTERM);
    let _ = sys::kill(-1, sys::SIGHUP);
    let deadline = Instant::now() + Duration::from_millis(u64::from(GRACE_MS));
    loop {
        while sys::reap().is_some() {}
        let left = deadline.saturating_duration_since(Instant::now());
        if left.is_zero() || !has_children() {
            break;
        }
        signals.wait(Some(u32::try_from(left.as_millis()).unwrap_or(GRACE_MS)));
    }
    let _ = sys::kill(-1, sys::SIGKILL);
    sys::sync();
    for target in mounted_disks() {
        if let Err(error) = sys::unmount(target.as_bytes()) {
            complain(&format!("cannot unmount {target}: {error}"));
        }
    }
    let error = sys::reboot(how);
    complain(&format!("cannot end the machine: {error}"));
}

fn has_children() -> bool {
    fs::read_to_string("/proc/1/task/1/children").map_or(true, |text| !text.trim().is_empty())
}

/// Where file systems of block devices are mounted, the last mounted first.
fn mounted_disks() -> Vec<String> {
    let mounts = fs::read_to_string("/proc/mounts").unwrap_or_default();
    let mut targets: Vec<String> = mounts
        .lines()
        .filter(|line| line.starts_with("/dev/"))
        .filter_map(|line| line.split(' ').nth(1))
        .map(str::to_owned)
        .collect();
    targets.reverse();
    targets
}

/// What the kernel's command line says to us.
#[derive(Debug, PartialEq, Eq)]
struct Options {
    console: bool,
    run: Option<String>,
}

impl Options {
    fn parse(command_line: &str) -> Self {
        let mut options = Self {
            console: true,
            run: None,
        };
        for word in words(command_line) {
            let Some((name, value)) = word.split_once('=') else {
                continue;
            };
            match name {
                "ringside.console" => options.console = value != "off",
                "ringside.run" => options.run = Some(value.to_owned()),
                "ringside.run64" => {
                    let decoded =
                        decode_base64(value).and_then(|bytes| String::from_utf8(bytes).ok());
                    if decoded.is_none() {
                        complain("ringside.run64 is not base64 of a command");
                    }
                    options.run = decoded;
                }
                _ => {}
            }
        }
        options
    }
}

/// Splits at blanks outside of double quotes, as the kernel does, and drops the quotes.
fn words(line: &str) -> Vec<String> {
    let mut words = vec![String::new()];
    let mut quoted = false;
    for c in line.chars() {
        match c {
            '"' => quoted = !quoted,
            c if c.is_whitespace() && !quoted => words.push(String::new()),
            c => {
                if let Some(word) = words.last_mut() {
                    word.push(c);
                }
            }
        }
    }
    words
}

/// RFC 4648 section 4.
fn decode_base64(text: &str) -> Option<Vec<u8>> {
    let mut bytes = Vec::new();
    let mut bits: u32 = 0;
    let mut count = 0;
    for c in text.trim_end_matches('=').bytes() {
        let value = match c {
            b'A'..=b'Z' => c - b'A',
            b'a'..=b'z' => c - b'a' + 26,
            b'0'..=b'9' => c - b'0' + 52,
            b'+' => 62,
            b'/' => 63,
            _ => return None,
        };
        bits = (bits << 6) | u32::from(value);
        count += 6;
        if count >= 8 {
            count -= 8;
            bytes.push((bits >> count & 0xff) as u8);
        }
    }
    Some(bytes)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn options(console: bool, run: Option<&str>) -> Options {
        Options {
            console,
            run: run.map(str::to_owned),
        }
    }

    #[test]
    fn command_lines() {
        assert_eq!(Options::parse("quiet console=ttyS0\n"), options(true, None));
        assert_eq!(Options::parse("ringside.console=off"), options(false, None));
        let quoted = "a ringside.run=\"fio --name=x; echo $?\" b";
        assert_eq!(
            Options::parse(quoted),
            options(true, Some("fio --name=x; echo $?"))
        );
        // What the kernel makes of the same.
        let quoted = "a \"ringside.run=ip addr\" b";
        assert_eq!(Options::parse(quoted), options(true, Some("ip addr")));
        assert_eq!(
            Options::parse("ringside.run64=aXAgYWRkcg=="),
            options(true, Some("ip addr"))
        );
        assert_eq!(Options::parse("ringside.run64=a-b"), options(true, None));
    }

    #[test]
    fn only_a_press_of_the_power_key_counts() {
        let mut event = [0; INPUT_EVENT];
        event[16..].copy_from_slice(&[1, 0, 116, 0, 1, 0, 0, 0]);
        assert!(is_power_press(&event));
        for (byte, value) in [(16, 0), (18, 115), (20, 0), (20, 2)] {
            let mut other = event;
            other[byte] = value;
            assert!(!is_power_press(&other));
        }
    }

    #[test]
    fn base64() {
        let decoded = |text| decode_base64(text).unwrap();
        assert_eq!(decoded(""), b"");
        assert_eq!(decoded("Zg=="), b"f");
        assert_eq!(decoded("Zm9v"), b"foo");
        assert_eq!(decoded("Zm9vYmE="), b"fooba");
    }
}

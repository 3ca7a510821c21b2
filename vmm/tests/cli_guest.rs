//! A guest from its start to its end by the command line alone, on whatever `--accel auto` takes.
//!
//! Where that is a nested host this also shows that terminal, files, locks, sockets and exit codes
//! are the same as without.

use std::cell::RefCell;
use std::fs;
use std::io::Write;
use std::os::unix::fs::PermissionsExt;
use std::panic::{AssertUnwindSafe, catch_unwind, resume_unwind};
use std::path::PathBuf;
use std::process::{Child, Command, Output, Stdio};
use std::time::Duration;

use rustix::event::{PollFd, PollFlags, Timespec};
use rustix::process::{PidfdFlags, Signal};
use tempfile::TempDir;

/// Nested guests on a busy machine take a while.
const BOOT: &str = "--wait=300";

/// How long a command may take: far more than any needs.
const PATIENCE: Duration = Duration::from_secs(400);

/// How long a guest whose test has failed may take to end.
const LAST_PATIENCE: Duration = Duration::from_secs(20);

/// What `ringside exec` exits with when the guest does not answer.
const NOT_REACHED: i32 = 125;

/// How often a test is tried in a nested host that dies or stands still.
const ATTEMPTS: u32 = 3;

struct World {
    folder: TempDir,
    /// Where the messages of each `ringside run` go.
    said: RefCell<Vec<PathBuf>>,
    /// Commands that did not reach their guest, or never ended.
    unanswered: RefCell<Vec<String>>,
}

impl World {
    fn new() -> Self {
        Self {
            folder: tempfile::tempdir().unwrap(),
            said: RefCell::default(),
            unanswered: RefCell::default(),
        }
    }

    /// That a nested host died or stands still: not even a right program can pass a test then.
    fn trouble(&self) -> Option<String> {
        let said = self.said.borrow();
        let said = said.iter().map(|path| fs::read_to_string(path).unwrap());
        let dead = said.filter(|said| said.contains("ringside: the nested host "));
        let stuck = self.unanswered.borrow();
        dead.chain(stuck.iter().cloned()).next()
    }

    fn path(&self, name: &str) -> PathBuf {
        self.folder.path().join(name)
    }

    fn command(&self, args: &[&str]) -> Command {
        let mut command = Command::new(env!("CARGO_BIN_EXE_ringside"));
        command
            .args(args)
            .current_dir(self.folder.path())
            .env("XDG_RUNTIME_DIR", self.folder.path())
            .stdin(Stdio::null());
        command
    }

    fn ringside(&self, args: &[&str]) -> Output {
        self.output(self.command(args))
    }

    /// A command's end and what it printed; that the guest does not answer is noted.
    fn output(&self, mut command: Command) -> Output {
        let output = self.end_of(&mut command);
        if output.status.code() == Some(NOT_REACHED) {
            let line = format!("{command:?}: {}", text(&output.stderr));
            self.unanswered.borrow_mut().push(line);
        }
        output
    }

    /// A command's end and what it printed, which fits into a pipe.
    fn end_of(&self, command: &mut Command) -> Output {
        let child = command
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .spawn()
            .unwrap();
        self.ends(&child);
        child.wait_with_output().unwrap()
    }

    /// Waits for a process's end, not for ever.
    fn ends(&self, child: &Child) {
        if !ends_within(child, PATIENCE) {
            signal(child, Signal::KILL);
            let line = format!("process {} does not end", child.id());
            self.unanswered.borrow_mut().push(line.clone());
            panic!("{line}");
        }
    }

    /// Starts a guest that is ended with this.
    fn start(&self, args: &[&str]) -> Guest<'_> {
        let mut said = self.said.borrow_mut();
        let path = self.path(&format!("said{}", said.len()));
        let file = fs::File::create(&path).unwrap();
        said.push(path);
        let child = self.command(args).stderr(file).spawn().unwrap();
        Guest { world: self, child }
    }

    fn exec(&self, name: &str, command: &[&str]) -> Output {
        let mut args = vec!["exec", name, BOOT, "--"];
        args.extend(command);
        self.ringside(&args)
    }

    /// Runs a command that must succeed; its standard output.
    fn must(&self, name: &str, command: &[&str]) -> String {
        let output = self.exec(name, command);
        assert!(output.status.success(), "{command:?}: {output:?}");
        text(&output.stdout)
    }
}

struct Guest<'w> {
    world: &'w World,
    child: Child,
}

impl Guest<'_> {
    fn code(&mut self) -> Option<i32> {
        self.world.ends(&self.child);
        self.child.wait().unwrap().code()
    }
}

impl Drop for Guest<'_> {
    fn drop(&mut self) {
        // SIGTERM: a nested host then ends, too.
        if self.child.try_wait().is_ok_and(|ended| ended.is_none()) {
            signal(&self.child, Signal::TERM);
            if !ends_within(&self.child, LAST_PATIENCE) {
                signal(&self.child, Signal::KILL);
            }
            let _ = self.child.wait();
        }
    }
}

fn ends_within(child: &Child, limit: Duration) -> bool {
    let pid = rustix::process::Pid::from_child(child);
    let pidfd = rustix::process::pidfd_open(pid, PidfdFlags::empty()).unwrap();
    let mut fds = [PollFd::new(&pidfd, PollFlags::IN)];
    let limit = Timespec::try_from(limit).unwrap();
    rustix::event::poll(&mut fds, Some(&limit)).unwrap() == 1
}

fn signal(child: &Child, signal: Signal) {
    // It fails only if the process has ended.
    let _ = rustix::process::kill_process(rustix::process::Pid::from_child(child), signal);
}

fn text(bytes: &[u8]) -> String {
    String::from_utf8_lossy(bytes).into_owned()
}

/// Runs a test. On this machine's KVM it runs once. In a nested host it runs again if that died or
/// stood still, which is the emulation's fault; a test that failed for any other reason has failed.
fn attempts(test: fn(&World)) {
    let nested = !vmm::probe::probe().can_run_linux();
    for attempt in 1.. {
        let world = World::new();
        let Err(panic) = catch_unwind(AssertUnwindSafe(|| test(&world))) else {
            return;
        };
        match world.trouble() {
            Some(trouble) if nested && attempt < ATTEMPTS => {
                eprintln!("attempt {attempt}: {trouble}\nagain in a new nested host");
            }
            Some(trouble) => panic!("attempt {attempt}: {trouble}"),
            None => resume_unwind(panic),
        }
    }
}

#[test]
fn a_guests_life() {
    attempts(guests_life);
}

fn guests_life(world: &World) {
    let disk = world.path("disk.img");
    fs::File::create(&disk).unwrap().set_len(16 << 20).unwrap();
    let run = [
        "run",
        "--name=life",
        "--vcpus=2",
        "--memory=512M",
        "--nvme=disk.img,serial=LIFE",
        "--net=loopback,pairs=2",
        "--serial=file:console.log",
    ];
    let mut guest = world.start(&run);

    // Streams and exit codes.
    let output = world.exec("life", &["sh", "-c", "echo out; echo err >&2; exit 7"]);
    assert_eq!(output.status.code(), Some(7), "{output:?}");
    assert_eq!(text(&output.stdout), "out\n");
    assert_eq!(text(&output.stderr), "err\n");
    let output = world.exec("life", &["no-such-command"]);
    assert_eq!(output.status.code(), Some(127), "{output:?}");
    let output = world.exec("life", &["sh", "-c", "kill -9 $$"]);
    assert_eq!(output.status.code(), Some(137), "{output:?}");
    let args = [
        "exec",
        "life",
        "--env=X=a b",
        "--cwd=/tmp",
        "--",
        "sh",
        "-c",
        "pwd; echo $X; wc -c",
    ];
    let mut command = world.command(&args);
    let mut child = command
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .spawn()
        .unwrap();
    let mut stdin = child.stdin.take().unwrap();
    stdin.write_all(&[b'x'; 100_000]).unwrap();
    drop(stdin);
    let output = child.wait_with_output().unwrap();
    assert_eq!(text(&output.stdout), "/tmp\na b\n100000\n");

    // Files both ways.
    let content: Vec<u8> = (0..300_000_u32).flat_map(u32::to_le_bytes).collect();
    fs::write(world.path("in"), &content).unwrap();
    fs::set_permissions(world.path("in"), fs::Permissions::from_mode(0o751)).unwrap();
    for (source, target) in [("in", "life:/tmp/"), ("life:/tmp/in", "back")] {
        let output = world.ringside(&["cp", source, target]);
        assert_eq!(output.status.code(), Some(0), "{source}: {output:?}");
    }
    assert!(fs::read(world.path("back")).unwrap() == content);
    let mode = fs::metadata(world.path("back"))
        .unwrap()
        .permissions()
        .mode();
    assert_eq!(mode & 0o777, 0o751);
    let output = world.ringside(&["cp", "life:/no/such", "nothing"]);
    assert_eq!(output.status.code(), Some(1), "{output:?}");
    assert!(!world.path("nothing").exists());

    // The machine is as described, and its disk is the file.
    assert_eq!(world.must("life", &["nproc"]), "2\n");
    let serial = world.must("life", &["cat", "/sys/class/nvme/nvme0/serial"]);
    assert_eq!(serial.trim(), "LIFE");
    world.must(
        "life",
        &[
            "sh",
            "-c",
            "echo Ringside was here | dd of=/dev/nvme0n1 bs=4096 conv=sync,fsync",
        ],
    );
    assert!(fs::read(&disk).unwrap().starts_with(b"Ringside was here\n"));

    // Others see it, and cannot take its name or its disk.
    let list = world.ringside(&["list", "--json"]);
    let list: serde_json::Value = serde_json::from_slice(&list.stdout).unwrap();
    assert_eq!(list[0]["name"], "life");
    assert_eq!(list[0]["pid"], guest.child.id());
    let stats = world.ringside(&["stats", "life", "--json"]);
    let stats: serde_json::Value = serde_json::from_slice(&stats.stdout).unwrap();
    assert!(
        stats["vcpus"][1]["kvm"]["exits"].as_u64().unwrap() > 0,
        "{stats}"
    );
    assert_eq!(stats["devices"]["nvme0"]["kind"], "nvme", "{stats}");
    let output = world.ringside(&run);
    assert_eq!(output.status.code(), Some(2), "{output:?}");
    let message = text(&output.stderr);
    assert!(
        message.contains("--name life: a guest of this name runs (process "),
        "{message}"
    );
    let output = world.ringside(&["run", "--name=other", "--nvme=disk.img"]);
    assert_eq!(output.status.code(), Some(2), "{output:?}");
    let message = text(&output.stderr);
    assert!(message.contains("--nvme"), "{message}");
    assert!(
        message.contains("already in use by another writer"),
        "{message}"
    );

    // The end.
    let output = world.ringside(&["stop", "life", BOOT]);
    assert_eq!(output.status.code(), Some(0), "{output:?}");
    assert_eq!(guest.code(), Some(0));
    assert!(!world.path("ringside/life").exists());
    let output = world.ringside(&["exec", "life", "--", "true"]);
    assert_eq!(output.status.code(), Some(2), "{output:?}");
}

#[test]
fn a_guest_that_is_killed_and_one_that_panics() {
    attempts(killed_and_panics);
}

fn killed_and_panics(world: &World) {
    let mut panics = world.start(&["run", "--name=panics", "--serial=none"]);
    world.must("panics", &["true"]);
    let crash = [
        "exec",
        "panics",
        "--",
        "sh",
        "-c",
        "echo c > /proc/sysrq-trigger",
    ];
    let output = world.end_of(&mut world.command(&crash));
    assert_ne!(output.status.code(), Some(0), "{output:?}");
    assert_eq!(panics.code(), Some(11));

    let mut killed = world.start(&["run", "--name=killed", "--serial=none"]);
    world.must("killed", &["true"]);
    let output = world.ringside(&["stop", "--kill", "killed"]);
    assert_eq!(output.status.code(), Some(0), "{output:?}");
    assert_eq!(killed.code(), Some(13));
    assert!(!world.path("ringside/killed").exists());
}

#[test]
fn a_nested_machine_that_a_signal_ends_is_reported() {
    attempts(|world| {
        let mut guest = world.start(&["run", "--name=dies", "--accel=nested", "--serial=none"]);
        world.must("dies", &["true"]);
        // It is passed on, and ends the process in the nested host, which does not handle it.
        signal(&guest.child, Signal::QUIT);
        assert_eq!(guest.code(), Some(131));
        let said = world.said.borrow();
        let said = fs::read_to_string(said.last().unwrap()).unwrap();
        let line = "ringside: the process in the nested host was ended by signal: 3 (SIGQUIT)";
        assert!(said.contains(line), "{said}");
    });
}

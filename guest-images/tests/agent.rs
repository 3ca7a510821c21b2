//! Drives the agent binary that images hold, over a Unix socket.

use std::fs::{self, File};
use std::io::{self, Read, Write};
use std::net::Shutdown as SocketShutdown;
use std::os::fd::AsFd;
use std::os::unix::fs::PermissionsExt;
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::process::{Child, Command};
use std::thread;
use std::time::{Duration, Instant};

use guest_images::agent::{
    AGENT_BINARY, AgentClient, AgentError, ExecIo, ExecSpec, Exit, Shutdown, Window, control,
};

/// An agent process that ends with the test.
struct Agent {
    child: Child,
    dir: tempfile::TempDir,
}

impl Agent {
    fn start() -> Self {
        let dir = tempfile::tempdir().unwrap();
        let binary = dir.path().join("agent");
        fs::write(&binary, AGENT_BINARY).unwrap();
        fs::set_permissions(&binary, fs::Permissions::from_mode(0o755)).unwrap();
        let socket = dir.path().join("socket");
        // Another thread's fork may hold the new file open for a moment (ETXTBSY).
        let child = eventually(|| {
            Command::new(&binary)
                .arg("serve")
                .arg("--unix")
                .arg(&socket)
                .spawn()
                .ok()
        });
        eventually(|| socket.exists().then_some(()));
        Self { child, dir }
    }

    fn path(&self, name: &str) -> PathBuf {
        self.dir.path().join(name)
    }

    fn connect(&self) -> AgentClient {
        eventually(|| AgentClient::connect_direct(&self.path("socket")).ok())
    }

    fn raw(&self) -> UnixStream {
        eventually(|| UnixStream::connect(self.path("socket")).ok())
    }

    fn output(&self, argv: &[&str]) -> (Exit, String, String) {
        let (exit, stdout, stderr) = self.connect().output(&ExecSpec::new(argv)).unwrap();
        let text = |bytes| String::from_utf8(bytes).unwrap();
        (exit, text(stdout), text(stderr))
    }
}

impl Drop for Agent {
    fn drop(&mut self) {
        self.child.kill().unwrap();
        self.child.wait().unwrap();
    }
}

/// Asks again until there is an answer.
fn eventually<T>(mut ask: impl FnMut() -> Option<T>) -> T {
    let deadline = Instant::now() + Duration::from_secs(60);
    loop {
        if let Some(answer) = ask() {
            return answer;
        }
        assert!(
            Instant::now() < deadline,
            "it did not happen within a minute"
        );
        thread::sleep(Duration::from_millis(5));
    }
}

#[test]
fn programs_run_and_their_ends_are_told() {
    let agent = Agent::start();
    let script = "echo out; echo err >&2; exit 7";
    let (exit, stdout, stderr) = agent.output(&["sh", "-c", script]);
    assert_eq!(
        (exit, stdout.as_str(), stderr.as_str()),
        (Exit::Code(7), "out\n", "err\n")
    );
    let (exit, ..) = agent.output(&["sh", "-c", "kill -SEGV $$"]);
    assert_eq!(exit, Exit::Signal(11));
    assert_eq!(agent.output(&["true"]).0, Exit::Code(0));
}

#[test]
fn environment_and_directory_are_set() {
    let agent = Agent::start();
    let spec = ExecSpec::new(["sh", "-c", "echo \"$A:$PWD\"; test -n \"$PATH\""])
        .env("A", "b c=d")
        .cwd("/usr");
    let (exit, stdout, _) = agent.connect().output(&spec).unwrap();
    assert_eq!(
        (exit, stdout.as_slice()),
        (Exit::Code(0), &b"b c=d:/usr\n"[..])
    );
    let spec = ExecSpec::new(["true"]).cwd("/nonexistent");
    let error = agent.connect().output(&spec).unwrap_err();
    assert!(error.to_string().contains("/nonexistent"), "{error}");
}

#[test]
fn what_cannot_run_is_refused_with_its_error() {
    let agent = Agent::start();
    let refused = |argv: &[&str]| match agent.connect().output(&ExecSpec::new(argv)) {
        Err(AgentError::Refused { errno, text }) => (errno, text),
        other => panic!("{other:?}"),
    };
    assert_eq!(refused(&["ringside-no-such-program"]).0, 2);
    assert_eq!(refused(&["/etc/passwd"]).0, 13);
    assert_eq!(refused(&[]).0, 0);
}

/// Megabytes both ways at once, more than all windows and pipes together.
#[test]
fn large_streams_are_echoed_whole() {
    let agent = Agent::start();
    let data: Vec<u8> = (0..8_000_000u32)
        .flat_map(|i| i.to_le_bytes().into_iter().take(1))
        .collect();
    let (mut writer, reader) = UnixStream::pair().unwrap();
    let sent = data.clone();
    let feeder = thread::spawn(move || {
        writer.write_all(&sent).unwrap();
        writer.shutdown(SocketShutdown::Write).unwrap();
    });
    let (mut stdout, mut stderr) = (Vec::new(), Vec::new());
    let io = ExecIo {
        stdin: Some(reader.as_fd()),
        stdout: &mut stdout,
        stderr: &mut stderr,
        control: None,
    };
    let spec = ExecSpec::new(["sh", "-c", "tee /dev/stderr"]);
    assert_eq!(agent.connect().exec(&spec, io).unwrap(), Exit::Code(0));
    feeder.join().unwrap();
    assert!(stdout == data, "{} bytes came back", stdout.len());
    assert!(stderr == data, "{} bytes came back", stderr.len());
}

/// A program that reads nothing gets its signal although more input waits than fits anywhere.
#[test]
fn signals_overtake_input_that_nobody_reads() {
    let agent = Agent::start();
    let zero = File::open("/dev/zero").unwrap();
    let (sender, receiver) = control().unwrap();
    let marker = agent.path("started");
    let script = format!(
        "trap 'exit 3' TERM; : > {}; while :; do sleep 0.05; done",
        marker.display()
    );
    let signaller = thread::spawn(move || {
        eventually(|| marker.exists().then_some(()));
        sender.signal(15).unwrap();
        sender
    });
    let io = ExecIo {
        stdin: Some(zero.as_fd()),
        stdout: &mut io::sink(),
        stderr: &mut io::sink(),
        control: Some(&receiver),
    };
    let exit = agent
        .connect()
        .exec(&ExecSpec::new(["sh", "-c", &script]), io)
        .unwrap();
    assert_eq!(exit, Exit::Code(3));
    signaller.join().unwrap();
}

#[test]
fn a_program_that_closes_its_input_early_is_no_error() {
    let agent = Agent::start();
    let zero = File::open("/dev/zero").unwrap();
    let mut stdout = Vec::new();
    let io = ExecIo {
        stdin: Some(zero.as_fd()),
        stdout: &mut stdout,
        stderr: &mut io::sink(),
        control: None,
    };
    let spec = ExecSpec::new(["sh", "-c", "head -c 100000 | wc -c"]);
    assert_eq!(agent.connect().exec(&spec, io).unwrap(), Exit::Code(0));
    assert_eq!(String::from_utf8(stdout).unwrap().trim(), "100000");
}

#[test]
fn a_background_process_does_not_hold_the_request() {
    let agent = Agent::start();
    let (exit, stdout, _) = agent.output(&["sh", "-c", "sleep 1000 & echo $!"]);
    assert_eq!(exit, Exit::Code(0));
    let pid = stdout.trim();
    assert!(Path::new("/proc").join(pid).exists(), "it was killed");
    Command::new("kill").arg(pid).status().unwrap();
}

#[test]
fn a_terminal_has_a_size_that_changes_and_an_end() {
    let agent = Agent::start();
    let marker = agent.path("waiting");
    let script = format!(
        "test -t 0 && test -t 1 && stty size; trap 'stty size; exit 5' WINCH; \
         : > {}; while :; do sleep 0.05; done",
        marker.display()
    );
    let (sender, receiver) = control().unwrap();
    let resizer = thread::spawn(move || {
        eventually(|| marker.exists().then_some(()));
        sender
            .window(Window {
                rows: 50,
                columns: 132,
            })
            .unwrap();
        sender
    });
    let mut stdout = Vec::new();
    let io = ExecIo {
        stdin: None,
        stdout: &mut stdout,
        stderr: &mut io::sink(),
        control: Some(&receiver),
    };
    let window = Window {
        rows: 24,
        columns: 80,
    };
    let spec = ExecSpec::new(["sh", "-c", &script]).tty(window);
    assert_eq!(agent.connect().exec(&spec, io).unwrap(), Exit::Code(5));
    resizer.join().unwrap();
    let text = String::from_utf8(stdout).unwrap();
    assert!(
        text.contains("24 80") && text.contains("50 132"),
        "{text:?}"
    );

    // The end of input reaches a terminal as its end-of-file character.
    let spec = ExecSpec::new(["cat"]).tty(window);
    let (exit, ..) = agent.connect().output(&spec).unwrap();
    assert_eq!(exit, Exit::Code(0));
}

#[test]
fn files_go_there_and_back() {
    let agent = Agent::start();
    let data: Vec<u8> = (0..3_000_000u32).map(|i| i.to_le_bytes()[1]).collect();
    let path = agent.path("file");
    let size = u64::try_from(data.len()).unwrap();
    agent
        .connect()
        .put(&mut data.as_slice(), size, &path, 0o4750)
        .unwrap();
    assert_eq!(
        fs::metadata(&path).unwrap().permissions().mode() & 0o7777,
        0o4750
    );
    let mut back = Vec::new();
    let info = agent.connect().get(&path, &mut back).unwrap();
    assert_eq!((info.mode, info.size), (0o4750, size));
    assert!(back == data);

    // Empty, and of the kernel's kind whose size is not known before.
    agent
        .connect()
        .put(&mut io::empty(), 0, &path, 0o600)
        .unwrap();
    assert_eq!(fs::read(&path).unwrap(), b"");
    let mut back = Vec::new();
    let info = agent
        .connect()
        .get(Path::new("/proc/version"), &mut back)
        .unwrap();
    assert!(back.starts_with(b"Linux") && info.size > 0);

    // A device is written in place and stays a device.
    agent
        .connect()
        .put(&mut data.as_slice(), size, Path::new("/dev/null"), 0o600)
        .unwrap();
    assert!(!fs::metadata("/dev/null").unwrap().is_file());
}

#[test]
fn a_failed_copy_leaves_nothing_and_says_why() {
    let agent = Agent::start();
    let mut data = &b"abc"[..];
    let refused = |result: Result<(), AgentError>| match result {
        Err(AgentError::Refused { errno, .. }) => errno,
        other => panic!("{other:?}"),
    };
    let put = |data: &mut dyn Read, size, path: &Path| agent.connect().put(data, size, path, 0o600);
    assert_eq!(refused(put(&mut data, 3, Path::new("/nonexistent/x"))), 2);
    assert_eq!(refused(put(&mut data, 3, agent.dir.path())), 21);
    // No space left on device, in the middle of much data.
    let mut zero = File::open("/dev/zero").unwrap();
    assert_eq!(
        refused(put(&mut zero, 2_000_000, Path::new("/dev/full"))),
        28
    );
    let error = agent
        .connect()
        .get(Path::new("/nonexistent"), &mut io::sink())
        .unwrap_err();
    assert!(matches!(error, AgentError::Refused { errno: 2, .. }));

    // The source has less than it promised: the connection is dropped, the file never appears.
    let path = agent.path("short");
    assert!(matches!(
        put(&mut data, 4, &path),
        Err(AgentError::Local { .. })
    ));
    eventually(|| {
        let mut names = fs::read_dir(agent.dir.path())
            .unwrap()
            .map(|entry| entry.unwrap().file_name());
        (!names.any(|name| name.to_string_lossy().starts_with("short"))).then_some(())
    });
}

#[test]
fn info_tells_and_shutdown_is_for_guests_only() {
    let agent = Agent::start();
    let info = agent.connect().info().unwrap();
    assert_eq!(info.agent_version, env!("CARGO_PKG_VERSION"));
    let release = fs::read_to_string("/proc/sys/kernel/osrelease").unwrap();
    assert_eq!(info.kernel_release, release.trim());
    assert!(info.uptime_ms > 0);
    let error = agent.connect().shutdown(Shutdown::PowerOff).unwrap_err();
    assert!(error.to_string().contains("not in a guest"), "{error}");
}

#[test]
fn garbage_ends_the_connection_and_nothing_else() {
    let agent = Agent::start();
    let too_long = [1, 0xff, 0xff, 0xff, 0xff];
    let unknown = [200, 0, 0, 0, 0];
    // Exec of a list that announces four thousand million arguments.
    let lies = [1, 5, 0, 0, 0, 1, 0xff, 0xff, 0xff, 0xff];
    let not_a_request = [21, 0, 0, 0, 0];
    let http = *b"GET / HTTP/1.1\r\n\r\n";
    for garbage in [&too_long[..], &unknown, &lies, &not_a_request, &http] {
        let mut stream = agent.raw();
        stream.write_all(garbage).unwrap();
        stream.shutdown(SocketShutdown::Write).unwrap();
        let mut answer = Vec::new();
        stream.read_to_end(&mut answer).unwrap();
        assert_eq!(
            answer.first(),
            Some(&41),
            "{garbage:?} was answered {answer:?}"
        );
    }
    // Cut off in the middle of a frame.
    drop(agent.raw().write_all(&[4, 1]));
    assert_eq!(agent.output(&["true"]).0, Exit::Code(0));
}

#[test]
fn a_dropped_connection_kills_the_program() {
    let agent = Agent::start();
    for tty in [
        None,
        Some(Window {
            rows: 24,
            columns: 80,
        }),
    ] {
        let (sender, receiver) = UnixStream::pair().unwrap();
        let mut spec = ExecSpec::new(["sh", "-c", "sleep 1000 & echo $! $$; wait"]);
        spec = match tty {
            Some(window) => spec.tty(window),
            None => spec,
        };
        // Standard output that breaks after its first line makes exec return early.
        let mut stdout = BreakAfterLine(sender);
        let io = ExecIo {
            stdin: None,
            stdout: &mut stdout,
            stderr: &mut io::sink(),
            control: None,
        };
        let error = agent.connect().exec(&spec, io).unwrap_err();
        assert!(matches!(error, AgentError::Local { .. }), "{error}");
        drop(stdout);
        let line = io::read_to_string(receiver).unwrap();
        for pid in line.split_whitespace() {
            eventually(|| (!is_running(pid)).then_some(()));
        }
    }
}

fn is_running(pid: &str) -> bool {
    let stat = fs::read_to_string(format!("/proc/{pid}/stat")).unwrap_or_default();
    // Someone else's zombie has ended all the same.
    stat.rsplit(')')
        .next()
        .is_some_and(|rest| !rest.is_empty() && !rest.starts_with(" Z"))
}

/// Passes one write on and fails.
struct BreakAfterLine(UnixStream);

impl Write for BreakAfterLine {
    fn write(&mut self, data: &[u8]) -> io::Result<usize> {
        self.0.write(data)
    }

    fn flush(&mut self) -> io::Result<()> {
        Err(io::ErrorKind::BrokenPipe.into())
    }
}

#[test]
fn many_requests_run_at_a_time() {
    let agent = Agent::start();
    thread::scope(|scope| {
        for number in 0..40 {
            let agent = &agent;
            scope.spawn(move || {
                let (exit, stdout, _) =
                    agent.output(&["sh", "-c", &format!("sleep 0.2; echo {number}")]);
                assert_eq!(
                    (exit, stdout.trim()),
                    (Exit::Code(0), number.to_string().as_str())
                );
            });
        }
    });
}

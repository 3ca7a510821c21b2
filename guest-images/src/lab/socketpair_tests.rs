//! The outside and the relay over a socket pair: everything but QEMU.

use std::fs::{self, File};
use std::io::{self, Read, Write};
use std::os::fd::OwnedFd;
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};
use std::sync::mpsc;
use std::thread::{self, JoinHandle};
use std::time::{Duration, Instant};

use rustix::net::{AddressFamily, SocketFlags, SocketType};

use super::outside::Host;
use super::qemu::Killer;
use super::relay::{Place, Relay};
use super::wire::Setup;
use super::{Exit, Input, LabCommand, LabError, Output, Session};

/// A relay in a thread, whose sockets are below `inside`, and a session with it.
struct Lab {
    outside: tempfile::TempDir,
    inside: PathBuf,
    session: Option<Session>,
    relay: Option<JoinHandle<io::Result<()>>>,
}

fn wires() -> (OwnedFd, OwnedFd) {
    let flags = SocketFlags::NONBLOCK | SocketFlags::CLOEXEC;
    rustix::net::socketpair(AddressFamily::UNIX, SocketType::STREAM, flags, None).unwrap()
}

/// The relay forks in this very process: what its commands inherit would never close.
fn cloexec_pipe() -> (OwnedFd, OwnedFd) {
    rustix::pipe::pipe_with(rustix::pipe::PipeFlags::CLOEXEC).unwrap()
}

fn session_over(wire: OwnedFd) -> Result<Session, LabError> {
    let host = |killer| Host {
        killer,
        qemu: None,
        logs: Vec::new(),
    };
    let (session, ready) = Session::over(wire, host, Killer::none(), Setup::default())?;
    ready.recv().unwrap()?;
    Ok(session)
}

impl Lab {
    fn start() -> Self {
        let outside = tempfile::tempdir().unwrap();
        let root = outside.path().join("inside");
        // Sockets are named by their path outside; inside they are below `root`.
        let inside = root.join(outside.path().strip_prefix("/").unwrap());
        fs::create_dir_all(&inside).unwrap();
        let (wire, relay_wire) = wires();
        let relay = thread::spawn(move || Relay::new(relay_wire, Place::Below(root)).run());
        Self {
            outside,
            inside,
            session: Some(session_over(wire).unwrap()),
            relay: Some(relay),
        }
    }

    fn session(&self) -> &Session {
        self.session.as_ref().unwrap()
    }

    fn path(&self, name: &str) -> PathBuf {
        self.outside.path().join(name)
    }
}

impl Drop for Lab {
    fn drop(&mut self) {
        drop(self.session.take());
        let result = self.relay.take().unwrap().join().unwrap();
        assert!(thread::panicking() || result.is_ok(), "{result:?}");
    }
}

fn shell(script: &str) -> LabCommand {
    LabCommand::new(["sh", "-c", script]).unwrap().captured()
}

/// Waits for something that has no event, with a limit that only a failure reaches.
fn eventually(mut condition: impl FnMut() -> bool) {
    let until = Instant::now() + Duration::from_secs(30);
    while !condition() {
        assert!(Instant::now() < until, "it did not happen");
        thread::sleep(Duration::from_millis(5));
    }
}

#[test]
fn status_output_environment_and_folder() {
    let lab = Lab::start();
    let mut command = shell("echo out $V $RINGSIDE_NESTED_HOST; pwd; echo err >&2; exit 7");
    command.env.push(("V".into(), "value".into()));
    command.cwd = "/usr".into();
    let finished = lab.session().command(command).unwrap();
    assert_eq!(finished.exit, Exit::Code(7));
    assert_eq!(finished.stdout, b"out value 1\n/usr\n");
    assert_eq!(finished.stderr, b"err\n");
    let finished = lab.session().command(shell("kill -9 $$")).unwrap();
    assert_eq!(finished.exit, Exit::Signal(9));
}

#[test]
fn a_program_that_does_not_exist_is_an_error_of_its_own() {
    let lab = Lab::start();
    let command = LabCommand::new(["/nonexistent/program"])
        .unwrap()
        .captured();
    let error = lab.session().command(command).unwrap_err();
    assert!(
        matches!(&error, LabError::Spawn { program, .. } if program == "/nonexistent/program"),
        "{error}"
    );
    // The session goes on.
    assert!(
        lab.session()
            .command(shell("true"))
            .unwrap()
            .exit
            .is_success()
    );
}

#[test]
fn a_large_input_comes_back_whole() {
    let lab = Lab::start();
    let (read, write) = cloexec_pipe();
    let mut command = LabCommand::new(["cat"]).unwrap().captured();
    command.stdin = Input::File(read);
    let running = lab.session().spawn(command).unwrap();
    let data: Vec<u8> = (0..10_000_000_u32)
        .map(|n| n.to_le_bytes()[n as usize % 3])
        .collect();
    let mut writer = File::from(write);
    writer.write_all(&data).unwrap();
    drop(writer);
    let finished = running.wait().unwrap();
    assert!(finished.exit.is_success());
    assert!(finished.stdout == data, "{} bytes", finished.stdout.len());
}

#[test]
fn output_that_nobody_reads_ends_the_command_like_a_pipe_would() {
    let lab = Lab::start();
    let (read, write) = cloexec_pipe();
    drop(read);
    let mut command = LabCommand::new(["yes"]).unwrap().captured();
    command.stdout = Output::File(write);
    let finished = lab.session().command(command).unwrap();
    assert_eq!(finished.exit, Exit::Signal(libc::SIGPIPE));
}

#[test]
fn a_grandchild_that_keeps_the_output_open_does_not_delay_the_end() {
    let lab = Lab::start();
    let finished = lab.session().command(shell("sleep 60 & echo $!")).unwrap();
    let child: i32 = String::from_utf8(finished.stdout)
        .unwrap()
        .trim()
        .parse()
        .unwrap();
    let child = rustix::process::Pid::from_raw(child).unwrap();
    rustix::process::kill_process(child, rustix::process::Signal::KILL).unwrap();
    assert_eq!(finished.exit, Exit::Code(0));
}

#[test]
fn signals_reach_the_command() {
    let lab = Lab::start();
    let (read, write) = cloexec_pipe();
    let mut command = shell("trap 'exit 42' INT; echo ready; while :; do sleep 0.01; done");
    command.stdout = Output::File(write);
    let running = lab.session().spawn(command).unwrap();
    let mut ready = [0; 6];
    File::from(read).read_exact(&mut ready).unwrap();
    running.signal(libc::SIGINT);
    assert_eq!(running.wait().unwrap().exit, Exit::Code(42));
}

/// A shell cannot trap what was ignored when it started (POSIX, trap).
#[test]
#[expect(unsafe_code, reason = "signal(2)")]
fn a_command_starts_with_no_signal_ignored() {
    // SAFETY: SIG_IGN is no handler, and nothing else in this process uses the signal.
    unsafe { libc::signal(libc::SIGUSR2, libc::SIG_IGN) };
    let lab = Lab::start();
    let command = shell("trap 'exit 42' USR2; kill -USR2 $$; exit 1");
    let exit = lab.session().spawn(command).unwrap().wait().unwrap().exit;
    assert_eq!(exit, Exit::Code(42));
}

#[test]
fn a_terminal_is_a_terminal_inside_and_control_c_interrupts() {
    let lab = Lab::start();
    let flags = rustix::pty::OpenptFlags::RDWR
        | rustix::pty::OpenptFlags::NOCTTY
        | rustix::pty::OpenptFlags::CLOEXEC;
    let master = rustix::pty::openpt(flags).unwrap();
    rustix::pty::grantpt(&master).unwrap();
    rustix::pty::unlockpt(&master).unwrap();
    let slave = rustix::pty::ioctl_tiocgptpeer(&master, flags).unwrap();
    // The test's terminal is not the one that controls this process, so it is not put into raw
    // mode by the session.
    let mut mode = rustix::termios::tcgetattr(&slave).unwrap();
    mode.make_raw();
    rustix::termios::tcsetattr(&slave, rustix::termios::OptionalActions::Now, &mode).unwrap();
    let size = |rows, columns| rustix::termios::Winsize {
        ws_row: rows,
        ws_col: columns,
        ws_xpixel: 0,
        ws_ypixel: 0,
    };
    rustix::termios::tcsetwinsize(&slave, size(33, 77)).unwrap();
    let script = "test -t 0 -a -t 1 -a -t 2 && stty size; \
                  trap 'stty size; exit 9' INT; trap 'echo resized' WINCH; echo ready; \
                  while :; do sleep 0.01; done";
    let mut command = shell(script);
    command.stdin = Input::File(slave.try_clone().unwrap());
    command.stdout = Output::File(slave.try_clone().unwrap());
    command.stderr = Output::File(slave.try_clone().unwrap());
    let running = lab.session().spawn(command).unwrap();
    let mut master = File::from(master);
    let mut seen = String::new();
    let mut read_until = |text: &str, master: &mut File| {
        while !seen.contains(text) {
            let mut buffer = [0; 256];
            let read = master.read(&mut buffer).unwrap();
            seen.push_str(std::str::from_utf8(&buffer[..read]).unwrap());
        }
    };
    read_until("33 77\r\nready\r\n", &mut master);
    rustix::termios::tcsetwinsize(&slave, size(40, 100)).unwrap();
    running.resize();
    read_until("resized\r\n", &mut master);
    master.write_all(b"\x03").unwrap();
    read_until("^C40 100\r\n", &mut master);
    assert_eq!(running.wait().unwrap().exit, Exit::Code(9));
}

/// A server that answers each connection with what it has read, and then ends.
fn echo_server(path: &Path, connections: usize) -> JoinHandle<()> {
    let listener = UnixListener::bind(path).unwrap();
    thread::spawn(move || {
        for connection in listener.incoming().take(connections) {
            let mut connection = connection.unwrap();
            let mut data = Vec::new();
            connection.read_to_end(&mut data).unwrap();
            connection.write_all(&data).unwrap();
        }
    })
}

fn ask(path: &Path, data: &[u8]) -> Vec<u8> {
    let mut connection = UnixStream::connect(path).unwrap();
    connection.write_all(data).unwrap();
    connection.shutdown(std::net::Shutdown::Write).unwrap();
    let mut answer = Vec::new();
    connection.read_to_end(&mut answer).unwrap();
    answer
}

#[test]
fn a_socket_exists_outside_exactly_as_long_as_inside() {
    let lab = Lab::start();
    let path = lab.path("control.sock");
    let mut command = LabCommand::new(["cat"]).unwrap().captured();
    let (read, write) = cloexec_pipe();
    command.stdin = Input::File(read);
    command.sockets = vec![path.clone()];
    let running = lab.session().spawn(command).unwrap();
    assert!(!path.exists());
    let server = echo_server(&lab.inside.join("control.sock"), 2);
    eventually(|| path.exists());
    assert_eq!(ask(&path, b"small"), b"small");
    let large: Vec<u8> = (0..10_000_000_u32).map(|n| n.to_le_bytes()[1]).collect();
    assert!(ask(&path, &large) == large);
    server.join().unwrap();
    eventually(|| !path.exists());
    let _again = echo_server(&lab.inside.join("again"), 1);
    fs::rename(lab.inside.join("again"), lab.inside.join("control.sock")).unwrap();
    drop(File::from(write));
    assert!(running.wait().unwrap().exit.is_success());
    assert!(!path.exists());
}

#[test]
fn a_socket_that_somebody_else_serves_is_not_taken() {
    let lab = Lab::start();
    let path = lab.path("control.sock");
    let _other = UnixListener::bind(&path).unwrap();
    let mut command = shell("true");
    command.sockets = vec![path.clone()];
    let error = lab.session().command(command).unwrap_err();
    assert!(matches!(error, LabError::SocketInUse(taken) if taken == path));
}

#[test]
fn numbered_sockets_outside_can_be_reached_from_inside() {
    let lab = Lab::start();
    let base = lab.path("vsock.sock");
    let early = echo_server(&lab.path("vsock.sock_1"), 1);
    let (read, write) = cloexec_pipe();
    let mut command = LabCommand::new(["cat"]).unwrap().captured();
    command.stdin = Input::File(read);
    command.outward = vec![base];
    let running = lab.session().spawn(command).unwrap();
    let inside = |port: u32| lab.inside.join(format!("vsock.sock_{port}"));
    eventually(|| inside(1).exists());
    assert_eq!(ask(&inside(1), b"early"), b"early");
    early.join().unwrap();

    let late = echo_server(&lab.path("vsock.sock_22"), 1);
    eventually(|| inside(22).exists());
    assert_eq!(ask(&inside(22), b"late"), b"late");
    late.join().unwrap();
    fs::remove_file(lab.path("vsock.sock_22")).unwrap();
    eventually(|| !inside(22).exists());
    drop(File::from(write));
    running.wait().unwrap();
    assert!(!inside(1).exists());
}

#[test]
fn commands_run_at_once() {
    let lab = Lab::start();
    let first = lab.path("first");
    let path = first.display();
    let waiting = shell(&format!(
        "until test -e {path}; do sleep 0.01; done; echo seen"
    ));
    let waiting = lab.session().spawn(waiting).unwrap();
    assert!(
        lab.session()
            .command(shell(&format!("touch {path}")))
            .unwrap()
            .exit
            .is_success()
    );
    assert_eq!(waiting.wait().unwrap().stdout, b"seen\n");
}

#[test]
fn the_end_of_the_nested_host_is_an_error_and_no_status() {
    let (wire, peer) = wires();
    let (to_test, from_relay) = mpsc::channel();
    let relay = thread::spawn(move || {
        let mut mux = super::mux::Mux::new(peer);
        let hello = super::wire::ToOutside::Hello {
            version: super::wire::VERSION.to_owned(),
        };
        mux.send(&hello).unwrap();
        let mut messages = 0;
        // It answers the setup, and dies when a command comes.
        while messages < 2 {
            let turn = super::reactor::turn(&mut mux, &[], None).unwrap();
            for _ in turn.events {
                messages += 1;
                if messages == 1 {
                    mux.send(&super::wire::ToOutside::Ready).unwrap();
                }
            }
        }
        to_test.send(()).unwrap();
    });
    let session = session_over(wire).unwrap();
    let running = session.spawn(shell("true")).unwrap();
    from_relay.recv().unwrap();
    assert!(matches!(running.wait(), Err(LabError::HostDied { .. })));
    assert!(matches!(
        session.command(shell("true")),
        Err(LabError::HostDied { .. })
    ));
    relay.join().unwrap();
}

#[test]
fn garbage_on_the_wire_ends_the_session() {
    let (wire, peer) = wires();
    UnixStream::from(peer.try_clone().unwrap())
        .write_all(b"Kernel panic!")
        .unwrap();
    let error = session_over(wire).unwrap_err();
    assert!(error.to_string().contains("unknown frame kind"), "{error}");
    drop(peer);
}

#[test]
fn another_version_is_refused() {
    let (wire, peer) = wires();
    let mut mux = super::mux::Mux::new(peer);
    let hello = super::wire::ToOutside::Hello {
        version: "other".into(),
    };
    mux.send(&hello).unwrap();
    super::reactor::turn(&mut mux, &[], None).unwrap();
    assert!(matches!(session_over(wire), Err(LabError::Setup(_))));
}

#[test]
fn the_relay_answers_when_it_is_asked() {
    let (wire, relay_wire) = wires();
    let relay = thread::spawn(|| Relay::new(relay_wire, Place::Below(PathBuf::new())).run());
    let mut mux = super::mux::Mux::new(wire);
    mux.send(&super::wire::ToInside::Ping).unwrap();
    let mut said = Vec::new();
    while said.len() < 2 {
        let turn = super::reactor::turn(&mut mux, &[], None).unwrap();
        for event in turn.events {
            let super::mux::Event::Control(json) = event else {
                panic!("{said:?}");
            };
            said.push(super::wire::decode_message(&json).unwrap());
        }
    }
    assert!(matches!(said[0], super::wire::ToOutside::Hello { .. }));
    assert!(matches!(said[1], super::wire::ToOutside::Pong));
    drop(mux);
    relay.join().unwrap().unwrap();
}

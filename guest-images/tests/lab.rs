//! The nested host for real: QEMU, its kernel, the relay, and KVM inside.
//!
//! The first run fetches packages (about 150 MB) into the cache folder.

use std::ffi::OsString;
use std::fs::{self, File};
use std::io::{Read, Write};
use std::os::unix::fs::FileExt;
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use guest_images::CacheDir;
use guest_images::apt::Freshness;
use guest_images::lab::{
    Exit, LabCommand, LabDisk, LabError, LabImage, LabSpec, Output, RelayProgram, Session,
    relay_main, run,
};
use guest_images::progress::{self, Silent};

/// Inside the nested host, this test program is the relay.
#[test]
#[ignore = "runs as the first process of the nested host only"]
fn relay_entry() {
    relay_main();
}

fn spec() -> LabSpec {
    let mut spec = LabSpec::new().unwrap();
    spec.relay = RelayProgram {
        executable: std::env::current_exe().unwrap(),
        arguments: ["--exact", "relay_entry", "--ignored", "--nocapture"]
            .map(Into::into)
            .to_vec(),
    };
    spec
}

/// A process that is only there for [`run`].
#[test]
#[ignore = "is started by other tests"]
fn run_entry() {
    let script = std::env::var_os("LAB_TEST_SCRIPT").unwrap();
    let mut spec = spec();
    spec.options.kernel_args = vec![format!("ringside.test={}", std::process::id())];
    let command = LabCommand::new(["sh".as_ref(), "-c".as_ref(), script.as_os_str()]).unwrap();
    let cache = CacheDir::discover().unwrap();
    let code = match run(spec, command, &cache, &*progress::on_stderr()) {
        Ok(finished) => finished.exit.code(),
        Err(error) => {
            eprintln!("{error}");
            error.code()
        }
    };
    std::process::exit(code.into());
}

/// How [`run_entry`] is started, with a prefix such as setsid(1).
fn run_command(prefix: &[&str], script: &str) -> Command {
    let entry = std::env::current_exe().unwrap();
    let words = ["--exact", "run_entry", "--ignored", "--nocapture"];
    let mut argv: Vec<OsString> = prefix.iter().map(Into::into).collect();
    argv.push(entry.into());
    argv.extend(words.map(Into::into));
    let mut command = Command::new(&argv[0]);
    command.args(&argv[1..]).env("LAB_TEST_SCRIPT", script);
    command
}

/// Whether the nested host of the process `pid` lives.
fn host_lives(pid: u32) -> bool {
    let marker = format!("ringside.test={pid}");
    let processes = fs::read_dir("/proc").unwrap().filter_map(Result::ok);
    processes
        .filter_map(|process| fs::read(process.path().join("cmdline")).ok())
        .any(|line| String::from_utf8_lossy(&line).contains(&marker))
}

fn start(spec: LabSpec) -> Result<Session, LabError> {
    let cache = CacheDir::discover().unwrap();
    Session::start(spec, &cache, &*progress::on_stderr())
}

fn shell(script: &str) -> LabCommand {
    LabCommand::new(["sh", "-c", script]).unwrap().captured()
}

#[track_caller]
fn output(session: &Session, script: &str) -> String {
    let finished = session.command(shell(script)).unwrap();
    let text = String::from_utf8_lossy(&finished.stdout).into_owned();
    let errors = String::from_utf8_lossy(&finished.stderr);
    assert_eq!(finished.exit, Exit::Code(0), "{script}: {text}{errors}");
    text
}

/// Waits for something that has no event, with a limit that only a failure reaches.
fn eventually(mut condition: impl FnMut() -> bool) {
    let until = Instant::now() + Duration::from_secs(120);
    while !condition() {
        assert!(Instant::now() < until, "it did not happen");
        std::thread::sleep(Duration::from_millis(10));
    }
}

#[test]
fn a_nested_host_runs_commands_like_the_machine() {
    let folder = tempfile::tempdir().unwrap();
    let path = |name: &str| folder.path().join(name);
    let image = path("disk.img");
    fs::write(&image, vec![0x5a; 8 << 20]).unwrap();
    let disk = File::options().read(true).write(true).open(&image).unwrap();
    disk.lock().unwrap();
    let mut spec = spec();
    spec.writable_dirs = vec![folder.path().to_owned()];
    spec.disks = vec![LabDisk {
        path: image.clone(),
        file: disk.try_clone().unwrap(),
        readonly: false,
    }];
    let session = start(spec).unwrap();

    a_host_for_virtual_machines(&session);
    files_are_shared(&session, folder.path());
    a_disk_is_a_block_device(&session, &image, &disk);
    the_clock_is_right(&session);
    a_linux_guest_boots(&session);
    sockets_cross(&session, folder.path());
    signals_and_statuses(&session);

    drop(disk);
    let other = File::options().write(true).open(&image).unwrap();
    assert!(other.try_lock().is_err(), "the nested host holds the lock");
    drop(session);
    other.try_lock().unwrap();
}

fn a_host_for_virtual_machines(session: &Session) {
    output(
        session,
        "test -w /dev/kvm -a -w /dev/net/tun -a -w /dev/vhost-net",
    );
    output(
        session,
        "test -c /dev/loop-control -a -w /dev/vhost-vsock -a -d /dev/shm",
    );
    output(
        session,
        "test -e /sys/kernel/debug/kvm -a -e /sys/kernel/tracing/events/kvm",
    );
    assert_eq!(output(session, "cat /sys/class/net/lo/flags"), "0x9\n");
    assert_eq!(
        output(session, "cat /proc/sys/kernel/io_uring_disabled"),
        "0\n"
    );
    assert_eq!(
        output(session, "cat /sys/module/kvm_amd/parameters/npt; nproc"),
        "Y\n1\n"
    );
    let hostname = rustix::system::uname()
        .nodename()
        .to_string_lossy()
        .into_owned();
    assert_eq!(output(session, "uname -n").trim_end(), hostname);
}

/// QEMU stands in for a VMM. The guest is the nested host's own kernel and busybox.
fn a_linux_guest_boots(session: &Session) {
    let cache = CacheDir::discover().unwrap();
    let image = LabImage::prepare(&cache, Freshness::Cached, &Silent).unwrap();
    let qemu = image.program("qemu-system-x86_64");
    let mut argv = vec![qemu.get_program().to_owned()];
    argv.extend(qemu.get_args().map(ToOwned::to_owned));
    argv.extend(
        "-nodefaults -no-user-config -display none -no-reboot -M q35 -accel kvm -cpu host -m 256 \
         -bios qboot.rom -serial stdio"
            .split(' ')
            .map(Into::into),
    );
    for firmware in image.firmware() {
        argv.extend(["-L".into(), firmware.into()]);
    }
    argv.extend(["-kernel".into(), image.kernel().into()]);
    argv.extend(["-initrd".into(), image.initramfs().into()]);
    let append = "console=ttyS0 quiet mitigations=off panic=-1 rdinit=/bin/busybox -- sh -c \
                  \"/bin/busybox echo up: $((6*7)); /bin/busybox poweroff -f\"";
    argv.extend(["-append".into(), append.into()]);
    let finished = session
        .command(LabCommand::new(argv).unwrap().captured())
        .unwrap();
    let console = String::from_utf8_lossy(&finished.stdout);
    let errors = String::from_utf8_lossy(&finished.stderr);
    assert!(console.contains("up: 42"), "{console}\n{errors}");
    assert!(finished.exit.is_success(), "{console}\n{errors}");
}

/// On a busy machine a clock that the nested kernel measures itself runs several times too fast.
fn the_clock_is_right(session: &Session) {
    let uptime = || -> f64 {
        let text = output(session, "cut -d' ' -f1 /proc/uptime");
        text.trim().parse().unwrap()
    };
    let (before, start) = (Instant::now(), uptime());
    let longest = |since: Instant| since.elapsed().as_secs_f64();
    let after = Instant::now();
    output(session, "sleep 1");
    let (shortest, end) = (longest(after), uptime());
    let inside = end - start;
    assert!(inside > 0.95 * shortest - 0.1, "{inside} {shortest}");
    assert!(
        inside < 1.05 * longest(before) + 0.1,
        "{inside} {}",
        longest(before)
    );
}

fn files_are_shared(session: &Session, folder: &Path) {
    let file = folder.join("result");
    let name = file.display();
    output(
        session,
        &format!("umask; echo from inside > {name}; sync {name}"),
    );
    assert_eq!(fs::read(&file).unwrap(), b"from inside\n");
    fs::write(&file, b"from outside\n").unwrap();
    assert_eq!(output(session, &format!("cat {name}")), "from outside\n");
    // All else is not changed for real.
    let elsewhere = format!("/var/tmp/ringside-lab-test-{}", std::process::id());
    output(
        session,
        &format!("echo x > {elsewhere}; test -s {elsewhere}"),
    );
    assert!(!Path::new(&elsewhere).exists());
}

fn a_disk_is_a_block_device(session: &Session, image: &Path, disk: &File) {
    let name = image.display();
    assert_eq!(
        output(
            session,
            &format!("test -b {name} && blockdev --getsize64 {name}")
        ),
        "8388608\n"
    );
    // Buffered, direct and discarding writes all reach the image before the command's end.
    let direct =
        format!("dd if=/dev/zero bs=4096 count=1 seek=2 oflag=direct conv=notrunc of={name}");
    output(
        session,
        &format!("printf inside | dd of={name} conv=notrunc && {direct}"),
    );
    let mut start = [0; 12288];
    disk.read_exact_at(&mut start, 0).unwrap();
    assert_eq!(&start[..7], b"insideZ");
    assert!(start[8191] == 0x5a && start[8192..].iter().all(|byte| *byte == 0));
    let blocks = || std::os::unix::fs::MetadataExt::blocks(&fs::metadata(image).unwrap());
    let before = blocks();
    output(
        session,
        &format!("fallocate --punch-hole --offset 1MiB --length 4MiB {name}"),
    );
    assert!(before - blocks() >= 8000, "{before} {}", blocks());
}

fn sockets_cross(session: &Session, folder: &Path) {
    let socket = folder.join("server.sock");
    let script = "import socket, sys\n\
        server = socket.socket(socket.AF_UNIX)\n\
        server.bind(sys.argv[1])\n\
        server.listen()\n\
        peer = server.accept()[0]\n\
        data = b''\n\
        while part := peer.recv(1 << 20): data += part\n\
        peer.sendall(data)\n\
        peer.close()\n\
        out = socket.socket(socket.AF_UNIX)\n\
        out.connect(sys.argv[1] + '_77')\n\
        out.sendall(b'hello outside')\n";
    let mut command = LabCommand::new(["python3", "-c", script])
        .unwrap()
        .captured();
    command.argv.push(socket.clone().into());
    command.sockets = vec![socket.clone()];
    command.outward = vec![socket.clone()];
    let listener = std::os::unix::net::UnixListener::bind(folder.join("server.sock_77")).unwrap();
    let running = session.spawn(command).unwrap();
    eventually(|| {
        UnixStream::connect(&socket).is_ok_and(|peer| {
            let data: Vec<u8> = (0..10_000_000_u32).map(|n| n.to_le_bytes()[1]).collect();
            let mut writer = peer.try_clone().unwrap();
            let sent = data.clone();
            let sender = std::thread::spawn(move || {
                writer.write_all(&sent).unwrap();
                writer.shutdown(std::net::Shutdown::Write).unwrap();
            });
            let mut answer = Vec::new();
            (&peer).read_to_end(&mut answer).unwrap();
            sender.join().unwrap();
            assert!(answer == data, "{} bytes", answer.len());
            true
        })
    });
    let mut text = String::new();
    listener
        .accept()
        .unwrap()
        .0
        .read_to_string(&mut text)
        .unwrap();
    assert_eq!(text, "hello outside");
    let finished = running.wait().unwrap();
    let errors = String::from_utf8_lossy(&finished.stderr);
    assert_eq!(finished.exit, Exit::Code(0), "{errors}");
    assert!(!socket.exists());
}

fn signals_and_statuses(session: &Session) {
    assert_eq!(
        session.command(shell("exit 77")).unwrap().exit,
        Exit::Code(77)
    );
    let killed = session
        .command(shell("echo why > /dev/kmsg; kill -SEGV $$"))
        .unwrap();
    assert_eq!(killed.exit, Exit::Signal(11));
    assert!(killed.log.contains("why"), "{}", killed.log);
    let (read, write) = rustix::pipe::pipe().unwrap();
    let mut command = shell("trap 'exit 42' INT; echo ready; while :; do sleep 0.1; done");
    command.stdout = Output::File(write);
    let running = session.spawn(command).unwrap();
    File::from(read).read_exact(&mut [0; 6]).unwrap();
    running.signal(2);
    assert_eq!(running.wait().unwrap().exit, Exit::Code(42));
}

#[test]
fn a_panic_inside_is_an_error_with_the_last_messages() {
    let session = start(spec()).unwrap();
    let panic = shell("echo c > /proc/sysrq-trigger; sleep 60");
    let error = session.command(panic).unwrap_err();
    let LabError::HostDied { how, log } = &error else {
        panic!("{error}");
    };
    assert!(how.contains("ended unexpectedly"), "{how}");
    assert!(log.contains("Kernel panic"), "{log}");
    assert!(session.log().contains("Kernel panic"), "{}", session.log());
}

#[test]
fn a_relay_that_does_not_start_is_an_error() {
    let mut spec = spec();
    spec.relay.executable = "/bin/false".into();
    let error = start(spec).unwrap_err();
    assert!(matches!(&error, LabError::HostDied { .. }), "{error}");
}

#[test]
fn a_command_on_a_terminal_looks_as_if_it_ran_here() {
    use rustix::pty::OpenptFlags;
    let flags = OpenptFlags::RDWR | OpenptFlags::NOCTTY | OpenptFlags::CLOEXEC;
    let master = rustix::pty::openpt(flags).unwrap();
    rustix::pty::grantpt(&master).unwrap();
    rustix::pty::unlockpt(&master).unwrap();
    let slave = rustix::pty::ioctl_tiocgptpeer(&master, flags).unwrap();
    let size = rustix::termios::Winsize {
        ws_row: 31,
        ws_col: 111,
        ws_xpixel: 0,
        ws_ypixel: 0,
    };
    rustix::termios::tcsetwinsize(&slave, size).unwrap();
    let before = rustix::termios::tcgetattr(&slave).unwrap().local_modes;

    let script = "trap 'echo interrupted; exit 33' INT; read line; echo \"got $line\"; \
                  tty; stty size; while :; do sleep 0.1; done";
    let mut command = run_command(&["setsid", "--ctty", "--wait"], script);
    command
        .stdin(slave.try_clone().unwrap())
        .stdout(slave.try_clone().unwrap())
        .stderr(slave.try_clone().unwrap());
    let mut child = command.spawn().unwrap();
    drop(command);
    let mut master = File::from(master);
    // What is typed ahead arrives, too.
    master.write_all(b"typed\n").unwrap();
    let mut seen = String::new();
    let mut read_until = |text: &str| {
        while !seen.contains(text) {
            let mut buffer = [0; 1024];
            let read = master.read(&mut buffer).unwrap();
            seen.push_str(&String::from_utf8_lossy(&buffer[..read]));
        }
        master.try_clone().unwrap()
    };
    read_until("got typed\r\n/dev/pts/");
    read_until("31 111\r\n").write_all(b"\x03").unwrap();
    read_until("^Cinterrupted\r\n");
    assert_eq!(child.wait().unwrap().code(), Some(33));
    let after = rustix::termios::tcgetattr(&slave).unwrap().local_modes;
    assert_eq!(before, after, "the terminal's mode is back");
}

#[test]
fn a_killed_process_leaves_no_nested_host() {
    let mut child = run_command(&[], "echo ready; sleep 600")
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .spawn()
        .unwrap();
    let mut output = child.stdout.take().unwrap();
    let mut seen = Vec::new();
    while !seen.ends_with(b"ready\n") {
        let mut byte = [0];
        output.read_exact(&mut byte).unwrap();
        seen.extend(byte);
    }
    assert!(host_lives(child.id()));
    child.kill().unwrap();
    child.wait().unwrap();
    eventually(|| !host_lives(child.id()));
}

#[test]
fn a_signal_while_the_host_starts_ends_it() {
    let mut child = run_command(&[], "echo never")
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .spawn()
        .unwrap();
    let pid = rustix::process::Pid::from_child(&child);
    eventually(|| host_lives(child.id()));
    rustix::process::kill_process(pid, rustix::process::Signal::TERM).unwrap();
    let mut output = String::new();
    child
        .stdout
        .take()
        .unwrap()
        .read_to_string(&mut output)
        .unwrap();
    assert_eq!(child.wait().unwrap().code(), Some(128 + 15));
    assert!(!output.contains("never"));
    assert!(!host_lives(child.id()));
}

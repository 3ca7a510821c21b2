//! The program with a guest on its terminal: raw mode and its undoing, the escape key, input from
//! pipes and files, signals. The guest echoes what it gets and switches off after a full stop.

use std::fs::{self, File};
use std::io::{Read, Write};
use std::os::fd::{FromRawFd, OwnedFd};
use std::path::PathBuf;
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use rustix::termios::{LocalModes, Termios, tcgetattr};
use tempfile::TempDir;

/// Long, because it costs only failing tests.
const TIMEOUT: Duration = Duration::from_secs(60);

/// Entered by the 64-bit boot protocol: enables COM1's received-data interrupt, then polls.
#[rustfmt::skip]
const ECHO: &[u8] = &[
    0x66, 0xba, 0xf9, 0x03,     // mov dx, 0x3f9
    0xb0, 0x01,                 // mov al, 1
    0xee,                       // out dx, al
    0x66, 0xba, 0xfd, 0x03,     // 1: mov dx, 0x3fd
    0xec,                       // in al, dx
    0xa8, 0x01,                 // test al, 1
    0x74, 0xf7,                 // jz 1b
    0x66, 0xba, 0xf8, 0x03,     // mov dx, 0x3f8
    0xec,                       // in al, dx
    0xee,                       // out dx, al
    0x3c, 0x2e,                 // cmp al, '.'
    0x75, 0xed,                 // jne 1b
    0x66, 0xba, 0x00, 0x06,     // mov dx, 0x600
    0xb0, 0x34,                 // mov al, 0x34
    0xee,                       // out dx, al
    0xf4,                       // hlt
];

/// Halts for good and never looks at COM1.
const DEAF: &[u8] = &[0xf4, 0xeb, 0xfd];

struct World {
    folder: TempDir,
}

impl World {
    /// `None`, with a word to the reader, where there is no KVM to test with.
    fn new() -> Option<World> {
        World::with(ECHO)
    }

    fn with(guest: &[u8]) -> Option<World> {
        if let Err(error) = vmm::kvm::Host::open() {
            eprintln!("skipped: {error}");
            return None;
        }
        let folder = tempfile::tempdir().unwrap();
        let mut image = vec![0; 1024 + 0x200];
        let mut put = |at: usize, bytes: &[u8]| image[at..at + bytes.len()].copy_from_slice(bytes);
        put(0x1f1, &[1]); // setup_sects
        put(0x1fe, &[0x55, 0xaa]);
        put(0x202, b"HdrS");
        put(0x206, &0x20fu16.to_le_bytes());
        put(0x211, &[1]); // LOADED_HIGH
        put(0x22c, &0x7fff_ffffu32.to_le_bytes());
        put(0x234, &[1]); // relocatable
        put(0x236, &[1]); // XLF_KERNEL_64
        put(0x238, &2047u32.to_le_bytes());
        put(0x258, &0x10_0000u64.to_le_bytes());
        put(0x260, &0x1000u32.to_le_bytes());
        image.extend_from_slice(guest);
        fs::write(folder.path().join("kernel"), image).unwrap();
        Some(World { folder })
    }

    fn start(&self, input: impl Into<Stdio>, output: impl Into<Stdio>) -> Guest {
        let child = Command::new(env!("CARGO_BIN_EXE_ringside"))
            .args(["run", "--accel", "kvm", "--memory", "16M", "--vsock", "off"])
            .arg("--kernel")
            .arg(self.folder.path().join("kernel"))
            .current_dir(self.folder.path())
            .env("XDG_RUNTIME_DIR", self.folder.path())
            .env_remove("RINGSIDE_LOG")
            .stdin(input)
            .stdout(output)
            .stderr(File::create(self.errors()).unwrap())
            .spawn()
            .unwrap();
        Guest(child)
    }

    fn errors(&self) -> PathBuf {
        self.folder.path().join("stderr")
    }

    fn told(&self) -> String {
        fs::read_to_string(self.errors()).unwrap()
    }
}

/// Killed if the test fails.
struct Guest(Child);

impl Guest {
    fn code(&mut self) -> Option<i32> {
        let start = Instant::now();
        while start.elapsed() < TIMEOUT {
            if let Some(status) = self.0.try_wait().unwrap() {
                return status.code();
            }
            std::thread::yield_now();
        }
        panic!("still running");
    }

    fn signal(&self, signal: rustix::process::Signal) {
        let pid = rustix::process::Pid::from_child(&self.0);
        rustix::process::kill_process(pid, signal).unwrap();
    }
}

impl Drop for Guest {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

/// Both ends of a new pseudo-terminal: the user's and the program's.
#[expect(unsafe_code, reason = "openpty has no safe wrapper here")]
fn terminal() -> (File, OwnedFd) {
    let (mut user, mut program) = (-1, -1);
    // SAFETY: the descriptors are written to our variables; the other arguments may be null.
    let result = unsafe {
        libc::openpty(
            &raw mut user,
            &raw mut program,
            std::ptr::null_mut(),
            std::ptr::null(),
            std::ptr::null(),
        )
    };
    assert_eq!(result, 0, "{}", std::io::Error::last_os_error());
    // SAFETY: both were just opened for us.
    unsafe { (File::from_raw_fd(user), OwnedFd::from_raw_fd(program)) }
}

fn is_raw(terminal: &OwnedFd) -> bool {
    !tcgetattr(terminal)
        .unwrap()
        .local_modes
        .intersects(LocalModes::ICANON | LocalModes::ECHO | LocalModes::ISIG)
}

fn wait_for_raw(terminal: &OwnedFd) {
    let start = Instant::now();
    while !is_raw(terminal) {
        assert!(start.elapsed() < TIMEOUT, "never in raw mode");
        std::thread::yield_now();
    }
}

fn same(a: &Termios, b: &Termios) -> bool {
    (
        a.input_modes,
        a.output_modes,
        a.local_modes,
        a.control_modes,
    ) == (
        b.input_modes,
        b.output_modes,
        b.local_modes,
        b.control_modes,
    )
}

fn read_until(from: &mut File, text: &[u8]) -> Vec<u8> {
    let mut all = Vec::new();
    let mut chunk = [0; 256];
    while !all.windows(text.len()).any(|part| part == text) {
        let len = from.read(&mut chunk).unwrap();
        all.extend_from_slice(&chunk[..len]);
    }
    all
}

/// Starts a guest on a terminal, does something to it, and expects the end with `code` and the
/// terminal as it was.
fn on_a_terminal(code: i32, act: impl FnOnce(&mut File, &Guest)) {
    let Some(world) = World::new() else { return };
    in_world(&world, code, act);
}

fn in_world(world: &World, code: i32, act: impl FnOnce(&mut File, &Guest)) {
    let (mut user, program) = terminal();
    let before = tcgetattr(&program).unwrap();
    let mut guest = world.start(program.try_clone().unwrap(), program.try_clone().unwrap());
    wait_for_raw(&program);
    act(&mut user, &guest);
    assert_eq!(guest.code(), Some(code), "{}", world.told());
    assert!(same(&before, &tcgetattr(&program).unwrap()), "not restored");
}

#[test]
fn typing_reaches_the_guest_and_its_end_restores_the_terminal() {
    on_a_terminal(0, |user, _| {
        // Control characters are the guest's; Ctrl-A is typed as Ctrl-A a.
        user.write_all(b"a\x03b\x04c\x01a.").unwrap();
        let echo = read_until(user, b".");
        assert_eq!(echo, b"a\x03b\x04c\x01.");
    });
}

#[test]
fn the_escape_key_ends_the_guest() {
    on_a_terminal(13, |user, _| user.write_all(b"abc\x01x").unwrap());
}

#[test]
fn the_escape_key_works_while_the_guest_takes_nothing() {
    let Some(world) = World::with(DEAF) else {
        return;
    };
    // More than is read at once.
    let typed = "x".repeat(300) + "\x01x";
    in_world(&world, 13, |user, _| {
        user.write_all(typed.as_bytes()).unwrap();
    });
}

#[test]
fn signals_end_the_guest_and_restore_the_terminal() {
    use rustix::process::Signal;
    for signal in [Signal::TERM, Signal::INT, Signal::HUP] {
        on_a_terminal(13, |_, guest| guest.signal(signal));
    }
}

#[test]
fn a_terminal_that_goes_away_is_no_reason_to_spin_or_crash() {
    let Some(world) = World::new() else { return };
    let (user, program) = terminal();
    let mut guest = world.start(program.try_clone().unwrap(), program.try_clone().unwrap());
    wait_for_raw(&program);
    drop(user);
    guest.signal(rustix::process::Signal::TERM);
    assert_eq!(guest.code(), Some(13), "{}", world.told());
}

#[test]
fn input_from_a_pipe_and_from_a_file_arrives_whole() {
    let Some(world) = World::new() else { return };
    // Many times what the serial line's FIFO holds.
    let text = format!("{}.", "0123456789".repeat(300));
    let mut guest = world.start(Stdio::piped(), Stdio::piped());
    guest
        .0
        .stdin
        .take()
        .unwrap()
        .write_all(text.as_bytes())
        .unwrap();
    let mut output = String::new();
    let mut from = guest.0.stdout.take().unwrap();
    from.read_to_string(&mut output).unwrap();
    assert_eq!((guest.code(), &output), (Some(0), &text));

    let path = world.folder.path().join("input");
    fs::write(&path, &text).unwrap();
    let mut guest = world.start(File::open(&path).unwrap(), Stdio::piped());
    output.clear();
    let mut from = guest.0.stdout.take().unwrap();
    from.read_to_string(&mut output).unwrap();
    assert_eq!((guest.code(), &output), (Some(0), &text));
}

#[test]
fn a_pipe_knows_no_escapes_and_its_end_is_no_end() {
    let Some(world) = World::new() else { return };
    let mut guest = world.start(Stdio::piped(), Stdio::piped());
    let mut input = guest.0.stdin.take().unwrap();
    input.write_all(b"\x01x").unwrap();
    drop(input);
    let mut echo = [0; 2];
    guest
        .0
        .stdout
        .as_mut()
        .unwrap()
        .read_exact(&mut echo)
        .unwrap();
    assert_eq!(&echo, b"\x01x");
    assert!(guest.0.try_wait().unwrap().is_none());
    guest.signal(rustix::process::Signal::INT);
    assert_eq!(guest.code(), Some(13), "{}", world.told());
}

#[test]
fn a_reader_that_stopped_does_not_hold_up_the_end() {
    let Some(world) = World::new() else { return };
    let (reader, writer) = std::io::pipe().unwrap();
    let path = world.folder.path().join("input");
    fs::write(&path, "x".repeat(100_000)).unwrap();
    let mut guest = world.start(File::open(&path).unwrap(), writer);
    // Full: the guest waits for us.
    let start = Instant::now();
    let mut waiting = 0;
    // A pipe counts as full when its last page is begun.
    while waiting <= 60_000 {
        assert!(start.elapsed() < TIMEOUT, "{waiting} bytes");
        waiting = rustix::io::ioctl_fionread(&reader).unwrap();
        std::thread::yield_now();
    }
    guest.signal(rustix::process::Signal::TERM);
    assert_eq!(guest.code(), Some(13), "{}", world.told());
    drop(reader);
}

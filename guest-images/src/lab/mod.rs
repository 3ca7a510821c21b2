//! The nested host: a throw-away machine under QEMU's TCG, whose kernel has a real KVM.
//!
//! Where the machine's own KVM cannot run Linux (or there is none), ringside runs itself again
//! inside this host. TCG emulates AMD's SVM with nested paging, so that Debian's kernel in it
//! offers a complete `/dev/kvm`. It is slow; it is for correctness.
//!
//! The nested host sees the machine's own files: its root is the machine's root, read-only, under
//! a memory file system that takes what is written; the folders named in [`LabSpec`] are writable
//! for real. So the executable that runs outside runs inside too. There it acts as the relay
//! ([`relay_main`]), the nested host's first process, and one virtio-serial port carries
//! everything between the two:
//!
//! ```text
//!  terminal, pipes ── outside process ══ virtio-serial ══ relay ── pty, pipes ── command
//!  control.sock <──── listens as long as ......................... the command listens
//!  vsock.sock_52 ──── connects to it  <== ........................ listens <── the command
//! ```
//!
//! * [`run`] runs one command so that it looks as if it ran outside: terminal, signals, exit
//!   status, files, sockets.
//! * [`Session`] starts a nested host once and runs many commands in it.
//!
//! What differs from a command that runs outside: it is root inside; the network is the nested
//! host's own; locks on files in writable folders do not reach outside (9p does not carry them),
//! so the outside process must hold those that others have to see; files in writable folders
//! cannot be punched or preallocated, for which disk images are attached as block devices
//! ([`LabDisk`]); what is made outside the writable folders after the start may stay unseen;
//! standard input is read ahead by up to 256 KiB; a signal to the outside process reaches the
//! command alone, not its children (keys on a terminal reach the terminal's foreground group).

mod image;
mod log;
mod mux;
mod outside;
mod pulse;
mod qemu;
mod reactor;
mod relay;
mod session;
mod sockets;
mod terminal;
mod wire;

#[cfg(test)]
mod socketpair_tests;

use std::ffi::{OsStr, OsString};
use std::fmt;
use std::fs::File;
use std::io;
use std::os::fd::OwnedFd;
use std::os::unix::process::ExitStatusExt;
use std::path::PathBuf;
use std::process::ExitStatus;

use serde::{Deserialize, Serialize};

pub use image::LabImage;
pub use relay::relay_main;
pub use session::{Finished, Running, Session, run};

/// The hidden subcommand with which an executable is started as the relay, unless
/// [`RelayProgram::arguments`] says otherwise.
pub const RELAY_COMMAND: &str = "lab-relay";

/// Environment variable that is set for every command inside a nested host.
pub const INSIDE_VARIABLE: &str = "RINGSIDE_NESTED_HOST";

/// Whether this process runs inside a nested host.
pub fn is_inside() -> bool {
    std::env::var_os(INSIDE_VARIABLE).is_some()
}

/// A nested host.
#[derive(Debug)]
pub struct LabSpec {
    /// The executable that acts as the relay.
    pub relay: RelayProgram,
    /// Folders that commands may write to, and their working folders among them. Each must exist.
    pub writable_dirs: Vec<PathBuf>,
    /// Disk images.
    pub disks: Vec<LabDisk>,
    /// Processors, 1 to 255.
    ///
    /// More than one makes nested hosts fail: QEMU drops what it translated from code that one
    /// processor overwrites just before the store, so another processor can translate the old bytes
    /// again and run them ever after. Linux rewrites its code while it runs (static keys; KVM flips
    /// some whenever a machine starts, a guest with several processors does it as well). A breakpoint
    /// that is left over panics the kernel, a left-over jump makes a guest stand still.
    pub cpus: u8,
    /// Memory in MiB. The nested host itself needs about 400.
    pub memory_mib: u32,
    /// More control, for measurements.
    pub options: LabOptions,
}

impl LabSpec {
    /// A nested host with one processor and 2 GiB of memory that runs this process's executable
    /// as the relay.
    ///
    /// # Errors
    /// The executable cannot be found (any more).
    pub fn new() -> io::Result<Self> {
        Ok(Self {
            relay: RelayProgram {
                executable: std::env::current_exe()?,
                arguments: vec![RELAY_COMMAND.into()],
            },
            writable_dirs: Vec::new(),
            disks: Vec::new(),
            cpus: 1,
            memory_mib: 2048,
            options: LabOptions::default(),
        })
    }
}

/// The executable that calls [`relay_main`] when it gets these arguments.
#[derive(Debug, Clone)]
pub struct RelayProgram {
    /// An absolute path outside `/dev`, `/proc` and `/sys`.
    pub executable: PathBuf,
    /// Its arguments.
    pub arguments: Vec<OsString>,
}

/// A disk image that a command uses. Inside, `path` is a block device with the image's content:
/// direct I/O, flush and discard act on the image.
#[derive(Debug)]
pub struct LabDisk {
    /// The path by which the command opens it.
    pub path: PathBuf,
    /// The image, opened for reading, and for writing unless `readonly`. Locks that belong to the
    /// open file description (`flock`, OFD locks) stay held as long as the nested host lives.
    pub file: File,
    /// Whether the device is read-only.
    pub readonly: bool,
}

/// More control over the nested host.
#[derive(Debug, Clone, Default)]
pub struct LabOptions {
    /// Added to QEMU's command line, for example `-plugin`.
    pub qemu_args: Vec<OsString>,
    /// Added to the nested kernel's command line.
    pub kernel_args: Vec<String>,
}

/// A command in a nested host.
#[derive(Debug)]
pub struct LabCommand {
    /// Program and arguments. A program without a slash is looked up in the command's `PATH`.
    pub argv: Vec<OsString>,
    /// The whole environment. [`INSIDE_VARIABLE`] is added.
    pub env: Vec<(OsString, OsString)>,
    /// Working folder, absolute.
    pub cwd: PathBuf,
    /// AF_UNIX stream sockets on which the command will listen. Outside, each exists as long as
    /// the command listens on it. Their folders must exist outside. Absolute paths, written as
    /// the command binds them.
    pub sockets: Vec<PathBuf>,
    /// Base paths of guest-initiated vsock connections: a socket `BASE_NUMBER` that exists
    /// outside, now or later, can be connected to inside. Absolute paths.
    pub outward: Vec<PathBuf>,
    /// Standard input.
    pub stdin: Input,
    /// Standard output.
    pub stdout: Output,
    /// Standard error.
    pub stderr: Output,
}

impl LabCommand {
    /// A command with this process's environment, working folder and standard files.
    ///
    /// # Errors
    /// The working folder does not exist any more.
    pub fn new<S: AsRef<OsStr>>(argv: impl IntoIterator<Item = S>) -> io::Result<Self> {
        Ok(Self {
            argv: argv
                .into_iter()
                .map(|word| word.as_ref().to_owned())
                .collect(),
            env: std::env::vars_os().collect(),
            cwd: std::env::current_dir()?,
            sockets: Vec::new(),
            outward: Vec::new(),
            stdin: Input::Inherit,
            stdout: Output::Inherit,
            stderr: Output::Inherit,
        })
    }

    /// No input, and output kept for [`Finished`].
    #[must_use]
    pub fn captured(mut self) -> Self {
        self.stdin = Input::Null;
        self.stdout = Output::Capture;
        self.stderr = Output::Capture;
        self
    }
}

/// A command's standard input. A terminal is put into raw mode and becomes a terminal inside.
#[derive(Debug)]
pub enum Input {
    /// `/dev/null`.
    Null,
    /// That of this process.
    Inherit,
    /// Something readable.
    File(OwnedFd),
}

/// A command's standard output or error. A terminal becomes a terminal inside.
#[derive(Debug)]
pub enum Output {
    /// `/dev/null`.
    Null,
    /// That of this process.
    Inherit,
    /// Kept in memory for [`Finished`].
    Capture,
    /// Something writable.
    File(OwnedFd),
}

/// How a command ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub enum Exit {
    /// By itself, with this status.
    Code(u8),
    /// By this signal.
    Signal(i32),
}

impl Exit {
    /// Whether the status is 0.
    pub fn is_success(self) -> bool {
        self == Self::Code(0)
    }

    /// The status that a shell shows: that of the command, or 128 and the signal's number.
    pub fn code(self) -> u8 {
        match self {
            Self::Code(code) => code,
            Self::Signal(signal) => u8::try_from(signal).unwrap_or(0x7f).saturating_add(128),
        }
    }
}

impl fmt::Display for Exit {
    /// As the standard library shows a process's end, for example `signal: 11 (SIGSEGV)`.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        // wait(2): the status is in the second byte, a signal's number in the first.
        let raw = match self {
            Self::Code(code) => i32::from(*code) << 8,
            Self::Signal(signal) => signal & 0x7f,
        };
        ExitStatus::from_raw(raw).fmt(f)
    }
}

/// Why a nested host, or a command in it, gave no exit status.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum LabError {
    /// Its programs and kernel cannot be had.
    #[error(transparent)]
    Image(#[from] crate::Error),
    /// QEMU could not be started.
    #[error("nested host: cannot {what}: {source}")]
    Start {
        /// What was tried.
        what: &'static str,
        /// The operating system's error.
        source: io::Error,
    },
    /// The nested host ended, or never came up. The log is the end of what its kernel and QEMU
    /// said, one line each, and may be empty.
    #[error("the nested host {how}{}", last_messages(.log))]
    HostDied {
        /// How it ended.
        how: String,
        /// Its last words.
        log: String,
    },
    /// The nested host could not be made to look like the machine.
    #[error("nested host: {0}")]
    Setup(String),
    /// A command could not be started in it.
    #[error("cannot run {program} in the nested host: {problem}")]
    Spawn {
        /// The program.
        program: String,
        /// Why.
        problem: String,
    },
    /// Somebody else listens on a socket of the command.
    #[error("the socket {} is in use by another process", .0.display())]
    SocketInUse(PathBuf),
    /// A folder or file that the nested host needs is missing or of the wrong kind.
    #[error("cannot use {} in the nested host: {source}", path.display())]
    Path {
        /// Its path.
        path: PathBuf,
        /// Why.
        source: io::Error,
    },
    /// More folders and disks than the nested host has room for.
    #[error("{0} writable folders and disks are too many for the nested host, it has room for {max}", max = qemu::MAX_DEVICES)]
    TooManyDevices(usize),
    /// A signal came before the command was running.
    #[error("interrupted by signal {0} while the nested host started")]
    Interrupted(i32),
}

impl LabError {
    /// The status with which a program should end because of this: 128 and the signal's number if
    /// it was interrupted, 1 otherwise.
    pub fn code(&self) -> u8 {
        match self {
            Self::Interrupted(signal) => Exit::Signal(*signal).code(),
            _ => 1,
        }
    }
}

/// What follows a sentence about a nested host: its last lines, indented, if there are any.
pub fn last_messages(log: &str) -> String {
    if log.is_empty() {
        String::new()
    } else {
        format!("; its last messages:\n  {}", log.replace('\n', "\n  "))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn shells_exit_codes() {
        assert_eq!(Exit::Code(3).code(), 3);
        assert_eq!(Exit::Signal(2).code(), 130);
        assert_eq!(Exit::Code(3).to_string(), "exit status: 3");
        assert_eq!(Exit::Signal(11).to_string(), "signal: 11 (SIGSEGV)");
        assert!(Exit::Code(0).is_success());
        assert!(!Exit::Signal(0).is_success());
        assert_eq!(LabError::Interrupted(15).code(), 143);
    }

    #[test]
    fn the_last_messages_are_shown() {
        let error = LabError::HostDied {
            how: "ended (QEMU: exit status: 1)".into(),
            log: "a\nb".into(),
        };
        assert_eq!(
            error.to_string(),
            "the nested host ended (QEMU: exit status: 1); its last messages:\n  a\n  b"
        );
    }
}

//! A command inside the nested host and its standard files.

use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::process::CommandExt;
use std::process::{Command, Stdio};

use rustix::fs::{Mode, OFlags};
use rustix::io::Errno;
use rustix::pipe::PipeFlags;
use rustix::process::{Pid, PidfdFlags, Signal};
use rustix::pty::OpenptFlags;
use rustix::termios::Winsize;

use crate::lab::mux::Mux;
use crate::lab::wire::{Spawn, SpawnStdio, StreamId, WindowSize, WireError};

/// A command that was started.
#[derive(Debug)]
pub(super) struct Process {
    pid: Pid,
    /// Readable once the command has ended.
    pidfd: OwnedFd,
    input: Option<StreamId>,
    outputs: Vec<StreamId>,
    terminal: Option<(StreamId, OwnedFd)>,
}

/// Ends of pipes and of a terminal, for the streams.
#[derive(Default)]
struct Ends {
    opened: Vec<(StreamId, Option<OwnedFd>, Option<OwnedFd>)>,
    input: Option<StreamId>,
    outputs: Vec<StreamId>,
    terminal: Option<(StreamId, OwnedFd)>,
}

impl Process {
    /// Starts a command in a session of its own.
    pub(super) fn spawn(spawn: &Spawn, mux: &mut Mux) -> io::Result<Self> {
        let (program, arguments) = spawn
            .argv
            .split_first()
            .ok_or_else(|| io::Error::new(io::ErrorKind::InvalidInput, "no program"))?;
        let mut command = Command::new(program);
        command
            .args(arguments)
            .env_clear()
            .envs(spawn.env.iter().map(|(name, value)| (name, value)))
            .current_dir(&spawn.cwd);

        let mut ends = Ends::default();
        let terminal = match spawn.terminal {
            Some(terminal) => Some(ends.open_terminal(terminal.stream, terminal.size)?),
            None => None,
        };
        let [stdin, stdout, stderr] = spawn.stdio;
        command
            .stdin(ends.stdio(stdin, true, terminal.as_ref())?)
            .stdout(ends.stdio(stdout, false, terminal.as_ref())?)
            .stderr(ends.stdio(stderr, false, terminal.as_ref())?);
        prepare_child(&mut command, spawn.umask, terminal);

        let child = command.spawn()?;
        let pid = Pid::from_child(&child);
        let pidfd = rustix::process::pidfd_open(pid, PidfdFlags::empty())?;
        for (stream, source, sink) in ends.opened {
            mux.accept(stream, source, sink).map_err(io::Error::other)?;
        }
        Ok(Self {
            pid,
            pidfd,
            input: ends.input,
            outputs: ends.outputs,
            terminal: ends.terminal,
        })
    }

    pub(super) fn pid(&self) -> Pid {
        self.pid
    }

    /// Streams that carry what the command writes.
    pub(super) fn outputs(&self) -> impl Iterator<Item = StreamId> {
        self.outputs.iter().copied()
    }

    /// Sends a signal, as kill(1) outside would. The command must not have been reaped yet.
    pub(super) fn signal(&self, signal: Signal) {
        // The only failure is that it has ended already.
        let _ = rustix::process::pidfd_send_signal(&self.pidfd, signal);
    }

    /// Kills the command and what it started in its process group.
    pub(super) fn kill(&self) {
        self.signal(Signal::KILL);
        let _ = rustix::process::kill_process_group(self.pid, Signal::KILL);
    }

    /// Sets the size of the command's terminal, if it has one.
    pub(super) fn resize(&self, size: WindowSize) {
        if let Some((_, master)) = &self.terminal {
            // A terminal whose other side is closed needs no size.
            let _ = rustix::termios::tcsetwinsize(master, winsize(size));
        }
    }

    /// Ends the streams that only an ended command leaves open.
    pub(super) fn close(self, mux: &mut Mux) -> Result<(), WireError> {
        if let Some(input) = self.input {
            mux.close(input)?;
        }
        if let Some((stream, _)) = self.terminal {
            mux.close(stream)?;
        }
        Ok(())
    }
}

impl AsFd for Process {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.pidfd.as_fd()
    }
}

impl Ends {
    /// Opens a terminal and returns the command's side of it.
    fn open_terminal(&mut self, stream: StreamId, size: WindowSize) -> io::Result<OwnedFd> {
        let master =
            rustix::pty::openpt(OpenptFlags::RDWR | OpenptFlags::NOCTTY | OpenptFlags::CLOEXEC)?;
        rustix::pty::grantpt(&master)?;
        rustix::pty::unlockpt(&master)?;
        rustix::termios::tcsetwinsize(&master, winsize(size))?;
        set_nonblocking(&master)?;
        let slave = rustix::pty::ioctl_tiocgptpeer(
            &master,
            OpenptFlags::RDWR | OpenptFlags::NOCTTY | OpenptFlags::CLOEXEC,
        )?;
        let source = master.try_clone()?;
        let sink = master.try_clone()?;
        self.opened.push((stream, Some(source), Some(sink)));
        self.outputs.push(stream);
        self.terminal = Some((stream, master));
        Ok(slave)
    }

    /// Makes one of the command's standard files.
    fn stdio(
        &mut self,
        stdio: SpawnStdio,
        is_input: bool,
        terminal: Option<&OwnedFd>,
    ) -> io::Result<Stdio> {
        match (stdio, terminal) {
            (SpawnStdio::Null, _) => Ok(Stdio::null()),
            (SpawnStdio::Terminal, Some(terminal)) => Ok(terminal.try_clone()?.into()),
            (SpawnStdio::Terminal, None) => {
                Err(io::Error::new(io::ErrorKind::InvalidInput, "no terminal"))
            }
            (SpawnStdio::Pipe(stream), _) => {
                let (read, write) = rustix::pipe::pipe_with(PipeFlags::CLOEXEC)?;
                if is_input {
                    set_nonblocking(&write)?;
                    self.opened.push((stream, None, Some(write)));
                    self.input = Some(stream);
                    Ok(read.into())
                } else {
                    set_nonblocking(&read)?;
                    self.opened.push((stream, Some(read), None));
                    self.outputs.push(stream);
                    Ok(write.into())
                }
            }
        }
    }
}

/// The signals above are real-time signals, which no shell ignores (signal(7)).
const LAST_STANDARD_SIGNAL: libc::c_int = 31;

/// Gives the child its session, its terminal and its mask, and undoes what this process may have been
/// started with: signals that are ignored here (as under nohup, or in a shell's background) would be
/// ignored there too, and Ctrl-C would not reach the command.
#[expect(unsafe_code, reason = "Command::pre_exec")]
fn prepare_child(command: &mut Command, umask: u32, terminal: Option<OwnedFd>) {
    let prepare = move || {
        for signal in 1..=LAST_STANDARD_SIGNAL {
            // SAFETY: SIG_DFL is no handler, so nothing of ours will run. The call fails for SIGKILL
            // and SIGSTOP, which cannot be ignored.
            unsafe { libc::signal(signal, libc::SIG_DFL) };
        }
        rustix::process::setsid()?;
        rustix::process::umask(Mode::from_raw_mode(umask & 0o777));
        if let Some(terminal) = &terminal {
            rustix::process::ioctl_tiocsctty(terminal)?;
        }
        Ok(())
    };
    // SAFETY: between fork and exec the closure makes system calls and touches only the
    // integer and the descriptor that it owns: it allocates nothing and takes no lock.
    unsafe {
        command.pre_exec(prepare);
    }
}

fn set_nonblocking(fd: &OwnedFd) -> Result<(), Errno> {
    let flags = rustix::fs::fcntl_getfl(fd)?;
    rustix::fs::fcntl_setfl(fd, flags | OFlags::NONBLOCK)
}

fn winsize(size: WindowSize) -> Winsize {
    Winsize {
        ws_row: size.rows,
        ws_col: size.columns,
        ws_xpixel: 0,
        ws_ypixel: 0,
    }
}

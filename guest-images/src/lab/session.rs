//! A nested host and the commands in it, as their owner sees them.

use std::ffi::OsString;
use std::fs::{self, File};
use std::io::{self, Read, Write};
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::ffi::OsStringExt;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU32, Ordering};
use std::sync::mpsc::{self, Receiver, Sender};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::thread::{self, JoinHandle};

use rustix::event::EventfdFlags;
use rustix::fs::OFlags;
use rustix::pipe::PipeFlags;

use super::image::LabImage;
use super::log::SharedLog;
use super::outside::{Host, NewCommand, Outside, Request};
use super::qemu::{DiskDevice, Killer, MAX_DEVICES, Qemu, ShareDevice};
use super::sockets;
use super::terminal::{RawMode, Signals, window_size};
use super::wire::{CommandId, DiskNode, Setup, Share, Spawn, SpawnStdio, SpawnTerminal};
use super::{Exit, INSIDE_VARIABLE, Input, LabCommand, LabError, LabSpec, Output};
use crate::apt::Freshness;
use crate::{CacheDir, Progress};

/// Runs one command in a nested host of its own, and passes this process's signals on to it.
///
/// # Errors
/// There is no exit status: see [`LabError`].
pub fn run(
    spec: LabSpec,
    command: LabCommand,
    cache: &CacheDir,
    progress: &dyn Progress,
) -> Result<Finished, LabError> {
    let image = LabImage::prepare(cache, Freshness::Cached, progress)?;
    let signals = Signals::catch().map_err(|source| LabError::Start {
        what: "catch signals",
        source,
    })?;
    progress.step("starting the nested host");
    let (session, ready) = Session::launch(&image, spec)?;
    let target = Mutex::new(Target::Starting);
    let result = thread::scope(|scope| {
        scope.spawn(|| forward_signals(&signals, &session, &target));
        let result = session.run_in_foreground(&ready, command, &target, progress);
        signals.stop();
        result
    });
    progress.done();
    let interrupted = match *lock(&target) {
        Target::Interrupted(signal) => Some(signal),
        _ => None,
    };
    match interrupted {
        Some(signal) => Err(LabError::Interrupted(signal)),
        None => result,
    }
}

/// Where signals go.
enum Target {
    /// The nested host is not up yet: they end it.
    Starting,
    /// One of them did.
    Interrupted(i32),
    /// They go to the command, and changes of this terminal's size, too.
    Running(CommandId, Option<OwnedFd>),
}

fn forward_signals(signals: &Signals, session: &Session, target: &Mutex<Target>) {
    while let Some(signal) = signals.next() {
        let mut target = lock(target);
        match &*target {
            Target::Starting if signal == libc::SIGWINCH => {}
            Target::Starting => {
                *target = Target::Interrupted(signal);
                session.control.killer.kill();
            }
            Target::Interrupted(_) => {}
            Target::Running(command, terminal) => {
                let request = match terminal {
                    Some(terminal) if signal == libc::SIGWINCH => {
                        Request::Resize(*command, window_size(terminal))
                    }
                    _ => Request::Signal(*command, signal),
                };
                session.control.send(request);
            }
        }
    }
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

/// A nested host in which commands run, one after another or at once. It ends, with all commands
/// in it, when this is dropped.
#[derive(Debug)]
pub struct Session {
    control: Arc<Control>,
    server: Option<JoinHandle<()>>,
}

/// How to reach the session's thread.
#[derive(Debug)]
struct Control {
    requests: Mutex<Sender<Request>>,
    wake: OwnedFd,
    killer: Killer,
    log: SharedLog,
    next_command: AtomicU32,
}

impl Control {
    fn send(&self, request: Request) {
        // If the thread has ended, whoever waits for an answer sees that its sender is gone.
        let _ = lock(&self.requests).send(request);
        let _ = rustix::io::write(&self.wake, &1_u64.to_ne_bytes());
    }
}

type Ready = Receiver<Result<(), LabError>>;

impl Session {
    /// Starts a nested host and waits until it is up.
    ///
    /// # Errors
    /// It does not come up.
    pub fn start(
        spec: LabSpec,
        cache: &CacheDir,
        progress: &dyn Progress,
    ) -> Result<Self, LabError> {
        let image = LabImage::prepare(cache, Freshness::Cached, progress)?;
        progress.step("starting the nested host");
        let (session, ready) = Self::launch(&image, spec)?;
        let result = wait_ready(&ready);
        progress.done();
        result.map(|()| session)
    }

    fn launch(image: &LabImage, spec: LabSpec) -> Result<(Self, Ready), LabError> {
        let mut spec = spec;
        let dirs = outermost(&spec.writable_dirs)?;
        let disks = std::mem::take(&mut spec.disks);
        let devices = dirs.len() + disks.len();
        if devices > MAX_DEVICES {
            return Err(LabError::TooManyDevices(devices));
        }
        let mut setup = Setup {
            hostname: OsString::from_vec(rustix::system::uname().nodename().to_bytes().to_vec()),
            ..Setup::default()
        };
        let mut shares = Vec::new();
        for (number, path) in dirs.into_iter().enumerate() {
            let tag = format!("rw{number}");
            setup.shares.push(Share {
                tag: tag.clone(),
                path: path.clone().into(),
            });
            shares.push(ShareDevice { tag, path });
        }
        let mut images = Vec::new();
        for (number, disk) in disks.into_iter().enumerate() {
            let serial = format!("disk{number}");
            let path = canonical(&disk.path)?;
            setup.disks.push(DiskNode {
                serial: serial.clone(),
                path: path.into(),
            });
            images.push(DiskDevice {
                serial,
                file: disk.file.into(),
                readonly: disk.readonly,
            });
        }
        spec.relay.executable = canonical(&spec.relay.executable)?;
        let (qemu, ends) = Qemu::start(image, &spec, &shares, images)?;
        let killer = qemu.killer().map_err(|source| LabError::Start {
            what: "keep hold of QEMU",
            source,
        })?;
        let host = |killer| Host {
            killer,
            qemu: Some(qemu),
            logs: vec![ends.console, ends.messages],
        };
        Self::over(ends.wire, host, killer, setup)
    }

    /// A session with whoever is at the other end of the wire.
    pub(super) fn over(
        wire: OwnedFd,
        host: impl FnOnce(Killer) -> Host,
        killer: Killer,
        setup: Setup,
    ) -> Result<(Self, Ready), LabError> {
        let start = |source| LabError::Start {
            what: "make its thread",
            source,
        };
        let (requests, receiver) = mpsc::channel();
        let flags = EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK;
        let wake = rustix::event::eventfd(0, flags).map_err(|error| start(error.into()))?;
        let thread_wake = wake.try_clone().map_err(start)?;
        let host = host(killer.try_clone().map_err(start)?);
        let (ready, ready_receiver) = mpsc::channel();
        let log = SharedLog::default();
        let outside = Outside::new(wire, receiver, thread_wake, host, log.clone(), setup, ready);
        let server = thread::Builder::new()
            .name("lab-outside".into())
            .spawn(move || outside.run())
            .map_err(start)?;
        let control = Control {
            requests: Mutex::new(requests),
            wake,
            killer,
            log,
            next_command: AtomicU32::new(1),
        };
        let session = Self {
            control: Arc::new(control),
            server: Some(server),
        };
        Ok((session, ready_receiver))
    }

    /// The last lines that the nested host's kernel and QEMU said; may be empty. After a panic of
    /// that kernel, these are the lines from the oops that led to it on.
    pub fn log(&self) -> String {
        self.control.log.last_lines()
    }

    /// Starts a command.
    ///
    /// # Errors
    /// A socket of it is in use, or its standard files cannot be used. That it cannot be started
    /// is said by [`Running::wait`].
    pub fn spawn(&self, command: LabCommand) -> Result<Running, LabError> {
        for path in &command.sockets {
            let folder = sockets::parent_of(path);
            fs::metadata(folder).map_err(|source| LabError::Path {
                path: folder.to_owned(),
                source,
            })?;
            if sockets::is_live(path) {
                return Err(LabError::SocketInUse(path.clone()));
            }
        }
        let stdio = |source| LabError::Start {
            what: "connect the command's standard files",
            source,
        };
        let id = self.control.next_command.fetch_add(1, Ordering::Relaxed);
        let mut env = command.env;
        env.retain(|(name, _)| name != INSIDE_VARIABLE);
        env.push((INSIDE_VARIABLE.into(), "1".into()));
        let mut files = StandardFiles::default();
        let kinds = files
            .connect(command.stdin, command.stdout, command.stderr)
            .map_err(stdio)?;
        let (reply, result) = mpsc::channel();
        let size = files.terminal_for_size().map(window_size);
        let spawn = Spawn {
            command: id,
            argv: command.argv,
            env,
            cwd: command.cwd.into(),
            umask: umask(),
            stdio: kinds,
            terminal: size.map(|size| SpawnTerminal { stream: 0, size }),
            sockets: command.sockets.iter().map(Into::into).collect(),
            outward: Vec::new(),
        };
        let raw = match &files.terminal_source {
            Some(terminal) => {
                RawMode::enter(terminal.try_clone().map_err(stdio)?).map_err(stdio)?
            }
            None => None,
        };
        let size_source = match files.terminal_for_size() {
            Some(terminal) => Some(terminal.try_clone_to_owned().map_err(stdio)?),
            None => None,
        };
        self.control.send(Request::Spawn(Box::new(NewCommand {
            id,
            spawn,
            stdin: files.stdin,
            stdout: files.stdout,
            stderr: files.stderr,
            terminal: (files.terminal_source, files.terminal_sink),
            sockets: command.sockets,
            outward: command.outward,
            reply,
        })));
        Ok(Running {
            control: Arc::clone(&self.control),
            id,
            result,
            raw,
            size_source,
            writers: files.writers,
            captured: files.captured,
        })
    }

    /// Runs a command to its end.
    ///
    /// # Errors
    /// There is no exit status: see [`LabError`].
    pub fn command(&self, command: LabCommand) -> Result<Finished, LabError> {
        self.spawn(command)?.wait()
    }

    fn run_in_foreground(
        &self,
        ready: &Ready,
        command: LabCommand,
        target: &Mutex<Target>,
        progress: &dyn Progress,
    ) -> Result<Finished, LabError> {
        wait_ready(ready)?;
        progress.done();
        let running = {
            // A signal comes either before this, and prevents it, or reaches the command.
            let mut target = lock(target);
            if let Target::Interrupted(signal) = *target {
                return Err(LabError::Interrupted(signal));
            }
            let running = self.spawn(command)?;
            let size_source = running
                .size_source
                .as_ref()
                .and_then(|terminal| terminal.try_clone().ok());
            *target = Target::Running(running.id, size_source);
            running
        };
        running.wait()
    }
}

impl Drop for Session {
    fn drop(&mut self) {
        self.control.send(Request::Quit);
        if let Some(server) = self.server.take() {
            // A panic there has been reported, and QEMU is killed with this process at the latest.
            let _ = server.join();
        }
    }
}

fn wait_ready(ready: &Ready) -> Result<(), LabError> {
    ready.recv().unwrap_or_else(|_| Err(thread_is_gone()))
}

fn thread_is_gone() -> LabError {
    LabError::HostDied {
        how: "has ended".into(),
        log: String::new(),
    }
}

/// A command that has been started in a [`Session`].
#[derive(Debug)]
pub struct Running {
    control: Arc<Control>,
    id: CommandId,
    result: Receiver<Result<Exit, LabError>>,
    raw: Option<RawMode>,
    size_source: Option<OwnedFd>,
    writers: Vec<JoinHandle<()>>,
    captured: [Option<JoinHandle<Vec<u8>>>; 2],
}

/// A command that has ended.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Finished {
    /// How it ended.
    pub exit: Exit,
    /// What it wrote to a captured standard output.
    pub stdout: Vec<u8>,
    /// What it wrote to a captured standard error.
    pub stderr: Vec<u8>,
    /// If a signal ended it, the last lines that the nested host said: its kernel names faults and
    /// processes that it kills for want of memory.
    pub log: String,
}

impl Running {
    /// Sends a signal to the command.
    pub fn signal(&self, signal: i32) {
        self.control.send(Request::Signal(self.id, signal));
    }

    /// Tells the command's terminal, if it has one, the size of the terminal outside.
    pub fn resize(&self) {
        if let Some(terminal) = &self.size_source {
            let size = window_size(terminal);
            self.control.send(Request::Resize(self.id, size));
        }
    }

    /// Waits for the command's end. All that it wrote has then been written outside.
    ///
    /// # Errors
    /// There is no exit status: see [`LabError`].
    pub fn wait(self) -> Result<Finished, LabError> {
        let result = self.result.recv().unwrap_or_else(|_| Err(thread_is_gone()));
        for writer in self.writers {
            // It has no result; a panic in it has been reported.
            let _ = writer.join();
        }
        let captured = |thread: Option<JoinHandle<Vec<u8>>>| {
            thread
                .and_then(|thread| thread.join().ok())
                .unwrap_or_default()
        };
        let [stdout, stderr] = self.captured;
        let (stdout, stderr) = (captured(stdout), captured(stderr));
        drop(self.raw);
        let exit = result?;
        let log = match exit {
            Exit::Code(_) => String::new(),
            Exit::Signal(_) => self.control.log.last_lines(),
        };
        Ok(Finished {
            exit,
            stdout,
            stderr,
            log,
        })
    }
}

/// A command's standard files: what the session's thread gets, and who does the rest.
#[derive(Default)]
struct StandardFiles {
    stdin: Option<OwnedFd>,
    stdout: Option<OwnedFd>,
    stderr: Option<OwnedFd>,
    terminal_source: Option<OwnedFd>,
    terminal_sink: Option<OwnedFd>,
    /// Whose size the terminal inside has.
    size_from: Option<OwnedFd>,
    writers: Vec<JoinHandle<()>>,
    captured: [Option<JoinHandle<Vec<u8>>>; 2],
}

impl StandardFiles {
    fn connect(
        &mut self,
        stdin: Input,
        stdout: Output,
        stderr: Output,
    ) -> io::Result<[SpawnStdio; 3]> {
        let stdin = match stdin {
            Input::Null => None,
            Input::Inherit => Some(rustix::stdio::stdin().try_clone_to_owned()?),
            Input::File(file) => Some(file),
        };
        let stdin = match stdin {
            None => SpawnStdio::Null,
            Some(file) if rustix::termios::isatty(&file) => {
                self.size_from = Some(file.try_clone()?);
                self.terminal_source = Some(file);
                SpawnStdio::Terminal
            }
            Some(file) => {
                self.stdin = Some(file);
                SpawnStdio::Pipe(0)
            }
        };
        let stdout = self.output(0, stdout, rustix::stdio::stdout())?;
        let stderr = self.output(1, stderr, rustix::stdio::stderr())?;
        if self.terminal_sink.is_none()
            && let Some(terminal) = &self.terminal_source
        {
            // Only the input is a terminal: it still echoes.
            let (sink, writer) = writer_to(terminal.try_clone()?)?;
            self.terminal_sink = Some(sink);
            self.writers.push(writer);
        }
        Ok([stdin, stdout, stderr])
    }

    fn output(
        &mut self,
        index: usize,
        output: Output,
        inherited: impl AsFd,
    ) -> io::Result<SpawnStdio> {
        let file = match output {
            Output::Null => return Ok(SpawnStdio::Null),
            Output::Inherit => inherited.as_fd().try_clone_to_owned()?,
            Output::File(file) => file,
            Output::Capture => {
                let (read, write) = sink_pipe()?;
                let reader =
                    thread::Builder::new()
                        .name("lab-capture".into())
                        .spawn(move || {
                            let mut bytes = Vec::new();
                            // Reading a pipe does not fail.
                            let _ = File::from(read).read_to_end(&mut bytes);
                            bytes
                        })?;
                if let Some(slot) = self.captured.get_mut(index) {
                    *slot = Some(reader);
                }
                self.set_output(index, write);
                return Ok(SpawnStdio::Pipe(0));
            }
        };
        let is_terminal = rustix::termios::isatty(&file);
        if is_terminal && self.size_from.is_none() {
            self.size_from = Some(file.try_clone()?);
        }
        if is_terminal && self.terminal_sink.is_some() {
            return Ok(SpawnStdio::Terminal);
        }
        let (sink, writer) = writer_to(file)?;
        self.writers.push(writer);
        if is_terminal {
            self.terminal_sink = Some(sink);
            Ok(SpawnStdio::Terminal)
        } else {
            self.set_output(index, sink);
            Ok(SpawnStdio::Pipe(0))
        }
    }

    fn set_output(&mut self, index: usize, sink: OwnedFd) {
        match index {
            0 => self.stdout = Some(sink),
            _ => self.stderr = Some(sink),
        }
    }

    fn terminal_for_size(&self) -> Option<std::os::fd::BorrowedFd<'_>> {
        self.size_from.as_ref().map(AsFd::as_fd)
    }
}

/// A pipe whose writing end never blocks.
fn sink_pipe() -> io::Result<(OwnedFd, OwnedFd)> {
    let (read, write) = rustix::pipe::pipe_with(PipeFlags::CLOEXEC)?;
    rustix::fs::fcntl_setfl(&write, OFlags::WRONLY | OFlags::NONBLOCK)?;
    Ok((read, write))
}

/// A pipe whose content a thread writes to `file`. The file is shared with other processes, so it
/// must not be put into non-blocking mode.
fn writer_to(file: OwnedFd) -> io::Result<(OwnedFd, JoinHandle<()>)> {
    let (read, write) = sink_pipe()?;
    let writer = thread::Builder::new()
        .name("lab-output".into())
        .spawn(move || {
            // Not `io::copy`: its splice(2) takes a file's position before it waits for data, so
            // output and errors that go to one file would overwrite each other.
            let (mut read, mut file) = (File::from(read), File::from(file));
            let mut buffer = [0; 16 << 10];
            loop {
                let len = match read.read(&mut buffer) {
                    Err(error) if error.kind() == io::ErrorKind::Interrupted => continue,
                    Ok(0) | Err(_) => return,
                    Ok(len) => len,
                };
                // When nobody reads the file any more, the pipe closes, and so does the command's.
                if file
                    .write_all(buffer.get(..len).unwrap_or_default())
                    .is_err()
                {
                    return;
                }
            }
        })?;
    Ok((write, writer))
}

/// The folders, without those that lie in another one.
fn outermost(dirs: &[PathBuf]) -> Result<Vec<PathBuf>, LabError> {
    let mut all = Vec::new();
    for dir in dirs {
        let path = canonical(dir)?;
        if !path.is_dir() {
            return Err(LabError::Path {
                path,
                source: io::ErrorKind::NotADirectory.into(),
            });
        }
        all.push(path);
    }
    // A folder sorts before what lies in it.
    all.sort();
    let mut outermost: Vec<PathBuf> = Vec::new();
    for path in all {
        if !outermost.iter().any(|outer| path.starts_with(outer)) {
            outermost.push(path);
        }
    }
    Ok(outermost)
}

fn canonical(path: &Path) -> Result<PathBuf, LabError> {
    fs::canonicalize(path).map_err(|source| LabError::Path {
        path: path.to_owned(),
        source,
    })
}

/// This process's file mode creation mask, which can otherwise only be read by changing it.
fn umask() -> u32 {
    const USUAL: u32 = 0o022;
    let status = fs::read_to_string("/proc/self/status").unwrap_or_default();
    let line = status.lines().find_map(|line| line.strip_prefix("Umask:"));
    line.and_then(|text| u32::from_str_radix(text.trim(), 8).ok())
        .unwrap_or(USUAL)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn nested_folders_are_shared_once() {
        let root = tempfile::tempdir().unwrap();
        let root = root.path().canonicalize().unwrap();
        for name in ["a", "a/b", "ab"] {
            fs::create_dir(root.join(name)).unwrap();
        }
        fs::write(root.join("file"), b"").unwrap();
        let dirs = ["a/b", "ab", "a", "a"].map(|name| root.join(name));
        assert_eq!(outermost(&dirs).unwrap(), [root.join("a"), root.join("ab")]);
        assert!(outermost(&[root.join("file")]).is_err());
        assert!(outermost(&[root.join("missing")]).is_err());
    }

    #[test]
    fn the_mask_is_read_without_a_change() {
        let old = rustix::process::umask(rustix::fs::Mode::from_raw_mode(0o027));
        assert_eq!(umask(), 0o027);
        assert_eq!(umask(), 0o027);
        rustix::process::umask(old);
    }
}

//! The host's side of the guest agent: run programs, copy files, ask and stop the guest.
//!
//! A connection carries one request, so every request consumes its [`AgentClient`]. A guest
//! serves many connections at a time.

use std::ffi::OsStr;
use std::io::{self, Read, Write};
use std::os::fd::{AsFd, BorrowedFd};
use std::os::unix::ffi::OsStrExt;
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::thread;
use std::time::{Duration, Instant};

use rustix::event::{PollFd, PollFlags, poll};

use crate::protocol::{CHUNK, ExecRequest, Inbox, Malformed, Message, STDIN_WINDOW, VSOCK_PORT};
pub use crate::protocol::{Exit, Info, Shutdown, Window};

/// The agent program itself, as images hold it.
pub const AGENT_BINARY: &[u8] = include_bytes!(concat!(env!("OUT_DIR"), "/ringside-agent"));

/// How long one attempt to reach the agent may take; a guest that boots answers nothing.
const ATTEMPT: Duration = Duration::from_secs(10);
/// The pause between two attempts.
const RETRY_PERIOD: Duration = Duration::from_millis(50);

/// Why a request to the agent failed.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum AgentError {
    /// Nothing could be reached through the socket.
    #[error("cannot reach the guest agent through {}: {source}", path.display())]
    Connect {
        /// The socket's path.
        path: PathBuf,
        /// The operating system's error.
        source: io::Error,
    },
    /// The guest did not answer in time.
    #[error("the guest agent did not answer on {} within {waited:?}", path.display())]
    Timeout {
        /// The socket's path.
        path: PathBuf,
        /// How long it was waited for.
        waited: Duration,
    },
    /// The agent could not do what it was asked for.
    #[error("{text}")]
    Refused {
        /// The guest's error number, 0 if there is none.
        errno: i32,
        /// The agent's explanation.
        text: String,
    },
    /// The connection broke, for example because the guest went down.
    #[error("the connection to the guest agent broke: {0}")]
    Lost(#[source] io::Error),
    /// A stream or file of the host failed.
    #[error("cannot {action}: {source}")]
    Local {
        /// What was tried.
        action: &'static str,
        /// The operating system's error.
        source: io::Error,
    },
}

type Result<T> = std::result::Result<T, AgentError>;

impl From<Malformed> for AgentError {
    fn from(error: Malformed) -> Self {
        Self::Lost(error.into())
    }
}

fn local(action: &'static str) -> impl FnOnce(io::Error) -> AgentError {
    move |source| AgentError::Local { action, source }
}

/// A program to run in the guest.
#[derive(Debug, Clone, Default)]
pub struct ExecSpec(ExecRequest);

impl ExecSpec {
    /// Program and arguments; the program is looked up in the guest's PATH.
    pub fn new<S: AsRef<OsStr>>(argv: impl IntoIterator<Item = S>) -> Self {
        let argv = argv
            .into_iter()
            .map(|argument| argument.as_ref().as_bytes().to_vec());
        Self(ExecRequest {
            argv: argv.collect(),
            ..ExecRequest::default()
        })
    }

    /// Sets a variable on top of the agent's environment.
    #[must_use]
    pub fn env(mut self, name: impl AsRef<OsStr>, value: impl AsRef<OsStr>) -> Self {
        let bytes = |text: &OsStr| text.as_bytes().to_vec();
        self.0
            .env
            .push((bytes(name.as_ref()), bytes(value.as_ref())));
        self
    }

    /// Sets the working directory.
    #[must_use]
    pub fn cwd(mut self, path: impl AsRef<Path>) -> Self {
        self.0.cwd = path.as_ref().as_os_str().as_bytes().to_vec();
        self
    }

    /// Runs the program on a terminal of its own. All its output is then standard output.
    #[must_use]
    pub fn tty(mut self, window: Window) -> Self {
        self.0.tty = Some(window);
        self
    }
}

/// The host's ends of a guest program's streams.
pub struct ExecIo<'a> {
    /// Read from as the program takes it; `None`: no input.
    pub stdin: Option<BorrowedFd<'a>>,
    /// Where standard output goes.
    pub stdout: &'a mut dyn Write,
    /// Where standard error goes.
    pub stderr: &'a mut dyn Write,
    /// Where signals and window changes come from.
    pub control: Option<&'a ControlReceiver>,
}

/// Sends signals and window changes to a program while [`AgentClient::exec`] runs it.
#[derive(Debug)]
pub struct Control(UnixStream);

/// The end of a [`Control`] that [`AgentClient::exec`] takes.
#[derive(Debug)]
pub struct ControlReceiver(UnixStream);

/// Makes a control channel.
///
/// # Errors
/// The operating system's, if it has no descriptors left.
pub fn control() -> io::Result<(Control, ControlReceiver)> {
    let (sender, receiver) = UnixStream::pair()?;
    Ok((Control(sender), ControlReceiver(receiver)))
}

impl Control {
    /// Sends a signal (its number on Linux) to the program's process group.
    ///
    /// # Errors
    /// When the program has ended.
    pub fn signal(&self, signal: u8) -> io::Result<()> {
        Message::Signal(signal).write_to(&mut &self.0)
    }

    /// Tells the program's terminal its new size.
    ///
    /// # Errors
    /// When the program has ended.
    pub fn window(&self, window: Window) -> io::Result<()> {
        Message::Window(window).write_to(&mut &self.0)
    }
}

/// What a fetched file is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct FileInfo {
    /// Permission bits.
    pub mode: u32,
    /// Bytes that came; the kernel's own files say less when they are asked.
    pub size: u64,
}

/// A connection to the agent, good for one request.
#[derive(Debug)]
pub struct AgentClient {
    stream: UnixStream,
}

impl AgentClient {
    /// Connects through a VMM's vsock socket, as Firecracker and Cloud Hypervisor define it:
    /// after `CONNECT port` the VMM answers `OK port` once the guest has accepted. Tries again
    /// until `timeout` is over, because a guest that boots does not accept yet.
    ///
    /// # Errors
    /// [`AgentError::Timeout`] when the guest did not accept in time.
    pub fn connect(path: &Path, timeout: Duration) -> Result<Self> {
        let start = Instant::now();
        loop {
            let left = timeout.saturating_sub(start.elapsed());
            match attempt(path, left.clamp(RETRY_PERIOD, ATTEMPT)) {
                Ok(stream) => return Ok(Self { stream }),
                Err(error) if !worth_retrying(&error) => {
                    return Err(AgentError::Connect {
                        path: path.to_owned(),
                        source: error,
                    });
                }
                Err(_) if start.elapsed() >= timeout => {
                    return Err(AgentError::Timeout {
                        path: path.to_owned(),
                        waited: timeout,
                    });
                }
                Err(_) => thread::sleep(RETRY_PERIOD.min(left)),
            }
        }
    }

    /// Connects to an agent that itself listens on a Unix socket.
    ///
    /// # Errors
    /// [`AgentError::Connect`].
    pub fn connect_direct(path: &Path) -> Result<Self> {
        let stream = UnixStream::connect(path).map_err(|source| AgentError::Connect {
            path: path.to_owned(),
            source,
        })?;
        Ok(Self { stream })
    }

    /// Runs a program to its end. If this returns early, or its thread dies, the agent kills the
    /// program.
    ///
    /// # Errors
    /// The program could not be started ([`AgentError::Refused`], `errno` as exec(2)), the
    /// connection broke, or one of the host's streams failed.
    pub fn exec(mut self, spec: &ExecSpec, io: ExecIo<'_>) -> Result<Exit> {
        self.send(&Message::Exec(spec.0.clone()))?;
        match self.receive()? {
            Message::Started { .. } => {}
            other => return Err(unexpected(&other)),
        }
        let mut session = Exec {
            stream: self.stream,
            io,
            credit: STDIN_WINDOW,
            inbox: Inbox::default(),
            buffer: vec![0; CHUNK],
        };
        if session.io.stdin.is_none() {
            session.send(&Message::StdinClose)?;
        }
        loop {
            if let Some(exit) = session.turn()? {
                return Ok(exit);
            }
        }
    }

    /// Runs a program without input and returns how it ended, its standard output and its
    /// standard error.
    ///
    /// # Errors
    /// As [`AgentClient::exec`].
    pub fn output(self, spec: &ExecSpec) -> Result<(Exit, Vec<u8>, Vec<u8>)> {
        let (mut stdout, mut stderr) = (Vec::new(), Vec::new());
        let io = ExecIo {
            stdin: None,
            stdout: &mut stdout,
            stderr: &mut stderr,
            control: None,
        };
        let exit = self.exec(spec, io)?;
        Ok((exit, stdout, stderr))
    }

    /// Writes `size` bytes from `source` to a file of the guest.
    ///
    /// # Errors
    /// The guest cannot write the file, `source` has fewer bytes or fails, or the connection
    /// broke.
    pub fn put(mut self, source: &mut dyn Read, size: u64, path: &Path, mode: u32) -> Result<()> {
        let path = path.as_os_str().as_bytes().to_vec();
        self.send(&Message::Put { path, mode, size })?;
        self.expect(&Message::Ready)?;
        let mut left = size;
        let mut buffer = vec![0; CHUNK];
        while left > 0 {
            let limit = usize::try_from(left).map_or(CHUNK, |left| left.min(CHUNK));
            let chunk = buffer.get_mut(..limit).unwrap_or_default();
            let count = source.read(chunk).map_err(local("read the file to copy"))?;
            if count == 0 {
                let source = io::Error::from(io::ErrorKind::UnexpectedEof);
                return Err(local("read the file to copy")(source));
            }
            self.send(&Message::Data(
                chunk.get(..count).unwrap_or_default().to_vec(),
            ))?;
            left = left.saturating_sub(u64::try_from(count).unwrap_or(u64::MAX));
        }
        self.send(&Message::End)?;
        self.expect(&Message::Done)
    }

    /// Writes a file of the guest to `target`.
    ///
    /// # Errors
    /// The guest cannot read the file, `target` fails, or the connection broke.
    pub fn get(mut self, path: &Path, target: &mut dyn Write) -> Result<FileInfo> {
        let path = path.as_os_str().as_bytes().to_vec();
        self.send(&Message::Get { path })?;
        let mode = match self.receive()? {
            Message::FileInfo { mode, .. } => mode,
            other => return Err(unexpected(&other)),
        };
        let mut size: u64 = 0;
        loop {
            match self.receive()? {
                Message::Data(data) => {
                    target
                        .write_all(&data)
                        .map_err(local("write the copied file"))?;
                    size = size.saturating_add(u64::try_from(data.len()).unwrap_or(u64::MAX));
                }
                Message::End => return Ok(FileInfo { mode, size }),
                other => return Err(unexpected(&other)),
            }
        }
    }

    /// Asks the agent who it is.
    ///
    /// # Errors
    /// The connection broke.
    pub fn info(mut self) -> Result<Info> {
        self.send(&Message::Info)?;
        match self.receive()? {
            Message::InfoReply(info) => Ok(info),
            other => Err(unexpected(&other)),
        }
    }

    /// Stops the guest: processes are ended and disks written. Returns when the guest has begun.
    ///
    /// # Errors
    /// The connection broke.
    pub fn shutdown(mut self, how: Shutdown) -> Result<()> {
        self.send(&Message::Shutdown(how))?;
        self.expect(&Message::Done)
    }

    fn send(&mut self, message: &Message) -> Result<()> {
        message.write_to(&mut self.stream).map_err(AgentError::Lost)
    }

    fn expect(&mut self, wanted: &Message) -> Result<()> {
        let message = self.receive()?;
        match message == *wanted {
            true => Ok(()),
            false => Err(unexpected(&message)),
        }
    }

    fn receive(&mut self) -> Result<Message> {
        match Message::read_from(&mut self.stream).map_err(AgentError::Lost)? {
            Some(Message::Error { errno, text }) => Err(AgentError::Refused { errno, text }),
            Some(message) => Ok(message),
            None => Err(AgentError::Lost(io::ErrorKind::UnexpectedEof.into())),
        }
    }
}

fn unexpected(message: &Message) -> AgentError {
    match message {
        Message::Error { errno, text } => AgentError::Refused {
            errno: *errno,
            text: text.clone(),
        },
        _ => Malformed("an answer to another question").into(),
    }
}

/// One try to reach the agent, in which the guest has `patience` to accept.
fn attempt(path: &Path, patience: Duration) -> io::Result<UnixStream> {
    let mut stream = UnixStream::connect(path)?;
    stream.set_read_timeout(Some(patience))?;
    stream.write_all(format!("CONNECT {VSOCK_PORT}\n").as_bytes())?;
    // Byte by byte: what follows the line is not ours to read.
    let mut line = Vec::new();
    while line.last() != Some(&b'\n') {
        let mut byte = [0];
        if line.len() > 32 || stream.read(&mut byte)? == 0 {
            return Err(io::ErrorKind::ConnectionRefused.into());
        }
        line.extend_from_slice(&byte);
    }
    if !is_ok_line(&line) {
        return Err(io::Error::new(
            io::ErrorKind::InvalidData,
            "this is not a VMM's vsock socket",
        ));
    }
    stream.set_read_timeout(None)?;
    Ok(stream)
}

/// `OK port\n`
fn is_ok_line(line: &[u8]) -> bool {
    let number = line
        .strip_prefix(b"OK ")
        .and_then(|rest| rest.strip_suffix(b"\n"));
    number.is_some_and(|digits| !digits.is_empty() && digits.iter().all(u8::is_ascii_digit))
}

/// Whether the guest may just not be ready yet.
fn worth_retrying(error: &io::Error) -> bool {
    matches!(
        error.kind(),
        io::ErrorKind::NotFound
            | io::ErrorKind::ConnectionRefused
            | io::ErrorKind::ConnectionReset
            | io::ErrorKind::BrokenPipe
            | io::ErrorKind::WouldBlock
            | io::ErrorKind::TimedOut
            | io::ErrorKind::Interrupted
    )
}

/// A program that runs.
struct Exec<'a> {
    stream: UnixStream,
    io: ExecIo<'a>,
    /// How many bytes of input the agent takes now.
    credit: usize,
    inbox: Inbox,
    buffer: Vec<u8>,
}

impl Exec<'_> {
    /// Waits for something to happen and passes it on.
    fn turn(&mut self) -> Result<Option<Exit>> {
        let [from_agent, stdin, control] = self.wait().map_err(local("wait for the program"))?;
        if control {
            self.forward_control()?;
        }
        if stdin {
            self.forward_stdin()?;
        }
        if from_agent {
            let count = match self.stream.read(&mut self.buffer) {
                Ok(0) => return Err(AgentError::Lost(io::ErrorKind::UnexpectedEof.into())),
                Ok(count) => count,
                Err(error) if error.kind() == io::ErrorKind::Interrupted => return Ok(None),
                Err(error) => return Err(AgentError::Lost(error)),
            };
            self.inbox
                .push(self.buffer.get(..count).unwrap_or_default());
            while let Some(message) = self.inbox.next()? {
                if let Some(exit) = self.take(message)? {
                    return Ok(Some(exit));
                }
            }
        }
        Ok(None)
    }

    /// Says which of agent, standard input and control have something.
    fn wait(&self) -> io::Result<[bool; 3]> {
        let mut fds = vec![PollFd::from_borrowed_fd(self.stream.as_fd(), PollFlags::IN)];
        let stdin = self.io.stdin.filter(|_| self.credit > 0);
        let control = self.io.control.map(|control| control.0.as_fd());
        for fd in [stdin, control].into_iter().flatten() {
            fds.push(PollFd::from_borrowed_fd(fd, PollFlags::IN));
        }
        loop {
            match poll(&mut fds, None) {
                Ok(_) => break,
                Err(rustix::io::Errno::INTR) => {}
                Err(error) => return Err(error.into()),
            }
        }
        let mut ready = fds.iter().map(|fd| !fd.revents().is_empty());
        let mut next = |present: bool| present && ready.next().unwrap_or(false);
        Ok([next(true), next(stdin.is_some()), next(control.is_some())])
    }

    fn forward_control(&mut self) -> Result<()> {
        let Some(control) = self.io.control else {
            return Ok(());
        };
        match Message::read_from(&mut &control.0).map_err(local("read the control channel"))? {
            Some(message) => self.send(&message),
            // Nobody will send anything any more.
            None => {
                self.io.control = None;
                Ok(())
            }
        }
    }

    fn forward_stdin(&mut self) -> Result<()> {
        let Some(stdin) = self.io.stdin else {
            return Ok(());
        };
        let limit = self.credit.min(CHUNK);
        let buffer = self.buffer.get_mut(..limit).unwrap_or_default();
        match rustix::io::read(stdin, &mut *buffer) {
            Ok(0) => {
                self.io.stdin = None;
                self.send(&Message::StdinClose)
            }
            Ok(count) => {
                self.credit = self.credit.saturating_sub(count);
                let data = buffer.get(..count).unwrap_or_default().to_vec();
                self.send(&Message::Stdin(data))
            }
            Err(rustix::io::Errno::INTR | rustix::io::Errno::AGAIN) => Ok(()),
            Err(error) => Err(local("read standard input")(error.into())),
        }
    }

    fn take(&mut self, message: Message) -> Result<Option<Exit>> {
        match message {
            Message::Stdout(data) => write_now(self.io.stdout, &data, "write standard output")?,
            Message::Stderr(data) => write_now(self.io.stderr, &data, "write standard error")?,
            Message::StdinCredit(bytes) => {
                let bytes = usize::try_from(bytes).unwrap_or(usize::MAX);
                self.credit = self.credit.saturating_add(bytes).min(STDIN_WINDOW);
            }
            Message::Exited(exit) => return Ok(Some(exit)),
            other => return Err(unexpected(&other)),
        }
        Ok(None)
    }

    fn send(&mut self, message: &Message) -> Result<()> {
        message.write_to(&mut self.stream).map_err(AgentError::Lost)
    }
}

fn write_now(stream: &mut dyn Write, data: &[u8], action: &'static str) -> Result<()> {
    stream
        .write_all(data)
        .and_then(|()| stream.flush())
        .map_err(local(action))
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::io::{BufRead, BufReader};
    use std::os::unix::net::UnixListener;

    #[test]
    fn ok_lines() {
        assert!(is_ok_line(b"OK 1073741824\n"));
        for bad in [&b"OK \n"[..], b"OK x\n", b"NO 1\n", b"OK 1", b""] {
            assert!(!is_ok_line(bad));
        }
    }

    /// A VMM whose guest accepts only the third connection.
    #[test]
    fn connect_waits_for_a_guest_that_boots() {
        let temp = tempfile::tempdir().unwrap();
        let path = temp.path().join("vsock");
        let listener = UnixListener::bind(&path).unwrap();
        let vmm = thread::spawn(move || {
            for _ in 0..2 {
                drop(listener.accept().unwrap());
            }
            let (mut stream, _) = listener.accept().unwrap();
            let mut line = String::new();
            BufReader::new(stream.try_clone().unwrap())
                .read_line(&mut line)
                .unwrap();
            let mut answer = b"OK 1073741824\n".to_vec();
            Message::Done.encode(&mut answer).unwrap();
            stream.write_all(&answer).unwrap();
            let request = Message::read_from(&mut stream).unwrap();
            assert_eq!(request, Some(Message::Shutdown(Shutdown::PowerOff)));
            line
        });
        let client = AgentClient::connect(&path, Duration::from_secs(60)).unwrap();
        // Not one byte after the line was lost.
        client.shutdown(Shutdown::PowerOff).unwrap();
        assert_eq!(vmm.join().unwrap(), "CONNECT 1024\n");
    }

    #[test]
    fn connect_gives_up_and_says_where() {
        let missing = Path::new("/nonexistent/vsock");
        let error = AgentClient::connect(missing, Duration::from_millis(1)).unwrap_err();
        assert!(matches!(error, AgentError::Timeout { .. }), "{error}");
        assert!(error.to_string().contains("/nonexistent/vsock"));
    }
}

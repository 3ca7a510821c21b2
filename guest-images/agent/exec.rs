//! Runs one program for one connection.
//!
//! One loop waits for the connection, the program's streams and its end; nothing in it blocks, so
//! a signal gets through whatever the program or the host do not read.

use std::ffi::OsStr;
use std::fs::File;
use std::io::{self, Read, Write};
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::ffi::OsStrExt;
use std::os::unix::process::{CommandExt, ExitStatusExt};
use std::path::Path;
use std::process::{Child, Command, Stdio};

use crate::protocol::{CHUNK, ExecRequest, Exit, Inbox, Malformed, Message, STDIN_WINDOW};
use crate::serve::WRITE;
use crate::sys::{self, POLLERR, POLLHUP, POLLIN, POLLOUT, POLLRDHUP, PollFd};

/// The program's output is not read while this much of it waits for the host, in bytes.
const OUT_LIMIT: usize = 256 << 10;
/// What a terminal takes for the end of input (termios(3), VEOF).
const END_OF_INPUT: u8 = 4;

/// Runs the program until it ends or the host goes away, which kills it.
pub fn run(connection: &mut File, request: &ExecRequest) -> io::Result<()> {
    let mut session = Session::start(connection, request)?;
    // An error now means that the host is gone or speaks garbage, and a part of a frame may be on
    // the way already: the connection just ends, and the program with it.
    let pid = session.program.child.id();
    let _ = session
        .send(&Message::Started { pid })
        .and_then(|()| session.serve());
    Ok(())
}

/// The program, which does not outlive this.
struct Program {
    child: Child,
    ended: bool,
}

impl Program {
    /// Signals the program's process group, as long as that is certainly its own.
    fn signal(&self, signal: i32) {
        if !self.ended
            && let Ok(pid) = i32::try_from(self.child.id())
        {
            // The group may have ended by itself.
            let _ = sys::kill(-pid, signal);
        }
    }
}

impl Drop for Program {
    fn drop(&mut self) {
        if !self.ended {
            self.signal(sys::SIGKILL);
            // A child that was killed is soon gone, and there is nobody to report to.
            let _ = self.child.wait();
        }
    }
}

/// A stream out of the program.
struct Output {
    file: File,
    /// Once the program has ended: how many of its bytes are still in the pipe. What others who
    /// have the pipe write later is not waited for.
    left: Option<usize>,
}

struct Session<'a> {
    connection: &'a mut File,
    program: Program,
    exit_fd: OwnedFd,
    exit: Option<Exit>,
    is_terminal: bool,
    stdin: Option<File>,
    stdin_closing: bool,
    to_stdin: Vec<u8>,
    stdout: Option<Output>,
    stderr: Option<Output>,
    inbox: Inbox,
    to_host: Vec<u8>,
    buffer: Vec<u8>,
}

impl<'a> Session<'a> {
    fn start(connection: &'a mut File, request: &ExecRequest) -> io::Result<Self> {
        let text = |bytes| OsStr::from_bytes(bytes);
        let (name, arguments) = request
            .argv
            .split_first()
            .ok_or_else(|| io::Error::other("no program named"))?;
        let mut command = Command::new(text(name));
        command.args(arguments.iter().map(|argument| text(argument)));
        for (name, value) in &request.env {
            if name.is_empty() || name.contains(&b'=') {
                return Err(io::Error::other("bad name of an environment variable"));
            }
            command.env(text(name), text(value));
        }
        if !request.cwd.is_empty() {
            let cwd = Path::new(text(&request.cwd));
            if !cwd.is_dir() {
                return Err(io::Error::other(format!("no directory {}", cwd.display())));
            }
            command.current_dir(cwd);
        }

        let terminal = match request.tty {
            Some(window) => {
                let (ours, theirs) = sys::open_terminal()?;
                sys::set_window(ours.as_fd(), window.rows, window.columns)?;
                command
                    .stdin(theirs.try_clone()?)
                    .stdout(theirs.try_clone()?)
                    .stderr(theirs);
                Some(ours)
            }
            None => {
                command
                    .stdin(Stdio::piped())
                    .stdout(Stdio::piped())
                    .stderr(Stdio::piped());
                None
            }
        };
        let is_terminal = terminal.is_some();
        // SAFETY: between fork and exec begin_session only makes system calls and takes no lock
        // nor memory.
        unsafe { command.pre_exec(move || sys::begin_session(is_terminal)) };
        let mut program = Program {
            child: command.spawn()?,
            ended: false,
        };
        // The terminal's other side must be closed here, or its end would never show.
        drop(command);

        let child = &mut program.child;
        let (stdin, stdout, stderr) = match terminal {
            Some(ours) => (Some(ours.try_clone()?), Some(ours), None),
            None => (
                child
                    .stdin
                    .take()
                    .map(|pipe| File::from(OwnedFd::from(pipe))),
                child
                    .stdout
                    .take()
                    .map(|pipe| File::from(OwnedFd::from(pipe))),
                child
                    .stderr
                    .take()
                    .map(|pipe| File::from(OwnedFd::from(pipe))),
            ),
        };
        for file in [&stdin, &stdout, &stderr].into_iter().flatten() {
            sys::set_nonblocking(file.as_fd())?;
        }
        let exit_fd = sys::pidfd(program.child.id())?;
        sys::set_nonblocking(connection.as_fd())?;
        let output = |file: Option<File>| file.map(|file| Output { file, left: None });
        Ok(Self {
            exit_fd,
            connection,
            program,
            exit: None,
            is_terminal,
            stdin,
            stdin_closing: false,
            to_stdin: Vec::new(),
            stdout: output(stdout),
            stderr: output(stderr),
            inbox: Inbox::default(),
            to_host: Vec::new(),
            buffer: vec![0; CHUNK],
        })
    }

    fn send(&mut self, message: &Message) -> io::Result<()> {
        message.encode(&mut self.to_host)?;
        Ok(())
    }

    fn serve(&mut self) -> io::Result<()> {
        loop {
            if let Some(exit) = self.exit
                && self.stdout.is_none()
                && self.stderr.is_none()
            {
                self.send(&Message::Exited(exit))?;
                return self.flush_all();
            }
            let [connection, exit, stdin, stdout, stderr] = self.wait()?;
            if connection.has(POLLERR | POLLHUP | POLLRDHUP) {
                return Err(io::ErrorKind::ConnectionAborted.into());
            }
            if connection.has(POLLOUT) {
                self.flush()?;
            }
            if connection.has(POLLIN) {
                self.receive()?;
            }
            if stdin.has(POLLOUT | POLLERR | POLLHUP) {
                self.feed_stdin()?;
            }
            if stdout.has(POLLIN | POLLERR | POLLHUP) {
                let mut stream = self.stdout.take();
                self.forward(&mut stream, Message::Stdout)?;
                self.stdout = stream;
            }
            if stderr.has(POLLIN | POLLERR | POLLHUP) {
                let mut stream = self.stderr.take();
                self.forward(&mut stream, Message::Stderr)?;
                self.stderr = stream;
            }
            if exit.has(POLLIN) {
                self.note_exit()?;
            }
        }
    }

    fn wait(&self) -> io::Result<[PollFd; 5]> {
        let to_connection = match self.to_host.is_empty() {
            true => POLLIN | POLLRDHUP,
            false => POLLIN | POLLRDHUP | POLLOUT,
        };
        let stdin = self.stdin.as_ref().filter(|_| !self.to_stdin.is_empty());
        let exit = Some(self.exit_fd.as_fd()).filter(|_| self.exit.is_none());
        let mut fds = [
            PollFd::new(Some(self.connection.as_fd()), to_connection),
            PollFd::new(exit, POLLIN),
            PollFd::new(stdin.map(AsFd::as_fd), POLLOUT),
            PollFd::new(self.readable(&self.stdout), POLLIN),
            PollFd::new(self.readable(&self.stderr), POLLIN),
        ];
        sys::poll(&mut fds, -1)?;
        Ok(fds)
    }

    /// The stream, if the host takes what comes out of it.
    fn readable<'b>(&self, stream: &'b Option<Output>) -> Option<BorrowedFd<'b>> {
        let stream = stream.as_ref().filter(|_| self.to_host.len() < OUT_LIMIT);
        stream.map(|output| output.file.as_fd())
    }

    /// Writes to the host what it takes now.
    fn flush(&mut self) -> io::Result<()> {
        let piece = self.to_host.len().min(WRITE);
        match self.connection.write(&self.to_host[..piece]) {
            Ok(0) => Err(io::ErrorKind::WriteZero.into()),
            Ok(count) => {
                self.to_host.drain(..count);
                Ok(())
            }
            Err(error) if is_transient(&error) => Ok(()),
            Err(error) => Err(error),
        }
    }

    fn flush_all(&mut self) -> io::Result<()> {
        while !self.to_host.is_empty() {
            let events = POLLOUT | POLLRDHUP;
            let mut fds = [PollFd::new(Some(self.connection.as_fd()), events)];
            sys::poll(&mut fds, -1)?;
            if fds[0].has(POLLERR | POLLHUP | POLLRDHUP) {
                return Err(io::ErrorKind::ConnectionAborted.into());
            }
            self.flush()?;
        }
        Ok(())
    }

    fn receive(&mut self) -> io::Result<()> {
        match self.connection.read(&mut self.buffer) {
            Ok(0) => return Err(io::ErrorKind::UnexpectedEof.into()),
            Ok(count) => self.inbox.push(&self.buffer[..count]),
            Err(error) if is_transient(&error) => return Ok(()),
            Err(error) => return Err(error),
        }
        while let Some(message) = self.inbox.next()? {
            self.obey(message)?;
        }
        Ok(())
    }

    fn obey(&mut self, message: Message) -> io::Result<()> {
        match message {
            Message::Stdin(data) => {
                if self.to_stdin.len() + data.len() > STDIN_WINDOW {
                    return Err(Malformed("more input than the window allows").into());
                }
                match self.stdin {
                    Some(_) if !self.stdin_closing => self.to_stdin.extend_from_slice(&data),
                    // Nobody reads it any more: take it, as a closed terminal would.
                    _ => self.give_credit(data.len())?,
                }
            }
            Message::StdinClose => {
                self.stdin_closing = true;
                if self.is_terminal {
                    self.to_stdin.push(END_OF_INPUT);
                } else if self.to_stdin.is_empty() {
                    self.stdin = None;
                }
            }
            Message::Signal(signal) => self.program.signal(i32::from(signal)),
            Message::Window(window) => {
                if let (true, Some(terminal)) = (self.is_terminal, &self.stdin) {
                    sys::set_window(terminal.as_fd(), window.rows, window.columns)?;
                }
            }
            _ => return Err(Malformed("not a message for a program").into()),
        }
        Ok(())
    }

    fn give_credit(&mut self, bytes: usize) -> io::Result<()> {
        let bytes = u32::try_from(bytes).map_err(io::Error::other)?;
        self.send(&Message::StdinCredit(bytes))
    }

    /// Writes to the program what it takes now.
    fn feed_stdin(&mut self) -> io::Result<()> {
        let Some(stdin) = &mut self.stdin else {
            return Ok(());
        };
        let taken = match stdin.write(&self.to_stdin) {
            Ok(count) => count,
            Err(error) if is_transient(&error) => 0,
            // The program has closed its input: what comes now goes nowhere.
            Err(_) => {
                self.stdin = None;
                self.to_stdin.len()
            }
        };
        self.to_stdin.drain(..taken);
        if self.to_stdin.is_empty() && self.stdin_closing && !self.is_terminal {
            self.stdin = None;
        }
        match taken {
            0 => Ok(()),
            count => self.give_credit(count),
        }
    }

    /// Reads from the program once. The stream becomes `None` when it is used up.
    fn forward(
        &mut self,
        stream: &mut Option<Output>,
        message: fn(Vec<u8>) -> Message,
    ) -> io::Result<()> {
        let Some(output) = stream else {
            return Ok(());
        };
        let limit = output.left.unwrap_or(CHUNK).min(CHUNK);
        match output.file.read(&mut self.buffer[..limit]) {
            Ok(0) => *stream = None,
            Ok(count) => {
                if let Some(left) = &mut output.left {
                    *left -= count;
                    if *left == 0 {
                        *stream = None;
                    }
                }
                let data = self.buffer[..count].to_vec();
                self.send(&message(data))?;
            }
            Err(error) if is_transient(&error) => {}
            // What a terminal says when its other side is closed.
            Err(error) if error.raw_os_error() == Some(sys::EIO) => *stream = None,
            Err(error) => return Err(error),
        }
        Ok(())
    }

    fn note_exit(&mut self) -> io::Result<()> {
        let Some(status) = self.program.child.try_wait()? else {
            return Ok(());
        };
        self.program.ended = true;
        let number = |value: i32| u8::try_from(value).unwrap_or(u8::MAX);
        self.exit = Some(match (status.code(), status.signal()) {
            (Some(code), _) => Exit::Code(number(code)),
            (None, signal) => Exit::Signal(number(signal.unwrap_or(0))),
        });
        // The end of a session leader hangs its terminal up, so a terminal is read to its end.
        if !self.is_terminal {
            for stream in [&mut self.stdout, &mut self.stderr] {
                if let Some(output) = stream {
                    match sys::readable_bytes(output.file.as_fd())? {
                        0 => *stream = None,
                        left => output.left = Some(left),
                    }
                }
            }
        }
        Ok(())
    }
}

fn is_transient(error: &io::Error) -> bool {
    matches!(
        error.kind(),
        io::ErrorKind::WouldBlock | io::ErrorKind::Interrupted
    )
}

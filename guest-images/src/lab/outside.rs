//! The outside's half: one thread that serves all commands of a session.

use std::collections::BTreeMap;
use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::path::{Path, PathBuf};
use std::sync::mpsc::{Receiver, Sender, TryRecvError};
use std::time::{Duration, Instant};

use super::log::SharedLog;
use super::mux::{Event, Mux};
use super::pulse::{self, Beat, Pulse};
use super::qemu::{Killer, Qemu};
use super::sockets::{self, Connecting, FolderWatch, Published};
use super::wire::{
    CommandId, Setup, Spawn, SpawnStdio, StreamId, ToInside, ToOutside, VERSION, WindowSize,
    WireError, decode_message,
};
use super::{Exit, LabError, reactor};

/// How long the nested host may take until its relay answers. It is for hangs only: a start takes
/// seconds, on a machine that is busy with other things perhaps a minute.
const START_PATIENCE: Duration = Duration::from_secs(300);

/// How often a full backlog is tried again.
const RETRY: Duration = Duration::from_millis(20);

/// What the owner of the session wants.
pub(super) enum Request {
    Spawn(Box<NewCommand>),
    Signal(CommandId, i32),
    Resize(CommandId, WindowSize),
    Quit,
}

/// A command and the outside's ends of its standard files.
pub(super) struct NewCommand {
    pub(super) id: CommandId,
    /// Its streams are not filled in yet.
    pub(super) spawn: Spawn,
    pub(super) stdin: Option<OwnedFd>,
    pub(super) stdout: Option<OwnedFd>,
    pub(super) stderr: Option<OwnedFd>,
    /// Where the terminal's two directions lead.
    pub(super) terminal: (Option<OwnedFd>, Option<OwnedFd>),
    /// As the command names them.
    pub(super) sockets: Vec<PathBuf>,
    pub(super) outward: Vec<PathBuf>,
    pub(super) reply: Sender<Result<Exit, LabError>>,
}

/// What the outside holds of the nested host.
pub(super) struct Host {
    pub(super) killer: Killer,
    pub(super) qemu: Option<Qemu>,
    pub(super) logs: Vec<OwnedFd>,
}

/// The thread's state.
pub(super) struct Outside {
    mux: Mux,
    requests: Receiver<Request>,
    wake: OwnedFd,
    host: Host,
    log: SharedLog,
    setup: Setup,
    /// Told once, when the nested host is ready or cannot be.
    ready: Option<Sender<Result<(), LabError>>>,
    give_up: Instant,
    pulse: Pulse,
    commands: BTreeMap<CommandId, Command>,
    connecting: Connecting,
    next_stream: StreamId,
}

struct Command {
    program: String,
    sockets: Vec<Socket>,
    outward: Vec<PathBuf>,
    /// Sockets beside the `outward` paths that the relay knows of.
    known_outward: Vec<PathBuf>,
    watch: Option<FolderWatch>,
    input: Option<StreamId>,
    outputs: Vec<StreamId>,
    terminal: Option<StreamId>,
    status: Option<Exit>,
    reply: Sender<Result<Exit, LabError>>,
}

struct Socket {
    path: PathBuf,
    published: Option<Published>,
}

/// Why the thread ends.
enum End {
    /// The session was dropped.
    Quit,
    /// The wire was closed.
    Closed,
    /// The relay could not set the nested host up.
    Setup(String),
    /// It took too long.
    Late,
    /// The relay does not answer any more.
    Silent,
    /// The wire failed.
    Failed(io::Error),
}

impl From<WireError> for End {
    fn from(error: WireError) -> Self {
        Self::Failed(io::Error::new(io::ErrorKind::InvalidData, error))
    }
}

impl From<io::Error> for End {
    fn from(error: io::Error) -> Self {
        Self::Failed(error)
    }
}

impl Outside {
    pub(super) fn new(
        wire: OwnedFd,
        requests: Receiver<Request>,
        wake: OwnedFd,
        host: Host,
        log: SharedLog,
        setup: Setup,
        ready: Sender<Result<(), LabError>>,
    ) -> Self {
        Self {
            mux: Mux::new(wire),
            requests,
            wake,
            host,
            log,
            setup,
            ready: Some(ready),
            give_up: Instant::now() + START_PATIENCE,
            pulse: Pulse::new(Instant::now()),
            commands: BTreeMap::new(),
            connecting: Connecting::default(),
            next_stream: 0,
        }
    }

    /// Serves until the session is dropped or the nested host has ended; then nothing of the
    /// nested host is left.
    pub(super) fn run(mut self) {
        let Err(end) = self.serve();
        self.host.killer.kill();
        let status = self.host.qemu.take().map(Qemu::wait);
        self.read_logs();
        let error = || match &end {
            End::Setup(problem) => LabError::Setup(problem.clone()),
            _ => LabError::HostDied {
                how: match (&end, &status) {
                    (End::Quit, _) => "was stopped".into(),
                    (End::Late, _) => {
                        format!("did not start within {} s", START_PATIENCE.as_secs())
                    }
                    (End::Silent, _) => {
                        format!("has not answered for {} s", pulse::PATIENCE.as_secs())
                    }
                    (End::Failed(error), _) => format!("cannot be talked to: {error}"),
                    (_, Some(Ok(status))) => format!("ended unexpectedly (QEMU: {status})"),
                    (_, Some(Err(error))) => format!("ended unexpectedly (QEMU: {error})"),
                    (_, None) => "ended unexpectedly".into(),
                },
                log: self.log.last_lines(),
            },
        };
        // Who does not wait for an answer does not miss it.
        if let Some(ready) = self.ready.take() {
            let _ = ready.send(Err(error()));
        }
        for command in self.commands.values() {
            let _ = command.reply.send(Err(error()));
        }
        while let Ok(request) = self.requests.try_recv() {
            if let Request::Spawn(new) = request {
                let _ = new.reply.send(Err(error()));
            }
        }
    }

    fn serve(&mut self) -> Result<std::convert::Infallible, End> {
        loop {
            let mut timeout = match &self.ready {
                Some(_) => self.give_up.saturating_duration_since(Instant::now()),
                None => pulse::INTERVAL,
            };
            timeout = timeout.max(RETRY);
            if self.connecting.is_waiting() {
                timeout = RETRY;
            }
            let mut own: Vec<BorrowedFd<'_>> = vec![self.wake.as_fd()];
            own.extend(self.host.logs.iter().map(AsFd::as_fd));
            for command in self.commands.values() {
                own.extend(command.listeners().map(|(_, listener)| listener.as_fd()));
                own.extend(command.watch.iter().map(AsFd::as_fd));
            }
            let turn = reactor::turn(&mut self.mux, &own, Some(timeout))?;
            drop(own);
            self.read_logs();
            for event in turn.events {
                match event {
                    Event::Control(json) => {
                        self.pulse.heard();
                        let message = decode_message(&json)?;
                        self.receive(message)?;
                    }
                    Event::Closed => return Err(End::Closed),
                }
            }
            self.serve_requests()?;
            self.accept_connections()?;
            self.finish_connections()?;
            self.look_for_outward_sockets()?;
            self.finish_commands()?;
            if self.ready.is_some() {
                if Instant::now() >= self.give_up {
                    return Err(End::Late);
                }
                continue;
            }
            match self.pulse.tick(Instant::now()) {
                Beat::Nothing => {}
                Beat::Ask => self.mux.send(&ToInside::Ping)?,
                Beat::Dead => return Err(End::Silent),
            }
        }
    }

    fn receive(&mut self, message: ToOutside) -> Result<(), End> {
        match message {
            ToOutside::Hello { version } if version == VERSION => {
                let setup = ToInside::Setup(self.setup.clone());
                self.mux.send(&setup)?;
            }
            ToOutside::Hello { version } => {
                let problem = format!("the relay's version is {version}, not {VERSION}");
                return Err(End::Setup(problem));
            }
            ToOutside::Ready => {
                if let Some(ready) = self.ready.take() {
                    // The session may be dropped already; then a request says so.
                    let _ = ready.send(Ok(()));
                }
            }
            ToOutside::Pong => {}
            ToOutside::SetupFailed { problem } => return Err(End::Setup(problem)),
            ToOutside::SpawnFailed { command, problem } => {
                if let Some(command) = self.commands.remove(&command) {
                    for stream in command.streams() {
                        self.mux.abandon(stream);
                    }
                    let program = command.program;
                    let _ = command
                        .reply
                        .send(Err(LabError::Spawn { program, problem }));
                }
            }
            ToOutside::Exited { command, status } => {
                if let Some(command) = self.commands.get_mut(&command) {
                    command.status = Some(status);
                    if let Some(stream) = command.input.or(command.terminal) {
                        self.mux.end_source(stream)?;
                    }
                }
            }
            ToOutside::Listening {
                command,
                socket,
                mode,
            } => {
                if let Some(socket) = self.socket(command, socket) {
                    let result = Published::at(&socket.path, mode);
                    if let Err(error) = &result {
                        tracing::warn!(path = %socket.path.display(), %error, "cannot show a socket of the nested host");
                    }
                    socket.published = result.ok();
                }
            }
            ToOutside::Gone { command, socket } => {
                if let Some(socket) = self.socket(command, socket) {
                    socket.published = None;
                }
            }
            ToOutside::Incoming { stream, path } => {
                let path = PathBuf::from(path);
                let known = |command: &Command| command.known_outward.contains(&path);
                // The relay may ask for nothing but what it was told of.
                if self.commands.values().any(known) {
                    self.connecting.start(stream, path);
                } else {
                    self.mux.refuse(stream)?;
                }
                self.finish_connections()?;
            }
        }
        Ok(())
    }

    fn socket(&mut self, command: CommandId, socket: usize) -> Option<&mut Socket> {
        self.commands.get_mut(&command)?.sockets.get_mut(socket)
    }

    fn serve_requests(&mut self) -> Result<(), End> {
        let mut count = [0; 8];
        // The count says nothing that the channel does not say better.
        let _ = rustix::io::read(&self.wake, &mut count);
        loop {
            match self.requests.try_recv() {
                Ok(Request::Spawn(new)) => self.spawn(*new)?,
                Ok(Request::Signal(command, signal)) => {
                    self.mux.send(&ToInside::Signal { command, signal })?;
                }
                Ok(Request::Resize(command, size)) => {
                    self.mux.send(&ToInside::Resize { command, size })?;
                }
                Ok(Request::Quit) | Err(TryRecvError::Disconnected) => return Err(End::Quit),
                Err(TryRecvError::Empty) => return Ok(()),
            }
        }
    }

    fn spawn(&mut self, new: NewCommand) -> Result<(), End> {
        let watch = match new.outward.as_slice() {
            [] => None,
            paths => match FolderWatch::new(paths.iter().map(PathBuf::as_path)) {
                Ok(watch) => Some(watch),
                Err(source) => {
                    let path = paths.first().cloned().unwrap_or_default();
                    let _ = new.reply.send(Err(LabError::Path { path, source }));
                    return Ok(());
                }
            },
        };
        let known_outward = siblings(&new.outward);
        let mut spawn = new.spawn;
        spawn.command = new.id;
        spawn.outward = known_outward.iter().map(Into::into).collect();
        let mut command = Command {
            program: spawn
                .argv
                .first()
                .map(|program| program.display().to_string())
                .unwrap_or_default(),
            sockets: new
                .sockets
                .into_iter()
                .map(|path| Socket {
                    path,
                    published: None,
                })
                .collect(),
            outward: new.outward,
            known_outward,
            watch,
            input: None,
            outputs: Vec::new(),
            terminal: None,
            status: None,
            reply: new.reply,
        };
        let mut terminal_ends = None;
        if let Some(terminal) = &mut spawn.terminal {
            let (source, sink) = new.terminal;
            terminal.stream = self.new_stream();
            terminal_ends = sink.map(|sink| (terminal.stream, source, sink));
            command.terminal = Some(terminal.stream);
            command.outputs.push(terminal.stream);
        }
        let [stdin, stdout, stderr] = &mut spawn.stdio;
        if let (SpawnStdio::Pipe(stream), Some(source)) = (stdin, new.stdin) {
            *stream = self.new_stream();
            self.mux.open(*stream, Some(source), None);
            command.input = Some(*stream);
        }
        for (stdio, sink) in [(stdout, new.stdout), (stderr, new.stderr)] {
            if let (SpawnStdio::Pipe(stream), Some(sink)) = (stdio, sink) {
                *stream = self.new_stream();
                self.mux.open(*stream, None, Some(sink));
                command.outputs.push(*stream);
            }
        }
        self.mux.send(&ToInside::Spawn(Box::new(spawn)))?;
        if let Some((stream, source, sink)) = terminal_ends {
            self.mux.open_both(stream, source, sink);
        }
        self.commands.insert(new.id, command);
        Ok(())
    }

    fn new_stream(&mut self) -> StreamId {
        self.next_stream = self.next_stream.wrapping_add(2);
        self.next_stream
    }

    fn accept_connections(&mut self) -> Result<(), End> {
        let mut accepted = Vec::new();
        for (&command, state) in &self.commands {
            for (socket, listener) in state.listeners() {
                while let Ok(Some(connection)) = sockets::accept(listener) {
                    accepted.push((command, socket, connection));
                }
            }
        }
        for (command, socket, connection) in accepted {
            let stream = self.new_stream();
            let source = connection.try_clone()?;
            self.mux.open(stream, Some(source), Some(connection));
            self.mux.send(&ToInside::Connect {
                stream,
                command,
                socket,
            })?;
        }
        Ok(())
    }

    fn finish_connections(&mut self) -> Result<(), End> {
        for connected in self.connecting.poll() {
            match connected.result.and_then(|fd| Ok((fd.try_clone()?, fd))) {
                Ok((source, sink)) => {
                    self.mux
                        .accept(connected.stream, Some(source), Some(sink))?;
                }
                Err(_) => self.mux.refuse(connected.stream)?,
            }
        }
        Ok(())
    }

    fn look_for_outward_sockets(&mut self) -> Result<(), End> {
        for (&id, command) in &mut self.commands {
            let changed = command
                .watch
                .as_ref()
                .is_some_and(FolderWatch::take_changes);
            if !changed {
                continue;
            }
            let now = siblings(&command.outward);
            for path in now
                .iter()
                .filter(|path| !command.known_outward.contains(path))
            {
                self.mux.send(&ToInside::OutwardUp {
                    command: id,
                    path: path.into(),
                })?;
            }
            for path in command
                .known_outward
                .iter()
                .filter(|path| !now.contains(path))
            {
                self.mux.send(&ToInside::OutwardDown {
                    command: id,
                    path: path.into(),
                })?;
            }
            command.known_outward = now;
        }
        Ok(())
    }

    /// Reports commands that have ended and whose output has been written.
    fn finish_commands(&mut self) -> Result<(), End> {
        let mux = &self.mux;
        let finished: Vec<(CommandId, Exit)> = self
            .commands
            .iter()
            .filter(|(_, command)| command.outputs.iter().all(|id| mux.sink_done(*id)))
            .filter_map(|(&id, command)| Some((id, command.status?)))
            .collect();
        for (id, status) in finished {
            if let Some(command) = self.commands.remove(&id) {
                // The sockets are gone before anybody hears of the end.
                drop(command.sockets);
                let _ = command.reply.send(Ok(status));
            }
        }
        Ok(())
    }

    fn read_logs(&mut self) {
        let mut buffer = [0; 4096];
        let log = &mut self.log;
        self.host.logs.retain(|source| {
            loop {
                match rustix::io::read(source, &mut buffer) {
                    Ok(0) => return false,
                    Ok(read) => log.push(buffer.get(..read).unwrap_or_default()),
                    Err(rustix::io::Errno::AGAIN | rustix::io::Errno::INTR) => return true,
                    Err(_) => return false,
                }
            }
        });
    }
}

impl Command {
    fn listeners(&self) -> impl Iterator<Item = (usize, &OwnedFd)> {
        let sockets = self.sockets.iter().enumerate();
        sockets.filter_map(|(index, socket)| Some((index, socket.published.as_ref()?.listener())))
    }

    fn streams(&self) -> impl Iterator<Item = StreamId> {
        self.outputs.iter().copied().chain(self.input)
    }
}

fn siblings(bases: &[PathBuf]) -> Vec<PathBuf> {
    bases
        .iter()
        .map(PathBuf::as_path)
        .flat_map(|base: &Path| sockets::numbered_siblings(base))
        .collect()
}

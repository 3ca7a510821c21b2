//! The relay: the same executable, running inside the nested host as its first process.
//!
//! It makes the nested host look like the machine ([`setup`]), starts the commands that the
//! outside process asks for ([`process`]), carries their standard files, and joins the sockets of
//! both sides ([`listening`]).

mod listening;
mod process;
mod setup;

use std::collections::BTreeMap;
use std::ffi::OsString;
use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::time::{Duration, Instant};

use rustix::process::{Pid, Signal, WaitOptions, WaitStatus};

use self::listening::{OutwardListener, WatchedSocket};
use self::process::Process;
use super::mux::{Event, Mux};
use super::sockets::{self, Connecting};
use super::wire::{CommandId, Spawn, StreamId, ToInside, ToOutside, VERSION, decode_message};
use super::{Exit, reactor};

/// How often a command's sockets are looked for while some are missing, and afterwards.
const LOOK_OFTEN: Duration = Duration::from_millis(25);
const LOOK_SELDOM: Duration = Duration::from_millis(250);

/// How often orphans are collected.
const REAP: Duration = Duration::from_secs(2);

/// Runs the relay as the first process of the nested host, to which the initramfs hands over.
/// It does not return while the nested host lives.
pub fn relay_main() -> ExitCode {
    let result = setup::open_wire().and_then(|wire| Relay::new(wire, Place::Host).run());
    if let Err(error) = result {
        // Standard error is the nested host's console, whose last lines the outside shows.
        eprintln!("ringside relay: {error}");
    }
    if rustix::process::getpid() == Pid::INIT {
        setup::power_off();
    }
    ExitCode::FAILURE
}

/// Where the relay runs.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) enum Place {
    /// In the nested host, which it may change as it likes.
    Host,
    /// In a test, as a part of an ordinary process: nothing is mounted, and the sockets of the
    /// inside are below a folder of their own.
    #[cfg(test)]
    Below(PathBuf),
}

impl Place {
    /// Where a socket of the inside is.
    fn inside(&self, path: &Path) -> PathBuf {
        match self {
            Self::Host => path.to_owned(),
            #[cfg(test)]
            Self::Below(root) => root.join(path.strip_prefix("/").unwrap_or(path)),
        }
    }
}

/// The relay's state.
#[derive(Debug)]
pub(super) struct Relay {
    mux: Mux,
    place: Place,
    commands: BTreeMap<CommandId, Running>,
    outward: BTreeMap<OsString, OutwardListener>,
    connecting: Connecting,
    next_stream: StreamId,
    next_look: Instant,
    /// Before the setup, children belong to the initramfs.
    set_up: bool,
}

/// A command that has been started.
#[derive(Debug)]
struct Running {
    process: Process,
    sockets: Vec<WatchedSocket>,
    outward: Vec<OsString>,
    status: Option<Exit>,
}

impl Relay {
    pub(super) fn new(wire: OwnedFd, place: Place) -> Self {
        Self {
            mux: Mux::new(wire),
            place,
            commands: BTreeMap::new(),
            outward: BTreeMap::new(),
            connecting: Connecting::default(),
            next_stream: 1,
            next_look: Instant::now(),
            set_up: false,
        }
    }

    /// Serves until the outside closes the wire.
    ///
    /// # Errors
    /// The wire failed or the outside broke the protocol.
    pub(super) fn run(mut self) -> io::Result<()> {
        self.send(&ToOutside::Hello {
            version: VERSION.to_owned(),
        })?;
        let result = self.serve();
        for running in self.commands.values() {
            running.process.kill();
        }
        result
    }

    fn serve(&mut self) -> io::Result<()> {
        loop {
            let timeout = self.timeout();
            let mut own: Vec<BorrowedFd<'_>> = Vec::new();
            own.extend(
                self.commands
                    .values()
                    .map(|running| running.process.as_fd()),
            );
            own.extend(self.outward.values().map(AsFd::as_fd));
            let turn = reactor::turn(&mut self.mux, &own, timeout)?;
            drop(own);
            for event in turn.events {
                match event {
                    Event::Control(json) => {
                        let message = decode_message(&json).map_err(invalid)?;
                        self.receive(message)?;
                    }
                    Event::Closed => return Ok(()),
                }
            }
            self.accept_outward()?;
            self.reap();
            self.finish_connections()?;
            self.look_for_sockets()?;
            self.report_ended()?;
        }
    }

    fn timeout(&self) -> Option<Duration> {
        let watching = self
            .commands
            .values()
            .any(|running| !running.sockets.is_empty());
        let mut timeout = match self.place {
            Place::Host => Some(REAP),
            #[cfg(test)]
            Place::Below(_) => None,
        };
        let mut at_most = |limit: Duration| {
            timeout = Some(timeout.map_or(limit, |timeout: Duration| timeout.min(limit)));
        };
        if watching {
            at_most(self.next_look.saturating_duration_since(Instant::now()));
        }
        if self.connecting.is_waiting() {
            at_most(LOOK_OFTEN);
        }
        timeout
    }

    fn send(&mut self, message: &ToOutside) -> io::Result<()> {
        self.mux.send(message).map_err(invalid)
    }

    fn receive(&mut self, message: ToInside) -> io::Result<()> {
        match message {
            ToInside::Setup(setup) => {
                let result = match self.place {
                    Place::Host => setup::apply(&setup),
                    #[cfg(test)]
                    Place::Below(_) => Ok(()),
                };
                self.set_up = true;
                self.send(&match result {
                    Ok(()) => ToOutside::Ready,
                    Err(problem) => ToOutside::SetupFailed { problem },
                })?;
            }
            ToInside::Spawn(spawn) => self.spawn(*spawn)?,
            ToInside::Signal { command, signal } => {
                if let Some(running) = self.commands.get(&command)
                    && let Some(signal) = Signal::from_named_raw(signal)
                    && running.status.is_none()
                {
                    running.process.signal(signal);
                }
            }
            ToInside::Resize { command, size } => {
                if let Some(running) = self.commands.get(&command) {
                    running.process.resize(size);
                }
            }
            ToInside::Connect {
                stream,
                command,
                socket,
            } => {
                let target = self
                    .commands
                    .get(&command)
                    .and_then(|running| running.sockets.get(socket))
                    .and_then(WatchedSocket::target);
                match target {
                    Some(target) => self.connecting.start(stream, target),
                    None => self.mux.refuse(stream).map_err(invalid)?,
                }
            }
            ToInside::OutwardUp { command, path } => {
                if let Some(running) = self.commands.get_mut(&command) {
                    running.outward.push(path.clone());
                    self.listen_outward(path);
                }
            }
            ToInside::OutwardDown { command, path } => {
                if let Some(running) = self.commands.get_mut(&command) {
                    running.outward.retain(|other| *other != path);
                }
                self.drop_unused_outward();
            }
            ToInside::Ping => self.send(&ToOutside::Pong)?,
        }
        Ok(())
    }

    fn spawn(&mut self, spawn: Spawn) -> io::Result<()> {
        for path in &spawn.outward {
            self.listen_outward(path.clone());
        }
        match Process::spawn(&spawn, &mut self.mux) {
            Ok(process) => {
                let watch = |path: &OsString| WatchedSocket::new(self.place.inside(path.as_ref()));
                let running = Running {
                    process,
                    sockets: spawn.sockets.iter().map(watch).collect(),
                    outward: spawn.outward,
                    status: None,
                };
                self.commands.insert(spawn.command, running);
                self.next_look = Instant::now();
                Ok(())
            }
            Err(error) => {
                self.drop_unused_outward();
                self.send(&ToOutside::SpawnFailed {
                    command: spawn.command,
                    problem: error.to_string(),
                })
            }
        }
    }

    fn listen_outward(&mut self, path: OsString) {
        if self.outward.contains_key(&path) {
            return;
        }
        match OutwardListener::at(&self.place.inside(path.as_ref()), &self.place) {
            Ok(listener) => {
                self.outward.insert(path, listener);
            }
            // The guest's connection is then refused, as it is when nobody listens outside.
            Err(error) => eprintln!(
                "ringside relay: cannot listen at {}: {error}",
                path.display()
            ),
        }
    }

    fn drop_unused_outward(&mut self) {
        let commands = &self.commands;
        self.outward.retain(|path, _| {
            commands
                .values()
                .any(|running| running.outward.contains(path))
        });
    }

    fn accept_outward(&mut self) -> io::Result<()> {
        for (path, listener) in &self.outward {
            while let Ok(Some(connection)) = sockets::accept(listener.socket()) {
                let stream = self.next_stream;
                self.next_stream = stream.wrapping_add(2);
                let message = ToOutside::Incoming {
                    stream,
                    path: path.clone(),
                };
                self.mux.send(&message).map_err(invalid)?;
                let source = connection.try_clone()?;
                self.mux.open(stream, Some(source), Some(connection));
            }
        }
        Ok(())
    }

    fn finish_connections(&mut self) -> io::Result<()> {
        for connected in self.connecting.poll() {
            match connected.result.and_then(|fd| Ok((fd.try_clone()?, fd))) {
                Ok((source, sink)) => self
                    .mux
                    .accept(connected.stream, Some(source), Some(sink))
                    .map_err(invalid)?,
                Err(_) => self.mux.refuse(connected.stream).map_err(invalid)?,
            }
        }
        Ok(())
    }

    fn look_for_sockets(&mut self) -> io::Result<()> {
        let now = Instant::now();
        let watching = self
            .commands
            .values()
            .any(|running| !running.sockets.is_empty());
        if !watching || now < self.next_look {
            return Ok(());
        }
        let listening = listening::listening_sockets()?;
        let mut missing = false;
        for (&command, running) in &mut self.commands {
            for (socket, watched) in running.sockets.iter_mut().enumerate() {
                if let Some(change) = watched.look(&listening) {
                    let message = match change {
                        listening::Change::Up { mode } => ToOutside::Listening {
                            command,
                            socket,
                            mode,
                        },
                        listening::Change::Down => ToOutside::Gone { command, socket },
                    };
                    self.mux.send(&message).map_err(invalid)?;
                }
                missing |= watched.target().is_none();
            }
        }
        self.next_look = now + if missing { LOOK_OFTEN } else { LOOK_SELDOM };
        Ok(())
    }

    /// Collects ended commands and, as the first process, everybody's orphans.
    fn reap(&mut self) {
        for running in self.commands.values_mut() {
            if running.status.is_none()
                && let Ok(Some((_, status))) =
                    rustix::process::waitpid(Some(running.process.pid()), WaitOptions::NOHANG)
            {
                end(running, status, &mut self.mux);
            }
        }
        if self.place != Place::Host || !self.set_up {
            return;
        }
        while let Ok(Some((pid, status))) = rustix::process::wait(WaitOptions::NOHANG) {
            // A command that ended just now.
            let own = self
                .commands
                .values_mut()
                .find(|running| running.process.pid() == pid && running.status.is_none());
            if let Some(running) = own {
                end(running, status, &mut self.mux);
            }
        }
    }

    /// Reports commands that have ended, once all of their output is on its way.
    fn report_ended(&mut self) -> io::Result<()> {
        let mux = &self.mux;
        let ended: Vec<(CommandId, Exit)> = self
            .commands
            .iter()
            .filter(|(_, running)| running.process.outputs().all(|id| mux.source_done(id)))
            .filter_map(|(&command, running)| Some((command, running.status?)))
            .collect();
        for (command, status) in ended {
            if let Some(running) = self.commands.remove(&command) {
                running.process.close(&mut self.mux).map_err(invalid)?;
            }
            self.drop_unused_outward();
            if self.place == Place::Host {
                // What the command left in this kernel's caches must be in the files outside
                // before anybody there hears of its end.
                rustix::fs::sync();
            }
            self.send(&ToOutside::Exited { command, status })?;
        }
        Ok(())
    }
}

fn end(running: &mut Running, status: WaitStatus, mux: &mut Mux) {
    running.status = match (status.exit_status(), status.terminating_signal()) {
        (Some(code), _) => Some(Exit::Code(u8::try_from(code & 0xff).unwrap_or(u8::MAX))),
        (None, Some(signal)) => Some(Exit::Signal(signal)),
        (None, None) => return,
    };
    for id in running.process.outputs() {
        mux.drain(id);
    }
}

fn invalid(error: super::wire::WireError) -> io::Error {
    io::Error::new(io::ErrorKind::InvalidData, error)
}

//! The main loop's part of the serial line: from standard input to the guest.

use std::io::{self, Write};
use std::os::fd::AsRawFd;
use std::sync::Arc;

use event_manager::{EventOps, EventSet, Events, MutEventSubscriber};

use super::ExitReason;
use super::run_state::RunState;
use crate::platform::Serial;
use crate::terminal::{Command, EscapeFilter, HELP, Input};

/// Most that is read at once; more waits in the terminal or pipe.
const CHUNK: usize = 256;

/// What is typed is kept up to here while the guest has no room; the rest is lost, as on any terminal.
const TYPED_AHEAD: usize = 4096;

/// Reads standard input when the guest has room, and a terminal always: its escape key must work
/// whatever the guest does.
pub(super) struct Console {
    input: Option<Input>,
    /// Escapes count on a terminal alone.
    escapes: Option<EscapeFilter>,
    /// Files and `/dev/null` cannot be waited for: they are always readable.
    always_readable: bool,
    waiting: bool,
    pending: Vec<u8>,
    serial: Arc<Serial>,
    run: Arc<RunState>,
}

impl Console {
    pub(super) fn new(
        input: Option<Input>,
        terminal: bool,
        serial: Arc<Serial>,
        run: Arc<RunState>,
    ) -> Console {
        Console {
            input,
            escapes: terminal.then(EscapeFilter::default),
            always_readable: false,
            waiting: false,
            pending: Vec::new(),
            serial,
            run,
        }
    }

    /// Moves input on until the guest has no room or there is no input.
    fn pump(&mut self, ops: &mut EventOps, mut readable: bool) {
        loop {
            let taken = self.serial.input(&self.pending);
            self.pending.drain(..taken);
            if !self.pending.is_empty() && self.escapes.is_none() {
                // `Serial::room` tells when to go on.
                self.wait(ops, false);
                return;
            }
            if !(readable || self.always_readable) {
                self.wait(ops, true);
                return;
            }
            readable = false;
            if !self.read() {
                self.wait(ops, false);
                self.input = None;
                return;
            }
        }
    }

    /// Reads a chunk into `pending`; false at the end of the input.
    fn read(&mut self) -> bool {
        let Some(input) = &mut self.input else {
            return false;
        };
        let mut chunk = [0; CHUNK];
        let typed = match input.read(&mut chunk) {
            Ok(0) => return false,
            Ok(len) => chunk.get(..len).unwrap_or_default(),
            Err(e) if e.kind() == io::ErrorKind::WouldBlock => return true,
            Err(error) => {
                tracing::debug!(%error, "standard input is gone");
                return false;
            }
        };
        let Some(escapes) = &mut self.escapes else {
            self.pending.extend_from_slice(typed);
            return true;
        };
        let (rest, command) = escapes.filter(typed);
        let room = TYPED_AHEAD.saturating_sub(self.pending.len());
        self.pending.extend(rest.into_iter().take(room));
        match command {
            Some(Command::Quit) => self.run.end(ExitReason::Killed),
            Some(Command::Help) => {
                let _ = io::stderr().write_all(HELP.as_bytes());
            }
            None => {}
        }
        true
    }

    /// Whether to be told of more input.
    fn wait(&mut self, ops: &mut EventOps, wanted: bool) {
        let Some(input) = &self.input else { return };
        if self.always_readable || wanted == self.waiting {
            return;
        }
        let events = Events::new(input, EventSet::IN);
        let done = if wanted {
            ops.add(events)
        } else {
            ops.remove(events)
        };
        match done {
            Ok(()) => self.waiting = wanted,
            Err(event_manager::Error::Epoll(e)) if e.errno() == libc::EPERM => {
                self.always_readable = true;
            }
            Err(error) => tracing::warn!(%error, "standard input is not read"),
        }
    }
}

impl MutEventSubscriber for Console {
    fn init(&mut self, ops: &mut EventOps) {
        if let Err(error) = ops.add(Events::new(self.serial.room(), EventSet::IN)) {
            tracing::warn!(%error, "standard input is not read");
            return;
        }
        self.wait(ops, true);
        if self.always_readable {
            self.pump(ops, true);
        }
    }

    fn process(&mut self, events: Events, ops: &mut EventOps) {
        let room = events.fd() == self.serial.room().as_raw_fd();
        if room {
            let _ = self.serial.room().read();
        }
        self.pump(ops, !room);
    }
}

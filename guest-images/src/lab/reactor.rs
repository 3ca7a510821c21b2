//! Waits for a mux and for descriptors of its owner at once, and does the mux's part.

use std::io;
use std::os::fd::{AsFd, BorrowedFd};
use std::time::Duration;

use rustix::event::{PollFd, PollFlags, Timespec};
use rustix::io::Errno;

use super::mux::{Event, Interest, Mux};

/// What one turn brought.
#[derive(Debug, Default)]
pub(super) struct Turn {
    /// What came over the wire for the owner, in order.
    pub(super) events: Vec<Event>,
    /// For each descriptor of the owner, in its order, whether it is ready (or has failed).
    pub(super) ready: Vec<bool>,
}

/// Waits until something is ready, at most for `timeout`, and moves the streams' bytes.
///
/// # Errors
/// The wire failed or its other end broke the protocol.
pub(super) fn turn(
    mux: &mut Mux,
    own: &[BorrowedFd<'_>],
    timeout: Option<Duration>,
) -> io::Result<Turn> {
    let mut interests = Vec::new();
    let mut fds = Vec::new();
    let busy = mux.interests(|interest, fd, flags| {
        interests.push(interest);
        fds.push(PollFd::from_borrowed_fd(fd, flags));
    });
    let first_own = fds.len();
    fds.extend(
        own.iter()
            .map(|fd| PollFd::from_borrowed_fd(fd.as_fd(), PollFlags::IN)),
    );
    let timeout = if busy { Some(Duration::ZERO) } else { timeout };
    let timeout = timeout.and_then(|timeout| Timespec::try_from(timeout).ok());
    match rustix::event::poll(&mut fds, timeout.as_ref()) {
        Ok(_) => {}
        Err(Errno::INTR) => {
            return Ok(Turn {
                events: Vec::new(),
                ready: vec![false; own.len()],
            });
        }
        Err(error) => return Err(error.into()),
    }
    let ready: Vec<bool> = fds.iter().map(|fd| !fd.revents().is_empty()).collect();
    drop(fds);

    let invalid = |error| io::Error::new(io::ErrorKind::InvalidData, error);
    let mut turn = Turn::default();
    for (interest, _) in interests.iter().zip(&ready).filter(|(_, ready)| **ready) {
        match *interest {
            Interest::Wire => mux.wire_ready(&mut turn.events)?,
            Interest::Source(id) => mux.source_ready(id).map_err(invalid)?,
            Interest::Sink(id) => mux.sink_ready(id).map_err(invalid)?,
        }
    }
    for id in mux.draining() {
        mux.source_ready(id).map_err(invalid)?;
    }
    turn.ready = ready.get(first_own..).unwrap_or_default().to_vec();
    Ok(turn)
}

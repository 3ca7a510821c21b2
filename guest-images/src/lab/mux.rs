//! Carries many byte streams over one wire, each with its own flow control.
//!
//! A stream joins a local file descriptor here to one at the other end. Each direction has a
//! window of [`WINDOW`] bytes: the sender may have no more under way than the receiver has room
//! for, so a stream whose reader is slow fills its own window and never holds up another stream.
//!
//! This file does no waiting: [`Mux::interests`] says what to poll for, [`Mux::wire_ready`],
//! [`Mux::source_ready`] and [`Mux::sink_ready`] do the work.

use std::collections::{BTreeMap, VecDeque};
use std::io::{self, Read, Write};
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};

use rustix::event::PollFlags;
use rustix::io::Errno;
use serde::Serialize;

use super::wire::{Decoder, Frame, MAX_DATA, StreamId, WireError, encode_message};

/// How many bytes of a stream's direction may be under way.
pub(super) const WINDOW: usize = 256 * 1024;

/// Credit is given back in portions of at least this size.
const CREDIT_STEP: usize = WINDOW / 4;

/// No stream is read while more than this waits to be written to the wire.
const OUTBOX_LIMIT: usize = 256 * 1024;

/// What to poll.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Interest {
    /// The wire.
    Wire,
    /// A stream's local source, for reading.
    Source(StreamId),
    /// A stream's local sink, for writing.
    Sink(StreamId),
}

/// What came over the wire for somebody else than the streams.
#[derive(Debug, PartialEq, Eq)]
pub(super) enum Event {
    /// A message.
    Control(Vec<u8>),
    /// The other end has closed the wire.
    Closed,
}

/// All streams of one wire.
#[derive(Debug)]
pub(super) struct Mux {
    wire: std::fs::File,
    decoder: Decoder,
    outbox: VecDeque<u8>,
    streams: BTreeMap<StreamId, Stream>,
}

#[derive(Debug)]
struct Stream {
    outgoing: Outgoing,
    incoming: Incoming,
}

/// From the local source to the other end.
#[derive(Debug)]
enum Outgoing {
    Open {
        /// None has nothing to send, but has not ended.
        source: Option<OwnedFd>,
        credit: usize,
        /// The writer is gone: what can be read now is all that there is.
        draining: bool,
    },
    Done,
}

/// From the other end to the local sink.
#[derive(Debug)]
enum Incoming {
    Open {
        sink: OwnedFd,
        pending: VecDeque<u8>,
        /// Bytes that the other end may still send.
        allowance: usize,
        /// Bytes written to the sink for which no credit was given yet.
        uncredited: usize,
        eof: bool,
    },
    /// The sink is gone; what is still under way is dropped.
    Discarding,
    Done,
}

impl Outgoing {
    fn open(source: Option<OwnedFd>, credit: usize) -> Self {
        Self::Open {
            source,
            credit,
            draining: false,
        }
    }
}

impl Stream {
    fn is_done(&self) -> bool {
        matches!(
            (&self.outgoing, &self.incoming),
            (Outgoing::Done, Incoming::Done)
        )
    }
}

impl Mux {
    /// Uses `wire`, a stream socket or character device that is in non-blocking mode.
    pub(super) fn new(wire: OwnedFd) -> Self {
        Self {
            wire: wire.into(),
            decoder: Decoder::default(),
            outbox: VecDeque::new(),
            streams: BTreeMap::new(),
        }
    }

    /// Opens a stream of which the other end has yet to hear. A direction without a descriptor
    /// does not exist: the other end must have none for it either.
    ///
    /// Nothing is sent on it before the other end has accepted it, so that a message that
    /// announces the stream is always acted upon before its first byte arrives.
    pub(super) fn open(&mut self, id: StreamId, source: Option<OwnedFd>, sink: Option<OwnedFd>) {
        let outgoing = match source {
            Some(source) => Outgoing::open(Some(source), 0),
            None => Outgoing::Done,
        };
        self.insert(id, outgoing, sink);
    }

    /// As [`Mux::open`], for a stream that has both directions, although this end may have
    /// nothing to send.
    pub(super) fn open_both(&mut self, id: StreamId, source: Option<OwnedFd>, sink: OwnedFd) {
        self.insert(id, Outgoing::open(source, 0), Some(sink));
    }

    /// Accepts a stream that the other end has opened.
    ///
    /// # Errors
    /// Only for frames that cannot be encoded.
    pub(super) fn accept(
        &mut self,
        id: StreamId,
        source: Option<OwnedFd>,
        sink: Option<OwnedFd>,
    ) -> Result<(), WireError> {
        let outgoing = match source {
            Some(source) => Outgoing::open(Some(source), WINDOW),
            None => Outgoing::Done,
        };
        let credit = sink.is_some().then_some(WINDOW);
        self.insert(id, outgoing, sink);
        match credit.and_then(|credit| u32::try_from(credit).ok()) {
            Some(credit) => self.queue(&Frame::Credit(id, credit)),
            None => Ok(()),
        }
    }

    fn insert(&mut self, id: StreamId, outgoing: Outgoing, sink: Option<OwnedFd>) {
        let incoming = match sink {
            Some(sink) => Incoming::Open {
                sink,
                pending: VecDeque::new(),
                allowance: WINDOW,
                uncredited: 0,
                eof: false,
            },
            None => Incoming::Done,
        };
        self.streams.insert(id, Stream { outgoing, incoming });
    }

    /// Forgets a stream that the other end has never opened.
    pub(super) fn abandon(&mut self, id: StreamId) {
        self.streams.remove(&id);
    }

    /// Refuses a stream that the other end has opened.
    ///
    /// # Errors
    /// Only for frames that cannot be encoded.
    pub(super) fn refuse(&mut self, id: StreamId) -> Result<(), WireError> {
        self.streams.insert(
            id,
            Stream {
                outgoing: Outgoing::Done,
                incoming: Incoming::Discarding,
            },
        );
        self.queue(&Frame::Eof(id))?;
        self.queue(&Frame::Stop(id))
    }

    /// The writer of this stream's source has ended: send what can be read now, then the end.
    pub(super) fn drain(&mut self, id: StreamId) {
        if let Some(Stream {
            outgoing: Outgoing::Open { draining, .. },
            ..
        }) = self.streams.get_mut(&id)
        {
            *draining = true;
        }
    }

    /// Ends both directions of a stream at once, dropping what is under way to the sink.
    ///
    /// # Errors
    /// Only for frames that cannot be encoded.
    pub(super) fn close(&mut self, id: StreamId) -> Result<(), WireError> {
        self.end_source(id)?;
        self.stop_sink(id)
    }

    /// Ends the direction from the local source.
    ///
    /// # Errors
    /// Only for frames that cannot be encoded.
    pub(super) fn end_source(&mut self, id: StreamId) -> Result<(), WireError> {
        if let Some(stream) = self.streams.get_mut(&id)
            && matches!(stream.outgoing, Outgoing::Open { .. })
        {
            stream.outgoing = Outgoing::Done;
            self.queue(&Frame::Eof(id))?;
            self.forget_if_done(id);
        }
        Ok(())
    }

    /// Ends the direction to the local sink.
    fn stop_sink(&mut self, id: StreamId) -> Result<(), WireError> {
        if let Some(stream) = self.streams.get_mut(&id)
            && let Incoming::Open { eof, .. } = &stream.incoming
        {
            stream.incoming = if *eof {
                Incoming::Done
            } else {
                Incoming::Discarding
            };
            self.queue(&Frame::Stop(id))?;
            self.forget_if_done(id);
        }
        Ok(())
    }

    /// Whether the local source has been sent to its end.
    pub(super) fn source_done(&self, id: StreamId) -> bool {
        self.streams
            .get(&id)
            .is_none_or(|stream| matches!(stream.outgoing, Outgoing::Done))
    }

    /// Whether the local sink has got everything, or takes no more.
    pub(super) fn sink_done(&self, id: StreamId) -> bool {
        self.streams
            .get(&id)
            .is_none_or(|stream| !matches!(stream.incoming, Incoming::Open { .. }))
    }

    /// Queues a message.
    ///
    /// # Errors
    /// The message is too long.
    pub(super) fn send<T: Serialize>(&mut self, message: &T) -> Result<(), WireError> {
        let frame = encode_message(message)?;
        self.queue(&frame)
    }

    fn queue(&mut self, frame: &Frame) -> Result<(), WireError> {
        frame.encode(&mut self.outbox)
    }

    fn forget_if_done(&mut self, id: StreamId) {
        if self.streams.get(&id).is_some_and(Stream::is_done) {
            self.streams.remove(&id);
        }
    }

    /// Calls `add` with everything to poll for now. The answer says whether there is work that
    /// needs no event, so that the poll must not wait.
    pub(super) fn interests<'a>(
        &'a self,
        mut add: impl FnMut(Interest, BorrowedFd<'a>, PollFlags),
    ) -> bool {
        let mut wire = PollFlags::IN;
        if !self.outbox.is_empty() {
            wire |= PollFlags::OUT;
        }
        add(Interest::Wire, self.wire.as_fd(), wire);
        let mut ready = false;
        let room = self.outbox.len() < OUTBOX_LIMIT;
        for (id, stream) in &self.streams {
            if let Outgoing::Open {
                source: Some(source),
                credit,
                draining,
            } = &stream.outgoing
                && *credit > 0
                && room
            {
                add(Interest::Source(*id), source.as_fd(), PollFlags::IN);
                ready |= draining;
            }
            if let Incoming::Open { sink, pending, .. } = &stream.incoming
                && !pending.is_empty()
            {
                add(Interest::Sink(*id), sink.as_fd(), PollFlags::OUT);
            }
        }
        ready
    }

    /// Streams whose source is to be read although no event may come for it.
    pub(super) fn draining(&self) -> Vec<StreamId> {
        let draining = |stream: &Stream| matches!(stream.outgoing, Outgoing::Open { draining: true, credit, .. } if credit > 0);
        self.streams
            .iter()
            .filter(|(_, stream)| draining(stream))
            .map(|(id, _)| *id)
            .collect()
    }

    /// Reads from and writes to the wire; calls `event` for what is not a stream's.
    ///
    /// # Errors
    /// The wire failed, or the other end does not keep to the protocol (as
    /// [`io::ErrorKind::InvalidData`]).
    pub(super) fn wire_ready(&mut self, events: &mut Vec<Event>) -> io::Result<()> {
        self.flush()?;
        let mut buffer = [0; 2 * MAX_DATA];
        match self.wire.read(&mut buffer) {
            Ok(0) => events.push(Event::Closed),
            Ok(read) => {
                self.decoder.push(buffer.get(..read).unwrap_or_default());
                while let Some(frame) = self.decoder.next().map_err(invalid)? {
                    self.receive(frame, events).map_err(invalid)?;
                }
            }
            Err(error) if is_later(&error) => {}
            Err(error) if is_hang_up(&error) => events.push(Event::Closed),
            Err(error) => return Err(error),
        }
        self.flush()
    }

    /// Writes what the wire takes now.
    fn flush(&mut self) -> io::Result<()> {
        while !self.outbox.is_empty() {
            let (front, _) = self.outbox.as_slices();
            match self.wire.write(front) {
                Ok(written) => drop(self.outbox.drain(..written)),
                Err(error) if is_later(&error) => break,
                // Reading will say that the wire is closed, after what is left to read.
                Err(error) if is_hang_up(&error) => {
                    self.outbox.clear();
                    break;
                }
                Err(error) => return Err(error),
            }
        }
        Ok(())
    }

    fn receive(&mut self, frame: Frame, events: &mut Vec<Event>) -> Result<(), WireError> {
        match frame {
            Frame::Control(message) => events.push(Event::Control(message)),
            Frame::Data(id, bytes) => self.receive_data(id, &bytes)?,
            // These three may cross with the end of their stream.
            Frame::Credit(id, bytes) => {
                if let Some(stream) = self.streams.get_mut(&id)
                    && let Outgoing::Open { credit, .. } = &mut stream.outgoing
                {
                    let more = usize::try_from(bytes).unwrap_or(usize::MAX);
                    let sum = credit.checked_add(more).filter(|sum| *sum <= WINDOW);
                    *credit = sum.ok_or(WireError::Overrun(id))?;
                }
            }
            Frame::Eof(id) => {
                if let Some(stream) = self.streams.get_mut(&id) {
                    match &mut stream.incoming {
                        Incoming::Open { pending, eof, .. } if !pending.is_empty() => *eof = true,
                        Incoming::Open { sink, .. } => {
                            end_of_output(sink);
                            stream.incoming = Incoming::Done;
                        }
                        Incoming::Discarding => stream.incoming = Incoming::Done,
                        Incoming::Done => {}
                    }
                    self.forget_if_done(id);
                }
            }
            Frame::Stop(id) => self.end_source(id)?,
        }
        Ok(())
    }

    fn receive_data(&mut self, id: StreamId, bytes: &[u8]) -> Result<(), WireError> {
        let stream = self.streams.get_mut(&id).ok_or(WireError::NoStream(id))?;
        match &mut stream.incoming {
            Incoming::Open {
                pending, allowance, ..
            } => {
                let left = allowance.checked_sub(bytes.len());
                *allowance = left.ok_or(WireError::Overrun(id))?;
                pending.extend(bytes);
                self.sink_ready(id)
            }
            Incoming::Discarding => Ok(()),
            Incoming::Done => Err(WireError::NoStream(id)),
        }
    }

    /// Reads from a stream's source.
    ///
    /// # Errors
    /// Only for frames that cannot be encoded.
    pub(super) fn source_ready(&mut self, id: StreamId) -> Result<(), WireError> {
        let Some(Stream {
            outgoing:
                Outgoing::Open {
                    source: Some(source),
                    credit,
                    draining,
                },
            ..
        }) = self.streams.get_mut(&id)
        else {
            return Ok(());
        };
        if *credit == 0 || self.outbox.len() >= OUTBOX_LIMIT {
            return Ok(());
        }
        let mut buffer = [0; MAX_DATA];
        let most = (*credit).min(MAX_DATA);
        match rustix::io::read(&*source, buffer.get_mut(..most).unwrap_or_default()) {
            Ok(0) => self.end_source(id),
            Ok(read) => {
                *credit = credit.saturating_sub(read);
                let bytes = buffer.get(..read).unwrap_or_default().to_vec();
                self.queue(&Frame::Data(id, bytes))
            }
            Err(Errno::AGAIN) if *draining => self.end_source(id),
            Err(Errno::AGAIN | Errno::INTR) => Ok(()),
            // A terminal's other side is closed (EIO), a peer is gone (ECONNRESET): the end.
            Err(_) => self.end_source(id),
        }
    }

    /// Writes to a stream's sink what it takes now.
    ///
    /// # Errors
    /// Only for frames that cannot be encoded.
    pub(super) fn sink_ready(&mut self, id: StreamId) -> Result<(), WireError> {
        let Some(stream) = self.streams.get_mut(&id) else {
            return Ok(());
        };
        let Incoming::Open {
            sink,
            pending,
            allowance,
            uncredited,
            eof,
        } = &mut stream.incoming
        else {
            return Ok(());
        };
        while !pending.is_empty() {
            let (front, _) = pending.as_slices();
            match rustix::io::write(&*sink, front) {
                Ok(written) => {
                    pending.drain(..written);
                    *uncredited += written;
                }
                Err(Errno::AGAIN) => break,
                Err(Errno::INTR) => {}
                Err(_) => return self.stop_sink(id),
            }
        }
        if pending.is_empty() && *eof {
            end_of_output(sink);
            stream.incoming = Incoming::Done;
            self.forget_if_done(id);
        } else if *uncredited >= CREDIT_STEP && !*eof {
            let credit = u32::try_from(*uncredited).unwrap_or(u32::MAX);
            *allowance += *uncredited;
            *uncredited = 0;
            self.queue(&Frame::Credit(id, credit))?;
        }
        Ok(())
    }
}

/// Says the end of the stream to a socket's peer, which the drop of one of two descriptors would
/// not. For a pipe the drop that follows does.
fn end_of_output(sink: &OwnedFd) {
    // ENOTSOCK is a pipe, ENOTCONN a peer that has gone: neither needs it.
    let _ = rustix::net::shutdown(sink, rustix::net::Shutdown::Write);
}

fn is_later(error: &io::Error) -> bool {
    matches!(
        error.kind(),
        io::ErrorKind::WouldBlock | io::ErrorKind::Interrupted
    )
}

fn is_hang_up(error: &io::Error) -> bool {
    matches!(
        error.kind(),
        io::ErrorKind::BrokenPipe | io::ErrorKind::ConnectionReset
    )
}

fn invalid(error: WireError) -> io::Error {
    io::Error::new(io::ErrorKind::InvalidData, error)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::lab::reactor;
    use rustix::net::{AddressFamily, SocketFlags, SocketType};
    use std::fs::File;
    use std::os::unix::net::UnixStream;
    use std::time::Duration;

    fn socket_pair() -> (OwnedFd, OwnedFd) {
        let flags = SocketFlags::NONBLOCK | SocketFlags::CLOEXEC;
        rustix::net::socketpair(AddressFamily::UNIX, SocketType::STREAM, flags, None).unwrap()
    }

    fn pipe() -> (OwnedFd, OwnedFd) {
        let flags = rustix::pipe::PipeFlags::NONBLOCK | rustix::pipe::PipeFlags::CLOEXEC;
        rustix::pipe::pipe_with(flags).unwrap()
    }

    /// Two ends that take turns until neither has anything to do.
    struct Pair(Mux, Mux);

    impl Pair {
        fn new() -> Self {
            let (a, b) = socket_pair();
            Self(Mux::new(a), Mux::new(b))
        }

        fn settle(&mut self) -> io::Result<()> {
            for _ in 0..200 {
                for mux in [&mut self.0, &mut self.1] {
                    reactor::turn(mux, &[], Some(Duration::ZERO))?;
                }
            }
            Ok(())
        }
    }

    #[test]
    fn bytes_and_their_end_cross_both_ways() {
        let mut pair = Pair::new();
        let (local, remote) = (socket_pair(), socket_pair());
        pair.0
            .open(2, Some(local.1.try_clone().unwrap()), Some(local.1));
        pair.1
            .accept(2, Some(remote.1.try_clone().unwrap()), Some(remote.1))
            .unwrap();
        let (mut local, mut remote) = (UnixStream::from(local.0), UnixStream::from(remote.0));
        local.write_all(b"question").unwrap();
        local.shutdown(std::net::Shutdown::Write).unwrap();
        pair.settle().unwrap();
        let mut text = String::new();
        remote.read_to_string(&mut text).unwrap();
        assert_eq!(text, "question");
        // The other direction is still open.
        remote.write_all(b"answer").unwrap();
        drop(remote);
        pair.settle().unwrap();
        let mut text = String::new();
        local.read_to_string(&mut text).unwrap();
        assert_eq!(text, "answer");
        assert!(pair.0.streams.is_empty() && pair.1.streams.is_empty());
    }

    #[test]
    fn a_blocked_stream_holds_up_nobody_and_loses_nothing() {
        let mut pair = Pair::new();
        let (slow_in, slow_out) = (pipe(), pipe());
        let (fast_in, fast_out) = (pipe(), pipe());
        pair.0.open(2, Some(slow_in.0), None);
        pair.1.accept(2, None, Some(slow_out.1)).unwrap();
        pair.0.open(4, Some(fast_in.0), None);
        pair.1.accept(4, None, Some(fast_out.1)).unwrap();
        let mut slow_writer = File::from(slow_in.1);
        let mut fast_writer = File::from(fast_in.1);
        let (mut slow_reader, mut fast_reader) = (File::from(slow_out.0), File::from(fast_out.0));

        // Nobody reads the slow stream until everything between is full.
        let block: Vec<u8> = (0..=255).cycle().take(4096).collect();
        let mut sent = 0;
        let mut idle = 0;
        while idle < 3 {
            match slow_writer.write(&block) {
                Ok(written) => {
                    sent += written;
                    idle = 0;
                }
                Err(_) => {
                    pair.settle().unwrap();
                    idle += 1;
                }
            }
        }
        assert!(sent >= WINDOW, "{sent}");
        assert!(sent <= 3 * WINDOW, "{sent}");

        // The fast one goes on for several windows.
        let mut received = 0;
        let mut buffer = vec![0; 1 << 20];
        while received < 4 * WINDOW {
            fast_writer.write_all(&block).unwrap();
            pair.settle().unwrap();
            received += fast_reader.read(&mut buffer).unwrap();
        }

        drop(slow_writer);
        let mut all = Vec::new();
        loop {
            pair.settle().unwrap();
            match slow_reader.read(&mut buffer) {
                Ok(0) => break,
                Ok(read) => all.extend_from_slice(&buffer[..read]),
                Err(error) => assert_eq!(error.kind(), io::ErrorKind::WouldBlock),
            }
        }
        assert_eq!(all.len(), sent);
        assert!(
            all.chunks(4096)
                .all(|chunk| chunk.iter().eq(block.iter().take(chunk.len())))
        );
    }

    #[test]
    fn a_reader_that_leaves_stops_the_writer() {
        let mut pair = Pair::new();
        let (source, sink) = (pipe(), pipe());
        pair.0.open(2, Some(source.0), None);
        pair.1.accept(2, None, Some(sink.1)).unwrap();
        drop(sink.0);
        let mut writer = File::from(source.1);
        writer.write_all(b"x").unwrap();
        pair.settle().unwrap();
        let error = writer.write_all(b"x").unwrap_err();
        assert_eq!(error.kind(), io::ErrorKind::BrokenPipe);
        assert!(pair.0.streams.is_empty() && pair.1.streams.is_empty());
    }

    #[test]
    fn a_refused_stream_ends_at_both_ends() {
        let mut pair = Pair::new();
        let (near, far) = socket_pair();
        pair.0.open(2, Some(far.try_clone().unwrap()), Some(far));
        let mut near = UnixStream::from(near);
        near.write_all(b"under way already").unwrap();
        pair.1.refuse(2).unwrap();
        pair.settle().unwrap();
        assert!(pair.0.streams.is_empty() && pair.1.streams.is_empty());
        let mut rest = Vec::new();
        assert!(matches!(near.read_to_end(&mut rest), Ok(0) | Err(_)));
    }

    #[test]
    fn draining_sends_what_is_there_and_then_the_end() {
        let mut pair = Pair::new();
        let (source, sink) = (pipe(), pipe());
        pair.0.open(2, Some(source.0), None);
        pair.1.accept(2, None, Some(sink.1)).unwrap();
        // Somebody else still holds the writing end, as a command's child might.
        let mut writer = File::from(source.1);
        writer.write_all(&[7; 50_000]).unwrap();
        pair.0.drain(2);
        pair.settle().unwrap();
        assert!(pair.0.source_done(2) && pair.1.sink_done(2));
        let mut all = Vec::new();
        File::from(sink.0).read_to_end(&mut all).unwrap();
        assert_eq!(all, [7; 50_000]);
    }

    #[test]
    fn peers_that_break_the_protocol_are_found_out() {
        let data = |id, length| Frame::Data(id, vec![0; length]);
        // The pipe behind the stream takes some of it, for which credit is given.
        let overrun: Vec<Frame> = (0..2 * WINDOW / MAX_DATA)
            .map(|_| data(2, MAX_DATA))
            .collect();
        for (frames, error) in [
            (overrun, WireError::Overrun(2)),
            (vec![data(8, 1)], WireError::NoStream(8)),
            (vec![Frame::Credit(4, u32::MAX)], WireError::Overrun(4)),
            (vec![data(4, 1)], WireError::NoStream(4)),
        ] {
            let (wire, peer) = socket_pair();
            let mut mux = Mux::new(wire);
            let (sink_reader, sink) = pipe();
            let (source, _source_writer) = pipe();
            mux.open(2, None, Some(sink));
            mux.open(4, Some(source), None);
            let mut bytes = Vec::new();
            for frame in &frames {
                frame.encode(&mut bytes).unwrap();
            }
            let mut peer = UnixStream::from(peer);
            let mut rest = bytes.as_slice();
            let mut turns = 0;
            let result = loop {
                if let Ok(written) = peer.write(rest) {
                    rest = &rest[written..];
                }
                let turn = reactor::turn(&mut mux, &[], Some(Duration::ZERO));
                turns += 1;
                if turn.is_err() || turns > 1000 {
                    break turn;
                }
            };
            let message = result.unwrap_err().to_string();
            assert_eq!(message, error.to_string());
            drop(sink_reader);
        }
    }
}

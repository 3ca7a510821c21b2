//! The life of one connection.

use std::collections::VecDeque;
use std::io::{self, Read, Write};
use std::net::Shutdown;
use std::os::unix::net::UnixStream;

use vm_memory::VolatileSlice;

use super::spec::{BUFFER, HEADER_LEN, HOST_CID, Header, MAX_PAYLOAD, TYPE_STREAM, op, shutdown};
use crate::vectored::Vectored;
use crate::virtio::copy_out;

/// Longest first line of a program of the host: `CONNECT 4294967295\n`, with room for a `\r`.
const MAX_LINE: usize = 32;
/// The guest is told of freed buffer space when it is at least this much.
const TELL: u32 = BUFFER / 4;

/// Names a connection, from the guest's point of view.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(super) struct Key {
    pub(super) guest_port: u32,
    pub(super) host_port: u32,
}

/// How far a connection is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum State {
    /// A program of the host has connected; its first line is awaited.
    Line,
    /// The guest was, or is to be, asked.
    Requested,
    /// Data may flow.
    Open,
    /// Ended for the guest; what it sent before is still written to the host.
    Draining,
    /// To be dropped.
    Dead,
}

/// Packets to the guest that are due.
#[derive(Clone, Copy, Debug, Default)]
struct Due {
    request: bool,
    response: bool,
    credit_update: bool,
    credit_request: bool,
    shutdown: u32,
    reset: bool,
}

/// One connection with its socket on the host's side.
pub(super) struct Connection {
    pub(super) key: Key,
    state: State,
    socket: UnixStream,
    /// The socket may have data; it is asked until it has none.
    readable: bool,
    /// The program of the host has closed its end.
    hung_up: bool,
    /// Writing to the socket failed for good.
    deaf: bool,
    /// The program of the host was told that nothing more comes.
    ended: bool,
    /// From the guest, not yet taken by the socket. At most [`BUFFER`] bytes.
    out: VecDeque<u8>,
    /// The guest's buffer space, and what of our data has left it.
    peer_alloc: u32,
    peer_forwarded: u32,
    sent: u32,
    /// What of the guest's data has left our buffer, and what of that the guest knows.
    forwarded: u32,
    told: u32,
    /// Shutdown flags of both sides.
    guest_done: u32,
    host_done: u32,
    due: Due,
    /// Asked for credit since the guest last said how much there is.
    asked: bool,
    /// In the line of those that have something for the guest.
    pub(super) queued: bool,
}

impl Connection {
    fn new(socket: UnixStream, key: Key, state: State) -> Connection {
        Connection {
            key,
            state,
            socket,
            readable: true,
            hung_up: false,
            deaf: false,
            ended: false,
            out: VecDeque::new(),
            peer_alloc: 0,
            peer_forwarded: 0,
            sent: 0,
            forwarded: 0,
            told: 0,
            guest_done: 0,
            host_done: 0,
            due: Due::default(),
            asked: false,
            queued: false,
        }
    }

    /// A program of the host has connected.
    pub(super) fn from_host(socket: UnixStream) -> Connection {
        let key = Key {
            guest_port: 0,
            host_port: 0,
        };
        Connection::new(socket, key, State::Line)
    }

    /// The guest asked by `request` and a program of the host listens.
    pub(super) fn from_guest(socket: UnixStream, key: Key, request: &Header) -> Connection {
        let mut connection = Connection::new(socket, key, State::Open);
        connection.credit(request);
        connection.due.response = true;
        connection
    }

    /// Whether the guest knows it by its key.
    pub(super) fn is_named(&self) -> bool {
        matches!(self.state, State::Requested | State::Open)
    }

    pub(super) fn awaits_line(&self) -> bool {
        self.state == State::Line
    }

    pub(super) fn is_dead(&self) -> bool {
        self.state == State::Dead
    }

    /// Whether only an answer of the guest is missing.
    pub(super) fn is_over(&self) -> bool {
        self.host_done == shutdown::BOTH
    }

    /// The guest port that the program of the host asks for; `None` while its line is not complete.
    /// The stream begins right behind the line.
    ///
    /// # Errors
    ///
    /// The line is not `CONNECT port`, or the program is gone.
    pub(super) fn read_line(&mut self) -> io::Result<Option<u32>> {
        let mut line = [0; MAX_LINE];
        let flags = rustix::net::RecvFlags::PEEK | rustix::net::RecvFlags::DONTWAIT;
        let len = match rustix::net::recv(&self.socket, &mut line, flags) {
            Ok((len, _)) => len,
            Err(rustix::io::Errno::AGAIN | rustix::io::Errno::INTR) => return Ok(None),
            Err(error) => return Err(error.into()),
        };
        let line = line.get(..len).unwrap_or_default();
        let Some(end) = line.iter().position(|&byte| byte == b'\n') else {
            if len == 0 || len == MAX_LINE {
                return Err(io::ErrorKind::InvalidData.into());
            }
            return Ok(None);
        };
        let mut taken = [0; MAX_LINE];
        if let Some(taken) = taken.get_mut(..=end) {
            self.socket.read_exact(taken)?;
        }
        std::str::from_utf8(line.get(..end).unwrap_or_default())
            .ok()
            .and_then(|line| line.strip_prefix("CONNECT "))
            .and_then(|port| port.trim_end_matches('\r').parse().ok())
            .map(Some)
            .ok_or_else(|| io::ErrorKind::InvalidData.into())
    }

    /// Asks the guest for a connection.
    pub(super) fn request(&mut self, key: Key) {
        self.key = key;
        self.state = State::Requested;
        self.due.request = true;
    }

    /// Ends it for both sides, with a packet to the guest if it knows of it.
    pub(super) fn reset(&mut self) {
        if self.is_named() {
            self.due.reset = true;
        } else {
            self.state = State::Dead;
        }
    }

    /// The socket may be readable, writable or closed.
    pub(super) fn ready(&mut self, readable: bool, hung_up: bool) {
        self.readable |= readable;
        self.hung_up |= hung_up;
        if self.hung_up && self.state == State::Requested && !self.due.reset {
            // Nobody waits for the guest's answer any more.
            self.reset();
        }
        let nothing_to_read =
            self.host_done & shutdown::SEND != 0 || self.guest_done & shutdown::RECEIVE != 0;
        if self.hung_up && self.state == State::Open && nothing_to_read {
            self.due.shutdown = shutdown::BOTH & !self.host_done;
        }
    }

    /// Takes note of the guest's buffer space, which every packet tells.
    fn credit(&mut self, header: &Header) {
        self.peer_alloc = header.buf_alloc;
        self.peer_forwarded = header.fwd_cnt;
        self.asked = false;
    }

    /// Bytes that the guest has room for (5.10.6.3).
    fn room(&self) -> u32 {
        let under_way = self.sent.wrapping_sub(self.peer_forwarded);
        self.peer_alloc.saturating_sub(under_way)
    }

    /// A packet from the guest for this connection, with its payload after the header in `slices`;
    /// `len` is the payload's length as far as it is there.
    pub(super) fn take(
        &mut self,
        header: &Header,
        slices: &[VolatileSlice<'_, ()>],
        len: u64,
        vectored: &mut Vectored,
    ) {
        self.credit(header);
        match (header.op, self.state) {
            (op::RST, _) => {
                let drains = self.state == State::Open && !self.out.is_empty() && !self.deaf;
                self.state = if drains { State::Draining } else { State::Dead };
                self.due = Due::default();
            }
            _ if self.due.reset => {}
            (op::RESPONSE, State::Requested) if !self.due.request => {
                self.state = State::Open;
                let line = format!("OK {}\n", self.key.host_port);
                // A fresh socket has room for a line; a program that is gone needs none.
                if (&self.socket).write_all(line.as_bytes()).is_err() {
                    self.reset();
                }
            }
            (op::RW, State::Open) => self.take_data(header, slices, len, vectored),
            (op::CREDIT_UPDATE, State::Open) => {}
            (op::CREDIT_REQUEST, State::Open) => self.due.credit_update = true,
            (op::SHUTDOWN, State::Open) => {
                let new = header.flags & !self.guest_done & shutdown::BOTH;
                self.guest_done |= new;
                if new & shutdown::RECEIVE != 0 {
                    let _ = self.socket.shutdown(Shutdown::Read);
                }
                self.close_when_drained();
            }
            _ => self.reset(),
        }
    }

    fn take_data(
        &mut self,
        header: &Header,
        slices: &[VolatileSlice<'_, ()>],
        available: u64,
        vectored: &mut Vectored,
    ) {
        let kept = u32::try_from(self.out.len()).unwrap_or(u32::MAX);
        let room = BUFFER.saturating_sub(kept);
        if u64::from(header.len) > available
            || header.len > room
            || self.guest_done & shutdown::SEND != 0
        {
            // Not the length that it claims, more than its credit, or after its own end.
            self.reset();
            return;
        }
        let len = usize::try_from(header.len).unwrap_or(0);
        let mut done = 0;
        if self.deaf {
            done = len;
        } else if self.out.is_empty() {
            while done < len {
                match vectored.send(&self.socket, slices, HEADER_LEN + done, len - done) {
                    Ok(0) => break,
                    Ok(sent) => done += sent,
                    Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                    Err(error) if error.kind() == io::ErrorKind::WouldBlock => break,
                    Err(_) => {
                        self.stop_writing();
                        done = len;
                    }
                }
            }
        }
        let mut piece = [0; 4096];
        let mut at = done;
        while at < len {
            let part = (len - at).min(piece.len());
            let piece = &mut piece[..part];
            let copied = copy_out(slices, HEADER_LEN + at, piece);
            if copied == 0 {
                break;
            }
            self.out.extend(&piece[..copied]);
            at += copied;
        }
        self.forward(done);
    }

    /// The program of the host reads no more: what the guest sends is thrown away, and it is told.
    fn stop_writing(&mut self) {
        self.deaf = true;
        self.due.shutdown |= shutdown::RECEIVE & !self.host_done;
    }

    /// `count` bytes of the guest's have left the buffer.
    fn forward(&mut self, count: usize) {
        let count = u32::try_from(count).unwrap_or(u32::MAX);
        self.forwarded = self.forwarded.wrapping_add(count);
        if self.forwarded.wrapping_sub(self.told) >= TELL {
            self.due.credit_update = true;
        }
    }

    /// Writes what was kept, as far as the socket takes it.
    pub(super) fn flush(&mut self) {
        while !self.out.is_empty() {
            let (front, _) = self.out.as_slices();
            let flags = rustix::net::SendFlags::NOSIGNAL | rustix::net::SendFlags::DONTWAIT;
            match rustix::net::send(&self.socket, front, flags) {
                Ok(sent) => {
                    self.out.drain(..sent);
                    self.forward(sent);
                }
                Err(rustix::io::Errno::INTR) => {}
                Err(rustix::io::Errno::AGAIN) => break,
                Err(_) => {
                    self.stop_writing();
                    let lost = self.out.len();
                    self.out.clear();
                    self.forward(lost);
                }
            }
        }
        if self.out.is_empty() {
            // Large buffers are not kept for connections that rest.
            self.out.shrink_to(4096);
            if self.state == State::Draining {
                self.state = State::Dead;
            }
            self.close_when_drained();
        }
    }

    /// Once the guest's data is through: ends the host's direction, and the connection if nothing
    /// can come any more.
    fn close_when_drained(&mut self) {
        if !self.out.is_empty() || self.guest_done & shutdown::SEND == 0 {
            return;
        }
        // Once: every shutdown is an event on the socket, which would lead here again.
        if !std::mem::replace(&mut self.ended, true) {
            let _ = self.socket.shutdown(Shutdown::Write);
        }
        let done = self.guest_done == shutdown::BOTH || self.host_done & shutdown::SEND != 0;
        if done && self.state == State::Open {
            self.due.reset = true;
        }
    }

    /// Whether there is, or may be, a packet for the guest.
    pub(super) fn has_packet(&self) -> bool {
        let due = &self.due;
        let control = due.request
            || due.response
            || due.credit_update
            || due.credit_request
            || due.shutdown != 0
            || due.reset;
        control || self.may_read()
    }

    fn may_read(&self) -> bool {
        self.readable
            && self.state == State::Open
            && self.host_done & shutdown::SEND == 0
            && self.guest_done & shutdown::RECEIVE == 0
            && (self.room() > 0 || !self.asked)
    }

    /// The next packet for the guest. Its payload, up to `limit` bytes, is read from the socket into
    /// `slices`, behind the place of the header.
    pub(super) fn next_packet(
        &mut self,
        guest_cid: u64,
        slices: &[VolatileSlice<'_, ()>],
        limit: usize,
        vectored: &mut Vectored,
    ) -> Option<Header> {
        let due = self.due;
        let header = if due.reset {
            self.state = State::Dead;
            self.header(op::RST)
        } else if due.request {
            self.due.request = false;
            self.header(op::REQUEST)
        } else if due.response {
            self.due.response = false;
            self.header(op::RESPONSE)
        } else if let Some(header) = self.read(slices, limit, vectored) {
            header
        } else if self.due.reset {
            self.state = State::Dead;
            self.header(op::RST)
        } else if self.due.credit_update {
            self.header(op::CREDIT_UPDATE)
        } else if self.due.credit_request {
            self.due.credit_request = false;
            self.header(op::CREDIT_REQUEST)
        } else if self.due.shutdown != 0 {
            self.host_done |= std::mem::take(&mut self.due.shutdown);
            let mut header = self.header(op::SHUTDOWN);
            header.flags = self.host_done;
            self.close_when_drained();
            header
        } else {
            return None;
        };
        // Every packet tells our buffer space.
        self.told = self.forwarded;
        self.due.credit_update = false;
        Some(Header {
            dst_cid: guest_cid,
            ..header
        })
    }

    fn read(
        &mut self,
        slices: &[VolatileSlice<'_, ()>],
        limit: usize,
        vectored: &mut Vectored,
    ) -> Option<Header> {
        if !self.may_read() {
            return None;
        }
        let room = self.room().min(MAX_PAYLOAD);
        if room == 0 {
            self.asked = true;
            self.due.credit_request = true;
            return None;
        }
        let limit = limit.min(usize::try_from(room).unwrap_or(0));
        loop {
            match vectored.read(&self.socket, slices, HEADER_LEN, limit) {
                Ok(0) => {
                    self.readable = false;
                    // A program that only ended its own direction still listens.
                    self.due.shutdown |= if self.hung_up {
                        shutdown::BOTH
                    } else {
                        shutdown::SEND
                    };
                    return None;
                }
                Ok(len) => {
                    let len = u32::try_from(len).unwrap_or(u32::MAX);
                    self.sent = self.sent.wrapping_add(len);
                    let mut header = self.header(op::RW);
                    header.len = len;
                    return Some(header);
                }
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => {
                    self.readable = false;
                    return None;
                }
                Err(_) => {
                    self.readable = false;
                    self.due.reset = true;
                    return None;
                }
            }
        }
    }

    fn header(&self, op: u16) -> Header {
        Header {
            src_cid: HOST_CID,
            src_port: self.key.host_port,
            dst_port: self.key.guest_port,
            kind: TYPE_STREAM,
            op,
            buf_alloc: BUFFER,
            fwd_cnt: self.forwarded,
            ..Header::default()
        }
    }
}

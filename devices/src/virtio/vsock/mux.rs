//! The table of connections, with the sockets behind them.

use std::collections::{HashMap, VecDeque};
use std::io;
use std::mem::MaybeUninit;
use std::os::fd::{AsFd, AsRawFd, OwnedFd, RawFd};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use rustix::event::epoll;
use rustix::net::{AddressFamily, SocketAddrUnix, SocketFlags, SocketType};
use vm_memory::VolatileSlice;

use super::connection::{Connection, Key};
use super::spec::{HOST_CID, Header, TYPE_STREAM, op};
use crate::vectored::Vectored;

/// Connections at a time, those that are being set up or closed among them. With a buffer of 64 KiB
/// each, a guest can take at most 32 MiB of the host's memory.
pub(super) const MAX_CONNECTIONS: usize = 512;
/// Refusals that wait for a receive buffer; while there are more, the guest's packets wait.
const MAX_RESETS: usize = 256;
/// First port that we give to programs of the host; the guest's own choices are below.
const FIRST_PORT: u32 = 1 << 30;
/// Events taken from the host at a time.
const EVENTS: usize = 64;
/// Mark of the listening socket among the events.
const LISTENER: u64 = u64::MAX;

/// Numbers that the device shows.
#[derive(Default)]
pub(super) struct Counters {
    pub(super) connections: AtomicU64,
    pub(super) opened: AtomicU64,
    pub(super) resets: AtomicU64,
    pub(super) malformed: AtomicU64,
    pub(super) to_guest: AtomicU64,
    pub(super) from_guest: AtomicU64,
}

impl Counters {
    pub(super) fn add(counter: &AtomicU64, count: u64) {
        counter.fetch_add(count, Ordering::Relaxed);
    }
}

/// A slot that may have been used again since it was noted: the generation tells.
#[derive(Clone, Copy, PartialEq, Eq)]
struct Token {
    index: u32,
    generation: u32,
}

impl Token {
    fn to_u64(self) -> u64 {
        u64::from(self.generation) << 32 | u64::from(self.index)
    }

    fn from_u64(value: u64) -> Token {
        let bytes = value.to_le_bytes();
        let word = |at: usize| {
            u32::from_le_bytes([bytes[at], bytes[at + 1], bytes[at + 2], bytes[at + 3]])
        };
        Token {
            index: word(0),
            generation: word(4),
        }
    }
}

#[derive(Default)]
struct Slot {
    generation: u32,
    connection: Option<Connection>,
}

/// All connections of one guest.
pub(super) struct Mux {
    guest_cid: u64,
    path: PathBuf,
    listener: Arc<UnixListener>,
    epoll: OwnedFd,
    slots: Vec<Slot>,
    free: Vec<u32>,
    by_key: HashMap<Key, Token>,
    /// Connections that have, or may have, something for the guest, in turn.
    line: VecDeque<Token>,
    resets: VecDeque<Header>,
    /// The listener may have more programs waiting.
    acceptable: bool,
    next_port: u32,
    vectored: Vectored,
    counters: Arc<Counters>,
}

impl Mux {
    /// A table without connections.
    pub(super) fn new(
        guest_cid: u64,
        path: PathBuf,
        listener: Arc<UnixListener>,
        counters: Arc<Counters>,
    ) -> io::Result<Mux> {
        let epoll = epoll::create(epoll::CreateFlags::CLOEXEC)?;
        let flags = epoll::EventFlags::IN | epoll::EventFlags::ET;
        epoll::add(
            &epoll,
            &*listener,
            epoll::EventData::new_u64(LISTENER),
            flags,
        )?;
        Ok(Mux {
            guest_cid,
            path,
            listener,
            epoll,
            slots: Vec::new(),
            free: Vec::new(),
            by_key: HashMap::new(),
            line: VecDeque::new(),
            resets: VecDeque::new(),
            acceptable: true,
            next_port: FIRST_PORT,
            vectored: Vectored::new(),
            counters,
        })
    }

    /// Readable when a socket has changed.
    pub(super) fn fd(&self) -> RawFd {
        self.epoll.as_raw_fd()
    }

    /// Whether the guest's packets can be taken: every one may need an answer.
    pub(super) fn takes_packets(&self) -> bool {
        self.resets.len() < MAX_RESETS
    }

    /// Length of the line.
    #[cfg(test)]
    pub(super) fn waiting(&self) -> usize {
        self.line.len()
    }

    /// Whether there may be a packet for the guest.
    pub(super) fn has_packets(&self) -> bool {
        !self.resets.is_empty() || !self.line.is_empty()
    }

    /// Looks at the sockets; returns how many had something new.
    pub(super) fn collect(&mut self) -> u32 {
        let mut events = [const { MaybeUninit::uninit() }; EVENTS];
        let none = rustix::event::Timespec {
            tv_sec: 0,
            tv_nsec: 0,
        };
        // What does not fit, or an interrupted call, is found the next time: the descriptor stays
        // readable.
        let events = match epoll::wait(&self.epoll, &mut events[..], Some(&none)) {
            Ok((events, _)) => events,
            Err(_) => &mut [],
        };
        let mut seen = 0;
        for event in events {
            seen += 1;
            let data = event.data.u64();
            if data == LISTENER {
                self.acceptable = true;
            } else {
                self.event(Token::from_u64(data), event.flags);
            }
        }
        if self.acceptable {
            seen += self.accept();
        }
        seen
    }

    fn event(&mut self, token: Token, flags: epoll::EventFlags) {
        let Some(connection) = self.get(token) else {
            return;
        };
        use epoll::EventFlags as Flags;
        let hung_up = flags.intersects(Flags::HUP | Flags::ERR);
        let readable = hung_up || flags.intersects(Flags::IN | Flags::RDHUP);
        connection.ready(readable, hung_up);
        if connection.awaits_line() {
            match connection.read_line() {
                Ok(None) if !hung_up => {}
                Ok(Some(port)) => self.request(token, port),
                _ => connection.reset(),
            }
        } else {
            connection.flush();
        }
        self.settle(token);
    }

    /// A program of the host wants to talk to a port of the guest.
    fn request(&mut self, token: Token, guest_port: u32) {
        // There are fewer connections than ports, so one of the first few is free.
        for _ in 0..=MAX_CONNECTIONS {
            let host_port = self.next_port;
            self.next_port = match host_port.wrapping_add(1) {
                port if port > i32::MAX.cast_unsigned() => FIRST_PORT,
                port => port,
            };
            let key = Key {
                guest_port,
                host_port,
            };
            if let std::collections::hash_map::Entry::Vacant(entry) = self.by_key.entry(key) {
                entry.insert(token);
                if let Some(connection) = self.get(token) {
                    connection.request(key);
                }
                return;
            }
        }
    }

    /// Takes programs of the host that have connected, while there is room.
    fn accept(&mut self) -> u32 {
        let mut accepted = 0;
        while self.has_room() {
            match self.listener.accept() {
                Ok((socket, _)) => {
                    accepted += 1;
                    if let Some(token) = self.insert(socket, Connection::from_host) {
                        // Its line may be there already.
                        self.event(token, epoll::EventFlags::empty());
                    }
                }
                Err(error) => match error.kind() {
                    io::ErrorKind::Interrupted | io::ErrorKind::ConnectionAborted => {}
                    io::ErrorKind::WouldBlock => {
                        self.acceptable = false;
                        break;
                    }
                    // No descriptors or memory: they wait until some are free again.
                    _ => break,
                },
            }
        }
        accepted
    }

    /// Whether there is a free slot, or one of a connection that only waits for the guest's last
    /// word, which is then made free.
    fn has_room(&mut self) -> bool {
        if self.slots.len() < MAX_CONNECTIONS || !self.free.is_empty() {
            return true;
        }
        let over = self.slots.iter().position(|slot| {
            let connection = slot.connection.as_ref();
            connection.is_some_and(|connection| connection.is_named() && connection.is_over())
        });
        let Some(index) = over else {
            return false;
        };
        if !self.takes_packets() {
            return false;
        }
        if let Some(connection) = self
            .slots
            .get(index)
            .and_then(|slot| slot.connection.as_ref())
        {
            let reset = Header {
                src_cid: HOST_CID,
                dst_cid: self.guest_cid,
                src_port: connection.key.host_port,
                dst_port: connection.key.guest_port,
                kind: TYPE_STREAM,
                op: op::RST,
                ..Header::default()
            };
            self.resets.push_back(reset);
        }
        self.remove(index);
        true
    }

    /// Registers a socket and puts its connection into a free slot.
    fn insert(
        &mut self,
        socket: UnixStream,
        make: impl FnOnce(UnixStream) -> Connection,
    ) -> Option<Token> {
        if !self.has_room() {
            return None;
        }
        socket.set_nonblocking(true).ok()?;
        let index = match self.free.pop() {
            Some(index) => index,
            None => {
                let index = u32::try_from(self.slots.len()).ok()?;
                self.slots.push(Slot::default());
                index
            }
        };
        let slot = self.slots.get_mut(usize::try_from(index).ok()?)?;
        let token = Token {
            index,
            generation: slot.generation,
        };
        use epoll::EventFlags as Flags;
        let flags = Flags::IN | Flags::OUT | Flags::RDHUP | Flags::ET;
        let data = epoll::EventData::new_u64(token.to_u64());
        if epoll::add(&self.epoll, socket.as_fd(), data, flags).is_err() {
            self.free.push(index);
            return None;
        }
        slot.connection = Some(make(socket));
        Counters::add(&self.counters.connections, 1);
        Counters::add(&self.counters.opened, 1);
        Some(token)
    }

    fn get(&mut self, token: Token) -> Option<&mut Connection> {
        let slot = self.slots.get_mut(usize::try_from(token.index).ok()?)?;
        (slot.generation == token.generation)
            .then_some(slot.connection.as_mut())
            .flatten()
    }

    /// After anything that happened to a connection: into the line, or out of the table.
    fn settle(&mut self, token: Token) {
        let Some(connection) = self.get(token) else {
            return;
        };
        if connection.is_dead() {
            self.remove(usize::try_from(token.index).unwrap_or(usize::MAX));
            return;
        }
        let join = connection.has_packet() && !connection.queued;
        connection.queued |= join;
        let (named, key) = (connection.is_named(), connection.key);
        if join {
            self.line.push_back(token);
        }
        if !named && self.by_key.get(&key) == Some(&token) {
            self.by_key.remove(&key);
        }
    }

    fn remove(&mut self, index: usize) {
        let Some(slot) = self.slots.get_mut(index) else {
            return;
        };
        let (Some(connection), Ok(index)) = (slot.connection.take(), u32::try_from(index)) else {
            return;
        };
        let token = Token {
            index,
            generation: slot.generation,
        };
        slot.generation = slot.generation.wrapping_add(1);
        if connection.queued {
            // Or a guest that gives no receive buffers would make the line grow without end.
            self.line.retain(|other| *other != token);
        }
        if self.by_key.get(&connection.key) == Some(&token) {
            self.by_key.remove(&connection.key);
        }
        self.free.push(index);
        self.counters.connections.fetch_sub(1, Ordering::Relaxed);
    }

    /// A packet from the guest: `slices` holds header and payload, whose length is `len`.
    pub(super) fn take(&mut self, header: &Header, slices: &[VolatileSlice<'_, ()>], len: u64) {
        Counters::add(&self.counters.from_guest, 1);
        if header.src_cid != self.guest_cid {
            // Not from the guest's address: there is nobody to answer.
            Counters::add(&self.counters.malformed, 1);
            return;
        }
        if header.dst_cid != HOST_CID || header.kind != TYPE_STREAM {
            self.refuse(header);
            return;
        }
        let key = Key {
            guest_port: header.src_port,
            host_port: header.dst_port,
        };
        match self.by_key.get(&key).copied() {
            Some(token) => {
                let mut vectored = std::mem::replace(&mut self.vectored, Vectored::empty());
                if let Some(connection) = self.get(token) {
                    connection.take(header, slices, len, &mut vectored);
                }
                self.vectored = vectored;
                self.settle(token);
            }
            None if header.op == op::REQUEST => self.connect(key, header),
            None => self.refuse(header),
        }
    }

    /// A program of the guest wants to talk to a port of the host.
    fn connect(&mut self, key: Key, header: &Header) {
        let token = connect_to(&self.path, key.host_port)
            .ok()
            .and_then(|socket| {
                self.insert(socket, |socket| Connection::from_guest(socket, key, header))
            });
        match token {
            Some(token) => {
                self.by_key.insert(key, token);
                self.settle(token);
            }
            None => self.refuse(header),
        }
    }

    /// Answers with a reset, unless the packet is one.
    fn refuse(&mut self, header: &Header) {
        if header.op != op::RST {
            Counters::add(&self.counters.resets, 1);
            self.resets.push_back(header.reset());
        }
    }

    /// The next packet for the guest; its payload, up to `limit` bytes, is put into `slices` behind
    /// the place of the header.
    pub(super) fn next_packet(
        &mut self,
        slices: &[VolatileSlice<'_, ()>],
        limit: usize,
    ) -> Option<Header> {
        if let Some(reset) = self.resets.pop_front() {
            return Some(reset);
        }
        while let Some(token) = self.line.pop_front() {
            let guest_cid = self.guest_cid;
            let mut vectored = std::mem::replace(&mut self.vectored, Vectored::empty());
            let header = self.get(token).and_then(|connection| {
                connection.queued = false;
                connection.next_packet(guest_cid, slices, limit, &mut vectored)
            });
            self.vectored = vectored;
            self.settle(token);
            if let Some(header) = header {
                if header.op == op::RST {
                    Counters::add(&self.counters.resets, 1);
                }
                Counters::add(&self.counters.to_guest, 1);
                return Some(header);
            }
        }
        None
    }
}

impl Drop for Mux {
    fn drop(&mut self) {
        let left = self.slots.iter().filter(|slot| slot.connection.is_some());
        let left = u64::try_from(left.count()).unwrap_or(0);
        self.counters.connections.fetch_sub(left, Ordering::Relaxed);
    }
}

/// Connects to the program that listens on `path_port`, without waiting: its backlog is full or it
/// takes the connection.
fn connect_to(path: &std::path::Path, port: u32) -> io::Result<UnixStream> {
    let mut name = path.as_os_str().to_owned();
    name.push(format!("_{port}"));
    let address = SocketAddrUnix::new(PathBuf::from(name))?;
    let flags = SocketFlags::NONBLOCK | SocketFlags::CLOEXEC;
    let socket = rustix::net::socket_with(AddressFamily::UNIX, SocketType::STREAM, flags, None)?;
    rustix::net::connect(&socket, &address)?;
    Ok(socket.into())
}

//! A fake driver in shared memory on one side, Unix sockets on the other.

#![allow(
    clippy::cast_possible_truncation,
    reason = "small numbers of a test's own"
)]

use std::collections::VecDeque;
use std::io::{ErrorKind, Read, Write};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use iommu::{DmaMemory, DmaSpace, GuestRam, Iova, SourceId, Upstream};
use proptest::prelude::*;
use vm_memory::GuestAddress;
use vmm_sys_util::eventfd::{EFD_NONBLOCK, EventFd};

use super::mux::{Counters, MAX_CONNECTIONS, Mux};
use super::spec::{BUFFER, HEADER_LEN, HOST_CID, Header, TYPE_STREAM, op, shutdown};
use super::task::Task;
use super::*;
use crate::virtio::{Activation, DmaTask, Ring, RingLayout, Transport, VirtioDevice, Virtqueue};
use crate::worker::{QueueTask, WorkerOptions};

const CID: u64 = 42;
const SIZE: u16 = 64;
const RX: u64 = 0x1_0000;
const TX: u64 = 0x2_0000;
const RX_BUFFERS: u64 = 0x10_0000;
const RX_BUFFER: u64 = 0x1000;
const TX_BUFFERS: u64 = 0x20_0000;
const TX_BUFFER: u64 = 0x1_1000;

/// One split ring from the driver's side; chain `i` uses descriptors `4i` to `4i + 3`.
struct DriverRing {
    base: u64,
    avail: u16,
    seen: u16,
}

impl DriverRing {
    const ENTRIES: u16 = SIZE / 4;

    fn layout(base: u64) -> RingLayout {
        RingLayout {
            size: SIZE,
            desc: base,
            driver: base + 0x4000,
            device: base + 0x8000,
        }
    }

    fn free(&self) -> bool {
        self.avail.wrapping_sub(self.seen) < Self::ENTRIES
    }

    /// Offers a chain of `parts`; returns its index.
    fn offer(&mut self, mem: &DmaMemory, parts: &[(u64, u32)], writable: bool) {
        assert!(self.free() && parts.len() <= 4 && !parts.is_empty());
        let head = (self.avail % Self::ENTRIES) * 4;
        for (i, &(addr, len)) in parts.iter().enumerate() {
            let last = i + 1 == parts.len();
            let flags = u16::from(!last) | u16::from(writable) << 1;
            let next = head + i as u16 + 1;
            let mut desc = addr.to_le_bytes().to_vec();
            desc.extend(len.to_le_bytes());
            desc.extend(flags.to_le_bytes());
            desc.extend(next.to_le_bytes());
            let at = self.base + u64::from(head + i as u16) * 16;
            mem.write(Iova(at), &desc).unwrap();
        }
        let slot = self.base + 0x4004 + u64::from(self.avail % SIZE) * 2;
        mem.write_obj(Iova(slot), head).unwrap();
        self.avail = self.avail.wrapping_add(1);
        mem.write_obj(Iova(self.base + 0x4002), self.avail).unwrap();
    }

    /// The next used chain's index and length.
    fn used(&mut self, mem: &DmaMemory) -> Option<(u64, u32)> {
        let index: u16 = mem.read_obj(Iova(self.base + 0x8002)).unwrap();
        if index == self.seen {
            return None;
        }
        let slot = self.base + 0x8004 + u64::from(self.seen % SIZE) * 8;
        self.seen = self.seen.wrapping_add(1);
        let id: u32 = mem.read_obj(Iova(slot)).unwrap();
        let len: u32 = mem.read_obj(Iova(slot + 4)).unwrap();
        assert_eq!(id % 4, 0);
        Some((u64::from(id / 4), len))
    }
}

/// The guest: its driver, and the device's task run by hand.
struct Guest {
    task: Task,
    mem: DmaMemory,
    rx: DriverRing,
    tx: DriverRing,
    inbox: VecDeque<(Header, Vec<u8>)>,
    path: PathBuf,
    counters: Arc<Counters>,
    _dir: tempfile::TempDir,
    transport: Arc<Transport>,
    notify: [Arc<EventFd>; 2],
}

fn virtqueue(
    index: u16,
    base: u64,
    notify: &Arc<EventFd>,
    transport: &Arc<Transport>,
) -> Virtqueue {
    Virtqueue::new(
        index,
        Ring::new(DriverRing::layout(base), false).unwrap(),
        Arc::clone(notify),
        Arc::clone(transport),
    )
}

impl Guest {
    fn new() -> Guest {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("vsock");
        let listener = UnixListener::bind(&path).unwrap();
        listener.set_nonblocking(true).unwrap();
        let space = DmaSpace::new(
            &Upstream::memory(GuestRam::from_ranges(&[(GuestAddress(0), 0x40_0000)]).unwrap()),
            SourceId(0),
        );
        space.set_bus_master(true);
        let transport = Arc::new(Transport::new("vsock".into(), Vec::new(), 3));
        let counters = Arc::new(Counters::default());
        let mux = Mux::new(CID, path.clone(), Arc::new(listener), counters.clone()).unwrap();
        let notify = [(); 2].map(|()| Arc::new(EventFd::new(EFD_NONBLOCK).unwrap()));
        let task = Task::new(
            DmaTask::new(space.view(), &transport),
            Some(virtqueue(0, RX, &notify[0], &transport)),
            Some(virtqueue(1, TX, &notify[1], &transport)),
            mux,
            counters.clone(),
        );
        let mut guest = Guest {
            task,
            mem: space.view(),
            rx: DriverRing {
                base: RX,
                avail: 0,
                seen: 0,
            },
            tx: DriverRing {
                base: TX,
                avail: 0,
                seen: 0,
            },
            inbox: VecDeque::new(),
            path,
            counters,
            _dir: dir,
            transport,
            notify,
        };
        guest.post();
        guest
    }

    /// Gives all receive buffers, in two pieces each.
    fn post(&mut self) {
        while self.rx.free() {
            let at = RX_BUFFERS + u64::from(self.rx.avail % DriverRing::ENTRIES) * RX_BUFFER;
            let parts = [(at, 50), (at + 50, RX_BUFFER as u32 - 50)];
            self.rx.offer(&self.mem, &parts, true);
        }
    }

    /// Runs the device until it has nothing to do, and takes what it gave.
    fn pump(&mut self) {
        let mut rounds = 0;
        loop {
            rounds += 1;
            assert!(rounds < 10_000, "the device keeps itself busy");
            let work = self.task.poll(64).work;
            while self.tx.used(&self.mem).is_some() {}
            while let Some((chain, len)) = self.rx.used(&self.mem) {
                let mut bytes = vec![0; len as usize];
                let at = RX_BUFFERS + chain * RX_BUFFER;
                self.mem.read(Iova(at), &mut bytes).unwrap();
                let header = Header::from_bytes(bytes[..HEADER_LEN].try_into().unwrap());
                assert_eq!((header.dst_cid, header.len + 44), (CID, len));
                self.inbox.push_back((header, bytes[HEADER_LEN..].to_vec()));
                self.post();
            }
            if work == 0 {
                return;
            }
        }
    }

    /// As the worker would sleep: until a descriptor is readable.
    fn sleep(&mut self) {
        self.task.arm();
        if !self.task.has_work() {
            let mut fds = Vec::new();
            self.task.fds(&mut fds);
            let mut polls: Vec<_> = fds
                .into_iter()
                .map(|fd| libc::pollfd {
                    fd,
                    events: libc::POLLIN,
                    revents: 0,
                })
                .collect();
            // SAFETY: the list is valid for its length.
            #[expect(unsafe_code, reason = "poll")]
            let ready = unsafe { libc::poll(polls.as_mut_ptr(), polls.len() as u64, 20_000) };
            assert!(ready > 0, "nothing wakes the device");
        }
        self.task.disarm();
    }

    fn offer_bytes(&mut self, bytes: &[u8]) {
        while !self.tx.free() {
            self.pump();
        }
        let at = TX_BUFFERS + u64::from(self.tx.avail % DriverRing::ENTRIES) * TX_BUFFER;
        self.mem.write(Iova(at), bytes).unwrap();
        // The header itself in two pieces, the payload apart.
        let cuts = [0, 10.min(bytes.len()), 60.min(bytes.len()), bytes.len()];
        let parts: Vec<_> = cuts
            .windows(2)
            .filter(|cut| cut[0] < cut[1])
            .map(|cut| (at + cut[0] as u64, (cut[1] - cut[0]) as u32))
            .collect();
        self.tx.offer(&self.mem, &parts, false);
    }

    fn send_raw(&mut self, header: Header, payload: &[u8]) {
        let mut bytes = header.to_bytes().to_vec();
        bytes.extend(payload);
        self.offer_bytes(&bytes);
        self.pump();
    }

    /// The next packet for the guest.
    fn receive(&mut self) -> (Header, Vec<u8>) {
        loop {
            self.pump();
            if let Some(packet) = self.inbox.pop_front() {
                return packet;
            }
            self.sleep();
        }
    }

    fn expect_op(&mut self, op: u16) -> Header {
        let (header, _) = self.receive();
        assert_eq!(header.op, op, "{header:?}");
        header
    }

    fn nothing(&mut self) {
        self.pump();
        assert_eq!(self.inbox.pop_front(), None);
    }

    /// A program of the host connects to `port` and the guest accepts.
    fn accept(&mut self, port: u32) -> (UnixStream, Peer) {
        let mut stream = UnixStream::connect(&self.path).unwrap();
        stream
            .set_read_timeout(Some(Duration::from_secs(20)))
            .unwrap();
        writeln!(stream, "CONNECT {port}").unwrap();
        let request = self.expect_op(op::REQUEST);
        assert_eq!((request.dst_port, request.src_cid), (port, HOST_CID));
        let peer = Peer::new(port, request.src_port);
        self.send_raw(peer.header(op::RESPONSE), &[]);
        let expected = format!("OK {}\n", request.src_port);
        let mut line = vec![0; expected.len()];
        stream.read_exact(&mut line).unwrap();
        assert_eq!(line, expected.as_bytes());
        (stream, peer)
    }

    /// The guest connects to a program of the host that listens on `port`.
    fn connect(&mut self, port: u32) -> (UnixStream, Peer) {
        let listener = self.listen(port);
        let peer = Peer::new(9000, port);
        self.send_raw(peer.header(op::REQUEST), &[]);
        let (stream, _) = listener.accept().unwrap();
        stream
            .set_read_timeout(Some(Duration::from_secs(20)))
            .unwrap();
        let response = self.expect_op(op::RESPONSE);
        assert_eq!((response.src_port, response.dst_port), (port, 9000));
        assert_eq!(response.buf_alloc, BUFFER);
        (stream, peer)
    }

    fn listen(&self, port: u32) -> UnixListener {
        UnixListener::bind(format!("{}_{port}", self.path.display())).unwrap()
    }
}

/// The guest's end of a connection.
#[derive(Clone, Copy)]
struct Peer {
    guest_port: u32,
    host_port: u32,
    alloc: u32,
    forwarded: u32,
}

impl Peer {
    fn new(guest_port: u32, host_port: u32) -> Peer {
        Peer {
            guest_port,
            host_port,
            alloc: 256 << 10,
            forwarded: 0,
        }
    }

    fn header(&self, op: u16) -> Header {
        Header {
            src_cid: CID,
            dst_cid: HOST_CID,
            src_port: self.guest_port,
            dst_port: self.host_port,
            kind: TYPE_STREAM,
            op,
            buf_alloc: self.alloc,
            fwd_cnt: self.forwarded,
            ..Header::default()
        }
    }

    fn data(&self, len: usize) -> Header {
        Header {
            len: len as u32,
            ..self.header(op::RW)
        }
    }

    fn shutdown(&self, flags: u32) -> Header {
        Header {
            flags,
            ..self.header(op::SHUTDOWN)
        }
    }
}

fn pattern(len: usize) -> Vec<u8> {
    (0..len).map(|i| (i * 7 + i / 251) as u8).collect()
}

fn at_end(stream: &mut UnixStream) -> bool {
    let mut rest = Vec::new();
    // A reset connection may say so instead.
    stream.read_to_end(&mut rest).is_err() || rest.is_empty()
}

#[test]
fn a_program_of_the_host_connects() {
    let mut guest = Guest::new();
    let (mut stream, mut peer) = guest.accept(1024);
    stream.write_all(b"to the guest").unwrap();
    let (header, data) = guest.receive();
    assert_eq!((header.op, &data[..]), (op::RW, &b"to the guest"[..]));
    assert_eq!((header.src_port, header.dst_port), (peer.host_port, 1024));
    peer.forwarded = 12;
    guest.send_raw(peer.data(11), b"to the host");
    let mut seen = [0; 11];
    stream.read_exact(&mut seen).unwrap();
    assert_eq!(&seen, b"to the host");
    // A second one gets another port.
    let (_second, other) = guest.accept(1024);
    assert_ne!(other.host_port, peer.host_port);
    assert_eq!(
        guest
            .counters
            .connections
            .load(std::sync::atomic::Ordering::Relaxed),
        2
    );
}

#[test]
fn the_stream_begins_right_behind_the_line() {
    let mut guest = Guest::new();
    let mut stream = UnixStream::connect(&guest.path).unwrap();
    // In pieces, and without waiting for the answer.
    stream.write_all(b"CONN").unwrap();
    guest.nothing();
    stream.write_all(b"ECT 77\nearly").unwrap();
    let request = guest.expect_op(op::REQUEST);
    assert_eq!(request.dst_port, 77);
    guest.nothing();
    let peer = Peer::new(77, request.src_port);
    guest.send_raw(peer.header(op::RESPONSE), &[]);
    assert_eq!(guest.receive().1, b"early");
}

#[test]
fn bad_lines_and_refusals_close_the_socket() {
    let mut guest = Guest::new();
    for line in [
        &b"HELLO\n"[..],
        b"CONNECT \n",
        b"CONNECT -1\n",
        b"CONNECT 4294967296\n",
        b"CONNECT 1 2\n",
        b"\xff\n",
        b"CONNECT 00000000000000000000000000000000001\n",
    ] {
        let mut stream = UnixStream::connect(&guest.path).unwrap();
        stream.write_all(line).unwrap();
        guest.nothing();
        assert!(at_end(&mut stream), "{line:?}");
    }
    let mut stream = UnixStream::connect(&guest.path).unwrap();
    stream.write_all(b"CONNECT 5\r\n").unwrap();
    let request = guest.expect_op(op::REQUEST);
    guest.send_raw(Peer::new(5, request.src_port).header(op::RST), &[]);
    assert!(at_end(&mut stream));
    // One that gives up before the guest has answered.
    let mut stream = UnixStream::connect(&guest.path).unwrap();
    stream.write_all(b"CONNECT 6\n").unwrap();
    let request = guest.expect_op(op::REQUEST);
    drop(stream);
    let reset = guest.expect_op(op::RST);
    assert_eq!(reset.src_port, request.src_port);
    guest.send_raw(Peer::new(6, request.src_port).header(op::RESPONSE), &[]);
    guest.expect_op(op::RST);
}

#[test]
fn a_program_of_the_guest_connects() {
    let mut guest = Guest::new();
    let (mut stream, peer) = guest.connect(700);
    guest.send_raw(peer.data(3), b"abc");
    stream.write_all(b"defg").unwrap();
    assert_eq!(guest.receive().1, b"defg");
    let mut seen = [0; 3];
    stream.read_exact(&mut seen).unwrap();
    assert_eq!(&seen, b"abc");
    // Nobody listens there.
    guest.send_raw(Peer::new(1, 701).header(op::REQUEST), &[]);
    let reset = guest.expect_op(op::RST);
    assert_eq!((reset.src_port, reset.dst_port), (701, 1));
    // A request for a connection that exists ends it.
    guest.send_raw(peer.header(op::REQUEST), &[]);
    guest.expect_op(op::RST);
    assert!(at_end(&mut stream));
}

/// Megabytes to an echoing program and back, with both sides' credit observed.
#[test]
fn megabytes_are_echoed() {
    let mut guest = Guest::new();
    let (stream, mut peer) = guest.connect(7);
    let echo = std::thread::spawn(move || {
        let mut stream = stream;
        let mut buffer = vec![0; 100_000];
        let mut total = 0;
        loop {
            match stream.read(&mut buffer).unwrap() {
                0 => return total,
                len => {
                    stream.write_all(&buffer[..len]).unwrap();
                    total += len;
                }
            }
        }
    });
    let data = pattern(5 << 20);
    let (mut sent, mut host_forwarded) = (0usize, 0u32);
    let mut back = Vec::new();
    while back.len() < data.len() {
        let credit = BUFFER - (sent as u32).wrapping_sub(host_forwarded);
        let len = (data.len() - sent).min(credit as usize).min(60_000);
        if len > 0 {
            guest.send_raw(peer.data(len), &data[sent..sent + len]);
            sent += len;
        } else if guest.inbox.is_empty() {
            guest.pump();
            if guest.inbox.is_empty() {
                guest.sleep();
                guest.pump();
            }
        }
        let mut received = false;
        while let Some((header, part)) = guest.inbox.pop_front() {
            assert!(matches!(
                header.op,
                op::RW | op::CREDIT_UPDATE | op::CREDIT_REQUEST
            ));
            host_forwarded = header.fwd_cnt;
            back.extend(part);
            received = true;
        }
        assert!(
            back.len() as u32 - peer.forwarded <= peer.alloc,
            "more than our credit"
        );
        peer.forwarded = back.len() as u32;
        if received {
            guest.send_raw(peer.header(op::CREDIT_UPDATE), &[]);
        }
    }
    assert!(back == data);
    guest.send_raw(peer.shutdown(shutdown::BOTH), &[]);
    assert_eq!(echo.join().unwrap(), data.len());
    loop {
        if guest.receive().0.op == op::RST {
            break;
        }
    }
}

#[test]
fn the_guest_is_held_back_by_a_host_that_does_not_read() {
    let mut guest = Guest::new();
    let (mut stream, peer) = guest.connect(7);
    let data = pattern(4 << 20);
    let (mut sent, mut forwarded) = (0usize, 0u32);
    // Until the socket and our buffer are full.
    loop {
        let credit = (BUFFER - (sent as u32 - forwarded)) as usize;
        if credit == 0 {
            break;
        }
        guest.send_raw(peer.data(credit), &data[sent..sent + credit]);
        sent += credit;
        while let Some((header, _)) = guest.inbox.pop_front() {
            assert_eq!(header.op, op::CREDIT_UPDATE);
        }
        // Ask, as not every freed byte is told.
        guest.send_raw(peer.header(op::CREDIT_REQUEST), &[]);
        forwarded = guest.expect_op(op::CREDIT_UPDATE).fwd_cnt;
    }
    assert!(sent > BUFFER as usize && sent < data.len());
    guest.nothing();
    let mut seen = vec![0; sent];
    let reader = std::thread::spawn(move || {
        stream.read_exact(&mut seen).unwrap();
        (stream, seen)
    });
    while (forwarded as usize) < sent - BUFFER as usize / 4 {
        forwarded = guest.expect_op(op::CREDIT_UPDATE).fwd_cnt;
    }
    let (mut stream, seen) = reader.join().unwrap();
    assert!(seen == data[..sent]);
    // A guest that ignores its credit is cut off.
    loop {
        guest.send_raw(peer.data(BUFFER as usize), &data[..BUFFER as usize]);
        if let Some((header, _)) = guest.inbox.pop_back()
            && header.op == op::RST
        {
            break;
        }
    }
    let mut rest = Vec::new();
    let _ = stream.read_to_end(&mut rest);
}

#[test]
fn the_host_is_held_back_by_a_guest_without_room() {
    let mut guest = Guest::new();
    let listener = guest.listen(7);
    let mut peer = Peer::new(9000, 7);
    peer.alloc = 100;
    guest.send_raw(peer.header(op::REQUEST), &[]);
    let (mut stream, _) = listener.accept().unwrap();
    guest.expect_op(op::RESPONSE);
    stream.write_all(&pattern(250)).unwrap();
    let (header, first) = guest.receive();
    assert_eq!((header.op, first.len()), (op::RW, 100));
    guest.expect_op(op::CREDIT_REQUEST);
    guest.nothing();
    peer.forwarded = 30;
    guest.send_raw(peer.header(op::CREDIT_UPDATE), &[]);
    assert_eq!(guest.receive().1.len(), 30);
    guest.expect_op(op::CREDIT_REQUEST);
    // A claim of having forwarded what was never sent gives no credit.
    peer.forwarded = 5000;
    guest.send_raw(peer.header(op::CREDIT_UPDATE), &[]);
    guest.expect_op(op::CREDIT_REQUEST);
    peer.forwarded = 130;
    peer.alloc = 1000;
    guest.send_raw(peer.header(op::CREDIT_UPDATE), &[]);
    assert_eq!(guest.receive().1, pattern(250)[130..]);
}

#[test]
fn either_side_may_end_its_direction_first() {
    let mut guest = Guest::new();
    let (mut stream, peer) = guest.connect(7);
    stream.write_all(b"last").unwrap();
    stream.shutdown(std::net::Shutdown::Write).unwrap();
    assert_eq!(guest.receive().1, b"last");
    assert_eq!(guest.expect_op(op::SHUTDOWN).flags, shutdown::SEND);
    guest.send_raw(peer.data(5), b"still");
    let mut seen = [0; 5];
    stream.read_exact(&mut seen).unwrap();
    guest.send_raw(peer.shutdown(shutdown::SEND), &[]);
    assert!(at_end(&mut stream));
    guest.expect_op(op::RST);

    let (mut stream, peer) = guest.accept(8);
    guest.send_raw(peer.data(3), b"end");
    guest.send_raw(peer.shutdown(shutdown::SEND), &[]);
    let mut all = Vec::new();
    stream.read_to_end(&mut all).unwrap();
    assert_eq!(all, b"end");
    stream.write_all(b"reply").unwrap();
    assert_eq!(guest.receive().1, b"reply");
    drop(stream);
    let flags = guest.expect_op(op::SHUTDOWN).flags;
    assert_eq!(flags & shutdown::SEND, shutdown::SEND);
    guest.expect_op(op::RST);
    assert_eq!(
        guest
            .counters
            .connections
            .load(std::sync::atomic::Ordering::Relaxed),
        0
    );
}

#[test]
fn a_closed_socket_is_told_after_its_data() {
    let mut guest = Guest::new();
    let (mut stream, peer) = guest.accept(8);
    stream.write_all(b"bye").unwrap();
    drop(stream);
    assert_eq!(guest.receive().1, b"bye");
    assert_eq!(guest.expect_op(op::SHUTDOWN).flags, shutdown::BOTH);
    // What the guest still sends goes nowhere, without harm.
    guest.send_raw(peer.data(3), b"abc");
    guest.send_raw(peer.shutdown(shutdown::BOTH), &[]);
    guest.expect_op(op::RST);
    guest.nothing();
}

#[test]
fn data_sent_before_a_close_still_arrives() {
    let mut guest = Guest::new();
    let (mut stream, peer) = guest.connect(7);
    let data = pattern(4 << 20);
    let (mut sent, mut forwarded) = (0usize, 0u32);
    while sent as u32 - forwarded < BUFFER {
        let credit = (BUFFER - (sent as u32 - forwarded)) as usize;
        guest.send_raw(peer.data(credit), &data[sent..sent + credit]);
        sent += credit;
        guest.inbox.clear();
        guest.send_raw(peer.header(op::CREDIT_REQUEST), &[]);
        forwarded = guest.expect_op(op::CREDIT_UPDATE).fwd_cnt;
    }
    guest.send_raw(peer.shutdown(shutdown::BOTH), &[]);
    guest.nothing();
    // The guest loses patience; its port is free again, our data is not lost.
    guest.send_raw(peer.header(op::RST), &[]);
    let reader = std::thread::spawn(move || {
        let mut all = Vec::new();
        stream.read_to_end(&mut all).unwrap();
        all
    });
    while guest
        .counters
        .connections
        .load(std::sync::atomic::Ordering::Relaxed)
        > 0
    {
        guest.sleep();
        guest.pump();
    }
    assert!(reader.join().unwrap() == data[..sent]);
    guest.nothing();
}

#[test]
fn garbage_is_answered_or_dropped_and_harms_nobody() {
    let mut guest = Guest::new();
    let (mut stream, peer) = guest.connect(7);
    let stranger = Peer::new(1, 2);
    for op in [
        op::RESPONSE,
        op::SHUTDOWN,
        op::RW,
        op::CREDIT_UPDATE,
        0,
        8,
        0xffff,
    ] {
        guest.send_raw(stranger.header(op), &[]);
        let reset = guest.expect_op(op::RST);
        assert_eq!((reset.src_port, reset.dst_port), (2, 1));
    }
    guest.send_raw(stranger.header(op::RST), &[]);
    guest.nothing();
    let mut header = stranger.header(op::REQUEST);
    header.src_cid = CID + 1;
    guest.send_raw(header, &[]);
    guest.nothing();
    for (cid, kind) in [(3, TYPE_STREAM), (HOST_CID, 2), (HOST_CID, 0xffff)] {
        let mut header = stranger.header(op::REQUEST);
        (header.dst_cid, header.kind) = (cid, kind);
        guest.send_raw(header, &[]);
        let reset = guest.expect_op(op::RST);
        assert_eq!((reset.src_cid, reset.kind), (cid, kind));
    }
    // Too short for a header; the device goes on.
    guest.offer_bytes(&[0; HEADER_LEN - 1]);
    guest.nothing();
    guest.send_raw(peer.data(2), b"ok");
    let mut seen = [0; 2];
    stream.read_exact(&mut seen).unwrap();
    // A payload that is not there.
    guest.send_raw(peer.data(100), &[1; 99]);
    guest.expect_op(op::RST);
    assert!(at_end(&mut stream));
    // Data after the guest's own end, and operations that do not belong there.
    for bad in [peer.data(1), peer.header(op::RESPONSE), peer.header(99)] {
        std::fs::remove_file(format!("{}_7", guest.path.display())).unwrap();
        let (mut stream, peer) = guest.connect(7);
        if bad.op == op::RW {
            guest.send_raw(peer.shutdown(shutdown::SEND), &[]);
        }
        guest.send_raw(bad, &[1]);
        guest.expect_op(op::RST);
        assert!(at_end(&mut stream));
    }
}

#[test]
fn refusals_are_bounded_while_the_guest_takes_none() {
    let mut guest = Guest::new();
    // Receive buffers that are not given back, from here on.
    let mut offered = 0;
    let stranger = Peer::new(1, 2);
    let mut stuck = false;
    while offered < 2000 && !stuck {
        let at = TX_BUFFERS;
        let mut header = stranger.header(op::RW);
        header.src_port = offered;
        self::write_header(&guest, at, header);
        guest
            .tx
            .offer(&guest.mem, &[(at, HEADER_LEN as u32)], false);
        offered += 1;
        while guest.task.poll(64).work > 0 {}
        let mut taken = false;
        while guest.tx.used(&guest.mem).is_some() {
            taken = true;
        }
        stuck = !taken;
    }
    assert!(stuck && (256..300).contains(&offered), "{offered}");
    assert!(!guest.task.has_work());
    for port in 0..offered {
        let reset = guest.expect_op(op::RST);
        assert_eq!(reset.dst_port, port);
    }
    guest.nothing();
}

/// Connections that come and go while the guest takes no packets leave nothing behind.
#[test]
fn the_line_is_bounded_while_the_guest_takes_no_packets() {
    let mut guest = Guest::new();
    let listener = guest.listen(5);
    for port in 0..100 {
        for op in [op::REQUEST, op::RST] {
            let header = Peer::new(port, 5).header(op);
            guest.offer_bytes(&header.to_bytes());
            guest.task.poll(64);
            while guest.tx.used(&guest.mem).is_some() {}
        }
        listener.accept().unwrap();
    }
    assert_eq!(guest.task.waiting(), 0);
}

/// Notifications, and nothing to be done about them, must not keep the worker awake.
#[test]
fn a_device_that_stands_still_sleeps_through_notifications() {
    let stop: [fn(&Guest); 2] = [
        |guest| guest.transport.needs_reset(None, &"a fault for the test"),
        |guest| guest.mem.space().set_bus_master(false),
    ];
    for stop in stop {
        let mut guest = Guest::new();
        guest.nothing();
        stop(&guest);
        for notify in &guest.notify {
            notify.write(1).unwrap();
        }
        assert_eq!(guest.task.poll(64).work, 0);
        guest.task.arm();
        assert!(!guest.task.has_work());
        guest.task.disarm();
        for notify in &guest.notify {
            assert!(notify.read().is_err(), "the next sleep would end at once");
        }
    }
}

fn write_header(guest: &Guest, at: u64, header: Header) {
    guest.mem.write(Iova(at), &header.to_bytes()).unwrap();
}

#[test]
fn connections_are_bounded_and_slots_used_again() {
    raise_descriptor_limit();
    let mut guest = Guest::new();
    let listener = guest.listen(7);
    let mut streams = Vec::new();
    for port in 0..MAX_CONNECTIONS as u32 {
        guest.send_raw(Peer::new(port, 7).header(op::REQUEST), &[]);
        guest.expect_op(op::RESPONSE);
        streams.push(listener.accept().unwrap().0);
    }
    guest.send_raw(Peer::new(100_000, 7).header(op::REQUEST), &[]);
    guest.expect_op(op::RST);
    // A program of the host waits until there is room.
    let mut waiting = UnixStream::connect(&guest.path).unwrap();
    waiting.write_all(b"CONNECT 5\n").unwrap();
    guest.nothing();
    // A connection that the host has closed gives way even if the guest says nothing.
    drop(streams.pop());
    assert_eq!(guest.expect_op(op::SHUTDOWN).flags, shutdown::BOTH);
    let mut ops = [guest.receive().0.op, guest.receive().0.op];
    ops.sort_unstable();
    assert_eq!(ops, [op::REQUEST, op::RST]);
    guest.send_raw(Peer::new(3, 7).header(op::RST), &[]);
    guest.send_raw(Peer::new(100_001, 7).header(op::REQUEST), &[]);
    guest.expect_op(op::RESPONSE);
}

/// Each connection has a descriptor on both sides of the test.
fn raise_descriptor_limit() {
    use rustix::process::{Resource, Rlimit, getrlimit, setrlimit};
    let limit = getrlimit(Resource::Nofile);
    let raised = Rlimit {
        current: limit.maximum,
        ..limit
    };
    setrlimit(Resource::Nofile, raised).unwrap();
}

#[test]
fn useless_receive_buffers_are_given_back() {
    let mut guest = Guest::new();
    let (_, first) = (guest.pump(), guest.rx.avail);
    // Use up the good buffers with refusals, then give small ones.
    for _ in 0..DriverRing::ENTRIES {
        write_header(&guest, TX_BUFFERS, Peer::new(1, 2).header(op::RW));
        guest.tx.offer(&guest.mem, &[(TX_BUFFERS, 44)], false);
        guest.task.poll(64);
        while guest.tx.used(&guest.mem).is_some() {}
    }
    let mut given = 0;
    while guest.rx.used(&guest.mem).is_some() {
        given += 1;
    }
    assert_eq!(given, DriverRing::ENTRIES);
    assert_eq!(guest.rx.avail, first);
    guest.rx.offer(&guest.mem, &[(RX_BUFFERS, 44)], true);
    write_header(&guest, TX_BUFFERS, Peer::new(1, 2).header(op::RW));
    guest.tx.offer(&guest.mem, &[(TX_BUFFERS, 44)], false);
    while guest.task.poll(64).work > 0 {}
    assert_eq!(guest.rx.used(&guest.mem).map(|(_, len)| len), Some(0));
    guest.post();
    guest.expect_op(op::RST);
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(64))]

    /// Any packets at all: no panic, and an honest connection works afterwards.
    #[test]
    fn random_packets_do_no_harm(
        packets in prop::collection::vec(
            (0u16..10, 0u32..3, 0u32..3, any::<u32>(), any::<u32>(), any::<u32>(), 0usize..200),
            1..60,
        ),
    ) {
        let mut guest = Guest::new();
        let listener = guest.listen(1);
        listener.set_nonblocking(true).unwrap();
        let mut streams = Vec::new();
        for (op, src_port, dst_port, flags, buf_alloc, fwd_cnt, len) in packets {
            let mut header = Peer::new(src_port, dst_port).header(op);
            header.flags = flags;
            header.buf_alloc = buf_alloc;
            header.fwd_cnt = fwd_cnt;
            header.len = if flags & 4 == 0 { len as u32 } else { buf_alloc };
            guest.send_raw(header, &vec![7; len]);
            if let Ok((stream, _)) = listener.accept() {
                let _ = (&stream).write_all(b"from the host");
                streams.push(stream);
            }
            if flags & 0x300 == 0 {
                streams.pop();
            }
        }
        drop(streams);
        guest.pump();
        guest.inbox.clear();
        let (mut stream, peer) = guest.accept(5);
        guest.send_raw(peer.data(2), b"ok");
        let mut seen = [0; 2];
        stream.read_exact(&mut seen).unwrap();
    }
}

fn refused(cid: u64, path: &std::path::Path) -> String {
    let result = VirtioVsock::new(cid, path, WorkerOptions::default());
    let text = result.err().expect("made").to_string();
    assert!(text.lines().count() == 1);
    text
}

#[test]
fn bad_paths_and_ids_are_refused() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("vsock");
    for cid in [0, 1, 2, 0xffff_ffff, u64::MAX] {
        assert!(refused(cid, &path).contains("from 3"));
    }
    let long = dir.path().join("x".repeat(100));
    assert!(refused(3, &long).contains("at most 96"));
    assert!(refused(3, &dir.path().join("none/vsock")).contains("none/vsock"));
    std::fs::write(&path, "a file").unwrap();
    assert!(refused(3, &path).contains("not a socket"));
    std::fs::remove_file(&path).unwrap();
    let first = VirtioVsock::new(3, &path, WorkerOptions::default()).unwrap();
    assert!(refused(4, &path).contains("listens there"));
    drop(first);
    assert!(!path.exists(), "left behind");
    // One that a dead process left.
    drop(UnixListener::bind(&path).unwrap());
    assert!(path.exists());
    VirtioVsock::new(3, &path, WorkerOptions::default()).unwrap();
}

/// The whole device with its worker: notifications wake it, a reset ends what there was.
#[test]
fn the_worker_serves_and_a_reset_ends_connections() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("vsock");
    let device = VirtioVsock::new(CID, &path, WorkerOptions::default()).unwrap();
    let transport = Arc::new(Transport::new("vsock".into(), Vec::new(), 3));
    device.attach(&transport);
    let mut config = [0xff; 10];
    device.config_read(0, &mut config);
    assert_eq!(config, [42, 0, 0, 0, 0, 0, 0, 0, 0xff, 0xff]);
    device.config_read(100, &mut config);
    // Before the guest is up.
    let mut stream = UnixStream::connect(&path).unwrap();
    stream.write_all(b"CONNECT 9\n").unwrap();
    for _ in 0..3 {
        let space = DmaSpace::new(
            &Upstream::memory(GuestRam::from_ranges(&[(GuestAddress(0), 0x40_0000)]).unwrap()),
            SourceId(0),
        );
        space.set_bus_master(true);
        let mem = space.view();
        let mut rx = DriverRing {
            base: RX,
            avail: 0,
            seen: 0,
        };
        for at in 0..4 {
            rx.offer(&mem, &[(RX_BUFFERS + at * 4096, 4096)], true);
        }
        let event = Arc::new(EventFd::new(EFD_NONBLOCK).unwrap());
        let queues = vec![
            Some(virtqueue(0, RX, &event, &transport)),
            Some(virtqueue(1, TX, &event, &transport)),
            None,
        ];
        let activation = Activation {
            features: 0,
            queues,
            dma: space.clone(),
        };
        device.activate(activation).unwrap();
        let (chain, len) = loop {
            match rx.used(&mem) {
                Some(used) => break used,
                None => std::thread::yield_now(),
            }
        };
        let mut bytes = [0; HEADER_LEN];
        mem.read(Iova(RX_BUFFERS + chain * 4096), &mut bytes)
            .unwrap();
        let header = Header::from_bytes(&bytes);
        assert_eq!((header.op, header.dst_port, len), (op::REQUEST, 9, 44));
        assert_eq!(device.stats().connections, 1);
        device.reset();
        assert_eq!(device.stats().connections, 0);
        stream
            .set_read_timeout(Some(Duration::from_secs(20)))
            .unwrap();
        let end = stream.read(&mut [0; 8]);
        assert!(
            matches!(&end, Ok(0)) || end.is_err_and(|e| e.kind() == ErrorKind::ConnectionReset)
        );
        stream = UnixStream::connect(&path).unwrap();
        stream.write_all(b"CONNECT 9\n").unwrap();
    }
}

//! What every network back end must do.

use std::io;
use std::os::fd::RawFd;
use std::sync::Arc;

use vm_memory::VolatileSlice;

use super::{HEADER_LEN, NetBackend, NetQueue, Offloads};

/// Makes a frame arrive for a queue that is the only active one.
pub type Arrive = Box<dyn FnMut(&mut dyn NetQueue, &[u8])>;

/// A back end of at least two pairs under test.
pub struct Rig {
    pub backend: Arc<dyn NetBackend>,
    pub arrive: Arrive,
    /// Whether it offers offloads on receive.
    pub offloads_change: bool,
}

/// The `EtherType` for local experiments (IEEE 802, 0x88b5): what the host sends by itself has others.
const ETHER_TYPE: [u8; 2] = [0x88, 0xb5];

/// A broadcast frame of `len` bytes.
pub fn frame(seed: u8, len: usize) -> Vec<u8> {
    let mut frame = vec![0xff; 6];
    frame.extend([2, 0, 0, 0, 0, 9]);
    frame.extend(ETHER_TYPE);
    while frame.len() < len {
        frame.push(seed.wrapping_add(frame.len().to_le_bytes()[0]));
    }
    frame
}

/// A frame behind an empty header.
pub fn packet(frame: &[u8]) -> Vec<u8> {
    let mut packet = vec![0; HEADER_LEN];
    packet.extend(frame);
    packet
}

/// Sends from buffers of odd sizes.
pub fn send(queue: &mut dyn NetQueue, packet: &[u8]) -> io::Result<()> {
    let mut bytes = packet.to_vec();
    let parts: Vec<_> = bytes.chunks_mut(13).map(VolatileSlice::from).collect();
    if parts.len() <= 1024 {
        return queue.send(&parts);
    }
    drop(parts);
    queue.send(&[VolatileSlice::from(bytes.as_mut_slice())])
}

/// Receives a packet of ours into buffers of odd sizes.
pub fn receive(queue: &mut dyn NetQueue) -> Option<Vec<u8>> {
    loop {
        let mut bytes = vec![0xa5; 80_000];
        let (small, large) = bytes.split_at_mut(100);
        let mut parts: Vec<_> = small.chunks_mut(7).map(VolatileSlice::from).collect();
        parts.push(VolatileSlice::from(large));
        let len = queue.receive(&parts).unwrap()?;
        bytes.truncate(len);
        if bytes.get(HEADER_LEN + 12..HEADER_LEN + 14) == Some(&ETHER_TYPE) {
            return Some(bytes);
        }
    }
}

/// Whether the descriptor becomes readable within `millis`.
pub fn readable(fd: RawFd, millis: i32) -> bool {
    let mut poll = libc::pollfd {
        fd,
        events: libc::POLLIN,
        revents: 0,
    };
    // SAFETY: one valid pollfd.
    #[expect(unsafe_code, reason = "poll")]
    let ready = unsafe { libc::poll(&raw mut poll, 1, millis) };
    ready == 1 && poll.revents & libc::POLLIN != 0
}

/// Receives, waiting for it.
pub fn wait(queue: &mut dyn NetQueue) -> Vec<u8> {
    loop {
        if let Some(packet) = receive(queue) {
            return packet;
        }
        let fd = queue.fd().expect("no packet and no descriptor");
        assert!(readable(fd, 20_000), "a packet did not make it readable");
    }
}

pub fn run(make: &mut dyn FnMut() -> Rig) {
    pairs_are_exclusive(&make());
    packets_arrive_whole_and_wake(&mut make());
    packets_that_do_not_fit_are_dropped(&mut make());
    let rig = make();
    if rig.offloads_change {
        let all = rig.backend.receive_offloads();
        assert!(all.checksum && all.tso4 && all.tso6);
        rig.backend.set_receive_offloads(all).unwrap();
        rig.backend
            .set_receive_offloads(Offloads::default())
            .unwrap();
    }
}

fn pairs_are_exclusive(rig: &Rig) {
    let pairs = rig.backend.max_pairs();
    let open = |index| rig.backend.clone().open_queue(index);
    assert!(pairs >= 2 && open(pairs).is_err() && open(u16::MAX).is_err());
    let first = open(0).unwrap();
    assert_eq!(open(0).err().unwrap().kind(), io::ErrorKind::ResourceBusy);
    let second = open(1).unwrap();
    drop(first);
    drop(open(0).unwrap());
    drop(second);
    for bad in [0, pairs + 1, u16::MAX] {
        let error = rig.backend.set_active_pairs(bad).unwrap_err();
        assert_eq!(error.kind(), io::ErrorKind::InvalidInput);
    }
    for good in [pairs, 1, 2] {
        rig.backend.set_active_pairs(good).unwrap();
    }
}

fn packets_arrive_whole_and_wake(rig: &mut Rig) {
    let mut queue = rig.backend.clone().open_queue(0).unwrap();
    assert_eq!(receive(&mut *queue), None);
    for round in 0..3 {
        for len in [60, 64, 200, 1500] {
            let frame = frame(round, len);
            (rig.arrive)(&mut *queue, &frame);
            (rig.arrive)(&mut *queue, &frame);
            assert!(readable(queue.fd().unwrap(), 20_000));
            for _ in 0..2 {
                assert_eq!(wait(&mut *queue), packet(&frame));
            }
        }
    }
}

fn packets_that_do_not_fit_are_dropped(rig: &mut Rig) {
    let mut queue = rig.backend.clone().open_queue(0).unwrap();
    while receive(&mut *queue).is_some() {}
    let before = rig.backend.drops();
    (rig.arrive)(&mut *queue, &frame(1, 1000));
    (rig.arrive)(&mut *queue, &frame(2, 100));
    assert!(readable(queue.fd().unwrap(), 20_000));
    let mut bytes = vec![0; HEADER_LEN + 100];
    let mut received = None;
    while received.is_none() {
        let part = VolatileSlice::from(bytes.as_mut_slice());
        received = queue.receive(&[part]).unwrap();
        let ours = bytes[HEADER_LEN + 12..HEADER_LEN + 14] == ETHER_TYPE;
        received = received.filter(|_| ours);
    }
    assert_eq!(received, Some(HEADER_LEN + 100));
    assert_eq!(bytes, packet(&frame(2, 100)));
    assert!(rig.backend.drops() > before);
    // A buffer that has no room for the header.
    (rig.arrive)(&mut *queue, &frame(3, 100));
    assert!(readable(queue.fd().unwrap(), 20_000));
    let part = VolatileSlice::from(&mut bytes[..HEADER_LEN - 1]);
    assert_eq!(queue.receive(&[part]).unwrap(), None);
    (rig.arrive)(&mut *queue, &frame(4, 100));
    assert_eq!(wait(&mut *queue), packet(&frame(4, 100)));
}

//! The guest's packets back to the guest.

use std::io;
use std::os::fd::{AsRawFd, RawFd};
use std::sync::atomic::{AtomicBool, AtomicU16, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use vm_memory::VolatileSlice;
use vmm_sys_util::eventfd::{EFD_CLOEXEC, EFD_NONBLOCK, EventFd};

use super::ring::PacketRing;
use super::{HEADER_LEN, NetBackend, NetQueue, Offloads};

/// Room for waiting packets of one pair, in bytes.
const RING: usize = 1 << 20;
/// Longest packet with its header: segmentation offload fills an IP packet of 64 KiB.
const MAX_PACKET: usize = HEADER_LEN + 65_535 + 18;

/// `virtio_net_hdr` (Virtio 1.2, 5.1.6): `VIRTIO_NET_HDR_F_NEEDS_CSUM` in `flags`.
const NEEDS_CSUM: u8 = 1;
/// Values of `gso_type`.
const GSO_NONE: u8 = 0;
const GSO_TCPV4: u8 = 1;
const GSO_TCPV6: u8 = 4;
const GSO_UDP_L4: u8 = 5;
/// A flag in `gso_type`.
const GSO_ECN: u8 = 0x80;

/// A packet sent on pair i is received on pair i, or on pair i modulo the active pairs.
///
/// The guest sees on receive what a NIC would make of its packet: a partial checksum stays partial
/// if the driver takes that, and is completed otherwise. Segments that the driver does not take are
/// dropped. A pair's waiting packets are bounded to 1 MiB; what does not fit is dropped.
pub struct Loopback {
    pairs: Box<[Pair]>,
    active: AtomicU16,
    drops: AtomicU64,
}

/// Used by the pair's own worker alone while all pairs that send are active: its lock is free then.
struct Pair {
    open: AtomicBool,
    arrived: EventFd,
    state: Mutex<State>,
}

struct State {
    ring: PacketRing,
    offloads: Offloads,
    /// The receiver found nothing since it was last told.
    waits: bool,
    /// The eventfd was written and not yet read.
    told: bool,
}

impl Loopback {
    /// A loopback of `pairs` queue pairs (at least 1).
    ///
    /// # Errors
    ///
    /// The host has no file descriptors left.
    pub fn new(pairs: u16) -> io::Result<Arc<Loopback>> {
        let pairs = (0..pairs.max(1))
            .map(|_| {
                Ok(Pair {
                    open: AtomicBool::new(false),
                    arrived: EventFd::new(EFD_NONBLOCK | EFD_CLOEXEC)?,
                    state: Mutex::new(State {
                        ring: PacketRing::new(RING),
                        offloads: Offloads::default(),
                        waits: true,
                        told: false,
                    }),
                })
            })
            .collect::<io::Result<_>>()?;
        Ok(Arc::new(Loopback {
            pairs,
            active: AtomicU16::new(1),
            drops: AtomicU64::new(0),
        }))
    }

    fn pair(&self, index: u16) -> Option<&Pair> {
        self.pairs.get(usize::from(index))
    }

    fn drop_packets(&self, count: usize) {
        let count = u64::try_from(count).unwrap_or(u64::MAX);
        self.drops.fetch_add(count, Ordering::Relaxed);
    }
}

impl Pair {
    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl NetBackend for Loopback {
    fn transmit_offloads(&self) -> Offloads {
        Offloads {
            checksum: true,
            tso4: true,
            tso6: true,
            ecn: true,
            uso: true,
        }
    }

    fn receive_offloads(&self) -> Offloads {
        self.transmit_offloads()
    }

    fn set_receive_offloads(&self, offloads: Offloads) -> io::Result<()> {
        for pair in &self.pairs {
            pair.lock().offloads = offloads;
        }
        Ok(())
    }

    fn max_pairs(&self) -> u16 {
        u16::try_from(self.pairs.len()).unwrap_or(u16::MAX)
    }

    fn set_active_pairs(&self, pairs: u16) -> io::Result<()> {
        if pairs == 0 || pairs > self.max_pairs() {
            return Err(io::ErrorKind::InvalidInput.into());
        }
        self.active.store(pairs, Ordering::Release);
        for pair in self.pairs.iter().skip(usize::from(pairs)) {
            self.drop_packets(pair.lock().ring.clear());
        }
        Ok(())
    }

    fn open_queue(self: Arc<Self>, index: u16) -> io::Result<Box<dyn NetQueue>> {
        let pair = self.pair(index).ok_or(io::ErrorKind::InvalidInput)?;
        if pair.open.swap(true, Ordering::AcqRel) {
            return Err(io::ErrorKind::ResourceBusy.into());
        }
        Ok(Box::new(LoopbackQueue {
            backend: self,
            index,
        }))
    }

    fn drops(&self) -> u64 {
        self.drops.load(Ordering::Relaxed)
    }
}

struct LoopbackQueue {
    backend: Arc<Loopback>,
    index: u16,
}

impl LoopbackQueue {
    fn own(&self) -> &Pair {
        &self.backend.pairs[usize::from(self.index)]
    }
}

impl NetQueue for LoopbackQueue {
    fn send(&mut self, packet: &[VolatileSlice<'_, ()>]) -> io::Result<()> {
        let len = packet
            .iter()
            .try_fold(0usize, |sum, part| sum.checked_add(part.len()))
            .filter(|len| (HEADER_LEN..=MAX_PACKET).contains(len));
        let target = self.index % self.backend.active.load(Ordering::Acquire).max(1);
        let (Some(len), Some(pair)) = (len, self.backend.pair(target)) else {
            self.backend.drop_packets(1);
            return Err(io::ErrorKind::InvalidInput.into());
        };
        let mut state = pair.lock();
        let State { ring, offloads, .. } = &mut *state;
        let pushed = pair.open.load(Ordering::Acquire)
            && ring.push(len, packet, |packet| turn(packet, *offloads)) == Some(true);
        if !pushed {
            self.backend.drop_packets(1);
        } else if state.waits {
            // One system call for the first of a batch: the receiver is told again only after it
            // has found the ring empty.
            state.waits = false;
            state.told = true;
            let _ = pair.arrived.write(1);
        }
        // A NIC does not tell the sender either that the wire was full.
        Ok(())
    }

    fn receive(&mut self, buffers: &[VolatileSlice<'_, ()>]) -> io::Result<Option<usize>> {
        let pair = self.own();
        let room = buffers
            .iter()
            .fold(0usize, |sum, part| sum.saturating_add(part.len()));
        let mut state = pair.lock();
        loop {
            let copied = state.ring.pop(|packet| {
                if packet.len() > room {
                    return None;
                }
                let mut done = 0;
                for part in buffers {
                    let len = part.len().min(packet.len() - done);
                    part.copy_from(&packet[done..done + len]);
                    done += len;
                }
                Some(packet.len())
            });
            match copied {
                Some(Some(len)) => return Ok(Some(len)),
                Some(None) => self.backend.drop_packets(1),
                None => break,
            }
        }
        state.waits = true;
        if std::mem::take(&mut state.told) {
            let _ = pair.arrived.read();
        }
        Ok(None)
    }

    fn fd(&self) -> Option<RawFd> {
        Some(self.own().arrived.as_raw_fd())
    }
}

impl Drop for LoopbackQueue {
    fn drop(&mut self) {
        let pair = self.own();
        let mut state = pair.lock();
        self.backend.drop_packets(state.ring.clear());
        pair.open.store(false, Ordering::Release);
    }
}

/// Makes of a packet as sent one as received; false if the driver cannot take it.
fn turn(packet: &mut [u8], takes: Offloads) -> bool {
    let Some((header, frame)) = packet.split_first_chunk_mut::<HEADER_LEN>() else {
        return false;
    };
    let gso_type = header[1];
    let segments = match gso_type & !GSO_ECN {
        GSO_NONE => gso_type == GSO_NONE,
        GSO_TCPV4 => takes.tso4,
        GSO_TCPV6 => takes.tso6,
        GSO_UDP_L4 => takes.uso && gso_type == GSO_UDP_L4,
        _ => false,
    };
    if !segments || (gso_type & GSO_ECN != 0 && !takes.ecn) {
        return false;
    }
    // No other flag means anything from a sender; `num_buffers` is the receiving device's.
    header[0] &= NEEDS_CSUM;
    header[10..].fill(0);
    if header[0] == NEEDS_CSUM && !takes.checksum {
        let word = |at: usize| usize::from(u16::from_le_bytes([header[at], header[at + 1]]));
        let (start, offset) = (word(6), word(8));
        if gso_type != GSO_NONE || !complete_checksum(frame, start, offset) {
            return false;
        }
        header.fill(0);
    }
    true
}

/// Completes the checksum over the frame from `start` on, whose field, `offset` bytes further, holds
/// the sum of the pseudo header (Virtio 1.2, 5.1.6.2). False if that is not inside the frame.
fn complete_checksum(frame: &mut [u8], start: usize, offset: usize) -> bool {
    let Some(covered) = frame.get_mut(start..) else {
        return false;
    };
    if covered.len() < offset + 2 {
        return false;
    }
    let mut sum = covered
        .chunks(2)
        .map(|pair| {
            u64::from(u16::from_be_bytes([
                pair[0],
                pair.get(1).copied().unwrap_or(0),
            ]))
        })
        .sum::<u64>();
    while sum > 0xffff {
        sum = (sum & 0xffff) + (sum >> 16);
    }
    // Zero would mean "no checksum" in UDP, and all ones is the same number.
    let checksum = match !u16::try_from(sum).unwrap_or(0) {
        0 => 0xffff,
        checksum => checksum,
    };
    covered[offset..offset + 2].copy_from_slice(&checksum.to_be_bytes());
    true
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::net::suite::{self, Rig, frame, packet};

    const ALL: Offloads = Offloads {
        checksum: true,
        tso4: true,
        tso6: true,
        ecn: true,
        uso: true,
    };

    #[test]
    fn passes_the_suite() {
        suite::run(&mut || {
            let backend = Loopback::new(4).unwrap();
            Rig {
                backend,
                arrive: Box::new(|queue, frame| suite::send(queue, &packet(frame)).unwrap()),
                offloads_change: true,
            }
        });
    }

    #[test]
    fn inactive_pairs_map_onto_active_ones() {
        let backend = Loopback::new(4).unwrap();
        backend.set_active_pairs(2).unwrap();
        let mut queues: Vec<_> = (0..4)
            .map(|index| backend.clone().open_queue(index).unwrap())
            .collect();
        for queue in &mut queues {
            suite::send(&mut **queue, &packet(&frame(7, 60))).unwrap();
        }
        for (index, expected) in [2, 2, 0, 0].into_iter().enumerate() {
            let queue = &mut *queues[index];
            for _ in 0..expected {
                assert_eq!(suite::receive(queue), Some(packet(&frame(7, 60))));
            }
            assert_eq!(suite::receive(queue), None);
        }
        suite::send(&mut *queues[1], &packet(&frame(8, 60))).unwrap();
        backend.set_active_pairs(1).unwrap();
        assert_eq!(
            (suite::receive(&mut *queues[1]), backend.drops()),
            (None, 1)
        );
    }

    #[test]
    fn memory_is_bounded_and_drops_are_counted() {
        let backend = Loopback::new(1).unwrap();
        let mut queue = backend.clone().open_queue(0).unwrap();
        let sent = 2000u64;
        for _ in 0..sent {
            suite::send(&mut *queue, &packet(&frame(1, 1500))).unwrap();
        }
        let mut received = 0;
        while suite::receive(&mut *queue).is_some() {
            received += 1;
        }
        assert_eq!(received + backend.drops(), sent);
        assert!((600..700).contains(&received), "{received}");
        assert!(suite::send(&mut *queue, &[0; HEADER_LEN - 1]).is_err());
        assert!(suite::send(&mut *queue, &vec![0; MAX_PACKET + 1]).is_err());
        drop(queue);
        backend.clone().open_queue(0).unwrap();
    }

    /// A packet whose checksum the guest left to us: a UDP datagram over IPv4.
    fn partial() -> Vec<u8> {
        let mut frame = frame(3, 14 + 20 + 8 + 5);
        let (at, len) = (14 + 20, 13u16);
        // The pseudo header's sum: 10.0.0.1, 10.0.0.2, protocol 17, length.
        let pseudo = 0x0a00 + 1 + 0x0a00 + 2 + 17 + len;
        frame[at..at + 8].copy_from_slice(&[0x12, 0x34, 0x56, 0x78, 0, 13, 0, 0]);
        frame[at + 6..at + 8].copy_from_slice(&pseudo.to_be_bytes());
        let mut packet = packet(&frame);
        packet[0] = NEEDS_CSUM;
        packet[6] = 34;
        packet[8] = 6;
        packet
    }

    #[test]
    fn checksums_stay_partial_or_are_completed() {
        let backend = Loopback::new(1).unwrap();
        let mut queue = backend.clone().open_queue(0).unwrap();
        backend.set_receive_offloads(ALL).unwrap();
        suite::send(&mut *queue, &partial()).unwrap();
        assert_eq!(suite::receive(&mut *queue), Some(partial()));
        backend.set_receive_offloads(Offloads::default()).unwrap();
        suite::send(&mut *queue, &partial()).unwrap();
        let received = suite::receive(&mut *queue).unwrap();
        assert_eq!(received[..HEADER_LEN], [0; HEADER_LEN]);
        // With the completed field the datagram and its pseudo header sum to all ones.
        let sum: u32 = received[HEADER_LEN + 34..]
            .chunks(2)
            .map(|pair| u32::from(pair[0]) << 8 | u32::from(*pair.get(1).unwrap_or(&0)))
            .sum::<u32>()
            + (0x0a00 + 1 + 0x0a00 + 2 + 17 + 13);
        assert_eq!((sum & 0xffff) + (sum >> 16), 0xffff);
        let mut outside = partial();
        outside[7] = 1;
        suite::send(&mut *queue, &outside).unwrap();
        let mut at_the_end = partial();
        at_the_end[8] = 12;
        suite::send(&mut *queue, &at_the_end).unwrap();
        assert_eq!((suite::receive(&mut *queue), backend.drops()), (None, 2));
    }

    #[test]
    fn segments_reach_only_a_driver_that_takes_them() {
        let takes = |offloads, gso_type| {
            let backend = Loopback::new(1).unwrap();
            let mut queue = backend.clone().open_queue(0).unwrap();
            backend.set_receive_offloads(offloads).unwrap();
            let mut packet = partial();
            packet[1] = gso_type;
            packet[4] = 4;
            suite::send(&mut *queue, &packet).unwrap();
            let received = suite::receive(&mut *queue);
            assert!(received.is_none() || received == Some(packet));
            received.is_some()
        };
        for gso_type in [GSO_TCPV4, GSO_TCPV6, GSO_UDP_L4, GSO_TCPV4 | GSO_ECN] {
            assert!(takes(ALL, gso_type) && !takes(Offloads::default(), gso_type));
        }
        let no_ecn = Offloads { ecn: false, ..ALL };
        assert!(!takes(no_ecn, GSO_TCPV4 | GSO_ECN) && takes(no_ecn, GSO_TCPV6));
        for nonsense in [2, 3, 0x7f, GSO_ECN, GSO_UDP_L4 | GSO_ECN] {
            assert!(!takes(ALL, nonsense), "{nonsense:#x}");
        }
    }
}

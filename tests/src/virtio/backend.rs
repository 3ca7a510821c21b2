//! A network back end whose other end is the test.

use std::collections::VecDeque;
use std::io::{self, Read, Write};
use std::os::fd::{AsRawFd, RawFd};
use std::os::unix::net::UnixStream;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use devices::net::{NetBackend, NetQueue, Offloads};
use vm_memory::{Bytes, VolatileSlice};

/// What both ends of one pair share.
struct Pair {
    /// For the device: readable when packets wait, writable when there is room.
    device: UnixStream,
    test: UnixStream,
    inbox: VecDeque<Vec<u8>>,
    sent: Vec<Vec<u8>>,
    blocked: bool,
    open: bool,
    lost: u64,
}

struct Shared {
    pairs: Vec<Mutex<Pair>>,
    offloads: Mutex<Vec<Offloads>>,
    active: Mutex<Vec<u16>>,
    refuse: Mutex<bool>,
}

/// A back end that keeps what the device sends and hands out what the test gives it. Packets have
/// their 12-byte header.
pub struct Wire(Arc<Shared>);

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

impl Wire {
    /// With this many pairs.
    pub fn new(pairs: u16) -> Arc<Wire> {
        let pair = |_| {
            let (device, test) = UnixStream::pair().expect("socket pair");
            device.set_nonblocking(true).expect("socket");
            test.set_nonblocking(true).expect("socket");
            Mutex::new(Pair {
                device,
                test,
                inbox: VecDeque::new(),
                sent: Vec::new(),
                blocked: false,
                open: false,
                lost: 0,
            })
        };
        Arc::new(Wire(Arc::new(Shared {
            pairs: (0..pairs).map(pair).collect(),
            offloads: Mutex::default(),
            active: Mutex::default(),
            refuse: Mutex::default(),
        })))
    }

    fn pair(&self, index: u16) -> MutexGuard<'_, Pair> {
        lock(&self.0.pairs[usize::from(index)])
    }

    /// Puts a packet on the wire of a pair, header first.
    pub fn inject(&self, pair: u16, packet: Vec<u8>) {
        let mut pair = self.pair(pair);
        pair.inbox.push_back(packet);
        // A full socket is readable all the same.
        let _ = (&pair.test).write(&[1]);
    }

    /// Takes what the device has sent on a pair.
    pub fn take_sent(&self, pair: u16) -> Vec<Vec<u8>> {
        std::mem::take(&mut self.pair(pair).sent)
    }

    /// Packets that the device has sent on a pair and that were not taken.
    pub fn sent(&self, pair: u16) -> usize {
        self.pair(pair).sent.len()
    }

    /// Packets that wait to be received.
    pub fn waiting(&self, pair: u16) -> usize {
        self.pair(pair).inbox.len()
    }

    /// Packets that did not fit into the device's buffers.
    pub fn lost(&self, pair: u16) -> u64 {
        self.pair(pair).lost
    }

    /// Makes `send` answer "would block", with a descriptor that is not writable, or lets it go on.
    pub fn block(&self, pair: u16, blocked: bool) {
        let pair = &mut *self.pair(pair);
        pair.blocked = blocked;
        if blocked {
            while (&pair.device).write(&[0; 4096]).is_ok() {}
        } else {
            let mut sink = [0; 4096];
            while (&pair.test).read(&mut sink).is_ok_and(|len| len > 0) {}
        }
    }

    /// Whether the device has the pair open.
    pub fn is_open(&self, pair: u16) -> bool {
        self.pair(pair).open
    }

    /// What the device asked for with `set_receive_offloads`, in order.
    pub fn offloads(&self) -> Vec<Offloads> {
        lock(&self.0.offloads).clone()
    }

    /// What the device asked for with `set_active_pairs`, in order.
    pub fn active(&self) -> Vec<u16> {
        lock(&self.0.active).clone()
    }

    /// From now on refuse to change anything, or stop refusing.
    pub fn refuse(&self, refuse: bool) {
        *lock(&self.0.refuse) = refuse;
    }

    fn check(&self) -> io::Result<()> {
        if *lock(&self.0.refuse) {
            return Err(io::Error::other("refused, as the test wants"));
        }
        Ok(())
    }
}

const ALL: Offloads = Offloads {
    checksum: true,
    tso4: true,
    tso6: true,
    ecn: true,
    uso: true,
};

impl NetBackend for Wire {
    fn transmit_offloads(&self) -> Offloads {
        ALL
    }

    fn receive_offloads(&self) -> Offloads {
        ALL
    }

    fn set_receive_offloads(&self, offloads: Offloads) -> io::Result<()> {
        self.check()?;
        lock(&self.0.offloads).push(offloads);
        Ok(())
    }

    fn max_pairs(&self) -> u16 {
        u16::try_from(self.0.pairs.len()).expect("few pairs")
    }

    fn set_active_pairs(&self, pairs: u16) -> io::Result<()> {
        self.check()?;
        lock(&self.0.active).push(pairs);
        Ok(())
    }

    fn open_queue(self: Arc<Self>, index: u16) -> io::Result<Box<dyn NetQueue>> {
        self.check()?;
        let mut pair = self.pair(index);
        assert!(!pair.open, "pair {index} opened twice");
        pair.open = true;
        let fd = pair.device.as_raw_fd();
        Ok(Box::new(WireQueue {
            shared: Arc::clone(&self.0),
            index: usize::from(index),
            fd,
        }))
    }

    fn drops(&self) -> u64 {
        let pairs = self.0.pairs.iter();
        pairs.map(|pair| lock(pair).lost).sum()
    }
}

struct WireQueue {
    shared: Arc<Shared>,
    index: usize,
    fd: RawFd,
}

impl NetQueue for WireQueue {
    fn send(&mut self, packet: &[VolatileSlice<'_, ()>]) -> io::Result<()> {
        let mut pair = lock(&self.shared.pairs[self.index]);
        if pair.blocked {
            return Err(io::ErrorKind::WouldBlock.into());
        }
        let mut bytes = Vec::new();
        for slice in packet {
            let mut part = vec![0; slice.len()];
            slice.read_slice(&mut part, 0).expect("slice");
            bytes.extend(part);
        }
        pair.sent.push(bytes);
        Ok(())
    }

    fn receive(&mut self, buffers: &[VolatileSlice<'_, ()>]) -> io::Result<Option<usize>> {
        let mut pair = lock(&self.shared.pairs[self.index]);
        let room: usize = buffers.iter().map(VolatileSlice::len).sum();
        loop {
            let Some(packet) = pair.inbox.pop_front() else {
                let mut sink = [0; 64];
                while (&pair.device).read(&mut sink).is_ok_and(|len| len > 0) {}
                return Ok(None);
            };
            if packet.len() > room {
                pair.lost += 1;
                continue;
            }
            let mut rest = packet.as_slice();
            for buffer in buffers {
                let len = buffer.len().min(rest.len());
                buffer.write_slice(&rest[..len], 0).expect("slice");
                rest = &rest[len..];
            }
            return Ok(Some(packet.len()));
        }
    }

    fn fd(&self) -> Option<RawFd> {
        Some(self.fd)
    }
}

impl Drop for WireQueue {
    fn drop(&mut self) {
        lock(&self.shared.pairs[self.index]).open = false;
    }
}

//! The transmit queue: packets from the driver's buffers straight to the back end.

use std::io;
use std::sync::Arc;

use iommu::{Access, DmaMemory};
use vm_memory::{Bytes, VolatileSlice};

use super::header::{Header, Malformed};
use super::receive::MAX_SLICES;
use super::stats::QueueCounters;
use crate::net::{HEADER_LEN, NetQueue};
use crate::virtio::{
    Chain, RingError, SliceStorage, Slices, Virtqueue, advance, copy_out, resolve,
};

/// Transmit side of a pair.
pub(super) struct Transmit {
    pub(super) queue: Virtqueue,
    counters: Arc<QueueCounters>,
    features: u64,
    /// The back end had no room; the packet at the ring's head waits.
    blocked: bool,
    chain: Chain,
    slices: SliceStorage,
}

impl Transmit {
    pub(super) fn new(queue: Virtqueue, counters: Arc<QueueCounters>, features: u64) -> Transmit {
        Transmit {
            queue,
            counters,
            features,
            blocked: false,
            chain: Chain::new(),
            slices: SliceStorage::default(),
        }
    }

    /// Whether it waits for the back end.
    pub(super) fn is_blocked(&self) -> bool {
        self.blocked
    }

    /// Sends up to `budget` packets; returns how many were taken off the ring, and how many want an
    /// interrupt. In a section of `mem`. Without a link, packets are dropped.
    pub(super) fn poll(
        &mut self,
        mem: &DmaMemory,
        backend: &mut dyn NetQueue,
        budget: u32,
        link_up: bool,
    ) -> (u32, u32) {
        let mut work = 0;
        let backend = if link_up { Some(backend) } else { None };
        if let Err(error) = self.batch(mem, backend, budget, &mut work) {
            self.queue.report(error);
        }
        (work, self.queue.publish(mem))
    }

    fn batch(
        &mut self,
        mem: &DmaMemory,
        mut backend: Option<&mut dyn NetQueue>,
        budget: u32,
        work: &mut u32,
    ) -> Result<(), RingError> {
        self.blocked = false;
        let mut slices = self.slices.take();
        // The host gets a copy of the header, so that the driver cannot change it after the check.
        let mut header = [0; HEADER_LEN];
        let header = VolatileSlice::from(header.as_mut_slice());
        let mut result = Ok(());
        while *work < budget {
            match self.queue.ring.pop_into(mem, &mut self.chain) {
                Ok(true) => {}
                Ok(false) => break,
                Err(error) => {
                    result = Err(error);
                    break;
                }
            }
            slices.clear();
            slices.push(header);
            if let Err(error) = resolve(mem, self.chain.readable(), Access::Read, &mut slices) {
                self.queue.ring.unpop();
                result = Err(error);
                break;
            }
            match (self.check(&mut slices, &header), &mut backend) {
                (Ok(frame), Some(backend)) => match backend.send(&slices) {
                    Ok(()) => {
                        self.counters.packets.add(1);
                        self.counters.bytes.add(frame as u64);
                    }
                    Err(error) if error.kind() == io::ErrorKind::WouldBlock => {
                        self.queue.ring.unpop();
                        self.blocked = true;
                        break;
                    }
                    Err(_) => self.counters.drops.add(1),
                },
                _ => self.counters.drops.add(1),
            }
            *work += 1;
            self.queue.ring.push_used(self.chain.head(), 0);
        }
        self.slices.put(slices);
        result
    }

    /// Checks the packet whose buffers follow `header` in the list, moves its header there, and
    /// returns the frame's length.
    fn check(
        &self,
        slices: &mut Slices<'_>,
        header: &VolatileSlice<'_, ()>,
    ) -> Result<usize, Malformed> {
        let len = usize::try_from(self.chain.readable_len()).map_err(|_| Malformed::Length)?;
        let frame = len.checked_sub(HEADER_LEN).ok_or(Malformed::Length)?;
        if slices.len() > MAX_SLICES {
            return Err(Malformed::Length);
        }
        let mut bytes = [0; HEADER_LEN];
        if copy_out(slices.get(1..).unwrap_or_default(), 0, &mut bytes) != HEADER_LEN {
            return Err(Malformed::Length);
        }
        let checked = Header::from_bytes(&bytes).check_transmit(frame, self.features)?;
        header
            .write_slice(&checked.to_bytes(), 0)
            .map_err(|_| Malformed::Length)?;
        advance(slices, 1, HEADER_LEN);
        Ok(frame)
    }

    /// Before a sleep.
    pub(super) fn arm(&mut self, mem: &DmaMemory) {
        if !self.blocked
            && let Err(error) = self.queue.ring.enable_notify(mem)
        {
            self.queue.report(error);
        }
    }

    /// Whether there are packets that the back end may have room for.
    pub(super) fn has_work(&self, mem: &DmaMemory) -> bool {
        // An error is found again, and reported, by the poll.
        !self.blocked && self.queue.ring.available(mem).unwrap_or(true)
    }

    /// Counts the driver's notifications and forgets them.
    pub(super) fn take_notifications(&self) {
        self.counters
            .notifications
            .add(self.queue.take_notifications());
    }

    /// After a sleep.
    pub(super) fn disarm(&mut self, mem: &DmaMemory) {
        if let Err(error) = self.queue.ring.disable_notify(mem) {
            self.queue.report(error);
        }
    }

    pub(super) fn interrupt(&self) {
        self.counters.interrupts.add(1);
        self.queue.interrupt();
    }
}

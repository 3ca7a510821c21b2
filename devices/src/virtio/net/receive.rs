//! The receive queue: packets from the back end straight into posted buffers.

use std::sync::Arc;

use iommu::{Access, DmaMemory};

use super::filter::{Filter, PEEK};
use super::header::Header;
use super::spec::{self, feature, header as layout};
use super::stats::QueueCounters;
use crate::net::{HEADER_LEN, NetQueue};
use crate::virtio::{
    Chain, Fault, RingError, Segment, SliceStorage, Slices, Virtqueue, copy_in, copy_out, resolve,
};

/// Most buffers that one packet is spread over: what one `readv` takes.
pub(super) const MAX_SLICES: usize = 1023;

/// A chain taken off the ring that no packet has filled yet.
struct Posted {
    head: u16,
    len: usize,
    segments: usize,
    /// Slices that the segments resolved to in this batch.
    slices: usize,
}

/// Receive side of a pair.
pub(super) struct Receive {
    pub(super) queue: Virtqueue,
    counters: Arc<QueueCounters>,
    /// `VIRTIO_NET_F_MRG_RXBUF`: a packet may take several chains.
    mergeable: bool,
    /// Offloads that the driver takes now, a mask of `GUEST_*` features.
    offloads: u64,
    /// Longest frame that is not a segmented one.
    frame: usize,
    filter: Filter,
    /// Packets may arrive on this queue (`VQ_PAIRS_SET`).
    active: bool,
    /// There was no buffer when one was needed.
    starved: bool,
    /// The back end failed; nothing more will come.
    dead: bool,
    chain: Chain,
    posted: Vec<Posted>,
    segments: Vec<Segment>,
    slices: SliceStorage,
}

/// Where a batch stands in `posted` and its slices.
#[derive(Default)]
struct Cursor {
    chain: usize,
    slice: usize,
    segment: usize,
    /// Bytes of the chains from `chain` on.
    room: usize,
}

impl Receive {
    pub(super) fn new(
        queue: Virtqueue,
        counters: Arc<QueueCounters>,
        features: u64,
        frame: usize,
        filter: Filter,
    ) -> Receive {
        Receive {
            queue,
            counters,
            mergeable: features & feature::MRG_RXBUF != 0,
            offloads: features & feature::GUEST_OFFLOADS,
            frame,
            filter,
            active: false,
            starved: false,
            dead: false,
            chain: Chain::new(),
            posted: Vec::new(),
            segments: Vec::new(),
            slices: SliceStorage::default(),
        }
    }

    /// Whether packets may arrive here (`VQ_PAIRS_SET`).
    pub(super) fn set_active(&mut self, active: bool) {
        self.active = active;
    }

    /// Changes which packets the driver wants.
    pub(super) fn set_filter(&mut self, filter: Filter) {
        self.filter = filter;
    }

    /// Changes the offloads that the driver takes.
    pub(super) fn set_offloads(&mut self, offloads: u64) {
        self.offloads = offloads;
    }

    /// Whether a packet that arrives now would be taken.
    pub(super) fn listens(&self) -> bool {
        self.active && !self.starved && !self.dead
    }

    /// Whether it waits for buffers.
    pub(super) fn waits_for_buffers(&self) -> bool {
        self.active && self.starved
    }

    /// Takes up to `budget` packets; returns how many, and how many used buffers want an interrupt.
    /// In a section of `mem`.
    pub(super) fn poll(
        &mut self,
        mem: &DmaMemory,
        backend: &mut dyn NetQueue,
        budget: u32,
    ) -> (u32, u32) {
        let mut work = 0;
        if self.active && !self.dead {
            let mut slices = self.slices.take();
            let mut cursor = Cursor::default();
            let result = self.batch(mem, backend, budget, &mut slices, &mut cursor, &mut work);
            self.slices.put(slices);
            self.posted.drain(..cursor.chain);
            self.segments.drain(..cursor.segment);
            if let Err(error) = result {
                self.queue.report(error);
            }
        }
        (work, self.queue.publish(mem))
    }

    fn batch<'m>(
        &mut self,
        mem: &'m DmaMemory,
        backend: &mut dyn NetQueue,
        budget: u32,
        slices: &mut Slices<'m>,
        cursor: &mut Cursor,
        work: &mut u32,
    ) -> Result<(), RingError> {
        self.starved = false;
        let mut segments = self.segments.as_slice();
        for posted in &mut self.posted {
            let before = slices.len();
            let (own, rest) = segments.split_at(posted.segments);
            resolve(mem, own, Access::Write, slices)?;
            segments = rest;
            posted.slices = slices.len() - before;
            cursor.room += posted.len;
        }
        while *work < budget {
            self.gather(mem, slices, cursor)?;
            let Some(first) = self.posted.get(cursor.chain) else {
                self.starved = true;
                break;
            };
            let all = slices.get(cursor.slice..).unwrap_or_default();
            let end = if self.mergeable {
                all.len()
            } else {
                first.slices
            };
            let window = all.get(..end.min(MAX_SLICES)).unwrap_or_default();
            if window.is_empty() {
                // A buffer has room for the header at least (5.1.6.3.1); these have for nothing.
                return Err(Fault::Request.into());
            }
            let len = match backend.receive(window) {
                Ok(Some(len)) => len,
                Ok(None) => break,
                Err(error) => {
                    self.dead = true;
                    self.queue.warn(&format_args!("back end failed: {error}"));
                    break;
                }
            };
            *work += 1;
            let mut peek = [0; HEADER_LEN + PEEK];
            let got = copy_out(window, 0, &mut peek).min(len);
            let (header, frame) = peek.split_at(HEADER_LEN);
            let Some(frame) = got
                .checked_sub(HEADER_LEN)
                .filter(|&frame| frame >= spec::ETHERNET)
                .and_then(|got| frame.get(..got))
            else {
                self.counters.drops.add(1);
                continue;
            };
            let header: [u8; HEADER_LEN] = header.try_into().unwrap_or_default();
            if !Header::from_bytes(&header).check_receive(self.offloads) {
                self.counters.drops.add(1);
                continue;
            }
            if !self.filter.accepts(frame) {
                self.counters.filtered.add(1);
                continue;
            }
            let from = cursor.slice;
            let chains = self.consume(len, cursor);
            let window = slices.get(from..).unwrap_or_default();
            copy_in(window, layout::NUM_BUFFERS, &chains.to_le_bytes());
            self.counters.packets.add(1);
            self.counters.bytes.add((len - HEADER_LEN) as u64);
        }
        Ok(())
    }

    /// Takes chains off the ring until one packet of any length fits, or there are no more.
    fn gather<'m>(
        &mut self,
        mem: &'m DmaMemory,
        slices: &mut Slices<'m>,
        cursor: &mut Cursor,
    ) -> Result<(), RingError> {
        let wanted = self.longest();
        loop {
            let enough = if self.mergeable {
                // Empty buffers make segments without slices: they are bounded too.
                cursor.room >= wanted
                    || slices.len() - cursor.slice >= MAX_SLICES
                    || self.segments.len() - cursor.segment >= MAX_SLICES
            } else {
                self.posted.len() > cursor.chain
            };
            if enough || !self.queue.ring.pop_into(mem, &mut self.chain)? {
                return Ok(());
            }
            let own = self.chain.writable();
            let before = slices.len();
            let resolved = if own.is_empty() {
                Err(Fault::Request.into())
            } else {
                resolve(mem, own, Access::Write, slices)
            };
            if let Err(error) = resolved {
                self.queue.ring.unpop();
                return Err(error);
            }
            let len = usize::try_from(self.chain.writable_len()).unwrap_or(usize::MAX);
            cursor.room = cursor.room.saturating_add(len);
            self.segments.extend_from_slice(own);
            self.posted.push(Posted {
                head: self.chain.head(),
                len,
                segments: own.len(),
                slices: slices.len() - before,
            });
        }
    }

    /// The longest packet that the back end may have, with its header.
    fn longest(&self) -> usize {
        let segmented =
            feature::GUEST_TSO4 | feature::GUEST_TSO6 | feature::GUEST_USO4 | feature::GUEST_USO6;
        HEADER_LEN
            + if self.offloads & segmented == 0 {
                self.frame
            } else {
                spec::MAX_FRAME
            }
    }

    /// Gives the chains that hold the first `len` bytes back to the driver; returns how many.
    fn consume(&mut self, len: usize, cursor: &mut Cursor) -> u16 {
        let mut left = len;
        let mut chains = 0;
        while let Some(posted) = self.posted.get(cursor.chain) {
            let used = left.min(posted.len);
            left -= used;
            self.queue
                .ring
                .push_used(posted.head, u32::try_from(used).unwrap_or(u32::MAX));
            cursor.chain += 1;
            cursor.slice += posted.slices;
            cursor.segment += posted.segments;
            cursor.room = cursor.room.saturating_sub(posted.len);
            chains += 1;
            if left == 0 {
                break;
            }
        }
        chains
    }

    /// Before a sleep: only a starved queue needs to hear of new buffers.
    pub(super) fn arm(&mut self, mem: &DmaMemory) {
        if self.starved
            && let Err(error) = self.queue.ring.enable_notify(mem)
        {
            self.queue.report(error);
        }
    }

    /// Whether it waited for buffers and there are some.
    pub(super) fn has_work(&self, mem: &DmaMemory) -> bool {
        // An error is found again, and reported, by the poll.
        self.waits_for_buffers() && self.queue.ring.available(mem).unwrap_or(true)
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

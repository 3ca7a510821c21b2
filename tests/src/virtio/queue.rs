//! A split virtqueue in the driver's hands (Virtio 1.2, 2.7).

use std::sync::Arc;
use std::sync::atomic::{Ordering, fence};

use crate::{DmaBuffer, GuestBar, Machine, PAGE_SIZE, Side};

/// Descriptor flags (2.7.5).
pub mod desc_flags {
    /// The chain goes on at `next`.
    pub const NEXT: u16 = 1;
    /// The device writes the buffer.
    pub const WRITE: u16 = 2;
    /// The buffer is a table of descriptors.
    pub const INDIRECT: u16 = 4;
}

/// One buffer of a chain.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Part {
    /// Its address.
    pub addr: u64,
    /// Its length.
    pub len: u32,
    /// The device writes it.
    pub write: bool,
}

impl Part {
    /// A buffer that the device reads.
    pub fn readable(addr: u64, len: u32) -> Part {
        Part {
            addr,
            len,
            write: false,
        }
    }

    /// A buffer that the device writes.
    pub fn writable(addr: u64, len: u32) -> Part {
        Part {
            addr,
            len,
            write: true,
        }
    }
}

/// A split virtqueue. Each of its three parts has pages of its own, so that a device which writes
/// past one is noticed.
pub struct GuestQueue {
    /// Its index in the device.
    pub index: u16,
    size: u16,
    desc: DmaBuffer,
    avail: DmaBuffer,
    used: DmaBuffer,
    indirect: DmaBuffer,
    event_idx: bool,
    doorbell: (GuestBar, u64),
    free: Vec<u16>,
    /// Descriptors of the chain that begins at each index.
    chains: Vec<Vec<u16>>,
    avail_idx: u16,
    last_kick: u16,
    used_idx: u16,
    kicks: u64,
}

impl GuestQueue {
    /// A queue of `size` entries whose doorbell is at an offset of a BAR.
    pub fn new(
        machine: &Arc<Machine>,
        index: u16,
        size: u16,
        event_idx: bool,
        doorbell: (GuestBar, u64),
    ) -> GuestQueue {
        let entries = u64::from(size);
        let pages = |len: u64| machine.dma(Side::High, len.div_ceil(PAGE_SIZE));
        GuestQueue {
            index,
            size,
            desc: pages(entries * 16),
            avail: pages(entries * 2 + 6),
            used: pages(entries * 8 + 6),
            indirect: pages(entries * 16 * entries.min(16)),
            event_idx,
            doorbell,
            free: (0..size).rev().collect(),
            chains: vec![Vec::new(); usize::from(size)],
            avail_idx: 0,
            last_kick: 0,
            used_idx: 0,
            kicks: 0,
        }
    }

    /// Addresses of descriptor table, driver area and device area.
    pub fn addresses(&self) -> [u64; 3] {
        [&self.desc, &self.avail, &self.used].map(|part| part.address().0)
    }

    /// Number of entries.
    pub fn size(&self) -> u16 {
        self.size
    }

    /// Free descriptors.
    pub fn free(&self) -> usize {
        self.free.len()
    }

    /// Starts again after the device was reset: all chains come back, the rings are cleared.
    pub fn restart(&mut self) {
        for part in [&self.desc, &self.avail, &self.used] {
            part.fill(0);
        }
        self.free = (0..self.size).rev().collect();
        self.chains = vec![Vec::new(); usize::from(self.size)];
        (self.avail_idx, self.used_idx, self.last_kick) = (0, 0, 0);
    }

    /// Writes a descriptor as it is.
    pub fn set_desc(&self, index: u16, addr: u64, len: u32, flags: u16, next: u16) {
        write_desc(&self.desc, u64::from(index) * 16, addr, len, flags, next);
    }

    /// Makes a chain available; returns its head. Panics without enough descriptors.
    pub fn add(&mut self, parts: &[Part]) -> u16 {
        assert!(!parts.is_empty());
        let own: Vec<u16> = parts
            .iter()
            .map(|_| self.free.pop().expect("a free descriptor"))
            .collect();
        for (at, (part, &index)) in parts.iter().zip(&own).enumerate() {
            let next = own.get(at + 1).copied();
            let mut flags = if part.write { desc_flags::WRITE } else { 0 };
            flags |= next.map_or(0, |_| desc_flags::NEXT);
            self.set_desc(index, part.addr, part.len, flags, next.unwrap_or(0));
        }
        let head = own[0];
        self.chains[usize::from(head)] = own;
        self.push_avail(head);
        head
    }

    /// Makes a chain available through an indirect table; returns its head. At most 16 times as many
    /// such chains can be under way as the pages for tables hold; a head below 16 has its own table.
    pub fn add_indirect(&mut self, parts: &[Part]) -> u16 {
        let head = self.free.pop().expect("a free descriptor");
        let table = u64::from(head % self.size.min(16)) * u64::from(self.size) * 16;
        for (at, part) in parts.iter().enumerate() {
            let last = at + 1 == parts.len();
            let mut flags = if part.write { desc_flags::WRITE } else { 0 };
            flags |= if last { 0 } else { desc_flags::NEXT };
            let next = u16::try_from(at + 1).expect("a short chain");
            let offset = table + at as u64 * 16;
            write_desc(&self.indirect, offset, part.addr, part.len, flags, next);
        }
        let len = u32::try_from(parts.len() * 16).expect("a short chain");
        let addr = self.indirect.at(table).0;
        self.set_desc(head, addr, len, desc_flags::INDIRECT, 0);
        self.chains[usize::from(head)] = vec![head];
        self.push_avail(head);
        head
    }

    /// Puts a head into the available ring and moves the index on.
    pub fn push_avail(&mut self, head: u16) {
        let slot = u64::from(self.avail_idx % self.size);
        self.avail.write(4 + slot * 2, head.to_le());
        self.set_avail_idx(self.avail_idx.wrapping_add(1));
    }

    /// Sets the available index as it is.
    pub fn set_avail_idx(&mut self, index: u16) {
        self.avail_idx = index;
        self.avail.store(2, index.to_le());
    }

    /// The available index.
    pub fn avail_idx(&self) -> u16 {
        self.avail_idx
    }

    /// Notifies the device if it wants that; returns whether it did.
    pub fn kick(&mut self) -> bool {
        // The index must be visible before we look whether the device sleeps (2.7.13.4).
        fence(Ordering::SeqCst);
        let wanted = if self.event_idx {
            let event = self.avail_event();
            let added = self.avail_idx.wrapping_sub(self.last_kick);
            self.avail_idx.wrapping_sub(event).wrapping_sub(1) < added
        } else {
            self.used.load::<u16>(0) & 1 == 0
        };
        self.last_kick = self.avail_idx;
        if wanted {
            self.notify();
        }
        wanted
    }

    /// Notifies the device, wanted or not.
    pub fn notify(&mut self) {
        self.kicks += 1;
        self.doorbell.0.write(self.doorbell.1, self.index);
    }

    /// Notifications so far.
    pub fn kicks(&self) -> u64 {
        self.kicks
    }

    /// The device's wish for notifications, with `EVENT_IDX`.
    pub fn avail_event(&self) -> u16 {
        u16::from_le(self.used.load(4 + u64::from(self.size) * 8))
    }

    /// Sets the wish for interrupts, with `EVENT_IDX`: at the entry after `event`.
    pub fn set_used_event(&self, event: u16) {
        self.avail
            .store(4 + u64::from(self.size) * 2, event.to_le());
        fence(Ordering::SeqCst);
    }

    /// Sets the available ring's flags; 1: no interrupts.
    pub fn set_avail_flags(&self, flags: u16) {
        self.avail.store(0, flags.to_le());
        fence(Ordering::SeqCst);
    }

    /// The device's used index.
    pub fn used_idx(&self) -> u16 {
        u16::from_le(self.used.load(2))
    }

    /// Used entries that [`GuestQueue::take_used`] has not taken.
    pub fn used_count(&self) -> u16 {
        self.used_idx().wrapping_sub(self.used_idx)
    }

    /// Takes the next used chain, if there is one: its head and the length written.
    pub fn take_used(&mut self) -> Option<(u16, u32)> {
        if self.used_count() == 0 {
            return None;
        }
        assert!(
            self.used_count() <= self.size,
            "the used index jumped by {}",
            self.used_count()
        );
        let slot = u64::from(self.used_idx % self.size);
        let id = u32::from_le(self.used.read(4 + slot * 8));
        let len = u32::from_le(self.used.read(8 + slot * 8));
        self.used_idx = self.used_idx.wrapping_add(1);
        let head = u16::try_from(id).expect("a head that exists");
        let own = std::mem::take(&mut self.chains[usize::from(head)]);
        assert!(!own.is_empty(), "chain {head} was not available");
        self.free.extend(own);
        Some((head, len))
    }

    /// Waits for the next used chain.
    pub fn wait_used(&mut self) -> (u16, u32) {
        super::eventually("a used buffer", || self.used_count() > 0);
        self.take_used().expect("counted")
    }

    /// Whether the device wrote outside of the used ring.
    pub fn used_ring_is_intact(&self) -> bool {
        let end = u64::from(self.size) * 8 + 6;
        let rest = usize::try_from(self.used.len() - end).expect("pages");
        self.used.bytes(end, rest).iter().all(|&byte| byte == 0)
    }
}

fn write_desc(table: &DmaBuffer, at: u64, addr: u64, len: u32, flags: u16, next: u16) {
    table.write(at, addr.to_le());
    table.write(at + 8, len.to_le());
    table.write(at + 12, flags.to_le());
    table.write(at + 14, next.to_le());
}

//! Data pages and the PRP lists that describe them.

use std::sync::Arc;

use crate::{DmaBuffer, Machine, PAGE_SIZE, Side};

/// The last entry of a list page.
const LAST: u64 = PAGE_SIZE / 8 - 1;

/// A data buffer: scattered pages, the PRP entries for them, and the lists these need.
#[derive(Clone)]
pub struct Transfer {
    pages: Vec<DmaBuffer>,
    /// Enough for all pages.
    lists: Vec<DmaBuffer>,
    /// First entry of the first list.
    slot: u64,
    offset: u64,
    len: u64,
    prp: (u64, u64),
}

impl Transfer {
    /// `len` bytes from the beginning of a page.
    pub fn new(machine: &Arc<Machine>, len: u64) -> Transfer {
        Transfer::with_layout(machine, 0, len, 0)
    }

    /// `len` bytes that begin `offset` bytes into their first page, with a PRP list, if one is
    /// needed, that begins at its page's entry `slot`. Pages lie on both sides of 4 GiB in turn, so
    /// no two neighbours are adjacent.
    pub fn with_layout(machine: &Arc<Machine>, offset: u64, len: u64, slot: u64) -> Transfer {
        let count = (offset + len).div_ceil(PAGE_SIZE).max(1);
        let side = |index: u64| {
            if index.is_multiple_of(2) {
                Side::High
            } else {
                Side::Low
            }
        };
        let mut transfer = Transfer {
            pages: (0..count).map(|i| machine.dma(side(i), 1)).collect(),
            // Each list but the last gives up an entry for the link.
            lists: (0..(slot + count).div_ceil(LAST) + 1)
                .map(|i| machine.dma(side(i), 1))
                .collect(),
            slot,
            offset,
            len,
            prp: (0, 0),
        };
        transfer.resize(len);
        transfer
    }

    /// Changes the length, to no more than the pages hold, and lays the PRPs out anew.
    pub fn resize(&mut self, len: u64) {
        let count = (self.offset + len).div_ceil(PAGE_SIZE).max(1);
        let count = usize::try_from(count).expect("pages");
        assert!(count <= self.pages.len(), "longer than the buffer");
        self.len = len;
        let prp2 = match &self.pages[..count] {
            [_] | [] => 0,
            [_, second] => second.address().0,
            [_, rest @ ..] => self.write_lists(rest),
        };
        self.prp = (self.pages[0].at(self.offset).0, prp2);
    }

    /// Writes the PRP lists; returns where they begin.
    fn write_lists(&self, pages: &[DmaBuffer]) -> u64 {
        let mut lists = self.lists.iter();
        let mut list = lists.next().expect("a list");
        let start = list.at(self.slot * 8).0;
        let mut slot = self.slot;
        let mut rest = pages;
        while let [page, tail @ ..] = rest {
            if slot == LAST && !tail.is_empty() {
                let next = lists.next().expect("another list");
                list.write(slot * 8, next.address().0);
                list = next;
                slot = 0;
                continue;
            }
            list.write(slot * 8, page.address().0);
            slot += 1;
            rest = tail;
        }
        start
    }

    /// PRP entry 1 and 2.
    pub fn prp(&self) -> (u64, u64) {
        self.prp
    }

    /// Length in bytes.
    pub fn len(&self) -> u64 {
        self.len
    }

    /// Whether there is nothing to transfer.
    pub fn is_empty(&self) -> bool {
        self.len == 0
    }

    /// Page number `index`.
    pub fn page(&self, index: usize) -> &DmaBuffer {
        &self.pages[index]
    }

    fn pieces(&self) -> impl Iterator<Item = (&DmaBuffer, u64, usize)> {
        let mut left = self.len;
        self.pages.iter().enumerate().map(move |(index, page)| {
            let start = if index == 0 { self.offset } else { 0 };
            let len = left.min(PAGE_SIZE - start);
            left -= len;
            (page, start, usize::try_from(len).expect("a page"))
        })
    }

    /// Fills the buffer from `data`, as much as there is.
    pub fn set(&self, data: &[u8]) {
        let mut rest = data;
        for (page, start, len) in self.pieces() {
            let (now, later) = rest.split_at(len.min(rest.len()));
            page.set_bytes(start, now);
            rest = later;
        }
    }

    /// The buffer's content.
    pub fn get(&self) -> Vec<u8> {
        let mut data = Vec::new();
        for (page, start, len) in self.pieces() {
            data.extend_from_slice(&page.bytes(start, len));
        }
        data
    }
}

//! Data pages and the PRP lists that describe them.

use std::sync::Arc;

use crate::{DmaBuffer, Machine, PAGE_SIZE, Side};

/// A data buffer: scattered pages, the PRP entries for them, and the lists these need.
#[derive(Clone)]
pub struct Transfer {
    pages: Vec<DmaBuffer>,
    /// Kept because the PRP entries point to them.
    _lists: Vec<DmaBuffer>,
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
            if index % 2 == 0 {
                Side::High
            } else {
                Side::Low
            }
        };
        let pages: Vec<_> = (0..count).map(|i| machine.dma(side(i), 1)).collect();
        let mut lists = Vec::new();
        let prp1 = pages[0].at(offset).0;
        let prp2 = match pages.as_slice() {
            [_] => 0,
            [_, second] => second.address().0,
            [_, rest @ ..] => {
                let entries: Vec<u64> = rest.iter().map(|page| page.address().0).collect();
                write_lists(machine, &entries, slot, &mut lists)
            }
            [] => unreachable!("at least one page"),
        };
        Transfer {
            pages,
            _lists: lists,
            offset,
            len,
            prp: (prp1, prp2),
        }
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

/// Writes PRP lists that begin at entry `slot` of a page; returns where.
fn write_lists(
    machine: &Arc<Machine>,
    entries: &[u64],
    slot: u64,
    lists: &mut Vec<DmaBuffer>,
) -> u64 {
    const LAST: u64 = PAGE_SIZE / 8 - 1;
    let mut list = machine.dma(Side::Low, 1);
    let start = list.at(slot * 8).0;
    let mut slot = slot;
    let mut rest = entries;
    while let [entry, tail @ ..] = rest {
        if slot == LAST && !tail.is_empty() {
            let next = machine.dma(Side::High, 1);
            list.write(slot * 8, next.address().0);
            lists.push(std::mem::replace(&mut list, next));
            slot = 0;
            continue;
        }
        list.write(slot * 8, *entry);
        slot += 1;
        rest = tail;
    }
    lists.push(list);
    start
}

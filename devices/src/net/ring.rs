//! A bounded queue of packets in one block of memory.

use vm_memory::VolatileSlice;

/// Before each packet: its length, or [`WRAP`].
const PREFIX: usize = 4;
/// In place of a length: the next packet is at the start of the block.
const WRAP: u32 = u32::MAX;

/// Packets, each contiguous, in order. Nothing is allocated after it was made.
pub(super) struct PacketRing {
    bytes: Box<[u8]>,
    /// Where the oldest packet is.
    head: usize,
    /// Where the next one goes.
    tail: usize,
    count: usize,
}

impl PacketRing {
    /// Room for about `size` bytes.
    pub(super) fn new(size: usize) -> PacketRing {
        PacketRing {
            bytes: vec![0; size].into_boxed_slice(),
            head: 0,
            tail: 0,
            count: 0,
        }
    }

    pub(super) fn clear(&mut self) -> usize {
        self.head = 0;
        self.tail = 0;
        std::mem::take(&mut self.count)
    }

    /// Where a packet of `len` bytes could go; `None` if it is full.
    fn place(&mut self, len: usize) -> Option<usize> {
        let need = len.checked_add(PREFIX)?;
        if self.count == 0 {
            self.clear();
        }
        let size = self.bytes.len();
        // The free bytes are from tail to head, round the end; tail meets head only when empty.
        let (here, start) = if self.count == 0 || self.tail > self.head {
            (size - self.tail, self.head)
        } else {
            (self.head - self.tail, 0)
        };
        if here >= need {
            return Some(self.tail);
        }
        if start < need {
            return None;
        }
        // The reader knows without a mark if there is not even room for a length.
        if let Some(mark) = self.bytes.get_mut(self.tail..self.tail + PREFIX) {
            mark.copy_from_slice(&WRAP.to_le_bytes());
        }
        Some(0)
    }

    /// Appends a packet of `len` bytes, gathered from `parts`, if `admit` lets it through after
    /// changing it as it likes. False if there is no room.
    pub(super) fn push(
        &mut self,
        len: usize,
        parts: &[VolatileSlice<'_, ()>],
        admit: impl FnOnce(&mut [u8]) -> bool,
    ) -> Option<bool> {
        let at = self.place(len)?;
        let start = at + PREFIX;
        let packet = &mut self.bytes[start..start + len];
        let mut done = 0;
        for part in parts {
            done += part.copy_to(&mut packet[done..]);
        }
        if !admit(packet) {
            return Some(false);
        }
        let prefix = u32::try_from(len).ok()?.to_le_bytes();
        self.bytes[at..start].copy_from_slice(&prefix);
        self.tail = start + len;
        self.count += 1;
        Some(true)
    }

    /// Takes the oldest packet away and shows it to `f`.
    pub(super) fn pop<R>(&mut self, f: impl FnOnce(&[u8]) -> R) -> Option<R> {
        if self.count == 0 {
            return None;
        }
        let prefix = |bytes: &[u8], at: usize| {
            let prefix = bytes.get(at..at + PREFIX)?;
            Some(u32::from_le_bytes(prefix.try_into().ok()?))
        };
        let len = match prefix(&self.bytes, self.head) {
            Some(len) if len != WRAP => len,
            _ => {
                self.head = 0;
                prefix(&self.bytes, 0)?
            }
        };
        let start = self.head + PREFIX;
        let end = start + usize::try_from(len).ok()?;
        let result = f(&self.bytes[start..end]);
        self.head = end;
        self.count -= 1;
        Some(result)
    }
}

#[cfg(test)]
mod tests {
    use std::collections::VecDeque;

    use proptest::prelude::*;

    use super::*;

    fn push(ring: &mut PacketRing, packet: &mut [u8]) -> bool {
        let middle = packet.len() / 3;
        let len = packet.len();
        let (one, two) = packet.split_at_mut(middle);
        let parts = [VolatileSlice::from(one), VolatileSlice::from(two)];
        ring.push(len, &parts, |_| true) == Some(true)
    }

    proptest! {
        /// Whatever went in comes out, in order; and an empty ring takes all that fits.
        #[test]
        fn behaves_like_a_queue(steps in prop::collection::vec((0usize..120, any::<u8>()), 1..300)) {
            let mut ring = PacketRing::new(256);
            let mut model: VecDeque<Vec<u8>> = VecDeque::new();
            for (len, byte) in steps {
                if byte & 1 == 0 {
                    let mut packet = vec![byte; len];
                    let pushed = push(&mut ring, &mut packet);
                    prop_assert!(pushed || !model.is_empty());
                    let used: usize = model.iter().map(|packet| packet.len() + PREFIX).sum();
                    prop_assert!(!pushed || used + len + PREFIX <= 256);
                    // At most the largest packet's room is lost at the end of the block.
                    prop_assert!(pushed || used + 2 * (len + PREFIX) + 120 >= 256);
                    if pushed {
                        model.push_back(packet);
                    }
                } else {
                    prop_assert_eq!(ring.pop(<[u8]>::to_vec), model.pop_front());
                }
                prop_assert_eq!(ring.count, model.len());
            }
        }
    }

    #[test]
    fn what_is_not_admitted_leaves_no_trace() {
        let mut ring = PacketRing::new(64);
        let mut bytes = [1, 2, 3];
        let parts = [VolatileSlice::from(bytes.as_mut_slice())];
        assert_eq!(ring.push(3, &parts, |_| false), Some(false));
        assert!(ring.count == 0 && ring.pop(|_| ()).is_none());
        assert_eq!(
            ring.push(61, &parts, |_| true),
            None,
            "larger than the ring"
        );
        assert_eq!(ring.push(60, &parts, |_| true), Some(true));
        assert_eq!(ring.clear(), 1);
        assert!(ring.pop(|_| ()).is_none());
    }
}

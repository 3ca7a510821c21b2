//! One split virtqueue, seen from the device (Virtio 1.2, 2.7).
//!
//! Reading (available ring, descriptor chains) is virtio-queue's. The used ring is written here,
//! because a batch should be published with one store of the index, and because entries must survive
//! that bus mastering is switched off between taking a chain and returning it: they are then kept
//! on the host's side until memory answers again.

use std::num::Wrapping;
use std::sync::atomic::{Ordering, fence};

use iommu::{DmaMemory, Iova};
use virtio_queue::{DescriptorChain, Queue, QueueOwnedT, QueueT};
use vm_memory::{Address, GuestAddress, GuestMemory, Permissions};

use super::spec::ring as layout;

/// Why a ring operation did not happen.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum RingError {
    /// Bus mastering is off. Nothing is lost; try again once it is on.
    #[error("bus mastering is off")]
    Halted,
    /// The driver broke the ring's rules; the device needs a reset (Virtio 1.2, 2.1.2).
    #[error("{0}")]
    Broken(Fault),
}

/// What a driver can do wrong to a ring.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum Fault {
    /// Size 0, over the maximum, or no power of two.
    #[error("queue size is not valid")]
    Size,
    /// A ring address is not aligned (2.7).
    #[error("ring address is not aligned")]
    Alignment,
    /// A ring lies outside of memory.
    #[error("ring lies outside of memory")]
    RingAddress,
    /// More chains are available than the ring has entries.
    #[error("available index jumped by more than the queue size")]
    AvailIndex,
    /// A chain loops, is longer than the queue, or leaves its table.
    #[error("descriptor chain loops or leaves its table")]
    Chain,
    /// A descriptor that the device reads follows one that it writes (2.7.4.2).
    #[error("readable descriptor after a writable one")]
    Order,
    /// A buffer lies outside of memory.
    #[error("buffer lies outside of memory")]
    BufferAddress,
    /// A chain lacks a part that the device's protocol demands.
    #[error("chain lacks a buffer that the request needs")]
    Request,
}

impl From<Fault> for RingError {
    fn from(fault: Fault) -> RingError {
        RingError::Broken(fault)
    }
}

/// Where a ring is, as the driver set it. Addresses are the function's.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct RingLayout {
    /// Entries, a power of two.
    pub size: u16,
    /// Descriptor table.
    pub desc: u64,
    /// Available ring, which the driver writes.
    pub driver: u64,
    /// Used ring, which the device writes.
    pub device: u64,
}

/// One buffer of a chain.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Segment {
    /// Where.
    pub addr: Iova,
    /// How long, in bytes.
    pub len: u32,
}

/// A chain taken off the ring and read once, so that the driver cannot change it under us.
#[derive(Debug, Default)]
pub struct Chain {
    head: u16,
    segments: Vec<Segment>,
    readable: usize,
    readable_len: u64,
    writable_len: u64,
}

impl Chain {
    /// An empty chain, to be filled by [`Ring::pop_into`].
    pub fn new() -> Chain {
        Chain::default()
    }

    /// Index of the head descriptor, for [`Ring::push_used`].
    pub fn head(&self) -> u16 {
        self.head
    }

    /// Buffers that the device reads.
    pub fn readable(&self) -> &[Segment] {
        &self.segments[..self.readable]
    }

    /// Buffers that the device writes.
    pub fn writable(&self) -> &[Segment] {
        &self.segments[self.readable..]
    }

    /// Length of all readable buffers.
    pub fn readable_len(&self) -> u64 {
        self.readable_len
    }

    /// Length of all writable buffers.
    pub fn writable_len(&self) -> u64 {
        self.writable_len
    }
}

/// The device's end of one split virtqueue. All methods that take memory, but [`Ring::check`], are
/// called inside a section of it.
#[derive(Debug)]
pub struct Ring {
    queue: Queue,
    event_idx: bool,
    /// Used entries not yet in guest memory.
    pending: Vec<(u16, u32)>,
    /// Value of the used index when interrupts were last considered.
    considered: Wrapping<u16>,
    notify_on: bool,
    /// All parts lie in memory.
    inside: bool,
}

impl Ring {
    /// A ring at `layout`, with or without `VIRTIO_F_RING_EVENT_IDX`. Memory is not looked at yet.
    ///
    /// # Errors
    ///
    /// The size or an alignment is not what the specification demands.
    pub fn new(layout: RingLayout, event_idx: bool) -> Result<Ring, RingError> {
        let mut queue = Queue::new(layout.size).map_err(|_| Fault::Size)?;
        // No ring address computed later can overflow.
        for (start, len) in parts(&layout) {
            start.checked_add(len).ok_or(Fault::RingAddress)?;
        }
        // Before virtio-queue does, which would log every time.
        let aligned = layout.desc.is_multiple_of(16)
            && layout.driver.is_multiple_of(2)
            && layout.device.is_multiple_of(4);
        if !aligned {
            return Err(Fault::Alignment.into());
        }
        queue
            .try_set_desc_table_address(GuestAddress(layout.desc))
            .and_then(|()| queue.try_set_avail_ring_address(GuestAddress(layout.driver)))
            .and_then(|()| queue.try_set_used_ring_address(GuestAddress(layout.device)))
            .map_err(|_| Fault::Alignment)?;
        queue.set_event_idx(event_idx);
        queue.set_ready(true);
        Ok(Ring {
            pending: Vec::with_capacity(usize::from(layout.size)),
            queue,
            event_idx,
            considered: Wrapping(0),
            notify_on: true,
            inside: false,
        })
    }

    /// Checks that the three parts lie in memory. [`Ring::pop`] does it if it was not possible
    /// before: virtio-queue takes an available ring that cannot be read for an empty one, and the
    /// queue would be looked at again without end.
    ///
    /// Behind an IOMMU there is nothing to check ahead: what is mapped may change at any time, and a
    /// translation that the driver did not ask for would record faults. There, [`Ring::pop`] looks.
    ///
    /// # Errors
    ///
    /// They do not, or bus mastering is off.
    pub fn check(&mut self, mem: &DmaMemory) -> Result<(), RingError> {
        if mem.space().is_remapped() {
            self.inside = true;
            return Ok(());
        }
        let _section = mem.section();
        let access = [Permissions::Read, Permissions::Read, Permissions::Write];
        let layout = RingLayout {
            size: self.queue.size(),
            desc: self.queue.desc_table(),
            driver: self.queue.avail_ring(),
            device: self.queue.used_ring(),
        };
        for ((start, len), access) in parts(&layout).into_iter().zip(access) {
            let inside = usize::try_from(len)
                .is_ok_and(|len| mem.check_range(GuestAddress(start), len, access));
            if !inside {
                return Err(classify(mem, Fault::RingAddress));
            }
        }
        self.inside = true;
        Ok(())
    }

    /// Number of entries.
    pub fn size(&self) -> u16 {
        self.queue.size()
    }

    /// Takes the next available chain, unread. The caller walks it and must call
    /// [`Ring::push_used`] for its head, or [`Ring::unpop`].
    ///
    /// # Errors
    ///
    /// See [`RingError`].
    pub fn pop<'m>(
        &mut self,
        mem: &'m DmaMemory,
    ) -> Result<Option<DescriptorChain<&'m DmaMemory>>, RingError> {
        if !self.inside {
            self.check(mem)?;
        }
        if mem.space().is_remapped() {
            // Where the next head will be. Its page may have been unmapped since the last one.
            let slot = u64::from(self.queue.next_avail() % self.queue.size());
            let at = self.queue.avail_ring() + layout::ENTRIES + slot * layout::AVAIL_ENTRY;
            if !mem.check_range(GuestAddress(at), 2, Permissions::Read) {
                return Err(classify(mem, Fault::RingAddress));
            }
        }
        let mut avail = self.queue.iter(mem).map_err(|error| match error {
            virtio_queue::Error::InvalidAvailRingIndex => RingError::Broken(Fault::AvailIndex),
            _ => classify(mem, Fault::RingAddress),
        })?;
        Ok(avail.next())
    }

    /// Takes the next available chain and reads all its descriptors into `chain`, whose storage is
    /// used again. False if none is available.
    ///
    /// # Errors
    ///
    /// See [`RingError`]; the chain then stays on the ring.
    pub fn pop_into(&mut self, mem: &DmaMemory, chain: &mut Chain) -> Result<bool, RingError> {
        let limit = usize::from(self.queue.size());
        let Some(mut descriptors) = self.pop(mem)? else {
            return Ok(false);
        };
        chain.head = descriptors.head_index();
        chain.segments.clear();
        (chain.readable, chain.readable_len, chain.writable_len) = (0, 0, 0);
        let mut complete = false;
        let mut fault = None;
        for descriptor in &mut descriptors {
            complete = !descriptor.has_next();
            if chain.segments.len() == limit {
                // Longer than the queue, through an indirect table (2.7.5.3.1).
                complete = false;
                break;
            }
            let len = u64::from(descriptor.len());
            if descriptor.is_write_only() {
                chain.writable_len += len;
            } else if chain.segments.len() == chain.readable {
                chain.readable += 1;
                chain.readable_len += len;
            } else {
                fault = Some(Fault::Order);
            }
            chain.segments.push(Segment {
                addr: Iova(descriptor.addr().raw_value()),
                len: descriptor.len(),
            });
        }
        // virtio-queue ends a bad chain early without saying why: its last descriptor has a next.
        if !complete {
            fault = Some(Fault::Chain);
        }
        match fault {
            None => Ok(true),
            Some(fault) => {
                self.unpop();
                Err(classify(mem, fault))
            }
        }
    }

    /// Puts the chain taken last back to the ring's head.
    pub fn unpop(&mut self) {
        self.queue.go_to_previous_position();
    }

    /// Queues a used entry: `len` bytes were written to the chain of `head`. The driver sees it
    /// after [`Ring::publish`]. Call it once per chain taken.
    pub fn push_used(&mut self, head: u16, len: u32) {
        self.pending.push((head, len));
    }

    /// Used entries not published yet.
    pub fn unpublished(&self) -> usize {
        self.pending.len()
    }

    /// Hands all queued used entries to the driver with one store of the index; returns how many.
    ///
    /// # Errors
    ///
    /// See [`RingError`]; the entries stay queued.
    pub fn publish(&mut self, mem: &DmaMemory) -> Result<u16, RingError> {
        if self.pending.is_empty() {
            return Ok(0);
        }
        let _section = mem.section();
        let ring = self.queue.used_ring();
        let mut index = Wrapping(self.queue.next_used());
        for &(head, len) in &self.pending {
            let slot = u64::from(index.0 % self.queue.size());
            let mut entry = [0u8; 8];
            entry[..4].copy_from_slice(&u32::from(head).to_le_bytes());
            entry[4..].copy_from_slice(&len.to_le_bytes());
            mem.write(
                Iova(ring + layout::ENTRIES + slot * layout::USED_ENTRY),
                &entry,
            )
            .map_err(|_| classify(mem, Fault::RingAddress))?;
            index += 1;
        }
        mem.store(
            Iova(ring + layout::INDEX),
            index.0.to_le(),
            Ordering::Release,
        )
        .map_err(|_| classify(mem, Fault::RingAddress))?;
        self.queue.set_next_used(index.0);
        let count = u16::try_from(self.pending.len()).unwrap_or(u16::MAX);
        self.pending.clear();
        Ok(count)
    }

    /// Whether the driver wants an interrupt for what was published since the last call
    /// (2.7.7.2).
    ///
    /// # Errors
    ///
    /// See [`RingError`].
    pub fn wants_interrupt(&mut self, mem: &DmaMemory) -> Result<bool, RingError> {
        let new = Wrapping(self.queue.next_used());
        let old = self.considered;
        if new == old {
            return Ok(false);
        }
        // The driver writes `used_event` (or the flag) and then reads the index; we wrote the index
        // and now read `used_event`. Without the fence both could miss the other's store.
        fence(Ordering::SeqCst);
        let wants = if self.event_idx {
            let at = layout::ENTRIES + u64::from(self.queue.size()) * layout::AVAIL_ENTRY;
            let event = Wrapping(self.load(mem, self.queue.avail_ring() + at)?);
            new - event - Wrapping(1) < new - old
        } else {
            self.load(mem, self.queue.avail_ring())? & layout::AVAIL_F_NO_INTERRUPT == 0
        };
        self.considered = new;
        Ok(wants)
    }

    /// Whether a chain is available.
    ///
    /// # Errors
    ///
    /// See [`RingError`].
    pub fn available(&self, mem: &DmaMemory) -> Result<bool, RingError> {
        let index = self.load(mem, self.queue.avail_ring() + layout::INDEX)?;
        Ok(index != self.queue.next_avail())
    }

    /// Asks the driver to notify us of new chains (2.7.10). Chains may have come just before: look
    /// with [`Ring::available`] after a full memory barrier.
    ///
    /// # Errors
    ///
    /// See [`RingError`].
    pub fn enable_notify(&mut self, mem: &DmaMemory) -> Result<(), RingError> {
        self.notify_on = true;
        self.queue
            .enable_notification(mem)
            .map(|_| ())
            .map_err(|_| classify(mem, Fault::RingAddress))
    }

    /// Tells the driver that notifications are not needed.
    ///
    /// # Errors
    ///
    /// See [`RingError`].
    pub fn disable_notify(&mut self, mem: &DmaMemory) -> Result<(), RingError> {
        if !self.notify_on {
            return Ok(());
        }
        self.queue
            .disable_notification(mem)
            .map_err(|_| classify(mem, Fault::RingAddress))?;
        self.notify_on = false;
        Ok(())
    }

    fn load(&self, mem: &DmaMemory, addr: u64) -> Result<u16, RingError> {
        mem.load::<u16>(Iova(addr), Ordering::Acquire)
            .map(u16::from_le)
            .map_err(|_| classify(mem, Fault::RingAddress))
    }
}

/// Start and length of the descriptor table, the available and the used ring (2.7).
fn parts(ring: &RingLayout) -> [(u64, u64); 3] {
    let size = u64::from(ring.size);
    [
        (ring.desc, size * layout::DESCRIPTOR),
        (
            ring.driver,
            layout::ENTRIES + size * layout::AVAIL_ENTRY + 2,
        ),
        (ring.device, layout::ENTRIES + size * layout::USED_ENTRY + 2),
    ]
}

/// Tells a failed access of a halted function from one outside of memory. Inside one section bus
/// mastering can go off but not on again, so the answer belongs to the access that failed.
pub fn classify(mem: &DmaMemory, fault: Fault) -> RingError {
    if mem.space().bus_master() {
        RingError::Broken(fault)
    } else {
        RingError::Halted
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use iommu::{DmaSpace, GuestRam, SourceId, Upstream};

    const DESC: u64 = 0x1000;
    const AVAIL: u64 = 0x2000;
    const USED: u64 = 0x3000;

    fn memory() -> DmaMemory {
        let space = DmaSpace::new(
            &Upstream::memory(GuestRam::from_ranges(&[(GuestAddress(0), 0x8000)]).unwrap()),
            SourceId(0),
        );
        space.set_bus_master(true);
        space.view()
    }

    fn ring(event_idx: bool) -> Ring {
        let layout = RingLayout {
            size: 4,
            desc: DESC,
            driver: AVAIL,
            device: USED,
        };
        Ring::new(layout, event_idx).unwrap()
    }

    /// Makes a chain of one readable buffer available.
    fn offer(mem: &DmaMemory, index: u16, head: u16) {
        let desc = Iova(DESC + u64::from(head) * 16);
        mem.write_obj(desc, 0x4000u64).unwrap();
        mem.write_obj(Iova(desc.0 + 8), 64u64).unwrap();
        let slot = u64::from(index % 4);
        mem.write_obj(Iova(AVAIL + 4 + slot * 2), head).unwrap();
        mem.write_obj(Iova(AVAIL + 2), index.wrapping_add(1))
            .unwrap();
    }

    fn used_index(mem: &DmaMemory) -> u16 {
        mem.read_obj(Iova(USED + 2)).unwrap()
    }

    #[test]
    fn a_batch_is_published_at_once() {
        let mem = memory();
        let _section = mem.section();
        let mut ring = ring(false);
        let mut chain = Chain::new();
        for head in 0..3 {
            offer(&mem, head, head);
            assert_eq!(ring.pop_into(&mem, &mut chain), Ok(true));
            assert_eq!((chain.head(), chain.readable_len()), (head, 64));
            ring.push_used(head, 7);
            assert_eq!(used_index(&mem), 0, "not yet");
        }
        assert_eq!(ring.pop_into(&mem, &mut chain), Ok(false));
        assert_eq!(ring.publish(&mem), Ok(3));
        assert_eq!(used_index(&mem), 3);
        assert_eq!(mem.read_obj::<u32>(Iova(USED + 4 + 2 * 8)), Ok(2));
        assert_eq!(mem.read_obj::<u32>(Iova(USED + 8 + 2 * 8)), Ok(7));
        assert_eq!(ring.publish(&mem), Ok(0));
    }

    /// A ring that was set up while bus mastering was off, so that nobody could look: its index is
    /// the last thing in memory.
    #[test]
    fn an_available_ring_that_leaves_memory_is_no_empty_one() {
        let mem = memory();
        let layout = RingLayout {
            size: 4,
            desc: DESC,
            driver: 0x7ffc,
            device: USED,
        };
        let mut ring = Ring::new(layout, false).unwrap();
        mem.space().set_bus_master(false);
        assert_eq!(ring.check(&mem), Err(RingError::Halted));
        mem.space().set_bus_master(true);
        mem.write_obj(Iova(0x7ffe), 1u16).unwrap();
        let _section = mem.section();
        assert_eq!(ring.available(&mem), Ok(true));
        assert_eq!(
            ring.pop_into(&mem, &mut Chain::new()),
            Err(RingError::Broken(Fault::RingAddress))
        );
    }

    #[test]
    fn used_entries_outlive_a_halt() {
        let mem = memory();
        let mut ring = ring(true);
        let mut chain = Chain::new();
        offer(&mem, 0, 3);
        mem.write_obj(Iova(AVAIL + 4 + 8), 0u16).unwrap(); // used_event
        let section = mem.section();
        assert_eq!(ring.pop_into(&mem, &mut chain), Ok(true));
        ring.push_used(3, 1);
        drop(section);
        mem.space().set_bus_master(false);
        let section = mem.section();
        assert_eq!(ring.publish(&mem), Err(RingError::Halted));
        assert_eq!(ring.pop_into(&mem, &mut chain), Err(RingError::Halted));
        assert_eq!(ring.enable_notify(&mem), Err(RingError::Halted));
        drop(section);
        mem.space().set_bus_master(true);
        let _section = mem.section();
        assert_eq!(ring.unpublished(), 1);
        assert_eq!(ring.publish(&mem), Ok(1));
        assert_eq!(used_index(&mem), 1);
        assert_eq!(ring.wants_interrupt(&mem), Ok(true));
    }

    #[test]
    fn a_chain_put_back_comes_again() {
        let mem = memory();
        let _section = mem.section();
        let mut ring = ring(false);
        let mut chain = Chain::new();
        offer(&mem, 0, 2);
        for _ in 0..3 {
            assert_eq!(ring.pop_into(&mem, &mut chain), Ok(true));
            assert_eq!(chain.head(), 2);
            assert_eq!(ring.available(&mem), Ok(false));
            ring.unpop();
            assert_eq!(ring.available(&mem), Ok(true));
        }
    }

    /// The interrupt comes when the entry after `used_event` is published, in whatever batches,
    /// and over the wrap of the 16-bit index (2.7.7.2).
    #[test]
    fn event_index_against_the_definition() {
        let mem = memory();
        let _section = mem.section();
        for batch in 1..=4u16 {
            let mut ring = ring(true);
            ring.queue.set_next_used(65_500);
            ring.considered = Wrapping(65_500);
            let mut index = 65_500u16;
            for event in [65_510u16, 65_535, 3, 40] {
                mem.write_obj(Iova(AVAIL + 4 + 8), event).unwrap();
                loop {
                    for _ in 0..batch {
                        ring.push_used(0, 0);
                    }
                    ring.publish(&mem).unwrap();
                    let passed = (0..batch).any(|i| index.wrapping_add(i) == event);
                    index = index.wrapping_add(batch);
                    assert_eq!(ring.wants_interrupt(&mem), Ok(passed), "{index} {event}");
                    assert_eq!(ring.wants_interrupt(&mem), Ok(false), "asked twice");
                    if passed {
                        break;
                    }
                }
            }
        }
    }

    #[test]
    fn notifications_are_asked_for_and_waived() {
        let mem = memory();
        let _section = mem.section();
        let mut flags = ring(false);
        flags.disable_notify(&mem).unwrap();
        assert_eq!(
            mem.read_obj::<u16>(Iova(USED)),
            Ok(layout::USED_F_NO_NOTIFY)
        );
        flags.enable_notify(&mem).unwrap();
        assert_eq!(mem.read_obj::<u16>(Iova(USED)), Ok(0));
        let mut events = ring(true);
        let mut chain = Chain::new();
        offer(&mem, 0, 0);
        events.pop_into(&mem, &mut chain).unwrap();
        events.enable_notify(&mem).unwrap();
        assert_eq!(mem.read_obj::<u16>(Iova(USED + 4 + 4 * 8)), Ok(1));
    }

    #[test]
    fn bad_layouts_are_refused() {
        let good = RingLayout {
            size: 4,
            desc: DESC,
            driver: AVAIL,
            device: USED,
        };
        let fault = |layout| match Ring::new(layout, false) {
            Ok(mut ring) => ring.check(&memory()).err(),
            Err(error) => Some(error),
        };
        assert_eq!(fault(good), None);
        let broken = |fault| Some(RingError::Broken(fault));
        assert_eq!(fault(RingLayout { size: 3, ..good }), broken(Fault::Size));
        assert_eq!(fault(RingLayout { size: 0, ..good }), broken(Fault::Size));
        assert_eq!(
            fault(RingLayout {
                desc: DESC + 8,
                ..good
            }),
            broken(Fault::Alignment)
        );
        for layout in [
            RingLayout {
                desc: 0x7fd0,
                ..good
            },
            RingLayout {
                driver: 0x7ff4,
                ..good
            },
            RingLayout {
                device: 0x7fdc,
                ..good
            },
            RingLayout {
                device: u64::MAX - 3,
                ..good
            },
        ] {
            assert_eq!(fault(layout), broken(Fault::RingAddress), "{layout:?}");
        }
    }
}

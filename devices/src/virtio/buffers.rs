//! Copies to and from lists of guest buffers, and the lists' storage.

use iommu::{Access, DmaMemory};
use vm_memory::{Bytes, GuestAddress, GuestMemory, Permissions, VolatileSlice};

use super::ring::{Fault, RingError, Segment, classify};

/// A list of guest memory slices, valid in the section in which it was made.
pub type Slices<'m> = Vec<VolatileSlice<'m, ()>>;

/// The storage of a list between two sections, so that steady traffic allocates nothing.
#[derive(Default)]
pub struct SliceStorage(Slices<'static>);

// SAFETY: the vector is empty whenever it is not taken: `put` clears it, `take` leaves a new one. An
// empty vector of slices points to no guest memory, only to its own allocation.
#[expect(unsafe_code, reason = "slices hold raw addresses, and there are none")]
unsafe impl Send for SliceStorage {}

impl SliceStorage {
    /// An empty list with the storage of the last one that was put back.
    pub fn take<'m>(&mut self) -> Slices<'m> {
        rename(std::mem::take(&mut self.0))
    }

    /// Takes the list back; it is cleared.
    pub fn put(&mut self, slices: Slices<'_>) {
        self.0 = rename(slices);
    }
}

/// An emptied list for another lifetime in the same storage: the standard library collects a
/// vector's own iterator in place.
fn rename<'to>(mut slices: Slices<'_>) -> Slices<'to> {
    slices.clear();
    slices
        .into_iter()
        .map(|_| unreachable!("the list was cleared"))
        .collect()
}

/// Appends the memory of `segments` to `slices`; must be called in a section of `mem`.
///
/// # Errors
///
/// A buffer is not in memory, or bus mastering is off; `slices` may have grown in part.
pub fn resolve<'m>(
    mem: &'m DmaMemory,
    segments: &[Segment],
    access: Access,
    slices: &mut Slices<'m>,
) -> Result<(), RingError> {
    let access = match access {
        Access::Read => Permissions::Read,
        Access::Write => Permissions::Write,
    };
    for segment in segments {
        let failed = |_| classify(mem, Fault::BufferAddress);
        let len = usize::try_from(segment.len).map_err(|_| Fault::BufferAddress)?;
        for slice in mem
            .get_slices(GuestAddress(segment.addr.0), len, access)
            .map_err(failed)?
        {
            slices.push(slice.map_err(failed)?);
        }
    }
    Ok(())
}

/// Copies from the list, `offset` bytes into it, to `data`; returns how much there was.
pub fn copy_out(slices: &[VolatileSlice<'_, ()>], offset: usize, data: &mut [u8]) -> usize {
    let len = data.len();
    walk(slices, offset, len, |slice, at, done| {
        data.get_mut(done..)
            .map_or(0, |data| slice.read(data, at).unwrap_or(0))
    })
}

/// Copies `data` into the list, `offset` bytes into it; returns how much fitted.
pub fn copy_in(slices: &[VolatileSlice<'_, ()>], offset: usize, data: &[u8]) -> usize {
    walk(slices, offset, data.len(), |slice, at, done| {
        data.get(done..)
            .map_or(0, |data| slice.write(data, at).unwrap_or(0))
    })
}

fn walk(
    slices: &[VolatileSlice<'_, ()>],
    mut skip: usize,
    len: usize,
    mut step: impl FnMut(&VolatileSlice<'_, ()>, usize, usize) -> usize,
) -> usize {
    let mut done = 0;
    for slice in slices {
        if done == len {
            break;
        }
        if skip >= slice.len() {
            skip -= slice.len();
            continue;
        }
        done += step(slice, skip, done);
        skip = 0;
    }
    done
}

/// Drops `count` bytes of the list, from the start of element `first` on.
pub fn advance(slices: &mut Slices<'_>, first: usize, mut count: usize) {
    let mut whole = 0;
    for slice in slices.iter_mut().skip(first) {
        if count >= slice.len() {
            count -= slice.len();
            whole += 1;
            continue;
        }
        if let Ok(rest) = slice.offset(count) {
            *slice = rest;
        }
        break;
    }
    slices.drain(first..first + whole);
}

#[cfg(test)]
mod tests {
    use super::*;
    use iommu::{DmaSpace, GuestRam, Iova, SourceId, Upstream};

    fn memory() -> DmaMemory {
        let space = DmaSpace::new(
            &Upstream::memory(GuestRam::from_ranges(&[(GuestAddress(0), 0x4000)]).unwrap()),
            SourceId(0),
        );
        space.set_bus_master(true);
        space.view()
    }

    fn segment(addr: u64, len: u32) -> Segment {
        Segment {
            addr: Iova(addr),
            len,
        }
    }

    #[test]
    fn copies_cross_slices_and_advance_drops_the_front() {
        let mem = memory();
        let _section = mem.section();
        let mut slices = Slices::new();
        let segments = [segment(0x100, 3), segment(0x200, 0), segment(0x300, 5)];
        resolve(&mem, &segments, Access::Write, &mut slices).unwrap();
        assert_eq!(copy_in(&slices, 1, b"abcdef"), 6);
        assert_eq!(copy_in(&slices, 7, b"xyz"), 1, "only what fits");
        let mut back = [0; 9];
        assert_eq!(copy_out(&slices, 0, &mut back), 8);
        assert_eq!(&back, b"\0abcdefx\0");
        advance(&mut slices, 0, 4);
        let mut back = [0; 4];
        assert_eq!(copy_out(&slices, 0, &mut back), 4);
        assert_eq!(&back, b"defx");
        slices.insert(0, slices[0]);
        advance(&mut slices, 1, 100);
        assert_eq!(slices.len(), 1, "elements before the first stay");
    }

    #[test]
    fn a_list_keeps_its_storage() {
        let mem = memory();
        let section = mem.section();
        let mut slices = Slices::with_capacity(64);
        resolve(&mem, &[segment(0, 1)], Access::Read, &mut slices).unwrap();
        let storage = slices.as_ptr().addr();
        let mut kept = SliceStorage::default();
        kept.put(slices);
        drop(section);
        let again = kept.take();
        assert!(again.is_empty());
        assert_eq!((again.as_ptr().addr(), again.capacity()), (storage, 64));
    }

    #[test]
    fn buffers_outside_of_memory_are_a_fault_and_a_halted_function_is_not() {
        let mem = memory();
        let mut slices = Slices::new();
        let outside = [segment(0x3ff0, 0x20)];
        {
            let _section = mem.section();
            assert_eq!(
                resolve(&mem, &outside, Access::Read, &mut slices),
                Err(RingError::Broken(Fault::BufferAddress))
            );
        }
        mem.space().set_bus_master(false);
        let _section = mem.section();
        assert_eq!(
            resolve(&mem, &outside, Access::Read, &mut slices),
            Err(RingError::Halted)
        );
    }
}

//! Guest memory handed to the kernel for zero-copy I/O.

use std::sync::Arc;

use vm_memory::{Bytes, VolatileSlice};

use crate::drain::Pin;
use crate::tlb::Need;
use crate::view::{PinPlace, View};
use crate::{Access, DmaError, DmaMemory, DmaSpace, Iova};

/// A scatter-gather list of guest memory, resolved to host addresses and held.
///
/// While it holds anything, [`DmaSpace::set_bus_master`]`(false)` waits. It is meant to be used
/// again: [`PinnedBuffers::release`] keeps the list's storage, so steady I/O allocates nothing.
#[derive(Default)]
pub struct PinnedBuffers {
    iovecs: Vec<libc::iovec>,
    len: u64,
    holder: Option<Holder>,
    pin: Option<Pin>,
}

/// Through which view the memory is held.
struct Holder {
    space: Arc<DmaSpace>,
    view: Arc<View>,
    place: PinPlace,
}

// SAFETY: the iovecs point into guest RAM, which `holder` keeps mapped; the mapping belongs to the
// process, not to a thread, and is only ever accessed as volatile, shared memory.
#[expect(unsafe_code, reason = "raw host addresses move between threads")]
unsafe impl Send for PinnedBuffers {}

impl PinnedBuffers {
    /// An empty list.
    pub fn new() -> PinnedBuffers {
        PinnedBuffers::default()
    }

    /// Appends `len` bytes at `iova`, joined to the last element where host addresses touch. All that
    /// is held at a time must come through one view.
    ///
    /// # Errors
    ///
    /// As for [`DmaMemory::read_obj`]; the list is then as it was before.
    pub fn push(
        &mut self,
        mem: &DmaMemory,
        iova: Iova,
        len: u64,
        access: Access,
    ) -> Result<(), DmaError> {
        let need = match access {
            Access::Read => Need::READ,
            Access::Write => Need::WRITE,
        };
        let _section = mem.section();
        let count = usize::try_from(len).map_err(|_| DmaError::NotMapped(iova, len))?;
        let slices = mem.slices(iova, count, need)?;
        if len == 0 {
            return Ok(());
        }
        let (old_vecs, old_last) = (self.iovecs.len(), self.iovecs.last().copied());
        self.hold(mem, iova, len, mem.domain(iova, need)?);
        for slice in slices {
            match slice {
                Ok(slice) => self.append(slice),
                Err(error) => {
                    self.iovecs.truncate(old_vecs);
                    if let (Some(last), Some(old)) = (self.iovecs.last_mut(), old_last) {
                        *last = old;
                    }
                    if old_vecs == 0 {
                        self.release();
                    }
                    return Err(error);
                }
            }
        }
        self.len += len;
        Ok(())
    }

    /// Makes the pin, or widens it, before the memory is used.
    fn hold(&mut self, mem: &DmaMemory, iova: Iova, len: u64, domain: u16) {
        let domain = u32::from(domain);
        let last = iova.0.saturating_add(len.saturating_sub(1));
        let pin = match self.pin {
            Some(pin) => Pin {
                start: pin.start.min(iova.0),
                last: pin.last.max(last),
                domain: if pin.domain == domain {
                    domain
                } else {
                    Pin::ANY_DOMAIN
                },
                ..pin
            },
            None => Pin {
                since: mem.seen(),
                domain,
                start: iova.0,
                last,
            },
        };
        let holder = match &mut self.holder {
            Some(holder) if self.pin.is_some() || Arc::ptr_eq(&holder.view, mem.view()) => holder,
            other => other.insert(Holder {
                space: Arc::clone(mem.space()),
                view: Arc::clone(mem.view()),
                place: mem.view().place(),
            }),
        };
        debug_assert!(Arc::ptr_eq(&holder.view, mem.view()), "a pin has one view");
        holder.place.set(pin);
        self.pin = Some(pin);
    }

    fn append(&mut self, slice: VolatileSlice<'_, ()>) {
        let base = slice.ptr_guard_mut().as_ptr();
        if let Some(last) = self.iovecs.last_mut()
            && last.iov_base.addr() + last.iov_len == base.addr()
        {
            last.iov_len += slice.len();
            return;
        }
        self.iovecs.push(libc::iovec {
            iov_base: base.cast(),
            iov_len: slice.len(),
        });
    }

    /// Total length in bytes.
    pub fn len(&self) -> u64 {
        self.len
    }

    /// Whether nothing is pinned.
    pub fn is_empty(&self) -> bool {
        self.len == 0
    }

    /// The list, for the kernel. The addresses are valid until [`PinnedBuffers::release`] or drop.
    pub fn iovecs(&self) -> &[libc::iovec] {
        &self.iovecs
    }

    /// The list as volatile slices, in order.
    pub fn slices(&self) -> impl Iterator<Item = VolatileSlice<'_, ()>> {
        self.iovecs.iter().map(|vec| {
            // SAFETY: each iovec was made from a slice of guest RAM, which `holder` keeps mapped for
            // as long as `self` is borrowed, and which is only accessed as volatile memory.
            #[expect(unsafe_code, reason = "host address back to a slice")]
            unsafe {
                VolatileSlice::new(vec.iov_base.cast(), vec.iov_len)
            }
        })
    }

    /// Copies from `data` into the buffers, beginning `offset` bytes into them; returns how many
    /// bytes fitted.
    pub fn copy_in(&self, offset: u64, data: &[u8]) -> usize {
        self.copy(offset, data.len(), |slice, at, done| {
            slice.write(&data[done..], at).unwrap_or(0)
        })
    }

    /// Copies from the buffers into `data`, beginning `offset` bytes into them; returns how many
    /// bytes there were.
    pub fn copy_out(&self, offset: u64, data: &mut [u8]) -> usize {
        let len = data.len();
        self.copy(offset, len, |slice, at, done| {
            slice.read(&mut data[done..], at).unwrap_or(0)
        })
    }

    fn copy(
        &self,
        offset: u64,
        len: usize,
        mut step: impl FnMut(VolatileSlice<'_, ()>, usize, usize) -> usize,
    ) -> usize {
        let Ok(mut skip) = usize::try_from(offset) else {
            return 0;
        };
        let mut done = 0;
        for slice in self.slices() {
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

    /// Lets go of the memory; the list is empty afterwards.
    pub fn release(&mut self) {
        self.iovecs.clear();
        self.len = 0;
        if self.pin.take().is_some()
            && let Some(holder) = &self.holder
        {
            holder.place.release();
            holder.space.invalidations().wake();
        }
    }
}

impl Drop for PinnedBuffers {
    fn drop(&mut self) {
        self.release();
    }
}

#[cfg(test)]
mod tests {
    use vm_memory::GuestAddress;

    use super::*;
    use crate::{GuestRam, SourceId, Upstream};

    fn memory() -> DmaMemory {
        let ram =
            GuestRam::from_ranges(&[(GuestAddress(0), 0x4000), (GuestAddress(0x10_0000), 0x2000)]);
        let space = DmaSpace::new(&Upstream::memory(ram.unwrap()), SourceId(0));
        space.set_bus_master(true);
        space.view()
    }

    #[test]
    fn neighbours_join_and_copies_cross_elements() {
        let mem = memory();
        let mut buffers = PinnedBuffers::new();
        buffers
            .push(&mem, Iova(0x1000), 0x800, Access::Write)
            .unwrap();
        buffers
            .push(&mem, Iova(0x1800), 0x800, Access::Write)
            .unwrap();
        assert_eq!(buffers.iovecs().len(), 1);
        buffers
            .push(&mem, Iova(0x10_0000), 0x1000, Access::Write)
            .unwrap();
        assert_eq!((buffers.iovecs().len(), buffers.len()), (2, 0x2000));
        let data: Vec<u8> = (0..=255).collect();
        assert_eq!(buffers.copy_in(0xf80, &data), 256);
        assert_eq!(mem.read_obj::<u8>(Iova(0x1fff)), Ok(127));
        assert_eq!(mem.read_obj::<u8>(Iova(0x10_0000)), Ok(128));
        let mut back = vec![0; 256];
        assert_eq!(buffers.copy_out(0xf80, &mut back), 256);
        assert_eq!(back, data);
        assert_eq!(buffers.copy_in(0x1ff0, &data), 16);
    }

    #[test]
    fn a_bad_range_changes_nothing() {
        let mem = memory();
        let mut buffers = PinnedBuffers::new();
        assert!(
            buffers
                .push(&mem, Iova(0x3000), 0x2000, Access::Read)
                .is_err()
        );
        assert!(buffers.is_empty() && buffers.pin.is_none());
        buffers
            .push(&mem, Iova(0x2000), 0x1000, Access::Read)
            .unwrap();
        assert!(
            buffers
                .push(&mem, Iova(0x3000), 0x2000, Access::Read)
                .is_err()
        );
        assert!(buffers.push(&mem, Iova(u64::MAX), 2, Access::Read).is_err());
        assert_eq!(
            (buffers.len(), buffers.iovecs()[0].iov_len),
            (0x1000, 0x1000)
        );
    }
}

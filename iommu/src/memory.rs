//! One worker's access to its function's memory.

use std::cell::Cell;
use std::iter::FusedIterator;
use std::sync::Arc;
use std::sync::atomic::Ordering;

use vm_memory::guest_memory::{GuestMemorySliceIterator, Result as VmResult};
use vm_memory::{
    AtomicAccess, ByteValued, Bytes, GuestAddress, GuestMemory, GuestMemoryBackend, Permissions,
    VolatileSlice,
};

use crate::drain::FIRST;
use crate::view::View;
use crate::{DmaError, DmaSpace, GuestRam, Iova};

/// A worker's private view of a [`DmaSpace`].
///
/// It may move to another thread but not be shared: what it caches is its own.
pub struct DmaMemory {
    space: Arc<DmaSpace>,
    view: Arc<View>,
    depth: Cell<u32>,
    /// Number of the last invalidation that was applied.
    seen: Cell<u64>,
}

/// An open section: while it lives, what the view resolved stays valid.
#[must_use = "the section ends when the guard is dropped"]
pub struct DmaSection<'a>(&'a DmaMemory);

impl Drop for DmaSection<'_> {
    fn drop(&mut self) {
        let depth = self.0.depth.get() - 1;
        self.0.depth.set(depth);
        if depth == 0 {
            self.0.view.section.leave();
            self.0.space.invalidations().wake();
        }
    }
}

impl DmaMemory {
    pub(crate) fn new(space: Arc<DmaSpace>, view: Arc<View>) -> DmaMemory {
        DmaMemory {
            space,
            view,
            depth: Cell::new(0),
            seen: Cell::new(FIRST),
        }
    }

    /// Opens a section (they nest). Open one around a batch of accesses, and always while a slice
    /// from [`GuestMemory::get_slices`] is in use; do not sleep in it.
    pub fn section(&self) -> DmaSection<'_> {
        let depth = self.depth.get();
        if depth == 0 {
            let seen = self.seen.get();
            let now = self.space.invalidations().enter(&self.view, seen);
            if now != seen {
                self.seen.set(now);
                self.view.section.renew(now);
            }
        }
        self.depth.set(depth + 1);
        DmaSection(self)
    }

    /// Reads one object.
    ///
    /// # Errors
    ///
    /// Bus mastering is off or part of the range is not memory.
    pub fn read_obj<T: ByteValued>(&self, iova: Iova) -> Result<T, DmaError> {
        let _section = self.section();
        let ram = self.open()?;
        ram.read_obj(GuestAddress(iova.0))
            .map_err(|_| not_mapped(iova, size_of::<T>()))
    }

    /// Writes one object; not atomic as a whole.
    ///
    /// # Errors
    ///
    /// As for [`DmaMemory::read_obj`].
    pub fn write_obj<T: ByteValued>(&self, iova: Iova, value: T) -> Result<(), DmaError> {
        let _section = self.section();
        let ram = self.open()?;
        ram.write_obj(value, GuestAddress(iova.0))
            .map_err(|_| not_mapped(iova, size_of::<T>()))
    }

    /// Fills `buf` from memory.
    ///
    /// # Errors
    ///
    /// As for [`DmaMemory::read_obj`]; `buf` may have been written in part.
    pub fn read(&self, iova: Iova, buf: &mut [u8]) -> Result<(), DmaError> {
        let _section = self.section();
        let ram = self.open()?;
        let len = buf.len();
        ram.read_slice(buf, GuestAddress(iova.0))
            .map_err(|_| not_mapped(iova, len))
    }

    /// Writes `buf` to memory.
    ///
    /// # Errors
    ///
    /// As for [`DmaMemory::read_obj`]; memory may have been written in part.
    pub fn write(&self, iova: Iova, buf: &[u8]) -> Result<(), DmaError> {
        let _section = self.section();
        let ram = self.open()?;
        ram.write_slice(buf, GuestAddress(iova.0))
            .map_err(|_| not_mapped(iova, buf.len()))
    }

    /// Loads an integer atomically.
    ///
    /// # Errors
    ///
    /// As for [`DmaMemory::read_obj`], or the address is not aligned.
    pub fn load<T: AtomicAccess>(&self, iova: Iova, order: Ordering) -> Result<T, DmaError> {
        let _section = self.section();
        let ram = self.open()?;
        ram.load(GuestAddress(iova.0), order)
            .map_err(|_| not_mapped(iova, size_of::<T>()))
    }

    /// Stores an integer atomically.
    ///
    /// # Errors
    ///
    /// As for [`DmaMemory::load`].
    pub fn store<T: AtomicAccess>(
        &self,
        iova: Iova,
        value: T,
        order: Ordering,
    ) -> Result<(), DmaError> {
        let _section = self.section();
        let ram = self.open()?;
        ram.store(value, GuestAddress(iova.0), order)
            .map_err(|_| not_mapped(iova, size_of::<T>()))
    }

    /// The space that this is a view of.
    pub fn space(&self) -> &Arc<DmaSpace> {
        &self.space
    }

    pub(crate) fn view(&self) -> &Arc<View> {
        &self.view
    }

    pub(crate) fn seen(&self) -> u64 {
        self.seen.get()
    }

    pub(crate) fn open(&self) -> Result<&GuestRam, DmaError> {
        if self.space.bus_master() {
            Ok(self.space.ram())
        } else {
            Err(DmaError::BusMasterOff)
        }
    }
}

fn not_mapped(iova: Iova, len: usize) -> DmaError {
    DmaError::NotMapped(iova, u64::try_from(len).unwrap_or(u64::MAX))
}

/// Slices of a range; empty after the first error.
struct Slices<I>(I);

impl<'a, I: Iterator<Item = VmResult<VolatileSlice<'a, ()>>>> Iterator for Slices<I> {
    type Item = I::Item;

    fn next(&mut self) -> Option<I::Item> {
        self.0.next()
    }
}

impl<'a, I: FusedIterator<Item = VmResult<VolatileSlice<'a, ()>>>> FusedIterator for Slices<I> {}
impl<'a, I: FusedIterator<Item = VmResult<VolatileSlice<'a, ()>>>> GuestMemorySliceIterator<'a, ()>
    for Slices<I>
{
}

/// Addresses given to this implementation are [`Iova`]s.
impl GuestMemory for DmaMemory {
    type PhysicalMemory = GuestRam;
    type Bitmap = ();

    fn check_range(&self, addr: GuestAddress, count: usize, _access: Permissions) -> bool {
        let _section = self.section();
        self.open()
            .is_ok_and(|ram| GuestMemoryBackend::check_range(ram, addr, count))
    }

    fn get_slices<'a>(
        &'a self,
        addr: GuestAddress,
        count: usize,
        _access: Permissions,
    ) -> VmResult<impl GuestMemorySliceIterator<'a, ()>> {
        debug_assert!(
            self.depth.get() > 0,
            "slices outlive the access only inside a section"
        );
        let ram = self.open().map_err(|_| {
            vm_memory::GuestMemoryError::IOError(std::io::Error::other(DmaError::BusMasterOff))
        })?;
        Ok(Slices(GuestMemoryBackend::get_slices(ram, addr, count)))
    }
}

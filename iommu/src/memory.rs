//! One worker's access to its function's memory.

use std::cell::Cell;
use std::sync::Arc;
use std::sync::atomic::Ordering;

use vm_memory::guest_memory::{GuestMemorySliceIterator, Result as VmResult};
use vm_memory::{
    AtomicAccess, ByteValued, Bytes, GuestAddress, GuestMemory, Permissions, VolatileSlice,
};

use crate::slices::{Slices, VmSlices, host, refused};
use crate::sync::LOG;
use crate::tlb::{Need, Target};
use crate::translate::{Translator, is_interrupt};
use crate::view::View;
use crate::{DmaError, DmaSpace, GuestRam, Invalidation, Iova, MsiMessage};

/// A worker's private view of a [`DmaSpace`].
///
/// It may move to another thread but not be shared: what it caches is its own.
pub struct DmaMemory {
    space: Arc<DmaSpace>,
    view: Arc<View>,
    depth: Cell<u32>,
    /// Number of the last invalidation that was applied.
    seen: Cell<u64>,
    translator: Translator,
}

impl Drop for DmaMemory {
    fn drop(&mut self) {
        self.space.retire(&self.view);
    }
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
    pub(crate) fn new(space: Arc<DmaSpace>, view: Arc<View>, translator: Translator) -> DmaMemory {
        // What is published from here on may concern what it will cache.
        let seen = space.invalidations().sequence();
        DmaMemory {
            space,
            view,
            depth: Cell::new(0),
            seen: Cell::new(seen),
            translator,
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
                self.catch_up(seen, now);
            }
        }
        self.depth.set(depth + 1);
        DmaSection(self)
    }

    /// Applies the invalidations after number `seen` up to `now`.
    #[cold]
    fn catch_up(&self, seen: u64, now: u64) {
        let apply = |invalidation| self.translator.apply(invalidation, &self.view.counters);
        if now - seen > LOG {
            apply(Invalidation::Everything);
        } else {
            for number in seen + 1..=now {
                // One that has left the log meanwhile may have been anything.
                let invalidation = self.space.invalidations().read(number);
                apply(invalidation.unwrap_or(Invalidation::Everything));
            }
        }
        self.seen.set(now);
        self.view.section.renew(now);
    }

    /// Reads one object.
    ///
    /// # Errors
    ///
    /// Bus mastering is off, part of the range is not memory, or the IOMMU blocks the access.
    pub fn read_obj<T: ByteValued>(&self, iova: Iova) -> Result<T, DmaError> {
        let _section = self.section();
        if let Some(slice) = self.whole(iova, size_of::<T>(), Need::READ)? {
            return slice
                .read_obj(0)
                .map_err(|_| not_mapped(iova, size_of::<T>()));
        }
        let mut value = T::zeroed();
        self.read(iova, value.as_mut_slice())?;
        Ok(value)
    }

    /// Writes one object; not atomic as a whole.
    ///
    /// # Errors
    ///
    /// As for [`DmaMemory::read_obj`].
    pub fn write_obj<T: ByteValued>(&self, iova: Iova, value: T) -> Result<(), DmaError> {
        if is_interrupt(iova.0) {
            return self.interrupt(iova, value.as_slice());
        }
        let _section = self.section();
        if let Some(slice) = self.whole(iova, size_of::<T>(), Need::WRITE)? {
            return slice
                .write_obj(value, 0)
                .map_err(|_| not_mapped(iova, size_of::<T>()));
        }
        self.write(iova, value.as_slice())
    }

    /// Fills `buf` from memory.
    ///
    /// # Errors
    ///
    /// As for [`DmaMemory::read_obj`]; `buf` may have been written in part.
    pub fn read(&self, iova: Iova, buf: &mut [u8]) -> Result<(), DmaError> {
        let _section = self.section();
        let mut rest = buf;
        for slice in self.slices(iova, rest.len(), Need::READ)? {
            let slice = slice?;
            let (part, more) = rest.split_at_mut(slice.len().min(rest.len()));
            slice.copy_to(part);
            rest = more;
        }
        Ok(())
    }

    /// Writes `buf` to memory. Four bytes written to the interrupt address range, at a multiple of
    /// four, are an interrupt request.
    ///
    /// # Errors
    ///
    /// As for [`DmaMemory::read_obj`]; memory may have been written in part.
    pub fn write(&self, iova: Iova, buf: &[u8]) -> Result<(), DmaError> {
        if is_interrupt(iova.0) {
            return self.interrupt(iova, buf);
        }
        let _section = self.section();
        let mut rest = buf;
        for slice in self.slices(iova, rest.len(), Need::WRITE)? {
            let slice = slice?;
            let (part, more) = rest.split_at(slice.len().min(rest.len()));
            slice.copy_from(part);
            rest = more;
        }
        Ok(())
    }

    /// Loads an integer atomically.
    ///
    /// # Errors
    ///
    /// As for [`DmaMemory::read_obj`], or the address is not aligned.
    pub fn load<T: AtomicAccess>(&self, iova: Iova, order: Ordering) -> Result<T, DmaError> {
        let _section = self.section();
        self.whole(iova, size_of::<T>(), Need::READ)?
            .and_then(|slice| slice.load(0, order).ok())
            .ok_or_else(|| not_mapped(iova, size_of::<T>()))
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
        if is_interrupt(iova.0) {
            return self.interrupt(iova, value.as_slice());
        }
        let _section = self.section();
        self.whole(iova, size_of::<T>(), Need::WRITE)?
            .and_then(|slice| slice.store(value, 0, order).ok())
            .ok_or_else(|| not_mapped(iova, size_of::<T>()))
    }

    /// A write to the interrupt address range.
    #[cold]
    fn interrupt(&self, iova: Iova, data: &[u8]) -> Result<(), DmaError> {
        let _section = self.section();
        self.open()?;
        let refused = not_mapped(iova, data.len());
        let Ok(data) = <[u8; 4]>::try_from(data) else {
            return Err(refused);
        };
        if !iova.0.is_multiple_of(4) {
            return Err(refused);
        }
        let (source, data) = (self.view.source, u32::from_le_bytes(data));
        match self.translator.remapper() {
            Some(remapper) => remapper.interrupt_write(source, iova.0, data),
            None => {
                let address = iova.0;
                let message = MsiMessage { address, data };
                self.space.msi().send(source, message).map_err(|_| refused)
            }
        }
    }

    /// The memory of a range that is one piece of host memory; `None` if it may be several.
    #[inline]
    fn whole(
        &self,
        iova: Iova,
        len: usize,
        need: Need,
    ) -> Result<Option<VolatileSlice<'_, ()>>, DmaError> {
        self.open()?;
        let want = u64::try_from(len).unwrap_or(u64::MAX);
        let target = self.translate(iova.0, need)?;
        if target.room < want {
            return Ok(None);
        }
        let slice = host(self, target.gpa, want).ok_or_else(|| not_mapped(iova, len))?;
        Ok((slice.len() == len).then_some(slice))
    }

    /// The pieces of a range.
    pub(crate) fn slices(
        &self,
        iova: Iova,
        len: usize,
        need: Need,
    ) -> Result<Slices<'_>, DmaError> {
        self.open()?;
        let len = u64::try_from(len).unwrap_or(u64::MAX);
        Ok(Slices::new(self, iova, len, need))
    }

    /// Where an address leads.
    #[inline]
    pub(crate) fn translate(&self, iova: u64, need: Need) -> Result<Target, DmaError> {
        debug_assert!(self.depth.get() > 0, "a translation is valid in a section");
        self.translator.translate(iova, need, &self.view.counters)
    }

    /// The domain that applies to an access.
    pub(crate) fn domain(&self, iova: Iova, need: Need) -> Result<u16, DmaError> {
        self.translator.domain(iova, need, &self.view.counters)
    }

    pub(crate) fn ram(&self) -> &GuestRam {
        self.space.ram()
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

    fn open(&self) -> Result<(), DmaError> {
        if self.space.bus_master() {
            Ok(())
        } else {
            Err(DmaError::BusMasterOff)
        }
    }
}

fn not_mapped(iova: Iova, len: usize) -> DmaError {
    DmaError::NotMapped(iova, u64::try_from(len).unwrap_or(u64::MAX))
}

/// Addresses given to this implementation are [`Iova`]s.
impl GuestMemory for DmaMemory {
    type PhysicalMemory = GuestRam;
    type Bitmap = ();

    /// Translates the range as an access would: the IOMMU records a fault where it blocks it.
    fn check_range(&self, addr: GuestAddress, count: usize, access: Permissions) -> bool {
        let _section = self.section();
        self.slices(Iova(addr.0), count, need(access))
            .is_ok_and(|mut slices| slices.all(|slice| slice.is_ok()))
    }

    fn get_slices<'a>(
        &'a self,
        addr: GuestAddress,
        count: usize,
        access: Permissions,
    ) -> VmResult<impl GuestMemorySliceIterator<'a, ()>> {
        debug_assert!(
            self.depth.get() > 0,
            "slices outlive the access only inside a section"
        );
        let slices = self.slices(Iova(addr.0), count, need(access));
        slices.and_then(VmSlices::new).map_err(refused)
    }
}

/// No permission at all still needs a mapping.
fn need(access: Permissions) -> Need {
    match access {
        Permissions::No => Need(0),
        Permissions::Read => Need::READ,
        Permissions::Write => Need::WRITE,
        Permissions::ReadWrite => Need(Need::READ.0 | Need::WRITE.0),
    }
}

//! A range of a function's addresses as pieces of host memory.

use std::iter::FusedIterator;

use vm_memory::guest_memory::{GuestMemorySliceIterator, Result as VmResult};
use vm_memory::{
    GuestAddress, GuestMemoryBackend, GuestMemoryError, GuestMemoryRegion, MemoryRegionAddress,
    VolatileSlice,
};

use crate::tlb::Need;
use crate::{DmaError, DmaMemory, Iova};

/// The pieces in order, as long as neighbouring pages allow; nothing follows the first error.
pub(crate) struct Slices<'a> {
    mem: &'a DmaMemory,
    need: Need,
    /// The next address to translate, and how much there is to translate from it on.
    iova: u64,
    left: u64,
    /// Translated and not given out yet: guest-physical address and length.
    run: (u64, u64),
    /// What the translation after the run gave: the next run, or the end.
    after: Option<Result<(u64, u64), DmaError>>,
}

impl<'a> Slices<'a> {
    pub(crate) fn new(mem: &'a DmaMemory, iova: Iova, len: u64, need: Need) -> Slices<'a> {
        Slices {
            mem,
            need,
            iova: iova.0,
            left: len,
            run: (0, 0),
            after: None,
        }
    }

    /// Translates on to the next page border.
    #[inline]
    fn translate(&mut self) -> Result<(u64, u64), DmaError> {
        let target = self.mem.translate(self.iova, self.need)?;
        let len = target.room.min(self.left);
        self.left -= len;
        if self.left > 0 {
            // An address space has an end.
            self.iova = self
                .iova
                .checked_add(len)
                .ok_or(DmaError::NotMapped(Iova(self.iova), self.left))?;
        }
        Ok((target.gpa, len))
    }

    /// Translates on to where the guest-physical addresses stop touching.
    fn advance(&mut self) -> Result<bool, DmaError> {
        let (gpa, mut len) = match self.after.take() {
            Some(run) => run?,
            None if self.left == 0 => return Ok(false),
            None => self.translate()?,
        };
        while self.left > 0 {
            match self.translate() {
                Ok((next, more)) if gpa.checked_add(len) == Some(next) => len += more,
                other => {
                    self.after = Some(other);
                    break;
                }
            }
        }
        self.run = (gpa, len);
        Ok(true)
    }

    fn step(&mut self) -> Result<Option<VolatileSlice<'a, ()>>, DmaError> {
        if self.run.1 == 0 && !self.advance()? {
            return Ok(None);
        }
        let (gpa, len) = self.run;
        let slice = host(self.mem, gpa, len).ok_or(DmaError::NotMapped(Iova(gpa), len))?;
        let done = u64::try_from(slice.len()).unwrap_or(len);
        self.run = (gpa.saturating_add(done), len - done);
        Ok(Some(slice))
    }
}

/// The memory at `gpa`: `len` bytes, or less if its region ends before.
#[inline]
pub(crate) fn host(mem: &DmaMemory, gpa: u64, len: u64) -> Option<VolatileSlice<'_, ()>> {
    let region = mem.ram().find_region(GuestAddress(gpa))?;
    let offset = gpa - region.start_addr().0;
    let len = len.min(region.len() - offset);
    region
        .get_slice(MemoryRegionAddress(offset), usize::try_from(len).ok()?)
        .ok()
}

impl<'a> Iterator for Slices<'a> {
    type Item = Result<VolatileSlice<'a, ()>, DmaError>;

    fn next(&mut self) -> Option<Self::Item> {
        let step = self.step();
        if step.is_err() {
            (self.left, self.run, self.after) = (0, (0, 0), None);
        }
        step.transpose()
    }
}

impl FusedIterator for Slices<'_> {}

/// The same for vm-memory, whose accesses to rings are one piece nearly always.
pub(crate) enum VmSlices<'a> {
    /// The only piece, until it is taken.
    One(Option<VolatileSlice<'a, ()>>),
    Several(Slices<'a>),
}

impl<'a> VmSlices<'a> {
    #[inline]
    pub(crate) fn new(mut slices: Slices<'a>) -> Result<VmSlices<'a>, DmaError> {
        if slices.left > 0 {
            let (gpa, len) = slices.translate()?;
            if slices.left == 0
                && let Some(slice) = host(slices.mem, gpa, len)
                && u64::try_from(slice.len()) == Ok(len)
            {
                return Ok(VmSlices::One(Some(slice)));
            }
            slices.after = Some(Ok((gpa, len)));
        }
        Ok(VmSlices::Several(slices))
    }
}

impl<'a> Iterator for VmSlices<'a> {
    type Item = VmResult<VolatileSlice<'a, ()>>;

    #[inline]
    fn next(&mut self) -> Option<Self::Item> {
        match self {
            VmSlices::One(slice) => slice.take().map(Ok),
            VmSlices::Several(slices) => Some(slices.next()?.map_err(refused)),
        }
    }
}

impl FusedIterator for VmSlices<'_> {}
impl<'a> GuestMemorySliceIterator<'a, ()> for VmSlices<'a> {}

/// Why vm-memory's caller gets no memory.
pub(crate) fn refused(error: DmaError) -> GuestMemoryError {
    GuestMemoryError::IOError(std::io::Error::other(error))
}

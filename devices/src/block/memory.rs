//! A disk in anonymous memory.

use std::io;
use std::sync::Arc;

use vm_memory::{MmapRegion, VolatileMemory, VolatileSlice};

use super::immediate::{Execute, ImmediateQueue};
use super::{BlockBackend, BlockInfo, BlockOp, BlockQueue, BlockRequest};

/// Host page size on x86-64, at whose granularity memory is given back.
const PAGE: usize = 4096;

/// Bytes kept in memory until the process ends; pages are taken from the host as they are written.
/// Flush and FUA have nothing to do: this is the disk's only storage.
#[derive(Debug)]
pub struct MemoryBackend {
    info: BlockInfo,
    region: MmapRegion<()>,
}

impl MemoryBackend {
    /// A disk of zeroes of `capacity` bytes, rounded down to whole blocks of 512 bytes.
    ///
    /// # Errors
    ///
    /// The host has no room for it, or it is smaller than a block.
    pub fn new(capacity: u64) -> io::Result<Arc<MemoryBackend>> {
        Self::with_access(capacity, false)
    }

    /// As [`MemoryBackend::new`], but nothing can be written to it.
    ///
    /// # Errors
    ///
    /// As above.
    pub fn new_read_only(capacity: u64) -> io::Result<Arc<MemoryBackend>> {
        Self::with_access(capacity, true)
    }

    fn with_access(capacity: u64, read_only: bool) -> io::Result<Arc<MemoryBackend>> {
        let capacity = capacity - capacity % 512;
        let refuse = |why: &dyn std::fmt::Display| {
            io::Error::new(
                io::ErrorKind::OutOfMemory,
                format!("cannot reserve {capacity} bytes of memory for a disk: {why}"),
            )
        };
        let size = usize::try_from(capacity).map_err(|error| refuse(&error))?;
        if size == 0 {
            return Err(io::Error::new(
                io::ErrorKind::InvalidInput,
                "a disk in memory needs at least 512 bytes",
            ));
        }
        let region = MmapRegion::new(size).map_err(|error| refuse(&error))?;
        Ok(Arc::new(MemoryBackend {
            info: BlockInfo {
                capacity,
                logical_block: 512,
                read_only,
                discard: true,
            },
            region,
        }))
    }

    fn slice(&self, offset: u64, len: u64) -> io::Result<VolatileSlice<'_, ()>> {
        let outside = |_| io::Error::from(io::ErrorKind::InvalidInput);
        let offset = usize::try_from(offset).map_err(outside)?;
        let len = usize::try_from(len).map_err(outside)?;
        self.region
            .get_slice(offset, len)
            .map_err(|_| io::ErrorKind::InvalidInput.into())
    }

    /// Copies between the disk and the request's buffers.
    fn transfer(
        &self,
        offset: u64,
        request: &BlockRequest,
        copy: impl Fn(VolatileSlice<'_, ()>, VolatileSlice<'_, ()>),
    ) -> io::Result<()> {
        let disk = self.slice(offset, request.buffers.len())?;
        let mut done = 0;
        for guest in request.buffers.slices() {
            let part = disk
                .subslice(done, guest.len())
                .map_err(|_| io::Error::from(io::ErrorKind::InvalidInput))?;
            done += guest.len();
            copy(part, guest);
        }
        Ok(())
    }

    /// Makes a range read as zeroes: whole pages go back to the host, the edges are written.
    fn zero(&self, offset: u64, len: u64, unmap: bool) -> io::Result<()> {
        const ZEROES: [u8; PAGE] = [0; PAGE];
        let range = self.slice(offset, len)?;
        let base = range.ptr_guard_mut().as_ptr();
        let head = base.align_offset(PAGE).min(range.len());
        let pages = (range.len() - head) / PAGE * PAGE;
        let unmapped = unmap && pages > 0 && {
            // SAFETY: the range is inside `region`, which is a private anonymous mapping that only
            // volatile slices refer to; after the call its pages read as zeroes.
            #[expect(unsafe_code, reason = "giving pages of an own mapping back")]
            let freed = unsafe {
                rustix::mm::madvise(
                    base.wrapping_add(head).cast(),
                    pages,
                    rustix::mm::Advice::LinuxDontNeed,
                )
            };
            freed.is_ok()
        };
        let mut at = 0;
        while at < range.len() {
            if unmapped && at == head {
                at += pages;
                continue;
            }
            let end = if unmapped && at < head {
                head
            } else {
                range.len()
            };
            let part = (end - at).min(PAGE);
            let slice = range
                .subslice(at, part)
                .map_err(|_| io::Error::from(io::ErrorKind::InvalidInput))?;
            slice.copy_from(&ZEROES[..part]);
            at += part;
        }
        Ok(())
    }
}

impl BlockBackend for MemoryBackend {
    fn info(&self) -> BlockInfo {
        self.info
    }

    fn open_queue(self: Arc<Self>, depth: u16) -> io::Result<Box<dyn BlockQueue>> {
        Ok(Box::new(ImmediateQueue::new(self, depth)))
    }
}

impl Execute for MemoryBackend {
    fn execute(&self, request: &BlockRequest) -> io::Result<()> {
        match request.op {
            BlockOp::Read { offset } => self.transfer(offset, request, |disk, guest| {
                disk.copy_to_volatile_slice(guest);
            }),
            BlockOp::Write { offset, .. } => self.transfer(offset, request, |disk, guest| {
                guest.copy_to_volatile_slice(disk);
            }),
            BlockOp::Flush => Ok(()),
            BlockOp::WriteZeroes {
                offset, len, unmap, ..
            } => self.zero(offset, len, unmap),
            BlockOp::Discard { offset, len } => self.zero(offset, len, true),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::block::suite;

    #[test]
    fn passes_the_suite() {
        suite::run(
            &|| MemoryBackend::new(suite::CAPACITY).unwrap(),
            suite::Keeps::Data,
        );
    }

    #[test]
    fn read_only_passes_the_suite() {
        suite::run_read_only(&|| MemoryBackend::new_read_only(suite::CAPACITY).unwrap());
    }

    #[test]
    fn impossible_sizes_are_refused() {
        assert!(MemoryBackend::new(511).is_err());
        let error = MemoryBackend::new(u64::MAX).unwrap_err();
        assert!(error.to_string().contains("bytes of memory"), "{error}");
    }
}

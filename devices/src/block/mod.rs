//! Block back ends: where a disk's bytes are kept.
//!
//! A [`BlockBackend`] is shared by the queues of one disk; each worker opens a [`BlockQueue`] of its
//! own, so that the data path takes no lock. Every implementation passes one shared test suite
//! (`suite.rs`).
//!
//! - [`FileBackend`]: a raw file or block device through io_uring, buffered or `O_DIRECT`.
//! - [`MemoryBackend`]: anonymous memory, gone with the process.
//! - [`NullBackend`]: moves nothing; what remains is the cost of the path to it.
//! - [`FaultyBackend`]: wraps another one in tests, to fail or hold requests.

mod faulty;
mod file;
mod immediate;
mod memory;
mod null;
#[cfg(test)]
mod suite;

pub use faulty::{Fault, FaultyBackend};
pub use file::{FileBackend, FileOptions, OpenError};
pub use memory::MemoryBackend;
pub use null::NullBackend;

use std::io;
use std::os::fd::RawFd;
use std::sync::Arc;

use iommu::PinnedBuffers;

/// What a back end is and can do. Lengths and offsets are in bytes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct BlockInfo {
    /// Capacity; a multiple of `logical_block`.
    pub capacity: u64,
    /// Smallest unit of access: offsets and lengths are multiples of it.
    pub logical_block: u32,
    /// Writes are refused with [`io::ErrorKind::ReadOnlyFilesystem`].
    pub read_only: bool,
    /// Discard frees space.
    pub discard: bool,
}

impl BlockInfo {
    /// Whether `op` on `buffers` bytes may be carried out: inside the capacity, whole blocks, and
    /// no change to a read-only disk.
    ///
    /// # Errors
    ///
    /// [`io::ErrorKind::InvalidInput`] or [`io::ErrorKind::ReadOnlyFilesystem`].
    pub fn check(&self, op: BlockOp, buffers: u64) -> io::Result<()> {
        let (offset, len, changes) = match op {
            BlockOp::Read { offset } => (offset, buffers, false),
            BlockOp::Write { offset, .. } => (offset, buffers, true),
            BlockOp::Flush => (0, 0, false),
            BlockOp::WriteZeroes { offset, len, .. } | BlockOp::Discard { offset, len } => {
                (offset, len, true)
            }
        };
        if changes && self.read_only {
            return Err(io::ErrorKind::ReadOnlyFilesystem.into());
        }
        let block = u64::from(self.logical_block);
        let inside = offset
            .checked_add(len)
            .is_some_and(|end| end <= self.capacity);
        if inside && offset.is_multiple_of(block) && len.is_multiple_of(block) {
            Ok(())
        } else {
            Err(io::ErrorKind::InvalidInput.into())
        }
    }
}

/// What to do.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum BlockOp {
    /// Bytes at `offset` into the request's buffers, as many as they hold.
    Read {
        /// Where on the disk.
        offset: u64,
    },
    /// The request's buffers to `offset`.
    Write {
        /// Where on the disk.
        offset: u64,
        /// Completes only when the data is on stable storage.
        fua: bool,
    },
    /// All writes completed before this was pushed are on stable storage when it completes.
    Flush,
    /// Afterwards the range reads as zeroes.
    WriteZeroes {
        /// Where on the disk.
        offset: u64,
        /// How much.
        len: u64,
        /// The space may be freed.
        unmap: bool,
        /// Completes only when the zeroes are on stable storage.
        fua: bool,
    },
    /// The range's contents are no longer needed; afterwards it reads as zeroes or as before.
    Discard {
        /// Where on the disk.
        offset: u64,
        /// How much.
        len: u64,
    },
}

/// One request. The queue owns the buffers until it gives them back with the completion, so nobody
/// can let go of memory that the kernel still writes to.
pub struct BlockRequest {
    /// What to do.
    pub op: BlockOp,
    /// Guest memory; empty but for reads and writes.
    pub buffers: PinnedBuffers,
    /// The caller's name for the request.
    pub tag: u64,
}

/// How a request ended.
pub struct BlockCompletion {
    /// [`BlockRequest::tag`].
    pub tag: u64,
    /// The host's error, if it failed. A short transfer is an error.
    pub result: io::Result<()>,
    /// [`BlockRequest::buffers`], still pinned.
    pub buffers: PinnedBuffers,
}

/// A disk's storage, shared by its queues.
pub trait BlockBackend: Send + Sync {
    /// What it is.
    fn info(&self) -> BlockInfo;

    /// Opens an independent queue for one worker, for up to `depth` requests in flight.
    ///
    /// # Errors
    ///
    /// The host has no resources for another queue.
    fn open_queue(self: Arc<Self>, depth: u16) -> io::Result<Box<dyn BlockQueue>>;
}

/// One worker's way to a back end. Dropping it waits for what is in flight.
pub trait BlockQueue: Send {
    /// Queues a request; it may start at once or at the next [`BlockQueue::submit`]. The caller never
    /// has more than the queue's depth in flight ([`io::ErrorKind::ResourceBusy`]), and only asks
    /// for what [`BlockInfo::check`] allows, or the request ends with that error.
    fn push(&mut self, request: BlockRequest);

    /// Starts what was pushed, with one system call, or none if there is nothing to start.
    fn submit(&mut self);

    /// Takes one completion, if there is one. Call it until there is none: the last call may submit
    /// what continues a short transfer; otherwise no system call.
    fn reap(&mut self) -> Option<BlockCompletion>;

    /// Requests pushed and not yet reaped.
    fn in_flight(&self) -> usize;

    /// Readable while there are completions to reap; `None` if requests end as they are pushed.
    fn fd(&self) -> Option<RawFd>;
}

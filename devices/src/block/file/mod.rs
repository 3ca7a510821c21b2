//! Raw files and block devices.

mod buffer;
mod open;
mod queue;
#[cfg(test)]
mod tests;

use std::fs::File;
use std::io;
use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};

pub use open::OpenError;

use super::{BlockBackend, BlockInfo, BlockQueue};
use queue::FileQueue;

/// How to open a disk image.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct FileOptions {
    /// A raw file or a block device.
    pub path: PathBuf,
    /// Nothing is written, and others may read it at the same time.
    pub read_only: bool,
    /// Around the host's page cache, with `O_DIRECT`. Guest buffers that are not aligned as the
    /// host demands are copied through bounce buffers (see [`FileBackend::bounced`]).
    pub direct: bool,
}

impl FileOptions {
    /// Buffered, for reading and writing.
    pub fn new(path: impl Into<PathBuf>) -> FileOptions {
        FileOptions {
            path: path.into(),
            read_only: false,
            direct: false,
        }
    }
}

/// A disk image, locked for as long as this lives: one writer, or any number of readers.
///
/// Each queue has an `io_uring` of its own and hands guest memory to the kernel as it is. A flush is
/// `fdatasync`; FUA is `RWF_DSYNC`; discarded and unmapped ranges become holes. What the file system
/// cannot do by itself (zeroing a range) is done by writing zeroes.
#[derive(Debug)]
pub struct FileBackend {
    file: File,
    info: BlockInfo,
    align: Align,
    /// The file system cannot zero ranges; found out by trying.
    no_zero_range: AtomicBool,
    /// It cannot punch holes.
    no_punch_hole: AtomicBool,
    bounced: AtomicU64,
}

/// What I/O on the file demands.
#[derive(Clone, Copy, Debug)]
struct Align {
    /// Of memory addresses and of the length of each piece; 1 without `O_DIRECT`.
    memory: usize,
    /// Of transfer lengths and offsets; 1 without `O_DIRECT`.
    offset: u64,
}

impl FileBackend {
    /// Opens and locks a disk image.
    ///
    /// A size that is not a multiple of the block is rounded down, with a warning: the bytes after
    /// the last whole block cannot be reached.
    ///
    /// # Errors
    ///
    /// See [`OpenError`]; nothing is created or changed.
    pub fn open(options: &FileOptions) -> Result<Arc<FileBackend>, OpenError> {
        let opened = open::open(options)?;
        Ok(Arc::new(FileBackend {
            file: opened.file,
            info: opened.info,
            align: opened.align,
            no_zero_range: AtomicBool::new(false),
            no_punch_hole: AtomicBool::new(false),
            bounced: AtomicU64::new(0),
        }))
    }

    /// Requests whose memory was not aligned for `O_DIRECT`, so that they were copied.
    pub fn bounced(&self) -> u64 {
        self.bounced.load(Ordering::Relaxed)
    }
}

impl BlockBackend for FileBackend {
    fn info(&self) -> BlockInfo {
        self.info
    }

    fn open_queue(self: Arc<Self>, depth: u16) -> io::Result<Box<dyn BlockQueue>> {
        Ok(Box::new(FileQueue::new(self, depth)?))
    }
}

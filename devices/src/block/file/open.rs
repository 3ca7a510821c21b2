//! Opening and locking a disk image, and finding out what I/O on it demands.

use std::fs::{File, OpenOptions};
use std::io::{self, Seek, SeekFrom};
use std::os::fd::AsRawFd;
use std::os::unix::fs::{FileTypeExt, OpenOptionsExt};
use std::path::{Path, PathBuf};

use rustix::fs::{AtFlags, FallocateFlags, StatxFlags};

use super::{Align, FileOptions};
use crate::block::BlockInfo;

/// Why a disk image cannot be used. The texts name the file and fit into one line.
#[derive(Debug, thiserror::Error)]
pub enum OpenError {
    /// There is no such file.
    #[error("{path}: no such disk image; create it first, for example with truncate -s 1G {path}", path = .0.display())]
    Missing(PathBuf),
    /// Access is denied.
    #[error("{path}: no permission to open this disk image for {access}{hint}", path = .path.display())]
    Permission {
        /// The image.
        path: PathBuf,
        /// What was asked for.
        access: &'static str,
        /// What else could be asked for.
        hint: &'static str,
    },
    /// Any other failure of the host.
    #[error("{path}: cannot use this disk image: {source}", path = .path.display())]
    Io {
        /// The image.
        path: PathBuf,
        /// What the host said.
        source: io::Error,
    },
    /// A directory, pipe, socket or character device.
    #[error("{path}: neither a regular file nor a block device", path = .0.display())]
    NotADisk(PathBuf),
    /// The host has it mounted or otherwise claimed.
    #[error("{path}: this block device is in use by the host (mounted?); unmount it, or open it with readonly", path = .0.display())]
    Claimed(PathBuf),
    /// Another open file holds a lock that excludes ours.
    #[error("{path}: already in use {by}; a disk image has one writer, or any number of users that all open it with readonly", path = .path.display())]
    Locked {
        /// The image.
        path: PathBuf,
        /// The kind of user.
        by: &'static str,
    },
    /// There is not even one block.
    #[error("{path}: {size} bytes are too small for a disk, which needs at least {block}", path = .path.display())]
    TooSmall {
        /// The image.
        path: PathBuf,
        /// Its size in bytes.
        size: u64,
        /// The logical block size.
        block: u32,
    },
    /// `O_DIRECT` is not possible there.
    #[error("{path}: its file system does not support O_DIRECT; leave out direct", path = .0.display())]
    NoDirect(PathBuf),
    /// The host demands an alignment that no guest would keep.
    #[error("{path}: O_DIRECT needs transfers of {0} bytes here, more than 64 KiB; leave out direct", .align, path = .path.display())]
    DirectTooCoarse {
        /// The image.
        path: PathBuf,
        /// The alignment in bytes.
        align: u64,
    },
}

/// What [`open`] found.
pub(super) struct Opened {
    pub(super) file: File,
    pub(super) info: BlockInfo,
    pub(super) align: Align,
}

pub(super) fn open(options: &FileOptions) -> Result<Opened, OpenError> {
    let path = &options.path;
    let fail = |source| OpenError::Io {
        path: path.clone(),
        source,
    };
    // Looked at before it is opened: opening a pipe would wait, opening a device may do things.
    let kind = std::fs::metadata(path)
        .map_err(|error| open_error(options, error))?
        .file_type();
    if !kind.is_file() && !kind.is_block_device() {
        return Err(OpenError::NotADisk(path.clone()));
    }
    let mut flags = 0;
    if options.direct {
        flags |= libc::O_DIRECT;
    }
    if kind.is_block_device() && !options.read_only {
        // Without O_CREAT: fails while the host has the device mounted (open(2)).
        flags |= libc::O_EXCL;
    }
    let mut file = OpenOptions::new()
        .read(true)
        .write(!options.read_only)
        .custom_flags(flags)
        .open(path)
        .map_err(|error| open_error(options, error))?;
    lock(&file, options)?;
    let sector = if kind.is_block_device() {
        rustix::fs::ioctl_blksszget(&file).map_err(|error| fail(error.into()))?
    } else {
        512
    };
    let align = if options.direct {
        direct_align(&file, kind.is_block_device(), sector)
            .map_err(fail)?
            .ok_or_else(|| OpenError::NoDirect(path.clone()))?
    } else {
        Align {
            memory: 1,
            offset: 1,
        }
    };
    let logical_block = match u32::try_from(align.offset) {
        Ok(offset @ ..=65536) => sector.max(offset),
        _ => {
            return Err(OpenError::DirectTooCoarse {
                path: path.clone(),
                align: align.offset,
            });
        }
    };
    let size = file.seek(SeekFrom::End(0)).map_err(fail)?;
    let rest = size % u64::from(logical_block);
    let capacity = size - rest;
    if capacity == 0 {
        return Err(OpenError::TooSmall {
            path: path.clone(),
            size,
            block: logical_block,
        });
    }
    if rest != 0 {
        tracing::warn!(
            "{}: its size of {size} bytes is not a multiple of {logical_block}; the guest cannot \
             reach the last {rest} bytes",
            path.display()
        );
    }
    let discard = !options.read_only
        && if kind.is_block_device() {
            device_discards(&file).unwrap_or(false)
        } else {
            file_discards(&file, size)
        };
    Ok(Opened {
        file,
        info: BlockInfo {
            capacity,
            logical_block,
            read_only: options.read_only,
            discard,
        },
        align,
    })
}

fn open_error(options: &FileOptions, error: io::Error) -> OpenError {
    let path = options.path.clone();
    let read_only = options.read_only;
    match error.raw_os_error() {
        Some(libc::ENOENT) => OpenError::Missing(path),
        Some(libc::EACCES | libc::EPERM | libc::EROFS) => OpenError::Permission {
            path,
            access: if read_only {
                "reading"
            } else {
                "reading and writing"
            },
            hint: if read_only {
                ""
            } else {
                "; readonly needs no permission to write"
            },
        },
        Some(libc::EBUSY) => OpenError::Claimed(path),
        // open(2): the file system does not support O_DIRECT.
        Some(libc::EINVAL) if options.direct => OpenError::NoDirect(path),
        _ => OpenError::Io {
            path,
            source: error,
        },
    }
}

/// Takes an open-file-description lock on the whole file (fcntl(2), `F_OFD_SETLK`): shared for
/// readers. Unlike a process's record locks it also excludes a second user in the same process, and
/// closing another descriptor of the file does not lose it.
fn lock(file: &File, options: &FileOptions) -> Result<(), OpenError> {
    let kind = if options.read_only {
        libc::F_RDLCK
    } else {
        libc::F_WRLCK
    };
    // SAFETY: `flock` is plain data, for which zeroes are valid; length 0 means the whole file.
    #[expect(unsafe_code, reason = "zeroed C struct")]
    let mut whole: libc::flock = unsafe { std::mem::zeroed() };
    whole.l_type = libc::c_short::try_from(kind).unwrap_or(libc::c_short::MAX);
    whole.l_whence = 0;
    // SAFETY: the descriptor is open and the lock description is valid for the call.
    #[expect(unsafe_code, reason = "fcntl")]
    let result = unsafe { libc::fcntl(file.as_raw_fd(), libc::F_OFD_SETLK, &raw mut whole) };
    if result == 0 {
        return Ok(());
    }
    let source = io::Error::last_os_error();
    let path = options.path.clone();
    Err(match source.raw_os_error() {
        Some(libc::EAGAIN | libc::EACCES) => OpenError::Locked {
            path,
            by: if options.read_only {
                "by a writer"
            } else {
                "by another writer or reader"
            },
        },
        _ => OpenError::Io { path, source },
    })
}

/// What `O_DIRECT` demands of the file; `None` if it is not possible.
fn direct_align(file: &File, is_device: bool, sector: u32) -> io::Result<Option<Align>> {
    let stat = rustix::fs::statx(file, "", AtFlags::EMPTY_PATH, StatxFlags::DIOALIGN)?;
    if stat.stx_mask & StatxFlags::DIOALIGN.bits() != 0 {
        let memory = usize::try_from(stat.stx_dio_mem_align).unwrap_or(usize::MAX);
        let offset = u64::from(stat.stx_dio_offset_align);
        return Ok((memory != 0 && offset != 0).then_some(Align { memory, offset }));
    }
    // Older kernels do not say. A page is enough everywhere; devices say their sector.
    let offset = if is_device { sector } else { 4096 };
    Ok(Some(Align {
        memory: 4096,
        offset: u64::from(offset),
    }))
}

/// Tries to punch a hole behind the end, which changes nothing where it is possible.
fn file_discards(file: &File, size: u64) -> bool {
    let flags = FallocateFlags::PUNCH_HOLE | FallocateFlags::KEEP_SIZE;
    let behind = size.next_multiple_of(4096);
    rustix::fs::fallocate(file, flags, behind, 4096).is_ok()
}

/// Linux, Documentation/ABI/stable/sysfs-block: `queue/discard_max_bytes`, 0 if not supported. A
/// partition has its disk's queue.
fn device_discards(file: &File) -> Option<bool> {
    let stat = rustix::fs::fstat(file).ok()?;
    let (major, minor) = (
        rustix::fs::major(stat.st_rdev),
        rustix::fs::minor(stat.st_rdev),
    );
    let device = Path::new("/sys/dev/block").join(format!("{major}:{minor}"));
    ["queue", "../queue"].iter().find_map(|queue| {
        let file = device.join(queue).join("discard_max_bytes");
        let text = std::fs::read_to_string(file).ok()?;
        Some(text.trim() != "0")
    })
}

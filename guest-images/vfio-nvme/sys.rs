//! The few functions of the C library that the program needs beyond std, with safe faces.
//!
//! Numbers are those of Linux on x86-64 (include/uapi of the kernel's source).

use std::ffi::{c_int, c_long, c_ulong, c_void};
use std::fs::File;
use std::io;
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd};
use std::ptr::{self, NonNull};

unsafe extern "C" {
    #[link_name = "ioctl"]
    fn c_ioctl(fd: c_int, request: c_ulong, ...) -> c_int;
    #[link_name = "mmap"]
    fn c_mmap(
        address: *mut c_void,
        length: usize,
        protection: c_int,
        flags: c_int,
        fd: c_int,
        offset: c_long,
    ) -> *mut c_void;
    fn munmap(address: *mut c_void, length: usize) -> c_int;
    #[link_name = "eventfd"]
    fn c_eventfd(initial: u32, flags: c_int) -> c_int;
    fn poll(fds: *mut PollFd, count: c_ulong, timeout: c_int) -> c_int;
}

const PROT_READ: c_int = 1;
const PROT_WRITE: c_int = 2;
const MAP_SHARED: c_int = 1;
const MAP_PRIVATE: c_int = 2;
const MAP_ANONYMOUS: c_int = 0x20;
const MAP_POPULATE: c_int = 0x8000;
const EFD_CLOEXEC: c_int = 0o2_000_000;
const POLLIN: i16 = 1;

/// The size of a page, here and in the IOMMU.
pub const PAGE: usize = 4096;

#[repr(C)]
struct PollFd {
    fd: c_int,
    events: i16,
    revents: i16,
}

fn check(result: c_int) -> io::Result<c_int> {
    match result {
        -1 => Err(io::Error::last_os_error()),
        value => Ok(value),
    }
}

/// A request whose argument is a number.
pub fn ioctl_value(file: &File, request: c_ulong, value: c_ulong) -> io::Result<c_int> {
    // SAFETY: the callers' requests take a number and no pointer.
    check(unsafe { c_ioctl(file.as_raw_fd(), request, value) })
}

/// A request whose argument is a structure (or terminated string) that the kernel may read and
/// write up to its size.
pub fn ioctl<T: ?Sized>(file: &File, request: c_ulong, argument: &mut T) -> io::Result<c_int> {
    // SAFETY: the pointer is to a live structure, of the layout and size that the callers' requests
    // have in linux/vfio.h (`argsz` says its size); nobody else uses it meanwhile.
    check(unsafe {
        c_ioctl(
            file.as_raw_fd(),
            request,
            ptr::from_mut(argument).cast::<c_void>(),
        )
    })
}

/// Takes a descriptor that a request returned.
pub fn owned(fd: c_int) -> File {
    // SAFETY: the kernel has just returned this descriptor, so it is open and nobody else has it.
    File::from(unsafe { OwnedFd::from_raw_fd(fd) })
}

/// A counter that the kernel adds to at each interrupt.
pub fn eventfd() -> io::Result<File> {
    // SAFETY: eventfd takes no pointers.
    Ok(owned(check(unsafe { c_eventfd(0, EFD_CLOEXEC) })?))
}

/// Waits until the file is readable; says whether it is.
pub fn wait_readable(file: &File, timeout_ms: c_int) -> io::Result<bool> {
    let mut entry = PollFd {
        fd: file.as_raw_fd(),
        events: POLLIN,
        revents: 0,
    };
    // SAFETY: the pointer is to one live structure.
    Ok(check(unsafe { poll(&raw mut entry, 1, timeout_ms) })? > 0)
}

/// Memory that a device reads or writes too. Every access is volatile and checked.
pub struct Shared {
    base: NonNull<u8>,
    length: usize,
}

impl Shared {
    /// Fresh pages, all zeroes, that are there from the start.
    pub fn anonymous(length: usize) -> io::Result<Self> {
        let flags = MAP_PRIVATE | MAP_ANONYMOUS | MAP_POPULATE;
        Self::map(length, flags, -1, 0)
    }

    /// A part of a file.
    pub fn of_file(file: &File, offset: u64, length: usize) -> io::Result<Self> {
        let offset = c_long::try_from(offset).map_err(io::Error::other)?;
        Self::map(length, MAP_SHARED, file.as_raw_fd(), offset)
    }

    fn map(length: usize, flags: c_int, fd: c_int, offset: c_long) -> io::Result<Self> {
        let protection = PROT_READ | PROT_WRITE;
        // SAFETY: a new mapping at an address of the kernel's choice touches no memory of ours.
        let base = unsafe { c_mmap(ptr::null_mut(), length, protection, flags, fd, offset) };
        if base.addr() == usize::MAX {
            return Err(io::Error::last_os_error());
        }
        let base = NonNull::new(base.cast()).ok_or(io::ErrorKind::OutOfMemory)?;
        Ok(Self { base, length })
    }

    /// Its address in this process.
    pub fn address(&self) -> u64 {
        self.base.addr().get() as u64
    }

    /// Its size in bytes.
    pub fn len(&self) -> usize {
        self.length
    }

    fn at<T>(&self, offset: usize) -> *mut T {
        let end = offset.checked_add(size_of::<T>());
        assert!(
            end.is_some_and(|end| end <= self.length) && offset.is_multiple_of(align_of::<T>()),
            "an access at {offset:#x} of {:#x} bytes",
            self.length
        );
        // SAFETY: the offset is inside of the mapping.
        unsafe { self.base.as_ptr().add(offset).cast() }
    }

    /// Reads 32 bits at a byte offset, which must be aligned and inside.
    pub fn read32(&self, offset: usize) -> u32 {
        // SAFETY: `at` has checked bounds and alignment; the mapping lives as long as `self`.
        unsafe { self.at::<u32>(offset).read_volatile() }
    }

    /// Writes 32 bits at a byte offset, which must be aligned and inside.
    pub fn write32(&self, offset: usize, value: u32) {
        // SAFETY: as in `read32`.
        unsafe { self.at::<u32>(offset).write_volatile(value) }
    }

    /// Reads 64 bits at a byte offset, which must be aligned and inside.
    pub fn read64(&self, offset: usize) -> u64 {
        // SAFETY: as in `read32`.
        unsafe { self.at::<u64>(offset).read_volatile() }
    }

    /// Writes 64 bits at a byte offset, which must be aligned and inside.
    pub fn write64(&self, offset: usize, value: u64) {
        // SAFETY: as in `read32`.
        unsafe { self.at::<u64>(offset).write_volatile(value) }
    }

    /// Copies out; the offset and the length must be multiples of eight.
    pub fn bytes(&self, offset: usize, length: usize) -> Vec<u8> {
        (offset..offset + length)
            .step_by(8)
            .flat_map(|at| self.read64(at).to_le_bytes())
            .collect()
    }

    /// Writes the same 64 bits everywhere.
    pub fn fill(&self, value: u64) {
        for offset in (0..self.length).step_by(8) {
            self.write64(offset, value);
        }
    }
}

impl Drop for Shared {
    fn drop(&mut self) {
        // SAFETY: the mapping is this structure's, and nothing points into it any more.
        unsafe { munmap(self.base.as_ptr().cast(), self.length) };
    }
}

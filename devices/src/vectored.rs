//! Vectored system calls on guest memory.

use std::io;
use std::os::fd::{AsFd, AsRawFd};

use vm_memory::VolatileSlice;

/// Most elements of one call (`UIO_MAXIOV`).
pub(crate) const MAX_IOVECS: usize = 1024;

/// Storage for the kernel's list of buffers, used again for every call. It is empty between calls.
#[derive(Debug)]
pub(crate) struct Vectored(Vec<libc::iovec>);

// SAFETY: the list is empty whenever no call runs, so no address moves to another thread.
#[expect(unsafe_code, reason = "storage of raw pointers moves between threads")]
unsafe impl Send for Vectored {}

impl Vectored {
    pub(crate) fn new() -> Vectored {
        Vectored(Vec::with_capacity(MAX_IOVECS))
    }

    /// Without storage, to stand in for one that is in use.
    pub(crate) const fn empty() -> Vectored {
        Vectored(Vec::new())
    }

    /// Writes all of `slices` with writev(2).
    ///
    /// # Errors
    ///
    /// The host's, or there are more than [`MAX_IOVECS`].
    pub(crate) fn write(
        &mut self,
        fd: impl AsFd,
        slices: &[VolatileSlice<'_, ()>],
    ) -> io::Result<usize> {
        if slices.len() > MAX_IOVECS {
            return Err(io::ErrorKind::InvalidInput.into());
        }
        self.fill(slices, 0, usize::MAX, MAX_IOVECS);
        self.call(|iovecs, count| {
            // SAFETY: the list was filled from `slices`, whose borrows keep the memory valid.
            #[expect(unsafe_code, reason = "writev from guest memory")]
            unsafe {
                libc::writev(fd.as_fd().as_raw_fd(), iovecs, count)
            }
        })
    }

    /// Reads once with readv(2) into `slices`, at most [`MAX_IOVECS`] - 1 of them. A result larger
    /// than their length means that there was more, which is lost on a packet device.
    ///
    /// # Errors
    ///
    /// The host's.
    pub(crate) fn read_packet(
        &mut self,
        fd: impl AsFd,
        slices: &[VolatileSlice<'_, ()>],
    ) -> io::Result<(usize, bool)> {
        let mut spill = 0u8;
        let room = self.fill(slices, 0, usize::MAX, MAX_IOVECS - 1);
        self.0.push(libc::iovec {
            iov_base: (&raw mut spill).cast(),
            iov_len: 1,
        });
        let len = self.call(|iovecs, count| {
            // SAFETY: the list was filled from `slices`, whose borrows keep the memory valid, and
            // ends with `spill`, which lives through the call.
            #[expect(unsafe_code, reason = "readv into guest memory")]
            unsafe {
                libc::readv(fd.as_fd().as_raw_fd(), iovecs, count)
            }
        })?;
        Ok((len.min(room), len <= room))
    }

    /// Reads once with readv(2) into at most `limit` bytes of `slices`, from byte `skip` on.
    ///
    /// # Errors
    ///
    /// The host's.
    pub(crate) fn read(
        &mut self,
        fd: impl AsFd,
        slices: &[VolatileSlice<'_, ()>],
        skip: usize,
        limit: usize,
    ) -> io::Result<usize> {
        self.fill(slices, skip, limit, MAX_IOVECS);
        self.call(|iovecs, count| {
            // SAFETY: the list was filled from `slices`, whose borrows keep the memory valid.
            #[expect(unsafe_code, reason = "readv into guest memory")]
            unsafe {
                libc::readv(fd.as_fd().as_raw_fd(), iovecs, count)
            }
        })
    }

    /// Sends once at most `limit` bytes of `slices`, from byte `skip` on, to a socket: without
    /// waiting, and without a signal if the peer is gone.
    ///
    /// # Errors
    ///
    /// The host's.
    pub(crate) fn send(
        &mut self,
        fd: impl AsFd,
        slices: &[VolatileSlice<'_, ()>],
        skip: usize,
        limit: usize,
    ) -> io::Result<usize> {
        self.fill(slices, skip, limit, MAX_IOVECS);
        let flags = libc::MSG_NOSIGNAL | libc::MSG_DONTWAIT;
        self.call(|iovecs, count| {
            // SAFETY: `msghdr` is plain data, for which zeroes are valid. The list was filled from
            // `slices`, whose borrows keep the memory valid; sendmsg only reads through it.
            #[expect(unsafe_code, reason = "sendmsg from guest memory")]
            unsafe {
                let mut message: libc::msghdr = std::mem::zeroed();
                message.msg_iov = iovecs.cast_mut();
                message.msg_iovlen = usize::try_from(count).unwrap_or(0);
                libc::sendmsg(fd.as_fd().as_raw_fd(), &raw const message, flags)
            }
        })
    }

    /// Fills the list with at most `limit` bytes and `count` elements; returns how many bytes.
    fn fill(
        &mut self,
        slices: &[VolatileSlice<'_, ()>],
        mut skip: usize,
        limit: usize,
        count: usize,
    ) -> usize {
        self.0.clear();
        let mut total = 0usize;
        for slice in slices {
            if self.0.len() == count || total >= limit {
                break;
            }
            let cut = skip.min(slice.len());
            skip -= cut;
            let len = (slice.len() - cut).min(limit - total);
            if len > 0 {
                self.0.push(libc::iovec {
                    iov_base: slice.ptr_guard_mut().as_ptr().wrapping_add(cut).cast(),
                    iov_len: len,
                });
                total = total.saturating_add(len);
            }
        }
        total
    }

    fn call(
        &mut self,
        call: impl FnOnce(*const libc::iovec, libc::c_int) -> libc::ssize_t,
    ) -> io::Result<usize> {
        let count = libc::c_int::try_from(self.0.len()).unwrap_or(libc::c_int::MAX);
        let result = call(self.0.as_ptr(), count);
        let result = usize::try_from(result).map_err(|_| io::Error::last_os_error());
        self.0.clear();
        result
    }
}

#[cfg(test)]
mod tests {
    use std::io::{Read, Write};
    use std::os::unix::net::UnixStream;

    use super::*;

    #[test]
    fn skips_limits_and_tells_of_more() {
        let (ours, mut theirs) = UnixStream::pair().unwrap();
        let mut vectored = Vectored::new();
        let mut bytes = *b"abcdefghij";
        let slices: Vec<_> = bytes.chunks_mut(3).map(VolatileSlice::from).collect();
        assert_eq!(vectored.send(&ours, &slices, 4, 5).unwrap(), 5);
        assert_eq!(vectored.write(&ours, &slices[..1]).unwrap(), 3);
        let mut seen = [0; 8];
        theirs.read_exact(&mut seen).unwrap();
        assert_eq!(&seen, b"efghiabc");
        theirs.write_all(b"0123456789").unwrap();
        let slices: Vec<_> = bytes.chunks_mut(3).map(VolatileSlice::from).collect();
        assert_eq!(vectored.read(&ours, &slices, 2, 5).unwrap(), 5);
        assert_eq!(
            vectored.read_packet(&ours, &slices[..1]).unwrap(),
            (3, false)
        );
        assert_eq!(vectored.read_packet(&ours, &slices).unwrap(), (1, true));
        assert_eq!(&bytes, b"9671234hij");
        drop(theirs);
        let gone = vectored.send(&ours, &[VolatileSlice::from(&mut bytes[..])], 0, 1);
        assert_eq!(gone.unwrap_err().kind(), io::ErrorKind::BrokenPipe);
        assert_eq!(vectored.0.len(), 0);
    }
}

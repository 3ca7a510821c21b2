//! The system calls of tap devices.

use std::fs::OpenOptions;
use std::io;
use std::os::fd::{AsRawFd, OwnedFd};
use std::os::unix::fs::OpenOptionsExt;

use crate::net::Offloads;

/// Opens the control device; the result is not attached to an interface yet.
pub(super) fn open_control() -> io::Result<OwnedFd> {
    let file = OpenOptions::new()
        .read(true)
        .write(true)
        .custom_flags(libc::O_NONBLOCK)
        .open("/dev/net/tun")?;
    Ok(file.into())
}

fn request(name: &str, flags: i32) -> libc::ifreq {
    // SAFETY: `ifreq` is plain data, for which zeroes are valid.
    #[expect(unsafe_code, reason = "zeroed C struct")]
    let mut request: libc::ifreq = unsafe { std::mem::zeroed() };
    // The last byte stays zero.
    let room = libc::IFNAMSIZ - 1;
    for (to, from) in request.ifr_name.iter_mut().take(room).zip(name.bytes()) {
        *to = libc::c_char::from_ne_bytes([from]);
    }
    let [low, high, ..] = flags.to_le_bytes();
    request.ifr_ifru.ifru_flags = libc::c_short::from_le_bytes([low, high]);
    request
}

/// An ioctl whose argument points to an `ifreq`.
fn ioctl(fd: &OwnedFd, number: libc::Ioctl, request: &mut libc::ifreq) -> io::Result<()> {
    // SAFETY: the callers pass requests that take a pointer to an `ifreq`, which is valid for the
    // call, and the descriptor is open.
    #[expect(unsafe_code, reason = "ioctl")]
    let result = unsafe { libc::ioctl(fd.as_raw_fd(), number, &raw mut *request) };
    check(result)
}

fn check(result: i32) -> io::Result<()> {
    if result < 0 {
        return Err(io::Error::last_os_error());
    }
    Ok(())
}

/// `TUNSETIFF`: makes the descriptor a queue of tap device `name`, which is created if need be.
pub(super) fn attach_device(fd: &OwnedFd, name: &str, multi_queue: bool) -> io::Result<()> {
    let mut flags = libc::IFF_TAP | libc::IFF_NO_PI | libc::IFF_VNET_HDR;
    if multi_queue {
        flags |= libc::IFF_MULTI_QUEUE;
    }
    ioctl(fd, libc::TUNSETIFF, &mut request(name, flags))
}

/// `TUNSETQUEUE`: whether the device hands packets to this queue.
pub(super) fn set_attached(fd: &OwnedFd, attached: bool) -> io::Result<()> {
    let flags = if attached {
        libc::IFF_ATTACH_QUEUE
    } else {
        libc::IFF_DETACH_QUEUE
    };
    ioctl(fd, libc::TUNSETQUEUE, &mut request("", flags))
}

/// `TUNSETVNETHDRSZ`: length of the header before each packet.
pub(super) fn set_header_len(fd: &OwnedFd, len: usize) -> io::Result<()> {
    let len = libc::c_int::try_from(len).map_err(|_| io::ErrorKind::InvalidInput)?;
    // SAFETY: this request takes a pointer to an int, which is valid for the call.
    #[expect(unsafe_code, reason = "ioctl")]
    check(unsafe { libc::ioctl(fd.as_raw_fd(), libc::TUNSETVNETHDRSZ, &raw const len) })
}

/// `TUNSETOFFLOAD`: what may be handed to us unfinished.
pub(super) fn set_offloads(fd: &OwnedFd, offloads: Offloads) -> io::Result<()> {
    let mut flags = 0;
    for (on, bits) in [
        (offloads.checksum, libc::TUN_F_CSUM),
        (offloads.tso4, libc::TUN_F_TSO4),
        (offloads.tso6, libc::TUN_F_TSO6),
        (offloads.ecn, libc::TUN_F_TSO_ECN),
        (offloads.uso, libc::TUN_F_USO4 | libc::TUN_F_USO6),
    ] {
        if on {
            flags |= bits;
        }
    }
    // SAFETY: this request's argument is the flags themselves.
    #[expect(unsafe_code, reason = "ioctl")]
    check(unsafe {
        libc::ioctl(
            fd.as_raw_fd(),
            libc::TUNSETOFFLOAD,
            libc::c_ulong::from(flags),
        )
    })
}

/// Whether there is an interface of this name.
pub(super) fn interface_exists(name: &str) -> bool {
    let Ok(name) = std::ffi::CString::new(name) else {
        return false;
    };
    // SAFETY: the name is a terminated string that lives through the call.
    #[expect(unsafe_code, reason = "if_nametoindex")]
    let index = unsafe { libc::if_nametoindex(name.as_ptr()) };
    index != 0
}

/// Whether `name` is a tap device, with our header, that has one queue. Asked by attaching to it
/// and letting go again; it must exist.
pub(super) fn is_single_queue_tap(name: &str) -> bool {
    open_control().is_ok_and(|fd| match attach_device(&fd, name, false) {
        Ok(()) => true,
        Err(error) => error.raw_os_error() == Some(libc::EBUSY),
    })
}

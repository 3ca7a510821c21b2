//! The few functions of the C library that the agent needs beyond std, with safe faces.
//!
//! Numbers are those of Linux on x86-64 (include/uapi of the kernel's source).

use std::ffi::{CStr, CString, c_char, c_int, c_long, c_ulong, c_void};
use std::fs::File;
use std::io;
use std::mem::size_of;
use std::os::fd::{AsRawFd, BorrowedFd, FromRawFd, OwnedFd, RawFd};
use std::ptr::null;

unsafe extern "C" {
    fn socket(domain: c_int, kind: c_int, protocol: c_int) -> c_int;
    fn bind(fd: c_int, address: *const c_void, length: u32) -> c_int;
    fn listen(fd: c_int, backlog: c_int) -> c_int;
    fn accept4(fd: c_int, address: *mut c_void, length: *mut u32, flags: c_int) -> c_int;
    fn ioctl(fd: c_int, request: c_ulong, ...) -> c_int;
    #[link_name = "poll"]
    fn c_poll(fds: *mut PollFd, count: c_ulong, timeout: c_int) -> c_int;
    fn setsid() -> c_int;
    fn signal(number: c_int, handler: usize) -> usize;
    #[link_name = "kill"]
    fn c_kill(pid: c_int, signal: c_int) -> c_int;
    fn syscall(number: c_long, ...) -> c_long;
    #[link_name = "mount"]
    fn c_mount(
        source: *const c_char,
        target: *const c_char,
        kind: *const c_char,
        flags: c_ulong,
        data: *const c_void,
    ) -> c_int;
    fn umount2(target: *const c_char, flags: c_int) -> c_int;
    #[link_name = "sync"]
    fn c_sync();
    #[link_name = "reboot"]
    fn c_reboot(how: c_int) -> c_int;
    fn waitpid(pid: c_int, status: *mut c_int, options: c_int) -> c_int;
    fn sigemptyset(set: *mut SignalSet) -> c_int;
    fn sigaddset(set: *mut SignalSet, signal: c_int) -> c_int;
    fn sigprocmask(how: c_int, set: *const SignalSet, old: *mut SignalSet) -> c_int;
    fn sigtimedwait(set: *const SignalSet, info: *mut c_void, timeout: *const TimeSpec) -> c_int;
}

const SOCK_STREAM: c_int = 1;
const SOCK_CLOEXEC: c_int = 0o2_000_000;
const AF_INET: c_int = 2;
const SOCK_DGRAM: c_int = 2;
const AF_VSOCK: c_int = 40;
const VMADDR_CID_ANY: u32 = u32::MAX;

const FIONBIO: c_ulong = 0x5421;
const FIONREAD: c_ulong = 0x541b;
const TIOCSCTTY: c_ulong = 0x540e;
const TIOCSWINSZ: c_ulong = 0x5414;
const TIOCSPTLCK: c_ulong = 0x4004_5431;
const TIOCGPTPEER: c_ulong = 0x5441;
const O_RDWR_NOCTTY_CLOEXEC: c_int = 0o2 | 0o400 | 0o2_000_000;
const SIOCGIFFLAGS: c_ulong = 0x8913;
const SIOCSIFFLAGS: c_ulong = 0x8914;
const IFF_UP: i16 = 1;

const SYS_FINIT_MODULE: c_long = 313;
const SYS_PIDFD_OPEN: c_long = 434;

pub const SIGHUP: c_int = 1;
pub const SIGINT: c_int = 2;
pub const SIGKILL: c_int = 9;
pub const SIGUSR1: c_int = 10;
pub const SIGUSR2: c_int = 12;
pub const SIGTERM: c_int = 15;
pub const SIGCHLD: c_int = 17;
const SIG_BLOCK: c_int = 0;
const WNOHANG: c_int = 1;

pub const ENOENT: i32 = 2;
pub const EIO: i32 = 5;
pub const EEXIST: i32 = 17;
pub const EISDIR: i32 = 21;

/// One file descriptor to wait for.
#[repr(C)]
#[derive(Debug, Clone, Copy)]
pub struct PollFd {
    fd: c_int,
    events: i16,
    revents: i16,
}

pub const POLLIN: i16 = 1;
pub const POLLOUT: i16 = 4;
pub const POLLERR: i16 = 8;
pub const POLLHUP: i16 = 0x10;
pub const POLLRDHUP: i16 = 0x2000;

impl PollFd {
    /// Waits for `events` of `fd`, or ignores the entry if there is no descriptor.
    pub fn new(fd: Option<BorrowedFd<'_>>, events: i16) -> Self {
        Self {
            fd: fd.map_or(-1, |fd| fd.as_raw_fd()),
            events,
            revents: 0,
        }
    }

    /// Whether any of `events` happened.
    pub fn has(&self, events: i16) -> bool {
        self.revents & events != 0
    }
}

/// Waits until one of the descriptors is ready, at most `timeout_ms` (-1: without end).
pub fn poll(fds: &mut [PollFd], timeout_ms: c_int) -> io::Result<usize> {
    loop {
        // SAFETY: the pointer and the length are those of one live, writable slice of the
        // kernel's struct pollfd.
        let count = unsafe { c_poll(fds.as_mut_ptr(), fds.len() as c_ulong, timeout_ms) };
        match usize::try_from(count) {
            Ok(count) => return Ok(count),
            Err(_) => {
                let error = io::Error::last_os_error();
                if error.kind() != io::ErrorKind::Interrupted {
                    return Err(error);
                }
            }
        }
    }
}

fn check(result: c_int) -> io::Result<c_int> {
    match result {
        -1 => Err(io::Error::last_os_error()),
        value => Ok(value),
    }
}

fn owned(result: c_int) -> io::Result<OwnedFd> {
    let fd: RawFd = check(result)?;
    // SAFETY: a system call has just returned this descriptor, so it is open and nobody else has it.
    Ok(unsafe { OwnedFd::from_raw_fd(fd) })
}

/// struct sockaddr_vm (linux/vm_sockets.h).
#[repr(C)]
struct SockaddrVm {
    family: u16,
    reserved: u16,
    port: u32,
    cid: u32,
    zero: [u8; 4],
}

/// Listens on a vsock port.
pub fn listen_vsock(port: u32) -> io::Result<OwnedFd> {
    // SAFETY: socket takes no pointers.
    let fd = owned(unsafe { socket(AF_VSOCK, SOCK_STREAM | SOCK_CLOEXEC, 0) })?;
    let address = SockaddrVm {
        family: AF_VSOCK as u16,
        reserved: 0,
        port,
        cid: VMADDR_CID_ANY,
        zero: [0; 4],
    };
    // SAFETY: the pointer is to a live structure of the length that is given.
    check(unsafe {
        bind(
            fd.as_raw_fd(),
            (&raw const address).cast(),
            size_of::<SockaddrVm>() as u32,
        )
    })?;
    // SAFETY: listen takes no pointers.
    check(unsafe { listen(fd.as_raw_fd(), 128) })?;
    Ok(fd)
}

/// Takes the next connection of a listening socket.
pub fn accept(listener: BorrowedFd<'_>) -> io::Result<OwnedFd> {
    // SAFETY: accept4 allows null pointers: the peer's address is not wanted.
    owned(unsafe {
        accept4(
            listener.as_raw_fd(),
            std::ptr::null_mut(),
            std::ptr::null_mut(),
            SOCK_CLOEXEC,
        )
    })
}

/// Makes reads and writes return at once.
pub fn set_nonblocking(fd: BorrowedFd<'_>) -> io::Result<()> {
    let on: c_int = 1;
    // SAFETY: FIONBIO reads one int through the pointer, which is to a live one.
    check(unsafe { ioctl(fd.as_raw_fd(), FIONBIO, &raw const on) }).map(|_| ())
}

/// How many bytes a pipe holds.
pub fn readable_bytes(fd: BorrowedFd<'_>) -> io::Result<usize> {
    let mut count: c_int = 0;
    // SAFETY: FIONREAD writes one int through the pointer, which is to a live one.
    check(unsafe { ioctl(fd.as_raw_fd(), FIONREAD, &raw mut count) })?;
    Ok(usize::try_from(count).unwrap_or(0))
}

/// struct winsize (asm-generic/termios.h).
#[repr(C)]
struct WinSize {
    rows: u16,
    columns: u16,
    x_pixels: u16,
    y_pixels: u16,
}

/// Sets the size of a terminal, which tells its foreground process group.
pub fn set_window(terminal: BorrowedFd<'_>, rows: u16, columns: u16) -> io::Result<()> {
    let size = WinSize {
        rows,
        columns,
        x_pixels: 0,
        y_pixels: 0,
    };
    // SAFETY: TIOCSWINSZ reads one struct winsize through the pointer, which is to a live one.
    check(unsafe { ioctl(terminal.as_raw_fd(), TIOCSWINSZ, &raw const size) }).map(|_| ())
}

/// Opens a new pseudo terminal: the side of the agent and the side of the program (pty(7)).
pub fn open_terminal() -> io::Result<(File, OwnedFd)> {
    let ours = File::options().read(true).write(true).open("/dev/ptmx")?;
    let unlocked: c_int = 0;
    // SAFETY: TIOCSPTLCK reads one int through the pointer, which is to a live one.
    check(unsafe { ioctl(ours.as_raw_fd(), TIOCSPTLCK, &raw const unlocked) })?;
    // SAFETY: TIOCGPTPEER takes open flags by value and no pointer.
    let theirs = owned(unsafe { ioctl(ours.as_raw_fd(), TIOCGPTPEER, O_RDWR_NOCTTY_CLOEXEC) })?;
    Ok((ours, theirs))
}

/// The signals above are real-time signals, which no shell ignores (signal(7)).
const LAST_STANDARD_SIGNAL: c_int = 31;
const SIG_DFL: usize = 0;

/// Begins a session of its own, in which no signal is ignored; with `terminal`, standard input becomes its controlling terminal.
/// For use between fork and exec: it only makes system calls.
pub fn begin_session(terminal: bool) -> io::Result<()> {
    for number in 1..=LAST_STANDARD_SIGNAL {
        // SAFETY: SIG_DFL is no handler, so nothing of ours will run. The call fails for SIGKILL and
        // SIGSTOP, which cannot be ignored.
        unsafe { signal(number, SIG_DFL) };
    }
    // SAFETY: setsid takes no arguments.
    check(unsafe { setsid() })?;
    if terminal {
        // SAFETY: TIOCSCTTY takes an int by value and no pointer.
        check(unsafe { ioctl(0, TIOCSCTTY, 0 as c_int) })?;
    }
    Ok(())
}

/// Sends a signal: to a process, to the group `-pid`, or to all others (-1).
pub fn kill(pid: i32, signal: c_int) -> io::Result<()> {
    // SAFETY: kill takes no pointers.
    check(unsafe { c_kill(pid, signal) }).map(|_| ())
}

/// A descriptor that becomes readable when the child ends.
pub fn pidfd(pid: u32) -> io::Result<OwnedFd> {
    let (pid, flags) = (c_long::from(pid), 0 as c_long);
    // SAFETY: pidfd_open takes no pointers.
    let result = unsafe { syscall(SYS_PIDFD_OPEN, pid, flags) };
    owned(c_int::try_from(result).unwrap_or(-1))
}

/// Loads a kernel module; one that is loaded already is fine.
pub fn load_module(file: &File) -> io::Result<()> {
    let fd = c_long::from(file.as_raw_fd());
    // SAFETY: the parameters are an empty, terminated string; the kernel reads the module through
    // the descriptor.
    let result = unsafe { syscall(SYS_FINIT_MODULE, fd, c"".as_ptr(), 0 as c_long) };
    match check(c_int::try_from(result).unwrap_or(-1)) {
        Err(error) if error.raw_os_error() == Some(EEXIST) => Ok(()),
        result => result.map(|_| ()),
    }
}

/// Mounts a file system of the kernel's own.
pub fn mount(kind: &CStr, target: &CStr, flags: c_ulong, data: &CStr) -> io::Result<()> {
    // SAFETY: all pointers are to live, terminated strings.
    check(unsafe {
        c_mount(
            kind.as_ptr(),
            target.as_ptr(),
            kind.as_ptr(),
            flags,
            data.as_ptr().cast(),
        )
    })
    .map(|_| ())
}

/// Unmounts a file system.
pub fn unmount(target: &[u8]) -> io::Result<()> {
    let target = CString::new(target)?;
    // SAFETY: the pointer is to a live, terminated string.
    check(unsafe { umount2(target.as_ptr(), 0) }).map(|_| ())
}

/// Writes everything that is cached to the disks.
pub fn sync() {
    // SAFETY: sync takes no arguments.
    unsafe { c_sync() }
}

/// What [`reboot`] does (linux/reboot.h).
pub const POWER_OFF: u32 = 0x4321_fedc;
/// What [`reboot`] does (linux/reboot.h).
pub const RESTART: u32 = 0x0123_4567;

/// Ends the machine; returns only if it could not.
pub fn reboot(how: u32) -> io::Error {
    // SAFETY: reboot takes no pointers.
    unsafe { c_reboot(how.cast_signed()) };
    io::Error::last_os_error()
}

/// Takes the exit of one child that has ended, if there is one, and says which.
pub fn reap() -> Option<u32> {
    // SAFETY: waitpid allows a null pointer: the status is not wanted.
    let pid = unsafe { waitpid(-1, std::ptr::null_mut(), WNOHANG) };
    u32::try_from(pid).ok().filter(|pid| *pid > 0)
}

/// sigset_t of glibc on x86-64.
#[repr(C)]
pub struct SignalSet([u64; 16]);

/// struct timespec.
#[repr(C)]
struct TimeSpec {
    seconds: i64,
    nanoseconds: i64,
}

impl SignalSet {
    /// Blocks the signals, so that [`SignalSet::wait`] can take them. Programs started by std's
    /// `Command` begin with nothing blocked.
    pub fn block(signals: &[c_int]) -> io::Result<Self> {
        let mut set = Self([0; 16]);
        // SAFETY: the pointer is to a live set of the C library's size.
        check(unsafe { sigemptyset(&raw mut set) })?;
        for signal in signals {
            // SAFETY: as above.
            check(unsafe { sigaddset(&raw mut set, *signal) })?;
        }
        // SAFETY: as above; a null pointer for the old set is allowed.
        check(unsafe { sigprocmask(SIG_BLOCK, &raw const set, std::ptr::null_mut()) })?;
        Ok(set)
    }

    /// Waits for one of the signals, at most `milliseconds` if given.
    pub fn wait(&self, milliseconds: Option<u32>) -> Option<c_int> {
        let timeout = milliseconds.map(|milliseconds| TimeSpec {
            seconds: i64::from(milliseconds / 1000),
            nanoseconds: i64::from(milliseconds % 1000) * 1_000_000,
        });
        let timeout = timeout
            .as_ref()
            .map_or(null(), |timeout| &raw const *timeout);
        // SAFETY: the set is live, the details are not wanted (null is allowed), and the timeout
        // is null or to a live structure.
        check(unsafe { sigtimedwait(self, std::ptr::null_mut(), timeout) }).ok()
    }
}

/// struct ifreq (linux/if.h) as the flags requests use it.
#[repr(C)]
struct InterfaceFlags {
    name: [u8; 16],
    flags: i16,
    rest: [u8; 22],
}

/// Brings the loopback interface up.
pub fn loopback_up() -> io::Result<()> {
    // SAFETY: socket takes no pointers.
    let fd = owned(unsafe { socket(AF_INET, SOCK_DGRAM | SOCK_CLOEXEC, 0) })?;
    let mut request = InterfaceFlags {
        name: *b"lo\0\0\0\0\0\0\0\0\0\0\0\0\0\0",
        flags: 0,
        rest: [0; 22],
    };
    // SAFETY: both requests read and write one struct ifreq (40 bytes), which the pointer is to.
    check(unsafe { ioctl(fd.as_raw_fd(), SIOCGIFFLAGS, &raw mut request) })?;
    request.flags |= IFF_UP;
    // SAFETY: as above.
    check(unsafe { ioctl(fd.as_raw_fd(), SIOCSIFFLAGS, &raw mut request) }).map(|_| ())
}

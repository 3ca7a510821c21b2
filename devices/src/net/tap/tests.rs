//! With real tap devices, in network namespaces of their own.

#![allow(
    clippy::cast_possible_truncation,
    clippy::cast_possible_wrap,
    reason = "C structures of a test"
)]

use std::mem::size_of;
use std::os::fd::FromRawFd;

use super::*;
use crate::net::suite::{self, Rig, frame, packet};
use crate::vectored::MAX_IOVECS;

/// Runs `test` on a thread in a fresh network namespace, which disappears with it; says so and does
/// nothing if this process may not make one.
fn in_namespace(test: impl FnOnce() + Send + 'static) {
    let result = std::thread::spawn(move || {
        // SAFETY: only this thread changes its network namespace; other threads keep theirs.
        #[expect(unsafe_code, reason = "unshare")]
        let result = unsafe { libc::unshare(libc::CLONE_NEWNET) };
        if result != 0 || !std::path::Path::new("/dev/net/tun").exists() {
            eprintln!("skipped: needs CAP_SYS_ADMIN, CAP_NET_ADMIN and /dev/net/tun");
            return;
        }
        test();
    });
    result.join().unwrap();
}

fn cvt(result: i32) -> i32 {
    assert!(result >= 0, "{}", io::Error::last_os_error());
    result
}

/// A packet socket on the host's side of the tap, with the interface brought up.
fn host_side(name: &str) -> OwnedFd {
    let protocol = i32::from(0x88b5u16.to_be());
    let mut request = sys_request(name);
    // SAFETY: plain socket calls with valid structures of the right size.
    #[expect(unsafe_code, reason = "socket, ioctl, bind")]
    unsafe {
        let socket = cvt(libc::socket(libc::AF_PACKET, libc::SOCK_RAW, protocol));
        let socket = OwnedFd::from_raw_fd(socket);
        let fd = socket.as_raw_fd();
        cvt(libc::ioctl(fd, libc::SIOCGIFFLAGS, &raw mut request));
        request.ifr_ifru.ifru_flags |= libc::IFF_UP as i16;
        cvt(libc::ioctl(fd, libc::SIOCSIFFLAGS, &raw const request));
        let mut address: libc::sockaddr_ll = std::mem::zeroed();
        address.sll_family = libc::AF_PACKET as u16;
        address.sll_protocol = 0x88b5u16.to_be();
        let name = std::ffi::CString::new(name).unwrap();
        address.sll_ifindex = libc::if_nametoindex(name.as_ptr()) as i32;
        cvt(libc::bind(
            fd,
            (&raw const address).cast(),
            size_of::<libc::sockaddr_ll>() as u32,
        ));
        let timeout = libc::timeval {
            tv_sec: 20,
            tv_usec: 0,
        };
        cvt(libc::setsockopt(
            fd,
            libc::SOL_SOCKET,
            libc::SO_RCVTIMEO,
            (&raw const timeout).cast(),
            size_of::<libc::timeval>() as u32,
        ));
        socket
    }
}

fn sys_request(name: &str) -> libc::ifreq {
    // SAFETY: plain data.
    #[expect(unsafe_code, reason = "zeroed C struct")]
    let mut request: libc::ifreq = unsafe { std::mem::zeroed() };
    for (to, from) in request.ifr_name.iter_mut().zip(name.bytes()) {
        *to = from as libc::c_char;
    }
    request
}

fn host_send(socket: &OwnedFd, frame: &[u8]) {
    let sent = rustix::io::write(socket, frame).unwrap();
    assert_eq!(sent, frame.len());
}

fn host_receive(socket: &OwnedFd) -> Vec<u8> {
    let mut bytes = vec![0; 70_000];
    let len = rustix::io::read(socket, &mut bytes).expect("nothing arrived at the host");
    bytes.truncate(len);
    bytes
}

/// Makes a device that outlives its descriptors, as `ip tuntap add` does.
fn persistent(name: &str, multi_queue: bool) {
    let fd = sys::open_control().unwrap();
    sys::attach_device(&fd, name, multi_queue).unwrap();
    // SAFETY: this request's argument is a number.
    #[expect(unsafe_code, reason = "ioctl")]
    cvt(unsafe { libc::ioctl(fd.as_raw_fd(), libc::TUNSETPERSIST, 1 as libc::c_ulong) });
}

#[test]
fn passes_the_suite() {
    in_namespace(|| {
        let mut round = 0;
        suite::run(&mut || {
            round += 1;
            let backend = Tap::open(&format!("tap{round}"), 3).unwrap();
            let socket = host_side(backend.name());
            Rig {
                backend,
                arrive: Box::new(move |_, frame| host_send(&socket, frame)),
                offloads_change: true,
            }
        });
    });
}

#[test]
fn the_host_gets_what_the_guest_sends() {
    in_namespace(|| {
        let tap = Tap::open("tap0", 1).unwrap();
        let mut queue = tap.clone().open_queue(0).unwrap();
        let error = suite::send(&mut *queue, &packet(&frame(1, 60))).unwrap_err();
        assert_eq!(
            (error.raw_os_error(), tap.drops()),
            (Some(libc::EIO), 1),
            "the interface is down"
        );
        let socket = host_side("tap0");
        for len in [60, 1000, 1514] {
            suite::send(&mut *queue, &packet(&frame(2, len))).unwrap();
            assert_eq!(host_receive(&socket), frame(2, len));
        }
        let too_many = vec![VolatileSlice::from(&mut [][..]); MAX_IOVECS + 1];
        let error = queue.send(&too_many).unwrap_err();
        assert_eq!(error.kind(), io::ErrorKind::InvalidInput);
        assert!(suite::send(&mut *queue, &[0; 5]).is_err());
    });
}

/// The host reads the headers: a partial checksum passes, one outside of the packet does not.
#[test]
fn the_host_checks_headers() {
    in_namespace(|| {
        let tap = Tap::open("tap0", 1).unwrap();
        assert!(tap.transmit_offloads().checksum);
        let mut queue = tap.clone().open_queue(0).unwrap();
        let socket = host_side("tap0");
        let mut with_header = packet(&frame(5, 200));
        // NEEDS_CSUM from behind the network header on, with the field 6 bytes in.
        with_header[0] = 1;
        with_header[6] = 34;
        with_header[8] = 6;
        suite::send(&mut *queue, &with_header).unwrap();
        let seen = host_receive(&socket);
        assert_eq!(seen.len(), 200);
        let outside = {
            let mut packet = with_header.clone();
            packet[7] = 0xff;
            packet
        };
        let error = suite::send(&mut *queue, &outside).unwrap_err();
        assert_eq!(error.raw_os_error(), Some(libc::EINVAL));
    });
}

#[test]
fn only_active_pairs_receive() {
    in_namespace(|| {
        let tap = Tap::open("tap0", 2).unwrap();
        let mut first = tap.clone().open_queue(0).unwrap();
        let mut second = tap.clone().open_queue(1).unwrap();
        let socket = host_side("tap0");
        assert!(first.fd().is_some() && second.fd().is_none());
        for seed in 0..50 {
            host_send(&socket, &frame(seed, 60));
        }
        for seed in 0..50 {
            assert_eq!(suite::wait(&mut *first), packet(&frame(seed, 60)));
        }
        assert_eq!(suite::receive(&mut *second), None);
        tap.set_active_pairs(2).unwrap();
        assert!(second.fd().is_some());
        // Every flow goes to some queue; none is lost.
        let flows = 64;
        for flow in 0..flows {
            let mut frame = frame(0, 60);
            frame[6..12].copy_from_slice(&[2, 0, 0, 0, 1, flow]);
            host_send(&socket, &frame);
        }
        let mut seen = 0;
        while seen < flows {
            for queue in [&mut first, &mut second] {
                while suite::receive(&mut **queue).is_some() {
                    seen += 1;
                }
            }
        }
        tap.set_active_pairs(1).unwrap();
        assert!(second.fd().is_none());
        host_send(&socket, &frame(9, 60));
        assert_eq!(suite::wait(&mut *first), packet(&frame(9, 60)));
    });
}

#[test]
fn persistent_devices_are_opened_as_they_were_made() {
    in_namespace(|| {
        persistent("single", false);
        persistent("multi", true);
        for (name, pairs) in [("single", 1), ("multi", 1), ("multi", 4), ("multi", 1)] {
            let tap = Tap::open(name, pairs).unwrap();
            assert_eq!((tap.max_pairs(), tap.name()), (pairs, name));
        }
        let text = Tap::open("single", 2).unwrap_err().to_string();
        assert!(
            text.contains("single") && text.contains("1 queue,") && text.contains("multi_queue"),
            "{text}"
        );
        let _user = Tap::open("single", 1).unwrap();
        let text = Tap::open("single", 1).unwrap_err().to_string();
        assert!(text.contains("in use"), "{text}");
    });
}

#[test]
fn a_device_that_is_gone_is_an_error() {
    in_namespace(|| {
        persistent("tap0", false);
        let tap = Tap::open("tap0", 1).unwrap();
        let mut queue = tap.clone().open_queue(0).unwrap();
        // SAFETY: this request's argument is a number; the queue's descriptor is open.
        #[expect(unsafe_code, reason = "ioctl")]
        cvt(unsafe {
            libc::ioctl(
                tap.queues[0].fd.as_raw_fd(),
                libc::TUNSETPERSIST,
                0 as libc::c_ulong,
            )
        });
        delete_interface("tap0");
        let mut bytes = [0; 100];
        let part = VolatileSlice::from(bytes.as_mut_slice());
        assert!(queue.receive(&[part]).is_err());
        assert!(suite::send(&mut *queue, &packet(&frame(1, 60))).is_err());
    });
}

/// `ip link del`: a netlink message of type `RTM_DELLINK`.
fn delete_interface(name: &str) {
    let name = std::ffi::CString::new(name).unwrap();
    let mut message = Vec::new();
    // SAFETY: plain socket calls; the message is valid for its length.
    #[expect(unsafe_code, reason = "netlink")]
    unsafe {
        let index = libc::if_nametoindex(name.as_ptr());
        message.extend(32u32.to_ne_bytes());
        message.extend(libc::RTM_DELLINK.to_ne_bytes());
        message.extend((libc::NLM_F_REQUEST | libc::NLM_F_ACK).to_ne_bytes()[..2].to_vec());
        message.extend([0; 8]);
        message.extend([0; 4]);
        message.extend(index.to_ne_bytes());
        message.extend([0; 8]);
        let fd = cvt(libc::socket(
            libc::AF_NETLINK,
            libc::SOCK_RAW,
            libc::NETLINK_ROUTE,
        ));
        let socket = OwnedFd::from_raw_fd(fd);
        let sent = libc::send(fd, message.as_ptr().cast(), message.len(), 0);
        assert_eq!(sent, 32);
        let mut answer = [0u8; 256];
        let len = rustix::io::read(&socket, &mut answer).unwrap();
        let error = i32::from_ne_bytes(answer[16..20].try_into().unwrap());
        assert!(len >= 20 && error == 0, "{error}");
    }
}

#[test]
fn bad_requests_say_what_is_missing() {
    for name in [
        "",
        "a-name-of-16-chr",
        "a/b",
        "a b",
        "tap%d",
        "..",
        "a:b",
        "a\0b",
    ] {
        assert!(
            matches!(Tap::open(name, 1), Err(TapError::Name(_))),
            "{name}"
        );
    }
    for pairs in [0, 257] {
        assert!(matches!(Tap::open("tap0", pairs), Err(TapError::Pairs(_))));
    }
    let text = error::control(io::Error::from_raw_os_error(libc::ENOENT)).to_string();
    assert!(text.contains("modprobe tun"), "{text}");
    in_namespace(|| {
        let text = Tap::open("lo", 1).unwrap_err().to_string();
        assert!(text.contains("lo: an interface of this name"), "{text}");
        persistent("owned", true);
        // SAFETY: the raw calls change this thread alone: the kernel's credentials are per thread.
        #[expect(unsafe_code, reason = "drop privileges of one thread")]
        unsafe {
            cvt(i32::try_from(libc::syscall(libc::SYS_setresuid, 65534, 65534, 65534)).unwrap());
        }
        match Tap::open("owned", 2) {
            // The control device itself may be closed to others.
            Err(TapError::ControlPermission) => {}
            other => {
                let text = other.unwrap_err().to_string();
                assert!(text.contains("no permission to open it"), "{text}");
                let text = Tap::open("new", 2).unwrap_err().to_string();
                assert!(
                    text.contains("create it") && text.contains("multi_queue"),
                    "{text}"
                );
            }
        }
    });
}

//! What can be wrong with a tap device, said so that a person can put it right.

use std::io;

/// Longest interface name (`IFNAMSIZ` without the terminating zero).
const MAX_NAME: usize = libc::IFNAMSIZ - 1;

/// Why a tap device cannot be used. The texts name it and fit into one line.
#[derive(Debug, thiserror::Error)]
pub enum TapError {
    /// Not a name that an interface can have.
    #[error(
        "tap \"{0}\": an interface name has 1 to {MAX_NAME} characters, no slash, colon, percent sign or space"
    )]
    Name(String),
    /// None, or more than the kernel has.
    #[error("{0} queue pairs: a tap device has 1 to {max}", max = super::MAX_QUEUES)]
    Pairs(u16),
    /// The host has no tun driver.
    #[error("/dev/net/tun does not exist: load the host's tun module (modprobe tun)")]
    NoDriver,
    /// The control device is closed to us.
    #[error("/dev/net/tun: no permission to open it for reading and writing")]
    ControlPermission,
    /// It belongs to another user, or does not exist and may not be made.
    #[error("tap {name}: no permission to {what}; an administrator can make it for you: ip tuntap add dev {name} mode tap{flag} user $USER", what = if *.exists { "open it" } else { "create it" }, flag = if *.pairs > 1 { " multi_queue" } else { "" })]
    Permission {
        /// The interface.
        name: String,
        /// Whether it exists.
        exists: bool,
        /// The queue pairs asked for.
        pairs: u16,
    },
    /// Its only queue is open elsewhere, or all of them are.
    #[error("tap {0}: in use by another program")]
    Busy(String),
    /// It exists and has fewer queues than asked for.
    #[error("tap {name}: has {available} queue{s}, not {pairs}; make it with multi_queue (ip tuntap add dev {name} mode tap multi_queue), or ask for fewer pairs", s = if *.available == 1 { "" } else { "s" })]
    FewerQueues {
        /// The interface.
        name: String,
        /// The queue pairs asked for.
        pairs: u16,
        /// The queues that can be had.
        available: u16,
    },
    /// It exists and is something else.
    #[error("{0}: an interface of this name exists and is not a tap device (or was made with pi)")]
    NotATap(String),
    /// Any other failure of the host.
    #[error("tap {name}: {source}")]
    Io {
        /// The interface.
        name: String,
        /// What the host said.
        source: io::Error,
    },
}

/// Linux, `dev_valid_name`; and `%`, which would have the kernel choose a number.
pub(super) fn check_name(name: &str) -> Result<(), TapError> {
    let bad = |c: char| c == '/' || c == ':' || c == '%' || c == '\0' || c.is_whitespace();
    if name.is_empty() || name.len() > MAX_NAME || name == "." || name == ".." || name.contains(bad)
    {
        return Err(TapError::Name(name.to_owned()));
    }
    Ok(())
}

/// The control device could not be opened.
pub(super) fn control(source: io::Error) -> TapError {
    match source.raw_os_error() {
        Some(libc::ENOENT | libc::ENODEV | libc::ENXIO) => TapError::NoDriver,
        Some(libc::EACCES | libc::EPERM) => TapError::ControlPermission,
        _ => TapError::Io {
            name: "/dev/net/tun".to_owned(),
            source,
        },
    }
}

/// Queue `index` of `pairs` could not be attached to the device.
pub(super) fn attach(name: &str, pairs: u16, index: u16, source: io::Error) -> TapError {
    let exists = super::sys::interface_exists(name);
    let name = name.to_owned();
    match source.raw_os_error() {
        Some(libc::EPERM | libc::EACCES) => TapError::Permission {
            name,
            exists,
            pairs,
        },
        Some(libc::EBUSY) if index == 0 => TapError::Busy(name),
        Some(libc::E2BIG | libc::EBUSY) => TapError::FewerQueues {
            name,
            pairs,
            available: index,
        },
        Some(libc::EINVAL) if exists => {
            // A tap made for one queue refuses the flag for several.
            if pairs > 1 && super::sys::is_single_queue_tap(&name) {
                TapError::FewerQueues {
                    name,
                    pairs,
                    available: 1,
                }
            } else {
                TapError::NotATap(name)
            }
        }
        _ => TapError::Io { name, source },
    }
}

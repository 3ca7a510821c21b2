//! Linux tap devices (Linux, Documentation/networking/tuntap.rst).

mod error;
mod sys;
#[cfg(test)]
mod tests;

use std::io;
use std::os::fd::{AsRawFd, OwnedFd, RawFd};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError};

use vm_memory::VolatileSlice;

use super::{HEADER_LEN, NetBackend, NetQueue, Offloads};
use crate::vectored::Vectored;
pub use error::TapError;

/// Queues that the kernel gives one tap device (`MAX_TAP_QUEUES`).
const MAX_QUEUES: u16 = 256;

/// One tap device, with a queue for each pair.
///
/// An existing persistent device is opened without privileges by the user that it was made for; one
/// that does not exist is made, which takes `CAP_NET_ADMIN`, and goes away with this. Bringing the
/// interface up and giving it addresses is left to the host's administrator: while it is down,
/// packets that the guest sends are lost.
#[derive(Debug)]
pub struct Tap {
    name: String,
    queues: Box<[Queue]>,
    supported: Offloads,
    drops: AtomicU64,
    /// Held while queues are attached and detached.
    active: Mutex<u16>,
}

#[derive(Debug)]
struct Queue {
    fd: OwnedFd,
    open: AtomicBool,
    /// The device hands packets to this queue. A detached queue's descriptor reports an error to
    /// whoever polls it.
    attached: AtomicBool,
}

impl Tap {
    /// Opens the tap device `name` with `pairs` queues, of which the first is active.
    ///
    /// # Errors
    ///
    /// See [`TapError`]; nothing is left behind.
    pub fn open(name: &str, pairs: u16) -> Result<Arc<Tap>, TapError> {
        error::check_name(name)?;
        if pairs == 0 || pairs > MAX_QUEUES {
            return Err(TapError::Pairs(pairs));
        }
        let mut queues = Vec::with_capacity(usize::from(pairs));
        for index in 0..pairs {
            let fd = sys::open_control().map_err(error::control)?;
            let many = pairs > 1;
            let mut result = sys::attach_device(&fd, name, many);
            // A device keeps the kind that it was made with. One queue is served by either.
            if !many && errno(&result) == Some(libc::EINVAL) {
                result = sys::attach_device(&fd, name, true);
            }
            result.map_err(|source| error::attach(name, pairs, index, source))?;
            queues.push(Queue {
                fd,
                open: AtomicBool::new(false),
                attached: AtomicBool::new(true),
            });
        }
        let io = |source| TapError::Io {
            name: name.to_owned(),
            source,
        };
        let first = &queues[0].fd;
        sys::set_header_len(first, HEADER_LEN).map_err(io)?;
        let mut supported = Offloads {
            checksum: true,
            tso4: true,
            tso6: true,
            ecn: true,
            uso: true,
        };
        // UDP segments came with Linux 6.2.
        if sys::set_offloads(first, supported).is_err() {
            supported.uso = false;
            sys::set_offloads(first, supported).map_err(io)?;
        }
        sys::set_offloads(first, Offloads::default()).map_err(io)?;
        let tap = Tap {
            name: name.to_owned(),
            queues: queues.into_boxed_slice(),
            supported,
            drops: AtomicU64::new(0),
            active: Mutex::new(pairs),
        };
        tap.set_active_pairs(1).map_err(io)?;
        Ok(Arc::new(tap))
    }

    /// The interface's name.
    pub fn name(&self) -> &str {
        &self.name
    }
}

impl NetBackend for Tap {
    fn transmit_offloads(&self) -> Offloads {
        self.supported
    }

    fn receive_offloads(&self) -> Offloads {
        self.supported
    }

    /// The device has one setting for all queues.
    fn set_receive_offloads(&self, offloads: Offloads) -> io::Result<()> {
        sys::set_offloads(&self.queues[0].fd, offloads)
    }

    fn max_pairs(&self) -> u16 {
        u16::try_from(self.queues.len()).unwrap_or(u16::MAX)
    }

    fn set_active_pairs(&self, pairs: u16) -> io::Result<()> {
        if pairs == 0 || pairs > self.max_pairs() {
            return Err(io::ErrorKind::InvalidInput.into());
        }
        let mut active = self.active.lock().unwrap_or_else(PoisonError::into_inner);
        while *active > pairs {
            let queue = &self.queues[usize::from(*active - 1)];
            queue.attached.store(false, Ordering::Release);
            if let Err(error) = sys::set_attached(&queue.fd, false) {
                queue.attached.store(true, Ordering::Release);
                return Err(error);
            }
            *active -= 1;
        }
        while *active < pairs {
            let queue = &self.queues[usize::from(*active)];
            sys::set_attached(&queue.fd, true)?;
            queue.attached.store(true, Ordering::Release);
            *active += 1;
        }
        Ok(())
    }

    fn open_queue(self: Arc<Self>, index: u16) -> io::Result<Box<dyn NetQueue>> {
        let queue = self.queues.get(usize::from(index));
        let queue = queue.ok_or(io::ErrorKind::InvalidInput)?;
        if queue.open.swap(true, Ordering::AcqRel) {
            return Err(io::ErrorKind::ResourceBusy.into());
        }
        Ok(Box::new(TapQueue {
            tap: self,
            index: usize::from(index),
            vectored: Vectored::new(),
        }))
    }

    fn drops(&self) -> u64 {
        self.drops.load(Ordering::Relaxed)
    }
}

struct TapQueue {
    tap: Arc<Tap>,
    index: usize,
    vectored: Vectored,
}

impl TapQueue {
    fn queue(&self) -> &Queue {
        &self.tap.queues[self.index]
    }

    fn count_drop(&self) {
        self.tap.drops.fetch_add(1, Ordering::Relaxed);
    }
}

impl NetQueue for TapQueue {
    fn send(&mut self, packet: &[VolatileSlice<'_, ()>]) -> io::Result<()> {
        loop {
            let fd = &self.tap.queues[self.index].fd;
            match self.vectored.write(fd, packet) {
                Ok(_) => return Ok(()),
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) => {
                    if error.kind() != io::ErrorKind::WouldBlock {
                        self.count_drop();
                    }
                    return Err(error);
                }
            }
        }
    }

    fn receive(&mut self, buffers: &[VolatileSlice<'_, ()>]) -> io::Result<Option<usize>> {
        loop {
            if !self.queue().attached.load(Ordering::Acquire) {
                return Ok(None);
            }
            let fd = &self.tap.queues[self.index].fd;
            // The device cuts packets short without a word, which the helper finds out.
            match self.vectored.read_packet(fd, buffers) {
                Ok((len, true)) => return Ok(Some(len)),
                Ok((_, false)) => self.count_drop(),
                Err(error) => match error.raw_os_error() {
                    Some(libc::EAGAIN) => return Ok(None),
                    Some(libc::EINTR) => {}
                    // No room even for the header; the packet is gone.
                    Some(libc::EINVAL) => self.count_drop(),
                    // Detached meanwhile; the flag says so.
                    Some(libc::EBADFD) if !self.queue().attached.load(Ordering::Acquire) => {}
                    _ => return Err(error),
                },
            }
        }
    }

    fn fd(&self) -> Option<RawFd> {
        let queue = self.queue();
        let attached = queue.attached.load(Ordering::Acquire);
        attached.then(|| queue.fd.as_raw_fd())
    }
}

impl Drop for TapQueue {
    fn drop(&mut self) {
        self.queue().open.store(false, Ordering::Release);
    }
}

fn errno<T>(result: &io::Result<T>) -> Option<i32> {
    result.as_ref().err().and_then(io::Error::raw_os_error)
}

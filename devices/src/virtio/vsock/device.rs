//! The device: its configuration and its life.

use std::fs;
use std::io;
use std::os::unix::fs::FileTypeExt;
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};
use std::sync::atomic::Ordering;
use std::sync::{Arc, Mutex, MutexGuard, OnceLock, PoisonError};

use pci::ClassCode;

use super::mux::{Counters, Mux};
use super::spec::{self, feature};
use super::task::Task;
use crate::virtio::spec::device_id;
use crate::virtio::{Activation, DmaTask, Transport, VirtioDevice};
use crate::worker::{Kick, Worker, WorkerOptions};

/// Longest path of a Unix socket (unix(7), `sun_path` less its terminating zero).
const MAX_PATH: usize = 107;
/// Room for `_` and a port behind the path.
const MAX_SUFFIX: usize = 11;
/// Entries of the receive and transmit queues.
const QUEUE_SIZE: u16 = 256;
/// Entries of the event queue.
const EVENT_QUEUE_SIZE: u16 = 16;

/// Why a socket device cannot be made. The texts name the path and fit into one line.
#[derive(Debug, thiserror::Error)]
pub enum NewVsockError {
    /// Reserved, or wider than 32 bits.
    #[error("vsock context id {0}: a guest's is from 3 to 4294967294")]
    Cid(u64),
    /// The kernel could not bind it or the sockets beside it.
    #[error("vsock socket {path}: the path has {len} bytes, and at most {max} are possible", path = .path.display(), max = MAX_PATH - MAX_SUFFIX)]
    TooLong {
        /// The path.
        path: PathBuf,
        /// Its length in bytes.
        len: usize,
    },
    /// Another process listens there.
    #[error("vsock socket {}: another process listens there; give each guest its own path", .0.display())]
    InUse(PathBuf),
    /// Something that is not a socket is there.
    #[error("vsock socket {}: a file that is not a socket is in the way", .0.display())]
    NotASocket(PathBuf),
    /// The host refuses it.
    #[error("vsock socket {path}: {source}", path = .path.display())]
    Io {
        /// The path.
        path: PathBuf,
        /// What the host said.
        source: io::Error,
    },
}

/// What a socket device has done since it was made.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, serde::Serialize)]
pub struct VsockStats {
    /// Connections now, those that are being set up or closed among them.
    pub connections: u64,
    /// Connections so far.
    pub opened: u64,
    /// Connections that we refused or ended by a reset.
    pub resets: u64,
    /// Packets and buffers of the guest's that broke the device's rules.
    pub malformed: u64,
    /// Packets to the guest.
    pub to_guest: u64,
    /// Packets from the guest.
    pub from_guest: u64,
}

/// A virtio socket device, listening on its Unix socket from the start: a program that connects
/// before the guest is up waits.
pub struct VirtioVsock {
    cid: u64,
    path: PathBuf,
    listener: Arc<UnixListener>,
    options: WorkerOptions,
    transport: OnceLock<Arc<Transport>>,
    worker: Mutex<Option<Worker<Task>>>,
    counters: Arc<Counters>,
}

impl VirtioVsock {
    /// Makes a device for a guest with this context id, and its socket. A socket that a process
    /// which is gone left at `path` is replaced.
    ///
    /// # Errors
    ///
    /// See [`NewVsockError`].
    pub fn new(
        cid: u64,
        path: &Path,
        options: WorkerOptions,
    ) -> Result<Arc<VirtioVsock>, NewVsockError> {
        if !spec::GUEST_CIDS.contains(&cid) {
            return Err(NewVsockError::Cid(cid));
        }
        let len = path.as_os_str().len();
        if len > MAX_PATH - MAX_SUFFIX {
            return Err(NewVsockError::TooLong {
                path: path.to_owned(),
                len,
            });
        }
        let listener = listen(path)?;
        Ok(Arc::new(VirtioVsock {
            cid,
            path: path.to_owned(),
            listener: Arc::new(listener),
            options,
            transport: OnceLock::new(),
            worker: Mutex::new(None),
            counters: Arc::new(Counters::default()),
        }))
    }

    /// What it has done so far.
    pub fn stats(&self) -> VsockStats {
        let counters = &self.counters;
        VsockStats {
            connections: counters.connections.load(Ordering::Relaxed),
            opened: counters.opened.load(Ordering::Relaxed),
            resets: counters.resets.load(Ordering::Relaxed),
            malformed: counters.malformed.load(Ordering::Relaxed),
            to_guest: counters.to_guest.load(Ordering::Relaxed),
            from_guest: counters.from_guest.load(Ordering::Relaxed),
        }
    }

    fn worker(&self) -> MutexGuard<'_, Option<Worker<Task>>> {
        self.worker.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Binds the socket, over one that nobody listens on any more.
fn listen(path: &Path) -> Result<UnixListener, NewVsockError> {
    let io = |source| NewVsockError::Io {
        path: path.to_owned(),
        source,
    };
    let mut bound = UnixListener::bind(path);
    if bound
        .as_ref()
        .is_err_and(|error| error.kind() == io::ErrorKind::AddrInUse)
    {
        let metadata = fs::symlink_metadata(path).map_err(io)?;
        if !metadata.file_type().is_socket() {
            return Err(NewVsockError::NotASocket(path.to_owned()));
        }
        match UnixStream::connect(path) {
            Err(error) if error.kind() == io::ErrorKind::ConnectionRefused => {}
            _ => return Err(NewVsockError::InUse(path.to_owned())),
        }
        fs::remove_file(path).map_err(io)?;
        bound = UnixListener::bind(path);
    }
    let listener = bound.map_err(io)?;
    listener.set_nonblocking(true).map_err(io)?;
    Ok(listener)
}

impl VirtioDevice for VirtioVsock {
    fn device_type(&self) -> u16 {
        device_id::VSOCK
    }

    /// Other communication device (PCI Code and ID Assignment 1.11, 1.8).
    fn class(&self) -> ClassCode {
        ClassCode {
            base: 7,
            sub: 0x80,
            interface: 0,
        }
    }

    fn features(&self) -> u64 {
        feature::STREAM
    }

    fn queue_sizes(&self) -> Vec<u16> {
        vec![QUEUE_SIZE, QUEUE_SIZE, EVENT_QUEUE_SIZE]
    }

    fn config_len(&self) -> usize {
        spec::CONFIG_LEN
    }

    fn config_read(&self, offset: usize, data: &mut [u8]) {
        let config = self.cid.to_le_bytes();
        for (to, from) in data.iter_mut().zip(config.iter().skip(offset)) {
            *to = *from;
        }
    }

    fn attach(&self, transport: &Arc<Transport>) {
        // A second transport for one device is a mistake of the caller's; the first stays.
        let _ = self.transport.set(Arc::clone(transport));
    }

    /// The event queue (5.10.6.7) only tells of migration, which there is none of: its buffers stay
    /// where they are.
    fn activate(&self, activation: Activation) -> io::Result<()> {
        let Some(transport) = self.transport.get() else {
            return Err(io::Error::other("the device has no transport"));
        };
        let mut queues = activation.queues.into_iter();
        let (receive, transmit) = (queues.next().flatten(), queues.next().flatten());
        let counters = Arc::clone(&self.counters);
        let listener = Arc::clone(&self.listener);
        let mux = Mux::new(self.cid, self.path.clone(), listener, counters)?;
        let dma = DmaTask::new(activation.dma.view(), transport);
        let task = Task::new(dma, receive, transmit, mux, Arc::clone(&self.counters));
        let worker = Worker::spawn(transport.name(), &Kick::new()?, task, self.options.clone())?;
        *self.worker() = Some(worker);
        Ok(())
    }

    /// The guest has forgotten its connections, so they end.
    fn reset(&self) {
        drop(self.worker().take());
    }
}

/// The socket file goes with the device.
impl Drop for VirtioVsock {
    fn drop(&mut self) {
        self.reset();
        let _ = fs::remove_file(&self.path);
    }
}

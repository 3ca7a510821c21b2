//! AF_UNIX sockets that exist on one side and are shown on the other.

use std::fs;
use std::io;
use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::os::unix::fs::{FileTypeExt, MetadataExt};
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use rustix::fs::{AtFlags, CWD, Mode, OFlags};
use rustix::io::Errno;
use rustix::net::{AddressFamily, SocketAddrUnix, SocketFlags, SocketType};

use super::wire::StreamId;

const BACKLOG: i32 = 128;

/// How long a connection waits for room in a full backlog.
const CONNECT_PATIENCE: Duration = Duration::from_secs(10);

fn unix_socket() -> io::Result<OwnedFd> {
    Ok(rustix::net::socket_with(
        AddressFamily::UNIX,
        SocketType::STREAM,
        SocketFlags::CLOEXEC | SocketFlags::NONBLOCK,
        None,
    )?)
}

/// Listens at a path that does not exist yet.
///
/// # Errors
/// As bind(2) and listen(2).
pub(super) fn listen_at(path: &Path) -> io::Result<OwnedFd> {
    let socket = unix_socket()?;
    rustix::net::bind(&socket, &SocketAddrUnix::new(path)?)?;
    rustix::net::listen(&socket, BACKLOG)?;
    Ok(socket)
}

/// Connects without waiting; [`io::ErrorKind::WouldBlock`] says that the backlog is full.
///
/// # Errors
/// As connect(2).
pub(super) fn connect(path: &Path) -> io::Result<OwnedFd> {
    let socket = unix_socket()?;
    rustix::net::connect(&socket, &SocketAddrUnix::new(path)?)?;
    Ok(socket)
}

/// The next connection, if there is one.
///
/// # Errors
/// As accept(2).
pub(super) fn accept(listener: &OwnedFd) -> io::Result<Option<OwnedFd>> {
    match rustix::net::accept_with(listener, SocketFlags::CLOEXEC | SocketFlags::NONBLOCK) {
        Ok(connection) => Ok(Some(connection)),
        Err(Errno::AGAIN | Errno::INTR | Errno::CONNABORTED) => Ok(None),
        Err(error) => Err(error.into()),
    }
}

/// Whether somebody listens at the path.
pub(super) fn is_live(path: &Path) -> bool {
    match connect(path) {
        Ok(_) => true,
        Err(error) => error.kind() == io::ErrorKind::WouldBlock,
    }
}

/// An open handle of a socket's file, through which it can be reached even if another file takes
/// its name.
#[derive(Debug)]
pub(super) struct SocketHandle(OwnedFd);

impl SocketHandle {
    /// Opens the socket at a path.
    ///
    /// # Errors
    /// There is none.
    pub(super) fn open(path: &Path) -> io::Result<Self> {
        let flags = OFlags::PATH | OFlags::NOFOLLOW | OFlags::CLOEXEC;
        Ok(Self(rustix::fs::open(path, flags, Mode::empty())?))
    }

    /// A path that leads to the socket while the handle lives.
    pub(super) fn path(&self) -> PathBuf {
        format!("/proc/self/fd/{}", self.0.as_raw_fd()).into()
    }
}

/// A listening socket that took its path over from whatever was there.
#[derive(Debug)]
pub(super) struct Published {
    listener: OwnedFd,
    path: PathBuf,
    device: u64,
    inode: u64,
}

impl Published {
    /// Listens at `path`. What is there (the relay's own socket, seen through a shared folder, or
    /// a dead one) is replaced in one step.
    ///
    /// # Errors
    /// The folder does not exist or cannot be written.
    pub(super) fn at(path: &Path, mode: u32) -> io::Result<Self> {
        let parent = parent_of(path);
        let folder = rustix::fs::open(
            parent,
            OFlags::PATH | OFlags::DIRECTORY | OFlags::CLOEXEC,
            Mode::empty(),
        )?;
        let temporary = format!(".ringside-{}-{}", std::process::id(), folder.as_raw_fd());
        // Through the handle the address is short whatever the folder's own path is.
        let address = format!("/proc/self/fd/{}/{temporary}", folder.as_raw_fd());
        // Left by a process of the same number that was killed.
        let _ = rustix::fs::unlinkat(&folder, &temporary, AtFlags::empty());
        let listener = listen_at(Path::new(&address))?;
        let publish = || -> io::Result<Self> {
            let permissions = Mode::from_raw_mode(mode & 0o777);
            rustix::fs::chmod(&address, permissions)?;
            let metadata = fs::symlink_metadata(&address)?;
            rustix::fs::renameat(&folder, &temporary, CWD, path)?;
            Ok(Self {
                listener: listener.try_clone()?,
                path: path.to_owned(),
                device: metadata.dev(),
                inode: metadata.ino(),
            })
        };
        publish().inspect_err(|_| {
            let _ = rustix::fs::unlinkat(&folder, &temporary, AtFlags::empty());
        })
    }

    /// The listening socket.
    pub(super) fn listener(&self) -> &OwnedFd {
        &self.listener
    }
}

impl Drop for Published {
    fn drop(&mut self) {
        let ours = fs::symlink_metadata(&self.path)
            .is_ok_and(|metadata| metadata.dev() == self.device && metadata.ino() == self.inode);
        if ours {
            // If it has gone in the meantime, so much the better.
            let _ = fs::remove_file(&self.path);
        }
    }
}

/// The folder of a path.
pub(super) fn parent_of(path: &Path) -> &Path {
    match path.parent() {
        Some(parent) if !parent.as_os_str().is_empty() => parent,
        _ => Path::new("."),
    }
}

/// Connections that wait for room in the backlog of the socket they are made to.
#[derive(Debug, Default)]
pub(super) struct Connecting {
    waiting: Vec<Attempt>,
}

#[derive(Debug)]
struct Attempt {
    stream: StreamId,
    path: PathBuf,
    until: Instant,
}

/// How an attempt to connect ended.
#[derive(Debug)]
pub(super) struct Connected {
    /// The stream that the connection is for.
    pub(super) stream: StreamId,
    /// The connection, or why there is none.
    pub(super) result: io::Result<OwnedFd>,
}

impl Connecting {
    /// Asks for a connection; [`Connecting::poll`] makes it.
    pub(super) fn start(&mut self, stream: StreamId, path: PathBuf) {
        self.waiting.push(Attempt {
            stream,
            path,
            until: Instant::now() + CONNECT_PATIENCE,
        });
    }

    /// Whether some attempts have to be repeated soon.
    pub(super) fn is_waiting(&self) -> bool {
        !self.waiting.is_empty()
    }

    /// Tries all attempts and returns those that have ended.
    pub(super) fn poll(&mut self) -> Vec<Connected> {
        let mut ended = Vec::new();
        self.waiting.retain(|attempt| {
            let result = connect(&attempt.path);
            let again = result
                .as_ref()
                .is_err_and(|error| error.kind() == io::ErrorKind::WouldBlock)
                && Instant::now() < attempt.until;
            if !again {
                ended.push(Connected {
                    stream: attempt.stream,
                    result,
                });
            }
            again
        });
        ended
    }
}

/// The sockets `<base>_<decimal number>` beside `base`: the field's mapping of guest-initiated
/// vsock connections to AF_UNIX.
pub(super) fn numbered_siblings(base: &Path) -> Vec<PathBuf> {
    let Some(name) = base.file_name() else {
        return Vec::new();
    };
    let mut prefix = name.as_encoded_bytes().to_vec();
    prefix.push(b'_');
    let Ok(entries) = fs::read_dir(parent_of(base)) else {
        return Vec::new();
    };
    let mut found: Vec<PathBuf> = entries
        .filter_map(Result::ok)
        .filter(|entry| {
            let name = entry.file_name();
            let number = name.as_encoded_bytes().strip_prefix(prefix.as_slice());
            number.is_some_and(|number| !number.is_empty() && number.iter().all(u8::is_ascii_digit))
                && entry.file_type().is_ok_and(|kind| kind.is_socket())
        })
        .map(|entry| entry.path())
        .collect();
    found.sort();
    found
}

/// Watches the folders of some paths for files that come and go.
#[derive(Debug)]
pub(super) struct FolderWatch {
    inotify: OwnedFd,
}

impl FolderWatch {
    /// Watches the folder of each path.
    ///
    /// # Errors
    /// A folder does not exist, or there are too many watches.
    pub(super) fn new<'a>(paths: impl IntoIterator<Item = &'a Path>) -> io::Result<Self> {
        use rustix::fs::inotify;
        let flags = inotify::CreateFlags::CLOEXEC | inotify::CreateFlags::NONBLOCK;
        let watch = Self {
            inotify: inotify::init(flags)?,
        };
        for path in paths {
            let changes = inotify::WatchFlags::CREATE
                | inotify::WatchFlags::DELETE
                | inotify::WatchFlags::MOVE;
            inotify::add_watch(&watch.inotify, parent_of(path), changes)?;
        }
        Ok(watch)
    }

    /// Whether something has changed since the last call.
    pub(super) fn take_changes(&self) -> bool {
        let mut changed = false;
        let mut buffer = [0; 4096];
        while rustix::io::read(&self.inotify, &mut buffer).is_ok_and(|read| read > 0) {
            changed = true;
        }
        changed
    }
}

impl AsFd for FolderWatch {
    fn as_fd(&self) -> std::os::fd::BorrowedFd<'_> {
        self.inotify.as_fd()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::io::{Read, Write};
    use std::os::unix::net::{UnixListener, UnixStream};

    #[test]
    fn publishing_replaces_a_dead_socket_and_removes_only_its_own() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("s");
        drop(UnixListener::bind(&path).unwrap());
        assert!(!is_live(&path));
        let published = Published::at(&path, 0o600).unwrap();
        assert!(is_live(&path));
        assert_eq!(fs::symlink_metadata(&path).unwrap().mode() & 0o777, 0o600);
        assert_eq!(fs::read_dir(folder.path()).unwrap().count(), 1);
        drop(published);
        assert!(!path.exists());

        let published = Published::at(&path, 0o600).unwrap();
        fs::remove_file(&path).unwrap();
        let _other = UnixListener::bind(&path).unwrap();
        drop(published);
        assert!(is_live(&path));
    }

    #[test]
    fn a_handle_reaches_the_socket_whose_name_was_taken() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("s");
        let inner = UnixListener::bind(&path).unwrap();
        let handle = SocketHandle::open(&path).unwrap();
        let _published = Published::at(&path, 0o700).unwrap();
        let mut client = UnixStream::from(connect(&handle.path()).unwrap());
        client.write_all(b"x").unwrap();
        drop(client);
        let mut text = String::new();
        inner.accept().unwrap().0.read_to_string(&mut text).unwrap();
        assert_eq!(text, "x");
    }

    #[test]
    fn siblings_are_sockets_with_a_number() {
        let folder = tempfile::tempdir().unwrap();
        let base = folder.path().join("v.sock");
        let _sockets: Vec<_> = ["v.sock", "v.sock_52", "v.sock_", "v.sock_5x", "w.sock_1"]
            .iter()
            .map(|name| UnixListener::bind(folder.path().join(name)).unwrap())
            .collect();
        fs::write(folder.path().join("v.sock_7"), b"").unwrap();
        assert_eq!(numbered_siblings(&base), [folder.path().join("v.sock_52")]);
    }

    #[test]
    fn a_full_backlog_is_waited_for() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("s");
        let listener = UnixListener::bind(&path).unwrap();
        rustix::net::listen(&listener, 0).unwrap();
        let mut held = Vec::new();
        loop {
            match connect(&path) {
                Ok(connection) => held.push(connection),
                Err(error) => {
                    assert_eq!(error.kind(), io::ErrorKind::WouldBlock);
                    break;
                }
            }
        }
        let mut connecting = Connecting::default();
        connecting.start(4, path.clone());
        assert!(connecting.poll().is_empty());
        assert!(connecting.is_waiting());
        listener.accept().unwrap();
        let ended = connecting.poll();
        assert!(matches!(
            ended.as_slice(),
            [Connected {
                stream: 4,
                result: Ok(_)
            }]
        ));
        connecting.start(6, folder.path().join("none"));
        assert!(matches!(
            connecting.poll().as_slice(),
            [Connected {
                stream: 6,
                result: Err(_)
            }]
        ));
        assert!(!connecting.is_waiting());
    }
}

//! Sockets inside the nested host: those on which commands listen, and those behind which
//! somebody outside does.

use std::collections::BTreeMap;
use std::fs;
use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::ffi::OsStringExt;
use std::os::unix::fs::{FileTypeExt, MetadataExt};
use std::path::{Path, PathBuf};

use rustix::mount::UnmountFlags;

use super::Place;
use crate::lab::sockets::{SocketHandle, listen_at, parent_of};

/// Where sockets are kept whose names are taken by the outside's socket files.
const PRIVATE: &str = "/run/ringside-relay";

/// All listening AF_UNIX sockets with a path, and the number of the newest one of each path.
///
/// # Errors
/// `/proc/net/unix` cannot be read.
pub(super) fn listening_sockets() -> io::Result<BTreeMap<PathBuf, u64>> {
    Ok(parse_proc_net_unix(&fs::read("/proc/net/unix")?))
}

/// `Num RefCount Protocol Flags Type St Inode Path`, as net/unix/af_unix.c prints it.
fn parse_proc_net_unix(table: &[u8]) -> BTreeMap<PathBuf, u64> {
    /// `__SO_ACCEPTCON`, include/linux/net.h.
    const LISTENS: u32 = 1 << 16;
    let mut found = BTreeMap::new();
    for line in table.split(|byte| *byte == b'\n') {
        let mut fields = line.splitn(8, |byte| *byte == b' ');
        let flags = fields
            .nth(3)
            .and_then(|text| std::str::from_utf8(text).ok());
        let listens = flags
            .and_then(|text| u32::from_str_radix(text, 16).ok())
            .is_some_and(|flags| flags & LISTENS != 0);
        // The inode's column is padded with spaces.
        let rest: Vec<u8> = fields.skip(2).collect::<Vec<_>>().join(&b' ');
        let rest = rest.trim_ascii_start();
        let Some(space) = rest.iter().position(|byte| *byte == b' ') else {
            continue;
        };
        let (inode, path) = rest.split_at(space);
        let inode: Option<u64> = std::str::from_utf8(inode)
            .ok()
            .and_then(|text| text.parse().ok());
        if let Some(inode) = inode
            && let Some((_, path)) = path.split_first()
            && listens
        {
            let path = PathBuf::from(std::ffi::OsString::from_vec(path.to_vec()));
            let newest = found.entry(path).or_insert(inode);
            *newest = inode.max(*newest);
        }
    }
    found
}

/// What happened to a watched socket.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Change {
    /// Somebody listens (again).
    Up {
        /// Permission bits of the socket's file.
        mode: u32,
    },
    /// Nobody listens any more.
    Down,
}

/// A path on which a command is to listen.
#[derive(Debug)]
pub(super) struct WatchedSocket {
    path: PathBuf,
    current: Option<(u64, SocketHandle)>,
}

impl WatchedSocket {
    pub(super) fn new(path: PathBuf) -> Self {
        Self {
            path,
            current: None,
        }
    }

    /// Compares with the sockets that listen now.
    pub(super) fn look(&mut self, listening: &BTreeMap<PathBuf, u64>) -> Option<Change> {
        let file = fs::symlink_metadata(&self.path)
            .ok()
            .filter(|metadata| metadata.file_type().is_socket());
        let now = listening.get(&self.path).copied().zip(file);
        match (now, &self.current) {
            (Some((number, _)), Some((known, _))) if number == *known => None,
            (Some((number, metadata)), _) => {
                // The outside takes over the name if the folder is shared, so hold on to the file.
                self.current = Some((number, SocketHandle::open(&self.path).ok()?));
                Some(Change::Up {
                    mode: metadata.mode() & 0o777,
                })
            }
            (None, Some(_)) => {
                self.current = None;
                Some(Change::Down)
            }
            (None, None) => None,
        }
    }

    /// Where to connect to, while somebody listens.
    pub(super) fn target(&self) -> Option<PathBuf> {
        self.current.as_ref().map(|(_, handle)| handle.path())
    }
}

/// Listens inside for a socket that exists outside.
#[derive(Debug)]
pub(super) struct OutwardListener {
    socket: OwnedFd,
    file: PathBuf,
    mounted_on: Option<PathBuf>,
}

impl OutwardListener {
    /// Listens at `path`. Where the outside's socket file is to be seen (a shared folder), that
    /// file stays as it is and ours is mounted over it.
    pub(super) fn at(path: &Path, place: &Place) -> io::Result<Self> {
        match listen_at(path) {
            Ok(socket) => Ok(Self {
                socket,
                file: path.to_owned(),
                mounted_on: None,
            }),
            Err(error) if error.kind() == io::ErrorKind::AddrInUse && *place == Place::Host => {
                fs::create_dir_all(PRIVATE)?;
                let name = fs::symlink_metadata(path)?.ino();
                let file = Path::new(PRIVATE).join(format!("{name}.sock"));
                let socket = listen_at(&file)?;
                let listener = Self {
                    socket,
                    file,
                    mounted_on: Some(path.to_owned()),
                };
                rustix::mount::mount_bind(&listener.file, path)?;
                Ok(listener)
            }
            Err(error) if error.kind() == io::ErrorKind::NotFound => {
                fs::create_dir_all(parent_of(path))?;
                let socket = listen_at(path)?;
                Ok(Self {
                    socket,
                    file: path.to_owned(),
                    mounted_on: None,
                })
            }
            Err(error) => Err(error),
        }
    }

    pub(super) fn socket(&self) -> &OwnedFd {
        &self.socket
    }
}

impl AsFd for OutwardListener {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.socket.as_fd()
    }
}

impl Drop for OutwardListener {
    fn drop(&mut self) {
        // Nothing more can be done about a name that is gone already.
        if let Some(path) = &self.mounted_on {
            let _ = rustix::mount::unmount(path, UnmountFlags::DETACH);
        }
        let _ = fs::remove_file(&self.file);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::unix::net::UnixListener;

    #[test]
    fn the_kernels_table_is_understood() {
        let table = b"Num       RefCount Protocol Flags    Type St Inode Path\n\
            0000000045308c35: 00000002 00000000 00010000 0001 01   403 /tmp/a b.sock\n\
            0000000045308c36: 00000003 00000000 00000000 0001 03   404 /tmp/a b.sock\n\
            0000000045308c37: 00000002 00000000 00010000 0001 01 123456 /tmp/a b.sock\n\
            0000000045308c38: 00000002 00000000 00000000 0001 01   405\n\
            nonsense\n";
        let found = parse_proc_net_unix(table);
        assert_eq!(
            found.into_iter().collect::<Vec<_>>(),
            [(PathBuf::from("/tmp/a b.sock"), 123_456)]
        );
    }

    #[test]
    fn a_watched_socket_comes_changes_and_goes() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("s");
        let mut watched = WatchedSocket::new(path.clone());
        let mut look = || watched.look(&listening_sockets().unwrap());
        assert_eq!(look(), None);
        fs::write(&path, b"no socket").unwrap();
        assert_eq!(look(), None);
        fs::remove_file(&path).unwrap();

        let listener = UnixListener::bind(&path).unwrap();
        assert!(matches!(look(), Some(Change::Up { .. })));
        assert_eq!(look(), None);
        drop(listener);
        assert_eq!(look(), Some(Change::Down));
        assert_eq!(look(), None);
        fs::remove_file(&path).unwrap();
        let _again = UnixListener::bind(&path).unwrap();
        assert!(matches!(look(), Some(Change::Up { .. })));
        fs::remove_file(&path).unwrap();
        assert_eq!(look(), Some(Change::Down));
    }
}

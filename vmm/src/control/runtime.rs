//! Where running guests are found: a folder for each, with its lock, its sockets and its description.
//!
//! The lock is held by the guest's process and let go by the kernel when that ends, however it
//! ends. So a folder whose lock can be had is stale, and the next guest of the name takes it over.

use std::fs::{self, DirBuilder, File, TryLockError};
use std::io;
use std::os::unix::fs::{DirBuilderExt, MetadataExt, PermissionsExt};
use std::path::{Path, PathBuf};
use std::sync::mpsc;
use std::thread;
use std::time::{Instant, SystemTime, UNIX_EPOCH};

use serde::{Deserialize, Serialize};

use crate::config::{Accel, BadInput, GuestName};

const LOCK: &str = "lock";
const DESCRIPTION: &str = "guest.json";

/// Why a guest's folder cannot be made or found.
#[derive(Debug, thiserror::Error)]
pub enum RuntimeError {
    /// The user can put it right.
    #[error(transparent)]
    BadInput(#[from] BadInput),
    /// The operating system refused.
    #[error("cannot {action} {}: {source}", path.display())]
    Io {
        /// What was tried.
        action: &'static str,
        /// The file or folder.
        path: PathBuf,
        /// The operating system's error.
        source: io::Error,
    },
}

impl RuntimeError {
    fn io(action: &'static str, path: &Path) -> impl FnOnce(io::Error) -> Self {
        let path = path.to_owned();
        move |source| RuntimeError::Io {
            action,
            path,
            source,
        }
    }
}

/// A running guest, as others see it.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct GuestFiles {
    /// The guest's name.
    pub name: String,
    /// The process that runs it.
    pub pid: u32,
    /// Seconds since 1970 when it started.
    pub started: u64,
    /// Which KVM runs it.
    pub accel: Accel,
    /// The control socket.
    pub control: PathBuf,
    /// The vsock device's socket, if it has the device.
    pub vsock: Option<PathBuf>,
}

/// The folder of a guest that this process runs. Dropping it removes it.
#[derive(Debug)]
pub struct RuntimeDir {
    path: PathBuf,
    _lock: File,
}

/// `$XDG_RUNTIME_DIR/ringside`, else `/tmp/ringside-UID`.
fn base() -> PathBuf {
    let uid = rustix::process::geteuid().as_raw();
    std::env::var_os("XDG_RUNTIME_DIR")
        .map(PathBuf::from)
        .filter(|folder| folder.is_absolute() && folder.is_dir())
        .map_or_else(
            || PathBuf::from(format!("/tmp/ringside-{uid}")),
            |folder| folder.join("ringside"),
        )
}

/// Makes a folder that only this user may enter, or checks that it is one: in `/tmp` somebody else
/// may have been first.
fn private_folder(path: &Path) -> Result<(), RuntimeError> {
    match DirBuilder::new().mode(0o700).recursive(true).create(path) {
        Err(error) if error.kind() != io::ErrorKind::AlreadyExists => {
            return Err(RuntimeError::io("create", path)(error));
        }
        _ => {}
    }
    let metadata = fs::symlink_metadata(path).map_err(RuntimeError::io("look at", path))?;
    let mine = metadata.uid() == rustix::process::geteuid().as_raw();
    if !metadata.is_dir() || !mine {
        return Err(RuntimeError::io("use", path)(io::Error::other(
            "it belongs to another user, or is not a folder",
        )));
    }
    if metadata.mode() & 0o077 != 0 {
        fs::set_permissions(path, fs::Permissions::from_mode(0o700))
            .map_err(RuntimeError::io("protect", path))?;
    }
    Ok(())
}

fn open_lock(folder: &Path) -> io::Result<File> {
    File::options()
        .create(true)
        .truncate(false)
        .read(true)
        .write(true)
        .open(folder.join(LOCK))
}

impl RuntimeDir {
    /// Takes the name. A stale folder of the name is emptied.
    ///
    /// # Errors
    /// A guest of this name runs, or the folder cannot be made.
    pub fn create(name: &GuestName) -> Result<Self, RuntimeError> {
        Self::create_in(&base(), name)
    }

    fn create_in(base: &Path, name: &GuestName) -> Result<Self, RuntimeError> {
        private_folder(base)?;
        let path = base.join(name.as_str());
        loop {
            private_folder(&path)?;
            let lock = match open_lock(&path) {
                Ok(lock) => lock,
                // Its last guest has just removed it.
                Err(error) if error.kind() == io::ErrorKind::NotFound => continue,
                Err(error) => return Err(RuntimeError::io("open the lock in", &path)(error)),
            };
            match lock.try_lock() {
                Ok(()) => {}
                Err(TryLockError::WouldBlock) => return Err(taken(&path, name).into()),
                Err(TryLockError::Error(error)) => {
                    return Err(RuntimeError::io("lock", &path)(error));
                }
            }
            // The lock is worth nothing if the file was removed between opening and locking it.
            let locked = lock
                .metadata()
                .map_err(RuntimeError::io("look at", &path))?;
            match fs::metadata(path.join(LOCK)) {
                Ok(now) if now.ino() == locked.ino() && now.dev() == locked.dev() => {}
                _ => continue,
            }
            for stale in ["control", "vsock", DESCRIPTION] {
                let _ = fs::remove_file(path.join(stale));
            }
            return Ok(Self { path, _lock: lock });
        }
    }

    /// The folder.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Where the control socket goes unless the user said otherwise.
    pub fn control(&self) -> PathBuf {
        self.path.join("control")
    }

    /// Where the vsock device's socket goes unless the user said otherwise.
    pub fn vsock(&self) -> PathBuf {
        self.path.join("vsock")
    }

    /// Tells others how to reach the guest.
    ///
    /// # Errors
    /// The description cannot be written.
    pub fn describe(
        &self,
        name: &GuestName,
        accel: Accel,
        control: &Path,
        vsock: Option<&Path>,
    ) -> Result<(), RuntimeError> {
        let now = SystemTime::now().duration_since(UNIX_EPOCH);
        let absolute = |path: &Path| std::path::absolute(path).unwrap_or_else(|_| path.to_owned());
        let guest = GuestFiles {
            name: name.to_string(),
            pid: std::process::id(),
            started: now.map_or(0, |now| now.as_secs()),
            accel,
            control: absolute(control),
            vsock: vsock.map(absolute),
        };
        let path = self.path.join(DESCRIPTION);
        let write = || -> io::Result<()> {
            let mut file = tempfile::NamedTempFile::new_in(&self.path)?;
            serde_json::to_writer(&mut file, &guest)?;
            file.persist(&path)?;
            Ok(())
        };
        write().map_err(RuntimeError::io("write", &path))
    }
}

impl Drop for RuntimeDir {
    fn drop(&mut self) {
        // While the lock is held, so that nobody's new folder goes.
        let _ = fs::remove_dir_all(&self.path);
    }
}

fn taken(folder: &Path, name: &GuestName) -> BadInput {
    let pid =
        description(folder).map_or(String::new(), |guest| format!(" (process {})", guest.pid));
    BadInput::new(
        format!("--name {name}"),
        format!("a guest of this name runs{pid}: choose another, or `ringside stop {name}` first"),
    )
}

fn description(folder: &Path) -> Option<GuestFiles> {
    let text = fs::read(folder.join(DESCRIPTION)).ok()?;
    serde_json::from_slice(&text).ok()
}

/// Whether the guest's process is there. Takes no lock that a starting guest could meet for longer
/// than an instant; [`RuntimeDir::create`] would then say that the name is taken.
fn alive(folder: &Path) -> bool {
    File::open(folder.join(LOCK))
        .is_ok_and(|lock| matches!(lock.try_lock_shared(), Err(TryLockError::WouldBlock)))
}

/// The guests that run, by name.
///
/// # Errors
/// The folder of all guests cannot be read.
pub fn list() -> Result<Vec<GuestFiles>, RuntimeError> {
    list_in(&base())
}

fn list_in(base: &Path) -> Result<Vec<GuestFiles>, RuntimeError> {
    let entries = match fs::read_dir(base) {
        Ok(entries) => entries,
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(Vec::new()),
        Err(error) => return Err(RuntimeError::io("read", base)(error)),
    };
    let mut guests: Vec<_> = entries
        .flatten()
        .map(|entry| entry.path())
        .filter(|folder| alive(folder))
        .filter_map(|folder| description(&folder))
        .collect();
    guests.sort_by(|a, b| a.name.cmp(&b.name));
    Ok(guests)
}

/// The guest of this name.
///
/// # Errors
/// There is none; the message names those that there are.
pub fn find(name: &str) -> Result<GuestFiles, RuntimeError> {
    find_in(&base(), name)
}

fn find_in(base: &Path, name: &str) -> Result<GuestFiles, RuntimeError> {
    let mut guests = list_in(base)?;
    if let Some(at) = guests.iter().position(|guest| guest.name == name) {
        return Ok(guests.swap_remove(at));
    }
    let names: Vec<_> = guests.into_iter().map(|guest| guest.name).collect();
    let problem = match names.as_slice() {
        [] => "no such guest: none runs, start one with `ringside run --name`".to_owned(),
        names => format!("no such guest: those that run are {}", names.join(", ")),
    };
    Err(BadInput::new(name, problem).into())
}

/// Waits until the guest's process has ended; false if it still runs at the deadline.
///
/// # Errors
/// Its lock cannot be waited for.
pub fn wait_for_end(guest: &GuestFiles, deadline: Instant) -> Result<bool, RuntimeError> {
    wait_in(&base(), guest, deadline)
}

fn wait_in(base: &Path, guest: &GuestFiles, deadline: Instant) -> Result<bool, RuntimeError> {
    let folder = base.join(&guest.name);
    let lock = match File::open(folder.join(LOCK)) {
        Ok(lock) => lock,
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(true),
        Err(error) => return Err(RuntimeError::io("open the lock in", &folder)(error)),
    };
    let (sender, ended) = mpsc::channel();
    // If the deadline comes first the thread waits on until the guest ends; it holds nothing else.
    thread::spawn(move || {
        let result = lock.lock_shared();
        drop(lock);
        let _ = sender.send(result);
    });
    let patience = deadline.saturating_duration_since(Instant::now());
    match ended.recv_timeout(patience) {
        Ok(Ok(())) => Ok(true),
        Ok(Err(error)) => Err(RuntimeError::io("wait for the lock in", &folder)(error)),
        Err(_) => Ok(false),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn name(text: &str) -> GuestName {
        text.parse().unwrap()
    }

    #[test]
    fn a_name_is_taken_until_its_guest_is_gone() {
        let temp = tempfile::tempdir().unwrap();
        let base = temp.path().join("ringside");
        let first = RuntimeDir::create_in(&base, &name("a")).unwrap();
        first
            .describe(&name("a"), Accel::Kvm, &first.control(), None)
            .unwrap();
        assert_eq!(fs::metadata(&base).unwrap().mode() & 0o777, 0o700);
        assert_eq!(fs::metadata(first.path()).unwrap().mode() & 0o777, 0o700);
        let error = RuntimeDir::create_in(&base, &name("a")).unwrap_err();
        let pid = std::process::id();
        assert_eq!(
            error.to_string(),
            format!(
                "--name a: a guest of this name runs (process {pid}): choose another, or \
                 `ringside stop a` first"
            )
        );
        RuntimeDir::create_in(&base, &name("b")).unwrap();
        drop(first);
        assert!(!base.join("a").exists());
        RuntimeDir::create_in(&base, &name("a")).unwrap();
    }

    #[test]
    fn what_a_dead_guest_left_is_taken_over() {
        let temp = tempfile::tempdir().unwrap();
        let stale = temp.path().join("a");
        fs::create_dir(&stale).unwrap();
        for file in [LOCK, "control", "vsock", DESCRIPTION] {
            fs::write(stale.join(file), "").unwrap();
        }
        assert_eq!(list_in(temp.path()).unwrap(), []);
        let guest = RuntimeDir::create_in(temp.path(), &name("a")).unwrap();
        let left: Vec<_> = fs::read_dir(guest.path()).unwrap().flatten().collect();
        assert_eq!(left.len(), 1, "only the lock is left: {left:?}");
    }

    #[test]
    fn running_guests_are_found() {
        let temp = tempfile::tempdir().unwrap();
        let missing = find_in(temp.path(), "a").unwrap_err().to_string();
        assert_eq!(
            missing,
            "a: no such guest: none runs, start one with `ringside run --name`"
        );
        let guest = RuntimeDir::create_in(temp.path(), &name("b")).unwrap();
        let vsock = guest.vsock();
        guest
            .describe(&name("b"), Accel::Nested, &guest.control(), Some(&vsock))
            .unwrap();
        let found = find_in(temp.path(), "b").unwrap();
        assert_eq!(
            (found.pid, found.accel),
            (std::process::id(), Accel::Nested)
        );
        assert_eq!(found.vsock, Some(vsock));
        let missing = find_in(temp.path(), "a").unwrap_err().to_string();
        assert_eq!(missing, "a: no such guest: those that run are b");
    }

    #[test]
    fn the_end_of_a_guest_is_waited_for() {
        let temp = tempfile::tempdir().unwrap();
        let running = RuntimeDir::create_in(temp.path(), &name("a")).unwrap();
        running
            .describe(&name("a"), Accel::Kvm, &running.control(), None)
            .unwrap();
        let guest = find_in(temp.path(), "a").unwrap();
        assert!(!wait_in(temp.path(), &guest, Instant::now()).unwrap());
        let far = Instant::now() + std::time::Duration::from_secs(60);
        thread::scope(|scope| {
            let waiter = scope.spawn(|| wait_in(temp.path(), &guest, far).unwrap());
            drop(running);
            assert!(waiter.join().unwrap());
        });
    }

    #[test]
    fn a_folder_that_is_open_to_others_is_closed() {
        let temp = tempfile::tempdir().unwrap();
        let base = temp.path().join("open");
        fs::create_dir(&base).unwrap();
        fs::set_permissions(&base, fs::Permissions::from_mode(0o777)).unwrap();
        RuntimeDir::create_in(&base, &name("a")).unwrap();
        assert_eq!(fs::metadata(&base).unwrap().mode() & 0o777, 0o700);
        let link = temp.path().join("link");
        std::os::unix::fs::symlink(&base, &link).unwrap();
        assert!(RuntimeDir::create_in(&link, &name("a")).is_err());
    }
}

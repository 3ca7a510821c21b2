//! The cache folder, its locks and atomic builds.

use std::env;
use std::ffi::OsString;
use std::fs::{self, File};
use std::path::{Path, PathBuf};
use std::time::{Duration, SystemTime};

use crate::{Error, Result};

/// The folder under which Ringside keeps packages and images.
///
/// Everything in it can be deleted at any time while no ringside runs: it is fetched and built
/// again when it is needed.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct CacheDir {
    root: PathBuf,
}

impl CacheDir {
    /// Uses `root`, which need not exist yet.
    pub fn at(root: impl Into<PathBuf>) -> Self {
        Self { root: root.into() }
    }

    /// Finds the folder: `RINGSIDE_CACHE`, else `$XDG_CACHE_HOME/ringside`, else
    /// `~/.cache/ringside`.
    ///
    /// # Errors
    /// [`Error::NoCacheDir`] when none of the variables is set.
    pub fn discover() -> Result<Self> {
        Self::from_env(|name| env::var_os(name).filter(|value| !value.is_empty()))
    }

    fn from_env(var: impl Fn(&str) -> Option<OsString>) -> Result<Self> {
        if let Some(root) = var("RINGSIDE_CACHE") {
            return Ok(Self::at(root));
        }
        // The XDG base directory specification says that a relative path is to be ignored.
        let xdg = var("XDG_CACHE_HOME")
            .map(PathBuf::from)
            .filter(|path| path.is_absolute());
        let base = match xdg {
            Some(base) => base,
            None => PathBuf::from(var("HOME").ok_or(Error::NoCacheDir)?).join(".cache"),
        };
        Ok(Self::at(base.join("ringside")))
    }

    /// The folder itself.
    pub fn root(&self) -> &Path {
        &self.root
    }

    /// Makes sure that the folder `name` exists below the root and returns its path.
    ///
    /// # Errors
    /// [`Error::Io`] when it cannot be created.
    pub fn dir(&self, name: &str) -> Result<PathBuf> {
        let path = self.root.join(name);
        fs::create_dir_all(&path).map_err(Error::io("create", &path))?;
        Ok(path)
    }

    /// Takes the lock `name`, waiting for another process (or thread) that holds it. It is
    /// released when the guard is dropped, and by the kernel if the process dies.
    ///
    /// # Errors
    /// [`Error::Io`] when the lock file cannot be opened or locked.
    pub fn lock(&self, name: &str) -> Result<CacheLock> {
        let path = self.dir("locks")?.join(name);
        let file = File::options()
            .create(true)
            .truncate(false)
            .write(true)
            .open(&path)
            .map_err(Error::io("open", &path))?;
        file.lock().map_err(Error::io("lock", &path))?;
        Ok(CacheLock { _file: file })
    }

    /// Makes a new temporary folder inside the cache, so that a rename can publish it. It is
    /// deleted when it is dropped; what a killed process left behind is deleted a day later.
    ///
    /// # Errors
    /// [`Error::Io`] when it cannot be created.
    pub fn temp_dir(&self) -> Result<tempfile::TempDir> {
        let parent = self.dir("tmp")?;
        remove_leftovers(&parent, SystemTime::now());
        tempfile::Builder::new()
            .prefix("build-")
            .tempdir_in(&parent)
            .map_err(Error::io("create a temporary folder in", &parent))
    }
}

/// Deletes temporary folders that are too old to be in use.
fn remove_leftovers(parent: &Path, now: SystemTime) {
    for entry in fs::read_dir(parent).into_iter().flatten().flatten() {
        let modified = entry.metadata().and_then(|data| data.modified());
        let age = modified
            .ok()
            .and_then(|modified| now.duration_since(modified).ok());
        if age.is_some_and(|age| age > LEFTOVER_AGE) {
            // What cannot be deleted only takes space.
            let _ = fs::remove_dir_all(entry.path());
        }
    }
}

/// A temporary folder that nobody touched for so long is nobody's.
const LEFTOVER_AGE: Duration = Duration::from_hours(24);

/// A lock that is held until this guard is dropped.
#[derive(Debug)]
pub struct CacheLock {
    _file: File,
}

/// Writes a file so that others see the old content or the new, never a part.
pub(crate) fn write_atomically(path: &Path, content: &[u8]) -> Result<()> {
    let parent = path.parent().unwrap_or(Path::new("."));
    let mut file =
        tempfile::NamedTempFile::new_in(parent).map_err(Error::io("create a file in", parent))?;
    std::io::Write::write_all(&mut file, content).map_err(Error::io("write", path))?;
    file.persist(path)
        .map_err(|error| Error::io("write", path)(error.error))?;
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn found(vars: &[(&str, &str)]) -> Option<PathBuf> {
        CacheDir::from_env(|name| {
            let (_, value) = vars.iter().find(|(key, _)| *key == name)?;
            Some(OsString::from(value))
        })
        .ok()
        .map(|cache| cache.root)
    }

    #[test]
    fn own_variable_wins_then_xdg_then_home() {
        let home = ("HOME", "/h");
        let xdg = ("XDG_CACHE_HOME", "/x");
        assert_eq!(
            found(&[home, xdg, ("RINGSIDE_CACHE", "/r")]),
            Some("/r".into())
        );
        assert_eq!(found(&[home, xdg]), Some("/x/ringside".into()));
        assert_eq!(
            found(&[home, ("XDG_CACHE_HOME", "rel")]),
            Some("/h/.cache/ringside".into())
        );
        assert_eq!(found(&[home]), Some("/h/.cache/ringside".into()));
        assert_eq!(found(&[]), None);
    }

    #[test]
    fn a_lock_excludes_until_it_is_dropped() {
        let temp = tempfile::tempdir().unwrap();
        let cache = CacheDir::at(temp.path());
        let held = cache.lock("x").unwrap();
        let other = File::options()
            .write(true)
            .open(temp.path().join("locks/x"))
            .unwrap();
        assert!(matches!(
            other.try_lock(),
            Err(fs::TryLockError::WouldBlock)
        ));
        drop(held);
        other.try_lock().unwrap();
    }

    #[test]
    fn temporary_folders_go_at_once_or_a_day_later() {
        let temp = tempfile::tempdir().unwrap();
        let cache = CacheDir::at(temp.path());
        let in_use = cache.temp_dir().unwrap();
        let left = cache.temp_dir().unwrap().keep();
        let parent = temp.path().join("tmp");
        remove_leftovers(&parent, SystemTime::now());
        assert!(left.exists() && in_use.path().exists());
        remove_leftovers(&parent, SystemTime::now() + LEFTOVER_AGE * 2);
        assert!(!left.exists());
    }
}

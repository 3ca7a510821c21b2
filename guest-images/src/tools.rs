//! Programs of the distribution's packages for use on the host: network set-up and load, for hosts
//! that have them not, or in older versions.

use std::ffi::OsString;
use std::fs;
use std::path::{Path, PathBuf};

use sha2::{Digest, Sha256};

use crate::apt::{self, Apt, Freshness, Suite};
use crate::{CacheDir, Error, Progress, Result};

/// A folder with `ip`, `iperf3` and `ping`, and the libraries that they need.
#[derive(Debug)]
pub struct HostTools {
    root: PathBuf,
}

impl HostTools {
    /// Fetches and unpacks the packages, unless the cache has them.
    ///
    /// # Errors
    /// The packages cannot be had or unpacked, or the cache cannot be written.
    pub fn prepare(cache: &CacheDir, progress: &dyn Progress) -> Result<Self> {
        let _lock = cache.lock("host-tools")?;
        let debs = Apt::new(cache).suite(Suite::Trixie).fetch_closure(
            &["iperf3", "iproute2", "iputils-ping"],
            Freshness::Cached,
            progress,
        )?;
        // Another version of a package, or another package, is another folder.
        let mut sums: Vec<&str> = debs.iter().map(|deb| deb.sha256.as_str()).collect();
        sums.sort_unstable();
        let sum = Sha256::digest(sums.concat());
        let name: String = sum.iter().map(|byte| format!("{byte:02x}")).collect();
        let root = cache.dir("host-tools")?.join(name);
        if !root.is_dir() {
            progress.step("unpacking network tools");
            let temp = cache.temp_dir()?;
            let unpacked = temp.path().join("root");
            for deb in &debs {
                apt::unpack(deb, &unpacked)?;
            }
            fs::rename(&unpacked, &root).map_err(Error::io("publish", &root))?;
            progress.done();
        }
        Ok(Self { root })
    }

    /// Those in `folder`, which another process has prepared.
    pub fn at(folder: &Path) -> Self {
        Self {
            root: folder.to_owned(),
        }
    }

    /// The folder.
    pub fn root(&self) -> &Path {
        &self.root
    }

    /// The first words of a command line that runs `name` with its own loader and libraries: those
    /// of the host may be older. `None` if the packages have no such program.
    pub fn command(&self, name: &str) -> Option<Vec<OsString>> {
        let libraries = self.root.join("usr/lib/x86_64-linux-gnu");
        let program = ["usr/bin", "usr/sbin", "bin", "sbin"]
            .into_iter()
            .map(|folder| self.root.join(folder).join(name))
            .find(|path| path.is_file())?;
        Some(vec![
            libraries.join("ld-linux-x86-64.so.2").into(),
            "--inhibit-cache".into(),
            "--library-path".into(),
            libraries.into(),
            program.into(),
        ])
    }
}

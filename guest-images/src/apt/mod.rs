//! Debian packages through a private apt configuration.
//!
//! apt itself does the work that has to be right: it checks the archive's signatures and every
//! package's hash, and it resolves dependencies. Everything that it writes (sources, lists,
//! cache, dpkg status) lies under Ringside's cache folder, so no root is needed and the machine's
//! own apt state does not change. The archive's address is taken at run time from the machine's
//! configuration (`archive.rs`), as are proxy settings and the like.
//!
//! What was fetched is remembered in a manifest for each request, so that a second request needs
//! no network.

mod archive;
pub(crate) mod run;

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use serde::{Deserialize, Serialize};
use sha2::{Digest, Sha256};

use crate::cache::write_atomically;
use crate::{CacheDir, Error, Progress, Result};

/// A suite of the Debian archive.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Suite {
    /// Debian 12.
    Bookworm,
    /// Newer packages for Debian 12.
    BookwormBackports,
    /// Debian 13.
    Trixie,
    /// Newer packages for Debian 13.
    TrixieBackports,
}

impl Suite {
    /// The suite's name in the archive.
    pub const fn name(self) -> &'static str {
        match self {
            Self::Bookworm => "bookworm",
            Self::BookwormBackports => "bookworm-backports",
            Self::Trixie => "trixie",
            Self::TrixieBackports => "trixie-backports",
        }
    }

    /// The suites that apt reads: a backports suite is not complete without its base.
    const fn sources(self) -> &'static str {
        match self {
            Self::Bookworm => "bookworm",
            Self::BookwormBackports => "bookworm bookworm-backports",
            Self::Trixie => "trixie",
            Self::TrixieBackports => "trixie trixie-backports",
        }
    }
}

/// A package file in the cache.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Deb {
    /// Package name.
    pub name: String,
    /// Debian version.
    pub version: String,
    /// SHA-256 of the file, in lower-case hexadecimal, as the signed package list has it.
    pub sha256: String,
    /// The file.
    pub path: PathBuf,
}

/// Whether a request may be answered from the cache.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Freshness {
    /// What an earlier request fetched is good enough.
    Cached,
    /// Ask the archive for the newest versions.
    Refresh,
}

/// The private apt configurations, one for each suite.
#[derive(Debug, Clone)]
pub struct Apt {
    cache: CacheDir,
}

impl Apt {
    /// Uses `cache`. Nothing is created or contacted before the first request.
    pub fn new(cache: &CacheDir) -> Self {
        Self {
            cache: cache.clone(),
        }
    }

    /// The packages of one suite.
    pub fn suite(&self, suite: Suite) -> AptSuite {
        AptSuite {
            cache: self.cache.clone(),
            suite,
        }
    }
}

/// The packages of one suite.
#[derive(Debug, Clone)]
pub struct AptSuite {
    cache: CacheDir,
    suite: Suite,
}

/// How a request is answered.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Request {
    Exact,
    Closure,
}

impl AptSuite {
    /// Fetches exactly the named packages, in the order of the request.
    ///
    /// # Errors
    /// apt is missing, the archive is not reachable, the suite has no such package, or the cache
    /// cannot be written.
    pub fn fetch(
        &self,
        packages: &[&str],
        freshness: Freshness,
        progress: &dyn Progress,
    ) -> Result<Vec<Deb>> {
        let mut debs = self.request(Request::Exact, packages, freshness, progress)?;
        debs.sort_by_key(|deb| packages.iter().position(|name| *name == deb.name));
        Ok(debs)
    }

    /// Fetches the named packages and everything that they need (`Depends` and `Pre-Depends`, not
    /// `Recommends`), in apt's order.
    ///
    /// # Errors
    /// As [`AptSuite::fetch`].
    pub fn fetch_closure(
        &self,
        packages: &[&str],
        freshness: Freshness,
        progress: &dyn Progress,
    ) -> Result<Vec<Deb>> {
        self.request(Request::Closure, packages, freshness, progress)
    }

    fn request(
        &self,
        request: Request,
        packages: &[&str],
        freshness: Freshness,
        progress: &dyn Progress,
    ) -> Result<Vec<Deb>> {
        for package in packages {
            check_name(package)?;
        }
        let suite = self.suite.name();
        let _lock = self.cache.lock(&format!("apt-{suite}"))?;
        let home = self.cache.dir(&format!("apt/{suite}"))?;
        let manifest = home
            .join("manifests")
            .join(manifest_name(request, packages));
        if freshness == Freshness::Cached
            && let Some(debs) = read_manifest(&manifest)
        {
            return Ok(debs);
        }

        let private = run::PrivateApt::prepare(&home, self.suite)?;
        let updated_now = private.update_lists(freshness, progress)?;
        let debs = match private.download(request, packages, progress) {
            // Old lists name versions that the archive has since replaced.
            Err(Error::ToolFailed { .. } | Error::PackageNotFound { .. }) if !updated_now => {
                private.update_lists(Freshness::Refresh, progress)?;
                private.download(request, packages, progress)?
            }
            result => result?,
        };
        write_manifest(&manifest, &debs)?;
        Ok(debs)
    }
}

/// Unpacks the files of a package below `dir` (created if needed), without running its scripts
/// and without root: every file then belongs to the user.
///
/// # Errors
/// `dpkg-deb` is missing or fails.
pub fn unpack(deb: &Deb, dir: &Path) -> Result<()> {
    let mut command = Command::new("dpkg-deb");
    command.arg("--extract").arg(&deb.path).arg(dir);
    run::run("dpkg-deb", "dpkg", &mut command).map(|_| ())
}

/// Package names as Debian policy section 5.6.7 allows them; this also keeps options away from
/// apt's command line.
fn check_name(package: &str) -> Result<()> {
    let allowed = |c: char| c.is_ascii_lowercase() || c.is_ascii_digit() || "+-.".contains(c);
    if package.starts_with(|c: char| c.is_ascii_alphanumeric()) && package.chars().all(allowed) {
        Ok(())
    } else {
        Err(Error::malformed(
            format!("package name `{package}`"),
            "only lower-case letters, digits and +-. are allowed",
        ))
    }
}

fn manifest_name(request: Request, packages: &[&str]) -> String {
    let kind = match request {
        Request::Exact => "exact",
        Request::Closure => "closure",
    };
    let hash = Sha256::digest(packages.join(" "));
    let hex: String = hash
        .iter()
        .take(8)
        .map(|byte| format!("{byte:02x}"))
        .collect();
    format!("{kind}-{hex}.json")
}

/// The packages of an earlier, identical request, if all of them are still there.
fn read_manifest(path: &Path) -> Option<Vec<Deb>> {
    let debs: Vec<Deb> = serde_json::from_slice(&fs::read(path).ok()?).ok()?;
    debs.iter().all(|deb| deb.path.is_file()).then_some(debs)
}

fn write_manifest(path: &Path, debs: &[Deb]) -> Result<()> {
    let parent = path.parent().unwrap_or(path);
    fs::create_dir_all(parent).map_err(Error::io("create", parent))?;
    let json = serde_json::to_vec_pretty(debs)
        .map_err(|error| Error::malformed("package manifest", error.to_string()))?;
    write_atomically(path, &json)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::progress::Silent;

    #[test]
    fn package_names_are_checked() {
        for good in ["fio", "libstdc++6", "linux-image-6.12.1-amd64", "0ad"] {
            assert!(check_name(good).is_ok(), "{good}");
        }
        for bad in ["", "-o", "--help", "a b", "a/b", "A", "fio=1", "fio;x"] {
            assert!(check_name(bad).is_err(), "{bad}");
        }
    }

    #[test]
    fn a_cached_request_needs_no_apt_and_a_missing_file_spoils_it() {
        let temp = tempfile::tempdir().unwrap();
        let cache = CacheDir::at(temp.path());
        let suite = Apt::new(&cache).suite(Suite::Trixie);
        let home = cache.dir("apt/trixie").unwrap();
        let path = home.join("fio_1_amd64.deb");
        fs::write(&path, b"x").unwrap();
        let deb = Deb {
            name: "fio".into(),
            version: "1".into(),
            sha256: "00".into(),
            path: path.clone(),
        };
        let manifest = home
            .join("manifests")
            .join(manifest_name(Request::Exact, &["fio"]));
        write_manifest(&manifest, std::slice::from_ref(&deb)).unwrap();
        let fetched = suite.fetch(&["fio"], Freshness::Cached, &Silent).unwrap();
        assert_eq!(fetched, [deb]);
        fs::remove_file(&path).unwrap();
        assert_eq!(read_manifest(&manifest), None);
    }

    #[test]
    fn manifests_differ_by_kind_and_list() {
        let a = manifest_name(Request::Exact, &["fio", "busybox"]);
        assert_ne!(a, manifest_name(Request::Closure, &["fio", "busybox"]));
        assert_ne!(a, manifest_name(Request::Exact, &["fio"]));
        assert_eq!(a, manifest_name(Request::Exact, &["fio", "busybox"]));
    }
}

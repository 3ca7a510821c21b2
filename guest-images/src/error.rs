//! What can go wrong while packages are fetched and images are built.

use std::io;
use std::path::{Path, PathBuf};

/// The result of an operation on packages, images or the cache.
pub type Result<T> = std::result::Result<T, Error>;

/// Why a package or an image could not be had. Every message is one line that says what to do.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// A program of the host is not installed.
    #[error("`{tool}` is not installed: it is part of the package `{package}`")]
    ToolMissing {
        /// The program's name.
        tool: &'static str,
        /// The Debian package that has it.
        package: &'static str,
    },
    /// The machine's apt configuration lists no Debian archive.
    #[error(
        "apt's configuration ({searched}) lists no Debian archive with the component `main`: \
         add one, images are made from its packages"
    )]
    NoArchive {
        /// The configuration files and folders that were read.
        searched: String,
    },
    /// The package lists of a suite could not be fetched.
    #[error("cannot fetch the package lists of {suite} (is the archive reachable?): {detail}")]
    ArchiveUnreachable {
        /// The suite, for example `trixie`.
        suite: &'static str,
        /// What apt said, on one line.
        detail: String,
    },
    /// A suite has no such package.
    #[error("{suite} has no package `{package}`")]
    PackageNotFound {
        /// The suite that was asked.
        suite: &'static str,
        /// The package that was asked for.
        package: String,
    },
    /// A program of the host failed.
    #[error("`{tool}` failed: {detail}")]
    ToolFailed {
        /// The program and its subcommand.
        tool: String,
        /// What it printed to its standard error, on one line.
        detail: String,
    },
    /// A package, a kernel or a file of the cache is not what it should be.
    #[error("{what}: {problem}")]
    Malformed {
        /// The file or package.
        what: String,
        /// What is wrong with it.
        problem: String,
    },
    /// Neither `RINGSIDE_CACHE` nor `XDG_CACHE_HOME` nor `HOME` says where the cache is.
    #[error("no cache folder: set RINGSIDE_CACHE (or HOME)")]
    NoCacheDir,
    /// A release name that Ringside does not know.
    #[error("unknown release `{0}`: use debian-12 or debian-13")]
    UnknownRelease(String),
    /// A file operation failed.
    #[error("cannot {action} {}: {source}", path.display())]
    Io {
        /// What was tried: "read", "create", ...
        action: &'static str,
        /// The file or folder.
        path: PathBuf,
        /// The operating system's error.
        source: io::Error,
    },
}

impl Error {
    /// Makes a closure for `map_err` that names the operation and the file.
    pub(crate) fn io(action: &'static str, path: &Path) -> impl FnOnce(io::Error) -> Self {
        let path = path.to_owned();
        move |source| Self::Io {
            action,
            path,
            source,
        }
    }

    pub(crate) fn malformed(what: impl Into<String>, problem: impl Into<String>) -> Self {
        Self::Malformed {
            what: what.into(),
            problem: problem.into(),
        }
    }
}

//! The rest of the host: what Ringside uses beside KVM.

use std::fs::{self, OpenOptions};
use std::path::Path;
use std::process::{Command, Stdio};

use guest_images::CacheDir;
use io_uring::IoUring;
use serde::Serialize;

/// How much a finding matters.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "kebab-case")]
pub enum State {
    /// Usable.
    Ok,
    /// Something that not everybody needs is missing.
    Limited,
    /// Something that most uses need is missing.
    Missing,
}

/// One finding.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct HostCheck {
    /// What was looked at.
    pub name: &'static str,
    /// How much it matters.
    pub state: State,
    /// What was found, and what would help.
    pub detail: String,
}

/// The image, a nested host and their packages need about this much, in bytes.
const DISK_SPACE: u64 = 2 << 30;

/// Looks at the host. Nothing stays changed.
pub fn host_checks() -> Vec<HostCheck> {
    [io_uring, tap, namespaces, packages, disk_space, hugepages]
        .map(|check| check())
        .to_vec()
}

fn io_uring() -> HostCheck {
    let (state, detail) = match IoUring::new(2) {
        Ok(_) => (State::Ok, "works".to_owned()),
        Err(error) => (
            State::Missing,
            format!("refused ({error}): disks on files need it; see kernel.io_uring_disabled"),
        ),
    };
    HostCheck {
        name: "io_uring",
        state,
        detail,
    }
}

fn tap() -> HostCheck {
    let opened = OpenOptions::new()
        .read(true)
        .write(true)
        .open("/dev/net/tun");
    let (state, detail) = match opened {
        Ok(_) => (State::Ok, "/dev/net/tun can be opened".to_owned()),
        Err(error) => (
            State::Limited,
            format!("/dev/net/tun cannot be opened ({error}): --net tap= needs it"),
        ),
    };
    HostCheck {
        name: "tap",
        state,
        detail,
    }
}

/// `ringside demo` puts its tap interface into a network namespace of its own.
fn namespaces() -> HostCheck {
    let made = Command::new("unshare")
        .args(["--user", "--map-root-user", "--net", "true"])
        .stdin(Stdio::null())
        .stdout(Stdio::null())
        .stderr(Stdio::null())
        .status();
    let (state, detail) = match made {
        Ok(status) if status.success() => (State::Ok, "can be made by this user".to_owned()),
        _ => (
            State::Limited,
            "this user cannot make them: `ringside demo` on the host's KVM needs them".to_owned(),
        ),
    };
    HostCheck {
        name: "user and network namespaces",
        state,
        detail,
    }
}

fn packages() -> HostCheck {
    let missing: Vec<_> = ["apt-get", "apt-cache", "dpkg-deb"]
        .into_iter()
        .filter(|tool| !on_path(tool))
        .collect();
    let (state, detail) = if missing.is_empty() {
        (State::Ok, "apt-get and dpkg-deb are there".to_owned())
    } else {
        (
            State::Missing,
            format!(
                "no {}: images and the nested host are made from Debian's packages",
                missing.join(", ")
            ),
        )
    };
    HostCheck {
        name: "packages",
        state,
        detail,
    }
}

fn on_path(tool: &str) -> bool {
    std::env::var_os("PATH")
        .is_some_and(|path| std::env::split_paths(&path).any(|folder| folder.join(tool).is_file()))
}

fn disk_space() -> HostCheck {
    let found = CacheDir::discover().map_err(|error| error.to_string());
    let (state, detail) = match found.and_then(|cache| free_bytes(cache.root())) {
        Ok((folder, free)) => {
            let mib = free >> 20;
            if free < DISK_SPACE {
                let detail = format!("{mib} MiB free at {folder}: 2 GiB are needed");
                (State::Missing, detail)
            } else {
                (State::Ok, format!("{mib} MiB free at {folder}"))
            }
        }
        Err(problem) => (State::Missing, problem),
    };
    HostCheck {
        name: "disk space",
        state,
        detail,
    }
}

/// Free space where `folder` is or would be.
fn free_bytes(folder: &Path) -> Result<(String, u64), String> {
    let existing = folder
        .ancestors()
        .find(|ancestor| ancestor.exists())
        .unwrap_or(Path::new("/"));
    let stat = rustix::fs::statvfs(existing)
        .map_err(|error| format!("cannot look at {}: {error}", existing.display()))?;
    let free = stat.f_bavail.saturating_mul(stat.f_frsize);
    Ok((existing.display().to_string(), free))
}

fn hugepages() -> HostCheck {
    let read = |file: &str| {
        let text = fs::read_to_string(format!("/sys/kernel/mm/{file}")).ok()?;
        Some(text.trim().to_owned())
    };
    let transparent = read("transparent_hugepage/enabled")
        .and_then(|text| Some(text.split_once('[')?.1.split_once(']')?.0.to_owned()));
    let reserved = read("hugepages/hugepages-2048kB/nr_hugepages").unwrap_or_else(|| "0".into());
    let (state, transparent) = match transparent.as_deref() {
        Some("never") | None => (State::Limited, "off".to_owned()),
        Some(setting) => (State::Ok, setting.to_owned()),
    };
    HostCheck {
        name: "huge pages",
        state,
        detail: format!("transparent: {transparent}; reserved 2 MiB pages: {reserved}"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_check_ends_with_a_line() {
        for check in host_checks() {
            assert!(!check.detail.is_empty(), "{check:?}");
            assert!(!check.detail.contains('\n'), "{check:?}");
        }
    }

    #[test]
    fn free_space_is_that_of_the_folder_or_of_its_parent() {
        let folder = tempfile::tempdir().unwrap();
        let (at, free) = free_bytes(&folder.path().join("not/there/yet")).unwrap();
        assert_eq!(at, folder.path().display().to_string());
        assert!(free > 0);
    }
}

//! Puts programs and the libraries that they need into an image.

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use super::cpio::Tree;
use super::dpdk;
use super::elf::{Elf, Symbol};
use super::stub;
use crate::apt::run;
use crate::{Error, Result};

/// The packages, and the programs that are taken from each.
const PROGRAMS: [(&str, &[&str]); 10] = [
    ("bash", &["bash"]),
    ("busybox-static", &["busybox"]),
    ("dash", &["dash"]),
    ("e2fsprogs", &["mke2fs"]),
    ("ethtool", &["ethtool"]),
    ("fio", &["fio"]),
    ("iperf3", &["iperf3"]),
    ("iproute2", &["bridge", "ip", "ss", "tc"]),
    ("nvme-cli", &["nvme"]),
    ("pciutils", &["lspci", "setpci"]),
];

/// Libraries of fio's engines for services that a guest of ours does not have; see `stub.rs`.
const LEFT_OUT: [&str; 9] = [
    "libgfapi",
    "libibverbs",
    "libnbd",
    "libnfs",
    "libpmem",
    "libpmemblk",
    "librados",
    "librbd",
    "librdmacm",
];

/// Libraries that no program names, because glibc loads them when they are needed: it aborts a
/// program that cancels a thread (iperf3 at the end of each run) without the first.
const LOADED_LATER: [&str; 1] = ["libgcc_s.so.1"];

/// Where the loader looks without a cache (Debian's glibc).
pub(super) const LIBRARY_DIR: &str = "usr/lib/x86_64-linux-gnu";

/// The packages that hold the programs.
pub(super) fn packages() -> Vec<&'static str> {
    PROGRAMS.iter().map(|(package, _)| *package).collect()
}

/// Whether a package of the closure has anything that an image could need.
pub(super) fn is_useful(package: &str) -> bool {
    package.starts_with("lib") && !package.ends_with("-dev")
        || package == "ibverbs-providers"
        || package == "zlib1g"
        || PROGRAMS.iter().any(|(name, _)| *name == package)
}

/// Puts the programs into `tree`, from packages that were unpacked below `root`.
pub(super) fn add(tree: &mut Tree, root: &Path, with_dpdk: bool) -> Result<()> {
    let mut adder = Adder {
        tree,
        libraries: find_libraries(root)?,
        done: BTreeSet::new(),
        left_out: &[],
    };
    if with_dpdk {
        // First: it needs the real ones of some libraries for which fio gets stand-ins.
        adder.add_program(root, dpdk::PROGRAM)?;
        for driver in dpdk::drivers(root)? {
            adder.add_library(&driver.library)?;
            adder.tree.link(&driver.link, &driver.target());
        }
    }
    adder.left_out = &LEFT_OUT;
    for (_, names) in PROGRAMS {
        for name in names {
            adder.add_program(root, name)?;
        }
    }
    for name in LOADED_LATER {
        adder.add_library(name)?;
    }
    // What mke2fs makes is named by how it is called, and this file says what that means.
    tree.link("usr/bin/mkfs.ext4", "mke2fs");
    tree.file(
        "etc/mke2fs.conf",
        0o644,
        read(&root.join("etc/mke2fs.conf"))?,
    );
    add_applets(tree, &find_program(root, "busybox")?)
}

fn find_program(root: &Path, name: &str) -> Result<PathBuf> {
    ["usr/bin", "usr/sbin", "bin", "sbin"]
        .map(|dir| root.join(dir).join(name))
        .into_iter()
        .find(|path| path.is_file())
        .ok_or_else(|| Error::malformed(name, "is not in its package"))
}

/// All libraries by file name. The guest has one folder for them.
fn find_libraries(root: &Path) -> Result<BTreeMap<String, PathBuf>> {
    let mut libraries = BTreeMap::new();
    let mut dirs: Vec<PathBuf> = [LIBRARY_DIR, "lib/x86_64-linux-gnu"]
        .map(|dir| root.join(dir))
        .to_vec();
    while let Some(dir) = dirs.pop() {
        if !dir.is_dir() {
            continue;
        }
        for entry in fs::read_dir(&dir).map_err(Error::io("read", &dir))? {
            let path = entry.map_err(Error::io("read", &dir))?.path();
            let is_link = path.is_symlink();
            if path.is_dir() && !is_link {
                dirs.push(path);
            } else if let Some(name) = path.file_name().and_then(|name| name.to_str())
                && name.contains(".so")
            {
                let path = resolve_link(root, &path);
                libraries.entry(name.to_owned()).or_insert(path);
            }
        }
    }
    Ok(libraries)
}

/// An absolute link of the guest means a file of the guest, not of this machine.
fn resolve_link(root: &Path, path: &Path) -> PathBuf {
    match fs::read_link(path) {
        Ok(target) => match target.strip_prefix("/") {
            Ok(relative) => root.join(relative),
            Err(_) => path.to_owned(),
        },
        Err(_) => path.to_owned(),
    }
}

fn read(path: &Path) -> Result<Vec<u8>> {
    fs::read(path).map_err(Error::io("read", path))
}

struct Adder<'a> {
    tree: &'a mut Tree,
    libraries: BTreeMap<String, PathBuf>,
    done: BTreeSet<String>,
    /// Libraries that are replaced by stand-ins.
    left_out: &'static [&'static str],
}

impl Adder<'_> {
    /// Adds a program with what it needs.
    fn add_program(&mut self, root: &Path, name: &str) -> Result<()> {
        let content = read(&find_program(root, name)?)?;
        self.add_needed(name, &content)?;
        self.tree.file(&format!("usr/bin/{name}"), 0o755, content);
        Ok(())
    }

    /// Adds what a program or library needs, and what that needs.
    fn add_needed(&mut self, name: &str, content: &[u8]) -> Result<()> {
        let elf = Elf::parse(name, content)?;
        if let Some(loader) = elf.interpreter()? {
            self.add_loader(&loader)?;
        }
        for needed in elf.needed()? {
            if !self.done.insert(needed.clone()) {
                continue;
            }
            let library = self.library(&needed, name)?;
            let stand_in = match is_one_of(self.left_out, &needed) {
                true => stand_in(&elf, &needed, &library)?,
                false => None,
            };
            match stand_in {
                Some(stand_in) => self.put(&needed, stand_in),
                None => {
                    self.add_needed(&needed, &library)?;
                    self.put(&needed, library);
                }
            }
        }
        Ok(())
    }

    /// Adds a library that programs load while they run.
    fn add_library(&mut self, name: &str) -> Result<()> {
        if self.done.insert(name.to_owned()) {
            let library = self.library(name, "a program")?;
            self.add_needed(name, &library)?;
            self.put(name, library);
        }
        Ok(())
    }

    fn put(&mut self, library: &str, content: Vec<u8>) {
        self.tree
            .file(&format!("{LIBRARY_DIR}/{library}"), 0o755, content);
    }

    fn add_loader(&mut self, path: &str) -> Result<()> {
        let name = path.rsplit('/').next().unwrap_or(path);
        let in_image = format!("usr{path}");
        if self.done.insert(name.to_owned()) || !self.tree.contains(&in_image) {
            let content = self.library(name, "the loader")?;
            self.tree.file(&in_image, 0o755, content);
        }
        Ok(())
    }

    fn library(&self, name: &str, wanted_by: &str) -> Result<Vec<u8>> {
        match self.libraries.get(name) {
            Some(path) => read(path),
            None => Err(Error::malformed(
                name,
                format!("{wanted_by} needs it, no package has it"),
            )),
        }
    }
}

fn is_one_of(libraries: &[&str], soname: &str) -> bool {
    let name = soname.split_once(".so").map_or(soname, |(name, _)| name);
    libraries.contains(&name)
}

/// Makes a stand-in with those functions of `library` that the program asks for. `None` if it
/// asks for data, for which there can be none.
fn stand_in(program: &Elf<'_>, soname: &str, library: &[u8]) -> Result<Option<Vec<u8>>> {
    let exported: BTreeMap<String, Symbol> = Elf::parse(soname, library)?
        .symbols()?
        .into_iter()
        .filter(|symbol| !symbol.undefined)
        .map(|symbol| (symbol.name.clone(), symbol))
        .collect();
    let wanted: Vec<Symbol> = program
        .symbols()?
        .into_iter()
        .filter(|symbol| symbol.undefined && exported.contains_key(&symbol.name))
        .collect();
    let is_data = |symbol: &Symbol| {
        exported
            .get(&symbol.name)
            .is_some_and(|symbol| symbol.is_data)
    };
    match wanted.iter().any(is_data) {
        true => Ok(None),
        false => Ok(Some(stub::library(soname, &wanted))),
    }
}

/// Links busybox's other names to it, where no real program has the name.
fn add_applets(tree: &mut Tree, busybox: &Path) -> Result<()> {
    let mut command = Command::new(busybox);
    command.arg("--list");
    for name in run::run("busybox", "busybox-static", &mut command)?.lines() {
        let path = format!("usr/bin/{name}");
        if !name.is_empty() && !name.contains('/') && !tree.contains(&path) {
            tree.link(&path, "busybox");
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_whole_names_are_left_out() {
        let is_left_out = |soname| is_one_of(&LEFT_OUT, soname);
        assert!(is_left_out("librbd.so.1") && is_left_out("libpmemblk.so.1"));
        assert!(!is_left_out("libpmem2.so.1") && !is_left_out("libnuma.so.1") && !is_left_out("x"));
    }

    #[test]
    fn absolute_links_stay_in_the_guest() {
        let temp = tempfile::tempdir().unwrap();
        let dir = temp.path().join(LIBRARY_DIR);
        fs::create_dir_all(dir.join("sub")).unwrap();
        fs::write(dir.join("sub/libb.so.1"), b"b").unwrap();
        std::os::unix::fs::symlink(
            format!("/{LIBRARY_DIR}/sub/libb.so.1"),
            dir.join("liba.so.1"),
        )
        .unwrap();
        fs::write(dir.join("readme"), b"").unwrap();
        let libraries = find_libraries(temp.path()).unwrap();
        assert_eq!(libraries.len(), 2);
        assert_eq!(fs::read(&libraries["liba.so.1"]).unwrap(), b"b");
        assert!(
            find_libraries(Path::new("/nonexistent"))
                .unwrap()
                .is_empty()
        );
    }
}

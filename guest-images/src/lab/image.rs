//! QEMU, the nested host's kernel and its initramfs, made from Debian 13's packages.
//!
//! QEMU comes with every library that it needs, the C library included, and runs through its own
//! loader, so it runs the same on each machine. The kernel is Debian's generic one: the cloud
//! flavour lacks 9p.

use std::fs::{self, File};
use std::io::{BufWriter, Write};
use std::path::{Path, PathBuf};
use std::process::Command;

use sha2::{Digest, Sha256};

use crate::apt::{self, Apt, Deb, Freshness, Suite};
use crate::image::cpio::Tree;
use crate::image::modules;
use crate::image::{Flavour, KernelFiles, extract_vmlinux, fetch_kernel};
use crate::{CacheDir, Error, Progress, Result};

/// Mount options of every virtio-9p share but for the caching. The message size is the largest
/// that virtio-9p's 128 descriptors can carry.
pub(super) const NINE_P_OPTIONS: &str = "trans=virtio,version=9p2000.L,msize=512000";

/// Environment variable in which the initramfs tells the relay who loads the rest of the modules.
pub(super) const MODULES_PID: &str = "LAB_MODULES_PID";

/// Changes when the same packages are made into something else.
const RECIPE: &str = "2";

/// Programs that are needed, with everything that they depend on.
const PROGRAMS: [&str; 2] = ["qemu-system-x86", "busybox-static"];

/// Modules without which the root cannot be mounted.
const ROOT_MODULES: [&str; 3] = ["9pnet_virtio", "9p", "overlay"];

/// Modules that may be loaded while the root is already in use.
const LATER_MODULES: [&str; 8] = [
    "kvm_amd",
    "virtio_blk",
    "tun",
    "vhost_net",
    "bridge",
    "veth",
    "loop",
    "vhost_vsock",
];

/// The first process's script.
const INIT: &str = include_str!("init.sh");

/// Everything that a nested host is started from.
#[derive(Debug, Clone)]
pub struct LabImage {
    dir: PathBuf,
}

impl LabImage {
    /// Fetches and builds what the cache does not have yet.
    ///
    /// # Errors
    /// The packages cannot be had, or are not as they should be.
    pub fn prepare(
        cache: &CacheDir,
        freshness: Freshness,
        progress: &dyn Progress,
    ) -> Result<Self> {
        let suite = Apt::new(cache).suite(Suite::Trixie);
        let mut programs = suite.fetch_closure(&PROGRAMS, freshness, progress)?;
        let kernel = fetch_kernel(&suite, Flavour::Generic, freshness, progress)?;
        programs.sort_by(|a, b| a.sha256.cmp(&b.sha256));

        let dir = cache.dir("lab")?.join(key(&programs, &kernel));
        let _lock = cache.lock("lab")?;
        if !dir.exists() {
            progress.step("building the nested host");
            let temporary = cache.temp_dir()?;
            build(temporary.path(), &programs, &kernel)?;
            fs::rename(temporary.path(), &dir).map_err(Error::io("publish", &dir))?;
            // It is no longer temporary: there is nothing to remove at the old path.
            let _ = temporary.keep();
            progress.done();
        }
        Ok(Self { dir })
    }

    /// The command that runs one of the programs with its own loader and libraries.
    pub fn program(&self, name: &str) -> Command {
        program(&self.programs(), name)
    }

    /// Folders in which QEMU finds its firmware.
    pub fn firmware(&self) -> [PathBuf; 2] {
        ["qemu", "seabios"].map(|name| self.programs().join("usr/share").join(name))
    }

    /// The kernel as an ELF file with a PVH entry.
    pub fn kernel(&self) -> PathBuf {
        self.dir.join("vmlinux")
    }

    /// The initramfs, which still lacks `/relay.sh`: busybox and modules.
    pub fn initramfs(&self) -> PathBuf {
        self.dir.join("initramfs.cpio")
    }

    fn programs(&self) -> PathBuf {
        self.dir.join("programs")
    }
}

fn key(programs: &[Deb], kernel: &Deb) -> String {
    let mut hash = Sha256::new();
    hash.update(RECIPE);
    hash.update(INIT);
    for deb in programs.iter().chain([kernel]) {
        hash.update(&deb.sha256);
    }
    hash.finalize()
        .iter()
        .take(8)
        .map(|byte| format!("{byte:02x}"))
        .collect()
}

fn build(dir: &Path, debs: &[Deb], kernel: &Deb) -> Result<()> {
    let programs = dir.join("programs");
    for deb in debs {
        apt::unpack(deb, &programs)?;
    }
    for name in ["doc", "locale", "man"] {
        let unneeded = programs.join("usr/share").join(name);
        if unneeded.exists() {
            fs::remove_dir_all(&unneeded).map_err(Error::io("remove", &unneeded))?;
        }
    }
    let unpacked = dir.join("kernel");
    apt::unpack(kernel, &unpacked)?;
    let files = KernelFiles::find(&unpacked)?;
    let bzimage = fs::read(&files.bzimage).map_err(Error::io("read", &files.bzimage))?;
    let vmlinux = dir.join("vmlinux");
    fs::write(&vmlinux, extract_vmlinux(&bzimage)?).map_err(Error::io("write", &vmlinux))?;

    let initramfs = dir.join("initramfs.cpio");
    let tree = initramfs_tree(&programs, &files)?;
    let write = || -> std::io::Result<()> {
        let mut file = BufWriter::new(File::create(&initramfs)?);
        tree.write(&mut file)?;
        file.flush()
    };
    write().map_err(Error::io("write", &initramfs))?;
    fs::remove_dir_all(&unpacked).map_err(Error::io("remove", &unpacked))
}

fn initramfs_tree(programs: &Path, kernel: &KernelFiles) -> Result<Tree> {
    let mut tree = Tree::default();
    for folder in ["dev", "lower", "proc", "root", "sys", "upper"] {
        tree.dir(folder, 0o755);
    }
    // Without it the first process has no standard files.
    tree.char_device("dev/console", 0o600, 5, 1);
    let busybox = programs.join("usr/bin/busybox");
    let busybox = fs::read(&busybox).map_err(Error::io("read", &busybox))?;
    tree.file("bin/busybox", 0o755, busybox);
    let init = INIT.replace("NINE_P_OPTIONS", NINE_P_OPTIONS);
    tree.file("init", 0o755, init);
    let root = modules::in_load_order(kernel, &ROOT_MODULES)?;
    let mut later = modules::in_load_order(kernel, &LATER_MODULES)?;
    later.retain(|(name, _)| !root.iter().any(|(loaded, _)| loaded == name));
    for (folder, modules) in [("root", root), ("later", later)] {
        // The names' order is the order in which the script loads them.
        for (number, (name, module)) in (0..).zip(modules) {
            let number: u32 = number;
            tree.file(
                &format!("modules/{folder}/{number:02}-{name}.ko"),
                0o644,
                module,
            );
        }
    }
    Ok(tree)
}

/// Runs a program of `root` through the loader and with the libraries that are beside it.
fn program(root: &Path, name: &str) -> Command {
    let libraries = root.join("usr/lib/x86_64-linux-gnu");
    let mut command = Command::new(libraries.join("ld-linux-x86-64.so.2"));
    command
        .arg("--inhibit-cache")
        .arg("--library-path")
        .arg(&libraries)
        .arg(root.join("usr/bin").join(name));
    command
}

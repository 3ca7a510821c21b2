//! Images: a kernel as the distribution ships it, and an initramfs with tools and the agent.
//!
//! The product of a release is a folder with `bzImage`, `vmlinux` (the same kernel as ELF file
//! with PVH entry), `initramfs.cpio` and `manifest.json`. It appears all at once, and a process
//! that builds it holds a lock, so nobody ever sees a part of it.

pub(crate) mod cpio;
mod dpdk;
mod elf;
mod kernel;
pub(crate) mod modules;
mod programs;
mod stub;

use std::fmt;
use std::fs;
use std::io::{BufWriter, Write};
use std::path::{Path, PathBuf};
use std::str::FromStr;

use serde::{Deserialize, Serialize};
use sha2::{Digest, Sha256};

pub use kernel::{Flavour, KernelFiles, extract_vmlinux, fetch_kernel};

use crate::agent::AGENT_BINARY;
use crate::apt::{self, Apt, Deb, Freshness, Suite};
use crate::{CacheDir, Error, Progress, Result};

/// A Debian release that images are made of.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
pub enum Release {
    /// Debian 12 (bookworm) with Linux 6.1.
    #[serde(rename = "debian-12")]
    Debian12,
    /// Debian 13 (trixie) with Linux 6.12.
    #[serde(rename = "debian-13")]
    Debian13,
}

impl Release {
    /// All of them.
    pub const ALL: [Self; 2] = [Self::Debian12, Self::Debian13];

    /// The name on the command line: `debian-12` or `debian-13`.
    pub const fn name(self) -> &'static str {
        match self {
            Self::Debian12 => "debian-12",
            Self::Debian13 => "debian-13",
        }
    }

    /// The reverse of [`Release::name`].
    ///
    /// # Errors
    /// [`Error::UnknownRelease`].
    pub fn parse(name: &str) -> Result<Self> {
        let known = Self::ALL.into_iter().find(|release| release.name() == name);
        known.ok_or_else(|| Error::UnknownRelease(name.to_owned()))
    }

    /// The suite of its packages.
    pub const fn suite(self) -> Suite {
        match self {
            Self::Debian12 => Suite::Bookworm,
            Self::Debian13 => Suite::Trixie,
        }
    }
}

impl fmt::Display for Release {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}

impl FromStr for Release {
    type Err = Error;

    fn from_str(name: &str) -> Result<Self> {
        Self::parse(name)
    }
}

/// An image's name: a release, and whether user-space drivers are wanted too.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct ImageName {
    /// The release that it is made of.
    pub release: Release,
    /// With DPDK's testpmd and the drivers that it needs, which add about half of an image's size.
    pub dpdk: bool,
}

/// What follows the release in the name of an image with DPDK.
const DPDK_SUFFIX: &str = "-dpdk";

impl ImageName {
    /// All of them.
    pub const ALL: [Self; 4] = [
        Self::new(Release::Debian12, false),
        Self::new(Release::Debian12, true),
        Self::new(Release::Debian13, false),
        Self::new(Release::Debian13, true),
    ];

    const fn new(release: Release, dpdk: bool) -> Self {
        Self { release, dpdk }
    }

    /// The name on the command line: that of the release, or with `-dpdk` after it.
    ///
    /// # Errors
    /// [`Error::UnknownRelease`].
    pub fn parse(name: &str) -> Result<Self> {
        let known = Self::ALL.into_iter().find(|one| one.to_string() == name);
        known.ok_or_else(|| Error::UnknownRelease(name.to_owned()))
    }
}

impl From<Release> for ImageName {
    fn from(release: Release) -> Self {
        Self::new(release, false)
    }
}

impl fmt::Display for ImageName {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let suffix = if self.dpdk { DPDK_SUFFIX } else { "" };
        write!(f, "{}{suffix}", self.release)
    }
}

impl FromStr for ImageName {
    type Err = Error;

    fn from_str(name: &str) -> Result<Self> {
        Self::parse(name)
    }
}

/// A package that went into an image.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct PackageVersion {
    /// Package name.
    pub name: String,
    /// Debian version.
    pub version: String,
    /// SHA-256 of the package file, in lower-case hexadecimal.
    pub sha256: String,
}

/// What an image is made of.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Manifest {
    /// The release.
    pub release: Release,
    /// The kernel's release, as `uname -r` prints it.
    pub kernel_release: String,
    /// Identifies the builder and the agent; an image of another builder is built again.
    pub builder: String,
    /// The kernel package and everything that the programs come from.
    pub packages: Vec<PackageVersion>,
}

/// An image that was built.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Image {
    /// Its name.
    pub name: ImageName,
    /// The release.
    pub release: Release,
    /// The kernel's release, as `uname -r` prints it.
    pub kernel_release: String,
    /// Its folder.
    pub dir: PathBuf,
    /// The kernel as shipped.
    pub bzimage: PathBuf,
    /// The kernel as uncompressed ELF file with PVH entry.
    pub vmlinux: PathBuf,
    /// The initramfs (cpio, not compressed).
    pub initramfs: PathBuf,
    /// What it is made of.
    pub manifest: Manifest,
}

/// The images of a cache folder.
#[derive(Debug, Clone)]
pub struct Images {
    cache: CacheDir,
}

impl Images {
    /// Uses the images in `cache`.
    pub fn new(cache: &CacheDir) -> Self {
        Self {
            cache: cache.clone(),
        }
    }

    /// Returns the image `name`, after building it if there is none or another builder made it. With [`Freshness::Refresh`] it is built anew from the archive's newest packages.
    ///
    /// # Errors
    /// The packages cannot be had, are not what they should be, or the cache cannot be written.
    pub fn build(
        &self,
        name: impl Into<ImageName>,
        freshness: Freshness,
        progress: &dyn Progress,
    ) -> Result<Image> {
        let name = name.into();
        let _lock = self.lock(name)?;
        if freshness == Freshness::Cached
            && let Some(image) = self.open_locked(name)
            && image.manifest.builder == builder_id()
        {
            return Ok(image);
        }
        let temp = self.cache.temp_dir()?;
        let made = temp.path().join("image");
        fs::create_dir(&made).map_err(Error::io("create", &made))?;
        let result = self.make(name, freshness, temp.path(), &made, progress);
        progress.done();
        result?;

        let dir = self.dir(name)?;
        if dir.exists() {
            let old = temp.path().join("old");
            fs::rename(&dir, &old).map_err(Error::io("replace", &dir))?;
        }
        fs::rename(&made, &dir).map_err(Error::io("create", &dir))?;
        self.open_locked(name)
            .ok_or_else(|| Error::malformed(dir.display().to_string(), "is not readable"))
    }

    /// The image `name`, if it was built.
    ///
    /// # Errors
    /// The cache cannot be written (for its lock).
    pub fn open(&self, name: impl Into<ImageName>) -> Result<Option<Image>> {
        let name = name.into();
        let _lock = self.lock(name)?;
        Ok(self.open_locked(name))
    }

    /// All images that were built.
    ///
    /// # Errors
    /// As [`Images::open`].
    pub fn list(&self) -> Result<Vec<Image>> {
        let opened = ImageName::ALL
            .into_iter()
            .map(|name| self.open(name).transpose());
        opened.flatten().collect()
    }

    /// Removes the image `name` and says whether there was one. Its packages stay cached.
    ///
    /// # Errors
    /// [`Error::Io`].
    pub fn remove(&self, name: impl Into<ImageName>) -> Result<bool> {
        let name = name.into();
        let _lock = self.lock(name)?;
        let dir = self.dir(name)?;
        if !dir.exists() {
            return Ok(false);
        }
        // It disappears at once; the files are deleted with the temporary folder.
        let temp = self.cache.temp_dir()?;
        fs::rename(&dir, temp.path().join("old")).map_err(Error::io("remove", &dir))?;
        Ok(true)
    }

    fn lock(&self, name: ImageName) -> Result<crate::cache::CacheLock> {
        self.cache.lock(&format!("image-{name}"))
    }

    fn dir(&self, name: ImageName) -> Result<PathBuf> {
        Ok(self.cache.dir("images")?.join(name.to_string()))
    }

    fn open_locked(&self, name: ImageName) -> Option<Image> {
        let dir = self.dir(name).ok()?;
        let manifest = fs::read(dir.join("manifest.json")).ok()?;
        let manifest: Manifest = serde_json::from_slice(&manifest).ok()?;
        let image = Image {
            name,
            release: name.release,
            kernel_release: manifest.kernel_release.clone(),
            bzimage: dir.join("bzImage"),
            vmlinux: dir.join("vmlinux"),
            initramfs: dir.join("initramfs.cpio"),
            dir,
            manifest,
        };
        let files = [&image.bzimage, &image.vmlinux, &image.initramfs];
        let complete = files.into_iter().all(|path| path.is_file());
        complete.then_some(image)
    }

    /// Makes the files of an image in `made`; `temp` is for everything else.
    fn make(
        &self,
        name: ImageName,
        freshness: Freshness,
        temp: &Path,
        made: &Path,
        progress: &dyn Progress,
    ) -> Result<()> {
        let release = name.release;
        let suite = Apt::new(&self.cache).suite(release.suite());
        let kernel_deb = fetch_kernel(&suite, Flavour::Cloud, freshness, progress)?;
        let mut packages = programs::packages();
        if name.dpdk {
            packages.push(dpdk::PACKAGE);
        }
        let mut debs = suite.fetch_closure(&packages, freshness, progress)?;
        debs.retain(|deb| programs::is_useful(&deb.name) || deb.name == dpdk::PACKAGE);

        progress.step(&format!("unpacking packages for {name}"));
        let (kernel_root, root) = (temp.join("kernel"), temp.join("root"));
        apt::unpack(&kernel_deb, &kernel_root)?;
        for (count, deb) in debs.iter().enumerate() {
            apt::unpack(deb, &root)?;
            let percent = (count + 1) * 100 / debs.len();
            progress.percent(u8::try_from(percent).unwrap_or(100));
        }

        progress.step(&format!("making the image {name}"));
        let kernel = KernelFiles::find(&kernel_root)?;
        let bzimage = fs::read(&kernel.bzimage).map_err(Error::io("read", &kernel.bzimage))?;
        write(&made.join("vmlinux"), &extract_vmlinux(&bzimage)?)?;
        write(&made.join("bzImage"), &bzimage)?;

        let mut tree = skeleton(release);
        modules::add(&mut tree, &kernel)?;
        programs::add(&mut tree, &root, name.dpdk)?;
        let path = made.join("initramfs.cpio");
        let file = fs::File::create(&path).map_err(Error::io("create", &path))?;
        let mut file = BufWriter::new(file);
        tree.write(&mut file)
            .and_then(|()| file.flush())
            .map_err(Error::io("write", &path))?;

        let package = |deb: &Deb| PackageVersion {
            name: deb.name.clone(),
            version: deb.version.clone(),
            sha256: deb.sha256.clone(),
        };
        let manifest = Manifest {
            release,
            kernel_release: kernel.release,
            builder: builder_id(),
            packages: [&kernel_deb]
                .into_iter()
                .chain(&debs)
                .map(package)
                .collect(),
        };
        let manifest = serde_json::to_vec_pretty(&manifest)
            .map_err(|error| Error::malformed("manifest", error.to_string()))?;
        write(&made.join("manifest.json"), &manifest)
    }
}

fn write(path: &Path, content: &[u8]) -> Result<()> {
    fs::write(path, content).map_err(Error::io("write", path))
}

/// The program that drives an NVMe function from user space; see `vfio-nvme/main.rs`.
const VFIO_NVME_BINARY: &[u8] = include_bytes!(concat!(env!("OUT_DIR"), "/vfio-nvme"));

fn builder_id() -> String {
    let hash = Sha256::new()
        .chain_update(AGENT_BINARY)
        .chain_update(VFIO_NVME_BINARY);
    let hex: String = hash
        .finalize()
        .iter()
        .take(8)
        .map(|byte| format!("{byte:02x}"))
        .collect();
    format!("recipe-{}-agent-{hex}", env!("RINGSIDE_RECIPE"))
}

/// The folders, links and small files that every Linux system has, and the agent as `/init`.
fn skeleton(release: Release) -> cpio::Tree {
    let mut tree = cpio::Tree::default();
    for dir in [
        "dev",
        "etc",
        "mnt",
        "proc",
        "run",
        "sys",
        "usr/bin",
        "usr/lib64",
        "var",
    ] {
        tree.dir(dir, 0o755);
    }
    // The kernel's own root folder is writable to all; DPDK refuses to load drivers below such a one.
    tree.dir(".", 0o755);
    tree.dir("root", 0o700);
    tree.dir("tmp", 0o1777);
    for (link, target) in [
        ("bin", "usr/bin"),
        ("sbin", "usr/bin"),
        ("usr/sbin", "bin"),
        ("lib", "usr/lib"),
        ("lib64", "usr/lib64"),
        // Not busybox's shell: that runs its own applets in place of the real ip and lspci.
        ("usr/bin/sh", "dash"),
        ("var/run", "../run"),
        ("var/tmp", "../tmp"),
        ("etc/mtab", "../proc/self/mounts"),
    ] {
        tree.link(link, target);
    }
    // The kernel opens it before anything is mounted.
    tree.char_device("dev/console", 0o600, 5, 1);
    tree.char_device("dev/null", 0o666, 1, 3);
    tree.file("init", 0o755, AGENT_BINARY);
    tree.file("usr/bin/vfio-nvme", 0o755, VFIO_NVME_BINARY);
    let os_release = format!("ID=debian\nPRETTY_NAME=\"Ringside guest ({release})\"\n");
    for (path, content) in [
        ("etc/group", "root:x:0:\n"),
        ("etc/hosts", "127.0.0.1 localhost\n::1 localhost\n"),
        ("etc/os-release", os_release.as_str()),
        ("etc/passwd", "root::0:0:root:/root:/bin/bash\n"),
        ("etc/profile", "PS1='\\h:\\w\\$ '\nHISTFILE=\n"),
        ("etc/services", "domain 53/udp\niperf3 5201/tcp\n"),
    ] {
        tree.file(path, 0o644, content);
    }
    tree
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::progress::Silent;

    fn fake_image(cache: &CacheDir, release: Release, builder: String) -> PathBuf {
        let dir = cache.dir("images").unwrap().join(release.name());
        fs::create_dir_all(&dir).unwrap();
        let manifest = Manifest {
            release,
            kernel_release: "6.12".into(),
            builder,
            packages: Vec::new(),
        };
        fs::write(
            dir.join("manifest.json"),
            serde_json::to_vec(&manifest).unwrap(),
        )
        .unwrap();
        for name in ["bzImage", "vmlinux", "initramfs.cpio"] {
            fs::write(dir.join(name), b"x").unwrap();
        }
        dir
    }

    #[test]
    fn releases_and_images_have_names() {
        for release in Release::ALL {
            assert_eq!(release.to_string().parse::<Release>().unwrap(), release);
        }
        for name in ImageName::ALL {
            assert_eq!(name.to_string().parse::<ImageName>().unwrap(), name);
        }
        assert_eq!(ImageName::from(Release::Debian12).to_string(), "debian-12");
        let dpdk = ImageName::parse("debian-13-dpdk").unwrap();
        assert_eq!((dpdk.release, dpdk.dpdk), (Release::Debian13, true));
        let error = Release::parse("debian-11").unwrap_err().to_string();
        assert!(
            error.contains("debian-11") && error.contains("debian-13"),
            "{error}"
        );
    }

    #[test]
    fn images_are_listed_reused_and_removed() {
        let temp = tempfile::tempdir().unwrap();
        let cache = CacheDir::at(temp.path());
        let images = Images::new(&cache);
        assert_eq!(images.list().unwrap(), []);
        let dir = fake_image(&cache, Release::Debian13, builder_id());
        let image = images
            .build(Release::Debian13, Freshness::Cached, &Silent)
            .unwrap();
        assert_eq!(image.vmlinux, dir.join("vmlinux"));
        assert_eq!(images.list().unwrap(), [image]);
        // A part of an image is none.
        fs::remove_file(dir.join("vmlinux")).unwrap();
        assert_eq!(images.open(Release::Debian13).unwrap(), None);
        assert!(images.remove(Release::Debian13).unwrap());
        assert!(!dir.exists());
        assert!(!images.remove(Release::Debian13).unwrap());
        assert_eq!(fs::read_dir(temp.path().join("tmp")).unwrap().count(), 0);
    }
}

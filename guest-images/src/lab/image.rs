//! QEMU, the nested host's kernel and its initramfs, made from Debian 13's packages.
//!
//! QEMU comes with every library that it needs, the C library included, and runs through its own
//! loader, so it runs the same on each machine. The kernel is Debian's generic one: the cloud
//! flavour lacks 9p.

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::io::Write;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use sha2::{Digest, Sha256};

use super::cpio::Cpio;
use crate::apt::{self, Apt, Deb, Freshness, Suite};
use crate::{CacheDir, Error, Progress, Result};

/// Mount options of every virtio-9p share but for the caching. The message size is the largest
/// that virtio-9p's 128 descriptors can carry.
pub(super) const NINE_P_OPTIONS: &str = "trans=virtio,version=9p2000.L,msize=512000";

/// Environment variable in which the initramfs tells the relay who loads the rest of the modules.
pub(super) const MODULES_PID: &str = "LAB_MODULES_PID";

/// Changes when the same packages are made into something else.
const RECIPE: &str = "1";

/// Programs that are needed, with everything that they depend on.
const PROGRAMS: [&str; 4] = ["qemu-system-x86", "busybox-static", "xz-utils", "zstd"];

/// The meta-package that depends on the current kernel.
const KERNEL: &str = "linux-image-amd64";

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
        let meta = suite.fetch(&[KERNEL], freshness, progress)?;
        let kernel = real_kernel(first(&meta, KERNEL)?)?;
        let kernel = suite.fetch(&[&kernel], freshness, progress)?;
        let kernel = first(&kernel, KERNEL)?;
        programs.sort_by(|a, b| a.sha256.cmp(&b.sha256));

        let dir = cache.dir("lab")?.join(key(&programs, kernel));
        let _lock = cache.lock("lab")?;
        if !dir.exists() {
            progress.step("building the nested host");
            let temporary = cache.temp_dir()?;
            build(temporary.path(), &programs, kernel)?;
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
    pub(super) fn firmware(&self) -> [PathBuf; 2] {
        ["qemu", "seabios"].map(|name| self.programs().join("usr/share").join(name))
    }

    /// The kernel as an ELF file with a PVH entry.
    pub fn kernel(&self) -> PathBuf {
        self.dir.join("vmlinux")
    }

    /// The initramfs, which still lacks `/relay.sh`.
    pub(super) fn initramfs(&self) -> PathBuf {
        self.dir.join("initramfs.cpio")
    }

    fn programs(&self) -> PathBuf {
        self.dir.join("programs")
    }
}

fn first<'a>(debs: &'a [Deb], what: &str) -> Result<&'a Deb> {
    debs.first()
        .ok_or_else(|| Error::malformed(what, "no such package was fetched"))
}

/// The name of the package on which the kernel's meta-package depends.
fn real_kernel(meta: &Deb) -> Result<String> {
    let mut command = Command::new("dpkg-deb");
    command.arg("--field").arg(&meta.path).arg("Depends");
    let depends = run(&mut command, "dpkg-deb", &[])?;
    parse_kernel_dependency(&String::from_utf8_lossy(&depends))
        .ok_or_else(|| Error::malformed(&meta.name, "depends on no kernel"))
}

fn parse_kernel_dependency(depends: &str) -> Option<String> {
    depends
        .split(',')
        .filter_map(|dependency| dependency.split_whitespace().next())
        .find(|name| name.starts_with("linux-image-"))
        .map(str::to_owned)
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
    let release = kernel.name.trim_start_matches("linux-image-");

    let image = unpacked.join(format!("boot/vmlinuz-{release}"));
    let image = fs::read(&image).map_err(Error::io("read", &image))?;
    let payload = kernel_payload(&image)
        .ok_or_else(|| Error::malformed(&kernel.name, "no bzImage with a zstd payload"))?;
    let mut zstd = program(&programs, "zstd");
    let elf = run(zstd.args(["-d", "-c", "-q"]), "zstd", payload)?;
    if !elf.starts_with(b"\x7fELF") {
        return Err(Error::malformed(
            &kernel.name,
            "the kernel in it is no ELF file",
        ));
    }
    write(&dir.join("vmlinux"), &elf)?;

    let modules = unpacked.join("usr/lib/modules").join(release);
    let initramfs = initramfs(&programs, &Modules::find(&modules)?)?;
    write(&dir.join("initramfs.cpio"), &initramfs)?;
    fs::remove_dir_all(&unpacked).map_err(Error::io("remove", &unpacked))
}

/// The compressed kernel in a bzImage (Linux, Documentation/arch/x86/boot.rst: `setup_sects`,
/// `payload_offset`, `payload_length`). The build appends the length of the uncompressed kernel to
/// the zstd frame.
fn kernel_payload(image: &[u8]) -> Option<&[u8]> {
    let number = |at: usize| {
        let bytes = image.get(at..)?.first_chunk::<4>()?;
        usize::try_from(u32::from_le_bytes(*bytes)).ok()
    };
    if image.get(0x202..0x206)? != b"HdrS" {
        return None;
    }
    let setup_sectors = usize::from(*image.get(0x1f1)?);
    let start = (setup_sectors + 1)
        .checked_mul(512)?
        .checked_add(number(0x248)?)?;
    let end = start.checked_add(number(0x24c)?)?.checked_sub(4)?;
    let payload = image.get(start..end)?;
    payload
        .starts_with(&[0x28, 0xb5, 0x2f, 0xfd])
        .then_some(payload)
}

/// The modules of a kernel.
struct Modules {
    files: BTreeMap<String, PathBuf>,
}

impl Modules {
    fn find(dir: &Path) -> Result<Self> {
        let mut files = BTreeMap::new();
        let mut folders = vec![dir.join("kernel")];
        while let Some(folder) = folders.pop() {
            for entry in fs::read_dir(&folder).map_err(Error::io("read", &folder))? {
                let entry = entry.map_err(Error::io("read", &folder))?;
                let path = entry.path();
                if path.is_dir() {
                    folders.push(path);
                } else if let Some(name) = module_name(&path) {
                    files.insert(name, path);
                }
            }
        }
        Ok(Self { files })
    }

    /// Reads a module and the modules that it needs, these first, but for those in `seen`.
    fn load(
        &self,
        programs: &Path,
        name: &str,
        seen: &mut BTreeSet<String>,
        loaded: &mut Vec<(String, Vec<u8>)>,
    ) -> Result<()> {
        if !seen.insert(name.to_owned()) {
            return Ok(());
        }
        let path = self
            .files
            .get(name)
            .ok_or_else(|| Error::malformed(KERNEL, format!("it has no module {name}")))?;
        let file = fs::read(path).map_err(Error::io("read", path))?;
        let module = match path.extension().and_then(|extension| extension.to_str()) {
            Some("xz") => run(program(programs, "xz").args(["-d", "-c"]), "xz", &file)?,
            Some("zst") => run(
                program(programs, "zstd").args(["-d", "-c", "-q"]),
                "zstd",
                &file,
            )?,
            _ => file,
        };
        for needed in dependencies(&module) {
            self.load(programs, &needed, seen, loaded)?;
        }
        loaded.push((name.to_owned(), module));
        Ok(())
    }
}

/// `kvm-amd.ko.xz` is the module `kvm_amd`.
fn module_name(path: &Path) -> Option<String> {
    let file = path.file_name()?.to_str()?;
    let (name, suffix) = file.split_once(".ko")?;
    matches!(suffix, "" | ".xz" | ".zst").then(|| name.replace('-', "_"))
}

/// The field `depends` of a module's `.modinfo` section.
fn dependencies(module: &[u8]) -> Vec<String> {
    const FIELD: &[u8] = b"\0depends=";
    let Some(start) = module.windows(FIELD.len()).position(|at| at == FIELD) else {
        return Vec::new();
    };
    let rest = module.get(start + FIELD.len()..).unwrap_or_default();
    let text = rest.split(|byte| *byte == 0).next().unwrap_or_default();
    String::from_utf8_lossy(text)
        .split(',')
        .filter(|name| !name.is_empty())
        .map(|name| name.replace('-', "_"))
        .collect()
}

fn initramfs(programs: &Path, modules: &Modules) -> Result<Vec<u8>> {
    let mut cpio = Cpio::default();
    for folder in [
        "bin",
        "dev",
        "lower",
        "modules",
        "modules/later",
        "modules/root",
        "proc",
        "root",
        "sys",
        "upper",
    ] {
        cpio.folder(folder);
    }
    cpio.console("dev/console");
    let busybox = programs.join("usr/bin/busybox");
    let busybox = fs::read(&busybox).map_err(Error::io("read", &busybox))?;
    cpio.file("bin/busybox", &busybox);
    cpio.file(
        "init",
        INIT.replace("NINE_P_OPTIONS", NINE_P_OPTIONS).as_bytes(),
    );
    let mut seen = BTreeSet::new();
    for (folder, names) in [("root", &ROOT_MODULES[..]), ("later", &LATER_MODULES[..])] {
        let mut loaded = Vec::new();
        for name in names {
            modules.load(programs, name, &mut seen, &mut loaded)?;
        }
        // The names' order is the order in which the script loads them.
        for (number, (name, module)) in loaded.iter().enumerate() {
            cpio.file(&format!("modules/{folder}/{number:02}-{name}.ko"), module);
        }
    }
    Ok(cpio.finish())
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

/// Runs a filter.
fn run(command: &mut Command, tool: &str, input: &[u8]) -> Result<Vec<u8>> {
    let failed = |detail: String| Error::ToolFailed {
        tool: tool.to_owned(),
        detail,
    };
    let mut child = command
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .map_err(|error| failed(error.to_string()))?;
    let stdin = child.stdin.take();
    let output = std::thread::scope(|scope| {
        scope.spawn(move || {
            // A filter that stops reading says why with its exit status.
            stdin.map(|mut stdin| stdin.write_all(input))
        });
        child.wait_with_output()
    });
    let output = output.map_err(|error| failed(error.to_string()))?;
    if output.status.success() {
        Ok(output.stdout)
    } else {
        let text = String::from_utf8_lossy(&output.stderr);
        Err(failed(text.trim().replace('\n', "; ")))
    }
}

fn write(path: &Path, content: &[u8]) -> Result<()> {
    fs::write(path, content).map_err(Error::io("write", path))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_meta_package_names_the_kernel() {
        let depends = "linux-base (>= 4), linux-image-6.12.107+deb13-amd64 (= 6.12.107-1)\n";
        let kernel = parse_kernel_dependency(depends);
        assert_eq!(kernel.as_deref(), Some("linux-image-6.12.107+deb13-amd64"));
        assert_eq!(parse_kernel_dependency("linux-base"), None);
    }

    #[test]
    fn module_files_and_their_needs() {
        assert_eq!(
            module_name(Path::new("/x/kvm-amd.ko.xz")).as_deref(),
            Some("kvm_amd")
        );
        assert_eq!(module_name(Path::new("/x/tun.ko")).as_deref(), Some("tun"));
        assert_eq!(module_name(Path::new("/x/modules.order")), None);
        assert_eq!(module_name(Path::new("/x/tun.ko.bak")), None);
        let module = b"\x7fELF\0license=GPL\0depends=kvm,ccp-x\0retpoline=Y\0";
        assert_eq!(dependencies(module), ["kvm", "ccp_x"]);
        assert!(dependencies(b"\0depends=\0name=x\0").is_empty());
        assert!(dependencies(b"nothing").is_empty());
    }

    #[test]
    fn a_kernels_payload_is_found_or_refused() {
        let mut image = vec![0; 0x1000];
        image[0x1f1] = 3;
        image[0x202..0x206].copy_from_slice(b"HdrS");
        image[0x248..0x24c].copy_from_slice(&0x100_u32.to_le_bytes());
        image[0x24c..0x250].copy_from_slice(&12_u32.to_le_bytes());
        assert_eq!(kernel_payload(&image), None);
        image[0x900..0x904].copy_from_slice(&[0x28, 0xb5, 0x2f, 0xfd]);
        assert_eq!(kernel_payload(&image).map(<[u8]>::len), Some(8));
        image[0x24c..0x250].copy_from_slice(&u32::MAX.to_le_bytes());
        assert_eq!(kernel_payload(&image), None);
        assert_eq!(kernel_payload(b"MZ"), None);
    }

    #[test]
    fn a_filter_that_fails_says_why() {
        let mut command = Command::new("sh");
        let error = run(
            command.args(["-c", "echo bad >&2; exit 3"]),
            "sh",
            &[0; 1 << 20],
        );
        assert_eq!(error.unwrap_err().to_string(), "`sh` failed: bad");
    }
}

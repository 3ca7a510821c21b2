//! Chooses the kernel modules of an image and writes the lists that `modprobe` reads.

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::io::Read;
use std::path::{Path, PathBuf};

use lzma_rust2::XzReader;

use super::cpio::Tree;
use super::elf::Elf;
use super::kernel::KernelFiles;
use crate::{Error, Result};

/// Without these a guest has no devices of ours; each is a module or built in.
const REQUIRED: [&str; 3] = ["virtio_pci", "virtio_net", "vmw_vsock_virtio_transport"];

/// These are taken where the kernel has them as modules.
const WANTED: [&str; 13] = [
    "ahci",
    "button",
    "evdev",
    "pktgen",
    "sd_mod",
    "tun",
    "veth",
    "vfio_iommu_type1",
    "vfio_pci",
    "virtio_balloon",
    "virtio_blk",
    "virtio_iommu",
    "virtio_rng",
];

/// A device that one driver serves but that is of no use without another.
const COMPANIONS: [(&str, &str); 2] = [("ahci", "sd_mod"), ("button", "evdev")];

/// A module of the image.
struct Module {
    /// Its path below the modules' folder, uncompressed.
    path: String,
    content: Vec<u8>,
    depends: Vec<String>,
    aliases: Vec<String>,
}

/// Puts the modules and their lists into `tree`.
pub(super) fn add(tree: &mut Tree, kernel: &KernelFiles) -> Result<()> {
    let available = Available::read(&kernel.modules)?;
    let mut chosen = BTreeMap::new();
    for name in REQUIRED {
        if !available.built_in.contains(name) && !available.files.contains_key(name) {
            return Err(Error::malformed(
                "kernel package",
                format!("has no driver {name}"),
            ));
        }
    }
    for name in REQUIRED.into_iter().chain(WANTED) {
        available.choose(name, &mut chosen)?;
    }

    let dir = format!("usr/lib/modules/{}", kernel.release);
    tree.file(&format!("{dir}/modules.dep"), 0o644, dependencies(&chosen));
    tree.file(&format!("{dir}/modules.alias"), 0o644, aliases(&chosen));
    for name in ["modules.builtin", "modules.order"] {
        let path = kernel.modules.join(name);
        let content = fs::read(&path).map_err(Error::io("read", &path))?;
        tree.file(&format!("{dir}/{name}"), 0o644, content);
    }
    for module in chosen.into_values() {
        tree.file(&format!("{dir}/{}", module.path), 0o644, module.content);
    }
    Ok(())
}

/// Reads some modules and all that they need, in an order in which they can be loaded.
pub(crate) fn in_load_order(
    kernel: &KernelFiles,
    names: &[&str],
) -> Result<Vec<(String, Vec<u8>)>> {
    let available = Available::read(&kernel.modules)?;
    let mut chosen = BTreeMap::new();
    for name in names {
        if !available.files.contains_key(*name) && !available.built_in.contains(*name) {
            return Err(Error::malformed(
                "kernel package",
                format!("has no module {name}"),
            ));
        }
        available.choose(name, &mut chosen)?;
    }
    let mut order = Vec::new();
    for name in names {
        collect_needed(name, &chosen, &mut order);
    }
    let content = |name: &str| Some((name.to_owned(), chosen.get(name)?.content.clone()));
    Ok(order.into_iter().filter_map(content).collect())
}

/// What the kernel package has.
struct Available {
    dir: PathBuf,
    /// Module name to its path below the folder.
    files: BTreeMap<String, String>,
    built_in: BTreeSet<String>,
}

impl Available {
    fn read(dir: &Path) -> Result<Self> {
        let mut files = BTreeMap::new();
        find_modules(dir, Path::new("kernel"), &mut files)?;
        let path = dir.join("modules.builtin");
        let text = fs::read_to_string(&path).map_err(Error::io("read", &path))?;
        Ok(Self {
            dir: dir.to_owned(),
            files,
            built_in: text.lines().map(module_name).collect(),
        })
    }

    /// Takes a module and all that it depends on; nothing if it is built in or not there.
    fn choose(&self, name: &str, chosen: &mut BTreeMap<String, Module>) -> Result<()> {
        let Some(path) = self.files.get(name) else {
            return Ok(());
        };
        if chosen.contains_key(name) {
            return Ok(());
        }
        let module = self.load(path)?;
        let depends = module.depends.clone();
        chosen.insert(name.to_owned(), module);
        for needed in depends {
            self.choose(&needed, chosen)?;
        }
        Ok(())
    }

    fn load(&self, path: &str) -> Result<Module> {
        let full = self.dir.join(path);
        let mut content = fs::read(&full).map_err(Error::io("read", &full))?;
        let path = match path.strip_suffix(".xz") {
            Some(path) => {
                let mut plain = Vec::new();
                XzReader::new(content.as_slice(), false)
                    .read_to_end(&mut plain)
                    .map_err(Error::io("decompress", &full))?;
                content = plain;
                path
            }
            None => path,
        };
        let info = Elf::parse(path, &content)?.module_info()?;
        let values = |name: &'static str| {
            info.iter()
                .filter(move |(key, _)| key == name)
                .map(|(_, value)| value.as_str())
        };
        let depends = values("depends")
            .flat_map(|list| list.split(','))
            .filter(|n| !n.is_empty());
        Ok(Module {
            path: path.to_owned(),
            depends: depends.map(module_name).collect(),
            aliases: values("alias").map(str::to_owned).collect(),
            content,
        })
    }
}

fn find_modules(root: &Path, below: &Path, files: &mut BTreeMap<String, String>) -> Result<()> {
    let dir = root.join(below);
    for entry in fs::read_dir(&dir).map_err(Error::io("read", &dir))? {
        let entry = entry.map_err(Error::io("read", &dir))?;
        let path = below.join(entry.file_name());
        let kind = entry.file_type().map_err(Error::io("read", &dir))?;
        if kind.is_dir() {
            find_modules(root, &path, files)?;
        } else if let Some(text) = path.to_str()
            && (text.ends_with(".ko") || text.ends_with(".ko.xz"))
        {
            files.insert(module_name(text), text.to_owned());
        }
    }
    Ok(())
}

/// A file's name without folders and endings; the kernel takes `-` and `_` for the same.
fn module_name(path: &str) -> String {
    let name = path.rsplit('/').next().unwrap_or(path);
    name.split('.').next().unwrap_or(name).replace('-', "_")
}

/// modules.dep(5): `file: needed ...`, where a module stands before those that it needs itself.
fn dependencies(modules: &BTreeMap<String, Module>) -> String {
    let mut text = String::new();
    for (name, module) in modules {
        let mut order = Vec::new();
        collect_needed(name, modules, &mut order);
        order.pop();
        text.push_str(&module.path);
        text.push(':');
        for needed in order.iter().rev().filter_map(|name| modules.get(*name)) {
            text.push(' ');
            text.push_str(&needed.path);
        }
        text.push('\n');
    }
    text
}

/// Appends `name` after everything that it needs. The kernel's build allows no circles.
fn collect_needed<'a>(
    name: &'a str,
    modules: &'a BTreeMap<String, Module>,
    order: &mut Vec<&'a str>,
) {
    let Some(module) = modules.get(name) else {
        return;
    };
    for needed in &module.depends {
        if !order.contains(&needed.as_str()) {
            collect_needed(needed, modules, order);
        }
    }
    if !order.contains(&name) {
        order.push(name);
    }
}

/// modules.alias: `alias pattern module`.
fn aliases(modules: &BTreeMap<String, Module>) -> String {
    let mut text = String::new();
    for (name, module) in modules {
        for alias in &module.aliases {
            text.push_str(&format!("alias {alias} {name}\n"));
            for (_, companion) in COMPANIONS.iter().filter(|(driver, _)| driver == name) {
                text.push_str(&format!("alias {alias} {companion}\n"));
            }
        }
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    fn module(path: &str, depends: &[&str], aliases: &[&str]) -> (String, Module) {
        let owned = |list: &[&str]| list.iter().map(|item| (*item).to_owned()).collect();
        let module = Module {
            path: path.to_owned(),
            content: Vec::new(),
            depends: owned(depends),
            aliases: owned(aliases),
        };
        (module_name(path), module)
    }

    #[test]
    fn dependencies_are_whole_and_in_order() {
        let modules = BTreeMap::from([
            module("k/a.ko", &["b", "c"], &[]),
            module("k/b.ko", &["c", "d"], &[]),
            module("k/c.ko", &["d"], &[]),
            module("k/d.ko", &["built_in"], &[]),
        ]);
        let expected =
            "k/a.ko: k/b.ko k/c.ko k/d.ko\nk/b.ko: k/c.ko k/d.ko\nk/c.ko: k/d.ko\nk/d.ko:\n";
        assert_eq!(dependencies(&modules), expected);
    }

    #[test]
    fn disks_come_with_their_controller() {
        let modules = BTreeMap::from([
            module("k/ahci.ko", &[], &["pci:v*bc01sc06i01*"]),
            module("k/sd-mod.ko", &[], &["scsi:t-0x00*"]),
        ]);
        let text = aliases(&modules);
        let expected = "alias pci:v*bc01sc06i01* ahci\nalias pci:v*bc01sc06i01* sd_mod\n\
            alias scsi:t-0x00* sd_mod\n";
        assert_eq!(text, expected);
    }

    #[test]
    fn names_are_the_kernels() {
        assert_eq!(
            module_name("kernel/drivers/vfio/pci/vfio-pci.ko.xz"),
            "vfio_pci"
        );
        assert_eq!(module_name("sd_mod"), "sd_mod");
    }
}

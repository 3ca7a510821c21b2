//! Loads kernel modules, from the lists that depmod(8) defines (modules.dep(5)).

use std::collections::{HashMap, HashSet};
use std::fs::{self, File};
use std::io;
use std::path::{Path, PathBuf};

use crate::sys;

/// The modules of the running kernel.
pub struct Modules {
    dir: PathBuf,
    /// Module name to its file and those that it needs, the first needed first.
    files: HashMap<String, Vec<String>>,
    /// Pattern of a device's modalias, and the module for it.
    aliases: Vec<(String, String)>,
    loaded: HashSet<String>,
}

impl Modules {
    /// Reads the lists below `dir` (`/lib/modules/RELEASE`).
    pub fn read(dir: &Path) -> io::Result<Self> {
        Ok(Self {
            dir: dir.to_owned(),
            files: parse_dependencies(&fs::read_to_string(dir.join("modules.dep"))?),
            aliases: parse_aliases(&fs::read_to_string(dir.join("modules.alias"))?),
            loaded: HashSet::new(),
        })
    }

    /// Loads the modules for all devices that a bus has now, and says what could not be loaded.
    pub fn load_for_bus(&mut self, bus: &str) -> Vec<String> {
        let mut problems = Vec::new();
        let Ok(devices) = fs::read_dir(format!("/sys/bus/{bus}/devices")) else {
            return problems;
        };
        for device in devices.flatten() {
            let Ok(modalias) = fs::read_to_string(device.path().join("modalias")) else {
                continue;
            };
            for name in self.modules_for(modalias.trim()) {
                if let Err(error) = self.load(&name) {
                    problems.push(format!("module {name}: {error}"));
                }
            }
        }
        problems
    }

    fn modules_for(&self, modalias: &str) -> Vec<String> {
        let matching = self
            .aliases
            .iter()
            .filter(|(pattern, _)| glob(pattern, modalias));
        matching.map(|(_, name)| name.clone()).collect()
    }

    fn load(&mut self, name: &str) -> io::Result<()> {
        let files = self
            .files
            .get(name)
            .cloned()
            .ok_or(io::ErrorKind::NotFound)?;
        for file in files {
            if !self.loaded.contains(&file) {
                sys::load_module(&File::open(self.dir.join(&file))?)?;
                self.loaded.insert(file);
            }
        }
        Ok(())
    }
}

/// `file: needed needed ...`, where a module comes before those that it needs.
fn parse_dependencies(text: &str) -> HashMap<String, Vec<String>> {
    let mut all = HashMap::new();
    for line in text.lines() {
        if let Some((file, needed)) = line.split_once(':') {
            let needed = needed.split_whitespace().map(str::to_owned);
            let mut files: Vec<String> = [file.to_owned()].into_iter().chain(needed).collect();
            files.reverse();
            all.insert(module_name(file), files);
        }
    }
    all
}

/// `alias pattern module`
fn parse_aliases(text: &str) -> Vec<(String, String)> {
    let parse = |line: &str| {
        let mut words = line.strip_prefix("alias ")?.split_whitespace();
        Some((words.next()?.to_owned(), words.next()?.replace('-', "_")))
    };
    text.lines().filter_map(parse).collect()
}

/// A file's name without folders and ending; the kernel takes `-` and `_` for the same.
fn module_name(file: &str) -> String {
    let name = file.rsplit('/').next().unwrap_or(file);
    name.split('.').next().unwrap_or(name).replace('-', "_")
}

/// Whether `text` matches a pattern in which `*` stands for anything.
fn glob(pattern: &str, text: &str) -> bool {
    let mut parts = pattern.split('*');
    let Some(mut rest) = parts.next().and_then(|first| text.strip_prefix(first)) else {
        return false;
    };
    let mut last = None;
    for part in parts {
        last = Some(part);
        match rest.find(part) {
            Some(at) => rest = &rest[at + part.len()..],
            None => return false,
        }
    }
    match last {
        // No star at all: the whole text must have matched.
        None => rest.is_empty(),
        // The last part must be at the end; an earlier find of it does not count against that.
        Some(part) => rest.is_empty() || text.ends_with(part),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn dependencies_come_first() {
        let files =
            parse_dependencies("k/virtio-net.ko: k/net_failover.ko k/failover.ko\nk/x.ko:\n");
        let order = ["k/failover.ko", "k/net_failover.ko", "k/virtio-net.ko"];
        assert_eq!(files["virtio_net"], order);
        assert_eq!(files["x"], ["k/x.ko"]);
    }

    #[test]
    fn aliases_match_like_depmods() {
        let aliases = parse_aliases("# x\nalias pci:v*d*sv*sd*bc01sc06i01* ahci\nalias a\n");
        assert_eq!(aliases.len(), 1);
        let pattern = &aliases[0].0;
        assert!(glob(
            pattern,
            "pci:v00008086d00002922sv00001AF4sd00001100bc01sc06i01"
        ));
        assert!(!glob(
            pattern,
            "pci:v00008086d00002922sv00001AF4sd00001100bc01sc08i02"
        ));
        assert!(glob("virtio:d00000001v*", "virtio:d00000001v00001AF4"));
        assert!(!glob("virtio:d00000001v*", "virtio:d00000013v00001AF4"));
        assert!(glob("a*b", "axbxb") && glob("a", "a") && !glob("a", "ab") && !glob("a*b", "abc"));
    }
}

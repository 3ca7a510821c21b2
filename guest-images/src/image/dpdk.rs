//! DPDK's testpmd, for images that are to have it.
//!
//! testpmd is bound to the drivers of several network cards, whose own commands it has. Those that
//! it shall use are loaded when it starts, from one folder (DPDK Programmer's Guide, "Environment
//! Abstraction Layer": the default is compiled in); only what a guest of ours can use is put there.

use std::fs;
use std::path::Path;

use super::programs::LIBRARY_DIR;
use crate::{Error, Result};

/// The package; it depends on every library and driver of DPDK.
pub(super) const PACKAGE: &str = "dpdk-dev";

/// The program that is taken from it.
pub(super) const PROGRAM: &str = "dpdk-testpmd";

/// PCI functions through vfio, virtual devices without hardware, memory pools, virtio-net.
const DRIVERS: [&str; 5] = [
    "librte_bus_pci",
    "librte_bus_vdev",
    "librte_mempool_ring",
    "librte_net_null",
    "librte_net_virtio",
];

/// A driver that is loaded when a program starts.
#[derive(Debug, PartialEq, Eq)]
pub(super) struct Driver {
    /// Its file among the libraries: the name by which programs are bound to it.
    pub(super) library: String,
    /// Its path in the drivers' folder, under the name that DPDK looks for.
    pub(super) link: String,
}

impl Driver {
    /// What the link points to.
    pub(super) fn target(&self) -> String {
        format!("../../{}", self.library)
    }
}

/// The drivers in the packages that were unpacked below `root`.
pub(super) fn drivers(root: &Path) -> Result<Vec<Driver>> {
    let below = format!("{LIBRARY_DIR}/dpdk");
    let names = |dir: &Path| -> Result<Vec<String>> {
        let entries = fs::read_dir(dir).map_err(Error::io("read", dir))?;
        let names = entries.filter_map(|entry| entry.ok()?.file_name().into_string().ok());
        Ok(names.collect())
    };
    // Its name has the version of DPDK's binary interface, as have the files: `pmds-25.0` holds
    // `librte_net_virtio.so.25.0`.
    let folders = names(&root.join(&below))?;
    let [folder] = folders.as_slice() else {
        return Err(Error::malformed("dpdk", "has no one folder of drivers"));
    };
    let version = folder.strip_prefix("pmds-").unwrap_or_default();
    let present = names(&root.join(&below).join(folder))?;
    let driver = |name: &&str| {
        let file = format!("{name}.so.{version}");
        if !present.contains(&file) {
            return Err(Error::malformed(file, "is not in DPDK's packages"));
        }
        let (major, _) = version.split_once('.').unwrap_or((version, ""));
        Ok(Driver {
            library: format!("{name}.so.{major}"),
            link: format!("{below}/{folder}/{file}"),
        })
    };
    DRIVERS.iter().map(driver).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn drivers_are_found_by_their_version_or_missed() {
        let temp = tempfile::tempdir().unwrap();
        assert!(drivers(temp.path()).is_err(), "there is no folder");
        let folder = temp.path().join(LIBRARY_DIR).join("dpdk/pmds-23.1");
        fs::create_dir_all(&folder).unwrap();
        for name in DRIVERS {
            fs::write(folder.join(format!("{name}.so.23.1")), b"").unwrap();
        }
        let found = drivers(temp.path()).unwrap();
        assert_eq!(found.len(), DRIVERS.len());
        assert_eq!(found[0].library, "librte_bus_pci.so.23");
        assert_eq!(found[0].target(), "../../librte_bus_pci.so.23");
        assert_eq!(
            found[0].link,
            format!("{LIBRARY_DIR}/dpdk/pmds-23.1/librte_bus_pci.so.23.1")
        );
        fs::remove_file(folder.join("librte_net_virtio.so.23.1")).unwrap();
        let error = drivers(temp.path()).unwrap_err().to_string();
        assert!(error.contains("librte_net_virtio.so.23.1"), "{error}");
    }
}

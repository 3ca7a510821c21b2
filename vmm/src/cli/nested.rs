//! The same command in a nested host: what has to be carried across, and how.
//!
//! The guest's machine is made inside by the same program, from a TOML file in the runtime folder.
//! Files are read through the nested host's view of this machine; images are attached as block
//! devices, with the locks held out here; the control and vsock sockets appear out here under the
//! paths that others look for.

use std::collections::HashMap;
use std::ffi::OsString;
use std::fs::{self, File};
use std::io;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use devices::block::{FileBackend, FileOptions};
use guest_images::lab::{self, Exit, LabCommand, LabDisk, LabSpec};
use guest_images::{CacheDir, progress};

use super::{Done, Failure};
use crate::config::{Accel, BadInput, BootFiles, Checked, MachineConfig, Serial, VsockConfig};
use crate::control::RuntimeDir;
use crate::machine::{SerialMode, Storage};

/// What the nested host's kernel, its page cache and QEMU's view of them take, in MiB.
const OWN_MEMORY: u32 = 1024;

/// Runs the guest in a nested host of its own, to the end.
pub(super) fn run(
    config: &MachineConfig,
    checked: &Checked,
    boot: &BootFiles,
    runtime: &RuntimeDir,
) -> Done {
    let inside = inside_config(config, checked, boot, runtime)?;
    let file = runtime.path().join("machine.toml");
    fs::write(&file, inside.to_toml())?;

    let mut spec = LabSpec::new()?;
    spec.memory_mib = u32::try_from(checked.memory >> 20)
        .unwrap_or(u32::MAX)
        .saturating_add(OWN_MEMORY);
    // The locks live as long as these do.
    let (disks, _locks) = disks(checked)?;
    spec.disks = disks;
    if let Some(Serial(SerialMode::File(path))) = &inside.serial {
        spec.writable_dirs.extend(path.parent().map(Path::to_owned));
    }
    if let Some(trace) = inside.iommu.as_ref().and_then(|iommu| iommu.trace.as_ref()) {
        spec.writable_dirs
            .extend(trace.parent().map(Path::to_owned));
    }

    let executable = std::env::current_exe()?;
    let mut argv: Vec<OsString> = vec![executable.into(), "run".into(), "--config".into()];
    argv.push(file.into());
    argv.push("--no-runtime-folder".into());
    let mut command = LabCommand::new(argv)?;
    command.sockets.extend(inside.control);
    if let Some(socket) = inside.vsock.and_then(|vsock| vsock.socket) {
        command.outward.push(socket.clone());
        command.sockets.push(socket);
    }
    in_lab(spec, command)
}

/// Runs a command in a nested host and ends as it ends.
pub(super) fn in_lab(spec: LabSpec, command: LabCommand) -> Done {
    let cache = CacheDir::discover().map_err(Failure::other)?;
    let progress = progress::on_stderr();
    match lab::run(spec, command, &cache, &*progress) {
        Ok(finished) => {
            if let Exit::Signal(_) = finished.exit {
                super::complain(&format!(
                    "the process in the nested host was ended by {}{}",
                    finished.exit,
                    lab::last_messages(&finished.log)
                ));
            }
            Ok(finished.exit.code())
        }
        Err(error) => {
            super::complain(&error.to_string());
            Ok(error.code())
        }
    }
}

/// The configuration for the inside: nothing left to find out, every path absolute.
fn inside_config(
    config: &MachineConfig,
    checked: &Checked,
    boot: &BootFiles,
    runtime: &RuntimeDir,
) -> io::Result<MachineConfig> {
    let absolute = |path: &Path| std::path::absolute(path);
    let mut inside = config.clone();
    inside.name = Some(checked.name.to_string());
    inside.accel = Some(Accel::Kvm);
    inside.image = None;
    inside.kernel = Some(absolute(&boot.kernel)?);
    inside.initrd = boot.initrd.as_deref().map(absolute).transpose()?;
    inside.cmdline = Some(boot.cmdline.clone());
    inside.control = Some(match &checked.control {
        Some(path) => absolute(path)?,
        None => runtime.control(),
    });
    if let Some(vsock) = &checked.vsock {
        inside.vsock = Some(VsockConfig {
            enabled: None,
            cid: Some(vsock.cid),
            socket: Some(match &vsock.socket {
                Some(path) => absolute(path)?,
                None => runtime.vsock(),
            }),
        });
    }
    if let SerialMode::File(path) = &checked.serial {
        inside.serial = Some(Serial(SerialMode::File(absolute(path)?)));
    }
    if let Some(iommu) = &mut inside.iommu {
        iommu.trace = iommu.trace.as_deref().map(absolute).transpose()?;
    }
    for namespace in inside.nvme.iter_mut().flat_map(|nvme| &mut nvme.namespace) {
        namespace.path = namespace.path.as_deref().map(absolute).transpose()?;
    }
    Ok(inside)
}

/// The disk images, opened and locked as the guest's machine would.
fn disks(checked: &Checked) -> Result<(Vec<LabDisk>, Vec<Arc<FileBackend>>), Failure> {
    let mut disks: HashMap<PathBuf, LabDisk> = HashMap::new();
    let mut locks = Vec::new();
    for namespace in checked.nvme.iter().flat_map(|nvme| &nvme.namespaces) {
        let Storage::File {
            path, read_only, ..
        } = &namespace.storage
        else {
            continue;
        };
        let mut options = FileOptions::new(path);
        options.read_only = *read_only;
        let option = || format!("--nvme path={}", path.display());
        let lock = FileBackend::open(&options)
            .map_err(|error| BadInput::new(option(), error.to_string()))?;
        locks.push(lock);
        let path = std::path::absolute(path)?;
        let file = File::options().read(true).write(!read_only).open(&path)?;
        let disk = LabDisk {
            path: path.clone(),
            file,
            readonly: *read_only,
        };
        disks.insert(path, disk);
    }
    Ok((disks.into_values().collect(), locks))
}

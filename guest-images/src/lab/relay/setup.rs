//! Makes the nested host look like the machine. The initramfs has mounted the root, `/proc`,
//! `/sys` and `/dev` already.

use std::fs;
use std::io;
use std::os::fd::OwnedFd;
use std::os::unix::ffi::OsStrExt;
use std::path::{Path, PathBuf};
use std::thread;
use std::time::{Duration, Instant};

use rustix::event::{PollFd, PollFlags, Timespec};
use rustix::fs::{Mode, OFlags};
use rustix::mount::MountFlags;
use rustix::process::{Pid, Resource, Rlimit, WaitOptions};

use crate::lab::image::{MODULES_PID, NINE_P_OPTIONS};
use crate::lab::qemu::PORT_NAME;
use crate::lab::sockets::parent_of;
use crate::lab::wire::{DiskNode, Setup, Share};

/// How long a device may take to appear, or the outside to open its end.
const PATIENCE: Duration = Duration::from_secs(30);

/// Opens the virtio-serial port that leads outside.
///
/// # Errors
/// There is none, or the outside does not open its end.
pub(super) fn open_wire() -> io::Result<OwnedFd> {
    let node = wait_for(|| {
        let names = fs::read_dir("/sys/class/virtio-ports").ok()?;
        names.filter_map(Result::ok).find_map(|port| {
            let name = fs::read_to_string(port.path().join("name")).ok()?;
            let node = Path::new("/dev").join(port.file_name());
            (name.trim_end() == PORT_NAME && node.exists()).then_some(node)
        })
    });
    let node = node.ok_or_else(|| io::Error::other("no virtio-serial port leads outside"))?;
    let flags = OFlags::RDWR | OFlags::NONBLOCK | OFlags::CLOEXEC | OFlags::NOCTTY;
    let port = rustix::fs::open(node, flags, Mode::empty())?;
    // Until the kernel knows that the other end is open, the port looks closed.
    let connected = wait_for(|| {
        let mut fds = [PollFd::new(&port, PollFlags::IN)];
        rustix::event::poll(&mut fds, Some(&Timespec::default())).ok()?;
        let hung_up = fds.iter().any(|fd| fd.revents().contains(PollFlags::HUP));
        (!hung_up).then_some(())
    });
    connected.ok_or_else(|| io::Error::other("the outside does not open its end"))?;
    Ok(port)
}

/// Does what `setup` says, and what needs no saying.
pub(super) fn apply(setup: &Setup) -> Result<(), String> {
    wait_for_modules()?;
    if !Path::new("/dev/kvm").exists() {
        return Err("the nested host has no /dev/kvm".into());
    }
    raise_limits();
    // The start was quiet because a serial line is slow. What the kernel says from now on is about
    // trouble: faults, processes killed for want of memory, KVM's complaints.
    fs::write("/proc/sys/kernel/printk", "7")
        .map_err(|error| format!("cannot have the kernel's messages: {error}"))?;
    rustix::system::sethostname(setup.hostname.as_bytes())
        .map_err(|error| format!("cannot set the host name: {error}"))?;
    for share in &setup.shares {
        mount_share(share).map_err(|error| {
            format!(
                "cannot mount the writable folder {}: {error}",
                share.path.display()
            )
        })?;
    }
    for disk in &setup.disks {
        bind_disk(disk)
            .map_err(|error| format!("cannot attach the disk {}: {error}", disk.path.display()))?;
    }
    Ok(())
}

/// Writes everything out and ends the nested host.
pub(super) fn power_off() {
    rustix::fs::sync();
    // QEMU runs with -no-reboot. A failure ends the first process, which ends the host as well.
    let _ = rustix::system::reboot(rustix::system::RebootCommand::Restart);
}

/// The initramfs loads what is not needed for the root in the background.
fn wait_for_modules() -> Result<(), String> {
    let pid = std::env::var(MODULES_PID)
        .ok()
        .and_then(|text| text.parse().ok())
        .and_then(Pid::from_raw)
        .ok_or("the initramfs does not say who loads the modules")?;
    match rustix::process::waitpid(Some(pid), WaitOptions::empty()) {
        Ok(Some((_, status))) if status.exit_status() == Some(0) => Ok(()),
        Ok(_) => Err("a kernel module cannot be loaded".into()),
        Err(error) => Err(format!("cannot wait for the modules: {error}")),
    }
}

/// The first process starts with limits that are lower than those of any login.
fn raise_limits() {
    const FILES: u64 = 1 << 20;
    let limit = |value| Rlimit {
        current: value,
        maximum: value,
    };
    // With the old limits commands still run; one that needs more says so itself.
    let _ = rustix::process::setrlimit(Resource::Nofile, limit(Some(FILES)));
    let _ = rustix::process::setrlimit(Resource::Memlock, limit(None));
}

fn mount_share(share: &Share) -> io::Result<()> {
    fs::create_dir_all(&share.path)?;
    let options = std::ffi::CString::new(format!("{NINE_P_OPTIONS},cache=mmap"))?;
    Ok(rustix::mount::mount(
        share.tag.as_str(),
        Path::new(&share.path),
        "9p",
        MountFlags::empty(),
        options.as_c_str(),
    )?)
}

fn bind_disk(disk: &DiskNode) -> io::Result<()> {
    let node = wait_for(|| block_device(&disk.serial))
        .ok_or_else(|| io::Error::new(io::ErrorKind::NotFound, "the device does not appear"))?;
    let path = Path::new(&disk.path);
    if !path.exists() {
        // Below one of the folders that the nested host has for itself, such as /dev/shm.
        fs::create_dir_all(parent_of(path))?;
        fs::write(path, b"")?;
    }
    Ok(rustix::mount::mount_bind(&node, path)?)
}

fn block_device(serial: &str) -> Option<PathBuf> {
    fs::read_dir("/sys/block")
        .ok()?
        .filter_map(Result::ok)
        .find_map(|device| {
            let found = fs::read_to_string(device.path().join("serial")).ok()?;
            let node = Path::new("/dev").join(device.file_name());
            (found.trim_end() == serial && node.exists()).then_some(node)
        })
}

/// Devices announce themselves without an event that could be waited for this early.
fn wait_for<T>(mut look: impl FnMut() -> Option<T>) -> Option<T> {
    let until = Instant::now() + PATIENCE;
    loop {
        if let Some(found) = look() {
            return Some(found);
        }
        if Instant::now() >= until {
            return None;
        }
        thread::sleep(Duration::from_millis(5));
    }
}

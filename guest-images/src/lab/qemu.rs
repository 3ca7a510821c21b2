//! QEMU's command line and its process.

use std::ffi::{OsStr, OsString};
use std::fs::File;
use std::io;
use std::os::fd::{AsRawFd, BorrowedFd, OwnedFd, RawFd};
use std::os::unix::ffi::{OsStrExt, OsStringExt};
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Command, ExitStatus, Stdio};
use std::sync::mpsc;
use std::thread::{self, JoinHandle};
use std::time::{Duration, Instant};

use rustix::fs::{MemfdFlags, OFlags};
use rustix::io::FdFlags;
use rustix::net::{AddressFamily, SocketFlags, SocketType};
use rustix::pipe::PipeFlags;
use rustix::process::{Pid, PidfdFlags, Signal};

use super::image::LabImage;
use super::{LabError, LabSpec};
use crate::image::cpio::Tree;

/// Name of the virtio-serial port that leads outside.
pub(super) const PORT_NAME: &str = "org.ringside.lab";

/// The nested kernel's command line: nothing that costs a start under TCG time, no probing of
/// clocks that a busy machine would get wrong, and an end at a panic or an oops: a kernel that has
/// lost a thread in KVM can only be told from a guest that hangs by its last messages.
const KERNEL_ARGS: &str = "console=ttyS0 quiet panic=-1 oops=panic mitigations=off nokaslr audit=0 \
    tsc=reliable no_timer_check rcupdate.rcu_expedited=1 cryptomgr.notests random.trust_cpu=on";

/// How many folders and disks fit on the nested host's PCI bus.
pub(super) const MAX_DEVICES: usize = 24;

/// A writable folder.
#[derive(Debug)]
pub(super) struct ShareDevice {
    pub(super) tag: String,
    pub(super) path: PathBuf,
}

/// A disk image.
#[derive(Debug)]
pub(super) struct DiskDevice {
    pub(super) serial: String,
    pub(super) file: OwnedFd,
    pub(super) readonly: bool,
}

/// A running QEMU.
#[derive(Debug)]
pub(super) struct Qemu {
    pidfd: OwnedFd,
    waiter: JoinHandle<io::Result<ExitStatus>>,
}

/// The outside's ends of what is connected to QEMU.
#[derive(Debug)]
pub(super) struct Ends {
    /// The virtio-serial port.
    pub(super) wire: OwnedFd,
    /// The nested host's console.
    pub(super) console: OwnedFd,
    /// QEMU's standard output and error.
    pub(super) messages: OwnedFd,
}

impl Qemu {
    /// Starts QEMU. It ends when it is killed, when its machine does, or with this process.
    pub(super) fn start(
        image: &LabImage,
        spec: &LabSpec,
        shares: &[ShareDevice],
        disks: Vec<DiskDevice>,
    ) -> Result<(Self, Ends), LabError> {
        let start = |what: &'static str| move |source: io::Error| LabError::Start { what, source };
        let (wire, wire_inside) = socket_pair().map_err(start("connect QEMU"))?;
        let (console, console_inside) = socket_pair().map_err(start("connect QEMU"))?;
        let (messages, messages_inside) = rustix::pipe::pipe_with(PipeFlags::CLOEXEC)
            .map_err(|error| start("connect QEMU")(error.into()))?;
        set_nonblocking(&messages).map_err(start("connect QEMU"))?;
        let initramfs = initramfs(image, spec).map_err(start("make its initramfs"))?;

        let connections = Connections {
            wire: wire_inside.as_raw_fd(),
            console: console_inside.as_raw_fd(),
            initramfs: initramfs.as_raw_fd(),
            disks: disks
                .iter()
                .map(|disk| (disk.serial.clone(), disk.file.as_raw_fd(), disk.readonly))
                .collect(),
            tsc_khz: tsc_khz(),
        };
        let mut command = image.program("qemu-system-x86_64");
        command.args(arguments(image, spec, shares, &connections));
        let error_output = messages_inside.try_clone().map_err(start("connect QEMU"))?;
        command
            .stdin(Stdio::null())
            .stdout(messages_inside)
            .stderr(error_output)
            // Ctrl-C on the terminal is for the command inside, not for QEMU.
            .process_group(0);
        let mut inherited: Vec<OwnedFd> = vec![wire_inside, console_inside, initramfs.into()];
        inherited.extend(disks.into_iter().map(|disk| disk.file));
        prepare_child(
            &mut command,
            inherited.iter().map(AsRawFd::as_raw_fd).collect(),
        );

        let (started, start_result) = mpsc::channel();
        // The parent-death signal is bound to the thread that forks, so that thread must live as
        // long as QEMU may.
        let waiter = thread::Builder::new()
            .name("lab-qemu".into())
            .spawn(move || {
                let result = command.spawn().and_then(|child| {
                    let pidfd =
                        rustix::process::pidfd_open(Pid::from_child(&child), PidfdFlags::empty())?;
                    Ok((child, pidfd))
                });
                drop(inherited);
                // The command holds the other ends of the message pipe.
                drop(command);
                let mut child = match result {
                    Ok((child, pidfd)) => {
                        // Nobody waits any more only if the starter has died.
                        let _ = started.send(Ok(pidfd));
                        child
                    }
                    Err(error) => {
                        let copy = io::Error::new(error.kind(), error.to_string());
                        let _ = started.send(Err(error));
                        return Err(copy);
                    }
                };
                child.wait()
            })
            .map_err(start("make a thread"))?;
        let pidfd = start_result
            .recv()
            .unwrap_or_else(|error| Err(io::Error::other(error)))
            .map_err(start("start QEMU"))?;
        let ends = Ends {
            wire,
            console,
            messages,
        };
        Ok((Self { pidfd, waiter }, ends))
    }

    /// A handle with which anybody can kill QEMU.
    pub(super) fn killer(&self) -> io::Result<Killer> {
        Ok(Killer(Some(self.pidfd.try_clone()?)))
    }

    /// Waits for the end of QEMU.
    pub(super) fn wait(self) -> io::Result<ExitStatus> {
        self.waiter
            .join()
            .unwrap_or_else(|_| Err(io::Error::other("the thread that waits for QEMU panicked")))
    }
}

/// Kills a nested host.
#[derive(Debug)]
pub(super) struct Killer(Option<OwnedFd>);

impl Killer {
    /// For a relay without a nested host.
    #[cfg(test)]
    pub(super) fn none() -> Self {
        Self(None)
    }

    /// Another handle of the same nested host.
    pub(super) fn try_clone(&self) -> io::Result<Self> {
        let pidfd = self.0.as_ref().map(OwnedFd::try_clone).transpose()?;
        Ok(Self(pidfd))
    }

    /// Kills it, if it still lives.
    pub(super) fn kill(&self) {
        if let Some(pidfd) = &self.0 {
            // It fails only if QEMU has ended already.
            let _ = rustix::process::pidfd_send_signal(pidfd, Signal::KILL);
        }
    }
}

/// Lets the child have some descriptors, and makes it die with the parent.
#[expect(unsafe_code, reason = "Command::pre_exec")]
fn prepare_child(command: &mut Command, inherited: Vec<RawFd>) {
    let parent = rustix::process::getpid();
    let prepare = move || {
        rustix::process::set_parent_process_death_signal(Some(Signal::KILL))?;
        if rustix::process::getppid() != Some(parent) {
            // The parent died before it could be bound to.
            return Err(io::ErrorKind::BrokenPipe.into());
        }
        for &fd in &inherited {
            // SAFETY: the numbers are those of descriptors that live in the parent at least until
            // the fork, so they are open here.
            let fd = unsafe { BorrowedFd::borrow_raw(fd) };
            rustix::io::fcntl_setfd(fd, FdFlags::empty())?;
        }
        Ok(())
    };
    // SAFETY: between fork and exec the closure only makes system calls: it allocates nothing and
    // takes no lock.
    unsafe {
        command.pre_exec(prepare);
    }
}

fn socket_pair() -> io::Result<(OwnedFd, OwnedFd)> {
    let (outside, inside) = rustix::net::socketpair(
        AddressFamily::UNIX,
        SocketType::STREAM,
        SocketFlags::CLOEXEC,
        None,
    )?;
    set_nonblocking(&outside)?;
    Ok((outside, inside))
}

fn set_nonblocking(fd: &OwnedFd) -> io::Result<()> {
    let flags = rustix::fs::fcntl_getfl(fd)?;
    Ok(rustix::fs::fcntl_setfl(fd, flags | OFlags::NONBLOCK)?)
}

/// The image's initramfs with the relay's command line added.
fn initramfs(image: &LabImage, spec: &LabSpec) -> io::Result<File> {
    let mut tree = Tree::default();
    let argv = std::iter::once(spec.relay.executable.as_os_str())
        .chain(spec.relay.arguments.iter().map(OsString::as_os_str));
    tree.file("relay.sh", 0o644, shell_parameters(argv));
    let mut file = File::from(rustix::fs::memfd_create("initramfs", MemfdFlags::CLOEXEC)?);
    io::copy(&mut File::open(image.initramfs())?, &mut file)?;
    // Archives after one another are one initramfs.
    tree.write(&mut file)?;
    Ok(file)
}

/// A line of shell that sets the positional parameters.
fn shell_parameters<'a>(words: impl Iterator<Item = &'a OsStr>) -> Vec<u8> {
    let mut line = b"set --".to_vec();
    for word in words {
        line.extend_from_slice(b" '");
        for &byte in word.as_bytes() {
            match byte {
                b'\'' => line.extend_from_slice(b"'\\''"),
                _ => line.push(byte),
            }
        }
        line.push(b'\'');
    }
    line.push(b'\n');
    line
}

/// What QEMU's command line tells of this process: numbers of inherited descriptors, and a clock.
#[derive(Debug)]
struct Connections {
    wire: RawFd,
    console: RawFd,
    initramfs: RawFd,
    disks: Vec<(String, RawFd, bool)>,
    /// Frequency of the time-stamp counter, which is the machine's own under TCG.
    tsc_khz: Option<u64>,
}

fn arguments(
    image: &LabImage,
    spec: &LabSpec,
    shares: &[ShareDevice],
    connections: &Connections,
) -> Vec<OsString> {
    let mut arguments: Vec<OsString> = Vec::new();
    let mut add = |words: &[&str]| arguments.extend(words.iter().map(OsString::from));
    add(&[
        "-nodefaults",
        "-no-user-config",
        "-display",
        "none",
        "-no-reboot",
    ]);
    add(&[
        "-sandbox",
        "on,obsolete=deny,elevateprivileges=deny,spawn=deny,resourcecontrol=deny",
    ]);
    add(&["-machine", "q35,usb=off,vmport=off,hpet=off,smm=off"]);
    add(&["-accel", "tcg,thread=multi,tb-size=512"]);
    add(&["-cpu", "EPYC,+svm,+npt"]);
    add(&["-smp", &spec.cpus.to_string()]);
    add(&["-m", &format!("{}M", spec.memory_mib)]);
    add(&["-bios", "qboot.rom"]);
    add(&[
        "-initrd",
        &format!("/proc/self/fd/{}", connections.initramfs),
    ]);
    let mut append = KERNEL_ARGS.to_owned();
    if let Some(frequency) = connections.tsc_khz {
        append.push_str(&format!(" tsc_early_khz={frequency}"));
    }
    for argument in &spec.options.kernel_args {
        append.push(' ');
        append.push_str(argument);
    }
    add(&["-append", &append]);
    add(&[
        "-chardev",
        &format!("socket,id=console,fd={}", connections.console),
    ]);
    add(&["-serial", "chardev:console"]);
    add(&[
        "-chardev",
        &format!("socket,id=wire,fd={}", connections.wire),
    ]);
    add(&["-device", "virtio-serial-pci,max_ports=2"]);
    add(&[
        "-device",
        &format!("virtserialport,chardev=wire,name={PORT_NAME}"),
    ]);
    for (number, (serial, fd, readonly)) in connections.disks.iter().enumerate() {
        let readonly = if *readonly { "on" } else { "off" };
        add(&["-add-fd", &format!("fd={fd},set={number}")]);
        // The image is locked by whoever opened it, and the descriptor keeps that lock.
        add(&[
            "-blockdev",
            &format!(
                "driver=raw,node-name={serial},read-only={readonly},discard=unmap,\
                 detect-zeroes=off,file.driver=file,file.filename=/dev/fdset/{number},\
                 file.locking=off,file.read-only={readonly},file.discard=unmap"
            ),
        ]);
        add(&[
            "-device",
            &format!("virtio-blk-pci,drive={serial},serial={serial},werror=report,rerror=report"),
        ]);
    }
    let mut share = |tag: &str, path: &Path, options: &str| {
        let mut value =
            OsString::from(format!("local,id={tag},security_model=none,{options}path="));
        value.push(escape_commas(path.as_os_str()));
        arguments.extend(["-fsdev".into(), value]);
        let device = format!("virtio-9p-pci,fsdev={tag},mount_tag={tag}");
        arguments.extend(["-device".into(), device.into()]);
    };
    share("root", Path::new("/"), "readonly=on,multidevs=remap,");
    for device in shares {
        share(&device.tag, &device.path, "multidevs=remap,");
    }
    for firmware in image.firmware() {
        arguments.extend(["-L".into(), firmware.into()]);
    }
    arguments.extend(["-kernel".into(), image.kernel().into()]);
    arguments.extend(spec.options.qemu_args.iter().cloned());
    arguments
}

/// Measures the time-stamp counter. The nested kernel would measure it against an emulated timer:
/// on a busy machine its clock then ran several times too fast.
fn tsc_khz() -> Option<u64> {
    let (before, start) = time_and_tsc()?;
    thread::sleep(Duration::from_millis(10));
    let (after, end) = time_and_tsc()?;
    let microseconds = u64::try_from(after.duration_since(before).as_micros()).ok()?;
    let ticks = end.checked_sub(start)?.checked_mul(1000)?;
    ticks.checked_div(microseconds).filter(|khz| *khz > 0)
}

/// A time and the counter at that time, the closest of a few tries.
#[expect(unsafe_code, reason = "reading the time-stamp counter")]
fn time_and_tsc() -> Option<(Instant, u64)> {
    let sample = |_| {
        let before = Instant::now();
        // SAFETY: every x86-64 processor has RDTSC, and Linux lets programs use it unless they
        // forbid it to themselves (PR_SET_TSC), which this one does not.
        let tsc = unsafe { core::arch::x86_64::_rdtsc() };
        (before.elapsed(), before, tsc)
    };
    let closest = (0..50).map(sample).min_by_key(|(width, _, _)| *width)?;
    Some((closest.1, closest.2))
}

/// QEMU's option syntax writes a comma in a value as two.
fn escape_commas(value: &OsStr) -> OsString {
    let mut escaped = Vec::with_capacity(value.len());
    for &byte in value.as_bytes() {
        escaped.push(byte);
        if byte == b',' {
            escaped.push(b',');
        }
    }
    OsString::from_vec(escaped)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_counters_frequency_is_measured_alike_twice() {
        let (first, second) = (tsc_khz().unwrap(), tsc_khz().unwrap());
        assert!(
            first > 100_000 && first.abs_diff(second) < first / 100,
            "{first} {second}"
        );
    }

    #[test]
    fn quoting_survives_hostile_names() {
        let words = ["/a b/it's", "$(x)", "\\"];
        let line = shell_parameters(words.iter().map(OsStr::new));
        let script = format!("{}printf '%s|' \"$@\"", String::from_utf8(line).unwrap());
        let output = Command::new("sh").args(["-c", &script]).output().unwrap();
        assert_eq!(
            String::from_utf8(output.stdout).unwrap(),
            "/a b/it's|$(x)|\\|"
        );
        assert_eq!(escape_commas(OsStr::new("a,b")), "a,,b");
    }
}

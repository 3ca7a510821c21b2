//! `ringside run`: starts a guest.

use std::io::{self, Write};
use std::path::PathBuf;

use guest_images::apt::Freshness;

use super::{Done, Failure, here, image, nested};
use crate::boot::is_multiboot;
use crate::config::{
    Accel, BadInput, BootFiles, BootSource, Checked, MachineConfig, check, check_spec,
};
use crate::control::RuntimeDir;
use crate::machine::NetBackendSpec;
use crate::probe::probe;

#[derive(Debug, clap::Args)]
#[command(after_help = "\
Examples:
  ringside run
  ringside run --name lab --vcpus 2 --memory 1G --nvme disk.img --net tap=tap0,pairs=2
  ringside run --kernel bzImage --initrd initrd.img --cmdline 'root=/dev/nvme0n1' --nvme root.img
  ringside run --nvme path=a.img,direct,serial=A --namespace nvme=0,memory=64M --nvme null=1T
  ringside run --accel kvm --kernel tests.elf --test-ports
  ringside run --vcpus 4 --nvme disk.img --print-config > lab.toml; ringside run --config lab.toml

A TOML file has the same names as the flags; [[nvme]], [[nvme.namespace]] and [[net]] are tables, \
[vsock] too. Paths in it are relative to the working folder. A flag wins over the file; devices given \
by flags are added to the file's.

The kernel's command line is `console=ttyS0 panic=-1` (and `quiet` for an image) and what --cmdline \
appends; a parameter that --cmdline sets itself is not set before it. A multiboot kernel's is its file \
name and what --cmdline says.

Exit codes: 0 power-off, 1 error of the host, 2 bad input, 10 reboot, 11 kernel panic, 12 the guest's \
CPU or KVM failed, 13 killed, 128 to 255 a test kernel's result (--test-ports).")]
pub(super) struct RunArgs {
    /// Read a TOML file first
    #[arg(long, value_name = "FILE")]
    config: Option<PathBuf>,

    /// Print flags and file as one TOML text, and start nothing
    #[arg(long)]
    print_config: bool,

    /// Somebody else holds the guest's name: in a nested host, the process outside of it
    #[arg(long, hide = true)]
    no_runtime_folder: bool,

    #[command(flatten)]
    machine: MachineConfig,
}

pub(super) fn main(args: RunArgs) -> Done {
    let file = match &args.config {
        Some(path) => MachineConfig::load(path)?,
        None => MachineConfig::default(),
    };
    let config = args.machine.over(file)?;
    if args.print_config {
        check_spec(&config)?;
        io::stdout().write_all(config.to_toml().as_bytes())?;
        return Ok(0);
    }
    let checked = check(&config)?;
    let accel = choose(&checked)?;
    if args.no_runtime_folder {
        let control = checked.control.clone();
        let control = control.ok_or_else(|| {
            BadInput::new(
                "--no-runtime-folder",
                "needs --control: say where the socket goes",
            )
        })?;
        let vsock = checked.vsock.as_ref().map(|vsock| vsock.socket.clone());
        let Some(vsock) = vsock.map_or(Some(PathBuf::new()), |socket| socket) else {
            return Err(BadInput::new(
                "--no-runtime-folder",
                "needs --vsock socket=PATH, or --vsock off",
            )
            .into());
        };
        return here::run(&checked, &boot(&checked)?, &control, &vsock);
    }
    let runtime = RuntimeDir::create(&checked.name)?;
    let control = checked.control.clone().unwrap_or_else(|| runtime.control());
    let vsock = checked
        .vsock
        .as_ref()
        .map(|vsock| vsock.socket.clone().unwrap_or_else(|| runtime.vsock()));
    runtime.describe(&checked.name, accel, &control, vsock.as_deref())?;
    let boot = boot(&checked)?;
    match accel {
        Accel::Nested => nested::run(&config, &checked, &boot, &runtime),
        _ => here::run(&checked, &boot, &control, &runtime.vsock()),
    }
}

/// Which KVM it will be, never `Auto`. Says it when the user has not.
fn choose(checked: &Checked) -> Result<Accel, Failure> {
    let accel = match checked.accel {
        Accel::Auto => auto(),
        accel => accel,
    };
    let tap = checked.net.iter().find_map(|net| match &net.backend {
        NetBackendSpec::Tap { interface } => Some(interface),
        NetBackendSpec::Loopback => None,
    });
    if let (Accel::Nested, Some(tap)) = (accel, tap) {
        return Err(BadInput::new(
            format!("--net tap={tap}"),
            "the guest would run in a nested host (--accel nested), which does not reach this \
             host's interfaces: use --net loopback, or a host whose KVM can run Linux (see \
             `ringside doctor`)",
        )
        .into());
    }
    Ok(accel)
}

/// What `--accel auto` takes on this host, and says so.
pub(super) fn auto() -> Accel {
    let probe = probe();
    if probe.can_run_linux() {
        super::complain("accel kvm: this host's KVM can run a kernel");
        Accel::Kvm
    } else {
        super::complain(
            "accel nested: this host's KVM cannot run Linux (see `ringside doctor`), so the guest \
             runs in a throw-away host under QEMU: for correctness, not speed",
        );
        Accel::Nested
    }
}

/// The files to boot from; an image is built if it is not there.
pub(super) fn boot(checked: &Checked) -> Result<BootFiles, Failure> {
    let (kernel, initrd, defaults) = match &checked.boot {
        BootSource::Image(name) => {
            let image = image::ready(*name, Freshness::Cached)?;
            // The uncompressed kernel starts sooner; both are the same kernel as shipped.
            let defaults = "console=ttyS0 panic=-1 quiet";
            (image.vmlinux, Some(image.initramfs), defaults)
        }
        BootSource::Files { kernel, initrd } => {
            // Only Linux knows these.
            let defaults = if is_multiboot(kernel) {
                ""
            } else {
                "console=ttyS0 panic=-1"
            };
            (kernel.clone(), initrd.clone(), defaults)
        }
    };
    Ok(BootFiles {
        kernel,
        initrd,
        cmdline: with_defaults(defaults, &checked.cmdline),
    })
}

/// Puts those defaults before the user's parameters whose names are not among them.
fn with_defaults(defaults: &str, user: &str) -> String {
    let name = |parameter: &str| parameter.split('=').next().unwrap_or_default().to_owned();
    let set: Vec<_> = user.split_ascii_whitespace().map(name).collect();
    let mut words: Vec<_> = defaults
        .split_ascii_whitespace()
        .filter(|default| !set.contains(&name(default)))
        .collect();
    words.push(user);
    words.join(" ").trim().to_owned()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_default_gives_way_to_the_users_parameter() {
        let defaults = "console=ttyS0 panic=-1 quiet";
        assert_eq!(with_defaults(defaults, ""), defaults);
        assert_eq!(
            with_defaults(defaults, "panic=5 debug"),
            "console=ttyS0 quiet panic=5 debug"
        );
        let once = with_defaults(defaults, "debug");
        assert_eq!(with_defaults(defaults, &once), once);
    }
}

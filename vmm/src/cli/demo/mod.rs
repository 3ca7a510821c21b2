//! `ringside demo`: boots Debian, runs I/O through NVMe and virtio-net, checks and counts it.
//!
//! The demo is three processes deep. The outermost gets images and programs, and decides where the
//! guest can run; if that is in a nested host, the same command runs again there. Next comes a
//! network namespace of its own, so that the guest's network card gets a tap interface without root
//! and without a trace on the host. In there, [`stage::run`] starts the guest as `ringside run` and
//! speaks to it as anybody can: through the control socket and the agent.

mod guest;
mod jobs;
mod network;
mod stage;
mod table;

use std::ffi::OsString;
use std::fmt;
use std::path::PathBuf;
use std::process::{Command, Stdio};

use clap::ValueEnum;
use guest_images::apt::Freshness;
use guest_images::lab::{LabCommand, LabSpec};
use guest_images::{CacheDir, HostTools, progress};

use super::nested::in_lab;
use super::{Done, Failure, image, run};
use crate::config::{Accel, BadInput, Size, image_name};

#[derive(Debug, clap::Args)]
#[command(after_help = "\
Exit code 0 only if every job ran, every byte read back was right and the guest switched itself off.")]
pub(super) struct DemoArgs {
    /// The guest's image: debian-12 or debian-13
    #[arg(long, default_value = "debian-13")]
    image: String,

    /// Which KVM runs the guest
    #[arg(long, value_enum, default_value_t = Accel::Auto)]
    accel: Accel,

    /// How much each job writes and reads: MiB, or with the suffix K, M, G or T
    ///
    /// Default: 8M in a nested host, 256M on the host's KVM.
    #[arg(long, value_name = "SIZE")]
    size: Option<Size>,

    /// How the guest uses its IOMMU (Intel VT-d)
    #[arg(long, value_enum, value_name = "MODE", default_value_t = IommuMode::Lazy)]
    iommu: IommuMode,

    /// Seconds of the TCP run
    #[arg(long, value_name = "SECONDS", default_value_t = 3)]
    tcp_seconds: u32,

    /// Where the packages' programs are, in the demo's own network namespace
    #[arg(long, hide = true, value_name = "FOLDER")]
    in_namespace: Option<PathBuf>,
}

/// How the guest uses its IOMMU: the unit that the machine has, and the kernel's parameters.
#[derive(Clone, Copy, Debug, PartialEq, Eq, clap::ValueEnum)]
enum IommuMode {
    /// The machine has none
    None,
    /// The unit is there and the guest leaves it off
    Off,
    /// Device addresses are guest-physical
    PassThrough,
    /// The guest invalidates unmapped buffers in batches
    Lazy,
    /// The guest invalidates each buffer when it unmaps it
    Strict,
    /// As lazy, with the tables of scalable mode
    Scalable,
}

impl IommuMode {
    /// `--iommu`.
    fn unit(self) -> &'static str {
        match self {
            IommuMode::None => "off",
            IommuMode::Scalable => "intel,scalable=on",
            _ => "intel",
        }
    }

    fn parameters(self) -> &'static str {
        match self {
            IommuMode::None => "",
            IommuMode::Off => "intel_iommu=off",
            IommuMode::PassThrough => "intel_iommu=on iommu=pt",
            IommuMode::Lazy => "intel_iommu=on iommu.strict=0",
            IommuMode::Strict => "intel_iommu=on iommu.strict=1",
            IommuMode::Scalable => "intel_iommu=on,sm_on iommu.strict=0",
        }
    }
}

impl fmt::Display for IommuMode {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        // No variant is skipped, so each has a name.
        let value = self.to_possible_value();
        f.write_str(value.as_ref().map_or("", |value| value.get_name()))
    }
}

/// Least that a job can split between two processors and its blocks of 64 KiB.
const SIZE_MIN: u64 = 1 << 20;
const SIZE_MAX: u64 = 16 << 30;
/// MiB for the nested host: the guest, the temporary disk and its own.
const LAB_MEMORY: u32 = 2560;

pub(super) fn main(args: &DemoArgs) -> Done {
    let image = image_name(&args.image).map_err(|problem| BadInput::new("--image", problem))?;
    if let Some(size) = args.size
        && (!(SIZE_MIN..=SIZE_MAX).contains(&size.get()) || !size.get().is_multiple_of(SIZE_MIN))
    {
        let problem = format!("{size} is not possible: use whole MiB from 1M to 16G");
        return Err(BadInput::new("--size", problem).into());
    }
    if !(1..=3600).contains(&args.tcp_seconds) {
        return Err(BadInput::new("--tcp-seconds", "use 1 to 3600").into());
    }
    if let Some(tools) = &args.in_namespace {
        let size = args.size.map_or(SIZE_MIN, Size::get);
        return stage::run(&stage::Plan {
            image: args.image.clone(),
            tools: tools.clone(),
            size,
            tcp_seconds: args.tcp_seconds,
            iommu: args.iommu,
        });
    }
    // Everything that takes long or needs the network happens before the guest and out here.
    image::ready(image, Freshness::Cached)?;
    let cache = CacheDir::discover().map_err(Failure::other)?;
    let tools = HostTools::prepare(&cache, &*progress::on_stderr()).map_err(Failure::other)?;
    let tools = tools.root();
    match args.accel {
        Accel::Auto => match run::auto() {
            Accel::Nested => nested(args),
            _ => here(args, tools),
        },
        Accel::Nested => nested(args),
        Accel::Kvm => here(args, tools),
    }
}

fn arguments(args: &DemoArgs, size: Size) -> Vec<OsString> {
    vec![
        "demo".into(),
        format!("--image={}", args.image).into(),
        format!("--size={size}").into(),
        format!("--tcp-seconds={}", args.tcp_seconds).into(),
        format!("--iommu={}", args.iommu).into(),
        "--accel=kvm".into(),
    ]
}

/// Runs the same demo in a nested host.
fn nested(args: &DemoArgs) -> Done {
    let size = args.size.unwrap_or(Size::bytes(8 << 20));
    let mut spec = LabSpec::new()?;
    spec.memory_mib = LAB_MEMORY;
    let mut argv = vec![std::env::current_exe()?.into_os_string()];
    argv.extend(arguments(args, size));
    in_lab(spec, LabCommand::new(argv)?)
}

/// Runs the demo on this host's KVM, in a network namespace.
fn here(args: &DemoArgs, tools: &std::path::Path) -> Done {
    let size = args.size.unwrap_or(Size::bytes(256 << 20));
    // With privileges a network namespace is enough; without, a user namespace gives them.
    let ways: [&[&str]; 2] = [&["--net"], &["--user", "--map-root-user", "--net"]];
    let way = ways.into_iter().find(|way| works(way)).ok_or_else(|| {
        Failure::Other(
            "the demo needs a network namespace of its own, which this user cannot make: see \
                 `ringside doctor`"
                .into(),
        )
    })?;
    let status = Command::new("unshare")
        .args(way)
        .arg("--")
        .arg(std::env::current_exe()?)
        .args(arguments(args, size))
        .arg("--in-namespace")
        .arg(tools)
        .status()?;
    let code = status.code().and_then(|code| u8::try_from(code).ok());
    code.ok_or_else(|| Failure::Other(format!("the demo was ended: {status}")))
}

fn works(way: &[&str]) -> bool {
    let tried = Command::new("unshare")
        .args(way)
        .args(["--", "true"])
        .stdin(Stdio::null())
        .stdout(Stdio::null())
        .stderr(Stdio::null())
        .status();
    tried.is_ok_and(|status| status.success())
}

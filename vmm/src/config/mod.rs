//! What a machine is made of: read from flags and TOML ([`MachineConfig`]), then checked
//! ([`Checked`]).
//!
//! Reading only knows syntax; [`check`] knows what is right and looks at the host. Neither creates
//! or changes anything. Flags and TOML share one structure, so they have the same names.

mod check;
mod checked;
mod device;
mod size;
mod vtd;

use std::fs;
use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};

pub use check::{check, check_spec};
pub use checked::{Accel, BootFiles, BootSource, Checked, GuestName, Mac, VsockChoice, image_name};
pub use device::{EduConfig, ProbeConfig};
pub use device::{NamespaceArg, NamespaceConfig, NetConfig, NvmeConfig, Serial, VsockConfig};
pub use size::{Size, SizeError};
pub use vtd::{IommuConfig, IommuKind, IotlbGeometry};

use crate::machine::OnReboot;

/// Something that the user must put right: one line that names the option and what would do.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{option}: {problem}")]
pub struct BadInput {
    /// The option, as it would be written on the command line.
    pub option: String,
    /// What is wrong and what would be right.
    pub problem: String,
}

impl BadInput {
    /// Something wrong with `option`.
    pub fn new(option: impl Into<String>, problem: impl Into<String>) -> Self {
        Self {
            option: option.into(),
            problem: problem.into(),
        }
    }
}

/// A machine as flags or a TOML file describe it: nothing is checked but the syntax, and what is
/// not given is absent.
#[derive(Clone, Debug, Default, PartialEq, Eq, clap::Args, Serialize, Deserialize)]
#[serde(deny_unknown_fields, rename_all = "kebab-case")]
pub struct MachineConfig {
    /// Name of the guest, for exec, cp, stats, stop and list [default: guest-PID]
    #[arg(long)]
    #[serde(skip_serializing_if = "Option::is_none")]
    pub name: Option<String>,

    /// Boot an image made from Debian's packages: debian-12 or debian-13, or with -dpdk after it (built when needed)
    ///
    /// This is the default (debian-13) when neither --image nor --kernel is given.
    #[arg(long, value_name = "IMAGE", help_heading = "Boot")]
    #[serde(skip_serializing_if = "Option::is_none")]
    pub image: Option<String>,

    /// Boot this kernel: a bzImage, an ELF file with a PVH entry point, or a multiboot (version 1) file
    ///
    /// A file that is several of these is taken as the first.
    #[arg(long, value_name = "FILE", help_heading = "Boot")]
    #[serde(skip_serializing_if = "Option::is_none")]
    pub kernel: Option<PathBuf>,

    /// Initial RAM file system for --kernel; multiboot kernels get it as their module
    #[arg(long, value_name = "FILE", help_heading = "Boot")]
    #[serde(skip_serializing_if = "Option::is_none")]
    pub initrd: Option<PathBuf>,

    /// Appended to the kernel's command line
    #[arg(
        long,
        value_name = "TEXT",
        help_heading = "Boot",
        allow_hyphen_values = true
    )]
    #[serde(skip_serializing_if = "Option::is_none")]
    pub cmdline: Option<String>,

    /// Number of vCPUs, 1 to 32 [default: 1]
    #[arg(long, value_name = "N", help_heading = "Machine")]
    #[serde(skip_serializing_if = "Option::is_none")]
    pub vcpus: Option<u32>,

    /// Guest memory: MiB, or with the suffix K, M, G or T [default: 512M]
    #[arg(long, value_name = "SIZE", help_heading = "Machine")]
    #[serde(skip_serializing_if = "Option::is_none")]
    pub memory: Option<Size>,

    /// Which KVM runs the guest [default: auto]
    #[arg(long, value_enum, help_heading = "Machine", hide_default_value = true)]
    #[serde(skip_serializing_if = "Option::is_none")]
    pub accel: Option<Accel>,

    /// What the guest's reboot does [default: exit, with exit code 10]
    #[arg(long, value_enum, value_name = "ACTION", help_heading = "Machine")]
    #[serde(skip_serializing_if = "Option::is_none")]
    pub on_reboot: Option<OnReboot>,

    /// First serial port: stdio, none or file:PATH [default: stdio]
    ///
    /// On stdio the terminal is in raw mode; Ctrl-A x ends the guest, Ctrl-A Ctrl-A sends a Ctrl-A.
    #[arg(long, value_name = "WHERE", help_heading = "Machine")]
    #[serde(skip_serializing_if = "Option::is_none")]
    pub serial: Option<Serial>,

    /// Ports for test kernels such as kvm-unit-tests': debug exit (0xf4) and fw_cfg (0x510)
    ///
    /// What the guest writes to the debug-exit port ends it; the exit code is 128 plus the low seven
    /// bits (128: success, by these kernels' convention).
    #[arg(long, num_args = 0..=1, default_missing_value = "true", value_name = "BOOL", hide_possible_values = true, help_heading = "Machine")]
    #[serde(skip_serializing_if = "Option::is_none")]
    pub test_ports: Option<bool>,

    /// Control socket [default: `control` in the guest's runtime folder]
    #[arg(long, value_name = "PATH", help_heading = "Machine")]
    #[serde(skip_serializing_if = "Option::is_none")]
    pub control: Option<PathBuf>,

    /// Print when each step of the start was reached
    #[arg(long, num_args = 0..=1, default_missing_value = "true", value_name = "BOOL", hide_possible_values = true, help_heading = "Machine")]
    #[serde(skip_serializing_if = "Option::is_none")]
    pub trace_boot: Option<bool>,

    /// IOMMU before all devices: off, or intel[,KEY=VALUE...] (VT-d) [default: off]
    ///
    /// Whether the guest uses it is the guest's choice: Debian's kernels do with `--cmdline
    /// intel_iommu=on` (and iommu=pt, iommu.strict=0|1, intel_iommu=on,sm_on).
    /// Keys, on|off: scalable [off] (PASID tables), first-stage [as scalable], second-stage [on],
    /// pass-through [on], caching-mode [off] (CAP.CM), coherent [on] (ECAP.C: off, and the guest
    /// must flush its tables from the CPU's caches), interrupt-remapping [on], x2apic [on if the
    /// host's KVM can] (32-bit destinations, EIM). Others: address-width=39|48|57 bits [48],
    /// largest-page=4K|2M|1G [1G], iotlb=SETSxWAYS of each worker [64x4; up to 4096x16],
    /// fault-registers=1..64 [8], trace=FILE (gets what the driver does with registers and queue).
    #[arg(
        long,
        value_name = "off|intel[,KEY=VALUE...]",
        help_heading = "Devices"
    )]
    #[serde(skip_serializing_if = "Option::is_none")]
    pub iommu: Option<IommuConfig>,

    /// Vsock device: off, or cid=N,socket=PATH [default: cid=3, `vsock` in the runtime folder]
    #[arg(long, value_name = "off|KEY=VALUE,...", help_heading = "Devices")]
    #[serde(skip_serializing_if = "Option::is_none")]
    pub vsock: Option<VsockConfig>,

    /// NVMe controller with its first namespace; may be repeated
    ///
    /// Where the bytes are, one of: path=FILE (raw image or block device; `path=` may be left out),
    /// memory=SIZE, null=SIZE. Of the namespace: readonly, direct (O_DIRECT), lba=512|4096. Of the
    /// controller: serial=TEXT, queues=1..64 [default: 64].
    /// Write `,,` for a comma in a value.
    #[arg(long, value_name = "FILE|KEY=VALUE,...", help_heading = "Devices")]
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub nvme: Vec<NvmeConfig>,

    /// One more namespace on a controller: nvme=INDEX (from 0) and the keys of a namespace
    #[arg(
        long,
        value_name = "nvme=INDEX,KEY=VALUE,...",
        help_heading = "Devices"
    )]
    #[serde(skip)]
    pub namespace: Vec<NamespaceArg>,

    /// virtio-net device; may be repeated
    ///
    /// One of tap=NAME (an existing tap interface; not with --accel nested) and loopback (the guest
    /// receives what it sends); pairs=1..16 [default: 1], mac=ADDRESS.
    #[arg(long, value_name = "KEY=VALUE,...", help_heading = "Devices")]
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub net: Vec<NetConfig>,

    /// Educational PCI function, as QEMU's edu: for a first driver; may be repeated
    ///
    /// name=TEXT [default: edu0, edu1, ...], dma-mask=12..64 bits [default: 28].
    #[arg(
        long,
        num_args = 0..=1,
        default_missing_value = "",
        value_name = "KEY=VALUE,...",
        help_heading = "Devices"
    )]
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub edu: Vec<EduConfig>,

    /// Test function that does DMA at any address it is told; may be repeated
    ///
    /// name=TEXT [default: probe0, probe1, ...].
    #[arg(
        long,
        num_args = 0..=1,
        default_missing_value = "",
        value_name = "KEY=VALUE",
        help_heading = "Devices"
    )]
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub dma_probe: Vec<ProbeConfig>,
}

impl MachineConfig {
    /// Reads a TOML file.
    ///
    /// # Errors
    /// The file cannot be read or is not right; the message has the line's number.
    pub fn load(path: &Path) -> Result<Self, BadInput> {
        let option = || format!("--config {}", path.display());
        let text = fs::read_to_string(path)
            .map_err(|error| BadInput::new(option(), check::io_problem(&error, "a TOML file")))?;
        Self::from_toml(&text).map_err(|(line, problem)| match line {
            Some(line) => BadInput::new(option(), format!("line {line}: {problem}")),
            None => BadInput::new(option(), problem),
        })
    }

    /// Reads TOML text; an error comes with its line, counted from 1.
    fn from_toml(text: &str) -> Result<Self, (Option<usize>, String)> {
        toml::from_str(text).map_err(|error| {
            let line = error
                .span()
                .and_then(|span| text.get(..span.start))
                .map(|before| before.bytes().filter(|byte| *byte == b'\n').count() + 1);
            let problem = error.message().lines().collect::<Vec<_>>().join(", ");
            (line, problem)
        })
    }

    /// The TOML text that [`MachineConfig::load`] reads back as the same machine.
    pub fn to_toml(&self) -> String {
        toml::to_string(self).expect("every value of the configuration has a TOML form")
    }

    /// Lays flags (`self`) over a file: a value given by a flag wins, devices given by flags come
    /// after the file's.
    ///
    /// # Errors
    /// `--namespace` names a controller that there is not.
    pub fn over(self, file: MachineConfig) -> Result<Self, BadInput> {
        let flags = self;
        let mut merged = MachineConfig {
            name: flags.name.or(file.name),
            image: flags.image,
            kernel: flags.kernel,
            initrd: flags.initrd.or(file.initrd),
            cmdline: flags.cmdline.or(file.cmdline),
            vcpus: flags.vcpus.or(file.vcpus),
            memory: flags.memory.or(file.memory),
            accel: flags.accel.or(file.accel),
            on_reboot: flags.on_reboot.or(file.on_reboot),
            test_ports: flags.test_ports.or(file.test_ports),
            serial: flags.serial.or(file.serial),
            control: flags.control.or(file.control),
            trace_boot: flags.trace_boot.or(file.trace_boot),
            iommu: flags.iommu.or(file.iommu),
            vsock: flags.vsock.or(file.vsock),
            nvme: file.nvme.into_iter().chain(flags.nvme).collect(),
            namespace: Vec::new(),
            net: file.net.into_iter().chain(flags.net).collect(),
            edu: file.edu.into_iter().chain(flags.edu).collect(),
            dma_probe: file.dma_probe.into_iter().chain(flags.dma_probe).collect(),
        };
        // What to boot is one choice with two spellings: a flag for either replaces both.
        if merged.image.is_none() && merged.kernel.is_none() {
            merged.image = file.image;
            merged.kernel = file.kernel;
        } else if merged.kernel.is_none() {
            // --image replaces the file's kernel, and with it that kernel's initrd.
            merged.initrd = None;
        }
        let controllers = merged.nvme.len();
        for arg in flags.namespace {
            let controller = usize::try_from(arg.nvme)
                .ok()
                .and_then(|index| merged.nvme.get_mut(index));
            match controller {
                Some(controller) => controller.namespace.push(arg.namespace),
                None => {
                    return Err(BadInput::new(
                        format!("--namespace nvme={}", arg.nvme),
                        match controllers {
                            0 => "there is no NVMe controller: add one with --nvme".to_owned(),
                            1 => "there is one NVMe controller, nvme=0".to_owned(),
                            n => {
                                format!("there are {n} NVMe controllers, nvme=0 to nvme={}", n - 1)
                            }
                        },
                    ));
                }
            }
        }
        Ok(merged)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn toml(text: &str) -> MachineConfig {
        MachineConfig::from_toml(text).unwrap()
    }

    #[test]
    fn every_key_survives_a_round_trip() {
        let text = r#"
            name = "lab"
            kernel = "/boot/vmlinuz"
            initrd = "/boot/initrd"
            cmdline = "quiet \"x\""
            vcpus = 4
            memory = "3G"
            accel = "nested"
            on-reboot = "restart"
            test-ports = true
            serial = "file:/tmp/serial.log"
            control = "/tmp/c"
            trace-boot = true

            [iommu]
            kind = "intel"
            scalable = true
            iotlb = "32x2"

            [vsock]
            cid = 7
            socket = "/tmp/v"

            [[nvme]]
            serial = "A1"
            queues = 2
            [[nvme.namespace]]
            path = "a.img"
            readonly = true
            direct = true
            lba = 4096
            [[nvme.namespace]]
            memory = 64

            [[nvme]]
            [[nvme.namespace]]
            null = "1T"

            [[net]]
            tap = "tap0"
            pairs = 2
            mac = "52:54:00:00:00:01"
            [[net]]
            loopback = true
            [[edu]]
            name = "card"
            dma-mask = 32
            [[dma-probe]]
            name = "tester"
            [[dma-probe]]
        "#;
        let config = toml(text);
        assert_eq!(config.nvme[0].namespace[1].memory, Size::mib(64));
        assert_eq!(config.nvme[1].namespace[0].null, Some(Size::bytes(1 << 40)));
        assert_eq!(toml(&config.to_toml()), config);
    }

    #[test]
    fn errors_in_toml_have_their_line() {
        for (text, line, problem) in [
            (
                "vcpus = 1\nmemroy = 5\n",
                2,
                "unknown field `memroy`, expected one of",
            ),
            (
                "\n\nvcpus = \"two\"",
                3,
                "invalid type: string \"two\", expected u32",
            ),
            ("memory = \"big\"", 1, "`big` is not a size"),
            (
                "[[nvme]]\nqueues = 1\n[[nvme.namespace]]\nspeed = 1",
                4,
                "unknown field `speed`",
            ),
            (
                "accel = \"turbo\"",
                1,
                "unknown variant `turbo`, expected one of `auto`",
            ),
            (
                "serial = \"com1\"",
                1,
                "`com1`: use stdio, none or file:PATH",
            ),
            ("name = \"a\"\nname = \"b\"", 2, "duplicate key"),
            ("name = ", 1, ""),
        ] {
            let (found, message) = MachineConfig::from_toml(text).unwrap_err();
            assert_eq!(found, Some(line), "{text}: {message}");
            assert!(message.starts_with(problem), "{text}: {message}");
            assert!(!message.contains('\n'), "{text}: {message}");
        }
    }

    #[test]
    fn flags_win_and_their_devices_come_last() {
        let file =
            toml("vcpus = 1\nmemory = 64\nkernel = \"k\"\ninitrd = \"i\"\n[[nvme]]\nqueues = 1");
        let flags = MachineConfig {
            vcpus: Some(2),
            image: Some("debian-12".into()),
            nvme: vec!["null=1G,queues=3".parse().unwrap()],
            namespace: vec!["nvme=1,null=2G".parse().unwrap()],
            ..MachineConfig::default()
        };
        let merged = flags.over(file).unwrap();
        assert_eq!((merged.vcpus, merged.memory), (Some(2), Size::mib(64)));
        assert_eq!(merged.image.as_deref(), Some("debian-12"));
        assert_eq!((merged.kernel, merged.initrd), (None, None));
        let queues: Vec<_> = merged.nvme.iter().map(|nvme| nvme.queues).collect();
        assert_eq!(queues, [Some(1), Some(3)]);
        assert_eq!(merged.nvme[1].namespace.len(), 2);
    }

    #[test]
    fn a_namespace_needs_its_controller() {
        let flags = MachineConfig {
            namespace: vec!["nvme=1,null=2G".parse().unwrap()],
            nvme: vec!["null=1G".parse().unwrap()],
            ..MachineConfig::default()
        };
        let error = flags.over(MachineConfig::default()).unwrap_err();
        assert_eq!(
            error.to_string(),
            "--namespace nvme=1: there is one NVMe controller, nvme=0"
        );
    }
}

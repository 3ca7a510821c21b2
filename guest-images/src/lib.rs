//! Guest images: kernels, initramfs and the guest agent, made from the distribution's own packages.
//!
//! * [`apt`] fetches Debian packages through a private apt configuration: signature- and
//!   hash-checked by apt itself, without root, without touching the machine's own apt state.
//! * [`progress`] reports long work: a bar on a terminal, plain lines elsewhere.
//! * [`agent`] talks to the agent in a running guest: run programs, copy files, shut down.
//! * [`HostTools`] are programs of those packages that run on the host beside a guest.
//! * [`image`] builds images: a kernel as shipped and an initramfs with tools and the agent.
//! * [`lab`] is the nested host, in which guests run where the machine's own KVM cannot.
//! * [`cache`] is the folder where all of this is kept, with its locks and atomic builds.
//!
//! ```no_run
//! use std::path::Path;
//! use std::time::Duration;
//!
//! use guest_images::agent::{AgentClient, ExecSpec, Exit};
//! use guest_images::apt::Freshness;
//! use guest_images::{CacheDir, Images, Release, progress};
//!
//! # fn main() -> Result<(), Box<dyn std::error::Error>> {
//! let images = Images::new(&CacheDir::discover()?);
//! let image = images.build(Release::Debian13, Freshness::Cached, &*progress::on_stderr())?;
//! // A VMM boots image.vmlinux (or image.bzimage) with image.initramfs; then:
//! let agent = AgentClient::connect(Path::new("vsock"), Duration::from_secs(60))?;
//! let (exit, stdout, _) = agent.output(&ExecSpec::new(["nvme", "list"]))?;
//! assert_eq!(exit, Exit::Code(0));
//! # Ok(())
//! # }
//! ```
//!
//! # What an image is
//!
//! The kernel is the distribution's cloud kernel, byte for byte, and the same kernel taken out of
//! its compressed form (PVH entry). The initramfs is an uncompressed cpio archive of about 30 MB:
//! bash, bridge, busybox, dash, ethtool, fio, ip, iperf3, lspci, mke2fs, nvme, setpci, ss and tc
//! with the libraries that they need, the drivers of our devices, and the agent as `/init`. It is
//! the whole root file system; there is no udev and no service manager.
//!
//! fio's clients of storage clusters, NFS, NBD, RDMA and persistent memory are replaced by
//! stand-ins (`src/image/stub.rs`): with them the image would be three times as large, and a guest
//! of ours has nothing that they could talk to. An engine that needs one says so and ends.
//!
//! An image whose name ends in `-dpdk` ([`ImageName::dpdk`]) also has DPDK's testpmd with the
//! drivers for virtio-net behind vfio, and the libraries that testpmd is bound to.
//!
//! # Drivers in user space
//!
//! Every image has the modules `vfio_pci` and `vfio_iommu_type1`, huge pages at `/dev/hugepages`
//! (none are reserved: write `/proc/sys/vm/nr_hugepages`), and `vfio-nvme`, a small program that
//! drives an NVMe function through vfio (`vfio-nvme/main.rs` says what it can do).
//!
//! # How a guest is controlled
//!
//! The agent listens on vsock port 1024 if the machine has a vsock device; the protocol is in
//! `agent/protocol.rs`. Without one, the serial console has a root shell. The kernel's command
//! line may have:
//!
//! * `ringside.console=off`: no shell on the console.
//! * `ringside.run="COMMAND"` or `ringside.run64=BASE64`: run this with `sh -c` on the console,
//!   print `ringside: exit status N` and switch the machine off.
//!
//! The power button, busybox's `poweroff` and `reboot`, and the agent's shutdown request all end
//! processes, write and unmount disks, and end the machine.

pub mod agent;
pub mod apt;
pub mod cache;
mod error;
pub mod image;
pub mod lab;
pub mod progress;
#[path = "../agent/protocol.rs"]
mod protocol;
mod tools;

pub use cache::CacheDir;
pub use error::{Error, Result};
pub use image::{Image, ImageName, Images, Release};
pub use progress::Progress;
pub use tools::HostTools;

//! An NVM Express 1.4 controller with the NVM command set.
//!
//! [`Nvme::new`] makes the PCI function and its device; both go to [`pci::RootComplex::attach`].
//!
//! # An I/O's way
//!
//! 1. A doorbell store puts the tail into an atomic and kicks the worker (`doorbell`).
//! 2. The worker of the completion queue reserves a completion slot, takes the entry, walks the PRPs
//!    into pinned buffers and pushes a request to its own queue of the back end (`io`, `command`,
//!    `prp`). One submission starts a batch.
//! 3. Completions are reaped and posted, the phase tag last; one interrupt follows a batch (`queue`).
//!
//! The worker owns rings, slots, back-end queues and its view of memory; it takes no lock that
//! another queue's worker takes, and allocates nothing per command.
//!
//! # Control
//!
//! Register stores change a small state machine (`regs`) and kick the admin worker, which enables,
//! resets and shuts down. A reset waits for commands in flight; CSTS tells the host when it is over.
//! [`pci::PciDevice::reset`] is the same, synchronously.
//!
//! # What the host's storage errors become
//!
//! | Host | NVMe status |
//! |---|---|
//! | `ENOSPC`, `EDQUOT`, `EFBIG` | Capacity Exceeded (Linux: `ENOSPC`), do not retry |
//! | `EROFS`, `EPERM`, `EACCES` on a write | Namespace is Write Protected, do not retry |
//! | `ENOMEM`, `EAGAIN`, no descriptors | Internal Error |
//! | any other, on a read | Unrecovered Read Error |
//! | any other, on a write or flush | Write Fault |
//!
//! Each adds an entry to the error log.

mod admin;
mod command;
mod config;
mod doorbell;
mod events;
mod io;
mod namespace;
mod prp;
mod queue;
mod regs;
mod shared;
mod slot;
pub mod spec;
mod stats;
mod workers;

use std::sync::Arc;
use std::sync::atomic::Ordering;

use iommu::{Bdf, Upstream};
use pci::{BarIndex, BarKind, ClassCode, Endpoint, FunctionBuilder, Identity, PciDevice};

use self::admin::AdminTask;
use self::shared::Shared;
use self::workers::IoWorkers;
use crate::worker::{Kick, PollPolicy, Worker, WorkerOptions};

pub use self::config::{
    Config, ConfigError, MAX_MDTS, MAX_NAMESPACES, MAX_NSID, MAX_QUEUE_ENTRIES, MAX_QUEUE_PAIRS,
    NamespaceConfig,
};
pub use self::namespace::Lba;
pub use self::queue::QueueId;
pub use self::stats::{NvmeStats, QueueStats};

/// PCI vendor ID, of no vendor.
pub const VENDOR_ID: u16 = 0x1234;
/// PCI device ID: "NV".
pub const DEVICE_ID: u16 = 0x4e56;
/// PCI subsystem ID.
pub const SUBSYSTEM_ID: u16 = 1;

const BAR: BarIndex = BarIndex(0);
const BAR_BYTES: u64 = 0x4000;
const MSIX_TABLE: u64 = 0x2000;
const MSIX_PBA: u64 = 0x3000;

/// Why a controller could not be made.
#[derive(Debug, thiserror::Error)]
pub enum NvmeError {
    /// The configuration cannot be.
    #[error(transparent)]
    Config(#[from] ConfigError),
    /// The PCI function contradicts itself.
    #[error("the NVMe function: {0}")]
    Function(#[from] pci::BuildError),
    /// The host has no thread or file descriptor left.
    #[error("starting the NVMe admin worker: {0}")]
    Worker(#[from] std::io::Error),
}

/// A controller. Dropping it stops its workers and waits for what they have in flight.
pub struct Nvme {
    shared: Arc<Shared>,
    /// Before `workers`: it uses them, so it must end first.
    admin: Worker<AdminTask>,
    workers: Arc<IoWorkers>,
}

impl Nvme {
    /// Makes a controller for `bdf`, with the guest's memory and a way out for its interrupts.
    ///
    /// # Errors
    ///
    /// The configuration is out of range, or the host lacks resources.
    pub fn new(
        config: Config,
        bdf: Bdf,
        upstream: &Upstream,
    ) -> Result<(Endpoint, Arc<Nvme>), NvmeError> {
        let namespaces = config.validate()?;
        let vectors = config.max_queue_pairs + 1;
        let endpoint = FunctionBuilder::new(Identity {
            vendor: VENDOR_ID,
            device: DEVICE_ID,
            class: ClassCode {
                base: 1,
                sub: 8,
                interface: 2,
            },
            revision: 1,
            subsystem_vendor: VENDOR_ID,
            subsystem: SUBSYSTEM_ID,
        })
        .bar(
            BAR,
            BAR_BYTES,
            BarKind::Memory64 {
                prefetchable: false,
            },
        )
        .msix(vectors, (BAR, MSIX_TABLE), (BAR, MSIX_PBA))
        .build(bdf, upstream)?;

        let name = format!("nvme-{bdf}");
        let shared = Arc::new(Shared::new(
            endpoint.bus_master(),
            endpoint.msix(),
            name,
            namespaces,
            &config,
        ));
        let workers = Arc::new(IoWorkers::new(config.max_queue_pairs, config.policy));
        let kick = Kick::new()?;
        shared.doorbells.set_kick(QueueId::ADMIN, kick.clone());
        let task = AdminTask::new(Arc::clone(&shared), Arc::clone(&workers), config);
        let options = WorkerOptions::default();
        let admin = Worker::spawn(&shared.name, &kick, task, options)?;
        let nvme = Nvme {
            shared,
            admin,
            workers,
        };
        Ok((endpoint, Arc::new(nvme)))
    }

    /// What it has done so far. The numbers are read one by one while the workers run.
    pub fn stats(&self) -> NvmeStats {
        self.shared.stats()
    }

    /// When I/O queue workers poll instead of sleeping.
    pub fn policy(&self) -> PollPolicy {
        self.workers.policy()
    }

    /// Changes the policy of all I/O queue workers, live.
    pub fn set_policy(&self, policy: PollPolicy) {
        self.workers.set_policy(policy);
    }

    fn kick_admin(&self) {
        self.shared.control.store(true, Ordering::SeqCst);
        self.shared.doorbells.kick(QueueId::ADMIN);
    }
}

impl PciDevice for Nvme {
    /// Registers are loaded as aligned dwords, 64-bit ones also whole (section 3.1); any other load
    /// gives zeroes.
    fn bar_read(&self, bar: BarIndex, offset: u64, data: &mut [u8]) {
        data.fill(0);
        if bar != BAR || offset >= spec::reg::DOORBELLS {
            return;
        }
        match data.len() {
            4 if offset.is_multiple_of(4) => {
                let value = self.shared.regs().read(offset);
                data.copy_from_slice(&value.to_le_bytes());
            }
            8 if regs::is_64_bit(offset) => {
                let regs = self.shared.regs();
                let (low, high) = data.split_at_mut(4);
                low.copy_from_slice(&regs.read(offset).to_le_bytes());
                high.copy_from_slice(&regs.read(offset + 4).to_le_bytes());
            }
            _ => self.shared.complain("a register load of unsupported size"),
        }
    }

    /// Likewise; any other store does nothing. Doorbells take dwords.
    fn bar_write(&self, bar: BarIndex, offset: u64, data: &[u8]) {
        if bar != BAR {
            return;
        }
        match *data {
            [a, b, c, d] if offset.is_multiple_of(4) => {
                let value = u32::from_le_bytes([a, b, c, d]);
                if let Some(doorbell) = offset.checked_sub(spec::reg::DOORBELLS) {
                    if let Err((id, why)) = self.shared.doorbells.ring(doorbell / 4, value) {
                        self.shared.bad_ring(id, why);
                    }
                    return;
                }
                let asked = self.shared.regs().write(offset, value);
                if asked {
                    self.kick_admin();
                }
            }
            [a, b, c, d, e, f, g, h] if regs::is_64_bit(offset) => {
                let mut regs = self.shared.regs();
                regs.write(offset, u32::from_le_bytes([a, b, c, d]));
                regs.write(offset + 4, u32::from_le_bytes([e, f, g, h]));
            }
            _ => self.shared.complain("a register store of unsupported size"),
        }
    }

    fn reset(&self) {
        self.admin.with(AdminTask::power_on);
    }

    fn bus_master_changed(&self, on: bool) {
        if on {
            self.shared.doorbells.kick_all();
        }
    }
}

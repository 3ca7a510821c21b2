//! A PCI function that does nothing but DMA, at whatever address it is told.
//!
//! It needs no driver: a few stores make it read, write or signal, and its registers tell how that
//! ended. Tests use it to look at memory from a device's side, through an IOMMU or without; the owner of
//! a guest uses it to issue a DMA that must be blocked. Vendor 0x1234, device 0x4450, one BAR of
//! 4 KiB, no interrupt of its own.
//!
//! # Registers
//!
//! Loads and stores have four bytes; the 64-bit registers also take eight. Any other load gives ones,
//! any other store does nothing.
//!
//! | Offset | Bits | Access | Register |
//! |---|---|---|---|
//! | 0x00 | 32 | RO | identification, 0x50414d44 ("DMAP") |
//! | 0x08 | 64 | RW | address |
//! | 0x10 | 64 | RW | length in bytes, 1 to 1 MiB |
//! | 0x18 | 64 | RW | data: the pattern to write; after a read the first eight bytes read |
//! | 0x20 | 32 | WO | command: 1 read, 2 write, 3 signal |
//! | 0x24 | 32 | RO | status: 0 idle, 1 busy, 2 ok, 3 bus master off, 4 no memory, 5 blocked by the IOMMU, 6 bad command |
//! | 0x28 | 32 | RO | the IOMMU's fault reason, with status 5 |
//! | 0x30 | 64 | RO | bytes done before the end or the first page that was refused |
//!
//! A signal writes the low four bytes of the data to the address. In the interrupt range (0xfee00000 to
//! 0xfeefffff) that is an interrupt request, with whatever address and data, which interrupt remapping
//! may block like any other; so is a write of four bytes. While the status is busy all stores are
//! ignored.
//!
//! From a shell in the guest, with the address of BAR 0 in `$bar`, a write of 8 bytes to address
//! 0x1000 (`devmem` is BusyBox's):
//!
//! ```text
//! setpci -d 1234:4450 COMMAND=6:6
//! devmem $((bar + 0x08)) 64 0x1000
//! devmem $((bar + 0x10)) 64 8
//! devmem $((bar + 0x18)) 64 0x0123456789abcdef
//! devmem $((bar + 0x20)) 32 2
//! devmem $((bar + 0x24)) 32
//! ```

mod engine;
pub mod spec;

use std::io;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use iommu::{Bdf, Upstream};
use pci::{BarIndex, BarKind, ClassCode, Endpoint, FunctionBuilder, Identity, PciDevice};
use serde::Serialize;

use self::engine::Engine;
use self::spec::status;
use crate::worker::{Kick, Worker, WorkerOptions};

const BAR: BarIndex = BarIndex(0);

/// Why the function could not be made.
#[derive(Debug, thiserror::Error)]
pub enum ProbeError {
    /// The PCI function contradicts itself.
    #[error("the DMA probe: {0}")]
    Function(#[from] pci::BuildError),
    /// The host has no thread or file descriptor left.
    #[error("starting the DMA probe's worker: {0}")]
    Worker(#[from] io::Error),
}

/// What it has done since it was made.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize)]
pub struct ProbeStats {
    /// Commands that read.
    pub reads: u64,
    /// Commands that wrote.
    pub writes: u64,
    /// Commands that signalled.
    pub signals: u64,
    /// Bytes read and written.
    pub bytes: u64,
    /// Of all commands, those that ended with an error.
    pub errors: u64,
    /// Of the errors, those that the IOMMU made.
    pub blocked: u64,
}

#[derive(Clone, Copy, Default)]
struct Registers {
    address: u64,
    length: u64,
    data: u64,
    command: u32,
    status: u32,
    reason: u32,
    done: u64,
}

/// What vCPUs and the worker share.
#[derive(Default)]
struct Shared {
    registers: Mutex<Registers>,
    stats: Mutex<ProbeStats>,
}

impl Shared {
    fn registers(&self) -> MutexGuard<'_, Registers> {
        self.registers
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
    }

    fn count(&self, change: impl FnOnce(&mut ProbeStats)) {
        change(&mut self.stats.lock().unwrap_or_else(PoisonError::into_inner));
    }
}

/// The function. Dropping it stops its worker.
pub struct DmaProbe {
    shared: Arc<Shared>,
    worker: Worker<Engine>,
}

impl DmaProbe {
    /// Makes the function for `bdf`, with the guest's memory and a way out for its signals. `name` is
    /// its worker's.
    ///
    /// # Errors
    ///
    /// The host lacks resources.
    pub fn new(
        name: &str,
        bdf: Bdf,
        upstream: &Upstream,
    ) -> Result<(Endpoint, Arc<DmaProbe>), ProbeError> {
        let endpoint = FunctionBuilder::new(Identity {
            vendor: spec::VENDOR_ID,
            device: spec::DEVICE_ID,
            // Unclassified (PCI Code and ID Assignment 1.11, 1.1).
            class: ClassCode {
                base: 0x00,
                sub: 0xff,
                interface: 0,
            },
            revision: 1,
            subsystem_vendor: spec::VENDOR_ID,
            subsystem: spec::DEVICE_ID,
        })
        .bar(BAR, spec::BAR_LEN, BarKind::Memory32)
        .build(bdf, upstream)?;
        let shared = Arc::<Shared>::default();
        let task = Engine::new(Arc::clone(&shared), endpoint.bus_master().dma.view());
        let worker = Worker::spawn(name, &Kick::new()?, task, WorkerOptions::default())?;
        Ok((endpoint, Arc::new(DmaProbe { shared, worker })))
    }

    /// What it has done so far.
    pub fn stats(&self) -> ProbeStats {
        let stats = self.shared.stats.lock();
        *stats.unwrap_or_else(PoisonError::into_inner)
    }

    /// A 64-bit register, or a pair of 32-bit ones.
    fn load(&self, offset: u64) -> Option<u64> {
        let registers = self.shared.registers();
        Some(match offset {
            spec::IDENTIFICATION => spec::IDENTIFICATION_VALUE.into(),
            spec::ADDRESS => registers.address,
            spec::LENGTH => registers.length,
            spec::DATA => registers.data,
            // The command reads as 0.
            spec::COMMAND => u64::from(registers.status) << 32,
            spec::REASON => registers.reason.into(),
            spec::DONE => registers.done,
            _ => return None,
        })
    }
}

/// Whether the register pair at `offset` is one register.
fn is_wide(offset: u64) -> bool {
    matches!(
        offset,
        spec::ADDRESS | spec::LENGTH | spec::DATA | spec::DONE
    )
}

impl PciDevice for DmaProbe {
    fn bar_read(&self, bar: BarIndex, offset: u64, data: &mut [u8]) {
        let pair = offset & !7;
        let taken = match data.len() {
            4 => offset.is_multiple_of(4),
            8 => offset == pair && is_wide(pair),
            _ => false,
        };
        let value = if bar == BAR && taken {
            self.load(pair)
        } else {
            None
        };
        let bytes = value.unwrap_or(u64::MAX).to_le_bytes();
        let skip = usize::from(offset != pair) * 4;
        for (to, from) in data.iter_mut().zip(bytes.into_iter().skip(skip)) {
            *to = from;
        }
    }

    fn bar_write(&self, bar: BarIndex, offset: u64, data: &[u8]) {
        let mut registers = self.shared.registers();
        if bar != BAR || registers.status == status::BUSY {
            return;
        }
        let register = match offset & !7 {
            spec::ADDRESS => &mut registers.address,
            spec::LENGTH => &mut registers.length,
            spec::DATA => &mut registers.data,
            _ => {
                if let (spec::COMMAND, &[a, b, c, d]) = (offset, data) {
                    registers.command = u32::from_le_bytes([a, b, c, d]);
                    registers.status = status::BUSY;
                    drop(registers);
                    self.worker.kick();
                }
                return;
            }
        };
        let old = *register;
        *register = match *data {
            [a, b, c, d, e, f, g, h] if offset.is_multiple_of(8) => {
                u64::from_le_bytes([a, b, c, d, e, f, g, h])
            }
            [a, b, c, d] if offset.is_multiple_of(8) => {
                old & !0xffff_ffff | u64::from(u32::from_le_bytes([a, b, c, d]))
            }
            [a, b, c, d] if offset.is_multiple_of(4) => {
                old & 0xffff_ffff | u64::from(u32::from_le_bytes([a, b, c, d])) << 32
            }
            _ => old,
        };
    }

    /// The worker finishes what it is at, then the registers are as after power-on.
    fn reset(&self) {
        self.worker.with(Engine::reset);
    }
}

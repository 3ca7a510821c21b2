//! An educational PCI function: what students write their first driver against.
//!
//! It has the identity and the registers of QEMU's `edu` device (docs/specs/edu.rst), so drivers,
//! courses and tests made for that one work here unchanged: vendor 0x1234, device 0x11e8, one BAR of
//! 1 MiB, an interrupt pin (INTA) and MSI with one vector.
//!
//! # Registers
//!
//! Loads and stores have four bytes below 0x80, four or eight from there on, at exactly the offsets
//! of the table. Any other load gives ones, any other store does nothing.
//!
//! | Offset | Access | Register |
//! |---|---|---|
//! | 0x00 | RO | identification, 0x010000ed: version 1.0, "edu" |
//! | 0x04 | RW | liveness: reads as the bitwise inversion of what was written |
//! | 0x08 | RW | factorial: write *n*, read *n*! modulo 2³² when bit 0 of the status is clear; ignored while it is set |
//! | 0x20 | RW | status: bit 0 computing (read-only), bit 7 interrupt when the factorial is there |
//! | 0x24 | RO | interrupt status: why there was an interrupt; 0x001 factorial, 0x100 DMA, and what was raised |
//! | 0x60 | WO | interrupt raise: the bits are set in the interrupt status, and the device interrupts |
//! | 0x64 | WO | interrupt acknowledge: the bits are cleared in the interrupt status |
//! | 0x80 | RW | DMA source address |
//! | 0x88 | RW | DMA destination address |
//! | 0x90 | RW | DMA transfer count, bytes |
//! | 0x98 | RW | DMA command: bit 0 start, and set while it runs; bit 1 direction, 0 from RAM to the buffer, 1 from the buffer to RAM; bit 2 interrupt 0x100 at the end |
//!
//! The device's own side of a DMA is a buffer of 4096 bytes at address 0x40000; it is reached by DMA
//! only. DMA registers cannot be written while a transfer runs.
//!
//! # A first driver
//!
//! 1. *Find it.* Match 1234:11e8, enable memory decoding and map BAR 0. Offset 0 must read
//!    0x010000ed; write a number to 0x04 and read its inversion: the way to the device works.
//! 2. *Compute by polling.* Write 5 to 0x08, read 0x20 until bit 0 is clear, read 120 at 0x08.
//! 3. *Take an interrupt.* Install a handler for the function's interrupt line, which may be shared.
//!    The handler reads 0x24; if it is 0, the interrupt was another device's. Else it writes the value
//!    to 0x64, which deasserts the pin; a handler that does not is called again and again, because
//!    INTx is a level. Write 1 to 0x60 and see it called; then set bit 7 of 0x20 and compute.
//! 4. *Use a message.* Enable MSI. The same handler works, unshared: the pin goes nowhere now, and
//!    each raise is one message. The acknowledgement is still needed, for the status keeps its bits.
//! 5. *Move data.* Enable bus mastering. Get a DMA address that the device can reach (see below),
//!    write it to 0x80, 0x40000 to 0x88, the length to 0x90 and 1 to 0x98; wait for bit 0 of 0x98 to
//!    clear, or start with 5 and wait for interrupt 0x100. The other way with source 0x40000, the
//!    address as destination and 3 (or 7).
//!
//! # The DMA mask
//!
//! The device has few address lines: 28 unless [`EduOptions::dma_mask_bits`] says otherwise. The upper
//! bits of a RAM address are cut off, and the transfer goes to the wrong place. A driver must tell its
//! kernel (Linux: `dma_set_mask_and_coherent(dev, DMA_BIT_MASK(28))`), which then gives it low
//! addresses: from an IOMMU, or through a bounce buffer. [`EduStats::dma_clamped`] counts transfers
//! whose address was cut.
//!
//! A guest with more than 4 GiB shows it: a page at 0x1_0800_0000 has the low 28 bits of the one at
//! 0x0800_0000, so a driver that hands out the first without a mask reads and overwrites the second.
//! Below an IOMMU the mask cuts input addresses, not the guest's: the kernel picks one of less than
//! 28 bits and maps it to the page above 4 GiB, and no copy is needed.
//!
//! # What does not work as asked
//!
//! A transfer that leaves the buffer moves nothing (QEMU's device ends the machine, or overruns). One
//! that memory refuses, because Bus Master Enable is clear, nothing is at the address or the IOMMU
//! blocks it, changes no byte of the buffer; towards RAM, the pages before the refused one are
//! written. As on QEMU's device the registers do not tell: the start bit clears and the interrupt
//! comes as after any transfer. [`EduStats::dma_refused`] and a line in the log tell the person at the
//! host, and with an IOMMU its fault record tells the guest.

mod engine;
pub mod spec;

use std::io;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use iommu::{Bdf, Upstream};
use pci::{
    BarIndex, BarKind, ClassCode, Endpoint, FunctionBuilder, Identity, InterruptPin, IntxPin,
    MsiVector, PciDevice,
};
use serde::Serialize;

use self::engine::Engine;
use self::spec::{command, status};
use crate::worker::{Kick, Worker, WorkerOptions};

const BAR: BarIndex = BarIndex(0);

/// How the function is made.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct EduOptions {
    /// Address lines of its DMA engine, 12 to 64.
    pub dma_mask_bits: u8,
}

impl Default for EduOptions {
    fn default() -> EduOptions {
        EduOptions { dma_mask_bits: 28 }
    }
}

/// Why the function could not be made.
#[derive(Debug, thiserror::Error)]
pub enum EduError {
    /// Out of range.
    #[error("a DMA mask of {0} bits; 12 to 64 are possible")]
    DmaMask(u8),
    /// The PCI function contradicts itself.
    #[error("the edu function: {0}")]
    Function(#[from] pci::BuildError),
    /// The host has no thread or file descriptor left.
    #[error("starting the edu worker: {0}")]
    Worker(#[from] io::Error),
}

/// What it has done since it was made.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize)]
pub struct EduStats {
    /// Factorials computed.
    pub factorials: u64,
    /// Transfers from RAM to the buffer, refused ones left out.
    pub dma_from_ram: u64,
    /// Transfers from the buffer to RAM, refused ones left out.
    pub dma_to_ram: u64,
    /// Bytes that these moved.
    pub dma_bytes: u64,
    /// Transfers whose RAM address had bits beyond the DMA mask, which were cut off.
    pub dma_clamped: u64,
    /// Transfers that memory refused.
    pub dma_refused: u64,
    /// Transfers that would have left the buffer.
    pub dma_out_of_buffer: u64,
    /// Times that an interrupt was raised, whether or not the guest lets it through.
    pub interrupts: u64,
}

#[derive(Default)]
struct Registers {
    /// As read.
    liveness: u32,
    factorial: u32,
    status: u32,
    interrupts: u32,
    dma: Dma,
}

#[derive(Clone, Copy, Default)]
struct Dma {
    source: u64,
    destination: u64,
    count: u64,
    command: u64,
}

impl Dma {
    fn runs(&self) -> bool {
        self.command & command::RUN != 0
    }
}

/// What vCPUs and the worker share.
struct Shared {
    name: String,
    dma_mask: u64,
    registers: Mutex<Registers>,
    pin: Option<IntxPin>,
    vector: Option<MsiVector>,
    stats: Mutex<EduStats>,
    logged: AtomicU64,
}

impl Shared {
    fn registers(&self) -> MutexGuard<'_, Registers> {
        self.registers
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
    }

    fn count(&self, change: impl FnOnce(&mut EduStats)) {
        change(&mut self.stats.lock().unwrap_or_else(PoisonError::into_inner));
    }

    /// Sets bits of the interrupt status and interrupts. The status and the pin change together,
    /// under the registers' lock.
    fn raise(&self, registers: &mut Registers, bits: u32) {
        registers.interrupts |= bits;
        if registers.interrupts == 0 {
            return;
        }
        self.count(|stats| stats.interrupts += 1);
        if let Some(pin) = &self.pin {
            pin.set_level(true);
        }
        if let Some(vector) = &self.vector {
            vector.signal();
        }
    }

    /// Clears bits of the interrupt status; with none left there is nothing to interrupt for.
    fn acknowledge(&self, registers: &mut Registers, bits: u32) {
        registers.interrupts &= !bits;
        if registers.interrupts != 0 {
            return;
        }
        if let Some(pin) = &self.pin {
            pin.set_level(false);
        }
        if let Some(vector) = &self.vector {
            vector.withdraw();
        }
    }

    fn reset(&self) {
        let mut registers = self.registers();
        *registers = Registers::default();
        self.acknowledge(&mut registers, 0);
    }

    /// Logs something that the guest did, the 1st, 2nd, 4th, 8th... time.
    fn complain(&self, what: std::fmt::Arguments<'_>) {
        let count = self.logged.fetch_add(1, Ordering::Relaxed).wrapping_add(1);
        if count.is_power_of_two() {
            tracing::warn!("{}: {what}; {count} complaints so far", self.name);
        }
    }
}

/// The function. Dropping it stops its worker.
pub struct Edu {
    shared: Arc<Shared>,
    worker: Worker<Engine>,
}

impl Edu {
    /// Makes the function for `bdf`, with the guest's memory and a way out for its messages. `name` is
    /// for the log.
    ///
    /// # Errors
    ///
    /// The options are out of range, or the host lacks resources.
    pub fn new(
        name: &str,
        options: EduOptions,
        bdf: Bdf,
        upstream: &Upstream,
    ) -> Result<(Endpoint, Arc<Edu>), EduError> {
        let bits = options.dma_mask_bits;
        if !(12..=64).contains(&bits) {
            return Err(EduError::DmaMask(bits));
        }
        let endpoint = FunctionBuilder::new(Identity {
            vendor: spec::VENDOR_ID,
            device: spec::DEVICE_ID,
            // Unclassified (PCI Code and ID Assignment 1.11, 1.1), as QEMU's.
            class: ClassCode {
                base: 0x00,
                sub: 0xff,
                interface: 0,
            },
            revision: spec::REVISION_ID,
            subsystem_vendor: spec::VENDOR_ID,
            subsystem: spec::DEVICE_ID,
        })
        .bar(BAR, spec::BAR_LEN, BarKind::Memory32)
        .intx(InterruptPin::A)
        .msi(1)
        .build(bdf, upstream)?;
        let shared = Arc::new(Shared {
            name: name.to_owned(),
            dma_mask: u64::MAX >> (64 - u32::from(bits)),
            registers: Mutex::default(),
            pin: endpoint.intx(),
            vector: endpoint.msi().vector(0),
            stats: Mutex::default(),
            logged: AtomicU64::new(0),
        });
        let task = Engine::new(Arc::clone(&shared), endpoint.bus_master().dma.view());
        let worker = Worker::spawn(name, &Kick::new()?, task, WorkerOptions::default())?;
        Ok((endpoint, Arc::new(Edu { shared, worker })))
    }

    /// What it has done so far.
    pub fn stats(&self) -> EduStats {
        let stats = self.shared.stats.lock();
        *stats.unwrap_or_else(PoisonError::into_inner)
    }

    fn load(&self, offset: u64) -> Option<u64> {
        let registers = self.shared.registers();
        Some(match offset {
            spec::IDENTIFICATION => spec::IDENTIFICATION_VALUE.into(),
            spec::LIVENESS => registers.liveness.into(),
            spec::FACTORIAL => registers.factorial.into(),
            spec::STATUS => registers.status.into(),
            spec::INTERRUPT_STATUS => registers.interrupts.into(),
            spec::DMA_SOURCE => registers.dma.source,
            spec::DMA_DESTINATION => registers.dma.destination,
            spec::DMA_COUNT => registers.dma.count,
            spec::DMA_COMMAND => registers.dma.command,
            _ => return None,
        })
    }

    /// A store to a four-byte register. True if there is work for the worker.
    fn store(&self, offset: u64, value: u32) -> bool {
        let mut registers = self.shared.registers();
        match offset {
            spec::LIVENESS => registers.liveness = !value,
            spec::FACTORIAL if registers.status & status::COMPUTING == 0 => {
                registers.factorial = value;
                registers.status |= status::COMPUTING;
                return true;
            }
            spec::STATUS => {
                let writable = status::INTERRUPT;
                registers.status = (registers.status & !writable) | (value & writable);
            }
            spec::INTERRUPT_RAISE => self.shared.raise(&mut registers, value),
            spec::INTERRUPT_ACKNOWLEDGE => self.shared.acknowledge(&mut registers, value),
            _ => {}
        }
        false
    }

    /// A store to a DMA register, which four bytes set as a whole too. True if there is work for the
    /// worker.
    fn store_dma(&self, offset: u64, value: u64) -> bool {
        let dma = &mut self.shared.registers().dma;
        if dma.runs() {
            return false;
        }
        match offset {
            spec::DMA_SOURCE => dma.source = value,
            spec::DMA_DESTINATION => dma.destination = value,
            spec::DMA_COUNT => dma.count = value,
            spec::DMA_COMMAND if value & command::RUN != 0 => {
                dma.command = value;
                return true;
            }
            _ => {}
        }
        false
    }
}

impl PciDevice for Edu {
    fn bar_read(&self, bar: BarIndex, offset: u64, data: &mut [u8]) {
        let taken = data.len() == 4 || (data.len() == 8 && offset >= spec::WIDE_FROM);
        let value = if bar == BAR && taken {
            self.load(offset)
        } else {
            None
        };
        let value = value.unwrap_or(u64::MAX).to_le_bytes();
        for (to, from) in data.iter_mut().zip(value) {
            *to = from;
        }
    }

    fn bar_write(&self, bar: BarIndex, offset: u64, data: &[u8]) {
        if bar != BAR {
            return;
        }
        let wide = offset >= spec::WIDE_FROM;
        let work = match *data {
            [a, b, c, d] if wide => self.store_dma(offset, u32::from_le_bytes([a, b, c, d]).into()),
            [a, b, c, d] => self.store(offset, u32::from_le_bytes([a, b, c, d])),
            [a, b, c, d, e, f, g, h] if wide => {
                self.store_dma(offset, u64::from_le_bytes([a, b, c, d, e, f, g, h]))
            }
            _ => false,
        };
        if work {
            self.worker.kick();
        }
    }

    /// The worker finishes what it is at, then registers and buffer are as after power-on.
    fn reset(&self) {
        self.worker.with(Engine::reset);
    }
}

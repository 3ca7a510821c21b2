//! What takes time: factorials and DMA, on the worker's thread.

use std::ops::Range;
use std::os::fd::RawFd;
use std::sync::Arc;

use iommu::{DmaError, DmaMemory, Iova};

use super::spec::{self, BUFFER_LEN, command, interrupt, status};
use super::{Dma, Shared};
use crate::worker::{Polled, QueueTask};

/// The device's slow half.
pub(super) struct Engine {
    shared: Arc<Shared>,
    memory: DmaMemory,
    buffer: Box<[u8; BUFFER_LEN]>,
}

impl Engine {
    pub(super) fn new(shared: Arc<Shared>, memory: DmaMemory) -> Engine {
        Engine {
            shared,
            memory,
            buffer: Box::new([0; BUFFER_LEN]),
        }
    }

    /// Back to the state after power-on.
    pub(super) fn reset(&mut self) {
        self.shared.reset();
        self.buffer.fill(0);
    }

    /// Computes the factorial that waits. True if there was one.
    fn compute(&mut self) -> bool {
        let number = {
            let registers = self.shared.registers();
            if registers.status & status::COMPUTING == 0 {
                return false;
            }
            registers.factorial
        };
        let result = factorial(number);
        let mut registers = self.shared.registers();
        registers.factorial = result;
        registers.status &= !status::COMPUTING;
        self.shared.count(|stats| stats.factorials += 1);
        if registers.status & status::INTERRUPT != 0 {
            self.shared.raise(&mut registers, interrupt::FACTORIAL);
        }
        true
    }

    /// Does the transfer that waits. True if there was one.
    fn transfer(&mut self) -> bool {
        let dma = self.shared.registers().dma;
        if !dma.runs() {
            return false;
        }
        let to_ram = dma.command & command::TO_RAM != 0;
        let (own, address) = if to_ram {
            (dma.source, dma.destination)
        } else {
            (dma.destination, dma.source)
        };
        match within_buffer(own, dma.count) {
            Some(range) => self.move_bytes(range, address, to_ram),
            None => {
                self.shared.count(|stats| stats.dma_out_of_buffer += 1);
                let Dma { count, .. } = dma;
                self.shared.complain(format_args!(
                    "DMA of {count} bytes at {own:#x} leaves the device's buffer"
                ));
            }
        }
        let mut registers = self.shared.registers();
        registers.dma.command &= !command::RUN;
        if registers.dma.command & command::INTERRUPT != 0 {
            self.shared.raise(&mut registers, interrupt::DMA);
        }
        true
    }

    /// Moves between the `range` of the buffer and RAM.
    fn move_bytes(&mut self, range: Range<usize>, address: u64, to_ram: bool) {
        let iova = Iova(address & self.shared.dma_mask);
        if iova.0 != address {
            self.shared.count(|stats| stats.dma_clamped += 1);
            let given = Iova(address);
            self.shared
                .complain(format_args!("the DMA mask cuts {given} to {iova}"));
        }
        let moved = match self.copy(range, iova, to_ram) {
            Ok(moved) => moved,
            Err(error) => {
                self.shared.count(|stats| stats.dma_refused += 1);
                self.shared.complain(format_args!("DMA refused: {error}"));
                return;
            }
        };
        self.shared.count(|stats| {
            stats.dma_bytes += moved;
            *(if to_ram {
                &mut stats.dma_to_ram
            } else {
                &mut stats.dma_from_ram
            }) += 1;
        });
    }

    /// The bytes moved. On an error the buffer is as it was.
    fn copy(&mut self, range: Range<usize>, iova: Iova, to_ram: bool) -> Result<u64, DmaError> {
        let Some(bytes) = self.buffer.get_mut(range) else {
            return Ok(0);
        };
        if to_ram {
            self.memory.write(iova, bytes)?;
        } else {
            // A read that is refused half-way has filled the first half.
            let mut scratch = [0; BUFFER_LEN];
            let (scratch, _) = scratch.split_at_mut(bytes.len());
            self.memory.read(iova, scratch)?;
            bytes.copy_from_slice(scratch);
        }
        Ok(u64::try_from(bytes.len()).unwrap_or(0))
    }
}

/// Where `count` bytes at the device's address `own` are in its buffer.
fn within_buffer(own: u64, count: u64) -> Option<Range<usize>> {
    let start = usize::try_from(own.checked_sub(spec::BUFFER)?).ok()?;
    let end = start.checked_add(usize::try_from(count).ok()?)?;
    (end <= BUFFER_LEN).then_some(start..end)
}

/// `number`! modulo 2^32. From 34 on it is a multiple of 2^32, so a large number takes no longer.
fn factorial(number: u32) -> u32 {
    const ZERO_FROM: u32 = 34;
    if number >= ZERO_FROM {
        return 0;
    }
    (1..=number).fold(1, u32::wrapping_mul)
}

impl QueueTask for Engine {
    fn poll(&mut self, _budget: u32) -> Polled {
        Polled {
            work: u32::from(self.compute()) + u32::from(self.transfer()),
            ..Polled::default()
        }
    }

    /// Every store that makes work kicks.
    fn arm(&mut self) {}

    fn has_work(&mut self) -> bool {
        let registers = self.shared.registers();
        registers.status & status::COMPUTING != 0 || registers.dma.runs()
    }

    fn disarm(&mut self) {}

    /// The interrupt status and the interrupt change together, in `poll`.
    fn interrupt(&mut self, _source: usize) {}

    fn fds(&self, _fds: &mut Vec<RawFd>) {}
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn factorials_wrap_to_zero() {
        assert_eq!([0, 1, 5, 12].map(factorial), [1, 1, 120, 479_001_600]);
        assert_eq!(factorial(13), 1_932_053_504);
        assert_eq!(factorial(33), 1 << 31);
        assert_eq!([34, 35, u32::MAX].map(factorial), [0; 3]);
    }

    #[test]
    fn transfers_stay_in_the_buffer() {
        assert_eq!(within_buffer(0x40000, 4096), Some(0..4096));
        assert_eq!(within_buffer(0x40fff, 1), Some(4095..4096));
        assert_eq!(within_buffer(0x41000, 0), Some(4096..4096));
        for (own, count) in [
            (0x3ffff, 1),
            (0x40000, 4097),
            (0x40fff, 2),
            (0x41001, 0),
            (0x40001, u64::MAX),
            (u64::MAX, 1),
        ] {
            assert_eq!(within_buffer(own, count), None, "{own:#x} {count}");
        }
    }
}

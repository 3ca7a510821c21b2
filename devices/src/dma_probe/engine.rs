//! The accesses themselves, on the worker's thread.

use std::os::fd::RawFd;
use std::sync::Arc;

use iommu::{DmaError, DmaMemory, Iova};

use super::spec::{MAX_LENGTH, PAGE, command, status};
use super::{Registers, Shared};
use crate::worker::{Polled, QueueTask};

const PAGE_LEN: usize = 4096;
const _: () = assert!(PAGE_LEN as u64 == PAGE);

/// How a command ended.
enum End {
    Ok,
    BadCommand,
    Refused(DmaError),
}

/// The function's way out.
pub(super) struct Engine {
    shared: Arc<Shared>,
    memory: DmaMemory,
}

impl Engine {
    pub(super) fn new(shared: Arc<Shared>, memory: DmaMemory) -> Engine {
        Engine { shared, memory }
    }

    /// Back to the state after power-on.
    pub(super) fn reset(&mut self) {
        *self.shared.registers() = Registers::default();
    }

    fn run(&mut self) {
        let mut registers = *self.shared.registers();
        (registers.done, registers.reason) = (0, 0);
        let end = match registers.command {
            command::READ | command::WRITE if (1..=MAX_LENGTH).contains(&registers.length) => {
                self.copy(&mut registers)
            }
            command::SIGNAL if registers.address.is_multiple_of(4) => self.signal(&registers),
            _ => End::BadCommand,
        };
        registers.status = match &end {
            End::Ok => status::OK,
            End::BadCommand => status::BAD_COMMAND,
            End::Refused(DmaError::BusMasterOff) => status::BUS_MASTER_OFF,
            End::Refused(DmaError::NotMapped(..)) => status::NO_MEMORY,
            End::Refused(DmaError::Fault(_, reason)) => {
                registers.reason = reason.0.into();
                status::BLOCKED
            }
        };
        self.shared.count(|stats| {
            match registers.command {
                command::READ => stats.reads += 1,
                command::WRITE => stats.writes += 1,
                command::SIGNAL => stats.signals += 1,
                _ => {}
            }
            stats.bytes += registers.done;
            stats.errors += u64::from(registers.status != status::OK);
            stats.blocked += u64::from(registers.status == status::BLOCKED);
        });
        // Stores are ignored while the status is busy, so nothing is lost here.
        *self.shared.registers() = registers;
    }

    /// Reads or writes, page by page.
    fn copy(&self, registers: &mut Registers) -> End {
        let write = registers.command == command::WRITE;
        let pattern = registers.data.to_le_bytes();
        let mut scratch = [0; PAGE_LEN];
        if !write {
            registers.data = 0;
        }
        while registers.done < registers.length {
            let Some(address) = registers.address.checked_add(registers.done) else {
                let left = registers.length - registers.done;
                return End::Refused(DmaError::NotMapped(Iova(u64::MAX), left));
            };
            let len = (PAGE - address % PAGE).min(registers.length - registers.done);
            let Some(part) = usize::try_from(len)
                .ok()
                .and_then(|len| scratch.get_mut(..len))
            else {
                return End::BadCommand;
            };
            let result = if write {
                let phase = usize::try_from(registers.done % 8).unwrap_or(0);
                let bytes = pattern.iter().cycle().skip(phase);
                part.iter_mut()
                    .zip(bytes)
                    .for_each(|(to, from)| *to = *from);
                self.memory.write(Iova(address), part)
            } else {
                self.memory.read(Iova(address), part)
            };
            if let Err(error) = result {
                return End::Refused(error);
            }
            if !write {
                for (place, byte) in (registers.done..8).zip(&*part) {
                    registers.data |= u64::from(*byte) << (place * 8);
                }
            }
            registers.done += len;
        }
        End::Ok
    }

    /// In the interrupt range the write is an interrupt request, which memory takes as one.
    fn signal(&self, registers: &Registers) -> End {
        let [a, b, c, d, ..] = registers.data.to_le_bytes();
        let data = u32::from_le_bytes([a, b, c, d]);
        match self.memory.write_obj(Iova(registers.address), data) {
            Ok(()) => End::Ok,
            Err(error) => End::Refused(error),
        }
    }
}

impl QueueTask for Engine {
    fn poll(&mut self, _budget: u32) -> Polled {
        let work = self.has_work();
        if work {
            self.run();
        }
        Polled {
            work: work.into(),
            ..Polled::default()
        }
    }

    /// Every command kicks.
    fn arm(&mut self) {}

    fn has_work(&mut self) -> bool {
        self.shared.registers().status == status::BUSY
    }

    fn disarm(&mut self) {}

    /// There is none.
    fn interrupt(&mut self, _source: usize) {}

    fn fds(&self, _fds: &mut Vec<RawFd>) {}
}

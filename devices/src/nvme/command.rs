//! The NVM command set (NVM Express Base 1.4, section 6): from a submission entry to a request.

use iommu::{Access, DmaMemory, PinnedBuffers};

use super::io::Core;
use super::namespace::{Lba, Namespace};
use super::prp;
use super::slot::{Kind, Rest};
use super::spec::NSID_BROADCAST;
use super::spec::command::{Sqe, Status, nvm};
use crate::block::BlockOp;

/// What to do with a command.
pub(super) enum Action {
    /// Push this to its namespace.
    Push(BlockOp),
    /// It has ended.
    Finish(Status),
}

/// The command cannot be taken now: bus mastering is off, or its ring is gone.
pub(super) struct Wait;

/// Why a command does not start.
pub(super) enum Refusal {
    /// It ends with this status.
    Status(Status),
    /// It stays in its queue.
    Wait,
}

impl From<Status> for Refusal {
    fn from(status: Status) -> Refusal {
        Refusal::Status(status)
    }
}

impl From<prp::PrpError> for Refusal {
    fn from(error: prp::PrpError) -> Refusal {
        error.status().map_or(Refusal::Wait, Refusal::Status)
    }
}

/// Bytes of the largest Dataset Management list: 256 ranges.
const DSM_BYTES: usize = 4096;

impl Core {
    /// Decodes a command into its slot.
    pub(super) fn start(&mut self, mem: &DmaMemory, index: u16, sqe: &Sqe) -> Result<Action, Wait> {
        match self.decode(mem, index, sqe) {
            Ok(action) => Ok(action),
            Err(Refusal::Status(status)) => Ok(Action::Finish(status)),
            Err(Refusal::Wait) => Err(Wait),
        }
    }

    fn decode(&mut self, mem: &DmaMemory, index: u16, sqe: &Sqe) -> Result<Action, Refusal> {
        check_form(sqe)?;
        match sqe.opcode() {
            nvm::FLUSH => self.flush(index, sqe),
            nvm::WRITE => self.transfer(mem, index, sqe, Kind::Write),
            nvm::READ => self.transfer(mem, index, sqe, Kind::Read),
            nvm::WRITE_ZEROES => self.write_zeroes(index, sqe),
            nvm::DATASET_MANAGEMENT => self.dataset_management(mem, index, sqe),
            _ => Err(Status::INVALID_OPCODE.dnr().into()),
        }
    }

    /// Flush (6.8). All namespaces are flushed one after the other (Identify Controller VWC).
    fn flush(&mut self, index: u16, sqe: &Sqe) -> Result<Action, Refusal> {
        let slot = self.slots.get(index).ok_or(Status::INTERNAL_ERROR)?;
        slot.kind = Kind::Other;
        if sqe.nsid() != NSID_BROADCAST {
            slot.namespace = self.shared.active(sqe.nsid())?;
            return Ok(Action::Push(BlockOp::Flush));
        }
        if self.shared.namespaces.is_empty() {
            return Ok(Action::Finish(Status::SUCCESS));
        }
        slot.rest = Rest::FlushFrom(0);
        Ok(self.next(index))
    }

    /// Read (6.9) and Write (6.15).
    fn transfer(
        &mut self,
        mem: &DmaMemory,
        index: u16,
        sqe: &Sqe,
        kind: Kind,
    ) -> Result<Action, Refusal> {
        let slot = self.slots.get(index).ok_or(Status::INTERNAL_ERROR)?;
        slot.kind = kind;
        slot.namespace = self.shared.active(sqe.nsid())?;
        slot.lba = sqe.slba();
        let namespace = &self.shared.namespaces[slot.namespace];
        let bytes = sqe.blocks() << namespace.lba_shift;
        if bytes > self.shared.max_transfer {
            return Err(Status::INVALID_FIELD.dnr().into());
        }
        let (offset, len) = namespace.range(Lba(sqe.slba()), sqe.blocks())?;
        let access = match kind {
            Kind::Read => Access::Write,
            _ => Access::Read,
        };
        if kind == Kind::Write {
            writable(namespace)?;
        }
        pin(mem, self.page, sqe, len, access, &mut slot.buffers)?;
        slot.bytes = len;
        let cached = self
            .shared
            .write_cache
            .load(std::sync::atomic::Ordering::Relaxed);
        Ok(Action::Push(match kind {
            Kind::Read if sqe.fua() && cached => {
                // What is read must be on stable storage (6.9, FUA): flush first.
                slot.rest = Rest::ReadAt(offset);
                BlockOp::Flush
            }
            Kind::Read => BlockOp::Read { offset },
            _ => BlockOp::Write {
                offset,
                fua: sqe.fua() || !cached,
            },
        }))
    }

    /// Write Zeroes (6.16).
    fn write_zeroes(&mut self, index: u16, sqe: &Sqe) -> Result<Action, Refusal> {
        let slot = self.slots.get(index).ok_or(Status::INTERNAL_ERROR)?;
        slot.kind = Kind::WriteZeroes;
        slot.namespace = self.shared.active(sqe.nsid())?;
        slot.lba = sqe.slba();
        let namespace = &self.shared.namespaces[slot.namespace];
        let (offset, len) = namespace.range(Lba(sqe.slba()), sqe.blocks())?;
        writable(namespace)?;
        let cached = self
            .shared
            .write_cache
            .load(std::sync::atomic::Ordering::Relaxed);
        Ok(Action::Push(BlockOp::WriteZeroes {
            offset,
            len,
            unmap: sqe.cdw12() & nvm::WRITE_ZEROES_DEAC != 0 && namespace.info.discard,
            fua: sqe.fua() || !cached,
        }))
    }

    /// Dataset Management (6.7). Hints without Deallocate ask for nothing that the back end could do.
    fn dataset_management(
        &mut self,
        mem: &DmaMemory,
        index: u16,
        sqe: &Sqe,
    ) -> Result<Action, Refusal> {
        let slot = self.slots.get(index).ok_or(Status::INTERNAL_ERROR)?;
        slot.namespace = self.shared.active(sqe.nsid())?;
        let namespace = &self.shared.namespaces[slot.namespace];
        let count = (sqe.cdw10() & 0xff) + 1;
        let mut list = [0; DSM_BYTES];
        let mut filled = 0;
        let len = u64::from(count * nvm::DSM_RANGE_BYTES);
        prp::walk(mem, self.page, sqe.prp1(), sqe.prp2(), len, |at, len| {
            let end = usize::try_from(len).map_or(DSM_BYTES, |len| filled + len);
            let Some(part) = list.get_mut(filled..end) else {
                return Ok(());
            };
            filled = end;
            mem.read(at, part)
        })?;
        let (ranges, _) = list.as_chunks::<16>();
        for range in ranges.iter().take(usize::try_from(count).unwrap_or(0)) {
            let [_, _, _, _, a, b, c, d, lba @ ..] = *range;
            let blocks = u64::from(u32::from_le_bytes([a, b, c, d]));
            let lba = Lba(u64::from_le_bytes(lba));
            slot.lba = lba.0;
            let (offset, len) = namespace.range(lba, blocks)?;
            if len > 0 {
                slot.ranges.push((offset, len));
            }
        }
        if sqe.cdw11() & nvm::DSM_DEALLOCATE == 0 {
            return Ok(Action::Finish(Status::SUCCESS));
        }
        writable(namespace)?;
        if !namespace.info.discard {
            // Advice that the back end cannot take; the blocks stay as they are, which is allowed.
            return Ok(Action::Finish(Status::SUCCESS));
        }
        slot.rest = Rest::Ranges(0);
        Ok(self.next(index))
    }
}

/// Fused operations and SGLs are not supported (Identify Controller FUSES and SGLS are 0).
pub(super) fn check_form(sqe: &Sqe) -> Result<(), Status> {
    if sqe.fuse() != 0 || sqe.psdt() != 0 {
        return Err(Status::INVALID_FIELD.dnr());
    }
    Ok(())
}

fn writable(namespace: &Namespace) -> Result<(), Status> {
    if namespace.info.read_only {
        return Err(Status::WRITE_PROTECTED.dnr());
    }
    Ok(())
}

/// Pins a command's data. On error nothing stays pinned.
fn pin(
    mem: &DmaMemory,
    page: u64,
    sqe: &Sqe,
    len: u64,
    access: Access,
    buffers: &mut PinnedBuffers,
) -> Result<(), prp::PrpError> {
    let walked = prp::walk(mem, page, sqe.prp1(), sqe.prp2(), len, |at, len| {
        buffers.push(mem, at, len, access)
    });
    if walked.is_err() {
        buffers.release();
    }
    walked
}

//! Get Log Page (NVM Express Base 1.4, section 5.14).

use std::sync::atomic::Ordering;

use zerocopy::{FromZeros, IntoBytes};

use super::features::TEMPERATURE;
use super::{AdminTask, identify};
use crate::nvme::command::Refusal;
use crate::nvme::events::ERROR_ENTRIES;
use crate::nvme::spec::NSID_BROADCAST;
use crate::nvme::spec::command::{Sqe, Status, admin, event, log, low, nvm, pair};
use crate::nvme::spec::data::{
    EFFECT_CONTENT, EFFECT_SUPPORTED, EFFECTS_LOG_BYTES, ErrorEntry, FIRMWARE_LOG_BYTES, SmartLog,
};

/// CDW10: Retain Asynchronous Event.
const RETAIN: u32 = 1 << 15;

impl AdminTask {
    pub(super) fn get_log_page(&mut self, sqe: &Sqe) -> Result<u32, Refusal> {
        let lid = sqe.cdw10().to_le_bytes()[0];
        // NUMDL and NUMDU, 0's based.
        let dwords = u64::from(sqe.cdw10() >> 16 | u32::from(low(sqe.cdw11())) << 16) + 1;
        let (len, offset) = (dwords * 4, pair(sqe.cdw12(), sqe.cdw13()));
        if len > self.shared.max_transfer || !offset.is_multiple_of(4) {
            return Err(Status::INVALID_FIELD.dnr().into());
        }
        let page = match lid {
            log::ERROR => self.error_log(),
            log::SMART => {
                // Only the controller has one (Identify Controller LPA bit 0 is 0).
                if !matches!(sqe.nsid(), 0 | NSID_BROADCAST) {
                    return Err(Status::INVALID_FIELD.dnr().into());
                }
                self.smart_log()
            }
            log::FIRMWARE_SLOT => firmware_log(),
            log::COMMAND_EFFECTS => effects_log(),
            _ => return Err(Status::INVALID_LOG_PAGE.dnr().into()),
        };
        let invalid = Status::INVALID_FIELD.dnr();
        let offset = usize::try_from(offset).map_err(|_| invalid)?;
        let rest = page.get(offset..).ok_or(invalid)?;
        // Beyond the end of the page the host gets zeroes.
        let mut data = vec![0; usize::try_from(len).map_err(|_| invalid)?];
        let copied = rest.len().min(data.len());
        data[..copied].copy_from_slice(&rest[..copied]);
        self.send(sqe, &data)?;
        if sqe.cdw10() & RETAIN == 0 {
            let kind = match lid {
                log::ERROR => Some(event::ERROR),
                log::SMART => Some(event::SMART),
                _ => None,
            };
            if let Some(kind) = kind {
                self.shared.events().clear(kind);
            }
        }
        Ok(0)
    }

    fn error_log(&self) -> Vec<u8> {
        let mut page = vec![0; ERROR_ENTRIES * size_of::<ErrorEntry>()];
        let (slots, _) = page.as_chunks_mut::<64>();
        let errors = self.shared.errors();
        for (slot, entry) in slots.iter_mut().zip(errors.entries()) {
            slot.copy_from_slice(entry.as_bytes());
        }
        page
    }

    fn smart_log(&self) -> Vec<u8> {
        let mut log = SmartLog::new_zeroed();
        log.critical_warning = self.warnings();
        log.temperature = TEMPERATURE.to_le_bytes();
        // No wear: there is no medium of our own. Controller Busy Time is not measured and stays 0.
        log.spare = 100;
        log.spare_threshold = 10;
        let (mut reads, mut writes, mut read, mut written) = (0u64, 0u64, 0u64, 0u64);
        for queue in &self.shared.counters {
            reads = reads.wrapping_add(queue.reads.get());
            writes = writes.wrapping_add(queue.writes.get());
            read = read.wrapping_add(queue.bytes_read.get());
            written = written.wrapping_add(queue.bytes_written.get());
        }
        log.units_read = read.div_ceil(512 * 1000).into();
        log.units_written = written.div_ceil(512 * 1000).into();
        log.reads = reads.into();
        log.writes = writes.into();
        // The controller's life is the power cycle.
        log.power_cycles = 1.into();
        log.hours = (self.started.elapsed().as_secs() / 3600).into();
        log.media_errors = self.shared.media_errors.load(Ordering::Relaxed).into();
        log.error_entries = self.shared.errors().count().into();
        log.as_bytes().to_vec()
    }
}

/// Slot 1 is active and holds the only firmware there is.
fn firmware_log() -> Vec<u8> {
    let mut page = vec![0; FIRMWARE_LOG_BYTES];
    page[0] = 1;
    page[8..16].copy_from_slice(&identify::padded::<8>(identify::FIRMWARE));
    page
}

fn effects_log() -> Vec<u8> {
    let mut page = vec![0; EFFECTS_LOG_BYTES];
    let admin = [
        admin::DELETE_SQ,
        admin::CREATE_SQ,
        admin::GET_LOG_PAGE,
        admin::DELETE_CQ,
        admin::CREATE_CQ,
        admin::IDENTIFY,
        admin::ABORT,
        admin::SET_FEATURES,
        admin::GET_FEATURES,
        admin::ASYNC_EVENT_REQUEST,
    ];
    let io = [
        (nvm::FLUSH, 0),
        (nvm::WRITE, EFFECT_CONTENT),
        (nvm::READ, 0),
        (nvm::WRITE_ZEROES, EFFECT_CONTENT),
        (nvm::DATASET_MANAGEMENT, EFFECT_CONTENT),
    ];
    let (entries, _) = page.as_chunks_mut::<4>();
    for opcode in admin {
        entries[usize::from(opcode)] = EFFECT_SUPPORTED.to_le_bytes();
    }
    for (opcode, effect) in io {
        entries[256 + usize::from(opcode)] = (EFFECT_SUPPORTED | effect).to_le_bytes();
    }
    page
}

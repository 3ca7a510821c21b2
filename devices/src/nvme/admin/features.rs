//! Get and Set Features (NVM Express Base 1.4, sections 5.13 and 5.21).
//!
//! A feature is either honoured or its Set Features is refused; nothing is stored and ignored. No
//! feature can be saved: values hold until the next controller reset.

use std::sync::atomic::Ordering;
use std::time::Duration;

use super::AdminTask;
use crate::nvme::Config;
use crate::nvme::command::Refusal;
use crate::nvme::queue::QueueId;
use crate::nvme::shared::{ARBITRATION_BURST, Shared};
use crate::nvme::spec::NSID_BROADCAST;
use crate::nvme::spec::command::feature::{self, select};
use crate::nvme::spec::command::{Sqe, Status, event, high, low};
use crate::nvme::spec::data::WARNING_TEMPERATURE;
use crate::worker::Coalesce;

/// Composite Temperature, Kelvin. There is no sensor: the controller is always at 25 degrees.
pub(super) const TEMPERATURE: u16 = 298;
/// Warning Composite Temperature Threshold, and the default of the over threshold.
pub(super) const WARNING: u16 = 343;
/// Critical Composite Temperature Threshold.
pub(super) const CRITICAL: u16 = 353;

/// Asynchronous Event Configuration: SMART critical warnings (bits 4:0). No notices (Identify
/// Controller OAES is 0).
const EVENT_BITS: u32 = 0x1f;
/// One unit of the Interrupt Coalescing aggregation time.
const TIME_UNIT: Duration = Duration::from_micros(100);

/// Values in force.
pub(super) struct Features {
    /// Arbitration Burst, log2.
    burst: u8,
    over: u16,
    under: u16,
    write_cache: bool,
    /// I/O submission queues that may be created.
    pub(super) sq_count: u16,
    /// I/O completion queues that may be created.
    pub(super) cq_count: u16,
    /// Aggregation threshold (0's based) in 7:0, aggregation time in 15:8.
    coalescing: u16,
    /// Coalescing Disable, by vector.
    uncoalesced: Vec<bool>,
    /// Disable Normal. Normal and power-fail atomicity are both one block, so that both values are
    /// honoured alike.
    disable_normal: bool,
    events: u32,
}

impl Features {
    /// The defaults.
    pub(super) fn new(config: &Config) -> Features {
        Features {
            burst: ARBITRATION_BURST,
            over: WARNING,
            under: 0,
            write_cache: config.volatile_write_cache,
            sq_count: config.max_queue_pairs,
            cq_count: config.max_queue_pairs,
            coalescing: 0,
            uncoalesced: vec![false; usize::from(config.max_queue_pairs) + 1],
            disable_normal: false,
            events: 0,
        }
    }

    /// Hands over what the I/O workers read on their way.
    pub(super) fn apply(&self, shared: &Shared) {
        shared.write_cache.store(self.write_cache, Ordering::SeqCst);
        shared.burst.store(self.burst, Ordering::Relaxed);
    }

    /// The moderation of a completion queue that interrupts by `vector`.
    pub(super) fn coalesce(&self, vector: Option<u16>) -> Coalesce {
        let disabled = vector.and_then(|vector| self.uncoalesced.get(usize::from(vector)));
        if disabled.copied().unwrap_or(true) {
            return Coalesce::OFF;
        }
        let [threshold, time] = self.coalescing.to_le_bytes();
        Coalesce {
            max_events: u32::from(threshold) + 1,
            max_delay: TIME_UNIT * u32::from(time),
        }
    }

    /// The value of a feature as Get Features returns it.
    fn value(&self, fid: u8, cdw11: u32) -> Result<u32, Status> {
        let invalid = Status::INVALID_FIELD.dnr();
        Ok(match fid {
            feature::ARBITRATION => u32::from(self.burst),
            // Power state 0 is the only one.
            feature::POWER_MANAGEMENT => 0,
            feature::TEMPERATURE_THRESHOLD => match temperature_select(cdw11) {
                (0, 0) => u32::from(self.over),
                (0, 1) => u32::from(self.under),
                _ => return Err(invalid),
            },
            // No time limit, no deallocated-block errors.
            feature::ERROR_RECOVERY => 0,
            feature::VOLATILE_WRITE_CACHE => u32::from(self.write_cache),
            feature::NUMBER_OF_QUEUES => {
                u32::from(self.cq_count - 1) << 16 | u32::from(self.sq_count - 1)
            }
            feature::INTERRUPT_COALESCING => u32::from(self.coalescing),
            feature::INTERRUPT_VECTOR => {
                let vector = low(cdw11);
                let disabled = self.uncoalesced.get(usize::from(vector)).ok_or(invalid)?;
                u32::from(*disabled) << 16 | u32::from(vector)
            }
            feature::WRITE_ATOMICITY => u32::from(self.disable_normal),
            feature::ASYNC_EVENT_CONFIG => self.events,
            _ => return Err(invalid),
        })
    }
}

/// Threshold Temperature Select and Threshold Type Select (figure 276).
fn temperature_select(cdw11: u32) -> (u32, u32) {
    (cdw11 >> 16 & 0xf, cdw11 >> 20 & 3)
}

fn changeable(fid: u8) -> bool {
    !matches!(fid, feature::POWER_MANAGEMENT | feature::ERROR_RECOVERY)
}

impl AdminTask {
    pub(super) fn get_features(&mut self, sqe: &Sqe) -> Result<u32, Refusal> {
        let fid = sqe.cdw10().to_le_bytes()[0];
        let value = match sqe.cdw10() >> 8 & 7 {
            select::CURRENT => self.features.value(fid, sqe.cdw11())?,
            // Nothing can be saved, so the saved value is the default (5.13).
            select::DEFAULT | select::SAVED => {
                Features::new(&self.config).value(fid, sqe.cdw11())?
            }
            select::CAPABILITIES => {
                self.features.value(fid, 0)?;
                if changeable(fid) {
                    feature::CHANGEABLE
                } else {
                    0
                }
            }
            _ => return Err(Status::INVALID_FIELD.dnr().into()),
        };
        Ok(value)
    }

    pub(super) fn set_features(&mut self, sqe: &Sqe) -> Result<u32, Refusal> {
        let invalid = || Refusal::Status(Status::INVALID_FIELD.dnr());
        let (cdw10, value) = (sqe.cdw10(), sqe.cdw11());
        let fid = cdw10.to_le_bytes()[0];
        // Is there such a feature? (The selector in CDW11 is checked below.)
        self.features.value(fid, 0)?;
        if cdw10 & feature::SAVE != 0 {
            return Err(Status::FEATURE_NOT_SAVEABLE.dnr().into());
        }
        if !matches!(sqe.nsid(), 0 | NSID_BROADCAST) {
            return Err(Status::FEATURE_NOT_NAMESPACE_SPECIFIC.dnr().into());
        }
        if !changeable(fid) {
            return Err(Status::FEATURE_NOT_CHANGEABLE.dnr().into());
        }
        match fid {
            feature::ARBITRATION => {
                let [burst, low, medium, high] = value.to_le_bytes();
                // Weights belong to weighted round robin, which CAP.AMS does not offer.
                if (low, medium, high) != (0, 0, 0) {
                    return Err(invalid());
                }
                self.features.burst = burst & 7;
                self.features.apply(&self.shared);
            }
            feature::TEMPERATURE_THRESHOLD => {
                match temperature_select(value) {
                    (0 | 0xf, 0) => self.features.over = low(value),
                    (0 | 0xf, 1) => self.features.under = low(value),
                    _ => return Err(invalid()),
                }
                self.check_temperature();
            }
            feature::VOLATILE_WRITE_CACHE => self.set_write_cache(value & 1 != 0)?,
            feature::NUMBER_OF_QUEUES => {
                let (sqs, cqs) = (low(value), high(value));
                if sqs == u16::MAX || cqs == u16::MAX {
                    return Err(invalid());
                }
                if self.created.any() {
                    return Err(Status::COMMAND_SEQUENCE_ERROR.dnr().into());
                }
                let most = self.config.max_queue_pairs;
                self.features.sq_count = (sqs + 1).min(most);
                self.features.cq_count = (cqs + 1).min(most);
                return Ok(self.features.value(fid, 0)?);
            }
            feature::INTERRUPT_COALESCING => {
                self.features.coalescing = low(value);
                self.apply_coalescing();
            }
            feature::INTERRUPT_VECTOR => {
                let slot = self.features.uncoalesced.get_mut(usize::from(low(value)));
                *slot.ok_or_else(invalid)? = value & 1 << 16 != 0;
                self.apply_coalescing();
            }
            feature::WRITE_ATOMICITY => self.features.disable_normal = value & 1 != 0,
            feature::ASYNC_EVENT_CONFIG => {
                if value & !EVENT_BITS != 0 {
                    return Err(invalid());
                }
                self.features.events = value;
                self.check_temperature();
            }
            _ => return Err(invalid()),
        }
        Ok(0)
    }

    /// Turning the cache off makes everything written so far stable: new writes go through from the
    /// first moment, those under way end, then all is flushed. On failure the cache stays on.
    fn set_write_cache(&mut self, on: bool) -> Result<(), Status> {
        let was = std::mem::replace(&mut self.features.write_cache, on);
        self.features.apply(&self.shared);
        if on || !was {
            return Ok(());
        }
        for worker in self.workers.iter() {
            worker.with(|task| task.drain());
        }
        self.flush_all().inspect_err(|_| {
            self.features.write_cache = true;
            self.features.apply(&self.shared);
        })
    }

    /// The admin queue is never moderated (5.21.1.8): its worker is not among these.
    fn apply_coalescing(&self) {
        for (id, cq) in (0..).zip(&self.created.cqs) {
            if let (Some(cq), Some(worker)) = (cq, self.workers.get(QueueId(id))) {
                worker.set_coalesce(0, self.features.coalesce(cq.vector));
            }
        }
    }

    /// SMART critical warnings in force.
    pub(super) fn warnings(&self) -> u8 {
        let inside = self.features.under < TEMPERATURE && TEMPERATURE < self.features.over;
        if inside { 0 } else { WARNING_TEMPERATURE }
    }

    /// Reports a warning that has come up, if the host wants to know.
    fn check_temperature(&mut self) {
        let enabled = self.features.events & u32::from(WARNING_TEMPERATURE) != 0;
        if !enabled {
            return;
        }
        let now = self.warnings();
        if now & !self.warnings & WARNING_TEMPERATURE != 0 {
            self.shared.event(event::TEMPERATURE);
        }
        self.warnings = now;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn coalescing_is_off_until_both_bounds_are_set() {
        let mut features = Features::new(&Config::default());
        assert!(features.coalesce(Some(1)).is_off());
        features.coalescing = 0x0007;
        assert!(features.coalesce(Some(1)).is_off(), "no time");
        features.coalescing = 0x0a07;
        let on = features.coalesce(Some(1));
        assert_eq!((on.max_events, on.max_delay), (8, Duration::from_millis(1)));
        features.uncoalesced[1] = true;
        assert!(features.coalesce(Some(1)).is_off());
        assert!(!features.coalesce(Some(2)).is_off());
        assert!(features.coalesce(None).is_off());
    }
}

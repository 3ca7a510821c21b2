//! Identify (NVM Express Base 1.4, section 5.15): says what works, and nothing else.

use zerocopy::{FromZeros, IntoBytes};

use super::features::{CRITICAL, WARNING};
use super::{AdminTask, MAX_ABORTS, MAX_EVENT_REQUESTS};
use crate::nvme::VENDOR_ID;
use crate::nvme::command::Refusal;
use crate::nvme::events::ERROR_ENTRIES;
use crate::nvme::namespace::{Namespace, uuid};
use crate::nvme::shared::ARBITRATION_BURST;
use crate::nvme::spec::command::{Sqe, Status, cns, high};
use crate::nvme::spec::data::{IDENTIFY_BYTES, IdentifyController, IdentifyNamespace, NIDT_UUID};
use crate::nvme::spec::{CQE_SHIFT, NSID_BROADCAST, SQE_SHIFT, VERSION_1_4};

/// Firmware Revision.
pub(super) const FIRMWARE: &str = env!("CARGO_PKG_VERSION");
/// Controller ID; the only one of its subsystem.
const CONTROLLER_ID: u16 = 0;

/// Text padded with spaces.
pub(super) fn padded<const N: usize>(text: &str) -> [u8; N] {
    let mut field = [b' '; N];
    for (to, from) in field.iter_mut().zip(text.bytes()) {
        *to = from;
    }
    field
}

impl AdminTask {
    pub(super) fn identify(&mut self, sqe: &Sqe) -> Result<u32, Refusal> {
        let nsid = sqe.nsid();
        let data = match sqe.cdw10().to_le_bytes()[0] {
            cns::NAMESPACE | cns::ALLOCATED_NAMESPACE => self.namespace(nsid)?,
            cns::CONTROLLER => self.controller(),
            cns::ACTIVE_NAMESPACES | cns::ALLOCATED_NAMESPACES => self.list(nsid)?,
            cns::DESCRIPTORS => {
                let index = self.shared.namespace(nsid);
                let index = index.ok_or(Status::INVALID_NAMESPACE.dnr())?;
                descriptors(&self.shared.namespaces[index])
            }
            cns::NAMESPACE_CONTROLLERS => {
                self.shared.active(nsid)?;
                controllers(high(sqe.cdw10()))
            }
            cns::CONTROLLERS => controllers(high(sqe.cdw10())),
            _ => return Err(Status::INVALID_FIELD.dnr().into()),
        };
        self.send(sqe, &data)?;
        Ok(0)
    }

    fn controller(&self) -> Vec<u8> {
        let mut id = IdentifyController::new_zeroed();
        id.vid = VENDOR_ID.into();
        id.ssvid = VENDOR_ID.into();
        id.sn = padded(&self.config.serial);
        id.mn = padded(&self.config.model);
        id.fr = padded(FIRMWARE);
        id.rab = ARBITRATION_BURST;
        id.mdts = self.config.mdts;
        id.cntlid = CONTROLLER_ID.into();
        id.ver = VERSION_1_4.into();
        id.cntrltype = 1;
        id.acl = MAX_ABORTS - 1;
        id.aerl = zeroes_based(MAX_EVENT_REQUESTS);
        // One firmware slot, read-only.
        id.frmw = 1 << 1 | 1;
        // Commands supported and effects log; extended data length and offset.
        id.lpa = 1 << 1 | 1 << 2;
        id.elpe = zeroes_based(ERROR_ENTRIES);
        id.wctemp = WARNING.into();
        id.cctemp = CRITICAL.into();
        id.sqes = SQE_SHIFT << 4 | SQE_SHIFT;
        id.cqes = CQE_SHIFT << 4 | CQE_SHIFT;
        id.nn = self.shared.highest_nsid().into();
        // Dataset Management, Write Zeroes, Select in Get Features.
        id.oncs = (1 << 2 | 1 << 3 | 1 << 4).into();
        // Present; Flush of all namespaces is supported.
        id.vwc = 0b11 << 1 | 1;
        let nqn = nqn(&self.config.serial);
        for (to, from) in id.subnqn.iter_mut().zip(nqn.bytes()) {
            *to = from;
        }
        id.as_bytes().to_vec()
    }

    /// An inactive id within the valid ones gives zeroes.
    fn namespace(&self, nsid: u32) -> Result<Vec<u8>, Status> {
        let Some(index) = self.shared.namespace(nsid) else {
            if nsid == 0 || nsid > self.shared.highest_nsid() {
                return Err(Status::INVALID_NAMESPACE.dnr());
            }
            return Ok(vec![0; IDENTIFY_BYTES]);
        };
        let namespace = &self.shared.namespaces[index];
        let mut id = IdentifyNamespace::new_zeroed();
        id.nsze = namespace.blocks.into();
        id.ncap = namespace.blocks.into();
        id.nuse = namespace.blocks.into();
        id.dlfeat = u8::from(namespace.info.discard) << 3;
        id.nsattr = u8::from(namespace.info.read_only);
        id.lbaf0 = (u32::from(namespace.lba_shift) << 16).into();
        Ok(id.as_bytes().to_vec())
    }

    /// Ids above `nsid`, ascending.
    fn list(&self, nsid: u32) -> Result<Vec<u8>, Status> {
        if nsid >= NSID_BROADCAST - 1 {
            return Err(Status::INVALID_NAMESPACE.dnr());
        }
        let mut data = vec![0; IDENTIFY_BYTES];
        let (entries, _) = data.as_chunks_mut::<4>();
        let above = self.shared.namespaces.iter().filter(|ns| ns.nsid > nsid);
        for (entry, namespace) in entries.iter_mut().zip(above) {
            *entry = namespace.nsid.to_le_bytes();
        }
        Ok(data)
    }
}

/// NVM Subsystem NVMe Qualified Name (section 7.9): the UUID form.
fn nqn(serial: &str) -> String {
    let uuid = uuid(serial, 0);
    let mut text = String::from("nqn.2014-08.org.nvmexpress:uuid:");
    for (index, byte) in uuid.iter().enumerate() {
        if matches!(index, 4 | 6 | 8 | 10) {
            text.push('-');
        }
        text.push_str(&format!("{byte:02x}"));
    }
    text
}

/// Namespace Identification Descriptor list (figure 251): a UUID.
fn descriptors(namespace: &Namespace) -> Vec<u8> {
    let mut data = vec![0; IDENTIFY_BYTES];
    data[0] = NIDT_UUID;
    data[1] = 16;
    data[4..20].copy_from_slice(&namespace.uuid);
    data
}

/// Controller List (section 4.10) of the ids from `first` on: [`CONTROLLER_ID`], 0, is the only one.
fn controllers(first: u16) -> Vec<u8> {
    let mut data = vec![0; IDENTIFY_BYTES];
    if first == CONTROLLER_ID {
        data[0] = 1;
        data[2..4].copy_from_slice(&CONTROLLER_ID.to_le_bytes());
    }
    data
}

fn zeroes_based(count: usize) -> u8 {
    u8::try_from(count.saturating_sub(1)).unwrap_or(u8::MAX)
}

//! A namespace: logical blocks on a back end.

use std::io;
use std::sync::Arc;

use iommu::PinnedBuffers;

use super::config::{ConfigError, NamespaceConfig};
use super::spec::command::Status;
use crate::block::{BlockBackend, BlockInfo, BlockOp, BlockQueue, BlockRequest};

/// Address of a logical block.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Lba(pub u64);

/// A namespace that is attached to the controller.
pub(super) struct Namespace {
    pub(super) nsid: u32,
    pub(super) backend: Arc<dyn BlockBackend>,
    pub(super) info: BlockInfo,
    /// log2 of the bytes in a block.
    pub(super) lba_shift: u8,
    pub(super) blocks: u64,
    pub(super) uuid: [u8; 16],
}

impl Namespace {
    pub(super) fn new(serial: &str, config: &NamespaceConfig) -> Result<Namespace, ConfigError> {
        let (nsid, value) = (config.nsid, config.lba_size);
        let info = config.backend.info();
        let lba_shift = match value {
            512 => 9,
            4096 => 12,
            _ => 0,
        };
        if lba_shift == 0 || info.logical_block == 0 || value % info.logical_block != 0 {
            return Err(ConfigError::LbaSize {
                nsid,
                backend: info.logical_block,
                value,
            });
        }
        let blocks = info.capacity >> lba_shift;
        if blocks == 0 {
            return Err(ConfigError::Empty(nsid));
        }
        Ok(Namespace {
            nsid,
            backend: Arc::clone(&config.backend),
            info,
            lba_shift,
            blocks,
            uuid: uuid(serial, nsid),
        })
    }

    /// Byte offset and length of `blocks` blocks from `lba`.
    pub(super) fn range(&self, lba: Lba, blocks: u64) -> Result<(u64, u64), Status> {
        match lba.0.checked_add(blocks) {
            Some(end) if end <= self.blocks => {
                Ok((lba.0 << self.lba_shift, blocks << self.lba_shift))
            }
            _ => Err(Status::LBA_OUT_OF_RANGE.dnr()),
        }
    }

    /// Puts every completed write on stable storage; waits for it.
    pub(super) fn flush(&self) -> io::Result<()> {
        let mut queue = Arc::clone(&self.backend).open_queue(1)?;
        queue.push(BlockRequest {
            op: BlockOp::Flush,
            buffers: PinnedBuffers::new(),
            tag: 0,
        });
        queue.submit();
        loop {
            if let Some(completion) = queue.reap() {
                return completion.result;
            }
            wait(queue.as_ref());
        }
    }
}

/// Waits until `queue` may have a completion.
pub(super) fn wait(queue: &dyn BlockQueue) {
    let Some(fd) = queue.fd() else {
        // Requests end as they are pushed, so there is nothing to wait for.
        std::thread::yield_now();
        return;
    };
    let mut poll = libc::pollfd {
        fd,
        events: libc::POLLIN,
        revents: 0,
    };
    // An interrupted wait is tried again by the caller, whose condition does not hold yet. The limit
    // is a safety net: a completion that was reaped already does not make the descriptor readable.
    // SAFETY: `poll` is one valid pollfd for the length of the call.
    #[expect(unsafe_code, reason = "poll(2) on the queue's descriptor")]
    let _ = unsafe { libc::poll(&raw mut poll, 1, 100) };
}

/// A UUID (RFC 9562, version 8: custom) that is the same whenever serial number and namespace id are:
/// FNV-1a over both, 128 bits.
pub(super) fn uuid(serial: &str, nsid: u32) -> [u8; 16] {
    let mut hash: u128 = 0x6c62_272e_07bb_0142_62b8_2175_6295_c58d;
    for byte in serial.bytes().chain(nsid.to_le_bytes()) {
        hash ^= u128::from(byte);
        hash = hash.wrapping_mul(0x0100_0000_0000_0000_0000_013b);
    }
    let mut uuid = hash.to_be_bytes();
    uuid[6] = uuid[6] & 0x0f | 0x80;
    uuid[8] = uuid[8] & 0x3f | 0x80;
    uuid
}

/// The status for an error of the host's storage, and whether trying again is useless.
///
/// Linux maps Capacity Exceeded to ENOSPC and Unrecovered Read Error and Write Fault to a medium
/// error; both are what the host said.
pub(super) fn host_status(error: &io::Error, writing: bool) -> Status {
    match error.raw_os_error() {
        Some(libc::ENOSPC | libc::EDQUOT | libc::EFBIG) => Status::CAPACITY_EXCEEDED.dnr(),
        Some(libc::EROFS | libc::EPERM | libc::EACCES) if writing => Status::WRITE_PROTECTED.dnr(),
        Some(libc::ENOMEM | libc::EAGAIN | libc::EMFILE | libc::ENFILE) => Status::INTERNAL_ERROR,
        _ => match error.kind() {
            io::ErrorKind::ReadOnlyFilesystem => Status::WRITE_PROTECTED.dnr(),
            io::ErrorKind::StorageFull => Status::CAPACITY_EXCEEDED.dnr(),
            _ if writing => Status::WRITE_FAULT,
            _ => Status::UNRECOVERED_READ_ERROR,
        },
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn host_errors_become_what_linux_understands() {
        let status = |errno, writing| host_status(&io::Error::from_raw_os_error(errno), writing);
        assert_eq!(status(libc::ENOSPC, true), Status::CAPACITY_EXCEEDED.dnr());
        assert_eq!(status(libc::EIO, true), Status::WRITE_FAULT);
        assert_eq!(status(libc::EIO, false), Status::UNRECOVERED_READ_ERROR);
        assert_eq!(status(libc::EROFS, true), Status::WRITE_PROTECTED.dnr());
        let short = io::Error::from(io::ErrorKind::UnexpectedEof);
        assert_eq!(host_status(&short, false), Status::UNRECOVERED_READ_ERROR);
    }

    #[test]
    fn uuids_are_stable_and_differ() {
        assert_eq!(uuid("a", 1), uuid("a", 1));
        assert_ne!(uuid("a", 1), uuid("a", 2));
        assert_ne!(uuid("a", 1), uuid("b", 1));
        assert_eq!(uuid("a", 1)[6] >> 4, 8);
    }
}

//! Submission entries in the making.

use devices::nvme::spec::command::{admin, nvm};

use super::Transfer;

/// A command; the command identifier is set when it is submitted.
#[derive(Clone, Copy, Debug)]
pub struct Command(pub(super) [u32; 16]);

fn halves(value: u64) -> [u32; 2] {
    let [a, b, c, d, e, f, g, h] = value.to_le_bytes();
    [
        u32::from_le_bytes([a, b, c, d]),
        u32::from_le_bytes([e, f, g, h]),
    ]
}

impl Command {
    /// An opcode for a namespace; all else is 0.
    pub fn new(opcode: u8, nsid: u32) -> Command {
        let mut dwords = [0; 16];
        dwords[0] = opcode.into();
        dwords[1] = nsid;
        Command(dwords)
    }

    /// Sets a dword of the entry, 0 to 15.
    #[must_use]
    pub fn dword(mut self, index: usize, value: u32) -> Command {
        self.0[index] = value;
        self
    }

    /// Sets bits of a dword.
    #[must_use]
    pub fn or(mut self, index: usize, bits: u32) -> Command {
        self.0[index] |= bits;
        self
    }

    /// Sets the PRP entries.
    #[must_use]
    pub fn prp(mut self, prp1: u64, prp2: u64) -> Command {
        [self.0[6], self.0[7]] = halves(prp1);
        [self.0[8], self.0[9]] = halves(prp2);
        self
    }

    /// Sets the PRP entries to a transfer's.
    #[must_use]
    pub fn data(self, data: &Transfer) -> Command {
        let (prp1, prp2) = data.prp();
        self.prp(prp1, prp2)
    }

    /// A command on `blocks` (1 to 65536) blocks from `lba`.
    pub fn blocks(opcode: u8, nsid: u32, lba: u64, blocks: u32) -> Command {
        let mut command = Command::new(opcode, nsid).dword(12, blocks - 1);
        [command.0[10], command.0[11]] = halves(lba);
        command
    }

    /// Write Zeroes.
    pub fn write_zeroes(nsid: u32, lba: u64, blocks: u32) -> Command {
        Command::blocks(nvm::WRITE_ZEROES, nsid, lba, blocks)
    }

    /// Flush.
    pub fn flush(nsid: u32) -> Command {
        Command::new(nvm::FLUSH, nsid)
    }

    /// Force Unit Access.
    #[must_use]
    pub fn fua(self) -> Command {
        self.or(12, 1 << 30)
    }

    /// Dataset Management with Deallocate; `data` holds `ranges` ranges.
    pub fn deallocate(nsid: u32, data: &Transfer, ranges: &[(u64, u32)]) -> Command {
        let mut list = Vec::new();
        for (lba, blocks) in ranges {
            list.extend_from_slice(&0u32.to_le_bytes());
            list.extend_from_slice(&blocks.to_le_bytes());
            list.extend_from_slice(&lba.to_le_bytes());
        }
        data.set(&list);
        let count = u32::try_from(ranges.len()).expect("ranges");
        Command::new(nvm::DATASET_MANAGEMENT, nsid)
            .data(data)
            .dword(10, count - 1)
            .dword(11, nvm::DSM_DEALLOCATE)
    }

    /// Identify.
    pub fn identify(cns: u8, nsid: u32) -> Command {
        Command::new(admin::IDENTIFY, nsid).dword(10, cns.into())
    }

    /// Get Log Page of `bytes` bytes.
    pub fn log_page(lid: u8, bytes: u32) -> Command {
        let dwords = bytes / 4 - 1;
        Command::new(admin::GET_LOG_PAGE, 0xffff_ffff)
            .dword(10, dwords << 16 | u32::from(lid))
            .dword(11, dwords >> 16)
    }

    /// Set Features.
    pub fn set_feature(fid: u8, value: u32) -> Command {
        Command::new(admin::SET_FEATURES, 0)
            .dword(10, fid.into())
            .dword(11, value)
    }

    /// Get Features with a Select value.
    pub fn get_feature(fid: u8, select: u32) -> Command {
        Command::new(admin::GET_FEATURES, 0).dword(10, select << 8 | u32::from(fid))
    }

    /// Create I/O Completion Queue, contiguous, with interrupts.
    pub fn create_cq(id: u16, entries: u32, base: u64, vector: u16) -> Command {
        Command::new(admin::CREATE_CQ, 0)
            .prp(base, 0)
            .dword(10, (entries - 1) << 16 | u32::from(id))
            .dword(11, u32::from(vector) << 16 | 0b11)
    }

    /// Create I/O Submission Queue, contiguous.
    pub fn create_sq(id: u16, entries: u32, base: u64, cq: u16) -> Command {
        Command::new(admin::CREATE_SQ, 0)
            .prp(base, 0)
            .dword(10, (entries - 1) << 16 | u32::from(id))
            .dword(11, u32::from(cq) << 16 | 1)
    }

    /// Delete I/O Submission Queue.
    pub fn delete_sq(id: u16) -> Command {
        Command::new(admin::DELETE_SQ, 0).dword(10, id.into())
    }

    /// Delete I/O Completion Queue.
    pub fn delete_cq(id: u16) -> Command {
        Command::new(admin::DELETE_CQ, 0).dword(10, id.into())
    }
}

//! Submission and completion queue entries, opcodes, status codes.

/// A submission queue entry: sixteen little-endian dwords (section 4.2, figures 104 to 106).
#[derive(Clone, Copy, Debug)]
pub struct Sqe(pub [u32; 16]);

impl Sqe {
    /// Opcode (CDW0 07:00).
    pub fn opcode(&self) -> u8 {
        self.0[0].to_le_bytes()[0]
    }

    /// Fused Operation (CDW0 09:08).
    pub fn fuse(&self) -> u8 {
        self.0[0].to_le_bytes()[1] & 3
    }

    /// PRP or SGL for Data Transfer (CDW0 15:14); 0 is PRP.
    pub fn psdt(&self) -> u8 {
        self.0[0].to_le_bytes()[1] >> 6
    }

    /// Command Identifier (CDW0 31:16).
    pub fn cid(&self) -> u16 {
        high(self.0[0])
    }

    /// Namespace Identifier.
    pub fn nsid(&self) -> u32 {
        self.0[1]
    }

    /// Metadata Pointer.
    pub fn mptr(&self) -> u64 {
        pair(self.0[4], self.0[5])
    }

    /// PRP Entry 1.
    pub fn prp1(&self) -> u64 {
        pair(self.0[6], self.0[7])
    }

    /// PRP Entry 2.
    pub fn prp2(&self) -> u64 {
        pair(self.0[8], self.0[9])
    }

    /// Command Dword 10.
    pub fn cdw10(&self) -> u32 {
        self.0[10]
    }

    /// Command Dword 11.
    pub fn cdw11(&self) -> u32 {
        self.0[11]
    }

    /// Command Dword 12.
    pub fn cdw12(&self) -> u32 {
        self.0[12]
    }

    /// Command Dword 13.
    pub fn cdw13(&self) -> u32 {
        self.0[13]
    }

    /// Command Dword 14.
    pub fn cdw14(&self) -> u32 {
        self.0[14]
    }

    /// Starting LBA of Read, Write and Write Zeroes (CDW10 and CDW11).
    pub fn slba(&self) -> u64 {
        pair(self.0[10], self.0[11])
    }

    /// Number of Logical Blocks of the same commands (CDW12 15:00), made 1's based.
    pub fn blocks(&self) -> u64 {
        u64::from(low(self.0[12])) + 1
    }

    /// Force Unit Access (CDW12 30).
    pub fn fua(&self) -> bool {
        self.0[12] & (1 << 30) != 0
    }
}

/// Bits 15:00 of a dword.
pub fn low(dword: u32) -> u16 {
    let [a, b, _, _] = dword.to_le_bytes();
    u16::from_le_bytes([a, b])
}

/// Bits 31:16 of a dword.
pub fn high(dword: u32) -> u16 {
    let [_, _, a, b] = dword.to_le_bytes();
    u16::from_le_bytes([a, b])
}

/// Two dwords as one number.
pub fn pair(low: u32, high: u32) -> u64 {
    u64::from(high) << 32 | u64::from(low)
}

/// A completion queue entry (section 4.6, figures 122 to 125).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Cqe {
    /// Command-specific result (DW0).
    pub result: u32,
    /// SQ Head Pointer.
    pub sq_head: u16,
    /// SQ Identifier.
    pub sq_id: u16,
    /// Command Identifier.
    pub cid: u16,
    /// Status Field, without the phase tag.
    pub status: Status,
}

impl Cqe {
    /// The two quadwords of the entry with phase tag `phase`. The second holds the tag.
    pub fn to_quadwords(self, phase: bool) -> [u64; 2] {
        let dw2 = u32::from(self.sq_id) << 16 | u32::from(self.sq_head);
        let dw3 = u32::from(self.status.0) << 17 | u32::from(phase) << 16 | u32::from(self.cid);
        [pair(self.result, 0), pair(dw2, dw3)]
    }

    /// The entry and its phase tag, from its two quadwords: what a driver does.
    pub fn from_quadwords(words: [u64; 2]) -> (Cqe, bool) {
        let dwords = words.map(|word| {
            let [a, b, c, d, e, f, g, h] = word.to_le_bytes();
            [
                u32::from_le_bytes([a, b, c, d]),
                u32::from_le_bytes([e, f, g, h]),
            ]
        });
        let [[result, _], [dw2, dw3]] = dwords;
        let cqe = Cqe {
            result,
            sq_head: low(dw2),
            sq_id: high(dw2),
            cid: low(dw3),
            status: Status(high(dw3) >> 1),
        };
        (cqe, dw3 & (1 << 16) != 0)
    }
}

/// Status Field of a completion, bits 31:17 of its DW3 (section 4.6.1, figure 124): status code in
/// bits 7:0, status code type in 10:8, command retry delay in 12:11, More in 13, Do Not Retry in 14.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Status(pub u16);

impl Status {
    const MORE: u16 = 1 << 13;
    const DNR: u16 = 1 << 14;

    /// Success.
    pub const SUCCESS: Status = Status(0);

    // Generic command status (figures 126 and 127).
    /// Invalid Command Opcode.
    pub const INVALID_OPCODE: Status = Status(0x01);
    /// Invalid Field in Command.
    pub const INVALID_FIELD: Status = Status(0x02);
    /// Command ID Conflict.
    pub const COMMAND_ID_CONFLICT: Status = Status(0x03);
    /// Data Transfer Error.
    pub const DATA_TRANSFER_ERROR: Status = Status(0x04);
    /// Internal Error.
    pub const INTERNAL_ERROR: Status = Status(0x06);
    /// Command Abort Requested.
    pub const ABORT_REQUESTED: Status = Status(0x07);
    /// Command Aborted due to SQ Deletion.
    pub const ABORTED_SQ_DELETION: Status = Status(0x08);
    /// Invalid Namespace or Format.
    pub const INVALID_NAMESPACE: Status = Status(0x0b);
    /// Command Sequence Error.
    pub const COMMAND_SEQUENCE_ERROR: Status = Status(0x0c);
    /// PRP Offset Invalid.
    pub const PRP_OFFSET_INVALID: Status = Status(0x13);
    /// Namespace is Write Protected.
    pub const WRITE_PROTECTED: Status = Status(0x20);
    /// LBA Out of Range.
    pub const LBA_OUT_OF_RANGE: Status = Status(0x80);
    /// Capacity Exceeded.
    pub const CAPACITY_EXCEEDED: Status = Status(0x81);

    // Command specific status (figures 128 and 129).
    /// Completion Queue Invalid.
    pub const COMPLETION_QUEUE_INVALID: Status = Status(0x100);
    /// Invalid Queue Identifier.
    pub const INVALID_QUEUE_ID: Status = Status(0x101);
    /// Invalid Queue Size.
    pub const INVALID_QUEUE_SIZE: Status = Status(0x102);
    /// Asynchronous Event Request Limit Exceeded.
    pub const AER_LIMIT_EXCEEDED: Status = Status(0x105);
    /// Invalid Interrupt Vector.
    pub const INVALID_INTERRUPT_VECTOR: Status = Status(0x108);
    /// Invalid Log Page.
    pub const INVALID_LOG_PAGE: Status = Status(0x109);
    /// Invalid Queue Deletion.
    pub const INVALID_QUEUE_DELETION: Status = Status(0x10c);
    /// Feature Identifier Not Saveable.
    pub const FEATURE_NOT_SAVEABLE: Status = Status(0x10d);
    /// Feature Not Changeable.
    pub const FEATURE_NOT_CHANGEABLE: Status = Status(0x10e);
    /// Feature Not Namespace Specific.
    pub const FEATURE_NOT_NAMESPACE_SPECIFIC: Status = Status(0x10f);

    // Media and data integrity errors (figures 130 and 131).
    /// Write Fault.
    pub const WRITE_FAULT: Status = Status(0x280);
    /// Unrecovered Read Error.
    pub const UNRECOVERED_READ_ERROR: Status = Status(0x281);

    /// The same with Do Not Retry: the command would fail again.
    pub const fn dnr(self) -> Status {
        Status(self.0 | Self::DNR)
    }

    /// The same with More: the error log has an entry about it.
    pub const fn more(self) -> Status {
        Status(self.0 | Self::MORE)
    }

    /// Status code and type without the flags.
    pub const fn code(self) -> Status {
        Status(self.0 & 0x7ff)
    }

    /// Whether Do Not Retry is set.
    pub const fn is_dnr(self) -> bool {
        self.0 & Self::DNR != 0
    }

    /// Whether the status code type is Media and Data Integrity Errors.
    pub const fn is_media_error(self) -> bool {
        self.0 & 0x700 == 0x200
    }

    /// Whether the command succeeded.
    pub const fn is_success(self) -> bool {
        self.0 == 0
    }
}

/// Admin command opcodes (section 5, figure 139).
pub mod admin {
    /// Delete I/O Submission Queue.
    pub const DELETE_SQ: u8 = 0x00;
    /// Create I/O Submission Queue.
    pub const CREATE_SQ: u8 = 0x01;
    /// Get Log Page.
    pub const GET_LOG_PAGE: u8 = 0x02;
    /// Delete I/O Completion Queue.
    pub const DELETE_CQ: u8 = 0x04;
    /// Create I/O Completion Queue.
    pub const CREATE_CQ: u8 = 0x05;
    /// Identify.
    pub const IDENTIFY: u8 = 0x06;
    /// Abort.
    pub const ABORT: u8 = 0x08;
    /// Set Features.
    pub const SET_FEATURES: u8 = 0x09;
    /// Get Features.
    pub const GET_FEATURES: u8 = 0x0a;
    /// Asynchronous Event Request.
    pub const ASYNC_EVENT_REQUEST: u8 = 0x0c;
}

/// NVM command set opcodes (section 6, figure 346).
pub mod nvm {
    /// Flush.
    pub const FLUSH: u8 = 0x00;
    /// Write.
    pub const WRITE: u8 = 0x01;
    /// Read.
    pub const READ: u8 = 0x02;
    /// Write Zeroes.
    pub const WRITE_ZEROES: u8 = 0x08;
    /// Dataset Management.
    pub const DATASET_MANAGEMENT: u8 = 0x09;

    /// Write Zeroes, CDW12: Deallocate (section 6.16).
    pub const WRITE_ZEROES_DEAC: u32 = 1 << 25;
    /// Dataset Management, CDW11: Attribute Deallocate (section 6.7).
    pub const DSM_DEALLOCATE: u32 = 1 << 2;
    /// Bytes of one Dataset Management range (figure 361).
    pub const DSM_RANGE_BYTES: u32 = 16;
}

/// Controller or Namespace Structure of Identify (section 5.15.1, figure 244).
pub mod cns {
    /// Identify Namespace.
    pub const NAMESPACE: u8 = 0x00;
    /// Identify Controller.
    pub const CONTROLLER: u8 = 0x01;
    /// Active namespace ids above CDW1.NSID.
    pub const ACTIVE_NAMESPACES: u8 = 0x02;
    /// Namespace identification descriptors.
    pub const DESCRIPTORS: u8 = 0x03;
    /// Allocated namespace ids above CDW1.NSID.
    pub const ALLOCATED_NAMESPACES: u8 = 0x10;
    /// Identify Namespace for an allocated id.
    pub const ALLOCATED_NAMESPACE: u8 = 0x11;
    /// Controllers attached to the namespace.
    pub const NAMESPACE_CONTROLLERS: u8 = 0x12;
    /// Controllers in the subsystem.
    pub const CONTROLLERS: u8 = 0x13;
}

/// Log page identifiers (section 5.14.1, figure 191).
pub mod log {
    /// Error Information.
    pub const ERROR: u8 = 0x01;
    /// SMART / Health Information.
    pub const SMART: u8 = 0x02;
    /// Firmware Slot Information.
    pub const FIRMWARE_SLOT: u8 = 0x03;
    /// Commands Supported and Effects.
    pub const COMMAND_EFFECTS: u8 = 0x05;
}

/// Feature identifiers (section 5.21.1, figure 271).
pub mod feature {
    /// Arbitration.
    pub const ARBITRATION: u8 = 0x01;
    /// Power Management.
    pub const POWER_MANAGEMENT: u8 = 0x02;
    /// Temperature Threshold.
    pub const TEMPERATURE_THRESHOLD: u8 = 0x04;
    /// Error Recovery.
    pub const ERROR_RECOVERY: u8 = 0x05;
    /// Volatile Write Cache.
    pub const VOLATILE_WRITE_CACHE: u8 = 0x06;
    /// Number of Queues.
    pub const NUMBER_OF_QUEUES: u8 = 0x07;
    /// Interrupt Coalescing.
    pub const INTERRUPT_COALESCING: u8 = 0x08;
    /// Interrupt Vector Configuration.
    pub const INTERRUPT_VECTOR: u8 = 0x09;
    /// Write Atomicity Normal.
    pub const WRITE_ATOMICITY: u8 = 0x0a;
    /// Asynchronous Event Configuration.
    pub const ASYNC_EVENT_CONFIG: u8 = 0x0b;

    /// Set Features, CDW10: Save.
    pub const SAVE: u32 = 1 << 31;

    /// Get Features, CDW10 10:08: Select (section 5.13, figure 186).
    pub mod select {
        /// Current value.
        pub const CURRENT: u32 = 0;
        /// Default value.
        pub const DEFAULT: u32 = 1;
        /// Saved value.
        pub const SAVED: u32 = 2;
        /// Supported capabilities.
        pub const CAPABILITIES: u32 = 3;
    }

    /// Supported-capabilities result: namespace specific.
    pub const NAMESPACE_SPECIFIC: u32 = 1 << 1;
    /// Supported-capabilities result: changeable.
    pub const CHANGEABLE: u32 = 1 << 2;
}

/// Asynchronous events (section 5.2, figures 146 to 149): type, information and log page.
pub mod event {
    /// An event as DW0 of the completion reports it.
    #[derive(Clone, Copy, Debug, PartialEq, Eq)]
    pub struct Event {
        /// Asynchronous Event Type.
        pub kind: u8,
        /// Asynchronous Event Information.
        pub info: u8,
        /// Log Page Identifier.
        pub log: u8,
    }

    /// Event type: error status.
    pub const ERROR: u8 = 0;
    /// Event type: SMART / health status.
    pub const SMART: u8 = 1;
    /// Event types in use here.
    pub const KINDS: usize = 2;

    /// A store to a doorbell of a queue that does not exist.
    pub const INVALID_DOORBELL_REGISTER: Event = Event {
        kind: ERROR,
        info: 0,
        log: super::log::ERROR,
    };
    /// An invalid value stored to a doorbell.
    pub const INVALID_DOORBELL_VALUE: Event = Event {
        kind: ERROR,
        info: 1,
        log: super::log::ERROR,
    };
    /// The temperature crossed a threshold.
    pub const TEMPERATURE: Event = Event {
        kind: SMART,
        info: 1,
        log: super::log::SMART,
    };

    impl Event {
        /// DW0 of the completion.
        pub fn result(self) -> u32 {
            u32::from(self.log) << 16 | u32::from(self.info) << 8 | u32::from(self.kind)
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn completion_entry_round_trips() {
        let cqe = Cqe {
            result: 0x1234_5678,
            sq_head: 9,
            sq_id: 3,
            cid: 0xbeef,
            status: Status::INVALID_FIELD.dnr(),
        };
        let words = cqe.to_quadwords(true);
        // DW3: DNR is bit 31, status code from bit 17, phase bit 16.
        assert_eq!(words[1] >> 32, 0x8005_beef);
        assert_eq!(Cqe::from_quadwords(words), (cqe, true));
    }

    #[test]
    fn status_flags_do_not_touch_the_code() {
        let status = Status::UNRECOVERED_READ_ERROR.dnr().more();
        assert_eq!(status.code(), Status::UNRECOVERED_READ_ERROR);
        assert!(status.is_dnr() && !Status::SUCCESS.is_dnr());
    }
}

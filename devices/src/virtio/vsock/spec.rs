//! Constants and the packet header of the socket device (Virtio 1.2, 5.10).

#![forbid(unsafe_code)]

/// Feature bits (5.10.3), as masks.
pub mod feature {
    /// Stream sockets.
    pub const STREAM: u64 = 1 << 0;
}

/// Context id of the host (5.10.4).
pub const HOST_CID: u64 = 2;
/// Context ids of guests, which are 32 bits wide (5.10.4): 0, 1, 2 and all ones are reserved.
pub const GUEST_CIDS: std::ops::RangeInclusive<u64> = 3..=0xffff_fffe;
/// Length of the configuration structure: the guest's context id.
pub const CONFIG_LEN: usize = 8;
/// Length of `virtio_vsock_hdr` (5.10.6).
pub const HEADER_LEN: usize = 44;
/// The same, as the rings count.
pub const HEADER_SIZE: u32 = 44;
/// `type` of stream packets.
pub const TYPE_STREAM: u16 = 1;

/// Bytes of a connection that we keep for a program of the host that does not read: the credit that
/// the guest gets (`buf_alloc`).
pub const BUFFER: u32 = 64 << 10;
/// Longest payload that we put into one packet, as Linux does.
pub const MAX_PAYLOAD: u32 = 64 << 10;

/// Operations (5.10.6.1).
pub mod op {
    /// Asks for a connection.
    pub const REQUEST: u16 = 1;
    /// Accepts it.
    pub const RESPONSE: u16 = 2;
    /// Refuses it or ends it at once.
    pub const RST: u16 = 3;
    /// One or both directions end.
    pub const SHUTDOWN: u16 = 4;
    /// Data.
    pub const RW: u16 = 5;
    /// Tells the sender's buffer space.
    pub const CREDIT_UPDATE: u16 = 6;
    /// Asks for the receiver's buffer space.
    pub const CREDIT_REQUEST: u16 = 7;
}

/// Flags of [`op::SHUTDOWN`] (5.10.6.6.1).
pub mod shutdown {
    /// The sender will receive no more.
    pub const RECEIVE: u32 = 1;
    /// The sender will send no more.
    pub const SEND: u32 = 2;
    /// Both.
    pub const BOTH: u32 = RECEIVE | SEND;
}

/// `virtio_vsock_hdr`, read once.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Header {
    /// Sender.
    pub src_cid: u64,
    /// Receiver.
    pub dst_cid: u64,
    /// Sender's port.
    pub src_port: u32,
    /// Receiver's port.
    pub dst_port: u32,
    /// Length of the payload.
    pub len: u32,
    /// Socket type.
    pub kind: u16,
    /// Operation.
    pub op: u16,
    /// Flags of the operation.
    pub flags: u32,
    /// Sender's buffer space for this connection.
    pub buf_alloc: u32,
    /// Bytes of the payloads received so far that have left the buffer; wraps.
    pub fwd_cnt: u32,
}

impl Header {
    /// From its bytes, which are little-endian.
    pub fn from_bytes(bytes: &[u8; HEADER_LEN]) -> Header {
        let word = |at: usize| {
            u32::from_le_bytes([bytes[at], bytes[at + 1], bytes[at + 2], bytes[at + 3]])
        };
        let half = |at: usize| u16::from_le_bytes([bytes[at], bytes[at + 1]]);
        let long = |at: usize| u64::from(word(at)) | u64::from(word(at + 4)) << 32;
        Header {
            src_cid: long(0),
            dst_cid: long(8),
            src_port: word(16),
            dst_port: word(20),
            len: word(24),
            kind: half(28),
            op: half(30),
            flags: word(32),
            buf_alloc: word(36),
            fwd_cnt: word(40),
        }
    }

    /// To its bytes.
    pub fn to_bytes(self) -> [u8; HEADER_LEN] {
        let mut bytes = [0; HEADER_LEN];
        let mut at = 0;
        let mut put = |field: &[u8]| {
            bytes[at..at + field.len()].copy_from_slice(field);
            at += field.len();
        };
        put(&self.src_cid.to_le_bytes());
        put(&self.dst_cid.to_le_bytes());
        put(&self.src_port.to_le_bytes());
        put(&self.dst_port.to_le_bytes());
        put(&self.len.to_le_bytes());
        put(&self.kind.to_le_bytes());
        put(&self.op.to_le_bytes());
        put(&self.flags.to_le_bytes());
        put(&self.buf_alloc.to_le_bytes());
        put(&self.fwd_cnt.to_le_bytes());
        bytes
    }

    /// The answer [`op::RST`] to this packet.
    pub fn reset(&self) -> Header {
        Header {
            src_cid: self.dst_cid,
            dst_cid: self.src_cid,
            src_port: self.dst_port,
            dst_port: self.src_port,
            kind: self.kind,
            op: op::RST,
            ..Header::default()
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_header_has_the_specified_layout() {
        let mut bytes = [0; HEADER_LEN];
        for (at, byte) in (0u8..).zip(bytes.iter_mut()) {
            *byte = at;
        }
        let header = Header::from_bytes(&bytes);
        assert_eq!(header.src_cid, 0x0706_0504_0302_0100);
        assert_eq!((header.dst_port, header.len), (0x1716_1514, 0x1b1a_1918));
        assert_eq!((header.kind, header.op), (0x1d1c, 0x1f1e));
        assert_eq!(header.fwd_cnt, 0x2b2a_2928);
        assert_eq!(header.to_bytes(), bytes);
    }
}

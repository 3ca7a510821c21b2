//! The header before every packet (Virtio 1.2, 5.1.6), checked before the host sees it.

use super::spec::{self, feature, header as bits};
use crate::net::HEADER_LEN;

/// Why a packet was dropped.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Malformed {
    /// No room for the header and an Ethernet header, or longer than any packet.
    Length,
    /// The checksum to complete lies outside of the packet, or the feature was not negotiated.
    Checksum,
    /// Unknown segmentation, one that was not negotiated, or one without a size or checksum.
    Segmentation,
}

/// `virtio_net_hdr_v1`, read once.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Header {
    /// [`bits::F_NEEDS_CSUM`] and the like.
    pub flags: u8,
    /// [`bits::GSO_TCPV4`] and the like.
    pub gso_type: u8,
    /// Length of the headers to repeat; a hint.
    pub hdr_len: u16,
    /// Length of a segment's payload.
    pub gso_size: u16,
    /// Where the checksum's range begins.
    pub csum_start: u16,
    /// Where the checksum goes, from `csum_start`.
    pub csum_offset: u16,
    /// Chains that a received packet takes.
    pub num_buffers: u16,
}

impl Header {
    /// From its bytes, which are little-endian.
    pub fn from_bytes(bytes: &[u8; HEADER_LEN]) -> Header {
        let word = |at: usize| u16::from_le_bytes([bytes[at], bytes[at + 1]]);
        Header {
            flags: bytes[0],
            gso_type: bytes[1],
            hdr_len: word(2),
            gso_size: word(4),
            csum_start: word(6),
            csum_offset: word(8),
            num_buffers: word(10),
        }
    }

    /// To its bytes.
    pub fn to_bytes(self) -> [u8; HEADER_LEN] {
        let mut bytes = [0; HEADER_LEN];
        bytes[0] = self.flags;
        bytes[1] = self.gso_type;
        for (at, word) in [
            (2, self.hdr_len),
            (4, self.gso_size),
            (6, self.csum_start),
            (8, self.csum_offset),
            (10, self.num_buffers),
        ] {
            bytes[at..at + 2].copy_from_slice(&word.to_le_bytes());
        }
        bytes
    }

    /// Checks the header of a packet from the guest whose frame is `frame` bytes long, under the
    /// negotiated `features`, and returns what the host may see: bits that mean nothing on transmit
    /// are cleared (5.1.6.2.1).
    ///
    /// # Errors
    ///
    /// The packet must be dropped.
    pub fn check_transmit(self, frame: usize, features: u64) -> Result<Header, Malformed> {
        if !(spec::ETHERNET..=spec::MAX_FRAME).contains(&frame) {
            return Err(Malformed::Length);
        }
        let needs_csum = self.flags & bits::F_NEEDS_CSUM != 0;
        if needs_csum {
            let start = usize::from(self.csum_start);
            let end = start + usize::from(self.csum_offset) + 2;
            if features & feature::CSUM == 0 || end > frame {
                return Err(Malformed::Checksum);
            }
        }
        let wanted = match self.gso_type & !bits::GSO_ECN {
            bits::GSO_NONE if self.gso_type == bits::GSO_NONE => {
                return Ok(Header {
                    flags: self.flags & bits::F_NEEDS_CSUM,
                    gso_type: bits::GSO_NONE,
                    hdr_len: self.hdr_len.min(u16::try_from(frame).unwrap_or(u16::MAX)),
                    gso_size: 0,
                    csum_start: if needs_csum { self.csum_start } else { 0 },
                    csum_offset: if needs_csum { self.csum_offset } else { 0 },
                    num_buffers: 0,
                });
            }
            bits::GSO_TCPV4 => feature::HOST_TSO4,
            bits::GSO_TCPV6 => feature::HOST_TSO6,
            bits::GSO_UDP_L4 if self.gso_type == bits::GSO_UDP_L4 => feature::HOST_USO,
            _ => return Err(Malformed::Segmentation),
        };
        let ecn = self.gso_type & bits::GSO_ECN == 0 || features & feature::HOST_ECN != 0;
        // A segmented packet needs a checksum to repeat (5.1.6.2.1) and a size to cut at.
        if features & wanted == 0 || !ecn || !needs_csum || self.gso_size == 0 {
            return Err(Malformed::Segmentation);
        }
        Ok(Header {
            flags: bits::F_NEEDS_CSUM,
            hdr_len: self.hdr_len.min(u16::try_from(frame).unwrap_or(u16::MAX)),
            num_buffers: 0,
            ..self
        })
    }

    /// Whether a driver that takes the receive `offloads` (a mask of `GUEST_*` features) can take a
    /// packet with this header (5.1.6.4.1).
    pub fn check_receive(self, offloads: u64) -> bool {
        if self.flags & bits::F_NEEDS_CSUM != 0 && offloads & feature::GUEST_CSUM == 0 {
            return false;
        }
        let wanted = match self.gso_type & !bits::GSO_ECN {
            bits::GSO_NONE => return true,
            bits::GSO_TCPV4 => feature::GUEST_TSO4,
            bits::GSO_TCPV6 => feature::GUEST_TSO6,
            bits::GSO_UDP_L4 => feature::GUEST_USO4 | feature::GUEST_USO6,
            _ => return false,
        };
        let ecn = self.gso_type & bits::GSO_ECN == 0 || offloads & feature::GUEST_ECN != 0;
        offloads & wanted == wanted && ecn
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    const ALL: u64 = u64::MAX;

    fn tso() -> Header {
        Header {
            flags: bits::F_NEEDS_CSUM,
            gso_type: bits::GSO_TCPV4,
            hdr_len: 54,
            gso_size: 1448,
            csum_start: 34,
            csum_offset: 16,
            num_buffers: 0,
        }
    }

    #[test]
    fn good_headers_pass_unchanged() {
        assert_eq!(Header::from_bytes(&tso().to_bytes()), tso());
        assert_eq!(tso().check_transmit(20000, ALL), Ok(tso()));
        let plain = Header::default();
        assert_eq!(plain.check_transmit(60, 0), Ok(plain));
    }

    #[test]
    fn noise_is_cleared() {
        let noisy = Header {
            flags: 0xfe,
            csum_start: 9999,
            csum_offset: 9999,
            gso_size: 7,
            num_buffers: 3,
            ..Header::default()
        };
        assert_eq!(noisy.check_transmit(60, 0), Ok(Header::default()));
    }

    #[test]
    fn bad_headers_are_dropped() {
        let h = tso();
        let segmentation = Err(Malformed::Segmentation);
        assert_eq!(h.check_transmit(13, ALL), Err(Malformed::Length));
        assert_eq!(
            h.check_transmit(spec::MAX_FRAME + 1, ALL),
            Err(Malformed::Length)
        );
        assert_eq!(h.check_transmit(51, ALL), Err(Malformed::Checksum));
        assert_eq!(h.check_transmit(52, ALL), Ok(Header { hdr_len: 52, ..h }));
        assert_eq!(
            h.check_transmit(60, ALL & !feature::CSUM),
            Err(Malformed::Checksum)
        );
        for gso_type in [2, 3, 6, 0x7f, 0x80, 0x85, 0xff] {
            assert_eq!(
                Header { gso_type, ..h }.check_transmit(2000, ALL),
                segmentation,
                "{gso_type:#x}"
            );
        }
        assert_eq!(
            Header { gso_size: 0, ..h }.check_transmit(2000, ALL),
            segmentation
        );
        assert_eq!(
            Header { flags: 0, ..h }.check_transmit(2000, ALL),
            segmentation
        );
        assert_eq!(
            h.check_transmit(2000, ALL & !feature::HOST_TSO4),
            segmentation
        );
        let ecn = Header {
            gso_type: bits::GSO_TCPV4 | bits::GSO_ECN,
            ..h
        };
        assert_eq!(ecn.check_transmit(2000, ALL), Ok(ecn));
        assert_eq!(
            ecn.check_transmit(2000, ALL & !feature::HOST_ECN),
            segmentation
        );
    }

    #[test]
    fn receive_offloads_are_honoured() {
        assert!(Header::default().check_receive(0));
        assert!(!tso().check_receive(feature::GUEST_CSUM));
        assert!(tso().check_receive(feature::GUEST_CSUM | feature::GUEST_TSO4));
        assert!(!tso().check_receive(feature::GUEST_TSO4));
    }

    proptest! {
        /// Whatever passes has its checksum inside the frame and only negotiated segmentation.
        #[test]
        fn what_passes_is_in_range(
            bytes: [u8; HEADER_LEN], frame in 0usize..70_000, features: u64,
        ) {
            if let Ok(h) = Header::from_bytes(&bytes).check_transmit(frame, features) {
                prop_assert!((14..=spec::MAX_FRAME).contains(&frame));
                let end = usize::from(h.csum_start) + usize::from(h.csum_offset) + 2;
                prop_assert!(h.flags == 0 || (h.flags == 1 && end <= frame));
                prop_assert!(h.gso_type == 0 || (h.flags == 1 && h.gso_size > 0));
                prop_assert!(usize::from(h.hdr_len) <= frame);
            }
        }
    }
}

//! Constants of the network device (Virtio 1.2, 5.1).

#![forbid(unsafe_code)]

/// Feature bits (5.1.3), as masks.
pub mod feature {
    #![expect(missing_docs, reason = "the names are the specification's")]

    pub const CSUM: u64 = 1 << 0;
    pub const GUEST_CSUM: u64 = 1 << 1;
    pub const CTRL_GUEST_OFFLOADS: u64 = 1 << 2;
    pub const MTU: u64 = 1 << 3;
    pub const MAC: u64 = 1 << 5;
    pub const GUEST_TSO4: u64 = 1 << 7;
    pub const GUEST_TSO6: u64 = 1 << 8;
    pub const GUEST_ECN: u64 = 1 << 9;
    pub const HOST_TSO4: u64 = 1 << 11;
    pub const HOST_TSO6: u64 = 1 << 12;
    pub const HOST_ECN: u64 = 1 << 13;
    pub const MRG_RXBUF: u64 = 1 << 15;
    pub const STATUS: u64 = 1 << 16;
    pub const CTRL_VQ: u64 = 1 << 17;
    pub const CTRL_RX: u64 = 1 << 18;
    pub const CTRL_VLAN: u64 = 1 << 19;
    pub const CTRL_RX_EXTRA: u64 = 1 << 20;
    pub const MQ: u64 = 1 << 22;
    pub const CTRL_MAC_ADDR: u64 = 1 << 23;
    pub const NOTF_COAL: u64 = 1 << 53;
    pub const GUEST_USO4: u64 = 1 << 54;
    pub const GUEST_USO6: u64 = 1 << 55;
    pub const HOST_USO: u64 = 1 << 56;
    pub const SPEED_DUPLEX: u64 = 1 << 63;

    /// What each feature needs (5.1.3.1): a driver that accepts the first must accept one of the
    /// second.
    pub const NEEDS: [(u64, u64); 16] = [
        (GUEST_TSO4, GUEST_CSUM),
        (GUEST_TSO6, GUEST_CSUM),
        (GUEST_ECN, GUEST_TSO4 | GUEST_TSO6),
        (GUEST_USO4, GUEST_CSUM),
        (GUEST_USO6, GUEST_CSUM),
        (HOST_TSO4, CSUM),
        (HOST_TSO6, CSUM),
        (HOST_ECN, HOST_TSO4 | HOST_TSO6),
        (HOST_USO, CSUM),
        (CTRL_RX, CTRL_VQ),
        (CTRL_RX_EXTRA, CTRL_VQ),
        (CTRL_VLAN, CTRL_VQ),
        (MQ, CTRL_VQ),
        (CTRL_MAC_ADDR, CTRL_VQ),
        (CTRL_GUEST_OFFLOADS, CTRL_VQ),
        (NOTF_COAL, CTRL_VQ),
    ];

    /// Offloads that CTRL_GUEST_OFFLOADS_SET may switch (5.1.6.5.6).
    pub const GUEST_OFFLOADS: u64 =
        GUEST_CSUM | GUEST_TSO4 | GUEST_TSO6 | GUEST_ECN | GUEST_USO4 | GUEST_USO6;
}

/// `virtio_net_config` (5.1.4).
pub mod config {
    /// Offset of `mac`.
    pub const MAC: usize = 0;
    /// Offset of `status`.
    pub const STATUS: usize = 6;
    /// Offset of `max_virtqueue_pairs`.
    pub const MAX_PAIRS: usize = 8;
    /// Offset of `mtu`.
    pub const MTU: usize = 10;
    /// Offset of `speed`, in Mbit/s.
    pub const SPEED: usize = 12;
    /// Offset of `duplex`.
    pub const DUPLEX: usize = 16;
    /// Length up to and with `supported_hash_types`.
    pub const LEN: usize = 24;
    /// `status`: the link is up.
    pub const S_LINK_UP: u16 = 1;
    /// `speed`: not known.
    pub const SPEED_UNKNOWN: u32 = 0xffff_ffff;
    /// `duplex`: full.
    pub const DUPLEX_FULL: u8 = 1;
    /// `duplex`: not known.
    pub const DUPLEX_UNKNOWN: u8 = 0xff;
}

/// `virtio_net_hdr` (5.1.6).
pub mod header {
    /// `flags`: `csum_start` and `csum_offset` are valid; the checksum is to be completed.
    pub const F_NEEDS_CSUM: u8 = 1;
    /// `flags`: the checksum has been verified.
    pub const F_DATA_VALID: u8 = 2;
    /// `gso_type`: no segmentation.
    pub const GSO_NONE: u8 = 0;
    /// `gso_type`: TCP over IPv4.
    pub const GSO_TCPV4: u8 = 1;
    /// `gso_type`: TCP over IPv6.
    pub const GSO_TCPV6: u8 = 4;
    /// `gso_type`: UDP segments.
    pub const GSO_UDP_L4: u8 = 5;
    /// `gso_type`, added: the segments carry ECN.
    pub const GSO_ECN: u8 = 0x80;
    /// Offset of `num_buffers`.
    pub const NUM_BUFFERS: usize = 10;
}

/// Control queue (5.1.6.5).
pub mod ctrl {
    #![expect(missing_docs, reason = "the names are the specification's")]

    pub const OK: u8 = 0;
    pub const ERR: u8 = 1;

    pub const RX: u8 = 0;
    pub const RX_PROMISC: u8 = 0;
    pub const RX_ALLMULTI: u8 = 1;
    pub const RX_ALLUNI: u8 = 2;
    pub const RX_NOMULTI: u8 = 3;
    pub const RX_NOUNI: u8 = 4;
    pub const RX_NOBCAST: u8 = 5;

    pub const MAC: u8 = 1;
    pub const MAC_TABLE_SET: u8 = 0;
    pub const MAC_ADDR_SET: u8 = 1;

    pub const VLAN: u8 = 2;
    pub const VLAN_ADD: u8 = 0;
    pub const VLAN_DEL: u8 = 1;

    pub const MQ: u8 = 4;
    pub const MQ_VQ_PAIRS_SET: u8 = 0;

    pub const GUEST_OFFLOADS: u8 = 5;
    pub const GUEST_OFFLOADS_SET: u8 = 0;

    pub const NOTF_COAL: u8 = 6;
    pub const NOTF_COAL_TX_SET: u8 = 0;
    pub const NOTF_COAL_RX_SET: u8 = 1;
}

/// Least MTU of an Ethernet device (5.1.4.1).
pub const MIN_MTU: u16 = 68;
/// Most queue pairs that this device offers.
pub const MAX_PAIRS: u16 = 16;
/// Longest packet: 64 KiB of IP, an Ethernet header and a VLAN tag.
pub const MAX_FRAME: usize = 65535 + ETHERNET + 4;
/// Longest packet that is not a segmented one: a frame of the largest MTU that devices are made for
/// (jumbo frames of 9216 bytes and a bit), so that a tap of any usual MTU fits.
pub const ORDINARY_FRAME: usize = 9216 + ETHERNET + 4;
/// Length of an Ethernet header.
pub const ETHERNET: usize = 14;
/// EtherType of a VLAN tag (IEEE 802.1Q-2022, 9.5).
pub const ETHERTYPE_VLAN: u16 = 0x8100;

/// Whether a set of features holds everything that its members need.
pub fn dependencies_met(features: u64) -> bool {
    feature::NEEDS
        .iter()
        .all(|&(wants, needs)| features & wants == 0 || features & needs != 0)
}

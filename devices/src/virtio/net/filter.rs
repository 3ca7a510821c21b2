//! Which received frames the driver wants (Virtio 1.2, 5.1.6.5.1 to 5.1.6.5.3).

use super::spec::{ETHERNET, ETHERTYPE_VLAN};

/// An Ethernet address.
pub type Mac = [u8; 6];

/// Most entries of each table; a longer table means "all of that kind" (5.1.6.5.2 allows unwanted
/// packets to pass).
pub const TABLE: usize = 64;

/// Bytes of a frame that [`Filter::accepts`] looks at.
pub const PEEK: usize = ETHERNET + 2;

/// One list of addresses.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct MacTable {
    /// The addresses; at most [`TABLE`].
    pub entries: Vec<Mac>,
    /// The driver has more than fit: all addresses pass.
    pub overflow: bool,
}

impl MacTable {
    fn contains(&self, mac: &Mac) -> bool {
        self.overflow || self.entries.contains(mac)
    }
}

/// The receive filter. Each worker has its own copy.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Filter {
    /// The device's address.
    pub mac: Mac,
    /// Everything passes.
    pub promiscuous: bool,
    /// All multicast passes.
    pub all_multicast: bool,
    /// All unicast passes.
    pub all_unicast: bool,
    /// No multicast passes.
    pub no_multicast: bool,
    /// No unicast passes.
    pub no_unicast: bool,
    /// No broadcast passes.
    pub no_broadcast: bool,
    /// More unicast addresses.
    pub unicast: MacTable,
    /// Multicast addresses.
    pub multicast: MacTable,
    /// VLANs that pass, one bit each; `None`: all.
    pub vlans: Option<Box<[u64; 64]>>,
}

impl Filter {
    /// The filter after a reset. It lets everything pass until the driver says what it wants: a
    /// driver without `CTRL_RX` never does. With `vlans`, tagged frames pass only once added.
    pub fn new(mac: Mac, vlans: bool) -> Filter {
        Filter {
            mac,
            promiscuous: true,
            all_multicast: false,
            all_unicast: false,
            no_multicast: false,
            no_unicast: false,
            no_broadcast: false,
            unicast: MacTable::default(),
            multicast: MacTable::default(),
            vlans: vlans.then(|| Box::new([0; 64])),
        }
    }

    /// Adds or removes a VLAN; false if there is no such number or no table.
    pub fn set_vlan(&mut self, vlan: u16, pass: bool) -> bool {
        let slot = self
            .vlans
            .as_mut()
            .and_then(|table| table.get_mut(usize::from(vlan / 64)));
        let Some(slot) = slot else { return false };
        let bit = 1 << (vlan % 64);
        if pass {
            *slot |= bit;
        } else {
            *slot &= !bit;
        }
        true
    }

    /// Whether the frame that starts with `frame` passes. A frame without a whole Ethernet header
    /// does not.
    pub fn accepts(&self, frame: &[u8]) -> bool {
        let Some((destination, rest)) = frame.split_first_chunk::<6>() else {
            return false;
        };
        let Some(kind) = rest.get(6..8) else {
            return false;
        };
        if self.promiscuous {
            return true;
        }
        if kind == ETHERTYPE_VLAN.to_be_bytes()
            && let Some(table) = &self.vlans
        {
            let tag = rest
                .get(8..10)
                .map_or(0, |tag| u16::from_be_bytes([tag[0], tag[1]]) & 0xfff);
            let slot = table.get(usize::from(tag / 64)).copied().unwrap_or(0);
            if slot & (1 << (tag % 64)) == 0 {
                return false;
            }
        }
        if *destination == [0xff; 6] {
            !self.no_broadcast
        } else if destination[0] & 1 != 0 {
            !self.no_multicast && (self.all_multicast || self.multicast.contains(destination))
        } else {
            !self.no_unicast
                && (self.all_unicast
                    || *destination == self.mac
                    || self.unicast.contains(destination))
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const OWN: Mac = [2, 0, 0, 0, 0, 1];
    const OTHER: Mac = [2, 0, 0, 0, 0, 2];
    const GROUP: Mac = [0x33, 0x33, 0, 0, 0, 1];
    const ALL: Mac = [0xff; 6];

    fn frame(destination: Mac, vlan: Option<u16>) -> Vec<u8> {
        let mut frame = destination.to_vec();
        frame.extend([2, 0, 0, 0, 0, 9]);
        if let Some(vlan) = vlan {
            frame.extend([0x81, 0x00]);
            frame.extend((vlan | 0xe000).to_be_bytes());
        }
        frame.extend([8, 0]);
        frame.resize(60, 0);
        frame
    }

    fn passes(filter: &Filter) -> [bool; 4] {
        [OWN, OTHER, GROUP, ALL].map(|mac| filter.accepts(&frame(mac, None)))
    }

    #[test]
    fn every_mode() {
        let mut filter = Filter::new(OWN, false);
        assert_eq!(passes(&filter), [true; 4]);
        filter.promiscuous = false;
        assert_eq!(passes(&filter), [true, false, false, true]);
        filter.unicast.entries = vec![OTHER];
        filter.multicast.entries = vec![GROUP];
        assert_eq!(passes(&filter), [true; 4]);
        filter.no_multicast = true;
        assert_eq!(passes(&filter), [true, true, false, true]);
        filter.no_broadcast = true;
        filter.no_unicast = true;
        assert_eq!(passes(&filter), [false; 4]);
        let mut filter = Filter::new(OWN, false);
        filter.promiscuous = false;
        filter.all_multicast = true;
        assert_eq!(passes(&filter), [true, false, true, true]);
        filter.all_unicast = true;
        assert_eq!(passes(&filter), [true; 4]);
        filter.all_unicast = false;
        filter.unicast.overflow = true;
        assert_eq!(passes(&filter), [true; 4]);
    }

    #[test]
    fn vlans() {
        let mut filter = Filter::new(OWN, true);
        filter.promiscuous = false;
        assert!(filter.accepts(&frame(OWN, None)));
        assert!(!filter.accepts(&frame(OWN, Some(4095))));
        assert!(filter.set_vlan(4095, true));
        assert!(filter.accepts(&frame(OWN, Some(4095))));
        assert!(!filter.accepts(&frame(OTHER, Some(4095))));
        assert!(!filter.accepts(&frame(OWN, Some(1))));
        assert!(filter.set_vlan(4095, false) && !filter.set_vlan(4096, true));
        assert!(!filter.accepts(&frame(OWN, Some(4095))));
        assert!(!Filter::new(OWN, false).set_vlan(1, true));
    }

    #[test]
    fn runts_never_pass() {
        let filter = Filter::new(OWN, true);
        assert!(!filter.accepts(&[]));
        assert!(!filter.accepts(&frame(OWN, None)[..13]));
    }
}

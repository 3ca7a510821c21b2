//! Addresses and identities, one type for each, so that they cannot be mixed up.

use std::fmt;

/// A guest-physical address: what the guest's page tables and KVM's memory slots speak.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Gpa(pub u64);

/// An I/O virtual address: what a device puts on the bus. It becomes a [`Gpa`] only by translation.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Iova(pub u64);

impl Iova {
    /// The address `offset` bytes on, or `None` past the end of the address space.
    pub fn checked_add(self, offset: u64) -> Option<Iova> {
        self.0.checked_add(offset).map(Iova)
    }
}

impl fmt::Display for Gpa {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "GPA {:#x}", self.0)
    }
}

impl fmt::Display for Iova {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "IOVA {:#x}", self.0)
    }
}

/// Bus, device and function number of a PCI function (PCIe Base 6.0, 2.2.4.2).
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Bdf(u16);

impl Bdf {
    /// Device numbers on one bus.
    pub const DEVICES: u8 = 32;
    /// Function numbers in one device.
    pub const FUNCTIONS: u8 = 8;

    /// From its parts; `None` when `device` is over 31 or `function` is over 7.
    pub const fn new(bus: u8, device: u8, function: u8) -> Option<Bdf> {
        if device >= Self::DEVICES || function >= Self::FUNCTIONS {
            return None;
        }
        Some(Bdf(((bus as u16) << 8)
            | ((device as u16) << 3)
            | function as u16))
    }

    /// From the 16-bit requester id.
    pub const fn from_requester_id(id: u16) -> Bdf {
        Bdf(id)
    }

    /// Bus number.
    pub const fn bus(self) -> u8 {
        self.0.to_be_bytes()[0]
    }

    /// Device number, 0 to 31.
    pub const fn device(self) -> u8 {
        self.0.to_be_bytes()[1] >> 3
    }

    /// Function number, 0 to 7.
    pub const fn function(self) -> u8 {
        self.0.to_be_bytes()[1] & 7
    }

    /// The id that the function puts on its requests.
    pub const fn source_id(self) -> SourceId {
        SourceId(self.0)
    }
}

impl fmt::Display for Bdf {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(
            f,
            "{:02x}:{:02x}.{}",
            self.bus(),
            self.device(),
            self.function()
        )
    }
}

impl fmt::Debug for Bdf {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(self, f)
    }
}

/// Requester id of a transaction as the IOMMU sees it (VT-d rev 4.1, 3.4.1).
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct SourceId(pub u16);

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn bdf_packs_and_prints() {
        let bdf = Bdf::new(0, 3, 5).unwrap();
        assert_eq!((bdf.bus(), bdf.device(), bdf.function()), (0, 3, 5));
        assert_eq!(bdf.source_id(), SourceId(0x1d));
        assert_eq!(bdf.to_string(), "00:03.5");
        assert_eq!(Bdf::new(0, 32, 0), None);
        assert_eq!(Bdf::new(0, 0, 8), None);
    }
}

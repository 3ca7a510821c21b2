//! The root complex: bus 0, its windows, and the two ways to configuration space.

use std::ops::Range;
use std::sync::atomic::{AtomicU32, Ordering};
use std::sync::{Arc, OnceLock};

use iommu::{Bdf, Gpa, GuestRam, Upstream};

use crate::function::{Endpoint, Slot};
use crate::interrupt::IntxLines;
use crate::map::AddressMap;
use crate::spec::{CONFIG_SPACE_LEN, ecam, mechanism1};
use crate::{
    BarIndex, BuildError, ClassCode, FunctionBuilder, Identity, IntxSink, IoEventHub, PciDevice,
};

/// Functions of one bus.
const FUNCTIONS: usize = 256;

/// The address ranges that the host bridge claims. Firmware tables must say the same: the ECAM range
/// in MCFG (PCI Firmware 3.3, 4.1.2), the windows in the bridge's `_CRS`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Windows {
    /// ECAM, from bus 0 on: 1 MiB for each of 1 to 256 bus numbers, the start a multiple of 1 MiB.
    pub ecam: Range<u64>,
    /// Memory window below 4 GiB.
    pub mmio32: Range<u64>,
    /// Memory window above 4 GiB; may be empty.
    pub mmio64: Range<u64>,
}

/// Why a root complex cannot be made so.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum RootError {
    /// See [`Windows::ecam`].
    #[error("the ECAM range {0:#x?} is not 1 to 256 whole MiB")]
    Ecam(Range<u64>),
    /// See [`Windows::mmio32`] and [`Windows::mmio64`].
    #[error("the window {0:#x?} is not on its side of 4 GiB")]
    Window(Range<u64>),
    /// Two of the ranges share addresses.
    #[error("the ranges {0:#x?} and {1:#x?} overlap")]
    Overlap(Range<u64>, Range<u64>),
    /// The host bridge's own function.
    #[error("host bridge: {0}")]
    Bridge(#[from] BuildError),
    /// The host bridge's own function.
    #[error("host bridge: {0}")]
    Attach(#[from] AttachError),
}

/// Why a function cannot be attached.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum AttachError {
    /// Only bus 0 exists.
    #[error("{0} is not on bus 0")]
    NoSuchBus(Bdf),
    /// Each function number is given once.
    #[error("{0} is taken")]
    Occupied(Bdf),
}

/// The root complex with bus 0. Everything is `&self` and may be called by all vCPUs at once.
pub struct RootComplex {
    windows: Windows,
    functions: Box<[OnceLock<Arc<Slot>>]>,
    map: AddressMap,
    intx: Arc<IntxLines>,
    /// `CONFIG_ADDRESS`.
    address: AtomicU32,
}

/// Function 00:00.0, which only has to be there.
struct HostBridge;

impl PciDevice for HostBridge {
    fn bar_read(&self, _bar: BarIndex, _offset: u64, _data: &mut [u8]) {}
    fn bar_write(&self, _bar: BarIndex, _offset: u64, _data: &[u8]) {}
    fn reset(&self) {}
}

impl RootComplex {
    /// A root complex whose bus 0 holds the host bridge, function 00:00.0. Stores that wake workers
    /// are registered with `hub` wherever their BARs are; the interrupt pins' four lines end in `intx`.
    ///
    /// # Errors
    ///
    /// The windows are not as [`Windows`] says, or overlap.
    pub fn new(
        windows: Windows,
        hub: Arc<dyn IoEventHub>,
        intx: Arc<dyn IntxSink>,
    ) -> Result<Arc<RootComplex>, RootError> {
        check(&windows)?;
        let root = Arc::new(RootComplex {
            map: AddressMap::new([windows.mmio32.clone(), windows.mmio64.clone()], hub),
            windows,
            intx: IntxLines::new(intx),
            functions: (0..FUNCTIONS).map(|_| OnceLock::new()).collect(),
            address: AtomicU32::new(0),
        });
        let identity = Identity {
            vendor: 0x1b36,
            device: 0x0008,
            class: ClassCode {
                base: 0x06,
                sub: 0x00,
                interface: 0x00,
            },
            revision: 0,
            subsystem_vendor: 0,
            subsystem: 0,
        };
        // The bridge sends nothing of its own, so it needs neither memory nor interrupts.
        let upstream = Upstream::memory(GuestRam::new());
        let bridge = FunctionBuilder::new(identity)
            .power_management(false)
            .express(false)
            .build(Bdf::from_requester_id(0), &upstream)?;
        root.attach(bridge, Arc::new(HostBridge))?;
        Ok(root)
    }

    /// Where things are.
    pub fn windows(&self) -> &Windows {
        &self.windows
    }

    /// Puts a function on the bus, in the state after reset: its BARs nowhere, memory decoding and
    /// bus mastering off.
    ///
    /// # Errors
    ///
    /// The function's place is not on bus 0, or taken.
    pub fn attach(
        &self,
        endpoint: Endpoint,
        device: Arc<dyn PciDevice>,
    ) -> Result<(), AttachError> {
        let bdf = endpoint.bdf();
        let slot = Arc::new(Slot::new(endpoint, device));
        let place = match self.functions.get(usize::from(slot.devfn())) {
            Some(place) if bdf.bus() == 0 => place,
            _ => return Err(AttachError::NoSuchBus(bdf)),
        };
        place
            .set(Arc::clone(&slot))
            .map_err(|_| AttachError::Occupied(bdf))?;
        slot.connect(&self.intx);

        let first = usize::from(bdf.device()) * usize::from(Bdf::FUNCTIONS);
        let device = self.functions.iter().skip(first);
        let mut present = device.take(usize::from(Bdf::FUNCTIONS)).map(OnceLock::get);
        if let Some(Some(function_0)) = present.next()
            && present.any(|function| function.is_some())
        {
            function_0.set_multi_function();
        }
        Ok(())
    }

    /// A load from guest-physical memory where no RAM is. False if it is for somebody else; else
    /// `data` is filled, with ones where nobody answers.
    ///
    /// Any length and alignment is taken. Loads from BARs reach the device in parts of up to 8 bytes.
    pub fn mmio_read(&self, address: Gpa, data: &mut [u8]) -> bool {
        data.fill(0xff);
        if let Some(offset) = self.ecam_offset(address) {
            self.each_config_part(offset, data.len(), |slot, register, range| {
                if let (Some(slot), Some(data)) = (slot, data.get_mut(range)) {
                    slot.config_read(register, data);
                }
            });
            return true;
        }
        let mut claimed = false;
        let (mut at, mut data) = (address.0, data);
        while !data.is_empty() {
            let (found, len) = self.map.find(at, data.len().min(8));
            let (part, rest) = data.split_at_mut(len);
            if let Some((slot, bar, offset)) = found {
                slot.bar_read(bar, offset, part);
                claimed = true;
            }
            (at, data) = (at.wrapping_add(len as u64), rest);
        }
        claimed || self.in_a_window(address)
    }

    /// A store to guest-physical memory where no RAM is; as for [`RootComplex::mmio_read`]. A store
    /// to configuration space returns when its effects are in force: after one that clears Bus Master
    /// Enable, the function touches no memory and sends no interrupt.
    pub fn mmio_write(&self, address: Gpa, data: &[u8]) -> bool {
        if let Some(offset) = self.ecam_offset(address) {
            self.each_config_part(offset, data.len(), |slot, register, range| {
                if let (Some(slot), Some(data)) = (slot, data.get(range)) {
                    slot.config_write(&self.map, register, data);
                }
            });
            return true;
        }
        let mut claimed = false;
        let (mut at, mut data) = (address.0, data);
        while !data.is_empty() {
            let (found, len) = self.map.find(at, data.len().min(8));
            let (part, rest) = data.split_at(len);
            if let Some((slot, bar, offset)) = found {
                slot.bar_write(bar, offset, part);
                claimed = true;
            }
            (at, data) = (at.wrapping_add(len as u64), rest);
        }
        claimed || self.in_a_window(address)
    }

    /// A load from an I/O port. False if it is for somebody else: in particular accesses to
    /// `CONFIG_ADDRESS` of other than four bytes, which a chipset puts to other use (port 0xcf9).
    pub fn pio_read(&self, port: u16, data: &mut [u8]) -> bool {
        match port {
            mechanism1::ADDRESS if data.len() == 4 => {
                let address = self.address.load(Ordering::Relaxed);
                data.copy_from_slice(&address.to_le_bytes());
                true
            }
            mechanism1::DATA..=mechanism1::DATA_LAST => {
                data.fill(0xff);
                if let Some((slot, register, len)) = self.selected(port, data.len())
                    && let Some(data) = data.get_mut(..len)
                {
                    slot.config_read(register, data);
                }
                true
            }
            _ => false,
        }
    }

    /// A store to an I/O port; as for [`RootComplex::pio_read`].
    pub fn pio_write(&self, port: u16, data: &[u8]) -> bool {
        match (port, data) {
            (mechanism1::ADDRESS, &[a, b, c, d]) => {
                let address = u32::from_le_bytes([a, b, c, d]) & mechanism1::WRITABLE;
                self.address.store(address, Ordering::Relaxed);
                true
            }
            (mechanism1::DATA..=mechanism1::DATA_LAST, _) => {
                if let Some((slot, register, len)) = self.selected(port, data.len())
                    && let Some(data) = data.get(..len)
                {
                    slot.config_write(&self.map, register, data);
                }
                true
            }
            _ => false,
        }
    }

    /// Resets all functions, as the machine's reset does. On return no device touches memory.
    pub fn reset(&self) {
        self.address.store(0, Ordering::Relaxed);
        for slot in self.functions.iter().filter_map(OnceLock::get) {
            slot.reset(&self.map);
        }
    }

    fn in_a_window(&self, address: Gpa) -> bool {
        self.windows.mmio32.contains(&address.0) || self.windows.mmio64.contains(&address.0)
    }

    fn ecam_offset(&self, address: Gpa) -> Option<u64> {
        let ecam = &self.windows.ecam;
        ecam.contains(&address.0).then(|| address.0 - ecam.start)
    }

    /// Cuts an ECAM access at dwords, and so also at functions.
    fn each_config_part(
        &self,
        offset: u64,
        len: usize,
        mut access: impl FnMut(Option<&Arc<Slot>>, u16, Range<usize>),
    ) {
        let (mut at, mut done) = (offset, 0);
        while done < len {
            let to_dword = [4, 3, 2, 1];
            let part = to_dword
                .get(usize::try_from(at % 4).unwrap_or(0))
                .map_or(1, |&n: &usize| n.min(len - done));
            let register = u16::try_from(at % CONFIG_SPACE_LEN as u64).unwrap_or(0);
            // Bus 0 comes first; past it there are no functions.
            let slot = usize::try_from(at >> ecam::FUNCTION_SHIFT)
                .ok()
                .and_then(|function| self.functions.get(function)?.get());
            access(slot, register, done..done + part);
            done += part;
            at += part as u64;
        }
    }

    /// What `CONFIG_ADDRESS` selects: function, register, and how many of `len` bytes from `port` on
    /// are in the dword.
    fn selected(&self, port: u16, len: usize) -> Option<(&Arc<Slot>, u16, usize)> {
        let address = self.address.load(Ordering::Relaxed);
        if address & mechanism1::ENABLE == 0 {
            return None;
        }
        let [register, devfn, bus, _] = address.to_le_bytes();
        if bus != 0 {
            return None;
        }
        let lane = port - mechanism1::DATA;
        let slot = self.functions.get(usize::from(devfn))?.get()?;
        let len = len.min(usize::from(4 - lane));
        Some((slot, u16::from(register) + lane, len))
    }
}

fn check(windows: &Windows) -> Result<(), RootError> {
    const FOUR_GIB: u64 = 1 << 32;
    let Windows {
        ecam,
        mmio32,
        mmio64,
    } = windows;
    let buses = ecam
        .end
        .checked_sub(ecam.start)
        .map(|len| len / ecam::BUS_LEN);
    let whole = ecam.start.is_multiple_of(ecam::BUS_LEN) && ecam.end.is_multiple_of(ecam::BUS_LEN);
    if !whole || !buses.is_some_and(|buses| (1..=256).contains(&buses)) {
        return Err(RootError::Ecam(ecam.clone()));
    }
    if mmio32.is_empty() || mmio32.end > FOUR_GIB {
        return Err(RootError::Window(mmio32.clone()));
    }
    if !mmio64.is_empty() && mmio64.start < FOUR_GIB {
        return Err(RootError::Window(mmio64.clone()));
    }
    for (a, b) in [(ecam, mmio32), (ecam, mmio64), (mmio32, mmio64)] {
        if !a.is_empty() && !b.is_empty() && a.start < b.end && b.start < a.end {
            return Err(RootError::Overlap(a.clone(), b.clone()));
        }
    }
    Ok(())
}

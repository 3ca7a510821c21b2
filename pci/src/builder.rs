//! Describing a function: identity, BARs, capabilities.

use std::sync::Mutex;

use iommu::{Bdf, BusMaster, Upstream};

use crate::BarIndex;
use crate::config::{Config, VENDOR_BODY};
use crate::function::{Bar, Endpoint, Function, Structure, StructurePlace};
use crate::interrupt::{InterruptPin, Intx, Msi, Msix};
use crate::spec;

/// Class code register (PCI Code and ID Assignment 1.11, 1).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct ClassCode {
    /// Base class, such as 1 for mass storage.
    pub base: u8,
    /// Sub-class, such as 8 for non-volatile memory.
    pub sub: u8,
    /// Programming interface, such as 2 for NVM Express.
    pub interface: u8,
}

/// What a function says that it is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Identity {
    /// Vendor ID.
    pub vendor: u16,
    /// Device ID.
    pub device: u16,
    /// Class code.
    pub class: ClassCode,
    /// Revision ID.
    pub revision: u8,
    /// Subsystem vendor ID.
    pub subsystem_vendor: u16,
    /// Subsystem ID.
    pub subsystem: u16,
}

/// Kind of a memory BAR.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum BarKind {
    /// Below 4 GiB, not prefetchable.
    Memory32,
    /// Anywhere; takes this BAR and the next.
    Memory64 {
        /// Reads have no side effects.
        prefetchable: bool,
    },
}

/// Why a description makes no function. All are mistakes of the caller, none of the guest.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum BuildError {
    /// There are BARs 0 to 5, and a 64-bit one needs two.
    #[error("BAR {0} does not exist, or leaves no place for its upper half")]
    NoSuchBar(u8),
    /// Two BARs want the same register.
    #[error("BAR {0} is described twice or is the upper half of another")]
    BarTaken(u8),
    /// Not a power of two, or out of the range of its kind.
    #[error("BAR {bar}: {size:#x} bytes is no power of two from {min:#x} to {max:#x}")]
    BarSize {
        /// Number of the BAR.
        bar: u8,
        /// Size asked for.
        size: u64,
        /// Smallest.
        min: u64,
        /// Largest.
        max: u64,
    },
    /// A power of two from 1 to 32.
    #[error("{0} MSI vectors; 1, 2, 4, 8, 16 and 32 are possible")]
    MsiVectors(u8),
    /// 1 to 2048 are possible.
    #[error("{0} MSI-X vectors; 1 to 2048 are possible")]
    Vectors(u16),
    /// The offset is not a multiple of 8, or the structure does not end inside its BAR.
    #[error("the MSI-X {name} ({len:#x} bytes) does not fit at BAR {bar}, offset {offset:#x}")]
    MsixPlace {
        /// Table or PBA.
        name: &'static str,
        /// Number of the BAR.
        bar: u8,
        /// Offset in it.
        offset: u64,
        /// Length of the structure.
        len: u64,
    },
    /// Table and PBA share bytes.
    #[error("the MSI-X table and PBA overlap")]
    MsixOverlap,
    /// Body and write mask differ in length, or the body is too long for its length field.
    #[error("vendor capability {0}: body and write mask differ in length, or it is too long")]
    VendorCapability(usize),
    /// Bytes 0x40 to 0xff cannot hold all capabilities.
    #[error("the capabilities need {0} bytes, 192 are there")]
    CapabilitiesTooLong(usize),
}

struct MsixPlan {
    vectors: u16,
    table: (BarIndex, u64),
    pba: (BarIndex, u64),
}

/// Describes a function; [`FunctionBuilder::build`] makes it.
pub struct FunctionBuilder {
    identity: Identity,
    bars: Vec<(BarIndex, u64, BarKind)>,
    intx: Option<InterruptPin>,
    msi: Option<u8>,
    msix: Option<MsixPlan>,
    vendor: Vec<(Vec<u8>, Vec<u8>)>,
    power_management: bool,
    express: bool,
}

impl FunctionBuilder {
    /// A function without BARs and interrupts, with the power management and PCI Express
    /// capabilities.
    pub fn new(identity: Identity) -> FunctionBuilder {
        FunctionBuilder {
            identity,
            bars: Vec::new(),
            intx: None,
            msi: None,
            msix: None,
            vendor: Vec::new(),
            power_management: true,
            express: true,
        }
    }

    /// Adds a memory BAR of `size` bytes: a power of two from 128 on.
    #[must_use]
    pub fn bar(mut self, index: BarIndex, size: u64, kind: BarKind) -> Self {
        self.bars.push((index, size, kind));
        self
    }

    /// Gives the function an interrupt pin.
    #[must_use]
    pub fn intx(mut self, pin: InterruptPin) -> Self {
        self.intx = Some(pin);
        self
    }

    /// Adds MSI with `vectors` (a power of two from 1 to 32), a 64-bit address and per-vector masking.
    #[must_use]
    pub fn msi(mut self, vectors: u8) -> Self {
        self.msi = Some(vectors);
        self
    }

    /// Adds MSI-X with `vectors` (1 to 2048) entries. `table` (16 bytes a vector) and `pba` (8 bytes
    /// for each 64 vectors) say in which BAR and at which offset, a multiple of 8, the structures
    /// lie; the device never sees accesses to them.
    #[must_use]
    pub fn msix(mut self, vectors: u16, table: (BarIndex, u64), pba: (BarIndex, u64)) -> Self {
        self.msix = Some(MsixPlan {
            vectors,
            table,
            pba,
        });
        self
    }

    /// Adds a vendor-specific capability (PCIe Base 6.0, 7.9.4). ID, next pointer and the length byte
    /// are made here; `body` starts behind them, at offset 3. A set bit in `write_mask`, which is as
    /// long as `body`, can be written by the guest.
    #[must_use]
    pub fn vendor_capability(mut self, body: Vec<u8>, write_mask: Vec<u8>) -> Self {
        self.vendor.push((body, write_mask));
        self
    }

    /// Whether there is a power management capability with the states D0 and `D3hot`. On by default.
    #[must_use]
    pub fn power_management(mut self, present: bool) -> Self {
        self.power_management = present;
        self
    }

    /// Whether there is a PCI Express capability: a root complex integrated endpoint with
    /// function-level reset and no link. On by default.
    #[must_use]
    pub fn express(mut self, present: bool) -> Self {
        self.express = present;
        self
    }

    /// Makes the function. It reaches memory and sends interrupts through `upstream`, both under the id
    /// of `bdf`, once the guest sets Bus Master Enable.
    ///
    /// # Errors
    ///
    /// The description contradicts the specification or itself.
    pub fn build(self, bdf: Bdf, upstream: &Upstream) -> Result<Endpoint, BuildError> {
        let mut config = Config::new();
        self.define_header(&mut config);
        let bars = self.define_bars(&mut config)?;
        let structures = self.place_msix(&bars)?;
        self.define_capabilities(&mut config)?;

        let vectors = self.msix.as_ref().map_or(0, |plan| plan.vectors);
        let master = BusMaster::new(upstream, bdf.source_id());
        Ok(Endpoint(Function {
            bdf,
            config: Mutex::new(config),
            bars,
            structures,
            intx: self.intx.map(Intx::new),
            msi: Msi::new(self.msi.unwrap_or(0).into(), &master),
            msix: Msix::new(vectors, &master),
            master,
        }))
    }

    fn define_header(&self, config: &mut Config) {
        let id = &self.identity;
        config.define(spec::VENDOR_ID, &id.vendor.to_le_bytes());
        config.define(spec::DEVICE_ID, &id.device.to_le_bytes());
        config.define(spec::REVISION_ID, &[id.revision]);
        let class = [id.class.interface, id.class.sub, id.class.base];
        config.define(spec::CLASS_CODE, &class);
        config.define(
            spec::SUBSYSTEM_VENDOR_ID,
            &id.subsystem_vendor.to_le_bytes(),
        );
        config.define(spec::SUBSYSTEM_ID, &id.subsystem.to_le_bytes());
        config.allow(spec::COMMAND, &spec::command::WRITABLE.to_le_bytes());
        config.allow(spec::CACHE_LINE_SIZE, &[0xff]);
        config.allow(spec::INTERRUPT_LINE, &[0xff]);
        if let Some(pin) = self.intx {
            config.define(spec::INTERRUPT_PIN, &[pin.register()]);
        }
    }

    fn define_bars(&self, config: &mut Config) -> Result<Vec<Bar>, BuildError> {
        let mut taken = [false; spec::BARS as usize];
        let mut bars = Vec::new();
        for &(BarIndex(index), size, kind) in &self.bars {
            let (registers, max) = match kind {
                BarKind::Memory32 => (1, spec::bar::MAX_SIZE_32),
                BarKind::Memory64 { .. } => (2, spec::bar::MAX_SIZE_64),
            };
            let at = usize::from(index);
            let halves = taken
                .get_mut(at..at + registers)
                .ok_or(BuildError::NoSuchBar(index))?;
            if halves.contains(&true) {
                return Err(BuildError::BarTaken(index));
            }
            halves.fill(true);
            let min = spec::bar::MIN_SIZE;
            if !size.is_power_of_two() || !(min..=max).contains(&size) {
                return Err(BuildError::BarSize {
                    bar: index,
                    size,
                    min,
                    max,
                });
            }
            let wide = registers == 2;
            let flags = match kind {
                BarKind::Memory32 => 0,
                BarKind::Memory64 { prefetchable } => {
                    let prefetchable = if prefetchable {
                        spec::bar::PREFETCHABLE
                    } else {
                        0
                    };
                    spec::bar::MEMORY_64 | prefetchable
                }
            };
            let register = spec::BAR0 + u16::from(index) * 4;
            config.define(register, &flags.to_le_bytes());
            let mask = (!(size - 1)).to_le_bytes();
            config.allow(register, &mask[..registers * 4]);
            bars.push(Bar {
                index: BarIndex(index),
                register,
                size,
                wide,
            });
        }
        Ok(bars)
    }

    fn place_msix(&self, bars: &[Bar]) -> Result<Vec<StructurePlace>, BuildError> {
        let Some(plan) = &self.msix else {
            return Ok(Vec::new());
        };
        if !(1..=spec::msix::MAX_VECTORS).contains(&plan.vectors) {
            return Err(BuildError::Vectors(plan.vectors));
        }
        let vectors = u64::from(plan.vectors);
        let table_len = vectors * spec::msix::ENTRY_LEN;
        let pba_len = vectors.div_ceil(64) * 8;
        let table = place(Structure::Table, bars, plan.table, table_len)?;
        let pba = place(Structure::Pba, bars, plan.pba, pba_len)?;
        let (a, b) = (&table.range, &pba.range);
        if table.bar == pba.bar && a.start < b.end && b.start < a.end {
            return Err(BuildError::MsixOverlap);
        }
        Ok(vec![table, pba])
    }

    fn define_capabilities(&self, config: &mut Config) -> Result<(), BuildError> {
        let mut list = CapabilityList::default();
        if self.power_management {
            config.power = Some(list.add(&power_management()));
        }
        if self.express {
            config.express = Some(list.add(&express()));
        }
        if let Some(vectors) = self.msi {
            if !vectors.is_power_of_two() || vectors > spec::msi::MAX_VECTORS {
                return Err(BuildError::MsiVectors(vectors));
            }
            config.msi = Some(list.add(&msi(vectors)));
        }
        if let Some(plan) = &self.msix {
            config.msix = Some(list.add(&msix(plan)));
        }
        for (index, (body, mask)) in self.vendor.iter().enumerate() {
            let length = u8::try_from(VENDOR_BODY + body.len())
                .ok()
                .filter(|_| body.len() == mask.len())
                .ok_or(BuildError::VendorCapability(index))?;
            let mut capability = Capability::new(spec::capability::VENDOR_SPECIFIC, VENDOR_BODY);
            capability.value[2] = length;
            capability.value.extend_from_slice(body);
            capability.writable.extend_from_slice(mask);
            config.vendor.push((list.add(&capability), length));
        }
        list.define(config)
    }
}

/// An MSI-X structure's place, checked against its BAR.
fn place(
    structure: Structure,
    bars: &[Bar],
    (bar, offset): (BarIndex, u64),
    len: u64,
) -> Result<StructurePlace, BuildError> {
    let size = bars.iter().find(|b| b.index == bar).map_or(0, |b| b.size);
    match offset.checked_add(len) {
        Some(end) if offset.is_multiple_of(8) && end <= size && u32::try_from(end).is_ok() => {
            Ok(StructurePlace {
                structure,
                bar,
                range: offset..end,
            })
        }
        _ => Err(BuildError::MsixPlace {
            name: match structure {
                Structure::Table => "table",
                Structure::Pba => "PBA",
            },
            bar: bar.0,
            offset,
            len,
        }),
    }
}

/// One capability before it has a place.
struct Capability {
    value: Vec<u8>,
    writable: Vec<u8>,
}

impl Capability {
    fn new(id: u8, len: usize) -> Capability {
        let mut value = vec![0; len];
        value[0] = id;
        Capability {
            value,
            writable: vec![0; len],
        }
    }

    fn define(&mut self, offset: u16, value: &[u8]) {
        let at = usize::from(offset);
        self.value[at..at + value.len()].copy_from_slice(value);
    }

    fn allow(&mut self, offset: u16, mask: &[u8]) {
        let at = usize::from(offset);
        self.writable[at..at + mask.len()].copy_from_slice(mask);
    }
}

/// The list in the making: bytes from [`spec::FIRST_CAPABILITY`] on.
#[derive(Default)]
struct CapabilityList {
    value: Vec<u8>,
    writable: Vec<u8>,
    starts: Vec<usize>,
}

impl CapabilityList {
    /// Appends and returns the place in configuration space.
    fn add(&mut self, capability: &Capability) -> u16 {
        let start = self.value.len();
        self.starts.push(start);
        self.value.extend_from_slice(&capability.value);
        self.writable.extend_from_slice(&capability.writable);
        // Every capability starts on a dword (7.5.1.1.11).
        let end = self.value.len().next_multiple_of(4);
        self.value.resize(end, 0);
        self.writable.resize(end, 0);
        // Too long a list never gets past `define`.
        u16::from(spec::FIRST_CAPABILITY).saturating_add(u16::try_from(start).unwrap_or(u16::MAX))
    }

    fn define(mut self, config: &mut Config) -> Result<(), BuildError> {
        let first = usize::from(spec::FIRST_CAPABILITY);
        if first + self.value.len() > spec::LEGACY_CONFIG_LEN {
            return Err(BuildError::CapabilitiesTooLong(self.value.len()));
        }
        let mut next = 0;
        for &start in self.starts.iter().rev() {
            self.value[start + usize::from(spec::capability::NEXT)] = next;
            next = u8::try_from(first + start).unwrap_or(0);
        }
        if next != 0 {
            config.define(spec::CAPABILITIES_POINTER, &[next]);
            config.define(spec::STATUS, &spec::status::CAPABILITIES.to_le_bytes());
        }
        config.define(u16::from(spec::FIRST_CAPABILITY), &self.value);
        config.allow(u16::from(spec::FIRST_CAPABILITY), &self.writable);
        Ok(())
    }
}

fn power_management() -> Capability {
    use spec::power::{CAPABILITIES, CONTROL, LEN, NO_SOFT_RESET, STATE, VERSION};
    let mut capability = Capability::new(spec::capability::POWER_MANAGEMENT, LEN);
    capability.define(CAPABILITIES, &VERSION.to_le_bytes());
    capability.define(CONTROL, &NO_SOFT_RESET.to_le_bytes());
    capability.allow(CONTROL, &[STATE]);
    capability
}

fn express() -> Capability {
    use spec::express::{
        CAPABILITIES, DEVICE_CAPABILITIES, DEVICE_CONTROL, DEVICE_CONTROL_RESET,
        DEVICE_CONTROL_WRITABLE, FLR_CAPABLE, LEN, ROLE_BASED_ERRORS,
        ROOT_COMPLEX_INTEGRATED_ENDPOINT, VERSION,
    };
    let mut capability = Capability::new(spec::capability::EXPRESS, LEN);
    let kind = VERSION | ROOT_COMPLEX_INTEGRATED_ENDPOINT;
    capability.define(CAPABILITIES, &kind.to_le_bytes());
    let device = ROLE_BASED_ERRORS | FLR_CAPABLE;
    capability.define(DEVICE_CAPABILITIES, &device.to_le_bytes());
    capability.define(DEVICE_CONTROL, &DEVICE_CONTROL_RESET.to_le_bytes());
    capability.allow(DEVICE_CONTROL, &DEVICE_CONTROL_WRITABLE.to_le_bytes());
    capability
}

fn msi(vectors: u8) -> Capability {
    use spec::msi::{
        ADDRESS, CONTROL, DATA, ENABLE, LEN, MASK, MASKING, MULTIPLE_CAPABLE_SHIFT,
        MULTIPLE_ENABLE, WIDE,
    };
    let mut capability = Capability::new(spec::capability::MSI, LEN);
    // At most 5: `vectors` is a power of two up to 32.
    let log2 = u16::try_from(vectors.trailing_zeros()).unwrap_or(0);
    let control = log2 << MULTIPLE_CAPABLE_SHIFT | WIDE | MASKING;
    capability.define(CONTROL, &control.to_le_bytes());
    capability.allow(CONTROL, &(ENABLE | MULTIPLE_ENABLE).to_le_bytes());
    // The two low bits of the address are 0 (7.7.1.3).
    capability.allow(ADDRESS, &(!3u64).to_le_bytes());
    capability.allow(DATA, &[0xff; 2]);
    let vectors = u32::MAX >> (u32::from(spec::msi::MAX_VECTORS) - u32::from(vectors));
    capability.allow(MASK, &vectors.to_le_bytes());
    capability
}

fn msix(plan: &MsixPlan) -> Capability {
    use spec::msix::{CONTROL, ENABLE, FUNCTION_MASK, LEN, PBA, TABLE};
    let mut capability = Capability::new(spec::capability::MSIX, LEN);
    capability.define(CONTROL, &(plan.vectors - 1).to_le_bytes());
    capability.allow(CONTROL, &(ENABLE | FUNCTION_MASK).to_le_bytes());
    // `place` has checked that the offsets fit and leave the low bits to the BAR's number.
    let place = |(BarIndex(bar), offset): (BarIndex, u64)| {
        (u32::try_from(offset).unwrap_or(0) | u32::from(bar)).to_le_bytes()
    };
    capability.define(TABLE, &place(plan.table));
    capability.define(PBA, &place(plan.pba));
    capability
}

//! A PCI function in its place on the bus: configuration accesses and what they bring about.

use std::ops::Range;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use iommu::{Bdf, BusMaster};

use crate::config::Config;
use crate::interrupt::{Intx, IntxLines, IntxPin, Msi, MsiRegisters, Msix};
use crate::map::{AddressMap, Placement};
use crate::spec;
use crate::{BarIndex, IoEvent, PciDevice};

/// A base address register.
pub(crate) struct Bar {
    pub(crate) index: BarIndex,
    /// Offset of the (low) register.
    pub(crate) register: u16,
    pub(crate) size: u64,
    /// 64 bits, with the upper half in the next register.
    pub(crate) wide: bool,
}

/// What lies in a BAR and is not the device's.
#[derive(Clone, Copy)]
pub(crate) enum Structure {
    /// The MSI-X table.
    Table,
    /// The MSI-X pending bit array.
    Pba,
}

/// Where a [`Structure`] lies.
pub(crate) struct StructurePlace {
    pub(crate) structure: Structure,
    pub(crate) bar: BarIndex,
    pub(crate) range: Range<u64>,
}

/// The standard part of a function.
pub(crate) struct Function {
    pub(crate) bdf: Bdf,
    pub(crate) config: Mutex<Config>,
    pub(crate) bars: Vec<Bar>,
    pub(crate) structures: Vec<StructurePlace>,
    pub(crate) intx: Option<Arc<Intx>>,
    pub(crate) msi: Arc<Msi>,
    pub(crate) msix: Arc<Msix>,
    pub(crate) master: BusMaster,
}

/// A function that is built but not yet on a bus. Its device takes the [`BusMaster`] and the
/// interrupt vectors from it; then both go to [`RootComplex::attach`](crate::RootComplex::attach).
pub struct Endpoint(pub(crate) Function);

impl Endpoint {
    /// Where the function is to be.
    pub fn bdf(&self) -> Bdf {
        self.0.bdf
    }

    /// The function's way out: memory and interrupt messages.
    pub fn bus_master(&self) -> BusMaster {
        self.0.master.clone()
    }

    /// The function's interrupt pin, if it has one.
    pub fn intx(&self) -> Option<IntxPin> {
        self.0.intx.clone().map(IntxPin)
    }

    /// The function's MSI vectors; none if it has no MSI.
    pub fn msi(&self) -> Arc<Msi> {
        Arc::clone(&self.0.msi)
    }

    /// The function's MSI-X vectors; none if it has no MSI-X.
    pub fn msix(&self) -> Arc<Msix> {
        Arc::clone(&self.0.msix)
    }
}

/// What configuration space asks for, as far as it has effects outside of it.
#[derive(Clone, Default, PartialEq, Eq)]
struct Effects {
    bus_master: bool,
    placements: Vec<Placement>,
    intx_disable: bool,
    msi: MsiRegisters,
    msix_enable: bool,
    msix_mask: bool,
}

impl Effects {
    /// Interrupts are messages, so INTx is not used.
    fn messages(&self) -> bool {
        self.msi.enabled() || self.msix_enable
    }
}

impl Function {
    fn config(&self) -> MutexGuard<'_, Config> {
        self.config.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Bits of the dword at `register` that are not kept in configuration space but are as they are
    /// now: Interrupt Status, and MSI's Pending Bits.
    fn live(&self, register: u16, msi: Option<u16>) -> u32 {
        if register == spec::COMMAND {
            let pending = self.intx.as_ref().is_some_and(|intx| intx.pending());
            // Status is the upper half.
            return (u32::from(pending) * u32::from(spec::status::INTERRUPT)) << 16;
        }
        match msi {
            Some(at) if register == at + spec::msi::PENDING => self.msi.pending(),
            _ => 0,
        }
    }

    fn effects(&self) -> Effects {
        let config = self.config();
        let command = config.effective_command();
        let placements = if command & spec::command::MEMORY == 0 {
            Vec::new()
        } else {
            self.bars.iter().map(|bar| bar.placement(&config)).collect()
        };
        let (msix_enable, msix_mask) = config.msix_control();
        Effects {
            bus_master: command & spec::command::BUS_MASTER != 0,
            placements,
            intx_disable: command & spec::command::INTX_DISABLE != 0,
            msi: config.msi_registers(),
            msix_enable,
            msix_mask,
        }
    }
}

impl Bar {
    /// Where the register says that the BAR is. A multiple of the size, so it does not wrap.
    fn placement(&self, config: &Config) -> Placement {
        let low = u64::from(config.u32_at(self.register) & !spec::bar::FLAGS);
        let high = if self.wide {
            u64::from(config.u32_at(self.register + 4)) << 32
        } else {
            0
        };
        let first = high | low;
        Placement {
            bar: self.index,
            first,
            last: first | (self.size - 1),
        }
    }
}

/// A function with its device, on the bus.
///
/// Three locks, never held in another order than `applied`, then one of the others:
/// - `function.config`: the bytes. Held for a copy, never across a call out.
/// - `applied`: which effects of the bytes are in force. It makes effects of concurrent writes happen
///   one after the other; a write returns when its effects are in force. Draining and
///   [`PciDevice::reset`] run under it and under nothing else, so neither a worker nor a
///   configuration read ever waits for them.
/// - the address map's, inside [`AddressMap`].
pub(crate) struct Slot {
    function: Function,
    device: Arc<dyn PciDevice>,
    events: Vec<IoEvent>,
    applied: Mutex<Effects>,
}

impl Slot {
    pub(crate) fn new(endpoint: Endpoint, device: Arc<dyn PciDevice>) -> Slot {
        Slot {
            function: endpoint.0,
            events: device.io_events(),
            device,
            applied: Mutex::default(),
        }
    }

    /// Device and function number, which order functions in the address map.
    pub(crate) fn devfn(&self) -> u8 {
        self.function.bdf.device() << 3 | self.function.bdf.function()
    }

    /// The device's stores that signal an event.
    pub(crate) fn events(&self) -> &[IoEvent] {
        &self.events
    }

    /// Function 0 tells that there are others.
    pub(crate) fn set_multi_function(&self) {
        self.function
            .config()
            .define(spec::HEADER_TYPE, &[spec::header_type::MULTI_FUNCTION]);
    }

    /// Connects the interrupt pin.
    pub(crate) fn connect(&self, lines: &Arc<IntxLines>) {
        if let Some(intx) = &self.function.intx {
            let input = intx.connect(lines, self.devfn());
            self.function
                .config()
                .define(spec::INTERRUPT_LINE, &[input]);
        }
    }

    /// A configuration read of 1 to 4 bytes inside one dword.
    pub(crate) fn config_read(&self, offset: u16, data: &mut [u8]) {
        let (part, msi) = {
            let config = self.function.config();
            config.read(offset, data);
            (config.vendor_part(offset, data.len()), config.msi)
        };
        let register = offset & !3;
        let live = self.function.live(register, msi).to_le_bytes();
        for (byte, live) in data.iter_mut().zip(&live[usize::from(offset - register)..]) {
            *byte |= live;
        }
        if let Some((index, from, range)) = part
            && let Some(data) = data.get_mut(range)
        {
            self.device.capability_read(index, from, data);
        }
    }

    /// A configuration write of 1 to 4 bytes inside one dword.
    pub(crate) fn config_write(self: &Arc<Self>, map: &AddressMap, offset: u16, data: &[u8]) {
        let (reset, part) = {
            let mut config = self.function.config();
            let reset = config.write(offset, data);
            (reset, config.vendor_part(offset, data.len()))
        };
        if reset {
            self.reset(map);
        } else {
            self.settle(map, &mut self.applied());
        }
        if let Some((index, from, range)) = part
            && let Some(data) = data.get(range)
        {
            self.device.capability_write(index, from, data);
        }
    }

    /// Function-level reset (6.6.2), also used for a reset of the whole machine. The function goes
    /// off the bus and its transactions end, then the device is reset, then configuration space.
    pub(crate) fn reset(self: &Arc<Self>, map: &AddressMap) {
        let mut applied = self.applied();
        let quiet = spec::command::INTX_DISABLE.to_le_bytes();
        self.function.config().write(spec::COMMAND, &quiet);
        self.settle(map, &mut applied);
        self.device.reset();
        if let Some(intx) = &self.function.intx {
            intx.reset();
        }
        self.function.config().reset();
        self.settle(map, &mut applied);
        self.function.msi.reset();
        self.function.msix.reset();
    }

    fn applied(&self) -> MutexGuard<'_, Effects> {
        self.applied.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Puts into force what configuration space asks for now.
    fn settle(self: &Arc<Self>, map: &AddressMap, applied: &mut Effects) {
        let wanted = self.function.effects();
        if wanted == *applied {
            return;
        }
        if wanted.placements != applied.placements {
            map.place(self, &wanted.placements);
        }
        if (wanted.msix_enable, wanted.msix_mask) != (applied.msix_enable, applied.msix_mask) {
            self.function
                .msix
                .set_control(wanted.msix_enable, wanted.msix_mask);
        }
        if wanted.msi != applied.msi {
            self.function.msi.set_registers(wanted.msi);
        }
        let wire = |effects: &Effects| (effects.intx_disable, effects.messages());
        if let Some(intx) = &self.function.intx
            && wire(&wanted) != wire(applied)
        {
            intx.configure(wanted.intx_disable, wanted.messages());
        }
        if wanted.bus_master != applied.bus_master {
            let on = wanted.bus_master;
            // Turning it off waits here until no access and no pinned I/O is under way.
            self.function.master.dma.set_bus_master(on);
            self.function.msi.set_bus_master(on);
            self.function.msix.set_bus_master(on);
            self.device.bus_master_changed(on);
        }
        *applied = wanted;
    }

    /// A load from a BAR, at most 8 bytes, inside it.
    pub(crate) fn bar_read(&self, bar: BarIndex, offset: u64, data: &mut [u8]) {
        let (mut offset, mut data) = (offset, data);
        while !data.is_empty() {
            let (target, len) = self.target(bar, offset, data.len());
            let (part, rest) = data.split_at_mut(len);
            match target {
                Some((Structure::Table, at)) => self.function.msix.table_read(at, part),
                Some((Structure::Pba, at)) => self.function.msix.pba_read(at, part),
                None => self.device.bar_read(bar, offset, part),
            }
            data = rest;
            offset = offset.saturating_add(len as u64);
        }
    }

    /// A store to a BAR, at most 8 bytes, inside it.
    pub(crate) fn bar_write(&self, bar: BarIndex, offset: u64, data: &[u8]) {
        let (mut offset, mut data) = (offset, data);
        while !data.is_empty() {
            let (target, len) = self.target(bar, offset, data.len());
            let (part, rest) = data.split_at(len);
            match target {
                Some((Structure::Table, at)) => self.function.msix.table_write(at, part),
                // The PBA is read-only (7.7.2.9).
                Some((Structure::Pba, _)) => {}
                None => self.device.bar_write(bar, offset, part),
            }
            data = rest;
            offset = offset.saturating_add(len as u64);
        }
    }

    /// Who answers at `offset`, and for how many of `len` bytes: a structure, with the offset in it,
    /// or else the device.
    fn target(
        &self,
        bar: BarIndex,
        offset: u64,
        mut len: usize,
    ) -> (Option<(Structure, u64)>, usize) {
        for place in self.function.structures.iter().filter(|p| p.bar == bar) {
            let range = &place.range;
            if range.contains(&offset) {
                let target = (place.structure, offset - range.start);
                return (Some(target), limit(len, range.end - offset));
            }
            if offset < range.start {
                len = limit(len, range.start - offset);
            }
        }
        (None, len)
    }
}

/// `len`, but at most `max`.
fn limit(len: usize, max: u64) -> usize {
    usize::try_from(max).map_or(len, |max| len.min(max))
}

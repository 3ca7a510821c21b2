//! What an operating system knows of a PCI function, and how it finds out.

use std::sync::Arc;
use std::time::Duration;

use iommu::{Bdf, Gpa, MsiMessage};
use pci::spec;
use vm_memory::ByteValued;

use crate::machine::{Machine, layout};
use crate::memory::Side;

/// A function as its driver sees it: through configuration space and BARs only.
#[derive(Clone)]
pub struct GuestFunction {
    machine: Arc<Machine>,
    bdf: Bdf,
    bars: Vec<GuestBar>,
}

/// A memory BAR that the guest has placed.
#[derive(Clone)]
pub struct GuestBar {
    machine: Arc<Machine>,
    /// Number of the (low) register, 0 to 5.
    pub index: u8,
    /// Where it is.
    pub address: Gpa,
    /// Its size in bytes.
    pub size: u64,
    /// 64 bits wide.
    pub wide: bool,
}

impl GuestBar {
    /// A load.
    pub fn read<T: ByteValued>(&self, offset: u64) -> T {
        self.machine.read(Gpa(self.address.0 + offset))
    }

    /// A store.
    pub fn write<T: ByteValued>(&self, offset: u64, value: T) {
        self.machine.write(Gpa(self.address.0 + offset), value);
    }
}

impl GuestFunction {
    /// Walks bus 0 as an operating system does, host bridge first.
    pub fn enumerate(machine: &Arc<Machine>) -> Vec<GuestFunction> {
        let mut found = Vec::new();
        for device in 0..Bdf::DEVICES {
            for number in 0..Bdf::FUNCTIONS {
                let bdf = Bdf::new(0, device, number).expect("in range");
                let function = GuestFunction {
                    machine: Arc::clone(machine),
                    bdf,
                    bars: Vec::new(),
                };
                let present = function.config::<u16>(spec::VENDOR_ID) != 0xffff;
                let header: u8 = function.config(spec::HEADER_TYPE);
                if present {
                    found.push(function);
                }
                // Other functions are looked for only where function 0 tells of them.
                if number == 0 && (!present || header & spec::header_type::MULTI_FUNCTION == 0) {
                    break;
                }
            }
        }
        found
    }

    /// Finds the function in slot `device`, places its BARs and enables memory decoding and bus
    /// mastering: what a driver finds when it is probed.
    pub fn probe(machine: &Arc<Machine>, device: u8) -> GuestFunction {
        let mut function = GuestFunction::enumerate(machine)
            .into_iter()
            .find(|function| function.bdf.device() == device)
            .expect("a function in this slot");
        function.place_bars();
        function.set_command(spec::command::MEMORY | spec::command::BUS_MASTER);
        function
    }

    /// Which function it is.
    pub fn bdf(&self) -> Bdf {
        self.bdf
    }

    /// The machine that it is in.
    pub fn machine(&self) -> &Arc<Machine> {
        &self.machine
    }

    /// Where a configuration register is in the ECAM range.
    pub fn config_address(&self, register: u16) -> Gpa {
        let function = u64::from(self.bdf.source_id().0) << spec::ecam::FUNCTION_SHIFT;
        Gpa(layout::ECAM.start + function + u64::from(register))
    }

    /// Reads a configuration register through ECAM.
    pub fn config<T: ByteValued>(&self, register: u16) -> T {
        self.machine.read(self.config_address(register))
    }

    /// Writes a configuration register through ECAM.
    pub fn set_config<T: ByteValued>(&self, register: u16, value: T) {
        self.machine.write(self.config_address(register), value);
    }

    /// Class code: base class, sub-class and interface from the highest of three bytes down.
    pub fn class(&self) -> u32 {
        self.config::<u32>(spec::REVISION_ID) >> 8
    }

    /// Writes the command register.
    pub fn set_command(&self, command: u16) {
        self.set_config(spec::COMMAND, command);
    }

    /// Turns Bus Master Enable on or off.
    pub fn set_bus_master(&self, on: bool) {
        let command: u16 = self.config(spec::COMMAND);
        let bit = spec::command::BUS_MASTER;
        self.set_command(if on { command | bit } else { command & !bit });
    }

    /// Sizes the BARs with decoding off and gives each a place of its own: 64-bit ones above 4 GiB,
    /// others below.
    pub fn place_bars(&mut self) {
        let command: u16 = self.config(spec::COMMAND);
        self.set_command(command & !spec::command::MEMORY);
        self.bars.clear();
        let mut index = 0;
        while index < spec::BARS {
            let register = spec::BAR0 + u16::from(index) * 4;
            self.set_config(register, u32::MAX);
            let low: u32 = self.config(register);
            let wide = low & spec::bar::MEMORY_64 != 0;
            let high = if wide {
                self.set_config(register + 4, u32::MAX);
                self.config(register + 4)
            } else {
                u32::MAX
            };
            if low & !spec::bar::FLAGS != 0 || (wide && high != 0) {
                let mask = u64::from(high) << 32 | u64::from(low & !spec::bar::FLAGS);
                let size = mask.wrapping_neg();
                let side = if wide { Side::High } else { Side::Low };
                let bar = GuestBar {
                    machine: Arc::clone(&self.machine),
                    index,
                    address: Gpa(self.machine.bar_space(side, size)),
                    size,
                    wide,
                };
                self.write_bar(index, wide, bar.address);
                self.bars.push(bar);
            }
            index += if wide { 2 } else { 1 };
        }
        self.set_command(command);
    }

    fn write_bar(&self, index: u8, wide: bool, address: Gpa) {
        let register = spec::BAR0 + u16::from(index) * 4;
        let [a, b, c, d, e, f, g, h] = address.0.to_le_bytes();
        self.set_config(register, u32::from_le_bytes([a, b, c, d]));
        if wide {
            self.set_config(register + 4, u32::from_le_bytes([e, f, g, h]));
        }
    }

    /// Moves a BAR.
    pub fn move_bar(&mut self, index: u8, address: Gpa) {
        let bar = self.bar(index);
        self.write_bar(index, bar.wide, address);
        for bar in &mut self.bars {
            if bar.index == index {
                bar.address = address;
            }
        }
    }

    /// The BARs that [`GuestFunction::place_bars`] found.
    pub fn bars(&self) -> &[GuestBar] {
        &self.bars
    }

    /// A BAR; panics if there is none of that number.
    pub fn bar(&self, index: u8) -> GuestBar {
        let bar = self.bars.iter().find(|bar| bar.index == index);
        bar.expect("a placed BAR").clone()
    }

    /// Capability IDs and their places, in list order.
    pub fn capabilities(&self) -> Vec<(u8, u16)> {
        let mut found = Vec::new();
        let status: u16 = self.config(spec::STATUS);
        if status & spec::status::CAPABILITIES == 0 {
            return found;
        }
        let mut at: u8 = self.config(spec::CAPABILITIES_POINTER);
        while at != 0 {
            assert!(found.len() < 48, "the capability list has a loop");
            assert!(at >= spec::FIRST_CAPABILITY && at.is_multiple_of(4));
            let place = u16::from(at);
            found.push((self.config(place), place));
            at = self.config(place + spec::capability::NEXT);
        }
        found
    }

    /// The first capability with this ID.
    pub fn capability(&self, id: u8) -> Option<u16> {
        let all = self.capabilities();
        all.into_iter().find(|c| c.0 == id).map(|c| c.1)
    }

    /// Initiates a function-level reset. Returns when it is done; BARs must be placed anew.
    pub fn reset(&mut self) {
        let express = self.capability(spec::capability::EXPRESS);
        let register = express.expect("PCI Express capability") + spec::express::DEVICE_CONTROL;
        let control: u16 = self.config(register);
        self.set_config(register, control | spec::express::INITIATE_FLR);
        self.bars.clear();
    }

    /// Sets up MSI-X as Linux does: enabled with the function mask set, every entry masked, then the
    /// first `count` entries given messages of their own and unmasked.
    pub fn setup_msix(&self, count: u16) -> Vec<GuestVector> {
        use spec::msix::{CONTROL, ENABLE, FUNCTION_MASK, TABLE_SIZE};
        let capability = self.msix_capability();
        let control: u16 = self.config(capability + CONTROL);
        let size = (control & TABLE_SIZE) + 1;
        assert!(count <= size, "the function has {size} vectors");
        self.set_config(capability + CONTROL, control | ENABLE | FUNCTION_MASK);
        let vectors: Vec<GuestVector> = (0..size).map(|i| self.vector(i)).collect();
        for vector in &vectors {
            vector.mask();
        }
        self.set_config(capability + CONTROL, (control | ENABLE) & !FUNCTION_MASK);
        let vectors: Vec<GuestVector> = vectors.into_iter().take(count.into()).collect();
        for vector in &vectors {
            vector.set_message(vector.message);
            vector.unmask();
        }
        vectors
    }

    /// Writes MSI-X Enable and Function Mask.
    pub fn set_msix(&self, enable: bool, function_mask: bool) {
        use spec::msix::{CONTROL, ENABLE, FUNCTION_MASK};
        let enable = if enable { ENABLE } else { 0 };
        let mask = if function_mask { FUNCTION_MASK } else { 0 };
        self.set_config(self.msix_capability() + CONTROL, enable | mask);
    }

    /// The MSI capability.
    pub fn msi(&self) -> GuestMsi {
        let capability = self.capability(spec::capability::MSI);
        GuestMsi {
            function: self.clone(),
            at: capability.expect("MSI capability"),
        }
    }

    /// Enables MSI with one vector, as most drivers do, and gives its message.
    pub fn setup_msi(&self) -> MsiMessage {
        let msi = self.msi();
        let message = self.machine.interrupts().allocate();
        msi.set_message(message);
        msi.control(true, 0);
        message
    }

    /// Whether Interrupt Status is set.
    pub fn interrupt_status(&self) -> bool {
        self.config::<u16>(spec::STATUS) & spec::status::INTERRUPT != 0
    }

    fn msix_capability(&self) -> u16 {
        let capability = self.capability(spec::capability::MSIX);
        capability.expect("MSI-X capability")
    }

    /// Place of an MSI-X structure, from its register in the capability.
    fn structure(&self, register: u16) -> (GuestBar, u64) {
        let place: u32 = self.config(self.msix_capability() + register);
        let bir = u8::try_from(place & spec::msix::BIR).expect("three bits");
        (self.bar(bir), u64::from(place & !spec::msix::BIR))
    }

    /// A vector's table entry, untouched, with a message that is not written there yet.
    pub fn vector(&self, index: u16) -> GuestVector {
        let (table, offset) = self.structure(spec::msix::TABLE);
        let (pba, pba_offset) = self.structure(spec::msix::PBA);
        let index = u64::from(index);
        GuestVector {
            entry: offset + index * spec::msix::ENTRY_LEN,
            table,
            pending: (pba_offset + index / 64 * 8, index % 64),
            pba,
            message: self.machine.interrupts().allocate(),
        }
    }
}

/// An MSI capability in the driver's hands.
#[derive(Clone)]
pub struct GuestMsi {
    function: GuestFunction,
    at: u16,
}

impl GuestMsi {
    /// Vectors that the function asks for.
    pub fn capable(&self) -> u32 {
        let control: u16 = self.function.config(self.at + spec::msi::CONTROL);
        1 << (control >> spec::msi::MULTIPLE_CAPABLE_SHIFT & 7)
    }

    /// Writes MSI Enable and Multiple Message Enable.
    pub fn control(&self, enable: bool, log2_granted: u16) {
        let control = u16::from(enable) | log2_granted << spec::msi::MULTIPLE_ENABLE_SHIFT;
        self.write(spec::msi::CONTROL, control);
    }

    /// Writes address and data.
    pub fn set_message(&self, message: MsiMessage) {
        let [a, b, c, d, e, f, g, h] = message.address.to_le_bytes();
        self.write(spec::msi::ADDRESS, u32::from_le_bytes([a, b, c, d]));
        self.write(spec::msi::ADDRESS + 4, u32::from_le_bytes([e, f, g, h]));
        let [a, b, ..] = message.data.to_le_bytes();
        self.write(spec::msi::DATA, u16::from_le_bytes([a, b]));
    }

    /// Writes the mask bits.
    pub fn mask(&self, bits: u32) {
        self.write(spec::msi::MASK, bits);
    }

    /// The pending bits.
    pub fn pending(&self) -> u32 {
        self.read(spec::msi::PENDING)
    }

    /// Reads a register of the capability.
    pub fn read<T: ByteValued>(&self, register: u16) -> T {
        self.function.config(self.at + register)
    }

    /// Writes a register of the capability.
    pub fn write<T: ByteValued>(&self, register: u16, value: T) {
        self.function.set_config(self.at + register, value);
    }
}

/// An MSI-X vector in the driver's hands.
#[derive(Clone)]
pub struct GuestVector {
    table: GuestBar,
    entry: u64,
    pba: GuestBar,
    /// Offset of the qword and number of the bit.
    pending: (u64, u64),
    /// What it sends; nothing else in the machine sends the same.
    pub message: MsiMessage,
}

impl GuestVector {
    const DATA: u64 = 8;
    const CONTROL: u64 = 12;

    /// Writes a message to the table entry, in dwords.
    pub fn set_message(&self, message: MsiMessage) {
        let [a, b, c, d, e, f, g, h] = message.address.to_le_bytes();
        let write = |offset, value: u32| self.table.write(self.entry + offset, value);
        write(0, u32::from_le_bytes([a, b, c, d]));
        write(4, u32::from_le_bytes([e, f, g, h]));
        write(Self::DATA, message.data);
    }

    /// Masks the vector.
    pub fn mask(&self) {
        self.table
            .write(self.entry + Self::CONTROL, spec::msix::ENTRY_MASK);
    }

    /// Unmasks the vector.
    pub fn unmask(&self) {
        self.table.write(self.entry + Self::CONTROL, 0u32);
    }

    /// Its bit in the pending bit array.
    pub fn pending(&self) -> bool {
        let bits: u64 = self.pba.read(self.pending.0);
        bits >> self.pending.1 & 1 != 0
    }

    /// Waits until the interrupt has come since the last call, and returns how often it has; 0 if it
    /// did not within `timeout`. For interrupts that must come pass [`TIMEOUT`](crate::TIMEOUT).
    pub fn wait(&self, timeout: Duration) -> u64 {
        self.table.machine.interrupts().wait(self.message, timeout)
    }

    /// How often the interrupt has come in all.
    pub fn count(&self) -> u64 {
        self.table.machine.interrupts().count(self.message)
    }
}

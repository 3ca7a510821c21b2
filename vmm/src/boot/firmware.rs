//! What a firmware does to PCI before a boot loader runs, for kernels that count on it: every BAR has
//! an address, memory decoding is on, and the Interrupt Line register holds the IOAPIC pin.
//!
//! Linux does all that by itself from the ACPI tables, so its boot protocols do without.

#![forbid(unsafe_code)]

use iommu::Gpa;
use pci::RootComplex;
use vm_allocator::{AddressAllocator, AllocPolicy};

/// PCI Local Bus 3.0, 6.1 and 6.2.
mod register {
    pub const ID: u16 = 0x00;
    pub const COMMAND: u16 = 0x04;
    pub const HEADER_TYPE: u16 = 0x0e;
    pub const BARS: u16 = 0x10;
}
const NO_FUNCTION: u32 = 0xffff;
const COMMAND_MEMORY: u32 = 1 << 1;
/// BARs of a header of type 0.
const BARS: u16 = 6;
const BAR_IO: u32 = 1 << 0;
const BAR_TYPE: u32 = 0b110;
const BAR_TYPE_64: u32 = 0b100;
const BAR_FLAGS: u32 = 0xf;

/// A BAR that wants an address.
struct Bar {
    function: u8,
    register: u16,
    size: u64,
    is_64: bool,
}

/// Sets up every function of bus 0. BARs go below 4 GiB, where every kernel reaches them; those that
/// do not fit there go above if they can. A function with one that fits nowhere stays off.
pub fn set_up(root: &RootComplex) {
    let windows = root.windows();
    let window = |range: &std::ops::Range<u64>| {
        AddressAllocator::new(range.start, range.end - range.start).ok()
    };
    let (mut low, mut high) = (window(&windows.mmio32), window(&windows.mmio64));
    let mut bars = Vec::new();
    let mut decode = [false; 256];
    for function in 0..=u8::MAX {
        let config = Config { root, function };
        if config.read(register::ID) & NO_FUNCTION == NO_FUNCTION
            || config.read(register::HEADER_TYPE & !3) >> 16 & 0x7f != 0
        {
            continue;
        }
        let found = config.bars();
        if let Some(decode) = decode.get_mut(usize::from(function)) {
            *decode = !found.is_empty();
        }
        bars.extend(found);
    }
    // The largest first, so that none is lost to alignment.
    bars.sort_by_key(|bar| std::cmp::Reverse(bar.size));
    for bar in &bars {
        let place = |window: &mut Option<AddressAllocator>| {
            let range = window
                .as_mut()?
                .allocate(bar.size, bar.size, AllocPolicy::FirstMatch)
                .ok()?;
            Some(range.start())
        };
        let address = place(&mut low).or_else(|| bar.is_64.then(|| place(&mut high))?);
        let config = Config {
            root,
            function: bar.function,
        };
        match address {
            Some(address) => config.set_bar(bar, address),
            None => {
                tracing::warn!(
                    function = bar.function,
                    size = bar.size,
                    "no room for a BAR: the function stays off"
                );
                if let Some(decode) = decode.get_mut(usize::from(bar.function)) {
                    *decode = false;
                }
            }
        }
    }
    for (function, _) in (0..=u8::MAX).zip(decode).filter(|(_, decode)| *decode) {
        let config = Config { root, function };
        // The upper half is the status register, where ones clear bits.
        let command = config.read(register::COMMAND) & 0xffff;
        config.write(register::COMMAND, command | COMMAND_MEMORY);
    }
}

/// The configuration space of a function of bus 0.
struct Config<'a> {
    root: &'a RootComplex,
    function: u8,
}

impl Config<'_> {
    fn address(&self, register: u16) -> Gpa {
        let ecam = self.root.windows().ecam.start;
        Gpa(ecam + (u64::from(self.function) << 12) + u64::from(register))
    }

    fn read(&self, register: u16) -> u32 {
        let mut data = [0; 4];
        self.root.mmio_read(self.address(register), &mut data);
        u32::from_le_bytes(data)
    }

    fn write(&self, register: u16, value: u32) {
        self.root
            .mmio_write(self.address(register), &value.to_le_bytes());
    }

    /// The memory BARs with their sizes (PCI Local Bus 3.0, 6.2.5.1).
    fn bars(&self) -> Vec<Bar> {
        let mut bars = Vec::new();
        let mut index = 0;
        while index < BARS {
            let register = register::BARS + 4 * index;
            let (flags, low) = (self.read(register), self.probe(register));
            let is_64 = flags & (BAR_TYPE | BAR_IO) == BAR_TYPE_64;
            let high = if is_64 {
                self.probe(register + 4)
            } else {
                u32::MAX
            };
            index += if is_64 { 2 } else { 1 };
            if low == 0 || flags & BAR_IO != 0 {
                continue;
            }
            let mask = u64::from(high) << 32 | u64::from(low & !BAR_FLAGS);
            bars.push(Bar {
                function: self.function,
                register,
                size: (!mask).wrapping_add(1),
                is_64,
            });
        }
        bars
    }

    /// What of a BAR takes ones.
    fn probe(&self, register: u16) -> u32 {
        let old = self.read(register);
        self.write(register, u32::MAX);
        let ones = self.read(register);
        self.write(register, old);
        ones
    }

    fn set_bar(&self, bar: &Bar, address: u64) {
        let [a, b, c, d, e, f, g, h] = address.to_le_bytes();
        self.write(bar.register, u32::from_le_bytes([a, b, c, d]));
        if bar.is_64 {
            self.write(bar.register + 4, u32::from_le_bytes([e, f, g, h]));
        }
    }
}

//! The bytes of a function's configuration space and which of them can be written.

use crate::interrupt::MsiRegisters;
use crate::spec::{self, CONFIG_SPACE_LEN};

/// Configuration space: a value, a write mask and a reset value for each bit. Bits outside the mask
/// are read-only.
pub(crate) struct Config {
    bytes: Box<[u8; CONFIG_SPACE_LEN]>,
    writable: Box<[u8; CONFIG_SPACE_LEN]>,
    reset: Box<[u8; CONFIG_SPACE_LEN]>,
    /// First byte of the power management capability, if there is one.
    pub(crate) power: Option<u16>,
    /// First byte of the PCI Express capability, if there is one.
    pub(crate) express: Option<u16>,
    /// First byte of the MSI capability, if there is one.
    pub(crate) msi: Option<u16>,
    /// First byte of the MSI-X capability, if there is one.
    pub(crate) msix: Option<u16>,
    /// Vendor-specific capabilities in order: first byte and length.
    pub(crate) vendor: Vec<(u16, u8)>,
}

impl Config {
    /// All zero and read-only.
    pub(crate) fn new() -> Config {
        Config {
            bytes: Box::new([0; CONFIG_SPACE_LEN]),
            writable: Box::new([0; CONFIG_SPACE_LEN]),
            reset: Box::new([0; CONFIG_SPACE_LEN]),
            power: None,
            express: None,
            msi: None,
            msix: None,
            vendor: Vec::new(),
        }
    }

    /// Sets the value after reset, for the builder.
    pub(crate) fn define(&mut self, offset: u16, value: &[u8]) {
        let at = usize::from(offset);
        self.bytes[at..at + value.len()].copy_from_slice(value);
        self.reset[at..at + value.len()].copy_from_slice(value);
    }

    /// Sets which bits can be written, for the builder.
    pub(crate) fn allow(&mut self, offset: u16, mask: &[u8]) {
        let at = usize::from(offset);
        self.writable[at..at + mask.len()].copy_from_slice(mask);
    }

    /// Back to the values that the builder defined.
    pub(crate) fn reset(&mut self) {
        self.bytes.copy_from_slice(&*self.reset);
    }

    /// Reads; bytes past the end are ones.
    pub(crate) fn read(&self, offset: u16, data: &mut [u8]) {
        for (byte, at) in data.iter_mut().zip(usize::from(offset)..) {
            *byte = self.bytes.get(at).copied().unwrap_or(0xff);
        }
    }

    /// Writes what can be written. True when the write asks for a function-level reset.
    pub(crate) fn write(&mut self, offset: u16, data: &[u8]) -> bool {
        let power_before = self.power_state();
        for (&value, at) in data.iter().zip(usize::from(offset)..) {
            if let (Some(byte), Some(&mask)) = (self.bytes.get_mut(at), self.writable.get(at)) {
                *byte = (*byte & !mask) | (value & mask);
            }
        }
        // A state that the function does not have is not entered (7.5.2.2).
        if let Some(power) = self.power
            && !matches!(self.power_state(), spec::power::D0 | spec::power::D3_HOT)
        {
            let at = usize::from(power + spec::power::CONTROL);
            self.bytes[at] = (self.bytes[at] & !spec::power::STATE) | power_before;
        }
        let [_, flr] = spec::express::INITIATE_FLR.to_le_bytes();
        self.express.is_some_and(|express| {
            written(offset, data, express + spec::express::DEVICE_CONTROL + 1)
                .is_some_and(|value| value & flr != 0)
        })
    }

    /// PowerState field; D0 without power management.
    fn power_state(&self) -> u8 {
        self.power.map_or(spec::power::D0, |power| {
            self.bytes[usize::from(power + spec::power::CONTROL)] & spec::power::STATE
        })
    }

    /// A 16-bit register.
    pub(crate) fn u16_at(&self, offset: u16) -> u16 {
        let at = usize::from(offset);
        u16::from_le_bytes([self.bytes[at], self.bytes[at + 1]])
    }

    /// A 32-bit register.
    pub(crate) fn u32_at(&self, offset: u16) -> u32 {
        let at = usize::from(offset);
        let [a, b, c, d] = [0, 1, 2, 3].map(|i| self.bytes[at + i]);
        u32::from_le_bytes([a, b, c, d])
    }

    /// The command register, with what the power state switches off switched off: in `D3hot` a
    /// function answers configuration accesses only, starts nothing and asserts no pin (5.3.1.4).
    pub(crate) fn effective_command(&self) -> u16 {
        let command = self.u16_at(spec::COMMAND);
        if self.power_state() == spec::power::D0 {
            command
        } else {
            command & !(spec::command::MEMORY | spec::command::BUS_MASTER)
                | spec::command::INTX_DISABLE
        }
    }

    /// The registers of the MSI capability; all zero without it.
    pub(crate) fn msi_registers(&self) -> MsiRegisters {
        use spec::msi::{ADDRESS, CONTROL, DATA, MASK};
        let Some(at) = self.msi else {
            return MsiRegisters::default();
        };
        let high = u64::from(self.u32_at(at + ADDRESS + 4));
        MsiRegisters {
            control: self.u16_at(at + CONTROL),
            address: high << 32 | u64::from(self.u32_at(at + ADDRESS)),
            data: self.u16_at(at + DATA),
            mask: self.u32_at(at + MASK),
        }
    }

    /// MSI-X Enable and Function Mask.
    pub(crate) fn msix_control(&self) -> (bool, bool) {
        let control = self
            .msix
            .map_or(0, |at| self.u16_at(at + spec::msix::CONTROL));
        (
            control & spec::msix::ENABLE != 0,
            control & spec::msix::FUNCTION_MASK != 0,
        )
    }

    /// The part of an access (at most four bytes, inside one dword) that falls into the body of a
    /// vendor-specific capability: its number, the offset from the capability's first byte, and the
    /// range of the access's bytes.
    pub(crate) fn vendor_part(
        &self,
        offset: u16,
        len: usize,
    ) -> Option<(usize, u8, std::ops::Range<usize>)> {
        let access = usize::from(offset)..usize::from(offset) + len;
        self.vendor
            .iter()
            .enumerate()
            .find_map(|(index, &(at, length))| {
                let at = usize::from(at);
                let start = access.start.max(at + VENDOR_BODY);
                let end = access.end.min(at + usize::from(length));
                let from = u8::try_from(start.checked_sub(at)?).ok()?;
                (start < end).then(|| (index, from, start - access.start..end - access.start))
            })
    }
}

/// Where the body of a vendor-specific capability begins: after ID, next pointer and length (7.9.4).
pub(crate) const VENDOR_BODY: usize = 3;

/// The byte that a write puts at `at`, if it does.
fn written(offset: u16, data: &[u8], at: u16) -> Option<u8> {
    data.get(usize::from(at.checked_sub(offset)?)).copied()
}

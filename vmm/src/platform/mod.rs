//! The machine's I/O ports: serial line, clock, power management, reset, panic notification.

mod panic_watch;
mod rtc;
mod serial;
mod test_ports;

use std::sync::Arc;

use crate::acpi::{RESET_VALUE, SLEEP_TYPE_S5};
use crate::cpu::Request;
use crate::layout;

pub use panic_watch::PanicWatch;
pub use serial::Serial;
pub use test_ports::TestPorts;

/// ACPI sleep control register (ACPI 6.5, 4.8.3.7): the write bit and the type field.
const SLEEP_ENABLE: u8 = 1 << 5;
const SLEEP_TYPE_SHIFT: u8 = 2;
/// Bit of the reset control register that resets the CPUs (I/O Controller Hub 10 data sheet, 319973,
/// 13.7.5).
const RESET_CPU: u8 = 1 << 2;
const _: () = assert!(RESET_VALUE & RESET_CPU != 0);
/// The keyboard controller's command that pulses the CPU's reset line (IBM PC AT, 6028-6030).
const PULSE_RESET: u8 = 0xfe;
/// pvpanic events (QEMU docs/specs/pvpanic.rst): panicked, and panicked with a crash kernel that
/// takes over.
const PVPANIC_PANICKED: u8 = 1 << 0;
const PVPANIC_CRASH_LOADED: u8 = 1 << 1;

/// Devices on I/O ports, except PCI configuration.
pub struct Platform {
    serial: Arc<Serial>,
    rtc: rtc::Rtc,
    panic: Arc<PanicWatch>,
    test: Option<TestPorts>,
}

impl Platform {
    /// With COM1 as given. `panic` watches what the guest prints there; `test` are the ports for
    /// test kernels, if the machine has them.
    pub fn new(serial: Arc<Serial>, panic: Arc<PanicWatch>, test: Option<TestPorts>) -> Platform {
        Platform {
            serial,
            rtc: rtc::Rtc::default(),
            panic,
            test,
        }
    }

    /// A load. Ports that nobody has read as ones.
    pub fn read(&self, port: u16, data: &mut [u8]) {
        data.fill(0xff);
        let Some(first) = data.first_mut() else {
            return;
        };
        match port {
            port if layout::COM1.contains(&port) => {
                let offset = port - layout::COM1.start;
                *first = self.serial.read(offset.to_le_bytes()[0]);
            }
            port if layout::RTC.contains(&port) => *first = self.rtc.read(port),
            layout::PVPANIC => *first = PVPANIC_PANICKED | PVPANIC_CRASH_LOADED,
            // Zero says: the input buffer is empty, which drivers wait for.
            layout::KEYBOARD_COMMAND
            | layout::SLEEP_CONTROL
            | layout::SLEEP_STATUS
            | layout::RESET_CONTROL => *first = 0,
            port => {
                if let Some(value) = self.test.as_ref().and_then(|test| test.read(port)) {
                    *first = value;
                }
            }
        }
    }

    /// A store. Ports that nobody has swallow it.
    pub fn write(&self, port: u16, data: &[u8]) -> Option<Request> {
        let value = *data.first()?;
        match port {
            port if layout::COM1.contains(&port) => {
                let offset = port - layout::COM1.start;
                self.serial.write(offset.to_le_bytes()[0], value);
                self.panic.is_final().then_some(Request::Panic)
            }
            port if layout::RTC.contains(&port) => {
                self.rtc.write(port, value);
                None
            }
            layout::PVPANIC if value & PVPANIC_PANICKED != 0 => Some(Request::Panic),
            layout::SLEEP_CONTROL
                if value & SLEEP_ENABLE != 0 && value >> SLEEP_TYPE_SHIFT & 7 == SLEEP_TYPE_S5 =>
            {
                Some(Request::PowerOff)
            }
            layout::RESET_CONTROL if value & RESET_CPU != 0 => Some(self.reset()),
            layout::KEYBOARD_COMMAND if value == PULSE_RESET => Some(self.reset()),
            port => self.test.as_ref()?.write(port, data),
        }
    }

    /// A kernel told to reboot on panic (`panic=-1`) first prints that it panicked.
    fn reset(&self) -> Request {
        if self.panic.seen() {
            Request::Panic
        } else {
            Request::Reset
        }
    }
}

#[cfg(test)]
mod tests {
    use std::io;

    use iommu::{MsiLine, MsiMessage};

    use super::*;
    use crate::ioapic::IoApic;

    struct Deaf;

    impl MsiLine for Deaf {
        fn retarget(&self, _message: MsiMessage) -> io::Result<()> {
            Ok(())
        }
        fn fire(&self) {}
    }

    fn platform() -> Platform {
        let lines = (0..24)
            .map(|_| Arc::new(Deaf) as Arc<dyn MsiLine>)
            .collect();
        let panic = Arc::new(PanicWatch::default());
        let serial = Serial::new(
            Arc::new(IoApic::new(lines)),
            Box::new(io::sink()),
            Arc::clone(&panic),
        )
        .unwrap();
        Platform::new(Arc::new(serial), panic, None)
    }

    #[test]
    fn requests_of_the_guest() {
        let platform = platform();
        for (port, value, request) in [
            (0x600, 0x34, Some(Request::PowerOff)),
            (0x600, 0x14, None),
            (0x600, 0x24, None),
            (0xcf9, 0x02, None),
            (0xcf9, 0x06, Some(Request::Reset)),
            (0x64, 0xfe, Some(Request::Reset)),
            (0x64, 0xd1, None),
            (0x505, 0x01, Some(Request::Panic)),
            (0x505, 0x02, None),
            (0x80, 0xff, None),
            (0xf4, 0x00, None),
        ] {
            assert_eq!(platform.write(port, &[value]), request, "{port:#x}");
        }
        assert_eq!(platform.write(0x600, &[]), None);
    }

    #[test]
    fn a_reset_after_a_panic_is_a_panic() {
        let platform = platform();
        for byte in b"[ 1.0] Kernel panic - not syncing: VFS\n" {
            assert_eq!(platform.write(0x3f8, &[*byte]), None);
        }
        assert_eq!(platform.write(0xcf9, &[6]), Some(Request::Panic));
    }

    #[test]
    fn the_end_of_a_panic_report_is_a_panic() {
        let platform = platform();
        let text = b"---[ end Kernel panic - not syncing: VFS ]---\n";
        let last = text.iter().map(|b| platform.write(0x3f8, &[*b])).last();
        assert_eq!(last, Some(Some(Request::Panic)));
    }

    #[test]
    fn test_ports_are_there_on_request() {
        let mut platform = platform();
        let mut data = [0];
        platform.read(0x511, &mut data);
        assert_eq!(data, [0xff]);
        platform.test = Some(TestPorts::new(1 << 20, 1));
        platform.read(0x511, &mut data);
        assert_eq!(data, *b"Q");
        assert_eq!(platform.write(0xf4, &[3]), Some(Request::DebugExit(3)));
        assert_eq!(platform.write(0x600, &[0x34]), Some(Request::PowerOff));
    }

    #[test]
    fn unclaimed_ports_read_as_ones() {
        let platform = platform();
        let mut data = [0; 4];
        platform.read(0x5000, &mut data);
        assert_eq!(data, [0xff; 4]);
        platform.read(0x505, &mut data);
        assert_eq!(data[0], 3);
        platform.read(0x64, &mut []);
    }
}

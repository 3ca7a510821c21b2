//! Ports that test kernels use to end and to learn what machine they are on, as QEMU has them: the
//! debug exit (QEMU hw/misc/debugexit.c) and the part of fw_cfg that tells the number of processors
//! and the size of memory (QEMU docs/specs/fw_cfg.rst, "traditional" interface).
//!
//! An operating system has no business here, so a machine has them only on request.

#![forbid(unsafe_code)]

use std::sync::{Mutex, PoisonError};

use crate::cpu::Request;
use crate::layout;

/// fw_cfg items (QEMU include/standard-headers/linux/qemu_fw_cfg.h).
const SIGNATURE: u16 = 0x00;
const ID: u16 = 0x01;
const RAM_SIZE: u16 = 0x03;
const CPUS: u16 = 0x05;
const MAX_CPUS: u16 = 0x0f;
/// Value of [`ID`]: the traditional interface and no DMA.
const ID_TRADITIONAL: u32 = 1 << 0;

/// The ports.
pub struct TestPorts {
    memory: u64,
    vcpus: u8,
    position: Mutex<Position>,
}

/// What the data port reads next.
#[derive(Clone, Copy, Debug, Default)]
struct Position {
    item: u16,
    offset: usize,
}

impl TestPorts {
    /// For a machine with `memory` bytes of RAM and that many processors.
    pub fn new(memory: u64, vcpus: u8) -> TestPorts {
        TestPorts {
            memory,
            vcpus,
            position: Mutex::default(),
        }
    }

    /// A load; `None` if the port is none of these.
    pub(super) fn read(&self, port: u16) -> Option<u8> {
        if port == layout::FW_CFG.start + 1 {
            Some(self.next())
        } else if layout::FW_CFG.contains(&port) || layout::DEBUG_EXIT.contains(&port) {
            Some(0)
        } else {
            None
        }
    }

    /// A store of 1, 2 or 4 bytes. Ports that are none of these swallow it.
    pub(super) fn write(&self, port: u16, data: &[u8]) -> Option<Request> {
        let mut value = [0; 4];
        for (to, from) in value.iter_mut().zip(data) {
            *to = *from;
        }
        let [low, high, ..] = value;
        if port == layout::FW_CFG.start {
            let item = u16::from_le_bytes([low, high]);
            *self.position() = Position { item, offset: 0 };
        }
        (port == layout::DEBUG_EXIT.start).then(|| Request::DebugExit(u32::from_le_bytes(value)))
    }

    fn position(&self) -> std::sync::MutexGuard<'_, Position> {
        self.position.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The next byte of the item; zeroes follow its end, and are all that there is of others.
    fn next(&self) -> u8 {
        let mut position = self.position();
        let byte = self.item(position.item).get(position.offset).copied();
        position.offset = position.offset.saturating_add(1);
        byte.unwrap_or(0)
    }

    fn item(&self, item: u16) -> [u8; 8] {
        match item {
            SIGNATURE => *b"QEMU\0\0\0\0",
            ID => u64::from(ID_TRADITIONAL).to_le_bytes(),
            RAM_SIZE => self.memory.to_le_bytes(),
            CPUS | MAX_CPUS => u64::from(self.vcpus).to_le_bytes(),
            _ => [0; 8],
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn item(ports: &TestPorts, item: u16, bytes: usize) -> Vec<u8> {
        assert_eq!(ports.write(0x510, &item.to_le_bytes()), None);
        (0..bytes).map(|_| ports.read(0x511).unwrap()).collect()
    }

    #[test]
    fn fw_cfg_tells_processors_and_memory() {
        let ports = TestPorts::new(0x1_2345_6000, 7);
        assert_eq!(item(&ports, 0, 4), b"QEMU");
        assert_eq!(item(&ports, 1, 4), [1, 0, 0, 0]);
        assert_eq!(item(&ports, 3, 10), [0, 0x60, 0x45, 0x23, 1, 0, 0, 0, 0, 0]);
        assert_eq!(item(&ports, 5, 2), [7, 0]);
        assert_eq!(item(&ports, 15, 2), [7, 0]);
        assert_eq!(item(&ports, 0x19, 4), [0; 4], "no files");
        assert_eq!(item(&ports, 5, 1), [7], "from its start again");
    }

    #[test]
    fn debug_exit_takes_every_width() {
        let ports = TestPorts::new(1 << 20, 1);
        for (data, value) in [
            (&[5u8][..], 5),
            (&[5, 1], 0x105),
            (&[1, 2, 3, 4], 0x0403_0201),
        ] {
            assert_eq!(ports.write(0xf4, data), Some(Request::DebugExit(value)));
        }
        assert_eq!(ports.write(0xf5, &[1]), None);
        assert_eq!(ports.write(0x511, &[1]), None);
        assert_eq!((ports.read(0xf4), ports.read(0xf8)), (Some(0), None));
    }
}

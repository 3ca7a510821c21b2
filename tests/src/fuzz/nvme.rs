//! An NVMe controller under a hostile driver: registers, doorbells, rings, PRP lists.
//!
//! There is no model of the commands here; what is demanded is that nothing panics or hangs, and that
//! after whatever happened a function-level reset gives a controller that works.

use std::sync::Arc;
use std::time::{Duration, Instant};

use devices::block::MemoryBackend;
use devices::nvme::{Config, NamespaceConfig, Nvme};
use iommu::{Bdf, Gpa};
use pci::spec;

use super::Input;
use crate::function::{GuestBar, GuestFunction};
use crate::machine::{Machine, layout};
use crate::memory::{DmaBuffer, PAGE_SIZE, Side};

const SLOT: u8 = 3;
/// I/O queue pairs of the controller.
const PAIRS: u16 = 3;
/// Entries of each queue that the helpers make: one page of submission entries.
const ENTRIES: u16 = 64;
/// Pages for queues and data.
const PAGES: u64 = 32;
/// First page that no queue of the helpers is in.
const DATA: u64 = 8;
/// How long a hostile driver waits for an answer that may never come.
const PATIENCE: Duration = Duration::from_millis(2);

const CC: u64 = 0x14;
const CSTS: u64 = 0x1c;
const AQA: u64 = 0x24;
const ASQ: u64 = 0x28;
const ACQ: u64 = 0x30;
const DOORBELLS: u64 = 0x1000;
/// Enabled, NVM command set, 64-byte and 16-byte entries.
const CC_ENABLE: u32 = 0x0046_0001;
const CSTS_READY: u32 = 1;
const CSTS_FATAL: u32 = 2;

const IDENTIFY: u8 = 6;

struct Guest {
    machine: Arc<Machine>,
    function: GuestFunction,
    bar: GuestBar,
    pages: DmaBuffer,
    high: DmaBuffer,
    /// Of the admin queue and the I/O queues.
    tails: [u16; 4],
    heads: [u16; 4],
    phases: [bool; 4],
    resets: u32,
}

/// Runs `data` as a hostile driver's accesses to a controller with three namespaces.
///
/// # Panics
///
/// The controller does not come back after a function-level reset.
pub fn nvme(data: &[u8]) {
    let machine = Machine::new();
    let disk = |size| MemoryBackend::new(size).expect("memory");
    let read_only = MemoryBackend::new_read_only(1 << 20).expect("memory");
    let namespace = |nsid, backend, lba_size| NamespaceConfig {
        nsid,
        backend,
        lba_size,
    };
    let config = Config {
        namespaces: vec![
            namespace(1, disk(1 << 20), 512),
            namespace(2, disk(1 << 16), 4096),
            namespace(7, read_only, 512),
        ],
        max_queue_pairs: PAIRS,
        queue_entries: 256,
        mdts: 3,
        ..Config::default()
    };
    let bdf = Bdf::new(0, SLOT, 0).expect("slot");
    let (endpoint, device) = Nvme::new(config, bdf, machine.upstream()).expect("controller");
    machine.attach(endpoint, device);

    let function = GuestFunction::probe(&machine, SLOT);
    let mut guest = Guest {
        bar: function.bar(0),
        pages: machine.dma(Side::Low, PAGES),
        high: machine.dma(Side::High, 4),
        function,
        machine,
        tails: [0; 4],
        heads: [0; 4],
        phases: [true; 4],
        resets: 0,
    };
    guest.function.setup_msix(PAIRS + 1);
    let mut input = Input::new(data);
    // Most inputs start with what every driver does.
    if input.byte() & 0xf != 0 {
        guest.enable();
        if input.byte() & 3 != 0 {
            guest.create_queues();
            guest.reap(0, 2 * usize::from(PAIRS), PATIENCE);
        }
    }
    let mut steps = 0;
    while !input.is_empty() && steps < 150 {
        steps += 1;
        guest.step(&mut input);
    }
    guest.recover();
}

impl Guest {
    fn page(&self, index: u64) -> u64 {
        self.pages.at(index * PAGE_SIZE).0
    }

    /// An address that a driver may give a device: mostly good.
    fn address(&self, input: &mut Input<'_>) -> u64 {
        let page = self.page(DATA + u64::from(input.byte()) % (PAGES - DATA));
        let offset = u64::from(input.u16());
        match input.byte() % 16 {
            0..6 => page,
            6..8 => page + (offset & 0xffc),
            8 => page + (offset & 0xfff),
            9 => page + 0xff8,
            10 => self.high.at((offset % 4) * PAGE_SIZE).0,
            // A queue, the end of RAM, the controller itself, interrupts, nowhere.
            11 => self.page(offset % DATA),
            12 => layout::LOW_RAM.end - PAGE_SIZE * (offset % 2),
            13 => self.bar.address.0 + (offset & !3),
            14 => 0xfee0_0000,
            _ => input.u64(),
        }
    }

    fn step(&mut self, input: &mut Input<'_>) {
        match input.byte() % 16 {
            0..3 => self.admin_command(input),
            3..8 => self.io_command(input),
            8 => self.create_queues(),
            9 => {
                self.enable();
            }
            10 => {
                let register = input.pick(&[CC, CSTS, AQA, ASQ, ACQ, 0x0c, 0x10, 0x20, 0, 0x38]);
                let register = match input.byte() % 4 {
                    0 => u64::from(input.u16() & 0x3fff),
                    1 => register + 4,
                    _ => register,
                };
                let value = input.u64().to_le_bytes();
                let len = usize::from(input.pick(&[4u8, 8, 4, 2, 1]));
                self.store(register, &value[..len]);
            }
            11 => {
                let doorbell = u64::from(input.byte() % 10);
                let value = match input.byte() % 4 {
                    0 => input.u32(),
                    _ => u32::from(input.byte() % 66),
                };
                self.store(DOORBELLS + doorbell * 4, &value.to_le_bytes());
            }
            // PRP lists and ranges: addresses in rows.
            12 => {
                let page = input.byte();
                let at = u64::from(page) % PAGES * PAGE_SIZE + u64::from(input.byte()) * 16;
                for entry in 0..u64::from(input.byte() % 12) {
                    let address = self.address(input);
                    if at + entry * 8 + 8 <= self.pages.len() {
                        self.pages.write(at + entry * 8, address);
                    }
                }
            }
            13 => self.bus(input),
            14 => {
                let queue = usize::from(input.byte() % 4);
                self.reap(queue, 1, PATIENCE);
            }
            _ => {
                let register = u64::from(input.u16() & 0x3fff);
                let mut data = [0; 8];
                let len = usize::from(input.pick(&[4u8, 8, 1, 2]));
                let address = Gpa(self.bar.address.0 + register);
                self.machine.load(address, &mut data[..len]);
            }
        }
    }

    fn store(&self, register: u64, data: &[u8]) {
        let address = Gpa(self.bar.address.0 + register);
        self.machine.store(address, data);
    }

    /// Waits for a bit of CSTS, without insisting on it.
    fn wait(&self, mask: u32, value: u32, patience: Duration) -> bool {
        let deadline = Instant::now() + patience;
        loop {
            let csts: u32 = self.bar.read(CSTS);
            if csts & mask == value || csts & CSTS_FATAL != 0 {
                return csts & mask == value;
            }
            if Instant::now() > deadline {
                return false;
            }
            std::thread::yield_now();
        }
    }

    /// Disables, sets up the admin queue in pages 0 and 1, enables.
    fn enable(&mut self) -> bool {
        self.bar.write(CC, 0u32);
        self.wait(CSTS_READY, 0, PATIENCE);
        for page in 0..DATA {
            let zeroes = [0; 4096];
            self.pages.set_bytes(page * PAGE_SIZE, &zeroes);
        }
        (self.tails, self.heads, self.phases) = ([0; 4], [0; 4], [true; 4]);
        let entries = u32::from(ENTRIES - 1);
        self.bar.write(AQA, entries << 16 | entries);
        self.bar.write(ASQ, self.page(0));
        self.bar.write(ACQ, self.page(1));
        self.bar.write(CC, CC_ENABLE);
        self.wait(CSTS_READY, CSTS_READY, PATIENCE * 50)
    }

    /// Submission queue `queue` in page 2 * `queue`, its completion queue in the page after.
    fn create_queues(&mut self) {
        for queue in 1..=PAIRS {
            let size = u32::from(ENTRIES - 1) << 16;
            let first = u64::from(queue) * 2;
            let vector = u32::from(queue) << 16;
            // Physically contiguous, interrupts enabled; then the queue that completes there.
            for (opcode, page, dword11) in
                [(5, first + 1, vector | 0b11), (1, first, vector | 0b01)]
            {
                let mut command = [0u8; 64];
                command[0] = opcode;
                command[24..32].copy_from_slice(&self.page(page).to_le_bytes());
                command[40..44].copy_from_slice(&(size | u32::from(queue)).to_le_bytes());
                command[44..48].copy_from_slice(&dword11.to_le_bytes());
                self.submit(0, &command);
            }
        }
    }

    /// Puts a command into submission queue `queue` and rings.
    fn submit(&mut self, queue: usize, command: &[u8; 64]) {
        let tail = &mut self.tails[queue];
        let at = queue as u64 * 2 * PAGE_SIZE + u64::from(*tail) * 64;
        self.pages.set_bytes(at, command);
        *tail = (*tail + 1) % ENTRIES;
        let value = u32::from(*tail);
        self.bar.write(DOORBELLS + queue as u64 * 8, value);
    }

    /// Takes completions, waiting for `count` of them. Returns the statuses.
    fn reap(&mut self, queue: usize, count: usize, patience: Duration) -> Vec<u16> {
        let deadline = Instant::now() + patience;
        let mut statuses = Vec::new();
        loop {
            let at = (queue as u64 * 2 + 1) * PAGE_SIZE + u64::from(self.heads[queue]) * 16;
            let status: u16 = self.pages.load(at + 14);
            if (status & 1 != 0) == self.phases[queue] {
                statuses.push(status >> 1);
                self.heads[queue] += 1;
                if self.heads[queue] == ENTRIES {
                    self.heads[queue] = 0;
                    self.phases[queue] = !self.phases[queue];
                }
            } else if statuses.len() >= count || Instant::now() > deadline {
                break;
            } else {
                std::thread::yield_now();
            }
        }
        let head = u32::from(self.heads[queue]);
        self.bar.write(DOORBELLS + queue as u64 * 8 + 4, head);
        statuses
    }

    fn command(&self, input: &mut Input<'_>, opcode: u8) -> [u8; 64] {
        let mut command = [0u8; 64];
        command[0] = opcode;
        if input.one_in(16) {
            command[1] = input.byte();
        }
        command[2..4].copy_from_slice(&u16::from(input.byte()).to_le_bytes());
        let other = u32::from(input.byte());
        let nsid = input.pick(&[1, 2, 7, 0, u32::MAX, other]);
        command[4..8].copy_from_slice(&nsid.to_le_bytes());
        command[24..32].copy_from_slice(&self.address(input).to_le_bytes());
        command[32..40].copy_from_slice(&self.address(input).to_le_bytes());
        command
    }

    fn admin_command(&mut self, input: &mut Input<'_>) {
        let any = input.byte();
        let opcode = input.pick(&[6, 10, 9, 2, 12, 8, 1, 5, 0, 4, any]);
        let mut command = self.command(input, opcode);
        // Dwords 10 and 11: small numbers are queue ids, features, pages, lengths.
        let dwords = match input.byte() % 4 {
            0 => [input.u32(), input.u32()],
            1 => [
                u32::from(input.byte() % 8) | u32::from(input.byte()) << 16,
                u32::from(input.byte()) | u32::from(input.byte() % 8) << 16,
            ],
            _ => [u32::from(input.byte()), u32::from(input.byte())],
        };
        for (dword, at) in dwords.iter().zip([40, 44]) {
            command[at..at + 4].copy_from_slice(&dword.to_le_bytes());
        }
        if input.one_in(8) {
            command[48..64].copy_from_slice(&input.bytes::<16>());
        }
        self.submit(0, &command);
    }

    fn io_command(&mut self, input: &mut Input<'_>) {
        let queue = 1 + usize::from(input.byte()) % usize::from(PAIRS);
        let any = input.byte();
        let opcode = input.pick(&[2, 1, 2, 1, 0, 8, 9, any]);
        let mut command = self.command(input, opcode);
        let lba = match input.byte() % 4 {
            0 => input.u64(),
            1 => 2048 - u64::from(input.byte() % 16),
            _ => u64::from(input.byte()),
        };
        command[40..48].copy_from_slice(&lba.to_le_bytes());
        let flags = if input.one_in(4) { input.u16() } else { 0 };
        let blocks = match input.byte() % 4 {
            0 => input.u16(),
            1 => u16::from(input.byte()),
            _ => u16::from(input.byte() % 9),
        };
        command[48..50].copy_from_slice(&blocks.to_le_bytes());
        command[50..52].copy_from_slice(&flags.to_le_bytes());
        self.submit(queue, &command);
        if input.byte() & 1 == 0 {
            self.reap(queue, 1, PATIENCE);
        }
    }

    /// What the PCI driver does behind the NVMe driver's back.
    fn bus(&mut self, input: &mut Input<'_>) {
        match input.byte() % 6 {
            0 => self.function.set_bus_master(false),
            1 | 2 => self.function.set_bus_master(true),
            3 => {
                let masked = input.byte() & 1 != 0;
                self.function.set_msix(true, masked);
            }
            4 => {
                let state = if input.byte() & 1 == 0 { 3u16 } else { 0 };
                let power = self.function.capability(spec::capability::POWER_MANAGEMENT);
                let register = power.expect("power management") + spec::power::CONTROL;
                self.function.set_config(register, state);
            }
            _ if self.resets < 4 => {
                self.resets += 1;
                self.reset();
            }
            _ => {}
        }
    }

    fn reset(&mut self) {
        self.function.reset();
        self.function.place_bars();
        self.function
            .set_command(spec::command::MEMORY | spec::command::BUS_MASTER);
        self.bar = self.function.bar(0);
    }

    /// After a reset the controller enables, identifies itself and moves data.
    fn recover(&mut self) {
        self.reset();
        let deadline = Instant::now() + crate::TIMEOUT;
        while !self.enable() {
            assert!(Instant::now() < deadline, "the controller does not enable");
        }
        let mut identify = [0u8; 64];
        identify[0] = IDENTIFY;
        identify[24..32].copy_from_slice(&self.page(DATA).to_le_bytes());
        identify[40] = 1;
        self.submit(0, &identify);
        assert_eq!(self.reap(0, 1, crate::TIMEOUT), [0], "identify");

        self.create_queues();
        let created = 2 * usize::from(PAIRS);
        let statuses = self.reap(0, created, crate::TIMEOUT);
        assert_eq!(statuses, vec![0; created], "create queues");
        let at = DATA * PAGE_SIZE;
        for (opcode, fill) in [(1u8, 0x5au8), (2, 0)] {
            self.pages.set_bytes(at, &[fill; 512]);
            let mut command = [0u8; 64];
            command[0] = opcode;
            command[4] = 1;
            command[24..32].copy_from_slice(&self.page(DATA).to_le_bytes());
            self.submit(1, &command);
            assert_eq!(self.reap(1, 1, crate::TIMEOUT), [0], "opcode {opcode}");
        }
        assert_eq!(self.pages.bytes(at, 512), [0x5a; 512]);
    }
}

//! A virtio network device under a hostile driver: transport registers, rings, packets, commands.
//!
//! What is demanded: nothing panics or hangs, and after a function-level reset the device works.

use devices::net::Loopback;
use iommu::Gpa;
use pci::spec;

use super::Input;
use crate::machine::layout;
use crate::memory::{DmaBuffer, PAGE_SIZE, Side};
use crate::virtio::{
    GuestQueue, NetDriver, NetSetup, VirtioFunction, common, features, frame, plain, status,
};

const PAIRS: u16 = 2;
/// Entries of the queues.
const SIZE: u16 = 16;
/// Pages for descriptors' buffers.
const PAGES: u64 = 24;

struct Guest {
    driver: NetDriver,
    queues: Vec<GuestQueue>,
    pages: DmaBuffer,
    event_idx: bool,
    resets: u32,
}

/// Runs `data` as a hostile driver's accesses to a network device with two queue pairs that loops
/// packets back.
///
/// # Panics
///
/// The device does not come back after a function-level reset.
pub fn virtio_net(data: &[u8]) {
    let backend = Loopback::new(PAIRS).expect("loopback");
    let driver = NetDriver::found(backend, PAIRS, |config| config.queue_size = 64);
    let queues: u16 = driver.virtio.common.read(common::NUM_QUEUES);
    let queues = (0..queues)
        .map(|index| driver.virtio.make_queue(index, SIZE, false))
        .collect();
    let mut guest = Guest {
        pages: driver.machine.dma(Side::Low, PAGES),
        driver,
        queues,
        event_idx: false,
        resets: 0,
    };
    let mut input = Input::new(data);
    if input.byte() & 0xf != 0 {
        guest.start(&mut input);
    }
    let mut steps = 0;
    while !input.is_empty() && steps < 200 {
        steps += 1;
        guest.step(&mut input);
    }
    guest.recover();
}

impl Guest {
    fn virtio(&self) -> &VirtioFunction {
        &self.driver.virtio
    }

    /// As a driver starts the device, with a choice of features, and without looking whether it
    /// works.
    fn start(&mut self, input: &mut Input<'_>) {
        let always = features::VERSION_1 | features::MAC | features::STATUS;
        let some = input.u64();
        let chosen = match input.byte() % 4 {
            0 => always | some,
            1 => always | features::CTRL_VQ | features::MQ | features::MRG_RXBUF,
            _ => self.virtio().offered() & !(some & some.rotate_left(17)),
        };
        self.event_idx = chosen & features::EVENT_IDX != 0;
        let virtio = self.virtio();
        let set = |value: u8| virtio.common.write(common::DEVICE_STATUS, value);
        set(0);
        set(status::ACKNOWLEDGE | status::DRIVER);
        virtio.accept(chosen);
        set(status::ACKNOWLEDGE | status::DRIVER | status::FEATURES_OK);
        virtio.common.write(common::CONFIG_MSIX_VECTOR, 0u16);
        let skip = input.byte();
        for queue in &mut self.queues {
            queue.restart();
            if skip >> 4 != queue.index.to_le_bytes()[0] {
                self.driver.virtio.enable_queue(queue, None);
                let vector = queue.index + 1;
                let common = &self.driver.virtio.common;
                common.write(common::QUEUE_MSIX_VECTOR, vector);
            }
        }
        self.virtio().add_status(status::DRIVER_OK);
    }

    /// An address for a descriptor: mostly good.
    fn address(&self, input: &mut Input<'_>) -> u64 {
        let page = self.pages.at(u64::from(input.byte()) % PAGES * PAGE_SIZE).0;
        let offset = u64::from(input.u16());
        let queue = &self.queues[usize::from(input.byte()) % self.queues.len()];
        match input.byte() % 16 {
            0..8 => page,
            8..11 => page + (offset & 0xfff),
            11 => queue.addresses()[usize::from(input.byte() % 3)] + (offset & 0xff),
            12 => layout::LOW_RAM.end - (offset & 0xff),
            13 => self.virtio().common.bar.address.0 + offset,
            14 => layout::HIGH_RAM.end - PAGE_SIZE + offset,
            _ => input.u64(),
        }
    }

    fn step(&mut self, input: &mut Input<'_>) {
        let queue = usize::from(input.byte()) % self.queues.len();
        match input.byte() % 16 {
            0..3 => self.chain(input, queue),
            3 => {
                let (address, len) = (self.address(input), length(input));
                let (index, next) = (u16::from(input.byte()) % SIZE, u16::from(input.byte()));
                let flags = u16::from(input.byte() % 8);
                self.queues[queue].set_desc(index, address, len, flags, next);
            }
            4 => {
                let head = u16::from(input.byte() % 20);
                self.queues[queue].push_avail(head);
            }
            5 => {
                let index = if input.one_in(4) {
                    input.u16()
                } else {
                    let step = u16::from(input.byte() % 20);
                    self.queues[queue].avail_idx().wrapping_add(step)
                };
                self.queues[queue].set_avail_idx(index);
            }
            6 | 7 => self.queues[queue].notify(),
            8 => {
                let event = input.u16();
                if self.event_idx {
                    self.queues[queue].set_used_event(event);
                } else {
                    self.queues[queue].set_avail_flags(event);
                }
            }
            9 => {
                let register = u64::from(input.byte() % 64);
                let value = if input.byte() & 1 == 0 {
                    input.u64()
                } else {
                    u64::from(input.byte())
                };
                let len = usize::from(input.pick(&[2u8, 1, 4, 8]));
                let virtio = self.virtio();
                let place = virtio.common.bar.address.0 + virtio.common.offset + register;
                let data = value.to_le_bytes();
                self.driver.machine.store(Gpa(place), &data[..len]);
            }
            // A header and some of a frame, or a table of descriptors, or a command.
            10 | 11 => {
                let at = u64::from(input.byte()) % PAGES * PAGE_SIZE;
                let bytes = input.bytes::<40>();
                self.pages.set_bytes(at, &bytes);
                if input.byte() & 1 == 0 {
                    let (address, len) = (self.address(input), length(input));
                    self.pages.write(at, address);
                    self.pages.write(at + 8, len);
                    self.pages.write(at + 12, u32::from(input.byte() % 8));
                }
            }
            12 => self.command(input),
            13 => {
                let (offset, value) = (u32::from(input.u16()), input.u32());
                let len = input.pick(&[4, 1, 2, 0, 3, u32::MAX]);
                let bar = input.pick(&[self.virtio().common.bar.index, 0, 5, 0xff]);
                if input.byte() & 1 == 0 {
                    self.virtio().window_write(bar, offset, len, value);
                } else {
                    self.virtio().window_read(bar, offset, len);
                }
            }
            14 => self.bus(input),
            _ if input.byte() & 3 == 0 => self.start(input),
            _ => {
                let mut data = [0; 8];
                let bar = &self.virtio().common.bar;
                let place = bar.address.0 + u64::from(input.u16()) % bar.size;
                let len = usize::from(input.pick(&[1u8, 2, 4, 8]));
                self.driver.machine.load(Gpa(place), &mut data[..len]);
            }
        }
    }

    /// A chain that is mostly right, made available and announced.
    fn chain(&mut self, input: &mut Input<'_>, queue: usize) {
        // Receive queues are even ones but the last, the control queue.
        let receive = queue.is_multiple_of(2) && queue + 1 < self.queues.len();
        let count = u16::from(input.byte() % 5) + 1;
        let first = u16::from(input.byte()) % SIZE;
        for part in 0..count {
            let (address, len) = (self.address(input), length(input));
            let odd = input.one_in(32);
            let write = if receive != odd { 2 } else { 0 };
            let next = if part + 1 < count { 1 } else { 0 };
            let indirect = if input.one_in(16) { 4 } else { 0 };
            let index = (first + part) % SIZE;
            let flags = write | next | indirect;
            self.queues[queue].set_desc(index, address, len, flags, (index + 1) % SIZE);
        }
        self.queues[queue].push_avail(first);
        if input.byte() & 3 != 0 {
            self.queues[queue].notify();
        }
    }

    /// A control command: class, command and data in one buffer, room for the answer in another.
    fn command(&mut self, input: &mut Input<'_>) {
        let page = u64::from(input.byte()) % PAGES * PAGE_SIZE;
        let class = input.byte() % 8;
        let command = input.byte() % 8;
        let mut bytes = vec![class, command];
        bytes.extend(input.bytes::<16>());
        self.pages.set_bytes(page, &bytes);
        let len = u32::from(input.byte() % 24) + 1;
        let answer = u32::from(input.byte() % 3);
        let index = u16::from(input.byte()) % SIZE;
        let queue = self.queues.last_mut().expect("a control queue");
        let next = (index + 1) % SIZE;
        queue.set_desc(index, self.pages.at(page).0, len, 1, next);
        queue.set_desc(next, self.pages.at(page + 0x800).0, answer, 2, 0);
        queue.push_avail(index);
        queue.notify();
    }

    /// What the PCI driver does behind the virtio driver's back.
    fn bus(&mut self, input: &mut Input<'_>) {
        let function = &self.virtio().function;
        match input.byte() % 6 {
            0 => function.set_bus_master(false),
            1 | 2 => function.set_bus_master(true),
            3 => function.set_msix(true, input.byte() & 1 != 0),
            4 => {
                let state = if input.byte() & 1 == 0 { 3u16 } else { 0 };
                let power = function.capability(spec::capability::POWER_MANAGEMENT);
                let register = power.expect("power management") + spec::power::CONTROL;
                function.set_config(register, state);
            }
            _ if self.resets < 4 => {
                self.resets += 1;
                self.reset();
            }
            _ => {}
        }
    }

    fn reset(&mut self) {
        let mut function = self.virtio().function.clone();
        function.reset();
        function.place_bars();
        function.set_command(spec::command::MEMORY | spec::command::BUS_MASTER);
        self.driver.virtio = VirtioFunction::new(function);
        self.driver.virtio.setup_msix(2 * PAIRS + 2);
        let queues = 0..u16::try_from(self.queues.len()).expect("few");
        self.queues = queues
            .map(|index| self.driver.virtio.make_queue(index, SIZE, false))
            .collect();
    }

    /// After a reset, a packet goes around.
    fn recover(&mut self) {
        self.reset();
        self.driver.begin(NetSetup {
            features: features::MAC,
            pairs: 1,
            size: SIZE,
        });
        let frame = frame(NetDriver::MAC, 60, 0x77);
        self.driver.send(0, &[plain(&frame)]);
        // Packets from before the reset may still be on the wire.
        loop {
            self.driver.post(0, 1, 2048);
            if self.driver.receive[0].wait().ends_with(&frame) {
                break;
            }
        }
    }
}

/// A buffer's length: small, around a packet's, anything.
fn length(input: &mut Input<'_>) -> u32 {
    match input.byte() % 8 {
        0 => input.u32(),
        1 => u32::from(input.byte() % 16),
        2 => 12,
        3 => u32::from(input.u16()),
        4 | 5 => 2048,
        _ => u32::from(input.byte()) + 12,
    }
}

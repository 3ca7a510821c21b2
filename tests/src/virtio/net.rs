//! A network driver (Virtio 1.2, 5.1).

use std::sync::Arc;

use devices::net::NetBackend;
use devices::virtio::VirtioPci;
use devices::virtio::net::{Config, VirtioNet};
use iommu::Bdf;

use super::eventually;
use super::function::{VirtioFunction, status};
use super::queue::{GuestQueue, Part};
use crate::{DmaBuffer, GuestVector, Machine, Side, TIMEOUT};

/// Feature bits (5.1.3 and 6), as masks.
pub mod features {
    #![expect(missing_docs, reason = "the names are the specification's")]

    pub const CSUM: u64 = 1 << 0;
    pub const GUEST_CSUM: u64 = 1 << 1;
    pub const CTRL_GUEST_OFFLOADS: u64 = 1 << 2;
    pub const MTU: u64 = 1 << 3;
    pub const MAC: u64 = 1 << 5;
    pub const GUEST_TSO4: u64 = 1 << 7;
    pub const GUEST_TSO6: u64 = 1 << 8;
    pub const GUEST_ECN: u64 = 1 << 9;
    pub const HOST_TSO4: u64 = 1 << 11;
    pub const HOST_TSO6: u64 = 1 << 12;
    pub const HOST_ECN: u64 = 1 << 13;
    pub const MRG_RXBUF: u64 = 1 << 15;
    pub const STATUS: u64 = 1 << 16;
    pub const CTRL_VQ: u64 = 1 << 17;
    pub const CTRL_RX: u64 = 1 << 18;
    pub const CTRL_VLAN: u64 = 1 << 19;
    pub const CTRL_RX_EXTRA: u64 = 1 << 20;
    pub const MQ: u64 = 1 << 22;
    pub const CTRL_MAC_ADDR: u64 = 1 << 23;
    pub const INDIRECT: u64 = 1 << 28;
    pub const EVENT_IDX: u64 = 1 << 29;
    pub const VERSION_1: u64 = 1 << 32;
    pub const ACCESS_PLATFORM: u64 = 1 << 33;
    pub const RING_RESET: u64 = 1 << 40;
    pub const NOTF_COAL: u64 = 1 << 53;
    pub const HOST_USO: u64 = 1 << 56;
    pub const SPEED_DUPLEX: u64 = 1 << 63;
}

/// Length of a packet's header.
pub const HEADER: usize = 12;

/// An Ethernet frame of `len` bytes from 02:..:99, filled with `seed`.
pub fn frame(destination: [u8; 6], len: usize, seed: u8) -> Vec<u8> {
    let mut frame = destination.to_vec();
    frame.extend([2, 0, 0, 0, 0, 0x99, 0x88, 0xb5]);
    frame.resize(len, seed);
    frame
}

/// What the driver wants.
#[derive(Clone, Copy, Debug)]
pub struct NetSetup {
    /// Features besides `VERSION_1`.
    pub features: u64,
    /// Pairs whose queues it enables.
    pub pairs: u16,
    /// Entries of each data queue; 0: as large as it may be.
    pub size: u16,
}

/// One data queue with its buffers: each descriptor head has one of its own.
pub struct DataQueue {
    /// The queue.
    pub queue: GuestQueue,
    /// Buffers of [`NetDriver::BUFFER`] bytes, one for each entry.
    pub buffers: DmaBuffer,
    /// Buffers given out so far; the next one is this modulo the size.
    next: u64,
    /// Which buffer each head has.
    owner: Vec<u64>,
}

impl DataQueue {
    fn new(machine: &Arc<Machine>, queue: GuestQueue) -> DataQueue {
        let entries = u64::from(queue.size());
        DataQueue {
            buffers: machine.dma(
                Side::High,
                (entries * NetDriver::BUFFER).div_ceil(crate::PAGE_SIZE),
            ),
            next: 0,
            owner: vec![0; usize::from(queue.size())],
            queue,
        }
    }

    /// Address of the next buffer and its place in `buffers`.
    fn buffer(&mut self) -> (u64, u64) {
        let entries = u64::from(self.queue.size());
        let at = self.next % entries * NetDriver::BUFFER;
        self.next += 1;
        (self.buffers.at(at).0, at)
    }

    /// Posts a receive buffer of `len` bytes.
    pub fn post(&mut self, len: u32) {
        let (addr, at) = self.buffer();
        let head = self.queue.add(&[Part::writable(addr, len)]);
        self.owner[usize::from(head)] = at;
    }

    /// Puts a packet into the next buffer and makes it available.
    pub fn send(&mut self, packet: &[u8]) {
        let (addr, at) = self.buffer();
        self.buffers.set_bytes(at, packet);
        let len = u32::try_from(packet.len()).expect("a short packet");
        let head = self.queue.add(&[Part::readable(addr, len)]);
        self.owner[usize::from(head)] = at;
    }

    /// Takes the next used receive buffer: what the device wrote into it.
    pub fn take(&mut self) -> Option<Vec<u8>> {
        let (head, len) = self.queue.take_used()?;
        let len = usize::try_from(len).expect("length");
        Some(self.buffers.bytes(self.owner[usize::from(head)], len))
    }

    /// Waits for the next used receive buffer.
    pub fn wait(&mut self) -> Vec<u8> {
        eventually("a received packet", || self.queue.used_count() > 0);
        self.take().expect("counted")
    }
}

/// A driver with its device.
pub struct NetDriver {
    /// The machine.
    pub machine: Arc<Machine>,
    /// The device, for what the host may do.
    pub device: Arc<VirtioNet>,
    /// The transport.
    pub virtio: VirtioFunction,
    /// Receive queues.
    pub receive: Vec<DataQueue>,
    /// Transmit queues.
    pub transmit: Vec<DataQueue>,
    /// The control queue.
    pub control: Option<GuestQueue>,
    command: DmaBuffer,
}

impl NetDriver {
    /// The device's address.
    pub const MAC: [u8; 6] = [2, 0, 0, 0, 0, 1];
    /// Size of each packet buffer.
    pub const BUFFER: u64 = 2048;

    /// A machine with a network device on `backend`, found but not touched.
    pub fn found(
        backend: Arc<dyn NetBackend>,
        pairs: u16,
        adjust: impl FnOnce(&mut Config),
    ) -> NetDriver {
        NetDriver::found_on(Machine::new(), backend, pairs, adjust)
    }

    /// The same on a given machine, in slot 3.
    pub fn found_on(
        machine: Arc<Machine>,
        backend: Arc<dyn NetBackend>,
        pairs: u16,
        adjust: impl FnOnce(&mut Config),
    ) -> NetDriver {
        let mut config = Config::new(NetDriver::MAC, backend);
        config.pairs = pairs;
        adjust(&mut config);
        let device = VirtioNet::new(config).expect("configuration");
        let bdf = Bdf::new(0, 3, 0).expect("slot");
        let (endpoint, function) =
            VirtioPci::new("net0", Arc::clone(&device) as _, bdf, machine.upstream())
                .expect("function");
        machine.attach(endpoint, function);
        let mut virtio = VirtioFunction::probe(&machine, 3);
        virtio.setup_msix(2 * pairs + 2);
        NetDriver {
            command: machine.dma(Side::Low, 17),
            machine,
            device,
            virtio,
            receive: Vec::new(),
            transmit: Vec::new(),
            control: None,
        }
    }

    /// The same, negotiated and running.
    pub fn start(backend: Arc<dyn NetBackend>, pairs: u16, setup: NetSetup) -> NetDriver {
        let mut driver = NetDriver::found(backend, pairs, |_| ());
        driver.begin(setup);
        driver
    }

    /// Negotiates and sets up queues, with vector 0 for the configuration and 1 + i for queue i.
    pub fn begin(&mut self, setup: NetSetup) {
        self.prepare(setup);
        self.virtio.driver_ok();
        let running =
            status::ACKNOWLEDGE | status::DRIVER | status::FEATURES_OK | status::DRIVER_OK;
        assert_eq!(self.virtio.status(), running);
    }

    /// All of [`NetDriver::begin`] but `DRIVER_OK`.
    pub fn prepare(&mut self, setup: NetSetup) {
        use super::function::common;
        let wanted = setup.features | features::VERSION_1;
        assert!(self.virtio.negotiate(wanted), "features {wanted:#x}");
        let event_idx = wanted & features::EVENT_IDX != 0;
        self.virtio.common.write(common::CONFIG_MSIX_VECTOR, 0u16);
        self.receive.clear();
        self.transmit.clear();
        for index in 0..2 * setup.pairs {
            let queue = self.virtio.make_queue(index, setup.size, event_idx);
            self.virtio.enable_queue(&queue, Some(index + 1));
            let queue = DataQueue::new(&self.machine, queue);
            if index.is_multiple_of(2) {
                self.receive.push(queue);
            } else {
                self.transmit.push(queue);
            }
        }
        self.control = None;
        if wanted & features::CTRL_VQ != 0 {
            let queues: u16 = self.virtio.common.read(common::NUM_QUEUES);
            let index = if wanted & features::MQ != 0 {
                queues - 1
            } else {
                2
            };
            let queue = self.virtio.make_queue(index, 0, event_idx);
            self.virtio.enable_queue(&queue, Some(index + 1));
            self.control = Some(queue);
        }
    }

    /// The vector of a queue.
    pub fn vector(&self, queue: u16) -> &GuestVector {
        &self.virtio.vectors[usize::from(queue) + 1]
    }

    /// Sends a control command and waits for the answer; returns whether it is OK.
    pub fn command(&mut self, class: u8, command: u8, data: &[u8]) -> bool {
        const OK: u8 = 0;
        let mut bytes = vec![class, command];
        bytes.extend(data);
        let answer = self.command.len() - 8;
        self.command.set_bytes(0, &bytes);
        self.command.write(answer, 0xffu8);
        let len = u32::try_from(data.len()).expect("a short command");
        let mut parts = vec![Part::readable(self.command.at(0).0, 2)];
        if len > 0 {
            parts.push(Part::readable(self.command.at(2).0, len));
        }
        parts.push(Part::writable(self.command.at(answer).0, 1));
        let queue = self.control.as_mut().expect("a control queue");
        queue.add(&parts);
        queue.kick();
        assert_eq!(queue.wait_used().1, 1, "one byte is written");
        let answer: u8 = self.command.read(answer);
        assert!(answer <= 1, "answer {answer}");
        answer == OK
    }

    /// Posts `count` receive buffers of `len` bytes on a pair and tells the device.
    pub fn post(&mut self, pair: usize, count: usize, len: u32) {
        let side = &mut self.receive[pair];
        for _ in 0..count {
            side.post(len);
        }
        side.queue.kick();
    }

    /// Sends packets on a pair, with one notification at most.
    pub fn send(&mut self, pair: usize, packets: &[Vec<u8>]) {
        let side = &mut self.transmit[pair];
        for packet in packets {
            side.send(packet);
        }
        side.queue.kick();
    }

    /// Waits until the device says that it needs a reset and has interrupted for it.
    pub fn wait_needs_reset(&self) {
        assert!(self.virtio.vectors[0].wait(TIMEOUT) > 0, "no interrupt");
        assert_ne!(self.virtio.status() & status::NEEDS_RESET, 0);
    }
}

/// A packet: an empty header and a frame.
pub fn plain(frame: &[u8]) -> Vec<u8> {
    let mut packet = vec![0; HEADER];
    packet.extend(frame);
    packet
}

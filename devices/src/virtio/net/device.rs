//! The device: what it offers, its configuration, its life.

use std::fmt;
use std::io;
use std::sync::atomic::{AtomicBool, AtomicU16, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, OnceLock, PoisonError};

use pci::ClassCode;

use super::control::Control;
use super::filter::{Filter, Mac};
use super::pair::Pair;
use super::receive::Receive;
use super::spec::{self, config as layout, feature};
use super::stats::{NetStats, PairStats, QueueCounters};
use super::transmit::Transmit;
use crate::net::{NetBackend, NetQueue, Offloads};
use crate::virtio::spec::device_id;
use crate::virtio::{Activation, DmaTask, Transport, VirtioDevice, Virtqueue};
use crate::worker::{Coalesce, Kick, PollPolicy, Worker, WorkerOptions};
use iommu::Counter;

/// Entries of the control queue.
const CONTROL_QUEUE_SIZE: u16 = 64;
/// Largest data queue: one packet's buffers go to the host in one call of at most 1024 iovecs.
const MAX_QUEUE_SIZE: u16 = 1024;

/// What a network device is made from.
pub struct Config {
    /// Address that the driver takes if it likes; not multicast.
    pub mac: Mac,
    /// Queue pairs, 1 to 16 and no more than the back end has.
    pub pairs: u16,
    /// MTU that the driver must not exceed, 68 to 65535; `None`: the device does not say.
    pub mtu: Option<u16>,
    /// Entries of each data queue: a power of two, 2 to 1024.
    pub queue_size: u16,
    /// Speed that the device reports, in Mbit/s; `None`: unknown.
    pub speed: Option<u32>,
    /// Where packets come from and go to.
    pub backend: Arc<dyn NetBackend>,
    /// How each pair's worker runs.
    pub workers: WorkerOptions,
}

impl Config {
    /// One pair of 256 entries, no MTU and no speed.
    pub fn new(mac: Mac, backend: Arc<dyn NetBackend>) -> Config {
        Config {
            mac,
            pairs: 1,
            mtu: None,
            queue_size: 256,
            speed: None,
            backend,
            workers: WorkerOptions::default(),
        }
    }
}

/// What is wrong with a [`Config`].
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum ConfigError {
    /// The address is a multicast address or zero.
    #[error("the MAC address must be a unicast address")]
    Mac,
    /// Too few or too many pairs.
    #[error("{asked} queue pairs; from 1 to {max} are possible here")]
    Pairs {
        /// What was asked for.
        asked: u16,
        /// What the device and the back end can do.
        max: u16,
    },
    /// Less than IPv4 demands.
    #[error("MTU {0}; it must be at least 68")]
    Mtu(u16),
    /// No power of two, too small or too large.
    #[error("queue size {0}; it must be a power of two from 2 to 1024")]
    QueueSize(u16),
}

/// What the device, its control queue and its observers share.
pub(super) struct Core {
    pub(super) backend: Arc<dyn NetBackend>,
    pub(super) commands: Counter,
    transport: OnceLock<Arc<Transport>>,
    mac: Mutex<Mac>,
    link_up: Arc<AtomicBool>,
    active_pairs: AtomicU16,
    offloads: AtomicU64,
}

impl Core {
    /// Pairs that packets may arrive on.
    pub(super) fn active_pairs(&self) -> u16 {
        self.active_pairs.load(Ordering::Relaxed)
    }

    pub(super) fn set_active_pairs(&self, pairs: u16) {
        self.active_pairs.store(pairs, Ordering::Relaxed);
    }

    /// Tells the back end which receive offloads (`GUEST_*` features) the driver takes.
    pub(super) fn set_offloads(&self, offloads: u64) -> io::Result<()> {
        let has = |features| offloads & features == features;
        self.backend.set_receive_offloads(Offloads {
            checksum: has(feature::GUEST_CSUM),
            tso4: has(feature::GUEST_TSO4),
            tso6: has(feature::GUEST_TSO6),
            ecn: has(feature::GUEST_ECN),
            uso: has(feature::GUEST_USO4 | feature::GUEST_USO6),
        })?;
        self.offloads.store(offloads, Ordering::Relaxed);
        Ok(())
    }

    /// Changes the address that the configuration shows.
    pub(super) fn set_mac(&self, mac: Mac) {
        self.change_config(|| *self.mac() = mac);
    }

    /// Logs something that the guest can cause; rate limited.
    pub(super) fn warn(&self, message: &dyn fmt::Display) {
        if let Some(transport) = self.transport.get() {
            transport.warn(None, message);
        }
    }

    fn mac(&self) -> MutexGuard<'_, Mac> {
        self.mac.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn change_config(&self, change: impl FnOnce()) {
        match self.transport.get() {
            Some(transport) => transport.change_config(change),
            None => change(),
        }
    }
}

/// Counters of one pair.
#[derive(Clone, Default)]
struct PairCounters {
    receive: Arc<QueueCounters>,
    transmit: Arc<QueueCounters>,
}

/// An active device.
struct Running {
    features: u64,
    control_index: u16,
    control: Option<Worker<Control>>,
    pairs: Arc<Vec<Option<Worker<Pair>>>>,
}

/// What outlives activations.
struct State {
    running: Option<Running>,
    /// The back end's queues while no worker has them; opened at first use.
    parked: Vec<Option<Box<dyn NetQueue>>>,
    workers: WorkerOptions,
}

/// A virtio network device.
pub struct VirtioNet {
    core: Arc<Core>,
    pairs: u16,
    mtu: Option<u16>,
    queue_size: u16,
    speed: Option<u32>,
    mac: Mac,
    counters: Vec<PairCounters>,
    state: Mutex<State>,
}

impl VirtioNet {
    /// Makes a device; its link is up.
    ///
    /// # Errors
    ///
    /// The configuration is not possible.
    pub fn new(config: Config) -> Result<Arc<VirtioNet>, ConfigError> {
        if config.mac[0] & 1 != 0 || config.mac == [0; 6] {
            return Err(ConfigError::Mac);
        }
        let max = config.backend.max_pairs().min(spec::MAX_PAIRS);
        if config.pairs == 0 || config.pairs > max {
            return Err(ConfigError::Pairs {
                asked: config.pairs,
                max,
            });
        }
        if let Some(mtu) = config.mtu.filter(|&mtu| mtu < spec::MIN_MTU) {
            return Err(ConfigError::Mtu(mtu));
        }
        let size = config.queue_size;
        if !size.is_power_of_two() || !(2..=MAX_QUEUE_SIZE).contains(&size) {
            return Err(ConfigError::QueueSize(size));
        }
        let pairs = usize::from(config.pairs);
        Ok(Arc::new(VirtioNet {
            core: Arc::new(Core {
                backend: config.backend,
                commands: Counter::default(),
                transport: OnceLock::new(),
                mac: Mutex::new(config.mac),
                link_up: Arc::new(AtomicBool::new(true)),
                active_pairs: AtomicU16::new(1),
                offloads: AtomicU64::new(0),
            }),
            pairs: config.pairs,
            mtu: config.mtu,
            queue_size: size,
            speed: config.speed,
            mac: config.mac,
            counters: vec![PairCounters::default(); pairs]
                .into_iter()
                .map(|_| PairCounters::default())
                .collect(),
            state: Mutex::new(State {
                running: None,
                parked: (0..pairs).map(|_| None).collect(),
                workers: config.workers,
            }),
        }))
    }

    /// Plugs the cable in or out. Without a link no packet is received, and those that the driver
    /// sends are dropped; the driver is told.
    pub fn set_link(&self, up: bool) {
        self.core
            .change_config(|| self.core.link_up.store(up, Ordering::Release));
        if let Some(running) = &self.state().running {
            for worker in running.pairs.iter().flatten() {
                worker.kick();
            }
        }
    }

    /// What the device has done so far.
    pub fn stats(&self) -> NetStats {
        let state = self.state();
        let workers = state.running.as_ref().map(|running| &running.pairs);
        let pairs = self.counters.iter().enumerate().map(|(index, counters)| {
            let stats = PairStats {
                receive: counters.receive.snapshot(),
                transmit: counters.transmit.snapshot(),
                ..PairStats::default()
            };
            match workers.and_then(|pairs| pairs.get(index)?.as_ref()) {
                Some(worker) => stats.with_worker(worker.stats()),
                None => stats,
            }
        });
        NetStats {
            active_pairs: self.core.active_pairs(),
            link_up: self.core.link_up.load(Ordering::Acquire),
            pairs: pairs.collect(),
            backend_drops: self.core.backend.drops(),
            commands: self.core.commands.get(),
            faults: self.core.transport.get().map_or(0, |t| t.faults()),
        }
    }

    /// Changes how the pairs' workers wait for work, now and after later resets.
    pub fn set_policy(&self, policy: PollPolicy) {
        let mut state = self.state();
        state.workers.policy = policy;
        if let Some(running) = &state.running {
            for worker in running.pairs.iter().flatten() {
                worker.set_policy(policy);
            }
        }
    }

    /// Changes the interrupt moderation of all pairs' [`super::RECEIVE`] or [`super::TRANSMIT`], now
    /// and after later resets. Another `source` is ignored.
    pub fn set_coalesce(&self, source: usize, coalesce: Coalesce) {
        let mut state = self.state();
        if let Some(slot) = state.workers.coalesce.get_mut(source) {
            *slot = coalesce;
        }
        if let Some(running) = &state.running {
            for worker in running.pairs.iter().flatten() {
                worker.set_coalesce(source, coalesce);
            }
        }
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The whole configuration structure.
    fn config(&self) -> [u8; layout::LEN] {
        let mut bytes = [0; layout::LEN];
        bytes[layout::MAC..layout::MAC + 6].copy_from_slice(&*self.core.mac());
        let link = self.core.link_up.load(Ordering::Acquire);
        let status = if link { layout::S_LINK_UP } else { 0 };
        bytes[layout::STATUS..layout::STATUS + 2].copy_from_slice(&status.to_le_bytes());
        bytes[layout::MAX_PAIRS..layout::MAX_PAIRS + 2].copy_from_slice(&self.pairs.to_le_bytes());
        let mtu = self.mtu.unwrap_or(0);
        bytes[layout::MTU..layout::MTU + 2].copy_from_slice(&mtu.to_le_bytes());
        let speed = self.speed.unwrap_or(layout::SPEED_UNKNOWN);
        bytes[layout::SPEED..layout::SPEED + 4].copy_from_slice(&speed.to_le_bytes());
        bytes[layout::DUPLEX] = if self.speed.is_some() {
            layout::DUPLEX_FULL
        } else {
            layout::DUPLEX_UNKNOWN
        };
        bytes
    }

    /// Index of the control queue (5.1.2): behind all pairs, or without MQ behind the first.
    fn control_index(&self, features: u64) -> u16 {
        if features & feature::MQ != 0 {
            2 * self.pairs
        } else {
            2
        }
    }

    fn receive(&self, queue: Virtqueue, features: u64, filter: Filter) -> Receive {
        let counters = self.counters.get(usize::from(queue.index / 2));
        let counters = counters.map_or_else(Arc::default, |pair| Arc::clone(&pair.receive));
        let active = queue.index / 2 < self.core.active_pairs();
        let mtu = usize::from(self.mtu.unwrap_or(0));
        let frame = spec::ORDINARY_FRAME.max(mtu + spec::ETHERNET + 4);
        let mut receive = Receive::new(queue, counters, features, frame, filter);
        receive.set_active(active);
        receive.set_offloads(self.core.offloads.load(Ordering::Relaxed));
        receive
    }

    fn transmit(&self, queue: Virtqueue, features: u64) -> Transmit {
        let counters = self.counters.get(usize::from(queue.index / 2));
        let counters = counters.map_or_else(Arc::default, |pair| Arc::clone(&pair.transmit));
        Transmit::new(queue, counters, features)
    }

    /// Starts the workers; on an error `state.running` holds those that were started.
    fn start(&self, state: &mut State, activation: Activation) -> io::Result<()> {
        let Activation {
            features,
            mut queues,
            dma,
        } = activation;
        let Some(transport) = self.core.transport.get() else {
            return Err(io::Error::other("the device has no transport"));
        };
        self.core.set_offloads(features & feature::GUEST_OFFLOADS)?;
        self.core.set_active_pairs(1);
        let filter = Filter::new(self.mac, features & feature::CTRL_VLAN != 0);
        let control_index = self.control_index(features);
        let mut take = |index: u16| queues.get_mut(usize::from(index)).and_then(Option::take);
        let control = if features & feature::CTRL_VQ != 0 {
            take(control_index)
        } else {
            None
        };
        let mut pairs = Vec::new();
        let mut started = Ok(());
        let count = if features & feature::MQ != 0 {
            self.pairs
        } else {
            1
        };
        for index in 0..count {
            let sides = (take(2 * index), take(2 * index + 1));
            if sides.0.is_none() && sides.1.is_none() {
                pairs.push(None);
                continue;
            }
            let worker = (|| {
                let dma = DmaTask::new(dma.view(), transport);
                let backend = self.take_backend(state, index)?;
                let mut pair = Pair::new(dma, backend, Arc::clone(&self.core.link_up));
                pair.receive = sides
                    .0
                    .map(|queue| self.receive(queue, features, filter.clone()));
                pair.transmit = sides.1.map(|queue| self.transmit(queue, features));
                let name = format!("{}-q{index}", transport.name());
                Worker::spawn(&name, &Kick::new()?, pair, state.workers.clone())
            })();
            match worker {
                Ok(worker) => pairs.push(Some(worker)),
                Err(error) => {
                    started = Err(error);
                    break;
                }
            }
        }
        let pairs = Arc::new(pairs);
        if started.is_ok() {
            started = self.core.backend.set_active_pairs(1);
        }
        let control = match (control, &started) {
            (Some(queue), Ok(())) => {
                let dma = DmaTask::new(dma.view(), transport);
                let core = Arc::clone(&self.core);
                let control = Control::new(dma, queue, core, Arc::clone(&pairs), features, filter);
                let name = format!("{}-ctrl", transport.name());
                Kick::new()
                    .and_then(|kick| Worker::spawn(&name, &kick, control, WorkerOptions::default()))
                    .map(Some)
            }
            _ => Ok(None),
        };
        let (control, failed) = match control {
            Ok(control) => (control, None),
            Err(error) => (None, Some(error)),
        };
        state.running = Some(Running {
            features,
            control_index,
            control,
            pairs,
        });
        failed.map_or(started, Err)
    }

    fn take_backend(&self, state: &mut State, index: u16) -> io::Result<Box<dyn NetQueue>> {
        let parked = state.parked.get_mut(usize::from(index));
        match parked.and_then(Option::take) {
            Some(queue) => Ok(queue),
            None => Arc::clone(&self.core.backend).open_queue(index),
        }
    }

    fn stop(state: &mut State) {
        let Some(running) = state.running.take() else {
            return;
        };
        // First, because it waits for the others; its task holds the other handle of the pairs.
        drop(running.control.map(Worker::stop));
        let Some(pairs) = Arc::into_inner(running.pairs) else {
            return;
        };
        for (worker, parked) in pairs.into_iter().zip(&mut state.parked) {
            if let Some(worker) = worker {
                *parked = Some(worker.stop().into_backend());
            }
        }
    }
}

impl VirtioDevice for VirtioNet {
    fn device_type(&self) -> u16 {
        device_id::NET
    }

    /// Ethernet controller (PCI Code and ID Assignment 1.11, 1.3).
    fn class(&self) -> ClassCode {
        ClassCode {
            base: 2,
            sub: 0,
            interface: 0,
        }
    }

    fn features(&self) -> u64 {
        let mut features = feature::MAC
            | feature::MRG_RXBUF
            | feature::STATUS
            | feature::CTRL_VQ
            | feature::CTRL_RX
            | feature::CTRL_RX_EXTRA
            | feature::CTRL_VLAN
            | feature::CTRL_MAC_ADDR
            | feature::NOTF_COAL
            | feature::SPEED_DUPLEX;
        let transmit = self.core.backend.transmit_offloads();
        let receive = self.core.backend.receive_offloads();
        let mut offer = |on: bool, mask: u64| {
            if on {
                features |= mask;
            }
        };
        offer(self.pairs > 1, feature::MQ);
        offer(self.mtu.is_some(), feature::MTU);
        // Segmentation rests on checksums, and ECN on segmentation (5.1.3.1).
        if transmit.checksum {
            offer(true, feature::CSUM);
            offer(transmit.tso4, feature::HOST_TSO4);
            offer(transmit.tso6, feature::HOST_TSO6);
            let tso = transmit.tso4 || transmit.tso6;
            offer(transmit.ecn && tso, feature::HOST_ECN);
            offer(transmit.uso, feature::HOST_USO);
        }
        if receive.checksum {
            offer(true, feature::GUEST_CSUM | feature::CTRL_GUEST_OFFLOADS);
            offer(receive.tso4, feature::GUEST_TSO4);
            offer(receive.tso6, feature::GUEST_TSO6);
            let tso = receive.tso4 || receive.tso6;
            offer(receive.ecn && tso, feature::GUEST_ECN);
            offer(receive.uso, feature::GUEST_USO4 | feature::GUEST_USO6);
        }
        features
    }

    fn accepts(&self, features: u64) -> bool {
        spec::dependencies_met(features)
    }

    fn queue_sizes(&self) -> Vec<u16> {
        let mut sizes = vec![self.queue_size; usize::from(self.pairs) * 2];
        sizes.push(CONTROL_QUEUE_SIZE);
        sizes
    }

    fn queue_reset(&self) -> bool {
        true
    }

    fn config_len(&self) -> usize {
        layout::LEN
    }

    fn config_read(&self, offset: usize, data: &mut [u8]) {
        for (to, from) in data.iter_mut().zip(self.config().iter().skip(offset)) {
            *to = *from;
        }
    }

    fn attach(&self, transport: &Arc<Transport>) {
        // A second transport for one device is a mistake of the caller's; the first stays.
        let _ = self.core.transport.set(Arc::clone(transport));
    }

    fn activate(&self, activation: Activation) -> io::Result<()> {
        let mut state = self.state();
        let result = self.start(&mut state, activation);
        if result.is_err() {
            VirtioNet::stop(&mut state);
        }
        result
    }

    fn reset(&self) {
        VirtioNet::stop(&mut self.state());
        self.core.set_active_pairs(1);
        *self.core.mac() = self.mac;
    }

    fn stop_queue(&self, index: u16) {
        let state = self.state();
        let Some(running) = &state.running else {
            return;
        };
        if index == running.control_index {
            if let Some(control) = &running.control {
                control.with(Control::stop);
            }
        } else if let Some(Some(worker)) = running.pairs.get(usize::from(index / 2)) {
            worker.with(move |pair| {
                if index.is_multiple_of(2) {
                    pair.receive = None;
                } else {
                    pair.transmit = None;
                }
            });
        }
    }

    fn start_queue(&self, queue: Virtqueue) {
        let state = self.state();
        let Some(running) = &state.running else {
            return;
        };
        let index = queue.index;
        if index == running.control_index {
            if let Some(control) = &running.control {
                control.with(move |control| control.start(queue));
            }
            return;
        }
        let Some(Some(worker)) = running.pairs.get(usize::from(index / 2)) else {
            return;
        };
        if index.is_multiple_of(2) {
            let filter = match &running.control {
                Some(control) => control.with(|control| control.filter().clone()),
                None => Filter::new(self.mac, running.features & feature::CTRL_VLAN != 0),
            };
            let receive = self.receive(queue, running.features, filter);
            worker.with(move |pair| pair.receive = Some(receive));
        } else {
            let transmit = self.transmit(queue, running.features);
            worker.with(move |pair| pair.transmit = Some(transmit));
        }
    }
}

impl Drop for VirtioNet {
    fn drop(&mut self) {
        VirtioNet::stop(&mut self.state());
    }
}

//! The rings of the device.

use std::os::fd::RawFd;

use iommu::{Access, DmaMemory};

use super::mux::{Counters, Mux};
use super::spec::{HEADER_LEN, HEADER_SIZE, Header};
use crate::virtio::{
    Chain, DmaTask, RingError, SliceStorage, Virtqueue, copy_in, copy_out, resolve,
};
use crate::worker::{Polled, QueueTask};

/// Event source of the receive queue.
pub(super) const RECEIVE: usize = 0;
/// Event source of the transmit queue.
pub(super) const TRANSMIT: usize = 1;

/// What the device's one worker runs.
pub(super) struct Task {
    dma: DmaTask,
    engine: Engine,
    /// Whether the last poll could work; if not, sockets do not wake the worker.
    running: bool,
}

struct Engine {
    receive: Option<Virtqueue>,
    transmit: Option<Virtqueue>,
    mux: Mux,
    chain: Chain,
    storage: SliceStorage,
    counters: std::sync::Arc<Counters>,
}

impl Task {
    pub(super) fn new(
        dma: DmaTask,
        receive: Option<Virtqueue>,
        transmit: Option<Virtqueue>,
        mux: Mux,
        counters: std::sync::Arc<Counters>,
    ) -> Task {
        Task {
            dma,
            engine: Engine {
                receive,
                transmit,
                mux,
                chain: Chain::new(),
                storage: SliceStorage::default(),
                counters,
            },
            running: true,
        }
    }
}

#[cfg(test)]
impl Task {
    /// Connections that have something for the guest.
    pub(super) fn waiting(&self) -> usize {
        self.engine.mux.waiting()
    }
}

impl QueueTask for Task {
    /// Packets of the guest first, as they may need answers; half of the budget is theirs.
    fn poll(&mut self, budget: u32) -> Polled {
        let mut polled = Polled::default();
        let section = self.dma.enter();
        self.running = section.is_some();
        let Some(_section) = section else {
            return polled;
        };
        let mem = self.dma.mem();
        let engine = &mut self.engine;
        polled.work = engine.mux.collect();
        let mut taken = 0;
        let result = engine.take_packets(mem, budget.div_ceil(2), &mut taken);
        polled.work += taken;
        let given = if result.is_ok() {
            let mut given = 0;
            let share = budget.saturating_sub(taken).max(1);
            let result = engine.give_packets(mem, share, &mut given);
            report(&engine.receive, result);
            given
        } else {
            0
        };
        polled.work += given;
        report(&engine.transmit, result);
        polled.events[RECEIVE] = publish(&mut engine.receive, mem);
        polled.events[TRANSMIT] = publish(&mut engine.transmit, mem);
        polled
    }

    fn arm(&mut self) {
        let Some(_section) = self.dma.enter() else {
            return;
        };
        let mem = self.dma.mem();
        for queue in self.engine.queues() {
            if let Err(error) = queue.ring.enable_notify(mem) {
                queue.report(error);
            }
        }
    }

    fn has_work(&mut self) -> bool {
        let Some(_section) = self.dma.enter() else {
            return false;
        };
        if !self.running {
            return true;
        }
        let mem = self.dma.mem();
        // An error is found again, and reported, by the poll.
        let available = |queue: &Option<Virtqueue>| {
            let queue = queue.as_ref();
            queue.is_some_and(|queue| queue.ring.available(mem).unwrap_or(true))
        };
        let engine = &self.engine;
        (engine.mux.has_packets() && available(&engine.receive))
            || (engine.mux.takes_packets() && available(&engine.transmit))
    }

    fn disarm(&mut self) {
        // Always, or a device that may not work would spin on them.
        for queue in self.engine.queues() {
            queue.take_notifications();
        }
        let Some(_section) = self.dma.enter() else {
            return;
        };
        let mem = self.dma.mem();
        for queue in self.engine.queues() {
            if let Err(error) = queue.ring.disable_notify(mem) {
                queue.report(error);
            }
        }
    }

    fn interrupt(&mut self, source: usize) {
        let queue = match source {
            RECEIVE => &self.engine.receive,
            _ => &self.engine.transmit,
        };
        if let Some(queue) = queue {
            queue.interrupt();
        }
    }

    fn fds(&self, fds: &mut Vec<RawFd>) {
        let queues = [&self.engine.receive, &self.engine.transmit];
        fds.extend(queues.into_iter().flatten().map(Virtqueue::fd));
        if self.running {
            fds.push(self.engine.mux.fd());
        }
    }
}

impl Engine {
    fn queues(&mut self) -> impl Iterator<Item = &mut Virtqueue> {
        self.receive.iter_mut().chain(&mut self.transmit)
    }

    /// The guest's packets to the sockets.
    fn take_packets(
        &mut self,
        mem: &DmaMemory,
        budget: u32,
        work: &mut u32,
    ) -> Result<(), RingError> {
        let Some(queue) = &mut self.transmit else {
            return Ok(());
        };
        while *work < budget && self.mux.takes_packets() {
            if !queue.ring.pop_into(mem, &mut self.chain)? {
                break;
            }
            let mut slices = self.storage.take();
            let resolved = resolve(mem, self.chain.readable(), Access::Read, &mut slices);
            if let Err(error) = resolved {
                self.storage.put(slices);
                queue.ring.unpop();
                return Err(error);
            }
            let mut header = [0; HEADER_LEN];
            if copy_out(&slices, 0, &mut header) == HEADER_LEN {
                let len = self.chain.readable_len().saturating_sub(HEADER_SIZE.into());
                self.mux.take(&Header::from_bytes(&header), &slices, len);
            } else {
                Counters::add(&self.counters.malformed, 1);
                queue.warn(&"packet shorter than its header");
            }
            self.storage.put(slices);
            *work += 1;
            queue.ring.push_used(self.chain.head(), 0);
        }
        Ok(())
    }

    /// The sockets' data, and what else there is to say, to the guest.
    fn give_packets(
        &mut self,
        mem: &DmaMemory,
        budget: u32,
        work: &mut u32,
    ) -> Result<(), RingError> {
        let Some(queue) = &mut self.receive else {
            return Ok(());
        };
        while *work < budget && self.mux.has_packets() {
            if !queue.ring.pop_into(mem, &mut self.chain)? {
                break;
            }
            let mut slices = self.storage.take();
            let resolved = resolve(mem, self.chain.writable(), Access::Write, &mut slices);
            if let Err(error) = resolved {
                self.storage.put(slices);
                queue.ring.unpop();
                return Err(error);
            }
            let room = usize::try_from(self.chain.writable_len()).unwrap_or(usize::MAX);
            let used = match room.checked_sub(HEADER_LEN) {
                Some(limit) if limit > 0 => self.mux.next_packet(&slices, limit).map(|header| {
                    copy_in(&slices, 0, &header.to_bytes());
                    header.len.saturating_add(HEADER_SIZE)
                }),
                _ => {
                    Counters::add(&self.counters.malformed, 1);
                    queue.warn(&"receive buffer with no room for data");
                    Some(0)
                }
            };
            self.storage.put(slices);
            let Some(used) = used else {
                queue.ring.unpop();
                break;
            };
            *work += 1;
            queue.ring.push_used(self.chain.head(), used);
        }
        Ok(())
    }
}

fn publish(queue: &mut Option<Virtqueue>, mem: &DmaMemory) -> u32 {
    queue.as_mut().map_or(0, |queue| queue.publish(mem))
}

fn report(queue: &Option<Virtqueue>, result: Result<(), RingError>) {
    if let (Some(queue), Err(error)) = (queue, result) {
        queue.report(error);
    }
}

//! A queue pair as a worker's task.

use std::os::fd::RawFd;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use super::filter::Filter;
use super::receive::Receive;
use super::transmit::Transmit;
use crate::net::NetQueue;
use crate::virtio::DmaTask;
use crate::worker::{Polled, QueueTask};

/// Event source of receive.
pub const RECEIVE: usize = 0;
/// Event source of transmit.
pub const TRANSMIT: usize = 1;

/// Everything that one pair's worker owns. A side is missing while its queue is not enabled.
pub(super) struct Pair {
    dma: DmaTask,
    pub(super) receive: Option<Receive>,
    pub(super) transmit: Option<Transmit>,
    backend: Box<dyn NetQueue>,
    link_up: Arc<AtomicBool>,
    /// Receive gets the odd unit of the next budget.
    receive_favoured: bool,
    /// The last poll could work: see [`DmaTask::enter`].
    running: bool,
    /// The last poll found the link up.
    link_was_up: bool,
}

impl Pair {
    pub(super) fn new(dma: DmaTask, backend: Box<dyn NetQueue>, link_up: Arc<AtomicBool>) -> Pair {
        Pair {
            dma,
            receive: None,
            transmit: None,
            backend,
            link_up,
            receive_favoured: false,
            running: false,
            link_was_up: false,
        }
    }

    /// See [`Receive::set_active`].
    pub(super) fn set_active(&mut self, active: bool) {
        if let Some(receive) = &mut self.receive {
            receive.set_active(active);
        }
    }

    /// See [`Receive::set_filter`].
    pub(super) fn set_filter(&mut self, filter: Filter) {
        if let Some(receive) = &mut self.receive {
            receive.set_filter(filter);
        }
    }

    /// See [`Receive::set_offloads`].
    pub(super) fn set_offloads(&mut self, offloads: u64) {
        if let Some(receive) = &mut self.receive {
            receive.set_offloads(offloads);
        }
    }

    /// Gives the back end's queue back, for the next activation.
    pub(super) fn into_backend(self) -> Box<dyn NetQueue> {
        self.backend
    }
}

impl QueueTask for Pair {
    /// Half of the budget is receive's; transmit gets the other half and what receive left. So
    /// neither direction can starve the other. An odd unit goes to each in turn.
    fn poll(&mut self, budget: u32) -> Polled {
        let mut polled = Polled::default();
        self.link_was_up = self.link_up.load(Ordering::Acquire);
        let Some(_section) = self.dma.enter() else {
            self.running = false;
            return polled;
        };
        self.running = true;
        self.receive_favoured = !self.receive_favoured;
        let share = match &self.transmit {
            Some(_) if self.receive_favoured => budget.div_ceil(2),
            Some(_) => budget / 2,
            None => budget,
        };
        let mem = self.dma.mem();
        let backend = &mut *self.backend;
        let link_up = self.link_was_up;
        let mut receive = self.receive.as_mut().filter(|_| link_up);
        let mut poll_receive = |polled: &mut Polled, backend: &mut dyn NetQueue, share| {
            if let Some(receive) = &mut receive
                && share > 0
            {
                let (work, events) = receive.poll(mem, backend, share);
                polled.work += work;
                polled.events[RECEIVE] = events;
            }
        };
        poll_receive(&mut polled, backend, share);
        let left = budget.saturating_sub(polled.work);
        if let Some(transmit) = &mut self.transmit
            && left > 0
        {
            let (work, events) = transmit.poll(mem, backend, left, link_up);
            polled.work += work;
            polled.events[TRANSMIT] = events;
        }
        if share == 0 && polled.work == 0 {
            poll_receive(&mut polled, backend, budget);
        }
        polled
    }

    fn arm(&mut self) {
        let Some(_section) = self.dma.enter() else {
            return;
        };
        let mem = self.dma.mem();
        if let Some(receive) = &mut self.receive {
            receive.arm(mem);
        }
        if let Some(transmit) = &mut self.transmit {
            transmit.arm(mem);
        }
    }

    fn has_work(&mut self) -> bool {
        let Some(_section) = self.dma.enter() else {
            return false;
        };
        let mem = self.dma.mem();
        // Set while we looked: bus mastering came back, or the link changed.
        if !self.running || self.link_up.load(Ordering::Acquire) != self.link_was_up {
            return true;
        }
        self.receive.as_ref().is_some_and(|side| side.has_work(mem))
            || self
                .transmit
                .as_ref()
                .is_some_and(|side| side.has_work(mem))
    }

    fn disarm(&mut self) {
        // Always, or a device that may not work would spin on them.
        if let Some(receive) = &self.receive {
            receive.take_notifications();
        }
        if let Some(transmit) = &self.transmit {
            transmit.take_notifications();
        }
        let Some(_section) = self.dma.enter() else {
            return;
        };
        let mem = self.dma.mem();
        if let Some(receive) = &mut self.receive {
            receive.disarm(mem);
        }
        if let Some(transmit) = &mut self.transmit {
            transmit.disarm(mem);
        }
    }

    fn interrupt(&mut self, source: usize) {
        match source {
            RECEIVE => {
                if let Some(receive) = &self.receive {
                    receive.interrupt();
                }
            }
            _ => {
                if let Some(transmit) = &self.transmit {
                    transmit.interrupt();
                }
            }
        }
    }

    fn fds(&self, fds: &mut Vec<RawFd>) {
        if let Some(receive) = &self.receive {
            fds.push(receive.queue.fd());
            if self.running && self.link_was_up && receive.listens() {
                fds.extend(self.backend.fd());
            }
        }
        if let Some(transmit) = &self.transmit {
            fds.push(transmit.queue.fd());
        }
    }

    fn write_fds(&self, fds: &mut Vec<RawFd>) {
        if self.running && self.transmit.as_ref().is_some_and(Transmit::is_blocked) {
            fds.extend(self.backend.fd());
        }
    }
}

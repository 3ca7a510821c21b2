//! The invalidation queue (section 6.5.2).
//!
//! It runs on the thread that writes the tail register: an invalidation is a few stores. A wait
//! descriptor is the exception, it has to stand until every worker has let go of what was taken away. A
//! worker in the middle of a batch is waited for here, a slow disk is not: the queue then belongs to the
//! unit's own thread, [`run`], until it has got past the descriptor, and the vCPU goes on.

use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use vm_memory::{Bytes, GuestAddress};

use super::Options;
use super::completion::Completion;
use super::counters::{InvalidationCount, WaitCount};
use super::descriptor::Descriptor;
use super::drain::{Drain, Pending};
use super::fault::Faults;
use super::line::Remapper;
use super::spec::registers::{iqei, queue};
use super::walk::{Mode, Root};
use crate::{GuestRam, Invalidation};

/// How long a vCPU waits for workers: some batches, much less than a disk.
const SPIN: Duration = Duration::from_micros(40);
/// Descriptors run before others get the queue's lock, or the vCPU its thread back.
const BATCH: u32 = 128;

/// What descriptors act on.
pub(super) struct Parts {
    pub(super) ram: GuestRam,
    pub(super) options: Options,
    pub(super) drain: Arc<dyn Drain>,
    pub(super) faults: Arc<Faults>,
    pub(super) interrupts: Arc<Remapper>,
    /// The latched root table address register, see `unit.rs`.
    pub(super) root: Arc<AtomicU64>,
    pub(super) completion: Completion,
    pub(super) queued: InvalidationCount,
    pub(super) waits: WaitCount,
}

/// The queue's registers and state.
pub(super) struct Queue {
    parts: Parts,
    /// IQH and IQT, readable without the lock.
    head: AtomicU64,
    tail: AtomicU64,
    state: Mutex<State>,
    work: Condvar,
}

#[derive(Default)]
struct State {
    enabled: bool,
    /// IQA; latched while enabled, as it cannot be written then.
    address: u64,
    /// What the next wait descriptor waits for.
    pending: Pending,
    owner: Owner,
    /// When the wait descriptor at the head was read.
    waiting: Option<Instant>,
    /// Changes when the queue is turned off, so that the unit's thread knows its wait is void.
    generation: u64,
    /// The unit's thread is waiting for workers, if only because of a queue that is off by now.
    asleep: bool,
    stop: bool,
}

/// Who runs the queue.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
enum Owner {
    /// Whoever writes the tail.
    #[default]
    Writer,
    /// The unit's thread, which goes on where a writer's batch has ended.
    Thread,
    /// The unit's thread, which waits for [`State::pending`].
    Draining,
}

impl Queue {
    pub(super) fn new(parts: Parts) -> Queue {
        Queue {
            parts,
            head: AtomicU64::new(0),
            tail: AtomicU64::new(0),
            state: Mutex::new(State::default()),
            work: Condvar::new(),
        }
    }

    pub(super) fn parts(&self) -> &Parts {
        &self.parts
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// IQH.
    pub(super) fn head(&self) -> u64 {
        self.head.load(Ordering::Acquire)
    }

    /// IQT.
    pub(super) fn tail(&self) -> u64 {
        self.tail.load(Ordering::Acquire)
    }

    /// IQA.
    pub(super) fn address(&self) -> u64 {
        self.state().address
    }

    /// Writes IQA; ignored while the queue is enabled, which software must not do (11.4.9.3).
    pub(super) fn set_address(&self, address: u64) {
        let width = if self.parts.options.scalable {
            queue::DW
        } else {
            0
        };
        let mut state = self.state();
        if !state.enabled {
            state.address = address & (queue::BASE | queue::QS | width);
        }
    }

    pub(super) fn enabled(&self) -> bool {
        self.state().enabled
    }

    /// Turns the queue on, from its first descriptor, or off. Off, it forgets a wait that stands at
    /// its head.
    pub(super) fn enable(&self, on: bool) {
        let mut state = self.state();
        if state.enabled == on {
            return;
        }
        state.enabled = on;
        state.generation += 1;
        state.owner = Owner::Writer;
        state.waiting = None;
        self.head.store(0, Ordering::Release);
        if on {
            self.run_batch(&mut state);
        }
    }

    pub(super) fn reset(&self) {
        self.enable(false);
        let mut state = self.state();
        state.address = 0;
        state.pending = Pending::default();
        self.tail.store(0, Ordering::Release);
    }

    /// Writes IQT and runs the queue.
    pub(super) fn set_tail(&self, tail: u64) {
        self.tail.store(tail & queue::OFFSET, Ordering::Release);
        self.kick();
    }

    /// Runs the queue, unless the unit's thread does.
    pub(super) fn kick(&self) {
        let mut state = self.state();
        if state.owner == Owner::Writer {
            self.run_batch(&mut state);
        }
    }

    /// Ends [`run`], unless it is waiting for workers: then it ends when they have let go. Returns
    /// whether it ends now.
    pub(super) fn stop(&self) -> bool {
        let mut state = self.state();
        state.stop = true;
        self.work.notify_all();
        state.owner != Owner::Draining && !state.asleep
    }

    /// Runs descriptors until the queue is empty, stands, or a batch is done; hands it to the unit's
    /// thread where it must.
    fn run_batch(&self, state: &mut MutexGuard<'_, State>) {
        let mut owner = Owner::Thread;
        for _ in 0..BATCH {
            match self.step(state) {
                Step::Next => {}
                Step::Stop => {
                    owner = Owner::Writer;
                    break;
                }
                Step::Drain => {
                    owner = Owner::Draining;
                    break;
                }
            }
        }
        state.owner = owner;
        if owner != Owner::Writer {
            self.work.notify_all();
        }
    }

    /// Runs the descriptor at the head.
    fn step(&self, state: &mut MutexGuard<'_, State>) -> Step {
        let faults = &self.parts.faults;
        let (head, tail) = (self.head(), self.tail());
        if !state.enabled || faults.queue_stopped() {
            return Step::Stop;
        }
        let wide = state.address & queue::DW != 0;
        let end = 0x1000 << (state.address & queue::QS);
        let length = if wide { 32 } else { 16 };
        let error = if tail >= end {
            Some(iqei::TAIL)
        } else if tail % length != 0 {
            Some(iqei::TAIL_ALIGNMENT)
        } else if head == tail {
            return Step::Stop;
        } else if !wide && self.scalable() {
            Some(iqei::WIDTH)
        } else {
            None
        };
        let descriptor = match error {
            Some(error) => Err(error),
            None => self
                .fetch((state.address & queue::BASE).checked_add(head), wide)
                .ok_or(iqei::FETCH)
                .and_then(|words| Descriptor::decode(words, &self.parts.options)),
        };
        let next = head + length;
        let next = if next < end { next } else { 0 };
        match descriptor {
            Ok(Descriptor::Wait { status, interrupt }) => {
                let since = *state.waiting.get_or_insert_with(Instant::now);
                if !self.drained(state, since) {
                    return Step::Drain;
                }
                state.waiting = None;
                // First: who sees the status sees a head that is past the descriptor.
                self.head.store(next, Ordering::Release);
                self.complete(status, interrupt);
                self.parts.waits.done(since.elapsed());
            }
            Ok(descriptor) => {
                self.invalidate(state, descriptor);
                self.head.store(next, Ordering::Release);
            }
            Err(error) => {
                faults.queue_error(error, head);
                return Step::Stop;
            }
        }
        Step::Next
    }

    fn scalable(&self) -> bool {
        Root::from_register(self.parts.root.load(Ordering::Acquire)).mode == Mode::Scalable
    }

    fn fetch(&self, address: Option<u64>, wide: bool) -> Option<[u64; 4]> {
        let ram = &self.parts.ram;
        let address = GuestAddress(address?);
        let words: [u64; 4] = if wide {
            ram.read_obj(address).ok()?
        } else {
            let [low, high]: [u64; 2] = ram.read_obj(address).ok()?;
            [low, high, 0, 0]
        };
        Some(words.map(u64::from_le))
    }

    fn invalidate(&self, state: &mut MutexGuard<'_, State>, descriptor: Descriptor) {
        let Parts {
            drain,
            interrupts,
            queued,
            ..
        } = &self.parts;
        let drain = &**drain;
        match descriptor {
            Descriptor::Context(what) => {
                queued.context(what);
                let what = match what {
                    // Context entries of scalable mode have no domain (9.4).
                    Invalidation::DomainContexts { .. } if self.scalable() => {
                        Invalidation::Contexts
                    }
                    what => what,
                };
                state.pending.publish(drain, what);
            }
            Descriptor::Pasid(what) => {
                queued.pasid();
                state.pending.publish(drain, what);
            }
            Descriptor::Iotlb(what) => {
                queued.iotlb(what);
                state.pending.publish(drain, what);
            }
            Descriptor::DeviceTlb => queued.device_tlb(),
            Descriptor::Interrupts => {
                queued.interrupt();
                interrupts.invalidate(|_| true);
            }
            Descriptor::InterruptIndices { index, mask } => {
                queued.interrupt();
                interrupts.invalidate(|other| (other ^ index) >> mask == 0);
            }
            // Not an invalidation: see `step`.
            Descriptor::Wait { .. } => {}
        }
    }

    /// Whether all before a wait descriptor that was read at `since` is done; looks for a while.
    /// Invalidations are in order, so there is nothing that the fence flag would change.
    fn drained(&self, state: &mut MutexGuard<'_, State>, since: Instant) -> bool {
        while !state.pending.drained(&*self.parts.drain) {
            if since.elapsed() >= SPIN {
                return false;
            }
            std::hint::spin_loop();
        }
        true
    }

    /// What a wait descriptor asks for.
    fn complete(&self, status: Option<(u32, u64)>, interrupt: bool) {
        if let Some((data, address)) = status {
            // Where no memory is, the write goes nowhere, as any write there.
            let _ = self
                .parts
                .ram
                .store(data.to_le(), GuestAddress(address), Ordering::Release);
        }
        if interrupt {
            self.parts.completion.complete();
        }
    }
}

enum Step {
    Next,
    Stop,
    Drain,
}

/// The unit's thread: takes the queue over where a writer left it.
pub(super) fn run(queue: &Queue) {
    let mut state = queue.state();
    loop {
        if state.stop {
            return;
        }
        match state.owner {
            Owner::Writer => {
                state = queue
                    .work
                    .wait(state)
                    .unwrap_or_else(PoisonError::into_inner);
            }
            Owner::Thread => {
                queue.run_batch(&mut state);
                // A vCPU that wants to write the tail gets its turn.
                drop(state);
                std::thread::yield_now();
                state = queue.state();
            }
            Owner::Draining => {
                let (pending, generation) = (state.pending, state.generation);
                queue.parts.waits.blocked();
                state.asleep = true;
                drop(state);
                pending.wait(&*queue.parts.drain);
                state = queue.state();
                state.asleep = false;
                if state.generation == generation && state.owner == Owner::Draining {
                    queue.run_batch(&mut state);
                }
            }
        }
    }
}

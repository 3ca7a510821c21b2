//! The unit from outside: registers, memory and interrupts, as its driver sees them.
#![allow(clippy::cast_possible_truncation)]

mod dma;
mod drains;
mod faults;
mod interrupts;
mod queue;
mod registers;
mod replay;
mod storm;

use std::io;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Condvar, Mutex};
use std::time::{Duration, Instant};

use vm_memory::{Bytes, GuestAddress};

use super::drain::Drain;
use super::spec::registers as reg;
use super::{Options, Unit};
use crate::{GuestRam, Invalidation, MsiLine, MsiMessage, MsiSink, SourceId};

/// Bytes of guest memory.
const RAM: u64 = 0x40_0000;
/// Where the tests have the queue, the interrupt remapping table and wait descriptors' status.
const QUEUE: u64 = 0x10_0000;
const IRT: u64 = 0x20_0000;
const STATUS: u64 = 0x30_0000;

/// DMA spaces that let go at once, or only when told to.
#[derive(Default)]
struct Spaces {
    published: Mutex<Vec<Invalidation>>,
    held: Mutex<bool>,
    change: Condvar,
}

impl Spaces {
    fn hold(&self, hold: bool) {
        *self.held.lock().unwrap() = hold;
        self.change.notify_all();
    }

    fn take(&self) -> Vec<Invalidation> {
        std::mem::take(&mut self.published.lock().unwrap())
    }
}

impl Drain for Spaces {
    fn publish(&self, invalidation: Invalidation) -> u64 {
        let mut published = self.published.lock().unwrap();
        published.push(invalidation);
        published.len() as u64
    }

    fn drained(&self, _since: u64, _to: u64) -> bool {
        !*self.held.lock().unwrap()
    }

    fn wait_drained(&self, _since: u64, _to: u64) {
        let mut held = self.held.lock().unwrap();
        while *held {
            held = self.change.wait(held).unwrap();
        }
    }
}

/// Host lines that write down what they deliver.
#[derive(Default)]
struct Host {
    delivered: Mutex<Vec<(SourceId, MsiMessage)>>,
    refuse: AtomicBool,
}

#[derive(Clone)]
struct Sink(Arc<Host>);

struct HostLine {
    host: Arc<Host>,
    source: SourceId,
    message: Mutex<Option<MsiMessage>>,
}

impl MsiSink for Sink {
    fn open(&self, source: SourceId) -> io::Result<Arc<dyn MsiLine>> {
        Ok(Arc::new(HostLine {
            host: Arc::clone(&self.0),
            source,
            message: Mutex::new(None),
        }))
    }

    fn send(&self, source: SourceId, message: MsiMessage) -> io::Result<()> {
        self.0.delivered.lock().unwrap().push((source, message));
        Ok(())
    }
}

impl MsiLine for HostLine {
    fn retarget(&self, message: MsiMessage) -> io::Result<()> {
        if self.host.refuse.load(Ordering::SeqCst) {
            return Err(io::Error::other("no route"));
        }
        *self.message.lock().unwrap() = Some(message);
        Ok(())
    }

    fn fire(&self) {
        // As one step, as in KVM: a retarget that has returned is obeyed.
        let message = self.message.lock().unwrap();
        if let Some(message) = *message {
            let mut delivered = self.host.delivered.lock().unwrap();
            delivered.push((self.source, message));
        }
    }
}

struct Bench {
    unit: Arc<Unit>,
    ram: GuestRam,
    spaces: Arc<Spaces>,
    host: Arc<Host>,
    tail: u64,
    wide: bool,
    waits: u32,
}

impl Bench {
    fn new(options: Options) -> Bench {
        Bench::with_ram(options, &[(GuestAddress(0), RAM as usize)])
    }

    fn with_ram(options: Options, ranges: &[(GuestAddress, usize)]) -> Bench {
        let ram = GuestRam::from_ranges(ranges).unwrap();
        let spaces = Arc::new(Spaces::default());
        let host = Arc::new(Host::default());
        let unit = Unit::with(
            ram.clone(),
            options,
            Arc::new(Sink(Arc::clone(&host))),
            Arc::clone(&spaces) as Arc<dyn Drain>,
        )
        .unwrap();
        Bench {
            unit,
            ram,
            spaces,
            host,
            tail: 0,
            wide: false,
            waits: 0,
        }
    }

    fn r32(&self, offset: u64) -> u32 {
        let mut data = [0; 4];
        self.unit.read(offset, &mut data);
        u32::from_le_bytes(data)
    }

    fn r64(&self, offset: u64) -> u64 {
        let mut data = [0; 8];
        self.unit.read(offset, &mut data);
        u64::from_le_bytes(data)
    }

    fn w32(&self, offset: u64, value: u32) {
        self.unit.write(offset, &value.to_le_bytes());
    }

    fn w64(&self, offset: u64, value: u64) {
        self.unit.write(offset, &value.to_le_bytes());
    }

    fn store(&self, address: u64, words: &[u64]) {
        for (&word, at) in words.iter().zip((address..).step_by(8)) {
            self.ram.write_obj(word, GuestAddress(at)).unwrap();
        }
    }

    fn load32(&self, address: u64) -> u32 {
        self.ram.read_obj(GuestAddress(address)).unwrap()
    }

    /// A command that keeps the lasting ones.
    fn command(&self, set: u32, clear: u32) {
        let lasting = self.r32(reg::GSTS) & reg::global::LASTING;
        self.w32(reg::GCMD, (lasting | set) & !clear);
    }

    /// Turns the queue on: 4 KiB at [`QUEUE`].
    fn queue_on(&mut self, wide: bool) {
        self.wide = wide;
        self.tail = 0;
        self.w64(reg::IQT, 0);
        self.w64(reg::IQA, QUEUE | if wide { reg::queue::DW } else { 0 });
        self.command(reg::global::QIE, 0);
        assert_ne!(self.r32(reg::GSTS) & reg::global::QIE, 0);
    }

    /// Puts a descriptor at the tail without telling.
    fn put(&mut self, descriptor: &[u64]) {
        let length = if self.wide { 32 } else { 16 };
        self.store(QUEUE + self.tail, &[0; 4][..length as usize / 8]);
        self.store(QUEUE + self.tail, descriptor);
        self.tail = (self.tail + length) % 0x1000;
    }

    fn kick(&self) {
        self.w32(reg::IQT, self.tail as u32);
    }

    /// Runs descriptors, with a wait descriptor behind them that must complete.
    fn run(&mut self, descriptors: &[&[u64]]) {
        for descriptor in descriptors {
            self.put(descriptor);
        }
        self.waits += 1;
        let waits = self.waits;
        self.put(&[u64::from(waits) << 32 | 0x25, STATUS]);
        self.kick();
        until(|| self.load32(STATUS) == waits);
        assert_eq!(self.r64(reg::IQH), self.tail);
    }

    /// What has been delivered since the last call.
    fn delivered(&self) -> Vec<MsiMessage> {
        let delivered = std::mem::take(&mut *self.host.delivered.lock().unwrap());
        delivered.into_iter().map(|(_, message)| message).collect()
    }
}

fn message(address: u64, data: u32) -> MsiMessage {
    MsiMessage { address, data }
}

/// Ends the other threads, also when a check fails.
struct Stop<'a>(&'a AtomicBool);

impl Drop for Stop<'_> {
    fn drop(&mut self) {
        self.0.store(true, Ordering::SeqCst);
    }
}

/// Waits until another thread has made `done` true.
fn until(mut done: impl FnMut() -> bool) {
    let deadline = Instant::now() + Duration::from_secs(20);
    while !done() {
        assert!(Instant::now() < deadline, "never came true");
        std::thread::yield_now();
    }
}

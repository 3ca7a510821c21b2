//! The remapping hardware unit: its parts, and what the DMA spaces ask it.

use std::io;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::thread::{self, JoinHandle};

use super::Options;
use super::completion::Completion;
use super::counters::{InvalidationCount, UnitCounters, WaitCount, add};
use super::drain::Drain;
use super::fault::{Fault, Faults, What};
use super::line::{self, RemappingSink};
use super::queue::{self, Parts, Queue};
use super::registers::Registers;
use super::walk::{self, Root};
use crate::{
    Access, Context, DmaError, GuestRam, Invalidation, Invalidations, Iova, Mapping, MsiLine,
    MsiMessage, MsiSink, Remapper, SourceId, Stage,
};

/// Translation is enabled; a bit of the latched root table address that RTADDR does not use.
pub(super) const ENABLED: u64 = 1;

/// A VT-d remapping unit.
///
/// Its registers are written by vCPUs; workers ask it through [`Remapper`]. Its caches are elsewhere:
/// contexts and translations are cached by each worker's view, interrupt entries are the routes of the
/// lines. See the [module's documentation](super) for the whole.
pub struct Unit {
    shared: Arc<Shared>,
    thread: Mutex<Option<JoinHandle<()>>>,
}

pub(super) struct Shared {
    ram: GuestRam,
    pub(super) options: Options,
    /// RTADDR as latched by SRTP, with [`ENABLED`]: one word, so that who looks sees what belongs
    /// together.
    pub(super) root: Arc<AtomicU64>,
    pub(super) registers: Mutex<Registers>,
    pub(super) drain: Arc<dyn Drain>,
    pub(super) faults: Arc<Faults>,
    pub(super) interrupts: Arc<line::Remapper>,
    pub(super) queue: Queue,
    pub(super) invalidations: InvalidationCount,
    contexts_read: AtomicU64,
    walks: AtomicU64,
    levels_read: AtomicU64,
}

impl Unit {
    /// A unit as after reset: translation and interrupt remapping off. It sends interrupts to `sink`,
    /// those of devices remapped and its own as they are, and tells the DMA spaces of `invalidations`
    /// what is no longer valid.
    ///
    /// # Errors
    ///
    /// The host has no interrupt route or no thread left.
    pub fn new(
        ram: GuestRam,
        options: Options,
        sink: Arc<dyn MsiSink>,
        invalidations: Arc<Invalidations>,
    ) -> io::Result<Arc<Unit>> {
        Unit::with(ram, options, sink, invalidations)
    }

    pub(super) fn with(
        ram: GuestRam,
        options: Options,
        sink: Arc<dyn MsiSink>,
        drain: Arc<dyn Drain>,
    ) -> io::Result<Arc<Unit>> {
        let upper = options.interrupt_remapping && options.extended_interrupt_mode;
        let count = usize::from(options.fault_records());
        let faults = Arc::new(Faults::new(&*sink, count, upper)?);
        let completion = Completion::new(&*sink, upper)?;
        let interrupts = Arc::new(line::Remapper::new(ram.clone(), sink, Arc::clone(&faults)));
        let root = Arc::new(AtomicU64::new(0));
        let queue = Queue::new(Parts {
            ram: ram.clone(),
            options: options.clone(),
            drain: Arc::clone(&drain),
            faults: Arc::clone(&faults),
            interrupts: Arc::clone(&interrupts),
            root: Arc::clone(&root),
            completion,
            queued: InvalidationCount::default(),
            waits: WaitCount::default(),
        });
        let shared = Arc::new(Shared {
            ram,
            options,
            root,
            registers: Mutex::new(Registers::default()),
            drain,
            faults,
            interrupts,
            queue,
            invalidations: InvalidationCount::default(),
            contexts_read: AtomicU64::new(0),
            walks: AtomicU64::new(0),
            levels_read: AtomicU64::new(0),
        });
        let thread = {
            let shared = Arc::clone(&shared);
            thread::Builder::new()
                .name("vtd".into())
                .spawn(move || queue::run(&shared.queue))?
        };
        Ok(Arc::new(Unit {
            shared,
            thread: Mutex::new(Some(thread)),
        }))
    }

    /// Machine reset: everything off, nothing recorded, no cache holds anything.
    pub fn reset(&self) {
        let shared = &*self.shared;
        let mut registers = shared.registers();
        shared.queue.reset();
        *registers = Registers::default();
        shared.root.store(0, Ordering::SeqCst);
        registers
            .enabling
            .publish(&*shared.drain, Invalidation::Everything);
        shared.interrupts.set_table(Default::default());
        shared.faults.reset();
        shared.queue.parts().completion.reset();
    }

    /// What it offers.
    pub fn options(&self) -> &Options {
        &self.shared.options
    }

    /// Where functions open their interrupt lines: all are remapped.
    pub fn sink(&self) -> Arc<dyn MsiSink> {
        Arc::new(RemappingSink(Arc::clone(&self.shared.interrupts)))
    }

    /// Puts a line that is already open, such as that of an IOAPIC pin, behind the remapper. `source`
    /// is the id that the DMAR table gives the IOAPIC.
    pub fn wrap_line(&self, source: SourceId, inner: Arc<dyn MsiLine>) -> Arc<dyn MsiLine> {
        self.shared.interrupts.wrap(source, true, inner)
    }

    /// As [`Unit::wrap_line`], but the source is not verified (9.10, SVT), which hardware never does.
    /// QEMU's IOAPIC is such a line, and there are test kernels whose table entries for the IOAPIC name
    /// the function that drives the pin.
    pub fn wrap_unverified_line(
        &self,
        source: SourceId,
        inner: Arc<dyn MsiLine>,
    ) -> Arc<dyn MsiLine> {
        self.shared.interrupts.wrap(source, false, inner)
    }

    /// What it has done.
    pub fn counters(&self) -> UnitCounters {
        let shared = &*self.shared;
        let parts = shared.queue.parts();
        let faults = shared.faults.counts();
        let (interrupts, interrupts_blocked) = shared.interrupts.counts();
        let get = |count: &AtomicU64| count.load(Ordering::Relaxed);
        UnitCounters {
            queued: parts.queued.snapshot(),
            registers: shared.invalidations.snapshot(),
            waits: get(&parts.waits.count),
            wait_ns: get(&parts.waits.ns),
            wait_max_ns: get(&parts.waits.max_ns),
            waits_blocked: get(&parts.waits.blocked),
            queue_errors: faults.queue_errors,
            faults: faults.recorded,
            faults_lost: faults.lost,
            contexts_read: get(&shared.contexts_read),
            walks: get(&shared.walks),
            levels_read: get(&shared.levels_read),
            interrupts,
            interrupts_blocked,
        }
    }

    /// Reads registers: `data.len()` bytes at `offset`, of any size and alignment. Where no register
    /// is, zeros.
    pub fn read(&self, offset: u64, data: &mut [u8]) {
        self.shared.read_bytes(offset, data);
    }

    /// Writes a register, or half of a 64-bit one. Only aligned writes of four and eight bytes do
    /// anything; others are undefined (11.3).
    pub fn write(&self, offset: u64, data: &[u8]) {
        self.shared.write_bytes(offset, data);
    }
}

impl Drop for Unit {
    fn drop(&mut self) {
        let ends = self.shared.queue.stop();
        let thread = self
            .thread
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .take();
        // While it waits for a device's I/O it cannot be joined: whoever drops the unit may be the one
        // who ends that I/O. It ends by itself then.
        if let Some(thread) = thread
            && ends
        {
            let _ = thread.join();
        }
    }
}

impl Shared {
    /// The root table in use, if translation is enabled.
    fn root(&self) -> Option<Root> {
        let root = self.root.load(Ordering::SeqCst);
        (root & ENABLED != 0).then(|| Root::from_register(root))
    }

    /// The root table set last.
    pub(super) fn latched_root(&self) -> Root {
        Root::from_register(self.root.load(Ordering::SeqCst))
    }

    /// Records a fault of a memory access, unless it is suppressed, and makes an error of it.
    fn fault(&self, source: SourceId, iova: Iova, access: Access, fault: walk::Fault) -> DmaError {
        let reason = fault.reason;
        if !fault.suppressed {
            let address = iova.0;
            self.faults.record(Fault {
                source,
                reason,
                what: What::Dma { address, access },
            });
        }
        DmaError::Fault(iova, reason)
    }
}

impl Remapper for Unit {
    fn context(&self, source: SourceId, iova: Iova, access: Access) -> Result<Context, DmaError> {
        let shared = &*self.shared;
        let Some(root) = shared.root() else {
            return Ok(Context {
                domain: 0,
                stage: Stage::Off,
                fault_processing_disable: false,
            });
        };
        add(&shared.contexts_read);
        match walk::context(&shared.ram, &shared.options, root, source) {
            Ok((context, _)) => Ok(context),
            Err(fault) => Err(shared.fault(source, iova, access, fault)),
        }
    }

    fn walk(
        &self,
        source: SourceId,
        context: &Context,
        iova: Iova,
        access: Access,
    ) -> Result<Mapping, DmaError> {
        let shared = &*self.shared;
        let root = shared.latched_root();
        add(&shared.walks);
        let result = walk::page(&shared.ram, &shared.options, root, context, iova, access);
        let (Ok((_, levels)) | Err(walk::Fault { levels, .. })) = result;
        shared
            .levels_read
            .fetch_add(levels.0.into(), Ordering::Relaxed);
        match result {
            Ok((mapping, _)) => Ok(mapping),
            Err(fault) => Err(shared.fault(source, iova, access, fault)),
        }
    }

    fn beyond_width(
        &self,
        source: SourceId,
        context: &Context,
        iova: Iova,
        access: Access,
    ) -> DmaError {
        let fault = walk::beyond_width(self.shared.latched_root(), context);
        self.shared.fault(source, iova, access, fault)
    }

    fn interrupt_write(&self, source: SourceId, address: u64, data: u32) -> Result<(), DmaError> {
        self.shared
            .interrupts
            .write(source, MsiMessage { address, data })
    }
}

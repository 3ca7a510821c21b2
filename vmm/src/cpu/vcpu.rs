//! One vCPU: created, set up, run in its own thread until the guest or somebody else ends it.

use std::io;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::atomic::{AtomicBool, AtomicPtr, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, Once, PoisonError};
use std::thread::{self, JoinHandle};

use iommu::GuestRam;
use kvm_ioctls::{VcpuExit, VcpuFd, VmFd};
use serde::Serialize;
use vmm_sys_util::signal::{Killable, SIGRTMIN, register_signal_handler};

use super::{CpuidTemplate, StateError, msr, report, state, to_kvm};
use crate::boot::Entry;
use crate::kvm::{KvmError, KvmStats};
use crate::machine::BootTrace;

/// What the guest asked for by writing to a port.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Request {
    /// Switch off.
    PowerOff,
    /// Reset.
    Reset,
    /// Its kernel panicked.
    Panic,
    /// A test kernel is done, with this result.
    DebugExit(u32),
}

/// What a vCPU's accesses outside RAM reach.
pub trait GuestBus: Send + Sync {
    /// A load from an I/O port, 1, 2 or 4 bytes.
    fn pio_read(&self, port: u16, data: &mut [u8]);

    /// A store to an I/O port, 1, 2 or 4 bytes.
    fn pio_write(&self, port: u16, data: &[u8]) -> Option<Request>;

    /// A load from memory that is not RAM, 1 to 8 bytes.
    fn mmio_read(&self, address: u64, data: &mut [u8]);

    /// A store to memory that is not RAM, 1 to 8 bytes.
    fn mmio_write(&self, address: u64, data: &[u8]);

    /// A level-triggered IOAPIC interrupt with this vector has ended.
    fn end_of_interrupt(&self, vector: u8);
}

/// How a vCPU's run ended.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Outcome {
    /// The guest asked for it.
    Requested(Request),
    /// It cannot go on; the text has the reason and the registers.
    Failed(String),
}

/// Why there is no vCPU.
#[derive(Debug, thiserror::Error)]
pub enum CpuError {
    /// KVM refuses it.
    #[error(transparent)]
    Kvm(#[from] KvmError),
    /// Its registers could not be set.
    #[error(transparent)]
    State(#[from] StateError),
    /// No thread.
    #[error("cannot start a vCPU thread: {0}")]
    Thread(io::Error),
}

/// Exits to user space by kind, counted since the start.
#[derive(Default)]
pub struct ExitCounters {
    pio_read: AtomicU64,
    pio_write: AtomicU64,
    mmio_read: AtomicU64,
    mmio_write: AtomicU64,
    end_of_interrupt: AtomicU64,
    interrupted: AtomicU64,
    other: AtomicU64,
}

/// A snapshot of one vCPU's exits to user space.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize)]
pub struct ExitCounts {
    /// Loads from ports.
    pub pio_read: u64,
    /// Stores to ports.
    pub pio_write: u64,
    /// Loads from emulated memory.
    pub mmio_read: u64,
    /// Stores to emulated memory.
    pub mmio_write: u64,
    /// Ends of level-triggered IOAPIC interrupts.
    pub end_of_interrupt: u64,
    /// Signals.
    pub interrupted: u64,
    /// Anything else.
    pub other: u64,
}

impl ExitCounters {
    /// The counts now.
    pub fn snapshot(&self) -> ExitCounts {
        let get = |counter: &AtomicU64| counter.load(Ordering::Relaxed);
        ExitCounts {
            pio_read: get(&self.pio_read),
            pio_write: get(&self.pio_write),
            mmio_read: get(&self.mmio_read),
            mmio_write: get(&self.mmio_write),
            end_of_interrupt: get(&self.end_of_interrupt),
            interrupted: get(&self.interrupted),
            other: get(&self.other),
        }
    }
}

/// A vCPU that is set up and not yet running.
pub struct Vcpu {
    id: u8,
    fd: VcpuFd,
}

impl Vcpu {
    /// Creates vCPU `id` of `count`.
    ///
    /// # Errors
    ///
    /// KVM refuses.
    pub fn new(vm: &VmFd, cpuid: &CpuidTemplate, id: u8, count: u8) -> Result<Vcpu, CpuError> {
        let fd = vm
            .create_vcpu(id.into())
            .map_err(|e| KvmError::Call("creating a vCPU", e))?;
        fd.set_cpuid2(&to_kvm(&cpuid.vcpu(id, count))?)
            .map_err(|e| KvmError::Call("setting CPUID", e))?;
        msr::set(&fd);
        state::local_apic(&fd)?;
        Ok(Vcpu { id, fd })
    }

    /// Makes it the boot processor: it starts at `entry`. The others wait for their start-up IPI.
    ///
    /// # Errors
    ///
    /// KVM refuses, or memory is tiny.
    pub fn boot(&self, ram: &GuestRam, entry: Entry) -> Result<(), CpuError> {
        Ok(state::enter(&self.fd, ram, entry)?)
    }

    /// Its binary statistics, if KVM has them.
    ///
    /// # Errors
    ///
    /// KVM has none.
    pub fn stats(&self) -> io::Result<KvmStats> {
        KvmStats::open(&self.fd)
    }

    /// Starts its thread; the boot processor's first entry and exit go to `trace`. `ended` is called at most once, from that thread, and not when the thread
    /// was stopped from outside.
    ///
    /// # Errors
    ///
    /// No thread.
    pub fn start(
        mut self,
        bus: Arc<dyn GuestBus>,
        trace: Arc<BootTrace>,
        ended: impl FnOnce(Outcome) + Send + 'static,
    ) -> Result<VcpuThread, CpuError> {
        install_kick();
        let shared = Arc::new(Shared {
            stop: AtomicBool::new(false),
            immediate_exit: Mutex::new(AtomicPtr::new(
                &raw mut self.fd.get_kvm_run().immediate_exit,
            )),
            counters: ExitCounters::default(),
        });
        let id = self.id;
        let inside = Arc::clone(&shared);
        let thread = thread::Builder::new()
            .name(format!("vcpu{id}"))
            .spawn(move || {
                // A bug in a device ends the machine with a message, not with a CPU that is missing.
                let outcome =
                    catch_unwind(AssertUnwindSafe(|| run(&mut self, &*bus, &inside, &trace)))
                        .unwrap_or_else(|_| {
                            let what = "this program has a bug: the vCPU's thread panicked";
                            Some(Outcome::Failed(report::failure(id, &self.fd, what)))
                        });
                // The page goes away with the descriptor: nobody may kick after this.
                inside
                    .immediate_exit
                    .lock()
                    .unwrap_or_else(PoisonError::into_inner)
                    .store(std::ptr::null_mut(), Ordering::Relaxed);
                if let Some(outcome) = outcome {
                    ended(outcome);
                }
            })
            .map_err(CpuError::Thread)?;
        Ok(VcpuThread { shared, thread })
    }
}

struct Shared {
    stop: AtomicBool,
    /// `kvm_run.immediate_exit` of the running vCPU; null when it has ended.
    immediate_exit: Mutex<AtomicPtr<u8>>,
    counters: ExitCounters,
}

/// A running vCPU. Call [`VcpuThread::stop`] before letting it go.
pub struct VcpuThread {
    shared: Arc<Shared>,
    thread: JoinHandle<()>,
}

impl VcpuThread {
    /// Asks it to leave the guest and end; does not wait.
    pub fn request_stop(&self) {
        self.shared.stop.store(true, Ordering::SeqCst);
        let slot = self
            .shared
            .immediate_exit
            .lock()
            .unwrap_or_else(PoisonError::into_inner);
        let flag = slot.load(Ordering::Relaxed);
        if !flag.is_null() {
            raise_flag(flag);
            // The flag catches a vCPU on its way into the guest, the signal one inside.
            if let Err(error) = self.thread.kill(SIGRTMIN()) {
                tracing::warn!(%error, "cannot signal a vCPU thread");
            }
        }
    }

    /// Asks it to end and waits until it has.
    pub fn stop(self) {
        self.request_stop();
        if self.thread.join().is_err() {
            tracing::error!("a vCPU thread panicked");
        }
    }

    /// Its exits so far.
    pub fn exits(&self) -> ExitCounts {
        self.shared.counters.snapshot()
    }

    /// A handle on its exit counts that outlives it.
    pub fn counters(&self) -> impl Fn() -> ExitCounts + Send + Sync + use<> {
        let shared = Arc::clone(&self.shared);
        move || shared.counters.snapshot()
    }
}

#[expect(unsafe_code, reason = "writes to the page shared with KVM")]
fn raise_flag(flag: *mut u8) {
    // SAFETY: the pointer is into the vCPU's kvm_run page, which lives until the thread stores null
    // under the lock that our caller holds. KVM and the thread only read the byte.
    unsafe { flag.write_volatile(1) };
}

/// The signal that kicks a vCPU out of the guest needs a handler, so that it interrupts KVM_RUN
/// instead of killing the process.
fn install_kick() {
    extern "C" fn nothing(_: libc::c_int, _: *mut libc::siginfo_t, _: *mut libc::c_void) {}
    static INSTALLED: Once = Once::new();
    INSTALLED.call_once(|| {
        if let Err(error) = register_signal_handler(SIGRTMIN(), nothing) {
            tracing::error!(%error, "cannot install the handler that stops vCPUs");
        }
    });
}

fn run(vcpu: &mut Vcpu, bus: &dyn GuestBus, shared: &Shared, trace: &BootTrace) -> Option<Outcome> {
    let counters = &shared.counters;
    let count = |counter: &AtomicU64| {
        counter.fetch_add(1, Ordering::Relaxed);
    };
    let first = vcpu.id == 0;
    if first {
        trace.step("guest entered");
    }
    while !shared.stop.load(Ordering::SeqCst) {
        let exit = vcpu.fd.run();
        if first {
            trace.first_exit();
        }
        let failure = match exit {
            Ok(VcpuExit::MmioWrite(address, data)) => {
                count(&counters.mmio_write);
                bus.mmio_write(address, data);
                continue;
            }
            Ok(VcpuExit::MmioRead(address, data)) => {
                count(&counters.mmio_read);
                bus.mmio_read(address, data);
                continue;
            }
            Ok(VcpuExit::IoOut(port, data)) => {
                count(&counters.pio_write);
                let data = std::ptr::from_ref(data);
                match port_write(vcpu, port, data, bus) {
                    None => continue,
                    Some(request) => return Some(Outcome::Requested(request)),
                }
            }
            Ok(VcpuExit::IoIn(port, data)) => {
                count(&counters.pio_read);
                let data = std::ptr::from_mut(data);
                port_read(vcpu, port, data, bus);
                continue;
            }
            Ok(VcpuExit::IoapicEoi(vector)) => {
                count(&counters.end_of_interrupt);
                bus.end_of_interrupt(vector);
                continue;
            }
            Ok(VcpuExit::Intr) => {
                count(&counters.interrupted);
                continue;
            }
            // EAGAIN: a vCPU that was waiting for its start-up IPI has left that state.
            Err(e) if matches!(e.errno(), libc::EINTR | libc::EAGAIN) => {
                count(&counters.interrupted);
                continue;
            }
            Ok(VcpuExit::Shutdown) => {
                "triple fault: an exception that the guest's handlers could not take".to_owned()
            }
            Ok(VcpuExit::FailEntry(reason, cpu)) => format!(
                "the processor refuses the guest's state (hardware reason {reason:#x}, host CPU {cpu})"
            ),
            Ok(VcpuExit::InternalError) => report::internal_error(vcpu.fd.get_kvm_run()),
            Ok(VcpuExit::MemoryFault { gpa, size, .. }) => {
                format!("the host has no memory behind guest address {gpa:#x}, {size} bytes")
            }
            Ok(VcpuExit::SystemEvent(kind, _)) => format!("KVM reports system event {kind}"),
            Ok(other) => format!("an exit that this machine has no use for: {other:?}"),
            Err(e) if e.errno() == libc::EFAULT => {
                "the host could not give the guest a page (is the host out of memory?)".to_owned()
            }
            Err(e) => format!("KVM_RUN: {e}"),
        };
        count(&counters.other);
        return Some(Outcome::Failed(report::failure(
            vcpu.id, &vcpu.fd, &failure,
        )));
    }
    None
}

/// The size of one item of a string I/O exit, in bytes.
#[expect(unsafe_code, reason = "reads a union that the exit reason selects")]
fn item_size(vcpu: &mut Vcpu) -> usize {
    // SAFETY: called on an I/O exit only, for which KVM fills this arm; it is plain data.
    let io = unsafe { vcpu.fd.get_kvm_run().__bindgen_anon_1.io };
    usize::from(io.size.max(1))
}

/// KVM gathers the items of `rep outs` in one exit; each is an access of its own.
#[expect(unsafe_code, reason = "the data lies in the page shared with KVM")]
fn port_write(
    vcpu: &mut Vcpu,
    port: u16,
    data: *const [u8],
    bus: &dyn GuestBus,
) -> Option<Request> {
    let size = item_size(vcpu);
    // SAFETY: the slice is in the vCPU's shared page, which lives as long as `vcpu`, and KVM writes
    // to it only while the vCPU runs.
    let data = unsafe { &*data };
    data.chunks(size).find_map(|item| bus.pio_write(port, item))
}

/// As [`port_write`], for `ins`.
#[expect(unsafe_code, reason = "the data lies in the page shared with KVM")]
fn port_read(vcpu: &mut Vcpu, port: u16, data: *mut [u8], bus: &dyn GuestBus) {
    let size = item_size(vcpu);
    // SAFETY: as in `port_write`; nothing else refers to the page now.
    let data = unsafe { &mut *data };
    for item in data.chunks_mut(size) {
        bus.pio_read(port, item);
    }
}

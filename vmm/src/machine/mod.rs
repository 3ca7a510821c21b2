//! The machine: its description, its assembly and its run.
//!
//! [`Machine::new`] builds everything from a [`MachineSpec`]; [`Machine::run`] starts the guest and
//! returns when it has ended, with everything taken down in order. In between, other threads look at
//! it and end it through its [`MachineHandle`].

mod board;
mod bus;
mod console;
mod description;
mod devices;
mod run_state;
mod signals;
mod stats;
mod trace;
mod vtd;
mod vtd_trace;

use std::fs::File;
use std::io::{self, Write};
use std::sync::{Arc, Mutex, Once, PoisonError};
use std::time::Instant;

use event_manager::{EventManager, EventOps, EventSet, Events, MutEventSubscriber, SubscriberOps};
use vmm_sys_util::eventfd::EventFd;

use crate::acpi::AcpiError;
use crate::boot::BootError;
use crate::cpu::CpuError;
use crate::ioapic::IoApic;
use crate::kvm::{Host, KvmError};
use crate::layout;
use crate::memory::MemoryError;
use crate::terminal::{Input, Output, RawTerminal};

use board::{Board, RunningBoard};
use console::Console;
use devices::Backends;
use run_state::RunState;
use signals::Signals;
use stats::Sources;

pub use description::{
    EduSpec, ExitReason, IommuSpec, LargestPage, MAX_VCPUS, MIN_MEMORY, MachineSpec, NamespaceSpec,
    NetBackendSpec, NetSpec, NvmeSpec, OnReboot, ProbeSpec, SerialMode, Storage, VsockSpec,
};
pub use stats::{DeviceStats, MachineStats, VcpuStats};
pub use trace::BootTrace;
pub use vtd::{IommuInterrupts, IommuInvalidations, IommuStats, IommuWaits};

/// Why a machine could not be built or run.
#[derive(Debug, thiserror::Error)]
pub enum MachineError {
    /// The host's KVM.
    #[error(transparent)]
    Kvm(#[from] KvmError),
    /// Guest memory.
    #[error(transparent)]
    Memory(#[from] MemoryError),
    /// More memory than the guest's physical address space holds, or too little.
    #[error(
        "{given} bytes: a whole number of 4 KiB pages from {MIN_MEMORY} to {max} bytes is possible"
    )]
    MemorySize {
        /// What was asked for.
        given: u64,
        /// The most that this host's CPU can address.
        max: u64,
    },
    /// Too many vCPUs or none.
    #[error("{0}: 1 to {MAX_VCPUS} are possible")]
    Vcpus(u8),
    /// Kernel, initrd or command line.
    #[error(transparent)]
    Boot(#[from] BootError),
    /// ACPI tables.
    #[error(transparent)]
    Acpi(#[from] AcpiError),
    /// The PCI bus.
    #[error(transparent)]
    Pci(#[from] pci::RootError),
    /// Virtual CPUs.
    #[error(transparent)]
    Cpu(#[from] CpuError),
    /// A device or its back end.
    #[error("{name}: {problem}")]
    Device {
        /// The option that describes the device.
        option: &'static str,
        /// The user's name for it.
        name: String,
        /// What is wrong.
        problem: String,
    },
    /// More than 31 devices.
    #[error("bus 0 has room for 31 devices")]
    BusFull,
    /// Interrupt lines.
    #[error("cannot open the IOAPIC's interrupt lines: {0}")]
    Interrupts(io::Error),
    /// The serial line's output file.
    #[error("{}: {}", .0.display(), .1)]
    SerialFile(std::path::PathBuf, io::Error),
    /// 32-bit interrupt destinations were asked for.
    #[error(
        "x2apic=on: this host's KVM has no 32-bit interrupt destinations (KVM_CAP_X2APIC_API): \
         leave it out"
    )]
    WideDestinations,
    /// The remapping unit's resources.
    #[error("the host refuses the IOMMU its resources: {0}")]
    Iommu(io::Error),
    /// The file for the remapping unit's register accesses.
    #[error("trace={}: {}", .0.display(), .1)]
    IommuTrace(std::path::PathBuf, io::Error),
    /// Another failure of the host.
    #[error("the host refuses resources: {0}")]
    Host(io::Error),
    /// The main loop.
    #[error("the main loop failed: {0}")]
    Loop(event_manager::Error),
}

impl MachineError {
    fn device(option: &'static str, name: &str, problem: impl std::fmt::Display) -> MachineError {
        MachineError::Device {
            option,
            name: name.to_owned(),
            problem: problem.to_string(),
        }
    }

    /// The option that would have to be different, if it is one of the user's.
    pub fn option(&self) -> Option<&'static str> {
        match self {
            MachineError::MemorySize { .. } => Some("--memory"),
            MachineError::Vcpus(_) => Some("--vcpus"),
            MachineError::Boot(BootError::CommandLine(_)) => Some("--cmdline"),
            MachineError::Boot(_) => Some("--kernel"),
            MachineError::SerialFile(..) => Some("--serial"),
            MachineError::WideDestinations | MachineError::IommuTrace(..) => Some("--iommu"),
            MachineError::Device { option, .. } => Some(option),
            _ => None,
        }
    }
}

/// A machine that is built and not yet running.
pub struct Machine {
    spec: MachineSpec,
    host: Host,
    backends: Backends,
    board: Board,
    trace: Arc<BootTrace>,
    output: SerialOutput,
    handle: MachineHandle,
}

impl Machine {
    /// Builds the machine: opens files, creates the VM, loads the kernel. Blocks SIGINT, SIGTERM and
    /// SIGHUP in this thread for good, so that [`Machine::run`] can take them.
    ///
    /// # Errors
    ///
    /// See [`MachineError`].
    pub fn new(spec: &MachineSpec) -> Result<Machine, MachineError> {
        let trace = Arc::new(BootTrace::new(spec.trace_boot));
        if !(1..=MAX_VCPUS).contains(&spec.vcpus) {
            return Err(MachineError::Vcpus(spec.vcpus));
        }
        if spec.memory < MIN_MEMORY || !spec.memory.is_multiple_of(4096) {
            return Err(MachineError::MemorySize {
                given: spec.memory,
                max: layout::max_memory(46),
            });
        }
        signals::block().map_err(MachineError::Host)?;
        let host = Host::open()?;
        warn_missing(&host);
        let backends = Backends::open(spec)?;
        let run = Arc::new(RunState::new().map_err(MachineError::Host)?);
        let output = SerialOutput::open(&spec.serial)?;
        let writer = output.writer(&run).map_err(MachineError::Host)?;
        let board = Board::build(spec, &host, &backends, writer, &trace)?;
        let handle = MachineHandle {
            shared: Arc::new(Shared {
                run,
                current: Mutex::new(None),
                started: Instant::now(),
                trace: Arc::clone(&trace),
            }),
        };
        Ok(Machine {
            spec: spec.clone(),
            host,
            backends,
            board,
            trace,
            output,
            handle,
        })
    }

    /// Access to the machine from other threads, before, during and after the run.
    pub fn handle(&self) -> MachineHandle {
        self.handle.clone()
    }

    /// Runs the guest until it ends or is ended. On return the terminal is as it was and nothing of
    /// the machine is left.
    ///
    /// # Errors
    ///
    /// The machine could not be started, or not be built again after a reboot.
    pub fn run(self) -> Result<ExitReason, MachineError> {
        let Machine {
            spec,
            host,
            backends,
            mut board,
            trace,
            output,
            handle,
        } = self;
        let run = &handle.shared.run;
        let terminal = match spec.serial {
            SerialMode::Stdio => RawTerminal::enter().map_err(MachineError::Host)?,
            _ => None,
        };
        loop {
            let running = board.start(run, &trace)?;
            handle.attach(&running);
            let reason = main_loop(&spec, terminal.is_some(), &running, run);
            handle.detach();
            drop(running);
            let reason = reason?;
            if reason != ExitReason::Reboot || spec.on_reboot == OnReboot::Exit {
                return Ok(reason);
            }
            if let Some(reason) = run.restart() {
                return Ok(reason);
            }
            let writer = output.writer(run).map_err(MachineError::Host)?;
            board = Board::build(&spec, &host, &backends, writer, &trace)?;
        }
    }
}

fn warn_missing(host: &Host) {
    static WARNED: Once = Once::new();
    if !host.missing().is_empty() {
        WARNED.call_once(|| {
            let missing = host.missing().join(", ");
            tracing::warn!("this host's KVM lacks {missing}; the guest runs without");
        });
    }
}

/// Waits for the end of the run and moves the console's input meanwhile.
fn main_loop(
    spec: &MachineSpec,
    terminal: bool,
    running: &RunningBoard,
    run: &Arc<RunState>,
) -> Result<ExitReason, MachineError> {
    let mut manager: EventManager<Box<dyn MutEventSubscriber>> =
        EventManager::new().map_err(MachineError::Loop)?;
    let end = run.event().try_clone().map_err(MachineError::Host)?;
    manager.add_subscriber(Box::new(End(end)));
    let signals = Signals::new(Arc::clone(run)).map_err(MachineError::Host)?;
    manager.add_subscriber(Box::new(signals));
    if spec.serial == SerialMode::Stdio {
        // Standard input may be closed, which is as good as empty.
        let input = Input::stdin().ok();
        let serial = Arc::clone(running.serial());
        let console = Console::new(input, terminal, serial, Arc::clone(run));
        manager.add_subscriber(Box::new(console));
    }
    loop {
        if let Some(reason) = run.reason() {
            return Ok(reason);
        }
        match manager.run() {
            Ok(_) => {}
            Err(event_manager::Error::Epoll(e)) if e.errno() == libc::EINTR => {}
            Err(e) => return Err(MachineError::Loop(e)),
        }
    }
}

/// Wakes the main loop when the run ended. The event stays signalled.
struct End(EventFd);

impl MutEventSubscriber for End {
    fn init(&mut self, ops: &mut EventOps) {
        if let Err(error) = ops.add(Events::new(&self.0, EventSet::IN)) {
            tracing::error!(%error, "the end of the run will not be noticed");
        }
    }

    fn process(&mut self, _events: Events, _ops: &mut EventOps) {}
}

/// Where the serial line's output goes. A file is opened once, so that a restart appends.
enum SerialOutput {
    Stdout,
    File(File),
    Null,
}

impl SerialOutput {
    fn open(mode: &SerialMode) -> Result<SerialOutput, MachineError> {
        Ok(match mode {
            SerialMode::Stdio => SerialOutput::Stdout,
            SerialMode::Null => SerialOutput::Null,
            SerialMode::File(path) => SerialOutput::File(
                File::create(path).map_err(|e| MachineError::SerialFile(path.clone(), e))?,
            ),
        })
    }

    fn writer(&self, run: &RunState) -> io::Result<Box<dyn Write + Send>> {
        Ok(match self {
            SerialOutput::Stdout => Box::new(Output::stdout(run.closing())?),
            SerialOutput::File(file) => Box::new(Output::new(file.try_clone()?, run.closing())),
            SerialOutput::Null => Box::new(io::sink()),
        })
    }
}

/// A machine seen from other threads. Cheap to clone; harmless after the machine's end.
#[derive(Clone)]
pub struct MachineHandle {
    shared: Arc<Shared>,
}

struct Shared {
    run: Arc<RunState>,
    current: Mutex<Option<Current>>,
    started: Instant,
    trace: Arc<BootTrace>,
}

/// What belongs to the running incarnation.
struct Current {
    ioapic: Arc<IoApic>,
    stats: Option<Arc<Sources>>,
}

impl MachineHandle {
    /// The counters now.
    pub fn stats(&self) -> MachineStats {
        let mut stats = MachineStats {
            uptime_s: self.shared.started.elapsed().as_secs_f64(),
            first_exit_ms: self
                .shared
                .trace
                .to_first_exit()
                .map(|time| time.as_secs_f64() * 1e3),
            ..MachineStats::default()
        };
        // Inside the lock, so that nobody holds on to a device when the machine is taken down.
        self.current(|current| {
            if let Some(sources) = &current.stats {
                sources.read(&mut stats);
            }
        });
        stats
    }

    /// Presses the power button. False if nobody listens: the machine does not run, or the guest has
    /// not enabled the interrupt of ACPI's event device (yet). What the guest then does with the
    /// press is its own affair; Linux without the module `button` does nothing.
    pub fn press_power_button(&self) -> bool {
        let pressed = self.current(|current| {
            let listens = !current.ioapic.is_masked(layout::POWER_BUTTON_PIN);
            if listens {
                current.ioapic.pulse(layout::POWER_BUTTON_PIN);
            }
            listens
        });
        pressed.unwrap_or(false)
    }

    /// Ends the run at once, with [`ExitReason::Killed`].
    pub fn kill(&self) {
        self.shared.run.end(ExitReason::Killed);
    }

    fn current<T>(&self, f: impl FnOnce(&Current) -> T) -> Option<T> {
        let current = self
            .shared
            .current
            .lock()
            .unwrap_or_else(PoisonError::into_inner);
        current.as_ref().map(f)
    }

    fn attach(&self, running: &RunningBoard) {
        *self
            .shared
            .current
            .lock()
            .unwrap_or_else(PoisonError::into_inner) = Some(Current {
            ioapic: Arc::clone(running.ioapic()),
            stats: running.stats(),
        });
    }

    fn detach(&self) {
        *self
            .shared
            .current
            .lock()
            .unwrap_or_else(PoisonError::into_inner) = None;
    }
}

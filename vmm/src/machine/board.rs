//! One incarnation of a machine: built, run and taken down; a reboot makes another.

use std::io::{self, Write};
use std::sync::Arc;

use iommu::GuestRam;
use kvm_ioctls::VmFd;
use pci::{IntxSink, RootComplex, Windows};

use super::bus::MachineBus;
use super::devices::{Backends, Devices};
use super::run_state::RunState;
use super::stats::Sources;
use super::trace::BootTrace;
use super::vtd::Remapping;
use super::{ExitReason, MachineError, MachineSpec};
use crate::acpi::{self, AcpiConfig};
use crate::boot::{self, BootFiles, Entry, firmware};
use crate::cpu::{CpuidTemplate, GuestBus, Outcome, Request, Vcpu, VcpuThread};
use crate::ioapic::IoApic;
use crate::kvm::{Host, KvmIoEvents, KvmStats};
use crate::layout;
use crate::memory;
use crate::platform::{PanicWatch, Platform, Serial, TestPorts};

/// A machine that is ready to run.
pub(super) struct Board {
    vcpus: Vec<Vcpu>,
    bus: Arc<MachineBus>,
    serial: Arc<Serial>,
    devices: Devices,
    vm: Arc<VmFd>,
    ram: GuestRam,
}

impl Board {
    /// Creates the VM with everything in it and loads the kernel.
    pub(super) fn build(
        spec: &MachineSpec,
        host: &Host,
        backends: &Backends,
        output: Box<dyn Write + Send>,
        trace: &BootTrace,
    ) -> Result<Board, MachineError> {
        let cpuid = CpuidTemplate::new(host)?;
        let bits = cpuid.physical_bits();
        if spec.memory > layout::max_memory(bits) {
            return Err(MachineError::MemorySize {
                given: spec.memory,
                max: layout::max_memory(bits),
            });
        }
        let vm = host.create_vm()?;
        trace.step("VM created");

        let ram = memory::allocate(spec.memory)?;
        memory::register(&vm, &ram)?;
        trace.step("memory mapped");

        let Remapping {
            unit: iommu,
            dmar,
            upstream,
            pins,
        } = Remapping::new(spec, backends, host, &vm, &ram, bits)?;
        let ioapic = Arc::new(IoApic::new(pins));
        let hub = Arc::new(KvmIoEvents::new(Arc::clone(&vm)));
        let windows = Windows {
            ecam: layout::ECAM,
            mmio32: layout::PCI_WINDOW_32,
            mmio64: layout::pci_window_64(bits),
        };
        let intx: Arc<dyn IntxSink> = Arc::clone(&ioapic) as _;
        let root = RootComplex::new(windows, hub, intx)?;
        let panic = Arc::new(PanicWatch::default());
        let serial = Serial::new(Arc::clone(&ioapic), output, Arc::clone(&panic))
            .map_err(MachineError::Host)?;
        let serial = Arc::new(serial);
        let devices = Devices::attach(spec, backends, &root, &upstream)?;
        trace.step("devices made");

        let acpi = AcpiConfig {
            vcpus: spec.vcpus,
            pci_window_64: layout::pci_window_64(bits),
            iommu: dmar,
        };
        let rsdp = acpi::write(&ram, &acpi)?;
        let files = BootFiles {
            kernel: &spec.kernel,
            initrd: spec.initrd.as_deref(),
            cmdline: &spec.cmdline,
        };
        let entry = boot::load(&ram, spec.memory, &files, rsdp)?;
        if matches!(entry, Entry::Multiboot { .. }) {
            firmware::set_up(&root);
        }
        trace.step("kernel loaded");

        let vcpus = (0..spec.vcpus)
            .map(|id| Vcpu::new(&vm, &cpuid, id, spec.vcpus))
            .collect::<Result<Vec<_>, _>>()?;
        if let Some(first) = vcpus.first() {
            first.boot(&ram, entry)?;
        }
        trace.step("vCPUs made");
        let test = spec
            .test_ports
            .then(|| TestPorts::new(spec.memory, spec.vcpus));
        Ok(Board {
            vcpus,
            bus: Arc::new(MachineBus {
                ioapic,
                iommu,
                root,
                platform: Platform::new(Arc::clone(&serial), panic, test),
            }),
            serial,
            devices,
            vm,
            ram,
        })
    }

    /// Starts the vCPUs. What they end with goes to `run`.
    pub(super) fn start(
        self,
        run: &Arc<RunState>,
        trace: &Arc<BootTrace>,
    ) -> Result<RunningBoard, MachineError> {
        let stats = |stats: io::Result<KvmStats>| match stats {
            Ok(stats) => Some(stats),
            Err(error) => {
                tracing::debug!(%error, "no binary statistics");
                None
            }
        };
        let vm_stats = stats(KvmStats::open(&*self.vm));
        let kvm: Vec<_> = self.vcpus.iter().map(|vcpu| stats(vcpu.stats())).collect();
        let mut running = RunningBoard {
            threads: Vec::new(),
            bus: Arc::clone(&self.bus),
            serial: self.serial,
            devices: self.devices,
            _vm: self.vm,
            _ram: self.ram,
            run: Arc::clone(run),
            stats: None,
        };
        for vcpu in self.vcpus {
            let bus: Arc<dyn GuestBus> = Arc::clone(&self.bus) as _;
            let run = Arc::clone(run);
            let ended = move |outcome| {
                run.end(match outcome {
                    Outcome::Requested(Request::PowerOff) => ExitReason::PowerOff,
                    Outcome::Requested(Request::Reset) => ExitReason::Reboot,
                    Outcome::Requested(Request::Panic) => ExitReason::Panic,
                    Outcome::Requested(Request::DebugExit(result)) => ExitReason::DebugExit(result),
                    Outcome::Failed(text) => ExitReason::Error(text),
                });
            };
            // On an error the threads that run already are stopped by `RunningBoard`'s drop.
            let thread = vcpu.start(bus, Arc::clone(trace), ended)?;
            running.threads.push(thread);
        }
        let unit = self
            .bus
            .iommu
            .as_ref()
            .map(|iommu| Arc::clone(iommu.unit()));
        let exits = running.threads.iter().map(VcpuThread::counters);
        running.stats = Some(Arc::new(Sources {
            vm: vm_stats,
            vcpus: kvm
                .into_iter()
                .zip(exits)
                .map(|(kvm, exits)| (kvm, Box::new(exits) as _))
                .collect(),
            devices: running.devices.clone(),
            iommu: unit,
        }));
        Ok(running)
    }
}

/// A machine whose vCPUs run. Dropping it takes it down in order: vCPUs, devices, memory.
pub(super) struct RunningBoard {
    threads: Vec<VcpuThread>,
    bus: Arc<MachineBus>,
    serial: Arc<Serial>,
    devices: Devices,
    stats: Option<Arc<Sources>>,
    run: Arc<RunState>,
    // Last: the vCPUs and devices use them.
    _vm: Arc<VmFd>,
    _ram: GuestRam,
}

impl RunningBoard {
    pub(super) fn serial(&self) -> &Arc<Serial> {
        &self.serial
    }

    pub(super) fn ioapic(&self) -> &Arc<IoApic> {
        &self.bus.ioapic
    }

    pub(super) fn stats(&self) -> Option<Arc<Sources>> {
        self.stats.clone()
    }
}

impl Drop for RunningBoard {
    fn drop(&mut self) {
        // A vCPU may be waiting for the terminal.
        self.run.close();
        for thread in &self.threads {
            thread.request_stop();
        }
        for thread in self.threads.drain(..) {
            thread.stop();
        }
        // Ends what the devices have in flight. What the guest wrote is with the host by now: in the
        // files or in its page cache, which the end of this process does not harm.
        self.bus.root.reset();
    }
}

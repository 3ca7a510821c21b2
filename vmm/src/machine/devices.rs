//! The machine's PCI devices: their back ends, opened once, and the devices, made anew at a reboot.

use std::collections::BTreeMap;
use std::sync::Arc;

use devices::block::{BlockBackend, FileBackend, FileOptions, MemoryBackend, NullBackend};
use devices::dma_probe::DmaProbe;
use devices::edu::{Edu, EduOptions};
use devices::net::{Loopback, NetBackend, Tap};
use devices::nvme::{self, Nvme};
use devices::virtio::net::{self, VirtioNet};
use devices::virtio::vsock::VirtioVsock;
use devices::virtio::{VirtioDevice, VirtioPci};
use devices::worker::WorkerOptions;
use iommu::{Bdf, DmaSpace, DmaStats, Upstream};
use pci::{Endpoint, PciDevice, RootComplex};
use serde::Serialize;

use super::stats::DeviceStats;
use super::vtd_trace::RegisterTrace;
use super::{MachineError, MachineSpec, NetBackendSpec, Storage};

/// Storage and network attachments. They outlive a guest's reboot: a memory disk keeps its data.
pub(super) struct Backends {
    /// By controller, then by namespace.
    nvme: Vec<Vec<Arc<dyn BlockBackend>>>,
    net: Vec<Arc<dyn NetBackend>>,
    /// Where the remapping unit's register accesses are written down.
    pub(super) iommu_trace: Option<Arc<RegisterTrace>>,
}

impl Backends {
    pub(super) fn open(spec: &MachineSpec) -> Result<Backends, MachineError> {
        let nvme = spec.nvme.iter().map(|controller| {
            let namespaces = controller.namespaces.iter();
            namespaces
                .map(|namespace| open_storage(&controller.name, &namespace.storage))
                .collect()
        });
        let net = spec.net.iter().map(|net| {
            Ok::<Arc<dyn NetBackend>, MachineError>(match &net.backend {
                NetBackendSpec::Loopback => Loopback::new(net.pairs)
                    .map_err(|error| MachineError::device("--net", &net.name, error))?,
                NetBackendSpec::Tap { interface } => Tap::open(interface, net.pairs)
                    .map_err(|error| MachineError::device("--net", &net.name, error))?,
            })
        });
        let iommu_trace = spec.iommu.as_ref().and_then(|iommu| iommu.trace.as_ref());
        let iommu_trace = iommu_trace.map(|path| {
            RegisterTrace::create(path)
                .map_err(|error| MachineError::IommuTrace(path.clone(), error))
        });
        Ok(Backends {
            nvme: nvme.collect::<Result<_, _>>()?,
            net: net.collect::<Result<_, _>>()?,
            iommu_trace: iommu_trace.transpose()?,
        })
    }
}

fn open_storage(name: &str, storage: &Storage) -> Result<Arc<dyn BlockBackend>, MachineError> {
    Ok(match storage {
        Storage::File {
            path,
            direct,
            read_only,
        } => {
            let options = FileOptions {
                direct: *direct,
                read_only: *read_only,
                ..FileOptions::new(path)
            };
            FileBackend::open(&options)
                .map_err(|error| MachineError::device("--nvme", name, error))?
        }
        Storage::Memory { size } => MemoryBackend::new(*size)
            .map_err(|error| MachineError::device("--nvme", name, error))?,
        Storage::Null { size } => NullBackend::new(*size),
    })
}

/// The devices on the bus. The bus has them too; this keeps what only the machine needs.
#[derive(Clone)]
pub(super) struct Devices(Arc<[Device]>);

struct Device {
    name: String,
    kind: &'static str,
    bdf: Bdf,
    dma: Arc<DmaSpace>,
    counters: Box<dyn Fn() -> serde_json::Value + Send + Sync>,
}

impl Devices {
    /// Makes the devices and puts them on bus 0, from device number 1 on: NVMe controllers, network
    /// interfaces, the socket device, educational functions, DMA probes.
    pub(super) fn attach(
        spec: &MachineSpec,
        backends: &Backends,
        root: &Arc<RootComplex>,
        upstream: &Upstream,
    ) -> Result<Devices, MachineError> {
        let mut slots = Slots {
            root,
            upstream,
            next: 1,
            devices: Vec::new(),
        };
        for (index, backends) in backends.nvme.iter().enumerate() {
            slots.nvme(&spec.nvme[index], backends)?;
        }
        for (index, backend) in backends.net.iter().enumerate() {
            let net = &spec.net[index];
            let config = net::Config {
                pairs: net.pairs,
                ..net::Config::new(net.mac, Arc::clone(backend))
            };
            let device = VirtioNet::new(config)
                .map_err(|error| MachineError::device("--net", &net.name, error))?;
            let counters = Arc::clone(&device);
            slots.virtio("--net", &net.name, "virtio-net", device, move || {
                json(&counters.stats())
            })?;
        }
        if let Some(vsock) = &spec.vsock {
            let name = "vsock";
            let options = WorkerOptions::default();
            let device = VirtioVsock::new(vsock.cid, &vsock.socket, options)
                .map_err(|error| MachineError::device("--vsock", name, error))?;
            let counters = Arc::clone(&device);
            slots.virtio("--vsock", name, "virtio-vsock", device, move || {
                json(&counters.stats())
            })?;
        }
        for edu in &spec.edu {
            let options = EduOptions {
                dma_mask_bits: edu.dma_mask,
            };
            let bdf = slots.next()?;
            let (endpoint, device) = Edu::new(&edu.name, options, bdf, slots.upstream)
                .map_err(|error| MachineError::device("--edu", &edu.name, error))?;
            let counters = Arc::clone(&device);
            let counters = move || json(&counters.stats());
            slots.plug("--edu", &edu.name, "edu", endpoint, device, counters)?;
        }
        for probe in &spec.dma_probe {
            let (option, name) = ("--dma-probe", &probe.name);
            let bdf = slots.next()?;
            let (endpoint, device) = DmaProbe::new(name, bdf, slots.upstream)
                .map_err(|error| MachineError::device(option, name, error))?;
            let counters = Arc::clone(&device);
            let counters = move || json(&counters.stats());
            slots.plug(option, name, "dma-probe", endpoint, device, counters)?;
        }
        Ok(Devices(slots.devices.into()))
    }

    /// What the IOTLBs of each did.
    pub(super) fn dma(&self) -> impl Iterator<Item = DmaStats> {
        self.0.iter().map(|device| device.dma.stats())
    }

    /// The counters of all, by name.
    pub(super) fn stats(&self) -> BTreeMap<String, DeviceStats> {
        let stats = self.0.iter().map(|device| {
            let stats = DeviceStats {
                kind: device.kind,
                address: device.bdf.to_string(),
                dma: device.dma.is_remapped().then(|| device.dma.stats()),
                counters: (device.counters)(),
            };
            (device.name.clone(), stats)
        });
        stats.collect()
    }
}

fn json(stats: &impl Serialize) -> serde_json::Value {
    // Plain structures of numbers always have a JSON form.
    serde_json::to_value(stats).unwrap_or_default()
}

/// Hands out places on bus 0.
struct Slots<'a> {
    root: &'a Arc<RootComplex>,
    upstream: &'a Upstream,
    next: u8,
    devices: Vec<Device>,
}

impl Slots<'_> {
    fn next(&mut self) -> Result<Bdf, MachineError> {
        let bdf = Bdf::new(0, self.next, 0).ok_or(MachineError::BusFull)?;
        self.next += 1;
        Ok(bdf)
    }

    fn nvme(
        &mut self,
        spec: &super::NvmeSpec,
        backends: &[Arc<dyn BlockBackend>],
    ) -> Result<(), MachineError> {
        let option = "--nvme";
        let namespaces = (1..).zip(backends).zip(&spec.namespaces);
        let config = nvme::Config {
            serial: spec.serial.clone(),
            max_queue_pairs: spec.queues,
            namespaces: namespaces
                .map(|((nsid, backend), namespace)| nvme::NamespaceConfig {
                    nsid,
                    backend: Arc::clone(backend),
                    lba_size: namespace.block_size,
                })
                .collect(),
            ..nvme::Config::default()
        };
        let bdf = self.next()?;
        let (endpoint, device) = Nvme::new(config, bdf, self.upstream)
            .map_err(|error| MachineError::device(option, &spec.name, error))?;
        let counters = Arc::clone(&device);
        let counters = move || json(&counters.stats());
        self.plug(option, &spec.name, "nvme", endpoint, device, counters)
    }

    fn virtio(
        &mut self,
        option: &'static str,
        name: &str,
        kind: &'static str,
        device: Arc<dyn VirtioDevice>,
        counters: impl Fn() -> serde_json::Value + Send + Sync + 'static,
    ) -> Result<(), MachineError> {
        let bdf = self.next()?;
        let (endpoint, function) = VirtioPci::new(name, device, bdf, self.upstream)
            .map_err(|error| MachineError::device(option, name, error))?;
        self.plug(option, name, kind, endpoint, function, counters)
    }

    /// Puts a function on the bus.
    fn plug(
        &mut self,
        option: &'static str,
        name: &str,
        kind: &'static str,
        endpoint: Endpoint,
        device: Arc<dyn PciDevice>,
        counters: impl Fn() -> serde_json::Value + Send + Sync + 'static,
    ) -> Result<(), MachineError> {
        let bdf = endpoint.bdf();
        let dma = endpoint.bus_master().dma;
        self.root
            .attach(endpoint, device)
            .map_err(|error| MachineError::device(option, name, error))?;
        self.devices.push(Device {
            name: name.to_owned(),
            kind,
            bdf,
            dma,
            counters: Box::new(counters),
        });
        Ok(())
    }
}

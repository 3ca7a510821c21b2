//! The machine: RAM, root complex, interrupts, I/O events.

use std::ops::Range;
use std::sync::{Arc, Mutex, PoisonError};

use iommu::{Bdf, Gpa, GuestRam, Upstream};
use pci::{Endpoint, FunctionBuilder, PciDevice, RootComplex, Windows};
use vm_memory::{ByteValued, Bytes, GuestAddress, GuestMemoryBackend};

use crate::events::EventTable;
use crate::interrupts::{Lines, Recorder};
use crate::memory::{DmaBuffer, PAGE_SIZE, Pages, Side};
use crate::remapping::{RemappedMemory, Remapping};

/// Where things are in the fake machine.
pub mod layout {
    use std::ops::Range;

    /// RAM below 4 GiB.
    pub const LOW_RAM: Range<u64> = 0..64 << 20;
    /// RAM above 4 GiB.
    pub const HIGH_RAM: Range<u64> = (4 << 30)..(4 << 30) + (64 << 20);
    /// Window of the root complex below 4 GiB.
    pub const MMIO32: Range<u64> = 0xc000_0000..0xe000_0000;
    /// ECAM for 16 buses.
    pub const ECAM: Range<u64> = 0xe000_0000..0xe100_0000;
    /// Window of the root complex above 4 GiB.
    pub const MMIO64: Range<u64> = (1 << 40)..(1 << 41);
}

/// Bytes at the end of low RAM that remapping tables may use.
const TABLES: u64 = 1 << 20;

/// A machine without CPUs; see the [crate's page](crate).
pub struct Machine {
    upstream: Upstream,
    remapped: Option<Arc<RemappedMemory>>,
    root: Arc<RootComplex>,
    interrupts: Arc<Recorder>,
    lines: Arc<Lines>,
    events: Arc<EventTable>,
    pages: Pages,
    /// Free addresses for BARs below and above 4 GiB.
    windows: Mutex<[Range<u64>; 2]>,
}

impl Machine {
    /// 64 MiB of RAM on each side of 4 GiB and a root complex that holds the host bridge only.
    pub fn new() -> Arc<Machine> {
        Machine::behind(Remapping::Absent)
    }

    /// The same, with all functions below a remapping unit. It remaps no interrupts.
    pub fn behind(remapping: Remapping) -> Arc<Machine> {
        let regions = [layout::LOW_RAM, layout::HIGH_RAM].map(|range| {
            let len = usize::try_from(range.end - range.start).expect("RAM fits the host");
            (GuestAddress(range.start), len)
        });
        let events = Arc::new(EventTable::default());
        let windows = Windows {
            ecam: layout::ECAM,
            mmio32: layout::MMIO32,
            mmio64: layout::MMIO64,
        };
        let hub = Arc::clone(&events);
        let lines = Arc::<Lines>::default();
        let intx = Arc::clone(&lines);
        let interrupts = Arc::<Recorder>::default();
        let ram = GuestRam::from_ranges(&regions).expect("guest RAM");
        let sink = Arc::<Recorder>::clone(&interrupts);
        let tables = layout::LOW_RAM.end - TABLES..layout::LOW_RAM.end;
        let (remapped, upstream) = if remapping == Remapping::Absent {
            (None, Upstream::new(ram, sink))
        } else {
            let regions = [layout::LOW_RAM, layout::HIGH_RAM];
            let through = remapping == Remapping::PassThrough;
            let (memory, upstream) =
                RemappedMemory::new(&ram, sink, tables.clone(), &regions, through);
            (Some(memory), upstream)
        };
        Arc::new(Machine {
            upstream,
            remapped,
            root: RootComplex::new(windows, hub, intx).expect("root complex"),
            interrupts,
            lines,
            events,
            // Page 0 is left out: address 0 is what an uninitialised pointer looks like.
            pages: Pages::new(PAGE_SIZE..tables.start, layout::HIGH_RAM),
            windows: Mutex::new([layout::MMIO32, layout::MMIO64]),
        })
    }

    /// Builds the function that is to be at 00:`device`.0.
    pub fn build(&self, builder: FunctionBuilder, device: u8) -> Endpoint {
        let bdf = Bdf::new(0, device, 0).expect("device number");
        builder.build(bdf, &self.upstream).expect("function")
    }

    /// Puts a function on the bus.
    pub fn attach(&self, endpoint: Endpoint, device: Arc<dyn PciDevice>) {
        self.root.attach(endpoint, device).expect("free slot");
    }

    /// What functions are built on.
    pub fn upstream(&self) -> &Upstream {
        &self.upstream
    }

    /// The remapping unit and its tables, if there is one.
    pub fn remapped(&self) -> Option<&Arc<RemappedMemory>> {
        self.remapped.as_ref()
    }

    /// All RAM.
    pub fn ram(&self) -> &GuestRam {
        &self.upstream.ram
    }

    /// The bus.
    pub fn root(&self) -> &Arc<RootComplex> {
        &self.root
    }

    /// Where the devices' interrupts go.
    pub fn interrupts(&self) -> &Arc<Recorder> {
        &self.interrupts
    }

    /// The root complex's interrupt lines.
    pub fn lines(&self) -> &Arc<Lines> {
        &self.lines
    }

    /// Which stores signal events.
    pub fn events(&self) -> &Arc<EventTable> {
        &self.events
    }

    /// A CPU's load of an object of 1 to 8 bytes. Where nothing answers it reads as ones.
    pub fn read<T: ByteValued>(&self, address: Gpa) -> T {
        let mut value = T::zeroed();
        self.load(address, value.as_mut_slice());
        value
    }

    /// A CPU's store of an object of 1 to 8 bytes. Where nothing answers it is lost.
    pub fn write<T: ByteValued>(&self, address: Gpa, value: T) {
        self.store(address, value.as_slice());
    }

    /// A CPU's load, as [`Machine::read`].
    pub fn load(&self, address: Gpa, data: &mut [u8]) {
        let at = GuestAddress(address.0);
        if self.upstream.ram.check_range(at, data.len()) {
            self.upstream.ram.read_slice(data, at).expect("RAM");
        } else if !self.root.mmio_read(address, data) {
            data.fill(0xff);
        }
    }

    /// A CPU's store, as [`Machine::write`].
    pub fn store(&self, address: Gpa, data: &[u8]) {
        let at = GuestAddress(address.0);
        if self.upstream.ram.check_range(at, data.len()) {
            self.upstream.ram.write_slice(data, at).expect("RAM");
        } else if !self.events.store(address.0, data) {
            self.root.mmio_write(address, data);
        }
    }

    /// Takes zeroed pages for DMA, `pages` in a row, below or above 4 GiB.
    pub fn dma(&self, side: Side, pages: u64) -> DmaBuffer {
        let address = Gpa(self.pages.take(side, pages));
        DmaBuffer::new(self.upstream.ram.clone(), address, pages * PAGE_SIZE)
    }

    /// Takes address space for a BAR: `size` bytes, a power of two, aligned to itself.
    pub(crate) fn bar_space(&self, side: Side, size: u64) -> u64 {
        let mut windows = self.windows.lock().unwrap_or_else(PoisonError::into_inner);
        let window = match side {
            Side::Low => &mut windows[0],
            Side::High => &mut windows[1],
        };
        let start = window.start.next_multiple_of(size);
        assert!(start + size <= window.end, "no address space for a BAR");
        window.start = start + size;
        start
    }
}

//! A device that does nothing but remember, for tests of the bus.

use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use iommu::{Access, Bdf, BusMaster, DmaError, DmaMemory, Iova, PinnedBuffers};
use pci::{
    BarIndex, BarKind, ClassCode, Endpoint, FunctionBuilder, Identity, InterruptPin, IntxPin,
    IoEvent, IoLength, MsiVector, PciDevice,
};
use vmm_sys_util::eventfd::{EFD_NONBLOCK, EventFd};

use crate::Machine;

/// What the bus told the device.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Call {
    /// [`PciDevice::reset`], and whether bus mastering was on.
    Reset {
        /// Bus Master Enable as the DMA space has it.
        bus_master: bool,
    },
    /// [`PciDevice::bus_master_changed`].
    BusMaster(bool),
    /// [`PciDevice::capability_write`].
    Capability(usize, u8, Vec<u8>),
    /// [`PciDevice::bar_write`].
    Write(BarIndex, u64, Vec<u8>),
}

/// The device: registers that keep what is written, a doorbell with an I/O event, vectors to signal,
/// memory to read and write.
///
/// BAR 0 (64 bits): registers from 0, doorbell at [`TestDevice::DOORBELL`], MSI-X table and PBA in
/// the second half. BAR 2 (32 bits): registers. They read as written last; after a reset, as
/// [`TestDevice::fresh`] says.
pub struct TestDevice {
    master: BusMaster,
    vectors: Vec<MsiVector>,
    pin: Option<IntxPin>,
    registers: Mutex<[Vec<u8>; 3]>,
    calls: Mutex<Vec<Call>>,
    capability_reads: AtomicU64,
    doorbell: EventFd,
}

impl TestDevice {
    /// Size of BAR 0.
    pub const BAR0_SIZE: u64 = 0x1_0000;
    /// Size of BAR 2.
    pub const BAR2_SIZE: u64 = 0x1000;
    /// Where a four-byte store to BAR 0 signals [`TestDevice::doorbell`].
    pub const DOORBELL: u64 = 0x800;
    /// Place of the MSI-X table in BAR 0.
    pub const TABLE: u64 = 0x8000;
    /// Body of the vendor-specific capability.
    pub const VENDOR_BODY: [u8; 9] = [1, 2, 3, 4, 5, 6, 7, 8, 9];
    /// Write mask of the vendor-specific capability.
    pub const VENDOR_MASK: [u8; 9] = [0, 0xff, 0x0f, 0, 0, 0, 0, 0, 0xf0];

    /// Describes the function, with `vectors` MSI-X vectors (1 to 1024).
    pub fn builder(vectors: u16) -> FunctionBuilder {
        let pba = Self::TABLE + u64::from(vectors) * 16;
        Self::plain().msix(vectors, (BarIndex(0), Self::TABLE), (BarIndex(0), pba))
    }

    /// Describes the function with `vectors` MSI vectors (a power of two up to 32) and a pin instead
    /// of MSI-X.
    pub fn legacy(vectors: u8, pin: InterruptPin) -> FunctionBuilder {
        Self::plain().msi(vectors).intx(pin)
    }

    fn plain() -> FunctionBuilder {
        let identity = Identity {
            vendor: 0x1234,
            device: 0x5678,
            class: ClassCode {
                base: 0xff,
                sub: 0x01,
                interface: 0x02,
            },
            revision: 3,
            subsystem_vendor: 0x9abc,
            subsystem: 0xdef0,
        };
        let wide = BarKind::Memory64 { prefetchable: true };
        FunctionBuilder::new(identity)
            .bar(BarIndex(0), Self::BAR0_SIZE, wide)
            .bar(BarIndex(2), Self::BAR2_SIZE, BarKind::Memory32)
            .vendor_capability(Self::VENDOR_BODY.to_vec(), Self::VENDOR_MASK.to_vec())
    }

    /// A device for this function.
    pub fn new(endpoint: &Endpoint) -> Arc<TestDevice> {
        let (msi, msix) = (endpoint.msi(), endpoint.msix());
        let messages = (0..msi.vectors()).filter_map(|i| msi.vector(i));
        let entries = (0..msix.vectors()).filter_map(|i| msix.vector(i));
        let device = TestDevice {
            master: endpoint.bus_master(),
            vectors: messages.chain(entries).collect(),
            pin: endpoint.intx(),
            registers: Mutex::default(),
            calls: Mutex::default(),
            capability_reads: AtomicU64::new(0),
            doorbell: EventFd::new(EFD_NONBLOCK).expect("eventfd"),
        };
        device.fill();
        Arc::new(device)
    }

    /// Builds one with `vectors` vectors and plugs it in at 00:`slot`.0.
    pub fn plug(machine: &Machine, slot: u8, vectors: u16) -> Arc<TestDevice> {
        Self::plug_as(machine, slot, Self::builder(vectors))
    }

    /// Builds one as described and plugs it in at 00:`slot`.0.
    pub fn plug_as(machine: &Machine, slot: u8, builder: FunctionBuilder) -> Arc<TestDevice> {
        let endpoint = machine.build(builder, slot);
        let device = Self::new(&endpoint);
        machine.attach(endpoint, Arc::<TestDevice>::clone(&device));
        device
    }

    /// What a register byte of a function reads as after reset: another value in each function, BAR
    /// and 256 bytes.
    pub fn fresh(bdf: Bdf, bar: BarIndex, offset: u64) -> u8 {
        let page = offset.to_le_bytes()[1];
        (bdf.device() << 4) ^ (bar.0 << 2) ^ page ^ 1
    }

    fn fill(&self) {
        let bdf = Bdf::from_requester_id(self.master.source.0);
        let bar = |index, size| {
            let bytes = (0..size).map(|offset| Self::fresh(bdf, BarIndex(index), offset));
            bytes.collect()
        };
        *self.registers() = [bar(0, Self::BAR0_SIZE), Vec::new(), bar(2, Self::BAR2_SIZE)];
    }

    /// Raises interrupt `vector`.
    pub fn signal(&self, vector: usize) {
        self.vectors[vector].signal();
    }

    /// What interrupt `vector` was raised for has been dealt with.
    pub fn withdraw(&self, vector: usize) {
        self.vectors[vector].withdraw();
    }

    /// Asserts or deasserts the interrupt pin.
    pub fn set_pin(&self, level: bool) {
        self.pin.as_ref().expect("a pin").set_level(level);
    }

    /// Writes to memory as a bus master.
    ///
    /// # Errors
    ///
    /// As the DMA space says.
    pub fn dma_write(&self, address: u64, value: u32) -> Result<(), DmaError> {
        self.view().write_obj(Iova(address), value)
    }

    /// Pins memory as for an I/O under way.
    ///
    /// # Errors
    ///
    /// As the DMA space says.
    pub fn pin(&self, address: u64, len: u64) -> Result<PinnedBuffers, DmaError> {
        let mut buffers = PinnedBuffers::new();
        buffers.push(&self.view(), Iova(address), len, Access::Write)?;
        Ok(buffers)
    }

    /// A view of memory as a worker has it.
    pub fn view(&self) -> DmaMemory {
        self.master.dma.view()
    }

    /// Stores that signalled the doorbell since the last call.
    pub fn doorbell(&self) -> u64 {
        self.doorbell.read().unwrap_or(0)
    }

    /// What the bus has told since the last call.
    pub fn take_calls(&self) -> Vec<Call> {
        std::mem::take(&mut self.calls())
    }

    /// Reads of the vendor-specific capability so far.
    pub fn capability_reads(&self) -> u64 {
        self.capability_reads.load(Ordering::Relaxed)
    }

    fn calls(&self) -> MutexGuard<'_, Vec<Call>> {
        self.calls.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn registers(&self) -> MutexGuard<'_, [Vec<u8>; 3]> {
        self.registers
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
    }
}

/// Panics when an access is not inside the BAR: that is the bus's promise.
impl PciDevice for TestDevice {
    fn bar_read(&self, bar: BarIndex, offset: u64, data: &mut [u8]) {
        assert!((1..=8).contains(&data.len()));
        let at = usize::try_from(offset).expect("small");
        data.copy_from_slice(&self.registers()[usize::from(bar.0)][at..at + data.len()]);
    }

    fn bar_write(&self, bar: BarIndex, offset: u64, data: &[u8]) {
        assert!((1..=8).contains(&data.len()));
        let at = usize::try_from(offset).expect("small");
        self.registers()[usize::from(bar.0)][at..at + data.len()].copy_from_slice(data);
        self.calls().push(Call::Write(bar, offset, data.to_vec()));
    }

    fn reset(&self) {
        self.fill();
        let bus_master = self.master.dma.bus_master();
        self.calls().push(Call::Reset { bus_master });
    }

    fn bus_master_changed(&self, on: bool) {
        self.calls().push(Call::BusMaster(on));
    }

    fn io_events(&self) -> Vec<IoEvent> {
        vec![IoEvent {
            bar: BarIndex(0),
            offset: Self::DOORBELL,
            length: IoLength::U32,
            value: None,
            event: self.doorbell.try_clone().expect("eventfd"),
        }]
    }

    fn capability_read(&self, index: usize, offset: u8, data: &mut [u8]) {
        assert_eq!(index, 0);
        let end = usize::from(offset) + data.len();
        assert!(offset >= 3 && end <= 3 + Self::VENDOR_BODY.len());
        self.capability_reads.fetch_add(1, Ordering::Relaxed);
    }

    fn capability_write(&self, index: usize, offset: u8, data: &[u8]) {
        let end = usize::from(offset) + data.len();
        assert!(offset >= 3 && end <= 3 + Self::VENDOR_BODY.len());
        self.calls()
            .push(Call::Capability(index, offset, data.to_vec()));
    }
}

//! Messages, routes and I/O events through this host's KVM, seen by the bare guest: it reports every
//! interrupt that it takes.

mod kvm_common;

use std::sync::mpsc::{Receiver, RecvTimeoutError, Sender, channel};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use iommu::{Bdf, GuestRam, MsiLine, MsiMessage, MsiSink, Upstream};
use kvm_common::{elf, host};
use pci::{BarIndex, BarKind, ClassCode, FunctionBuilder, Identity, IoEvent, IoEventHub, IoLength};
use vmm::boot::{BootFiles, load};
use vmm::cpu::{CpuidTemplate, GuestBus, Outcome, Request, Vcpu, VcpuThread};
use vmm::kvm::{KvmIoEvents, KvmMsiSink};
use vmm::machine::BootTrace;
use vmm::memory;
use vmm_sys_util::eventfd::EventFd;

const MEMORY: u64 = 64 << 20;
const REPORT: u16 = 0xf4;
const COM1: u16 = 0x3f8;
const SLEEP_CONTROL: u16 = 0x600;
const DOORBELL: u64 = 0xc000_0000;
/// What the guest ends on.
const LAST: u8 = 0xff;
/// Long, because it costs only failing tests.
const TIMEOUT: Duration = Duration::from_secs(20);

/// Reports and other stores of the guest.
struct Listener {
    reports: Sender<u8>,
    stores: Mutex<Vec<(u64, Vec<u8>)>>,
}

impl GuestBus for Listener {
    fn pio_read(&self, _port: u16, data: &mut [u8]) {
        data.fill(0xff);
    }
    fn pio_write(&self, port: u16, data: &[u8]) -> Option<Request> {
        match port {
            REPORT => {
                let _ = self.reports.send(data[0]);
                None
            }
            SLEEP_CONTROL => Some(Request::PowerOff),
            COM1 => panic!("a device's bug, on purpose"),
            _ => None,
        }
    }
    fn mmio_read(&self, _address: u64, data: &mut [u8]) {
        data.fill(0xff);
    }
    fn mmio_write(&self, address: u64, data: &[u8]) {
        self.stores.lock().unwrap().push((address, data.to_vec()));
    }
    fn end_of_interrupt(&self, _vector: u8) {}
}

struct Bench {
    sink: Arc<KvmMsiSink>,
    hub: KvmIoEvents,
    ram: GuestRam,
    bus: Arc<Listener>,
    reports: Receiver<u8>,
    ended: Receiver<Outcome>,
    vcpu: Option<Vcpu>,
    thread: Option<VcpuThread>,
}

impl Bench {
    fn new(program: &str) -> Option<Bench> {
        let host = host()?;
        let vm = host.create_vm().unwrap();
        let ram = memory::allocate(MEMORY).unwrap();
        memory::register(&vm, &ram).unwrap();
        let files = BootFiles {
            kernel: &elf(),
            initrd: None,
            cmdline: program,
        };
        let entry = load(&ram, MEMORY, &files, 0).unwrap();
        let vcpu = Vcpu::new(&vm, &CpuidTemplate::new(&host).unwrap(), 0, 1).unwrap();
        vcpu.boot(&ram, entry).unwrap();
        let (sender, reports) = channel();
        Some(Bench {
            sink: Arc::new(KvmMsiSink::new(Arc::clone(&vm))),
            hub: KvmIoEvents::new(vm),
            ram,
            bus: Arc::new(Listener {
                reports: sender,
                stores: Mutex::default(),
            }),
            reports,
            ended: channel().1,
            vcpu: Some(vcpu),
            thread: None,
        })
    }

    fn start(&mut self) {
        let (sender, ended) = channel();
        let bus = Arc::clone(&self.bus);
        let trace = Arc::new(BootTrace::new(false));
        let thread = self.vcpu.take().unwrap().start(bus, trace, move |outcome| {
            let _ = sender.send(outcome);
        });
        (self.thread, self.ended) = (Some(thread.unwrap()), ended);
    }

    /// Starts the guest that reports interrupts, and waits until it listens.
    fn reporting() -> Option<Bench> {
        let mut bench = Bench::new("w")?;
        bench.start();
        assert_eq!(bench.report(), 0);
        Some(bench)
    }

    fn report(&self) -> u8 {
        match self.reports.recv_timeout(TIMEOUT) {
            Ok(vector) => vector,
            Err(error) => panic!("{error}; the vCPU ended with {:?}", self.ended.try_recv()),
        }
    }

    fn finish(mut self) {
        let line = self.line();
        line.retarget(message(LAST)).unwrap();
        line.fire();
        assert_eq!(self.report(), LAST);
        self.power_off();
    }

    fn power_off(&mut self) {
        let outcome = self.ended.recv_timeout(TIMEOUT);
        self.thread.take().unwrap().stop();
        assert_eq!(outcome, Ok(Outcome::Requested(Request::PowerOff)));
        assert_eq!(
            self.reports.recv_timeout(Duration::ZERO),
            Err(RecvTimeoutError::Timeout)
        );
    }

    fn line(&self) -> Arc<dyn MsiLine> {
        self.sink.open(source()).unwrap()
    }
}

fn source() -> iommu::SourceId {
    bdf().source_id()
}

fn bdf() -> Bdf {
    Bdf::new(0, 1, 0).unwrap()
}

/// To APIC 0, fixed, edge-triggered.
fn message(vector: u8) -> MsiMessage {
    MsiMessage {
        address: 0xfee0_0000,
        data: vector.into(),
    }
}

#[test]
fn a_message_wakes_a_halted_guest() {
    let Some(bench) = Bench::reporting() else {
        return;
    };
    let line = bench.line();
    line.fire(); // No message yet: nothing happens.
    line.retarget(message(0x51)).unwrap();
    for _ in 0..20 {
        line.fire();
        assert_eq!(bench.report(), 0x51);
    }
    bench.finish();
}

#[test]
fn lines_are_retargeted_live_and_lose_nothing() {
    let Some(bench) = Bench::reporting() else {
        return;
    };
    let lines: Vec<_> = (0..8).map(|_| bench.line()).collect();
    for round in 0..4u8 {
        for (line, index) in lines.iter().zip(0..) {
            let vector = 0x40 + 16 * round + index;
            line.retarget(message(vector)).unwrap();
            line.fire();
            assert_eq!(bench.report(), vector);
        }
    }
    // Fired before and during the change: each arrives, by the old route or the new.
    for round in 0..50u8 {
        let (old, new) = (0x60 + round % 2, 0x60 + (round + 1) % 2);
        lines[0].retarget(message(old)).unwrap();
        lines[0].fire();
        lines[0].retarget(message(new)).unwrap();
        let taken = bench.report();
        assert!([old, new].contains(&taken), "{taken:#x}");
    }
    bench.finish();
}

#[test]
fn closed_lines_are_silent_and_their_routes_are_used_again() {
    let Some(bench) = Bench::reporting() else {
        return;
    };
    for vector in 0x30..0x40 {
        let line = bench.line();
        line.retarget(message(vector)).unwrap();
        line.fire();
        assert_eq!(bench.report(), vector);
    }
    bench.finish();
}

#[test]
fn all_routes_can_be_taken_and_no_more() {
    let Some(bench) = Bench::reporting() else {
        return;
    };
    let mut lines = Vec::new();
    let error = loop {
        match bench.sink.open(source()) {
            Ok(line) => lines.push(line),
            Err(error) => break error,
        }
    };
    let few_descriptors = error.raw_os_error() == Some(libc::EMFILE);
    assert!(few_descriptors || lines.len() == 4096 - 24, "{error}");
    lines.clear();
    bench.finish();
}

#[test]
fn a_masked_vector_waits_for_its_unmasking() {
    let Some(bench) = Bench::reporting() else {
        return;
    };
    let sink: Arc<dyn MsiSink> = bench.sink.clone();
    let identity = Identity {
        vendor: 0x1234,
        device: 1,
        class: ClassCode {
            base: 0xff,
            sub: 0,
            interface: 0,
        },
        revision: 0,
        subsystem_vendor: 0,
        subsystem: 0,
    };
    let windows = pci::Windows {
        ecam: 0xe000_0000..0xf000_0000,
        mmio32: 0xc000_0000..0xe000_0000,
        mmio64: 0..0,
    };
    struct Nothing;
    impl pci::PciDevice for Nothing {
        fn bar_read(&self, _bar: BarIndex, _offset: u64, _data: &mut [u8]) {}
        fn bar_write(&self, _bar: BarIndex, _offset: u64, _data: &[u8]) {}
        fn reset(&self) {}
    }
    struct NoEvents;
    impl IoEventHub for NoEvents {
        fn add(&self, _address: u64, _event: &IoEvent) -> std::io::Result<()> {
            Ok(())
        }
        fn remove(&self, _address: u64, _event: &IoEvent) {}
    }
    struct NoLines;
    impl pci::IntxSink for NoLines {
        fn set_level(&self, line: u8, _level: bool) {
            panic!("no function has a pin, and line {line} changes");
        }
        fn input(&self, _line: u8) -> u8 {
            0
        }
    }
    let root = pci::RootComplex::new(windows, Arc::new(NoEvents), Arc::new(NoLines)).unwrap();
    let endpoint = FunctionBuilder::new(identity)
        .bar(BarIndex(0), 0x1000, BarKind::Memory32)
        .msix(4, (BarIndex(0), 0), (BarIndex(0), 0x800))
        .build(bdf(), &Upstream::new(bench.ram.clone(), sink))
        .unwrap();
    let msix = endpoint.msix();
    root.attach(endpoint, Arc::new(Nothing)).unwrap();

    // The test is the guest's driver; the guest only takes the interrupts.
    let function = 0xe000_8000;
    let write = |address: u64, value: u32| {
        assert!(root.mmio_write(iommu::Gpa(address), &value.to_le_bytes()));
    };
    let read = |address: u64| {
        let mut data = [0; 4];
        assert!(root.mmio_read(iommu::Gpa(address), &mut data));
        u32::from_le_bytes(data)
    };
    let mut capability = read(function + 0x34) & 0xff;
    while read(function + u64::from(capability)) & 0xff != 0x11 {
        capability = read(function + u64::from(capability)) >> 8 & 0xff;
        assert_ne!(capability, 0, "no MSI-X capability");
    }
    let bar: u32 = 0xc000_0000;
    write(function + 0x10, bar);
    let bar = u64::from(bar);
    write(function + 4, 6); // Memory, bus master.
    write(function + u64::from(capability), 1 << 31); // Enable.
    let entry = bar + 16;
    write(entry, 0xfee0_0000);
    write(entry + 4, 0);
    write(entry + 8, 0x71);
    write(entry + 12, 1); // Masked.

    let vector = msix.vector(1).unwrap();
    vector.signal();
    vector.signal();
    assert_eq!(read(bar + 0x800), 2, "pending bit");
    assert!(bench.reports.try_recv().is_err());
    write(entry + 12, 0);
    assert_eq!(bench.report(), 0x71);
    assert_eq!(read(bar + 0x800), 0);
    vector.signal();
    assert_eq!(bench.report(), 0x71);
    write(entry + 8, 0x72); // Moved while enabled.
    vector.signal();
    assert_eq!(bench.report(), 0x72);
    drop(root);
    bench.finish();
}

#[test]
fn doorbells_signal_without_an_exit() {
    let Some(mut bench) = Bench::new("d") else {
        return;
    };
    let event = |value| IoEvent {
        bar: BarIndex(0),
        offset: 0,
        length: IoLength::U32,
        value,
        event: EventFd::new(libc::EFD_NONBLOCK).unwrap(),
    };
    let any = event(None);
    bench.hub.add(DOORBELL, &any).unwrap();
    bench.start();
    bench.power_off();
    assert_eq!(any.event.read().unwrap(), 2);
    let stores = std::mem::take(&mut *bench.bus.stores.lock().unwrap());
    assert_eq!(stores, [(DOORBELL, vec![9, 0])], "another length");
    bench.hub.remove(DOORBELL, &any);
    bench.hub.add(DOORBELL, &any).unwrap();
}

#[test]
fn a_doorbell_with_a_value_takes_that_value_alone() {
    let Some(mut bench) = Bench::new("d") else {
        return;
    };
    let event = IoEvent {
        bar: BarIndex(0),
        offset: 0,
        length: IoLength::U32,
        value: Some(8),
        event: EventFd::new(libc::EFD_NONBLOCK).unwrap(),
    };
    bench.hub.add(DOORBELL, &event).unwrap();
    bench.start();
    bench.power_off();
    assert_eq!(event.event.read().unwrap(), 1);
    let stores = bench.bus.stores.lock().unwrap();
    assert_eq!(
        *stores,
        [(DOORBELL, vec![7, 0, 0, 0]), (DOORBELL, vec![9, 0])]
    );
}

#[test]
fn a_bug_in_a_device_ends_the_run_with_a_message() {
    let Some(mut bench) = Bench::new("o") else {
        return;
    };
    bench.start();
    let outcome = bench.ended.recv_timeout(TIMEOUT).unwrap();
    bench.thread.take().unwrap().stop();
    assert!(
        matches!(&outcome, Outcome::Failed(text) if text.contains("bug") && text.contains("rip")),
        "{outcome:?}"
    );
}

//! The controller in the driver's hands.

use std::sync::Arc;
use std::time::Instant;

use devices::nvme::spec::command::feature;
use devices::nvme::spec::{Cap, Cc, Csts, reg};

use super::queue::{CompletionRing, Pair, SubmissionRing};
use super::{Command, Transfer};
use crate::{GuestBar, GuestFunction, GuestVector, Machine, TIMEOUT};

/// What to write before CC.EN; the default is what Linux writes.
#[derive(Clone, Copy, Debug)]
pub struct Enable {
    /// CC, with or without EN.
    pub cc: Cc,
    /// Entries of the admin queues.
    pub entries: u32,
}

impl Default for Enable {
    fn default() -> Enable {
        Enable {
            cc: Cc::new().with_iosqes(6).with_iocqes(4),
            entries: 32,
        }
    }
}

/// A fake NVMe driver.
pub struct Driver {
    /// The function in configuration space.
    pub function: GuestFunction,
    machine: Arc<Machine>,
    /// BAR 0.
    pub bar: GuestBar,
    /// Vectors of all queues, the admin queue's first.
    pub vectors: Vec<GuestVector>,
    /// The admin queues.
    pub admin: Pair,
}

impl Driver {
    /// Finds the controller in slot `device` and brings it up: disable, admin queues, enable, wait
    /// for ready, set the number of queues.
    pub fn bring_up(machine: &Arc<Machine>, device: u8) -> Driver {
        let mut driver = Driver::probe(machine, device);
        driver.enable(Enable::default());
        driver
            .admin
            .succeed(Command::set_feature(feature::NUMBER_OF_QUEUES, 0x003f_003f));
        driver
    }

    /// Finds the controller, which has 65 vectors, and prepares admin queues, but does not enable
    /// it.
    pub fn probe(machine: &Arc<Machine>, device: u8) -> Driver {
        Driver::probe_with_vectors(machine, device, 65)
    }

    /// As [`Driver::probe`], for a controller with at least `count` vectors.
    pub fn probe_with_vectors(machine: &Arc<Machine>, device: u8, count: u16) -> Driver {
        let function = GuestFunction::probe(machine, device);
        let bar = function.bar(0);
        let vectors = function.setup_msix(count);
        let admin = admin_pair(machine, &bar, &vectors, 32);
        Driver {
            function,
            machine: Arc::clone(machine),
            bar,
            vectors,
            admin,
        }
    }

    /// CAP.
    pub fn cap(&self) -> Cap {
        Cap::from_bits(self.bar.read(reg::CAP))
    }

    /// CSTS.
    pub fn csts(&self) -> Csts {
        Csts::from_bits(self.bar.read(reg::CSTS))
    }

    /// CC.
    pub fn cc(&self) -> Cc {
        Cc::from_bits(self.bar.read(reg::CC))
    }

    /// Writes CC.
    pub fn set_cc(&self, cc: Cc) {
        self.bar.write(reg::CC, cc.into_bits());
    }

    /// Waits until CSTS is as `wanted` says.
    pub fn wait_csts(&self, wanted: impl Fn(Csts) -> bool) {
        let deadline = Instant::now() + TIMEOUT;
        while !wanted(self.csts()) {
            assert!(Instant::now() < deadline, "CSTS stays {:?}", self.csts());
            std::thread::yield_now();
        }
    }

    /// Clears CC.EN and waits until the controller is not ready.
    pub fn disable(&self) {
        self.set_cc(self.cc().with_en(false));
        self.wait_csts(|csts| !csts.rdy());
    }

    /// Fresh admin queues, written to the registers with CC.EN; does not wait.
    pub fn start(&mut self, enable: Enable) {
        self.admin = admin_pair(&self.machine, &self.bar, &self.vectors, enable.entries);
        let size = enable.entries - 1;
        self.bar.write(reg::AQA, size << 16 | size);
        self.bar.write(reg::ASQ, self.admin.sq.base());
        self.bar.write(reg::ACQ, self.admin.cq.base());
        self.set_cc(enable.cc.with_en(true));
    }

    /// Disables if needed, then enables and waits until the controller is ready.
    pub fn enable(&mut self, enable: Enable) {
        if self.cc().en() {
            self.disable();
        }
        self.start(enable);
        self.wait_csts(|csts| csts.rdy() || csts.cfs());
        assert!(!self.csts().cfs(), "controller fatal status");
    }

    /// Creates I/O queue pair `id` with interrupts on vector `id`.
    pub fn create_pair(&mut self, id: u16, entries: u32) -> Pair {
        let vector = self.vectors[usize::from(id)].clone();
        let cq = CompletionRing::new(&self.machine, self.bar.clone(), id, entries, Some(vector));
        let command = Command::create_cq(id, entries, cq.base(), id);
        self.admin.succeed(command);
        let sq = self.create_sq(id, entries, id);
        Pair { sq, cq }
    }

    /// Creates an I/O submission queue for completion queue `cq`.
    pub fn create_sq(&mut self, id: u16, entries: u32, cq: u16) -> SubmissionRing {
        let sq = SubmissionRing::new(&self.machine, self.bar.clone(), id, entries);
        let command = Command::create_sq(id, entries, sq.base(), cq);
        self.admin.succeed(command);
        sq
    }

    /// Creates a queue pair without interrupts.
    pub fn create_polled_pair(&mut self, id: u16, entries: u32) -> Pair {
        let cq = CompletionRing::new(&self.machine, self.bar.clone(), id, entries, None);
        let command = Command::create_cq(id, entries, cq.base(), 0);
        self.admin.succeed(command.dword(11, 1));
        let sq = self.create_sq(id, entries, id);
        Pair { sq, cq }
    }

    /// Executes an admin command that must succeed and returns `len` bytes of its data.
    pub fn admin_data(&mut self, command: Command, len: u64) -> Vec<u8> {
        let data = Transfer::new(&self.machine, len);
        self.admin.succeed(command.data(&data));
        data.get()
    }
}

fn admin_pair(
    machine: &Arc<Machine>,
    bar: &GuestBar,
    vectors: &[GuestVector],
    entries: u32,
) -> Pair {
    let vector = vectors.first().cloned();
    Pair {
        sq: SubmissionRing::new(machine, bar.clone(), 0, entries),
        cq: CompletionRing::new(machine, bar.clone(), 0, entries, vector),
    }
}

//! Rings in the driver's hands.

use std::sync::Arc;
use std::time::{Duration, Instant};

use devices::nvme::spec::command::{Cqe, Status, nvm};
use devices::nvme::spec::reg;

use super::{Command, Transfer};
use crate::{DmaBuffer, GuestBar, GuestVector, Machine, PAGE_SIZE, Side, TIMEOUT};

fn pages(entries: u32, size: u64) -> u64 {
    (u64::from(entries) * size).div_ceil(PAGE_SIZE)
}

/// A submission queue.
pub struct SubmissionRing {
    /// Its identifier.
    pub id: u16,
    entries: u32,
    ring: DmaBuffer,
    tail: u32,
    next_cid: u16,
    bar: GuestBar,
}

impl SubmissionRing {
    /// Takes memory for a ring; the controller does not know of it yet.
    pub fn new(machine: &Arc<Machine>, bar: GuestBar, id: u16, entries: u32) -> SubmissionRing {
        SubmissionRing {
            id,
            entries,
            ring: machine.dma(Side::Low, pages(entries, 64)),
            tail: 0,
            next_cid: 0,
            bar,
        }
    }

    /// The ring's address.
    pub fn base(&self) -> u64 {
        self.ring.address().0
    }

    /// Puts a command into the ring without telling the controller; returns its identifier.
    pub fn push(&mut self, command: Command) -> u16 {
        let cid = self.next_cid;
        self.next_cid = self.next_cid.wrapping_add(1);
        self.push_as(command, cid);
        cid
    }

    /// As [`SubmissionRing::push`], with this identifier.
    pub fn push_as(&mut self, command: Command, cid: u16) {
        let mut dwords = command.0;
        dwords[0] = dwords[0] & 0xffff | u32::from(cid) << 16;
        self.ring
            .write(u64::from(self.tail) * 64, dwords.map(u32::to_le));
        self.tail = (self.tail + 1) % self.entries;
    }

    /// Rings the tail doorbell.
    pub fn ring(&self) {
        // The entries come before the doorbell, as a driver's write barrier sees to.
        std::sync::atomic::fence(std::sync::atomic::Ordering::Release);
        self.ring_value(self.tail);
    }

    /// Stores any value to the tail doorbell.
    pub fn ring_value(&self, value: u32) {
        self.bar
            .write(reg::DOORBELLS + u64::from(self.id) * 8, value);
    }
}

/// A completion queue.
pub struct CompletionRing {
    /// Its identifier.
    pub id: u16,
    entries: u32,
    ring: DmaBuffer,
    head: u32,
    phase: bool,
    bar: GuestBar,
    /// The vector that it interrupts by.
    pub vector: Option<GuestVector>,
}

impl CompletionRing {
    /// Takes memory for a ring; the controller does not know of it yet.
    pub fn new(
        machine: &Arc<Machine>,
        bar: GuestBar,
        id: u16,
        entries: u32,
        vector: Option<GuestVector>,
    ) -> CompletionRing {
        CompletionRing {
            id,
            entries,
            ring: machine.dma(Side::High, pages(entries, 16)),
            head: 0,
            phase: true,
            bar,
            vector,
        }
    }

    /// The ring's address.
    pub fn base(&self) -> u64 {
        self.ring.address().0
    }

    /// Takes the next completion, if it is there, without moving the head doorbell.
    pub fn poll(&mut self) -> Option<Cqe> {
        let at = u64::from(self.head) * 16;
        let upper: u64 = u64::from_le(self.ring.load(at + 8));
        let lower: u64 = u64::from_le(self.ring.read(at));
        let (cqe, phase) = Cqe::from_quadwords([lower, upper]);
        if phase != self.phase {
            return None;
        }
        self.head = (self.head + 1) % self.entries;
        if self.head == 0 {
            self.phase = !self.phase;
        }
        Some(cqe)
    }

    /// Tells the controller what has been taken.
    pub fn ring(&self) {
        self.ring_value(self.head);
    }

    /// Stores any value to the head doorbell.
    pub fn ring_value(&self, value: u32) {
        self.bar
            .write(reg::DOORBELLS + u64::from(self.id) * 8 + 4, value);
    }

    /// Waits for the next completion: for its interrupt if the queue has a vector, else by polling.
    pub fn wait(&mut self) -> Cqe {
        let deadline = Instant::now() + TIMEOUT;
        loop {
            if let Some(cqe) = self.poll() {
                return cqe;
            }
            assert!(
                Instant::now() < deadline,
                "no completion in queue {}",
                self.id
            );
            match &self.vector {
                Some(vector) => {
                    let came = vector.wait(TIMEOUT);
                    assert!(came > 0, "no interrupt from queue {}", self.id);
                }
                None => std::thread::yield_now(),
            }
        }
    }

    /// Whether nothing arrives for a little while.
    pub fn stays_empty(&mut self) -> bool {
        std::thread::sleep(Duration::from_millis(20));
        self.poll().is_none()
    }
}

/// A submission queue and the completion queue that it alone uses.
pub struct Pair {
    /// The submission queue.
    pub sq: SubmissionRing,
    /// The completion queue.
    pub cq: CompletionRing,
}

impl Pair {
    /// Submits one command, waits for it and takes its completion.
    pub fn execute(&mut self, command: Command) -> Cqe {
        let cid = self.sq.push(command);
        self.sq.ring();
        let cqe = self.cq.wait();
        self.cq.ring();
        assert_eq!(cqe.cid, cid, "completion of another command");
        assert_eq!(cqe.sq_id, self.sq.id);
        cqe
    }

    /// The status of a command, without its More bit.
    pub fn status(&mut self, command: Command) -> Status {
        let status = self.execute(command).status;
        Status(status.0 & !(1 << 13))
    }

    /// Executes a command that must succeed; returns its result.
    pub fn succeed(&mut self, command: Command) -> u32 {
        let cqe = self.execute(command);
        assert!(cqe.status.is_success(), "{command:x?}: {:x?}", cqe.status);
        cqe.result
    }

    /// Writes a whole transfer, in blocks of 512 bytes.
    pub fn write(&mut self, nsid: u32, lba: u64, data: &Transfer) {
        self.succeed(rw(nvm::WRITE, nsid, lba, data));
    }

    /// Reads a whole transfer, in blocks of 512 bytes.
    pub fn read(&mut self, nsid: u32, lba: u64, data: &Transfer) {
        self.succeed(rw(nvm::READ, nsid, lba, data));
    }
}

fn rw(opcode: u8, nsid: u32, lba: u64, data: &Transfer) -> Command {
    let blocks = u32::try_from(data.len() / 512).expect("blocks");
    Command::blocks(opcode, nsid, lba, blocks).data(data)
}

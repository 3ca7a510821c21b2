//! An NVMe controller: reset, admin queue, identify, one pair of I/O queues, reads.
//!
//! NVM Express Base Specification 2.0c (registers: section 3.1; start: 3.5.1; commands: 5) and NVM
//! Command Set Specification 1.0c (read: 3.2.4).

use std::fs::File;
use std::io::{self, Read};
use std::sync::atomic::{Ordering, fence};
use std::thread;
use std::time::{Duration, Instant};

use crate::sys::{self, PAGE, Shared};
use crate::vfio::Function;

// Registers.
const CAP: usize = 0x00;
const CC: usize = 0x14;
const CSTS: usize = 0x1c;
const AQA: usize = 0x24;
const ASQ: usize = 0x28;
const ACQ: usize = 0x30;
const DOORBELLS: usize = 0x1000;

/// Enable, I/O submission entries of 2^6 and completion entries of 2^4 bytes, pages of 4 KiB.
const CC_ENABLE: u32 = 1 | 6 << 16 | 4 << 20;
/// Normal shutdown.
const CC_SHUTDOWN: u32 = 1 << 14;
const CSTS_READY: u32 = 1;
const CSTS_FATAL: u32 = 2;
const CSTS_SHUTDOWN_MASK: u32 = 3 << 2;
const CSTS_SHUTDOWN_DONE: u32 = 2 << 2;

// Admin commands and what they are given.
const DELETE_SQ: u32 = 0x00;
const CREATE_SQ: u32 = 0x01;
const DELETE_CQ: u32 = 0x04;
const CREATE_CQ: u32 = 0x05;
const IDENTIFY: u32 = 0x06;
const CNS_NAMESPACE: u32 = 0;
const CNS_CONTROLLER: u32 = 1;
const CNS_ACTIVE: u32 = 2;
const PHYSICALLY_CONTIGUOUS: u32 = 1;
const CQ_INTERRUPTS: u32 = 2;
// NVM command.
const READ: u32 = 0x02;

/// Entries of each queue: one page of submissions.
const ENTRIES: u32 = 64;
/// The I/O queues' identifier and interrupt vector.
const IO: u32 = 1;

/// Where the function sees our memory: above the RAM of any guest that this runs in, so that no
/// address there is right by accident, and inside of the smallest address width of VT-d (39 bits).
const IOVA: u64 = 0x10_0000_0000;

// Pages of that memory.
const ADMIN_SQ: usize = 0;
const ADMIN_CQ: usize = PAGE;
const IO_SQ: usize = 2 * PAGE;
const IO_CQ: usize = 3 * PAGE;
const ANSWER: usize = 4 * PAGE;
const PRP_LIST: usize = 5 * PAGE;
const DATA: usize = 16 * PAGE;
/// Most that one command reads.
const DATA_MAX: usize = 128 << 10;

/// How long a command may take.
const PATIENCE: Duration = Duration::from_secs(20);

/// The status field of a completion: code type and code.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Status(pub u16);

impl Status {
    /// Successful completion.
    pub const SUCCESS: Self = Self(0);

    /// Status code type.
    pub fn code_type(self) -> u16 {
        self.0 >> 8 & 7
    }

    /// Status code.
    pub fn code(self) -> u16 {
        self.0 & 0xff
    }

    fn ok(self, what: &str) -> io::Result<()> {
        match self {
            Self::SUCCESS => Ok(()),
            status => Err(io::Error::other(format!(
                "{what}: status code type {:#x}, code {:#04x}",
                status.code_type(),
                status.code()
            ))),
        }
    }
}

/// A submission and a completion queue.
struct Pair {
    id: u32,
    sq: usize,
    cq: usize,
    tail: u32,
    head: u32,
    phase: bool,
    interrupt: Option<File>,
    interrupts: u64,
}

impl Pair {
    fn new(id: u32, sq: usize, cq: usize, interrupt: Option<File>) -> Self {
        Self {
            id,
            sq,
            cq,
            tail: 0,
            head: 0,
            phase: true,
            interrupt,
            interrupts: 0,
        }
    }
}

/// What the namespace holds.
#[derive(Debug, Clone, Copy)]
pub struct Namespace {
    /// Its identifier.
    pub id: u32,
    /// Its size in blocks.
    pub blocks: u64,
    /// The size of a block in bytes.
    pub block: usize,
}

/// A controller that runs.
pub struct Controller {
    // The function comes after what it can reach, which is unmapped in `stop`.
    registers: Shared,
    memory: Shared,
    function: Function,
    stride: usize,
    admin: Pair,
    io: Pair,
    next_id: u32,
    /// Model, serial number and firmware revision.
    pub names: [String; 3],
    /// The first active namespace.
    pub namespace: Namespace,
    chunk: usize,
}

impl Controller {
    /// Resets the controller and makes it ready for reads. Completions are announced by MSI-X, or
    /// looked for if `poll`.
    pub fn start(function: Function, poll: bool) -> io::Result<Self> {
        let registers = function.bar(0)?;
        let memory = Shared::anonymous(DATA + DATA_MAX)?;
        function.map(&memory, IOVA)?;
        let [admin, io] = match poll {
            true => [None, None],
            false => function.enable_msix()?.map(Some),
        };
        let capabilities = registers.read64(CAP);
        let mut controller = Self {
            stride: 4 << (capabilities >> 32 & 0xf),
            admin: Pair::new(0, ADMIN_SQ, ADMIN_CQ, admin),
            io: Pair::new(IO, IO_SQ, IO_CQ, io),
            next_id: 0,
            names: [const { String::new() }; 3],
            namespace: Namespace {
                id: 0,
                blocks: 0,
                block: 0,
            },
            chunk: DATA_MAX,
            registers,
            memory,
            function,
        };
        controller.enable(capabilities)?;
        controller.identify()?;
        controller.create_queues()?;
        Ok(controller)
    }

    fn enable(&self, capabilities: u64) -> io::Result<()> {
        let entries = (capabilities & 0xffff) + 1;
        if entries < u64::from(ENTRIES) {
            return Err(io::Error::other(format!(
                "queues of only {entries} entries"
            )));
        }
        // CAP.TO is in units of 500 ms.
        let timeout = Duration::from_millis(500) * (capabilities >> 24 & 0xff) as u32;
        let registers = &self.registers;
        registers.write32(CC, 0);
        self.until(timeout, "reset", |csts| csts & CSTS_READY == 0)?;
        registers.write32(AQA, (ENTRIES - 1) << 16 | (ENTRIES - 1));
        registers.write64(ASQ, IOVA + ADMIN_SQ as u64);
        registers.write64(ACQ, IOVA + ADMIN_CQ as u64);
        registers.write32(CC, CC_ENABLE);
        self.until(timeout, "start", |csts| csts & CSTS_READY != 0)
    }

    fn until(&self, timeout: Duration, what: &str, done: impl Fn(u32) -> bool) -> io::Result<()> {
        let start = Instant::now();
        loop {
            let csts = self.registers.read32(CSTS);
            if csts & CSTS_FATAL != 0 {
                return Err(io::Error::other(format!("{what}: fatal status")));
            }
            if done(csts) {
                return Ok(());
            }
            if start.elapsed() > timeout.max(PATIENCE) {
                return Err(io::Error::other(format!("{what}: CSTS stays {csts:#x}")));
            }
            thread::yield_now();
        }
    }

    fn identify(&mut self) -> io::Result<()> {
        let identify = |controller: &mut Self, namespace, cns| {
            let command = command(IDENTIFY, namespace, IOVA + ANSWER as u64, 0, [cns, 0, 0]);
            let status = controller.submit(Queue::Admin, command)?;
            status.ok("identify")?;
            Ok::<_, io::Error>(controller.memory.bytes(ANSWER, PAGE))
        };
        let answer = identify(self, 0, CNS_CONTROLLER)?;
        let text = |from, to| String::from_utf8_lossy(&answer[from..to]).trim().to_owned();
        self.names = [text(24, 64), text(4, 24), text(64, 72)];
        // MDTS, in units of the smallest page (CAP.MPSMIN is 0 wherever 4 KiB pages work).
        let largest = match answer[77] {
            0 => DATA_MAX,
            shift => PAGE.checked_shl(shift.into()).unwrap_or(DATA_MAX),
        };
        self.chunk = largest.min(DATA_MAX);

        let active = identify(self, 0, CNS_ACTIVE)?;
        let id = u32::from_le_bytes(array(&active, 0));
        if id == 0 {
            return Err(io::Error::other("there is no active namespace"));
        }
        let answer = identify(self, id, CNS_NAMESPACE)?;
        let format = usize::from(answer[26] & 0xf);
        let shift = u32::from(answer[128 + 4 * format + 2]);
        self.namespace = Namespace {
            id,
            blocks: u64::from_le_bytes(array(&answer, 0)),
            block: 1 << shift,
        };
        match shift {
            9..=12 => Ok(()),
            _ => Err(io::Error::other(format!("blocks of 2^{shift} bytes"))),
        }
    }

    fn create_queues(&mut self) -> io::Result<()> {
        let size = (ENTRIES - 1) << 16 | IO;
        let mut flags = PHYSICALLY_CONTIGUOUS;
        if self.io.interrupt.is_some() {
            flags |= CQ_INTERRUPTS | IO << 16;
        }
        for (opcode, at, flags) in [
            (CREATE_CQ, IO_CQ, flags),
            (CREATE_SQ, IO_SQ, PHYSICALLY_CONTIGUOUS | IO << 16),
        ] {
            let command = command(opcode, 0, IOVA + at as u64, 0, [size, flags, 0]);
            self.submit(Queue::Admin, command)?.ok("create a queue")?;
        }
        Ok(())
    }

    /// Reads `blocks` blocks from `lba` on.
    pub fn read(&mut self, lba: u64, blocks: u64) -> io::Result<Vec<u8>> {
        let end = lba.checked_add(blocks);
        if end.is_none_or(|end| end > self.namespace.blocks) {
            return Err(io::Error::other(format!(
                "the namespace has {} blocks",
                self.namespace.blocks
            )));
        }
        let block = self.namespace.block;
        let mut data = Vec::new();
        let (mut lba, mut left) = (lba, blocks);
        while left > 0 {
            let count = left.min((self.chunk / block) as u64);
            let length = count as usize * block;
            let (first, second) = self.prp(length);
            self.read_command(lba, count as u32, first, second)?
                .ok("read")?;
            data.extend(self.memory.bytes(DATA, length));
            lba += count;
            left -= count;
        }
        Ok(data)
    }

    /// PRP entries for the first `length` bytes of the data (Base Specification section 4.1.1).
    fn prp(&self, length: usize) -> (u64, u64) {
        let page = |number: usize| IOVA + (DATA + number * PAGE) as u64;
        let second = match length.div_ceil(PAGE) {
            0 | 1 => 0,
            2 => page(1),
            pages => {
                for number in 1..pages {
                    let at = PRP_LIST + (number - 1) * 8;
                    self.memory.write64(at, page(number));
                }
                IOVA + PRP_LIST as u64
            }
        };
        (page(0), second)
    }

    /// Reads one block to an address in the function's view that need not be mapped.
    pub fn read_to(&mut self, lba: u64, iova: u64) -> io::Result<Status> {
        self.read_command(lba, 1, iova, 0)
    }

    fn read_command(
        &mut self,
        lba: u64,
        blocks: u32,
        first: u64,
        second: u64,
    ) -> io::Result<Status> {
        let words = [lba as u32, (lba >> 32) as u32, blocks - 1];
        let command = command(READ, self.namespace.id, first, second, words);
        self.submit(Queue::Io, command)
    }

    /// Whether the function's domain maps something of this page.
    pub fn is_mapped(&self, iova: u64) -> bool {
        (IOVA..IOVA + self.memory.len() as u64).contains(&iova)
    }

    /// Interrupts that came, for admin and I/O completions.
    pub fn interrupts(&self) -> [u64; 2] {
        [self.admin.interrupts, self.io.interrupts]
    }

    fn submit(&mut self, queue: Queue, mut command: [u32; 16]) -> io::Result<Status> {
        let id = self.next_id & 0xffff;
        self.next_id = self.next_id.wrapping_add(1);
        command[0] |= id << 16;
        let pair = match queue {
            Queue::Admin => &mut self.admin,
            Queue::Io => &mut self.io,
        };
        for (index, word) in command.into_iter().enumerate() {
            let at = pair.sq + pair.tail as usize * 64 + index * 4;
            self.memory.write32(at, word);
        }
        pair.tail = (pair.tail + 1) % ENTRIES;
        // The entry is in memory before the function is told.
        fence(Ordering::SeqCst);
        let doorbell = |index: u32| DOORBELLS + index as usize * self.stride;
        self.registers.write32(doorbell(2 * pair.id), pair.tail);

        let start = Instant::now();
        let at = pair.cq + pair.head as usize * 16;
        let last = loop {
            // With interrupts nothing else is looked at: a completion without one is an error.
            if let Some(event) = &mut pair.interrupt {
                if !sys::wait_readable(event, PATIENCE.as_millis() as i32)? {
                    return Err(io::Error::other("no interrupt comes"));
                }
                pair.interrupts += take(event)?;
            }
            let word = self.memory.read32(at + 12);
            if (word >> 16 & 1 == 1) == pair.phase {
                break word;
            }
            if start.elapsed() > PATIENCE {
                return Err(io::Error::other("a command does not complete"));
            }
            thread::yield_now();
        };
        fence(Ordering::SeqCst);
        pair.head = (pair.head + 1) % ENTRIES;
        pair.phase ^= pair.head == 0;
        self.registers.write32(doorbell(2 * pair.id + 1), pair.head);
        if last & 0xffff != id {
            return Err(io::Error::other("a completion of an unknown command"));
        }
        Ok(Status((last >> 17) as u16 & 0x7ff))
    }

    /// Removes the queues, shuts the controller down and takes everything away from it.
    pub fn stop(mut self) -> io::Result<()> {
        for opcode in [DELETE_SQ, DELETE_CQ] {
            let command = command(opcode, 0, 0, 0, [IO, 0, 0]);
            self.submit(Queue::Admin, command)?.ok("delete a queue")?;
        }
        self.registers.write32(CC, CC_ENABLE | CC_SHUTDOWN);
        self.until(PATIENCE, "shutdown", |csts| {
            csts & CSTS_SHUTDOWN_MASK == CSTS_SHUTDOWN_DONE
        })?;
        self.registers.write32(CC, 0);
        self.until(PATIENCE, "stop", |csts| csts & CSTS_READY == 0)?;
        if self.admin.interrupt.is_some() {
            self.function.disable_msix()?;
        }
        self.function.unmap(&self.memory, IOVA)
    }
}

#[derive(Debug, Clone, Copy)]
enum Queue {
    Admin,
    Io,
}

/// A submission entry: opcode, namespace, PRP entries and command words 10 to 12.
fn command(opcode: u32, namespace: u32, first: u64, second: u64, words: [u32; 3]) -> [u32; 16] {
    let mut entry = [0; 16];
    entry[0] = opcode;
    entry[1] = namespace;
    entry[6] = first as u32;
    entry[7] = (first >> 32) as u32;
    entry[8] = second as u32;
    entry[9] = (second >> 32) as u32;
    entry[10..13].copy_from_slice(&words);
    entry
}

fn take(event: &mut File) -> io::Result<u64> {
    let mut count = [0; 8];
    event.read_exact(&mut count)?;
    Ok(u64::from_ne_bytes(count))
}

fn array<const N: usize>(bytes: &[u8], at: usize) -> [u8; N] {
    std::array::from_fn(|index| bytes[at + index])
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn commands_have_their_fields_where_they_belong() {
        let entry = command(READ, 7, 0x1_2345_6000, 0x2_0000_1000, [8, 9, 10]);
        assert_eq!(entry[..2], [READ, 7]);
        assert_eq!(entry[6..10], [0x2345_6000, 1, 0x1000, 2]);
        assert_eq!(entry[10..13], [8, 9, 10]);
        assert_eq!(entry[2..6], [0; 4]);
    }

    #[test]
    fn a_status_says_what_failed() {
        // Status code type 2 (media and data integrity), code 81h; do not retry.
        let error = Status(0x281).ok("read").unwrap_err().to_string();
        assert_eq!(error, "read: status code type 0x2, code 0x81");
        assert!(Status::SUCCESS.ok("read").is_ok());
    }
}

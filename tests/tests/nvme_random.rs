//! NVMe: a random mix of commands on several queues, against a model that is an array.

use std::collections::HashMap;
use std::sync::Arc;

use devices::block::{BlockBackend, FileBackend, FileOptions, MemoryBackend};
use devices::nvme::spec::command::{feature, nvm};
use proptest::prelude::*;
use proptest::test_runner::{Config as Runs, TestRunner};
use tests::Machine;
use tests::nvme::{Command, Driver, Pair, Transfer, attach, config};

const DEVICE: u8 = 3;
const BLOCKS: usize = 512;
const BLOCK: usize = 512;
/// Blocks of the longest command.
const LONGEST: usize = 48;
/// Commands in flight on one queue.
const DEPTH: usize = 6;

#[derive(Clone, Copy, Debug)]
enum Op {
    Read,
    Write {
        seed: u8,
        fua: bool,
    },
    Zeroes {
        unmap: bool,
    },
    Deallocate,
    Flush,
    /// On the admin queue.
    Cache {
        on: bool,
    },
    /// Wait for everything on this queue.
    Barrier,
}

#[derive(Clone, Copy, Debug)]
struct Step {
    queue: usize,
    lba: usize,
    blocks: usize,
    op: Op,
}

fn steps() -> impl Strategy<Value = Vec<Step>> {
    let op = prop_oneof![
        6 => Just(Op::Read),
        6 => (any::<u8>(), any::<bool>()).prop_map(|(seed, fua)| Op::Write { seed, fua }),
        2 => any::<bool>().prop_map(|unmap| Op::Zeroes { unmap }),
        1 => Just(Op::Deallocate),
        1 => Just(Op::Flush),
        1 => any::<bool>().prop_map(|on| Op::Cache { on }),
        1 => Just(Op::Barrier),
    ];
    let step = (0..3usize, 0..BLOCKS, 1..=LONGEST, op).prop_map(|(queue, lba, blocks, op)| Step {
        queue,
        lba,
        blocks: blocks.min(BLOCKS - lba),
        op,
    });
    proptest::collection::vec(step, 1..200)
}

/// What must be read from a block.
#[derive(Clone, Copy, Debug, PartialEq)]
enum Content {
    Is(u8),
    /// Deallocated: zero, or what it was.
    ZeroOr(u8),
}

impl Content {
    fn allows(self, byte: u8) -> bool {
        match self {
            Content::Is(seed) => byte == seed,
            Content::ZeroOr(seed) => byte == 0 || byte == seed,
        }
    }
}

/// A command under way: which blocks, and what a read must return.
struct Flight {
    blocks: std::ops::Range<usize>,
    buffer: usize,
    expect: Option<Vec<Content>>,
}

struct Bench {
    driver: Driver,
    pairs: Vec<Pair>,
    buffers: Vec<Transfer>,
    free: Vec<usize>,
    flights: HashMap<(usize, u16), Flight>,
    model: Vec<Content>,
    _nvme: Arc<devices::nvme::Nvme>,
}

impl Bench {
    fn new(disk: Arc<dyn BlockBackend>) -> Bench {
        let machine = Machine::new();
        let nvme = attach(&machine, DEVICE, config(vec![(1, disk, 512)]));
        let mut driver = Driver::bring_up(&machine, DEVICE);
        // Small queues wrap often; the last has no interrupts.
        let mut pairs: Vec<Pair> = (1..=2).map(|id| driver.create_pair(id, 8)).collect();
        pairs.push(driver.create_polled_pair(3, 9));
        let len = (LONGEST * BLOCK) as u64;
        let buffers: Vec<Transfer> = (0..3 * DEPTH as u64)
            .map(|i| Transfer::with_layout(&machine, (i * 484 % 4096) & !3, len, i * 31 % 512))
            .collect();
        Bench {
            free: (0..buffers.len()).collect(),
            driver,
            pairs,
            buffers,
            flights: HashMap::new(),
            model: vec![Content::Is(0); BLOCKS],
            _nvme: nvme,
        }
    }

    fn in_flight(&self, queue: usize) -> usize {
        self.flights.keys().filter(|key| key.0 == queue).count()
    }

    /// Takes one completion of a queue and checks what it read.
    fn take(&mut self, queue: usize) {
        let pair = &mut self.pairs[queue];
        let cqe = pair.cq.wait();
        pair.cq.ring();
        assert!(cqe.status.is_success(), "{:?}", cqe.status);
        let flight = self
            .flights
            .remove(&(queue, cqe.cid))
            .expect("a command of ours");
        if let Some(expect) = flight.expect {
            let data = self.buffers[flight.buffer].get();
            for (index, (content, block)) in expect.iter().zip(data.chunks(BLOCK)).enumerate() {
                let good = block.iter().all(|byte| *byte == block[0]) && content.allows(block[0]);
                let lba = flight.blocks.start + index;
                assert!(good, "block {lba} is {:#x}, not {content:?}", block[0]);
            }
        }
        self.free.push(flight.buffer);
    }

    /// The order of overlapping commands is the driver's business: it waits, as a file system does.
    fn wait_for(&mut self, blocks: &std::ops::Range<usize>) {
        loop {
            let clash = self.flights.iter().find(|(_, flight)| {
                flight.blocks.start < blocks.end && blocks.start < flight.blocks.end
            });
            let Some((&(queue, _), _)) = clash else {
                return;
            };
            self.take(queue);
        }
    }

    fn drain(&mut self, queue: usize) {
        while self.in_flight(queue) > 0 {
            self.take(queue);
        }
    }

    fn step(&mut self, step: Step) {
        let Step {
            queue,
            lba,
            blocks,
            op,
        } = step;
        let range = lba..lba + blocks;
        match op {
            Op::Barrier => return self.drain(queue),
            Op::Cache { on } => {
                let command = Command::set_feature(feature::VOLATILE_WRITE_CACHE, on.into());
                self.driver.admin.succeed(command);
                return;
            }
            _ => {}
        }
        if !matches!(op, Op::Flush) {
            self.wait_for(&range);
        }
        while self.in_flight(queue) >= DEPTH {
            self.take(queue);
        }
        let buffer = self
            .free
            .pop()
            .expect("a buffer for each command in flight");
        let bytes = match op {
            Op::Deallocate => 2 * 16,
            _ => blocks * BLOCK,
        };
        self.buffers[buffer].resize(bytes as u64);
        let data = &self.buffers[buffer];
        let (at, count) = (lba as u64, u32::try_from(blocks).unwrap());
        let mut expect = None;
        let mut covers = range.clone();
        let command = match op {
            Op::Read => {
                data.set(&[0xee; LONGEST * BLOCK]);
                expect = Some(self.model[range].to_vec());
                Command::blocks(nvm::READ, 1, at, count).data(data)
            }
            Op::Write { seed, fua } => {
                data.set(&vec![seed; blocks * BLOCK]);
                self.model[range].fill(Content::Is(seed));
                let command = Command::blocks(nvm::WRITE, 1, at, count).data(data);
                if fua { command.fua() } else { command }
            }
            Op::Zeroes { unmap } => {
                self.model[range].fill(Content::Is(0));
                let deac = if unmap { nvm::WRITE_ZEROES_DEAC } else { 0 };
                Command::write_zeroes(1, at, count).or(12, deac)
            }
            Op::Deallocate => {
                for content in &mut self.model[range] {
                    let (Content::Is(seed) | Content::ZeroOr(seed)) = *content;
                    *content = Content::ZeroOr(seed);
                }
                let half = count / 2;
                let ranges = [(at, half), (at + u64::from(half), count - half)];
                Command::deallocate(1, data, &ranges)
            }
            _ => {
                covers = 0..0;
                Command::flush(1)
            }
        };
        let pair = &mut self.pairs[queue];
        let cid = pair.sq.push(command);
        pair.sq.ring();
        let flight = Flight {
            blocks: covers,
            buffer,
            expect,
        };
        self.flights.insert((queue, cid), flight);
    }

    fn run(&mut self, steps: &[Step]) {
        for step in steps {
            self.step(*step);
        }
        for queue in 0..self.pairs.len() {
            self.drain(queue);
        }
        for lba in (0..BLOCKS).step_by(LONGEST) {
            let blocks = LONGEST.min(BLOCKS - lba);
            let (queue, op) = (0, Op::Read);
            self.step(Step {
                queue,
                lba,
                blocks,
                op,
            });
        }
        self.drain(0);
    }
}

fn check(make: impl Fn() -> Arc<dyn BlockBackend>) {
    let runs = Runs {
        cases: 24,
        failure_persistence: None,
        ..Runs::default()
    };
    let mut runner = TestRunner::new(runs);
    let result = runner.run(&steps(), |steps| {
        Bench::new(make()).run(&steps);
        Ok(())
    });
    result.unwrap_or_else(|error| panic!("{error}"));
}

#[test]
fn random_commands_on_memory() {
    check(|| MemoryBackend::new((BLOCKS * BLOCK) as u64).unwrap());
}

#[test]
fn random_commands_on_a_file() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("disk");
    check(|| {
        let file = std::fs::File::create(&path).unwrap();
        file.set_len((BLOCKS * BLOCK) as u64).unwrap();
        FileBackend::open(&FileOptions::new(&path)).unwrap()
    });
}

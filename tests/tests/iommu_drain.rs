//! After an invalidation has been waited for, nothing reaches the old page: no worker, and no I/O that
//! was in flight.

#![allow(clippy::cast_possible_truncation, reason = "small numbers of a test")]

use std::io::Write;
use std::os::fd::AsRawFd;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::thread;

use devices::nvme::spec::command::nvm;
use io_uring::{IoUring, opcode, types};
use iommu::{
    Access, Context, DmaError, DmaMemory, DmaSpace, FaultReason, Gpa, GuestRam, Invalidation,
    Invalidations, IotlbGeometry, Iova, Mapping, PinnedBuffers, Remapper, SourceId, Stage,
    Upstream,
};
use tests::nvme::{Command, Driver, Transfer, attach, config};
use tests::{Machine, PAGE_SIZE, Remapping, Side};
use vm_memory::{Bytes, GuestAddress};

/// Pages of the input address space, and of RAM.
const PAGES: u64 = 48;
const DOMAIN: u16 = 7;
const SOURCE: SourceId = SourceId(0x18);
const CANARY: u64 = 0xdead_beef_cafe_f00d;

/// A unit whose table is an array: which page of RAM each input page is, plus one; 0: none.
struct Table([AtomicU64; PAGES as usize]);

impl Remapper for Table {
    fn context(&self, _: SourceId, _: Iova, _: Access) -> Result<Context, DmaError> {
        Ok(Context {
            domain: DOMAIN,
            stage: Stage::Second {
                table: Gpa(0),
                levels: 3,
                access_dirty: false,
                walk_snoop: true,
            },
            fault_processing_disable: false,
        })
    }

    fn walk(&self, _: SourceId, _: &Context, iova: Iova, _: Access) -> Result<Mapping, DmaError> {
        let page = iova.0 / PAGE_SIZE;
        let entry = self
            .0
            .get(page as usize)
            .map_or(0, |e| e.load(Ordering::Acquire));
        let Some(frame) = entry.checked_sub(1) else {
            return Err(DmaError::Fault(iova, FaultReason(6)));
        };
        Ok(Mapping {
            iova: Iova(page * PAGE_SIZE),
            gpa: Gpa(frame * PAGE_SIZE),
            shift: 12,
            read: true,
            write: true,
        })
    }

    fn beyond_width(&self, _: SourceId, _: &Context, iova: Iova, _: Access) -> DmaError {
        DmaError::Fault(iova, FaultReason(4))
    }

    fn interrupt_write(&self, _: SourceId, _: u64, _: u32) -> Result<(), DmaError> {
        unreachable!("no address of these tests is in the interrupt range")
    }
}

struct Bench {
    table: Arc<Table>,
    invalidations: Arc<Invalidations>,
    ram: GuestRam,
    space: Arc<DmaSpace>,
}

impl Bench {
    /// The first half of the input pages is mapped, one to one.
    fn new(iotlb: IotlbGeometry) -> Bench {
        let table = Arc::new(Table(std::array::from_fn(|page| {
            AtomicU64::new(if page < PAGES as usize / 2 {
                page as u64 + 1
            } else {
                0
            })
        })));
        let ram =
            GuestRam::from_ranges(&[(GuestAddress(0), (PAGES * PAGE_SIZE) as usize)]).unwrap();
        let invalidations = Invalidations::new();
        let remapper = Arc::clone(&table) as Arc<dyn Remapper>;
        let upstream =
            Upstream::memory(ram.clone()).below(remapper, Arc::clone(&invalidations), iotlb);
        let space = DmaSpace::new(&upstream, SOURCE);
        space.set_bus_master(true);
        Bench {
            table,
            invalidations,
            ram,
            space,
        }
    }

    fn word(&self, frame: u64, word: u64) -> u64 {
        let at = GuestAddress(frame * PAGE_SIZE + word * 8);
        self.ram.load(at, Ordering::Relaxed).unwrap()
    }

    fn fill(&self, frame: u64, value: u64) {
        for word in 0..PAGE_SIZE / 8 {
            let at = GuestAddress(frame * PAGE_SIZE + word * 8);
            self.ram.store(value, at, Ordering::Relaxed).unwrap();
        }
    }

    /// Unmaps, invalidates, waits, as a driver in strict mode does. Returns the page of RAM.
    fn revoke(&self, page: u64, random: u64) -> Option<u64> {
        let entry = self.table.0[page as usize].swap(0, Ordering::AcqRel);
        let frame = entry.checked_sub(1)?;
        let domain = DOMAIN;
        let since = self.invalidations.sequence();
        let mut to = since;
        let kinds = match random % 8 {
            0 => vec![Invalidation::Everything],
            1 => vec![Invalidation::Contexts, Invalidation::Translations],
            2 => vec![Invalidation::DomainTranslations { domain }],
            // More than the log holds.
            3 if random % 64 < 8 => {
                let mut many = vec![Invalidation::DomainTranslations { domain }];
                many.extend([Invalidation::Nothing; 300]);
                many
            }
            _ => vec![Invalidation::PageTranslations {
                domain,
                start: Iova(page * PAGE_SIZE),
                last: Iova(page * PAGE_SIZE + 0xfff),
            }],
        };
        for kind in kinds {
            to = self.invalidations.publish(kind);
        }
        self.invalidations.wait_drained(since, to);
        Some(frame)
    }
}

fn random(state: &mut u64) -> u64 {
    *state ^= *state << 13;
    *state ^= *state >> 7;
    *state ^= *state << 17;
    *state >> 8
}

/// Writes and reads at random addresses, in sections and through pins that outlive them.
fn work(mem: &DmaMemory, seed: u64, stop: &AtomicBool) -> (u64, u64) {
    let mut state = seed;
    let (mut done, mut refused) = (0, 0);
    let mut pins = PinnedBuffers::new();
    while !stop.load(Ordering::Relaxed) {
        let mut note = |result: Result<(), DmaError>| match result {
            Ok(()) => done += 1,
            Err(DmaError::Fault(..)) => refused += 1,
            Err(other) => panic!("{other}"),
        };
        let section = mem.section();
        for _ in 0..random(&mut state) % 24 {
            let at = Iova(random(&mut state) % (PAGES * PAGE_SIZE / 8) * 8);
            if random(&mut state).is_multiple_of(4) {
                note(
                    mem.read_obj::<u64>(at)
                        .map(|value| assert_ne!(value, CANARY)),
                );
            } else {
                note(mem.write_obj(at, 1u64));
            }
        }
        let at = Iova(random(&mut state) % ((PAGES - 2) * PAGE_SIZE));
        note(pins.push(mem, at, random(&mut state) % PAGE_SIZE, Access::Write));
        drop(section);
        // As a disk does, some time later.
        for _ in 0..random(&mut state) % 8 {
            thread::yield_now();
            pins.copy_in(0, &[2; 64]);
            let mut seen = [0; 8];
            if pins.copy_out(0, &mut seen) == 8 {
                assert_ne!(u64::from_le_bytes(seen), CANARY);
            }
        }
        pins.release();
    }
    (done, refused)
}

/// Tells the workers to end when it is dropped.
struct Stop<'a>(&'a AtomicBool);

impl Drop for Stop<'_> {
    fn drop(&mut self) {
        self.0.store(true, Ordering::Relaxed);
    }
}

#[test]
fn an_unmapped_page_is_never_touched_after_its_drain() {
    for geometry in [(4, 2), (64, 4)] {
        let (sets, ways) = geometry;
        let bench = Bench::new(IotlbGeometry { sets, ways });
        let stop = AtomicBool::new(false);
        thread::scope(|scope| {
            let workers = [11, 22].map(|seed| {
                let mem = bench.space.view();
                let stop = &stop;
                scope.spawn(move || work(&mem, seed, stop))
            });
            // Also when an assertion below fails: the scope waits for the workers.
            let _stop = Stop(&stop);
            let mut state = 33;
            let mut free: Vec<u64> = (PAGES / 2..PAGES).collect();
            for _ in 0..3000 {
                let page = random(&mut state) % PAGES;
                if let Some(frame) = bench.revoke(page, random(&mut state)) {
                    bench.fill(frame, CANARY);
                    thread::yield_now();
                    for word in 0..PAGE_SIZE / 8 {
                        assert_eq!(bench.word(frame, word), CANARY, "page {page}, word {word}");
                    }
                    bench.fill(frame, 0);
                    free.push(frame);
                } else {
                    let frame = free.swap_remove(random(&mut state) as usize % free.len());
                    bench.table.0[page as usize].store(frame + 1, Ordering::Release);
                }
            }
            stop.store(true, Ordering::Relaxed);
            for worker in workers {
                let (done, refused) = worker.join().unwrap();
                assert!(
                    done > 0 && refused > 0,
                    "{done} accesses, {refused} refused"
                );
            }
        });
        let stats = bench.space.stats();
        assert!(
            stats.iotlb_hits > 0 && stats.entries_dropped > 0,
            "{stats:?}"
        );
        assert_eq!(stats.translations, stats.iotlb_hits + stats.iotlb_misses);
        assert_eq!(stats.page_walks, stats.iotlb_misses);
    }
}

/// Without an invalidation a stale translation goes on being used: a driver that forgets one must see
/// what it would on hardware.
#[test]
fn a_stale_translation_is_used_until_it_is_invalidated() {
    let bench = Bench::new(IotlbGeometry::default());
    let mem = bench.space.view();
    mem.write_obj(Iova(0x1000), 1u32).unwrap();
    bench.table.0[1].store(3, Ordering::Release);
    mem.write_obj(Iova(0x1000), 5u32).unwrap();
    assert_eq!((bench.word(1, 0), bench.word(2, 0)), (5, 0));
    let to = bench.invalidations.publish(Invalidation::PageTranslations {
        domain: DOMAIN,
        start: Iova(0x1000),
        last: Iova(0x1fff),
    });
    bench.invalidations.wait_drained(to - 1, to);
    mem.write_obj(Iova(0x1000), 6u32).unwrap();
    assert_eq!((bench.word(1, 0), bench.word(2, 0)), (5, 6));
    let stats = bench.space.stats();
    assert_eq!((stats.iotlb_hits, stats.iotlb_misses), (1, 2));
    assert_eq!((stats.walk_levels, stats.entries_dropped), (6, 1));
    assert_eq!((stats.context_misses, stats.context_hits), (1, 2));
    // A fault is not cached: what is mapped now needs no invalidation.
    let unmapped = Iova(40 * PAGE_SIZE);
    assert!(matches!(
        mem.read_obj::<u8>(unmapped),
        Err(DmaError::Fault(..))
    ));
    bench.table.0[40].store(2, Ordering::Release);
    assert_eq!(mem.read_obj::<u8>(unmapped), Ok(5));
    drop(mem);
    assert_eq!(
        bench.space.stats().iotlb_misses,
        4,
        "the view's counts outlive it"
    );
}

/// The kernel reads into a pinned page: a read from a pipe that is empty, so that it is in flight for
/// as long as the test wants.
#[test]
fn a_read_in_flight_holds_up_its_page_and_no_other() {
    let bench = Bench::new(IotlbGeometry::default());
    let (reader, mut writer) = std::io::pipe().unwrap();
    let mut ring = IoUring::new(4).unwrap();
    let mem = bench.space.view();
    let mut pins = PinnedBuffers::new();
    pins.push(&mem, Iova(5 * PAGE_SIZE), PAGE_SIZE, Access::Write)
        .unwrap();
    let vecs = pins.iovecs();
    let read = opcode::Readv::new(
        types::Fd(reader.as_raw_fd()),
        vecs.as_ptr(),
        vecs.len() as u32,
    );
    // SAFETY: the list and the memory stay until the completion has been seen below.
    #[expect(unsafe_code, reason = "a raw submission")]
    unsafe {
        ring.submission().push(&read.build()).unwrap();
    }
    ring.submit().unwrap();

    // Another page is not held up.
    assert_eq!(bench.revoke(6, 4), Some(6));
    let drained = AtomicBool::new(false);
    let published = bench.invalidations.sequence();
    thread::scope(|scope| {
        let revoker = scope.spawn(|| {
            assert_eq!(bench.revoke(5, 4), Some(5));
            drained.store(true, Ordering::SeqCst);
            bench.fill(5, CANARY);
        });
        // The revoker has published, and waits.
        while bench.invalidations.sequence() == published {
            thread::yield_now();
        }
        // Pins that are made now, and released or not, change nothing for it.
        let mut late = PinnedBuffers::new();
        late.push(&mem, Iova(7 * PAGE_SIZE), PAGE_SIZE, Access::Write)
            .unwrap();
        assert!(matches!(
            late.push(&mem, Iova(5 * PAGE_SIZE), 8, Access::Write),
            Err(DmaError::Fault(..))
        ));
        assert!(!drained.load(Ordering::SeqCst), "the read is in flight");
        writer.write_all(&[7; PAGE_SIZE as usize]).unwrap();
        ring.submit_and_wait(1).unwrap();
        assert!(
            !drained.load(Ordering::SeqCst),
            "its memory is still pinned"
        );
        assert_eq!(bench.word(5, 511), 0x0707_0707_0707_0707);
        pins.release();
        revoker.join().unwrap();
        drop(late);
    });
    assert!((0..512).all(|word| bench.word(5, word) == CANARY));
}

/// A controller below a real unit: data moves through the tables, and what they forbid ends as a Data
/// Transfer Error, with a fault recorded and memory untouched.
#[test]
fn nvme_below_a_unit() {
    let machine = Machine::behind(Remapping::Pages);
    let disk = devices::block::MemoryBackend::new(1 << 20).unwrap();
    attach(&machine, 3, config(vec![(1, disk, 512)]));
    let mut driver = Driver::bring_up(&machine, 3);
    let mut pair = driver.create_polled_pair(1, 16);
    let memory = machine.remapped().unwrap();
    let mut run = |command| {
        pair.sq.push(command);
        pair.sq.ring();
        let cqe = loop {
            if let Some(cqe) = pair.cq.poll() {
                break cqe;
            }
            thread::yield_now();
        };
        pair.cq.ring();
        cqe.status.0
    };
    let data = Transfer::new(&machine, PAGE_SIZE);
    let other = machine.dma(Side::High, 1);
    let page = data.page(0).at(0);
    data.page(0).set_bytes(0, &[0x5a; PAGE_SIZE as usize]);
    let write = Command::blocks(nvm::WRITE, 1, 0, 8).data(&data);
    let read = Command::blocks(nvm::READ, 1, 0, 8).data(&data);
    assert_eq!(run(write), 0);
    // The same address now leads to another page.
    memory.map(page.0, other.at(0));
    let (since, to) = memory.invalidate(page.0);
    memory.invalidations().wait_drained(since, to);
    assert_eq!(run(read), 0);
    assert_eq!(other.bytes(0, 4096), [0x5a; 4096]);
    // And now nowhere.
    memory.unmap(page.0);
    let (since, to) = memory.invalidate(page.0);
    memory.invalidations().wait_drained(since, to);
    other.set_bytes(0, &[0; 4096]);
    let before = memory.unit().counters();
    let failed = run(read);
    assert_eq!(failed & 0x7ff, 0x04, "Data Transfer Error: {failed:#x}");
    assert_eq!(other.bytes(0, 4096), [0; 4096]);
    assert_ne!(
        format!("{before:?}"),
        format!("{:?}", memory.unit().counters())
    );
}

//! Nanoseconds per DMA of four bytes through a worker's view: look-up, translation and the load itself,
//! in sections of 64. The pages are visited in a random order that is the same each time.
//!
//! - `absent`: no unit. `pass-through`: a unit that leaves addresses as they are.
//! - `hits`: 192 pages, which the IOTLB holds. `misses`: 16384 pages, of which it holds few; each miss
//!   walks four levels of real tables in guest memory.
//! - `2 workers`: a second worker does the same beside. `storm`: another thread takes translations
//!   away all the time, and waits until that is done.

mod cores;

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;

use criterion::{BenchmarkId, Criterion, Throughput, criterion_group, criterion_main};
use iommu::{Bdf, BusMaster, DmaMemory, Iova};
use tests::{Machine, PAGE_SIZE, Remapping};

/// Accesses in a section.
const BATCH: usize = 64;
/// Pages from here on are visited: 1 MiB on.
const FIRST: u64 = 1 << 20;

/// Addresses in a random order, `pages` pages.
fn addresses(pages: u64) -> Vec<Iova> {
    let mut state = 0x2545_f491_4f6c_dd1d_u64;
    (0..8192)
        .map(|_| {
            state ^= state << 13;
            state ^= state >> 7;
            state ^= state << 17;
            let page = (state >> 16) % pages;
            // Not the same cache set in every page.
            Iova(place(page) + (state >> 40) % (PAGE_SIZE / 64) * 64)
        })
        .collect()
}

/// Where page `page` is: the first 12288 below 4 GiB, the others above.
fn place(page: u64) -> u64 {
    match page.checked_sub(12288) {
        None => FIRST + page * PAGE_SIZE,
        Some(high) => (4 << 30) + high * PAGE_SIZE,
    }
}

fn batch(mem: &DmaMemory, addresses: &[Iova]) -> u32 {
    let _section = mem.section();
    addresses
        .iter()
        .map(|&iova| mem.load::<u32>(iova, Ordering::Relaxed).expect("mapped"))
        .fold(0, u32::wrapping_add)
}

/// What goes on beside.
#[derive(Clone, Copy)]
enum Beside {
    Nothing,
    Worker,
    Storm,
}

fn run(c: &mut Criterion, name: &str, remapping: Remapping, pages: u64, beside: Beside) {
    let machine = Machine::behind(remapping);
    let source = Bdf::new(0, 3, 0).expect("slot").source_id();
    let master = BusMaster::new(machine.upstream(), source);
    master.dma.set_bus_master(true);
    let addresses = addresses(pages);
    let stop = Arc::new(AtomicBool::new(false));
    let other = {
        let (stop, addresses) = (Arc::clone(&stop), addresses.clone());
        let (mem, machine) = (master.dma.view(), Arc::clone(&machine));
        thread::spawn(move || match beside {
            Beside::Nothing => {}
            Beside::Worker => {
                let mut parts = addresses.chunks_exact(BATCH).cycle();
                while !stop.load(Ordering::Relaxed) {
                    std::hint::black_box(batch(&mem, parts.next().expect("endless")));
                }
            }
            Beside::Storm => {
                let memory = machine.remapped().expect("a unit");
                let mut pages = addresses.iter().cycle();
                while !stop.load(Ordering::Relaxed) {
                    let page = pages.next().expect("endless").0 & !(PAGE_SIZE - 1);
                    let (since, to) = memory.invalidate(page);
                    memory.invalidations().wait_drained(since, to);
                }
            }
        })
    };
    cores::apart();
    let mem = master.dma.view();
    let mut parts = addresses.chunks_exact(BATCH).cycle();
    let mut group = c.benchmark_group("iommu");
    group.throughput(Throughput::Elements(BATCH as u64));
    let kind = if pages > 256 { "misses" } else { "hits" };
    group.bench_function(BenchmarkId::new(name, kind), |b| {
        b.iter(|| batch(&mem, parts.next().expect("endless")));
    });
    group.finish();
    stop.store(true, Ordering::Relaxed);
    other.join().expect("the other thread");
}

fn views(c: &mut Criterion) {
    let (few, many) = (192, 16384);
    run(c, "absent", Remapping::Absent, few, Beside::Nothing);
    // What two workers on these cores cost each other without any unit.
    let name = "absent, 2 workers";
    run(c, name, Remapping::Absent, few, Beside::Worker);
    run(
        c,
        "pass-through",
        Remapping::PassThrough,
        few,
        Beside::Nothing,
    );
    for (beside, name) in [
        (Beside::Nothing, "1 worker"),
        (Beside::Worker, "2 workers"),
        (Beside::Storm, "storm"),
    ] {
        for pages in [few, many] {
            run(c, name, Remapping::Pages, pages, beside);
        }
    }
}

criterion_group!(benches, views);
criterion_main!(benches);

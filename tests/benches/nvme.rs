//! Nanoseconds per NVMe command on the null back end: doorbell, worker, completion, no interrupt.
//! The fake driver's own work (filling entries, polling the ring) is part of the figure.
//!
//! Without IOMMU and below one: pass-through, and second-stage pages of 4 KiB that its IOTLB holds,
//! which is what lazy mode is between two flushes.
//!
//! The worker spins for a while after its last work and so does the driver, so that with two free
//! cores no sleep and no wake-up is measured. Where the two must share a core, they give way to each
//! other, and the figures are those of the scheduler.

mod cores;

use std::time::Duration;

use criterion::{Criterion, Throughput, criterion_group, criterion_main};
use devices::block::NullBackend;
use devices::nvme::spec::command::nvm;
use devices::worker::PollPolicy;
use tests::nvme::{Command, Driver, Pair, Transfer, attach, config};
use tests::{Machine, Remapping};

fn batch(pair: &mut Pair, command: Command, depth: u32) {
    for _ in 0..depth {
        pair.sq.push(command);
    }
    pair.sq.ring();
    for _ in 0..depth {
        let mut spins = 0;
        while pair.cq.poll().is_none() {
            spins += 1;
            if spins % 256 == 0 {
                std::thread::yield_now();
            }
            std::hint::spin_loop();
        }
    }
    pair.cq.ring();
}

fn commands(c: &mut Criterion) {
    for (name, way) in [
        ("nvme/null", Remapping::Absent),
        ("nvme/null, pass-through", Remapping::PassThrough),
        ("nvme/null, remapped", Remapping::Pages),
    ] {
        commands_behind(c, name, way);
    }
}

fn commands_behind(c: &mut Criterion, name: &str, way: Remapping) {
    let machine = Machine::behind(way);
    let disk = NullBackend::new(1 << 30);
    let nvme = attach(&machine, 3, config(vec![(1, disk, 512)]));
    let mut driver = Driver::bring_up(&machine, 3);
    let mut pair = driver.create_polled_pair(1, 256);
    nvme.set_policy(PollPolicy::Adaptive {
        spin: Duration::from_micros(50),
    });
    cores::apart();
    let mut group = c.benchmark_group(name);
    for bytes in [4096u32, 131_072] {
        let data = Transfer::new(&machine, bytes.into());
        let read = Command::blocks(nvm::READ, 1, 0, bytes / 512).data(&data);
        for depth in [1, 32] {
            group.throughput(Throughput::Elements(depth.into()));
            group.bench_function(format!("read {bytes} B, QD{depth}"), |b| {
                b.iter(|| batch(&mut pair, read, depth));
            });
        }
    }
    group.finish();
}

criterion_group!(benches, commands);
criterion_main!(benches);

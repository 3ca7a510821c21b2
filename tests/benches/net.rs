//! Nanoseconds a packet through virtio-net on the loopback back end: transmit chain, header check,
//! copy into the loopback, receive into a posted buffer, both used rings, with no guest and no
//! notification in between, without IOMMU and below one (pass-through; second-stage pages of 4 KiB that
//! its IOTLB holds: what lazy mode is between two flushes). The fake driver's own stores (about six per packet) are included.

mod cores;

use std::hint::black_box;

use criterion::{BenchmarkId, Criterion, Throughput, criterion_group, criterion_main};
use devices::net::Loopback;
use devices::worker::PollPolicy;
use tests::virtio::{HEADER, NetDriver, NetSetup, desc_flags, features as f, frame, plain};
use tests::{Machine, Remapping};

const BATCH: u16 = 32;

fn loopback(criterion: &mut Criterion) {
    let mut group = criterion.benchmark_group("virtio-net loopback");
    let ways = [
        ("", Remapping::Absent),
        (", pass-through", Remapping::PassThrough),
        (", remapped", Remapping::Pages),
    ];
    for (name, features, way) in [("plain", 0), ("mergeable", f::MRG_RXBUF)]
        .into_iter()
        .flat_map(|(name, features)| ways.map(|way| (name, features, way)))
    {
        for len in [64usize, 1500] {
            let backend = Loopback::new(1).expect("loopback");
            let setup = NetSetup {
                features: features | f::EVENT_IDX,
                pairs: 1,
                size: 256,
            };
            let machine = Machine::behind(way.1);
            let mut driver = NetDriver::found_on(machine, backend, 1, |_| ());
            driver.begin(setup);
            driver.device.set_policy(PollPolicy::Busy);
            cores::apart();
            let (receive, transmit) = (&mut driver.receive[0], &mut driver.transmit[0]);
            let packet = plain(&frame(NetDriver::MAC, len, 1));
            let total = u32::try_from(packet.len()).expect("a short packet");
            for head in 0..BATCH {
                let at = u64::from(head) * NetDriver::BUFFER;
                transmit.buffers.set_bytes(at, &packet);
                let addr = transmit.buffers.at(at).0;
                transmit.queue.set_desc(head, addr, total, 0, 0);
                let addr = receive.buffers.at(at).0;
                let room = u32::try_from(NetDriver::BUFFER).expect("a short buffer");
                receive
                    .queue
                    .set_desc(head, addr, room, desc_flags::WRITE, 0);
            }
            group.throughput(Throughput::Elements(BATCH.into()));
            group.bench_function(
                BenchmarkId::new(name, format!("{len} B{}", way.0)),
                |bencher| {
                    bencher.iter(|| {
                        // No interrupts: the event is half a ring of indices away.
                        let index = receive.queue.avail_idx();
                        receive.queue.set_used_event(index.wrapping_add(1 << 15));
                        let sent = transmit.queue.avail_idx();
                        transmit.queue.set_used_event(sent.wrapping_add(1 << 15));
                        for head in 0..BATCH {
                            receive.queue.push_avail(head);
                        }
                        for head in 0..BATCH {
                            transmit.queue.push_avail(head);
                        }
                        let end = index.wrapping_add(BATCH);
                        // The worker has a core of its own, or this one while we yield.
                        let mut spins = 0u32;
                        while receive.queue.used_idx() != end {
                            spins += 1;
                            if spins.is_multiple_of(256) {
                                std::thread::yield_now();
                            }
                        }
                    });
                },
            );
            let got = receive.buffers.bytes(HEADER as u64, len);
            assert_eq!(black_box(got), packet[HEADER..], "the packets are real");
        }
    }
    group.finish();
}

criterion_group!(benches, loopback);
criterion_main!(benches);

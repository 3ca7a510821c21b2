//! Drivers that break the rules of a ring: the device stops, says so, and works again after a reset.

use std::sync::Arc;

use tests::DmaBuffer;
use tests::virtio::{
    DataQueue, GuestQueue, NetDriver, NetSetup, Part, Wire, common, desc_flags, eventually,
    features as f, frame, plain, status,
};

const SIZE: u16 = 16;

const SETUP: NetSetup = NetSetup {
    features: f::INDIRECT | f::CTRL_VQ | f::CTRL_RX | f::MRG_RXBUF,
    pairs: 1,
    size: SIZE,
};

fn start() -> (NetDriver, Arc<Wire>) {
    let wire = Wire::new(1);
    let driver = NetDriver::start(Arc::clone(&wire) as _, 1, SETUP);
    (driver, wire)
}

/// The driver broke a queue: the device needs a reset, stands still until it gets one, and then
/// works.
fn expect_broken(driver: &mut NetDriver, wire: &Wire, what: &str) {
    eventually(what, || driver.virtio.status() & status::NEEDS_RESET != 0);
    driver.wait_needs_reset();
    let used = |driver: &NetDriver| {
        (
            driver.receive[0].queue.used_idx(),
            driver.transmit[0].queue.used_idx(),
        )
    };
    let before = used(driver);
    let sent = wire.sent(0);
    driver.transmit[0].queue.notify();
    driver.receive[0].queue.notify();
    driver.virtio.common.write(
        common::DEVICE_STATUS,
        status::DRIVER_OK | status::FEATURES_OK,
    );
    assert_ne!(driver.virtio.status() & status::NEEDS_RESET, 0, "{what}");
    driver.virtio.reset();
    assert_eq!(
        (used(driver), wire.sent(0)),
        (before, sent),
        "{what}: it went on"
    );
    driver.begin(SETUP);
    wire.take_sent(0);
    let packet = plain(&frame([0xff; 6], 60, 9));
    driver.send(0, std::slice::from_ref(&packet));
    driver.transmit[0].queue.wait_used();
    assert_eq!(wire.take_sent(0), [packet], "{what}");
}

/// What a broken transmit queue is made with: the queue, a page of packets, the page's address.
type Abuse = fn(&mut GuestQueue, &DmaBuffer, u64);

#[test]
fn every_way_to_break_a_transmit_ring() {
    use desc_flags::{INDIRECT, NEXT, WRITE};
    let abuses: [(&str, Abuse); 19] = [
        ("the available index jumps", |queue, _, _| {
            queue.set_avail_idx(SIZE + 1);
        }),
        ("the available index goes back", |queue, _, _| {
            queue.set_avail_idx(u16::MAX);
        }),
        ("a head past the table", |queue, _, _| {
            queue.push_avail(SIZE)
        }),
        ("a head far past the table", |queue, _, _| {
            queue.push_avail(u16::MAX);
        }),
        ("a chain of one that loops", |queue, _, page| {
            queue.set_desc(0, page, 64, NEXT, 0);
            queue.push_avail(0);
        }),
        ("a chain of two that loops", |queue, _, page| {
            queue.set_desc(0, page, 64, NEXT, 1);
            queue.set_desc(1, page, 64, NEXT, 0);
            queue.push_avail(0);
        }),
        ("next past the table", |queue, _, page| {
            queue.set_desc(0, page, 64, NEXT, SIZE);
            queue.push_avail(0);
        }),
        ("an address outside of memory", |queue, _, _| {
            queue.set_desc(0, 0x7000_0000_0000, 64, 0, 0);
            queue.push_avail(0);
        }),
        ("the last address", |queue, _, _| {
            queue.set_desc(0, u64::MAX, 1, 0, 0);
            queue.push_avail(0);
        }),
        ("a buffer that wraps", |queue, _, _| {
            queue.set_desc(0, u64::MAX - 10, 64, 0, 0);
            queue.push_avail(0);
        }),
        ("a huge length", |queue, _, page| {
            queue.set_desc(0, page, u32::MAX, 0, 0);
            queue.push_avail(0);
        }),
        ("more than 4 GiB in all", |queue, _, page| {
            queue.set_desc(0, page, u32::MAX, NEXT, 1);
            queue.set_desc(1, page, u32::MAX, 0, 0);
            queue.push_avail(0);
        }),
        (
            "a readable buffer after a writable one",
            |queue, _, page| {
                queue.set_desc(0, page, 64, NEXT | WRITE, 1);
                queue.set_desc(1, page, 64, 0, 0);
                queue.push_avail(0);
            },
        ),
        ("an indirect table of half an entry", |queue, _, page| {
            queue.set_desc(0, page, 24, INDIRECT, 0);
            queue.push_avail(0);
        }),
        ("an empty indirect table", |queue, _, page| {
            queue.set_desc(0, page, 0, INDIRECT, 0);
            queue.push_avail(0);
        }),
        ("an indirect table outside of memory", |queue, _, _| {
            queue.set_desc(0, 0x7000_0000_0000, 32, INDIRECT, 0);
            queue.push_avail(0);
        }),
        (
            "an indirect table in an indirect table",
            |queue, buffer, page| {
                buffer.write(0, page);
                buffer.write(8, 16u32);
                buffer.write(12, INDIRECT);
                queue.set_desc(0, page, 16, INDIRECT, 0);
                queue.push_avail(0);
            },
        ),
        (
            "an indirect chain longer than the queue",
            |queue, buffer, page| {
                for at in 0..=SIZE {
                    let place = u64::from(at) * 16;
                    buffer.write(place, page);
                    buffer.write(place + 8, 4u32);
                    buffer.write(place + 12, if at == SIZE { 0 } else { NEXT });
                    buffer.write(place + 14, at + 1);
                }
                queue.set_desc(0, page, 16 * u32::from(SIZE + 1), INDIRECT, 0);
                queue.push_avail(0);
            },
        ),
        ("a loop in an indirect table", |queue, buffer, page| {
            buffer.write(0, page);
            buffer.write(8, 4u32);
            buffer.write(12, NEXT);
            buffer.write(14, 0u16);
            queue.set_desc(0, page, 16 * 16, INDIRECT, 0);
            queue.push_avail(0);
        }),
    ];
    let (mut driver, wire) = start();
    for (count, (what, abuse)) in (1..).zip(abuses) {
        let DataQueue { queue, buffers, .. } = &mut driver.transmit[0];
        buffers.fill(0);
        abuse(queue, buffers, buffers.at(0).0);
        queue.notify();
        expect_broken(&mut driver, &wire, what);
        assert_eq!(driver.device.stats().faults, count);
    }
}

#[test]
fn bad_receive_buffers() {
    let (mut driver, wire) = start();
    let page = driver.receive[0].buffers.at(0).0;
    driver.receive[0]
        .queue
        .add(&[Part::writable(0x7000_0000_0000, 2048)]);
    driver.receive[0].queue.kick();
    expect_broken(&mut driver, &wire, "outside of memory");
    driver.receive[0].queue.add(&[Part::readable(page, 2048)]);
    driver.receive[0].queue.kick();
    expect_broken(&mut driver, &wire, "nothing to write to");
    // A good buffer before the bad one still takes a packet, whole.
    driver.receive[0].post(2048);
    driver.receive[0].queue.kick();
    wire.inject(0, plain(&frame(NetDriver::MAC, 60, 7)));
    driver.receive[0].wait();
    driver.receive[0].queue.push_avail(SIZE);
    driver.receive[0].queue.kick();
    expect_broken(&mut driver, &wire, "no such head");
}

/// Buffers of no length at all, as many as indirect tables can name.
#[test]
fn empty_receive_buffers() {
    let wire = Wire::new(1);
    let mut driver = NetDriver::start(Arc::clone(&wire) as _, 1, NetSetup { size: 256, ..SETUP });
    let page = driver.receive[0].buffers.at(0).0;
    for _ in 0..16 {
        driver.receive[0]
            .queue
            .add_indirect(&[Part::writable(page, 0); 256]);
    }
    driver.receive[0].post(2048);
    driver.receive[0].queue.kick();
    wire.inject(0, plain(&frame(NetDriver::MAC, 60, 7)));
    expect_broken(&mut driver, &wire, "no room for anything");
}

#[test]
fn a_control_command_without_room_for_the_answer() {
    let (mut driver, wire) = start();
    let page = driver.receive[0].buffers.at(0).0;
    let control = driver.control.as_mut().unwrap();
    control.add(&[Part::readable(page, 3)]);
    control.kick();
    expect_broken(&mut driver, &wire, "no answer byte");
    let control = driver.control.as_mut().unwrap();
    control.add(&[Part::readable(page, 3), Part::writable(0x7000_0000_0000, 1)]);
    control.kick();
    expect_broken(&mut driver, &wire, "answer outside of memory");
}

#[test]
fn rings_outside_of_memory_or_misaligned() {
    let (mut driver, _wire) = start();
    for (register, address) in [
        (common::QUEUE_DESC, 0x7000_0000_0000u64),
        (common::QUEUE_DRIVER, 0x7000_0000_0000),
        (common::QUEUE_DEVICE, 0x7000_0000_0000),
        (common::QUEUE_DESC, u64::MAX - 15),
        (common::QUEUE_DRIVER, u64::MAX - 1),
        (common::QUEUE_DEVICE, u64::MAX - 3),
        (common::QUEUE_DESC, 0x10_0008),
        (common::QUEUE_DRIVER, 0x10_0001),
        (common::QUEUE_DEVICE, 0x10_0002),
    ] {
        driver.virtio.reset();
        assert!(driver.virtio.negotiate(f::VERSION_1));
        driver.virtio.common.write(common::CONFIG_MSIX_VECTOR, 0u16);
        let queue = driver.virtio.make_queue(1, SIZE, false);
        driver.virtio.describe_queue(&queue);
        driver.virtio.common.write(register, address);
        driver.virtio.common.write(common::QUEUE_ENABLE, 1u16);
        driver.virtio.driver_ok();
        driver.wait_needs_reset();
    }
    driver.begin(SETUP);
    driver.send(0, &[plain(&frame([0xff; 6], 60, 9))]);
    driver.transmit[0].queue.wait_used();
}

/// The driver frees the rings' memory while the device is live: with the indices overwritten, the
/// device reads garbage and must survive it.
#[test]
fn a_ring_overwritten_with_noise() {
    let (mut driver, wire) = start();
    let mut seed = 0x9e37_79b9_7f4a_7c15u64;
    for _ in 0..50 {
        let [desc, avail, _] = driver.transmit[0].queue.addresses();
        for (base, len) in [
            (desc, u64::from(SIZE) * 16),
            (avail, u64::from(SIZE) * 2 + 4),
        ] {
            for at in (0..len).step_by(2) {
                seed ^= seed << 13;
                seed ^= seed >> 7;
                seed ^= seed << 17;
                let noise = seed.to_le_bytes();
                let value = u16::from_le_bytes([noise[0], noise[1]]);
                driver.machine.write(iommu::Gpa(base + at), value);
            }
        }
        driver.transmit[0].queue.notify();
        driver.receive[0].queue.notify();
        // Whatever became of it, the device can be reset and used.
        driver.virtio.reset();
        driver.begin(SETUP);
        driver.send(0, &[plain(&frame([0xff; 6], 60, 1))]);
        driver.transmit[0].queue.wait_used();
    }
    assert!(wire.sent(0) >= 50);
}

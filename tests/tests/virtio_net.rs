//! The network device over a wire whose other end is the test.

#![allow(clippy::cast_possible_truncation)]

use std::sync::Arc;

use devices::net::Offloads;
use tests::TIMEOUT;
use tests::virtio::{
    HEADER, NetDriver, NetSetup, Part, Wire, eventually, features as f, frame, plain,
};

const BROADCAST: [u8; 6] = [0xff; 6];

fn setup(features: u64) -> NetSetup {
    NetSetup {
        features,
        pairs: 1,
        size: 64,
    }
}

fn start(features: u64) -> (NetDriver, Arc<Wire>) {
    let wire = Wire::new(1);
    let driver = NetDriver::start(Arc::clone(&wire) as _, 1, setup(features));
    (driver, wire)
}

#[test]
fn packets_go_out_in_order_round_the_ring() {
    for features in [0, f::EVENT_IDX] {
        let (mut driver, wire) = start(features);
        // 64 entries: several times round, in batches of all sizes, past the index's 16 bits.
        for round in 0..2700usize {
            let batch: Vec<Vec<u8>> = (0..1 + round % 50)
                .map(|i| plain(&frame(BROADCAST, 60 + (round + i) % 1000, i as u8)))
                .collect();
            driver.send(0, &batch);
            for _ in &batch {
                let (_, len) = driver.transmit[0].queue.wait_used();
                assert_eq!(len, 0, "nothing is written");
            }
            let sent = wire.take_sent(0);
            assert_eq!(sent, batch);
        }
        let packets = driver.device.stats().pairs[0].transmit.packets;
        assert!(packets > 1 << 16, "{packets} do not wrap the index");
        assert!(driver.transmit[0].queue.used_ring_is_intact());
    }
}

#[test]
fn packets_come_in_straight_into_posted_buffers() {
    for features in [0, f::EVENT_IDX, f::MRG_RXBUF, f::MRG_RXBUF | f::EVENT_IDX] {
        let (mut driver, wire) = start(features);
        driver.post(0, 64, 2048);
        for round in 0..500usize {
            let packet = plain(&frame(NetDriver::MAC, 60 + round % 1900, round as u8));
            wire.inject(0, packet.clone());
            let mut got = driver.receive[0].wait();
            assert_eq!(got[10..12], [1, 0], "num_buffers");
            got[10] = 0;
            assert_eq!(got, packet, "round {round}");
            driver.post(0, 1, 2048);
        }
        assert!(driver.receive[0].queue.used_ring_is_intact());
    }
}

#[test]
fn headers_pass_both_ways() {
    let offloads = f::CSUM
        | f::HOST_TSO4
        | f::HOST_TSO6
        | f::HOST_ECN
        | f::HOST_USO
        | f::GUEST_CSUM
        | f::GUEST_TSO4
        | f::GUEST_TSO6
        | f::GUEST_ECN;
    let (mut driver, wire) = start(offloads);
    assert_eq!(
        wire.offloads().last(),
        Some(&Offloads {
            checksum: true,
            tso4: true,
            tso6: true,
            ecn: true,
            uso: false,
        })
    );
    let header = |gso: u8| -> Vec<u8> {
        // NEEDS_CSUM, gso, hdr_len 54, gso_size 1448, start 34, offset 16
        vec![1, gso, 54, 0, 0xa8, 0x05, 34, 0, 16, 0, 0, 0]
    };
    for gso in [1, 4, 0x81, 5] {
        let mut packet = header(gso);
        packet.extend(frame(BROADCAST, 1900, gso));
        driver.send(0, std::slice::from_ref(&packet));
        driver.transmit[0].queue.wait_used();
        assert_eq!(wire.take_sent(0), [packet]);
    }
    driver.post(0, 8, 2048);
    for gso in [0, 1, 4, 0x81] {
        let mut packet = header(gso);
        packet.extend(frame(NetDriver::MAC, 1900, gso));
        wire.inject(0, packet.clone());
        packet[10] = 1;
        assert_eq!(driver.receive[0].wait(), packet);
    }
    // USO was not negotiated: such a packet never reaches the driver.
    let mut packet = header(5);
    packet.extend(frame(NetDriver::MAC, 1900, 5));
    wire.inject(0, packet);
    wire.inject(0, plain(&frame(NetDriver::MAC, 99, 5)));
    assert_eq!(driver.receive[0].wait().len(), HEADER + 99);
    assert_eq!(driver.device.stats().pairs[0].receive.drops, 1);
}

#[test]
fn malformed_packets_are_dropped_and_counted() {
    let (mut driver, wire) = start(f::CSUM | f::HOST_TSO4);
    let good = plain(&frame(BROADCAST, 100, 1));
    let with = |change: fn(&mut Vec<u8>)| {
        let mut packet = good.clone();
        change(&mut packet);
        packet
    };
    let bad = [
        with(|p| p.truncate(11)),
        with(|p| p.truncate(12)),
        with(|p| p.truncate(25)),
        with(|p| p[1] = 2),                           // unknown segmentation
        with(|p| p[1] = 4),                           // TSO6 was not negotiated
        with(|p| p[1] = 1),                           // segmentation without checksum and size
        with(|p| (p[0], p[1]) = (1, 1)),              // without size
        with(|p| (p[0], p[6], p[8]) = (1, 99, 0)),    // checksum past the end
        with(|p| (p[0], p[7], p[9]) = (1, 255, 255)), // far past the end
    ];
    let count = bad.len() as u64;
    driver.send(0, &bad);
    for _ in &bad {
        assert_eq!(driver.transmit[0].queue.wait_used().1, 0);
    }
    driver.send(0, std::slice::from_ref(&good));
    driver.transmit[0].queue.wait_used();
    assert_eq!(wire.take_sent(0), [good]);
    let stats = driver.device.stats().pairs[0].transmit;
    assert_eq!((stats.drops, stats.packets, stats.bytes), (count, 1, 100));
    // Too long: 64 KiB and more of valid memory.
    let addr = driver.transmit[0].buffers.at(0).0;
    let parts: Vec<Part> = (0..33).map(|_| Part::readable(addr, 2048)).collect();
    driver.transmit[0].queue.add(&parts);
    driver.transmit[0].queue.kick();
    driver.transmit[0].queue.wait_used();
    assert_eq!(driver.device.stats().pairs[0].transmit.drops, count + 1);
    assert_eq!(wire.sent(0), 0);
}

#[test]
fn indirect_and_scattered_chains() {
    let (mut driver, wire) = start(f::INDIRECT | f::EVENT_IDX);
    let packet = plain(&frame(BROADCAST, 700, 7));
    let side = &mut driver.transmit[0];
    side.buffers.set_bytes(0, &packet);
    let addr = side.buffers.at(0).0;
    // Cuts inside the header, empty buffers, single bytes.
    let cuts = [0u64, 1, 1, 5, 12, 13, 27, 400, 400, 711, 712];
    let parts: Vec<Part> = cuts
        .windows(2)
        .map(|cut| Part::readable(addr + cut[0], u32::try_from(cut[1] - cut[0]).unwrap()))
        .collect();
    for round in 0..100 {
        if round % 2 == 0 {
            side.queue.add_indirect(&parts);
        } else {
            side.queue.add(&parts);
        }
        side.queue.kick();
        side.queue.wait_used();
        assert_eq!(wire.take_sent(0), std::slice::from_ref(&packet));
    }
    // Receive into the same kind of chain.
    let side = &mut driver.receive[0];
    let addr = side.buffers.at(0).0;
    let parts: Vec<Part> = cuts
        .windows(2)
        .map(|cut| Part::writable(addr + cut[0], u32::try_from(cut[1] - cut[0]).unwrap()))
        .collect();
    for round in 0..20u8 {
        side.buffers.fill(0xee);
        if round % 2 == 0 {
            side.queue.add_indirect(&parts);
        } else {
            side.queue.add(&parts);
        }
        side.queue.kick();
        let mut packet = plain(&frame(NetDriver::MAC, 650, round));
        wire.inject(0, packet.clone());
        let (_, len) = side.queue.wait_used();
        assert_eq!(len as usize, packet.len());
        packet[10] = 1;
        assert_eq!(side.buffers.bytes(0, packet.len()), packet);
        assert_eq!(side.buffers.read::<u8>(packet.len() as u64), 0xee);
    }
}

#[test]
fn mergeable_buffers_share_a_packet() {
    let (mut driver, wire) = start(f::MRG_RXBUF | f::GUEST_CSUM | f::GUEST_TSO4);
    for (size, len) in [
        (64u32, 60usize),
        (64, 1500),
        (100, 5000),
        (64, 64 * 63 - 12),
    ] {
        driver.post(0, 64, size);
        let packet = plain(&frame(NetDriver::MAC, len, 0x5a));
        wire.inject(0, packet.clone());
        let first = driver.receive[0].wait();
        let buffers = usize::from(u16::from_le_bytes([first[10], first[11]]));
        assert_eq!(buffers, packet.len().div_ceil(size as usize));
        assert!(
            driver.receive[0].queue.used_count() + 1 >= buffers as u16,
            "all buffers of a packet are published at once"
        );
        let mut got = first;
        for _ in 1..buffers {
            got.extend(driver.receive[0].take().expect("published"));
        }
        (got[10], got[11]) = (0, 0);
        assert_eq!(got, packet);
        // The rest of the buffers is not lost: it takes packets of one buffer each.
        let rest = 64 - buffers;
        for i in 0..rest {
            wire.inject(0, plain(&frame(NetDriver::MAC, 40, i as u8)));
        }
        for i in 0..rest {
            assert_eq!(driver.receive[0].wait()[HEADER + 20], i as u8);
        }
        assert_eq!(driver.receive[0].queue.free(), 64);
    }
}

/// Without mergeable buffers a packet that does not fit one chain is lost and the chain is kept.
#[test]
fn a_packet_that_does_not_fit_is_lost_and_the_buffer_kept() {
    let (mut driver, wire) = start(0);
    driver.post(0, 1, 100);
    wire.inject(0, plain(&frame(NetDriver::MAC, 200, 1)));
    wire.inject(0, plain(&frame(NetDriver::MAC, 80, 2)));
    assert_eq!(driver.receive[0].wait().len(), HEADER + 80);
    assert_eq!(wire.lost(0), 1);
}

#[test]
fn packets_wait_for_buffers() {
    let (mut driver, wire) = start(f::EVENT_IDX);
    for i in 0..10 {
        wire.inject(0, plain(&frame(NetDriver::MAC, 60, i)));
    }
    for i in 0..10 {
        driver.post(0, 1, 2048);
        assert_eq!(driver.receive[0].wait()[HEADER + 20], i);
    }
    assert_eq!(wire.waiting(0), 0);
}

#[test]
fn a_full_backend_holds_packets_back_and_loses_none() {
    let (mut driver, wire) = start(f::EVENT_IDX);
    wire.block(0, true);
    let packets: Vec<Vec<u8>> = (0..10).map(|i| plain(&frame(BROADCAST, 60, i))).collect();
    driver.send(0, &packets);
    // Receive is not held up.
    driver.post(0, 1, 2048);
    wire.inject(0, plain(&frame(NetDriver::MAC, 60, 3)));
    driver.receive[0].wait();
    assert_eq!(driver.transmit[0].queue.used_count(), 0);
    wire.block(0, false);
    for _ in &packets {
        driver.transmit[0].queue.wait_used();
    }
    assert_eq!(wire.take_sent(0), packets);
}

/// With event indices the device interrupts once for the entry that the driver names, and the driver
/// notifies only a device that waits.
#[test]
fn event_indices_suppress_interrupts() {
    let (mut driver, wire) = start(f::EVENT_IDX);
    // Interrupt at the 10th used entry, whatever the batches.
    driver.transmit[0].queue.set_used_event(9);
    for i in 0..9 {
        driver.send(0, &[plain(&frame(BROADCAST, 60, i))]);
        driver.transmit[0].queue.wait_used();
    }
    // The 10th; its interrupt proves that the nine before raised none.
    driver.send(0, &[plain(&frame(BROADCAST, 60, 9))]);
    assert_eq!(driver.vector(1).wait(TIMEOUT), 1);
    assert_eq!(driver.vector(1).count(), 1);
    // A batch that passes the event raises one.
    driver.transmit[0].queue.set_used_event(15);
    let batch: Vec<Vec<u8>> = (0..30).map(|i| plain(&frame(BROADCAST, 60, i))).collect();
    wire.block(0, true);
    driver.send(0, &batch);
    wire.block(0, false);
    assert_eq!(driver.vector(1).wait(TIMEOUT), 1);
    eventually("all used", || driver.transmit[0].queue.used_idx() == 40);
    assert_eq!(driver.vector(1).count(), 2);
    let stats = driver.device.stats().pairs[0].transmit;
    assert_eq!((stats.packets, stats.interrupts), (40, 2));
}

#[test]
fn the_no_interrupt_flag_is_honoured() {
    let (mut driver, _wire) = start(0);
    driver.transmit[0].queue.set_avail_flags(1);
    for i in 0..5 {
        driver.send(0, &[plain(&frame(BROADCAST, 60, i))]);
        driver.transmit[0].queue.wait_used();
    }
    driver.transmit[0].queue.set_avail_flags(0);
    driver.send(0, &[plain(&frame(BROADCAST, 60, 9))]);
    assert_eq!(driver.vector(1).wait(TIMEOUT), 1);
    assert_eq!(driver.vector(1).count(), 1);
}

/// A device that has buffers to receive into needs no notification of more.
#[test]
fn the_driver_is_not_asked_to_notify_without_need() {
    let (mut driver, wire) = start(f::EVENT_IDX);
    driver.post(0, 4, 2048);
    wire.inject(0, plain(&frame(NetDriver::MAC, 60, 1)));
    driver.receive[0].wait();
    let before = driver.receive[0].queue.kicks();
    for _ in 0..20 {
        driver.post(0, 1, 2048);
        wire.inject(0, plain(&frame(NetDriver::MAC, 60, 1)));
        driver.receive[0].wait();
    }
    assert_eq!(driver.receive[0].queue.kicks(), before);
}

#[test]
fn the_link_goes_down_and_up() {
    let (mut driver, wire) = start(f::STATUS);
    driver.post(0, 4, 2048);
    driver.device.set_link(false);
    wire.inject(0, plain(&frame(NetDriver::MAC, 60, 1)));
    driver.send(0, &[plain(&frame(BROADCAST, 60, 1))]);
    driver.transmit[0].queue.wait_used();
    assert_eq!(wire.sent(0), 0, "sent without a link");
    assert_eq!(driver.receive[0].queue.used_count(), 0);
    driver.device.set_link(true);
    driver.receive[0].wait();
    assert_eq!(driver.virtio.config::<u16>(6), 1);
    assert!(driver.device.stats().link_up);
}

const CONTROL: u64 =
    f::CTRL_VQ | f::CTRL_RX | f::CTRL_RX_EXTRA | f::CTRL_VLAN | f::CTRL_MAC_ADDR | f::EVENT_IDX;

/// Which of these frames reach the driver, by their seed.
fn received(driver: &mut NetDriver, wire: &Wire, frames: &[Vec<u8>]) -> Vec<u8> {
    for frame in frames {
        wire.inject(0, plain(frame));
    }
    // A frame to the own address ends the list.
    wire.inject(0, plain(&frame(current_mac(driver), 60, 0xfe)));
    let mut seen = Vec::new();
    loop {
        let packet = driver.receive[0].wait();
        driver.post(0, 1, 2048);
        match packet[HEADER + 59] {
            0xfe => return seen,
            seed => seen.push(seed),
        }
    }
}

fn current_mac(driver: &NetDriver) -> [u8; 6] {
    std::array::from_fn(|i| driver.virtio.config(i as u64))
}

#[test]
fn receive_modes_and_address_filters() {
    let wire = Wire::new(1);
    let mut driver = NetDriver::start(Arc::clone(&wire) as _, 1, setup(CONTROL));
    driver.post(0, 32, 2048);
    let other = [2, 0, 0, 0, 0, 0x77];
    let group = [0x01, 0, 0x5e, 0, 0, 1];
    let frames = [
        frame(NetDriver::MAC, 60, 1),
        frame(other, 60, 2),
        frame(group, 60, 3),
        frame(BROADCAST, 60, 4),
    ];
    let on = [1];
    let off = [0];
    assert_eq!(
        received(&mut driver, &wire, &frames),
        [1, 2, 3, 4],
        "no wish yet"
    );
    assert!(driver.command(0, 0, &off), "promiscuous off");
    assert_eq!(received(&mut driver, &wire, &frames), [1, 4]);
    assert!(driver.command(0, 1, &on), "all multicast");
    assert_eq!(received(&mut driver, &wire, &frames), [1, 3, 4]);
    assert!(driver.command(0, 1, &off));
    assert!(driver.command(0, 2, &on), "all unicast");
    assert_eq!(received(&mut driver, &wire, &frames), [1, 2, 4]);
    assert!(driver.command(0, 2, &off));
    assert!(driver.command(0, 5, &on), "no broadcast");
    assert_eq!(received(&mut driver, &wire, &frames), [1]);
    assert!(driver.command(0, 5, &off));
    // Tables: the other address and the group.
    let mut tables = 1u32.to_le_bytes().to_vec();
    tables.extend(other);
    tables.extend(1u32.to_le_bytes());
    tables.extend(group);
    assert!(driver.command(1, 0, &tables));
    assert_eq!(received(&mut driver, &wire, &frames), [1, 2, 3, 4]);
    assert!(driver.command(0, 3, &on), "no multicast");
    assert_eq!(received(&mut driver, &wire, &frames), [1, 2, 4]);
    assert!(driver.command(0, 3, &off));
    // Broken tables change nothing.
    for bad in [&tables[..tables.len() - 1], &tables[..9], &[0xff; 8], &[]] {
        assert!(!driver.command(1, 0, bad));
    }
    assert_eq!(received(&mut driver, &wire, &frames), [1, 2, 3, 4]);
    // A table too large for the device lets all of its kind pass.
    let mut large = 100u32.to_le_bytes().to_vec();
    large.resize(4 + 600, 2);
    large.extend(0u32.to_le_bytes());
    assert!(driver.command(1, 0, &large));
    assert_eq!(received(&mut driver, &wire, &frames), [1, 2, 4]);
    assert!(driver.command(1, 0, &[0; 8]));
    // Another address of its own.
    assert!(!driver.command(1, 1, &group), "a multicast address");
    assert!(!driver.command(1, 1, &other[..5]));
    assert!(driver.command(1, 1, &other));
    assert_eq!(current_mac(&driver), other);
    assert_eq!(received(&mut driver, &wire, &frames), [2, 4]);
    driver.virtio.reset();
    assert_eq!(current_mac(&driver), NetDriver::MAC);
    let filtered = driver.device.stats().pairs[0].receive.filtered;
    assert_eq!(filtered, 2 + 1 + 1 + 3 + 1 + 1 + 2);
}

#[test]
fn vlans_are_filtered() {
    let wire = Wire::new(1);
    let mut driver = NetDriver::start(Arc::clone(&wire) as _, 1, setup(CONTROL));
    driver.post(0, 32, 2048);
    let tagged = |vlan: u16, seed: u8| {
        let mut frame = frame(NetDriver::MAC, 60, seed);
        frame[12..14].copy_from_slice(&[0x81, 0]);
        frame[14..16].copy_from_slice(&vlan.to_be_bytes());
        frame
    };
    let frames = [
        frame(NetDriver::MAC, 60, 1),
        tagged(5, 2),
        tagged(0x6006, 3),
    ];
    assert!(driver.command(0, 0, &[0]));
    assert_eq!(received(&mut driver, &wire, &frames), [1]);
    assert!(driver.command(2, 0, &6u16.to_le_bytes()));
    assert_eq!(received(&mut driver, &wire, &frames), [1, 3]);
    assert!(driver.command(2, 0, &5u16.to_le_bytes()));
    assert!(driver.command(2, 1, &6u16.to_le_bytes()));
    assert_eq!(received(&mut driver, &wire, &frames), [1, 2]);
    assert!(!driver.command(2, 0, &4096u16.to_le_bytes()));
    assert!(!driver.command(2, 0, &[5]));
}

#[test]
fn unknown_and_unnegotiated_commands_are_errors() {
    let wire = Wire::new(1);
    let mut driver = NetDriver::start(Arc::clone(&wire) as _, 1, setup(f::CTRL_VQ));
    for class in 0..8 {
        for command in 0..8 {
            assert!(
                !driver.command(class, command, &[0; 16]),
                "{class} {command}"
            );
        }
    }
    assert_eq!(driver.device.stats().commands, 64);
    // A command longer than any is an error too, not a hang.
    let long = vec![0; 65_530];
    assert!(!driver.command(1, 0, &long));
}

#[test]
fn guest_offloads_change_live() {
    let wire = Wire::new(1);
    let features =
        f::CTRL_VQ | f::CTRL_GUEST_OFFLOADS | f::GUEST_CSUM | f::GUEST_TSO4 | f::EVENT_IDX;
    let mut driver = NetDriver::start(Arc::clone(&wire) as _, 1, setup(features));
    driver.post(0, 8, 2048);
    let set = |driver: &mut NetDriver, mask: u64| driver.command(5, 0, &mask.to_le_bytes());
    let checksummed = {
        let mut packet = plain(&frame(NetDriver::MAC, 100, 1));
        (packet[0], packet[6], packet[8]) = (1, 34, 16);
        packet
    };
    wire.inject(0, checksummed.clone());
    assert_eq!(driver.receive[0].wait()[0], 1);
    assert!(set(&mut driver, 0));
    assert_eq!(wire.offloads().last(), Some(&Offloads::default()));
    wire.inject(0, checksummed.clone());
    wire.inject(0, plain(&frame(NetDriver::MAC, 77, 1)));
    assert_eq!(driver.receive[0].wait().len(), HEADER + 77);
    assert!(!set(&mut driver, f::GUEST_TSO4), "needs the checksum");
    assert!(
        !set(&mut driver, f::GUEST_CSUM | f::GUEST_TSO6),
        "not negotiated"
    );
    wire.refuse(true);
    assert!(!set(&mut driver, f::GUEST_CSUM), "the host refuses");
    wire.refuse(false);
    assert!(set(&mut driver, f::GUEST_CSUM));
    assert!(
        wire.offloads()
            .last()
            .is_some_and(|o| o.checksum && !o.tso4)
    );
    wire.inject(0, checksummed);
    assert_eq!(driver.receive[0].wait()[0], 1);
}

/// Moderation set by the driver: one interrupt for a full count of packets, and one for the rest when
/// the time is up.
#[test]
fn notifications_are_coalesced() {
    let wire = Wire::new(1);
    let features = f::CTRL_VQ | f::NOTF_COAL;
    let mut driver = NetDriver::start(Arc::clone(&wire) as _, 1, setup(features));
    let moderate = |driver: &mut NetDriver, command: u8, packets: u32, usecs: u32| {
        let mut data = packets.to_le_bytes().to_vec();
        data.extend(usecs.to_le_bytes());
        driver.command(6, command, &data)
    };
    // The bound of time is far away: only the count raises interrupts.
    assert!(moderate(&mut driver, 0, 4, 1_000_000_000));
    for round in 0..3 {
        for i in 0..4 {
            assert_eq!(driver.vector(1).count(), round);
            driver.send(0, &[plain(&frame(BROADCAST, 60, i))]);
            driver.transmit[0].queue.wait_used();
        }
        assert_eq!(driver.vector(1).wait(TIMEOUT), 1);
    }
    // The count is far away: time raises the interrupt.
    assert!(moderate(&mut driver, 1, 1000, 500));
    driver.post(0, 4, 2048);
    wire.inject(0, plain(&frame(NetDriver::MAC, 60, 1)));
    driver.receive[0].wait();
    assert_eq!(driver.vector(0).wait(TIMEOUT), 1);
    assert!(!moderate(&mut driver, 2, 1, 1));
    assert!(!driver.command(6, 0, &[0; 7]));
    // A reset turns it off.
    driver.virtio.reset();
    driver.begin(setup(features));
    driver.send(0, &[plain(&frame(BROADCAST, 60, 1))]);
    assert_eq!(driver.vector(1).wait(TIMEOUT), 1);
}

#[test]
fn a_host_that_refuses_at_start_is_a_needed_reset() {
    let wire = Wire::new(1);
    let mut driver = NetDriver::found(Arc::clone(&wire) as _, 1, |_| ());
    wire.refuse(true);
    driver.prepare(setup(0));
    driver.virtio.driver_ok();
    driver.wait_needs_reset();
    assert!(!wire.is_open(0));
    wire.refuse(false);
    driver.begin(setup(0));
    driver.send(0, &[plain(&frame(BROADCAST, 60, 1))]);
    driver.transmit[0].queue.wait_used();
}

mod pairs {
    use super::*;

    const MQ: u64 = f::CTRL_VQ | f::MQ | f::EVENT_IDX;

    fn start(pairs: u16) -> (NetDriver, Arc<Wire>) {
        let wire = Wire::new(pairs);
        let setup = NetSetup {
            features: MQ,
            pairs,
            size: 32,
        };
        let driver = NetDriver::start(Arc::clone(&wire) as _, pairs, setup);
        (driver, wire)
    }

    fn set_pairs(driver: &mut NetDriver, pairs: u16) -> bool {
        driver.command(4, 0, &pairs.to_le_bytes())
    }

    #[test]
    fn only_active_pairs_receive() {
        let (mut driver, wire) = start(4);
        assert_eq!(driver.device.stats().active_pairs, 1);
        for pair in 0..4 {
            driver.post(pair, 16, 2048);
            wire.inject(pair as u16, plain(&frame(NetDriver::MAC, 60, 1)));
        }
        driver.receive[0].wait();
        for pairs in [2u16, 4, 1, 3] {
            assert!(set_pairs(&mut driver, pairs));
            assert_eq!(wire.active().last(), Some(&pairs));
            assert_eq!(driver.device.stats().active_pairs, pairs);
            for pair in 0..4u16 {
                wire.inject(pair, plain(&frame(NetDriver::MAC, 60, 1)));
            }
            for pair in 0..pairs {
                eventually("packets of an active pair", || wire.waiting(pair) == 0);
            }
            // Every pair still transmits, so its worker has looked at both queues.
            for pair in 0..4 {
                driver.send(pair, &[plain(&frame(BROADCAST, 60, 1))]);
                driver.transmit[pair].queue.wait_used();
            }
            for pair in pairs..4 {
                assert_ne!(wire.waiting(pair), 0, "pair {pair} of {pairs} received");
            }
        }
        for bad in [0u16, 5, 16, 0xffff] {
            assert!(!set_pairs(&mut driver, bad));
        }
        wire.refuse(true);
        assert!(!set_pairs(&mut driver, 2), "the host refuses");
        assert_eq!(driver.device.stats().active_pairs, 3);
    }

    #[test]
    fn each_queue_has_its_vector() {
        let (mut driver, wire) = start(16);
        assert!(set_pairs(&mut driver, 16));
        for pair in 0..16u16 {
            driver.post(pair.into(), 1, 2048);
            wire.inject(pair, plain(&frame(NetDriver::MAC, 60, 1)));
            assert_eq!(driver.vector(2 * pair).wait(TIMEOUT), 1);
            driver.send(pair.into(), &[plain(&frame(BROADCAST, 60, 1))]);
            assert_eq!(driver.vector(2 * pair + 1).wait(TIMEOUT), 1);
        }
    }

    /// Without MQ the control queue is the third (5.1.2), on a device of any number of pairs.
    #[test]
    fn without_mq_the_control_queue_is_the_third() {
        let wire = Wire::new(4);
        let mut driver = NetDriver::start(
            Arc::clone(&wire) as _,
            4,
            NetSetup {
                features: CONTROL,
                pairs: 1,
                size: 32,
            },
        );
        assert!(driver.command(0, 0, &[0]));
        assert!(!set_pairs(&mut driver, 1));
    }

    #[test]
    fn pairs_change_under_traffic() {
        let (mut driver, wire) = start(4);
        let mut sent = 0u64;
        for round in 0..200u16 {
            let pairs = round % 4 + 1;
            for pair in 0..4 {
                let room = driver.transmit[pair].queue.free();
                let batch: Vec<Vec<u8>> = (0..room.min(8))
                    .map(|i| plain(&frame(BROADCAST, 60, i as u8)))
                    .collect();
                sent += batch.len() as u64;
                driver.send(pair, &batch);
                let room = driver.receive[pair].queue.free();
                driver.post(pair, room, 2048);
                wire.inject(pair as u16, plain(&frame(NetDriver::MAC, 60, 1)));
            }
            assert!(set_pairs(&mut driver, pairs));
            // What an inactive pair had before the answer is all it gets.
            let before: Vec<u16> = (pairs..4)
                .map(|pair| driver.receive[usize::from(pair)].queue.used_idx())
                .collect();
            for pair in 0..4 {
                while driver.transmit[pair].queue.take_used().is_some() {}
                while driver.receive[pair].take().is_some() {}
            }
            let after: Vec<u16> = (pairs..4)
                .map(|pair| driver.receive[usize::from(pair)].queue.used_idx())
                .collect();
            assert_eq!(before, after, "round {round}");
        }
        eventually("everything sent", || {
            (0..4).map(|pair| wire.sent(pair) as u64).sum::<u64>() == sent
        });
    }
}

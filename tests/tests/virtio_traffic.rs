//! Traffic on a loopback while the device is reset, bus mastering comes and goes, and the number of
//! pairs changes.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use devices::net::Loopback;
use devices::virtio::net::{RECEIVE, TRANSMIT};
use devices::worker::{Coalesce, PollPolicy};
use tests::virtio::{
    HEADER, NetDriver, NetSetup, VirtioFunction, Wire, eventually, features as f, frame, plain,
};
use tests::{GuestFunction, TIMEOUT};

const FEATURES: u64 = f::EVENT_IDX | f::MRG_RXBUF | f::CTRL_VQ;

fn setup(pairs: u16) -> NetSetup {
    NetSetup {
        features: FEATURES | if pairs > 1 { f::MQ } else { 0 },
        pairs,
        size: 64,
    }
}

fn loopback(pairs: u16) -> NetDriver {
    let backend = Loopback::new(pairs).expect("loopback");
    NetDriver::start(backend, pairs, setup(pairs))
}

/// A packet that names itself.
fn numbered(number: u32, len: usize) -> Vec<u8> {
    let mut frame = frame(NetDriver::MAC, len, number.to_le_bytes()[0]);
    frame[14..18].copy_from_slice(&number.to_le_bytes());
    plain(&frame)
}

/// Sends `count` packets on a pair and expects each back on it, in order and intact.
fn echo(driver: &mut NetDriver, pair: usize, count: u32) {
    let mut sent = 0;
    let mut back = 0;
    while back < count {
        while driver.transmit[pair].queue.take_used().is_some() {}
        let room = u32::try_from(driver.transmit[pair].queue.free()).unwrap();
        let batch: Vec<Vec<u8>> = (sent..count.min(sent + room).min(back + 64))
            .map(|number| numbered(number, 60 + number as usize % 1400))
            .collect();
        sent += u32::try_from(batch.len()).unwrap();
        if !batch.is_empty() {
            driver.send(pair, &batch);
        }
        let room = driver.receive[pair].queue.free();
        if room > 16 {
            driver.post(pair, room, 2048);
        }
        while let Some(mut packet) = driver.receive[pair].take() {
            assert_eq!(packet[10], 1);
            packet[10] = 0;
            assert_eq!(packet, numbered(back, 60 + back as usize % 1400));
            back += 1;
        }
        std::thread::yield_now();
    }
}

#[test]
fn all_pairs_echo() {
    let mut driver = loopback(4);
    assert!(driver.command(4, 0, &4u16.to_le_bytes()));
    for pair in 0..4 {
        echo(&mut driver, pair, 2000);
    }
    let stats = driver.device.stats();
    for pair in &stats.pairs {
        assert_eq!((pair.transmit.packets, pair.receive.packets), (2000, 2000));
        assert_eq!(pair.transmit.bytes, pair.receive.bytes);
        assert_eq!((pair.transmit.drops, pair.receive.drops), (0, 0));
        assert!(pair.polls > 0 && pair.transmit.notifications > 0);
    }
    assert_eq!(stats.backend_drops, 0);
}

/// Policies and moderation change nothing but the number of interrupts.
#[test]
fn echo_under_every_policy() {
    let mut driver = loopback(1);
    for policy in [
        PollPolicy::Busy,
        PollPolicy::Adaptive {
            spin: std::time::Duration::from_micros(20),
        },
        PollPolicy::Interrupt,
    ] {
        driver.device.set_policy(policy);
        echo(&mut driver, 0, 500);
        driver.virtio.reset();
        driver.begin(setup(1));
        echo(&mut driver, 0, 500);
    }
    let moderated = Coalesce {
        max_events: 8,
        max_delay: std::time::Duration::from_millis(1),
    };
    driver.device.set_coalesce(RECEIVE, moderated);
    driver.device.set_coalesce(TRANSMIT, moderated);
    echo(&mut driver, 0, 500);
}

/// Bus mastering goes off and on while packets fly: none is lost, doubled or damaged.
#[test]
fn bus_master_toggles_lose_nothing() {
    let mut driver = loopback(2);
    assert!(driver.command(4, 0, &2u16.to_le_bytes()));
    let function: GuestFunction = driver.virtio.function.clone();
    let stop = AtomicBool::new(false);
    std::thread::scope(|scope| {
        let toggler = scope.spawn(|| {
            let mut toggles = 0u32;
            while !stop.load(Ordering::Relaxed) || toggles < 100 {
                function.set_bus_master(false);
                std::thread::yield_now();
                function.set_bus_master(true);
                std::thread::yield_now();
                toggles += 1;
            }
            toggles
        });
        for pair in [0, 1, 0] {
            echo(&mut driver, pair, 1500);
        }
        stop.store(true, Ordering::Relaxed);
        assert!(toggler.join().expect("toggler") >= 100);
    });
    assert!(driver.command(4, 0, &1u16.to_le_bytes()), "commands too");
    let stats = driver.device.stats();
    assert_eq!((stats.faults, stats.backend_drops), (0, 0));
}

/// After Bus Master Enable is cleared the device touches no memory; when it is set again, it goes on
/// where it was.
#[test]
fn bus_master_off_stops_all_and_on_goes_on() {
    let wire = Wire::new(1);
    let mut driver = NetDriver::start(Arc::clone(&wire) as _, 1, setup(1));
    driver.post(0, 32, 2048);
    for round in 0..50u8 {
        for _ in 0..4 {
            wire.inject(0, plain(&frame(NetDriver::MAC, 60, round)));
        }
        driver.send(0, &[plain(&frame([0xff; 6], 60, round))]);
        driver.virtio.function.set_bus_master(false);
        let before = (
            driver.receive[0].queue.used_idx(),
            driver.transmit[0].queue.used_idx(),
        );
        wire.inject(0, plain(&frame(NetDriver::MAC, 60, round)));
        driver.transmit[0].queue.notify();
        driver.receive[0].queue.notify();
        std::thread::yield_now();
        assert_eq!(
            before,
            (
                driver.receive[0].queue.used_idx(),
                driver.transmit[0].queue.used_idx(),
            )
        );
        driver.virtio.function.set_bus_master(true);
        for _ in 0..5 {
            assert_eq!(driver.receive[0].wait()[HEADER + 20], round);
        }
        driver.transmit[0].queue.wait_used();
        driver.post(0, 5, 2048);
    }
    assert_eq!(wire.sent(0), 50);
}

/// When a reset has returned, nothing touches the queues any more, whatever was under way.
#[test]
fn resets_under_traffic() {
    let wire = Wire::new(2);
    let mut driver = NetDriver::start(Arc::clone(&wire) as _, 2, setup(2));
    let stop = AtomicBool::new(false);
    std::thread::scope(|scope| {
        scope.spawn(|| {
            while !stop.load(Ordering::Relaxed) {
                for pair in 0..2 {
                    if wire.waiting(pair) < 100 {
                        wire.inject(pair, plain(&frame(NetDriver::MAC, 200, 1)));
                    }
                    wire.take_sent(pair);
                }
                std::thread::yield_now();
            }
        });
        for round in 0..60 {
            assert!(driver.command(4, 0, &2u16.to_le_bytes()));
            for pair in 0..2 {
                driver.post(pair, 64, 2048);
                let batch: Vec<Vec<u8>> =
                    (0..60).map(|_| plain(&frame([0xff; 6], 100, 1))).collect();
                driver.send(pair, &batch);
            }
            if round % 3 == 0 {
                driver.receive[1].wait();
            }
            if round % 2 == 0 {
                driver.virtio.reset();
            } else {
                driver.virtio.function.reset();
            }
            let queues = driver.receive.iter().chain(&driver.transmit);
            for side in queues {
                for address in side.queue.addresses() {
                    driver
                        .machine
                        .write(iommu::Gpa(address), 0xaaaa_aaaa_aaaa_aaaau64);
                }
                side.buffers.fill(0xaa);
            }
            let interrupts: Vec<u64> = driver.virtio.vectors.iter().map(|v| v.count()).collect();
            while wire.waiting(0) < 50 || wire.waiting(1) < 50 {
                std::thread::yield_now();
            }
            for side in driver.receive.iter().chain(&driver.transmit) {
                for address in side.queue.addresses() {
                    let value: u64 = driver.machine.read(iommu::Gpa(address));
                    assert_eq!(value, 0xaaaa_aaaa_aaaa_aaaa, "round {round}");
                }
                let len = usize::try_from(side.buffers.len()).unwrap();
                assert!(side.buffers.bytes(0, len).iter().all(|&byte| byte == 0xaa));
            }
            let after: Vec<u64> = driver.virtio.vectors.iter().map(|v| v.count()).collect();
            assert_eq!(interrupts, after, "interrupts after reset {round}");
            if round % 2 != 0 {
                let mut function = driver.virtio.function.clone();
                function.place_bars();
                function.set_command(6);
                driver.virtio = VirtioFunction::new(function);
                driver.virtio.setup_msix(6);
            }
            driver.begin(setup(2));
        }
        stop.store(true, Ordering::Relaxed);
    });
}

/// The number of pairs changes while all pairs send: with a loopback, what an inactive pair sends
/// comes back on an active one, and every pair that is active echoes.
#[test]
fn pairs_change_on_the_loopback() {
    let mut driver = loopback(4);
    for pairs in [4u16, 1, 3, 2, 4] {
        assert!(driver.command(4, 0, &pairs.to_le_bytes()));
        for pair in 0..usize::from(pairs) {
            echo(&mut driver, pair, 300);
        }
        for pair in usize::from(pairs)..4 {
            let before = driver.receive[pair].queue.used_idx();
            let target = pair % usize::from(pairs);
            let room = driver.receive[target].queue.free();
            driver.post(target, room, 2048);
            driver.send(pair, &[numbered(7, 60)]);
            driver.transmit[pair].queue.wait_used();
            let packet = driver.receive[target].wait();
            assert_eq!(packet[HEADER + 14], 7);
            assert_eq!(driver.receive[pair].queue.used_idx(), before);
        }
    }
}

/// A driver that sleeps until interrupts is always woken.
#[test]
fn no_interrupt_is_lost() {
    let mut driver = loopback(1);
    driver.post(0, 32, 2048);
    for number in 0..3000u32 {
        let next = driver.receive[0].queue.used_idx();
        driver.receive[0].queue.set_used_event(next);
        driver.send(0, &[numbered(number, 60)]);
        assert!(driver.vector(0).wait(TIMEOUT) > 0, "packet {number}");
        let packet = driver.receive[0].take().expect("the interrupt's packet");
        assert_eq!(packet[HEADER + 14..HEADER + 18], number.to_le_bytes());
        driver.post(0, 1, 2048);
        driver.transmit[0].queue.wait_used();
    }
    eventually("the worker sleeps in between", || {
        driver.device.stats().pairs[0].sleeps > 0
    });
}

//! The modern PCI transport, driven through a network device: negotiation, every register of the
//! common configuration, the configuration access window, notifications, interrupts, resets.

use std::sync::Arc;

use iommu::Gpa;
use pci::spec as pci_spec;
use tests::TIMEOUT;
use tests::virtio::{
    HEADER, NetDriver, NetSetup, VirtioFunction, Wire, common, eventually, features as f, frame,
    plain, status,
};

const ALL_BUT_NEEDED: u64 = f::VERSION_1;

fn found(pairs: u16) -> NetDriver {
    NetDriver::found(Wire::new(pairs), pairs, |config| {
        config.mtu = Some(1500);
        config.queue_size = 128;
    })
}

#[test]
fn identity_and_capabilities() {
    let driver = found(2);
    let function = &driver.virtio.function;
    assert_eq!(function.config::<u16>(pci_spec::VENDOR_ID), 0x1af4);
    assert_eq!(function.config::<u16>(pci_spec::DEVICE_ID), 0x1041);
    assert!(function.config::<u8>(pci_spec::REVISION_ID) >= 1);
    assert_eq!(function.class(), 0x02_0000);
    let kinds: Vec<u8> = function
        .capabilities()
        .into_iter()
        .filter(|c| c.0 == 9)
        .map(|c| function.config(c.1 + 3))
        .collect();
    for kind in 1..=5 {
        assert!(kinds.contains(&kind), "no capability of kind {kind}");
    }
    assert!(driver.virtio.common.length >= 56);
    assert!(driver.virtio.device.length >= 12);
    assert_eq!(driver.virtio.isr.length, 1);
}

#[test]
fn good_sets_are_taken_and_bad_ones_refused() {
    let driver = found(2);
    let virtio = &driver.virtio;
    let offered = virtio.offered();
    let must = [
        f::VERSION_1,
        f::ACCESS_PLATFORM,
        f::INDIRECT,
        f::EVENT_IDX,
        f::RING_RESET,
        f::MQ,
        f::MTU,
        f::MRG_RXBUF,
        f::CTRL_VQ,
        f::CTRL_RX,
        f::CTRL_VLAN,
        f::CTRL_MAC_ADDR,
        f::CTRL_GUEST_OFFLOADS,
        f::HOST_USO,
        f::STATUS,
        f::SPEED_DUPLEX,
    ];
    for bit in must {
        assert_ne!(offered & bit, 0, "{bit:#x} is not offered");
    }
    for good in [
        offered,
        f::VERSION_1,
        f::VERSION_1 | f::CSUM | f::HOST_TSO4 | f::HOST_ECN,
        f::VERSION_1 | f::CTRL_VQ | f::MQ,
    ] {
        assert!(virtio.negotiate(good), "{good:#x}");
        assert_eq!(virtio.status(), 11);
    }
    let unoffered = (0..64).map(|bit| 1 << bit).find(|bit| offered & bit == 0);
    for bad in [
        0,
        offered & !f::VERSION_1,
        f::VERSION_1 | unoffered.unwrap(),
        f::VERSION_1 | f::HOST_TSO4,
        f::VERSION_1 | f::CSUM | f::HOST_ECN,
        f::VERSION_1 | f::GUEST_TSO6,
        f::VERSION_1 | f::GUEST_CSUM | f::GUEST_ECN,
        f::VERSION_1 | f::HOST_USO,
        f::VERSION_1 | f::MQ,
        f::VERSION_1 | f::CTRL_RX,
        f::VERSION_1 | f::CTRL_VLAN,
        f::VERSION_1 | f::CTRL_MAC_ADDR,
        f::VERSION_1 | f::GUEST_CSUM | f::CTRL_GUEST_OFFLOADS,
    ] {
        assert!(!virtio.negotiate(bad), "{bad:#x} was taken");
        assert_eq!(virtio.status(), 3, "{bad:#x}");
    }
    // A bit of a third word.
    virtio.reset();
    virtio.add_status(3);
    virtio.accept(offered);
    virtio.common.write(common::DRIVER_FEATURE_SELECT, 2u32);
    virtio.common.write(common::DRIVER_FEATURE, 1u32);
    virtio.add_status(status::FEATURES_OK);
    assert_eq!(virtio.status(), 3);
    // And all is well again after a reset.
    assert!(virtio.negotiate(offered));
}

#[test]
fn features_without_a_backend_are_not_offered() {
    let driver = NetDriver::found(Wire::new(1), 1, |_| ());
    let offered = driver.virtio.offered();
    assert_eq!(offered & (f::MQ | f::MTU), 0);
}

#[test]
fn status_follows_the_state_machine() {
    let driver = found(1);
    let virtio = &driver.virtio;
    let write = |value: u8| virtio.common.write(common::DEVICE_STATUS, value);
    assert_eq!(virtio.status(), 0);
    write(status::FEATURES_OK);
    assert_eq!(virtio.status(), 0, "FEATURES_OK before the driver is known");
    write(status::ACKNOWLEDGE);
    write(status::DRIVER);
    assert_eq!(virtio.status(), 3, "a store clears no bit");
    virtio.accept(ALL_BUT_NEEDED);
    write(3 | status::DRIVER_OK);
    assert_eq!(virtio.status(), 3, "DRIVER_OK before FEATURES_OK");
    write(3 | status::DRIVER_OK | status::FEATURES_OK);
    assert_eq!(virtio.status(), 11, "both at once");
    write(!status::FAILED);
    assert_eq!(virtio.status(), 15, "NEEDS_RESET is the device's");
    write(status::FAILED);
    assert_eq!(virtio.status(), 15 | status::FAILED);
    write(0);
    assert_eq!(virtio.status(), 0);
    write(status::FAILED | 3);
    virtio.accept(ALL_BUT_NEEDED);
    virtio.add_status(status::FEATURES_OK);
    assert_eq!(virtio.status(), status::FAILED | 3, "given up");
}

#[test]
fn every_common_register() {
    let driver = found(2);
    let (virtio, at) = (&driver.virtio, &driver.virtio.common);
    let offered = virtio.offered();
    // Feature selectors and windows.
    for (select, half) in [(0u32, offered & 0xffff_ffff), (1, offered >> 32), (2, 0)] {
        at.write(common::DEVICE_FEATURE_SELECT, select);
        assert_eq!(at.read::<u32>(common::DEVICE_FEATURE_SELECT), select);
        assert_eq!(u64::from(at.read::<u32>(common::DEVICE_FEATURE)), half);
        at.write(common::DEVICE_FEATURE, 0u32);
        assert_eq!(u64::from(at.read::<u32>(common::DEVICE_FEATURE)), half);
    }
    for (select, value) in [(0u32, 0x1234_5678u32), (1, 0x9abc_def0)] {
        at.write(common::DRIVER_FEATURE_SELECT, select);
        at.write(common::DRIVER_FEATURE, value);
        assert_eq!(at.read::<u32>(common::DRIVER_FEATURE), value);
    }
    at.write(common::DRIVER_FEATURE_SELECT, 0u32);
    assert_eq!(at.read::<u32>(common::DRIVER_FEATURE), 0x1234_5678);
    // Vectors: those that exist are kept, others read back as none.
    for (vector, kept) in [(0u16, 0u16), (5, 5), (6, 0xffff), (0xffff, 0xffff)] {
        at.write(common::CONFIG_MSIX_VECTOR, vector);
        assert_eq!(at.read::<u16>(common::CONFIG_MSIX_VECTOR), kept);
        virtio.select(4);
        at.write(common::QUEUE_MSIX_VECTOR, vector);
        assert_eq!(at.read::<u16>(common::QUEUE_MSIX_VECTOR), kept);
    }
    // Read-only registers.
    assert_eq!(at.read::<u16>(common::NUM_QUEUES), 5);
    at.write(common::NUM_QUEUES, 1u16);
    assert_eq!(at.read::<u16>(common::NUM_QUEUES), 5);
    let generation: u8 = at.read(common::CONFIG_GENERATION);
    at.write(common::CONFIG_GENERATION, generation ^ 1);
    assert_eq!(at.read::<u8>(common::CONFIG_GENERATION), generation);
    // Queues.
    for (queue, size) in [(0u16, 128), (3, 128), (4, 64), (5, 0), (0xffff, 0)] {
        assert_eq!(virtio.select(queue), size, "queue {queue}");
        assert_eq!(at.read::<u16>(common::QUEUE_SELECT), queue);
    }
    virtio.select(5);
    assert_eq!(at.read::<u16>(common::QUEUE_ENABLE), 0);
    at.write(common::QUEUE_ENABLE, 1u16);
    assert_eq!(at.read::<u16>(common::QUEUE_ENABLE), 0, "no such queue");
    virtio.select(1);
    for (size, kept) in [(64u16, 64u16), (0, 64), (65, 64), (256, 64), (128, 128)] {
        at.write(common::QUEUE_SIZE, size);
        assert_eq!(at.read::<u16>(common::QUEUE_SIZE), kept, "{size}");
    }
    let doorbells: Vec<u64> = (0..5).map(|queue| virtio.doorbell(queue).1).collect();
    assert!(doorbells.is_sorted_by(|a, b| a < b), "{doorbells:?}");
    virtio.select(1);
    for (register, value) in [
        (common::QUEUE_DESC, 0x1_2345_6780u64),
        (common::QUEUE_DRIVER, 0x2_3456_7890),
        (common::QUEUE_DEVICE, 0x3_4567_8900),
    ] {
        at.write(register, value);
        assert_eq!(at.read::<u64>(register), value);
        at.write(register + 4, 7u32);
        assert_eq!(at.read::<u64>(register) >> 32, 7);
        assert_eq!(u64::from(at.read::<u32>(register)), value & 0xffff_ffff);
        at.write(register + 2, 0xffffu16);
        assert_eq!(
            at.read::<u64>(register) >> 32,
            7,
            "a store of no field's width"
        );
    }
    virtio.select(0);
    assert_eq!(
        at.read::<u64>(common::QUEUE_DESC),
        0,
        "each queue has its own"
    );
    assert_eq!(at.read::<u16>(common::QUEUE_RESET), 0);
    // An enabled queue stands still.
    virtio.select(1);
    at.write(common::QUEUE_ENABLE, 1u16);
    let before: [u64; 3] = [32, 40, 48].map(|register| at.read(register));
    at.write(common::QUEUE_DESC, 0x9_0000u64);
    at.write(common::QUEUE_DRIVER + 4, 0u32);
    at.write(common::QUEUE_DEVICE, 0u32);
    at.write(common::QUEUE_SIZE, 2u16);
    at.write(common::QUEUE_ENABLE, 0u16);
    assert_eq!(
        [32, 40, 48].map(|register| at.read::<u64>(register)),
        before
    );
    assert_eq!(at.read::<u16>(common::QUEUE_SIZE), 128);
    assert_eq!(at.read::<u16>(common::QUEUE_ENABLE), 1);
    // A reset brings all back.
    virtio.reset();
    assert_eq!(at.read::<u16>(common::QUEUE_SELECT), 0);
    virtio.select(1);
    for register in [32, 40, 48] {
        assert_eq!(at.read::<u64>(register), 0);
    }
    assert_eq!(at.read::<u16>(common::QUEUE_ENABLE), 0);
    assert_eq!(at.read::<u16>(common::CONFIG_MSIX_VECTOR), 0xffff);
    virtio.select(4);
    assert_eq!(at.read::<u16>(common::QUEUE_MSIX_VECTOR), 0xffff);
    at.write(common::DRIVER_FEATURE_SELECT, 0u32);
    assert_eq!(at.read::<u32>(common::DRIVER_FEATURE), 0);
}

#[test]
fn features_are_frozen_after_negotiation() {
    let driver = found(1);
    let virtio = &driver.virtio;
    assert!(virtio.negotiate(f::VERSION_1));
    virtio.accept(f::VERSION_1 | f::CSUM);
    virtio.common.write(common::DRIVER_FEATURE_SELECT, 0u32);
    assert_eq!(virtio.common.read::<u32>(common::DRIVER_FEATURE), 0);
}

#[test]
fn configuration_through_the_window() {
    let driver = found(2);
    let virtio = &driver.virtio;
    let common_at = u32::try_from(virtio.common.offset).unwrap();
    let device_at = u32::try_from(virtio.device.offset).unwrap();
    let bar = virtio.common.bar.index;
    let select = common_at + u32::try_from(common::QUEUE_SELECT).unwrap();
    virtio.window_write(bar, select, 2, 4);
    assert_eq!(virtio.common.read::<u16>(common::QUEUE_SELECT), 4);
    assert_eq!(virtio.window_read(bar, select + 2, 2) & 0xffff, 64);
    assert_eq!(virtio.window_read(bar, common_at + 18, 2) & 0xffff, 5);
    let mac: Vec<u8> = (0..6)
        .map(|i| virtio.window_read(bar, device_at + i, 1).to_le_bytes()[0])
        .collect();
    assert_eq!(mac, NetDriver::MAC);
    let status = common_at + u32::try_from(common::DEVICE_STATUS).unwrap();
    virtio.window_write(bar, status, 1, 1);
    assert_eq!(virtio.status(), 1);
    // No such BAR, bad length, not aligned, outside of the structures: nothing happens.
    for (bar, offset, len) in [
        (1, status, 1),
        (bar, status, 3),
        (bar, status, 0),
        (bar, common_at + 21, 2),
        (bar, 0x7ffc, 4),
        (bar, u32::MAX, 1),
    ] {
        virtio.window_write(bar, offset, len, 0);
        assert_eq!(virtio.window_read(bar, offset, len), 0);
        assert_eq!(virtio.status(), 1);
    }
    // A whole device works through it: reset.
    virtio.window_write(bar, status, 1, 0);
    assert_eq!(virtio.status(), 0);
}

#[test]
fn device_configuration() {
    let driver = NetDriver::found(Wire::new(4), 3, |config| {
        config.mtu = Some(9000);
        config.speed = Some(25_000);
    });
    let virtio = &driver.virtio;
    let mac: [u8; 6] = std::array::from_fn(|i| virtio.config(i as u64));
    assert_eq!(mac, NetDriver::MAC);
    assert_eq!(virtio.config::<u16>(6), 1, "link up");
    assert_eq!(virtio.config::<u16>(8), 3, "pairs");
    assert_eq!(virtio.config::<u16>(10), 9000);
    assert_eq!(virtio.config::<u32>(12), 25_000);
    assert_eq!(virtio.config::<u8>(16), 1, "full duplex");
    virtio.device.write(0, 0xffff_ffffu32);
    assert_eq!(virtio.config::<u8>(0), 2, "read-only");
    assert_eq!(virtio.device.read::<u32>(200), 0, "past the structure");
    assert_eq!(virtio.common.read::<u32>(200), 0);
}

#[test]
fn configuration_changes_raise_their_vector_and_the_generation() {
    let mut driver = found(1);
    driver.begin(NetSetup {
        features: f::STATUS,
        pairs: 1,
        size: 0,
    });
    let generation: u8 = driver.virtio.common.read(common::CONFIG_GENERATION);
    driver.device.set_link(false);
    assert_eq!(driver.virtio.vectors[0].wait(TIMEOUT), 1);
    assert_ne!(
        driver.virtio.common.read::<u8>(common::CONFIG_GENERATION),
        generation
    );
    assert_eq!(driver.virtio.config::<u16>(6), 0);
    assert_eq!(driver.virtio.isr.read::<u8>(0), 2);
    assert_eq!(driver.virtio.isr.read::<u8>(0), 0, "reading clears it");
}

#[test]
fn without_vectors_the_isr_tells() {
    let wire = Wire::new(1);
    let mut driver = NetDriver::found(Arc::clone(&wire) as _, 1, |_| ());
    driver.prepare(NetSetup {
        features: 0,
        pairs: 1,
        size: 16,
    });
    driver.virtio.select(1);
    driver
        .virtio
        .common
        .write(common::QUEUE_MSIX_VECTOR, 0xffffu16);
    driver.virtio.driver_ok();
    driver.send(0, &[plain(&frame([0xff; 6], 60, 0))]);
    driver.transmit[0].queue.wait_used();
    eventually("the ISR bit", || driver.virtio.isr.read::<u8>(0) == 1);
    assert_eq!(driver.vector(1).count(), 0);
}

#[test]
fn a_masked_vector_waits_for_its_unmasking() {
    let mut driver = NetDriver::start(
        Wire::new(1),
        1,
        NetSetup {
            features: 0,
            pairs: 1,
            size: 16,
        },
    );
    driver.vector(1).mask();
    driver.send(0, &[plain(&frame([0xff; 6], 60, 0))]);
    driver.transmit[0].queue.wait_used();
    eventually("the pending bit", || driver.vector(1).pending());
    assert_eq!(driver.vector(1).count(), 0);
    driver.vector(1).unmask();
    assert_eq!(driver.vector(1).wait(TIMEOUT), 1);
}

/// Doorbells normally end in an eventfd; where the host refuses that, the store reaches the device.
#[test]
fn doorbells_work_without_an_eventfd() {
    let wire = Wire::new(1);
    let mut driver = NetDriver::start(
        Arc::clone(&wire) as _,
        1,
        NetSetup {
            features: 0,
            pairs: 1,
            size: 16,
        },
    );
    let (bar, offset) = driver.virtio.doorbell(1);
    let address = Gpa(bar.address.0 + offset);
    assert!(driver.machine.events().addresses().contains(&address.0));
    for round in 0..20 {
        driver.transmit[0].send(&plain(&frame([0xff; 6], 60, round)));
        assert!(
            driver
                .machine
                .root()
                .mmio_write(address, &1u16.to_le_bytes())
        );
        driver.transmit[0].queue.wait_used();
    }
    assert_eq!(wire.sent(0), 20);
}

#[test]
fn nothing_moves_before_driver_ok() {
    let wire = Wire::new(1);
    let mut driver = NetDriver::found(Arc::clone(&wire) as _, 1, |_| ());
    driver.prepare(NetSetup {
        features: 0,
        pairs: 1,
        size: 16,
    });
    driver.transmit[0].send(&plain(&frame([0xff; 6], 60, 1)));
    driver.transmit[0].queue.notify();
    assert!(!wire.is_open(0));
    assert_eq!((wire.sent(0), driver.transmit[0].queue.used_idx()), (0, 0));
    // The chain made available, and the notification sent, before DRIVER_OK are not lost.
    driver.virtio.driver_ok();
    driver.transmit[0].queue.wait_used();
    assert_eq!(wire.sent(0), 1);
}

#[test]
fn function_level_reset_is_a_power_cycle() {
    let wire = Wire::new(1);
    let mut driver = NetDriver::start(
        Arc::clone(&wire) as _,
        1,
        NetSetup {
            features: f::EVENT_IDX,
            pairs: 1,
            size: 16,
        },
    );
    driver.send(0, &[plain(&frame([0xff; 6], 60, 1))]);
    driver.transmit[0].queue.wait_used();
    driver.virtio.function.reset();
    driver.transmit[0].queue.notify();
    let mut function = driver.virtio.function.clone();
    assert_eq!(
        function.config::<u16>(pci_spec::COMMAND) & pci_spec::command::BUS_MASTER,
        0
    );
    function.place_bars();
    function.set_command(pci_spec::command::MEMORY | pci_spec::command::BUS_MASTER);
    driver.virtio = VirtioFunction::new(function);
    assert_eq!(driver.virtio.status(), 0);
    assert_eq!(driver.virtio.window_read(0, 20, 1), 0);
    driver.virtio.setup_msix(4);
    driver.begin(NetSetup {
        features: f::EVENT_IDX,
        pairs: 1,
        size: 16,
    });
    wire.take_sent(0);
    driver.send(0, &[plain(&frame([0xff; 6], 61, 2))]);
    driver.transmit[0].queue.wait_used();
    let sent = wire.take_sent(0);
    assert_eq!(sent.len(), 1);
    assert_eq!(sent[0].len(), HEADER + 61);
}

#[test]
fn a_single_queue_is_reset_and_enabled_again() {
    let wire = Wire::new(1);
    let setup = NetSetup {
        features: f::RING_RESET | f::EVENT_IDX,
        pairs: 1,
        size: 16,
    };
    let mut driver = NetDriver::start(Arc::clone(&wire) as _, 1, setup);
    for round in 0..3u8 {
        driver.send(0, &[plain(&frame([0xff; 6], 60, round))]);
        driver.transmit[0].queue.wait_used();
        driver.virtio.select(1);
        driver.virtio.common.write(common::QUEUE_RESET, 1u16);
        assert_eq!(driver.virtio.common.read::<u16>(common::QUEUE_RESET), 0);
        assert_eq!(driver.virtio.common.read::<u16>(common::QUEUE_ENABLE), 0);
        assert_eq!(driver.virtio.select(1), 256, "back to its maximal size");
        driver.transmit[0].queue.restart();
        driver.transmit[0].send(&plain(&frame([0xff; 6], 60, 99)));
        driver.transmit[0].queue.notify();
        // The other queue of the pair goes on.
        driver.post(0, 1, 2048);
        wire.inject(0, plain(&frame(NetDriver::MAC, 60, round)));
        driver.receive[0].wait();
        assert_eq!(
            driver.transmit[0].queue.used_idx(),
            0,
            "touched after reset"
        );
        driver
            .virtio
            .enable_queue(&driver.transmit[0].queue, Some(2));
        driver.transmit[0].queue.notify();
        driver.transmit[0].queue.wait_used();
    }
    // And the receive queue likewise.
    driver.virtio.select(0);
    driver.virtio.common.write(common::QUEUE_RESET, 1u16);
    driver.receive[0].queue.restart();
    driver
        .virtio
        .enable_queue(&driver.receive[0].queue, Some(1));
    driver.post(0, 1, 2048);
    wire.inject(0, plain(&frame(NetDriver::MAC, 70, 5)));
    assert_eq!(driver.receive[0].wait().len(), HEADER + 70);
}

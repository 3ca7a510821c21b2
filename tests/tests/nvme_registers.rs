//! NVMe: registers, enable and reset, shutdown, what is fatal.

use std::sync::Arc;

use devices::block::{BlockOp, FaultyBackend, MemoryBackend};
use devices::nvme::spec::command::{Status, cns, feature, nvm};
use devices::nvme::spec::{Cc, reg, shst};
use tests::Machine;
use tests::nvme::{Command, Driver, Enable, SpyBackend, Transfer, attach, config};

const DEVICE: u8 = 3;

fn machine() -> (Arc<Machine>, Arc<devices::nvme::Nvme>) {
    let machine = Machine::new();
    let disk = MemoryBackend::new(1 << 20).unwrap();
    let nvme = attach(&machine, DEVICE, config(vec![(1, disk, 512)]));
    (machine, nvme)
}

#[test]
fn comes_up_as_linux_expects_and_has_nvm_express_class() {
    let (machine, _nvme) = machine();
    let mut driver = Driver::bring_up(&machine, DEVICE);
    assert_eq!(driver.function.class(), 0x01_0802);
    let cap = driver.cap();
    assert_eq!(
        (cap.mqes(), cap.cqr(), cap.dstrd(), cap.css()),
        (4095, true, 0, 1)
    );
    assert_eq!(driver.bar.read::<u32>(reg::VS), 0x0001_0400);
    assert!(driver.csts().rdy() && !driver.csts().cfs());
    let id = driver.admin_data(Command::identify(cns::CONTROLLER, 0), 4096);
    assert_eq!(&id[4..10], b"test-1");
}

#[test]
fn registers_answer_to_their_access_sizes_only() {
    let (machine, _nvme) = machine();
    let driver = Driver::probe(&machine, DEVICE);
    let bar = &driver.bar;
    let cap: u64 = bar.read(reg::CAP);
    let halves = [bar.read::<u32>(reg::CAP), bar.read::<u32>(reg::CAP + 4)];
    assert_eq!(cap, u64::from(halves[1]) << 32 | u64::from(halves[0]));
    assert_eq!(bar.read::<u16>(reg::VS), 0, "16-bit load");
    assert_eq!(
        bar.read::<u64>(reg::VS),
        0,
        "64-bit load of a 32-bit register"
    );
    assert_eq!(bar.read::<u32>(reg::VS + 2), 0, "unaligned load");
    bar.write(reg::AQA, 0x001f_001fu32);
    bar.write(reg::AQA, 0xffffu16);
    bar.write(reg::AQA, u64::MAX);
    assert_eq!(bar.read::<u32>(reg::AQA), 0x001f_001f);
    bar.write(reg::ASQ, 0x1_2345_6fffu64);
    assert_eq!(bar.read::<u64>(reg::ASQ), 0x1_2345_6000);
    bar.write(reg::ACQ + 4, 7u32);
    assert_eq!(bar.read::<u64>(reg::ACQ), 7 << 32);
    bar.write(reg::NSSR, 0x4e56_4d65u32);
    assert_eq!(bar.read::<u32>(reg::NSSR), 0, "no subsystem reset");
    assert!(!driver.csts().nssro());
    for offset in [reg::INTMS, reg::INTMC, 0x38, 0xff8, reg::DOORBELLS] {
        bar.write(offset, u32::MAX);
        assert_eq!(bar.read::<u32>(offset), 0, "register {offset:#x}");
    }
    // Every size at every place of the BAR: nothing panics, and the controller works afterwards.
    for offset in 0..0x1400 {
        if offset == reg::CC {
            continue;
        }
        bar.read::<u8>(offset);
        bar.read::<u64>(offset & !7);
        bar.write(offset, 0xa5u8);
        bar.write(offset & !1, 0xa5a5u16);
    }
    drop(driver);
    Driver::bring_up(&machine, DEVICE);
}

#[test]
fn what_cannot_work_is_fatal_until_disabled() {
    let (machine, _nvme) = machine();
    let mut driver = Driver::probe(&machine, DEVICE);
    let good = Enable::default();
    let bad = [
        Enable {
            cc: good.cc.with_css(6),
            ..good
        },
        Enable {
            cc: good.cc.with_mps(5),
            ..good
        },
        Enable {
            cc: good.cc.with_ams(1),
            ..good
        },
        Enable { entries: 1, ..good },
    ];
    for enable in bad {
        driver.start(enable);
        driver.wait_csts(|csts| csts.cfs());
        assert!(!driver.csts().rdy(), "{enable:?}");
        driver.set_cc(Cc::new());
        driver.wait_csts(|csts| !csts.cfs());
    }
    driver.enable(good);
}

#[test]
fn rings_outside_of_memory_are_fatal() {
    let (machine, _nvme) = machine();
    let mut driver = Driver::probe(&machine, DEVICE);
    let good = Enable::default();
    for register in [reg::ASQ, reg::ACQ] {
        driver.start(good);
        driver.wait_csts(|csts| csts.rdy());
        driver.disable();
        driver.bar.write(register, 0xffff_ffff_ffff_f000u64);
        driver.set_cc(good.cc.with_en(true));
        driver.wait_csts(|csts| csts.rdy());
        driver
            .admin
            .sq
            .push(Command::get_feature(feature::ARBITRATION, 0));
        driver.admin.sq.ring();
        driver.wait_csts(|csts| csts.cfs());
        assert!(driver.csts().rdy(), "ready does not change");
        driver.disable();
        assert!(!driver.csts().cfs());
    }
    // An I/O queue too.
    driver.enable(good);
    driver
        .admin
        .succeed(Command::create_cq(1, 16, 0x7f_ffff_f000, 1));
    let sq = driver.create_sq(1, 16, 1);
    driver
        .admin
        .succeed(Command::create_sq(2, 16, 0x7f_ffff_e000, 1));
    let mut sq = sq;
    sq.push(Command::flush(1));
    sq.ring();
    driver.wait_csts(|csts| csts.cfs());
    driver.enable(good);
    driver
        .admin
        .succeed(Command::get_feature(feature::ARBITRATION, 0));
}

#[test]
fn larger_memory_pages_work() {
    let (machine, _nvme) = machine();
    let mut driver = Driver::probe(&machine, DEVICE);
    let cc = Enable::default().cc.with_mps(1);
    // Admin queues must be aligned to 8 KiB now: the first try has one that is not, or pages are
    // taken until the next try has none.
    for _ in 0..4 {
        driver.start(Enable { cc, entries: 64 });
        let bases = [driver.admin.sq.base(), driver.admin.cq.base()];
        let aligned = bases.map(|base| base % 8192 == 0);
        driver.wait_csts(|csts| csts.rdy() || csts.cfs());
        assert_eq!(driver.csts().rdy(), aligned == [true, true], "{bases:x?}");
        if driver.csts().rdy() {
            break;
        }
        driver.set_cc(Cc::new());
        driver.wait_csts(|csts| !csts.cfs());
        // Each ring takes one page.
        for (side, aligned) in [tests::Side::Low, tests::Side::High]
            .into_iter()
            .zip(aligned)
        {
            if aligned {
                machine.dma(side, 1);
            }
        }
    }
    assert!(driver.csts().rdy());
    // 8 KiB from the middle of a memory page: two PRP entries of 4 KiB each.
    let pages = machine.dma(tests::Side::Low, 8);
    let base = pages.address().0.next_multiple_of(8192);
    let command = Command::log_page(devices::nvme::spec::command::log::COMMAND_EFFECTS, 8192);
    driver.admin.succeed(command.prp(base + 4096, base + 16384));
    let at = base - pages.address().0 + 4096;
    assert_eq!(pages.read::<u32>(at + 4), 1, "create SQ is supported");
}

#[test]
fn a_reset_forgets_queues_and_features_but_not_admin_registers() {
    let (machine, nvme) = machine();
    let mut driver = Driver::bring_up(&machine, DEVICE);
    let mut pair = driver.create_pair(1, 16);
    pair.succeed(Command::flush(1));
    driver
        .admin
        .succeed(Command::set_feature(feature::VOLATILE_WRITE_CACHE, 0));
    let asq: u64 = driver.bar.read(reg::ASQ);
    driver.disable();
    assert_eq!(driver.csts().into_bits(), 0);
    assert_eq!(driver.bar.read::<u64>(reg::ASQ), asq);
    // Doorbells of dead queues wake nobody.
    let before = nvme.stats();
    pair.sq.push(Command::flush(1));
    pair.sq.ring();
    assert!(pair.cq.stays_empty());
    assert_eq!(nvme.stats().queues, before.queues);
    driver.enable(Enable::default());
    let cache = driver
        .admin
        .succeed(Command::get_feature(feature::VOLATILE_WRITE_CACHE, 0));
    assert_eq!(cache, 1, "back to the default");
    let mut pair = driver.create_pair(1, 16);
    pair.succeed(Command::flush(1));
}

#[test]
fn shutdown_flushes_and_tells_when() {
    let machine = Machine::new();
    let disk = MemoryBackend::new(1 << 20).unwrap();
    let spies = [SpyBackend::new(disk.clone()), SpyBackend::new(disk)];
    let namespaces = vec![
        (1, spies[0].clone() as _, 512),
        (5, spies[1].clone() as _, 512),
    ];
    let _nvme = attach(&machine, DEVICE, config(namespaces));
    let mut driver = Driver::bring_up(&machine, DEVICE);
    for shn in [1, 2] {
        let mut pair = driver.create_pair(1, 16);
        let data = Transfer::new(&machine, 512);
        pair.write(1, 0, &data);
        driver.set_cc(driver.cc().with_shn(shn));
        driver.wait_csts(|csts| csts.shst() == shst::COMPLETE);
        for spy in &spies {
            assert_eq!(spy.take().last(), Some(&BlockOp::Flush));
        }
        // No commands any more, until a reset.
        pair.sq.push(Command::flush(1));
        pair.sq.ring();
        assert!(pair.cq.stays_empty());
        driver.enable(Enable::default());
        assert_eq!(driver.csts().shst(), shst::NORMAL);
    }
    // Also without a running controller.
    driver.disable();
    driver.set_cc(driver.cc().with_shn(1));
    driver.wait_csts(|csts| csts.shst() == shst::COMPLETE);
    assert_eq!(spies[0].take().last(), Some(&BlockOp::Flush));
}

#[test]
fn function_level_reset_is_power_on() {
    let (machine, _nvme) = machine();
    let mut driver = Driver::bring_up(&machine, DEVICE);
    driver.create_pair(1, 16);
    driver.function.reset();
    let mut driver = Driver::probe(&machine, DEVICE);
    assert_eq!(driver.csts().into_bits(), 0);
    assert_eq!(driver.cc().into_bits(), 0);
    assert_eq!(driver.bar.read::<u64>(reg::ASQ), 0);
    driver.enable(Enable::default());
    let mut pair = driver.create_pair(1, 16);
    pair.succeed(Command::flush(1));
}

/// A reset waits for what the storage still holds, and nothing of it reaches the host afterwards.
#[test]
fn reset_waits_for_commands_in_flight() {
    let machine = Machine::new();
    let disk = FaultyBackend::new(MemoryBackend::new(1 << 20).unwrap());
    let _nvme = attach(&machine, DEVICE, config(vec![(1, disk.clone(), 512)]));
    let mut driver = Driver::bring_up(&machine, DEVICE);
    let mut pair = driver.create_pair(1, 16);
    disk.hold(true);
    let data = Transfer::new(&machine, 4096);
    for lba in 0..4 {
        pair.sq
            .push(Command::blocks(nvm::READ, 1, lba, 8).data(&data));
    }
    pair.sq.ring();
    assert!(pair.cq.stays_empty());
    driver.set_cc(driver.cc().with_en(false));
    std::thread::sleep(std::time::Duration::from_millis(20));
    assert!(driver.csts().rdy(), "not over while commands are in flight");
    disk.hold(false);
    driver.wait_csts(|csts| !csts.rdy());
    let interrupts = driver.vectors[1].count();
    assert!(pair.cq.stays_empty());
    assert_eq!(driver.vectors[1].count(), interrupts);
    driver.enable(Enable::default());
    let mut pair = driver.create_pair(1, 16);
    assert_eq!(pair.status(Command::flush(1)), Status::SUCCESS);
}

#[test]
fn bad_configurations_name_the_field() {
    use devices::nvme::{Config, Nvme};
    use iommu::Bdf;
    let machine = Machine::new();
    let disk = || MemoryBackend::new(1 << 20).unwrap() as Arc<dyn devices::block::BlockBackend>;
    let small = MemoryBackend::new(512).unwrap();
    let base = config(vec![(1, disk(), 512)]);
    let cases: Vec<(Config, &str)> = vec![
        (
            Config {
                serial: String::new(),
                ..base.clone()
            },
            "serial",
        ),
        (
            Config {
                serial: "x".repeat(21),
                ..base.clone()
            },
            "serial",
        ),
        (
            Config {
                model: "\u{e9}".into(),
                ..base.clone()
            },
            "model",
        ),
        (
            Config {
                max_queue_pairs: 65,
                ..base.clone()
            },
            "max_queue_pairs",
        ),
        (
            Config {
                queue_entries: 1,
                ..base.clone()
            },
            "queue_entries",
        ),
        (
            Config {
                mdts: 10,
                ..base.clone()
            },
            "mdts",
        ),
        (config(vec![(0, disk(), 512)]), "nsid"),
        (
            config(vec![(2, disk(), 512), (2, disk(), 512)]),
            "two namespaces have the id 2",
        ),
        (config(vec![(1, disk(), 1024)]), "lba_size"),
        (config(vec![(1, small, 4096)]), "smaller than one block"),
    ];
    for (config, message) in cases {
        let made = Nvme::new(config, Bdf::new(0, 1, 0).unwrap(), machine.upstream());
        let error = made.err().expect("refused").to_string();
        assert!(error.contains(message), "{error}");
    }
}

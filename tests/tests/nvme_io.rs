//! NVMe: the NVM command set and the rings.

use std::sync::Arc;

use devices::block::{
    BlockBackend, BlockOp, Fault, FaultyBackend, FileBackend, FileOptions, MemoryBackend,
    NullBackend,
};
use devices::nvme::spec::command::{Status, feature, log, nvm};
use devices::nvme::{Config, Nvme};
use tests::nvme::{Command, Driver, Pair, SpyBackend, Transfer, attach, config};
use tests::{Machine, Side, TIMEOUT};

const DEVICE: u8 = 3;

struct Setup {
    machine: Arc<Machine>,
    nvme: Arc<Nvme>,
    driver: Driver,
}

fn set_up(config: Config) -> Setup {
    let machine = Machine::new();
    let nvme = attach(&machine, DEVICE, config);
    let driver = Driver::bring_up(&machine, DEVICE);
    Setup {
        machine,
        nvme,
        driver,
    }
}

fn one(backend: Arc<dyn BlockBackend>) -> Setup {
    set_up(config(vec![(1, backend, 512)]))
}

fn pattern(seed: u8, len: usize) -> Vec<u8> {
    (0..len)
        .map(|i| seed.wrapping_add(u8::try_from((i / 7 + i % 251) % 256).unwrap()))
        .collect()
}

#[test]
fn data_comes_back_in_every_layout() {
    let Setup {
        machine,
        mut driver,
        ..
    } = one(MemoryBackend::new(8 << 20).unwrap());
    let mut pair = driver.create_pair(1, 64);
    // Offset in the first page, length, first entry of the list.
    let layouts = [
        (0, 512, 0),
        (0, 4096, 0),
        (2048, 4096, 0),
        (4, 8192, 0),
        (0, 8192, 0),
        (4092, 12288, 3),
        (0, 128 << 10, 500),
        (512, 1 << 20, 511),
        (0, 1 << 20, 510),
    ];
    for (seed, (offset, len, slot)) in (1..).zip(layouts) {
        let out = Transfer::with_layout(&machine, offset, len, slot);
        let data = pattern(seed, usize::try_from(len).unwrap());
        out.set(&data);
        pair.write(1, 3, &out);
        let back = Transfer::with_layout(&machine, (4096 - offset % 4096) & 4092, len, 511 - slot);
        pair.read(1, 3, &back);
        assert!(back.get() == data, "layout {offset} {len} {slot}");
    }
    // Neighbours are untouched.
    let edge = Transfer::new(&machine, 512);
    pair.read(1, 2, &edge);
    assert_eq!(edge.get(), [0; 512]);
}

#[test]
fn bad_commands_end_in_their_status() {
    let big = MemoryBackend::new(8 << 20).unwrap();
    let read_only = MemoryBackend::new_read_only(1 << 20).unwrap();
    let namespaces: Vec<(u32, Arc<dyn BlockBackend>, u32)> =
        vec![(1, big, 512), (4, read_only, 4096)];
    let Setup {
        machine,
        mut driver,
        ..
    } = set_up(Config {
        mdts: 1,
        ..config(namespaces)
    });
    let mut pair = driver.create_pair(1, 16);
    let data = Transfer::new(&machine, 16384);
    let mut status = |command: Command| pair.status(command);
    let rw = |opcode, nsid, lba, blocks| Command::blocks(opcode, nsid, lba, blocks).data(&data);
    let invalid = Status::INVALID_FIELD.dnr();
    let invalid_namespace = Status::INVALID_NAMESPACE.dnr();
    let range = Status::LBA_OUT_OF_RANGE.dnr();
    let protected = Status::WRITE_PROTECTED.dnr();
    for opcode in [nvm::READ, nvm::WRITE] {
        assert_eq!(status(rw(opcode, 1, 0, 16)), Status::SUCCESS);
        assert_eq!(status(rw(opcode, 1, 0, 17)), invalid, "over MDTS");
        assert_eq!(status(rw(opcode, 1, 16383, 1)), Status::SUCCESS);
        assert_eq!(status(rw(opcode, 1, 16384, 1)), range);
        assert_eq!(status(rw(opcode, 1, 16380, 5)), range);
        assert_eq!(status(rw(opcode, 1, u64::MAX, 1)), range);
        assert_eq!(status(rw(opcode, 1, u64::MAX - 1, 16)), range);
        for nsid in [0, 5, 0xffff_ffff] {
            assert_eq!(status(rw(opcode, nsid, 0, 1)), invalid_namespace);
        }
        assert_eq!(status(rw(opcode, 2, 0, 1)), invalid, "inactive");
        assert_eq!(status(rw(opcode, 1, 0, 1).or(0, 1 << 8)), invalid, "fused");
        assert_eq!(status(rw(opcode, 1, 0, 1).or(0, 1 << 14)), invalid, "SGL");
    }
    assert_eq!(status(rw(nvm::READ, 4, 255, 1)), Status::SUCCESS);
    assert_eq!(status(rw(nvm::READ, 4, 256, 1)), range);
    assert_eq!(status(rw(nvm::WRITE, 4, 0, 1)), protected);
    assert_eq!(status(Command::write_zeroes(4, 0, 1)), protected);
    assert_eq!(status(Command::write_zeroes(1, 16384, 1)), range);
    assert_eq!(status(Command::write_zeroes(3, 0, 1)), invalid);
    assert_eq!(status(Command::flush(4)), Status::SUCCESS);
    assert_eq!(status(Command::flush(9)), invalid_namespace);
    assert_eq!(status(Command::flush(0)), invalid_namespace);
    let list = Transfer::new(&machine, 4096);
    assert_eq!(status(Command::deallocate(4, &list, &[(0, 1)])), protected);
    assert_eq!(
        status(Command::deallocate(1, &list, &[(0, 1), (16384, 1)])),
        range
    );
    assert_eq!(
        status(Command::deallocate(1, &list, &[(u64::MAX, 1)])),
        range
    );
    assert_eq!(status(Command::deallocate(2, &list, &[(0, 1)])), invalid);
    for opcode in [0x04, 0x05, 0x0c, 0x0d, 0x11, 0x80, 0xff] {
        assert_eq!(
            status(Command::new(opcode, 1)),
            Status::INVALID_OPCODE.dnr()
        );
    }
}

#[test]
fn bad_prps_end_in_their_status_and_touch_nothing() {
    let Setup {
        machine,
        mut driver,
        ..
    } = one(MemoryBackend::new(8 << 20).unwrap());
    let mut pair = driver.create_pair(1, 16);
    let page = machine.dma(Side::Low, 4);
    let at = |offset| page.at(offset).0;
    let mut read =
        |blocks, prp1, prp2| pair.status(Command::blocks(nvm::READ, 1, 0, blocks).prp(prp1, prp2));
    let offset = Status::PRP_OFFSET_INVALID.dnr();
    let transfer = Status::DATA_TRANSFER_ERROR.dnr();
    page.fill(0xee);
    assert_eq!(read(1, at(2), 0), offset);
    assert_eq!(read(16, at(0), at(4100)), offset);
    assert_eq!(read(24, at(0), at(4098)), offset);
    assert_eq!(read(1, 0x8000_0000, 0), transfer, "no RAM there");
    assert_eq!(read(1, u64::MAX - 3, 0), transfer, "wraps");
    assert_eq!(read(16, at(0), 0x8000_0000), transfer);
    assert_eq!(read(24, at(0), 0x8000_0000), transfer, "the list");
    let list = machine.dma(Side::High, 1);
    list.write(0, at(4096));
    list.write(8, at(8192) + 8);
    assert_eq!(read(24, at(0), list.address().0), offset);
    list.write(8, 0x8000_0000u64);
    assert_eq!(read(24, at(0), list.address().0), transfer);
    assert!(
        page.bytes(0, 16384).iter().all(|byte| *byte == 0xee),
        "nothing was written"
    );
    list.write(8, at(8192));
    assert_eq!(read(24, at(0), list.address().0), Status::SUCCESS);
    assert!(page.bytes(0, 12288).iter().all(|byte| *byte == 0));
}

#[test]
fn several_namespaces_with_their_own_block_sizes() {
    let first = MemoryBackend::new(1 << 20).unwrap();
    let second = MemoryBackend::new(4 << 20).unwrap();
    let spies = [SpyBackend::new(first), SpyBackend::new(second)];
    let namespaces = vec![
        (1, spies[0].clone() as _, 512),
        (9, spies[1].clone() as _, 4096),
    ];
    let Setup {
        machine,
        mut driver,
        ..
    } = set_up(config(namespaces));
    let mut pair = driver.create_pair(1, 16);
    let data = Transfer::new(&machine, 8192);
    data.set(&pattern(1, 8192));
    pair.succeed(Command::blocks(nvm::WRITE, 9, 3, 2).data(&data));
    pair.succeed(Command::blocks(nvm::WRITE, 1, 3, 2).data(&data));
    let write = |offset| BlockOp::Write { offset, fua: false };
    assert_eq!(spies[1].take(), [write(3 * 4096)]);
    assert_eq!(spies[0].take(), [write(3 * 512)]);
    pair.succeed(Command::flush(0xffff_ffff));
    assert_eq!(
        (spies[0].take(), spies[1].take()),
        (vec![BlockOp::Flush], vec![BlockOp::Flush])
    );
    pair.succeed(Command::flush(9));
    assert_eq!(
        (spies[0].take(), spies[1].take()),
        (vec![], vec![BlockOp::Flush])
    );
    pair.succeed(Command::write_zeroes(9, 1, 2).or(12, nvm::WRITE_ZEROES_DEAC));
    let zeroes = BlockOp::WriteZeroes {
        offset: 4096,
        len: 8192,
        unmap: true,
        fua: false,
    };
    assert_eq!(spies[1].take(), [zeroes]);
    let list = Transfer::new(&machine, 4096);
    let ranges: Vec<(u64, u32)> = (0..256).map(|i| (i * 4, 2)).collect();
    pair.succeed(Command::deallocate(1, &list, &ranges));
    let discards = spies[0].take();
    assert_eq!(discards.len(), 256);
    assert_eq!(
        discards[255],
        BlockOp::Discard {
            offset: 255 * 4 * 512,
            len: 1024
        }
    );
    pair.succeed(Command::deallocate(1, &list, &ranges).dword(11, 3));
    assert_eq!(spies[0].take(), [], "hints without Deallocate");
    pair.succeed(Command::deallocate(1, &list, &[(5, 0)]));
    assert_eq!(spies[0].take(), [], "an empty range");
}

#[test]
fn deallocate_punches_holes_in_a_file() {
    use std::os::unix::fs::MetadataExt;
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("disk");
    std::fs::write(&path, vec![0xaa; 1 << 20]).unwrap();
    let file = FileBackend::open(&FileOptions::new(&path)).unwrap();
    let Setup {
        machine,
        mut driver,
        ..
    } = one(file);
    let mut pair = driver.create_pair(1, 16);
    pair.succeed(Command::flush(1));
    let before = std::fs::metadata(&path).unwrap().blocks();
    let list = Transfer::new(&machine, 4096);
    pair.succeed(Command::deallocate(1, &list, &[(0, 1024), (1536, 512)]));
    let after = std::fs::metadata(&path).unwrap().blocks();
    assert!(after <= before - 1500, "{before} blocks, then {after}");
    let data = Transfer::new(&machine, 512);
    pair.read(1, 1024, &data);
    assert_eq!(data.get(), [0xaa; 512]);
    pair.read(1, 0, &data);
    assert_eq!(data.get(), [0; 512]);
}

#[test]
fn host_errors_reach_the_guest_and_the_log() {
    let disk = FaultyBackend::new(MemoryBackend::new(1 << 20).unwrap());
    let Setup {
        machine,
        nvme,
        mut driver,
    } = one(disk.clone());
    let mut pair = driver.create_pair(1, 16);
    let data = Transfer::new(&machine, 512);
    let mut expect = |fault: i32, command: Command, status: Status| {
        disk.inject(Fault::any(0..u64::MAX, fault));
        assert_eq!(pair.status(command), status, "errno {fault}");
        disk.heal();
        assert_eq!(pair.status(Command::flush(1)), Status::SUCCESS, "goes on");
    };
    let write = Command::blocks(nvm::WRITE, 1, 8, 1).data(&data);
    let read = Command::blocks(nvm::READ, 1, 8, 1).data(&data);
    expect(libc::ENOSPC, write, Status::CAPACITY_EXCEEDED.dnr());
    expect(
        libc::EDQUOT,
        Command::write_zeroes(1, 0, 8),
        Status::CAPACITY_EXCEEDED.dnr(),
    );
    expect(libc::EIO, write, Status::WRITE_FAULT);
    expect(libc::EIO, read, Status::UNRECOVERED_READ_ERROR);
    expect(libc::EIO, read.fua(), Status::UNRECOVERED_READ_ERROR);
    expect(libc::EIO, Command::flush(1), Status::WRITE_FAULT);
    expect(libc::EROFS, write, Status::WRITE_PROTECTED.dnr());
    expect(libc::ENOMEM, read, Status::INTERNAL_ERROR);
    let list = Transfer::new(&machine, 4096);
    expect(
        libc::EIO,
        Command::deallocate(1, &list, &[(0, 8)]),
        Status::WRITE_FAULT,
    );
    expect(libc::EIO, Command::flush(0xffff_ffff), Status::WRITE_FAULT);
    let stats = nvme.stats();
    assert_eq!((stats.media_errors, stats.error_entries), (6, 10));
    assert_eq!(stats.queues[1].errors, 10);
    let smart = driver.admin_data(Command::log_page(log::SMART, 512), 512);
    assert_eq!((smart[160], smart[176]), (6, 10));
    // Turning the cache off needs a flush; when that fails, it stays on.
    disk.inject(Fault::any(0..1, libc::EIO));
    let off = Command::set_feature(feature::VOLATILE_WRITE_CACHE, 0);
    assert_eq!(driver.admin.status(off), Status::WRITE_FAULT);
    let cache = Command::get_feature(feature::VOLATILE_WRITE_CACHE, 0);
    assert_eq!(driver.admin.succeed(cache), 1);
    disk.heal();
    driver.admin.succeed(off);
    assert_eq!(driver.admin.succeed(cache), 0);
}

/// Of three slots two are used at most; the rest waits, and nothing is lost.
#[test]
fn a_full_completion_queue_makes_submissions_wait() {
    let Setup {
        nvme, mut driver, ..
    } = one(NullBackend::new(1 << 20));
    let vector = driver.vectors[1].clone();
    let mut pair = driver.create_pair(1, 64);
    drop(pair);
    driver.admin.succeed(Command::delete_sq(1));
    driver.admin.succeed(Command::delete_cq(1));
    let machine = driver.function.machine().clone();
    let mut cq = tests::nvme::CompletionRing::new(&machine, driver.bar.clone(), 1, 3, Some(vector));
    driver.admin.succeed(Command::create_cq(1, 3, cq.base(), 1));
    let mut sq = driver.create_sq(1, 64, 1);
    let cids: Vec<u16> = (0..50).map(|_| sq.push(Command::flush(1))).collect();
    sq.ring();
    let mut seen = Vec::new();
    while seen.len() < cids.len() {
        let first = cq.wait();
        let second = cq.wait();
        assert!(cq.poll().is_none(), "more than the ring holds");
        seen.extend([first.cid, second.cid]);
        assert!(usize::from(second.sq_head) == seen.len() % 64);
        cq.ring();
    }
    assert_eq!(seen, cids);
    assert_eq!(nvme.stats().queues[1].commands, 50);
    pair = driver.create_pair(2, 16);
    pair.succeed(Command::flush(1));
}

#[test]
fn queues_wrap_at_every_depth() {
    let Setup {
        machine,
        mut driver,
        ..
    } = one(MemoryBackend::new(1 << 20).unwrap());
    let buffers: Vec<_> = (0..8).map(|_| Transfer::new(&machine, 512)).collect();
    for (id, entries) in (1..).zip([2, 3, 5, 16]) {
        let mut pair = driver.create_pair(id, entries);
        let depth = usize::try_from(entries - 1).unwrap().min(buffers.len());
        let mut lba = 0;
        for round in 0..40u8 {
            let mut expect = Vec::new();
            for buffer in &buffers[..depth] {
                buffer.set(&[round; 512]);
                let write = Command::blocks(nvm::WRITE, 1, lba % 2048, 1).data(buffer);
                expect.push(pair.sq.push(write));
                lba += 1;
            }
            pair.sq.ring();
            for _ in 0..depth {
                let cqe = pair.cq.wait();
                assert!(cqe.status.is_success());
                expect.retain(|cid| *cid != cqe.cid);
            }
            assert!(expect.is_empty());
            pair.cq.ring();
        }
    }
}

#[test]
fn the_largest_queue_takes_all_it_can_hold() {
    let Setup {
        nvme, mut driver, ..
    } = one(NullBackend::new(1 << 20));
    let mut pair = driver.create_pair(1, 4096);
    for _ in 0..2 {
        for _ in 0..4095 {
            pair.sq.push(Command::flush(1));
        }
        pair.sq.ring();
        for _ in 0..4095 {
            assert!(pair.cq.wait().status.is_success());
        }
        pair.cq.ring();
    }
    let stats = nvme.stats();
    assert_eq!(stats.queues[1].completions, 8190);
    assert!(stats.queues[1].interrupts < 8190, "one interrupt a batch");
}

#[test]
fn two_submission_queues_share_a_completion_queue() {
    let Setup { mut driver, .. } = one(NullBackend::new(1 << 20));
    let Pair {
        sq: mut first,
        mut cq,
    } = driver.create_pair(1, 256);
    let mut second = driver.create_sq(7, 256, 1);
    // One command of each in turn, whatever the order of arrival.
    driver
        .admin
        .succeed(Command::set_feature(feature::ARBITRATION, 0));
    for _ in 0..100 {
        first.push(Command::flush(1));
        second.push(Command::flush(1));
    }
    first.ring();
    second.ring();
    let mut counts = [0, 0];
    for _ in 0..200 {
        let cqe = cq.wait();
        let index = usize::from(cqe.sq_id == 7);
        assert_eq!(usize::from(cqe.cid), counts[index], "in order");
        counts[index] += 1;
    }
    cq.ring();
    assert_eq!(counts, [100, 100]);
    driver.admin.succeed(Command::delete_sq(1));
    assert_eq!(
        driver.admin.status(Command::delete_cq(1)),
        Status::INVALID_QUEUE_DELETION.dnr()
    );
    second.push(Command::flush(1));
    second.ring();
    assert_eq!(cq.wait().sq_id, 7);
}

/// With the Arbitration Burst at one, two queues that both have work take turns.
#[test]
fn arbitration_burst_is_honoured() {
    let Setup { mut driver, .. } = one(NullBackend::new(1 << 20));
    driver
        .admin
        .succeed(Command::set_feature(feature::ARBITRATION, 1));
    let vector = driver.vectors[1].clone();
    let machine = driver.function.machine().clone();
    let mut cq =
        tests::nvme::CompletionRing::new(&machine, driver.bar.clone(), 1, 64, Some(vector));
    driver
        .admin
        .succeed(Command::create_cq(1, 64, cq.base(), 1));
    let mut first = driver.create_sq(1, 64, 1);
    let mut second = driver.create_sq(2, 64, 1);
    // Bus mastering is off while the doorbells ring, so that the worker finds both full.
    driver.function.set_bus_master(false);
    for _ in 0..8 {
        first.push(Command::flush(1));
        second.push(Command::flush(1));
    }
    first.ring();
    second.ring();
    driver.function.set_bus_master(true);
    let order: Vec<u16> = (0..16).map(|_| cq.wait().sq_id).collect();
    cq.ring();
    let turns: Vec<&[u16]> = order.chunks(2).collect();
    assert!(
        turns.iter().all(|turn| turn[0] == turn[1]),
        "bursts of two: {order:?}"
    );
    assert!(
        turns.windows(2).all(|pair| pair[0][0] != pair[1][0]),
        "in turn: {order:?}"
    );
}

#[test]
fn interrupts_are_coalesced_by_count_and_time_and_not_for_excepted_vectors() {
    let Setup {
        nvme, mut driver, ..
    } = one(NullBackend::new(1 << 20));
    let mut pair = driver.create_pair(1, 64);
    pair.succeed(Command::flush(1));
    let interrupts = |nvme: &Nvme| nvme.stats().queues[1].interrupts;
    // Eight events or 25.5 ms, which is the longest.
    driver
        .admin
        .succeed(Command::set_feature(feature::INTERRUPT_COALESCING, 0xff07));
    let submit = |pair: &mut Pair, count: usize| {
        for _ in 0..count {
            pair.sq.push(Command::flush(1));
            pair.sq.ring();
        }
    };
    let vector = driver.vectors[1].clone();
    vector.wait(std::time::Duration::ZERO);
    let before = interrupts(&nvme);
    submit(&mut pair, 24);
    for _ in 0..24 {
        pair.cq.wait();
    }
    pair.cq.ring();
    let raised = interrupts(&nvme) - before;
    assert!(
        (1..=6).contains(&raised),
        "{raised} interrupts for 24 events"
    );
    // A lone event is signalled in the end.
    vector.wait(std::time::Duration::ZERO);
    submit(&mut pair, 1);
    assert!(vector.wait(TIMEOUT) > 0);
    pair.cq.wait();
    pair.cq.ring();
    // The vector is excepted: an interrupt at once, for each.
    driver
        .admin
        .succeed(Command::set_feature(feature::INTERRUPT_VECTOR, 1 << 16 | 1));
    let before = interrupts(&nvme);
    for _ in 0..10 {
        pair.succeed(Command::flush(1));
    }
    assert!(interrupts(&nvme) - before >= 10);
}

#[test]
fn a_queue_without_interrupts_raises_none() {
    let Setup {
        nvme, mut driver, ..
    } = one(NullBackend::new(1 << 20));
    let mut pair = driver.create_polled_pair(5, 16);
    for _ in 0..50 {
        pair.succeed(Command::flush(1));
    }
    let stats = nvme.stats();
    let queue = stats.queues.iter().find(|queue| queue.id == 5).unwrap();
    assert_eq!(
        (queue.commands, queue.completions, queue.interrupts),
        (50, 50, 0)
    );
    assert_eq!(queue.doorbells, 50);
}

#[test]
fn all_64_queue_pairs_work_and_so_do_two_controllers() {
    let machine = Machine::new();
    let disks = [1u8, 2].map(|_| MemoryBackend::new(1 << 20).unwrap());
    let _first = attach(&machine, 3, config(vec![(1, disks[0].clone(), 512)]));
    let _second = attach(&machine, 4, config(vec![(1, disks[1].clone(), 512)]));
    let mut drivers = [3, 4].map(|device| Driver::bring_up(&machine, device));
    let data = Transfer::new(&machine, 512);
    let mut pairs: Vec<Pair> = (1..=64).map(|id| drivers[0].create_pair(id, 8)).collect();
    for (index, pair) in (0u8..).zip(&mut pairs) {
        data.set(&[index; 512]);
        pair.write(1, index.into(), &data);
    }
    let mut other = drivers[1].create_pair(1, 8);
    for (index, pair) in (0u8..).zip(pairs.iter_mut().rev()) {
        pair.read(1, index.into(), &data);
        assert_eq!(data.get(), [index; 512]);
    }
    other.read(1, 5, &data);
    assert_eq!(data.get(), [0; 512], "another controller's disk");
}

#[test]
fn statistics_and_polling_policy() {
    use devices::worker::PollPolicy;
    let Setup {
        machine,
        nvme,
        mut driver,
    } = one(MemoryBackend::new(1 << 20).unwrap());
    let mut pair = driver.create_pair(1, 16);
    let data = Transfer::new(&machine, 4096);
    let spin = PollPolicy::Adaptive {
        spin: std::time::Duration::from_micros(50),
    };
    nvme.set_policy(spin);
    assert_eq!(nvme.policy(), spin);
    for _ in 0..10 {
        pair.write(1, 0, &data);
        pair.read(1, 0, &data);
    }
    nvme.set_policy(PollPolicy::Interrupt);
    pair.read(1, 0, &data);
    let stats = nvme.stats();
    let queue = &stats.queues[1];
    assert_eq!((queue.commands, queue.reads, queue.writes), (21, 11, 10));
    assert_eq!(
        (queue.bytes_read, queue.bytes_written),
        (11 * 4096, 10 * 4096)
    );
    assert_eq!(
        (queue.doorbells, queue.completions, queue.errors),
        (21, 21, 0)
    );
    let json = serde_json::to_value(&stats).unwrap();
    assert_eq!(json["queues"][1]["bytes_read"], 11 * 4096);
}

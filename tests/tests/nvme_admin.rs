//! NVMe: the admin command set.

use std::sync::Arc;

use devices::block::{BlockOp, MemoryBackend};
use devices::nvme::spec::command::{Status, admin, cns, feature, log, nvm};
use devices::nvme::{Config, Nvme};
use tests::nvme::{Command, Driver, SpyBackend, Transfer, attach, config};
use tests::{Machine, Side};

const DEVICE: u8 = 3;

fn bring_up(config: Config) -> (Arc<Machine>, Arc<Nvme>, Driver) {
    let machine = Machine::new();
    let nvme = attach(&machine, DEVICE, config);
    let driver = Driver::bring_up(&machine, DEVICE);
    (machine, nvme, driver)
}

fn two_namespaces() -> Config {
    let small = MemoryBackend::new(1 << 20).unwrap();
    let large = MemoryBackend::new_read_only(8 << 20).unwrap();
    config(vec![(7, large, 4096), (2, small, 512)])
}

fn u16_at(data: &[u8], at: usize) -> u16 {
    u16::from_le_bytes([data[at], data[at + 1]])
}

fn u32_at(data: &[u8], at: usize) -> u32 {
    u32::from_le_bytes(data[at..at + 4].try_into().unwrap())
}

fn u64_at(data: &[u8], at: usize) -> u64 {
    u64::from_le_bytes(data[at..at + 8].try_into().unwrap())
}

#[test]
fn identify_controller_says_what_works() {
    let (_machine, _nvme, mut driver) = bring_up(two_namespaces());
    let id = driver.admin_data(Command::identify(cns::CONTROLLER, 0), 4096);
    assert_eq!(&id[4..24], b"test-1              ");
    assert_eq!(u32_at(&id, 80), 0x1_0400, "VER");
    assert_eq!(id[77], 8, "MDTS");
    assert_eq!((id[512], id[513]), (0x66, 0x44), "SQES, CQES");
    assert_eq!(u32_at(&id, 516), 7, "NN is the highest id");
    assert_eq!(u16_at(&id, 520), 0b1_1100, "ONCS");
    assert_eq!(id[525], 0b111, "VWC");
    assert_eq!(u16_at(&id, 256), 0, "OACS");
    assert_eq!((id[258], id[259], id[262]), (3, 3, 63), "ACL, AERL, ELPE");
    assert!(id[768..].starts_with(b"nqn.2014-08.org.nvmexpress:uuid:"));
    assert_eq!(id[768 + 68], 0);
}

#[test]
fn identify_namespaces_with_sparse_ids() {
    let (_machine, _nvme, mut driver) = bring_up(two_namespaces());
    let ns = driver.admin_data(Command::identify(cns::NAMESPACE, 2), 4096);
    assert_eq!(
        (u64_at(&ns, 0), u64_at(&ns, 8), u64_at(&ns, 16)),
        (2048, 2048, 2048)
    );
    assert_eq!((ns[25], ns[26], ns[99]), (0, 0, 0), "NLBAF, FLBAS, NSATTR");
    assert_eq!(u32_at(&ns, 128), 9 << 16, "LBAF0");
    let ns = driver.admin_data(Command::identify(cns::NAMESPACE, 7), 4096);
    assert_eq!(
        (u64_at(&ns, 0), ns[99], u32_at(&ns, 128)),
        (2048, 1, 12 << 16)
    );
    let inactive = driver.admin_data(Command::identify(cns::NAMESPACE, 3), 4096);
    assert!(inactive.iter().all(|byte| *byte == 0));
    for list in [cns::ACTIVE_NAMESPACES, cns::ALLOCATED_NAMESPACES] {
        let ids = |data: Vec<u8>| [u32_at(&data, 0), u32_at(&data, 4), u32_at(&data, 8)];
        assert_eq!(
            ids(driver.admin_data(Command::identify(list, 0), 4096)),
            [2, 7, 0]
        );
        assert_eq!(
            ids(driver.admin_data(Command::identify(list, 2), 4096)),
            [7, 0, 0]
        );
        assert_eq!(
            ids(driver.admin_data(Command::identify(list, 7), 4096)),
            [0, 0, 0]
        );
    }
    let first = driver.admin_data(Command::identify(cns::DESCRIPTORS, 2), 4096);
    let second = driver.admin_data(Command::identify(cns::DESCRIPTORS, 7), 4096);
    assert_eq!((first[0], first[1], first[20]), (3, 16, 0), "one UUID");
    assert_ne!(first[4..20], second[4..20]);
    let list = driver.admin_data(Command::identify(cns::CONTROLLERS, 0), 4096);
    assert_eq!(u32_at(&list, 0), 1, "one controller, id 0");
}

#[test]
fn identify_refuses() {
    let (machine, _nvme, mut driver) = bring_up(two_namespaces());
    let data = Transfer::new(&machine, 4096);
    let mut status = |cns, nsid| {
        driver
            .admin
            .status(Command::identify(cns, nsid).data(&data))
    };
    let invalid_namespace = Status::INVALID_NAMESPACE.dnr();
    assert_eq!(status(cns::NAMESPACE, 0), invalid_namespace);
    assert_eq!(status(cns::NAMESPACE, 8), invalid_namespace);
    assert_eq!(status(cns::NAMESPACE, 0xffff_ffff), invalid_namespace);
    assert_eq!(
        status(cns::ACTIVE_NAMESPACES, 0xffff_fffe),
        invalid_namespace
    );
    assert_eq!(status(cns::DESCRIPTORS, 3), invalid_namespace);
    assert_eq!(status(0x04, 0), Status::INVALID_FIELD.dnr());
    assert_eq!(status(0xff, 0), Status::INVALID_FIELD.dnr());
}

#[test]
fn admin_data_pointers_are_checked() {
    let (machine, _nvme, mut driver) = bring_up(two_namespaces());
    let page = machine.dma(Side::Low, 1).address().0;
    let identify = Command::identify(cns::CONTROLLER, 0);
    let mut status = |command| driver.admin.status(command);
    assert_eq!(
        status(identify.prp(page + 8, page + 8)),
        Status::PRP_OFFSET_INVALID.dnr()
    );
    assert_eq!(
        status(identify.prp(page + 1, page)),
        Status::PRP_OFFSET_INVALID.dnr()
    );
    assert_eq!(
        status(identify.prp(!0xfff, 0)),
        Status::DATA_TRANSFER_ERROR.dnr()
    );
    assert_eq!(
        status(identify.prp(page, 0).or(0, 1 << 14)),
        Status::INVALID_FIELD.dnr()
    );
    assert_eq!(
        status(identify.prp(page, 0).or(0, 1 << 8)),
        Status::INVALID_FIELD.dnr()
    );
    for opcode in [0x03, 0x0d, 0x10, 0x18, 0x80, 0xff] {
        assert_eq!(
            status(Command::new(opcode, 0)),
            Status::INVALID_OPCODE.dnr()
        );
    }
}

#[test]
fn queue_creation_errors() {
    let config = Config {
        max_queue_pairs: 4,
        queue_entries: 64,
        ..two_namespaces()
    };
    let machine = Machine::new();
    let _nvme = attach(&machine, DEVICE, config);
    let mut driver = Driver::probe_with_vectors(&machine, DEVICE, 5);
    driver.enable(tests::nvme::Enable::default());
    let base = machine.dma(Side::Low, 4).address().0;
    let mut status = |command| driver.admin.status(command);
    let cq = Command::create_cq;
    let sq = Command::create_sq;
    let bad_id = Status::INVALID_QUEUE_ID.dnr();
    let bad_size = Status::INVALID_QUEUE_SIZE.dnr();
    assert_eq!(status(cq(0, 16, base, 0)), bad_id);
    assert_eq!(status(cq(5, 16, base, 0)), bad_id);
    assert_eq!(status(cq(0xffff, 16, base, 0)), bad_id);
    assert_eq!(status(cq(1, 1, base, 0)), bad_size);
    assert_eq!(status(cq(1, 65, base, 0)), bad_size);
    assert_eq!(
        status(cq(1, 64, base, 5)),
        Status::INVALID_INTERRUPT_VECTOR.dnr()
    );
    assert_eq!(
        status(cq(1, 64, base, 0).dword(11, 2)),
        Status::INVALID_FIELD.dnr()
    );
    assert_eq!(
        status(cq(1, 64, base + 16, 0)),
        Status::PRP_OFFSET_INVALID.dnr()
    );
    assert_eq!(status(cq(1, 64, base, 4)), Status::SUCCESS);
    assert_eq!(status(cq(1, 64, base, 4)), bad_id, "exists");

    assert_eq!(
        status(sq(1, 16, base, 0)),
        bad_id,
        "the admin completion queue"
    );
    assert_eq!(
        status(sq(1, 16, base, 2)),
        Status::COMPLETION_QUEUE_INVALID.dnr()
    );
    assert_eq!(
        status(sq(1, 16, base, 999)),
        Status::COMPLETION_QUEUE_INVALID.dnr()
    );
    assert_eq!(status(sq(0, 16, base, 1)), bad_id);
    assert_eq!(status(sq(5, 16, base, 1)), bad_id);
    assert_eq!(status(sq(1, 1, base, 1)), bad_size);
    assert_eq!(status(sq(1, 65, base, 1)), bad_size);
    assert_eq!(
        status(sq(1, 16, base, 1).dword(11, 1 << 16)),
        Status::INVALID_FIELD.dnr()
    );
    assert_eq!(
        status(sq(1, 16, base + 64, 1)),
        Status::PRP_OFFSET_INVALID.dnr()
    );
    assert_eq!(status(sq(3, 16, base + 4096, 1)), Status::SUCCESS);
    assert_eq!(status(sq(3, 16, base, 1)), bad_id, "exists");

    assert_eq!(
        status(Command::delete_cq(1)),
        Status::INVALID_QUEUE_DELETION.dnr()
    );
    assert_eq!(status(Command::delete_cq(0)), bad_id);
    assert_eq!(status(Command::delete_cq(2)), bad_id);
    assert_eq!(status(Command::delete_sq(0)), bad_id);
    assert_eq!(status(Command::delete_sq(1)), bad_id);
    assert_eq!(status(Command::delete_sq(77)), bad_id);
    assert_eq!(status(Command::delete_sq(3)), Status::SUCCESS);
    assert_eq!(status(Command::delete_sq(3)), bad_id);
    assert_eq!(status(Command::delete_cq(1)), Status::SUCCESS);
    assert_eq!(status(cq(1, 2, base, 0)), Status::SUCCESS, "again");
}

#[test]
fn entry_sizes_must_be_set_before_io_queues() {
    let machine = Machine::new();
    let _nvme = attach(&machine, DEVICE, two_namespaces());
    let mut driver = Driver::probe(&machine, DEVICE);
    let cc = devices::nvme::spec::Cc::new();
    driver.enable(tests::nvme::Enable { cc, entries: 32 });
    let base = machine.dma(Side::Low, 1).address().0;
    let status = driver.admin.status(Command::create_cq(1, 16, base, 0));
    assert_eq!(status, Status::INVALID_QUEUE_SIZE.dnr());
}

#[test]
fn number_of_queues() {
    let (_machine, _nvme, mut driver) = bring_up(two_namespaces());
    let mut set = |value| {
        driver
            .admin
            .execute(Command::set_feature(feature::NUMBER_OF_QUEUES, value))
    };
    let granted = set(0xfffe_fffe);
    assert_eq!(
        (granted.status, granted.result),
        (Status::SUCCESS, 0x003f_003f)
    );
    assert_eq!(set(0x0001_0002).result, 0x0001_0002);
    assert_eq!(set(0x0001_ffff).status.code(), Status::INVALID_FIELD);
    assert_eq!(set(0xffff_0001).status.code(), Status::INVALID_FIELD);
    let _pair = driver.create_pair(2, 16);
    let mut status = |command| driver.admin.status(command);
    let set = Command::set_feature(feature::NUMBER_OF_QUEUES, 0x0007_0007);
    assert_eq!(status(set), Status::COMMAND_SEQUENCE_ERROR.dnr());
    assert_eq!(
        status(Command::create_cq(3, 16, 0x1000, 0)),
        Status::INVALID_QUEUE_ID.dnr()
    );
    assert_eq!(
        status(Command::create_sq(3, 16, 0x1000, 2)),
        Status::SUCCESS
    );
    assert_eq!(
        status(Command::create_sq(4, 16, 0x1000, 2)),
        Status::INVALID_QUEUE_ID.dnr()
    );
}

#[test]
fn features_are_honoured_or_refused() {
    let (_machine, _nvme, mut driver) = bring_up(two_namespaces());
    let mut set = |fid, value| driver.admin.status(Command::set_feature(fid, value));
    let invalid = Status::INVALID_FIELD.dnr();
    assert_eq!(set(feature::ARBITRATION, 3), Status::SUCCESS);
    assert_eq!(set(feature::ARBITRATION, 0x0101_0103), invalid, "weights");
    assert_eq!(
        set(feature::POWER_MANAGEMENT, 0),
        Status::FEATURE_NOT_CHANGEABLE.dnr()
    );
    assert_eq!(
        set(feature::ERROR_RECOVERY, 5),
        Status::FEATURE_NOT_CHANGEABLE.dnr()
    );
    assert_eq!(set(feature::TEMPERATURE_THRESHOLD, 350), Status::SUCCESS);
    assert_eq!(
        set(feature::TEMPERATURE_THRESHOLD, 1 << 16 | 350),
        invalid,
        "sensor 1"
    );
    assert_eq!(
        set(feature::TEMPERATURE_THRESHOLD, 2 << 20),
        invalid,
        "no such kind"
    );
    assert_eq!(
        set(feature::TEMPERATURE_THRESHOLD, 1 << 20 | 280),
        Status::SUCCESS
    );
    assert_eq!(set(feature::INTERRUPT_COALESCING, 0x0a07), Status::SUCCESS);
    assert_eq!(set(feature::INTERRUPT_VECTOR, 1 << 16 | 3), Status::SUCCESS);
    assert_eq!(set(feature::INTERRUPT_VECTOR, 65), invalid);
    assert_eq!(set(feature::WRITE_ATOMICITY, 1), Status::SUCCESS);
    assert_eq!(
        set(feature::ASYNC_EVENT_CONFIG, 0x100),
        invalid,
        "no notices"
    );
    assert_eq!(set(feature::ASYNC_EVENT_CONFIG, 0x1f), Status::SUCCESS);
    for fid in [0x00, 0x03, 0x0c, 0x0f, 0x10, 0x80, 0xff] {
        assert_eq!(set(fid, 0), invalid, "feature {fid:#x}");
    }
    let save = Command::set_feature(feature::ARBITRATION, 0).or(10, feature::SAVE);
    assert_eq!(
        driver.admin.status(save),
        Status::FEATURE_NOT_SAVEABLE.dnr()
    );
    let for_namespace = Command::set_feature(feature::ARBITRATION, 0).dword(1, 2);
    let status = driver.admin.status(for_namespace);
    assert_eq!(status, Status::FEATURE_NOT_NAMESPACE_SPECIFIC.dnr());

    let mut get = |fid, select, cdw11| {
        let cqe = driver
            .admin
            .execute(Command::get_feature(fid, select).dword(11, cdw11));
        (cqe.status.code(), cqe.result)
    };
    let ok = |value| (Status::SUCCESS, value);
    assert_eq!(get(feature::ARBITRATION, 0, 0), ok(3));
    assert_eq!(get(feature::ARBITRATION, 1, 0), ok(5), "default");
    assert_eq!(get(feature::ARBITRATION, 2, 0), ok(5), "saved");
    assert_eq!(get(feature::ARBITRATION, 3, 0), ok(feature::CHANGEABLE));
    assert_eq!(get(feature::ERROR_RECOVERY, 3, 0), ok(0));
    assert_eq!(get(feature::ARBITRATION, 4, 0).0, Status::INVALID_FIELD);
    assert_eq!(get(feature::POWER_MANAGEMENT, 0, 0), ok(0));
    assert_eq!(get(feature::TEMPERATURE_THRESHOLD, 0, 0), ok(350));
    assert_eq!(get(feature::TEMPERATURE_THRESHOLD, 0, 1 << 20), ok(280));
    assert_eq!(
        get(feature::TEMPERATURE_THRESHOLD, 0, 3 << 16).0,
        Status::INVALID_FIELD
    );
    assert_eq!(get(feature::VOLATILE_WRITE_CACHE, 0, 0), ok(1));
    assert_eq!(get(feature::INTERRUPT_COALESCING, 0, 0), ok(0x0a07));
    assert_eq!(get(feature::INTERRUPT_VECTOR, 0, 3), ok(1 << 16 | 3));
    assert_eq!(get(feature::INTERRUPT_VECTOR, 0, 4), ok(4));
    assert_eq!(
        get(feature::INTERRUPT_VECTOR, 0, 65).0,
        Status::INVALID_FIELD
    );
    assert_eq!(get(feature::WRITE_ATOMICITY, 0, 0), ok(1));
    assert_eq!(get(feature::ASYNC_EVENT_CONFIG, 0, 0), ok(0x1f));
    assert_eq!(get(0x0c, 0, 0).0, Status::INVALID_FIELD);
}

#[test]
fn turning_the_write_cache_off_flushes_and_makes_writes_stable() {
    let machine = Machine::new();
    let spy = SpyBackend::new(MemoryBackend::new(1 << 20).unwrap());
    let _nvme = attach(&machine, DEVICE, config(vec![(1, spy.clone(), 512)]));
    let mut driver = Driver::bring_up(&machine, DEVICE);
    let mut pair = driver.create_pair(1, 16);
    let data = Transfer::new(&machine, 512);
    let write = BlockOp::Write {
        offset: 0,
        fua: false,
    };
    let stable = BlockOp::Write {
        offset: 0,
        fua: true,
    };
    pair.write(1, 0, &data);
    assert_eq!(spy.take(), [write]);
    pair.succeed(Command::blocks(nvm::WRITE, 1, 0, 1).data(&data).fua());
    assert_eq!(spy.take(), [stable]);
    driver
        .admin
        .succeed(Command::set_feature(feature::VOLATILE_WRITE_CACHE, 0));
    assert_eq!(spy.take(), [BlockOp::Flush]);
    pair.write(1, 0, &data);
    assert_eq!(spy.take(), [stable]);
    pair.succeed(Command::write_zeroes(1, 0, 4));
    let zeroes = BlockOp::WriteZeroes {
        offset: 0,
        len: 2048,
        unmap: false,
        fua: true,
    };
    assert_eq!(spy.take(), [zeroes]);
    let list = Transfer::new(&machine, 4096);
    pair.succeed(Command::deallocate(1, &list, &[(0, 2)]));
    let discard = BlockOp::Discard {
        offset: 0,
        len: 1024,
    };
    assert_eq!(spy.take(), [discard, BlockOp::Flush]);
    pair.succeed(Command::blocks(nvm::READ, 1, 0, 1).data(&data).fua());
    assert_eq!(
        spy.take(),
        [BlockOp::Read { offset: 0 }],
        "everything is stable"
    );
    driver
        .admin
        .succeed(Command::set_feature(feature::VOLATILE_WRITE_CACHE, 1));
    pair.write(1, 0, &data);
    assert_eq!(spy.take(), [write]);
    pair.succeed(Command::blocks(nvm::READ, 1, 0, 1).data(&data).fua());
    assert_eq!(spy.take(), [BlockOp::Flush, BlockOp::Read { offset: 0 }]);
}

#[test]
fn error_log_tells_newest_first() {
    let (machine, nvme, mut driver) = bring_up(two_namespaces());
    let empty = driver.admin_data(Command::log_page(log::ERROR, 4096), 4096);
    assert!(empty.iter().all(|byte| *byte == 0));
    let cqe = driver.admin.execute(Command::new(0x7f, 0));
    assert_eq!(cqe.status, Status::INVALID_OPCODE.dnr().more());
    let mut pair = driver.create_pair(1, 16);
    let data = Transfer::new(&machine, 512);
    let cqe = pair.execute(Command::blocks(nvm::READ, 2, 5000, 1).data(&data));
    assert_eq!(cqe.status, Status::LBA_OUT_OF_RANGE.dnr().more());
    let page = driver.admin_data(Command::log_page(log::ERROR, 192), 192);
    assert_eq!(
        (u64_at(&page, 0), u64_at(&page, 64), u64_at(&page, 128)),
        (2, 1, 0)
    );
    assert_eq!(
        (u16_at(&page, 8), u16_at(&page, 10)),
        (1, cqe.cid),
        "SQ, CID"
    );
    assert_eq!(u16_at(&page, 12) >> 1, Status::LBA_OUT_OF_RANGE.dnr().0);
    assert_eq!(
        (u64_at(&page, 16), u32_at(&page, 24)),
        (5000, 2),
        "LBA, NSID"
    );
    // The second entry by offset.
    let second = driver.admin_data(Command::log_page(log::ERROR, 64).dword(12, 64), 64);
    assert_eq!(u64_at(&second, 0), 1);
    assert_eq!(nvme.stats().error_entries, 2);
}

#[test]
fn log_page_lengths_and_offsets() {
    let (machine, _nvme, mut driver) = bring_up(two_namespaces());
    let data = Transfer::new(&machine, 4096);
    let mut status = |command: Command| driver.admin.status(command.data(&data));
    let firmware = |bytes| Command::log_page(log::FIRMWARE_SLOT, bytes);
    assert_eq!(status(firmware(4)), Status::SUCCESS);
    assert_eq!(
        status(firmware(512).dword(12, 2)),
        Status::INVALID_FIELD.dnr(),
        "offset of 2"
    );
    assert_eq!(
        status(firmware(4).dword(12, 512)),
        Status::SUCCESS,
        "at the end"
    );
    assert_eq!(
        status(firmware(4).dword(12, 516)),
        Status::INVALID_FIELD.dnr(),
        "beyond"
    );
    assert_eq!(
        status(firmware(4).dword(13, 1)),
        Status::INVALID_FIELD.dnr(),
        "far beyond"
    );
    assert_eq!(
        status(firmware(4).dword(11, 0xffff)),
        Status::INVALID_FIELD.dnr(),
        "over MDTS"
    );
    assert_eq!(
        status(Command::log_page(0x04, 64)),
        Status::INVALID_LOG_PAGE.dnr()
    );
    assert_eq!(
        status(Command::log_page(0xc0, 64)),
        Status::INVALID_LOG_PAGE.dnr()
    );
    let one_namespace = Command::log_page(log::SMART, 512).dword(1, 2);
    assert_eq!(status(one_namespace), Status::INVALID_FIELD.dnr());
    // More than there is: zeroes follow.
    data.set(&[0xff; 4096]);
    assert_eq!(status(firmware(1024)), Status::SUCCESS);
    let page = data.get();
    assert_eq!(page[0], 1);
    assert_eq!(
        &page[8..16],
        format!("{:8}", env!("CARGO_PKG_VERSION")).as_bytes()
    );
    assert!(page[512..1024].iter().all(|byte| *byte == 0) && page[1024] == 0xff);
    let effects = driver.admin_data(Command::log_page(log::COMMAND_EFFECTS, 4096), 4096);
    assert_eq!(u32_at(&effects, usize::from(admin::IDENTIFY) * 4), 1);
    assert_eq!(u32_at(&effects, usize::from(admin::ABORT) * 4), 1);
    assert_eq!(u32_at(&effects, 0x10 * 4), 0, "no firmware commit");
    assert_eq!(u32_at(&effects, 1024 + usize::from(nvm::WRITE) * 4), 3);
    assert_eq!(u32_at(&effects, 1024 + 0x05 * 4), 0, "no compare");
}

#[test]
fn smart_counts_what_was_done() {
    let (machine, _nvme, mut driver) = bring_up(two_namespaces());
    let mut pair = driver.create_pair(1, 16);
    let data = Transfer::new(&machine, 1 << 20);
    pair.write(2, 0, &data);
    pair.read(2, 0, &data);
    pair.read(2, 0, &data);
    pair.succeed(Command::write_zeroes(2, 0, 1));
    pair.status(Command::blocks(nvm::READ, 2, 4000, 1).data(&data));
    let smart = driver.admin_data(Command::log_page(log::SMART, 512), 512);
    assert_eq!(smart[0], 0, "no warning");
    assert_eq!(u16_at(&smart, 1), 298, "temperature");
    assert_eq!((smart[3], smart[4], smart[5]), (100, 10, 0));
    assert_eq!(u64_at(&smart, 32), 5, "2 MiB are 4.1 thousand units");
    assert_eq!(u64_at(&smart, 48), 3);
    assert_eq!(
        (u64_at(&smart, 64), u64_at(&smart, 80)),
        (2, 2),
        "host commands"
    );
    assert_eq!(u64_at(&smart, 112), 1, "power cycles");
    assert_eq!(
        (u64_at(&smart, 160), u64_at(&smart, 176)),
        (0, 1),
        "media, log entries"
    );
}

#[test]
fn events_are_reported_limited_and_aborted() {
    let (_machine, _nvme, mut driver) = bring_up(two_namespaces());
    let request = Command::new(admin::ASYNC_EVENT_REQUEST, 0);
    let cids: Vec<u16> = (0..4).map(|_| driver.admin.sq.push(request)).collect();
    driver.admin.sq.ring();
    assert_eq!(
        driver.admin.status(request),
        Status::AER_LIMIT_EXCEEDED.dnr()
    );

    // A doorbell of a queue that does not exist.
    driver.bar.write(0x1000 + 8 * 9, 1u32);
    let cqe = driver.admin.cq.wait();
    driver.admin.cq.ring();
    assert_eq!(
        (cqe.cid, cqe.result),
        (cids[0], 0x01_0000),
        "error log, invalid register"
    );
    // The type is masked until the log is read; a second event waits.
    let pair = driver.create_pair(1, 16);
    pair.sq.ring_value(16);
    assert!(driver.admin.cq.stays_empty());
    let retain = Command::log_page(log::ERROR, 64).or(10, 1 << 15);
    driver.admin_data(retain, 64);
    assert!(driver.admin.cq.stays_empty(), "retained");
    let cid = driver.admin.sq.push(
        Command::log_page(log::ERROR, 64).data(&Transfer::new(driver.function.machine(), 64)),
    );
    driver.admin.sq.ring();
    let mut got = [driver.admin.cq.wait(), driver.admin.cq.wait()];
    driver.admin.cq.ring();
    got.sort_by_key(|cqe| cqe.cid != cid);
    assert!(got[0].status.is_success());
    assert_eq!(
        (got[1].cid, got[1].result),
        (cids[1], 0x01_0100),
        "invalid value"
    );

    // Abort one of the two that are left.
    let abort = |sqid: u16, cid: u16| {
        Command::new(admin::ABORT, 0).dword(10, u32::from(cid) << 16 | u32::from(sqid))
    };
    let abort_cid = driver.admin.sq.push(abort(0, cids[3]));
    driver.admin.sq.ring();
    let mut got = [driver.admin.cq.wait(), driver.admin.cq.wait()];
    driver.admin.cq.ring();
    got.sort_by_key(|cqe| cqe.cid != abort_cid);
    assert_eq!(
        (got[0].status, got[0].result),
        (Status::SUCCESS, 0),
        "aborted"
    );
    assert_eq!(
        (got[1].cid, got[1].status),
        (cids[3], Status::ABORT_REQUESTED)
    );
    assert_eq!(driver.admin.succeed(abort(0, cids[3])), 1, "gone already");
    assert_eq!(driver.admin.succeed(abort(1, cids[2])), 1, "another queue");
    assert_eq!(driver.admin.succeed(abort(999, 0)), 1, "no such queue");
}

#[test]
fn temperature_events_follow_the_threshold() {
    let (_machine, _nvme, mut driver) = bring_up(two_namespaces());
    let threshold = |kelvin| Command::set_feature(feature::TEMPERATURE_THRESHOLD, kelvin);
    let cid = driver
        .admin
        .sq
        .push(Command::new(admin::ASYNC_EVENT_REQUEST, 0));
    driver.admin.sq.ring();
    driver.admin.succeed(threshold(290));
    assert!(driver.admin.cq.stays_empty(), "not configured");
    let smart = driver.admin_data(Command::log_page(log::SMART, 512), 512);
    assert_eq!(smart[0], 0b10, "but the warning is there");
    driver.admin.succeed(threshold(343));
    driver
        .admin
        .succeed(Command::set_feature(feature::ASYNC_EVENT_CONFIG, 0b10));
    let set = driver.admin.sq.push(threshold(290));
    driver.admin.sq.ring();
    let mut got = [driver.admin.cq.wait(), driver.admin.cq.wait()];
    driver.admin.cq.ring();
    got.sort_by_key(|cqe| cqe.cid != set);
    assert_eq!(
        (got[1].cid, got[1].result),
        (cid, 0x02_0101),
        "SMART log, temperature"
    );
}

#[test]
fn a_head_beyond_the_tail_is_reported() {
    let (_machine, _nvme, mut driver) = bring_up(two_namespaces());
    let cid = driver
        .admin
        .sq
        .push(Command::new(admin::ASYNC_EVENT_REQUEST, 0));
    driver.admin.sq.ring();
    let mut pair = driver.create_pair(1, 16);
    pair.cq.ring_value(5);
    // The worker looks at the head when it has something to do.
    pair.succeed(Command::flush(2));
    let cqe = driver.admin.cq.wait();
    driver.admin.cq.ring();
    assert_eq!((cqe.cid, cqe.result), (cid, 0x01_0100));
    pair.succeed(Command::flush(2));
}

#[test]
fn the_admin_queue_wraps_many_times() {
    let (_machine, nvme, mut driver) = bring_up(two_namespaces());
    for _ in 0..100 {
        driver
            .admin
            .succeed(Command::get_feature(feature::ARBITRATION, 0));
    }
    let admin = &nvme.stats().queues[0];
    assert_eq!((admin.id, admin.commands), (0, 101));
    assert_eq!(admin.completions, admin.commands);
    assert!(admin.doorbells >= 101 && admin.interrupts > 0);
}

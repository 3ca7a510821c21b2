//! NVMe under I/O: Bus Master Enable toggled, resets, queues deleted, the controller removed.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use devices::block::{BlockBackend, FaultyBackend, FileBackend, FileOptions, MemoryBackend};
use devices::nvme::Nvme;
use devices::nvme::spec::command::nvm;
use tests::Machine;
use tests::nvme::{Command, Driver, Enable, Pair, Transfer, attach, config};

const DEVICE: u8 = 3;

fn set_up(disk: Arc<dyn BlockBackend>) -> (Arc<Machine>, Arc<Nvme>, Driver) {
    let machine = Machine::new();
    let nvme = attach(&machine, DEVICE, config(vec![(1, disk, 512)]));
    let driver = Driver::bring_up(&machine, DEVICE);
    (machine, nvme, driver)
}

fn file(folder: &tempfile::TempDir) -> Arc<FileBackend> {
    let path = folder.path().join("disk");
    std::fs::File::create(&path)
        .unwrap()
        .set_len(4 << 20)
        .unwrap();
    FileBackend::open(&FileOptions::new(path)).unwrap()
}

/// No command is lost or done twice when bus mastering comes and goes, and while it is off nothing
/// in memory changes.
#[test]
fn bus_master_toggled_under_io() {
    let folder = tempfile::tempdir().unwrap();
    for disk in [
        file(&folder) as Arc<dyn BlockBackend>,
        MemoryBackend::new(4 << 20).unwrap(),
    ] {
        let (machine, _nvme, mut driver) = set_up(disk);
        let mut pair = driver.create_pair(1, 64);
        let function = driver.function.clone();
        let stop = Arc::new(AtomicBool::new(false));
        let marker = Transfer::new(&machine, 4096);
        let toggler = {
            let (stop, marker) = (Arc::clone(&stop), marker.clone());
            std::thread::spawn(move || {
                let mut toggles = 0;
                while !stop.load(Ordering::SeqCst) {
                    function.set_bus_master(false);
                    let before = marker.get();
                    std::thread::sleep(Duration::from_micros(200));
                    assert!(marker.get() == before, "DMA with bus mastering off");
                    function.set_bus_master(true);
                    toggles += 1;
                    std::thread::sleep(Duration::from_micros(300));
                }
                toggles
            })
        };
        let out = Transfer::new(&machine, 4096);
        let mut expect = [0; 4096];
        for round in 0..300u32 {
            if round % 3 == 0 {
                expect = [u8::try_from(round % 251).unwrap(); 4096];
                out.set(&expect);
                pair.write(1, 8, &out);
            }
            for _ in 0..8 {
                pair.sq
                    .push(Command::blocks(nvm::READ, 1, 8, 8).data(&marker));
            }
            pair.sq.ring();
            for _ in 0..8 {
                assert!(pair.cq.wait().status.is_success());
            }
            pair.cq.ring();
            assert!(marker.get() == expect);
        }
        stop.store(true, Ordering::SeqCst);
        assert!(toggler.join().unwrap() > 5);
    }
}

/// What was submitted while bus mastering was off waits for it; so does what ends meanwhile.
#[test]
fn completions_wait_for_bus_mastering() {
    let disk = FaultyBackend::new(MemoryBackend::new(1 << 20).unwrap());
    let (_machine, _nvme, mut driver) = set_up(disk.clone());
    let mut pair = driver.create_pair(1, 16);
    disk.hold(true);
    let held = pair.sq.push(Command::flush(1));
    pair.sq.ring();
    assert!(pair.cq.stays_empty());
    // A flush holds no guest memory, so this need not wait for it.
    driver.function.set_bus_master(false);
    disk.hold(false);
    let late = pair.sq.push(Command::flush(1));
    pair.sq.ring();
    assert!(pair.cq.stays_empty());
    let admin = driver.admin.sq.push(Command::get_feature(1, 0));
    driver.admin.sq.ring();
    assert!(driver.admin.cq.stays_empty());
    driver.function.set_bus_master(true);
    assert_eq!([pair.cq.wait().cid, pair.cq.wait().cid], [held, late]);
    assert_eq!(driver.admin.cq.wait().cid, admin);
}

fn keep_busy(pair: &mut Pair, data: &[Transfer], depth: usize) {
    for index in 0..depth {
        let data = &data[index % data.len()];
        let opcode = if index % 2 == 0 {
            nvm::READ
        } else {
            nvm::WRITE
        };
        pair.sq
            .push(Command::blocks(opcode, 1, 8 * index as u64, 8).data(data));
    }
    pair.sq.ring();
}

/// Both kinds of reset, again and again, with commands in flight: afterwards the old rings and
/// buffers stay as they are, and the controller comes up again.
#[test]
fn resets_under_io_are_final() {
    let folder = tempfile::tempdir().unwrap();
    let (machine, nvme, mut driver) = set_up(file(&folder));
    let data: Vec<Transfer> = (0..8).map(|_| Transfer::new(&machine, 4096)).collect();
    for round in 0..30 {
        let mut pairs: Vec<Pair> = (1..=3).map(|id| driver.create_pair(id, 64)).collect();
        for pair in &mut pairs {
            keep_busy(pair, &data, 40);
        }
        match round % 3 {
            0 => driver.disable(),
            1 => driver.function.reset(),
            _ => {
                driver.function.set_bus_master(false);
                driver.set_cc(driver.cc().with_en(false));
                driver.wait_csts(|csts| !csts.rdy());
            }
        }
        let interrupts: Vec<u64> = driver.vectors.iter().map(|v| v.count()).collect();
        for data in &data {
            data.set(&[0xcd; 4096]);
        }
        let commands = nvme.stats().queues[1].commands;
        std::thread::sleep(Duration::from_millis(2));
        for data in &data {
            assert!(
                data.get().iter().all(|byte| *byte == 0xcd),
                "DMA after a reset"
            );
        }
        let now: Vec<u64> = driver.vectors.iter().map(|v| v.count()).collect();
        assert_eq!(now, interrupts, "an interrupt after a reset");
        assert_eq!(nvme.stats().queues[1].commands, commands);
        if round % 3 == 1 {
            driver = Driver::probe(&machine, DEVICE);
        }
        driver.function.set_bus_master(true);
        driver.enable(Enable::default());
    }
    driver.create_pair(1, 16).succeed(Command::flush(1));
}

/// Deleting a submission queue completes what was taken from it, with interrupts.
#[test]
fn deleting_a_queue_completes_what_was_taken() {
    let disk = FaultyBackend::new(MemoryBackend::new(1 << 20).unwrap());
    let (machine, _nvme, mut driver) = set_up(disk.clone());
    let mut pair = driver.create_pair(1, 64);
    let data = Transfer::new(&machine, 4096);
    disk.hold(true);
    for _ in 0..10 {
        pair.sq
            .push(Command::blocks(nvm::READ, 1, 0, 8).data(&data));
    }
    pair.sq.ring();
    assert!(pair.cq.stays_empty());
    let delete = driver.admin.sq.push(Command::delete_sq(1));
    driver.admin.sq.ring();
    assert!(driver.admin.cq.stays_empty(), "waits for the storage");
    disk.hold(false);
    let cqe = driver.admin.cq.wait();
    driver.admin.cq.ring();
    assert_eq!((cqe.cid, cqe.status.is_success()), (delete, true));
    for _ in 0..10 {
        assert!(
            pair.cq
                .poll()
                .expect("completed before the deletion")
                .status
                .is_success()
        );
    }
    assert!(driver.vectors[1].count() > 0);
    pair.sq.push(Command::flush(1));
    pair.sq.ring();
    pair.cq.ring();
    assert!(pair.cq.stays_empty());
    driver.admin.succeed(Command::delete_cq(1));
    let mut again = driver.create_pair(1, 8);
    again.read(1, 0, &data);
}

/// Removal from the machine under I/O: the last handle waits for what is in flight.
#[test]
fn removal_under_io() {
    let folder = tempfile::tempdir().unwrap();
    for _ in 0..10 {
        let (machine, nvme, mut driver) = set_up(file(&folder));
        let data: Vec<Transfer> = (0..4).map(|_| Transfer::new(&machine, 4096)).collect();
        let mut pair = driver.create_pair(1, 64);
        keep_busy(&mut pair, &data, 40);
        drop((pair, driver));
        let ram = machine.ram().clone();
        let page = data[0].page(0).address();
        drop(machine);
        drop(nvme);
        // Nobody is left who could write.
        use vm_memory::{Bytes, GuestAddress};
        ram.write_slice(&[0xcd; 4096], GuestAddress(page.0))
            .unwrap();
        std::thread::sleep(Duration::from_millis(1));
        let mut now = [0; 4096];
        ram.read_slice(&mut now, GuestAddress(page.0)).unwrap();
        assert_eq!(now, [0xcd; 4096]);
    }
}

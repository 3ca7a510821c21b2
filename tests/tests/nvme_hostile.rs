//! NVMe: a guest that stores anything anywhere. Nothing may panic or hang, no memory outside of RAM
//! is there to be touched, and after a function-level reset the controller works.

use std::sync::Arc;

use devices::block::{BlockBackend, MemoryBackend};
use devices::nvme::spec::{Cc, reg};
use proptest::prelude::*;
use proptest::test_runner::{Config as Runs, TestRunner};
use tests::nvme::{Command, Driver, Enable, Transfer, attach, config};
use tests::{Machine, Side};

const DEVICE: u8 = 3;
const QUEUES: u16 = 4;

#[derive(Clone, Debug)]
enum Act {
    /// An admin entry with these dwords.
    Admin([u32; 16]),
    /// An entry in an I/O queue.
    Io(usize, [u32; 16]),
    /// Any doorbell, any value.
    Doorbell(u64, u32),
    /// Any register, any value.
    Register(u64, u32),
    /// CC, mostly sensible.
    Cc(u32),
    Enable,
    BusMaster(bool),
    /// Garbage where PRP lists are.
    Lists(u64, u64),
}

/// Addresses in and around the pages that the test owns, and elsewhere.
fn address(base: u64) -> impl Strategy<Value = u64> + Clone {
    prop_oneof![
        4 => (0u64..16).prop_map(move |page| base + page * 4096),
        2 => (0u64..16 * 4096).prop_map(move |at| base + at),
        1 => Just(0xffff_ffff_ffff_f000),
        1 => Just(0x00ff_ffff_f000),
        1 => any::<u64>(),
    ]
}

fn entry(base: u64, opcodes: &'static [u8]) -> impl Strategy<Value = [u32; 16]> {
    let small =
        || prop_oneof![4 => 0u32..20, 2 => (0u32..20).prop_map(|n| n << 16 | 3), 1 => any::<u32>()];
    let opcode = prop_oneof![8 => proptest::sample::select(opcodes), 1 => any::<u8>()];
    let nsid = prop_oneof![6 => Just(1u32), 1 => Just(u32::MAX), 1 => 0u32..4];
    let head = (opcode, nsid, address(base), address(base));
    let tail = (small(), small(), small(), small(), small(), any::<u8>());
    (head, tail).prop_map(|((opcode, nsid, prp1, prp2), (a, b, c, d, e, flags))| {
        let mut dwords = [0; 16];
        dwords[0] = u32::from(opcode) | if flags < 8 { u32::from(flags) << 13 } else { 0 };
        dwords[1] = nsid;
        let halves = |value: u64| {
            [value & 0xffff_ffff, value >> 32].map(|half| u32::try_from(half).unwrap())
        };
        [dwords[6], dwords[7]] = halves(prp1);
        [dwords[8], dwords[9]] = halves(prp2);
        [dwords[10], dwords[11], dwords[12], dwords[13], dwords[14]] = [a, b, c, d, e];
        dwords
    })
}

fn act(base: u64) -> impl Strategy<Value = Act> {
    const ADMIN: &[u8] = &[0, 1, 2, 4, 5, 6, 8, 9, 10, 12];
    const NVM: &[u8] = &[0, 1, 2, 8, 9];
    let value = || prop_oneof![3 => 0u32..20, 1 => any::<u32>()];
    prop_oneof![
        8 => entry(base, ADMIN).prop_map(Act::Admin),
        16 => (0..usize::from(QUEUES), entry(base, NVM)).prop_map(|(queue, entry)| Act::Io(queue, entry)),
        3 => (0u64..140, value()).prop_map(|(index, value)| Act::Doorbell(index * 4, value)),
        1 => (0u64..16, any::<u32>()).prop_map(|(index, value)| Act::Register(index * 4, value)),
        1 => any::<u32>().prop_map(Act::Cc),
        1 => Just(Act::Enable),
        1 => any::<bool>().prop_map(Act::BusMaster),
        2 => (0u64..16 * 512, address(base)).prop_map(|(at, value)| Act::Lists(at * 8, value)),
    ]
}

fn raw(dwords: &[u32; 16]) -> Command {
    let mut command = Command::new(0, 0);
    for (index, dword) in dwords.iter().enumerate() {
        command = command.dword(index, *dword);
    }
    command
}

#[test]
fn a_hostile_guest_hurts_only_itself() {
    let machine = Machine::new();
    let disk = MemoryBackend::new(1 << 20).unwrap();
    let _nvme = attach(
        &machine,
        DEVICE,
        config(vec![(1, disk as Arc<dyn BlockBackend>, 512)]),
    );
    let pages = machine.dma(Side::Low, 16);
    let base = pages.address().0;
    let runs = Runs {
        cases: 40,
        failure_persistence: None,
        max_shrink_iters: 0,
        ..Runs::default()
    };
    let mut runner = TestRunner::new(runs);
    let acts = proptest::collection::vec(act(base), 1..150);
    let result = runner.run(&acts, |acts| {
        let mut driver = Driver::bring_up(&machine, DEVICE);
        let mut pairs: Vec<_> = (1..=QUEUES).map(|id| driver.create_pair(id, 16)).collect();
        for act in acts {
            match act {
                Act::Admin(dwords) => {
                    driver.admin.sq.push(raw(&dwords));
                    driver.admin.sq.ring();
                    while driver.admin.cq.poll().is_some() {}
                    driver.admin.cq.ring();
                }
                Act::Io(queue, dwords) => {
                    let pair = &mut pairs[queue];
                    pair.sq.push(raw(&dwords));
                    pair.sq.ring();
                    while pair.cq.poll().is_some() {}
                    pair.cq.ring();
                }
                Act::Doorbell(offset, value) => driver.bar.write(reg::DOORBELLS + offset, value),
                Act::Register(offset, value) => driver.bar.write(offset, value),
                Act::Cc(value) => driver.set_cc(Cc::from_bits(value)),
                Act::Enable => driver.set_cc(Enable::default().cc.with_en(true)),
                Act::BusMaster(on) => driver.function.set_bus_master(on),
                Act::Lists(at, value) => pages.write(at, value),
            }
        }
        driver.function.reset();
        prop_assert_eq!(Driver::probe(&machine, DEVICE).csts().into_bits(), 0);
        Ok(())
    });
    result.unwrap_or_else(|error| panic!("{error}"));
    let mut driver = Driver::bring_up(&machine, DEVICE);
    let mut pair = driver.create_pair(1, 16);
    let data = Transfer::new(&machine, 4096);
    data.set(&[7; 4096]);
    pair.write(1, 0, &data);
    data.set(&[0; 4096]);
    pair.read(1, 0, &data);
    assert_eq!(data.get(), [7; 4096]);
}

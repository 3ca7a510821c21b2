use super::*;
use crate::vtd::spec::registers::{fsts, global};
use crate::{DmaError, Iova, Remapper};

const FRCD: u64 = 0x600;
const EIME: u64 = 1 << 11;
const DEVICE: SourceId = SourceId(0x0018);

/// An entry: low word and high word.
type Entry = [u64; 2];

/// Vector `vector` to the APIC with 8-bit id `apic`, from anyone.
fn entry(vector: u64, apic: u64) -> Entry {
    [apic << 40 | vector << 16 | 1, 0]
}

/// What a local APIC gets for it.
fn target(vector: u32, apic: u64) -> MsiMessage {
    message(0xfee0_0000 | apic << 12, vector | 1 << 14)
}

/// A request in remappable format.
fn request(index: u64) -> MsiMessage {
    message(0xfee0_0010 | (index & 0x7fff) << 5 | (index >> 15) << 2, 0)
}

impl Bench {
    /// Remapping on, with `1 << (size + 1)` entries.
    fn remapping(options: Options, mode: u64, size: u64) -> Bench {
        let mut bench = Bench::new(options);
        bench.queue_on(false);
        bench.w64(reg::IRTA, IRT | mode | size);
        bench.command(global::SIRTP, 0);
        bench.command(global::IRE, 0);
        assert_ne!(bench.r32(reg::GSTS) & global::IRE, 0);
        bench
    }

    fn entry(&self, index: u64, entry: Entry) {
        self.store(IRT + 16 * index, &entry);
    }

    fn line(&self, source: SourceId, message: MsiMessage) -> Arc<dyn MsiLine> {
        let line = self.unit.sink().open(source).unwrap();
        line.retarget(message).unwrap();
        line
    }

    /// Takes the only fault: reason, source and fault info.
    fn take_fault(&self) -> Option<(u8, u16, u64)> {
        let status = self.r32(reg::FSTS);
        if status & fsts::PPF == 0 {
            return None;
        }
        let at = FRCD + 16 * u64::from(status >> 8);
        let (info, high) = (self.r64(at), self.r64(at + 8));
        assert_eq!(high & !0xff_0000_ffff, 1 << 63, "a write");
        self.w32(at + 12, 1 << 31);
        assert_eq!(self.r32(reg::FSTS), 0, "one fault");
        Some(((high >> 32) as u8, high as u16, info))
    }

    fn fires(&self, line: &Arc<dyn MsiLine>, target: MsiMessage) {
        line.fire();
        assert_eq!(self.delivered(), [target]);
        assert_eq!(self.take_fault(), None);
    }

    fn blocks(&self, line: &Arc<dyn MsiLine>, reason: u8, index: u64) {
        line.fire();
        assert_eq!(self.delivered(), []);
        assert_eq!(self.take_fault(), Some((reason, DEVICE.0, index << 48)));
    }
}

#[test]
fn off_everything_passes_as_it_is() {
    let bench = Bench::new(Options::default());
    let line = bench.unit.sink().open(DEVICE).unwrap();
    line.fire();
    assert_eq!(bench.delivered(), [], "no message yet");
    for sent in [
        message(0xfee0_0010, 0x1234_5678),
        message(0x0000_0100_fee0_1000, 0x4021),
        message(0x1000, 7),
    ] {
        line.retarget(sent).unwrap();
        bench.fires(&line, sent);
    }
    assert_eq!(bench.unit.counters().interrupts, 3);
}

#[test]
fn entries_make_messages() {
    let bench = Bench::remapping(Options::default(), 0, 7);
    let line = bench.line(DEVICE, request(5));
    for (entry, target) in [
        (entry(0x31, 2), target(0x31, 2)),
        // Logical, redirection hint, level, lowest priority, available bits.
        (
            [0xff << 40 | 0x55 << 16 | 0xf00 | 1 << 5 | 0x1d, 0],
            message(0xfeef_f00c, 0xc155),
        ),
        ([0x02 << 40 | 4 << 5 | 1, 0], message(0xfee0_2000, 0x4400)),
        ([0x02 << 40 | 7 << 5 | 1, 0], message(0xfee0_2000, 0x4700)),
    ] {
        bench.entry(5, entry);
        line.retarget(request(5)).unwrap();
        bench.fires(&line, target);
    }
    let wide = Bench::remapping(Options::default(), EIME, 7);
    let line = wide.line(DEVICE, request(0));
    for (entry, target) in [
        ([0x0000_0002_0031_0001, 0], message(0xfee0_2000, 0x4031)),
        (
            [0x8123_45ff_0031_0001, 0],
            message(0x8123_4500_feef_f000, 0x4031),
        ),
    ] {
        wide.entry(0, entry);
        line.retarget(request(0)).unwrap();
        wide.fires(&line, target);
    }
}

#[test]
fn indices_of_msi_and_ioapic_requests() {
    let bench = Bench::remapping(Options::default(), 0, 15);
    for (at, vector) in [
        (3, 0x33),
        (7, 0x37),
        (0x7fff, 0x40),
        (0x8001, 0x41),
        (0xffff, 0x42),
    ] {
        bench.entry(at, entry(vector, 0));
    }
    // Handle alone: the data do not count. IOAPICs write their vector and trigger mode there.
    for (at, vector) in [(3, 0x33), (0x7fff, 0x40), (0x8001, 0x41), (0xffff, 0x42)] {
        let sent = MsiMessage {
            data: 0xffff_c031,
            ..request(at)
        };
        bench.fires(&bench.line(DEVICE, sent), target(vector, 0));
    }
    // Handle and subhandle, for multiple-message MSI. The lowest two address bits do not count.
    for (handle, subhandle, vector) in [(3, 0, 0x33), (3, 4, 0x37), (0xfff0, 0xf, 0x42)] {
        let sent = MsiMessage {
            address: request(handle).address | 1 << 3 | 3,
            data: subhandle,
        };
        bench.fires(&bench.line(DEVICE, sent), target(vector, 0));
    }
    let shv = |data| MsiMessage {
        address: request(0xffff).address | 1 << 3,
        data,
    };
    bench.blocks(&bench.line(DEVICE, shv(0x1_0000)), 0x20, 0);
    bench.blocks(&bench.line(DEVICE, shv(1)), 0x21, 0xffff);
}

#[test]
fn every_way_to_be_blocked() {
    let bench = Bench::remapping(Options::default(), 0, 3);
    let blocked = |entry, reason| {
        bench.entry(4, entry);
        bench.blocks(&bench.line(DEVICE, request(4)), reason, 4);
        // Fault Processing Disable.
        bench.entry(4, [entry[0] | 2, entry[1]]);
        let line = bench.line(DEVICE, request(4));
        line.fire();
        assert_eq!((bench.delivered(), bench.take_fault()), (vec![], None));
    };
    blocked([0, 0], 0x22);
    blocked([!3, !0], 0x22);
    let valid = entry(0x31, 1);
    for bit in (24..32).chain(32..40).chain(48..64).chain(12..16) {
        blocked([valid[0] | 1 << bit, 0], 0x24);
    }
    for bit in 20..64 {
        blocked([valid[0], 1 << bit], 0x24);
    }
    for delivery in [3, 6] {
        blocked([valid[0] | delivery << 5, 0], 0x24);
    }
    // An absent source validation type.
    blocked([valid[0], 3 << 18], 0x26);
    bench.blocks(&bench.line(DEVICE, request(16)), 0x21, 16);
    bench.blocks(&bench.line(DEVICE, request(0x8000)), 0x21, 0x8000);
    // With 32-bit destinations only the other reserved bits are left.
    bench.w64(reg::IRTA, IRT | EIME | 3);
    bench.command(global::SIRTP, 0);
    bench.entry(4, [0xffff_ffff_0031_0001, 0]);
    let line = bench.line(DEVICE, request(4));
    bench.fires(&line, message(0xffff_ff00_feef_f000, 0x4031));
    assert!(bench.unit.counters().interrupts_blocked > 100);
}

#[test]
fn a_table_outside_memory() {
    for table in [RAM - 0x1000, 0x3fff_ffff_f000] {
        let bench = Bench::new(Options::default());
        bench.w64(reg::IRTA, table | 15);
        bench.command(global::SIRTP, 0);
        bench.command(global::IRE, 0);
        let index = 0x1000 / 16;
        bench.blocks(&bench.line(DEVICE, request(index)), 0x23, index);
    }
}

#[test]
fn the_source_is_verified() {
    let bench = Bench::remapping(Options::default(), 0, 3);
    let cases: &[(u64, u64, u16, bool)] = &[
        // SVT and SQ, source id in the entry, requester, allowed.
        (0b0000, 0x1234, 0x0018, true),
        (0b0100, 0x0018, 0x0018, true),
        (0b0100, 0x0018, 0x001c, false),
        (0b0101, 0x0018, 0x001c, true),
        (0b0101, 0x0018, 0x001a, false),
        (0b0110, 0x0018, 0x001e, true),
        (0b0110, 0x0018, 0x0019, false),
        (0b0111, 0x0018, 0x001f, true),
        (0b0111, 0x0018, 0x0010, false),
        (0b1000, 0x0204, 0x01ff, false),
        (0b1000, 0x0204, 0x0200, true),
        (0b1000, 0x0204, 0x04ff, true),
        (0b1000, 0x0204, 0x0500, false),
        (0b1000, 0x0402, 0x0300, false),
        (0b1100, 0x0018, 0x0018, false),
    ];
    for &(kind, id, requester, allowed) in cases {
        bench.entry(2, [entry(0x31, 1)[0], kind << 16 | id]);
        let line = bench.line(SourceId(requester), request(2));
        if allowed {
            bench.fires(&line, target(0x31, 1));
        } else {
            line.fire();
            assert_eq!(bench.delivered(), [], "{kind:#b} {requester:#x}");
            assert_eq!(bench.take_fault(), Some((0x26, requester, 2 << 48)));
        }
    }
}

#[test]
fn compatibility_format_requests() {
    let bench = Bench::remapping(Options::default(), 0, 3);
    let sent = message(0xfee0_1000, 0x31);
    let line = bench.line(DEVICE, sent);
    bench.blocks(&line, 0x25, 0);
    bench.command(global::CFI, 0);
    bench.fires(&line, sent);
    // Never with 32-bit destinations.
    bench.w64(reg::IRTA, IRT | EIME | 3);
    bench.fires(&line, sent);
    bench.command(global::SIRTP, 0);
    bench.blocks(&line, 0x25, 0);
    bench.w64(reg::IRTA, IRT | 3);
    bench.command(global::SIRTP, 0);
    bench.fires(&line, sent);
    bench.command(0, global::CFI);
    bench.blocks(&line, 0x25, 0);
    bench.command(0, global::IRE);
    bench.fires(&line, sent);
}

#[test]
fn messages_outside_the_interrupt_range_are_dropped() {
    let bench = Bench::remapping(Options::default(), 0, 3);
    bench.command(global::CFI, 0);
    for address in [0x1000, 0xfed0_0000, 0xfef0_0000, 0x1_fee0_0000] {
        let line = bench.line(DEVICE, message(address, 1));
        line.fire();
        assert_eq!((bench.delivered(), bench.take_fault()), (vec![], None));
    }
    assert_eq!(bench.unit.counters().interrupts_blocked, 4);
}

#[test]
fn entries_are_cached_until_invalidated() {
    let mut bench = Bench::remapping(Options::default(), 0, 7);
    for index in 0..16 {
        bench.entry(index, entry(0x40 + index, 0));
    }
    let lines: Vec<_> = (0..16).map(|i| bench.line(DEVICE, request(i))).collect();
    for index in 0..16 {
        bench.entry(index, entry(0x60 + index, 1));
    }
    let fired = |bench: &Bench| -> Vec<u32> {
        for line in &lines {
            line.fire();
        }
        bench.delivered().iter().map(|m| m.data & 0xf0).collect()
    };
    assert_eq!(fired(&bench), [0x40; 16], "stale");
    // Index 5; then 8 to 11 by a mask; the lowest bits of the index do not count.
    bench.run(&[&[5 << 32 | 0x14, 0]]);
    let mut expected = [0x40; 16];
    expected[5] = 0x60;
    assert_eq!(fired(&bench), expected);
    bench.run(&[&[9 << 32 | 2 << 27 | 0x14, 0]]);
    expected[8..12].fill(0x60);
    assert_eq!(fired(&bench), expected);
    bench.run(&[&[0x04, 0]]);
    assert_eq!(fired(&bench), [0x60; 16]);
    // Not present is seen after the invalidation only, and is not cached itself.
    bench.entry(3, [0, 0]);
    bench.fires(&lines[3], target(0x63, 1));
    bench.run(&[&[3 << 32 | 0x14, 0]]);
    bench.blocks(&lines[3], 0x22, 3);
    bench.entry(3, entry(0x73, 0));
    bench.fires(&lines[3], target(0x73, 0));
    // What is cached belongs to the line: a new message is looked up.
    bench.entry(4, entry(0x74, 0));
    lines[4].retarget(request(4)).unwrap();
    bench.fires(&lines[4], target(0x74, 0));
    // A new table.
    bench.store(IRT + 0x1000, &entry(0x75, 0));
    bench.w64(reg::IRTA, (IRT + 0x1000) | 7);
    bench.fires(&lines[0], target(0x60, 1));
    bench.command(global::SIRTP, 0);
    bench.fires(&lines[0], target(0x75, 0));
}

#[test]
fn a_route_that_the_host_refuses() {
    let mut bench = Bench::remapping(Options::default(), 0, 7);
    bench.entry(1, entry(0x41, 0));
    bench.entry(2, entry(0x42, 0));
    let line = bench.line(DEVICE, request(1));
    bench.host.refuse.store(true, Ordering::SeqCst);
    assert!(line.retarget(request(2)).is_err());
    bench.fires(&line, target(0x41, 0));
    // An invalidation with the host refusing: nothing goes out under the old entry.
    bench.entry(1, entry(0x51, 0));
    bench.run(&[&[0x04, 0]]);
    line.fire();
    assert_eq!(bench.delivered(), []);
    bench.host.refuse.store(false, Ordering::SeqCst);
    bench.fires(&line, target(0x51, 0));
}

#[test]
fn lines_of_others_are_wrapped() {
    let bench = Bench::remapping(Options::default(), 0, 7);
    bench.entry(1, [entry(0x41, 0)[0], 1 << 18 | 0xf8]);
    let inner = Sink(Arc::clone(&bench.host)).open(SourceId(0)).unwrap();
    let pin = bench.unit.wrap_line(SourceId(0xf8), inner);
    pin.retarget(request(1)).unwrap();
    bench.fires(&pin, target(0x41, 0));
}

#[test]
fn an_unverified_line_passes_whatever_source_is_asked_for() {
    let mut bench = Bench::remapping(Options::default(), 0, 7);
    bench.entry(1, [entry(0x41, 0)[0], 1 << 18 | 0x20]);
    let inner = || Sink(Arc::clone(&bench.host)).open(SourceId(0)).unwrap();
    let strict = bench.unit.wrap_line(SourceId(0xf8), inner());
    let pin = bench.unit.wrap_unverified_line(SourceId(0xf8), inner());
    strict.retarget(request(1)).unwrap();
    strict.fire();
    assert_eq!(bench.delivered(), []);
    assert_eq!(bench.take_fault(), Some((0x26, 0xf8, 1 << 48)));
    pin.retarget(request(1)).unwrap();
    bench.fires(&pin, target(0x41, 0));
    // The rest of the entry counts.
    bench.entry(1, [0, 0]);
    bench.run(&[&[0x04, 0]]);
    pin.fire();
    assert_eq!(bench.delivered(), []);
    assert_eq!(bench.take_fault(), Some((0x22, 0xf8, 1 << 48)));
}

#[test]
fn interrupts_that_devices_write_themselves() {
    let bench = Bench::remapping(Options::default(), 0, 7);
    let write = |sent: MsiMessage| bench.unit.interrupt_write(DEVICE, sent.address, sent.data);
    for index in 0..40 {
        bench.entry(index, entry(0x40 + index, 0));
    }
    for index in (0..40).chain(0..40) {
        assert_eq!(write(request(index)), Ok(()));
        assert_eq!(bench.delivered(), [target(0x40 + index as u32, 0)]);
    }
    bench.entry(3, [0, 0]);
    let iova = Iova(request(3).address);
    let error = DmaError::Fault(iova, crate::FaultReason(0x22));
    assert_eq!(write(request(3)), Err(error));
    assert_eq!(bench.take_fault(), Some((0x22, DEVICE.0, 3 << 48)));
    bench.command(0, global::IRE);
    assert_eq!(write(message(0xfee0_1000, 0x31)), Ok(()));
    assert_eq!(bench.delivered(), [message(0xfee0_1000, 0x31)]);
    assert_eq!(bench.unit.counters().interrupts, 81);
}

//! Replays what a driver did, from text.
//!
//! One access a line, numbers in hexadecimal without prefix, `#` starts a comment:
//!
//! ```text
//! w OFFSET BYTES VALUE        a register is written
//! r OFFSET BYTES VALUE        a register is read, and must be VALUE
//! m ADDRESS BYTES VALUE       the driver writes memory
//! s ADDRESS BYTES VALUE       the unit has written memory (waits a while for it)
//! ```

use super::*;

/// Memory as large as that of a guest whose accesses were recorded; nearly all of it is never touched.
const RANGES: [(GuestAddress, usize); 2] =
    [(GuestAddress(0), 3 << 30), (GuestAddress(4 << 30), 5 << 30)];

fn value(data: &[u8]) -> u64 {
    let mut bytes = [0; 8];
    bytes[..data.len()].copy_from_slice(data);
    u64::from_le_bytes(bytes)
}

fn replay(bench: &Bench, text: &str) {
    for (number, line) in text.lines().enumerate() {
        let line = line.split('#').next().unwrap_or_default().trim();
        let Some((kind, rest)) = line.split_once(' ') else {
            assert!(line.is_empty(), "line {}: {line}", number + 1);
            continue;
        };
        let numbers: Vec<u64> = rest
            .split_whitespace()
            .map(|word| u64::from_str_radix(word, 16).expect(line))
            .collect();
        let &[at, len, wanted] = &numbers[..] else {
            panic!("line {}: {line}", number + 1);
        };
        let len = len as usize;
        let bytes = &wanted.to_le_bytes()[..len];
        let mut data = vec![0; len];
        match kind {
            "w" => bench.unit.write(at, bytes),
            "r" => {
                bench.unit.read(at, &mut data);
                assert_eq!(value(&data), wanted, "line {}: {line}", number + 1);
            }
            "m" => bench.ram.write_slice(bytes, GuestAddress(at)).unwrap(),
            "s" => until(|| {
                bench.ram.read_slice(&mut data, GuestAddress(at)).unwrap();
                value(&data) == wanted
            }),
            _ => panic!("line {}: {line}", number + 1),
        }
    }
}

/// Linux's start-up and reboot in scalable mode, as its driver's source has it.
#[test]
fn linux_start_up() {
    let bench = Bench::with_ram(Options::default(), &RANGES);
    replay(&bench, include_str!("linux-startup.txt"));
    assert_eq!(
        bench.spaces.take(),
        [
            Invalidation::Contexts,
            Invalidation::Contexts,
            Invalidation::Translations,
            Invalidation::Everything,
            Invalidation::Everything,
        ]
    );
    let counters = bench.unit.counters();
    assert_eq!((counters.waits, counters.queued.interrupt), (5, 2));
    assert_eq!((counters.faults, counters.queue_errors), (0, 0));
}

/// The same for a unit of the first generation.
#[test]
fn linux_start_up_legacy() {
    let options = Options {
        scalable: false,
        interrupt_remapping: false,
        ..Options::default()
    };
    let bench = Bench::with_ram(options, &RANGES);
    replay(&bench, include_str!("linux-startup-legacy.txt"));
    assert_eq!(
        bench.spaces.take(),
        [
            Invalidation::Contexts,
            Invalidation::Translations,
            Invalidation::Everything,
            Invalidation::PageTranslations {
                domain: 3,
                start: crate::Iova(0xffff_0000),
                last: crate::Iova(0xffff_ffff),
            },
        ]
    );
    let counters = bench.unit.counters();
    assert_eq!((counters.waits, counters.queue_errors), (3, 0));
}

/// What Debian's kernels did from their start until they had read a disk, recorded with `ringside run
/// --iommu intel,trace=FILE`: 6.1 and 6.12, legacy and scalable mode, lazy and strict.
#[test]
fn linux_start_ups_as_recorded() {
    for (scalable, text) in [
        (false, include_str!("linux-6.1-lazy.txt")),
        (false, include_str!("linux-6.12-strict.txt")),
        (true, include_str!("linux-6.1-scalable.txt")),
        (true, include_str!("linux-6.12-scalable.txt")),
    ] {
        let options = Options {
            host_address_width: 40,
            scalable,
            first_stage: scalable,
            ..Options::default()
        };
        let bench = Bench::with_ram(options, &RANGES);
        replay(&bench, text);
        let waits = text.lines().filter(|line| line.starts_with("s ")).count() as u64;
        let counters = bench.unit.counters();
        assert_eq!((counters.waits, counters.queue_errors), (waits, 0));
        assert_eq!((counters.faults, counters.queued.pasid > 0), (0, scalable));
        assert!(counters.queued.iotlb_global > 0 && counters.queued.interrupt > 0);
    }
}

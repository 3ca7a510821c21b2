//! Random descriptor chains and packets against a model written from the specification.

#![allow(clippy::cast_possible_truncation)]

use std::cell::RefCell;
use std::sync::Arc;

use proptest::prelude::*;
use tests::virtio::{
    HEADER, NetDriver, NetSetup, Part, Wire, desc_flags, eventually, features as f, frame, plain,
    status,
};

const SIZE: u16 = 8;
const MEMORY: u64 = 0x2000;

const SETUP: NetSetup = NetSetup {
    features: f::INDIRECT | f::MRG_RXBUF,
    pairs: 1,
    size: SIZE,
};

/// A descriptor whose address is relative to a page that the test owns.
#[derive(Clone, Copy, Debug)]
struct Desc {
    addr: u64,
    len: u32,
    flags: u16,
    next: u16,
}

/// Outside of the machine's RAM.
const NOWHERE: u64 = 0x7000_0000_0000;

fn desc() -> impl Strategy<Value = Desc> {
    let buffer = (0..MEMORY / 2, 1u32..400, 0u16..8).prop_map(|(a, l, c)| (a, l, c, false));
    let odd = (Just(NOWHERE), 1u32..100, 0u16..8).prop_map(|(a, l, c)| (a, l, c, false));
    let huge = (0..MEMORY, Just(u32::MAX), 0u16..8).prop_map(|(a, l, c)| (a, l, c, false));
    // An indirect table: the tables' page is the second half of the memory.
    let table = (0u64..4, 0u32..9).prop_map(|(at, entries)| {
        let ragged = u32::from(entries == 7);
        (MEMORY / 2 + at * 16, entries * 16 + ragged, 0, true)
    });
    let kind = prop_oneof![12 => buffer, 1 => odd, 1 => huge, 3 => table];
    (kind, 0u16..SIZE + 2).prop_map(|((addr, len, choice, indirect), next)| {
        let mut flags = if indirect { desc_flags::INDIRECT } else { 0 };
        flags |= if choice & 1 != 0 && !indirect {
            desc_flags::NEXT
        } else {
            0
        };
        flags |= if choice == 7 { desc_flags::WRITE } else { 0 };
        Desc {
            addr,
            len,
            flags,
            next,
        }
    })
}

/// What must become of a chain.
#[derive(Clone, Debug, PartialEq, Eq)]
enum Fate {
    /// The device needs a reset.
    Broken,
    /// The packet is dropped, the chain returned.
    Dropped,
    /// It goes out like this.
    Sent(Vec<u8>),
}

/// Walks a chain as 2.7 says.
fn walk(direct: &[Desc], tables: &[Desc], memory: &[u8], head: u16) -> Fate {
    let mut list = direct;
    let mut index = usize::from(head);
    let mut indirect = false;
    let mut seen = 0;
    let mut bytes = 0u64;
    let mut writable = false;
    let mut parts: Vec<(u64, u32)> = Vec::new();
    loop {
        let Some(desc) = list.get(index) else {
            return Fate::Broken;
        };
        if desc.flags & desc_flags::INDIRECT != 0 {
            let entries = (desc.len / 16) as usize;
            let start = ((desc.addr - MEMORY / 2) / 16) as usize;
            if indirect || !desc.len.is_multiple_of(16) {
                return Fate::Broken;
            }
            list = &tables[start..start + entries];
            (index, indirect) = (0, true);
            continue;
        }
        seen += 1;
        bytes += u64::from(desc.len);
        if seen > usize::from(SIZE) || bytes > u64::from(u32::MAX) {
            return Fate::Broken;
        }
        if desc.flags & desc_flags::WRITE != 0 {
            writable = true;
        } else if writable {
            return Fate::Broken;
        } else {
            parts.push((desc.addr, desc.len));
        }
        if desc.flags & desc_flags::NEXT == 0 {
            break;
        }
        index = usize::from(desc.next);
    }
    let mut packet = Vec::new();
    for (addr, len) in parts {
        if addr == NOWHERE || len == u32::MAX {
            return Fate::Broken;
        }
        packet.extend(&memory[addr as usize..addr as usize + len as usize]);
    }
    let frame = packet.len().saturating_sub(HEADER);
    // No offload is negotiated: NEEDS_CSUM and segmentation are not allowed.
    if frame < 14 || packet[0] & 1 != 0 || packet[1] != 0 {
        return Fate::Dropped;
    }
    let hint = u16::from_le_bytes([packet[2], packet[3]]).min(frame as u16);
    packet[..HEADER].fill(0);
    packet[2..4].copy_from_slice(&hint.to_le_bytes());
    Fate::Sent(packet)
}

thread_local! {
    /// One machine for all cases: each begins with a reset.
    static DRIVER: RefCell<Option<(NetDriver, Arc<Wire>)>> = const { RefCell::new(None) };
}

fn with_driver(
    body: impl FnOnce(&mut NetDriver, &Wire) -> Result<(), TestCaseError>,
) -> Result<(), TestCaseError> {
    DRIVER.with(|driver| {
        let mut driver = driver.borrow_mut();
        // A new machine when the old one runs out of pages: the kit never takes one back.
        if let Some((old, _)) = driver.as_ref()
            && old.device.stats().pairs[0].transmit.notifications > 400
        {
            *driver = None;
        }
        let (driver, wire) = driver.get_or_insert_with(|| {
            let wire = Wire::new(1);
            (NetDriver::found(Arc::clone(&wire) as _, 1, |_| ()), wire)
        });
        driver.begin(SETUP);
        wire.take_sent(0);
        body(driver, wire)
    })
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(512))]

    #[test]
    fn transmit_chains(
        direct in prop::collection::vec(desc(), usize::from(SIZE)),
        // Tables hold no tables but one, so that most are good.
        tables in prop::collection::vec(desc(), 16),
        nested in prop::bool::weighted(0.1),
        head in 0..SIZE + 1,
        zeroes in prop::bool::weighted(0.8),
    ) {
        let mut tables = tables;
        if !nested {
            for desc in &mut tables {
                if desc.flags & desc_flags::INDIRECT != 0 {
                    *desc = Desc { addr: 64, len: 100, flags: 0, next: 0 };
                }
            }
        }
        with_driver(|driver, wire| {
            let buffers = &driver.transmit[0].buffers;
            let base = buffers.at(0).0;
            let memory: Vec<u8> = (0..MEMORY)
                .map(|at| if zeroes && at % 64 < 48 { 0 } else { (at % 251) as u8 })
                .collect();
            buffers.set_bytes(0, &memory);
            let absolute = |addr: u64| if addr == NOWHERE { addr } else { base + addr };
            for (at, desc) in (0u64..).zip(&tables) {
                let place = MEMORY / 2 + at * 16;
                buffers.write(place, absolute(desc.addr));
                buffers.write(place + 8, desc.len);
                buffers.write(place + 12, desc.flags);
                buffers.write(place + 14, desc.next);
            }
            // What the device sees as data includes the tables.
            let memory = buffers.bytes(0, MEMORY as usize);
            let fate = walk(&direct, &tables, &memory, head);
            let queue = &mut driver.transmit[0].queue;
            for (at, desc) in (0..).zip(&direct) {
                queue.set_desc(at, absolute(desc.addr), desc.len, desc.flags, desc.next);
            }
            queue.push_avail(head);
            queue.notify();
            eventually("the chain's end", || {
                driver.transmit[0].queue.used_idx() == 1
                    || driver.virtio.status() & status::NEEDS_RESET != 0
            });
            let broken = driver.virtio.status() & status::NEEDS_RESET != 0;
            prop_assert_eq!(broken, fate == Fate::Broken, "{:?}", fate);
            let sent = wire.take_sent(0);
            match fate {
                Fate::Sent(packet) => prop_assert_eq!(sent, [packet]),
                _ => prop_assert!(sent.is_empty()),
            }
            prop_assert!(driver.transmit[0].queue.used_ring_is_intact());
            Ok(())
        })?;
    }

    /// Packets of any length into buffers of any length, several to a packet: the bytes arrive, the
    /// counts are right, no buffer is lost or used twice.
    #[test]
    fn mergeable_receive(
        buffers in prop::collection::vec(
            // Empty parts too, but room for a header in each.
            prop::collection::vec(0u32..200, 0..3).prop_map(|mut lens| {
                lens.push(20);
                lens
            }),
            1..3,
        ),
        lens in prop::collection::vec(14usize..900, 1..6),
    ) {
        with_driver(|driver, wire| {
            let mut posted = std::collections::VecDeque::new();
            let mut at = 0u64;
            let mut refill = |driver: &mut NetDriver, posted: &mut std::collections::VecDeque<_>| {
                let side = &mut driver.receive[0];
                for lens in buffers.iter().cycle() {
                    if side.queue.free() < lens.len() {
                        break;
                    }
                    let parts: Vec<Part> = lens
                        .iter()
                        .map(|&len| {
                            let part = Part::writable(side.buffers.at(at % 0x3000).0, len);
                            at += 256;
                            part
                        })
                        .collect();
                    let head = side.queue.add(&parts);
                    posted.push_back((head, parts));
                }
                side.queue.notify();
            };
            let mut lost = wire.lost(0);
            for (seed, &len) in (0u8..).zip(&lens) {
                refill(driver, &mut posted);
                let room: u64 = posted
                    .iter()
                    .flat_map(|(_, parts)| parts)
                    .map(|part| u64::from(part.len))
                    .sum();
                let mut packet = plain(&frame(NetDriver::MAC, len, seed));
                let used = driver.receive[0].queue.used_idx();
                wire.inject(0, packet.clone());
                eventually("the packet's end", || {
                    driver.receive[0].queue.used_idx() != used || wire.lost(0) != lost
                });
                let fits = packet.len() as u64 <= room;
                prop_assert_eq!(fits, wire.lost(0) == lost);
                lost = wire.lost(0);
                if !fits {
                    continue;
                }
                let mut got = Vec::new();
                let mut chains = 0u16;
                while let Some((head, len)) = driver.receive[0].queue.take_used() {
                    let (expected, parts) = posted.pop_front().expect("posted");
                    prop_assert_eq!(head, expected, "in order");
                    chains += 1;
                    let room: u32 = parts.iter().map(|part| part.len).sum();
                    prop_assert!(len <= room);
                    let mut left = len;
                    for part in parts {
                        let take = part.len.min(left);
                        left -= take;
                        let offset = part.addr - driver.receive[0].buffers.at(0).0;
                        got.extend(driver.receive[0].buffers.bytes(offset, take as usize));
                    }
                    if got.len() < packet.len() {
                        prop_assert_eq!(len, room, "only the last buffer has room left");
                    }
                }
                packet[10..12].copy_from_slice(&chains.to_le_bytes());
                prop_assert_eq!(got, packet);
            }
            prop_assert_eq!(driver.virtio.status() & status::NEEDS_RESET, 0);
            Ok(())
        })?;
    }
}

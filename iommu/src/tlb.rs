//! The IOTLB of one worker: set-associative, with entries of three page sizes side by side.
//!
//! An entry stays until it is invalidated or its place is needed. Nothing compares it with the tables,
//! as in hardware: a driver that forgets an invalidation goes on using the old page.

use std::cell::Cell;

use crate::{Iova, Mapping};

/// Size of each worker's IOTLB: `sets * ways` translations.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct IotlbGeometry {
    /// Number of sets, a power of two, 1 to 65536.
    pub sets: u32,
    /// Entries in a set, 1 to 64.
    pub ways: u32,
}

impl Default for IotlbGeometry {
    /// 256 translations: 1 MiB in pages of 4 KiB, what 32 requests of 32 KiB touch.
    fn default() -> IotlbGeometry {
        IotlbGeometry { sets: 64, ways: 4 }
    }
}

/// Log2 of the page sizes.
const SHIFTS: [u32; 3] = [12, 21, 30];
/// Permissions are in the low bits of [`Entry::frame`].
const FLAGS: u64 = 0xfff;

/// What an access needs; may be both, or neither.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Need(pub(crate) u64);

impl Need {
    pub(crate) const READ: Need = Need(1);
    pub(crate) const WRITE: Need = Need(2);
}

/// Where an address leads.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Target {
    /// The guest-physical address.
    pub(crate) gpa: u64,
    /// Bytes from there on that the same translation covers, at least one.
    pub(crate) room: u64,
}

#[derive(Clone, Copy, Default)]
struct Entry {
    /// Page number, times four, plus the index of its size.
    tag: u64,
    /// Generation, times 65536, plus the domain.
    owner: u64,
    /// First guest-physical address of the page, and what is allowed.
    frame: u64,
}

/// Whose the live entries are.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Domains {
    One(u16),
    Several,
}

/// One worker's translations.
pub(crate) struct Tlb {
    entries: Box<[Cell<Entry>]>,
    /// The way of each set that is given up next.
    victims: Box<[Cell<u8>]>,
    ways: usize,
    mask: u64,
    /// Entries of another generation are void.
    generation: Cell<u64>,
    /// Live entries of each size.
    live: [Cell<u64>; 3],
    domains: Cell<Domains>,
}

impl Tlb {
    /// Empty; a geometry outside the ranges of [`IotlbGeometry`] is brought into them.
    pub(crate) fn new(geometry: IotlbGeometry) -> Tlb {
        let sets = geometry.sets.clamp(1, 1 << 16).next_power_of_two();
        let ways = usize::try_from(geometry.ways.clamp(1, 64)).unwrap_or(1);
        let count = usize::try_from(sets).unwrap_or(1);
        Tlb {
            entries: (0..count * ways).map(|_| Cell::default()).collect(),
            victims: (0..count).map(|_| Cell::default()).collect(),
            ways,
            mask: u64::from(sets - 1),
            generation: Cell::new(1),
            live: Default::default(),
            domains: Cell::new(Domains::Several),
        }
    }

    fn owner(&self, domain: u16) -> u64 {
        self.generation.get() << 16 | u64::from(domain)
    }

    fn is_live(&self, entry: Entry) -> bool {
        entry.owner >> 16 == self.generation.get()
    }

    fn set(&self, page: u64) -> (usize, &[Cell<Entry>]) {
        let set = usize::try_from(page & self.mask).unwrap_or(0);
        let first = set * self.ways;
        (
            set,
            self.entries.get(first..first + self.ways).unwrap_or(&[]),
        )
    }

    /// The translation of `iova` in `domain`, if there is one that allows what is needed.
    #[inline]
    pub(crate) fn lookup(&self, iova: u64, domain: u16, need: Need) -> Option<Target> {
        let owner = self.owner(domain);
        for (size, shift) in SHIFTS.into_iter().enumerate() {
            if self.live[size].get() == 0 {
                continue;
            }
            let page = iova >> shift;
            let tag = page << 2 | size as u64;
            for entry in self.set(page).1 {
                let entry = entry.get();
                if entry.tag == tag && entry.owner == owner {
                    let offset = iova & ((1 << shift) - 1);
                    if entry.frame & need.0 == need.0 {
                        return Some(Target {
                            gpa: (entry.frame & !FLAGS) + offset,
                            room: (1 << shift) - offset,
                        });
                    }
                    break;
                }
            }
        }
        None
    }

    /// Keeps what a walk found, in place of what was known of the page before.
    pub(crate) fn insert(&self, domain: u16, mapping: &Mapping) {
        let Some(size) = SHIFTS.iter().position(|&s| s == u32::from(mapping.shift)) else {
            // A page size that VT-d does not have.
            return;
        };
        let page = mapping.iova.0 >> mapping.shift;
        let (set, entries) = self.set(page);
        let new = Entry {
            tag: page << 2 | size as u64,
            owner: self.owner(domain),
            frame: mapping.gpa.0 & !FLAGS | u64::from(mapping.read) | u64::from(mapping.write) << 1,
        };
        let same =
            |entry: &&Cell<Entry>| entry.get().tag == new.tag && entry.get().owner == new.owner;
        let place = entries.iter().find(same).or_else(|| {
            let free = entries.iter().find(|entry| !self.is_live(entry.get()));
            free.or_else(|| {
                let victim = self.victims.get(set)?;
                let way = usize::from(victim.get()) % self.ways;
                victim.set(victim.get().wrapping_add(1) % 64);
                entries.get(way)
            })
        });
        if let Some(place) = place {
            self.forget(place);
            let empty = self.live.iter().all(|live| live.get() == 0);
            if empty {
                self.domains.set(Domains::One(domain));
            } else if self.domains.get() != Domains::One(domain) {
                self.domains.set(Domains::Several);
            }
            place.set(new);
            self.live[size].set(self.live[size].get() + 1);
        }
    }

    /// Voids an entry; true if it was live.
    fn forget(&self, place: &Cell<Entry>) -> bool {
        let entry = place.get();
        let live = self.is_live(entry);
        if live {
            if let Some(count) = self.live.get((entry.tag & 3) as usize) {
                count.set(count.get() - 1);
            }
            place.set(Entry::default());
        }
        live
    }

    /// Drops everything; returns how much it was.
    pub(crate) fn clear(&self) -> u64 {
        // 2^48 generations last longer than the machine.
        self.generation.set(self.generation.get() + 1);
        self.live.iter().map(Cell::take).sum()
    }

    /// Drops the translations of a domain.
    pub(crate) fn drop_domain(&self, domain: u16) -> u64 {
        match self.domains.get() {
            Domains::One(only) if only == domain => self.clear(),
            Domains::One(_) => 0,
            Domains::Several => self.drop_where(|entry| entry.owner & 0xffff == u64::from(domain)),
        }
    }

    /// Drops the translations of a domain for the pages that have a byte from `start` to `last`.
    pub(crate) fn drop_pages(&self, domain: u16, start: Iova, last: Iova) -> u64 {
        let owner = self.owner(domain);
        let mut dropped = 0;
        for (size, shift) in SHIFTS.into_iter().enumerate() {
            if self.live[size].get() == 0 || start > last {
                continue;
            }
            let (first, end) = (start.0 >> shift, last.0 >> shift);
            if end - first > self.mask {
                // Every set may hold one: as quick to look at all.
                dropped += self.drop_where(|entry| {
                    let page = entry.tag >> 2;
                    entry.owner == owner
                        && entry.tag & 3 == size as u64
                        && (first..=end).contains(&page)
                });
                continue;
            }
            for page in first..=end {
                let tag = page << 2 | size as u64;
                for place in self.set(page).1 {
                    if place.get().tag == tag && place.get().owner == owner {
                        dropped += u64::from(self.forget(place));
                    }
                }
            }
        }
        dropped
    }

    fn drop_where(&self, matches: impl Fn(Entry) -> bool) -> u64 {
        let matching = self.entries.iter().filter(|place| matches(place.get()));
        matching.map(|place| u64::from(self.forget(place))).sum()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::Gpa;

    fn page(iova: u64, gpa: u64, shift: u8) -> Mapping {
        Mapping {
            iova: Iova(iova),
            gpa: Gpa(gpa),
            shift,
            read: true,
            write: false,
        }
    }

    fn gpa(tlb: &Tlb, iova: u64, domain: u16) -> Option<u64> {
        tlb.lookup(iova, domain, Need::READ)
            .map(|target| target.gpa)
    }

    #[test]
    fn entries_are_tagged_by_page_size_domain_and_permission() {
        let tlb = Tlb::new(IotlbGeometry { sets: 4, ways: 4 });
        tlb.insert(1, &page(0x5000, 0xa000, 12));
        tlb.insert(2, &page(0x5000, 0xb000, 12));
        tlb.insert(1, &page(0x20_0000, 0x4000_0000, 21));
        tlb.insert(1, &page(0x8000_0000, 0, 30));
        assert_eq!(gpa(&tlb, 0x5123, 1), Some(0xa123));
        assert_eq!(gpa(&tlb, 0x5123, 2), Some(0xb123));
        assert_eq!(gpa(&tlb, 0x5123, 3), None);
        assert_eq!(tlb.lookup(0x5123, 1, Need::WRITE), None);
        let target = tlb.lookup(0x3f_fffe, 1, Need::READ).unwrap();
        assert_eq!((target.gpa, target.room), (0x401f_fffe, 2));
        assert_eq!(gpa(&tlb, 0xbfff_ffff, 1), Some(0x3fff_ffff));
        assert_eq!(gpa(&tlb, 0xc000_0000, 1), None);
        // A walk that found more replaces the entry.
        let more = Mapping {
            write: true,
            ..page(0x5000, 0xc000, 12)
        };
        tlb.insert(1, &more);
        assert!(tlb.lookup(0x5000, 1, Need(3)).is_some());
        assert_eq!(gpa(&tlb, 0x5000, 1), Some(0xc000));
        assert_eq!(tlb.clear(), 4);
        assert_eq!(gpa(&tlb, 0x5000, 1), None);
    }

    #[test]
    fn a_full_set_gives_up_one_entry_at_a_time() {
        let tlb = Tlb::new(IotlbGeometry { sets: 2, ways: 4 });
        for n in 0..9 {
            tlb.insert(1, &page(n << 13, n << 12, 12));
            tlb.insert(1, &page(n << 13 | 1 << 12, n << 12, 12));
        }
        let kept = (0..9).filter(|n| gpa(&tlb, n << 13, 1).is_some()).count();
        assert_eq!(kept, 4);
        assert_eq!(gpa(&tlb, 8 << 13, 1), Some(8 << 12));
        assert_eq!(tlb.clear(), 8);
    }

    /// The reference: a list of mappings, of which the cache holds some.
    #[test]
    fn what_is_dropped_is_gone_and_the_rest_stays() {
        let tlb = Tlb::new(IotlbGeometry { sets: 16, ways: 8 });
        let fill = || {
            for n in 0..32 {
                tlb.insert((n % 2) as u16, &page(n << 12, n << 12, 12));
            }
            tlb.insert(0, &page(0x4000_0000, 0, 30));
            tlb.insert(0, &page(0x20_0000, 0, 21));
        };
        let has = |n: u64| gpa(&tlb, n << 12, (n % 2) as u16).is_some();
        fill();
        assert_eq!(tlb.drop_pages(0, Iova(0x4fff), Iova(0x8000)), 3);
        assert!(!has(4) && has(5) && !has(6) && has(7) && !has(8) && has(10));
        // One byte of a large page.
        assert_eq!(tlb.drop_pages(0, Iova(0x5000_0000), Iova(0x5000_0000)), 1);
        assert_eq!(gpa(&tlb, 0x4000_0000, 0), None);
        fill();
        assert_eq!(tlb.drop_pages(0, Iova(0), Iova(u64::MAX)), 18);
        assert!((0..32).all(|n| has(n) == (n % 2 == 1)));
        fill();
        assert_eq!(tlb.drop_domain(1), 16);
        assert!((0..32).all(|n| has(n) == (n % 2 == 0)));
        assert_eq!(tlb.drop_domain(7), 0);
        assert_eq!(tlb.drop_domain(0), 18);
        tlb.insert(0, &page(0, 0, 12));
        assert_eq!(tlb.drop_domain(1), 0);
        assert_eq!(tlb.drop_domain(0), 1);
        assert_eq!(tlb.clear(), 0);
    }
}

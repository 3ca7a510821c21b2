//! Physical Region Pages: where a command's data is (NVM Express Base 1.4, section 4.3).

use iommu::{DmaError, DmaMemory, Iova};

use super::spec::command::Status;

/// Why a PRP did not lead to memory.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum PrpError {
    /// An entry has an offset where none, or no such, is allowed.
    Offset,
    /// An entry or a list is not in memory.
    NotMapped,
    /// The function may not reach memory now; the command can be looked at again later.
    BusMasterOff,
}

impl PrpError {
    /// The command's status; `None` if the command should wait.
    pub(super) fn status(self) -> Option<Status> {
        match self {
            PrpError::Offset => Some(Status::PRP_OFFSET_INVALID.dnr()),
            PrpError::NotMapped => Some(Status::DATA_TRANSFER_ERROR.dnr()),
            PrpError::BusMasterOff => None,
        }
    }
}

impl From<DmaError> for PrpError {
    fn from(error: DmaError) -> PrpError {
        match error {
            DmaError::BusMasterOff => PrpError::BusMasterOff,
            _ => PrpError::NotMapped,
        }
    }
}

/// Entries read from a list at a time.
const CHUNK: usize = 32;
const ENTRY: u64 = 8;

/// Calls `visit` with each piece of the `len` bytes that `prp1` and `prp2` describe, in order.
/// `page` is the memory page size that CC.MPS selects, a power of two of at least 4096.
///
/// What is read from a list is bounded by `len`: every list page but the first holds at least one
/// data page, so a list that points to itself ends too.
pub(super) fn walk(
    mem: &DmaMemory,
    page: u64,
    prp1: u64,
    prp2: u64,
    len: u64,
    mut visit: impl FnMut(Iova, u64) -> Result<(), DmaError>,
) -> Result<(), PrpError> {
    let offset = |address: u64| address & (page - 1);
    if len == 0 {
        return Ok(());
    }
    if prp1 & 3 != 0 {
        return Err(PrpError::Offset);
    }
    let first = len.min(page - offset(prp1));
    visit(Iova(prp1), first)?;
    let mut rest = len - first;
    if rest == 0 {
        return Ok(());
    }
    if rest <= page {
        if offset(prp2) != 0 {
            return Err(PrpError::Offset);
        }
        visit(Iova(prp2), rest)?;
        return Ok(());
    }
    if !prp2.is_multiple_of(ENTRY) {
        return Err(PrpError::Offset);
    }
    let mut list = prp2;
    loop {
        let room = (page - offset(list)) / ENTRY;
        let needed = rest.div_ceil(page);
        // The last entry of a list page that does not suffice is the address of the next.
        let here = if needed > room { room - 1 } else { needed };
        let mut at = list;
        let mut left = here;
        while left > 0 {
            let mut bytes = [0; CHUNK * 8];
            let count = usize::try_from(left).map_or(CHUNK, |left| left.min(CHUNK));
            mem.read(Iova(at), &mut bytes[..count * 8])?;
            let (entries, _) = bytes.as_chunks::<8>();
            for entry in &entries[..count] {
                let entry = u64::from_le_bytes(*entry);
                if offset(entry) != 0 {
                    return Err(PrpError::Offset);
                }
                let len = rest.min(page);
                visit(Iova(entry), len)?;
                rest -= len;
                left -= 1;
                // May reach 2^64 after the last entry, when it is no longer used.
                at = at.wrapping_add(ENTRY);
            }
        }
        if rest == 0 {
            return Ok(());
        }
        let next: u64 = u64::from_le(mem.read_obj(Iova(at))?);
        if offset(next) != 0 {
            return Err(PrpError::Offset);
        }
        list = next;
    }
}

#[cfg(test)]
mod tests {
    use iommu::{DmaSpace, GuestRam, SourceId, Upstream};
    use proptest::prelude::*;
    use vm_memory::GuestAddress;

    use super::*;

    const RAM: u64 = 0x40_0000;

    fn memory() -> DmaMemory {
        let size = usize::try_from(RAM).unwrap();
        let space = DmaSpace::new(
            &Upstream::memory(GuestRam::from_ranges(&[(GuestAddress(0), size)]).unwrap()),
            SourceId(0),
        );
        space.set_bus_master(true);
        space.view()
    }

    fn pieces(
        mem: &DmaMemory,
        page: u64,
        prp: (u64, u64),
        len: u64,
    ) -> Result<Vec<(u64, u64)>, PrpError> {
        let mut out = Vec::new();
        walk(mem, page, prp.0, prp.1, len, |at, len| {
            out.push((at.0, len));
            Ok(())
        })?;
        Ok(out)
    }

    #[test]
    fn one_and_two_entries() {
        let mem = memory();
        assert_eq!(
            pieces(&mem, 4096, (0x1000, 1), 4096),
            Ok(vec![(0x1000, 4096)])
        );
        assert_eq!(
            pieces(&mem, 4096, (0x1e00, 0x5000), 0x400),
            Ok(vec![(0x1e00, 0x200), (0x5000, 0x200)])
        );
        assert_eq!(
            pieces(&mem, 4096, (0x1e00, 0x5000), 0x1200),
            Ok(vec![(0x1e00, 0x200), (0x5000, 0x1000)])
        );
        assert_eq!(
            pieces(&mem, 4096, (0x1e00, 0x5008), 0x400),
            Err(PrpError::Offset)
        );
        assert_eq!(
            pieces(&mem, 4096, (0x1e02, 0x5000), 0x400),
            Err(PrpError::Offset)
        );
        assert_eq!(pieces(&mem, 4096, (0x1e02, 0x5000), 0), Ok(vec![]));
    }

    #[test]
    fn list_offsets_and_holes() {
        let mem = memory();
        for (index, entry) in [0x10_0000u64, 0x11_0000, 0x12_0008].into_iter().enumerate() {
            mem.write_obj(Iova(0x2000 + 8 * u64::try_from(index).unwrap()), entry)
                .unwrap();
        }
        assert_eq!(
            pieces(&mem, 4096, (0x1000, 0x2000), 0x3000),
            Ok(vec![
                (0x1000, 0x1000),
                (0x10_0000, 0x1000),
                (0x11_0000, 0x1000)
            ])
        );
        assert_eq!(
            pieces(&mem, 4096, (0x1000, 0x2000), 0x4000),
            Err(PrpError::Offset)
        );
        assert_eq!(
            pieces(&mem, 4096, (0x1000, 0x2004), 0x3000),
            Err(PrpError::Offset)
        );
        assert_eq!(
            pieces(&mem, 4096, (0x1000, RAM), 0x3000),
            Err(PrpError::NotMapped)
        );
        assert_eq!(
            pieces(&mem, 4096, (0x1000, u64::MAX - 7), 0x3000),
            Err(PrpError::NotMapped)
        );
    }

    /// A list in the last slot of its page holds only the address of the next list.
    #[test]
    fn a_list_may_begin_with_its_link() {
        let mem = memory();
        mem.write_obj(Iova(0x2ff8), 0x3000u64).unwrap();
        mem.write_obj(Iova(0x3000), 0x10_0000u64).unwrap();
        mem.write_obj(Iova(0x3008), 0x11_0000u64).unwrap();
        assert_eq!(
            pieces(&mem, 4096, (0x1000, 0x2ff8), 0x3000),
            Ok(vec![
                (0x1000, 0x1000),
                (0x10_0000, 0x1000),
                (0x11_0000, 0x1000)
            ])
        );
        mem.write_obj(Iova(0x2ff8), 0x3008u64).unwrap();
        assert_eq!(
            pieces(&mem, 4096, (0x1000, 0x2ff8), 0x3000),
            Err(PrpError::Offset)
        );
    }

    #[test]
    fn a_list_that_points_to_itself_ends() {
        let mem = memory();
        for index in 0..512 {
            mem.write_obj(Iova(0x2000 + 8 * index), 0x2000u64).unwrap();
        }
        let pieces = pieces(&mem, 4096, (0x1000, 0x2000), 0x40_0000).unwrap();
        assert_eq!(pieces.len(), 1024);
    }

    #[test]
    fn bus_master_off_is_told_apart() {
        let mem = memory();
        mem.space().set_bus_master(false);
        assert_eq!(
            pieces(&mem, 4096, (0x1000, 0x2000), 0x3000),
            Err(PrpError::BusMasterOff)
        );
    }

    /// The plain model: lay pages out, write them as a driver would, expect them back.
    fn lay_out(
        mem: &DmaMemory,
        page: u64,
        first: u64,
        pages: &[u64],
        len: u64,
        at: u64,
    ) -> (u64, u64) {
        let rest = len.saturating_sub(page - first % page);
        let list: Vec<u64> = pages
            .iter()
            .copied()
            .take(usize::try_from(rest.div_ceil(page)).unwrap())
            .collect();
        match list.as_slice() {
            [] => return (first, 0xdead),
            [one] => return (first, *one),
            _ => {}
        }
        // Lists from page 1 of RAM on, the first one at offset `at`.
        let mut table = page;
        let mut slot = at;
        let mut left = list.as_slice();
        let start = table + slot * 8;
        while let [entry, tail @ ..] = left {
            if slot == page / 8 - 1 && !tail.is_empty() {
                mem.write_obj(Iova(table + slot * 8), table + page).unwrap();
                table += page;
                slot = 0;
                continue;
            }
            mem.write_obj(Iova(table + slot * 8), *entry).unwrap();
            slot += 1;
            left = tail;
        }
        (first, start)
    }

    proptest! {
        #[test]
        fn agrees_with_the_model(
            shift in 12u32..15,
            first in 0u64..0x1000,
            pages in proptest::collection::vec(0u64..64, 1100),
            len in 1u64..0x40_0000,
            at in 0u64..512,
        ) {
            let mem = memory();
            let page = 1u64 << shift;
            let base = 0x10_0000;
            let first = base + (first * 4) % (page * 4);
            let pages: Vec<u64> = pages.iter().map(|n| base + n * page).collect();
            let prp = lay_out(&mem, page, first, &pages, len, at);
            let mut expect = vec![(first, len.min(page - first % page))];
            let mut rest = len - expect[0].1;
            for entry in &pages {
                if rest == 0 {
                    break;
                }
                expect.push((*entry, rest.min(page)));
                rest -= rest.min(page);
            }
            prop_assert_eq!(pieces(&mem, page, prp, len), Ok(expect));
        }

        /// Whatever a list holds, the walk ends, and hands out exactly the length or fails.
        #[test]
        fn garbage_ends(words in proptest::collection::vec(any::<u64>(), 512), prp1: u64, prp2: u64, len in 0u64..0x20_0000) {
            let mem = memory();
            for (index, word) in (0u64..).zip(&words) {
                mem.write_obj(Iova(0x2000 + index * 8), word & 0x3f_f000).unwrap();
            }
            let mut total = 0;
            let result = walk(&mem, 4096, prp1 & 0x3f_fffc, prp2 & 0x2ff8, len, |_, len| {
                total += len;
                Ok(())
            });
            prop_assert!(result.is_err() || total == len);
        }
    }
}

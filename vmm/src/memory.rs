//! Guest RAM: host memory, its place in the guest's address map, and the map that the guest is told.

use iommu::GuestRam;
use kvm_bindings::kvm_userspace_memory_region;
use kvm_ioctls::VmFd;
use vm_memory::mmap::{GuestRegionMmap, MmapRegion};
use vm_memory::{GuestAddress, GuestMemoryBackend, GuestMemoryRegion};

use crate::layout;

/// Why guest memory could not be made.
#[derive(Debug, thiserror::Error)]
pub enum MemoryError {
    /// The host gave no address space for it.
    #[error("cannot map {0} MiB of guest memory: {1}")]
    Map(u64, String),
    /// KVM refused the memory slot.
    #[error("KVM refuses guest memory at {0:#x}: {1}")]
    Slot(u64, kvm_ioctls::Error),
}

/// Parts of RAM as (guest-physical start, length in bytes).
pub fn regions(size: u64) -> Vec<(u64, u64)> {
    let low = size.min(layout::LOW_RAM_LIMIT);
    let mut regions = vec![(0, low)];
    if size > low {
        regions.push((layout::HIGH_RAM, size - low));
    }
    regions
}

/// Maps `size` bytes of RAM. Host memory is taken page by page as the guest touches it, in huge
/// pages where the host offers them.
///
/// # Errors
///
/// [`MemoryError::Map`].
pub fn allocate(size: u64) -> Result<GuestRam, MemoryError> {
    let error = |e: &dyn std::fmt::Display| MemoryError::Map(size >> 20, e.to_string());
    let mut parts = Vec::new();
    for (start, len) in regions(size) {
        let len = usize::try_from(len).map_err(|e| error(&e))?;
        let region = MmapRegion::<()>::build(
            None,
            len,
            libc::PROT_READ | libc::PROT_WRITE,
            libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_NORESERVE,
        )
        .map_err(|e| error(&e))?;
        advise_huge_pages(&region);
        let region = GuestRegionMmap::new(region, GuestAddress(start))
            .ok_or_else(|| error(&"address overflow"))?;
        parts.push(region);
    }
    GuestRam::from_regions(parts).map_err(|e| error(&e))
}

#[expect(unsafe_code, reason = "madvise takes a raw range")]
fn advise_huge_pages(region: &MmapRegion<()>) {
    // SAFETY: the range is exactly one live mapping, and MADV_HUGEPAGE does not change its contents.
    // A refusal (huge pages compiled out) costs speed alone, so the result is not looked at.
    unsafe { libc::madvise(region.as_ptr().cast(), region.size(), libc::MADV_HUGEPAGE) };
}

/// Gives every region of `ram` to the VM, slots from 0 on.
///
/// # Errors
///
/// [`MemoryError::Slot`].
pub fn register(vm: &VmFd, ram: &GuestRam) -> Result<(), MemoryError> {
    for (slot, region) in (0u32..).zip(ram.iter()) {
        let start = region.start_addr().0;
        let description = kvm_userspace_memory_region {
            slot,
            flags: 0,
            guest_phys_addr: start,
            memory_size: region.len(),
            userspace_addr: region.as_ptr().addr() as u64,
        };
        register_slot(vm, description).map_err(|e| MemoryError::Slot(start, e))?;
    }
    Ok(())
}

#[expect(unsafe_code, reason = "KVM takes a raw host address")]
fn register_slot(
    vm: &VmFd,
    description: kvm_userspace_memory_region,
) -> Result<(), kvm_ioctls::Error> {
    // SAFETY: the range is a live mapping of the guest RAM. The VM keeps a reference to the RAM for
    // as long as its vCPUs run (`Machine` owns both and drops the vCPUs first).
    unsafe { vm.set_user_memory_region(description) }
}

/// Kind of an entry in the memory map that the guest is told (ACPI 6.5, table 15.2).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u32)]
pub enum MapKind {
    /// Usable RAM.
    Ram = 1,
    /// Not to be touched by the memory manager.
    Reserved = 2,
}

/// The memory map for a guest with `size` bytes of RAM, as (start, length, kind), sorted.
pub fn guest_map(size: u64) -> Vec<(u64, u64, MapKind)> {
    let firmware = layout::ACPI_TABLES.start..layout::BIOS.end;
    let mut map = vec![
        (0, layout::LOW_MEMORY_END, MapKind::Ram),
        (
            firmware.start,
            firmware.end - firmware.start,
            MapKind::Reserved,
        ),
    ];
    for (start, len) in regions(size) {
        let end = start + len;
        let start = start.max(layout::HIGH_MEMORY);
        map.push((start, end - start, MapKind::Ram));
        if start == layout::HIGH_MEMORY {
            // Linux uses the ECAM only if the memory map or ACPI reserves it.
            let ecam = layout::ECAM;
            map.push((ecam.start, ecam.end - ecam.start, MapKind::Reserved));
        }
    }
    map
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ram_is_split_at_the_hole() {
        assert_eq!(regions(1 << 30), [(0, 1 << 30)]);
        assert_eq!(regions(3 << 30), [(0, 3 << 30)]);
        assert_eq!(
            regions(5 << 30),
            [(0, 3 << 30), (layout::HIGH_RAM, 2 << 30)]
        );
    }

    #[test]
    fn guest_map_is_sorted_and_counts_all_extended_memory() {
        for size in [64 << 20, 3 << 30, 5 << 30] {
            let map = guest_map(size);
            for pair in map.windows(2) {
                assert!(pair[0].0 + pair[0].1 <= pair[1].0);
            }
            let ram: u64 = map
                .iter()
                .filter(|e| e.2 == MapKind::Ram && e.0 >= layout::HIGH_MEMORY)
                .map(|e| e.1)
                .sum();
            assert_eq!(ram, size - layout::HIGH_MEMORY);
        }
    }

    #[test]
    fn allocates_in_two_parts() {
        let ram = allocate((3 << 30) + (64 << 20)).unwrap();
        assert_eq!(ram.num_regions(), 2);
        assert!(ram.address_in_range(GuestAddress(layout::HIGH_RAM)));
        assert!(!ram.address_in_range(GuestAddress(layout::LOW_RAM_LIMIT)));
    }
}

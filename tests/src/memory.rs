//! Guest pages for rings, lists and data.

use std::sync::Mutex;
use std::sync::PoisonError;

use iommu::{Gpa, GuestRam};
use vm_memory::{ByteValued, Bytes, GuestAddress};

/// Size of a guest page in bytes.
pub const PAGE_SIZE: u64 = 4096;

/// On which side of 4 GiB.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Side {
    /// Below 4 GiB.
    Low,
    /// Above 4 GiB.
    High,
}

/// Gives out pages, never twice.
pub(crate) struct Pages {
    next: Mutex<[u64; 2]>,
    ends: [u64; 2],
}

impl Pages {
    pub(crate) fn new(low: std::ops::Range<u64>, high: std::ops::Range<u64>) -> Pages {
        Pages {
            next: Mutex::new([low.start, high.start]),
            ends: [low.end, high.end],
        }
    }

    pub(crate) fn take(&self, side: Side, pages: u64) -> u64 {
        let index = match side {
            Side::Low => 0,
            Side::High => 1,
        };
        let mut next = self.next.lock().unwrap_or_else(PoisonError::into_inner);
        let start = next[index];
        let end = start + pages * PAGE_SIZE;
        assert!(end <= self.ends[index], "the fake guest is out of memory");
        next[index] = end;
        start
    }
}

/// Pages of guest memory that belong to the test. Offsets are in bytes; an access that leaves the
/// buffer panics, for then the test is wrong.
#[derive(Clone)]
pub struct DmaBuffer {
    ram: GuestRam,
    address: Gpa,
    len: u64,
}

impl DmaBuffer {
    pub(crate) fn new(ram: GuestRam, address: Gpa, len: u64) -> DmaBuffer {
        DmaBuffer { ram, address, len }
    }

    /// Where it is; without an IOMMU this is also the address that devices use.
    pub fn address(&self) -> Gpa {
        self.address
    }

    /// Its length in bytes, a multiple of [`PAGE_SIZE`].
    pub fn len(&self) -> u64 {
        self.len
    }

    /// Never true.
    pub fn is_empty(&self) -> bool {
        self.len == 0
    }

    /// The address of the byte at `offset`.
    pub fn at(&self, offset: u64) -> Gpa {
        assert!(offset <= self.len);
        Gpa(self.address.0 + offset)
    }

    fn place(&self, offset: u64, len: usize) -> GuestAddress {
        let end = offset.checked_add(len as u64);
        assert!(end.is_some_and(|end| end <= self.len), "outside the buffer");
        GuestAddress(self.address.0 + offset)
    }

    /// Reads an object.
    pub fn read<T: ByteValued>(&self, offset: u64) -> T {
        let at = self.place(offset, size_of::<T>());
        self.ram.read_obj(at).expect("guest RAM")
    }

    /// Writes an object.
    pub fn write<T: ByteValued>(&self, offset: u64, value: T) {
        let at = self.place(offset, size_of::<T>());
        self.ram.write_obj(value, at).expect("guest RAM");
    }

    /// Loads an integer atomically, with acquire ordering: for flags and indices that a device sets
    /// after what they announce.
    pub fn load<T: vm_memory::AtomicAccess>(&self, offset: u64) -> T {
        let at = self.place(offset, size_of::<T>());
        let order = std::sync::atomic::Ordering::Acquire;
        self.ram.load(at, order).expect("aligned guest RAM")
    }

    /// Stores an integer atomically, with release ordering.
    pub fn store<T: vm_memory::AtomicAccess>(&self, offset: u64, value: T) {
        let at = self.place(offset, size_of::<T>());
        let order = std::sync::atomic::Ordering::Release;
        self.ram.store(value, at, order).expect("aligned guest RAM");
    }

    /// Copies bytes out.
    pub fn bytes(&self, offset: u64, len: usize) -> Vec<u8> {
        let mut data = vec![0; len];
        let at = self.place(offset, len);
        self.ram.read_slice(&mut data, at).expect("guest RAM");
        data
    }

    /// Copies bytes in.
    pub fn set_bytes(&self, offset: u64, data: &[u8]) {
        let at = self.place(offset, data.len());
        self.ram.write_slice(data, at).expect("guest RAM");
    }

    /// Sets every byte.
    pub fn fill(&self, value: u8) {
        let len = usize::try_from(self.len).expect("a buffer fits the host");
        self.set_bytes(0, &vec![value; len]);
    }
}

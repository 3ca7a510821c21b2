//! Names of the Multiboot Specification, version 0.6.96: the header in the image (3.1), the state of
//! the machine (3.2) and the information that the loader leaves in memory (3.3).

#![forbid(unsafe_code)]

use zerocopy::{Immutable, IntoBytes};

/// `magic` of the header.
pub const HEADER_MAGIC: u32 = 0x1bad_b002;
/// The whole header lies within this many bytes from the start of the file (3.1).
pub const HEADER_SEARCH: usize = 8192;
/// The header's alignment in bytes (3.1).
pub const HEADER_ALIGN: usize = 4;
/// `flags` bit 0: modules are aligned on pages.
pub const HEADER_PAGE_ALIGN: u32 = 1 << 0;
/// `flags` bit 1: the loader must tell the memory's size.
pub const HEADER_MEMORY_INFO: u32 = 1 << 1;
/// `flags` bits 0 to 15: a loader that does not know one must not load the image (3.1.1).
pub const HEADER_REQUIRED: u32 = 0xffff;
/// `flags` bit 16: the header's address fields are valid and go before the file's own.
pub const HEADER_ADDRESSES: u32 = 1 << 16;

/// What EAX holds at the entry point (3.2).
pub const LOADER_MAGIC: u32 = 0x2bad_b002;

/// [`Information::flags`] bit 0: `mem_lower` and `mem_upper` are valid.
pub const INFO_MEMORY: u32 = 1 << 0;
/// [`Information::flags`] bit 2: `cmdline` is valid.
pub const INFO_CMDLINE: u32 = 1 << 2;
/// [`Information::flags`] bit 3: `mods_count` and `mods_addr` are valid.
pub const INFO_MODULES: u32 = 1 << 3;
/// [`Information::flags`] bit 6: `mmap_length` and `mmap_addr` are valid.
pub const INFO_MEMORY_MAP: u32 = 1 << 6;
/// [`Information::flags`] bit 9: `boot_loader_name` is valid.
pub const INFO_LOADER_NAME: u32 = 1 << 9;

/// The multiboot information up to the last field that is used here (3.3).
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, IntoBytes, Immutable)]
pub struct Information {
    /// Which of the others are valid.
    pub flags: u32,
    /// KiB of memory from address 0 on.
    pub mem_lower: u32,
    /// KiB of memory from 1 MiB to the first hole.
    pub mem_upper: u32,
    /// BIOS disk that was booted from.
    pub boot_device: u32,
    /// Address of the command line, which ends with a zero.
    pub cmdline: u32,
    /// Number of modules.
    pub mods_count: u32,
    /// Address of the first [`Module`].
    pub mods_addr: u32,
    /// Symbol table.
    pub syms: [u32; 4],
    /// Bytes of the memory map.
    pub mmap_length: u32,
    /// Address of the first [`MapEntry`].
    pub mmap_addr: u32,
    /// BIOS disks.
    pub drives: [u32; 2],
    /// ROM configuration table.
    pub config_table: u32,
    /// Address of the loader's name, which ends with a zero.
    pub boot_loader_name: u32,
}

/// One module (3.3).
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, IntoBytes, Immutable)]
pub struct Module {
    /// Address of its first byte.
    pub start: u32,
    /// Address behind its last byte.
    pub end: u32,
    /// Address of its string, which ends with a zero.
    pub string: u32,
    /// Zero.
    pub reserved: u32,
}

/// One entry of the memory map (3.3).
#[repr(C, packed)]
#[derive(Clone, Copy, Debug, IntoBytes, Immutable)]
pub struct MapEntry {
    /// Bytes of the entry without this field.
    pub size: u32,
    /// First address.
    pub base: u64,
    /// Bytes.
    pub length: u64,
    /// 1: RAM; anything else is reserved.
    pub kind: u32,
}

/// [`MapEntry::size`].
pub const MAP_ENTRY_SIZE: u32 = 20;

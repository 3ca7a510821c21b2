//! ELF files (and flat ones with address fields) by the Multiboot Specification, version 0.6.96.
//!
//! Test kernels and teaching operating systems start this way. They expect a firmware to have been at
//! work before: see [`Entry::Multiboot`].

mod spec;

use std::fs::File;
use std::io::{self, Read, Seek, SeekFrom};
use std::path::Path;

use iommu::GuestRam;
use vm_memory::{Bytes, GuestAddress};
use zerocopy::IntoBytes;

use super::elf::Image as ElfImage;
use super::{BootError, BootFiles, Entry, load_initrd, write_command_line};
use crate::layout;
use crate::memory;

pub(super) use spec::HEADER_SEARCH;
pub use spec::LOADER_MAGIC;
use spec::{
    HEADER_ADDRESSES, HEADER_ALIGN, HEADER_MAGIC, HEADER_MEMORY_INFO, HEADER_PAGE_ALIGN,
    HEADER_REQUIRED, INFO_CMDLINE, INFO_LOADER_NAME, INFO_MEMORY, INFO_MEMORY_MAP, INFO_MODULES,
    Information, MAP_ENTRY_SIZE, MapEntry, Module,
};

/// Largest file that is read; what these kernels are is some hundred KiB.
const FILE_MAX: u64 = 256 << 20;
/// `boot_loader_name`.
const LOADER_NAME: &str = "Ringside";

/// A multiboot header.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Header {
    /// Where in the file it is.
    offset: u64,
    flags: u32,
    addresses: Option<Addresses>,
}

/// The header's address fields (3.1.3).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Addresses {
    header: u64,
    load: u64,
    /// 0: to the end of the file.
    load_end: u64,
    /// 0: nothing behind the data.
    bss_end: u64,
    entry: u64,
}

impl Header {
    /// Looks for a header in the first [`HEADER_SEARCH`] bytes of a file.
    pub(super) fn find(head: &[u8]) -> Option<Header> {
        let head = head.get(..HEADER_SEARCH).unwrap_or(head);
        (0..head.len())
            .step_by(HEADER_ALIGN)
            .find_map(|offset| Header::at(head, offset))
    }

    fn at(head: &[u8], offset: usize) -> Option<Header> {
        let field = |index: usize| -> Option<u32> {
            let bytes = head.get(offset..)?.get(index * 4..)?.first_chunk()?;
            Some(u32::from_le_bytes(*bytes))
        };
        let (magic, flags, checksum) = (field(0)?, field(1)?, field(2)?);
        if magic != HEADER_MAGIC || magic.wrapping_add(flags).wrapping_add(checksum) != 0 {
            return None;
        }
        let addresses = if flags & HEADER_ADDRESSES == 0 {
            None
        } else {
            let address = |index| field(index).map(u64::from);
            Some(Addresses {
                header: address(3)?,
                load: address(4)?,
                load_end: address(5)?,
                bss_end: address(6)?,
                entry: address(7)?,
            })
        };
        Some(Header {
            offset: u64::try_from(offset).ok()?,
            flags,
            addresses,
        })
    }

    /// A file without ELF headers can only be loaded by the address fields.
    pub(super) fn stands_alone(&self) -> bool {
        self.addresses.is_some()
    }
}

/// What goes into memory.
struct Image<'a> {
    entry: u64,
    parts: Vec<Part<'a>>,
}

/// A range of memory and the bytes at its start; the others are zero.
#[derive(Clone, Copy)]
struct Part<'a> {
    address: u64,
    data: &'a [u8],
    size: u64,
}

/// Reads the whole of a file that has a multiboot header.
pub(super) fn read(kernel: &mut File, path: &Path) -> Result<Vec<u8>, BootError> {
    let error = |e| BootError::Read(path.to_owned(), e);
    kernel.seek(SeekFrom::Start(0)).map_err(error)?;
    let mut file = Vec::new();
    kernel
        .take(FILE_MAX + 1)
        .read_to_end(&mut file)
        .map_err(error)?;
    if u64::try_from(file.len()).is_ok_and(|len| len > FILE_MAX) {
        let large = io::Error::new(
            io::ErrorKind::FileTooLarge,
            format!("a multiboot kernel of more than {} MiB", FILE_MAX >> 20),
        );
        return Err(error(large));
    }
    Ok(file)
}

pub(super) fn load(
    ram: &GuestRam,
    memory: u64,
    files: &BootFiles<'_>,
    file: &[u8],
    header: &Header,
) -> Result<Entry, BootError> {
    let unsupported = |what| BootError::Unsupported(files.kernel.to_owned(), what);
    if header.flags & HEADER_REQUIRED & !(HEADER_PAGE_ALIGN | HEADER_MEMORY_INFO) != 0 {
        return Err(unsupported(
            "its multiboot header asks for what this machine has not (a video mode?)",
        ));
    }
    let image = match &header.addresses {
        Some(addresses) => flat(file, header.offset, addresses).ok_or_else(|| {
            unsupported("the address fields of its multiboot header contradict each other or the file's length")
        })?,
        None => {
            let elf = ElfImage::parse(file)
                .map_err(|e| BootError::Elf(files.kernel.to_owned(), e))?;
            from_elf(&elf)
        }
    };
    let end = place(ram, memory, files.kernel, &image)?;
    let eip = u32::try_from(image.entry)
        .ok()
        .filter(|_| image.parts.iter().any(|part| part.contains(image.entry)))
        .ok_or_else(|| unsupported("its entry point is outside of what is loaded"))?;
    write_information(ram, memory, files, end)?;
    Ok(Entry::Multiboot { eip })
}

impl Part<'_> {
    fn contains(&self, address: u64) -> bool {
        address
            .checked_sub(self.address)
            .is_some_and(|offset| offset < self.size)
    }
}

fn from_elf<'a>(elf: &ElfImage<'a>) -> Image<'a> {
    Image {
        entry: elf.physical_entry(),
        parts: elf
            .segments
            .iter()
            .map(|segment| Part {
                address: segment.physical_address,
                data: segment.data,
                size: segment.size,
            })
            .collect(),
    }
}

/// The image by the address fields of a header that is at `offset`; `None` if they make no sense.
fn flat<'a>(file: &'a [u8], offset: u64, fields: &Addresses) -> Option<Image<'a>> {
    let before = fields.header.checked_sub(fields.load)?;
    let start = usize::try_from(offset.checked_sub(before)?).ok()?;
    let rest = file.get(start..)?;
    let data = match fields.load_end {
        0 => rest,
        end => rest.get(..usize::try_from(end.checked_sub(fields.load)?).ok()?)?,
    };
    let loaded = u64::try_from(data.len()).ok()?;
    let size = match fields.bss_end {
        0 => loaded,
        end => end
            .checked_sub(fields.load)
            .filter(|size| *size >= loaded)?,
    };
    Some(Image {
        entry: fields.entry,
        parts: vec![Part {
            address: fields.load,
            data,
            size,
        }],
    })
}

/// Puts the parts into memory, which is zero so far, and gives the end of the last.
fn place(ram: &GuestRam, memory: u64, kernel: &Path, image: &Image<'_>) -> Result<u64, BootError> {
    let unsupported = |what| BootError::Unsupported(kernel.to_owned(), what);
    let top = memory::regions(memory)[0].1;
    let mut parts = image.parts.clone();
    parts.sort_unstable_by_key(|part| part.address);
    let mut end = layout::HIGH_MEMORY;
    for part in &parts {
        if part.address < layout::HIGH_MEMORY {
            return Err(unsupported(
                "it wants to be loaded below 1 MiB, where this machine keeps what it boots with",
            ));
        }
        if part.address < end {
            return Err(unsupported("parts of it would lie over each other"));
        }
        end = part
            .address
            .checked_add(part.size)
            .filter(|end| *end <= top)
            .ok_or_else(|| BootError::TooLarge {
                file: kernel.to_owned(),
                needed: part.address.saturating_add(part.size).div_ceil(1 << 20),
                limit: layout::LOW_RAM_LIMIT,
                present: top >> 20,
            })?;
        ram.write_slice(part.data, GuestAddress(part.address))
            .map_err(|_| BootError::Memory)?;
    }
    if parts.is_empty() {
        return Err(unsupported("it has no segment to load"));
    }
    Ok(end)
}

/// Loads the initrd as the only module, above `end`, and writes everything that the kernel is told.
fn write_information(
    ram: &GuestRam,
    memory: u64,
    files: &BootFiles<'_>,
    end: u64,
) -> Result<(), BootError> {
    let narrow = |value: u64| u32::try_from(value).map_err(|_| BootError::Memory);
    let put = |at: u64, bytes: &[u8]| {
        ram.write_slice(bytes, GuestAddress(at))
            .map_err(|_| BootError::Memory)
    };
    // The first word is the program's name, as from every loader (3.3, `cmdline`).
    let line = format!("{} {}", word(files.kernel), files.cmdline);
    write_command_line(ram, line.trim_end(), layout::COMMAND_LINE_ROOM - 1)?;
    put(layout::MULTIBOOT_LOADER_NAME, LOADER_NAME.as_bytes())?;

    let map: Vec<_> = memory::guest_map(memory)
        .into_iter()
        .map(|(base, length, kind)| MapEntry {
            size: MAP_ENTRY_SIZE,
            base,
            length,
            kind: kind as u32,
        })
        .collect();
    put(layout::MULTIBOOT_MEMORY_MAP, map.as_bytes())?;

    let top = memory::regions(memory)[0].1;
    let mut info = Information {
        flags: INFO_MEMORY | INFO_CMDLINE | INFO_MODULES | INFO_MEMORY_MAP | INFO_LOADER_NAME,
        mem_lower: narrow(layout::LOW_MEMORY_END >> 10)?,
        mem_upper: narrow((top - layout::HIGH_MEMORY) >> 10)?,
        cmdline: narrow(layout::COMMAND_LINE)?,
        mods_addr: narrow(layout::MULTIBOOT_MODULES)?,
        mmap_length: u32::try_from(map.as_bytes().len()).map_err(|_| BootError::Memory)?,
        mmap_addr: narrow(layout::MULTIBOOT_MEMORY_MAP)?,
        boot_loader_name: narrow(layout::MULTIBOOT_LOADER_NAME)?,
        ..Information::default()
    };
    if let Some(initrd) = files.initrd {
        let (start, len) = load_initrd(ram, memory, initrd, end, layout::LOW_RAM_LIMIT)?;
        let module = Module {
            start: narrow(start)?,
            end: narrow(start + len)?,
            string: narrow(layout::MULTIBOOT_MODULE_NAME)?,
            reserved: 0,
        };
        put(layout::MULTIBOOT_MODULES, module.as_bytes())?;
        put(layout::MULTIBOOT_MODULE_NAME, word(initrd).as_bytes())?;
        info.mods_count = 1;
    }
    put(layout::MULTIBOOT_INFO, info.as_bytes())
}

/// A file's name as one word of printable ASCII of at most 255 bytes.
fn word(path: &Path) -> String {
    let name = path.file_name().unwrap_or_default().to_string_lossy();
    name.chars()
        .map(|c| if c.is_ascii_graphic() { c } else { '_' })
        .take(255)
        .collect()
}

#[cfg(test)]
mod tests;

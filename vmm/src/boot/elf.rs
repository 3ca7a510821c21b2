//! What a boot loader needs to know of an ELF file of either width. Nothing in the file is trusted.

#![forbid(unsafe_code)]

use object::elf::{EM_386, EM_X86_64, FileHeader32, FileHeader64, NoteType, PT_LOAD};
use object::read::elf::{FileHeader, ProgramHeader};
use object::{Endianness, elf};

/// Owner and type of the note that holds a PVH entry point (Xen public/elfnote.h,
/// `XEN_ELFNOTE_PHYS32_ENTRY`).
const PVH_OWNER: &[u8] = b"Xen";
const PVH_TYPE: NoteType = NoteType(18);
/// Far more segments than any linker makes.
const SEGMENTS_MAX: usize = 64;

/// What is wrong with an ELF file; the text goes after the file's name.
#[derive(Debug, thiserror::Error, PartialEq, Eq)]
pub enum ElfError {
    /// The headers.
    #[error("a damaged ELF file: {0}")]
    Damaged(object::Error),
    /// A segment.
    #[error("a damaged ELF file: a segment's bytes are not all in the file (is it cut short?)")]
    Cut,
    /// A segment.
    #[error("a damaged ELF file: a segment has more bytes in the file than in memory")]
    Shrunk,
    /// More than any linker makes.
    #[error("an ELF file with more than {SEGMENTS_MAX} segments")]
    Segments,
    /// Not for this machine.
    #[error("an ELF file for another processor: an x86 kernel is needed")]
    Machine,
}

/// An ELF file.
#[derive(Debug)]
pub(super) struct Image<'a> {
    /// Virtual address of the entry point.
    pub(super) entry: u64,
    /// Loaded segments that take memory.
    pub(super) segments: Vec<Segment<'a>>,
    /// There is a PVH note, in a 64-bit file: kernels that are entered through it are of that class.
    pub(super) pvh: bool,
}

/// A segment that is loaded.
#[derive(Clone, Copy, Debug)]
pub(super) struct Segment<'a> {
    pub(super) virtual_address: u64,
    pub(super) physical_address: u64,
    /// Bytes from the file.
    pub(super) data: &'a [u8],
    /// Bytes in memory; what is more than the data is zero.
    pub(super) size: u64,
}

impl<'a> Image<'a> {
    /// Reads the headers.
    pub(super) fn parse(file: &'a [u8]) -> Result<Image<'a>, ElfError> {
        if file.get(4) == Some(&elf::ELFCLASS32.0) {
            Image::of_class::<FileHeader32<Endianness>>(file)
        } else {
            Image::of_class::<FileHeader64<Endianness>>(file)
        }
    }

    fn of_class<H: FileHeader<Endian = Endianness>>(file: &'a [u8]) -> Result<Image<'a>, ElfError> {
        let header = H::parse(file).map_err(ElfError::Damaged)?;
        let endian = header.endian().map_err(ElfError::Damaged)?;
        if !header.is_little_endian() || !matches!(header.e_machine(endian), EM_386 | EM_X86_64) {
            return Err(ElfError::Machine);
        }
        let table = header
            .program_headers(endian, file)
            .map_err(ElfError::Damaged)?;
        if table.len() > SEGMENTS_MAX {
            return Err(ElfError::Segments);
        }
        let mut image = Image {
            entry: header.e_entry(endian).into(),
            segments: Vec::new(),
            pvh: false,
        };
        for entry in table {
            // A note that cannot be read is no PVH note, and harms nobody.
            if let Ok(Some(mut notes)) = entry.notes(endian, file) {
                while let Ok(Some(note)) = notes.next() {
                    let is_pvh = note.name() == PVH_OWNER && note.n_type(endian) == PVH_TYPE;
                    image.pvh |= is_pvh && header.is_class_64();
                }
            }
            let size: u64 = entry.p_memsz(endian).into();
            if entry.p_type(endian) != PT_LOAD || size == 0 {
                continue;
            }
            if entry.p_filesz(endian).into() > size {
                return Err(ElfError::Shrunk);
            }
            image.segments.push(Segment {
                virtual_address: entry.p_vaddr(endian).into(),
                physical_address: entry.p_paddr(endian).into(),
                data: entry.data(endian, file).map_err(|()| ElfError::Cut)?,
                size,
            });
        }
        Ok(image)
    }

    /// The entry point's physical address: kernels may be linked for addresses that only their own
    /// page tables make. One outside of all segments is taken as it is.
    pub(super) fn physical_entry(&self) -> u64 {
        self.segments
            .iter()
            .find_map(|segment| {
                let offset = self.entry.checked_sub(segment.virtual_address)?;
                (offset < segment.size).then(|| segment.physical_address.checked_add(offset))?
            })
            .unwrap_or(self.entry)
    }
}

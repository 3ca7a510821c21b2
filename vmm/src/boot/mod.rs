//! Putting a kernel, its command line and its initial RAM disk into guest memory.
//!
//! The kernel's format is told by its content. The first of these that fits is taken, so that a Linux
//! kernel which another loader would start by multiboot is started as Linux wants it:
//!
//! 1. An ELF file with a PVH note is entered in 32-bit mode with an `hvm_start_info` (Xen's x86/HVM
//!    direct boot ABI).
//! 2. A bzImage is entered in 64-bit mode with `boot_params` (Linux Documentation/arch/x86/boot.rst,
//!    "64-bit boot protocol").
//! 3. An ELF file, or any file with address fields, that has a multiboot header is entered in 32-bit
//!    mode with the multiboot information (Multiboot Specification 0.6.96).

mod bzimage;
mod elf;
pub mod firmware;
mod multiboot;
mod pvh;
mod reset_vector;

use std::fs::File;
use std::io::{self, Read, Seek, SeekFrom};
use std::path::{Path, PathBuf};

use iommu::GuestRam;
use linux_loader::cmdline::Cmdline;
use linux_loader::loader::load_cmdline;
use vm_memory::{Bytes, GuestAddress};

use crate::layout;
use crate::memory;

pub use elf::ElfError;
pub use multiboot::LOADER_MAGIC as MULTIBOOT_MAGIC;

/// What to boot.
#[derive(Clone, Copy, Debug)]
pub struct BootFiles<'a> {
    /// bzImage, ELF with a PVH note, or multiboot.
    pub kernel: &'a Path,
    /// Initial RAM disk.
    pub initrd: Option<&'a Path>,
    /// Kernel command line.
    pub cmdline: &'a str,
}

/// How the boot processor enters the kernel.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Entry {
    /// 64-bit mode; RSI holds the address of `boot_params`.
    Linux64 {
        /// Entry point.
        rip: u64,
    },
    /// 32-bit protected mode without paging; EBX holds the address of `hvm_start_info`.
    Pvh {
        /// Entry point.
        eip: u64,
    },
    /// 32-bit protected mode without paging; EAX holds [`MULTIBOOT_MAGIC`] and EBX the address of
    /// the multiboot information. Such kernels take it that a firmware has set up PCI.
    Multiboot {
        /// Entry point.
        eip: u32,
    },
}

/// Why nothing could be booted.
#[derive(Debug, thiserror::Error)]
pub enum BootError {
    /// A file that cannot be opened or read.
    #[error("{}: {}", .0.display(), .1)]
    Read(PathBuf, io::Error),
    /// The file is something else.
    #[error(
        "{}: not a kernel: it is neither a bzImage nor an ELF file and has no multiboot header{}",
        .0.display(), .1
    )]
    NotAKernel(PathBuf, &'static str),
    /// A kernel that this machine cannot start.
    #[error("{}: {}", .0.display(), .1)]
    Unsupported(PathBuf, &'static str),
    /// A multiboot kernel whose ELF headers are damaged or for another machine.
    #[error("{}: {}", .0.display(), .1)]
    Elf(PathBuf, ElfError),
    /// A kernel that is damaged.
    #[error("{}: {}", .0.display(), .1)]
    Load(PathBuf, linux_loader::loader::Error),
    /// The memory is too small.
    #[error(
        "{}: needs {needed} MiB of guest memory below address {limit:#x}, and the guest has {present} MiB there",
        file.display()
    )]
    TooLarge {
        /// The kernel or the initrd.
        file: PathBuf,
        /// MiB.
        needed: u64,
        /// Upper bound of where it may lie.
        limit: u64,
        /// MiB.
        present: u64,
    },
    /// The command line is too long or holds bytes that no kernel takes.
    #[error("kernel command line: {0}")]
    CommandLine(String),
    /// Guest memory ends before the boot data; the memory is far too small.
    #[error("guest memory is too small to boot anything")]
    Memory,
}

/// Loads everything and writes the boot parameters. `memory` is the size of RAM in bytes and `rsdp`
/// the address of the ACPI root pointer.
///
/// # Errors
///
/// See [`BootError`]; the text names the file.
pub fn load(
    ram: &GuestRam,
    memory: u64,
    files: &BootFiles<'_>,
    rsdp: u64,
) -> Result<Entry, BootError> {
    let path = files.kernel;
    let mut kernel = File::open(path).map_err(|e| BootError::Read(path.to_owned(), e))?;
    reset_vector::write(ram).map_err(|_| BootError::Memory)?;
    match format(&mut kernel, path)? {
        Format::Pvh => pvh::load(ram, memory, files, &mut kernel, rsdp),
        Format::BzImage => bzimage::load(ram, memory, files, &mut kernel, rsdp),
        Format::Multiboot { header, file } => multiboot::load(ram, memory, files, &file, &header),
    }
}

/// Whether [`load`] would start this kernel by multiboot, which means that it is not Linux. A file
/// that cannot be read is none.
pub fn is_multiboot(kernel: &Path) -> bool {
    File::open(kernel).is_ok_and(|mut file| {
        matches!(
            format(&mut file, kernel),
            Ok(Format::Multiboot { .. }) | Err(BootError::Elf(..))
        )
    })
}

enum Format {
    BzImage,
    Pvh,
    Multiboot {
        header: multiboot::Header,
        /// All of it.
        file: Vec<u8>,
    },
}

/// Tells the kernel's format; leaves the file at its start.
fn format(kernel: &mut File, path: &Path) -> Result<Format, BootError> {
    let read = |e| BootError::Read(path.to_owned(), e);
    let mut head = Vec::new();
    let limit = u64::try_from(multiboot::HEADER_SEARCH).unwrap_or(u64::MAX);
    kernel.take(limit).read_to_end(&mut head).map_err(read)?;
    let is_elf = head.starts_with(b"\x7fELF");
    let multiboot = multiboot::Header::find(&head);
    let format = if is_elf && multiboot.is_none() {
        Format::Pvh
    } else if !is_elf && head.get(0x202..0x206) == Some(b"HdrS") {
        Format::BzImage
    } else if let Some(header) = multiboot.filter(|header| is_elf || header.stands_alone()) {
        let file = multiboot::read(kernel, path)?;
        // A file with address fields need not be proper ELF.
        match elf::Image::parse(&file) {
            Ok(elf) if elf.pvh => Format::Pvh,
            Err(error) if !header.stands_alone() => {
                return Err(BootError::Elf(path.to_owned(), error));
            }
            _ => Format::Multiboot { header, file },
        }
    } else {
        return Err(BootError::NotAKernel(path.to_owned(), guess(&head)));
    };
    kernel.seek(SeekFrom::Start(0)).map_err(read)?;
    Ok(format)
}

/// A hint on what a file is that is not a kernel.
fn guess(head: &[u8]) -> &'static str {
    if head.is_empty() {
        " (the file is empty)"
    } else if head.starts_with(b"\x1f\x8b") {
        " (it is gzip-compressed; is it an initrd?)"
    } else if head.starts_with(b"\x28\xb5\x2f\xfd") {
        " (it is zstd-compressed; is it an initrd?)"
    } else if head.starts_with(b"070701") {
        " (it is a cpio archive; is it an initrd?)"
    } else if head.starts_with(b"MZ") {
        " (it is an EFI program without a Linux header)"
    } else if head.get(0x1fe..0x200) == Some(b"\x55\xaa") {
        " (it is a boot sector or a disk image)"
    } else {
        ""
    }
}

/// Writes the command line, of at most `limit` bytes without the terminating zero.
fn write_command_line(ram: &GuestRam, text: &str, limit: u64) -> Result<(), BootError> {
    let limit = limit.min(layout::COMMAND_LINE_ROOM - 1);
    let room = usize::try_from(limit + 1).map_err(|_| BootError::Memory)?;
    let bad = text.chars().find(|c| !matches!(c, ' '..='~'));
    if let Some(bad) = bad {
        return Err(BootError::CommandLine(format!(
            "{bad:?} is not a printable ASCII character"
        )));
    }
    let line = Cmdline::try_from(text, room).map_err(|_| {
        BootError::CommandLine(format!(
            "{} bytes, and this kernel takes at most {limit}",
            text.len()
        ))
    })?;
    load_cmdline(ram, GuestAddress(layout::COMMAND_LINE), &line).map_err(|_| BootError::Memory)
}

/// Loads the initial RAM disk as high as it goes below `limit` (and the end of low RAM) but above
/// `kernel_end`. Gives its address and length.
fn load_initrd(
    ram: &GuestRam,
    memory: u64,
    path: &Path,
    kernel_end: u64,
    limit: u64,
) -> Result<(u64, u64), BootError> {
    let read = |e| BootError::Read(path.to_owned(), e);
    let mut file = File::open(path).map_err(read)?;
    let len = file.metadata().map_err(read)?.len();
    if len == 0 {
        let empty = io::Error::new(io::ErrorKind::InvalidData, "the initrd is empty");
        return Err(read(empty));
    }
    let top = limit.min(memory::regions(memory)[0].1);
    let start = top.checked_sub(len).map(|start| start & !0xfff);
    let Some(start) = start.filter(|start| *start >= kernel_end) else {
        let needed = kernel_end.saturating_add(len).div_ceil(1 << 20);
        return Err(BootError::TooLarge {
            file: path.to_owned(),
            needed,
            limit,
            present: top >> 20,
        });
    };
    let count = usize::try_from(len).map_err(|_| BootError::Memory)?;
    ram.read_exact_volatile_from(GuestAddress(start), &mut file, count)
        .map_err(|e| read(io::Error::other(e)))?;
    Ok((start, len))
}

#[cfg(test)]
#[allow(
    clippy::cast_possible_truncation,
    reason = "constants of the test's own"
)]
mod tests {
    use std::io::Write;

    use tempfile::NamedTempFile;

    use super::*;

    const MEMORY: u64 = 64 << 20;

    fn file(content: &[u8]) -> NamedTempFile {
        let mut file = NamedTempFile::new().unwrap();
        file.write_all(content).unwrap();
        file
    }

    fn boot(
        kernel: &[u8],
        initrd: Option<&[u8]>,
        cmdline: &str,
    ) -> Result<(GuestRam, Entry), String> {
        let ram = memory::allocate(MEMORY).unwrap();
        let kernel = file(kernel);
        let initrd = initrd.map(file);
        let files = BootFiles {
            kernel: kernel.path(),
            initrd: initrd.as_ref().map(|f| f.path()),
            cmdline,
        };
        load(&ram, MEMORY, &files, 0xe_0000)
            .map(|entry| (ram, entry))
            .map_err(|e| e.to_string())
    }

    /// A bzImage with one setup sector and `code` as its protected-mode part.
    fn bzimage(code: &[u8]) -> Vec<u8> {
        let mut image = vec![0; 1024];
        image[0x1f1] = 1;
        image[0x1fe..0x200].copy_from_slice(&[0x55, 0xaa]);
        image[0x202..0x206].copy_from_slice(b"HdrS");
        image[0x206..0x208].copy_from_slice(&0x20fu16.to_le_bytes());
        image[0x211] = 1; // LOADED_HIGH
        image[0x214..0x218].copy_from_slice(&0x10_0000u32.to_le_bytes());
        image[0x22c..0x230].copy_from_slice(&0x7fff_ffffu32.to_le_bytes());
        image[0x230..0x234].copy_from_slice(&0x20_0000u32.to_le_bytes());
        image[0x234] = 1; // relocatable
        image[0x236..0x238].copy_from_slice(&1u16.to_le_bytes()); // XLF_KERNEL_64
        image[0x238..0x23c].copy_from_slice(&2047u32.to_le_bytes());
        image[0x258..0x260].copy_from_slice(&0x100_0000u64.to_le_bytes());
        image[0x260..0x264].copy_from_slice(&0x40_0000u32.to_le_bytes());
        image.extend_from_slice(code);
        image
    }

    #[test]
    fn bzimage_is_placed_where_it_prefers() {
        let (ram, entry) =
            boot(&bzimage(b"kernel code"), Some(b"initrd"), "console=ttyS0").unwrap();
        assert_eq!(entry, Entry::Linux64 { rip: 0x100_0200 });
        let mut code = [0; 11];
        ram.read_slice(&mut code, GuestAddress(0x100_0000)).unwrap();
        assert_eq!(&code, b"kernel code");
        let word = |at: u64| {
            ram.read_obj::<u32>(GuestAddress(layout::ZERO_PAGE + at))
                .unwrap()
        };
        assert_eq!(u64::from(word(0x228)), layout::COMMAND_LINE);
        assert_eq!(word(0x21c), 6);
        let initrd = u64::from(word(0x218));
        assert_eq!(initrd, MEMORY - 0x1000);
        let mut data = [0; 6];
        ram.read_slice(&mut data, GuestAddress(initrd)).unwrap();
        assert_eq!(&data, b"initrd");
        assert_eq!(word(0x70), 0xe_0000, "ACPI root pointer");
        let mut line = [0; 14];
        ram.read_slice(&mut line, GuestAddress(layout::COMMAND_LINE))
            .unwrap();
        assert_eq!(&line, b"console=ttyS0\0");
        assert_eq!(word(0x1e8) & 0xff, 4, "memory map entries");
    }

    #[test]
    fn wrong_files_are_named_with_a_hint() {
        for (content, hint) in [
            (&b""[..], "the file is empty"),
            (&b"\x1f\x8b\x08 something"[..], "gzip"),
            (&b"#!/bin/sh\n"[..], "neither a bzImage nor an ELF"),
        ] {
            let error = boot(content, None, "").unwrap_err();
            assert!(error.contains(hint) && error.contains('/'), "{error}");
        }
        let files = BootFiles {
            kernel: Path::new("/nonexistent/vmlinuz"),
            initrd: None,
            cmdline: "",
        };
        let ram = memory::allocate(MEMORY).unwrap();
        let error = load(&ram, MEMORY, &files, 0).unwrap_err().to_string();
        assert!(error.starts_with("/nonexistent/vmlinuz: "), "{error}");
    }

    #[test]
    fn kernels_that_cannot_be_started_say_why() {
        let mut old = bzimage(b"x");
        old[0x236] = 0;
        assert!(boot(&old, None, "").unwrap_err().contains("64-bit"));
        let mut huge = bzimage(b"x");
        huge[0x260..0x264].copy_from_slice(&0x7000_0000u32.to_le_bytes());
        assert!(boot(&huge, None, "").unwrap_err().contains("MiB"));
        let mut cut = bzimage(b"x");
        cut.truncate(0x300);
        boot(&cut, None, "").unwrap_err();
        boot(b"\x7fELF", None, "").unwrap_err();
    }

    #[test]
    fn command_line_limits_are_the_kernels() {
        let kernel = bzimage(b"x");
        boot(&kernel, None, &"a".repeat(2047)).unwrap();
        let error = boot(&kernel, None, &"a".repeat(2048)).unwrap_err();
        assert!(error.contains("2047"), "{error}");
        let error = boot(&kernel, None, "a\nb").unwrap_err();
        assert!(error.contains("printable"), "{error}");
    }

    #[test]
    fn initrd_that_does_not_fit_is_refused() {
        let error = boot(&bzimage(b"x"), Some(&vec![1; 48 << 20]), "").unwrap_err();
        assert!(error.contains("MiB"), "{error}");
        boot(&bzimage(b"x"), Some(b""), "").unwrap_err();
    }

    /// An ELF file with one loaded segment and, if wanted, a PVH note.
    fn elf(entry: Option<u32>) -> Vec<u8> {
        let mut image = vec![0; 64 + 2 * 56];
        image[..8].copy_from_slice(b"\x7fELF\x02\x01\x01\0");
        image[16..18].copy_from_slice(&2u16.to_le_bytes());
        image[18..20].copy_from_slice(&62u16.to_le_bytes());
        image[32..40].copy_from_slice(&64u64.to_le_bytes());
        image[54..56].copy_from_slice(&56u16.to_le_bytes());
        image[56..58].copy_from_slice(&2u16.to_le_bytes());
        let mut header = |index: usize, kind: u32, offset: u64, address: u64, size: u64| {
            let at = 64 + 56 * index;
            image[at..at + 4].copy_from_slice(&kind.to_le_bytes());
            image[at + 8..at + 16].copy_from_slice(&offset.to_le_bytes());
            image[at + 24..at + 32].copy_from_slice(&address.to_le_bytes());
            image[at + 32..at + 40].copy_from_slice(&size.to_le_bytes());
            image[at + 40..at + 48].copy_from_slice(&size.to_le_bytes());
        };
        header(0, 1, 176, 0x20_0000, 4);
        header(1, 4, 180, 0, 20);
        image.extend_from_slice(b"code");
        let kind = if entry.is_some() { 18u32 } else { 1 };
        for word in [4, 4, kind] {
            image.extend_from_slice(&word.to_le_bytes());
        }
        image.extend_from_slice(b"Xen\0");
        image.extend_from_slice(&entry.unwrap_or(0).to_le_bytes());
        image
    }

    #[test]
    fn elf_is_entered_through_its_pvh_note() {
        let (ram, entry) = boot(&elf(Some(0x20_0004)), Some(b"initrd"), "quiet").unwrap();
        assert_eq!(entry, Entry::Pvh { eip: 0x20_0004 });
        let word = |at: u64| {
            ram.read_obj::<u64>(GuestAddress(layout::PVH_START_INFO + at))
                .unwrap()
        };
        assert_eq!(word(0) as u32, 0x336e_c578);
        assert_eq!(word(24), layout::COMMAND_LINE);
        assert_eq!(word(32), 0xe_0000, "ACPI root pointer");
        let module: u64 = ram.read_obj(GuestAddress(word(16))).unwrap();
        assert_eq!(module, MEMORY - 0x1000);
        let error = boot(&elf(None), None, "").unwrap_err();
        assert!(error.contains("PVH"), "{error}");
    }
}

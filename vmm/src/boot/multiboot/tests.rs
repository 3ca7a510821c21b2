#![allow(
    clippy::cast_possible_truncation,
    reason = "constants of the test's own"
)]

use std::io::Write;

use proptest::prelude::*;
use tempfile::{NamedTempFile, TempDir};

use super::*;
use crate::boot::{self, is_multiboot};

const MEMORY: u64 = 64 << 20;

fn header(flags: u32) -> [u32; 3] {
    [
        HEADER_MAGIC,
        flags,
        0u32.wrapping_sub(HEADER_MAGIC.wrapping_add(flags)),
    ]
}

fn bytes(words: &[u32]) -> Vec<u8> {
    words.iter().flat_map(|word| word.to_le_bytes()).collect()
}

struct Segment {
    kind: u32,
    offset: u32,
    virtual_address: u32,
    address: u32,
    file: u32,
    memory: u32,
}

fn segment(offset: u32, address: u32, file: u32, memory: u32) -> Segment {
    Segment {
        kind: 1,
        offset,
        virtual_address: address,
        address,
        file,
        memory,
    }
}

/// An ELF file with those segments, 32 or 64 bits wide, and `body` from offset 0x1000 on.
fn elf(class_64: bool, entry: u32, segments: &[Segment], body: &[u8]) -> Vec<u8> {
    let mut file = b"\x7fELF".to_vec();
    let mut put = |width: usize, value: u32| {
        file.extend_from_slice(&u64::from(value).to_le_bytes()[..width]);
    };
    let word = if class_64 { 8 } else { 4 };
    for ident in [u32::from(class_64) + 1, 1, 1] {
        put(1, ident);
    }
    for _ in 0..9 {
        put(1, 0);
    }
    put(2, 2); // ET_EXEC
    put(2, if class_64 { 62 } else { 3 });
    put(4, 1);
    put(word, entry);
    put(word, if class_64 { 64 } else { 52 });
    put(word, 0);
    put(4, 0);
    put(2, if class_64 { 64 } else { 52 });
    put(2, if class_64 { 56 } else { 32 });
    put(2, segments.len() as u32);
    for value in [if class_64 { 64 } else { 40 }, 0, 0] {
        put(2, value);
    }
    for s in segments {
        put(4, s.kind);
        if class_64 {
            put(4, 7);
        }
        for value in [s.offset, s.virtual_address, s.address, s.file, s.memory] {
            put(word, value);
        }
        if !class_64 {
            put(4, 7);
        }
        put(word, if s.kind == 1 { 0x1000 } else { 4 });
    }
    file.resize(0x1000, 0);
    file.extend_from_slice(body);
    file
}

/// A small kernel at 4 MiB, entered at its twelfth byte.
fn kernel(class_64: bool) -> Vec<u8> {
    let mut body = bytes(&header(HEADER_MEMORY_INFO));
    body.extend_from_slice(b"code");
    elf(
        class_64,
        0x40_000c,
        &[segment(0x1000, 0x40_0000, 16, 0x3000)],
        &body,
    )
}

struct Booted {
    ram: GuestRam,
    entry: Entry,
}

impl Booted {
    fn words<const N: usize>(&self, at: u64) -> [u32; N] {
        std::array::from_fn(|i| self.ram.read_obj(GuestAddress(at + 4 * i as u64)).unwrap())
    }

    fn text(&self, at: u32) -> String {
        let mut at = u64::from(at);
        let mut text = Vec::new();
        loop {
            match self.ram.read_obj::<u8>(GuestAddress(at)).unwrap() {
                0 => return String::from_utf8(text).unwrap(),
                byte => text.push(byte),
            }
            at += 1;
        }
    }
}

fn start(image: &[u8], initrd: Option<&[u8]>, cmdline: &str) -> Result<Booted, String> {
    let folder = TempDir::new().unwrap();
    let path = folder.path().join("a kernel.elf");
    std::fs::write(&path, image).unwrap();
    let module = folder.path().join("module");
    if let Some(initrd) = initrd {
        std::fs::write(&module, initrd).unwrap();
    }
    let ram = memory::allocate(MEMORY).unwrap();
    let files = BootFiles {
        kernel: &path,
        initrd: initrd.map(|_| module.as_path()),
        cmdline,
    };
    match boot::load(&ram, MEMORY, &files, 0xe_0000) {
        Ok(entry) => Ok(Booted { ram, entry }),
        Err(error) => {
            let text = error.to_string();
            assert!(!text.contains('\n'), "{text}");
            Err(text)
        }
    }
}

#[test]
fn elf_of_both_classes_is_loaded_and_told_everything() {
    for class_64 in [false, true] {
        let booted = start(&kernel(class_64), Some(b"module!"), "one two").unwrap();
        assert_eq!(booted.entry, Entry::Multiboot { eip: 0x40_000c });
        assert_eq!(booted.words(0x40_000c), [u32::from_le_bytes(*b"code")]);
        let info: [u32; 17] = booted.words(layout::MULTIBOOT_INFO);
        assert_eq!(info[0], 0x24d, "flags");
        assert_eq!((info[1], info[2]), (639, 63 << 10), "memory in KiB");
        assert_eq!(booted.text(info[4]), "a_kernel.elf one two");
        assert_eq!(booted.text(info[16]), "Ringside");
        assert_eq!(info[5], 1);
        let [start, end, string, _] = booted.words(info[6].into());
        assert_eq!(end - start, 7);
        assert_eq!(booted.words(start.into()), [u32::from_le_bytes(*b"modu")]);
        assert_eq!(booted.text(string), "module");
        // The memory map: entries with their own size, and all RAM above 1 MiB in one.
        let (mut at, map_end) = (info[12], info[12] + info[11]);
        let mut high = Vec::new();
        while at < map_end {
            let [size, base, _, length, _, kind] = booted.words(at.into());
            if kind == 1 && base >= 0x10_0000 {
                high.push((base, length));
            }
            at += size + 4;
        }
        assert_eq!((at, high), (map_end, vec![(0x10_0000, 63 << 20)]));
    }
}

#[test]
fn without_an_initrd_there_is_no_module() {
    let booted = start(&kernel(false), None, "").unwrap();
    let info: [u32; 17] = booted.words(layout::MULTIBOOT_INFO);
    assert_eq!(info[5], 0);
    assert_eq!(booted.text(info[4]), "a_kernel.elf");
}

#[test]
fn the_entry_is_translated_like_its_segment() {
    let mut body = bytes(&header(0));
    body.extend_from_slice(b"code");
    let mut high = segment(0x1000, 0x20_0000, 16, 16);
    high.virtual_address = 0xc020_0000;
    let booted = start(&elf(false, 0xc020_000c, &[high], &body), None, "").unwrap();
    assert_eq!(booted.entry, Entry::Multiboot { eip: 0x20_000c });
}

/// A file without ELF headers, with its multiboot header at offset 8.
fn flat_file(fields: [u32; 5]) -> Vec<u8> {
    let mut file = vec![0x90; 8];
    file.extend(bytes(&header(HEADER_ADDRESSES)));
    file.extend(bytes(&fields));
    file.extend_from_slice(b"the code");
    file
}

#[test]
fn address_fields_load_any_file() {
    // Loaded from offset 4 on, to the end of the file, with some room behind.
    let file = flat_file([0x10_0004, 0x10_0000, 0, 0x10_1000, 0x10_0024]);
    let booted = start(&file, None, "").unwrap();
    assert_eq!(booted.entry, Entry::Multiboot { eip: 0x10_0024 });
    assert_eq!(booted.words(0x10_0004), header(HEADER_ADDRESSES));
    assert_eq!(booted.words(0x10_0024), [u32::from_le_bytes(*b"the ")]);
    // They go before ELF headers, of whatever quality.
    let mut file = b"\x7fELF\x01\x01\x01\0".to_vec();
    file.extend(&flat_file([0x10_0008, 0x10_0000, 0x10_0008 + 32, 0, 0x10_0000])[8..]);
    let booted = start(&file, None, "").unwrap();
    assert_eq!(booted.entry, Entry::Multiboot { eip: 0x10_0000 });
    assert_eq!(booted.words(0x10_0008 + 32), [0], "load_end_addr ends it");
}

#[test]
fn address_fields_that_lie_are_refused() {
    for fields in [
        [0x10_0000, 0x10_0004, 0, 0, 0x10_0004], // load_addr above header_addr
        [0x20_0000, 0x10_0000, 0, 0, 0x10_0004], // starts before the file
        [0x10_0004, 0x10_0000, 0x10_4000, 0, 0x10_0024], // ends behind the file
        [0x10_0004, 0x10_0000, 0xf_ffff, 0, 0x10_0024], // ends before it starts
        [0x10_0004, 0x10_0000, 0, 0x10_0008, 0x10_0024], // bss ends inside the data
        [0x10_0004, 0x10_0000, 0, 0, 0x20_0000], // entry elsewhere
        [0x8004, 0x8000, 0, 0, 0x8024],          // below 1 MiB
        [0x10_0004, 0x10_0000, 0, 0xffff_ffff, 0x10_0024], // more than there is
    ] {
        start(&flat_file(fields), None, "")
            .map(|b| b.entry)
            .unwrap_err();
    }
}

#[test]
fn pvh_goes_before_multiboot() {
    // A note with a PVH entry makes the same file Linux-like.
    let mut body = bytes(&header(0));
    body.extend(bytes(&[4, 4, 18]));
    body.extend_from_slice(b"Xen\0");
    body.extend(bytes(&[0x40_000c]));
    let note = Segment {
        kind: 4,
        ..segment(0x100c, 0, 20, 20)
    };
    let segments = [segment(0x1000, 0x40_0000, 32, 32), note];
    let booted = start(&elf(true, 0x40_0000, &segments, &body), None, "").unwrap();
    assert_eq!(booted.entry, Entry::Pvh { eip: 0x40_000c });
    // PVH kernels are 64-bit files here.
    let booted = start(&elf(false, 0x40_0000, &segments, &body), None, "").unwrap();
    assert_eq!(booted.entry, Entry::Multiboot { eip: 0x40_0000 });
}

#[test]
fn headers_that_are_none_are_passed_over() {
    assert_eq!(Header::find(&[]), None);
    let good = bytes(&header(0));
    let at = |offset: usize| {
        let mut file = vec![0; offset];
        file.extend(&good);
        Header::find(&file).map(|header| header.offset)
    };
    assert_eq!(at(0), Some(0));
    assert_eq!(at(8180), Some(8180), "the last place");
    assert_eq!(at(8184), None, "not whole in the first 8 KiB");
    assert_eq!(at(2), None, "not aligned");
    let mut wrong = good.clone();
    wrong[8] ^= 1;
    assert_eq!(Header::find(&wrong), None, "checksum");
    // One that only looks like it in front of the real one.
    wrong.extend(&good);
    assert_eq!(Header::find(&wrong).unwrap().offset, 12);
    assert_eq!(Header::find(&bytes(&header(HEADER_ADDRESSES))), None, "cut");
}

#[test]
fn kernels_that_cannot_be_started_say_why() {
    let body = bytes(&header(0));
    let error = |entry, segments: &[Segment]| {
        start(&elf(false, entry, segments, &body), None, "")
            .map(|b| b.entry)
            .unwrap_err()
    };
    let ok = || segment(0x1000, 0x40_0000, 12, 12);
    for (entry, segments, why) in [
        (0, vec![], "no segment"),
        (0x50_0000, vec![ok()], "entry point"),
        (0x8000, vec![segment(0x1000, 0x8000, 12, 12)], "below 1 MiB"),
        (
            0x40_0000,
            vec![ok(), segment(0x1000, 0x40_0008, 12, 12)],
            "over each other",
        ),
        (
            0x40_0000,
            vec![segment(0x1000, 0x40_0000, 13, 13)],
            "cut short",
        ),
        (
            0x40_0000,
            vec![segment(0x1000, 0x40_0000, 12, 11)],
            "more bytes in the file",
        ),
        (
            0x40_0000,
            vec![ok(), segment(0x1000, 0xffff_f000, 12, 0xffff_ffff)],
            "MiB",
        ),
        (
            0x40_0000,
            vec![segment(0x1000, 0x40_0000, 12, 0x1000_0000)],
            "MiB",
        ),
        (0x40_0000, (0..100).map(|_| ok()).collect(), "segments"),
    ] {
        let error = error(entry, &segments);
        assert!(
            error.contains(why) && error.starts_with('/'),
            "{why}: {error}"
        );
    }
    let mut arm = kernel(false);
    arm[18] = 40;
    assert!(
        start(&arm, None, "")
            .map(|b| b.entry)
            .unwrap_err()
            .contains("processor")
    );
    let video = elf(false, 0x40_0000, &[ok()], &bytes(&header(4)));
    assert!(
        start(&video, None, "")
            .map(|b| b.entry)
            .unwrap_err()
            .contains("video")
    );
    let line = "x".repeat(1 << 16);
    assert!(
        start(&kernel(false), None, &line)
            .map(|b| b.entry)
            .unwrap_err()
            .contains("command line")
    );
    let module = vec![1; 61 << 20];
    assert!(
        start(&kernel(false), Some(&module), "")
            .map(|b| b.entry)
            .unwrap_err()
            .contains("MiB")
    );
}

#[test]
fn multiboot_is_told_from_linux() {
    let is = |content: &[u8]| {
        let mut file = NamedTempFile::new().unwrap();
        file.write_all(content).unwrap();
        is_multiboot(file.path())
    };
    assert!(is(&kernel(false)) && is(&kernel(true)));
    assert!(!is(b"\x7fELF") && !is(b"") && !is_multiboot(Path::new("/nonexistent")));
}

/// Where something was loaded, it is inside RAM and above what the machine itself put there.
fn check(image: &[u8]) {
    if let Ok(booted) = start(image, None, "")
        && let Entry::Multiboot { eip } = booted.entry
    {
        assert!(u64::from(eip) >= layout::HIGH_MEMORY && u64::from(eip) < MEMORY);
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(300))]

    #[test]
    fn damaged_files_are_refused_or_loaded(
        class_64: bool,
        damage in prop::collection::vec((0usize..160, any::<u8>()), 1..6),
        cut in 0usize..0x1020,
    ) {
        let mut image = kernel(class_64);
        for (at, value) in damage {
            image[at] = value;
        }
        check(&image);
        image.truncate(cut);
        check(&image);
    }

    #[test]
    fn any_address_fields_are_refused_or_loaded(
        fields: [u32; 5],
        near in prop::array::uniform5(0u32..0x40),
    ) {
        check(&flat_file(fields));
        check(&flat_file(near.map(|offset| 0x10_0000 + offset)));
    }

    #[test]
    fn any_bytes_are_searched_for_a_header(bytes in prop::collection::vec(any::<u8>(), 0..100)) {
        if let Some(header) = Header::find(&bytes) {
            prop_assert!(header.offset % 4 == 0);
        }
    }
}

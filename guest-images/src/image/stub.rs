//! Stand-ins for libraries that a guest does not need.
//!
//! Debian's fio is linked with the clients of Ceph, Gluster, NFS, NBD, RDMA and persistent memory,
//! which with all that they need are 40 to 70 MB of libraries. The program cannot start without
//! them (it is bound at start), but on a machine that has none of these services it never calls
//! them. A stand-in has the library's name and the functions that the program asks for; each of
//! them says that it is not there and ends the process.
//!
//! Format: System V ABI (gABI 4.1 chapter 5, AMD64 supplement) and, for versions, the Linux
//! Standard Base Core 5.0 section 10.7.

use super::elf::Symbol;

const PAGE: usize = 4096;
const HEADER: usize = 64;
const PROGRAM_HEADER: usize = 56;

/// Makes the library `soname` with the functions `symbols`.
pub(super) fn library(soname: &str, symbols: &[Symbol]) -> Vec<u8> {
    let mut versions: Vec<&str> = symbols
        .iter()
        .filter_map(|symbol| symbol.version.as_deref())
        .collect();
    versions.sort_unstable();
    versions.dedup();

    let mut strings = Strings(vec![0]);
    let soname_at = strings.add(soname);

    let mut image = vec![0; HEADER + 3 * PROGRAM_HEADER];
    let code_at = image.len();
    image.extend(code(&format!("{soname} is not part of this guest image\n")));
    let code_size = image.len() - code_at;

    // Symbol 0 is reserved.
    pad(&mut image);
    let symbols_at = image.len();
    image.extend([0; 24]);
    for symbol in symbols {
        put32(&mut image, strings.add(&symbol.name));
        // STB_GLOBAL, STT_FUNC; default visibility; some section, as there are none.
        image.extend([0x12, 0, 1, 0]);
        put64(&mut image, code_at);
        put64(&mut image, code_size);
    }

    let hash_at = image.len();
    put_hash_table(&mut image, symbols);

    pad(&mut image);
    let versions_at = image.len();
    put16(&mut image, 0);
    for symbol in symbols {
        let version = symbol.version.as_deref();
        let position = version.and_then(|version| versions.binary_search(&version).ok());
        put16(
            &mut image,
            position.map_or(GLOBAL_VERSION, |position| position + FIRST_VERSION),
        );
    }

    pad(&mut image);
    let definitions_at = image.len();
    let all_versions: Vec<&str> = [soname].into_iter().chain(versions).collect();
    for (position, version) in all_versions.iter().enumerate() {
        let is_last = position + 1 == all_versions.len();
        put16(&mut image, 1);
        put16(&mut image, usize::from(position == 0)); // VER_FLG_BASE
        put16(&mut image, GLOBAL_VERSION + position);
        put16(&mut image, 1);
        image.extend(hash(version).to_le_bytes());
        put32(&mut image, 20);
        put32(&mut image, if is_last { 0 } else { 28 });
        put32(&mut image, strings.add(version));
        put32(&mut image, 0);
    }

    let strings_at = image.len();
    image.extend(&strings.0);
    let read_only_size = image.len();

    image.resize(read_only_size.next_multiple_of(PAGE), 0);
    let dynamic_at = image.len();
    for (tag, value) in [
        (14, soname_at),                   // DT_SONAME
        (4, hash_at),                      // DT_HASH
        (5, strings_at),                   // DT_STRTAB
        (6, symbols_at),                   // DT_SYMTAB
        (10, strings.0.len()),             // DT_STRSZ
        (11, 24),                          // DT_SYMENT
        (0x6fff_fff0, versions_at),        // DT_VERSYM
        (0x6fff_fffc, definitions_at),     // DT_VERDEF
        (0x6fff_fffd, all_versions.len()), // DT_VERDEFNUM
        (0, 0),
    ] {
        put64(&mut image, tag);
        put64(&mut image, value);
    }
    let dynamic_size = image.len() - dynamic_at;

    let mut headers = elf_header();
    // PT_LOAD, readable and executable; PT_LOAD and PT_DYNAMIC, readable and writable (the loader
    // relocates the dynamic section in place).
    put_program_header(&mut headers, 1, 5, 0, read_only_size, PAGE);
    put_program_header(&mut headers, 1, 6, dynamic_at, dynamic_size, PAGE);
    put_program_header(&mut headers, 2, 6, dynamic_at, dynamic_size, 8);
    image.splice(..headers.len(), headers);
    image
}

/// The version index of symbols that have none, and that of the first version.
const GLOBAL_VERSION: usize = 1;
const FIRST_VERSION: usize = 2;

/// write(2, message); exit_group(1)
fn code(message: &str) -> Vec<u8> {
    let mut code = vec![0xb8, 1, 0, 0, 0]; // mov eax, SYS_write
    code.extend([0xbf, 2, 0, 0, 0]); // mov edi, 2
    code.extend([0x48, 0x8d, 0x35, 19, 0, 0, 0]); // lea rsi, [rip + 19]: the message
    code.push(0xba); // mov edx, length
    put32(&mut code, message.len());
    code.extend([0x0f, 0x05]); // syscall
    code.extend([0xb8, 231, 0, 0, 0]); // mov eax, SYS_exit_group
    code.extend([0xbf, 1, 0, 0, 0]); // mov edi, 1
    code.extend([0x0f, 0x05]); // syscall
    code.extend(message.as_bytes());
    code
}

fn elf_header() -> Vec<u8> {
    // 64 bits, little endian, version 1, System V.
    let mut header = b"\x7fELF\x02\x01\x01\0".to_vec();
    header.extend([0; 8]);
    put16(&mut header, 3); // ET_DYN
    put16(&mut header, 62); // EM_X86_64
    put32(&mut header, 1);
    put64(&mut header, 0); // no entry point
    put64(&mut header, HEADER); // program headers
    put64(&mut header, 0); // no section headers
    put32(&mut header, 0);
    put16(&mut header, HEADER);
    put16(&mut header, PROGRAM_HEADER);
    put16(&mut header, 3);
    put16(&mut header, 64);
    put16(&mut header, 0);
    put16(&mut header, 0);
    header
}

fn put_program_header(
    out: &mut Vec<u8>,
    kind: usize,
    flags: usize,
    at: usize,
    size: usize,
    alignment: usize,
) {
    put32(out, kind);
    put32(out, flags);
    for value in [at, at, at, size, size, alignment] {
        put64(out, value);
    }
}

/// One bucket with a chain through all symbols is enough for a few dozen.
fn put_hash_table(out: &mut Vec<u8>, symbols: &[Symbol]) {
    let count = symbols.len();
    put32(out, 1);
    put32(out, count + 1);
    put32(out, usize::from(count > 0));
    put32(out, 0);
    for index in 1..=count {
        put32(out, if index == count { 0 } else { index + 1 });
    }
}

/// The hash of names (gABI 4.1 chapter 5, "Hash Table").
fn hash(name: &str) -> u32 {
    name.bytes().fold(0, |hash: u32, byte| {
        let hash = (hash << 4).wrapping_add(u32::from(byte));
        let high = hash & 0xf000_0000;
        (hash ^ (high >> 24)) & !high
    })
}

/// A string table: what is added gets an offset.
struct Strings(Vec<u8>);

impl Strings {
    fn add(&mut self, text: &str) -> usize {
        let at = self.0.len();
        self.0.extend(text.as_bytes());
        self.0.push(0);
        at
    }
}

fn pad(out: &mut Vec<u8>) {
    out.resize(out.len().next_multiple_of(8), 0);
}

// Everything here is smaller than a few hundred kilobytes, so nothing is cut off.
fn put16(out: &mut Vec<u8>, value: usize) {
    out.extend(value.to_le_bytes().get(..2).unwrap_or_default());
}

fn put32(out: &mut Vec<u8>, value: usize) {
    out.extend(value.to_le_bytes().get(..4).unwrap_or_default());
}

fn put64(out: &mut Vec<u8>, value: usize) {
    out.extend(value.to_le_bytes());
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::ffi::OsStr;
    use std::fs;
    use std::os::unix::process::ExitStatusExt;
    use std::process::{Command, Output};

    fn symbol(name: &str, version: Option<&str>) -> Symbol {
        Symbol {
            name: name.into(),
            version: version.map(str::to_owned),
            undefined: false,
            is_data: false,
        }
    }

    #[test]
    fn hashes_are_the_abis() {
        // The version hashes in every program of glibc.
        assert_eq!(hash("GLIBC_2.2.5"), 0x0969_1a75);
        assert_eq!(hash(""), 0);
    }

    /// The machine's own loader takes a stand-in in place of a library that a program is bound
    /// to, checks its versions, and a call ends with the message.
    #[test]
    fn a_program_starts_with_stand_ins_and_a_call_says_so() {
        let temp = tempfile::tempdir().unwrap();
        // Preloaded, it takes the place of libc's function of the same name and version.
        let path = temp.path().join("stub.so");
        let symbols = [
            symbol("unused", None),
            symbol("getpid", None),
            symbol("getppid", Some("X_1")),
        ];
        fs::write(&path, library("libringside-test.so.1", &symbols)).unwrap();
        let run = |script: &str| -> Output {
            Command::new("/bin/bash")
                .env(OsStr::new("LD_PRELOAD"), &path)
                .env("LD_BIND_NOW", "1")
                .args(["--norc", "-c", script])
                .output()
                .unwrap()
        };
        // bash asks for its own and its parent's number when it starts.
        let output = run("true");
        assert_eq!(
            output.status.code(),
            Some(1),
            "{:?}",
            output.status.signal()
        );
        let text = String::from_utf8(output.stderr).unwrap();
        assert_eq!(
            text,
            "libringside-test.so.1 is not part of this guest image\n"
        );

        // Without functions that are called it is just there.
        fs::write(
            &path,
            library("libringside-test.so.1", &[symbol("unused", Some("X_1"))]),
        )
        .unwrap();
        let output = run("echo started");
        assert_eq!(String::from_utf8(output.stdout).unwrap(), "started\n");
        assert_eq!(String::from_utf8(output.stderr).unwrap(), "");
    }

    #[test]
    fn a_stand_in_reads_back_with_its_versions() {
        let mut symbols = vec![
            symbol("a", Some("V_2")),
            symbol("b", Some("V_1")),
            symbol("c", None),
        ];
        symbols.sort();
        let bytes = library("libx.so.1", &symbols);
        assert!(super::super::elf::Elf::parse("libx", &bytes).is_ok());
    }
}

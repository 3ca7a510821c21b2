//! Writes cpio archives of the "newc" kind, of which an initramfs is made.
//!
//! Source: Linux, Documentation/driver-api/early-userspace/buffer-format.rst. Several archives
//! after one another are one initramfs.

use std::fmt::Write;

const FOLDER: u32 = 0o040_755;
const EXECUTABLE: u32 = 0o100_755;
const CONSOLE: u32 = 0o020_600;

/// An archive that is being written.
#[derive(Debug, Default)]
pub(super) struct Cpio {
    bytes: Vec<u8>,
    entries: u32,
}

impl Cpio {
    /// Adds a folder; its parent must have been added before.
    pub(super) fn folder(&mut self, name: &str) {
        self.entry(name, FOLDER, (0, 0), &[]);
    }

    /// Adds a file that may be executed.
    pub(super) fn file(&mut self, name: &str, content: &[u8]) {
        self.entry(name, EXECUTABLE, (0, 0), content);
    }

    /// Adds the device node of the console, without which the first process has no output.
    pub(super) fn console(&mut self, name: &str) {
        self.entry(name, CONSOLE, (5, 1), &[]);
    }

    /// Ends the archive.
    pub(super) fn finish(mut self) -> Vec<u8> {
        self.entry("TRAILER!!!", 0, (0, 0), &[]);
        self.bytes
    }

    fn entry(&mut self, name: &str, mode: u32, device: (u32, u32), content: &[u8]) {
        self.entries += 1;
        let size = |bytes: usize| u32::try_from(bytes).unwrap_or(u32::MAX);
        let fields = [
            self.entries,
            mode,
            0, // uid
            0, // gid
            1, // links
            0, // time of change
            size(content.len()),
            0, // major and minor of the file system
            0,
            device.0,
            device.1,
            size(name.len() + 1),
            0, // checksum, unused in this kind
        ];
        let mut header = String::from("070701");
        for field in fields {
            // Writing to a string does not fail.
            let _ = write!(header, "{field:08x}");
        }
        self.bytes.extend_from_slice(header.as_bytes());
        self.bytes.extend_from_slice(name.as_bytes());
        self.bytes.push(0);
        self.align();
        self.bytes.extend_from_slice(content);
        self.align();
    }

    fn align(&mut self) {
        let end = self.bytes.len().next_multiple_of(4);
        self.bytes.resize(end, 0);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn entries_are_laid_out_as_the_kernel_reads_them() {
        let mut cpio = Cpio::default();
        cpio.folder("bin");
        cpio.file("bin/x", b"hello");
        let bytes = cpio.finish();
        assert_eq!(bytes.len() % 4, 0);
        let header = b"07070100000001000041ed0000000000000000000000010000000000000000\
                       000000000000000000000000000000000000000400000000bin\0";
        let header: Vec<u8> = header
            .iter()
            .copied()
            .filter(|byte| *byte != b' ')
            .collect();
        assert!(bytes.starts_with(&header));
        // 110 bytes of header and "bin\0" are padded to 116, 110 and "bin/x\0" to 116.
        assert_eq!(
            bytes.get(116 + 116..116 + 116 + 8),
            Some(&b"hello\0\0\0"[..])
        );
        assert_eq!(
            bytes.get(116 + 116 + 8..116 + 116 + 14),
            Some(&b"070701"[..])
        );
    }
}

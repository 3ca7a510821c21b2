//! Writes an initramfs: a cpio archive in the "new ASCII" format.
//!
//! Format: the Linux kernel's Documentation/driver-api/early-userspace/buffer-format.rst. The
//! archive is not compressed: where guests run slowly, decompression is most of the boot.

use std::collections::BTreeMap;
use std::io::{self, Write};

const S_IFDIR: u32 = 0o040_000;
const S_IFCHR: u32 = 0o020_000;
const S_IFREG: u32 = 0o100_000;
const S_IFLNK: u32 = 0o120_000;

/// The files of an initramfs by their paths, which are relative (`usr/bin/fio`).
///
/// Sorted paths put every folder before what is in it, as the kernel needs it, and make the
/// archive the same every time.
#[derive(Debug, Default)]
pub(crate) struct Tree(BTreeMap<String, Node>);

#[derive(Debug)]
enum Node {
    Dir { mode: u32 },
    File { mode: u32, content: Vec<u8> },
    Link { target: String },
    CharDevice { mode: u32, major: u32, minor: u32 },
}

impl Tree {
    pub(crate) fn dir(&mut self, path: &str, mode: u32) {
        self.add(path, Node::Dir { mode });
    }

    pub(crate) fn file(&mut self, path: &str, mode: u32, content: impl Into<Vec<u8>>) {
        let content = content.into();
        self.add(path, Node::File { mode, content });
    }

    pub(crate) fn link(&mut self, path: &str, target: &str) {
        let target = target.to_owned();
        self.add(path, Node::Link { target });
    }

    pub(crate) fn char_device(&mut self, path: &str, mode: u32, major: u32, minor: u32) {
        self.add(path, Node::CharDevice { mode, major, minor });
    }

    pub(crate) fn contains(&self, path: &str) -> bool {
        self.0.contains_key(path)
    }

    fn add(&mut self, path: &str, node: Node) {
        for (slash, _) in path.match_indices('/') {
            let parent = path.get(..slash).unwrap_or_default().to_owned();
            self.0.entry(parent).or_insert(Node::Dir { mode: 0o755 });
        }
        self.0.insert(path.to_owned(), node);
    }

    pub(crate) fn write(&self, out: &mut impl Write) -> io::Result<()> {
        for (number, (path, node)) in (1..).zip(&self.0) {
            let (mode, content, device) = match node {
                Node::Dir { mode } => (S_IFDIR | mode, &[][..], (0, 0)),
                Node::File { mode, content } => (S_IFREG | mode, content.as_slice(), (0, 0)),
                Node::Link { target } => (S_IFLNK | 0o777, target.as_bytes(), (0, 0)),
                Node::CharDevice { mode, major, minor } => {
                    (S_IFCHR | mode, &[][..], (*major, *minor))
                }
            };
            write_entry(out, number, path, mode, content, device)?;
        }
        write_entry(out, 0, "TRAILER!!!", 0, &[], (0, 0))
    }
}

fn write_entry(
    out: &mut impl Write,
    number: u32,
    path: &str,
    mode: u32,
    content: &[u8],
    device: (u32, u32),
) -> io::Result<()> {
    let size = u32::try_from(content.len()).map_err(io::Error::other)?;
    let name_size = u32::try_from(path.len() + 1).map_err(io::Error::other)?;
    let links = 1;
    // Number, mode, user, group, links, time, size, device, device of a node, name size, check.
    let fields = [
        number, mode, 0, 0, links, 0, size, 0, 0, device.0, device.1, name_size, 0,
    ];
    let mut header = String::from("070701");
    for field in fields {
        header.push_str(&format!("{field:08x}"));
    }
    header.push_str(path);
    header.push('\0');
    write_padded(out, header.as_bytes())?;
    write_padded(out, content)
}

/// Name and content each end at a multiple of four bytes.
fn write_padded(out: &mut impl Write, bytes: &[u8]) -> io::Result<()> {
    out.write_all(bytes)?;
    let padding = bytes.len().next_multiple_of(4) - bytes.len();
    out.write_all([0; 4].get(..padding).unwrap_or_default())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_bytes_are_those_of_the_format() {
        let mut tree = Tree::default();
        tree.file("a/b", 0o644, *b"hello");
        let mut bytes = Vec::new();
        tree.write(&mut bytes).unwrap();
        let text = String::from_utf8(bytes).unwrap();
        let expected = concat!(
            // a: directory, 2 bytes of name with its NUL.
            "070701",
            "00000001",
            "000041ed",
            "00000000",
            "00000000",
            "00000001",
            "00000000",
            "00000000",
            "00000000",
            "00000000",
            "00000000",
            "00000000",
            "00000002",
            "00000000",
            "a\0",
            // a/b: regular file of 5 bytes.
            "070701",
            "00000002",
            "000081a4",
            "00000000",
            "00000000",
            "00000001",
            "00000000",
            "00000005",
            "00000000",
            "00000000",
            "00000000",
            "00000000",
            "00000004",
            "00000000",
            "a/b\0\0\0",
            "hello\0\0\0",
            "070701",
            "00000000",
            "00000000",
            "00000000",
            "00000000",
            "00000001",
            "00000000",
            "00000000",
            "00000000",
            "00000000",
            "00000000",
            "00000000",
            "0000000b",
            "00000000",
            "TRAILER!!!\0\0\0\0",
        );
        assert_eq!(text, expected);
    }

    #[test]
    fn parents_come_first_and_keep_their_modes() {
        let mut tree = Tree::default();
        tree.dir("tmp", 0o1777);
        tree.link("tmp/x/y", "../z");
        tree.char_device("dev/console", 0o600, 5, 1);
        let paths: Vec<&str> = tree.0.keys().map(String::as_str).collect();
        assert_eq!(paths, ["dev", "dev/console", "tmp", "tmp/x", "tmp/x/y"]);
        assert!(matches!(tree.0["tmp"], Node::Dir { mode: 0o1777 }));
        assert!(tree.contains("tmp/x") && !tree.contains("x"));
    }
}

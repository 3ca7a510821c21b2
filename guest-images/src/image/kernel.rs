//! Kernels as the distribution ships them, and the ELF file inside of a bzImage.

use std::fs;
use std::io::Read;
use std::path::{Path, PathBuf};
use std::process::Command;

use ruzstd::decoding::StreamingDecoder;

use crate::apt::{AptSuite, Deb, Freshness, run};
use crate::{Error, Progress, Result};

/// The kernel package that a suite's metapackage stands for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Flavour {
    /// For virtual machines: few drivers, NVMe built in.
    Cloud,
    /// For any machine: has KVM and 9p too.
    Generic,
}

impl Flavour {
    const fn metapackage(self) -> &'static str {
        match self {
            Self::Cloud => "linux-image-cloud-amd64",
            Self::Generic => "linux-image-amd64",
        }
    }
}

/// Fetches the newest kernel package of a suite: the image itself, not the metapackage.
///
/// # Errors
/// As [`AptSuite::fetch`].
pub fn fetch_kernel(
    suite: &AptSuite,
    flavour: Flavour,
    freshness: Freshness,
    progress: &dyn Progress,
) -> Result<Deb> {
    let one = |name: &str| {
        let debs = suite.fetch(&[name], freshness, progress)?;
        debs.into_iter()
            .next()
            .ok_or_else(|| Error::malformed(name, "was not fetched"))
    };
    let metapackage = one(flavour.metapackage())?;
    let mut command = Command::new("dpkg-deb");
    command.arg("--field").arg(&metapackage.path).arg("Depends");
    let depends = run::run("dpkg-deb", "dpkg", &mut command)?;
    let image = depends
        .split([',', '|'])
        .filter_map(|item| item.split_whitespace().next())
        .find(|name| name.starts_with("linux-image-"))
        .ok_or_else(|| Error::malformed(flavour.metapackage(), "depends on no kernel"))?;
    one(image)
}

/// The files of an unpacked kernel package.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct KernelFiles {
    /// The kernel's release, as `uname -r` prints it.
    pub release: String,
    /// The compressed kernel.
    pub bzimage: PathBuf,
    /// The folder of modules.
    pub modules: PathBuf,
}

impl KernelFiles {
    /// Finds them below `root`, where the package was unpacked.
    ///
    /// # Errors
    /// [`Error::Malformed`] when there is no kernel or no modules.
    pub fn find(root: &Path) -> Result<Self> {
        let boot = root.join("boot");
        let entries = fs::read_dir(&boot).map_err(Error::io("read", &boot))?;
        let (bzimage, release) = entries
            .flatten()
            .find_map(|entry| {
                let name = entry.file_name().into_string().ok()?;
                Some((entry.path(), name.strip_prefix("vmlinuz-")?.to_owned()))
            })
            .ok_or_else(|| Error::malformed("kernel package", "has no vmlinuz"))?;
        let modules = ["usr/lib/modules", "lib/modules"]
            .map(|dir| root.join(dir).join(&release))
            .into_iter()
            .find(|dir| dir.is_dir())
            .ok_or_else(|| Error::malformed("kernel package", "has no modules"))?;
        Ok(Self {
            release,
            bzimage,
            modules,
        })
    }
}

/// Takes the ELF file out of a bzImage. It is what a PVH loader boots, without the time that the
/// guest would spend on decompression.
///
/// # Errors
/// [`Error::Malformed`] when it is not a bzImage or compressed in a way that Debian does not use.
pub fn extract_vmlinux(bzimage: &[u8]) -> Result<Vec<u8>> {
    let malformed = |problem: &str| Error::malformed("kernel image", problem);
    let payload = payload(bzimage).ok_or_else(|| malformed("is not a bzImage"))?;
    // The build appends the length of what is inside.
    let (payload, length) = payload
        .split_last_chunk()
        .ok_or_else(|| malformed("is cut off"))?;
    let length = usize::try_from(u32::from_le_bytes(*length)).unwrap_or(usize::MAX);
    if length > MAX_KERNEL {
        return Err(malformed("announces an impossible size"));
    }
    let vmlinux = if let Some(blocks) = payload.strip_prefix(&LZ4_LEGACY_MAGIC) {
        unpack_lz4(blocks, length).ok_or_else(|| malformed("has a broken LZ4 payload"))?
    } else if payload.starts_with(&ZSTD_MAGIC) {
        let mut vmlinux = Vec::with_capacity(length);
        let limit = u64::try_from(length).unwrap_or(u64::MAX);
        StreamingDecoder::new(payload)
            .map_err(|error| malformed(&format!("has a broken zstd payload: {error}")))?
            .take(limit)
            .read_to_end(&mut vmlinux)
            .map_err(|error| malformed(&format!("has a broken zstd payload: {error}")))?;
        vmlinux
    } else {
        return Err(malformed("is neither LZ4 nor zstd compressed"));
    };
    if vmlinux.len() != length || !vmlinux.starts_with(b"\x7fELF") {
        return Err(malformed("has no ELF file of the announced size inside"));
    }
    Ok(vmlinux)
}

/// Far above any kernel; keeps a broken file from taking all memory.
const MAX_KERNEL: usize = 1 << 30;

/// LZ4 "legacy frame", which is what the kernel's build makes (lz4_Frame_format.md).
const LZ4_LEGACY_MAGIC: [u8; 4] = 0x184c_2102_u32.to_le_bytes();
/// Each block of a legacy frame but the last holds this much.
const LZ4_BLOCK: usize = 8 << 20;
/// Zstandard frame (RFC 8878 section 3.1.1).
const ZSTD_MAGIC: [u8; 4] = 0xfd2f_b528_u32.to_le_bytes();

/// The compressed part (Documentation/arch/x86/boot.rst: setup_sects, header, payload_offset and
/// payload_length, protocol 2.08).
fn payload(bzimage: &[u8]) -> Option<&[u8]> {
    let word = |offset: usize| -> Option<usize> {
        let (bytes, _) = bzimage.get(offset..)?.split_first_chunk()?;
        usize::try_from(u32::from_le_bytes(*bytes)).ok()
    };
    if bzimage.get(0x202..0x206)? != b"HdrS" {
        return None;
    }
    let setup_sectors = match *bzimage.get(0x1f1)? {
        0 => 4,
        count => usize::from(count),
    };
    let start = ((setup_sectors + 1) * 512).checked_add(word(0x248)?)?;
    bzimage.get(start..start.checked_add(word(0x24c)?)?)
}

fn unpack_lz4(mut blocks: &[u8], length: usize) -> Option<Vec<u8>> {
    let mut vmlinux = Vec::with_capacity(length);
    let mut block = vec![0; LZ4_BLOCK];
    while let Some((size, rest)) = blocks.split_first_chunk() {
        let size = usize::try_from(u32::from_le_bytes(*size)).ok()?;
        let (compressed, rest) = rest.split_at_checked(size)?;
        let count = lz4_flex::block::decompress_into(compressed, &mut block).ok()?;
        vmlinux.extend_from_slice(block.get(..count)?);
        blocks = rest;
    }
    Some(vmlinux)
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A bzImage with nothing but the header fields that matter and a payload.
    fn bzimage(payload: &[u8]) -> Vec<u8> {
        let mut image = vec![0; 0x250];
        image[0x1f1] = 1;
        image[0x202..0x206].copy_from_slice(b"HdrS");
        image[0x248..0x24c].copy_from_slice(&16u32.to_le_bytes());
        let length = u32::try_from(payload.len()).unwrap();
        image[0x24c..0x250].copy_from_slice(&length.to_le_bytes());
        image.resize(1024 + 16, 0);
        image.extend_from_slice(payload);
        image
    }

    fn lz4_payload(content: &[u8], announced: usize) -> Vec<u8> {
        let mut payload = LZ4_LEGACY_MAGIC.to_vec();
        // One literal run: token, length in bytes of 255, literals (lz4_Block_format.md).
        for part in content.chunks(100) {
            let mut block = vec![0xf0, u8::try_from(part.len() - 15).unwrap()];
            block.extend_from_slice(part);
            payload.extend_from_slice(&u32::try_from(block.len()).unwrap().to_le_bytes());
            payload.extend_from_slice(&block);
        }
        payload.extend_from_slice(&u32::try_from(announced).unwrap().to_le_bytes());
        payload
    }

    fn elf() -> Vec<u8> {
        let mut content = b"\x7fELF".to_vec();
        content.extend((0..=255).chain(0..=39));
        content
    }

    #[test]
    fn lz4_payloads_are_unpacked() {
        let image = bzimage(&lz4_payload(&elf(), elf().len()));
        assert_eq!(extract_vmlinux(&image).unwrap(), elf());
    }

    #[test]
    fn broken_images_are_refused() {
        let good = bzimage(&lz4_payload(&elf(), elf().len()));
        let problem = |image: &[u8]| extract_vmlinux(image).unwrap_err().to_string();
        assert!(problem(b"").contains("not a bzImage"));
        assert!(problem(&good[..good.len() - 1]).contains("not a bzImage"));
        let mut other = good.clone();
        other[0x202] = b'X';
        assert!(problem(&other).contains("not a bzImage"));
        assert!(problem(&bzimage(&[1; 100])).contains("neither"));
        assert!(problem(&bzimage(&lz4_payload(&elf(), 7))).contains("announced size"));
        assert!(problem(&bzimage(&lz4_payload(&elf(), 1 << 31))).contains("impossible"));
        let mut cut = lz4_payload(&elf(), elf().len());
        cut.truncate(60);
        assert!(
            problem(&bzimage(&cut)).contains("impossible")
                || problem(&bzimage(&cut)).contains("LZ4")
        );
    }
}

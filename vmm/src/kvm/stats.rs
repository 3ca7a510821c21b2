//! KVM's binary statistics (Documentation/virt/kvm/api.rst, 4.133): counters by name, readable from
//! any thread while the VM runs.

use std::collections::BTreeMap;
use std::fs::File;
use std::io;
use std::os::fd::{AsRawFd, FromRawFd};
use std::os::unix::fs::FileExt;

use kvm_bindings::{
    KVM_STATS_TYPE_CUMULATIVE, KVM_STATS_TYPE_INSTANT, KVM_STATS_TYPE_MASK, KVM_STATS_TYPE_PEAK,
    KVMIO,
};
use vmm_sys_util::ioctl::ioctl;
use vmm_sys_util::ioctl_io_nr;

ioctl_io_nr!(KVM_GET_STATS_FD, KVMIO, 0xce);

/// Length of `kvm_stats_header`.
const HEADER: usize = 24;
/// Length of `kvm_stats_desc` without the name.
const DESCRIPTOR: usize = 16;

/// The statistics of one VM or vCPU.
pub struct KvmStats {
    file: File,
    /// Name and place of each counter.
    counters: Vec<(String, u64)>,
}

impl KvmStats {
    /// Opens the statistics of a VM or vCPU file.
    ///
    /// # Errors
    ///
    /// KVM is older than Linux 5.14, or gives data that does not parse.
    pub fn open(owner: &impl AsRawFd) -> io::Result<KvmStats> {
        let file = stats_file(owner)?;
        let mut header = [0; HEADER];
        file.read_exact_at(&mut header, 0)?;
        let name_size = word(&header, 4)?;
        let count = word(&header, 8)?;
        let descriptors = u64::from(word(&header, 16)?);
        let data = u64::from(word(&header, 20)?);
        let stride = DESCRIPTOR + usize::try_from(name_size).map_err(io::Error::other)?;
        let mut counters = Vec::new();
        let mut descriptor = vec![0; stride];
        for index in 0..u64::from(count) {
            let at = descriptors + index * u64::try_from(stride).map_err(io::Error::other)?;
            file.read_exact_at(&mut descriptor, at)?;
            let kind = word(&descriptor, 0)? & KVM_STATS_TYPE_MASK;
            let size = word(&descriptor, 4)? >> 16;
            let offset = word(&descriptor, 8)?;
            let simple = [
                KVM_STATS_TYPE_CUMULATIVE,
                KVM_STATS_TYPE_INSTANT,
                KVM_STATS_TYPE_PEAK,
            ];
            if size != 1 || !simple.contains(&kind) {
                continue; // Histograms.
            }
            let name = descriptor[DESCRIPTOR..].split(|b| *b == 0).next();
            let name = String::from_utf8_lossy(name.unwrap_or_default()).into_owned();
            counters.push((name, data + u64::from(offset)));
        }
        Ok(KvmStats { file, counters })
    }

    /// All counters now.
    ///
    /// # Errors
    ///
    /// Reading fails.
    pub fn read(&self) -> io::Result<BTreeMap<String, u64>> {
        let mut values = BTreeMap::new();
        let mut value = [0; 8];
        for (name, at) in &self.counters {
            self.file.read_exact_at(&mut value, *at)?;
            values.insert(name.clone(), u64::from_ne_bytes(value));
        }
        Ok(values)
    }
}

fn word(bytes: &[u8], at: usize) -> io::Result<u32> {
    bytes
        .get(at..)
        .and_then(|bytes| bytes.first_chunk())
        .map(|bytes| u32::from_ne_bytes(*bytes))
        .ok_or_else(|| io::Error::from(io::ErrorKind::InvalidData))
}

#[expect(unsafe_code, reason = "an ioctl that returns a new descriptor")]
fn stats_file(owner: &impl AsRawFd) -> io::Result<File> {
    // SAFETY: the request takes no argument; the result is checked.
    let fd = unsafe { ioctl(owner, KVM_GET_STATS_FD()) };
    if fd < 0 {
        return Err(io::Error::last_os_error());
    }
    // SAFETY: the kernel just opened it for us, and nobody else owns it.
    Ok(unsafe { File::from_raw_fd(fd) })
}

//! What a controller is made of.

use std::sync::Arc;

use super::namespace::Namespace;
use super::spec::NSID_BROADCAST;
use crate::block::BlockBackend;
use crate::worker::PollPolicy;

/// Most I/O queue pairs of one controller.
pub const MAX_QUEUE_PAIRS: u16 = 64;
/// Most entries of one queue.
pub const MAX_QUEUE_ENTRIES: u16 = 4096;
/// Largest MDTS exponent: 2 MiB, or 513 pages, which a single host I/O vector can hold.
pub const MAX_MDTS: u8 = 9;
/// Most namespaces of one controller.
pub const MAX_NAMESPACES: usize = 256;
/// Highest namespace id.
pub const MAX_NSID: u32 = 1024;

/// A controller.
#[derive(Clone)]
pub struct Config {
    /// Serial number: 1 to 20 printable ASCII characters.
    pub serial: String,
    /// Model number: 1 to 40 printable ASCII characters.
    pub model: String,
    /// The namespaces; ids need not be consecutive.
    pub namespaces: Vec<NamespaceConfig>,
    /// I/O queue pairs that the host may create, 1 to [`MAX_QUEUE_PAIRS`].
    pub max_queue_pairs: u16,
    /// Entries of the largest I/O queue that the host may create, 2 to [`MAX_QUEUE_ENTRIES`].
    pub queue_entries: u16,
    /// Largest transfer of one command: 2 ^ `mdts` times 4 KiB; 1 to [`MAX_MDTS`].
    pub mdts: u8,
    /// Whether the volatile write cache is on after a reset (the host's page cache then holds
    /// acknowledged writes until a flush).
    pub volatile_write_cache: bool,
    /// When I/O queue workers poll instead of sleeping.
    pub policy: PollPolicy,
}

impl Default for Config {
    /// No namespace yet, 64 queue pairs of up to 4096 entries, 1 MiB transfers, write cache on.
    fn default() -> Config {
        Config {
            serial: "ringside-0".into(),
            model: "Ringside NVMe Controller".into(),
            namespaces: Vec::new(),
            max_queue_pairs: MAX_QUEUE_PAIRS,
            queue_entries: MAX_QUEUE_ENTRIES,
            mdts: 8,
            volatile_write_cache: true,
            policy: PollPolicy::Interrupt,
        }
    }
}

/// A namespace.
#[derive(Clone)]
pub struct NamespaceConfig {
    /// Namespace id, 1 to [`MAX_NSID`].
    pub nsid: u32,
    /// Where its blocks are kept.
    pub backend: Arc<dyn BlockBackend>,
    /// Bytes of a logical block: 512 or 4096, and no less than the back end's. Capacity beyond the
    /// last whole block is not used.
    pub lba_size: u32,
}

/// A configuration that cannot be.
#[derive(Debug, thiserror::Error)]
pub enum ConfigError {
    /// A text field has the wrong length or characters.
    #[error("{name} must be 1 to {max} printable ASCII characters, not {value:?}")]
    Text {
        /// The field.
        name: &'static str,
        /// Its longest value.
        max: usize,
        /// What it was.
        value: String,
    },
    /// A number is out of range.
    #[error("{name} must be {min} to {max}, not {value}")]
    Range {
        /// The field.
        name: &'static str,
        /// Its smallest value.
        min: u64,
        /// Its largest value.
        max: u64,
        /// What it was.
        value: u64,
    },
    /// Two namespaces have the same id.
    #[error("two namespaces have the id {0}")]
    DuplicateNamespace(u32),
    /// The block size is not supported by the controller or too small for the back end.
    #[error(
        "lba_size of namespace {nsid} must be 512 or 4096 and a multiple of its back end's block of {backend}, not {value}"
    )]
    LbaSize {
        /// The namespace.
        nsid: u32,
        /// The back end's block, bytes.
        backend: u32,
        /// What it was.
        value: u32,
    },
    /// The back end does not hold a single block.
    #[error("the back end of namespace {0} is smaller than one block")]
    Empty(u32),
}

impl Config {
    /// Checks everything and opens the namespaces, in order of their ids.
    pub(super) fn validate(&self) -> Result<Vec<Namespace>, ConfigError> {
        text("serial", &self.serial, 20)?;
        text("model", &self.model, 40)?;
        let pairs = u64::from(MAX_QUEUE_PAIRS);
        range("max_queue_pairs", self.max_queue_pairs.into(), 1, pairs)?;
        let entries = u64::from(MAX_QUEUE_ENTRIES);
        range("queue_entries", self.queue_entries.into(), 2, entries)?;
        range("mdts", self.mdts.into(), 1, MAX_MDTS.into())?;
        let count = u64::try_from(self.namespaces.len()).unwrap_or(u64::MAX);
        let most = u64::try_from(MAX_NAMESPACES).unwrap_or(u64::MAX);
        range("number of namespaces", count, 0, most)?;
        let mut namespaces = Vec::with_capacity(self.namespaces.len());
        for config in &self.namespaces {
            range("nsid", config.nsid.into(), 1, MAX_NSID.into())?;
            namespaces.push(Namespace::new(&self.serial, config)?);
        }
        namespaces.sort_by_key(|namespace| namespace.nsid);
        for pair in namespaces.windows(2) {
            if pair[0].nsid == pair[1].nsid {
                return Err(ConfigError::DuplicateNamespace(pair[0].nsid));
            }
        }
        Ok(namespaces)
    }
}

const _: () = assert!(MAX_NSID < NSID_BROADCAST - 1);

fn text(name: &'static str, value: &str, max: usize) -> Result<(), ConfigError> {
    let printable = value.bytes().all(|byte| (b' '..=b'~').contains(&byte));
    if printable && (1..=max).contains(&value.len()) {
        return Ok(());
    }
    Err(ConfigError::Text {
        name,
        max,
        value: value.to_owned(),
    })
}

fn range(name: &'static str, value: u64, min: u64, max: u64) -> Result<(), ConfigError> {
    if (min..=max).contains(&value) {
        return Ok(());
    }
    Err(ConfigError::Range {
        name,
        min,
        max,
        value,
    })
}

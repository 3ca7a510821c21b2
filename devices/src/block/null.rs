//! A disk that moves no data.

use std::io;
use std::sync::Arc;

use super::immediate::{Execute, ImmediateQueue};
use super::{BlockBackend, BlockInfo, BlockQueue, BlockRequest};

/// Every request succeeds at once. Reads leave the guest's buffers as they are and writes go nowhere,
/// so what is measured on it is the path to a disk alone.
#[derive(Debug)]
pub struct NullBackend {
    info: BlockInfo,
}

impl NullBackend {
    /// A disk of `capacity` bytes, rounded down to whole blocks of 512 bytes.
    pub fn new(capacity: u64) -> Arc<NullBackend> {
        Arc::new(NullBackend {
            info: BlockInfo {
                capacity: capacity - capacity % 512,
                logical_block: 512,
                read_only: false,
                discard: true,
            },
        })
    }
}

impl BlockBackend for NullBackend {
    fn info(&self) -> BlockInfo {
        self.info
    }

    fn open_queue(self: Arc<Self>, depth: u16) -> io::Result<Box<dyn BlockQueue>> {
        Ok(Box::new(ImmediateQueue::new(self, depth)))
    }
}

impl Execute for NullBackend {
    fn execute(&self, _request: &BlockRequest) -> io::Result<()> {
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::block::suite;

    #[test]
    fn passes_the_suite() {
        suite::run(&|| NullBackend::new(suite::CAPACITY), suite::Keeps::Nothing);
        assert_eq!(NullBackend::new(1025).info().capacity, 1024);
    }
}

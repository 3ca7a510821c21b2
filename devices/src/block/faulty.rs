//! A disk that fails where a test wants it to.

use std::collections::HashMap;
use std::io;
use std::ops::Range;
use std::os::fd::RawFd;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, PoisonError};

use super::{BlockBackend, BlockCompletion, BlockInfo, BlockOp, BlockQueue, BlockRequest};

/// Which requests fail, and how.
#[derive(Clone, Debug)]
pub struct Fault {
    /// Whether it concerns an operation.
    pub matches: fn(&BlockOp) -> bool,
    /// Bytes of the disk; a request that begins in them fails. Flushes begin at 0.
    pub range: Range<u64>,
    /// The host's error number.
    pub errno: i32,
    /// How many requests fail; `None` is all.
    pub times: Option<u32>,
}

impl Fault {
    /// Every operation that begins in `range` fails with `errno`.
    pub fn any(range: Range<u64>, errno: i32) -> Fault {
        Fault {
            matches: |_| true,
            range,
            errno,
            times: None,
        }
    }
}

/// For tests of devices: passes requests on to another back end, except those that a [`Fault`]
/// names, and holds completions back on demand. Tags must be unique among the requests in flight.
pub struct FaultyBackend {
    inner: Arc<dyn BlockBackend>,
    faults: Mutex<Vec<Fault>>,
    held: AtomicBool,
}

impl FaultyBackend {
    /// Wraps `inner`; without faults at first.
    pub fn new(inner: Arc<dyn BlockBackend>) -> Arc<FaultyBackend> {
        Arc::new(FaultyBackend {
            inner,
            faults: Mutex::new(Vec::new()),
            held: AtomicBool::new(false),
        })
    }

    /// From now on requests fail so. The first fault that matches counts.
    pub fn inject(&self, fault: Fault) {
        self.faults().push(fault);
    }

    /// No more faults.
    pub fn heal(&self) {
        self.faults().clear();
    }

    /// While on, requests stay in flight: nothing can be reaped. After turning it off the device's
    /// worker must be kicked. Dropping a queue does not wait for what is held.
    pub fn hold(&self, on: bool) {
        self.held.store(on, Ordering::SeqCst);
    }

    fn faults(&self) -> std::sync::MutexGuard<'_, Vec<Fault>> {
        self.faults.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn errno(&self, op: &BlockOp) -> Option<i32> {
        let start = match *op {
            BlockOp::Flush => 0,
            BlockOp::Read { offset }
            | BlockOp::Write { offset, .. }
            | BlockOp::WriteZeroes { offset, .. }
            | BlockOp::Discard { offset, .. } => offset,
        };
        let mut faults = self.faults();
        let fault = faults.iter_mut().find(|fault| {
            fault.times != Some(0) && fault.range.contains(&start) && (fault.matches)(op)
        })?;
        if let Some(times) = &mut fault.times {
            *times -= 1;
        }
        Some(fault.errno)
    }
}

impl BlockBackend for FaultyBackend {
    fn info(&self) -> BlockInfo {
        self.inner.info()
    }

    fn open_queue(self: Arc<Self>, depth: u16) -> io::Result<Box<dyn BlockQueue>> {
        let inner = Arc::clone(&self.inner).open_queue(depth)?;
        Ok(Box::new(FaultyQueue {
            backend: self,
            inner,
            failing: HashMap::new(),
        }))
    }
}

struct FaultyQueue {
    backend: Arc<FaultyBackend>,
    inner: Box<dyn BlockQueue>,
    failing: HashMap<u64, i32>,
}

impl BlockQueue for FaultyQueue {
    /// A failing request goes to the inner back end as a flush, so that it completes in the usual
    /// way, with the descriptor readable.
    fn push(&mut self, mut request: BlockRequest) {
        if let Some(errno) = self.backend.errno(&request.op) {
            self.failing.insert(request.tag, errno);
            request.op = BlockOp::Flush;
        }
        self.inner.push(request);
    }

    fn submit(&mut self) {
        self.inner.submit();
    }

    fn reap(&mut self) -> Option<BlockCompletion> {
        if self.backend.held.load(Ordering::SeqCst) {
            return None;
        }
        let mut completion = self.inner.reap()?;
        if let Some(errno) = self.failing.remove(&completion.tag) {
            completion.result = Err(io::Error::from_raw_os_error(errno));
        }
        Some(completion)
    }

    fn in_flight(&self) -> usize {
        self.inner.in_flight()
    }

    fn fd(&self) -> Option<RawFd> {
        self.inner.fd()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::block::{MemoryBackend, suite};

    fn wrapped() -> Arc<FaultyBackend> {
        FaultyBackend::new(MemoryBackend::new(suite::CAPACITY).unwrap())
    }

    #[test]
    fn without_faults_passes_the_suite() {
        suite::run(&|| wrapped(), suite::Keeps::Data);
    }

    #[test]
    fn fails_what_it_should_and_holds() {
        let backend = wrapped();
        backend.inject(Fault {
            matches: |op| matches!(op, BlockOp::Write { .. }),
            range: 4096..8192,
            errno: libc::ENOSPC,
            times: Some(1),
        });
        let mut user = suite::User::new(backend.clone());
        let write = |offset| BlockOp::Write { offset, fua: false };
        assert!(user.write(0, &[1; 512]).is_ok());
        let error = user.write(4096, &[1; 512]).unwrap_err();
        assert_eq!(error.raw_os_error(), Some(libc::ENOSPC));
        assert!(user.write(4096, &[1; 512]).is_ok(), "only once");
        backend.hold(true);
        user.push(write(0), &[2; 512], 9);
        assert!(user.queue.reap().is_none() && user.queue.in_flight() == 1);
        backend.hold(false);
        assert_eq!(user.wait().tag, 9);
        backend.inject(Fault::any(0..u64::MAX, libc::EIO));
        assert!(user.read(0, 512).is_err() && user.op(BlockOp::Flush).is_err());
        backend.heal();
        assert!(user.read(0, 512).is_ok());
    }
}

//! A back end that tells what reached it.

use std::os::fd::RawFd;
use std::sync::{Arc, Mutex, PoisonError};

use devices::block::{BlockBackend, BlockCompletion, BlockInfo, BlockOp, BlockQueue, BlockRequest};

/// What a [`SpyBackend`] has seen.
pub type Spy = Vec<BlockOp>;

/// Passes requests on and remembers them in order.
pub struct SpyBackend {
    inner: Arc<dyn BlockBackend>,
    seen: Mutex<Spy>,
}

impl SpyBackend {
    /// Wraps `inner`.
    pub fn new(inner: Arc<dyn BlockBackend>) -> Arc<SpyBackend> {
        let seen = Mutex::default();
        Arc::new(SpyBackend { inner, seen })
    }

    /// What was pushed since the last call.
    pub fn take(&self) -> Spy {
        std::mem::take(&mut self.seen.lock().unwrap_or_else(PoisonError::into_inner))
    }
}

impl BlockBackend for SpyBackend {
    fn info(&self) -> BlockInfo {
        self.inner.info()
    }

    fn open_queue(self: Arc<Self>, depth: u16) -> std::io::Result<Box<dyn BlockQueue>> {
        let inner = Arc::clone(&self.inner).open_queue(depth)?;
        Ok(Box::new(SpyQueue { spy: self, inner }))
    }
}

struct SpyQueue {
    spy: Arc<SpyBackend>,
    inner: Box<dyn BlockQueue>,
}

impl BlockQueue for SpyQueue {
    fn push(&mut self, request: BlockRequest) {
        let mut seen = self.spy.seen.lock().unwrap_or_else(PoisonError::into_inner);
        seen.push(request.op);
        drop(seen);
        self.inner.push(request);
    }

    fn submit(&mut self) {
        self.inner.submit();
    }

    fn reap(&mut self) -> Option<BlockCompletion> {
        self.inner.reap()
    }

    fn in_flight(&self) -> usize {
        self.inner.in_flight()
    }

    fn fd(&self) -> Option<RawFd> {
        self.inner.fd()
    }
}

//! The queue of back ends whose requests end as they are pushed.

use std::collections::VecDeque;
use std::io;
use std::os::fd::RawFd;
use std::sync::Arc;

use super::{BlockBackend, BlockCompletion, BlockQueue, BlockRequest};

/// A back end that carries requests out on the caller's thread, at once.
pub(super) trait Execute: BlockBackend {
    /// Carries out a request that [`super::BlockInfo::check`] has passed.
    fn execute(&self, request: &BlockRequest) -> io::Result<()>;
}

pub(super) struct ImmediateQueue<B> {
    backend: Arc<B>,
    depth: usize,
    done: VecDeque<BlockCompletion>,
}

impl<B: Execute> ImmediateQueue<B> {
    pub(super) fn new(backend: Arc<B>, depth: u16) -> ImmediateQueue<B> {
        let depth = usize::from(depth);
        ImmediateQueue {
            backend,
            depth,
            done: VecDeque::with_capacity(depth),
        }
    }
}

impl<B: Execute> BlockQueue for ImmediateQueue<B> {
    fn push(&mut self, request: BlockRequest) {
        let result = if self.done.len() >= self.depth {
            Err(io::ErrorKind::ResourceBusy.into())
        } else {
            self.backend
                .info()
                .check(request.op, request.buffers.len())
                .and_then(|()| self.backend.execute(&request))
        };
        self.done.push_back(BlockCompletion {
            tag: request.tag,
            result,
            buffers: request.buffers,
        });
    }

    fn submit(&mut self) {}

    fn reap(&mut self) -> Option<BlockCompletion> {
        self.done.pop_front()
    }

    fn in_flight(&self) -> usize {
        self.done.len()
    }

    fn fd(&self) -> Option<RawFd> {
        None
    }
}

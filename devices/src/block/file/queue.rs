//! One worker's `io_uring` on a disk image.

use std::collections::VecDeque;
use std::io;
use std::os::fd::{AsRawFd, RawFd};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use io_uring::types::{Fixed, FsyncFlags};
use io_uring::{IoUring, opcode, squeue};
use iommu::PinnedBuffers;

use super::FileBackend;
use super::buffer::{CHUNK, Chunk, Pool};
use crate::block::{BlockBackend, BlockCompletion, BlockOp, BlockQueue, BlockRequest};

/// Most elements of one vectored call (`UIO_MAXIOV`).
const MAX_IOVECS: usize = 1024;
/// Most bytes of one call, below the kernel's `MAX_RW_COUNT` and a multiple of every block size.
const MAX_BYTES: u64 = 1 << 30;
/// Bounce buffers of one queue: 2 MiB.
const CHUNKS: usize = 16;
/// How often in a row a request that the kernel asks to try again is tried again.
const RETRIES: u32 = 1000;
/// The image, registered with the ring as its only file.
const FILE: Fixed = Fixed(0);

/// What a slot's submission entry is doing.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Stage {
    /// Moves data between the file and guest memory.
    Transfer,
    /// Moves data between the file and a bounce buffer.
    Bounce,
    /// Writes zeroes, because the file system cannot zero a range.
    ZeroFill,
    /// Punches a hole or zeroes a range.
    Allocate { mode: i32 },
    /// Makes what was written stable.
    Sync,
    /// Nothing; the outcome is known, but a completion makes the descriptor readable.
    Known,
}

/// A request in flight. While it has a submission entry, the kernel holds addresses in `buffers`
/// (or `rest`, a copy of part of its list) and in `chunk`: none of them is touched before the entry's
/// completion.
struct Slot {
    op: BlockOp,
    tag: u64,
    buffers: PinnedBuffers,
    stage: Stage,
    /// Bytes to move, and moved.
    total: u64,
    done: u64,
    retries: u32,
    rest: Vec<libc::iovec>,
    chunk: Option<Chunk>,
    known: Option<io::Error>,
}

// SAFETY: `rest` holds addresses of guest memory that `buffers` keeps mapped, and which may be used
// from any thread as `PinnedBuffers` itself may; everything else is `Send`.
#[expect(unsafe_code, reason = "raw host addresses move between threads")]
unsafe impl Send for Slot {}

pub(super) struct FileQueue {
    ring: IoUring,
    backend: Arc<FileBackend>,
    slots: Vec<Slot>,
    free: Vec<usize>,
    /// Slots that wait for a bounce buffer.
    waiting: VecDeque<usize>,
    pool: Pool,
    /// Source of zero writes; made when first needed.
    zeroes: Option<Chunk>,
    /// More than the depth: contract violations.
    refused: VecDeque<BlockCompletion>,
    /// Entries in the ring that the kernel was told of or will be, not yet completed.
    entries: usize,
    /// Entries that no call of `submit` by the user is sure to follow.
    resubmit: bool,
}

impl FileQueue {
    /// Made on one thread, used on another, perhaps dropped on a third: so the ring has no
    /// `SINGLE_ISSUER` or `DEFER_TASKRUN`. Completion work is done when the worker enters the kernel
    /// anyway (`COOP_TASKRUN`) instead of by interrupting it; a worker that only polls sees by a flag
    /// in the ring that there is some.
    pub(super) fn new(backend: Arc<FileBackend>, depth: u16) -> io::Result<FileQueue> {
        let depth = usize::from(depth.max(1));
        let entries = u32::try_from(depth.next_power_of_two()).unwrap_or(u32::MAX);
        let ring = IoUring::builder()
            .setup_coop_taskrun()
            .setup_taskrun_flag()
            .build(entries)
            .or_else(|error| match error.raw_os_error() {
                // Before Linux 5.19.
                Some(libc::EINVAL) => IoUring::new(entries),
                _ => Err(error),
            })
            .map_err(|error| match error.raw_os_error() {
                Some(libc::EPERM | libc::ENOSYS) => io::Error::new(
                    io::ErrorKind::Unsupported,
                    "the host does not let this process use io_uring (see the sysctl \
                     kernel.io_uring_disabled and the container's seccomp policy)",
                ),
                _ => error,
            })?;
        ring.submitter()
            .register_files(&[backend.file.as_raw_fd()])?;
        let pool = Pool::new(CHUNKS, backend.align.memory);
        Ok(FileQueue {
            ring,
            backend,
            slots: (0..depth).map(|_| Slot::empty()).collect(),
            free: (0..depth).rev().collect(),
            waiting: VecDeque::with_capacity(depth),
            pool,
            zeroes: None,
            refused: VecDeque::new(),
            entries: 0,
            resubmit: false,
        })
    }

    /// Puts the slot's next entry into the submission queue, or the slot in the line for a bounce
    /// buffer.
    fn issue(&mut self, index: usize) {
        let Some(entry) = self.entry(index) else {
            self.waiting.push_back(index);
            return;
        };
        let entry = entry.user_data(u64::try_from(index).unwrap_or(u64::MAX));
        // SAFETY: what the entry points to is owned by the slot (see `Slot`), by `zeroes` or by the
        // pinned guest memory, at addresses that do not change when their owners move, and none of
        // it is freed or borrowed before the entry's completion was seen: slots are not reused or
        // dropped before it, and `drop` waits for it.
        #[expect(unsafe_code, reason = "memory shared with the kernel")]
        let pushed = unsafe { self.ring.submission().push(&entry) };
        // The ring has an entry for every slot, and a slot has at most one entry in it.
        debug_assert!(pushed.is_ok());
        self.entries += 1;
    }

    /// Builds the entry; `None` if it needs a bounce buffer and there is none.
    fn entry(&mut self, index: usize) -> Option<squeue::Entry> {
        let slot = &mut self.slots[index];
        let flags = match slot.op {
            BlockOp::Write { fua: true, .. } | BlockOp::WriteZeroes { fua: true, .. } => {
                libc::RWF_DSYNC
            }
            _ => 0,
        };
        let at = slot.offset() + slot.done;
        let write = !matches!(slot.op, BlockOp::Read { .. });
        Some(match slot.stage {
            Stage::Known => opcode::Nop::new().build(),
            Stage::Sync => opcode::Fsync::new(FILE).flags(FsyncFlags::DATASYNC).build(),
            Stage::Allocate { mode } => opcode::Fallocate::new(FILE, slot.total)
                .offset(at)
                .mode(mode)
                .build(),
            Stage::Transfer => {
                let iovecs = slot.iovecs();
                match (iovecs, write) {
                    (&[one], true) => {
                        opcode::Write::new(FILE, one.iov_base.cast_const().cast(), length(&one))
                            .offset(at)
                            .rw_flags(flags)
                            .build()
                    }
                    (&[one], false) => opcode::Read::new(FILE, one.iov_base.cast(), length(&one))
                        .offset(at)
                        .build(),
                    (many, true) => opcode::Writev::new(FILE, many.as_ptr(), count(many))
                        .offset(at)
                        .rw_flags(flags)
                        .build(),
                    (many, false) => opcode::Readv::new(FILE, many.as_ptr(), count(many))
                        .offset(at)
                        .build(),
                }
            }
            Stage::Bounce => {
                if slot.chunk.is_none() {
                    slot.chunk = Some(self.pool.take()?);
                }
                let chunk = slot.chunk.as_mut()?;
                let (part, len) = piece(slot.total - slot.done);
                if write {
                    let part = &mut chunk.as_mut_slice()[..part];
                    slot.buffers.copy_out(slot.done, part);
                    opcode::Write::new(FILE, chunk.as_mut_ptr(), len)
                        .offset(at)
                        .rw_flags(flags)
                        .build()
                } else {
                    opcode::Read::new(FILE, chunk.as_mut_ptr(), len)
                        .offset(at)
                        .build()
                }
            }
            Stage::ZeroFill => {
                let align = self.backend.align.memory;
                let zeroes = self.zeroes.get_or_insert_with(|| Chunk::new(align));
                let (_, len) = piece(slot.total - slot.done);
                opcode::Write::new(FILE, zeroes.as_mut_ptr(), len)
                    .offset(at)
                    .rw_flags(flags)
                    .build()
            }
        })
    }

    /// What the completion of the slot's entry means: the request's end, or `None` if it goes on.
    fn advance(&mut self, index: usize, result: i32) -> Option<io::Result<()>> {
        let direct = self.backend.align.offset;
        let slot = &mut self.slots[index];
        let Ok(moved) = u64::try_from(result) else {
            return self.failed(index, result.wrapping_neg());
        };
        slot.retries = 0;
        match slot.stage {
            Stage::Known => return Some(slot.known.take().map_or(Ok(()), Err)),
            Stage::Sync => return Some(Ok(())),
            Stage::Allocate { .. } => {
                if !matches!(slot.op, BlockOp::WriteZeroes { fua: true, .. }) {
                    return Some(Ok(()));
                }
                slot.stage = Stage::Sync;
            }
            Stage::Transfer | Stage::Bounce | Stage::ZeroFill => {
                // A direct transfer can only go on at an aligned offset.
                let moved = moved - moved % direct;
                let read = matches!(slot.op, BlockOp::Read { .. });
                if moved == 0 {
                    // The file was cut short behind our back, or takes nothing any more.
                    return Some(Err(if read {
                        io::ErrorKind::UnexpectedEof.into()
                    } else {
                        io::ErrorKind::WriteZero.into()
                    }));
                }
                if let (Stage::Bounce, true, Some(chunk)) = (slot.stage, read, &slot.chunk) {
                    let moved = usize::try_from(moved).unwrap_or(usize::MAX).min(CHUNK);
                    slot.buffers.copy_in(slot.done, &chunk.as_slice()[..moved]);
                }
                slot.done += moved;
                if slot.done >= slot.total {
                    return Some(Ok(()));
                }
                if slot.stage == Stage::Transfer {
                    slot.advance_list();
                }
            }
        }
        self.go_on(index)
    }

    /// An entry ended with an error.
    fn failed(&mut self, index: usize, errno: i32) -> Option<io::Result<()>> {
        let slot = &mut self.slots[index];
        match (errno, slot.stage) {
            // ECANCELED: the thread that submitted it has ended, as when a worker is stopped.
            (libc::EINTR | libc::EAGAIN | libc::ECANCELED, _) if slot.retries < RETRIES => {
                slot.retries += 1;
            }
            (libc::EOPNOTSUPP, Stage::Allocate { mode }) => {
                self.backend
                    .unsupported(mode)
                    .store(true, Ordering::Relaxed);
                match slot.op {
                    // A discard is a hint.
                    BlockOp::Discard { .. } => return Some(Ok(())),
                    _ => slot.stage = Stage::ZeroFill,
                }
            }
            _ => return Some(Err(io::Error::from_raw_os_error(errno))),
        }
        self.go_on(index)
    }

    fn go_on(&mut self, index: usize) -> Option<io::Result<()>> {
        self.issue(index);
        self.resubmit = true;
        None
    }

    /// Frees the slot and hands its bounce buffer on.
    fn finish(&mut self, index: usize, result: io::Result<()>) -> BlockCompletion {
        let slot = &mut self.slots[index];
        let completion = BlockCompletion {
            tag: slot.tag,
            result,
            buffers: std::mem::take(&mut slot.buffers),
        };
        slot.rest.clear();
        if let Some(chunk) = slot.chunk.take() {
            self.pool.give(chunk);
            if let Some(next) = self.waiting.pop_front() {
                self.issue(next);
                self.resubmit = true;
            }
        }
        self.free.push(index);
        completion
    }

    /// Tells the kernel of all entries in the submission queue, and waits for `wait` completions.
    fn enter(&mut self, wait: usize) {
        loop {
            match self.ring.submit_and_wait(wait) {
                Ok(_) if self.ring.submission().is_empty() => return,
                Ok(_) => {}
                Err(error) => match error.raw_os_error() {
                    Some(libc::EINTR) => {}
                    // No memory for requests now. Completions free some, and reaping them leads
                    // back here.
                    Some(libc::EAGAIN | libc::EBUSY | libc::ENOMEM)
                        if self.entries > self.ring.submission().len() =>
                    {
                        self.resubmit = true;
                        return;
                    }
                    Some(libc::EAGAIN | libc::EBUSY | libc::ENOMEM) => std::thread::yield_now(),
                    // None is possible with a ring of our own; its requests stay in flight.
                    _ => {
                        tracing::error!("io_uring_enter failed: {error}");
                        self.resubmit = true;
                        return;
                    }
                },
            }
        }
    }

    fn next_entry(&mut self) -> Option<(usize, i32)> {
        let entry = self.ring.completion().next()?;
        self.entries -= 1;
        let index = usize::try_from(entry.user_data()).unwrap_or(usize::MAX);
        Some((index, entry.result()))
    }
}

impl BlockQueue for FileQueue {
    fn push(&mut self, request: BlockRequest) {
        let Some(index) = self.free.pop() else {
            self.refused.push_back(BlockCompletion {
                tag: request.tag,
                result: Err(io::ErrorKind::ResourceBusy.into()),
                buffers: request.buffers,
            });
            return;
        };
        let checked = self.backend.info().check(request.op, request.buffers.len());
        let slot = &mut self.slots[index];
        slot.begin(request);
        match checked {
            Ok(()) => slot.stage = self.backend.first_stage(slot),
            Err(error) => {
                slot.stage = Stage::Known;
                slot.known = Some(error);
            }
        }
        self.issue(index);
    }

    fn submit(&mut self) {
        self.resubmit = false;
        if !self.ring.submission().is_empty() {
            self.enter(0);
        }
    }

    fn reap(&mut self) -> Option<BlockCompletion> {
        if let Some(completion) = self.refused.pop_front() {
            return Some(completion);
        }
        loop {
            while let Some((index, result)) = self.next_entry() {
                if let Some(result) = self.advance(index, result) {
                    return Some(self.finish(index, result));
                }
            }
            if self.resubmit {
                self.submit();
                if !self.resubmit {
                    continue;
                }
                return None;
            }
            if self.entries == 0 || !self.ring.submission().taskrun() {
                return None;
            }
            // Completions wait for this thread to enter the kernel.
            let flags = 1; // IORING_ENTER_GETEVENTS
            // SAFETY: nothing is submitted and no argument is passed.
            #[expect(unsafe_code, reason = "io_uring_enter for pending completions")]
            let entered = unsafe { self.ring.submitter().enter::<()>(0, 0, flags, None) };
            if entered.is_err() {
                return None;
            }
        }
    }

    fn in_flight(&self) -> usize {
        self.slots.len() - self.free.len() + self.refused.len()
    }

    fn fd(&self) -> Option<RawFd> {
        Some(self.ring.as_raw_fd())
    }
}

/// The kernel must be done with the memory before it goes. Requests are not continued.
impl Drop for FileQueue {
    fn drop(&mut self) {
        while self.entries > 0 {
            self.resubmit = false;
            self.enter(1);
            if self.resubmit {
                std::thread::yield_now();
            }
            while self.next_entry().is_some() {}
        }
        // The kernel takes a closed ring apart later, and would keep the image open and locked.
        let _ = self.ring.submitter().unregister_files();
    }
}

impl Slot {
    fn empty() -> Slot {
        Slot {
            op: BlockOp::Flush,
            tag: 0,
            buffers: PinnedBuffers::new(),
            stage: Stage::Known,
            total: 0,
            done: 0,
            retries: 0,
            rest: Vec::new(),
            chunk: None,
            known: None,
        }
    }

    fn begin(&mut self, request: BlockRequest) {
        self.op = request.op;
        self.tag = request.tag;
        self.buffers = request.buffers;
        self.done = 0;
        self.retries = 0;
        self.known = None;
        self.total = match self.op {
            BlockOp::Flush => 0,
            BlockOp::Read { .. } | BlockOp::Write { .. } => self.buffers.len(),
            BlockOp::WriteZeroes { len, .. } | BlockOp::Discard { len, .. } => len,
        };
    }

    fn offset(&self) -> u64 {
        match self.op {
            BlockOp::Flush => 0,
            BlockOp::Read { offset }
            | BlockOp::Write { offset, .. }
            | BlockOp::WriteZeroes { offset, .. }
            | BlockOp::Discard { offset, .. } => offset,
        }
    }

    /// What is left to move, as much as one call takes.
    fn iovecs(&self) -> &[libc::iovec] {
        let all = if self.done == 0 {
            self.buffers.iovecs()
        } else {
            &self.rest
        };
        &all[..all.len().min(MAX_IOVECS)]
    }

    /// Makes `rest` the list of what is left; only long or short transfers need it.
    fn advance_list(&mut self) {
        let mut skip = usize::try_from(self.done).unwrap_or(usize::MAX);
        self.rest.clear();
        for vec in self.buffers.iovecs() {
            let part = skip.min(vec.iov_len);
            skip -= part;
            if part < vec.iov_len {
                self.rest.push(libc::iovec {
                    iov_base: vec.iov_base.wrapping_byte_add(part),
                    iov_len: vec.iov_len - part,
                });
            }
        }
    }
}

impl FileBackend {
    fn first_stage(&self, slot: &Slot) -> Stage {
        let allocate = |mode| {
            if self.unsupported(mode).load(Ordering::Relaxed) {
                Stage::ZeroFill
            } else {
                Stage::Allocate { mode }
            }
        };
        match slot.op {
            BlockOp::Flush => Stage::Sync,
            _ if slot.total == 0 => Stage::Known,
            BlockOp::Read { .. } | BlockOp::Write { .. } if self.aligned(&slot.buffers) => {
                Stage::Transfer
            }
            BlockOp::Read { .. } | BlockOp::Write { .. } => {
                self.bounced.fetch_add(1, Ordering::Relaxed);
                Stage::Bounce
            }
            BlockOp::WriteZeroes { unmap: true, .. } => allocate(PUNCH_HOLE),
            BlockOp::WriteZeroes { unmap: false, .. } => allocate(ZERO_RANGE),
            // A hint that cannot be taken is done.
            BlockOp::Discard { .. } => match allocate(PUNCH_HOLE) {
                Stage::ZeroFill => Stage::Known,
                stage => stage,
            },
        }
    }

    fn aligned(&self, buffers: &PinnedBuffers) -> bool {
        let align = self.align.memory;
        align == 1
            || buffers.iovecs().iter().all(|vec| {
                vec.iov_base.addr().is_multiple_of(align) && vec.iov_len.is_multiple_of(align)
            })
    }

    fn unsupported(&self, mode: i32) -> &AtomicBool {
        if mode == PUNCH_HOLE {
            &self.no_punch_hole
        } else {
            &self.no_zero_range
        }
    }
}

/// fallocate(2) modes.
const PUNCH_HOLE: i32 = libc::FALLOC_FL_PUNCH_HOLE | libc::FALLOC_FL_KEEP_SIZE;
const ZERO_RANGE: i32 = libc::FALLOC_FL_ZERO_RANGE | libc::FALLOC_FL_KEEP_SIZE;

/// Length of one call on one element.
fn length(vec: &libc::iovec) -> u32 {
    let len = u64::try_from(vec.iov_len).unwrap_or(u64::MAX);
    u32::try_from(len.min(MAX_BYTES)).unwrap_or(u32::MAX)
}

fn count(iovecs: &[libc::iovec]) -> u32 {
    u32::try_from(iovecs.len()).unwrap_or(u32::MAX)
}

/// How much of `left` goes through one chunk, as the two types that need it.
fn piece(left: u64) -> (usize, u32) {
    let part = usize::try_from(left).unwrap_or(usize::MAX).min(CHUNK);
    (part, u32::try_from(part).unwrap_or(u32::MAX))
}

//! What every block back end must do, whatever keeps its bytes.

use std::collections::BTreeSet;
use std::io;
use std::sync::Arc;

use iommu::{Access, DmaMemory, DmaSpace, GuestRam, Iova, PinnedBuffers, SourceId, Upstream};
use vm_memory::GuestAddress;

use super::{BlockBackend, BlockCompletion, BlockOp, BlockQueue, BlockRequest};

/// Size of the disks under test: more than the guest memory that one request may use.
pub const CAPACITY: u64 = 8 << 20;

/// Guest memory of a [`User`].
const RAM: u64 = 8 << 20;

/// Whether a back end gives back what was written.
#[derive(Clone, Copy, PartialEq, Eq)]
pub enum Keeps {
    Data,
    Nothing,
}

/// A queue with guest memory, to do one thing after the other.
pub struct User {
    pub queue: Box<dyn BlockQueue>,
    pub mem: DmaMemory,
    space: Arc<DmaSpace>,
}

/// How requests lie in guest memory.
#[derive(Clone, Copy, Debug)]
pub enum Layout {
    /// One page-aligned piece.
    Whole,
    /// Pieces of so many bytes, with gaps between them, the first this far from the start of a page; if that is
    /// zero, all are as aligned as they are long.
    Pieces { len: u64, skew: u64 },
}

impl User {
    pub fn new(backend: Arc<dyn BlockBackend>) -> User {
        User::with_depth(backend, 32)
    }

    pub fn with_depth(backend: Arc<dyn BlockBackend>, depth: u16) -> User {
        let ram = usize::try_from(RAM).unwrap();
        let space = DmaSpace::new(
            &Upstream::memory(GuestRam::from_ranges(&[(GuestAddress(0), ram)]).unwrap()),
            SourceId(0),
        );
        space.set_bus_master(true);
        User {
            queue: backend.open_queue(depth).unwrap(),
            mem: space.view(),
            space,
        }
    }

    /// The places in guest memory of `len` bytes.
    fn places(layout: Layout, len: u64) -> Vec<(Iova, u64)> {
        match layout {
            Layout::Whole => vec![(Iova(0), len)],
            Layout::Pieces { len: piece, skew } => {
                let stride = if skew == 0 {
                    2 * piece
                } else {
                    (piece + skew).next_multiple_of(8) + 8
                };
                let mut at = skew;
                let mut left = len;
                let mut places = Vec::new();
                while left > 0 {
                    let part = left.min(piece);
                    places.push((Iova(at), part));
                    at += stride;
                    left -= part;
                }
                places
            }
        }
    }

    fn pin(&self, places: &[(Iova, u64)], access: Access) -> PinnedBuffers {
        let mut buffers = PinnedBuffers::new();
        for &(iova, len) in places {
            buffers.push(&self.mem, iova, len, access).unwrap();
        }
        buffers
    }

    /// Pushes a request whose buffers hold `data`, at the start of guest memory.
    pub fn push(&mut self, op: BlockOp, data: &[u8], tag: u64) {
        self.mem.write(Iova(0), data).unwrap();
        let places = [(Iova(0), data.len() as u64)];
        let places = if data.is_empty() { &[][..] } else { &places };
        let buffers = self.pin(places, Access::Read);
        self.queue.push(BlockRequest { op, buffers, tag });
        self.queue.submit();
    }

    /// The next completion; the descriptor must say that there is one.
    pub fn wait(&mut self) -> BlockCompletion {
        loop {
            if let Some(completion) = self.queue.reap() {
                return completion;
            }
            let fd = self.queue.fd().expect("no completion and no descriptor");
            let mut poll = libc::pollfd {
                fd,
                events: libc::POLLIN,
                revents: 0,
            };
            // SAFETY: one valid pollfd.
            #[expect(unsafe_code, reason = "poll")]
            let ready = unsafe { libc::poll(&raw mut poll, 1, 20_000) };
            assert_eq!(
                ready, 1,
                "a completion did not make the descriptor readable"
            );
        }
    }

    pub fn op(&mut self, op: BlockOp) -> io::Result<()> {
        self.push(op, &[], 1);
        self.wait().result
    }

    pub fn write(&mut self, offset: u64, data: &[u8]) -> io::Result<()> {
        self.push(BlockOp::Write { offset, fua: false }, data, 2);
        self.wait().result
    }

    pub fn write_as(&mut self, layout: Layout, offset: u64, data: &[u8]) -> io::Result<()> {
        let places = User::places(layout, data.len() as u64);
        let mut rest = data;
        for &(iova, len) in &places {
            let (part, more) = rest.split_at(usize::try_from(len).unwrap());
            self.mem.write(iova, part).unwrap();
            rest = more;
        }
        let buffers = self.pin(&places, Access::Read);
        // Some of each kind: stable writes take long.
        let fua = data.len() <= 4096;
        let op = BlockOp::Write { offset, fua };
        self.queue.push(BlockRequest {
            op,
            buffers,
            tag: 3,
        });
        self.queue.submit();
        self.wait().result
    }

    pub fn read(&mut self, offset: u64, len: usize) -> io::Result<Vec<u8>> {
        self.read_as(Layout::Whole, offset, len)
    }

    pub fn read_as(&mut self, layout: Layout, offset: u64, len: usize) -> io::Result<Vec<u8>> {
        let places = User::places(layout, len as u64);
        for &(iova, part) in &places {
            let noise = vec![0xa5; usize::try_from(part).unwrap()];
            self.mem.write(iova, &noise).unwrap();
        }
        let buffers = self.pin(&places, Access::Write);
        let op = BlockOp::Read { offset };
        self.queue.push(BlockRequest {
            op,
            buffers,
            tag: 4,
        });
        self.queue.submit();
        let completion = self.wait();
        assert_eq!((completion.tag, completion.buffers.len()), (4, len as u64));
        completion.result?;
        let mut data = vec![0; len];
        assert_eq!(completion.buffers.copy_out(0, &mut data), len);
        Ok(data)
    }

    fn busy(&self) -> usize {
        self.queue.in_flight()
    }
}

/// Bytes that differ from place to place and from seed to seed.
pub fn pattern(seed: u64, len: usize) -> Vec<u8> {
    let mut state = seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1;
    let mut step = || {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        state.to_le_bytes()[3]
    };
    (0..len).map(|_| step()).collect()
}

/// The suite for disks that can be written.
pub fn run<B: BlockBackend + 'static>(make: &dyn Fn() -> Arc<B>, keeps: Keeps) {
    let make: &dyn Fn() -> Arc<dyn BlockBackend> = &|| make();
    let info = make().info();
    assert_eq!((info.capacity, info.read_only), (CAPACITY, false));
    assert!(info.logical_block.is_power_of_two() && info.logical_block >= 512);
    refuses_bad_requests(make);
    completes_each_request_once(make);
    gives_buffers_back_when_dropped(make);
    every_operation_succeeds(make);
    if keeps == Keeps::Data {
        starts_as_zeroes_and_reads_what_was_written(make);
        zeroes_only_what_was_asked(make);
        queues_share_the_disk(make);
        agrees_with_a_model(make);
    }
}

/// The suite for disks that cannot.
pub fn run_read_only<B: BlockBackend + 'static>(make: &dyn Fn() -> Arc<B>) {
    let backend = make();
    let info = backend.info();
    assert_eq!((info.capacity, info.read_only), (CAPACITY, true));
    let mut user = User::new(backend);
    let before = user.read(0, 1 << 20).unwrap();
    let block = u64::from(info.logical_block);
    let changes = [
        BlockOp::WriteZeroes {
            offset: 0,
            len: block,
            unmap: true,
            fua: false,
        },
        BlockOp::Discard {
            offset: 0,
            len: block,
        },
    ];
    for op in changes {
        let error = user.op(op).unwrap_err();
        assert_eq!(error.kind(), io::ErrorKind::ReadOnlyFilesystem, "{op:?}");
    }
    let error = user.write(0, &pattern(1, 4096)).unwrap_err();
    assert_eq!(error.kind(), io::ErrorKind::ReadOnlyFilesystem);
    user.op(BlockOp::Flush).unwrap();
    assert!(user.read(0, 1 << 20).unwrap() == before);
}

fn refuses_bad_requests(make: &dyn Fn() -> Arc<dyn BlockBackend>) {
    let backend = make();
    let block = u64::from(backend.info().logical_block);
    let mut user = User::new(backend);
    let invalid = |result: io::Result<()>| {
        assert_eq!(result.unwrap_err().kind(), io::ErrorKind::InvalidInput);
    };
    invalid(user.read(CAPACITY, 4096).map(drop));
    invalid(user.read(u64::MAX - 511, 4096).map(drop));
    invalid(user.read(1, 4096).map(drop));
    invalid(user.read(block / 2, 4096).map(drop));
    invalid(user.write(0, &[0; 100]));
    invalid(user.write(CAPACITY - 4096, &[0; 8192]));
    for (offset, len) in [(CAPACITY, 4096), (0, u64::MAX), (0, 100), (4096, CAPACITY)] {
        invalid(user.op(BlockOp::Discard { offset, len }));
        invalid(user.op(BlockOp::WriteZeroes {
            offset,
            len,
            unmap: false,
            fua: false,
        }));
    }
    user.read(CAPACITY - 4096, 4096).unwrap();
    assert_eq!(user.busy(), 0);
}

fn completes_each_request_once(make: &dyn Fn() -> Arc<dyn BlockBackend>) {
    for depth in [1, 3, 32] {
        let mut user = User::with_depth(make(), depth);
        let mut next = 0u64;
        for _ in 0..8 {
            let mut tags = BTreeSet::new();
            for slot in 0..u64::from(depth) {
                let place = [(Iova(slot * 4096), 4096)];
                let op = match next % 3 {
                    0 => BlockOp::Write {
                        offset: slot * 4096,
                        fua: next.is_multiple_of(2),
                    },
                    1 => BlockOp::Read {
                        offset: slot * 4096,
                    },
                    _ => BlockOp::Flush,
                };
                let buffers = user.pin(&place, Access::Write);
                user.queue.push(BlockRequest {
                    op,
                    buffers,
                    tag: next,
                });
                tags.insert(next);
                next += 1;
            }
            assert_eq!(user.busy(), usize::from(depth));
            user.queue.submit();
            for _ in 0..depth {
                let completion = user.wait();
                completion.result.unwrap();
                assert!(tags.remove(&completion.tag), "a tag that was not pushed");
            }
            assert!(user.queue.reap().is_none());
            assert_eq!(user.busy(), 0);
        }
        // One too many is answered, not lost and not fatal.
        for tag in 0..=u64::from(depth) {
            let buffers = PinnedBuffers::new();
            let op = BlockOp::Flush;
            user.queue.push(BlockRequest { op, buffers, tag });
        }
        user.queue.submit();
        let failed = (0..=depth).filter(|_| match user.wait().result {
            Ok(()) => false,
            Err(error) => error.kind() == io::ErrorKind::ResourceBusy,
        });
        assert_eq!(failed.count(), 1);
    }
}

/// After the drop, nothing of guest memory is in use.
fn gives_buffers_back_when_dropped(make: &dyn Fn() -> Arc<dyn BlockBackend>) {
    for submit in [false, true] {
        let mut user = User::new(make());
        for tag in 0..32 {
            let places = [(Iova(tag * 65536 + 4), 65536)];
            let buffers = user.pin(&places, Access::Write);
            let op = BlockOp::Read {
                offset: tag * 65536,
            };
            user.queue.push(BlockRequest { op, buffers, tag });
        }
        if submit {
            user.queue.submit();
        }
        drop(user.queue);
        user.space.set_bus_master(false);
    }
}

fn every_operation_succeeds(make: &dyn Fn() -> Arc<dyn BlockBackend>) {
    let mut user = User::new(make());
    user.op(BlockOp::Flush).unwrap();
    for unmap in [false, true] {
        for fua in [false, true] {
            user.op(BlockOp::WriteZeroes {
                offset: 4096,
                len: 1 << 20,
                unmap,
                fua,
            })
            .unwrap();
        }
    }
    user.op(BlockOp::Discard {
        offset: 0,
        len: CAPACITY,
    })
    .unwrap();
    // Nothing to do is done.
    user.op(BlockOp::Discard { offset: 0, len: 0 }).unwrap();
    user.op(BlockOp::Read { offset: CAPACITY }).unwrap();
}

const LAYOUTS: [Layout; 5] = [
    Layout::Whole,
    Layout::Pieces { len: 4096, skew: 0 },
    // A PRP entry's offset is only aligned to four bytes (NVMe 1.4, 4.3).
    Layout::Pieces { len: 4092, skew: 4 },
    Layout::Pieces { len: 512, skew: 0 },
    Layout::Pieces {
        len: 1 << 20,
        skew: 2052,
    },
];

fn starts_as_zeroes_and_reads_what_was_written(make: &dyn Fn() -> Arc<dyn BlockBackend>) {
    let backend = make();
    let block = u64::from(backend.info().logical_block);
    let mut user = User::new(backend);
    assert!(user.read(0, 1 << 20).unwrap().iter().all(|&byte| byte == 0));
    let mut seed = 0;
    for written in LAYOUTS {
        for read in LAYOUTS {
            // A megabyte has more pieces of 512 bytes than the kernel takes in one call.
            for (offset, len) in [(0, 1), (7, 8), (8, 600), (0, (1 << 20) / block)] {
                let (offset, len) = (offset * block, usize::try_from(len * block).unwrap());
                seed += 1;
                let data = pattern(seed, len);
                user.write_as(written, offset, &data).unwrap();
                let back = user.read_as(read, offset, len).unwrap();
                assert!(back == data, "{written:?} {read:?} {offset:#x}+{len:#x}");
            }
        }
    }
}

fn zeroes_only_what_was_asked(make: &dyn Fn() -> Arc<dyn BlockBackend>) {
    let backend = make();
    let block = u64::from(backend.info().logical_block);
    let mut user = User::new(backend);
    let data = pattern(7, 2 << 20);
    // With blocks of 512 bytes: inside a page, a page, across pages with both edges, many.
    for (offset, len) in [(1, 1), (8, 8), (7, 18), (1, 255)] {
        let (offset, len) = (offset * block, len * block);
        for unmap in [false, true] {
            user.write(0, &data).unwrap();
            user.op(BlockOp::WriteZeroes {
                offset,
                len,
                unmap,
                fua: !unmap,
            })
            .unwrap();
            let back = user.read(0, data.len()).unwrap();
            let start = usize::try_from(offset).unwrap();
            let end = start + usize::try_from(len).unwrap();
            assert!(back[..start] == data[..start] && back[end..] == data[end..]);
            assert!(back[start..end].iter().all(|&byte| byte == 0));
        }
        user.write(0, &data).unwrap();
        user.op(BlockOp::Discard { offset, len }).unwrap();
        let back = user.read(0, data.len()).unwrap();
        let start = usize::try_from(offset).unwrap();
        let end = start + usize::try_from(len).unwrap();
        assert!(back[..start] == data[..start] && back[end..] == data[end..]);
        let changed = back[start..end]
            .iter()
            .zip(&data[start..end])
            .all(|(&now, &then)| now == 0 || now == then);
        assert!(changed, "discarded bytes are neither old nor zero");
    }
}

fn queues_share_the_disk(make: &dyn Fn() -> Arc<dyn BlockBackend>) {
    let backend = make();
    let mut one = User::new(Arc::clone(&backend));
    let mut two = User::new(backend);
    let data = pattern(3, 65536);
    one.write(65536, &data).unwrap();
    assert!(two.read(65536, 65536).unwrap() == data);
    drop(one);
    assert!(two.read(65536, 65536).unwrap() == data);
}

/// A random mix, one at a time, against a plain array.
fn agrees_with_a_model(make: &dyn Fn() -> Arc<dyn BlockBackend>) {
    let backend = make();
    let block = usize::try_from(backend.info().logical_block).unwrap();
    let mut user = User::new(backend);
    let size = 256 * block;
    let mut model = vec![0u8; size];
    let choices = pattern(11, 4 * 400);
    for (round, choice) in choices.chunks(4).enumerate() {
        let start = usize::from(choice[0]) * block;
        let len = ((usize::from(choice[1]) + 1) * block).min(size - start);
        let offset = start as u64;
        let layout = LAYOUTS[usize::from(choice[2]) % LAYOUTS.len()];
        match choice[3] % 4 {
            0 => {
                let data = pattern(round as u64, len);
                user.write_as(layout, offset, &data).unwrap();
                model[start..start + len].copy_from_slice(&data);
            }
            1 => {
                let op = BlockOp::WriteZeroes {
                    offset,
                    len: len as u64,
                    unmap: choice[2] & 1 != 0,
                    fua: false,
                };
                user.op(op).unwrap();
                model[start..start + len].fill(0);
            }
            _ => {
                let back = user.read_as(layout, offset, len).unwrap();
                assert!(back == model[start..start + len], "round {round}");
            }
        }
    }
}

//! Aligned host memory for transfers that cannot use the guest's.

/// Size of a bounce buffer; longer transfers go through it piece by piece. A multiple of every
/// logical block size.
pub(super) const CHUNK: usize = 128 << 10;

/// `CHUNK` bytes at an aligned address.
pub(super) struct Chunk {
    bytes: Vec<u8>,
    start: usize,
}

impl Chunk {
    /// Zeroes, at a multiple of `align` (a power of two).
    pub(super) fn new(align: usize) -> Chunk {
        let bytes = vec![0; CHUNK + align];
        let start = bytes.as_ptr().align_offset(align).min(align);
        Chunk { bytes, start }
    }

    /// The address for the kernel. It stays the same wherever the chunk itself is moved.
    pub(super) fn as_mut_ptr(&mut self) -> *mut u8 {
        self.bytes[self.start..].as_mut_ptr()
    }

    pub(super) fn as_slice(&self) -> &[u8] {
        &self.bytes[self.start..self.start + CHUNK]
    }

    pub(super) fn as_mut_slice(&mut self) -> &mut [u8] {
        &mut self.bytes[self.start..self.start + CHUNK]
    }
}

/// The bounce buffers of one queue: a bounded number, made when first needed and then kept.
pub(super) struct Pool {
    free: Vec<Chunk>,
    left: usize,
    align: usize,
}

impl Pool {
    pub(super) fn new(limit: usize, align: usize) -> Pool {
        Pool {
            free: Vec::with_capacity(limit),
            left: limit,
            align,
        }
    }

    /// A buffer, or `None` until one comes back.
    pub(super) fn take(&mut self) -> Option<Chunk> {
        if let Some(chunk) = self.free.pop() {
            return Some(chunk);
        }
        self.left = self.left.checked_sub(1)?;
        Some(Chunk::new(self.align))
    }

    pub(super) fn give(&mut self, chunk: Chunk) {
        self.free.push(chunk);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn chunks_are_aligned_and_the_pool_is_bounded() {
        for align in [1, 512, 4096, 65536] {
            let mut chunk = Chunk::new(align);
            let address = chunk.as_slice().as_ptr();
            assert!(address.addr().is_multiple_of(align));
            assert_eq!(
                (chunk.as_mut_ptr().cast_const(), chunk.as_slice().len()),
                (address, CHUNK)
            );
        }
        let mut pool = Pool::new(2, 512);
        let (one, two) = (pool.take().unwrap(), pool.take().unwrap());
        assert!(pool.take().is_none());
        pool.give(one);
        assert!(pool.take().is_some() && pool.take().is_none());
        drop(two);
    }
}

//! What is on its way to the carrier: small parts joined in one buffer, large ones by reference, in
//! order, for vectored writes.

use std::collections::VecDeque;
use std::io::IoSlice;

use bytes::{Buf, Bytes};

/// Parts from this size on are written from where they lie; smaller ones are cheaper to copy than
/// to pass as an iovec of their own.
pub const COPY_BYTES_MAX: usize = 4 * 1024;

/// The joining buffer is given back when it is empty and larger than this.
const JOINED_KEPT_BYTES_MAX: usize = 64 * 1024;

/// Buffers that wait for the carrier. Empty, it holds at most 64 KiB; [`Transmit::shrink`] gives
/// that back too. Shown by its length: its bytes are others'.
#[derive(Default)]
pub struct Transmit {
    segments: VecDeque<Segment>,
    /// Bytes of the `Joined` segments, in order, from `written` on.
    joined: Vec<u8>,
    /// Invariant: `written <= joined.len()`.
    written: usize,
    len: usize,
}

enum Segment {
    /// So many bytes of the joining buffer.
    Joined(usize),
    Shared(Bytes),
}

impl std::fmt::Debug for Transmit {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Transmit").field("len", &self.len).finish_non_exhaustive()
    }
}

impl Transmit {
    /// Returns an empty one.
    #[must_use]
    pub fn new() -> Self {
        Self::default()
    }

    /// Returns how many bytes wait.
    #[must_use]
    pub const fn len(&self) -> usize {
        self.len
    }

    /// Returns whether nothing waits.
    #[must_use]
    pub const fn is_empty(&self) -> bool {
        self.len == 0
    }

    /// Fills `chunks` from the front with what is to be written first, and returns how many were
    /// filled.
    pub fn chunks<'a>(&'a self, chunks: &mut [IoSlice<'a>]) -> usize {
        let mut joined_at = self.written;
        let mut filled = 0;
        for (segment, chunk) in self.segments.iter().zip(chunks.iter_mut()) {
            *chunk = match segment {
                Segment::Joined(length) => {
                    let start = joined_at;
                    joined_at += length;
                    IoSlice::new(&self.joined[start..joined_at])
                }
                Segment::Shared(bytes) => IoSlice::new(bytes),
            };
            filled += 1;
        }
        filled
    }

    /// Drops the first `count` bytes, which were written. At most [`Transmit::len`] are there.
    pub fn advance(&mut self, count: usize) {
        let mut rest = count.min(self.len);
        self.len -= rest;
        while rest > 0 {
            let segment = self.segments.front_mut().expect("segments hold `len` bytes");
            let step = match segment {
                Segment::Joined(length) => {
                    let step = rest.min(*length);
                    *length -= step;
                    self.written += step;
                    step
                }
                Segment::Shared(bytes) => {
                    let step = rest.min(bytes.len());
                    bytes.advance(step);
                    step
                }
            };
            rest -= step;
            let empty = match segment {
                Segment::Joined(length) => *length == 0,
                Segment::Shared(bytes) => bytes.is_empty(),
            };
            if empty {
                self.segments.pop_front();
            }
        }
        if self.len == 0 {
            self.joined.clear();
            self.written = 0;
            if self.joined.capacity() > JOINED_KEPT_BYTES_MAX {
                self.joined = Vec::new();
            }
        }
    }

    /// Drops all that waits, as after the loss of the carrier.
    pub fn clear(&mut self) {
        self.advance(self.len);
    }

    /// Gives the buffers back; for lanes at rest. Does nothing where bytes wait.
    pub fn shrink(&mut self) {
        if self.is_empty() {
            *self = Self::default();
        }
    }

    /// Appends through the joining buffer what `write` appends to it; returns how many bytes.
    pub(crate) fn join_with(&mut self, write: impl FnOnce(&mut Vec<u8>)) -> usize {
        self.compact();
        let before = self.joined.len();
        write(&mut self.joined);
        let added = self.joined.len() - before;
        if added == 0 {
            return 0;
        }
        self.len += added;
        match self.segments.back_mut() {
            Some(Segment::Joined(length)) => *length += added,
            _ => self.segments.push_back(Segment::Joined(added)),
        }
        added
    }

    /// Returns the bytes that were joined last.
    pub(crate) fn last_joined(&self, count: usize) -> &[u8] {
        &self.joined[self.joined.len() - count..]
    }

    /// Appends a part: small ones as a copy, large ones as they are.
    pub(crate) fn push(&mut self, part: Bytes) {
        if part.len() < COPY_BYTES_MAX {
            self.join_with(|joined| joined.extend_from_slice(&part));
        } else {
            self.len += part.len();
            self.segments.push_back(Segment::Shared(part));
        }
    }

    /// Keeps written bytes from piling up in front when the carrier never takes all.
    fn compact(&mut self) {
        if self.written > JOINED_KEPT_BYTES_MAX && self.written * 2 > self.joined.len() {
            self.joined.drain(..self.written);
            self.written = 0;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn contents(transmit: &Transmit) -> Vec<u8> {
        let mut chunks = [IoSlice::new(&[]); 64];
        let filled = transmit.chunks(&mut chunks);
        chunks[..filled].iter().flat_map(|chunk| chunk.to_vec()).collect()
    }

    #[test]
    fn small_parts_are_joined_and_large_ones_are_not_copied() {
        let large = Bytes::from(vec![7; COPY_BYTES_MAX]);
        let mut transmit = Transmit::new();
        transmit.push(Bytes::from_static(b"ab"));
        transmit.push(Bytes::from_static(b"cd"));
        transmit.push(large.clone());
        transmit.push(Bytes::from_static(b"ef"));
        let mut chunks = [IoSlice::new(&[]); 8];
        assert_eq!(transmit.chunks(&mut chunks), 3);
        assert_eq!(&*chunks[0], b"abcd");
        assert_eq!(chunks[1].as_ptr(), large.as_ptr());
        assert_eq!(&*chunks[2], b"ef");
        assert_eq!(transmit.len(), 6 + COPY_BYTES_MAX);
    }

    #[test]
    fn advance_goes_on_where_the_write_stopped() {
        let mut expected = Vec::new();
        let mut transmit = Transmit::new();
        for round in 0..40_u8 {
            let part = vec![round; if round % 3 == 0 { 5000 } else { 700 }];
            expected.extend_from_slice(&part);
            transmit.push(Bytes::from(part));
        }
        for step in [0, 1, 699, 4999, 5001, 20_000] {
            transmit.advance(step);
            expected.drain(..step);
            assert_eq!(contents(&transmit), expected);
        }
        transmit.advance(usize::MAX);
        assert!(transmit.is_empty());
        assert_eq!(contents(&transmit), []);
    }

    #[test]
    fn written_bytes_do_not_pile_up_when_the_carrier_is_never_done() {
        let mut transmit = Transmit::new();
        transmit.push(Bytes::from(vec![0; 1000]));
        for _ in 0..10_000 {
            transmit.push(Bytes::from(vec![1; 1000]));
            transmit.advance(1000);
        }
        assert_eq!(transmit.len(), 1000);
        assert!(transmit.joined.capacity() < 512 * 1024, "{}", transmit.joined.capacity());
    }
}

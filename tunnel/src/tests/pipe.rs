//! Bytes on their way in one direction of a connection.

use std::collections::VecDeque;
use std::time::{Duration, Instant};

use super::pair::End;

/// What waits in a sender's socket, at most, before it is not writable.
const BACKLOG_BYTES: u64 = 128 * 1024;

/// What a connection is like, in each direction.
#[derive(Clone, Copy)]
pub(super) struct Road {
    pub(super) latency: Duration,
    /// Bytes per second; 0: any number.
    pub(super) rate: u64,
    /// Bytes on their way, at most.
    pub(super) capacity: usize,
    /// Largest piece in which bytes arrive; small ones cut messages anywhere.
    pub(super) chop: usize,
}

/// Counts what arrives, and says after how many bytes the connection is cut.
#[derive(Default)]
pub(super) struct Meter {
    pub(super) arrived: u64,
    /// Counted from the first connection's first byte on.
    pub(super) cuts: VecDeque<u64>,
}

pub(super) struct Pipe {
    /// Arrival and bytes, in order.
    flying: VecDeque<(Instant, Vec<u8>)>,
    held: usize,
    /// When the last byte has left.
    free_at: Instant,
}

impl Pipe {
    pub(super) const fn new(now: Instant) -> Self {
        Self { flying: VecDeque::new(), held: 0, free_at: now }
    }

    pub(super) fn is_empty(&self) -> bool {
        self.flying.is_empty()
    }

    /// Returns when the next bytes arrive.
    pub(super) fn arrival(&self) -> Option<Instant> {
        self.flying.front().map(|&(at, _)| at)
    }

    /// Returns when the sender may go on, where it has to wait for that and has something to send.
    pub(super) fn writable(&self, from: &mut End, now: Instant, road: Road) -> Option<Instant> {
        let at = self.writable_at(road);
        let waits = at > now && (!from.out.is_empty() || from.lane.wants_transmit());
        waits.then_some(at)
    }

    fn writable_at(&self, road: Road) -> Instant {
        if road.rate == 0 {
            return self.free_at;
        }
        let backlog = Duration::from_nanos(BACKLOG_BYTES * 1_000_000_000 / road.rate);
        self.free_at.checked_sub(backlog).unwrap_or(self.free_at)
    }

    /// Puts bytes on their way, past what limits the lane.
    pub(super) fn push(&mut self, bytes: &[u8], now: Instant, road: Road) {
        for piece in bytes.chunks(road.chop) {
            self.send(piece.to_vec(), now, road);
        }
    }

    fn send(&mut self, bytes: Vec<u8>, now: Instant, road: Road) {
        let takes = bytes.len() as u64 * 1_000_000_000;
        let takes = Duration::from_nanos(takes.checked_div(road.rate).unwrap_or(0));
        self.free_at = self.free_at.max(now) + takes;
        self.held += bytes.len();
        self.flying.push_back((self.free_at + road.latency, bytes));
    }

    /// Takes what an end has to send; false: nothing.
    pub(super) fn fill(&mut self, from: &mut End, now: Instant, road: Road) -> bool {
        let mut moved = false;
        while self.held < road.capacity && (road.rate == 0 || self.writable_at(road) <= now) {
            if from.out.is_empty() && !from.lane.poll_transmit(now, &mut from.out, 128 * 1024) {
                break;
            }
            let mut chunks = [std::io::IoSlice::new(&[]); 1];
            from.out.chunks(&mut chunks);
            let count = chunks[0].len().min(road.capacity - self.held).min(road.chop);
            let bytes = chunks[0][..count].to_vec();
            from.out.advance(count);
            self.send(bytes, now, road);
            moved = true;
        }
        moved
    }

    /// Gives what has arrived; true: the connection is cut behind it.
    pub(super) fn take(&mut self, now: Instant, meter: &mut Meter) -> Option<(Vec<u8>, bool)> {
        if self.arrival()? > now {
            return None;
        }
        let (_, mut bytes) = self.flying.pop_front()?;
        self.held -= bytes.len();
        let mut is_cut = false;
        if let Some(left) = meter.cuts.front().map(|at| at - meter.arrived)
            && left <= bytes.len() as u64
        {
            bytes.truncate(usize::try_from(left).expect("a piece's length is one"));
            meter.cuts.pop_front();
            is_cut = true;
        }
        meter.arrived += bytes.len() as u64;
        Some((bytes, is_cut))
    }

    /// Loses what is on its way but for the first bytes.
    pub(super) fn truncate(&mut self, keep: usize) {
        let mut left = keep;
        for (_, bytes) in &mut self.flying {
            bytes.truncate(left);
            left -= bytes.len();
        }
        self.flying.retain(|(_, bytes)| !bytes.is_empty());
        self.held = self.flying.iter().map(|(_, bytes)| bytes.len()).sum();
    }

    pub(super) const fn held(&self) -> usize {
        self.held
    }
}

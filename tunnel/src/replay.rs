//! What this end has sent and the peer has not acknowledged, kept until it has: the messages that a
//! lane sends again when it comes back on another connection.
//!
//! Knows bytes and the ends of messages; knows neither what they say nor what carries them.

use std::collections::VecDeque;
use std::sync::Arc;
use std::time::{Duration, Instant};

use bytes::Bytes;

use crate::budget::{Budget, GRANULE_BYTES};
use crate::transmit::{COPY_BYTES_MAX, Transmit};

use size::Size;

mod size;

/// What a message costs beside its bytes: about what its place takes. The same is counted until an
/// acknowledgement is due, so that small messages do not fill a ring before one is.
pub(crate) const MESSAGE_COST: u64 = 64;

/// Parts below this are kept as copies: a part by reference pins all of the buffer that it was cut from,
/// 256 KiB of a busy connection's, so that a ring pins sixteen times its size at most. Larger ones are
/// most of what is sent in bulk, and are not copied.
const SHARED_BYTES_MIN: usize = 16 * 1024;

/// The joining buffer is given back when it is empty and larger than this, and made smaller when three
/// quarters of it are empty.
const JOINED_KEPT_BYTES_MAX: usize = 64 * 1024;

/// The ring of one lane and direction.
#[derive(Debug)]
pub(crate) struct Replay {
    size: Size,
    budget: Option<Arc<Budget>>,
    parts: VecDeque<Part>,
    /// Bytes of the `Joined` parts, in order.
    joined: VecDeque<u8>,
    /// Cost of what is kept.
    bytes: u64,
    messages: u64,
    /// Taken from the budget. Invariant: at least `bytes`, where there is a budget.
    reserved: u64,
    /// What is sent again next.
    cursor: Option<Cursor>,
}

/// A part of a message. `last`: it ends there.
#[derive(Debug)]
enum Part {
    Joined { len: u32, last: bool },
    Shared { bytes: Bytes, last: bool },
}

/// Where the replay stands: the next part, and where in the joined bytes it begins.
#[derive(Debug)]
struct Cursor {
    part: usize,
    joined: usize,
}

impl Part {
    fn len(&self) -> u64 {
        match self {
            Self::Joined { len, .. } => u64::from(*len),
            Self::Shared { bytes, .. } => bytes.len() as u64,
        }
    }

    const fn is_last(&self) -> bool {
        match self {
            Self::Joined { last, .. } | Self::Shared { last, .. } => *last,
        }
    }
}

impl Replay {
    /// Returns an empty ring; with `bytes_max` 0 it keeps nothing.
    pub(crate) fn new(bytes_min: u64, bytes_max: u64, budget: Option<Arc<Budget>>) -> Self {
        let budget = budget.filter(|_| bytes_max > 0);
        if let Some(budget) = &budget {
            budget.enter();
        }
        Self {
            size: Size::new(bytes_min, bytes_max),
            budget,
            parts: VecDeque::new(),
            joined: VecDeque::new(),
            bytes: 0,
            messages: 0,
            reserved: 0,
            cursor: None,
        }
    }

    /// Returns whether anything is kept at all.
    pub(crate) const fn is_on(&self) -> bool {
        self.size.max() > 0
    }

    /// Returns the cost of what is kept.
    pub(crate) const fn bytes(&self) -> u64 {
        self.bytes
    }

    /// Returns what may be kept now.
    pub(crate) const fn limit(&self) -> u64 {
        self.size.limit()
    }

    pub(crate) const fn is_empty(&self) -> bool {
        self.messages == 0
    }

    /// Returns whether the message that waits may be sent. An empty ring has room for any.
    pub(crate) fn has_room(&mut self) -> bool {
        if !self.is_on() || self.messages == 0 {
            return true;
        }
        let has_room = self.bytes < self.size.limit() && self.reserve();
        if !has_room {
            self.size.full();
        }
        has_room
    }

    fn reserve(&mut self) -> bool {
        let Some(budget) = &self.budget else { return true };
        let is_least = self.bytes < self.size.min();
        if self.bytes < self.reserved {
            // The message may be longer than what is left: it may not be the second one that is.
            return !budget.is_exceeded(is_least);
        }
        let is_taken = budget.try_take_granule(is_least);
        if is_taken {
            self.reserved += GRANULE_BYTES;
        }
        is_taken
    }

    /// Keeps a part of the message that is being sent, as a copy.
    pub(crate) fn push_joined(&mut self, bytes: &[u8]) {
        if !self.is_on() || bytes.is_empty() {
            return;
        }
        self.joined.extend(bytes);
        self.bytes += bytes.len() as u64;
        let added = u32::try_from(bytes.len()).expect("a part is shorter than 4 GiB");
        match self.parts.back_mut() {
            Some(Part::Joined { len, last: false }) => *len += added,
            _ => self.parts.push_back(Part::Joined { len: added, last: false }),
        }
    }

    /// Keeps a part of the message that is being sent, by reference.
    pub(crate) fn push_shared(&mut self, bytes: &Bytes) {
        if !self.is_on() || bytes.is_empty() {
            return;
        }
        self.bytes += bytes.len() as u64;
        self.parts.push_back(Part::Shared { bytes: bytes.clone(), last: false });
    }

    /// The message that was being sent is whole.
    pub(crate) fn end_message(&mut self) {
        if !self.is_on() {
            return;
        }
        match self.parts.back_mut().expect("a message has bytes") {
            Part::Joined { last, .. } | Part::Shared { last, .. } => *last = true,
        }
        self.messages += 1;
        self.bytes += MESSAGE_COST;
        if let Some(budget) = &self.budget
            && self.bytes > self.reserved
        {
            let missing = (self.bytes - self.reserved).next_multiple_of(GRANULE_BYTES);
            budget.take(missing);
            self.reserved += missing;
        }
    }

    /// Forgets the first `count` messages, which the peer has. At most as many are there.
    pub(crate) fn forget(&mut self, count: u64) {
        let before = self.bytes;
        let count = count.min(self.messages);
        let mut joined = 0;
        for _ in 0..count {
            loop {
                let part = self.parts.pop_front().expect("a message has a last part");
                self.bytes -= part.len();
                if let Part::Joined { len, .. } = part {
                    joined += len as usize;
                }
                if let Some(cursor) = &mut self.cursor {
                    cursor.part = cursor.part.saturating_sub(1);
                }
                if part.is_last() {
                    break;
                }
            }
            self.bytes -= MESSAGE_COST;
        }
        self.messages -= count;
        self.joined.drain(..joined);
        if let Some(cursor) = &mut self.cursor {
            // Where the peer has more than was sent again, the rest follows from there.
            cursor.joined = cursor.joined.saturating_sub(joined);
            if cursor.part >= self.parts.len() {
                self.cursor = None;
            }
        }
        self.size.acknowledged(before - self.bytes);
        self.give_back();
    }

    fn give_back(&mut self) {
        if self.messages == 0 {
            if self.joined.capacity() > JOINED_KEPT_BYTES_MAX {
                self.joined = VecDeque::new();
            }
            if self.parts.capacity() > JOINED_KEPT_BYTES_MAX / size_of::<Part>() {
                self.parts = VecDeque::new();
            }
        } else if self.joined.capacity() > JOINED_KEPT_BYTES_MAX.max(4 * self.joined.len()) {
            self.joined.shrink_to(JOINED_KEPT_BYTES_MAX.max(2 * self.joined.len()));
        }
        if let Some(budget) = &self.budget {
            // One granule stays, so that no message takes and gives it back again and again.
            let needed = self.bytes.next_multiple_of(GRANULE_BYTES);
            let kept = if self.messages == 0 { 0 } else { needed + GRANULE_BYTES };
            if self.reserved > kept {
                budget.give(self.reserved - kept);
                self.reserved = kept;
            }
        }
    }

    /// Fits the limit to what the peer acknowledges. `may_grow`: there is room in the process.
    pub(crate) fn tune(&mut self, now: Instant, rtt: Option<Duration>, may_grow: bool) {
        self.size.tune(now, rtt, may_grow);
    }

    /// Gives all room back where nothing is kept: thousands of lanes are at rest at once.
    pub(crate) fn rest(&mut self) {
        if self.messages == 0 {
            self.size.rest();
            self.parts = VecDeque::new();
            self.joined = VecDeque::new();
        }
    }

    /// Sends all that is kept again, from the first message on.
    pub(crate) fn rewind(&mut self) {
        self.cursor = (self.messages > 0).then_some(Cursor { part: 0, joined: 0 });
    }

    /// Returns whether something is to be sent again.
    pub(crate) const fn is_behind(&self) -> bool {
        self.cursor.is_some()
    }

    /// Appends the next message that is sent again; returns its bytes.
    pub(crate) fn send_again(&mut self, out: &mut Transmit) -> u64 {
        let Some(Cursor { mut part, mut joined }) = self.cursor.take() else { return 0 };
        let mut bytes = 0;
        while let Some(next) = self.parts.get(part) {
            bytes += next.len();
            match next {
                Part::Joined { len, .. } => {
                    let len = *len as usize;
                    let (front, back) = self.joined.as_slices();
                    let split = front.len();
                    out.join_with(|out| {
                        out.extend_from_slice(&front[joined.min(split)..(joined + len).min(split)]);
                        let from = joined.max(split) - split;
                        out.extend_from_slice(&back[from..(joined + len).max(split) - split]);
                    });
                    joined += len;
                }
                Part::Shared { bytes, .. } => out.push(bytes.clone()),
            }
            part += 1;
            if next.is_last() {
                break;
            }
        }
        if part < self.parts.len() {
            self.cursor = Some(Cursor { part, joined });
        }
        bytes
    }

    /// Returns the bytes of memory held beside shared buffers.
    #[cfg(test)]
    pub(crate) fn room(&self) -> usize {
        self.joined.capacity() + self.parts.capacity() * size_of::<Part>()
    }

    /// Forgets everything.
    pub(crate) fn clear(&mut self) {
        self.cursor = None;
        self.forget(self.messages);
        self.parts = VecDeque::new();
        self.joined = VecDeque::new();
    }
}

impl Drop for Replay {
    fn drop(&mut self) {
        if let Some(budget) = &self.budget {
            budget.give(self.reserved);
            budget.leave();
        }
    }
}

/// Where a counted message goes: to the carrier, and into the ring.
pub(crate) struct Tee<'a> {
    pub(crate) out: &'a mut Transmit,
    pub(crate) replay: &'a mut Replay,
}

impl Tee<'_> {
    /// Appends through the joining buffer what `write` appends to it.
    pub(crate) fn join_with(&mut self, write: impl FnOnce(&mut Vec<u8>)) {
        let added = self.out.join_with(write);
        self.replay.push_joined(self.out.last_joined(added));
    }

    /// Appends a part: small ones as a copy, large ones as they are.
    pub(crate) fn push(&mut self, part: Bytes) {
        if part.len() < COPY_BYTES_MAX {
            self.join_with(|joined| joined.extend_from_slice(&part));
        } else {
            if part.len() < SHARED_BYTES_MIN {
                self.replay.push_joined(&part);
            } else {
                self.replay.push_shared(&part);
            }
            self.out.push(part);
        }
    }
}

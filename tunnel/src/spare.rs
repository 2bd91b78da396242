//! Queues without anything in them: exchanges at rest hold none, busy ones share a few.

use std::collections::VecDeque;

use crate::payload::Payload;

/// A queue of more room than this is given back to the allocator.
const QUEUE_ROOM_MAX: usize = 16;

/// Queues kept: as many as small exchanges of a busy lane have something queued at a time.
const QUEUES_MAX: usize = 256;

/// The spare queues of a lane's exchanges, in one direction.
///
/// Invariant: at most [`QUEUES_MAX`], each empty and with room for 1 to [`QUEUE_ROOM_MAX`].
#[derive(Debug, Default)]
pub(crate) struct SpareQueues(Vec<VecDeque<Payload>>);

impl SpareQueues {
    pub(crate) const fn new() -> Self {
        Self(Vec::new())
    }

    /// Queues a payload, in a spare queue where this one has no room of its own.
    pub(crate) fn push(&mut self, queue: &mut VecDeque<Payload>, payload: Payload) {
        if queue.capacity() == 0
            && let Some(spare) = self.0.pop()
        {
            *queue = spare;
        }
        queue.push_back(payload);
    }

    /// Takes the next payload, and with the last one the queue's room.
    pub(crate) fn pop(&mut self, queue: &mut VecDeque<Payload>) -> Option<Payload> {
        let payload = queue.pop_front()?;
        if queue.is_empty() {
            self.keep(std::mem::take(queue));
        }
        Some(payload)
    }

    /// Takes over what was a queue.
    pub(crate) fn keep(&mut self, mut queue: VecDeque<Payload>) {
        if (1..=QUEUE_ROOM_MAX).contains(&queue.capacity()) && self.0.len() < QUEUES_MAX {
            queue.clear();
            self.0.push(queue);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_emptied_queue_holds_nothing_and_its_room_is_used_again() {
        let mut spare = SpareQueues::new();
        let mut queue = VecDeque::new();
        spare.push(&mut queue, Payload::default());
        spare.push(&mut queue, Payload::default());
        let room = queue.capacity();
        assert!(spare.pop(&mut queue).is_some() && spare.pop(&mut queue).is_some());
        assert_eq!((queue.capacity(), spare.0.len()), (0, 1));
        assert!(spare.pop(&mut queue).is_none());
        spare.push(&mut queue, Payload::default());
        assert_eq!((queue.capacity(), spare.0.len()), (room, 0));
    }

    #[test]
    fn long_queues_and_too_many_are_given_back() {
        let mut spare = SpareQueues::new();
        spare.keep(VecDeque::with_capacity(QUEUE_ROOM_MAX + 1));
        assert!(spare.0.is_empty());
        for _ in 0..2 * QUEUES_MAX {
            spare.keep(VecDeque::with_capacity(1));
        }
        assert_eq!(spare.0.len(), QUEUES_MAX);
    }
}

//! Which exchange's message goes out next. A queue per exchange, two lists of those that have
//! something to send.
//!
//! *Sparse* exchanges, those that had nothing to send and now have little, go first, by at most a
//! quantum before each turn of a *bulk* one; bulk exchanges take turns by deficit round robin. So a
//! small message waits for one bulk quantum at most, and a flood of small ones takes half the lane
//! at most. Knows nothing of credit, envelopes and time.

use std::collections::VecDeque;

use crate::credit::MESSAGE_CHARGE;
use crate::payload::Payload;
use crate::spare::SpareQueues;

/// Queued bytes up to which an exchange that becomes active is sparse.
pub const SPARSE_BYTES_MAX: usize = 1024;

/// What a bulk exchange may send in its turn, and all sparse ones together before it.
pub const QUANTUM_BYTES: usize = 16 * 1024;

/// Nodes kept when no exchange is left.
const NODES_KEPT_MAX: usize = 1024;

const NIL: u32 = u32::MAX;

/// What an exchange has to send, and where in the lists it stands. Numbered as the exchanges are.
#[derive(Debug)]
struct Node {
    queue: VecDeque<Payload>,
    /// Cost of the queue.
    queued: usize,
    class: Class,
    /// Invariant: 0 unless `class` is `Bulk`.
    deficit: usize,
    previous: u32,
    next: u32,
}

#[derive(Clone, Copy, PartialEq, Eq, Debug)]
enum Class {
    /// In no list; the queue is empty.
    Idle,
    /// `served`: has sent since it became active, so that what it queues now is not the little that
    /// it became active with.
    Sparse {
        served: bool,
    },
    Bulk,
}

impl Default for Node {
    fn default() -> Self {
        Self {
            queue: VecDeque::new(),
            queued: 0,
            class: Class::Idle,
            deficit: 0,
            previous: NIL,
            next: NIL,
        }
    }
}

#[derive(Debug)]
struct List {
    first: u32,
    last: u32,
}

impl List {
    const EMPTY: Self = Self { first: NIL, last: NIL };

    fn push_back(&mut self, nodes: &mut [Node], index: u32) {
        let node = &mut nodes[index as usize];
        node.previous = self.last;
        node.next = NIL;
        if self.last == NIL {
            self.first = index;
        } else {
            nodes[self.last as usize].next = index;
        }
        self.last = index;
    }

    fn remove(&mut self, nodes: &mut [Node], index: u32) {
        let Node { previous, next, .. } = nodes[index as usize];
        if previous == NIL {
            self.first = next;
        } else {
            nodes[previous as usize].next = next;
        }
        if next == NIL {
            self.last = previous;
        } else {
            nodes[next as usize].previous = previous;
        }
        let node = &mut nodes[index as usize];
        node.previous = NIL;
        node.next = NIL;
    }
}

/// The queues and lists of one lane.
#[derive(Debug)]
pub(crate) struct Outbox {
    nodes: Vec<Node>,
    sparse: List,
    bulk: List,
    /// What sparse exchanges may still send before the next bulk turn.
    sparse_left: usize,
    /// The first bulk exchange has begun its turn.
    turn: bool,
    /// Cost of all queues.
    queued: usize,
    spare: SpareQueues,
}

/// Returns what a queued message costs: its bytes and its place.
pub(crate) fn cost(payload: &Payload) -> usize {
    payload.len() + MESSAGE_CHARGE
}

impl Outbox {
    pub(crate) const fn new() -> Self {
        Self {
            nodes: Vec::new(),
            sparse: List::EMPTY,
            bulk: List::EMPTY,
            sparse_left: QUANTUM_BYTES,
            turn: false,
            queued: 0,
            spare: SpareQueues::new(),
        }
    }

    /// Returns the cost of all queues.
    pub(crate) const fn queued(&self) -> usize {
        self.queued
    }

    pub(crate) const fn is_empty(&self) -> bool {
        self.sparse.first == NIL && self.bulk.first == NIL
    }

    /// Returns the cost of what one exchange has queued.
    pub(crate) fn queued_by(&self, index: u32) -> usize {
        self.nodes.get(index as usize).map_or(0, |node| node.queued)
    }

    /// Returns the last message that an exchange has queued.
    pub(crate) fn last_mut(&mut self, index: u32) -> Option<&mut Payload> {
        self.nodes.get_mut(index as usize)?.queue.back_mut()
    }

    /// Queues a message.
    pub(crate) fn push(&mut self, index: u32, payload: Payload) {
        let position = index as usize;
        if self.nodes.len() <= position {
            self.nodes.resize_with(position + 1, Node::default);
        }
        let node = &mut self.nodes[position];
        let cost = cost(&payload);
        self.spare.push(&mut node.queue, payload);
        node.queued += cost;
        self.queued += cost;
        let small = node.queued <= SPARSE_BYTES_MAX;
        match node.class {
            Class::Idle if small => {
                node.class = Class::Sparse { served: false };
                self.sparse.push_back(&mut self.nodes, index);
            }
            Class::Idle => self.make_bulk(index),
            Class::Sparse { served } if served || !small => {
                self.sparse.remove(&mut self.nodes, index);
                self.make_bulk(index);
            }
            Class::Sparse { .. } | Class::Bulk => {}
        }
    }

    /// Drops all that an exchange has queued.
    pub(crate) fn clear(&mut self, index: u32) {
        let Some(node) = self.nodes.get_mut(index as usize) else { return };
        self.spare.keep(std::mem::take(&mut node.queue));
        self.queued -= node.queued;
        node.queued = 0;
        self.make_idle(index);
    }

    /// Gives the queues' memory back where they are many. All of them are empty.
    pub(crate) fn shrink(&mut self) {
        debug_assert_eq!(self.queued, 0, "no exchange is left");
        if self.nodes.len() > NODES_KEPT_MAX {
            self.nodes = Vec::new();
        }
    }

    /// Takes the message whose turn it is.
    pub(crate) fn next(&mut self) -> Option<(u32, Payload)> {
        loop {
            let sparse = self.sparse.first;
            if sparse != NIL && !self.turn && self.sparse_left > 0 {
                return Some(self.next_sparse(sparse));
            }
            let bulk = self.bulk.first;
            if bulk == NIL {
                if sparse == NIL {
                    return None;
                }
                self.end_turn();
                continue;
            }
            if let Some(payload) = self.next_bulk(bulk) {
                return Some((bulk, payload));
            }
        }
    }

    fn next_sparse(&mut self, index: u32) -> (u32, Payload) {
        let (payload, cost) = self.pop(index);
        self.sparse_left = self.sparse_left.saturating_sub(cost);
        let node = &mut self.nodes[index as usize];
        if node.queue.is_empty() {
            self.make_idle(index);
        } else {
            node.class = Class::Sparse { served: true };
        }
        (index, payload)
    }

    /// Goes on with the turn of the first bulk exchange, or ends it.
    fn next_bulk(&mut self, index: u32) -> Option<Payload> {
        let node = &mut self.nodes[index as usize];
        if !self.turn {
            self.turn = true;
            node.deficit += QUANTUM_BYTES;
        }
        let next = cost(node.queue.front().expect("a listed exchange has something queued"));
        if next > node.deficit {
            self.bulk.remove(&mut self.nodes, index);
            self.bulk.push_back(&mut self.nodes, index);
            self.end_turn();
            return None;
        }
        node.deficit -= next;
        let (payload, _) = self.pop(index);
        if self.nodes[index as usize].queue.is_empty() {
            self.make_idle(index);
        }
        Some(payload)
    }

    fn pop(&mut self, index: u32) -> (Payload, usize) {
        let node = &mut self.nodes[index as usize];
        let payload =
            self.spare.pop(&mut node.queue).expect("a listed exchange has something queued");
        let cost = cost(&payload);
        node.queued -= cost;
        self.queued -= cost;
        (payload, cost)
    }

    fn make_bulk(&mut self, index: u32) {
        self.nodes[index as usize].class = Class::Bulk;
        self.bulk.push_back(&mut self.nodes, index);
    }

    fn make_idle(&mut self, index: u32) {
        match self.nodes[index as usize].class {
            Class::Idle => return,
            Class::Sparse { .. } => self.sparse.remove(&mut self.nodes, index),
            Class::Bulk => {
                if self.turn && self.bulk.first == index {
                    self.end_turn();
                }
                self.bulk.remove(&mut self.nodes, index);
            }
        }
        let node = &mut self.nodes[index as usize];
        node.class = Class::Idle;
        node.deficit = 0;
    }

    const fn end_turn(&mut self) {
        self.turn = false;
        self.sparse_left = QUANTUM_BYTES;
    }
}

#[cfg(test)]
mod tests {
    use bytes::Bytes;

    use super::*;

    fn payload(len: usize) -> Payload {
        Payload { field: 31, end: false, head: Bytes::new(), body: Bytes::from(vec![0; len]) }
    }

    fn order(outbox: &mut Outbox, count: usize) -> Vec<u32> {
        (0..count).map_while(|_| outbox.next().map(|(index, _)| index)).collect()
    }

    #[test]
    fn a_sparse_exchange_goes_before_bulk() {
        let mut outbox = Outbox::new();
        for _ in 0..4 {
            outbox.push(0, payload(8000));
        }
        outbox.push(1, payload(100));
        assert_eq!(order(&mut outbox, 2), [1, 0]);
        // Within the bulk turn that has begun it waits for that turn alone.
        outbox.push(1, payload(100));
        assert_eq!(order(&mut outbox, 10), [0, 1, 0, 0]);
    }

    #[test]
    fn a_flood_of_sparse_messages_takes_half_the_lane() {
        let mut outbox = Outbox::new();
        for _ in 0..100 {
            outbox.push(0, payload(QUANTUM_BYTES - 64));
        }
        for index in 1..=1000 {
            outbox.push(index, payload(SPARSE_BYTES_MAX - 64));
        }
        let order = order(&mut outbox, 17 * 20);
        assert_eq!(order.iter().filter(|&&index| index == 0).count(), 20);
    }

    #[test]
    fn bulk_exchanges_share_by_bytes() {
        let mut outbox = Outbox::new();
        for _ in 0..1000 {
            outbox.push(0, payload(1000));
        }
        for _ in 0..100 {
            outbox.push(1, payload(10_000));
        }
        let mut bytes = [0, 0];
        for _ in 0..500 {
            let (index, payload) = outbox.next().unwrap();
            bytes[index as usize] += cost(&payload);
        }
        let difference = usize::abs_diff(bytes[0], bytes[1]);
        assert!(difference <= 2 * QUANTUM_BYTES, "{bytes:?}");
    }

    #[test]
    fn a_message_above_the_quantum_waits_for_its_deficit() {
        let mut outbox = Outbox::new();
        outbox.push(0, payload(100_000));
        for _ in 0..20 {
            outbox.push(1, payload(16_000));
        }
        let order = order(&mut outbox, 21);
        let at = order.iter().position(|&index| index == 0).unwrap();
        assert!((5..=7).contains(&at), "{order:?}");
        assert!(outbox.is_empty());
    }

    #[test]
    fn a_sparse_exchange_that_goes_on_becomes_bulk() {
        let mut outbox = Outbox::new();
        outbox.push(0, payload(200));
        outbox.push(0, payload(200));
        outbox.push(1, payload(200));
        assert_eq!(order(&mut outbox, 1), [0]);
        outbox.push(0, payload(200));
        assert_eq!(order(&mut outbox, 9), [1, 0, 0]);
    }

    #[test]
    fn clear_leaves_nothing_in_any_list() {
        let mut outbox = Outbox::new();
        for index in 0..6 {
            outbox.push(index, payload(if index % 2 == 0 { 10 } else { 20_000 }));
        }
        outbox.next();
        for index in [5, 0, 3, 2, 1, 4] {
            outbox.clear(index);
        }
        outbox.clear(99);
        assert!(outbox.is_empty());
        assert_eq!(outbox.queued(), 0);
        assert_eq!(outbox.next().map(|(index, _)| index), None);
        outbox.push(3, payload(10));
        assert_eq!(order(&mut outbox, 2), [3]);
    }
}

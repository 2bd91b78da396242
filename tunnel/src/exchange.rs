//! The state of one exchange, and the table of all of a lane.

use std::collections::VecDeque;
use std::task::Waker;

use bytes::Bytes;
use slab::Slab;

use crate::credit::{RecvCredit, SendCredit};
use crate::id::RequestId;
use crate::payload::{Payload, Reset};
use crate::spare::SpareQueues;

/// Names an exchange of one lane at this end. A stale key, of an exchange whose slot was freed, is
/// harmless: it names nothing.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
pub struct Key {
    pub(crate) index: u32,
    pub(crate) generation: u32,
}

/// One exchange. Its send queue lies in the outbox.
#[derive(Debug)]
pub(crate) struct Exchange {
    generation: u32,
    pub(crate) id: RequestId,
    /// This end opened it.
    pub(crate) opener: bool,
    /// What its first message is to carry, until that is written. Only at the opener.
    pub(crate) open: Option<Opening>,
    pub(crate) send: Sending,
    pub(crate) recv: Receiving,
    /// Set once nothing more will be sent or read on the wire: why, or `NONE` where both directions
    /// are complete. The id is then in no table.
    pub(crate) closed: Option<Reset>,
    /// Sent once what is queued has been written: the answer is complete, the rest of the question
    /// is not wanted.
    pub(crate) reset_after_queue: Option<Reset>,
    pub(crate) closed_waker: Option<Waker>,
    /// The first byte was written to a service.
    pub(crate) dispatched: bool,
    /// Nothing was and nothing will be written to a service.
    pub(crate) refused: bool,
}

/// What core knows of an exchange, encoded.
#[derive(Debug)]
pub(crate) struct Opening {
    pub(crate) protocol_type: u32,
    pub(crate) record: Bytes,
}

#[derive(Debug)]
pub(crate) struct Sending {
    pub(crate) credit: SendCredit,
    /// The first message, which costs no credit, was queued.
    pub(crate) begun: bool,
    pub(crate) end: SendEnd,
    pub(crate) waker: Option<Waker>,
    /// Stands in the lane's list of those that wait for room in the lane.
    pub(crate) waits_for_lane: bool,
    /// The handle is there.
    pub(crate) handle: bool,
}

#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Debug)]
pub(crate) enum SendEnd {
    Open,
    Queued,
    Written,
}

#[derive(Debug)]
pub(crate) struct Receiving {
    pub(crate) credit: RecvCredit,
    pub(crate) queue: VecDeque<Payload>,
    /// The first message, which costs no credit, came.
    pub(crate) begun: bool,
    /// The first message was taken, so that further ones return credit.
    pub(crate) taken: bool,
    /// The peer's end came.
    pub(crate) ended: bool,
    /// A window message waits in the control queue.
    pub(crate) window_queued: bool,
    pub(crate) waker: Option<Waker>,
    /// The handle is there.
    pub(crate) handle: bool,
}

impl Exchange {
    pub(crate) fn new(id: RequestId, opener: bool, send_window: u64, receive_window: u64) -> Self {
        Self {
            generation: 0,
            id,
            opener,
            open: None,
            send: Sending {
                credit: SendCredit::new(send_window),
                begun: false,
                end: SendEnd::Open,
                waker: None,
                waits_for_lane: false,
                handle: true,
            },
            recv: Receiving {
                credit: RecvCredit::new(receive_window),
                queue: VecDeque::new(),
                begun: false,
                taken: false,
                ended: false,
                window_queued: false,
                waker: None,
                handle: true,
            },
            closed: None,
            reset_after_queue: None,
            closed_waker: None,
            dispatched: false,
            refused: false,
        }
    }

    /// Returns whether the peer knows of it and has not heard of its end.
    pub(crate) const fn is_on_wire(&self) -> bool {
        self.open.is_none() && self.closed.is_none()
    }

    /// Returns whether nothing and nobody needs the slot.
    pub(crate) const fn is_over(&self) -> bool {
        self.closed.is_some() && !self.send.handle && !self.recv.handle
    }
}

/// The exchanges of a lane at this end.
#[derive(Debug, Default)]
pub(crate) struct Exchanges {
    slots: Slab<Exchange>,
    /// For the receive queues.
    spare: SpareQueues,
    /// Of the slot filled last. Wraps after 2^32 exchanges: a key that old has no owner.
    generation: u32,
}

impl Exchanges {
    pub(crate) fn len(&self) -> usize {
        self.slots.len()
    }

    pub(crate) fn insert(&mut self, mut exchange: Exchange) -> Key {
        self.generation = self.generation.wrapping_add(1);
        exchange.generation = self.generation;
        let index = u32::try_from(self.slots.insert(exchange)).expect("exchanges_max is below");
        Key { index, generation: self.generation }
    }

    pub(crate) fn find(&self, key: Key) -> Option<&Exchange> {
        self.slots.get(key.index as usize).filter(|exchange| exchange.generation == key.generation)
    }

    pub(crate) fn find_mut(&mut self, key: Key) -> Option<&mut Exchange> {
        self.slots
            .get_mut(key.index as usize)
            .filter(|exchange| exchange.generation == key.generation)
    }

    /// Returns the key of a slot that is filled.
    pub(crate) fn key(&self, index: u32) -> Option<Key> {
        let exchange = self.slots.get(index as usize)?;
        Some(Key { index, generation: exchange.generation })
    }

    /// Returns the exchange in a slot that a table of the lane names.
    pub(crate) fn at(&mut self, index: u32) -> &mut Exchange {
        self.slots.get_mut(index as usize).expect("tables name filled slots only")
    }

    /// The same, with the spare queues for what it receives.
    pub(crate) fn at_with_spare(&mut self, index: u32) -> (&mut Exchange, &mut SpareQueues) {
        let exchange = self.slots.get_mut(index as usize).expect("tables name filled slots only");
        (exchange, &mut self.spare)
    }

    /// Takes the next message that an exchange has received.
    pub(crate) fn pop_received(&mut self, key: Key) -> Option<Payload> {
        let exchange = self
            .slots
            .get_mut(key.index as usize)
            .filter(|exchange| exchange.generation == key.generation)?;
        self.spare.pop(&mut exchange.recv.queue)
    }

    pub(crate) fn remove(&mut self, index: u32) {
        self.spare.keep(self.slots.remove(index as usize).recv.queue);
        if self.slots.is_empty() && self.slots.capacity() > 1024 {
            self.slots = Slab::new();
        }
    }

    /// Returns the slots that are filled.
    pub(crate) fn indices(&self) -> Vec<u32> {
        self.slots.iter().filter_map(|(index, _)| u32::try_from(index).ok()).collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Thousands of exchanges are at rest at once.
    #[test]
    fn an_exchange_at_rest_is_small() {
        assert!(size_of::<Exchange>() <= 384, "{}", size_of::<Exchange>());
    }

    #[test]
    fn a_slot_that_is_filled_again_has_another_key() {
        let mut exchanges = Exchanges::default();
        let first = exchanges.insert(Exchange::new(RequestId(1), true, 0, 0));
        exchanges.remove(first.index);
        let second = exchanges.insert(Exchange::new(RequestId(3), true, 0, 0));
        assert_eq!(first.index, second.index);
        assert!(exchanges.find(first).is_none());
        assert!(exchanges.find_mut(first).is_none());
        assert!(exchanges.find(second).is_some());
    }
}

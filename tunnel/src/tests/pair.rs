//! Two lanes joined by pipes of bounded size and given latency, on a virtual clock, with bytes cut
//! anywhere.

use std::collections::VecDeque;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::task::{Context, Poll, Wake, Waker};
use std::time::{Duration, Instant};

use bytes::{Bytes, BytesMut};

use crate::{
    Event, Key, Lane, LaneConfig, LaneError, LaneStats, Payload, Received, RequestId, Reset, Side,
    Transmit, proto,
};

/// Counts how often it was woken.
#[derive(Default)]
pub(super) struct Bell(AtomicUsize);

impl Bell {
    pub(super) fn new() -> (Arc<Self>, Waker) {
        let bell = Arc::new(Self::default());
        let waker = Waker::from(Arc::clone(&bell));
        (bell, waker)
    }

    pub(super) fn rings(&self) -> usize {
        self.0.load(Ordering::Relaxed)
    }
}

impl Wake for Bell {
    fn wake(self: Arc<Self>) {
        self.0.fetch_add(1, Ordering::Relaxed);
    }
}

/// Bytes on their way.
struct Pipe {
    /// Arrival and bytes, in order.
    flying: VecDeque<(Instant, Vec<u8>)>,
    held: usize,
    capacity: usize,
}

pub(super) struct End {
    pub(super) lane: Lane,
    out: Transmit,
    input: BytesMut,
    pub(super) events: VecDeque<Event>,
}

impl End {
    fn new(config: LaneConfig, now: Instant) -> Self {
        Self {
            lane: Lane::new(config, now),
            out: Transmit::new(),
            input: BytesMut::new(),
            events: VecDeque::new(),
        }
    }

    pub(super) fn opened(&mut self) -> (Key, RequestId, u32, proto::Open) {
        let at = self
            .events
            .iter()
            .position(|event| matches!(event, Event::Opened { .. }))
            .expect("an exchange was opened");
        match self.events.remove(at) {
            Some(Event::Opened { key, id, protocol_type, open }) => (key, id, protocol_type, open),
            _ => unreachable!("found above"),
        }
    }

    pub(super) fn send(&mut self, key: Key, payload: Payload) -> Poll<Result<(), Reset>> {
        self.lane.poll_send(key, &mut Context::from_waker(Waker::noop()), &mut Some(payload))
    }

    pub(super) fn recv(&mut self, key: Key) -> Poll<Received> {
        self.lane.poll_recv(key, &mut Context::from_waker(Waker::noop()))
    }

    pub(super) fn closed(&mut self, key: Key) -> Poll<Reset> {
        self.lane.poll_closed(key, &mut Context::from_waker(Waker::noop()))
    }

    pub(super) fn drop_handles(&mut self, key: Key) {
        self.lane.drop_send(key);
        self.lane.drop_recv(key);
    }

    pub(super) fn stats(&self) -> LaneStats {
        self.lane.stats()
    }
}

pub(super) struct Pair {
    pub(super) relay: End,
    pub(super) sidecar: End,
    pub(super) now: Instant,
    latency: Duration,
    to_sidecar: Pipe,
    to_relay: Pipe,
    /// Largest piece in which bytes arrive; small ones cut messages anywhere.
    chop: usize,
    next_id: u64,
}

impl Pair {
    pub(super) fn new() -> Self {
        Self::with(|_| {})
    }

    /// A pair whose both configurations were changed by `change`.
    pub(super) fn with(change: impl Fn(&mut LaneConfig)) -> Self {
        let now = Instant::now();
        let end = |side| {
            let mut config = LaneConfig::new(side);
            change(&mut config);
            End::new(config, now)
        };
        let pipe = || Pipe { flying: VecDeque::new(), held: 0, capacity: usize::MAX };
        Self {
            relay: end(Side::Relay),
            sidecar: end(Side::Sidecar),
            now,
            latency: Duration::ZERO,
            to_sidecar: pipe(),
            to_relay: pipe(),
            chop: usize::MAX,
            next_id: 1,
        }
    }

    pub(super) fn latency(mut self, latency: Duration) -> Self {
        self.latency = latency;
        self
    }

    pub(super) fn capacity(mut self, capacity: usize) -> Self {
        self.to_sidecar.capacity = capacity;
        self.to_relay.capacity = capacity;
        self
    }

    pub(super) fn chop(mut self, chop: usize) -> Self {
        self.chop = chop;
        self
    }

    /// Opens an exchange at the relay without sending anything.
    pub(super) fn open(&mut self) -> Key {
        let id = RequestId(self.next_id);
        self.next_id += 2;
        self.relay.lane.open(id, 1, proto::Open::default()).expect("the lane is open")
    }

    /// Opens an exchange, sends its first message, and returns both ends' keys.
    pub(super) fn opened(&mut self) -> (Key, Key) {
        let relay = self.open();
        assert_eq!(self.relay.send(relay, data(b"first")), Poll::Ready(Ok(())));
        self.run();
        let (sidecar, ..) = self.sidecar.opened();
        assert_eq!(self.sidecar.recv(sidecar), Poll::Ready(Received::Message(data(b"first"))));
        (relay, sidecar)
    }

    /// Moves bytes and time until nothing is on its way.
    pub(super) fn run(&mut self) {
        self.try_run().expect("neither end breaks a rule");
    }

    pub(super) fn try_run(&mut self) -> Result<(), LaneError> {
        loop {
            while self.step()? {}
            let arrivals = [&self.to_sidecar, &self.to_relay];
            let next = arrivals.iter().filter_map(|pipe| pipe.flying.front()).map(|&(at, _)| at);
            match next.min() {
                Some(at) => self.now = self.now.max(at),
                None => return Ok(()),
            }
        }
    }

    /// Lets time pass, with both ends' timers.
    pub(super) fn pass(&mut self, duration: Duration) -> Result<(), LaneError> {
        let until = self.now + duration;
        loop {
            self.try_run()?;
            let timeouts = [self.relay.lane.poll_timeout(), self.sidecar.lane.poll_timeout()];
            let next = timeouts.into_iter().flatten().min().unwrap_or(until);
            if next > until {
                self.now = until;
                return Ok(());
            }
            self.now = self.now.max(next);
            self.relay.lane.handle_timeout(self.now)?;
            self.sidecar.lane.handle_timeout(self.now)?;
        }
    }

    /// Moves what can move at this instant; false: nothing could.
    pub(super) fn step(&mut self) -> Result<bool, LaneError> {
        let Self { relay, sidecar, now, latency, to_sidecar, to_relay, chop, .. } = self;
        let mut moved = to_sidecar.fill(relay, *now, *latency, *chop);
        moved |= to_relay.fill(sidecar, *now, *latency, *chop);
        moved |= to_sidecar.drain(sidecar, *now)?;
        moved |= to_relay.drain(relay, *now)?;
        Ok(moved)
    }

    /// Cuts the connection: what is on its way is lost, and what the ends had read in part.
    pub(super) fn cut(&mut self) {
        for end in [&mut self.relay, &mut self.sidecar] {
            end.lane.detach();
            end.out.clear();
            end.input.clear();
        }
        for pipe in [&mut self.to_sidecar, &mut self.to_relay] {
            pipe.flying.clear();
            pipe.held = 0;
        }
    }

    /// Joins the ends again.
    pub(super) fn resume(&mut self) -> Result<(), LaneError> {
        let (relay, sidecar) = (self.relay.lane.received(), self.sidecar.lane.received());
        self.relay.lane.resume(self.now, sidecar)?;
        self.sidecar.lane.resume(self.now, relay)
    }

    /// Hands `bytes` to the relay's end as if the sidecar had sent them.
    pub(super) fn inject_into_relay(&mut self, bytes: &[u8]) -> Result<(), LaneError> {
        self.relay.lane.handle_input(self.now, &mut BytesMut::from(bytes))
    }

    /// Hands `bytes` to the sidecar's end as if the relay had sent them.
    pub(super) fn inject_into_sidecar(&mut self, bytes: &[u8]) -> Result<(), LaneError> {
        let result = self.sidecar.lane.handle_input(self.now, &mut BytesMut::from(bytes));
        self.sidecar.events.extend(std::iter::from_fn(|| self.sidecar.lane.poll_event()));
        result
    }

    /// Nothing is left at either end, and both count the same.
    pub(super) fn assert_empty(&mut self) {
        self.run();
        for end in [&mut self.relay, &mut self.sidecar] {
            let stats = end.stats();
            assert_eq!(stats.exchanges, 0);
            assert_eq!(stats.exchanges_on_wire, 0);
            assert_eq!(stats.send_queued_bytes, 0);
            assert_eq!(stats.receive_queued_bytes, 0);
            assert_eq!(stats.control_queued, 0);
        }
        let (relay, sidecar) = (self.relay.stats(), self.sidecar.stats());
        assert_eq!(relay.sent, sidecar.received);
        assert_eq!(sidecar.sent, relay.received);
        assert_eq!(relay.messages_out, sidecar.messages_in);
        assert_eq!(sidecar.bytes_out, relay.bytes_in);
    }
}

impl Pipe {
    fn fill(&mut self, from: &mut End, now: Instant, latency: Duration, chop: usize) -> bool {
        let mut moved = false;
        while self.held < self.capacity {
            if from.out.is_empty() && !from.lane.poll_transmit(now, &mut from.out, 128 * 1024) {
                break;
            }
            let mut chunks = [std::io::IoSlice::new(&[]); 1];
            from.out.chunks(&mut chunks);
            let count = chunks[0].len().min(self.capacity - self.held).min(chop);
            let bytes = chunks[0][..count].to_vec();
            from.out.advance(count);
            self.held += count;
            self.flying.push_back((now + latency, bytes));
            moved = true;
        }
        moved
    }

    fn drain(&mut self, to: &mut End, now: Instant) -> Result<bool, LaneError> {
        let mut moved = false;
        while self.flying.front().is_some_and(|&(at, _)| at <= now) {
            let (_, bytes) = self.flying.pop_front().expect("looked at above");
            self.held -= bytes.len();
            to.input.extend_from_slice(&bytes);
            to.lane.handle_input(now, &mut to.input)?;
            to.events.extend(std::iter::from_fn(|| to.lane.poll_event()));
            moved = true;
        }
        to.lane.take_wakes().wake();
        Ok(moved)
    }
}

pub(super) fn data(bytes: &[u8]) -> Payload {
    Payload { field: 31, end: false, head: Bytes::new(), body: Bytes::copy_from_slice(bytes) }
}

pub(super) fn last(bytes: &[u8]) -> Payload {
    Payload { end: true, ..data(bytes) }
}

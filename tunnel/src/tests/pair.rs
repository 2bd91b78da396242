//! Two lanes joined by connections of bounded size, given latency and rate, on a virtual clock, with bytes
//! cut anywhere.

use std::collections::VecDeque;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::task::{Context, Poll, Wake, Waker};
use std::time::{Duration, Instant};

use bytes::{Bytes, BytesMut};

use super::connection::{Connection, Phase};
use super::pipe::{Meter, Road};
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

pub(super) struct End {
    pub(super) lane: Lane,
    pub(super) out: Transmit,
    pub(super) input: BytesMut,
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

    /// Takes bytes that came on the lane's connection.
    pub(super) fn takes(&mut self, bytes: &[u8], now: Instant) -> Result<(), LaneError> {
        self.input.extend_from_slice(bytes);
        self.lane.handle_input(now, &mut self.input)?;
        self.events.extend(std::iter::from_fn(|| self.lane.poll_event()));
        self.lane.take_wakes().wake();
        Ok(())
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
    pub(super) road: Road,
    /// The one dialled last is the last.
    pub(super) connections: Vec<Connection>,
    pub(super) at_relay: Meter,
    pub(super) at_sidecar: Meter,
    /// The sidecar dials as soon as it has noticed a loss.
    pub(super) redials: bool,
    /// Of the sidecar's last dial.
    pub(super) attempt: u64,
    /// The newest that the relay has heard.
    pub(super) newest: u64,
    /// Dials that the relay turned away.
    pub(super) stale: usize,
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
        Self {
            relay: end(Side::Relay),
            sidecar: end(Side::Sidecar),
            now,
            road: Road { latency: Duration::ZERO, rate: 0, capacity: usize::MAX, chop: usize::MAX },
            connections: vec![Connection::new(0, Phase::Open, now)],
            at_relay: Meter::default(),
            at_sidecar: Meter::default(),
            redials: false,
            attempt: 0,
            newest: 0,
            stale: 0,
            next_id: 1,
        }
    }

    pub(super) const fn latency(mut self, latency: Duration) -> Self {
        self.road.latency = latency;
        self
    }

    /// Bytes per second, in each direction.
    pub(super) const fn rate(mut self, rate: u64) -> Self {
        self.road.rate = rate;
        self
    }

    pub(super) const fn capacity(mut self, capacity: usize) -> Self {
        self.road.capacity = capacity;
        self
    }

    pub(super) const fn chop(mut self, chop: usize) -> Self {
        self.road.chop = chop;
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
        self.run_until(None)
    }

    /// Moves bytes and time until nothing is on its way, or until then.
    fn run_until(&mut self, until: Option<Instant>) -> Result<(), LaneError> {
        loop {
            while self.step()? {}
            match self.next_move() {
                Some(at) if until.is_none_or(|until| at <= until) => self.now = self.now.max(at),
                _ => return Ok(()),
            }
        }
    }

    /// Returns when something moves again by itself.
    fn next_move(&mut self) -> Option<Instant> {
        let Self { relay, sidecar, connections, now, road, .. } = self;
        let moves = connections.iter().flat_map(|connection| {
            let writable = (!connection.is_cut).then(|| {
                let relay = (connection.relay == Phase::Open)
                    .then(|| connection.to_sidecar.writable(relay, *now, *road));
                let sidecar = (connection.sidecar == Phase::Open)
                    .then(|| connection.to_relay.writable(sidecar, *now, *road));
                [relay.flatten(), sidecar.flatten()]
            });
            let arrivals = [connection.to_relay.arrival(), connection.to_sidecar.arrival()];
            writable.into_iter().flatten().chain(arrivals).flatten()
        });
        moves.min()
    }

    /// Lets time pass, with both ends' timers.
    pub(super) fn pass(&mut self, duration: Duration) -> Result<(), LaneError> {
        let until = self.now + duration;
        loop {
            let timeouts = [self.relay.lane.poll_timeout(), self.sidecar.lane.poll_timeout()];
            let next = timeouts.into_iter().flatten().min().unwrap_or(until).min(until);
            self.run_until(Some(next))?;
            let timeouts = [self.relay.lane.poll_timeout(), self.sidecar.lane.poll_timeout()];
            let due = timeouts.into_iter().flatten().min();
            if due.is_some_and(|due| due < next) {
                continue;
            }
            self.now = self.now.max(next);
            if due.is_none_or(|due| due > until) && next == until {
                return Ok(());
            }
            self.relay.lane.handle_timeout(self.now)?;
            self.sidecar.lane.handle_timeout(self.now)?;
        }
    }

    /// Moves what can move at this instant; false: nothing could.
    pub(super) fn step(&mut self) -> Result<bool, LaneError> {
        let mut moved = false;
        for at in 0..self.connections.len() {
            moved |= self.step_connection(at)?;
        }
        let over = |connection: &Connection| {
            connection.relay == Phase::Gone && connection.sidecar == Phase::Gone
        };
        self.connections.retain(|connection| !over(connection));
        Ok(moved)
    }

    /// Cuts the connection: what is on its way is lost, and what the ends had read in part.
    pub(super) fn cut(&mut self) {
        self.cut_at(0, 0);
        self.step().expect("nothing more comes");
    }

    /// Joins the ends again.
    pub(super) fn resume(&mut self) -> Result<(), LaneError> {
        self.connections = vec![Connection::new(self.attempt, Phase::Open, self.now)];
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
        if relay.resumes == 0 {
            assert_eq!(relay.messages_out, sidecar.messages_in);
            assert_eq!(sidecar.bytes_out, relay.bytes_in);
        }
    }
}

pub(super) fn data(bytes: &[u8]) -> Payload {
    Payload { field: 31, end: false, head: Bytes::new(), body: Bytes::copy_from_slice(bytes) }
}

pub(super) fn last(bytes: &[u8]) -> Payload {
    Payload { end: true, ..data(bytes) }
}

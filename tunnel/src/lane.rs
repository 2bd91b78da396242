//! One lane: the exchanges it carries, what waits to be sent, and what its peer is allowed.
//!
//! Owns the tables of exchanges, credit, the order of sending and the counting of messages. Knows no
//! socket and no clock: bytes come in by `handle_input` and go out by `poll_transmit`, time is an
//! argument, and tasks are woken by whoever holds the lane's lock, after releasing it
//! ([`Lane::take_wakes`]).

use std::collections::{HashMap, VecDeque};
use std::task::{Context, Poll, Waker};
use std::time::Instant;

use bytes::Bytes;
use prost::Message;
use sidelane_abi::{MESSAGE_BYTES_MAX, OPEN_BYTES_MAX, failure};

use crate::acknowledge::Acknowledge;
use crate::control::{Control, ControlQueue};
use crate::credit::{MESSAGE_CHARGE, charge};
use crate::envelope::field;
use crate::exchange::{Exchange, Exchanges, Key, Opening, SendEnd};
use crate::id::{IdHashes, RequestId};
use crate::liveness::{Due, Liveness};
use crate::outbox::{self, Outbox};
use crate::payload::{Payload, Received, Reset};
use crate::proto;
use crate::replay::Replay;
use crate::wakes::{Wakes, register};

mod config;
mod error;
mod event;
mod input;
mod output;
mod resume;
mod suspicion;

pub use config::{LaneConfig, Pressure};
pub use error::{LaneError, OpenError};
pub use event::{Event, Fate, LaneStats};
use suspicion::Suspicion;

/// Bytes that one exchange may have queued before its sender waits: two data messages, so that a slow
/// lane pushes back at once and a fast one finds a few quanta to write. A larger message waits until
/// it is alone.
pub const SEND_QUEUE_BYTES_MAX: usize = 2 * (MESSAGE_BYTES_MAX + MESSAGE_CHARGE);

/// Largest encoded `Open`. With the largest first payload it fits the smallest message that a peer
/// may refuse to exceed ([`crate::MESSAGE_BYTES_MIN`]).
pub const OPEN_RECORD_BYTES_MAX: usize = 15 * 1024;

/// Control messages that each exchange may have waiting: dispatched, its end, and a window. Without a
/// carrier, or with a full ring, all may wait at once.
const CONTROL_PER_EXCHANGE: usize = 3;

/// Room in the control queue beside those.
const CONTROL_SPARE: usize = 256;

/// Tunnels, routes and what else stands in an announcement, and reasons and notes in an answer: above what
/// any relay takes.
const ENTRIES_MAX: usize = 16 * 1024;

/// Room in the event queue beside one event for each exchange.
const EVENTS_SPARE: usize = 256;

/// One end of a lane. Shown by its numbers: what it holds are others' bytes, credentials among them.
pub struct Lane {
    config: LaneConfig,
    exchanges: Exchanges,
    /// Invariant: names exactly the exchanges that are not `closed`.
    ids: HashMap<RequestId, u32, IdHashes>,
    outbox: Outbox,
    control: ControlQueue,
    events: VecDeque<Event>,
    /// Senders that wait until the lane's own send queue is below its bound. Invariant: holds the
    /// exchanges with `waits_for_lane`, and stale keys of some that are gone.
    waiting: VecDeque<Key>,
    liveness: Liveness,
    /// The latest time that was told.
    now: Instant,
    driver: Option<Waker>,
    wakes: Wakes,
    closed: Option<Reset>,
    /// We have said go-away.
    draining: bool,
    /// The peer has said go-away.
    peer_draining: bool,
    /// Cost of all receive queues.
    receive_queued: u64,
    pressure: Pressure,
    /// There is a carrier.
    attached: bool,
    replay: Replay,
    acknowledge: Acknowledge,
    suspicion: Suspicion,
    resumes: u64,
    replayed: u64,
    replayed_bytes: u64,
    sent: u64,
    received: u64,
    acknowledged: u64,
    bytes_in: u64,
    bytes_out: u64,
    messages_in: u64,
    messages_out: u64,
    late: u64,
    opens_refused: u64,
    violations: u64,
}

impl std::fmt::Debug for Lane {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Lane")
            .field("side", &self.config.side)
            .field("closed", &self.closed)
            .field("stats", &self.stats())
            .finish_non_exhaustive()
    }
}

impl Lane {
    /// Returns a lane whose handshake is over. The first [`Lane::handle_timeout`] is due at once: it
    /// sends the ping that measures the round trip.
    #[must_use]
    pub fn new(config: LaneConfig, now: Instant) -> Self {
        let control_max = config.exchanges_max.saturating_mul(CONTROL_PER_EXCHANGE);
        let control_max = control_max.saturating_add(CONTROL_SPARE);
        Self {
            exchanges: Exchanges::default(),
            ids: HashMap::default(),
            outbox: Outbox::new(),
            control: ControlQueue::new(control_max),
            events: VecDeque::new(),
            waiting: VecDeque::new(),
            liveness: Liveness::new(now, config.ping_idle, config.dead_after),
            now,
            driver: None,
            wakes: Wakes::default(),
            closed: None,
            draining: false,
            peer_draining: false,
            receive_queued: 0,
            pressure: Pressure::None,
            attached: true,
            replay: Replay::new(
                config.replay_bytes_min,
                config.replay_bytes_max,
                config.replay_budget.clone(),
            ),
            acknowledge: Acknowledge::new(config.replay_bytes_max > 0),
            suspicion: Suspicion::default(),
            resumes: 0,
            replayed: 0,
            replayed_bytes: 0,
            sent: 0,
            received: 0,
            acknowledged: 0,
            bytes_in: 0,
            bytes_out: 0,
            messages_in: 0,
            messages_out: 0,
            late: 0,
            opens_refused: 0,
            violations: 0,
            config,
        }
    }

    // --- exchanges -------------------------------------------------------------------------------

    /// Opens an exchange. Nothing is sent before its first message or its end, which carries `open`.
    /// The caller has two handles from here on, and drops each. `open.window`, where set, is the
    /// receive window of this exchange instead of the lane's.
    ///
    /// # Errors
    ///
    /// See [`OpenError`]; nothing is kept.
    pub fn open(
        &mut self,
        id: RequestId,
        protocol_type: u32,
        mut open: proto::Open,
    ) -> Result<Key, OpenError> {
        if self.closed.is_some() {
            return Err(OpenError::Closed);
        }
        if self.draining || self.peer_draining {
            return Err(OpenError::GoingAway);
        }
        if self.is_overloaded() {
            return Err(OpenError::Overloaded);
        }
        if id.made_by() != self.config.side || id.0 == 0 || self.ids.contains_key(&id) {
            return Err(OpenError::InvalidId(id));
        }
        let named = protocol_type >= crate::PROTOCOL_NUMBER_NAMED_MIN;
        open.protocol_number = if named { protocol_type } else { 0 };
        let bytes = open.encoded_len();
        if bytes > OPEN_RECORD_BYTES_MAX {
            return Err(OpenError::TooLarge { bytes });
        }
        let receive_window = match open.window {
            0 => self.config.receive_window,
            window => window.max(crate::credit::WINDOW_MIN),
        };
        if open.window != 0 {
            open.window = receive_window;
        }
        let mut exchange = Exchange::new(id, true, self.config.send_window, receive_window);
        exchange.open = Some(Opening {
            protocol_type: if named { 0 } else { protocol_type },
            record: Bytes::from(open.encode_to_vec()),
        });
        let key = self.exchanges.insert(exchange);
        self.ids.insert(id, key.index);
        Ok(key)
    }

    /// The exchange's id; `None`: it is gone.
    #[must_use]
    pub fn request_id(&self, key: Key) -> Option<RequestId> {
        self.exchanges.find(key).map(|exchange| exchange.id)
    }

    /// Queues the payload and leaves `None`, or leaves it and returns `Pending` while there is no
    /// credit, or too much queued by the exchange or the lane.
    ///
    /// # Errors
    ///
    /// `Err` says how the exchange ended; the payload stays. A payload above
    /// [`sidelane_abi::OPEN_BYTES_MAX`] resets the exchange with `TOO_LARGE`; sending after the end or
    /// with a field that is not a protocol's resets it with `INTERNAL`.
    pub fn poll_send(
        &mut self,
        key: Key,
        cx: &mut Context<'_>,
        payload: &mut Option<Payload>,
    ) -> Poll<Result<(), Reset>> {
        let Some(exchange) = self.exchanges.find_mut(key) else {
            return Poll::Ready(Err(Reset::new(failure::CANCELLED)));
        };
        let Some(next) = payload.as_ref() else { return Poll::Ready(Ok(())) };
        if let Some(reset) = exchange.closed {
            return Poll::Ready(Err(reset));
        }
        let first = !exchange.send.begun;
        let is_protocol = (field::PROTOCOL_FIRST..=field::CUSTOM).contains(&next.field);
        let fault = if next.len() > OPEN_BYTES_MAX {
            Some(failure::TOO_LARGE)
        } else if exchange.send.end != SendEnd::Open || !is_protocol {
            Some(failure::INTERNAL)
        } else {
            None
        };
        if let Some(code) = fault {
            let reset = Reset::new(code);
            self.reset(key, reset);
            return Poll::Ready(Err(reset));
        }
        let charge = if first { 0 } else { charge(next.len()) };
        let queued = self.outbox.queued_by(key.index);
        let room = queued == 0 || queued + outbox::cost(next) <= SEND_QUEUE_BYTES_MAX;
        if !room || !exchange.send.credit.has(charge) {
            register(&mut exchange.send.waker, cx.waker());
            return Poll::Pending;
        }
        if self.outbox.queued() as u64 >= self.config.queued_bytes_max {
            register(&mut exchange.send.waker, cx.waker());
            if !exchange.send.waits_for_lane {
                exchange.send.waits_for_lane = true;
                self.waiting.push_back(key);
            }
            return Poll::Pending;
        }
        let next = payload.take().expect("looked at above");
        exchange.send.begun = true;
        exchange.send.credit.take(charge);
        if next.end {
            exchange.send.end = SendEnd::Queued;
        }
        self.outbox.push(key.index, next);
        self.wake_driver();
        Poll::Ready(Ok(()))
    }

    /// Ends the direction from here, where no message with `end` did. Needs no credit.
    pub fn finish(&mut self, key: Key) {
        let Some(exchange) = self.exchanges.find_mut(key) else { return };
        if exchange.closed.is_some() || exchange.send.end != SendEnd::Open {
            return;
        }
        exchange.send.end = SendEnd::Queued;
        exchange.send.begun = true;
        match self.outbox.last_mut(key.index) {
            Some(last) => last.end = true,
            None => self.outbox.push(key.index, Payload { end: true, ..Payload::default() }),
        }
        self.wake_driver();
    }

    /// Ends the exchange, both directions: what is queued in either is dropped, and the peer is told.
    /// With the code `NONE` all was said, and what is queued for the peer goes out first.
    pub fn reset(&mut self, key: Key, reset: Reset) {
        let Some(exchange) = self.exchanges.find_mut(key) else { return };
        if exchange.closed.is_some() {
            return;
        }
        if reset.code == failure::NONE && self.outbox.queued_by(key.index) > 0 {
            exchange.reset_after_queue = Some(reset);
            self.drop_received(key);
            return;
        }
        // What was received is not wanted, its end neither.
        exchange.recv.ended = false;
        let control = Control::Reset { id: exchange.id, reset };
        self.end_with(key.index, reset, control);
    }

    /// Tells the opener that the first byte of the exchange was written to a service. Once; later
    /// calls do nothing.
    pub fn dispatched(&mut self, key: Key) {
        let Some(exchange) = self.exchanges.find_mut(key) else { return };
        if exchange.opener || exchange.dispatched || exchange.closed.is_some() {
            return;
        }
        exchange.dispatched = true;
        let id = exchange.id;
        self.push_control(Control::Dispatched { id });
    }

    /// Tells the opener that nothing of the exchange was or will be written to a service, and ends
    /// it. After [`Lane::dispatched`], or at the opener's end, it is a reset.
    pub fn refused(&mut self, key: Key, reset: Reset) {
        let Some(exchange) = self.exchanges.find_mut(key) else { return };
        if exchange.opener || exchange.dispatched {
            self.reset(key, reset);
            return;
        }
        if exchange.closed.is_some() {
            return;
        }
        exchange.refused = true;
        exchange.recv.ended = false;
        let control = Control::Refused { id: exchange.id, code: reset.code };
        self.end_with(key.index, reset, control);
    }

    /// Takes the next message, and returns its credit to the peer. What came before a reset is
    /// yielded before it.
    pub fn poll_recv(&mut self, key: Key, cx: &mut Context<'_>) -> Poll<Received> {
        if let Some(payload) = self.exchanges.pop_received(key) {
            self.receive_queued -= outbox::cost(&payload) as u64;
            self.return_credit(key, &payload);
            return Poll::Ready(Received::Message(payload));
        }
        let Some(exchange) = self.exchanges.find_mut(key) else {
            return Poll::Ready(Received::Reset(Reset::new(failure::CANCELLED)));
        };
        if exchange.recv.ended {
            return Poll::Ready(Received::Finished);
        }
        if let Some(reset) = exchange.closed {
            return Poll::Ready(Received::Reset(reset));
        }
        register(&mut exchange.recv.waker, cx.waker());
        Poll::Pending
    }

    /// Ready once the exchange is over on the wire: reset, refused, lost with its lane; or complete
    /// in both directions, with the code `NONE`. Does not wait for what was received to be taken.
    pub fn poll_closed(&mut self, key: Key, cx: &mut Context<'_>) -> Poll<Reset> {
        let Some(exchange) = self.exchanges.find_mut(key) else {
            return Poll::Ready(Reset::new(failure::CANCELLED));
        };
        match exchange.closed {
            Some(reset) => Poll::Ready(reset),
            None => {
                register(&mut exchange.closed_waker, cx.waker());
                Poll::Pending
            }
        }
    }

    /// The sending handle is gone. Without an end queued the exchange is reset with `CANCELLED`.
    pub fn drop_send(&mut self, key: Key) {
        let Some(exchange) = self.exchanges.find_mut(key) else { return };
        exchange.send.handle = false;
        exchange.send.waker = None;
        exchange.closed_waker = None;
        if exchange.send.end == SendEnd::Open && exchange.reset_after_queue.is_none() {
            self.reset(key, Reset::new(failure::CANCELLED));
        }
        self.free(key.index, key);
    }

    /// The receiving handle is gone. Without the peer's end the exchange is reset: with `CANCELLED`;
    /// or with `NONE` where this end has answered and finished, since an early answer that makes the
    /// rest of the question needless is no failure. What is queued goes out first, so that the answer
    /// arrives whole.
    pub fn drop_recv(&mut self, key: Key) {
        let Some(exchange) = self.exchanges.find_mut(key) else { return };
        exchange.recv.handle = false;
        exchange.recv.waker = None;
        self.drop_received(key);
        let Some(exchange) = self.exchanges.find_mut(key) else { return };
        if exchange.closed.is_none() && exchange.reset_after_queue.is_none() && !exchange.recv.ended
        {
            let answered = !exchange.opener && exchange.send.end != SendEnd::Open;
            let reset = Reset::new(if answered { failure::NONE } else { failure::CANCELLED });
            if answered && exchange.send.end == SendEnd::Queued {
                exchange.reset_after_queue = Some(reset);
            } else {
                self.reset(key, reset);
            }
        }
        self.free(key.index, key);
    }

    /// Returns how many slots are filled.
    #[must_use]
    pub fn exchanges(&self) -> usize {
        self.exchanges.len()
    }

    /// Returns whether the peer has written the first byte of the exchange to a service.
    #[must_use]
    pub fn is_dispatched(&self, key: Key) -> bool {
        self.exchanges.find(key).is_some_and(|exchange| exchange.dispatched)
    }

    /// Returns whether nothing of the exchange reached a service, nor ever will: it was refused, or
    /// ended before its first message was written. It may then go elsewhere.
    #[must_use]
    pub fn is_refused(&self, key: Key) -> bool {
        self.exchanges.find(key).is_some_and(|exchange| {
            exchange.refused || (exchange.closed.is_some() && exchange.open.is_some())
        })
    }

    /// Returns how an exchange stands, for whoever may send it elsewhere; `None`: the key is stale.
    #[must_use]
    pub fn fate(&self, key: Key) -> Option<Fate> {
        self.exchanges.find(key).map(|exchange| Fate {
            closed: exchange.closed,
            refused: self.is_refused(key),
            dispatched: exchange.dispatched,
            answered: exchange.recv.begun || exchange.recv.ended,
        })
    }

    // --- the session's messages --------------------------------------------------------------------

    /// Sends what this end serves, in place of what it said of that before and has not been sent. False: it
    /// is longer than the peer accepts, and is not sent.
    pub fn announce(&mut self, announce: proto::Announce) -> bool {
        let Some(bytes) = self.document(&announce) else { return false };
        if self.closed.is_none() {
            self.control.push_announcement(bytes);
            self.wake_driver();
        }
        true
    }

    /// Answers an announcement. False: it is longer than the peer accepts, and is not sent.
    pub fn announced(&mut self, announced: proto::Announced) -> bool {
        self.push_document(field::ANNOUNCED, &announced)
    }

    /// Presents another credential. False: it is longer than the peer accepts, and is not sent.
    pub fn authenticate(&mut self, authenticate: proto::Authenticate) -> bool {
        self.push_document(field::AUTHENTICATE, &authenticate)
    }

    /// Answers another credential. False: it is longer than the peer accepts, and is not sent.
    pub fn authenticated(&mut self, authenticated: proto::Authenticated) -> bool {
        self.push_document(field::AUTHENTICATED, &authenticated)
    }

    /// Says that no new exchanges are to come on this lane: the peer's are refused with `DRAINING`
    /// from here on, ours fail. Those that run go on.
    pub fn go_away(&mut self, go_away: proto::GoAway) {
        self.draining = true;
        self.push_document(field::GO_AWAY, &go_away);
    }

    /// Returns whether an exchange opened here would fail, since one of the ends is leaving.
    #[must_use]
    pub const fn is_leaving(&self) -> bool {
        self.closed.is_some() || self.draining || self.peer_draining
    }

    /// Asks for no new exchanges on this lane, and still takes those that the peer opened before it heard
    /// of it: for a lane whose place another has taken, where nobody is to notice.
    pub fn ask_away(&mut self, go_away: proto::GoAway) {
        self.push_document(field::GO_AWAY, &go_away);
    }

    // --- events, time, end --------------------------------------------------------------------------

    /// Takes the next event.
    pub fn poll_event(&mut self) -> Option<Event> {
        self.events.pop_front()
    }

    /// Returns when [`Lane::handle_timeout`] is due; `None` without a carrier, and once the lane is
    /// closed.
    #[must_use]
    pub fn poll_timeout(&self) -> Option<Instant> {
        if self.closed.is_some() || !self.attached {
            return None;
        }
        let others = [self.acknowledge.poll_timeout(), self.suspicion.poll_timeout()];
        others.into_iter().flatten().fold(self.liveness.poll_timeout(), Instant::min).into()
    }

    /// Sends a ping where one is due. Calling it early does nothing.
    ///
    /// # Errors
    ///
    /// [`LaneError::Dead`] where no byte came for too long.
    pub fn handle_timeout(&mut self, now: Instant) -> Result<(), LaneError> {
        self.now = self.now.max(now);
        if self.closed.is_some() || !self.attached {
            return Ok(());
        }
        if self.acknowledge.handle_timeout(now) {
            self.push_control(Control::Ack);
        }
        let last_input = self.liveness.last_input();
        if self.suspicion.handle_timeout(self.now, self.liveness.rtt(), last_input) {
            self.push_event(Event::Suspect(true))?;
        }
        match self.liveness.handle_timeout(now) {
            Due::Nothing => {}
            Due::Ping(token) => {
                self.replay.rest();
                self.watch_outstanding();
                self.push_control(Control::Ping { token });
            }
            Due::Dead => return Err(LaneError::Dead(self.config.dead_after)),
        }
        self.check_control()
    }

    /// Ends the lane: its transport is lost, or it is no longer wanted. Every exchange ends with
    /// `reset`; what was received can still be taken. Nothing is sent from here on.
    pub fn close(&mut self, reset: Reset) {
        if self.closed.is_some() {
            return;
        }
        self.closed = Some(reset);
        for index in self.exchanges.indices() {
            if self.exchanges.at(index).closed.is_none() {
                self.end(index, reset);
            }
        }
        self.control.clear();
        self.replay.clear();
        self.waiting = VecDeque::new();
        self.wake_driver();
    }

    /// Ends every exchange with `reset`, and drops what was received of them. The lane goes on: what it
    /// has to say for itself is sent.
    pub fn end_exchanges(&mut self, reset: Reset) {
        for index in self.exchanges.indices() {
            let exchange = self.exchanges.at(index);
            if exchange.closed.is_none() {
                let queue = std::mem::take(&mut exchange.recv.queue);
                self.receive_queued -= queue.iter().map(outbox::cost).sum::<usize>() as u64;
                self.end(index, reset);
            }
        }
    }

    /// Returns how the lane was closed.
    #[must_use]
    pub const fn closed(&self) -> Option<Reset> {
        self.closed
    }

    /// Keeps the waker of the task that drives the lane; it is woken once there is something to
    /// transmit. To be called after [`Lane::poll_transmit`] had nothing, under the same lock.
    pub fn register_driver(&mut self, waker: &Waker) {
        register(&mut self.driver, waker);
    }

    /// Returns whether there is something to transmit that may be sent now.
    #[must_use]
    pub fn wants_transmit(&mut self) -> bool {
        self.attached
            && (self.control.has_urgent() || self.replay.is_behind() || self.may_send_counted())
    }

    /// Returns whether something counted and new waits that may be sent now.
    fn may_send_counted(&mut self) -> bool {
        (self.control.has_counted() || !self.outbox.is_empty()) && self.replay.has_room()
    }

    /// Returns whether nothing waits to be sent, now or later.
    #[must_use]
    pub fn is_drained(&self) -> bool {
        self.control.len() == 0 && self.outbox.is_empty() && !self.replay.is_behind()
    }

    /// Returns whether [`Lane::take_wakes`] has any.
    #[must_use]
    pub const fn has_wakes(&self) -> bool {
        !self.wakes.is_empty()
    }

    /// Takes the wakers of all who can go on. The caller wakes them after releasing the lane's lock.
    pub fn take_wakes(&mut self) -> Wakes {
        std::mem::take(&mut self.wakes)
    }

    /// Returns the lane's numbers.
    #[must_use]
    pub fn stats(&self) -> LaneStats {
        LaneStats {
            exchanges: self.exchanges.len(),
            exchanges_on_wire: self.ids.len(),
            bytes_in: self.bytes_in,
            bytes_out: self.bytes_out,
            received: self.received,
            sent: self.sent,
            acknowledged: self.acknowledged,
            messages_in: self.messages_in,
            messages_out: self.messages_out,
            late: self.late,
            opens_refused: self.opens_refused,
            violations: self.violations,
            send_queued_bytes: self.outbox.queued() as u64,
            receive_queued_bytes: self.receive_queued,
            control_queued: self.control.len(),
            rtt: self.liveness.rtt(),
            replay_bytes: self.replay.bytes(),
            replay_limit: self.replay.limit(),
            resumes: self.resumes,
            replayed: self.replayed,
            replayed_bytes: self.replayed_bytes,
        }
    }

    // --- inside -----------------------------------------------------------------------------------

    fn is_overloaded(&self) -> bool {
        self.pressure == Pressure::Full
            || self.exchanges.len() >= self.config.exchanges_max
            || self.receive_queued >= self.config.queued_bytes_max
            || self.outbox.queued() as u64 >= self.config.queued_bytes_max
    }

    fn return_credit(&mut self, key: Key, payload: &Payload) {
        let Some(exchange) = self.exchanges.find_mut(key) else { return };
        let first = !exchange.recv.taken;
        exchange.recv.taken = true;
        if first || payload.field == 0 || exchange.recv.ended || exchange.closed.is_some() {
            return;
        }
        let has_room = self.receive_queued <= self.config.queued_bytes_max / 2;
        if has_room && self.pressure == Pressure::None {
            exchange.recv.credit.tune(self.now, self.liveness.rtt(), self.config.window_max);
        }
        let due = exchange.recv.credit.consume(charge(payload.len()));
        if due && !exchange.recv.window_queued {
            exchange.recv.window_queued = true;
            self.push_control(Control::Window(key));
        }
    }

    /// Drops what was received and not taken.
    fn drop_received(&mut self, key: Key) {
        let Some(exchange) = self.exchanges.find_mut(key) else { return };
        let queue = std::mem::take(&mut exchange.recv.queue);
        let bytes: usize = queue.iter().map(outbox::cost).sum();
        self.receive_queued -= bytes as u64;
    }

    /// Ends an exchange by our own will: what was received is dropped and, where the peer knows of
    /// it, the peer is told.
    fn end_with(&mut self, index: u32, reset: Reset, control: Control) {
        let exchange = self.exchanges.at(index);
        let tell = exchange.is_on_wire();
        let bytes: usize = std::mem::take(&mut exchange.recv.queue).iter().map(outbox::cost).sum();
        self.receive_queued -= bytes as u64;
        if tell {
            self.push_control(control);
        }
        self.end(index, reset);
    }

    /// Ends an exchange on the wire: its id is forgotten, what it has to send is dropped, whoever
    /// waits is woken.
    fn end(&mut self, index: u32, reset: Reset) {
        let exchange = self.exchanges.at(index);
        debug_assert!(exchange.closed.is_none(), "an exchange ends once");
        exchange.closed = Some(reset);
        self.ids.remove(&exchange.id);
        self.wakes.push_from(&mut exchange.send.waker);
        self.wakes.push_from(&mut exchange.recv.waker);
        self.wakes.push_from(&mut exchange.closed_waker);
        self.outbox.clear(index);
        if exchange.is_over() {
            self.remove(index);
        }
        self.wake_waiting();
    }

    /// Frees the slot where nothing needs it; `key` may be stale.
    fn free(&mut self, index: u32, key: Key) {
        if self.exchanges.find(key).is_some_and(Exchange::is_over) {
            self.remove(index);
        }
    }

    fn remove(&mut self, index: u32) {
        self.exchanges.remove(index);
        if self.exchanges.len() == 0 {
            self.outbox.shrink();
        }
    }

    fn push_control(&mut self, control: Control) {
        if self.closed.is_none() {
            self.control.push(control);
            self.wake_driver();
        }
    }

    fn push_document(&mut self, number: u32, message: &impl Message) -> bool {
        let Some(bytes) = self.document(message) else { return false };
        self.push_control(Control::Document { field: number, bytes });
        true
    }

    /// The encoded message; `None`: it is longer than the peer accepts.
    fn document(&self, message: &impl Message) -> Option<Bytes> {
        // The longest envelope of control: two bytes of key, five of length.
        let bytes = message.encoded_len() + 8;
        let fits = bytes as u64 <= u64::from(self.config.peer_message_bytes_max);
        fits.then(|| Bytes::from(message.encode_to_vec()))
    }

    const fn check_control(&self) -> Result<(), LaneError> {
        if self.control.has_overflowed() {
            return Err(LaneError::ControlFlood { max: self.control.max() });
        }
        Ok(())
    }

    /// Says how much is queued beside this lane. Holds until it is said anew.
    pub const fn set_pressure(&mut self, pressure: Pressure) {
        self.pressure = pressure;
    }

    /// Wakes the driver though nothing new is to be sent.
    pub fn wake_driver(&mut self) {
        self.wakes.push_from(&mut self.driver);
    }
}

//! What must hold of a lane for any bytes and any calls, in any order. Shared by the property test, the
//! replay of the corpus and the fuzz target, so it uses the crate's public face alone.

use std::io::IoSlice;
use std::sync::Arc;
use std::task::{Context, Poll, Waker};
use std::time::{Duration, Instant};

use bytes::{Bytes, BytesMut};
use sidelane_tunnel::envelope::{self, Envelope, field};
use sidelane_tunnel::{
    Acceptor, Budget, Dialler, Event, First, Key, Lane, LaneConfig, LaneStats, Payload, RequestId,
    Reset, SEND_QUEUE_BYTES_MAX, Side, Transmit, proto,
};

const EXCHANGES_MAX: usize = 8;
const QUEUED_BYTES_MAX: u64 = 64 * 1024;
const RING_BYTES_MAX: u64 = 16 * 1024;
/// The longest message, its open record and its envelope.
const MESSAGE_BYTES_MAX: u64 = 128 * 1024;
/// What an unread exchange may hold: three and a half windows and the first message.
const RECEIVED_BYTES_MAX: u64 = 7 * 64 * 1024 / 2 + MESSAGE_BYTES_MAX;

/// Takes `input` as calls of a lane, and looks after each whether its promises hold.
pub(crate) fn check(input: &[u8]) {
    let mut input = Input(input);
    let Some(setup) = input.byte() else { return };
    let mut run = Run::new(setup);
    while let Some(call) = input.byte() {
        run.call(call, &mut input);
        run.assert_promises();
    }
    run.lane.close(Reset::new(1));
    assert_eq!(run.lane.stats().replay_bytes, 0);
    drop(run.lane);
    assert_eq!(run.budget.used(), 0);
}

struct Input<'a>(&'a [u8]);

impl<'a> Input<'a> {
    fn byte(&mut self) -> Option<u8> {
        let (&first, rest) = self.0.split_first()?;
        self.0 = rest;
        Some(first)
    }

    fn number(&mut self) -> u8 {
        self.byte().unwrap_or_default()
    }

    fn slice(&mut self, len: usize) -> &'a [u8] {
        let (slice, rest) = self.0.split_at(len.min(self.0.len()));
        self.0 = rest;
        slice
    }
}

struct Run {
    lane: Lane,
    budget: Arc<Budget>,
    now: Instant,
    input: BytesMut,
    keys: Vec<Key>,
    before: LaneStats,
    next_id: u64,
}

impl Run {
    fn new(setup: u8) -> Self {
        let now = Instant::now();
        let budget = Arc::new(Budget::new(u64::from(setup & 2) * 64 * 1024));
        let mut config = LaneConfig::new(if setup & 1 == 0 { Side::Relay } else { Side::Sidecar });
        config.receive_window = 64 * 1024;
        config.window_max = 64 * 1024;
        config.exchanges_max = EXCHANGES_MAX;
        config.queued_bytes_max = QUEUED_BYTES_MAX;
        config.message_bytes_max = 256 * 1024;
        if setup & 4 == 0 {
            config.replay_bytes_min = 1024;
            config.replay_bytes_max = RING_BYTES_MAX;
            config.replay_budget = Some(Arc::clone(&budget));
        }
        let next_id = if setup & 1 == 0 { 1 } else { 2 };
        let lane = Lane::new(config, now);
        let before = lane.stats();
        Self { lane, budget, now, input: BytesMut::new(), keys: Vec::new(), before, next_id }
    }

    fn key(&self, number: u8) -> Option<Key> {
        self.keys.get(usize::from(number) % self.keys.len().max(1)).copied()
    }

    fn call(&mut self, call: u8, input: &mut Input<'_>) {
        let mut cx = Context::from_waker(Waker::noop());
        match call % 20 {
            0 => {
                let len = usize::from(input.number());
                self.feed(input.slice(len));
            }
            1 => self.message(input),
            2 => self.transmit(usize::from(input.number()) * 64),
            3 => {
                self.lane.detach();
                self.input.clear();
            }
            4 => self.resume(input.number()),
            5 => {
                self.now += Duration::from_millis(u64::from(input.number()) * 40);
                if self.lane.handle_timeout(self.now).is_err() {
                    self.lane.close(Reset::new(2));
                }
            }
            6 => {
                let id = RequestId(self.next_id);
                let number = u32::from(input.number());
                if let Ok(key) = self.lane.open(id, number, proto::Open::default()) {
                    self.next_id += 2;
                    self.keys.push(key);
                }
            }
            7 => {
                let len = usize::from(input.number()) * usize::from(input.number());
                let end = input.number() == 0;
                let body = Bytes::from(vec![0; len]);
                let Some(key) = self.key(input.number()) else { return };
                let payload = Payload { field: field::CUSTOM, end, head: Bytes::new(), body };
                let _ = self.lane.poll_send(key, &mut cx, &mut Some(payload));
            }
            8 => {
                let Some(key) = self.key(input.number()) else { return };
                let _ = self.lane.poll_recv(key, &mut cx);
                let _ = self.lane.poll_closed(key, &mut cx);
            }
            9..=15 => {
                let Some(key) = self.key(input.number()) else { return };
                match call % 20 {
                    9 => self.lane.finish(key),
                    10 => self.lane.reset(key, Reset::new(u32::from(input.number()))),
                    11 => self.lane.drop_send(key),
                    12 => self.lane.drop_recv(key),
                    13 => self.lane.dispatched(key),
                    14 => self.lane.refused(key, Reset::new(3)),
                    _ => {
                        self.lane.drop_send(key);
                        self.lane.drop_recv(key);
                        self.keys.retain(|known| *known != key);
                    }
                }
            }
            16 => {
                let reasons = vec!["x".repeat(usize::from(input.number()))];
                self.lane.announced(proto::Announced { reasons, ..proto::Announced::default() });
            }
            17 => self.lane.go_away(proto::GoAway::default()),
            18 => {
                let len = usize::from(input.number());
                greet(input.slice(len));
            }
            _ => {
                if input.number() == 0 {
                    self.lane.close(Reset::new(4));
                }
            }
        }
    }

    /// Gives bytes as they are.
    fn feed(&mut self, bytes: &[u8]) {
        self.input.extend_from_slice(bytes);
        if self.lane.handle_input(self.now, &mut self.input).is_err() {
            self.input.clear();
            self.lane.close(Reset::new(5));
        }
        while let Some(event) = self.lane.poll_event() {
            if let Event::Opened { key, .. } = event {
                self.keys.push(key);
            }
        }
        self.lane.take_wakes().wake();
    }

    /// Gives a message that is well formed, with fields that are likely to mean something.
    fn message(&mut self, input: &mut Input<'_>) {
        let request_id = match input.number() {
            0 => None,
            id => Some(RequestId(u64::from(id % 16))),
        };
        let len = usize::from(input.number()) * if input.number() == 0 { 500 } else { 1 };
        let number = u32::from(input.number()) % 53;
        let count = u64::from(input.number());
        let payload = match number {
            field::ACK => prost::Message::encode_to_vec(&proto::Ack { received: count }),
            field::WINDOW => prost::Message::encode_to_vec(&proto::Window { limit: count * 4096 }),
            field::CUSTOM => vec![0; len],
            _ => Vec::new(),
        };
        let mut out = Vec::new();
        let payload = payload.into();
        let flags = u32::from(input.number()) % 8;
        let message = Envelope { request_id, flags, field: number, payload, ..Envelope::default() };
        envelope::write(&mut out, &message);
        self.feed(&out);
    }

    /// Takes what goes out: whole messages, as many as are said to be.
    fn transmit(&mut self, bytes_max: usize) {
        let mut out = Transmit::new();
        let before = self.lane.stats();
        let was_attached = self.lane.is_attached();
        let added = self.lane.poll_transmit(self.now, &mut out, bytes_max);
        assert!(!added || was_attached);
        let mut stream = BytesMut::new();
        while !out.is_empty() {
            let mut chunks = [IoSlice::new(&[]); 8];
            let filled = out.chunks(&mut chunks);
            let written: usize = chunks[..filled].iter().map(|chunk| chunk.len()).sum();
            chunks[..filled].iter().for_each(|chunk| stream.extend_from_slice(chunk));
            out.advance(written);
        }
        let mut messages = 0;
        while let Some(message) = envelope::read(&mut stream, 1 << 20).expect("well formed") {
            messages += u64::from(message != Envelope::default());
        }
        assert!(stream.is_empty(), "whole messages only");
        assert_eq!(self.lane.stats().messages_out - before.messages_out, messages);
    }

    fn resume(&mut self, number: u8) {
        let stats = self.lane.stats();
        let received = match number {
            255 => u64::MAX,
            254 => stats.sent,
            number => stats.acknowledged.saturating_add(u64::from(number)).saturating_sub(1),
        };
        let before = self.lane.received();
        let was_detached = !self.lane.is_attached() && self.lane.may_resume();
        let fits = (stats.acknowledged..=stats.sent).contains(&received);
        let resumed = self.lane.resume(self.now, received);
        assert_eq!(self.lane.received(), before);
        if !(was_detached && fits) {
            assert!(resumed.is_err());
            assert_eq!(self.lane.stats(), stats, "a refusal changes nothing");
        } else if resumed.is_err() {
            self.lane.close(Reset::new(6));
        } else {
            assert!(self.lane.is_attached());
            assert_eq!(self.lane.stats().acknowledged, received);
        }
    }

    fn assert_promises(&mut self) {
        let stats = self.lane.stats();
        assert!(stats.exchanges <= EXCHANGES_MAX && stats.exchanges_on_wire <= stats.exchanges);
        assert!(stats.acknowledged <= stats.sent);
        assert!(stats.acknowledged >= self.before.acknowledged, "it does not go back");
        assert!(stats.received >= self.before.received && stats.sent >= self.before.sent);
        assert!(stats.replay_limit <= RING_BYTES_MAX);
        assert!(stats.replay_bytes < stats.replay_limit + MESSAGE_BYTES_MAX, "{stats:?}");
        assert!(self.budget.used() <= self.budget.max() + MESSAGE_BYTES_MAX + 64 * 1024);
        assert!(stats.send_queued_bytes <= QUEUED_BYTES_MAX + MESSAGE_BYTES_MAX);
        let queued_max = EXCHANGES_MAX * SEND_QUEUE_BYTES_MAX.max(128 * 1024);
        assert!(stats.send_queued_bytes <= queued_max as u64);
        assert!(stats.receive_queued_bytes <= EXCHANGES_MAX as u64 * RECEIVED_BYTES_MAX);
        assert!(stats.control_queued <= 3 * EXCHANGES_MAX + 256);
        if !self.lane.is_attached() || self.lane.closed().is_some() {
            assert_eq!(self.lane.poll_timeout(), None);
            assert!(!self.lane.wants_transmit());
        }
        if self.lane.closed().is_some() {
            assert_eq!((stats.exchanges_on_wire, stats.replay_bytes), (0, 0));
        }
        self.before = stats;
    }
}

/// Gives bytes to both ends of a handshake: they are taken, waited for or refused.
fn greet(bytes: &[u8]) {
    let mut buffer = BytesMut::from(bytes);
    match Acceptor::new().handle_input(&mut buffer) {
        Ok(Some(First::Resume(resume))) => {
            Dialler::new().resume(&resume).expect("what is taken can be said");
        }
        Ok(Some(First::Hello(hello))) => {
            Dialler::new().hello(&hello).expect("what is taken can be said");
        }
        Ok(None) => assert_eq!(buffer, bytes, "what is not whole is left"),
        Err(error) => {
            let refuse = error.refusal();
            assert!(!Acceptor::new().encode_refuse(&refuse).is_empty());
        }
    }
    let mut buffer = BytesMut::from(bytes);
    let _: Poll<()> = match Dialler::new().handle_input(&mut buffer) {
        Ok(Some(_)) | Err(_) => Poll::Ready(()),
        Ok(None) => Poll::Pending,
    };
}

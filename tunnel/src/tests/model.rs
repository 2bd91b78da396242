//! Any sequence of operations at both ends against a small model: messages arrive in order, none
//! lost, none doubled, credit and buffers never exceeded, and nothing is left at the end; with connections
//! that are cut anywhere, too.
//!
//! A failure prints the operations. `PROPTEST_CASES=10000` looks longer, `PROPTEST_RNG_SEED=1` does the same
//! again; the seed of a failure is written to `tunnel/proptest-regressions/tests/model.txt`, and tried first
//! from then on.

use std::sync::Arc;
use std::task::Poll;

use bytes::Bytes;
use proptest::prelude::*;
use sidelane_abi::{OPEN_BYTES_MAX, failure};

use super::pair::{End, Pair};
use crate::{
    ACK_DELAY, Budget, Event, Key, LaneConfig, OPEN_RECORD_BYTES_MAX, OpenError, Payload, Received,
    RequestId, Reset, Side, proto,
};

/// The longest message's cost in a ring.
const MESSAGE_COST_MAX: u64 = (OPEN_BYTES_MAX + OPEN_RECORD_BYTES_MAX + 128) as u64;

#[derive(Clone, Copy, Debug)]
enum Op {
    /// Opens an exchange at an end.
    Open {
        at: Side,
    },
    /// Sends a message of `len` bytes, perhaps the last, where backpressure allows.
    Send {
        at: Side,
        exchange: usize,
        len: usize,
        end: bool,
    },
    Finish {
        at: Side,
        exchange: usize,
    },
    /// Takes up to `count` messages.
    Recv {
        at: Side,
        exchange: usize,
        count: usize,
    },
    Reset {
        at: Side,
        exchange: usize,
    },
    Dispatched {
        exchange: usize,
    },
    Refused {
        exchange: usize,
    },
    DropSend {
        at: Side,
        exchange: usize,
    },
    DropRecv {
        at: Side,
        exchange: usize,
    },
    /// Moves bytes a little.
    Step {
        count: usize,
    },
    /// Moves bytes until nothing is on its way.
    Run,
    /// Loses what is on its way but for so many permille of it, in each direction, and the connection.
    Cut {
        to_relay: usize,
        to_sidecar: usize,
    },
    /// Dials, though the connection before may stand.
    Dial,
    /// A dial of before arrives again.
    DialStale,
    /// Lets so many milliseconds pass.
    Pass {
        ms: u64,
    },
}

fn cuts() -> impl Strategy<Value = Op> {
    let keep = || prop_oneof![2 => Just(0), 1 => Just(1000), 4 => 0..1000_usize];
    prop_oneof![
        6 => (keep(), keep()).prop_map(|(to_relay, to_sidecar)| Op::Cut { to_relay, to_sidecar }),
        4 => Just(Op::Dial),
        1 => Just(Op::DialStale),
        4 => (1..100_u64).prop_map(|ms| Op::Pass { ms }),
    ]
}

fn op() -> impl Strategy<Value = Op> {
    let side = || prop_oneof![Just(Side::Relay), Just(Side::Sidecar)];
    let exchange = || 0..6_usize;
    let len = prop_oneof![4 => 4..200_usize, 2 => 4..5000_usize, 1 => 20_000..33_792_usize];
    prop_oneof![
        6 => side().prop_map(|at| Op::Open { at }),
        30 => (side(), exchange(), len, prop::bool::weighted(0.05))
            .prop_map(|(at, exchange, len, end)| Op::Send { at, exchange, len, end }),
        3 => (side(), exchange()).prop_map(|(at, exchange)| Op::Finish { at, exchange }),
        20 => (side(), exchange(), 1..20_usize)
            .prop_map(|(at, exchange, count)| Op::Recv { at, exchange, count }),
        1 => (side(), exchange()).prop_map(|(at, exchange)| Op::Reset { at, exchange }),
        2 => exchange().prop_map(|exchange| Op::Dispatched { exchange }),
        1 => exchange().prop_map(|exchange| Op::Refused { exchange }),
        2 => (side(), exchange()).prop_map(|(at, exchange)| Op::DropSend { at, exchange }),
        2 => (side(), exchange()).prop_map(|(at, exchange)| Op::DropRecv { at, exchange }),
        20 => (1..8_usize).prop_map(|count| Op::Step { count }),
        4 => Just(Op::Run),
    ]
}

/// One end's view of an exchange.
#[derive(Default)]
struct Half {
    key: Option<Key>,
    sent: u32,
    end_sent: bool,
    received: u32,
    finished: bool,
    reset: Option<Reset>,
    send_dropped: bool,
    recv_dropped: bool,
}

struct Exchange {
    id: RequestId,
    opener: Side,
    halves: [Half; 2],
    /// Ended early by an operation; what arrives is then a beginning of what was sent.
    disturbed: bool,
}

struct Model {
    pair: Pair,
    exchanges: Vec<Exchange>,
    keeps: bool,
}

/// What is kept for replay.
#[derive(Clone, Copy)]
struct Ring<'a> {
    min: u64,
    max: u64,
    budget: &'a Arc<Budget>,
}

const EXCHANGES_MAX: usize = 5;
const QUEUED_BYTES_MAX: u64 = 200_000;

const fn index(side: Side) -> usize {
    match side {
        Side::Relay => 0,
        Side::Sidecar => 1,
    }
}

fn message(number: u32, len: usize, end: bool) -> Payload {
    let mut body = vec![0; len];
    body[..4].copy_from_slice(&number.to_be_bytes());
    let body = Bytes::from(body);
    // In two parts, cut somewhere.
    let cut = number as usize * 31 % len;
    Payload { field: 31, end, head: body.slice(..cut), body: body.slice(cut..) }
}

impl Model {
    fn new(chop: usize, capacity: usize, latency_ms: u64, ring: Option<Ring<'_>>) -> Self {
        let small = |config: &mut LaneConfig| {
            config.receive_window = 64 * 1024;
            config.send_window = 64 * 1024;
            config.exchanges_max = EXCHANGES_MAX;
            config.queued_bytes_max = QUEUED_BYTES_MAX;
            if let Some(Ring { min, max, budget }) = ring {
                config.replay_bytes_min = min;
                config.replay_bytes_max = max;
                config.replay_budget = Some(Arc::clone(budget));
            }
        };
        let pair = Pair::with(small)
            .chop(chop)
            .capacity(capacity)
            .latency(std::time::Duration::from_millis(latency_ms));
        Self { pair, exchanges: Vec::new(), keeps: ring.is_some() }
    }

    fn assert_bounds(&self) {
        for end in [&self.pair.relay, &self.pair.sidecar] {
            let stats = end.stats();
            assert!(stats.exchanges <= EXCHANGES_MAX);
            assert!(stats.replay_bytes < stats.replay_limit + MESSAGE_COST_MAX, "{stats:?}");
            assert!(stats.send_queued_bytes < QUEUED_BYTES_MAX + MESSAGE_COST_MAX, "{stats:?}");
            let received_max = EXCHANGES_MAX as u64 * (7 * 4096 * 1024 / 2 + MESSAGE_COST_MAX);
            assert!(stats.receive_queued_bytes <= received_max, "{stats:?}");
            assert!(stats.control_queued <= 3 * EXCHANGES_MAX + 256, "{stats:?}");
            assert!(stats.acknowledged <= stats.sent, "{stats:?}");
        }
    }

    fn end(&mut self, side: Side) -> &mut End {
        match side {
            Side::Relay => &mut self.pair.relay,
            Side::Sidecar => &mut self.pair.sidecar,
        }
    }

    /// The n-th of the exchanges opened last, with its key at an end.
    fn find(&self, exchange: usize, at: Side) -> Option<(usize, Key)> {
        let exchange = self.exchanges.len().checked_sub(exchange + 1)?;
        Some((exchange, self.exchanges[exchange].halves[index(at)].key?))
    }

    fn apply(&mut self, op: Op) {
        match op {
            Op::Open { at } => self.open(at),
            Op::Send { at, exchange, len, end } => self.send(at, exchange, len, end),
            Op::Finish { at, exchange } => {
                let Some((exchange, key)) = self.find(exchange, at) else { return };
                if !self.exchanges[exchange].halves[index(at)].send_dropped {
                    self.finish(at, exchange, key);
                }
            }
            Op::Recv { at, exchange, count } => {
                let Some((exchange, _)) = self.find(exchange, at) else { return };
                for _ in 0..count {
                    if !self.recv(at, exchange) {
                        break;
                    }
                }
            }
            Op::Reset { at, exchange } => {
                let Some((exchange, key)) = self.find(exchange, at) else { return };
                self.exchanges[exchange].disturbed = true;
                self.end(at).lane.reset(key, Reset::new(failure::CLIENT_GONE));
            }
            Op::Dispatched { exchange } => self.control(exchange, false),
            Op::Refused { exchange } => self.control(exchange, true),
            Op::DropSend { at, exchange } => {
                let Some((exchange, key)) = self.find(exchange, at) else { return };
                self.drop_send(at, exchange, key);
            }
            Op::DropRecv { at, exchange } => {
                let Some((exchange, key)) = self.find(exchange, at) else { return };
                self.drop_recv(at, exchange, key);
            }
            Op::Step { count } => {
                for _ in 0..count {
                    self.pair.step().expect("neither end breaks a rule");
                }
            }
            Op::Run => self.pair.run(),
            Op::Cut { to_relay, to_sidecar } => {
                let (flying_to_relay, flying_to_sidecar) = self.pair.flying();
                let part = |of: usize, permille: usize| of * permille / 1000;
                let to_relay = part(flying_to_relay, to_relay);
                self.pair.cut_at(to_relay, part(flying_to_sidecar, to_sidecar));
            }
            Op::Dial => self.pair.dial(),
            Op::DialStale => self.pair.dial_stale(),
            Op::Pass { ms } => {
                let time = std::time::Duration::from_millis(ms);
                self.pair.pass(time).expect("neither end breaks a rule");
            }
        }
        self.take_opened();
        self.assert_bounds();
    }

    fn open(&mut self, at: Side) {
        let count = u64::try_from(self.exchanges.len()).expect("few");
        let id = RequestId(2 * count + if at == Side::Relay { 1 } else { 2 });
        match self.end(at).lane.open(id, 1, proto::Open::default()) {
            Ok(key) => {
                let mut halves = [Half::default(), Half::default()];
                halves[index(at)].key = Some(key);
                self.exchanges.push(Exchange { id, opener: at, halves, disturbed: false });
            }
            Err(error) => assert_eq!(error, OpenError::Overloaded),
        }
    }

    fn take_opened(&mut self) {
        for side in [Side::Relay, Side::Sidecar] {
            while let Some(event) = self.end(side).events.pop_front() {
                let Event::Opened { key, id, .. } = event else { continue };
                let exchange =
                    self.exchanges.iter_mut().find(|exchange| exchange.id == id).expect("opened");
                let half = &mut exchange.halves[index(side)];
                assert!(half.key.is_none(), "opened twice");
                half.key = Some(key);
            }
        }
    }

    fn send(&mut self, at: Side, exchange: usize, len: usize, end: bool) {
        let Some((exchange, key)) = self.find(exchange, at) else { return };
        let half = &self.exchanges[exchange].halves[index(at)];
        if half.end_sent || half.send_dropped {
            return;
        }
        let number = half.sent;
        match self.end(at).send(key, message(number, len, end)) {
            Poll::Ready(Ok(())) => {
                let half = &mut self.exchanges[exchange].halves[index(at)];
                half.sent += 1;
                half.end_sent = end;
            }
            Poll::Ready(Err(reset)) => self.ended(at, exchange, reset),
            Poll::Pending => {}
        }
    }

    fn finish(&mut self, at: Side, exchange: usize, key: Key) {
        self.exchanges[exchange].halves[index(at)].end_sent = true;
        self.end(at).lane.finish(key);
    }

    /// Takes a message and holds it against what was sent; false: there was none.
    fn recv(&mut self, at: Side, exchange: usize) -> bool {
        let half = &self.exchanges[exchange].halves[index(at)];
        let Some(key) = half.key else { return false };
        if half.finished || half.reset.is_some() || half.recv_dropped {
            return false;
        }
        match self.end(at).recv(key) {
            Poll::Pending => false,
            Poll::Ready(Received::Message(payload)) => {
                let [first, second, third, fourth, ..] = payload.body[..] else {
                    panic!("a message is 4 bytes at least");
                };
                let number = u32::from_be_bytes([first, second, third, fourth]);
                let peer = &self.exchanges[exchange].halves[1 - index(at)];
                assert!(number < peer.sent, "what was not sent came");
                let half = &mut self.exchanges[exchange].halves[index(at)];
                assert_eq!(number, half.received, "in order, none lost, none doubled");
                half.received += 1;
                true
            }
            Poll::Ready(Received::Finished) => {
                let peer = &self.exchanges[exchange].halves[1 - index(at)];
                let (sent, ended) = (peer.sent, peer.end_sent);
                let half = &mut self.exchanges[exchange].halves[index(at)];
                assert_eq!((half.received, true), (sent, ended), "finished before all came");
                half.finished = true;
                false
            }
            Poll::Ready(Received::Reset(reset)) => {
                self.ended(at, exchange, reset);
                false
            }
        }
    }

    /// An exchange ended early: by an operation, or refused because its acceptor was at a limit.
    fn ended(&mut self, at: Side, exchange: usize, reset: Reset) {
        let known = &mut self.exchanges[exchange];
        let key = known.halves[index(at)].key.expect("it was polled");
        known.halves[index(at)].reset = Some(reset);
        if !known.disturbed {
            assert_eq!(reset, Reset::new(failure::OVERLOADED), "ended without a reason");
            assert!(known.halves[1 - index(at)].key.is_none(), "refused after it was opened");
            known.disturbed = true;
            assert!(self.end(at).lane.is_refused(key));
        }
    }

    fn control(&mut self, exchange: usize, refused: bool) {
        let Some(opener) = self.exchanges.iter().rev().nth(exchange).map(|known| known.opener)
        else {
            return;
        };
        let at = opener.peer();
        let Some((exchange, key)) = self.find(exchange, at) else { return };
        if refused {
            self.exchanges[exchange].disturbed = true;
            self.end(at).lane.refused(key, Reset::new(failure::SERVICE_UNREACHABLE));
        } else {
            self.end(at).lane.dispatched(key);
        }
    }

    fn drop_send(&mut self, at: Side, exchange: usize, key: Key) {
        let known = &mut self.exchanges[exchange];
        let half = &mut known.halves[index(at)];
        if !half.send_dropped {
            half.send_dropped = true;
            known.disturbed |= !half.end_sent;
            self.end(at).lane.drop_send(key);
        }
    }

    fn drop_recv(&mut self, at: Side, exchange: usize, key: Key) {
        let known = &mut self.exchanges[exchange];
        let half = &mut known.halves[index(at)];
        if !half.recv_dropped {
            half.recv_dropped = true;
            known.disturbed |= !half.finished;
            self.end(at).lane.drop_recv(key);
        }
    }

    /// Ends what runs, takes all there is, and looks whether all is there and nothing is left.
    fn settle(&mut self) {
        if self.keeps {
            self.pair.redials = true;
            if !self.pair.is_joined() {
                self.pair.dial();
            }
        }
        self.drain();
        self.assert_nobody_is_stuck();
        for exchange in 0..self.exchanges.len() {
            for at in [Side::Relay, Side::Sidecar] {
                self.finish_where_open(at, exchange);
            }
        }
        self.drain();
        for exchange in 0..self.exchanges.len() {
            for at in [Side::Relay, Side::Sidecar] {
                self.finish_where_open(at, exchange);
            }
        }
        self.drain();
        for exchange in 0..self.exchanges.len() {
            for at in [Side::Relay, Side::Sidecar] {
                self.recv(at, exchange);
                let known = &self.exchanges[exchange];
                let half = &known.halves[index(at)];
                assert!(known.disturbed || half.finished, "{:?} is not complete", known.id);
                if let Some(key) = half.key {
                    self.drop_send(at, exchange, key);
                    self.drop_recv(at, exchange, key);
                }
            }
        }
        self.move_all();
        self.take_opened();
        self.pair.assert_empty();
        for end in [&self.pair.relay, &self.pair.sidecar] {
            let stats = end.stats();
            assert_eq!(stats.replay_bytes, 0, "all is acknowledged");
            assert!(!self.keeps || stats.acknowledged == stats.sent);
        }
        assert_eq!(self.pair.relay.stats().violations, 0);
        assert_eq!(self.pair.sidecar.stats().violations, 0);
    }

    /// Moves and takes all there is.
    fn drain(&mut self) {
        let mut moved = true;
        while moved {
            let before = (self.pair.at_relay.arrived, self.pair.at_sidecar.arrived);
            self.move_all();
            self.take_opened();
            self.assert_bounds();
            moved = before != (self.pair.at_relay.arrived, self.pair.at_sidecar.arrived);
            for exchange in 0..self.exchanges.len() {
                for at in [Side::Relay, Side::Sidecar] {
                    while self.recv(at, exchange) {
                        moved = true;
                    }
                }
            }
        }
    }

    fn move_all(&mut self) {
        if self.keeps {
            // A full ring waits for what the peer acknowledges.
            self.pair.pass(3 * ACK_DELAY).expect("neither end breaks a rule");
        } else {
            self.pair.run();
        }
    }

    /// With all taken there is credit for the largest message, in each direction that is open.
    fn assert_nobody_is_stuck(&mut self) {
        for exchange in 0..self.exchanges.len() {
            for at in [Side::Relay, Side::Sidecar] {
                let known = &self.exchanges[exchange];
                let half = &known.halves[index(at)];
                let Some(key) = half.key else { continue };
                if known.disturbed || half.end_sent || half.send_dropped {
                    continue;
                }
                let next = message(half.sent, OPEN_BYTES_MAX, false);
                match self.end(at).send(key, next) {
                    Poll::Ready(Ok(())) => self.exchanges[exchange].halves[index(at)].sent += 1,
                    Poll::Ready(Err(reset)) => self.ended(at, exchange, reset),
                    Poll::Pending => panic!("nothing is on its way, and there is no credit"),
                }
                self.drain();
            }
        }
    }

    fn finish_where_open(&mut self, at: Side, exchange: usize) {
        let half = &self.exchanges[exchange].halves[index(at)];
        if let Some(key) = half.key
            && !half.end_sent
            && !half.send_dropped
        {
            self.finish(at, exchange, key);
        }
    }
}

/// So many cases, unless `PROPTEST_CASES` says otherwise.
fn cases(cases: u32) -> ProptestConfig {
    match std::env::var_os("PROPTEST_CASES") {
        Some(_) => ProptestConfig::default(),
        None => ProptestConfig { cases, ..ProptestConfig::default() },
    }
}

proptest! {
    #![proptest_config(cases(256))]

    #[test]
    fn any_operations_keep_the_promises(
        ops in prop::collection::vec(op(), 1..300),
        chop in prop_oneof![1..64_usize, Just(usize::MAX)],
        capacity in prop_oneof![100..5000_usize, Just(1 << 20)],
        latency_ms in 0..3_u64,
    ) {
        let mut model = Model::new(chop, capacity, latency_ms, None);
        for op in ops {
            model.apply(op);
        }
        model.settle();
    }

}

proptest! {
    #![proptest_config(cases(128))]

    /// Two lanes with small rings share a small budget, and lose their connections again and again.
    #[test]
    fn any_operations_and_cuts_keep_the_promises(
        ops in prop::collection::vec(
            (any::<bool>(), prop_oneof![9 => op(), 1 => cuts()]),
            1..300,
        ),
        chop in prop_oneof![1 => 1..64_usize, 4 => Just(usize::MAX)],
        capacity in prop_oneof![1000..10_000_usize, Just(1 << 20)],
        latency_ms in 0..3_u64,
        min in 1..8192_u64,
        max in 4096..64 * 1024_u64,
        budget in prop_oneof![Just(0), Just(64 * 1024), Just(300_000), Just(1 << 30)],
        redials in any::<bool>(),
    ) {
        let budget = Arc::new(Budget::new(budget));
        let ring = Ring { min, max, budget: &budget };
        let mut models = [(); 2].map(|()| Model::new(chop, capacity, latency_ms, Some(ring)));
        for model in &mut models {
            model.pair.redials = redials;
        }
        for (second, op) in ops {
            models[usize::from(second)].apply(op);
            // Each of four ends one message above, in granules of 64 KiB.
            prop_assert!(budget.used() <= budget.max() + 4 * 192 * 1024);
        }
        for model in &mut models {
            model.settle();
        }
        prop_assert_eq!(budget.used(), 0);
    }
}

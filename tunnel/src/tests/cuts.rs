//! One conversation with all that a lane can say, whose connection is cut at every byte, each way: both
//! ends must hear the same as without a cut.

use std::collections::HashMap;
use std::sync::LazyLock;
use std::task::Poll;

use bytes::Bytes;
use sidelane_abi::{MESSAGE_BYTES_MAX, failure};

use super::pair::{End, Pair, data, last};
use crate::{ACK_DELAY, Event, Key, LaneConfig, Payload, Received, RequestId, Reset, Side, proto};

/// What both ends hear, a list for each exchange and one for the lane at each end.
type Heard = HashMap<(Side, u64), Vec<Item>>;

/// A message of bulk.
const BULK_BYTES: usize = 32 * 1024;

#[derive(PartialEq, Debug)]
enum Item {
    Event(Event),
    Opened(RequestId, u32, proto::Open),
    Message(Payload),
    Over(Received, bool, bool),
}

struct Talk {
    pair: Pair,
    relay: Vec<(u64, Key)>,
    sidecar: Vec<(u64, Key)>,
    heard: Heard,
    /// Messages of bulk.
    bulk: usize,
}

/// Where the connection is cut: bytes that have arrived at each end.
#[derive(Clone, Default, Debug)]
struct Cuts {
    at_relay: Vec<u64>,
    at_sidecar: Vec<u64>,
}

/// How much came to each end.
struct Arrived {
    at_relay: u64,
    at_sidecar: u64,
}

/// The beginning of a text that nowhere looks like another part of it.
fn bytes(len: usize) -> Payload {
    static TEXT: LazyLock<Bytes> = LazyLock::new(|| {
        (0..MESSAGE_BYTES_MAX).map(|at| u8::try_from(at % 251).expect("below 251")).collect()
    });
    Payload { body: TEXT.slice(..len), ..data(b"") }
}

impl Talk {
    fn new(bulk: usize, cuts: &Cuts) -> Self {
        let mut pair = Pair::with(|config: &mut LaneConfig| {
            config.receive_window = 64 * 1024;
            config.send_window = 64 * 1024;
            config.replay_bytes_min = 2048;
            config.replay_bytes_max = 2048;
        });
        pair.redials = true;
        pair.at_relay.cuts.extend(&cuts.at_relay);
        pair.at_sidecar.cuts.extend(&cuts.at_sidecar);
        Self { pair, relay: Vec::new(), sidecar: Vec::new(), heard: Heard::new(), bulk }
    }

    fn open(&mut self, id: u64, first: Payload) -> Key {
        let open = proto::Open { tunnel: "web".to_owned(), ..proto::Open::default() };
        let (end, keys) = if id % 2 == 1 {
            (&mut self.pair.relay, &mut self.relay)
        } else {
            (&mut self.pair.sidecar, &mut self.sidecar)
        };
        let key = end.lane.open(RequestId(id), 1, open).expect("the lane takes it");
        assert!(end.send(key, first).is_ready());
        keys.push((id, key));
        key
    }

    fn at_sidecar(&self, id: u64) -> Key {
        self.sidecar.iter().find(|known| known.0 == id).expect("it was opened").1
    }

    fn at_relay(&self, id: u64) -> Key {
        self.relay.iter().find(|known| known.0 == id).expect("it was opened").1
    }

    /// Moves all there is, and notes what is heard.
    fn settle(&mut self) {
        loop {
            let before = (self.pair.at_relay.arrived, self.pair.at_sidecar.arrived);
            self.pair.pass(2 * ACK_DELAY).expect("neither end breaks a rule");
            listen(Side::Relay, &mut self.pair.relay, &mut self.relay, &mut self.heard);
            listen(Side::Sidecar, &mut self.pair.sidecar, &mut self.sidecar, &mut self.heard);
            if before == (self.pair.at_relay.arrived, self.pair.at_sidecar.arrived) {
                break;
            }
        }
        assert!(self.pair.is_joined());
        for end in [&self.pair.relay, &self.pair.sidecar] {
            let stats = end.stats();
            assert_eq!((stats.replay_bytes, stats.acknowledged), (0, stats.sent));
        }
    }

    /// Has the conversation, and returns what was heard.
    fn have(mut self) -> (Heard, Arrived) {
        let sending = "both ends have room";
        self.open(1, bytes(200));
        self.open(3, data(b"is refused"));
        self.open(5, data(b"is reset"));
        self.open(7, last(b"is answered at once"));
        self.open(2, data(b"the other way"));
        assert!(
            self.pair
                .sidecar
                .lane
                .announce(proto::Announce { version: 3, ..proto::Announce::default() })
        );
        self.settle();
        let Self { pair, .. } = &mut self;
        assert!(pair.relay.lane.announced(proto::Announced {
            version: 3,
            reasons: vec!["no".to_owned()],
            ..proto::Announced::default()
        }));
        let refused = self.at_sidecar(3);
        let answered = self.at_sidecar(7);
        let big = self.at_sidecar(1);
        let other = self.at_relay(2);
        let lane = &mut self.pair.sidecar.lane;
        lane.dispatched(big);
        lane.refused(refused, Reset::new(failure::SERVICE_UNREACHABLE));
        lane.dispatched(answered);
        assert!(self.pair.sidecar.send(answered, last(b"answer")).is_ready(), "{sending}");
        let why = Reset { code: failure::CLIENT_GONE, protocol_code: Some(8) };
        let reset = self.at_relay(5);
        self.pair.relay.lane.reset(reset, why);
        let question = self.at_relay(1);
        assert!(self.pair.relay.send(question, bytes(BULK_BYTES)).is_ready());
        for number in 0..8 {
            assert!(self.pair.relay.send(other, data(&[number])).is_ready(), "{sending}");
            assert!(self.pair.sidecar.send(big, data(&[number; 30])).is_ready(), "{sending}");
        }
        self.settle();
        for _ in 1..self.bulk {
            // More than is left of the first window.
            assert!(self.pair.relay.send(question, bytes(BULK_BYTES)).is_ready(), "{sending}");
            self.settle();
        }
        self.pair.relay.lane.go_away(proto::GoAway {
            code: failure::DRAINING,
            detail: "bye".to_owned(),
            last: false,
        });
        let credential = proto::Authenticate { credential: b"another".to_vec().into() };
        assert!(self.pair.sidecar.lane.authenticate(credential));
        self.settle();
        assert!(self.pair.relay.send(question, last(b"the end")).is_ready(), "{sending}");
        let asked = self.at_sidecar(2);
        self.pair.sidecar.lane.finish(asked);
        self.pair.relay.lane.reset(other, Reset::new(failure::NONE));
        self.pair.sidecar.lane.finish(big);
        self.settle();
        let arrived = Arrived {
            at_relay: self.pair.at_relay.arrived,
            at_sidecar: self.pair.at_sidecar.arrived,
        };
        for (_, key) in self.relay {
            self.pair.relay.drop_handles(key);
        }
        for (_, key) in self.sidecar {
            self.pair.sidecar.drop_handles(key);
        }
        self.pair.pass(2 * ACK_DELAY).expect("neither end breaks a rule");
        self.pair.assert_empty();
        (self.heard, arrived)
    }
}

fn listen(at: Side, end: &mut End, keys: &mut Vec<(u64, Key)>, heard: &mut Heard) {
    while let Some(event) = end.events.pop_front() {
        let lane = heard.entry((at, 0)).or_default();
        match event {
            Event::Rtt(_) => {}
            Event::Opened { key, id, protocol_type, open } => {
                lane.push(Item::Opened(id, protocol_type, open));
                keys.push((id.0, key));
            }
            event => lane.push(Item::Event(event)),
        }
    }
    for &(id, key) in &*keys {
        let heard = heard.entry((at, id)).or_default();
        while !matches!(heard.last(), Some(Item::Over(..)))
            && let Poll::Ready(received) = end.recv(key)
        {
            heard.push(match received {
                Received::Message(payload) => Item::Message(payload),
                over => Item::Over(over, end.lane.is_dispatched(key), end.lane.is_refused(key)),
            });
        }
    }
}

/// Checks each of `count` cuts on two threads: what is heard must be what is heard without.
fn check(bulk: usize, count: u64, cuts: impl Fn(u64) -> Cuts + Sync) {
    let (expected, _) = Talk::new(bulk, &Cuts::default()).have();
    std::thread::scope(|scope| {
        for part in 0..2 {
            let (cuts, expected) = (&cuts, &expected);
            scope.spawn(move || {
                for at in (part..count).step_by(2) {
                    let cuts = cuts(at);
                    let (heard, _) = Talk::new(bulk, &cuts).have();
                    assert!(heard == *expected, "{cuts:?}: {heard:#?}, not {expected:#?}");
                }
            });
        }
    });
}

fn arrived(bulk: usize) -> Arrived {
    Talk::new(bulk, &Cuts::default()).have().1
}

#[test]
fn a_cut_at_any_byte_to_the_sidecar_is_not_heard() {
    let Arrived { at_sidecar, .. } = arrived(1);
    assert!(at_sidecar > BULK_BYTES as u64, "{at_sidecar}");
    check(1, at_sidecar, |at| Cuts { at_sidecar: vec![at], ..Cuts::default() });
}

#[test]
fn a_cut_at_any_byte_to_the_relay_is_not_heard() {
    let Arrived { at_relay, .. } = arrived(3);
    assert!(at_relay > 400, "{at_relay}");
    check(3, at_relay, |at| Cuts { at_relay: vec![at], ..Cuts::default() });
}

/// Within a resume, too: the second cut comes at each of the bytes that follow the first one.
#[test]
fn two_cuts_are_not_heard() {
    let Arrived { at_relay, .. } = arrived(1);
    let (stride, behind) = (20, 100);
    let pair = |at: u64| vec![at / behind * stride, at / behind * stride + at % behind];
    let count = at_relay / stride * behind;
    check(1, count, |at| Cuts { at_relay: pair(at), ..Cuts::default() });
    check(1, count, |at| Cuts { at_sidecar: pair(at), ..Cuts::default() });
}

/// Where windows are needed, and in both directions one after the other.
#[test]
fn cuts_in_bulk_are_not_heard() {
    let Arrived { at_relay, at_sidecar } = arrived(4);
    let each = 32;
    check(4, each * each, |at| Cuts {
        at_relay: vec![at / each * at_relay / each],
        at_sidecar: vec![at % each * at_sidecar / each],
    });
}

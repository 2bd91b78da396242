//! One test per rule of a lane.

use std::task::{Context, Poll};
use std::time::Duration;

use bytes::Bytes;
use sidelane_abi::{OPEN_BYTES_MAX, failure};

use super::pair::{Bell, Pair, data, last};
use crate::envelope::{Envelope, FLAG_DATAGRAM, FLAG_OPEN, field};
use crate::{
    Event, Key, LaneError, MESSAGE_BYTES_MIN, OPEN_RECORD_BYTES_MAX, OpenError, Payload,
    QUANTUM_BYTES, Received, RequestId, Reset, Transmit, envelope, proto,
};

pub(super) const DONE: Poll<Result<(), Reset>> = Poll::Ready(Ok(()));

pub(super) fn bytes(len: usize) -> Payload {
    Payload { field: 31, end: false, head: Bytes::new(), body: Bytes::from(vec![1; len]) }
}

pub(super) fn reset(code: u32) -> Reset {
    Reset::new(code)
}

pub(super) fn failed(code: u32) -> Poll<Result<(), Reset>> {
    Poll::Ready(Err(Reset::new(code)))
}

pub(super) fn received(payload: Payload) -> Poll<Received> {
    Poll::Ready(Received::Message(payload))
}

pub(super) fn received_reset(code: u32) -> Poll<Received> {
    Poll::Ready(Received::Reset(Reset::new(code)))
}

pub(super) fn encoded(envelope: &Envelope) -> Vec<u8> {
    let mut out = Vec::new();
    envelope::write(&mut out, envelope);
    out
}

pub(super) fn message(id: u64, flags: u32, payload: &[u8]) -> Vec<u8> {
    encoded(&Envelope {
        request_id: Some(RequestId(id)),
        flags,
        field: field::CUSTOM,
        payload: Bytes::copy_from_slice(payload),
        ..Envelope::default()
    })
}

pub(super) fn control(id: Option<u64>, field: u32, message: &impl prost::Message) -> Vec<u8> {
    encoded(&Envelope {
        request_id: id.map(RequestId),
        field,
        payload: Bytes::from(message.encode_to_vec()),
        ..Envelope::default()
    })
}

/// Sends until the sender has to wait; returns the bytes of payload taken.
pub(super) fn fill(pair: &mut Pair, key: Key) -> usize {
    let mut sent = 0;
    while pair.relay.send(key, bytes(32 * 1024)) == DONE {
        sent += 32 * 1024;
        pair.run();
    }
    sent
}

#[test]
fn an_exchange_goes_both_ways_and_leaves_nothing() {
    let mut pair = Pair::new();
    let (relay, sidecar) = pair.opened();
    assert_eq!(pair.sidecar.send(sidecar, data(b"answer")), DONE);
    pair.sidecar.lane.finish(sidecar);
    assert_eq!(pair.relay.send(relay, last(b"rest")), DONE);
    pair.run();
    assert_eq!(pair.relay.recv(relay), received(last(b"answer")));
    assert_eq!(pair.relay.recv(relay), Poll::Ready(Received::Finished));
    assert_eq!(pair.sidecar.recv(sidecar), received(last(b"rest")));
    assert_eq!(pair.sidecar.recv(sidecar), Poll::Ready(Received::Finished));
    assert_eq!(pair.relay.closed(relay), Poll::Ready(reset(failure::NONE)));
    assert_eq!(pair.sidecar.closed(sidecar), Poll::Ready(reset(failure::NONE)));
    pair.relay.drop_handles(relay);
    pair.sidecar.drop_handles(sidecar);
    pair.assert_empty();
}

#[test]
fn a_sidecar_may_open_too() {
    let mut pair = Pair::new();
    let sidecar = pair.sidecar.lane.open(RequestId(2), 1, proto::Open::default()).unwrap();
    assert_eq!(pair.sidecar.send(sidecar, last(b"ask")), DONE);
    pair.run();
    let (relay, id, ..) = pair.relay.opened();
    assert_eq!(id, RequestId(2));
    pair.relay.lane.finish(relay);
    assert_eq!(pair.relay.recv(relay), received(last(b"ask")));
    pair.run();
    pair.relay.drop_handles(relay);
    pair.sidecar.drop_handles(sidecar);
    pair.assert_empty();
}

#[test]
fn open_carries_what_core_knows_on_the_first_message() {
    let mut pair = Pair::new();
    let open = proto::Open {
        tunnel: "web".to_owned(),
        client_address: "192.0.2.1:4711".to_owned(),
        ..proto::Open::default()
    };
    for (number, id) in [(1, 1), (3, 3), (64, 5), (70, 7)] {
        let key = pair.relay.lane.open(RequestId(id), number, open.clone()).unwrap();
        pair.run();
        assert!(pair.sidecar.events.is_empty(), "nothing goes out before the first message");
        assert_eq!(pair.relay.send(key, data(b"x")), DONE);
        pair.run();
        let (_, opened_id, opened_number, opened) = pair.sidecar.opened();
        assert_eq!((opened_id, opened_number), (RequestId(id), number));
        assert_eq!(opened.tunnel, "web");
        assert_eq!(opened.client_address, "192.0.2.1:4711");
    }
}

#[test]
fn head_and_body_arrive_as_one_payload() {
    let mut pair = Pair::new().chop(7);
    let (relay, sidecar) = pair.opened();
    for len in [0, 10, 2047, 2048, 4095, 4096, 30_000] {
        let payload = Payload {
            field: 18,
            end: false,
            head: Bytes::from_static(b"head"),
            body: Bytes::from(vec![5; len]),
        };
        assert_eq!(pair.relay.send(relay, payload), DONE);
        pair.run();
        let expected = [b"head".as_slice(), &vec![5; len]].concat();
        assert_eq!(pair.sidecar.recv(sidecar), received(Payload { field: 18, ..data(&expected) }));
    }
}

#[test]
fn an_end_without_payload_opens_and_finishes() {
    let mut pair = Pair::new();
    let relay = pair.open();
    pair.relay.lane.finish(relay);
    pair.run();
    let (sidecar, ..) = pair.sidecar.opened();
    assert_eq!(pair.sidecar.recv(sidecar), Poll::Ready(Received::Finished));
    pair.sidecar.lane.finish(sidecar);
    pair.run();
    pair.relay.drop_handles(relay);
    pair.sidecar.drop_handles(sidecar);
    pair.assert_empty();
}

#[test]
fn finish_joins_the_message_that_waits() {
    let mut pair = Pair::new();
    let (relay, sidecar) = pair.opened();
    let before = pair.relay.stats().sent;
    assert_eq!(pair.relay.send(relay, data(b"whole")), DONE);
    pair.relay.lane.finish(relay);
    pair.relay.lane.finish(relay);
    pair.run();
    assert_eq!(pair.relay.stats().sent, before + 1);
    assert_eq!(pair.sidecar.recv(sidecar), received(last(b"whole")));
}

// --- ends -----------------------------------------------------------------------------------------

#[test]
fn reset_ends_both_directions_and_tells_the_peer() {
    let mut pair = Pair::new();
    let (relay, sidecar) = pair.opened();
    let why = Reset { code: failure::CLIENT_GONE, protocol_code: Some(0) };
    assert_eq!(pair.sidecar.send(sidecar, data(b"unread")), DONE);
    pair.run();
    pair.relay.lane.reset(relay, why);
    pair.relay.lane.reset(relay, reset(failure::INTERNAL));
    pair.run();
    assert_eq!(pair.relay.recv(relay), Poll::Ready(Received::Reset(why)));
    assert_eq!(pair.sidecar.recv(sidecar), Poll::Ready(Received::Reset(why)));
    assert_eq!(pair.sidecar.send(sidecar, data(b"x")), Poll::Ready(Err(why)));
    assert_eq!(pair.sidecar.closed(sidecar), Poll::Ready(why));
    pair.relay.drop_handles(relay);
    pair.sidecar.drop_handles(sidecar);
    pair.assert_empty();
}

#[test]
fn what_came_before_a_reset_is_yielded_before_it() {
    let mut pair = Pair::new();
    let (relay, sidecar) = pair.opened();
    assert_eq!(pair.sidecar.send(sidecar, data(b"part")), DONE);
    pair.run();
    pair.sidecar.lane.reset(sidecar, reset(failure::SERVICE_RESET));
    pair.run();
    assert_eq!(pair.relay.closed(relay), Poll::Ready(reset(failure::SERVICE_RESET)));
    assert_eq!(pair.relay.recv(relay), received(data(b"part")));
    assert_eq!(pair.relay.recv(relay), received_reset(failure::SERVICE_RESET));
}

#[test]
fn reset_drops_what_waits_to_be_sent() {
    let mut pair = Pair::new();
    let (relay, sidecar) = pair.opened();
    assert_eq!(pair.relay.send(relay, data(b"overtaken")), DONE);
    pair.relay.lane.reset(relay, reset(failure::CANCELLED));
    assert_eq!(pair.relay.stats().send_queued_bytes, 0);
    pair.run();
    assert_eq!(pair.sidecar.recv(sidecar), received_reset(failure::CANCELLED));
}

#[test]
fn an_end_without_failure_follows_what_waits_to_be_sent() {
    let mut pair = Pair::new();
    let (relay, sidecar) = pair.opened();
    assert_eq!(pair.relay.send(relay, data(b"last word")), DONE);
    pair.relay.lane.reset(relay, reset(failure::NONE));
    pair.relay.drop_handles(relay);
    pair.run();
    assert_eq!(pair.sidecar.recv(sidecar), received(data(b"last word")));
    assert_eq!(pair.sidecar.recv(sidecar), received_reset(failure::NONE));
    pair.sidecar.drop_handles(sidecar);
    pair.assert_empty();
}

#[test]
fn an_exchange_that_sent_nothing_ends_without_a_word() {
    let mut pair = Pair::new();
    let relay = pair.open();
    assert_eq!(pair.relay.send(relay, data(b"never seen")), DONE);
    pair.relay.lane.reset(relay, reset(failure::CANCELLED));
    assert!(pair.relay.lane.is_refused(relay));
    pair.relay.drop_handles(relay);
    let unsent = pair.open();
    pair.relay.drop_handles(unsent);
    pair.assert_empty();
    assert_eq!(pair.relay.stats().messages_out, 0);
}

#[test]
fn dropping_an_unfinished_half_cancels() {
    for drop_send in [true, false] {
        let mut pair = Pair::new();
        let (relay, sidecar) = pair.opened();
        if drop_send {
            pair.relay.lane.drop_send(relay);
        } else {
            pair.relay.lane.drop_recv(relay);
        }
        pair.run();
        assert_eq!(pair.sidecar.closed(sidecar), Poll::Ready(reset(failure::CANCELLED)));
        pair.relay.drop_handles(relay);
        pair.sidecar.drop_handles(sidecar);
        pair.assert_empty();
    }
}

#[test]
fn an_early_answer_arrives_whole_and_is_no_failure() {
    let mut pair = Pair::new();
    let (relay, sidecar) = pair.opened();
    assert_eq!(pair.sidecar.send(sidecar, last(b"413")), DONE);
    pair.sidecar.drop_handles(sidecar);
    pair.run();
    assert_eq!(pair.relay.send(relay, data(b"body")), failed(failure::NONE));
    assert_eq!(pair.relay.closed(relay), Poll::Ready(reset(failure::NONE)));
    assert_eq!(pair.relay.recv(relay), received(last(b"413")));
    assert_eq!(pair.relay.recv(relay), Poll::Ready(Received::Finished));
    pair.relay.drop_handles(relay);
    pair.assert_empty();
}

#[test]
fn an_opener_that_has_asked_and_leaves_cancels() {
    for written in [true, false] {
        let mut pair = Pair::new();
        let (relay, sidecar) = pair.opened();
        assert_eq!(pair.relay.send(relay, last(b"asked")), DONE);
        if written {
            pair.run();
        }
        pair.relay.drop_handles(relay);
        pair.run();
        assert_eq!(pair.sidecar.closed(sidecar), Poll::Ready(reset(failure::CANCELLED)));
        assert_eq!(pair.sidecar.send(sidecar, data(b"x")), failed(failure::CANCELLED));
        pair.sidecar.drop_handles(sidecar);
        pair.assert_empty();
    }
}

#[test]
fn dropped_handles_let_what_is_queued_go_out() {
    let mut pair = Pair::new();
    let (relay, sidecar) = pair.opened();
    pair.sidecar.lane.finish(sidecar);
    pair.run();
    assert_eq!(pair.relay.recv(relay), Poll::Ready(Received::Finished));
    assert_eq!(pair.relay.send(relay, last(b"rest")), DONE);
    pair.relay.drop_handles(relay);
    assert_eq!(pair.relay.lane.exchanges(), 1);
    pair.run();
    assert_eq!(pair.relay.lane.exchanges(), 0);
    assert_eq!(pair.sidecar.recv(sidecar), received(last(b"rest")));
    pair.sidecar.drop_handles(sidecar);
    pair.assert_empty();
}

#[test]
fn a_stale_key_is_harmless() {
    let mut pair = Pair::new();
    let (stale, sidecar) = pair.opened();
    pair.relay.drop_handles(stale);
    pair.run();
    pair.sidecar.drop_handles(sidecar);
    let (fresh, fresh_there) = pair.opened();
    assert_ne!(stale, fresh);
    pair.relay.lane.reset(stale, reset(failure::INTERNAL));
    pair.relay.lane.finish(stale);
    pair.relay.drop_handles(stale);
    assert_eq!(pair.relay.send(stale, data(b"x")), failed(failure::CANCELLED));
    assert_eq!(pair.relay.recv(stale), received_reset(failure::CANCELLED));
    assert_eq!(pair.relay.send(fresh, data(b"alive")), DONE);
    pair.run();
    assert_eq!(pair.sidecar.recv(fresh_there), received(data(b"alive")));
}

#[test]
fn messages_of_an_exchange_that_is_over_are_late_and_counted() {
    let mut pair = Pair::new();
    let (relay, sidecar) = pair.opened();
    pair.sidecar.lane.reset(sidecar, reset(failure::SERVICE_RESET));
    // Crosses the reset.
    assert_eq!(pair.relay.send(relay, data(b"late")), DONE);
    pair.run();
    assert_eq!(pair.sidecar.stats().late, 1);
    pair.relay.drop_handles(relay);
    pair.sidecar.drop_handles(sidecar);
    pair.assert_empty();
}

#[test]
fn sending_after_the_end_is_a_defect_of_its_own_exchange() {
    let mut pair = Pair::new();
    let (relay, sidecar) = pair.opened();
    assert_eq!(pair.relay.send(relay, last(b"end")), DONE);
    assert_eq!(pair.relay.send(relay, data(b"more")), failed(failure::INTERNAL));
    pair.run();
    assert_eq!(pair.sidecar.closed(sidecar), Poll::Ready(reset(failure::INTERNAL)));
    let (relay, _) = pair.opened();
    let control = Payload { field: field::HELLO, ..data(b"") };
    assert_eq!(pair.relay.send(relay, control), failed(failure::INTERNAL));
}

#[test]
fn closing_the_lane_ends_every_exchange() {
    let mut pair = Pair::new();
    let (relay, sidecar) = pair.opened();
    let unsent = pair.open();
    assert_eq!(pair.sidecar.send(sidecar, data(b"arrived")), DONE);
    pair.run();
    let (bell, waker) = Bell::new();
    let mut cx = Context::from_waker(&waker);
    assert!(pair.relay.lane.poll_closed(relay, &mut cx).is_pending());
    pair.relay.lane.close(reset(failure::TUNNEL_LOST));
    pair.relay.lane.close(reset(failure::INTERNAL));
    pair.relay.lane.take_wakes().wake();
    assert_eq!(bell.rings(), 1);
    for key in [relay, unsent] {
        assert_eq!(pair.relay.closed(key), Poll::Ready(reset(failure::TUNNEL_LOST)));
        assert_eq!(pair.relay.send(key, data(b"x")), failed(failure::TUNNEL_LOST));
    }
    assert!(pair.relay.lane.is_refused(unsent));
    assert!(!pair.relay.lane.is_refused(relay));
    assert_eq!(pair.relay.recv(relay), received(data(b"arrived")));
    assert_eq!(pair.relay.recv(relay), received_reset(failure::TUNNEL_LOST));
    assert_eq!(pair.relay.lane.poll_timeout(), None);
    let opened = pair.relay.lane.open(RequestId(77), 1, proto::Open::default());
    assert_eq!(opened, Err(OpenError::Closed));
    pair.relay.drop_handles(relay);
    pair.relay.drop_handles(unsent);
    assert_eq!(pair.relay.lane.exchanges(), 0);
    assert!(!pair.relay.lane.poll_transmit(pair.now, &mut Transmit::new(), usize::MAX));
}

// --- dispatched, refused --------------------------------------------------------------------------

#[test]
fn dispatched_reaches_the_opener_once() {
    let mut pair = Pair::new();
    let (relay, sidecar) = pair.opened();
    assert!(!pair.relay.lane.is_dispatched(relay));
    pair.sidecar.lane.dispatched(sidecar);
    pair.sidecar.lane.dispatched(sidecar);
    pair.relay.lane.dispatched(relay);
    pair.run();
    assert!(pair.relay.lane.is_dispatched(relay));
    assert_eq!(pair.sidecar.stats().sent, 1);
    assert_eq!(pair.relay.stats().sent, 1);
}

#[test]
fn refused_says_that_the_exchange_may_go_elsewhere() {
    let mut pair = Pair::new();
    let (relay, sidecar) = pair.opened();
    pair.sidecar.lane.refused(sidecar, reset(failure::SERVICE_UNREACHABLE));
    pair.run();
    assert_eq!(pair.relay.closed(relay), Poll::Ready(reset(failure::SERVICE_UNREACHABLE)));
    assert!(pair.relay.lane.is_refused(relay));
    let fate = crate::Fate {
        closed: Some(reset(failure::SERVICE_UNREACHABLE)),
        refused: true,
        dispatched: false,
        answered: false,
    };
    assert_eq!(pair.relay.lane.fate(relay), Some(fate));
    pair.relay.drop_handles(relay);
    pair.sidecar.drop_handles(sidecar);
    pair.assert_empty();
}

#[test]
fn refused_after_dispatched_is_a_reset() {
    let mut pair = Pair::new();
    let (relay, sidecar) = pair.opened();
    pair.sidecar.lane.dispatched(sidecar);
    pair.sidecar.lane.refused(sidecar, reset(failure::SERVICE_RESET));
    pair.run();
    assert_eq!(pair.relay.closed(relay), Poll::Ready(reset(failure::SERVICE_RESET)));
    assert!(!pair.relay.lane.is_refused(relay));
}

// --- order ----------------------------------------------------------------------------------------

#[test]
fn a_small_message_does_not_wait_for_bulk() {
    let mut pair = Pair::new().capacity(0);
    let bulk: Vec<Key> = (0..4).map(|_| pair.open()).collect();
    for &key in &bulk {
        for _ in 0..3 {
            assert_eq!(pair.relay.send(key, bytes(20_000)), DONE);
        }
    }
    let mut out = Transmit::new();
    pair.relay.lane.poll_transmit(pair.now, &mut out, 1);
    let small = pair.open();
    assert_eq!(pair.relay.send(small, data(b"small")), DONE);
    let mut waited = 0;
    loop {
        let before = out.len();
        assert!(pair.relay.lane.poll_transmit(pair.now, &mut out, before + 1));
        let message = out.len() - before;
        if message < 100 {
            break;
        }
        waited += message;
    }
    assert!(waited < QUANTUM_BYTES + 20_100, "waited for {waited} bytes");
}

#[test]
fn control_goes_before_data() {
    let mut pair = Pair::new();
    let (first, first_there) = pair.opened();
    let (second, second_there) = pair.opened();
    assert_eq!(pair.relay.send(first, bytes(20_000)), DONE);
    pair.relay.lane.reset(second, reset(failure::CANCELLED));
    let mut out = Transmit::new();
    assert!(pair.relay.lane.poll_transmit(pair.now, &mut out, 1));
    let mut chunks = [std::io::IoSlice::new(&[]); 1];
    out.chunks(&mut chunks);
    let control = chunks[0].to_vec();
    pair.inject_into_sidecar(&control).unwrap();
    assert_eq!(pair.sidecar.recv(second_there), received_reset(failure::CANCELLED));
    assert!(pair.sidecar.recv(first_there).is_pending());
}

#[test]
fn transmit_stops_at_its_bound() {
    let mut pair = Pair::new();
    let relay = pair.open();
    for _ in 0..4 {
        assert_eq!(pair.relay.send(relay, bytes(10_000)), DONE);
    }
    let mut out = Transmit::new();
    assert!(pair.relay.lane.poll_transmit(pair.now, &mut out, 15_000));
    assert!((20_000..21_000).contains(&out.len()), "{}", out.len());
    assert!(!pair.relay.lane.poll_transmit(pair.now, &mut out, 15_000));
}

#[test]
fn the_driver_is_woken_when_there_is_something_to_transmit() {
    let mut pair = Pair::new();
    let (bell, waker) = Bell::new();
    pair.relay.lane.register_driver(&waker);
    let relay = pair.open();
    pair.relay.lane.take_wakes().wake();
    assert_eq!(bell.rings(), 0);
    assert_eq!(pair.relay.send(relay, data(b"a")), DONE);
    assert_eq!(pair.relay.send(relay, data(b"b")), DONE);
    pair.relay.lane.take_wakes().wake();
    assert_eq!(bell.rings(), 1);
    pair.relay.lane.poll_transmit(pair.now, &mut Transmit::new(), usize::MAX);
    pair.relay.lane.register_driver(&waker);
    pair.relay.lane.reset(relay, reset(failure::CANCELLED));
    pair.relay.lane.take_wakes().wake();
    assert_eq!(bell.rings(), 2);
}

#[test]
fn a_receiver_is_woken_by_message_end_and_reset() {
    let mut pair = Pair::new();
    let (relay, sidecar) = pair.opened();
    let (bell, waker) = Bell::new();
    let mut cx = Context::from_waker(&waker);
    assert!(pair.sidecar.lane.poll_recv(sidecar, &mut cx).is_pending());
    assert_eq!(pair.relay.send(relay, data(b"a")), DONE);
    pair.run();
    assert_eq!(bell.rings(), 1);
    assert!(pair.sidecar.lane.poll_recv(sidecar, &mut cx).is_ready());
    assert!(pair.sidecar.lane.poll_recv(sidecar, &mut cx).is_pending());
    pair.relay.lane.finish(relay);
    pair.run();
    assert_eq!(bell.rings(), 2);
    let (relay, sidecar) = pair.opened();
    assert!(pair.sidecar.lane.poll_recv(sidecar, &mut cx).is_pending());
    pair.relay.lane.reset(relay, reset(failure::CANCELLED));
    pair.run();
    assert_eq!(bell.rings(), 3);
}

// --- the lane's own rules -------------------------------------------------------------------------

#[test]
fn going_away_refuses_new_exchanges_and_keeps_those_that_run() {
    let mut pair = Pair::new();
    let (relay, sidecar) = pair.opened();
    let crossing = pair.open();
    pair.sidecar
        .lane
        .go_away(proto::GoAway { code: failure::DRAINING, ..proto::GoAway::default() });
    assert_eq!(pair.relay.send(crossing, data(b"x")), DONE);
    pair.run();
    assert!(matches!(pair.relay.events.pop_front(), Some(Event::GoAway(_))));
    assert_eq!(pair.relay.closed(crossing), Poll::Ready(reset(failure::DRAINING)));
    assert!(pair.relay.lane.is_refused(crossing));
    let opened = pair.relay.lane.open(RequestId(99), 1, proto::Open::default());
    assert_eq!(opened, Err(OpenError::GoingAway));
    assert_eq!(pair.relay.send(relay, data(b"on")), DONE);
    pair.run();
    assert_eq!(pair.sidecar.recv(sidecar), received(data(b"on")));
}

#[test]
fn being_asked_away_loses_no_exchange_that_crosses() {
    let mut pair = Pair::new();
    let crossing = pair.open();
    assert_eq!(pair.relay.send(crossing, data(b"x")), DONE);
    pair.sidecar
        .lane
        .ask_away(proto::GoAway { code: failure::DRAINING, ..proto::GoAway::default() });
    pair.run();
    assert!(matches!(pair.relay.events.pop_front(), Some(Event::GoAway(_))));
    assert!(!pair.relay.lane.is_refused(crossing));
    assert!(matches!(pair.sidecar.events.pop_front(), Some(Event::Opened { .. })));
    let opened = pair.relay.lane.open(RequestId(99), 1, proto::Open::default());
    assert_eq!(opened, Err(OpenError::GoingAway));
}

#[test]
fn documents_reach_the_peer() {
    let mut pair = Pair::new();
    let announce = proto::Announce { version: 7, ..proto::Announce::default() };
    assert!(pair.sidecar.lane.announce(announce.clone()));
    let answer = proto::Announced {
        version: 7,
        accepted: false,
        reasons: vec!["no".to_owned()],
        ..Default::default()
    };
    assert!(pair.relay.lane.announced(answer.clone()));
    pair.run();
    assert_eq!(pair.relay.events.pop_front(), Some(Event::Announce(announce)));
    assert_eq!(pair.sidecar.events.pop_front(), Some(Event::Announced(answer)));
    let credential = proto::Authenticate { credential: b"another".to_vec().into() };
    assert!(pair.sidecar.lane.authenticate(credential.clone()));
    let answer = proto::Authenticated { accepted: true, expires_ms: 5, ..Default::default() };
    assert!(pair.relay.lane.authenticated(answer.clone()));
    pair.run();
    assert_eq!(pair.relay.events.pop_front(), Some(Event::Authenticate(credential)));
    assert_eq!(pair.sidecar.events.pop_front(), Some(Event::Authenticated(answer)));
    pair.assert_empty();
}

#[test]
fn a_document_longer_than_the_peer_accepts_is_not_sent() {
    let mut pair = Pair::with(|config| {
        config.message_bytes_max = MESSAGE_BYTES_MIN;
        config.peer_message_bytes_max = MESSAGE_BYTES_MIN;
    });
    let max = MESSAGE_BYTES_MIN as usize;
    let announced = |len| proto::Announced { reasons: vec!["x".repeat(len)], ..Default::default() };
    assert!(!pair.sidecar.lane.announced(announced(max)));
    assert!(pair.sidecar.lane.announced(announced(max - 16)));
    pair.run();
    assert_eq!(pair.relay.events.len(), 1);
}

#[test]
fn the_longest_open_fits_the_shortest_message_limit() {
    let mut pair = Pair::with(|config| config.message_bytes_max = MESSAGE_BYTES_MIN);
    let options = |len| proto::Open { options: "x".repeat(len), ..proto::Open::default() };
    let too_long = pair.relay.lane.open(RequestId(1), 64, options(OPEN_RECORD_BYTES_MAX));
    assert!(matches!(too_long, Err(OpenError::TooLarge { .. })));
    let open = options(OPEN_RECORD_BYTES_MAX - 8);
    let relay = pair.relay.lane.open(RequestId(u64::MAX), 64, open).unwrap();
    assert_eq!(pair.relay.send(relay, bytes(OPEN_BYTES_MAX)), DONE);
    pair.run();
    assert_eq!(pair.sidecar.events.len(), 1);
}

#[test]
fn an_id_of_the_wrong_parity_or_in_use_is_refused_at_open() {
    let mut pair = Pair::new();
    let mut open = |id| pair.relay.lane.open(RequestId(id), 1, proto::Open::default());
    assert_eq!(open(2), Err(OpenError::InvalidId(RequestId(2))));
    assert_eq!(open(0), Err(OpenError::InvalidId(RequestId(0))));
    assert!(open(1).is_ok());
    assert_eq!(open(1), Err(OpenError::InvalidId(RequestId(1))));
}

#[test]
fn a_peer_that_breaks_a_lanes_rules_loses_the_lane() {
    type Case = (&'static str, Vec<u8>, fn(&LaneError) -> bool);
    let open = |id| message(id, FLAG_OPEN, b"");
    let cases: [Case; 14] = [
        ("wrong parity", open(2), |e| matches!(e, LaneError::WrongParity(_))),
        ("id 0", open(0), |e| matches!(e, LaneError::WrongParity(_))),
        ("id in use", open(1), |e| matches!(e, LaneError::IdInUse(_))),
        (
            "an acknowledgement of what was not sent",
            control(None, field::ACK, &proto::Ack { received: 9 }),
            |e| matches!(e, LaneError::Ack { received: 9, sent: 0, before: 0 }),
        ),
        ("hello", control(None, field::HELLO, &proto::Hello::default()), |e| {
            matches!(e, LaneError::Unexpected { field: 32 })
        }),
        ("welcome", control(None, field::WELCOME, &proto::Welcome::default()), |e| {
            matches!(e, LaneError::Unexpected { field: 33 })
        }),
        ("refuse", control(None, field::REFUSE, &proto::Refuse::default()), |e| {
            matches!(e, LaneError::Unexpected { field: 34 })
        }),
        ("resume", control(None, field::RESUME, &proto::Resume::default()), |e| {
            matches!(e, LaneError::Unexpected { field: 35 })
        }),
        (
            "data without an id",
            encoded(&Envelope { field: field::CUSTOM, ..Envelope::default() }),
            |e| matches!(e, LaneError::Unexpected { field: 31 }),
        ),
        (
            "lane control with an id",
            control(Some(1), field::PING, &proto::Ping { token: 1 }),
            |e| matches!(e, LaneError::Unexpected { field: 38 }),
        ),
        (
            "dispatched by the opener",
            control(Some(1), field::DISPATCHED, &proto::Dispatched {}),
            |e| matches!(e, LaneError::Unexpected { field: 50 }),
        ),
        (
            "refused by the opener",
            control(Some(1), field::REFUSED, &proto::Refused::default()),
            |e| matches!(e, LaneError::Unexpected { field: 51 }),
        ),
        (
            "a malformed control message",
            encoded(&Envelope {
                field: field::PING,
                payload: Bytes::from_static(&[0xff]),
                ..Envelope::default()
            }),
            |e| matches!(e, LaneError::Payload { field: 38, .. }),
        ),
        ("a frame above the limit", vec![0xff, 0xff, 0xff, 0x7f], |e| {
            matches!(e, LaneError::Decode(_))
        }),
    ];
    for (name, bytes, expected) in cases {
        let mut pair = Pair::new();
        pair.opened();
        let error = pair.inject_into_sidecar(&bytes).expect_err(name);
        assert!(expected(&error), "{name}: {error:?}");
    }
}

#[test]
fn a_datagram_is_reserved_and_dropped() {
    let mut pair = Pair::new();
    let (_, sidecar) = pair.opened();
    let before = pair.sidecar.stats().received;
    pair.inject_into_sidecar(&message(1, FLAG_DATAGRAM, b"x")).unwrap();
    assert!(pair.sidecar.recv(sidecar).is_pending());
    assert_eq!(pair.sidecar.stats().received, before);
}

#[test]
fn messages_of_a_later_version_leave_nothing_behind() {
    let mut pair = Pair::new();
    let (_, sidecar) = pair.opened();
    // Field 60, unknown, and nothing else but whose message it is.
    pair.inject_into_sidecar(&[7, 0x12, 1, b'1', 0xe2, 3, 1, 0]).unwrap();
    pair.inject_into_sidecar(&[4, 0xe2, 3, 1, 0]).unwrap();
    assert!(pair.sidecar.recv(sidecar).is_pending());
    assert!(pair.sidecar.closed(sidecar).is_pending());
}

#[test]
fn a_flood_of_pings_is_bounded() {
    let mut pair = Pair::with(|config| config.exchanges_max = 10);
    let ping = control(None, field::PING, &proto::Ping { token: 1 });
    let error = pair.inject_into_sidecar(&ping.repeat(1000)).unwrap_err();
    assert!(matches!(error, LaneError::ControlFlood { max: 286 }), "{error:?}");
}

#[test]
fn a_flood_of_opens_and_resets_is_bounded() {
    let mut pair = Pair::with(|config| config.exchanges_max = 10);
    let mut result = Ok(());
    for id in (1..2000).step_by(2) {
        let reset = control(Some(id), field::RESET, &proto::Reset::default());
        let bytes = [message(id, FLAG_OPEN, b"x"), reset].concat();
        result = pair.inject_into_sidecar(&bytes);
        if result.is_err() {
            break;
        }
    }
    assert!(matches!(result, Err(LaneError::ControlFlood { .. })), "{result:?}");
    assert!(pair.sidecar.stats().exchanges <= 10);
}

#[test]
fn a_flood_of_announcements_is_bounded() {
    let mut pair = Pair::with(|config| config.exchanges_max = 10);
    let announce = control(None, field::ANNOUNCE, &proto::Announce::default());
    let error = pair.inject_into_relay(&announce.repeat(1000)).unwrap_err();
    assert!(matches!(error, LaneError::EventFlood { max: 266 }), "{error:?}");
}

#[test]
fn counted_are_the_messages_that_a_loss_replays() {
    let mut pair = Pair::new();
    let (relay, sidecar) = pair.opened();
    pair.pass(Duration::from_secs(30)).unwrap();
    assert_eq!(pair.relay.stats().sent, 1, "pings and pongs are not counted");
    assert!(pair.relay.stats().messages_out > 6);
    fill(&mut pair, relay);
    while pair.sidecar.recv(sidecar).is_ready() {}
    pair.run();
    assert_eq!(pair.sidecar.stats().sent, 0, "windows are not counted");
    pair.sidecar.lane.dispatched(sidecar);
    pair.sidecar.lane.announce(proto::Announce::default());
    pair.sidecar.lane.finish(sidecar);
    pair.sidecar.lane.go_away(proto::GoAway::default());
    pair.run();
    assert_eq!(pair.sidecar.stats().sent, 4);
    assert_eq!(pair.relay.stats().received, 4);
    let ack = control(None, field::ACK, &proto::Ack { received: 3 });
    pair.inject_into_sidecar(&ack).unwrap();
    assert_eq!(pair.sidecar.stats().acknowledged, 3);
    let back = control(None, field::ACK, &proto::Ack { received: 2 });
    assert!(matches!(pair.inject_into_sidecar(&back), Err(LaneError::Ack { .. })));
}

#[test]
fn pings_measure_the_round_trip_and_keep_an_idle_lane_alive() {
    let mut pair = Pair::new().latency(Duration::from_millis(40));
    pair.pass(Duration::from_secs(60)).unwrap();
    assert_eq!(pair.relay.stats().rtt, Some(Duration::from_millis(80)));
    assert!(matches!(pair.relay.events.pop_front(), Some(Event::Rtt(_))));
    assert!(pair.relay.stats().messages_out <= 2 * 14);
}

#[test]
fn a_silent_peer_is_dead_after_its_time() {
    let mut pair = Pair::new();
    pair.pass(Duration::from_secs(1)).unwrap();
    let lane = &mut pair.relay.lane;
    let mut now = pair.now;
    loop {
        let due = lane.poll_timeout().expect("the lane is open");
        assert!(due > now, "a timeout that is handled is not due again");
        now = due;
        let result = lane.handle_timeout(now);
        if result.is_err() {
            assert!(matches!(result, Err(LaneError::Dead(_))));
            break;
        }
    }
    let silent = now - pair.now;
    assert!(silent >= Duration::from_secs(9) && silent <= Duration::from_secs(10), "{silent:?}");
}

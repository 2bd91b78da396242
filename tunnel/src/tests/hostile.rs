//! Peers that break rules or ask for too much: each harms its own lane, or its own exchange, and costs no
//! more memory than a named bound.

use std::task::Poll;

use bytes::{Bytes, BytesMut};
use sidelane_abi::{OPEN_BYTES_MAX, failure};

use super::pair::{Pair, data};
use crate::envelope::{self, Envelope, FLAG_OPEN, field};
use crate::{
    Acceptor, HELLO_BYTES_MAX, HandshakeError, Key, LaneConfig, LaneError, Payload, RequestId,
    Reset, SEND_QUEUE_BYTES_MAX, Transmit, proto,
};

const RING_BYTES: u64 = 64 * 1024;

fn keeping(config: &mut LaneConfig) {
    config.replay_bytes_min = RING_BYTES;
    config.replay_bytes_max = RING_BYTES;
    config.exchanges_max = 100;
}

fn encoded(id: Option<u64>, flags: u32, field: u32, payload: Vec<u8>) -> Vec<u8> {
    let mut out = Vec::new();
    envelope::write(
        &mut out,
        &Envelope {
            request_id: id.map(RequestId),
            flags,
            field,
            payload: payload.into(),
            ..Envelope::default()
        },
    );
    out
}

fn control(id: Option<u64>, field: u32, message: &impl prost::Message) -> Vec<u8> {
    encoded(id, 0, field, message.encode_to_vec())
}

fn bytes(len: usize) -> Payload {
    Payload { body: Bytes::from(vec![1; len]), ..data(b"") }
}

/// Takes what the relay would write, and gives it to nobody.
fn lose(pair: &mut Pair) -> usize {
    let mut out = Transmit::new();
    pair.relay.lane.poll_transmit(pair.now, &mut out, usize::MAX);
    out.len()
}

#[test]
fn a_peer_that_acknowledges_nothing_fills_a_ring_and_no_more() {
    let mut pair = Pair::with(keeping);
    let keys: Vec<Key> = (0..100).map(|_| pair.open()).collect();
    let mut written = 0;
    for _ in 0..100 {
        for &key in &keys {
            let _ = pair.relay.send(key, bytes(30_000));
        }
        written += lose(&mut pair);
    }
    let stats = pair.relay.stats();
    assert!(written as u64 <= RING_BYTES + 31_000, "{written}");
    assert!(stats.replay_bytes < RING_BYTES + 31_000, "{stats:?}");
    assert!(stats.send_queued_bytes <= 100 * SEND_QUEUE_BYTES_MAX as u64, "{stats:?}");
    // Its pings are answered all the same.
    let ping = control(None, field::PING, &proto::Ping { token: 1 });
    pair.inject_into_relay(&ping).unwrap();
    assert!(pair.relay.lane.wants_transmit());
    assert!((1..100).contains(&lose(&mut pair)));
    assert!(!pair.relay.lane.wants_transmit());
}

#[test]
fn a_peer_that_acknowledges_what_it_did_not_get_harms_itself() {
    let mut pair = Pair::with(keeping);
    let (relay, _) = pair.opened();
    for _ in 0..10 {
        assert!(pair.relay.send(relay, data(b"lost")).is_ready());
    }
    lose(&mut pair);
    let ack = |received| control(None, field::ACK, &proto::Ack { received });
    // All of it, unread: nothing is kept for it any more.
    pair.inject_into_relay(&ack(11)).unwrap();
    assert_eq!(pair.relay.stats().replay_bytes, 0);
    for received in [12, u64::MAX, 10, 0] {
        let error = pair.inject_into_relay(&ack(received)).unwrap_err();
        assert!(matches!(error, LaneError::Ack { sent: 11, before: 11, .. }), "{error:?}");
    }
}

#[test]
fn acknowledgements_ahead_of_a_replay_end_it_early() {
    let mut pair = Pair::with(keeping);
    let (relay, _) = pair.opened();
    for _ in 0..10 {
        assert!(pair.relay.send(relay, bytes(700)).is_ready());
    }
    lose(&mut pair);
    pair.relay.lane.detach();
    pair.relay.lane.resume(pair.now, 3).unwrap();
    let mut out = Transmit::new();
    pair.relay.lane.poll_transmit(pair.now, &mut out, 1);
    for received in [4, 8, 11] {
        let ack = control(None, field::ACK, &proto::Ack { received });
        pair.inject_into_relay(&ack).unwrap();
        pair.relay.lane.poll_transmit(pair.now, &mut out, 1);
    }
    assert!(!pair.relay.lane.wants_transmit());
    assert_eq!(pair.relay.stats().replay_bytes, 0);
}

#[test]
fn a_resume_with_an_absurd_count_is_refused_and_changes_nothing() {
    let mut pair = Pair::with(keeping);
    let (relay, _) = pair.opened();
    pair.pass(crate::ACK_DELAY).unwrap();
    assert!(pair.relay.send(relay, data(b"kept")).is_ready());
    lose(&mut pair);
    pair.relay.lane.detach();
    let before = pair.relay.stats();
    for received in [0, before.sent + 1, u64::MAX] {
        let error = pair.relay.lane.resume(pair.now, received).unwrap_err();
        assert!(matches!(error, LaneError::Gap { .. }), "{error:?}");
        assert_eq!(pair.relay.stats(), before);
    }
    pair.relay.lane.resume(pair.now, before.acknowledged).unwrap();
    assert!(pair.relay.lane.wants_transmit());
}

#[test]
fn floods_of_windows_and_acknowledgements_leave_nothing_behind() {
    let mut pair = Pair::with(keeping);
    let (relay, _) = pair.opened();
    pair.pass(crate::ACK_DELAY).unwrap();
    lose(&mut pair);
    let flood = [
        control(Some(1), field::WINDOW, &proto::Window { limit: u64::MAX }),
        control(Some(77), field::WINDOW, &proto::Window { limit: u64::MAX }),
        control(None, field::ACK, &proto::Ack { received: 1 }),
        control(None, field::PONG, &proto::Pong { token: 99 }),
        control(Some(79), field::RESET, &proto::Reset::default()),
        control(Some(79), field::REFUSED, &proto::Refused::default()),
        control(Some(79), field::DISPATCHED, &proto::Dispatched {}),
        encoded(Some(81), 0, field::CUSTOM, vec![0; 100]),
    ]
    .concat();
    pair.inject_into_relay(&flood.repeat(10_000)).unwrap();
    let stats = pair.relay.stats();
    assert_eq!((stats.late, stats.exchanges), (50_000, 1));
    assert!(stats.control_queued <= 1, "an acknowledgement: {stats:?}");
    // No credit in the way, and still no more than a few messages at once.
    let mut queued = 0;
    while pair.relay.send(relay, bytes(8 * 1024)).is_ready() {
        queued += 8 * 1024;
        assert!(queued <= SEND_QUEUE_BYTES_MAX);
    }
}

#[test]
fn a_flood_of_opens_is_answered_by_refusals_up_to_a_bound() {
    let mut pair = Pair::with(keeping);
    let mut result = Ok(());
    let mut opens = 0_u64;
    while result.is_ok() {
        let open = encoded(Some(2 * opens + 1), FLAG_OPEN, field::CUSTOM, vec![0; 10]);
        result = pair.inject_into_sidecar(&open);
        opens += 1;
        assert!(opens < 10_000);
    }
    assert!(matches!(result, Err(LaneError::ControlFlood { max: 556 })), "{result:?}");
    let stats = pair.sidecar.stats();
    assert_eq!((stats.exchanges, stats.control_queued), (100, 556));
    assert_eq!(opens, 100 + 556 + 1);
}

/// Who reads the refusals may go on.
#[test]
fn refused_opens_that_are_read_do_not_end_the_lane() {
    let mut pair = Pair::with(keeping);
    for number in 0..5000_u64 {
        let open = encoded(Some(2 * number + 1), FLAG_OPEN, field::CUSTOM, vec![0; 10]);
        pair.inject_into_sidecar(&open).unwrap();
        let mut out = Transmit::new();
        pair.sidecar.lane.poll_transmit(pair.now, &mut out, usize::MAX);
        let sent = pair.sidecar.stats().sent;
        let ack = control(None, field::ACK, &proto::Ack { received: sent });
        pair.inject_into_sidecar(&ack).unwrap();
    }
    assert_eq!(pair.sidecar.stats().opens_refused, 4900);
}

#[test]
fn what_a_peer_sends_unread_is_bounded_by_the_lane() {
    let mut pair = Pair::with(|config| {
        keeping(config);
        config.queued_bytes_max = 1 << 20;
    });
    let mut refused_at = None;
    for number in 0..60_u64 {
        let id = Some(2 * number + 1);
        let open = encoded(id, FLAG_OPEN, field::CUSTOM, vec![0; OPEN_BYTES_MAX]);
        pair.inject_into_sidecar(&open).unwrap();
        // All that its credit allows, and more.
        for _ in 0..10 {
            let more = encoded(id, 0, field::CUSTOM, vec![0; OPEN_BYTES_MAX]);
            pair.inject_into_sidecar(&more).unwrap();
        }
        let stats = pair.sidecar.stats();
        assert!(stats.receive_queued_bytes <= (2 << 20), "{stats:?}");
        if stats.opens_refused > 0 {
            refused_at = refused_at.or(Some(number));
        }
    }
    assert!(refused_at.is_some_and(|at| at <= 2), "{refused_at:?}");
    assert!(pair.sidecar.stats().violations > 0);
}

#[test]
fn a_peer_that_reads_nothing_is_written_to_in_bounded_pieces() {
    let mut pair = Pair::new();
    let keys: Vec<Key> = (0..50).map(|_| pair.open()).collect();
    let mut out = Transmit::new();
    for _ in 0..100 {
        for &key in &keys {
            let _ = pair.relay.send(key, bytes(30_000));
        }
        pair.relay.lane.poll_transmit(pair.now, &mut out, 128 * 1024);
        assert!(out.len() <= 128 * 1024 + OPEN_BYTES_MAX + 1024, "{}", out.len());
    }
}

#[test]
fn a_message_that_is_announced_too_long_is_refused_before_it_comes() {
    let mut pair = Pair::with(|config| config.message_bytes_max = 1 << 20);
    // 2 MiB in the first bytes.
    let error = pair.inject_into_relay(&[0x80, 0x80, 0x80, 0x01]).unwrap_err();
    assert!(matches!(error, LaneError::Decode(_)), "{error:?}");
    // The longest one is waited for.
    let mut pair = Pair::with(|config| config.message_bytes_max = 1 << 20);
    assert_eq!(pair.inject_into_relay(&[0x80, 0x80, 0x40]), Ok(()));
    let mut first = BytesMut::from(&[0x81, 0x80, 0x04][..]);
    let error = Acceptor::new().handle_input(&mut first).unwrap_err();
    assert!(matches!(error, HandshakeError::Decode(_)), "{HELLO_BYTES_MAX}: {error:?}");
}

#[test]
fn an_announcement_of_countless_empty_entries_is_not_decoded() {
    let announce = |entries| {
        let routes = vec![proto::AnnouncedRoute::default(); entries];
        control(None, field::ANNOUNCE, &proto::Announce { routes, ..proto::Announce::default() })
    };
    let mut pair = Pair::new();
    assert_eq!(pair.inject_into_relay(&announce(16 * 1024)), Ok(()));
    let error = pair.inject_into_relay(&announce(16 * 1024 + 1)).unwrap_err();
    assert!(matches!(error, LaneError::TooManyEntries { field: field::ANNOUNCE, .. }));
    assert_eq!(error.to_string(), "more than 16384 entries in field 41");
    let reasons = vec![String::new(); 16 * 1024 + 1];
    let announced = proto::Announced { reasons, ..proto::Announced::default() };
    let error = pair.inject_into_sidecar(&control(None, field::ANNOUNCED, &announced));
    assert!(matches!(error, Err(LaneError::TooManyEntries { field: field::ANNOUNCED, .. })));
}

#[test]
fn another_lane_notices_nothing() {
    let mut hostile = Pair::with(keeping);
    let mut honest = Pair::with(keeping);
    let (relay, sidecar) = honest.opened();
    assert!(hostile.inject_into_relay(&[0xff; 64]).is_err());
    hostile.relay.lane.close(Reset::new(failure::TUNNEL_LOST));
    assert!(honest.relay.send(relay, data(b"on")).is_ready());
    honest.run();
    assert!(matches!(honest.sidecar.recv(sidecar), Poll::Ready(_)));
}

//! Credit and backpressure: one test per rule.

use std::task::{Context, Poll};
use std::time::Duration;

use sidelane_abi::{MESSAGE_BYTES_MAX, OPEN_BYTES_MAX, failure};

use super::lane::{DONE, bytes, control, failed, fill, message, received, received_reset, reset};
use super::pair::{Bell, Pair, data, last};
use crate::envelope::{FLAG_END, FLAG_OPEN, field};
use crate::{Key, OpenError, RequestId, SEND_QUEUE_BYTES_MAX, Transmit, proto};

// --- credit ---------------------------------------------------------------------------------------

#[test]
fn credit_bounds_what_an_unread_exchange_may_send() {
    let mut pair = Pair::new();
    let (relay, _) = pair.opened();
    let sent = fill(&mut pair, relay);
    assert!((200 * 1024..=256 * 1024).contains(&sent), "{sent}");
    assert_eq!(pair.sidecar.stats().receive_queued_bytes, sent as u64 + 64 * sent as u64 / 32768);
}

#[test]
fn receive_returns_credit() {
    let mut pair = Pair::new();
    let (relay, sidecar) = pair.opened();
    fill(&mut pair, relay);
    let (bell, waker) = Bell::new();
    let mut waiting = Some(bytes(32 * 1024));
    let mut cx = Context::from_waker(&waker);
    assert!(pair.relay.lane.poll_send(relay, &mut cx, &mut waiting).is_pending());
    assert!(waiting.is_some(), "backpressure leaves the message with its owner");
    while pair.sidecar.recv(sidecar).is_ready() {}
    assert_eq!(bell.rings(), 0);
    pair.run();
    pair.run();
    assert_eq!(bell.rings(), 1);
    assert_eq!(pair.relay.lane.poll_send(relay, &mut cx, &mut waiting), DONE);
    assert!(fill(&mut pair, relay) > 128 * 1024);
}

#[test]
fn credit_of_one_exchange_is_not_anothers() {
    let mut pair = Pair::new();
    let (first, _) = pair.opened();
    let (second, second_there) = pair.opened();
    fill(&mut pair, first);
    assert_eq!(pair.relay.send(second, data(b"goes on")), DONE);
    pair.run();
    assert_eq!(pair.sidecar.recv(second_there), received(data(b"goes on")));
}

#[test]
fn the_first_message_of_a_direction_costs_no_credit() {
    let mut pair = Pair::new();
    let relay = pair.open();
    assert_eq!(pair.relay.send(relay, bytes(OPEN_BYTES_MAX)), DONE);
    pair.run();
    let (sidecar, ..) = pair.sidecar.opened();
    assert_eq!(pair.sidecar.send(sidecar, bytes(OPEN_BYTES_MAX)), DONE);
    let queued = fill(&mut pair, relay);
    assert!(queued > 200 * 1024, "the first message is not charged: {queued}");
    assert_eq!(pair.relay.recv(relay), received(bytes(OPEN_BYTES_MAX)));
    assert_eq!(pair.sidecar.recv(sidecar), received(bytes(OPEN_BYTES_MAX)));
}

#[test]
fn a_payload_above_the_bound_resets_its_exchange_alone() {
    let mut pair = Pair::new();
    let (relay, sidecar) = pair.opened();
    let (other, _) = pair.opened();
    assert_eq!(pair.relay.send(relay, bytes(OPEN_BYTES_MAX + 1)), failed(failure::TOO_LARGE));
    assert_eq!(pair.relay.send(relay, data(b"")), failed(failure::TOO_LARGE));
    pair.run();
    assert_eq!(pair.sidecar.recv(sidecar), received_reset(failure::TOO_LARGE));
    assert_eq!(pair.relay.send(other, bytes(OPEN_BYTES_MAX)), DONE);
}

/// In the smallest window and behind a message that leaves no room beside it.
#[test]
fn a_message_of_the_largest_size_passes_in_any_place() {
    let mut pair = Pair::with(|config| {
        config.receive_window = 64 * 1024;
        config.send_window = 64 * 1024;
        config.window_max = 64 * 1024;
    });
    let (relay, sidecar) = pair.opened();
    for _ in 0..10 {
        for len in [1, OPEN_BYTES_MAX, MESSAGE_BYTES_MAX + 1] {
            let mut tries = 0;
            while pair.relay.send(relay, bytes(len)).is_pending() {
                tries += 1;
                assert!(tries < 5, "stuck at {len} bytes");
                pair.run();
                let _ = pair.sidecar.recv(sidecar);
            }
        }
    }
    pair.run();
    while pair.sidecar.recv(sidecar).is_ready() {
        pair.run();
    }
    assert_eq!(pair.relay.stats().violations + pair.sidecar.stats().violations, 0);
    assert!(pair.relay.closed(relay).is_pending());
}

/// What waits at an end is at most three and a half windows and the first message.
#[test]
fn large_messages_are_bounded_by_their_number() {
    let mut pair = Pair::new();
    let (_, sidecar) = pair.opened();
    let large = message(1, 0, &vec![0; OPEN_BYTES_MAX]);
    // 256 KiB of credit at 33 KiB and 64 bytes each.
    for _ in 0..7 {
        pair.inject_into_sidecar(&large).unwrap();
    }
    assert_eq!(pair.sidecar.stats().violations, 0);
    pair.inject_into_sidecar(&large).unwrap();
    assert_eq!(pair.sidecar.stats().violations, 1);
    assert_eq!(pair.sidecar.closed(sidecar), Poll::Ready(reset(failure::FLOW_CONTROL)));
}

#[test]
fn a_peer_beyond_its_credit_loses_that_exchange_alone() {
    let mut pair = Pair::new();
    let (relay, sidecar) = pair.opened();
    let (other, other_there) = pair.opened();
    for _ in 0..9 {
        pair.inject_into_sidecar(&message(1, 0, &[0; 32 * 1024])).unwrap();
    }
    assert_eq!(pair.sidecar.closed(sidecar), Poll::Ready(reset(failure::FLOW_CONTROL)));
    assert_eq!(pair.sidecar.stats().violations, 1);
    pair.run();
    assert_eq!(pair.relay.closed(relay), Poll::Ready(reset(failure::FLOW_CONTROL)));
    assert_eq!(pair.relay.send(other, data(b"on")), DONE);
    pair.run();
    assert_eq!(pair.sidecar.recv(other_there), received(data(b"on")));
}

#[test]
fn a_peers_message_above_the_bound_loses_that_exchange_alone() {
    let mut pair = Pair::new();
    let (_, sidecar) = pair.opened();
    pair.inject_into_sidecar(&message(1, 0, &vec![0; OPEN_BYTES_MAX + 1])).unwrap();
    assert_eq!(pair.sidecar.recv(sidecar), received_reset(failure::FLOW_CONTROL));
}

#[test]
fn an_open_above_the_bound_is_refused() {
    let mut pair = Pair::new();
    let open = message(1, FLAG_OPEN, &vec![0; OPEN_BYTES_MAX + 1]);
    pair.inject_into_sidecar(&open).unwrap();
    assert!(pair.sidecar.events.is_empty());
    assert_eq!(pair.sidecar.stats().opens_refused, 1);
    assert_eq!(pair.sidecar.stats().exchanges, 0);
}

#[test]
fn a_message_after_the_end_loses_that_exchange_alone() {
    let mut pair = Pair::new();
    let (_, sidecar) = pair.opened();
    pair.inject_into_sidecar(&message(1, FLAG_END, b"end")).unwrap();
    pair.inject_into_sidecar(&message(1, 0, b"more")).unwrap();
    assert_eq!(pair.sidecar.closed(sidecar), Poll::Ready(reset(failure::FLOW_CONTROL)));
    assert_eq!(pair.sidecar.recv(sidecar), received(last(b"end")));
}

#[test]
fn an_exchange_may_have_a_window_of_its_own() {
    let mut pair = Pair::new();
    let open = proto::Open { window: 64 * 1024, ..proto::Open::default() };
    let relay = pair.relay.lane.open(RequestId(1), 3, open).unwrap();
    assert_eq!(pair.relay.send(relay, data(b"upgrade")), DONE);
    pair.run();
    let (sidecar, ..) = pair.sidecar.opened();
    assert_eq!(pair.sidecar.send(sidecar, data(b"101")), DONE);
    let mut sent = 0;
    while pair.sidecar.send(sidecar, bytes(4096)) == DONE {
        sent += 4096;
        pair.run();
    }
    assert_eq!(sent, 15 * 4096, "64 KiB with 64 bytes charged for each message");
    assert!(fill(&mut pair, relay) > 200 * 1024, "the other direction has the lane's window");
}

#[test]
fn a_window_grows_with_bandwidth_and_delay() {
    let mut pair = Pair::new().latency(Duration::from_millis(25));
    pair.pass(Duration::from_secs(1)).unwrap();
    let (relay, sidecar) = pair.opened();
    let mut most = 0;
    for _ in 0..30 {
        let mut sent = 0;
        while pair.relay.send(relay, bytes(32 * 1024)) == DONE {
            sent += 32 * 1024;
            while pair.step().unwrap() {}
        }
        most = most.max(sent);
        pair.run();
        while pair.sidecar.recv(sidecar).is_ready() {}
        pair.run();
    }
    assert!(most > 2 * 1024 * 1024, "{most}");
    assert!(most <= 4 * 1024 * 1024, "{most}");
}

#[test]
fn a_repeated_window_changes_nothing() {
    let mut pair = Pair::new();
    let (relay, _) = pair.opened();
    fill(&mut pair, relay);
    let window = control(Some(1), field::WINDOW, &proto::Window { limit: 256 * 1024 });
    pair.inject_into_relay(&window).unwrap();
    pair.inject_into_relay(&control(Some(1), field::WINDOW, &proto::Window { limit: 7 })).unwrap();
    assert!(pair.relay.send(relay, bytes(32 * 1024)).is_pending());
}

// --- backpressure ---------------------------------------------------------------------------------

#[test]
fn a_slow_lane_pushes_back_on_each_exchange() {
    let mut pair = Pair::new().capacity(0);
    let relay = pair.open();
    let mut sent = 0;
    while pair.relay.send(relay, bytes(8 * 1024)) == DONE {
        sent += 8 * 1024;
    }
    assert!(sent <= SEND_QUEUE_BYTES_MAX, "{sent}");
    let (bell, waker) = Bell::new();
    let mut cx = Context::from_waker(&waker);
    assert!(pair.relay.lane.poll_send(relay, &mut cx, &mut Some(bytes(8 * 1024))).is_pending());
    let mut out = Transmit::new();
    pair.relay.lane.poll_transmit(pair.now, &mut out, usize::MAX);
    pair.relay.lane.take_wakes().wake();
    assert_eq!(bell.rings(), 1);
    assert_eq!(pair.relay.send(relay, bytes(8 * 1024)), DONE);
}

#[test]
fn a_full_lane_makes_all_senders_wait_and_refuses_opens() {
    let mut pair = Pair::with(|config| config.queued_bytes_max = 100_000).capacity(0);
    let keys: Vec<Key> = (0..4).map(|_| pair.open()).collect();
    let (bell, waker) = Bell::new();
    let mut cx = Context::from_waker(&waker);
    let mut waiting = 0;
    for &key in &keys {
        let poll = pair.relay.lane.poll_send(key, &mut cx, &mut Some(bytes(60_000)));
        waiting += usize::from(poll.is_pending());
    }
    assert_eq!(waiting, 2);
    let refused = pair.relay.lane.open(RequestId(99), 1, proto::Open::default());
    assert_eq!(refused, Err(OpenError::Overloaded));
    let mut out = Transmit::new();
    pair.relay.lane.poll_transmit(pair.now, &mut out, usize::MAX);
    pair.relay.lane.take_wakes().wake();
    assert_eq!(bell.rings(), 2);
    assert_eq!(pair.relay.send(keys[2], bytes(60_000)), DONE);
}

#[test]
fn an_exchange_that_ends_unsent_makes_room_in_the_lane() {
    let mut pair = Pair::with(|config| config.queued_bytes_max = 50_000).capacity(0);
    let (first, second) = (pair.open(), pair.open());
    assert_eq!(pair.relay.send(first, bytes(60_000)), DONE);
    let (bell, waker) = Bell::new();
    let mut cx = Context::from_waker(&waker);
    let mut waiting = Some(bytes(100));
    assert!(pair.relay.lane.poll_send(second, &mut cx, &mut waiting).is_pending());
    pair.relay.drop_handles(first);
    pair.relay.lane.take_wakes().wake();
    assert_eq!(bell.rings(), 1);
    assert_eq!(pair.relay.lane.poll_send(second, &mut cx, &mut waiting), DONE);
}

#[test]
fn a_receiver_full_of_unread_bytes_refuses_opens() {
    let mut pair = Pair::with(|config| config.queued_bytes_max = 100_000);
    let (first, first_there) = pair.opened();
    fill(&mut pair, first);
    let second = pair.open();
    assert_eq!(pair.relay.send(second, data(b"no room")), DONE);
    pair.run();
    assert_eq!(pair.relay.closed(second), Poll::Ready(reset(failure::OVERLOADED)));
    assert!(pair.relay.lane.is_refused(second));
    while pair.sidecar.recv(first_there).is_ready() {}
    let third = pair.open();
    assert_eq!(pair.relay.send(third, data(b"room")), DONE);
    pair.run();
    assert!(pair.relay.closed(third).is_pending());
}

#[test]
fn exchanges_above_the_limit_are_refused_each_by_itself() {
    let mut pair = Pair::with(|config| {
        config.exchanges_max = if config.side == crate::Side::Sidecar { 2 } else { 3 };
    });
    let keys = [pair.open(), pair.open(), pair.open()];
    let fourth = pair.relay.lane.open(RequestId(9), 1, proto::Open::default());
    assert_eq!(fourth, Err(OpenError::Overloaded));
    for key in keys {
        assert_eq!(pair.relay.send(key, last(b"x")), DONE);
    }
    pair.run();
    assert_eq!(pair.sidecar.events.len(), 2);
    assert!(pair.relay.closed(keys[0]).is_pending());
    assert_eq!(pair.relay.closed(keys[2]), Poll::Ready(reset(failure::OVERLOADED)));
    assert!(pair.relay.lane.is_refused(keys[2]));
    assert!(!pair.relay.lane.is_refused(keys[0]));
}

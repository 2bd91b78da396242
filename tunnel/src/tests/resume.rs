//! Lanes that lose their connection and come back on another one.

use std::task::Poll;
use std::time::Duration;

use bytes::BytesMut;
use sidelane_abi::failure;

use super::pair::{Pair, data, last};
use crate::envelope::{self, Envelope, field};
use crate::{Event, LaneConfig, LaneError, Received, Reset, Transmit, proto};

fn pair() -> Pair {
    Pair::with(keeping)
}

fn keeping(config: &mut LaneConfig) {
    config.replay_bytes_min = 4 * 1024;
    config.replay_bytes_max = 4 * 1024;
}

#[test]
fn what_was_on_its_way_comes_once_and_in_order() {
    let mut pair = pair();
    let (relay, sidecar) = pair.opened();
    for number in 0..10_u8 {
        assert!(pair.relay.send(relay, data(&[number])).is_ready());
        if number % 3 == 0 {
            // Taken from the lane, and lost.
            let _ = pair.step();
            pair.cut();
            pair.resume().unwrap();
        }
    }
    assert!(pair.relay.send(relay, last(&[10])).is_ready());
    pair.cut();
    pair.resume().unwrap();
    pair.run();
    for number in 0..10_u8 {
        assert_eq!(pair.sidecar.recv(sidecar), Poll::Ready(Received::Message(data(&[number]))));
    }
    assert_eq!(pair.sidecar.recv(sidecar), Poll::Ready(Received::Message(last(&[10]))));
    assert_eq!(pair.sidecar.recv(sidecar), Poll::Ready(Received::Finished));
    assert_eq!(pair.relay.stats().resumes, 5);
}

#[test]
fn a_full_ring_holds_back_and_loses_nothing() {
    let mut pair = pair();
    let (relay, sidecar) = pair.opened();
    let mut sent = 0_u32;
    let mut received = 0_u32;
    while received < 1000 {
        while sent < 1000 && pair.relay.send(relay, data(&sent.to_be_bytes())).is_ready() {
            sent += 1;
        }
        let _ = pair.step();
        assert!(pair.relay.stats().replay_bytes <= 4 * 1024 + 100, "{:?}", pair.relay.stats());
        if received.is_multiple_of(7) {
            pair.cut();
            pair.resume().unwrap();
        }
        pair.pass(crate::ACK_DELAY).unwrap();
        while let Poll::Ready(Received::Message(payload)) = pair.sidecar.recv(sidecar) {
            assert_eq!(payload.body, received.to_be_bytes()[..]);
            received += 1;
        }
    }
}

#[test]
fn a_gap_is_refused() {
    let mut pair = pair();
    let (relay, _) = pair.opened();
    assert!(pair.relay.send(relay, data(b"a")).is_ready());
    pair.run();
    pair.pass(crate::ACK_DELAY).unwrap();
    let stats = pair.relay.stats();
    assert_eq!(stats.acknowledged, stats.sent);
    pair.cut();
    for received in [stats.sent + 1, stats.acknowledged - 1] {
        let gap = pair.relay.lane.resume(pair.now, received).unwrap_err();
        assert!(matches!(gap, LaneError::Gap { .. }), "{gap:?}");
        assert!(!pair.relay.lane.is_attached());
    }
}

#[test]
fn without_a_carrier_nothing_is_taken_in_and_nothing_counts() {
    let mut pair = pair();
    let (relay, _) = pair.opened();
    assert!(pair.relay.send(relay, data(b"in flight")).is_ready());
    let mut out = Transmit::new();
    assert!(pair.relay.lane.poll_transmit(pair.now, &mut out, usize::MAX));
    let mut chunks = [std::io::IoSlice::new(&[]); 1];
    out.chunks(&mut chunks);
    let late = chunks[0].to_vec();
    pair.cut();
    let told = pair.sidecar.lane.received();
    let mut buffer = BytesMut::from(&*late);
    assert_eq!(pair.sidecar.lane.handle_input(pair.now, &mut buffer), Ok(()));
    assert!(buffer.is_empty(), "it comes again, so nobody may give it later");
    assert_eq!(pair.sidecar.lane.received(), told);
    assert_eq!(pair.sidecar.stats().receive_queued_bytes, 0);
    assert!(!pair.sidecar.lane.wants_transmit());
    assert!(!pair.sidecar.lane.poll_transmit(pair.now, &mut Transmit::new(), usize::MAX));
    assert_eq!(pair.sidecar.lane.poll_timeout(), None);
    let later = pair.now + Duration::from_secs(60);
    assert_eq!(pair.sidecar.lane.handle_timeout(later), Ok(()));
}

#[test]
fn detach_and_resume_out_of_turn_change_nothing() {
    let mut pair = pair();
    let (relay, sidecar) = pair.opened();
    let received = pair.sidecar.lane.received();
    assert_eq!(pair.relay.lane.resume(pair.now, received), Err(LaneError::Attached));
    assert_eq!(pair.relay.stats().resumes, 0);
    pair.cut();
    pair.relay.lane.detach();
    pair.relay.lane.detach();
    pair.resume().unwrap();
    assert!(pair.relay.send(relay, data(b"on")).is_ready());
    pair.run();
    assert_eq!(pair.sidecar.recv(sidecar), Poll::Ready(Received::Message(data(b"on"))));
    pair.relay.lane.close(Reset::new(failure::TUNNEL_LOST));
    pair.relay.lane.detach();
    let received = pair.sidecar.lane.received();
    assert_eq!(pair.relay.lane.resume(pair.now, received), Err(LaneError::Closed));
    assert!(!pair.relay.lane.may_resume());
    // Nothing is kept by a lane that keeps nothing.
    let mut pair = Pair::new();
    assert!(!pair.relay.lane.may_resume());
    pair.relay.lane.detach();
    assert!(matches!(pair.relay.lane.resume(pair.now, 0), Err(LaneError::Gap { .. })));
}

#[test]
fn a_detached_lane_that_is_closed_ends_its_exchanges() {
    let mut pair = pair();
    let (relay, _) = pair.opened();
    let unsent = pair.open();
    pair.cut();
    assert!(pair.relay.closed(relay).is_pending(), "it waits for the lane's return");
    pair.relay.lane.close(Reset::new(failure::TUNNEL_LOST));
    assert_eq!(pair.relay.closed(relay), Poll::Ready(Reset::new(failure::TUNNEL_LOST)));
    assert!(!pair.relay.lane.is_refused(relay), "it may have been dispatched");
    assert!(pair.relay.lane.is_refused(unsent));
    assert_eq!(pair.relay.stats().replay_bytes, 0);
}

/// An acknowledgement that was due when the connection broke is said by the resume, and the next one is
/// due again.
#[test]
fn acknowledgements_go_on_behind_a_cut() {
    let mut pair = pair().capacity(0);
    let relay = pair.open();
    assert!(pair.relay.send(relay, data(b"first")).is_ready());
    let mut out = Transmit::new();
    assert!(pair.relay.lane.poll_transmit(pair.now, &mut out, usize::MAX));
    let mut chunks = [std::io::IoSlice::new(&[]); 1];
    out.chunks(&mut chunks);
    pair.inject_into_sidecar(&chunks[0]).unwrap();
    // Queued, and not written: the connection takes nothing.
    let due = pair.now + crate::ACK_DELAY;
    pair.sidecar.lane.handle_timeout(due).unwrap();
    assert!(pair.sidecar.stats().control_queued > 0);
    pair.cut();
    assert_eq!(pair.sidecar.stats().control_queued, 0);
    pair.road.capacity = usize::MAX;
    pair.resume().unwrap();
    assert_eq!(pair.relay.stats().acknowledged, 1);
    for _ in 0..20 {
        assert!(pair.relay.send(relay, data(&[7; 400])).is_ready());
        pair.pass(2 * crate::ACK_DELAY).unwrap();
        assert_eq!(pair.relay.stats().replay_bytes, 0);
    }
}

#[test]
fn acknowledgements_that_come_late_and_twice_change_nothing() {
    let mut pair = pair();
    let (relay, _) = pair.opened();
    for number in 0..5 {
        assert!(pair.relay.send(relay, data(&[number])).is_ready());
    }
    pair.run();
    let ack = |received| encoded(field::ACK, &proto::Ack { received });
    pair.inject_into_relay(&ack(3)).unwrap();
    pair.inject_into_relay(&ack(3)).unwrap();
    assert_eq!(pair.relay.stats().acknowledged, 3);
    pair.pass(crate::ACK_DELAY).unwrap();
    assert_eq!(pair.relay.stats().acknowledged, 6);
    assert!(pair.inject_into_relay(&ack(5)).is_err());
}

/// What an end has ended and forgotten is still told, behind what it said before.
#[test]
fn the_reset_of_a_forgotten_exchange_is_replayed() {
    let mut pair = pair();
    let (relay, sidecar) = pair.opened();
    assert!(pair.relay.send(relay, data(b"part")).is_ready());
    let mut out = Transmit::new();
    pair.relay.lane.poll_transmit(pair.now, &mut out, usize::MAX);
    pair.relay.lane.reset(relay, Reset::new(failure::CLIENT_GONE));
    pair.relay.drop_handles(relay);
    pair.relay.lane.poll_transmit(pair.now, &mut out, usize::MAX);
    assert_eq!(pair.relay.stats().exchanges, 0);
    pair.cut();
    pair.resume().unwrap();
    pair.run();
    assert_eq!(pair.sidecar.recv(sidecar), Poll::Ready(Received::Message(data(b"part"))));
    let gone = Received::Reset(Reset::new(failure::CLIENT_GONE));
    assert_eq!(pair.sidecar.recv(sidecar), Poll::Ready(gone));
    pair.sidecar.drop_handles(sidecar);
    pair.assert_empty();
}

/// What both ends say while there is no connection is heard behind the resume.
#[test]
fn what_is_said_without_a_carrier_waits_for_the_next_one() {
    let mut pair = pair();
    let (relay, sidecar) = pair.opened();
    let half_sent = pair.open();
    assert!(pair.relay.send(half_sent, data(b"written, and lost")).is_ready());
    let mut out = Transmit::new();
    pair.relay.lane.poll_transmit(pair.now, &mut out, usize::MAX);
    pair.cut();
    let new = pair.open();
    assert!(pair.relay.send(new, last(b"opened without a carrier")).is_ready());
    assert!(pair.relay.send(relay, last(b"question")).is_ready());
    assert!(pair.sidecar.send(sidecar, last(b"answer")).is_ready());
    pair.sidecar.lane.dispatched(sidecar);
    pair.sidecar.lane.go_away(proto::GoAway { last: true, ..proto::GoAway::default() });
    pair.resume().unwrap();
    pair.run();
    assert!(pair.relay.lane.is_dispatched(relay));
    assert_eq!(pair.relay.recv(relay), Poll::Ready(Received::Message(last(b"answer"))));
    assert_eq!(pair.sidecar.recv(sidecar), Poll::Ready(Received::Message(last(b"question"))));
    assert_eq!(pair.relay.closed(relay), Poll::Ready(Reset::new(failure::NONE)));
    let away =
        pair.relay.events.iter().any(|event| matches!(event, Event::GoAway(away) if away.last));
    assert!(away, "{:?}", pair.relay.events);
    for refused in [half_sent, new] {
        assert!(pair.relay.lane.is_refused(refused), "the sidecar was leaving");
    }
}

/// Each of many exchanges may have a window, dispatched and its end waiting: that is no flood.
/// An outage in which what is served changes again and again: the last word counts, and what waits does not
/// grow with their number.
#[test]
fn announcements_without_a_carrier_take_each_others_place() {
    let mut pair = pair();
    let (_, sidecar) = pair.opened();
    pair.cut();
    let announce = |version| proto::Announce {
        version,
        tunnels: vec![proto::AnnouncedTunnel { name: "x".repeat(100_000), ..Default::default() }],
        ..proto::Announce::default()
    };
    for version in 1..=1000 {
        assert!(pair.sidecar.lane.announce(announce(version)));
    }
    pair.resume().unwrap();
    pair.run();
    let is_announce = |event: &Event| matches!(event, Event::Announce(_));
    let came: Vec<_> = pair.relay.events.iter().filter(|event| is_announce(event)).collect();
    assert_eq!(came, [&Event::Announce(announce(1000))]);
    assert_eq!(pair.sidecar.lane.fate(sidecar).expect("it goes on").closed, None);
}

#[test]
fn all_exchanges_have_room_for_what_they_say_without_a_carrier() {
    let mut pair = Pair::with(|config| {
        config.replay_bytes_min = 1 << 20;
        config.replay_bytes_max = 1 << 20;
        config.exchanges_max = 2000;
    });
    let keys: Vec<_> = (0..2000).map(|_| pair.opened()).collect();
    for &(relay, _) in &keys {
        assert!(pair.relay.send(relay, data(&[1; 33 * 1024])).is_ready());
        pair.run();
    }
    pair.cut();
    for &(_, sidecar) in &keys {
        pair.sidecar.lane.dispatched(sidecar);
        while pair.sidecar.recv(sidecar).is_ready() {}
        pair.sidecar.lane.reset(sidecar, Reset::new(failure::SERVICE_RESET));
    }
    pair.resume().unwrap();
    pair.run();
    for (relay, _) in keys {
        let reset = Poll::Ready(Reset::new(failure::SERVICE_RESET));
        assert_eq!(pair.relay.closed(relay), reset);
        assert!(pair.relay.lane.is_dispatched(relay));
    }
}

/// Limits that were on their way are said again, of those exchanges only that may need them.
#[test]
fn windows_are_said_again_once() {
    let mut pair = Pair::with(|config| config.replay_bytes_max = 1 << 20);
    let keys: Vec<_> = (0..100).map(|_| pair.opened()).collect();
    let (relay, sidecar) = keys[0];
    assert!(pair.relay.send(relay, data(&[1; 32 * 1024])).is_ready());
    pair.run();
    assert!(pair.sidecar.recv(sidecar).is_ready());
    let before = pair.sidecar.stats().messages_out;
    for _ in 0..3 {
        pair.cut();
        assert_eq!(pair.sidecar.stats().control_queued, 0);
        pair.resume().unwrap();
        assert_eq!(pair.sidecar.stats().control_queued, 100);
    }
    pair.run();
    assert!(pair.sidecar.stats().messages_out - before <= 100 + 4);
}

#[test]
fn a_stale_dial_is_turned_away_and_a_newer_one_takes_over() {
    let mut pair = pair();
    pair.redials = true;
    let (relay, sidecar) = pair.opened();
    for round in 0..10 {
        assert!(pair.relay.send(relay, data(&[round])).is_ready());
        pair.dial();
        pair.dial_stale();
        pair.dial();
        pair.run();
        assert_eq!(pair.sidecar.recv(sidecar), Poll::Ready(Received::Message(data(&[round]))));
    }
    assert!(pair.is_joined());
    assert_eq!(pair.stale, 10);
    assert_eq!(pair.newest, 20);
}

fn encoded(field: u32, message: &impl prost::Message) -> Vec<u8> {
    let payload = message.encode_to_vec().into();
    let mut out = Vec::new();
    envelope::write(&mut out, &Envelope { field, payload, ..Envelope::default() });
    out
}

//! Lanes that lose their connection and come back on another one.

use std::task::Poll;

use super::pair::{Pair, data, last};
use crate::{LaneConfig, LaneError, Received};

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
        if received % 7 == 0 {
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

//! The ring of a lane on a clock: how large it becomes, what it holds the lane back, what it costs at rest,
//! and what a silent peer is taken for.

use std::sync::Arc;
use std::task::Poll;
use std::time::Duration;

use bytes::Bytes;

use super::pair::{Pair, data};
use crate::{ACK_DELAY, Budget, Event, Key, Lane, LaneConfig, Payload, Pressure};

const MIB: u64 = 1024 * 1024;

fn ms(count: u64) -> Duration {
    Duration::from_millis(count)
}

/// Rings of the default size, and windows that are never in the way.
fn keeping(config: &mut LaneConfig) {
    config.replay_bytes_max = 16 * MIB;
    config.receive_window = 256 * MIB;
    config.send_window = 256 * MIB;
    config.queued_bytes_max = 1024 * MIB;
}

/// Sends as much as the lane takes for so long; returns the bytes that were taken at the other end.
fn stream(pair: &mut Pair, keys: &[(Key, Key)], time: Duration) -> u64 {
    let step = pair.road.latency.clamp(Duration::from_micros(100), ms(1));
    let body = Bytes::from(vec![0; 32 * 1024]);
    let until = pair.now + time;
    let mut taken = 0;
    while pair.now < until {
        for &(relay, sidecar) in keys {
            let next = || Payload { body: body.clone(), ..data(b"") };
            while pair.relay.send(relay, next()).is_ready() {}
            while let Poll::Ready(crate::Received::Message(payload)) = pair.sidecar.recv(sidecar) {
                taken += payload.len() as u64;
            }
        }
        pair.pass(step).expect("neither end breaks a rule");
    }
    taken
}

fn opened(pair: &mut Pair, count: usize) -> Vec<(Key, Key)> {
    (0..count).map(|_| pair.opened()).collect()
}

#[test]
fn a_long_fast_road_is_filled() {
    let rate = 100_000_000;
    let mut pair = Pair::with(keeping).latency(ms(25)).rate(rate);
    let keys = opened(&mut pair, 4);
    let mut grows_for = ms(0);
    while stream(&mut pair, &keys, ms(100)) < rate / 10 * 95 / 100 {
        grows_for += ms(100);
        assert!(grows_for < ms(1500), "{:?}", pair.relay.stats());
    }
    let taken = stream(&mut pair, &keys, ms(1000));
    assert!(taken > rate * 95 / 100, "{taken} bytes in a second, {:?}", pair.relay.stats());
    let limit = pair.relay.stats().replay_limit;
    assert!((5 * MIB..=16 * MIB).contains(&limit), "{limit}");
    assert_eq!(pair.sidecar.stats().replay_limit, 256 * 1024, "it has nothing to send");
}

#[test]
fn a_short_road_needs_a_small_ring() {
    let rate = 400_000_000;
    let mut pair = Pair::with(keeping).latency(Duration::from_micros(50)).rate(rate);
    let keys = opened(&mut pair, 4);
    let taken = stream(&mut pair, &keys, ms(500));
    assert!(taken > rate / 2 * 95 / 100, "{taken} bytes in half a second");
    let limit = pair.relay.stats().replay_limit;
    assert!(limit <= MIB, "{limit}");
}

/// Their places cost more than their bytes: acknowledgements come for both.
#[test]
fn small_messages_do_not_wait_for_the_acknowledgements_timer() {
    let mut pair = Pair::with(keeping);
    let (relay, sidecar) = pair.opened();
    for number in 0..20_000 {
        assert!(pair.relay.send(relay, data(&[1])).is_ready(), "after {number}");
        pair.run();
        assert!(pair.sidecar.recv(sidecar).is_ready());
    }
    assert!(pair.relay.stats().replay_bytes <= 64 * 1024 + 128, "{:?}", pair.relay.stats());
}

#[test]
fn a_ring_shrinks_when_the_road_is_empty_again() {
    let mut pair = Pair::with(keeping).latency(ms(25)).rate(100_000_000);
    let keys = opened(&mut pair, 4);
    stream(&mut pair, &keys, ms(1500));
    assert!(pair.relay.stats().replay_limit > 4 * MIB);
    for _ in 0..12 {
        while pair.sidecar.recv(keys[0].1).is_ready() {}
        pair.pass(Duration::from_secs(5)).unwrap();
    }
    let stats = pair.relay.stats();
    assert_eq!((stats.replay_bytes, stats.replay_limit), (0, 256 * 1024));
}

#[test]
fn under_pressure_a_ring_does_not_grow() {
    let mut pair = Pair::with(keeping).latency(ms(25)).rate(100_000_000);
    let keys = opened(&mut pair, 4);
    pair.relay.lane.set_pressure(Pressure::High);
    let taken = stream(&mut pair, &keys, ms(1000));
    assert_eq!(pair.relay.stats().replay_limit, 256 * 1024);
    assert!(taken > 3 * MIB, "it goes on: {taken}");
}

/// A lane that comes back on a shorter road measures it anew.
#[test]
fn the_round_trip_is_measured_anew_behind_a_resume() {
    let mut pair = Pair::with(keeping).latency(ms(200));
    pair.pass(Duration::from_secs(20)).unwrap();
    assert_eq!(pair.relay.stats().rtt, Some(ms(400)));
    pair.cut();
    pair.road.latency = ms(5);
    pair.resume().unwrap();
    pair.pass(ms(100)).unwrap();
    assert_eq!(pair.relay.stats().rtt, Some(ms(10)));
}

/// As many lanes as a relay may have, with rings as large as may be, and peers that acknowledge nothing: the
/// budget holds, and each lane sends something.
#[test]
fn five_hundred_sessions_of_sixteen_lanes_stay_below_the_budget() {
    let budget = Arc::new(Budget::new(2048 * MIB));
    let now = std::time::Instant::now();
    let mut lanes: Vec<Lane> = (0..500 * 16)
        .map(|_| {
            let mut config = LaneConfig::new(crate::Side::Relay);
            keeping(&mut config);
            config.replay_bytes_min = 16 * MIB;
            config.replay_budget = Some(Arc::clone(&budget));
            Lane::new(config, now)
        })
        .collect();
    let body = Bytes::from(vec![0; 32 * 1024]);
    let mut cx = std::task::Context::from_waker(std::task::Waker::noop());
    for lane in &mut lanes {
        let key = lane.open(crate::RequestId(1), 1, crate::proto::Open::default()).unwrap();
        loop {
            let mut next = Some(Payload { body: body.clone(), ..data(b"") });
            if lane.poll_send(key, &mut cx, &mut next).is_pending() {
                break;
            }
            lane.poll_transmit(now, &mut crate::Transmit::new(), usize::MAX);
        }
        assert!(lane.stats().sent > 0);
        assert!(budget.used() <= budget.max(), "{}", budget.used());
    }
    assert!(lanes[0].stats().replay_bytes >= 16 * MIB);
    assert!(budget.used() > 2000 * MIB, "{}", budget.used());
    drop(lanes);
    assert_eq!(budget.used(), 0);
}

#[test]
fn a_lane_that_is_dropped_or_closed_gives_its_budget_back() {
    for close in [true, false] {
        let budget = Arc::new(Budget::new(MIB));
        let mut pair = Pair::with(|config| {
            keeping(config);
            config.replay_budget = Some(Arc::clone(&budget));
        });
        pair.opened();
        assert!(budget.used() > 0);
        if close {
            pair.relay.lane.close(crate::Reset::new(sidelane_abi::failure::TUNNEL_LOST));
        } else {
            drop(pair);
        }
        assert_eq!(budget.used(), 0);
    }
}

// --- suspicion ------------------------------------------------------------------------------------

fn suspicions(pair: &mut Pair) -> Vec<bool> {
    let events = std::iter::from_fn(|| pair.relay.lane.poll_event());
    let events: Vec<Event> = pair.relay.events.drain(..).chain(events).collect();
    events
        .into_iter()
        .filter_map(|event| match event {
            Event::Suspect(is_suspect) => Some(is_suspect),
            _ => None,
        })
        .collect()
}

/// Lets the relay's time pass with nothing coming; returns after how long it suspects.
fn silence(pair: &mut Pair, most: Duration) -> Option<Duration> {
    let start = pair.now;
    let mut now = start;
    while let Some(at) = pair.relay.lane.poll_timeout()
        && at <= start + most
    {
        now = now.max(at);
        pair.relay.lane.handle_timeout(now).expect("it is not dead yet");
        if suspicions(pair).contains(&true) {
            return Some(now - start);
        }
    }
    None
}

#[test]
fn silence_with_something_outstanding_is_suspect() {
    for (latency, expected) in [(ms(10), ms(1000)), (ms(200), ms(1600)), (ms(500), ms(4000))] {
        let mut pair = Pair::with(keeping).latency(latency);
        let (relay, _) = pair.opened();
        pair.pass(Duration::from_secs(4)).unwrap();
        assert_eq!(suspicions(&mut pair), []);
        pair.road.capacity = 0;
        assert!(pair.relay.send(relay, data(b"is it there?")).is_ready());
        let mut out = crate::Transmit::new();
        pair.relay.lane.poll_transmit(pair.now, &mut out, usize::MAX);
        let after = silence(&mut pair, Duration::from_secs(9)).expect("it is suspect");
        assert_eq!(after, expected);
        // A byte is enough.
        pair.inject_into_relay(&[]).unwrap();
        assert_eq!(suspicions(&mut pair), [false]);
        // And the silence behind it is suspect again.
        pair.now += after;
        assert!(silence(&mut pair, Duration::from_secs(9)).is_some());
    }
}

#[test]
fn silence_behind_a_conversation_is_asked_about_and_suspect() {
    let mut pair = Pair::with(keeping).latency(ms(10));
    let (_, sidecar) = pair.opened();
    pair.pass(Duration::from_secs(4)).unwrap();
    assert!(pair.sidecar.send(sidecar, data(b"the last word")).is_ready());
    // All of it is acknowledged before the path ends.
    pair.pass(ms(300)).unwrap();
    pair.road.capacity = 0;
    let after = silence(&mut pair, Duration::from_secs(9)).expect("it is suspect");
    assert!(after < Duration::from_secs(2), "{after:?}");
}

#[test]
fn unanswered_ping_is_suspect() {
    let mut pair = Pair::with(keeping).latency(ms(10));
    pair.opened();
    pair.pass(Duration::from_secs(33)).unwrap();
    assert_eq!(suspicions(&mut pair), []);
    pair.road.capacity = 0;
    let after = silence(&mut pair, Duration::from_secs(9)).expect("it is suspect");
    assert!(after <= Duration::from_secs(6), "a ping each 5 s, and a second: {after:?}");
}

#[test]
fn an_idle_or_a_busy_lane_is_not_suspect() {
    let mut pair = Pair::with(keeping).latency(ms(100));
    let (relay, sidecar) = pair.opened();
    pair.pass(Duration::from_secs(60)).unwrap();
    for _ in 0..1000 {
        assert!(pair.relay.send(relay, data(b"on and on")).is_ready());
        pair.pass(ms(7)).unwrap();
        while pair.sidecar.recv(sidecar).is_ready() {}
    }
    assert_eq!(suspicions(&mut pair), []);
    // Sent just before the look that an earlier message is to blame for.
    pair.pass(ms(900)).unwrap();
    assert!(pair.relay.send(relay, data(b"late")).is_ready());
    pair.pass(ms(150)).unwrap();
    assert_eq!(suspicions(&mut pair), []);
    // A lane that keeps nothing suspects nobody.
    let mut pair = Pair::new();
    let (relay, _) = pair.opened();
    pair.pass(ms(10)).unwrap();
    assert!(pair.relay.send(relay, data(b"x")).is_ready());
    assert_eq!(silence(&mut pair, Duration::from_secs(4)), None);
}

/// A timer is moved when it has come, not for each message or acknowledgement.
#[test]
fn the_timer_is_moved_seldom_under_load() {
    let mut pair = Pair::with(keeping).latency(Duration::from_micros(50)).rate(400_000_000);
    let keys = opened(&mut pair, 2);
    stream(&mut pair, &keys, ms(50));
    let mut moves = 0;
    let mut last = (None, None);
    let body = Bytes::from(vec![0; 32 * 1024]);
    let start = (pair.now, pair.sidecar.stats().messages_in);
    while pair.now < start.0 + ms(1000) {
        for &(relay, sidecar) in &keys {
            let next = || Payload { body: body.clone(), ..data(b"") };
            while pair.relay.send(relay, next()).is_ready() {}
            while pair.sidecar.recv(sidecar).is_ready() {}
        }
        pair.pass(Duration::from_micros(200)).unwrap();
        let next = (pair.relay.lane.poll_timeout(), pair.sidecar.lane.poll_timeout());
        moves += usize::from(next.0 != last.0) + usize::from(next.1 != last.1);
        last = next;
    }
    let messages = pair.sidecar.stats().messages_in - start.1;
    assert!(messages > 5000, "{messages}");
    assert!(moves <= 110, "{moves} moves for {messages} messages");
}

// --- at rest --------------------------------------------------------------------------------------

#[test]
fn an_acknowledged_ring_holds_no_memory_once_it_rests() {
    let mut pair = Pair::with(keeping);
    let (relay, sidecar) = pair.opened();
    for _ in 0..500 {
        assert!(pair.relay.send(relay, data(&[0; 300])).is_ready());
        pair.run();
        assert!(pair.sidecar.recv(sidecar).is_ready());
    }
    assert!(pair.relay.lane.replay_room() > 0);
    pair.pass(ACK_DELAY).unwrap();
    pair.pass(Duration::from_secs(6)).unwrap();
    assert_eq!(pair.relay.lane.replay_room(), 0);
    assert!(size_of::<Lane>() <= 1536, "{}", size_of::<Lane>());
}

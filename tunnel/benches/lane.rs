//! What a message costs in the codec and in a pair of lanes, without any carrier.
//!
//! `cargo bench -p sidelane-tunnel`

use std::io::IoSlice;
use std::sync::Arc;
use std::task::{Context, Poll, Waker};
use std::time::Instant;

use bytes::{Bytes, BytesMut};
use divan::counter::ItemsCount;
use divan::{Bencher, black_box};
use sidelane_tunnel::envelope::{self, Envelope, field};
use sidelane_tunnel::{
    Budget, Event, Key, Lane, LaneConfig, Payload, Received, RequestId, Side, Transmit, proto,
};

/// The program's.
#[global_allocator]
static ALLOCATOR: mimalloc::MiMalloc = mimalloc::MiMalloc;

const SIZES: [usize; 4] = [0, 125, 4096, 32 * 1024];

/// Messages per iteration of the lanes' benches: what one write of a busy lane holds, about.
const BATCH: usize = 64;

fn main() {
    divan::main();
}

fn envelope(len: usize) -> Envelope {
    Envelope {
        request_id: Some(RequestId(123_456)),
        field: field::CUSTOM,
        payload: Bytes::from(vec![1; len]),
        ..Envelope::default()
    }
}

#[divan::bench(args = SIZES)]
fn read(bencher: Bencher<'_, '_>, len: usize) {
    let mut frames = Vec::new();
    for _ in 0..BATCH {
        envelope::write(&mut frames, &envelope(len));
    }
    bencher.counter(ItemsCount::new(BATCH)).with_inputs(|| BytesMut::from(&*frames)).bench_values(
        |mut buffer| {
            while let Ok(Some(envelope)) = envelope::read(&mut buffer, 1 << 20) {
                black_box(envelope);
            }
        },
    );
}

#[divan::bench(args = SIZES)]
fn write_head(bencher: Bencher<'_, '_>, len: usize) {
    let mut out = Vec::with_capacity(64 * BATCH);
    bencher.counter(ItemsCount::new(BATCH)).bench_local(|| {
        out.clear();
        for _ in 0..BATCH {
            let head = envelope::Head {
                request_id: Some(RequestId(123_456)),
                field: field::CUSTOM,
                payload_len: len,
                ..envelope::Head::default()
            };
            black_box(envelope::write_head(&mut out, &head));
        }
    });
}

struct Ends {
    relay: Lane,
    sidecar: Lane,
    out: Transmit,
    input: BytesMut,
    now: Instant,
    keys: Vec<(Key, Key)>,
}

impl Ends {
    /// `ring`: bytes kept for replay; 0: nothing is kept.
    fn new(exchanges: u64, ring: u64) -> Self {
        let now = Instant::now();
        let config = |side| LaneConfig {
            replay_bytes_min: ring,
            replay_bytes_max: ring,
            replay_budget: Some(Arc::new(Budget::new(1 << 30))),
            ..LaneConfig::new(side)
        };
        let mut ends = Self {
            relay: Lane::new(config(Side::Relay), now),
            sidecar: Lane::new(config(Side::Sidecar), now),
            out: Transmit::new(),
            input: BytesMut::new(),
            now,
            keys: Vec::new(),
        };
        for number in 0..exchanges {
            let id = RequestId(2 * number + 1);
            let relay = ends.relay.open(id, 1, proto::Open::default()).expect("below the limit");
            ends.send(relay, Bytes::new());
            ends.forth();
            let Some(Event::Opened { key, .. }) = ends.sidecar.poll_event() else {
                panic!("the open has arrived");
            };
            ends.take(key);
            ends.keys.push((relay, key));
        }
        ends
    }

    fn send(&mut self, key: Key, body: Bytes) {
        let mut payload =
            Some(Payload { field: field::CUSTOM, end: false, head: Bytes::new(), body });
        let mut cx = Context::from_waker(Waker::noop());
        let sent = self.relay.poll_send(key, &mut cx, &mut payload);
        assert!(sent.is_ready(), "credit is returned in each round");
    }

    fn take(&mut self, key: Key) -> usize {
        let mut cx = Context::from_waker(Waker::noop());
        let mut taken = 0;
        while let Poll::Ready(Received::Message(payload)) = self.sidecar.poll_recv(key, &mut cx) {
            black_box(payload);
            taken += 1;
        }
        taken
    }

    /// Moves what both have to send, until nothing is left.
    fn settle(&mut self) {
        loop {
            let before = self.relay.stats().messages_out + self.sidecar.stats().messages_out;
            self.forth();
            self.back();
            let after = self.relay.stats().messages_out + self.sidecar.stats().messages_out;
            if after == before {
                break;
            }
        }
    }

    /// Moves what the relay has to send.
    fn forth(&mut self) {
        while self.relay.poll_transmit(self.now, &mut self.out, 128 * 1024) {
            carry(&mut self.out, &mut self.input);
            self.sidecar.handle_input(self.now, &mut self.input).expect("well formed");
        }
        self.sidecar.take_wakes().wake();
    }

    /// Moves what the sidecar has to send: credit.
    fn back(&mut self) {
        while self.sidecar.poll_transmit(self.now, &mut self.out, 128 * 1024) {
            carry(&mut self.out, &mut self.input);
            self.relay.handle_input(self.now, &mut self.input).expect("well formed");
        }
        self.relay.take_wakes().wake();
    }
}

/// Copies as a carrier does: once.
fn carry(out: &mut Transmit, input: &mut BytesMut) {
    while !out.is_empty() {
        let mut chunks = [IoSlice::new(&[]); 64];
        let filled = out.chunks(&mut chunks);
        let mut written = 0;
        for chunk in &chunks[..filled] {
            input.extend_from_slice(chunk);
            written += chunk.len();
        }
        out.advance(written);
    }
}

/// One message of each of 64 exchanges: queue, write, carry, read, take. Nothing is kept for replay.
#[divan::bench(args = SIZES)]
fn message_through_two_lanes(bencher: Bencher<'_, '_>, len: usize) {
    messages(bencher, len, 0);
}

/// The same, and what is sent is kept until the peer acknowledges it: the ring's cost is the difference.
#[divan::bench(args = SIZES)]
fn message_through_two_lanes_that_keep(bencher: Bencher<'_, '_>, len: usize) {
    messages(bencher, len, 256 * 1024);
}

fn messages(bencher: Bencher<'_, '_>, len: usize, ring: u64) {
    let mut ends = Ends::new(BATCH as u64, ring);
    let body = Bytes::from(vec![1; len]);
    bencher.counter(ItemsCount::new(BATCH)).bench_local(|| {
        for at in 0..BATCH {
            let (relay, _) = ends.keys[at];
            ends.send(relay, body.clone());
        }
        ends.settle();
        let mut taken = 0;
        for at in 0..BATCH {
            let (_, sidecar) = ends.keys[at];
            taken += ends.take(sidecar);
        }
        assert_eq!(taken, BATCH);
        ends.settle();
    });
}

/// An exchange from open to the last trace: a message each way, both with the end.
#[divan::bench]
fn exchange_through_two_lanes(bencher: Bencher<'_, '_>) {
    let mut ends = Ends::new(0, 0);
    let mut id = 1;
    let body = Bytes::from(vec![1; 125]);
    bencher.bench_local(|| {
        let mut cx = Context::from_waker(Waker::noop());
        let relay = ends.relay.open(RequestId(id), 1, proto::Open::default()).expect("below");
        id += 2;
        let payload = Payload { field: 17, end: true, head: body.clone(), body: Bytes::new() };
        assert!(ends.relay.poll_send(relay, &mut cx, &mut Some(payload.clone())).is_ready());
        ends.forth();
        let Some(Event::Opened { key, .. }) = ends.sidecar.poll_event() else {
            panic!("the open has arrived");
        };
        assert_eq!(ends.take(key), 1);
        assert!(ends.sidecar.poll_send(key, &mut cx, &mut Some(payload)).is_ready());
        ends.back();
        assert!(ends.relay.poll_recv(relay, &mut cx).is_ready());
        for (lane, key) in [(&mut ends.relay, relay), (&mut ends.sidecar, key)] {
            lane.drop_send(key);
            lane.drop_recv(key);
            assert_eq!(lane.exchanges(), 0);
        }
    });
}

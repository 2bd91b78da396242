//! Both ends, with the test as the tunnel between them.

use bytes::Bytes;
use proptest::prelude::*;
use sidelane_plugin::failure;
use sidelane_testkit::{AcceptHttp, Deliver, Kit, Outcome, TestService};

use crate::service::{Served, answer, head, part, trailers};
use crate::{call, kit, message, meta};

/// Carries what waits at both ends.
async fn carry(accepted: &AcceptHttp, delivered: &Deliver) {
    for (from, to) in [(&accepted.peer, &delivered.peer), (&delivered.peer, &accepted.peer)] {
        while from.waiting() > 0 {
            let message = from.message().await;
            to.send(message.field, message.payload, message.end);
        }
    }
}

async fn turn() {
    let mut polled = false;
    std::future::poll_fn(|cx| {
        if std::mem::replace(&mut polled, true) {
            return std::task::Poll::Ready(());
        }
        cx.waker().wake_by_ref();
        std::task::Poll::Pending
    })
    .await;
}

fn frames(bytes: &[u8], cuts: &[usize]) -> Vec<Bytes> {
    let (mut rest, mut frames, mut next) = (bytes, Vec::new(), cuts.iter().cycle());
    while !rest.is_empty() {
        let (frame, after) = rest.split_at(rest.len().min(*next.next().unwrap()));
        frames.push(Bytes::copy_from_slice(frame));
        rest = after;
    }
    frames
}

fn check(kit: &Kit, up: &[usize], down: &[usize], cuts: &[usize]) {
    let service = TestService::default();
    let whole = |sizes: &[usize]| -> Vec<u8> {
        sizes.iter().enumerate().flat_map(|(i, size)| message(i, *size)).collect()
    };
    let (up, down) = (whole(up), whole(down));
    kit.block_on(async {
        let accepted = kit.accept_http(&call());
        let delivered = kit.deliver(&meta(), &service);
        for frame in frames(&up, cuts) {
            accepted.body.send(frame);
        }
        accepted.body.end();
        kit.run_until_idle();
        carry(&accepted, &delivered).await;
        let mut served = Served::accept(&service).await;
        let (mut request, mut respond) = served.request().await;

        let mut got = Vec::new();
        while got.len() < up.len() {
            kit.run_until_idle();
            carry(&accepted, &delivered).await;
            let more = std::pin::pin!(part(request.body_mut(), 1));
            let turns = std::pin::pin!(async {
                for _ in 0..4 {
                    turn().await;
                }
            });
            got.extend(served.drive(first(more, turns)).await.unwrap_or_default());
        }
        assert!(got == up, "the request arrives as it was sent");

        let mut send = respond.send_response(head(), false).unwrap();
        for frame in frames(&down, cuts) {
            send.send_data(frame, false).unwrap();
        }
        send.send_trailers(trailers("0")).unwrap();
        let mut got = Vec::new();
        let mut ended = false;
        while !ended {
            served
                .drive(async {
                    for _ in 0..4 {
                        turn().await
                    }
                })
                .await;
            kit.run_until_idle();
            carry(&accepted, &delivered).await;
            kit.run_until_idle();
            ended = accepted.running.ended().is_some();
            if accepted.response.has_begun() && !ended {
                let chunk = std::pin::pin!(accepted.response.chunk());
                if let Some(chunk) = first(chunk, std::pin::pin!(turn())).await {
                    got.extend(chunk.unwrap().unwrap_or_default());
                }
            }
        }
        let response = accepted.response.whole().await.unwrap();
        got.extend(response.body);
        assert!(got == down, "the response arrives as it was sent");
        assert_eq!(response.trailers.len(), 1);
        let well = Outcome::Ended(failure::NONE);
        assert_eq!(accepted.running.outcome().await, well);
        assert_eq!(served.drive(delivered.running.outcome()).await, well);
    });
}

/// What `wanted` gives, unless `limit` is ready first.
async fn first<T>(
    mut wanted: std::pin::Pin<&mut impl Future<Output = T>>,
    mut limit: std::pin::Pin<&mut impl Future<Output = ()>>,
) -> Option<T> {
    std::future::poll_fn(|cx| {
        if let std::task::Poll::Ready(output) = wanted.as_mut().poll(cx) {
            return std::task::Poll::Ready(Some(output));
        }
        limit.as_mut().poll(cx).map(|()| None)
    })
    .await
}

fn sizes() -> impl Strategy<Value = Vec<usize>> {
    let size = prop_oneof![8 => 0usize..200, 2 => 0usize..5_000, 1 => 30_000usize..70_000];
    proptest::collection::vec(size, 0..10)
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 48, ..ProptestConfig::default() })]

    #[test]
    fn any_messages_in_any_frames_arrive(
        up in sizes(),
        down in sizes(),
        cuts in proptest::collection::vec(1usize..16_000, 1..6),
    ) {
        check(&kit(), &up, &down, &cuts);
    }
}

/// A small generator of numbers, the same in every run.
struct Numbers(u64);

impl Numbers {
    fn below(&mut self, bound: u64) -> u64 {
        self.0 = self.0.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1);
        (self.0 >> 33) % bound
    }
}

/// The kit finds what is not given back; here the plugin's own tables are looked at.
#[test]
fn nothing_is_left_after_any_kind_of_end() {
    const CALLS: usize = 2_000;
    let (kit, service) = (kit(), TestService::default());
    let mut numbers = Numbers(7);
    kit.block_on(async {
        let (mut served, mut open, mut relayed) = (None, Vec::new(), Vec::new());
        for _ in 0..CALLS {
            let accepted = kit.accept_http(&call().header("grpc-timeout", "50m"));
            let delivered = kit.deliver(&meta(), &service);
            if numbers.below(4) > 0 {
                accepted.body.send(message(0, usize::try_from(numbers.below(40_000)).unwrap()));
            }
            kit.run_until_idle();
            carry(&accepted, &delivered).await;
            kit.run_until_idle();
            let served = match &mut served {
                Some(served) => served,
                None => served.insert(Served::accept(&service).await),
            };
            let (request, mut respond) = served.request().await;
            match numbers.below(9) {
                0 => accepted.response.disconnect(),
                1 => accepted.running.cancel(),
                2 => delivered.running.cancel(),
                3 => {
                    respond.send_reset(h2::Reason::from(u32::try_from(numbers.below(14)).unwrap()))
                }
                4 => drop((request, respond)),
                5 => {
                    let _ = respond.send_response(head(), numbers.below(2) == 0);
                }
                6 => {
                    answer(&mut respond, message(0, usize::try_from(numbers.below(9_000)).unwrap()))
                }
                7 => accepted.body.send_last(message(1, 3)[..5].to_vec()),
                _ => open.push((request, respond)),
            }
            served.drive(async { turn().await }).await;
            kit.run_until_idle();
            carry(&accepted, &delivered).await;
            for (from, to) in [(&accepted.peer, &delivered.peer), (&delivered.peer, &accepted.peer)]
            {
                if let Some(reset) = from.was_reset() {
                    to.reset(reset);
                }
            }
            relayed.push((accepted, delivered));
            if numbers.below(20) == 0 {
                // What still runs meets its deadline.
                kit.advance(std::time::Duration::from_millis(60));
                kit.run_until_idle();
                served.drive(async { turn().await }).await;
                open.clear();
                relayed.clear();
            }
        }
        kit.advance(std::time::Duration::from_millis(60));
        kit.run_until_idle();
        assert_eq!(kit.metric("grpc_in_flight"), Some(0.0));
        assert_eq!(kit.metric("grpc_streams"), Some(0.0));
        let ended = kit.metric("grpc_rpcs_total").unwrap();
        assert_eq!(ended, f64::from(u32::try_from(CALLS).unwrap()));
    });
}

#[test]
fn large_messages_arrive() {
    check(&kit(), &[5 << 20, 0, 3], &[1 << 20, 5 << 20], &[16_384]);
}

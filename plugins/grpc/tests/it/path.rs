//! Both ends, with the test as the tunnel between them.

use bytes::Bytes;
use proptest::prelude::*;
use sidelane_plugin::failure;
use sidelane_testkit::{AcceptHttp, Deliver, Kit, Outcome, TestService};

use crate::service::{Served, head, part, trailers};
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

#[test]
fn large_messages_arrive() {
    check(&kit(), &[5 << 20, 0, 3], &[1 << 20, 5 << 20], &[16_384]);
}

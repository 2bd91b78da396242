//! The sidecar's end.

use std::future::poll_fn;
use std::time::Duration;

use bytes::Bytes;
use h2::{Reason, server};
use http::Response;
use prost::Message as _;
use sidelane_plugin::{Reset, failure};
use sidelane_testkit::{Outcome, TestService};

use crate::service::{Served, answer, body, head, part, trailers};
use crate::wire::{
    GrpcRequest, HTTP_BODY, HTTP_TRAILERS, HttpBody, REQUEST_BATCH, RESPONSE_BATCH, read_batch,
    read_response, send_batch, values,
};
use crate::{kit, kit_with, message, meta};

#[test]
fn a_unary_call_is_one_message_each_way() {
    let (kit, service) = (kit(), TestService::default());
    kit.block_on(async {
        let delivery = kit.deliver(&meta(), &service);
        let call = GrpcRequest::call(&message(0, 10)).last();
        call.header("k", "1")
            .header("k", "2")
            .header("x-forwarded-for", "evil")
            .send(&delivery.peer);
        let mut served = Served::accept(&service).await;
        let (mut request, mut respond) = served.request().await;
        assert_eq!(request.uri(), "http://test.localhost:9080/t.Echo/Call");
        assert_eq!(request.method(), "POST");
        let values = |name| request.headers().get_all(name).iter().collect::<Vec<_>>();
        assert_eq!(values("k"), ["1", "2"]);
        assert_eq!(values("te"), ["trailers"]);
        assert_eq!(values("x-forwarded-for"), ["192.0.2.1"]);
        assert_eq!(values("x-forwarded-host"), ["test.localhost:9080"]);
        assert_eq!(values("via"), ["2.0 sidelane"]);
        assert!(values("forwarded")[0].to_str().unwrap().starts_with("for=192.0.2.1;"));
        assert_eq!(served.drive(body(request.body_mut())).await, message(0, 10));
        answer(&mut respond, message(1, 7));
        let first = served.drive(delivery.peer.message()).await;
        let response = read_response(&first);
        assert!(first.end && response.first);
        assert_eq!(response.body, message(1, 7));
        assert_eq!(self::values(&response.trailers, "grpc-status"), [b"0"]);
        assert_eq!(delivery.running.outcome().await, Outcome::Ended(failure::NONE));
        assert!(delivery.peer.was_dispatched());
        assert_eq!(kit.metric("grpc_streams"), Some(0.0));
        assert_eq!(kit.metric("grpc_connections"), Some(1.0));
    });
}

#[test]
fn messages_go_on_as_they_come() {
    let (kit, service) = (kit(), TestService::default());
    kit.block_on(async {
        let delivery = kit.deliver(&meta(), &service);
        GrpcRequest::call(b"").send(&delivery.peer);
        let mut served = Served::accept(&service).await;
        let (mut request, mut respond) = served.request().await;
        let mut send = respond.send_response(head(), false).unwrap();
        let first = read_response(&served.drive(delivery.peer.message()).await);
        assert!(first.first && !first.last && first.body.is_empty());
        send_batch(&delivery.peer, REQUEST_BATCH, 1, 2, &[message(0, 3), message(1, 4)].concat());
        let got = served.drive(part(request.body_mut(), 17)).await;
        assert_eq!(got, [message(0, 3), message(1, 4)].concat());
        for i in 0..20 {
            send.send_data(message(i, 50).into(), false).unwrap();
        }
        let batch = read_batch(&served.drive(delivery.peer.message()).await, RESPONSE_BATCH);
        assert_eq!((batch.sequence, batch.count), (1, 20));
        GrpcRequest::chunk(3, b"").last().send(&delivery.peer);
        assert_eq!(served.drive(body(request.body_mut())).await, b"");
        send.send_trailers(trailers("0")).unwrap();
        let last = read_response(&served.drive(delivery.peer.message()).await);
        assert_eq!((last.sequence, last.last), (21, true));
    });
}

#[test]
fn trailers_only_answers_stay_so() {
    let (kit, service) = (kit(), TestService::default());
    kit.block_on(async {
        let delivery = kit.deliver(&meta(), &service);
        // The client still sends.
        GrpcRequest::call(&message(0, 1)).send(&delivery.peer);
        let mut served = Served::accept(&service).await;
        let (request, mut respond) = served.request().await;
        let mut response = head();
        response.headers_mut().insert("grpc-status", "7".parse().unwrap());
        respond.send_response(response, true).unwrap();
        drop((request, respond));
        let only = read_response(&served.drive(delivery.peer.message()).await);
        assert!(only.first && only.last && only.trailers.is_empty());
        assert_eq!(values(&only.metadata, "grpc-status"), [b"7"]);
        served.drive(delivery.running.outcome()).await;
    });
}

#[test]
fn answers_of_others_pass_as_they_are() {
    let (kit, service) = (kit(), TestService::default());
    kit.block_on(async {
        let delivery = kit.deliver(&meta(), &service);
        GrpcRequest::call(&message(0, 1)).last().send(&delivery.peer);
        let mut served = Served::accept(&service).await;
        let (_request, mut respond) = served.request().await;
        let response = Response::builder().status(404).header("content-type", "text/html");
        let mut send = respond.send_response(response.body(()).unwrap(), false).unwrap();
        send.send_data(Bytes::from_static(b"no"), false).unwrap();
        send.send_trailers(trailers("5")).unwrap();
        let first = read_response(&served.drive(delivery.peer.message()).await);
        assert_eq!((first.http_status, first.first, first.last), (404, true, false));
        let data = served.drive(delivery.peer.message()).await;
        assert_eq!(data.field, HTTP_BODY);
        assert_eq!(HttpBody::decode(&data.payload[..]).unwrap().data, b"no");
        let last = served.drive(delivery.peer.message()).await;
        assert_eq!((last.field, last.end), (HTTP_TRAILERS, true));
    });
}

#[test]
fn cancellation_reaches_the_service_as_sent() {
    for (sent, expected) in
        [(Some(8), Reason::CANCEL), (Some(11), Reason::ENHANCE_YOUR_CALM), (None, Reason::CANCEL)]
    {
        let (kit, service) = (kit(), TestService::default());
        kit.block_on(async {
            let delivery = kit.deliver(&meta(), &service);
            GrpcRequest::call(&message(0, 1)).send(&delivery.peer);
            let mut served = Served::accept(&service).await;
            let (_request, mut respond) = served.request().await;
            delivery.peer.reset(Reset { code: failure::CLIENT_GONE, protocol_code: sent });
            let reason = served.drive(poll_fn(|cx| respond.poll_reset(cx))).await.unwrap();
            assert_eq!(reason, expected);
            assert_eq!(delivery.running.outcome().await, Outcome::Ended(failure::CLIENT_GONE));
        });
    }
}

#[test]
fn a_services_reset_is_told_with_its_code() {
    let (kit, service) = (kit(), TestService::default());
    kit.block_on(async {
        let delivery = kit.deliver(&meta(), &service);
        GrpcRequest::call(&message(0, 1)).send(&delivery.peer);
        let mut served = Served::accept(&service).await;
        let (_request, mut respond) = served.request().await;
        respond.send_reset(Reason::ENHANCE_YOUR_CALM);
        let reset = served.drive(delivery.peer.reset_reason()).await;
        assert_eq!(reset, Reset { code: failure::SERVICE_RESET, protocol_code: Some(11) });
    });
}

#[test]
fn a_service_that_is_not_there_refuses() {
    let (kit, service) = (kit(), TestService::default());
    service.refuse();
    kit.block_on(async {
        let deliveries: Vec<_> = (0..3).map(|_| kit.deliver(&meta(), &service)).collect();
        for delivery in &deliveries {
            GrpcRequest::call(&message(0, 1)).last().send(&delivery.peer);
        }
        for delivery in &deliveries {
            assert_eq!(
                delivery.running.outcome().await,
                Outcome::Ended(failure::SERVICE_UNREACHABLE)
            );
            let refused = delivery.peer.was_refused().unwrap();
            assert_eq!(refused.code, failure::SERVICE_UNREACHABLE);
        }
        // Those who wait for a dial share its outcome.
        assert_eq!(service.connects(), 1);
    });
}

#[test]
fn a_service_that_speaks_something_else_is_invalid() {
    let (kit, service) = (kit(), TestService::default());
    kit.block_on(async {
        let delivery = kit.deliver(&meta(), &service);
        GrpcRequest::call(&message(0, 1)).last().send(&delivery.peer);
        let mut stream = service.accept().await;
        stream.write(b"HTTP/1.1 400 Bad Request\r\n\r\n").await;
        let outcome = delivery.running.outcome().await;
        assert_eq!(outcome, Outcome::Ended(failure::SERVICE_INVALID));

        // Nor does one that closes at once, which may be on its way up or down.
        let delivery = kit.deliver(&meta(), &service);
        GrpcRequest::call(&message(0, 1)).last().send(&delivery.peer);
        drop(service.accept().await);
        let outcome = delivery.running.outcome().await;
        assert_eq!(outcome, Outcome::Ended(failure::SERVICE_UNREACHABLE));

        // Nor one that says nothing.
        let delivery = kit.deliver(&meta(), &service);
        GrpcRequest::call(&message(0, 1)).last().send(&delivery.peer);
        let _stream = service.accept().await;
        let outcome = delivery.running.outcome().await;
        assert_eq!(outcome, Outcome::Ended(failure::SERVICE_TIMEOUT));
    });
}

#[test]
fn the_deadline_is_kept() {
    let (kit, service) = (kit(), TestService::default());
    kit.block_on(async {
        let delivery = kit.deliver(&meta(), &service);
        let call = GrpcRequest::call(&message(0, 1)).last().header("grpc-timeout", "50m");
        call.send(&delivery.peer);
        let mut served = Served::accept(&service).await;
        let (request, mut respond) = served.request().await;
        assert_eq!(request.headers()["grpc-timeout"], "50m");
        let reason = served.drive(poll_fn(|cx| respond.poll_reset(cx))).await.unwrap();
        assert_eq!(reason, Reason::CANCEL);
        assert_eq!(delivery.peer.was_reset().unwrap().code, failure::SERVICE_TIMEOUT);
    });
}

#[test]
fn calls_share_a_connection_up_to_its_streams() {
    let (kit, service) =
        (kit_with(&serde_json::json!({ "connections_max": 2 })), TestService::default());
    kit.block_on(async {
        let mut builder = server::Builder::new();
        builder.max_concurrent_streams(2);
        let deliveries: Vec<_> = (0..5).map(|_| kit.deliver(&meta(), &service)).collect();
        for delivery in &deliveries {
            GrpcRequest::call(&message(0, 1)).last().send(&delivery.peer);
        }
        let mut first = Served::accept_with(&service, &builder).await;
        let mut running = vec![first.request().await, first.request().await];
        let mut second = first.drive(Served::accept_with(&service, &builder)).await;
        running.push(first.drive(second.request()).await);
        running.push(first.drive(second.request()).await);
        // The fifth has no place.
        let outcome = first.drive(second.drive(deliveries[4].running.outcome())).await;
        assert_eq!(outcome, Outcome::Ended(failure::OVERLOADED));
        assert_eq!(deliveries[4].peer.was_refused().unwrap().code, failure::OVERLOADED);
        for (_, respond) in &mut running {
            answer(respond, message(0, 2));
        }
        for delivery in &deliveries[..4] {
            let answered = first.drive(second.drive(delivery.peer.message())).await;
            assert_eq!(read_response(&answered).body, message(0, 2));
        }
        assert_eq!(service.connects(), 2);
    });
}

#[test]
fn a_refused_stream_is_tried_once_more() {
    let (kit, service) = (kit(), TestService::default());
    kit.block_on(async {
        let delivery = kit.deliver(&meta(), &service);
        GrpcRequest::call(&message(0, 1)).send(&delivery.peer);
        let mut first = Served::accept(&service).await;
        let (_request, mut respond) = first.request().await;
        respond.send_reset(Reason::REFUSED_STREAM);
        let mut second = first.drive(Served::accept(&service)).await;
        let (mut request, mut respond) = first.drive(second.request()).await;
        GrpcRequest::chunk(1, &message(1, 1)).last().send(&delivery.peer);
        let got = second.drive(body(request.body_mut())).await;
        assert_eq!(got, [message(0, 1), message(1, 1)].concat());
        answer(&mut respond, message(1, 7));
        let response = read_response(&second.drive(delivery.peer.message()).await);
        assert_eq!(response.body, message(1, 7));
        assert_eq!(kit.metric("grpc_rpcs_retried_total"), Some(1.0));

        // Not after more than the first message was taken.
        let delivery = kit.deliver(&meta(), &service);
        GrpcRequest::call(&message(0, 1)).send(&delivery.peer);
        let (mut request, mut respond) = second.drive(first.request()).await;
        GrpcRequest::chunk(1, &message(1, 1)).send(&delivery.peer);
        first.drive(part(request.body_mut(), 12)).await;
        respond.send_reset(Reason::REFUSED_STREAM);
        let reset = first.drive(delivery.peer.reset_reason()).await;
        assert_eq!(reset, Reset { code: failure::SERVICE_RESET, protocol_code: Some(7) });
    });
}

#[test]
fn a_refused_call_whose_parts_came_apart_is_tried_once_more() {
    let (kit, service) = (kit(), TestService::default());
    kit.block_on(async {
        let delivery = kit.deliver(&meta(), &service);
        GrpcRequest::call(&[]).send(&delivery.peer);
        let mut first = Served::accept(&service).await;
        let (mut request, mut respond) = first.request().await;
        GrpcRequest::chunk(1, &message(0, 5)).send(&delivery.peer);
        GrpcRequest::chunk(2, &[]).last().send(&delivery.peer);
        assert_eq!(first.drive(body(request.body_mut())).await, message(0, 5));
        respond.send_reset(Reason::REFUSED_STREAM);
        let mut second = first.drive(Served::accept(&service)).await;
        let (mut request, mut respond) = first.drive(second.request()).await;
        assert_eq!(second.drive(body(request.body_mut())).await, message(0, 5));
        answer(&mut respond, message(1, 7));
        let response = read_response(&second.drive(delivery.peer.message()).await);
        assert_eq!(response.body, message(1, 7));
    });
}

#[test]
fn a_connection_that_goes_away_takes_no_more() {
    let (kit, service) = (kit(), TestService::default());
    kit.block_on(async {
        let old = kit.deliver(&meta(), &service);
        GrpcRequest::call(&message(0, 1)).last().send(&old.peer);
        let mut first = Served::accept(&service).await;
        let (_request, mut respond) = first.request().await;
        first.go_away();
        first.drive(kit_idle()).await;
        kit.run_until_idle();
        first.drive(kit_idle()).await;
        let new = kit.deliver(&meta(), &service);
        GrpcRequest::call(&message(0, 1)).last().send(&new.peer);
        let mut second = first.drive(Served::accept(&service)).await;
        let (_request, mut respond_new) = first.drive(second.request()).await;
        answer(&mut respond_new, message(2, 2));
        let response = second.drive(new.peer.message()).await;
        assert_eq!(read_response(&response).body, message(2, 2));
        // What ran there ends there.
        answer(&mut respond, message(1, 1));
        let response = first.drive(old.peer.message()).await;
        assert_eq!(read_response(&response).body, message(1, 1));
        first.closed().await;
    });
}

/// Lets others have a turn.
async fn kit_idle() {
    for _ in 0..8 {
        let mut polled = false;
        poll_fn(|cx| {
            if std::mem::replace(&mut polled, true) {
                return std::task::Poll::Ready(());
            }
            cx.waker().wake_by_ref();
            std::task::Poll::Pending
        })
        .await;
    }
}

#[test]
fn another_version_of_the_service_is_dialled_anew() {
    let (kit, mut service) = (kit(), TestService::default());
    kit.block_on(async {
        let old = kit.deliver(&meta(), &service);
        GrpcRequest::call(&message(0, 1)).last().send(&old.peer);
        let mut first = Served::accept(&service).await;
        let (_request, mut respond) = first.request().await;
        service.version = 2;
        let new = kit.deliver(&meta(), &service);
        GrpcRequest::call(&message(0, 1)).last().send(&new.peer);
        let mut second = first.drive(Served::accept(&service)).await;
        first.drive(second.request()).await;
        answer(&mut respond, message(1, 1));
        let response = first.drive(old.peer.message()).await;
        assert_eq!(read_response(&response).body, message(1, 1));
        first.closed().await;
        new.running.cancel();
    });
}

#[test]
fn an_older_version_of_the_service_is_still_served() {
    let (kit, mut service) = (kit(), TestService::default());
    kit.block_on(async {
        for version in [2, 1] {
            service.version = version;
            let delivery = kit.deliver(&meta(), &service);
            GrpcRequest::call(&message(0, 1)).last().send(&delivery.peer);
            let mut served = Served::accept(&service).await;
            let (_request, mut respond) = served.request().await;
            answer(&mut respond, message(1, 1));
            let response = served.drive(delivery.peer.message()).await;
            assert_eq!(read_response(&response).body, message(1, 1));
        }
        assert_eq!(service.connects(), 2);
    });
}

#[test]
fn what_comes_during_a_drain_is_served() {
    let (kit, service) = (kit(), TestService::default());
    kit.block_on(async {
        kit.drain(Duration::from_secs(10));
        let delivery = kit.deliver(&meta(), &service);
        GrpcRequest::call(&message(0, 1)).last().send(&delivery.peer);
        let mut served = Served::accept(&service).await;
        let (_request, mut respond) = served.request().await;
        answer(&mut respond, message(1, 1));
        let response = served.drive(delivery.peer.message()).await;
        assert_eq!(read_response(&response).body, message(1, 1));
        drop(respond);
        served.closed().await;
        assert_eq!(service.connects(), 1);
    });
}

#[test]
fn unused_connections_end() {
    let config = serde_json::json!({ "idle_timeout": "10s" });
    let (kit, service) = (kit_with(&config), TestService::default());
    kit.block_on(async {
        let delivery = kit.deliver(&meta(), &service);
        GrpcRequest::call(&message(0, 1)).last().send(&delivery.peer);
        let mut served = Served::accept(&service).await;
        let (_request, mut respond) = served.request().await;
        answer(&mut respond, message(0, 1));
        served.drive(delivery.peer.message()).await;
        served.closed().await;
        kit.run_until_idle();
        assert_eq!(kit.metric("grpc_connections"), Some(0.0));
    });
}

#[test]
fn a_drain_ends_unused_connections_and_what_runs_late() {
    let (kit, service) = (kit(), TestService::default());
    kit.block_on(async {
        let delivery = kit.deliver(&meta(), &service);
        GrpcRequest::call(&message(0, 1)).send(&delivery.peer);
        let mut served = Served::accept(&service).await;
        let (_request, mut respond) = served.request().await;
        kit.drain(Duration::from_secs(1));
        let reason = served.drive(poll_fn(|cx| respond.poll_reset(cx))).await.unwrap();
        assert_eq!(reason, Reason::CANCEL);
        assert_eq!(delivery.peer.was_reset().unwrap().code, failure::DRAINING);
        drop(respond);
        served.closed().await;
    });
}

#[test]
fn an_unanswered_ping_ends_the_connection() {
    let config = serde_json::json!({ "keepalive_interval": "10s", "keepalive_timeout": "5s" });
    let (kit, service) = (kit_with(&config), TestService::default());
    kit.block_on(async {
        let delivery = kit.deliver(&meta(), &service);
        GrpcRequest::call(&message(0, 1)).send(&delivery.peer);
        let mut served = Served::accept(&service).await;
        served.request().await;
        // It answers while it is driven, and not any more from here on.
        let reset = delivery.peer.reset_reason().await;
        assert_eq!(reset.code, failure::SERVICE_RESET);
        assert_eq!(kit.metric("grpc_connections"), Some(0.0));
    });
}

#[test]
fn a_peer_without_credit_holds_up_its_own_stream_alone() {
    let (kit, service) = (kit(), TestService::default());
    kit.block_on(async {
        let stalled: Vec<_> = (0..20).map(|_| kit.deliver(&meta(), &service)).collect();
        for delivery in &stalled {
            delivery.peer.set_window(0);
            GrpcRequest::call(&message(0, 1)).last().send(&delivery.peer);
        }
        let mut served = Served::accept(&service).await;
        let mut open = Vec::new();
        for _ in &stalled {
            let (request, mut respond) = served.request().await;
            let mut send = respond.send_response(head(), false).unwrap();
            // As much as the stream's window takes, in small frames.
            for i in 0..2_000 {
                send.send_data(message(i, 120).into(), false).unwrap();
            }
            open.push((request, respond, send));
        }
        served.drive(kit_idle()).await;
        let delivery = kit.deliver(&meta(), &service);
        GrpcRequest::call(&message(0, 1)).last().send(&delivery.peer);
        let (_request, mut respond) = served.request().await;
        answer(&mut respond, message(0, 50_000));
        let mut got = Vec::new();
        loop {
            let chunk = read_response(&served.drive(delivery.peer.message()).await);
            got.extend(chunk.body);
            if chunk.last {
                break;
            }
        }
        assert_eq!(got, message(0, 50_000));
        assert_eq!(service.connects(), 1);
        stalled.iter().for_each(|delivery| delivery.running.cancel());
    });
}

#[test]
fn chunks_out_of_order_end_the_call() {
    let calls: [&[GrpcRequest]; 4] = [
        &[GrpcRequest::chunk(0, &message(0, 1))],
        &[GrpcRequest { sequence: 1, ..GrpcRequest::call(b"") }],
        &[GrpcRequest::call(b""), GrpcRequest::chunk(2, &message(0, 1))],
        &[GrpcRequest::call(b""), GrpcRequest::chunk(1, &message(0, 9)[..8])],
    ];
    for chunks in calls {
        let (kit, service) = (kit(), TestService::default());
        kit.block_on(async {
            let delivery = kit.deliver(&meta(), &service);
            chunks.iter().for_each(|chunk| chunk.send(&delivery.peer));
            if chunks.len() > 1 {
                let mut served = Served::accept(&service).await;
                let (_request, mut respond) = served.request().await;
                let reason = served.drive(poll_fn(|cx| respond.poll_reset(cx))).await.unwrap();
                assert_eq!(reason, Reason::CANCEL);
            }
            let outcome = delivery.running.outcome().await;
            assert_eq!(outcome, Outcome::Ended(failure::BAD_REQUEST));
        });
    }
}

#[test]
fn a_service_by_tls_is_offered_http_2_alone_and_must_agree() {
    let (kit, service) = (kit(), TestService::default().with_tls(&["h2", "http/1.1"]));
    kit.block_on(async {
        let delivery = kit.deliver(&meta(), &service);
        GrpcRequest::call(&message(0, 1)).last().send(&delivery.peer);
        let mut served = Served::accept(&service).await;
        let (request, mut respond) = served.request().await;
        assert_eq!(request.uri(), "https://test.localhost:9080/t.Echo/Call");
        answer(&mut respond, message(1, 1));
        let response = served.drive(delivery.peer.message()).await;
        assert_eq!(read_response(&response).body, message(1, 1));
        assert_eq!(service.offered(), [["h2"]]);
    });
    // Knows nothing of ALPN; says that it speaks no such thing.
    for (speaks, code) in
        [(&[][..], failure::SERVICE_INVALID), (&["http/1.1"], failure::SERVICE_UNREACHABLE)]
    {
        let service = TestService::default().with_tls(speaks);
        kit.block_on(async {
            let delivery = kit.deliver(&meta(), &service);
            GrpcRequest::call(&message(0, 1)).last().send(&delivery.peer);
            assert_eq!(delivery.running.outcome().await, Outcome::Ended(code));
            assert_eq!(delivery.peer.was_reset().map(|reset| reset.code), Some(code));
        });
    }
}

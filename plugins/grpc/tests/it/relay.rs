//! The relay's end.

use std::time::Duration;

use sidelane_abi::claim;
use sidelane_plugin::{Reset, failure};
use sidelane_testkit::{AcceptHttp, Kit, Outcome, TestFailure, TestRequest, WholeResponse};

use crate::wire::{
    GrpcResponse, HTTP_BODY, HTTP_TRAILERS, HttpBody, REQUEST_BATCH, RESPONSE_BATCH, headers,
    read_batch, read_request, send_batch, values,
};
use crate::{call, kit, kit_with, message};
use prost::Message as _;

/// A field of a response's head or trailers.
fn field(fields: &[(bytes::Bytes, bytes::Bytes)], name: &str) -> Option<String> {
    let mut fields = fields.iter();
    let (_, value) = fields.find(|(own, _)| own == name.as_bytes())?;
    Some(String::from_utf8(value.to_vec()).unwrap())
}

/// Status, `x-sidelane-error` and message of a Trailers-Only answer.
async fn trailers_only(accepted: &AcceptHttp) -> (String, String, String) {
    only(&accepted.response.whole().await.unwrap())
}

fn only(whole: &WholeResponse) -> (String, String, String) {
    let head = &whole.head;
    assert_eq!((head.status, head.end), (200, true));
    assert_eq!(head.header("content-type"), Some("application/grpc"));
    let text = |name| head.header(name).unwrap_or_default().to_owned();
    (text("grpc-status"), text("x-sidelane-error"), text("grpc-message"))
}

fn status_of(whole: &WholeResponse) -> Option<String> {
    field(&whole.trailers, "grpc-status")
}

#[test]
fn requests_are_claimed_by_content_type() {
    let kit = kit();
    let claims = |content_type| {
        kit.claims(&TestRequest::new("POST", "/a/b").header("content-type", content_type))
    };
    for content_type in ["application/grpc", "application/grpc+proto", "application/grpc;v=1"] {
        assert_eq!(claims(content_type), claim::YES, "{content_type}");
    }
    for content_type in ["application/grpc-web", "application/grpc-web+proto", "text/plain"] {
        assert_eq!(claims(content_type), claim::NO, "{content_type}");
    }
    assert_eq!(kit.claims(&TestRequest::new("POST", "/a/b")), claim::NO);
}

#[test]
fn a_unary_call_is_one_message_each_way() {
    let kit = kit();
    kit.block_on(async {
        let request = call().header("k", "1").header("k", "2").header("x-forwarded-for", "evil");
        let accepted = kit.accept_http(&request);
        accepted.body.send_last(message(0, 10));
        let first = accepted.peer.message().await;
        let request = read_request(&first);
        assert!(first.end && request.first);
        assert_eq!((&*request.service, &*request.method, &*request.path), ("t.Echo", "Call", ""));
        assert_eq!(request.authority, "test.localhost:9080");
        assert_eq!(values(&request.metadata, "k"), [b"1", b"2"]);
        assert_eq!(values(&request.metadata, "te"), [b"trailers"]);
        assert_eq!(request.body, message(0, 10));
        GrpcResponse::answer(&message(1, 7)).last(&[("grpc-status", "0")]).send(&accepted.peer);
        let whole = accepted.response.whole().await.unwrap();
        assert_eq!((whole.head.status, whole.body.clone()), (200, message(1, 7)));
        assert_eq!(status_of(&whole).as_deref(), Some("0"));
        assert_eq!(accepted.running.outcome().await, Outcome::Ended(failure::NONE));
        assert_eq!(accepted.peer.was_reset(), None);
        let labels = [("route", "test"), ("service", "t.Echo"), ("method", "Call")];
        assert_eq!(kit.metric_with("grpc_messages_total", &labels), Some(2.0));
        assert_eq!(kit.metric_with("grpc_bytes_total", &labels), Some(27.0));
        assert_eq!(kit.metric_with("grpc_in_flight", &labels), Some(0.0));
        let labels = [labels[0], labels[1], labels[2], ("grpc_status", "0")];
        assert_eq!(kit.metric_with("grpc_rpcs_total", &labels), Some(1.0));
    });
}

#[test]
fn heads_do_not_wait_for_messages() {
    let kit = kit();
    kit.block_on(async {
        let accepted = kit.accept_http(&call());
        assert!(read_request(&accepted.peer.message().await).body.is_empty());
        GrpcResponse::answer(b"").send(&accepted.peer);
        assert_eq!(accepted.response.head().await.unwrap().status, 200);
        // The service answers before the client is through.
        GrpcResponse::chunk(1, &message(0, 5)).send(&accepted.peer);
        assert_eq!(accepted.response.chunk().await.unwrap().unwrap(), message(0, 5));
        accepted.body.send([message(0, 1), message(1, 0), message(2, 2)].concat());
        let batch = read_batch(&accepted.peer.message().await, REQUEST_BATCH);
        assert_eq!((batch.sequence, batch.count), (1, 3));
        accepted.body.send_last(Vec::new());
        let last = read_request(&accepted.peer.message().await);
        assert_eq!((last.sequence, last.last, last.body.len()), (4, true, 0));
        send_batch(&accepted.peer, RESPONSE_BATCH, 2, 2, &[message(3, 1), message(4, 1)].concat());
        GrpcResponse::chunk(4, b"").last(&[("grpc-status", "0")]).send(&accepted.peer);
        let whole = accepted.response.whole().await.unwrap();
        assert_eq!(whole.body, [message(3, 1), message(4, 1)].concat());
    });
}

#[test]
fn a_client_that_waits_to_be_told_is_told() {
    let kit = kit();
    kit.block_on(async {
        let accepted = kit.accept_http(&call().expecting_continue());
        assert_eq!(accepted.response.informational().await.status, 100);
        let request = read_request(&accepted.peer.message().await);
        assert!(values(&request.metadata, "expect").is_empty());
        accepted.running.cancel();
    });
}

#[test]
fn frames_that_wait_together_are_one_batch() {
    let kit = kit();
    kit.block_on(async {
        let accepted = kit.accept_http(&call());
        accepted.peer.message().await;
        for i in 0..50 {
            accepted.body.send(message(i, 100));
        }
        let batch = read_batch(&accepted.peer.message().await, REQUEST_BATCH);
        assert_eq!(batch.count, 50);
        accepted.running.cancel();
    });
}

#[test]
fn trailers_only_answers_stay_so() {
    let kit = kit();
    kit.block_on(async {
        let accepted = kit.accept_http(&call());
        accepted.body.send_last(message(0, 1));
        accepted.peer.message().await;
        let mut answer = GrpcResponse::answer(b"").last(&[]);
        answer.metadata.extend(headers(&[("grpc-status", "7"), ("grpc-message", "a%20b")]));
        answer.send(&accepted.peer);
        let (status, error, text) = trailers_only(&accepted).await;
        assert_eq!((&*status, &*error, &*text), ("7", "", "a%20b"));
    });
}

#[test]
fn an_early_status_ends_the_call() {
    let kit = kit();
    kit.block_on(async {
        let accepted = kit.accept_http(&call());
        accepted.body.send(message(0, 1));
        accepted.peer.message().await;
        GrpcResponse::answer(b"").last(&[("grpc-status", "6")]).send(&accepted.peer);
        let whole = accepted.response.whole().await.unwrap();
        assert_eq!(status_of(&whole).as_deref(), Some("6"));
        assert_eq!(accepted.running.outcome().await, Outcome::Ended(failure::NONE));
        assert!(accepted.body.was_dropped());
    });
}

#[test]
fn answers_of_others_pass_as_they_are() {
    let kit = kit();
    kit.block_on(async {
        let accepted = kit.accept_http(&call());
        accepted.body.send_last(message(0, 1));
        accepted.peer.message().await;
        let mut answer = GrpcResponse { first: true, http_status: 404, ..GrpcResponse::default() };
        answer.metadata = headers(&[("content-type", "text/html")]);
        answer.send(&accepted.peer);
        accepted.peer.send(HTTP_BODY, HttpBody { data: b"no".to_vec() }.encode_to_vec(), false);
        let trailers = GrpcResponse::default();
        accepted.peer.send(HTTP_TRAILERS, trailers.encode_to_vec(), true);
        let whole = accepted.response.whole().await.unwrap();
        assert_eq!((whole.head.status, &whole.body[..]), (404, &b"no"[..]));
        assert_eq!(whole.head.header("content-type"), Some("text/html"));
    });
}

#[test]
fn what_is_no_rpc_is_refused() {
    let kit = kit();
    kit.block_on(async {
        let whole = kit.accept_http(&call().version(11)).response.whole().await.unwrap();
        assert_eq!(whole.head.status, 505);
        let request = TestRequest { method: "PUT".to_owned(), ..call() };
        let whole = kit.accept_http(&request).response.whole().await.unwrap();
        assert_eq!((whole.head.status, whole.head.header("allow")), (405, Some("POST")));
    });
}

/// Every code but none.
fn codes() -> Vec<u32> {
    (1..).take_while(|code| failure::name(*code) != "unknown").collect()
}

const STATUSES: [(u32, &str); 23] = [
    (failure::CANCELLED, "1"),
    (failure::NO_ROUTE, "12"),
    (failure::NO_SIDECAR, "14"),
    (failure::NO_PROTOCOL, "14"),
    (failure::SERVICE_UNREACHABLE, "14"),
    (failure::SERVICE_RESET, "14"),
    (failure::SERVICE_INVALID, "13"),
    (failure::SERVICE_TIMEOUT, "4"),
    (failure::RATE_LIMITED, "8"),
    (failure::OVERLOADED, "14"),
    (failure::TOO_LARGE, "8"),
    (failure::TUNNEL_LOST, "14"),
    (failure::CLIENT_GONE, "1"),
    (failure::BAD_REQUEST, "13"),
    (failure::FLOW_CONTROL, "13"),
    (failure::PLUGIN_FAILED, "13"),
    (failure::DRAINING, "14"),
    (failure::FORBIDDEN, "7"),
    (failure::INTERNAL, "13"),
    (failure::UNSUPPORTED, "12"),
    (failure::CLIENT_TIMEOUT, "4"),
    (failure::UNAUTHORIZED, "16"),
    (failure::MISDIRECTED, "14"),
];

#[test]
fn each_failure_has_its_status() {
    assert_eq!(STATUSES.map(|(code, _)| code).to_vec(), codes());
    for (code, status) in STATUSES {
        let mut kit = kit();
        kit.refuse_opens(TestFailure { detail: String::new(), ..TestFailure::new(code) });
        kit.block_on(async {
            // The host says it before there is an exchange.
            let told = kit.refuse_http(&call(), &TestFailure::new(code)).response;
            let refused = only(&told.whole().await.unwrap());
            let name = failure::name(code);
            assert_eq!(refused, (status.into(), name.into(), format!("{name}: test: {name}")));
            // There is no exchange.
            let (told, error, text) = trailers_only(&kit.accept_http(&call())).await;
            assert_eq!((&*told, &*error), (status, name));
            assert!(text.starts_with(&format!("{name}: ")), "{text}");
        });
    }
}

#[test]
fn each_reset_has_its_status() {
    for (code, status) in STATUSES {
        let kit = kit();
        kit.block_on(async {
            // Before the response has begun.
            let accepted = kit.accept_http(&call());
            accepted.peer.message().await;
            accepted.peer.reset(Reset::new(code));
            let (told, error, _) = trailers_only(&accepted).await;
            assert_eq!((&*told, &*error), (status, failure::name(code)));

            // Between two messages.
            let accepted = kit.accept_http(&call());
            accepted.peer.message().await;
            GrpcResponse::answer(&message(0, 3)).send(&accepted.peer);
            assert_eq!(accepted.response.head().await.unwrap().status, 200);
            accepted.peer.reset(Reset::new(code));
            let whole = accepted.response.whole().await.unwrap();
            assert_eq!(status_of(&whole).as_deref(), Some(status));
            let error = field(&whole.trailers, "x-sidelane-error");
            assert_eq!(error.as_deref(), Some(failure::name(code)));

            // Inside one.
            let accepted = kit.accept_http(&call());
            accepted.peer.message().await;
            GrpcResponse::answer(&message(0, 30)[..20]).partial().send(&accepted.peer);
            assert_eq!(accepted.response.head().await.unwrap().status, 200);
            accepted.peer.reset(Reset::new(code));
            accepted.running.outcome().await;
            assert!(accepted.response.was_aborted().unwrap().protocol_code.is_some());
        });
    }
}

#[test]
fn a_services_reset_is_mapped_or_passes() {
    for (code, status) in [(7, "14"), (8, "1"), (11, "8"), (2, "13"), (12, "7"), (13, "2")] {
        let reset = Reset { code: failure::SERVICE_RESET, protocol_code: Some(code) };
        let kit = kit();
        kit.block_on(async {
            let accepted = kit.accept_http(&call());
            accepted.peer.message().await;
            accepted.peer.reset(reset);
            assert_eq!(trailers_only(&accepted).await.0, status);

            let accepted = kit.accept_http(&call());
            accepted.peer.message().await;
            GrpcResponse::answer(&message(0, 3)).send(&accepted.peer);
            accepted.response.head().await.unwrap();
            accepted.peer.reset(reset);
            accepted.running.outcome().await;
            assert_eq!(accepted.response.was_aborted(), Some(reset));
        });
    }
}

#[test]
fn a_clients_reset_passes_as_sent() {
    let kit = kit();
    kit.block_on(async {
        let accepted = kit.accept_http(&call());
        accepted.peer.message().await;
        let reset = Reset { code: failure::CLIENT_GONE, protocol_code: Some(8) };
        accepted.body.fail(reset);
        assert_eq!(accepted.peer.reset_reason().await, reset);
        assert_eq!(accepted.running.outcome().await, Outcome::Ended(failure::CLIENT_GONE));

        let accepted = kit.accept_http(&call());
        accepted.peer.message().await;
        accepted.response.disconnect();
        assert_eq!(accepted.peer.reset_reason().await.code, failure::CLIENT_GONE);
        let labels = [("service", "other"), ("grpc_status", "none")];
        accepted.running.outcome().await;
        assert_eq!(kit.metric_with("grpc_rpcs_total", &labels), Some(2.0));
    });
}

#[test]
fn the_deadline_is_kept() {
    let mut held = kit();
    held.hold_opens();
    held.block_on(async {
        let accepted = held.accept_http(&call().header("grpc-timeout", "50m"));
        assert_eq!(trailers_only(&accepted).await.0, "4");
    });
    let kit = kit();
    kit.block_on(async {
        let accepted = kit.accept_http(&call().header("grpc-timeout", "50m"));
        let request = read_request(&accepted.peer.message().await);
        assert_eq!(values(&request.metadata, "grpc-timeout"), [b"50m"]);
        let (status, error, _) = trailers_only(&accepted).await;
        assert_eq!((&*status, &*error), ("4", "service-timeout"));
        let reset = accepted.peer.was_reset().unwrap();
        assert_eq!(reset.protocol_code, Some(8));
    });
}

#[test]
fn the_routes_deadline_counts_where_it_is_earlier() {
    for (timeout, within) in [(None, 50), (Some("10S"), 50), (Some("20m"), 20)] {
        let kit = kit();
        kit.block_on(async {
            let mut request = call();
            if let Some(timeout) = timeout {
                request = request.header("grpc-timeout", timeout);
            }
            // The kit's clock starts at one second.
            request.meta.deadline_ns = 1_050_000_000;
            let accepted = kit.accept_http(&request);
            accepted.peer.message().await;
            kit.advance(Duration::from_millis(within - 1));
            kit.run_until_idle();
            assert_eq!(accepted.running.ended(), None, "{timeout:?}: too early");
            kit.advance(Duration::from_millis(2));
            let (status, error, _) = trailers_only(&accepted).await;
            assert_eq!((&*status, &*error), ("4", "service-timeout"), "{timeout:?}");
        });
    }
}

#[test]
fn a_body_above_the_routes_limit_is_said_in_grpcs_words() {
    let kit = kit();
    kit.block_on(async {
        let accepted = kit.accept_http(&call());
        accepted.peer.message().await;
        accepted.body.fail(Reset { code: failure::TOO_LARGE, protocol_code: None });
        let (status, error, message) = trailers_only(&accepted).await;
        assert_eq!((&*status, &*error), ("8", "too-large"));
        assert!(message.contains("larger than the route allows"), "{message}");
        assert_eq!(accepted.peer.reset_reason().await.code, failure::TOO_LARGE);
    });
}

#[test]
fn a_drain_ends_what_runs_shortly_before_its_deadline() {
    let kit = kit();
    kit.block_on(async {
        let accepted = kit.accept_http(&call());
        accepted.peer.message().await;
        GrpcResponse::answer(&message(0, 3)).send(&accepted.peer);
        accepted.response.head().await.unwrap();
        kit.drain(Duration::from_secs(10));
        kit.advance(Duration::from_millis(7_900));
        kit.run_until_idle();
        assert_eq!(accepted.running.ended(), None);
        kit.advance(Duration::from_millis(200));
        let whole = accepted.response.whole().await.unwrap();
        assert_eq!(status_of(&whole).as_deref(), Some("14"));
        let text = field(&whole.trailers, "grpc-message").unwrap();
        assert!(text.starts_with("draining"), "{text}");
        assert_eq!(accepted.peer.was_reset().unwrap().code, failure::DRAINING);
    });
}

#[test]
fn a_message_over_the_routes_bound_ends_the_call() {
    let kit = kit();
    let mut request = call();
    request.meta.options = "{\"max_message_size\":\"1KiB\"}".to_owned();
    kit.block_on(async {
        let accepted = kit.accept_http(&request);
        accepted.body.send(message(0, 1_025));
        let (status, error, _) = trailers_only(&accepted).await;
        assert_eq!((&*status, &*error), ("8", "too-large"));
        assert_eq!(accepted.peer.was_reset().unwrap().code, failure::TOO_LARGE);

        let accepted = kit.accept_http(&request);
        accepted.body.send_last(message(0, 1_024));
        accepted.peer.message().await;
        GrpcResponse::answer(&message(0, 1_024)).send(&accepted.peer);
        GrpcResponse::chunk(1, &message(0, 1_025)).send(&accepted.peer);
        let whole = accepted.response.whole().await.unwrap();
        assert_eq!(status_of(&whole).as_deref(), Some("8"));
        assert_eq!(whole.body, message(0, 1_024));
    });
}

#[test]
fn a_request_that_ends_inside_a_message_is_refused() {
    let kit = kit();
    kit.block_on(async {
        let accepted = kit.accept_http(&call());
        accepted.body.send_last(message(0, 10)[..9].to_vec());
        let (status, error, _) = trailers_only(&accepted).await;
        assert_eq!((&*status, &*error), ("13", "bad-request"));
    });
}

#[test]
fn chunks_out_of_order_end_the_call() {
    let answers: [&[GrpcResponse]; 5] = [
        &[GrpcResponse::chunk(0, &message(0, 1))],
        &[GrpcResponse { sequence: 1, ..GrpcResponse::answer(b"") }],
        &[GrpcResponse::answer(b""), GrpcResponse::chunk(2, &message(0, 1))],
        &[GrpcResponse::answer(b""), GrpcResponse { sequence: 1, ..GrpcResponse::answer(b"") }],
        &[GrpcResponse::answer(b""), GrpcResponse::chunk(1, &message(0, 9)[..8])],
    ];
    for chunks in answers {
        let kit = kit();
        kit.block_on(async {
            let accepted = kit.accept_http(&call());
            accepted.peer.message().await;
            chunks.iter().for_each(|chunk| chunk.send(&accepted.peer));
            let whole = accepted.response.whole().await.unwrap();
            let told = status_of(&whole)
                .or_else(|| whole.head.header("grpc-status").map(ToOwned::to_owned));
            assert_eq!(told.as_deref(), Some("13"));
            let outcome = accepted.running.outcome().await;
            assert_eq!(outcome, Outcome::Ended(failure::PLUGIN_FAILED));
            assert!(accepted.peer.was_reset().is_some());
        });
    }
}

#[test]
fn a_client_that_does_not_read_holds_up_the_peer_alone() {
    let kit = kit();
    kit.block_on(async {
        let accepted = kit.accept_http(&call());
        accepted.body.send_last(message(0, 1));
        accepted.peer.message().await;
        accepted.response.set_room(0);
        GrpcResponse::answer(b"").send(&accepted.peer);
        for sequence in 1..20 {
            GrpcResponse::chunk(sequence, &message(0, 1_000)).send(&accepted.peer);
        }
        kit.run_until_idle();
        // One is in hand; the others wait where their credit is held.
        assert!(accepted.peer.untaken() >= 17, "{}", accepted.peer.untaken());
        accepted.response.disconnect();
        accepted.running.outcome().await;
    });
}

/// Runs a call to `path` that is answered with `status`.
async fn answered(kit: &Kit, path: &str, status: &str) {
    let accepted = kit.accept_http(&TestRequest { target: path.to_owned(), ..call() });
    accepted.body.send_last(message(0, 1));
    accepted.peer.message().await;
    let mut answer = GrpcResponse::answer(b"").last(&[]);
    answer.metadata.extend(headers(&[("grpc-status", status)]));
    answer.send(&accepted.peer);
    accepted.response.whole().await.unwrap();
    accepted.running.outcome().await;
}

fn counted(kit: &Kit, method: &str, status: &str) -> f64 {
    let labels = [("method", method), ("grpc_status", status)];
    kit.metric_with("grpc_rpcs_total", &labels).unwrap_or(0.0)
}

#[test]
fn methods_are_counted_by_name_once_proved() {
    let kit = kit();
    kit.block_on(async {
        answered(&kit, "/s.S/Absent", "12").await;
        answered(&kit, "/s.S/Secret", "16").await;
        answered(&kit, "/s.S/Fails", "5").await;
        answered(&kit, "/s.S/Fails", "12").await;
        answered(&kit, "/s.S/Odd", "99").await;
    });
    assert_eq!(counted(&kit, "other", "12"), 1.0);
    assert_eq!(counted(&kit, "other", "16"), 1.0);
    assert_eq!(counted(&kit, "Fails", "5"), 1.0);
    assert_eq!(counted(&kit, "Fails", "12"), 1.0);
    assert_eq!(counted(&kit, "Odd", "other"), 1.0);
    assert_eq!(kit.metric("grpc_in_flight"), Some(0.0));
    assert_eq!(kit.metric_with("grpc_messages_total", &[("direction", "request")]), Some(5.0));
}

#[test]
fn methods_beyond_the_bound_are_others() {
    let kit = kit_with(&serde_json::json!({ "methods_max": 2 }));
    kit.block_on(async {
        for method in ["A", "B", "C", "A"] {
            answered(&kit, &format!("/s.S/{method}"), "0").await;
        }
    });
    assert_eq!(counted(&kit, "A", "0"), 2.0);
    assert_eq!(counted(&kit, "B", "0"), 1.0);
    assert_eq!(counted(&kit, "C", "0"), 0.0);
    assert_eq!(counted(&kit, "other", "0"), 1.0);
}

#[test]
fn the_readme_names_every_metric() {
    let readme = include_str!("../../README.md");
    for name in [
        "grpc_rpcs_total",
        "grpc_messages_total",
        "grpc_bytes_total",
        "grpc_duration_seconds",
        "grpc_in_flight",
        "grpc_connections_opened_total",
        "grpc_rpcs_retried_total",
        "grpc_connections",
        "grpc_streams",
    ] {
        assert!(readme.contains(&format!("| `{name}` |")), "README.md lacks {name}");
    }
}

#[test]
fn options_are_checked_with_their_place() {
    let kit = kit();
    let check = |options: serde_json::Value| kit.validate_route(&options);
    assert_eq!(check(serde_json::json!({ "max_message_size": "4MiB" })), Ok(()));
    let error = check(serde_json::json!({ "max_message_size": "big" })).unwrap_err();
    assert_eq!(error.path.as_deref(), Some("max_message_size"));
    let error = check(serde_json::json!({ "max": 1 })).unwrap_err();
    assert!(error.message.contains("max_message_size"), "{error}");
}

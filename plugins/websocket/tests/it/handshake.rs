//! The opening handshake, each end by itself.

use prost::Message as _;
use sidelane_plugin::ffi::abi::claim;
use sidelane_plugin::{Reset, failure};
use sidelane_testkit::{Outcome, TestFailure, TestRequest, TestService};

use crate::frames::{TEXT, plain};
use crate::wire::{
    self, HttpBody, HttpTrailers, WebSocketRequest, WebSocketResponse, accepted, pairs,
    read_frames, read_request, read_response, send_response, texts,
};
use crate::{ACCEPT, connect, kit, kit_with, meta, read_head, switching, upgrade, values};

const WELL: Outcome = Outcome::Ended(failure::NONE);

#[test]
fn upgrades_and_extended_connects_are_claimed() {
    let kit = kit();
    let plain = {
        let mut request = TestRequest::new("GET", "/");
        request.can_upgrade = true;
        request
    };
    let mut tied = upgrade("/");
    tied.can_upgrade = false;
    let mut other = connect("/");
    "connect-udp".clone_into(&mut other.protocol);
    let mut post = upgrade("/");
    "POST".clone_into(&mut post.method);
    for (request, expected) in [
        (upgrade("/"), claim::YES),
        (connect("/"), claim::YES),
        (plain.clone(), claim::NO),
        (plain.clone().header("upgrade", "websocket"), claim::NO),
        (plain.clone().header("upgrade", "h2c").header("connection", "upgrade"), claim::NO),
        (plain.header("upgrade", "x, websocket").header("connection", "upgrade"), claim::YES),
        (tied, claim::NO),
        (post, claim::NO),
        (other, claim::NO),
    ] {
        assert_eq!(kit.claims(&request), expected, "{request:?}");
    }
}

#[test]
fn the_handshake_goes_into_the_tunnel_as_sent() {
    let kit = kit();
    kit.block_on(async {
        let request = upgrade("/chat?room=1")
            .header("cookie", "a=1")
            .header("cookie", "b=2")
            .header("sec-websocket-protocol", "chat, superchat")
            .header("sec-websocket-protocol", "v2")
            .header("sec-websocket-extensions", "permessage-deflate")
            .header("origin", "http://x")
            .header("keep-alive", "1");
        let call = kit.accept_http(&request);
        let message = call.peer.message().await;
        assert!(!message.end);
        let sent = read_request(&message);
        assert_eq!((&*sent.url, &*sent.host), ("/chat?room=1", "test.localhost:9080"));
        assert_eq!((&*sent.subprotocol, sent.version), ("chat, superchat, v2", 0));
        assert_eq!(
            texts(&sent.headers),
            pairs(&[
                ("cookie", "a=1"),
                ("cookie", "b=2"),
                ("sec-websocket-extensions", "permessage-deflate"),
                ("origin", "http://x"),
            ])
        );

        let _client = call.response.upgraded();
        let response = accepted(
            &[("sec-websocket-extensions", "permessage-deflate"), ("set-cookie", "s=1")],
            "chat",
        );
        send_response(&call.peer, &response, false);
        let head = call.response.head().await.unwrap();
        assert_eq!((head.status, head.end), (101, true));
        assert_eq!(head.header("sec-websocket-accept"), Some(ACCEPT));
        assert_eq!(head.header("upgrade"), Some("websocket"));
        assert_eq!(head.header("connection"), Some("Upgrade"));
        assert_eq!(head.header("sec-websocket-protocol"), Some("chat"));
        assert_eq!(head.header("sec-websocket-extensions"), Some("permessage-deflate"));
        assert_eq!(head.header("set-cookie"), Some("s=1"));
        kit.run_until_idle();
        assert_eq!(kit.metric_with("websocket_connections", &[("route", "test")]), Some(1.0));
        call.running.cancel();
        assert_eq!(kit.metric("websocket_connections"), Some(0.0));
    });
}

#[test]
fn over_http_2_success_is_200() {
    let kit = kit();
    kit.block_on(async {
        let call = kit.accept_http(&connect("/"));
        assert_eq!(read_request(&call.peer.message().await).version, 20);
        let _client = call.response.upgraded();
        send_response(&call.peer, &accepted(&[("x-a", "1")], "chat"), false);
        let head = call.response.head().await.unwrap();
        assert_eq!((head.status, head.end), (200, false));
        for name in ["upgrade", "connection", "sec-websocket-accept"] {
            assert_eq!(head.header(name), None, "{name}");
        }
        assert_eq!(head.header("sec-websocket-protocol"), Some("chat"));
        assert_eq!(head.header("x-a"), Some("1"));
        call.running.cancel();
    });
}

#[test]
fn handshakes_that_are_none_are_answered() {
    let drop = |name: &str, request: TestRequest| {
        let headers = request.headers.into_iter().filter(|(own, _)| own != name).collect();
        TestRequest { headers, ..request }
    };
    let key = "sec-websocket-key";
    let version = "sec-websocket-version";
    for (request, status) in [
        (drop(version, upgrade("/")), 426),
        (drop(version, upgrade("/")).header(version, "8"), 426),
        (upgrade("/").header(version, "13"), 426),
        (drop(key, upgrade("/")), 400),
        (drop(key, upgrade("/")).header(key, "c2hvcnQ="), 400),
        (drop(key, upgrade("/")).header(key, "not base64 at all!!!!!!!"), 400),
        (upgrade("/").header(key, "dGhlIHNhbXBsZSBub25jZQ=="), 400),
        (upgrade("/").with_body(Some(3)), 400),
        (drop(version, connect("/")), 426),
        (TestRequest::new("GET", "/"), 400),
    ] {
        let kit = kit();
        kit.block_on(async {
            let call = kit.accept_http(&request);
            let answer = call.response.whole().await.unwrap();
            assert_eq!(answer.head.status, status, "{request:?}");
            assert_eq!(answer.head.header("x-sidelane-error"), Some("bad-request"));
            let expected = (status == 426).then_some("13");
            assert_eq!(answer.head.header(version), expected);
            assert_eq!(call.running.outcome().await, WELL);
            assert_eq!(kit.metric("websocket_handshakes_refused_total"), Some(1.0));
        });
    }
}

#[test]
fn failures_are_told_in_http() {
    let mut kit = kit();
    kit.refuse_opens(TestFailure::new(failure::NO_SIDECAR));
    kit.block_on(async {
        let call = kit.accept_http(&upgrade("/"));
        let answer = call.response.whole().await.unwrap();
        assert_eq!(answer.head.status, 503);
        assert_eq!(answer.head.header("x-sidelane-error"), Some("no-sidecar"));
    });
    for (code, status) in [
        (failure::SERVICE_UNREACHABLE, 502),
        (failure::SERVICE_TIMEOUT, 504),
        (failure::SERVICE_INVALID, 502),
        (failure::TUNNEL_LOST, 502),
        (failure::OVERLOADED, 503),
    ] {
        let kit = crate::kit();
        kit.block_on(async {
            let call = kit.accept_http(&upgrade("/"));
            call.peer.message().await;
            call.peer.reset(Reset::new(code));
            let answer = call.response.whole().await.unwrap();
            assert_eq!(answer.head.status, status);
            assert_eq!(answer.head.header("x-sidelane-error"), Some(failure::name(code)));
            assert_eq!(call.running.outcome().await, Outcome::Ended(code));
        });
    }
}

#[test]
fn a_service_without_an_answer_is_504_at_both_ends() {
    let kit = kit_with(&serde_json::json!({"handshake_timeout": "3s"}));
    kit.block_on(async {
        let call = kit.accept_http(&upgrade("/"));
        let answer = call.response.whole().await.unwrap();
        assert_eq!(answer.head.status, 504);
        assert_eq!(call.peer.was_reset(), Some(Reset::new(failure::SERVICE_TIMEOUT)));

        let service = TestService::default();
        let call = kit.deliver(&meta(), &service);
        WebSocketRequest::new("/").send(&call.peer);
        let mut stream = service.accept().await;
        read_head(&mut stream).await;
        assert_eq!(call.peer.reset_reason().await, Reset::new(failure::SERVICE_TIMEOUT));
        stream.closed().await;

        let service = TestService::default();
        service.hang();
        let call = kit.deliver(&meta(), &service);
        WebSocketRequest::new("/").send(&call.peer);
        assert_eq!(call.peer.reset_reason().await, Reset::new(failure::SERVICE_TIMEOUT));
        assert!(call.peer.was_refused().is_some());
    });
}

#[test]
fn the_service_gets_an_upgrade_of_its_own() {
    let (kit, service) = (kit(), TestService::default());
    kit.block_on(async {
        let call = kit.deliver(&meta(), &service);
        WebSocketRequest {
            subprotocol: "chat, superchat".to_owned(),
            version: 20,
            ..WebSocketRequest::new("/chat?x=%20y")
                .header("cookie", "a=1")
                .header("cookie", "b=2")
                .header("sec-websocket-extensions", "permessage-deflate")
                .header("x-forwarded-for", "6.6.6.6")
        }
        .send(&call.peer);
        let mut stream = service.accept().await;
        assert!(call.peer.was_dispatched());
        let head = read_head(&mut stream).await;
        assert!(head.starts_with("GET /chat?x=%20y HTTP/1.1\r\n"), "{head}");
        for (name, expected) in [
            ("host", vec!["test.localhost:9080"]),
            ("upgrade", vec!["websocket"]),
            ("connection", vec!["Upgrade"]),
            ("sec-websocket-version", vec!["13"]),
            ("sec-websocket-protocol", vec!["chat, superchat"]),
            ("sec-websocket-extensions", vec!["permessage-deflate"]),
            ("cookie", vec!["a=1", "b=2"]),
            ("x-forwarded-for", vec!["192.0.2.1"]),
            ("x-forwarded-proto", vec!["http"]),
            ("via", vec!["2.0 sidelane"]),
            ("content-length", vec![]),
            ("transfer-encoding", vec![]),
        ] {
            assert_eq!(values(&head, name), expected, "{name}: {head}");
        }
        let more = "Sec-WebSocket-Protocol: chat\r\nSec-WebSocket-Extensions: permessage-deflate\r\nX-A: 1\r\n";
        stream.write(b"HTTP/1.1 102 Processing\r\n\r\n").await;
        stream.write(&switching(&head, more)).await;
        let response = read_response(&call.peer.message().await);
        assert!(response.accepted);
        assert_eq!((response.status_code, &*response.subprotocol), (101, "chat"));
        assert_eq!(
            texts(&response.headers),
            pairs(&[
                ("sec-websocket-extensions", "permessage-deflate"),
                ("x-a", "1"),
                ("via", "1.1 sidelane"),
            ])
        );
        call.running.cancel();
    });
}

#[test]
fn frames_that_come_with_the_101_are_not_lost() {
    let (kit, service) = (kit(), TestService::default());
    kit.block_on(async {
        let call = kit.deliver(&meta(), &service);
        WebSocketRequest::new("/").send(&call.peer);
        let mut stream = service.accept().await;
        let head = read_head(&mut stream).await;
        let frames = [plain(TEXT, b"early"), plain(TEXT, b"bird")[..3].to_vec()].concat();
        stream.write(&[switching(&head, ""), frames].concat()).await;
        assert!(read_response(&call.peer.message().await).accepted);
        assert_eq!(read_frames(&call.peer.message().await)[0].payload, b"early");
        stream.write(&plain(TEXT, b"bird")[3..]).await;
        assert_eq!(read_frames(&call.peer.message().await)[0].payload, b"bird");
        call.running.cancel();
    });
}

#[test]
fn a_101_that_proves_nothing_is_invalid() {
    let good = "HTTP/1.1 101 X\r\nUpgrade: websocket\r\nConnection: Upgrade\r\n";
    for answer in [
        format!("{good}\r\n"),
        format!("{good}Sec-WebSocket-Accept: {ACCEPT}\r\n\r\n"),
        "HTTP/1.1 101 X\r\nConnection: Upgrade\r\nSec-WebSocket-Accept: @\r\n\r\n".to_owned(),
        "HTTP/1.1 101 X\r\nUpgrade: websocket\r\nSec-WebSocket-Accept: @\r\n\r\n".to_owned(),
        format!("{good}Sec-WebSocket-Accept: @\r\nSec-WebSocket-Accept: @\r\n\r\n"),
        format!("HTTP/1.1 101 X\r\n{}\r\n", "x: y\r\n".repeat(200)),
        format!("HTTP/1.1 101 X\r\nx: {}\r\n\r\n", "y".repeat(70_000)),
        "what?\r\n\r\n".to_owned(),
    ] {
        let (kit, service) = (kit(), TestService::default());
        kit.block_on(async {
            let call = kit.deliver(&meta(), &service);
            WebSocketRequest::new("/").send(&call.peer);
            let mut stream = service.accept().await;
            let head = read_head(&mut stream).await;
            let accept = String::from_utf8(switching(&head, "")).unwrap();
            let accept = values(&accept, "Sec-WebSocket-Accept")[0].to_owned();
            let answer = answer.replace('@', &accept).into_bytes();
            let mut at = 0;
            while at < answer.len() && call.running.ended().is_none() {
                at += crate::write_some(&mut stream, &answer[at..]);
                kit.run_until_idle();
            }
            let reset = call.peer.reset_reason().await;
            assert_eq!(reset, Reset::new(failure::SERVICE_INVALID));
            stream.closed().await;
        });
    }
}

#[test]
fn a_service_that_is_not_there_is_told() {
    let (kit, service) = (kit(), TestService::default());
    service.refuse();
    kit.block_on(async {
        let call = kit.deliver(&meta(), &service);
        WebSocketRequest::new("/").send(&call.peer);
        assert_eq!(call.peer.reset_reason().await, Reset::new(failure::SERVICE_UNREACHABLE));
        assert_eq!(call.peer.was_refused(), Some(Reset::new(failure::SERVICE_UNREACHABLE)));

        let service = TestService::default();
        let call = kit.deliver(&meta(), &service);
        WebSocketRequest::new("/").send(&call.peer);
        drop(service.accept().await);
        assert_eq!(call.peer.reset_reason().await, Reset::new(failure::SERVICE_RESET));
    });
}

#[test]
fn what_is_no_handshake_is_refused() {
    let (kit, service) = (kit(), TestService::default());
    kit.block_on(async {
        for request in [
            WebSocketRequest::new("chat"),
            WebSocketRequest::new("/a#b"),
            WebSocketRequest::new("/").header("bad name", "x"),
            WebSocketRequest::new("/").header("x", "a\nb"),
        ] {
            let call = kit.deliver(&meta(), &service);
            request.send(&call.peer);
            assert_eq!(call.running.outcome().await, Outcome::Ended(failure::BAD_REQUEST));
            assert_eq!(call.peer.was_refused(), Some(Reset::new(failure::BAD_REQUEST)));
        }
        let call = kit.deliver(&meta(), &service);
        call.peer.send(wire::FRAME, Vec::new(), false);
        assert_eq!(call.running.outcome().await, Outcome::Ended(failure::BAD_REQUEST));
        assert_eq!(service.connects(), 0);
    });
}

#[test]
fn a_refusal_goes_into_the_tunnel_as_sent() {
    let head = "HTTP/1.1 401 Unauthorized\r\nWWW-Authenticate: Basic\r\n";
    for (answer, close, length, body, trailers) in [
        ("Content-Length: 7\r\n\r\nno way\n", false, 8, "no way\n", &[][..]),
        ("Content-Length: 0\r\n\r\n", false, 1, "", &[]),
        ("\r\nuntil the end", true, 0, "until the end", &[]),
        (
            "Transfer-Encoding: chunked\r\nTrailer: x-sum\r\n\r\n2\r\nno\r\n1\r\n!\r\n0\r\nx-sum: 3\r\n\r\n",
            false,
            0,
            "no!",
            &[("x-sum", "3")],
        ),
    ] {
        let (kit, service) = (kit(), TestService::default());
        kit.block_on(async {
            let call = kit.deliver(&meta(), &service);
            WebSocketRequest::new("/").send(&call.peer);
            let mut stream = service.accept().await;
            read_head(&mut stream).await;
            // As the relay's end does once it knows; the fake tunnel calls it cancelled otherwise.
            call.peer.finish();
            stream.write(format!("{head}{answer}").as_bytes()).await;
            if close {
                stream.shutdown().await;
            }
            let message = call.peer.message().await;
            let response = read_response(&message);
            assert_eq!((response.status_code, response.accepted), (401, false));
            assert_eq!(response.content_length, length);
            assert_eq!(
                texts(&response.headers),
                pairs(&[
                    ("www-authenticate", "Basic"),
                    ("trailer", "x-sum"),
                    ("via", "1.1 sidelane")
                ])
                .into_iter()
                .filter(|(name, _)| !trailers.is_empty() || name != "trailer")
                .collect::<Vec<_>>()
            );
            let mut got = Vec::new();
            let mut got_trailers = Vec::new();
            let mut end = message.end;
            while !end {
                let Some(next) = call.peer.next().await else { break };
                let next = next.unwrap();
                end = next.end;
                match next.field {
                    wire::BODY => got.extend(HttpBody::decode(&next.payload[..]).unwrap().data),
                    wire::TRAILERS => {
                        got_trailers =
                            texts(&HttpTrailers::decode(&next.payload[..]).unwrap().headers);
                    }
                    other => panic!("field {other}"),
                }
            }
            assert_eq!(String::from_utf8(got).unwrap(), body);
            assert_eq!(got_trailers, pairs(trailers));
            assert_eq!(call.running.outcome().await, WELL);
            stream.closed().await;
        });
    }
}

#[test]
fn a_refusal_reaches_the_client_as_it_is() {
    let kit = kit();
    kit.block_on(async {
        let call = kit.accept_http(&upgrade("/"));
        call.peer.message().await;
        let response = WebSocketResponse {
            status_code: 403,
            headers: vec![wire::header("x-why", "because"), wire::header("set-cookie", "a")],
            content_length: 0,
            body: b"no ".to_vec(),
            ..WebSocketResponse::default()
        };
        send_response(&call.peer, &response, false);
        let data = HttpBody { data: b"way".to_vec() }.encode_to_vec();
        call.peer.send(wire::BODY, data, false);
        let trailers = HttpTrailers { headers: vec![wire::header("x-sum", "6")] };
        call.peer.send(wire::TRAILERS, trailers.encode_to_vec(), true);
        let whole = call.response.whole().await.unwrap();
        assert_eq!((whole.head.status, &whole.body[..]), (403, &b"no way"[..]));
        assert_eq!(whole.head.header("x-why"), Some("because"));
        assert_eq!(whole.head.header("set-cookie"), Some("a"));
        assert_eq!(whole.head.header("x-sidelane-error"), None);
        assert_eq!(whole.trailers.len(), 1);
        assert_eq!(call.running.outcome().await, WELL);
        let refused = kit.metric_with(
            "websocket_handshakes_refused_total",
            &[("code", "403"), ("route", "test")],
        );
        assert_eq!(refused, Some(1.0));
    });
}

#[test]
fn a_plain_answer_is_no_success_over_http_2() {
    for (request, status) in [(upgrade("/"), 200), (connect("/"), 502)] {
        let kit = kit();
        kit.block_on(async {
            let call = kit.accept_http(&request);
            call.peer.message().await;
            let response = WebSocketResponse {
                status_code: 200,
                body: b"hello".to_vec(),
                ..WebSocketResponse::default()
            };
            send_response(&call.peer, &response, true);
            assert_eq!(call.response.whole().await.unwrap().head.status, status);
        });
    }
}

#[test]
fn a_client_that_leaves_ends_the_handshake() {
    let kit = kit();
    kit.block_on(async {
        let call = kit.accept_http(&upgrade("/"));
        call.peer.message().await;
        call.response.disconnect();
        assert_eq!(call.running.outcome().await, Outcome::Ended(failure::CLIENT_GONE));
        assert_eq!(call.peer.was_reset(), Some(Reset::new(failure::CLIENT_GONE)));
    });
}

#[test]
fn there_are_no_more_connections_than_configured() {
    let kit = kit_with(&serde_json::json!({"connections_max": 1}));
    kit.block_on(async {
        let first = kit.accept_http(&upgrade("/"));
        first.peer.message().await;
        let second = kit.accept_http(&upgrade("/"));
        let answer = second.response.whole().await.unwrap();
        assert_eq!(answer.head.status, 503);
        assert_eq!(answer.head.header("x-sidelane-error"), Some("overloaded"));
        first.running.cancel();
        let third = kit.accept_http(&upgrade("/"));
        third.peer.message().await;
        third.running.cancel();
    });
}

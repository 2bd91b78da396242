//! The relay's end: what goes into the tunnel, and what the client gets.

use prost::Message as _;
use sidelane_plugin::{Reset, failure};
use sidelane_testkit::{AcceptHttp, Kit, Outcome, TestFailure, TestRequest};

use crate::kit;
use crate::wire::{
    self, HttpResponse, HttpTrailers, header, pairs, read_data, read_request, read_trailers,
    response, send_data, texts,
};

const WELL: Outcome = Outcome::Ended(failure::NONE);

fn respond(accepted: &AcceptHttp, response: &HttpResponse, end: bool) {
    accepted.peer.send(wire::RESPONSE, response.encode_to_vec(), end);
}

fn begin(kit: &Kit, request: &TestRequest) -> AcceptHttp {
    kit.accept_http(request)
}

#[test]
fn a_small_request_is_one_message() {
    let kit = kit();
    kit.block_on(async {
        let request =
            TestRequest::new("POST", "/a%20b?c").header("accept", "*/*").with_body(Some(3));
        let accepted = begin(&kit, &request);
        accepted.body.send_last("abc");
        let message = accepted.peer.message().await;
        assert!(message.end);
        let read = read_request(&message);
        assert_eq!((read.method.as_str(), &read.target[..]), ("POST", &b"/a%20b?c"[..]));
        assert_eq!(read.authority, b"test.localhost:9080");
        assert_eq!((read.content_length, &read.body[..]), (4, &b"abc"[..]));
        assert_eq!(texts(&read.headers), pairs(&[("accept", "*/*")]));
        respond(&accepted, &response(200, &[("x-a", "1"), ("x-a", "2")], b"ok"), true);
        let whole = accepted.response.whole().await.unwrap();
        assert_eq!((whole.head.status, &whole.body[..]), (200, &b"ok"[..]));
        assert_eq!((whole.head.body_length, whole.head.end), (Some(2), true));
        assert_eq!(whole.head.headers.len(), 2);
        assert_eq!(accepted.running.outcome().await, WELL);
    });
}

#[test]
fn fields_of_one_connection_do_not_pass() {
    let kit = kit();
    kit.block_on(async {
        let request = TestRequest::new("GET", "/")
            .header("connection", "upgrade, http2-settings, x-hop")
            .header("upgrade", "h2c")
            .header("http2-settings", "AAMAAABkAAQAAP__")
            .header("x-hop", "1")
            .header("te", "trailers, deflate")
            .header("cookie", "a=b");
        let accepted = begin(&kit, &request);
        let read = read_request(&accepted.peer.message().await);
        assert_eq!(texts(&read.headers), pairs(&[("te", "trailers"), ("cookie", "a=b")]));
        let headers = [
            ("connection", "x-hop"),
            ("x-hop", "1"),
            ("transfer-encoding", "chunked"),
            ("x-stay", "1"),
        ];
        respond(&accepted, &response(200, &headers, b""), true);
        let whole = accepted.response.whole().await.unwrap();
        assert_eq!(whole.head.headers.len(), 1);
        assert_eq!(whole.head.header("x-stay"), Some("1"));
    });
}

#[test]
fn an_explicit_length_of_zero_passes() {
    let kit = kit();
    kit.block_on(async {
        let accepted = begin(&kit, &TestRequest::new("POST", "/").header("content-length", "0"));
        let message = accepted.peer.message().await;
        let read = read_request(&message);
        assert_eq!((read.content_length, message.end), (1, true));
        assert_eq!(texts(&read.headers), pairs(&[("content-length", "0")]));
        respond(&accepted, &response(204, &[], b""), true);
        accepted.response.whole().await.unwrap();
    });
}

#[test]
fn a_body_streams_in_bounded_messages_with_its_trailers() {
    let kit = kit();
    kit.block_on(async {
        let accepted = begin(&kit, &TestRequest::new("POST", "/").with_body(None));
        let first = accepted.peer.message().await;
        assert!(!first.end);
        assert_eq!(read_request(&first).content_length, 0);
        accepted.body.send(vec![1; 80 * 1024]);
        let mut sizes = Vec::new();
        for _ in 0..3 {
            sizes.push(read_data(&accepted.peer.message().await).len());
        }
        assert_eq!(sizes, [32 * 1024, 32 * 1024, 16 * 1024]);
        accepted.body.trailers(&[("x-sum", "6"), ("connection", "close")]);
        let last = accepted.peer.message().await;
        assert!(last.end);
        assert_eq!(read_trailers(&last), pairs(&[("x-sum", "6")]));
        respond(&accepted, &response(200, &[], b""), true);
        assert_eq!(accepted.running.outcome().await, WELL);
    });
}

#[test]
fn a_known_length_goes_with_the_head() {
    let kit = kit();
    kit.block_on(async {
        let accepted = begin(&kit, &TestRequest::new("PUT", "/").with_body(Some(5)));
        assert_eq!(read_request(&accepted.peer.message().await).content_length, 6);
        accepted.body.send("ab");
        assert_eq!(read_data(&accepted.peer.message().await), b"ab");
        accepted.body.send_last("cde");
        let last = accepted.peer.message().await;
        assert_eq!((read_data(&last), last.end), (b"cde".to_vec(), true));
        respond(&accepted, &response(200, &[], b""), true);
        accepted.response.whole().await.unwrap();
    });
}

#[test]
fn a_response_streams_with_interim_heads_and_trailers() {
    let kit = kit();
    kit.block_on(async {
        let accepted = begin(&kit, &TestRequest::new("GET", "/"));
        accepted.peer.message().await;
        respond(&accepted, &response(103, &[("link", "</a>")], b""), false);
        let hints = accepted.response.informational().await;
        assert_eq!((hints.status, hints.header("link")), (103, Some("</a>")));
        respond(
            &accepted,
            &HttpResponse { content_length: 7, ..response(200, &[], b"abc") },
            false,
        );
        let head = accepted.response.head().await.unwrap();
        assert_eq!((head.status, head.body_length, head.end), (200, Some(6), false));
        assert_eq!(accepted.response.chunk().await.unwrap().unwrap(), "abc");
        send_data(&accepted.peer, b"def", false);
        assert_eq!(accepted.response.chunk().await.unwrap().unwrap(), "def");
        let trailers = HttpTrailers { headers: vec![header("x-sum", "6")] };
        accepted.peer.send(wire::TRAILERS, trailers.encode_to_vec(), true);
        let whole = accepted.response.whole().await.unwrap();
        assert_eq!(whole.trailers.len(), 1);
        assert_eq!(accepted.running.outcome().await, WELL);
    });
}

#[test]
fn interim_heads_are_not_for_http_1_0() {
    let kit = kit();
    kit.block_on(async {
        let accepted = begin(&kit, &TestRequest::new("GET", "/").version(10));
        assert_eq!(read_request(&accepted.peer.message().await).version, 10);
        respond(&accepted, &response(103, &[], b""), false);
        respond(&accepted, &response(200, &[], b"ok"), true);
        assert_eq!(accepted.response.whole().await.unwrap().body, b"ok");
        assert_eq!(accepted.running.outcome().await, WELL);
    });
}

#[test]
fn a_client_is_told_to_continue_by_the_service_alone() {
    let kit = kit();
    kit.block_on(async {
        let request = TestRequest::new("PUT", "/").with_body(Some(3)).expecting_continue();
        let accepted = begin(&kit, &request);
        let message = accepted.peer.message().await;
        let read = read_request(&message);
        assert!(read.expect_continue && !message.end);
        assert!(read.headers.is_empty());
        kit.run_until_idle();
        assert_eq!(accepted.peer.waiting(), 0);
        respond(&accepted, &response(100, &[], b""), false);
        assert_eq!(accepted.response.informational().await.status, 100);
        accepted.body.send_last("abc");
        let message = accepted.peer.message().await;
        assert_eq!((read_data(&message), message.end), (b"abc".to_vec(), true));
        respond(&accepted, &response(200, &[], b""), true);
        assert_eq!(accepted.running.outcome().await, WELL);
    });
}

#[test]
fn a_refused_expectation_reaches_the_client_without_its_body() {
    let kit = kit();
    kit.block_on(async {
        let request = TestRequest::new("PUT", "/").with_body(Some(3)).expecting_continue();
        let accepted = begin(&kit, &request);
        accepted.peer.message().await;
        respond(&accepted, &response(413, &[], b"no"), true);
        let whole = accepted.response.whole().await.unwrap();
        assert_eq!((whole.head.status, &whole.body[..]), (413, &b"no"[..]));
        assert_eq!(accepted.running.outcome().await, WELL);
        assert_eq!(accepted.peer.was_reset().unwrap().code, failure::CANCELLED);
    });
}

#[test]
fn a_body_that_comes_without_a_continue_goes_on_to_its_end() {
    for with_head in [false, true] {
        let kit = kit();
        kit.block_on(async {
            let request = TestRequest::new("PUT", "/").with_body(Some(6)).expecting_continue();
            let accepted = begin(&kit, &request);
            if with_head {
                accepted.body.send("abc");
                assert_eq!(read_request(&accepted.peer.message().await).body, b"abc");
            } else {
                assert_eq!(read_request(&accepted.peer.message().await).body, b"");
                accepted.body.send("abc");
                assert_eq!(read_data(&accepted.peer.message().await), b"abc");
            }
            // A client that has begun sends the rest, and a service may want it after its answer.
            respond(&accepted, &response(200, &[], b"early"), true);
            assert_eq!(accepted.response.whole().await.unwrap().body, b"early");
            assert_eq!(accepted.running.ended(), None);
            accepted.body.send_last("def");
            let message = accepted.peer.message().await;
            assert_eq!((read_data(&message), message.end), (b"def".to_vec(), true));
            assert_eq!(accepted.running.outcome().await, WELL);
        });
    }
}

#[test]
fn an_early_answer_reaches_the_client_and_the_body_goes_on() {
    let kit = kit();
    kit.block_on(async {
        let accepted = begin(&kit, &TestRequest::new("POST", "/").with_body(None));
        accepted.peer.message().await;
        respond(&accepted, &response(200, &[], b"early"), true);
        assert_eq!(accepted.response.whole().await.unwrap().body, b"early");
        assert_eq!(accepted.running.ended(), None);
        accepted.body.send("abc");
        assert_eq!(read_data(&accepted.peer.message().await), b"abc");
        accepted.body.end();
        assert_eq!(accepted.running.outcome().await, WELL);
        assert!(accepted.peer.has_finished());
    });
}

#[test]
fn a_lost_client_resets_the_exchange() {
    let kit = kit();
    kit.block_on(async {
        let accepted = begin(&kit, &TestRequest::new("GET", "/"));
        accepted.peer.message().await;
        accepted.response.disconnect();
        assert_eq!(accepted.running.outcome().await, Outcome::Ended(failure::CLIENT_GONE));
        assert_eq!(accepted.peer.was_reset().unwrap().code, failure::CLIENT_GONE);
    });
}

#[test]
fn a_body_that_breaks_off_resets_the_exchange() {
    let kit = kit();
    kit.block_on(async {
        let accepted = begin(&kit, &TestRequest::new("POST", "/").with_body(None));
        accepted.peer.message().await;
        let reset = Reset { code: failure::CLIENT_GONE, protocol_code: Some(8) };
        accepted.body.fail(reset);
        assert_eq!(accepted.peer.reset_reason().await, reset);
    });
}

#[test]
fn a_reset_before_the_head_is_an_answer() {
    for (code, status) in [
        (failure::SERVICE_UNREACHABLE, 502),
        (failure::SERVICE_TIMEOUT, 504),
        (failure::TUNNEL_LOST, 502),
        (failure::OVERLOADED, 503),
        (failure::BAD_REQUEST, 400),
    ] {
        let kit = kit();
        kit.block_on(async {
            let accepted = begin(&kit, &TestRequest::new("GET", "/"));
            accepted.peer.message().await;
            accepted.peer.reset(Reset::new(code));
            let whole = accepted.response.whole().await.unwrap();
            assert_eq!(whole.head.status, status);
            assert_eq!(whole.head.header("x-sidelane-error"), Some(failure::name(code)));
            assert_eq!(accepted.running.outcome().await, Outcome::Ended(code));
        });
    }
}

#[test]
fn a_reset_after_the_head_is_an_abort() {
    let kit = kit();
    kit.block_on(async {
        let accepted = begin(&kit, &TestRequest::new("GET", "/"));
        accepted.peer.message().await;
        respond(&accepted, &response(200, &[], b"abc"), false);
        accepted.response.head().await.unwrap();
        kit.run_until_idle();
        accepted.peer.reset(Reset::new(failure::SERVICE_RESET));
        let outcome = accepted.running.outcome().await;
        assert_eq!(outcome, Outcome::Ended(failure::SERVICE_RESET));
        assert_eq!(accepted.response.was_aborted().unwrap().code, failure::SERVICE_RESET);
    });
}

#[test]
fn a_peer_that_speaks_nonsense_is_a_502() {
    let nonsense: [(u32, Vec<u8>, bool); 5] = [
        (wire::BODY, b"\x0a\x01a".to_vec(), false),
        (wire::RESPONSE, b"\x0a".to_vec(), true),
        (wire::RESPONSE, response(99, &[], b"").encode_to_vec(), true),
        (wire::RESPONSE, response(100, &[], b"").encode_to_vec(), true),
        (wire::REQUEST, Vec::new(), true),
    ];
    for (field, payload, end) in nonsense {
        let kit = kit();
        kit.block_on(async {
            let accepted = begin(&kit, &TestRequest::new("GET", "/"));
            accepted.peer.message().await;
            accepted.peer.send(field, payload, end);
            assert_eq!(accepted.response.whole().await.unwrap().head.status, 502);
        });
    }
}

#[test]
fn a_slow_client_holds_back_the_peer() {
    let kit = kit();
    kit.block_on(async {
        let accepted = begin(&kit, &TestRequest::new("GET", "/"));
        accepted.peer.message().await;
        accepted.response.set_room(0);
        respond(&accepted, &response(200, &[], b""), false);
        for _ in 0..4 {
            send_data(&accepted.peer, b"abc", false);
        }
        kit.run_until_idle();
        assert!(accepted.peer.untaken() >= 3, "taken without room for it");
        accepted.response.set_room(1);
        accepted.peer.finish();
        assert_eq!(accepted.response.whole().await.unwrap().body, b"abcabcabcabc");
    });
}

#[test]
fn head_is_answered_with_a_length_and_no_body() {
    let kit = kit();
    kit.block_on(async {
        let accepted = begin(&kit, &TestRequest::new("HEAD", "/"));
        accepted.peer.message().await;
        respond(&accepted, &response(200, &[("content-length", "42")], b""), true);
        let whole = accepted.response.whole().await.unwrap();
        assert_eq!(
            (whole.head.header("content-length"), whole.head.body_length),
            (Some("42"), None)
        );
        assert!(whole.head.end && whole.body.is_empty());
    });
}

#[test]
fn what_cannot_be_opened_is_refused_in_the_clients_terms() {
    let mut kit = kit();
    let told = TestFailure { retry_after_s: 7, ..TestFailure::new(failure::NO_SIDECAR) };
    kit.refuse_opens(told);
    kit.block_on(async {
        let text = kit.accept_http(&TestRequest::new("GET", "/")).response.whole().await.unwrap();
        assert_eq!((text.head.status, text.head.header("retry-after")), (503, Some("7")));
        assert_eq!(text.head.header("x-sidelane-error"), Some("no-sidecar"));
        assert_eq!(text.body, b"no-sidecar: test: no-sidecar\n");
        assert_eq!(text.head.body_length, Some(text.body.len() as u64));

        let request = TestRequest::new("GET", "/").header("accept", "application/json");
        let json = kit.accept_http(&request).response.whole().await.unwrap();
        assert_eq!(json.head.header("content-type"), Some("application/json"));
        let value: serde_json::Value = serde_json::from_slice(&json.body).unwrap();
        assert_eq!(value["error"], "no-sidecar");

        let head = kit.accept_http(&TestRequest::new("HEAD", "/")).response.whole().await.unwrap();
        assert_eq!((head.head.status, head.body.len()), (503, 0));
    });
}

#[test]
fn refuse_says_the_same() {
    let kit = kit();
    kit.block_on(async {
        let told = TestFailure::new(failure::NO_ROUTE);
        let refused = kit.refuse_http(&TestRequest::new("GET", "/"), &told);
        let whole = refused.response.whole().await.unwrap();
        assert_eq!((whole.head.status, &whole.body[..]), (404, &b"no-route: test: no-route\n"[..]));
    });
}

#[test]
fn connect_is_not_allowed() {
    let kit = kit();
    kit.block_on(async {
        let accepted = begin(&kit, &TestRequest::new("CONNECT", "example.com:443"));
        let whole = accepted.response.whole().await.unwrap();
        assert_eq!(whole.head.status, 405);
        assert!(whole.head.header("allow").unwrap().contains("GET"));
    });
}

#[test]
fn an_extended_connect_that_nobody_claims_is_not_implemented() {
    let kit = kit();
    kit.block_on(async {
        let mut request = TestRequest::new("CONNECT", "/").version(20);
        request.protocol = "connect-udp".to_owned();
        let whole = begin(&kit, &request).response.whole().await.unwrap();
        assert_eq!(whole.head.status, 501);
        assert_eq!(whole.head.header("x-sidelane-error"), Some("unsupported"));
    });
}

#[test]
fn every_request_is_claimed_as_a_fallback() {
    let kit = kit();
    for request in [TestRequest::new("GET", "/"), TestRequest::new("POST", "/").with_body(None)] {
        assert_eq!(kit.claims(&request), 1);
    }
}

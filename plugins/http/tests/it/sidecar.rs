//! The sidecar's end: what the service gets, and what goes back.

use std::time::Duration;

use prost::Message as _;
use serde_json::json;
use sidelane_plugin::{Reset, failure};
use sidelane_testkit::{Deliver, Kit, Outcome, TestService, TestStream};
use tokio::io::AsyncWriteExt as _;

use crate::wire::{
    self, HttpRequest, HttpTrailers, header, pairs, read_data, read_response, read_trailers,
    send_data, texts,
};
use crate::{kit, kit_with, meta, read_head, values};

const WELL: Outcome = Outcome::Ended(failure::NONE);

/// Has `request` delivered; the service's end of its connection, and the head that it got.
async fn begin(
    kit: &Kit,
    service: &TestService,
    request: &HttpRequest,
    end: bool,
) -> (Deliver, TestStream, String) {
    let delivery = kit.deliver(&meta(), service);
    request.send(&delivery.peer, end);
    let mut stream = service.accept().await;
    let head = read_head(&mut stream).await;
    (delivery, stream, head)
}

#[test]
fn a_request_reaches_the_service_as_it_was_sent() {
    let (kit, service) = (kit(), TestService::default());
    kit.block_on(async {
        let request = HttpRequest::new("GET", "/a%2Fb/../c;p?x=%zz&&y=?'{}|")
            .header("accept", "*/*")
            .header("x-twice", "1")
            .header("x-latin", b"caf\xe9")
            .header("x-twice", "2");
        let delivery = kit.deliver(&meta(), &service);
        request.send(&delivery.peer, true);
        let mut stream = service.accept().await;
        let head = stream.read_until(b"\r\n\r\n").await;
        let expected: &[u8] = b"GET /a%2Fb/../c;p?x=%zz&&y=?'{}| HTTP/1.1\r\n\
            host: test.localhost:9080\r\n\
            accept: */*\r\n\
            x-twice: 1\r\n\
            x-twice: 2\r\n\
            x-latin: caf\xe9\r\n\
            x-forwarded-for: 192.0.2.1\r\n\
            x-forwarded-proto: http\r\n\
            x-forwarded-host: test.localhost:9080\r\n\
            forwarded: for=192.0.2.1;host=\"test.localhost:9080\";proto=http\r\n\
            via: 1.1 sidelane\r\n\r\n";
        assert_eq!(String::from_utf8_lossy(&head), String::from_utf8_lossy(expected));
        assert!(delivery.peer.was_dispatched());
        stream.write(b"HTTP/1.1 204 No Content\r\n\r\n").await;
        assert_eq!(read_response(&delivery.peer.message().await).status, 204);
        assert_eq!(delivery.running.outcome().await, WELL);
    });
}

#[test]
fn what_the_client_says_of_itself_is_written_over() {
    let (kit, service) = (kit(), TestService::default());
    kit.block_on(async {
        let mut request = HttpRequest::new("GET", "/")
            .header("x-forwarded-for", "10.0.0.1")
            .header("x-forwarded-port", "1")
            .header("forwarded", "for=10.0.0.1")
            .header("via", "1.1 edge")
            .header("transfer-encoding", "chunked")
            .header("upgrade", "h2c")
            .header("connection", "x-hop")
            .header("x-hop", "1");
        request.version = 20;
        let (_delivery, _stream, head) = begin(&kit, &service, &request, true).await;
        assert_eq!(values(&head, "x-forwarded-for"), ["192.0.2.1"]);
        assert_eq!(values(&head, "forwarded").len(), 1);
        assert_eq!(values(&head, "via"), ["1.1 edge", "2.0 sidelane"]);
        for name in ["x-forwarded-port", "transfer-encoding", "upgrade", "connection", "x-hop"] {
            assert!(values(&head, name).is_empty(), "{name} in {head}");
        }
    });
}

#[test]
fn framing_follows_what_is_known_of_the_body() {
    let cases = [
        (HttpRequest::new("POST", "/"), true, None, None),
        (HttpRequest::new("POST", "/").header("content-length", "0"), true, Some("0"), None),
        (HttpRequest::new("POST", "/").body(Some(3), b"abc"), true, Some("3"), None),
        (HttpRequest::new("GET", "/").body(Some(3), b"abc"), true, Some("3"), None),
        (HttpRequest::new("PUT", "/").body(Some(9), b"abc"), false, Some("9"), None),
        (HttpRequest::new("PUT", "/").body(None, b"abc"), false, None, Some("chunked")),
        (HttpRequest::new("GET", "/").body(None, b""), false, None, Some("chunked")),
    ];
    for (request, end, length, coding) in cases {
        let (kit, service) = (kit(), TestService::default());
        kit.block_on(async {
            let (_delivery, _stream, head) = begin(&kit, &service, &request, end).await;
            assert_eq!(values(&head, "content-length").first().copied(), length, "{request:?}");
            assert_eq!(values(&head, "transfer-encoding").first().copied(), coding, "{request:?}");
        });
    }
}

#[test]
fn options_asterisk_passes() {
    let (kit, service) = (kit(), TestService::default());
    kit.block_on(async {
        let request = HttpRequest::new("OPTIONS", "*");
        let (_delivery, _stream, head) = begin(&kit, &service, &request, true).await;
        assert!(head.starts_with("OPTIONS * HTTP/1.1\r\n"), "{head}");
    });
}

#[test]
fn targets_that_would_change_are_refused_before_the_service_is_dialled() {
    for target in ["/a#b", "relative", "/a b"] {
        let (kit, service) = (kit(), TestService::default());
        kit.block_on(async {
            let delivery = kit.deliver(&meta(), &service);
            HttpRequest::new("GET", target).send(&delivery.peer, true);
            let outcome = delivery.running.outcome().await;
            assert_eq!(outcome, Outcome::Ended(failure::BAD_REQUEST), "{target}");
            assert_eq!(delivery.peer.was_refused(), Some(Reset::new(failure::BAD_REQUEST)));
            assert_eq!(service.connects(), 0);
        });
    }
}

#[test]
fn a_body_streams_to_the_service_chunk_by_chunk() {
    let (kit, service) = (kit(), TestService::default());
    kit.block_on(async {
        let request = HttpRequest::new("POST", "/").body(None, b"one");
        let (delivery, mut stream, _) = begin(&kit, &service, &request, false).await;
        assert_eq!(stream.read(8).await, b"3\r\none\r\n");
        send_data(&delivery.peer, b"two2", false);
        assert_eq!(stream.read(9).await, b"4\r\ntwo2\r\n");
        delivery.peer.finish();
        assert_eq!(stream.read(5).await, b"0\r\n\r\n");
        stream.write(b"HTTP/1.1 200 OK\r\ncontent-length: 0\r\n\r\n").await;
        let message = delivery.peer.message().await;
        assert!(message.end);
        assert_eq!(delivery.running.outcome().await, WELL);
    });
}

#[test]
fn announced_request_trailers_reach_the_service() {
    let (kit, service) = (kit(), TestService::default());
    kit.block_on(async {
        let request = HttpRequest::new("POST", "/")
            .header("trailer", "x-sum")
            .header("te", "gzip, trailers")
            .body(Some(3), b"abc");
        let (delivery, mut stream, head) = begin(&kit, &service, &request, false).await;
        assert_eq!(values(&head, "te"), ["trailers"]);
        assert_eq!(values(&head, "connection"), ["te"]);
        let trailers = HttpTrailers { headers: vec![header("x-sum", "6"), header("host", "evil")] };
        delivery.peer.send(wire::TRAILERS, trailers.encode_to_vec(), true);
        let rest = stream.read_until(b"\r\n\r\n").await;
        assert_eq!(rest, b"3\r\nabc\r\n0\r\nx-sum: 6\r\n\r\n");
    });
}

#[test]
fn a_body_of_the_wrong_length_ends_the_exchange() {
    let (kit, service) = (kit(), TestService::default());
    kit.block_on(async {
        let request = HttpRequest::new("POST", "/").body(Some(9), b"abc");
        let (delivery, mut stream, _) = begin(&kit, &service, &request, false).await;
        send_data(&delivery.peer, b"def", true);
        assert_eq!(delivery.peer.reset_reason().await.code, failure::BAD_REQUEST);
        stream.closed().await;
    });
}

#[test]
fn a_small_response_is_one_message() {
    let (kit, service) = (kit(), TestService::default());
    kit.block_on(async {
        let request = HttpRequest::new("GET", "/");
        let (delivery, mut stream, _) = begin(&kit, &service, &request, true).await;
        stream
            .write(
                b"HTTP/1.1 201 Created\r\nContent-Length: 2\r\nSet-Cookie: a=1\r\nKeep-Alive: timeout=5\r\n\
                  Connection: keep-alive, X-Hop\r\nX-Hop: 1\r\nSet-Cookie: b=2\r\nX-Latin: \xe9\r\n\r\nok",
            )
            .await;
        let message = delivery.peer.message().await;
        assert!(message.end);
        let response = read_response(&message);
        assert_eq!((response.status, response.content_length), (201, 3));
        assert_eq!(response.body, b"ok");
        assert_eq!(response.headers.last(), Some(&header("via", "1.1 sidelane")));
        assert!(response.headers.contains(&header("x-latin", b"\xe9")));
        let cookies: Vec<_> =
            response.headers.iter().filter(|header| header.name == b"set-cookie").collect();
        assert_eq!(cookies, [&header("set-cookie", "a=1"), &header("set-cookie", "b=2")]);
        assert_eq!(response.headers.len(), 4);
        assert_eq!(delivery.running.outcome().await, WELL);
    });
}

#[test]
fn events_pass_one_by_one() {
    let (kit, service) = (kit(), TestService::default());
    kit.block_on(async {
        let request = HttpRequest::new("GET", "/events");
        let (delivery, mut stream, _) = begin(&kit, &service, &request, true).await;
        stream
            .write(b"HTTP/1.1 200 OK\r\ncontent-type: text/event-stream\r\ntransfer-encoding: chunked\r\n\r\n")
            .await;
        let head = delivery.peer.message().await;
        assert!(!head.end);
        assert_eq!(read_response(&head).content_length, 0);
        for event in ["data: 1\n\n", "data: 2\n\n"] {
            stream.write(format!("{:x}\r\n{event}\r\n", event.len()).as_bytes()).await;
            let message = delivery.peer.message().await;
            assert_eq!((read_data(&message), message.end), (event.as_bytes().to_vec(), false));
        }
        stream.write(b"1\r\n.\r\n0\r\n\r\n").await;
        let last = delivery.peer.message().await;
        assert_eq!((read_data(&last), last.end), (b".".to_vec(), true));
        assert_eq!(delivery.running.outcome().await, WELL);
    });
}

#[test]
fn response_trailers_pass() {
    let (kit, service) = (kit(), TestService::default());
    kit.block_on(async {
        let request = HttpRequest::new("GET", "/");
        let (delivery, mut stream, _) = begin(&kit, &service, &request, true).await;
        stream
            .write(
                b"HTTP/1.1 200 OK\r\ntrailer: x-sum\r\ntransfer-encoding: chunked\r\n\r\n\
                  3\r\nabc\r\n0\r\nx-sum: 6\r\n\r\n",
            )
            .await;
        let head = delivery.peer.message().await;
        assert_eq!((read_response(&head).body, head.end), (b"abc".to_vec(), false));
        let last = delivery.peer.message().await;
        assert!(last.end);
        assert_eq!(read_trailers(&last), pairs(&[("x-sum", "6")]));
    });
}

#[test]
fn answers_without_a_body_keep_their_length() {
    for (method, status, line) in
        [("HEAD", 200, "200 OK"), ("GET", 304, "304 Not Modified"), ("HEAD", 404, "404 Not Found")]
    {
        let (kit, service) = (kit(), TestService::default());
        kit.block_on(async {
            let request = HttpRequest::new(method, "/");
            let (delivery, mut stream, _) = begin(&kit, &service, &request, true).await;
            stream.write(format!("HTTP/1.1 {line}\r\ncontent-length: 42\r\n\r\n").as_bytes()).await;
            let message = delivery.peer.message().await;
            let response = read_response(&message);
            assert!(message.end);
            assert_eq!((response.status, response.content_length), (status, 0));
            assert_eq!(
                texts(&response.headers),
                pairs(&[("content-length", "42"), ("via", "1.1 sidelane")])
            );
        });
    }
}

#[test]
fn a_body_until_the_connection_closes_passes() {
    let (kit, service) = (kit(), TestService::default());
    kit.block_on(async {
        let request = HttpRequest::new("GET", "/");
        let (delivery, mut stream, _) = begin(&kit, &service, &request, true).await;
        stream.write(b"HTTP/1.0 200 OK\r\n\r\nabc").await;
        assert_eq!(read_response(&delivery.peer.message().await).body, b"abc");
        drop(stream);
        assert!(delivery.peer.message().await.end);
        assert_eq!(delivery.running.outcome().await, WELL);
    });
}

#[test]
fn interim_responses_pass_before_the_final_one() {
    let (kit, service) = (kit(), TestService::default());
    kit.block_on(async {
        let request = HttpRequest::new("GET", "/");
        let (delivery, mut stream, _) = begin(&kit, &service, &request, true).await;
        stream
            .write(
                b"HTTP/1.1 102 Processing\r\n\r\nHTTP/1.1 103 Early Hints\r\nlink: </a>\r\n\r\n\
                  HTTP/1.1 200 OK\r\ncontent-length: 2\r\n\r\nok",
            )
            .await;
        assert_eq!(read_response(&delivery.peer.message().await).status, 102);
        let hints = read_response(&delivery.peer.message().await);
        assert_eq!((hints.status, texts(&hints.headers)), (103, pairs(&[("link", "</a>")])));
        let last = delivery.peer.message().await;
        assert_eq!((read_response(&last).body, last.end), (b"ok".to_vec(), true));
    });
}

#[test]
fn a_body_waits_for_the_services_continue() {
    let (kit, service) = (kit(), TestService::default());
    kit.block_on(async {
        let request = HttpRequest::new("PUT", "/").body(Some(3), b"").expecting_continue();
        let (delivery, mut stream, head) = begin(&kit, &service, &request, false).await;
        assert_eq!(values(&head, "expect"), ["100-continue"]);
        stream.write(b"HTTP/1.1 100 Continue\r\n\r\n").await;
        assert_eq!(read_response(&delivery.peer.message().await).status, 100);
        send_data(&delivery.peer, b"abc", true);
        assert_eq!(stream.read(3).await, b"abc");
        stream.write(b"HTTP/1.1 200 OK\r\ncontent-length: 0\r\n\r\n").await;
        assert!(delivery.peer.message().await.end);
        assert_eq!(delivery.running.outcome().await, WELL);
    });
}

#[test]
fn a_refused_expectation_passes_and_the_connection_is_not_kept() {
    let (kit, service) = (kit(), TestService::default());
    kit.block_on(async {
        let request = HttpRequest::new("PUT", "/").body(Some(3), b"").expecting_continue();
        let (delivery, mut stream, _) = begin(&kit, &service, &request, false).await;
        stream.write(b"HTTP/1.1 417 Expectation Failed\r\ncontent-length: 0\r\n\r\n").await;
        let message = delivery.peer.message().await;
        assert_eq!((read_response(&message).status, message.end), (417, true));
        // The relay does not send what was never asked for.
        delivery.peer.reset(Reset::new(failure::CANCELLED));
        stream.closed().await;
        assert_eq!(delivery.running.outcome().await, WELL);
    });
}

#[test]
fn a_body_that_comes_without_a_continue_is_sent_at_once() {
    let (kit, service) = (kit(), TestService::default());
    kit.block_on(async {
        let request = HttpRequest::new("PUT", "/").body(Some(3), b"").expecting_continue();
        let (delivery, mut stream, _) = begin(&kit, &service, &request, false).await;
        // Nobody says 100 in the service's place.
        kit.advance(Duration::from_secs(30));
        kit.run_until_idle();
        assert_eq!(delivery.peer.waiting(), 0);
        send_data(&delivery.peer, b"abc", true);
        assert_eq!(stream.read(3).await, b"abc");
        stream.write(b"HTTP/1.1 200 OK\r\ncontent-length: 0\r\n\r\n").await;
        assert_eq!(read_response(&delivery.peer.message().await).status, 200);
        assert_eq!(delivery.running.outcome().await, WELL);
    });
}

#[test]
fn a_service_that_answers_first_still_gets_the_body() {
    let (kit, service) = (kit(), TestService::default());
    kit.block_on(async {
        let request = HttpRequest::new("PUT", "/").body(Some(3), b"").expecting_continue();
        let (delivery, mut stream, _) = begin(&kit, &service, &request, false).await;
        stream.write(b"HTTP/1.1 200 OK\r\ncontent-length: 3\r\n\r\n").await;
        let message = delivery.peer.message().await;
        assert_eq!((read_response(&message).status, message.end), (200, false));
        send_data(&delivery.peer, b"abc", true);
        assert_eq!(stream.read(3).await, b"abc");
        stream.write(b"abc").await;
        assert_eq!(read_data(&delivery.peer.message().await), b"abc");
        assert_eq!(delivery.running.outcome().await, WELL);
    });
}

#[test]
fn a_service_without_an_answer_times_out() {
    let (kit, service) = (kit(), TestService::default());
    kit.block_on(async {
        let request = HttpRequest::new("GET", "/");
        let (delivery, mut stream, _) = begin(&kit, &service, &request, true).await;
        assert_eq!(delivery.peer.reset_reason().await.code, failure::SERVICE_TIMEOUT);
        stream.closed().await;
        assert_eq!(delivery.running.outcome().await, Outcome::Ended(failure::SERVICE_TIMEOUT));
    });
}

#[test]
fn a_slow_client_is_not_the_services_fault() {
    let (kit, service) = (kit(), TestService::default());
    kit.block_on(async {
        let request = HttpRequest::new("POST", "/").body(Some(6), b"abc");
        let (delivery, mut stream, _) = begin(&kit, &service, &request, false).await;
        assert_eq!(stream.read(3).await, b"abc");
        kit.advance(Duration::from_secs(300));
        assert_eq!(delivery.peer.was_reset(), None);
        send_data(&delivery.peer, b"def", true);
        assert_eq!(stream.read(3).await, b"def");
        // From here on the service is what is waited for.
        assert_eq!(delivery.peer.reset_reason().await.code, failure::SERVICE_TIMEOUT);
    });
}

#[test]
fn a_service_that_cannot_be_reached_was_never_dispatched_to() {
    let (kit, service) = (kit(), TestService::default());
    service.refuse();
    kit.block_on(async {
        let delivery = kit.deliver(&meta(), &service);
        HttpRequest::new("GET", "/").send(&delivery.peer, true);
        let outcome = delivery.running.outcome().await;
        assert_eq!(outcome, Outcome::Ended(failure::SERVICE_UNREACHABLE));
        assert_eq!(delivery.peer.was_refused().unwrap().code, failure::SERVICE_UNREACHABLE);
        assert!(!delivery.peer.was_dispatched());
    });
}

#[test]
fn invalid_responses_are_told_from_broken_ones() {
    let many = |count: usize| {
        let fields: String = (0..count).map(|number| format!("x-{number}: 1\r\n")).collect();
        format!("HTTP/1.1 204 No Content\r\n{fields}\r\n")
    };
    let head = |bytes: usize| {
        let line = "HTTP/1.1 204 No Content\r\nx-fill: \r\n\r\n";
        line.replace("fill: ", &format!("fill: {}", "a".repeat(bytes - line.len())))
    };
    let cases = [
        ("nonsense\r\n\r\n".to_owned(), Some(failure::SERVICE_INVALID)),
        (
            "HTTP/1.1 101 Switching Protocols\r\nupgrade: x\r\n\r\n".to_owned(),
            Some(failure::SERVICE_INVALID),
        ),
        (
            "HTTP/1.1 200 OK\r\ntransfer-encoding: gzip, chunked\r\n\r\n".to_owned(),
            Some(failure::SERVICE_INVALID),
        ),
        (
            "HTTP/1.1 200 OK\r\ncontent-length: 1\r\ncontent-length: 2\r\n\r\n".to_owned(),
            Some(failure::SERVICE_INVALID),
        ),
        (many(128), None),
        (many(129), Some(failure::SERVICE_INVALID)),
        (head(64 * 1024), None),
        (head(64 * 1024 + 1), Some(failure::SERVICE_INVALID)),
    ];
    for (text, expected) in cases {
        let (kit, service) = (kit(), TestService::default());
        kit.block_on(async {
            let request = HttpRequest::new("GET", "/");
            let (delivery, mut stream, _) = begin(&kit, &service, &request, true).await;
            // Where the head is too large the plugin stops reading.
            let _ = stream.write_all(text.as_bytes()).await;
            let label = &text[..text.len().min(60)];
            match (delivery.peer.next().await, expected) {
                (Some(Err(reset)), Some(code)) => assert_eq!(reset.code, code, "{label:?}"),
                (Some(Ok(message)), None) => assert!(message.end, "{label:?}"),
                (other, _) => panic!("{label:?} gave {other:?}"),
            }
        });
    }
}

#[test]
fn a_service_that_dies_in_mid_response_resets_the_exchange() {
    for head in ["content-length: 10", "transfer-encoding: chunked"] {
        let (kit, service) = (kit(), TestService::default());
        kit.block_on(async {
            let request = HttpRequest::new("GET", "/");
            let (delivery, mut stream, _) = begin(&kit, &service, &request, true).await;
            stream.write(format!("HTTP/1.1 200 OK\r\n{head}\r\n\r\n3\r\nabc").as_bytes()).await;
            assert_eq!(read_response(&delivery.peer.message().await).status, 200);
            drop(stream);
            assert_eq!(delivery.peer.reset_reason().await.code, failure::SERVICE_RESET);
        });
    }
}

#[test]
fn a_client_that_is_gone_ends_the_services_connection() {
    let (kit, service) = (kit(), TestService::default());
    kit.block_on(async {
        for written in [&b""[..], b"HTTP/1.1 200 OK\r\ncontent-length: 10\r\n\r\nabc"] {
            let request = HttpRequest::new("GET", "/");
            let (delivery, mut stream, _) = begin(&kit, &service, &request, true).await;
            stream.write(written).await;
            kit.run_until_idle();
            delivery.peer.reset(Reset::new(failure::CLIENT_GONE));
            stream.closed().await;
            assert_eq!(delivery.running.outcome().await, Outcome::Ended(failure::CLIENT_GONE));
        }
    });
}

#[test]
fn a_client_that_breaks_off_its_body_ends_the_services_connection() {
    let (kit, service) = (kit(), TestService::default());
    kit.block_on(async {
        let request = HttpRequest::new("POST", "/").body(None, b"abc");
        let (delivery, mut stream, _) = begin(&kit, &service, &request, false).await;
        delivery.peer.reset(Reset::new(failure::CLIENT_GONE));
        stream.closed().await;
        assert_eq!(delivery.running.outcome().await, Outcome::Ended(failure::CLIENT_GONE));
    });
}

#[test]
fn an_early_answer_does_not_end_the_request() {
    let (kit, service) = (kit(), TestService::default());
    kit.block_on(async {
        let request = HttpRequest::new("POST", "/").body(Some(6), b"abc");
        let (delivery, mut stream, _) = begin(&kit, &service, &request, false).await;
        stream.write(b"HTTP/1.1 200 OK\r\ncontent-length: 0\r\n\r\n").await;
        assert!(delivery.peer.message().await.end);
        send_data(&delivery.peer, b"def", true);
        assert_eq!(stream.read(6).await, b"abcdef");
        assert_eq!(delivery.running.outcome().await, WELL);
        // Request and response are through: the connection is kept.
        let next = kit.deliver(&meta(), &service);
        HttpRequest::new("GET", "/").send(&next.peer, true);
        read_head(&mut stream).await;
        assert_eq!(service.connects(), 1);
    });
}

#[test]
fn what_a_service_no_longer_wants_is_thrown_away() {
    let (kit, service) = (kit(), TestService::default());
    kit.block_on(async {
        let request = HttpRequest::new("POST", "/").body(None, b"abc");
        let (delivery, mut stream, _) = begin(&kit, &service, &request, false).await;
        stream
            .write(
                b"HTTP/1.1 413 Content Too Large\r\nconnection: close\r\ncontent-length: 0\r\n\r\n",
            )
            .await;
        drop(stream);
        let message = delivery.peer.message().await;
        assert_eq!((read_response(&message).status, message.end), (413, true));
        for _ in 0..20 {
            send_data(&delivery.peer, &[0; 30_000], false);
        }
        kit.run_until_idle();
        assert_eq!(delivery.peer.untaken(), 0);
        assert_eq!(delivery.peer.was_reset(), None);
        delivery.peer.finish();
        assert_eq!(delivery.running.outcome().await, WELL);
    });
}

#[test]
fn a_large_response_goes_in_bounded_messages_as_there_is_credit() {
    let (kit, service) = (kit(), TestService::default());
    kit.block_on(async {
        const LENGTH: usize = 4 * 1024 * 1024;
        let request = HttpRequest::new("GET", "/");
        let (delivery, mut stream, _) = begin(&kit, &service, &request, true).await;
        stream.set_room(usize::MAX);
        delivery.peer.set_window(0);
        stream
            .write(format!("HTTP/1.1 200 OK\r\ncontent-length: {LENGTH}\r\n\r\n").as_bytes())
            .await;
        kit.run_until_idle();
        delivery.peer.set_window(usize::MAX);
        let mut received = 0;
        loop {
            if received < LENGTH {
                stream.write(&vec![7; 100_000.min(LENGTH - received)]).await;
            }
            kit.run_until_idle();
            let mut end = false;
            while delivery.peer.waiting() > 0 {
                let message = delivery.peer.message().await;
                assert!(message.payload.len() <= sidelane_plugin::MESSAGE_BYTES_MAX);
                received += match message.field {
                    wire::RESPONSE => read_response(&message).body.len(),
                    _ => read_data(&message).len(),
                };
                end |= message.end;
            }
            if end {
                break;
            }
        }
        assert_eq!(received, LENGTH);
    });
}

/// Answers one request with an empty response that keeps the connection.
async fn answer(stream: &mut TestStream) {
    stream.write(b"HTTP/1.1 200 OK\r\ncontent-length: 0\r\n\r\n").await;
}

#[test]
fn connections_are_used_again() {
    let (kit, service) = (kit(), TestService::default());
    kit.block_on(async {
        let request = HttpRequest::new("GET", "/");
        let (delivery, mut stream, _) = begin(&kit, &service, &request, true).await;
        answer(&mut stream).await;
        assert_eq!(delivery.running.outcome().await, WELL);
        for _ in 0..3 {
            let delivery = kit.deliver(&meta(), &service);
            request.send(&delivery.peer, true);
            read_head(&mut stream).await;
            answer(&mut stream).await;
            assert!(delivery.peer.message().await.end);
            assert_eq!(delivery.running.outcome().await, WELL);
        }
        assert_eq!(service.connects(), 1);
        assert_eq!(kit.metric("http_connections_reused_total"), Some(3.0));
        assert_eq!(kit.metric("http_connections_idle"), Some(1.0));
    });
}

#[test]
fn a_service_of_http_1_0_is_dialled_for_each_request() {
    let (kit, service) = (kit(), TestService::default());
    kit.block_on(async {
        for count in 1..3 {
            let request = HttpRequest::new("GET", "/");
            let (delivery, mut stream, head) = begin(&kit, &service, &request, true).await;
            assert!(head.starts_with("GET / HTTP/1.1\r\n"));
            stream
                .write(b"HTTP/1.0 200 OK\r\nconnection: keep-alive\r\ncontent-length: 0\r\n\r\n")
                .await;
            assert_eq!(delivery.running.outcome().await, WELL);
            assert_eq!(service.connects(), count);
        }
    });
}

#[test]
fn a_request_on_a_connection_closed_before_is_sent_on_a_fresh_one() {
    let (kit, service) = (kit(), TestService::default());
    kit.block_on(async {
        let request = HttpRequest::new("POST", "/").body(Some(3), b"abc");
        let (delivery, mut stream, _) = begin(&kit, &service, &request, true).await;
        answer(&mut stream).await;
        assert_eq!(delivery.running.outcome().await, WELL);
        drop(stream);
        let (delivery, mut stream, _) = begin(&kit, &service, &request, true).await;
        assert_eq!(stream.read(3).await, b"abc");
        answer(&mut stream).await;
        assert!(delivery.peer.message().await.end);
        assert_eq!(service.connects(), 2);
        assert_eq!(kit.metric("http_requests_repeated_total"), Some(1.0));
    });
}

#[test]
fn only_what_cannot_have_been_processed_is_repeated() {
    for (request, answered, repeated) in [
        (HttpRequest::new("GET", "/"), &b""[..], true),
        (HttpRequest::new("PUT", "/").body(Some(3), b"abc"), b"", true),
        (HttpRequest::new("POST", "/").body(Some(3), b"abc"), b"", false),
        (HttpRequest::new("GET", "/"), b"HTTP/1.1 2", false),
    ] {
        let (kit, service) = (kit(), TestService::default());
        kit.block_on(async {
            let first = HttpRequest::new("GET", "/");
            let (delivery, mut stream, _) = begin(&kit, &service, &first, true).await;
            answer(&mut stream).await;
            assert_eq!(delivery.running.outcome().await, WELL);

            let delivery = kit.deliver(&meta(), &service);
            request.send(&delivery.peer, true);
            read_head(&mut stream).await;
            stream.write(answered).await;
            kit.run_until_idle();
            drop(stream);
            if repeated {
                let mut stream = service.accept().await;
                let head = read_head(&mut stream).await;
                assert!(head.starts_with(&request.method), "{head}");
                answer(&mut stream).await;
                assert!(delivery.peer.message().await.end);
            } else {
                assert_eq!(delivery.peer.reset_reason().await.code, failure::SERVICE_RESET);
                assert_eq!(service.connects(), 1);
            }
        });
    }
}

#[test]
fn a_fresh_connection_that_closes_is_not_repeated() {
    let (kit, service) = (kit(), TestService::default());
    kit.block_on(async {
        let request = HttpRequest::new("GET", "/");
        let (delivery, stream, _) = begin(&kit, &service, &request, true).await;
        drop(stream);
        assert_eq!(delivery.peer.reset_reason().await.code, failure::SERVICE_RESET);
        assert_eq!(service.connects(), 1);
    });
}

#[test]
fn unused_connections_end_by_time_version_drain_or_the_services_close() {
    let (kit, mut service) = (kit(), TestService::default());
    kit.block_on(async {
        let request = HttpRequest::new("GET", "/");
        for way in ["time", "version", "close", "drain"] {
            let (delivery, mut stream, _) = begin(&kit, &service, &request, true).await;
            answer(&mut stream).await;
            assert_eq!(delivery.running.outcome().await, WELL);
            assert_eq!(kit.metric("http_connections_idle"), Some(1.0), "{way}");
            match way {
                "time" => {
                    kit.advance(Duration::from_secs(54));
                    assert!(!stream.is_closed());
                    kit.advance(Duration::from_secs(7));
                }
                "close" => {
                    stream.shutdown().await;
                    kit.advance(Duration::from_secs(6));
                }
                "drain" => kit.drain(Duration::from_secs(1)),
                _ => {
                    service.version += 1;
                    let delivery = kit.deliver(&meta(), &service);
                    request.send(&delivery.peer, true);
                    let mut fresh = service.accept().await;
                    read_head(&mut fresh).await;
                    delivery.peer.reset(Reset::new(failure::CLIENT_GONE));
                    fresh.closed().await;
                }
            }
            assert!(stream.is_closed(), "{way}");
            assert_eq!(kit.metric("http_connections_idle"), Some(0.0), "{way}");
            assert_eq!(kit.metric("http_connections"), Some(0.0), "{way}");
        }
    });
}

#[test]
fn above_its_connections_the_sidecar_is_overloaded() {
    let config = json!({ "connections_max": 1, "idle_per_service": 1 });
    let (kit, service) = (kit_with(&config), TestService::default());
    kit.block_on(async {
        let request = HttpRequest::new("GET", "/");
        let (first, mut stream, _) = begin(&kit, &service, &request, true).await;
        let second = kit.deliver(&meta(), &service);
        request.send(&second.peer, true);
        assert_eq!(second.running.outcome().await, Outcome::Ended(failure::OVERLOADED));
        assert_eq!(second.peer.was_refused().unwrap().code, failure::OVERLOADED);
        answer(&mut stream).await;
        assert_eq!(first.running.outcome().await, WELL);

        // An unused connection makes room for another service's.
        let mut other = TestService::default();
        other.id = service.id + 1;
        let (_third, _stream, _) = begin(&kit, &other, &request, true).await;
        assert!(stream.is_closed());
    });
}

#[test]
fn a_cancelled_delivery_leaves_nothing() {
    let (kit, service) = (kit(), TestService::default());
    kit.block_on(async {
        let request = HttpRequest::new("POST", "/").body(None, b"abc");
        let (delivery, mut stream, _) = begin(&kit, &service, &request, false).await;
        delivery.running.cancel();
        stream.closed().await;
        assert_eq!(kit.metric("http_connections"), Some(0.0));
    });
}

/// The largest head that is taken, with a body behind it that would fill its message.
#[test]
fn a_large_head_passes_after_an_interim_response_too() {
    for interim in [false, true] {
        for fill in [20 * 1024, 40 * 1024, 64 * 1000] {
            let (kit, service) = (kit(), TestService::default());
            kit.block_on(async {
                let request = HttpRequest::new("GET", "/");
                let (delivery, mut stream, _) = begin(&kit, &service, &request, true).await;
                if interim {
                    stream.write(b"HTTP/1.1 103 Early Hints\r\n\r\n").await;
                    assert_eq!(read_response(&delivery.peer.message().await).status, 103);
                }
                let (fill, body) = ("a".repeat(fill), "b".repeat(40 * 1024));
                let head =
                    format!("HTTP/1.1 200 OK\r\nx-fill: {fill}\r\ncontent-length: {}", body.len());
                stream.write(format!("{head}\r\n\r\n{body}").as_bytes()).await;
                let mut received = 0;
                loop {
                    let message = delivery.peer.message().await;
                    assert!(message.payload.len() <= sidelane_plugin::OPEN_BYTES_MAX);
                    received += match message.field {
                        wire::RESPONSE => {
                            let response = read_response(&message);
                            assert_eq!(texts(&response.headers)[0].1, fill);
                            response.body.len()
                        }
                        _ => read_data(&message).len(),
                    };
                    if message.end {
                        break;
                    }
                }
                assert_eq!(received, body.len());
            });
        }
    }
}

#[test]
fn trailers_pass_up_to_the_size_of_a_head() {
    for (fill, fits) in [(40 * 1024, true), (64 * 1000, true), (70 * 1024, false)] {
        let (kit, service) = (kit(), TestService::default());
        kit.block_on(async {
            let request = HttpRequest::new("GET", "/");
            let (delivery, mut stream, _) = begin(&kit, &service, &request, true).await;
            let fill = "a".repeat(fill);
            let text = format!(
                "HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n1\r\na\r\n0\r\nx-fill: {fill}\r\n\r\n"
            );
            // Where they are too large the plugin stops reading.
            let _ = stream.write_all(text.as_bytes()).await;
            if !fits {
                loop {
                    match delivery.peer.next().await {
                        Some(Ok(message)) => assert!(!message.end),
                        Some(Err(reset)) => return assert_eq!(reset.code, failure::SERVICE_RESET),
                        None => panic!("ended well"),
                    }
                }
            }
            loop {
                let message = delivery.peer.message().await;
                if message.field == wire::TRAILERS {
                    assert!(message.end && message.payload.len() > fill.len());
                    return;
                }
                assert!(!message.end);
            }
        });
    }
}

#[test]
fn the_readme_names_the_metrics() {
    let kit = kit();
    let readme = include_str!("../../README.md");
    let names: Vec<&str> = readme
        .lines()
        .filter_map(|line| line.strip_prefix("| `http_")?.split_once('`'))
        .map(|(name, _)| name)
        .collect();
    assert_eq!(names.len(), 5);
    for name in names {
        assert!(kit.metric(&format!("http_{name}")).is_some(), "http_{name}");
    }
}

use std::io::Read as _;
use std::sync::Mutex;
use std::task::Waker;

use http::HeaderName;

use super::*;
use crate::config::policy::{Compression, HeaderChanges, Hsts, Policies, RouteLimits};
use crate::config::{Match, Route};
use crate::metrics::Metrics;

/// What a client gets. Has room for a chunk at every other poll.
#[derive(Default)]
struct Client {
    head: Option<ResponseHead>,
    body: Vec<u8>,
    is_full: bool,
    is_ended: bool,
    trailers: Option<HeaderMap>,
}

#[derive(Clone, Default)]
struct Fake(Arc<Mutex<Client>>);

impl Responder for Fake {
    fn informational(&mut self, _: StatusCode, _: HeaderMap) -> Result<(), Closed> {
        Ok(())
    }

    fn head(&mut self, head: ResponseHead, first: Option<Bytes>, end: bool) -> Result<(), Closed> {
        let mut client = self.0.lock().unwrap();
        client.head = Some(head);
        client.body.extend(first.unwrap_or_default());
        client.is_ended = end;
        Ok(())
    }

    fn poll_body(
        &mut self,
        _: &mut Context<'_>,
        chunk: &mut Option<Bytes>,
        end: bool,
    ) -> Poll<Result<(), Closed>> {
        let mut client = self.0.lock().unwrap();
        assert!(!client.is_ended, "nothing follows the end");
        client.is_full = !client.is_full;
        if client.is_full {
            return Poll::Pending;
        }
        client.body.extend(chunk.take().unwrap_or_default());
        client.is_ended = end;
        Poll::Ready(Ok(()))
    }

    fn finish(&mut self, trailers: Option<HeaderMap>) -> Result<(), Closed> {
        let mut client = self.0.lock().unwrap();
        client.is_ended = true;
        client.trailers = trailers;
        Ok(())
    }

    fn finish_behind(&mut self, last: Bytes, trailers: Option<HeaderMap>) -> Result<(), Closed> {
        self.0.lock().unwrap().body.extend(last);
        self.finish(trailers)
    }

    fn abort(&mut self, _: Reset) {}

    fn poll_closed(&mut self, _: &mut Context<'_>) -> Poll<Reset> {
        Poll::Pending
    }

    fn upgrade(&mut self) -> StreamFuture {
        Box::pin(std::future::pending())
    }
}

fn state(policies: Policies) -> Arc<RouteState> {
    let route = Arc::new(Route {
        name: "r".into(),
        tunnels: Vec::new(),
        matches: Match::default(),
        options: Default::default(),
        policies: Some(Arc::new(policies)),
    });
    Arc::new(RouteState::of(&route, None, &Arc::new(Metrics::new())).expect("policies"))
}

fn compressing() -> Arc<RouteState> {
    let compression = Some(Compression { level: 6, min_size: 10 });
    state(Policies { compression, ..Policies::default() })
}

fn request(fields: &[(&'static str, &'static str)]) -> RequestHead {
    let field = |(name, value): &(&'static str, &'static str)| {
        (HeaderName::from_static(name), HeaderValue::from_static(value))
    };
    RequestHead {
        method: http::Method::GET,
        scheme: "http".into(),
        authority: Bytes::from_static(b"r.localhost"),
        target: Bytes::from_static(b"/"),
        protocol: None,
        version: http::Version::HTTP_11,
        headers: fields.iter().map(field).collect(),
        end: true,
        expect_continue: false,
        can_upgrade: false,
    }
}

fn shaped(state: &Arc<RouteState>, head: &RequestHead) -> (Shaped<Fake>, Fake) {
    let client = Fake::default();
    let record = Arc::new(Arc::new(Metrics::new()).exchange("relay", &"HTTP".into()));
    let shaping = Shaping::new(state, head, &head.scheme);
    let responder = Shaped::new(client.clone(), &record).shape(shaping);
    (responder, client)
}

fn json(body_length: Option<u64>) -> ResponseHead {
    let headers = [("content-type", "application/json"), ("etag", "\"1\"")];
    ResponseHead { status: StatusCode::OK, headers: request(&headers).headers, body_length }
}

/// Sends a chunk as a plugin does: it comes again with what was left in place.
fn send(responder: &mut Shaped<Fake>, chunk: &'static str, end: bool) {
    let mut chunk = Some(Bytes::from_static(chunk.as_bytes()));
    let mut cx = Context::from_waker(Waker::noop());
    while responder.poll_body(&mut cx, &mut chunk, end).map(Result::unwrap).is_pending() {
        assert!(chunk.is_some(), "pending leaves it in place");
    }
    assert!(chunk.is_none());
}

fn unpacked(client: &Fake) -> String {
    let client = client.0.lock().unwrap();
    assert!(client.is_ended);
    let mut text = String::new();
    flate2::read::GzDecoder::new(&*client.body).read_to_string(&mut text).expect("gzip");
    text
}

#[test]
fn only_a_client_of_https_is_told_to_stay_with_it() {
    let table = [
        ("https", false, false, "max-age=60"),
        ("https", true, true, "max-age=60; includeSubDomains; preload"),
        ("http", true, true, ""),
    ];
    for (scheme, include_subdomains, preload, expected) in table {
        let max_age = std::time::Duration::from_secs(60);
        let hsts = Some(Hsts { max_age, include_subdomains, preload });
        let state = state(Policies { hsts, ..Policies::default() });
        let (mut responder, client) =
            shaped(&state, &RequestHead { scheme: scheme.into(), ..request(&[]) });
        let own = [("strict-transport-security", "max-age=1")];
        let head = ResponseHead { headers: request(&own).headers, ..json(None) };
        responder.head(head, None, true).unwrap();
        let client = client.0.lock().unwrap();
        let headers = &client.head.as_ref().unwrap().headers;
        let told: Vec<_> = headers.get_all(STRICT_TRANSPORT_SECURITY).iter().collect();
        let told: Vec<_> = told.iter().map(|value| value.to_str().unwrap()).collect();
        assert_eq!(told.join("|"), expected, "{scheme}");
    }
}

const GZIP: &[(&str, &str)] = &[("accept-encoding", "gzip")];

#[test]
fn a_body_is_compressed_chunk_by_chunk_however_it_ends() {
    let by_end: fn(&mut Shaped<Fake>) = |responder| send(responder, "three", true);
    let by_finish: fn(&mut Shaped<Fake>) = |responder| {
        send(responder, "three", false);
        responder.finish(None).unwrap();
    };
    let by_trailers: fn(&mut Shaped<Fake>) = |responder| {
        send(responder, "three", false);
        responder.finish(Some(HeaderMap::new())).unwrap();
    };
    let abandoned: fn(&mut Shaped<Fake>) = |responder| {
        let mut chunk = Some(Bytes::from_static(b"three"));
        let mut cx = Context::from_waker(Waker::noop());
        let polled = responder.poll_body(&mut cx, &mut chunk, false);
        assert!(polled.is_pending(), "no room");
        responder.finish(None).unwrap();
    };
    for end in [by_end, by_finish, by_trailers, abandoned] {
        let (mut responder, client) = shaped(&compressing(), &request(GZIP));
        let first = Some(Bytes::from_static(b"one "));
        responder.head(json(None), first, false).unwrap();
        send(&mut responder, "two ", false);
        end(&mut responder);
        assert_eq!(unpacked(&client), "one two three");
        let client = client.0.lock().unwrap();
        let head = client.head.as_ref().expect("a head");
        assert_eq!(head.headers["content-encoding"], "gzip");
        assert_eq!(head.headers["etag"], "W/\"1\"");
        assert_eq!(head.body_length, None);
    }
}

#[test]
fn a_whole_body_has_its_length_once_it_is_compressed() {
    let (mut responder, client) = shaped(&compressing(), &request(GZIP));
    let whole = Bytes::from("whole ".repeat(100));
    responder.head(json(None), Some(whole.clone()), true).unwrap();
    assert_eq!(unpacked(&client).as_bytes(), whole);
    let client = client.0.lock().unwrap();
    let head = client.head.as_ref().expect("a head");
    assert_eq!(head.body_length, Some(client.body.len() as u64));
    assert!(client.body.len() < whole.len());
}

#[test]
fn other_responses_pass_as_they_are() {
    let table = [
        ("the client does not take it", request(&[]), Some(500), true),
        ("too small", request(GZIP), Some(9), false),
        ("an upgrade", RequestHead { can_upgrade: true, ..request(GZIP) }, Some(500), false),
    ];
    assert!(!table.is_empty());
    for (name, head, length, varies) in table {
        let (mut responder, client) = shaped(&compressing(), &head);
        responder.head(json(length), Some(Bytes::from_static(b"one ")), false).unwrap();
        send(&mut responder, "two", true);
        let client = client.0.lock().unwrap();
        assert_eq!(client.body, b"one two", "{name}");
        let head = client.head.as_ref().expect("a head");
        assert_eq!(head.body_length, length, "{name}");
        assert_eq!(head.headers["etag"], "\"1\"", "{name}");
        assert_eq!(head.headers.contains_key("vary"), varies, "{name}");
    }
}

#[test]
fn the_answer_to_head_has_the_fields_that_get_has() {
    let head = |fields| RequestHead { method: http::Method::HEAD, ..request(fields) };
    let none: &[(&str, &str)] = &[];
    for (fields, length, is_packed, varies) in
        [(GZIP, "500", true, true), (GZIP, "9", false, false), (none, "500", false, true)]
    {
        let (mut responder, client) = shaped(&compressing(), &head(fields));
        let mut answer = json(None);
        answer.headers.insert(CONTENT_LENGTH, HeaderValue::from_static(length));
        responder.head(answer, None, true).unwrap();
        let client = client.0.lock().unwrap();
        assert!(client.body.is_empty());
        let headers = &client.head.as_ref().expect("a head").headers;
        assert_eq!(headers.contains_key("content-encoding"), is_packed, "{fields:?} {length}");
        assert_eq!(headers.contains_key(CONTENT_LENGTH), !is_packed, "{fields:?} {length}");
        assert_eq!(headers.contains_key("vary"), varies, "{fields:?} {length}");
    }
}

#[test]
fn fields_of_a_response_change() {
    let response_headers = HeaderChanges {
        set: vec![(HeaderName::from_static("x-env"), HeaderValue::from_static("prod"))],
        add: Vec::new(),
        remove: vec![HeaderName::from_static("etag")],
    };
    let state = state(Policies { response_headers, ..Policies::default() });
    let (mut responder, client) = shaped(&state, &request(&[]));
    responder.head(json(None), None, true).unwrap();
    let client = client.0.lock().unwrap();
    let headers = &client.head.as_ref().expect("a head").headers;
    assert_eq!(headers["x-env"], "prod");
    assert!(!headers.contains_key("etag"));
}

struct Chunks(Vec<usize>);

impl Body for Chunks {
    fn length(&self) -> Option<u64> {
        None
    }

    fn poll_frame(&mut self, _: &mut Context<'_>) -> Poll<BodyFrame> {
        Poll::Ready(match self.0.pop() {
            Some(length) => BodyFrame::Data { bytes: vec![0; length].into(), end: false },
            None => BodyFrame::End,
        })
    }
}

#[test]
fn a_body_fails_where_it_becomes_too_long() {
    let table: &[(Option<u64>, &[usize], usize, bool)] = &[
        (Some(10), &[5, 5], 2, false),
        (Some(10), &[6, 5], 1, true),
        (Some(0), &[1], 0, true),
        (Some(0), &[], 0, false),
        (None, &[1000, 1000], 2, false),
    ];
    assert!(!table.is_empty());
    let mut cx = Context::from_waker(Waker::noop());
    for (limit, chunks, passed, fails) in table {
        let limits = RouteLimits { body: *limit, ..RouteLimits::default() };
        let state = state(Policies { limits, ..Policies::default() });
        let chunks = Chunks(chunks.iter().rev().copied().collect());
        let mut body = LimitedBody::new(chunks, &state);
        for _ in 0..*passed {
            let frame = body.poll_frame(&mut cx);
            assert!(matches!(frame, Poll::Ready(BodyFrame::Data { .. })), "{limit:?}");
        }
        for _ in 0..2 {
            match body.poll_frame(&mut cx) {
                Poll::Ready(BodyFrame::Failed(reset)) => {
                    assert!(*fails && reset.code == failure::TOO_LARGE, "{limit:?}");
                }
                Poll::Ready(BodyFrame::End) => assert!(!fails, "{limit:?}"),
                other => panic!("{limit:?}: {other:?}"),
            }
        }
    }
}

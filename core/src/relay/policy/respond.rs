//! The ends of an exchange at the client's side as a route's policies shape them: the response with its
//! changed fields and its compression, the request's body with its limit.
//!
//! One type for all routes: one without policies looks at an empty place and goes on.

use std::sync::Arc;
use std::task::{Context, Poll, ready};

use bytes::{Bytes, BytesMut};
use http::header::{CONTENT_LENGTH, STRICT_TRANSPORT_SECURITY, WWW_AUTHENTICATE};
use http::{HeaderMap, HeaderValue, StatusCode};
use sidelane_abi::failure;

use super::compress::{self, Choice, Gzip};
use super::{Refusal, RouteState, change};
use crate::metrics::Record;
use crate::plugin::lend::{
    Body, BodyFrame, Closed, RequestHead, Reset, Responder, ResponseHead, StreamFuture,
};

/// A responder that counts what it answers and shapes it as a route says.
pub(in crate::relay) struct Shaped<R> {
    inner: R,
    record: Arc<Record>,
    shaping: Option<Box<Shaping>>,
}

/// What a route changes in a response.
pub(in crate::relay) struct Shaping {
    state: Arc<RouteState>,
    is_head: bool,
    /// The response may be compressed, and whether the client takes it.
    takes_gzip: Option<bool>,
    /// Said with a 401 of ours.
    challenge: Option<HeaderValue>,
    /// The client came by `https`, to this relay or to a proxy that it trusts.
    is_https: bool,
    gzip: Option<Gzip>,
    /// A chunk that the client's connection had no room for yet.
    waiting: Option<Waiting>,
}

/// The compressed form of a chunk that its owner still has: it comes again with it.
struct Waiting {
    bytes: Option<Bytes>,
    /// Place and length of the chunk.
    of: (usize, usize),
    end: bool,
}

impl Shaping {
    /// What a route changes in the response to a request, which came by `scheme`.
    pub(in crate::relay) fn new(
        state: &Arc<RouteState>,
        head: &RequestHead,
        scheme: &str,
    ) -> Box<Self> {
        // What becomes a byte stream has no body.
        let may_compress = state.policies.compression.is_some() && !head.can_upgrade;
        Box::new(Self {
            state: Arc::clone(state),
            is_head: head.method == http::Method::HEAD,
            takes_gzip: may_compress.then(|| compress::accepts_gzip(&head.headers)),
            challenge: None,
            is_https: scheme == "https",
            gzip: None,
            waiting: None,
        })
    }

    /// Asks the client who it is where the answer is a 401.
    pub(in crate::relay) fn challenge(
        mut self: Box<Self>,
        challenge: Option<HeaderValue>,
    ) -> Box<Self> {
        self.challenge = challenge;
        self
    }

    fn head(&mut self, head: &mut ResponseHead, first: &mut Option<Bytes>, end: bool) {
        if head.status == StatusCode::UNAUTHORIZED
            && let Some(challenge) = self.challenge.take()
        {
            head.headers.insert(WWW_AUTHENTICATE, challenge);
        }
        self.compress(head, first, end);
        change(&mut head.headers, &self.state.policies.response_headers);
        if let Some(hsts) = &self.state.hsts {
            // RFC 6797 §7.2: not a word of it without TLS, the service's own included.
            if self.is_https {
                head.headers.insert(STRICT_TRANSPORT_SECURITY, hsts.clone());
            } else {
                head.headers.remove(STRICT_TRANSPORT_SECURITY);
            }
        }
    }

    fn compress(&mut self, head: &mut ResponseHead, first: &mut Option<Bytes>, end: bool) {
        let (Some(takes_gzip), Some(config)) = (self.takes_gzip, &self.state.policies.compression)
        else {
            return;
        };
        let said = || {
            let value = head.headers.get(CONTENT_LENGTH)?;
            value.to_str().ok()?.parse().ok()
        };
        let known = head.body_length.or_else(|| match self.is_head {
            true => said(),
            false => end.then(|| first.as_ref().map_or(0, |first| first.len() as u64)),
        });
        let choice = compress::choose(config, takes_gzip, head.status, &head.headers, known);
        if choice == Choice::Never {
            return;
        }
        compress::vary(&mut head.headers);
        if choice == Choice::Other {
            return;
        }
        if self.is_head {
            // What GET gets has these fields, and another length (RFC 9110 §8.6, §9.3.2).
            compress::mark(&mut head.headers);
            head.body_length = None;
            return;
        }
        let Some(mut gzip) = Gzip::begin(config) else {
            self.state.metrics.uncompressed();
            return;
        };
        compress::mark(&mut head.headers);
        head.body_length = None;
        if end {
            let plain = first.take().unwrap_or_default();
            let packed = gzip.end(&plain);
            self.state.metrics.compressed(plain.len(), packed.len());
            head.body_length = Some(packed.len() as u64);
            *first = Some(packed);
            return;
        }
        if let Some(plain) = first {
            let packed = gzip.chunk(plain);
            self.state.metrics.compressed(plain.len(), packed.len());
            *plain = packed;
        }
        self.gzip = Some(gzip);
    }

    /// Returns the compressed form of the chunk at hand, the same one until it was taken.
    fn pack(&mut self, chunk: &[u8], end: bool) {
        let Some(mut gzip) = self.gzip.take() else { return };
        let packed = if end {
            gzip.end(chunk)
        } else {
            let packed = gzip.chunk(chunk);
            self.gzip = Some(gzip);
            packed
        };
        self.state.metrics.compressed(chunk.len(), packed.len());
        self.waiting = Some(Waiting { bytes: Some(packed), of: place(chunk), end });
    }

    /// Sends a chunk compressed. `Pending` leaves it with its owner, who comes again with it.
    fn poll_body<R: Responder>(
        &mut self,
        inner: &mut R,
        cx: &mut Context<'_>,
        chunk: &mut Option<Bytes>,
        end: bool,
    ) -> Poll<Result<(), Closed>> {
        let given = chunk.as_deref().unwrap_or_default();
        if let Some(waiting) = &mut self.waiting {
            let is_same = waiting.of == place(given) && waiting.end == end;
            ready!(inner.poll_body(cx, &mut waiting.bytes, waiting.end))?;
            self.waiting = None;
            if is_same {
                *chunk = None;
                return Poll::Ready(Ok(()));
            }
        }
        if given.is_empty() && !end {
            *chunk = None;
            return Poll::Ready(Ok(()));
        }
        self.pack(given, end);
        let Some(waiting) = &mut self.waiting else { return Poll::Ready(Err(Closed)) };
        ready!(inner.poll_body(cx, &mut waiting.bytes, waiting.end))?;
        self.waiting = None;
        *chunk = None;
        Poll::Ready(Ok(()))
    }

    /// Returns what is left to be sent behind all that was.
    fn rest(&mut self) -> Option<Bytes> {
        let waiting = self.waiting.take().and_then(|waiting| waiting.bytes);
        let end = self.gzip.take().map(|gzip| gzip.end(&[]));
        match (waiting, end) {
            (Some(waiting), Some(end)) => {
                let mut rest = BytesMut::from(&*waiting);
                rest.extend_from_slice(&end);
                Some(rest.freeze())
            }
            (waiting, end) => waiting.or(end),
        }
    }
}

fn place(chunk: &[u8]) -> (usize, usize) {
    (chunk.as_ptr().addr(), chunk.len())
}

impl<R> Shaped<R> {
    /// Returns a responder that counts.
    pub(in crate::relay) fn new(inner: R, record: &Arc<Record>) -> Self {
        Self { inner, record: Arc::clone(record), shaping: None }
    }

    /// Shapes the response.
    pub(in crate::relay) fn shape(self, shaping: Box<Shaping>) -> Self {
        Self { shaping: Some(shaping), ..self }
    }
}

impl<R: Responder> Responder for Shaped<R> {
    fn informational(&mut self, status: StatusCode, headers: HeaderMap) -> Result<(), Closed> {
        self.inner.informational(status, headers)
    }

    fn head(
        &mut self,
        mut head: ResponseHead,
        mut first: Option<Bytes>,
        end: bool,
    ) -> Result<(), Closed> {
        let status = head.status;
        if let Some(shaping) = &mut self.shaping {
            shaping.head(&mut head, &mut first, end);
        }
        self.inner.head(head, first, end)?;
        self.record.answered(status);
        Ok(())
    }

    fn poll_body(
        &mut self,
        cx: &mut Context<'_>,
        chunk: &mut Option<Bytes>,
        end: bool,
    ) -> Poll<Result<(), Closed>> {
        match &mut self.shaping {
            Some(shaping) if shaping.gzip.is_some() || shaping.waiting.is_some() => {
                shaping.poll_body(&mut self.inner, cx, chunk, end)
            }
            _ => self.inner.poll_body(cx, chunk, end),
        }
    }

    fn finish(&mut self, trailers: Option<HeaderMap>) -> Result<(), Closed> {
        match self.shaping.as_mut().and_then(|shaping| shaping.rest()) {
            Some(rest) => self.inner.finish_behind(rest, trailers),
            None => self.inner.finish(trailers),
        }
    }

    fn finish_behind(&mut self, last: Bytes, trailers: Option<HeaderMap>) -> Result<(), Closed> {
        self.inner.finish_behind(last, trailers)
    }

    fn abort(&mut self, reset: Reset) {
        self.inner.abort(reset);
    }

    fn poll_closed(&mut self, cx: &mut Context<'_>) -> Poll<Reset> {
        self.inner.poll_closed(cx)
    }

    fn upgrade(&mut self) -> StreamFuture {
        self.inner.upgrade()
    }
}

/// A request's body that may be no longer than its route allows.
pub(in crate::relay) struct LimitedBody<B> {
    inner: B,
    state: Arc<RouteState>,
    /// Bytes that may still come; `None`: any number.
    left: Option<u64>,
    is_over: bool,
}

impl<B: Body> LimitedBody<B> {
    /// Limits a body to what the route allows.
    pub(in crate::relay) fn new(inner: B, state: &Arc<RouteState>) -> Self {
        let left = state.policies.limits.body;
        Self { inner, state: Arc::clone(state), left, is_over: false }
    }
}

impl<B: Body> Body for LimitedBody<B> {
    fn length(&self) -> Option<u64> {
        self.inner.length()
    }

    fn poll_frame(&mut self, cx: &mut Context<'_>) -> Poll<BodyFrame> {
        const TOO_LARGE: Reset = Reset { code: failure::TOO_LARGE, protocol_code: None };
        if self.is_over {
            return Poll::Ready(BodyFrame::Failed(TOO_LARGE));
        }
        let frame = ready!(self.inner.poll_frame(cx));
        if let (BodyFrame::Data { bytes, .. }, Some(left)) = (&frame, &mut self.left) {
            match left.checked_sub(bytes.len() as u64) {
                Some(less) => *left = less,
                None => {
                    self.is_over = true;
                    self.state.refused(Refusal::too_large(), None);
                    return Poll::Ready(BodyFrame::Failed(TOO_LARGE));
                }
            }
        }
        Poll::Ready(frame)
    }
}

#[cfg(test)]
mod tests {
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

        fn head(
            &mut self,
            head: ResponseHead,
            first: Option<Bytes>,
            end: bool,
        ) -> Result<(), Closed> {
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

        fn finish_behind(
            &mut self,
            last: Bytes,
            trailers: Option<HeaderMap>,
        ) -> Result<(), Closed> {
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
}

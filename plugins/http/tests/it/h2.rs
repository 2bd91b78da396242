//! Services that speak HTTP/2.

use std::collections::VecDeque;
use std::future::{Future, poll_fn};
use std::pin::pin;
use std::task::{Context, Poll};

use bytes::Bytes;
use h2::server::{self, SendResponse};
use h2::{Reason, RecvStream};
use http::{HeaderMap, HeaderValue, Request, Response};
use sidelane_plugin::{HttpVersion, Reset, ServiceSettings, failure};
use sidelane_testkit::{Kit, Outcome, TestService, TestStream};

use crate::wire::{HttpRequest, pairs, read_data, read_response, read_trailers, send_data, texts};
use crate::{kit, meta};

const WELL: Outcome = Outcome::Ended(failure::NONE);

fn service() -> TestService {
    let mut service = TestService::default();
    service.settings =
        ServiceSettings { http_version: HttpVersion::Http2, ..ServiceSettings::default() };
    service
}

pub(crate) type Incoming = (Request<RecvStream>, SendResponse<Bytes>);

/// One connection to the service.
pub(crate) struct Served {
    connection: server::Connection<TestStream, Bytes>,
    waiting: VecDeque<Incoming>,
}

impl Served {
    pub(crate) async fn accept(service: &TestService) -> Self {
        let stream = service.accept().await;
        let connection = server::handshake(stream).await.expect("a client's preface");
        Self { connection, waiting: VecDeque::new() }
    }

    /// Drives the connection until `future` is done.
    pub(crate) async fn drive<F: Future>(&mut self, future: F) -> F::Output {
        let mut future = pin!(future);
        poll_fn(|cx| {
            if let Poll::Ready(output) = future.as_mut().poll(cx) {
                return Poll::Ready(output);
            }
            self.poll(cx);
            future.as_mut().poll(cx)
        })
        .await
    }

    fn poll(&mut self, cx: &mut Context<'_>) {
        while let Poll::Ready(Some(Ok(incoming))) = self.connection.poll_accept(cx) {
            self.waiting.push_back(incoming);
        }
    }

    /// Waits until the client has closed it.
    async fn closed(&mut self) {
        poll_fn(|cx| {
            loop {
                match self.connection.poll_accept(cx) {
                    Poll::Ready(Some(Ok(_))) => {}
                    Poll::Ready(Some(Err(_)) | None) => return Poll::Ready(()),
                    Poll::Pending => return Poll::Pending,
                }
            }
        })
        .await;
    }

    pub(crate) async fn request(&mut self) -> Incoming {
        poll_fn(|cx| {
            self.poll(cx);
            self.waiting.pop_front().map_or(Poll::Pending, Poll::Ready)
        })
        .await
    }
}

/// All of a request's body, and its trailers.
async fn body(stream: &mut RecvStream) -> (Vec<u8>, Option<HeaderMap>) {
    let mut all = Vec::new();
    while let Some(data) = stream.data().await {
        let data = data.expect("the body goes on");
        stream.flow_control().release_capacity(data.len()).expect("as much as came");
        all.extend_from_slice(&data);
    }
    (all, stream.trailers().await.expect("the body ends"))
}

pub(crate) fn respond(response: &mut SendResponse<Bytes>, status: u16) {
    let head = Response::builder().status(status).body(()).expect("a head");
    response.send_response(head, true).expect("the stream is open");
}

pub(crate) fn deliver(
    kit: &Kit,
    service: &TestService,
    request: &HttpRequest,
    end: bool,
) -> sidelane_testkit::Deliver {
    let delivery = kit.deliver(&meta(), service);
    request.send(&delivery.peer, end);
    delivery
}

#[test]
fn a_request_and_its_response_pass_with_their_trailers() {
    let (kit, service) = (kit(), service());
    kit.block_on(async {
        let request = HttpRequest::new("POST", "/a?b")
            .header("x-a", "1")
            .header("te", "trailers")
            .header("connection", "x-hop")
            .header("x-hop", "1")
            .header("trailer", "x-sum")
            .body(None, b"abc");
        let delivery = deliver(&kit, &service, &request, false);
        let mut served = Served::accept(&service).await;
        let (mut got, mut response) = served.request().await;
        assert_eq!(got.uri(), "http://test.localhost:9080/a?b");
        let field = |name: &str| got.headers().get(name).map(|value| value.to_str().unwrap());
        assert_eq!((field("x-a"), field("te")), (Some("1"), Some("trailers")));
        assert_eq!(
            (field("x-forwarded-for"), field("via")),
            (Some("192.0.2.1"), Some("1.1 sidelane"))
        );
        for name in ["host", "connection", "x-hop", "transfer-encoding"] {
            assert_eq!(field(name), None, "{name}");
        }
        send_data(&delivery.peer, b"def", false);
        let trailers =
            crate::wire::HttpTrailers { headers: vec![crate::wire::header("x-sum", "6")] };
        let payload = prost::Message::encode_to_vec(&trailers);
        delivery.peer.send(crate::wire::TRAILERS, payload, true);
        let (all, sent) = served.drive(body(got.body_mut())).await;
        assert_eq!(all, b"abcdef");
        assert_eq!(sent.expect("trailers")["x-sum"], "6");

        let hints = Response::builder().status(103).header("link", "</a>").body(()).unwrap();
        response.send_informational(hints).expect("the stream is open");
        let hints = read_response(&served.drive(delivery.peer.message()).await);
        assert_eq!((hints.status, texts(&hints.headers)), (103, pairs(&[("link", "</a>")])));
        let head = Response::builder().status(201).header("x-b", "2").body(()).unwrap();
        let mut stream = response.send_response(head, false).expect("the stream is open");
        stream.send_data(Bytes::from_static(b"ok"), false).expect("the stream is open");
        let first = served.drive(delivery.peer.message()).await;
        let read = read_response(&first);
        assert_eq!((read.status, first.end), (201, false));
        assert_eq!(texts(&read.headers), pairs(&[("x-b", "2"), ("via", "2.0 sidelane")]));
        let mut fields = HeaderMap::new();
        fields.insert("x-end", HeaderValue::from_static("1"));
        stream.send_trailers(fields).expect("the stream is open");
        let mut data = read.body;
        let mut message = served.drive(delivery.peer.message()).await;
        while !message.end {
            data.extend(read_data(&message));
            message = served.drive(delivery.peer.message()).await;
        }
        assert_eq!(data, b"ok");
        assert_eq!(read_trailers(&message), pairs(&[("x-end", "1")]));
        assert_eq!(served.drive(delivery.running.outcome()).await, WELL);
    });
}

#[test]
fn requests_share_a_connection_and_say_their_length() {
    let (kit, service) = (kit(), service());
    kit.block_on(async {
        let request = HttpRequest::new("PUT", "/").body(Some(3), b"abc");
        let first = deliver(&kit, &service, &request, true);
        let mut served = Served::accept(&service).await;
        let (mut one, mut first_response) = served.request().await;
        let second = deliver(&kit, &service, &HttpRequest::new("GET", "/"), true);
        let (two, mut second_response) = served.request().await;
        assert_eq!(one.headers()["content-length"], "3");
        assert_eq!(served.drive(body(one.body_mut())).await.0, b"abc");
        assert!(two.body().is_end_stream());
        respond(&mut second_response, 204);
        assert!(served.drive(second.peer.message()).await.end);
        respond(&mut first_response, 204);
        assert!(served.drive(first.peer.message()).await.end);
        assert_eq!(served.drive(second.running.outcome()).await, WELL);
        assert_eq!(served.drive(first.running.outcome()).await, WELL);
        assert_eq!(service.connects(), 1);
        assert_eq!(kit.metric("http2_streams"), Some(0.0));
    });
}

#[test]
fn what_a_service_refused_is_sent_again() {
    // Retries allowed, refusals, tries until the end.
    for (retries, refusals, tries) in [(0, 1, 2), (0, 9, 2), (2, 3, 4), (2, 9, 4)] {
        let kit = kit();
        let service = service().with_retries(retries, 9);
        kit.block_on(async {
            let request = HttpRequest::new("POST", "/").body(Some(3), b"abc");
            let delivery = deliver(&kit, &service, &request, true);
            for tried in 0..tries {
                let mut served = Served::accept(&service).await;
                let (_request, mut response) = served.request().await;
                if tried < refusals {
                    // The next goes beside a connection that refuses, and this one takes no more.
                    served.connection.graceful_shutdown();
                    response.send_reset(Reason::REFUSED_STREAM);
                } else {
                    respond(&mut response, 204);
                    served.drive(delivery.peer.message()).await;
                    continue;
                }
                served.closed().await;
            }
            let outcome = delivery.running.outcome().await;
            let is_well = refusals < tries;
            let expected = if is_well { WELL } else { Outcome::Ended(failure::SERVICE_RESET) };
            assert_eq!(outcome, expected, "{retries} {refusals}");
        });
    }
}

#[test]
fn a_stream_that_breaks_is_sent_again_only_where_that_does_no_harm() {
    for (method, retries, tries) in [("GET", 1, 2), ("GET", 0, 1), ("POST", 1, 1)] {
        let kit = kit();
        let service = service().with_retries(retries, 9);
        kit.block_on(async {
            let delivery = deliver(&kit, &service, &HttpRequest::new(method, "/"), true);
            for _ in 0..tries {
                let mut served = Served::accept(&service).await;
                drop(served.request().await);
                drop(served);
            }
            let outcome = delivery.running.outcome().await;
            assert_eq!(outcome, Outcome::Ended(failure::SERVICE_RESET), "{method} {retries}");
        });
        assert_eq!(service.connects(), tries, "{method} {retries}");
    }
}

#[test]
fn a_client_that_leaves_resets_the_stream_by_its_code() {
    let (kit, service) = (kit(), service());
    kit.block_on(async {
        let delivery = deliver(&kit, &service, &HttpRequest::new("GET", "/"), true);
        let mut served = Served::accept(&service).await;
        let (_request, mut response) = served.request().await;
        let code = Some(u32::from(Reason::ENHANCE_YOUR_CALM));
        delivery.peer.reset(Reset { code: failure::CLIENT_GONE, protocol_code: code });
        let reason = served.drive(poll_fn(|cx| response.poll_reset(cx))).await.expect("a reset");
        assert_eq!(reason, Reason::ENHANCE_YOUR_CALM);
        assert_eq!(delivery.running.outcome().await, Outcome::Ended(failure::CLIENT_GONE));
    });
}

#[test]
fn a_response_that_is_cut_is_not_whole() {
    for (length, reason, is_whole) in [
        ("2", Reason::NO_ERROR, true),
        ("3", Reason::NO_ERROR, false),
        ("2", Reason::INTERNAL_ERROR, false),
    ] {
        let (kit, service) = (kit(), service());
        kit.block_on(async {
            let request = HttpRequest::new("POST", "/").body(None, b"abc");
            let delivery = deliver(&kit, &service, &request, false);
            let mut served = Served::accept(&service).await;
            let (_request, mut response) = served.request().await;
            let head = Response::builder().header("content-length", length).body(()).unwrap();
            let mut stream = response.send_response(head, false).expect("the stream is open");
            stream.send_data(Bytes::from_static(b"ok"), false).expect("the stream is open");
            served.drive(delivery.peer.message()).await;
            stream.send_reset(reason);
            if is_whole {
                let message = served.drive(delivery.peer.message()).await;
                assert!(message.end, "{reason:?}");
                delivery.peer.finish();
                assert_eq!(served.drive(delivery.running.outcome()).await, WELL);
            } else {
                let outcome = served.drive(delivery.running.outcome()).await;
                assert_eq!(outcome, Outcome::Ended(failure::SERVICE_RESET), "{length} {reason:?}");
            }
        });
    }
}

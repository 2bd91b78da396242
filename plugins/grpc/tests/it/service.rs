//! A service that speaks HTTP/2, played by the test.

use std::collections::VecDeque;
use std::future::{Future, poll_fn};
use std::pin::pin;
use std::task::Poll;

use bytes::Bytes;
use h2::RecvStream;
use h2::server::{self, SendResponse};
use http::{HeaderMap, Request, Response};
use sidelane_testkit::{TestService, TestStream};

pub(crate) type Incoming = (Request<RecvStream>, SendResponse<Bytes>);

/// One connection to the service.
pub(crate) struct Served {
    connection: server::Connection<TestStream, Bytes>,
    waiting: VecDeque<Incoming>,
    /// It has ended.
    pub(crate) ended: bool,
}

impl Served {
    pub(crate) async fn accept(service: &TestService) -> Self {
        Self::accept_with(service, &server::Builder::new()).await
    }

    pub(crate) async fn accept_with(service: &TestService, builder: &server::Builder) -> Self {
        let stream = service.accept().await;
        let connection = builder.handshake(stream).await.expect("a client's preface");
        Self { connection, waiting: VecDeque::new(), ended: false }
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

    fn poll(&mut self, cx: &mut std::task::Context<'_>) {
        while !self.ended {
            match self.connection.poll_accept(cx) {
                Poll::Ready(Some(Ok(incoming))) => self.waiting.push_back(incoming),
                Poll::Ready(Some(Err(_)) | None) => self.ended = true,
                Poll::Pending => return,
            }
        }
    }

    /// The next request.
    pub(crate) async fn request(&mut self) -> Incoming {
        poll_fn(|cx| {
            self.poll(cx);
            match self.waiting.pop_front() {
                Some(incoming) => Poll::Ready(incoming),
                None => {
                    assert!(!self.ended, "the connection ended");
                    Poll::Pending
                }
            }
        })
        .await
    }

    /// Waits until the client has closed it.
    pub(crate) async fn closed(&mut self) {
        poll_fn(|cx| {
            self.poll(cx);
            if self.ended { Poll::Ready(()) } else { Poll::Pending }
        })
        .await;
    }

    pub(crate) fn go_away(&mut self) {
        self.connection.graceful_shutdown();
    }
}

/// All of a request's body.
pub(crate) async fn body(stream: &mut RecvStream) -> Vec<u8> {
    let mut all = Vec::new();
    while let Some(data) = poll_fn(|cx| stream.poll_data(cx)).await {
        let data = data.expect("a body to its end");
        let _ = stream.flow_control().release_capacity(data.len());
        all.extend_from_slice(&data);
    }
    all
}

/// `len` bytes of a request's body.
pub(crate) async fn part(stream: &mut RecvStream, len: usize) -> Vec<u8> {
    let mut all = Vec::new();
    while all.len() < len {
        let data = poll_fn(|cx| stream.poll_data(cx)).await.expect("data").expect("data");
        let _ = stream.flow_control().release_capacity(data.len());
        all.extend_from_slice(&data);
    }
    all
}

pub(crate) fn head() -> Response<()> {
    let response = Response::builder().header("content-type", "application/grpc");
    response.body(()).expect("a head")
}

pub(crate) fn trailers(status: &str) -> HeaderMap {
    let mut trailers = HeaderMap::new();
    trailers.insert("grpc-status", status.parse().expect("a value"));
    trailers
}

/// Answers with `messages` and status 0.
pub(crate) fn answer(respond: &mut SendResponse<Bytes>, messages: Vec<u8>) {
    let mut send = respond.send_response(head(), false).expect("a response");
    send.send_data(messages.into(), false).expect("data");
    send.send_trailers(trailers("0")).expect("trailers");
}

//! What core lends, as tests need it: an exchange in memory, an opener, a service, the HTTP front's
//! objects, and a sink that keeps what it is told.

use std::collections::{HashMap, VecDeque};
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex};
use std::task::{Context, Poll, Waker};

use bytes::Bytes;
use http::{HeaderMap, StatusCode};
use sidelane_abi::failure;

use crate::plugin::lend::{self, Closed, Message, Received, Reset};
use crate::plugin::{HostContext, Labels, MetricSink};

/// One direction of an exchange, holding a few messages, so that senders feel backpressure.
#[derive(Default)]
struct Direction {
    queued: VecDeque<Message>,
    ended: bool,
    reset: Option<Reset>,
    receiver: Option<Waker>,
    sender: Option<Waker>,
}

const QUEUED_MAX: usize = 2;

#[derive(Clone, Default)]
struct Wire(Arc<Mutex<Direction>>);

impl Wire {
    fn with<T>(&self, change: impl FnOnce(&mut Direction) -> T) -> T {
        let mut direction = self.0.lock().unwrap();
        let result = change(&mut direction);
        let wakers = [direction.receiver.take(), direction.sender.take()];
        drop(direction);
        wakers.into_iter().flatten().for_each(Waker::wake);
        result
    }

    fn reset(&self, reset: Reset) {
        self.with(|direction| direction.reset.get_or_insert(reset).code);
    }
}

/// The sending half of an exchange's end.
pub(super) struct SendHalf {
    outgoing: Wire,
    incoming: Wire,
    finished: bool,
}

/// The receiving half.
pub(super) struct RecvHalf {
    outgoing: Wire,
    incoming: Wire,
    finished: bool,
}

/// Returns the two ends of an exchange.
pub(super) fn exchange() -> ((SendHalf, RecvHalf), (SendHalf, RecvHalf)) {
    let (there, back) = (Wire::default(), Wire::default());
    let end = |outgoing: &Wire, incoming: &Wire| {
        let (outgoing, incoming) = (outgoing.clone(), incoming.clone());
        let send =
            SendHalf { outgoing: outgoing.clone(), incoming: incoming.clone(), finished: false };
        (send, RecvHalf { outgoing, incoming, finished: false })
    };
    (end(&there, &back), end(&back, &there))
}

impl lend::SendHalf for SendHalf {
    fn poll_send(
        &mut self,
        cx: &mut Context<'_>,
        message: &mut Option<Message>,
    ) -> Poll<Result<(), Closed>> {
        {
            let mut direction = self.outgoing.0.lock().unwrap();
            if direction.reset.is_some() {
                return Poll::Ready(Err(Closed));
            }
            if direction.queued.len() >= QUEUED_MAX {
                direction.sender = Some(cx.waker().clone());
                return Poll::Pending;
            }
        }
        let message = message.take().unwrap();
        self.finished |= message.end;
        self.outgoing.with(|direction| {
            direction.ended |= message.end;
            direction.queued.push_back(message);
        });
        Poll::Ready(Ok(()))
    }

    fn finish(&mut self) {
        self.finished = true;
        self.outgoing.with(|direction| direction.ended = true);
    }

    fn reset(&mut self, reset: Reset) {
        self.finished = true;
        self.outgoing.reset(reset);
        self.incoming.reset(reset);
    }

    fn poll_closed(&mut self, cx: &mut Context<'_>) -> Poll<Reset> {
        let mut direction = self.outgoing.0.lock().unwrap();
        direction.sender = Some(cx.waker().clone());
        direction.reset.map_or(Poll::Pending, Poll::Ready)
    }

    fn dispatched(&mut self) {}

    fn refused(&mut self, reset: Reset) {
        lend::SendHalf::reset(self, reset);
    }
}

impl Drop for SendHalf {
    fn drop(&mut self) {
        if !self.finished {
            self.outgoing.reset(Reset::new(failure::CANCELLED));
        }
    }
}

impl lend::RecvHalf for RecvHalf {
    fn poll_recv(&mut self, cx: &mut Context<'_>) -> Poll<Received> {
        let received = self.incoming.0.lock().unwrap().queued.pop_front();
        if let Some(message) = received {
            self.finished |= message.end;
            self.incoming.with(|_| ());
            return Poll::Ready(Received::Message(message));
        }
        let mut direction = self.incoming.0.lock().unwrap();
        if let Some(reset) = direction.reset {
            return Poll::Ready(Received::Reset(reset));
        }
        if direction.ended {
            self.finished = true;
            return Poll::Ready(Received::Finished);
        }
        direction.receiver = Some(cx.waker().clone());
        Poll::Pending
    }
}

impl Drop for RecvHalf {
    fn drop(&mut self) {
        if !self.finished {
            self.incoming.reset(Reset::new(failure::CANCELLED));
            let _ = &self.outgoing;
        }
    }
}

/// Gives the relay's end of an exchange, once; or says no.
pub(super) struct Opener {
    pub(super) end: Option<(SendHalf, RecvHalf)>,
}

impl lend::Opener for Opener {
    type Send = SendHalf;
    type Recv = RecvHalf;

    fn poll_open(
        &mut self,
        _: &mut Context<'_>,
        key: lend::RouteKey<'_>,
    ) -> Poll<Result<lend::Opened<SendHalf, RecvHalf>, lend::Failure>> {
        match (key, self.end.take()) {
            (lend::RouteKey::Listener, Some((send, recv))) => {
                Poll::Ready(Ok(lend::Opened { send, recv, meta: meta() }))
            }
            (key, _) => Poll::Ready(Err(lend::Failure {
                code: failure::NO_ROUTE,
                retry_after_s: None,
                detail: format!("no route for {key:?}"),
            })),
        }
    }
}

/// A service that is the other end of in-memory streams.
pub(super) struct Service {
    pub(super) accept: tokio::sync::mpsc::UnboundedSender<tokio::io::DuplexStream>,
}

impl lend::Service for Service {
    fn id(&self) -> u64 {
        1
    }

    fn version(&self) -> u64 {
        1
    }

    fn address(&self) -> &str {
        "127.0.0.1:3000"
    }

    fn connect(&self, offered: Vec<Vec<u8>>) -> lend::ConnectFuture {
        let accept = self.accept.clone();
        let protocol = offered.iter().position(|protocol| protocol == b"h2");
        Box::pin(async move {
            let (ours, theirs) = tokio::io::duplex(4 * 1024);
            let refused = |_| {
                let error = std::io::Error::from(std::io::ErrorKind::ConnectionRefused);
                (failure::SERVICE_UNREACHABLE, error)
            };
            accept.send(theirs).map_err(refused)?;
            Ok(lend::Connected { stream: Box::new(ours), protocol })
        })
    }

    fn settings(&self) -> lend::ServiceSettings {
        lend::ServiceSettings::default()
    }

    fn retry(&self) -> bool {
        false
    }
}

pub(super) fn meta() -> lend::Meta {
    let none = lend::Text::default();
    lend::Meta {
        request_id: "7".into(),
        protocol_type: Arc::from("PROBE"),
        route: none.clone(),
        tunnel: "api".into(),
        client_address: "192.0.2.1:4711".into(),
        listener: none.clone(),
        scheme: none.clone(),
        tls_sni: none.clone(),
        tls_alpn: none.clone(),
        tls_client: none.clone(),
        trace_parent: none.clone(),
        trusted_proxy: false,
        peer_address: none.clone(),
        response_head_timeout: None,
        options: none,
        deadline: None,
    }
}

/// A request's body: the frames as listed.
pub(super) struct Body(pub(super) VecDeque<lend::BodyFrame>);

impl lend::Body for Body {
    fn length(&self) -> Option<u64> {
        None
    }

    fn poll_frame(&mut self, _: &mut Context<'_>) -> Poll<lend::BodyFrame> {
        Poll::Ready(self.0.pop_front().unwrap_or(lend::BodyFrame::End))
    }
}

/// What a responder was told.
#[derive(Debug, Default)]
pub(super) struct Response {
    pub(super) informational: Vec<(StatusCode, HeaderMap)>,
    pub(super) head: Option<(StatusCode, HeaderMap)>,
    pub(super) body: Vec<Bytes>,
    pub(super) trailers: Option<HeaderMap>,
    pub(super) ended: bool,
    pub(super) aborted: Option<Reset>,
}

/// Keeps what it is told.
#[derive(Clone, Default)]
pub(super) struct Responder(pub(super) Arc<Mutex<Response>>);

impl lend::Responder for Responder {
    fn informational(&mut self, status: StatusCode, headers: HeaderMap) -> Result<(), Closed> {
        self.0.lock().unwrap().informational.push((status, headers));
        Ok(())
    }

    fn head(
        &mut self,
        head: lend::ResponseHead,
        first: Option<Bytes>,
        end: bool,
    ) -> Result<(), Closed> {
        let mut response = self.0.lock().unwrap();
        response.head = Some((head.status, head.headers));
        response.body.extend(first);
        response.ended = end;
        Ok(())
    }

    /// Takes a chunk at the second poll: the first is pending.
    fn poll_body(
        &mut self,
        cx: &mut Context<'_>,
        chunk: &mut Option<Bytes>,
        end: bool,
    ) -> Poll<Result<(), Closed>> {
        let mut response = self.0.lock().unwrap();
        response.ended = !response.ended;
        if response.ended {
            cx.waker().wake_by_ref();
            return Poll::Pending;
        }
        response.body.extend(chunk.take());
        response.ended = end;
        Poll::Ready(Ok(()))
    }

    fn finish(&mut self, trailers: Option<HeaderMap>) -> Result<(), Closed> {
        let mut response = self.0.lock().unwrap();
        response.trailers = trailers;
        response.ended = true;
        Ok(())
    }

    fn finish_behind(&mut self, last: Bytes, trailers: Option<HeaderMap>) -> Result<(), Closed> {
        self.0.lock().unwrap().body.push(last);
        self.finish(trailers)
    }

    fn abort(&mut self, reset: Reset) {
        self.0.lock().unwrap().aborted = Some(reset);
    }

    fn poll_closed(&mut self, _: &mut Context<'_>) -> Poll<Reset> {
        Poll::Pending
    }

    fn upgrade(&mut self) -> lend::StreamFuture {
        Box::pin(std::future::ready(Err((
            failure::UNSUPPORTED,
            std::io::ErrorKind::Unsupported.into(),
        ))))
    }
}

/// Keeps what plugins count, by plugin and name.
#[derive(Clone, Default)]
pub(super) struct Metrics {
    names: Arc<Mutex<Vec<(String, String)>>>,
    values: Arc<Mutex<HashMap<u32, f64>>>,
    registered: Arc<AtomicUsize>,
}

impl Metrics {
    pub(super) fn host(&self) -> HostContext {
        HostContext::new(Arc::new(self.clone()))
    }

    pub(super) fn value(&self, plugin: &str, name: &str) -> f64 {
        let names = self.names.lock().unwrap();
        let id = names.iter().position(|(p, n)| p == plugin && n == name).unwrap();
        *self.values.lock().unwrap().get(&u32::try_from(id).unwrap()).unwrap_or(&0.0)
    }

    pub(super) fn registered(&self) -> usize {
        self.registered.load(Ordering::Relaxed)
    }
}

impl MetricSink for Metrics {
    fn register(&self, plugin: &str, _: u32, name: &str, _: &str, _: &Labels) -> Option<u32> {
        self.registered.fetch_add(1, Ordering::Relaxed);
        let mut names = self.names.lock().unwrap();
        names.push((plugin.to_owned(), name.to_owned()));
        u32::try_from(names.len() - 1).ok()
    }

    fn add(&self, id: u32, value: f64) {
        *self.values.lock().unwrap().entry(id).or_default() += value;
    }
}

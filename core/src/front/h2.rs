//! HTTP/2, by the `h2` crate.
//!
//! Every request is a task of its own, which alone touches its stream: it polls the plugin's call,
//! watches for the client's reset, and sends what the exchange has put as the windows allow.

use std::cell::RefCell;
use std::future::{Future, poll_fn};
use std::pin::{Pin, pin};
use std::sync::Arc;
use std::sync::atomic::Ordering::Relaxed;
use std::task::{self, Poll, ready};
use std::time::{Duration, SystemTime};

use ::h2::server::{self, SendResponse};
use ::h2::{Reason, RecvStream, SendStream};
use bytes::Bytes;
use http::header::{CONNECTION, DATE, HeaderName, HeaderValue, TRANSFER_ENCODING, UPGRADE};
use http::{HeaderMap, Request, Response, StatusCode};
use sidelane_abi::failure;
use tokio::time::{Instant, Sleep};

use self::tunnel::Tunnel;
use super::answer::{self, Refusal};
use super::exchange::{DropInterim, Exchange, Output, Traits, has_body};
use super::h1::{LINGER, LINGER_BYTES_MAX};
use super::tls::remove_client_cert;
use super::wire::{Calling, Signals, Wire};
use super::{ConnectionError, Context, Dispatch, Event, FrontConfig, head};
use crate::plugin::lend::{self, BodyFrame, Reset, ResponseHead};

mod tunnel;

/// How long a client may take to close after it was told to go away while at rest.
const GOODBYE: Duration = Duration::from_secs(5);

/// Fields that speak of an HTTP/1 connection (RFC 9113 §8.2.2).
const CONNECTION_FIELDS: [HeaderName; 5] = [
    CONNECTION,
    HeaderName::from_static("keep-alive"),
    HeaderName::from_static("proxy-connection"),
    TRANSFER_ENCODING,
    UPGRADE,
];

/// Serves an HTTP/2 connection until it ends.
pub(super) async fn serve<S, D>(
    stream: S,
    ahead: Bytes,
    context: Context<D>,
    mut shutdown: Pin<&mut (impl Future<Output = ()> + Send)>,
) -> Result<(), ConnectionError>
where
    S: lend::Stream,
    D: Dispatch,
{
    let signals = Arc::new(Signals::new());
    let wire = Wire::new(stream, ahead, Arc::clone(&signals));
    let handshake = builder(&context.config).handshake::<_, Bytes>(wire);
    let mut connection = tokio::time::timeout(context.config.request_head_timeout, handshake)
        .await
        .map_err(|_elapsed| ConnectionError::HeadTimeout)?
        .map_err(classify)?;

    let mut rest = RestClock::new(context.config.idle_timeout);
    let mut closing = false;
    let info = Arc::clone(&context.info);
    // One that begins while the relay sends clients elsewhere has time for its first requests: told at once
    // to go away, a client would come again and again.
    let began_late = info.ends_soon.load(Relaxed);
    let mut requests = Requests::new(context, Arc::clone(&signals));
    poll_fn(|cx| {
        // GOAWAY costs no request: nothing is gained by waiting until the end is there.
        let is_over = !closing && shutdown.as_mut().poll(cx).is_ready();
        if is_over || !closing && !began_late && info.ends_soon.load(Relaxed) {
            closing = true;
            connection.graceful_shutdown();
        }
        loop {
            let accepted = pin!(connection.accept()).poll(cx);
            match accepted {
                Poll::Ready(None) => return Poll::Ready(Ok(())),
                // A client may just close while nothing runs.
                Poll::Ready(Some(Err(error))) if error.is_io() && !connection.has_streams() => {
                    return Poll::Ready(Ok(()));
                }
                Poll::Ready(Some(Err(error))) => return Poll::Ready(Err(classify(error))),
                Poll::Ready(Some(Ok((request, respond)))) => {
                    requests.start(request, respond);
                    continue;
                }
                Poll::Pending => {}
            }
            // Of responses that are over, and wait for the client alone.
            let left = connection.has_streams() && signals.calls.load(Relaxed) == 0;
            if left && signals.wrote.swap(false, Relaxed) {
                rest.deadline = None;
            }
            if rest.poll(connection.has_streams() && !left, cx).is_pending() {
                return Poll::Pending;
            }
            if left {
                return Poll::Ready(Err(ConnectionError::Stalled));
            }
            if closing {
                // The client was told, and has not closed.
                return Poll::Ready(Ok(()));
            }
            closing = true;
            rest.timeout = GOODBYE;
            connection.graceful_shutdown();
        }
    })
    .await
}

/// Largest window that HTTP/2 knows (RFC 9113 §6.9.1).
const WINDOW_MAX: u32 = (1 << 31) - 1;

/// Window that a connection has before it is told another.
const WINDOW_MIN: u32 = 65_535;

fn builder(config: &FrontConfig) -> server::Builder {
    let connection_window =
        config.h2_stream_window.saturating_mul(config.h2_streams_max).clamp(WINDOW_MIN, WINDOW_MAX);
    let mut builder = server::Builder::new();
    builder
        .initial_window_size(config.h2_stream_window)
        .initial_connection_window_size(connection_window)
        .max_concurrent_streams(config.h2_streams_max)
        .max_header_list_size(config.head_bytes_max)
        .max_send_buffer_size(config.h2_send_buffer)
        .max_pending_accept_reset_streams(config.h2_pending_resets_max)
        .enable_connect_protocol();
    builder
}

/// Returns who broke the connection. What was running on it is told on its own.
fn classify(error: ::h2::Error) -> ConnectionError {
    if error.is_io() {
        let cause = error.into_io().unwrap_or_else(|| std::io::ErrorKind::Other.into());
        return ConnectionError::Io(cause);
    }
    ConnectionError::Http2(error)
}

/// Fires when a connection has had no stream for `timeout`; each time it is told so again, anew.
struct RestClock {
    timeout: Duration,
    /// None while there are streams.
    deadline: Option<Instant>,
    sleep: Pin<Box<Sleep>>,
}

impl RestClock {
    fn new(timeout: Duration) -> Self {
        Self { timeout, deadline: None, sleep: Box::pin(tokio::time::sleep(timeout)) }
    }

    fn poll(&mut self, busy: bool, cx: &mut task::Context<'_>) -> Poll<()> {
        let timeout = self.timeout;
        if busy {
            self.deadline = None;
            // What ends on a stream's own task need not wake the connection.
            while self.sleep.as_mut().poll(cx).is_ready() {
                self.sleep.as_mut().reset(Instant::now() + timeout);
            }
            return Poll::Pending;
        }
        let deadline = *self.deadline.get_or_insert_with(|| Instant::now() + timeout);
        if deadline < self.sleep.deadline() {
            self.sleep.as_mut().reset(deadline);
        }
        while self.sleep.as_mut().poll(cx).is_ready() {
            if deadline <= Instant::now() {
                self.deadline = None;
                return Poll::Ready(());
            }
            // The timer is set again only when it fires.
            self.sleep.as_mut().reset(deadline);
        }
        Poll::Pending
    }
}

/// The requests of one connection.
struct Requests<D> {
    context: Context<D>,
    signals: Arc<Signals>,
    dropped: DropInterim,
    /// The last authority that was accepted: a client asks the same one again and again.
    authority: Bytes,
}

impl<D: Dispatch> Requests<D> {
    fn new(context: Context<D>, signals: Arc<Signals>) -> Self {
        let dispatch = Arc::clone(&context.dispatch);
        let dropped: DropInterim = Arc::new(move || dispatch.note(Event::InformationalDropped));
        Self { context, signals, dropped, authority: Bytes::new() }
    }

    fn start(&mut self, request: Request<RecvStream>, mut respond: SendResponse<Bytes>) {
        let (parts, recv) = request.into_parts();
        let context = &self.context;
        let end = recv.is_end_stream();
        let stated = head::stated_length(&parts.headers);
        let head_only = parts.method == http::Method::HEAD;
        let scheme = Arc::clone(&context.info.scheme);
        let headers_max = context.config.headers_max;
        let head = match head::of_http2(parts, scheme, end, headers_max, &self.authority) {
            Ok(head) => head,
            Err(refusal) => {
                context.dispatch.note(Event::Answered(refusal.code));
                tracing::debug!(
                    client = %context.info.client_address_text,
                    reason = refusal.reason,
                    "request refused"
                );
                answer(&mut respond, refusal, head_only);
                if !end {
                    linger(recv);
                }
                return;
            }
        };
        self.authority = head.authority.clone();
        let traits = Traits::of(&head, true);
        let exchange = Exchange::new(traits);
        let (recv, upgrade) =
            if traits.upgrade.is_some() { (None, Some(recv)) } else { (Some(recv), None) };
        let length = if end || recv.is_none() { Some(0) } else { stated };
        let body = RequestBody { recv, length, data_ended: false, ended: end };
        let responder = exchange.responder(Arc::clone(&self.dropped));
        let call = context.dispatch.accept(&context.info, Box::new(head), body, responder);
        tokio::spawn(Stream {
            call: Some((call, Calling::new(&self.signals))),
            exchange,
            head_only,
            dispatch: Arc::clone(&context.dispatch),
            respond,
            upgrade,
            send: None,
            done: false,
            sent: false,
        });
    }
}

/// A request's body as a plugin reads it. The client's window opens as it does.
struct RequestBody {
    /// `None`: the request upgrades, and has no body.
    recv: Option<RecvStream>,
    length: Option<u64>,
    data_ended: bool,
    ended: bool,
}

impl RequestBody {
    fn end(&mut self, frame: BodyFrame) -> Poll<BodyFrame> {
        self.ended = true;
        Poll::Ready(frame)
    }
}

impl Drop for RequestBody {
    fn drop(&mut self) {
        if let Some(recv) = self.recv.take()
            && !self.ended
            && !recv.is_end_stream()
        {
            linger(recv);
        }
    }
}

/// Throws away what still comes of a body that nobody wants, for a while. Dropping the stream at once
/// resets it with NO_ERROR (RFC 9113 §8.1), by which some clients lose the answer (curl 7.88).
fn linger(mut recv: RecvStream) {
    // Without a runtime the connection is gone with it.
    let Ok(runtime) = tokio::runtime::Handle::try_current() else { return };
    runtime.spawn(async move {
        let reading = async {
            let mut thrown_away = 0;
            while thrown_away < LINGER_BYTES_MAX
                && let Some(Ok(bytes)) = recv.data().await
            {
                thrown_away += bytes.len();
                // Fails only where the stream is gone, which the next read tells.
                let _ = recv.flow_control().release_capacity(bytes.len());
            }
        };
        // Whoever still sends by then is reset.
        let _ = tokio::time::timeout(LINGER, reading).await;
    });
}

impl lend::Body for RequestBody {
    fn length(&self) -> Option<u64> {
        self.length
    }

    fn poll_frame(&mut self, cx: &mut task::Context<'_>) -> Poll<BodyFrame> {
        if self.ended {
            return Poll::Ready(BodyFrame::End);
        }
        let Some(recv) = &mut self.recv else { return Poll::Ready(BodyFrame::End) };
        while !self.data_ended {
            match ready!(recv.poll_data(cx)) {
                Some(Ok(bytes)) => {
                    // Fails only where the stream is gone, which the next poll tells.
                    let _ = recv.flow_control().release_capacity(bytes.len());
                    if recv.is_end_stream() {
                        return self.end(BodyFrame::Data { bytes, end: true });
                    }
                    if !bytes.is_empty() {
                        return Poll::Ready(BodyFrame::Data { bytes, end: false });
                    }
                }
                Some(Err(error)) => return self.end(BodyFrame::Failed(reset_of(&error))),
                None => self.data_ended = true,
            }
        }
        match ready!(recv.poll_trailers(cx)) {
            Ok(Some(mut trailers)) => {
                remove_client_cert(&mut trailers);
                self.end(BodyFrame::Trailers(trailers))
            }
            Ok(None) => self.end(BodyFrame::End),
            Err(error) => self.end(BodyFrame::Failed(reset_of(&error))),
        }
    }
}

/// One request.
struct Stream<D: Dispatch> {
    call: Option<(D::Call, Calling)>,
    exchange: Arc<Exchange>,
    head_only: bool,
    dispatch: Arc<D>,
    respond: SendResponse<Bytes>,
    /// What the client sends, where the request may become a byte stream.
    upgrade: Option<RecvStream>,
    /// Set once the response has begun and goes on.
    send: Option<SendStream<Bytes>>,
    /// The response has ended, one way or another.
    done: bool,
    /// Something was sent in this turn, and has not left yet.
    sent: bool,
}

impl<D: Dispatch> Future for Stream<D> {
    type Output = ();

    fn poll(self: Pin<&mut Self>, cx: &mut task::Context<'_>) -> Poll<()> {
        let this = self.get_mut();
        let gone = !this.done && this.poll_gone(cx).is_ready();
        if let Some((call, _)) = &mut this.call
            && this.exchange.attend(call, cx)
        {
            this.call = None;
        }
        if gone {
            // The call has had its chance to see it.
            return Poll::Ready(());
        }
        this.sent = false;
        while !this.done && this.poll_send(cx).is_ready() {}
        if this.done && this.call.is_none() { Poll::Ready(()) } else { Poll::Pending }
    }
}

impl<D: Dispatch> Stream<D> {
    /// Ready once the client has reset the stream or is gone.
    fn poll_gone(&mut self, cx: &mut task::Context<'_>) -> Poll<()> {
        let polled = match &mut self.send {
            Some(send) => send.poll_reset(cx),
            None => self.respond.poll_reset(cx),
        };
        let reset = match ready!(polled) {
            Ok(reason) => Reset { code: failure::CLIENT_GONE, protocol_code: Some(reason.into()) },
            Err(error) => reset_of(&error),
        };
        self.exchange.client_gone(reset);
        Poll::Ready(())
    }

    /// Sends one thing that the exchange has put.
    fn poll_send(&mut self, cx: &mut task::Context<'_>) -> Poll<()> {
        let room = self.poll_room(cx);
        match ready!(self.exchange.poll_output(cx, room)) {
            Output::Interim(status, headers) => {
                // Fails only where the stream is gone, which is told on its own.
                let _ = self.respond.send_informational(response(status, headers));
            }
            Output::Head { head, upgrade: true, .. } => self.upgrade(head),
            Output::Head { head, first, end, .. } => self.begin(head, first, end),
            Output::Chunk { bytes, end } => self.send(bytes, end),
            Output::End(trailers) => {
                self.done = true;
                let send = self.send.as_mut().expect("a response ends after it began");
                let _ = match trailers {
                    Some(trailers) => send.send_trailers(trailers),
                    None => send.send_data(Bytes::new(), true),
                };
            }
            Output::Aborted(_) if self.sent => {
                // A reset throws away what the stream has buffered. One turn later the connection
                // has written what the client could take.
                self.sent = false;
                cx.waker().wake_by_ref();
                return Poll::Pending;
            }
            Output::Aborted(reset) => self.abort(reset),
        }
        Poll::Ready(())
    }

    /// Returns whether the client's window and our buffer take another chunk.
    fn poll_room(&mut self, cx: &mut task::Context<'_>) -> bool {
        let Some(send) = &mut self.send else { return false };
        send.reserve_capacity(1);
        send.capacity() > 0 || matches!(send.poll_capacity(cx), Poll::Ready(Some(Ok(1..))))
    }

    fn begin(&mut self, mut head: ResponseHead, first: Option<Bytes>, end: bool) {
        // Refused: what the client has sent ahead is thrown away.
        self.upgrade = None;
        let stated = match answer::check_response(&mut head) {
            Ok(stated) => stated,
            Err(reset) => {
                self.exchange.client_gone(reset);
                return self.fail(reset);
            }
        };
        for name in CONNECTION_FIELDS {
            head.headers.remove(name);
        }
        if let (None, Some(length)) = (stated, head.body_length)
            && has_body(self.head_only, head.status)
        {
            head.headers.insert(http::header::CONTENT_LENGTH, HeaderValue::from(length));
        }
        head.headers.entry(DATE).or_insert_with(date);
        self.done = end && first.is_none();
        match self.respond.send_response(response(head.status, head.headers), self.done) {
            Ok(send) => self.send = Some(send),
            Err(error) => {
                tracing::debug!(%error, "response could not be sent");
                self.exchange.client_gone(reset_of(&error));
                self.done = true;
                return;
            }
        }
        self.sent = true;
        if let Some(first) = first {
            self.send(first, end);
        }
    }

    /// Accepts an extended CONNECT: what follows both ways is the plugin's.
    fn upgrade(&mut self, mut head: ResponseHead) {
        self.done = true;
        for name in CONNECTION_FIELDS {
            head.headers.remove(name);
        }
        // A tunnel has no length (RFC 9110 §9.3.6).
        head.headers.remove(http::header::CONTENT_LENGTH);
        head.headers.entry(DATE).or_insert_with(date);
        let recv = self.upgrade.take().expect("an exchange upgrades once, where it may");
        match self.respond.send_response(response(head.status, head.headers), false) {
            Ok(send) => self.exchange.upgraded(Box::new(Tunnel::new(send, recv))),
            Err(error) => {
                tracing::debug!(%error, "response could not be sent");
                self.exchange.upgrade_failed();
            }
        }
    }

    fn send(&mut self, bytes: Bytes, end: bool) {
        self.done = end;
        self.sent = true;
        let send = self.send.as_mut().expect("a body comes after its head");
        // Fails only where the stream is gone, which is told on its own.
        let _ = send.send_data(bytes, end);
    }

    fn abort(&mut self, reset: Reset) {
        let Some(send) = &mut self.send else { return self.fail(reset) };
        self.done = true;
        send.send_reset(reason(reset));
    }

    /// Answers an exchange that ended without a response.
    fn fail(&mut self, reset: Reset) {
        self.done = true;
        self.dispatch.note(Event::Answered(reset.code));
        tracing::debug!(code = failure::name(reset.code), "exchange ended without a response");
        answer(&mut self.respond, Refusal::of_code(reset.code), self.head_only);
    }
}

fn answer(respond: &mut SendResponse<Bytes>, refusal: Refusal, head_only: bool) {
    let mut headers = refusal.headers();
    headers.insert(DATE, date());
    // Fails only where the stream is gone.
    if let Ok(mut send) = respond.send_response(response(refusal.status, headers), head_only)
        && !head_only
    {
        let _ = send.send_data(refusal.line(), true);
    }
}

fn response(status: StatusCode, headers: HeaderMap) -> Response<()> {
    let mut response = Response::new(());
    *response.status_mut() = status;
    *response.version_mut() = http::Version::HTTP_2;
    *response.headers_mut() = headers;
    response
}

/// Returns HTTP/2's code for a response that is broken off: the peer's own where it gave one.
fn reason(reset: Reset) -> Reason {
    match (reset.protocol_code, reset.code) {
        (Some(code), _) => Reason::from(code),
        (None, failure::CANCELLED | failure::CLIENT_GONE) => Reason::CANCEL,
        (None, failure::FLOW_CONTROL) => Reason::FLOW_CONTROL_ERROR,
        (None, _) => Reason::INTERNAL_ERROR,
    }
}

/// Returns why a stream ended under us.
fn reset_of(error: &::h2::Error) -> Reset {
    // The library resets a stream by itself where the client broke the protocol on it.
    let code = if error.is_library() { failure::BAD_REQUEST } else { failure::CLIENT_GONE };
    Reset { code, protocol_code: error.reason().map(u32::from) }
}

/// Returns the time for `date`, made once a second and thread.
fn date() -> HeaderValue {
    thread_local! {
        static KEPT: RefCell<Option<(u64, HeaderValue)>> = const { RefCell::new(None) };
    }
    let now = SystemTime::now();
    let second = now.duration_since(SystemTime::UNIX_EPOCH).map_or(0, |since| since.as_secs());
    KEPT.with_borrow_mut(|kept| match kept {
        Some((at, text)) if *at == second => text.clone(),
        _ => {
            let text = HeaderValue::try_from(httpdate::fmt_http_date(now))
                .expect("a date is a valid field value");
            *kept = Some((second, text.clone()));
            text
        }
    })
}

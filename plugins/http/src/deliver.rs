//! The sidecar's end: messages become a request to the service, its response becomes messages.
//!
//! The connection to the service is driven inside the exchange's own task: one wake-up per event, no
//! task switch between the socket and the tunnel.

use std::future::{Future, poll_fn};
use std::pin::pin;
use std::sync::Arc;
use std::task::{Context, Poll};
use std::time::Duration;

use bytes::Bytes;
use http::header::{
    CONNECTION, CONTENT_LENGTH, EXPECT, HOST, HeaderMap, HeaderName, HeaderValue, TE, TRAILER,
    TRANSFER_ENCODING,
};
use http::uri::PathAndQuery;
use http::{Method, Request, Response, StatusCode, Uri, Version};
use http_body::Body;
use hyper::body::Incoming;
use hyper::client::conn::TrySendError;
use sidelane_plugin::{
    Buf, ByteStream, Error, Exchange, Host, HttpVersion, Message, Meta, RecvHalf, Reset, SendHalf,
    Service, ServiceSettings, Timer, failure,
};

use sidelane_http_born::fields::{self, Kind, Nominated};
use sidelane_http_born::forwarded::{self, Seen};
use sidelane_http_born::retry::{self, Backoff};

use self::download::{Download, Inflow, Owned};
use crate::config::Config;
use crate::payload::{self, FIELD_REQUEST, RequestPayload};
use crate::pool::{Chosen, Connecting, Connection, Deadline, Pool, PoolError};
use crate::upload::{SharedSource, Upload};

mod download;
mod h2;

/// How long what is left of a request is taken and thrown away after the service has answered and
/// closed. A client that only reads once it has sent everything gets its answer; one that never ends
/// is cut off (nginx's `lingering_time`).
const LINGER: Duration = Duration::from_secs(30);

/// How often one exchange follows a service that agrees on another version of HTTP than it did last.
const CHANGES_MAX: usize = 3;

/// Fields added to those that came: host, connection, length, five that tell of the client.
const FIELDS_ADDED: usize = 10;

/// A failure that the relay is told by its code.
#[derive(Debug)]
struct Failed {
    code: u32,
    message: String,
}

impl Failed {
    fn new(code: u32, message: impl Into<String>) -> Self {
        Self { code, message: message.into() }
    }
}

/// How an exchange ends when it does not end well.
#[derive(Debug)]
enum Stop {
    /// The peer reset it or is gone: there is nobody to tell.
    Gone(Reset),
    /// It failed here.
    Failed(Failed),
}

impl From<Failed> for Stop {
    fn from(failed: Failed) -> Self {
        Self::Failed(failed)
    }
}

/// Delivers one request to the service, and the response back.
pub(crate) async fn deliver(
    config: &Config,
    pool: &Arc<Pool>,
    exchange: Exchange<'_>,
    service: &Service,
) -> Result<(), Error> {
    let (mut send, mut recv, meta) = exchange.split();
    let first = match recv.recv().await {
        Some(Ok(message)) if message.field == FIELD_REQUEST => message,
        Some(Ok(_)) | None => {
            send.refused(Reset::new(failure::BAD_REQUEST));
            return Err(Error::new(
                failure::BAD_REQUEST,
                "the exchange does not begin with a request",
            ));
        }
        Some(Err(reset)) => return Err(reset.into()),
    };
    let mut deadline = Deadline::new(meta.deadline());
    let (mut delivery, request) = match Delivery::new(config, &meta, first, recv) {
        Ok(prepared) => prepared,
        Err(failed) => {
            send.refused(Reset::new(failed.code));
            return Err(Error::new(failed.code, failed.message));
        }
    };
    match delivery.run(pool, &mut send, service, request, &mut deadline).await {
        Ok(()) => Ok(()),
        Err(Stop::Gone(reset)) => Err(reset.into()),
        Err(Stop::Failed(failed)) => {
            let reset = Reset::new(failed.code);
            if delivery.dispatched {
                send.reset(reset);
            } else {
                send.refused(reset);
            }
            Err(Error::new(failed.code, failed.message))
        }
    }
}

/// A request being delivered.
struct Delivery<'a> {
    config: &'a Config,
    meta: &'a Meta<'a>,
    /// The exchange's first payload, from which the request can be made again.
    payload: Bytes,
    /// What the first message has of the body.
    body: Buf,
    /// The rest of the body; `None`: there is none.
    source: Option<SharedSource>,
    /// Exact length of the body, where it is known and no trailers follow.
    length: Option<u64>,
    method: Method,
    expects_continue: bool,
    dispatched: bool,
}

/// How one try ended that did not fail.
enum Turn {
    /// The exchange is through.
    Ended,
    /// The service agreed on the other version of HTTP. Nothing was sent; the connection, where it is at
    /// hand.
    Other { request: Box<Request<Upload>>, stream: Option<ByteStream> },
}

/// Why there is no response head.
enum NoHead {
    /// Nothing of the request can have been processed, or it may be twice: it may be sent again, on a
    /// fresh connection. The request, where hyper gave it back, and how the exchange ends otherwise.
    Repeat(Option<Box<Request<Upload>>>, Stop),
    Stop(Stop),
}

/// Retries of one exchange.
struct Retry<'a> {
    service: &'a Service,
    /// The route has a policy.
    allowed: bool,
    backoff: Backoff,
}

impl Retry<'_> {
    /// Whether the exchange may be sent once more, by the route's budget.
    fn granted(&self) -> bool {
        self.allowed && self.service.retry()
    }

    /// Waits before the next try, no longer than anybody wants the answer.
    async fn wait(&mut self, send: &mut SendHalf, deadline: &mut Deadline) -> Result<(), Stop> {
        let host = Host::current();
        let mut timer = host.timer(host.now() + self.backoff.next(retry::random()));
        poll_fn(|cx| {
            if timer.poll_fired(cx).is_ready() {
                return Poll::Ready(Ok(()));
            }
            if let Poll::Ready(reset) = send.poll_closed(cx) {
                return Poll::Ready(Err(Stop::Gone(reset)));
            }
            deadline.poll(cx).map(|()| Err(late()))
        })
        .await
    }
}

fn late() -> Stop {
    Failed::new(failure::SERVICE_TIMEOUT, "the exchange's time is over").into()
}

impl<'a> Delivery<'a> {
    fn new(
        config: &'a Config,
        meta: &'a Meta<'a>,
        first: Message,
        recv: RecvHalf,
    ) -> Result<(Self, Request<Upload>), Failed> {
        let end = first.end;
        let payload = first.body.to_bytes();
        let read = payload.clone();
        let head = decode(&read)?;
        let body = first.body.slice(head.body.clone());
        let announced = head.headers.iter().any(|(name, _)| name == TRAILER.as_str().as_bytes());
        let come = body.len() as u64;
        let left = match head.content_length {
            Some(length) if come > length || (end && come < length) => {
                return Err(Failed::new(
                    failure::BAD_REQUEST,
                    "the body is not as long as announced",
                ));
            }
            length => length.map(|length| length - come),
        };
        let source = (!end).then(|| SharedSource::new(recv, left));
        // Trailers need chunks (RFC 9112 §7.1.2), and chunks are without a length.
        let length = if announced { None } else { head.content_length };
        let method = Method::from_bytes(head.method.as_bytes())
            .ok()
            .filter(|method| *method != Method::CONNECT)
            .ok_or_else(|| Failed::new(failure::BAD_REQUEST, "the method cannot be sent on"))?;
        let expects_continue = head.expect_continue;
        let delivery = Self {
            config,
            meta,
            payload,
            body,
            source,
            length,
            method,
            expects_continue,
            dispatched: false,
        };
        let request = delivery.request(&head, delivery.upload())?;
        Ok((delivery, request))
    }

    async fn run(
        &mut self,
        pool: &Arc<Pool>,
        send: &mut SendHalf,
        service: &Service,
        mut request: Request<Upload>,
        deadline: &mut Deadline,
    ) -> Result<(), Stop> {
        let settings = service.settings();
        let mut is_h2 = match settings.http_version {
            HttpVersion::Http1 => false,
            HttpVersion::Http2 => true,
            HttpVersion::ByAlpn => pool.chosen(service) != Some(Chosen::Http1),
        };
        let mut dialled = None;
        for _ in 0..=CHANGES_MAX {
            let turn = if is_h2 {
                self.run_h2(pool, send, service, settings, request, deadline).await?
            } else {
                self.run_http1(pool, send, service, settings, request, dialled, deadline).await?
            };
            match turn {
                Turn::Ended => return Ok(()),
                Turn::Other { request: back, stream } => (request, dialled) = (*back, stream),
            }
            // From here on exchanges go the other way at once.
            is_h2 = !is_h2;
            pool.choose(service, if is_h2 { Chosen::Http2 } else { Chosen::Http1 });
        }
        let text = "the service agrees on another version of HTTP each time (ALPN)";
        Err(Failed::new(failure::SERVICE_INVALID, text).into())
    }

    /// As `run`, over HTTP/1.1. `dialled`: a connection that there is already.
    #[allow(clippy::too_many_arguments, reason = "an exchange has that many parts")]
    async fn run_http1(
        &mut self,
        pool: &Arc<Pool>,
        send: &mut SendHalf,
        service: &Service,
        settings: ServiceSettings,
        mut request: Request<Upload>,
        mut dialled: Option<ByteStream>,
        deadline: &mut Deadline,
    ) -> Result<Turn, Stop> {
        let mut retry =
            Retry { service, allowed: settings.retries > 0, backoff: Backoff::default() };
        let reuses = settings.shared && dialled.is_none();
        let mut kept = if reuses { pool.take(service) } else { None };
        loop {
            let mut connection = match kept.take() {
                Some(connection) => connection,
                None => {
                    match pool.connect(service, &settings, dialled.take(), send, deadline).await {
                        Ok(connection) => connection,
                        Err(Connecting::Http2) => {
                            return Ok(Turn::Other { request: Box::new(request), stream: None });
                        }
                        // Nothing was sent on it.
                        Err(Connecting::Failed(PoolError::Connect(_))) if retry.granted() => {
                            retry.wait(send, deadline).await?;
                            continue;
                        }
                        Err(error) => return Err(connecting(error)),
                    }
                }
            };
            if !self.dispatched {
                send.dispatched();
                self.dispatched = true;
            }
            let (back, stop) = match self.head(&mut connection, send, request, deadline).await {
                Ok(response) => {
                    let (head, body) = response.into_parts();
                    // hyper would speak HTTP/1.0 on this connection from here on.
                    let keep = head.version == Version::HTTP_11;
                    let length = body.size_hint().exact();
                    let mut download = self.download(&head, length, Owned { connection, body })?;
                    download.pass(send, &head, deadline).await?;
                    let connection = download.inflow.connection;
                    let parking = keep.then_some((service, &settings));
                    self.finish(pool, connection, send, parking, deadline).await;
                    return Ok(Turn::Ended);
                }
                Err(NoHead::Repeat(back, stop)) => (back, stop),
                Err(NoHead::Stop(stop)) => return Err(stop),
            };
            // A kept connection that was closing is the pool's mistake and no failure of the service:
            // the request is sent on a fresh one, whatever the route allows. Anything else takes from
            // the route's budget.
            if connection.reused {
                pool.count_repeated();
            } else if retry.granted() {
                retry.wait(send, deadline).await?;
            } else {
                return Err(stop);
            }
            request = match back {
                Some(request) => *request,
                None => self.request(&decode(&self.payload)?, self.upload())?,
            };
        }
    }

    /// The body from its beginning. What was taken of its later messages is gone.
    fn upload(&self) -> Upload {
        match &self.source {
            None if self.body.is_empty() => Upload::Empty,
            None => Upload::Whole(self.body.clone()),
            Some(source) => Upload::Stream {
                first: self.body.clone(),
                source: source.clone(),
                left: self.length,
            },
        }
    }

    /// Makes the request for the service.
    fn request(
        &self,
        head: &RequestPayload<'_>,
        upload: Upload,
    ) -> Result<Request<Upload>, Failed> {
        let headers = self.fields(head, &upload)?;
        let mut request = Request::new(upload);
        *request.method_mut() = self.method.clone();
        *request.uri_mut() = self.target(head)?;
        *request.headers_mut() = headers;
        Ok(request)
    }

    fn target(&self, head: &RequestPayload<'_>) -> Result<Uri, Failed> {
        if head.target.is_empty() {
            return Ok(Uri::from_static("/"));
        }
        let bytes = self.payload.slice(head.target.clone());
        PathAndQuery::from_maybe_shared(bytes.clone())
            .ok()
            // What does not come out as it went in (a fragment is cut off) is not passed on as
            // something else.
            .filter(|target| target.as_str().as_bytes() == bytes && matches!(bytes[0], b'/' | b'*'))
            .map(Uri::from)
            .ok_or_else(|| Failed::new(failure::BAD_REQUEST, "the target cannot be sent on"))
    }

    fn fields(&self, head: &RequestPayload<'_>, upload: &Upload) -> Result<HeaderMap, Failed> {
        let mut headers = HeaderMap::with_capacity(head.headers.count + FIELDS_ADDED);
        let authority = self.value(head.authority)?;
        headers.insert(HOST, authority.clone());
        let nominated = Nominated::scan(head.headers.iter());
        let seen = Seen::of(self.meta);
        let mut te = false;
        for (name, value) in head.headers.iter() {
            let kind = match fields::kind(name) {
                Kind::Forwarded if seen.passes_forwarded() => Kind::EndToEnd,
                kind => kind,
            };
            match kind {
                Kind::EndToEnd if !nominated.contains(name) => {
                    let name = HeaderName::from_bytes(name).map_err(|_| {
                        Failed::new(failure::BAD_REQUEST, "a field's name is invalid")
                    })?;
                    headers.append(name, self.value(value)?);
                }
                Kind::Te => te |= fields::te_trailers(value),
                Kind::ContentLength if matches!(upload, Upload::Empty) && value == b"0" => {
                    headers.insert(CONTENT_LENGTH, HeaderValue::from_static("0"));
                }
                Kind::Expect if !self.expects_continue => {
                    headers.append(EXPECT, self.value(value)?);
                }
                _ => {}
            }
        }
        if self.expects_continue {
            headers.insert(EXPECT, HeaderValue::from_static("100-continue"));
        }
        if te {
            // TE belongs to one connection, and says so (RFC 9110 §10.1.4).
            headers.insert(TE, HeaderValue::from_static("trailers"));
            headers.insert(CONNECTION, HeaderValue::from_static("te"));
        }
        if matches!(upload, Upload::Stream { left: None, .. }) {
            // hyper takes a body of unknown length for none where the method usually has none.
            headers.insert(TRANSFER_ENCODING, HeaderValue::from_static("chunked"));
        }
        forwarded::write(&mut headers, seen, &authority);
        forwarded::add_via(&mut headers, head.version);
        Ok(headers)
    }

    fn value(&self, bytes: &[u8]) -> Result<HeaderValue, Failed> {
        HeaderValue::from_maybe_shared(self.payload.slice_ref(bytes))
            .map_err(|_| Failed::new(failure::BAD_REQUEST, "a field's value is invalid"))
    }

    /// Sends the request, passes interim responses back, and waits for the head.
    async fn head(
        &self,
        connection: &mut Connection,
        send: &mut SendHalf,
        mut request: Request<Upload>,
        deadline: &mut Deadline,
    ) -> Result<Response<Incoming>, NoHead> {
        let watch = Arc::clone(&connection.watch);
        watch.begin();
        request.extensions_mut().clone_from(&connection.extensions);
        let sending = !self.expects_continue || !self.body.is_empty();
        let response_timeout =
            self.meta.response_head_timeout().unwrap_or(self.config.response_timeout);
        let mut limits = Limits::new(response_timeout, connection.timer.take(), sending);
        let mut response = pin!(connection.sender.try_send_request(request));
        let mut interim = Vec::new().into_iter();
        let mut out = None;
        let head = poll_fn(|cx| {
            loop {
                if out.is_some() {
                    match send.poll_send(cx, &mut out) {
                        Poll::Ready(Ok(())) => {}
                        Poll::Ready(Err(_)) => {
                            return send.poll_closed(cx).map(|reset| Err(gone(reset)));
                        }
                        Poll::Pending => {
                            let _ = connection.poll_drive(cx);
                            return deadline.poll(cx).map(|()| Err(NoHead::Stop(late())));
                        }
                    }
                }
                if let Some(message) = interim.next() {
                    limits.sending = true;
                    out = Some(message);
                    continue;
                }
                let _ = connection.poll_drive(cx);
                interim = watch.take_interim().into_iter();
                if interim.len() > 0 {
                    continue;
                }
                if let Poll::Ready(head) = response.as_mut().poll(cx) {
                    return Poll::Ready(head.map_err(|error| self.no_head(connection, error)));
                }
                if let Poll::Ready(reset) = send.poll_closed(cx) {
                    return Poll::Ready(Err(gone(reset)));
                }
                if deadline.poll(cx).is_ready() {
                    return Poll::Ready(Err(NoHead::Stop(late())));
                }
                return limits.poll(cx, self.source.as_ref()).map(|()| {
                    let failed = Failed::new(failure::SERVICE_TIMEOUT, "no response in time");
                    Err(NoHead::Stop(failed.into()))
                });
            }
        })
        .await;
        connection.timer = limits.response;
        head
    }

    /// Decides what a request without a response means.
    fn no_head(&self, connection: &Connection, mut error: TrySendError<Request<Upload>>) -> NoHead {
        let unsent = error.take_message().map(Box::new);
        let closed = |error: &hyper::Error| {
            let text = format!("the service closed before its response: {error}");
            Stop::from(Failed::new(failure::SERVICE_RESET, text))
        };
        if unsent.is_some() && connection.reused {
            return NoHead::Repeat(unsent, closed(error.error()));
        }
        if let Some(reset) = self.source.as_ref().and_then(|source| source.lock().failed) {
            return NoHead::Stop(Failed::new(reset.code, "the request's body broke off").into());
        }
        let error = error.into_error();
        if error.is_parse() {
            let hint = speaks_tls_hint(&error);
            let text = format!("the service's response is invalid: {error}{hint}");
            return NoHead::Stop(Failed::new(failure::SERVICE_INVALID, text).into());
        }
        let replayable = self.method.is_idempotent() && self.source.is_none();
        if unsent.is_some() || (replayable && connection.watch.nothing_came()) {
            return NoHead::Repeat(unsent, closed(&error));
        }
        NoHead::Stop(closed(&error))
    }

    /// Checks the response's head.
    fn download<I: Inflow>(
        &self,
        head: &http::response::Parts,
        length: Option<u64>,
        inflow: I,
    ) -> Result<Download<I>, Failed> {
        if head.status == StatusCode::SWITCHING_PROTOCOLS {
            return Err(Failed::new(failure::SERVICE_INVALID, "the service switched protocols"));
        }
        let coded = head
            .headers
            .get_all(TRANSFER_ENCODING)
            .iter()
            .any(|coding| !coding.as_bytes().trim_ascii().eq_ignore_ascii_case(b"chunked"));
        if coded {
            // It was not offered one (TE), and it would pass unnamed.
            return Err(Failed::new(
                failure::SERVICE_INVALID,
                "the service used a transfer coding",
            ));
        }
        let bodiless = self.method == Method::HEAD
            || matches!(head.status, StatusCode::NO_CONTENT | StatusCode::NOT_MODIFIED);
        let length = length.filter(|_| !bodiless);
        Ok(Download { inflow, bodiless, length, peeked: None })
    }

    /// Lets the request end after the response has.
    async fn finish(
        &self,
        pool: &Arc<Pool>,
        mut connection: Box<Connection>,
        send: &mut SendHalf,
        parking: Option<(&Service, &ServiceSettings)>,
        deadline: &mut Deadline,
    ) {
        let settled = poll_fn(|cx| {
            if connection.poll_drive(cx).is_ready() || connection.is_idle() {
                return Poll::Ready(true);
            }
            match send.poll_closed(cx) {
                Poll::Ready(reset) if reset.code != failure::NONE => Poll::Ready(false),
                _ => deadline.poll(cx).map(|()| false),
            }
        })
        .await;
        if !settled {
            return;
        }
        match parking {
            Some((service, settings)) if connection.is_idle() => {
                pool.park(service, settings, connection);
            }
            _ => drop(connection),
        }
        if let Some(source) = &self.source {
            let _ =
                Host::current().timeout(LINGER, poll_fn(|cx| source.lock().poll_discard(cx))).await;
        }
    }
}

fn decode(payload: &[u8]) -> Result<RequestPayload<'_>, Failed> {
    payload::decode_request(payload)
        .map_err(|error| Failed::new(failure::BAD_REQUEST, error.to_string()))
}

fn connecting(error: Connecting) -> Stop {
    match error {
        Connecting::Abandoned(reset) => Stop::Gone(reset),
        Connecting::Late => late(),
        Connecting::Http2 => {
            let text = "the service agreed on HTTP/2, which was not wanted (ALPN)";
            Failed::new(failure::SERVICE_INVALID, text).into()
        }
        Connecting::Failed(PoolError::Connect(error)) => {
            Failed::new(error.code, error.to_string()).into()
        }
        Connecting::Failed(PoolError::Full) => {
            Failed::new(failure::OVERLOADED, "all connections to services are in use").into()
        }
        Connecting::Failed(PoolError::Handshake(error)) => {
            Failed::new(failure::INTERNAL, error.to_string()).into()
        }
    }
}

/// What to do where the answer does not begin as HTTP does. Many a service that speaks TLS answers what
/// comes without by an alert.
fn speaks_tls_hint(error: &hyper::Error) -> &'static str {
    // hyper says which part it is by this text alone.
    if error.to_string().contains("HTTP version") {
        "; if it speaks TLS: `service: https://…`"
    } else {
        ""
    }
}

const fn gone(reset: Reset) -> NoHead {
    NoHead::Stop(Stop::Gone(reset))
}

/// What time may end while the response's head is awaited.
struct Limits {
    response: Option<Timer>,
    response_timeout: Duration,
    /// The client may be sending its body: it was told to, or did not wait for it.
    sending: bool,
}

impl Limits {
    fn new(response_timeout: Duration, timer: Option<Timer>, sending: bool) -> Self {
        let start = || {
            let host = Host::current();
            let deadline = host.now() + response_timeout;
            match timer {
                Some(mut timer) => {
                    timer.reset(deadline);
                    timer
                }
                None => host.timer(deadline),
            }
        };
        let response = (!response_timeout.is_zero()).then(start);
        Self { response, response_timeout, sending }
    }

    /// Ready once the service is too slow.
    fn poll(&mut self, cx: &mut Context<'_>, source: Option<&SharedSource>) -> Poll<()> {
        let Some(timer) = &mut self.response else {
            return Poll::Pending;
        };
        while timer.poll_fired(cx).is_ready() {
            // While the request is still on its way, the service has nothing to answer: time counts
            // from the last of it, and not where the client is what is slow.
            let waits = source.is_none_or(|source| {
                let mut source = source.lock();
                let moved = std::mem::take(&mut source.moved);
                self.sending |= moved;
                !moved && (source.finished || !source.starved || !self.sending)
            });
            if waits {
                return Poll::Ready(());
            }
            timer.reset(Host::current().now() + self.response_timeout);
        }
        Poll::Pending
    }
}

//! Requests to services that speak HTTP/2: each a stream of a connection that many share
//! (`sidelane_http_born::h2_pool`), whose task reads and writes for all of them.

use std::future::{Future as _, poll_fn};
use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll, ready};

use bytes::Bytes;
use h2::{Reason, RecvStream, SendStream};
use http::header::{CONNECTION, CONTENT_LENGTH, HOST, HeaderValue, TRANSFER_ENCODING};
use http::uri::{Authority, Scheme};
use http::{Request, Uri, Version, response};
use http_body::Body as _;
use sidelane_http_born::fields;
use sidelane_http_born::h2_pool::{Place, PoolError, Ticket, User};
use sidelane_http_born::retry::Backoff;
use sidelane_plugin::{
    Buf, Host, HttpVersion, Message, Reset, SendHalf, Service, ServiceSettings, failure,
};

use super::download::{Inflow, Item};
use super::{Delivery, Failed, LINGER, Limits, Retry, Stop, Turn, decode, late};
use crate::payload::FIELD_RESPONSE;
use crate::pool::{Deadline, HEADERS_MAX, Pool, encode_interim};
use crate::upload::{SharedSource, Upload, UploadError};

/// HTTP/2's code for a stream that nobody wants any more (RFC 9113 §7).
const CANCEL: u32 = 8;

/// Why a stream gave no response head.
enum NoHead {
    /// The service has not processed the request. `closing`: its connection takes no more streams.
    NotProcessed {
        stop: Stop,
        closing: bool,
    },
    /// Nothing of a response came, and processing the request twice does no harm.
    Harmless(Stop),
    Stop(Stop),
}

impl Delivery<'_> {
    /// As `run`, over HTTP/2.
    pub(super) async fn run_h2(
        &mut self,
        pool: &Arc<Pool>,
        send: &mut SendHalf,
        service: &Service,
        settings: ServiceSettings,
        mut request: Request<Upload>,
        deadline: &mut Deadline,
    ) -> Result<Turn, Stop> {
        let by_alpn = settings.http_version == HttpVersion::ByAlpn;
        let user = pool.h2.user(service, settings);
        let user = if by_alpn { user.or_http1() } else { user };
        let scheme = if settings.tls { Scheme::HTTPS } else { Scheme::HTTP };
        let mut retry =
            Retry { service, allowed: settings.retries > 0, backoff: Backoff::default() };
        let mut ticket = Ticket::default();
        // Sent again once in any case.
        let mut repeated = false;
        loop {
            let place = match place(pool, service, &user, &mut ticket, send, deadline).await? {
                Ok(place) => place,
                Err(PoolError::NotAgreed) if by_alpn => {
                    return Ok(Turn::Other {
                        request: Box::new(request),
                        stream: user.take_other(),
                    });
                }
                // Nothing was sent.
                Err(PoolError::Connect(_) | PoolError::Closed) if retry.granted() => {
                    retry.wait(send, deadline).await?;
                    ticket = Ticket::default();
                    continue;
                }
                Err(error) => return Err(Failed::new(error.code(), error.to_string()).into()),
            };
            if !self.dispatched {
                send.dispatched();
                self.dispatched = true;
            }
            let (stop, waits) = match self.head_h2(&place, send, request, &scheme, deadline).await {
                Ok((head, stream)) => {
                    let length = head.headers.get(CONTENT_LENGTH);
                    let length =
                        length.and_then(|length| fields::content_length(length.as_bytes()));
                    let mut download = self.download(&head, length, stream)?;
                    download.inflow.left = download.length;
                    let passed = download.pass(send, &head, deadline).await;
                    let mut stream = download.inflow;
                    if let Err(stop) = &passed {
                        stream.uploading.end(stop);
                        return passed.map(|()| Turn::Ended);
                    }
                    self.finish_h2(stream, send, deadline).await;
                    return Ok(Turn::Ended);
                }
                Err(NoHead::NotProcessed { stop, closing }) => {
                    if closing {
                        place.retire();
                    }
                    (stop, repeated)
                }
                Err(NoHead::Harmless(stop)) => (stop, true),
                Err(NoHead::Stop(stop)) => return Err(stop),
            };
            let is_lost = self.source.as_ref().is_some_and(|source| source.lock().begun);
            if is_lost || (waits && !retry.granted()) {
                return Err(stop);
            }
            pool.h2.count_retried();
            ticket = Ticket::beside(&place);
            drop(place);
            if waits {
                retry.wait(send, deadline).await?;
            }
            repeated = true;
            request = self.request(&decode(&self.payload)?, self.upload())?;
        }
    }

    /// Opens a stream for the request, passes interim responses back, and waits for the head.
    async fn head_h2(
        &self,
        place: &Place<'_>,
        send: &mut SendHalf,
        request: Request<Upload>,
        scheme: &Scheme,
        deadline: &mut Deadline,
    ) -> Result<(response::Parts, Stream), NoHead> {
        let (request, body) =
            for_h2(request, scheme.clone()).map_err(|failed| NoHead::Stop(failed.into()))?;
        let bodiless = body.is_end_stream();
        let mut sender = place.sender.clone();
        let (mut response, stream) = sender.send_request(request, bodiless).map_err(|error| {
            // The connection takes no more streams.
            NoHead::NotProcessed { stop: closed(&error), closing: true }
        })?;
        let mut uploading = Uploading { stream, body, chunk: None, ended: bodiless, failed: None };
        let response_timeout =
            self.meta.response_head_timeout().unwrap_or(self.config.response_timeout);
        let sending = !self.expects_continue || !self.body.is_empty();
        let mut limits = Limits::new(response_timeout, None, sending);
        let mut interim = false;
        let mut out = None;
        let head = poll_fn(|cx| {
            loop {
                if out.is_some() {
                    match send.poll_send(cx, &mut out) {
                        Poll::Ready(Ok(())) => {}
                        Poll::Ready(Err(_)) => {
                            return send.poll_closed(cx).map(|reset| Err(Stop::Gone(reset)));
                        }
                        Poll::Pending => {
                            uploading.drive(cx);
                            return deadline.poll(cx).map(|()| Err(late()));
                        }
                    }
                }
                uploading.drive(cx);
                if let Poll::Ready(Some(Ok(response))) = response.poll_informational(cx) {
                    interim = true;
                    limits.sending = true;
                    let head = encode_interim(response.status().as_u16(), response.headers());
                    let body = Buf::new();
                    out = Some(Message { field: FIELD_RESPONSE, end: false, head, body });
                    continue;
                }
                if let Some(reset) = uploading.failed {
                    return Poll::Ready(Err(broke_off(reset)));
                }
                if let Poll::Ready(response) = Pin::new(&mut response).poll(cx) {
                    return Poll::Ready(Ok(response));
                }
                if let Poll::Ready(reset) = send.poll_closed(cx) {
                    return Poll::Ready(Err(Stop::Gone(reset)));
                }
                if deadline.poll(cx).is_ready() {
                    return Poll::Ready(Err(late()));
                }
                return limits.poll(cx, self.source.as_ref()).map(|()| {
                    Err(Failed::new(failure::SERVICE_TIMEOUT, "no response in time").into())
                });
            }
        })
        .await;
        match head {
            Ok(Ok(response)) => {
                let (head, body) = response.into_parts();
                if head.headers.len() > HEADERS_MAX {
                    let text = "the response has too many fields";
                    let failed = Failed::new(failure::SERVICE_INVALID, text);
                    return Err(NoHead::Stop(failed.into()));
                }
                Ok((head, Stream { body, uploading, left: None, data_ended: false }))
            }
            Ok(Err(error)) => Err(self.no_head_h2(&error, interim)),
            Err(stop) => {
                uploading.end(&stop);
                Err(NoHead::Stop(stop))
            }
        }
    }

    /// Decides what a stream without a response means.
    fn no_head_h2(&self, error: &h2::Error, interim: bool) -> NoHead {
        let refused = error.is_reset() && error.reason() == Some(Reason::REFUSED_STREAM);
        if error.is_remote() && (refused || error.is_go_away()) {
            // h2 ends only those streams by a GOAWAY that are above the last one it names.
            return NoHead::NotProcessed { stop: closed(error), closing: !refused };
        }
        let harmless = !interim && self.method.is_idempotent() && self.source.is_none();
        if harmless && !error.is_library() {
            return NoHead::Harmless(closed(error));
        }
        NoHead::Stop(closed(error))
    }

    /// Lets the request end after the response has.
    async fn finish_h2(&self, mut stream: Stream, send: &mut SendHalf, deadline: &mut Deadline) {
        let ended = poll_fn(|cx| {
            if stream.uploading.poll(cx).is_ready() {
                return Poll::Ready(true);
            }
            match send.poll_closed(cx) {
                Poll::Ready(reset) if reset.code != failure::NONE => Poll::Ready(false),
                _ => deadline.poll(cx).map(|()| false),
            }
        })
        .await;
        drop(stream);
        if let Some(source) = self.source.as_ref().filter(|_| ended) {
            discard(source).await;
        }
    }
}

async fn discard(source: &SharedSource) {
    let _ = Host::current().timeout(LINGER, poll_fn(|cx| source.lock().poll_discard(cx))).await;
}

/// Waits for a place for a stream, no longer than anybody wants the answer.
async fn place<'a>(
    pool: &'a Pool,
    service: &Service,
    user: &User<'_>,
    ticket: &mut Ticket,
    send: &mut SendHalf,
    deadline: &mut Deadline,
) -> Result<Result<Place<'a>, PoolError>, Stop> {
    poll_fn(|cx| {
        if let Poll::Ready(place) = pool.h2.poll_place(cx, service, user, ticket) {
            return Poll::Ready(Ok(place));
        }
        if let Poll::Ready(reset) = send.poll_closed(cx) {
            return Poll::Ready(Err(Stop::Gone(reset)));
        }
        deadline.poll(cx).map(|()| Err(late()))
    })
    .await
}

/// Turns a request as HTTP/1.1 has it into one of HTTP/2 (RFC 9113 §8.2.2, §8.3.1), and its body.
fn for_h2(request: Request<Upload>, scheme: Scheme) -> Result<(Request<()>, Upload), Failed> {
    let invalid =
        |what: &str| Failed::new(failure::BAD_REQUEST, format!("{what} cannot be sent on"));
    let (mut head, body) = request.into_parts();
    let authority = head.headers.remove(HOST).ok_or_else(|| invalid("the authority"))?;
    head.headers.remove(CONNECTION);
    head.headers.remove(TRANSFER_ENCODING);
    if let Some(length) = body.size_hint().exact().filter(|length| *length > 0) {
        head.headers.insert(CONTENT_LENGTH, HeaderValue::from(length));
    }
    let mut uri = head.uri.into_parts();
    uri.scheme = Some(scheme);
    uri.authority =
        Some(Authority::try_from(authority.as_bytes()).map_err(|_| invalid("the authority"))?);
    head.uri = Uri::from_parts(uri).map_err(|_| invalid("the target"))?;
    head.version = Version::HTTP_2;
    Ok((Request::from_parts(head, ()), body))
}

/// What the service's end of a stream means.
fn closed(error: &h2::Error) -> Stop {
    let text = format!("the service broke off: {error}");
    let code = if error.is_library() { failure::SERVICE_INVALID } else { failure::SERVICE_RESET };
    Failed::new(code, text).into()
}

fn broke_off(reset: Reset) -> Stop {
    Failed::new(reset.code, "the request's body broke off").into()
}

/// A request's body on its way to the service.
struct Uploading {
    stream: SendStream<Bytes>,
    body: Upload,
    /// A chunk for which the windows have no room yet.
    chunk: Option<Bytes>,
    /// All was sent, or no more is wanted.
    ended: bool,
    /// Why it broke off.
    failed: Option<Reset>,
}

impl Uploading {
    fn drive(&mut self, cx: &mut Context<'_>) {
        let _ = self.poll(cx);
    }

    /// Ready once nothing more is to be sent.
    fn poll(&mut self, cx: &mut Context<'_>) -> Poll<()> {
        while !self.ended && self.failed.is_none() {
            if let Some(chunk) = self.chunk.take() {
                self.stream.reserve_capacity(chunk.len());
                if self.stream.capacity() == 0 && !self.poll_capacity(cx) {
                    self.chunk = Some(chunk);
                    return Poll::Pending;
                }
                let end = self.body.is_end_stream();
                self.ended |= self.stream.send_data(chunk, end).is_err() || end;
                continue;
            }
            match ready!(Pin::new(&mut self.body).poll_frame(cx)) {
                None => {
                    // Fails where the stream is over, which the response's direction tells.
                    let _ = self.stream.send_data(Bytes::new(), true);
                    self.ended = true;
                }
                Some(Ok(frame)) => match frame.into_data() {
                    Ok(data) => self.chunk = Some(data.into_bytes()),
                    Err(frame) => {
                        if let Ok(trailers) = frame.into_trailers() {
                            let _ = self.stream.send_trailers(trailers);
                            self.ended = true;
                        }
                    }
                },
                Some(Err(UploadError(reset))) => self.failed = Some(reset),
            }
        }
        Poll::Ready(())
    }

    /// Whether the windows have room, or the stream is over.
    fn poll_capacity(&mut self, cx: &mut Context<'_>) -> bool {
        loop {
            match self.stream.poll_capacity(cx) {
                Poll::Ready(Some(Ok(0))) => {}
                Poll::Ready(Some(Ok(_))) => return true,
                Poll::Ready(Some(Err(_)) | None) => {
                    self.ended = true;
                    return true;
                }
                Poll::Pending => return false,
            }
        }
    }

    /// Ends the stream early, with the client's own code where it has sent one.
    fn end(&mut self, stop: &Stop) {
        let code = match stop {
            Stop::Gone(reset) => reset.protocol_code.unwrap_or(CANCEL),
            Stop::Failed(_) => CANCEL,
        };
        self.stream.send_reset(Reason::from(code));
    }
}

/// A response's body, and the request's beside it.
struct Stream {
    body: RecvStream,
    uploading: Uploading,
    /// Bytes that must still come, where the length is known.
    left: Option<u64>,
    data_ended: bool,
}

impl Inflow for Stream {
    fn poll_next(&mut self, cx: &mut Context<'_>) -> Poll<Item> {
        self.uploading.drive(cx);
        if let Some(reset) = self.uploading.failed {
            let text = "the request's body broke off";
            return Poll::Ready(Item::Failed(Failed::new(reset.code, text)));
        }
        while !self.data_ended {
            match ready!(self.body.poll_data(cx)) {
                Some(Ok(data)) => {
                    // What is held here is a frame or two.
                    let _ = self.body.flow_control().release_capacity(data.len());
                    if let Some(left) = &mut self.left {
                        *left = left.saturating_sub(data.len() as u64);
                    }
                    if !data.is_empty() {
                        return Poll::Ready(Item::Data(data.into()));
                    }
                }
                Some(Err(error)) => return Poll::Ready(ended(&error, self.left)),
                None => self.data_ended = true,
            }
        }
        Poll::Ready(match ready!(self.body.poll_trailers(cx)) {
            Ok(Some(trailers)) => Item::Trailers(trailers),
            Ok(None) => Item::End,
            Err(error) => ended(&error, self.left),
        })
    }

    fn drive(&mut self, cx: &mut Context<'_>) {
        self.uploading.drive(cx);
    }
}

/// A service may end a stream without a fault once its response is complete (RFC 9113 §8.1).
fn ended(error: &h2::Error, left: Option<u64>) -> Item {
    let is_whole = left.unwrap_or(0) == 0;
    let no_error = error.is_reset() && error.reason() == Some(Reason::NO_ERROR);
    if is_whole && no_error && error.is_remote() {
        return Item::End;
    }
    let text = format!("the service broke off its response: {error}");
    Item::Failed(Failed::new(failure::SERVICE_RESET, text))
}

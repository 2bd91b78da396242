//! The sidecar's end: chunks become an RPC to the service, its response becomes chunks.
//!
//! Both directions run in the exchange's own task; the connection to the service, which many RPCs
//! share, has one of its own (`h2_pool` of `sidelane_http_born`).

use std::future::{Future, poll_fn};
use std::pin::{Pin, pin};
use std::task::{Context, Poll};

use bytes::Bytes;
use h2::client::ResponseFuture;
use h2::{Reason, RecvStream, SendStream};
use http::header::{HeaderMap, HeaderName, HeaderValue};
use http::uri::{Authority, PathAndQuery, Scheme};
use http::{Method, Request, Uri, Version};
use sidelane_http_born::body::{self, BODY_BYTES_MAX, FIELD_TRAILERS, data_message};
use sidelane_http_born::fields::{self, Kind};
use sidelane_http_born::forwarded::{self, Seen};
use sidelane_http_born::h2_pool::{Place, PoolError, Ticket, User};
use sidelane_http_born::retry::{self, Backoff};
use sidelane_http_born::wire::{Field, FieldsSize};
use sidelane_plugin::{
    Buf, Error, Exchange, Host, Message, Meta, OPEN_BYTES_MAX, RecvHalf, Reset, SendHalf, Service,
    failure,
};

use crate::Shared;
use crate::head;
use crate::inflow::{Inflow, Item, ItemOf, Source, Tail, Taken};
use crate::limits::{Limit, Limits, parse_timeout};
use crate::payload::{
    self, FIELD_REQUEST, FIELD_REQUEST_BATCH, HEAD_BYTES_MAX, RequestChunk, Trailers,
};
use crate::splitter::{Incoming, Outgoing, Piece, SplitError};
use crate::status::{self, h2_code};

/// Fields added to those that came: five that tell of the client.
const FIELDS_ADDED: usize = 5;

/// Most fields in metadata or trailers; one more is `service-invalid`. The bound that the relay's
/// fronts have.
const FIELDS_MAX: usize = 128;

/// How an exchange ends when it does not end well.
#[derive(Debug)]
enum Stop {
    /// The peer reset it or is gone: there is nobody to tell.
    Gone(Reset),
    /// It failed here, or at the service.
    Failed(Reset, String),
    /// The service has not processed it, and may on another connection. `closing`: this one takes no
    /// more streams.
    NotProcessed { why: String, closing: bool },
}

impl Stop {
    fn failed(code: u32, message: impl Into<String>) -> Self {
        Self::Failed(Reset::new(code), message.into())
    }

    fn reached(limit: Limit) -> Self {
        match limit {
            Limit::Deadline => Self::failed(failure::SERVICE_TIMEOUT, "the deadline was exceeded"),
            Limit::Drain => Self::failed(failure::DRAINING, "the plugin drains"),
        }
    }
}

/// Delivers one RPC to the service, and its response back.
pub(crate) async fn deliver(
    shared: &Shared,
    exchange: Exchange<'_>,
    service: &Service,
) -> Result<(), Error> {
    let (mut send, recv, meta) = exchange.split();
    let mut dispatched = false;
    match run(shared, &mut send, recv, &meta, service, &mut dispatched).await {
        Ok(()) => Ok(()),
        Err(Stop::Gone(reset)) => Err(reset.into()),
        Err(Stop::Failed(reset, message)) => {
            if dispatched {
                send.reset(reset);
            } else {
                send.refused(reset);
            }
            Err(Error::new(reset.code, message))
        }
        Err(Stop::NotProcessed { why, .. }) => {
            let protocol_code = Some(h2_code::REFUSED_STREAM);
            send.reset(Reset { code: failure::SERVICE_RESET, protocol_code });
            Err(Error::new(failure::SERVICE_RESET, why))
        }
    }
}

async fn run(
    shared: &Shared,
    send: &mut SendHalf,
    recv: RecvHalf,
    meta: &Meta<'_>,
    service: &Service,
    dispatched: &mut bool,
) -> Result<(), Stop> {
    let start = Host::current().now();
    let mut recv = Requests { recv, order: Incoming::new(u32::MAX), replay: Replay::default() };
    let (payload, end) = recv.first().await?;
    let payload_bytes = payload.to_bytes();
    let chunk = payload::decode_request(&payload_bytes)
        .map_err(|error| Stop::failed(failure::BAD_REQUEST, error.to_string()))?;
    recv.check(&payload_bytes, &chunk, end)?;
    let fields = chunk.metadata.iter();
    let timeout = fields
        .clone()
        .find(|(name, _)| *name == b"grpc-timeout")
        .and_then(|(_, value)| parse_timeout(value));
    // The earlier of the client's and the route's.
    let deadline = timeout.map(|timeout| start + timeout).into_iter().chain(meta.deadline()).min();
    let mut limits = Limits::new(&shared.drain, deadline);
    let settings = service.settings();
    let user = shared.pool.user(service, settings);
    let mut backoff = Backoff::default();
    recv.replay.taken(payload_bytes.slice(chunk.body.clone()), end);
    let mut retried = false;
    let mut ticket = Ticket::default();
    loop {
        let scheme = if settings.tls { Scheme::HTTPS } else { Scheme::HTTP };
        let head = request(&payload_bytes, &chunk, meta, scheme)?;
        let place = match place(shared, service, &user, send, &mut limits, &mut ticket).await? {
            Ok(place) => place,
            Err(PoolError::Connect(_) | PoolError::Closed)
                if settings.retries > 0 && service.retry() =>
            {
                // Nothing of it was sent.
                wait(&mut backoff, send, &mut limits).await?;
                shared.pool.count_retried();
                ticket = Ticket::default();
                continue;
            }
            Err(error) => return Err(Stop::failed(error.code(), error.to_string())),
        };
        if !*dispatched {
            send.dispatched();
            *dispatched = true;
        }
        let rpc = Rpc { send, recv: &mut recv, limits: &mut limits };
        let (message, end) = rpc.recv.replay.all();
        match rpc.attempt(&place, head, message, end).await {
            Err(Stop::NotProcessed { why, closing }) => {
                if closing {
                    place.retire();
                }
                if recv.replay.is_lost {
                    return Err(Stop::NotProcessed { why, closing });
                }
                // Once in any case; what is more takes from the route's budget.
                if retried {
                    if settings.retries == 0 || !service.retry() {
                        return Err(Stop::NotProcessed { why, closing });
                    }
                    wait(&mut backoff, send, &mut limits).await?;
                }
                retried = true;
                shared.pool.count_retried();
                ticket = Ticket::beside(&place);
            }
            ended => return ended,
        }
    }
}

/// Waits before the next try, no longer than anybody wants the answer.
async fn wait(
    backoff: &mut Backoff,
    send: &mut SendHalf,
    limits: &mut Limits<'_>,
) -> Result<(), Stop> {
    let host = Host::current();
    let mut timer = host.timer(host.now() + backoff.next(retry::random()));
    poll_fn(|cx| {
        if timer.poll_fired(cx).is_ready() {
            return Poll::Ready(Ok(()));
        }
        if let Poll::Ready(reset) = send.poll_closed(cx) {
            return Poll::Ready(Err(Stop::Gone(reset)));
        }
        limits.poll(cx).map(|limit| Err(Stop::reached(limit)))
    })
    .await
}

/// Waits for a stream to the service.
async fn place<'a>(
    shared: &'a Shared,
    service: &Service,
    user: &User<'_>,
    send: &mut SendHalf,
    limits: &mut Limits<'_>,
    ticket: &mut Ticket,
) -> Result<Result<Place<'a>, PoolError>, Stop> {
    poll_fn(|cx| {
        if let Poll::Ready(place) = shared.pool.poll_place(cx, service, user, ticket) {
            return Poll::Ready(Ok(place));
        }
        if let Poll::Ready(reset) = send.poll_closed(cx) {
            return Poll::Ready(Err(Stop::Gone(reset)));
        }
        limits.poll(cx).map(|limit| Err(Stop::reached(limit)))
    })
    .await
}

/// The request's direction, as it comes through the tunnel.
struct Requests {
    recv: RecvHalf,
    order: Incoming,
    replay: Replay,
}

/// What was taken of the request's bytes, while that is no more than one chunk with some: enough for
/// a unary call, whose message may come apart from its head, and its end apart from both.
#[derive(Default)]
struct Replay {
    bytes: Bytes,
    end: bool,
    /// More was taken.
    is_lost: bool,
}

impl Replay {
    fn taken(&mut self, bytes: Bytes, end: bool) {
        self.end = end;
        if self.is_lost || bytes.is_empty() {
            return;
        }
        self.is_lost = !self.bytes.is_empty();
        self.bytes = if self.is_lost { Bytes::new() } else { bytes };
    }

    /// The bytes for an attempt, and whether they are the last.
    fn all(&self) -> (Bytes, bool) {
        (self.bytes.clone(), self.end)
    }
}

impl Requests {
    /// Takes the payload of the exchange's first message, and whether it is the last.
    async fn first(&mut self) -> Result<(Buf, bool), Stop> {
        match self.recv.recv().await {
            Some(Ok(message)) if message.field == FIELD_REQUEST => Ok((message.body, message.end)),
            Some(Ok(_)) | None => Err(Stop::failed(
                failure::BAD_REQUEST,
                "the exchange does not begin with a gRPC request",
            )),
            Some(Err(reset)) => Err(Stop::Gone(reset)),
        }
    }

    fn check(&mut self, payload: &[u8], chunk: &RequestChunk<'_>, end: bool) -> Result<(), Stop> {
        let RequestChunk { sequence, first, last, partial, .. } = *chunk;
        if last != end {
            return Err(out_of_order(SplitError::Order));
        }
        let body = &payload[chunk.body.clone()];
        self.order.chunk(body, sequence, first, last, partial).map_err(out_of_order)?;
        Ok(())
    }

    /// Ready with the next bytes for the service, and whether they are the last.
    fn poll_next(&mut self, cx: &mut Context<'_>) -> Poll<Result<(Bytes, bool), Stop>> {
        let message = match std::task::ready!(self.recv.poll_recv(cx)) {
            Some(Ok(message)) => message,
            Some(Err(reset)) => return Poll::Ready(Err(Stop::Gone(reset))),
            None => {
                self.replay.taken(Bytes::new(), true);
                return Poll::Ready(Ok((Bytes::new(), true)));
            }
        };
        let (bytes, end) = self.read(message)?;
        let bytes = bytes.into_bytes();
        self.replay.taken(bytes.clone(), end);
        Poll::Ready(Ok((bytes, end)))
    }

    fn read(&mut self, message: Message) -> Result<(Buf, bool), Stop> {
        let invalid = |error| Stop::failed(failure::BAD_REQUEST, format!("{error}"));
        let (payload, end) = (message.body, message.end);
        match message.field {
            FIELD_REQUEST => {
                let chunk = payload::decode_request(&payload).map_err(invalid)?;
                self.check(&payload, &chunk, end)?;
                Ok((payload.slice(chunk.body), end))
            }
            FIELD_REQUEST_BATCH if !end => {
                let batch = payload::decode_batch(&payload).map_err(invalid)?;
                let body = payload.slice(batch.messages);
                self.order.batch(&body, batch.sequence, batch.count).map_err(out_of_order)?;
                Ok((body, false))
            }
            _ => Err(out_of_order(SplitError::Order)),
        }
    }
}

fn out_of_order(_: SplitError) -> Stop {
    Stop::failed(failure::BAD_REQUEST, "the request's chunks are not in order")
}

/// Makes the request's head.
fn request(
    payload: &Bytes,
    chunk: &RequestChunk<'_>,
    meta: &Meta<'_>,
    scheme: Scheme,
) -> Result<Request<()>, Stop> {
    let invalid = |what: &str| Stop::failed(failure::BAD_REQUEST, format!("{what} is invalid"));
    let authority = value(payload, chunk.authority.as_bytes())?;
    let mut uri = http::uri::Parts::default();
    uri.scheme = Some(scheme);
    uri.authority = Some(
        Authority::from_maybe_shared(payload.slice_ref(chunk.authority.as_bytes()))
            .map_err(|_| invalid("the authority"))?,
    );
    let path = if chunk.path.is_empty() {
        Bytes::from(["/", chunk.service, "/", chunk.method].concat())
    } else {
        payload.slice_ref(chunk.path.as_bytes())
    };
    uri.path_and_query = Some(
        PathAndQuery::from_maybe_shared(path.clone())
            .ok()
            // What does not come out as it went in is not passed on as something else.
            .filter(|target| target.as_str().as_bytes() == path && path[0] == b'/')
            .ok_or_else(|| invalid("the path"))?,
    );
    let mut headers = HeaderMap::with_capacity(chunk.metadata.count + FIELDS_ADDED);
    let seen = Seen::of(meta);
    for (name, bytes) in chunk.metadata.iter() {
        let passes = match fields::kind(name) {
            Kind::EndToEnd => true,
            Kind::Forwarded => seen.passes_forwarded(),
            Kind::Te => fields::te_trailers(bytes),
            _ => false,
        };
        if passes {
            let name = HeaderName::from_bytes(name).map_err(|_| invalid("a field's name"))?;
            headers.append(name, value(payload, bytes)?);
        }
    }
    forwarded::write(&mut headers, seen, &authority);
    forwarded::add_via(&mut headers, 20);
    let mut request = Request::new(());
    *request.method_mut() = Method::POST;
    *request.version_mut() = Version::HTTP_2;
    *request.uri_mut() = Uri::from_parts(uri).map_err(|_| invalid("the path"))?;
    *request.headers_mut() = headers;
    Ok(request)
}

fn value(payload: &Bytes, bytes: &[u8]) -> Result<HeaderValue, Stop> {
    HeaderValue::from_maybe_shared(payload.slice_ref(bytes))
        .map_err(|_| Stop::failed(failure::BAD_REQUEST, "a field's value is invalid"))
}

/// One RPC on one stream.
struct Rpc<'a, 'd> {
    send: &'a mut SendHalf,
    recv: &'a mut Requests,
    limits: &'a mut Limits<'d>,
}

impl Rpc<'_, '_> {
    async fn attempt(
        self,
        place: &Place<'_>,
        head: Request<()>,
        first: Bytes,
        end: bool,
    ) -> Result<(), Stop> {
        let Rpc { send, recv, limits } = self;
        let bodiless = end && first.is_empty();
        let mut sender = place.sender.clone();
        let (response, mut stream) = sender
            .send_request(head, bodiless)
            // Nothing was sent: the connection takes no more streams.
            .map_err(|error| Stop::NotProcessed { why: error.to_string(), closing: true })?;
        let ended = {
            let mut up = pin!(upload(&mut stream, recv, first, end));
            let mut down = pin!(download(response, send));
            let mut sending = !bodiless;
            poll_fn(|cx| {
                if sending && let Poll::Ready(sent) = up.as_mut().poll(cx) {
                    sending = false;
                    if let Err(stop) = sent {
                        return Poll::Ready(Err(stop));
                    }
                }
                if let Poll::Ready(ended) = down.as_mut().poll(cx) {
                    return Poll::Ready(ended);
                }
                limits.poll(cx).map(|limit| Err(Stop::reached(limit)))
            })
            .await
        };
        match &ended {
            Err(Stop::Gone(reset)) => {
                // Code 0 ends an exchange that was answered; it cannot be a client that broke off.
                let code = reset.protocol_code.unwrap_or(h2_code::CANCEL);
                stream.send_reset(Reason::from(code));
            }
            Err(Stop::Failed(..)) => stream.send_reset(Reason::CANCEL),
            // Dropping the stream ends what is left of it.
            Ok(()) | Err(Stop::NotProcessed { .. }) => {}
        }
        ended
    }
}

/// Sends the request to the service as its windows allow, one chunk at a time.
async fn upload(
    stream: &mut SendStream<Bytes>,
    recv: &mut Requests,
    first: Bytes,
    end: bool,
) -> Result<(), Stop> {
    if (!first.is_empty() || end) && !put(stream, first, end).await {
        return Ok(());
    }
    let mut ended = end;
    while !ended {
        let (bytes, end) = poll_fn(|cx| recv.poll_next(cx)).await?;
        ended = end;
        if (!bytes.is_empty() || end) && !put(stream, bytes, end).await {
            break;
        }
    }
    Ok(())
}

/// Sends a chunk once the windows take some of it; false: the stream is over, and the response's
/// direction says why.
async fn put(stream: &mut SendStream<Bytes>, bytes: Bytes, end: bool) -> bool {
    if !bytes.is_empty() {
        stream.reserve_capacity(bytes.len());
        if stream.capacity() == 0 {
            let open = poll_fn(|cx| {
                loop {
                    match std::task::ready!(stream.poll_capacity(cx)) {
                        Some(Ok(0)) => {}
                        Some(Ok(_)) => return Poll::Ready(true),
                        Some(Err(_)) | None => return Poll::Ready(false),
                    }
                }
            })
            .await;
            if !open {
                return false;
            }
        }
    }
    stream.send_data(bytes, end).is_ok()
}

/// Passes the response back: its head with what is there, the rest as it comes.
async fn download(mut response: ResponseFuture, send: &mut SendHalf) -> Result<(), Stop> {
    let response = poll_fn(|cx| {
        if let Poll::Ready(response) = Pin::new(&mut response).poll(cx) {
            return Poll::Ready(response.map_err(|error| no_head(&error)));
        }
        send.poll_closed(cx).map(|reset| Err(Stop::Gone(reset)))
    })
    .await?;
    let (parts, body) = response.into_parts();
    if parts.headers.len() > FIELDS_MAX {
        return Err(Stop::failed(failure::SERVICE_INVALID, "the response has too many fields"));
    }
    let status = parts.status.as_u16();
    let inflow = Inflow::new(Frames { body, data_ended: false });
    if head::answers_grpc(u32::from(status), fields_of(&parts.headers)) {
        pass_messages(send, inflow, parts).await
    } else {
        pass_plain(send, inflow, parts).await
    }
}

fn fields_of(headers: &HeaderMap) -> impl Iterator<Item = Field<'_>> {
    headers.iter().map(|(name, value)| (name.as_str().as_bytes(), value.as_bytes()))
}

fn passing(headers: &HeaderMap) -> impl Iterator<Item = Field<'_>> {
    fields_of(headers)
        .filter(|(name, _)| matches!(fields::kind(name), Kind::EndToEnd | Kind::Forwarded))
}

fn size_of(headers: &HeaderMap) -> FieldsSize {
    let mut size = FieldsSize::default();
    for (name, value) in fields_of(headers) {
        size.add(name.len(), value.len());
    }
    size
}

fn no_head(error: &h2::Error) -> Stop {
    let refused = error.is_reset() && error.reason() == Some(Reason::REFUSED_STREAM);
    if error.is_remote() && (refused || error.is_go_away()) {
        // h2 ends only those streams by a GOAWAY that are above the last one it names.
        let why = format!("the service refused the stream: {error}");
        return Stop::NotProcessed { why, closing: !refused };
    }
    broken(error)
}

/// What the service's end of a stream means that is not its answer's.
fn broken(error: &h2::Error) -> Stop {
    let text = format!("the service broke off: {error}");
    let code = if error.is_library() { failure::SERVICE_INVALID } else { failure::SERVICE_RESET };
    let protocol_code =
        error.reason().filter(|_| error.is_reset() && error.is_remote()).map(u32::from);
    Stop::Failed(Reset { code, protocol_code }, text)
}

/// A response's frames.
struct Frames {
    body: RecvStream,
    data_ended: bool,
}

impl Source for Frames {
    type Data = Bytes;
    type Trailers = HeaderMap;
    type Error = h2::Error;

    fn poll_item(&mut self, cx: &mut Context<'_>) -> Poll<ItemOf<Self>> {
        while !self.data_ended {
            match std::task::ready!(self.body.poll_data(cx)) {
                Some(Ok(bytes)) if bytes.is_empty() && !self.body.is_end_stream() => {}
                Some(Ok(bytes)) => {
                    let end = self.body.is_end_stream();
                    return Poll::Ready(Item::Data { bytes, end });
                }
                Some(Err(error)) => return Poll::Ready(Item::End(Tail::Failed(error))),
                None => self.data_ended = true,
            }
        }
        Poll::Ready(Item::End(match std::task::ready!(self.body.poll_trailers(cx)) {
            Ok(Some(trailers)) => Tail::Trailers(trailers),
            Ok(None) => Tail::Plain,
            Err(error) => Tail::Failed(error),
        }))
    }
}

impl Frames {
    /// Lets the service send as much again.
    fn release(&mut self, bytes: usize) {
        // Fails only where the stream is gone, which shows on its own.
        let _ = self.body.flow_control().release_capacity(bytes);
    }
}

type Inflowing = Inflow<Frames>;

/// Takes what is there. With the head nothing is waited for.
async fn take(
    inflow: &mut Inflowing,
    send: &mut SendHalf,
    with_head: bool,
) -> Result<Taken<HeaderMap, h2::Error>, Stop> {
    poll_fn(|cx| match inflow.poll_take(cx) {
        Poll::Ready(taken) => Poll::Ready(Ok(taken)),
        Poll::Pending if with_head => Poll::Ready(Ok(Taken { bytes: Buf::new(), tail: None })),
        Poll::Pending => send.poll_closed(cx).map(|reset| Err(Stop::Gone(reset))),
    })
    .await
}

async fn give(send: &mut SendHalf, message: Message) -> Result<(), Stop> {
    if message.head.len() + message.body.len() > OPEN_BYTES_MAX {
        let text = "the response's metadata is larger than allowed";
        return Err(Stop::failed(failure::SERVICE_INVALID, text));
    }
    send.send(message).await.map_err(Stop::Gone)
}

async fn pass_messages(
    send: &mut SendHalf,
    mut inflow: Inflowing,
    parts: http::response::Parts,
) -> Result<(), Stop> {
    let mut outgoing = Outgoing::new(u32::MAX);
    let mut head = Some(parts);
    loop {
        let Taken { mut bytes, tail } = take(&mut inflow, send, head.is_some()).await?;
        let trailers = match tail {
            None => None,
            Some(Tail::Plain) => Some(None),
            Some(Tail::Trailers(trailers)) => Some(Some(trailers)),
            // Trailers-only, after which the service did not want the rest of the request.
            Some(Tail::Failed(error)) if answered(head.as_ref(), &error) => Some(None),
            Some(Tail::Failed(error)) => return Err(broken(&error)),
        };
        if trailers.iter().flatten().any(|trailers: &HeaderMap| trailers.len() > FIELDS_MAX) {
            return Err(Stop::failed(failure::SERVICE_INVALID, "too many trailers"));
        }
        let ending = trailers.is_some();
        while let Some(piece) = outgoing.next(&mut bytes, ending).map_err(unfit)? {
            let len = piece.body.len();
            let last = piece.last;
            let (piece, rest) = fit(head.as_ref(), trailers.as_ref(), piece);
            let first = message(head.take().as_ref(), trailers.as_ref(), piece);
            give(send, first).await?;
            if let Some(rest) = rest {
                give(send, message(None, trailers.as_ref(), rest)).await?;
            }
            if len > 0 {
                inflow.source().release(len);
            }
            if last {
                return Ok(());
            }
        }
    }
}

/// Splits what would be head, message and trailers in one, where that is more than one message may be.
fn fit(
    head: Option<&http::response::Parts>,
    trailers: Option<&Option<HeaderMap>>,
    piece: Piece,
) -> (Piece, Option<Piece>) {
    let (Some(head), Some(Some(trailers)), true) = (head, trailers, piece.last) else {
        return (piece, None);
    };
    let fields = size_of(&head.headers).encoded_max() + size_of(trailers).encoded_max();
    if fields + piece.body.len() <= HEAD_BYTES_MAX {
        return (piece, None);
    }
    let rest = Piece {
        body: Buf::new(),
        sequence: piece.sequence.wrapping_add(1),
        messages: 0,
        first: false,
        last: true,
        partial: false,
    };
    (Piece { last: false, ..piece }, Some(rest))
}

fn answered(head: Option<&http::response::Parts>, error: &h2::Error) -> bool {
    error.is_reset()
        && error.reason() == Some(Reason::NO_ERROR)
        && head.is_some_and(|head| head.headers.contains_key("grpc-status"))
}

fn unfit(error: SplitError) -> Stop {
    let text = match error {
        SplitError::Truncated => "the response ends inside a message",
        SplitError::TooLarge | SplitError::Order => "the response is malformed",
    };
    Stop::failed(failure::SERVICE_INVALID, text)
}

fn message(
    head: Option<&http::response::Parts>,
    trailers: Option<&Option<HeaderMap>>,
    piece: Piece,
) -> Message {
    let trailers = trailers.filter(|_| piece.last).and_then(Option::as_ref);
    let trailers = trailers.map(|trailers| Trailers {
        fields: passing(trailers),
        size: size_of(trailers),
        status: trailers
            .get("grpc-status")
            .and_then(|status| status::parse(status.as_bytes()))
            .unwrap_or(0),
    });
    match head {
        Some(head) => {
            let (status, size) = (head.status.as_u16(), size_of(&head.headers));
            payload::first_response(status, passing(&head.headers), size, trailers, piece)
        }
        None => payload::response(trailers, piece),
    }
}

/// Passes an answer that is not gRPC's as it is.
async fn pass_plain(
    send: &mut SendHalf,
    mut inflow: Inflowing,
    parts: http::response::Parts,
) -> Result<(), Stop> {
    let mut head = Some(parts);
    loop {
        let Taken { mut bytes, tail } = take(&mut inflow, send, head.is_some()).await?;
        if let Some(Tail::Failed(error)) = &tail {
            return Err(broken(error));
        }
        if let Some(parts) = head.take() {
            let last = bytes.is_empty() && matches!(tail, Some(Tail::Plain));
            let piece = Piece {
                body: Buf::new(),
                sequence: 0,
                messages: 0,
                first: true,
                last,
                partial: false,
            };
            give(send, message(Some(&parts), None, piece)).await?;
            if last {
                return Ok(());
            }
        }
        let ends = matches!(tail, Some(Tail::Plain));
        while !bytes.is_empty() {
            let len = bytes.len().min(BODY_BYTES_MAX);
            let part = bytes.split_to(len);
            give(send, data_message(part, ends && bytes.is_empty())).await?;
            inflow.source().release(len);
            if ends && bytes.is_empty() {
                return Ok(());
            }
        }
        match tail {
            None => {}
            Some(Tail::Trailers(trailers)) => {
                let head = body::encode_trailers(passing(&trailers));
                let field = FIELD_TRAILERS;
                return give(send, Message { field, end: true, head, body: Buf::new() }).await;
            }
            Some(_) => return give(send, data_message(Buf::new(), true)).await,
        }
    }
}

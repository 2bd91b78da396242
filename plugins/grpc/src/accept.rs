//! The relay's end: an RPC's request becomes chunks, the chunks that come back become its response.
//!
//! Both directions run at once, each under its own backpressure, in the one task that the host gave
//! the request. The end of the response is the end of the RPC.

use std::future::{Future, poll_fn};
use std::pin::pin;
use std::sync::Mutex;
use std::task::{Context, Poll};

use sidelane_http_born::body::{self, FIELD_BODY, FIELD_TRAILERS};
use sidelane_http_born::failure::{self as http_failure, respond_with};
use sidelane_http_born::fields::{self, Kind, Nominated};
use sidelane_http_born::wire::Field;
use sidelane_plugin::{
    Body, Buf, Error, Failure, Frame, HeaderList, Host, Message, Opener, RecvHalf, Request,
    RequestHead, Reset, Responder, ResponseHead, RouteKey, SendHalf, failure,
};

use crate::Shared;
use crate::head;
use crate::inflow::{Inflow, Item, ItemOf, Source, Tail, Taken};
use crate::limits::{Limit, Limits, parse_timeout};
use crate::metrics::{Direction, Rpc};
use crate::payload::{self, FIELD_RESPONSE, FIELD_RESPONSE_BATCH, HEAD_BYTES_MAX, ResponseChunk};
use crate::splitter::{Incoming, Outgoing, Piece, SplitError};
use crate::status::{self, Told, h2_code};

/// How an RPC ended that the client was not told of yet.
#[derive(Debug)]
enum End {
    /// As it should.
    Complete,
    /// The client is gone.
    ClientGone(Reset),
    /// The peer reset it.
    PeerReset(Reset),
    /// It went wrong here: why, and one line for people; empty: the table's.
    Failed(u32, &'static str),
}

/// Carries one RPC to the service, and its response back.
pub(crate) async fn accept(
    shared: &Shared,
    request: Request<'_>,
    mut responder: Responder,
    mut opener: Opener<'_>,
) -> Result<(), Error> {
    let start = Host::current().now();
    let Request { head, body, meta } = request;
    if let Some(answered) = refuse_no_rpc(&head, &mut responder) {
        return answered;
    }
    let timeout = head.header(b"grpc-timeout").and_then(parse_timeout);
    // The client's and the route's: the earlier one counts.
    let deadline = timeout.map(|timeout| start + timeout).into_iter().chain(meta.deadline()).min();
    let mut limits = Limits::new(&shared.drain, deadline);
    // What the fronts let through as a path is text.
    let target = str::from_utf8(head.target()).unwrap_or_default();
    let path = target.split('?').next().unwrap_or_default();

    let key = RouteKey::Host { host: head.authority(), path: path.as_bytes() };
    let opened = poll_fn(|cx| match opener.poll_open(cx, key) {
        Poll::Ready(opened) => Poll::Ready(opened.map_err(Ok)),
        Poll::Pending => limits.poll(cx).map(|limit| Err(Err(limit))),
    })
    .await;
    let (mut send, recv, meta) = match opened {
        Ok(exchange) => exchange.split(),
        Err(cause) => {
            let (code, detail) = match &cause {
                Ok(failure) => (failure.code, &*failure.detail),
                Err(limit) => (reached(*limit), ""),
            };
            let told = Told::new(Reset::new(code), detail);
            shared.metrics.begin("", path, start).told(Some(told.status.into()));
            told.answer(&mut responder)?;
            return match cause {
                Ok(_) => Ok(()),
                Err(_) => Err(Reset::new(code).into()),
            };
        }
    };
    if head.expects_continue() {
        // No client of gRPC waits to be told, and no service of gRPC tells: `expect` does not pass.
        let _ = responder.informational(100, &HeaderList::new());
    }
    let message_max = shared.options.read(meta.options()).max_message_size;
    let rpc = Mutex::new(shared.metrics.begin(meta.route(), path, start));
    let mut download = Download {
        recv,
        responder,
        rpc: &rpc,
        order: Incoming::new(message_max),
        clean: true,
        begun: false,
        plain: false,
    };
    let mut sending = true;
    let end = {
        let mut down = pin!(download.run());
        let mut up = pin!(upload(&head, body, &mut send, &rpc, message_max));
        poll_fn(|cx| {
            if sending && let Poll::Ready(sent) = up.as_mut().poll(cx) {
                sending = false;
                if let Err(end) = sent {
                    return Poll::Ready(end);
                }
            }
            if let Poll::Ready(end) = down.as_mut().poll(cx) {
                return Poll::Ready(end);
            }
            limits.poll(cx).map(|limit| End::Failed(reached(limit), ""))
        })
        .await
    };
    if sending && matches!(end, End::Complete) {
        // The service has answered; the rest of the request is not wanted.
        send.reset(Reset::new(failure::CANCELLED));
    }
    conclude(end, download, &mut send)
}

const fn reached(limit: Limit) -> u32 {
    match limit {
        Limit::Deadline => failure::SERVICE_TIMEOUT,
        Limit::Drain => failure::DRAINING,
    }
}

/// Tells the client and the peer how the RPC ended.
fn conclude(end: End, download: Download<'_, '_>, send: &mut SendHalf) -> Result<(), Error> {
    let Download { mut responder, rpc, clean, begun, plain, .. } = download;
    let (reset, detail, from_peer) = match end {
        End::Complete => return Ok(()),
        End::ClientGone(reset) => {
            send.reset(reset);
            return Err(reset.into());
        }
        End::PeerReset(reset) => (reset, "", true),
        End::Failed(code, detail) => (Reset::new(code), detail, false),
    };
    if !from_peer {
        // The service sees a client that has cancelled.
        send.reset(Reset { protocol_code: Some(h2_code::CANCEL), ..reset });
    }
    let told = Told::new(reset, detail);
    let as_sent = reset.code == failure::SERVICE_RESET && reset.protocol_code.is_some();
    if !begun {
        tell(rpc, u32::from(told.status));
        told.answer(&mut responder)?;
    } else if !plain && clean && !as_sent {
        tell(rpc, u32::from(told.status));
        told.finish(&mut responder)?;
    } else {
        let code = status::abort_code(reset);
        responder.abort(Reset { protocol_code: Some(code), ..reset });
    }
    Err(reset.into())
}

/// A relay's metrics of an RPC, shared by its two directions, which never run at once.
type SharedRpc<'a> = Mutex<Rpc<'a>>;

fn with_rpc<'a, R>(rpc: &SharedRpc<'a>, f: impl FnOnce(&mut Rpc<'a>) -> R) -> R {
    f(&mut rpc.lock().unwrap_or_else(std::sync::PoisonError::into_inner))
}

fn tell(rpc: &SharedRpc<'_>, status: u32) {
    with_rpc(rpc, |rpc| rpc.told(Some(status)));
}

/// Says `failure` in gRPC's words.
pub(crate) fn refuse(
    head: &RequestHead<'_>,
    responder: &mut Responder,
    failure: &Failure,
) -> Result<(), Error> {
    if let Some(answered) = refuse_no_rpc(head, responder) {
        return answered;
    }
    Told::new(Reset::new(failure.code), &failure.detail).answer(responder)?;
    Ok(())
}

/// Refuses what has gRPC's content type and can be no RPC, as servers of gRPC do.
fn refuse_no_rpc(head: &RequestHead<'_>, responder: &mut Responder) -> Option<Result<(), Error>> {
    let told = http_failure::Told::code(failure::UNSUPPORTED);
    let (told, extra): (_, &[Field<'_>]) = if head.version() != 20 {
        // HTTP/1 gives a client no trailers that it could rely on.
        let detail = "gRPC needs HTTP/2";
        (http_failure::Told { status: Some(505), detail, ..told }, &[])
    } else if head.method() != "POST" {
        let detail = "gRPC needs POST";
        (http_failure::Told { status: Some(405), detail, ..told }, &[(b"allow", b"POST")])
    } else {
        return None;
    };
    Some(respond_with(head, responder, &told, extra).map_err(Error::from))
}

impl Source for Body {
    type Data = Buf;
    /// A request of gRPC has none.
    type Trailers = ();
    type Error = Reset;

    fn poll_item(&mut self, cx: &mut Context<'_>) -> Poll<ItemOf<Self>> {
        self.poll_frame(cx).map(|frame| match frame {
            Some(Ok(Frame::Data { bytes, end })) => Item::Data { bytes, end },
            Some(Ok(Frame::Trailers(_))) | None => Item::End(Tail::Plain),
            Some(Err(reset)) => Item::End(Tail::Failed(reset)),
        })
    }
}

/// Sends the request: its head with what is there, the rest as it comes.
async fn upload(
    head: &RequestHead<'_>,
    body: Body,
    send: &mut SendHalf,
    rpc: &SharedRpc<'_>,
    message_max: u32,
) -> Result<(), End> {
    let mut inflow = Inflow::new(body);
    let mut outgoing = Outgoing::new(message_max);
    let mut head = Some(head);
    loop {
        let taken = poll_fn(|cx| {
            if head.is_some() && !has_body(head) {
                return Poll::Ready(Taken { bytes: Default::default(), tail: Some(Tail::Plain) });
            }
            match inflow.poll_take(cx) {
                // The head does not wait for the first message.
                Poll::Pending if head.is_some() => {
                    Poll::Ready(Taken { bytes: Default::default(), tail: None })
                }
                taken => taken,
            }
        })
        .await;
        let Taken { mut bytes, tail } = taken;
        match tail {
            // The host ends the body of a client that sends more than its route allows.
            Some(Tail::Failed(Reset { code: failure::TOO_LARGE, .. })) => {
                return Err(End::Failed(
                    failure::TOO_LARGE,
                    "the request is larger than the route allows",
                ));
            }
            Some(Tail::Failed(reset)) => return Err(End::ClientGone(reset)),
            _ => {}
        }
        let ending = tail.is_some();
        loop {
            let piece = match outgoing.next(&mut bytes, ending) {
                Ok(Some(piece)) => piece,
                Ok(None) => break,
                Err(error) => return Err(unfit(error)),
            };
            with_rpc(rpc, |rpc| {
                rpc.passed(Direction::Request, piece.messages, piece.body.len());
            });
            let message = match head.take() {
                Some(head) => first_message(head, piece)?,
                None => payload::request(piece),
            };
            if send.send(message).await.is_err() {
                // The exchange is over, and the response's direction says why.
                return Ok(());
            }
        }
        if ending {
            return Ok(());
        }
    }
}

fn has_body(head: Option<&RequestHead<'_>>) -> bool {
    head.is_none_or(|head| !head.ends())
}

fn first_message(head: &RequestHead<'_>, piece: Piece) -> Result<Message, End> {
    let malformed = || End::Failed(failure::BAD_REQUEST, "the path or authority is not text");
    let path = str::from_utf8(head.target()).map_err(|_| malformed())?;
    let authority = str::from_utf8(head.authority()).map_err(|_| malformed())?;
    let (service, method, path) = head::split_path(path);
    let parts = payload::RequestHead { service, method, path, authority };
    let (metadata, size) = head::metadata(head.headers());
    if size.encoded_max() + service.len() + method.len() + path.len() > HEAD_BYTES_MAX {
        return Err(End::Failed(failure::TOO_LARGE, "the metadata is larger than allowed"));
    }
    Ok(payload::first_request(parts, metadata, size, piece))
}

const fn unfit(error: SplitError) -> End {
    match error {
        SplitError::TooLarge => {
            End::Failed(failure::TOO_LARGE, "a request message is larger than max_message_size")
        }
        SplitError::Truncated => {
            End::Failed(failure::BAD_REQUEST, "the request ends inside a message")
        }
        SplitError::Order => End::Failed(failure::INTERNAL, ""),
    }
}

/// The response's direction.
struct Download<'a, 'r> {
    recv: RecvHalf,
    responder: Responder,
    rpc: &'a SharedRpc<'r>,
    order: Incoming,
    /// What the client was sent ends with a message's end: trailers may follow.
    clean: bool,
    /// The response's head was sent.
    begun: bool,
    /// The answer is not gRPC's.
    plain: bool,
}

impl Download<'_, '_> {
    async fn run(&mut self) -> End {
        loop {
            let received = poll_fn(|cx| {
                if let Poll::Ready(received) = self.recv.poll_recv(cx) {
                    return Poll::Ready(Ok(received));
                }
                self.responder.poll_closed(cx).map(Err)
            })
            .await;
            let message = match received {
                Ok(Some(Ok(message))) => message,
                Ok(Some(Err(reset))) => return End::PeerReset(reset),
                Ok(None) => return invalid(),
                Err(reset) => return End::ClientGone(reset),
            };
            let end = message.end;
            let passed = match message.field {
                FIELD_RESPONSE => self.chunk(message).await,
                FIELD_RESPONSE_BATCH if self.begun && !end => self.batch(message).await,
                FIELD_BODY if self.plain => self.plain_data(message).await,
                FIELD_TRAILERS if self.plain && end => self.plain_trailers(&message),
                _ => Err(invalid()),
            };
            match passed {
                Ok(()) if end => return End::Complete,
                Ok(()) => {}
                Err(end) => return end,
            }
        }
    }

    async fn chunk(&mut self, message: Message) -> Result<(), End> {
        let payload = message.body;
        let chunk = payload::decode_response(&payload).map_err(|_| invalid())?;
        if chunk.last != message.end || self.plain {
            return Err(invalid());
        }
        let body = payload.slice(chunk.body.clone());
        let ResponseChunk { sequence, first, last, partial, .. } = chunk;
        let messages =
            self.order.chunk(&body, sequence, first, last, partial).map_err(out_of_order)?;
        self.passed(messages, body.len());
        let body = (!body.is_empty()).then_some(body);
        if last && !first && chunk.metadata.count > 0 {
            return Err(invalid());
        }
        if first {
            self.head(&chunk, body)?;
        } else if let Some(body) = body {
            self.body(body, last && chunk.trailers.count == 0).await?;
        }
        if last {
            let ended_by_head = first && chunk.trailers.count == 0;
            let fields = if ended_by_head { chunk.metadata } else { chunk.trailers };
            let status = fields.iter().find(|(name, _)| *name == b"grpc-status");
            let status = status.and_then(|(_, value)| status::parse(value));
            with_rpc(self.rpc, |rpc| rpc.answered(status));
            if chunk.trailers.count > 0 {
                let mut trailers = HeaderList::with_capacity(chunk.trailers.count);
                trailers.extend(
                    chunk.trailers.iter().filter(|(name, _)| fields::kind(name) == Kind::EndToEnd),
                );
                self.responder.finish(Some(&trailers)).map_err(|_| gone())?;
            } else if !first {
                self.responder.finish(None).map_err(|_| gone())?;
            }
        }
        Ok(())
    }

    fn head(&mut self, chunk: &ResponseChunk<'_>, body: Option<Buf>) -> Result<(), End> {
        let status = u16::try_from(chunk.http_status).map_err(|_| invalid())?;
        if !(200..=999).contains(&status) {
            return Err(invalid());
        }
        self.plain = !head::answers_grpc(chunk.http_status, chunk.metadata.iter());
        if self.plain && body.is_some() {
            return Err(invalid());
        }
        let nominated = Nominated::scan(chunk.metadata.iter());
        let mut headers = HeaderList::with_capacity(chunk.metadata.count);
        headers.extend(chunk.metadata.iter().filter(|(name, _)| fields::passes(name, &nominated)));
        let end = chunk.last && chunk.trailers.count == 0;
        self.begun = true;
        self.clean = self.order.at_boundary();
        let head = ResponseHead { status, headers: &headers, body_length: None };
        self.responder.head(head, body, end).map_err(|_| gone())
    }

    async fn batch(&mut self, message: Message) -> Result<(), End> {
        let batch = payload::decode_batch(&message.body).map_err(|_| invalid())?;
        if self.plain {
            return Err(invalid());
        }
        let body = message.body.slice(batch.messages);
        let messages =
            self.order.batch(&body, batch.sequence, batch.count).map_err(out_of_order)?;
        self.passed(messages, body.len());
        self.body(body, false).await
    }

    fn passed(&self, messages: u32, bytes: usize) {
        if bytes > 0 {
            with_rpc(self.rpc, |rpc| rpc.passed(Direction::Response, messages, bytes));
        }
    }

    async fn body(&mut self, body: Buf, end: bool) -> Result<(), End> {
        // Where a limit cuts this short the chunk is not sent, and the client has what it had.
        if self.responder.body(body, end).await.is_ok() {
            self.clean = self.order.at_boundary();
            return Ok(());
        }
        // It says with which code the client broke off, if it did.
        let reset = poll_fn(|cx| {
            Poll::Ready(match self.responder.poll_closed(cx) {
                Poll::Ready(reset) => reset,
                Poll::Pending => Reset::new(failure::CLIENT_GONE),
            })
        })
        .await;
        Err(End::ClientGone(reset))
    }

    async fn plain_data(&mut self, message: Message) -> Result<(), End> {
        let range = body::decode_body(&message.body).map_err(|_| invalid())?;
        let chunk = message.body.slice(range);
        if chunk.is_empty() {
            return if message.end {
                self.responder.finish(None).map_err(|_| gone())
            } else {
                Ok(())
            };
        }
        self.body(chunk, message.end).await
    }

    fn plain_trailers(&mut self, message: &Message) -> Result<(), End> {
        let trailers = body::decode_trailers(&message.body).map_err(|_| invalid())?;
        let mut headers = HeaderList::with_capacity(trailers.count);
        headers.extend(trailers.iter().filter(|(name, _)| fields::kind(name) == Kind::EndToEnd));
        self.responder.finish(Some(&headers)).map_err(|_| gone())
    }
}

const fn out_of_order(error: SplitError) -> End {
    match error {
        SplitError::TooLarge => {
            End::Failed(failure::TOO_LARGE, "a response message is larger than max_message_size")
        }
        SplitError::Truncated | SplitError::Order => invalid(),
    }
}

/// The sidecar's end sent what this plugin does not say.
const fn invalid() -> End {
    End::Failed(failure::PLUGIN_FAILED, "")
}

const fn gone() -> End {
    End::ClientGone(Reset::new(failure::CLIENT_GONE))
}

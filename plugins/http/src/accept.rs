//! The relay's end: a request becomes messages, the messages that come back become the response.
//!
//! Both directions run at once, each under its own backpressure, in the one task that the host gave
//! the request. The end of the response does not end the request: a service may answer early and go
//! on reading.

use std::collections::VecDeque;
use std::future::{Future, poll_fn};
use std::pin::pin;
use std::sync::atomic::{AtomicBool, Ordering};
use std::task::{Context, Poll, ready};

use sidelane_plugin::{
    Body, Buf, Error, Failure, Frame, HeaderList, Message, OPEN_BYTES_MAX, Opener, RecvHalf,
    Request, RequestHead, Reset, Responder, ResponseHead, RouteKey, SendHalf, failure,
};

use sidelane_http_born::body::{self, BODY_BYTES_MAX, FIELD_BODY, FIELD_TRAILERS, data_message};
use sidelane_http_born::failure::{Told, respond_with};
use sidelane_http_born::fields::{self, Kind, Nominated};
use sidelane_http_born::wire::{Field, FieldsSize};

use crate::payload::{self, FIELD_REQUEST, FIELD_RESPONSE, HEAD_BYTES_MAX};

/// What `Allow` says where a method is not allowed (RFC 9110 §15.5.6).
const METHODS: &[u8] = b"GET, HEAD, POST, PUT, PATCH, DELETE, OPTIONS, TRACE";

/// How the response's direction ended.
#[derive(Clone, Copy, Debug)]
enum End {
    /// As it should.
    Complete,
    /// The client is gone.
    ClientGone(Reset),
    /// It went wrong, or the peer reset it.
    Failed(Reset),
}

/// How the request's direction ended.
#[derive(Clone, Copy, Debug)]
enum Sent {
    /// As it should.
    All,
    /// The exchange is over, and the response's direction says why.
    Over,
    /// The client is gone.
    ClientGone(Reset),
    /// A message would be larger than allowed.
    TooLarge,
}

/// Carries one request to the service, and the response back.
pub(crate) async fn accept(
    request: Request<'_>,
    mut responder: Responder,
    mut opener: Opener<'_>,
) -> Result<(), Error> {
    let Request { head, mut body, .. } = request;
    if head.protocol().is_some() {
        // RFC 9220 §3. No plugin claims this protocol.
        let told = Told {
            detail: "no plugin serves the protocol of this extended CONNECT",
            ..Told::code(failure::UNSUPPORTED)
        };
        return respond(&head, &mut responder, &told);
    }
    if head.method() == "CONNECT" {
        let told = Told {
            status: Some(405),
            detail: "CONNECT is not served here",
            ..Told::code(failure::UNSUPPORTED)
        };
        return respond(&head, &mut responder, &told);
    }
    let path = head.target().split(|byte| *byte == b'?').next().unwrap_or_default();
    let key = RouteKey::Host { host: head.authority(), path };
    let (mut send, recv, _) = match opener.open(key).await {
        Ok(exchange) => exchange.split(),
        Err(failure) => return refuse(&head, &mut responder, &failure),
    };

    let FirstMessage { message, waiting } =
        poll_fn(|cx| Poll::Ready(first_message(&head, &mut body, cx))).await;
    if message.head.len() > HEAD_BYTES_MAX {
        send.reset(Reset::new(failure::TOO_LARGE));
        let told = Told {
            status: Some(431),
            detail: "the request's head is larger than allowed",
            ..Told::code(failure::TOO_LARGE)
        };
        return respond(&head, &mut responder, &told);
    }
    let sent_all = message.end;
    let body_begun = !message.body.is_empty() || !waiting.is_empty();
    // Where the exchange is over already, the receiving half says why.
    let over = send.send(message).await.is_err();

    // What came with the head says that the rest comes too.
    let sending = AtomicBool::new(!head.expects_continue() || body_begun);
    let mut download = Download { recv, responder, head: &head, sending: &sending, begun: false };
    let mut sent = if over { Some(Sent::Over) } else { sent_all.then_some(Sent::All) };
    let end = {
        let mut down = pin!(download.run());
        let mut up = pin!(upload(&mut body, &mut send, waiting, &sending));
        let end = poll_fn(|cx| {
            loop {
                if let Poll::Ready(end) = down.as_mut().poll(cx) {
                    return Poll::Ready(end);
                }
                if sent.is_some() {
                    return Poll::Pending;
                }
                let result = ready!(up.as_mut().poll(cx));
                sent = Some(result);
                match result {
                    Sent::All | Sent::Over => {}
                    Sent::ClientGone(reset) => return Poll::Ready(End::ClientGone(reset)),
                    Sent::TooLarge => {
                        return Poll::Ready(End::Failed(Reset::new(failure::TOO_LARGE)));
                    }
                }
            }
        })
        .await;
        let answered = matches!(end, End::Complete);
        let expected = sending.load(Ordering::Relaxed);
        if answered && sent.is_none() && expected {
            sent = Some(up.await);
        }
        end
    };

    let (begun, mut responder) = (download.begun, download.responder);
    match end {
        End::Complete => match sent {
            // That the service did not want all of it is its own affair.
            Some(Sent::All | Sent::Over) => Ok(()),
            Some(Sent::ClientGone(reset)) => {
                send.reset(reset);
                Err(reset.into())
            }
            // The client waits to be told, and is not, or what is left is in the way.
            None | Some(Sent::TooLarge) => {
                send.reset(Reset::new(failure::CANCELLED));
                Ok(())
            }
        },
        End::ClientGone(reset) => {
            send.reset(reset);
            Err(reset.into())
        }
        End::Failed(reset) => {
            send.reset(Reset::new(failure::CANCELLED));
            if begun {
                responder.abort(reset);
            } else {
                respond(&head, &mut responder, &Told::code(reset.code))?;
            }
            Err(reset.into())
        }
    }
}

/// Says `failure` in HTTP's words.
pub(crate) fn refuse(
    head: &RequestHead<'_>,
    responder: &mut Responder,
    failure: &Failure,
) -> Result<(), Error> {
    let told = Told {
        code: failure.code,
        status: None,
        retry_after_s: failure.retry_after_s.unwrap_or(0),
        detail: &failure.detail,
    };
    respond(head, responder, &told)
}

fn respond(
    head: &RequestHead<'_>,
    responder: &mut Responder,
    told: &Told<'_>,
) -> Result<(), Error> {
    let allow: &[Field<'_>] = if told.status == Some(405) { &[(b"allow", METHODS)] } else { &[] };
    respond_with(head, responder, told, allow)?;
    Ok(())
}

/// The exchange's first message, and what was already read of the body beyond it.
struct FirstMessage {
    message: Message,
    waiting: Waiting,
}

/// Body frames that were read and not sent yet; `None` among them is the end.
type Waiting = VecDeque<Option<Result<Frame, Reset>>>;

/// Head, and body where it is there: a small request is one message.
fn first_message(head: &RequestHead<'_>, body: &mut Body, cx: &mut Context<'_>) -> FirstMessage {
    let mut waiting = Waiting::new();
    let mut first = Buf::new();
    let mut end = head.ends();
    if !end {
        // What is there already, without waiting for more.
        loop {
            match body.poll_frame(cx) {
                Poll::Ready(None) if waiting.is_empty() => {
                    end = true;
                    break;
                }
                Poll::Ready(Some(Ok(Frame::Data { bytes, end: last })))
                    if first.is_empty() && bytes.len() <= BODY_BYTES_MAX =>
                {
                    first = bytes;
                    if last {
                        end = true;
                        break;
                    }
                }
                Poll::Ready(frame) => {
                    waiting.push_back(frame);
                    break;
                }
                Poll::Pending => break,
            }
        }
    }
    let content_length = if head.ends() {
        Some(0)
    } else if end {
        Some(first.len() as u64)
    } else {
        body.length()
    };
    let message = Message {
        field: FIELD_REQUEST,
        end,
        head: encode_head(head, content_length, first.len()),
        body: first,
    };
    FirstMessage { message, waiting }
}

fn encode_head(head: &RequestHead<'_>, content_length: Option<u64>, body_len: usize) -> Buf {
    let nominated = Nominated::scan(head.headers());
    let mut size = FieldsSize::default();
    for (name, value) in head.headers() {
        size.add(name.len(), value.len());
    }
    let fields = head.headers().filter_map(|(name, value)| match fields::kind(name) {
        Kind::EndToEnd | Kind::Forwarded => (!nominated.contains(name)).then_some((name, value)),
        Kind::Te if fields::te_trailers(value) => Some((name, &b"trailers"[..])),
        // A length of 0 says something of its own: a body there could be, and is not.
        Kind::ContentLength if content_length == Some(0) => Some((name, &b"0"[..])),
        Kind::Expect if !head.expects_continue() => Some((name, value)),
        Kind::HopByHop | Kind::Te | Kind::ContentLength | Kind::Host | Kind::Expect => None,
    });
    let request = payload::RequestHead {
        method: head.method(),
        target: head.target(),
        authority: head.authority(),
        version: head.version(),
        content_length,
        expect_continue: head.expects_continue(),
    };
    payload::encode_request(request, fields, size, body_len)
}

/// Sends the rest of the request's body.
async fn upload(
    body: &mut Body,
    send: &mut SendHalf,
    mut waiting: Waiting,
    sending: &AtomicBool,
) -> Sent {
    loop {
        let frame = poll_fn(|cx| {
            if send.poll_closed(cx).is_ready() {
                return Poll::Ready(Err(Sent::Over));
            }
            if let Some(frame) = waiting.pop_front() {
                return Poll::Ready(Ok(frame));
            }
            body.poll_frame(cx).map(Ok)
        })
        .await;
        sending.store(true, Ordering::Relaxed);
        let (sent, end) = match frame {
            Ok(Some(Ok(Frame::Data { bytes, end }))) => {
                (send_data(send, bytes, end).await.is_ok(), end)
            }
            Ok(Some(Ok(Frame::Trailers(trailers)))) => {
                let fields =
                    trailers.iter().filter(|(name, _)| fields::kind(name) == Kind::EndToEnd);
                let head = body::encode_trailers(fields);
                if head.len() > OPEN_BYTES_MAX {
                    return Sent::TooLarge;
                }
                let message = Message { field: FIELD_TRAILERS, end: true, head, body: Buf::new() };
                (send.send(message).await.is_ok(), true)
            }
            Ok(Some(Err(reset))) => return Sent::ClientGone(reset),
            Ok(None) => (send.finish().is_ok(), true),
            Err(sent) => return sent,
        };
        match (sent, end) {
            (false, _) => return Sent::Over,
            (true, true) => return Sent::All,
            (true, false) => {}
        }
    }
}

/// Sends `bytes` in messages of at most [`BODY_BYTES_MAX`].
async fn send_data(send: &mut SendHalf, mut bytes: Buf, end: bool) -> Result<(), Reset> {
    while bytes.len() > BODY_BYTES_MAX {
        let part = bytes.split_to(BODY_BYTES_MAX);
        send.send(data_message(part, false)).await?;
    }
    if bytes.is_empty() && !end {
        return Ok(());
    }
    send.send(data_message(bytes, end)).await
}

/// The response's direction.
struct Download<'a> {
    recv: RecvHalf,
    responder: Responder,
    head: &'a RequestHead<'a>,
    /// Set once the client's body is sure to come: it was told to continue, never asked, or has begun
    /// to send all the same (RFC 9110 §10.1.1: no client waits for ever).
    sending: &'a AtomicBool,
    /// The response's head was sent.
    begun: bool,
}

impl Download<'_> {
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
                Ok(Some(Err(reset))) => return End::Failed(reset),
                Ok(None) => return self.finish(),
                Err(reset) => return End::ClientGone(reset),
            };
            let end = message.end;
            let passed = match message.field {
                FIELD_RESPONSE => self.response(&message),
                FIELD_BODY if self.begun => self.data(message).await,
                FIELD_TRAILERS if self.begun && end => self.trailers(&message.body),
                _ => Err(invalid()),
            };
            match passed {
                Ok(()) if end && self.begun => return End::Complete,
                Ok(()) if end => return invalid(),
                Ok(()) => {}
                Err(end) => return end,
            }
        }
    }

    /// An interim or the final head.
    fn response(&mut self, message: &Message) -> Result<(), End> {
        let response = payload::decode_response(&message.body).map_err(|_| invalid())?;
        let status = u16::try_from(response.status).map_err(|_| invalid())?;
        let nominated = Nominated::scan(response.headers.iter());
        match status {
            100 | 102..=199 if !self.begun && !message.end => {
                if self.head.version() == 10 {
                    // HTTP/1.0 has no interim responses (RFC 9110 §15.2).
                    return Ok(());
                }
                let mut headers = HeaderList::with_capacity(response.headers.count);
                headers.extend(
                    response.headers.iter().filter(|(name, _)| fields::passes(name, &nominated)),
                );
                let told = self.responder.informational(status, &headers);
                if status == 100 {
                    self.sending.store(true, Ordering::Relaxed);
                }
                // A transport that cannot send one drops it; a lost client shows on its own.
                let _ = told;
                Ok(())
            }
            200..=999 if !self.begun => {
                let first = message.body.slice(response.body);
                let bodiless = self.head.method() == "HEAD" || matches!(status, 204 | 304);
                if bodiless && !(message.end && first.is_empty()) {
                    return Err(invalid());
                }
                let mut headers = HeaderList::with_capacity(response.headers.count + 1);
                headers.extend(response.headers.iter().filter(|(name, value)| {
                    fields::passes(name, &nominated)
                        // Without a body, it tells what the body would be (RFC 9110 §8.6).
                        || (bodiless
                            && fields::kind(name) == Kind::ContentLength
                            && fields::content_length(value).is_some())
                }));
                let body_length = match response.content_length {
                    _ if bodiless => None,
                    Some(length) => Some(length),
                    None => message.end.then_some(first.len() as u64),
                };
                let head = ResponseHead { status, headers: &headers, body_length };
                let first = (!first.is_empty()).then_some(first);
                self.begun = true;
                self.responder.head(head, first, message.end).map_err(|_| gone())
            }
            _ => Err(invalid()),
        }
    }

    async fn data(&mut self, message: Message) -> Result<(), End> {
        let range = body::decode_body(&message.body).map_err(|_| invalid())?;
        let chunk = message.body.slice(range);
        if chunk.is_empty() {
            return if message.end {
                self.responder.finish(None).map_err(|_| gone())
            } else {
                Ok(())
            };
        }
        self.responder.body(chunk, message.end).await.map_err(|_| gone())
    }

    fn trailers(&mut self, payload: &[u8]) -> Result<(), End> {
        let trailers = body::decode_trailers(payload).map_err(|_| invalid())?;
        let mut headers = HeaderList::with_capacity(trailers.count);
        headers.extend(trailers.iter().filter(|(name, _)| fields::kind(name) == Kind::EndToEnd));
        self.responder.finish(Some(&headers)).map_err(|_| gone())
    }

    /// The direction ended without a message that says so.
    fn finish(&mut self) -> End {
        if !self.begun {
            return invalid();
        }
        match self.responder.finish(None) {
            Ok(()) => End::Complete,
            Err(_) => gone(),
        }
    }
}

/// The sidecar's end sent what this plugin does not say.
const fn invalid() -> End {
    End::Failed(Reset::new(failure::PLUGIN_FAILED))
}

const fn gone() -> End {
    End::ClientGone(Reset::new(failure::CLIENT_GONE))
}

//! The relay's end of the handshake: an upgrade becomes a `WebSocketRequest`, the service's answer
//! the client's response.

use std::future::poll_fn;
use std::task::Poll;

use bytes::Bytes;
use sidelane_http_born::body::{self, FIELD_BODY, FIELD_TRAILERS};
use sidelane_http_born::failure::{Told, answer, respond_with};
use sidelane_http_born::fields::{self, Kind, Nominated};
use sidelane_http_born::wire::{Field, FieldsSize};
use sidelane_plugin::{
    Buf, ByteStream, Error, Failure, HeaderList, Message, Opener, RecvHalf, Request, RequestHead,
    Reset, Responder, ResponseHead, RouteKey, failure,
};

use crate::WebSocket;
use crate::carry::Side;
use crate::handshake::{self, Fault};
use crate::payload::{self, FIELD_REQUEST, FIELD_RESPONSE, HEAD_BYTES_MAX, Response};
use crate::raw::{Accepted, Connection};

const BAD_VERSION: &str = "this is no version 13 handshake";
const BAD_KEY: &str = "sec-websocket-key is not 16 bytes in base64";
const BAD_BODY: &str = "a handshake has no body";

/// Opens the exchange and carries the handshake. Returns the connection where the service accepts
/// it; `None`: the client has its answer.
pub(crate) async fn handshake<'a>(
    plugin: &'a WebSocket,
    request: Request<'_>,
    mut responder: Responder,
    mut opener: Opener<'_>,
) -> Result<Option<Connection<'a>>, Error> {
    let Request { head, body, .. } = request;
    if !handshake::is_asked(&head) {
        let told = Told { detail: "not a WebSocket handshake", ..Told::code(failure::BAD_REQUEST) };
        respond(plugin, &head, &mut responder, "", &told, &[])?;
        return Ok(None);
    }
    let key = match handshake::check(&head) {
        Ok(key) => key,
        Err(fault) => {
            refuse_fault(plugin, &head, &mut responder, fault)?;
            return Ok(None);
        }
    };
    let Some(permit) = plugin.connections.try_take(&plugin.host) else {
        let told = Told {
            detail: "this relay carries as many WebSockets as it may",
            ..Told::code(failure::OVERLOADED)
        };
        respond(plugin, &head, &mut responder, "", &told, &[])?;
        return Ok(None);
    };
    let path = head.target().split(|byte| *byte == b'?').next().unwrap_or_default();
    let route_key = RouteKey::Host { host: head.authority(), path };
    let exchange = match opener.open(route_key).await {
        Ok(exchange) => exchange,
        Err(failure) => {
            refuse(plugin, &head, &mut responder, "", &failure)?;
            return Ok(None);
        }
    };
    let (mut send, mut recv, meta) = exchange.split();
    let message = encode(&head);
    if message.head.len() > HEAD_BYTES_MAX {
        send.reset(Reset::new(failure::TOO_LARGE));
        let told = Told {
            status: Some(431),
            detail: "the handshake's head is larger than allowed",
            ..Told::code(failure::TOO_LARGE)
        };
        respond(plugin, &head, &mut responder, meta.route(), &told, &[])?;
        return Ok(None);
    }
    // Where the exchange is over already, the receiving half says why.
    let _ = send.send(message).await;

    let mut timer = plugin.host.timer(plugin.host.now() + plugin.config.handshake_timeout);
    let answer = poll_fn(|cx| {
        if let Poll::Ready(received) = recv.poll_recv(cx) {
            return Poll::Ready(match received {
                Some(Ok(message)) => Ok(message),
                Some(Err(reset)) => Err(Told::code(reset.code)),
                None => Err(invalid()),
            });
        }
        if responder.poll_closed(cx).is_ready() {
            return Poll::Ready(Err(Told::code(failure::CLIENT_GONE)));
        }
        timer.poll_fired(cx).map(|()| {
            let detail = "the service did not answer the handshake in time";
            Err(Told { detail, ..Told::code(failure::SERVICE_TIMEOUT) })
        })
    })
    .await;
    drop(timer);
    let message = match answer {
        Ok(message) => message,
        Err(told) => {
            send.reset(Reset::new(told.code));
            if told.code != failure::CLIENT_GONE {
                respond(plugin, &head, &mut responder, meta.route(), &told, &[])?;
            }
            return Err(Error::new(told.code, "the handshake failed"));
        }
    };
    let response = match read(&head, &message) {
        Ok(response) => response,
        Err(told) => {
            send.reset(Reset::new(told.code));
            respond(plugin, &head, &mut responder, meta.route(), &told, &[])?;
            return Err(Error::new(told.code, "the service's end sent an invalid answer"));
        }
    };
    if !response.accepted {
        let _ = send.finish();
        plugin.metrics.refused(meta.route(), status_of(&response));
        pass_refusal(&message, &response, &mut responder, &mut recv).await?;
        return Ok(None);
    }
    let extended = handshake::extended(response.headers.iter());
    let stream = match switch(&head, key, &response, &mut responder).await {
        Ok(stream) => stream,
        Err(error) => {
            send.reset(Reset::new(failure::CLIENT_GONE));
            return Err(error);
        }
    };
    // Over HTTP/2 the request's body is the stream that was handed over.
    drop(body);
    let route = plugin.metrics.route(meta.route());
    let options = route.options(meta.options());
    let accepted = Accepted {
        plugin,
        side: Side::Client,
        ahead: Bytes::new(),
        send,
        recv,
        extended,
        options,
        open: Some(route.opened()),
        permit,
    };
    Ok(Some(accepted.over(stream)))
}

/// Says `failure` in HTTP's words.
pub(crate) fn refuse(
    plugin: &WebSocket,
    head: &RequestHead<'_>,
    responder: &mut Responder,
    route: &str,
    failure: &Failure,
) -> Result<(), Error> {
    let told = Told {
        code: failure.code,
        status: None,
        retry_after_s: failure.retry_after_s.unwrap_or(0),
        detail: &failure.detail,
    };
    respond(plugin, head, responder, route, &told, &[])
}

fn refuse_fault(
    plugin: &WebSocket,
    head: &RequestHead<'_>,
    responder: &mut Responder,
    fault: Fault,
) -> Result<(), Error> {
    let told = |status, detail| Told { status, detail, ..Told::code(failure::BAD_REQUEST) };
    match fault {
        Fault::Version => {
            // RFC 6455 §4.2.2, RFC 9110 §15.5.22.
            let extra: &[Field<'_>] = &[
                (b"sec-websocket-version", b"13"),
                (b"upgrade", b"websocket"),
                (b"connection", b"upgrade"),
            ];
            let extra = if head.version() == 20 { &extra[..1] } else { extra };
            respond(plugin, head, responder, "", &told(Some(426), BAD_VERSION), extra)
        }
        Fault::Key => respond(plugin, head, responder, "", &told(None, BAD_KEY), &[]),
        Fault::Body => respond(plugin, head, responder, "", &told(None, BAD_BODY), &[]),
    }
}

fn respond(
    plugin: &WebSocket,
    head: &RequestHead<'_>,
    responder: &mut Responder,
    route: &str,
    told: &Told<'_>,
    extra: &[Field<'_>],
) -> Result<(), Error> {
    plugin.metrics.refused(route, answer(told, false).status);
    respond_with(head, responder, told, extra)?;
    Ok(())
}

/// The sidecar's end sent what this plugin does not say.
const fn invalid() -> Told<'static> {
    Told::code(failure::PLUGIN_FAILED)
}

fn encode(head: &RequestHead<'_>) -> Message {
    let nominated = Nominated::scan(head.headers());
    let mut size = FieldsSize::default();
    let mut offered = Vec::new();
    for (name, value) in head.headers() {
        size.add(name.len(), value.len());
        if name == handshake::PROTOCOL {
            if !offered.is_empty() {
                offered.extend_from_slice(b", ");
            }
            offered.extend_from_slice(value);
        }
    }
    let fields = head.headers().filter(|(name, _)| handshake::passes(name, &nominated));
    let payload = payload::encode_request(
        head.target(),
        head.authority(),
        fields,
        size,
        &offered,
        head.version(),
    );
    Message { field: FIELD_REQUEST, end: false, head: payload, body: Buf::new() }
}

/// Reads and checks the answer.
fn read<'a>(head: &RequestHead<'_>, message: &'a Message) -> Result<Response<'a>, Told<'static>> {
    if message.field != FIELD_RESPONSE {
        return Err(invalid());
    }
    let response = payload::decode_response(&message.body).map_err(|_| invalid())?;
    match response.status {
        101 if response.accepted && !message.end => Ok(response),
        // A success there would be taken for an accepted handshake (RFC 8441 §5).
        200..=299 if !response.accepted && head.version() == 20 => {
            let detail = "the service answered the handshake as if it were a plain request";
            Err(Told { detail, ..Told::code(failure::SERVICE_INVALID) })
        }
        200..=999 if !response.accepted => Ok(response),
        _ => Err(invalid()),
    }
}

fn status_of(response: &Response<'_>) -> u16 {
    u16::try_from(response.status).unwrap_or(502)
}

/// Answers 101, or 200 over HTTP/2, and takes the client's bytes.
async fn switch(
    head: &RequestHead<'_>,
    key: Option<&[u8]>,
    response: &Response<'_>,
    responder: &mut Responder,
) -> Result<ByteStream, Error> {
    {
        let accept = key.map(handshake::accept);
        let mut headers = HeaderList::with_capacity(response.headers.count + 4);
        if let Some(accept) = &accept {
            headers.push(b"upgrade", b"websocket");
            headers.push(b"connection", b"Upgrade");
            headers.push(b"sec-websocket-accept", accept.as_bytes());
        }
        if !response.subprotocol.is_empty() {
            headers.push(handshake::PROTOCOL, response.subprotocol);
        }
        let nominated = Nominated::scan(response.headers.iter());
        headers.extend(
            response.headers.iter().filter(|(name, _)| handshake::passes(name, &nominated)),
        );
        let over_h2 = head.version() == 20;
        let status = if over_h2 { 200 } else { 101 };
        let head = ResponseHead { status, headers: &headers, body_length: None };
        responder.head(head, None, !over_h2)?;
    }
    responder.upgrade().await
}

/// Passes the service's refusal as it is.
async fn pass_refusal(
    message: &Message,
    response: &Response<'_>,
    responder: &mut Responder,
    recv: &mut RecvHalf,
) -> Result<(), Error> {
    let status = status_of(response);
    {
        let first = message.body.slice(response.body.clone());
        let nominated = Nominated::scan(response.headers.iter());
        let mut headers = HeaderList::with_capacity(response.headers.count);
        headers
            .extend(response.headers.iter().filter(|(name, _)| fields::passes(name, &nominated)));
        let body_length =
            response.content_length.or_else(|| message.end.then_some(first.len() as u64));
        let head = ResponseHead { status, headers: &headers, body_length };
        responder.head(head, (!first.is_empty()).then_some(first), message.end)?;
    }
    if message.end {
        return Ok(());
    }
    loop {
        let received = poll_fn(|cx| {
            if let Poll::Ready(received) = recv.poll_recv(cx) {
                return Poll::Ready(received);
            }
            responder.poll_closed(cx).map(|reset| Some(Err(reset)))
        })
        .await;
        let message = match received {
            Some(Ok(message)) => message,
            Some(Err(reset)) => return Err(reset.into()),
            None => {
                responder.finish(None)?;
                return Ok(());
            }
        };
        let end = message.end;
        match message.field {
            FIELD_BODY => {
                let range = body::decode_body(&message.body).map_err(|_| malformed())?;
                let chunk = message.body.slice(range);
                if !chunk.is_empty() {
                    responder.body(chunk, end).await?;
                } else if end {
                    responder.finish(None)?;
                }
            }
            FIELD_TRAILERS if end => {
                let trailers = body::decode_trailers(&message.body).map_err(|_| malformed())?;
                let mut headers = HeaderList::with_capacity(trailers.count);
                headers.extend(
                    trailers.iter().filter(|(name, _)| fields::kind(name) == Kind::EndToEnd),
                );
                responder.finish(Some(&headers))?;
            }
            _ => return Err(malformed()),
        }
        if end {
            return Ok(());
        }
    }
}

fn malformed() -> Error {
    Error::new(failure::PLUGIN_FAILED, "the sidecar's end sent what this plugin does not say")
}

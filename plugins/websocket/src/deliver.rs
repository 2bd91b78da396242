//! The sidecar's end of the handshake: a `WebSocketRequest` becomes an HTTP/1.1 upgrade at the
//! service, its answer a `WebSocketResponse`.

use std::future::{Future, poll_fn};
use std::pin::{Pin, pin};
use std::task::{Context, Poll};

use bytes::Bytes;
use http::header::{
    CONNECTION, HOST, HeaderMap, HeaderName, HeaderValue, SEC_WEBSOCKET_ACCEPT, SEC_WEBSOCKET_KEY,
    SEC_WEBSOCKET_PROTOCOL, SEC_WEBSOCKET_VERSION, UPGRADE,
};
use http::uri::PathAndQuery;
use http::{Request, Response, StatusCode, Uri, Version};
use http_body::Body;
use http_body_util::Empty;
use hyper::body::Incoming;
use hyper::client::conn::http1;
use sidelane_http_born::body::{self, BODY_BYTES_MAX, FIELD_TRAILERS, data_message};
use sidelane_http_born::fields::{self, Kind, Nominated};
use sidelane_http_born::forwarded::{self, Seen};
use sidelane_http_born::retry::{self, Backoff};
use sidelane_http_born::wire::{Field, FieldsSize};
use sidelane_plugin::{
    Buf, ByteStream, Error, Exchange, Message, Meta, OPEN_BYTES_MAX, RecvHalf, Reset, SendHalf,
    Service, Timer, failure,
};

use crate::WebSocket;
use crate::carry::Side;
use crate::handshake;
use crate::options::Options;
use crate::payload::{self, FIELD_REQUEST, FIELD_RESPONSE};
use crate::raw::{self, Accepted};

/// Most bytes of a response's head, as the fronts allow a request.
const HEAD_BYTES_MAX: usize = 64 * 1024;

/// Most fields of a response's head, as the fronts allow a request.
const HEAD_FIELDS_MAX: usize = 128;

/// Fields added to those that came: host, upgrade, connection, three of the handshake, five that
/// tell of the client.
const FIELDS_ADDED: usize = 12;

/// Why there is no connection.
enum Stop {
    /// The peer reset the exchange: there is nobody to tell.
    Gone(Reset),
    /// The peer is told the code.
    Failed(u32, String),
}

fn failed(code: u32, text: impl Into<String>) -> Stop {
    Stop::Failed(code, text.into())
}

/// Carries the handshake. Returns the connection where the service accepts it; `None`: it refused,
/// and its refusal has gone back.
pub(crate) async fn handshake<'a>(
    plugin: &'a WebSocket,
    exchange: Exchange<'_>,
    service: Service,
) -> Result<Option<raw::Connection<'a>>, Error> {
    let (mut send, mut recv, meta) = exchange.split();
    let first = match recv.recv().await {
        Some(Ok(message)) if message.field == FIELD_REQUEST => message,
        Some(Ok(_)) | None => {
            send.refused(Reset::new(failure::BAD_REQUEST));
            return Err(Error::new(
                failure::BAD_REQUEST,
                "the exchange does not begin with a handshake",
            ));
        }
        Some(Err(reset)) => return Err(reset.into()),
    };
    let mut dispatched = false;
    match shake(plugin, &first, &meta, &service, &mut send, &mut dispatched).await {
        Ok(Shaken::Accepted { stream, ahead, extended, permit }) => {
            let options = Options::from_text(meta.options());
            let side = Side::Service;
            let open = None;
            let accepted =
                Accepted { plugin, side, ahead, send, recv, extended, options, open, permit };
            Ok(Some(accepted.over(stream)))
        }
        Ok(Shaken::Refused) => {
            finish(recv);
            Ok(None)
        }
        Err(Stop::Gone(reset)) => Err(reset.into()),
        Err(Stop::Failed(code, text)) => {
            let reset = Reset::new(code);
            if dispatched {
                send.reset(reset);
            } else {
                send.refused(reset);
            }
            Err(Error::new(code, text))
        }
    }
}

/// After the answer nothing more is wanted of the client.
fn finish(recv: RecvHalf) {
    drop(recv);
}

/// How the service answered.
enum Shaken {
    Accepted {
        stream: ByteStream,
        /// What came behind the head.
        ahead: Bytes,
        extended: bool,
        permit: crate::connections::Permit,
    },
    /// Its refusal has been passed on.
    Refused,
}

async fn shake(
    plugin: &WebSocket,
    first: &Message,
    meta: &Meta<'_>,
    service: &Service,
    send: &mut SendHalf,
    dispatched: &mut bool,
) -> Result<Shaken, Stop> {
    let payload = first.body.to_bytes();
    let asked = payload::decode_request(&payload)
        .map_err(|error| failed(failure::BAD_REQUEST, error.to_string()))?;
    let key = handshake::key().map_err(|error| failed(failure::INTERNAL, error))?;
    let request = request(&payload, &asked, meta, &key)?;
    let permit = plugin.connections.try_take(&plugin.host).ok_or_else(|| {
        failed(failure::OVERLOADED, "this sidecar carries as many WebSockets as it may")
    })?;
    let limit = meta.response_head_timeout().unwrap_or(plugin.config.handshake_timeout);
    let end = plugin.host.now() + limit;
    let end = meta.deadline().map_or(end, |deadline| end.min(deadline));
    let mut timer = plugin.host.timer(end);
    let stream = connect(plugin, service, send, &mut timer).await?;
    send.dispatched();
    *dispatched = true;

    let (mut sender, mut connection) = http1::Builder::new()
        .max_headers(HEAD_FIELDS_MAX)
        .max_buf_size(HEAD_BYTES_MAX)
        .handshake::<_, Empty<Bytes>>(stream)
        .await
        .map_err(|error| failed(failure::SERVICE_RESET, error.to_string()))?;
    // hyper's connection is driven in this task. After its end it is not polled again.
    let mut driven = false;
    let response = {
        let mut response = pin!(sender.send_request(request));
        poll_fn(|cx| {
            drive(&mut connection, &mut driven, cx);
            if let Poll::Ready(response) = response.as_mut().poll(cx) {
                return Poll::Ready(response.map_err(|error| no_response(&error)));
            }
            interrupted(cx, send, &mut timer)
        })
        .await?
    };
    if response.status() != StatusCode::SWITCHING_PROTOCOLS {
        refuse(response, &mut connection, &mut driven, send).await?;
        return Ok(Shaken::Refused);
    }
    let fault = verify(&response, &key);
    if let Some(fault) = fault {
        return Err(failed(failure::SERVICE_INVALID, format!("the service's 101 {fault}")));
    }
    // The request is written and the head read: hyper lets go of the stream at once.
    poll_fn(|cx| {
        drive(&mut connection, &mut driven, cx);
        if driven { Poll::Ready(Ok(())) } else { interrupted(cx, send, &mut timer) }
    })
    .await?;
    let parts = connection.into_parts();
    let fields = || {
        let map = response.headers().iter();
        map.map(|(name, value)| (name.as_str().as_bytes(), value.as_bytes()))
    };
    let extended = handshake::extended(fields());
    let message = head_message(&response, true, None, false);
    send_or_stop(send, message).await?;
    Ok(Shaken::Accepted { stream: parts.io, ahead: parts.read_buf, extended, permit })
}

/// Dials the service, and again where it cannot be reached and the route's budget allows: nothing was
/// sent to it.
async fn connect(
    plugin: &WebSocket,
    service: &Service,
    send: &mut SendHalf,
    timer: &mut Timer,
) -> Result<ByteStream, Stop> {
    let retries = service.settings().retries > 0;
    let mut backoff = Backoff::default();
    loop {
        let mut connecting = service.connect();
        let connected = poll_fn(|cx| {
            if let Poll::Ready(connected) = Pin::new(&mut connecting).poll(cx) {
                return Poll::Ready(Ok(connected));
            }
            interrupted(cx, send, timer)
        })
        .await?;
        match connected {
            Ok(stream) => return Ok(stream),
            Err(_) if retries && service.retry() => {}
            Err(error) => return Err(failed(error.code, error.to_string())),
        }
        let host = plugin.host;
        let mut wait = host.timer(host.now() + backoff.next(retry::random()));
        poll_fn(|cx| {
            if wait.poll_fired(cx).is_ready() {
                return Poll::Ready(Ok(()));
            }
            interrupted(cx, send, timer)
        })
        .await?;
    }
}

type Connection = http1::Connection<ByteStream, Empty<Bytes>>;

fn drive(connection: &mut Connection, driven: &mut bool, cx: &mut Context<'_>) {
    if !*driven {
        // How it failed is told where the response is waited for.
        *driven = connection.poll_without_shutdown(cx).is_ready();
    }
}

/// Ready where nobody waits any more, or the time is up.
fn interrupted<T>(
    cx: &mut Context<'_>,
    send: &mut SendHalf,
    timer: &mut Timer,
) -> Poll<Result<T, Stop>> {
    if let Poll::Ready(reset) = send.poll_closed(cx) {
        return Poll::Ready(Err(Stop::Gone(reset)));
    }
    timer.poll_fired(cx).map(|()| {
        let text = "the service did not answer the handshake in time";
        Err(failed(failure::SERVICE_TIMEOUT, text))
    })
}

fn no_response(error: &hyper::Error) -> Stop {
    if error.is_parse() {
        let text = format!("the service's answer to the handshake is invalid: {error}");
        return failed(failure::SERVICE_INVALID, text);
    }
    failed(failure::SERVICE_RESET, format!("the service closed before its answer: {error}"))
}

async fn send_or_stop(send: &mut SendHalf, message: Message) -> Result<(), Stop> {
    if message.head.len() > OPEN_BYTES_MAX {
        return Err(failed(failure::SERVICE_INVALID, "the service's head is too large"));
    }
    send.send(message).await.map_err(Stop::Gone)
}

/// Makes the request for the service.
fn request(
    payload: &Bytes,
    asked: &payload::Request<'_>,
    meta: &Meta<'_>,
    key: &str,
) -> Result<Request<Empty<Bytes>>, Stop> {
    let invalid = |what: &str| failed(failure::BAD_REQUEST, format!("{what} cannot be sent on"));
    let value = |bytes: &[u8]| {
        HeaderValue::from_maybe_shared(payload.slice_ref(bytes))
            .map_err(|_| invalid("a field's value"))
    };
    let mut headers = HeaderMap::with_capacity(asked.headers.count + FIELDS_ADDED);
    let authority = value(asked.host)?;
    headers.insert(HOST, authority.clone());
    headers.insert(UPGRADE, HeaderValue::from_static("websocket"));
    headers.insert(CONNECTION, HeaderValue::from_static("Upgrade"));
    let nominated = Nominated::scan(asked.headers.iter());
    let seen = Seen::of(meta);
    for (name, field) in asked.headers.iter() {
        if handshake::passes_to_service(name, &nominated, seen.passes_forwarded()) {
            let name = HeaderName::from_bytes(name).map_err(|_| invalid("a field's name"))?;
            headers.append(name, value(field)?);
        }
    }
    if !asked.subprotocol.is_empty() {
        headers.insert(SEC_WEBSOCKET_PROTOCOL, value(asked.subprotocol)?);
    }
    let key = HeaderValue::from_str(key).map_err(|_| invalid("the key"))?;
    headers.insert(SEC_WEBSOCKET_KEY, key);
    headers.insert(SEC_WEBSOCKET_VERSION, HeaderValue::from_static("13"));
    forwarded::write(&mut headers, seen, &authority);
    forwarded::add_via(&mut headers, asked.version);

    let mut request = Request::new(Empty::new());
    *request.uri_mut() = target(payload, asked.url).ok_or_else(|| invalid("the target"))?;
    *request.headers_mut() = headers;
    Ok(request)
}

/// What does not come out as it went in (a fragment is cut off) is not passed on as something else.
fn target(payload: &Bytes, url: &[u8]) -> Option<Uri> {
    if url == b"/" {
        return Some(Uri::from_static("/"));
    }
    let target = PathAndQuery::from_maybe_shared(payload.slice_ref(url)).ok()?;
    (url.first() == Some(&b'/') && target.as_str().as_bytes() == url).then(|| target.into())
}

/// Says what is wrong with a 101 (RFC 6455 §4.1).
fn verify(response: &Response<Incoming>, key: &str) -> Option<&'static str> {
    let fields = || {
        let map = response.headers().iter();
        map.map(|(name, value)| (name.as_str().as_bytes(), value.as_bytes()))
    };
    if response.version() != Version::HTTP_11 {
        return Some("is not HTTP/1.1");
    }
    if !handshake::names(fields(), b"upgrade", b"websocket") {
        return Some("does not upgrade to websocket");
    }
    if !handshake::names(fields(), b"connection", b"upgrade") {
        return Some("does not name upgrade in Connection");
    }
    let mut accepts = response.headers().get_all(SEC_WEBSOCKET_ACCEPT).iter();
    let expected = handshake::accept(key.as_bytes());
    match (accepts.next(), accepts.next()) {
        (Some(accept), None) if accept.as_bytes().trim_ascii() == expected.as_bytes() => None,
        _ => Some("does not prove that it saw the key"),
    }
}

fn head_message<B>(
    response: &Response<B>,
    accepted: bool,
    content_length: Option<u64>,
    end: bool,
) -> Message {
    let fields = || {
        let map = response.headers().iter();
        map.map(|(name, value)| (name.as_str().as_bytes(), value.as_bytes()))
    };
    let version = if response.version() == Version::HTTP_10 { 10 } else { 11 };
    let via: Field<'_> = (b"via", forwarded::via(version).as_bytes());
    let nominated = Nominated::scan(fields());
    let mut size = FieldsSize::default();
    for (name, value) in fields().chain([via]) {
        size.add(name.len(), value.len());
    }
    let passing = fields()
        .filter(|(name, _)| {
            if accepted {
                handshake::passes(name, &nominated)
            } else {
                fields::passes(name, &nominated)
            }
        })
        .chain([via]);
    let chosen = response.headers().get(SEC_WEBSOCKET_PROTOCOL).filter(|_| accepted);
    let head = payload::encode_response(
        response.status().as_u16(),
        passing,
        size,
        chosen.map_or(&[], |value| value.as_bytes()),
        accepted,
        content_length,
    );
    Message { field: FIELD_RESPONSE, end, head, body: Buf::new() }
}

/// Passes a refusal on, body and trailers with it.
async fn refuse(
    mut response: Response<Incoming>,
    connection: &mut Connection,
    driven: &mut bool,
    send: &mut SendHalf,
) -> Result<(), Stop> {
    let length = response.body().size_hint().exact();
    let ended = response.body().is_end_stream();
    send_or_stop(send, head_message(&response, false, length, ended)).await?;
    if ended {
        return Ok(());
    }
    let body = response.body_mut();
    loop {
        let frame = poll_fn(|cx| {
            loop {
                if let Poll::Ready(frame) = Pin::new(&mut *body).poll_frame(cx) {
                    return Poll::Ready(Ok(frame));
                }
                let before = *driven;
                drive(connection, driven, cx);
                if let Poll::Ready(frame) = Pin::new(&mut *body).poll_frame(cx) {
                    return Poll::Ready(Ok(frame));
                }
                if *driven == before {
                    return send.poll_closed(cx).map(|reset| Err(Stop::Gone(reset)));
                }
            }
        })
        .await?;
        match frame {
            None => {
                let _ = send.finish();
                return Ok(());
            }
            Some(Ok(frame)) => match frame.into_data() {
                Ok(mut data) => {
                    while !data.is_empty() {
                        let part = data.split_to(data.len().min(BODY_BYTES_MAX));
                        send_or_stop(send, data_message(part.into(), false)).await?;
                    }
                }
                Err(frame) => {
                    let Ok(trailers) = frame.into_trailers() else { continue };
                    let fields = trailers
                        .iter()
                        .map(|(name, value)| (name.as_str().as_bytes(), value.as_bytes()))
                        .filter(|(name, _)| fields::kind(name) == Kind::EndToEnd);
                    let head = body::encode_trailers(fields);
                    let message =
                        Message { field: FIELD_TRAILERS, end: true, head, body: Buf::new() };
                    return send_or_stop(send, message).await;
                }
            },
            Some(Err(error)) => {
                let text = format!("the service broke off its refusal: {error}");
                return Err(failed(failure::SERVICE_RESET, text));
            }
        }
    }
}

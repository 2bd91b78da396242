//! Sidecars that come to the tunnel's own address by HTTP: a WebSocket's upgrade on HTTP/1.1, gRPC streams
//! on HTTP/2, as a proxy that only passes HTTP lets them through. Everybody else who asks by HTTP is told
//! what this port is.
//!
//! Knows requests, and whom a trusted proxy speaks for; the handshake of the tunnel is `tunnels`' business.

use std::convert::Infallible;
use std::io;
use std::net::{IpAddr, Ipv4Addr, SocketAddr};
use std::pin::pin;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use bytes::Bytes;
use h2::RecvStream;
use h2::server::{self, SendResponse};
use http::header::{
    CONNECTION, CONTENT_LENGTH, CONTENT_TYPE, HeaderValue, ORIGIN, RETRY_AFTER, TRANSFER_ENCODING,
    UPGRADE,
};
use http::{Method, Request, Response, StatusCode};
use http_body_util::Full;
use hyper::server::conn::http1;
use hyper::service::service_fn;
use hyper::upgrade::{self, OnUpgrade};
use hyper_util::rt::TokioIo;
use rustls::pki_types::CertificateDer;
use tokio::sync::Notify;
use tokio::time::{Instant, sleep_until, timeout, timeout_at};
use tokio_tungstenite::tungstenite::handshake::server::create_response_with_body;

use super::Relay;
use super::door::{self, Place};
use super::tunnels::{failed, shake_hands};
use crate::random;
use crate::tunnel::carrier::grpc::{self, GrpcStream};
use crate::tunnel::carrier::websocket::WebSocketStream;
use crate::tunnel::carrier::{GRPC_PATH, WEBSOCKET_PATH};
use crate::tunnel::dial;
use crate::tunnel::gate::TurnedAway;
use crate::tunnel::transport::{Movable as _, Transport};

/// Largest head of a request. A sidecar's is below 1 KiB; proxies add fields of theirs.
const HEAD_BYTES_MAX: usize = 16 * 1024;

/// gRPC streams of one connection at once, each a lane: an ingress may bring those of many sidecars.
const STREAMS_MAX: u32 = 256;

/// Largest HTTP/2 frame that is taken: a batch of the sidecar's, and its head. Its memory is reserved when
/// the frame begins, so with [`HANDSHAKES_MAX`](crate::tunnel::accept::HANDSHAKES_MAX) it bounds what
/// strangers cost.
const FRAME_BYTES_MAX: u32 = 160 * 1024;

/// What a stream may have on its way before a lane stands on its connection: a hello.
const FIRST_WINDOW_BYTES: u32 = 64 * 1024;

/// Requests of one HTTP/2 connection that are answered and are no lanes.
const ANSWERED_MAX: u32 = 16;

/// How long an HTTP/2 connection without a stream may rest: proxies keep some for the next sidecar.
const REST: Duration = Duration::from_secs(30);

/// How long it may take to close after it was told to go away.
const GOODBYE: Duration = Duration::from_secs(5);

/// First bytes of HTTP requests of which somebody may want an answer here. No hello begins so: its length
/// would be followed by a field that no message has.
const HTTP1_BEGINS: [&[u8; 4]; 5] = [b"GET ", b"HEAD", b"POST", b"PUT ", b"OPTI"];

/// First bytes of HTTP/2 by prior knowledge (RFC 9113 §3.4).
const HTTP2_BEGIN: &[u8; 4] = b"PRI ";

/// Bytes that tell them from a hello.
pub(super) const BEGIN_BYTES: usize = 4;

/// What this port is, for whoever asks by HTTP.
const PORT: &str = "this is a Sidelane relay's port for sidecars";

/// What somebody speaks who came to the tunnel's address.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Speaks {
    /// The tunnel's protocol, or nothing known.
    Tunnel,
    Http1,
    Http2,
}

impl Speaks {
    /// By the first [`BEGIN_BYTES`].
    pub(super) fn by(first: &[u8]) -> Self {
        if first == HTTP2_BEGIN {
            return Self::Http2;
        }
        let is_http1 = HTTP1_BEGINS.iter().any(|begin| first == *begin);
        if is_http1 { Self::Http1 } else { Self::Tunnel }
    }

    /// Whether so many first bytes may be HTTP's.
    pub(super) fn may_be_http(first: &[u8]) -> bool {
        HTTP1_BEGINS.iter().chain([&HTTP2_BEGIN]).any(|begin| begin.starts_with(first))
    }
}

/// Whom a request comes from.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Came {
    /// The sidecar, as far as is known.
    pub(super) address: SocketAddr,
    /// Somebody passed it on and does not say, or is not believed, for whom. It is from anywhere.
    pub(super) is_hidden: bool,
}

/// A connection to the tunnel's address.
#[derive(Clone)]
pub(super) struct Knock {
    pub(super) relay: Arc<Relay>,
    /// Who connected.
    pub(super) peer: SocketAddr,
    /// Where.
    pub(super) local: IpAddr,
}

impl Knock {
    fn came(&self, request: &Request<impl Sized>) -> Came {
        self.relay.door.came(self.peer, request.headers())
    }

    /// Where it came in, for whoever is trusted by that: nowhere, where nobody knows whence it came.
    const fn came_in(&self, came: Came) -> IpAddr {
        if came.is_hidden { IpAddr::V4(Ipv4Addr::UNSPECIFIED) } else { self.local }
    }

    fn turned_away(&self, came: Came, why: TurnedAway) -> Answer {
        door::note(&self.relay.metrics, came.address, why);
        let seconds = why.retry_after().as_secs().max(1);
        Answer {
            status: StatusCode::TOO_MANY_REQUESTS,
            text: why.detail().to_owned(),
            retry_after: Some(seconds),
        }
    }

    /// Takes a connection that speaks HTTP/1.1 as far as its upgrade.
    pub(super) async fn by_http1(self, transport: Transport, place: Place) {
        let limit = self.relay.door.bounds().timeout;
        let asked = Arc::new(Mutex::new(Asked { place: Some(place), upgrade: None }));
        let served = self.serve_http1(transport, &asked);
        match timeout(limit, served).await {
            Ok(Ok(())) => {}
            Ok(Err(error)) => {
                self.relay.metrics.handshake_refused("http");
                tracing::debug!(peer = %self.peer, %error, "no request on the tunnel's port");
            }
            Err(_elapsed) => {
                let reason = format!("no whole request within {limit:?}");
                return failed(&self.relay, self.peer, "http", &reason);
            }
        }
        let (upgrade, place) = {
            let mut asked = asked.lock().unwrap_or_else(PoisonError::into_inner);
            (asked.upgrade.take(), asked.place.take())
        };
        let (Some((came, upgrade)), Some(place)) = (upgrade, place) else { return };
        let Ok(Ok(upgraded)) = timeout(limit, upgrade).await else { return };
        // It is what was served.
        let Ok(parts) = upgraded.downcast::<TokioIo<Transport>>() else { return };
        let stream = WebSocketStream::accepted(parts.io.into_inner(), parts.read_buf).await;
        let transport = Transport::websocket(stream);
        let local = self.came_in(came);
        shake_hands(self.relay, transport, came.address, local, place).await;
    }

    async fn serve_http1(
        &self,
        transport: Transport,
        asked: &Arc<Mutex<Asked>>,
    ) -> hyper::Result<()> {
        let service = service_fn(|request: Request<hyper::body::Incoming>| {
            let answer = self.answer_http1(request, asked);
            async move { Ok::<_, Infallible>(answer) }
        });
        http1::Builder::new()
            // One request, and what it becomes: all other answers say that they close.
            .max_buf_size(HEAD_BYTES_MAX)
            .serve_connection(TokioIo::new(transport), service)
            .with_upgrades()
            .await
    }

    fn answer_http1(
        &self,
        mut request: Request<hyper::body::Incoming>,
        asked: &Mutex<Asked>,
    ) -> Response<Full<Bytes>> {
        let came = self.came(&request);
        let judged = judge(&request, false, self.relay.is_draining());
        let response = judged.and_then(|()| {
            let upgrade = create_response_with_body(&request, Full::default).map_err(|error| {
                Answer::new(
                    StatusCode::UPGRADE_REQUIRED,
                    format!("{PORT}: {WEBSOCKET_PATH} takes a WebSocket's upgrade ({error})"),
                )
            })?;
            let mut asked = asked.lock().unwrap_or_else(PoisonError::into_inner);
            let place = self.relay.door.enter_for(asked.place.take(), self.peer, came.address);
            asked.place = Some(place.map_err(|why| self.turned_away(came, why))?);
            asked.upgrade = Some((came, upgrade::on(&mut request)));
            Ok(upgrade)
        });
        response.unwrap_or_else(|answer| {
            answer.note(&self.relay, came.address);
            let body = if request.method() == Method::HEAD { Bytes::new() } else { answer.body() };
            let mut response = answer.head(Full::new(body));
            let connection = match answer.status {
                StatusCode::UPGRADE_REQUIRED => {
                    response.headers_mut().insert(UPGRADE, HeaderValue::from_static("websocket"));
                    "upgrade, close"
                }
                _ => "close",
            };
            response.headers_mut().insert(CONNECTION, HeaderValue::from_static(connection));
            response
        })
    }

    /// Takes a connection that speaks HTTP/2 to a data-path thread, where its streams stay.
    pub(super) fn by_http2(self, mut transport: Transport, place: Place) {
        let lost = || io::Error::from(io::ErrorKind::NotConnected);
        let tuned = transport.tcp().ok_or_else(lost).and_then(dial::tune);
        if tuned.and_then(|()| transport.detach()).is_err() {
            // It is gone.
            return;
        }
        let relay = Arc::clone(&self.relay);
        let shards = relay.listeners.shards();
        let home = usize::try_from(random::number() >> 33).unwrap_or_default() % shards.len();
        let handed_over = shards[home].spawn(async move {
            if transport.attach().is_ok() {
                self.serve_http2(transport, place, home).await;
            }
        });
        if !handed_over {
            tracing::debug!("a connection's thread takes no more; closed");
        }
    }

    async fn serve_http2(self, mut transport: Transport, place: Place, home: usize) {
        let limit = self.relay.door.bounds().timeout;
        let deadline = Instant::now() + limit;
        let under = Shown { is_tls: transport.is_tls(), chain: transport.peer_chain().into() };
        transport.forget_peer_chain();
        let handshake = server::Builder::new()
            .initial_window_size(FIRST_WINDOW_BYTES)
            .max_frame_size(FRAME_BYTES_MAX)
            .max_header_list_size(u32::try_from(HEAD_BYTES_MAX).unwrap_or(u32::MAX))
            .max_concurrent_streams(STREAMS_MAX)
            .max_send_buffer_size(grpc::SEND_BUFFER_BYTES)
            .handshake::<_, Bytes>(transport);
        let mut connection = match timeout_at(deadline, handshake).await {
            Ok(Ok(connection)) => connection,
            Ok(Err(error)) => {
                self.relay.metrics.handshake_refused("http");
                tracing::debug!(peer = %self.peer, %error, "no HTTP/2 on the tunnel's port");
                return;
            }
            Err(_elapsed) => {
                let reason = format!("no HTTP/2 within {limit:?}");
                return failed(&self.relay, self.peer, "http", &reason);
            }
        };
        let stands = Arc::new(Notify::new());
        let mut streams = Streams { place: Some(place), home, under, stands, answered: 0 };
        let stands = Arc::clone(&streams.stands);
        let mut is_wide = false;
        let mut is_closing = false;
        let mut rest = pin!(sleep_until(deadline));
        loop {
            tokio::select! {
                accepted = connection.accept() => match accepted {
                    Some(Ok((request, respond))) => {
                        self.take_stream(request, respond, &mut streams);
                        if streams.answered == ANSWERED_MAX {
                            connection.graceful_shutdown();
                        }
                    }
                    Some(Err(error)) => {
                        tracing::debug!(peer = %self.peer, %error, "a connection of gRPC streams failed");
                        return;
                    }
                    None => return,
                },
                () = stands.notified(), if !is_wide => {
                    is_wide = true;
                    connection.set_target_window_size(grpc::CONNECTION_WINDOW_BYTES);
                    // An error: the last change is not acknowledged, and there was none.
                    let _ = connection.set_initial_window_size(grpc::WINDOW_BYTES);
                }
                () = &mut rest => {
                    let now = Instant::now();
                    if connection.has_streams() {
                        rest.as_mut().reset(now + REST);
                    } else if is_closing {
                        return;
                    } else {
                        if streams.place.is_some() {
                            failed(&self.relay, self.peer, "http", "no request on an HTTP/2 connection");
                        }
                        is_closing = true;
                        connection.graceful_shutdown();
                        rest.as_mut().reset(now + GOODBYE);
                    }
                }
            }
        }
    }

    fn take_stream(
        &self,
        request: Request<RecvStream>,
        mut respond: SendResponse<Bytes>,
        streams: &mut Streams,
    ) {
        let came = self.came(&request);
        let entered = judge(&request, true, self.relay.is_draining()).and_then(|()| {
            let place = self.relay.door.enter_for(streams.place.take(), self.peer, came.address);
            place.map_err(|why| self.turned_away(came, why))
        });
        let place = match entered {
            Ok(place) => place,
            Err(answer) => {
                answer.note(&self.relay, came.address);
                streams.answered += 1;
                let body =
                    if request.method() == Method::HEAD { Bytes::new() } else { answer.body() };
                // Who is gone needs no answer.
                if let Ok(mut send) = respond.send_response(answer.head(()), body.is_empty())
                    && !body.is_empty()
                {
                    let _ = send.send_data(body, true);
                }
                // A reset of ours would throw away the answer that is queued; what else comes on the stream
                // is reset behind it, as nobody holds it (RFC 9113 §8.1).
                return;
            }
        };
        let mut head = Response::new(());
        head.headers_mut().insert(CONTENT_TYPE, grpc::CONTENT);
        let Ok(send) = respond.send_response(head, false) else { return };
        let stands = Arc::clone(&streams.stands);
        let stream = GrpcStream::accepted(send, request.into_body(), stands);
        let chain = streams.under.chain.to_vec();
        let transport = Transport::grpc(stream, streams.under.is_tls, chain).at_home(streams.home);
        let local = self.came_in(came);
        tokio::spawn(shake_hands(Arc::clone(&self.relay), transport, came.address, local, place));
    }
}

/// What was asked on an HTTP/1.1 connection.
struct Asked {
    place: Option<Place>,
    /// The request was granted.
    upgrade: Option<(Came, OnUpgrade)>,
}

/// What the streams of a connection share.
struct Streams {
    /// The connection's, for its first stream.
    place: Option<Place>,
    home: usize,
    under: Shown,
    /// Told when a lane stands on one of them.
    stands: Arc<Notify>,
    /// Requests that are no lanes.
    answered: u32,
}

/// What the connection's TLS has shown.
struct Shown {
    is_tls: bool,
    chain: Arc<[CertificateDer<'static>]>,
}

/// An answer to who brings no lane.
#[derive(Debug)]
struct Answer {
    status: StatusCode,
    text: String,
    /// In seconds.
    retry_after: Option<u64>,
}

impl Answer {
    fn new(status: StatusCode, text: impl Into<String>) -> Self {
        Self { status, text: text.into(), retry_after: None }
    }

    fn body(&self) -> Bytes {
        format!("{}\n", self.text).into()
    }

    fn head<B>(&self, body: B) -> Response<B> {
        let mut response = Response::new(body);
        *response.status_mut() = self.status;
        let headers = response.headers_mut();
        headers.insert(CONTENT_TYPE, HeaderValue::from_static("text/plain"));
        if let Some(seconds) = self.retry_after {
            headers.insert(RETRY_AFTER, HeaderValue::from(seconds));
        }
        response
    }

    /// Counts it. Whoever knocks at the wrong door, a balancer's health check say, is no guesser.
    fn note(&self, relay: &Relay, peer: SocketAddr) {
        if !self.status.is_success() && self.retry_after.is_none() {
            relay.metrics.handshake_refused("http");
        }
        let status = self.status.as_u16();
        tracing::debug!(%peer, status, "a request on the tunnel's port is no sidecar's");
    }
}

/// Whether a request may bring a lane: by gRPC, or else by WebSocket. `is_draining`: only one that comes back.
fn judge<B>(request: &Request<B>, is_grpc: bool, is_draining: bool) -> Result<(), Answer> {
    let path = if is_grpc { GRPC_PATH } else { WEBSOCKET_PATH };
    let is_look = matches!(*request.method(), Method::GET | Method::HEAD);
    if is_look && request.uri().path() == "/" && is_draining {
        // Balancers are to send new ones elsewhere.
        let text = format!("{PORT}, and is shutting down");
        return Err(Answer::new(StatusCode::SERVICE_UNAVAILABLE, text));
    }
    if is_look && request.uri().path() == "/" {
        return Err(Answer::new(StatusCode::OK, PORT));
    }
    if request.uri().path() != path {
        let text = format!(
            "{PORT}: it takes a WebSocket at {WEBSOCKET_PATH} by HTTP/1.1 and gRPC at {GRPC_PATH} by HTTP/2"
        );
        return Err(Answer::new(StatusCode::NOT_FOUND, text));
    }
    // A page in somebody's browser could dial a relay on that machine's loopback, and be a sidecar there.
    if request.headers().contains_key(ORIGIN) {
        let text = format!("{PORT}, and takes nothing of a browser's page (Origin)");
        return Err(Answer::new(StatusCode::FORBIDDEN, text));
    }
    if !is_grpc {
        // What follows the head is the WebSocket's: nobody on the way is to take it for something else.
        let has_body = request.headers().contains_key(TRANSFER_ENCODING)
            || request.headers().get(CONTENT_LENGTH).is_some_and(|length| length != "0");
        if has_body {
            let text = format!("{PORT}: {WEBSOCKET_PATH} takes a request without a body");
            return Err(Answer::new(StatusCode::BAD_REQUEST, text));
        }
        return Ok(());
    }
    let content = request.headers().get(CONTENT_TYPE).map(HeaderValue::as_bytes);
    let is_good = *request.method() == Method::POST
        && content.is_some_and(|content| content.starts_with(grpc::CONTENT.as_bytes()));
    if is_good {
        return Ok(());
    }
    let text = format!("{PORT}: {GRPC_PATH} takes POST with content-type application/grpc");
    Err(Answer::new(StatusCode::UNSUPPORTED_MEDIA_TYPE, text))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_hello_is_told_from_http_by_its_first_bytes() {
        for (first, expected) in [
            (b"GET ", Speaks::Http1),
            (b"HEAD", Speaks::Http1),
            (b"PRI ", Speaks::Http2),
            (b"PRIM", Speaks::Tunnel),
            // A length, and the key of `hello`.
            (b"\x47\x82\x02\x10", Speaks::Tunnel),
        ] {
            assert_eq!(Speaks::by(first), expected);
            assert_eq!(Speaks::may_be_http(&first[..2]), first[1] != 0x82);
        }
    }

    #[test]
    fn while_the_relay_ends_balancers_are_told_and_lanes_come_back() {
        for (path, expected) in [("/", Err(503)), (WEBSOCKET_PATH, Ok(()))] {
            let request = Request::get(path).body(()).expect("a request");
            assert_eq!(
                judge(&request, false, true).map_err(|answer| answer.status.as_u16()),
                expected
            );
        }
    }

    #[test]
    fn who_brings_no_lane_is_told_what_this_port_is() {
        let ask = |method: &str, path: &str, fields: &[(&str, &str)], is_grpc| {
            let mut request = Request::builder().method(method).uri(path);
            for (name, value) in fields {
                request = request.header(*name, *value);
            }
            let request = request.body(()).expect("a request");
            judge(&request, is_grpc, false).map_err(|answer| (answer.status.as_u16(), answer.text))
        };
        let grpc = &[("content-type", "application/grpc+proto")][..];
        assert_eq!(ask("GET", "/tunnel", &[], false), Ok(()));
        assert_eq!(ask("GET", "/tunnel?x=1", &[], false), Ok(()));
        assert_eq!(ask("GET", "/tunnel", &[("content-length", "0")], false), Ok(()));
        assert_eq!(ask("POST", GRPC_PATH, grpc, true), Ok(()));
        for (method, path, fields, is_grpc, status) in [
            ("GET", "/", &[][..], false, 200),
            ("HEAD", "/", &[], true, 200),
            ("POST", "/", &[], false, 404),
            ("GET", "/healthz", &[], false, 404),
            ("GET", GRPC_PATH, &[], false, 404),
            ("GET", "/tunnel", &[], true, 404),
            ("GET", "/tunnel", &[("origin", "http://127.0.0.1")], false, 403),
            ("GET", "/tunnel", &[("content-length", "5")], false, 400),
            ("GET", "/tunnel", &[("transfer-encoding", "chunked")], false, 400),
            ("POST", GRPC_PATH, &[("origin", "null")], true, 403),
            ("POST", GRPC_PATH, &[], true, 415),
            ("GET", GRPC_PATH, grpc, true, 415),
        ] {
            let (told, text) = ask(method, path, fields, is_grpc).expect_err(path);
            assert_eq!(told, status, "{method} {path}");
            assert!(text.starts_with(PORT) && !text.contains('\n'), "{text}");
        }
    }
}

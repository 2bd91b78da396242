//! What core lends a plugin for one exchange, as safe traits: the front implements the HTTP ones,
//! the tunnel the halves, the sidecar the service. `plugin::vtable` turns them into ABI objects.
//!
//! Knows nothing of the ABI's layouts and of who implements what.

use std::future::Future;
use std::io;
use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll};

use bytes::Bytes;
use http::{HeaderMap, StatusCode};
use tokio::io::{AsyncRead, AsyncWrite};
use tokio::net::{TcpStream, UnixStream};
use tokio_rustls::{client, server};

pub use crate::config::HttpVersion;
pub use crate::join::Plain;
pub use sidelane_tunnel::{Payload as Message, Received, Reset};

/// A failure with what a client may be told of it.
#[derive(Clone, Debug)]
pub struct Failure {
    /// One of [`sidelane_abi::failure`].
    pub code: u32,
    /// Seconds for `Retry-After`.
    pub retry_after_s: Option<u32>,
    /// One line for people.
    pub detail: String,
}

/// Text that many exchanges share. The empty one, which most are, costs nothing to make, share and
/// drop: a count of owners that all threads write would be the slowest part of a small exchange.
#[derive(Clone, Default, PartialEq, Eq)]
pub struct Text(Option<Arc<str>>);

impl std::ops::Deref for Text {
    type Target = str;

    fn deref(&self) -> &str {
        self.0.as_deref().unwrap_or_default()
    }
}

impl From<Arc<str>> for Text {
    fn from(text: Arc<str>) -> Self {
        if text.is_empty() { Self(None) } else { Self(Some(text)) }
    }
}

impl From<&str> for Text {
    fn from(text: &str) -> Self {
        if text.is_empty() { Self(None) } else { Self(Some(text.into())) }
    }
}

impl std::fmt::Debug for Text {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        (**self).fmt(f)
    }
}

/// What core knows of an exchange; owned, so that the ABI's record can point into it.
#[derive(Clone, Debug)]
pub struct Meta {
    /// Unique in its session; empty before `open`.
    pub request_id: Text,
    /// `protocol_type`.
    pub protocol_type: Arc<str>,
    /// Route's name; empty before `open`.
    pub route: Text,
    /// Tunnel's name; empty before `open`.
    pub tunnel: Text,
    /// `192.0.2.1:4711`, `[2001:db8::1]:4711`.
    pub client_address: Text,
    /// The listener's name at the relay.
    pub listener: Text,
    /// `http`, `https`, or empty.
    pub scheme: Text,
    /// TLS server name, or empty.
    pub tls_sni: Text,
    /// TLS application protocol, or empty.
    pub tls_alpn: Text,
    /// Subject of the client's certificate, or empty.
    pub tls_client: Text,
    /// `traceparent`, or empty.
    pub trace_parent: Text,
    /// The route's options for this protocol as JSON, or empty.
    pub options: Text,
    /// The client's deadline.
    pub deadline: Option<std::time::Instant>,
    /// The client is a proxy that the relay trusts: what it wrote in `Forwarded` and `X-Forwarded-*`
    /// is added to, not replaced.
    pub trusted_proxy: bool,
    /// That proxy's own address, in the form of `client_address`; empty where it is not known.
    pub peer_address: Text,
    /// From dispatch to the service's response head; `None`: the plugin's own.
    pub response_head_timeout: Option<std::time::Duration>,
}

/// A request's head, owned by the front and borrowed by the plugin until its call ends.
#[derive(Debug)]
pub struct RequestHead {
    /// Method.
    pub method: http::Method,
    /// `http` or `https`.
    pub scheme: Arc<str>,
    /// The effective authority, as sent.
    pub authority: Bytes,
    /// Path and query as sent, or `*`.
    pub target: Bytes,
    /// `:protocol` of an extended CONNECT.
    pub protocol: Option<Bytes>,
    /// Version as the client spoke it.
    pub version: http::Version,
    /// Fields.
    pub headers: HeaderMap,
    /// The request has no body.
    pub end: bool,
    /// The client waits for `100 Continue`.
    pub expect_continue: bool,
    /// [`Responder::upgrade`] can hand over the byte stream.
    pub can_upgrade: bool,
}

/// A frame of a request's body.
#[derive(Debug)]
pub enum BodyFrame {
    /// A chunk; `end` where nothing follows.
    Data {
        /// The chunk.
        bytes: Bytes,
        /// Nothing follows.
        end: bool,
    },
    /// Trailers; nothing follows.
    Trailers(HeaderMap),
    /// Nothing follows.
    End,
    /// The client broke off.
    Failed(Reset),
}

/// A request's body.
pub trait Body: Send + 'static {
    /// Exact length, where known.
    fn length(&self) -> Option<u64>;
    /// Next frame.
    fn poll_frame(&mut self, cx: &mut Context<'_>) -> Poll<BodyFrame>;
}

/// A response's head.
#[derive(Debug)]
pub struct ResponseHead {
    /// Status.
    pub status: StatusCode,
    /// Fields.
    pub headers: HeaderMap,
    /// Exact length of the body, where known.
    pub body_length: Option<u64>,
}

/// The client is gone, or the response has ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Closed;

/// A byte stream of the host's own.
pub trait Stream: AsyncRead + AsyncWrite + Send + Unpin + 'static {
    /// The socket, where what is read and written next is its bytes and nothing else: sockets are joined by
    /// the kernel.
    fn plain(&self) -> Option<Plain<'_>> {
        None
    }
}

impl Stream for TcpStream {
    fn plain(&self) -> Option<Plain<'_>> {
        Some(Plain::Tcp(self))
    }
}

impl Stream for UnixStream {
    fn plain(&self) -> Option<Plain<'_>> {
        Some(Plain::Unix(self))
    }
}

impl Stream for tokio::io::DuplexStream {}
impl<S: Stream> Stream for client::TlsStream<S> {}
impl<S: Stream> Stream for server::TlsStream<S> {}

/// A byte stream that is on its way. The error is one of [`sidelane_abi::failure`], and the cause.
pub type StreamFuture =
    Pin<Box<dyn Future<Output = Result<Box<dyn Stream>, (u32, io::Error)>> + Send>>;

/// A connection to a service.
pub struct Connected {
    /// The bytes.
    pub stream: Box<dyn Stream>,
    /// Which of the protocols that were offered was agreed on; `None`: none was.
    pub protocol: Option<usize>,
}

/// A connection to a service that is on its way. The error as in [`StreamFuture`].
pub type ConnectFuture = Pin<Box<dyn Future<Output = Result<Connected, (u32, io::Error)>> + Send>>;

/// Where a response goes. Dropped before its end: the exchange is aborted with `PLUGIN_FAILED`.
pub trait Responder: Send + 'static {
    /// Sends an interim response; [`Closed`] where the transport cannot or the client is gone.
    fn informational(&mut self, status: StatusCode, headers: HeaderMap) -> Result<(), Closed>;
    /// Sends the head, with the body's first chunk where given; `end`: nothing follows.
    fn head(&mut self, head: ResponseHead, first: Option<Bytes>, end: bool) -> Result<(), Closed>;
    /// Sends a chunk; `Pending` leaves it in place.
    fn poll_body(
        &mut self,
        cx: &mut Context<'_>,
        chunk: &mut Option<Bytes>,
        end: bool,
    ) -> Poll<Result<(), Closed>>;
    /// Ends the body.
    fn finish(&mut self, trailers: Option<HeaderMap>) -> Result<(), Closed>;
    /// Ends the body with a few bytes more, at once: they are held beside a chunk that waits, so they must
    /// be few.
    fn finish_behind(&mut self, last: Bytes, trailers: Option<HeaderMap>) -> Result<(), Closed>;
    /// Ends the exchange early; before the head the front answers by the code.
    fn abort(&mut self, reset: Reset);
    /// Ready once the client is gone.
    fn poll_closed(&mut self, cx: &mut Context<'_>) -> Poll<Reset>;
    /// The client's bytes, after a head that accepts an upgrade.
    fn upgrade(&mut self) -> StreamFuture;
}

/// The direction from here to the peer. Dropped unfinished: reset with `CANCELLED`.
pub trait SendHalf: Send + 'static {
    /// Queues the message and leaves `None`; `Pending` leaves it in place.
    fn poll_send(
        &mut self,
        cx: &mut Context<'_>,
        message: &mut Option<Message>,
    ) -> Poll<Result<(), Closed>>;
    /// Ends the direction where no message with `end` was sent.
    fn finish(&mut self);
    /// Ends the exchange, both directions.
    fn reset(&mut self, reset: Reset);
    /// Ready once the exchange is over on the wire: reset, lost, or, with `NONE`, complete; what was
    /// received may still be read then.
    fn poll_closed(&mut self, cx: &mut Context<'_>) -> Poll<Reset>;
    /// The first byte is about to be written to a service.
    fn dispatched(&mut self);
    /// Nothing was and will be written to a service. Ends the exchange.
    fn refused(&mut self, reset: Reset);
    /// Moves the exchange to a connection of its own, where there is one: the bytes of `stream`, after those
    /// of `ahead`. Neither half is used until it has resolved.
    fn dedicate(&mut self, stream: Box<dyn Stream>, ahead: Bytes) -> DedicateFuture {
        drop(ahead);
        Box::pin(std::future::ready(Dedicated::Framed(stream)))
    }
}

/// What became of an exchange that was to have a connection of its own.
pub enum Dedicated {
    /// It is over, and the peer knows.
    Ended {
        /// Why; `NONE`: all was said.
        reset: Reset,
        /// Bytes from the stream to the peer.
        sent: u64,
        /// Bytes from the peer to the stream.
        received: u64,
    },
    /// There is none: it goes on in messages, at both ends.
    Framed(Box<dyn Stream>),
}

/// An exchange on a connection of its own, or on its way there.
pub type DedicateFuture = Pin<Box<dyn Future<Output = Dedicated> + Send>>;

/// The direction from the peer to here. Dropped unfinished: reset with `CANCELLED`.
pub trait RecvHalf: Send + 'static {
    /// Next message; taking it returns its credit.
    fn poll_recv(&mut self, cx: &mut Context<'_>) -> Poll<Received>;
}

/// What an exchange is opened for.
#[derive(Clone, Copy, Debug)]
pub enum RouteKey<'a> {
    /// What the listener has fixed.
    Listener,
    /// By host (port allowed) and path.
    Host {
        /// Host name, port allowed.
        host: &'a str,
        /// Path.
        path: &'a str,
    },
}

/// An opened exchange.
pub struct Opened<S, R> {
    /// From here to the peer.
    pub send: S,
    /// From the peer to here.
    pub recv: R,
    /// What core knows of it.
    pub meta: Meta,
}

/// An opened exchange, or why there is none.
pub type OpenResult<S, R> = Result<Opened<S, R>, Failure>;

/// Opens the exchange of one client request or connection.
pub trait Opener: Send + 'static {
    /// From here to the peer.
    type Send: SendHalf;
    /// From the peer to here.
    type Recv: RecvHalf;
    /// Routes, authorises and opens.
    fn poll_open(
        &mut self,
        cx: &mut Context<'_>,
        key: RouteKey<'_>,
    ) -> Poll<OpenResult<Self::Send, Self::Recv>>;
}

/// What a tunnel and a route ask of whoever talks to a service.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct ServiceSettings {
    /// A connection may serve exchanges of several clients.
    pub shared: bool,
    /// HTTP's version to the service.
    pub http_version: HttpVersion,
    /// The service is spoken to by TLS.
    pub tls: bool,
    /// Most times that this exchange may be sent again; 0: only what is safe in any case.
    pub retries: u32,
    /// Unused connections to keep, per data-path thread; `None`: the plugin's own.
    pub pool_idle: Option<u32>,
    /// Connections, per data-path thread; `None`: the plugin's own.
    pub pool_connections: Option<u32>,
    /// How long an unused connection is kept; `None`: the plugin's own.
    pub pool_idle_timeout: Option<std::time::Duration>,
}

impl Default for ServiceSettings {
    fn default() -> Self {
        Self {
            shared: true,
            http_version: HttpVersion::Http1,
            tls: false,
            retries: 0,
            pool_idle: None,
            pool_connections: None,
            pool_idle_timeout: None,
        }
    }
}

/// The service behind a tunnel.
pub trait Service: Send + 'static {
    /// Stable for a tunnel's name.
    fn id(&self) -> u64;
    /// Changes with the tunnel's settings.
    fn version(&self) -> u64;
    /// Where it is.
    fn address(&self) -> &str;
    /// Dials; `offered` are the application protocols that are offered where the service is spoken to by
    /// TLS (ALPN), the best first, each of 1 to 255 bytes.
    fn connect(&self, offered: Vec<Vec<u8>>) -> ConnectFuture;
    /// What the tunnel and the route ask of whoever talks to it.
    fn settings(&self) -> ServiceSettings;
    /// Whether the exchange may be sent once more; takes that from the route's budget.
    fn retry(&self) -> bool;
}

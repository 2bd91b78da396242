//! The relay's HTTP front: turns a client's connection into requests and answers.
//!
//! Owns what HTTP/1.1 and HTTP/2 connections have in common with every request: framing, checks of
//! the head, limits and timeouts, interim responses, resets, upgrades. Knows no routes and no
//! plugins: each request goes to a [`Dispatch`]. HTTP/1.1 stands on hyper, HTTP/2 on the `h2` crate
//! itself (docs/adr/0002-http-front.md says why).

use std::future::Future;
use std::io;
use std::net::SocketAddr;
use std::pin::{Pin, pin};
use std::sync::Arc;
use std::sync::atomic::AtomicBool;
use std::task::Poll;
use std::time::Duration;

use bytes::{Bytes, BytesMut};
use ipnet::IpNet;
use tokio::io::{AsyncRead, AsyncReadExt};

use crate::plugin::CallEnd;
use crate::plugin::lend;

mod answer;
mod exchange;
pub mod forwarded;
mod h1;
mod h2;
mod head;
#[cfg(test)]
mod tests;
mod tls;
mod wire;

pub(crate) use answer::status_of;
pub(crate) use head::is_authority;
pub(crate) use tls::set_client_cert;
pub use tls::{ClientFields, Hosts, TlsFacts};

/// What the front needs from the rest of core.
pub trait Dispatch: Send + Sync + 'static {
    /// One request in the making. Dropped unfinished once the client is gone.
    type Call: Future<Output = CallEnd> + Send + Unpin + 'static;

    /// Takes a request whose head has passed every check.
    fn accept<B: lend::Body, R: lend::Responder>(
        &self,
        connection: &Arc<ConnectionInfo>,
        head: Box<lend::RequestHead>,
        body: B,
        responder: R,
    ) -> Self::Call;

    /// Counts what the front does by itself.
    fn note(&self, event: Event) {
        let _ = event;
    }
}

/// What the front does without asking anyone; for metrics.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Event {
    /// An interim response was not sent: too many waited for the client, or it speaks HTTP/1.0.
    InformationalDropped,
    /// A request was answered by the front itself, by this code of [`sidelane_abi::failure`].
    Answered(u32),
}

/// What is known of a client's connection.
#[derive(Debug)]
pub struct ConnectionInfo {
    /// The listener's name.
    pub listener: Arc<str>,
    /// The client's address.
    pub client_address: SocketAddr,
    /// The same as text, made once.
    pub client_address_text: Arc<str>,
    /// `http` or `https`.
    pub scheme: Arc<str>,
    /// Facts of the TLS handshake, where there was one.
    pub tls: Option<Arc<TlsFacts>>,
    /// The port of `https` to which every request is sent, where that is all that the listener does.
    pub https_redirect: Option<u16>,
    /// The client is a proxy whose word is taken; these are all of them ([`forwarded::client`]).
    pub trusted_proxies: Option<Arc<[IpNet]>>,
    /// The connection ends soon: HTTP/1.1 says so with the next response, so that a client that is just
    /// about to send its next request does not meet a closed connection. HTTP/2 says GOAWAY where this turns
    /// true while the connection is there.
    pub ends_soon: AtomicBool,
}

impl ConnectionInfo {
    /// Returns what is known of a connection without TLS.
    #[must_use]
    pub fn plain(listener: Arc<str>, client_address: SocketAddr) -> Self {
        Self {
            listener,
            client_address,
            client_address_text: client_address.to_string().into(),
            scheme: "http".into(),
            tls: None,
            https_redirect: None,
            trusted_proxies: None,
            ends_soon: AtomicBool::new(false),
        }
    }
}

/// Limits and timeouts of the front.
#[derive(Clone, Debug)]
pub struct FrontConfig {
    /// From a head's first byte (or the connection's start) to its last. HTTP/1: 408.
    pub request_head_timeout: Duration,
    /// How long a connection may rest between requests.
    pub idle_timeout: Duration,
    /// Request line and fields of a head, or a list of trailers, in bytes. Past it: 431.
    pub head_bytes_max: u32,
    /// Fields of a head. Past it: 431.
    pub headers_max: usize,
    /// Bytes of one HTTP/1 connection that wait for a slow client, or are read at once.
    pub buffer_bytes_max: usize,
    /// Requests at once on one HTTP/2 connection.
    pub h2_streams_max: u32,
    /// Bytes a client may send ahead on one HTTP/2 stream. On a connection it may send as much ahead as
    /// on all its streams: those that nobody reads must not hold up the others.
    pub h2_stream_window: u32,
    /// Bytes of one HTTP/2 stream that wait for a slow client, beside the chunk in hand.
    pub h2_send_buffer: usize,
    /// HTTP/2 streams that the client reset before they were looked at. Past it the connection is
    /// closed (rapid reset).
    pub h2_pending_resets_max: usize,
}

impl Default for FrontConfig {
    fn default() -> Self {
        Self {
            request_head_timeout: Duration::from_secs(30),
            // Above the 60 s of common load balancers, so that they close first and no request
            // meets a closing connection.
            idle_timeout: Duration::from_secs(75),
            head_bytes_max: 64 * 1024,
            headers_max: 128,
            // Two heads, or four messages of the tunnel: enough for one large write.
            buffer_bytes_max: 128 * 1024,
            h2_streams_max: 256,
            h2_stream_window: 256 * 1024,
            h2_send_buffer: 128 * 1024,
            h2_pending_resets_max: 64,
        }
    }
}

/// Why a connection ended before its time.
#[derive(Debug, thiserror::Error)]
pub enum ConnectionError {
    /// The transport failed.
    #[error("the client's connection failed")]
    Io(#[source] io::Error),
    /// The client closed during an exchange.
    #[error("the client closed during an exchange")]
    ClientGone,
    /// The client was too slow with a request's head, or with HTTP/2's settings.
    #[error("the client sent no whole request head in time")]
    HeadTimeout,
    /// The client took nothing more of a response that is over.
    #[error("the client did not take its response in time")]
    Stalled,
    /// The client broke HTTP/1.
    #[error("the client broke HTTP/1")]
    Http1(#[source] hyper::Error),
    /// HTTP/2 ended with an error, the client's or ours.
    #[error("HTTP/2 ended with an error")]
    Http2(#[source] ::h2::Error),
    /// A response that had begun was broken off, as its exchange asked.
    #[error("a response was broken off")]
    Aborted,
}

/// What a client with prior knowledge of HTTP/2 sends first (RFC 9113 §3.4).
const H2_PREFACE: &[u8; 24] = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n";

/// Bytes read while HTTP/1 and HTTP/2 are told apart. Holds a common head, so that it is read once.
const SNIFF_BYTES: usize = 2048;

/// Serves a client's connection until it ends.
///
/// Once `shutdown` is ready, no further request is taken: HTTP/1 ends after the exchange at hand,
/// HTTP/2 says GOAWAY and ends after its streams; an idle connection ends at once. An upgraded
/// stream outlives this call. Dropping the future drops the connection and every exchange on it.
///
/// # Errors
///
/// Why the connection ended before its time; the exchanges on it have been told.
pub async fn serve<S, D>(
    mut stream: S,
    info: Arc<ConnectionInfo>,
    config: Arc<FrontConfig>,
    dispatch: Arc<D>,
    shutdown: impl Future<Output = ()> + Send,
) -> Result<(), ConnectionError>
where
    S: lend::Stream,
    D: Dispatch,
{
    let mut shutdown = pin!(shutdown);
    let sniffed = {
        let sniff = pin!(tokio::time::timeout(config.request_head_timeout, sniff(&mut stream)));
        or_shutdown(sniff, shutdown.as_mut()).await
    };
    let (ahead, protocol) = match sniffed {
        None => return Ok(()),
        Some(Err(_elapsed)) => return Err(ConnectionError::HeadTimeout),
        Some(Ok(sniffed)) => sniffed.map_err(ConnectionError::Io)?,
    };
    let context = Context { info, config, dispatch };
    match protocol {
        Protocol::Nothing => Ok(()),
        Protocol::Http1 => h1::serve(stream, ahead, context, shutdown).await,
        Protocol::Http2 => h2::serve(stream, ahead, context, shutdown).await,
    }
}

/// What every request of a connection shares.
struct Context<D> {
    info: Arc<ConnectionInfo>,
    config: Arc<FrontConfig>,
    dispatch: Arc<D>,
}

impl<D> Clone for Context<D> {
    fn clone(&self) -> Self {
        Self {
            info: Arc::clone(&self.info),
            config: Arc::clone(&self.config),
            dispatch: Arc::clone(&self.dispatch),
        }
    }
}

/// What a connection's first bytes say.
#[derive(Debug, PartialEq, Eq)]
enum Protocol {
    /// Closed without a byte.
    Nothing,
    Http1,
    Http2,
}

/// Reads until the bytes differ from HTTP/2's preface or are all of it, and no further: a client
/// of HTTP/1 may have sent all it is going to send.
async fn sniff<S: AsyncRead + Unpin>(stream: &mut S) -> io::Result<(Bytes, Protocol)> {
    let mut ahead = BytesMut::with_capacity(SNIFF_BYTES);
    loop {
        let read = stream.read_buf(&mut ahead).await?;
        let known = ahead.len().min(H2_PREFACE.len());
        let protocol = if ahead.is_empty() {
            Protocol::Nothing
        } else if ahead[..known] != H2_PREFACE[..known] || read == 0 {
            Protocol::Http1
        } else if known == H2_PREFACE.len() {
            Protocol::Http2
        } else {
            continue;
        };
        return Ok((ahead.freeze(), protocol));
    }
}

/// Returns `work`'s output, or `None` where `shutdown` is ready first.
pub(crate) async fn or_shutdown<W: Future, F: Future<Output = ()>>(
    mut work: Pin<&mut W>,
    mut shutdown: Pin<&mut F>,
) -> Option<W::Output> {
    std::future::poll_fn(|cx| {
        if let Poll::Ready(output) = work.as_mut().poll(cx) {
            return Poll::Ready(Some(output));
        }
        shutdown.as_mut().poll(cx).map(|()| None)
    })
    .await
}

//! A client's connection as the relay counts it, and what was read of it before its protocol.

use std::io;
use std::pin::Pin;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::task::{Context, Poll};

use bytes::{Buf as _, Bytes};
use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};
use tokio::net::TcpStream;
use tokio_rustls::server::TlsStream;

use super::Relay;
use crate::metrics::Up;
use crate::plugin::lend::{Plain, Stream};
use crate::tunnel::transport::Socket;

/// What carries a client's bytes.
enum Transport {
    Plain(TcpStream),
    Tls(Box<TlsStream<Socket>>),
}

/// A client's connection, which is counted for as long as its socket lives: an upgraded one outlives
/// the front's call.
pub(super) struct ClientStream {
    transport: Transport,
    /// Read before, and not given out yet; with TLS, after it.
    ahead: Bytes,
    counted: Counted,
}

/// What a connection is counted by.
pub(super) struct Counted {
    _place: Place,
    _up: Up,
}

impl ClientStream {
    pub(super) fn new(stream: TcpStream, place: Place, up: Up) -> Self {
        let counted = Counted { _place: place, _up: up };
        Self { transport: Transport::Plain(stream), ahead: Bytes::new(), counted }
    }

    /// Returns the same with `ahead`, read from it before, in front.
    pub(super) fn with_ahead(self, ahead: Bytes) -> Self {
        Self { ahead, ..self }
    }

    /// Takes a plain connection apart, to be put together again by [`Self::secured`].
    pub(super) fn into_socket(self) -> Option<(Socket, Counted)> {
        match self.transport {
            Transport::Plain(stream) => {
                Some((Socket::with_ahead(stream, self.ahead.into()), self.counted))
            }
            Transport::Tls(_) => None,
        }
    }

    /// Returns a connection with TLS.
    pub(super) fn secured(stream: Box<TlsStream<Socket>>, counted: Counted) -> Self {
        Self { transport: Transport::Tls(stream), ahead: Bytes::new(), counted }
    }
}

impl Stream for ClientStream {
    fn plain(&self) -> Option<Plain<'_>> {
        match &self.transport {
            Transport::Plain(stream) if self.ahead.is_empty() => stream.plain(),
            Transport::Plain(_) | Transport::Tls(_) => None,
        }
    }
}

/// Calls the same of either transport.
macro_rules! either {
    ($self:ident, $stream:ident => $call:expr) => {
        match &mut $self.transport {
            Transport::Plain($stream) => $call,
            Transport::Tls($stream) => $call,
        }
    };
}

impl AsyncRead for ClientStream {
    fn poll_read(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buf: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        if self.ahead.is_empty() {
            return either!(self, stream => Pin::new(stream).poll_read(cx, buf));
        }
        let length = self.ahead.len().min(buf.remaining());
        buf.put_slice(&self.ahead[..length]);
        self.ahead.advance(length);
        if self.ahead.is_empty() {
            // Lets the memory go.
            self.ahead = Bytes::new();
        }
        Poll::Ready(Ok(()))
    }
}

impl AsyncWrite for ClientStream {
    fn poll_write(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        bytes: &[u8],
    ) -> Poll<io::Result<usize>> {
        either!(self, stream => Pin::new(stream).poll_write(cx, bytes))
    }

    fn poll_write_vectored(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        parts: &[io::IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        either!(self, stream => Pin::new(stream).poll_write_vectored(cx, parts))
    }

    fn is_write_vectored(&self) -> bool {
        match &self.transport {
            Transport::Plain(stream) => stream.is_write_vectored(),
            Transport::Tls(stream) => stream.is_write_vectored(),
        }
    }

    fn poll_flush(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        either!(self, stream => Pin::new(stream).poll_flush(cx))
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        either!(self, stream => Pin::new(stream).poll_shutdown(cx))
    }
}

/// A client's place among all that the process may have, and on the thread that serves it.
pub(super) struct Place {
    relay: Arc<Relay>,
    thread: usize,
}

impl Place {
    /// Takes a place on the relay's thread of that number, where `max` others do not hold theirs yet.
    pub(super) fn try_new(relay: &Arc<Relay>, thread: usize, max: usize) -> Option<Self> {
        if relay.connections.fetch_add(1, Ordering::Relaxed) >= max {
            relay.connections.fetch_sub(1, Ordering::Relaxed);
            return None;
        }
        relay.listeners.loads().add(thread);
        Some(Self { relay: Arc::clone(relay), thread })
    }

    /// The same on the thread that has the fewest; on `own` where that is one of them.
    pub(super) fn try_balanced(relay: &Arc<Relay>, own: usize, max: usize) -> Option<Self> {
        if relay.connections.fetch_add(1, Ordering::Relaxed) >= max {
            relay.connections.fetch_sub(1, Ordering::Relaxed);
            return None;
        }
        let thread = relay.listeners.loads().add_to_least(own);
        Some(Self { relay: Arc::clone(relay), thread })
    }

    /// The thread, by its number among the relay's.
    pub(super) fn thread(&self) -> usize {
        self.thread
    }
}

impl Drop for Place {
    fn drop(&mut self) {
        self.relay.listeners.loads().remove(self.thread);
        self.relay.connections.fetch_sub(1, Ordering::Relaxed);
    }
}

//! A lane's bytes in the binary messages of a WebSocket (RFC 6455), by `tokio-tungstenite`.
//!
//! Knows frames and messages; how a connection became a WebSocket at the relay is `relay::knock`'s
//! business. Pings of the carrier are answered, by tungstenite, and are no sign of life of the lane:
//! something on the way may answer them, and so the lane has its own.

use std::io::{self, IoSlice};
use std::pin::Pin;
use std::task::{Context, Poll, ready};

use bytes::{Buf as _, Bytes, BytesMut};
use futures_util::{Sink as _, Stream as _};
use http::HeaderValue;
use http::header::USER_AGENT as USER_AGENT_FIELD;
use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};
use tokio::net::TcpStream;
use tokio_tungstenite::tungstenite::client::IntoClientRequest as _;
use tokio_tungstenite::tungstenite::error::{CapacityError, ProtocolError};
use tokio_tungstenite::tungstenite::protocol::{Role, WebSocketConfig};
use tokio_tungstenite::tungstenite::{Error, Message};

use super::{CarrierError, USER_AGENT, gather, total};
use crate::tunnel::drive::WRITE_BYTES;
use crate::tunnel::transport::Movable;

/// Largest message, and frame, that is taken. tungstenite gives out a message when it is whole, so this
/// bounds what a peer can make a lane hold; eight batches of our own fit.
pub const MESSAGE_BYTES_MAX: usize = 1024 * 1024;

/// Read at once; a lane holds so much for as long as it lives.
const READ_BYTES: usize = 64 * 1024;

/// Most bytes that wait to be written: a batch, its head, and answers to pings.
const WRITE_BUFFER_BYTES_MAX: usize = 2 * WRITE_BYTES;

/// Messages without bytes of the stream, pings say, that are taken before others get their turn: what the
/// kernel holds of a socket may be a million of them.
const NOTHINGS_PER_POLL: usize = 64;

/// Smallest room for a batch that is kept between two of them.
const ROOM_BYTES: usize = 4 * 1024;

fn config() -> WebSocketConfig {
    WebSocketConfig::default()
        .read_buffer_size(READ_BYTES)
        // Each message is a batch: it goes out at once.
        .write_buffer_size(0)
        .max_write_buffer_size(WRITE_BUFFER_BYTES_MAX)
        .max_message_size(Some(MESSAGE_BYTES_MAX))
        .max_frame_size(Some(MESSAGE_BYTES_MAX))
}

/// A WebSocket as the byte stream of its binary messages, over a connection that can be moved.
pub struct WebSocketStream<S> {
    socket: tokio_tungstenite::WebSocketStream<S>,
    /// Of the last message, and not given out yet.
    unread: Bytes,
    /// For the next batch. Its memory is used again when tungstenite has let go of the last one.
    batch: BytesMut,
}

impl<S: Movable> WebSocketStream<S> {
    /// Makes the dialler's handshake for `path` at `authority`.
    ///
    /// # Errors
    /// [`CarrierError`] where what answers is no tunnel's, else the connection's. The time is the
    /// caller's to bound.
    pub async fn dial(stream: S, authority: &str, path: &str) -> io::Result<Self> {
        // The scheme of the request says nothing: TLS is done, or is not.
        let request = format!("ws://{authority}{path}").into_client_request();
        let mut request = request.map_err(io_error)?;
        request.headers_mut().insert(USER_AGENT_FIELD, HeaderValue::from_static(USER_AGENT));
        let dialled =
            tokio_tungstenite::client_async_with_config(request, stream, Some(config())).await;
        let (socket, _response) = dialled.map_err(io_error)?;
        Ok(Self::of(socket))
    }

    /// Returns the acceptor's end of a connection that is a WebSocket by now, of which `ahead` was
    /// read.
    pub async fn accepted(stream: S, ahead: Bytes) -> Self {
        let (ahead, config) = (ahead.to_vec(), Some(config()));
        let socket = tokio_tungstenite::WebSocketStream::from_partially_read(
            stream,
            ahead,
            Role::Server,
            config,
        );
        Self::of(socket.await)
    }

    fn of(socket: tokio_tungstenite::WebSocketStream<S>) -> Self {
        Self { socket, unread: Bytes::new(), batch: BytesMut::new() }
    }

    /// The connection under it.
    pub fn under_mut(&mut self) -> &mut S {
        self.socket.get_mut()
    }
}

impl<S: Movable> Movable for WebSocketStream<S> {
    fn detach(&mut self) -> io::Result<()> {
        self.under_mut().detach()
    }

    fn attach(&mut self) -> io::Result<()> {
        self.under_mut().attach()
    }

    fn tcp(&self) -> Option<&TcpStream> {
        self.socket.get_ref().tcp()
    }
}

impl<S: Movable> AsyncRead for WebSocketStream<S> {
    fn poll_read(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buf: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        let mut nothings = 0;
        while self.unread.is_empty() {
            if nothings == NOTHINGS_PER_POLL {
                cx.waker().wake_by_ref();
                return Poll::Pending;
            }
            nothings += 1;
            match ready!(Pin::new(&mut self.socket).poll_next(cx)) {
                Some(Ok(Message::Binary(bytes))) => self.unread = bytes,
                Some(Ok(Message::Ping(_) | Message::Pong(_))) => {}
                Some(Ok(Message::Text(_))) => {
                    let what = "a text message on the WebSocket (accepted: binary ones)";
                    return Poll::Ready(Err(CarrierError::Malformed(what).io()));
                }
                Some(Ok(Message::Close(_) | Message::Frame(_))) | None => {
                    return Poll::Ready(Ok(()));
                }
                Some(Err(error)) => return Poll::Ready(as_end(error)),
            }
        }
        // The one copy of reading: a lane's buffer is one, so that messages lie in one piece there
        // wherever the carrier's messages ended.
        let length = self.unread.len().min(buf.remaining());
        buf.put_slice(&self.unread[..length]);
        self.unread.advance(length);
        if self.unread.is_empty() {
            // tungstenite reads into the same memory then.
            self.unread = Bytes::new();
        }
        Poll::Ready(Ok(()))
    }
}

impl<S: Movable> AsyncWrite for WebSocketStream<S> {
    fn poll_write(
        self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        bytes: &[u8],
    ) -> Poll<io::Result<usize>> {
        self.poll_write_vectored(cx, &[IoSlice::new(bytes)])
    }

    /// Makes one message of a batch. What does not get out at once is tungstenite's, and the next batch
    /// is not taken before.
    fn poll_write_vectored(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        parts: &[IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        let this = &mut *self;
        if let Err(error) = ready!(Pin::new(&mut this.socket).poll_ready(cx)) {
            return Poll::Ready(Err(io_error(error)));
        }
        let length = total(parts).min(WRITE_BYTES);
        if length == 0 {
            return Poll::Ready(Ok(0));
        }
        this.batch.reserve(length.max(ROOM_BYTES));
        // Copied here, since the parts are the lane's and a message owns its bytes; and once more by
        // tungstenite, behind the frame's head, where the dialler's end masks it.
        gather(parts, length, &mut this.batch);
        let message = Message::Binary(this.batch.split().freeze());
        Pin::new(&mut this.socket).start_send(message).map_err(io_error)?;
        match Pin::new(&mut this.socket).poll_flush(cx) {
            Poll::Ready(Err(error)) => Poll::Ready(Err(io_error(error))),
            // Taken all the same.
            Poll::Ready(Ok(())) | Poll::Pending => Poll::Ready(Ok(length)),
        }
    }

    fn is_write_vectored(&self) -> bool {
        true
    }

    fn poll_flush(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.socket).poll_flush(cx).map_err(io_error)
    }

    /// Says that it closes, and does not wait for the same of the other end.
    fn poll_shutdown(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        match ready!(Pin::new(&mut self.socket).poll_close(cx)) {
            Ok(()) => {}
            Err(error) => return Poll::Ready(as_end(error)),
        }
        Pin::new(self.under_mut()).poll_shutdown(cx)
    }
}

/// A connection that closes without saying so ends the stream, as a TCP connection's end does.
fn as_end(error: Error) -> io::Result<()> {
    match error {
        Error::ConnectionClosed
        | Error::AlreadyClosed
        | Error::Protocol(ProtocolError::ResetWithoutClosingHandshake) => Ok(()),
        error => Err(io_error(error)),
    }
}

fn io_error(error: Error) -> io::Error {
    match error {
        Error::Io(error) => error,
        Error::Http(response) => {
            let body = response.body().as_deref().unwrap_or_default();
            CarrierError::http(response.status(), response.headers(), body).io()
        }
        Error::Capacity(CapacityError::MessageTooLong { .. }) => {
            CarrierError::Malformed("a message on the WebSocket above 1 MiB").io()
        }
        Error::ConnectionClosed | Error::AlreadyClosed => io::ErrorKind::BrokenPipe.into(),
        Error::Protocol(ProtocolError::NonZeroReservedBits) => {
            CarrierError::Malformed("a compressed frame on the WebSocket (none was agreed on)").io()
        }
        Error::Protocol(
            ProtocolError::ResetWithoutClosingHandshake | ProtocolError::HandshakeIncomplete,
        ) => io::ErrorKind::UnexpectedEof.into(),
        error => io::Error::new(io::ErrorKind::InvalidData, error),
    }
}

#[cfg(test)]
pub(super) mod tests;

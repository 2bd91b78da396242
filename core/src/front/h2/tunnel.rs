//! One HTTP/2 stream as a byte stream, after an extended CONNECT (RFC 8441 §5).

use std::io::{self, IoSlice};
use std::pin::Pin;
use std::task::{Context, Poll, ready};

use ::h2::{Reason, RecvStream, SendStream};
use bytes::{Buf, Bytes, BytesMut};
use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};

use crate::plugin::lend::Stream;

/// Most bytes taken by one write: a large message of the tunnel. What one stream has buffered is
/// bounded by the connection's own limit.
const WRITE_BYTES_MAX: usize = 64 * 1024;

/// A client's stream. The client's window opens as bytes are read; writing is held back by its window.
/// Dropped before its write direction was shut, it is reset with CANCEL, and what had not left is lost.
pub(super) struct Tunnel {
    send: SendStream<Bytes>,
    recv: RecvStream,
    /// Of the last DATA frame, what was not read yet.
    chunk: Bytes,
    shut: bool,
}

impl Tunnel {
    pub(super) fn new(send: SendStream<Bytes>, recv: RecvStream) -> Self {
        Self { send, recv, chunk: Bytes::new(), shut: false }
    }

    /// Returns how many of `wanted` bytes may be sent.
    fn poll_room(&mut self, cx: &mut Context<'_>, wanted: usize) -> Poll<io::Result<usize>> {
        if self.shut {
            return Poll::Ready(Err(io::ErrorKind::BrokenPipe.into()));
        }
        let wanted = wanted.min(WRITE_BYTES_MAX);
        self.send.reserve_capacity(wanted);
        let mut room = self.send.capacity();
        while room == 0 {
            room = match ready!(self.send.poll_capacity(cx)) {
                Some(room) => room.map_err(broken)?,
                None => return Poll::Ready(Err(io::ErrorKind::BrokenPipe.into())),
            };
        }
        Poll::Ready(Ok(room.min(wanted)))
    }

    fn write(&mut self, bytes: Bytes) -> io::Result<usize> {
        let length = bytes.len();
        self.send.send_data(bytes, false).map_err(broken)?;
        Ok(length)
    }
}

/// The client has reset the stream, or its connection is gone.
fn broken(error: ::h2::Error) -> io::Error {
    match error.reason() {
        Some(Reason::NO_ERROR) => io::ErrorKind::BrokenPipe.into(),
        _ => io::Error::new(io::ErrorKind::ConnectionReset, error),
    }
}

impl Stream for Tunnel {}

impl AsyncRead for Tunnel {
    fn poll_read(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buf: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        let this = &mut *self;
        while this.chunk.is_empty() {
            match ready!(this.recv.poll_data(cx)) {
                Some(chunk) => this.chunk = chunk.map_err(broken)?,
                None => return Poll::Ready(Ok(())),
            }
        }
        let length = this.chunk.len().min(buf.remaining());
        buf.put_slice(&this.chunk[..length]);
        this.chunk.advance(length);
        if this.chunk.is_empty() {
            // An emptied slice would keep the connection's read buffer.
            this.chunk = Bytes::new();
        }
        // Fails only where the stream is gone, which the next read tells.
        let _ = this.recv.flow_control().release_capacity(length);
        Poll::Ready(Ok(()))
    }
}

impl AsyncWrite for Tunnel {
    fn poll_write(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        bytes: &[u8],
    ) -> Poll<io::Result<usize>> {
        if bytes.is_empty() {
            return Poll::Ready(Ok(0));
        }
        let room = ready!(self.poll_room(cx, bytes.len()))?;
        Poll::Ready(self.write(Bytes::copy_from_slice(&bytes[..room])))
    }

    fn poll_write_vectored(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        parts: &[IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        let wanted = parts.iter().map(|part| part.len()).sum();
        if wanted == 0 {
            return Poll::Ready(Ok(0));
        }
        let room = ready!(self.poll_room(cx, wanted))?;
        let mut bytes = BytesMut::with_capacity(room);
        for part in parts {
            let length = part.len().min(room - bytes.len());
            bytes.extend_from_slice(&part[..length]);
        }
        Poll::Ready(self.write(bytes.freeze()))
    }

    fn is_write_vectored(&self) -> bool {
        true
    }

    fn poll_flush(self: Pin<&mut Self>, _cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        // The connection's own task writes what was sent.
        Poll::Ready(Ok(()))
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, _cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        if !self.shut {
            self.shut = true;
            self.send.send_data(Bytes::new(), true).map_err(broken)?;
        }
        Poll::Ready(Ok(()))
    }
}

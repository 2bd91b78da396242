//! The byte stream under an HTTP connection: what was read ahead comes first, and what a connection
//! must know of its stream while hyper owns it is left in [`Signals`].

use std::io::{self, IoSlice};
use std::pin::Pin;
use std::sync::atomic::{AtomicBool, AtomicU32, Ordering::Relaxed};
use std::sync::{Arc, Mutex, PoisonError};
use std::task::{Context, Poll, ready};

use bytes::{Buf, Bytes, BytesMut};
use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};

use super::exchange::Exchange;
use crate::plugin::lend::{Plain, Stream};

/// Bytes read ahead at most to notice that a client has gone while nobody reads. More would only be
/// copied twice; a client that has sent more cannot be seen leaving until it is read.
const AHEAD_BYTES_MAX: usize = 1024;

/// Bytes of interim responses that wait for a slow client at most: one head of the largest size.
/// Past it they are dropped.
const INTERIM_BYTES_MAX: usize = 64 * 1024;

/// What hyper writes by itself when a request's body is first asked for.
pub(super) const CONTINUE: &[u8] = b"HTTP/1.1 100 Continue\r\n\r\n";

/// What the stream and the exchanges of one connection tell its driver. All of it is used on the
/// connection's thread, but for `live`, which an exchange's end may touch from any.
pub(super) struct Signals {
    /// The client will send nothing more.
    pub(super) ended: AtomicBool,
    /// Bytes came since the driver last cleared it.
    pub(super) read: AtomicBool,
    /// Bytes went since the driver last cleared it.
    pub(super) wrote: AtomicBool,
    /// All that hyper wrote has left its buffer.
    pub(super) flushed: AtomicBool,
    /// Wake the connection when `flushed` is next set.
    awaits_flush: AtomicBool,
    /// hyper's next write may begin with a [`CONTINUE`] of its own, which the client is not to see.
    swallow: AtomicBool,
    /// `interim` is not empty.
    interim_waits: AtomicBool,
    /// What goes to the client before hyper's next byte. Put there only while hyper has nothing
    /// buffered, so that it cannot fall into another message.
    interim: Mutex<BytesMut>,
    /// Nobody reads, so look ahead for the client's end.
    pub(super) look_ahead: AtomicBool,
    /// A request's body was given up before its end.
    pub(super) unread: AtomicBool,
    /// Parts of exchanges that hyper or a plugin still holds.
    pub(super) live: AtomicU32,
    /// Plugins' calls that run. Without one, what is live waits for the client alone.
    pub(super) calls: Arc<AtomicU32>,
    /// Requests so far, wrapping.
    pub(super) requests: AtomicU32,
    /// The connection ends soon; see [`ConnectionInfo`](super::ConnectionInfo).
    pub(super) ends_soon: AtomicBool,
    /// The exchange that was answered by 101 and waits for the client's bytes.
    pub(super) upgrade: Mutex<Option<Arc<Exchange>>>,
}

impl Signals {
    pub(super) fn new() -> Self {
        Self {
            ended: AtomicBool::new(false),
            read: AtomicBool::new(false),
            wrote: AtomicBool::new(false),
            // Nothing was written, so nothing is left.
            flushed: AtomicBool::new(true),
            awaits_flush: AtomicBool::new(false),
            swallow: AtomicBool::new(false),
            interim_waits: AtomicBool::new(false),
            interim: Mutex::default(),
            look_ahead: AtomicBool::new(false),
            unread: AtomicBool::new(false),
            live: AtomicU32::new(0),
            calls: Arc::default(),
            ends_soon: AtomicBool::new(false),
            requests: AtomicU32::new(0),
            upgrade: Mutex::default(),
        }
    }

    /// Ready once all of the responses before has left hyper's buffer. What hyper writes next then
    /// belongs to the exchange at hand, and a `100 Continue` ahead of its response is kept from the
    /// client. Wakes the connection, in whose turn it must be called.
    pub(super) fn poll_start(&self) -> Poll<()> {
        if !self.flushed.load(Relaxed) {
            self.awaits_flush.store(true, Relaxed);
            return Poll::Pending;
        }
        // Whether or not we take the request for one that expects it: hyper decides by itself.
        self.swallow.store(true, Relaxed);
        Poll::Ready(())
    }

    /// Sends `bytes`, a whole interim response, ahead of hyper's next byte. To be called between
    /// [`Signals::poll_start`] and the response's head. Returns false where too much waits already,
    /// unless it must go.
    pub(super) fn put_interim(&self, bytes: &[u8], must_go: bool) -> bool {
        let mut interim = self.interim.lock().unwrap_or_else(PoisonError::into_inner);
        if interim.len() + bytes.len() > INTERIM_BYTES_MAX && !must_go {
            return false;
        }
        interim.extend_from_slice(bytes);
        self.interim_waits.store(true, Relaxed);
        true
    }
}

impl Drop for Signals {
    fn drop(&mut self) {
        // The connection was dropped between its 101 and the hand-over.
        let upgrade = self.upgrade.get_mut().unwrap_or_else(PoisonError::into_inner);
        if let Some(exchange) = upgrade.take() {
            exchange.upgrade_failed();
        }
    }
}

/// A part of an exchange that keeps its connection busy.
pub(super) struct Busy(Arc<Signals>);

impl Busy {
    pub(super) fn new(signals: &Arc<Signals>) -> Self {
        signals.live.fetch_add(1, Relaxed);
        Self(Arc::clone(signals))
    }

    pub(super) fn signals(&self) -> &Signals {
        &self.0
    }
}

impl Drop for Busy {
    fn drop(&mut self) {
        self.0.live.fetch_sub(1, Relaxed);
    }
}

/// A plugin's call that runs. It outlives its connection, whose end is told with its signals.
pub(super) struct Calling(Arc<AtomicU32>);

impl Calling {
    pub(super) fn new(signals: &Arc<Signals>) -> Self {
        signals.calls.fetch_add(1, Relaxed);
        Self(Arc::clone(&signals.calls))
    }
}

impl Drop for Calling {
    fn drop(&mut self) {
        self.0.fetch_sub(1, Relaxed);
    }
}

/// A byte stream with some of it already read.
pub(super) struct Wire<S> {
    stream: S,
    ahead: Bytes,
    signals: Arc<Signals>,
}

impl<S> Wire<S> {
    pub(super) fn new(stream: S, ahead: Bytes, signals: Arc<Signals>) -> Self {
        Self { stream, ahead, signals }
    }

    /// Returns the same stream with `bytes`, read from it before, in front of what else was read.
    pub(super) fn with_ahead(self, bytes: Bytes) -> Self {
        if bytes.is_empty() {
            return self;
        }
        let ahead = if self.ahead.is_empty() { bytes } else { [bytes, self.ahead].concat().into() };
        Self { ahead, ..self }
    }
}

impl<S: AsyncRead + Unpin> Wire<S> {
    /// Reads a little where nobody else does, so that the client's end is noticed.
    fn poll_ahead(&mut self, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        let mut space = [0; AHEAD_BYTES_MAX];
        let mut buf = ReadBuf::new(&mut space);
        ready!(Pin::new(&mut self.stream).poll_read(cx, &mut buf))?;
        if buf.filled().is_empty() {
            self.signals.ended.store(true, Relaxed);
            return Poll::Ready(Err(io::ErrorKind::UnexpectedEof.into()));
        }
        self.signals.read.store(true, Relaxed);
        self.ahead = Bytes::copy_from_slice(buf.filled());
        Poll::Ready(Ok(()))
    }
}

impl<S: AsyncWrite + Unpin> Wire<S> {
    /// Writes the interim responses that wait.
    fn poll_interim(&mut self, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        if !self.signals.interim_waits.load(Relaxed) {
            return Poll::Ready(Ok(()));
        }
        let mut interim = self.signals.interim.lock().unwrap_or_else(PoisonError::into_inner);
        while !interim.is_empty() {
            let written = ready!(Pin::new(&mut self.stream).poll_write(cx, &interim))?;
            if written == 0 {
                return Poll::Ready(Err(io::ErrorKind::WriteZero.into()));
            }
            self.signals.wrote.store(true, Relaxed);
            interim.advance(written);
        }
        *interim = BytesMut::new();
        self.signals.interim_waits.store(false, Relaxed);
        Poll::Ready(Ok(()))
    }

    /// Returns whether `bytes`, which hyper wants to write, begin with a `100 Continue` of its own.
    /// It stands first, since hyper had nothing buffered when this was asked for, and whole, since
    /// hyper buffers it whole; no final response begins so.
    fn swallows(&self, bytes: &[u8]) -> bool {
        if !self.signals.swallow.load(Relaxed) {
            return false;
        }
        self.signals.swallow.store(false, Relaxed);
        bytes.starts_with(CONTINUE)
    }
}

impl<S: Stream> Stream for Wire<S> {
    fn plain(&self) -> Option<Plain<'_>> {
        let is_bare = self.ahead.is_empty()
            && !self.signals.interim_waits.load(Relaxed)
            && !self.signals.swallow.load(Relaxed);
        if is_bare { self.stream.plain() } else { None }
    }
}

impl<S: AsyncRead + Unpin> AsyncRead for Wire<S> {
    fn poll_read(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buf: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        let this = &mut *self;
        if !this.ahead.is_empty() {
            let length = this.ahead.len().min(buf.remaining());
            buf.put_slice(&this.ahead[..length]);
            this.ahead.advance(length);
            if this.ahead.is_empty() {
                this.ahead = Bytes::new();
            }
            return Poll::Ready(Ok(()));
        }
        let before = buf.filled().len();
        ready!(Pin::new(&mut this.stream).poll_read(cx, buf))?;
        if buf.filled().len() == before {
            this.signals.ended.store(true, Relaxed);
        } else {
            this.signals.read.store(true, Relaxed);
        }
        Poll::Ready(Ok(()))
    }
}

impl<S: AsyncRead + AsyncWrite + Unpin> AsyncWrite for Wire<S> {
    fn poll_write(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buf: &[u8],
    ) -> Poll<io::Result<usize>> {
        ready!(self.poll_interim(cx))?;
        if self.swallows(buf) {
            return Poll::Ready(Ok(CONTINUE.len()));
        }
        self.signals.flushed.store(false, Relaxed);
        let written = ready!(Pin::new(&mut self.stream).poll_write(cx, buf))?;
        self.signals.wrote.store(true, Relaxed);
        Poll::Ready(Ok(written))
    }

    fn poll_write_vectored(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        bufs: &[IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        ready!(self.poll_interim(cx))?;
        if self.swallows(bufs.iter().find(|buf| !buf.is_empty()).map_or(&[], |buf| buf)) {
            return Poll::Ready(Ok(CONTINUE.len()));
        }
        self.signals.flushed.store(false, Relaxed);
        let written = ready!(Pin::new(&mut self.stream).poll_write_vectored(cx, bufs))?;
        self.signals.wrote.store(true, Relaxed);
        Poll::Ready(Ok(written))
    }

    fn is_write_vectored(&self) -> bool {
        self.stream.is_write_vectored()
    }

    /// Flushes. hyper calls this at the end of each of its turns, with nothing left in its buffer,
    /// which also makes it the place to look for the client's end while hyper does not read.
    fn poll_flush(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        ready!(self.poll_interim(cx))?;
        ready!(Pin::new(&mut self.stream).poll_flush(cx))?;
        self.signals.flushed.store(true, Relaxed);
        if self.signals.awaits_flush.load(Relaxed) {
            self.signals.awaits_flush.store(false, Relaxed);
            cx.waker().wake_by_ref();
        }
        if self.signals.look_ahead.load(Relaxed)
            && self.ahead.is_empty()
            && let Poll::Ready(Err(error)) = self.poll_ahead(cx)
        {
            return Poll::Ready(Err(error));
        }
        Poll::Ready(Ok(()))
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_shutdown(cx)
    }
}

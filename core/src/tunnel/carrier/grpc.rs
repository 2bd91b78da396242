//! A lane's bytes in the messages of a gRPC stream (`proto/carrier.proto`), on HTTP/2 by `h2`.
//!
//! Knows one stream, and at the dialling end the connection under it; the relay's connections, which may
//! have several streams, are `relay::knock`'s business. h2 is used as it is and not through tonic: that
//! would copy each batch once more at either end (ADR 0008). A peer of tonic's cannot tell.
//!
//! The dialler's connection is driven by whoever reads and writes the stream, so it needs no task and can
//! be moved. At the relay a task of its own drives it where it landed; the stream can be used from
//! another thread, and what waits between the two is bounded by the windows and by [`SEND_BUFFER_BYTES`].

use std::fmt;
use std::future::poll_fn;
use std::io::{self, IoSlice};
use std::pin::Pin;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::task::{Context, Poll, ready};

use bytes::{Buf as _, Bytes, BytesMut};
use h2::client::{self, Connection, ResponseFuture};
use h2::{Reason, RecvStream, SendStream};
use http::header::{CONTENT_TYPE, HeaderMap, HeaderName, HeaderValue, TE, USER_AGENT as AGENT};
use http::{Method, Request, Response, StatusCode, Uri};
use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};
use tokio::net::TcpStream;
use tokio::sync::Notify;

use self::message::{HEAD_BYTES_MAX, PREFIX_BYTES, Reader, write_head};
use super::{CarrierError, GRPC_PATH, USER_AGENT, first_line, gather, total};
use crate::tunnel::drive::WRITE_BYTES;
use crate::tunnel::transport::{Movable, Transport};

pub mod message;

/// What one stream may have on its way to us: above what a lane's exchanges have of credit at once, so that
/// the credit is what bounds them. A lane reads without waiting for anybody, so little of it is ever held.
pub const WINDOW_BYTES: u32 = 16 * 1024 * 1024;

/// The same for all streams of one connection.
pub const CONNECTION_WINDOW_BYTES: u32 = 64 * 1024 * 1024;

/// Largest HTTP/2 frame that a dialler takes: a batch of the relay's, and its head.
const FRAME_BYTES_MAX: u32 = 256 * 1024;

/// Most bytes of a stream that wait for the connection: a batch and its head. Low, so that what is written
/// next is chosen late.
pub const SEND_BUFFER_BYTES: usize = WRITE_BYTES + HEAD_BYTES_MAX;

/// Largest head of an answer.
const ANSWER_HEAD_BYTES_MAX: u32 = 16 * 1024;

/// Smallest room for a batch that is kept between two of them.
const ROOM_BYTES: usize = 4 * 1024;

static GRPC_STATUS: HeaderName = HeaderName::from_static("grpc-status");
static GRPC_MESSAGE: HeaderName = HeaderName::from_static("grpc-message");

/// A message without bytes, with which each end begins: it is nothing to the stream, but some ingresses
/// (nginx) pass on a head only with a part of the body.
const NOTHING: Bytes = Bytes::from_static(&[0; PREFIX_BYTES]);

/// Content type of gRPC.
pub const CONTENT: HeaderValue = HeaderValue::from_static("application/grpc");

/// A gRPC stream as the byte stream in its messages.
pub struct GrpcStream {
    send: SendStream<Bytes>,
    receive: Receive,
    reader: Reader,
    /// A frame's bytes that were not looked at yet.
    frame: Bytes,
    /// A message's bytes that were not given out yet.
    unread: Bytes,
    /// For the next batch. Its memory is used again when h2 has let go of the last one.
    batch: BytesMut,
    has_ended: bool,
    /// At the dialling end: what drives the connection.
    engine: Option<Engine>,
    /// At the other: told when the handshake is done, which is when a lane takes it to its thread.
    stands: Option<Arc<Notify>>,
}

enum Receive {
    /// The dialler may send before it is answered.
    Answer(ResponseFuture),
    /// Answered by something that is no tunnel's; the body says why.
    Refused(Response<RecvStream>),
    Open(RecvStream),
    /// There is nothing to come.
    Ended,
}

impl fmt::Debug for GrpcStream {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("GrpcStream").field("has_ended", &self.has_ended).finish_non_exhaustive()
    }
}

impl GrpcStream {
    /// Begins the RPC at `authority`, over a connection that speaks HTTP/2 by now. What answers is told
    /// when it is read.
    ///
    /// # Errors
    /// The connection's. The time is the caller's to bound.
    pub async fn dial(stream: Transport, authority: &str, is_tls: bool) -> io::Result<Self> {
        let under = Arc::new(Mutex::new(stream));
        let handshake = client::Builder::new()
            .initial_window_size(WINDOW_BYTES)
            .initial_connection_window_size(CONNECTION_WINDOW_BYTES)
            .max_frame_size(FRAME_BYTES_MAX)
            .max_header_list_size(ANSWER_HEAD_BYTES_MAX)
            .max_send_buffer_size(SEND_BUFFER_BYTES)
            .enable_push(false)
            .handshake(Under(Arc::clone(&under)));
        let (mut requests, connection) = handshake.await.map_err(io_error)?;
        let scheme = if is_tls { "https" } else { "http" };
        let target = Uri::builder()
            .scheme(scheme)
            .authority(authority)
            .path_and_query(GRPC_PATH)
            .build()
            .map_err(io::Error::other)?;
        let request = Request::builder()
            .method(Method::POST)
            .uri(target)
            .header(CONTENT_TYPE, CONTENT)
            .header(TE, HeaderValue::from_static("trailers"))
            .header(AGENT, HeaderValue::from_static(USER_AGENT))
            .body(())
            .map_err(io::Error::other)?;
        let (answer, mut send) = requests.send_request(request, false).map_err(io_error)?;
        send.send_data(NOTHING, false).map_err(io_error)?;
        let engine = Engine { under, connection, end: None };
        Ok(Self::new(send, Receive::Answer(answer), Some(engine)))
    }

    /// Waits until the RPC is answered by a tunnel, which needs no word of ours for that.
    ///
    /// # Errors
    /// [`CarrierError`] where what answers is none, else the connection's. The time is the caller's to
    /// bound.
    pub async fn answered(&mut self) -> io::Result<()> {
        poll_fn(|cx| {
            let driven = self.drive(cx);
            let told = match &mut self.receive {
                Receive::Answer(answer) => match Pin::new(answer).poll(cx) {
                    Poll::Pending => Poll::Pending,
                    Poll::Ready(answer) => {
                        self.receive = take_answer(answer.map_err(io_error)?)?;
                        Poll::Ready(())
                    }
                },
                _ => Poll::Ready(()),
            };
            match (told, &self.receive) {
                (Poll::Ready(()), Receive::Refused(_)) => self.poll_frame(cx).map_ok(drop),
                (Poll::Ready(()), _) => Poll::Ready(Ok(())),
                (Poll::Pending, _) => {
                    driven.map_or_else(|e| Poll::Ready(Err(e)), |()| Poll::Pending)
                }
            }
        })
        .await
    }

    /// Returns the acceptor's end of an RPC that was answered; `stands` is told when a lane has it.
    #[must_use]
    pub fn accepted(mut send: SendStream<Bytes>, receive: RecvStream, stands: Arc<Notify>) -> Self {
        // An error comes again with what is written next.
        let _ = send.send_data(NOTHING, false);
        Self { stands: Some(stands), ..Self::new(send, Receive::Open(receive), None) }
    }

    fn new(send: SendStream<Bytes>, receive: Receive, engine: Option<Engine>) -> Self {
        Self {
            send,
            receive,
            reader: Reader::default(),
            frame: Bytes::new(),
            unread: Bytes::new(),
            batch: BytesMut::new(),
            has_ended: false,
            engine,
            stands: None,
        }
    }

    /// Moves the connection on, where it is ours to.
    fn drive(&mut self, cx: &mut Context<'_>) -> io::Result<()> {
        match &mut self.engine {
            Some(engine) => engine.drive(cx),
            None => Ok(()),
        }
    }

    /// The next frame's bytes; empty: nothing more comes.
    fn poll_frame(&mut self, cx: &mut Context<'_>) -> Poll<io::Result<Bytes>> {
        loop {
            match &mut self.receive {
                Receive::Answer(answer) => {
                    let answer = ready!(Pin::new(answer).poll(cx)).map_err(io_error)?;
                    self.receive = take_answer(answer)?;
                }
                Receive::Refused(answer) => {
                    let (status, headers) = (answer.status(), answer.headers().clone());
                    let body = match ready!(answer.body_mut().poll_data(cx)) {
                        Some(Ok(body)) => body,
                        Some(Err(_)) | None => Bytes::new(),
                    };
                    self.receive = Receive::Ended;
                    let error = CarrierError::http(status, &headers, &body);
                    return Poll::Ready(Err(error.io()));
                }
                Receive::Open(receive) => match ready!(receive.poll_data(cx)) {
                    Some(Ok(bytes)) => {
                        let _ = receive.flow_control().release_capacity(bytes.len());
                        // An empty frame is none (RFC 9113 §6.1 permits it).
                        if !bytes.is_empty() {
                            return Poll::Ready(Ok(bytes));
                        }
                    }
                    Some(Err(error)) => return Poll::Ready(Err(io_error(error))),
                    None => {
                        let trailers = ready!(receive.poll_trailers(cx)).map_err(io_error)?;
                        self.receive = Receive::Ended;
                        if let Some(trailers) = trailers {
                            check_status(&trailers)?;
                        }
                    }
                },
                Receive::Ended => return Poll::Ready(Ok(Bytes::new())),
            }
        }
    }

    /// Room for a message's head and at least a byte.
    fn poll_room(&mut self, cx: &mut Context<'_>, wanted: usize) -> Poll<io::Result<usize>> {
        self.send.reserve_capacity(wanted);
        loop {
            let room = self.send.capacity();
            if room > HEAD_BYTES_MAX {
                return Poll::Ready(Ok(room));
            }
            match ready!(self.send.poll_capacity(cx)) {
                Some(Ok(_)) => {}
                Some(Err(error)) => return Poll::Ready(Err(io_error(error))),
                None => return Poll::Ready(Err(io::ErrorKind::BrokenPipe.into())),
            }
        }
    }
}

/// Tells a tunnel's answer from all others.
fn take_answer(answer: Response<RecvStream>) -> io::Result<Receive> {
    let content = answer.headers().get(CONTENT_TYPE).map(HeaderValue::as_bytes);
    let is_grpc = content.is_some_and(|content| content.starts_with(CONTENT.as_bytes()));
    if answer.status() != StatusCode::OK || !is_grpc {
        return Ok(Receive::Refused(answer));
    }
    check_status(answer.headers())?;
    Ok(Receive::Open(answer.into_body()))
}

/// Whether an RPC ends well, as far as its fields say.
fn check_status(fields: &HeaderMap) -> io::Result<()> {
    let Some(status) = fields.get(&GRPC_STATUS) else { return Ok(()) };
    match status.to_str().ok().and_then(|status| status.parse().ok()) {
        Some(0) => Ok(()),
        Some(status) => {
            let said = fields.get(&GRPC_MESSAGE).and_then(|said| first_line(said.as_bytes()));
            Err(CarrierError::Grpc { status, said }.io())
        }
        None => Err(CarrierError::Malformed("a grpc-status that is no number").io()),
    }
}

impl Movable for GrpcStream {
    fn detach(&mut self) -> io::Result<()> {
        if let Some(stands) = &self.stands {
            stands.notify_one();
        }
        self.engine.as_ref().map_or(Ok(()), |engine| lock(&engine.under).detach())
    }

    fn attach(&mut self) -> io::Result<()> {
        self.engine.as_ref().map_or(Ok(()), |engine| lock(&engine.under).attach())
    }

    /// None: the connection has it, and may have others.
    fn tcp(&self) -> Option<&TcpStream> {
        None
    }
}

impl AsyncRead for GrpcStream {
    fn poll_read(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buf: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        let this = &mut *self;
        let driven = this.drive(cx);
        let before = buf.filled().len();
        loop {
            // The one copy of reading: a lane's buffer is one, so that messages lie in one piece there
            // wherever the carrier's messages ended.
            let length = this.unread.len().min(buf.remaining());
            buf.put_slice(&this.unread[..length]);
            this.unread.advance(length);
            if buf.remaining() == 0 {
                return Poll::Ready(Ok(()));
            }
            match this.reader.next(&mut this.frame) {
                Ok(Some(bytes)) => this.unread = bytes,
                Ok(None) => match this.poll_frame(cx) {
                    Poll::Ready(Ok(frame)) if frame.is_empty() => return Poll::Ready(Ok(())),
                    Poll::Ready(Ok(frame)) => this.frame = frame,
                    // Comes again.
                    _ if buf.filled().len() > before => return Poll::Ready(Ok(())),
                    Poll::Ready(Err(error)) => {
                        // What is wrong with the connection says more than that the stream ended with it.
                        return Poll::Ready(Err(driven.err().unwrap_or(error)));
                    }
                    Poll::Pending => {
                        return driven.map_or_else(|e| Poll::Ready(Err(e)), |()| Poll::Pending);
                    }
                },
                Err(what) => return Poll::Ready(Err(CarrierError::Malformed(what).io())),
            }
        }
    }
}

impl AsyncWrite for GrpcStream {
    fn poll_write(
        self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        bytes: &[u8],
    ) -> Poll<io::Result<usize>> {
        self.poll_write_vectored(cx, &[IoSlice::new(bytes)])
    }

    /// Makes one message of a batch, as far as there is room for it.
    fn poll_write_vectored(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        parts: &[IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        let this = &mut *self;
        this.drive(cx)?;
        let wanted = total(parts).min(WRITE_BYTES);
        if wanted == 0 {
            return Poll::Ready(Ok(0));
        }
        let room = ready!(this.poll_room(cx, wanted + HEAD_BYTES_MAX))?;
        let length = wanted.min(room - HEAD_BYTES_MAX);
        this.batch.reserve((length + HEAD_BYTES_MAX).max(ROOM_BYTES));
        write_head(length, &mut this.batch);
        // The one copy of writing: the parts are the lane's, and h2 owns what it sends.
        gather(parts, length, &mut this.batch);
        this.send.send_data(this.batch.split().freeze(), false).map_err(io_error)?;
        this.drive(cx)?;
        Poll::Ready(Ok(length))
    }

    fn is_write_vectored(&self) -> bool {
        true
    }

    fn poll_flush(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Poll::Ready(self.drive(cx))
    }

    /// Ends the RPC.
    fn poll_shutdown(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        let this = &mut *self;
        if !this.has_ended {
            this.has_ended = true;
            let ended = match this.engine {
                Some(_) => this.send.send_data(Bytes::new(), true),
                None => this.send.send_trailers(trailers(0)),
            };
            // The other end may have ended it before.
            if ended.is_err() {
                return Poll::Ready(Ok(()));
            }
        }
        let _ = this.drive(cx);
        match &mut this.engine {
            Some(engine) => engine.poll_written(cx),
            None => Poll::Ready(Ok(())),
        }
    }
}

/// What says at an RPC's end how it ended.
#[must_use]
pub fn trailers(status: u32) -> HeaderMap {
    let mut trailers = HeaderMap::with_capacity(1);
    trailers.insert(GRPC_STATUS.clone(), HeaderValue::from(status));
    trailers
}

/// What drives the dialler's connection.
struct Engine {
    under: Arc<Mutex<Transport>>,
    connection: Connection<Under, Bytes>,
    /// It has ended: well, or by this kind of fault, which is told once in full.
    end: Option<io::ErrorKind>,
}

impl Engine {
    fn drive(&mut self, cx: &mut Context<'_>) -> io::Result<()> {
        match self.end {
            // The stream tells its own end.
            Some(io::ErrorKind::Other) => return Ok(()),
            Some(kind) => return Err(kind.into()),
            None => {}
        }
        match Pin::new(&mut self.connection).poll(cx) {
            Poll::Pending => Ok(()),
            Poll::Ready(Ok(())) => {
                self.end = Some(io::ErrorKind::Other);
                Ok(())
            }
            Poll::Ready(Err(error)) => {
                let error = io_error(error);
                self.end = Some(match error.kind() {
                    io::ErrorKind::Other => io::ErrorKind::ConnectionAborted,
                    kind => kind,
                });
                Err(error)
            }
        }
    }

    /// Ready when the socket has taken what was written.
    fn poll_written(&mut self, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut *lock(&self.under)).poll_flush(cx)
    }
}

fn lock(under: &Mutex<Transport>) -> MutexGuard<'_, Transport> {
    under.lock().unwrap_or_else(PoisonError::into_inner)
}

/// The connection under the dialler's HTTP/2, shared with whoever moves it: h2 gives it out no more.
/// Nobody waits for the lock, since the stream that holds both ends is polled by one task.
struct Under(Arc<Mutex<Transport>>);

impl AsyncRead for Under {
    fn poll_read(
        self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buf: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        Pin::new(&mut *lock(&self.0)).poll_read(cx, buf)
    }
}

impl AsyncWrite for Under {
    fn poll_write(
        self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        bytes: &[u8],
    ) -> Poll<io::Result<usize>> {
        Pin::new(&mut *lock(&self.0)).poll_write(cx, bytes)
    }

    fn poll_write_vectored(
        self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        parts: &[IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        Pin::new(&mut *lock(&self.0)).poll_write_vectored(cx, parts)
    }

    fn is_write_vectored(&self) -> bool {
        true
    }

    fn poll_flush(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut *lock(&self.0)).poll_flush(cx)
    }

    fn poll_shutdown(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut *lock(&self.0)).poll_shutdown(cx)
    }
}

/// A stream that the other end gives up, or a connection that goes, ends the bytes as TCP's end does.
fn io_error(error: h2::Error) -> io::Error {
    let ends = matches!(error.reason(), Some(Reason::NO_ERROR | Reason::CANCEL));
    if ends || error.is_go_away() && error.is_remote() {
        return io::Error::new(io::ErrorKind::ConnectionReset, error);
    }
    if error.is_io() {
        return error.into_io().unwrap_or_else(|| io::ErrorKind::ConnectionReset.into());
    }
    io::Error::new(io::ErrorKind::InvalidData, error)
}

#[cfg(test)]
mod tests;

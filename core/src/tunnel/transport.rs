//! What a lane runs on: a connection that can go from one thread to another, plain or by TLS, and what
//! carries the lane's bytes on it ([`Kind`]).
//!
//! A socket belongs to the runtime that registered it, and a handshake is done on another thread than
//! the lane's. So the socket inside a TLS stream can be taken off one runtime and put on another
//! ([`Movable`]); what TLS has read and not given out yet, and what it has still to write, goes along.

use std::cell::RefCell;
use std::io::{self, IoSlice};
use std::mem;
use std::pin::Pin;
use std::task::{Context, Poll, ready};

use bytes::{Buf as _, Bytes, BytesMut};
use rustls::CommonState;
use rustls::pki_types::CertificateDer;
use tokio::io::{AsyncRead, AsyncReadExt as _, AsyncWrite, ReadBuf};
use tokio::net::TcpStream;
use tokio_rustls::{client, server};

use super::carrier::Kind;
use super::carrier::grpc::GrpcStream;
use super::carrier::websocket::WebSocketStream;
use crate::plugin::lend::{Plain, Stream};
use crate::tls::{H2_ALPN, HTTP1_ALPN, TUNNEL_ALPN};

/// What rustls may hold of one direction: a batch of the lane's (`drive`), so that it is taken and
/// encrypted as a whole and leaves in one system call. More is not taken before this is written,
/// which is the lane's backpressure.
pub const TLS_BUFFER_BYTES: usize = super::drive::WRITE_BYTES;

/// Bytes read from a TLS connection's socket at once. rustls asks for 4 KiB at a time; a system call
/// for each would cost more than what is done with them.
const READ_AHEAD_BYTES: usize = 64 * 1024;

thread_local! {
    /// The read buffer of this thread's idle connections, which hold none.
    static SPARE: RefCell<Option<BytesMut>> = const { RefCell::new(None) };
}

/// A stream whose socket can go from one runtime to another.
pub trait Movable: AsyncRead + AsyncWrite + Unpin + Send {
    /// Takes the socket off its runtime. Nothing can be read or written until it is attached.
    ///
    /// # Errors
    /// The system's; the connection is lost then.
    fn detach(&mut self) -> io::Result<()>;

    /// Puts the socket on the current runtime.
    ///
    /// # Errors
    /// The system's; the connection is lost then.
    fn attach(&mut self) -> io::Result<()>;

    /// The socket, where it is attached.
    fn tcp(&self) -> Option<&TcpStream>;
}

/// A socket, and what was read of it and not given out yet.
#[derive(Debug)]
pub struct Socket {
    state: State,
    ahead: BytesMut,
    reads_ahead: bool,
}

#[derive(Debug)]
enum State {
    Attached(TcpStream),
    Detached(std::net::TcpStream),
    Lost,
}

impl Socket {
    /// Returns the socket, of which nothing was read yet.
    #[must_use]
    pub fn new(stream: TcpStream) -> Self {
        Self::with_ahead(stream, BytesMut::new())
    }

    /// Returns the socket with what was read of it before.
    #[must_use]
    pub fn with_ahead(stream: TcpStream, ahead: BytesMut) -> Self {
        Self { state: State::Attached(stream), ahead, reads_ahead: false }
    }

    /// Gives bytes back that were taken of it; they come first again.
    pub fn put_back(&mut self, bytes: &[u8]) {
        let rest = mem::take(&mut self.ahead);
        self.ahead = BytesMut::with_capacity(bytes.len() + rest.len());
        self.ahead.extend_from_slice(bytes);
        self.ahead.extend_from_slice(&rest);
    }

    /// Reads in large pieces from here on, whatever is asked for: for TLS, which asks for small ones.
    #[must_use]
    pub fn reading_ahead(self) -> Self {
        Self { reads_ahead: true, ..self }
    }

    /// Waits for the first `count` bytes without taking them. Fewer: the connection ended.
    ///
    /// # Errors
    /// The connection's. The time is the caller's to bound.
    pub async fn peek(&mut self, count: usize) -> io::Result<&[u8]> {
        while self.ahead.len() < count {
            let mut ahead = mem::take(&mut self.ahead);
            ahead.reserve(count);
            let read = self.attached()?.read_buf(&mut ahead).await;
            self.ahead = ahead;
            if read? == 0 {
                break;
            }
        }
        Ok(&self.ahead[..count.min(self.ahead.len())])
    }

    fn attached(&mut self) -> io::Result<&mut TcpStream> {
        match &mut self.state {
            State::Attached(stream) => Ok(stream),
            State::Detached(_) | State::Lost => Err(io::ErrorKind::NotConnected.into()),
        }
    }

    /// Fills `ahead`, which is empty, with one read.
    fn poll_fill(&mut self, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        let mut ahead = SPARE.with_borrow_mut(Option::take).unwrap_or_default();
        ahead.reserve(READ_AHEAD_BYTES);
        let read = {
            let mut read = std::pin::pin!(self.attached()?.read_buf(&mut ahead));
            read.as_mut().poll(cx)
        };
        self.ahead = ahead;
        self.return_spare();
        Poll::Ready(ready!(read).map(drop))
    }

    /// What holds nothing lends its buffer to the next connection of the thread.
    fn return_spare(&mut self) {
        if self.ahead.is_empty() && self.ahead.capacity() > 0 {
            let mut buffer = mem::take(&mut self.ahead);
            // From the front again. A smaller one than is read into is of no use.
            if buffer.try_reclaim(READ_AHEAD_BYTES) {
                SPARE.with_borrow_mut(|spare| *spare = Some(buffer));
            }
        }
    }
}

impl Stream for Socket {
    fn plain(&self) -> Option<Plain<'_>> {
        match &self.state {
            State::Attached(stream) if self.ahead.is_empty() => Some(Plain::Tcp(stream)),
            _ => None,
        }
    }
}

impl Movable for Socket {
    fn detach(&mut self) -> io::Result<()> {
        self.state = match mem::replace(&mut self.state, State::Lost) {
            State::Attached(stream) => State::Detached(stream.into_std()?),
            other => other,
        };
        Ok(())
    }

    fn attach(&mut self) -> io::Result<()> {
        self.state = match mem::replace(&mut self.state, State::Lost) {
            State::Detached(stream) => State::Attached(TcpStream::from_std(stream)?),
            other => other,
        };
        Ok(())
    }

    fn tcp(&self) -> Option<&TcpStream> {
        match &self.state {
            State::Attached(stream) => Some(stream),
            State::Detached(_) | State::Lost => None,
        }
    }
}

impl AsyncRead for Socket {
    fn poll_read(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buf: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        if self.ahead.is_empty() {
            if !self.reads_ahead || buf.remaining() >= READ_AHEAD_BYTES {
                return Pin::new(self.attached()?).poll_read(cx, buf);
            }
            ready!(self.poll_fill(cx))?;
        }
        let length = self.ahead.len().min(buf.remaining());
        buf.put_slice(&self.ahead[..length]);
        self.ahead.advance(length);
        self.return_spare();
        Poll::Ready(Ok(()))
    }
}

impl AsyncWrite for Socket {
    fn poll_write(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        bytes: &[u8],
    ) -> Poll<io::Result<usize>> {
        Pin::new(self.attached()?).poll_write(cx, bytes)
    }

    fn poll_write_vectored(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        parts: &[IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        Pin::new(self.attached()?).poll_write_vectored(cx, parts)
    }

    fn is_write_vectored(&self) -> bool {
        true
    }

    fn poll_flush(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(self.attached()?).poll_flush(cx)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(self.attached()?).poll_shutdown(cx)
    }
}

macro_rules! movable {
    ($stream:ty) => {
        impl<S: Movable> Movable for $stream {
            fn detach(&mut self) -> io::Result<()> {
                self.get_mut().0.detach()
            }

            fn attach(&mut self) -> io::Result<()> {
                self.get_mut().0.attach()
            }

            fn tcp(&self) -> Option<&TcpStream> {
                self.get_ref().0.tcp()
            }
        }
    };
}

movable!(client::TlsStream<S>);
movable!(server::TlsStream<S>);

/// What was agreed on by ALPN.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Agreed {
    /// The tunnel's protocol; of a plain connection it is supposed.
    Tunnel,
    /// HTTP/1.1.
    Http1,
    /// HTTP/2.
    Http2,
    /// Nothing, or something else.
    Nothing,
}

/// A lane's connection.
pub struct Transport {
    io: Io,
    kind: Kind,
    is_tls: bool,
    /// Read of `io` and not given out yet.
    ahead: Bytes,
    /// Of the other end, verified in the handshake.
    chain: Vec<CertificateDer<'static>>,
    agreed: Agreed,
    /// The data-path thread on which its connection is driven, where that is another task's.
    home: Option<usize>,
}

enum Io {
    Plain(Socket),
    Layered(Box<dyn Movable>),
}

impl std::fmt::Debug for Transport {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Transport")
            .field("kind", &self.kind)
            .field("is_tls", &self.is_tls)
            .finish_non_exhaustive()
    }
}

impl Transport {
    /// Returns a plain connection.
    #[must_use]
    pub fn plain(socket: Socket) -> Self {
        Self {
            io: Io::Plain(socket),
            kind: Kind::Tcp,
            is_tls: false,
            ahead: Bytes::new(),
            chain: Vec::new(),
            agreed: Agreed::Tunnel,
            home: None,
        }
    }

    /// Returns the dialler's end of a TLS connection whose handshake is done.
    #[must_use]
    pub fn client<S: Movable + 'static>(mut stream: client::TlsStream<S>) -> Self {
        let session = stream.get_mut().1;
        session.set_buffer_limit(Some(TLS_BUFFER_BYTES));
        let facts = facts(session);
        Self::tls(Box::new(stream), facts)
    }

    /// Returns the acceptor's end of a TLS connection whose handshake is done.
    #[must_use]
    pub fn server<S: Movable + 'static>(mut stream: server::TlsStream<S>) -> Self {
        let session = stream.get_mut().1;
        session.set_buffer_limit(Some(TLS_BUFFER_BYTES));
        let facts = facts(session);
        Self::tls(Box::new(stream), facts)
    }

    fn tls(stream: Box<dyn Movable>, facts: (Vec<CertificateDer<'static>>, Agreed)) -> Self {
        let (chain, agreed) = facts;
        Self {
            io: Io::Layered(stream),
            kind: Kind::Tcp,
            is_tls: true,
            ahead: Bytes::new(),
            chain,
            agreed,
            home: None,
        }
    }

    /// Returns a WebSocket over a connection, of which it keeps what the handshake showed.
    #[must_use]
    pub fn websocket(mut stream: WebSocketStream<Self>) -> Self {
        let under = stream.under_mut();
        let (is_tls, chain) = (under.is_tls, mem::take(&mut under.chain));
        Self::carried(Kind::WebSocket, Box::new(stream), is_tls, chain)
    }

    /// Returns a gRPC stream over a connection that has shown `chain`.
    #[must_use]
    pub fn grpc(stream: GrpcStream, is_tls: bool, chain: Vec<CertificateDer<'static>>) -> Self {
        Self::carried(Kind::Grpc, Box::new(stream), is_tls, chain)
    }

    fn carried(
        kind: Kind,
        stream: Box<dyn Movable>,
        is_tls: bool,
        chain: Vec<CertificateDer<'static>>,
    ) -> Self {
        Self {
            io: Io::Layered(stream),
            kind,
            is_tls,
            ahead: Bytes::new(),
            chain,
            agreed: Agreed::Tunnel,
            home: None,
        }
    }

    /// What carries the lane's bytes.
    #[must_use]
    pub const fn kind(&self) -> Kind {
        self.kind
    }

    /// Whether nobody on the way to the end of TLS reads it.
    #[must_use]
    pub const fn is_tls(&self) -> bool {
        self.is_tls
    }

    /// What was agreed on by ALPN.
    #[must_use]
    pub const fn agreed(&self) -> Agreed {
        self.agreed
    }

    /// Whether the tunnel's protocol was agreed on (ALPN); of a plain connection it is supposed.
    #[must_use]
    pub fn speaks_tunnel(&self) -> bool {
        self.agreed == Agreed::Tunnel
    }

    /// The data-path thread on which its connection is driven, where that is another task's.
    #[must_use]
    pub const fn home(&self) -> Option<usize> {
        self.home
    }

    /// The same, driven on a data-path thread.
    #[must_use]
    pub fn at_home(self, thread: usize) -> Self {
        Self { home: Some(thread), ..self }
    }

    /// The other end's certificates, its own first; empty: it has shown none.
    #[must_use]
    pub fn peer_chain(&self) -> &[CertificateDer<'static>] {
        &self.chain
    }

    /// Sets how many bytes may wait in the kernel until the network takes them.
    pub fn limit_unsent(&self, bytes: usize) {
        if let Some(stream) = self.tcp() {
            // Fails on no socket that is connected; unset, bulk is in the way of small messages.
            let _ = super::dial::limit_unsent(stream, bytes);
        }
    }

    /// Forgets the other end's certificates: a lane has no use for them.
    pub fn forget_peer_chain(&mut self) {
        self.chain = Vec::new();
    }

    /// Waits for the first `count` bytes without taking them. Fewer: the connection ended.
    ///
    /// # Errors
    /// The connection's. The time is the caller's to bound.
    pub async fn peek(&mut self, count: usize) -> io::Result<&[u8]> {
        while self.ahead.len() < count {
            let mut ahead = BytesMut::with_capacity(count);
            ahead.extend_from_slice(&self.ahead);
            let io = self.io_mut();
            let mut more = io.take((count - ahead.len()) as u64);
            if more.read_buf(&mut ahead).await? == 0 {
                break;
            }
            self.ahead = ahead.freeze();
        }
        Ok(&self.ahead[..count.min(self.ahead.len())])
    }

    /// Gives bytes back that were taken of it; they come first again.
    pub fn put_back(&mut self, bytes: Bytes) {
        if self.ahead.is_empty() {
            self.ahead = bytes;
        } else {
            self.ahead = [&*bytes, &*self.ahead].concat().into();
        }
    }

    const fn io(&self) -> &dyn Movable {
        match &self.io {
            Io::Plain(socket) => socket,
            Io::Layered(stream) => &**stream,
        }
    }

    fn io_mut(&mut self) -> Pin<&mut dyn Movable> {
        Pin::new(match &mut self.io {
            Io::Plain(socket) => socket,
            Io::Layered(stream) => &mut **stream,
        })
    }
}

#[cfg(test)]
impl Transport {
    /// Returns what a test has in place of a connection.
    pub(crate) fn scripted(stream: tokio::io::DuplexStream) -> Self {
        Self::carried(Kind::Tcp, Box::new(stream), false, Vec::new())
    }
}

#[cfg(test)]
impl Movable for tokio::io::DuplexStream {
    fn detach(&mut self) -> io::Result<()> {
        Ok(())
    }

    fn attach(&mut self) -> io::Result<()> {
        Ok(())
    }

    fn tcp(&self) -> Option<&TcpStream> {
        None
    }
}

fn facts(session: &CommonState) -> (Vec<CertificateDer<'static>>, Agreed) {
    let chain = session.peer_certificates().unwrap_or_default().to_vec();
    let agreed = match session.alpn_protocol() {
        Some(TUNNEL_ALPN) => Agreed::Tunnel,
        Some(HTTP1_ALPN) => Agreed::Http1,
        Some(H2_ALPN) => Agreed::Http2,
        _ => Agreed::Nothing,
    };
    (chain, agreed)
}

impl Stream for Transport {
    fn plain(&self) -> Option<Plain<'_>> {
        match &self.io {
            Io::Plain(socket) if self.ahead.is_empty() => socket.plain(),
            Io::Plain(_) | Io::Layered(_) => None,
        }
    }
}

impl Movable for Transport {
    fn detach(&mut self) -> io::Result<()> {
        self.io_mut().detach()
    }

    fn attach(&mut self) -> io::Result<()> {
        self.io_mut().attach()
    }

    fn tcp(&self) -> Option<&TcpStream> {
        self.io().tcp()
    }
}

impl AsyncRead for Transport {
    fn poll_read(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buf: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        if !self.ahead.is_empty() {
            let length = self.ahead.len().min(buf.remaining());
            buf.put_slice(&self.ahead.split_to(length));
            return Poll::Ready(Ok(()));
        }
        match ready!(self.io_mut().poll_read(cx, buf)) {
            // Without TLS's own end: what is cut off is no whole message, and a lane that ends in any
            // way ends its exchanges.
            Err(error) if error.kind() == io::ErrorKind::UnexpectedEof => Poll::Ready(Ok(())),
            result => Poll::Ready(result),
        }
    }
}

impl AsyncWrite for Transport {
    fn poll_write(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        bytes: &[u8],
    ) -> Poll<io::Result<usize>> {
        self.io_mut().poll_write(cx, bytes)
    }

    fn poll_write_vectored(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        parts: &[IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        self.io_mut().poll_write_vectored(cx, parts)
    }

    fn is_write_vectored(&self) -> bool {
        true
    }

    fn poll_flush(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        self.io_mut().poll_flush(cx)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        self.io_mut().poll_shutdown(cx)
    }
}

#[cfg(test)]
mod tests;

//! The relay's half of a handshake, over a real transport.

use std::io;
use std::time::Duration;

use bytes::BytesMut;
use sidelane_tunnel::{Acceptor, First, HandshakeError, proto};
use thiserror::Error;
use tokio::io::{AsyncRead, AsyncReadExt as _, AsyncWrite, AsyncWriteExt as _};

/// Handshakes under way at once. Bounds what silent connections cost.
pub const HANDSHAKES_MAX: usize = 512;

/// Why no hello came.
#[derive(Debug, Error)]
pub enum HelloError {
    /// The connection closed first.
    #[error("the connection closed before a whole hello came")]
    Closed,
    /// It took longer than [`Bounds::timeout`](super::gate::Bounds::timeout).
    #[error("no whole hello within {0:?}")]
    Timeout(Duration),
    /// The transport failed.
    #[error("the connection failed")]
    Io(#[source] io::Error),
    /// What came is not a hello.
    #[error("not a hello")]
    Malformed(#[source] HandshakeError),
}

/// Reads what a dialler says first. Bytes after it stay in `input`.
///
/// # Errors
/// As [`HelloError`] says; the time is the caller's to bound.
pub async fn read_first<S: AsyncRead + Unpin>(
    stream: &mut S,
    input: &mut BytesMut,
) -> Result<First, HelloError> {
    let mut acceptor = Acceptor::new();
    loop {
        if let Some(first) = acceptor.handle_input(input).map_err(HelloError::Malformed)? {
            return Ok(first);
        }
        if stream.read_buf(input).await.map_err(HelloError::Io)? == 0 {
            return Err(HelloError::Closed);
        }
    }
}

/// Writes the answer that lets the dialler in.
///
/// # Errors
/// The transport's.
pub async fn send_welcome<S: AsyncWrite + Unpin>(
    stream: &mut S,
    welcome: &proto::Welcome,
) -> io::Result<()> {
    let bytes = Acceptor::new().encode_welcome(welcome).map_err(io::Error::other)?;
    stream.write_all(&bytes).await?;
    stream.flush().await
}

/// Writes the answer by which a lane comes back.
///
/// # Errors
/// The transport's.
pub async fn send_resumed<S: AsyncWrite + Unpin>(
    stream: &mut S,
    resumed: &proto::Resumed,
) -> io::Result<()> {
    stream.write_all(&Acceptor::new().encode_resumed(resumed)).await?;
    stream.flush().await
}

/// Writes the answer that turns the dialler away, and closes.
///
/// # Errors
/// The transport's.
pub async fn send_refuse<S: AsyncWrite + Unpin>(
    stream: &mut S,
    refuse: &proto::Refuse,
) -> io::Result<()> {
    stream.write_all(&Acceptor::new().encode_refuse(refuse)).await?;
    stream.shutdown().await
}

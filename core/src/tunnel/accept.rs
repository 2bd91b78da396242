//! The relay's half of a handshake, over a real transport.

use std::collections::HashMap;
use std::io;
use std::net::IpAddr;
use std::sync::{Mutex, PoisonError};
use std::time::{Duration, Instant};

use bytes::BytesMut;
use sidelane_tunnel::{Acceptor, HandshakeError, proto};
use thiserror::Error;
use tokio::io::{AsyncRead, AsyncReadExt as _, AsyncWrite, AsyncWriteExt as _};

/// Handshakes under way at once. Bounds what silent connections cost.
pub const HANDSHAKES_MAX: usize = 512;

/// When a dialler that came too soon is asked to come back: the gate's count begins anew by then.
pub const RETRY_AFTER_RATE_MS: u32 = 1_000;

/// What handshakes are bounded by.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Bounds {
    /// From a dialler's connection to its whole hello, and for our answer to be taken.
    pub timeout: Duration,
    /// Handshakes begun in one second, over all addresses.
    pub per_second: u32,
    /// The same for one address.
    pub per_second_and_address: u32,
}

/// Why no hello came.
#[derive(Debug, Error)]
pub enum HelloError {
    /// The connection closed first.
    #[error("the connection closed before a whole hello came")]
    Closed,
    /// It took longer than [`Bounds::timeout`].
    #[error("no whole hello within {0:?}")]
    Timeout(Duration),
    /// The transport failed.
    #[error("the connection failed")]
    Io(#[source] io::Error),
    /// What came is not a hello.
    #[error("not a hello")]
    Malformed(#[source] HandshakeError),
}

/// Reads a hello. Bytes after it stay in `input`.
///
/// # Errors
/// As [`HelloError`] says; the time is the caller's to bound.
pub async fn read_hello<S: AsyncRead + Unpin>(
    stream: &mut S,
    input: &mut BytesMut,
) -> Result<proto::Hello, HelloError> {
    let mut acceptor = Acceptor::new();
    loop {
        if let Some(hello) = acceptor.handle_input(input).map_err(HelloError::Malformed)? {
            return Ok(hello);
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

/// Bounds handshakes per second, over all and per address.
#[derive(Default)]
pub struct Gate {
    window: Mutex<Window>,
}

#[derive(Default)]
struct Window {
    began: Option<Instant>,
    total: u32,
    /// Invariant: as many entries as handshakes in this second at most, emptied each second.
    by_address: HashMap<IpAddr, u32>,
}

impl Gate {
    /// Returns whether one more may begin.
    pub fn enter(&self, bounds: &Bounds, address: IpAddr, now: Instant) -> bool {
        let mut window = self.window.lock().unwrap_or_else(PoisonError::into_inner);
        let is_over = window.began.is_none_or(|began| now - began >= Duration::from_secs(1));
        if is_over {
            *window = Window { began: Some(now), ..Window::default() };
        }
        if window.total >= bounds.per_second {
            return false;
        }
        let of_address = window.by_address.entry(address.to_canonical()).or_default();
        if *of_address >= bounds.per_second_and_address {
            return false;
        }
        *of_address += 1;
        window.total += 1;
        true
    }
}

#[cfg(test)]
mod tests {
    use std::net::Ipv4Addr;

    use super::*;

    const BOUNDS: Bounds =
        Bounds { timeout: Duration::ZERO, per_second: 7, per_second_and_address: 3 };

    fn address(last: u8) -> IpAddr {
        Ipv4Addr::new(192, 0, 2, last).into()
    }

    #[test]
    fn one_address_cannot_take_all_handshakes() {
        let gate = Gate::default();
        let now = Instant::now();
        let entered = (0..100).filter(|_| gate.enter(&BOUNDS, address(1), now)).count();
        assert_eq!(entered, 3);
        assert!(gate.enter(&BOUNDS, address(2), now));
    }

    #[test]
    fn the_total_is_bounded_and_comes_back_after_a_second() {
        let gate = Gate::default();
        let now = Instant::now();
        let entered =
            (0..=255).cycle().take(2000).filter(|n| gate.enter(&BOUNDS, address(*n), now)).count();
        assert_eq!(entered, 7);
        assert!(gate.enter(&BOUNDS, address(1), now + Duration::from_secs(1)));
    }
}

//! The sidecar's half of a handshake, over a real transport.

use std::io;
use std::time::Duration;

use bytes::BytesMut;
use sidelane_tunnel::{Dialler, HandshakeError, Reply, proto};
use thiserror::Error;
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::net::TcpStream;
use tokio::time::timeout;

/// How long a relay may take.
#[derive(Clone, Copy, Debug)]
pub struct Timeouts {
    /// For the connection to come up.
    pub connect: Duration,
    /// For the answer to a hello.
    pub answer: Duration,
}

/// Bytes the kernel keeps unsent before it says the socket is full. Low, so that what is written
/// next is chosen late and a small message overtakes bulk.
pub const NOTSENT_LOWAT_BYTES: u32 = 256 * 1024;

/// Why a lane did not come up.
#[derive(Debug, Error)]
pub enum DialError {
    /// The relay cannot be reached.
    #[error("cannot connect to relay {relay}")]
    Connect {
        /// Its address as configured.
        relay: String,
        /// Why.
        #[source]
        source: io::Error,
    },
    /// No answer in time.
    #[error("relay {relay} did not answer within {after:?}")]
    Timeout {
        /// Its address as configured.
        relay: String,
        /// How long it had.
        after: Duration,
    },
    /// The connection failed during the handshake.
    #[error("the handshake with relay {relay} failed")]
    Io {
        /// Its address as configured.
        relay: String,
        /// Why.
        #[source]
        source: io::Error,
    },
    /// What answers does not speak this protocol.
    #[error("{relay} does not answer as a relay does")]
    Malformed {
        /// Its address as configured.
        relay: String,
        /// Why.
        #[source]
        source: HandshakeError,
    },
    /// Without a token both ends must be on loopback.
    #[error(
        "relay {relay} is at {address}, not on loopback, and no token is set; set sidecar.token"
    )]
    NoToken {
        /// Its address as configured.
        relay: String,
        /// Where it is.
        address: std::net::IpAddr,
    },
    /// The relay refused.
    #[error("relay {relay} refused: {}", .refuse.detail)]
    Refused {
        /// Its address as configured.
        relay: String,
        /// What it said.
        refuse: proto::Refuse,
    },
}

impl DialError {
    /// How long the relay asks to stay away.
    #[must_use]
    pub fn retry_after(&self) -> Option<Duration> {
        match self {
            Self::Refused { refuse, .. } if refuse.retry_after_ms > 0 => {
                Some(Duration::from_millis(refuse.retry_after_ms.into()))
            }
            _ => None,
        }
    }

    /// Whether the relay has forgotten the session that a further lane was dialled for.
    #[must_use]
    pub fn is_unknown_session(&self) -> bool {
        matches!(self, Self::Refused { refuse, .. }
            if refuse.reason() == proto::RefuseReason::UnknownSession)
    }
}

/// Dials `relay` and sends `hello`. Returns the connection, the answer, and the bytes that came
/// after it.
///
/// # Errors
/// As [`DialError`] says.
pub async fn dial(
    relay: &str,
    hello: &proto::Hello,
    timeouts: Timeouts,
) -> Result<(TcpStream, proto::Welcome, BytesMut), DialError> {
    let mut stream = connect(relay, timeouts.connect).await?;
    if hello.credential.is_empty() {
        let peer = stream.peer_addr().map_err(|source| io_error(relay, source))?.ip();
        if !peer.to_canonical().is_loopback() {
            return Err(DialError::NoToken { relay: relay.to_owned(), address: peer });
        }
    }
    let mut input = BytesMut::with_capacity(4096);
    let answer =
        timeout(timeouts.answer, exchange_hello(relay, &mut stream, hello, &mut input)).await;
    let welcome = answer
        .map_err(|_| DialError::Timeout { relay: relay.to_owned(), after: timeouts.answer })??;
    Ok((stream, welcome, input))
}

async fn connect(relay: &str, limit: Duration) -> Result<TcpStream, DialError> {
    let failed = |source| DialError::Connect { relay: relay.to_owned(), source };
    let stream = timeout(limit, TcpStream::connect(relay))
        .await
        .map_err(|_| failed(io::ErrorKind::TimedOut.into()))?
        .map_err(failed)?;
    tune(&stream).map_err(failed)?;
    Ok(stream)
}

/// Unacknowledged bytes for so long end a lane's connection: somewhat above the lane's own deadline,
/// so that this counts only where that cannot, as while nothing is driven.
const USER_TIMEOUT: Duration = Duration::from_secs(15);

/// Sets what a lane's socket needs: no delay, a low mark of unsent bytes, an end to lost peers.
///
/// # Errors
/// The system's.
pub fn tune(stream: &TcpStream) -> io::Result<()> {
    stream.set_nodelay(true)?;
    let socket = socket2::SockRef::from(stream);
    socket.set_tcp_user_timeout(Some(USER_TIMEOUT))?;
    socket.set_tcp_notsent_lowat(NOTSENT_LOWAT_BYTES)
}

async fn exchange_hello(
    relay: &str,
    stream: &mut TcpStream,
    hello: &proto::Hello,
    input: &mut BytesMut,
) -> Result<proto::Welcome, DialError> {
    let malformed = |source| DialError::Malformed { relay: relay.to_owned(), source };
    let mut dialler = Dialler::new();
    let hello = dialler.hello(hello).map_err(malformed)?;
    stream.write_all(&hello).await.map_err(|source| io_error(relay, source))?;
    loop {
        let reply = dialler.handle_input(input).map_err(malformed)?;
        match reply {
            Some(Reply::Welcome(welcome)) => return Ok(welcome),
            Some(Reply::Refuse(refuse)) => {
                return Err(DialError::Refused { relay: relay.to_owned(), refuse });
            }
            None => {}
        }
        if stream.read_buf(input).await.map_err(|source| io_error(relay, source))? == 0 {
            return Err(io_error(relay, io::ErrorKind::UnexpectedEof.into()));
        }
    }
}

fn io_error(relay: &str, source: io::Error) -> DialError {
    DialError::Io { relay: relay.to_owned(), source }
}

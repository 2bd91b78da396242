//! The sidecar's half of a handshake, over a real transport.

use std::fmt;
use std::io;
use std::net::IpAddr;
use std::sync::Arc;
use std::time::Duration;

use bytes::BytesMut;
use rustls::ClientConfig;
use rustls::pki_types::ServerName;
use sidelane_tunnel::{Dialler, HandshakeError, Reply, proto};
use thiserror::Error;
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::net::TcpStream;
use tokio::time::timeout;
use tokio_rustls::TlsConnector;

use super::fault;
use super::transport::{Socket, Transport};

/// What a relay is dialled by.
pub enum Carrier {
    /// Without TLS: loopback only, unless `insecure`.
    Plain {
        /// Beyond loopback too.
        insecure: bool,
    },
    /// By TLS.
    Tls {
        /// Kept for as long as the settings stay: it remembers tickets for further lanes.
        config: Arc<ClientConfig>,
        /// Which the relay's certificate must be for.
        name: ServerName<'static>,
        /// A certificate is shown where it is asked for.
        has_certificate: bool,
    },
    /// By TLS, which cannot be had.
    Unusable(String),
}

impl fmt::Debug for Carrier {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Plain { insecure } => {
                f.debug_struct("Plain").field("insecure", insecure).finish()
            }
            Self::Tls { name, .. } => f.debug_tuple("Tls").field(name).finish(),
            Self::Unusable(why) => f.debug_tuple("Unusable").field(why).finish(),
        }
    }
}

impl Carrier {
    const fn has_certificate(&self) -> bool {
        matches!(self, Self::Tls { has_certificate: true, .. })
    }
}

/// How long a relay may take.
#[derive(Clone, Copy, Debug)]
pub struct Timeouts {
    /// For the connection to come up.
    pub connect: Duration,
    /// For TLS, and for the answer to a hello.
    pub answer: Duration,
}

/// Longest time that a relay can make this end stay away.
const RETRY_AFTER_MAX: Duration = Duration::from_secs(120);

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
        "relay {relay} is at {address}, not on loopback, and nothing is presented to it; set \
         sidecar.token, or the relay's tls.certificate"
    )]
    NoToken {
        /// Its address as configured.
        relay: String,
        /// Where it is.
        address: IpAddr,
    },
    /// Plain beyond loopback.
    #[error(
        "relay {relay} is at {address}, not on loopback, and is dialled without TLS; give it a tls \
         block, or insecure: true where nobody on the way can do harm"
    )]
    NoTls {
        /// Its address as configured.
        relay: String,
        /// Where it is.
        address: IpAddr,
    },
    /// TLS came to nothing.
    #[error("no TLS with relay {relay}: {reason}")]
    Tls {
        /// Its address as configured.
        relay: String,
        /// Why, and what to do.
        reason: String,
    },
    /// TLS without the tunnel's protocol.
    #[error(
        "relay {relay} speaks TLS and not sidelane/1 (ALPN): that is no tunnel's port, or something \
         on the way ends TLS"
    )]
    NoAlpn {
        /// Its address as configured.
        relay: String,
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
                Some(Duration::from_millis(refuse.retry_after_ms.into()).min(RETRY_AFTER_MAX))
            }
            _ => None,
        }
    }

    /// Whether the relay refuses who this sidecar says that it is.
    #[must_use]
    pub fn is_credential(&self) -> bool {
        matches!(self, Self::Refused { refuse, .. }
            if refuse.reason() == proto::RefuseReason::Credential)
    }

    /// Whether another relay was reached than the one that has the session.
    #[must_use]
    pub fn is_wrong_relay(&self) -> bool {
        self.refusal() == Some(proto::RefuseReason::WrongRelay)
    }

    /// Why the relay refuses; `None`: it was not reached, or did not answer.
    #[must_use]
    pub fn refusal(&self) -> Option<proto::RefuseReason> {
        match self {
            Self::Refused { refuse, .. } => Some(refuse.reason()),
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

/// Dials `target`, an address of `relay`, and sends `hello`. Returns the connection, the answer, and
/// the bytes that came after it.
///
/// # Errors
/// As [`DialError`] says.
pub async fn dial(
    relay: &str,
    target: &str,
    carrier: &Carrier,
    hello: &proto::Hello,
    timeouts: Timeouts,
) -> Result<(Transport, proto::Welcome, BytesMut), DialError> {
    let is_bare = hello.credential.is_empty();
    let mut transport = open(relay, target, carrier, is_bare, timeouts).await?;
    let mut dialler = Dialler::new();
    let malformed = |source| DialError::Malformed { relay: relay.to_owned(), source };
    let hello = dialler.hello(hello).map_err(malformed)?;
    let (reply, input) = ask(relay, &mut transport, &mut dialler, &hello, timeouts.answer).await?;
    match reply {
        Reply::Welcome(welcome) => Ok((transport, welcome, input)),
        Reply::Resumed(_) => {
            let expected = "33 (welcome) or 34 (refuse)";
            Err(malformed(HandshakeError::Unexpected { found: 36, expected }))
        }
        Reply::Refuse(refuse) => Err(DialError::Refused { relay: relay.to_owned(), refuse }),
    }
}

/// Asks a relay that was reached by [`open`] to go on with a lane. Returns the answer, and the bytes that
/// came after it.
///
/// # Errors
/// As [`DialError`] says.
pub async fn resume(
    relay: &str,
    transport: &mut Transport,
    resume: &proto::Resume,
    limit: Duration,
) -> Result<(proto::Resumed, BytesMut), DialError> {
    let mut dialler = Dialler::new();
    let malformed = |source| DialError::Malformed { relay: relay.to_owned(), source };
    let question = dialler.resume(resume).map_err(malformed)?;
    let (reply, input) = ask(relay, transport, &mut dialler, &question, limit).await?;
    match reply {
        Reply::Resumed(resumed) if resumed.attempt == resume.attempt => Ok((resumed, input)),
        Reply::Resumed(resumed) => Err(malformed(HandshakeError::Range {
            field: "resumed.attempt",
            found: resumed.attempt,
            accepted: "that of the resume",
        })),
        Reply::Welcome(_) => {
            let expected = "36 (resumed) or 34 (refuse)";
            Err(malformed(HandshakeError::Unexpected { found: 33, expected }))
        }
        Reply::Refuse(refuse) => Err(DialError::Refused { relay: relay.to_owned(), refuse }),
    }
}

/// Connects to `target`, an address of `relay`, as far as TLS where there is any. `is_bare`: nothing is
/// to be presented.
///
/// # Errors
/// As [`DialError`] says.
pub async fn open(
    relay: &str,
    target: &str,
    carrier: &Carrier,
    is_bare: bool,
    timeouts: Timeouts,
) -> Result<Transport, DialError> {
    if let Carrier::Unusable(reason) = carrier {
        return Err(DialError::Tls { relay: relay.to_owned(), reason: reason.clone() });
    }
    let stream = connect(relay, target, timeouts.connect).await?;
    let peer = stream.peer_addr().map_err(|source| io_error(relay, source))?.ip();
    check_place(relay, peer, carrier, is_bare)?;
    let secured = timeout(timeouts.answer, secure(relay, stream, carrier)).await;
    let mut transport = secured
        .map_err(|_| DialError::Timeout { relay: relay.to_owned(), after: timeouts.answer })??;
    transport.forget_peer_chain();
    Ok(transport)
}

/// Holds back from another machine what is for this one only.
fn check_place(
    relay: &str,
    address: IpAddr,
    carrier: &Carrier,
    is_bare: bool,
) -> Result<(), DialError> {
    if address.to_canonical().is_loopback() {
        return Ok(());
    }
    let relay = relay.to_owned();
    match carrier {
        Carrier::Plain { insecure: false } => Err(DialError::NoTls { relay, address }),
        carrier if is_bare && !carrier.has_certificate() => {
            Err(DialError::NoToken { relay, address })
        }
        _ => Ok(()),
    }
}

/// Does the TLS handshake, where there is TLS.
async fn secure(relay: &str, stream: TcpStream, carrier: &Carrier) -> Result<Transport, DialError> {
    let Carrier::Tls { config, name, .. } = carrier else {
        return Ok(Transport::plain(Socket::new(stream)));
    };
    let connector = TlsConnector::from(Arc::clone(config));
    let socket = Socket::new(stream).reading_ahead();
    let stream = connector
        .connect(name.clone(), socket)
        .await
        .map_err(|error| DialError::Tls { relay: relay.to_owned(), reason: fault::text(&error) })?;
    let transport = Transport::client(stream);
    if transport.speaks_tunnel() {
        Ok(transport)
    } else {
        Err(DialError::NoAlpn { relay: relay.to_owned() })
    }
}

async fn connect(relay: &str, target: &str, limit: Duration) -> Result<TcpStream, DialError> {
    let failed = |source| DialError::Connect { relay: relay.to_owned(), source };
    let stream = timeout(limit, TcpStream::connect(target))
        .await
        .map_err(|_| failed(io::ErrorKind::TimedOut.into()))?
        .map_err(failed)?;
    tune(&stream).map_err(failed)?;
    Ok(stream)
}

/// Unacknowledged bytes for so long end a lane's connection: somewhat above the lane's own deadline,
/// so that this counts only where that cannot, as while nothing is driven.
const USER_TIMEOUT: Duration = Duration::from_secs(15);

/// Sets how many bytes the kernel keeps unsent before it says that the socket is full: what is written
/// next is chosen late, and a small message overtakes bulk.
///
/// # Errors
/// The system's.
pub(super) fn limit_unsent(stream: &TcpStream, bytes: usize) -> io::Result<()> {
    let bytes = u32::try_from(bytes).unwrap_or(u32::MAX);
    socket2::SockRef::from(stream).set_tcp_notsent_lowat(bytes)
}

/// Sets what a lane's socket needs: no delay, few bytes that are unsent, an end to lost peers.
///
/// # Errors
/// The system's.
pub fn tune(stream: &TcpStream) -> io::Result<()> {
    stream.set_nodelay(true)?;
    socket2::SockRef::from(stream).set_tcp_user_timeout(Some(USER_TIMEOUT))?;
    limit_unsent(stream, super::pace::ROOM_FIRST)
}

/// Says `question`, and waits for the answer. What comes after it is returned too.
async fn ask(
    relay: &str,
    stream: &mut Transport,
    dialler: &mut Dialler,
    question: &[u8],
    limit: Duration,
) -> Result<(Reply, BytesMut), DialError> {
    let failed = |source| io_error(relay, source);
    let mut input = BytesMut::with_capacity(4096);
    let answer = timeout(limit, async {
        stream.write_all(question).await.map_err(failed)?;
        stream.flush().await.map_err(failed)?;
        loop {
            let reply = dialler.handle_input(&mut input);
            let reply =
                reply.map_err(|source| DialError::Malformed { relay: relay.to_owned(), source })?;
            if let Some(reply) = reply {
                return Ok(reply);
            }
            if stream.read_buf(&mut input).await.map_err(failed)? == 0 {
                return Err(failed(io::ErrorKind::UnexpectedEof.into()));
            }
        }
    });
    let reply = answer
        .await
        .map_err(|_| DialError::Timeout { relay: relay.to_owned(), after: limit })??;
    Ok((reply, input))
}

/// A relay may refuse a certificate after this end took the handshake for done (TLS 1.3).
fn io_error(relay: &str, source: io::Error) -> DialError {
    let relay = relay.to_owned();
    match fault::of(&source) {
        Some(_) => DialError::Tls { relay, reason: fault::text(&source) },
        None => DialError::Io { relay, source },
    }
}

#[cfg(test)]
mod tests;

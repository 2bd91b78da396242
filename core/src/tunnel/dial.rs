//! The sidecar's half of a handshake, over a real transport.

use std::fmt;
use std::io;
use std::net::IpAddr;
use std::sync::Arc;
use std::time::Duration;

use bytes::BytesMut;
use rustls::ClientConfig;
use rustls::pki_types::ServerName;
use sidelane_tunnel::dedicate::FEATURE_DEDICATED;
use sidelane_tunnel::{Dialler, HandshakeError, Reply, proto};
use thiserror::Error;
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::net::TcpStream;
use tokio::time::timeout;
use tokio_rustls::TlsConnector;

use super::carrier::CarrierError;
use super::carrier::grpc::GrpcStream;
use super::carrier::websocket::WebSocketStream;
use super::fault;
use super::proxy::{self, ProxyError};
use super::transport::{Agreed, Socket, Transport};
use crate::config::{HostPort, Over, Proxy};
use crate::error::chain;

/// What a relay is dialled by: one way, and others in turn where the one before fails. The first is tried
/// first again at each dial.
#[derive(Debug)]
pub struct Carrier {
    /// Never empty.
    pub ways: Vec<Way>,
}

/// One way to a relay.
#[derive(Debug)]
pub struct Way {
    /// What carries a lane's bytes.
    pub over: Over,
    /// Where it leads by the configuration; `None`: where the relay is.
    pub address: Option<HostPort>,
    /// TLS, or none.
    pub security: Security,
    /// The proxy on the way.
    pub proxy: Option<Arc<Proxy>>,
}

/// Whether a relay is dialled by TLS.
pub enum Security {
    /// Without: loopback only, unless `insecure`.
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

impl fmt::Debug for Security {
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

impl Security {
    const fn has_certificate(&self) -> bool {
        matches!(self, Self::Tls { has_certificate: true, .. })
    }
}

impl Carrier {
    /// Returns TCP, to wherever the relay is.
    #[must_use]
    pub fn tcp(security: Security) -> Self {
        Self { ways: vec![Way { over: Over::Tcp, address: None, security, proxy: None }] }
    }

    /// Whether the relay is dialled by TCP, as far as that works.
    #[must_use]
    pub fn begins_by_tcp(&self) -> bool {
        self.ways.first().is_some_and(|way| way.over == Over::Tcp)
    }

    /// Whether the relay's name is for a proxy to look up.
    #[must_use]
    pub fn is_by_proxy(&self) -> bool {
        self.ways.first().is_some_and(|way| way.proxy.is_some())
    }
}

impl Way {
    /// For people: `wss://relay.example.org:443/tunnel`.
    fn shown(&self, target: &str) -> String {
        let address = self.address.as_ref().map_or_else(|| target.to_owned(), ToString::to_string);
        let s = if matches!(self.security, Security::Plain { .. }) { "" } else { "s" };
        match &self.over {
            Over::Tcp => address,
            Over::WebSocket { path } => format!("ws{s}://{address}{path}"),
            Over::Grpc => format!("grpc{s}://{address}"),
        }
    }

    /// What HTTP calls the relay.
    fn authority(&self, target: &str) -> String {
        self.address.as_ref().map_or_else(|| target.to_owned(), ToString::to_string)
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
        address: String,
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
        address: String,
    },
    /// TLS came to nothing.
    #[error("no TLS with relay {relay}: {reason}")]
    Tls {
        /// Its address as configured.
        relay: String,
        /// Why, and what to do.
        reason: String,
    },
    /// What answers by HTTP is no tunnel.
    #[error("relay {relay} is not reached by {way}: {}", .source)]
    Carrier {
        /// Its address as configured.
        relay: String,
        /// By what it was dialled.
        way: String,
        /// What it answers.
        source: CarrierError,
    },
    /// The proxy lets nobody through.
    #[error("relay {relay} is not reached")]
    Proxy {
        /// Its address as configured.
        relay: String,
        /// What the proxy answers.
        #[source]
        source: ProxyError,
    },
    /// No way leads to the relay.
    #[error("relay {relay} is reached in no way: {}", .faults.join("; "))]
    Ways {
        /// Its address as configured.
        relay: String,
        /// What became of each.
        faults: Vec<String>,
        /// Longest time that one of them asks for.
        retry_after: Option<Duration>,
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
            Self::Carrier {
                source: CarrierError::Http { retry_after: Some(after), .. }, ..
            } => Some((*after).min(RETRY_AFTER_MAX)),
            Self::Ways { retry_after, .. } => *retry_after,
            _ => None,
        }
    }

    /// The instance that turned this sidecar away, where it said so; empty: it did not.
    #[must_use]
    pub fn refused_by(&self) -> &[u8] {
        match self {
            Self::Refused { refuse, .. } => &refuse.relay_instance,
            _ => &[],
        }
    }

    /// Whether a relay was reached with which there is a session already.
    #[must_use]
    pub fn is_held(&self) -> bool {
        self.refusal() == Some(proto::RefuseReason::Held)
    }

    /// Whether nobody listens where the relay is to be.
    #[must_use]
    pub fn is_connection_refused(&self) -> bool {
        matches!(self, Self::Connect { source, .. }
            if source.kind() == io::ErrorKind::ConnectionRefused)
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

/// Dials `target`, an address of `relay`, and sends `hello`; where the relay does not answer, by the
/// carrier's other ways in turn. Returns the connection, the answer, and the bytes that came after it.
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
    let mut failed = Failed::new(relay);
    for (index, way) in carrier.ways.iter().enumerate() {
        let target = way_target(way, index, target);
        // What carries messages cannot carry an exchange's bytes without adding some.
        if hello.dedicated && way.over != Over::Tcp {
            continue;
        }
        match Box::pin(dial_by(relay, &target, way, hello, timeouts)).await {
            // The next way may lead to the relay that is meant.
            Err(error) if error.refusal().is_none() || error.is_held() => {
                failed.note(way.shown(&target), error);
            }
            dialled => return dialled,
        }
    }
    Err(failed.into_error())
}

async fn dial_by(
    relay: &str,
    target: &str,
    way: &Way,
    hello: &proto::Hello,
    timeouts: Timeouts,
) -> Result<(Transport, proto::Welcome, BytesMut), DialError> {
    let is_bare = hello.credential.is_empty();
    let mut transport = open_by(relay, target, way, is_bare, timeouts).await?;
    let mut dialler = Dialler::new();
    let malformed = |source| DialError::Malformed { relay: relay.to_owned(), source };
    let mut hello = hello.clone();
    if way.over != Over::Tcp {
        hello.features &= !FEATURE_DEDICATED;
    }
    let hello = dialler.hello(&hello).map_err(malformed)?;
    let answer = ask(relay, &mut transport, &mut dialler, &hello, timeouts.answer).await;
    let (reply, input) = answer.map_err(|error| by(error, || way.shown(target)))?;
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

/// Connects to `target`, an address of `relay`, as far as a lane's bytes can be sent; where that fails, by
/// the carrier's other ways in turn. `is_bare`: nothing is to be presented.
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
    let mut failed = Failed::new(relay);
    for (index, way) in carrier.ways.iter().enumerate() {
        let target = way_target(way, index, target);
        match Box::pin(open_by(relay, &target, way, is_bare, timeouts)).await {
            Ok(transport) => return Ok(transport),
            Err(error) => failed.note(way.shown(&target), error),
        }
    }
    Err(failed.into_error())
}

/// Where a way leads: the first to where the relay was found, others to where they say.
fn way_target(way: &Way, index: usize, target: &str) -> String {
    match &way.address {
        Some(address) if index > 0 => address.to_string(),
        _ => target.to_owned(),
    }
}

/// Ways that led nowhere.
struct Failed {
    relay: String,
    errors: Vec<(String, DialError)>,
}

impl Failed {
    fn new(relay: &str) -> Self {
        Self { relay: relay.to_owned(), errors: Vec::new() }
    }

    fn note(&mut self, way: String, error: DialError) {
        tracing::debug!(relay = self.relay, way, error = chain(&error), "a way to the relay fails");
        self.errors.push((way, error));
    }

    fn into_error(mut self) -> DialError {
        if self.errors.len() == 1
            && let Some((_, error)) = self.errors.pop()
        {
            return error;
        }
        DialError::Ways {
            relay: self.relay,
            retry_after: self.errors.iter().filter_map(|(_, error)| error.retry_after()).max(),
            faults: self
                .errors
                .iter()
                .map(|(way, error)| format!("{way}: {}", chain(error)))
                .collect(),
        }
    }
}

async fn open_by(
    relay: &str,
    target: &str,
    way: &Way,
    is_bare: bool,
    timeouts: Timeouts,
) -> Result<Transport, DialError> {
    if let Security::Unusable(reason) = &way.security {
        return Err(DialError::Tls { relay: relay.to_owned(), reason: reason.clone() });
    }
    let socket = reach(relay, target, way, is_bare, timeouts).await?;
    let carried = timeout(timeouts.answer, async {
        let transport = secure(relay, socket, way).await?;
        let carried = carry(transport, &way.authority(target), way).await;
        carried.map_err(|source| by(io_error(relay, source), || way.shown(target)))
    });
    let mut transport = carried
        .await
        .map_err(|_| DialError::Timeout { relay: relay.to_owned(), after: timeouts.answer })??;
    transport.forget_peer_chain();
    Ok(transport)
}

/// Says by which way something answered that is no tunnel.
fn by(error: DialError, shown: impl FnOnce() -> String) -> DialError {
    match error {
        DialError::Carrier { relay, source, .. } => {
            DialError::Carrier { relay, way: shown(), source }
        }
        error => error,
    }
}

/// Connects to where the way leads, through the proxy where there is one.
async fn reach(
    relay: &str,
    target: &str,
    way: &Way,
    is_bare: bool,
    timeouts: Timeouts,
) -> Result<Socket, DialError> {
    let Some(proxy) = &way.proxy else {
        let stream = connect(relay, target, timeouts.connect).await?;
        let peer = stream.peer_addr().map_err(|source| io_error(relay, source))?.ip();
        check_place(relay, &Place::Address(peer), &way.security, is_bare)?;
        return Ok(Socket::new(stream));
    };
    check_place(relay, &Place::Named(target), &way.security, is_bare)?;
    let through = |source| DialError::Proxy { relay: relay.to_owned(), source };
    let unreachable =
        |source| through(ProxyError::Connect { proxy: proxy.to_string().into(), source });
    let stream =
        connect_tcp(&proxy.address.to_string(), timeouts.connect).await.map_err(unreachable)?;
    timeout(timeouts.connect, proxy::connect(stream, proxy, target))
        .await
        .map_err(|_| unreachable(io::ErrorKind::TimedOut.into()))?
        .map_err(through)
}

/// Where a relay is.
enum Place<'a> {
    Address(IpAddr),
    /// The proxy looks it up: `host:port`.
    Named(&'a str),
}

/// Holds back from another machine what is for this one only.
fn check_place(
    relay: &str,
    place: &Place<'_>,
    security: &Security,
    is_bare: bool,
) -> Result<(), DialError> {
    let address = match place {
        Place::Address(address) if address.to_canonical().is_loopback() => return Ok(()),
        Place::Address(address) => address.to_string(),
        // Whose loopback a proxy's is nobody knows.
        Place::Named(target) => (*target).to_owned(),
    };
    let relay = relay.to_owned();
    match security {
        Security::Plain { insecure: false } => Err(DialError::NoTls { relay, address }),
        security if is_bare && !security.has_certificate() => {
            Err(DialError::NoToken { relay, address })
        }
        _ => Ok(()),
    }
}

/// Does the TLS handshake, where there is TLS.
async fn secure(relay: &str, socket: Socket, way: &Way) -> Result<Transport, DialError> {
    let Security::Tls { config, name, .. } = &way.security else {
        return Ok(Transport::plain(socket));
    };
    let connector = TlsConnector::from(Arc::clone(config));
    let stream = connector
        .connect(name.clone(), socket.reading_ahead())
        .await
        .map_err(|error| DialError::Tls { relay: relay.to_owned(), reason: fault::text(&error) })?;
    let transport = Transport::client(stream);
    let is_agreed = match way.over {
        Over::Tcp => transport.speaks_tunnel(),
        // A server that knows of no other protocol may say nothing.
        Over::WebSocket { .. } => {
            matches!(transport.agreed(), Agreed::Http1 | Agreed::Nothing)
        }
        Over::Grpc => transport.agreed() == Agreed::Http2,
    };
    match way.over {
        _ if is_agreed => Ok(transport),
        Over::Tcp => Err(DialError::NoAlpn { relay: relay.to_owned() }),
        Over::WebSocket { .. } | Over::Grpc => Err(DialError::Tls {
            relay: relay.to_owned(),
            reason: format!("it does not speak {} there (ALPN)", protocol(&way.over)),
        }),
    }
}

/// What is asked for by ALPN, in words.
const fn protocol(over: &Over) -> &'static str {
    match over {
        Over::Tcp => "sidelane/1",
        Over::WebSocket { .. } => "http/1.1",
        Over::Grpc => "h2",
    }
}

/// Puts the carrier on the connection.
async fn carry(transport: Transport, authority: &str, way: &Way) -> io::Result<Transport> {
    match &way.over {
        Over::Tcp => Ok(transport),
        Over::WebSocket { path } => {
            let stream = WebSocketStream::dial(transport, authority, path).await?;
            Ok(Transport::websocket(stream))
        }
        Over::Grpc => {
            let is_tls = transport.is_tls();
            let mut stream = GrpcStream::dial(transport, authority, is_tls).await?;
            stream.answered().await?;
            Ok(Transport::grpc(stream, is_tls, Vec::new()))
        }
    }
}

async fn connect(relay: &str, target: &str, limit: Duration) -> Result<TcpStream, DialError> {
    let failed = |source| DialError::Connect { relay: relay.to_owned(), source };
    connect_tcp(target, limit).await.map_err(failed)
}

async fn connect_tcp(target: &str, limit: Duration) -> io::Result<TcpStream> {
    let stream = timeout(limit, TcpStream::connect(target))
        .await
        .map_err(|_| io::Error::from(io::ErrorKind::TimedOut))??;
    tune(&stream)?;
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
    if CarrierError::of(&source).is_some() {
        return match source.downcast::<CarrierError>() {
            Ok(source) => DialError::Carrier { relay, way: String::new(), source },
            Err(source) => DialError::Io { relay, source },
        };
    }
    match fault::of(&source) {
        Some(_) => DialError::Tls { relay, reason: fault::text(&source) },
        None => DialError::Io { relay, source },
    }
}

#[cfg(test)]
mod tests;

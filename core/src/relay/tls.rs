//! TLS at clients' listeners: what a listener shows and asks for, and the handshake with whoever
//! connects, who by its hello is a client, a sidecar, or an authority that proves a name.
//!
//! Knows no listeners and no bounds: whoever calls [`Acceptor::greet`] bounds the time of all.

use std::io;
use std::sync::Arc;
use std::time::{Duration, SystemTime};

use rustls::pki_types::CertificateDer;
use rustls::server::{ClientHello, ProducesTickets};
use rustls::{HandshakeKind, ServerConfig, ServerConnection};
use sidelane_abi::failure;
use thiserror::Error;
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::time::timeout;
use tokio_rustls::server::TlsStream;
use tokio_rustls::{LazyConfigAcceptor, StartHandshake};

use crate::config::Carries;
use crate::config::tls::{self as config, ClientCertificates, ServerTls};
use crate::front::{Hosts, TlsFacts};
use crate::tls::{
    ACME_ALPN, H2_ALPN, HTTP1_ALPN, Issued, Resolver, TUNNEL_ALPN, TlsError, server_config,
};
use crate::tunnel::transport::Socket;

mod bound;

pub(super) use bound::{Bounds, Handshakes, Over, Permit};

/// Bytes of one connection that wait, encrypted, for a slow client. As many as the front writes at once
/// (`FrontConfig::buffer_bytes_max`), so that a large write costs one system call.
const BUFFER_BYTES_MAX: usize = 128 * 1024;

/// What a connection with TLS begins with: a record of the handshake (RFC 8446 §5.1).
const HANDSHAKE_RECORD: u8 = 22;

/// What a tunnel's hello begins with, behind its length: the key of field 32, by which its kind is told.
const HELLO_KEY: [u8; 2] = [0x82, 0x02];

/// Longest length of a hello in bytes of a varint; it says two million, and a hello is shorter.
const HELLO_LENGTH_BYTES_MAX: usize = 3;

/// How long a client that spoke plain HTTP has to take the answer. Closing at once would make the
/// kernel reset the connection, and the client could lose it.
const LINGER: Duration = Duration::from_secs(2);

/// Most bytes thrown away meanwhile.
const LINGER_BYTES_MAX: usize = 1024 * 1024;

/// One listener's TLS. A reload that says the same of a listener keeps the object; one that says
/// something else makes another, with other keys for session tickets: what a client was let in by under
/// the rules before lets nobody in under those that follow. Connections keep what they began with.
pub(super) struct Acceptor {
    tls: ServerTls,
    sidecars: Option<SidecarTls>,
    resolver: Arc<Resolver>,
    http: Arc<ServerConfig>,
    /// As `http`, for protocols that have no name in TLS.
    bytes: Arc<ServerConfig>,
    challenge: Arc<ServerConfig>,
    sidecar: Option<Arc<ServerConfig>>,
}

impl std::fmt::Debug for Acceptor {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Acceptor").field("tls", &self.tls).finish_non_exhaustive()
    }
}

/// What is asked of sidecars that come in by a listener of clients.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct SidecarTls {
    /// Their certificates; `None`: none is asked for.
    pub(super) clients: Option<ClientCertificates>,
}

/// Gives out no tickets.
#[derive(Debug)]
struct NoTickets;

impl ProducesTickets for NoTickets {
    fn enabled(&self) -> bool {
        false
    }

    fn lifetime(&self) -> u32 {
        0
    }

    fn encrypt(&self, _plain: &[u8]) -> Option<Vec<u8>> {
        None
    }

    fn decrypt(&self, _cipher: &[u8]) -> Option<Vec<u8>> {
        None
    }
}

/// Who has connected.
pub(super) enum Accepted {
    /// A client.
    Client(Box<TlsStream<Socket>>, TlsFacts),
    /// A sidecar.
    Sidecar(Box<TlsStream<Socket>>),
    /// An authority that has seen what it came for.
    Authority,
}

/// Why a handshake failed.
#[derive(Debug, Error)]
pub(super) enum HandshakeError {
    /// The client went away.
    #[error("the client closed the connection")]
    Closed,
    /// It took too long.
    #[error("not done within timeouts.tls_handshake")]
    Timeout,
    /// Plain HTTP came, and was answered.
    #[error("plain HTTP came where TLS is spoken")]
    Http,
    /// A sidecar came without TLS, and was answered.
    #[error("a sidecar speaks no TLS where TLS is spoken")]
    PlainSidecar,
    /// Something else came.
    #[error("what came is not TLS")]
    NotTls,
    /// A sidecar at an address at which too many handshakes have failed.
    #[error("too many handshakes of sidecars at its address have failed")]
    TurnedAway,
    /// The transport failed.
    #[error("the connection failed")]
    Io(#[source] io::Error),
    /// TLS failed.
    #[error("TLS failed")]
    Tls(#[source] rustls::Error),
}

impl HandshakeError {
    /// What became of the handshake, as a metric's label.
    pub(super) fn label(&self) -> &'static str {
        use rustls::Error as E;
        match self {
            Self::Closed | Self::Io(_) => "closed",
            Self::Timeout => "timeout",
            Self::TurnedAway => "turned_away",
            Self::Http | Self::PlainSidecar | Self::NotTls => "not_tls",
            Self::Tls(E::NoCertificatesPresented | E::InvalidCertificate(_)) => "certificate",
            Self::Tls(E::PeerIncompatible(_) | E::NoApplicationProtocol) => "incompatible",
            Self::Tls(E::AlertReceived(_)) => "rejected",
            Self::Tls(_) => "failed",
        }
    }
}

impl From<io::Error> for HandshakeError {
    fn from(error: io::Error) -> Self {
        let kind = error.kind();
        match error.downcast::<rustls::Error>() {
            Ok(error) => Self::Tls(error),
            Err(_) if is_gone(kind) => Self::Closed,
            Err(error) => Self::Io(error),
        }
    }
}

fn is_gone(kind: io::ErrorKind) -> bool {
    matches!(
        kind,
        io::ErrorKind::UnexpectedEof
            | io::ErrorKind::BrokenPipe
            | io::ErrorKind::ConnectionReset
            | io::ErrorKind::ConnectionAborted
    )
}

/// Who a hello says that it comes from.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Kind {
    /// A client.
    Client,
    /// A sidecar.
    Sidecar,
    /// An authority that proves a name.
    Authority,
}

impl Acceptor {
    /// Returns the TLS of a listener; `sidecars` come in by it as well where that is given.
    ///
    /// # Errors
    /// Authorities that cannot be used, or a key that is another certificate's.
    pub(super) fn new(
        tls: &ServerTls,
        sidecars: Option<SidecarTls>,
        issued: &Arc<Issued>,
    ) -> io::Result<Self> {
        let failed = |error: TlsError| io::Error::other(crate::error::chain(&error));
        let resolver = Resolver::new(tls, Arc::clone(issued)).map_err(io::Error::other)?;
        let resolver = Arc::new(resolver);
        let config = |clients: Option<&ClientCertificates>, alpn: &[&[u8]]| {
            let tls = ServerTls { clients: clients.cloned(), ..tls.clone() };
            server_config(&tls, Arc::clone(&resolver) as _, alpn).map_err(failed)
        };
        let mut http = config(tls.clients.as_ref(), &[H2_ALPN, HTTP1_ALPN])?;
        if tls.clients.is_some() {
            // A resumed session is as good as its first certificate, at which nobody looks again: with a
            // new ticket at each connection a certificate would never end.
            http.ticketer = Arc::new(NoTickets);
            http.send_tls13_tickets = 0;
        }
        let mut bytes = http.clone();
        bytes.alpn_protocols = Vec::new();
        let challenge = config(None, &[ACME_ALPN])?;
        let sidecar = match &sidecars {
            None => None,
            Some(sidecars) => {
                // Asked for and never demanded: a token does as well, and which of the two a principal
                // has is the credentials' business.
                let clients = sidecars.clients.as_ref();
                let clients =
                    clients.map(|all| ClientCertificates { required: false, ..all.clone() });
                Some(Arc::new(config(clients.as_ref(), &[TUNNEL_ALPN])?))
            }
        };
        Ok(Self {
            tls: tls.clone(),
            sidecars,
            http: Arc::new(http),
            bytes: Arc::new(bytes),
            challenge: Arc::new(challenge),
            sidecar,
            resolver,
        })
    }

    /// Returns whether it is what these make.
    pub(super) fn is_of(&self, tls: &ServerTls, sidecars: Option<&SidecarTls>) -> bool {
        self.tls == *tls && self.sidecars.as_ref() == sidecars
    }

    /// The certificates of the file, each by its first name, and when they end.
    pub(super) fn certificates(&self) -> Vec<(Arc<str>, SystemTime)> {
        let named = |certificate: &Arc<config::Certificate>| {
            let name = certificate.names.first().unwrap_or(&certificate.place);
            (Arc::clone(name), certificate.not_after)
        };
        self.tls.certificates.iter().map(named).collect()
    }

    /// Returns whether a sidecar has come by here without TLS, where sidecars come in at all.
    ///
    /// # Errors
    /// The connection's.
    pub(super) async fn hears_plain_sidecar(&self, socket: &mut Socket) -> io::Result<bool> {
        if self.sidecar.is_none() {
            return Ok(false);
        }
        let mut count = 1;
        loop {
            let begin = socket.peek(count).await?;
            match is_plain_hello(begin) {
                Some(is_hello) => return Ok(is_hello),
                None if begin.len() < count => return Ok(false),
                None => count += 1,
            }
        }
    }

    /// Reads a client's hello, which says what the handshake is for. Plain HTTP, where the listener
    /// `carries` HTTP, is told so before it is an error.
    ///
    /// # Errors
    /// As [`HandshakeError`] says.
    pub(super) async fn greet(
        &self,
        mut socket: Socket,
        carries: &Carries,
    ) -> Result<Greeted<'_>, HandshakeError> {
        match socket.peek(1).await?.first() {
            None => return Err(HandshakeError::Closed),
            Some(&HANDSHAKE_RECORD) => {}
            // A method's name, or HTTP/2's preface.
            Some(first) if first.is_ascii_uppercase() && !matches!(carries, Carries::Type(_)) => {
                say_https(&mut socket).await;
                return Err(HandshakeError::Http);
            }
            _ => return Err(HandshakeError::NotTls),
        }
        let socket = socket.reading_ahead();
        let start = LazyConfigAcceptor::new(rustls::server::Acceptor::default(), socket).await?;
        let (kind, config) = self.choose(&start.client_hello(), carries);
        Ok(Greeted { acceptor: self, config: Arc::clone(config), kind, start })
    }

    fn choose(&self, hello: &ClientHello<'_>, carries: &Carries) -> (Kind, &Arc<ServerConfig>) {
        let offers = |protocol: &[u8]| {
            hello.alpn().is_some_and(|mut offered| offered.any(|offered| offered == protocol))
        };
        if offers(ACME_ALPN) {
            return (Kind::Authority, &self.challenge);
        }
        if let Some(sidecar) = self.sidecar.as_ref().filter(|_| offers(TUNNEL_ALPN)) {
            return (Kind::Sidecar, sidecar);
        }
        let is_http = match carries {
            Carries::Http => true,
            Carries::Type(_) => false,
            // What is neither is a protocol that the plugins may know.
            Carries::Sniffed => hello.alpn().is_none() || offers(H2_ALPN) || offers(HTTP1_ALPN),
        };
        (Kind::Client, if is_http { &self.http } else { &self.bytes })
    }

    /// What is known of a client once the handshake is done.
    fn facts(&self, connection: &ServerConnection) -> TlsFacts {
        let sni = connection.server_name().map(Arc::from);
        let names = self.names_shown(sni.as_deref());
        let alpn = connection.alpn_protocol().map(String::from_utf8_lossy);
        let mut facts = TlsFacts {
            hosts: Hosts::new(sni.as_ref(), &names),
            sni: sni.unwrap_or_default(),
            alpn: alpn.unwrap_or_default().into(),
            forwards_client: self.tls.clients.as_ref().is_some_and(|clients| clients.forward),
            ..TlsFacts::default()
        };
        if let (Some(clients), Some(chain)) = (&self.tls.clients, connection.peer_certificates()) {
            facts.set_client(chain, clients.forward);
        }
        facts
    }

    /// Returns the names of the certificate that is shown to whoever asks for `sni`.
    fn names_shown(&self, sni: Option<&str>) -> Arc<[Arc<str>]> {
        let shown = self.resolver.find(sni);
        let Some(end) = shown.as_ref().and_then(|key| key.cert.first()) else {
            return Arc::from([]);
        };
        let is_shown = |certificate: &&Arc<config::Certificate>| {
            certificate.chain.first().map(CertificateDer::as_ref) == Some(end)
        };
        match self.tls.certificates.iter().find(is_shown) {
            Some(certificate) => Arc::clone(&certificate.names),
            // One that was obtained meanwhile.
            None => config::names(end),
        }
    }
}

/// A connection whose client has said what it wants.
pub(super) struct Greeted<'a> {
    acceptor: &'a Acceptor,
    pub(super) kind: Kind,
    config: Arc<ServerConfig>,
    start: StartHandshake<Socket>,
}

impl Greeted<'_> {
    /// Makes the rest of the handshake. Returns who it was made with, and what became of it as a
    /// metric's label.
    ///
    /// # Errors
    /// As [`HandshakeError`] says.
    pub(super) async fn shake_hands(self) -> Result<(Accepted, &'static str), HandshakeError> {
        let limit = |connection: &mut ServerConnection| {
            connection.set_buffer_limit(Some(BUFFER_BYTES_MAX));
        };
        let mut stream = self.start.into_stream_with(self.config, limit).await?;
        let result = match stream.get_ref().1.handshake_kind() {
            Some(HandshakeKind::Resumed) => "resumed",
            _ => "full",
        };
        let accepted = match self.kind {
            Kind::Client => {
                let facts = self.acceptor.facts(stream.get_ref().1);
                Accepted::Client(Box::new(stream), facts)
            }
            Kind::Sidecar => Accepted::Sidecar(Box::new(stream)),
            Kind::Authority => {
                // It has seen the certificate, which is all it wants.
                let _ = stream.shutdown().await;
                Accepted::Authority
            }
        };
        Ok((accepted, result))
    }
}

/// Returns whether a connection that begins so is a sidecar's without TLS; `None`: what follows says it.
fn is_plain_hello(begin: &[u8]) -> Option<bool> {
    if begin.first() == Some(&HANDSHAKE_RECORD) {
        // A hello is longer than that.
        return Some(false);
    }
    let Some(end) = begin.iter().position(|byte| *byte < 0x80) else {
        return (begin.len() >= HELLO_LENGTH_BYTES_MAX).then_some(false);
    };
    if end >= HELLO_LENGTH_BYTES_MAX {
        return Some(false);
    }
    let key = &begin[end + 1..];
    if !HELLO_KEY.starts_with(&key[..key.len().min(HELLO_KEY.len())]) {
        return Some(false);
    }
    (key.len() >= HELLO_KEY.len()).then_some(true)
}

/// Answers plain HTTP, and waits until the answer is taken.
async fn say_https(socket: &mut Socket) {
    let line = format!("{}: this port speaks https\n", failure::name(failure::BAD_REQUEST));
    let answer = format!(
        "HTTP/1.1 400 Bad Request\r\nconnection: close\r\ncontent-type: text/plain; charset=utf-8\r\n\
         x-sidelane-error: {}\r\ncontent-length: {}\r\n\r\n{line}",
        failure::name(failure::BAD_REQUEST),
        line.len(),
    );
    let told = async {
        socket.write_all(answer.as_bytes()).await?;
        socket.shutdown().await?;
        let mut space = [0; 1024];
        let mut thrown_away = 0;
        while thrown_away < LINGER_BYTES_MAX {
            match socket.read(&mut space).await? {
                0 => break,
                read => thrown_away += read,
            }
        }
        io::Result::Ok(())
    };
    // Whoever does not take it learns by the closed connection.
    let _ = timeout(LINGER, told).await;
}

#[cfg(test)]
mod tests;

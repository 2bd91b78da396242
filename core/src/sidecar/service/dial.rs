//! Connections to one tunnel's service: the socket, the PROXY header where the tunnel asks for one, and
//! TLS over both.
//!
//! Knows no limits of time but what it is dropped by.

use std::io;
use std::sync::Arc;

use tokio::io::AsyncWriteExt as _;
use tokio::net::{TcpStream, UnixStream};

use super::tls::{Refused, Tls};
use crate::config::{ServiceAddress, Tunnel};
use crate::plugin::lend::{Connected, Stream};
use crate::sidecar::proxy_header::{self, Origin};

/// Dials one tunnel's service; kept for as long as its settings stay, since TLS sessions are resumed.
pub(in crate::sidecar) struct Dialer {
    tunnel: Arc<Tunnel>,
    address: String,
    tls: Option<Result<Tls, String>>,
}

/// Why there is no connection.
#[derive(Debug)]
pub(in crate::sidecar) enum DialError {
    /// The system says so, or it took too long.
    Io(io::Error),
    /// There is a connection, and no TLS on it.
    Tls(Refused),
    /// TLS cannot be had with the tunnel's settings.
    Settings(String),
}

impl DialError {
    /// It took longer than it may.
    pub(in crate::sidecar) fn late() -> Self {
        Self::Io(io::ErrorKind::TimedOut.into())
    }

    /// Whether it took longer than it may.
    pub(in crate::sidecar) fn is_late(&self) -> bool {
        matches!(self, Self::Io(error) if error.kind() == io::ErrorKind::TimedOut
            && error.raw_os_error().is_none())
    }

    /// What is wrong, and where there is something to be done about it, what.
    pub(in crate::sidecar) fn reason(&self) -> String {
        match self {
            Self::Io(error) => error.to_string(),
            Self::Tls(refused) => refused.reason.clone(),
            Self::Settings(reason) => reason.clone(),
        }
    }
}

impl From<DialError> for io::Error {
    fn from(error: DialError) -> Self {
        match error {
            DialError::Io(error) => error,
            DialError::Tls(refused) => refused.error,
            DialError::Settings(reason) => Self::new(io::ErrorKind::InvalidInput, reason),
        }
    }
}

impl Dialer {
    /// A dialler by a tunnel's settings. Where TLS cannot be had with them, each dial says why.
    pub(in crate::sidecar) fn new(tunnel: &Arc<Tunnel>) -> Self {
        let tls = tunnel.tls.as_ref().map(|tls| Tls::new(tls, tunnel));
        Self { tunnel: Arc::clone(tunnel), address: tunnel.service.to_string(), tls }
    }

    /// Dials, and where the service is spoken to by TLS, offers these application protocols.
    ///
    /// # Errors
    /// As [`DialError`] says.
    pub(in crate::sidecar) async fn dial(
        &self,
        origin: Origin,
        offered: Vec<Vec<u8>>,
    ) -> Result<Connected, DialError> {
        let tls = match &self.tls {
            None => None,
            Some(Ok(tls)) => Some(tls),
            Some(Err(reason)) => return Err(DialError::Settings(reason.clone())),
        };
        match &self.tunnel.service {
            ServiceAddress::Tcp(_) => over(self.tcp(origin).await?, tls, offered).await,
            ServiceAddress::Unix(path) => over(self.unix(path, origin).await?, tls, offered).await,
        }
    }

    /// Returns whether the service accepts connections: TCP's, without TLS.
    pub(in crate::sidecar) async fn accepts(&self) -> bool {
        match &self.tunnel.service {
            ServiceAddress::Tcp(_) => self.tcp(Origin::Own).await.is_ok(),
            ServiceAddress::Unix(path) => self.unix(path, Origin::Own).await.is_ok(),
        }
    }

    async fn tcp(&self, origin: Origin) -> Result<TcpStream, DialError> {
        let dial = async {
            let mut stream = TcpStream::connect(&self.address).await?;
            stream.set_nodelay(true)?;
            if let Some(version) = self.tunnel.proxy_protocol {
                let service = stream.peer_addr().ok();
                stream.write_all(&proxy_header::encode(version, origin, service)).await?;
            }
            Ok(stream)
        };
        dial.await.map_err(DialError::Io)
    }

    async fn unix(&self, path: &std::path::Path, origin: Origin) -> Result<UnixStream, DialError> {
        let dial = async {
            let mut stream = UnixStream::connect(path).await?;
            if let Some(version) = self.tunnel.proxy_protocol {
                stream.write_all(&proxy_header::encode(version, origin, None)).await?;
            }
            Ok(stream)
        };
        dial.await.map_err(DialError::Io)
    }
}

async fn over(
    stream: impl Stream,
    tls: Option<&Tls>,
    offered: Vec<Vec<u8>>,
) -> Result<Connected, DialError> {
    match tls {
        None => Ok(Connected { stream: Box::new(stream), protocol: None }),
        Some(tls) => tls.connect(stream, offered).await.map_err(DialError::Tls),
    }
}

//! TLS to a service: the handshake, and in words what it failed for and which setting mends it.

use std::io::{self, IoSlice};
use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll};

use rustls::pki_types::ServerName;
use rustls::{AlertDescription, CertificateError, Error};
use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};
use tokio_rustls::TlsConnector;
use tokio_rustls::client::TlsStream;

use crate::config::tls::{ClientTls, Trust};
use crate::config::{ServiceAddress, Tunnel};
use crate::error::chain;
use crate::plugin::lend::{Connected, Stream};
use crate::tls::client_config;

/// Most of a certificate's names that are told where none of them fits.
const NAMES_TOLD: usize = 8;

/// TLS to one tunnel's service.
pub(super) struct Tls {
    connector: TlsConnector,
    name: ServerName<'static>,
    facts: Arc<Facts>,
}

/// What words about a failure need.
struct Facts {
    tunnel: Arc<str>,
    service: String,
    /// The name that the certificate must be for.
    name: String,
    /// Who is believed, for people.
    trusted: String,
    has_certificate: bool,
}

/// A handshake that failed.
#[derive(Debug)]
pub(in crate::sidecar) struct Refused {
    /// For people: what is wrong, and which setting mends it.
    pub(super) reason: String,
    /// As it came.
    pub(super) error: io::Error,
}

impl Tls {
    pub(super) fn new(tls: &ClientTls, tunnel: &Tunnel) -> Result<Self, String> {
        let config = client_config(tls, &[]).map_err(|error| chain(&error))?;
        let host = match &tunnel.service {
            ServiceAddress::Tcp(address) => &*address.host,
            ServiceAddress::Unix(_) => "localhost",
        };
        let name = tls.server_name.as_deref().unwrap_or(host);
        let server_name = ServerName::try_from(name.to_owned()).map_err(|_| {
            format!(
                "{name:?} is no name that a certificate can be for; say which by `tls.server_name`"
            )
        })?;
        let trusted = match &tls.trust {
            Trust::System => "the system's authorities".to_owned(),
            Trust::Authorities(authorities) => format!("the authorities in {}", authorities.place),
            Trust::Anybody => "anybody".to_owned(),
        };
        let facts = Facts {
            tunnel: Arc::clone(&tunnel.name),
            service: tunnel.service.to_string(),
            name: name.to_owned(),
            trusted,
            has_certificate: tls.certificate.is_some(),
        };
        let connector = TlsConnector::from(Arc::new(config));
        Ok(Self { connector, name: server_name, facts: Arc::new(facts) })
    }

    /// Shakes hands over `stream`, and offers these application protocols.
    pub(super) async fn connect(
        &self,
        stream: impl Stream,
        offered: Vec<Vec<u8>>,
    ) -> Result<Connected, Refused> {
        let connector = self.connector.with_alpn(offered.clone());
        match connector.connect(self.name.clone(), stream).await {
            Ok(stream) => {
                let agreed = stream.get_ref().1.alpn_protocol();
                let protocol = offered.iter().position(|offer| Some(&**offer) == agreed);
                let stream = Encrypted { stream, facts: Arc::clone(&self.facts) };
                Ok(Connected { stream: Box::new(stream), protocol })
            }
            Err(error) => Err(Refused { reason: self.facts.handshake(&error, &offered), error }),
        }
    }
}

fn rustls_error(error: &io::Error) -> Option<&Error> {
    error.get_ref()?.downcast_ref()
}

impl Facts {
    /// Why a handshake failed.
    fn handshake(&self, error: &io::Error, offered: &[Vec<u8>]) -> String {
        let Some(error) = rustls_error(error) else {
            let ended = matches!(
                error.kind(),
                io::ErrorKind::UnexpectedEof | io::ErrorKind::ConnectionReset
            );
            return if ended {
                "the service closed the connection during the TLS handshake (if it speaks no TLS: `service: \
                 http://…`)"
                    .to_owned()
            } else {
                format!("TLS handshake: {error}")
            };
        };
        match error {
            Error::InvalidCertificate(error) => self.certificate(error),
            Error::InvalidMessage(_) | Error::InappropriateMessage { .. } => format!(
                "the service answers, but not by TLS: {error} (if it speaks none: `service: http://…`)"
            ),
            Error::AlertReceived(AlertDescription::NoApplicationProtocol) => {
                let offered: Vec<_> = offered.iter().map(|o| String::from_utf8_lossy(o)).collect();
                format!(
                    "the service speaks none of {} (ALPN); `http_version` says what it is spoken to by",
                    offered.join(", ")
                )
            }
            Error::AlertReceived(alert) => self.alert(*alert),
            Error::PeerIncompatible(why) => {
                format!(
                    "the service and sidelane have no TLS in common: {why:?} (spoken: TLS 1.2 and 1.3)"
                )
            }
            error => format!("TLS handshake: {error}"),
        }
    }

    /// Why the service's certificate is not believed.
    fn certificate(&self, error: &CertificateError) -> String {
        match error {
            CertificateError::UnknownIssuer => format!(
                "the service's certificate is signed by none of {}; `tls.ca` names who signs it",
                self.trusted
            ),
            CertificateError::BadSignature => format!(
                "the service's certificate is signed by none of {}, though by one of the same name: one of \
                 them was made anew; `tls.ca` names who signs it",
                self.trusted
            ),
            CertificateError::NotValidForName => format!(
                "the service's certificate is not for {}; `tls.server_name` says which name it is for",
                self.name
            ),
            CertificateError::NotValidForNameContext { presented, .. } => format!(
                "the service's certificate is for {} and not for {}; `tls.server_name` says which name it \
                 is for",
                names(presented),
                self.name
            ),
            CertificateError::Expired | CertificateError::ExpiredContext { .. } => {
                format!("the service's certificate has expired: {error}")
            }
            CertificateError::NotValidYet | CertificateError::NotValidYetContext { .. } => {
                format!("the service's certificate is not valid yet (is the clock right?): {error}")
            }
            CertificateError::Other(other) if format!("{other:?}").contains("CaUsedAsEndEntity") => {
                "the service's certificate is an authority's own (CA:TRUE), which is no server's; make \
                 one that it signs"
                    .to_owned()
            }
            error => format!("the service's certificate is not valid: {error}"),
        }
    }

    /// What an alert of the service's means: during the handshake, or with TLS 1.3 after it, where it looks
    /// at a client's certificate last.
    fn alert(&self, alert: AlertDescription) -> String {
        match alert {
            AlertDescription::CertificateRequired | AlertDescription::NoCertificate => {
                "the service wants a client certificate; `tls.certificate` names one".to_owned()
            }
            AlertDescription::HandshakeFailure if !self.has_certificate => {
                "the service refused the TLS handshake: it may want a client certificate \
                 (`tls.certificate`), or ciphers that are not safe"
                    .to_owned()
            }
            AlertDescription::BadCertificate
            | AlertDescription::UnsupportedCertificate
            | AlertDescription::CertificateRevoked
            | AlertDescription::CertificateExpired
            | AlertDescription::CertificateUnknown
            | AlertDescription::UnknownCA
            | AlertDescription::AccessDenied
            | AlertDescription::DecryptError => {
                let alert = format!("{alert:?}");
                if self.has_certificate {
                    format!(
                        "the service does not accept the client certificate (`tls.certificate`): {alert}"
                    )
                } else {
                    format!(
                        "the service wants a client certificate; `tls.certificate` names one ({alert})"
                    )
                }
            }
            AlertDescription::UnrecognisedName => format!(
                "the service does not know the name {}; `tls.server_name` says which it is asked for",
                self.name
            ),
            AlertDescription::ProtocolVersion => {
                "the service speaks neither TLS 1.2 nor 1.3".to_owned()
            }
            alert => format!("the service refused TLS: {alert:?}"),
        }
    }
}

/// The names of a certificate, as rustls tells them: `DnsName("a.example")`, `IpAddress(127.0.0.1)`.
fn names(presented: &[String]) -> String {
    let plain = |name: &String| {
        let inner = name.split_once('(').and_then(|(_, inner)| inner.strip_suffix(')'));
        inner.unwrap_or(name).trim_matches('"').to_owned()
    };
    let told: Vec<_> = presented.iter().take(NAMES_TOLD).map(plain).collect();
    match presented.len().saturating_sub(NAMES_TOLD) {
        _ if told.is_empty() => "no name".to_owned(),
        0 => told.join(", "),
        more => format!("{} and {more} more", told.join(", ")),
    }
}

/// A connection to a service. That it ends without its `close_notify` is an error of a read: what came
/// may have been cut off (RFC 8446 §6.1).
struct Encrypted<S> {
    stream: TlsStream<S>,
    facts: Arc<Facts>,
}

impl<S: Stream> Stream for Encrypted<S> {}

impl<S: Stream> AsyncRead for Encrypted<S> {
    fn poll_read(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buf: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        let read = Pin::new(&mut self.stream).poll_read(cx, buf);
        let Poll::Ready(Err(error)) = read else { return read };
        let (tunnel, service) = (&*self.facts.tunnel, &*self.facts.service);
        let reason = match rustls_error(&error) {
            Some(Error::AlertReceived(alert)) => self.facts.alert(*alert),
            Some(error) => error.to_string(),
            None => {
                tracing::debug!(tunnel, service, %error, "the service broke off a TLS connection");
                return Poll::Ready(Err(error));
            }
        };
        tracing::warn!(tunnel, service, error = reason, "the service broke off a TLS connection");
        Poll::Ready(Err(io::ErrorKind::ConnectionReset.into()))
    }
}

impl<S: Stream> AsyncWrite for Encrypted<S> {
    fn poll_write(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        bytes: &[u8],
    ) -> Poll<io::Result<usize>> {
        Pin::new(&mut self.stream).poll_write(cx, bytes)
    }

    fn poll_write_vectored(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        parts: &[IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        Pin::new(&mut self.stream).poll_write_vectored(cx, parts)
    }

    fn is_write_vectored(&self) -> bool {
        self.stream.is_write_vectored()
    }

    fn poll_flush(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_flush(cx)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_shutdown(cx)
    }
}

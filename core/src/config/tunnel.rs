//! What a tunnel says of its service: where it is, how it is spoken to, and how its health is found out.

use std::fmt;
use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use super::HostPort;
use super::tls::ClientTls;

/// A name for a service's end.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Tunnel {
    /// Unique.
    pub name: Arc<str>,
    /// Where the service is.
    pub service: ServiceAddress,
    /// Protocol types it carries; `None`: all that plugins serve.
    pub protocols: Option<Vec<Arc<str>>>,
    /// For a connection to the service.
    pub connect_timeout: Duration,
    /// TLS to the service; `None`: plain.
    pub tls: Option<Arc<ClientTls>>,
    /// What HTTP requests are sent by.
    pub http_version: HttpVersion,
    /// Connections to the service that plugins keep.
    pub pool: Pool,
    /// Each connection begins with a PROXY protocol header of this version; connections are not
    /// shared by clients then.
    pub proxy_protocol: Option<ProxyVersion>,
    /// How the service's health is found out; `None`: it is taken for healthy.
    pub health_check: Option<HealthCheck>,
    /// After a start nothing is sent to the service before it accepts a connection, or this has
    /// passed; zero: it is not waited for.
    pub wait: Duration,
    /// This sidecar's share of the tunnel beside others that serve it, 1 to 100.
    pub weight: u32,
}

/// Where a service is.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum ServiceAddress {
    /// `127.0.0.1:3000`.
    Tcp(HostPort),
    /// `unix:/run/app.sock`: an absolute path.
    Unix(Arc<Path>),
}

/// As in the file.
impl fmt::Display for ServiceAddress {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Tcp(address) => address.fmt(f),
            Self::Unix(path) => write!(f, "unix:{}", path.display()),
        }
    }
}

/// What HTTP requests are sent to a service by.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum HttpVersion {
    /// HTTP/1.1.
    #[default]
    Http1,
    /// HTTP/2; without TLS by prior knowledge (RFC 9113 §3.3).
    Http2,
    /// What the service chooses by ALPN, HTTP/2 before HTTP/1.1; with TLS only.
    Auto,
}

/// Connections to a service that plugins keep; `None`: as the plugin's own block says.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Pool {
    /// How long an unused one is kept.
    pub idle_timeout: Option<Duration>,
    /// Unused ones, per data-path thread.
    pub idle: Option<usize>,
    /// Used and unused ones, per data-path thread; beyond: 503.
    pub connections: Option<usize>,
}

/// Version of a PROXY protocol header.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ProxyVersion {
    /// Text.
    V1,
    /// Binary.
    V2,
}

/// How a service's health is found out.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct HealthCheck {
    /// What is asked.
    pub probe: Probe,
    /// From the end of one check to the next.
    pub interval: Duration,
    /// For one check, the connection included.
    pub timeout: Duration,
    /// Good checks in a row after which an unhealthy service is healthy.
    pub healthy_after: u32,
    /// Bad checks in a row after which a healthy service is unhealthy.
    pub unhealthy_after: u32,
}

/// What a health check asks.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Probe {
    /// Whether a connection is accepted.
    Tcp,
    /// A GET of this path; 200 to 399 is good.
    Http {
        /// Path and query.
        path: Arc<str>,
        /// `Host`; `None`: the service's address.
        host: Option<Arc<str>>,
    },
    /// `grpc.health.v1.Health/Check`; SERVING is good.
    Grpc {
        /// Name of the service asked about; empty: the server as a whole.
        service: Arc<str>,
    },
}

impl Tunnel {
    /// Returns the service as in the file: `127.0.0.1:3000`, `https://127.0.0.1:8443`.
    #[must_use]
    pub fn service_text(&self) -> String {
        let scheme = if self.tls.is_some() { "https://" } else { "" };
        format!("{scheme}{}", self.service)
    }

    /// Returns whether the tunnel carries exchanges of this type.
    #[must_use]
    pub fn carries(&self, protocol_type: &str) -> bool {
        self.protocols
            .as_ref()
            .is_none_or(|types| types.iter().any(|carried| **carried == *protocol_type))
    }
}

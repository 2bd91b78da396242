//! What carries a lane's bytes over a connection: TCP as it is, a WebSocket's binary messages, or the
//! messages of a gRPC stream. Each carries the same byte stream, length-delimited `TunnelMessage`s one
//! after the other; where a message of the carrier ends says nothing (ADR 0008). So one driver drives
//! them all, and a lane can come back on another one.
//!
//! Knows how bytes are wrapped; knows nothing of handshakes' meaning, lanes or sessions.

use std::error::Error;
use std::fmt;
use std::io;
use std::time::Duration;

use http::header::{HeaderMap, RETRY_AFTER};
use thiserror::Error;

use crate::error::bounded;

pub mod grpc;
pub mod websocket;

/// Path at which the relay takes a WebSocket.
pub const WEBSOCKET_PATH: &str = "/tunnel";

/// Path of the gRPC method (`proto/carrier.proto`).
pub const GRPC_PATH: &str = "/sidelane.tunnel.v1.Tunnel/Connect";

/// Who a request says that it comes from; for the logs of whoever is on the way.
const USER_AGENT: &str = concat!("sidelane/", env!("CARGO_PKG_VERSION"));

/// Most of an answer's body that is told: its first line says what went wrong, or nothing does.
const TOLD_BYTES_MAX: usize = 200;

/// Which carrier.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Kind {
    /// TCP, plain or by TLS, as it is.
    Tcp,
    /// The binary messages of a WebSocket.
    WebSocket,
    /// The messages of a gRPC stream.
    Grpc,
}

impl Kind {
    /// All of them.
    pub const ALL: [Self; 3] = [Self::Tcp, Self::WebSocket, Self::Grpc];

    /// As logs, metrics and pages have it.
    #[must_use]
    pub const fn label(self) -> &'static str {
        match self {
            Self::Tcp => "tcp",
            Self::WebSocket => "websocket",
            Self::Grpc => "grpc",
        }
    }
}

impl fmt::Display for Kind {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.label())
    }
}

/// What the other end of a carrier does that is no tunnel's; comes inside of an I/O error.
#[derive(Debug, Error)]
pub enum CarrierError {
    /// Something answers by HTTP that it will not.
    #[error("it answers HTTP {status}{}", .said.as_ref().map_or_else(String::new, |said| format!(": {said}")))]
    Http {
        /// HTTP's status.
        status: u16,
        /// The first line of the body.
        said: Option<String>,
        /// When to come back.
        retry_after: Option<Duration>,
    },
    /// The RPC has ended with a status.
    #[error("the gRPC stream ended with status {status}{}", .said.as_ref().map_or_else(String::new, |said| format!(": {said}")))]
    Grpc {
        /// `grpc-status`.
        status: u32,
        /// `grpc-message`.
        said: Option<String>,
    },
    /// A message or frame that is none of a tunnel's.
    #[error("{0}")]
    Malformed(&'static str),
}

impl CarrierError {
    /// Returns it as an I/O error.
    pub(crate) fn io(self) -> io::Error {
        io::Error::new(io::ErrorKind::InvalidData, self)
    }

    /// Returns what is inside of an I/O error, however deep.
    #[must_use]
    pub fn of(error: &io::Error) -> Option<&Self> {
        let mut cause: Option<&(dyn Error + 'static)> = error.get_ref().map(|error| error as _);
        while let Some(error) = cause {
            if let Some(found) = error.downcast_ref() {
                return Some(found);
            }
            cause = match error.downcast_ref::<io::Error>() {
                // Its source is that of what is inside.
                Some(error) => error.get_ref().map(|error| error as _),
                None => error.source(),
            };
        }
        None
    }

    /// An answer by HTTP that is no tunnel's.
    pub(crate) fn http(status: http::StatusCode, headers: &HeaderMap, body: &[u8]) -> Self {
        let seconds = headers.get(RETRY_AFTER).and_then(|value| value.to_str().ok());
        let seconds = seconds.and_then(|text| text.parse::<u32>().ok());
        Self::Http {
            status: status.as_u16(),
            said: first_line(body),
            retry_after: seconds.map(|seconds| Duration::from_secs(seconds.into())),
        }
    }
}

/// The first line of a text that says something to people; `None`: markup, or nothing.
fn first_line(body: &[u8]) -> Option<String> {
    let line = body.split(|byte| *byte == b'\n').next().unwrap_or_default().trim_ascii();
    if line.is_empty() || line.starts_with(b"<") {
        return None;
    }
    let text = String::from_utf8_lossy(&line[..line.len().min(TOLD_BYTES_MAX)]);
    Some(bounded(&text, TOLD_BYTES_MAX))
}

/// Copies what is to be written, at most `max` bytes, behind what `into` holds.
fn gather(parts: &[io::IoSlice<'_>], max: usize, into: &mut bytes::BytesMut) -> usize {
    let mut left = max;
    for part in parts {
        let length = part.len().min(left);
        into.extend_from_slice(&part[..length]);
        left -= length;
    }
    max - left
}

/// Bytes of all parts together.
fn total(parts: &[io::IoSlice<'_>]) -> usize {
    parts.iter().map(|part| part.len()).sum()
}

#[cfg(test)]
pub(super) mod tests;

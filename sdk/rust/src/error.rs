//! How things fail: towards the host (`Error`, `ConfigError`) and from it.

use std::borrow::Cow;
use std::io;

use crate::failure;

/// Why an exchange, a direction or a stream ended early.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("reset: {}", failure::name(*.code))]
pub struct Reset {
    /// One of [`failure`].
    pub code: u32,
    /// The protocol's own code where it has one (HTTP/2's error code), passed as sent.
    pub protocol_code: Option<u32>,
}

impl Reset {
    /// Returns a reset without a code of the protocol's own.
    #[must_use]
    pub const fn new(code: u32) -> Self {
        Self { code, protocol_code: None }
    }
}

/// The client is gone, or what was written to has ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("closed")]
pub struct Closed;

/// A failure with what a client may be told of it.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{}: {detail}", failure::name(*.code))]
pub struct Failure {
    /// One of [`failure`].
    pub code: u32,
    /// Seconds for `Retry-After`.
    pub retry_after_s: Option<u32>,
    /// One line for people.
    pub detail: String,
}

/// A service, or any address, that could not be reached.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{}: {}", failure::name(*.code), cause(*.errno))]
pub struct ServiceError {
    /// One of [`failure`].
    pub code: u32,
    /// The operating system's reason, where there is one.
    pub errno: Option<i32>,
}

fn cause(errno: Option<i32>) -> String {
    errno.map_or_else(
        || "no connection".to_owned(),
        |errno| io::Error::from_raw_os_error(errno).to_string(),
    )
}

/// A configuration block, or a route's options, that the plugin refuses.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{message}")]
pub struct ConfigError {
    /// One line: what is wrong, the value, what is accepted. The host adds file, line and column.
    pub message: String,
    /// Dotted path within the block (`pool.idle_timeout`); `None`: the block as a whole.
    pub path: Option<String>,
}

impl ConfigError {
    /// Returns an error about the block as a whole.
    pub fn new(message: impl Into<String>) -> Self {
        Self { message: message.into(), path: None }
    }

    /// Returns an error about what stands at `path`.
    pub fn at(path: impl Into<String>, message: impl Into<String>) -> Self {
        Self { message: message.into(), path: Some(path.into()) }
    }
}

/// What a handler fails with. Its code is what the host counts and, where the handler dropped the
/// responder or the exchange unfinished, what the client or the peer is told.
#[derive(Debug, thiserror::Error)]
#[error("{message}")]
pub struct Error {
    /// `None`: a byte stream failed, whose code follows from the end it happened at.
    code: Option<u32>,
    protocol_code: Option<u32>,
    message: Cow<'static, str>,
}

impl Error {
    /// Returns an error with one of [`failure`] and a line for the log.
    pub fn new(code: u32, message: impl Into<Cow<'static, str>>) -> Self {
        Self { code: Some(code), protocol_code: None, message: message.into() }
    }

    /// The handler does not do this.
    #[must_use]
    pub fn unsupported() -> Self {
        Self::new(failure::UNSUPPORTED, "not supported by this plugin")
    }

    /// One of [`failure`]. A byte stream's error counts as `SERVICE_RESET` here; from a relay's
    /// handler the host is told `CLIENT_GONE` instead.
    #[must_use]
    pub fn code(&self) -> u32 {
        self.code.unwrap_or(failure::SERVICE_RESET)
    }

    /// The line for the log.
    #[must_use]
    pub fn message(&self) -> &str {
        &self.message
    }

    /// The reset that says it to a peer; `stream` is the code of a failed byte stream.
    pub(crate) fn reset(&self, stream: u32) -> Reset {
        Reset { code: self.code.unwrap_or(stream), protocol_code: self.protocol_code }
    }
}

impl From<Reset> for Error {
    fn from(reset: Reset) -> Self {
        Self {
            code: Some(reset.code),
            protocol_code: reset.protocol_code,
            message: Cow::Borrowed(failure::name(reset.code)),
        }
    }
}

impl From<Failure> for Error {
    fn from(failure: Failure) -> Self {
        Self::new(failure.code, failure.detail)
    }
}

impl From<Closed> for Error {
    fn from(_: Closed) -> Self {
        Self::new(failure::CANCELLED, "the other end is gone")
    }
}

impl From<ServiceError> for Error {
    fn from(error: ServiceError) -> Self {
        Self::new(error.code, error.to_string())
    }
}

impl From<io::Error> for Error {
    fn from(error: io::Error) -> Self {
        Self { code: None, protocol_code: None, message: Cow::Owned(error.to_string()) }
    }
}

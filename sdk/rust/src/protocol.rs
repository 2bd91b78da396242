//! The trait a plugin implements.

use std::future::Future;

use serde::de::DeserializeOwned;

use crate::{
    Buf, ByteStream, ConfigError, Error, Exchange, Failure, HeaderList, Host, Instant, Opener,
    Request, RequestHead, Responder, ResponseHead, Service, failure,
};

/// How exchanges of a protocol come into being at the relay.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Born {
    /// From requests of the HTTP front: [`Protocol::claims`], [`Protocol::accept_http`],
    /// [`Protocol::refuse_http`].
    Http,
    /// From bytes of a listener: [`Protocol::sniff`], [`Protocol::accept`], [`Protocol::refuse`].
    Bytes,
}

/// Whether a request is the protocol's. The highest claim wins.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Claim {
    /// Not mine.
    No,
    /// Mine if nobody else wants it.
    Fallback,
    /// Mine.
    Yes,
}

/// Whether a connection's first bytes are the protocol's.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Sniff<'a> {
    /// Not mine.
    No,
    /// Mine; `host` where the bytes name one. It must be a part of them.
    Yes {
        /// The host name that the bytes ask for.
        host: Option<&'a [u8]>,
    },
    /// Cannot say yet.
    NeedMore,
}

/// One or more protocol types, both ends.
///
/// One instance lives per loaded library and configuration. Its methods are called concurrently from
/// all the host's threads; none of them may block. A panic fails the exchange it happens in, no other.
///
/// A handler that returns an error with the responder or an exchange's halves still unfinished has
/// them aborted or reset with the error's code: `?` says the right thing to the client and the peer.
pub trait Protocol: Send + Sync + Sized + 'static {
    /// The plugin's block in the configuration: names and values. An absent block and an empty one are
    /// tried as `null`, then as `{}`, so that `()` and a struct of defaults both work.
    type Config: DeserializeOwned;

    /// The `protocol_type`s served, 1 to 8: upper-case letters, digits and `_`, at most 32 bytes.
    const TYPES: &'static [&'static str];

    /// How exchanges of these types are born.
    const BORN: Born = Born::Bytes;

    /// Makes an instance.
    ///
    /// # Errors
    /// The configuration is refused; the old generation goes on.
    fn new(config: Self::Config, host: &Host) -> Result<Self, ConfigError>;

    /// Checks a route's `options.<protocol_type>`. Called at both ends.
    ///
    /// # Errors
    /// The route is refused. By default anything but an empty block is.
    fn validate_route(&self, options: &serde_json::Value) -> Result<(), ConfigError> {
        match options {
            serde_json::Value::Null => Ok(()),
            serde_json::Value::Object(fields) => fields.keys().next().map_or(Ok(()), |name| {
                Err(ConfigError::at(
                    name,
                    format!("unknown option {name:?} (this protocol has none)"),
                ))
            }),
            other => Err(ConfigError::new(format!("{other} is not a block of options"))),
        }
    }

    /// Pure: whether a request is this protocol's.
    fn claims(&self, head: &RequestHead<'_>) -> Claim {
        let _ = head;
        Claim::No
    }

    /// Pure: whether a connection's first bytes are this protocol's.
    fn sniff<'a>(&self, bytes: &'a [u8]) -> Sniff<'a> {
        let _ = bytes;
        Sniff::No
    }

    /// Relay's end of an HTTP-born exchange.
    fn accept_http(
        &self,
        request: Request<'_>,
        responder: Responder,
        opener: Opener<'_>,
    ) -> impl Future<Output = Result<(), Error>> + Send {
        async move {
            drop((request, responder, opener));
            Err(Error::unsupported())
        }
    }

    /// Relay's end of a byte-born exchange.
    fn accept(
        &self,
        client: ByteStream,
        opener: Opener<'_>,
    ) -> impl Future<Output = Result<(), Error>> + Send {
        async move {
            drop((client, opener));
            Err(Error::unsupported())
        }
    }

    /// Sidecar's end.
    fn deliver(
        &self,
        exchange: Exchange<'_>,
        service: Service,
    ) -> impl Future<Output = Result<(), Error>> + Send;

    /// Says `failure` to an HTTP client in the protocol's words. By default the status that goes with
    /// it and one line of text.
    fn refuse_http(
        &self,
        head: &RequestHead<'_>,
        responder: Responder,
        failure: &Failure,
    ) -> impl Future<Output = Result<(), Error>> + Send {
        async move { refuse_plainly(head, responder, failure) }
    }

    /// Says `failure` on a byte stream in the protocol's words. By default the stream is closed.
    fn refuse(
        &self,
        client: ByteStream,
        failure: &Failure,
    ) -> impl Future<Output = Result<(), Error>> + Send {
        let _ = failure;
        async move {
            drop(client);
            Ok(())
        }
    }

    /// The end of this generation, or of the process, is near: end idle connections, finish what runs.
    /// What still runs at `deadline` is cut. Few new exchanges come, or none. Each running handler is
    /// polled once after this returns, so that it may take its leave in its protocol's words. May be
    /// called again; the earliest deadline counts.
    fn drain(&self, deadline: Instant) {
        let _ = deadline;
    }
}

/// Seconds of `Retry-After` where the failure passes by itself and the host names no time.
const RETRY_AFTER_S_DEFAULT: u32 = 1;

fn refuse_plainly(
    head: &RequestHead<'_>,
    mut responder: Responder,
    failure: &Failure,
) -> Result<(), Error> {
    let status = http_status(failure.code);
    let text = if failure.detail.is_empty() {
        format!("{}\n", failure::name(failure.code))
    } else {
        format!("{}: {}\n", failure::name(failure.code), failure.detail)
    };
    let retry_after = failure
        .retry_after_s
        .or_else(|| (status == 503).then_some(RETRY_AFTER_S_DEFAULT))
        .map(|seconds| seconds.to_string());
    let mut headers = HeaderList::new();
    headers.push(b"content-type", b"text/plain; charset=utf-8");
    headers.push(b"x-sidelane-error", failure::name(failure.code).as_bytes());
    if let Some(seconds) = &retry_after {
        headers.push(b"retry-after", seconds.as_bytes());
    }
    let body_length = Some(text.len() as u64);
    let first = (head.method() != "HEAD").then(|| Buf::from(text.into_bytes()));
    responder.head(ResponseHead { status, headers: &headers, body_length }, first, true)?;
    Ok(())
}

/// The HTTP status of a failure (the failure table of ARCHITECTURE.md).
fn http_status(code: u32) -> u16 {
    match code {
        failure::NO_ROUTE => 404,
        failure::NO_SIDECAR | failure::NO_PROTOCOL | failure::OVERLOADED | failure::DRAINING => 503,
        failure::SERVICE_TIMEOUT => 504,
        failure::RATE_LIMITED => 429,
        failure::TOO_LARGE => 413,
        failure::BAD_REQUEST => 400,
        failure::UNAUTHORIZED => 401,
        failure::MISDIRECTED => 421,
        failure::FORBIDDEN => 403,
        failure::CLIENT_TIMEOUT => 408,
        failure::INTERNAL => 500,
        failure::UNSUPPORTED => 501,
        _ => 502,
    }
}

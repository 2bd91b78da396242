//! The smallest Sidelane plugin: protocol type `LINE`, born from a listener's bytes, carries them to the
//! service and back as they are, each direction closed on its own.
#![forbid(unsafe_code)]

use sidelane_plugin::{
    ByteStream, ConfigError, Error, Exchange, Host, Opener, Protocol, RouteKey, Service, Sniff,
};

struct Line;

/// What a connection begins with to be known on a listener of several protocols. A host follows, and
/// a line feed: `LINE lines.example.org`.
const GREETING: &[u8] = b"LINE ";

/// Longest host that is waited for (RFC 1035 §2.3.4).
const HOST_BYTES_MAX: usize = 253;

impl Protocol for Line {
    type Config = ();
    const TYPES: &'static [&'static str] = &["LINE"];

    fn new((): (), _: &Host) -> Result<Self, ConfigError> {
        Ok(Self)
    }

    fn sniff<'a>(&self, bytes: &'a [u8]) -> Sniff<'a> {
        let known = bytes.len().min(GREETING.len());
        if bytes[..known] != GREETING[..known] {
            return Sniff::No;
        }
        let Some(rest) = bytes.get(GREETING.len()..) else { return Sniff::NeedMore };
        match rest.iter().position(|byte| *byte == b'\n') {
            Some(end) => Sniff::Yes { host: Some(rest[..end].trim_ascii()) },
            None if rest.len() > HOST_BYTES_MAX => Sniff::No,
            None => Sniff::NeedMore,
        }
    }

    async fn accept(&self, client: ByteStream, mut opener: Opener<'_>) -> Result<(), Error> {
        let exchange = opener.open(RouteKey::Listener).await?;
        exchange.join(client).await
    }

    async fn deliver(&self, exchange: Exchange<'_>, service: Service) -> Result<(), Error> {
        let stream = service.connect().await?;
        exchange.join(stream).await
    }
}

sidelane_plugin::export!(Line);

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

    fn validate_route(&self, options: &serde_json::Value) -> Result<(), ConfigError> {
        let Some(options) = options.as_object() else {
            let is_absent = options.is_null();
            return is_absent
                .then_some(())
                .ok_or_else(|| ConfigError::new("not a block of options"));
        };
        for (name, value) in options {
            match (name.as_str(), value.as_str()) {
                ("mode", Some("framed" | "raw")) => {}
                ("mode", _) => return Err(ConfigError::at(name, "accepted: framed, raw")),
                _ => return Err(ConfigError::at(name, "unknown option (accepted: mode)")),
            }
        }
        Ok(())
    }

    async fn accept(&self, client: ByteStream, mut opener: Opener<'_>) -> Result<(), Error> {
        let exchange = opener.open(RouteKey::Listener).await?;
        carry(exchange, client).await
    }

    async fn deliver(&self, exchange: Exchange<'_>, service: Service) -> Result<(), Error> {
        let stream = service.connect().await?;
        carry(exchange, stream).await
    }
}

/// Both ends read the route's options, and so agree.
async fn carry(exchange: Exchange<'_>, stream: ByteStream) -> Result<(), Error> {
    if exchange.meta.options().contains("\"raw\"") {
        exchange.dedicate(stream).await
    } else {
        exchange.join(stream).await
    }
}

sidelane_plugin::export!(Line);

//! The smallest Sidelane plugin: protocol type `LINE`, born from a listener's bytes, carries them to the
//! service and back as they are, each direction closed on its own.
#![forbid(unsafe_code)]

use sidelane_plugin::{
    ByteStream, ConfigError, Error, Exchange, Host, Opener, Protocol, RouteKey, Service,
};

struct Line;

impl Protocol for Line {
    type Config = ();
    const TYPES: &'static [&'static str] = &["LINE"];

    fn new((): (), _: &Host) -> Result<Self, ConfigError> {
        Ok(Self)
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

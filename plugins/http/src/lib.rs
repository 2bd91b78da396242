//! The HTTP protocol plugin: requests at the relay become messages, messages at the sidecar become
//! requests to the service, and the answers go back the same way, streamed.
//!
//! Knows HTTP's semantics for intermediaries (RFC 9110 §7) and its own payloads. Does not know
//! routes, tunnels or sockets: the host lends them.
#![forbid(unsafe_code)]

mod accept;
mod config;
mod deliver;
mod payload;
mod pool;
mod upload;

use std::sync::Arc;

use sidelane_plugin::{
    Born, Claim, ConfigError, Error, Exchange, Failure, Host, Instant, Opener, Protocol, Request,
    RequestHead, Responder, Service,
};

pub use crate::config::Config;
use crate::pool::Pool;

/// The protocol type `HTTP`.
#[derive(Debug)]
pub struct Http {
    config: Arc<Config>,
    pool: Arc<Pool>,
}

impl Protocol for Http {
    type Config = Config;

    const TYPES: &'static [&'static str] = &["HTTP"];
    const BORN: Born = Born::Http;

    fn new(config: Config, host: &Host) -> Result<Self, ConfigError> {
        config.validate().map_err(|(path, message)| ConfigError::at(path, message))?;
        let config = Arc::new(config);
        let pool = Arc::new(Pool::new(Arc::clone(&config), host));
        Ok(Self { config, pool })
    }

    fn claims(&self, _head: &RequestHead<'_>) -> Claim {
        Claim::Fallback
    }

    async fn accept_http(
        &self,
        request: Request<'_>,
        responder: Responder,
        opener: Opener<'_>,
    ) -> Result<(), Error> {
        accept::accept(request, responder, opener).await
    }

    async fn deliver(&self, exchange: Exchange<'_>, service: Service) -> Result<(), Error> {
        deliver::deliver(&self.config, &self.pool, exchange, &service).await
    }

    async fn refuse_http(
        &self,
        head: &RequestHead<'_>,
        mut responder: Responder,
        failure: &Failure,
    ) -> Result<(), Error> {
        accept::refuse(head, &mut responder, failure)
    }

    fn drain(&self, _deadline: Instant) {
        self.pool.drain();
    }
}

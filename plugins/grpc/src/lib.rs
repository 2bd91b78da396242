//! The gRPC protocol plugin: an RPC at the relay becomes chunks, message by message, chunks at the
//! sidecar become an RPC to the service over HTTP/2, and the answer goes back the same way.
//!
//! Knows gRPC's mapping to HTTP/2 (PROTOCOL-HTTP2.md) and its own payloads. Does not know routes,
//! tunnels or sockets, which the host lends, nor what is in a message.
#![forbid(unsafe_code)]

mod accept;
mod config;
mod deliver;
mod head;
mod inflow;
mod limits;
mod metrics;
mod payload;
pub mod splitter;
mod status;

use std::sync::Arc;

use sidelane_http_born::h2_pool::Pool;
use sidelane_plugin::{
    Born, Claim, ConfigError, Error, Exchange, Failure, Host, Instant, Opener, Protocol, Request,
    RequestHead, Responder, Service,
};

pub use crate::config::Config;
use crate::config::{Options, OptionsCache};
use crate::limits::Drain;
use crate::metrics::Metrics;

/// What all RPCs of an instance share.
#[derive(Debug)]
struct Shared {
    drain: Drain,
    metrics: Metrics,
    options: OptionsCache,
    pool: Arc<Pool>,
}

/// The protocol type `GRPC`.
#[derive(Debug)]
pub struct Grpc {
    shared: Shared,
}

impl Protocol for Grpc {
    type Config = Config;

    const TYPES: &'static [&'static str] = &["GRPC"];
    const BORN: Born = Born::Http;

    fn new(config: Config, host: &Host) -> Result<Self, ConfigError> {
        config.validate().map_err(|(path, message)| ConfigError::at(path, message))?;
        let shared = Shared {
            drain: Drain::default(),
            metrics: Metrics::new(host, config.methods_max),
            options: OptionsCache::default(),
            pool: Arc::new(Pool::new(config.pool(), host, "grpc", "grpc_rpcs_retried_total")),
        };
        Ok(Self { shared })
    }

    fn validate_route(&self, options: &serde_json::Value) -> Result<(), ConfigError> {
        Options::parse(options).map(|_| ())
    }

    fn claims(&self, head: &RequestHead<'_>) -> Claim {
        match head.header(b"content-type") {
            Some(content_type) if head::is_grpc(content_type) => Claim::Yes,
            _ => Claim::No,
        }
    }

    async fn accept_http(
        &self,
        request: Request<'_>,
        responder: Responder,
        opener: Opener<'_>,
    ) -> Result<(), Error> {
        accept::accept(&self.shared, request, responder, opener).await
    }

    async fn deliver(&self, exchange: Exchange<'_>, service: Service) -> Result<(), Error> {
        deliver::deliver(&self.shared, exchange, &service).await
    }

    async fn refuse_http(
        &self,
        head: &RequestHead<'_>,
        mut responder: Responder,
        failure: &Failure,
    ) -> Result<(), Error> {
        accept::refuse(head, &mut responder, failure)
    }

    fn drain(&self, deadline: Instant) {
        self.shared.drain.begin(Host::current().now(), deadline);
        self.shared.pool.drain();
    }
}

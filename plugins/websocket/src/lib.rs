//! The WebSocket protocol plugin: an upgrade at the relay becomes a handshake with the service, and
//! then each frame a message, both ways, as it was sent.
//!
//! Knows RFC 6455's handshake and frame headers, and RFC 8441's way over HTTP/2. Never looks into a
//! payload, but for a close frame's code. Does not know routes, tunnels or sockets: the host lends
//! them.
#![forbid(unsafe_code)]

mod accept;
mod carry;
mod config;
mod connections;
mod deliver;
mod drain;
mod frame;
mod handshake;
mod metrics;
mod options;
mod payload;
mod raw;

use std::future::Future;

use sidelane_plugin::{
    Born, Claim, ConfigError, Error, Exchange, Failure, Host, Instant, Opener, Protocol, Request,
    RequestHead, Responder, Service,
};

pub use crate::config::Config;
use crate::connections::Connections;
use crate::drain::Drain;
use crate::metrics::Metrics;
use crate::options::Options;

/// The protocol type `WEBSOCKET`.
#[derive(Debug)]
pub struct WebSocket {
    config: Config,
    host: Host,
    metrics: Metrics,
    drain: Drain,
    connections: Connections,
    /// What our own pings say, so that their answers are known.
    cookie: [u8; 8],
}

impl Protocol for WebSocket {
    type Config = Config;

    const TYPES: &'static [&'static str] = &["WEBSOCKET"];
    const BORN: Born = Born::Http;

    fn new(config: Config, host: &Host) -> Result<Self, ConfigError> {
        config.validate().map_err(|(path, message)| ConfigError::at(path, message))?;
        let cookie = handshake::random().map_err(ConfigError::new)?;
        Ok(Self {
            metrics: Metrics::new(host),
            drain: Drain::default(),
            connections: Connections::new(host, config.connections_max),
            host: *host,
            config,
            cookie,
        })
    }

    fn validate_route(&self, options: &serde_json::Value) -> Result<(), ConfigError> {
        Options::parse(options).map(drop)
    }

    fn claims(&self, head: &RequestHead<'_>) -> Claim {
        if handshake::is_asked(head) { Claim::Yes } else { Claim::No }
    }

    fn accept_http(
        &self,
        request: Request<'_>,
        responder: Responder,
        opener: Opener<'_>,
    ) -> impl Future<Output = Result<(), Error>> + Send {
        // What the handshake needs goes with it: the connection lives on without.
        let handshake = Box::pin(accept::handshake(self, request, responder, opener));
        async move {
            let connection = handshake.await?;
            match connection {
                Some(connection) => connection.run().await,
                None => Ok(()),
            }
        }
    }

    fn deliver(
        &self,
        exchange: Exchange<'_>,
        service: Service,
    ) -> impl Future<Output = Result<(), Error>> + Send {
        let handshake = Box::pin(deliver::handshake(self, exchange, service));
        async move {
            let connection = handshake.await?;
            match connection {
                Some(connection) => connection.run().await,
                None => Ok(()),
            }
        }
    }

    async fn refuse_http(
        &self,
        head: &RequestHead<'_>,
        mut responder: Responder,
        failure: &Failure,
    ) -> Result<(), Error> {
        accept::refuse(self, head, &mut responder, "", failure)
    }

    fn drain(&self, deadline: Instant) {
        self.drain.begin(self.host.now(), deadline, self.config.close_timeout);
    }
}

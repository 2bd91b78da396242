//! TLS at the begin of a client's connection: how many handshakes may be made and how long they may
//! take, and what becomes of whoever came by it.

use std::io;
use std::net::{IpAddr, Ipv4Addr, SocketAddr};
use std::pin::{Pin, pin};
use std::sync::Arc;

use tokio::time::timeout_at;
use tokio_rustls::server::TlsStream;

use super::Client;
use crate::error::chain;
use crate::front::{TlsFacts, forwarded, or_shutdown};
use crate::relay::policy::now;
use crate::relay::stream::ClientStream;
use crate::relay::tls::{Accepted, Acceptor, Bounds, HandshakeError, Kind, Over};
use crate::relay::tunnels;
use crate::tunnel::transport::{Movable as _, Socket, Transport};

impl Client {
    /// Makes the handshake with `address`, as the connection goes by. `None`: it is closed, or has been
    /// handed to the tunnel.
    pub(super) async fn secure(
        &self,
        acceptor: &Acceptor,
        stream: ClientStream,
        address: SocketAddr,
        shutdown: Pin<&mut impl Future<Output = ()>>,
    ) -> Option<(ClientStream, TlsFacts)> {
        let bounds = Bounds {
            all_max: self.settings.tls_handshakes_max,
            per_address_max: self.settings.tls_handshakes_per_address_max,
        };
        // A proxy brings the connections of many.
        let is_proxy = forwarded::is_in(address.ip(), &self.settings.trusted_proxies);
        let address_counted = (!is_proxy).then_some(address.ip());
        let permit = match self.relay.tls_handshakes.try_enter(bounds, address_counted) {
            Ok(permit) => permit,
            Err(over) => {
                self.refuse_handshake(over, address);
                return None;
            }
        };
        let (socket, counted) = stream.into_socket()?;
        let shaken = {
            let shaken = self.shake_hands(acceptor, socket, address);
            let shaken = pin!(timeout_at(self.began + self.settings.tls_handshake, shaken));
            or_shutdown(shaken, shutdown).await?
        };
        drop(permit);
        let accepted = match shaken.unwrap_or(Err(HandshakeError::Timeout)) {
            Ok((accepted, result)) => {
                self.relay.metrics.tls.handshake(&self.config.name, result);
                accepted
            }
            Err(error) => {
                self.handshake_failed(&error, address);
                return None;
            }
        };
        match accepted {
            Accepted::Client(stream, facts) => {
                Some((ClientStream::secured(stream, counted), facts))
            }
            Accepted::Sidecar(stream) => {
                // It is no client.
                drop(counted);
                self.hand_to_tunnel(*stream, address).await;
                None
            }
            Accepted::Authority => {
                let listener = &*self.config.name;
                tracing::debug!(listener, client = %address, "a name was proved by TLS-ALPN-01");
                None
            }
        }
    }

    async fn shake_hands(
        &self,
        acceptor: &Acceptor,
        mut socket: Socket,
        address: SocketAddr,
    ) -> Result<(Accepted, &'static str), HandshakeError> {
        if acceptor.hears_plain_sidecar(&mut socket).await? {
            tunnels::refuse_plain(&self.relay, socket, address).await;
            return Err(HandshakeError::PlainSidecar);
        }
        let greeted = acceptor.greet(socket, &self.config.carries).await?;
        let is_sidecar = greeted.kind == Kind::Sidecar;
        if is_sidecar && tunnels::is_turned_away(&self.relay, address) {
            return Err(HandshakeError::TurnedAway);
        }
        let shaken = greeted.shake_hands().await;
        if let (true, Err(HandshakeError::Tls(error))) = (is_sidecar, &shaken) {
            tunnels::tls_failed(&self.relay, address, &io::Error::other(error.clone()));
        }
        shaken
    }

    /// Lets a sidecar in, with its handshake of the tunnel still to come.
    async fn hand_to_tunnel(&self, stream: TlsStream<Socket>, address: SocketAddr) {
        let transport = Transport::server(stream);
        let local = transport.tcp().and_then(|socket| socket.local_addr().ok());
        let local = local.map_or(IpAddr::V4(Ipv4Addr::UNSPECIFIED), |local| local.ip());
        tunnels::enter(Arc::clone(&self.relay), transport, address, local).await;
    }

    fn refuse_handshake(&self, over: Over, client: SocketAddr) {
        let listener = &self.config.name;
        self.relay.metrics.tls.refused(listener, over.label());
        let (listener, reason) = (&**listener, over.label());
        tracing::debug!(listener, %client, reason, "too many TLS handshakes; closed");
        if let Some(refused) = self.listener.refused_handshakes.note(now()) {
            tracing::warn!(
                listener, %client, reason, refused,
                "too many TLS handshakes are under way; connections closed"
            );
        }
    }

    fn handshake_failed(&self, error: &HandshakeError, client: SocketAddr) {
        let (listener, result) = (&self.config.name, error.label());
        self.relay.metrics.tls.handshake(listener, result);
        let (listener, reason) = (&**listener, chain(error));
        tracing::debug!(listener, %client, result, reason, "no TLS handshake; closed");
        // A balancer's health check looks so too, every few seconds.
        if !matches!(error, HandshakeError::Closed | HandshakeError::Io(_))
            && let Some(failed) = self.listener.failed_handshakes.note(now())
        {
            tracing::warn!(listener, %client, result, reason, failed, "TLS handshakes failed");
        }
    }
}

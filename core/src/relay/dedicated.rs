//! Lets connections in that wait to carry one exchange's bytes each.
//!
//! They are known by their session's secret and credential; how many wait is bounded per session and for all.

use std::net::SocketAddr;

use sidelane_tunnel::proto;

use super::Relay;
use super::door::Place;
use super::tunnels::{send_refuse, welcome};
use crate::credentials::Authenticated;
use crate::tunnel::carrier::Kind;
use crate::tunnel::dedicated::keep_alive;
use crate::tunnel::session::shown_name;
use crate::tunnel::transport::Transport;

/// Takes a connection whose hello says that it is dedicated, and holds it until it is an exchange's.
pub(super) async fn enter(
    relay: &Relay,
    mut transport: Transport,
    hello: &proto::Hello,
    authenticated: Result<Authenticated, proto::Refuse>,
    peer: SocketAddr,
    place: Place,
) {
    let limit = relay.door.bounds().timeout;
    let admitted = authenticated.and_then(|authenticated| {
        if transport.kind() == Kind::Tcp {
            return relay.sessions.admit_dedicated(hello, &authenticated);
        }
        let detail = "a dedicated connection carries bytes as they are: TCP or TLS is accepted";
        Err(proto::Refuse {
            reason: proto::RefuseReason::Malformed.into(),
            detail: detail.to_owned(),
            ..proto::Refuse::default()
        })
    });
    let (session, seat, answer) = match admitted {
        Ok(admitted) => admitted,
        Err(refuse) => {
            relay.metrics.handshake_refused(refuse.reason().as_str_name());
            if refuse.reason() == proto::RefuseReason::Credential {
                relay.door.failed(peer, Some(&hello.credential));
            }
            let name = &*shown_name(&hello.name);
            tracing::info!(%peer, name, reason = refuse.detail, "dedicated connection refused");
            return send_refuse(&mut transport, &refuse, limit).await;
        }
    };
    transport.forget_peer_chain();
    let prepared = match welcome(&mut transport, &answer, limit).await {
        Ok(()) => keep_alive(&transport),
        Err(error) => Err(error),
    };
    drop(place);
    match prepared {
        Ok(()) => {
            tracing::debug!(sidecar = &*session.name, %peer, "dedicated connection waits");
            drop(session);
            seat.hold(transport).await;
        }
        Err(error) => {
            tracing::debug!(%peer, %error, "a dedicated connection failed in the handshake");
        }
    }
}

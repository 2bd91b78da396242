//! The tunnel's public end: lets sidecars in, and hands their lanes over.

use std::error::Error;
use std::io;
use std::net::{IpAddr, Ipv4Addr, SocketAddr};
use std::sync::Arc;
use std::time::Duration;

use bytes::BytesMut;
use rustls::HandshakeKind;
use sidelane_tunnel::{First, HandshakeError, proto};
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::watch;
use tokio::time::{Instant, timeout, timeout_at};
use tokio_rustls::TlsAcceptor;

use super::Relay;
use super::dedicated;
use super::door::{self, Place, Told, Way};
use super::knock::{self, Knock, Speaks};
use super::lanes;
use super::tls::{Bounds, Over, Permit};
use crate::credentials::Presented;
use crate::error::chain;
use crate::tunnel::accept::{self, HelloError};
use crate::tunnel::gate::TurnedAway;
use crate::tunnel::session::{SessionId, shown_name};
use crate::tunnel::transport::{Agreed, Movable as _, Socket, Transport};
use crate::tunnel::{dial, fault};

/// Pause after the system refused a connection (out of descriptors, say): retrying at once would
/// spin.
const ACCEPT_PAUSE: Duration = Duration::from_millis(100);

/// How long one that was told to come back has to take it. Closing at once would make the kernel reset
/// the connection, and the dialler could lose the answer.
const TURNED_AWAY_TIME: Duration = Duration::from_millis(500);

/// Most bytes thrown away meanwhile: a hello is shorter.
const TURNED_AWAY_BYTES_MAX: usize = 64 * 1024;

/// First bytes of a TLS connection: a record of type handshake, version 3.x (RFC 8446 §5.1). A hello
/// begins with its length, and none is as short as that would say.
const TLS_BEGIN: [u8; 2] = [0x16, 0x03];

/// A fatal alert `access_denied` (RFC 8446 §6), which a dialler by TLS understands without a handshake.
const TLS_ACCESS_DENIED: [u8; 7] = [0x15, 0x03, 0x03, 0x00, 0x02, 0x02, 0x31];

/// What a plain dialler is told at a port with TLS.
const EXPECTS_TLS: &str = "this relay expects TLS here; give the sidecar's relay a tls block";

/// What a dialler by TLS finds in place of a handshake at a port without.
const EXPECTS_PLAIN: &str = "this relay's tunnel is plain here; set relay.tunnel.tls";

/// What a dialler is told that agreed on no protocol of ours.
const WANTS_ALPN: &str = "this port speaks sidelane/1, which the dialler did not offer by ALPN";

/// Lets sidecars in on `listener` until `closed` turns true.
pub(super) async fn accept(
    relay: Arc<Relay>,
    listener: TcpListener,
    mut closed: watch::Receiver<bool>,
) {
    loop {
        let accepted = tokio::select! {
            accepted = listener.accept() => accepted,
            _ = closed.wait_for(|closed| *closed) => return,
        };
        let (stream, peer) = match accepted {
            Ok(accepted) => accepted,
            Err(error) => {
                tracing::error!(%error, "cannot accept a sidecar's connection");
                tokio::time::sleep(ACCEPT_PAUSE).await;
                continue;
            }
        };
        match relay.door.enter(peer) {
            Ok(place) => {
                tokio::spawn(greet(Arc::clone(&relay), stream, peer, place));
            }
            Err(why) => {
                door::note(&relay.metrics, peer, why);
                if let Some(place) = relay.door.tell() {
                    let is_tls = !matches!(*relay.door.way(), Way::Plain);
                    let refuse = (!is_tls).then(|| refusal(&relay, why));
                    tokio::spawn(turn_away(stream, refuse, place));
                }
            }
        }
    }
}

/// Lets a sidecar in that came by TLS, its protocol agreed on, to a listener that is shared with
/// clients.
pub(super) async fn enter(
    relay: Arc<Relay>,
    mut transport: Transport,
    peer: SocketAddr,
    local: IpAddr,
) {
    let place = match relay.door.enter(peer) {
        Ok(place) => place,
        Err(why) => {
            door::note(&relay.metrics, peer, why);
            if let Some(_place) = relay.door.tell() {
                send_refuse(&mut transport, &refusal(&relay, why), TURNED_AWAY_TIME).await;
            }
            return;
        }
    };
    shake_hands(relay, transport, peer, local, place).await;
}

/// Whether a sidecar at `peer` is to be turned away before any work is done for it, as its failed
/// handshakes say; it is counted then. For listeners that are shared with clients.
pub(super) fn is_turned_away(relay: &Relay, peer: SocketAddr) -> bool {
    match relay.door.check_failures(peer) {
        Ok(()) => false,
        Err(why) => {
            door::note(&relay.metrics, peer, why);
            true
        }
    }
}

/// Answers a sidecar that speaks no TLS at a listener that is shared with clients. The caller bounds how
/// many are answered at once.
pub(super) async fn refuse_plain(relay: &Relay, socket: Socket, peer: SocketAddr) {
    let refuse = match relay.door.check_failures(peer) {
        Ok(()) => {
            failed(relay, peer, "tls", "the dialler speaks no TLS, and the listener expects it");
            malformed_refusal(EXPECTS_TLS)
        }
        Err(why) => {
            door::note(&relay.metrics, peer, why);
            refusal(relay, why)
        }
    };
    refuse_plainly(socket, &refuse).await;
}

/// Counts and tells of a sidecar's TLS that came to nothing.
pub(super) fn tls_failed(relay: &Relay, peer: SocketAddr, error: &io::Error) {
    match error.get_ref().and_then(|error| error.downcast_ref::<rustls::Error>()) {
        Some(fault) => failed(relay, peer, "tls", &tls_fault(fault)),
        None => broken_off(relay, peer, "tls", error),
    }
}

/// Counts a handshake in whose midst the connection was lost. That is no guess, but the road: an address
/// whose road is bad is not to be turned away for it when its lanes come back, nor to fill the log.
fn broken_off(relay: &Relay, peer: SocketAddr, label: &'static str, error: &dyn Error) {
    relay.metrics.handshake_refused(label);
    tracing::debug!(%peer, error = chain(error), "a connection to the tunnel's port broke off in the handshake");
}

pub(super) fn failed(relay: &Relay, peer: SocketAddr, label: &'static str, reason: &str) {
    relay.metrics.handshake_refused(label);
    relay.door.failed(peer, None);
    tracing::warn!(%peer, reason, "no handshake on the tunnel's port");
}

fn refusal(relay: &Relay, why: TurnedAway) -> proto::Refuse {
    let millis = why.retry_after().as_millis();
    proto::Refuse {
        reason: proto::RefuseReason::Overloaded.into(),
        detail: why.detail().to_owned(),
        retry_after_ms: u32::try_from(millis).unwrap_or(u32::MAX),
        // Lanes of another instance's sessions need not wait for their turn.
        relay_instance: relay.sessions.instance.to_vec().into(),
    }
}

fn malformed_refusal(detail: &str) -> proto::Refuse {
    proto::Refuse {
        reason: proto::RefuseReason::Malformed.into(),
        detail: detail.to_owned(),
        ..proto::Refuse::default()
    }
}

fn draining_refusal() -> proto::Refuse {
    proto::Refuse {
        reason: proto::RefuseReason::GoingAway.into(),
        detail: "this relay is shutting down; it takes back lanes that it has, and no others"
            .to_owned(),
        ..proto::Refuse::default()
    }
}

/// Tells a dialler that is not listened to when to come back; `None`: it speaks TLS.
async fn turn_away(mut stream: TcpStream, refuse: Option<proto::Refuse>, place: Told) {
    let told = async {
        if let Some(refuse) = &refuse {
            accept::send_refuse(&mut stream, refuse).await?;
        } else {
            stream.write_all(&TLS_ACCESS_DENIED).await?;
            stream.shutdown().await?;
        }
        throw_away(&mut stream).await
    };
    // Whoever does not take the answer learns of it by the closed connection.
    let _ = timeout(TURNED_AWAY_TIME, told).await;
    drop(place);
}

/// Reads what still comes, so that closing does not cost the other end our answer.
async fn throw_away(stream: &mut (impl tokio::io::AsyncRead + Unpin)) -> io::Result<()> {
    let mut space = [0; 1024];
    let mut thrown_away = 0;
    while thrown_away < TURNED_AWAY_BYTES_MAX {
        match stream.read(&mut space).await? {
            0 => break,
            read => thrown_away += read,
        }
    }
    Ok(())
}

/// Takes a connection to the tunnel's own address as far as its hello.
async fn greet(relay: Arc<Relay>, stream: TcpStream, peer: SocketAddr, place: Place) {
    let local =
        stream.local_addr().map_or(IpAddr::V4(Ipv4Addr::UNSPECIFIED), |address| address.ip());
    let way = relay.door.way();
    let limit = match *way {
        Way::Plain => relay.door.bounds().timeout,
        Way::Tls(_) | Way::Closed => relay.door.bounds().tls_timeout,
    };
    let deadline = Instant::now() + limit;
    let mut socket = Socket::new(stream);
    let first = timeout_at(deadline, socket.peek(TLS_BEGIN.len())).await;
    let begins_tls = match first {
        Ok(Ok(first)) if first.len() == TLS_BEGIN.len() => *first == TLS_BEGIN,
        Ok(Ok(_) | Err(_)) => {
            // A balancer's health check looks so too, every few seconds.
            relay.metrics.handshake_refused("hello");
            tracing::debug!(%peer, "a connection to the tunnel's port said nothing");
            return;
        }
        Err(_elapsed) => {
            return failed(&relay, peer, "hello", &HelloError::Timeout(limit).to_string());
        }
    };
    let mut transport = match (&*way, begins_tls) {
        (Way::Plain, false) => Transport::plain(socket),
        (Way::Plain, true) => {
            failed(&relay, peer, "tls", "the dialler speaks TLS, and relay.tunnel has none");
            return refuse_plainly(socket, &malformed_refusal(EXPECTS_PLAIN)).await;
        }
        (Way::Tls(_) | Way::Closed, false) => {
            failed(&relay, peer, "tls", "the dialler speaks no TLS, and relay.tunnel.tls is set");
            return refuse_plainly(socket, &malformed_refusal(EXPECTS_TLS)).await;
        }
        (Way::Tls(config), true) => {
            let Some(permit) = tls_permit(&relay, peer) else {
                door::note(&relay.metrics, peer, TurnedAway::BUSY);
                return;
            };
            let acceptor = TlsAcceptor::from(Arc::clone(config));
            let accepted = timeout_at(deadline, acceptor.accept(socket.reading_ahead())).await;
            drop(permit);
            match accepted {
                Ok(Ok(stream)) => {
                    let result = match stream.get_ref().1.handshake_kind() {
                        Some(HandshakeKind::Resumed) => "resumed",
                        _ => "full",
                    };
                    relay.metrics.tls.handshake(&relay.door.name, result);
                    Transport::server(stream)
                }
                Ok(Err(error)) => return tls_failed(&relay, peer, &error),
                Err(_elapsed) => {
                    let reason = format!("no TLS within {limit:?}");
                    return failed(&relay, peer, "tls", &reason);
                }
            }
        }
        (Way::Closed, true) => {
            relay.metrics.handshake_refused("tls");
            return;
        }
    };
    let speaks = match transport.agreed() {
        Agreed::Http1 => Speaks::Http1,
        Agreed::Http2 => Speaks::Http2,
        Agreed::Tunnel if transport.is_tls() => Speaks::Tunnel,
        // Plain, or a dialler that names no protocol, as HTTP's often do.
        Agreed::Tunnel | Agreed::Nothing => {
            match timeout(relay.door.bounds().timeout, first_words(&mut transport)).await {
                Ok(Ok(speaks)) => speaks,
                // Who says nothing is told so below.
                Ok(Err(_)) | Err(_) => Speaks::Tunnel,
            }
        }
    };
    let knock = Knock { relay, peer, local };
    match speaks {
        Speaks::Tunnel => shake_hands(knock.relay, transport, peer, local, place).await,
        Speaks::Http1 => knock.by_http1(transport, place).await,
        Speaks::Http2 => knock.by_http2(transport, place),
    }
}

/// What is spoken, by the first bytes; no more of them are waited for than tell.
async fn first_words(transport: &mut Transport) -> io::Result<Speaks> {
    let first = transport.peek(TLS_BEGIN.len()).await?;
    if !Speaks::may_be_http(first) {
        return Ok(Speaks::Tunnel);
    }
    Ok(Speaks::by(transport.peek(knock::BEGIN_BYTES).await?))
}

/// A place among the TLS handshakes of clients and sidecars; `None`: there are as many as may be.
fn tls_permit(relay: &Relay, peer: SocketAddr) -> Option<Permit> {
    let settings = relay.listeners.settings();
    let bounds = Bounds {
        all_max: settings.tls_handshakes_max,
        per_address_max: settings.tls_handshakes_per_address_max,
    };
    let refused = |over: Over| relay.metrics.tls.refused(&relay.door.name, over.label());
    relay.tls_handshakes.try_enter(bounds, relay.door.counted(peer)).map_err(refused).ok()
}

/// Turns a dialler away in the tunnel's own words, whatever it speaks.
async fn refuse_plainly(mut socket: Socket, refuse: &proto::Refuse) {
    let told = async {
        accept::send_refuse(&mut socket, refuse).await?;
        throw_away(&mut socket).await
    };
    // Whoever does not take the answer learns of it by the closed connection.
    let _ = timeout(TURNED_AWAY_TIME, told).await;
}

/// What became of TLS, in words that say what is missing.
fn tls_fault(fault: &rustls::Error) -> String {
    match fault {
        rustls::Error::NoApplicationProtocol => format!("{WANTS_ALPN} (it offered others)"),
        fault => fault::of_dialler(fault),
    }
}

/// What is wrong with a hello, without a word of it.
fn malformed(error: &HandshakeError) -> String {
    match error {
        HandshakeError::Protocols(_) => "its list of protocol types does not hold".to_owned(),
        other => other.to_string(),
    }
}

/// Takes a connection from its hello to its lane's thread.
pub(super) async fn shake_hands(
    relay: Arc<Relay>,
    mut transport: Transport,
    peer: SocketAddr,
    local: IpAddr,
    place: Place,
) {
    let limit = relay.door.bounds().timeout;
    if !transport.speaks_tunnel() {
        failed(&relay, peer, "tls", WANTS_ALPN);
        return send_refuse(&mut transport, &malformed_refusal(WANTS_ALPN), limit).await;
    }
    let mut input = BytesMut::with_capacity(4096);
    let first = timeout(limit, accept::read_first(&mut transport, &mut input)).await;
    let hello = match first.unwrap_or(Err(HelloError::Timeout(limit))) {
        Ok(First::Hello(hello)) => hello,
        Ok(First::Resume(resume)) => {
            let dialled = lanes::Dialled { transport, input, peer, place: Box::new(place) };
            return lanes::resume(&relay, dialled, &resume).await;
        }
        Err(HelloError::Malformed(cause)) => {
            let reason = format!("not a hello: {}", malformed(&cause));
            failed(&relay, peer, "hello", &reason);
            return send_refuse(&mut transport, &cause.refusal(), limit).await;
        }
        Err(error @ (HelloError::Closed | HelloError::Io(_))) => {
            return broken_off(&relay, peer, "hello", &error);
        }
        Err(error) => return failed(&relay, peer, "hello", &chain(&error)),
    };
    if relay.is_draining() {
        let refuse = draining_refusal();
        relay.metrics.handshake_refused(refuse.reason().as_str_name());
        tracing::debug!(%peer, "a sidecar is turned away: the relay is shutting down");
        return send_refuse(&mut transport, &refuse, limit).await;
    }
    let shards = relay.listeners.shards();
    // Where its connection is driven a lane is, too.
    let home = transport.home();
    let shard_of = |id: &SessionId, lane: u32| {
        home.unwrap_or_else(|| (usize::from(id[0]) + lane as usize) % shards.len())
    };
    let presented = Presented {
        credential: &hello.credential,
        chain: transport.peer_chain(),
        peer: peer.ip(),
        local,
    };
    let authenticated = timeout(limit, relay.authenticator.authenticate(presented)).await;
    let authenticated = match authenticated {
        Ok(authenticated) => authenticated.map_err(|error| error.refusal()),
        Err(_elapsed) => Err(proto::Refuse {
            reason: proto::RefuseReason::Overloaded.into(),
            detail: "the credential could not be looked at in time".to_owned(),
            ..proto::Refuse::default()
        }),
    };
    if hello.dedicated {
        return dedicated::enter(&relay, transport, &hello, authenticated, peer, place).await;
    }
    let admitted = authenticated.and_then(|authenticated| {
        let shard_index = |id: &SessionId, lane| shards[shard_of(id, lane)].index;
        relay.sessions.admit(&hello, authenticated, peer, shard_index)
    });
    let admitted = match admitted {
        Ok(admitted) => admitted,
        Err(refuse) => {
            relay.metrics.handshake_refused(refuse.reason().as_str_name());
            let name = &*shown_name(&hello.name);
            if refuse.reason() == proto::RefuseReason::Credential {
                let chain = transport.peer_chain();
                let shown = chain.first().filter(|_| hello.credential.is_empty());
                relay.door.failed(peer, Some(shown.map_or(&*hello.credential, AsRef::as_ref)));
            }
            if refuse.reason() == proto::RefuseReason::Held {
                // It asks again and again: the way it came by may lead elsewhere then.
                tracing::debug!(%peer, name, reason = refuse.detail, "sidecar refused");
            } else {
                tracing::warn!(%peer, name, reason = refuse.detail, "sidecar refused");
            }
            return send_refuse(&mut transport, &refuse, limit).await;
        }
    };
    transport.forget_peer_chain();
    let shard = shard_of(&admitted.session.id, admitted.link.number);
    let link = Arc::clone(&admitted.link);
    let session = Arc::clone(&admitted.session);
    let is_first = admitted.is_first;
    let prepared = match welcome(&mut transport, &admitted.welcome, limit).await {
        Ok(()) => transport.detach(),
        Err(error) => Err(error),
    };
    drop(place);
    let handed_over = match prepared {
        Ok(()) => {
            let relay = Arc::clone(&relay);
            shards[shard].spawn(async move { lanes::run(relay, admitted, transport, input).await })
        }
        Err(error) => {
            tracing::warn!(%peer, %error, "the sidecar's connection failed in the handshake");
            false
        }
    };
    if !handed_over {
        lanes::not_driven(&relay, &session, &link, is_first);
    }
}

pub(super) async fn welcome(
    transport: &mut Transport,
    welcome: &proto::Welcome,
    limit: Duration,
) -> io::Result<()> {
    // What several lanes share was tuned before.
    if let Some(socket) = transport.tcp() {
        dial::tune(socket)?;
    }
    timeout(limit, accept::send_welcome(transport, welcome))
        .await
        .map_err(|_| io::Error::from(io::ErrorKind::TimedOut))?
}

pub(super) async fn send_refuse(
    transport: &mut Transport,
    refuse: &proto::Refuse,
    limit: Duration,
) {
    // Whoever does not read its refusal learns of it by the closed connection.
    let _ = timeout(limit, accept::send_refuse(transport, refuse)).await;
}

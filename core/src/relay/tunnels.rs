//! The tunnel's public end: lets sidecars in and drives their lanes.

use std::io;
use std::net::{IpAddr, Ipv4Addr, SocketAddr};
use std::sync::Arc;
use std::time::{Duration, Instant};

use bytes::BytesMut;
use sidelane_abi::failure;
use sidelane_tunnel::{Event, proto};
use tokio::io::AsyncReadExt as _;
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::{OwnedSemaphorePermit, Semaphore, watch};
use tokio::time::timeout;

use super::Relay;
use crate::credentials::Presented;
use crate::error::chain;
use crate::plugin::lend::Reset;
use crate::shard::Shard;
use crate::tunnel::accept::{self, Gate, HANDSHAKES_MAX, HelloError, RETRY_AFTER_RATE_MS};
use crate::tunnel::session::{Admitted, Session, SessionId};
use crate::tunnel::{Link, dial, drive};

/// Pause after the system refused a connection (out of descriptors, say): retrying at once would
/// spin.
const ACCEPT_PAUSE: Duration = Duration::from_millis(100);

/// Diallers at once that are told to come back; further ones are closed unanswered.
const TURNED_AWAY_MAX: usize = 64;

/// How long one that was told so has to take it. Closing at once would make the kernel reset the
/// connection, and the dialler could lose the answer.
const TURNED_AWAY_TIME: Duration = Duration::from_millis(500);

/// Most bytes thrown away meanwhile: a hello is shorter.
const TURNED_AWAY_BYTES_MAX: usize = 64 * 1024;

/// Lets sidecars in on `listener` until `stopping` turns true.
pub(super) async fn accept(
    relay: Arc<Relay>,
    listener: TcpListener,
    shards: Arc<[Shard]>,
    mut stopping: watch::Receiver<bool>,
) {
    let gate = Gate::default();
    let turned_away = Arc::new(Semaphore::new(TURNED_AWAY_MAX));
    let handshakes = Arc::new(Semaphore::new(HANDSHAKES_MAX));
    loop {
        let accepted = tokio::select! {
            accepted = listener.accept() => accepted,
            _ = stopping.wait_for(|stopping| *stopping) => return,
        };
        let (stream, peer) = match accepted {
            Ok(accepted) => accepted,
            Err(error) => {
                tracing::error!(%error, "cannot accept a sidecar's connection");
                tokio::time::sleep(ACCEPT_PAUSE).await;
                continue;
            }
        };
        let permit = Arc::clone(&handshakes).try_acquire_owned();
        let bounds = **relay.handshakes.load();
        let (true, Ok(permit)) = (gate.enter(&bounds, peer.ip(), Instant::now()), permit) else {
            relay.metrics.handshake_refused("rate");
            tracing::debug!(%peer, "too many handshakes; turned away");
            if let Ok(permit) = Arc::clone(&turned_away).try_acquire_owned() {
                tokio::spawn(turn_away(stream, permit));
            }
            continue;
        };
        let (relay, shards) = (Arc::clone(&relay), Arc::clone(&shards));
        tokio::spawn(shake_hands(relay, stream, peer, shards, bounds.timeout, permit));
    }
}

/// Tells a dialler that came too soon when to come back.
async fn turn_away(mut stream: TcpStream, permit: OwnedSemaphorePermit) {
    let refuse = proto::Refuse {
        reason: proto::RefuseReason::Overloaded.into(),
        detail: "too many sidecars dial at once".to_owned(),
        retry_after_ms: RETRY_AFTER_RATE_MS,
    };
    let told = async {
        accept::send_refuse(&mut stream, &refuse).await?;
        let mut space = [0; 1024];
        let mut thrown_away = 0;
        while thrown_away < TURNED_AWAY_BYTES_MAX {
            match stream.read(&mut space).await? {
                0 => break,
                read => thrown_away += read,
            }
        }
        io::Result::Ok(())
    };
    // Whoever does not take the answer learns of it by the closed connection.
    let _ = timeout(TURNED_AWAY_TIME, told).await;
    drop(permit);
}

async fn shake_hands(
    relay: Arc<Relay>,
    mut stream: TcpStream,
    peer: SocketAddr,
    shards: Arc<[Shard]>,
    limit: Duration,
    permit: OwnedSemaphorePermit,
) {
    let mut input = BytesMut::with_capacity(4096);
    let hello = timeout(limit, accept::read_hello(&mut stream, &mut input)).await;
    let hello = match hello.unwrap_or(Err(HelloError::Timeout(limit))) {
        Ok(hello) => hello,
        Err(error) => {
            relay.metrics.handshake_refused("hello");
            tracing::warn!(%peer, error = chain(&error), "no handshake on the tunnel's port");
            if let HelloError::Malformed(cause) = &error {
                send_refuse(&mut stream, &cause.refusal(), limit).await;
            }
            return;
        }
    };
    let local =
        stream.local_addr().map_or(IpAddr::V4(Ipv4Addr::UNSPECIFIED), |address| address.ip());
    let shard_of = |id: &SessionId, lane: u32| (usize::from(id[0]) + lane as usize) % shards.len();
    let presented = Presented { credential: &hello.credential, chain: &[], peer: peer.ip(), local };
    let authenticated = relay.authenticator.authenticate(presented).await;
    let admitted = authenticated.map_err(|error| error.refusal()).and_then(|authenticated| {
        let shard_index = |id: &SessionId, lane| shards[shard_of(id, lane)].index;
        relay.sessions.admit(&hello, authenticated, peer, shard_index)
    });
    let admitted = match admitted {
        Ok(admitted) => admitted,
        Err(refuse) => {
            relay.metrics.handshake_refused(refuse.reason().as_str_name());
            tracing::warn!(%peer, name = hello.name, reason = refuse.detail, "sidecar refused");
            send_refuse(&mut stream, &refuse, limit).await;
            return;
        }
    };
    let shard = shard_of(&admitted.session.id, admitted.link.number);
    let link = Arc::clone(&admitted.link);
    let session = Arc::clone(&admitted.session);
    let prepared = match welcome(&mut stream, &admitted.welcome, limit).await {
        Ok(()) => stream.into_std(),
        Err(error) => Err(error),
    };
    drop(permit);
    let handed_over = match prepared {
        Ok(stream) => {
            let relay = Arc::clone(&relay);
            shards[shard].spawn(async move { run_lane(relay, admitted, stream, input).await })
        }
        Err(error) => {
            tracing::warn!(%peer, %error, "the sidecar's connection failed in the handshake");
            false
        }
    };
    if !handed_over {
        // Exchanges may have been opened on it already.
        link.abandon(Reset::new(failure::TUNNEL_LOST));
        relay.sessions.lane_ended(&session, &link);
    }
}

async fn welcome(
    stream: &mut TcpStream,
    welcome: &proto::Welcome,
    limit: Duration,
) -> io::Result<()> {
    dial::tune(stream)?;
    timeout(limit, accept::send_welcome(stream, welcome))
        .await
        .map_err(|_| io::Error::from(io::ErrorKind::TimedOut))?
}

async fn send_refuse(stream: &mut TcpStream, refuse: &proto::Refuse, limit: Duration) {
    // Whoever does not read its refusal learns of it by the closed connection.
    let _ = timeout(limit, accept::send_refuse(stream, refuse)).await;
}

/// Drives a lane that was let in, on the thread that owns it.
async fn run_lane(
    relay: Arc<Relay>,
    admitted: Admitted,
    stream: std::net::TcpStream,
    input: BytesMut,
) {
    let Admitted { session, link, replaced, is_first, .. } = admitted;
    let _up = relay.metrics.lane_up("relay");
    if is_first {
        relay.session_begun(&session);
    }
    if let Some(old) = replaced {
        tracing::info!(
            sidecar = &*session.name,
            "a newer session of the instance replaces the older"
        );
        old.close();
    }
    tracing::info!(sidecar = &*session.name, peer = %session.peer, lane = link.number, "lane up");
    relay.confirm(&session);
    relay.notice();
    let lost = Reset::new(failure::TUNNEL_LOST);
    let end = match TcpStream::from_std(stream) {
        Ok(stream) => {
            let on_event = |link: &Arc<Link>, event| handle_event(&relay, &session, link, event);
            chain(&drive(Arc::clone(&link), stream, input, lost, on_event).await)
        }
        Err(error) => {
            link.abandon(lost);
            error.to_string()
        }
    };
    tracing::info!(sidecar = &*session.name, lane = link.number, reason = end, "lane ended");
    if relay.sessions.lane_ended(&session, &link) {
        relay.session_ended(&session);
    }
}

fn handle_event(relay: &Arc<Relay>, session: &Arc<Session>, link: &Arc<Link>, event: Event) {
    match event {
        Event::Announce(document) => {
            let announced = relay.announce(session, &document);
            session.answer(announced);
        }
        Event::GoAway(go_away) => {
            tracing::info!(
                sidecar = &*session.name,
                lane = link.number,
                reason = go_away.detail,
                "the sidecar takes nothing new on this lane"
            );
            link.leave();
        }
        // Exchanges opened by a sidecar are reserved.
        Event::Opened { key, .. } => link.refuse(key, Reset::new(failure::UNSUPPORTED)),
        Event::Authenticate(presented) => relay.renew(session, presented.credential),
        Event::Announced(_) | Event::Rtt(_) => {}
    }
}

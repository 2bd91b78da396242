//! The relay's end of lanes: drives them, and waits for those that have lost their connection.
//!
//! Knows connections and how long they are waited for; who is let in is decided before.

use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Duration;

use bytes::BytesMut;
use sidelane_abi::failure;
use sidelane_tunnel::{Event, proto};
use tokio::time::{Instant, timeout};

use super::Relay;
use super::tunnels::send_refuse;
use crate::error::chain;
use crate::plugin::lend::Reset;
use crate::tunnel::returning::{NotTaken, Return};
use crate::tunnel::session::{self, Admitted, Session, shown};
use crate::tunnel::told::{Told, tell};
use crate::tunnel::transport::{Movable as _, Transport};
use crate::tunnel::{Awaited, LaneEnd, Link, accept, dial, drive};

/// How an exchange ends with its lane.
const LOST: Reset = Reset::new(failure::TUNNEL_LOST);

/// What is remembered of a dial for a session that is not here. Its relay has given it up meanwhile, and whole
/// sites come back so at once: all such dials of an address count as one that is done again and again.
const GONE: &[u8] = b"no such session";

/// Whoever dials for a lane that is to come back.
pub(super) struct Dialled {
    pub(super) transport: Transport,
    /// What came behind its `resume`.
    pub(super) input: BytesMut,
    pub(super) peer: SocketAddr,
    /// Held until it is answered.
    pub(super) place: Box<dyn Send>,
}

/// Gives a lane another connection, or tells the dialler why not.
pub(super) async fn resume(relay: &Arc<Relay>, dialled: Dialled, resume: &proto::Resume) {
    let Dialled { mut transport, input, peer, place } = dialled;
    let (session, link) = match relay.sessions.find_lane(resume) {
        Ok(found) => found,
        Err(refuse) => {
            if refuse.reason() == proto::RefuseReason::UnknownSession {
                // Whoever guesses secrets is told the same.
                let is_guess = relay.sessions.is_wrong_secret(resume);
                let presented = if is_guess { &*resume.secret } else { GONE };
                relay.door.failed(peer, Some(presented));
            }
            return refused(relay, transport, peer, resume, &refuse).await;
        }
    };
    transport.forget_peer_chain();
    let tuned = transport.tcp().map_or(Ok(()), dial::tune);
    if let Err(error) = tuned.and_then(|()| transport.detach()) {
        tracing::debug!(%peer, %error, "a lane's new connection failed in the handshake");
        return;
    }
    let (attempt, received) = (resume.attempt, resume.received);
    let Err((next, why)) = link.offer(Return { transport, input, attempt, received, place }) else {
        tracing::debug!(sidecar = &*session.name, lane = link.number, attempt, %peer, "a lane has another connection");
        return;
    };
    let refuse = match why {
        NotTaken::Stale => session::stale(),
        NotTaken::Over => session::unknown_lane(),
    };
    let mut transport = next.transport;
    match transport.attach() {
        Ok(()) => refused(relay, transport, peer, resume, &refuse).await,
        Err(error) => tracing::debug!(%peer, %error, "a refused lane's connection is lost"),
    }
}

async fn refused(
    relay: &Relay,
    mut transport: Transport,
    peer: SocketAddr,
    resume: &proto::Resume,
    refuse: &proto::Refuse,
) {
    relay.metrics.lanes.resume_refused(refuse.reason().as_str_name());
    tracing::info!(%peer, lane = resume.lane, reason = refuse.detail, "a lane cannot come back");
    send_refuse(&mut transport, refuse, relay.door.bounds().timeout).await;
}

/// Takes a lane back that was let in, and that nobody will drive.
pub(super) fn not_driven(relay: &Relay, session: &Arc<Session>, link: &Arc<Link>, is_first: bool) {
    // Exchanges may have been opened on it already.
    link.abandon(LOST);
    if !relay.sessions.lane_ended(session, link) {
        // What it presented counts for the lanes that stay.
        relay.confirm(session);
    } else if !is_first {
        // The others ended meanwhile, and left the end to this one.
        relay.session_ended(session);
    }
}

/// Drives a lane that was let in, on the thread that owns it, for as long as it lives.
pub(super) async fn run(
    relay: Arc<Relay>,
    admitted: Admitted,
    transport: Transport,
    input: BytesMut,
) {
    let Admitted { session, link, replaced, is_first, .. } = admitted;
    if is_first {
        relay.session_begun(&session);
    }
    if let Some(old) = replaced {
        tracing::info!(
            sidecar = &*session.name,
            "a newer session of the instance replaces the older"
        );
        old.give_way();
    }
    tracing::info!(
        sidecar = &*session.name,
        peer = %session.peer,
        lane = link.number,
        tls = transport.is_tls(),
        carrier = transport.kind().label(),
        credential = session.authenticated().credential(),
        "lane up"
    );
    relay.confirm(&session);
    relay.notice();
    let reason = Lane { relay: &relay, session: &session, link: &link }.run(transport, input).await;
    tracing::info!(sidecar = &*session.name, lane = link.number, reason, "lane ended");
    if relay.sessions.lane_ended(&session, &link) {
        relay.session_ended(&session);
    }
}

/// One lane of a session.
struct Lane<'a> {
    relay: &'a Arc<Relay>,
    session: &'a Arc<Session>,
    link: &'a Arc<Link>,
}

impl Lane<'_> {
    /// Drives it on one connection after the other. Returns why it has ended.
    async fn run(&self, mut transport: Transport, input: BytesMut) -> String {
        let Self { relay, session, link } = self;
        if let Err(error) = transport.attach() {
            link.abandon(LOST);
            return error.to_string();
        }
        let mut end = self.drive(transport, input).await;
        let mut lost_at = Instant::now();
        let mut losses = Told::default();
        while link.is_detached() {
            // Without a word of the peer's on it the connection was none.
            if link.was_heard() {
                lost_at = Instant::now();
            }
            relay.metrics.lanes.connection_lost("relay");
            if matches!(end, LaneEnd::Replaced) {
                relay.metrics.lanes.fenced();
            }
            let exchanges = link.load();
            let told = losses.note(Instant::now());
            tell!(
                told.is_some(),
                sidecar = &*session.name,
                lane = link.number,
                exchanges,
                losses = told.filter(|&losses| losses > 1),
                reason = chain(&end),
                "lane lost its connection; its exchanges wait"
            );
            let Some((transport, input)) = self.await_return(lost_at, told.is_some()).await else {
                link.abandon(LOST);
                break;
            };
            end = self.drive(transport, input).await;
        }
        if !matches!(end, LaneEnd::Local) && !link.is_leaving_for_good() {
            relay.metrics.lane_lost("relay");
        }
        if link.lost() > 0 {
            relay.metrics.lanes.exchanges_lost("relay", link.lost());
            tracing::warn!(
                sidecar = &*session.name,
                lane = link.number,
                exchanges = link.lost(),
                waited_ms = millis(lost_at.elapsed()),
                "lane given up: its exchanges end"
            );
        }
        chain(&end)
    }

    async fn drive(&self, transport: Transport, input: BytesMut) -> LaneEnd {
        let Self { relay, session, link } = self;
        let _up = relay.metrics.lane_up("relay");
        let _carried = relay.metrics.carrier_up("relay", transport.kind());
        link.runs_on(transport.kind());
        let on_event = |link: &Arc<Link>, event| handle_event(relay, session, link, event);
        drive(Arc::clone(link), transport, input, LOST, on_event)
            .paced_by(Transport::limit_unsent)
            .await
    }

    /// Waits until the lane has another connection and its dialler is told what came on the one before,
    /// of which nothing is read any more. `None`: it does not come back. `is_told`: its loss was told at info,
    /// and its return is.
    async fn await_return(&self, lost_at: Instant, is_told: bool) -> Option<(Transport, BytesMut)> {
        let Self { relay, session, link } = self;
        loop {
            let Awaited::Return(next) = link.returned(lost_at + session.grace).await else {
                return None;
            };
            let Return { mut transport, input, attempt, received, place } = *next;
            if let Err(error) = transport.attach() {
                tracing::debug!(lane = link.number, %error, "a lane's new connection is lost");
                continue;
            }
            let limit = relay.door.bounds().timeout;
            if let Err(error) = link.resume(received) {
                let refuse = session::gap(error.to_string());
                relay.metrics.lanes.resume_refused(refuse.reason().as_str_name());
                tracing::warn!(sidecar = &*session.name, lane = link.number, %error, "a lane cannot come back");
                send_refuse(&mut transport, &refuse, limit).await;
                return None;
            }
            let (messages, bytes) = link.to_replay();
            let resumed = proto::Resumed { received: link.received(), attempt };
            let told = timeout(limit, accept::send_resumed(&mut transport, &resumed)).await;
            drop(place);
            if let Ok(Ok(())) = told {
                let outage = lost_at.elapsed();
                relay.metrics.lanes.resumed("relay", outage, messages, bytes);
                tell!(
                    is_told,
                    sidecar = &*session.name,
                    lane = link.number,
                    attempt,
                    carrier = transport.kind().label(),
                    after_ms = millis(outage),
                    replayed_messages = messages,
                    replayed_bytes = bytes,
                    "lane is back"
                );
                return Some((transport, input));
            }
            tracing::debug!(lane = link.number, attempt, "a lane's new connection is lost");
            link.with(|lane| lane.detach());
        }
    }
}

fn millis(duration: Duration) -> u64 {
    u64::try_from(duration.as_millis()).unwrap_or(u64::MAX)
}

fn handle_event(relay: &Arc<Relay>, session: &Arc<Session>, link: &Arc<Link>, event: Event) {
    match event {
        Event::Announce(document) => relay.announced(session, document),
        Event::GoAway(go_away) => {
            // Once: what is said again and again would fill the log.
            if !link.is_leaving() {
                tracing::info!(
                    sidecar = &*session.name,
                    lane = link.number,
                    reason = shown(&go_away.detail),
                    "the sidecar takes nothing new on this lane"
                );
            }
            link.leave();
        }
        // Exchanges opened by a sidecar are reserved.
        Event::Opened { key, .. } => link.refuse(key, Reset::new(failure::UNSUPPORTED)),
        Event::Authenticate(presented) => relay.renew(session, presented.credential),
        // The first one of a connection: it can take exchanges that wait for one.
        Event::Rtt(_) => {
            if link.take_returned() {
                relay.notice();
            }
        }
        Event::Suspect(is_suspect) => {
            tracing::debug!(
                sidecar = &*session.name,
                lane = link.number,
                is_suspect,
                "the sidecar is silent"
            );
        }
        Event::Announced(_) | Event::Authenticated(_) => {}
    }
}

#[cfg(test)]
mod tests;

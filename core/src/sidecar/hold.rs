//! Holds a session with each relay: dials, keeps lanes up, and dials them anew where the way to the
//! relay has changed.
//!
//! Knows lanes and their ends; what comes on them is delivered elsewhere.

use std::sync::Arc;
use std::sync::atomic::AtomicBool;
use std::time::{Duration, Instant};

use bytes::BytesMut;
use sidelane_abi::failure;
use sidelane_tunnel as tunnel;
use sidelane_tunnel::{FEATURE_RESUME, ProtocolTable, proto};
use tokio::sync::mpsc;

use super::lane::{Lane, WRONG_RELAYS_MAX};
use super::{Peer, Session, Sidecar};
use crate::error::chain;
use crate::random;
use crate::tunnel::backoff::{Backoff, SETTLED, jitter};
use crate::tunnel::dial::{self, Carrier, DialError};
use crate::tunnel::session::FEATURE_ANNOUNCE;
use crate::tunnel::transport::{Movable as _, Transport};
use crate::tunnel::{LaneEnd, Link};

/// Further lanes of a new session are dialled within this, so that a relay's restart does not meet
/// all of them at once.
const LANE_STAGGER: Duration = Duration::from_millis(50);

/// The same where the relay has told to come back: other sidecars' first lanes come first.
const CROWDED_STAGGER: Duration = Duration::from_secs(5);

/// How often a peer whose relay another session leads to looks whether that is still so: about a lost
/// session's first delays.
const REACHED_LOOK: Duration = Duration::from_secs(1);

/// How often lanes that are on their way out are looked at.
const LEAVING_LOOK: Duration = Duration::from_millis(250);

/// How long after it was told to a relay that nothing new is to come on a lane that may still come, and
/// is taken.
const LEAVING_GRACE: Duration = Duration::from_secs(1);

/// Longest time that a lane is dialled for, whatever a relay says: as a file.
const GRACE_MAX: Duration = Duration::from_secs(300);

/// Ends of lanes that the session's task has not looked at yet: one per lane at most.
const LANE_ENDS_MAX: usize = 64;

impl Sidecar {
    /// Begins sessions with one relay, one after the other, until the sidecar stops or the address is
    /// not wanted any more.
    pub(super) async fn hold_peer(self: Arc<Self>, peer: Arc<Peer>) {
        let mut backoff = Backoff::default();
        let mut stopping = self.stopping.subscribe();
        let mut wanted = peer.wanted.subscribe();
        let mut access = self.access_changes.subscribe();
        // The relay has had too many at its door: it is not to meet all lanes of all sessions at once.
        let mut is_crowded = false;
        // Another session leads to the relay that is found here: it is dialled again then, as the address
        // may lead elsewhere by now.
        let mut held_until: Option<Instant> = None;
        while !self.is_stopping() && !self.let_go(&peer) {
            let is_held = held_until.is_some_and(|until| Instant::now() < until)
                && self.is_reached_otherwise(&peer);
            let wait = if is_held {
                REACHED_LOOK
            } else {
                held_until = None;
                let asked = match self.begin_session(&peer).await {
                    Ok((session, lane)) => {
                        let began = Instant::now();
                        let stagger = if is_crowded { CROWDED_STAGGER } else { LANE_STAGGER };
                        self.hold_session(&peer, session, lane, stagger).await;
                        if began.elapsed() >= SETTLED {
                            backoff.reset();
                        }
                        if !self.is_stopping() {
                            tracing::warn!(relay = peer.name, "session lost; dialling again");
                        }
                        is_crowded = false;
                        peer.stays_away()
                    }
                    Err(error) if error.is_held() && self.finds(&peer, error.refused_by()) => {
                        tracing::debug!(relay = peer.name, error = chain(&error), "no session");
                        held_until = Some(Instant::now() + backoff.next(random::number()));
                        Duration::ZERO
                    }
                    Err(error) => {
                        let cause = chain(&error);
                        if error.is_credential() {
                            tracing::error!(
                                relay = peer.name,
                                error = cause,
                                "the relay refuses this sidecar's credential; dialling again"
                            );
                        } else if self.has_connected_sibling(&peer) {
                            tracing::debug!(relay = peer.name, error = cause, "no session");
                        } else {
                            tracing::warn!(relay = peer.name, error = cause, "no session");
                        }
                        peer.failed(&cause);
                        self.answers.send_replace(());
                        error.retry_after().unwrap_or_default()
                    }
                };
                is_crowded |= !asked.is_zero();
                match held_until {
                    Some(until) => {
                        until.saturating_duration_since(Instant::now()).min(REACHED_LOOK)
                    }
                    None => backoff.next_after(asked, random::number()),
                }
            };
            tokio::select! {
                () = tokio::time::sleep(wait) => {}
                _ = stopping.changed() => {}
                _ = wanted.changed() => {}
                // What kept it out may be gone.
                _ = access.changed() => backoff.reset(),
            }
        }
    }

    /// Takes a peer that is not wanted off the list; false: it is wanted.
    fn let_go(self: &Arc<Self>, peer: &Arc<Peer>) -> bool {
        let mut is_gone = false;
        if !peer.is_wanted() {
            self.change_peers(|peers| {
                // It may have come back meanwhile.
                is_gone = !peer.is_wanted();
                if is_gone {
                    peers.retain(|other| !Arc::ptr_eq(other, peer));
                }
            });
        }
        if is_gone {
            self.told_no_more(peer);
            tracing::info!(relay = peer.name, "the address is dialled no more");
        }
        is_gone
    }

    async fn begin_session(self: &Arc<Self>, peer: &Peer) -> Result<(Session, NewLane), DialError> {
        let protocols = self.protocols();
        // What leads to another relay than is meant ends no session with that.
        let hello = proto::Hello { held: self.held_otherwise(peer), ..proto::Hello::default() };
        let (lane, welcome) = self.dial(peer, &peer.target, &protocols, hello).await?;
        let mut config =
            self.settings.lane.clone().with_peer(welcome.window, welcome.message_bytes_max);
        let comes_back = welcome.features & FEATURE_RESUME != 0 && config.replay_bytes_max > 0;
        let grace = if comes_back { welcome.grace_ms } else { 0 };
        if grace == 0 {
            config.replay_bytes_max = 0;
        }
        let session = Session {
            id: welcome.session,
            secret: welcome.secret,
            protocols,
            lane: config,
            lanes_max: welcome.lanes_max,
            relay_instance: welcome.relay_instance.clone(),
            claims: self.claims(welcome.features),
            // It is for those who dial by TCP: what leads elsewhere by HTTP leads to the relay still.
            advertised: if lane.carrier.begins_by_tcp() {
                welcome.advertise_address
            } else {
                String::new()
            },
            is_elsewhere: AtomicBool::new(false),
            grace: Duration::from_millis(grace.into()).min(GRACE_MAX),
        };
        self.metrics.session_begun();
        let (relay, epoch, tls) = (&*peer.name, welcome.epoch, lane.transport.is_tls());
        let carrier = lane.transport.kind().label();
        tracing::info!(relay, epoch, tls, carrier, "session begun");
        if session.claims.is_none() && self.dials_ahead() {
            tracing::info!(
                relay,
                carrier,
                "the session has no dedicated connections; exchanges go on in messages"
            );
        }
        peer.session_begun(welcome.epoch, welcome.relay_instance, tls);
        self.told(peer, &welcome.peers);
        Ok((session, lane))
    }

    async fn join_session(
        &self,
        peer: &Peer,
        session: &Session,
        wait: Duration,
    ) -> Result<NewLane, DialError> {
        tokio::time::sleep(wait).await;
        let of_session = proto::Hello {
            session: session.id.clone(),
            secret: session.secret.clone(),
            relay_instance: session.relay_instance.clone(),
            ..proto::Hello::default()
        };
        let (target, is_advertised) = session.target(peer);
        let dialled = self.dial(peer, target, &session.protocols, of_session).await;
        if dialled.as_ref().is_err_and(|error| error.refusal().is_none()) {
            session.not_reached(is_advertised);
        }
        Ok(dialled?.0)
    }

    /// Dials a relay as it is to be dialled now, with the credential as it is now.
    pub(super) async fn dial(
        &self,
        peer: &Peer,
        target: &str,
        protocols: &ProtocolTable,
        of_session: proto::Hello,
    ) -> Result<(NewLane, proto::Welcome), DialError> {
        let carrier = self.access.load().carrier(&peer.relay);
        // The session's lanes are not to go for a credential that is not accepted yet.
        let known = peer.known_credential().filter(|_| !of_session.session.is_empty());
        let is_newest = known.is_none();
        let credential = match known {
            Some(known) => known,
            None => self.credential().await,
        };
        let replay = self.settings.lane.replay_bytes_max;
        let hello = proto::Hello {
            version: sidelane_tunnel::VERSION,
            features: FEATURE_ANNOUNCE
                | self.dedicated_feature()
                | if replay > 0 { FEATURE_RESUME } else { 0 },
            instance: self.instance.to_vec().into(),
            name: self.settings.name.clone(),
            credential: credential.to_vec().into(),
            protocols: protocols.to_wire(),
            window: self.settings.lane.receive_window,
            message_bytes_max: self.settings.lane.message_bytes_max,
            replay_bytes_max: replay,
            ..of_session
        };
        let timeouts = self.settings.timeouts;
        let dialled = dial::dial(&peer.name, target, &carrier, &hello, timeouts).await;
        let (transport, welcome, input) = dialled?;
        if is_newest {
            peer.known_by(&credential);
            self.count_refused_credentials();
        }
        Ok((NewLane { transport, carrier, input, number: welcome.lane }, welcome))
    }

    /// Numbers of the protocol types that plugins serve, for one session.
    fn protocols(&self) -> ProtocolTable {
        let types = self.plugins.types();
        ProtocolTable::bind(types.iter().map(AsRef::as_ref)).unwrap_or_else(|error| {
            // The loader holds names to the same rules.
            tracing::error!(%error, "protocol types cannot be offered");
            ProtocolTable::default()
        })
    }

    /// Keeps a session's lanes up until the last is lost or the relay has forgotten it. Where the relay
    /// is to be dialled in another way, a lane that is dialled so comes up before an older one goes, and
    /// that one goes once its exchanges have ended.
    async fn hold_session(
        self: &Arc<Self>,
        peer: &Arc<Peer>,
        session: Session,
        first: NewLane,
        stagger: Duration,
    ) {
        let (ended, mut lane_ends) = mpsc::channel::<Arc<Link>>(LANE_ENDS_MAX);
        let session = Arc::new(session);
        let mut document = self.document.subscribe();
        let mut access = self.access_changes.subscribe();
        let mut backoff = Backoff::default();
        let lanes_max = session.lanes_max.max(1) as usize;
        let wanted = (self.settings.lanes as usize).min(lanes_max);
        let mut held = Held::default();
        let carrier = Arc::clone(&first.carrier);
        held.add(carrier, self.start_lane(peer, &session, first, ended.clone()));
        peer.connected();
        let _up = self.metrics.session_up("sidecar");
        let _dedicated = self.keep_dedicated(peer, &session);
        self.announce(peer);
        document.mark_unchanged();
        let mut wait = jitter(stagger, random::number());
        let mut wrong_relays = 0;
        // One dial at a time; it begins anew when it is done.
        let mut dial = Box::pin(self.join_session(peer, &session, wait));
        while !held.lanes.is_empty() {
            let carrier = self.access.load().carrier(&peer.relay);
            held.retire(&carrier, wanted, lanes_max);
            let dials = held.fresh(&carrier) < wanted && held.lanes.len() < lanes_max;
            tokio::select! {
                Some(link) = lane_ends.recv() => {
                    peer.with(|state| state.lanes.retain(|other| !Arc::ptr_eq(other, &link)));
                    held.lanes.retain(|lane| !Arc::ptr_eq(&lane.link, &link));
                    self.announce(peer);
                }
                result = &mut dial, if dials && !self.is_stopping() => {
                    match result {
                        Ok(lane) => {
                            let carrier = Arc::clone(&lane.carrier);
                            let link = self.start_lane(peer, &session, lane, ended.clone());
                            held.add(carrier, link);
                            backoff.reset();
                            wrong_relays = 0;
                            wait = jitter(LANE_STAGGER, random::number());
                        }
                        Err(error) if error.is_unknown_session() => {
                            tracing::warn!(relay = peer.name, "the relay has forgotten the session");
                            for link in peer.with(|state| state.lanes.clone()) {
                                link.close();
                            }
                            wait = backoff.next(random::number());
                        }
                        Err(error) if error.is_wrong_relay() && wrong_relays < WRONG_RELAYS_MAX => {
                            // One name, or one virtual address, leads to several.
                            wrong_relays += 1;
                            tracing::debug!(relay = peer.name, "another relay was reached for a further lane");
                            wait = jitter(LANE_STAGGER, random::number());
                        }
                        Err(error) => {
                            wrong_relays = 0;
                            tracing::warn!(relay = peer.name, error = chain(&error), "no further lane");
                            let asked = error.retry_after().unwrap_or_default();
                            wait = backoff.next_after(asked, random::number());
                        }
                    }
                    dial = Box::pin(self.join_session(peer, &session, wait));
                }
                Ok(()) = document.changed() => self.announce(peer),
                Ok(()) = access.changed() => {
                    let carrier = self.access.load().carrier(&peer.relay);
                    if held.fresh(&carrier) < held.lanes.len() {
                        tracing::info!(
                            relay = peer.name,
                            "the relay is dialled in another way: its lanes are, one after the other"
                        );
                        // A wait was for what was before.
                        backoff.reset();
                        wait = jitter(LANE_STAGGER, random::number());
                        dial = Box::pin(self.join_session(peer, &session, wait));
                    }
                }
                () = tokio::time::sleep(LEAVING_LOOK), if held.is_any_leaving() => held.close(),
            }
        }
        peer.session_ended();
        self.count_refusals();
        self.count_refused_credentials();
        self.answers.send_replace(());
    }

    fn start_lane(
        self: &Arc<Self>,
        peer: &Arc<Peer>,
        session: &Arc<Session>,
        mut lane: NewLane,
        ended: mpsc::Sender<Arc<Link>>,
    ) -> Option<Arc<Link>> {
        let shard = &self.shards[lane.number as usize % self.shards.len()];
        // The socket belongs to the runtime that dialled; the lane's thread may be another. One that is
        // lost by it ends as soon as it is driven.
        if let Err(error) = lane.transport.detach() {
            tracing::warn!(relay = peer.name, %error, "a lane's connection is lost between threads");
        }
        let link = Link::new(
            lane.number,
            shard.index,
            tunnel::Lane::new(session.lane.clone(), Instant::now()),
        );
        // The relay's welcome came.
        link.known();
        if self.is_stopping() {
            link.leave();
        }
        session.dedicates(&link);
        peer.with(|state| state.lanes.push(Arc::clone(&link)));
        let task = Lane::new(self, peer, session, &link);
        let (sidecar, task_peer, driven) = (Arc::clone(self), Arc::clone(peer), Arc::clone(&link));
        let task = async move {
            let (peer, number) = (task_peer, driven.number);
            let end = task.run(lane).await;
            let is_ours = matches!(end, LaneEnd::Local) || driven.is_closing();
            if is_ours || sidecar.is_stopping() {
                tracing::debug!(relay = peer.name, lane = number, "lane closed");
            } else {
                sidecar.metrics.lane_lost("sidecar");
                tracing::warn!(relay = peer.name, lane = number, error = chain(&end), "lane lost");
            }
            // An error means that the session's task is gone, and with it whoever would care.
            let _ = ended.send(driven).await;
        };
        if shard.spawn(task) {
            return Some(link);
        }
        peer.with(|state| state.lanes.retain(|other| !Arc::ptr_eq(other, &link)));
        None
    }
}

/// A lane that was let in, not driven yet.
pub(super) struct NewLane {
    pub(super) transport: Transport,
    pub(super) carrier: Arc<Carrier>,
    pub(super) input: BytesMut,
    pub(super) number: u32,
}

/// The lanes of a session.
#[derive(Default)]
struct Held {
    lanes: Vec<HeldLane>,
}

struct HeldLane {
    link: Arc<Link>,
    /// What it was dialled by.
    carrier: Arc<Carrier>,
    /// Since when it is on its way out.
    leaving: Option<Instant>,
}

impl HeldLane {
    fn is_stale(&self, carrier: &Arc<Carrier>) -> bool {
        self.leaving.is_none() && !Arc::ptr_eq(&self.carrier, carrier)
    }
}

impl Held {
    fn add(&mut self, carrier: Arc<Carrier>, link: Option<Arc<Link>>) {
        self.lanes.extend(link.map(|link| HeldLane { link, carrier, leaving: None }));
    }

    /// Lanes that were dialled as they are to be.
    fn fresh(&self, carrier: &Arc<Carrier>) -> usize {
        let is_fresh = |lane: &&HeldLane| lane.leaving.is_none() && !lane.is_stale(carrier);
        self.lanes.iter().filter(is_fresh).count()
    }

    /// Lets lanes go that were dialled otherwise, as far as others have taken their place, or where
    /// there is no room for others beside them.
    fn retire(&mut self, carrier: &Arc<Carrier>, wanted: usize, lanes_max: usize) {
        let fresh = self.fresh(carrier);
        let stale = self.lanes.iter().filter(|lane| lane.is_stale(carrier)).count();
        let is_full = self.lanes.len() >= lanes_max && !self.is_any_leaving() && fresh < wanted;
        let count = (fresh + stale).saturating_sub(wanted).max(usize::from(is_full)).min(stale);
        let leaving = self.lanes.iter_mut().filter(|lane| lane.is_stale(carrier)).take(count);
        for lane in leaving {
            lane.link.ask_away(failure::DRAINING, "the lane is dialled anew");
            lane.leaving = Some(Instant::now());
        }
    }

    fn is_any_leaving(&self) -> bool {
        self.lanes.iter().any(|lane| lane.leaving.is_some())
    }

    /// Ends lanes that are on their way out and have no exchange any more.
    fn close(&self) {
        let has_gone = |lane: &&HeldLane| {
            lane.leaving.is_some_and(|since| since.elapsed() >= LEAVING_GRACE)
                && lane.link.with(|lane| lane.stats().exchanges) == 0
        };
        for lane in self.lanes.iter().filter(has_gone) {
            lane.link.close();
        }
    }
}

#[cfg(test)]
mod tests {
    use sidelane_tunnel::{LaneConfig, Side};

    use super::*;

    fn carrier() -> Arc<Carrier> {
        Arc::new(Carrier::tcp(dial::Security::Plain { insecure: false }))
    }

    fn link(number: u32) -> Arc<Link> {
        let lane = tunnel::Lane::new(LaneConfig::new(Side::Sidecar), Instant::now());
        let link = Link::new(number, 0, lane);
        link.pretend_open();
        link
    }

    fn open(held: &Held) -> Vec<u32> {
        held.lanes.iter().filter(|lane| lane.link.is_open()).map(|lane| lane.link.number).collect()
    }

    #[test]
    fn a_lane_goes_when_another_has_taken_its_place() {
        let (old, new) = (carrier(), carrier());
        let mut held = Held::default();
        held.add(Arc::clone(&old), Some(link(0)));
        held.add(Arc::clone(&old), Some(link(1)));
        held.retire(&old, 2, 16);
        assert_eq!((open(&held), held.fresh(&old)), (vec![0, 1], 2));
        held.retire(&new, 2, 16);
        assert_eq!(
            (open(&held), held.fresh(&new)),
            (vec![0, 1], 0),
            "nothing is there in its place"
        );
        held.add(Arc::clone(&new), Some(link(2)));
        held.retire(&new, 2, 16);
        assert_eq!(open(&held), [1, 2]);
        held.add(Arc::clone(&new), Some(link(3)));
        held.retire(&new, 2, 16);
        assert_eq!((open(&held), held.fresh(&new)), (vec![2, 3], 2));
        held.retire(&new, 2, 16);
        assert_eq!(open(&held), [2, 3]);
        assert_eq!(held.lanes.len(), 4, "those that go are held until they have ended");
    }

    #[test]
    fn a_lane_makes_room_where_the_relay_takes_no_further_one() {
        let (old, new) = (carrier(), carrier());
        let mut held = Held::default();
        held.add(Arc::clone(&old), Some(link(0)));
        held.add(Arc::clone(&old), Some(link(1)));
        held.retire(&new, 2, 2);
        assert_eq!(open(&held), [1], "one at a time");
        held.retire(&new, 2, 2);
        assert_eq!(open(&held), [1]);
        held.lanes.remove(0);
        held.add(Arc::clone(&new), Some(link(2)));
        held.retire(&new, 2, 2);
        assert_eq!(open(&held), [2]);
    }

    #[test]
    fn a_lane_that_goes_ends_after_a_while_without_an_exchange() {
        let (old, new) = (carrier(), carrier());
        let mut held = Held::default();
        held.add(old, Some(link(0)));
        held.add(Arc::clone(&new), Some(link(1)));
        held.retire(&new, 1, 16);
        let is_closing = |held: &Held| held.lanes[0].link.is_closing();
        held.close();
        assert!(!is_closing(&held), "what is on its way still comes");
        held.lanes[0].leaving = Instant::now().checked_sub(LEAVING_GRACE);
        held.close();
        assert!(is_closing(&held));
    }
}

//! What becomes of a sidecar's document, and what its sidecar is told.

use std::sync::{Arc, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use sidelane_tunnel::proto;

use super::document::{Document, refused_options};
use super::sources::{Settled, Sources, ambiguities};
use super::{Relay, public};
use crate::tunnel::session::{Announcing, Session};

/// What a sidecar is told that has announced something just before its end.
const REVOKED: &str = "the session's credential was withdrawn or has expired";

/// What a sidecar is told that has announced something just before its last lane ended: nobody reads it.
const OVER: &str = "the session has ended";

/// Between two documents of one session, at least; and in parts of what the one before took, so that
/// whoever announces without end has a small share of a thread.
const PAUSE_MIN: Duration = Duration::from_millis(10);
const PAUSE_PARTS: u32 = 9;

impl Relay {
    /// Takes a document as it comes: the first at once, of those that come before its pause is over the
    /// last. One that a lane brings only once it is back, and another lane has brought a newer one, is none.
    pub(super) fn announced(self: &Arc<Self>, session: &Arc<Session>, announce: proto::Announce) {
        let mut announcing = lock(session);
        let (version, newest) = (announce.version, announcing.newest);
        if version < newest {
            drop(announcing);
            tracing::debug!(
                sidecar = &*session.name,
                version,
                newest,
                "an older announcement came late"
            );
            return;
        }
        announcing.newest = version;
        announcing.next = Some(announce);
        if std::mem::replace(&mut announcing.is_running, true) {
            return;
        }
        drop(announcing);
        let Some(mut pause) = self.announce_next(session) else { return };
        let (relay, session) = (Arc::clone(self), Arc::clone(session));
        tokio::spawn(async move {
            loop {
                tokio::time::sleep(pause).await;
                let Some(next) = relay.announce_next(&session) else { return };
                pause = next;
            }
        });
    }

    /// Answers the document that waits, and returns how long the next has to.
    fn announce_next(&self, session: &Arc<Session>) -> Option<Duration> {
        let next = {
            let mut announcing = lock(session);
            let next = announcing.next.take();
            announcing.is_running = next.is_some();
            next
        };
        let began = Instant::now();
        let announced = self.announce(session, &next?);
        session.answer(announced);
        Some(PAUSE_MIN.max(began.elapsed() * PAUSE_PARTS))
    }

    /// Takes a sidecar's document whole, or refuses it whole and keeps the one before.
    pub(super) fn announce(
        &self,
        session: &Arc<Session>,
        announce: &proto::Announce,
    ) -> proto::Announced {
        let document = Document::parse(session, announce).and_then(|document| {
            let refused = refused_options(&document.routes, |protocol_type, options| {
                // A type that no plugin here serves is said to the client, not to the sidecar.
                let served = self.plugins.find(protocol_type).is_some();
                if served { self.plugins.validate_route(protocol_type, options) } else { Ok(()) }
            });
            if refused.is_empty() { Ok(document) } else { Err(refused) }
        });
        let mut sources = self.lock_sources();
        let (epoch, version) = (session.epoch, announce.version);
        let document = document.and_then(|document| {
            let mut faults = ambiguities(&document, &sources.base_domains);
            if session.is_revoked() {
                faults = vec![REVOKED.to_owned()];
            } else if session.is_over() {
                // Nobody would take it out of force again.
                faults = vec![OVER.to_owned()];
            }
            if faults.is_empty() { Ok(document) } else { Err(faults) }
        });
        let mut settled = Settled::default();
        let mut answer = proto::Announced { version, ..proto::Announced::default() };
        match document {
            Ok(document) => {
                let fresh = sources.fresh_routes(&document);
                sources.hold(document);
                settled = sources.settle();
                if settled.is_changed {
                    self.reroute(&sources);
                } else {
                    self.count_held(&sources);
                }
                let own = settled.accepted.iter().position(|one| one.session.epoch == epoch);
                if let Some(own) = own {
                    answer.notes = settled.accepted.remove(own).notes;
                    answer.notes.extend(self.uncovered(&sources, epoch));
                    answer.accepted = true;
                    answer.addresses = self.addresses(&sources, epoch);
                    public::tell(&fresh, &self.public(&sources));
                } else if let Some(held) = sources.held.get(&epoch) {
                    settled.refused.retain(|one| one.session.epoch != epoch);
                    answer.reasons.clone_from(&held.reasons);
                    answer.waiting = !held.is_forbidden;
                }
            }
            Err(reasons) => answer.reasons = reasons,
        }
        self.tell(sources, settled);
        self.metrics.announced(answer.accepted);
        let principal = session.grant();
        let principal = &*principal.principal;
        if answer.accepted {
            tracing::info!(
                sidecar = &*session.name,
                principal,
                version,
                tunnels = announce.tunnels.len(),
                routes = announce.routes.len(),
                notes = answer.notes.join("; "),
                "announcement accepted"
            );
        } else {
            tracing::warn!(
                sidecar = &*session.name,
                principal,
                version,
                reasons = answer.reasons.join("; "),
                "announcement refused"
            );
        }
        answer
    }

    /// Tells sidecars what has become of their documents meanwhile.
    pub(super) fn tell(&self, sources: MutexGuard<'_, Sources>, settled: Settled) {
        let Settled { accepted, refused, .. } = settled;
        let accepted = self.accepted(&sources, accepted);
        drop(sources);
        for (session, announced) in accepted {
            self.metrics.announced(true);
            tracing::info!(
                sidecar = &*session.name,
                principal = &*session.grant().principal,
                version = announced.version,
                "announcement accepted: what it takes is free now, or may be claimed now"
            );
            session.answer(announced);
        }
        for one in refused {
            self.metrics.announced(false);
            tracing::warn!(
                sidecar = &*one.session.name,
                principal = &*one.session.grant().principal,
                version = one.version,
                reasons = one.reasons.join("; "),
                "announcement not in force any more"
            );
            one.session.answer(proto::Announced {
                version: one.version,
                accepted: false,
                reasons: one.reasons,
                waiting: !one.is_forbidden,
                ..proto::Announced::default()
            });
        }
    }
}

fn lock(session: &Session) -> MutexGuard<'_, Announcing> {
    session.announcing.lock().unwrap_or_else(PoisonError::into_inner)
}

//! Credentials while sessions run: looked at again when the configuration or an issuer's keys change,
//! renewed by the sidecar, and ended where they are worth nothing any more.

use std::net::IpAddr;
use std::sync::{Arc, PoisonError};
use std::time::{Duration, SystemTime};

use bytes::Bytes;
use sidelane_tunnel::proto;

use super::Relay;
use crate::credentials::{AuthError, Authenticated, Presented, Refused};
use crate::shard::Shard;
use crate::tunnel::session::{RefusedRenewal, Session};

/// Between two credentials that one session presents. Each may cost a check of a signature; a token is
/// renewed a few times in an hour.
const RENEWAL_PAUSE: Duration = Duration::from_secs(1);

/// What a sidecar is told at the end of its session.
const WITHDRAWN: &str = "the credential was withdrawn";
const EXPIRED: &str = "the credential has expired; renew it before its end";

/// Of a credential that a session presents while it runs.
const NOT_RENEWED: &str = "the sidecar's new credential is not accepted; the one before counts";
const OTHERS: &str =
    "the credential is another principal's (accepted: one of the principal whose session it is)";

impl Relay {
    /// Fetches issuers' keys from here on, and looks at sessions again when they change.
    pub(super) fn keep_credentials(self: &Arc<Self>, shard: &Shard) {
        let mut stopping = self.stopping.subscribe();
        let mut changed = self.authenticator.keys_changed();
        let authenticator = Arc::clone(&self.authenticator);
        shard.spawn(authenticator.keep_keys(self.stopping.subscribe()));
        let relay = Arc::clone(self);
        shard.spawn(async move {
            loop {
                tokio::select! {
                    _ = stopping.wait_for(|stopping| *stopping) => return,
                    result = changed.changed() => if result.is_err() { return },
                }
                // Certificates of all sessions are verified anew: nothing for a thread of the data path.
                let relay = Arc::clone(&relay);
                let checked = tokio::task::spawn_blocking(move || relay.recheck());
                if let Err(error) = checked.await {
                    tracing::error!(%error, "sessions could not be looked at again");
                }
            }
        });
    }

    /// Looks at every session's credential and claims again: those that are worth nothing any more end,
    /// and documents come into force, or go, by what their principals may claim now.
    pub fn recheck(&self) {
        let mut revoked = Vec::new();
        // Each may cost the check of a chain, and whoever announces meanwhile is not to wait for all.
        for session in self.sessions.all() {
            if let Err(error) = self.look_again(&session) {
                revoked.push((session, error));
            }
        }
        let mut sources = self.lock_sources();
        for (session, _) in &revoked {
            sources.forget(session.epoch);
        }
        // A name that somebody was served by may be nobody's any more: 404 then, and not 503.
        let base_domains = sources.base_domains.clone();
        let mut is_changed = !revoked.is_empty();
        sources.lost.retain_mut(|(_, lost)| {
            let known = self.authenticator.regrant(&lost.session.authenticated());
            let is_kept = known.is_ok_and(|known| {
                lost.grant = known.grant;
                lost.beyond_claims(&base_domains).is_empty()
            });
            is_changed |= !is_kept;
            is_kept
        });
        let settled = sources.settle();
        if is_changed || settled.is_changed || !settled.refused.is_empty() {
            self.reroute(&sources);
        }
        self.tell(sources, settled);
        for (session, error) in revoked {
            self.end_revoked(&session, &error);
        }
    }

    /// Looks at a session's credential again. One that is worth nothing any more gives way to the one that
    /// was refused last, where that is worth something by now: a token whose hash came later.
    fn look_again(&self, session: &Arc<Session>) -> Result<(), AuthError> {
        self.regrant(session, |before| self.authenticator.regrant(before))
    }

    fn regrant(
        &self,
        session: &Arc<Session>,
        change: impl FnOnce(&Authenticated) -> Result<Authenticated, AuthError>,
    ) -> Result<(), AuthError> {
        let mut is_renewed = false;
        let result = session.regrant(|before| {
            change(before).or_else(|error| {
                let known = self.by_refused(session, before).ok_or(error)?;
                is_renewed = true;
                Ok(known)
            })
        });
        if is_renewed {
            self.renewed(session);
        }
        result
    }

    /// What the credential is worth now that was refused last, where it is the same principal's.
    fn by_refused(&self, session: &Session, before: &Authenticated) -> Option<Authenticated> {
        let renewal = session.renewal.lock().unwrap_or_else(PoisonError::into_inner);
        let proof = renewal.refused.as_ref()?.proof.clone()?;
        drop(renewal);
        let known = self.authenticator.grant(&proof).ok()?;
        (known.grant.principal == before.grant.principal).then_some(known)
    }

    /// Looks at a session's credential once more, after the registry has it: rules that changed while it
    /// was let in did not find it there.
    pub(super) fn confirm(&self, session: &Arc<Session>) {
        if session.is_revoked() {
            session.revoke_lanes(WITHDRAWN);
            return;
        }
        let before = session.grant();
        let result = self.look_again(session);
        self.regranted(session, &before, result);
    }

    /// Takes a credential that a session presents while it runs.
    pub(super) fn renew(self: &Arc<Self>, session: &Arc<Session>, credential: Bytes) {
        let mut renewal = session.renewal.lock().unwrap_or_else(PoisonError::into_inner);
        renewal.next = Some(credential);
        if std::mem::replace(&mut renewal.is_running, true) {
            return;
        }
        drop(renewal);
        let (relay, session) = (Arc::clone(self), Arc::clone(session));
        tokio::spawn(async move {
            loop {
                let next = {
                    let renewal = session.renewal.lock();
                    let mut renewal = renewal.unwrap_or_else(PoisonError::into_inner);
                    let next = renewal.next.take().filter(|_| !session.is_revoked());
                    renewal.is_running = next.is_some();
                    next
                };
                let Some(credential) = next else { return };
                relay.renew_by(&session, &credential).await;
                tokio::time::sleep(RENEWAL_PAUSE).await;
            }
        });
    }

    async fn renew_by(&self, session: &Arc<Session>, credential: &[u8]) {
        let peer: IpAddr = session.peer.ip();
        // A certificate counts where it was shown, in a handshake.
        let presented = Presented { credential, chain: &[], peer, local: peer };
        let (why, proof) = match self.authenticator.authenticate_or_keep(presented).await {
            Ok(known) if known.grant.principal == session.grant().principal => {
                let before = session.grant();
                let result = session.regrant(|_| Ok::<_, AuthError>(known));
                self.regranted(session, &before, result);
                // Rules that changed meanwhile did not see it.
                self.confirm(session);
                return self.renewed(session);
            }
            Ok(known) => (OTHERS.to_owned(), Some(known.proof)),
            Err(Refused { error, proof }) => (error.to_string(), proof),
        };
        self.metrics.credentials.renewed(false);
        let is_told = session.refused_credential().is_some_and(|before| before == why);
        let (sidecar, principal) = (&*session.name, &*session.grant().principal);
        if is_told {
            tracing::debug!(sidecar, principal, error = why, "{NOT_RENEWED}");
        } else {
            tracing::warn!(sidecar, principal, error = why, "{NOT_RENEWED}");
        }
        let mut renewal = session.renewal.lock().unwrap_or_else(PoisonError::into_inner);
        renewal.refused = Some(RefusedRenewal { why: why.clone(), proof });
        drop(renewal);
        session.answer_credential(proto::Authenticated {
            accepted: false,
            detail: why,
            expires_ms: 0,
        });
    }

    /// Tells of a credential that has taken the place of the one before.
    fn renewed(&self, session: &Arc<Session>) {
        self.metrics.credentials.renewed(true);
        session.renewal.lock().unwrap_or_else(PoisonError::into_inner).refused = None;
        if session.is_revoked() {
            return;
        }
        let known = session.authenticated();
        tracing::info!(
            sidecar = &*session.name,
            principal = &*known.grant.principal,
            credential = known.credential(),
            expires = known.expires.map(httpdate::fmt_http_date),
            "credential renewed"
        );
        let left = known.expires.map(|at| at.duration_since(SystemTime::now()).unwrap_or_default());
        // 0 would say that it never ends.
        let left = left.map(|left| u64::try_from(left.as_millis()).unwrap_or(u64::MAX).max(1));
        session.answer_credential(proto::Authenticated {
            accepted: true,
            detail: String::new(),
            expires_ms: left.unwrap_or_default(),
        });
    }

    /// Acts on what a session was granted anew.
    fn regranted(
        &self,
        session: &Arc<Session>,
        before: &Arc<crate::credentials::Grant>,
        result: Result<(), AuthError>,
    ) {
        match result {
            Ok(()) if session.is_granted(before) => {}
            Ok(()) => {
                let mut sources = self.lock_sources();
                let settled = sources.settle();
                self.reroute(&sources);
                self.tell(sources, settled);
            }
            Err(error) => {
                let mut sources = self.lock_sources();
                sources.forget(session.epoch);
                let settled = sources.settle();
                self.reroute(&sources);
                self.tell(sources, settled);
                self.end_revoked(session, &error);
            }
        }
    }

    /// Ends sessions whose credential has expired, and what is left of those that were ended a while ago.
    pub(super) fn end_expired(&self, now: SystemTime) {
        for session in self.sessions.all() {
            if session.is_revoked() {
                // It had a second to take the reason.
                session.sever();
                continue;
            }
            if !session.authenticated().is_expired(now) {
                continue;
            }
            let before = session.grant();
            let result = self.regrant(&session, |known| {
                // It may have been renewed just now.
                if known.is_expired(now) { Err(AuthError::Expired) } else { Ok(known.clone()) }
            });
            self.regranted(&session, &before, result);
        }
    }

    /// Ends a session that was revoked.
    fn end_revoked(&self, session: &Arc<Session>, cause: &AuthError) {
        let is_expired = *cause == AuthError::Expired;
        self.metrics.credentials.session_revoked(is_expired);
        let authenticated = session.authenticated();
        let (sidecar, principal) = (&*session.name, &*authenticated.grant.principal);
        let (credential, peer) = (authenticated.credential(), session.peer);
        if is_expired {
            tracing::warn!(
                sidecar, principal, credential, %peer,
                "session ended: its credential has expired; a sidecar renews it before its end"
            );
        } else {
            tracing::warn!(
                sidecar, principal, credential, %peer, %cause,
                "session ended: its credential was withdrawn"
            );
        }
        session.revoke_lanes(if is_expired { EXPIRED } else { WITHDRAWN });
    }
}

#[cfg(test)]
mod tests;

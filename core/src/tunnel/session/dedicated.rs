//! Dedicated connections of a session: who may have one wait here, and what it is told.

use std::sync::Arc;
use std::time::Duration;

use sidelane_tunnel::dedicate::FEATURE_DEDICATED;
use sidelane_tunnel::proto;

use super::{FEATURE_ANNOUNCE, RETRY_AFTER_FULL_MS, Session, SessionId, Sessions};
use super::{refuse, same_secret, unknown};
use crate::credentials::Authenticated;
use crate::metrics::Metrics;
use crate::tunnel::Link;
use crate::tunnel::dedicated::{
    Dedication, Full, Pool, Room, Seat, WAITING_MAX, WAITING_PER_SESSION_MAX,
};

/// What the pools of new sessions are made with.
pub(super) struct Dedicating {
    room: Arc<Room>,
    metrics: Arc<Metrics>,
    wait: Duration,
}

impl Sessions {
    /// Lets sessions have dedicated connections: an exchange waits for one for `wait`. For sessions that begin
    /// from here on.
    pub fn dedicate(&self, metrics: &Arc<Metrics>, wait: Duration) {
        let before = self.dedicating.load();
        let room = before.as_ref().map(|before| Arc::clone(&before.room)).unwrap_or_default();
        let metrics = Arc::clone(metrics);
        self.dedicating.store(Some(Arc::new(Dedicating { room, metrics, wait })));
    }

    /// Where a new session's connections wait; `None`: one of the two ends has none.
    pub(super) fn pool(&self, hello: &proto::Hello) -> Option<Arc<Pool>> {
        let dedicating = self.dedicating.load();
        let Dedicating { room, metrics, wait } =
            &**dedicating.as_ref().filter(|_| hello.features & FEATURE_DEDICATED != 0)?;
        Some(Pool::new(Arc::clone(room), Arc::clone(metrics), *wait))
    }

    /// Decides on the hello of a connection that is to wait for an exchange.
    ///
    /// # Errors
    /// The refusal to send.
    pub fn admit_dedicated(
        &self,
        hello: &proto::Hello,
        authenticated: &Authenticated,
    ) -> Result<(Arc<Session>, Seat, proto::Welcome), proto::Refuse> {
        if !hello.relay_instance.is_empty() && hello.relay_instance != self.instance[..] {
            let detail = "another relay has the session; dial that one".to_owned();
            return Err(refuse(proto::RefuseReason::WrongRelay, detail, 0));
        }
        let id: SessionId = hello.session.as_ref().try_into().map_err(|_| unknown())?;
        let session =
            self.by_id.get(&id).map(|session| Arc::clone(&session)).ok_or_else(unknown)?;
        let is_same_principal = session.grant().principal == authenticated.grant.principal;
        let is_its = same_secret(&session.secret, &hello.secret) && is_same_principal;
        if !is_its || session.is_revoked() {
            return Err(unknown());
        }
        let Some(pool) = &session.pool else {
            let detail = "the session has no dedicated connections: its hello did not ask for them \
                          (features, bit 4)";
            return Err(refuse(proto::RefuseReason::Malformed, detail.to_owned(), 0));
        };
        let full =
            |detail: String| refuse(proto::RefuseReason::Overloaded, detail, RETRY_AFTER_FULL_MS);
        let seat = pool.enter().map_err(|why| match why {
            Full::Over => unknown(),
            Full::Session => full(format!(
                "{WAITING_PER_SESSION_MAX} dedicated connections of the session wait, the limit"
            )),
            Full::Relay => {
                full(format!("{WAITING_MAX} dedicated connections wait at this relay, its limit"))
            }
        })?;
        let settings = self.settings.load();
        let welcome = proto::Welcome {
            version: sidelane_tunnel::VERSION,
            features: FEATURE_ANNOUNCE | FEATURE_DEDICATED,
            session: session.id.to_vec().into(),
            secret: session.secret.to_vec().into(),
            epoch: session.epoch,
            relay_instance: self.instance.to_vec().into(),
            window: settings.lane.receive_window,
            message_bytes_max: settings.lane.message_bytes_max,
            lanes_max: settings.lanes_max,
            ..proto::Welcome::default()
        };
        Ok((session, seat, welcome))
    }
}

impl Session {
    /// Its dedicated connections that wait; `None`: it has none at all.
    #[must_use]
    pub fn pool(&self) -> Option<&Arc<Pool>> {
        self.pool.as_ref()
    }

    /// Lets those go that wait, and takes no more.
    pub(super) fn close_pool(&self) {
        if let Some(pool) = &self.pool {
            pool.close();
        }
    }

    /// Says to a lane where its exchanges find connections of their own.
    pub(super) fn dedicates(&self, link: &Link) {
        if let Some(pool) = &self.pool {
            link.dedicates(Dedication::Relay(Arc::clone(pool)));
        }
    }
}

#[cfg(test)]
mod tests;

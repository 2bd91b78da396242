//! Keeps connections dialled for exchanges that will want one of their own, and gives each to the exchange that
//! the relay names on it.
//!
//! Knows how many are wanted: some ahead, as configured, and one more for each exchange that waits.

use std::sync::Arc;
use std::time::{Duration, Instant};

use bytes::BytesMut;
use sidelane_tunnel::dedicate::FEATURE_DEDICATED;
use sidelane_tunnel::proto;
use tokio::sync::Semaphore;
use tokio::task::{AbortHandle, JoinSet};
use tokio::time::{sleep, timeout};

use super::{Peer, Session, Sidecar};
use crate::config;
use crate::error::chain;
use crate::random;
use crate::tunnel::Link;
use crate::tunnel::backoff::{Backoff, SETTLED};
use crate::tunnel::dedicated::{
    Claims, Dedication, Given, WAITING_PER_SESSION_MAX, await_dedicate, keep_alive,
};
use crate::tunnel::dial::DialError;
use crate::tunnel::transport::{Movable as _, Transport};

/// Dialled ahead where a route of the document asks for connections of their own, and the file says nothing:
/// one that is taken, while the next is dialled.
const AHEAD_DEFAULT: usize = 2;

/// Dials of one session at once.
const DIALS_MAX: usize = 4;

/// How long a connection waits for the exchange that it came for, which is on its way by the lane.
const EARLY_TIME: Duration = Duration::from_secs(10);

/// Bytes read at once while a connection waits: what says whose it is, and the exchange's first bytes.
const FIRST_READ_BYTES: usize = 4096;

/// How many connections are dialled before an exchange wants one.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) struct Ahead {
    count: usize,
    /// The file says that there are none: exchanges go on in messages.
    is_off: bool,
}

impl Ahead {
    fn of(config: &config::Config) -> Self {
        match config.sidecar.as_ref().and_then(|section| section.dedicated) {
            Some(count) => Self { count, is_off: count == 0 },
            None if asks(&config.routes) => Self { count: AHEAD_DEFAULT, is_off: false },
            None => Self::default(),
        }
    }
}

/// Whether a route asks for connections of their own: its options of some type say `mode: raw`.
fn asks(routes: &[Arc<config::Route>]) -> bool {
    let is_raw = |block: &config::Block| {
        serde_json::from_str::<serde_json::Value>(&block.text)
            .is_ok_and(|options| options.get("mode").is_some_and(|mode| mode == "raw"))
    };
    routes.iter().any(|route| route.options.values().any(is_raw))
}

/// Dials for a session until dropped.
pub(super) struct Keeping(Option<AbortHandle>);

impl Drop for Keeping {
    fn drop(&mut self) {
        if let Some(task) = &self.0 {
            task.abort();
        }
    }
}

/// What became of a connection that was dialled.
enum End {
    /// An exchange has it.
    Used,
    /// The relay closed it, after so long.
    Lost(Duration),
    /// There was none.
    Failed(DialError),
}

impl Session {
    /// Says to a lane where its exchanges find connections of their own.
    pub(super) fn dedicates(&self, link: &Link) {
        if let Some(claims) = &self.claims {
            link.dedicates(Dedication::Sidecar(Arc::clone(claims)));
        }
    }
}

impl Sidecar {
    pub(super) fn set_ahead(&self, config: &config::Config) {
        self.ahead.send_replace(Ahead::of(config));
    }

    /// What a hello says of dedicated connections.
    pub(super) fn dedicated_feature(&self) -> u64 {
        if self.ahead.borrow().is_off { 0 } else { FEATURE_DEDICATED }
    }

    /// Whether connections would be dialled before an exchange wants one.
    pub(super) fn dials_ahead(&self) -> bool {
        self.ahead.borrow().count > 0
    }

    /// Where exchanges of a session wait, as the two ends' features are.
    pub(super) fn claims(&self, relay_features: u64) -> Option<Arc<Claims>> {
        let is_agreed = relay_features & self.dedicated_feature() & FEATURE_DEDICATED != 0;
        is_agreed.then(|| Claims::new(Arc::clone(&self.metrics)))
    }

    /// Dials what the session's exchanges want.
    pub(super) fn keep_dedicated(
        self: &Arc<Self>,
        peer: &Arc<Peer>,
        session: &Arc<Session>,
    ) -> Keeping {
        let Some(claims) = session.claims.clone() else { return Keeping(None) };
        let task = Arc::clone(self).dial_dedicated(Arc::clone(peer), Arc::clone(session), claims);
        Keeping(Some(tokio::spawn(task).abort_handle()))
    }

    async fn dial_dedicated(
        self: Arc<Self>,
        peer: Arc<Peer>,
        session: Arc<Session>,
        claims: Arc<Claims>,
    ) {
        let (mut ahead, mut wanted) = (self.ahead.subscribe(), claims.wanted());
        let mut stopping = self.stopping.subscribe();
        let dials = Arc::new(Semaphore::new(DIALS_MAX));
        // Those that wait end with it.
        let mut connections = JoinSet::new();
        let mut backoff = Backoff::default();
        let mut pause: Option<Duration> = None;
        loop {
            let Ahead { count, is_off } = *ahead.borrow_and_update();
            let target = if is_off || self.is_stopping() {
                connections.abort_all();
                0
            } else {
                (count + *wanted.borrow_and_update()).min(WAITING_PER_SESSION_MAX)
            };
            while pause.is_none() && connections.len() < target {
                let (sidecar, dials) = (Arc::clone(&self), Arc::clone(&dials));
                let (peer, session) = (Arc::clone(&peer), Arc::clone(&session));
                let claims = Arc::clone(&claims);
                connections
                    .spawn(async move { sidecar.dial_one(&peer, &session, &claims, &dials).await });
            }
            let resume = async {
                match pause {
                    Some(pause) => sleep(pause).await,
                    None => std::future::pending().await,
                }
            };
            tokio::select! {
                Some(ended) = connections.join_next() => match ended {
                    Ok(End::Used) => backoff.reset(),
                    Ok(End::Lost(lived)) => {
                        if lived >= SETTLED {
                            backoff.reset();
                        }
                        pause = Some(backoff.next(random::number()));
                    }
                    Ok(End::Failed(error)) => {
                        if error.is_unknown_session() {
                            // Its lanes will hear so too.
                            return;
                        }
                        let relay = &*peer.name;
                        if pause.is_none() {
                            tracing::warn!(relay, error = chain(&error), "no dedicated connection");
                        }
                        let asked = error.retry_after().unwrap_or_default();
                        let next = backoff.next(random::number()).max(asked);
                        pause = Some(pause.map_or(next, |pause| pause.max(next)));
                    }
                    Err(_aborted) => {}
                },
                () = resume => pause = None,
                Ok(()) = ahead.changed() => {}
                Ok(()) = wanted.changed() => {}
                Ok(()) = stopping.changed() => {}
            }
        }
    }

    /// Dials a connection and waits until the relay says whose it is.
    async fn dial_one(
        &self,
        peer: &Peer,
        session: &Session,
        claims: &Arc<Claims>,
        dials: &Semaphore,
    ) -> End {
        // Never closed.
        let dialling = dials.acquire().await;
        let of_session = proto::Hello {
            session: session.id.clone(),
            secret: session.secret.clone(),
            relay_instance: session.relay_instance.clone(),
            dedicated: true,
            ..proto::Hello::default()
        };
        let (lane, _) =
            match self.dial(peer, session.target(peer).0, &session.protocols, of_session).await {
                Ok(dialled) => dialled,
                Err(error) => return End::Failed(error),
            };
        drop(dialling);
        let began = Instant::now();
        match self.await_exchange(lane.transport, lane.input, claims).await {
            Some(()) => End::Used,
            None => End::Lost(began.elapsed()),
        }
    }

    async fn await_exchange(
        &self,
        mut transport: Transport,
        mut input: BytesMut,
        claims: &Arc<Claims>,
    ) -> Option<()> {
        let up = self.metrics.dedicated.waiting("sidecar");
        input.reserve(FIRST_READ_BYTES);
        let id = match keep_alive(&transport) {
            Ok(()) => await_dedicate(&mut transport, &mut input).await,
            Err(_) => return None,
        };
        drop(up);
        let id = match id {
            Ok(id) => id,
            Err(error) => {
                tracing::debug!(error = chain(&error), "a dedicated connection ended unused");
                return None;
            }
        };
        // The exchange may be on another thread.
        transport.detach().ok()?;
        let given = Given { transport, rest: input.freeze() };
        if let Some(early) = claims.give(id, given) {
            tokio::spawn(timeout(EARLY_TIME, early.hold()));
        }
        Some(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn ahead(sidecar: &str, options: &str) -> Ahead {
        let text = format!(
            "version: 1\nsidecar: {{ relays: [\"127.0.0.1:9081\"], {sidecar} }}\n\
             tunnels: [{{ name: a, service: \"127.0.0.1:3000\" }}]\n\
             routes: [{{ subdomain: a, tunnel: a, options: {{ {options} }} }}]\n"
        );
        let source = config::Source::from_text(std::path::Path::new("test.yaml"), text);
        Ahead::of(&config::parse(&source, &|_| None).unwrap())
    }

    #[test]
    fn as_many_are_dialled_ahead_as_the_file_says_or_its_routes_ask_for() {
        let of = |sidecar, options| {
            let Ahead { count, is_off } = ahead(sidecar, options);
            (count, is_off)
        };
        assert_eq!(of("", ""), (0, false));
        assert_eq!(of("", "WEBSOCKET: { mode: framed }"), (0, false));
        assert_eq!(of("", "WEBSOCKET: { mode: raw }"), (AHEAD_DEFAULT, false));
        assert_eq!(
            of("", "WEBSOCKET: { mode: framed }, LINE: { mode: raw }"),
            (AHEAD_DEFAULT, false)
        );
        assert_eq!(of("dedicated: 7", ""), (7, false));
        assert_eq!(of("dedicated: 0", "WEBSOCKET: { mode: raw }"), (0, true));
    }
}

//! Which exchange of a session waits at the sidecar for its connection, and which connection for its exchange:
//! the two come on different ways, and either may be first.

use std::collections::HashMap;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use bytes::Bytes;
use sidelane_tunnel::RequestId;
use tokio::sync::{oneshot, watch};

use super::WAITING_PER_SESSION_MAX;
use crate::metrics::Metrics;
use crate::tunnel::transport::Transport;

/// A connection for an exchange, off its runtime, and what was read of it already.
pub struct Given {
    /// The connection.
    pub transport: Transport,
    /// The exchange's first bytes.
    pub rest: Bytes,
}

/// The exchanges of one session that wait.
pub struct Claims {
    state: Mutex<State>,
    /// How many exchanges wait: so many connections are wanted beyond those that are dialled ahead.
    wanted: watch::Sender<usize>,
    metrics: Arc<Metrics>,
}

#[derive(Default)]
struct State {
    exchanges: HashMap<RequestId, oneshot::Sender<Given>>,
    /// Came before their exchange asked. Invariant: at most [`WAITING_PER_SESSION_MAX`].
    early: HashMap<RequestId, oneshot::Sender<oneshot::Sender<Given>>>,
}

/// An exchange's wait. Dropped, it waits no more.
pub(super) struct Claim {
    claims: Arc<Claims>,
    id: RequestId,
    given: oneshot::Receiver<Given>,
}

impl Claims {
    /// Returns none yet.
    #[must_use]
    pub fn new(metrics: Arc<Metrics>) -> Arc<Self> {
        Arc::new(Self { state: Mutex::default(), wanted: watch::Sender::new(0), metrics })
    }

    pub(super) fn metrics(&self) -> &Metrics {
        &self.metrics
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Follows how many exchanges wait.
    #[must_use]
    pub fn wanted(&self) -> watch::Receiver<usize> {
        self.wanted.subscribe()
    }

    pub(super) fn claim(self: &Arc<Self>, id: RequestId) -> Claim {
        let (give, given) = oneshot::channel();
        let mut state = self.lock();
        match state.early.remove(&id) {
            Some(early) => {
                // One that was lost meanwhile leaves the claim without an end, and the exchange with the
                // relay's word.
                if let Err(give) = early.send(give) {
                    state.exchanges.insert(id, give);
                }
            }
            None => drop(state.exchanges.insert(id, give)),
        }
        self.tell(state);
        Claim { claims: Arc::clone(self), id, given }
    }

    fn tell(&self, state: MutexGuard<'_, State>) {
        let waiting = state.exchanges.len();
        drop(state);
        self.wanted.send_if_modified(|wanted| std::mem::replace(wanted, waiting) != waiting);
    }

    /// Gives a connection to its exchange, now or when that asks, within what the caller waits. `None`: too
    /// many wait already.
    pub fn give(self: &Arc<Self>, id: RequestId, given: Given) -> Option<Early> {
        let mut state = self.lock();
        if let Some(exchange) = state.exchanges.remove(&id) {
            self.tell(state);
            // One that has gone meanwhile takes the connection along.
            drop(exchange.send(given));
            return None;
        }
        if state.early.len() >= WAITING_PER_SESSION_MAX {
            return None;
        }
        let (ask, asked) = oneshot::channel();
        state.early.insert(id, ask);
        Some(Early { claims: Arc::clone(self), id, asked, given: Some(given) })
    }
}

/// A connection that came before its exchange asked.
pub struct Early {
    claims: Arc<Claims>,
    id: RequestId,
    asked: oneshot::Receiver<oneshot::Sender<Given>>,
    given: Option<Given>,
}

impl Early {
    /// Waits for the exchange. The time is the caller's to bound.
    pub async fn hold(mut self) {
        if let Ok(give) = (&mut self.asked).await
            && let Some(given) = self.given.take()
        {
            drop(give.send(given));
        }
    }
}

impl Drop for Early {
    fn drop(&mut self) {
        self.asked.close();
        let mut state = self.claims.lock();
        if state.early.get(&self.id).is_some_and(oneshot::Sender::is_closed) {
            state.early.remove(&self.id);
        }
    }
}

impl Claim {
    /// Waits for the connection, for ever where none comes.
    pub(super) async fn given(&mut self) -> Given {
        match (&mut self.given).await {
            Ok(given) => given,
            Err(_) => std::future::pending().await,
        }
    }
}

impl Drop for Claim {
    fn drop(&mut self) {
        self.given.close();
        let mut state = self.claims.lock();
        if state.exchanges.get(&self.id).is_some_and(oneshot::Sender::is_closed) {
            state.exchanges.remove(&self.id);
            self.claims.tell(state);
        }
    }
}

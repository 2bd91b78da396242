//! The relay's connections of one session that wait for an exchange.
//!
//! A task of its own holds each, so that one that is lost goes at once; whoever takes one asks that task.

use std::collections::VecDeque;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use tokio::io::AsyncReadExt as _;
use tokio::sync::{Notify, oneshot};

use super::{WAITING_MAX, WAITING_PER_SESSION_MAX};
use crate::metrics::Metrics;
use crate::tunnel::transport::{Movable as _, Transport};

/// Asks the task of a waiting connection for it.
type Ask = oneshot::Sender<oneshot::Sender<Transport>>;

/// Why a connection cannot wait.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Full {
    /// The session has as many.
    Session,
    /// The relay has.
    Relay,
    /// The session is over.
    Over,
}

/// What all pools of a relay share: how many connections wait.
#[derive(Default)]
pub struct Room {
    waiting: AtomicUsize,
}

/// A place among those that wait.
struct Place(Arc<Room>);

impl Room {
    fn try_enter(self: &Arc<Self>) -> Option<Place> {
        if self.waiting.fetch_add(1, Ordering::Relaxed) >= WAITING_MAX {
            self.waiting.fetch_sub(1, Ordering::Relaxed);
            return None;
        }
        Some(Place(Arc::clone(self)))
    }
}

impl Drop for Place {
    fn drop(&mut self) {
        self.0.waiting.fetch_sub(1, Ordering::Relaxed);
    }
}

/// The connections of one session.
pub struct Pool {
    state: Mutex<State>,
    /// Told whenever one comes.
    came: Notify,
    /// Told when the session is over.
    over: Notify,
    room: Arc<Room>,
    metrics: Arc<Metrics>,
    /// How long an exchange waits for one.
    wait: Duration,
}

#[derive(Default)]
struct State {
    /// The oldest first. Invariant: at most [`WAITING_PER_SESSION_MAX`].
    waiting: VecDeque<Ask>,
    is_over: bool,
}

/// A connection's place in the pool, held before the sidecar is told that it has one.
pub struct Seat {
    pool: Arc<Pool>,
    asked: oneshot::Receiver<oneshot::Sender<Transport>>,
    _place: Place,
}

impl Pool {
    /// Returns an empty pool.
    #[must_use]
    pub fn new(room: Arc<Room>, metrics: Arc<Metrics>, wait: Duration) -> Arc<Self> {
        let state = Mutex::default();
        let (came, over) = (Notify::new(), Notify::new());
        Arc::new(Self { state, came, over, room, metrics, wait })
    }

    pub(super) fn metrics(&self) -> &Metrics {
        &self.metrics
    }

    pub(super) const fn wait(&self) -> Duration {
        self.wait
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Connections that wait.
    #[must_use]
    pub fn len(&self) -> usize {
        self.lock().waiting.len()
    }

    /// Whether none waits.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// Takes a place for a connection.
    ///
    /// # Errors
    /// As [`Full`] says.
    pub fn enter(self: &Arc<Self>) -> Result<Seat, Full> {
        let place = self.room.try_enter().ok_or(Full::Relay)?;
        let mut state = self.lock();
        if state.is_over {
            return Err(Full::Over);
        }
        state.waiting.retain(|ask| !ask.is_closed());
        if state.waiting.len() >= WAITING_PER_SESSION_MAX {
            return Err(Full::Session);
        }
        let (ask, asked) = oneshot::channel();
        state.waiting.push_back(ask);
        Ok(Seat { pool: Arc::clone(self), asked, _place: place })
    }

    /// Lets all go that wait, and takes no more.
    pub fn close(&self) {
        let mut state = self.lock();
        state.is_over = true;
        // Their tasks see that nobody will ask.
        state.waiting.clear();
        drop(state);
        self.over.notify_waiters();
    }

    /// Takes one that is there.
    pub(super) async fn take_now(&self) -> Option<Transport> {
        loop {
            let ask = self.lock().waiting.pop_front()?;
            let (reply, given) = oneshot::channel();
            if ask.send(reply).is_ok()
                && let Ok(transport) = given.await
            {
                return Some(transport);
            }
        }
    }

    /// Takes one, as soon as there is one; `None`: the session is over.
    pub(super) async fn take(&self) -> Option<Transport> {
        loop {
            let (came, over) = (self.came.notified(), self.over.notified());
            tokio::pin!(came, over);
            came.as_mut().enable();
            over.as_mut().enable();
            if let Some(transport) = self.take_now().await {
                return Some(transport);
            }
            if self.lock().is_over {
                return None;
            }
            tokio::select! {
                () = came => {}
                () = over => return None,
            }
        }
    }
}

impl Seat {
    /// Holds the connection until an exchange takes it, it is lost, or the session is over. Its sidecar says
    /// nothing meanwhile: whoever does has not understood, and is closed.
    pub async fn hold(mut self, mut transport: Transport) {
        let up = self.pool.metrics.dedicated.waiting("relay");
        self.pool.came.notify_one();
        let mut byte = [0; 1];
        let reply = tokio::select! {
            biased;
            asked = &mut self.asked => asked.ok(),
            _ = transport.read(&mut byte) => None,
        };
        drop(up);
        if let Some(reply) = reply
            && transport.detach().is_ok()
        {
            // Whoever asked may have gone; so does the connection then.
            drop(reply.send(transport));
        }
    }
}

impl Drop for Seat {
    fn drop(&mut self) {
        self.asked.close();
        self.pool.lock().waiting.retain(|ask| !ask.is_closed());
    }
}

//! How a process ends, in two phases: withdrawn, so that others send nothing new here while all that
//! runs goes on; then ended, what runs first, lanes last.
//!
//! Knows the order and how long each step may take; what a role does in one is the role's.

use std::sync::{Mutex, PoisonError};
use std::time::{Duration, Instant};

use serde_json::json;
use tokio::sync::Notify;

use super::Process;
use crate::random;

/// How often the end of running exchanges is looked for during shutdown.
const DRAIN_TICK: Duration = Duration::from_millis(20);

/// How long relays may take to say that they send nothing new. It is a matter of a round trip; one that
/// does not answer is told by its lanes, and what crosses that goes to another sidecar.
const ACKNOWLEDGED_WITHIN: Duration = Duration::from_secs(1);

/// What is left of the deadline for lanes to write what is queued, after the exchanges.
const CLOSE_GRACE: Duration = Duration::from_millis(500);

/// How far a process is on its way out.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(super) enum Phase {
    /// It takes whatever comes.
    Running,
    /// Others are told to send nothing new; what comes all the same is served.
    Withdrawn,
    /// Nothing new is taken, and what runs has until the deadline.
    Ending,
}

impl Phase {
    const fn name(self) -> &'static str {
        match self {
            Self::Running => "running",
            Self::Withdrawn => "withdrawn",
            Self::Ending => "ending",
        }
    }
}

/// The phase of a process. It never goes back: whoever is to serve again is started again.
pub(super) struct Drain {
    /// Tells this process from one that is started in its place, which may have its number too.
    process: String,
    state: Mutex<State>,
    end: Notify,
}

struct State {
    phase: Phase,
    since: Instant,
}

impl Drain {
    pub(super) fn new() -> Self {
        let state = State { phase: Phase::Running, since: Instant::now() };
        let process = format!("{:016x}", random::number());
        Self { process, state: Mutex::new(state), end: Notify::new() }
    }

    /// Enters a later phase; false: it is that far already.
    fn enter(&self, phase: Phase) -> bool {
        let mut state = self.lock();
        let is_later = state.phase < phase;
        if is_later {
            *state = State { phase, since: Instant::now() };
        }
        is_later
    }

    pub(super) fn phase(&self) -> Phase {
        self.lock().phase
    }

    /// Why the process is not ready; `None`: it takes whatever comes.
    pub(super) fn reason(&self) -> Option<&'static str> {
        match self.phase() {
            Phase::Running => None,
            Phase::Withdrawn => Some("draining: withdrawn"),
            Phase::Ending => Some("draining: shutting down"),
        }
    }

    /// Resolves once somebody has asked for the end.
    pub(super) async fn end_asked(&self) {
        self.end.notified().await;
    }

    fn lock(&self) -> std::sync::MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Process {
    /// Has others send nothing new here: first phase. Lanes, listeners and what runs stay. True: it was
    /// not so before.
    pub(super) fn withdraw(&self) -> bool {
        if !self.drain.enter(Phase::Withdrawn) {
            return false;
        }
        self.metrics.set_draining(1);
        tracing::info!("withdrawn: nothing new is to come here, what runs goes on");
        if let Some(relay) = &self.relay {
            relay.withdraw();
        }
        // The relay of this process has no other, and serves whoever comes all the same.
        if let Some(sidecar) = self.sidecar.as_ref().filter(|_| !self.is_embedded()) {
            sidecar.withdraw();
        }
        true
    }

    /// Does what `POST /-/drain` asks for, and says what is left.
    pub(super) fn drain_to(&self, is_end: bool) -> serde_json::Value {
        self.withdraw();
        if is_end {
            self.drain.end.notify_one();
        }
        let mut page = self.draining();
        if is_end {
            page["phase"] = Phase::Ending.name().into();
        }
        page
    }

    /// How far it is on its way out, and what is left.
    pub(super) fn draining(&self) -> serde_json::Value {
        let (phase, since) = {
            let state = self.drain.lock();
            (state.phase, state.since)
        };
        let relays = self.sidecar.as_ref().filter(|_| !self.is_embedded()).map(|sidecar| {
            let relays = sidecar.withdrawal();
            relays.into_iter().map(|relay| {
                json!({
                    "relay": relay.name,
                    "acknowledged": relay.is_acknowledged,
                    "refused": relay.refused,
                })
            })
        });
        let relays = relays.map(Iterator::collect::<Vec<_>>);
        let acknowledged = |relay: &serde_json::Value| relay["acknowledged"] == true;
        json!({
            "process": self.drain.process,
            "phase": phase.name(),
            "for_seconds": since.elapsed().as_secs(),
            "exchanges": self.exchanges(),
            "connections": self.relay.as_ref().map(|relay| relay.connections()),
            "relays": relays,
            "acknowledged": relays.iter().flatten().all(acknowledged),
        })
    }

    /// Exchanges that run, each once.
    fn exchanges(&self) -> usize {
        let at_relay = self.relay.as_ref().map_or(0, |relay| relay.exchanges());
        let at_sidecar = self.sidecar.as_ref().map_or(0, |sidecar| sidecar.exchanges());
        if self.is_embedded() { at_relay.max(at_sidecar) } else { at_relay + at_sidecar }
    }

    /// Ends in order: withdrawn, where that was not before, and a patient end waits until others have
    /// noticed; then nobody new, then running exchanges, then lanes.
    pub(super) async fn end(&self, is_patient: bool) {
        let config = self.config();
        self.withdraw();
        let withdrawn_for = self.drain.lock().since.elapsed();
        let left = config.withdraw_timeout.saturating_sub(withdrawn_for);
        if is_patient && self.relay.is_some() && !left.is_zero() {
            tracing::info!(
                seconds = left.as_secs_f64(),
                "not ready any more; new clients are taken until balancers have noticed"
            );
            tokio::time::sleep(left).await;
        }
        if let Some(sidecar) = self.sidecar.as_ref().filter(|_| !self.is_embedded()) {
            let limit = ACKNOWLEDGED_WITHIN.min(config.drain_timeout);
            wait_until(Instant::now() + limit, || sidecar.is_withdrawn_everywhere()).await;
        }
        self.drain.enter(Phase::Ending);
        self.metrics.set_draining(2);
        tracing::info!("shutting down: running exchanges may end");
        self.end_exchanges(Instant::now() + config.drain_timeout).await;
        if let Some(relay) = &self.relay {
            relay.close();
        }
        if let Some(sidecar) = &self.sidecar {
            sidecar.close();
        }
        let lanes = || {
            self.relay.as_ref().map_or(0, |relay| relay.sessions())
                + self.sidecar.as_ref().map_or(0, |sidecar| sidecar.lanes())
        };
        wait_until(Instant::now() + CLOSE_GRACE, || lanes() == 0).await;
        tracing::info!("ended");
    }

    /// Takes nobody new, and waits for what runs.
    async fn end_exchanges(&self, deadline: Instant) {
        if let Some(acme) = &self.acme {
            acme.stop();
        }
        if let Some(relay) = &self.relay {
            relay.drain();
        }
        // Long-lived exchanges do not end by themselves: their plugins take leave in time.
        self.plugins.take_leave(deadline);
        let at_relay =
            || self.relay.as_ref().map_or(0, |relay| relay.exchanges() + relay.connections());
        if let Some(sidecar) = &self.sidecar {
            if self.is_embedded() {
                // What the relay of this process has accepted is still to be delivered.
                wait_until(deadline, || at_relay() == 0).await;
            }
            sidecar.drain();
        }
        let running =
            || at_relay() + self.sidecar.as_ref().map_or(0, |sidecar| sidecar.exchanges());
        wait_until(deadline, || running() == 0).await;
        let left = running();
        if left > 0 {
            tracing::warn!(exchanges = left, "deadline passed: ending what still runs");
        }
    }
}

/// Waits until `done`, or the deadline.
async fn wait_until(deadline: Instant, done: impl Fn() -> bool) {
    while !done() && Instant::now() < deadline {
        tokio::time::sleep(DRAIN_TICK).await;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_phase_is_entered_once_and_never_left() {
        let drain = Drain::new();
        assert_eq!((drain.phase(), drain.reason()), (Phase::Running, None));
        assert!(drain.enter(Phase::Withdrawn) && !drain.enter(Phase::Withdrawn));
        assert_eq!(drain.reason(), Some("draining: withdrawn"));
        assert!(drain.enter(Phase::Ending) && !drain.enter(Phase::Withdrawn));
        assert_eq!((drain.phase(), drain.phase().name()), (Phase::Ending, "ending"));
    }

    #[tokio::test]
    async fn an_end_that_was_asked_for_early_is_not_forgotten() {
        let drain = Drain::new();
        drain.end.notify_one();
        drain.end.notify_one();
        drain.end_asked().await;
    }
}

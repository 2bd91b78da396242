//! How long an exchange may take: in all, and without anything passing.
//!
//! Knows of an exchange only that it is a call. Who knows the deadline (gRPC) says so first; this is
//! the end that needs nobody's help.

use std::future::{Future, poll_fn};
use std::pin::Pin;
use std::sync::{Arc, Mutex, OnceLock, PoisonError};
use std::task::{Context, Poll};
use std::time::Duration;

use sidelane_abi::failure;
use tokio::time::{Instant, Sleep};

use super::{Admitted, RouteState};
use crate::plugin::{Call, CallEnd};

/// By how much a plugin may be late with its own words for a deadline.
const DEADLINE_GRACE: Duration = Duration::from_millis(50);

/// What timers are exact to.
const CLOCK_TICK: Duration = Duration::from_millis(2);

/// The idle timer is set anew after this part of it has passed, not at every message; an exchange is
/// cut by as much later at most.
const IDLE_STEPS: u32 = 16;

/// Longest time that is waited for; tokio's clock overflows far beyond.
const FAR: Duration = Duration::from_secs(60 * 60 * 24 * 365);

/// Watches one exchange.
pub(in crate::relay) struct Watch {
    admitted: Admitted,
    /// Of the timeout `total`.
    deadline: Option<Instant>,
    total: Option<Pin<Box<Sleep>>>,
    idle: Option<Idle>,
}

struct Idle {
    limit: Duration,
    set: Instant,
    sleep: Pin<Box<Sleep>>,
}

/// Which time has run out.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Late {
    Total,
    Idle,
}

impl Watch {
    /// Begins to watch an exchange that began at `began`.
    pub(in crate::relay) fn new(admitted: Admitted, began: Instant) -> Self {
        let timeouts = admitted.state.policies.timeouts;
        let deadline = timeouts.total.map(|total| began + total.min(FAR));
        let total = deadline.map(|at| Box::pin(tokio::time::sleep_until(at + DEADLINE_GRACE)));
        let idle = timeouts.idle.map(|limit| Idle::new(limit.min(FAR)));
        Self { admitted, deadline, total, idle }
    }

    /// Polls the call, or cuts it.
    pub(in crate::relay) fn poll_call(
        &mut self,
        call: &mut Option<Call>,
        cx: &mut Context<'_>,
    ) -> Poll<CallEnd> {
        const CUT: CallEnd = CallEnd { code: failure::SERVICE_TIMEOUT, panicked: false };
        let Some(running) = call else { return Poll::Ready(CUT) };
        let is_idle = self.idle.as_mut().is_some_and(|idle| idle.poll(cx).is_ready());
        if !is_idle {
            // In its own words, where it has just found out by itself.
            if let Poll::Ready(end) = Pin::new(running).poll(cx) {
                if end.code == failure::SERVICE_TIMEOUT && self.is_due() {
                    self.tell(Late::Total);
                }
                return Poll::Ready(end);
            }
        }
        let is_late = self.total.as_mut().is_some_and(|total| total.as_mut().poll(cx).is_ready());
        let late = match (is_idle, is_late) {
            (false, false) => return Poll::Pending,
            (true, _) => Late::Idle,
            (false, true) => Late::Total,
        };
        self.tell(late);
        *call = None;
        Poll::Ready(CUT)
    }

    /// Whether the deadline has come, by the clock of whoever found out: the other end's may be a tick
    /// ahead.
    fn is_due(&self) -> bool {
        self.deadline.is_some_and(|deadline| Instant::now() + CLOCK_TICK >= deadline)
    }

    fn tell(&self, late: Late) {
        let state: &RouteState = &self.admitted.state;
        let timeout = match late {
            Late::Total => "total",
            Late::Idle => "idle",
        };
        state.metrics.timed_out(timeout);
        tracing::debug!(route = &*state.route.name, timeout, "exchange cut by the route's timeout");
    }
}

impl Idle {
    fn new(limit: Duration) -> Self {
        let set = Instant::now();
        let sleep = Box::pin(tokio::time::sleep_until(Self::end(limit, set)));
        Self { limit, set, sleep }
    }

    fn end(limit: Duration, since: Instant) -> Instant {
        since + limit + limit / IDLE_STEPS
    }

    /// Ready once nothing has passed for the limit. Whoever wakes the exchange before has something
    /// for it.
    fn poll(&mut self, cx: &mut Context<'_>) -> Poll<()> {
        if self.sleep.as_mut().poll(cx).is_ready() {
            return Poll::Ready(());
        }
        let now = Instant::now();
        if now.duration_since(self.set) >= self.limit / IDLE_STEPS {
            self.set = now;
            self.sleep.as_mut().reset(Self::end(self.limit, now));
        }
        Poll::Pending
    }
}

/// Where the opener of a byte-born exchange leaves what it was let in by, for whoever runs the call.
#[derive(Default)]
pub(in crate::relay) struct Held(OnceLock<Mutex<Option<Admitted>>>);

impl Held {
    /// Says by what the exchange was let in; `None`: its route has no policies.
    pub(in crate::relay) fn put(&self, admitted: Option<Admitted>) {
        self.0.get_or_init(|| Mutex::new(admitted));
    }

    /// `None`: not said yet.
    fn take(&self) -> Option<Option<Admitted>> {
        self.0.get().map(|held| held.lock().unwrap_or_else(PoisonError::into_inner).take())
    }
}

/// Runs a byte-born exchange's call under the policies of the route that it finds on its way.
pub(in crate::relay) async fn watch_stream(call: Call, held: Arc<Held>) -> CallEnd {
    let began = Instant::now();
    let mut call = Some(call);
    let mut watch: Option<Watch> = None;
    let mut held = Some(held);
    poll_fn(|cx| {
        if let Some(watch) = &mut watch {
            return watch.poll_call(&mut call, cx);
        }
        let Some(running) = &mut call else {
            return Poll::Ready(CallEnd { code: failure::INTERNAL, panicked: false });
        };
        if let Poll::Ready(end) = Pin::new(running).poll(cx) {
            return Poll::Ready(end);
        }
        let Some(said) = held.as_ref().and_then(|held| held.take()) else {
            return Poll::Pending;
        };
        held = None;
        let Some(admitted) = said else { return Poll::Pending };
        // Its timers are asked at once, so that they wake this task.
        watch.insert(Watch::new(admitted, began)).poll_call(&mut call, cx)
    })
    .await
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Polls `idle` when `at` has passed since its beginning.
    async fn idle_at(idle: &mut Idle, at: Duration, begin: Instant) -> bool {
        tokio::time::sleep_until(begin + at).await;
        poll_fn(|cx| Poll::Ready(idle.poll(cx).is_ready())).await
    }

    #[tokio::test(start_paused = true)]
    async fn whoever_passes_something_is_not_idle() {
        let begin = Instant::now();
        let mut idle = Idle::new(Duration::from_secs(16));
        for at in [1, 10, 25, 40, 55] {
            assert!(!idle_at(&mut idle, Duration::from_secs(at), begin).await, "at {at} s");
        }
        assert!(!idle_at(&mut idle, Duration::from_secs(55 + 15), begin).await);
        assert!(idle_at(&mut idle, Duration::from_secs(70 + 18), begin).await);
    }
}

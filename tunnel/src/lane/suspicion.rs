//! When a silent peer is suspect: long before it is taken for dead.

use std::time::{Duration, Instant};

/// Silence for so long, with something unacknowledged, is suspect whatever the round trip.
const SUSPECT_MIN: Duration = Duration::from_secs(1);

/// So many round trips of silence are suspect.
const SUSPECT_RTTS: u32 = 4;

/// Whether the peer is suspect: something is unacknowledged or a ping unanswered, and both that and the peer's silence are
/// longer than the round trip explains.
#[derive(Debug, Default)]
pub(super) struct Suspicion {
    /// Something is unacknowledged since then.
    outstanding_since: Option<Instant>,
    /// When it is looked at. It stays where it is when all is acknowledged before: a timer that is moved
    /// for each message costs more than one that finds nothing.
    look_at: Option<Instant>,
    is_suspect: bool,
}

impl Suspicion {
    pub(super) const fn poll_timeout(&self) -> Option<Instant> {
        self.look_at
    }

    /// Something was sent, or acknowledged.
    pub(super) fn outstanding(&mut self, now: Instant, rtt: Option<Duration>, is_any: bool) {
        if !is_any {
            self.outstanding_since = None;
        } else if self.outstanding_since.is_none() {
            self.outstanding_since = Some(now);
            self.watch(now, rtt);
        }
    }

    /// Bytes came; true: the peer was suspect.
    pub(super) fn heard(&mut self, now: Instant, rtt: Option<Duration>) -> bool {
        let was_suspect = std::mem::take(&mut self.is_suspect);
        if was_suspect && self.outstanding_since.is_some() {
            self.watch(now, rtt);
        }
        was_suspect
    }

    fn watch(&mut self, now: Instant, rtt: Option<Duration>) {
        if self.look_at.is_none() && !self.is_suspect {
            self.look_at = Some(now + patience(rtt));
        }
    }

    /// Looks where that is due; true: the peer has become suspect.
    pub(super) fn handle_timeout(
        &mut self,
        now: Instant,
        rtt: Option<Duration>,
        last_input: Instant,
    ) -> bool {
        if self.look_at.is_none_or(|at| at > now) {
            return false;
        }
        self.look_at = None;
        let Some(since) = self.outstanding_since else { return false };
        let due = since.max(last_input) + patience(rtt);
        if due > now {
            self.look_at = Some(due);
            return false;
        }
        self.is_suspect = true;
        true
    }
}

fn patience(rtt: Option<Duration>) -> Duration {
    rtt.map_or(SUSPECT_MIN, |rtt| rtt.saturating_mul(SUSPECT_RTTS).max(SUSPECT_MIN))
}

//! A relay that has just started is not ready before sidecars have found it, or could have.

use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Instant;

use super::Relay;
use crate::config;

/// When a relay is warm.
pub(super) struct Warmup {
    began: Instant,
    until: config::Warmup,
    /// It was: what goes afterwards is no warmup.
    is_over: AtomicBool,
}

impl Warmup {
    /// Begins to warm up.
    pub(super) fn new(until: config::Warmup, began: Instant) -> Self {
        Self { began, until, is_over: AtomicBool::new(until.time.is_zero()) }
    }

    /// Why it is not warm yet, where `sessions` serve something; `None`: it is, for good.
    fn look(&self, sessions: usize, now: Instant) -> Option<String> {
        if self.is_over.load(Ordering::Relaxed) {
            return None;
        }
        let left = self.until.time.saturating_sub(now.saturating_duration_since(self.began));
        let wanted = self.until.sessions;
        if left.is_zero() || (wanted > 0 && sessions >= wanted) {
            if !self.is_over.swap(true, Ordering::Relaxed) {
                tracing::info!(sessions, "the relay has warmed up");
            }
            return None;
        }
        let seconds = left.as_secs() + 1;
        Some(match wanted {
            0 => format!("warming up for {seconds} s more"),
            _ => format!(
                "warming up: {sessions} of {wanted} sessions are there; {seconds} s more at most"
            ),
        })
    }
}

impl Relay {
    /// Why the relay, which has just started, is not ready yet; `None`: it is.
    pub fn warming(&self) -> Option<String> {
        self.warmup.look(self.routing.load().sessions, Instant::now())
    }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::*;

    #[test]
    fn a_relay_is_warm_when_its_time_is_over_or_its_sessions_are_there() {
        let begin = Instant::now();
        let warmup = |seconds: u64, sessions: usize| {
            Warmup::new(config::Warmup { time: Duration::from_secs(seconds), sessions }, begin)
        };
        assert_eq!(warmup(0, 5).look(0, begin), None, "it asks for nothing");
        let timed = warmup(30, 0);
        let reason = timed.look(1000, begin).expect("not warm");
        assert_eq!(reason, "warming up for 31 s more");
        assert_eq!(timed.look(0, begin + Duration::from_secs(30)), None);
        let counted = warmup(30, 2);
        let at = begin + Duration::from_millis(10_500);
        let reason = counted.look(1, at).expect("not warm");
        assert_eq!(reason, "warming up: 1 of 2 sessions are there; 20 s more at most");
        assert_eq!(counted.look(2, at), None);
        assert_eq!(counted.look(0, at), None, "for good");
    }
}

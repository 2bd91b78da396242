//! Pings, the round-trip time, and when a silent peer is taken for dead. Reads no clock.

use std::time::{Duration, Instant};

/// When the next ping is due and when silence is death.
#[derive(Debug)]
pub(crate) struct Liveness {
    ping_idle: Duration,
    dead_after: Duration,
    last_input: Instant,
    /// A ping goes out then, busy or not: pings measure the round trip too.
    ping_at: Instant,
    /// The last ping, until it is answered.
    asked: Option<(u64, Instant)>,
    token: u64,
    rtt: Option<Duration>,
    /// `rtt` is that of another carrier: the next sample takes its place.
    is_stale: bool,
}

/// What is due.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) enum Due {
    Nothing,
    Ping(u64),
    Dead,
}

impl Liveness {
    pub(crate) const fn new(now: Instant, ping_idle: Duration, dead_after: Duration) -> Self {
        Self {
            ping_idle,
            dead_after,
            last_input: now,
            ping_at: now,
            asked: None,
            token: 0,
            rtt: None,
            is_stale: false,
        }
    }

    pub(crate) const fn handle_input(&mut self, now: Instant) {
        self.last_input = now;
    }

    /// Goes on, on another carrier: a ping is due at once.
    pub(crate) const fn restart(&mut self, now: Instant) {
        self.last_input = now;
        self.ping_at = now;
        self.asked = None;
        self.is_stale = true;
    }

    pub(crate) const fn last_input(&self) -> Instant {
        self.last_input
    }

    /// Takes an answer; returns the smoothed round-trip time where it is that of the last ping.
    pub(crate) fn handle_pong(&mut self, now: Instant, token: u64) -> Option<Duration> {
        let (asked, at) = self.asked?;
        if asked != token {
            return None;
        }
        self.asked = None;
        let sample = now.saturating_duration_since(at);
        let smoothed = self.rtt.filter(|_| !std::mem::take(&mut self.is_stale));
        let rtt = smoothed.map_or(sample, |rtt| (rtt * 7 + sample) / 8);
        self.rtt = Some(rtt);
        Some(rtt)
    }

    pub(crate) const fn rtt(&self) -> Option<Duration> {
        self.rtt
    }

    pub(crate) fn poll_timeout(&self) -> Instant {
        self.ping_at.min(self.last_input + self.dead_after)
    }

    pub(crate) fn handle_timeout(&mut self, now: Instant) -> Due {
        if now >= self.last_input + self.dead_after {
            return Due::Dead;
        }
        if now < self.ping_at {
            return Due::Nothing;
        }
        self.ping_at = now + self.ping_idle;
        self.token += 1;
        self.asked = Some((self.token, now));
        Due::Ping(self.token)
    }
}

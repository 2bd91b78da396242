//! Pings, the round-trip time, and when a silent peer is taken for dead. Reads no clock.

use std::time::{Duration, Instant};

/// Silence for so long behind something that the peer said is asked about once, where it can be mended: a
/// path that ends in the midst of a conversation is found before the next ping is due.
const QUIET: Duration = Duration::from_secs(1);

/// When the next ping is due and when silence is death.
#[derive(Debug)]
pub(crate) struct Liveness {
    ping_idle: Duration,
    dead_after: Duration,
    last_input: Instant,
    /// A ping goes out then, busy or not: pings measure the round trip too.
    ping_at: Instant,
    /// When silence is looked at; it stays where it is while the peer talks.
    quiet_at: Option<Instant>,
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
            quiet_at: None,
            asked: None,
            token: 0,
            rtt: None,
            is_stale: false,
        }
    }

    pub(crate) const fn handle_input(&mut self, now: Instant) {
        self.last_input = now;
    }

    /// The peer said something that counts: it is asked where silence follows.
    pub(crate) fn talk(&mut self, now: Instant) {
        if self.quiet_at.is_none() {
            self.quiet_at = Some(now + QUIET);
        }
    }

    /// Returns whether a ping is not answered yet.
    pub(crate) const fn is_asking(&self) -> bool {
        self.asked.is_some()
    }

    /// Goes on, on another carrier: a ping is due at once.
    pub(crate) const fn restart(&mut self, now: Instant) {
        self.last_input = now;
        self.ping_at = now;
        self.quiet_at = None;
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
        let ping_at = self.quiet_at.map_or(self.ping_at, |at| at.min(self.ping_at));
        ping_at.min(self.last_input + self.dead_after)
    }

    pub(crate) fn handle_timeout(&mut self, now: Instant) -> Due {
        if now >= self.last_input + self.dead_after {
            return Due::Dead;
        }
        if let Some(at) = self.quiet_at
            && at <= now
        {
            let due = self.last_input + QUIET;
            self.quiet_at = (due > now).then_some(due);
            if due <= now {
                self.ping_at = now;
            }
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

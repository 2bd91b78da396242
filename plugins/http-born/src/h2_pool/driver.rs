//! One connection of HTTP/2, driven to its end: settings in time, pings where they are asked for, and an
//! end where nobody uses it.

use std::future::Future as _;
use std::pin::Pin;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::task::{Context, Poll};

use bytes::Bytes;
use h2::client;
use h2::{Ping, PingPong};
use sidelane_plugin::{ByteStream, Host, Instant, Timer};

use super::{IDLE_LOOKS, Link, PoolConfig, PoolError, broken};

/// Drives a connection.
pub(super) struct Driver {
    pub(super) connection: client::Connection<ByteStream, Bytes>,
    pub(super) clock: Clock,
    pub(super) pings: Option<PingPong>,
    pub(super) link: Arc<Link>,
}

/// What time has come for.
pub(super) enum Time {
    /// The settings did not come.
    Settings,
    /// A ping was not answered.
    Unanswered,
    /// Nobody has used it for long.
    Unused,
}

impl Driver {
    /// Ready once it has ended: what that means where it had not begun.
    pub(super) fn poll_connection(&mut self, cx: &mut Context<'_>) -> Poll<PoolError> {
        let ended = Pin::new(&mut self.connection).poll(cx);
        ended.map(|ended| ended.map_or_else(|error| broken(&error), |()| PoolError::Closed))
    }

    /// The service has said its settings.
    pub(super) fn begin(&mut self, config: &PoolConfig) {
        self.clock.settings = None;
        let now = self.clock.host.now();
        self.clock.look = Some(now + config.idle_timeout / IDLE_LOOKS);
        if !config.keepalive_interval.is_zero() {
            self.pings = self.connection.ping_pong();
            self.clock.ping = Some(now + config.keepalive_interval);
        }
    }

    pub(super) fn poll_clock(&mut self, cx: &mut Context<'_>, config: &PoolConfig) -> Poll<Time> {
        if self.clock.pong.is_some()
            && let Some(pings) = &mut self.pings
            && pings.poll_pong(cx).is_ready()
        {
            self.clock.pong = None;
            self.clock.ping = Some(self.clock.host.now() + config.keepalive_interval);
        }
        loop {
            if self.clock.poll(cx).is_pending() {
                return Poll::Pending;
            }
            let now = self.clock.host.now();
            let due = |at: Option<Instant>| at.is_some_and(|at| at <= now);
            if due(self.clock.settings) {
                return Poll::Ready(Time::Settings);
            }
            if due(self.clock.pong) {
                return Poll::Ready(Time::Unanswered);
            }
            if due(self.clock.ping) {
                self.clock.ping = Some(now + config.keepalive_interval);
                // A connection without RPCs is left in peace: servers take pings there for abuse.
                if self.link.active.load(Ordering::Relaxed) > 0
                    && let Some(pings) = &mut self.pings
                    && pings.send_ping(Ping::opaque()).is_ok()
                {
                    self.clock.ping = None;
                    self.clock.pong = Some(now + config.keepalive_timeout);
                    let _ = pings.poll_pong(cx);
                    if self.poll_connection(cx).is_ready() {
                        return Poll::Ready(Time::Unanswered);
                    }
                }
            }
            if due(self.clock.look) {
                self.clock.look = Some(now + config.idle_timeout / IDLE_LOOKS);
                if self.clock.is_unused(&self.link) {
                    return Poll::Ready(Time::Unused);
                }
            }
        }
    }
}

/// The times that a connection waits for, on one timer.
pub(super) struct Clock {
    host: Host,
    timer: Timer,
    set: Instant,
    settings: Option<Instant>,
    ping: Option<Instant>,
    pong: Option<Instant>,
    look: Option<Instant>,
    /// Streams that ever were, at the last look, and looks since that changed.
    seen: (u64, u32),
}

impl Clock {
    pub(super) fn new(_: &PoolConfig, host: Host, settings: Instant) -> Self {
        Self {
            host,
            timer: host.timer(settings),
            set: settings,
            settings: Some(settings),
            ping: None,
            pong: None,
            look: None,
            seen: (0, 0),
        }
    }

    fn poll(&mut self, cx: &mut Context<'_>) -> Poll<()> {
        let times = [self.settings, self.ping, self.pong, self.look];
        let Some(next) = times.into_iter().flatten().min() else { return Poll::Pending };
        if next != self.set {
            self.timer.reset(next);
            self.set = next;
        }
        self.timer.poll_fired(cx)
    }

    fn is_unused(&mut self, link: &Link) -> bool {
        let used = link.used.load(Ordering::Relaxed);
        let looks = if used == self.seen.0 && link.active.load(Ordering::Relaxed) == 0 {
            self.seen.1 + 1
        } else {
            0
        };
        self.seen = (used, looks);
        looks >= IDLE_LOOKS
    }
}

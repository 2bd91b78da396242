//! Deadlines of a connection: the configured ones, a drain's, the end of a closing handshake.

use std::task::{Context, Poll, ready};

use sidelane_plugin::{Instant, Timer, failure};

use super::{Carrier, Ending, code};
use crate::WebSocket;
use crate::frame::opcode;

/// Deadlines, and a timer for the earliest.
pub(super) struct Clock {
    timer: Timer,
    /// What the timer is set to.
    set: Instant,
    /// When the last frame passed; `None`: nobody asks.
    idle_since: Option<Instant>,
    /// When the next ping of ours is due.
    ping: Option<Instant>,
    /// A ping of ours has not been answered.
    pub(super) pinged: bool,
    /// Something came from the stream since then.
    pub(super) heard: bool,
    /// When a drain has us say goodbye.
    pub(super) goodbye: Option<Instant>,
    /// When we hang up after all was said.
    pub(super) hang_up: Option<Instant>,
}

impl Clock {
    pub(super) fn new(plugin: &WebSocket, idle: Option<Instant>, ping: Option<Instant>) -> Self {
        let now = plugin.host.now();
        let mut clock = Self {
            timer: plugin.host.timer(now),
            set: now,
            idle_since: idle,
            ping,
            pinged: false,
            heard: false,
            goodbye: None,
            hang_up: None,
        };
        clock.set(plugin);
        clock
    }

    fn earliest(&self, plugin: &WebSocket) -> Option<Instant> {
        let idle = self.idle_since.map(|since| since + plugin.config.idle_timeout);
        [idle, self.ping, self.goodbye, self.hang_up].into_iter().flatten().min()
    }

    /// Sets the timer where the earliest deadline comes before what it is set to, or that has passed.
    pub(super) fn set(&mut self, plugin: &WebSocket) {
        if let Some(earliest) = self.earliest(plugin)
            && earliest != self.set
        {
            self.set = earliest;
            self.timer.reset(earliest);
        }
    }

    /// Notes that a frame passed. The timer stays as it is: it is set again when it fires.
    pub(super) fn passed(&mut self, plugin: &WebSocket) {
        if self.idle_since.is_some() {
            self.idle_since = Some(plugin.host.now());
        }
    }
}

impl Carrier<'_> {
    pub(super) fn poll_clock(&mut self, cx: &mut Context<'_>) -> Poll<Ending> {
        loop {
            let plugin = self.plugin;
            let Some(clock) = &mut self.clock else { return Poll::Pending };
            ready!(clock.timer.poll_fired(cx));
            if clock.earliest(plugin).is_none() {
                return Poll::Pending;
            }
            let now = plugin.host.now();
            let due = |at: Option<Instant>| at.is_some_and(|at| at <= now);
            if due(clock.goodbye) {
                let (close, reset) = (plugin.config.drain_code, failure::DRAINING);
                return Poll::Ready(Ending::Leave { close, reset, readable: true });
            }
            if due(clock.hang_up) {
                return Poll::Ready(Ending::Complete);
            }
            if due(clock.idle_since.map(|since| since + plugin.config.idle_timeout)) {
                let (close, reset) = (code::GOING_AWAY, failure::CLIENT_TIMEOUT);
                return Poll::Ready(Ending::Leave { close, reset, readable: true });
            }
            let mut ping = false;
            if due(clock.ping) {
                if clock.pinged && !clock.heard {
                    return Poll::Ready(Ending::Gone);
                }
                clock.ping = Some(now + plugin.config.ping_interval);
                // Inside a frame there is no place for one, and no need.
                let may = !self.down.is_inside_frame() && !self.down.closed;
                // Behind what the client does not take they would pile up.
                ping = may && !self.down.is_blocked();
                clock.pinged |= ping;
                clock.heard = false;
            }
            clock.set = now;
            clock.set(plugin);
            if ping {
                self.put_frame(opcode::PING, plugin.cookie);
                if let Poll::Ready(Err(ending)) = self.poll_down(cx) {
                    return Poll::Ready(ending);
                }
            }
        }
    }
}

//! The loss of a carrier, and the lane's return on another one.

use std::time::{Duration, Instant};

use super::{Event, Lane, LaneError};
use crate::control::Control;

/// Silence for so long, with something unacknowledged, is suspect whatever the round trip.
const SUSPECT_MIN: Duration = Duration::from_secs(1);

/// So many round trips of silence are suspect.
const SUSPECT_RTTS: u32 = 4;

impl Lane {
    /// The carrier is lost. The caller throws away what it had read and not given to
    /// [`Lane::handle_input`], and what it had taken from [`Lane::poll_transmit`]. Exchanges go on
    /// waiting; nothing is transmitted and no time passes until [`Lane::resume`] or [`Lane::close`].
    pub fn detach(&mut self) {
        if self.closed.is_some() || !self.attached {
            return;
        }
        self.attached = false;
        self.is_suspect = false;
        self.suspect_at = None;
        self.control.clear_urgent();
        self.acknowledge.said();
        for index in self.exchanges.indices() {
            self.exchanges.at(index).recv.window_queued = false;
        }
    }

    /// Returns whether there is a carrier.
    #[must_use]
    pub const fn is_attached(&self) -> bool {
        self.attached
    }

    /// Returns whether the lane may come back after the loss of its carrier: both ends keep what they
    /// send.
    #[must_use]
    pub const fn may_resume(&self) -> bool {
        self.closed.is_none() && self.replay.is_on()
    }

    /// Returns how many counted messages have come: what the peer is told when the lane comes back. It
    /// stays until then where the lane is detached.
    #[must_use]
    pub const fn received(&self) -> u64 {
        self.received
    }

    /// There is another carrier, and the peer has received so many counted messages. What it lacks is
    /// sent first, then the limits of all windows, then what is new.
    ///
    /// # Errors
    ///
    /// [`LaneError::Gap`]: the peer lacks what is not kept, or has what was not sent. The lane stays
    /// detached; the caller closes it.
    pub fn resume(&mut self, now: Instant, received: u64) -> Result<(), LaneError> {
        self.now = self.now.max(now);
        if received > self.sent || received < self.acknowledged || !self.replay.is_on() {
            let (sent, acknowledged) = (self.sent, self.acknowledged);
            return Err(LaneError::Gap { received, sent, acknowledged });
        }
        self.forget_acknowledged(received);
        self.replay.rewind();
        self.attached = true;
        self.resumes += 1;
        self.liveness.restart(self.now);
        self.watch_outstanding();
        self.repeat_windows();
        self.wake_driver();
        self.check_control()
    }

    /// What the last carrier took of limits may be lost; they are absolute, so saying them again is
    /// harmless.
    fn repeat_windows(&mut self) {
        for index in self.exchanges.indices() {
            let exchange = self.exchanges.at(index);
            let counts = exchange.closed.is_none() && !exchange.recv.ended && exchange.recv.taken;
            if !counts || std::mem::replace(&mut exchange.recv.window_queued, true) {
                continue;
            }
            if let Some(key) = self.exchanges.key(index) {
                self.push_control(Control::Window(key));
            }
        }
    }

    /// The peer has so many counted messages: what is kept of them is not needed any more.
    pub(super) fn forget_acknowledged(&mut self, received: u64) {
        self.replay.forget(received - self.acknowledged);
        self.acknowledged = received;
        if self.replay.is_empty() {
            self.suspect_at = None;
        }
    }

    /// Something is unacknowledged: it is looked at later whether the peer still lives.
    pub(super) fn watch_outstanding(&mut self) {
        if self.suspect_at.is_none() && !self.is_suspect && !self.replay.is_empty() {
            self.suspect_at = Some(self.now + self.suspect_after());
        }
    }

    fn suspect_after(&self) -> Duration {
        self.liveness.rtt().map_or(SUSPECT_MIN, |rtt| (rtt * SUSPECT_RTTS).max(SUSPECT_MIN))
    }

    /// Looks whether the silence is longer than the round trip explains.
    pub(super) fn check_suspicion(&mut self) -> Result<(), LaneError> {
        let Some(at) = self.suspect_at else { return Ok(()) };
        if at > self.now {
            return Ok(());
        }
        let due = self.liveness.last_input() + self.suspect_after();
        if due > self.now {
            self.suspect_at = Some(due);
            return Ok(());
        }
        self.suspect_at = None;
        self.is_suspect = true;
        self.push_event(Event::Suspect(true))
    }
}

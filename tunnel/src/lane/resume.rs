//! The loss of a carrier, and the lane's return on another one.

use std::time::Instant;

use super::suspicion::Suspicion;
use super::{Lane, LaneError};
use crate::control::Control;

impl Lane {
    /// The carrier is lost. The caller throws away what it had read and not given to
    /// [`Lane::handle_input`], and what it had taken from [`Lane::poll_transmit`]. Exchanges go on
    /// waiting; nothing is transmitted, nothing is taken in and no time passes until [`Lane::resume`] or
    /// [`Lane::close`]. Detached or closed already, nothing changes.
    pub fn detach(&mut self) {
        if self.closed.is_some() || !self.attached {
            return;
        }
        self.attached = false;
        self.suspicion = Suspicion::default();
        self.control.clear_urgent();
        // The peer is told by the resume.
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

    /// There is another carrier, and the peer has received so many counted messages. The limits of all
    /// windows are said again first, then what the peer lacks, then what is new.
    ///
    /// # Errors
    ///
    /// [`LaneError::Gap`]: the peer lacks what is not kept, or has what was not sent. The lane stays
    /// detached; the caller closes it. [`LaneError::Closed`] and [`LaneError::Attached`]: nothing has
    /// changed.
    pub fn resume(&mut self, now: Instant, received: u64) -> Result<(), LaneError> {
        if self.closed.is_some() {
            return Err(LaneError::Closed);
        }
        if self.attached {
            return Err(LaneError::Attached);
        }
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
        self.suspicion = Suspicion::default();
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
        self.watch_outstanding();
    }

    /// Notes whether something is unacknowledged, or a ping unanswered, for the suspicion of a silent peer.
    pub(super) fn watch_outstanding(&mut self) {
        let is_any = !self.replay.is_empty() || (self.replay.is_on() && self.liveness.is_asking());
        self.suspicion.outstanding(self.now, self.liveness.rtt(), is_any);
    }

    /// Returns the bytes of memory that the ring holds beside shared buffers.
    #[cfg(test)]
    pub(crate) fn replay_room(&self) -> usize {
        self.replay.room()
    }
}

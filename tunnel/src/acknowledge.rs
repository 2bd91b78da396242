//! When the peer is to be told how much has come.

use std::time::{Duration, Instant};

/// Bytes of counted messages after which the peer is told, each with 64 beside its own.
pub const ACK_BYTES: u64 = 64 * 1024;

/// How long after a counted message the peer is told at the latest.
pub const ACK_DELAY: Duration = Duration::from_millis(20);

/// What has come and the peer was not told yet.
#[derive(Debug)]
pub(crate) struct Acknowledge {
    is_on: bool,
    bytes: u64,
    /// Set while something is to be told.
    due_at: Option<Instant>,
    /// When it is looked at whether something is due. It stays where it is when the peer is told before:
    /// to move a timer for each 64 KiB costs more than to find nothing due now and then.
    look_at: Option<Instant>,
    /// An `Ack` waits in the control queue.
    is_queued: bool,
}

impl Acknowledge {
    pub(crate) const fn new(is_on: bool) -> Self {
        Self { is_on, bytes: 0, due_at: None, look_at: None, is_queued: false }
    }

    /// Takes a counted message of such a cost; true: the peer is to be told now.
    pub(crate) fn received(&mut self, now: Instant, cost: u64) -> bool {
        if !self.is_on || self.is_queued {
            return false;
        }
        self.bytes += cost;
        if self.bytes >= ACK_BYTES {
            self.is_queued = true;
            self.due_at = None;
            return true;
        }
        if self.due_at.is_none() {
            self.due_at = Some(now + ACK_DELAY);
            self.look_at = self.look_at.or(self.due_at);
        }
        false
    }

    pub(crate) const fn poll_timeout(&self) -> Option<Instant> {
        self.look_at
    }

    /// True: the peer is to be told now.
    pub(crate) fn handle_timeout(&mut self, now: Instant) -> bool {
        if self.look_at.is_none_or(|at| at > now) {
            return false;
        }
        self.look_at = self.due_at.filter(|&at| at > now);
        let is_due = self.due_at.is_some() && self.look_at.is_none();
        if is_due {
            self.is_queued = true;
            self.due_at = None;
        }
        is_due
    }

    /// The peer knows all that has come.
    pub(crate) const fn said(&mut self) {
        self.bytes = 0;
        self.due_at = None;
        self.is_queued = false;
    }
}

//! When the peer is to be told how much has come.

use std::time::{Duration, Instant};

/// Bytes of counted messages after which the peer is told.
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
    /// An `Ack` waits in the control queue.
    is_queued: bool,
}

impl Acknowledge {
    pub(crate) const fn new(is_on: bool) -> Self {
        Self { is_on, bytes: 0, due_at: None, is_queued: false }
    }

    /// Takes a counted message of so many bytes; true: the peer is to be told now.
    pub(crate) fn received(&mut self, now: Instant, bytes: u64) -> bool {
        if !self.is_on || self.is_queued {
            return false;
        }
        self.bytes += bytes;
        if self.bytes >= ACK_BYTES {
            self.is_queued = true;
            self.due_at = None;
            return true;
        }
        self.due_at.get_or_insert(now + ACK_DELAY);
        false
    }

    pub(crate) const fn poll_timeout(&self) -> Option<Instant> {
        self.due_at
    }

    /// True: the peer is to be told now.
    pub(crate) fn handle_timeout(&mut self, now: Instant) -> bool {
        let is_due = self.due_at.is_some_and(|at| at <= now);
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

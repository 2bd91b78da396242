//! When connections are to take their leave.

use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Mutex, PoisonError};
use std::time::Duration;

use sidelane_plugin::Instant;

/// Whether this generation drains, and when it says goodbye.
#[derive(Debug, Default)]
pub(crate) struct Drain {
    /// Looked at in every poll, so without a lock.
    begun: AtomicBool,
    goodbye: Mutex<Option<Instant>>,
}

impl Drain {
    /// What runs at `deadline` is cut: the goodbye comes before by what the closing handshake may
    /// take, but leaves at least half of the time to the connections.
    pub(crate) fn begin(&self, now: Instant, deadline: Instant, close_timeout: Duration) {
        let left = deadline - now;
        let goodbye = now + (left - close_timeout.min(left / 2));
        let mut earliest = self.goodbye.lock().unwrap_or_else(PoisonError::into_inner);
        *earliest = Some(earliest.map_or(goodbye, |other| other.min(goodbye)));
        self.begun.store(true, Ordering::Release);
    }

    pub(crate) fn goodbye(&self) -> Option<Instant> {
        if !self.begun.load(Ordering::Acquire) {
            return None;
        }
        *self.goodbye.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

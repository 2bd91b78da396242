//! When to dial again: full jitter, the first retry delayed too, and the count forgotten after a
//! session that lived.

use std::time::Duration;

/// Upper bound of the first delay.
const BASE: Duration = Duration::from_millis(200);

/// Upper bound of every delay.
const CAP: Duration = Duration::from_secs(20);

/// Those that were told the same time come back within this, the window in which relays count handshakes.
const TOLD_SPREAD: Duration = Duration::from_secs(1);

/// A session that lived as long as this begins the schedule anew.
pub const SETTLED: Duration = Duration::from_secs(10);

/// The schedule of one peer.
#[derive(Debug, Default)]
pub struct Backoff {
    failures: u32,
}

impl Backoff {
    /// Returns the time to wait before the next dial; `random` is uniform over all of `u64`. Grows
    /// from at most 200 ms to at most 20 s.
    pub fn next(&mut self, random: u64) -> Duration {
        let bound = BASE.saturating_mul(1 << self.failures.min(16)).min(CAP);
        self.failures = self.failures.saturating_add(1);
        jitter(bound, random)
    }

    /// Returns the same where the relay has told how long to stay away: it knows its load, and so no guess
    /// is made that grows. Spread over a second more, since many may have been told the same.
    pub fn next_after(&mut self, asked: Duration, random: u64) -> Duration {
        if asked.is_zero() { self.next(random) } else { told(asked, random) }
    }

    /// Begins anew.
    pub fn reset(&mut self) {
        self.failures = 0;
    }
}

/// Upper bound of the first delay of a lane's return.
const RETURN_BASE: Duration = Duration::from_millis(50);

/// Upper bound of every such delay: a lane has only so much time.
const RETURN_CAP: Duration = Duration::from_secs(1);

/// The schedule by which a lane that has lost its connection is dialled.
#[derive(Debug, Default)]
pub struct ReturnBackoff {
    failures: u32,
}

impl ReturnBackoff {
    /// Returns the time to wait before the next dial. Grows from at most 50 ms to at most 1 s.
    pub fn next(&mut self, random: u64) -> Duration {
        let bound = RETURN_BASE.saturating_mul(1 << self.failures.min(16)).min(RETURN_CAP);
        self.failures = self.failures.saturating_add(1);
        jitter(bound, random)
    }

    /// Returns the same where the relay has told how long to stay away.
    pub fn next_after(&mut self, asked: Duration, random: u64) -> Duration {
        if asked.is_zero() { self.next(random) } else { told(asked, random) }
    }

    /// Begins anew: the last connection has brought the lane further.
    pub fn reset(&mut self) {
        self.failures = 0;
    }
}

fn told(asked: Duration, random: u64) -> Duration {
    asked.max(BASE) + jitter(TOLD_SPREAD, random)
}

/// Returns a duration of at most `bound`, uniform where `random` is.
#[must_use]
pub fn jitter(bound: Duration, random: u64) -> Duration {
    #[expect(clippy::cast_precision_loss, reason = "a jitter needs no more than 53 bits")]
    let share = (random >> 11) as f64 / (1u64 << 53) as f64;
    bound.mul_f64(share)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn bounds_double_up_to_the_cap() {
        let mut backoff = Backoff::default();
        let bounds: Vec<u128> = (0..10).map(|_| backoff.next(u64::MAX).as_millis()).collect();
        assert_eq!(bounds, [200, 400, 800, 1600, 3200, 6400, 12_800, 20_000, 20_000, 20_000]);
    }

    #[test]
    fn the_first_retry_is_delayed_too() {
        assert_eq!(Backoff::default().next(u64::MAX / 2).as_millis(), 100);
    }

    #[test]
    fn a_time_that_the_relay_tells_is_kept_and_spread() {
        let mut backoff = Backoff::default();
        let asked = Duration::from_secs(3);
        assert_eq!(backoff.next_after(asked, 0), asked);
        assert_eq!(backoff.next_after(asked, u64::MAX / 2).as_millis(), 3500);
        // It is no way to have a relay dialled again and again.
        assert_eq!(backoff.next_after(Duration::from_millis(1), 0), BASE);
        // Nor does it count as a failure of which nothing is known.
        assert_eq!(backoff.next_after(Duration::ZERO, u64::MAX), BASE);
    }

    #[test]
    fn reset_begins_anew() {
        let mut backoff = Backoff::default();
        backoff.next(0);
        backoff.next(0);
        backoff.reset();
        assert!(backoff.next(u64::MAX) <= BASE);
    }

    #[test]
    fn a_lane_is_dialled_soon_and_often() {
        let mut backoff = ReturnBackoff::default();
        let bounds: Vec<u128> = (0..7).map(|_| backoff.next(u64::MAX).as_millis()).collect();
        assert_eq!(bounds, [50, 100, 200, 400, 800, 1000, 1000]);
        backoff.reset();
        assert!(backoff.next(u64::MAX) <= RETURN_BASE);
    }

    #[test]
    fn jitter_covers_the_whole_range() {
        assert_eq!(jitter(CAP, 0), Duration::ZERO);
        assert!(jitter(CAP, u64::MAX) <= CAP);
    }
}

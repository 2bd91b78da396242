//! When a certificate is ordered: pure rules over times.

use std::collections::VecDeque;
use std::time::{Duration, SystemTime};

use tokio::time::Instant;

use crate::tunnel::backoff::jitter;

/// First delay after a failure, at most.
const BACKOFF_FIRST: Duration = Duration::from_secs(60);

/// Longest delay after a failure: a certificate has weeks left when the first order fails.
const BACKOFF_MAX: Duration = Duration::from_secs(12 * 3600);

/// The longest that an authority's `Retry-After` is heeded: by then its operators, or ours, have been
/// there.
const RETRY_AFTER_MAX: Duration = Duration::from_secs(24 * 3600);

/// Returns when a certificate is renewed: when between a third and a quarter of its life is left.
/// `random` is uniform over all of `u64`.
pub(super) fn renew_at(not_before: SystemTime, not_after: SystemTime, random: u64) -> SystemTime {
    let life = not_after.duration_since(not_before).unwrap_or_default();
    not_after - life / 3 + jitter(life / 12, random)
}

/// Returns how long to wait after so many failures in a row: between half and all of a bound that
/// doubles; longer where the authority asks for it.
pub(super) fn backoff(failures: u32, random: u64, retry_after: Option<Duration>) -> Duration {
    let doubled = BACKOFF_FIRST.saturating_mul(1 << failures.saturating_sub(1).min(16));
    let bound = doubled.min(BACKOFF_MAX);
    let delay = bound / 2 + jitter(bound / 2, random);
    delay.max(retry_after.unwrap_or_default().min(RETRY_AFTER_MAX))
}

/// Bounds how often something happens in an hour.
#[derive(Debug, Default)]
pub(super) struct Budget {
    /// When it happened, within the last hour.
    times: VecDeque<Instant>,
}

impl Budget {
    const HOUR: Duration = Duration::from_secs(3600);

    /// Returns when it may happen again; not after `now`: at once.
    pub(super) fn free_at(&mut self, now: Instant, max: usize) -> Instant {
        while self.times.front().is_some_and(|time| *time + Self::HOUR <= now) {
            self.times.pop_front();
        }
        if self.times.len() < max { now } else { self.times[0] + Self::HOUR }
    }

    /// It happens.
    pub(super) fn take(&mut self, now: Instant) {
        self.times.push_back(now);
    }
}

#[cfg(test)]
mod tests {
    use std::time::UNIX_EPOCH;

    use super::*;

    const DAY: Duration = Duration::from_secs(24 * 3600);

    #[test]
    fn a_certificate_is_renewed_with_a_third_to_a_quarter_of_its_life_left() {
        let (begin, end) = (UNIX_EPOCH, UNIX_EPOCH + 90 * DAY);
        assert_eq!(renew_at(begin, end, 0), UNIX_EPOCH + 60 * DAY);
        let latest = renew_at(begin, end, u64::MAX);
        assert!(latest > UNIX_EPOCH + 67 * DAY && latest <= UNIX_EPOCH + 90 * DAY * 3 / 4);
        // One that ends before it begins is renewed at its end, which has passed.
        assert_eq!(renew_at(end, begin, u64::MAX), begin);
    }

    #[test]
    fn the_delay_doubles_from_a_minute_to_twelve_hours() {
        let doubled = [60, 120, 240, 480, 960, 1920, 3840, 7680, 15_360, 30_720, 43_200, 43_200];
        for (failures, bound) in (1..).zip(doubled) {
            let (least, most) = (backoff(failures, 0, None), backoff(failures, u64::MAX, None));
            let bound = Duration::from_secs(bound);
            assert!(least == bound / 2 && most <= bound, "{failures}: {least:?} to {most:?}");
            assert!(most > bound.mul_f64(0.999), "{failures}: {most:?}");
        }
        assert_eq!(backoff(1, 0, None).as_secs(), 30);
        assert_eq!(backoff(u32::MAX, 0, None), BACKOFF_MAX / 2);
    }

    #[test]
    fn the_authority_may_ask_for_longer_up_to_a_day() {
        assert_eq!(backoff(1, 0, Some(3600 * Duration::from_secs(1))).as_secs(), 3600);
        assert_eq!(backoff(1, 0, Some(Duration::from_secs(1))).as_secs(), 30);
        assert_eq!(backoff(1, 0, Some(30 * DAY)), DAY);
    }

    #[test]
    fn a_budget_frees_a_place_an_hour_after_it_was_taken() {
        let begin = Instant::now();
        let at = |seconds| begin + Duration::from_secs(seconds);
        let mut budget = Budget::default();
        for taken in [0, 10] {
            assert_eq!(budget.free_at(at(taken), 2), at(taken));
            budget.take(at(taken));
        }
        assert_eq!(budget.free_at(at(20), 2), at(3600));
        assert_eq!(budget.free_at(at(3600), 2), at(3600));
        budget.take(at(3600));
        assert_eq!(budget.free_at(at(3601), 2), at(3610));
    }
}

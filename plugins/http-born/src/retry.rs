//! The wait before an exchange is sent to a service once more. Whether it may be is the host's to say
//! (`Service::retry`), and what was sent of it the plugin's to know.

use std::hash::{BuildHasher as _, Hasher as _, RandomState};
use std::time::Duration;

/// Bound of the first wait: a service that restarts its listener is often back by then, and a client
/// does not notice.
const FIRST: Duration = Duration::from_millis(25);

/// Bound of the longest wait.
const LONGEST: Duration = Duration::from_millis(250);

/// Waits that double up to a bound, each anything from half of its bound to all of it, so that what
/// failed at once does not come back at once.
#[derive(Clone, Copy, Debug, Default)]
pub struct Backoff {
    waits: u32,
}

impl Backoff {
    /// Returns the next wait; `random` is any number.
    #[must_use]
    pub fn next(&mut self, random: u64) -> Duration {
        let bound = FIRST.saturating_mul(1 << self.waits.min(8)).min(LONGEST);
        self.waits = self.waits.saturating_add(1);
        let half = u64::try_from(bound.as_micros() / 2).unwrap_or(u64::MAX);
        Duration::from_micros(half + random % (half + 1))
    }
}

/// Returns a number that others do not get at the same time. Not for secrets.
#[must_use]
pub fn random() -> u64 {
    RandomState::new().build_hasher().finish()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn waits_double_up_to_the_longest_and_are_spread_over_their_upper_half() {
        let (mut least, mut most) = (Backoff::default(), Backoff::default());
        for bound in [25_000, 50_000, 100_000, 200_000, 250_000, 250_000] {
            assert_eq!(least.next(0).as_micros(), bound / 2);
            assert_eq!(most.next(u64::try_from(bound / 2).unwrap()).as_micros(), bound);
        }
        let mut long = Backoff { waits: u32::MAX };
        assert!(long.next(u64::MAX) <= LONGEST);
    }

    #[test]
    fn random_numbers_differ() {
        assert_ne!((random(), random()), (random(), random()));
    }
}

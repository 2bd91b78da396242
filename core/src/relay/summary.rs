//! Refusals that may come in floods, told as one line in a while.

use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

/// Between two summaries of one kind of refusal. Each refusal is a line at debug; at info a flood of
/// them is one line in this time.
const SUMMARY_EVERY: Duration = Duration::from_secs(10);

/// How many of one kind were refused since it was last told.
#[derive(Debug, Default)]
pub(super) struct Summary {
    /// When it was told, plus one; 0: never.
    told: AtomicU64,
    refused: AtomicU64,
}

impl Summary {
    /// Counts a refusal; returns how many there were where it is time to tell.
    pub(super) fn note(&self, now: u64) -> Option<u64> {
        self.refused.fetch_add(1, Ordering::Relaxed);
        let told = self.told.load(Ordering::Relaxed);
        let every = u64::try_from(SUMMARY_EVERY.as_nanos()).unwrap_or(u64::MAX);
        if told != 0 && now < told.saturating_add(every) {
            return None;
        }
        let swapped =
            self.told.compare_exchange(told, now + 1, Ordering::Relaxed, Ordering::Relaxed);
        swapped.is_ok().then(|| self.refused.swap(0, Ordering::Relaxed))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_flood_of_refusals_is_told_now_and_then() {
        let summary = Summary::default();
        let second = 1_000_000_000;
        assert_eq!(summary.note(0), Some(1));
        assert!((0..100).all(|_| summary.note(second).is_none()));
        assert_eq!(summary.note(11 * second), Some(101));
        assert_eq!(summary.note(12 * second), None);
    }
}

//! What all lanes of a process hold for replay together.

use std::sync::atomic::{AtomicU64, Ordering};

/// What is taken from a budget at once, so that no message pays for an atomic operation.
pub(crate) const GRANULE_BYTES: u64 = 64 * 1024;

/// A ring above its least size leaves so large a part of the budget, one by this, to those that are
/// below: a few fast lanes, or peers that acknowledge nothing, cannot slow down all others.
const RESERVED_SHARE: u64 = 4;

/// Bytes that the lanes of a process may hold for replay together.
///
/// A lane that holds nothing may always send one message, so that none starves: `used` exceeds `max` by
/// one message of each lane at most, rounded up to 64 KiB.
#[derive(Debug)]
pub struct Budget {
    used: AtomicU64,
    max: AtomicU64,
}

impl Budget {
    /// Returns a budget of `max` bytes.
    #[must_use]
    pub const fn new(max: u64) -> Self {
        Self { used: AtomicU64::new(0), max: AtomicU64::new(max) }
    }

    /// Returns what is taken.
    #[must_use]
    pub fn used(&self) -> u64 {
        self.used.load(Ordering::Relaxed)
    }

    /// Returns the bound.
    #[must_use]
    pub fn max(&self) -> u64 {
        self.max.load(Ordering::Relaxed)
    }

    /// Changes the bound: what is taken beyond it is given back as it is acknowledged.
    pub fn set_max(&self, max: u64) {
        self.max.store(max, Ordering::Relaxed);
    }

    /// Takes a granule where there is one. `is_least`: for a ring below its least size.
    pub(crate) fn try_take_granule(&self, is_least: bool) -> bool {
        let max = self.max();
        let max = if is_least { max } else { max - max / RESERVED_SHARE };
        let used = self.used.fetch_add(GRANULE_BYTES, Ordering::Relaxed);
        let fits = used.saturating_add(GRANULE_BYTES) <= max;
        if !fits {
            self.give(GRANULE_BYTES);
        }
        fits
    }

    pub(crate) fn take(&self, bytes: u64) {
        self.used.fetch_add(bytes, Ordering::Relaxed);
    }

    pub(crate) fn give(&self, bytes: u64) {
        self.used.fetch_sub(bytes, Ordering::Relaxed);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn large_rings_leave_a_quarter_to_small_ones() {
        let budget = Budget::new(8 * GRANULE_BYTES);
        let taken = (0..20).filter(|_| budget.try_take_granule(false)).count();
        assert_eq!(taken, 6);
        let taken = (0..20).filter(|_| budget.try_take_granule(true)).count();
        assert_eq!(taken, 2);
        assert_eq!(budget.used(), budget.max());
        budget.give(8 * GRANULE_BYTES);
        assert_eq!(budget.used(), 0);
    }

    #[test]
    fn a_lower_bound_lets_nothing_be_taken_until_enough_is_given_back() {
        let budget = Budget::new(4 * GRANULE_BYTES);
        assert!((0..4).all(|_| budget.try_take_granule(true)));
        budget.set_max(2 * GRANULE_BYTES);
        budget.give(2 * GRANULE_BYTES);
        assert!(!budget.try_take_granule(true));
        budget.give(GRANULE_BYTES);
        assert!(budget.try_take_granule(true));
    }
}

//! What all lanes of a process hold for replay together.

use std::sync::atomic::{AtomicU64, Ordering};

/// What is taken from a budget at once, so that no message pays for an atomic operation.
pub(crate) const GRANULE_BYTES: u64 = 64 * 1024;

/// A ring above its least size leaves so large a part of the budget, one by this, to those that are
/// below: a few fast lanes, or peers that acknowledge nothing, cannot slow down all others.
const RESERVED_SHARE: u64 = 4;

/// Bytes that the lanes of a process may hold for replay together.
///
/// A lane that holds nothing may always send one message, so that none starves. 64 KiB of each lane are set
/// aside for that, which holds all but the longest messages: what those have beyond is all by which `used`
/// exceeds `max`, unless there are more lanes than it has room for at all.
#[derive(Debug)]
pub struct Budget {
    used: AtomicU64,
    max: AtomicU64,
    lanes: AtomicU64,
}

impl Budget {
    /// Returns a budget of `max` bytes.
    #[must_use]
    pub const fn new(max: u64) -> Self {
        Self { used: AtomicU64::new(0), max: AtomicU64::new(max), lanes: AtomicU64::new(0) }
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

    /// A lane comes, which may always have one message.
    pub(crate) fn enter(&self) {
        self.lanes.fetch_add(1, Ordering::Relaxed);
    }

    /// A lane is gone.
    pub(crate) fn leave(&self) {
        self.lanes.fetch_sub(1, Ordering::Relaxed);
    }

    /// Returns what may be taken. `is_least`: for a ring below its least size.
    fn max_for(&self, is_least: bool) -> u64 {
        let set_aside = self.lanes.load(Ordering::Relaxed).saturating_mul(GRANULE_BYTES);
        let max = self.max().saturating_sub(set_aside);
        if is_least { max } else { max - max / RESERVED_SHARE }
    }

    /// Returns whether more is taken than may be.
    pub(crate) fn is_exceeded(&self, is_least: bool) -> bool {
        self.used() > self.max_for(is_least)
    }

    /// Takes a granule where there is one.
    pub(crate) fn try_take_granule(&self, is_least: bool) -> bool {
        let max = self.max_for(is_least);
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
    fn room_for_a_message_of_each_lane_is_set_aside() {
        let budget = Budget::new(4 * GRANULE_BYTES);
        (0..3).for_each(|_| budget.enter());
        assert!(budget.try_take_granule(true));
        assert!(!budget.try_take_granule(true));
        budget.leave();
        assert!(budget.try_take_granule(true));
        (0..100).for_each(|_| budget.enter());
        assert!(!budget.try_take_granule(true));
        assert!(budget.is_exceeded(true));
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

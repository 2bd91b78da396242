//! Wakers collected under a lane's lock, to be woken after it is released.

use std::task::Waker;

/// Wakers kept without an allocation: what one batch of a busy lane wakes, as a rule.
const INLINE: usize = 8;

/// Wakers to wake. Dropping it wakes nobody: tasks would sleep on.
#[derive(Debug, Default)]
#[must_use = "call `wake` after unlocking the lane"]
pub struct Wakes {
    inline: [Option<Waker>; INLINE],
    /// Invariant: the first `len` of `inline` are there.
    len: usize,
    more: Vec<Waker>,
}

impl Wakes {
    /// Wakes them all. Call it without the lane's lock: a waker may run anything.
    pub fn wake(mut self) {
        for waker in &mut self.inline[..self.len] {
            if let Some(waker) = waker.take() {
                waker.wake();
            }
        }
        for waker in self.more {
            waker.wake();
        }
    }

    /// Returns whether there is nobody to wake.
    #[must_use]
    pub const fn is_empty(&self) -> bool {
        self.len == 0
    }

    pub(crate) fn push(&mut self, waker: Waker) {
        if self.len < INLINE {
            self.inline[self.len] = Some(waker);
            self.len += 1;
        } else {
            self.more.push(waker);
        }
    }

    /// Adds whoever waits in `slot`.
    pub(crate) fn push_from(&mut self, slot: &mut Option<Waker>) {
        if let Some(waker) = slot.take() {
            self.push(waker);
        }
    }
}

/// Keeps the task's waker in `slot`, without a clone where it is there.
pub(crate) fn register(slot: &mut Option<Waker>, waker: &Waker) {
    match slot {
        Some(kept) if kept.will_wake(waker) => {}
        _ => *slot = Some(waker.clone()),
    }
}

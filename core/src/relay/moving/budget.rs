//! How many exchanges may be sent to another sidecar that might have reached a service already.
//!
//! A token bucket: each exchange pays in a share of a move, time the rest. What exchanges pay is a count,
//! looked at when a move is asked for, so that those that need none take no lock.

use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Mutex, PoisonError};

use crate::config::policy::Retries;

/// What counts where a route says nothing: as `retries` with its defaults.
const PERCENT: u32 = 20;
const PER_SECOND: u32 = 10;

/// Most moves that exchanges pay in ahead: what a busy sidecar may have in flight when it dies.
const SAVED_MOVES_MAX: u64 = 1_000;

/// Most seconds whose moves are saved up.
const SAVED_SECONDS_MAX: u64 = 10;

/// Tokens are counted in thousandths of a move, so that a percent of one is a whole number.
const MOVE: u64 = 1000;

/// Nanoseconds that pay a token at one move per second.
const NANOS_PER_TOKEN: u64 = 1_000_000;

/// The budget of a route, or of a tunnel.
pub(in crate::relay) struct Budget {
    percent: u64,
    per_second: u64,
    exchanges: AtomicU64,
    state: Mutex<State>,
}

struct State {
    /// Invariant: at most [`Budget::max`].
    tokens: u64,
    /// Exchanges that have paid.
    seen: u64,
    /// When time last paid, on the policies' clock; 0: never.
    paid: u64,
}

impl Default for Budget {
    fn default() -> Self {
        Self::new(PERCENT, PER_SECOND)
    }
}

impl Budget {
    /// Returns what a route's `retries` allow.
    pub(in crate::relay) fn of(retries: &Retries) -> Self {
        Self::new(retries.budget_percent, retries.budget_min)
    }

    fn new(percent: u32, per_second: u32) -> Self {
        let (percent, per_second) = (u64::from(percent.min(100)), u64::from(per_second));
        let state = State { tokens: per_second * MOVE, seen: 0, paid: 0 };
        Self { percent, per_second, exchanges: AtomicU64::new(0), state: Mutex::new(state) }
    }

    fn max(&self) -> u64 {
        (SAVED_MOVES_MAX + self.per_second * SAVED_SECONDS_MAX) * MOVE
    }

    /// An exchange begins.
    pub(super) fn deposit(&self) {
        self.exchanges.fetch_add(1, Ordering::Relaxed);
    }

    /// Takes a move; false: there is none.
    pub(super) fn take(&self, now: u64) -> bool {
        let mut state = self.state.lock().unwrap_or_else(PoisonError::into_inner);
        let exchanges = self.exchanges.load(Ordering::Relaxed);
        let new = exchanges.saturating_sub(state.seen).min(self.max());
        state.seen = exchanges;
        state.tokens += new * self.percent * MOVE / 100;
        if state.paid == 0 {
            state.paid = now;
        }
        let millis = now.saturating_sub(state.paid) / NANOS_PER_TOKEN;
        state.paid += millis * NANOS_PER_TOKEN;
        state.tokens += millis.min(SAVED_SECONDS_MAX * 1000) * self.per_second;
        state.tokens = state.tokens.min(self.max());
        match state.tokens.checked_sub(MOVE) {
            Some(left) => {
                state.tokens = left;
                true
            }
            None => false,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const SECOND: u64 = 1_000_000_000;

    #[test]
    fn a_budget_grows_with_exchanges_and_with_time_up_to_a_bound() {
        for (percent, per_second, exchanges, seconds, expected) in [
            (20, 0, 4, 0, 0),
            (20, 0, 5, 0, 1),
            (20, 0, 100, 0, 20),
            (100, 0, 5_000, 0, 1_000),
            // The first second's are there at once.
            (1, 10, 1, 0, 10),
            (1, 10, 1, 2, 30),
            (1, 10, 1, 3_600, 110),
            (20, 10, 50_000, 3_600, 1_100),
        ] {
            let budget = Budget::new(percent, per_second);
            let mut moves = 0;
            if per_second > 0 {
                // Time counts from the first question on.
                moves += usize::from(budget.take(SECOND));
            }
            (0..exchanges).for_each(|_| budget.deposit());
            let now = SECOND + seconds * SECOND;
            moves += (0..10_000).take_while(|_| budget.take(now)).count();
            let within = moves == expected || moves == expected + 1;
            assert!(within, "{percent} % {per_second}/s {exchanges} {seconds} s: {moves}");
        }
    }
}

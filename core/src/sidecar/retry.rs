//! Budgets of retries: how often exchanges of a route may be sent to a service once more.
//!
//! A token bucket per route. Each exchange pays in a share of a retry, time pays in the rest; each
//! retry takes one. Pure but for its locks: time is an argument. Knows no exchange and no plugin.

use std::collections::HashMap;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Instant;

/// Most routes that have a budget at once. Relays name the routes; a relay has fewer with retries, and
/// one past the bound has none.
const ROUTES_MAX: usize = 4096;

/// Most retries that exchanges pay in ahead: what was saved in good times is sent at once when a
/// service breaks, and is to be little beside what it is able to take.
const SAVED_RETRIES_MAX: u64 = 100;

/// Most seconds whose retries are saved up.
const SAVED_SECONDS_MAX: u64 = 10;

/// Tokens are counted in thousandths of a retry, so that a percent of one is a whole number.
const RETRY: u64 = 1000;

/// What a route allows.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Allowance {
    /// Retries in percent of exchanges.
    pub percent: u32,
    /// Retries per second in any case.
    pub per_second: u32,
}

/// The budget of one route.
#[derive(Debug)]
pub struct Budget {
    state: Mutex<State>,
}

#[derive(Debug)]
struct State {
    allowance: Allowance,
    /// Thousandths of a retry. Invariant: at most [`State::max`].
    tokens: u64,
    /// When time last paid in.
    paid: Instant,
}

impl State {
    fn max(&self) -> u64 {
        (SAVED_RETRIES_MAX + u64::from(self.allowance.per_second) * SAVED_SECONDS_MAX) * RETRY
    }

    fn pay(&mut self, now: Instant) {
        let millis = now.saturating_duration_since(self.paid).as_millis();
        let millis = u64::try_from(millis).unwrap_or(u64::MAX).min(SAVED_SECONDS_MAX * 1000);
        if millis > 0 {
            // A retry per second is a thousandth of one per millisecond.
            self.tokens += millis * u64::from(self.allowance.per_second);
            self.paid = now;
        }
        self.tokens = self.tokens.min(self.max());
    }
}

impl Budget {
    fn new(allowance: Allowance, now: Instant) -> Self {
        let tokens = u64::from(allowance.per_second) * RETRY;
        Self { state: Mutex::new(State { allowance, tokens, paid: now }) }
    }

    fn with<T>(&self, change: impl FnOnce(&mut State) -> T) -> T {
        change(&mut self.state.lock().unwrap_or_else(PoisonError::into_inner))
    }

    /// An exchange begins, under what its route allows now.
    fn deposit(&self, allowance: Allowance, now: Instant) {
        self.with(|state| {
            state.allowance = allowance;
            state.tokens += u64::from(allowance.percent.min(100)) * RETRY / 100;
            state.pay(now);
        });
    }

    /// Takes a retry; false: there is none.
    #[must_use]
    pub fn take(&self, now: Instant) -> bool {
        self.with(|state| {
            state.pay(now);
            match state.tokens.checked_sub(RETRY) {
                Some(left) => {
                    state.tokens = left;
                    true
                }
                None => false,
            }
        })
    }
}

/// The budgets of a sidecar, by route.
#[derive(Debug, Default)]
pub struct Budgets {
    by_route: Mutex<HashMap<Arc<str>, Arc<Budget>>>,
}

impl Budgets {
    /// Returns the route's budget, into which this exchange has paid; `None`: too many routes have one.
    #[must_use]
    pub fn deposit(
        &self,
        route: &Arc<str>,
        allowance: Allowance,
        now: Instant,
    ) -> Option<Arc<Budget>> {
        let budget = {
            let mut by_route = self.by_route.lock().unwrap_or_else(PoisonError::into_inner);
            match by_route.get(route) {
                Some(budget) => Arc::clone(budget),
                None => {
                    if by_route.len() >= ROUTES_MAX {
                        // Those of routes that no exchange runs of; most are of routes long gone.
                        by_route.retain(|_, budget| Arc::strong_count(budget) > 1);
                    }
                    if by_route.len() >= ROUTES_MAX {
                        return None;
                    }
                    let budget = Arc::new(Budget::new(allowance, now));
                    by_route.insert(Arc::clone(route), Arc::clone(&budget));
                    budget
                }
            }
        };
        budget.deposit(allowance, now);
        Some(budget)
    }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::*;

    fn taken(budget: &Budget, now: Instant) -> usize {
        (0..10_000).take_while(|_| budget.take(now)).count()
    }

    #[test]
    fn a_budget_grows_with_exchanges_and_with_time_up_to_a_bound() {
        let start = Instant::now();
        for (percent, per_second, exchanges, seconds, expected) in [
            (20, 0, 0, 0, 0),
            (20, 0, 4, 0, 0),
            (20, 0, 5, 0, 1),
            (20, 0, 100, 0, 20),
            (100, 0, 3, 0, 3),
            // No more than is saved up.
            (100, 0, 5_000, 0, 100),
            // The first second's are there at once.
            (1, 10, 1, 0, 10),
            (1, 10, 1, 2, 30),
            (1, 10, 1, 3_600, 110),
            (20, 10, 5_000, 3_600, 200),
        ] {
            let budgets = Budgets::default();
            let allowance = Allowance { percent, per_second };
            let mut budget = Arc::new(Budget::new(allowance, start));
            for _ in 0..exchanges {
                budget = budgets.deposit(&"r".into(), allowance, start).expect("few routes");
            }
            let now = start + Duration::from_secs(seconds);
            assert_eq!(
                taken(&budget, now),
                expected,
                "{percent} % {per_second}/s {exchanges} {seconds} s"
            );
        }
    }

    #[test]
    fn routes_have_budgets_of_their_own_and_share_nothing() {
        let (budgets, now) = (Budgets::default(), Instant::now());
        let allowance = Allowance { percent: 100, per_second: 0 };
        let a = budgets.deposit(&"a".into(), allowance, now).expect("few routes");
        let b = budgets.deposit(&"b".into(), allowance, now).expect("few routes");
        assert!(a.take(now) && !a.take(now));
        assert!(b.take(now));
    }

    #[test]
    fn a_route_past_the_bound_has_a_budget_once_another_is_at_rest() {
        let (budgets, now) = (Budgets::default(), Instant::now());
        let allowance = Allowance { percent: 100, per_second: 0 };
        let mut held: Vec<_> = (0..ROUTES_MAX)
            .map(|n| budgets.deposit(&format!("r{n}").into(), allowance, now).expect("below"))
            .collect();
        assert!(budgets.deposit(&"more".into(), allowance, now).is_none());
        held.pop();
        assert!(budgets.deposit(&"more".into(), allowance, now).is_some());
    }
}

//! Which of several sidecars takes an exchange: of two that are drawn by weight the one with fewer in
//! flight, leaving aside for a while those that fail, and beginning slowly with those that have just come.
//!
//! Pure but for the counts that exchanges keep. Time (nanoseconds of any clock) and random numbers are
//! arguments; who a sidecar is, and whether it can take an exchange at all, is the caller's business.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU32, AtomicU64, Ordering};
use std::time::Duration;

/// How long the share of a sidecar grows that has just come, or come back: connections to its service come
/// up, caches fill, code is compiled.
pub const SLOW_START: Duration = Duration::from_secs(10);

/// A whole share. Thousandths would do; this divides by shifting.
const WHOLE: u64 = 1024;

/// The share that a sidecar begins with: a sixteenth, so that it is tried at all.
const SHARE_MIN: u64 = WHOLE / 16;

/// Draws for two candidates. Beyond it the first that can take the exchange does: most cannot then.
const DRAWS_MAX: usize = 6;

/// Failures in a row after which a sidecar is left aside. One or two happen to anybody.
pub const FAILURES_MAX: u32 = 5;

/// How long it is left aside the first time; the second time twice as long, and so on …
pub const EJECTION: Duration = Duration::from_secs(1);

/// … up to this.
pub const EJECTION_MAX: Duration = Duration::from_secs(30);

/// After so long without being left aside it counts as the first time again.
const EJECTION_FORGOTTEN: Duration = Duration::from_secs(60);

fn nanos(duration: Duration) -> u64 {
    u64::try_from(duration.as_nanos()).unwrap_or(u64::MAX)
}

/// How one sidecar does on one tunnel. Outlives changes of who else serves it.
#[derive(Debug, Default)]
pub struct Standing {
    /// Halves of exchanges: one may outlive the other.
    halves: AtomicU32,
    /// Exchanges that were given to it.
    opened: AtomicU64,
    /// Since when its share grows.
    since: AtomicU64,
    /// In a row.
    failures: AtomicU32,
    /// In a row, but for long times between them.
    ejections: AtomicU32,
    /// It is left aside until then; 0: it never was.
    ejected_until: AtomicU64,
    /// It is left aside, and nobody has told yet that it is not any more.
    told: AtomicBool,
}

impl Standing {
    /// Returns the standing of one that has come at `now`.
    #[must_use]
    pub fn new(now: u64) -> Self {
        Self { since: AtomicU64::new(now), ..Self::default() }
    }

    /// Exchanges in flight.
    #[must_use]
    pub fn in_flight(&self) -> u32 {
        self.halves.load(Ordering::Relaxed).div_ceil(2)
    }

    /// Exchanges that were given to it.
    #[must_use]
    pub fn opened(&self) -> u64 {
        self.opened.load(Ordering::Relaxed)
    }

    /// Its share at `now`, of [`WHOLE`].
    fn share(&self, now: u64) -> u64 {
        let grown = now.saturating_sub(self.since.load(Ordering::Relaxed));
        let start = const { SLOW_START.as_secs() * 1_000_000_000 };
        if grown >= start { WHOLE } else { (grown * WHOLE / start).max(SHARE_MIN) }
    }

    /// Its share at `now`, in percent.
    #[must_use]
    pub fn share_percent(&self, now: u64) -> u64 {
        self.share(now) * 100 / WHOLE
    }

    /// Whether it is left aside.
    #[must_use]
    pub fn is_ejected(&self, now: u64) -> bool {
        self.ejected_until.load(Ordering::Relaxed) > now
    }

    /// It has answered.
    pub fn succeeded(&self) {
        // Written where there is something to write: all threads read it.
        if self.failures.load(Ordering::Relaxed) != 0 {
            self.failures.store(0, Ordering::Relaxed);
        }
    }

    /// It has failed; true: as often in a row as one may.
    #[must_use]
    pub fn failed(&self) -> bool {
        self.failures.fetch_add(1, Ordering::Relaxed) + 1 >= FAILURES_MAX
    }

    /// Leaves it aside from `now` on, and returns for how long. One call at a time.
    pub fn eject(&self, now: u64) -> Duration {
        let before = self.ejected_until.load(Ordering::Relaxed);
        let is_forgotten = now.saturating_sub(before) > nanos(EJECTION_FORGOTTEN);
        let times = if is_forgotten { 0 } else { self.ejections.load(Ordering::Relaxed) } + 1;
        self.ejections.store(times, Ordering::Relaxed);
        let time = EJECTION.saturating_mul(times).min(EJECTION_MAX);
        let until = now.saturating_add(nanos(time));
        self.failures.store(0, Ordering::Relaxed);
        self.told.store(true, Ordering::Relaxed);
        self.since.store(until, Ordering::Relaxed);
        self.ejected_until.store(until, Ordering::Relaxed);
        time
    }

    /// Takes it back before its time.
    pub fn readmit(&self, now: u64) {
        if self.is_ejected(now) {
            self.since.store(now, Ordering::Relaxed);
            self.ejected_until.store(now, Ordering::Relaxed);
        }
    }

    /// Whether its time aside is over and nobody has been told so yet: true once.
    #[must_use]
    pub fn is_back(&self, now: u64) -> bool {
        self.told.load(Ordering::Relaxed)
            && !self.is_ejected(now)
            && self.told.swap(false, Ordering::Relaxed)
    }
}

/// Whether one more may be left aside of `all`, of whom `ejected` are: never more than half, and so never
/// the last.
#[must_use]
pub const fn may_eject(ejected: usize, all: usize) -> bool {
    (ejected + 1) * 2 <= all
}

/// One half of an exchange that a sidecar was given.
#[derive(Debug)]
pub struct InFlight(Arc<Standing>);

impl InFlight {
    /// Counts an exchange, as its two halves.
    #[must_use]
    pub fn both(standing: &Arc<Standing>) -> (Self, Self) {
        standing.opened.fetch_add(1, Ordering::Relaxed);
        standing.halves.fetch_add(2, Ordering::Relaxed);
        (Self(Arc::clone(standing)), Self(Arc::clone(standing)))
    }

    /// Whose it is.
    #[must_use]
    pub const fn standing(&self) -> &Arc<Standing> {
        &self.0
    }
}

impl Drop for InFlight {
    fn drop(&mut self) {
        self.0.halves.fetch_sub(1, Ordering::Relaxed);
    }
}

/// Draws by weight in constant time: Vose's alias method.
#[derive(Clone, Debug, Default)]
pub struct Draw {
    /// Of each place: below this half of a random number it is the place itself, else the other.
    places: Vec<(u32, u32)>,
    weights: Vec<u32>,
}

impl Draw {
    /// Returns what draws places by these weights, none of which is 0.
    #[must_use]
    pub fn new(weights: Vec<u32>) -> Self {
        let count = weights.len() as u64;
        let sum: u64 = weights.iter().map(|weight| u64::from(*weight)).sum();
        // Scaled so that the average is `sum`.
        let mut left: Vec<u64> = weights.iter().map(|weight| u64::from(*weight) * count).collect();
        let (mut small, mut large): (Vec<usize>, Vec<usize>) =
            (0..left.len()).partition(|place| left[*place] < sum);
        let mut places = vec![(u32::MAX, 0); left.len()];
        while let (Some(low), Some(high)) = (small.pop(), large.last().copied()) {
            let part = u128::from(left[low]) * u128::from(u32::MAX) / u128::from(sum.max(1));
            places[low] = (
                u32::try_from(part).unwrap_or(u32::MAX),
                u32::try_from(high).expect("a tunnel has fewer sidecars"),
            );
            left[high] -= sum - left[low];
            if left[high] < sum {
                large.pop();
                small.push(high);
            }
        }
        Self { places, weights }
    }

    /// Returns a place for this random number; `None`: there is none.
    #[must_use]
    pub fn place(&self, random: u64) -> Option<usize> {
        let (high, low) = (random >> 32, random & u64::from(u32::MAX));
        // Below the count, as `high` is below 2^32.
        let place = usize::try_from((high * self.places.len() as u64) >> 32).ok()?;
        let (part, other) = *self.places.get(place)?;
        Some(if low <= u64::from(part) { place } else { other as usize })
    }

    /// The weight of a place.
    #[must_use]
    pub fn weight(&self, place: usize) -> u32 {
        self.weights.get(place).copied().unwrap_or(1)
    }

    /// Chooses among those that `is_able` says can take the exchange. Those that are left aside come last.
    pub fn choose<'s>(
        &self,
        now: u64,
        mut random: impl FnMut() -> u64,
        standing: impl Fn(usize) -> &'s Standing,
        is_able: impl Fn(usize) -> bool,
    ) -> Option<usize> {
        let count = self.places.len();
        if count <= 1 {
            return (count == 1 && is_able(0)).then_some(0);
        }
        let is_in = |place: usize| is_able(place) && !standing(place).is_ejected(now);
        let mut first = None;
        // Drawn, and passed over for their share: where all have just come they have it to themselves.
        let mut passed_over: [Option<usize>; 2] = [None; 2];
        for _ in 0..DRAWS_MAX {
            let Some(place) = self.place(random()).filter(|place| Some(*place) != first) else {
                continue;
            };
            if !is_in(place) {
                continue;
            }
            let share = standing(place).share(now);
            if share < WHOLE && random() % WHOLE >= share {
                match passed_over {
                    [None, _] => passed_over[0] = Some(place),
                    [Some(other), None] if other != place => passed_over[1] = Some(place),
                    _ => {}
                }
                continue;
            }
            match first {
                None => first = Some(place),
                Some(other) => return Some(self.freer(other, place, now, &standing)),
            }
        }
        let first = first.or_else(|| match passed_over {
            [Some(a), Some(b)] => Some(self.freer(a, b, now, &standing)),
            [only, _] => only,
        });
        if first.is_some() {
            return first;
        }
        let start = usize::try_from(random() % count as u64).unwrap_or_default();
        let all = || (start..count).chain(0..start);
        all().find(|place| is_in(*place)).or_else(|| all().find(|place| is_able(*place)))
    }

    /// Which of two has fewer in flight for its weight and share; the first where both have as many.
    fn freer<'s>(
        &self,
        a: usize,
        b: usize,
        now: u64,
        standing: impl Fn(usize) -> &'s Standing,
    ) -> usize {
        let load = |place: usize| u64::from(standing(place).halves.load(Ordering::Relaxed));
        let part = |place: usize| u64::from(self.weight(place)) * standing(place).share(now);
        if load(b) * part(a) < load(a) * part(b) { b } else { a }
    }
}

#[cfg(test)]
mod tests;

//! How much a ring may hold: as little as does not slow the lane down.

use std::time::{Duration, Instant};

use crate::acknowledge::ACK_BYTES;

/// Shortest time over which a rate is measured: what is acknowledged comes in steps of up to
/// [`crate::ACK_DELAY`].
const MEASURE_MIN: Duration = Duration::from_millis(20);

/// A measure that is longer by this factor than it had to be tells of a lane at rest, and is thrown away.
const MEASURE_STALE: u32 = 16;

/// A larger ring must raise the rate by one part in so many to be kept.
const GAIN_SHARE: u64 = 16;

/// The same, where the ring is larger already than the round trip explains: the other's delay may be its
/// work and not the road, and a rate is never quite steady.
const GAIN_SHARE_BEYOND: u64 = 4;

/// Measures after a growth that gained nothing, before the next one is tried.
const PAUSE: u8 = 16;

/// The size of one ring.
///
/// It begins small. While it is what holds the lane back it is doubled, and a doubling after which the rate
/// is as before is taken back: a round trip that is long because of what waits in our own buffers does
/// not make a ring large. Twice what the peer acknowledges within a round trip should do; more takes a larger
/// gain. While it holds nothing back it shrinks to that.
#[derive(Debug)]
pub(crate) struct Size {
    min: u64,
    max: u64,
    /// Invariant: between `min` and `max`.
    limit: u64,
    was_full: bool,
    since: Option<Instant>,
    acknowledged: u64,
    growth: Option<Growth>,
    pause: u8,
}

/// A growth of which it is not known yet what it gains.
#[derive(Debug)]
struct Growth {
    /// Before.
    limit: u64,
    /// In bytes per second: what makes it worth its memory.
    rate_min: u64,
    /// What is acknowledged now was sent before.
    is_fresh: bool,
}

impl Size {
    pub(crate) fn new(min: u64, max: u64) -> Self {
        let min = min.min(max);
        Self {
            min,
            max,
            limit: min,
            was_full: false,
            since: None,
            acknowledged: 0,
            growth: None,
            pause: 0,
        }
    }

    pub(crate) const fn min(&self) -> u64 {
        self.min
    }

    pub(crate) const fn max(&self) -> u64 {
        self.max
    }

    pub(crate) const fn limit(&self) -> u64 {
        self.limit
    }

    /// Something waits that the ring has no room for.
    pub(crate) const fn full(&mut self) {
        self.was_full = true;
    }

    /// So much was acknowledged.
    pub(crate) const fn acknowledged(&mut self, bytes: u64) {
        self.acknowledged += bytes;
    }

    /// Looks at what was acknowledged since the last time. `may_grow`: there is room in the process.
    pub(crate) fn tune(&mut self, now: Instant, rtt: Option<Duration>, may_grow: bool) {
        let Some(since) = self.since else {
            // How long what came so far took is not known.
            self.since = Some(now);
            self.acknowledged = 0;
            return;
        };
        let Some(rtt) = rtt else { return };
        let elapsed = now.saturating_duration_since(since);
        let least = rtt.max(MEASURE_MIN);
        if elapsed < least {
            return;
        }
        let acknowledged = std::mem::take(&mut self.acknowledged);
        let was_full = std::mem::take(&mut self.was_full);
        self.since = Some(now);
        if elapsed > least * MEASURE_STALE {
            self.growth = None;
            return;
        }
        let rate = per(acknowledged, Duration::from_secs(1), elapsed);
        // The peer acknowledges when it has so much, or a little later.
        let wanted = per(acknowledged, rtt, elapsed).saturating_add(2 * ACK_BYTES);
        let wanted = wanted.saturating_mul(2).clamp(self.min, self.max);
        self.pause = self.pause.saturating_sub(1);
        match &mut self.growth {
            Some(growth) if growth.is_fresh => {
                growth.is_fresh = false;
                return;
            }
            Some(growth) if rate < growth.rate_min => {
                self.limit = growth.limit;
                self.pause = PAUSE;
            }
            _ => {}
        }
        self.growth = None;
        if was_full && may_grow {
            if self.limit < self.max && self.pause == 0 {
                let is_explained = wanted > self.limit;
                let share = if is_explained { GAIN_SHARE } else { GAIN_SHARE_BEYOND };
                let rate_min = rate.saturating_add(rate / share);
                self.growth = Some(Growth { limit: self.limit, rate_min, is_fresh: true });
                self.limit = self.limit.max(1).saturating_mul(2).min(self.max);
            }
        } else if wanted < self.limit / 2 || !may_grow {
            self.limit = wanted.max(self.limit / 2).min(self.limit);
        }
    }

    /// Nothing is kept, and nothing was for a while.
    pub(crate) fn rest(&mut self) {
        if self.acknowledged == 0 {
            self.limit = self.min.max(self.limit / 2);
        }
        self.acknowledged = 0;
        self.was_full = false;
        self.since = None;
        self.growth = None;
        self.pause = 0;
    }
}

/// Returns how many of `bytes`, which took `elapsed`, come within `time`.
fn per(bytes: u64, time: Duration, elapsed: Duration) -> u64 {
    let scaled = u128::from(bytes).saturating_mul(time.as_nanos()) / elapsed.as_nanos().max(1);
    u64::try_from(scaled).unwrap_or(u64::MAX)
}

#[cfg(test)]
mod tests {
    use super::*;

    const MIB: u64 = 1024 * 1024;

    fn ms(count: u64) -> Duration {
        Duration::from_millis(count)
    }

    /// A lane of one limit after another: the rate is what the ring allows, and at most `link` bytes
    /// per second.
    struct Lane {
        size: Size,
        now: Instant,
        rtt: Duration,
        link: u64,
        /// What counts for the rate now: what was allowed a round trip ago.
        before: u64,
    }

    impl Lane {
        fn new(rtt: Duration, link: u64) -> Self {
            let size = Size::new(256 * 1024, 16 * MIB);
            let before = size.limit();
            Self { size, now: Instant::now(), rtt, link, before }
        }

        fn round(&mut self, may_grow: bool) {
            let step = self.rtt.max(MEASURE_MIN);
            let by_link = per(self.link, step, Duration::from_secs(1));
            let by_ring = per(self.before, step, self.rtt);
            self.now += step;
            self.before = self.size.limit();
            self.size.acknowledged(by_link.min(by_ring));
            self.size.full();
            // What waits in our own buffers makes the round trip as long as the ring is large.
            let rtt = self.rtt.max(per_link(self.before, self.link));
            self.size.tune(self.now, Some(rtt), may_grow);
        }
    }

    fn per_link(bytes: u64, link: u64) -> Duration {
        Duration::from_nanos(per(
            1_000_000_000,
            Duration::from_nanos(bytes),
            Duration::from_nanos(link),
        ))
    }

    #[test]
    fn it_grows_until_it_does_not_limit_the_rate() {
        let mut lane = Lane::new(ms(50), 100_000_000);
        lane.size.tune(lane.now, Some(ms(50)), true);
        for _ in 0..20 {
            lane.round(true);
        }
        let needed = 5_000_000;
        assert!(lane.size.limit() >= needed, "{}", lane.size.limit());
        assert!(lane.size.limit() <= 16 * MIB);
    }

    #[test]
    fn it_stays_small_where_a_larger_one_gains_nothing() {
        let mut lane = Lane::new(Duration::from_micros(100), 1_000_000_000);
        lane.size.tune(lane.now, Some(lane.rtt), true);
        for _ in 0..500 {
            lane.round(true);
            assert!(lane.size.limit() <= 512 * 1024, "{}", lane.size.limit());
        }
    }

    /// The other takes its time: the ring is what limits the rate, though the road is short.
    #[test]
    fn it_grows_beyond_what_the_round_trip_explains_where_that_helps() {
        let mut lane = Lane::new(ms(4), 1_000_000_000);
        for _ in 0..60 {
            let by_ring = per(lane.before, MEASURE_MIN, ms(4));
            let by_link = per(lane.link, MEASURE_MIN, Duration::from_secs(1));
            lane.now += MEASURE_MIN;
            lane.before = lane.size.limit();
            lane.size.acknowledged(by_ring.min(by_link));
            lane.size.full();
            lane.size.tune(lane.now, Some(Duration::from_micros(50)), true);
        }
        let limit = lane.size.limit();
        assert!((4_000_000..=8 * MIB).contains(&limit), "{limit}");
    }

    #[test]
    fn it_grows_only_while_it_is_full() {
        let mut now = Instant::now();
        let mut size = Size::new(256 * 1024, 16 * MIB);
        for _ in 0..50 {
            size.acknowledged(MIB);
            size.tune(now, Some(ms(50)), true);
            now += ms(50);
        }
        assert_eq!(size.limit(), 256 * 1024);
    }

    #[test]
    fn it_shrinks_under_pressure_and_never_grows_then() {
        let mut lane = Lane::new(ms(50), 100_000_000);
        for _ in 0..20 {
            lane.round(true);
        }
        let mut before = lane.size.limit();
        for _ in 0..20 {
            lane.round(false);
            assert!(lane.size.limit() <= before);
            before = lane.size.limit();
        }
    }

    #[test]
    fn it_shrinks_at_rest_and_with_the_rate() {
        let mut lane = Lane::new(ms(50), 100_000_000);
        for _ in 0..20 {
            lane.round(true);
        }
        let grown = lane.size.limit();
        assert!(grown > 4 * MIB, "{grown}");
        for _ in 0..20 {
            lane.now += ms(50);
            lane.size.acknowledged(10_000);
            lane.size.tune(lane.now, Some(ms(50)), true);
        }
        assert!(lane.size.limit() <= 512 * 1024, "{}", lane.size.limit());
        lane.size.limit = grown;
        for _ in 0..10 {
            lane.size.rest();
        }
        assert_eq!(lane.size.limit(), 256 * 1024);
    }

    /// A measure that spans a rest says nothing of the rate.
    #[test]
    fn a_rest_between_two_acknowledgements_changes_nothing() {
        let mut lane = Lane::new(ms(50), 100_000_000);
        for _ in 0..20 {
            lane.round(true);
        }
        let grown = lane.size.limit();
        lane.size.acknowledged(1000);
        lane.size.tune(lane.now + Duration::from_secs(4), Some(ms(50)), true);
        assert_eq!(lane.size.limit(), grown);
    }
}

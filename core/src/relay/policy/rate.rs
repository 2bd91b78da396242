//! How often a route may be used: buckets by the generic cell rate algorithm, for all clients and for
//! each.
//!
//! Pure: the time is an argument, in nanoseconds since an epoch of the caller's. A bucket is one
//! number, the time at which it will be full again, so that taking from it needs no lock.

use std::collections::HashMap;
use std::hash::{BuildHasher, RandomState};
use std::net::IpAddr;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Mutex, PoisonError};
use std::time::Duration;

use crate::address;
use crate::config::policy::Rate;

/// Clients that one route's table remembers. 10,000 at about 50 bytes are half a megabyte per route;
/// past it the client whose bucket is nearest to full is forgotten, and begins anew if it comes back.
pub(super) const CLIENTS_MAX: usize = 10_000;

/// Parts of a table, each with its lock: more than data-path threads that meet by chance.
const SHARDS: usize = 16;

/// A rate in the algorithm's terms.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Pace {
    /// Nanoseconds that one token takes to come back.
    interval: u64,
    /// Nanoseconds that an empty bucket takes to fill.
    depth: u64,
}

impl Pace {
    fn of(rate: &Rate) -> Self {
        let per = u64::try_from(rate.per.as_nanos()).unwrap_or(u64::MAX);
        let interval = (per / u64::from(rate.count.max(1))).max(1);
        Self { interval, depth: interval.saturating_mul(u64::from(rate.burst.max(1))) }
    }

    /// Takes a token from a bucket that is full at `full`: when it is full then, or how long there is
    /// none.
    fn take(self, full: u64, now: u64) -> Result<u64, Duration> {
        let after = full.max(now).saturating_add(self.interval);
        let ahead = after - now;
        if ahead <= self.depth { Ok(after) } else { Err(Duration::from_nanos(ahead - self.depth)) }
    }
}

/// One bucket, shared by all clients.
#[derive(Debug)]
pub(super) struct Bucket {
    pace: Pace,
    /// When it is full.
    full: AtomicU64,
}

impl Bucket {
    /// Returns a full bucket.
    pub(super) fn new(rate: &Rate) -> Self {
        Self { pace: Pace::of(rate), full: AtomicU64::new(0) }
    }

    /// Takes a token.
    ///
    /// # Errors
    /// How long there is none.
    pub(super) fn take(&self, now: u64) -> Result<(), Duration> {
        let mut full = self.full.load(Ordering::Relaxed);
        loop {
            let after = self.pace.take(full, now)?;
            let swapped =
                self.full.compare_exchange_weak(full, after, Ordering::Relaxed, Ordering::Relaxed);
            match swapped {
                Ok(_) => return Ok(()),
                Err(other) => full = other,
            }
        }
    }
}

/// A bucket for each client.
#[derive(Debug)]
pub(super) struct ClientBuckets {
    pace: Pace,
    hasher: RandomState,
    shards: [Mutex<HashMap<u128, u64>>; SHARDS],
    per_shard_max: usize,
}

impl ClientBuckets {
    /// Returns full buckets for everyone.
    pub(super) fn new(rate: &Rate) -> Self {
        Self::bounded(rate, CLIENTS_MAX)
    }

    fn bounded(rate: &Rate, clients_max: usize) -> Self {
        Self {
            pace: Pace::of(rate),
            // Keyed at random: no client can choose addresses that meet in one part.
            hasher: RandomState::new(),
            shards: std::array::from_fn(|_| Mutex::default()),
            per_shard_max: (clients_max / SHARDS).max(1),
        }
    }

    /// Takes a token of this client's.
    ///
    /// # Errors
    /// How long it has none.
    pub(super) fn take(&self, client: IpAddr, now: u64) -> Result<(), Duration> {
        let key = key(client);
        #[expect(clippy::cast_possible_truncation, reason = "any bits of a hash will do")]
        let shard = self.hasher.hash_one(key) as usize % SHARDS;
        let mut clients = self.shards[shard].lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(full) = clients.get_mut(&key) {
            *full = self.pace.take(*full, now)?;
            return Ok(());
        }
        if clients.len() >= self.per_shard_max {
            make_room(&mut clients, now);
        }
        clients.insert(key, self.pace.take(0, now)?);
        Ok(())
    }

    #[cfg(test)]
    fn len(&self) -> usize {
        self.shards.iter().map(|shard| shard.lock().unwrap().len()).sum()
    }
}

/// Forgets who has rested: a full bucket is as good as none. Where nobody has, forgets the one nearest
/// to it, who gains least by it.
fn make_room(clients: &mut HashMap<u128, u64>, now: u64) {
    let before = clients.len();
    clients.retain(|_, full| *full > now);
    if clients.len() < before {
        return;
    }
    let nearest = clients.iter().min_by_key(|(_, full)| **full).map(|(key, _)| *key);
    if let Some(nearest) = nearest {
        clients.remove(&nearest);
    }
}

/// One client: an IPv4 address, or the /64 of an IPv6 one, since a single host is given as much.
pub(super) fn key(client: IpAddr) -> u128 {
    match address::client(client) {
        IpAddr::V4(address) => u128::from(u32::from(address)),
        // Never a key of IPv4: the low half is zero, and all of IPv4 is in it but 0.0.0.0, which is
        // no client.
        IpAddr::V6(address) => address.to_bits(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const SECOND: u64 = 1_000_000_000;

    fn rate(count: u32, per: Duration, burst: u32) -> Rate {
        Rate { count, per, burst }
    }

    #[test]
    fn a_bucket_gives_its_burst_and_then_its_rate() {
        let table = [
            // count, per, burst
            (1, 1, 1),
            (10, 1, 10),
            (100, 1, 200),
            (3, 1, 5),
            (60, 60, 1),
        ];
        assert!(!table.is_empty());
        for (count, per, burst) in table {
            let rate = rate(count, Duration::from_secs(per), burst);
            let bucket = Bucket::new(&rate);
            let start = 5 * SECOND;
            let at_once = (0..burst + 10).take_while(|_| bucket.take(start).is_ok()).count();
            assert_eq!(at_once, burst as usize, "{rate:?}");
            let wait = bucket.take(start).expect_err("empty");
            let wait = u64::try_from(wait.as_nanos()).unwrap();
            assert!(bucket.take(start + wait - 1).is_err(), "{rate:?}: too early");
            assert!(bucket.take(start + wait).is_ok(), "{rate:?}: after what it said");
            assert!(bucket.take(start + wait).is_err(), "{rate:?}: one for one");
        }
    }

    #[test]
    fn a_rest_fills_no_more_than_the_burst() {
        let bucket = Bucket::new(&rate(10, Duration::from_secs(1), 3));
        assert!(bucket.take(0).is_ok());
        let later = 3600 * SECOND;
        let taken = (0..100).take_while(|_| bucket.take(later).is_ok()).count();
        assert_eq!(taken, 3);
    }

    #[test]
    fn extreme_rates_neither_overflow_nor_stop() {
        for extreme in [
            rate(u32::MAX, Duration::from_nanos(1), u32::MAX),
            rate(1, Duration::MAX, u32::MAX),
            rate(0, Duration::ZERO, 0),
        ] {
            assert!(Bucket::new(&extreme).take(u64::MAX / 2).is_ok(), "{extreme:?}");
        }
    }

    #[test]
    fn threads_together_get_no_more_than_one() {
        let bucket = Bucket::new(&rate(1, Duration::from_secs(1000), 500));
        let taken: usize = std::thread::scope(|scope| {
            let run = || (0..1000).filter(|_| bucket.take(1).is_ok()).count();
            let threads: Vec<_> = (0..4).map(|_| scope.spawn(run)).collect();
            threads.into_iter().map(|thread| thread.join().unwrap()).sum()
        });
        assert_eq!(taken, 500);
    }

    #[test]
    fn clients_have_buckets_of_their_own() {
        let buckets = ClientBuckets::new(&rate(1, Duration::from_secs(1), 1));
        let take = |client: &str| buckets.take(client.parse().unwrap(), SECOND).is_ok();
        assert!(take("192.0.2.1"));
        assert!(!take("192.0.2.1"));
        assert!(!take("::ffff:192.0.2.1"), "the same by another name");
        assert!(take("192.0.2.2"));
        assert!(take("2001:db8::1"));
        assert!(!take("2001:db8::2"), "the same /64");
        assert!(take("2001:db8:0:1::1"));
    }

    #[test]
    fn a_table_forgets_who_has_rested_first() {
        let buckets = ClientBuckets::bounded(&rate(1, Duration::from_secs(1), 2), SHARDS);
        let client = |number: u32| IpAddr::from(number.to_be_bytes());
        for number in 1..=1000 {
            assert!(buckets.take(client(number), u64::from(number)).is_ok());
            assert!(buckets.len() <= SHARDS, "bounded");
        }
        // All of them rest; one comes and takes their place.
        let later = 60 * SECOND;
        assert!(buckets.take(client(5000), later).is_ok());
        // Two tokens, and nobody has forgotten the first.
        assert!(buckets.take(client(5000), later).is_ok());
        assert!(buckets.take(client(5000), later).is_err());
    }
}

//! How much of a lane waits in front of the network, where nothing can overtake it.
//!
//! Knows when the connection took bytes and when it took none; no socket and no clock. On a fast network
//! a lot waits, which costs few system calls; on a slow one little, or a small message would stand
//! for a second behind what was chosen before it.

use std::time::{Duration, Instant};

/// What waits drains within this.
const QUEUE_TIME: Duration = Duration::from_millis(10);

/// How long the network is watched before it is judged: some wake-ups of a busy thread, and below a
/// round trip that is worth the name.
const WATCH_TIME: Duration = Duration::from_millis(20);

/// Least that waits: what drains in ten milliseconds at 3 Mbit/s. A message is taken whole, so less
/// would not bring the next one sooner.
const ROOM_MIN: usize = 4 * 1024;

/// At first: a wrong guess costs a slow network a moment, and a fast one a few system calls.
pub(super) const ROOM_FIRST: usize = 64 * 1024;

/// Most that waits: at a gigabyte per second a quarter of a millisecond.
const ROOM_MAX: usize = 256 * 1024;

/// The rate at which one connection takes what is written.
#[derive(Debug)]
pub(super) struct Pace {
    room: usize,
    /// Since when the connection is full, and what it has taken since.
    watched: Option<(Instant, usize)>,
}

impl Pace {
    pub(super) const fn new() -> Self {
        Self { room: ROOM_FIRST, watched: None }
    }

    /// Returns how many bytes may wait.
    pub(super) const fn room(&self) -> usize {
        self.room
    }

    /// The connection takes no more for now: what it takes from here on is what it can.
    pub(super) fn block(&mut self, now: Instant) {
        self.watched.get_or_insert((now, 0));
    }

    /// Nothing waits: what the connection takes is what there is, and says nothing of it.
    pub(super) const fn idle(&mut self) {
        self.watched = None;
    }

    /// The connection took bytes; returns how many may wait where that has halved or doubled.
    pub(super) fn wrote(&mut self, now: Instant, bytes: usize) -> Option<usize> {
        let (since, taken) = self.watched.as_mut()?;
        *taken = taken.saturating_add(bytes);
        let elapsed = now.saturating_duration_since(*since);
        if elapsed < WATCH_TIME {
            return None;
        }
        let drained = *taken as u128 * QUEUE_TIME.as_nanos() / elapsed.as_nanos();
        let room = usize::try_from(drained).unwrap_or(ROOM_MAX).clamp(ROOM_MIN, ROOM_MAX);
        self.watched = None;
        let differs = room >= 2 * self.room || 2 * room <= self.room;
        let at_bound = room != self.room && (room == ROOM_MIN || room == ROOM_MAX);
        if !differs && !at_bound {
            return None;
        }
        self.room = room;
        Some(room)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A connection that is always full and takes so many bytes each millisecond.
    fn drain(pace: &mut Pace, now: &mut Instant, bytes: usize) -> Vec<usize> {
        let mut changes = Vec::new();
        for _ in 0..100 {
            pace.block(*now);
            *now += Duration::from_millis(1);
            changes.extend(pace.wrote(*now, bytes));
        }
        changes
    }

    #[test]
    fn what_may_wait_drains_in_ten_milliseconds() {
        let (mut pace, mut now) = (Pace::new(), Instant::now());
        assert_eq!(drain(&mut pace, &mut now, 16 * 1024), [160 * 1024]);
        assert_eq!(drain(&mut pace, &mut now, 1_000_000), [ROOM_MAX]);
        assert_eq!(drain(&mut pace, &mut now, 350), [ROOM_MIN]);
        assert_eq!(drain(&mut pace, &mut now, 4 * 1024), [40 * 1024]);
        // Less than twice as much changes nothing.
        assert!(drain(&mut pace, &mut now, 6 * 1024).is_empty());
        assert_eq!(pace.room(), 40 * 1024);
    }

    #[test]
    fn connection_that_is_not_full_is_not_judged() {
        let (mut pace, mut now) = (Pace::new(), Instant::now());
        for _ in 0..100 {
            now += Duration::from_millis(5);
            assert_eq!(pace.wrote(now, 10), None);
        }
        for _ in 0..100 {
            pace.block(now);
            now += Duration::from_millis(5);
            assert_eq!(pace.wrote(now, 10), None);
            pace.idle();
        }
        assert_eq!(pace.room(), ROOM_FIRST);
    }

    #[test]
    fn time_without_a_byte_counts() {
        let (mut pace, mut now) = (Pace::new(), Instant::now());
        pace.block(now);
        now += Duration::from_millis(500);
        assert_eq!(pace.wrote(now, 32 * 1024), Some(ROOM_MIN));
    }
}

//! When a byte that is sent arrives: delay, loss and the window of one direction, without a socket.

use std::collections::VecDeque;
use std::time::Duration;

use tokio::time::Instant;

use super::Shape;

/// Payload of a segment on Ethernet.
const SEGMENT_BYTES: usize = 1448;
/// Segments in flight at first (RFC 6928).
const WINDOW_SEGMENTS: usize = 10;
/// Bytes in flight at most, and so what a wire holds of a direction.
pub(super) const WINDOW_BYTES_MAX: usize = 4 * 1024 * 1024;

/// One direction of a connection.
#[derive(Debug)]
pub(super) struct Line {
    delay: Duration,
    loss: f64,
    random: u64,
    /// Bytes that may be in flight. Only loss makes it less than all.
    window: usize,
    /// Up to here the window doubles in a round trip.
    threshold: usize,
    /// What was sent, and when its sender hears that it has arrived.
    in_flight: VecDeque<(Instant, usize)>,
    flying: usize,
    /// Nothing arrives before what was sent before it.
    arrived_last: Instant,
    /// Segments lost before are one loss to the window.
    recovers_until: Instant,
}

impl Line {
    /// One of a connection that was dialled at `begun`.
    pub(super) fn new(shape: &Shape, seed: u64, begun: Instant) -> Self {
        let window = WINDOW_SEGMENTS * SEGMENT_BYTES;
        let (window, threshold) =
            if shape.loss > 0.0 { (window, WINDOW_BYTES_MAX) } else { (WINDOW_BYTES_MAX, 0) };
        Self {
            delay: shape.delay,
            loss: shape.loss,
            random: seed,
            window,
            threshold,
            in_flight: VecDeque::new(),
            flying: 0,
            // Hello and answer of TCP come first.
            arrived_last: begun + 3 * shape.delay,
            recovers_until: begun,
        }
    }

    /// Returns whether bytes arrive as they are sent.
    pub(super) fn is_plain(&self) -> bool {
        self.delay.is_zero() && self.loss <= 0.0
    }

    /// Returns how many bytes may be sent now.
    pub(super) fn room(&mut self, now: Instant) -> usize {
        while let Some((heard, length)) = self.in_flight.front().copied()
            && heard <= now
        {
            self.in_flight.pop_front();
            self.flying -= length;
            self.grow(length);
        }
        self.window.saturating_sub(self.flying)
    }

    /// Returns when there is more room; `None`: nothing is in flight.
    pub(super) fn more_room_at(&self) -> Option<Instant> {
        self.in_flight.front().map(|(heard, _)| *heard)
    }

    /// Sends bytes, and says of each piece when it arrives.
    pub(super) fn send(
        &mut self,
        now: Instant,
        length: usize,
        mut arrives: impl FnMut(Instant, usize),
    ) {
        let mut left = length;
        let mut lost_one = false;
        while left > 0 {
            let segment = left.min(SEGMENT_BYTES);
            let lost = self.loses();
            lost_one |= lost;
            let again = if lost { 2 * self.delay } else { Duration::ZERO };
            let due = self.arrived_last.max(now + self.delay + again);
            self.arrived_last = due;
            arrives(due, segment);
            self.in_flight.push_back((due + self.delay, segment));
            self.flying += segment;
            left -= segment;
        }
        if lost_one && now >= self.recovers_until {
            self.recovers_until = now + 2 * self.delay;
            self.threshold = (self.window / 2).max(2 * SEGMENT_BYTES);
            self.window = self.threshold;
        }
    }

    /// As congestion control by loss does it (RFC 5681, 3.1).
    fn grow(&mut self, acknowledged: usize) {
        let by = if self.window < self.threshold {
            acknowledged
        } else {
            (SEGMENT_BYTES * acknowledged / self.window).max(1)
        };
        self.window = (self.window + by).min(WINDOW_BYTES_MAX);
    }

    fn loses(&mut self) -> bool {
        if self.loss <= 0.0 {
            return false;
        }
        self.random = self.random.wrapping_add(0x9e37_79b9_7f4a_7c15);
        #[allow(clippy::cast_precision_loss, reason = "53 bits are enough of a chance")]
        let chance = (mix(self.random) >> 11) as f64 / (1_u64 << 53) as f64;
        chance < self.loss
    }
}

/// `SplitMix64`: one number from the next of a sequence.
fn mix(mut number: u64) -> u64 {
    number = (number ^ (number >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    number = (number ^ (number >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    number ^ (number >> 31)
}

#[cfg(test)]
mod tests {
    use super::*;

    const DELAY: Duration = Duration::from_millis(25);

    fn shape(loss: f64) -> Shape {
        Shape { delay: DELAY, loss, seed: 7 }
    }

    fn arrivals(line: &mut Line, now: Instant, length: usize) -> Vec<(Instant, usize)> {
        let mut all = Vec::new();
        line.send(now, length, |due, length| all.push((due, length)));
        all
    }

    #[test]
    fn bytes_arrive_after_the_delay_and_the_first_after_the_handshake_too() {
        let begun = Instant::now();
        let mut line = Line::new(&shape(0.0), 1, begun);
        assert_eq!(arrivals(&mut line, begun, 10), [(begun + 3 * DELAY, 10)]);
        let later = begun + Duration::from_secs(1);
        assert_eq!(
            arrivals(&mut line, later, SEGMENT_BYTES + 1),
            [(later + DELAY, SEGMENT_BYTES), (later + DELAY, 1)]
        );
    }

    #[test]
    fn window_bounds_what_is_in_flight_until_it_is_heard_of() {
        let begun = Instant::now();
        let mut line = Line::new(&shape(0.0), 1, begun);
        let now = begun + Duration::from_secs(1);
        assert_eq!(line.room(now), WINDOW_BYTES_MAX);
        arrivals(&mut line, now, WINDOW_BYTES_MAX);
        assert_eq!(line.room(now), 0);
        let heard = line.more_room_at().unwrap();
        assert_eq!(heard, now + 2 * DELAY);
        assert_eq!(line.room(heard), WINDOW_BYTES_MAX);
        assert_eq!(line.more_room_at(), None);
    }

    #[test]
    fn lost_segment_holds_back_those_behind_it_and_halves_the_window() {
        let begun = Instant::now();
        let mut line = Line::new(&shape(0.02), 3, begun);
        let mut now = begun + Duration::from_secs(1);
        let mut late = 0;
        for _ in 0..2000 {
            let room = line.room(now);
            let before = line.window;
            let due = arrivals(&mut line, now, room.min(SEGMENT_BYTES));
            assert!(due.is_sorted());
            if let Some((due, _)) = due.first()
                && *due == now + 3 * DELAY
            {
                late += 1;
                assert!(line.window <= before);
            }
            now += 2 * DELAY;
        }
        // Forty of two thousand, give or take what chance takes.
        assert!((15..80).contains(&late), "{late}");
    }

    #[test]
    fn loss_of_a_hundredth_leaves_the_rate_that_congestion_control_leaves() {
        let begun = Instant::now();
        let mut line = Line::new(&shape(0.01), 5, begun);
        let (mut now, mut sent) = (begun, 0);
        let end = begun + Duration::from_secs(60);
        while now < end {
            let room = line.room(now);
            sent += room;
            arrivals(&mut line, now, room);
            now = line.more_room_at().unwrap();
        }
        // Mathis and others: 1.22 segments per round trip and root of the loss: 350 KB/s here.
        let rate = sent / 60;
        assert!((150_000..700_000).contains(&rate), "{rate} bytes per second");
    }
}

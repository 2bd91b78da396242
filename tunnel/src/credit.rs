//! Credit of one exchange and direction, at both of its ends: absolute limits on bytes sent since
//! the exchange began, so that repeating one is harmless.

use std::time::{Duration, Instant};

use sidelane_abi::MESSAGE_BYTES_MAX;

/// Charged for each message beside its payload's bytes: about what its place in a queue costs. Both
/// ends must use the same number; it is part of the protocol.
pub const MESSAGE_CHARGE: usize = 64;

/// Smallest window that an end may grant: one message of the largest size always fits.
pub const WINDOW_MIN: u64 = 64 * 1024;

/// Largest charge of one message. A larger message is charged no more, so that no window is too
/// small for it: what an exchange may have waiting is bounded by its window times
/// [`sidelane_abi::OPEN_BYTES_MAX`] by this, three and a half windows.
const CHARGE_MAX: u64 = (MESSAGE_BYTES_MAX + MESSAGE_CHARGE) as u64;

/// Returns what a message of `payload_len` bytes is charged, at both ends: its payload as encoded by
/// the plugin, as [`MESSAGE_BYTES_MAX`] where it is longer, and [`MESSAGE_CHARGE`]. The envelope is not charged, so that the number does not hang
/// on how it is encoded. The first message of a direction and an end without a payload are charged
/// nothing.
#[must_use]
pub const fn charge(payload_len: usize) -> u64 {
    let charged = if payload_len < MESSAGE_BYTES_MAX { payload_len } else { MESSAGE_BYTES_MAX };
    (charged + MESSAGE_CHARGE) as u64
}

/// The sender's end.
#[derive(Clone, Copy, Debug)]
pub(crate) struct SendCredit {
    /// Invariant: `used <= limit`.
    used: u64,
    limit: u64,
}

impl SendCredit {
    pub(crate) const fn new(window: u64) -> Self {
        Self { used: 0, limit: window }
    }

    pub(crate) const fn has(&self, charge: u64) -> bool {
        charge <= self.limit - self.used
    }

    /// Takes credit that [`SendCredit::has`] said is there.
    pub(crate) fn take(&mut self, charge: u64) {
        self.used += charge;
        debug_assert!(self.used <= self.limit, "credit was there");
    }

    /// Raises the limit; an older, lower one changes nothing. Returns whether it rose.
    pub(crate) const fn grant(&mut self, limit: u64) -> bool {
        let rises = limit > self.limit;
        if rises {
            self.limit = limit;
        }
        rises
    }
}

/// The receiver's end: charges what comes, and says when and how far the limit is to rise.
#[derive(Clone, Copy, Debug)]
pub(crate) struct RecvCredit {
    window: u64,
    /// Charged to the peer since the exchange began. Invariant: `consumed <= received <= limit`.
    received: u64,
    /// Of that, taken by the consumer.
    consumed: u64,
    /// Told to the peer.
    limit: u64,
    /// When the running measure of consumption began, and at which `consumed`.
    measured_since: Option<(Instant, u64)>,
}

/// A peer sent more than its credit.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) struct CreditExceeded;

impl RecvCredit {
    pub(crate) const fn new(window: u64) -> Self {
        Self { window, received: 0, consumed: 0, limit: window, measured_since: None }
    }

    /// Charges a message that arrived.
    pub(crate) const fn charge(&mut self, charge: u64) -> Result<(), CreditExceeded> {
        if charge > self.limit - self.received {
            return Err(CreditExceeded);
        }
        self.received += charge;
        Ok(())
    }

    /// Returns credit for a message that the consumer took; true: [`RecvCredit::raise`] is due.
    pub(crate) const fn consume(&mut self, charge: u64) -> bool {
        self.consumed += charge;
        let remaining = self.limit - self.consumed;
        // Half a window saves messages. Below one message's charge the sender may be stuck.
        remaining <= self.window / 2 || remaining < CHARGE_MAX
    }

    /// Raises the limit to a window above what was consumed, and returns it.
    pub(crate) fn raise(&mut self) -> u64 {
        self.limit = self.limit.max(self.consumed.saturating_add(self.window));
        self.limit
    }

    /// Doubles the window, up to `window_max`, where a whole window was consumed within two round
    /// trips: the window, not the consumer or the sender, is then what limits the rate.
    pub(crate) fn tune(&mut self, now: Instant, rtt: Option<Duration>, window_max: u64) {
        let Some((since, at)) = self.measured_since else {
            self.measured_since = Some((now, self.consumed));
            return;
        };
        if self.consumed - at < self.window {
            return;
        }
        if rtt.is_some_and(|rtt| now.saturating_duration_since(since) <= rtt * 2) {
            self.window = self.window.saturating_mul(2).min(window_max.max(self.window));
        }
        self.measured_since = Some((now, self.consumed));
    }

    #[cfg(test)]
    pub(crate) const fn window(&self) -> u64 {
        self.window
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_repeated_or_older_limit_changes_nothing() {
        let mut credit = SendCredit::new(100);
        credit.take(100);
        assert!(!credit.has(1));
        assert!(credit.grant(150));
        assert!(!credit.grant(150));
        assert!(!credit.grant(120));
        assert!(credit.has(50));
        assert!(!credit.has(51));
    }

    #[test]
    fn credit_is_told_at_half_a_window() {
        let mut credit = RecvCredit::new(1 << 20);
        credit.charge(1 << 20).unwrap();
        assert!(!credit.consume((1 << 19) - 1));
        assert!(credit.consume(1));
        assert_eq!(credit.raise(), (1 << 20) + (1 << 19));
        assert!(!credit.consume(1));
    }

    #[test]
    fn more_than_the_limit_is_refused() {
        let mut credit = RecvCredit::new(WINDOW_MIN);
        assert_eq!(credit.charge(WINDOW_MIN), Ok(()));
        assert_eq!(credit.charge(1), Err(CreditExceeded));
    }

    #[test]
    fn a_large_message_is_charged_as_one_that_every_window_has_room_for() {
        assert_eq!(charge(0), MESSAGE_CHARGE as u64);
        assert_eq!(charge(MESSAGE_BYTES_MAX - 1), CHARGE_MAX - 1);
        for len in [MESSAGE_BYTES_MAX, MESSAGE_BYTES_MAX + 1, sidelane_abi::OPEN_BYTES_MAX] {
            assert_eq!(charge(len), CHARGE_MAX);
        }
        const { assert!(CHARGE_MAX <= WINDOW_MIN) };
        // The bound that is documented.
        const { assert!(2 * sidelane_abi::OPEN_BYTES_MAX as u64 <= 7 * CHARGE_MAX) };
    }

    /// With nothing outstanding, a message of the largest size must fit: else both ends wait.
    #[test]
    fn the_smallest_window_never_jams() {
        for first in (1..=CHARGE_MAX).step_by(13) {
            let mut sender = SendCredit::new(WINDOW_MIN);
            let mut receiver = RecvCredit::new(WINDOW_MIN);
            for charge in [first, CHARGE_MAX, first, CHARGE_MAX, CHARGE_MAX] {
                assert!(sender.has(charge), "stuck after {first}");
                sender.take(charge);
                receiver.charge(charge).unwrap();
                if receiver.consume(charge) {
                    sender.grant(receiver.raise());
                }
            }
        }
    }

    #[test]
    fn a_window_grows_while_it_limits_the_rate() {
        let start = Instant::now();
        let rtt = Some(Duration::from_millis(50));
        let mut credit = RecvCredit::new(256 << 10);
        let mut now = start;
        for _ in 0..100 {
            credit.tune(now, rtt, 4 << 20);
            credit.charge(32 << 10).unwrap();
            credit.consume(32 << 10);
            credit.raise();
            now += Duration::from_millis(1);
        }
        assert!(credit.window() > 256 << 10);
        assert!(credit.window() <= 4 << 20);
    }

    #[test]
    fn a_window_stays_where_the_consumer_is_slow() {
        let mut now = Instant::now();
        let mut credit = RecvCredit::new(256 << 10);
        for _ in 0..100 {
            credit.tune(now, Some(Duration::from_millis(1)), 4 << 20);
            credit.charge(32 << 10).unwrap();
            credit.consume(32 << 10);
            credit.raise();
            now += Duration::from_millis(10);
        }
        assert_eq!(credit.window(), 256 << 10);
    }
}

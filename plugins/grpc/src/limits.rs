//! What time ends an RPC: the client's deadline, and this end's going away.

use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Mutex, PoisonError};
use std::task::{Context, Poll};
use std::time::Duration;

use sidelane_plugin::{Host, Instant, Timer};

/// How long before the end of a drain running RPCs are told, at most: time enough for a status to
/// reach the client.
const LEAVE_BEFORE_MAX: Duration = Duration::from_secs(2);

/// When this instance takes its leave.
#[derive(Debug, Default)]
pub(crate) struct Drain {
    draining: AtomicBool,
    leave: Mutex<Option<Instant>>,
}

impl Drain {
    /// What runs at `deadline` is cut. The earliest deadline counts.
    pub(crate) fn begin(&self, now: Instant, deadline: Instant) {
        let left = deadline.saturating_duration_since(now);
        let leave = now + (left - LEAVE_BEFORE_MAX.min(left / 2));
        let mut kept = self.leave.lock().unwrap_or_else(PoisonError::into_inner);
        *kept = Some(kept.map_or(leave, |kept| kept.min(leave)));
        drop(kept);
        self.draining.store(true, Ordering::Release);
    }

    /// Whether it has begun.
    pub(crate) fn has_begun(&self) -> bool {
        self.draining.load(Ordering::Acquire)
    }

    fn leave(&self) -> Option<Instant> {
        if !self.has_begun() {
            return None;
        }
        *self.leave.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Which limit was reached.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Limit {
    /// The client's deadline.
    Deadline,
    /// This end goes away.
    Drain,
}

/// Watches the limits of one RPC.
#[derive(Debug)]
pub(crate) struct Limits<'a> {
    drain: &'a Drain,
    deadline: Option<Instant>,
    /// Set for the earlier of the two; `None`: there is nothing to wait for.
    timer: Option<(Timer, Instant)>,
}

impl<'a> Limits<'a> {
    pub(crate) const fn new(drain: &'a Drain, deadline: Option<Instant>) -> Self {
        Self { drain, deadline, timer: None }
    }

    /// Ready once a limit is reached. To be polled last, where nothing else is ready: it costs nothing
    /// where an RPC never waits.
    pub(crate) fn poll(&mut self, cx: &mut Context<'_>) -> Poll<Limit> {
        let leave = self.drain.leave();
        let (at, limit) = match (self.deadline, leave) {
            (None, None) => return Poll::Pending,
            (Some(deadline), Some(leave)) if leave < deadline => (leave, Limit::Drain),
            (Some(deadline), _) => (deadline, Limit::Deadline),
            (None, Some(leave)) => (leave, Limit::Drain),
        };
        let timer = match &mut self.timer {
            Some((timer, set)) => {
                if *set != at {
                    timer.reset(at);
                    *set = at;
                }
                timer
            }
            None => &mut self.timer.insert((Host::current().timer(at), at)).0,
        };
        timer.poll_fired(cx).map(|()| limit)
    }
}

/// Reads a `grpc-timeout` (PROTOCOL-HTTP2.md, "Timeout"): at most eight digits and a unit.
pub(crate) fn parse_timeout(value: &[u8]) -> Option<Duration> {
    let (unit, digits) = value.split_last()?;
    if !(1..=8).contains(&digits.len()) || !digits.iter().all(u8::is_ascii_digit) {
        return None;
    }
    let number: u64 = str::from_utf8(digits).ok()?.parse().ok()?;
    // Eight digits of hours are below 2^39 seconds.
    Some(match unit {
        b'H' => Duration::from_secs(number * 3_600),
        b'M' => Duration::from_secs(number * 60),
        b'S' => Duration::from_secs(number),
        b'm' => Duration::from_millis(number),
        b'u' => Duration::from_micros(number),
        b'n' => Duration::from_nanos(number),
        _ => return None,
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn timeouts_are_digits_and_a_unit() {
        for (value, expected) in [
            ("1S", Some(Duration::from_secs(1))),
            ("99999999H", Some(Duration::from_secs(99_999_999 * 3_600))),
            ("2M", Some(Duration::from_secs(120))),
            ("100m", Some(Duration::from_millis(100))),
            ("5u", Some(Duration::from_micros(5))),
            ("7n", Some(Duration::from_nanos(7))),
            ("0n", Some(Duration::ZERO)),
            ("100000000S", None),
            ("S", None),
            ("1", None),
            ("1s", None),
            ("-1S", None),
            ("", None),
        ] {
            assert_eq!(parse_timeout(value.as_bytes()), expected, "{value:?}");
        }
    }
}

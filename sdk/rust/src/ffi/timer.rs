//! The host's clock and timers.

use std::fmt;
use std::future::Future;
use std::ops::{Add, Sub};
use std::pin::Pin;
use std::task::{Context, Poll};
use std::time::Duration;

use sidelane_abi as abi;

use super::waker::WakerSlot;

/// A point on the host's monotonic clock.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Instant(u64);

impl Instant {
    pub(crate) const fn from_nanos(nanos: u64) -> Self {
        Self(nanos)
    }

    pub(crate) const fn nanos(self) -> u64 {
        self.0
    }

    /// Returns the time since `earlier`, zero where that is later.
    #[must_use]
    pub const fn saturating_duration_since(self, earlier: Self) -> Duration {
        Duration::from_nanos(self.0.saturating_sub(earlier.0))
    }
}

impl Add<Duration> for Instant {
    type Output = Self;

    /// Saturates after 584 years.
    fn add(self, duration: Duration) -> Self {
        Self(self.0.saturating_add(u64::try_from(duration.as_nanos()).unwrap_or(u64::MAX)))
    }
}

impl Sub for Instant {
    type Output = Duration;

    fn sub(self, earlier: Self) -> Duration {
        self.saturating_duration_since(earlier)
    }
}

/// A timer that can be set again. It fires once per deadline.
pub struct Timer {
    raw: abi::Timer,
    slot: WakerSlot,
    fired: bool,
}

// SAFETY: H3; `&self` reaches nothing.
unsafe impl Send for Timer {}
// SAFETY: as above.
unsafe impl Sync for Timer {}

impl Timer {
    /// # Safety
    /// `raw` is moved to the caller (H1).
    pub(crate) const unsafe fn new(raw: abi::Timer) -> Self {
        Self { raw, slot: WakerSlot::new(), fired: false }
    }

    /// Ready once the deadline has passed, and from then on until it is set again.
    pub fn poll_fired(&mut self, cx: &mut Context<'_>) -> Poll<()> {
        if self.fired {
            return Poll::Ready(());
        }
        let waker = self.slot.lend(cx);
        // SAFETY: owned (H1); the waker is valid for the call.
        let tag = unsafe { ((*self.raw.vt).poll)(self.raw.data, waker) };
        self.fired = tag != abi::poll::PENDING;
        if self.fired { Poll::Ready(()) } else { Poll::Pending }
    }

    /// Sets another deadline.
    pub fn reset(&mut self, deadline: Instant) {
        self.fired = false;
        // SAFETY: owned (H1).
        unsafe { ((*self.raw.vt).reset)(self.raw.data, deadline.nanos()) }
    }
}

impl Drop for Timer {
    fn drop(&mut self) {
        // SAFETY: owned (H1), dropped once.
        unsafe { ((*self.raw.vt).drop)(self.raw.data) }
    }
}

impl fmt::Debug for Timer {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Timer").field("fired", &self.fired).finish_non_exhaustive()
    }
}

/// Waits for a deadline.
#[derive(Debug)]
pub struct Sleep {
    timer: Timer,
}

impl Sleep {
    pub(crate) const fn new(timer: Timer) -> Self {
        Self { timer }
    }

    /// Sets another deadline.
    pub fn reset(&mut self, deadline: Instant) {
        self.timer.reset(deadline);
    }
}

impl Future for Sleep {
    type Output = ();

    fn poll(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<()> {
        self.timer.poll_fired(cx)
    }
}

/// The time was up first.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("timed out")]
pub struct Elapsed;

//! Waiting for a condition with a deadline.

use std::time::{Duration, Instant};

/// Deadline of a wait that nothing but a defect makes long; generous, since CI machines stall.
pub const DEADLINE: Duration = Duration::from_secs(30);
/// Between two looks at a condition.
const INTERVAL: Duration = Duration::from_millis(5);

/// Waits until `condition` yields a value; panics with `what` after [`DEADLINE`].
pub fn until<T>(what: &str, condition: impl FnMut() -> Option<T>) -> T {
    within(DEADLINE, what, condition)
}

/// Waits until `condition` yields a value; panics with `what` after `deadline`.
pub fn within<T>(deadline: Duration, what: &str, mut condition: impl FnMut() -> Option<T>) -> T {
    let end = Instant::now() + deadline;
    loop {
        if let Some(value) = condition() {
            return value;
        }
        assert!(Instant::now() < end, "waited {deadline:?} in vain: {what}");
        std::thread::park_timeout(INTERVAL);
    }
}

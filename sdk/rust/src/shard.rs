//! State kept per thread of the host, so that pools and tables need no shared lock.

use std::sync::{Mutex, PoisonError};

use crate::Host;

/// One `T` per data-path thread of the host, and one for all other threads. Each stands behind a
/// mutex that nobody else contends for.
#[derive(Debug)]
pub struct PerShard<T> {
    /// Invariant: one slot per shard, then the one for other threads.
    slots: Box<[Mutex<T>]>,
}

impl<T: Send> PerShard<T> {
    /// Makes a value for each shard.
    pub fn new(host: &Host, mut make: impl FnMut() -> T) -> Self {
        Self { slots: (0..=host.shards()).map(|_| Mutex::new(make())).collect() }
    }

    /// Runs `f` on this thread's value. The value must not be used again from within `f`.
    ///
    /// # Panics
    /// Outside a call from the host.
    pub fn with<R>(&self, f: impl FnOnce(&mut T) -> R) -> R {
        let others = self.slots.len() - 1;
        let index = Host::current().shard().map_or(others, |shard| (shard as usize).min(others));
        // A panic in `f` failed its own exchange; the next must still find its pool.
        f(&mut self.slots[index].lock().unwrap_or_else(PoisonError::into_inner))
    }

    /// Runs `f` on every value in turn, as for reaping or draining.
    pub fn each(&self, mut f: impl FnMut(&mut T)) {
        for slot in &self.slots {
            f(&mut slot.lock().unwrap_or_else(PoisonError::into_inner));
        }
    }
}

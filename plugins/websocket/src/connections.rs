//! How many WebSockets each data-path thread has.

use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};

use sidelane_plugin::Host;

/// Counts per thread, and one for all other threads.
#[derive(Debug)]
pub(crate) struct Connections {
    counts: Arc<[AtomicUsize]>,
    max: usize,
}

/// The right to one connection. Given back when it is dropped, on whatever thread.
#[derive(Debug)]
pub(crate) struct Permit {
    counts: Arc<[AtomicUsize]>,
    index: usize,
}

impl Connections {
    pub(crate) fn new(host: &Host, max: usize) -> Self {
        Self { counts: (0..=host.shards()).map(|_| AtomicUsize::new(0)).collect(), max }
    }

    /// Returns `None` where this thread has as many as it may.
    pub(crate) fn try_take(&self, host: &Host) -> Option<Permit> {
        let others = self.counts.len() - 1;
        let index = host.shard().map_or(others, |shard| (shard as usize).min(others));
        let before = self.counts[index].fetch_add(1, Ordering::Relaxed);
        let permit = Permit { counts: Arc::clone(&self.counts), index };
        (before < self.max).then_some(permit)
    }
}

impl Drop for Permit {
    fn drop(&mut self) {
        self.counts[self.index].fetch_sub(1, Ordering::Relaxed);
    }
}

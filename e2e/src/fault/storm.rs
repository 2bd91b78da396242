//! Faults again and again, while a test does something else.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::mpsc::{self, RecvTimeoutError, Sender};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use super::{Fault, Shared};

/// Harms a wire until it is dropped.
#[derive(Debug)]
pub struct Storm {
    harmed: Arc<AtomicU64>,
    stop: Option<Sender<()>>,
    thread: Option<JoinHandle<()>>,
}

impl Storm {
    pub(super) fn over(shared: Arc<Shared>, period: Duration, faults: Vec<Fault>) -> Self {
        let harmed = Arc::new(AtomicU64::new(0));
        let (stop, stopped) = mpsc::channel();
        let count = Arc::clone(&harmed);
        let thread = std::thread::spawn(move || {
            let mut next = Instant::now() + period;
            for fault in faults.iter().cycle() {
                let pause = next.saturating_duration_since(Instant::now());
                if stopped.recv_timeout(pause) != Err(RecvTimeoutError::Timeout) {
                    return;
                }
                next += period;
                count.fetch_add(shared.harm(*fault, |_| true) as u64, Ordering::SeqCst);
            }
        });
        Self { harmed, stop: Some(stop), thread: Some(thread) }
    }

    /// Returns how many connections it has harmed.
    #[must_use]
    pub fn harmed(&self) -> u64 {
        self.harmed.load(Ordering::SeqCst)
    }

    /// Ends it, and returns how many connections it has harmed.
    #[must_use]
    pub fn end(self) -> u64 {
        let harmed = Arc::clone(&self.harmed);
        drop(self);
        harmed.load(Ordering::SeqCst)
    }
}

impl Drop for Storm {
    fn drop(&mut self) {
        drop(self.stop.take());
        if let Some(thread) = self.thread.take() {
            // A panic of it has been printed.
            let _ = thread.join();
        }
    }
}

//! The host as hyper's runtime.

use std::future::Future;
use std::pin::Pin;
use std::task::{Context, Poll};
use std::time::{Duration, Instant as StdInstant};

use crate::{Host, Instant, Sleep};

/// Runs hyper's tasks on the host's thread.
#[derive(Clone, Copy, Debug)]
pub struct HyperExecutor {
    host: Host,
}

impl HyperExecutor {
    /// Returns an executor on `host`.
    #[must_use]
    pub const fn new(host: Host) -> Self {
        Self { host }
    }
}

impl<F: Future + Send + 'static> hyper::rt::Executor<F> for HyperExecutor {
    fn execute(&self, future: F) {
        self.host.spawn(async move {
            let _ = future.await;
        });
    }
}

/// Gives hyper the host's timers, and the host's clock for its own.
#[derive(Clone, Copy, Debug)]
pub struct HyperTimer {
    host: Host,
    /// The same moment on both clocks.
    epoch: (StdInstant, Instant),
}

impl HyperTimer {
    /// Returns a timer on `host`.
    #[must_use]
    pub fn new(host: Host) -> Self {
        Self { host, epoch: (StdInstant::now(), host.now()) }
    }

    fn on_host(&self, deadline: StdInstant) -> Instant {
        self.epoch.1 + deadline.saturating_duration_since(self.epoch.0)
    }
}

impl hyper::rt::Timer for HyperTimer {
    fn sleep(&self, duration: Duration) -> Pin<Box<dyn hyper::rt::Sleep>> {
        Box::pin(HyperSleep { sleep: self.host.sleep(duration) })
    }

    fn sleep_until(&self, deadline: StdInstant) -> Pin<Box<dyn hyper::rt::Sleep>> {
        Box::pin(HyperSleep { sleep: self.host.sleep_until(self.on_host(deadline)) })
    }

    fn now(&self) -> StdInstant {
        self.epoch.0 + (self.host.now() - self.epoch.1)
    }

    fn reset(&self, sleep: &mut Pin<Box<dyn hyper::rt::Sleep>>, deadline: StdInstant) {
        match sleep.as_mut().downcast_mut_pin::<HyperSleep>() {
            Some(own) => own.get_mut().sleep.reset(self.on_host(deadline)),
            None => *sleep = self.sleep_until(deadline),
        }
    }
}

/// Waits for a deadline of hyper's.
#[derive(Debug)]
pub struct HyperSleep {
    sleep: Sleep,
}

impl Future for HyperSleep {
    type Output = ();

    fn poll(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<()> {
        Pin::new(&mut self.sleep).poll(cx)
    }
}

impl hyper::rt::Sleep for HyperSleep {}

//! What the host lends beside an exchange.

use std::ffi::c_void;
use std::fmt;
use std::future::{Future, poll_fn};
use std::pin::pin;
use std::ptr::NonNull;
use std::sync::{Arc, Mutex, PoisonError};
use std::task::{Poll, Waker, ready};
use std::time::Duration;

use sidelane_abi as abi;

use super::context;
use super::future::{Foreign, task};
use super::io::ByteStream;
use super::service::Connect;
use super::text::lend;
use super::timer::{Elapsed, Instant, Sleep, Timer};

/// The host of this generation of the plugin: threads, clock, sockets, log, metrics.
#[derive(Clone, Copy, PartialEq, Eq)]
pub struct Host {
    raw: NonNull<abi::Host>,
}

// SAFETY: valid while the process lives, and its functions may be called from any thread.
unsafe impl Send for Host {}
// SAFETY: as above.
unsafe impl Sync for Host {}

/// How much a log line matters.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
#[repr(u32)]
pub enum Level {
    /// Worth waking someone.
    Error = abi::level::ERROR,
    /// Wants attention.
    Warn = abi::level::WARN,
    /// Connection.
    Info = abi::level::INFO,
    /// Branch.
    Debug = abi::level::DEBUG,
    /// Message.
    Trace = abi::level::TRACE,
}

impl Host {
    /// # Safety
    /// `raw` is valid while the process lives (`abi::Host`).
    pub(crate) const unsafe fn new(raw: NonNull<abi::Host>) -> Self {
        Self { raw }
    }

    const fn raw(&self) -> *const abi::Host {
        self.raw.as_ptr()
    }

    const fn vt(&self) -> &abi::HostVt {
        // SAFETY: valid while the process lives.
        unsafe { &*(*self.raw()).vt }
    }

    /// Returns the host whose call this thread is in.
    ///
    /// # Panics
    /// Outside a call from a host: on a thread of the plugin's own. Keep a copy of the one that
    /// [`Protocol::new`](crate::Protocol::new) got there.
    #[must_use]
    pub fn current() -> Self {
        Self::try_current().expect("called by the host")
    }

    /// Returns the host whose call this thread is in, if it is in one.
    #[must_use]
    pub fn try_current() -> Option<Self> {
        context::current()
    }

    /// Runs `future` on this thread. Outside the host's data-path threads it is dropped, and a warning
    /// logged.
    pub fn spawn(&self, future: impl Future<Output = ()> + Send + 'static) {
        if !self.try_spawn(future) {
            self.log(
                Level::Warn,
                "sidelane_plugin",
                "spawned outside the host's threads: task dropped",
            );
        }
    }

    /// Runs `future` on this thread; false: this is none of the host's data-path threads, and it was
    /// dropped.
    pub fn try_spawn(&self, future: impl Future<Output = ()> + Send + 'static) -> bool {
        let future = task(*self, future);
        // SAFETY: the host is valid; the future is moved.
        unsafe { (self.vt().spawn)(self.raw(), future) == 1 }
    }

    /// The present, on the host's clock.
    #[must_use]
    pub fn now(&self) -> Instant {
        // SAFETY: the host is valid.
        Instant::from_nanos(unsafe { (self.vt().now)(self.raw()) })
    }

    /// Returns a timer for `deadline`.
    #[must_use]
    pub fn timer(&self, deadline: Instant) -> Timer {
        // SAFETY: the host is valid; the timer is moved to us.
        unsafe { Timer::new((self.vt().timer)(self.raw(), deadline.nanos())) }
    }

    /// Waits for `duration`.
    #[must_use]
    pub fn sleep(&self, duration: Duration) -> Sleep {
        self.sleep_until(self.now() + duration)
    }

    /// Waits for `deadline`.
    #[must_use]
    pub fn sleep_until(&self, deadline: Instant) -> Sleep {
        Sleep::new(self.timer(deadline))
    }

    /// Waits for `future`, but no longer than `duration`.
    ///
    /// # Errors
    /// The time was up first; the future is dropped.
    pub async fn timeout<F: Future>(
        &self,
        duration: Duration,
        future: F,
    ) -> Result<F::Output, Elapsed> {
        let mut future = pin!(future);
        let mut timer = self.timer(self.now() + duration);
        poll_fn(|cx| match future.as_mut().poll(cx) {
            Poll::Ready(output) => Poll::Ready(Ok(output)),
            Poll::Pending => timer.poll_fired(cx).map(|()| Err(Elapsed)),
        })
        .await
    }

    /// Dials `address` (`host:port`).
    pub fn connect(&self, address: &str) -> Connect {
        // SAFETY: the host is valid, the address borrowed for the call; the future resolves to an
        // `IoOutcome`.
        Connect::new(unsafe {
            Foreign::new((self.vt().connect)(self.raw(), lend(address.as_bytes())))
        })
    }

    /// Writes a line to the host's log.
    pub fn log(&self, level: Level, target: &str, text: &str) {
        // SAFETY: the host is valid; the texts are borrowed for the call.
        unsafe {
            (self.vt().log)(
                self.raw(),
                level as u32,
                lend(target.as_bytes()),
                lend(text.as_bytes()),
            );
        }
    }

    /// Whether lines of `level` are written.
    #[must_use]
    pub fn logs(&self, level: Level) -> bool {
        // SAFETY: the host is valid.
        level as u32 <= unsafe { (self.vt().log_level)(self.raw()) }
    }

    /// Which of the host's data-path threads this is, from 0; `None`: none of them.
    #[must_use]
    pub fn shard(&self) -> Option<u32> {
        // SAFETY: the host is valid.
        let shard = unsafe { (self.vt().shard)(self.raw()) };
        (shard != abi::NO_SHARD).then_some(shard)
    }

    /// How many data-path threads there are.
    #[must_use]
    pub fn shards(&self) -> u32 {
        // SAFETY: the host is valid.
        unsafe { (self.vt().shards)(self.raw()) }
    }

    /// Runs `work` on a thread that may block. It runs to its end even where the result is no longer
    /// awaited.
    ///
    /// # Errors
    /// `work` panicked; the host's log has the message.
    pub async fn blocking<R: Send + 'static>(
        &self,
        work: impl FnOnce() -> R + Send + 'static,
    ) -> Result<R, BlockingPanicked> {
        let done = Arc::new(Mutex::new(Blocking::Running(None)));
        let job = Job { host: *self, work, done: done.clone() };
        self.block(job);
        poll_fn(|cx| {
            let mut state = done.lock().unwrap_or_else(PoisonError::into_inner);
            match std::mem::replace(&mut *state, Blocking::Running(None)) {
                Blocking::Done(result) => Poll::Ready(result.ok_or(BlockingPanicked)),
                Blocking::Running(_) => {
                    *state = Blocking::Running(Some(cx.waker().clone()));
                    Poll::Pending
                }
            }
        })
        .await
    }

    fn block<W: FnOnce() -> R + Send + 'static, R: Send + 'static>(&self, job: Job<W, R>) {
        let data = Box::into_raw(Box::new(job));
        // SAFETY: the host is valid; the job is moved, and `run_job` takes what `data` is.
        unsafe { (self.vt().blocking)(self.raw(), run_job::<W, R>, data.cast()) }
    }

    /// Joins two byte streams, half-close kept, until both directions have ended. Streams of the host's
    /// own are joined without passing the plugin.
    ///
    /// # Errors
    /// One of the streams failed.
    pub fn splice(
        &self,
        a: ByteStream,
        b: ByteStream,
    ) -> impl Future<Output = std::io::Result<Spliced>> + Send + use<> {
        // SAFETY: the host is valid; the streams are moved; the future resolves to a `SpliceOutcome`.
        let mut outcome: Foreign<abi::SpliceOutcome> =
            unsafe { Foreign::new((self.vt().splice)(self.raw(), a.into_raw(), b.into_raw())) };
        poll_fn(move |cx| {
            Poll::Ready(match ready!(outcome.poll(cx)) {
                Some(abi::SpliceOutcome { err: 0, a_to_b, b_to_a }) => {
                    Ok(Spliced { a_to_b, b_to_a })
                }
                Some(outcome) => Err(std::io::Error::from_raw_os_error(outcome.err)),
                None => Err(std::io::Error::other("the host's splice failed")),
            })
        })
    }

    /// Registers a counter, exposed as `sidelane_plugin_<name>`; the same name gives the same one.
    #[must_use]
    pub fn counter(&self, name: &str, help: &str) -> Counter {
        self.counter_with(name, help, &[])
    }

    /// Registers a series of a counter; the same name and labels (name and value) give the same one.
    /// All series of a name have the same label names. Values come from sets that are bounded: a
    /// route's name, never a path. Keep what it returns: registering takes a lock.
    #[must_use]
    pub fn counter_with(&self, name: &str, help: &str, labels: &[(&str, &str)]) -> Counter {
        Counter(self.metric(abi::metric::COUNTER, name, help, labels))
    }

    /// Registers a gauge.
    #[must_use]
    pub fn gauge(&self, name: &str, help: &str) -> Gauge {
        self.gauge_with(name, help, &[])
    }

    /// Registers a series of a gauge, as [`Self::counter_with`].
    #[must_use]
    pub fn gauge_with(&self, name: &str, help: &str, labels: &[(&str, &str)]) -> Gauge {
        Gauge(self.metric(abi::metric::GAUGE, name, help, labels))
    }

    /// Registers a histogram, whose name ends in its unit: `_seconds`; `_bytes` has buckets from 16 B
    /// to 64 MiB, any other from 0.001 to about 4,000.
    #[must_use]
    pub fn histogram(&self, name: &str, help: &str) -> Histogram {
        self.histogram_with(name, help, &[])
    }

    /// Registers a series of a histogram, as [`Self::counter_with`].
    #[must_use]
    pub fn histogram_with(&self, name: &str, help: &str, labels: &[(&str, &str)]) -> Histogram {
        Histogram(self.metric(abi::metric::HISTOGRAM, name, help, labels))
    }

    fn metric(&self, kind: u32, name: &str, help: &str, labels: &[(&str, &str)]) -> Metric {
        let labels: Vec<abi::Header> = labels
            .iter()
            .map(|(name, value)| abi::Header {
                name: lend(name.as_bytes()),
                value: lend(value.as_bytes()),
            })
            .collect();
        let (name_text, help) = (lend(name.as_bytes()), lend(help.as_bytes()));
        let (ptr, len) = (labels.as_ptr(), labels.len());
        // SAFETY: the host is valid; the texts are borrowed for the call.
        let id = unsafe { (self.vt().metric)(self.raw(), kind, name_text, help, ptr, len) };
        if id == 0 {
            self.log(
                Level::Warn,
                "sidelane_plugin",
                &format!("the host refused the metric {name:?}"),
            );
        }
        Metric { host: *self, id }
    }
}

impl fmt::Debug for Host {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Host").finish_non_exhaustive()
    }
}

/// The work of [`Host::blocking`] panicked.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("the blocking work panicked")]
pub struct BlockingPanicked;

enum Blocking<R> {
    Running(Option<Waker>),
    Done(Option<R>),
}

struct Job<W, R> {
    host: Host,
    work: W,
    done: Arc<Mutex<Blocking<R>>>,
}

unsafe extern "C" fn run_job<W: FnOnce() -> R, R>(data: *mut c_void) {
    // SAFETY: made by `Host::block`, run exactly once.
    let job = unsafe { Box::from_raw(data.cast::<Job<W, R>>()) };
    let Job { host, work, done } = *job;
    let result = context::call(host, work).ok();
    let _ = context::call(host, move || {
        let before = {
            let mut state = done.lock().unwrap_or_else(PoisonError::into_inner);
            std::mem::replace(&mut *state, Blocking::Done(result))
        };
        if let Blocking::Running(Some(waker)) = before {
            waker.wake();
        }
    });
}

/// What [`Host::splice`] moved.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Spliced {
    /// Bytes from the first stream to the second.
    pub a_to_b: u64,
    /// Bytes from the second stream to the first.
    pub b_to_a: u64,
}

#[derive(Clone, Copy, Debug)]
struct Metric {
    host: Host,
    id: u32,
}

impl Metric {
    fn add(self, value: f64) {
        if self.id != 0 {
            // SAFETY: the host is valid.
            unsafe { (self.host.vt().metric_add)(self.host.raw(), self.id, value) }
        }
    }
}

/// A number that only grows.
#[derive(Clone, Copy, Debug)]
pub struct Counter(Metric);

impl Counter {
    /// Adds `count`.
    #[allow(clippy::cast_precision_loss, reason = "metrics are floating point")]
    pub fn add(&self, count: u64) {
        self.0.add(count as f64);
    }
}

/// A number that goes up and down.
#[derive(Clone, Copy, Debug)]
pub struct Gauge(Metric);

impl Gauge {
    /// Adds `change`, which may be negative.
    #[allow(clippy::cast_precision_loss, reason = "metrics are floating point")]
    pub fn add(&self, change: i64) {
        self.0.add(change as f64);
    }
}

/// A distribution.
#[derive(Clone, Copy, Debug)]
pub struct Histogram(Metric);

impl Histogram {
    /// Counts `value`.
    pub fn observe(&self, value: f64) {
        self.0.add(value);
    }
}

//! The services that the host lends plugins: tasks, time, connections, logs, metrics, shards.
//!
//! One [`HostObject`] per generation, never freed, since a plugin may keep it in a static. Knows
//! which generation's code runs on this thread, so that faults are told of the right plugin.

use std::cell::Cell;
use std::collections::HashMap;
use std::ffi::c_void;
use std::future::Future;
use std::io;
use std::marker::PhantomData;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::pin::Pin;
use std::sync::{Arc, Mutex, OnceLock, PoisonError, Weak};
use std::task::{Context, Poll};
use std::time::{Duration, Instant};

use sidelane_abi as abi;
use tokio::net::{TcpStream, UnixStream};
use tokio::runtime::Handle;
use tokio::time::Sleep;

use super::generation::{Anchor, Record, TaskPin};
use super::lend::{Stream, StreamFuture};
use super::vtable::future::{PluginFuture, Polled};
use super::vtable::{exchange, future, io as stream, waker};
use crate::join;

/// Longest a plugin's own dial may take, names resolved included.
const CONNECT_TIMEOUT: Duration = Duration::from_secs(10);

/// Longest log text taken from a plugin; the rest is cut. Bounds a log line.
const LOG_BYTES_MAX: usize = 8 * 1024;

/// Longest log target taken from a plugin: a module's path.
const LOG_TARGET_BYTES_MAX: usize = 256;

/// Longest help text of a metric.
const METRIC_HELP_BYTES_MAX: usize = 1024;

/// Longest address that is dialled: a host name has at most 253 bytes, a socket's path 108.
const ADDRESS_BYTES_MAX: usize = 512;

/// Most series that one plugin may register: some dozens for each of a few hundred routes or methods.
/// Bounds what a scrape costs.
const SERIES_PER_PLUGIN_MAX: usize = 8192;

/// Most labels of a metric.
const LABELS_MAX: usize = 8;

/// Longest value of a label; the rest is cut. Names of routes have at most 63 bytes.
const LABEL_VALUE_BYTES_MAX: usize = 128;

/// Longest name of a metric.
const METRIC_NAME_BYTES_MAX: usize = 64;

/// A deadline so far away that it never comes: tokio's clock overflows beyond.
const FAR: Duration = Duration::from_secs(60 * 60 * 24 * 365 * 10);

/// Where plugins' metrics go.
pub trait MetricSink: Send + Sync + 'static {
    /// Registers a metric of the plugin; `kind` is one of [`sidelane_abi::metric`], `name` without
    /// the prefix `sidelane_plugin_`; `labels` are names and values beside the plugin's. The same
    /// plugin, name and labels come once. `None`: refused.
    fn register(
        &self,
        plugin: &str,
        kind: u32,
        name: &str,
        help: &str,
        labels: &Labels,
    ) -> Option<u32>;
    /// Adds to a counter or gauge, or observes in a histogram. `value` is finite.
    fn add(&self, id: u32, value: f64);
}

/// What all plugins of a process share.
#[derive(Clone)]
pub struct HostContext {
    shared: Arc<Shared>,
    shards: u32,
}

/// Labels of a series: names and values.
pub type Labels = Vec<(String, String)>;

/// A plugin's metrics by name.
#[derive(Default)]
struct PluginMetrics {
    by_name: HashMap<String, Metric>,
    /// Series of all of them.
    series: usize,
}

struct Metric {
    kind: u32,
    /// By labels, all of the same names: the sink's id.
    series: HashMap<Labels, u32>,
}

struct Shared {
    sink: Arc<dyn MetricSink>,
    /// By plugin.
    metrics: Mutex<HashMap<Arc<str>, PluginMetrics>>,
}

impl HostContext {
    /// Makes the context of a process with one data-path thread; plugins' metrics go to `sink`.
    #[must_use]
    pub fn new(sink: Arc<dyn MetricSink>) -> Self {
        Self { shared: Arc::new(Shared { sink, metrics: Mutex::default() }), shards: 1 }
    }

    /// Says how many data-path threads the process will have. Plugins make their tables by it when
    /// they are created, which is before those threads run.
    #[must_use]
    pub fn with_shards(self, shards: u32) -> Self {
        Self { shards, ..self }
    }
}

impl std::fmt::Debug for HostContext {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("HostContext").finish_non_exhaustive()
    }
}

thread_local! {
    static SHARD: Cell<Option<(u32, u32)>> = const { Cell::new(None) };
    static CURRENT: Cell<Option<&'static HostObject>> = const { Cell::new(None) };
}

/// A runtime to make timers and connections on where a plugin asks from a thread of its own: that of
/// the first data-path thread.
static FIRST_RUNTIME: OnceLock<Handle> = OnceLock::new();

/// Says that this thread is data-path thread `index` of `count`, and that plugins may spawn here.
/// Called once by each such thread, inside its runtime.
pub fn enter_shard(index: u32, count: u32) {
    SHARD.set(Some((index, count)));
    if let Ok(handle) = Handle::try_current() {
        FIRST_RUNTIME.get_or_init(|| handle);
    }
}

/// Returns which data-path thread this is; `None` on any other thread.
#[must_use]
pub fn current_shard() -> Option<u32> {
    SHARD.get().map(|(index, _)| index)
}

/// Returns the name of the plugin whose code called, or an empty string.
pub(super) fn current_plugin() -> &'static str {
    CURRENT.get().map_or("", |host| host.plugin())
}

/// Returns `at` on the clock of `HostVt::now`.
pub(super) fn clock_ns(at: Instant) -> u64 {
    // One more, since 0 means none.
    let since = at.saturating_duration_since(epoch()).as_nanos();
    u64::try_from(since).unwrap_or(u64::MAX).saturating_add(1)
}

fn epoch() -> Instant {
    static EPOCH: OnceLock<Instant> = OnceLock::new();
    *EPOCH.get_or_init(Instant::now)
}

fn instant_of(deadline_ns: u64) -> tokio::time::Instant {
    let since = Duration::from_nanos(deadline_ns.saturating_sub(1));
    let at = epoch().checked_add(since).unwrap_or_else(|| epoch() + FAR);
    tokio::time::Instant::from_std(at.min(Instant::now() + FAR))
}

fn runtime() -> Option<Handle> {
    Handle::try_current().ok().or_else(|| FIRST_RUNTIME.get().cloned())
}

/// What a generation's plugin gets as its host.
#[repr(C)]
pub(super) struct HostObject {
    abi: abi::Host,
    plugin: Arc<str>,
    context: HostContext,
    record: Arc<Record>,
    anchor: Weak<Anchor>,
}

// SAFETY: the raw pointer in `abi` leads to a static table; the rest is thread-safe.
unsafe impl Send for HostObject {}
// SAFETY: as above.
unsafe impl Sync for HostObject {}

static HOST_VT: abi::HostVt = abi::HostVt {
    size: size_of::<abi::HostVt>(),
    spawn,
    now,
    timer,
    connect,
    log,
    log_level,
    metric,
    metric_add,
    shard,
    shards,
    blocking,
    splice,
    dedicate,
};

impl HostObject {
    /// Makes the host of a generation. It stays for the process's life: about 100 bytes for each
    /// version or configuration that was ever loaded.
    pub(super) fn leak(
        context: HostContext,
        record: Arc<Record>,
        anchor: &Arc<Anchor>,
    ) -> &'static Self {
        Box::leak(Box::new(Self {
            abi: abi::Host { vt: &raw const HOST_VT },
            plugin: Arc::clone(&record.name),
            context,
            record,
            anchor: Arc::downgrade(anchor),
        }))
    }

    pub(super) fn as_abi(&'static self) -> *const abi::Host {
        std::ptr::from_ref(self).cast()
    }

    pub(super) fn plugin(&self) -> &str {
        &self.plugin
    }

    /// Says that this plugin's code runs on this thread until the guard is dropped.
    #[inline]
    pub(super) fn enter(&'static self) -> Entered {
        Entered { before: CURRENT.replace(Some(self)), this_thread: PhantomData }
    }

    pub(super) fn polled(&self, took: Duration) {
        self.record.polled(took);
    }

    pub(super) fn panicked(&self) {
        self.record.panicked(Instant::now());
    }

    pub(super) fn unknown_tag(&self, call: &'static str, tag: u32) {
        tracing::warn!(plugin = &*self.plugin, call, tag, "a plugin returned an unknown tag");
    }
}

/// Restores which plugin's code runs on this thread.
pub(super) struct Entered {
    before: Option<&'static HostObject>,
    this_thread: PhantomData<*const ()>,
}

impl Drop for Entered {
    fn drop(&mut self) {
        CURRENT.set(self.before);
        let PhantomData = self.this_thread;
    }
}

/// Runs a host service. A panic of ours must not cross into the plugin.
///
/// # Safety
/// `host` is what [`HostObject::as_abi`] gave.
unsafe fn serve<T>(
    host: *const abi::Host,
    call: &'static str,
    fallback: impl FnOnce() -> T,
    run: impl FnOnce(&'static HostObject) -> T,
) -> T {
    // SAFETY: by this function's contract; a host object is never freed.
    let host = unsafe { &*host.cast::<HostObject>() };
    catch_unwind(AssertUnwindSafe(|| run(host))).unwrap_or_else(|_| {
        tracing::error!(plugin = &*host.plugin, call, "core panicked below a plugin's call");
        fallback()
    })
}

/// Returns a plugin's text for a call; what is not UTF-8 in it is replaced.
///
/// # Safety
/// `text` is lent for the call.
unsafe fn text<'a>(text: abi::Str, bytes_max: usize) -> std::borrow::Cow<'a, str> {
    if text.ptr.is_null() || text.len == 0 {
        return "".into();
    }
    // SAFETY: by this function's contract, and not null.
    let bytes = unsafe { std::slice::from_raw_parts(text.ptr, text.len.min(bytes_max)) };
    String::from_utf8_lossy(bytes)
}

unsafe extern "C" fn spawn(host: *const abi::Host, future: abi::Future) -> u32 {
    let start = |host| {
        // SAFETY: the plugin moves the future here.
        let future = unsafe { PluginFuture::new(future, host) };
        future.map_or(0, |future| u32::from(spawn_task(host, future)))
    };
    // SAFETY: the plugin passes the host it was given.
    unsafe { serve(host, "host.spawn", || 0, start) }
}

fn spawn_task(host: &'static HostObject, future: PluginFuture) -> bool {
    let (Some(_), Ok(handle)) = (SHARD.get(), Handle::try_current()) else { return false };
    let Some(pin) = host.anchor.upgrade().and_then(|anchor| anchor.reserve_task()) else {
        return false;
    };
    let (anchor, id) = (Arc::clone(&pin.anchor), pin.id);
    let task = handle.spawn(PluginTask { future, _pin: pin });
    anchor.task_started(id, task.abort_handle());
    true
}

/// A plugin's task. The future goes before the pin.
struct PluginTask {
    future: PluginFuture,
    _pin: TaskPin,
}

impl Future for PluginTask {
    type Output = ();

    fn poll(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<()> {
        // SAFETY: a spawned future resolves to nothing, its `out` is null (plugin ABI, `spawn`); the
        // task is not polled again once it is done.
        match unsafe { self.future.poll(cx, std::ptr::null_mut()) } {
            Polled::Pending => Poll::Pending,
            Polled::Ready | Polled::Panicked => Poll::Ready(()),
        }
    }
}

unsafe extern "C" fn now(_host: *const abi::Host) -> u64 {
    clock_ns(Instant::now())
}

static TIMER_VT: abi::TimerVt = abi::TimerVt {
    size: size_of::<abi::TimerVt>(),
    poll: timer_poll,
    reset: timer_reset,
    drop: timer_drop,
};

/// A timer lent to a plugin; without a runtime to run it on it fires at once.
struct HostTimer {
    sleep: Option<Pin<Box<Sleep>>>,
}

unsafe extern "C" fn timer(host: *const abi::Host, deadline_ns: u64) -> abi::Timer {
    let sleep = || {
        let handle = runtime()?;
        let _entered = handle.enter();
        Some(Box::pin(tokio::time::sleep_until(instant_of(deadline_ns))))
    };
    // SAFETY: the plugin passes the host it was given.
    let sleep = unsafe { serve(host, "host.timer", || None, |_| sleep()) };
    let data = Box::into_raw(Box::new(HostTimer { sleep }));
    abi::Timer { data: data.cast(), vt: &raw const TIMER_VT }
}

unsafe extern "C" fn timer_poll(data: *mut c_void, waker: *const abi::Waker) -> u32 {
    // SAFETY: `data` is what `timer` leaked, used by one thread at a time.
    let timer = unsafe { &mut *data.cast::<HostTimer>() };
    let Some(sleep) = timer.sleep.as_mut() else { return abi::poll::READY };
    let polled = catch_unwind(AssertUnwindSafe(|| {
        // SAFETY: the plugin lends the waker for the call.
        unsafe { waker::with_context(waker, |cx| sleep.as_mut().poll(cx)) }
    }));
    match polled {
        Ok(Poll::Pending) => abi::poll::PENDING,
        // A panic says that the timer's runtime is gone: nothing is left to wait for.
        Ok(Poll::Ready(())) | Err(_) => abi::poll::READY,
    }
}

unsafe extern "C" fn timer_reset(data: *mut c_void, deadline_ns: u64) {
    // SAFETY: as in `timer_poll`.
    let timer = unsafe { &mut *data.cast::<HostTimer>() };
    if let Some(sleep) = timer.sleep.as_mut() {
        let reset = AssertUnwindSafe(|| sleep.as_mut().reset(instant_of(deadline_ns)));
        if catch_unwind(reset).is_err() {
            timer.sleep = None;
        }
    }
}

unsafe extern "C" fn timer_drop(data: *mut c_void) {
    // SAFETY: `data` is what `timer` leaked, dropped once.
    drop(unsafe { Box::from_raw(data.cast::<HostTimer>()) });
}

unsafe extern "C" fn connect(host: *const abi::Host, address: abi::Str) -> abi::Future {
    let failed = || future::lend(async { stream::failed_outcome(abi::failure::INTERNAL, 0) });
    // SAFETY: the plugin lends the address for the call.
    let address = unsafe { text(address, ADDRESS_BYTES_MAX) }.into_owned();
    // SAFETY: the plugin passes the host it was given.
    unsafe {
        serve(host, "host.connect", failed, move |_| {
            let Some(handle) = runtime() else { return failed() };
            let dial: StreamFuture = Box::pin(dial(address));
            future::lend(InRuntime { handle, future: Box::pin(stream::outcome(dial)) })
        })
    }
}

async fn dial(address: String) -> Result<Box<dyn Stream>, (u32, io::Error)> {
    let connecting = async {
        if let Some(path) = address.strip_prefix("unix:") {
            let stream = UnixStream::connect(path).await?;
            return Ok(Box::new(stream) as Box<dyn Stream>);
        }
        let stream = TcpStream::connect(&*address).await?;
        stream.set_nodelay(true)?;
        Ok(Box::new(stream) as Box<dyn Stream>)
    };
    match tokio::time::timeout(CONNECT_TIMEOUT, connecting).await {
        Ok(connected) => connected.map_err(|error| (abi::failure::SERVICE_UNREACHABLE, error)),
        Err(_) => Err((abi::failure::SERVICE_TIMEOUT, io::ErrorKind::TimedOut.into())),
    }
}

/// Polls inside a runtime, whoever polls: it may be a plugin's own thread.
struct InRuntime<F> {
    handle: Handle,
    future: Pin<Box<F>>,
}

impl<F: Future> Future for InRuntime<F> {
    type Output = F::Output;

    fn poll(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<F::Output> {
        let this = &mut *self;
        let _entered = this.handle.enter();
        this.future.as_mut().poll(cx)
    }
}

unsafe extern "C" fn log(host: *const abi::Host, level: u32, target: abi::Str, line: abi::Str) {
    // SAFETY: the plugin lends the text for the call.
    let target = unsafe { text(target, LOG_TARGET_BYTES_MAX) };
    // SAFETY: as above.
    let line = unsafe { text(line, LOG_BYTES_MAX) };
    let write = |host: &HostObject| {
        let plugin = &*host.plugin;
        match level {
            abi::level::ERROR => tracing::error!(plugin, target = &*target, "{line}"),
            abi::level::WARN => tracing::warn!(plugin, target = &*target, "{line}"),
            abi::level::INFO => tracing::info!(plugin, target = &*target, "{line}"),
            abi::level::DEBUG => tracing::debug!(plugin, target = &*target, "{line}"),
            _ => tracing::trace!(plugin, target = &*target, "{line}"),
        }
    };
    // SAFETY: the plugin passes the host it was given.
    unsafe { serve(host, "host.log", || (), write) }
}

unsafe extern "C" fn log_level(_host: *const abi::Host) -> u32 {
    use tracing::level_filters::LevelFilter;
    match LevelFilter::current() {
        LevelFilter::OFF => 0,
        LevelFilter::ERROR => abi::level::ERROR,
        LevelFilter::WARN => abi::level::WARN,
        LevelFilter::INFO => abi::level::INFO,
        LevelFilter::DEBUG => abi::level::DEBUG,
        _ => abi::level::TRACE,
    }
}

unsafe extern "C" fn metric(
    host: *const abi::Host,
    kind: u32,
    name: abi::Str,
    help: abi::Str,
    labels: *const abi::Header,
    labels_len: usize,
) -> u32 {
    // SAFETY: the plugin lends the text for the call. One byte more than allowed is read, so that a
    // longer name is refused rather than cut.
    let name = unsafe { text(name, METRIC_NAME_BYTES_MAX + 1) };
    // SAFETY: as above.
    let help = unsafe { text(help, METRIC_HELP_BYTES_MAX) };
    let labels: Option<Labels> = if labels_len > LABELS_MAX {
        None
    } else {
        (0..labels_len)
            .map(|at| {
                // SAFETY: the plugin lends `labels_len` of them for the call.
                let label = unsafe { labels.add(at) };
                // SAFETY: as above.
                let label = unsafe { label.read() };
                // SAFETY: as above.
                let name = unsafe { text(label.name, METRIC_NAME_BYTES_MAX + 1) };
                // SAFETY: as above.
                let value = unsafe { text(label.value, LABEL_VALUE_BYTES_MAX) };
                let valid = metric_name_is_valid(&name) && &*name != "plugin";
                valid.then(|| (name.into_owned(), value.into_owned()))
            })
            .collect()
    };
    let register = |host: &HostObject| {
        let id = labels
            .and_then(|labels| host.context.register(&host.plugin, kind, &name, &help, labels));
        if id.is_none() {
            tracing::warn!(plugin = &*host.plugin, kind, name = &*name, "metric refused");
        }
        id.and_then(|id| id.checked_add(1)).unwrap_or(0)
    };
    // SAFETY: the plugin passes the host it was given.
    unsafe { serve(host, "host.metric", || 0, register) }
}

impl HostContext {
    fn register(
        &self,
        plugin: &Arc<str>,
        kind: u32,
        name: &str,
        help: &str,
        labels: Labels,
    ) -> Option<u32> {
        let known = (abi::metric::COUNTER..=abi::metric::HISTOGRAM).contains(&kind);
        if !known || !metric_name_is_valid(name) {
            return None;
        }
        let mut metrics = self.shared.metrics.lock().unwrap_or_else(PoisonError::into_inner);
        let metrics = metrics.entry(Arc::clone(plugin)).or_default();
        if let Some(metric) = metrics.by_name.get(name) {
            if metric.kind != kind {
                return None;
            }
            if let Some(&id) = metric.series.get(&labels) {
                return Some(id);
            }
            let first = metric.series.keys().next().expect("a metric has a series");
            let names = |labels: &Labels| labels.iter().map(|(name, _)| name.clone()).collect();
            let (first, these): (Vec<String>, Vec<String>) = (names(first), names(&labels));
            if first != these {
                return None;
            }
        }
        if metrics.series >= SERIES_PER_PLUGIN_MAX {
            return None;
        }
        let id = self.shared.sink.register(plugin, kind, name, help, &labels)?;
        metrics.series += 1;
        let metric = metrics
            .by_name
            .entry(name.to_owned())
            .or_insert_with(|| Metric { kind, series: HashMap::new() });
        metric.series.insert(labels, id);
        Some(id)
    }
}

fn metric_name_is_valid(name: &str) -> bool {
    let first = name.bytes().next().is_some_and(|b| b.is_ascii_lowercase());
    let rest = name.bytes().all(|b| b.is_ascii_lowercase() || b.is_ascii_digit() || b == b'_');
    first && rest && name.len() <= METRIC_NAME_BYTES_MAX
}

unsafe extern "C" fn metric_add(host: *const abi::Host, id: u32, value: f64) {
    // SAFETY: the plugin passes the host it was given.
    unsafe {
        serve(
            host,
            "host.metric_add",
            || (),
            |host| {
                // 0 is what a refused metric got: adding to it does nothing.
                if let Some(id) = id.checked_sub(1)
                    && value.is_finite()
                {
                    host.context.shared.sink.add(id, value);
                }
            },
        );
    }
}

unsafe extern "C" fn shard(_host: *const abi::Host) -> u32 {
    SHARD.get().map_or(abi::NO_SHARD, |(index, _)| index)
}

unsafe extern "C" fn shards(host: *const abi::Host) -> u32 {
    // SAFETY: the plugin passes the host it was given, which is never freed.
    let host = unsafe { &*host.cast::<HostObject>() };
    SHARD.get().map_or(host.context.shards, |(_, count)| count)
}

unsafe extern "C" fn blocking(
    host: *const abi::Host,
    run: unsafe extern "C" fn(*mut c_void),
    data: *mut c_void,
) {
    let job = Job { run, data };
    let start = move |_: &'static HostObject| match runtime() {
        Some(handle) => drop(handle.spawn_blocking(move || drop(job))),
        None => drop(std::thread::spawn(move || drop(job))),
    };
    // SAFETY: the plugin passes the host it was given.
    unsafe { serve(host, "host.blocking", || (), start) }
}

/// A plugin's blocking work, run when dropped: once, whatever becomes of the thread pool.
struct Job {
    run: unsafe extern "C" fn(*mut c_void),
    data: *mut c_void,
}

// SAFETY: `blocking` says that the work is run on another thread.
unsafe impl Send for Job {}

impl Drop for Job {
    fn drop(&mut self) {
        // SAFETY: run exactly once, as `HostVt::blocking` says.
        unsafe { (self.run)(self.data) };
    }
}

unsafe extern "C" fn splice(host: *const abi::Host, a: abi::Io, b: abi::Io) -> abi::Future {
    // SAFETY: the plugin moves the stream here.
    let a = unsafe { stream::take(a) };
    // SAFETY: as above.
    let b = unsafe { stream::take(b) };
    let failed = || future::lend(async { spliced(Err(io::ErrorKind::InvalidInput.into())) });
    let join = move |host: &'static HostObject| match (a, b) {
        (Ok(a), Ok(b)) => future::lend(async move { spliced(join::both(a, b).await) }),
        (Err(error), _) | (_, Err(error)) => {
            tracing::warn!(plugin = &*host.plugin, %error, "a plugin splices what is no stream");
            failed()
        }
    };
    // SAFETY: the plugin passes the host it was given.
    unsafe { serve(host, "host.splice", failed, join) }
}

fn spliced(result: io::Result<(u64, u64)>) -> abi::SpliceOutcome {
    match result {
        Ok((a_to_b, b_to_a)) => abi::SpliceOutcome { err: 0, a_to_b, b_to_a },
        Err(error) => abi::SpliceOutcome { err: stream::errno(&error), a_to_b: 0, b_to_a: 0 },
    }
}

unsafe extern "C" fn dedicate(host: *const abi::Host, exchange: abi::Exchange) -> abi::Future {
    let refused = || future::lend(async { stream::failed_outcome(abi::failure::UNSUPPORTED, 0) });
    let refuse = move |_: &'static HostObject| {
        // SAFETY: the plugin moves the exchange here; no session has dedicated lanes.
        unsafe { exchange::discard(exchange) };
        refused()
    };
    // SAFETY: the plugin passes the host it was given.
    unsafe { serve(host, "host.dedicate", refused, refuse) }
}

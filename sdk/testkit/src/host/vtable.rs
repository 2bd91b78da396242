//! The host's own functions.

use std::ffi::c_void;
use std::future::Future;
use std::sync::Arc;
use std::task::Poll;

use sidelane_abi as abi;
use sidelane_plugin::failure;

use super::buf::text;
use super::exchange::reset_to_raw;
use super::future::{self, PluginFuture};
use super::io::PluginStream;
use super::lent::{drop_lent, lend, using};
use super::service::refused;
use super::waker::keep;
use super::world::{Job, Metric, World};
use crate::kit::LogLine;

/// The host as a plugin sees it. Never freed: a plugin may keep the pointer while the process lives.
#[repr(C)]
struct FakeHost {
    head: abi::Host,
    world: Arc<World>,
}

static VT: abi::HostVt = abi::HostVt {
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

pub(crate) fn new(world: &Arc<World>) -> *const abi::Host {
    let host = Box::new(FakeHost { head: abi::Host { vt: &VT }, world: world.clone() });
    Box::into_raw(host).cast()
}

/// # Safety
/// `host` came from [`new`].
unsafe fn world<'a>(host: *const abi::Host) -> &'a Arc<World> {
    // SAFETY: by this function's contract; never freed.
    unsafe { &(*host.cast::<FakeHost>()).world }
}

unsafe extern "C" fn spawn(host: *const abi::Host, raw: abi::Future) -> u32 {
    // SAFETY: a host of ours.
    let world = unsafe { world(host) };
    // SAFETY: moved to us; a task has no result.
    let future = unsafe { PluginFuture::new(raw, world.clone(), false, None) };
    world.spawn(Box::pin(async move {
        future.await;
    }));
    1
}

unsafe extern "C" fn now(host: *const abi::Host) -> u64 {
    // SAFETY: a host of ours.
    unsafe { world(host) }.state().now
}

struct TimerLent {
    world: Arc<World>,
    deadline: u64,
    set: Option<(u64, u64)>,
}

impl TimerLent {
    fn clear(&mut self) {
        if let Some(key) = self.set.take() {
            self.world.clear_timer(key);
        }
    }
}

impl Drop for TimerLent {
    fn drop(&mut self) {
        self.clear();
    }
}

static TIMER: abi::TimerVt = abi::TimerVt {
    size: size_of::<abi::TimerVt>(),
    poll: poll_timer,
    reset: reset_timer,
    drop: drop_lent::<TimerLent>,
};

unsafe extern "C" fn timer(host: *const abi::Host, deadline_ns: u64) -> abi::Timer {
    // SAFETY: a host of ours.
    let world = unsafe { world(host) };
    let own = TimerLent { world: world.clone(), deadline: deadline_ns, set: None };
    abi::Timer { data: lend(&world.ledger, "timer", own), vt: &TIMER }
}

unsafe extern "C" fn poll_timer(data: *mut c_void, waker: *const abi::Waker) -> u32 {
    // SAFETY: borrowed for the call.
    let waker = unsafe { keep(waker) };
    let poll = |own: &mut TimerLent| {
        own.clear();
        if own.world.state().now >= own.deadline {
            return abi::poll::READY;
        }
        own.set = Some(own.world.set_timer(own.deadline, waker));
        abi::poll::PENDING
    };
    // SAFETY: of this vtable.
    unsafe { using(data, poll) }.unwrap_or(abi::poll::READY)
}

unsafe extern "C" fn reset_timer(data: *mut c_void, deadline_ns: u64) {
    let reset = |own: &mut TimerLent| {
        own.clear();
        own.deadline = deadline_ns;
    };
    // SAFETY: of this vtable.
    unsafe { using(data, reset) };
}

unsafe extern "C" fn connect(host: *const abi::Host, address: abi::Str) -> abi::Future {
    // SAFETY: a host of ours.
    let world = unsafe { world(host) };
    // SAFETY: borrowed for the call.
    let address = unsafe { text(address) };
    let service = world.state().services.get(&address).cloned();
    match service {
        Some(service) => service.connect(world),
        None => future::to_plugin(world, |_| {
            Poll::Ready(refused(failure::SERVICE_UNREACHABLE, ECONNREFUSED))
        }),
    }
}

const ECONNREFUSED: i32 = 111;

unsafe extern "C" fn log(host: *const abi::Host, level: u32, target: abi::Str, line: abi::Str) {
    // SAFETY: borrowed for the call.
    let line = unsafe { LogLine { level, target: text(target), text: text(line) } };
    // SAFETY: a host of ours.
    unsafe { world(host) }.state().logs.push(line);
}

unsafe extern "C" fn log_level(_host: *const abi::Host) -> u32 {
    abi::level::TRACE
}

unsafe extern "C" fn metric(
    host: *const abi::Host,
    kind: u32,
    name: abi::Str,
    help: abi::Str,
    labels: *const abi::Header,
    labels_len: usize,
) -> u32 {
    // SAFETY: borrowed for the call.
    let (name, help) = unsafe { (text(name), text(help)) };
    let labels: Vec<(String, String)> = (0..labels_len)
        .map(|at| {
            // SAFETY: `labels_len` of them are lent for the call.
            let label = unsafe { labels.add(at) };
            // SAFETY: as above.
            let label = unsafe { label.read() };
            // SAFETY: as above.
            unsafe { (text(label.name), text(label.value)) }
        })
        .collect();
    let valid = |byte: u8| byte.is_ascii_lowercase() || byte.is_ascii_digit() || byte == b'_';
    if name.is_empty() || help.is_empty() || !name.bytes().all(valid) {
        return 0;
    }
    // SAFETY: a host of ours.
    let mut state = unsafe { world(host) }.state();
    let names = |labels: &[(String, String)]| -> Vec<String> {
        labels.iter().map(|(name, _)| name.clone()).collect()
    };
    let first = state.metrics.iter().find(|metric| metric.name == name);
    if first.is_some_and(|first| first.kind != kind || names(&first.labels) != names(&labels)) {
        return 0;
    }
    let known =
        state.metrics.iter().position(|metric| metric.name == name && metric.labels == labels);
    let index = known.unwrap_or_else(|| {
        state.metrics.push(Metric { kind, name, labels, value: 0.0 });
        state.metrics.len() - 1
    });
    u32::try_from(index + 1).unwrap_or(0)
}

unsafe extern "C" fn metric_add(host: *const abi::Host, id: u32, value: f64) {
    // SAFETY: a host of ours.
    let world = unsafe { world(host) };
    let mut state = world.state();
    match (id as usize).checked_sub(1).and_then(|index| state.metrics.get_mut(index)) {
        Some(metric) => metric.value += value,
        None => world.ledger.violation(format!("metric: no such id: {id}")),
    }
}

unsafe extern "C" fn shard(_host: *const abi::Host) -> u32 {
    0
}

unsafe extern "C" fn shards(_host: *const abi::Host) -> u32 {
    1
}

unsafe extern "C" fn blocking(
    host: *const abi::Host,
    run: unsafe extern "C" fn(*mut c_void),
    data: *mut c_void,
) {
    // SAFETY: a host of ours.
    let world = unsafe { world(host) };
    world.state().jobs.push_back(Job { run, data });
}

unsafe extern "C" fn splice(host: *const abi::Host, a: abi::Io, b: abi::Io) -> abi::Future {
    // SAFETY: a host of ours.
    let world = unsafe { world(host) };
    // SAFETY: moved to us.
    let (mut a, mut b) =
        unsafe { (PluginStream::new(a, world.clone()), PluginStream::new(b, world.clone())) };
    let mut joined = Box::pin(async move { tokio::io::copy_bidirectional(&mut a, &mut b).await });
    future::to_plugin(world, move |cx| {
        joined.as_mut().poll(cx).map(|joined| match joined {
            Ok((a_to_b, b_to_a)) => abi::SpliceOutcome { err: 0, a_to_b, b_to_a },
            Err(error) => abi::SpliceOutcome {
                err: error.raw_os_error().unwrap_or(ECONNRESET),
                a_to_b: 0,
                b_to_a: 0,
            },
        })
    })
}

const ECONNRESET: i32 = 104;

/// The fake host has no dedicated lanes: the exchange ends.
unsafe extern "C" fn dedicate(host: *const abi::Host, exchange: abi::Exchange) -> abi::Future {
    let reset = reset_to_raw(sidelane_plugin::Reset::new(failure::UNSUPPORTED));
    // SAFETY: moved to us, dropped once.
    unsafe {
        ((*exchange.send.vt).reset)(exchange.send.data, reset);
        ((*exchange.send.vt).drop)(exchange.send.data);
        ((*exchange.recv.vt).drop)(exchange.recv.data);
    }
    // SAFETY: a host of ours.
    let world = unsafe { world(host) };
    future::to_plugin(world, |_| Poll::Ready(refused(failure::UNSUPPORTED, 0)))
}

//! The host's thread and clock: a deterministic executor, first come first served.

use std::collections::{BTreeMap, VecDeque};
use std::ffi::c_void;
use std::future::Future;
use std::pin::{Pin, pin};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, Weak};
use std::task::{Context, Poll, Wake, Waker};

use super::service::TestService;
use crate::kit::LogLine;
use crate::ledger::Ledger;

type Task = Pin<Box<dyn Future<Output = ()> + Send>>;

/// Polls of one `block_on` after which the plugin is taken to spin: far above any test's need.
const POLLS_MAX: usize = 10_000_000;

/// The clock's start: any moment but 0.
const START_NS: u64 = 1_000_000_000;

/// The state of a fake host.
pub(crate) struct World {
    pub(crate) ledger: Arc<Ledger>,
    state: Mutex<State>,
}

pub(crate) struct State {
    pub(crate) now: u64,
    tasks: Vec<Slot>,
    ready: VecDeque<usize>,
    timers: BTreeMap<(u64, u64), Waker>,
    timers_made: u64,
    pub(crate) jobs: VecDeque<Job>,
    pub(crate) logs: Vec<LogLine>,
    pub(crate) metrics: Vec<Metric>,
    pub(crate) services: BTreeMap<String, TestService>,
}

struct Slot {
    task: Option<Task>,
    waker: Waker,
}

pub(crate) struct Metric {
    pub(crate) kind: u32,
    pub(crate) name: String,
    pub(crate) labels: Vec<(String, String)>,
    pub(crate) value: f64,
}

/// Work for a thread that may block; runs on this one.
pub(crate) struct Job {
    pub(crate) run: unsafe extern "C" fn(*mut c_void),
    pub(crate) data: *mut c_void,
}

// SAFETY: what a plugin hands to `blocking` may be sent to another thread.
unsafe impl Send for Job {}

impl World {
    pub(crate) fn new() -> Arc<Self> {
        let state = State {
            now: START_NS,
            tasks: Vec::new(),
            ready: VecDeque::new(),
            timers: BTreeMap::new(),
            timers_made: 0,
            jobs: VecDeque::new(),
            logs: Vec::new(),
            metrics: Vec::new(),
            services: BTreeMap::new(),
        };
        Arc::new(Self { ledger: Arc::default(), state: Mutex::new(state) })
    }

    pub(crate) fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    pub(crate) fn spawn(self: &Arc<Self>, task: Task) -> usize {
        let mut state = self.state();
        let id = state.tasks.len();
        let waker = Waker::from(Arc::new(TaskWaker { id, world: Arc::downgrade(self) }));
        state.tasks.push(Slot { task: Some(task), waker });
        state.ready.push_back(id);
        id
    }

    pub(crate) fn cancel(&self, id: usize) {
        let task = self.state().tasks[id].task.take();
        drop(task);
    }

    /// Polls every task once more.
    pub(crate) fn wake_all(&self) {
        let wakers: Vec<Waker> = self.state().tasks.iter().map(|slot| slot.waker.clone()).collect();
        wakers.into_iter().for_each(Waker::wake);
    }

    pub(crate) fn cancel_all(&self) {
        loop {
            let task = self.state().tasks.iter_mut().find_map(|slot| slot.task.take());
            if task.is_none() {
                return;
            }
        }
    }

    pub(crate) fn set_timer(&self, deadline: u64, waker: Waker) -> (u64, u64) {
        let mut state = self.state();
        state.timers_made += 1;
        let key = (deadline, state.timers_made);
        state.timers.insert(key, waker);
        key
    }

    pub(crate) fn clear_timer(&self, key: (u64, u64)) {
        let waker = self.state().timers.remove(&key);
        drop(waker);
    }

    /// Runs what is ready; true: something was.
    fn run_one(self: &Arc<Self>) -> bool {
        let job = self.state().jobs.pop_front();
        if let Some(job) = job {
            // SAFETY: handed over by the plugin to be run once.
            unsafe { (job.run)(job.data) };
            return true;
        }
        let Some(id) = self.state().ready.pop_front() else {
            return false;
        };
        let (task, waker) = {
            let slot = &mut self.state().tasks[id];
            (slot.task.take(), slot.waker.clone())
        };
        let Some(mut task) = task else {
            return true;
        };
        if task.as_mut().poll(&mut Context::from_waker(&waker)).is_pending() {
            self.state().tasks[id].task = Some(task);
        }
        true
    }

    /// Runs until nothing more can happen without the clock.
    pub(crate) fn run_until_idle(self: &Arc<Self>) {
        for _ in 0..POLLS_MAX {
            if !self.run_one() {
                return;
            }
        }
        panic!("the plugin wakes itself without end");
    }

    /// Moves the clock, firing what falls due on the way.
    pub(crate) fn advance(self: &Arc<Self>, nanos: u64) {
        self.run_until_idle();
        let end = self.state().now + nanos;
        while self.fire_next(end) {
            self.run_until_idle();
        }
        self.state().now = end;
    }

    /// Moves the clock to the next timer not after `limit` and wakes it.
    fn fire_next(&self, limit: u64) -> bool {
        let mut state = self.state();
        let Some(entry) = state.timers.first_entry().filter(|entry| entry.key().0 <= limit) else {
            return false;
        };
        let ((deadline, _), waker) = entry.remove_entry();
        state.now = state.now.max(deadline);
        drop(state);
        waker.wake();
        true
    }

    pub(crate) fn block_on<F: Future>(self: &Arc<Self>, future: F) -> F::Output {
        let mut future = pin!(future);
        let flag = Arc::new(Flag(AtomicBool::new(true)));
        let waker = Waker::from(flag.clone());
        for _ in 0..POLLS_MAX {
            if flag.0.swap(false, Ordering::Relaxed)
                && let Poll::Ready(output) = future.as_mut().poll(&mut Context::from_waker(&waker))
            {
                return output;
            }
            let woken = flag.0.load(Ordering::Relaxed);
            if !woken && !self.run_one() && !self.fire_next(u64::MAX) {
                panic!("stalled: the test waits for what cannot happen; log:\n{}", self.log_text());
            }
        }
        panic!("the plugin wakes itself without end");
    }

    fn log_text(&self) -> String {
        self.state().logs.iter().map(|line| format!("  {}: {}\n", line.target, line.text)).collect()
    }
}

struct TaskWaker {
    id: usize,
    world: Weak<World>,
}

impl Wake for TaskWaker {
    fn wake(self: Arc<Self>) {
        if let Some(world) = self.world.upgrade() {
            let mut state = world.state();
            if !state.ready.contains(&self.id) {
                state.ready.push_back(self.id);
            }
        }
    }
}

struct Flag(AtomicBool);

impl Wake for Flag {
    fn wake(self: Arc<Self>) {
        self.0.store(true, Ordering::Relaxed);
    }
}

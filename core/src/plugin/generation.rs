//! A generation: one loaded library with one configuration, from its first exchange to its last.
//!
//! Ownership is the state machine. The registry and every call hold an [`Arc<Generation>`]; when the
//! last is gone the plugin's tasks are aborted. The [`Anchor`] is held by the generation and by each
//! task; when the last of those is gone the plugin's instance is destroyed. The library stays
//! mapped. Knows nothing of the ABI's layouts.

use std::collections::{HashMap, VecDeque};
use std::sync::atomic::{AtomicBool, AtomicU8, AtomicU32, AtomicU64, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, OnceLock, PoisonError};
use std::task::Waker;
use std::time::{Duration, Instant};

use slab::Slab;
use tokio::task::AbortHandle;

use super::vtable::instance::Instance;
use super::{Born, Limits};

/// A loaded plugin that takes exchanges, or ends its last ones.
pub(super) struct Generation {
    pub(super) name: Arc<str>,
    pub(super) types: Vec<ServedType>,
    pub(super) record: Arc<Record>,
    anchor: Arc<Anchor>,
    parked: [Mutex<Slab<Waker>>; PARKING_LOTS],
}

/// How many locks the wakers of waiting calls are spread over, by thread, so that data-path threads
/// do not meet at one.
const PARKING_LOTS: usize = 16;

/// A `protocol_type` that a generation serves.
pub(super) struct ServedType {
    pub(super) name: Arc<str>,
    pub(super) born: Born,
    /// Index in the plugin's own list.
    pub(super) index: u32,
}

/// What must be gone before the plugin's instance is.
pub(super) struct Anchor {
    instance: OnceLock<Instance>,
    tasks: Mutex<Tasks>,
    /// Dropped after the instance.
    _retired: Retired,
}

#[derive(Default)]
struct Tasks {
    closed: bool,
    next: u64,
    /// `None` between the reservation of an id and the start of its task.
    running: HashMap<u64, Option<AbortHandle>>,
}

/// What stays known of a generation.
pub(super) struct Record {
    pub(super) name: Arc<str>,
    pub(super) version: String,
    pub(super) toolchain: String,
    pub(super) sha256: [u8; 32],
    state: AtomicU8,
    in_flight: AtomicUsize,
    panics: AtomicU64,
    quarantined: AtomicBool,
    /// How often running calls were to be polled on account of their generation; the last bit: they
    /// must end.
    calls: AtomicU32,
    limits: Limits,
    recent_panics: Mutex<VecDeque<Instant>>,
    draining_since: OnceLock<Instant>,
    slow: Mutex<SlowPolls>,
}

#[derive(Default)]
struct SlowPolls {
    told: Option<Instant>,
    untold: u64,
}

/// Least time between two log lines about slow polls of one generation.
const SLOW_POLL_EVERY: Duration = Duration::from_secs(1);

/// Where a generation is in its life.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum GenerationState {
    /// Takes new exchanges.
    Current,
    /// Ends the exchanges it has.
    Draining,
    /// Destroyed; its library stays mapped.
    Retired,
}

impl GenerationState {
    /// Returns its name in metrics and on the admin page.
    #[must_use]
    pub const fn name(self) -> &'static str {
        match self {
            Self::Current => "current",
            Self::Draining => "draining",
            Self::Retired => "retired",
        }
    }
}

struct Retired(Arc<Record>);

impl Drop for Retired {
    fn drop(&mut self) {
        self.0.state.store(GenerationState::Retired as u8, Ordering::Relaxed);
        // One whose configuration was refused never was a generation in use.
        if self.0.draining_since.get().is_some() {
            tracing::info!(
                plugin = &*self.0.name,
                version = self.0.version,
                "plugin generation destroyed"
            );
        }
    }
}

impl Record {
    pub(super) fn new(
        name: Arc<str>,
        stamp: &super::Stamp,
        sha256: [u8; 32],
        limits: Limits,
    ) -> Self {
        Self {
            name,
            version: stamp.version.clone(),
            toolchain: stamp.toolchain.clone(),
            sha256,
            state: AtomicU8::new(GenerationState::Current as u8),
            in_flight: AtomicUsize::new(0),
            panics: AtomicU64::new(0),
            quarantined: AtomicBool::new(false),
            calls: AtomicU32::new(0),
            limits,
            recent_panics: Mutex::default(),
            draining_since: OnceLock::new(),
            slow: Mutex::default(),
        }
    }

    pub(super) fn state(&self) -> GenerationState {
        match self.state.load(Ordering::Relaxed) {
            0 => GenerationState::Current,
            1 => GenerationState::Draining,
            _ => GenerationState::Retired,
        }
    }

    pub(super) fn in_flight(&self) -> usize {
        self.in_flight.load(Ordering::Relaxed)
    }

    pub(super) fn panics(&self) -> u64 {
        self.panics.load(Ordering::Relaxed)
    }

    pub(super) fn quarantined(&self) -> bool {
        self.quarantined.load(Ordering::Relaxed)
    }

    pub(super) fn draining_since(&self) -> Option<Instant> {
        self.draining_since.get().copied()
    }

    /// Counts a panic; too many within the window put the generation in quarantine for good.
    pub(super) fn panicked(&self, now: Instant) {
        let total = self.panics.fetch_add(1, Ordering::Relaxed) + 1;
        tracing::warn!(plugin = &*self.name, version = self.version, total, "plugin panicked");
        let mut recent = lock(&self.recent_panics);
        recent.push_back(now);
        while recent
            .front()
            .is_some_and(|&then| now.saturating_duration_since(then) > self.limits.panics_window)
        {
            recent.pop_front();
        }
        let over = recent.len() >= self.limits.panics_max.max(1) as usize;
        if over && !self.quarantined.swap(true, Ordering::Relaxed) {
            tracing::error!(
                plugin = &*self.name,
                version = self.version,
                panics = recent.len(),
                window = ?self.limits.panics_window,
                "plugin quarantined: its routes answer 503 until another version or configuration is loaded"
            );
        }
        if over {
            recent.clear();
        }
    }

    /// Tells of a poll that held its thread for too long, not more often than once a second.
    #[inline]
    pub(super) fn polled(&self, took: Duration) {
        if took > self.limits.slow_poll {
            self.polled_slowly(took);
        }
    }

    #[cold]
    fn polled_slowly(&self, took: Duration) {
        let mut slow = lock(&self.slow);
        if slow.told.is_some_and(|told| told.elapsed() < SLOW_POLL_EVERY) {
            slow.untold += 1;
            return;
        }
        let untold = std::mem::take(&mut slow.untold);
        slow.told = Some(Instant::now());
        drop(slow);
        tracing::warn!(
            plugin = &*self.name,
            ?took,
            bound = ?self.limits.slow_poll,
            untold,
            "a plugin's poll held up its thread"
        );
    }
}

impl Anchor {
    pub(super) fn new(record: Arc<Record>) -> Self {
        Self { instance: OnceLock::new(), tasks: Mutex::default(), _retired: Retired(record) }
    }

    pub(super) fn install(&self, instance: Instance) {
        if self.instance.set(instance).is_err() {
            unreachable!("a generation gets its instance once, from the one that makes it");
        }
    }

    /// Reserves a place for a task; `None` once the tasks are to end. The task keeps the pin.
    pub(super) fn reserve_task(self: &Arc<Self>) -> Option<TaskPin> {
        let mut tasks = lock(&self.tasks);
        if tasks.closed {
            return None;
        }
        tasks.next += 1;
        let id = tasks.next;
        tasks.running.insert(id, None);
        Some(TaskPin { anchor: Arc::clone(self), id })
    }

    /// Tells how to abort the task of that id, unless it has ended already.
    pub(super) fn task_started(&self, id: u64, handle: AbortHandle) {
        let mut tasks = lock(&self.tasks);
        let closed = tasks.closed;
        let Some(place) = tasks.running.get_mut(&id) else { return };
        if closed {
            drop(tasks);
            handle.abort();
        } else {
            *place = Some(handle);
        }
    }

    /// Aborts the tasks and refuses new ones.
    pub(super) fn close_tasks(&self) {
        let handles: Vec<AbortHandle> = {
            let mut tasks = lock(&self.tasks);
            tasks.closed = true;
            tasks.running.values().flatten().cloned().collect()
        };
        for handle in handles {
            handle.abort();
        }
    }
}

/// Keeps a plugin's instance for one of its tasks. Dropped after the task's future.
pub(super) struct TaskPin {
    pub(super) anchor: Arc<Anchor>,
    pub(super) id: u64,
}

impl Drop for TaskPin {
    fn drop(&mut self) {
        lock(&self.anchor.tasks).running.remove(&self.id);
    }
}

impl Generation {
    pub(super) fn new(record: Arc<Record>, anchor: Arc<Anchor>, types: Vec<ServedType>) -> Self {
        let parked = std::array::from_fn(|_| Mutex::default());
        Self { name: Arc::clone(&record.name), types, record, anchor, parked }
    }

    pub(super) fn instance(&self) -> &Instance {
        self.anchor.instance.get().expect("installed before the generation is made")
    }

    /// Begins to drain: no new exchanges, idle connections may go; what runs at `deadline` is ended.
    pub(super) fn drain(&self, deadline: Instant) {
        let record = &self.record;
        if record.draining_since.set(Instant::now()).is_err() {
            return;
        }
        record.state.store(GenerationState::Draining as u8, Ordering::Relaxed);
        let exchanges = record.in_flight();
        tracing::info!(
            plugin = &*self.name,
            version = record.version,
            exchanges,
            "plugin generation drains"
        );
        self.take_leave(deadline);
    }

    /// Tells the plugin and its running calls that what runs at `deadline` is cut.
    pub(super) fn take_leave(&self, deadline: Instant) {
        self.instance().drain(deadline);
        // SeqCst pairs with `park` followed by `called`: either the call sees the count change, or
        // `wake_all` sees the call's waker.
        self.record.calls.fetch_add(2, Ordering::SeqCst);
        self.wake_all();
    }

    fn wake_all(&self) {
        for lot in &self.parked {
            let wakers: Vec<Waker> = lock(lot).iter().map(|(_, waker)| waker.clone()).collect();
            wakers.into_iter().for_each(Waker::wake);
        }
    }

    /// Ends what is left: running calls resolve with `DRAINING`, tasks are aborted.
    pub(super) fn end(&self) {
        // SeqCst as in `take_leave`.
        self.record.calls.fetch_or(MUST_END, Ordering::SeqCst);
        self.anchor.close_tasks();
        self.wake_all();
    }

    /// How many tasks the plugin has running.
    #[cfg(test)]
    pub(super) fn tasks(&self) -> usize {
        lock(&self.anchor.tasks).running.len()
    }
}

impl Drop for Generation {
    fn drop(&mut self) {
        self.anchor.close_tasks();
    }
}

/// The bit of [`Record::calls`] that says that calls must end.
const MUST_END: u32 = 1;

/// What a generation has asked of its running calls so far.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(super) struct Called(u32);

impl Called {
    /// Whether the drain deadline has passed.
    pub(super) const fn must_end(self) -> bool {
        self.0 & MUST_END != 0
    }
}

/// An exchange's hold on its generation.
pub(super) struct ExchangePin {
    generation: Arc<Generation>,
}

impl ExchangePin {
    pub(super) fn new(generation: Arc<Generation>) -> Self {
        generation.record.in_flight.fetch_add(1, Ordering::Relaxed);
        Self { generation }
    }

    /// Changes when the call is to be polled on account of its generation.
    pub(super) fn called(&self) -> Called {
        Called(self.generation.record.calls.load(Ordering::SeqCst))
    }

    /// Leaves the waiting call's waker where [`Generation::end`] finds it. `place` is where it
    /// stands: the lot in the low bits, the key above.
    pub(super) fn park(&self, place: &mut Option<usize>, waker: &Waker) {
        if let Some(place) = *place {
            let mut lot = lock(&self.generation.parked[place % PARKING_LOTS]);
            let parked = lot.get_mut(place / PARKING_LOTS).expect("parked until `unpark`");
            parked.clone_from(waker);
        } else {
            let index =
                super::host::current_shard().map_or(0, |shard| shard as usize) % PARKING_LOTS;
            let key = lock(&self.generation.parked[index]).insert(waker.clone());
            *place = Some(key * PARKING_LOTS + index);
        }
    }

    /// Takes the waker back.
    pub(super) fn unpark(&self, place: &mut Option<usize>) {
        if let Some(place) = place.take() {
            let mut lot = lock(&self.generation.parked[place % PARKING_LOTS]);
            drop(lot.try_remove(place / PARKING_LOTS));
        }
    }
}

impl Drop for ExchangePin {
    fn drop(&mut self) {
        self.generation.record.in_flight.fetch_sub(1, Ordering::Relaxed);
    }
}

/// Locks; a panic elsewhere leaves these tables usable.
fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn record(limits: Limits) -> Record {
        let stamp = super::super::Stamp {
            name: "line".to_owned(),
            version: "1.2.3".to_owned(),
            toolchain: "rustc".to_owned(),
            abi: (0, 2),
        };
        Record::new(Arc::from("line"), &stamp, [0; 32], limits)
    }

    #[test]
    fn panics_outside_the_window_do_not_add_up() {
        let window = Duration::from_secs(60);
        let record = record(Limits { panics_max: 3, panics_window: window, ..Limits::default() });
        let begin = Instant::now();
        for panic in 0..10 {
            record.panicked(begin + panic * (window / 2 + Duration::from_secs(1)));
        }
        assert_eq!((record.panics(), record.quarantined()), (10, false));
        let late = begin + 100 * window;
        for panic in 0..3 {
            assert!(!record.quarantined());
            record.panicked(late + Duration::from_secs(panic));
        }
        assert!(record.quarantined());
        // For good: quiet times do not bring back a plugin that panics when used.
        record.panicked(late + 100 * window);
        assert!(record.quarantined());
    }

    #[test]
    fn slow_polls_are_told_once_a_second_and_counted_between() {
        let bound = Duration::from_millis(50);
        let record = record(Limits { slow_poll: bound, ..Limits::default() });
        record.polled(bound);
        assert!(lock(&record.slow).told.is_none(), "not above the bound");
        for _ in 0..5 {
            record.polled(bound * 2);
        }
        assert!(lock(&record.slow).told.is_some());
        assert_eq!(lock(&record.slow).untold, 4);
    }
}

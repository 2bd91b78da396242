//! Wakers in both directions.

use std::mem::ManuallyDrop;
use std::sync::Arc;
use std::task::{Context, RawWaker, RawWakerVTable, Waker};

use sidelane_abi as abi;

use super::{Counted, guard};

/// A task's waker as plugins see it. One is kept per polled plugin future, so that `will_wake` holds
/// on their side and a steady poll allocates nothing.
#[repr(C)]
pub(in crate::plugin) struct HostWaker {
    abi: abi::Waker,
    task: Waker,
    _counted: Counted,
}

// SAFETY: the raw pointer in `abi` leads to a static table and `Waker` is thread-safe.
unsafe impl Send for HostWaker {}
// SAFETY: as above; nothing in it changes after it is made.
unsafe impl Sync for HostWaker {}

static WAKER_VT: abi::WakerVt =
    abi::WakerVt { size: size_of::<abi::WakerVt>(), retain, release, wake };

impl HostWaker {
    /// Makes `slot` hold a waker for the task that polls, reusing what it holds where it can.
    pub(in crate::plugin) fn refresh<'a>(
        slot: &'a mut Option<Arc<Self>>,
        cx: &Context<'_>,
    ) -> &'a Arc<Self> {
        if slot.as_ref().is_some_and(|held| !held.is_for(cx)) {
            *slot = None;
        }
        slot.get_or_insert_with(|| {
            Arc::new(Self {
                abi: abi::Waker { vt: &raw const WAKER_VT },
                task: cx.waker().clone(),
                _counted: Counted::new(),
            })
        })
    }

    /// Whether it wakes the task that polls.
    pub(super) fn is_for(&self, cx: &Context<'_>) -> bool {
        self.task.will_wake(cx.waker())
    }

    /// Returns the pointer to hand to a plugin for the time of a call.
    pub(in crate::plugin) fn as_abi(this: &Arc<Self>) -> *const abi::Waker {
        Arc::as_ptr(this).cast()
    }
}

/// Runs `poll` with a context that wakes `waker`: where it is one of ours, the task's own waker.
///
/// # Safety
/// `waker` is valid for the call (plugin ABI, "Polling").
pub(in crate::plugin) unsafe fn with_context<T>(
    waker: *const abi::Waker,
    poll: impl FnOnce(&mut Context<'_>) -> T,
) -> T {
    if waker.is_null() {
        return poll(&mut Context::from_waker(Waker::noop()));
    }
    // SAFETY: a waker begins with its vtable pointer, valid for the call.
    let vt = unsafe { (*waker).vt };
    if std::ptr::eq(vt, &raw const WAKER_VT) {
        // SAFETY: only `HostWaker::refresh` makes objects with this vtable, a static of ours that
        // is not generic and so has one address; its `abi` is the first field.
        let host = unsafe { &*waker.cast::<HostWaker>() };
        return poll(&mut Context::from_waker(&host.task));
    }
    // SAFETY: the table's functions keep the contract of `RawWaker` as far as the plugin keeps that
    // of its waker: counted and usable from any thread. It is borrowed, hence never dropped here.
    let waker = ManuallyDrop::new(unsafe { Waker::from_raw(foreign(waker)) });
    poll(&mut Context::from_waker(&waker))
}

unsafe extern "C" fn retain(waker: *const abi::Waker) {
    // SAFETY: the caller owns a count of an `Arc<HostWaker>`, so it is alive.
    unsafe { Arc::increment_strong_count(waker.cast::<HostWaker>()) }
}

unsafe extern "C" fn release(waker: *const abi::Waker) {
    guard("waker.release", (), || {
        // SAFETY: the caller gives up a count that `retain` (or the host's call) gave it.
        unsafe { Arc::decrement_strong_count(waker.cast::<HostWaker>()) }
    });
}

unsafe extern "C" fn wake(waker: *const abi::Waker) {
    // SAFETY: the caller owns or borrows a count, so the object is alive for the call.
    let host = unsafe { &*waker.cast::<HostWaker>() };
    guard("waker.wake", (), || host.task.wake_by_ref());
}

static FOREIGN_VT: RawWakerVTable =
    RawWakerVTable::new(foreign_clone, foreign_wake, foreign_wake_by_ref, foreign_drop);

fn foreign(waker: *const abi::Waker) -> RawWaker {
    RawWaker::new(waker.cast(), &FOREIGN_VT)
}

/// # Safety
/// `data` is a plugin's waker, alive.
unsafe fn foreign_parts(data: *const ()) -> (*const abi::Waker, &'static abi::WakerVt) {
    let waker: *const abi::Waker = data.cast();
    // SAFETY: by this function's contract.
    let vt = unsafe { (*waker).vt };
    // SAFETY: a vtable is static, in a library that is never unmapped.
    (waker, unsafe { &*vt })
}

unsafe fn foreign_clone(data: *const ()) -> RawWaker {
    // SAFETY: by `RawWaker`'s contract `data` is a plugin's waker that someone owns or borrows.
    let (waker, vt) = unsafe { foreign_parts(data) };
    // SAFETY: as above.
    unsafe { (vt.retain)(waker) };
    foreign(waker)
}

unsafe fn foreign_wake(data: *const ()) {
    // SAFETY: `RawWaker`'s contract: by value, so this owner wakes and ends.
    unsafe { foreign_wake_by_ref(data) };
    // SAFETY: as above.
    unsafe { foreign_drop(data) };
}

unsafe fn foreign_wake_by_ref(data: *const ()) {
    // SAFETY: as in `foreign_clone`.
    let (waker, vt) = unsafe { foreign_parts(data) };
    // SAFETY: as in `foreign_clone`.
    unsafe { (vt.wake)(waker) };
}

unsafe fn foreign_drop(data: *const ()) {
    // SAFETY: as in `foreign_clone`.
    let (waker, vt) = unsafe { foreign_parts(data) };
    // SAFETY: the owner that `foreign_clone` made ends here.
    unsafe { (vt.release)(waker) };
}

#[cfg(test)]
mod tests {
    use std::sync::atomic::{AtomicUsize, Ordering};
    use std::task::Wake;

    use super::super::lent_objects;
    use super::*;

    /// A plugin's waker: counts owners and wakes.
    #[repr(C)]
    struct PluginWaker {
        abi: abi::Waker,
        owners: AtomicUsize,
        wakes: AtomicUsize,
    }

    static PLUGIN_VT: abi::WakerVt = abi::WakerVt {
        size: size_of::<abi::WakerVt>(),
        retain: plugin_retain,
        release: plugin_release,
        wake: plugin_wake,
    };

    unsafe extern "C" fn plugin_retain(waker: *const abi::Waker) {
        // SAFETY: called with a `PluginWaker` that outlives the test's wakers.
        unsafe { &*waker.cast::<PluginWaker>() }.owners.fetch_add(1, Ordering::SeqCst);
    }

    unsafe extern "C" fn plugin_release(waker: *const abi::Waker) {
        // SAFETY: as above.
        unsafe { &*waker.cast::<PluginWaker>() }.owners.fetch_sub(1, Ordering::SeqCst);
    }

    unsafe extern "C" fn plugin_wake(waker: *const abi::Waker) {
        // SAFETY: as above.
        unsafe { &*waker.cast::<PluginWaker>() }.wakes.fetch_add(1, Ordering::SeqCst);
    }

    /// The waker that a host object gets when it is polled with `waker`.
    fn seen(waker: *const abi::Waker) -> Waker {
        // SAFETY: the tests' wakers are alive.
        unsafe { with_context(waker, |cx| cx.waker().clone()) }
    }

    #[test]
    fn a_plugins_waker_is_owned_as_often_as_it_is_kept() {
        let plugin = PluginWaker {
            abi: abi::Waker { vt: &raw const PLUGIN_VT },
            owners: AtomicUsize::new(1),
            wakes: AtomicUsize::new(0),
        };
        let pointer = (&raw const plugin).cast();
        let (first, second) = (seen(pointer), seen(pointer));
        assert_eq!(plugin.owners.load(Ordering::SeqCst), 3);
        assert!(first.will_wake(&second));
        first.wake_by_ref();
        first.wake();
        drop(second);
        assert_eq!(plugin.wakes.load(Ordering::SeqCst), 2);
        assert_eq!(plugin.owners.load(Ordering::SeqCst), 1);
    }

    struct Task;

    impl Wake for Task {
        fn wake(self: Arc<Self>) {}
    }

    #[test]
    fn the_hosts_own_waker_comes_back_as_the_tasks() {
        let before = lent_objects();
        let task = Waker::from(Arc::new(Task));
        let other = Waker::from(Arc::new(Task));
        let mut slot = None;
        let pointer = HostWaker::as_abi(HostWaker::refresh(&mut slot, &Context::from_waker(&task)));
        assert!(seen(pointer).will_wake(&task));
        // The same task keeps the object, another task gets another.
        let again = HostWaker::as_abi(HostWaker::refresh(&mut slot, &Context::from_waker(&task)));
        assert_eq!(pointer, again);
        // SAFETY: the object is alive.
        unsafe { retain(pointer) };
        let new = HostWaker::as_abi(HostWaker::refresh(&mut slot, &Context::from_waker(&other)));
        assert!(seen(new).will_wake(&other) && seen(pointer).will_wake(&task));
        // SAFETY: retained above.
        unsafe { release(pointer) };
        assert_eq!(lent_objects(), before + 1);
        drop(slot);
        assert_eq!(lent_objects(), before);
    }
}

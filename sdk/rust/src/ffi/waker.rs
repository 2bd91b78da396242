//! Wakers in both directions.
//!
//! The host's waker becomes a [`Waker`] without an allocation, and the same pointer goes back when the
//! plugin polls something of the host's with it. A waker of the plugin's own making (a `select`'s, a
//! `FuturesUnordered`'s) is wrapped once and kept beside the object it polls.

use std::mem::ManuallyDrop;
use std::sync::Arc;
use std::task::{Context, RawWaker, RawWakerVTable, Waker};

use sidelane_abi as abi;

use super::context::contain;

/// Runs `f` with a context for the host's waker.
///
/// # Safety
/// `waker` is valid for the call (H2).
pub(crate) unsafe fn with_context<R>(
    waker: *const abi::Waker,
    f: impl FnOnce(&mut Context<'_>) -> R,
) -> R {
    // SAFETY: the vtable below takes such a pointer. Borrowed: `ManuallyDrop` keeps it from being
    // released, and a clone retains.
    let borrowed = ManuallyDrop::new(unsafe { Waker::new(waker.cast(), &FOREIGN) });
    f(&mut Context::from_waker(&borrowed))
}

static FOREIGN: RawWakerVTable = RawWakerVTable::new(
    |data| {
        let waker = data.cast::<abi::Waker>();
        // SAFETY: valid while it is owned or borrowed; `clone` is called on one that is.
        unsafe { ((*(*waker).vt).retain)(waker) };
        RawWaker::new(data, &FOREIGN)
    },
    |data| {
        let waker = data.cast::<abi::Waker>();
        // SAFETY: owned by the caller, which gives it up.
        unsafe { ((*(*waker).vt).wake)(waker) };
        // SAFETY: as above; released once.
        unsafe { ((*(*waker).vt).release)(waker) };
    },
    |data| {
        let waker = data.cast::<abi::Waker>();
        // SAFETY: valid while it is owned or borrowed.
        unsafe { ((*(*waker).vt).wake)(waker) };
    },
    |data| {
        let waker = data.cast::<abi::Waker>();
        // SAFETY: owned by the caller, which gives it up.
        unsafe { ((*(*waker).vt).release)(waker) };
    },
);

/// Where an object keeps the wrapper of the last waker that was not the host's own.
#[derive(Default)]
pub(crate) struct WakerSlot {
    wrapped: Option<Arc<Wrapped>>,
}

impl WakerSlot {
    pub(crate) const fn new() -> Self {
        Self { wrapped: None }
    }

    /// Returns what to pass to the host: valid while `cx` is borrowed and until the next call.
    pub(crate) fn lend(&mut self, cx: &Context<'_>) -> *const abi::Waker {
        let waker = cx.waker();
        if std::ptr::eq(waker.vtable(), &raw const FOREIGN) {
            return waker.data().cast();
        }
        match &self.wrapped {
            Some(wrapped) if wrapped.waker.will_wake(waker) => Arc::as_ptr(wrapped).cast(),
            _ => {
                let wrapped =
                    Arc::new(Wrapped { head: abi::Waker { vt: &WRAPPED }, waker: waker.clone() });
                Arc::as_ptr(self.wrapped.insert(wrapped)).cast()
            }
        }
    }
}

#[repr(C)]
struct Wrapped {
    head: abi::Waker,
    waker: Waker,
}

// SAFETY: the head's pointer leads to an immutable static, and a `Waker` is `Send` and `Sync`.
unsafe impl Send for Wrapped {}
// SAFETY: as above.
unsafe impl Sync for Wrapped {}

static WRAPPED: abi::WakerVt = abi::WakerVt {
    size: size_of::<abi::WakerVt>(),
    retain: retain_wrapped,
    release: release_wrapped,
    wake: wake_wrapped,
};

unsafe extern "C" fn retain_wrapped(waker: *const abi::Waker) {
    // SAFETY: of `WRAPPED`, so made by `Arc`, and the caller holds or borrows an owner.
    unsafe { Arc::increment_strong_count(waker.cast::<Wrapped>()) }
}

unsafe extern "C" fn release_wrapped(waker: *const abi::Waker) {
    // SAFETY: as above; the caller gives its owner up.
    let owner = unsafe { Arc::from_raw(waker.cast::<Wrapped>()) };
    contain(move || drop(owner));
}

unsafe extern "C" fn wake_wrapped(waker: *const abi::Waker) {
    // SAFETY: as above; borrowed for the call.
    let wrapped = unsafe { &*waker.cast::<Wrapped>() };
    contain(|| wrapped.waker.wake_by_ref());
}

#[cfg(test)]
mod tests {
    use std::sync::atomic::{AtomicUsize, Ordering};

    use super::*;

    struct Count(AtomicUsize);
    impl std::task::Wake for Count {
        fn wake(self: Arc<Self>) {
            self.0.fetch_add(1, Ordering::Relaxed);
        }
    }

    #[test]
    fn own_waker_is_wrapped_once_and_comes_back() {
        let count = Arc::new(Count(AtomicUsize::new(0)));
        let waker = Waker::from(count.clone());
        let mut slot = WakerSlot::new();
        let cx = Context::from_waker(&waker);
        let first = slot.lend(&cx);
        assert_eq!(first, slot.lend(&cx));
        // SAFETY: `first` is valid while the slot is not lent with another waker.
        unsafe {
            with_context(first, |cx| {
                let mut inner = WakerSlot::new();
                assert_eq!(inner.lend(cx), first, "the original pointer goes back");
                let kept = cx.waker().clone();
                kept.wake();
            });
        }
        assert_eq!(count.0.load(Ordering::Relaxed), 1);
        drop(slot);
        drop(waker);
        assert_eq!(Arc::strong_count(&count), 1);
    }
}

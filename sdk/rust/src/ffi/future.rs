//! Futures in both directions.

use std::ffi::c_void;
use std::future::Future;
use std::marker::PhantomData;
use std::mem::MaybeUninit;
use std::pin::Pin;
use std::ptr;
use std::task::{Context, Poll};

use sidelane_abi as abi;

use super::context;
use super::host::Host;
use super::waker::{WakerSlot, with_context};

/// A future of the host's that fills in an `O`.
pub(crate) struct Foreign<O> {
    raw: abi::Future,
    slot: WakerSlot,
    done: bool,
    out: PhantomData<fn() -> O>,
}

// SAFETY: H3; `&self` reaches nothing.
unsafe impl<O> Send for Foreign<O> {}
// SAFETY: as above.
unsafe impl<O> Sync for Foreign<O> {}

impl<O> Foreign<O> {
    /// # Safety
    /// `raw` is moved to the caller (H1) and its `out` is an `O`.
    pub(crate) const unsafe fn new(raw: abi::Future) -> Self {
        Self { raw, slot: WakerSlot::new(), done: false, out: PhantomData }
    }

    /// `None`: the host failed, or it was polled again after its end.
    pub(crate) fn poll(&mut self, cx: &Context<'_>) -> Poll<Option<O>> {
        if self.done {
            return Poll::Ready(None);
        }
        let mut out = MaybeUninit::<O>::uninit();
        let waker = self.slot.lend(cx);
        // SAFETY: owned (H1), and `out` has the type that `new` was promised.
        let tag = unsafe { ((*self.raw.vt).poll)(self.raw.data, waker, out.as_mut_ptr().cast()) };
        if tag == abi::poll::PENDING {
            return Poll::Pending;
        }
        self.done = true;
        if tag != abi::poll::READY {
            return Poll::Ready(None);
        }
        // SAFETY: filled in after READY (`abi::FutureVt::poll`).
        Poll::Ready(Some(unsafe { out.assume_init() }))
    }
}

impl<O> Drop for Foreign<O> {
    fn drop(&mut self) {
        // SAFETY: owned (H1), dropped once.
        unsafe { ((*self.raw.vt).drop)(self.raw.data) }
    }
}

/// Moves a task to the host: a future without a result.
pub(crate) fn task<F: Future<Output = ()> + Send + 'static>(host: Host, future: F) -> abi::Future {
    let data = Box::into_raw(Box::new(Task { host, future }));
    abi::Future { data: data.cast(), vt: const { &Task::<F>::VT } }
}

struct Task<F> {
    host: Host,
    future: F,
}

impl<F: Future<Output = ()> + Send + 'static> Task<F> {
    const VT: abi::FutureVt = abi::FutureVt {
        size: size_of::<abi::FutureVt>(),
        poll: poll_task::<F>,
        drop: drop_boxed::<Self>,
    };
}

unsafe extern "C" fn poll_task<F: Future<Output = ()>>(
    data: *mut c_void,
    waker: *const abi::Waker,
    _out: *mut c_void,
) -> u32 {
    // SAFETY: the data of this vtable, polled by one thread at a time.
    let task = unsafe { &mut *data.cast::<Task<F>>() };
    // SAFETY: the box is never moved out of.
    let future = unsafe { Pin::new_unchecked(&mut task.future) };
    // SAFETY: the waker is borrowed for the call (H2).
    let polled = context::call(task.host, || unsafe { with_context(waker, |cx| future.poll(cx)) });
    match polled {
        Ok(Poll::Pending) => abi::poll::PENDING,
        Ok(Poll::Ready(())) => abi::poll::READY,
        Err(context::Panicked) => abi::poll::PANICKED,
    }
}

/// What a boxed future of the plugin's knows of its host.
pub(crate) trait Hosted {
    fn host(&self) -> Host;
}

impl<F> Hosted for Task<F> {
    fn host(&self) -> Host {
        self.host
    }
}

/// Drops a `Box<T>`.
pub(crate) unsafe extern "C" fn drop_boxed<T: Hosted>(data: *mut c_void) {
    // SAFETY: the data of a vtable for boxes of `T`, dropped once.
    let boxed = unsafe { Box::from_raw(data.cast::<T>()) };
    let host = boxed.host();
    let _ = context::call(host, move || drop(boxed));
}

/// Returns a future for a handler that panicked before it made one.
pub(crate) const fn panicked() -> abi::Future {
    static VT: abi::FutureVt =
        abi::FutureVt { size: size_of::<abi::FutureVt>(), poll: poll_panicked, drop: drop_nothing };
    abi::Future { data: ptr::null_mut(), vt: &VT }
}

unsafe extern "C" fn poll_panicked(_: *mut c_void, _: *const abi::Waker, _: *mut c_void) -> u32 {
    abi::poll::PANICKED
}

unsafe extern "C" fn drop_nothing(_: *mut c_void) {}

//! Futures in both directions.

use std::ffi::c_void;
use std::future::Future;
use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll};
use std::time::Instant;

use sidelane_abi as abi;

use super::waker::{HostWaker, with_context};
use super::{Counted, guard};
use crate::plugin::host::HostObject;

/// A plugin's future that core polls. Dropping it cancels it.
pub(in crate::plugin) struct PluginFuture {
    raw: abi::Future,
    waker: Option<Arc<HostWaker>>,
    /// The last poll made `waker` anew.
    has_new_waker: bool,
    host: &'static HostObject,
}

// SAFETY: everything the ABI moves may be sent to another thread (plugin ABI, "Threads").
unsafe impl Send for PluginFuture {}

/// How a poll of a plugin's future went.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(in crate::plugin) enum Polled {
    Pending,
    Ready,
    Panicked,
}

impl PluginFuture {
    /// Takes over a future that a plugin moved here; `None` where it is none.
    ///
    /// # Safety
    /// `raw` was moved here by the plugin that `host` was lent to.
    pub(in crate::plugin) unsafe fn new(
        raw: abi::Future,
        host: &'static HostObject,
    ) -> Option<Self> {
        if raw.vt.is_null() {
            return None;
        }
        // SAFETY: a future's vtable is static.
        let size = unsafe { (*raw.vt).size };
        (size >= size_of::<abi::FutureVt>()).then_some(Self {
            raw,
            waker: None,
            has_new_waker: false,
            host,
        })
    }

    /// Whether the last poll came with another waker than the one before.
    pub(super) fn has_new_waker(&self) -> bool {
        self.has_new_waker
    }

    /// Polls. After anything but [`Polled::Pending`] the future may only be dropped.
    ///
    /// # Safety
    /// `out` is what the function that made the future says it resolves to, writable, or null where
    /// that says so.
    pub(in crate::plugin) unsafe fn poll(
        &mut self,
        cx: &mut Context<'_>,
        out: *mut c_void,
    ) -> Polled {
        // Asked of the waker, not of its address: a new one may stand where the last one stood.
        self.has_new_waker = self.waker.as_ref().is_none_or(|held| !held.is_for(cx));
        let waker = HostWaker::as_abi(HostWaker::refresh(&mut self.waker, cx));
        // SAFETY: the vtable is static and large enough (`new`).
        let vt = unsafe { &*self.raw.vt };
        let entered = self.host.enter();
        let begun = Instant::now();
        // SAFETY: the future is alive and not done (this function's contract); the waker lives as
        // long as `self.waker`; `out` is by this function's contract.
        let tag = unsafe { (vt.poll)(self.raw.data, waker, out) };
        self.host.polled(begun.elapsed());
        drop(entered);
        match tag {
            abi::poll::PENDING => Polled::Pending,
            abi::poll::READY => Polled::Ready,
            abi::poll::PANICKED => {
                self.host.panicked();
                Polled::Panicked
            }
            other => {
                self.host.unknown_tag("future.poll", other);
                Polled::Panicked
            }
        }
    }
}

impl Drop for PluginFuture {
    fn drop(&mut self) {
        let entered = self.host.enter();
        // SAFETY: the vtable is static and large enough (`new`).
        let vt = unsafe { &*self.raw.vt };
        // SAFETY: the future was moved here (`new`) and is dropped once.
        unsafe { (vt.drop)(self.raw.data) };
        drop(entered);
    }
}

/// Makes a plugin's future of one of core's. Its output is the `out` struct of the ABI.
pub(in crate::plugin) fn lend<F>(future: F) -> abi::Future
where
    F: Future + Send + 'static,
{
    let lent = Box::new(Lent { future: Some(future), _counted: Counted::new() });
    abi::Future { data: Box::into_raw(lent).cast(), vt: &Lent::<F>::VT }
}

struct Lent<F> {
    /// Pinned: the box is leaked and not moved out of.
    future: Option<F>,
    _counted: Counted,
}

impl<F: Future + Send + 'static> Lent<F> {
    const VT: abi::FutureVt =
        abi::FutureVt { size: size_of::<abi::FutureVt>(), poll: Self::poll, drop: Self::drop };

    unsafe extern "C" fn poll(
        data: *mut c_void,
        waker: *const abi::Waker,
        out: *mut c_void,
    ) -> u32 {
        // SAFETY: `data` is what `lend` leaked; one thread uses it at a time.
        let lent = unsafe { &mut *data.cast::<Self>() };
        guard("future.poll", abi::poll::PANICKED, || {
            let Some(future) = lent.future.as_mut() else { return abi::poll::PANICKED };
            // SAFETY: the future lies in a leaked box and is dropped in place.
            let future = unsafe { Pin::new_unchecked(future) };
            // SAFETY: the plugin lends the waker for the call.
            match unsafe { with_context(waker, |cx| future.poll(cx)) } {
                Poll::Pending => abi::poll::PENDING,
                Poll::Ready(output) => {
                    lent.future = None;
                    if !out.is_null() {
                        // SAFETY: `out` is for this future's output (plugin ABI, `FutureVt::poll`).
                        unsafe { out.cast::<F::Output>().write(output) };
                    }
                    abi::poll::READY
                }
            }
        })
    }

    unsafe extern "C" fn drop(data: *mut c_void) {
        // SAFETY: `data` is what `lend` leaked, dropped once.
        let lent = unsafe { Box::from_raw(data.cast::<Self>()) };
        guard("future.drop", (), || drop(lent));
    }
}

//! One running call into a plugin, with everything the plugin borrows for it.

use std::future::Future;
use std::pin::Pin;
use std::ptr::NonNull;
use std::sync::Arc;
use std::task::{Context, Poll};

use sidelane_abi as abi;

use super::exchange::{Failure, Meta, Owner};
use super::future::{PluginFuture, Polled};
use super::http::PreparedHead;
use crate::plugin::generation::ExchangePin;

/// How a call ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct CallEnd {
    /// One of [`sidelane_abi::failure`]; `NONE`: ended well.
    pub code: u32,
    /// The plugin panicked: it may have left the client without an answer.
    pub panicked: bool,
}

/// A plugin's work on one exchange. Dropping it cancels: the plugin's future goes first, then what it
/// borrowed, then the pin on the plugin's generation.
#[must_use = "a call does nothing unless polled, and is cancelled when dropped"]
pub struct Call {
    /// Invariant: leaked from a box by `start`, given back in `drop`. A raw pointer because the
    /// plugin holds pointers into `lent` meanwhile, which a box would not permit.
    parts: NonNull<Parts>,
}

struct Parts {
    running: Running,
    lent: Lent,
    /// Last: the generation is let go when nothing of the call is left.
    pin: ExchangePin,
}

struct Running {
    /// `None` once done.
    future: Option<PluginFuture>,
    /// What `future` resolves to; it writes here.
    end: CallEnd,
    /// Where the generation finds this call's waker when its exchanges must end.
    parked: Option<usize>,
}

/// What a plugin borrows until its future is dropped. Not touched while that lives.
#[derive(Default)]
pub(super) struct Lent {
    pub(super) head: Option<PreparedHead>,
    pub(super) meta: Option<Meta>,
    pub(super) failure: Option<Failure>,
    /// Owner of the meta record that the opener gave; only kept.
    pub(super) _opener: Option<Arc<dyn Owner>>,
}

impl Lent {
    pub(super) fn head(&self) -> *const abi::RequestHead {
        self.head.as_ref().map_or(std::ptr::null(), PreparedHead::as_abi)
    }

    pub(super) fn meta(&self) -> *const abi::Meta {
        self.meta.as_ref().map_or(std::ptr::null(), Meta::as_abi)
    }

    pub(super) fn failure(&self) -> *const abi::Failure {
        self.failure.as_ref().map_or(std::ptr::null(), Failure::as_abi)
    }
}

// SAFETY: everything in it is `Send` (`PluginFuture` by the ABI's rules); the pointer is owned.
unsafe impl Send for Call {}

impl Call {
    /// Makes a call: `begin` gets what is lent, at the place where it stays, and asks the plugin for
    /// its future.
    pub(super) fn start(
        pin: ExchangePin,
        lent: Lent,
        begin: impl FnOnce(&Lent) -> Option<PluginFuture>,
    ) -> Self {
        let end = CallEnd { code: abi::failure::PLUGIN_FAILED, panicked: false };
        let running = Running { future: None, end, parked: None };
        let parts = NonNull::from(Box::leak(Box::new(Parts { running, lent, pin })));
        let call = Self { parts };
        // SAFETY: just leaked; nobody else knows of it.
        let lent = unsafe { &(*parts.as_ptr()).lent };
        let future = begin(lent);
        // SAFETY: as above; `running` is apart from what the plugin may point to.
        unsafe { (*parts.as_ptr()).running.future = future };
        call
    }

    /// Makes a call that has ended already.
    pub(super) fn ended(pin: ExchangePin, code: u32) -> Self {
        let call = Self::start(pin, Lent::default(), |_| None);
        // SAFETY: `running` is ours alone.
        unsafe { (*call.parts.as_ptr()).running.end.code = code };
        call
    }
}

impl Future for Call {
    type Output = CallEnd;

    fn poll(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<CallEnd> {
        // SAFETY: leaked by `start`, alive until `drop`; references to `running` and `pin` only,
        // which no plugin has a pointer to.
        let running = unsafe { &mut (*self.parts.as_ptr()).running };
        // SAFETY: as above.
        let pin = unsafe { &(*self.parts.as_ptr()).pin };
        let Some(future) = running.future.as_mut() else { return Poll::Ready(running.end) };
        let called = pin.called();
        if called.must_end() {
            running.end.code = abi::failure::DRAINING;
            running.finish(pin);
            return Poll::Ready(running.end);
        }
        let out = &raw mut running.end.code;
        // SAFETY: entry points that return a future resolve it with a `u32` (plugin ABI,
        // `PluginVt`), and it is not done: it is taken when it is.
        match unsafe { future.poll(cx, out.cast()) } {
            Polled::Pending => {
                if running.parked.is_some() && !future.has_new_waker() {
                    return Poll::Pending;
                }
                pin.park(&mut running.parked, cx.waker());
                // Between the look above and the parking the generation may have been told to leave.
                if pin.called() != called {
                    cx.waker().wake_by_ref();
                }
                return Poll::Pending;
            }
            Polled::Ready => {}
            Polled::Panicked => {
                running.end = CallEnd { code: abi::failure::PLUGIN_FAILED, panicked: true };
            }
        }
        running.finish(pin);
        Poll::Ready(running.end)
    }
}

impl Running {
    fn finish(&mut self, pin: &ExchangePin) {
        self.future = None;
        pin.unpark(&mut self.parked);
    }
}

impl Drop for Call {
    fn drop(&mut self) {
        // SAFETY: leaked by `start`, alive. As in `poll`, nothing that the plugin points to is
        // referred to while its future lives.
        let running = unsafe { &mut (*self.parts.as_ptr()).running };
        // SAFETY: as above.
        let pin = unsafe { &(*self.parts.as_ptr()).pin };
        running.finish(pin);
        // SAFETY: leaked by `start` and given back here only; the plugin's future is gone. What was
        // lent goes with the box, and the pin, its last field, at the end.
        drop(unsafe { Box::from_raw(self.parts.as_ptr()) });
    }
}

//! Futures: a plugin's, as the executor runs them, and the host's, as a plugin polls them.

use std::any::Any;
use std::ffi::c_void;
use std::future::Future;
use std::pin::Pin;
use std::ptr;
use std::sync::Arc;
use std::task::{Context, Poll};

use sidelane_abi as abi;

use super::lent::{drop_lent, lend, using};
use super::waker::{HostWaker, keep};
use super::world::World;
use crate::kit::Outcome;

/// A future of the plugin's.
pub(crate) struct PluginFuture {
    raw: abi::Future,
    world: Arc<World>,
    waker: Option<Arc<HostWaker>>,
    /// Whether `out` is a failure code; a spawned task's is null.
    coded: bool,
    done: bool,
    /// What the plugin borrows until this is dropped. Behind the future: see `Drop`.
    _borrowed: Option<Box<dyn Any + Send>>,
}

// SAFETY: what is moved between host and plugin may be sent to another thread.
unsafe impl Send for PluginFuture {}

impl PluginFuture {
    /// # Safety
    /// `raw` is moved to the caller and its `out` is a `u32` where `coded`.
    pub(crate) unsafe fn new(
        raw: abi::Future,
        world: Arc<World>,
        coded: bool,
        borrowed: Option<Box<dyn Any + Send>>,
    ) -> Self {
        Self { raw, world, waker: None, coded, done: false, _borrowed: borrowed }
    }
}

impl Future for PluginFuture {
    type Output = Outcome;

    fn poll(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Outcome> {
        assert!(!self.done, "polled after its end");
        if !self.waker.as_ref().is_some_and(|waker| waker.will_wake(cx.waker())) {
            self.waker = Some(HostWaker::new(cx.waker().clone(), &self.world.ledger));
        }
        let waker = self.waker.as_ref().map_or(ptr::null(), Arc::as_ptr).cast();
        let mut code = u32::MAX;
        let out = if self.coded { (&raw mut code).cast() } else { ptr::null_mut() };
        // SAFETY: owned; waker and `out` are valid for the call.
        let tag = unsafe { ((*self.raw.vt).poll)(self.raw.data, waker, out) };
        self.done = tag != abi::poll::PENDING;
        match tag {
            abi::poll::PENDING => Poll::Pending,
            abi::poll::READY => Poll::Ready(Outcome::Ended(code)),
            abi::poll::PANICKED => Poll::Ready(Outcome::Panicked),
            other => {
                self.world.ledger.violation(format!("a future's poll returned {other}"));
                Poll::Ready(Outcome::Panicked)
            }
        }
    }
}

impl Drop for PluginFuture {
    fn drop(&mut self) {
        // SAFETY: owned, dropped once; what it borrows goes after it, with the fields.
        unsafe { ((*self.raw.vt).drop)(self.raw.data) }
    }
}

type Polled<O> = Box<dyn FnMut(&mut Context<'_>) -> Poll<O> + Send>;

struct HostFuture<O> {
    poll: Polled<O>,
    done: bool,
}

/// Lends a future that resolves to an `O`, which is what the plugin takes `out` for.
pub(crate) fn to_plugin<O: 'static>(
    world: &Arc<World>,
    poll: impl FnMut(&mut Context<'_>) -> Poll<O> + Send + 'static,
) -> abi::Future {
    let data = lend(&world.ledger, "future", HostFuture::<O> { poll: Box::new(poll), done: false });
    abi::Future { data, vt: const { &HostFuture::<O>::VT } }
}

impl<O: 'static> HostFuture<O> {
    const VT: abi::FutureVt = abi::FutureVt {
        size: size_of::<abi::FutureVt>(),
        poll: poll_host::<O>,
        drop: drop_lent::<Self>,
    };
}

unsafe extern "C" fn poll_host<O: 'static>(
    data: *mut c_void,
    waker: *const abi::Waker,
    out: *mut c_void,
) -> u32 {
    // SAFETY: borrowed for the call.
    let waker = unsafe { keep(waker) };
    // SAFETY: of this vtable.
    let polled = unsafe {
        using(data, |future: &mut HostFuture<O>| {
            if future.done {
                return None;
            }
            let polled = (future.poll)(&mut Context::from_waker(&waker));
            future.done = polled.is_ready();
            Some(polled)
        })
    };
    match polled.flatten() {
        Some(Poll::Pending) => abi::poll::PENDING,
        Some(Poll::Ready(output)) => {
            // SAFETY: the plugin knows what this future resolves to.
            unsafe { out.cast::<O>().write(output) };
            abi::poll::READY
        }
        None => abi::poll::PANICKED,
    }
}

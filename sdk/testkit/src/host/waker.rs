//! Wakers: the host's, as a plugin gets them, and a plugin's, as the host keeps them.

use std::sync::Arc;
use std::task::{RawWaker, RawWakerVTable, Waker};

use sidelane_abi as abi;

use crate::ledger::Ledger;

/// A waker in a plugin's hands.
#[repr(C)]
pub(crate) struct HostWaker {
    head: abi::Waker,
    waker: Waker,
    ledger: Arc<Ledger>,
}

// SAFETY: the head's pointer leads to an immutable static, the rest is `Send` and `Sync`.
unsafe impl Send for HostWaker {}
// SAFETY: as above.
unsafe impl Sync for HostWaker {}

static VT: abi::WakerVt = abi::WakerVt { size: size_of::<abi::WakerVt>(), retain, release, wake };

impl HostWaker {
    pub(crate) fn new(waker: Waker, ledger: &Arc<Ledger>) -> Arc<Self> {
        ledger.made("waker");
        Arc::new(Self { head: abi::Waker { vt: &VT }, waker, ledger: ledger.clone() })
    }

    pub(crate) fn will_wake(&self, waker: &Waker) -> bool {
        self.waker.will_wake(waker)
    }
}

impl Drop for HostWaker {
    fn drop(&mut self) {
        self.ledger.dropped("waker");
    }
}

unsafe extern "C" fn retain(waker: *const abi::Waker) {
    // SAFETY: of this vtable, so made by `Arc`, and the caller holds or borrows an owner.
    unsafe { Arc::increment_strong_count(waker.cast::<HostWaker>()) }
}

unsafe extern "C" fn release(waker: *const abi::Waker) {
    // SAFETY: as above; the caller gives its owner up.
    unsafe { Arc::decrement_strong_count(waker.cast::<HostWaker>()) }
}

unsafe extern "C" fn wake(waker: *const abi::Waker) {
    // SAFETY: as above; borrowed for the call.
    unsafe { &*waker.cast::<HostWaker>() }.waker.wake_by_ref();
}

/// Keeps a plugin's waker.
///
/// # Safety
/// `waker` is borrowed for the call.
pub(crate) unsafe fn keep(waker: *const abi::Waker) -> Waker {
    // SAFETY: valid for the call.
    unsafe { ((*(*waker).vt).retain)(waker) };
    // SAFETY: the vtable below takes such an owned pointer.
    unsafe { Waker::new(waker.cast(), &KEPT) }
}

static KEPT: RawWakerVTable = RawWakerVTable::new(
    |data| {
        let waker = data.cast::<abi::Waker>();
        // SAFETY: owned by the waker that is cloned.
        unsafe { ((*(*waker).vt).retain)(waker) };
        RawWaker::new(data, &KEPT)
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
        // SAFETY: owned by the caller.
        unsafe { ((*(*waker).vt).wake)(waker) };
    },
    |data| {
        let waker = data.cast::<abi::Waker>();
        // SAFETY: owned by the caller, which gives it up.
        unsafe { ((*(*waker).vt).release)(waker) };
    },
);

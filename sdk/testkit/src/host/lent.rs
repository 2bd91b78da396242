//! Objects in a plugin's hands.

use std::ffi::c_void;
use std::sync::{Arc, Mutex, PoisonError, TryLockError};

use crate::ledger::Ledger;

struct Lent<T> {
    kind: &'static str,
    ledger: Arc<Ledger>,
    /// `None` once it was dropped.
    value: Mutex<Option<T>>,
}

/// Lends `value`, whose vtable is to use [`using`] and [`drop_lent`] of the same type. The memory stays,
/// so that a use after the drop is seen and not suffered.
pub(crate) fn lend<T>(ledger: &Arc<Ledger>, kind: &'static str, value: T) -> *mut c_void {
    ledger.made(kind);
    Box::into_raw(Box::new(Lent { kind, ledger: ledger.clone(), value: Mutex::new(Some(value)) }))
        .cast()
}

/// Runs `f` on what was lent; `None`, and a violation, where it was dropped already or is in use.
///
/// # Safety
/// `data` came from [`lend`] of the same type.
pub(crate) unsafe fn using<T, R>(data: *mut c_void, f: impl FnOnce(&mut T) -> R) -> Option<R> {
    // SAFETY: by this function's contract; the memory is never freed.
    let lent = unsafe { &*data.cast::<Lent<T>>() };
    let mut value = match lent.value.try_lock() {
        Ok(value) => value,
        Err(TryLockError::Poisoned(poisoned)) => poisoned.into_inner(),
        Err(TryLockError::WouldBlock) => {
            lent.ledger.violation(format!("{}: used twice at once", lent.kind));
            return None;
        }
    };
    let used = value.as_mut().map(f);
    if used.is_none() {
        lent.ledger.violation(format!("{}: used after its drop", lent.kind));
    }
    used
}

/// Ends what was lent.
///
/// # Safety
/// `data` came from [`lend`] of the same type.
pub(crate) unsafe extern "C" fn drop_lent<T>(data: *mut c_void) {
    // SAFETY: by this function's contract; the memory is never freed.
    let lent = unsafe { &*data.cast::<Lent<T>>() };
    let value = lent.value.lock().unwrap_or_else(PoisonError::into_inner).take();
    match value {
        Some(value) => {
            lent.ledger.dropped(lent.kind);
            drop(value);
        }
        None => lent.ledger.violation(format!("{}: dropped twice", lent.kind)),
    }
}

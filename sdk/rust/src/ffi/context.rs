//! What surrounds every call from the host: whose host it is (a library's statics are shared by all its
//! generations), the net under panics, and what a handler drops unfinished.

use std::any::Any;
use std::cell::{Cell, RefCell};
use std::panic::{self, AssertUnwindSafe};
use std::sync::Once;

use sidelane_abi as abi;

use super::exchange::reset_to_raw;
use super::host::{Host, Level};
use crate::Reset;

thread_local! {
    static CURRENT: Cell<Option<Host>> = const { Cell::new(None) };
    /// Whether a handler is being polled, whose end decides what [`KEPT`] is told.
    static KEEPING: Cell<bool> = const { Cell::new(false) };
    static KEPT: RefCell<Vec<Unfinished>> = const { RefCell::new(Vec::new()) };
}

/// The host whose call this thread is in.
pub(crate) fn current() -> Option<Host> {
    CURRENT.try_with(Cell::get).ok().flatten()
}

/// Runs `f` as a call from `host`; `Err`: it panicked, and the host's log has the message.
pub(crate) fn call<R>(host: Host, f: impl FnOnce() -> R) -> Result<R, Panicked> {
    let _restore = enter(host, false);
    catch(f)
}

pub(crate) struct Panicked;

struct Restore {
    host: Option<Host>,
    keeping: bool,
}

fn enter(host: Host, keeping: bool) -> Restore {
    Restore { host: CURRENT.replace(Some(host)), keeping: KEEPING.replace(keeping) }
}

impl Drop for Restore {
    fn drop(&mut self) {
        CURRENT.set(self.host);
        KEEPING.set(self.keeping);
    }
}

fn catch<R>(f: impl FnOnce() -> R) -> Result<R, Panicked> {
    panic::catch_unwind(AssertUnwindSafe(f)).map_err(|payload| {
        discard(payload);
        Panicked
    })
}

/// Runs plugin code from where no panic may pass and none can be reported.
pub(crate) fn contain(f: impl FnOnce()) {
    let _ = catch(f);
}

/// Drops a panic's payload, whose own destructor may panic.
fn discard(payload: Box<dyn Any + Send>) {
    if let Err(again) = panic::catch_unwind(AssertUnwindSafe(move || drop(payload))) {
        std::mem::forget(again);
    }
}

/// Sends this library's panics to the log of the host whose call they happen in. Others, such as those
/// of a test, go where they went.
pub(crate) fn install_panic_hook() {
    static ONCE: Once = Once::new();
    ONCE.call_once(|| {
        let before = panic::take_hook();
        panic::set_hook(Box::new(move |info| match current() {
            Some(host) => {
                let message = text_of(info.payload());
                match info.location() {
                    Some(at) => {
                        host.log(Level::Error, "panic", &format!("panicked at {at}: {message}"))
                    }
                    None => host.log(Level::Error, "panic", &format!("panicked: {message}")),
                }
            }
            None => before(info),
        }));
    });
}

fn text_of(payload: &(dyn Any + Send)) -> &str {
    let text = payload.downcast_ref::<&str>().copied();
    text.or_else(|| payload.downcast_ref::<String>().map(String::as_str))
        .unwrap_or("(a payload that is not text)")
}

/// What a handler dropped before its end. It waits for the handler's result, so that `?` tells the peer
/// and the client the error's code and not `CANCELLED`.
pub(crate) enum Unfinished {
    Send(abi::SendHalf),
    Recv(abi::RecvHalf),
    Responder(abi::Responder),
}

impl Unfinished {
    /// Keeps it for the end of the present poll, or ends it here where no handler is being polled.
    pub(crate) fn leave(self) {
        if !KEEPING.try_with(Cell::get).unwrap_or(false) {
            return self.end();
        }
        let mut this = Some(self);
        let kept = KEPT.try_with(|kept| kept.borrow_mut().extend(this.take()));
        if kept.is_err()
            && let Some(this) = this
        {
            this.end();
        }
    }

    fn tell(&self, reset: Reset) {
        match self {
            // SAFETY: owned and not yet dropped (H1).
            Self::Send(half) => unsafe { ((*half.vt).reset)(half.data, reset_to_raw(reset)) },
            Self::Responder(responder) => {
                // SAFETY: owned and not yet dropped (H1).
                unsafe { ((*responder.vt).abort)(responder.data, reset_to_raw(reset)) }
            }
            Self::Recv(_) => {}
        }
    }

    fn end(self) {
        match self {
            // SAFETY: owned (H1), and given up here.
            Self::Send(half) => unsafe { ((*half.vt).drop)(half.data) },
            // SAFETY: owned (H1), and given up here.
            Self::Recv(half) => unsafe { ((*half.vt).drop)(half.data) },
            // SAFETY: owned (H1), and given up here.
            Self::Responder(responder) => unsafe { ((*responder.vt).drop)(responder.data) },
        }
    }
}

/// Runs a poll of a handler. `reason` says, from its result, what the things it dropped unfinished are
/// told before they go.
pub(crate) fn poll_handler<R>(
    host: Host,
    poll: impl FnOnce() -> R,
    reason: impl FnOnce(&Result<R, Panicked>) -> Option<Reset>,
) -> Result<R, Panicked> {
    let before = KEPT.with(|kept| kept.borrow().len());
    let result = {
        let _restore = enter(host, true);
        catch(poll)
    };
    let _restore = enter(host, false);
    if KEPT.with(|kept| kept.borrow().len()) > before {
        let reason = reason(&result);
        // All are told before any is dropped: dropping one half would cancel the other.
        if let Some(reason) = reason {
            KEPT.with(|kept| {
                kept.borrow()[before..].iter().for_each(|unfinished| unfinished.tell(reason))
            });
        }
        while let Some(unfinished) = pop(before) {
            unfinished.end();
        }
    }
    result
}

fn pop(before: usize) -> Option<Unfinished> {
    KEPT.with(|kept| {
        let mut kept = kept.borrow_mut();
        (kept.len() > before).then(|| kept.pop()).flatten()
    })
}

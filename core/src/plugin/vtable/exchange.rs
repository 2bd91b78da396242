//! Halves, opener and the meta record.

use std::cell::UnsafeCell;
use std::ffi::c_void;
use std::mem::offset_of;
use std::sync::Arc;
use std::task::Poll;
use std::time::Duration;

use sidelane_abi as abi;

use super::waker::with_context;
use super::{
    Counted, Invalid, buf, bytes_of, future, guard, io, report, reset_from_abi, reset_to_abi,
    str_of, text_of,
};
use crate::plugin::lend;

/// A meta record: what core knows, and the ABI's view into it.
pub(super) struct Meta {
    view: abi::Meta,
    _owned: lend::Meta,
}

impl Meta {
    /// Makes the record. The view's pointers lead into reference-counted text, which stays where it
    /// is when the record moves.
    pub(super) fn new(owned: lend::Meta) -> Self {
        let text = |text: &str| str_of(text.as_bytes());
        let view = abi::Meta {
            size: size_of::<abi::Meta>(),
            deadline_ns: owned.deadline.map_or(0, crate::plugin::host::clock_ns),
            request_id: text(&owned.request_id),
            protocol_type: text(&owned.protocol_type),
            route: text(&owned.route),
            tunnel: text(&owned.tunnel),
            client_address: text(&owned.client_address),
            listener: text(&owned.listener),
            scheme: text(&owned.scheme),
            tls_sni: text(&owned.tls_sni),
            tls_alpn: text(&owned.tls_alpn),
            tls_client: text(&owned.tls_client),
            trace_parent: text(&owned.trace_parent),
            options: text(&owned.options),
            peer_address: text(&owned.peer_address),
            response_head_timeout_ns: owned.response_head_timeout.map_or(0, nanos),
            flags: if owned.trusted_proxy { abi::meta::TRUSTED_PROXY } else { 0 },
        };
        Self { view, _owned: owned }
    }

    /// Returns the record as plugins see it.
    pub(super) fn as_abi(&self) -> *const abi::Meta {
        &raw const self.view
    }
}

/// A time as the ABI says it; no longer than it can.
pub(super) fn nanos(duration: Duration) -> u64 {
    u64::try_from(duration.as_nanos()).unwrap_or(u64::MAX - 1)
}

/// A failure, and the ABI's view of it.
pub(super) struct Failure {
    view: abi::Failure,
    _owned: String,
}

impl Failure {
    /// Makes the record; the view points into the text's heap memory, which does not move with it.
    pub(super) fn new(failure: lend::Failure) -> Self {
        let view = abi::Failure {
            size: size_of::<abi::Failure>(),
            code: failure.code,
            retry_after_s: failure.retry_after_s.unwrap_or(0),
            detail: str_of(failure.detail.as_bytes()),
        };
        Self { view, _owned: failure.detail }
    }

    /// Returns the failure as plugins see it.
    pub(super) fn as_abi(&self) -> *const abi::Failure {
        &raw const self.view
    }
}

/// Returns the halves to give a plugin.
pub(super) fn lend_exchange(send: impl lend::SendHalf, recv: impl lend::RecvHalf) -> abi::Exchange {
    abi::Exchange { send: lend_send(send), recv: lend_recv(recv) }
}

/// Ends both halves of an exchange that a plugin gives back.
///
/// # Safety
/// `exchange` was moved here by the plugin.
pub(in crate::plugin) unsafe fn discard(exchange: abi::Exchange) {
    // SAFETY: a half's vtable is static.
    if let Some(vt) = unsafe { exchange.send.vt.as_ref() } {
        // SAFETY: moved here, dropped once, by the functions of whoever made it.
        unsafe { (vt.drop)(exchange.send.data) };
    }
    // SAFETY: as above.
    if let Some(vt) = unsafe { exchange.recv.vt.as_ref() } {
        // SAFETY: as above.
        unsafe { (vt.drop)(exchange.recv.data) };
    }
}

fn lend_send<S: lend::SendHalf>(half: S) -> abi::SendHalf {
    let lent = Box::new(Sender { half, _counted: Counted::new() });
    abi::SendHalf { data: Box::into_raw(lent).cast(), vt: &Sender::<S>::VT }
}

struct Sender<S> {
    half: S,
    _counted: Counted,
}

impl<S: lend::SendHalf> Sender<S> {
    const VT: abi::SendVt = abi::SendVt {
        size: size_of::<abi::SendVt>(),
        poll_send: Self::poll_send,
        finish: Self::finish,
        reset: Self::reset,
        poll_closed: Self::poll_closed,
        dispatched: Self::dispatched,
        refused: Self::refused,
        drop: Self::drop,
        dedicate: Self::dedicate,
    };

    /// # Safety
    /// `data` is what `lend_send` leaked, used by one thread at a time.
    unsafe fn of<'a>(data: *mut c_void) -> &'a mut Self {
        // SAFETY: by this function's contract.
        unsafe { &mut *data.cast::<Self>() }
    }

    /// Checks the message and makes one for core that shares its bytes: they stay the plugin's until
    /// core has taken it.
    ///
    /// # Safety
    /// `message` is live, borrowed for the call.
    unsafe fn shared(message: &abi::Msg) -> Result<lend::Message, Invalid> {
        if !FIELDS.contains(&message.field) || message.field == abi::FIELD_DEDICATION {
            return Err(Invalid::Field);
        }
        if message.head.len.saturating_add(message.body.len) > abi::OPEN_BYTES_MAX {
            return Err(Invalid::MessageLarge);
        }
        // SAFETY: the buffers are as live as the message.
        let head = unsafe { buf::share(&message.head) }?;
        // SAFETY: as above.
        let body = unsafe { buf::share(&message.body) }?;
        let end = message.flags & abi::msg::END != 0;
        Ok(lend::Message { field: message.field, end, head, body })
    }

    unsafe extern "C" fn poll_send(
        data: *mut c_void,
        waker: *const abi::Waker,
        message: *mut abi::Msg,
    ) -> u32 {
        // SAFETY: the plugin calls its own half's function with its `data`.
        let this = unsafe { Self::of(data) };
        // SAFETY: the plugin lends its message for the call.
        let message = unsafe { &mut *message };
        guard("send.poll_send", abi::poll::CLOSED, || {
            // SAFETY: as above.
            let shared = match unsafe { Self::shared(message) } {
                Ok(shared) => shared,
                Err(invalid) => {
                    report("send.poll_send", invalid);
                    this.half.reset(lend::Reset::new(abi::failure::PLUGIN_FAILED));
                    return abi::poll::CLOSED;
                }
            };
            let mut slot = Some(shared);
            // SAFETY: the plugin lends the waker for the call.
            let polled = unsafe { with_context(waker, |cx| this.half.poll_send(cx, &mut slot)) };
            match polled {
                Poll::Pending => abi::poll::PENDING,
                Poll::Ready(Err(lend::Closed)) => abi::poll::CLOSED,
                Poll::Ready(Ok(())) => {
                    // SAFETY: READY moves the buffers here.
                    unsafe { buf::discard(&mut message.head) };
                    // SAFETY: as above.
                    unsafe { buf::discard(&mut message.body) };
                    abi::poll::READY
                }
            }
        })
    }

    unsafe extern "C" fn finish(data: *mut c_void) -> u32 {
        // SAFETY: as in `poll_send`.
        let this = unsafe { Self::of(data) };
        guard("send.finish", abi::poll::CLOSED, || {
            this.half.finish();
            abi::poll::READY
        })
    }

    unsafe extern "C" fn reset(data: *mut c_void, reset: abi::Reset) {
        // SAFETY: as in `poll_send`.
        let this = unsafe { Self::of(data) };
        guard("send.reset", (), || this.half.reset(reset_from_abi(reset)));
    }

    unsafe extern "C" fn poll_closed(
        data: *mut c_void,
        waker: *const abi::Waker,
        reset: *mut abi::Reset,
    ) -> u32 {
        // SAFETY: as in `poll_send`.
        let this = unsafe { Self::of(data) };
        let broken = Poll::Ready(lend::Reset::new(abi::failure::INTERNAL));
        let polled = guard("send.poll_closed", broken, || {
            // SAFETY: the plugin lends the waker for the call.
            unsafe { with_context(waker, |cx| this.half.poll_closed(cx)) }
        });
        let Poll::Ready(why) = polled else { return abi::poll::PENDING };
        // SAFETY: the plugin lends the record for the call.
        unsafe { write(reset, reset_to_abi(why)) };
        abi::poll::CLOSED
    }

    unsafe extern "C" fn dispatched(data: *mut c_void) {
        // SAFETY: as in `poll_send`.
        let this = unsafe { Self::of(data) };
        guard("send.dispatched", (), || this.half.dispatched());
    }

    unsafe extern "C" fn refused(data: *mut c_void, reset: abi::Reset) {
        // SAFETY: as in `poll_send`.
        let this = unsafe { Self::of(data) };
        guard("send.refused", (), || this.half.refused(reset_from_abi(reset)));
    }

    unsafe extern "C" fn drop(data: *mut c_void) {
        // SAFETY: `data` is what `lend_send` leaked, dropped once.
        let lent = unsafe { Box::from_raw(data.cast::<Self>()) };
        guard("send.drop", (), || drop(lent));
    }

    unsafe extern "C" fn dedicate(
        data: *mut c_void,
        stream: abi::Io,
        mut ahead: abi::Buf,
    ) -> abi::Future {
        // SAFETY: as in `poll_send`.
        let this = unsafe { Self::of(data) };
        // SAFETY: the plugin moves the stream here.
        let stream = unsafe { io::take(stream) };
        // SAFETY: the plugin moves the bytes here.
        let ahead = unsafe { buf::take(&mut ahead) };
        let given = stream.and_then(|stream| ahead.map(|ahead| (stream, ahead)));
        let running = match given {
            Ok((stream, ahead)) => {
                guard("send.dedicate", None, || Some(this.half.dedicate(stream, ahead)))
            }
            Err(invalid) => {
                report("send.dedicate", invalid);
                guard("send.dedicate", (), || {
                    this.half.reset(lend::Reset::new(abi::failure::PLUGIN_FAILED));
                });
                None
            }
        };
        future::lend(async move {
            match running {
                Some(running) => dedicated(running.await),
                None => ended(lend::Reset::new(abi::failure::PLUGIN_FAILED), 0, 0),
            }
        })
    }
}

/// Says what became of an exchange on a connection of its own as the ABI does.
fn dedicated(outcome: lend::Dedicated) -> abi::DedicateOutcome {
    match outcome {
        lend::Dedicated::Ended { reset, sent, received } => ended(reset, sent, received),
        lend::Dedicated::Framed(stream) => {
            let how = abi::dedicated::FRAMED;
            abi::DedicateOutcome {
                how,
                io: io::lend(stream),
                ..ended(lend::Reset::new(abi::failure::NONE), 0, 0)
            }
        }
    }
}

fn ended(reset: lend::Reset, sent: u64, received: u64) -> abi::DedicateOutcome {
    let io = abi::Io { data: std::ptr::null_mut(), vt: std::ptr::null() };
    let how = abi::dedicated::ENDED;
    abi::DedicateOutcome { how, reset: reset_to_abi(reset), io, sent, received }
}

/// Payload fields of `TunnelMessage` that a plugin may use (tunnel.proto).
const FIELDS: std::ops::RangeInclusive<u32> = 9..=abi::FIELD_CUSTOM;

fn lend_recv<R: lend::RecvHalf>(half: R) -> abi::RecvHalf {
    let lent = Box::new(Receiver { half, _counted: Counted::new() });
    abi::RecvHalf { data: Box::into_raw(lent).cast(), vt: &Receiver::<R>::VT }
}

struct Receiver<R> {
    half: R,
    _counted: Counted,
}

impl<R: lend::RecvHalf> Receiver<R> {
    const VT: abi::RecvVt = abi::RecvVt {
        size: size_of::<abi::RecvVt>(),
        poll_recv: Self::poll_recv,
        drop: Self::drop,
    };

    unsafe extern "C" fn poll_recv(
        data: *mut c_void,
        waker: *const abi::Waker,
        message: *mut abi::Msg,
        reset: *mut abi::Reset,
    ) -> u32 {
        // SAFETY: `data` is what `lend_recv` leaked, used by one thread at a time.
        let this = unsafe { &mut *data.cast::<Self>() };
        let broken = Poll::Ready(lend::Received::Reset(lend::Reset::new(abi::failure::INTERNAL)));
        let polled = guard("recv.poll_recv", broken, || {
            // SAFETY: the plugin lends the waker for the call.
            unsafe { with_context(waker, |cx| this.half.poll_recv(cx)) }
        });
        match polled {
            Poll::Pending => abi::poll::PENDING,
            Poll::Ready(lend::Received::Finished) => abi::recv::FINISHED,
            Poll::Ready(lend::Received::Reset(why)) => {
                // SAFETY: the plugin lends the record for the call.
                unsafe { write(reset, reset_to_abi(why)) };
                abi::recv::RESET
            }
            Poll::Ready(lend::Received::Message(received)) => {
                let flags = if received.end { abi::msg::END } else { 0 };
                let (head, body) = (buf::lend(received.head), buf::lend(received.body));
                let filled = abi::Msg { field: received.field, flags, head, body };
                // SAFETY: the plugin lends the message for the call.
                unsafe { write(message, filled) };
                abi::recv::MESSAGE
            }
        }
    }

    unsafe extern "C" fn drop(data: *mut c_void) {
        // SAFETY: `data` is what `lend_recv` leaked, dropped once.
        let lent = unsafe { Box::from_raw(data.cast::<Self>()) };
        guard("recv.drop", (), || drop(lent));
    }
}

/// Returns the opener to give a plugin, and the owner of what it lends: core keeps it until the
/// plugin's future is gone, since the meta record outlives the opener.
pub(super) fn lend_opener<O: lend::Opener>(opener: O) -> (abi::Opener, Arc<dyn Owner>) {
    let lent = Arc::new(Opener {
        state: UnsafeCell::new(OpenerState { opener: Some(opener), meta: None, failure: None }),
        _counted: Counted::new(),
    });
    let data = Arc::into_raw(Arc::clone(&lent)).cast_mut().cast();
    (abi::Opener { data, vt: &Opener::<O>::VT }, lent)
}

/// Keeps alive what a plugin borrows.
pub(super) trait Owner: Send + Sync {}

struct Opener<O> {
    /// Invariant: touched by the plugin's calls only, one at a time; core's owner just keeps it
    /// alive.
    state: UnsafeCell<OpenerState<O>>,
    _counted: Counted,
}

struct OpenerState<O> {
    /// `None` once it has answered.
    opener: Option<O>,
    meta: Option<Meta>,
    failure: Option<Failure>,
}

// SAFETY: the state's owned parts are `Send`; its views point into them.
unsafe impl<O: Send> Send for Opener<O> {}
// SAFETY: see `state`: no two threads touch it at once.
unsafe impl<O: Send> Sync for Opener<O> {}

impl<O: lend::Opener> Owner for Opener<O> {}

impl<O: lend::Opener> Opener<O> {
    const VT: abi::OpenerVt = abi::OpenerVt {
        size: size_of::<abi::OpenerVt>(),
        poll_open: Self::poll_open,
        drop: Self::drop,
    };

    unsafe extern "C" fn poll_open(
        data: *mut c_void,
        waker: *const abi::Waker,
        key: *const abi::RouteKey,
        out: *mut abi::Opened,
    ) -> u32 {
        // SAFETY: `data` is what `lend_opener` leaked; the plugin owns a count of it.
        let this = unsafe { &*data.cast::<Self>() };
        // SAFETY: one thread uses an opener at a time (plugin ABI, "Threads"), and core does not.
        let state = unsafe { &mut *this.state.get() };
        // SAFETY: the plugin lends the key for the call.
        let key = unsafe { &*key };
        // SAFETY: as above, with the text it points to.
        let key = unsafe { route_key(key) };
        let opened = guard("opener.poll_open", Poll::Ready(Err(defect())), || {
            let key = match key {
                Ok(key) => key,
                Err(invalid) => {
                    report("opener.poll_open", invalid);
                    return Poll::Ready(Err(unusable_key(invalid)));
                }
            };
            let Some(opener) = state.opener.as_mut() else { return Poll::Ready(Err(defect())) };
            // SAFETY: the plugin lends the waker for the call.
            unsafe { with_context(waker, |cx| opener.poll_open(cx, key)) }
        });
        match opened {
            Poll::Pending => abi::poll::PENDING,
            Poll::Ready(Ok(opened)) => {
                // A second call would find it gone; the first answer's records stay.
                let opener = state.opener.take();
                guard("opener.poll_open", (), || drop(opener));
                let exchange = lend_exchange(opened.send, opened.recv);
                let meta = state.meta.insert(Meta::new(opened.meta)).as_abi();
                let at = |offset| out.wrapping_byte_add(offset);
                let exchange_at = at(offset_of!(abi::Opened, exchange)).cast();
                // SAFETY: the plugin lends `out` for the call, and this is a field of it.
                unsafe { write(exchange_at, exchange) };
                let meta_at = at(offset_of!(abi::Opened, meta)).cast();
                // SAFETY: as above.
                unsafe { write(meta_at, meta) };
                abi::poll::READY
            }
            Poll::Ready(Err(failure)) => {
                let failure = state.failure.insert(Failure::new(failure));
                let failure_at = out.wrapping_byte_add(offset_of!(abi::Opened, failure)).cast();
                // SAFETY: as above; the detail lives as long as the opener.
                unsafe { write(failure_at, failure.view) };
                abi::poll::CLOSED
            }
        }
    }

    unsafe extern "C" fn drop(data: *mut c_void) {
        // SAFETY: `data` is what `lend_opener` leaked; this count ends here.
        let lent = unsafe { Arc::from_raw(data.cast::<Self>()) };
        // SAFETY: as in `poll_open`; nothing of the plugin's uses the opener any more.
        let opener = unsafe { (*lent.state.get()).opener.take() };
        guard("opener.drop", (), || {
            drop(opener);
            drop(lent);
        });
    }
}

fn defect() -> lend::Failure {
    let detail = "the opener has answered already".to_owned();
    lend::Failure { code: abi::failure::INTERNAL, retry_after_s: None, detail }
}

fn unusable_key(invalid: Invalid) -> lend::Failure {
    let detail = format!("the route key cannot be used: {invalid}");
    lend::Failure { code: abi::failure::BAD_REQUEST, retry_after_s: None, detail }
}

/// # Safety
/// `key` and what it points to are valid for `'a`.
unsafe fn route_key<'a>(key: &abi::RouteKey) -> Result<lend::RouteKey<'a>, Invalid> {
    if key.kind == abi::route_key::LISTENER {
        return Ok(lend::RouteKey::Listener);
    }
    // SAFETY: by this function's contract.
    let host = unsafe { text_of(key.host) }?;
    // SAFETY: by this function's contract.
    let path = unsafe { bytes_of(key.path) }?;
    Ok(lend::RouteKey::Host { host, path: routable(path) })
}

/// Returns the part of a path that routes can tell apart: they are text, and match by prefix.
fn routable(path: &[u8]) -> &str {
    let text = match std::str::from_utf8(path) {
        Ok(text) => text,
        Err(error) => std::str::from_utf8(&path[..error.valid_up_to()]).unwrap_or_default(),
    };
    if text.is_empty() { "/" } else { text }
}

/// Writes what a call fills in.
///
/// # Safety
/// `out` is null or writable, as the ABI says of the argument it comes from.
unsafe fn write<T>(out: *mut T, value: T) {
    if !out.is_null() {
        // SAFETY: by this function's contract.
        unsafe { out.write(value) };
    }
}

//! Where a response goes.

use std::future::{Future, poll_fn};
use std::ptr;
use std::task::{Context, Poll, ready};

use sidelane_abi as abi;

use super::buf::Buf;
use super::context::Unfinished;
use super::exchange::{reset_from_raw, reset_to_raw};
use super::future::Foreign;
use super::header_list::HeaderList;
use super::io::ByteStream;
use super::service::stream_from_outcome;
use super::waker::WakerSlot;
use crate::{Closed, Error, Reset, failure};

/// A response's head.
#[derive(Clone, Copy)]
pub struct ResponseHead<'a> {
    /// 200 to 999, or 101 with an upgrade.
    pub status: u16,
    /// Fields. A `content-length` among them wins over `body_length`.
    pub headers: &'a HeaderList<'a>,
    /// Exact length of the body, where known.
    pub body_length: Option<u64>,
}

/// Where a response goes: informational heads, a head, chunks, an end. Dropped before its end it aborts
/// the exchange, with the handler's error where it returns one.
pub struct Responder {
    raw: abi::Responder,
    slot: WakerSlot,
    ended: bool,
}

// SAFETY: H3; `&self` reaches nothing of the host's.
unsafe impl Send for Responder {}
// SAFETY: as above.
unsafe impl Sync for Responder {}

impl Responder {
    /// # Safety
    /// `raw` is moved to the caller (H1).
    pub(crate) const unsafe fn new(raw: abi::Responder) -> Self {
        Self { raw, slot: WakerSlot::new(), ended: false }
    }

    fn vt(&self) -> &abi::ResponderVt {
        // SAFETY: owned (H1).
        unsafe { &*self.raw.vt }
    }

    /// Sends an interim response: 100 to 199, but not 101.
    ///
    /// # Errors
    /// The client is gone, or its transport knows no interim responses (HTTP/1.0): go on without.
    pub fn informational(&mut self, status: u16, headers: &HeaderList<'_>) -> Result<(), Closed> {
        let (headers, len) = headers.raw();
        // SAFETY: owned (H1); the fields are borrowed for the call.
        done(unsafe { (self.vt().informational)(self.raw.data, status.into(), headers, len) })
    }

    /// Sends the head, and with it the body's first chunk where given. `end`: nothing follows.
    ///
    /// # Errors
    /// The client is gone.
    pub fn head(
        &mut self,
        head: ResponseHead<'_>,
        first: Option<Buf>,
        end: bool,
    ) -> Result<(), Closed> {
        let (headers, headers_len) = head.headers.raw();
        let head = abi::ResponseHead {
            size: size_of::<abi::ResponseHead>(),
            status: head.status.into(),
            flags: if end { abi::response::END } else { 0 },
            body_length: head.body_length.unwrap_or(abi::LENGTH_UNKNOWN),
            headers,
            headers_len,
        };
        self.ended |= end;
        // Moved to the host, also on failure.
        let mut first = first.map(Buf::into_raw);
        let first = first.as_mut().map_or(ptr::null_mut(), |first| &raw mut *first);
        // SAFETY: owned (H1); head and fields are borrowed for the call, `first` moved.
        done(unsafe { (self.vt().head)(self.raw.data, &raw const head, first) })
    }

    /// Sends a chunk once there is room. `end`: nothing follows. Cancelling it loses the chunk.
    ///
    /// # Errors
    /// The client is gone.
    pub async fn body(&mut self, chunk: Buf, end: bool) -> Result<(), Closed> {
        let mut chunk = Some(chunk);
        poll_fn(|cx| self.poll_body(cx, &mut chunk, end)).await
    }

    /// As [`Self::body`]; `Pending` leaves the chunk in place. Without a chunk it is ready.
    ///
    /// # Errors
    /// The client is gone.
    pub fn poll_body(
        &mut self,
        cx: &mut Context<'_>,
        chunk: &mut Option<Buf>,
        end: bool,
    ) -> Poll<Result<(), Closed>> {
        let Some(buf) = chunk.take() else {
            return Poll::Ready(Ok(()));
        };
        let mut raw = buf.into_raw();
        let waker = self.slot.lend(cx);
        let flags = if end { abi::response::END } else { 0 };
        // SAFETY: owned (H1); waker and chunk are valid for the call.
        let tag = unsafe { (self.vt().poll_body)(self.raw.data, waker, &raw mut raw, flags) };
        if tag == abi::poll::READY {
            self.ended |= end;
            return Poll::Ready(Ok(()));
        }
        // SAFETY: anything but READY leaves it with us.
        let buf = unsafe { Buf::from_raw(raw) };
        if tag == abi::poll::PENDING {
            *chunk = Some(buf);
            return Poll::Pending;
        }
        Poll::Ready(Err(Closed))
    }

    /// Ends the body, with trailers where given.
    ///
    /// # Errors
    /// The client is gone.
    pub fn finish(&mut self, trailers: Option<&HeaderList<'_>>) -> Result<(), Closed> {
        let (headers, len) = trailers.map_or((ptr::null(), 0), HeaderList::raw);
        self.ended = true;
        // SAFETY: owned (H1); the fields are borrowed for the call.
        done(unsafe { (self.vt().finish)(self.raw.data, headers, len) })
    }

    /// Ends the exchange early: a reset on HTTP/2, a closed connection on HTTP/1. Before the head the
    /// host answers by the code instead.
    pub fn abort(mut self, reset: Reset) {
        self.ended = true;
        // SAFETY: owned (H1).
        unsafe { (self.vt().abort)(self.raw.data, reset_to_raw(reset)) }
    }

    /// Waits until the client is gone.
    pub async fn closed(&mut self) -> Reset {
        poll_fn(|cx| self.poll_closed(cx)).await
    }

    /// As [`Self::closed`].
    pub fn poll_closed(&mut self, cx: &mut Context<'_>) -> Poll<Reset> {
        let mut reset = reset_to_raw(Reset::new(failure::CLIENT_GONE));
        let waker = self.slot.lend(cx);
        // SAFETY: owned (H1); waker and reset are valid for the call.
        let tag = unsafe { (self.vt().poll_closed)(self.raw.data, waker, &raw mut reset) };
        if tag == abi::poll::PENDING { Poll::Pending } else { Poll::Ready(reset_from_raw(reset)) }
    }

    /// Takes the client's bytes, after a head that accepts the upgrade.
    pub fn upgrade(&mut self) -> impl Future<Output = Result<ByteStream, Error>> + Send + use<> {
        self.ended = true;
        // SAFETY: owned (H1); the future resolves to an `IoOutcome` (`abi::ResponderVt::upgrade`).
        let mut outcome: Foreign<abi::IoOutcome> =
            unsafe { Foreign::new((self.vt().upgrade)(self.raw.data)) };
        poll_fn(move |cx| Poll::Ready(Ok(stream_from_outcome(ready!(outcome.poll(cx)))?)))
    }
}

fn done(tag: u32) -> Result<(), Closed> {
    if tag == abi::poll::READY { Ok(()) } else { Err(Closed) }
}

impl Drop for Responder {
    fn drop(&mut self) {
        let raw = abi::Responder { data: self.raw.data, vt: self.raw.vt };
        if self.ended {
            // SAFETY: owned (H1), dropped once.
            unsafe { (self.vt().drop)(self.raw.data) }
        } else {
            Unfinished::Responder(raw).leave();
        }
    }
}

impl std::fmt::Debug for Responder {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Responder").field("ended", &self.ended).finish_non_exhaustive()
    }
}

//! Exchanges: opening them, sending, receiving.

use std::future::poll_fn;
use std::mem::{MaybeUninit, offset_of};
use std::task::{Context, Poll, ready};

use sidelane_abi as abi;

use super::buf::Buf;
use super::context::Unfinished;
use super::future::Foreign;
use super::io::ByteStream;
use super::request::Meta;
use super::text::{lend, text};
use super::waker::WakerSlot;
use crate::dedicate::Dedicated;
use crate::{Closed, Failure, Reset, failure};

pub(crate) const fn reset_from_raw(raw: abi::Reset) -> Reset {
    let protocol_code =
        if raw.protocol_code == abi::NO_PROTOCOL_CODE { None } else { Some(raw.protocol_code) };
    Reset { code: raw.code, protocol_code }
}

pub(crate) const fn reset_to_raw(reset: Reset) -> abi::Reset {
    let protocol_code = match reset.protocol_code {
        Some(code) => code,
        None => abi::NO_PROTOCOL_CODE,
    };
    abi::Reset { code: reset.code, protocol_code }
}

/// # Safety
/// `raw` and its detail are valid for the call (H2).
pub(crate) unsafe fn failure_from_raw(raw: &abi::Failure) -> Failure {
    Failure {
        code: raw.code,
        retry_after_s: (raw.retry_after_s != 0).then_some(raw.retry_after_s),
        // SAFETY: by this function's contract; copied here.
        detail: unsafe { text(raw.detail) }.to_owned(),
    }
}

/// What an exchange is opened for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum RouteKey<'a> {
    /// What the listener, or the TLS server name, has fixed.
    Listener,
    /// By name.
    Host {
        /// Host name, port allowed.
        host: &'a [u8],
        /// Path; empty is `/`.
        path: &'a [u8],
    },
}

/// Opens the exchange of one client request or connection.
pub struct Opener<'a> {
    raw: abi::Opener,
    meta: Meta<'a>,
    slot: WakerSlot,
}

// SAFETY: H3; `&self` reaches the meta record alone.
unsafe impl Send for Opener<'_> {}
// SAFETY: as above.
unsafe impl Sync for Opener<'_> {}

impl<'a> Opener<'a> {
    /// # Safety
    /// `raw` is moved to the caller (H1), and what it opens has a meta record valid for `'a` (H2).
    pub(crate) const unsafe fn new(raw: abi::Opener, meta: Meta<'a>) -> Self {
        Self { raw, meta, slot: WakerSlot::new() }
    }

    /// What the host knows of the client, before anything is routed.
    #[must_use]
    pub const fn meta(&self) -> Meta<'a> {
        self.meta
    }

    /// Routes, authorises and opens. Yields one exchange. Nothing is sent before its first message.
    ///
    /// # Errors
    /// No route, no sidecar, over a limit: what the client is to be told.
    pub async fn open(&mut self, key: RouteKey<'_>) -> Result<Exchange<'a>, Failure> {
        poll_fn(|cx| self.poll_open(cx, key)).await
    }

    /// As [`Self::open`].
    ///
    /// # Errors
    /// As [`Self::open`].
    pub fn poll_open(
        &mut self,
        cx: &mut Context<'_>,
        key: RouteKey<'_>,
    ) -> Poll<Result<Exchange<'a>, Failure>> {
        let (kind, host, path): (_, &[u8], &[u8]) = match key {
            RouteKey::Listener => (abi::route_key::LISTENER, b"", b""),
            RouteKey::Host { host, path } => (abi::route_key::HOST, host, path),
        };
        let key = abi::RouteKey {
            size: size_of::<abi::RouteKey>(),
            kind,
            host: lend(host),
            path: lend(path),
        };
        let mut out = MaybeUninit::<abi::Opened>::zeroed();
        let waker = self.slot.lend(cx);
        // SAFETY: owned (H1); waker, key and room are valid for the call.
        let tag = unsafe {
            ((*self.raw.vt).poll_open)(self.raw.data, waker, &raw const key, out.as_mut_ptr())
        };
        let out = out.as_ptr();
        match tag {
            abi::poll::PENDING => Poll::Pending,
            abi::poll::READY => {
                // SAFETY: filled in after READY, and moved to us.
                let exchange = unsafe { (&raw const (*out).exchange).read() };
                // SAFETY: filled in after READY; valid until the handler's future is dropped, which
                // `'a` ends with.
                let meta = unsafe { Meta::new((*out).meta) };
                // SAFETY: as above.
                Poll::Ready(Ok(unsafe { Exchange::new(exchange, meta, End::Relay) }))
            }
            abi::poll::CLOSED => {
                // SAFETY: filled in after CLOSED; the detail is valid until the opener is dropped.
                Poll::Ready(Err(unsafe { failure_from_raw(&(*out).failure) }))
            }
            _ => Poll::Ready(Err(Failure {
                code: failure::INTERNAL,
                retry_after_s: None,
                detail: "the host failed to open the exchange".to_owned(),
            })),
        }
    }
}

impl Drop for Opener<'_> {
    fn drop(&mut self) {
        // SAFETY: owned (H1), dropped once.
        unsafe { ((*self.raw.vt).drop)(self.raw.data) }
    }
}

impl std::fmt::Debug for Opener<'_> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Opener").field("meta", &self.meta).finish_non_exhaustive()
    }
}

/// Which end of the tunnel an exchange is held at.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum End {
    Relay,
    Sidecar,
}

impl End {
    /// What a failed byte stream means at this end.
    pub(crate) const fn stream_failure(self) -> u32 {
        match self {
            Self::Relay => failure::CLIENT_GONE,
            Self::Sidecar => failure::SERVICE_RESET,
        }
    }
}

/// One client request or connection: two directions, independent of each other.
#[derive(Debug)]
pub struct Exchange<'a> {
    /// From here to the peer.
    pub send: SendHalf,
    /// From the peer to here.
    pub recv: RecvHalf,
    /// What the host knows of it.
    pub meta: Meta<'a>,
    pub(crate) end: End,
}

impl<'a> Exchange<'a> {
    /// # Safety
    /// `raw` is moved to the caller (H1).
    pub(crate) const unsafe fn new(raw: abi::Exchange, meta: Meta<'a>, end: End) -> Self {
        let send = SendHalf { raw: raw.send, slot: WakerSlot::new(), ended: false };
        let recv = RecvHalf { raw: raw.recv, slot: WakerSlot::new(), ended: false };
        Self { send, recv, meta, end }
    }

    /// Takes it apart.
    #[must_use]
    pub fn split(self) -> (SendHalf, RecvHalf, Meta<'a>) {
        (self.send, self.recv, self.meta)
    }
}

/// One message of an exchange: the encoded payload of `TunnelMessage`'s field `field`.
#[derive(Debug, Default, PartialEq, Eq)]
pub struct Message {
    /// Payload field number; [`FIELD_CUSTOM`](crate::FIELD_CUSTOM) for bytes that only the plugin
    /// understands.
    pub field: u32,
    /// Last message of its direction.
    pub end: bool,
    /// First part of the payload; empty on receive.
    pub head: Buf,
    /// Second part; on receive all of it.
    pub body: Buf,
}

/// The direction from here to the peer. Dropped unfinished it resets the exchange: with the handler's
/// error where that returns one, else with `CANCELLED`.
pub struct SendHalf {
    raw: abi::SendHalf,
    slot: WakerSlot,
    ended: bool,
}

// SAFETY: H3; `&self` reaches nothing of the host's.
unsafe impl Send for SendHalf {}
// SAFETY: as above.
unsafe impl Sync for SendHalf {}

impl SendHalf {
    fn vt(&self) -> &abi::SendVt {
        // SAFETY: owned (H1).
        unsafe { &*self.raw.vt }
    }

    /// Queues a message once there is credit. Cancelling it loses the message.
    ///
    /// # Errors
    /// The exchange was reset or lost.
    pub async fn send(&mut self, message: Message) -> Result<(), Reset> {
        let mut message = Some(message);
        poll_fn(|cx| {
            Poll::Ready(match ready!(self.poll_send(cx, &mut message)) {
                Ok(()) => Ok(()),
                Err(Closed) => Err(match self.poll_closed(cx) {
                    Poll::Ready(reset) => reset,
                    Poll::Pending => Reset::new(failure::CANCELLED),
                }),
            })
        })
        .await
    }

    /// As [`Self::send`]; `Pending` leaves the message in place. Without a message it is ready.
    ///
    /// # Errors
    /// The exchange is over; [`Self::closed`] says why.
    pub fn poll_send(
        &mut self,
        cx: &mut Context<'_>,
        message: &mut Option<Message>,
    ) -> Poll<Result<(), Closed>> {
        let Some(Message { field, end, head, body }) = message.take() else {
            return Poll::Ready(Ok(()));
        };
        let flags = if end { abi::msg::END } else { 0 };
        let mut raw = abi::Msg { field, flags, head: head.into_raw(), body: body.into_raw() };
        let waker = self.slot.lend(cx);
        // SAFETY: owned (H1); waker and message are valid for the call.
        let tag = unsafe { (self.vt().poll_send)(self.raw.data, waker, &raw mut raw) };
        if tag == abi::poll::READY {
            self.ended |= end;
            return Poll::Ready(Ok(()));
        }
        // SAFETY: anything but READY leaves both with us.
        let (head, body) = unsafe { (Buf::from_raw(raw.head), Buf::from_raw(raw.body)) };
        if tag == abi::poll::PENDING {
            *message = Some(Message { field, end, head, body });
            return Poll::Pending;
        }
        Poll::Ready(Err(Closed))
    }

    /// Ends the direction where no message with `end` was sent.
    ///
    /// # Errors
    /// The exchange is over.
    pub fn finish(&mut self) -> Result<(), Closed> {
        if self.ended {
            return Ok(());
        }
        self.ended = true;
        // SAFETY: owned (H1).
        let tag = unsafe { (self.vt().finish)(self.raw.data) };
        if tag == abi::poll::READY { Ok(()) } else { Err(Closed) }
    }

    /// Ends the whole exchange, both directions.
    pub fn reset(&mut self, reset: Reset) {
        self.ended = true;
        // SAFETY: owned (H1).
        unsafe { (self.vt().reset)(self.raw.data, reset_to_raw(reset)) }
    }

    /// Waits until the exchange is over on the wire, without reading. Code `NONE`: it is complete, or
    /// the peer has answered and wants no more; what was received may still be read.
    pub async fn closed(&mut self) -> Reset {
        poll_fn(|cx| self.poll_closed(cx)).await
    }

    /// As [`Self::closed`].
    pub fn poll_closed(&mut self, cx: &mut Context<'_>) -> Poll<Reset> {
        let mut reset = reset_to_raw(Reset::new(failure::CANCELLED));
        let waker = self.slot.lend(cx);
        // SAFETY: owned (H1); waker and reset are valid for the call.
        let tag = unsafe { (self.vt().poll_closed)(self.raw.data, waker, &raw mut reset) };
        if tag == abi::poll::PENDING { Poll::Pending } else { Poll::Ready(reset_from_raw(reset)) }
    }

    /// Sidecar's end: the first byte is about to be written to a service. From here on the exchange is
    /// not tried elsewhere.
    pub fn dispatched(&mut self) {
        // SAFETY: owned (H1).
        unsafe { (self.vt().dispatched)(self.raw.data) }
    }

    /// The future of the host's that carries the exchange on a connection of its own; `None`: the host is
    /// older. It does not touch this half, which only must outlive it.
    pub(crate) fn start_dedicated(
        &mut self,
        stream: ByteStream,
        ahead: Buf,
    ) -> Result<Dedicating, ByteStream> {
        let known = offset_of!(abi::SendVt, dedicate) + size_of::<usize>();
        if self.vt().size < known {
            return Err(stream);
        }
        // SAFETY: owned (H1); stream and bytes are moved.
        let future =
            unsafe { (self.vt().dedicate)(self.raw.data, stream.into_raw(), ahead.into_raw()) };
        // SAFETY: the future resolves to a `DedicateOutcome`.
        Ok(Dedicating(unsafe { Foreign::new(future) }))
    }

    pub(crate) const fn end(&mut self) {
        self.ended = true;
    }

    /// Sidecar's end: nothing was and nothing will be written to a service. Ends the exchange; it may
    /// be tried elsewhere.
    pub fn refused(&mut self, reset: Reset) {
        self.ended = true;
        // SAFETY: owned (H1).
        unsafe { (self.vt().refused)(self.raw.data, reset_to_raw(reset)) }
    }
}

impl Drop for SendHalf {
    fn drop(&mut self) {
        let raw = abi::SendHalf { data: self.raw.data, vt: self.raw.vt };
        if self.ended {
            // SAFETY: owned (H1), dropped once.
            unsafe { (self.vt().drop)(self.raw.data) }
        } else {
            Unfinished::Send(raw).leave();
        }
    }
}

impl std::fmt::Debug for SendHalf {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("SendHalf").field("ended", &self.ended).finish_non_exhaustive()
    }
}

/// An exchange that the host carries on a connection of its own.
pub(crate) struct Dedicating(Foreign<abi::DedicateOutcome>);

impl Dedicating {
    /// `None`: the host failed.
    pub(crate) fn poll(&mut self, cx: &Context<'_>) -> Poll<Option<Dedicated>> {
        self.0.poll(cx).map(|outcome| {
            let abi::DedicateOutcome { how, reset, io, sent, received } = outcome?;
            Some(if how == abi::dedicated::FRAMED {
                // SAFETY: owned by the caller after FRAMED (`abi::DedicateOutcome`).
                Dedicated::Framed(unsafe { ByteStream::new(io) })
            } else {
                Dedicated::Ended { reset: reset_from_raw(reset), sent, received }
            })
        })
    }
}

/// The direction from the peer to here. Dropped unfinished it resets the exchange, as [`SendHalf`].
pub struct RecvHalf {
    raw: abi::RecvHalf,
    slot: WakerSlot,
    ended: bool,
}

// SAFETY: H3; `&self` reaches nothing of the host's.
unsafe impl Send for RecvHalf {}
// SAFETY: as above.
unsafe impl Sync for RecvHalf {}

impl RecvHalf {
    pub(crate) const fn end(&mut self) {
        self.ended = true;
    }

    /// Returns the next message; `None`: the direction has ended. Taking a message returns its credit
    /// to the peer. Cancelling it loses nothing.
    pub async fn recv(&mut self) -> Option<Result<Message, Reset>> {
        poll_fn(|cx| self.poll_recv(cx)).await
    }

    /// As [`Self::recv`].
    pub fn poll_recv(&mut self, cx: &mut Context<'_>) -> Poll<Option<Result<Message, Reset>>> {
        if self.ended {
            return Poll::Ready(None);
        }
        let mut raw = abi::Msg {
            field: 0,
            flags: 0,
            head: Buf::new().into_raw(),
            body: Buf::new().into_raw(),
        };
        let mut reset = reset_to_raw(Reset::new(failure::CANCELLED));
        let waker = self.slot.lend(cx);
        // SAFETY: owned (H1); waker, message and reset are valid for the call.
        let tag = unsafe {
            ((*self.raw.vt).poll_recv)(self.raw.data, waker, &raw mut raw, &raw mut reset)
        };
        Poll::Ready(match tag {
            abi::poll::PENDING => return Poll::Pending,
            abi::recv::MESSAGE => {
                let end = raw.flags & abi::msg::END != 0;
                self.ended = end;
                // SAFETY: filled in and moved to us after MESSAGE.
                let (head, body) = unsafe { (Buf::from_raw(raw.head), Buf::from_raw(raw.body)) };
                Some(Ok(Message { field: raw.field, end, head, body }))
            }
            abi::recv::FINISHED => {
                self.ended = true;
                None
            }
            abi::recv::RESET => {
                self.ended = true;
                Some(Err(reset_from_raw(reset)))
            }
            _ => {
                self.ended = true;
                Some(Err(Reset::new(failure::INTERNAL)))
            }
        })
    }
}

impl Drop for RecvHalf {
    fn drop(&mut self) {
        let raw = abi::RecvHalf { data: self.raw.data, vt: self.raw.vt };
        if self.ended {
            // SAFETY: owned (H1), dropped once.
            unsafe { ((*self.raw.vt).drop)(self.raw.data) }
        } else {
            Unfinished::Recv(raw).leave();
        }
    }
}

impl std::fmt::Debug for RecvHalf {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("RecvHalf").field("ended", &self.ended).finish_non_exhaustive()
    }
}

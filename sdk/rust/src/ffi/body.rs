//! A request's body.

use std::future::poll_fn;
use std::task::{Context, Poll};

use sidelane_abi as abi;

use super::buf::Buf;
use super::exchange::reset_from_raw;
use super::request::HeaderIter;
use super::waker::WakerSlot;
use crate::{Headers, Reset, failure};

/// A request's body, taken frame by frame. Not taking is backpressure; dropping it ends interest.
pub struct Body {
    raw: abi::Body,
    slot: WakerSlot,
    ended: bool,
}

// SAFETY: H3; `&self` reaches the length alone.
unsafe impl Send for Body {}
// SAFETY: as above.
unsafe impl Sync for Body {}

/// A frame of a body.
#[derive(Debug)]
pub enum Frame {
    /// A chunk.
    Data {
        /// Its bytes.
        bytes: Buf,
        /// Nothing follows.
        end: bool,
    },
    /// Trailers; nothing follows.
    Trailers(Headers),
}

impl Body {
    /// # Safety
    /// `raw` is moved to the caller (H1).
    pub(crate) const unsafe fn new(raw: abi::Body) -> Self {
        Self { raw, slot: WakerSlot::new(), ended: false }
    }

    /// Exact length, where known.
    #[must_use]
    pub fn length(&self) -> Option<u64> {
        (self.raw.length != abi::LENGTH_UNKNOWN).then_some(self.raw.length)
    }

    /// Returns the next frame; `None`: the body has ended. Cancelling it loses nothing.
    pub async fn frame(&mut self) -> Option<Result<Frame, Reset>> {
        poll_fn(|cx| self.poll_frame(cx)).await
    }

    /// As [`Self::frame`].
    pub fn poll_frame(&mut self, cx: &mut Context<'_>) -> Poll<Option<Result<Frame, Reset>>> {
        if self.ended {
            return Poll::Ready(None);
        }
        let mut frame = abi::Frame {
            data: Buf::new().into_raw(),
            end: 0,
            headers: std::ptr::null(),
            headers_len: 0,
            reset: abi::Reset { code: failure::NONE, protocol_code: abi::NO_PROTOCOL_CODE },
        };
        let waker = self.slot.lend(cx);
        // SAFETY: owned (H1); waker and frame are valid for the call.
        let tag = unsafe { ((*self.raw.vt).poll_frame)(self.raw.data, waker, &raw mut frame) };
        match tag {
            abi::poll::PENDING => Poll::Pending,
            abi::body::DATA => {
                let end = frame.end != 0;
                self.ended = end;
                // SAFETY: moved to us after DATA.
                let bytes = unsafe { Buf::from_raw(frame.data) };
                Poll::Ready(Some(Ok(Frame::Data { bytes, end })))
            }
            abi::body::TRAILERS => {
                self.ended = true;
                // SAFETY: valid until the next call on this body; copied here.
                let trailers = unsafe { HeaderIter::new(frame.headers, frame.headers_len) };
                Poll::Ready(Some(Ok(Frame::Trailers(trailers.collect()))))
            }
            abi::body::END => {
                self.ended = true;
                Poll::Ready(None)
            }
            abi::poll::CLOSED => {
                self.ended = true;
                Poll::Ready(Some(Err(reset_from_raw(frame.reset))))
            }
            _ => {
                self.ended = true;
                Poll::Ready(Some(Err(Reset::new(failure::INTERNAL))))
            }
        }
    }
}

impl Drop for Body {
    fn drop(&mut self) {
        // SAFETY: owned (H1), dropped once.
        unsafe { ((*self.raw.vt).drop)(self.raw.data) }
    }
}

impl std::fmt::Debug for Body {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Body").field("length", &self.length()).field("ended", &self.ended).finish()
    }
}

//! Bodies between hyper and an exchange.

use std::error::Error as _;
use std::io;
use std::pin::Pin;
use std::sync::Arc;
use std::sync::atomic::Ordering::Relaxed;
use std::task::{Context, Poll, ready};

use bytes::Bytes;
use http_body::{Body as _, Frame, SizeHint};
use hyper::body::Incoming;
use sidelane_abi::failure;

use crate::front::exchange::{Exchange, Output};
use crate::front::tls::remove_client_cert;
use crate::front::wire::Busy;
use crate::plugin::lend::{self, BodyFrame, Reset};

/// A request's body as a plugin reads it. What is not read is not taken from the client.
pub(super) struct RequestBody {
    incoming: Incoming,
    exchange: Arc<Exchange>,
    ended: bool,
    /// None once the body has ended.
    busy: Option<Busy>,
}

impl RequestBody {
    pub(super) fn new(incoming: Incoming, exchange: Arc<Exchange>, busy: Busy) -> Self {
        let ended = incoming.is_end_stream();
        Self { incoming, exchange, ended, busy: if ended { None } else { Some(busy) } }
    }

    fn end(&mut self, frame: BodyFrame) -> Poll<BodyFrame> {
        self.ended = true;
        self.busy = None;
        self.exchange.body_ended();
        Poll::Ready(frame)
    }
}

impl lend::Body for RequestBody {
    fn length(&self) -> Option<u64> {
        self.incoming.size_hint().exact()
    }

    fn poll_frame(&mut self, cx: &mut Context<'_>) -> Poll<BodyFrame> {
        if self.ended {
            return Poll::Ready(BodyFrame::End);
        }
        if let Some(busy) = &self.busy {
            busy.signals().look_ahead.store(false, Relaxed);
        }
        loop {
            let frame = match ready!(Pin::new(&mut self.incoming).poll_frame(cx)) {
                None => return self.end(BodyFrame::End),
                Some(Err(error)) => {
                    return self.end(BodyFrame::Failed(Reset::new(fault(&error))));
                }
                Some(Ok(frame)) => frame,
            };
            match frame.into_data() {
                Ok(bytes) if self.incoming.is_end_stream() => {
                    return self.end(BodyFrame::Data { bytes, end: true });
                }
                Ok(bytes) if bytes.is_empty() => {}
                Ok(bytes) => return Poll::Ready(BodyFrame::Data { bytes, end: false }),
                Err(frame) => {
                    if let Ok(mut trailers) = frame.into_trailers() {
                        remove_client_cert(&mut trailers);
                        return self.end(BodyFrame::Trailers(trailers));
                    }
                }
            }
        }
    }
}

impl Drop for RequestBody {
    fn drop(&mut self) {
        if let Some(busy) = &self.busy {
            busy.signals().unread.store(true, Relaxed);
        }
    }
}

/// Returns who broke a body: a client that left, or one that framed it wrongly.
fn fault(error: &hyper::Error) -> u32 {
    let cause = error.source().and_then(|source| source.downcast_ref::<io::Error>());
    match cause.map(io::Error::kind) {
        Some(io::ErrorKind::InvalidData | io::ErrorKind::InvalidInput) => failure::BAD_REQUEST,
        _ => failure::CLIENT_GONE,
    }
}

/// A response's body as hyper writes it.
pub(super) enum ResponseBody {
    /// All of it at once, of the very length that the head states, if it states one.
    Whole(Option<Bytes>),
    /// None, but the head may state the length of one (HEAD, 304).
    Absent,
    Streaming(Streaming),
}

/// A response's body that comes as the plugin puts it.
pub(super) struct Streaming {
    exchange: Arc<Exchange>,
    first: Option<Bytes>,
    stage: Stage,
    /// Bytes that are still owed to the announced length. hyper stops asking when it has them.
    owed: Option<u64>,
    /// hyper shall find the length in the head.
    stated: bool,
    /// What was put before an abort has had its turn to leave.
    flushed: bool,
    _busy: Busy,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Stage {
    Open,
    /// Nothing follows `first`, or what was last given to hyper.
    Ended,
    /// The exchange was aborted.
    Broken,
}

impl Streaming {
    pub(super) fn new(
        exchange: Arc<Exchange>,
        first: Option<Bytes>,
        end: bool,
        stated: Option<u64>,
        length: Option<u64>,
        busy: Busy,
    ) -> Self {
        Self {
            exchange,
            first,
            stage: if end { Stage::Ended } else { Stage::Open },
            owed: stated.or(length),
            stated: stated.is_some(),
            flushed: false,
            _busy: busy,
        }
    }

    fn data(&mut self, bytes: Bytes) -> Poll<Option<Result<Frame<Bytes>, BrokenOff>>> {
        if let Some(owed) = &mut self.owed {
            *owed = owed.saturating_sub(bytes.len() as u64);
        }
        Poll::Ready(Some(Ok(Frame::data(bytes))))
    }

    /// Ends the body without a clean end. hyper throws away what it has buffered when a body fails;
    /// one turn later it has written what the client could take.
    fn break_off(&mut self, cx: &mut Context<'_>) -> Poll<Option<Result<Frame<Bytes>, BrokenOff>>> {
        if self.flushed {
            return Poll::Ready(Some(Err(BrokenOff)));
        }
        self.flushed = true;
        cx.waker().wake_by_ref();
        Poll::Pending
    }

    fn poll_frame(
        &mut self,
        cx: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<Bytes>, BrokenOff>>> {
        if let Some(first) = self.first.take() {
            return self.data(first);
        }
        loop {
            match self.stage {
                Stage::Open => {}
                Stage::Ended if self.owed.is_none_or(|owed| owed == 0) => {
                    return Poll::Ready(None);
                }
                Stage::Ended | Stage::Broken => return self.break_off(cx),
            }
            match ready!(self.exchange.poll_output(cx, true)) {
                Output::Chunk { bytes, end } => {
                    if end {
                        self.stage = Stage::Ended;
                    }
                    return self.data(bytes);
                }
                Output::End(trailers) => {
                    self.stage = Stage::Ended;
                    if let Some(trailers) = trailers
                        && self.owed.is_none()
                    {
                        return Poll::Ready(Some(Ok(Frame::trailers(trailers))));
                    }
                }
                Output::Aborted(_) => self.stage = Stage::Broken,
                // Both come before the body only.
                Output::Interim(..) | Output::Head { .. } => {}
            }
        }
    }
}

impl Drop for Streaming {
    fn drop(&mut self) {
        if self.stage != Stage::Open {
            return;
        }
        if self.owed == Some(0) {
            self.exchange.take_all();
        } else {
            self.exchange.client_gone(Reset::new(failure::CLIENT_GONE));
        }
    }
}

/// A response was aborted: hyper closes the connection without a clean end.
#[derive(Clone, Copy, Debug, thiserror::Error)]
#[error("the response was broken off")]
pub(super) struct BrokenOff;

impl http_body::Body for ResponseBody {
    type Data = Bytes;
    type Error = BrokenOff;

    fn poll_frame(
        self: Pin<&mut Self>,
        cx: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<Bytes>, BrokenOff>>> {
        match self.get_mut() {
            Self::Whole(bytes) => Poll::Ready(bytes.take().map(|bytes| Ok(Frame::data(bytes)))),
            Self::Absent => Poll::Ready(None),
            Self::Streaming(streaming) => streaming.poll_frame(cx),
        }
    }

    fn is_end_stream(&self) -> bool {
        match self {
            Self::Whole(bytes) => bytes.is_none(),
            // Without a body hyper drops the length that the head states.
            Self::Absent => false,
            // One that ends short of its length must not look whole: hyper finds out by polling.
            Self::Streaming(streaming) => {
                streaming.first.is_none()
                    && match streaming.owed {
                        Some(owed) => owed == 0,
                        None => streaming.stage == Stage::Ended,
                    }
            }
        }
    }

    fn size_hint(&self) -> SizeHint {
        match self {
            Self::Whole(bytes) => {
                SizeHint::with_exact(bytes.as_ref().map_or(0, |bytes| bytes.len() as u64))
            }
            Self::Absent => SizeHint::default(),
            Self::Streaming(streaming) => match streaming.owed {
                Some(owed) if !streaming.stated => SizeHint::with_exact(owed),
                _ => SizeHint::default(),
            },
        }
    }
}

//! A request's body on its way to the service, as hyper takes it.
//!
//! The receiving half stays shared with the task that delivers the exchange: hyper drops a body when
//! the service no longer wants it, and the exchange must not end by that.

use std::pin::Pin;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::task::{Context, Poll, ready};

use http::header::{HeaderMap, HeaderName, HeaderValue};
use http_body::{Body, Frame, SizeHint};
use sidelane_plugin::{Buf, Message, RecvHalf, Reset, failure};

use sidelane_http_born::body::{self, FIELD_BODY, FIELD_TRAILERS};
use sidelane_http_born::fields::{self, Kind};

/// Why a body broke off; [`Source::failed`] keeps it for the task that delivers the exchange.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("request body: {0}")]
pub(crate) struct UploadError(pub(crate) Reset);

/// Where a body's messages come from.
#[derive(Debug)]
pub(crate) struct Source {
    recv: RecvHalf,
    /// Bytes that must still come, where the length is known.
    left: Option<u64>,
    /// The last message was taken.
    pub(crate) finished: bool,
    /// Why it broke off.
    pub(crate) failed: Option<Reset>,
    /// A message was taken since this was last cleared.
    pub(crate) moved: bool,
    /// The service asked for more than had come: what is slow is not the service.
    pub(crate) starved: bool,
    /// A message was taken: the body cannot be sent from its beginning again.
    pub(crate) begun: bool,
}

/// A [`Source`] and who shares it. The lock is only ever taken by the one task.
#[derive(Clone, Debug)]
pub(crate) struct SharedSource(Arc<Mutex<Source>>);

impl SharedSource {
    pub(crate) fn new(recv: RecvHalf, left: Option<u64>) -> Self {
        Self(Arc::new(Mutex::new(Source {
            recv,
            left,
            finished: false,
            failed: None,
            moved: false,
            starved: false,
            begun: false,
        })))
    }

    pub(crate) fn lock(&self) -> MutexGuard<'_, Source> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Source {
    /// Takes and drops what still comes; ready once the direction has ended.
    pub(crate) fn poll_discard(&mut self, cx: &mut Context<'_>) -> Poll<()> {
        while !self.finished && self.failed.is_none() {
            match ready!(self.recv.poll_recv(cx)) {
                None => self.finished = true,
                Some(Ok(message)) => self.finished = message.end,
                Some(Err(reset)) => self.failed = Some(reset),
            }
        }
        Poll::Ready(())
    }

    fn poll_frame(
        &mut self,
        cx: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<Buf>, UploadError>>> {
        loop {
            if let Some(reset) = self.failed {
                return Poll::Ready(Some(Err(UploadError(reset))));
            }
            if self.finished {
                return Poll::Ready(None);
            }
            let Poll::Ready(received) = self.recv.poll_recv(cx) else {
                self.starved = true;
                return Poll::Pending;
            };
            self.starved = false;
            self.moved = true;
            self.begun = true;
            match self.take(received) {
                Ok(Some(frame)) => return Poll::Ready(Some(Ok(frame))),
                Ok(None) => {}
                Err(reset) => self.failed = Some(reset),
            }
        }
    }

    fn take(
        &mut self,
        received: Option<Result<Message, Reset>>,
    ) -> Result<Option<Frame<Buf>>, Reset> {
        let Some(message) = received.transpose()? else {
            self.finished = true;
            return self.complete().map(|()| None);
        };
        let frame = match message.field {
            FIELD_BODY => {
                let range = body::decode_body(&message.body).map_err(|_| bad_request())?;
                let data = message.body.slice(range);
                if let Some(left) = &mut self.left {
                    *left = left.checked_sub(data.len() as u64).ok_or_else(bad_request)?;
                }
                (!data.is_empty()).then(|| Frame::data(data))
            }
            FIELD_TRAILERS if message.end => {
                Some(Frame::trailers(decode_trailers(&message.body).ok_or_else(bad_request)?))
            }
            _ => return Err(bad_request()),
        };
        if message.end {
            self.finished = true;
            self.complete()?;
        }
        Ok(frame)
    }

    /// Checks that a body of known length came whole: the service has been told that length.
    fn complete(&self) -> Result<(), Reset> {
        match self.left {
            Some(left) if left > 0 => Err(bad_request()),
            _ => Ok(()),
        }
    }
}

const fn bad_request() -> Reset {
    Reset::new(failure::BAD_REQUEST)
}

fn decode_trailers(payload: &[u8]) -> Option<HeaderMap> {
    let fields = body::decode_trailers(payload).ok()?;
    let mut trailers = HeaderMap::with_capacity(fields.count);
    for (name, value) in fields.iter() {
        if fields::kind(name) == Kind::EndToEnd {
            let (name, value) =
                (HeaderName::from_bytes(name).ok()?, HeaderValue::from_bytes(value).ok()?);
            trailers.append(name, value);
        }
    }
    Some(trailers)
}

/// A request's body.
#[derive(Debug)]
pub(crate) enum Upload {
    /// None, or all taken.
    Empty,
    /// All of it, in the exchange's first message.
    Whole(Buf),
    /// More than came with the first message.
    Stream {
        /// What came with the first message, until it is taken.
        first: Buf,
        /// Where the rest comes from.
        source: SharedSource,
        /// Exact length of what is not taken yet, where it is known.
        left: Option<u64>,
    },
}

impl Body for Upload {
    type Data = Buf;
    type Error = UploadError;

    fn poll_frame(
        self: Pin<&mut Self>,
        cx: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<Buf>, UploadError>>> {
        let this = self.get_mut();
        match this {
            Self::Empty => Poll::Ready(None),
            Self::Whole(bytes) => {
                let bytes = std::mem::take(bytes);
                *this = Self::Empty;
                Poll::Ready(Some(Ok(Frame::data(bytes))))
            }
            Self::Stream { first, source, left } => {
                let frame = if first.is_empty() {
                    ready!(source.lock().poll_frame(cx))
                } else {
                    Some(Ok(Frame::data(std::mem::take(first))))
                };
                if let (Some(left), Some(Ok(frame))) = (left, &frame) {
                    *left =
                        left.saturating_sub(frame.data_ref().map_or(0, |data| data.len() as u64));
                }
                Poll::Ready(frame)
            }
        }
    }

    fn is_end_stream(&self) -> bool {
        match self {
            Self::Empty => true,
            Self::Whole(_) => false,
            Self::Stream { first, source, .. } => {
                first.is_empty() && {
                    let source = source.lock();
                    source.finished && source.failed.is_none()
                }
            }
        }
    }

    fn size_hint(&self) -> SizeHint {
        match self {
            Self::Empty => SizeHint::with_exact(0),
            Self::Whole(bytes) => SizeHint::with_exact(bytes.len() as u64),
            Self::Stream { left: Some(left), .. } => SizeHint::with_exact(*left),
            Self::Stream { left: None, .. } => SizeHint::default(),
        }
    }
}

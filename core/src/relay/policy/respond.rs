//! The ends of an exchange at the client's side as a route's policies shape them: the response with its
//! changed fields and its compression, the request's body with its limit.
//!
//! One type for all routes: one without policies looks at an empty place and goes on.

use std::sync::Arc;
use std::task::{Context, Poll, ready};

use bytes::{Bytes, BytesMut};
use http::header::{CONTENT_LENGTH, STRICT_TRANSPORT_SECURITY, WWW_AUTHENTICATE};
use http::{HeaderMap, HeaderValue, StatusCode};
use sidelane_abi::failure;

use super::super::affinity::Sticky;
use super::compress::{self, Choice, Gzip};
use super::{Refusal, RouteState, change};
use crate::metrics::Record;
use crate::plugin::lend::{
    Body, BodyFrame, Closed, RequestHead, Reset, Responder, ResponseHead, StreamFuture,
};

/// A responder that counts what it answers and shapes it as a route says.
pub(in crate::relay) struct Shaped<R> {
    inner: R,
    record: Arc<Record>,
    shaping: Option<Box<Shaping>>,
}

/// What a route changes in a response.
pub(in crate::relay) struct Shaping {
    state: Arc<RouteState>,
    is_head: bool,
    /// The response may be compressed, and whether the client takes it.
    takes_gzip: Option<bool>,
    /// Said with a 401 of ours.
    challenge: Option<HeaderValue>,
    /// Which sidecar it was given.
    sticky: Option<Arc<Sticky>>,
    /// The client came by `https`, to this relay or to a proxy that it trusts.
    is_https: bool,
    gzip: Option<Gzip>,
    /// A chunk that the client's connection had no room for yet.
    waiting: Option<Waiting>,
}

/// The compressed form of a chunk that its owner still has: it comes again with it.
struct Waiting {
    bytes: Option<Bytes>,
    /// Place and length of the chunk.
    of: (usize, usize),
    end: bool,
}

impl Shaping {
    /// What a route changes in the response to a request, which came by `scheme`.
    pub(in crate::relay) fn new(
        state: &Arc<RouteState>,
        head: &RequestHead,
        scheme: &str,
    ) -> Box<Self> {
        // What becomes a byte stream has no body.
        let may_compress = state.policies.compression.is_some() && !head.can_upgrade;
        Box::new(Self {
            state: Arc::clone(state),
            is_head: head.method == http::Method::HEAD,
            takes_gzip: may_compress.then(|| compress::accepts_gzip(&head.headers)),
            challenge: None,
            sticky: None,
            is_https: scheme == "https",
            gzip: None,
            waiting: None,
        })
    }

    /// Asks the client who it is where the answer is a 401.
    pub(in crate::relay) fn challenge(
        mut self: Box<Self>,
        challenge: Option<HeaderValue>,
    ) -> Box<Self> {
        self.challenge = challenge;
        self
    }

    /// Tells the client which sidecar has it, where the route asks for that.
    pub(in crate::relay) fn sticky(mut self: Box<Self>, sticky: Option<Arc<Sticky>>) -> Box<Self> {
        self.sticky = sticky;
        self
    }

    fn head(&mut self, head: &mut ResponseHead, first: &mut Option<Bytes>, end: bool) {
        if head.status == StatusCode::UNAUTHORIZED
            && let Some(challenge) = self.challenge.take()
        {
            head.headers.insert(WWW_AUTHENTICATE, challenge);
        }
        self.compress(head, first, end);
        change(&mut head.headers, &self.state.policies.response_headers);
        if let (Some(sticky), Some(affinity)) = (&self.sticky, &self.state.policies.affinity) {
            let path = &self.state.route.matches.path_prefix;
            sticky.tell(affinity, path, self.is_https, &mut head.headers);
        }
        if let Some(hsts) = &self.state.hsts {
            // RFC 6797 §7.2: not a word of it without TLS, the service's own included.
            if self.is_https {
                head.headers.insert(STRICT_TRANSPORT_SECURITY, hsts.clone());
            } else {
                head.headers.remove(STRICT_TRANSPORT_SECURITY);
            }
        }
    }

    fn compress(&mut self, head: &mut ResponseHead, first: &mut Option<Bytes>, end: bool) {
        let (Some(takes_gzip), Some(config)) = (self.takes_gzip, &self.state.policies.compression)
        else {
            return;
        };
        let said = || {
            let value = head.headers.get(CONTENT_LENGTH)?;
            value.to_str().ok()?.parse().ok()
        };
        let known = head.body_length.or_else(|| match self.is_head {
            true => said(),
            false => end.then(|| first.as_ref().map_or(0, |first| first.len() as u64)),
        });
        let choice = compress::choose(config, takes_gzip, head.status, &head.headers, known);
        if choice == Choice::Never {
            return;
        }
        compress::vary(&mut head.headers);
        if choice == Choice::Other {
            return;
        }
        if self.is_head {
            // What GET gets has these fields, and another length (RFC 9110 §8.6, §9.3.2).
            compress::mark(&mut head.headers);
            head.body_length = None;
            return;
        }
        let Some(mut gzip) = Gzip::begin(config) else {
            self.state.metrics.uncompressed();
            return;
        };
        compress::mark(&mut head.headers);
        head.body_length = None;
        if end {
            let plain = first.take().unwrap_or_default();
            let packed = gzip.end(&plain);
            self.state.metrics.compressed(plain.len(), packed.len());
            head.body_length = Some(packed.len() as u64);
            *first = Some(packed);
            return;
        }
        if let Some(plain) = first {
            let packed = gzip.chunk(plain);
            self.state.metrics.compressed(plain.len(), packed.len());
            *plain = packed;
        }
        self.gzip = Some(gzip);
    }

    /// Returns the compressed form of the chunk at hand, the same one until it was taken.
    fn pack(&mut self, chunk: &[u8], end: bool) {
        let Some(mut gzip) = self.gzip.take() else { return };
        let packed = if end {
            gzip.end(chunk)
        } else {
            let packed = gzip.chunk(chunk);
            self.gzip = Some(gzip);
            packed
        };
        self.state.metrics.compressed(chunk.len(), packed.len());
        self.waiting = Some(Waiting { bytes: Some(packed), of: place(chunk), end });
    }

    /// Sends a chunk compressed. `Pending` leaves it with its owner, who comes again with it.
    fn poll_body<R: Responder>(
        &mut self,
        inner: &mut R,
        cx: &mut Context<'_>,
        chunk: &mut Option<Bytes>,
        end: bool,
    ) -> Poll<Result<(), Closed>> {
        let given = chunk.as_deref().unwrap_or_default();
        if let Some(waiting) = &mut self.waiting {
            let is_same = waiting.of == place(given) && waiting.end == end;
            ready!(inner.poll_body(cx, &mut waiting.bytes, waiting.end))?;
            self.waiting = None;
            if is_same {
                *chunk = None;
                return Poll::Ready(Ok(()));
            }
        }
        if given.is_empty() && !end {
            *chunk = None;
            return Poll::Ready(Ok(()));
        }
        self.pack(given, end);
        let Some(waiting) = &mut self.waiting else { return Poll::Ready(Err(Closed)) };
        ready!(inner.poll_body(cx, &mut waiting.bytes, waiting.end))?;
        self.waiting = None;
        *chunk = None;
        Poll::Ready(Ok(()))
    }

    /// Returns what is left to be sent behind all that was.
    fn rest(&mut self) -> Option<Bytes> {
        let waiting = self.waiting.take().and_then(|waiting| waiting.bytes);
        let end = self.gzip.take().map(|gzip| gzip.end(&[]));
        match (waiting, end) {
            (Some(waiting), Some(end)) => {
                let mut rest = BytesMut::from(&*waiting);
                rest.extend_from_slice(&end);
                Some(rest.freeze())
            }
            (waiting, end) => waiting.or(end),
        }
    }
}

fn place(chunk: &[u8]) -> (usize, usize) {
    (chunk.as_ptr().addr(), chunk.len())
}

impl<R> Shaped<R> {
    /// Returns a responder that counts.
    pub(in crate::relay) fn new(inner: R, record: &Arc<Record>) -> Self {
        Self { inner, record: Arc::clone(record), shaping: None }
    }

    /// Shapes the response.
    pub(in crate::relay) fn shape(self, shaping: Box<Shaping>) -> Self {
        Self { shaping: Some(shaping), ..self }
    }
}

impl<R: Responder> Responder for Shaped<R> {
    fn informational(&mut self, status: StatusCode, headers: HeaderMap) -> Result<(), Closed> {
        self.inner.informational(status, headers)
    }

    fn head(
        &mut self,
        mut head: ResponseHead,
        mut first: Option<Bytes>,
        end: bool,
    ) -> Result<(), Closed> {
        let status = head.status;
        if let Some(shaping) = &mut self.shaping {
            shaping.head(&mut head, &mut first, end);
        }
        self.inner.head(head, first, end)?;
        self.record.answered(status);
        Ok(())
    }

    fn poll_body(
        &mut self,
        cx: &mut Context<'_>,
        chunk: &mut Option<Bytes>,
        end: bool,
    ) -> Poll<Result<(), Closed>> {
        match &mut self.shaping {
            Some(shaping) if shaping.gzip.is_some() || shaping.waiting.is_some() => {
                shaping.poll_body(&mut self.inner, cx, chunk, end)
            }
            _ => self.inner.poll_body(cx, chunk, end),
        }
    }

    fn finish(&mut self, trailers: Option<HeaderMap>) -> Result<(), Closed> {
        match self.shaping.as_mut().and_then(|shaping| shaping.rest()) {
            Some(rest) => self.inner.finish_behind(rest, trailers),
            None => self.inner.finish(trailers),
        }
    }

    fn finish_behind(&mut self, last: Bytes, trailers: Option<HeaderMap>) -> Result<(), Closed> {
        self.inner.finish_behind(last, trailers)
    }

    fn abort(&mut self, reset: Reset) {
        self.inner.abort(reset);
    }

    fn poll_closed(&mut self, cx: &mut Context<'_>) -> Poll<Reset> {
        self.inner.poll_closed(cx)
    }

    fn upgrade(&mut self) -> StreamFuture {
        self.inner.upgrade()
    }
}

/// A request's body that may be no longer than its route allows.
pub(in crate::relay) struct LimitedBody<B> {
    inner: B,
    state: Arc<RouteState>,
    /// Bytes that may still come; `None`: any number.
    left: Option<u64>,
    is_over: bool,
}

impl<B: Body> LimitedBody<B> {
    /// Limits a body to what the route allows.
    pub(in crate::relay) fn new(inner: B, state: &Arc<RouteState>) -> Self {
        let left = state.policies.limits.body;
        Self { inner, state: Arc::clone(state), left, is_over: false }
    }
}

impl<B: Body> Body for LimitedBody<B> {
    fn length(&self) -> Option<u64> {
        self.inner.length()
    }

    fn poll_frame(&mut self, cx: &mut Context<'_>) -> Poll<BodyFrame> {
        const TOO_LARGE: Reset = Reset { code: failure::TOO_LARGE, protocol_code: None };
        if self.is_over {
            return Poll::Ready(BodyFrame::Failed(TOO_LARGE));
        }
        let frame = ready!(self.inner.poll_frame(cx));
        if let (BodyFrame::Data { bytes, .. }, Some(left)) = (&frame, &mut self.left) {
            match left.checked_sub(bytes.len() as u64) {
                Some(less) => *left = less,
                None => {
                    self.is_over = true;
                    self.state.refused(Refusal::too_large(), None);
                    return Poll::Ready(BodyFrame::Failed(TOO_LARGE));
                }
            }
        }
        Poll::Ready(frame)
    }
}

#[cfg(test)]
mod tests;

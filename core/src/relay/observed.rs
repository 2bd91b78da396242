//! A responder that tells whoever follows the exchange which status it was answered with.

use std::sync::Arc;
use std::task::{Context, Poll};

use bytes::Bytes;
use http::{HeaderMap, StatusCode};

use crate::metrics::Record;
use crate::plugin::lend::{Closed, Reset, Responder, ResponseHead, StreamFuture};

/// Passes everything on.
pub(super) struct Observed<R> {
    responder: R,
    /// `None` where nobody follows.
    record: Option<Arc<Record>>,
}

impl<R> Observed<R> {
    pub(super) fn new(responder: R, record: &Arc<Record>) -> Self {
        Self { responder, record: record.is_followed().then(|| Arc::clone(record)) }
    }
}

impl<R: Responder> Responder for Observed<R> {
    fn informational(&mut self, status: StatusCode, headers: HeaderMap) -> Result<(), Closed> {
        self.responder.informational(status, headers)
    }

    fn head(&mut self, head: ResponseHead, first: Option<Bytes>, end: bool) -> Result<(), Closed> {
        if let Some(record) = &self.record {
            record.answered(head.status.as_u16());
        }
        self.responder.head(head, first, end)
    }

    fn poll_body(
        &mut self,
        cx: &mut Context<'_>,
        chunk: &mut Option<Bytes>,
        end: bool,
    ) -> Poll<Result<(), Closed>> {
        self.responder.poll_body(cx, chunk, end)
    }

    fn finish(&mut self, trailers: Option<HeaderMap>) -> Result<(), Closed> {
        self.responder.finish(trailers)
    }

    fn abort(&mut self, reset: Reset) {
        self.responder.abort(reset);
    }

    fn poll_closed(&mut self, cx: &mut Context<'_>) -> Poll<Reset> {
        self.responder.poll_closed(cx)
    }

    fn upgrade(&mut self) -> StreamFuture {
        self.responder.upgrade()
    }
}

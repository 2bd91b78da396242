//! What is seen of a connection to a service while hyper drives it: whether bytes came, and interim
//! responses.

use std::pin::Pin;
use std::sync::atomic::{AtomicBool, AtomicU32, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::task::{Context, Poll};

use http::{Extensions, Request};
use hyper::rt::{Read, ReadBufCursor, Write};
use sidelane_http_born::fields::{self, Kind, Nominated};
use sidelane_http_born::wire::FieldsSize;
use sidelane_plugin::{Buf, ByteStream, Message};

use crate::payload::{self, FIELD_RESPONSE};

/// Interim responses kept of one read; what a service sends beyond is dropped. They are sent on
/// before the next read, so this only bounds a flood.
const INTERIM_MAX: usize = 32;

/// What is watched of a connection while hyper drives it.
#[derive(Debug, Default)]
pub(crate) struct Watch {
    /// Reads that gave bytes or the end, since the request was begun.
    reads: AtomicU32,
    /// A read has failed.
    failed: AtomicBool,
    interim: Mutex<Vec<Message>>,
}

impl Watch {
    /// Begins a request.
    pub(crate) fn begin(&self) {
        self.reads.store(0, Ordering::Relaxed);
        self.take_interim();
    }

    /// Whether no byte can have come since [`Self::begin`], the connection having ended: its end is
    /// one read, or a read that failed.
    pub(crate) fn nothing_came(&self) -> bool {
        let end = u32::from(!self.failed.load(Ordering::Relaxed));
        self.reads.load(Ordering::Relaxed) <= end
    }

    /// Takes the interim responses that came.
    pub(crate) fn take_interim(&self) -> Vec<Message> {
        std::mem::take(&mut *self.interim.lock().unwrap_or_else(PoisonError::into_inner))
    }

    /// Returns what has hyper hand over the interim responses to a request that carries it.
    pub(super) fn extensions(self: &Arc<Self>) -> Extensions {
        let watch = Arc::clone(self);
        let mut request = Request::new(());
        hyper::ext::on_informational(&mut request, move |response| {
            let mut interim = watch.interim.lock().unwrap_or_else(PoisonError::into_inner);
            if interim.len() < INTERIM_MAX {
                let head = encode_interim(response.status().as_u16(), response.headers());
                interim.push(Message { field: FIELD_RESPONSE, end: false, head, body: Buf::new() });
            }
        });
        std::mem::take(request.extensions_mut())
    }
}

pub(crate) fn encode_interim(status: u16, headers: &http::HeaderMap) -> Buf {
    let fields =
        || headers.iter().map(|(name, value)| (name.as_str().as_bytes(), value.as_bytes()));
    let nominated = Nominated::scan(fields());
    let mut size = FieldsSize::default();
    for (name, value) in fields() {
        size.add(name.len(), value.len());
    }
    let passing = fields()
        .filter(|(name, _)| fields::kind(name) == Kind::EndToEnd && !nominated.contains(name));
    payload::encode_response(status, passing, size, None, 0)
}

/// A byte stream whose reads are counted.
#[derive(Debug)]
pub(super) struct Counted {
    pub(super) stream: ByteStream,
    pub(super) watch: Arc<Watch>,
}

impl Read for Counted {
    fn poll_read(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buf: ReadBufCursor<'_>,
    ) -> Poll<std::io::Result<()>> {
        let read = Read::poll_read(Pin::new(&mut self.stream), cx, buf);
        match &read {
            Poll::Ready(Ok(())) => {
                self.watch.reads.fetch_add(1, Ordering::Relaxed);
            }
            Poll::Ready(Err(_)) => self.watch.failed.store(true, Ordering::Relaxed),
            Poll::Pending => {}
        }
        read
    }
}

impl Write for Counted {
    fn poll_write(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        bytes: &[u8],
    ) -> Poll<std::io::Result<usize>> {
        Write::poll_write(Pin::new(&mut self.stream), cx, bytes)
    }

    fn poll_flush(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<std::io::Result<()>> {
        Write::poll_flush(Pin::new(&mut self.stream), cx)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<std::io::Result<()>> {
        Write::poll_shutdown(Pin::new(&mut self.stream), cx)
    }

    fn is_write_vectored(&self) -> bool {
        Write::is_write_vectored(&self.stream)
    }

    fn poll_write_vectored(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        parts: &[std::io::IoSlice<'_>],
    ) -> Poll<std::io::Result<usize>> {
        Write::poll_write_vectored(Pin::new(&mut self.stream), cx, parts)
    }
}

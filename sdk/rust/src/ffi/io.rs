//! Byte streams of the host's.

use std::io::{self, IoSlice};
use std::mem::MaybeUninit;
use std::pin::Pin;
use std::task::{Context, Poll, ready};

use sidelane_abi as abi;
use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};

use super::buf::BufBuilder;
use super::waker::WakerSlot;

/// Most elements of one vectored write (`abi::IoVt::poll_writev`).
const IOVECS_MAX: usize = 64;

/// A byte stream, each direction closed on its own: tokio's `AsyncRead` and `AsyncWrite`, and with the
/// feature `hyper` hyper's `Read` and `Write`. Dropping it closes both directions.
pub struct ByteStream {
    raw: abi::Io,
    reader: WakerSlot,
    writer: WakerSlot,
}

// SAFETY: H3; `&self` reaches nothing.
unsafe impl Send for ByteStream {}
// SAFETY: as above.
unsafe impl Sync for ByteStream {}

impl ByteStream {
    /// # Safety
    /// `raw` is moved to the caller (H1).
    pub(crate) const unsafe fn new(raw: abi::Io) -> Self {
        Self { raw, reader: WakerSlot::new(), writer: WakerSlot::new() }
    }

    /// Moves it to the host.
    pub(crate) fn into_raw(self) -> abi::Io {
        let mut this = std::mem::ManuallyDrop::new(self);
        this.reader = WakerSlot::new();
        this.writer = WakerSlot::new();
        abi::Io { data: this.raw.data, vt: this.raw.vt }
    }

    fn vt(&self) -> &abi::IoVt {
        // SAFETY: owned (H1).
        unsafe { &*self.raw.vt }
    }

    /// Reads into `room`; `Ok(n)`: its first `n` bytes are initialised.
    fn poll_read_into(
        &mut self,
        cx: &Context<'_>,
        room: &mut [MaybeUninit<u8>],
    ) -> Poll<io::Result<usize>> {
        // SAFETY: the slice is valid for its length.
        unsafe { self.poll_read_raw(cx, room.as_mut_ptr().cast(), room.len()) }
    }

    /// Reads at most what `builder` has room for.
    pub(crate) fn poll_read_builder(
        &mut self,
        cx: &Context<'_>,
        builder: &mut BufBuilder,
    ) -> Poll<io::Result<usize>> {
        let (ptr, len) = builder.spare();
        // SAFETY: the builder's room.
        let read = ready!(unsafe { self.poll_read_raw(cx, ptr, len) })?;
        // SAFETY: the host wrote that many bytes there.
        unsafe { builder.written(read) };
        Poll::Ready(Ok(read))
    }

    /// # Safety
    /// `ptr` is valid for writes of `len` bytes.
    unsafe fn poll_read_raw(
        &mut self,
        cx: &Context<'_>,
        ptr: *mut u8,
        len: usize,
    ) -> Poll<io::Result<usize>> {
        if len == 0 {
            return Poll::Ready(Ok(0));
        }
        let waker = self.reader.lend(cx);
        // SAFETY: owned (H1); waker and room are valid for the call.
        let read =
            ready!(result(unsafe { (self.vt().poll_read)(self.raw.data, waker, ptr, len) }))?;
        if read > len {
            return Poll::Ready(Err(io::Error::other("the host read past the buffer")));
        }
        Poll::Ready(Ok(read))
    }

    fn poll_writev(&mut self, cx: &Context<'_>, parts: &[IoSlice<'_>]) -> Poll<io::Result<usize>> {
        // An empty leading part would make a write of 0 look like the end.
        let parts = &parts[parts.iter().take_while(|part| part.is_empty()).count()..];
        if parts.is_empty() {
            return Poll::Ready(Ok(0));
        }
        let waker = self.writer.lend(cx);
        let count = parts.len().min(IOVECS_MAX);
        // SAFETY: owned (H1); an `IoSlice` has the layout of `struct iovec`, and so has `abi::IoVec`.
        result(unsafe {
            (self.vt().poll_writev)(self.raw.data, waker, parts.as_ptr().cast(), count)
        })
    }

    fn poll_flushed(&mut self, cx: &Context<'_>) -> Poll<io::Result<()>> {
        let waker = self.writer.lend(cx);
        // SAFETY: owned (H1); the waker is valid for the call.
        result(unsafe { (self.vt().poll_flush)(self.raw.data, waker) }).map_ok(drop)
    }

    fn poll_shut(&mut self, cx: &Context<'_>) -> Poll<io::Result<()>> {
        let waker = self.writer.lend(cx);
        // SAFETY: owned (H1); the waker is valid for the call.
        result(unsafe { (self.vt().poll_shutdown)(self.raw.data, waker) }).map_ok(drop)
    }
}

fn result(result: abi::IoRes) -> Poll<io::Result<usize>> {
    match result.tag {
        abi::poll::PENDING => Poll::Pending,
        abi::poll::READY => Poll::Ready(Ok(result.n)),
        abi::io::ERROR => Poll::Ready(Err(io::Error::from_raw_os_error(result.err))),
        _ => Poll::Ready(Err(io::Error::other("the host's stream failed"))),
    }
}

impl Drop for ByteStream {
    fn drop(&mut self) {
        // SAFETY: owned (H1), dropped once.
        unsafe { (self.vt().drop)(self.raw.data) }
    }
}

impl AsyncRead for ByteStream {
    fn poll_read(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buf: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        // SAFETY: nothing initialised is made uninitialised.
        let read = ready!(self.poll_read_into(cx, unsafe { buf.unfilled_mut() }))?;
        // SAFETY: the host wrote that many bytes there.
        unsafe { buf.assume_init(read) };
        buf.advance(read);
        Poll::Ready(Ok(()))
    }
}

impl AsyncWrite for ByteStream {
    fn poll_write(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        bytes: &[u8],
    ) -> Poll<io::Result<usize>> {
        self.poll_writev(cx, &[IoSlice::new(bytes)])
    }

    fn poll_write_vectored(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        parts: &[IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        self.poll_writev(cx, parts)
    }

    fn is_write_vectored(&self) -> bool {
        true
    }

    fn poll_flush(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        self.poll_flushed(cx)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        self.poll_shut(cx)
    }
}

#[cfg(feature = "hyper")]
impl hyper::rt::Read for ByteStream {
    fn poll_read(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        mut buf: hyper::rt::ReadBufCursor<'_>,
    ) -> Poll<io::Result<()>> {
        // SAFETY: nothing initialised is made uninitialised.
        let read = ready!(self.poll_read_into(cx, unsafe { buf.as_mut() }))?;
        // SAFETY: the host wrote that many bytes there.
        unsafe { buf.advance(read) };
        Poll::Ready(Ok(()))
    }
}

#[cfg(feature = "hyper")]
impl hyper::rt::Write for ByteStream {
    fn poll_write(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        bytes: &[u8],
    ) -> Poll<io::Result<usize>> {
        self.poll_writev(cx, &[IoSlice::new(bytes)])
    }

    fn poll_write_vectored(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        parts: &[IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        self.poll_writev(cx, parts)
    }

    fn is_write_vectored(&self) -> bool {
        true
    }

    fn poll_flush(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        self.poll_flushed(cx)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        self.poll_shut(cx)
    }
}

impl std::fmt::Debug for ByteStream {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("ByteStream").finish_non_exhaustive()
    }
}

//! Byte streams: pipes in memory, lent to a plugin or held by the test.

use std::collections::VecDeque;
use std::ffi::c_void;
use std::future::poll_fn;
use std::io::{self, IoSlice};
use std::pin::Pin;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::task::{Context, Poll, Waker};

use sidelane_abi as abi;
use tokio::io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt, ReadBuf};

use super::lent::{drop_lent, lend, using};
use super::waker::{HostWaker, keep};
use super::world::World;

/// What a pipe holds per direction before its writer waits; a socket's order of magnitude.
const PIPE_BYTES: usize = 64 * 1024;

const EPIPE: i32 = 32;
const EIO: i32 = 5;

/// One direction.
struct Half {
    bytes: VecDeque<u8>,
    capacity: usize,
    ended: bool,
    reader_gone: bool,
    broken: Option<i32>,
    reader: Option<Waker>,
    writer: Option<Waker>,
}

impl Half {
    fn wake(&mut self) {
        for waker in [self.reader.take(), self.writer.take()].into_iter().flatten() {
            waker.wake();
        }
    }
}

type SharedHalf = Arc<Mutex<Half>>;

fn lock(half: &SharedHalf) -> MutexGuard<'_, Half> {
    half.lock().unwrap_or_else(PoisonError::into_inner)
}

/// The test's end of a byte stream. Dropping it closes both directions.
pub struct TestStream {
    read: SharedHalf,
    write: SharedHalf,
}

pub(crate) fn pair() -> (TestStream, TestStream) {
    let half = || {
        Arc::new(Mutex::new(Half {
            bytes: VecDeque::new(),
            capacity: PIPE_BYTES,
            ended: false,
            reader_gone: false,
            broken: None,
            reader: None,
            writer: None,
        }))
    };
    let (a, b) = (half(), half());
    (TestStream { read: a.clone(), write: b.clone() }, TestStream { read: b, write: a })
}

impl TestStream {
    /// Writes all of `bytes`.
    ///
    /// # Panics
    /// Where the plugin no longer reads.
    pub async fn write(&mut self, bytes: &[u8]) {
        AsyncWriteExt::write_all(self, bytes).await.expect("the plugin reads");
    }

    /// Ends the direction towards the plugin.
    pub async fn shutdown(&mut self) {
        AsyncWriteExt::shutdown(self).await.expect("a pipe shuts down");
    }

    /// Reads exactly `len` bytes.
    ///
    /// # Panics
    /// Where the plugin ends first.
    pub async fn read(&mut self, len: usize) -> Vec<u8> {
        let mut bytes = vec![0; len];
        AsyncReadExt::read_exact(self, &mut bytes).await.expect("the plugin writes that much");
        bytes
    }

    /// Reads up to and including the first `mark`.
    ///
    /// # Panics
    /// Where the plugin ends first.
    pub async fn read_until(&mut self, mark: &[u8]) -> Vec<u8> {
        let mut bytes = Vec::new();
        while !bytes.ends_with(mark) {
            bytes.push(self.read(1).await[0]);
        }
        bytes
    }

    /// Reads until the plugin ends its direction.
    pub async fn read_to_end(&mut self) -> Vec<u8> {
        let mut bytes = Vec::new();
        AsyncReadExt::read_to_end(self, &mut bytes).await.expect("a pipe ends well");
        bytes
    }

    /// Whether the plugin dropped its end, or ended its direction and reads no more.
    #[must_use]
    pub fn is_closed(&self) -> bool {
        lock(&self.read).ended && lock(&self.write).reader_gone
    }

    /// Waits until the plugin has dropped its end.
    pub async fn closed(&mut self) {
        poll_fn(|cx| {
            let mut half = lock(&self.write);
            if half.reader_gone {
                return Poll::Ready(());
            }
            half.writer = Some(cx.waker().clone());
            Poll::Pending
        })
        .await;
    }

    /// Makes the plugin's reads and writes fail with `errno`.
    pub fn fail(&mut self, errno: i32) {
        for half in [&self.read, &self.write] {
            let mut half = lock(half);
            half.broken = Some(errno);
            half.wake();
        }
    }

    /// Bounds what the plugin can write ahead of the test's reads.
    pub fn set_room(&mut self, bytes: usize) {
        lock(&self.read).capacity = bytes;
    }
}

impl AsyncRead for TestStream {
    fn poll_read(
        self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buf: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        let mut half = lock(&self.read);
        if let Some(errno) = half.broken {
            return Poll::Ready(Err(io::Error::from_raw_os_error(errno)));
        }
        if half.bytes.is_empty() {
            if half.ended {
                return Poll::Ready(Ok(()));
            }
            half.reader = Some(cx.waker().clone());
            return Poll::Pending;
        }
        let (front, _) = half.bytes.as_slices();
        let count = front.len().min(buf.remaining());
        buf.put_slice(&front[..count]);
        half.bytes.drain(..count);
        if let Some(writer) = half.writer.take() {
            writer.wake();
        }
        Poll::Ready(Ok(()))
    }
}

impl AsyncWrite for TestStream {
    fn poll_write(
        self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        bytes: &[u8],
    ) -> Poll<io::Result<usize>> {
        let mut half = lock(&self.write);
        let broken = half.broken.or_else(|| (half.reader_gone || half.ended).then_some(EPIPE));
        if let Some(errno) = broken {
            return Poll::Ready(Err(io::Error::from_raw_os_error(errno)));
        }
        let count = half.capacity.saturating_sub(half.bytes.len()).min(bytes.len());
        if count == 0 && !bytes.is_empty() {
            half.writer = Some(cx.waker().clone());
            return Poll::Pending;
        }
        half.bytes.extend(&bytes[..count]);
        if let Some(reader) = half.reader.take() {
            reader.wake();
        }
        Poll::Ready(Ok(count))
    }

    fn poll_flush(self: Pin<&mut Self>, _: &mut Context<'_>) -> Poll<io::Result<()>> {
        Poll::Ready(Ok(()))
    }

    fn poll_shutdown(self: Pin<&mut Self>, _: &mut Context<'_>) -> Poll<io::Result<()>> {
        let mut half = lock(&self.write);
        half.ended = true;
        half.wake();
        Poll::Ready(Ok(()))
    }
}

impl Drop for TestStream {
    fn drop(&mut self) {
        let mut read = lock(&self.read);
        read.reader_gone = true;
        read.wake();
        drop(read);
        let mut write = lock(&self.write);
        write.ended = true;
        write.wake();
    }
}

/// Lends a stream to a plugin.
pub(crate) fn to_plugin(world: &Arc<World>, stream: TestStream) -> abi::Io {
    abi::Io { data: lend(&world.ledger, "stream", stream), vt: &VT }
}

static VT: abi::IoVt = abi::IoVt {
    size: size_of::<abi::IoVt>(),
    poll_read,
    poll_writev,
    poll_flush,
    poll_shutdown,
    drop: drop_lent::<TestStream>,
};

fn result(polled: Option<Poll<io::Result<usize>>>) -> abi::IoRes {
    match polled {
        Some(Poll::Pending) => abi::IoRes { tag: abi::poll::PENDING, err: 0, n: 0 },
        Some(Poll::Ready(Ok(n))) => abi::IoRes { tag: abi::poll::READY, err: 0, n },
        Some(Poll::Ready(Err(error))) => {
            abi::IoRes { tag: abi::io::ERROR, err: error.raw_os_error().unwrap_or(EIO), n: 0 }
        }
        None => abi::IoRes { tag: abi::io::ERROR, err: EIO, n: 0 },
    }
}

/// # Safety
/// `data` is a lent stream, the waker borrowed for the call.
unsafe fn polling<T>(
    data: *mut c_void,
    waker: *const abi::Waker,
    poll: impl FnOnce(Pin<&mut TestStream>, &mut Context<'_>) -> Poll<io::Result<T>>,
) -> Option<Poll<io::Result<T>>> {
    // SAFETY: by this function's contract.
    let waker = unsafe { keep(waker) };
    // SAFETY: by this function's contract.
    unsafe {
        using(data, |stream: &mut TestStream| {
            poll(Pin::new(stream), &mut Context::from_waker(&waker))
        })
    }
}

unsafe extern "C" fn poll_read(
    data: *mut c_void,
    waker: *const abi::Waker,
    ptr: *mut u8,
    len: usize,
) -> abi::IoRes {
    // SAFETY: `ptr` is valid for writes of `len` bytes for the call.
    let room = unsafe { std::slice::from_raw_parts_mut(ptr.cast(), len) };
    let mut buf = ReadBuf::uninit(room);
    // SAFETY: of this vtable.
    let polled = unsafe { polling(data, waker, |stream, cx| stream.poll_read(cx, &mut buf)) };
    let read = buf.filled().len();
    result(polled.map(|polled| polled.map_ok(|()| read)))
}

unsafe extern "C" fn poll_writev(
    data: *mut c_void,
    waker: *const abi::Waker,
    iov: *const abi::IoVec,
    count: usize,
) -> abi::IoRes {
    // SAFETY: valid for the call.
    let parts = unsafe { std::slice::from_raw_parts(iov, count) };
    // SAFETY: as above.
    let bytes = parts
        .iter()
        .map(|part| unsafe { super::buf::borrowed(abi::Str { ptr: part.ptr, len: part.len }) });
    let slices: Vec<IoSlice<'_>> = bytes.map(IoSlice::new).collect();
    // SAFETY: of this vtable.
    result(unsafe { polling(data, waker, |stream, cx| stream.poll_write_vectored(cx, &slices)) })
}

unsafe extern "C" fn poll_flush(data: *mut c_void, waker: *const abi::Waker) -> abi::IoRes {
    // SAFETY: of this vtable.
    result(unsafe { polling(data, waker, |stream, cx| stream.poll_flush(cx).map_ok(|()| 0)) })
}

unsafe extern "C" fn poll_shutdown(data: *mut c_void, waker: *const abi::Waker) -> abi::IoRes {
    // SAFETY: of this vtable.
    result(unsafe { polling(data, waker, |stream, cx| stream.poll_shutdown(cx).map_ok(|()| 0)) })
}

/// A stream that a plugin moved to the host.
pub(crate) struct PluginStream {
    raw: abi::Io,
    world: Arc<World>,
    reader: Option<Arc<HostWaker>>,
    writer: Option<Arc<HostWaker>>,
}

// SAFETY: what is moved may be sent to another thread.
unsafe impl Send for PluginStream {}

impl PluginStream {
    /// # Safety
    /// `raw` is moved to the caller.
    pub(crate) const unsafe fn new(raw: abi::Io, world: Arc<World>) -> Self {
        Self { raw, world, reader: None, writer: None }
    }

    /// Gives it back.
    pub(crate) fn into_raw(self) -> abi::Io {
        let mut this = std::mem::ManuallyDrop::new(self);
        (this.reader, this.writer) = (None, None);
        // SAFETY: never used again: nothing else of it needs a drop.
        drop(unsafe { std::ptr::read(&raw const this.world) });
        abi::Io { data: this.raw.data, vt: this.raw.vt }
    }
}

fn waker_for(
    slot: &mut Option<Arc<HostWaker>>,
    cx: &Context<'_>,
    world: &World,
) -> *const abi::Waker {
    match slot {
        Some(waker) if waker.will_wake(cx.waker()) => Arc::as_ptr(waker).cast(),
        _ => Arc::as_ptr(slot.insert(HostWaker::new(cx.waker().clone(), &world.ledger))).cast(),
    }
}

fn polled(result: abi::IoRes) -> Poll<io::Result<usize>> {
    match result.tag {
        abi::poll::PENDING => Poll::Pending,
        abi::poll::READY => Poll::Ready(Ok(result.n)),
        _ => Poll::Ready(Err(io::Error::from_raw_os_error(result.err))),
    }
}

impl AsyncRead for PluginStream {
    fn poll_read(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buf: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        let this = &mut *self;
        let waker = waker_for(&mut this.reader, cx, &this.world);
        let room = buf.initialize_unfilled();
        let (ptr, len) = (room.as_mut_ptr(), room.len());
        // SAFETY: owned; waker and room are valid for the call.
        polled(unsafe { ((*this.raw.vt).poll_read)(this.raw.data, waker, ptr, len) })
            .map_ok(|read| buf.advance(read))
    }
}

impl AsyncWrite for PluginStream {
    fn poll_write(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        bytes: &[u8],
    ) -> Poll<io::Result<usize>> {
        let this = &mut *self;
        let waker = waker_for(&mut this.writer, cx, &this.world);
        let part = abi::IoVec { ptr: bytes.as_ptr(), len: bytes.len() };
        // SAFETY: owned; waker and bytes are valid for the call.
        polled(unsafe { ((*this.raw.vt).poll_writev)(this.raw.data, waker, &raw const part, 1) })
    }

    fn poll_flush(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        let this = &mut *self;
        let waker = waker_for(&mut this.writer, cx, &this.world);
        // SAFETY: owned; the waker is valid for the call.
        polled(unsafe { ((*this.raw.vt).poll_flush)(this.raw.data, waker) }).map_ok(drop)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        let this = &mut *self;
        let waker = waker_for(&mut this.writer, cx, &this.world);
        // SAFETY: owned; the waker is valid for the call.
        polled(unsafe { ((*this.raw.vt).poll_shutdown)(this.raw.data, waker) }).map_ok(drop)
    }
}

impl Drop for PluginStream {
    fn drop(&mut self) {
        // SAFETY: owned, dropped once.
        unsafe { ((*self.raw.vt).drop)(self.raw.data) }
    }
}

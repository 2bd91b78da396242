//! Byte streams in both directions.

use std::ffi::c_void;
use std::io::{self, IoSlice};
use std::mem::MaybeUninit;
use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll};

use sidelane_abi as abi;
use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};

use super::waker::{HostWaker, with_context};
use super::{Counted, Invalid, guard, report};
use crate::plugin::lend::{ConnectFuture, Connected, Stream, StreamFuture};

/// Most elements of a vectored write that are looked at.
const IOVECS_MAX: usize = 64;

/// What `data` of a stream made here leads to.
struct HostIo {
    stream: Box<dyn Stream>,
    _counted: Counted,
}

static IO_VT: abi::IoVt = abi::IoVt {
    size: size_of::<abi::IoVt>(),
    poll_read,
    poll_writev,
    poll_flush,
    poll_shutdown,
    drop: drop_io,
};

/// Returns the stream to give a plugin.
pub(in crate::plugin) fn lend(stream: Box<dyn Stream>) -> abi::Io {
    let data = Box::into_raw(Box::new(HostIo { stream, _counted: Counted::new() }));
    abi::Io { data: data.cast(), vt: &raw const IO_VT }
}

/// Takes a stream from a plugin: our own as it was lent, the plugin's wrapped.
///
/// # Safety
/// `io` was moved here by the plugin.
pub(in crate::plugin) unsafe fn take(io: abi::Io) -> Result<Box<dyn Stream>, Invalid> {
    if io.vt.is_null() {
        return Err(Invalid::Vtable);
    }
    if std::ptr::eq(io.vt, &raw const IO_VT) {
        // SAFETY: only `lend` makes streams with this vtable, a static of ours that is not generic.
        let host = unsafe { Box::from_raw(io.data.cast::<HostIo>()) };
        return Ok(host.stream);
    }
    // SAFETY: a stream's vtable is static.
    let size = unsafe { (*io.vt).size };
    if size < size_of::<abi::IoVt>() {
        return Err(Invalid::Vtable);
    }
    Ok(Box::new(PluginIo { raw: io, reader: None, writer: None }))
}

/// Resolves a stream that is on its way to what the ABI reports of it.
pub(in crate::plugin) async fn outcome(stream: StreamFuture) -> abi::IoOutcome {
    match stream.await {
        Ok(stream) => abi::IoOutcome { code: abi::failure::NONE, err: 0, io: lend(stream) },
        Err((code, error)) => failed_outcome(code, errno(&error)),
    }
}

/// Resolves a connection to a service to what the ABI reports of it.
pub(in crate::plugin) async fn connected(connect: ConnectFuture) -> abi::AlpnOutcome {
    match connect.await {
        Ok(Connected { stream, protocol }) => {
            let protocol = protocol.and_then(|protocol| u32::try_from(protocol).ok());
            let (code, io) = (abi::failure::NONE, lend(stream));
            abi::AlpnOutcome { code, err: 0, io, protocol: protocol.unwrap_or(abi::UNSET) }
        }
        Err((code, error)) => not_connected(code, errno(&error)),
    }
}

/// Returns the outcome that says why there is no connection.
pub(in crate::plugin) fn not_connected(code: u32, err: i32) -> abi::AlpnOutcome {
    let abi::IoOutcome { code, err, io } = failed_outcome(code, err);
    abi::AlpnOutcome { code, err, io, protocol: abi::UNSET }
}

/// Returns the outcome that says why there is no stream.
pub(in crate::plugin) fn failed_outcome(code: u32, err: i32) -> abi::IoOutcome {
    // A zero would say that `io` is valid.
    let code = if code == abi::failure::NONE { abi::failure::INTERNAL } else { code };
    let io = abi::Io { data: std::ptr::null_mut(), vt: std::ptr::null() };
    abi::IoOutcome { code, err, io }
}

/// Returns the error as the number that C knows it by.
pub(in crate::plugin) fn errno(error: &io::Error) -> i32 {
    use rustix::io::Errno;
    if let Some(number) = error.raw_os_error() {
        return number;
    }
    let errno = match error.kind() {
        io::ErrorKind::BrokenPipe | io::ErrorKind::WriteZero => Errno::PIPE,
        io::ErrorKind::ConnectionReset | io::ErrorKind::UnexpectedEof => Errno::CONNRESET,
        io::ErrorKind::ConnectionAborted => Errno::CONNABORTED,
        io::ErrorKind::ConnectionRefused => Errno::CONNREFUSED,
        io::ErrorKind::NotConnected => Errno::NOTCONN,
        io::ErrorKind::TimedOut => Errno::TIMEDOUT,
        io::ErrorKind::InvalidInput | io::ErrorKind::InvalidData => Errno::INVAL,
        io::ErrorKind::PermissionDenied => Errno::ACCESS,
        io::ErrorKind::NotFound => Errno::NOENT,
        _ => Errno::IO,
    };
    errno.raw_os_error()
}

fn failed(error: &io::Error) -> abi::IoRes {
    abi::IoRes { tag: abi::io::ERROR, err: errno(error), n: 0 }
}

/// Runs one call on a stream of ours.
///
/// # Safety
/// `data` is what `lend` leaked, used by one thread at a time; `waker` is lent for the call.
unsafe fn on_stream(
    call: &'static str,
    data: *mut c_void,
    waker: *const abi::Waker,
    run: impl FnOnce(Pin<&mut dyn Stream>, &mut Context<'_>) -> Poll<io::Result<usize>>,
) -> abi::IoRes {
    // SAFETY: by this function's contract.
    let host = unsafe { &mut *data.cast::<HostIo>() };
    let broken = failed(&io::Error::from(io::ErrorKind::Other));
    guard(call, broken, || {
        // SAFETY: by this function's contract.
        let polled = unsafe { with_context(waker, |cx| run(Pin::new(&mut *host.stream), cx)) };
        match polled {
            Poll::Pending => abi::IoRes { tag: abi::poll::PENDING, err: 0, n: 0 },
            Poll::Ready(Ok(n)) => abi::IoRes { tag: abi::poll::READY, err: 0, n },
            Poll::Ready(Err(error)) => failed(&error),
        }
    })
}

unsafe extern "C" fn poll_read(
    data: *mut c_void,
    waker: *const abi::Waker,
    ptr: *mut u8,
    len: usize,
) -> abi::IoRes {
    if ptr.is_null() && len != 0 {
        report("io.poll_read", Invalid::NullPointer);
        return failed(&io::Error::from(io::ErrorKind::InvalidInput));
    }
    let room: &mut [MaybeUninit<u8>] = if len == 0 {
        &mut []
    } else {
        // SAFETY: the plugin lends `len` writable bytes for the call (plugin ABI, `poll_read`);
        // they may be uninitialised, and are not null as checked.
        unsafe { std::slice::from_raw_parts_mut(ptr.cast(), len) }
    };
    let mut room = ReadBuf::uninit(room);
    // SAFETY: the plugin calls its own stream's function with its `data`.
    unsafe {
        on_stream("io.poll_read", data, waker, |stream, cx| {
            stream.poll_read(cx, &mut room).map_ok(|()| room.filled().len())
        })
    }
}

unsafe extern "C" fn poll_writev(
    data: *mut c_void,
    waker: *const abi::Waker,
    iov: *const abi::IoVec,
    count: usize,
) -> abi::IoRes {
    if iov.is_null() || count == 0 {
        report("io.poll_writev", Invalid::NullPointer);
        return failed(&io::Error::from(io::ErrorKind::InvalidInput));
    }
    // SAFETY: the plugin lends `count` elements for the call. `IoVec` has the layout of POSIX
    // `iovec`, and so has `IoSlice` on Unix (its documentation).
    let slices: &[IoSlice<'_>] =
        unsafe { std::slice::from_raw_parts(iov.cast(), count.min(IOVECS_MAX)) };
    // SAFETY: as in `poll_read`.
    unsafe {
        on_stream("io.poll_writev", data, waker, |stream, cx| match slices {
            [one] => stream.poll_write(cx, one),
            many => stream.poll_write_vectored(cx, many),
        })
    }
}

unsafe extern "C" fn poll_flush(data: *mut c_void, waker: *const abi::Waker) -> abi::IoRes {
    // SAFETY: as in `poll_read`.
    unsafe {
        on_stream("io.poll_flush", data, waker, |stream, cx| stream.poll_flush(cx).map_ok(|()| 0))
    }
}

unsafe extern "C" fn poll_shutdown(data: *mut c_void, waker: *const abi::Waker) -> abi::IoRes {
    // SAFETY: as in `poll_read`.
    unsafe {
        on_stream("io.poll_shutdown", data, waker, |stream, cx| {
            stream.poll_shutdown(cx).map_ok(|()| 0)
        })
    }
}

unsafe extern "C" fn drop_io(data: *mut c_void) {
    // SAFETY: `data` is what `lend` leaked, dropped once.
    let host = unsafe { Box::from_raw(data.cast::<HostIo>()) };
    guard("io.drop", (), || drop(host));
}

/// A plugin's stream.
struct PluginIo {
    raw: abi::Io,
    reader: Option<Arc<HostWaker>>,
    writer: Option<Arc<HostWaker>>,
}

// SAFETY: everything the ABI moves may be sent to another thread (plugin ABI, "Threads").
unsafe impl Send for PluginIo {}

impl PluginIo {
    fn vt(&self) -> &'static abi::IoVt {
        // SAFETY: checked in `take`; a vtable is static in a library that is never unmapped.
        unsafe { &*self.raw.vt }
    }

    fn answer(result: abi::IoRes, bound: usize) -> Poll<io::Result<usize>> {
        match result.tag {
            abi::poll::PENDING => Poll::Pending,
            abi::poll::READY if result.n <= bound => Poll::Ready(Ok(result.n)),
            abi::io::ERROR if result.err > 0 => {
                Poll::Ready(Err(io::Error::from_raw_os_error(result.err)))
            }
            _ => Poll::Ready(Err(io::Error::other("the plugin's stream failed"))),
        }
    }
}

impl Stream for PluginIo {}

impl AsyncRead for PluginIo {
    fn poll_read(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buf: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        let (vt, data) = (self.vt(), self.raw.data);
        let waker = HostWaker::as_abi(HostWaker::refresh(&mut self.reader, cx));
        // Initialised, so that a plugin that says it wrote what it did not shows nothing of ours.
        let room = buf.initialize_unfilled();
        // SAFETY: the stream is alive until `drop`; the waker and `room` outlive the call.
        let result = unsafe { (vt.poll_read)(data, waker, room.as_mut_ptr(), room.len()) };
        let bound = room.len();
        Self::answer(result, bound).map_ok(|n| buf.advance(n))
    }
}

impl AsyncWrite for PluginIo {
    fn poll_write(
        self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        bytes: &[u8],
    ) -> Poll<io::Result<usize>> {
        self.poll_write_vectored(cx, &[IoSlice::new(bytes)])
    }

    fn poll_write_vectored(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        slices: &[IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        let slices = &slices[..slices.len().min(IOVECS_MAX)];
        let bound = slices.iter().map(|slice| slice.len()).sum();
        if bound == 0 {
            return Poll::Ready(Ok(0));
        }
        let (vt, data) = (self.vt(), self.raw.data);
        let waker = HostWaker::as_abi(HostWaker::refresh(&mut self.writer, cx));
        // SAFETY: as in `poll_read`; the layouts agree (see `poll_writev` above).
        let result = unsafe { (vt.poll_writev)(data, waker, slices.as_ptr().cast(), slices.len()) };
        Self::answer(result, bound)
    }

    fn is_write_vectored(&self) -> bool {
        true
    }

    fn poll_flush(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        let (vt, data) = (self.vt(), self.raw.data);
        let waker = HostWaker::as_abi(HostWaker::refresh(&mut self.writer, cx));
        // SAFETY: as in `poll_read`.
        let result = unsafe { (vt.poll_flush)(data, waker) };
        Self::answer(result, usize::MAX).map_ok(|_| ())
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        let (vt, data) = (self.vt(), self.raw.data);
        let waker = HostWaker::as_abi(HostWaker::refresh(&mut self.writer, cx));
        // SAFETY: as in `poll_read`.
        let result = unsafe { (vt.poll_shutdown)(data, waker) };
        Self::answer(result, usize::MAX).map_ok(|_| ())
    }
}

impl Drop for PluginIo {
    fn drop(&mut self) {
        // SAFETY: the stream was moved here (`take`) and is dropped once.
        unsafe { (self.vt().drop)(self.raw.data) };
    }
}

#[cfg(test)]
mod tests {
    use tokio::io::{AsyncReadExt, AsyncWriteExt};

    use super::super::lent_objects;
    use super::*;

    /// A stream with a plugin's own vtable, that passes on to one of the host's.
    fn as_a_plugins(stream: impl Stream) -> abi::Io {
        static FOREIGN_VT: abi::IoVt = abi::IoVt {
            size: size_of::<abi::IoVt>(),
            poll_read,
            poll_writev,
            poll_flush,
            poll_shutdown,
            drop: drop_io,
        };
        abi::Io { vt: &raw const FOREIGN_VT, ..lend(Box::new(stream)) }
    }

    #[tokio::test]
    async fn a_plugins_stream_reads_writes_and_closes_like_any() {
        let before = lent_objects();
        let (ours, theirs) = tokio::io::duplex(64);
        // SAFETY: the stream is moved.
        let mut stream = unsafe { take(as_a_plugins(ours)) }.unwrap();
        let peer = tokio::spawn(async move {
            let (mut read, mut write) = tokio::io::split(theirs);
            tokio::io::copy(&mut read, &mut write).await.unwrap();
            write.shutdown().await.unwrap();
        });
        let sent: Vec<u8> = (0..=255).cycle().take(10_000).collect();
        let mut back = Vec::new();
        let (mut read, mut write) = tokio::io::split(&mut stream);
        let writing = async {
            write.write_all(&sent).await.unwrap();
            write.flush().await.unwrap();
            write.shutdown().await.unwrap();
        };
        let (read, ()) = tokio::join!(read.read_to_end(&mut back), writing);
        assert_eq!(read.unwrap(), sent.len());
        assert!(back == sent);
        peer.await.unwrap();
        drop(stream);
        assert_eq!(lent_objects(), before);
    }

    #[test]
    fn a_stream_of_the_hosts_comes_back_as_it_was() {
        let before = lent_objects();
        let (ours, _theirs) = tokio::io::duplex(64);
        let io = lend(Box::new(ours));
        // SAFETY: the stream is moved.
        drop(unsafe { take(io) }.unwrap());
        assert_eq!(lent_objects(), before);
        let none = abi::Io { data: std::ptr::null_mut(), vt: std::ptr::null() };
        // SAFETY: nothing is moved.
        assert_eq!(unsafe { take(none) }.err(), Some(Invalid::Vtable));
    }

    #[test]
    fn an_errors_number_survives_or_is_made_from_its_kind() {
        let refused = rustix::io::Errno::CONNREFUSED.raw_os_error();
        assert_eq!(errno(&io::Error::from_raw_os_error(refused)), refused);
        assert_eq!(errno(&io::Error::from(io::ErrorKind::ConnectionRefused)), refused);
        assert!(errno(&io::Error::other("anything")) > 0);
        assert_ne!(failed_outcome(abi::failure::NONE, 0).code, abi::failure::NONE);
    }
}

//! What the kernel moves bytes between sockets by: a pipe, lent while there is something in it.

use std::cell::RefCell;
use std::io;
use std::os::fd::{AsFd as _, BorrowedFd, OwnedFd};
use std::task::{Context, Poll, ready};

use rustix::pipe::{PipeFlags, SpliceFlags};
use tokio::io::Interest;
use tokio::net::{TcpStream, UnixStream};

/// What a pipe is made to hold: a few reads of a bulk transfer. The kernel may allow less.
const PIPE_BYTES: usize = 256 * 1024;

/// Empty pipes that a thread keeps for the next one that needs one; two descriptors each.
const SPARE_MAX: usize = 16;

thread_local! {
    static SPARE: RefCell<Vec<(OwnedFd, OwnedFd)>> = const { RefCell::new(Vec::new()) };
}

/// A stream that is nothing but a socket.
#[derive(Clone, Copy)]
pub enum Plain<'a> {
    /// TCP.
    Tcp(&'a TcpStream),
    /// A Unix socket.
    Unix(&'a UnixStream),
}

impl Plain<'_> {
    fn fd(&self) -> BorrowedFd<'_> {
        match self {
            Self::Tcp(socket) => socket.as_fd(),
            Self::Unix(socket) => socket.as_fd(),
        }
    }

    fn poll_ready(&self, cx: &mut Context<'_>, is_read: bool) -> Poll<io::Result<()>> {
        match (self, is_read) {
            (Self::Tcp(socket), true) => socket.poll_read_ready(cx),
            (Self::Tcp(socket), false) => socket.poll_write_ready(cx),
            (Self::Unix(socket), true) => socket.poll_read_ready(cx),
            (Self::Unix(socket), false) => socket.poll_write_ready(cx),
        }
    }

    /// Runs `call` once the socket is ready, again where it turns out not to be.
    fn poll_call(
        &self,
        cx: &mut Context<'_>,
        is_read: bool,
        call: impl Fn(BorrowedFd<'_>) -> rustix::io::Result<usize>,
    ) -> Poll<io::Result<usize>> {
        let interest = if is_read { Interest::READABLE } else { Interest::WRITABLE };
        loop {
            ready!(self.poll_ready(cx, is_read))?;
            let run = || call(self.fd()).map_err(io::Error::from);
            let result = match self {
                Self::Tcp(socket) => socket.try_io(interest, run),
                Self::Unix(socket) => socket.try_io(interest, run),
            };
            match result {
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => {}
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                result => return Poll::Ready(result),
            }
        }
    }
}

/// A pipe, lent to one direction.
pub(super) struct Pipe {
    /// Its two ends, to read from and to write to. `None` only while it is dropped.
    ends: Option<(OwnedFd, OwnedFd)>,
    filled: usize,
}

impl Pipe {
    /// Returns an empty pipe; `None`: there are no descriptors.
    pub(super) fn take() -> Option<Self> {
        let ends = SPARE.with_borrow_mut(Vec::pop).or_else(make)?;
        Some(Self { ends: Some(ends), filled: 0 })
    }

    pub(super) const fn is_empty(&self) -> bool {
        self.filled == 0
    }

    /// Takes what the socket has. To be called while it is empty, since a full pipe reads as an idle socket.
    pub(super) fn poll_from(
        &mut self,
        cx: &mut Context<'_>,
        from: Plain<'_>,
    ) -> Poll<io::Result<usize>> {
        let Some((_, into)) = &self.ends else { return Poll::Ready(Ok(0)) };
        let count = ready!(from.poll_call(cx, true, |socket| {
            rustix::pipe::splice(socket, None, into, None, PIPE_BYTES, flags())
        }))?;
        self.filled += count;
        Poll::Ready(Ok(count))
    }

    /// Gives the socket what it has room for.
    pub(super) fn poll_to(
        &mut self,
        cx: &mut Context<'_>,
        to: Plain<'_>,
    ) -> Poll<io::Result<usize>> {
        let Some((from, _)) = &self.ends else { return Poll::Ready(Ok(0)) };
        let filled = self.filled;
        let count = ready!(to.poll_call(cx, false, |socket| {
            rustix::pipe::splice(from, None, socket, None, filled, flags())
        }))?;
        if count == 0 {
            return Poll::Ready(Err(io::ErrorKind::WriteZero.into()));
        }
        self.filled -= count.min(filled);
        Poll::Ready(Ok(count))
    }
}

impl Drop for Pipe {
    fn drop(&mut self) {
        let Some(ends) = self.ends.take() else { return };
        if self.filled == 0 {
            // Where the thread ends nobody keeps it.
            let _ = SPARE.try_with(|spare| {
                if let Ok(mut spare) = spare.try_borrow_mut()
                    && spare.len() < SPARE_MAX
                {
                    spare.push(ends);
                }
            });
        }
    }
}

fn make() -> Option<(OwnedFd, OwnedFd)> {
    let ends = rustix::pipe::pipe_with(PipeFlags::CLOEXEC | PipeFlags::NONBLOCK).ok()?;
    // Smaller ones do too: the system bounds what one user has.
    let _ = rustix::pipe::fcntl_setpipe_size(&ends.1, PIPE_BYTES);
    Some(ends)
}

fn flags() -> SpliceFlags {
    SpliceFlags::MOVE | SpliceFlags::NONBLOCK
}

//! Joins byte streams: what comes of one goes to the other, until it ends.
//!
//! Where both are sockets, and much comes, the kernel moves the bytes (`splice`), and they are never copied
//! here. Knows nothing of what the streams are for.

mod pipe;

use std::cell::RefCell;
use std::future::{Future, poll_fn};
use std::io;
use std::pin::Pin;
use std::task::{Context, Poll, ready};

use bytes::{Buf as _, Bytes};
use tokio::io::ReadBuf;

use self::pipe::Pipe;
pub use self::pipe::Plain;
use crate::plugin::lend::Stream;

/// Read at once where bytes are copied. A read that fills it says that there is more, and then the kernel is
/// asked to move it; for less its calls would cost more than the copy.
const COPY_BYTES: usize = 64 * 1024;

/// Reads of a direction before others get their turn.
const ROUNDS_PER_POLL: usize = 8;

thread_local! {
    /// What this thread copies by. A direction at rest holds nothing.
    static SCRATCH: RefCell<Vec<u8>> = const { RefCell::new(Vec::new()) };
}

/// At which end of a direction it broke.
#[derive(Debug)]
pub enum Fault {
    /// Where the bytes come from.
    From(io::Error),
    /// Where they go.
    To(io::Error),
}

impl From<Fault> for io::Error {
    fn from(fault: Fault) -> Self {
        match fault {
            Fault::From(error) | Fault::To(error) => error,
        }
    }
}

/// One direction between two streams.
#[derive(Default)]
pub struct Direction {
    /// Read, and not written yet.
    held: Bytes,
    /// The same, in the kernel.
    pipe: Option<Pipe>,
    /// The last read took as much as it could.
    is_bulk: bool,
    /// Something was written since it was flushed.
    is_dirty: bool,
    has_ended: bool,
    is_drained: bool,
    is_shut: bool,
    bytes: u64,
}

impl Direction {
    /// Returns a direction whose first bytes were read before.
    #[must_use]
    pub fn new(ahead: Bytes) -> Self {
        Self { held: ahead, ..Self::default() }
    }

    /// Bytes written so far.
    #[must_use]
    pub const fn bytes(&self) -> u64 {
        self.bytes
    }

    /// Whether the end has passed, too.
    #[must_use]
    pub const fn is_shut(&self) -> bool {
        self.is_shut
    }

    /// Moves bytes; ready once `from` has ended and all that came is written and flushed.
    ///
    /// # Errors
    /// Either stream's.
    pub fn poll_move(
        &mut self,
        cx: &mut Context<'_>,
        from: &mut dyn Stream,
        to: &mut dyn Stream,
    ) -> Poll<Result<(), Fault>> {
        if self.is_drained {
            return Poll::Ready(Ok(()));
        }
        for _ in 0..ROUNDS_PER_POLL {
            ready!(self.poll_empty(cx, to)).map_err(Fault::To)?;
            if self.has_ended {
                ready!(Pin::new(&mut *to).poll_flush(cx)).map_err(Fault::To)?;
                self.is_drained = true;
                return Poll::Ready(Ok(()));
            }
            if self.is_bulk
                && let Some(moved) = self.splice(cx, from, to)
            {
                let Poll::Ready(moved) = moved else {
                    self.pipe = None;
                    return Poll::Pending;
                };
                self.note_read(moved.map_err(Fault::From)?);
                continue;
            }
            match self.poll_copy(cx, from, to) {
                Poll::Ready(copied) => copied?,
                Poll::Pending => {
                    if self.is_dirty && self.held.is_empty() {
                        ready!(Pin::new(&mut *to).poll_flush(cx)).map_err(Fault::To)?;
                        self.is_dirty = false;
                    }
                    return Poll::Pending;
                }
            }
        }
        cx.waker().wake_by_ref();
        Poll::Pending
    }

    /// Passes the end on, after [`Self::poll_move`] was ready.
    ///
    /// # Errors
    /// The stream's.
    pub fn poll_shut(&mut self, cx: &mut Context<'_>, to: &mut dyn Stream) -> Poll<io::Result<()>> {
        if !self.is_shut {
            match ready!(Pin::new(to).poll_shutdown(cx)) {
                // The other end has closed both ways meanwhile.
                Err(error) if error.kind() == io::ErrorKind::NotConnected => {}
                result => result?,
            }
            self.is_shut = true;
        }
        Poll::Ready(Ok(()))
    }

    const fn note_read(&mut self, count: usize) {
        self.has_ended = count == 0;
    }

    /// Writes what was read before.
    fn poll_empty(&mut self, cx: &mut Context<'_>, to: &mut dyn Stream) -> Poll<io::Result<()>> {
        while !self.held.is_empty() {
            let written = ready!(Pin::new(&mut *to).poll_write(cx, &self.held))?;
            if written == 0 {
                return Poll::Ready(Err(io::ErrorKind::WriteZero.into()));
            }
            self.held.advance(written);
            self.bytes += written as u64;
            self.is_dirty = true;
            if self.held.is_empty() {
                // Lets the memory go.
                self.held = Bytes::new();
            }
        }
        if let Some(pipe) = &mut self.pipe {
            let Some(to) = to.plain() else {
                return Poll::Ready(Err(io::Error::other("a socket is none any more")));
            };
            while !pipe.is_empty() {
                self.bytes += ready!(pipe.poll_to(cx, to))? as u64;
            }
        }
        Poll::Ready(Ok(()))
    }

    /// Has the kernel take what is there; `None`: it cannot.
    fn splice(
        &mut self,
        cx: &mut Context<'_>,
        from: &mut dyn Stream,
        to: &mut dyn Stream,
    ) -> Option<Poll<io::Result<usize>>> {
        let from = from.plain()?;
        to.plain()?;
        if self.pipe.is_none() {
            self.pipe = Pipe::take();
        }
        let moved = self.pipe.as_mut()?.poll_from(cx, from);
        if let Poll::Ready(Ok(count)) = moved {
            self.is_bulk = count >= COPY_BYTES / 4;
        }
        Some(moved)
    }

    /// Reads once, and writes what comes as far as there is room.
    fn poll_copy(
        &mut self,
        cx: &mut Context<'_>,
        from: &mut dyn Stream,
        to: &mut dyn Stream,
    ) -> Poll<Result<(), Fault>> {
        self.pipe = None;
        SCRATCH.with_borrow_mut(|scratch| {
            scratch.resize(COPY_BYTES, 0);
            let mut room = ReadBuf::new(scratch);
            ready!(Pin::new(from).poll_read(cx, &mut room)).map_err(Fault::From)?;
            let mut read = room.filled();
            self.note_read(read.len());
            self.is_bulk = read.len() == COPY_BYTES;
            while !read.is_empty() {
                match Pin::new(&mut *to).poll_write(cx, read) {
                    Poll::Ready(Ok(0)) => {
                        return Poll::Ready(Err(Fault::To(io::ErrorKind::WriteZero.into())));
                    }
                    Poll::Ready(Ok(written)) => {
                        read = &read[written..];
                        self.bytes += written as u64;
                        self.is_dirty = true;
                    }
                    Poll::Ready(Err(error)) => return Poll::Ready(Err(Fault::To(error))),
                    Poll::Pending => {
                        self.held = Bytes::copy_from_slice(read);
                        break;
                    }
                }
            }
            Poll::Ready(Ok(()))
        })
    }
}

/// Joins two streams until both directions have ended; each ends on its own. Returns the bytes from `a` to
/// `b`, and from `b` to `a`.
pub fn both(
    mut a: Box<dyn Stream>,
    mut b: Box<dyn Stream>,
) -> impl Future<Output = io::Result<(u64, u64)>> + Send {
    let (mut up, mut down) = (Direction::default(), Direction::default());
    poll_fn(move |cx| {
        let up_done = poll_way(&mut up, cx, &mut *a, &mut *b)?;
        let down_done = poll_way(&mut down, cx, &mut *b, &mut *a)?;
        ready!(up_done);
        ready!(down_done);
        Poll::Ready(Ok((up.bytes(), down.bytes())))
    })
}

fn poll_way(
    direction: &mut Direction,
    cx: &mut Context<'_>,
    from: &mut dyn Stream,
    to: &mut dyn Stream,
) -> Result<Poll<()>, io::Error> {
    if direction.poll_move(cx, from, to)?.is_pending() {
        return Ok(Poll::Pending);
    }
    Ok(direction.poll_shut(cx, to)?)
}

#[cfg(test)]
mod tests;

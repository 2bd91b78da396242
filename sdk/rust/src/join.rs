//! An exchange as a byte stream: what a byte-born protocol is made of.

use std::future::poll_fn;
use std::io;
use std::pin::Pin;
use std::task::{Context, Poll, ready};

use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};

use crate::ffi::exchange::End;
use crate::{
    Buf, BufBuilder, ByteStream, Error, Exchange, FIELD_CUSTOM, Message, RecvHalf, Reset, SendHalf,
};

/// Largest chunk sent in one message: the tunnel's data message.
const CHUNK_BYTES_MAX: usize = 32 * 1024;

/// Read of a stream at rest, into the stack: a connection that says nothing holds no buffer.
const FIRST_READ_BYTES: usize = 4 * 1024;

/// Chunks moved per direction before other tasks of the thread have their turn.
const CHUNKS_PER_POLL: usize = 16;

impl Exchange<'_> {
    /// Joins it to a byte stream, both directions, until both have ended: what is read goes out as
    /// `custom` messages, whole or in pieces, and comes back in the same order. Each direction ends on
    /// its own. At the sidecar the exchange counts as dispatched once the first bytes are there.
    ///
    /// # Errors
    /// The exchange was reset, or the stream failed; the peer has been told.
    pub async fn join(self, stream: ByteStream) -> Result<(), Error> {
        let end = self.end;
        let mut join = Join {
            send: self.send,
            recv: self.recv,
            stream,
            up: Up { waiting: None, hot: false, done: false },
            down: Down {
                chunk: Buf::new(),
                state: DownState::Open,
                last: false,
                dispatched: end == End::Relay,
            },
        };
        match poll_fn(|cx| join.poll(cx)).await {
            Ok(()) => Ok(()),
            Err(Broken::Reset(reset)) => Err(reset.into()),
            Err(Broken::Stream(error)) => {
                let reset = Reset::new(end.stream_failure());
                join.send.reset(reset);
                Err(Error::new(reset.code, error.to_string()))
            }
        }
    }
}

struct Join {
    send: SendHalf,
    recv: RecvHalf,
    stream: ByteStream,
    up: Up,
    down: Down,
}

/// Stream to exchange.
struct Up {
    waiting: Option<Message>,
    /// The last read filled its buffer: the next goes to the heap at once.
    hot: bool,
    done: bool,
}

/// Exchange to stream.
struct Down {
    chunk: Buf,
    state: DownState,
    /// The message that `chunk` came in was the last.
    last: bool,
    dispatched: bool,
}

#[derive(Clone, Copy, PartialEq, Eq)]
enum DownState {
    Open,
    /// Written bytes may still stand in a buffer.
    Flushing,
    ShuttingDown,
    Done,
}

enum Broken {
    Reset(Reset),
    Stream(io::Error),
}

impl From<io::Error> for Broken {
    fn from(error: io::Error) -> Self {
        Self::Stream(error)
    }
}

impl Join {
    fn poll(&mut self, cx: &mut Context<'_>) -> Poll<Result<(), Broken>> {
        let down = self.poll_down(cx)?;
        let up = self.poll_up(cx)?;
        if down.is_ready() && up.is_ready() {
            return Poll::Ready(Ok(()));
        }
        // Seen here also while a slow stream keeps the receiving direction from being read. Complete
        // on the wire is no failure: what was received is still to be written.
        match self.send.poll_closed(cx) {
            Poll::Ready(reset) if reset.code != crate::failure::NONE => {
                Poll::Ready(Err(Broken::Reset(reset)))
            }
            _ => Poll::Pending,
        }
    }

    fn poll_up(&mut self, cx: &mut Context<'_>) -> Poll<Result<(), Broken>> {
        if self.up.done {
            return Poll::Ready(Ok(()));
        }
        for _ in 0..CHUNKS_PER_POLL {
            if self.up.waiting.is_some()
                && ready!(self.send.poll_send(cx, &mut self.up.waiting)).is_err()
            {
                return self.closed(cx);
            }
            let chunk = ready!(self.poll_read(cx))?;
            if chunk.is_empty() {
                self.up.done = true;
                // Closed here means that the peer ended it all; the other direction says how.
                return if self.send.finish().is_err() {
                    self.closed(cx)
                } else {
                    Poll::Ready(Ok(()))
                };
            }
            self.up.waiting =
                Some(Message { field: FIELD_CUSTOM, end: false, head: Buf::new(), body: chunk });
        }
        cx.waker().wake_by_ref();
        Poll::Pending
    }

    fn closed(&mut self, cx: &mut Context<'_>) -> Poll<Result<(), Broken>> {
        match self.send.poll_closed(cx) {
            // The peer has ended without wanting the rest.
            Poll::Ready(reset) if reset.code == crate::failure::NONE => {
                self.up.done = true;
                Poll::Ready(Ok(()))
            }
            Poll::Ready(reset) => Poll::Ready(Err(Broken::Reset(reset))),
            Poll::Pending => Poll::Ready(Err(Broken::Reset(Reset::new(crate::failure::CANCELLED)))),
        }
    }

    /// Reads a chunk; empty: the end.
    fn poll_read(&mut self, cx: &mut Context<'_>) -> Poll<io::Result<Buf>> {
        if !self.up.hot {
            let mut room = [std::mem::MaybeUninit::uninit(); FIRST_READ_BYTES];
            let mut buf = ReadBuf::uninit(&mut room);
            ready!(Pin::new(&mut self.stream).poll_read(cx, &mut buf))?;
            self.up.hot = buf.remaining() == 0;
            return Poll::Ready(Ok(Buf::copy_from_slice(buf.filled())));
        }
        let mut builder = BufBuilder::with_capacity(CHUNK_BYTES_MAX);
        let read = self.stream.poll_read_builder(cx, &mut builder);
        self.up.hot = read.is_ready();
        let read = ready!(read)?;
        if read < FIRST_READ_BYTES {
            self.up.hot = false;
            return Poll::Ready(Ok(Buf::copy_from_slice(&builder)));
        }
        Poll::Ready(Ok(builder.freeze()))
    }

    fn poll_down(&mut self, cx: &mut Context<'_>) -> Poll<Result<(), Broken>> {
        for _ in 0..CHUNKS_PER_POLL {
            match self.down.state {
                DownState::Done => return Poll::Ready(Ok(())),
                DownState::ShuttingDown => {
                    ready!(Pin::new(&mut self.stream).poll_shutdown(cx))?;
                    self.down.state = DownState::Done;
                }
                DownState::Open | DownState::Flushing if !self.down.chunk.is_empty() => {
                    let wrote =
                        ready!(Pin::new(&mut self.stream).poll_write(cx, &self.down.chunk))?;
                    if wrote == 0 {
                        return Poll::Ready(Err(io::Error::from(io::ErrorKind::WriteZero).into()));
                    }
                    bytes::Buf::advance(&mut self.down.chunk, wrote);
                    self.down.state = DownState::Flushing;
                }
                DownState::Open | DownState::Flushing if self.down.last => {
                    self.down.chunk = Buf::new();
                    self.down.state = DownState::ShuttingDown;
                }
                DownState::Open | DownState::Flushing => match self.recv.poll_recv(cx) {
                    Poll::Ready(Some(Ok(message))) => self.take(message),
                    Poll::Ready(Some(Err(reset))) => return Poll::Ready(Err(Broken::Reset(reset))),
                    Poll::Ready(None) => self.down.last = true,
                    Poll::Pending => {
                        if self.down.state == DownState::Flushing {
                            ready!(Pin::new(&mut self.stream).poll_flush(cx))?;
                            self.down.state = DownState::Open;
                        }
                        return Poll::Pending;
                    }
                },
            }
        }
        cx.waker().wake_by_ref();
        Poll::Pending
    }

    fn take(&mut self, message: Message) {
        self.down.chunk = message.body;
        self.down.last = message.end;
        if !self.down.dispatched && !self.down.chunk.is_empty() {
            self.down.dispatched = true;
            self.send.dispatched();
        }
    }
}

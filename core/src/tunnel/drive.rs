//! Moves bytes between a lane and one connection of it, in one task.
//!
//! A poll reads what is there, lets the tasks it woke run once, then writes what they queued in one
//! vectored write: batching is what makes a lane cheaper than a connection per exchange.

use std::cell::RefCell;
use std::future::Future;
use std::io::{self, IoSlice};
use std::pin::{Pin, pin};
use std::sync::Arc;
use std::task::{Context, Poll, ready};
use std::time::Instant;

use bytes::BytesMut;
use sidelane_tunnel::{Event, Lane, LaneError, Reset, Transmit};
use thiserror::Error;
use tokio::io::{AsyncRead, AsyncReadExt as _, AsyncWrite};
use tokio::time::Sleep;

use super::Link;
use super::link::CLOSE_LINGER;
use super::pace::Pace;

/// Read buffer of a busy lane: large, so that a bulk transfer costs few system calls. An idle lane
/// holds none.
const READ_BYTES: usize = 256 * 1024;

/// Least room for a read: below it the buffer is exchanged for a fresh one.
const READ_ROOM_MIN: usize = 32 * 1024;

/// Reads per poll before others get their turn.
const READS_PER_POLL: usize = 4;

/// Most bytes taken from the lane for one write.
pub(super) const WRITE_BYTES: usize = 128 * 1024;

/// Most elements of one vectored write.
const WRITE_SLICES: usize = 64;

/// Writes per poll before others get their turn.
const WRITES_PER_POLL: usize = 4;

thread_local! {
    /// The read buffer of this thread's idle lanes.
    static SPARE: RefCell<Option<BytesMut>> = const { RefCell::new(None) };
}

/// Why a lane's connection is not driven any more.
#[derive(Debug, Error)]
pub enum LaneEnd {
    /// The peer closed its connection.
    #[error("the peer closed the connection")]
    Closed,
    /// The transport failed.
    #[error("the connection failed")]
    Io(#[source] io::Error),
    /// The peer broke the protocol or fell silent.
    #[error("the lane failed")]
    Lane(#[source] LaneError),
    /// We closed it.
    #[error("closed by this end")]
    Local,
    /// Another connection takes this one's place.
    #[error("another connection has taken its place")]
    Replaced,
}

/// Drives `link` over `stream` until either ends; `on_event` gets the lane's events in order. When it
/// returns the lane waits for another connection ([`Link::is_detached`]), or has ended: then all its
/// exchanges have, with `lost` where they were not done. Dropped before, it has ended.
pub fn drive<S, F>(
    link: Arc<Link>,
    stream: S,
    input: BytesMut,
    lost: Reset,
    on_event: F,
) -> Drive<S, F>
where
    S: AsyncRead + AsyncWrite + Unpin,
    F: FnMut(&Arc<Link>, Event) + Unpin,
{
    link.attach();
    Drive {
        link,
        stream,
        unparsed: !input.is_empty(),
        input,
        events: Vec::new(),
        transmit: Transmit::default(),
        pace: Pace::new(),
        limit_unsent: |_, _| {},
        timer: Box::pin(tokio::time::sleep_until(far_future())),
        deadline: None,
        yielded: false,
        linger: None,
        is_over: false,
        lost,
        on_event,
    }
}

/// Future of [`drive`].
pub struct Drive<S, F> {
    link: Arc<Link>,
    stream: S,
    input: BytesMut,
    /// `input` holds bytes that came with the handshake.
    unparsed: bool,
    events: Vec<Event>,
    transmit: Transmit,
    pace: Pace,
    /// Sets how much the connection keeps unsent.
    limit_unsent: fn(&S, usize),
    timer: Pin<Box<Sleep>>,
    deadline: Option<Instant>,
    /// The tasks that wait for this thread had their turn since something was queued.
    yielded: bool,
    /// While the lane is closed: how long the peer has.
    linger: Option<Pin<Box<Sleep>>>,
    is_over: bool,
    lost: Reset,
    on_event: F,
}

impl<S, F> Future for Drive<S, F>
where
    S: AsyncRead + AsyncWrite + Unpin,
    F: FnMut(&Arc<Link>, Event) + Unpin,
{
    type Output = LaneEnd;

    fn poll(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<LaneEnd> {
        let this = self.get_mut();
        let end = match this.poll_lane(cx) {
            Poll::Pending => return Poll::Pending,
            Poll::Ready(end) => end,
        };
        this.is_over = true;
        // What was read and not taken, and what was to be written, belongs to this connection.
        this.input.clear();
        this.transmit = Transmit::default();
        this.link.detach(Some(&end), this.lost);
        Poll::Ready(end)
    }
}

impl<S, F> Drop for Drive<S, F> {
    fn drop(&mut self) {
        if !self.is_over {
            self.link.detach(None, self.lost);
        }
    }
}

impl<S, F> Drive<S, F>
where
    S: AsyncRead + AsyncWrite + Unpin,
    F: FnMut(&Arc<Link>, Event) + Unpin,
{
    fn poll_lane(&mut self, cx: &mut Context<'_>) -> Poll<LaneEnd> {
        if let Some(end) = self.link.interruption() {
            return Poll::Ready(end);
        }
        let more_to_read = match self.read(cx) {
            Ok(more) => more,
            Err(end) => return Poll::Ready(end),
        };
        if let Err(end) = self.check_time(cx) {
            return Poll::Ready(end);
        }
        if self.link.is_hurried() && self.poll_linger(cx).is_ready() {
            return Poll::Ready(LaneEnd::Local);
        }
        let written = self.poll_write(cx);
        self.return_spare();
        match written {
            Poll::Ready(end) => Poll::Ready(end),
            Poll::Pending => {
                if more_to_read {
                    cx.waker().wake_by_ref();
                }
                Poll::Pending
            }
        }
    }

    /// Reads what is there, within this poll's share. True: there may be more.
    fn read(&mut self, cx: &mut Context<'_>) -> Result<bool, LaneEnd> {
        if std::mem::take(&mut self.unparsed) {
            self.handle_input()?;
        }
        for _ in 0..READS_PER_POLL {
            self.make_room();
            let read = pin!(self.stream.read_buf(&mut self.input)).poll(cx);
            match read {
                Poll::Pending => return Ok(false),
                Poll::Ready(Ok(0)) => return Err(LaneEnd::Closed),
                Poll::Ready(Err(error)) => return Err(LaneEnd::Io(error)),
                Poll::Ready(Ok(_)) => self.handle_input()?,
            }
        }
        Ok(true)
    }

    fn handle_input(&mut self) -> Result<(), LaneEnd> {
        self.link.hear();
        let now = now();
        self.handle(|lane, input| lane.handle_input(now, input))
    }

    /// Lets the lane take something, and tells what it says of it.
    fn handle(
        &mut self,
        take: impl FnOnce(&mut Lane, &mut BytesMut) -> Result<(), LaneError>,
    ) -> Result<(), LaneEnd> {
        let events = &mut self.events;
        let input = &mut self.input;
        let result = self.link.with(|lane| {
            let result = take(lane, input);
            while let Some(event) = lane.poll_event() {
                events.push(event);
            }
            result
        });
        for event in self.events.drain(..) {
            match &event {
                Event::Suspect(is_suspect) => self.link.suspect(*is_suspect),
                Event::GoAway(go_away) if go_away.last => self.link.ends(),
                _ => {}
            }
            (self.on_event)(&self.link, event);
        }
        result.map_err(LaneEnd::Lane)
    }

    fn make_room(&mut self) {
        if self.input.is_empty() && self.input.capacity() < READ_BYTES {
            // From the front again, which the caches still hold. Changes nothing where somebody has
            // a part of the buffer.
            let _ = self.input.try_reclaim(READ_BYTES);
        }
        if self.input.capacity() - self.input.len() >= READ_ROOM_MIN {
            return;
        }
        if self.input.is_empty()
            && let Some(spare) = SPARE.with_borrow_mut(Option::take)
        {
            self.input = spare;
            if self.input.capacity() >= READ_ROOM_MIN {
                return;
            }
        }
        self.input.reserve(READ_BYTES);
    }

    /// An idle lane lends its buffer to the next one of the thread.
    fn return_spare(&mut self) {
        if self.input.is_empty() && self.input.capacity() > 0 {
            let buffer = std::mem::take(&mut self.input);
            SPARE.with_borrow_mut(|spare| *spare = Some(buffer));
        }
    }

    fn check_time(&mut self, cx: &mut Context<'_>) -> Result<(), LaneEnd> {
        loop {
            let deadline = self.link.with(|lane| lane.poll_timeout());
            if deadline != self.deadline {
                self.deadline = deadline;
                let at = deadline.map_or_else(far_future, tokio::time::Instant::from_std);
                self.timer.as_mut().reset(at);
            }
            if self.timer.as_mut().poll(cx).is_pending() {
                return Ok(());
            }
            let now = now();
            self.deadline = None;
            self.handle(|lane, _| lane.handle_timeout(now))?;
        }
    }

    fn poll_write(&mut self, cx: &mut Context<'_>) -> Poll<LaneEnd> {
        for _ in 0..WRITES_PER_POLL {
            if self.transmit.is_empty() {
                let waits = self.link.with(|lane| {
                    lane.register_driver(cx.waker());
                    lane.wants_transmit()
                });
                if !waits {
                    self.yielded = false;
                    self.pace.idle();
                    return self.poll_idle(cx);
                }
                if !self.yielded {
                    // Those that were woken with us queue their messages first, and all leave
                    // in one write.
                    self.yielded = true;
                    cx.waker().wake_by_ref();
                    return Poll::Pending;
                }
                self.yielded = false;
                // What the connection holds itself, as TLS does, is out before more is chosen.
                match Pin::new(&mut self.stream).poll_flush(cx) {
                    Poll::Ready(Ok(())) => {}
                    Poll::Ready(Err(error)) => return Poll::Ready(LaneEnd::Io(error)),
                    Poll::Pending => return self.poll_blocked(cx),
                }
                let transmit = &mut self.transmit;
                let most = self.pace.room().min(WRITE_BYTES);
                self.link.with(|lane| lane.poll_transmit(now(), transmit, most));
            }
            while !self.transmit.is_empty() {
                let mut slices = [IoSlice::new(&[]); WRITE_SLICES];
                let count = self.transmit.chunks(&mut slices);
                let stream = Pin::new(&mut self.stream);
                let Poll::Ready(written) = stream.poll_write_vectored(cx, &slices[..count]) else {
                    return self.poll_blocked(cx);
                };
                match written {
                    Ok(0) => return Poll::Ready(LaneEnd::Closed),
                    Ok(n) => {
                        self.transmit.advance(n);
                        if let Some(room) = self.pace.wrote(now(), n) {
                            (self.limit_unsent)(&self.stream, room);
                        }
                    }
                    Err(error) => return Poll::Ready(LaneEnd::Io(error)),
                }
            }
        }
        cx.waker().wake_by_ref();
        Poll::Pending
    }

    /// Nothing is queued: flush what the transport buffered, and end where that was asked for.
    fn poll_idle(&mut self, cx: &mut Context<'_>) -> Poll<LaneEnd> {
        if let Err(error) = ready!(Pin::new(&mut self.stream).poll_flush(cx)) {
            return Poll::Ready(LaneEnd::Io(error));
        }
        if !self.link.is_closing() {
            return self.poll_interruption();
        }
        // What a full ring holds back is sent once the peer has acknowledged what came before.
        let (is_drained, is_acknowledged) =
            self.link.with(|lane| (lane.is_drained(), lane.stats().replay_bytes == 0));
        if !is_drained || (!is_acknowledged && self.poll_linger(cx).is_pending()) {
            return self.poll_interruption();
        }
        // The peer learns of the end either way; an error here changes nothing.
        let _ = ready!(Pin::new(&mut self.stream).poll_shutdown(cx));
        Poll::Ready(LaneEnd::Local)
    }
}

impl<S, F> Drive<S, F> {
    /// By how fast the connection takes what is written, `limit` is to set how much of it it keeps.
    #[must_use]
    pub fn paced_by(mut self, limit: fn(&S, usize)) -> Self {
        self.limit_unsent = limit;
        self
    }

    /// The connection takes no more: what is queued behind it is watched, and who interrupts wakes us.
    fn poll_blocked(&mut self, cx: &mut Context<'_>) -> Poll<LaneEnd> {
        self.pace.block(now());
        self.link.wait_blocked(cx.waker());
        self.poll_interruption()
    }

    /// Looks once more, after the waker is known: whoever interrupts before finds none to wake.
    fn poll_interruption(&self) -> Poll<LaneEnd> {
        self.link.interruption().map_or(Poll::Pending, Poll::Ready)
    }

    /// The time that the peer of a closed lane has.
    fn poll_linger(&mut self, cx: &mut Context<'_>) -> Poll<()> {
        let linger = self.linger.get_or_insert_with(|| Box::pin(tokio::time::sleep(CLOSE_LINGER)));
        linger.as_mut().poll(cx)
    }
}

/// The runtime's time.
fn now() -> Instant {
    tokio::time::Instant::now().into_std()
}

/// Far enough to mean never, near enough for the timer.
fn far_future() -> tokio::time::Instant {
    tokio::time::Instant::now() + std::time::Duration::from_secs(86_400 * 365)
}

//! One exchange's bytes between a stream and its connection, and what is said of it on the lane meanwhile.
//!
//! An end of the connection is believed only where the lane says the end of that direction, too: what is cut
//! off is never taken for whole. How the exchange ends otherwise is said on the lane alone.

use std::future::Future as _;
use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll};
use std::time::Duration;

use bytes::Bytes;
use sidelane_abi::failure;
use sidelane_tunnel::Key;
use sidelane_tunnel::dedicate::read_dedication;
use sidelane_tunnel::proto::DedicationStage;
use tokio::io::ReadBuf;
use tokio::time::{Sleep, sleep};

use crate::join::{Direction, Fault};
use crate::metrics::Flow;
use crate::plugin::lend::{Received, Reset, Stream};
use crate::tunnel::Link;

/// How long the lane's word is waited for after the connection has ended: the two come on different ways.
const WORD_TIME: Duration = Duration::from_secs(5);

/// How long the peer has to take the last bytes once the stream that they came from is gone.
const LINGER_TIME: Duration = Duration::from_secs(30);

/// Reads of what is thrown away before others get their turn.
const LINGER_READS_PER_POLL: usize = 32;

/// Whose stream it is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Side {
    /// The client's.
    Relay,
    /// The service's.
    Sidecar,
}

impl Side {
    /// What the peer is told where the stream breaks.
    const fn gone(self) -> u32 {
        match self {
            Self::Relay => failure::CLIENT_GONE,
            Self::Sidecar => failure::SERVICE_RESET,
        }
    }
}

/// An exchange on a connection of its own.
pub(super) struct Carry {
    link: Arc<Link>,
    key: Key,
    flow: Arc<Flow>,
    side: Side,
    local: Box<dyn Stream>,
    conn: Box<dyn Stream>,
    /// From the stream to the connection.
    up: Direction,
    /// From the connection to the stream.
    down: Direction,
    /// What of each was counted.
    counted: (u64, u64),
    /// The peer has said the end of its direction.
    has_end: bool,
    /// All was said on the wire: the rest of this end's direction is not wanted.
    is_complete: bool,
    /// The connection takes nothing more.
    is_up_broken: bool,
    /// The connection gives nothing more.
    is_down_broken: bool,
    /// Runs while the lane's word is waited for.
    word: Option<Pin<Box<Sleep>>>,
    /// All was said, and the stream is gone: runs while the peer takes what is on its way to it.
    linger: Option<Pin<Box<Sleep>>>,
}

impl Carry {
    /// Returns it with what was read of either before.
    pub(super) fn new(
        link: Arc<Link>,
        key: Key,
        flow: Arc<Flow>,
        side: Side,
        (local, of_local): (Box<dyn Stream>, Bytes),
        (conn, of_conn): (Box<dyn Stream>, Bytes),
    ) -> Self {
        Self {
            link,
            key,
            flow,
            side,
            local,
            conn,
            up: Direction::new(of_local),
            down: Direction::new(of_conn),
            counted: (0, 0),
            has_end: false,
            is_complete: false,
            is_up_broken: false,
            is_down_broken: false,
            word: None,
            linger: None,
        }
    }

    /// Bytes from the stream, and to it.
    pub(super) const fn bytes(&self) -> (u64, u64) {
        (self.up.bytes(), self.down.bytes())
    }

    /// Ready once the exchange is over, and its peer knows.
    pub(super) fn poll(&mut self, cx: &mut Context<'_>) -> Poll<Reset> {
        let end = self.poll_all(cx);
        let passed = self.bytes();
        self.flow.passed(passed.0 - self.counted.0, passed.1 - self.counted.1);
        self.counted = passed;
        match end {
            Ok(false) => Poll::Pending,
            Ok(true) => Poll::Ready(Reset::new(failure::NONE)),
            Err(reset) => Poll::Ready(reset),
        }
    }

    /// `Ok(true)`: it has ended well.
    fn poll_all(&mut self, cx: &mut Context<'_>) -> Result<bool, Reset> {
        if self.linger.is_some() {
            return Ok(self.poll_linger(cx));
        }
        self.listen(cx)?;
        self.poll_up(cx)?;
        self.poll_down(cx)?;
        if self.linger.is_some() {
            return Ok(self.poll_linger(cx));
        }
        if self.down.is_shut() && (self.up.is_shut() || self.is_complete) {
            return Ok(true);
        }
        if let Some(word) = &mut self.word
            && word.as_mut().poll(cx).is_ready()
        {
            return Err(self.reset(failure::TUNNEL_LOST));
        }
        Ok(false)
    }

    /// Throws away what still comes: to close with it unread would make the kernel take back what was sent.
    fn poll_linger(&mut self, cx: &mut Context<'_>) -> bool {
        let mut space = [0; 4096];
        for _ in 0..LINGER_READS_PER_POLL {
            let mut room = ReadBuf::new(&mut space);
            match Pin::new(&mut *self.conn).poll_read(cx, &mut room) {
                Poll::Ready(Ok(())) if !room.filled().is_empty() => {}
                Poll::Ready(_) => return true,
                Poll::Pending => {
                    let linger = self.linger.as_mut();
                    return linger.is_none_or(|linger| linger.as_mut().poll(cx).is_ready());
                }
            }
        }
        cx.waker().wake_by_ref();
        false
    }

    /// Hears what the lane says of the exchange.
    fn listen(&mut self, cx: &mut Context<'_>) -> Result<(), Reset> {
        while !self.has_end {
            match self.link.with(|lane| lane.poll_recv(self.key, cx)) {
                Poll::Pending => break,
                Poll::Ready(Received::Finished) => self.has_end = true,
                Poll::Ready(Received::Reset(reset)) if reset.code == failure::NONE => {
                    self.has_end = true;
                }
                Poll::Ready(Received::Reset(reset)) => return Err(reset),
                // The connection may be faster than the word that it is there.
                Poll::Ready(Received::Message(message)) => match read_dedication(&message) {
                    Some(DedicationStage::Wanted | DedicationStage::Connection) => {}
                    Some(DedicationStage::Framed) | None => {
                        return Err(self.reset(failure::PLUGIN_FAILED));
                    }
                },
            }
        }
        if !self.is_complete
            && let Poll::Ready(reset) = self.link.with(|lane| lane.poll_closed(self.key, cx))
        {
            if reset.code != failure::NONE {
                return Err(reset);
            }
            self.is_complete = true;
            if !self.is_down_broken {
                // What it has said still comes.
                self.word = None;
            }
        }
        Ok(())
    }

    fn poll_up(&mut self, cx: &mut Context<'_>) -> Result<(), Reset> {
        if self.up.is_shut() || self.is_complete || self.is_up_broken {
            return Ok(());
        }
        match self.up.poll_move(cx, &mut *self.local, &mut *self.conn) {
            Poll::Pending => {}
            Poll::Ready(Err(Fault::From(_))) => return self.stream_broke(),
            Poll::Ready(Err(Fault::To(_))) => self.up_broke(),
            Poll::Ready(Ok(())) => match self.up.poll_shut(cx, &mut *self.conn) {
                Poll::Pending => {}
                Poll::Ready(Err(_)) => self.up_broke(),
                Poll::Ready(Ok(())) => self.link.with(|lane| lane.finish(self.key)),
            },
        }
        Ok(())
    }

    fn poll_down(&mut self, cx: &mut Context<'_>) -> Result<(), Reset> {
        if self.down.is_shut() || self.is_down_broken {
            return Ok(());
        }
        match self.down.poll_move(cx, &mut *self.conn, &mut *self.local) {
            Poll::Pending => {}
            Poll::Ready(Err(Fault::To(_))) => return self.stream_broke(),
            Poll::Ready(Err(Fault::From(_))) => {
                self.is_down_broken = true;
                self.expect_word();
            }
            Poll::Ready(Ok(())) if self.has_end || self.is_complete => {
                self.word = None;
                if let Poll::Ready(Err(_)) = self.down.poll_shut(cx, &mut *self.local) {
                    return self.stream_broke();
                }
            }
            Poll::Ready(Ok(())) => self.expect_word(),
        }
        Ok(())
    }

    /// The stream broke: where it had said all before, nothing is lost by it.
    fn stream_broke(&mut self) -> Result<(), Reset> {
        if !self.up.is_shut() {
            return Err(self.reset(self.side.gone()));
        }
        self.reset(failure::NONE);
        self.linger = Some(Box::pin(sleep(LINGER_TIME)));
        Ok(())
    }

    /// The connection takes nothing more: the lane says why, or that is unknown. What has come of it is still
    /// passed on.
    fn up_broke(&mut self) {
        self.is_up_broken = true;
        self.expect_word();
    }

    fn expect_word(&mut self) {
        self.word.get_or_insert_with(|| Box::pin(sleep(WORD_TIME)));
    }

    fn reset(&self, code: u32) -> Reset {
        let reset = Reset::new(code);
        self.link.with(|lane| lane.reset(self.key, reset));
        reset
    }
}

//! An open connection: frames between a byte stream and an exchange, both ways, in one future.
//!
//! `up` reads the stream, `down` writes it; `clock` has what only some connections need. At rest
//! nothing is held but the state itself: bytes are read into a buffer that the thread shares.

mod clock;
mod down;
mod scratch;
mod up;

use std::future::poll_fn;
use std::pin::Pin;
use std::task::{Context, Poll, ready};

use sidelane_plugin::{ByteStream, Error, RecvHalf, Reset, SendHalf, failure};
use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};

use crate::WebSocket;
use crate::carry::clock::Clock;
use crate::carry::down::Down;
use crate::carry::scratch::Scratch;
use crate::carry::up::Up;
use crate::connections::Permit;
use crate::frame::{self, Header, opcode};
use crate::metrics::{By, Open};
use crate::options::Options;

/// Close codes of our own (RFC 6455 §7.4.1 and its registry).
mod code {
    pub(super) const GOING_AWAY: u16 = 1001;
    pub(super) const PROTOCOL: u16 = 1002;
    pub(super) const POLICY: u16 = 1008;
    pub(super) const TOO_BIG: u16 = 1009;
    pub(super) const UNEXPECTED: u16 = 1011;
    pub(super) const RESTART: u16 = 1012;
    pub(super) const TRY_LATER: u16 = 1013;
}

/// Rounds of a direction before other tasks of the thread have their turn.
const ROUNDS_PER_POLL: usize = 16;

/// Whose bytes the stream has.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Side {
    /// The relay's end, a server to the client.
    Client,
    /// The sidecar's end, a client to the service.
    Service,
}

impl Side {
    const fn by(self) -> By {
        match self {
            Self::Client => By::Client,
            Self::Service => By::Service,
        }
    }

    const fn other(self) -> By {
        match self {
            Self::Client => By::Service,
            Self::Service => By::Client,
        }
    }

    /// What the peer is told where the stream breaks.
    const fn gone(self) -> u32 {
        match self {
            Self::Client => failure::CLIENT_GONE,
            Self::Service => failure::SERVICE_RESET,
        }
    }

    /// What the peer is told where the stream has what RFC 6455 does not allow.
    const fn invalid(self) -> u32 {
        match self {
            Self::Client => failure::BAD_REQUEST,
            Self::Service => failure::SERVICE_INVALID,
        }
    }
}

/// A message in one direction, as far as it has come.
#[derive(Clone, Copy, Debug, Default)]
struct Track {
    opcode: u8,
    /// Payload of all its frames so far.
    bytes: u64,
}

/// How a connection ends.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Ending {
    /// Both directions have ended, or all was said and the other end took too long to hang up.
    Complete,
    /// The stream broke.
    Gone,
    /// The peer, or the tunnel, broke the exchange off.
    Reset(Reset),
    /// It ends here, for a reason of ours: what the stream is told, and what the peer.
    Leave { close: u16, reset: u32, readable: bool },
}

/// An open connection.
pub(crate) struct Carrier<'a> {
    plugin: &'a WebSocket,
    side: Side,
    stream: ByteStream,
    send: SendHalf,
    recv: RecvHalf,
    up: Up,
    down: Down,
    clock: Option<Box<Clock>>,
    /// At the relay's end: the series that are counted.
    open: Option<Open>,
    /// How the connection ends has been counted.
    counted: bool,
    _permit: Permit,
}

impl<'a> Carrier<'a> {
    #[allow(clippy::too_many_arguments, reason = "the parts of a connection, put together once")]
    pub(crate) fn new(
        plugin: &'a WebSocket,
        side: Side,
        stream: ByteStream,
        send: SendHalf,
        recv: RecvHalf,
        extended: bool,
        options: Options,
        permit: Permit,
    ) -> Box<Self> {
        let timed = side == Side::Client
            && !(plugin.config.idle_timeout.is_zero() && plugin.config.ping_interval.is_zero());
        let clock = timed.then(|| {
            let now = plugin.host.now();
            let idle = (!plugin.config.idle_timeout.is_zero()).then_some(now);
            let ping =
                (!plugin.config.ping_interval.is_zero()).then(|| now + plugin.config.ping_interval);
            Box::new(Clock::new(plugin, idle, ping))
        });
        Box::new(Self {
            plugin,
            side,
            stream,
            send,
            recv,
            up: Up::new(side, extended, options, &plugin.host),
            down: Down::default(),
            clock,
            open: None,
            counted: false,
            _permit: permit,
        })
    }

    /// Counts what passes from here on.
    pub(crate) fn count(&mut self, open: Open) {
        self.open = Some(open);
    }

    /// Bytes that came behind the handshake.
    pub(crate) fn read_ahead(&mut self, bytes: &[u8]) {
        self.up.read_ahead(bytes);
    }

    /// Carries frames until the connection ends.
    pub(crate) async fn run(mut self: Box<Self>) -> Result<(), Error> {
        let ending = poll_fn(|cx| self.poll(cx)).await;
        self.count_ending(ending);
        match ending {
            Ending::Complete => {
                let _ = self.send.finish();
                if !self.down.ended {
                    // All was said; the peer is not to wait for the rest.
                    self.send.reset(Reset::new(failure::NONE));
                }
                Ok(())
            }
            Ending::Gone if self.up.done && self.side == Side::Service => Ok(()),
            Ending::Gone if self.up.closed || self.down.closed => {
                self.send.reset(Reset::new(failure::NONE));
                Ok(())
            }
            Ending::Gone => {
                let code = self.side.gone();
                self.send.reset(Reset::new(code));
                Err(Error::new(code, "the connection broke"))
            }
            Ending::Reset(reset) => {
                if let Some(close) = self.close_for(reset.code) {
                    self.leave(close, true).await;
                } else if reset.code == failure::NONE && self.down.closed && !self.up.closed {
                    // The peer has said all and gone; the answer to its close frame is for us to take.
                    self.leave(code::GOING_AWAY, true).await;
                }
                if reset.code == failure::NONE { Ok(()) } else { Err(reset.into()) }
            }
            Ending::Leave { close, reset, readable } => {
                if reset == failure::DRAINING || !self.told_in_band(reset) {
                    self.send.reset(Reset::new(reset));
                }
                self.leave(close, readable).await;
                self.send.reset(Reset::new(failure::NONE));
                Err(Error::new(reset, "ended here"))
            }
        }
    }

    /// Has the other side's close frame follow what was sent before it, where there is room for it: a
    /// reset would overtake that.
    fn told_in_band(&mut self, reset: u32) -> bool {
        let (side, close) = match self.side {
            Side::Client => (Side::Service, code::GOING_AWAY),
            Side::Service => (Side::Client, code::UNEXPECTED),
        };
        if self.up.closed || reset == failure::NONE {
            return true;
        }
        let (header, payload) = own_frame(side, opcode::CLOSE, close.to_be_bytes());
        self.up.try_send(&mut self.send, self.side, &header, &payload)
    }

    fn poll(&mut self, cx: &mut Context<'_>) -> Poll<Ending> {
        if let Some(goodbye) = self.plugin.drain.goodbye() {
            self.clock(|clock| clock.goodbye = Some(goodbye));
        }
        let down = match self.poll_down(cx) {
            Poll::Ready(Err(ending)) => return Poll::Ready(ending),
            Poll::Ready(Ok(())) => true,
            Poll::Pending => false,
        };
        let up = match self.poll_up(cx) {
            Poll::Ready(Err(ending)) => return Poll::Ready(ending),
            Poll::Ready(Ok(())) => true,
            Poll::Pending => false,
        };
        if self.down.broken {
            return Poll::Ready(Ending::Gone);
        }
        if up && down {
            return Poll::Ready(Ending::Complete);
        }
        // While the receiving direction is read, it says so itself. Complete is no failure: what was
        // received is still to be written.
        if self.down.is_blocked()
            && let Poll::Ready(reset) = self.send.poll_closed(cx)
        {
            if reset.code != failure::NONE {
                return Poll::Ready(Ending::Reset(reset));
            }
            if self.down.done {
                // The peer wants no more, and has said all.
                return Poll::Ready(Ending::Complete);
            }
        }
        if self.up.closed && self.down.closed {
            let (plugin, wait) = (self.plugin, self.plugin.config.close_timeout);
            self.clock(|clock| {
                clock.hang_up.get_or_insert_with(|| plugin.host.now() + wait);
            });
        }
        self.poll_clock(cx)
    }

    /// Changes deadlines. There is a clock from here on.
    fn clock(&mut self, change: impl FnOnce(&mut Clock)) {
        let plugin = self.plugin;
        let clock = self.clock.get_or_insert_with(|| Box::new(Clock::new(plugin, None, None)));
        change(clock);
        clock.set(plugin);
    }

    /// What the stream's end is told where the exchange was reset; `None`: it sees the connection
    /// end, as its peer's did.
    fn close_for(&self, reset: u32) -> Option<u16> {
        match (self.side, reset) {
            (_, failure::DRAINING) => Some(self.plugin.config.drain_code),
            (Side::Client, failure::TUNNEL_LOST) => Some(code::RESTART),
            (Side::Client, failure::OVERLOADED) => Some(code::TRY_LATER),
            (
                Side::Client,
                failure::SERVICE_INVALID
                | failure::TOO_LARGE
                | failure::RATE_LIMITED
                | failure::FLOW_CONTROL
                | failure::PLUGIN_FAILED
                | failure::INTERNAL,
            ) => Some(code::UNEXPECTED),
            (
                Side::Service,
                failure::BAD_REQUEST
                | failure::TOO_LARGE
                | failure::RATE_LIMITED
                | failure::CLIENT_TIMEOUT,
            ) => Some(code::GOING_AWAY),
            _ => None,
        }
    }

    /// Says `close`, where no frame is half written and no close frame has passed, and lets the other end answer and hang up within
    /// `close_timeout`. What it still sends is thrown away; hanging up with it unread would have the
    /// kernel reset the connection, and the close frame with it.
    async fn leave(&mut self, close: u16, readable: bool) {
        if self.down.is_inside_frame() || self.down.broken || self.down.done {
            return;
        }
        let close_timeout = self.plugin.config.close_timeout;
        self.up.discard();
        if !self.down.closed {
            self.put_close(close);
        }
        let mut timer = self.plugin.host.timer(self.plugin.host.now() + close_timeout);
        let (mut readable, mut written, mut shut) = (readable, false, false);
        poll_fn(|cx| {
            if !written {
                match self.poll_flushed(cx) {
                    Poll::Ready(Ok(())) => written = true,
                    Poll::Ready(Err(_)) => return Poll::Ready(()),
                    Poll::Pending => {}
                }
            }
            let mut over = self.up.done;
            if readable && !over {
                match self.poll_up(cx) {
                    Poll::Ready(Ok(())) => over = true,
                    Poll::Ready(Err(_)) => readable = false,
                    Poll::Pending => {}
                }
            }
            if !readable && !over {
                over = self.poll_discard(cx).is_ready();
                self.up.done = over;
            }
            // The server closes first (RFC 6455 §7.1.1), once both have said so.
            // A stream of HTTP/2 that ends unshut loses what it has not sent.
            let may_shut = over || self.side == Side::Client && (self.up.closed || !readable);
            if written && may_shut && !shut {
                shut = Pin::new(&mut self.stream).poll_shutdown(cx).is_ready();
            }
            if written && shut && (over || self.up.closed) {
                return Poll::Ready(());
            }
            timer.poll_fired(cx)
        })
        .await;
    }

    /// Reads and throws away; ready at the end.
    fn poll_discard(&mut self, cx: &mut Context<'_>) -> Poll<()> {
        let mut scratch = Scratch::take();
        for _ in 0..ROUNDS_PER_POLL {
            let mut room = ReadBuf::new(scratch.room());
            match ready!(Pin::new(&mut self.stream).poll_read(cx, &mut room)) {
                Ok(()) if room.filled().is_empty() => return Poll::Ready(()),
                Ok(()) => {}
                Err(_) => return Poll::Ready(()),
            }
        }
        cx.waker().wake_by_ref();
        Poll::Pending
    }

    fn put_close(&mut self, code: u16) {
        self.put_frame(opcode::CLOSE, code.to_be_bytes());
        self.down.closed = true;
    }

    /// Puts a frame of ours behind what waits to be written, which ends with a whole frame.
    fn put_frame<const N: usize>(&mut self, opcode: u8, payload: [u8; N]) {
        let (header, payload) = own_frame(self.side, opcode, payload);
        self.down.put(frame::write(&header).as_slice(), &payload);
    }

    /// Counts how the connection ends, by what ended it first.
    fn count_close(&mut self, by: By, code: Option<u16>) {
        if !self.counted
            && let Some(open) = &self.open
        {
            open.closed(by, code);
            self.counted = true;
        }
    }

    fn count_ending(&mut self, ending: Ending) {
        match ending {
            Ending::Complete if self.up.ended_first => self.count_close(self.side.by(), None),
            Ending::Complete => self.count_close(self.side.other(), None),
            Ending::Gone => self.count_close(self.side.by(), None),
            Ending::Leave { close, .. } => self.count_close(By::Sidelane, Some(close)),
            Ending::Reset(reset) => match (self.close_for(reset.code), reset.code) {
                (Some(close), _) => self.count_close(By::Sidelane, Some(close)),
                (None, failure::SERVICE_RESET | failure::NONE) => {
                    self.count_close(By::Service, None);
                }
                (None, _) => self.count_close(By::Sidelane, None),
            },
        }
    }
}

/// Makes a frame of ours for the stream of `side`.
fn own_frame<const N: usize>(side: Side, opcode: u8, mut payload: [u8; N]) -> (Header, [u8; N]) {
    let key = match side {
        Side::Client => None,
        // Without random bytes a frame is still a frame: the key protects what lies between from
        // payloads that a third party chose, and ours are not.
        Side::Service => Some(crate::handshake::random().unwrap_or_default()),
    };
    if let Some(key) = key {
        frame::mask(&mut payload, key);
    }
    (Header { fin: true, reserved: 0, opcode, key, len: N as u64 }, payload)
}

/// The code of a close frame's payload, as the metrics name it; 1005: none.
fn close_code(header: &Header, payload: &[u8]) -> u16 {
    let Some(mut bytes) = payload.first_chunk::<2>().copied() else { return 1005 };
    if let Some(key) = header.key {
        frame::mask(&mut bytes, key);
    }
    u16::from_be_bytes(bytes)
}

#[cfg(test)]
mod tests {
    use super::*;

    /// An idle connection is this future, at each end, beside what the host keeps of it.
    #[test]
    fn a_connection_at_rest_is_small() {
        fn future_size<'a, F: Future>(_: impl FnOnce(Box<Carrier<'a>>) -> F) -> usize {
            size_of::<F>()
        }
        let (state, future) = (size_of::<Carrier<'_>>(), future_size(Carrier::run));
        assert!(state <= 448, "the state has {state} bytes");
        assert!(future <= 256, "the future has {future} bytes");
    }
}

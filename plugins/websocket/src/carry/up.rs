//! From the stream to the exchange.

use std::io;
use std::pin::Pin;
use std::task::{Context, Poll, Waker, ready};
use std::time::Duration;

use sidelane_plugin::{Buf, Host, Instant, Message, SendHalf, failure};
use tokio::io::{AsyncRead, ReadBuf};

use super::scratch::{READ_BYTES, Scratch};
use super::{Carrier, Ending, ROUNDS_PER_POLL, Side, Track, close_code, code};
use crate::frame::{self, Checker, Header, opcode};
use crate::metrics::{Direction, Tally};
use crate::options::Options;
use crate::payload::{self, Batch, FIELD_FRAME, PIECE_BYTES_MAX};

/// Frames beyond this are no part of a batch: a message of their own costs less than the copy.
const BATCHED_BYTES_MAX: usize = 4 * 1024;

/// State of the direction.
pub(super) struct Up {
    checker: Checker,
    /// What was read and not yet made messages of: at most an unfinished frame of
    /// [`PIECE_BYTES_MAX`], and while a message waits what came with it.
    held: Buf,
    /// A message that waits for credit.
    waiting: Option<Message>,
    /// Of a frame that goes in pieces: payload still to come, and where it stands.
    piece_left: u64,
    piece_offset: u64,
    piece_fin: bool,
    message: Track,
    message_bytes_max: u64,
    rate: Option<Box<Rate>>,
    /// What `held` begins with may be a whole frame.
    whole: bool,
    /// Nothing goes to the exchange any more.
    discarding: bool,
    /// A close frame has passed. What comes after it is meant for nobody (RFC 6455 §5.5.1).
    pub(super) closed: bool,
    /// The direction has ended.
    pub(super) done: bool,
    /// It did so before the other one.
    pub(super) ended_first: bool,
}

/// Tokens for messages: a second's worth at most.
struct Rate {
    per_second: u32,
    /// Thousandths of a message.
    tokens: u64,
    filled: Instant,
}

impl Rate {
    fn new(per_second: u32, host: &Host) -> Self {
        Self { per_second, tokens: u64::from(per_second) * 1000, filled: host.now() }
    }

    fn take(&mut self, host: &Host) -> bool {
        if self.tokens < 1000 {
            let now = host.now();
            let passed = now - self.filled;
            let full = u64::from(self.per_second) * 1000;
            let more = passed.min(Duration::from_secs(1)).as_micros();
            let more = u64::try_from(more).unwrap_or(0) * u64::from(self.per_second) / 1000;
            if more > 0 {
                self.filled = now;
            }
            self.tokens = (self.tokens + more).min(full);
        }
        match self.tokens.checked_sub(1000) {
            Some(left) => {
                self.tokens = left;
                true
            }
            None => false,
        }
    }
}

impl Up {
    pub(super) fn new(side: Side, extended: bool, options: Options, host: &Host) -> Self {
        Self {
            checker: Checker::new(side == Side::Client, extended),
            held: Buf::new(),
            waiting: None,
            piece_left: 0,
            piece_offset: 0,
            piece_fin: false,
            message: Track::default(),
            message_bytes_max: options.max_message_size.unwrap_or(u64::MAX),
            rate: options.messages_per_second.map(|rate| Box::new(Rate::new(rate, host))),
            whole: false,
            discarding: false,
            closed: false,
            done: false,
            ended_first: false,
        }
    }

    pub(super) fn read_ahead(&mut self, bytes: &[u8]) {
        if !bytes.is_empty() {
            self.held = Buf::copy_from_slice(bytes);
            self.whole = true;
        }
    }

    /// Sends a frame of ours to the peer, behind what was sent; false: it would have to wait, or is
    /// inside another.
    pub(super) fn try_send(
        &mut self,
        send: &mut SendHalf,
        side: Side,
        header: &Header,
        payload: &[u8],
    ) -> bool {
        if self.waiting.is_some() || self.piece_left > 0 {
            return false;
        }
        let prefix = payload::frame_prefix(header, side == Side::Client, payload.len());
        let head = payload::join(&prefix, payload);
        let mut message = Some(Message { field: FIELD_FRAME, end: false, head, body: Buf::new() });
        let mut cx = Context::from_waker(Waker::noop());
        send.poll_send(&mut cx, &mut message).is_ready()
    }

    /// Throws away what comes from here on.
    pub(super) fn discard(&mut self) {
        self.discarding = true;
        self.waiting = None;
        self.message_bytes_max = u64::MAX;
        self.rate = None;
    }
}

impl Carrier<'_> {
    /// Ready with `Ok`: the direction has ended.
    pub(super) fn poll_up(&mut self, cx: &mut Context<'_>) -> Poll<Result<(), Ending>> {
        for _ in 0..ROUNDS_PER_POLL {
            if self.up.done {
                return Poll::Ready(Ok(()));
            }
            if self.up.waiting.is_some()
                && ready!(self.send.poll_send(cx, &mut self.up.waiting)).is_err()
            {
                return self.up_over(cx);
            }
            let mut scratch = Scratch::take();
            let (read, out) = scratch.both();
            let held = self.up.held.len();
            let mut filled = held;
            if !self.up.whole {
                let mut room = ReadBuf::new(&mut read[held..held + READ_BYTES]);
                match ready!(Pin::new(&mut self.stream).poll_read(cx, &mut room)) {
                    Ok(()) if room.filled().is_empty() => return self.up_ended(cx),
                    Ok(()) => filled += room.filled().len(),
                    Err(error) => return self.up_failed(cx, &error),
                }
                if let Some(clock) = &mut self.clock {
                    clock.heard = true;
                }
            }
            read[..held].copy_from_slice(&self.up.held);
            let bytes = &read[..filled];
            let mut tally = Tally::default();
            let taken = self.take_frames(cx, bytes, out, &mut tally);
            if let Some(open) = &self.open {
                open.route().add(Direction::ToService, &mut tally);
            }
            let at = match taken {
                Ok(at) => at,
                Err(Stop::Ending(ending)) => return Poll::Ready(Err(ending)),
                Err(Stop::Over) => return self.up_over(cx),
            };
            if at > 0
                && let Some(clock) = &mut self.clock
            {
                clock.passed(self.plugin);
            }
            let rest = &bytes[at..];
            if at > 0 || filled > held {
                self.up.held =
                    if rest.is_empty() { Buf::new() } else { Buf::copy_from_slice(rest) };
            }
            self.up.whole = self.up.waiting.is_some() && !rest.is_empty();
        }
        cx.waker().wake_by_ref();
        Poll::Pending
    }

    /// Makes messages of the frames in `bytes`. Returns how much of them is done with.
    fn take_frames(
        &mut self,
        cx: &mut Context<'_>,
        bytes: &[u8],
        out: &mut Vec<u8>,
        tally: &mut Tally,
    ) -> Result<usize, Stop> {
        let from_client = self.side == Side::Client;
        let mut batch = Batch::new(out);
        let mut at = 0;
        let result = loop {
            let rest = &bytes[at..];
            if rest.is_empty() || self.up.waiting.is_some() {
                break Ok(());
            }
            if self.up.closed {
                at = bytes.len();
                break Ok(());
            }
            if self.up.piece_left > 0 {
                let take = piece(self.up.piece_left, rest.len());
                let prefix = payload::piece_prefix(self.up.piece_offset, from_client, take);
                at += take;
                tally.bytes(take as u64);
                self.up.piece_left -= take as u64;
                self.up.piece_offset += take as u64;
                if self.up.piece_left == 0 {
                    self.frame_passed(self.up.piece_fin, tally);
                }
                self.offer(cx, FIELD_FRAME, payload::join(&prefix, &rest[..take]))?;
                continue;
            }
            let (header, header_len) = match self.up.checker.read(rest) {
                Ok(Some(read)) => read,
                Ok(None) => break Ok(()),
                Err(violation) => {
                    self.log_violation(violation);
                    break Err(Stop::leave(code::PROTOCOL, self.side.invalid(), false));
                }
            };
            if !header.is_control() && self.message_bytes(&header) > self.up.message_bytes_max {
                break Err(Stop::leave(code::TOO_BIG, failure::TOO_LARGE, true));
            }
            let rest = &rest[header_len..];
            if header.len > PIECE_BYTES_MAX as u64 {
                if rest.is_empty() {
                    break Ok(());
                }
                if !batch.is_empty() {
                    self.flush(cx, &mut batch)?;
                    continue;
                }
                if !self.may_pass(&header) {
                    break Err(Stop::leave(code::POLICY, failure::RATE_LIMITED, true));
                }
                let take = piece(header.len, rest.len());
                let prefix = payload::frame_prefix(&header, from_client, take);
                at += header_len + take;
                self.frame_begun(&header, &[], tally);
                tally.bytes(take as u64);
                self.up.piece_left = header.len - take as u64;
                self.up.piece_offset = take as u64;
                self.up.piece_fin = header.fin;
                self.offer(cx, FIELD_FRAME, payload::join(&prefix, &rest[..take]))?;
                continue;
            }
            #[allow(clippy::cast_possible_truncation, reason = "at most PIECE_BYTES_MAX")]
            let len = header.len as usize;
            let Some(frame) = rest.get(..len) else { break Ok(()) };
            let alone = len > BATCHED_BYTES_MAX;
            if !batch.is_empty() && (alone || !batch.fits(len)) {
                self.flush(cx, &mut batch)?;
                continue;
            }
            if !self.may_pass(&header) {
                break Err(Stop::leave(code::POLICY, failure::RATE_LIMITED, true));
            }
            at += header_len + len;
            if header.opcode == opcode::PONG && self.is_own_pong(&header, frame) {
                continue;
            }
            self.frame_begun(&header, frame, tally);
            tally.bytes(header.len);
            if !header.is_control() {
                self.frame_passed(header.fin, tally);
            }
            let prefix = payload::frame_prefix(&header, from_client, len);
            if alone {
                self.offer(cx, FIELD_FRAME, payload::join(&prefix, frame))?;
            } else {
                batch.push(&prefix, frame);
            }
        };
        if !batch.is_empty() {
            self.flush(cx, &mut batch)?;
        }
        result.map(|()| at)
    }

    fn flush(&mut self, cx: &mut Context<'_>, batch: &mut Batch<'_>) -> Result<(), Stop> {
        let (field, payload) = batch.take();
        self.offer(cx, field, payload)
    }

    /// Sends a message, or has it wait.
    fn offer(&mut self, cx: &mut Context<'_>, field: u32, payload: Buf) -> Result<(), Stop> {
        if self.up.discarding {
            return Ok(());
        }
        self.up.waiting = Some(Message { field, end: false, head: payload, body: Buf::new() });
        match self.send.poll_send(cx, &mut self.up.waiting) {
            Poll::Ready(Ok(())) | Poll::Pending => Ok(()),
            Poll::Ready(Err(_)) => Err(Stop::Over),
        }
    }

    /// Length of the message that `header`'s frame is of, that frame included.
    fn message_bytes(&self, header: &Header) -> u64 {
        let before = if header.opcode == opcode::CONTINUATION { self.up.message.bytes } else { 0 };
        before.saturating_add(header.len)
    }

    fn may_pass(&mut self, header: &Header) -> bool {
        let begins = !header.is_control() && header.opcode != opcode::CONTINUATION;
        match &mut self.up.rate {
            Some(rate) if begins => rate.take(&self.plugin.host),
            _ => true,
        }
    }

    fn frame_begun(&mut self, header: &Header, payload: &[u8], tally: &mut Tally) {
        self.up.checker.passed(header);
        if !header.is_control() {
            let bytes = self.message_bytes(header);
            if header.opcode != opcode::CONTINUATION {
                self.up.message.opcode = header.opcode;
            }
            self.up.message.bytes = bytes;
            return;
        }
        tally.message(header.opcode);
        if header.opcode == opcode::CLOSE {
            self.up.closed = true;
            if !self.up.discarding {
                self.count_close(self.side.by(), Some(close_code(header, payload)));
            }
        }
    }

    /// The last byte of a data frame has passed.
    fn frame_passed(&mut self, fin: bool, tally: &mut Tally) {
        if !fin {
            return;
        }
        tally.message(self.up.message.opcode);
        if let Some(open) = &self.open {
            open.route().size(Direction::ToService, self.up.message.bytes);
        }
    }

    /// Whether a pong answers a ping of ours; nobody else asked for it.
    fn is_own_pong(&mut self, header: &Header, payload: &[u8]) -> bool {
        let Some(clock) = self.clock.as_mut().filter(|clock| clock.pinged) else { return false };
        let Ok(mut payload) = <[u8; 8]>::try_from(payload) else { return false };
        if let Some(key) = header.key {
            frame::mask(&mut payload, key);
        }
        if payload != self.plugin.cookie {
            return false;
        }
        clock.pinged = false;
        true
    }

    fn up_ended(&mut self, cx: &mut Context<'_>) -> Poll<Result<(), Ending>> {
        if (!self.up.held.is_empty() || self.up.piece_left > 0) && !self.up.discarding {
            // Inside a frame: the stream did not end, it broke.
            return Poll::Ready(Err(Ending::Gone));
        }
        self.up.done = true;
        self.up.ended_first = !self.down.ended;
        if self.up.discarding || self.send.finish().is_ok() {
            return Poll::Ready(Ok(()));
        }
        self.up_over(cx)
    }

    fn up_failed(&mut self, cx: &mut Context<'_>, _: &io::Error) -> Poll<Result<(), Ending>> {
        if self.up.closed {
            // All was said before.
            return self.up_ended(cx);
        }
        Poll::Ready(Err(Ending::Gone))
    }

    /// The exchange takes no more: the peer wants none, or it was reset.
    fn up_over(&mut self, cx: &mut Context<'_>) -> Poll<Result<(), Ending>> {
        self.up.waiting = None;
        match self.send.poll_closed(cx) {
            Poll::Ready(reset) if reset.code == failure::NONE => {
                self.up.done = true;
                Poll::Ready(Ok(()))
            }
            Poll::Ready(reset) => Poll::Ready(Err(Ending::Reset(reset))),
            Poll::Pending => {
                Poll::Ready(Err(Ending::Reset(sidelane_plugin::Reset::new(failure::CANCELLED))))
            }
        }
    }

    fn log_violation(&self, violation: frame::Violation) {
        use sidelane_plugin::Level;
        let host = self.plugin.host;
        if !self.up.discarding && host.logs(Level::Debug) {
            let who = if self.side == Side::Client { "client" } else { "service" };
            let text = format!("closed with 1002: the {who} sent {violation}");
            host.log(Level::Debug, "sidelane_websocket", &text);
        }
    }
}

/// Why no more frames are taken.
enum Stop {
    Ending(Ending),
    /// The exchange is over.
    Over,
}

impl Stop {
    const fn leave(close: u16, reset: u32, readable: bool) -> Self {
        Self::Ending(Ending::Leave { close, reset, readable })
    }
}

/// Bytes of the next piece.
fn piece(left: u64, there: usize) -> usize {
    usize::try_from(left).unwrap_or(usize::MAX).min(there).min(PIECE_BYTES_MAX)
}

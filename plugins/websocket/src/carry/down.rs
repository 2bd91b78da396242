//! From the exchange to the stream.

use std::collections::VecDeque;
use std::io::{self, IoSlice};
use std::ops::Range;
use std::pin::Pin;
use std::task::{Context, Poll, ready};

use sidelane_http_born::wire::Reader;
use sidelane_plugin::{Buf, Message, Reset, failure};
use tokio::io::AsyncWrite;

use super::scratch::Scratch;
use super::{Carrier, Ending, ROUNDS_PER_POLL, Track, close_code};
use crate::frame::{self, opcode};
use crate::metrics::{Direction, Tally};
use crate::payload::{self, FIELD_BATCH, FIELD_FRAME, Frame};

/// Payloads up to this are copied behind their header; longer ones are written from where they are.
const COPIED_BYTES_MAX: usize = 4 * 1024;

/// Bytes gathered for one write, but for the last message's.
const GATHERED_BYTES_MAX: usize = 64 * 1024;

/// Payloads written from where they are, in one write. With what stands between them they are at
/// most 64 elements.
const PAYLOADS_MAX: usize = 31;

/// State of the direction.
#[derive(Default)]
pub(super) struct Down {
    /// What the stream would not take yet.
    unwritten: VecDeque<Buf>,
    /// Of a frame that comes in pieces: payload still to come, and where it stands.
    piece_left: u64,
    piece_offset: u64,
    piece_fin: bool,
    message: Track,
    /// The exchange was reset, once all before is written.
    reset: Option<Reset>,
    /// Written bytes may still stand in a buffer.
    unflushed: bool,
    /// The exchange's direction has ended.
    pub(super) ended: bool,
    /// A close frame has passed, or one of ours was put.
    pub(super) closed: bool,
    /// The stream takes no more.
    pub(super) broken: bool,
    /// The direction has ended.
    pub(super) done: bool,
}

/// What one write is made of: bytes in a buffer, and payloads that stand between them.
struct Gathered<'a> {
    out: &'a mut Vec<u8>,
    /// Each with where in `out` it stands.
    payloads: &'a mut Vec<(usize, Buf)>,
    bytes: usize,
}

impl Gathered<'_> {
    fn is_full(&self) -> bool {
        self.bytes >= GATHERED_BYTES_MAX || self.payloads.len() >= PAYLOADS_MAX
    }

    fn put(&mut self, bytes: &[u8]) {
        self.out.extend_from_slice(bytes);
        self.bytes += bytes.len();
    }

    fn payload(&mut self, whole: &Buf, range: Range<usize>) {
        if range.len() <= COPIED_BYTES_MAX || self.is_full() {
            return self.put(&whole[range]);
        }
        self.bytes += range.len();
        self.payloads.push((self.out.len(), whole.slice(range)));
    }

    /// The parts in order, some of them empty: what stands in `out` before a payload, and that.
    fn parts(&self) -> impl Iterator<Item = (&[u8], Option<&Buf>)> {
        let mut from = 0;
        let between = self.payloads.iter().map(move |(at, payload)| {
            let before = from..*at;
            from = *at;
            (&self.out[before], Some(payload))
        });
        let last = self.payloads.last().map_or(0, |(at, _)| *at);
        between.chain([(&self.out[last..], None)])
    }

    /// Keeps what follows the first `wrote` bytes.
    fn keep(&self, mut wrote: usize, unwritten: &mut VecDeque<Buf>) {
        let mut skip = |len: usize| {
            let skipped = len.min(wrote);
            wrote -= skipped;
            skipped
        };
        for (bytes, payload) in self.parts() {
            let at = skip(bytes.len());
            if at < bytes.len() {
                unwritten.push_back(Buf::copy_from_slice(&bytes[at..]));
            }
            let Some(payload) = payload else { continue };
            let at = skip(payload.len());
            if at < payload.len() {
                unwritten.push_back(payload.slice(at..));
            }
        }
    }
}

impl Down {
    /// The stream is in the middle of a frame: nothing of ours may follow.
    pub(super) fn is_inside_frame(&self) -> bool {
        self.piece_left > 0
    }

    /// Puts bytes behind what waits to be written.
    pub(super) fn put(&mut self, header: &[u8], payload: &[u8]) {
        self.unwritten.push_back(Buf::from([header, payload].concat()));
    }

    /// The exchange is not being read.
    pub(super) fn is_blocked(&self) -> bool {
        self.done || self.ended || !self.unwritten.is_empty()
    }
}

impl Carrier<'_> {
    /// Ready with `Ok`: the direction has ended.
    pub(super) fn poll_down(&mut self, cx: &mut Context<'_>) -> Poll<Result<(), Ending>> {
        if self.down.done || self.down.broken {
            return Poll::Ready(Ok(()));
        }
        for _ in 0..ROUNDS_PER_POLL {
            if !self.down.unwritten.is_empty() {
                match ready!(self.poll_unwritten(cx)) {
                    Ok(()) => {}
                    Err(_) => return self.down_failed(),
                }
            }
            if let Some(reset) = self.down.reset {
                return Poll::Ready(Err(Ending::Reset(reset)));
            }
            if self.down.ended {
                let stream = Pin::new(&mut self.stream);
                match ready!(stream.poll_shutdown(cx)) {
                    Ok(()) => self.down.done = true,
                    Err(_) => return self.down_failed(),
                }
                return Poll::Ready(Ok(()));
            }
            let mut scratch = Scratch::take();
            let (out, payloads) = scratch.write();
            let mut gathered = Gathered { out, payloads, bytes: 0 };
            let mut tally = Tally::default();
            let pending = self.gather(cx, &mut gathered, &mut tally);
            if let Some(open) = &self.open {
                open.route().add(Direction::ToClient, &mut tally);
            }
            let pending = pending?;
            if gathered.bytes > 0 {
                match self.poll_write(cx, &gathered) {
                    Ok(wrote) => gathered.keep(wrote, &mut self.down.unwritten),
                    Err(_) => return self.down_failed(),
                }
                self.down.unflushed = true;
                if let Some(clock) = &mut self.clock {
                    clock.passed(self.plugin);
                }
                if !self.down.unwritten.is_empty() {
                    // A write that took a part asks for no wake-up: only the next one does.
                    continue;
                }
            }
            if pending {
                return match self.poll_flushed(cx) {
                    Poll::Ready(Err(_)) => self.down_failed(),
                    _ => Poll::Pending,
                };
            }
        }
        cx.waker().wake_by_ref();
        Poll::Pending
    }

    /// Takes what messages wait, up to a write's worth; true: no more do.
    fn gather(
        &mut self,
        cx: &mut Context<'_>,
        gathered: &mut Gathered<'_>,
        tally: &mut Tally,
    ) -> Result<bool, Ending> {
        while !gathered.is_full() {
            match self.recv.poll_recv(cx) {
                Poll::Pending => return Ok(true),
                Poll::Ready(None) => self.down.ended = true,
                Poll::Ready(Some(Err(reset))) => self.down.reset = Some(reset),
                Poll::Ready(Some(Ok(message))) => {
                    self.down.ended = message.end;
                    self.take_message(&message, gathered, tally)
                        .map_err(|Malformed| Ending::Reset(Reset::new(failure::PLUGIN_FAILED)))?;
                }
            }
            if self.down.ended || self.down.reset.is_some() {
                break;
            }
        }
        Ok(false)
    }

    fn take_message(
        &mut self,
        message: &Message,
        gathered: &mut Gathered<'_>,
        tally: &mut Tally,
    ) -> Result<(), Malformed> {
        let body = &message.body;
        match message.field {
            FIELD_FRAME => {
                let frame = payload::decode_frame(body).map_err(|_| Malformed)?;
                self.take_frame(body, 0, &frame, gathered, tally)
            }
            FIELD_BATCH => {
                let mut reader = Reader::new(body);
                while let Some(range) =
                    payload::next_of_batch(&mut reader).map_err(|_| Malformed)?
                {
                    let start = range.start;
                    let frame = payload::decode_frame(&body[range]).map_err(|_| Malformed)?;
                    self.take_frame(body, start, &frame, gathered, tally)?;
                }
                Ok(())
            }
            // The end of the direction, without a payload.
            _ if message.end && body.is_empty() => Ok(()),
            _ => Err(Malformed),
        }
    }

    fn take_frame(
        &mut self,
        body: &Buf,
        start: usize,
        frame: &Frame,
        gathered: &mut Gathered<'_>,
        tally: &mut Tally,
    ) -> Result<(), Malformed> {
        let Frame { header, offset, payload } = frame;
        let payload = start + payload.start..start + payload.end;
        let len = payload.len() as u64;
        if *offset == 0 {
            if self.down.piece_left > 0 {
                return Err(Malformed);
            }
            let left = header.len.checked_sub(len).ok_or(Malformed)?;
            if self.down.closed {
                // Nothing follows a close frame.
                return if left == 0 { Ok(()) } else { Err(Malformed) };
            }
            gathered.put(frame::write(header).as_slice());
            self.down.piece_left = left;
            self.down.piece_fin = header.fin;
            self.frame_came(header, &body[payload.clone()], tally);
        } else {
            if *offset != self.down.piece_offset {
                return Err(Malformed);
            }
            self.down.piece_left = self.down.piece_left.checked_sub(len).ok_or(Malformed)?;
        }
        self.down.piece_offset = offset + len;
        tally.bytes(len);
        gathered.payload(body, payload);
        if self.down.piece_left == 0 && !header.is_control() {
            self.frame_went(tally);
        }
        Ok(())
    }

    fn frame_came(&mut self, header: &frame::Header, payload: &[u8], tally: &mut Tally) {
        if header.is_control() {
            tally.message(header.opcode);
            if header.opcode == opcode::CLOSE {
                self.down.closed = true;
                self.count_close(self.side.other(), Some(close_code(header, payload)));
            }
            return;
        }
        let message = &mut self.down.message;
        if header.opcode != opcode::CONTINUATION {
            *message = Track { opcode: header.opcode, bytes: 0 };
        }
        message.bytes = message.bytes.saturating_add(header.len);
    }

    /// The last byte of a data frame was taken.
    fn frame_went(&mut self, tally: &mut Tally) {
        if !self.down.piece_fin {
            return;
        }
        tally.message(self.down.message.opcode);
        if let Some(open) = &self.open {
            open.route().size(Direction::ToClient, self.down.message.bytes);
        }
    }

    /// Writes once. Returns how much of it the stream took.
    fn poll_write(&mut self, cx: &mut Context<'_>, gathered: &Gathered<'_>) -> io::Result<usize> {
        let stream = Pin::new(&mut self.stream);
        let wrote = if gathered.payloads.is_empty() {
            stream.poll_write(cx, gathered.out)
        } else {
            let mut slices = [IoSlice::new(&[]); 2 * PAYLOADS_MAX + 1];
            let parts = gathered
                .parts()
                .flat_map(|(bytes, payload)| [bytes, payload.map_or(&[][..], |payload| payload)])
                .filter(|part| !part.is_empty());
            let mut count = 0;
            for (slice, part) in slices.iter_mut().zip(parts) {
                *slice = IoSlice::new(part);
                count += 1;
            }
            stream.poll_write_vectored(cx, &slices[..count])
        };
        match wrote {
            Poll::Ready(Ok(0)) => Err(io::ErrorKind::WriteZero.into()),
            Poll::Ready(wrote) => wrote,
            Poll::Pending => Ok(0),
        }
    }

    /// Writes what is left of earlier writes.
    fn poll_unwritten(&mut self, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        while !self.down.unwritten.is_empty() {
            let mut slices = [IoSlice::new(&[]); 16];
            let mut count = 0;
            for (slice, buf) in slices.iter_mut().zip(&self.down.unwritten) {
                *slice = IoSlice::new(buf);
                count += 1;
            }
            let stream = Pin::new(&mut self.stream);
            let mut wrote = ready!(stream.poll_write_vectored(cx, &slices[..count]))?;
            if wrote == 0 {
                return Poll::Ready(Err(io::ErrorKind::WriteZero.into()));
            }
            while let Some(first) = self.down.unwritten.front_mut() {
                if first.len() > wrote {
                    bytes::Buf::advance(first, wrote);
                    break;
                }
                wrote -= first.len();
                self.down.unwritten.pop_front();
            }
        }
        // A connection at rest keeps no room for what once waited.
        self.down.unwritten = VecDeque::new();
        Poll::Ready(Ok(()))
    }

    /// Writes and flushes all that waits.
    pub(super) fn poll_flushed(&mut self, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        if !self.down.unwritten.is_empty() {
            ready!(self.poll_unwritten(cx))?;
            self.down.unflushed = true;
        }
        if self.down.unflushed {
            ready!(Pin::new(&mut self.stream).poll_flush(cx))?;
            self.down.unflushed = false;
        }
        Poll::Ready(Ok(()))
    }

    /// The stream takes no more. What still comes from it is carried before the connection ends.
    fn down_failed(&mut self) -> Poll<Result<(), Ending>> {
        self.down.broken = true;
        self.down.unwritten = VecDeque::new();
        Poll::Ready(Ok(()))
    }
}

/// A message that this plugin does not make.
struct Malformed;

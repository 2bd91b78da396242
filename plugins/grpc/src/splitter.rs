//! Where messages begin and end in a gRPC body (PROTOCOL-HTTP2.md, "Length-Prefixed-Message"): bytes
//! are walked, never gathered and never changed.
//!
//! [`Splitter`] knows the place in a direction's bytes, [`Outgoing`] cuts them into chunks, [`Incoming`]
//! verifies the chunks of the other end. None of them does I/O.

use sidelane_http_born::body::BODY_BYTES_MAX;
use sidelane_plugin::Buf;

/// Bytes before each message: the compressed flag and the length.
pub(crate) const PREFIX_BYTES: usize = 5;

/// What ends a direction that is being split or verified.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum SplitError {
    /// A message is longer than allowed.
    TooLarge,
    /// The direction ends inside a message.
    Truncated,
    /// The chunks are not what their sender may send: out of order, or not at a message's end where
    /// they say so.
    Order,
}

/// The place in one direction's bytes.
#[derive(Clone, Debug)]
pub struct Splitter {
    /// Prefix bytes of the present message that were seen.
    prefix: [u8; PREFIX_BYTES],
    /// How many; 0 between two messages.
    seen: usize,
    /// Once the prefix is whole: bytes of the message to come.
    left: u32,
    /// Longest message allowed, without its prefix.
    message_max: u32,
}

impl Splitter {
    /// Returns one before the first message.
    #[must_use]
    pub const fn new(message_max: u32) -> Self {
        Self { prefix: [0; PREFIX_BYTES], seen: 0, left: 0, message_max }
    }

    /// Whether the next byte begins a message.
    #[must_use]
    pub const fn at_boundary(&self) -> bool {
        self.seen == 0
    }

    /// Counts the whole messages that `bytes`, read at a boundary, begins with, up to `bytes_max` and
    /// `count_max`: their length together, and their number.
    fn whole(
        &self,
        bytes: &[u8],
        bytes_max: usize,
        count_max: u32,
    ) -> Result<(usize, u32), SplitError> {
        let bytes_max = bytes_max.min(bytes.len());
        let (mut at, mut count) = (0, 0);
        while count < count_max {
            let Some(&[_, a, b, c, d]) = bytes.get(at..at + PREFIX_BYTES) else { break };
            let len = u32::from_be_bytes([a, b, c, d]);
            if len > self.message_max {
                return Err(SplitError::TooLarge);
            }
            // Cannot overflow: a length has 32 bits, and what is at hand is far shorter than 2^63.
            let end = at + PREFIX_BYTES + len as usize;
            if end > bytes_max {
                break;
            }
            at = end;
            count += 1;
        }
        Ok((at, count))
    }

    /// Goes through `bytes` to the end of the present message, or of the bytes: how many were taken,
    /// and whether the message ended.
    fn feed(&mut self, bytes: &[u8]) -> Result<(usize, bool), SplitError> {
        let mut taken = 0;
        if self.seen < PREFIX_BYTES {
            taken = (PREFIX_BYTES - self.seen).min(bytes.len());
            self.prefix[self.seen..self.seen + taken].copy_from_slice(&bytes[..taken]);
            self.seen += taken;
            if self.seen < PREFIX_BYTES {
                return Ok((taken, false));
            }
            let [_, a, b, c, d] = self.prefix;
            self.left = u32::from_be_bytes([a, b, c, d]);
            if self.left > self.message_max {
                return Err(SplitError::TooLarge);
            }
        }
        let part = (bytes.len() - taken).min(self.left as usize);
        self.left -= u32::try_from(part).unwrap_or(self.left);
        taken += part;
        let ended = self.left == 0;
        if ended {
            self.seen = 0;
        }
        Ok((taken, ended))
    }
}

/// A chunk that is to be sent.
#[derive(Debug, PartialEq, Eq)]
pub struct Piece {
    /// Its bytes: a message, several, a part of one, or none.
    pub body: Buf,
    /// Of the first message in it.
    pub sequence: u32,
    /// Messages that end in it. More than one: a batch.
    pub messages: u32,
    /// It begins its direction.
    pub first: bool,
    /// It ends its direction; never a batch.
    pub last: bool,
    /// Its message goes on in the next chunk.
    pub partial: bool,
}

/// Cuts one direction's bytes into chunks.
#[derive(Debug)]
pub struct Outgoing {
    splitter: Splitter,
    sequence: u32,
    begun: bool,
    ended: bool,
}

impl Outgoing {
    /// Returns one before the first chunk.
    #[must_use]
    pub const fn new(message_max: u32) -> Self {
        Self { splitter: Splitter::new(message_max), sequence: 0, begun: false, ended: false }
    }

    /// Returns the next chunk of `bytes`; `None`: they have all gone. `ending`: nothing comes behind
    /// them. The first chunk and the last are made even where there are no bytes.
    ///
    /// # Errors
    /// A message is too large, or the end comes inside one.
    pub fn next(&mut self, bytes: &mut Buf, ending: bool) -> Result<Option<Piece>, SplitError> {
        let first = !self.begun;
        if self.ended || (bytes.is_empty() && !first && !ending) {
            return Ok(None);
        }
        let (mut len, mut messages) = (0, 0);
        if self.splitter.at_boundary() {
            // The head goes with one message: a batch has no place for it.
            let count_max = if first { 1 } else { u32::MAX };
            (len, messages) = self.splitter.whole(bytes, BODY_BYTES_MAX, count_max)?;
        }
        if len == 0 && !bytes.is_empty() {
            let at_hand = &bytes[..bytes.len().min(BODY_BYTES_MAX)];
            let (taken, ended) = self.splitter.feed(at_hand)?;
            (len, messages) = (taken, u32::from(ended));
        }
        let body = if len == bytes.len() { std::mem::take(bytes) } else { bytes.split_to(len) };
        let partial = !self.splitter.at_boundary();
        let all = ending && bytes.is_empty();
        if all && partial {
            return Err(SplitError::Truncated);
        }
        let sequence = self.sequence;
        self.sequence = sequence.wrapping_add(messages.max(1));
        self.begun = true;
        self.ended = all && messages <= 1;
        Ok(Some(Piece { body, sequence, messages, first, last: self.ended, partial }))
    }
}

/// Verifies one direction's chunks as they arrive.
#[derive(Debug)]
pub struct Incoming {
    splitter: Splitter,
    sequence: u32,
    begun: bool,
}

impl Incoming {
    /// Returns one before the first chunk.
    #[must_use]
    pub const fn new(message_max: u32) -> Self {
        Self { splitter: Splitter::new(message_max), sequence: 0, begun: false }
    }

    /// Whether what came so far ends with a message's end.
    #[must_use]
    pub const fn at_boundary(&self) -> bool {
        self.splitter.at_boundary()
    }

    /// Takes a chunk: how many messages end in it.
    ///
    /// # Errors
    /// It is not the next one, or not what it says it is.
    pub fn chunk(
        &mut self,
        body: &[u8],
        sequence: u32,
        first: bool,
        last: bool,
        partial: bool,
    ) -> Result<u32, SplitError> {
        if sequence != self.sequence || first == self.begun || (last && partial) {
            return Err(SplitError::Order);
        }
        self.begun = true;
        self.sequence = sequence.wrapping_add(1);
        if body.is_empty() {
            return if partial || !self.splitter.at_boundary() {
                Err(SplitError::Order)
            } else {
                Ok(0)
            };
        }
        let (taken, ended) = self.splitter.feed(body)?;
        if taken < body.len() || ended == partial {
            return Err(SplitError::Order);
        }
        Ok(u32::from(ended))
    }

    /// Takes a batch: how many messages it has.
    ///
    /// # Errors
    /// It is not the next chunk, or does not have as many whole messages as it says.
    pub fn batch(&mut self, body: &[u8], sequence: u32, count: u32) -> Result<u32, SplitError> {
        if sequence != self.sequence || !self.begun || !self.splitter.at_boundary() || count == 0 {
            return Err(SplitError::Order);
        }
        let (len, messages) = self.splitter.whole(body, body.len(), u32::MAX)?;
        if len < body.len() || messages != count {
            return Err(SplitError::Order);
        }
        self.sequence = sequence.wrapping_add(count);
        Ok(count)
    }
}

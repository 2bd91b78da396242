//! The WebSocket payloads of `TunnelMessage` (fields 9 to 12 of `tunnel.proto`), written and read by
//! hand. A property test holds them against prost both ways.

use std::ops::Range;

use sidelane_http_born::wire::{
    Field, FieldsSize, Headers, Reader, WireError, put_bytes, put_header, put_length, put_uint,
};
use sidelane_plugin::{Buf, BufBuilder};

use crate::frame::Header;

/// `TunnelMessage.ws_request`.
pub(crate) const FIELD_REQUEST: u32 = 9;
/// `TunnelMessage.ws_response`.
pub(crate) const FIELD_RESPONSE: u32 = 10;
/// `TunnelMessage.ws_frame`.
pub(crate) const FIELD_FRAME: u32 = 11;
/// `TunnelMessage.ws_batch`.
pub(crate) const FIELD_BATCH: u32 = 12;

/// Most bytes of head that one message may carry: the 64 KiB that the fronts accept, and the framing
/// of 128 fields.
pub(crate) const HEAD_BYTES_MAX: usize = 72 * 1024;

/// Longest payload of a frame that is carried whole; longer ones go in pieces of at most this.
pub(crate) const PIECE_BYTES_MAX: usize = 32 * 1024;

/// Most bytes of a batch. With one piece's frame in it a message stays below 33 KiB.
pub(crate) const BATCH_BYTES_MAX: usize = 32 * 1024;

const HEADERS: u32 = 2;

/// A `WebSocketRequest`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Request<'a> {
    /// Path and query.
    pub(crate) url: &'a [u8],
    /// The effective authority.
    pub(crate) host: &'a [u8],
    pub(crate) headers: Headers<'a>,
    /// Offered, joined by ", ".
    pub(crate) subprotocol: &'a [u8],
    /// 11 or 20.
    pub(crate) version: u32,
}

mod request {
    pub(super) const URL: u32 = 1;
    pub(super) const HOST: u32 = 2;
    pub(super) const HEADERS: u32 = 3;
    pub(super) const SUBPROTOCOL: u32 = 4;
    pub(super) const VERSION: u32 = 5;
}

/// Returns a `WebSocketRequest`.
pub(crate) fn encode_request<'a>(
    url: &[u8],
    host: &[u8],
    fields: impl Iterator<Item = Field<'a>>,
    size: FieldsSize,
    subprotocol: &[u8],
    version: u32,
) -> Buf {
    let strings = url.len() + host.len() + subprotocol.len();
    let mut out = BufBuilder::with_capacity(48 + strings + size.encoded_max());
    put_bytes(&mut out, request::URL, url);
    put_bytes(&mut out, request::HOST, host);
    for (name, value) in fields {
        put_header(&mut out, request::HEADERS, name, value);
    }
    put_bytes(&mut out, request::SUBPROTOCOL, subprotocol);
    if version != 11 {
        put_uint(&mut out, request::VERSION, u64::from(version));
    }
    out.freeze()
}

/// Reads a `WebSocketRequest`.
pub(crate) fn decode_request(payload: &[u8]) -> Result<Request<'_>, WireError> {
    let mut request = Request {
        url: b"/",
        host: &[],
        headers: Headers::new(payload, request::HEADERS),
        subprotocol: &[],
        version: 11,
    };
    let mut reader = Reader::new(payload);
    while let Some((number, value)) = reader.next()? {
        match number {
            request::URL => request.url = value.bytes(number)?,
            request::HOST => request.host = value.bytes(number)?,
            request::HEADERS => request.headers.check(value.bytes(number)?)?,
            request::SUBPROTOCOL => request.subprotocol = value.bytes(number)?,
            request::VERSION => {
                request.version = match value.uint32(number)? {
                    0 => 11,
                    version => version,
                }
            }
            _ => {}
        }
    }
    Ok(request)
}

/// A `WebSocketResponse`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Response<'a> {
    pub(crate) status: u32,
    pub(crate) headers: Headers<'a>,
    /// Chosen; empty: none.
    pub(crate) subprotocol: &'a [u8],
    pub(crate) accepted: bool,
    /// Exact length of a refusal's body, where known.
    pub(crate) content_length: Option<u64>,
    /// Range of the body's first bytes in the payload.
    pub(crate) body: Range<usize>,
}

mod response {
    pub(super) const STATUS: u32 = 1;
    pub(super) const SUBPROTOCOL: u32 = 3;
    pub(super) const ACCEPTED: u32 = 4;
    pub(super) const CONTENT_LENGTH: u32 = 5;
    pub(super) const BODY: u32 = 15;
}

/// Returns a `WebSocketResponse` without a body.
pub(crate) fn encode_response<'a>(
    status: u16,
    fields: impl Iterator<Item = Field<'a>>,
    size: FieldsSize,
    subprotocol: &[u8],
    accepted: bool,
    content_length: Option<u64>,
) -> Buf {
    let mut out = BufBuilder::with_capacity(48 + subprotocol.len() + size.encoded_max());
    put_uint(&mut out, response::STATUS, u64::from(status));
    for (name, value) in fields {
        put_header(&mut out, HEADERS, name, value);
    }
    put_bytes(&mut out, response::SUBPROTOCOL, subprotocol);
    if accepted {
        put_uint(&mut out, response::ACCEPTED, 1);
    }
    put_length(&mut out, response::CONTENT_LENGTH, content_length);
    out.freeze()
}

/// Reads a `WebSocketResponse`.
pub(crate) fn decode_response(payload: &[u8]) -> Result<Response<'_>, WireError> {
    let mut response = Response {
        status: 0,
        headers: Headers::new(payload, HEADERS),
        subprotocol: &[],
        accepted: false,
        content_length: None,
        body: 0..0,
    };
    let mut reader = Reader::new(payload);
    while let Some((number, value)) = reader.next()? {
        match number {
            response::STATUS => response.status = value.uint32(number)?,
            HEADERS => response.headers.check(value.bytes(number)?)?,
            response::SUBPROTOCOL => response.subprotocol = value.bytes(number)?,
            response::ACCEPTED => response.accepted = value.uint(number)? != 0,
            response::CONTENT_LENGTH => {
                response.content_length = value.uint(number)?.checked_sub(1);
            }
            response::BODY => response.body = value.range(number)?,
            _ => {}
        }
    }
    Ok(response)
}

/// Keys of `WebSocketFrame` as they are written: number and wire type.
mod key {
    pub(super) const FIN: u8 = 2 << 3;
    pub(super) const OPCODE: u8 = 3 << 3;
    pub(super) const MASKED: u8 = 4 << 3;
    pub(super) const PAYLOAD: u8 = 5 << 3 | 2;
    pub(super) const DIRECTION: u8 = 6 << 3;
    pub(super) const RESERVED: u8 = 7 << 3;
    pub(super) const MASKING_KEY: u8 = 8 << 3 | 5;
    pub(super) const LENGTH: u8 = 9 << 3;
    pub(super) const OFFSET: u8 = 10 << 3;
    /// `WebSocketBatch.frames`.
    pub(super) const FRAMES: u8 = 1 << 3 | 2;
}

mod number {
    pub(super) const FIN: u32 = 2;
    pub(super) const OPCODE: u32 = 3;
    pub(super) const MASKED: u32 = 4;
    pub(super) const PAYLOAD: u32 = 5;
    pub(super) const RESERVED: u32 = 7;
    pub(super) const MASKING_KEY: u32 = 8;
    pub(super) const LENGTH: u32 = 9;
    pub(super) const OFFSET: u32 = 10;
    pub(super) const FRAMES: u32 = 1;
}

/// `SERVER_TO_CLIENT`; the other one is 0 and not written.
const SERVER_TO_CLIENT: u8 = 1;

/// Longest prefix of a frame: five flags of two bytes, a key of five, length or offset and payload's
/// length of eleven.
const PREFIX_BYTES_MAX: usize = 40;

/// What stands before a frame's payload in its message.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Prefix {
    bytes: [u8; PREFIX_BYTES_MAX],
    len: usize,
}

impl Prefix {
    pub(crate) fn as_slice(&self) -> &[u8] {
        &self.bytes[..self.len]
    }

    const fn new() -> Self {
        Self { bytes: [0; PREFIX_BYTES_MAX], len: 0 }
    }

    fn put(&mut self, bytes: &[u8]) {
        self.bytes[self.len..self.len + bytes.len()].copy_from_slice(bytes);
        self.len += bytes.len();
    }

    #[allow(clippy::cast_possible_truncation, reason = "the low seven bits are meant")]
    fn varint(&mut self, key: u8, mut value: u64) {
        self.put(&[key]);
        while value >= 0x80 {
            self.put(&[value as u8 | 0x80]);
            value >>= 7;
        }
        self.put(&[value as u8]);
    }

    fn payload(&mut self, len: usize) {
        if len > 0 {
            self.varint(key::PAYLOAD, len as u64);
        }
    }
}

/// Returns the prefix of a frame whose payload, or its first piece, has `piece` bytes.
pub(crate) fn frame_prefix(header: &Header, from_client: bool, piece: usize) -> Prefix {
    let mut out = Prefix::new();
    if header.fin {
        out.put(&[key::FIN, 1]);
    }
    if header.opcode != 0 {
        out.put(&[key::OPCODE, header.opcode]);
    }
    if header.key.is_some() {
        out.put(&[key::MASKED, 1]);
    }
    if !from_client {
        out.put(&[key::DIRECTION, SERVER_TO_CLIENT]);
    }
    if header.reserved != 0 {
        out.put(&[key::RESERVED, header.reserved]);
    }
    if let Some(masking_key) = header.key.filter(|key| *key != [0; 4]) {
        out.put(&[key::MASKING_KEY]);
        out.put(&masking_key);
    }
    if header.len > piece as u64 {
        out.varint(key::LENGTH, header.len);
    }
    out.payload(piece);
    out
}

/// Returns the prefix of a later piece of a frame.
pub(crate) fn piece_prefix(offset: u64, from_client: bool, piece: usize) -> Prefix {
    let mut out = Prefix::new();
    if !from_client {
        out.put(&[key::DIRECTION, SERVER_TO_CLIENT]);
    }
    out.varint(key::OFFSET, offset);
    out.payload(piece);
    out
}

/// Returns a message's payload: prefix and what follows it.
pub(crate) fn join(prefix: &Prefix, payload: &[u8]) -> Buf {
    let mut out = BufBuilder::with_capacity(prefix.len + payload.len());
    out.extend_from_slice(prefix.as_slice());
    out.extend_from_slice(payload);
    out.freeze()
}

/// Frames that go together, in a buffer that is used again.
#[derive(Debug)]
pub(crate) struct Batch<'a> {
    out: &'a mut Vec<u8>,
    count: usize,
    /// Where the first frame begins, behind what makes it a batch's.
    first: usize,
}

impl<'a> Batch<'a> {
    pub(crate) fn new(out: &'a mut Vec<u8>) -> Self {
        out.clear();
        Self { out, count: 0, first: 0 }
    }

    pub(crate) const fn is_empty(&self) -> bool {
        self.count == 0
    }

    /// Whether a frame of `len` bytes of payload may be added.
    pub(crate) fn fits(&self, len: usize) -> bool {
        self.out.len() + PREFIX_BYTES_MAX + len <= BATCH_BYTES_MAX
    }

    pub(crate) fn push(&mut self, prefix: &Prefix, payload: &[u8]) {
        let mut frames = Prefix::new();
        frames.varint(key::FRAMES, (prefix.len + payload.len()) as u64);
        if self.count == 0 {
            self.first = frames.len;
        }
        self.out.extend_from_slice(frames.as_slice());
        self.out.extend_from_slice(prefix.as_slice());
        self.out.extend_from_slice(payload);
        self.count += 1;
    }

    /// Empties it: the field and the payload of its message. A single frame goes by itself.
    pub(crate) fn take(&mut self) -> (u32, Buf) {
        let message = match self.count {
            1 => (FIELD_FRAME, Buf::copy_from_slice(&self.out[self.first..])),
            _ => (FIELD_BATCH, Buf::copy_from_slice(self.out)),
        };
        self.out.clear();
        self.count = 0;
        message
    }
}

/// A `WebSocketFrame` that was read.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Frame {
    /// Its `len` is of the whole frame. Of a later piece nothing in it is meant.
    pub(crate) header: Header,
    /// Where this piece begins; 0: the frame does.
    pub(crate) offset: u64,
    /// Range of the payload, relative to the bytes that were read.
    pub(crate) payload: Range<usize>,
}

/// Reads a `WebSocketFrame`.
pub(crate) fn decode_frame(bytes: &[u8]) -> Result<Frame, WireError> {
    let (mut fin, mut opcode, mut masked, mut reserved, mut key) = (false, 0, false, 0, 0u32);
    let (mut length, mut offset, mut payload) = (0, 0, 0..0);
    let mut reader = Reader::new(bytes);
    while let Some((number, value)) = reader.next()? {
        match number {
            number::FIN => fin = value.uint(number)? != 0,
            number::OPCODE => opcode = value.uint32(number)?,
            number::MASKED => masked = value.uint(number)? != 0,
            number::PAYLOAD => payload = value.range(number)?,
            number::RESERVED => reserved = value.uint32(number)?,
            number::MASKING_KEY => key = value.fixed32(number)?,
            number::LENGTH => length = value.uint(number)?,
            number::OFFSET => offset = value.uint(number)?,
            _ => {}
        }
    }
    let small = |value: u32, max: u8, number| {
        u8::try_from(value).ok().filter(|value| *value <= max).ok_or(WireError::WireType(number))
    };
    let header = Header {
        fin,
        reserved: small(reserved, 7, number::RESERVED)?,
        opcode: small(opcode, 15, number::OPCODE)?,
        key: masked.then(|| key.to_le_bytes()),
        len: if length == 0 { payload.len() as u64 } else { length },
    };
    Ok(Frame { header, offset, payload })
}

/// Returns the next frame of a `WebSocketBatch`: its range; `None`: there is none.
pub(crate) fn next_of_batch(reader: &mut Reader<'_>) -> Result<Option<Range<usize>>, WireError> {
    while let Some((number, value)) = reader.next()? {
        if number == number::FRAMES {
            return Ok(Some(value.range(number)?));
        }
    }
    Ok(None)
}

#[cfg(test)]
mod tests;

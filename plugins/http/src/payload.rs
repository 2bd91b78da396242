//! The HTTP payloads of `TunnelMessage` (fields 17 to 20 of `tunnel.proto`), written and read by
//! hand: fields go from borrowed slices straight into one buffer, a body stays a buffer of its own,
//! and reading yields slices of what arrived.
//!
//! Knows protobuf's wire format and the four messages; what the fields mean is for `accept` and
//! `deliver`. A property test holds it against prost both ways.

use std::ops::Range;

use sidelane_plugin::{Buf, BufBuilder};

/// `TunnelMessage.http_request`.
pub(crate) const FIELD_REQUEST: u32 = 17;
/// `TunnelMessage.http_response`.
pub(crate) const FIELD_RESPONSE: u32 = 18;
/// `TunnelMessage.http_body`.
pub(crate) const FIELD_BODY: u32 = 19;
/// `TunnelMessage.http_trailers`.
pub(crate) const FIELD_TRAILERS: u32 = 20;

/// Most body bytes in one message: a data message may have 33 KiB with what frames it, and peers
/// that share a lane wait for at most this much.
pub(crate) const BODY_BYTES_MAX: usize = 32 * 1024;

/// Most bytes of head (method, target, authority, fields) that one message may carry: the 64 KiB
/// that the fronts accept, and the framing of 128 fields.
pub(crate) const HEAD_BYTES_MAX: usize = 72 * 1024;

/// Most fields that a payload may have: twice what the fronts accept, so that nothing legitimate meets
/// it, and far below where a `HeaderMap` panics.
const FIELDS_MAX: usize = 256;

const WIRE_VARINT: u32 = 0;
const WIRE_FIXED64: u32 = 1;
const WIRE_BYTES: u32 = 2;
const WIRE_FIXED32: u32 = 5;

const REQUEST_METHOD: u32 = 1;
const REQUEST_TARGET: u32 = 2;
const REQUEST_AUTHORITY: u32 = 3;
const REQUEST_VERSION: u32 = 4;
const REQUEST_EXPECT_CONTINUE: u32 = 7;
const RESPONSE_STATUS: u32 = 1;
const HEADERS: u32 = 5;
const CONTENT_LENGTH: u32 = 6;
const BODY: u32 = 15;
const BODY_DATA: u32 = 1;
const HEADER_NAME: u32 = 1;
const HEADER_VALUE: u32 = 2;

const SHORT_HEADERS: u8 = tag(HEADERS);
const SHORT_HEADER_NAME: u8 = tag(HEADER_NAME);
const SHORT_HEADER_VALUE: u8 = tag(HEADER_VALUE);

/// Returns the tag of a byte string as it is written: one byte, since the number is below 16.
#[allow(clippy::cast_possible_truncation, reason = "checked")]
const fn tag(number: u32) -> u8 {
    assert!(number < 16, "longer tags have more bytes");
    (number << 3 | WIRE_BYTES) as u8
}

/// Bytes that frame one field besides its name and value: three tags and three lengths of at most
/// three bytes, since no field is longer than a message.
const HEADER_FRAMING_MAX: usize = 3 + 3 * 3;

/// Bytes of the scalar fields of a request or response, tags included: three varints of at most ten
/// bytes, a flag, and tags and lengths of four byte strings.
const SCALARS_MAX: usize = 96;

/// A payload that is not what its field number says.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub(crate) enum PayloadError {
    /// The bytes end inside a field.
    #[error("payload ends inside a field")]
    Truncated,
    /// A varint has more than ten bytes.
    #[error("payload holds a varint of more than ten bytes")]
    Varint,
    /// A field has a wire type that its number or protobuf does not allow.
    #[error("payload field {0} has an unexpected wire type")]
    WireType(u32),
    /// More than [`FIELDS_MAX`] fields.
    #[error("payload has more than {FIELDS_MAX} fields")]
    Fields,
    /// Text that is not UTF-8.
    #[error("payload field {0} is not UTF-8")]
    Utf8(u32),
}

/// A name and a value, as bytes.
pub(crate) type Field<'a> = (&'a [u8], &'a [u8]);

/// A request's head as it is written.
#[derive(Clone, Copy, Debug)]
pub(crate) struct RequestHead<'a> {
    /// Method.
    pub(crate) method: &'a str,
    /// Path and query, or `*`.
    pub(crate) target: &'a [u8],
    /// The effective authority.
    pub(crate) authority: &'a [u8],
    /// 10, 11 or 20.
    pub(crate) version: u32,
    /// Exact length of the body, where known; 0: no body.
    pub(crate) content_length: Option<u64>,
    /// The client waits for `100 Continue`.
    pub(crate) expect_continue: bool,
}

/// Returns the first part of an `HttpRequest`; `body_len` bytes of body are the second.
pub(crate) fn encode_request<'a>(
    head: RequestHead<'_>,
    fields: impl Iterator<Item = Field<'a>>,
    fields_bytes: FieldsSize,
    body_len: usize,
) -> Buf {
    let strings = head.method.len() + head.target.len() + head.authority.len();
    let mut out = BufBuilder::with_capacity(SCALARS_MAX + strings + fields_bytes.encoded_max());
    if head.method != "GET" {
        put_bytes(&mut out, REQUEST_METHOD, head.method.as_bytes());
    }
    if head.target != b"/" {
        put_bytes(&mut out, REQUEST_TARGET, head.target);
    }
    put_bytes(&mut out, REQUEST_AUTHORITY, head.authority);
    if head.version != 11 {
        put_uint(&mut out, REQUEST_VERSION, u64::from(head.version));
    }
    for (name, value) in fields {
        put_header(&mut out, name, value);
    }
    put_length(&mut out, head.content_length);
    if head.expect_continue {
        put_uint(&mut out, REQUEST_EXPECT_CONTINUE, 1);
    }
    put_body_prefix(&mut out, BODY, body_len);
    out.freeze()
}

/// Returns the first part of an `HttpResponse`; `body_len` bytes of body are the second.
pub(crate) fn encode_response<'a>(
    status: u16,
    fields: impl Iterator<Item = Field<'a>>,
    fields_bytes: FieldsSize,
    content_length: Option<u64>,
    body_len: usize,
) -> Buf {
    let mut out = BufBuilder::with_capacity(SCALARS_MAX + fields_bytes.encoded_max());
    if status != 200 {
        put_uint(&mut out, RESPONSE_STATUS, u64::from(status));
    }
    for (name, value) in fields {
        put_header(&mut out, name, value);
    }
    put_length(&mut out, content_length);
    put_body_prefix(&mut out, BODY, body_len);
    out.freeze()
}

/// Returns the first part of an `HttpBody`; `body_len` bytes of data are the second.
pub(crate) fn encode_body(body_len: usize) -> Buf {
    let mut out = BufBuilder::with_capacity(8);
    put_body_prefix(&mut out, BODY_DATA, body_len);
    out.freeze()
}

/// Returns an `HttpTrailers`.
pub(crate) fn encode_trailers<'a>(fields: impl Iterator<Item = Field<'a>>) -> Buf {
    let mut out = BufBuilder::with_capacity(128);
    for (name, value) in fields {
        put_header(&mut out, name, value);
    }
    out.freeze()
}

/// Counts fields and their bytes, so that a head is written into a buffer that never grows.
#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct FieldsSize {
    /// Number of fields.
    pub(crate) count: usize,
    /// Bytes of all names and values.
    pub(crate) bytes: usize,
}

impl FieldsSize {
    /// Adds one field.
    pub(crate) fn add(&mut self, name_len: usize, value_len: usize) {
        self.count += 1;
        self.bytes += name_len + value_len;
    }

    const fn encoded_max(self) -> usize {
        self.bytes + self.count * HEADER_FRAMING_MAX
    }
}

/// An `HttpRequest` that was read: slices of the payload.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct RequestPayload<'a> {
    /// Method; `GET` where the payload has none.
    pub(crate) method: &'a str,
    /// Range of the target in the payload; empty: `/`.
    pub(crate) target: Range<usize>,
    /// The effective authority.
    pub(crate) authority: &'a [u8],
    /// 10, 11 or 20.
    pub(crate) version: u32,
    /// The end-to-end fields.
    pub(crate) headers: Headers<'a>,
    /// Exact length of the body, where known.
    pub(crate) content_length: Option<u64>,
    /// The client waits for `100 Continue`.
    pub(crate) expect_continue: bool,
    /// Range of the body's bytes in the payload.
    pub(crate) body: Range<usize>,
}

/// An `HttpResponse` that was read: slices of the payload.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct ResponsePayload<'a> {
    /// Status; 200 where the payload has none.
    pub(crate) status: u32,
    /// The end-to-end fields.
    pub(crate) headers: Headers<'a>,
    /// Exact length of the body, where known.
    pub(crate) content_length: Option<u64>,
    /// Range of the body's bytes in the payload.
    pub(crate) body: Range<usize>,
}

/// The fields of a payload: checked when the payload was read, sliced again as they are asked for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Headers<'a> {
    payload: &'a [u8],
    /// Number of fields.
    pub(crate) count: usize,
}

impl<'a> Headers<'a> {
    /// Counts a field that can be read.
    fn check(&mut self, bytes: &[u8]) -> Result<(), PayloadError> {
        read_header(bytes)?;
        self.count += 1;
        if self.count > FIELDS_MAX { Err(PayloadError::Fields) } else { Ok(()) }
    }

    /// Returns the fields in order.
    pub(crate) fn iter(self) -> HeadersIter<'a> {
        HeadersIter { reader: Reader::new(self.payload), left: self.count }
    }
}

/// Iterator over [`Headers`].
#[derive(Clone, Debug)]
pub(crate) struct HeadersIter<'a> {
    reader: Reader<'a>,
    left: usize,
}

impl<'a> Iterator for HeadersIter<'a> {
    type Item = Field<'a>;

    fn next(&mut self) -> Option<Self::Item> {
        while self.left > 0 {
            let (number, value) = self.reader.next().ok()??;
            if number == HEADERS {
                self.left -= 1;
                return read_header(value.bytes(HEADERS).ok()?).ok();
            }
        }
        None
    }

    fn size_hint(&self) -> (usize, Option<usize>) {
        (self.left, Some(self.left))
    }
}

/// Reads an `HttpRequest`.
pub(crate) fn decode_request(payload: &[u8]) -> Result<RequestPayload<'_>, PayloadError> {
    let mut request = RequestPayload {
        method: "GET",
        target: 0..0,
        authority: &[],
        version: 11,
        headers: Headers { payload, count: 0 },
        content_length: None,
        expect_continue: false,
        body: 0..0,
    };
    let mut reader = Reader::new(payload);
    while let Some((number, value)) = reader.next()? {
        match number {
            REQUEST_METHOD => {
                let text =
                    str::from_utf8(value.bytes(number)?).map_err(|_| PayloadError::Utf8(number))?;
                request.method = if text.is_empty() { "GET" } else { text };
            }
            REQUEST_TARGET => request.target = value.range(number)?,
            REQUEST_AUTHORITY => request.authority = value.bytes(number)?,
            REQUEST_VERSION => request.version = non_zero(value.uint32(number)?, 11),
            HEADERS => {
                request.headers.check(value.bytes(number)?)?;
            }
            CONTENT_LENGTH => request.content_length = value.uint(number)?.checked_sub(1),
            REQUEST_EXPECT_CONTINUE => request.expect_continue = value.uint(number)? != 0,
            BODY => request.body = value.range(number)?,
            _ => {}
        }
    }
    Ok(request)
}

/// Reads an `HttpResponse`.
pub(crate) fn decode_response(payload: &[u8]) -> Result<ResponsePayload<'_>, PayloadError> {
    let mut response = ResponsePayload {
        status: 200,
        headers: Headers { payload, count: 0 },
        content_length: None,
        body: 0..0,
    };
    let mut reader = Reader::new(payload);
    while let Some((number, value)) = reader.next()? {
        match number {
            RESPONSE_STATUS => response.status = non_zero(value.uint32(number)?, 200),
            HEADERS => {
                response.headers.check(value.bytes(number)?)?;
            }
            CONTENT_LENGTH => response.content_length = value.uint(number)?.checked_sub(1),
            BODY => response.body = value.range(number)?,
            _ => {}
        }
    }
    Ok(response)
}

/// Reads an `HttpBody`: the range of its data in the payload.
pub(crate) fn decode_body(payload: &[u8]) -> Result<Range<usize>, PayloadError> {
    let mut data = 0..0;
    let mut reader = Reader::new(payload);
    while let Some((number, value)) = reader.next()? {
        if number == BODY_DATA {
            data = value.range(number)?;
        }
    }
    Ok(data)
}

/// Reads an `HttpTrailers`.
pub(crate) fn decode_trailers(payload: &[u8]) -> Result<Headers<'_>, PayloadError> {
    let mut headers = Headers { payload, count: 0 };
    let mut reader = Reader::new(payload);
    while let Some((number, value)) = reader.next()? {
        if number == HEADERS {
            headers.check(value.bytes(number)?)?;
        }
    }
    Ok(headers)
}

const fn non_zero(value: u32, default: u32) -> u32 {
    if value == 0 { default } else { value }
}

fn read_header(bytes: &[u8]) -> Result<Field<'_>, PayloadError> {
    match read_short_header(bytes) {
        Some(field) => Ok(field),
        None => read_any_header(bytes),
    }
}

/// Reads a field in the form that [`put_header`] gives short ones, which nearly all are.
fn read_short_header(bytes: &[u8]) -> Option<Field<'_>> {
    let [SHORT_HEADER_NAME, name_len @ ..=0x7f, rest @ ..] = bytes else { return None };
    let (name, rest) = rest.split_at_checked(usize::from(*name_len))?;
    let [SHORT_HEADER_VALUE, value_len @ ..=0x7f, value @ ..] = rest else { return None };
    (value.len() == usize::from(*value_len)).then_some((name, value))
}

fn read_any_header(bytes: &[u8]) -> Result<Field<'_>, PayloadError> {
    let mut field: Field<'_> = (&[], &[]);
    let mut reader = Reader::new(bytes);
    while let Some((number, value)) = reader.next()? {
        match number {
            HEADER_NAME => field.0 = value.bytes(number)?,
            HEADER_VALUE => field.1 = value.bytes(number)?,
            _ => {}
        }
    }
    Ok(field)
}

/// Reads field after field.
#[derive(Clone, Debug)]
struct Reader<'a> {
    bytes: &'a [u8],
    at: usize,
}

/// A field's value as its wire type gives it.
#[derive(Clone, Copy, Debug)]
enum Value<'a> {
    Uint(u64),
    Bytes { bytes: &'a [u8], start: usize },
    Fixed,
}

impl<'a> Value<'a> {
    const fn uint(self, number: u32) -> Result<u64, PayloadError> {
        match self {
            Self::Uint(value) => Ok(value),
            _ => Err(PayloadError::WireType(number)),
        }
    }

    #[allow(clippy::cast_possible_truncation, reason = "protobuf keeps the low 32 bits")]
    const fn uint32(self, number: u32) -> Result<u32, PayloadError> {
        match self.uint(number) {
            Ok(value) => Ok(value as u32),
            Err(error) => Err(error),
        }
    }

    const fn bytes(self, number: u32) -> Result<&'a [u8], PayloadError> {
        match self {
            Self::Bytes { bytes, .. } => Ok(bytes),
            _ => Err(PayloadError::WireType(number)),
        }
    }

    const fn range(self, number: u32) -> Result<Range<usize>, PayloadError> {
        match self {
            Self::Bytes { bytes, start } => Ok(start..start + bytes.len()),
            _ => Err(PayloadError::WireType(number)),
        }
    }
}

impl<'a> Reader<'a> {
    const fn new(bytes: &'a [u8]) -> Self {
        Self { bytes, at: 0 }
    }

    #[inline]
    fn next(&mut self) -> Result<Option<(u32, Value<'a>)>, PayloadError> {
        if self.at == self.bytes.len() {
            return Ok(None);
        }
        let key = self.varint()?;
        let number = u32::try_from(key >> 3).map_err(|_| PayloadError::Varint)?;
        #[allow(clippy::cast_possible_truncation, reason = "three bits")]
        let value = match (key & 7) as u32 {
            WIRE_VARINT => Value::Uint(self.varint()?),
            WIRE_BYTES => {
                let len = usize::try_from(self.varint()?).map_err(|_| PayloadError::Truncated)?;
                let start = self.at;
                Value::Bytes { bytes: self.take(len)?, start }
            }
            WIRE_FIXED64 => {
                self.take(8)?;
                Value::Fixed
            }
            WIRE_FIXED32 => {
                self.take(4)?;
                Value::Fixed
            }
            _ => return Err(PayloadError::WireType(number)),
        };
        Ok(Some((number, value)))
    }

    fn take(&mut self, len: usize) -> Result<&'a [u8], PayloadError> {
        let end = self.at.checked_add(len).ok_or(PayloadError::Truncated)?;
        let bytes = self.bytes.get(self.at..end).ok_or(PayloadError::Truncated)?;
        self.at = end;
        Ok(bytes)
    }

    #[inline]
    fn varint(&mut self) -> Result<u64, PayloadError> {
        // Tags, and nearly all lengths, are of one byte.
        match self.bytes.get(self.at) {
            Some(byte @ ..=0x7f) => {
                self.at += 1;
                Ok(u64::from(*byte))
            }
            _ => self.long_varint(),
        }
    }

    fn long_varint(&mut self) -> Result<u64, PayloadError> {
        let mut value = 0u64;
        for shift in (0..70).step_by(7) {
            let byte = *self.bytes.get(self.at).ok_or(PayloadError::Truncated)?;
            self.at += 1;
            value |= u64::from(byte & 0x7f) << shift;
            if byte < 0x80 {
                return Ok(value);
            }
        }
        Err(PayloadError::Varint)
    }
}

/// Tags and lengths that stand together, gathered so that they are appended at once.
struct Prefix {
    bytes: [u8; 32],
    len: usize,
}

impl Prefix {
    const fn new() -> Self {
        Self { bytes: [0; 32], len: 0 }
    }

    /// Appends a varint; at most three fit, of ten bytes each.
    #[allow(clippy::cast_possible_truncation, reason = "the low seven bits are meant")]
    fn varint(mut self, mut value: u64) -> Self {
        while value >= 0x80 {
            self.bytes[self.len] = value as u8 | 0x80;
            self.len += 1;
            value >>= 7;
        }
        self.bytes[self.len] = value as u8;
        self.len += 1;
        self
    }

    fn key(self, number: u32, wire: u32) -> Self {
        self.varint(u64::from(number << 3 | wire))
    }

    fn as_slice(&self) -> &[u8] {
        &self.bytes[..self.len]
    }
}

fn put_uint(out: &mut BufBuilder, number: u32, value: u64) {
    out.extend_from_slice(Prefix::new().key(number, WIRE_VARINT).varint(value).as_slice());
}

fn put_bytes(out: &mut BufBuilder, number: u32, bytes: &[u8]) {
    put_body_prefix(out, number, bytes.len());
    out.extend_from_slice(bytes);
}

/// Lengths go as themselves plus one, so that 0 can say "not known".
fn put_length(out: &mut BufBuilder, length: Option<u64>) {
    if let Some(plus_one) = length.and_then(|length| length.checked_add(1)) {
        put_uint(out, CONTENT_LENGTH, plus_one);
    }
}

/// Writes what stands before `len` bytes; nothing where there are none, as proto3 has it.
fn put_body_prefix(out: &mut BufBuilder, number: u32, len: usize) {
    if len > 0 {
        out.extend_from_slice(Prefix::new().key(number, WIRE_BYTES).varint(len as u64).as_slice());
    }
}

#[allow(clippy::cast_possible_truncation, reason = "lengths below 128")]
fn put_header(out: &mut BufBuilder, name: &[u8], value: &[u8]) {
    let (name_len, value_len) = (name.len() as u64, value.len() as u64);
    let inner = 2 + varint_len(name_len) + name_len + varint_len(value_len) + value_len;
    if let Ok(short @ ..=0x7f) = u8::try_from(inner) {
        // Shorter than `inner`, so of one byte too.
        let [name_len, value_len] = [name.len() as u8, value.len() as u8];
        out.extend_from_slice(&[SHORT_HEADERS, short, SHORT_HEADER_NAME, name_len]);
        out.extend_from_slice(name);
        out.extend_from_slice(&[SHORT_HEADER_VALUE, value_len]);
        out.extend_from_slice(value);
        return;
    }
    out.extend_from_slice(Prefix::new().key(HEADERS, WIRE_BYTES).varint(inner).as_slice());
    out.extend_from_slice(Prefix::new().key(HEADER_NAME, WIRE_BYTES).varint(name_len).as_slice());
    out.extend_from_slice(name);
    out.extend_from_slice(Prefix::new().key(HEADER_VALUE, WIRE_BYTES).varint(value_len).as_slice());
    out.extend_from_slice(value);
}

/// Returns how many bytes `value` takes as a varint.
const fn varint_len(value: u64) -> u64 {
    // Seven bits a byte; zero takes one.
    (63 - (value | 1).leading_zeros() as u64) / 7 + 1
}

#[cfg(test)]
mod tests;

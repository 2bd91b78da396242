//! The gRPC payloads of `TunnelMessage` (fields 13 to 16 of `tunnel.proto`), written and read by hand:
//! metadata goes from borrowed slices straight into one buffer, a large body stays a buffer of its
//! own, and reading yields slices of what arrived.
//!
//! Knows protobuf's wire format and the four messages; what the fields mean is for `accept` and
//! `deliver`. A property test holds it against prost both ways.

use std::ops::Range;

use sidelane_http_born::wire::{
    Field, FieldsSize, Headers, Reader, WireError, put_bytes, put_header, put_prefix, put_uint,
};
use sidelane_plugin::{Buf, BufBuilder, Message};

use crate::splitter::Piece;

/// `TunnelMessage.grpc_request`.
pub(crate) const FIELD_REQUEST: u32 = 13;
/// `TunnelMessage.grpc_response`.
pub(crate) const FIELD_RESPONSE: u32 = 14;
/// `TunnelMessage.grpc_request_batch`.
pub(crate) const FIELD_REQUEST_BATCH: u32 = 15;
/// `TunnelMessage.grpc_response_batch`.
pub(crate) const FIELD_RESPONSE_BATCH: u32 = 16;

/// Most bytes of head (path, authority, metadata) that one message may carry: the 64 KiB that the
/// fronts accept, and the framing of 128 fields.
pub(crate) const HEAD_BYTES_MAX: usize = 72 * 1024;

/// Up to this many bytes a body is copied behind its head: one buffer costs less than two that cross
/// into the host.
const INLINE_BYTES_MAX: usize = 1024;

/// Bytes of scalars, and of keys and lengths of strings, tags included.
const SCALARS_MAX: usize = 64;

const REQUEST_SERVICE: u32 = 1;
const REQUEST_METHOD: u32 = 2;
const REQUEST_BODY: u32 = 4;
const REQUEST_FIRST: u32 = 5;
const REQUEST_LAST: u32 = 6;
const REQUEST_SEQUENCE: u32 = 7;
const REQUEST_AUTHORITY: u32 = 9;
const REQUEST_PATH: u32 = 10;
const RESPONSE_STATUS_CODE: u32 = 2;
const RESPONSE_BODY: u32 = 3;
const RESPONSE_FIRST: u32 = 4;
const RESPONSE_LAST: u32 = 5;
const RESPONSE_SEQUENCE: u32 = 6;
const RESPONSE_TRAILERS: u32 = 12;
const RESPONSE_HTTP_STATUS: u32 = 13;
const PARTIAL: u32 = 8;
const METADATA: u32 = 11;
const BATCH_SEQUENCE: u32 = 1;
const BATCH_COUNT: u32 = 2;
const BATCH_MESSAGES: u32 = 15;

/// What an RPC's first request chunk says beside its message.
#[derive(Clone, Copy, Debug)]
pub(crate) struct RequestHead<'a> {
    /// With `method` what the path says.
    pub(crate) service: &'a str,
    pub(crate) method: &'a str,
    /// Path and query, where they say something else; else empty.
    pub(crate) path: &'a str,
    pub(crate) authority: &'a str,
}

fn builder(fields: FieldsSize, more: usize, body: &Buf) -> BufBuilder {
    let inline = if body.len() <= INLINE_BYTES_MAX { body.len() } else { 0 };
    BufBuilder::with_capacity(SCALARS_MAX + fields.encoded_max() + more + inline)
}

/// Makes the message, its body in one buffer with `out` or by itself.
fn finish(mut out: BufBuilder, field: u32, end: bool, number: u32, body: Buf) -> Message {
    if body.len() <= INLINE_BYTES_MAX {
        put_bytes(&mut out, number, &body);
        return Message { field, end, head: out.freeze(), body: Buf::new() };
    }
    put_prefix(&mut out, number, body.len());
    Message { field, end, head: out.freeze(), body }
}

fn put_flag(out: &mut BufBuilder, number: u32, flag: bool) {
    if flag {
        put_uint(out, number, 1);
    }
}

fn put_non_zero(out: &mut BufBuilder, number: u32, value: u32) {
    if value != 0 {
        put_uint(out, number, u64::from(value));
    }
}

/// Returns an RPC's first request message.
pub(crate) fn first_request<'a>(
    head: RequestHead<'_>,
    metadata: impl Iterator<Item = Field<'a>>,
    size: FieldsSize,
    piece: Piece,
) -> Message {
    let strings = head.service.len() + head.method.len() + head.path.len() + head.authority.len();
    let mut out = builder(size, strings, &piece.body);
    put_bytes(&mut out, REQUEST_SERVICE, head.service.as_bytes());
    put_bytes(&mut out, REQUEST_METHOD, head.method.as_bytes());
    put_bytes(&mut out, REQUEST_AUTHORITY, head.authority.as_bytes());
    put_bytes(&mut out, REQUEST_PATH, head.path.as_bytes());
    for (name, value) in metadata {
        put_header(&mut out, METADATA, name, value);
    }
    request_chunk(out, piece)
}

/// Returns a later request message.
pub(crate) fn request(piece: Piece) -> Message {
    if piece.messages > 1 {
        return batch(FIELD_REQUEST_BATCH, piece);
    }
    let out = builder(FieldsSize::default(), 0, &piece.body);
    request_chunk(out, piece)
}

fn request_chunk(mut out: BufBuilder, piece: Piece) -> Message {
    put_flag(&mut out, REQUEST_FIRST, piece.first);
    put_flag(&mut out, REQUEST_LAST, piece.last);
    put_non_zero(&mut out, REQUEST_SEQUENCE, piece.sequence);
    put_flag(&mut out, PARTIAL, piece.partial);
    finish(out, FIELD_REQUEST, piece.last, REQUEST_BODY, piece.body)
}

/// Trailers to be sent.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Trailers<I> {
    pub(crate) fields: I,
    pub(crate) size: FieldsSize,
    /// `grpc-status` as a number; 0 where there is none.
    pub(crate) status: u32,
}

/// Returns an RPC's first response message. `trailers` go with the last chunk.
pub(crate) fn first_response<'a>(
    http_status: u16,
    metadata: impl Iterator<Item = Field<'a>>,
    size: FieldsSize,
    trailers: Option<Trailers<impl Iterator<Item = Field<'a>>>>,
    piece: Piece,
) -> Message {
    let more = trailers.as_ref().map_or(0, |trailers| trailers.size.encoded_max());
    let mut out = builder(size, more, &piece.body);
    if http_status != 200 {
        put_uint(&mut out, RESPONSE_HTTP_STATUS, u64::from(http_status));
    }
    for (name, value) in metadata {
        put_header(&mut out, METADATA, name, value);
    }
    response_chunk(out, trailers, piece)
}

/// Returns a later response message. `trailers` go with the last chunk.
pub(crate) fn response<'a>(
    trailers: Option<Trailers<impl Iterator<Item = Field<'a>>>>,
    piece: Piece,
) -> Message {
    if piece.messages > 1 {
        return batch(FIELD_RESPONSE_BATCH, piece);
    }
    let size = trailers.as_ref().map_or_else(FieldsSize::default, |trailers| trailers.size);
    let out = builder(size, 0, &piece.body);
    response_chunk(out, trailers, piece)
}

fn response_chunk<'a>(
    mut out: BufBuilder,
    trailers: Option<Trailers<impl Iterator<Item = Field<'a>>>>,
    piece: Piece,
) -> Message {
    if let Some(trailers) = trailers {
        put_non_zero(&mut out, RESPONSE_STATUS_CODE, trailers.status);
        for (name, value) in trailers.fields {
            put_header(&mut out, RESPONSE_TRAILERS, name, value);
        }
    }
    put_flag(&mut out, RESPONSE_FIRST, piece.first);
    put_flag(&mut out, RESPONSE_LAST, piece.last);
    put_non_zero(&mut out, RESPONSE_SEQUENCE, piece.sequence);
    put_flag(&mut out, PARTIAL, piece.partial);
    finish(out, FIELD_RESPONSE, piece.last, RESPONSE_BODY, piece.body)
}

fn batch(field: u32, piece: Piece) -> Message {
    let mut out = builder(FieldsSize::default(), 0, &piece.body);
    put_non_zero(&mut out, BATCH_SEQUENCE, piece.sequence);
    put_uint(&mut out, BATCH_COUNT, u64::from(piece.messages));
    finish(out, field, false, BATCH_MESSAGES, piece.body)
}

/// A `GrpcRequest` that was read: slices of the payload.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct RequestChunk<'a> {
    pub(crate) service: &'a str,
    pub(crate) method: &'a str,
    pub(crate) path: &'a str,
    pub(crate) authority: &'a str,
    pub(crate) metadata: Headers<'a>,
    /// Range of the body in the payload.
    pub(crate) body: Range<usize>,
    pub(crate) first: bool,
    pub(crate) last: bool,
    pub(crate) partial: bool,
    pub(crate) sequence: u32,
}

/// A `GrpcResponse` that was read: slices of the payload.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct ResponseChunk<'a> {
    pub(crate) http_status: u32,
    pub(crate) metadata: Headers<'a>,
    pub(crate) trailers: Headers<'a>,
    /// Range of the body in the payload.
    pub(crate) body: Range<usize>,
    pub(crate) first: bool,
    pub(crate) last: bool,
    pub(crate) partial: bool,
    pub(crate) sequence: u32,
}

/// A batch that was read.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Batch {
    pub(crate) sequence: u32,
    pub(crate) count: u32,
    /// Range of the messages in the payload.
    pub(crate) messages: Range<usize>,
}

fn text(bytes: &[u8], number: u32) -> Result<&str, WireError> {
    str::from_utf8(bytes).map_err(|_| WireError::Utf8(number))
}

/// Reads a `GrpcRequest`.
pub(crate) fn decode_request(payload: &[u8]) -> Result<RequestChunk<'_>, WireError> {
    let mut chunk = RequestChunk {
        service: "",
        method: "",
        path: "",
        authority: "",
        metadata: Headers::new(payload, METADATA),
        body: 0..0,
        first: false,
        last: false,
        partial: false,
        sequence: 0,
    };
    let mut reader = Reader::new(payload);
    while let Some((number, value)) = reader.next()? {
        match number {
            REQUEST_SERVICE => chunk.service = text(value.bytes(number)?, number)?,
            REQUEST_METHOD => chunk.method = text(value.bytes(number)?, number)?,
            REQUEST_BODY => chunk.body = value.range(number)?,
            REQUEST_FIRST => chunk.first = value.uint(number)? != 0,
            REQUEST_LAST => chunk.last = value.uint(number)? != 0,
            REQUEST_SEQUENCE => chunk.sequence = value.uint32(number)?,
            PARTIAL => chunk.partial = value.uint(number)? != 0,
            REQUEST_AUTHORITY => chunk.authority = text(value.bytes(number)?, number)?,
            REQUEST_PATH => chunk.path = text(value.bytes(number)?, number)?,
            METADATA => chunk.metadata.check(value.bytes(number)?)?,
            _ => {}
        }
    }
    Ok(chunk)
}

/// Reads a `GrpcResponse`.
pub(crate) fn decode_response(payload: &[u8]) -> Result<ResponseChunk<'_>, WireError> {
    let mut chunk = ResponseChunk {
        http_status: 200,
        metadata: Headers::new(payload, METADATA),
        trailers: Headers::new(payload, RESPONSE_TRAILERS),
        body: 0..0,
        first: false,
        last: false,
        partial: false,
        sequence: 0,
    };
    let mut reader = Reader::new(payload);
    while let Some((number, value)) = reader.next()? {
        match number {
            RESPONSE_BODY => chunk.body = value.range(number)?,
            RESPONSE_FIRST => chunk.first = value.uint(number)? != 0,
            RESPONSE_LAST => chunk.last = value.uint(number)? != 0,
            RESPONSE_SEQUENCE => chunk.sequence = value.uint32(number)?,
            PARTIAL => chunk.partial = value.uint(number)? != 0,
            METADATA => chunk.metadata.check(value.bytes(number)?)?,
            RESPONSE_TRAILERS => chunk.trailers.check(value.bytes(number)?)?,
            RESPONSE_HTTP_STATUS => {
                chunk.http_status = match value.uint32(number)? {
                    0 => 200,
                    status => status,
                }
            }
            _ => {}
        }
    }
    Ok(chunk)
}

/// Reads a `GrpcRequestBatch` or `GrpcResponseBatch`.
pub(crate) fn decode_batch(payload: &[u8]) -> Result<Batch, WireError> {
    let mut batch = Batch { sequence: 0, count: 0, messages: 0..0 };
    let mut reader = Reader::new(payload);
    while let Some((number, value)) = reader.next()? {
        match number {
            BATCH_SEQUENCE => batch.sequence = value.uint32(number)?,
            BATCH_COUNT => batch.count = value.uint32(number)?,
            BATCH_MESSAGES => batch.messages = value.range(number)?,
            _ => {}
        }
    }
    Ok(batch)
}

//! The HTTP payloads of `TunnelMessage` (fields 17 to 20 of `tunnel.proto`), written and read by
//! hand: fields go from borrowed slices straight into one buffer, a body stays a buffer of its own,
//! and reading yields slices of what arrived.
//!
//! Knows protobuf's wire format and the four messages; what the fields mean is for `accept` and
//! `deliver`. A property test holds it against prost both ways.

use std::ops::Range;

use sidelane_http_born::wire::{
    Field, FieldsSize, Headers, Reader, WireError, put_bytes, put_header, put_length, put_prefix,
    put_uint,
};
use sidelane_plugin::{Buf, BufBuilder};

/// `TunnelMessage.http_request`.
pub(crate) const FIELD_REQUEST: u32 = 17;
/// `TunnelMessage.http_response`.
pub(crate) const FIELD_RESPONSE: u32 = 18;

/// Most bytes of head (method, target, authority, fields) that one message may carry: the 64 KiB
/// that the fronts accept, and the framing of 128 fields.
pub(crate) const HEAD_BYTES_MAX: usize = 72 * 1024;

const REQUEST_METHOD: u32 = 1;
const REQUEST_TARGET: u32 = 2;
const REQUEST_AUTHORITY: u32 = 3;
const REQUEST_VERSION: u32 = 4;
const REQUEST_EXPECT_CONTINUE: u32 = 7;
const RESPONSE_STATUS: u32 = 1;
const HEADERS: u32 = 5;
const CONTENT_LENGTH: u32 = 6;
const BODY: u32 = 15;
/// Bytes of the scalar fields of a request or response, tags included: three varints of at most ten
/// bytes, a flag, and tags and lengths of four byte strings.
const SCALARS_MAX: usize = 96;

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
        put_header(&mut out, HEADERS, name, value);
    }
    put_length(&mut out, CONTENT_LENGTH, head.content_length);
    if head.expect_continue {
        put_uint(&mut out, REQUEST_EXPECT_CONTINUE, 1);
    }
    put_prefix(&mut out, BODY, body_len);
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
        put_header(&mut out, HEADERS, name, value);
    }
    put_length(&mut out, CONTENT_LENGTH, content_length);
    put_prefix(&mut out, BODY, body_len);
    out.freeze()
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

/// Reads an `HttpRequest`.
pub(crate) fn decode_request(payload: &[u8]) -> Result<RequestPayload<'_>, WireError> {
    let mut request = RequestPayload {
        method: "GET",
        target: 0..0,
        authority: &[],
        version: 11,
        headers: Headers::new(payload, HEADERS),
        content_length: None,
        expect_continue: false,
        body: 0..0,
    };
    let mut reader = Reader::new(payload);
    while let Some((number, value)) = reader.next()? {
        match number {
            REQUEST_METHOD => {
                let text =
                    str::from_utf8(value.bytes(number)?).map_err(|_| WireError::Utf8(number))?;
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
pub(crate) fn decode_response(payload: &[u8]) -> Result<ResponsePayload<'_>, WireError> {
    let mut response = ResponsePayload {
        status: 200,
        headers: Headers::new(payload, HEADERS),
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

const fn non_zero(value: u32, default: u32) -> u32 {
    if value == 0 { default } else { value }
}

#[cfg(test)]
mod tests;

//! Bodies and trailers as messages (`TunnelMessage.http_body`, `http_trailers`): a plugin of its own
//! protocol has them where it carries an answer that is plain HTTP.

use std::ops::Range;

use sidelane_plugin::{Buf, BufBuilder, Message};

use crate::wire::{Field, Headers, Reader, WireError, put_header, put_prefix};

/// `TunnelMessage.http_body`.
pub const FIELD_BODY: u32 = 19;
/// `TunnelMessage.http_trailers`.
pub const FIELD_TRAILERS: u32 = 20;

/// Most body bytes in one message: a data message may have 33 KiB with what frames it, and peers
/// that share a lane wait for at most this much.
pub const BODY_BYTES_MAX: usize = 32 * 1024;

const BODY_DATA: u32 = 1;
const HEADERS: u32 = 5;

/// Returns the message for a chunk of a body, at most [`BODY_BYTES_MAX`] long.
#[must_use]
pub fn data_message(bytes: Buf, end: bool) -> Message {
    Message { field: FIELD_BODY, end, head: encode_body(bytes.len()), body: bytes }
}

/// Returns the first part of an `HttpBody`; `body_len` bytes of data are the second.
#[must_use]
pub fn encode_body(body_len: usize) -> Buf {
    let mut out = BufBuilder::with_capacity(8);
    put_prefix(&mut out, BODY_DATA, body_len);
    out.freeze()
}

/// Returns an `HttpTrailers`.
#[must_use]
pub fn encode_trailers<'a>(fields: impl Iterator<Item = Field<'a>>) -> Buf {
    let mut out = BufBuilder::with_capacity(128);
    for (name, value) in fields {
        put_header(&mut out, HEADERS, name, value);
    }
    out.freeze()
}

/// Reads an `HttpBody`: the range of its data in the payload.
///
/// # Errors
/// It is none.
pub fn decode_body(payload: &[u8]) -> Result<Range<usize>, WireError> {
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
///
/// # Errors
/// It is none.
pub fn decode_trailers(payload: &[u8]) -> Result<Headers<'_>, WireError> {
    let mut headers = Headers::new(payload, HEADERS);
    let mut reader = Reader::new(payload);
    while let Some((number, value)) = reader.next()? {
        if number == HEADERS {
            headers.check(value.bytes(number)?)?;
        }
    }
    Ok(headers)
}

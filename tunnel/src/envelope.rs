//! `TunnelMessage` read and written by hand, so that a payload's bytes are never copied more than
//! once and never parsed.
//!
//! Knows the schema's field numbers and protobuf's wire format; knows nothing of exchanges. Held
//! against prost by a property test in both directions.

use bytes::{Buf, BufMut, Bytes, BytesMut};

use crate::id::{REQUEST_ID_BYTES_MAX, RequestId};

pub(crate) mod varint;

use varint::Cursor;
pub use varint::{DecodeError, Fault};

/// First message of its exchange.
pub const FLAG_OPEN: u32 = 1;
/// Last message of its direction.
pub const FLAG_END: u32 = 2;
/// Reserved: unordered, unreplayed, droppable.
pub const FLAG_DATAGRAM: u32 = 4;

/// Payloads below this are copied out of the read buffer: a small slice would pin all of it while
/// a slow consumer holds the message.
pub const COPY_OUT_BYTES_MAX: usize = 2 * 1024;

/// Field numbers of `TunnelMessage`.
pub mod field {
    /// `request_id`.
    pub const REQUEST_ID: u32 = 2;
    /// `protocol_type`.
    pub const PROTOCOL_TYPE: u32 = 4;
    /// `flags`.
    pub const FLAGS: u32 = 5;
    /// `open`.
    pub const OPEN: u32 = 6;
    /// First number of a protocol's payload.
    pub const PROTOCOL_FIRST: u32 = 9;
    /// `custom`, and the last number of a protocol's payload.
    pub const CUSTOM: u32 = 31;
    /// `hello`, and the first number of control.
    pub const HELLO: u32 = 32;
    /// `welcome`.
    pub const WELCOME: u32 = 33;
    /// `refuse`.
    pub const REFUSE: u32 = 34;
    /// `resume`.
    pub const RESUME: u32 = 35;
    /// `resumed`.
    pub const RESUMED: u32 = 36;
    /// `ack`.
    pub const ACK: u32 = 37;
    /// `ping`.
    pub const PING: u32 = 38;
    /// `pong`.
    pub const PONG: u32 = 39;
    /// `go_away`.
    pub const GO_AWAY: u32 = 40;
    /// `announce`.
    pub const ANNOUNCE: u32 = 41;
    /// `announced`.
    pub const ANNOUNCED: u32 = 42;
    /// `authenticate`.
    pub const AUTHENTICATE: u32 = 43;
    /// `authenticated`.
    pub const AUTHENTICATED: u32 = 44;
    /// `dedicate`: only on a connection that is dedicated.
    pub const DEDICATE: u32 = 45;
    /// `window`, and the first number of an exchange's control.
    pub const WINDOW: u32 = 48;
    /// `reset`.
    pub const RESET: u32 = 49;
    /// `dispatched`.
    pub const DISPATCHED: u32 = 50;
    /// `refused`.
    pub const REFUSED: u32 = 51;
}

/// A message as read: its envelope's fields and its payload's bytes.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Envelope {
    /// Whose message it is; `None`: the lane's or session's.
    pub request_id: Option<RequestId>,
    /// `protocol_type`; 0 where absent.
    pub protocol_type: u32,
    /// Bits `FLAG_*`.
    pub flags: u32,
    /// An encoded `Open`, unparsed.
    pub open: Option<Bytes>,
    /// Number of the payload's field; 0: there is none.
    pub field: u32,
    /// The payload's bytes.
    pub payload: Bytes,
}

/// Takes the next length-delimited message from `buffer`, or returns `None` and leaves the buffer
/// where no whole message is there yet.
///
/// Known fields in any order; of a repeated one the last counts, and parts of an embedded message
/// are joined, as protobuf says. Fields 9 to 31 are payload, whether the schema names them or not;
/// other unknown fields are skipped.
///
/// # Errors
///
/// A message longer than `message_bytes_max`, or bytes that are not a `TunnelMessage`. The buffer is
/// of no further use.
pub fn read(
    buffer: &mut BytesMut,
    message_bytes_max: usize,
) -> Result<Option<Envelope>, DecodeError> {
    let Some((start, length)) = frame(buffer, message_bytes_max)? else { return Ok(None) };
    let end = start + length;
    if buffer.len() < end {
        return Ok(None);
    }
    let parts = parse(&buffer[start..end])?;
    Ok(Some(parts.take(buffer, start, end)))
}

/// Returns where the message begins and its length, once the length itself is whole.
fn frame(buffer: &[u8], message_bytes_max: usize) -> Result<Option<(usize, usize)>, DecodeError> {
    let mut cursor = Cursor::new(buffer);
    let length = match cursor.varint() {
        Ok(length) => length,
        Err(DecodeError { fault: Fault::Truncated, .. }) => return Ok(None),
        Err(error) => return Err(error),
    };
    match usize::try_from(length) {
        Ok(length) if length <= message_bytes_max => Ok(Some((cursor.at(), length))),
        _ => Err(DecodeError {
            fault: Fault::MessageTooLong { length, max: message_bytes_max },
            at: 0,
        }),
    }
}

/// Where a length-delimited field lies in the message.
#[derive(Default)]
enum Part {
    #[default]
    Absent,
    Range(usize, usize),
    /// Parts of one embedded message that came apart: legal, never written by us.
    Joined(Vec<u8>),
}

impl Part {
    fn join(&mut self, message: &[u8], (start, end): (usize, usize)) {
        match self {
            Self::Absent => *self = Self::Range(start, end),
            Self::Range(first_start, first_end) => {
                let mut joined = message[*first_start..*first_end].to_vec();
                joined.extend_from_slice(&message[start..end]);
                *self = Self::Joined(joined);
            }
            Self::Joined(joined) => joined.extend_from_slice(&message[start..end]),
        }
    }

    fn len(&self) -> usize {
        match self {
            Self::Absent => 0,
            Self::Range(start, end) => end - start,
            Self::Joined(joined) => joined.len(),
        }
    }

    fn copy(self, message: &[u8]) -> Bytes {
        match self {
            Self::Absent => Bytes::new(),
            Self::Range(start, end) => Bytes::copy_from_slice(&message[start..end]),
            Self::Joined(joined) => Bytes::from(joined),
        }
    }
}

#[derive(Default)]
struct Parts {
    request_id: Option<RequestId>,
    protocol_type: u32,
    flags: u32,
    open: Part,
    field: u32,
    payload: Part,
}

impl Parts {
    /// Takes the message `start..end` out of the buffer: small payloads as copies, so that the
    /// buffer stays reusable, large ones as slices of it.
    fn take(self, buffer: &mut BytesMut, start: usize, end: usize) -> Envelope {
        let message = &buffer[start..end];
        let open = match self.open {
            Part::Absent => None,
            part => Some(part.copy(message)),
        };
        let payload = match self.payload {
            Part::Range(from, to) if to - from >= COPY_OUT_BYTES_MAX => {
                let mut payload = buffer.split_to(end).freeze();
                payload.truncate(start + to);
                payload.advance(start + from);
                payload
            }
            part => {
                let payload = part.copy(message);
                buffer.advance(end);
                payload
            }
        };
        Envelope {
            request_id: self.request_id,
            protocol_type: self.protocol_type,
            flags: self.flags,
            open,
            field: self.field,
            payload,
        }
    }
}

fn parse(message: &[u8]) -> Result<Parts, DecodeError> {
    let mut cursor = Cursor::new(message);
    let mut parts = Parts::default();
    while !cursor.is_empty() {
        let at = cursor.at();
        let (number, wire) = cursor.key()?;
        match number {
            field::REQUEST_ID => {
                wire.expect_length_delimited(number, at)?;
                parts.request_id = request_id(&mut cursor, message)?;
            }
            field::PROTOCOL_TYPE => {
                wire.expect_varint(number, at)?;
                parts.protocol_type = low_word(cursor.varint()?);
            }
            field::FLAGS => {
                wire.expect_varint(number, at)?;
                parts.flags = low_word(cursor.varint()?);
            }
            field::OPEN => {
                wire.expect_length_delimited(number, at)?;
                let range = cursor.length_delimited()?;
                parts.open.join(message, range);
            }
            field::PROTOCOL_FIRST..=field::DEDICATE | field::WINDOW..=field::REFUSED => {
                wire.expect_length_delimited(number, at)?;
                let range = cursor.length_delimited()?;
                // A oneof: another member replaces, the same embedded message is joined.
                if parts.field != number || number == field::CUSTOM {
                    parts.field = number;
                    parts.payload = Part::Absent;
                }
                parts.payload.join(message, range);
            }
            _ => cursor.skip(number, wire, at)?,
        }
    }
    debug_assert!(parts.payload.len() <= message.len(), "a part lies in its message");
    Ok(parts)
}

fn request_id(cursor: &mut Cursor<'_>, message: &[u8]) -> Result<Option<RequestId>, DecodeError> {
    let at = cursor.at();
    let (start, end) = cursor.length_delimited()?;
    if start == end {
        return Ok(None);
    }
    let text = &message[start..end];
    if std::str::from_utf8(text).is_err() {
        return Err(DecodeError { fault: Fault::Utf8 { field: field::REQUEST_ID }, at });
    }
    match RequestId::parse(text) {
        Ok(id) => Ok(Some(id)),
        Err(_) => Err(DecodeError { fault: Fault::RequestId, at }),
    }
}

/// The 32 bits that protobuf keeps of a longer varint.
#[expect(clippy::cast_possible_truncation, reason = "protobuf truncates 32-bit fields")]
const fn low_word(value: u64) -> u32 {
    value as u32
}

/// What is written before a payload's bytes.
#[derive(Clone, Copy, Debug, Default)]
pub struct Head<'a> {
    /// Whose message it is; `None`: the lane's or session's.
    pub request_id: Option<RequestId>,
    /// `protocol_type`; 0: not written.
    pub protocol_type: u32,
    /// Bits `FLAG_*`.
    pub flags: u32,
    /// An encoded `Open`.
    pub open: Option<&'a [u8]>,
    /// Number of the payload's field; 0: there is none.
    pub field: u32,
    /// Length of the payload that follows.
    pub payload_len: usize,
}

/// Writes the message's length and all of it but the payload's bytes, which come last. Returns the
/// message's length as framed, payload included.
pub fn write_head(out: &mut Vec<u8>, head: &Head<'_>) -> usize {
    let mut text = [0; REQUEST_ID_BYTES_MAX];
    let request_id = match head.request_id {
        Some(id) => id.write(&mut text),
        None => &[],
    };
    let mut length = length_delimited_len(field::REQUEST_ID, request_id.len(), true);
    length += varint_field_len(field::PROTOCOL_TYPE, head.protocol_type);
    length += varint_field_len(field::FLAGS, head.flags);
    if let Some(open) = head.open {
        length += length_delimited_len(field::OPEN, open.len(), false);
    }
    if head.field != 0 {
        length += length_delimited_len(head.field, head.payload_len, false);
    }
    varint::write(out, length as u64);
    if !request_id.is_empty() {
        write_length_delimited_key(out, field::REQUEST_ID, request_id.len());
        out.put_slice(request_id);
    }
    write_varint_field(out, field::PROTOCOL_TYPE, head.protocol_type);
    write_varint_field(out, field::FLAGS, head.flags);
    if let Some(open) = head.open {
        write_length_delimited_key(out, field::OPEN, open.len());
        out.put_slice(open);
    }
    if head.field != 0 {
        write_length_delimited_key(out, head.field, head.payload_len);
    }
    varint::len(length as u64) + length
}

/// Writes a whole message, payload included.
pub fn write(out: &mut Vec<u8>, envelope: &Envelope) {
    let head = Head {
        request_id: envelope.request_id,
        protocol_type: envelope.protocol_type,
        flags: envelope.flags,
        open: envelope.open.as_deref(),
        field: envelope.field,
        payload_len: envelope.payload.len(),
    };
    write_head(out, &head);
    if envelope.field != 0 {
        out.put_slice(&envelope.payload);
    }
}

fn length_delimited_len(number: u32, length: usize, omit_empty: bool) -> usize {
    if omit_empty && length == 0 {
        return 0;
    }
    varint::len(u64::from(number) << 3) + varint::len(length as u64) + length
}

fn varint_field_len(number: u32, value: u32) -> usize {
    if value == 0 {
        return 0;
    }
    varint::len(u64::from(number) << 3) + varint::len(u64::from(value))
}

fn write_length_delimited_key(out: &mut Vec<u8>, number: u32, length: usize) {
    varint::write(out, u64::from(number) << 3 | 2);
    varint::write(out, length as u64);
}

fn write_varint_field(out: &mut Vec<u8>, number: u32, value: u32) {
    if value != 0 {
        varint::write(out, u64::from(number) << 3);
        varint::write(out, u64::from(value));
    }
}

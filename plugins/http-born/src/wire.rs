//! Protobuf's wire format, read and written by hand: fields go from borrowed slices straight into one
//! buffer, and reading yields slices of what arrived.
//!
//! Knows varints, keys and `Header` entries; which messages there are is for each plugin.

use std::ops::Range;

use sidelane_plugin::BufBuilder;

/// Most fields that a payload may have: twice what the fronts accept, so that nothing legitimate meets
/// it, and far below where a `HeaderMap` panics.
pub const FIELDS_MAX: usize = 256;

const WIRE_VARINT: u32 = 0;
const WIRE_FIXED64: u32 = 1;
const WIRE_BYTES: u32 = 2;
const WIRE_FIXED32: u32 = 5;

const HEADER_NAME: u32 = 1;
const HEADER_VALUE: u32 = 2;

const SHORT_HEADER_NAME: u8 = tag(HEADER_NAME);
const SHORT_HEADER_VALUE: u8 = tag(HEADER_VALUE);

/// Returns the key of a byte string as it is written.
///
/// # Panics
/// Where it takes more than one byte: the number must be below 16. Meant for constants.
#[must_use]
#[allow(clippy::cast_possible_truncation, reason = "checked")]
pub const fn tag(number: u32) -> u8 {
    assert!(number < 16, "longer keys have more bytes");
    (number << 3 | WIRE_BYTES) as u8
}

/// Bytes that frame one field besides its name and value: three keys and three lengths of at most
/// three bytes, since no field is longer than a message.
const HEADER_FRAMING_MAX: usize = 3 + 3 * 3;

/// A payload that is not what its field number says.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum WireError {
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
pub type Field<'a> = (&'a [u8], &'a [u8]);

/// Counts fields and their bytes, so that a head is written into a buffer that never grows.
#[derive(Clone, Copy, Debug, Default)]
pub struct FieldsSize {
    /// Number of fields.
    pub count: usize,
    /// Bytes of all names and values.
    pub bytes: usize,
}

impl FieldsSize {
    /// Adds one field.
    pub fn add(&mut self, name_len: usize, value_len: usize) {
        self.count += 1;
        self.bytes += name_len + value_len;
    }

    /// Most bytes that they take as entries.
    #[must_use]
    pub const fn encoded_max(self) -> usize {
        self.bytes + self.count * HEADER_FRAMING_MAX
    }
}

/// The fields of a payload: checked when the payload was read, sliced again as they are asked for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Headers<'a> {
    payload: &'a [u8],
    /// The payload's field that holds them.
    number: u32,
    /// Number of fields.
    pub count: usize,
}

impl<'a> Headers<'a> {
    /// Returns those that `payload` holds as its field `number`, none of them checked yet.
    #[must_use]
    pub const fn new(payload: &'a [u8], number: u32) -> Self {
        Self { payload, number, count: 0 }
    }

    /// Counts the next entry, if it can be read. To be called for each as the payload is read.
    ///
    /// # Errors
    /// It cannot, or there are more than [`FIELDS_MAX`].
    pub fn check(&mut self, bytes: &[u8]) -> Result<(), WireError> {
        read_header(bytes)?;
        self.count += 1;
        if self.count > FIELDS_MAX { Err(WireError::Fields) } else { Ok(()) }
    }

    /// Returns the fields in order.
    #[must_use]
    pub const fn iter(self) -> HeadersIter<'a> {
        HeadersIter { reader: Reader::new(self.payload), number: self.number, left: self.count }
    }
}

/// Iterator over [`Headers`].
#[derive(Clone, Debug)]
pub struct HeadersIter<'a> {
    reader: Reader<'a>,
    number: u32,
    left: usize,
}

impl<'a> Iterator for HeadersIter<'a> {
    type Item = Field<'a>;

    fn next(&mut self) -> Option<Self::Item> {
        while self.left > 0 {
            let (number, value) = self.reader.next().ok()??;
            if number == self.number {
                self.left -= 1;
                return read_header(value.bytes(number).ok()?).ok();
            }
        }
        None
    }

    fn size_hint(&self) -> (usize, Option<usize>) {
        (self.left, Some(self.left))
    }
}

fn read_header(bytes: &[u8]) -> Result<Field<'_>, WireError> {
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

fn read_any_header(bytes: &[u8]) -> Result<Field<'_>, WireError> {
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
pub struct Reader<'a> {
    bytes: &'a [u8],
    at: usize,
}

/// A field's value as its wire type gives it.
#[derive(Clone, Copy, Debug)]
pub enum Value<'a> {
    /// A varint.
    Uint(u64),
    /// A byte string, and where it begins in what is read.
    Bytes {
        /// The bytes.
        bytes: &'a [u8],
        /// Where they begin.
        start: usize,
    },
    /// Four bytes.
    Fixed32(u32),
    /// Eight bytes, which no payload here has.
    Fixed64,
}

impl<'a> Value<'a> {
    /// Returns it, if it is what the field `number` holds.
    ///
    /// # Errors
    /// It has another wire type.
    pub const fn uint(self, number: u32) -> Result<u64, WireError> {
        match self {
            Self::Uint(value) => Ok(value),
            _ => Err(WireError::WireType(number)),
        }
    }

    #[allow(clippy::cast_possible_truncation, reason = "protobuf keeps the low 32 bits")]
    /// Returns it, if it is what the field `number` holds.
    ///
    /// # Errors
    /// It has another wire type.
    pub const fn uint32(self, number: u32) -> Result<u32, WireError> {
        match self.uint(number) {
            Ok(value) => Ok(value as u32),
            Err(error) => Err(error),
        }
    }

    /// Returns it, if it is what the field `number` holds.
    ///
    /// # Errors
    /// It has another wire type.
    pub const fn fixed32(self, number: u32) -> Result<u32, WireError> {
        match self {
            Self::Fixed32(value) => Ok(value),
            _ => Err(WireError::WireType(number)),
        }
    }

    /// Returns it, if it is what the field `number` holds.
    ///
    /// # Errors
    /// It has another wire type.
    pub const fn bytes(self, number: u32) -> Result<&'a [u8], WireError> {
        match self {
            Self::Bytes { bytes, .. } => Ok(bytes),
            _ => Err(WireError::WireType(number)),
        }
    }

    /// Returns it, if it is what the field `number` holds.
    ///
    /// # Errors
    /// It has another wire type.
    pub const fn range(self, number: u32) -> Result<Range<usize>, WireError> {
        match self {
            Self::Bytes { bytes, start } => Ok(start..start + bytes.len()),
            _ => Err(WireError::WireType(number)),
        }
    }
}

impl<'a> Reader<'a> {
    /// Returns a reader of a whole payload.
    #[must_use]
    pub const fn new(bytes: &'a [u8]) -> Self {
        Self { bytes, at: 0 }
    }

    /// Returns the next field's number and value; `None`: there is no further one.
    ///
    /// # Errors
    /// The bytes are not protobuf's.
    #[inline]
    #[allow(clippy::should_implement_trait, reason = "an error ends the reading, not an item")]
    pub fn next(&mut self) -> Result<Option<(u32, Value<'a>)>, WireError> {
        if self.at == self.bytes.len() {
            return Ok(None);
        }
        let key = self.varint()?;
        let number = u32::try_from(key >> 3).map_err(|_| WireError::Varint)?;
        #[allow(clippy::cast_possible_truncation, reason = "three bits")]
        let value = match (key & 7) as u32 {
            WIRE_VARINT => Value::Uint(self.varint()?),
            WIRE_BYTES => {
                let len = usize::try_from(self.varint()?).map_err(|_| WireError::Truncated)?;
                let start = self.at;
                Value::Bytes { bytes: self.take(len)?, start }
            }
            WIRE_FIXED64 => {
                self.take(8)?;
                Value::Fixed64
            }
            WIRE_FIXED32 => {
                let bytes = self.take(4)?.try_into().expect("four were taken");
                Value::Fixed32(u32::from_le_bytes(bytes))
            }
            _ => return Err(WireError::WireType(number)),
        };
        Ok(Some((number, value)))
    }

    fn take(&mut self, len: usize) -> Result<&'a [u8], WireError> {
        let end = self.at.checked_add(len).ok_or(WireError::Truncated)?;
        let bytes = self.bytes.get(self.at..end).ok_or(WireError::Truncated)?;
        self.at = end;
        Ok(bytes)
    }

    #[inline]
    fn varint(&mut self) -> Result<u64, WireError> {
        // Tags, and nearly all lengths, are of one byte.
        match self.bytes.get(self.at) {
            Some(byte @ ..=0x7f) => {
                self.at += 1;
                Ok(u64::from(*byte))
            }
            _ => self.long_varint(),
        }
    }

    fn long_varint(&mut self) -> Result<u64, WireError> {
        let mut value = 0u64;
        for shift in (0..70).step_by(7) {
            let byte = *self.bytes.get(self.at).ok_or(WireError::Truncated)?;
            self.at += 1;
            value |= u64::from(byte & 0x7f) << shift;
            if byte < 0x80 {
                return Ok(value);
            }
        }
        Err(WireError::Varint)
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

/// Writes a varint.
pub fn put_uint(out: &mut BufBuilder, number: u32, value: u64) {
    out.extend_from_slice(Prefix::new().key(number, WIRE_VARINT).varint(value).as_slice());
}

/// Writes four bytes.
pub fn put_fixed32(out: &mut BufBuilder, number: u32, value: u32) {
    out.extend_from_slice(Prefix::new().key(number, WIRE_FIXED32).as_slice());
    out.extend_from_slice(&value.to_le_bytes());
}

/// Writes a byte string; nothing where it is empty.
pub fn put_bytes(out: &mut BufBuilder, number: u32, bytes: &[u8]) {
    put_prefix(out, number, bytes.len());
    out.extend_from_slice(bytes);
}

/// Lengths go as themselves plus one, so that 0 can say "not known".
pub fn put_length(out: &mut BufBuilder, number: u32, length: Option<u64>) {
    if let Some(plus_one) = length.and_then(|length| length.checked_add(1)) {
        put_uint(out, number, plus_one);
    }
}

/// Writes what stands before `len` bytes; nothing where there are none, as proto3 has it.
pub fn put_prefix(out: &mut BufBuilder, number: u32, len: usize) {
    if len > 0 {
        out.extend_from_slice(Prefix::new().key(number, WIRE_BYTES).varint(len as u64).as_slice());
    }
}

/// Writes a `Header` entry as the field `number`, which is below 16.
#[allow(clippy::cast_possible_truncation, reason = "lengths below 128")]
pub fn put_header(out: &mut BufBuilder, number: u32, name: &[u8], value: &[u8]) {
    let (name_len, value_len) = (name.len() as u64, value.len() as u64);
    let inner = 2 + varint_len(name_len) + name_len + varint_len(value_len) + value_len;
    if let Ok(short @ ..=0x7f) = u8::try_from(inner) {
        // Shorter than `inner`, so of one byte too.
        let [name_len, value_len] = [name.len() as u8, value.len() as u8];
        out.extend_from_slice(&[tag(number), short, SHORT_HEADER_NAME, name_len]);
        out.extend_from_slice(name);
        out.extend_from_slice(&[SHORT_HEADER_VALUE, value_len]);
        out.extend_from_slice(value);
        return;
    }
    out.extend_from_slice(Prefix::new().key(number, WIRE_BYTES).varint(inner).as_slice());
    out.extend_from_slice(Prefix::new().key(HEADER_NAME, WIRE_BYTES).varint(name_len).as_slice());
    out.extend_from_slice(name);
    out.extend_from_slice(Prefix::new().key(HEADER_VALUE, WIRE_BYTES).varint(value_len).as_slice());
    out.extend_from_slice(value);
}

/// Returns how many bytes `value` takes as a varint.
#[must_use]
pub const fn varint_len(value: u64) -> u64 {
    // Seven bits a byte; zero takes one.
    (63 - (value | 1).leading_zeros() as u64) / 7 + 1
}

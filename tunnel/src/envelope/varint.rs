//! Protobuf's wire format: varints, keys, skipping; and what can be wrong with it.

/// Groups within groups that are skipped; deeper ones are refused (prost's own limit).
const GROUP_DEPTH_MAX: usize = 100;

/// What is wrong with a message, and where.
#[derive(Clone, Copy, PartialEq, Eq, Debug, thiserror::Error)]
#[error("malformed tunnel message: {fault} at byte {at}")]
pub struct DecodeError {
    /// What is wrong.
    pub fault: Fault,
    /// Offset in the message of the field or value that is wrong.
    pub at: usize,
}

/// Ways in which bytes are not a `TunnelMessage`.
#[derive(Clone, Copy, PartialEq, Eq, Debug, thiserror::Error)]
pub enum Fault {
    /// The frame is above the limit.
    #[error("{length} bytes announced, at most {max} are accepted")]
    MessageTooLong {
        /// Length announced.
        length: u64,
        /// Longest accepted.
        max: usize,
    },
    /// The message ends inside a field.
    #[error("the message ends inside a field")]
    Truncated,
    /// A varint of more than 64 bits.
    #[error("varint above 64 bits")]
    VarintTooLong,
    /// A field's key above 32 bits, or a field numbered 0.
    #[error("field key {key} (accepted: field numbers 1 to 2^29 - 1)")]
    Key {
        /// The key.
        key: u64,
    },
    /// Wire types 6 and 7 do not exist.
    #[error("field {field} has wire type {wire}, which does not exist")]
    NoSuchWireType {
        /// Field's number.
        field: u32,
        /// Wire type.
        wire: u8,
    },
    /// A known field of another type.
    #[error("field {field} has wire type {found}, expected {expected}")]
    WireType {
        /// Field's number.
        field: u32,
        /// Wire type found.
        found: u8,
        /// Wire type of the schema.
        expected: u8,
    },
    /// The end of a group that did not begin, or of another one.
    #[error("field {field} ends a group that is not open")]
    GroupEnd {
        /// Field's number.
        field: u32,
    },
    /// Groups nested too deep.
    #[error("groups nested deeper than {GROUP_DEPTH_MAX}")]
    GroupDepth,
    /// A string is not UTF-8.
    #[error("field {field} is not UTF-8")]
    Utf8 {
        /// Field's number.
        field: u32,
    },
    /// `request_id` is not the text of an id.
    #[error("request_id is not base62 of 1 to 11 bytes without leading zeros")]
    RequestId,
}

/// A wire type of protobuf.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) struct Wire(u8);

impl Wire {
    const VARINT: Self = Self(0);
    const FIXED64: Self = Self(1);
    const LENGTH_DELIMITED: Self = Self(2);
    const GROUP_START: Self = Self(3);
    const GROUP_END: Self = Self(4);
    const FIXED32: Self = Self(5);

    pub(crate) fn expect_varint(self, field: u32, at: usize) -> Result<(), DecodeError> {
        self.expect_wire(Self::VARINT, field, at)
    }

    pub(crate) fn expect_length_delimited(self, field: u32, at: usize) -> Result<(), DecodeError> {
        self.expect_wire(Self::LENGTH_DELIMITED, field, at)
    }

    fn expect_wire(self, expected: Self, field: u32, at: usize) -> Result<(), DecodeError> {
        if self == expected {
            return Ok(());
        }
        Err(DecodeError {
            fault: Fault::WireType { field, found: self.0, expected: expected.0 },
            at,
        })
    }
}

/// Reads a message's bytes in order.
pub(crate) struct Cursor<'a> {
    bytes: &'a [u8],
    /// Invariant: `at <= bytes.len()`.
    at: usize,
}

impl<'a> Cursor<'a> {
    pub(crate) const fn new(bytes: &'a [u8]) -> Self {
        Self { bytes, at: 0 }
    }

    pub(crate) const fn at(&self) -> usize {
        self.at
    }

    pub(crate) const fn is_empty(&self) -> bool {
        self.at == self.bytes.len()
    }

    /// Reads a varint.
    pub(crate) fn varint(&mut self) -> Result<u64, DecodeError> {
        let start = self.at;
        let rest = &self.bytes[start..];
        if let Some(&first) = rest.first()
            && first < 0x80
        {
            self.at += 1;
            return Ok(u64::from(first));
        }
        let mut value = 0;
        for (index, &byte) in rest.iter().enumerate().take(10) {
            // The tenth byte holds the 64th bit and nothing else.
            if index == 9 && byte > 1 {
                return Err(DecodeError { fault: Fault::VarintTooLong, at: start });
            }
            value |= u64::from(byte & 0x7f) << (7 * index);
            if byte < 0x80 {
                self.at += index + 1;
                return Ok(value);
            }
        }
        Err(DecodeError { fault: Fault::Truncated, at: start })
    }

    /// Reads a field's key.
    pub(crate) fn key(&mut self) -> Result<(u32, Wire), DecodeError> {
        let at = self.at;
        let key = self.varint()?;
        let number = u32::try_from(key).unwrap_or(0) >> 3;
        if number == 0 {
            return Err(DecodeError { fault: Fault::Key { key }, at });
        }
        let wire = u8::try_from(key & 7).expect("three bits");
        if wire > Wire::FIXED32.0 {
            return Err(DecodeError { fault: Fault::NoSuchWireType { field: number, wire }, at });
        }
        Ok((number, Wire(wire)))
    }

    /// Reads a length and passes what it covers; returns start and end.
    pub(crate) fn length_delimited(&mut self) -> Result<(usize, usize), DecodeError> {
        let at = self.at;
        let length = self.varint()?;
        let start = self.at;
        match usize::try_from(length) {
            Ok(length) if length <= self.bytes.len() - start => {
                self.at = start + length;
                Ok((start, self.at))
            }
            _ => Err(DecodeError { fault: Fault::Truncated, at }),
        }
    }

    /// Passes the value of an unknown field whose key stood at `at`.
    pub(crate) fn skip(&mut self, field: u32, wire: Wire, at: usize) -> Result<(), DecodeError> {
        match wire {
            Wire::GROUP_START => self.skip_group(field, at),
            Wire::GROUP_END => Err(DecodeError { fault: Fault::GroupEnd { field }, at }),
            wire => self.skip_value(wire),
        }
    }

    fn skip_value(&mut self, wire: Wire) -> Result<(), DecodeError> {
        match wire {
            Wire::VARINT => self.varint().map(drop),
            Wire::FIXED64 => self.skip_bytes(8),
            Wire::LENGTH_DELIMITED => self.length_delimited().map(drop),
            _ => self.skip_bytes(4),
        }
    }

    fn skip_bytes(&mut self, count: usize) -> Result<(), DecodeError> {
        if self.bytes.len() - self.at < count {
            return Err(DecodeError { fault: Fault::Truncated, at: self.at });
        }
        self.at += count;
        Ok(())
    }

    fn skip_group(&mut self, field: u32, at: usize) -> Result<(), DecodeError> {
        let mut open = vec![field];
        while let Some(&innermost) = open.last() {
            let key_at = self.at;
            let (field, wire) = self.key()?;
            match wire {
                Wire::GROUP_START if open.len() == GROUP_DEPTH_MAX => {
                    return Err(DecodeError { fault: Fault::GroupDepth, at });
                }
                Wire::GROUP_START => open.push(field),
                Wire::GROUP_END if field == innermost => {
                    open.pop();
                }
                Wire::GROUP_END => {
                    return Err(DecodeError { fault: Fault::GroupEnd { field }, at: key_at });
                }
                wire => self.skip_value(wire)?,
            }
        }
        Ok(())
    }
}

/// Returns how many bytes a value takes as a varint.
pub(crate) const fn len(value: u64) -> usize {
    let bits = 64 - (value | 1).leading_zeros() as usize;
    bits.div_ceil(7)
}

/// Appends a value as a varint.
pub(crate) fn write(out: &mut Vec<u8>, mut value: u64) {
    while value >= 0x80 {
        out.push(u8::try_from(value & 0x7f).expect("seven bits") | 0x80);
        value >>= 7;
    }
    out.push(u8::try_from(value).expect("below 0x80"));
}

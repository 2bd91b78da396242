//! Frame headers (RFC 6455 §5.2): read, checked and written. Payloads are not looked at, and never
//! unmasked.

/// Longest header: two bytes, eight of length, four of key.
pub(crate) const HEADER_BYTES_MAX: usize = 14;

/// Longest payload of a control frame (RFC 6455 §5.5).
pub(crate) const CONTROL_BYTES_MAX: u64 = 125;

const FIN: u8 = 0x80;
const RESERVED: u8 = 0x70;
const OPCODE: u8 = 0x0f;
const MASKED: u8 = 0x80;
const LENGTH: u8 = 0x7f;
/// Length in two, in eight further bytes.
const LENGTH_16: u8 = 126;
const LENGTH_64: u8 = 127;

/// Opcodes (RFC 6455 §11.8).
pub(crate) mod opcode {
    pub(crate) const CONTINUATION: u8 = 0x0;
    pub(crate) const TEXT: u8 = 0x1;
    pub(crate) const BINARY: u8 = 0x2;
    pub(crate) const CLOSE: u8 = 0x8;
    pub(crate) const PING: u8 = 0x9;
    pub(crate) const PONG: u8 = 0xa;
}

/// A frame without its payload.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Header {
    pub(crate) fin: bool,
    /// RSV1, RSV2, RSV3 as the bits 4, 2, 1.
    pub(crate) reserved: u8,
    pub(crate) opcode: u8,
    pub(crate) key: Option<[u8; 4]>,
    /// Of the payload.
    pub(crate) len: u64,
}

impl Header {
    pub(crate) const fn is_control(&self) -> bool {
        self.opcode >= opcode::CLOSE
    }
}

/// What a proxy must not pass on. Answered with 1002.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub(crate) enum Violation {
    #[error("a control frame of more than 125 bytes")]
    ControlTooLong,
    #[error("a fragmented control frame")]
    ControlFragmented,
    #[error("an unmasked frame from a client")]
    Unmasked,
    #[error("a masked frame from a server")]
    Masked,
    #[error("a reserved opcode")]
    Opcode,
    #[error("reserved bits without an extension")]
    Reserved,
    #[error("a length that is not in its shortest form")]
    LengthNotMinimal,
    #[error("a length of more than 63 bits")]
    LengthTooLarge,
    #[error("a continuation of nothing")]
    NothingToContinue,
    #[error("a new message inside a fragmented one")]
    InsideMessage,
}

/// Checks the frames of one direction.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Checker {
    /// Frames are a client's: masked.
    from_client: bool,
    /// An extension was negotiated, to which the reserved bits belong.
    extended: bool,
    /// A fragmented message has begun and not ended.
    in_message: bool,
}

impl Checker {
    pub(crate) const fn new(from_client: bool, extended: bool) -> Self {
        Self { from_client, extended, in_message: false }
    }

    /// Reads the header at the beginning of `bytes` and how long it is; `None`: it is not all there.
    /// A violation is told as soon as it shows, whatever is still to come of the header.
    pub(crate) fn read(&self, bytes: &[u8]) -> Result<Option<(Header, usize)>, Violation> {
        let [first, second, rest @ ..] = bytes else {
            return match bytes {
                [first] => self.check_first(*first).map(|()| None),
                _ => Ok(None),
            };
        };
        self.check_first(*first)?;
        let opcode = first & OPCODE;
        let masked = second & MASKED != 0;
        match (self.from_client, masked) {
            (true, false) => return Err(Violation::Unmasked),
            (false, true) => return Err(Violation::Masked),
            _ => {}
        }
        let short = second & LENGTH;
        if opcode >= opcode::CLOSE && u64::from(short) > CONTROL_BYTES_MAX {
            return Err(Violation::ControlTooLong);
        }
        let (len, rest, length_bytes) = match short {
            LENGTH_16 => {
                let Some((bytes, rest)) = rest.split_first_chunk() else { return Ok(None) };
                (u64::from(u16::from_be_bytes(*bytes)), rest, 2)
            }
            LENGTH_64 => {
                if rest.first().is_some_and(|byte| byte & 0x80 != 0) {
                    return Err(Violation::LengthTooLarge);
                }
                let Some((bytes, rest)) = rest.split_first_chunk() else { return Ok(None) };
                (u64::from_be_bytes(*bytes), rest, 8)
            }
            short => (u64::from(short), rest, 0),
        };
        if (length_bytes == 2 && len < u64::from(LENGTH_16))
            || (length_bytes == 8 && u16::try_from(len).is_ok())
        {
            return Err(Violation::LengthNotMinimal);
        }
        let mut at = 2 + length_bytes;
        let mut key = None;
        if masked {
            let Some(bytes) = rest.first_chunk() else { return Ok(None) };
            key = Some(*bytes);
            at += 4;
        }
        let fin = first & FIN != 0;
        let reserved = (first & RESERVED) >> 4;
        Ok(Some((Header { fin, reserved, opcode, key, len }, at)))
    }

    /// Notes that a frame has passed.
    pub(crate) fn passed(&mut self, header: &Header) {
        if !header.is_control() {
            self.in_message = !header.fin;
        }
    }

    fn check_first(self, first: u8) -> Result<(), Violation> {
        let fin = first & FIN != 0;
        if first & RESERVED != 0 && !self.extended {
            return Err(Violation::Reserved);
        }
        match first & OPCODE {
            opcode::CONTINUATION if !self.in_message => Err(Violation::NothingToContinue),
            opcode::TEXT | opcode::BINARY if self.in_message => Err(Violation::InsideMessage),
            opcode::CONTINUATION | opcode::TEXT | opcode::BINARY => Ok(()),
            opcode::CLOSE | opcode::PING | opcode::PONG if !fin => {
                Err(Violation::ControlFragmented)
            }
            opcode::CLOSE | opcode::PING | opcode::PONG => Ok(()),
            _ => Err(Violation::Opcode),
        }
    }
}

/// A header as it is written.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Written {
    bytes: [u8; HEADER_BYTES_MAX],
    len: usize,
}

impl Written {
    pub(crate) fn as_slice(&self) -> &[u8] {
        &self.bytes[..self.len]
    }

    fn put(&mut self, bytes: &[u8]) {
        self.bytes[self.len..self.len + bytes.len()].copy_from_slice(bytes);
        self.len += bytes.len();
    }
}

/// Writes a header, its length in the shortest form.
#[allow(clippy::cast_possible_truncation, reason = "checked by the arms")]
pub(crate) fn write(header: &Header) -> Written {
    let mut out = Written { bytes: [0; HEADER_BYTES_MAX], len: 0 };
    let fin = if header.fin { FIN } else { 0 };
    let masked = if header.key.is_some() { MASKED } else { 0 };
    out.put(&[fin | (header.reserved << 4) & RESERVED | header.opcode & OPCODE]);
    match header.len {
        len if len < u64::from(LENGTH_16) => out.put(&[masked | len as u8]),
        len @ ..=0xffff => {
            out.put(&[masked | LENGTH_16]);
            out.put(&(len as u16).to_be_bytes());
        }
        len => {
            out.put(&[masked | LENGTH_64]);
            out.put(&len.to_be_bytes());
        }
    }
    if let Some(key) = header.key {
        out.put(&key);
    }
    out
}

/// Applies a key to a short payload of our own, or to the code of a close frame.
pub(crate) fn mask(payload: &mut [u8], key: [u8; 4]) {
    for (byte, key) in payload.iter_mut().zip(key.into_iter().cycle()) {
        *byte ^= key;
    }
}

#[cfg(test)]
mod check;

#[cfg(test)]
mod tests;

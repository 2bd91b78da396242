//! `CarrierBytes` on the wire: gRPC's prefix (a flag, a length), then a protobuf message with one field.
//!
//! Pure. Messages are read as they come, in whatever pieces, and never gathered, so that they need no
//! bound; their bytes are passed by reference.

use bytes::{Buf as _, BufMut as _, Bytes, BytesMut};

/// gRPC's prefix: compressed or not, and the message's length in four bytes.
pub const PREFIX_BYTES: usize = 5;

/// Key of `data`: field 1, length-delimited.
const DATA_KEY: u64 = 1 << 3 | LENGTH_DELIMITED;

const VARINT: u64 = 0;
const FIXED64: u64 = 1;
const LENGTH_DELIMITED: u64 = 2;
const FIXED32: u64 = 5;

/// Longest head of a message: the prefix, the key, and a length below 2^28.
pub const HEAD_BYTES_MAX: usize = PREFIX_BYTES + 1 + 4;

/// Longest varint.
const VARINT_BYTES_MAX: u32 = 10;

/// Writes the head of a message with `length` bytes, 2^28 at most.
pub fn write_head(length: usize, into: &mut BytesMut) {
    let mut field = [0; HEAD_BYTES_MAX];
    let mut at = 1;
    field[0] = u8::try_from(DATA_KEY).unwrap_or_default();
    let mut rest = length;
    loop {
        let low = u8::try_from(rest & 0x7f).unwrap_or_default();
        rest >>= 7;
        field[at] = if rest == 0 { low } else { low | 0x80 };
        at += 1;
        if rest == 0 {
            break;
        }
    }
    into.put_u8(0);
    into.put_u32(u32::try_from(at + length).unwrap_or(u32::MAX));
    into.extend_from_slice(&field[..at]);
}

/// Takes the bytes out of messages.
#[derive(Debug, Default)]
pub struct Reader {
    state: State,
    /// Of the message, not read yet.
    left: u64,
    has_data: bool,
    /// The varint that is being read.
    value: u64,
    value_bytes: u32,
}

#[derive(Debug)]
enum State {
    /// So much of the prefix was read.
    Prefix(usize),
    Key,
    Length {
        is_data: bool,
    },
    Data(u64),
    Skip(u64),
    /// A varint of no interest.
    SkipVarint,
}

impl Default for State {
    fn default() -> Self {
        Self::Prefix(0)
    }
}

impl Reader {
    /// Takes from `input` and returns the next bytes; `None`: all of `input` is read.
    ///
    /// # Errors
    /// What is wrong with it.
    pub fn next(&mut self, input: &mut Bytes) -> Result<Option<Bytes>, &'static str> {
        loop {
            if !matches!(self.state, State::Prefix(_)) && self.left == 0 {
                if !matches!(self.state, State::Key) || self.value_bytes > 0 {
                    return Err("a message on the gRPC stream ends within a field");
                }
                self.state = State::Prefix(0);
            }
            if input.is_empty() {
                return Ok(None);
            }
            match self.state {
                State::Prefix(read) => self.read_prefix(read, input)?,
                State::Key => {
                    if let Some(key) = self.varint(input)? {
                        self.state = self.field(key)?;
                    }
                }
                State::Length { is_data } => {
                    if let Some(length) = self.varint(input)? {
                        if length > self.left {
                            return Err("a field on the gRPC stream is longer than its message");
                        }
                        self.state = match length {
                            0 => State::Key,
                            length if is_data => State::Data(length),
                            length => State::Skip(length),
                        };
                    }
                }
                State::Data(rest) => {
                    let (taken, state) = self.run(rest, input);
                    self.state = state.map_or(State::Key, State::Data);
                    return Ok(Some(taken));
                }
                State::Skip(rest) => {
                    let (_, state) = self.run(rest, input);
                    self.state = state.map_or(State::Key, State::Skip);
                }
                State::SkipVarint => {
                    if self.varint(input)?.is_some() {
                        self.state = State::Key;
                    }
                }
            }
        }
    }

    fn read_prefix(&mut self, mut read: usize, input: &mut Bytes) -> Result<(), &'static str> {
        while read < PREFIX_BYTES && input.has_remaining() {
            let byte = input.get_u8();
            if read == 0 {
                if byte != 0 {
                    return Err("a compressed message on the gRPC stream (none was agreed on)");
                }
                self.left = 0;
            } else {
                self.left = self.left << 8 | u64::from(byte);
            }
            read += 1;
        }
        if read < PREFIX_BYTES {
            self.state = State::Prefix(read);
        } else {
            self.state = State::Key;
            self.has_data = false;
        }
        Ok(())
    }

    /// What follows a key.
    fn field(&mut self, key: u64) -> Result<State, &'static str> {
        if key == DATA_KEY {
            // The last would count alone, and the first was given out.
            if std::mem::replace(&mut self.has_data, true) {
                return Err("a message on the gRPC stream has its data twice");
            }
            return Ok(State::Length { is_data: true });
        }
        let fixed = |bytes| {
            if bytes > self.left {
                return Err("a field on the gRPC stream is longer than its message");
            }
            Ok(State::Skip(bytes))
        };
        match key & 7 {
            // Unknown fields are ignored.
            VARINT => Ok(State::SkipVarint),
            FIXED64 => fixed(8),
            LENGTH_DELIMITED => Ok(State::Length { is_data: false }),
            FIXED32 => fixed(4),
            _ => Err("a message on the gRPC stream is no protobuf"),
        }
    }

    /// Reads on in a varint; `None`: there is more to come.
    fn varint(&mut self, input: &mut Bytes) -> Result<Option<u64>, &'static str> {
        while self.left > 0 && input.has_remaining() {
            if self.value_bytes == VARINT_BYTES_MAX {
                return Err("a message on the gRPC stream is no protobuf");
            }
            let byte = input.get_u8();
            self.left -= 1;
            self.value |= u64::from(byte & 0x7f).wrapping_shl(7 * self.value_bytes);
            self.value_bytes += 1;
            if byte < 0x80 {
                self.value_bytes = 0;
                return Ok(Some(std::mem::take(&mut self.value)));
            }
        }
        Ok(None)
    }

    /// Takes what there is of `rest` bytes, and what is left of them.
    fn run(&mut self, rest: u64, input: &mut Bytes) -> (Bytes, Option<u64>) {
        let length = usize::try_from(rest).unwrap_or(usize::MAX).min(input.len());
        let taken = input.split_to(length);
        self.left -= length as u64;
        let rest = rest - length as u64;
        (taken, (rest > 0).then_some(rest))
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn message(data: &[u8]) -> Vec<u8> {
        let mut bytes = BytesMut::new();
        write_head(data.len(), &mut bytes);
        bytes.extend_from_slice(data);
        bytes.to_vec()
    }

    /// Reads it in pieces of `size` bytes.
    fn read(bytes: &[u8], size: usize) -> Result<Vec<u8>, &'static str> {
        let mut reader = Reader::default();
        let mut all = Vec::new();
        for piece in bytes.chunks(size.max(1)) {
            let mut piece = Bytes::copy_from_slice(piece);
            while let Some(taken) = reader.next(&mut piece)? {
                all.extend_from_slice(&taken);
            }
        }
        Ok(all)
    }

    #[test]
    fn a_message_is_what_protobuf_and_grpc_say() {
        assert_eq!(message(b"abc"), [0, 0, 0, 0, 5, 0x0a, 3, b'a', b'b', b'c']);
        let long = message(&[7; 300]);
        assert_eq!(long[..8], [0, 0, 0, 1, 0x2f, 0x0a, 0xac, 0x02]);
        assert_eq!(long.len(), 308);
        let longest = message(&vec![0; (1 << 28) - 1]);
        assert_eq!(longest.len(), HEAD_BYTES_MAX + (1 << 28) - 1);
    }

    #[test]
    fn unknown_fields_are_ignored_and_an_empty_message_is_nothing() {
        let fields: &[u8] = &[
            0x10, 0x96, 0x01, // 2: a varint
            0x19, 1, 2, 3, 4, 5, 6, 7, 8, // 3: eight bytes
            0x22, 2, 9, 9, // 4: bytes
            0x2d, 1, 2, 3, 4, // 5: four bytes
            0x0a, 2, b'a', b'b', // the data
            0x32, 0, // 6: no bytes
        ];
        let mut bytes = vec![0, 0, 0, 0, u8::try_from(fields.len()).unwrap()];
        bytes.extend_from_slice(fields);
        bytes.extend_from_slice(&[0, 0, 0, 0, 0]);
        bytes.extend_from_slice(&message(b""));
        bytes.extend_from_slice(&message(b"cd"));
        for size in 1..bytes.len() {
            assert_eq!(read(&bytes, size).as_deref(), Ok(&b"abcd"[..]), "{size}");
        }
    }

    #[test]
    fn what_is_no_message_is_refused() {
        for (bytes, expected) in [
            (&[1, 0, 0, 0, 0][..], "a compressed message"),
            (&[0, 0, 0, 0, 3, 0x0a, 9, 1], "longer than its message"),
            (&[0, 0, 0, 0, 3, 0x19, 1, 1], "longer than its message"),
            (&[0, 0, 0, 0, 1, 0x0a, 0], "ends within a field"),
            (&[0, 0, 0, 0, 1, 0x80, 0], "ends within a field"),
            (&[0, 0, 0, 0, 2, 0x10, 0x80, 0], "ends within a field"),
            (&[0, 0, 0, 0, 6, 0x0a, 1, 1, 0x0a, 1, 1], "its data twice"),
            (&[0, 0, 0, 0, 1, 0x0b], "no protobuf"),
            (
                &[0, 0, 0, 0, 20, 255, 255, 255, 255, 255, 255, 255, 255, 255, 255, 255],
                "no protobuf",
            ),
        ] {
            for size in 1..=bytes.len() {
                let error = read(bytes, size).expect_err("refused");
                assert!(error.contains(expected), "{bytes:?}: {error}");
            }
        }
    }

    proptest! {
        #[test]
        fn any_split_gives_the_bytes(
            messages in prop::collection::vec(prop::collection::vec(any::<u8>(), 0..300), 0..8),
            size in 1_usize..700,
        ) {
            let bytes: Vec<u8> = messages.iter().flat_map(|data| message(data)).collect();
            prop_assert_eq!(read(&bytes, size), Ok(messages.concat()));
        }

        #[test]
        fn no_bytes_make_it_panic(bytes in prop::collection::vec(any::<u8>(), 0..200), size in 1_usize..50) {
            let _ = read(&bytes, size);
        }
    }
}

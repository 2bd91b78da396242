//! The id of an exchange and its text on the wire.

use std::fmt;
use std::hash::{BuildHasher, Hasher, RandomState};
use std::str::FromStr;
use std::sync::Arc;

/// Longest text of an id: `u64::MAX` in base62.
pub const REQUEST_ID_BYTES_MAX: usize = 11;

const DIGITS: &[u8; 62] = b"0123456789ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz";

/// Names one exchange of a session, for the session's life.
///
/// Odd ids are made by the relay, even ones by the sidecar; 0 is never made. Its text is base62
/// without leading zeros, so that an id has one text only.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Debug)]
pub struct RequestId(pub u64);

impl RequestId {
    /// Returns which end makes such ids.
    #[must_use]
    pub const fn made_by(self) -> Side {
        if self.0 % 2 == 1 { Side::Relay } else { Side::Sidecar }
    }

    /// Reads the text of an id.
    pub(crate) fn parse(text: &[u8]) -> Result<Self, InvalidRequestId> {
        if text.is_empty() || text.len() > REQUEST_ID_BYTES_MAX {
            return Err(InvalidRequestId);
        }
        if text[0] == b'0' && text.len() > 1 {
            return Err(InvalidRequestId);
        }
        let mut value: u64 = 0;
        for &byte in text {
            let digit = match byte {
                b'0'..=b'9' => byte - b'0',
                b'A'..=b'Z' => byte - b'A' + 10,
                b'a'..=b'z' => byte - b'a' + 36,
                _ => return Err(InvalidRequestId),
            };
            value = value
                .checked_mul(62)
                .and_then(|value| value.checked_add(u64::from(digit)))
                .ok_or(InvalidRequestId)?;
        }
        Ok(Self(value))
    }

    /// Writes the text at the end of `buffer` and returns it.
    pub(crate) fn write(self, buffer: &mut [u8; REQUEST_ID_BYTES_MAX]) -> &[u8] {
        let mut at = REQUEST_ID_BYTES_MAX;
        let mut rest = self.0;
        loop {
            at -= 1;
            buffer[at] = DIGITS[usize::try_from(rest % 62).expect("below 62")];
            rest /= 62;
            if rest == 0 {
                return &buffer[at..];
            }
        }
    }
}

impl fmt::Display for RequestId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let mut buffer = [0; REQUEST_ID_BYTES_MAX];
        let text = std::str::from_utf8(self.write(&mut buffer)).expect("base62 is ASCII");
        f.pad(text)
    }
}

impl From<RequestId> for Arc<str> {
    fn from(id: RequestId) -> Self {
        let mut buffer = [0; REQUEST_ID_BYTES_MAX];
        std::str::from_utf8(id.write(&mut buffer)).expect("base62 is ASCII").into()
    }
}

impl FromStr for RequestId {
    type Err = InvalidRequestId;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        Self::parse(text.as_bytes())
    }
}

/// Hashes ids, by a key of each table so that a peer cannot choose ids that collide.
#[derive(Clone, Copy, Debug)]
pub(crate) struct IdHashes {
    key: u64,
}

impl Default for IdHashes {
    fn default() -> Self {
        Self { key: RandomState::new().hash_one(0) | 1 }
    }
}

impl BuildHasher for IdHashes {
    type Hasher = IdHasher;

    fn build_hasher(&self) -> IdHasher {
        IdHasher { key: self.key, hash: 0 }
    }
}

/// Hasher of [`IdHashes`]: both halves of a long product, since tables use high and low bits.
#[derive(Clone, Copy, Debug)]
pub(crate) struct IdHasher {
    key: u64,
    hash: u64,
}

impl Hasher for IdHasher {
    fn write(&mut self, bytes: &[u8]) {
        bytes.iter().for_each(|byte| self.write_u64(u64::from(*byte)));
    }

    #[allow(clippy::cast_possible_truncation, reason = "each half is meant")]
    fn write_u64(&mut self, id: u64) {
        let product = u128::from(self.hash ^ id ^ self.key.rotate_left(32)) * u128::from(self.key);
        self.hash = product as u64 ^ (product >> 64) as u64;
    }

    fn finish(&self) -> u64 {
        self.hash
    }
}

/// The text is not that of an id.
#[derive(Clone, Copy, PartialEq, Eq, Debug, thiserror::Error)]
#[error("not a request id: base62 without leading zeros, 1 to 11 bytes, at most 2^64 - 1")]
pub struct InvalidRequestId;

/// Which end of a session this is.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
pub enum Side {
    /// Faces clients; makes odd ids.
    Relay,
    /// Beside the service; makes even ids.
    Sidecar,
}

impl Side {
    /// Returns the other end.
    #[must_use]
    pub const fn peer(self) -> Self {
        match self {
            Self::Relay => Self::Sidecar,
            Self::Sidecar => Self::Relay,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn text_is_base62_and_comes_back() {
        for (value, text) in
            [(0, "0"), (1, "1"), (9, "9"), (10, "A"), (35, "Z"), (36, "a"), (61, "z"), (62, "10")]
        {
            assert_eq!(RequestId(value).to_string(), text);
            assert_eq!(text.parse(), Ok(RequestId(value)));
        }
        let longest = RequestId(u64::MAX).to_string();
        assert_eq!(longest.len(), REQUEST_ID_BYTES_MAX);
        assert_eq!(longest.parse(), Ok(RequestId(u64::MAX)));
    }

    #[test]
    fn a_second_text_of_the_same_id_is_refused() {
        for text in ["", "01", "00", "a b", "é", "-1", "zzzzzzzzzzz", "111111111111"] {
            assert_eq!(text.parse::<RequestId>(), Err(InvalidRequestId), "{text}");
        }
    }

    #[test]
    fn parity_says_who_made_it() {
        assert_eq!(RequestId(1).made_by(), Side::Relay);
        assert_eq!(RequestId(2).made_by(), Side::Sidecar);
        assert_eq!(Side::Relay.peer(), Side::Sidecar);
        assert_eq!(Side::Sidecar.peer(), Side::Relay);
    }
}

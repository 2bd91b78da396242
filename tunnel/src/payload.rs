//! What an exchange carries.

use bytes::Bytes;

/// One message of an exchange: a payload that its plugin has encoded, in one or two parts.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Payload {
    /// Number of the payload's field, 9 to 31; 0 where there is no payload, only an end.
    pub field: u32,
    /// Nothing follows in this direction.
    pub end: bool,
    /// First part; empty on receive.
    pub head: Bytes,
    /// Second part; all of the payload on receive.
    pub body: Bytes,
}

impl Payload {
    /// Returns the payload's length in bytes.
    #[must_use]
    pub fn len(&self) -> usize {
        self.head.len() + self.body.len()
    }

    /// Returns whether the payload has no bytes.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.head.is_empty() && self.body.is_empty()
    }
}

/// Why an exchange ended early. Codes are those of [`sidelane_abi::failure`].
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Reset {
    /// One of [`sidelane_abi::failure`].
    pub code: u32,
    /// The protocol's own code (HTTP/2's error code), passed as sent.
    pub protocol_code: Option<u32>,
}

impl Reset {
    /// Returns a reset without a code of the protocol's own.
    #[must_use]
    pub const fn new(code: u32) -> Self {
        Self { code, protocol_code: None }
    }
}

/// What a receive yields.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Received {
    /// A message.
    Message(Payload),
    /// The direction has ended.
    Finished,
    /// The exchange was reset or lost.
    Reset(Reset),
}

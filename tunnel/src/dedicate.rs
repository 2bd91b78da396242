//! What the two ends say of an exchange that moves to a connection of its own: which one it is, on that
//! connection, and on the exchange itself how its bytes go from here on.
//!
//! Bytes that follow a dedicate are the exchange's and stay in the buffer.

use bytes::{Bytes, BytesMut};
use prost::Message as _;

use crate::control::write_control;
use crate::envelope::{self, field};
use crate::handshake::HandshakeError;
use crate::id::RequestId;
use crate::payload::Payload;
use crate::proto::{self, DedicationStage};

/// Longest dedicate accepted: an id, and what frames it.
const DEDICATE_BYTES_MAX: usize = 64;

/// Bit of `features`: this end has dedicated connections.
pub const FEATURE_DEDICATED: u64 = 4;

/// Returns what the relay writes first on a connection that it gives to an exchange.
#[must_use]
pub fn encode_dedicate(id: RequestId) -> Bytes {
    let mut out = Vec::new();
    let message = proto::Dedicate { request_id: id.to_string() };
    write_control(&mut out, None, field::DEDICATE, &message);
    Bytes::from(out)
}

/// Takes it, once it is whole. What follows it is left.
///
/// # Errors
///
/// What came is something else; the connection is to be closed.
pub fn read_dedicate(buffer: &mut BytesMut) -> Result<Option<RequestId>, HandshakeError> {
    const EXPECTED: &str = "45 (dedicate)";
    let Some(envelope) = envelope::read(buffer, DEDICATE_BYTES_MAX)? else { return Ok(None) };
    let found = if envelope.request_id.is_some() { field::REQUEST_ID } else { envelope.field };
    if found != field::DEDICATE {
        return Err(HandshakeError::Unexpected { found, expected: EXPECTED });
    }
    let dedicate = proto::Dedicate::decode(envelope.payload)
        .map_err(|source| HandshakeError::Payload { field: found, source })?;
    dedicate.request_id.parse().map(Some).map_err(|_| HandshakeError::Range {
        field: "request_id",
        found: dedicate.request_id.len() as u64,
        accepted: "base62, 1 to 11 bytes",
    })
}

/// Returns the message of the exchange that says how its bytes go.
#[must_use]
pub fn dedication(stage: DedicationStage) -> Payload {
    let head = proto::Dedication { stage: stage.into() }.encode_to_vec().into();
    Payload { field: sidelane_abi::FIELD_DEDICATION, head, ..Payload::default() }
}

/// Reads it, the last of its direction too; `None`: it is another message, or says what this version does not
/// know.
#[must_use]
pub fn read_dedication(payload: &Payload) -> Option<DedicationStage> {
    if payload.field != sidelane_abi::FIELD_DEDICATION {
        return None;
    }
    let message = proto::Dedication::decode(payload.body.clone()).ok()?;
    DedicationStage::try_from(message.stage).ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_dedicate_leaves_what_follows_it() {
        let id = RequestId(4711);
        let whole = encode_dedicate(id);
        for cut in 0..whole.len() {
            let mut buffer = BytesMut::from(&whole[..cut]);
            assert_eq!(read_dedicate(&mut buffer), Ok(None), "{cut} bytes");
        }
        let mut buffer = BytesMut::from(&whole[..]);
        buffer.extend_from_slice(b"\0\0raw");
        assert_eq!(read_dedicate(&mut buffer), Ok(Some(id)));
        assert_eq!(&buffer[..], b"\0\0raw");
    }

    #[test]
    fn what_is_no_dedicate_is_refused() {
        let mut ping = Vec::new();
        write_control(&mut ping, None, field::PING, &proto::Ping { token: 1 });
        let error = read_dedicate(&mut BytesMut::from(&ping[..])).unwrap_err();
        assert!(error.to_string().contains("45 (dedicate)"), "{error}");
        let mut wrong = Vec::new();
        let message = proto::Dedicate { request_id: "no id!".to_owned() };
        write_control(&mut wrong, None, field::DEDICATE, &message);
        let error = read_dedicate(&mut BytesMut::from(&wrong[..])).unwrap_err();
        assert!(error.to_string().contains("base62"), "{error}");
        // Longer than any dedicate.
        let error = read_dedicate(&mut BytesMut::from(&[0xff, 0xff, 0x03][..])).unwrap_err();
        assert!(matches!(error, HandshakeError::Decode(_)), "{error}");
    }

    #[test]
    fn a_dedication_says_its_stage() {
        for stage in [DedicationStage::Wanted, DedicationStage::Connection, DedicationStage::Framed]
        {
            let sent = dedication(stage);
            let received = Payload { body: sent.head.clone(), head: Bytes::new(), ..sent };
            assert_eq!(read_dedication(&received), Some(stage));
            assert_eq!(read_dedication(&Payload { field: 31, ..received }), None);
        }
    }
}

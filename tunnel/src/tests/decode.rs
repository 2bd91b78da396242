//! What must hold of the decoder for any bytes. Shared by the property tests, the replay of the
//! corpus and the fuzz target, so it uses the crate's public face alone.

use bytes::{Buf, BytesMut};
use prost::Message;
use prost::encoding::{DecodeContext, decode_key, encode_varint, skip_field};
use sidelane_tunnel::envelope::{self, Envelope, Fault};
use sidelane_tunnel::proto::TunnelMessage;

/// Longest message that is tried.
const MESSAGE_BYTES_MAX: usize = 1 << 20;

/// Decodes `message`, framed, by hand and by prost. Neither may panic; what both take must mean the
/// same, also after it is written again; and what prost takes is refused for one reason only: its
/// `request_id` is not an id.
pub(crate) fn check(message: &[u8]) {
    let mut frame = Vec::new();
    encode_varint(message.len() as u64, &mut frame);
    frame.extend_from_slice(message);
    // Fields of a payload that the schema does not name are unknown to prost.
    let expected = match TunnelMessage::decode(message) {
        Ok(expected) if !has_unnamed_payload(message) => Some(expected),
        _ => None,
    };
    let mut buffer = BytesMut::from(&*frame);
    match envelope::read(&mut buffer, MESSAGE_BYTES_MAX) {
        Ok(Some(found)) => {
            assert!(buffer.is_empty(), "a frame is taken whole");
            let rewritten = rewrite(&found);
            if let Some(expected) = expected {
                let meaning = TunnelMessage::decode_length_delimited(&*rewritten);
                assert_eq!(meaning.as_ref(), Ok(&expected));
            }
        }
        Ok(None) => panic!("a whole frame was there"),
        Err(error) => {
            let by_id = matches!(error.fault, Fault::RequestId);
            assert!(by_id || expected.is_none(), "{error}, but prost takes it");
        }
    }
    // The same bytes as a stream, length and all.
    let mut stream = BytesMut::from(message);
    while let Ok(Some(found)) = envelope::read(&mut stream, MESSAGE_BYTES_MAX) {
        rewrite(&found);
    }
}

/// Writes what was read, and reads it again: it must be the same.
fn rewrite(envelope: &Envelope) -> Vec<u8> {
    let mut out = Vec::new();
    envelope::write(&mut out, envelope);
    let mut buffer = BytesMut::from(&*out);
    let again = envelope::read(&mut buffer, 2 * MESSAGE_BYTES_MAX);
    assert_eq!(again.as_ref(), Ok(&Some(envelope.clone())));
    out
}

fn has_unnamed_payload(mut message: &[u8]) -> bool {
    while message.has_remaining() {
        let Ok((number, wire)) = decode_key(&mut message) else { return false };
        if (21..=30).contains(&number) {
            return true;
        }
        if skip_field(wire, number, &mut message, DecodeContext::default()).is_err() {
            return false;
        }
    }
    false
}

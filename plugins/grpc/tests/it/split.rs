//! Any bytes in any frames come out of the splitter as they went in, in chunks that the other end
//! accepts. Shared by the tests and the fuzz target, so it uses the crate's public face alone.

use sidelane_grpc::splitter::{Incoming, Outgoing, SplitError};
use sidelane_plugin::Buf;

/// Most bytes of a chunk.
const CHUNK_BYTES_MAX: usize = 32 * 1024;

/// Longest message allowed in half of the cases.
const MESSAGE_MAX: u32 = 1_000;

/// The first byte says how the rest is cut into frames, and whether messages are bounded.
pub(crate) fn check(input: &[u8]) {
    let Some((&how, bytes)) = input.split_first() else { return };
    let message_max = if how & 1 == 0 { u32::MAX } else { MESSAGE_MAX };
    let frame = usize::from(how >> 1) * 7 + 1;
    let frames: Vec<&[u8]> = bytes.chunks(frame).collect();
    let _ = split(&frames, message_max);
}

/// Splits `frames`; `Ok`: how many messages there were.
pub(crate) fn split(frames: &[&[u8]], message_max: u32) -> Result<u32, SplitError> {
    let all = frames.concat();
    let expected = walk(&all, message_max);
    let (mut outgoing, mut incoming) = (Outgoing::new(message_max), Incoming::new(message_max));
    let (mut arrived, mut messages, mut ended) = (Vec::new(), 0u32, false);
    let last = frames.len().saturating_sub(1);
    let none: &[&[u8]] = &[&[]];
    for (index, frame) in if frames.is_empty() { none } else { frames }.iter().enumerate() {
        let mut bytes = Buf::copy_from_slice(frame);
        loop {
            let piece = match outgoing.next(&mut bytes, index == last) {
                Ok(Some(piece)) => piece,
                Ok(None) => break,
                Err(error) => {
                    assert_eq!(expected, Err(error));
                    assert!(all.starts_with(&arrived));
                    return Err(error);
                }
            };
            assert!(!ended, "a chunk behind the last");
            assert!(piece.body.len() <= CHUNK_BYTES_MAX);
            let count = if piece.messages > 1 {
                assert!(!piece.first && !piece.last && !piece.partial);
                incoming.batch(&piece.body, piece.sequence, piece.messages)
            } else {
                let (first, last) = (piece.first, piece.last);
                incoming.chunk(&piece.body, piece.sequence, first, last, piece.partial)
            };
            assert_eq!(count, Ok(piece.messages));
            arrived.extend_from_slice(&piece.body);
            messages += piece.messages;
            ended = piece.last;
        }
        assert!(bytes.is_empty());
    }
    assert!(ended && incoming.at_boundary());
    assert_eq!(arrived, all);
    assert_eq!(expected, Ok(messages));
    Ok(messages)
}

/// What is to be expected, read in the plainest way.
fn walk(mut bytes: &[u8], message_max: u32) -> Result<u32, SplitError> {
    let mut messages = 0;
    while !bytes.is_empty() {
        let Some((prefix, rest)) = bytes.split_first_chunk::<5>() else {
            return Err(SplitError::Truncated);
        };
        let len = u32::from_be_bytes([prefix[1], prefix[2], prefix[3], prefix[4]]);
        if len > message_max {
            return Err(SplitError::TooLarge);
        }
        let Some(rest) = rest.get(len as usize..) else { return Err(SplitError::Truncated) };
        bytes = rest;
        messages += 1;
    }
    Ok(messages)
}

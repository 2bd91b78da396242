//! gRPC by hand on HTTP/2: length-prefixed messages, status in trailers.

pub(crate) mod load;
pub(crate) mod server;

use bytes::{BufMut, Bytes, BytesMut};

const UNARY_PATH: &str = "/bench.Echo/Unary";
const STREAM_PATH: &str = "/bench.Echo/Stream";
/// Flag and length in front of a message.
const PREFIX_BYTES: usize = 5;
/// Windows of a stream and of a connection, as common gRPC stacks grow them to.
const STREAM_WINDOW: u32 = 1024 * 1024;
const CONNECTION_WINDOW: u32 = 4 * 1024 * 1024;

/// What is called.
#[derive(Clone, Copy)]
pub(crate) enum Call {
    Unary,
    Stream { messages: u32 },
}

/// Returns a message with its prefix, which begins with a number and has `bytes` bytes.
fn message(number: u32, bytes: usize) -> Bytes {
    let mut message = BytesMut::with_capacity(PREFIX_BYTES + bytes);
    message.put_u8(0);
    message.put_u32(u32::try_from(bytes).expect("messages of a load are short"));
    message.put_u32(number);
    message.put_bytes(b'x', bytes - 4);
    message.freeze()
}

/// Takes a message, without its prefix; `None` where it is not there whole.
fn take_message(inbox: &mut BytesMut) -> Option<BytesMut> {
    let prefix = inbox.get(..PREFIX_BYTES)?;
    let length = u32::from_be_bytes([prefix[1], prefix[2], prefix[3], prefix[4]]) as usize;
    if inbox.len() - PREFIX_BYTES < length {
        return None;
    }
    let mut message = inbox.split_to(PREFIX_BYTES + length);
    Some(message.split_off(PREFIX_BYTES))
}

/// Returns the number that a message begins with.
fn number(message: &[u8]) -> Option<u32> {
    Some(u32::from_be_bytes(message.get(..4)?.try_into().ok()?))
}

#[cfg(test)]
mod tests {
    use bytes::BytesMut;

    use super::{message, number, take_message};

    #[test]
    fn messages_are_taken_one_by_one() {
        let mut inbox = BytesMut::from(&message(7, 125)[..]);
        inbox.extend_from_slice(&message(8, 4)[..8]);
        let first = take_message(&mut inbox).unwrap();
        assert_eq!((first.len(), number(&first)), (125, Some(7)));
        assert!(take_message(&mut inbox).is_none());
        inbox.extend_from_slice(&message(8, 4)[8..]);
        assert_eq!(number(&take_message(&mut inbox).unwrap()), Some(8));
        assert!(take_message(&mut inbox).is_none());
    }
}

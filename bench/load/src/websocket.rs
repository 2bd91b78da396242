//! WebSocket by hand: frames of the three lengths, one mask for all.

pub(crate) mod load;
pub(crate) mod server;

use anyhow::{Result, ensure};

const OPCODE_BINARY: u8 = 0x2;
const OPCODE_CLOSE: u8 = 0x8;
const OPCODE_PING: u8 = 0x9;
const OPCODE_PONG: u8 = 0xa;
/// Masks need not be random for peers that are ours; this one changes every byte.
const MASK: [u8; 4] = [0x5a, 0xa5, 0x3c, 0xc3];
/// Largest handshake head that is read.
const HEAD_BYTES_MAX: usize = 16 * 1024;
/// What one read takes: more than all frames in flight of a connection.
const READ_BYTES: usize = 16 * 1024;

/// Where a frame lies in a buffer that holds it whole.
struct Frame {
    fin: bool,
    opcode: u8,
    mask: Option<[u8; 4]>,
    /// Offset of the payload.
    payload: usize,
    /// Offset of what follows.
    end: usize,
}

/// Finds the frame at the front of a buffer; `None` where it is not there whole.
fn frame(bytes: &[u8]) -> Result<Option<Frame>> {
    let [first, second, ..] = *bytes else { return Ok(None) };
    ensure!(first & 0x70 == 0, "reserved bits in {first:#x}");
    let (length, mut at) = match second & 0x7f {
        126 => match bytes.get(2..4) {
            Some(length) => (usize::from(u16::from_be_bytes([length[0], length[1]])), 4),
            None => return Ok(None),
        },
        127 => match bytes.get(2..10).and_then(|length| length.try_into().ok()) {
            Some(length) => (usize::try_from(u64::from_be_bytes(length))?, 10),
            None => return Ok(None),
        },
        length => (usize::from(length), 2),
    };
    let mut mask = None;
    if second & 0x80 != 0 {
        let Some(bytes) = bytes.get(at..at + 4) else { return Ok(None) };
        mask = Some([bytes[0], bytes[1], bytes[2], bytes[3]]);
        at += 4;
    }
    if bytes.len() - at < length {
        return Ok(None);
    }
    let (fin, opcode) = (first & 0x80 != 0, first & 0xf);
    Ok(Some(Frame { fin, opcode, mask, payload: at, end: at + length }))
}

/// Writes the head of a frame. Lengths beyond 64 KiB are not sent here.
fn put_head(out: &mut Vec<u8>, fin: bool, opcode: u8, length: usize, mask: Option<[u8; 4]>) {
    let masked = if mask.is_some() { 0x80 } else { 0 };
    out.push(if fin { 0x80 } else { 0 } | opcode);
    match u8::try_from(length) {
        Ok(length) if length < 126 => out.push(masked | length),
        _ => {
            let length = u16::try_from(length).expect("messages of a load are short");
            out.push(masked | 126);
            out.extend_from_slice(&length.to_be_bytes());
        }
    }
    out.extend_from_slice(mask.as_ref().map_or(&[], |mask| mask.as_slice()));
}

fn apply(mask: [u8; 4], bytes: &mut [u8]) {
    for (index, byte) in bytes.iter_mut().enumerate() {
        *byte ^= mask[index & 3];
    }
}

/// Returns the length of the head at the front of a buffer, its empty line included.
fn head_length(bytes: &[u8]) -> Option<usize> {
    bytes.windows(4).position(|four| four == b"\r\n\r\n").map(|at| at + 4)
}

/// Returns a header's value from a head.
fn header<'a>(head: &'a str, name: &str) -> Option<&'a str> {
    head.split("\r\n").skip(1).find_map(|line| {
        let (field, value) = line.split_once(':')?;
        field.eq_ignore_ascii_case(name).then(|| value.trim())
    })
}

#[cfg(test)]
mod tests {
    use super::{MASK, OPCODE_BINARY, apply, frame, header, put_head};

    #[test]
    fn a_frame_is_found_once_it_is_whole() {
        for length in [0, 1, 125, 126, 300, 65535] {
            for mask in [None, Some(MASK)] {
                let mut bytes = Vec::new();
                put_head(&mut bytes, true, OPCODE_BINARY, length, mask);
                let payload = bytes.len();
                bytes.resize(payload + length, b'x');
                for cut in 0..bytes.len().min(20) {
                    assert!(frame(&bytes[..cut]).unwrap().is_none(), "{length} cut at {cut}");
                }
                let found = frame(&bytes).unwrap().unwrap();
                assert_eq!((found.payload, found.end), (payload, bytes.len()));
                assert_eq!(found.mask, mask);
            }
        }
    }

    #[test]
    fn a_mask_undoes_itself() {
        let mut bytes = *b"seven b";
        apply(MASK, &mut bytes);
        assert_ne!(&bytes, b"seven b");
        apply(MASK, &mut bytes);
        assert_eq!(&bytes, b"seven b");
    }

    #[test]
    fn a_header_is_found_by_any_case() {
        let head = "GET / HTTP/1.1\r\nsec-websocket-key:  k=\r\n\r\n";
        assert_eq!(header(head, "Sec-WebSocket-Key"), Some("k="));
        assert_eq!(header(head, "Upgrade"), None);
    }
}

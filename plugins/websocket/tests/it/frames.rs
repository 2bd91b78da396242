//! Frames as bytes.

pub(crate) const MASK: [u8; 4] = [0x11, 0x22, 0x33, 0x44];

pub(crate) const TEXT: u8 = 0x81;
pub(crate) const BINARY: u8 = 0x82;
pub(crate) const CLOSE: u8 = 0x88;
pub(crate) const PING: u8 = 0x89;
pub(crate) const PONG: u8 = 0x8a;

fn header(first: u8, masked: bool, len: usize) -> Vec<u8> {
    let mask = if masked { 0x80 } else { 0 };
    let mut out = vec![first];
    match len {
        0..126 => out.push(mask | u8::try_from(len).expect("below 126")),
        126..=0xffff => {
            out.push(mask | 126);
            out.extend_from_slice(&u16::try_from(len).expect("of 16 bits").to_be_bytes());
        }
        _ => {
            out.push(mask | 127);
            out.extend_from_slice(&(len as u64).to_be_bytes());
        }
    }
    out
}

/// A service's frame.
pub(crate) fn plain(first: u8, payload: &[u8]) -> Vec<u8> {
    [header(first, false, payload.len()), payload.to_vec()].concat()
}

/// A client's frame.
pub(crate) fn masked(first: u8, payload: &[u8]) -> Vec<u8> {
    masked_with(first, MASK, payload)
}

pub(crate) fn masked_with(first: u8, key: [u8; 4], payload: &[u8]) -> Vec<u8> {
    let mut out = header(first, true, payload.len());
    out.extend_from_slice(&key);
    out.extend(payload.iter().zip(key.iter().cycle()).map(|(byte, key)| byte ^ key));
    out
}

/// A close frame's payload.
pub(crate) fn code(code: u16) -> [u8; 2] {
    code.to_be_bytes()
}

/// Reads a short masked frame: its first byte and what it says.
pub(crate) fn unmask(frame: &[u8]) -> (u8, Vec<u8>) {
    assert_eq!(usize::from(frame[1]), 0x80 | (frame.len() - 6), "one masked frame: {frame:02x?}");
    let payload = frame[6..].iter().zip(frame[2..6].iter().cycle());
    (frame[0], payload.map(|(byte, key)| byte ^ key).collect())
}

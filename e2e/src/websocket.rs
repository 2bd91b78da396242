//! WebSocket as bytes: frames that are written as a test says, right or wrong, and read without
//! repair, for a client and for a service.

use std::io;
use std::net::SocketAddr;

use base64::Engine as _;
use sha1::{Digest as _, Sha1};

use crate::client::{Answer, Client, Head};
use crate::service::{Connection, Request};
use crate::stage::Stage;

/// A key as a client may choose it: RFC 6455's example.
pub const KEY: &str = "dGhlIHNhbXBsZSBub25jZQ==";
/// A masking key whose every byte differs.
pub const MASK: [u8; 4] = [0x37, 0xfa, 0x21, 0x3d];

/// Opcodes.
pub const CONTINUATION: u8 = 0x0;
/// Text.
pub const TEXT: u8 = 0x1;
/// Binary.
pub const BINARY: u8 = 0x2;
/// Close.
pub const CLOSE: u8 = 0x8;
/// Ping.
pub const PING: u8 = 0x9;
/// Pong.
pub const PONG: u8 = 0xA;

/// One frame. The payload is as it means, without the mask.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Frame {
    /// Last of its message.
    pub fin: bool,
    /// Reserved bits: RSV1 is 4.
    pub rsv: u8,
    /// Opcode.
    pub opcode: u8,
    /// Masking key.
    pub mask: Option<[u8; 4]>,
    /// Payload.
    pub payload: Vec<u8>,
}

impl Frame {
    /// A whole unmasked frame.
    #[must_use]
    pub fn new(opcode: u8, payload: impl Into<Vec<u8>>) -> Self {
        Self { fin: true, rsv: 0, opcode, mask: None, payload: payload.into() }
    }

    /// A close frame.
    #[must_use]
    pub fn close(code: u16, reason: &str) -> Self {
        Self::new(CLOSE, [&code.to_be_bytes(), reason.as_bytes()].concat())
    }

    /// The same with a masking key, as clients send.
    #[must_use]
    pub fn masked(mut self, key: [u8; 4]) -> Self {
        self.mask = Some(key);
        self
    }

    /// The same, with more of its message to come.
    #[must_use]
    pub fn unfinished(mut self) -> Self {
        self.fin = false;
        self
    }

    /// The same with reserved bits.
    #[must_use]
    pub fn rsv(mut self, bits: u8) -> Self {
        self.rsv = bits;
        self
    }

    /// Returns a close frame's code and reason; `None` for other frames and a close without a code.
    #[must_use]
    pub fn close_code(&self) -> Option<(u16, String)> {
        let (code, reason) = self.payload.split_first_chunk().filter(|_| self.opcode == CLOSE)?;
        Some((u16::from_be_bytes(*code), String::from_utf8_lossy(reason).into_owned()))
    }

    /// Returns the frame as it stands on the wire, its length in the shortest form.
    #[must_use]
    pub fn bytes(&self) -> Vec<u8> {
        let mut bytes = self.header(self.payload.len() as u64);
        let start = bytes.len();
        bytes.extend_from_slice(&self.payload);
        if let Some(key) = self.mask {
            apply(key, &mut bytes[start..]);
        }
        bytes
    }

    /// Returns a header that promises `length` bytes, whatever the payload has.
    #[must_use]
    pub fn header(&self, length: u64) -> Vec<u8> {
        let mask = if self.mask.is_some() { 0x80 } else { 0 };
        let mut bytes = vec![u8::from(self.fin) << 7 | self.rsv << 4 | self.opcode];
        match (u8::try_from(length), u16::try_from(length)) {
            (Ok(short @ ..=125), _) => bytes.push(mask | short),
            (_, Ok(medium)) => {
                bytes.push(mask | 126);
                bytes.extend(medium.to_be_bytes());
            }
            _ => {
                bytes.push(mask | 127);
                bytes.extend(length.to_be_bytes());
            }
        }
        bytes.extend(self.mask.unwrap_or_default().iter().take(if mask == 0 { 0 } else { 4 }));
        bytes
    }

    /// Reads a frame from whatever reads exactly so many bytes.
    pub fn read(mut exactly: impl FnMut(usize) -> io::Result<Vec<u8>>) -> io::Result<Self> {
        let head = exactly(2)?;
        let length = match head[1] & 0x7f {
            126 => exactly(2)?,
            127 => exactly(8)?,
            short => vec![short],
        };
        let length = length.iter().fold(0, |sum, byte| sum << 8 | usize::from(*byte));
        let mask = if head[1] & 0x80 == 0 { None } else { exactly(4)?.first_chunk().copied() };
        let mut payload = exactly(length)?;
        if let Some(key) = mask {
            apply(key, &mut payload);
        }
        Ok(Self {
            fin: head[0] & 0x80 != 0,
            rsv: head[0] >> 4 & 7,
            opcode: head[0] & 0xf,
            mask,
            payload,
        })
    }
}

fn apply(key: [u8; 4], bytes: &mut [u8]) {
    for (byte, key) in bytes.iter_mut().zip(key.iter().cycle()) {
        *byte ^= key;
    }
}

/// Returns what a service answers to a key (RFC 6455, 4.2.2).
#[must_use]
pub fn accept(key: &[u8]) -> String {
    let digest = Sha1::new_with_prefix(key).chain_update("258EAFA5-E914-47DA-95CA-C5AB0DC85B11");
    base64::engine::general_purpose::STANDARD.encode(digest.finalize())
}

/// Returns the bytes of a handshake, with more lines that each end with CRLF.
#[must_use]
pub fn handshake(host: &str, path: &str, lines: &str) -> Vec<u8> {
    format!(
        "GET {path} HTTP/1.1\r\nHost: {host}\r\nUpgrade: websocket\r\nConnection: Upgrade\r\nSec-WebSocket-Key: {KEY}\r\nSec-WebSocket-Version: 13\r\n{lines}\r\n"
    )
    .into_bytes()
}

/// A client's end of an open WebSocket.
#[derive(Debug)]
pub struct Socket {
    /// The connection.
    pub client: Client,
    /// The head of the 101.
    pub head: Head,
}

impl Socket {
    /// Opens `ws://api.localhost/`.
    #[must_use]
    pub fn open(relay: SocketAddr) -> Self {
        Self::open_with(relay, "/", "")
    }

    /// Opens a path with more lines in the handshake.
    #[must_use]
    pub fn open_with(relay: SocketAddr, path: &str, lines: &str) -> Self {
        Self::open_over(Client::connect(relay), path, lines)
    }

    /// The same on a connection that stands.
    #[must_use]
    pub fn open_over(mut client: Client, path: &str, lines: &str) -> Self {
        client.send(handshake("api.localhost", path, lines));
        let head = client.head();
        assert_eq!(head.status, 101, "{head:?}");
        Self { client, head }
    }

    /// Sends a frame, masked with [`MASK`].
    pub fn send(&mut self, frame: Frame) {
        self.client.send(frame.masked(MASK).bytes());
    }

    /// Reads the next frame.
    #[must_use]
    pub fn frame(&mut self) -> Frame {
        self.try_frame().expect("a frame")
    }

    /// Reads the next frame; fails where the connection ends before it does.
    pub fn try_frame(&mut self) -> io::Result<Frame> {
        Frame::read(|length| self.client.exactly(length))
    }

    /// Sends a text and expects it back.
    pub fn says_back(&mut self, text: &str) {
        self.send(Frame::new(TEXT, text));
        assert_eq!(self.frame(), Frame::new(TEXT, text));
    }

    /// Expects a close frame, and the connection's end after it.
    pub fn closes(mut self, name: &str) -> (u16, String) {
        let close = loop {
            let frame = self.try_frame().unwrap_or_else(|error| panic!("{name}: {error}"));
            if frame.opcode == CLOSE {
                break frame;
            }
        };
        assert!(close.mask.is_none(), "{name}: {close:?}");
        // A client that answers is one that a proxy may wait for.
        let _ = self.client.try_send(&close.clone().masked(MASK).bytes());
        let rest = self.client.rest();
        assert!(rest.is_empty(), "{name}: {rest:?} after the close frame");
        close.close_code().unwrap_or_else(|| panic!("{name}: a close without a code"))
    }
}

/// Returns the answer to a handshake that is refused.
#[must_use]
pub fn refusal(relay: SocketAddr, host: &str, path: &str) -> Answer {
    let mut client = Client::connect(relay);
    client.send(handshake(host, path, ""));
    client.answer("GET")
}

impl Connection {
    /// Reads a handshake and accepts it, with more lines that each end with CRLF.
    pub fn accept(&mut self, lines: &str) -> io::Result<Request> {
        let request = self.request()?.ok_or(io::ErrorKind::UnexpectedEof)?;
        self.upgrade(&request, lines)?;
        Ok(request)
    }

    /// Accepts a handshake that was read.
    pub fn upgrade(&mut self, request: &Request, lines: &str) -> io::Result<()> {
        let key = request.all("sec-websocket-key").next().unwrap_or_default();
        self.write(format!(
            "HTTP/1.1 101 Switching Protocols\r\nUpgrade: websocket\r\nConnection: Upgrade\r\nSec-WebSocket-Accept: {}\r\n{lines}\r\n",
            accept(key)
        ))
    }

    /// Reads the next frame.
    pub fn frame(&mut self) -> io::Result<Frame> {
        Frame::read(|length| self.exactly(length))
    }

    /// Sends messages back and answers pings, until the client closes; closes as it did.
    pub fn echo(&mut self) -> io::Result<()> {
        loop {
            let mut frame = self.frame()?;
            frame.mask = None;
            if frame.opcode == PING {
                frame.opcode = PONG;
            }
            self.write(frame.bytes())?;
            if frame.opcode == CLOSE {
                return Ok(());
            }
        }
    }
}

impl Stage {
    /// A service that runs a script for each open WebSocket.
    pub fn websocket<F>(script: F) -> Self
    where
        F: Fn(&mut Connection) -> io::Result<()> + Send + Sync + 'static,
    {
        Self::script_with(
            |setup| setup.websocket("{}"),
            move |connection| {
                connection.accept("")?;
                script(connection)
            },
        )
    }

    /// Opens `ws://api.localhost/`.
    #[must_use]
    pub fn open(&self) -> Socket {
        Socket::open(self.sidelane.web())
    }
}

#[cfg(test)]
mod tests {
    use super::{Frame, KEY, MASK, TEXT, accept};

    #[test]
    fn frames_are_those_of_the_rfc() {
        let hello = Frame::new(TEXT, "Hello");
        assert_eq!(hello.bytes(), [0x81, 5, 0x48, 0x65, 0x6c, 0x6c, 0x6f]);
        let masked = hello.masked(MASK);
        let bytes = [0x81, 0x85, 0x37, 0xfa, 0x21, 0x3d, 0x7f, 0x9f, 0x4d, 0x51, 0x58];
        assert_eq!(masked.bytes(), bytes);
        let mut rest = bytes.as_slice();
        let read = Frame::read(|length| {
            let (head, tail) = rest.split_at(length);
            rest = tail;
            Ok(head.to_vec())
        });
        assert_eq!(read.unwrap(), masked);
        for (length, header) in [(125, 2), (126, 4), (65_535, 4), (65_536, 10)] {
            assert_eq!(Frame::new(TEXT, "").header(length).len(), header, "{length}");
        }
        assert_eq!(accept(KEY.as_bytes()), "s3pPLMBiTxaQ9kYGzzhZRbK+xOo=");
    }
}

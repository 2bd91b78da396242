//! Interim responses, which hyper's server cannot send: written past it (`front::wire`).

use http::header::{CONNECTION, CONTENT_LENGTH, TE, TRAILER, TRANSFER_ENCODING, UPGRADE};
use http::{HeaderMap, HeaderName, StatusCode};

/// Fields that would say something of the connection, or of a body that an interim response cannot
/// have (RFC 9110 §15.2, §8.6).
const DROPPED: [HeaderName; 8] = [
    CONNECTION,
    CONTENT_LENGTH,
    HeaderName::from_static("keep-alive"),
    HeaderName::from_static("proxy-connection"),
    TE,
    TRAILER,
    TRANSFER_ENCODING,
    UPGRADE,
];

/// Returns an interim response as HTTP/1.1 has it on the wire.
pub(super) fn encode(status: StatusCode, headers: &HeaderMap) -> Vec<u8> {
    let mut bytes = Vec::with_capacity(32 + 64 * headers.len());
    bytes.extend_from_slice(b"HTTP/1.1 ");
    bytes.extend_from_slice(status.as_str().as_bytes());
    // RFC 9112 §4: the space stands also where no reason follows.
    bytes.push(b' ');
    bytes.extend_from_slice(status.canonical_reason().unwrap_or_default().as_bytes());
    bytes.extend_from_slice(b"\r\n");
    for (name, value) in headers.iter().filter(|(name, _)| !DROPPED.contains(name)) {
        bytes.extend_from_slice(name.as_str().as_bytes());
        bytes.extend_from_slice(b": ");
        // A `HeaderValue` holds no line break, so no field can end the head or begin another.
        bytes.extend_from_slice(value.as_bytes());
        bytes.extend_from_slice(b"\r\n");
    }
    bytes.extend_from_slice(b"\r\n");
    bytes
}

#[cfg(test)]
mod tests {
    use http::HeaderValue;

    use super::*;
    use crate::front::wire::CONTINUE;

    #[test]
    fn a_bare_100_is_what_hyper_would_write() {
        assert_eq!(encode(StatusCode::CONTINUE, &HeaderMap::new()), CONTINUE);
    }

    #[test]
    fn fields_pass_but_those_of_framing_and_connection() {
        let mut headers = HeaderMap::new();
        for (name, value) in [
            ("link", "</a>"),
            ("connection", "close"),
            ("content-length", "3"),
            ("transfer-encoding", "chunked"),
            ("upgrade", "h2c"),
            ("link", "</b\u{e9}>"),
        ] {
            let name = HeaderName::from_static(name);
            headers.append(name, HeaderValue::from_bytes(value.as_bytes()).unwrap());
        }
        let text = String::from_utf8(encode(StatusCode::EARLY_HINTS, &headers)).unwrap();
        assert_eq!(text, "HTTP/1.1 103 Early Hints\r\nlink: </a>\r\nlink: </b\u{e9}>\r\n\r\n");
        let unknown = encode(StatusCode::from_u16(199).unwrap(), &HeaderMap::new());
        assert_eq!(unknown, b"HTTP/1.1 199 \r\n\r\n");
    }
}

//! gRPC's status codes: what a failure of ours is, what a reset of HTTP/2 is, and how both are said.

use sidelane_plugin::{Closed, HeaderList, Reset, Responder, ResponseHead, failure};

pub(crate) const CANCELLED: u8 = 1;
pub(crate) const UNKNOWN: u8 = 2;
pub(crate) const DEADLINE_EXCEEDED: u8 = 4;
pub(crate) const PERMISSION_DENIED: u8 = 7;
pub(crate) const RESOURCE_EXHAUSTED: u8 = 8;
pub(crate) const UNIMPLEMENTED: u8 = 12;
pub(crate) const INTERNAL: u8 = 13;
pub(crate) const UNAVAILABLE: u8 = 14;
pub(crate) const UNAUTHENTICATED: u8 = 16;

/// HTTP/2's error codes that are spoken of here (RFC 9113 §7).
pub(crate) mod h2_code {
    pub(crate) const INTERNAL_ERROR: u32 = 2;
    pub(crate) const REFUSED_STREAM: u32 = 7;
    pub(crate) const CANCEL: u32 = 8;
    pub(crate) const ENHANCE_YOUR_CALM: u32 = 11;
    pub(crate) const INADEQUATE_SECURITY: u32 = 12;
}

struct Row {
    code: u32,
    status: u8,
    text: &'static str,
}

const fn row(code: u32, status: u8, text: &'static str) -> Row {
    Row { code, status, text }
}

/// Every code but `NONE`.
const TABLE: &[Row] = &[
    row(failure::CANCELLED, CANCELLED, "the exchange was cancelled"),
    row(failure::NO_ROUTE, UNIMPLEMENTED, "no route takes this name and path"),
    row(failure::NO_SIDECAR, UNAVAILABLE, "no sidecar is connected for this route"),
    row(failure::NO_PROTOCOL, UNAVAILABLE, "no connected sidecar carries this protocol"),
    row(failure::SERVICE_UNREACHABLE, UNAVAILABLE, "the service cannot be reached"),
    row(failure::SERVICE_RESET, UNAVAILABLE, "the service closed the connection"),
    row(failure::SERVICE_INVALID, INTERNAL, "the service sent what its protocol does not allow"),
    row(failure::SERVICE_TIMEOUT, DEADLINE_EXCEEDED, "the deadline was exceeded"),
    row(failure::RATE_LIMITED, RESOURCE_EXHAUSTED, "too many requests"),
    row(failure::OVERLOADED, UNAVAILABLE, "too much is going on here"),
    row(failure::TOO_LARGE, RESOURCE_EXHAUSTED, "a message is larger than allowed"),
    row(failure::TUNNEL_LOST, UNAVAILABLE, "the tunnel to the service was lost"),
    row(failure::CLIENT_GONE, CANCELLED, "the client broke off"),
    row(failure::BAD_REQUEST, INTERNAL, "the request is not what gRPC allows"),
    row(failure::FLOW_CONTROL, INTERNAL, "a peer of the tunnel ignored its credit"),
    row(failure::PLUGIN_FAILED, INTERNAL, "the protocol plugin failed"),
    row(failure::DRAINING, UNAVAILABLE, "this end is going away"),
    row(failure::FORBIDDEN, PERMISSION_DENIED, "not allowed"),
    row(failure::INTERNAL, INTERNAL, "a defect on our side"),
    row(failure::UNSUPPORTED, UNIMPLEMENTED, "not supported"),
    row(failure::CLIENT_TIMEOUT, DEADLINE_EXCEEDED, "the client took too long"),
    row(failure::UNAUTHORIZED, UNAUTHENTICATED, "who asks is not known here"),
    // On a connection of its own the call may go through.
    row(failure::MISDIRECTED, UNAVAILABLE, "this connection is for another host"),
];

/// Returns the status of a stream that was reset with `code` (PROTOCOL-HTTP2.md, "Errors").
pub(crate) const fn of_h2_code(code: u32) -> u8 {
    match code {
        // STREAM_CLOSED and HTTP_1_1_REQUIRED have no mapping.
        0..=4 | 6 | 9 | 10 => INTERNAL,
        h2_code::REFUSED_STREAM => UNAVAILABLE,
        h2_code::CANCEL => CANCELLED,
        h2_code::ENHANCE_YOUR_CALM => RESOURCE_EXHAUSTED,
        h2_code::INADEQUATE_SECURITY => PERMISSION_DENIED,
        _ => UNKNOWN,
    }
}

/// What a client is told.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Told {
    pub(crate) status: u8,
    /// `x-sidelane-error`.
    pub(crate) error: &'static str,
    /// `grpc-message`, not yet encoded.
    pub(crate) message: String,
}

impl Told {
    /// Tells why the exchange ended. `detail`: one line for people; empty: the table's.
    pub(crate) fn new(reset: Reset, detail: &str) -> Self {
        let row = TABLE.iter().find(|row| row.code == reset.code);
        let (mut status, text) =
            row.map_or((UNKNOWN, "failed for an unknown reason"), |row| (row.status, row.text));
        let error = failure::name(reset.code);
        let mut message = format!("{error}: {}", if detail.is_empty() { text } else { detail });
        if let (failure::SERVICE_RESET, Some(code)) = (reset.code, reset.protocol_code) {
            status = of_h2_code(code);
            message = format!("{error}: the service reset the stream (HTTP/2 error {code})");
        }
        Self { status, error, message }
    }

    /// Answers with it alone: Trailers-Only.
    pub(crate) fn answer(&self, responder: &mut Responder) -> Result<(), Closed> {
        self.say(&[(b"content-type", b"application/grpc")], |headers| {
            responder.head(ResponseHead { status: 200, headers, body_length: None }, None, true)
        })
    }

    /// Ends an answer with it, as trailers.
    pub(crate) fn finish(&self, responder: &mut Responder) -> Result<(), Closed> {
        self.say(&[], |trailers| responder.finish(Some(trailers)))
    }

    fn say(
        &self,
        before: &[(&[u8], &[u8])],
        send: impl FnOnce(&HeaderList<'_>) -> Result<(), Closed>,
    ) -> Result<(), Closed> {
        let status = self.status.to_string();
        let message = percent_encode(&self.message);
        let mut headers = HeaderList::with_capacity(before.len() + 3);
        headers.extend(before.iter().copied());
        headers.push(b"grpc-status", status.as_bytes());
        headers.push(b"grpc-message", message.as_bytes());
        headers.push(b"x-sidelane-error", self.error.as_bytes());
        send(&headers)
    }
}

/// Returns the HTTP/2 code of a response that is broken off for `reset`, chosen so that a client reads
/// the status from it that it would have been told.
pub(crate) fn abort_code(reset: Reset) -> u32 {
    if let Some(code) = reset.protocol_code {
        return code;
    }
    match Told::new(reset, "").status {
        CANCELLED | DEADLINE_EXCEEDED => h2_code::CANCEL,
        RESOURCE_EXHAUSTED => h2_code::ENHANCE_YOUR_CALM,
        PERMISSION_DENIED => h2_code::INADEQUATE_SECURITY,
        // Not REFUSED_STREAM for UNAVAILABLE: that promises that nothing was processed.
        _ => h2_code::INTERNAL_ERROR,
    }
}

/// Encodes a `grpc-message` (PROTOCOL-HTTP2.md, "Percent-Encoded").
fn percent_encode(text: &str) -> String {
    const HEX: &[u8; 16] = b"0123456789ABCDEF";
    let mut out = String::with_capacity(text.len());
    for byte in text.bytes() {
        if matches!(byte, b' '..=b'~') && byte != b'%' {
            out.push(char::from(byte));
        } else {
            out.push('%');
            out.push(char::from(HEX[usize::from(byte >> 4)]));
            out.push(char::from(HEX[usize::from(byte & 15)]));
        }
    }
    out
}

/// Reads a `grpc-status`.
pub(crate) fn parse(value: &[u8]) -> Option<u32> {
    str::from_utf8(value).ok()?.parse().ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_code_has_its_row() {
        let codes: Vec<u32> = (1..).take_while(|code| failure::name(*code) != "unknown").collect();
        let readme = include_str!("../README.md");
        for code in codes {
            assert_eq!(TABLE.iter().filter(|row| row.code == code).count(), 1, "code {code}");
            let told = Told::new(Reset::new(code), "");
            let row = format!("| `{}` | {} ", told.error, told.status);
            assert!(readme.contains(&row), "README.md lacks {row}");
        }
    }

    #[test]
    fn resets_are_mapped_as_the_protocol_says() {
        let statuses: Vec<u8> = (0..=14).map(of_h2_code).collect();
        assert_eq!(statuses, [13, 13, 13, 13, 13, 2, 13, 14, 1, 13, 13, 8, 7, 2, 2]);
    }

    #[test]
    fn messages_are_percent_encoded() {
        assert_eq!(percent_encode("a b%c\nü~"), "a b%25c%0A%C3%BC~");
    }

    #[test]
    fn statuses_are_numbers() {
        assert_eq!(parse(b"0"), Some(0));
        assert_eq!(parse(b"16"), Some(16));
        assert_eq!(parse(b""), None);
        assert_eq!(parse(b"OK"), None);
    }
}

//! Answers that the front makes itself: refused requests, and exchanges that ended before they had
//! a response.
//!
//! A plugin says failures in its protocol's words; what stands here is for the cases in which no
//! plugin can.

use bytes::Bytes;
use http::header::{
    CONTENT_LENGTH, CONTENT_TYPE, HeaderName, HeaderValue, RETRY_AFTER, TRANSFER_ENCODING,
};
use http::{HeaderMap, StatusCode};
use sidelane_abi::failure;

use crate::plugin::lend::{Reset, ResponseHead};

/// Names the failure to programs.
pub(super) const X_SIDELANE_ERROR: HeaderName = HeaderName::from_static("x-sidelane-error");

/// Seconds after which a client may try again what failed for want of a sidecar or of room: about
/// what a sidecar needs to reconnect.
const RETRY_AFTER_S: HeaderValue = HeaderValue::from_static("1");

/// A request that is refused before anyone sees it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Refusal {
    /// One of [`failure`].
    pub(super) code: u32,
    pub(super) status: StatusCode,
    /// One line for people.
    pub(super) reason: &'static str,
}

impl Refusal {
    pub(super) const fn bad_request(reason: &'static str) -> Self {
        Self { code: failure::BAD_REQUEST, status: StatusCode::BAD_REQUEST, reason }
    }

    pub(super) const fn unsupported(reason: &'static str) -> Self {
        Self { code: failure::UNSUPPORTED, status: StatusCode::NOT_IMPLEMENTED, reason }
    }

    /// Returns the answer to an exchange that ended by `code` without a response.
    pub(super) fn of_code(code: u32) -> Self {
        let (status, reason) = match code {
            failure::NO_ROUTE => (StatusCode::NOT_FOUND, "no route takes this name and path"),
            failure::NO_SIDECAR => (StatusCode::SERVICE_UNAVAILABLE, "no sidecar is connected"),
            failure::NO_PROTOCOL => {
                (StatusCode::SERVICE_UNAVAILABLE, "no connected sidecar carries this protocol")
            }
            failure::SERVICE_UNREACHABLE => {
                (StatusCode::BAD_GATEWAY, "the service could not be reached")
            }
            failure::SERVICE_RESET => (StatusCode::BAD_GATEWAY, "the service broke off"),
            failure::SERVICE_INVALID => {
                (StatusCode::BAD_GATEWAY, "the service sent an invalid answer")
            }
            failure::SERVICE_TIMEOUT => (StatusCode::GATEWAY_TIMEOUT, "the service was too slow"),
            failure::RATE_LIMITED => (StatusCode::TOO_MANY_REQUESTS, "over a rate limit"),
            failure::OVERLOADED => (StatusCode::SERVICE_UNAVAILABLE, "over a limit on load"),
            failure::TOO_LARGE => {
                (StatusCode::PAYLOAD_TOO_LARGE, "a head or body is larger than allowed")
            }
            failure::TUNNEL_LOST => (StatusCode::BAD_GATEWAY, "the tunnel was lost"),
            failure::BAD_REQUEST => (StatusCode::BAD_REQUEST, "the request is not valid"),
            failure::DRAINING => (StatusCode::SERVICE_UNAVAILABLE, "going away"),
            failure::FORBIDDEN => (StatusCode::FORBIDDEN, "not allowed"),
            failure::INTERNAL => (StatusCode::INTERNAL_SERVER_ERROR, "a defect on our side"),
            failure::UNSUPPORTED => (StatusCode::NOT_IMPLEMENTED, "not supported"),
            failure::CLIENT_TIMEOUT => (StatusCode::REQUEST_TIMEOUT, "the client was too slow"),
            failure::UNAUTHORIZED => (StatusCode::UNAUTHORIZED, "who asks is not known here"),
            failure::MISDIRECTED => {
                (StatusCode::MISDIRECTED_REQUEST, "this connection is for another host")
            }
            // Whatever else ended it lies beyond this relay.
            _ => (StatusCode::BAD_GATEWAY, "the exchange ended without a response"),
        };
        Self { code, status, reason }
    }

    /// Returns the fields that go with the answer.
    pub(super) fn headers(self) -> HeaderMap {
        let mut headers = HeaderMap::with_capacity(4);
        headers.insert(CONTENT_TYPE, HeaderValue::from_static("text/plain; charset=utf-8"));
        headers.insert(X_SIDELANE_ERROR, HeaderValue::from_static(failure::name(self.code)));
        if matches!(self.status, StatusCode::SERVICE_UNAVAILABLE | StatusCode::TOO_MANY_REQUESTS) {
            headers.insert(RETRY_AFTER, RETRY_AFTER_S);
        }
        headers
    }

    /// Returns the one line that is the answer's body.
    pub(super) fn line(self) -> Bytes {
        Bytes::from(format!("{}: {}\n", failure::name(self.code), self.reason))
    }
}

/// Returns the status of the answer to an exchange that ended by `code` without a response.
pub(crate) fn status_of(code: u32) -> StatusCode {
    Refusal::of_code(code).status
}

/// Checks the length that a plugin's head states, and takes out what the front says itself.
///
/// # Errors
///
/// The head cannot be sent: its lengths are invalid or differ.
pub(super) fn check_response(head: &mut ResponseHead) -> Result<Option<u64>, Reset> {
    head.headers.remove(TRANSFER_ENCODING);
    if head.status == StatusCode::NO_CONTENT || head.status.is_informational() {
        // RFC 9110 §8.6.
        head.headers.remove(CONTENT_LENGTH);
        return Ok(None);
    }
    let mut stated = None;
    for value in head.headers.get_all(CONTENT_LENGTH) {
        let length = value.to_str().ok().and_then(parse_length);
        if length.is_none() || stated.is_some_and(|stated| Some(stated) != length) {
            return Err(Reset::new(failure::SERVICE_INVALID));
        }
        stated = length;
    }
    if let Some(length) = stated {
        head.headers.insert(CONTENT_LENGTH, HeaderValue::from(length));
    }
    Ok(stated)
}

/// `1*DIGIT`: no sign, which `u64`'s own parser allows.
fn parse_length(text: &str) -> Option<u64> {
    if text.bytes().all(|byte| byte.is_ascii_digit()) { text.parse().ok() } else { None }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_code_has_an_error_status() {
        for code in failure::CANCELLED..=failure::MISDIRECTED {
            let answer = Refusal::of_code(code);
            assert!(answer.status.as_u16() >= 400, "{}", failure::name(code));
            assert_eq!(answer.headers()[X_SIDELANE_ERROR], failure::name(code));
        }
    }

    #[test]
    fn failure_table_as_documented() {
        let table = [
            (failure::NO_ROUTE, 404),
            (failure::NO_SIDECAR, 503),
            (failure::NO_PROTOCOL, 503),
            (failure::SERVICE_UNREACHABLE, 502),
            (failure::SERVICE_RESET, 502),
            (failure::SERVICE_TIMEOUT, 504),
            (failure::RATE_LIMITED, 429),
            (failure::OVERLOADED, 503),
            (failure::TUNNEL_LOST, 502),
            (failure::PLUGIN_FAILED, 502),
            (failure::INTERNAL, 500),
        ];
        for (code, status) in table {
            assert_eq!(Refusal::of_code(code).status.as_u16(), status, "{}", failure::name(code));
        }
        assert_eq!(Refusal::of_code(failure::NO_SIDECAR).headers()[RETRY_AFTER], "1");
    }
}

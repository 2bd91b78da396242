//! What a client is told when there is no answer of the service's own: one table from failure codes
//! to statuses, and the words that go with them.

use sidelane_plugin::{Buf, Closed, HeaderList, RequestHead, Responder, ResponseHead, failure};

use crate::wire::Field;

/// Seconds of `Retry-After` where a row of the table has one and the host says no other: about what
/// a sidecar takes to come back (`tunnel.md`: retries begin at 200 ms and grow to 20 s).
pub const RETRY_AFTER_S: u32 = 5;

struct Row {
    code: u32,
    status: u16,
    retry: bool,
    text: &'static str,
}

const fn row(code: u32, status: u16, text: &'static str) -> Row {
    Row { code, status, retry: false, text }
}

const fn retry(code: u32, status: u16, text: &'static str) -> Row {
    Row { code, status, retry: true, text }
}

/// Every code but `NONE`. Where the fault lies decides: the client's are 4xx, the service's and the
/// tunnel's 502 and 504, what passes by waiting 503 with `Retry-After`, ours 500.
const TABLE: &[Row] = &[
    row(failure::CANCELLED, 502, "the exchange was cancelled"),
    row(failure::NO_ROUTE, 404, "no route takes this name and path"),
    retry(failure::NO_SIDECAR, 503, "no sidecar is connected for this route"),
    retry(failure::NO_PROTOCOL, 503, "no connected sidecar carries this protocol"),
    row(failure::SERVICE_UNREACHABLE, 502, "the service cannot be reached"),
    row(
        failure::SERVICE_RESET,
        502,
        "the service closed the connection before its answer was complete",
    ),
    row(failure::SERVICE_INVALID, 502, "the service sent what its protocol does not allow"),
    row(failure::SERVICE_TIMEOUT, 504, "the service took too long"),
    retry(failure::RATE_LIMITED, 429, "too many requests"),
    retry(failure::OVERLOADED, 503, "too much is going on here"),
    row(failure::TOO_LARGE, 413, "the request is larger than allowed"),
    row(failure::TUNNEL_LOST, 502, "the tunnel to the service was lost"),
    row(failure::CLIENT_GONE, 400, "the client broke off"),
    row(failure::BAD_REQUEST, 400, "the request is not what HTTP allows"),
    row(failure::FLOW_CONTROL, 502, "a peer of the tunnel ignored its credit"),
    row(failure::PLUGIN_FAILED, 502, "the protocol plugin failed"),
    retry(failure::DRAINING, 503, "this end is going away"),
    row(failure::FORBIDDEN, 403, "not allowed"),
    row(failure::INTERNAL, 500, "a defect on our side"),
    row(failure::UNSUPPORTED, 501, "not supported"),
    row(failure::CLIENT_TIMEOUT, 408, "the client took too long"),
    row(failure::UNAUTHORIZED, 401, "who asks is not known here"),
    row(failure::MISDIRECTED, 421, "this connection is for another host"),
];

/// A failure in HTTP's words.
#[derive(Debug, PartialEq, Eq)]
pub struct Answer {
    /// Status.
    pub status: u16,
    /// `x-sidelane-error`.
    pub error: &'static str,
    /// `Retry-After` in seconds.
    pub retry_after_s: Option<u32>,
    /// `content-type`.
    pub content_type: &'static str,
    /// The body; not sent in answer to HEAD.
    pub body: Vec<u8>,
}

/// What is to be told.
#[derive(Clone, Copy, Debug)]
pub struct Told<'a> {
    /// One of [`failure`].
    pub code: u32,
    /// Another status than the table's, where the code is told apart further.
    pub status: Option<u16>,
    /// The host's `Retry-After`; 0: the table's.
    pub retry_after_s: u32,
    /// One line for people; empty: the table's.
    pub detail: &'a str,
}

impl Told<'_> {
    /// Tells a code in the table's words.
    pub const fn code(code: u32) -> Self {
        Self { code, status: None, retry_after_s: 0, detail: "" }
    }
}

/// Returns the answer for `told`, as JSON where `json`.
pub fn answer(told: &Told<'_>, json: bool) -> Answer {
    let row = TABLE.iter().find(|row| row.code == told.code);
    let (status, retries, text) = row.map_or((500, false, "failed for an unknown reason"), |row| {
        (row.status, row.retry, row.text)
    });
    let status = told.status.unwrap_or(status);
    let error = failure::name(told.code);
    let detail = if told.detail.is_empty() { text } else { told.detail };
    let retry_after_s = match told.retry_after_s {
        0 => retries.then_some(RETRY_AFTER_S),
        seconds => Some(seconds),
    };
    let (content_type, body) = if json {
        let value = serde_json::json!({ "error": error, "status": status, "detail": detail });
        ("application/json", format!("{value}\n").into_bytes())
    } else {
        // One line, whatever the detail holds.
        let detail: String =
            detail.chars().map(|char| if char.is_control() { ' ' } else { char }).collect();
        ("text/plain; charset=utf-8", format!("{error}: {detail}\n").into_bytes())
    };
    Answer { status, error, retry_after_s, content_type, body }
}

/// Answers a request with `told` and the fields `extra`.
///
/// # Errors
/// The client is gone.
pub fn respond_with(
    head: &RequestHead<'_>,
    responder: &mut Responder,
    told: &Told<'_>,
    extra: &[Field<'_>],
) -> Result<(), Closed> {
    let answer = answer(told, wants_json(head.headers()));
    let retry_after = answer.retry_after_s.map(|seconds| seconds.to_string());
    let length = answer.body.len();
    let length_text = length.to_string();
    let is_head = head.method() == "HEAD";
    let mut headers = HeaderList::with_capacity(5 + extra.len());
    headers.push(b"content-type", answer.content_type.as_bytes());
    headers.push(b"cache-control", b"no-store");
    headers.push(b"x-sidelane-error", answer.error.as_bytes());
    if let Some(seconds) = &retry_after {
        headers.push(b"retry-after", seconds.as_bytes());
    }
    headers.extend(extra.iter().copied());
    if is_head {
        headers.push(b"content-length", length_text.as_bytes());
    }
    let response = ResponseHead {
        status: answer.status,
        headers: &headers,
        body_length: (!is_head).then_some(length as u64),
    };
    let body = (!is_head).then(|| Buf::from(answer.body));
    responder.head(response, body, true)
}

/// Whether the request asks for JSON by name: `application/json` in `Accept`, not with weight 0.
pub fn wants_json<'a>(mut fields: impl Iterator<Item = Field<'a>>) -> bool {
    fields.any(|(name, value)| {
        name == b"accept"
            && crate::fields::tokens(value).any(|range| {
                let mut parts = range.split(|byte| *byte == b';').map(<[u8]>::trim_ascii);
                parts.next().is_some_and(|media| media.eq_ignore_ascii_case(b"application/json"))
                    && !parts.any(is_zero_weight)
            })
    })
}

fn is_zero_weight(parameter: &[u8]) -> bool {
    match parameter {
        [b'q' | b'Q', b'=', weight @ ..] => {
            !weight.is_empty() && weight.iter().all(|byte| matches!(byte, b'0' | b'.'))
        }
        _ => false,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Codes are numbered without gaps; the first without a name ends them.
    fn codes() -> Vec<u32> {
        (1..).take_while(|code| failure::name(*code) != "unknown").collect()
    }

    #[test]
    fn every_code_has_its_row() {
        assert!(codes().len() >= 21, "no codes found");
        let table: Vec<String> = codes()
            .into_iter()
            .map(|code| {
                assert_eq!(TABLE.iter().filter(|row| row.code == code).count(), 1, "code {code}");
                let answer = answer(&Told::code(code), false);
                let retry =
                    answer.retry_after_s.map_or_else(String::new, |s| format!(" retry {s}"));
                format!("{} {}{retry}", answer.error, answer.status)
            })
            .collect();
        assert_eq!(
            table,
            [
                "cancelled 502",
                "no-route 404",
                "no-sidecar 503 retry 5",
                "no-protocol 503 retry 5",
                "service-unreachable 502",
                "service-reset 502",
                "service-invalid 502",
                "service-timeout 504",
                "rate-limited 429 retry 5",
                "overloaded 503 retry 5",
                "too-large 413",
                "tunnel-lost 502",
                "client-gone 400",
                "bad-request 400",
                "flow-control 502",
                "plugin-failed 502",
                "draining 503 retry 5",
                "forbidden 403",
                "internal 500",
                "unsupported 501",
                "client-timeout 408",
                "unauthorized 401",
                "misdirected 421",
            ]
        );
    }

    #[test]
    fn an_unknown_code_is_ours() {
        assert_eq!(answer(&Told::code(9999), false).status, 500);
    }

    #[test]
    fn text_is_one_line() {
        let told = Told { detail: "two\r\nlines", ..Told::code(failure::NO_ROUTE) };
        assert_eq!(answer(&told, false).body, b"no-route: two  lines\n");
    }

    #[test]
    fn json_says_the_same() {
        let told =
            Told { detail: "say \"x\"", retry_after_s: 30, ..Told::code(failure::NO_SIDECAR) };
        let answer = answer(&told, true);
        assert_eq!(answer.content_type, "application/json");
        assert_eq!(answer.retry_after_s, Some(30));
        let value: serde_json::Value = serde_json::from_slice(&answer.body).unwrap();
        assert_eq!(
            value,
            serde_json::json!({ "error": "no-sidecar", "status": 503, "detail": "say \"x\"" })
        );
    }

    #[test]
    fn json_is_for_those_who_name_it() {
        for (accept, expected) in [
            ("application/json", true),
            ("text/html, Application/JSON;q=0.5", true),
            ("application/json;q=0", false),
            ("application/json; q=0.000", false),
            ("*/*", false),
            ("application/json-seq", false),
        ] {
            let fields: [Field<'_>; 2] = [(b"host", b"a"), (b"accept", accept.as_bytes())];
            assert_eq!(wants_json(fields.into_iter()), expected, "{accept}");
        }
    }
}

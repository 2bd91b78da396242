//! Which header fields pass: those of one connection end here (RFC 9110 §7.6.1), those that say how
//! a message is framed are made anew by whoever writes the next one.
//!
//! `Proxy-Authenticate` and `Proxy-Authorization` pass: the RFC leaves them to intermediaries that
//! ask for credentials themselves, and Sidelane does not. `Trailer` passes: it is end to end.

use crate::wire::Field;

/// What a field's name says about passing it on.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kind {
    /// Passes, unless `Connection` names it.
    EndToEnd,
    /// Never passes.
    HopByHop,
    /// `te`: passes as `trailers`, where it says so.
    Te,
    /// `content-length`: travels as a number.
    ContentLength,
    /// `host`: travels as the authority.
    Host,
    /// `expect`: `100-continue` travels as a flag.
    Expect,
    /// `forwarded` and every `x-forwarded-*`: written over by the sidecar's end, but where a trusted
    /// proxy wrote them.
    Forwarded,
}

/// Returns what the lower-case `name` says about passing the field on.
pub fn kind(name: &[u8]) -> Kind {
    match name {
        b"connection" | b"proxy-connection" | b"keep-alive" | b"transfer-encoding" | b"upgrade"
        | b"http2-settings" => Kind::HopByHop,
        b"te" => Kind::Te,
        b"content-length" => Kind::ContentLength,
        b"host" => Kind::Host,
        b"expect" => Kind::Expect,
        b"forwarded" => Kind::Forwarded,
        name if name.starts_with(b"x-forwarded-") => Kind::Forwarded,
        _ => Kind::EndToEnd,
    }
}

/// The names that a message's `Connection` fields make hop-by-hop.
#[derive(Debug, Default)]
pub struct Nominated<'a> {
    /// Values that name something besides the usual `close` and `keep-alive`; empty, and so without
    /// an allocation, for nearly every message.
    values: Vec<&'a [u8]>,
}

impl<'a> Nominated<'a> {
    /// Collects from all of a message's fields.
    pub fn scan(fields: impl Iterator<Item = Field<'a>>) -> Self {
        let values = fields
            .filter(|(name, value)| {
                *name == b"connection" && tokens(value).any(|token| !is_connection_option(token))
            })
            .map(|(_, value)| value)
            .collect();
        Self { values }
    }

    /// Whether `Connection` names the lower-case `name`.
    pub fn contains(&self, name: &[u8]) -> bool {
        self.values.iter().any(|value| tokens(value).any(|token| token.eq_ignore_ascii_case(name)))
    }
}

/// Whether the field passes: end to end, and not named by `Connection`.
pub fn passes(name: &[u8], nominated: &Nominated<'_>) -> bool {
    matches!(kind(name), Kind::EndToEnd | Kind::Forwarded) && !nominated.contains(name)
}

/// Whether a `TE` value accepts trailers (RFC 9110 §10.1.4).
pub fn te_trailers(value: &[u8]) -> bool {
    tokens(value).any(|token| {
        let name = token.split(|byte| *byte == b';').next().unwrap_or(token);
        name.trim_ascii().eq_ignore_ascii_case(b"trailers")
    })
}

/// Returns the members of a comma-separated list, without white space around them.
pub fn tokens(value: &[u8]) -> impl Iterator<Item = &[u8]> {
    value.split(|byte| *byte == b',').map(<[u8]>::trim_ascii).filter(|token| !token.is_empty())
}

/// Reads a `Content-Length` (RFC 9110 §8.6): digits, or the same digits repeated as a list.
pub fn content_length(value: &[u8]) -> Option<u64> {
    let mut length = None;
    for token in tokens(value) {
        if !token.iter().all(u8::is_ascii_digit) {
            return None;
        }
        let this = str::from_utf8(token).ok()?.parse::<u64>().ok()?;
        if length.is_some_and(|length| length != this) {
            return None;
        }
        length = Some(this);
    }
    length
}

fn is_connection_option(token: &[u8]) -> bool {
    token.eq_ignore_ascii_case(b"close") || token.eq_ignore_ascii_case(b"keep-alive")
}

#[cfg(test)]
mod tests {
    use super::*;

    fn check(fields: &[(&str, &str)], expected: &[&str]) {
        let fields: Vec<Field<'_>> =
            fields.iter().map(|(name, value)| (name.as_bytes(), value.as_bytes())).collect();
        let nominated = Nominated::scan(fields.iter().copied());
        let passed: Vec<&str> = fields
            .iter()
            .filter(|(name, _)| passes(name, &nominated))
            .map(|(name, _)| str::from_utf8(name).unwrap())
            .collect();
        assert_eq!(passed, expected);
    }

    #[test]
    fn connection_fields_stay_on_their_connection() {
        check(
            &[
                ("accept", "*/*"),
                ("connection", "keep-alive"),
                ("proxy-connection", "keep-alive"),
                ("keep-alive", "timeout=5"),
                ("te", "trailers, deflate"),
                ("transfer-encoding", "chunked"),
                ("upgrade", "h2c"),
                ("http2-settings", "AAMAAABkAAQAAP__"),
                ("trailer", "x-checksum"),
                ("proxy-authorization", "Basic eDp5"),
                ("cookie", "a=b"),
            ],
            &["accept", "trailer", "proxy-authorization", "cookie"],
        );
    }

    #[test]
    fn connection_names_more_fields() {
        check(
            &[
                ("connection", "close , X-Hop,,"),
                ("x-hop", "1"),
                ("x-stay", "2"),
                ("connection", "X-OTHER"),
                ("x-other", "3"),
                ("x-forwarded-for", "4"),
            ],
            &["x-stay", "x-forwarded-for"],
        );
    }

    #[test]
    fn usual_connection_options_cost_no_allocation() {
        let fields: [Field<'_>; 1] = [(b"connection", b"Keep-Alive, close")];
        assert_eq!(Nominated::scan(fields.into_iter()).values.capacity(), 0);
    }

    #[test]
    fn te_passes_only_as_trailers() {
        for (value, expected) in [
            ("trailers", true),
            ("gzip, Trailers", true),
            ("trailers;q=0.5", true),
            ("gzip", false),
            ("x-trailers", false),
            ("", false),
        ] {
            assert_eq!(te_trailers(value.as_bytes()), expected, "{value:?}");
        }
    }

    #[test]
    fn lengths_are_digits_alike() {
        for (value, expected) in [
            ("0", Some(0)),
            ("42", Some(42)),
            ("42, 42", Some(42)),
            ("42, 43", None),
            ("+42", None),
            ("4 2", None),
            ("", None),
            ("99999999999999999999", None),
        ] {
            assert_eq!(content_length(value.as_bytes()), expected, "{value:?}");
        }
    }
}

//! What the service is told of the client: `X-Forwarded-For`, `-Proto`, `-Host`, `Forwarded`
//! (RFC 7239) and `Via` (RFC 9110 §7.6.3). The values name the client as the relay saw it; what the
//! client wrote there itself does not pass.

use http::header::{FORWARDED, HeaderMap, HeaderName, HeaderValue, VIA};

const X_FORWARDED_FOR: HeaderName = HeaderName::from_static("x-forwarded-for");
const X_FORWARDED_PROTO: HeaderName = HeaderName::from_static("x-forwarded-proto");
const X_FORWARDED_HOST: HeaderName = HeaderName::from_static("x-forwarded-host");

/// Adds the fields to `headers`. `client_address` is `192.0.2.1:4711` or `[2001:db8::1]:4711`, or
/// empty where it is not known; `authority` is the `Host` that the client asked for.
pub fn write(headers: &mut HeaderMap, client_address: &str, scheme: &str, authority: &HeaderValue) {
    let client = client_ip(client_address);
    let forwarded = bytes::Bytes::from(forwarded(client, scheme, authority.as_bytes()));
    if let Some(value) = client.and_then(|ip| client_value(&forwarded, ip)) {
        headers.insert(X_FORWARDED_FOR, value);
    }
    let scheme_value = match scheme {
        "http" => Some(HeaderValue::from_static("http")),
        "https" => Some(HeaderValue::from_static("https")),
        other => HeaderValue::from_str(other).ok().filter(|value| !value.is_empty()),
    };
    if let Some(value) = scheme_value {
        headers.insert(X_FORWARDED_PROTO, value);
    }
    headers.insert(X_FORWARDED_HOST, authority.clone());
    if let Ok(value) = HeaderValue::from_maybe_shared(forwarded) {
        headers.insert(FORWARDED, value);
    }
}

/// Adds a `Via` entry for a message that came in by `version` (10, 11 or 20), after those there are.
pub fn add_via(headers: &mut HeaderMap, version: u32) {
    headers.append(VIA, HeaderValue::from_static(via(version)));
}

/// Returns the `Via` entry for a message that came in by `version` (10, 11 or 20).
pub const fn via(version: u32) -> &'static str {
    match version {
        10 => "1.0 sidelane",
        20 => "2.0 sidelane",
        _ => "1.1 sidelane",
    }
}

/// Returns the address as a value: the part of `forwarded` where it stands as it is.
fn client_value(forwarded: &bytes::Bytes, ip: &str) -> Option<HeaderValue> {
    let start = if ip.contains(':') { b"for=\"[".len() } else { b"for=".len() };
    let range = start..start + ip.len();
    let value = if forwarded.get(range.clone()) == Some(ip.as_bytes()) {
        HeaderValue::from_maybe_shared(forwarded.slice(range))
    } else {
        HeaderValue::from_bytes(ip.as_bytes())
    };
    value.ok()
}

/// Returns the address without port and brackets.
fn client_ip(address: &str) -> Option<&str> {
    let (host, _port) = address.rsplit_once(':')?;
    let ip = host.strip_prefix('[').and_then(|host| host.strip_suffix(']')).unwrap_or(host);
    (!ip.is_empty()).then_some(ip)
}

fn forwarded(client: Option<&str>, scheme: &str, authority: &[u8]) -> Vec<u8> {
    let mut out = Vec::with_capacity(64 + authority.len());
    out.extend_from_slice(b"for=");
    match client {
        Some(ip) if ip.contains(':') => {
            out.extend_from_slice(b"\"[");
            out.extend_from_slice(ip.as_bytes());
            out.extend_from_slice(b"]\"");
        }
        Some(ip) => put_value(&mut out, ip.as_bytes()),
        None => out.extend_from_slice(b"unknown"),
    }
    if !authority.is_empty() {
        out.extend_from_slice(b";host=");
        put_value(&mut out, authority);
    }
    if !scheme.is_empty() {
        out.extend_from_slice(b";proto=");
        put_value(&mut out, scheme.as_bytes());
    }
    out
}

/// Writes a token as it is, anything else as a quoted string (RFC 9110 §5.6.4).
fn put_value(out: &mut Vec<u8>, value: &[u8]) {
    if value.iter().all(|byte| is_token_char(*byte)) {
        out.extend_from_slice(value);
        return;
    }
    out.push(b'"');
    for byte in value {
        if matches!(byte, b'"' | b'\\') {
            out.push(b'\\');
        }
        out.push(*byte);
    }
    out.push(b'"');
}

const fn is_token_char(byte: u8) -> bool {
    byte.is_ascii_alphanumeric()
        || matches!(
            byte,
            b'!' | b'#'
                | b'$'
                | b'%'
                | b'&'
                | b'\''
                | b'*'
                | b'+'
                | b'-'
                | b'.'
                | b'^'
                | b'_'
                | b'`'
                | b'|'
                | b'~'
        )
}

#[cfg(test)]
mod tests {
    use super::*;

    fn check(address: &str, scheme: &str, authority: &str, expected: &[(&str, &str)]) {
        let mut headers = HeaderMap::new();
        write(&mut headers, address, scheme, &HeaderValue::from_str(authority).unwrap());
        let written: Vec<(&str, &str)> =
            headers.iter().map(|(name, value)| (name.as_str(), value.to_str().unwrap())).collect();
        assert_eq!(written, expected);
    }

    #[test]
    fn a_plain_host_needs_no_quotes() {
        check(
            "192.0.2.1:4711",
            "https",
            "api.example.com",
            &[
                ("x-forwarded-for", "192.0.2.1"),
                ("x-forwarded-proto", "https"),
                ("x-forwarded-host", "api.example.com"),
                ("forwarded", "for=192.0.2.1;host=api.example.com;proto=https"),
            ],
        );
    }

    #[test]
    fn ipv6_and_ports_are_quoted() {
        check(
            "[2001:db8::1]:4711",
            "http",
            "api.localhost:9080",
            &[
                ("x-forwarded-for", "2001:db8::1"),
                ("x-forwarded-proto", "http"),
                ("x-forwarded-host", "api.localhost:9080"),
                ("forwarded", "for=\"[2001:db8::1]\";host=\"api.localhost:9080\";proto=http"),
            ],
        );
    }

    #[test]
    fn a_client_without_an_address_is_unknown() {
        check(
            "",
            "http",
            "a",
            &[
                ("x-forwarded-proto", "http"),
                ("x-forwarded-host", "a"),
                ("forwarded", "for=unknown;host=a;proto=http"),
            ],
        );
    }

    #[test]
    fn quotes_in_a_host_are_escaped() {
        assert_eq!(forwarded(None, "", b"a\"b\\c"), b"for=unknown;host=\"a\\\"b\\\\c\"");
    }

    #[test]
    fn via_is_appended() {
        let mut headers = HeaderMap::new();
        headers.append(VIA, HeaderValue::from_static("1.1 edge"));
        add_via(&mut headers, 20);
        let values: Vec<_> = headers.get_all(VIA).iter().collect();
        assert_eq!(values, ["1.1 edge", "2.0 sidelane"]);
    }
}

//! What the service is told of the client: `X-Forwarded-For`, `-Proto`, `-Host`, `Forwarded`
//! (RFC 7239) and `Via` (RFC 9110 §7.6.3). The values name the client as the relay saw it; what the
//! client wrote there itself does not pass, but where it is a proxy that the relay trusts: then this
//! end adds that proxy's address, as proxies do.

use bytes::Bytes;
use http::header::{FORWARDED, HeaderMap, HeaderName, HeaderValue, VIA};
use sidelane_plugin::Meta;

const X_FORWARDED_FOR: HeaderName = HeaderName::from_static("x-forwarded-for");
const X_FORWARDED_PROTO: HeaderName = HeaderName::from_static("x-forwarded-proto");
const X_FORWARDED_HOST: HeaderName = HeaderName::from_static("x-forwarded-host");

/// Whose request it is, as the relay knows. Addresses are `192.0.2.1:4711` or `[2001:db8::1]:4711`, or
/// empty where they are not known.
#[derive(Clone, Copy, Debug)]
pub struct Seen<'a> {
    /// The client.
    pub client_address: &'a str,
    /// `http` or `https`, as the request came to the relay.
    pub scheme: &'a str,
    /// It came from a proxy that the relay trusts: that proxy's own address.
    pub trusted_proxy: Option<&'a str>,
}

impl<'a> Seen<'a> {
    /// What the host says of an exchange.
    #[must_use]
    pub fn of(meta: &Meta<'a>) -> Self {
        Self {
            client_address: meta.client_address(),
            scheme: meta.scheme(),
            trusted_proxy: meta.is_trusted_proxy().then(|| meta.peer_address()),
        }
    }

    /// Whether what came in `Forwarded` and `X-Forwarded-*` passes.
    #[must_use]
    pub const fn passes_forwarded(&self) -> bool {
        self.trusted_proxy.is_some()
    }
}

/// Adds the fields to `headers`, where those of a trusted proxy are already; `authority` is the `Host`
/// that the client asked for.
pub fn write(headers: &mut HeaderMap, seen: Seen<'_>, authority: &HeaderValue) {
    match seen.trusted_proxy {
        None => replace(headers, seen.client_address, seen.scheme, authority),
        Some(proxy) => append(headers, seen, client_ip(proxy), authority),
    }
}

/// Adds to what a proxy said: its own address, and what it left out.
fn append(headers: &mut HeaderMap, seen: Seen<'_>, proxy: Option<&str>, authority: &HeaderValue) {
    let client = client_ip(seen.client_address);
    let hops = match joined(headers, &X_FORWARDED_FOR) {
        Some(hops) => [Some(hops), proxy.map(|ip| ip.as_bytes().to_vec())],
        None => [client.map(|ip| ip.as_bytes().to_vec()), None],
    };
    let hops = hops.into_iter().flatten().collect::<Vec<_>>().join(&b", "[..]);
    if let Some(value) = HeaderValue::from_bytes(&hops).ok().filter(|_| !hops.is_empty()) {
        headers.insert(X_FORWARDED_FOR, value);
    }
    let said = joined(headers, &FORWARDED);
    let element = |node| forwarded(node, seen.scheme, authority.as_bytes());
    let elements = match (said, proxy) {
        (Some(said), Some(proxy)) => Some([said, element(Some(proxy))].join(&b", "[..])),
        // Nothing is known that it does not say.
        (Some(_), None) => None,
        // The proxy says it otherwise; whoever reads this field is to find the client first.
        (None, Some(proxy)) if client.is_some_and(|client| client != proxy) => {
            Some([forwarded(client, "", b""), element(Some(proxy))].join(&b", "[..]))
        }
        (None, _) => {
            let asked = headers.get(X_FORWARDED_HOST).unwrap_or(authority);
            Some(forwarded(client, seen.scheme, asked.as_bytes()))
        }
    };
    let value =
        elements.and_then(|elements| HeaderValue::from_maybe_shared(Bytes::from(elements)).ok());
    if let Some(value) = value {
        headers.insert(FORWARDED, value);
    }
    if !headers.contains_key(X_FORWARDED_PROTO)
        && let Ok(value) = HeaderValue::from_str(seen.scheme)
        && !value.is_empty()
    {
        headers.insert(X_FORWARDED_PROTO, value);
    }
    headers.entry(X_FORWARDED_HOST).or_insert_with(|| authority.clone());
}

/// Returns a field's values as one list; `None`: there is none, or nothing in it.
fn joined(headers: &HeaderMap, name: &HeaderName) -> Option<Vec<u8>> {
    let values = headers.get_all(name).iter().map(HeaderValue::as_bytes);
    let values: Vec<&[u8]> = values.filter(|value| !value.trim_ascii().is_empty()).collect();
    (!values.is_empty()).then(|| values.join(&b", "[..]))
}

fn replace(headers: &mut HeaderMap, client_address: &str, scheme: &str, authority: &HeaderValue) {
    let client = client_ip(client_address);
    let forwarded = Bytes::from(forwarded(client, scheme, authority.as_bytes()));
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
fn client_value(forwarded: &Bytes, ip: &str) -> Option<HeaderValue> {
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
        let seen = Seen { client_address: address, scheme, trusted_proxy: None };
        write(&mut headers, seen, &HeaderValue::from_str(authority).unwrap());
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
    fn a_trusted_proxys_word_is_added_to() {
        const FOR: &str = "x-forwarded-for";
        let own = [("x-forwarded-proto", "http"), ("x-forwarded-host", "api.test")];
        for (proxy, came, expected) in [
            (
                "192.0.2.9:1",
                &[
                    (FOR, "198.51.100.1"),
                    (FOR, "10.0.0.1, 10.0.0.2"),
                    ("x-forwarded-proto", "https"),
                    ("x-forwarded-host", "shop.test"),
                    ("x-forwarded-port", "443"),
                    ("forwarded", "for=198.51.100.1;proto=https"),
                ][..],
                vec![
                    (FOR, "198.51.100.1, 10.0.0.1, 10.0.0.2, 192.0.2.9"),
                    ("x-forwarded-proto", "https"),
                    ("x-forwarded-host", "shop.test"),
                    ("x-forwarded-port", "443"),
                    (
                        "forwarded",
                        "for=198.51.100.1;proto=https, for=192.0.2.9;host=api.test;proto=http",
                    ),
                ],
            ),
            // Nothing was said: the client is the proxy itself, or named by the PROXY protocol.
            (
                "[2001:db8::9]:1",
                &[],
                vec![
                    (FOR, "198.51.100.1"),
                    (
                        "forwarded",
                        "for=198.51.100.1, for=\"[2001:db8::9]\";host=api.test;proto=http",
                    ),
                    own[0],
                    own[1],
                ],
            ),
            // The proxy's own address is not known.
            (
                "",
                &[(FOR, "198.51.100.1")],
                vec![
                    (FOR, "198.51.100.1"),
                    ("forwarded", "for=198.51.100.1;host=api.test;proto=http"),
                    own[0],
                    own[1],
                ],
            ),
            (
                "",
                &[("forwarded", "for=a")],
                vec![(FOR, "198.51.100.1"), ("forwarded", "for=a"), own[0], own[1]],
            ),
            // The relay has put another host in place of what the client asked for.
            (
                "",
                &[("x-forwarded-host", "shop.test")],
                vec![
                    (FOR, "198.51.100.1"),
                    ("forwarded", "for=198.51.100.1;host=shop.test;proto=http"),
                    own[0],
                    ("x-forwarded-host", "shop.test"),
                ],
            ),
            // The proxy asks for itself.
            (
                "198.51.100.1:9",
                &[],
                vec![
                    (FOR, "198.51.100.1"),
                    ("forwarded", "for=198.51.100.1;host=api.test;proto=http"),
                    own[0],
                    own[1],
                ],
            ),
        ] {
            let mut headers = HeaderMap::new();
            for (name, value) in came {
                headers.append(*name, HeaderValue::from_static(value));
            }
            let seen = Seen {
                client_address: "198.51.100.1:4711",
                scheme: "http",
                trusted_proxy: Some(proxy),
            };
            write(&mut headers, seen, &HeaderValue::from_static("api.test"));
            let mut written: Vec<(&str, &str)> = headers
                .iter()
                .map(|(name, value)| (name.as_str(), value.to_str().unwrap()))
                .collect();
            let mut expected = expected;
            written.sort_unstable();
            expected.sort_unstable();
            assert_eq!(written, expected, "{proxy} {came:?}");
        }
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

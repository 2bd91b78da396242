//! Who the client of a request is, as proxies that are trusted say (RFC 7239, and the older
//! `X-Forwarded-For` and `X-Forwarded-Proto`).
//!
//! Pure. Reads from the right, where the nearest proxy wrote: what a client sends by itself stands
//! to the left of that, and can neither be believed nor get in the way.

use std::net::{IpAddr, SocketAddr};

use http::header::FORWARDED;
use http::{HeaderMap, HeaderName};
use ipnet::IpNet;

/// Elements looked at, from the right. Bounds what a request costs; a chain of that many trusted
/// proxies is a loop.
const ELEMENTS_MAX: usize = 32;

static X_FORWARDED_FOR: HeaderName = HeaderName::from_static("x-forwarded-for");
static X_FORWARDED_PROTO: HeaderName = HeaderName::from_static("x-forwarded-proto");

/// The client of one request.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Client {
    /// Its address; port 0 where a proxy named none.
    pub address: SocketAddr,
    /// `http` or `https`, where a proxy named it.
    pub scheme: Option<&'static str>,
}

/// Returns whether one of `networks` holds the address.
#[must_use]
pub fn is_in(address: IpAddr, networks: &[IpNet]) -> bool {
    let address = address.to_canonical();
    networks.iter().any(|network| network.contains(&address))
}

/// Returns the client of a request that came from `peer`, one of the `trusted` proxies.
///
/// It is the rightmost element that is no trusted proxy; an element that names no address
/// (`unknown`, obfuscated, garbage) ends the walk at the proxy that wrote it. `X-Forwarded-For` is
/// read where there is one, else `Forwarded`: nearly every proxy writes the former, and one that does
/// passes on whatever the client put in the latter.
#[must_use]
pub fn client(peer: SocketAddr, headers: &HeaderMap, trusted: &[IpNet]) -> Client {
    if headers.contains_key(&X_FORWARDED_FOR) {
        let elements = elements(headers, &X_FORWARDED_FOR).map(unquoted);
        return Client { address: walk(peer, elements, trusted), scheme: proto(headers) };
    }
    // The proxy that named the client also says how that one came.
    let mut last = None;
    let nodes = elements(headers, &FORWARDED).map(|element| {
        last = Some(element);
        parameter(element, "for").unwrap_or_default()
    });
    let address = walk(peer, nodes, trusted);
    let named = last.and_then(|element| parameter(element, "proto")).and_then(scheme);
    Client { address, scheme: named.or_else(|| proto(headers)) }
}

/// Goes from element to element while they are trusted proxies.
fn walk<'a>(
    peer: SocketAddr,
    elements: impl Iterator<Item = &'a str>,
    trusted: &[IpNet],
) -> SocketAddr {
    let mut address = peer;
    for element in elements.take(ELEMENTS_MAX) {
        let Some(named) = node(element) else { break };
        address = named;
        if !is_in(named.ip(), trusted) {
            break;
        }
    }
    address
}

/// Returns the elements of a list field, the last first.
fn elements<'a>(
    headers: &'a HeaderMap,
    name: &'a HeaderName,
) -> impl Iterator<Item = &'a str> + 'a {
    let values = headers.get_all(name).iter().rev();
    values.flat_map(|value| Elements(Some(value.as_bytes())))
}

/// The elements of one field value, the last first. Commas within quotes separate nothing; quotes
/// are paired from the right, so that one that a client left open joins nothing of a proxy's.
struct Elements<'a>(Option<&'a [u8]>);

impl<'a> Iterator for Elements<'a> {
    type Item = &'a str;

    fn next(&mut self) -> Option<&'a str> {
        let rest = self.0?;
        let mut is_quoted = false;
        let comma = rest.iter().rposition(|byte| {
            is_quoted ^= *byte == b'"';
            *byte == b',' && !is_quoted
        });
        let element = match comma {
            Some(at) => {
                self.0 = Some(&rest[..at]);
                &rest[at + 1..]
            }
            None => {
                self.0 = None;
                rest
            }
        };
        // What is no text names no address, and is none of a trusted proxy's.
        Some(std::str::from_utf8(element.trim_ascii()).unwrap_or_default())
    }
}

/// Returns a parameter of a `Forwarded` element: `for=192.0.2.1;proto=https`.
fn parameter<'a>(element: &'a str, name: &str) -> Option<&'a str> {
    element.split(';').find_map(|pair| {
        let (key, value) = pair.split_once('=')?;
        key.trim_matches([' ', '\t']).eq_ignore_ascii_case(name).then(|| unquoted(value))
    })
}

fn unquoted(value: &str) -> &str {
    let value = value.trim_matches([' ', '\t']);
    value.strip_prefix('"').and_then(|value| value.strip_suffix('"')).unwrap_or(value)
}

/// Reads `192.0.2.1`, `192.0.2.1:4711`, `2001:db8::1`, `[2001:db8::1]`, `[2001:db8::1]:4711`.
fn node(text: &str) -> Option<SocketAddr> {
    if let Ok(address) = text.parse::<SocketAddr>() {
        return Some(SocketAddr::new(address.ip().to_canonical(), address.port()));
    }
    let bare = text.strip_prefix('[').and_then(|text| text.strip_suffix(']'));
    // A port may be obfuscated (RFC 7239 §6): the address counts still.
    let bare = bare.or_else(|| {
        let (address, port) = text.rsplit_once(":_")?;
        let is_name = port.bytes().all(|b| b.is_ascii_alphanumeric() || b"._-".contains(&b));
        let address =
            address.strip_prefix('[').and_then(|a| a.strip_suffix(']')).unwrap_or(address);
        is_name.then_some(address)
    });
    let address = bare.unwrap_or(text).parse::<IpAddr>().ok()?;
    Some(SocketAddr::new(address.to_canonical(), 0))
}

/// The nearest proxy's word on the scheme.
fn proto(headers: &HeaderMap) -> Option<&'static str> {
    elements(headers, &X_FORWARDED_PROTO).next().and_then(scheme)
}

fn scheme(text: &str) -> Option<&'static str> {
    ["https", "http"].into_iter().find(|scheme| text.eq_ignore_ascii_case(scheme))
}

#[cfg(test)]
mod tests {
    use proptest::strategy::Strategy as _;

    use super::*;

    /// Fields as `name: value` lines, and the client that they tell: address, and scheme.
    #[track_caller]
    fn check(lines: &str, expected: &str) {
        let mut headers = HeaderMap::new();
        for line in lines.lines().map(str::trim).filter(|line| !line.is_empty()) {
            let (name, value) = line.split_once(": ").unwrap();
            headers.append(
                HeaderName::from_bytes(name.as_bytes()).unwrap(),
                http::HeaderValue::from_bytes(value.as_bytes()).unwrap(),
            );
        }
        let trusted: Vec<IpNet> =
            ["10.0.0.0/8", "fd00::/8"].iter().map(|text| text.parse().unwrap()).collect();
        let client = client("10.0.0.1:9".parse().unwrap(), &headers, &trusted);
        let text = format!("{} {}", client.address, client.scheme.unwrap_or("-"));
        assert_eq!(text, expected, "{lines}");
    }

    #[test]
    fn the_rightmost_that_is_no_trusted_proxy_is_the_client() {
        check("", "10.0.0.1:9 -");
        check("x-forwarded-for: 192.0.2.1", "192.0.2.1:0 -");
        check("x-forwarded-for: 192.0.2.9, 192.0.2.1, 10.0.0.2", "192.0.2.1:0 -");
        check("x-forwarded-for: 192.0.2.9\nx-forwarded-for: 192.0.2.1,10.3.3.3", "192.0.2.1:0 -");
        check("x-forwarded-for: 10.0.0.3, 10.0.0.2", "10.0.0.3:0 -");
        check("x-forwarded-for: 192.0.2.1:4711", "192.0.2.1:4711 -");
        check("x-forwarded-for: 2001:db8::1, fd00::2", "[2001:db8::1]:0 -");
        check("x-forwarded-for: [2001:db8::1]:4711", "[2001:db8::1]:4711 -");
        check("x-forwarded-for: \"[2001:db8::1]\"", "[2001:db8::1]:0 -");
        check("x-forwarded-for: 192.0.2.9, ::ffff:10.0.0.2", "192.0.2.9:0 -");
    }

    #[test]
    fn what_names_no_address_ends_the_walk_at_who_wrote_it() {
        check("x-forwarded-for: 192.0.2.1, unknown", "10.0.0.1:9 -");
        check("x-forwarded-for: 192.0.2.1, , 10.0.0.2", "10.0.0.2:0 -");
        check("x-forwarded-for: 192.0.2.1, 1.2.3, 10.0.0.2", "10.0.0.2:0 -");
        check("forwarded: for=192.0.2.1, for=_hidden", "10.0.0.1:9 -");
        check("forwarded: for=192.0.2.1, by=10.0.0.1", "10.0.0.1:9 -");
        check("forwarded: for=192.0.2.1, for=unknown, for=10.0.0.2", "10.0.0.2:0 -");
    }

    #[test]
    fn forwarded_is_read_where_there_is_no_other() {
        check("forwarded: for=192.0.2.1;proto=https", "192.0.2.1:0 https");
        check("forwarded: For=\"[2001:db8::1]:4711\"; Proto=HTTP", "[2001:db8::1]:4711 http");
        check(
            "forwarded: for=192.0.2.9, for=192.0.2.1;proto=https, for=10.0.0.2;proto=http",
            "192.0.2.1:0 https",
        );
        check("forwarded: for=\"192.0.2.1:_port\"", "192.0.2.1:0 -");
        check("forwarded: for=\"[2001:db8::1]:_p1\"", "[2001:db8::1]:0 -");
        check("forwarded: for=192.0.2.1;host=\"a,b;for=10.9.9.9\"", "192.0.2.1:0 -");
        check("forwarded: for=192.0.2.9\nx-forwarded-for: 192.0.2.1", "192.0.2.1:0 -");
    }

    #[test]
    fn what_a_client_wrote_does_not_hide_what_a_proxy_added() {
        check("forwarded: for=\"10.0.0.5, for=192.0.2.1", "192.0.2.1:0 -");
        check("x-forwarded-for: \"10.0.0.5, 192.0.2.1", "192.0.2.1:0 -");
        check("x-forwarded-for: \u{fc}\nx-forwarded-for: 192.0.2.1", "192.0.2.1:0 -");
        check("x-forwarded-for: \u{fc}, 192.0.2.1", "192.0.2.1:0 -");
        check("x-forwarded-for: \u{fc}", "10.0.0.1:9 -");
    }

    #[test]
    fn the_scheme_is_the_nearest_proxys_word() {
        check("x-forwarded-for: 192.0.2.1\nx-forwarded-proto: https", "192.0.2.1:0 https");
        check("x-forwarded-proto: HTTPS", "10.0.0.1:9 https");
        check("x-forwarded-proto: http, https", "10.0.0.1:9 https");
        check("x-forwarded-proto: ftp", "10.0.0.1:9 -");
    }

    #[test]
    fn a_long_chain_is_cut() {
        let chain = vec!["10.0.0.2"; ELEMENTS_MAX * 100].join(", ");
        check(&format!("x-forwarded-for: 192.0.2.1, {chain}"), "10.0.0.2:0 -");
    }

    proptest::proptest! {
        #[test]
        fn what_a_client_writes_never_changes_what_a_proxy_appended(
            by_client in proptest::collection::vec(
                proptest::prelude::any::<u8>().prop_filter("allowed in a field", |byte| {
                    *byte >= 0x20 && *byte != 0x7f
                }),
                0..200,
            ),
            is_forwarded in proptest::prelude::any::<bool>(),
        ) {
            let (name, appended) = match is_forwarded {
                true => (FORWARDED, &b", for=192.0.2.1;proto=https"[..]),
                false => (X_FORWARDED_FOR.clone(), &b", 192.0.2.1"[..]),
            };
            let mut headers = HeaderMap::new();
            let value = [&by_client, appended].concat();
            headers.insert(name, http::HeaderValue::from_bytes(&value).unwrap());
            let trusted = ["10.0.0.0/8".parse().unwrap()];
            let client = client("10.0.0.1:9".parse().unwrap(), &headers, &trusted);
            assert_eq!(client.address.to_string(), "192.0.2.1:0");
        }
    }
}

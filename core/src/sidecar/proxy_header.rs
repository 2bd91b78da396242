//! The PROXY protocol header that a connection to a service begins with: whose it is.
//!
//! Pure. The specification: haproxy's `doc/proxy-protocol.txt`, version 1 (text) and 2 (binary).

use std::net::{IpAddr, Ipv4Addr, SocketAddr};

use ppp::{v1, v2};

use crate::config::ProxyVersion;

/// Whose a connection is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Origin {
    /// A client's.
    Client(SocketAddr),
    /// A client's whose address is not known.
    Unknown,
    /// This program's own: a health check.
    Own,
}

impl Origin {
    /// Returns the origin that an exchange's `client_address` says.
    #[must_use]
    pub(super) fn of(client_address: &str) -> Self {
        client_address.parse().map_or(Self::Unknown, Self::Client)
    }
}

/// Returns the header. `service` is the connection's other end; `None`: it has no such address (a
/// Unix socket), and the unspecified one stands for it.
#[must_use]
pub(super) fn encode(
    version: ProxyVersion,
    origin: Origin,
    service: Option<SocketAddr>,
) -> Vec<u8> {
    match (version, origin) {
        (ProxyVersion::V1, Origin::Client(client)) => {
            let addresses = match pair(client, service) {
                (SocketAddr::V4(from), SocketAddr::V4(to)) => {
                    v1::Addresses::new_tcp4(*from.ip(), *to.ip(), from.port(), to.port())
                }
                (from, to) => {
                    v1::Addresses::new_tcp6(six(from.ip()), six(to.ip()), from.port(), to.port())
                }
            };
            addresses.to_string().into_bytes()
        }
        (ProxyVersion::V1, _) => v1::Addresses::Unknown.to_string().into_bytes(),
        (ProxyVersion::V2, Origin::Client(client)) => {
            binary(v2::Command::Proxy, v2::Protocol::Stream, pair(client, service).into())
        }
        // An unspecified family under PROXY: the receiver uses what it sees (§2.2).
        (ProxyVersion::V2, Origin::Unknown) => {
            binary(v2::Command::Proxy, v2::Protocol::Unspecified, v2::Addresses::Unspecified)
        }
        (ProxyVersion::V2, Origin::Own) => {
            binary(v2::Command::Local, v2::Protocol::Unspecified, v2::Addresses::Unspecified)
        }
    }
}

fn binary(command: v2::Command, protocol: v2::Protocol, addresses: v2::Addresses) -> Vec<u8> {
    v2::Builder::with_addresses(v2::Version::Two | command, protocol, addresses)
        .build()
        .expect("a header without extensions is short")
}

/// Both ends in one family: the header has room for one.
fn pair(client: SocketAddr, service: Option<SocketAddr>) -> (SocketAddr, SocketAddr) {
    let client = SocketAddr::new(client.ip().to_canonical(), client.port());
    let service = match service {
        Some(service) => SocketAddr::new(service.ip().to_canonical(), service.port()),
        None => SocketAddr::new(Ipv4Addr::UNSPECIFIED.into(), 0),
    };
    if client.is_ipv4() == service.is_ipv4() {
        return (client, service);
    }
    let mapped = |address: SocketAddr| SocketAddr::new(six(address.ip()).into(), address.port());
    (mapped(client), mapped(service))
}

fn six(ip: IpAddr) -> std::net::Ipv6Addr {
    match ip {
        IpAddr::V4(ip) => ip.to_ipv6_mapped(),
        IpAddr::V6(ip) => ip,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_text_names_both_ends_in_one_family() {
        for (client, service, expected) in [
            (
                "192.0.2.1:4711",
                Some("127.0.0.1:3000"),
                "PROXY TCP4 192.0.2.1 127.0.0.1 4711 3000\r\n",
            ),
            ("[2001:db8::1]:4711", Some("[::1]:3000"), "PROXY TCP6 2001:db8::1 ::1 4711 3000\r\n"),
            (
                "[::ffff:192.0.2.1]:4711",
                Some("127.0.0.1:3000"),
                "PROXY TCP4 192.0.2.1 127.0.0.1 4711 3000\r\n",
            ),
            (
                "[2001:db8::1]:4711",
                Some("127.0.0.1:3000"),
                "PROXY TCP6 2001:db8::1 ::ffff:127.0.0.1 4711 3000\r\n",
            ),
            ("192.0.2.1:4711", None, "PROXY TCP4 192.0.2.1 0.0.0.0 4711 0\r\n"),
            ("", Some("127.0.0.1:3000"), "PROXY UNKNOWN\r\n"),
        ] {
            let service = service.map(|address| address.parse().expect("an address"));
            let header = encode(ProxyVersion::V1, Origin::of(client), service);
            assert_eq!(String::from_utf8(header).expect("text"), expected, "{client}");
        }
        assert_eq!(encode(ProxyVersion::V1, Origin::Own, None), b"PROXY UNKNOWN\r\n");
    }

    #[test]
    fn the_binary_form_is_as_specified_to_the_byte() {
        const SIGNATURE: &[u8] = b"\r\n\r\n\0\r\nQUIT\n";
        let service = Some("127.0.0.1:3000".parse().expect("an address"));
        let header = encode(ProxyVersion::V2, Origin::of("192.0.2.1:4711"), service);
        let rest = [0x21, 0x11, 0, 12, 192, 0, 2, 1, 127, 0, 0, 1, 0x12, 0x67, 0x0b, 0xb8];
        assert_eq!(header, [SIGNATURE, &rest].concat());
        let header = encode(ProxyVersion::V2, Origin::of("[2001:db8::1]:4711"), service);
        assert_eq!((&header[..12], &header[12..16]), (SIGNATURE, &[0x21, 0x21, 0, 36][..]));
        for (origin, command) in [(Origin::Own, 0x20), (Origin::Unknown, 0x21)] {
            let header = encode(ProxyVersion::V2, origin, service);
            assert_eq!(header, [SIGNATURE, &[command, 0, 0, 0]].concat(), "{origin:?}");
        }
    }
}

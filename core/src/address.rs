//! Whose an address is, where clients are counted by theirs.

use std::net::{IpAddr, Ipv6Addr};

/// Of an IPv6 address: what one customer is given at least, and moves about in at will.
const IPV6_BITS: u32 = 64;

/// Returns what stands for all addresses of one client: an IPv4 address, written as IPv6 or not, or the
/// network of an IPv6 one.
pub(crate) fn client(address: IpAddr) -> IpAddr {
    match address.to_canonical() {
        IpAddr::V6(address) => {
            let mask = u128::MAX << (128 - IPV6_BITS);
            Ipv6Addr::from_bits(address.to_bits() & mask).into()
        }
        address @ IpAddr::V4(_) => address,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_ipv6_network_is_one_client() {
        let of = |text: &str| client(text.parse().unwrap()).to_string();
        for (address, expected) in [
            ("192.0.2.1", "192.0.2.1"),
            ("::ffff:192.0.2.1", "192.0.2.1"),
            ("2001:db8:1:2:3:4:5:6", "2001:db8:1:2::"),
            ("2001:db8:1:3::", "2001:db8:1:3::"),
        ] {
            assert_eq!(of(address), expected);
        }
    }
}

//! Scalar values of the configuration language: durations, sizes, names, addresses, secrets.
//!
//! Each parser returns what is wrong as text that names what is accepted; where it stands is the
//! caller's knowledge.

use std::fmt;
use std::net::{IpAddr, Ipv6Addr, SocketAddr};
use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use ipnet::IpNet;

use super::ServiceAddress;

/// Longest name of a route, tunnel, listener or plugin; names are metric labels.
const NAME_BYTES_MAX: usize = 63;

/// Longest `protocol_type`.
const PROTOCOL_TYPE_BYTES_MAX: usize = 32;

/// Longest host name (RFC 1035 §2.3.4, without the final dot).
pub(crate) const HOST_BYTES_MAX: usize = 253;

/// A value that is never printed.
#[derive(Clone, PartialEq, Eq)]
pub struct Secret(Arc<str>);

impl Secret {
    /// Wraps a secret.
    #[must_use]
    pub fn new(text: &str) -> Self {
        Self(text.into())
    }

    /// Returns the secret itself. Compare it in constant time where the other side chose its value.
    #[must_use]
    pub fn expose(&self) -> &str {
        &self.0
    }
}

impl fmt::Debug for Secret {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("***")
    }
}

impl fmt::Display for Secret {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("***")
    }
}

/// A host name or address with a port, not resolved.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct HostPort {
    /// `relay.example.org`, `192.0.2.1`, `2001:db8::1` (no brackets), lower case.
    pub host: Arc<str>,
    /// Port.
    pub port: u16,
}

impl HostPort {
    /// Returns whether only this machine can be meant.
    #[must_use]
    pub fn is_loopback(&self) -> bool {
        &*self.host == "localhost"
            || self.host.parse::<IpAddr>().is_ok_and(|address| address.is_loopback())
    }
}

impl fmt::Display for HostPort {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if self.host.contains(':') {
            write!(f, "[{}]:{}", self.host, self.port)
        } else {
            write!(f, "{}:{}", self.host, self.port)
        }
    }
}

impl From<SocketAddr> for HostPort {
    fn from(address: SocketAddr) -> Self {
        Self { host: address.ip().to_string().into(), port: address.port() }
    }
}

/// Parses `250ms`, `30s`, `1m30s`.
pub(crate) fn duration(text: &str) -> Result<Duration, String> {
    let bad = || {
        let hint = if !text.is_empty() && text.bytes().all(|b| b.is_ascii_digit()) {
            format!("; did you mean \"{text}s\"?")
        } else {
            String::new()
        };
        format!(
            "\"{text}\" is not a duration (accepted: whole numbers with ms, s, m or h, as in \
             250ms, 30s, 1m30s){hint}"
        )
    };
    let mut rest = text;
    let mut total = Duration::ZERO;
    let mut last_unit = u64::MAX;
    if rest.is_empty() {
        return Err(bad());
    }
    while !rest.is_empty() {
        let digits = rest.bytes().take_while(u8::is_ascii_digit).count();
        let number: u64 = rest[..digits].parse().map_err(|_| bad())?;
        rest = &rest[digits..];
        let letters = rest.bytes().take_while(u8::is_ascii_alphabetic).count();
        let unit: u64 = match &rest[..letters] {
            "ms" => 1,
            "s" => 1_000,
            "m" => 60_000,
            "h" => 3_600_000,
            _ => return Err(bad()),
        };
        rest = &rest[letters..];
        if unit >= last_unit {
            return Err(bad());
        }
        last_unit = unit;
        let part = number.checked_mul(unit).map(Duration::from_millis).ok_or_else(bad)?;
        total = total.checked_add(part).ok_or_else(bad)?;
    }
    Ok(total)
}

/// Returns the shortest text that `duration` takes for this value.
#[must_use]
pub fn duration_text(value: Duration) -> String {
    let ms = value.as_millis();
    match ms {
        0 => "0s".to_owned(),
        _ if ms.is_multiple_of(3_600_000) => format!("{}h", ms / 3_600_000),
        _ if ms.is_multiple_of(60_000) => format!("{}m", ms / 60_000),
        _ if ms.is_multiple_of(1_000) => format!("{}s", ms / 1_000),
        _ => format!("{ms}ms"),
    }
}

/// Units of sizes, largest first.
const SIZE_UNITS: [(&str, u64); 4] =
    [("GiB", 1 << 30), ("MiB", 1 << 20), ("KiB", 1 << 10), ("B", 1)];

/// Parses `512B`, `64KiB`, `16MiB`, `2GiB`.
pub(crate) fn size(text: &str) -> Result<u64, String> {
    let bad = |hint: String| {
        format!(
            "\"{text}\" is not a size (accepted: a whole number with B, KiB, MiB or GiB, as in \
             64KiB){hint}"
        )
    };
    let digits = text.bytes().take_while(u8::is_ascii_digit).count();
    let (number, unit) = text.split_at(digits);
    let Ok(number) = number.parse::<u64>() else { return Err(bad(String::new())) };
    let Some((_, factor)) = SIZE_UNITS.iter().find(|(name, _)| *name == unit) else {
        let meant = match unit.trim().to_ascii_lowercase().as_str() {
            "" | "b" => "B",
            "k" | "kb" | "ki" | "kib" => "KiB",
            "m" | "mb" | "mi" | "mib" => "MiB",
            "g" | "gb" | "gi" | "gib" => "GiB",
            _ => return Err(bad(String::new())),
        };
        return Err(bad(format!("; did you mean \"{number}{meant}\"?")));
    };
    number.checked_mul(*factor).ok_or_else(|| bad(String::new()))
}

/// Returns the shortest text that `size` takes for this value.
#[must_use]
pub fn size_text(value: u64) -> String {
    SIZE_UNITS
        .iter()
        .find(|(_, factor)| value > 0 && value.is_multiple_of(*factor))
        .map_or_else(|| format!("{value}B"), |(unit, factor)| format!("{}{unit}", value / factor))
}

/// Parses the name of a route, tunnel, listener or plugin.
pub(crate) fn name(text: &str) -> Result<Arc<str>, String> {
    let good = text.len() <= NAME_BYTES_MAX
        && text.starts_with(|c: char| c.is_ascii_alphanumeric())
        && text
            .bytes()
            .all(|b| b.is_ascii_alphanumeric() || matches!(b, b'-' | b'_' | b'.' | b'/'));
    if good {
        Ok(text.into())
    } else {
        Err(format!(
            "\"{text}\" is not a name (accepted: 1 to {NAME_BYTES_MAX} letters, digits, '-', '_', \
             '.' and '/', a letter or digit first)"
        ))
    }
}

/// Parses a `protocol_type`.
pub(crate) fn protocol_type(text: &str) -> Result<Arc<str>, String> {
    let upper = text.to_ascii_uppercase();
    let good = |text: &str| {
        text.len() <= PROTOCOL_TYPE_BYTES_MAX
            && text.starts_with(|c: char| c.is_ascii_uppercase())
            && text
                .bytes()
                .all(|b| b.is_ascii_uppercase() || b.is_ascii_digit() || matches!(b, b'_' | b'-'))
    };
    if good(text) {
        return Ok(text.into());
    }
    let hint = if good(&upper) { format!("; did you mean \"{upper}\"?") } else { String::new() };
    Err(format!(
        "\"{text}\" is not a protocol type (accepted: 1 to {PROTOCOL_TYPE_BYTES_MAX} upper-case \
         letters, digits, '-' and '_', as in HTTP){hint}"
    ))
}

/// Parses a host name: lower-cased, without a final dot. Accepts IP addresses as well.
pub(crate) fn host(text: &str) -> Result<Arc<str>, String> {
    if let Ok(address) = text.parse::<IpAddr>() {
        return Ok(address.to_string().into());
    }
    let lower = text.strip_suffix('.').unwrap_or(text).to_ascii_lowercase();
    if is_host_name(&lower) {
        return Ok(lower.into());
    }
    let hint = if text.contains("://") {
        "; leave out the scheme"
    } else if text.contains('/') {
        "; a path goes to path_prefix"
    } else if text.rsplit_once(':').is_some_and(|(host, port)| {
        is_host_name(&host.to_ascii_lowercase()) && port.parse::<u16>().is_ok()
    }) {
        "; leave out the port"
    } else {
        ""
    };
    Err(format!(
        "\"{text}\" is not a host name (accepted: labels of letters, digits and '-', joined by \
         dots, at most {HOST_BYTES_MAX} characters){hint}"
    ))
}

fn is_host_name(text: &str) -> bool {
    text.len() <= HOST_BYTES_MAX && text.split('.').all(is_label)
}

/// Underscores are no part of a host name by RFC 952, but of many a service's name.
fn is_label(label: &str) -> bool {
    (1..=63).contains(&label.len())
        && label
            .bytes()
            .all(|b| b.is_ascii_lowercase() || b.is_ascii_digit() || matches!(b, b'-' | b'_'))
        && !label.starts_with('-')
        && !label.ends_with('-')
}

/// Parses a subdomain: one label or more, lower-cased.
pub(crate) fn subdomain(text: &str) -> Result<Arc<str>, String> {
    let lower = text.to_ascii_lowercase();
    if is_host_name(&lower) {
        return Ok(lower.into());
    }
    let hint = if text.starts_with('*') { "; a wildcard goes to wildcard" } else { "" };
    Err(format!(
        "\"{text}\" is not a subdomain (accepted: labels of letters, digits and '-', joined by \
         dots, without the base domain){hint}"
    ))
}

/// Parses `*.apps` or `*` and returns what follows the star and its dot.
pub(crate) fn wildcard(text: &str) -> Result<Arc<str>, String> {
    let lower = text.to_ascii_lowercase();
    let suffix = match lower.as_str() {
        "*" => Some(""),
        _ => lower.strip_prefix("*.").filter(|suffix| is_host_name(suffix)),
    };
    suffix.map(Arc::from).ok_or_else(|| {
        format!(
            "\"{text}\" is not a wildcard (accepted: \"*\", or \"*.\" and labels, as in *.apps)"
        )
    })
}

/// Parses a path prefix; a final `/` is dropped, since prefixes match whole segments.
pub(crate) fn path_prefix(text: &str) -> Result<Arc<str>, String> {
    if !text.starts_with('/') {
        return Err(format!(
            "\"{text}\" is not a path prefix (accepted: text that begins with '/'); did you mean \
             \"/{text}\"?"
        ));
    }
    if let Some(bad) =
        text.chars().find(|c| matches!(c, '?' | '#') || c.is_whitespace() || c.is_control())
    {
        return Err(format!(
            "\"{text}\" is not a path prefix: it holds {bad:?}, which no path does (accepted: text that \
             begins with '/', as in /api)"
        ));
    }
    Ok(text.trim_end_matches('/').into())
}

/// Parses the prefix that a route takes: services must read it as it is written.
pub(crate) fn route_prefix(text: &str) -> Result<Arc<str>, String> {
    let prefix = path_prefix(text)?;
    if crate::router::is_plain(&prefix) {
        return Ok(prefix);
    }
    Err(format!(
        "\"{text}\" is no prefix that a route can take, since services read it in more than one way \
         (accepted: segments other than '.' and '..', without '//', ';' and '\\', and without escapes of \
         what needs none)"
    ))
}

/// Parses `127.0.0.1:9080` or `[::1]:9080`.
pub(crate) fn socket_address(text: &str) -> Result<SocketAddr, String> {
    text.parse().map_err(|_| {
        let hint = match text.rsplit_once(':') {
            Some(("localhost", port)) => format!("; did you mean \"127.0.0.1:{port}\"?"),
            Some(("" | "*", port)) => format!("; did you mean \"0.0.0.0:{port}\"?"),
            None if text.parse::<u16>().is_ok() => format!("; did you mean \"127.0.0.1:{text}\"?"),
            _ => String::new(),
        };
        format!(
            "\"{text}\" is not an address to listen on (accepted: IP:port, as in 127.0.0.1:9080 or \
             [::1]:9080){hint}"
        )
    })
}

/// Parses `relay.example.org:9081`, `127.0.0.1:3000` or `[::1]:3000`.
pub(crate) fn host_port(text: &str) -> Result<HostPort, String> {
    let accepted = "host:port, as in 127.0.0.1:3000, relay.example.org:9081 or [::1]:3000";
    host_port_among(text, accepted)
}

/// Parses what others are to dial: an address of [`host_port`]'s, but none that stands for all of a machine's, which is
/// theirs where they dial it.
pub(crate) fn dialled_by_others(text: &str) -> Result<HostPort, String> {
    let address = host_port(text)?;
    if address.host.parse::<IpAddr>().is_ok_and(|ip| ip.to_canonical().is_unspecified()) {
        return Err(format!(
            "\"{text}\" is every address of a machine, and nobody else can dial it (accepted: host:port at which \
             sidecars reach the relay, as in relay-1.example.org:9081 or 192.0.2.1:9081)"
        ));
    }
    Ok(address)
}

/// As [`host_port`], where more than that is `accepted`.
pub(super) fn host_port_among(text: &str, accepted: &str) -> Result<HostPort, String> {
    let bad = |hint: String| format!("\"{text}\" is not an address (accepted: {accepted}){hint}");
    if let Ok(address) = text.parse::<SocketAddr>() {
        return match address.port() {
            0 => Err(bad("; port 0 cannot be dialled".to_owned())),
            _ => Ok(address.into()),
        };
    }
    if let Some((_, rest)) = text.split_once("://") {
        return Err(bad(format!("; did you mean \"{}\"?", rest.trim_end_matches('/'))));
    }
    if text.parse::<u16>().is_ok_and(|port| port > 0) {
        return Err(bad(format!("; did you mean \"127.0.0.1:{text}\"?")));
    }
    let Some((name, port)) = text.rsplit_once(':') else { return Err(bad(String::new())) };
    let lower = name.to_ascii_lowercase();
    match port.parse::<u16>() {
        Ok(port) if port > 0 && is_host_name(&lower) => Ok(HostPort { host: lower.into(), port }),
        _ => Err(bad(String::new())),
    }
}

/// Parses what a `Host` field holds: a host name or address, with a port or without.
pub(crate) fn authority(text: &str) -> Result<Arc<str>, String> {
    let bad = |hint: &str| {
        format!(
            "\"{text}\" is not a host (accepted: host or host:port, as in app.internal or \
             [::1]:8080){hint}"
        )
    };
    if let Ok(address) = text.parse::<SocketAddr>() {
        return Ok(address.to_string().into());
    }
    if let Some(address) = text.strip_prefix('[').and_then(|rest| rest.strip_suffix(']')) {
        let address: Ipv6Addr = address.parse().map_err(|_| bad(""))?;
        return Ok(format!("[{address}]").into());
    }
    if text.parse::<Ipv6Addr>().is_ok() {
        return Err(bad(&format!("; did you mean \"[{text}]\"?")));
    }
    let (name, port) = match text.split_once(':') {
        Some((name, port)) => (name, Some(port)),
        None => (text, None),
    };
    let name = name.to_ascii_lowercase();
    match port.map(str::parse::<u16>) {
        None if is_host_name(&name) => Ok(name.into()),
        Some(Ok(port)) if port > 0 && is_host_name(&name) => Ok(format!("{name}:{port}").into()),
        _ if text.contains("://") => Err(bad("; leave out the scheme")),
        _ if text.contains('/') => Err(bad("; a path goes to path_prefix")),
        _ => Err(bad("")),
    }
}

/// Bits of `::ffff:0:0/96`, behind which an IPv4 address stands (RFC 4291 §2.5.5.2).
const MAPPED_BITS: u8 = 96;

/// Parses `10.0.0.0/8`, `2001:db8::/32`, or an address, which is a network of its own. An IPv4 network
/// in IPv6's writing is one of IPv4, as clients' addresses are.
pub(crate) fn network(text: &str) -> Result<IpNet, String> {
    let bad = |what: &str, hint: String| {
        format!(
            "\"{text}\" {what} (accepted: an address or address/bits, as in 192.0.2.7, 10.0.0.0/8 \
             or 2001:db8::/32){hint}"
        )
    };
    if let Ok(address) = text.parse::<IpAddr>() {
        return Ok(address.to_canonical().into());
    }
    let network: IpNet = text.parse().map_err(|_| bad("is not a network", String::new()))?;
    let whole = network.trunc();
    if whole != network {
        let hint = format!("; did you mean \"{whole}\" or \"{}\"?", network.addr());
        return Err(bad("has bits beyond its length", hint));
    }
    let within = network.prefix_len().checked_sub(MAPPED_BITS);
    match (network.addr().to_canonical(), within) {
        (IpAddr::V4(address), Some(bits)) if matches!(network, IpNet::V6(_)) => {
            IpNet::new(address.into(), bits).map_err(|_| bad("is not a network", String::new()))
        }
        _ => Ok(network),
    }
}

/// Returns the shortest text that `network` takes for this value.
#[must_use]
pub fn network_text(network: &IpNet) -> String {
    if network.prefix_len() == network.max_prefix_len() {
        network.addr().to_string()
    } else {
        network.to_string()
    }
}

/// Parses `20%`, from 1 to 100.
pub(crate) fn percent(text: &str) -> Result<u32, String> {
    let number = text.strip_suffix('%').map(str::parse::<u32>);
    match number {
        Some(Ok(percent)) if (1..=100).contains(&percent) => Ok(percent),
        _ => {
            let hint = match text.parse::<u32>() {
                Ok(percent) if (1..=100).contains(&percent) => {
                    format!("; did you mean \"{text}%\"?")
                }
                _ => String::new(),
            };
            Err(format!("\"{text}\" is not a share (accepted: 1% to 100%){hint}"))
        }
    }
}

/// Longest path of a Unix socket: `sun_path` holds 108 bytes with the zero at its end.
const UNIX_PATH_BYTES_MAX: usize = 107;

/// Parses `127.0.0.1:3000`, which is `http://127.0.0.1:3000` as well, `https://127.0.0.1:8443` or
/// `unix:/run/app.sock`. Returns as well whether
/// it is spoken to by TLS.
pub(crate) fn service(text: &str) -> Result<(ServiceAddress, bool), String> {
    let (scheme, rest, is_tls, port) = match text.split_once("://") {
        Some((scheme @ "http", rest)) => (scheme, rest, false, 80),
        Some((scheme @ "https", rest)) => (scheme, rest, true, 443),
        _ => return plain_service(text).map(|service| (service, false)),
    };
    let bad = |hint: &str| {
        let by = if is_tls { " by TLS" } else { "" };
        let example = if is_tls { "127.0.0.1:8443" } else { "127.0.0.1:3000" };
        format!(
            "\"{text}\" is not a service{by} (accepted: {scheme}:// and host:port, as in \
             {scheme}://{example}){hint}"
        )
    };
    let address = rest.strip_suffix('/').unwrap_or(rest);
    match host_port(address) {
        Ok(address) => Ok((ServiceAddress::Tcp(address), is_tls)),
        Err(_) if address.contains('/') => Err(bad("; leave out the path")),
        Err(_) if is_host_name(&address.to_ascii_lowercase()) => {
            Err(bad(&format!("; did you mean \"{scheme}://{address}:{port}\"?")))
        }
        Err(_) => Err(bad("")),
    }
}

fn plain_service(text: &str) -> Result<ServiceAddress, String> {
    let Some(path) = text.strip_prefix("unix:") else {
        let hint = if text.starts_with('/') {
            format!("; did you mean \"unix:{text}\"?")
        } else {
            String::new()
        };
        let accepted = "host:port, as in 127.0.0.1:3000, the same behind https://, or unix:/path";
        return host_port_among(text, accepted)
            .map(ServiceAddress::Tcp)
            .map_err(|message| format!("{message}{hint}"));
    };
    let good = path.starts_with('/')
        && !path.starts_with("//")
        && !path.ends_with('/')
        && path.len() <= UNIX_PATH_BYTES_MAX
        && !path.contains('\0');
    if good {
        return Ok(ServiceAddress::Unix(Path::new(path).into()));
    }
    let absolute = path.trim_start_matches('/');
    let hint = if path.starts_with("//") && !absolute.is_empty() {
        format!("; did you mean \"unix:/{absolute}\"?")
    } else {
        String::new()
    };
    Err(format!(
        "\"{text}\" is not a Unix socket (accepted: unix: and an absolute path of at most \
         {UNIX_PATH_BYTES_MAX} bytes, as in unix:/run/app.sock){hint}"
    ))
}

/// Parses a path with or without a query, as a request asks for it.
pub(crate) fn request_path(text: &str) -> Result<Arc<str>, String> {
    let good = text.starts_with('/')
        && text.len() <= REQUEST_PATH_BYTES_MAX
        && !text.contains('#')
        && text.bytes().all(|byte| byte.is_ascii_graphic());
    if good {
        Ok(text.into())
    } else {
        Err(format!(
            "\"{text}\" is not a path (accepted: '/' and at most {REQUEST_PATH_BYTES_MAX} visible \
             ASCII characters without '#', as in /healthz)"
        ))
    }
}

/// Longest path that a health check asks for.
const REQUEST_PATH_BYTES_MAX: usize = 1024;

/// Parses the 64 hexadecimal digits of a SHA-256.
pub(crate) fn sha256(text: &str) -> Result<[u8; 32], String> {
    let bad = || format!("\"{text}\" is not a SHA-256 (accepted: 64 hexadecimal digits)");
    if text.len() != 64 || !text.bytes().all(|b| b.is_ascii_hexdigit()) {
        return Err(bad());
    }
    let mut hash = [0; 32];
    for (byte, pair) in hash.iter_mut().zip(text.as_bytes().chunks(2)) {
        let pair = std::str::from_utf8(pair).map_err(|_| bad())?;
        *byte = u8::from_str_radix(pair, 16).map_err(|_| bad())?;
    }
    Ok(hash)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn durations_add_their_units() {
        for (text, ms) in
            [("250ms", 250), ("30s", 30_000), ("1m30s", 90_000), ("2h", 7_200_000), ("0s", 0)]
        {
            assert_eq!(duration(text), Ok(Duration::from_millis(ms)), "{text}");
        }
        for text in ["", "30", "s", "1s1m", "1s1s", "1.5s", "-1s", "1 s", "99999999999999999999h"] {
            duration(text).unwrap_err();
        }
    }

    #[test]
    fn networks_of_ipv4_are_that_in_ipv6s_writing_too() {
        for (text, expected) in [
            ("10.0.0.0/8", "10.0.0.0/8"),
            ("192.0.2.7", "192.0.2.7"),
            ("::ffff:192.0.2.7", "192.0.2.7"),
            ("::ffff:10.0.0.0/104", "10.0.0.0/8"),
            ("::ffff:0:0/96", "0.0.0.0/0"),
            ("2001:db8::/32", "2001:db8::/32"),
            ("::/0", "::/0"),
            ("::1", "::1"),
        ] {
            assert_eq!(network(text).map(|network| network_text(&network)), Ok(expected.into()));
        }
        for text in ["", "10.0.0.1/8", "::ffff:10.0.0.1/104", "10.0.0.0/33", "a"] {
            network(text).unwrap_err();
        }
    }

    #[test]
    fn durations_and_sizes_read_what_they_print() {
        for ms in [0, 1, 250, 1000, 90_000, 120_000, 3_600_000, 3_601_000] {
            let value = Duration::from_millis(ms);
            assert_eq!(duration(&duration_text(value)), Ok(value));
        }
        for value in [0, 1, 1023, 1024, 65_536, 1 << 20, 3 << 30] {
            assert_eq!(size(&size_text(value)), Ok(value));
        }
    }

    #[test]
    fn sizes_need_a_binary_unit() {
        assert_eq!(size("64KiB"), Ok(65_536));
        assert!(size("64KB").unwrap_err().ends_with("did you mean \"64KiB\"?"));
        assert!(size("64").unwrap_err().ends_with("did you mean \"64B\"?"));
        size("99999999999GiB").unwrap_err();
        size("KiB").unwrap_err();
    }

    #[test]
    fn hosts_are_lower_cased_and_lose_their_final_dot() {
        assert_eq!(host("Api.Example.ORG.").as_deref(), Ok("api.example.org"));
        assert_eq!(host("::1").as_deref(), Ok("::1"));
        for text in ["", ".", "a..b", "-a", "a-", "a b", "http://a", "a/b", "a:80", &"a".repeat(64)]
        {
            host(text).unwrap_err();
        }
    }

    #[test]
    fn addresses_to_dial_need_a_port() {
        let plain = (ServiceAddress::Tcp(host_port("127.0.0.1:3000").unwrap()), false);
        for text in ["127.0.0.1:3000", "http://127.0.0.1:3000", "http://127.0.0.1:3000/"] {
            assert_eq!(service(text).as_ref(), Ok(&plain), "{text}");
        }
        assert_eq!(host_port("[::1]:3000").unwrap().to_string(), "[::1]:3000");
        assert!(host_port("[::1]:3000").unwrap().is_loopback());
        assert!(host_port("LOCALHOST:1").unwrap().is_loopback());
        assert!(!host_port("relay.example.org:9081").unwrap().is_loopback());
        for text in ["", "a", "a:", ":1", "a:0", "127.0.0.1:0", "a:65536", "http://a:1"] {
            host_port(text).unwrap_err();
        }
    }

    #[test]
    fn a_secret_is_not_printed() {
        let secret = Secret::new("s3cret");
        assert_eq!(format!("{secret} {secret:?} {:?}", Some(&secret)), "*** *** Some(***)");
    }

    #[test]
    fn a_hash_is_64_hexadecimal_digits() {
        assert_eq!(sha256(&"0a".repeat(32)), Ok([10; 32]));
        sha256(&"0g".repeat(32)).unwrap_err();
        sha256("00").unwrap_err();
        sha256(&"é".repeat(32)).unwrap_err();
        sha256(&format!("+{}", "0".repeat(63))).unwrap_err();
    }
}

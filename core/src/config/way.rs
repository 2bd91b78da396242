//! The way to a relay: what carries a lane's bytes, and the proxy that it goes through.
//!
//! Pure. How it is written in a file is `read::sidecar`'s business.

use std::fmt;
use std::net::IpAddr;
use std::sync::Arc;

use ipnet::IpNet;
use percent_encoding::percent_decode_str;

use super::value::{self, HostPort, Secret};
use super::{ClientTls, RelayAddress};

/// What carries a lane's bytes to a relay.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Over {
    /// TCP, plain or by TLS, as it is.
    Tcp,
    /// A WebSocket.
    WebSocket {
        /// Where it is at the relay, or at what stands before it.
        path: Arc<str>,
    },
    /// A gRPC stream.
    Grpc,
}

/// Where a WebSocket is where the file names no path.
pub const WEBSOCKET_PATH: &str = "/tunnel";

/// Longest path that is asked for.
const PATH_BYTES_MAX: usize = 1024;

/// Longest URL of a proxy.
const PROXY_BYTES_MAX: usize = 4096;

/// What a relay's address may be.
pub(super) const RELAY_ACCEPTED: &str = "host:port, as in relay.example.org:9081, the same behind tcp:// or \
     tls://, or ws://, wss://, grpc:// or grpcs:// and host or host:port";

/// Whether an address says that it is dialled by TLS.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Says {
    Tls,
    Plain,
    /// TLS beyond loopback, or where a `tls` block stands beside it.
    Nothing,
}

/// Parses a relay's address: `relay.example.org:9081`, `wss://relay.example.org/tunnel`.
pub(super) fn relay(text: &str) -> Result<(HostPort, Over, Says), String> {
    let bad = |hint: &str| format!("\"{text}\" is not a relay (accepted: {RELAY_ACCEPTED}){hint}");
    let Some((scheme, rest)) = text.split_once("://") else {
        let address = value::host_port_among(text, RELAY_ACCEPTED)?;
        return Ok((address, Over::Tcp, Says::Nothing));
    };
    let (rest, path) = rest.find('/').map_or((rest, ""), |at| rest.split_at(at));
    let (says, port) = match scheme {
        "tcp" => (Says::Nothing, None),
        "tls" => (Says::Tls, None),
        "ws" | "grpc" => (Says::Plain, Some(80)),
        "wss" | "grpcs" => (Says::Tls, Some(443)),
        "http" => return Err(bad(&format!("; did you mean \"ws://{rest}{path}\"?"))),
        "https" => return Err(bad(&format!("; did you mean \"wss://{rest}{path}\"?"))),
        _ => return Err(bad("")),
    };
    if rest.contains('@') {
        return Err(bad("; credentials are no part of it: set sidecar.token"));
    }
    let address = match (value::host_port(rest), port) {
        (Ok(address), _) => address,
        (Err(_), Some(port)) => {
            value::host_port(&format!("{rest}:{port}")).map_err(|_not_either| bad(""))?
        }
        (Err(_), None) => return Err(bad("")),
    };
    let over = match scheme {
        "ws" | "wss" => Over::WebSocket {
            path: self::path(path).ok_or_else(|| {
                bad("; its path may have at most 1024 visible characters, and no #")
            })?,
        },
        _ if !matches!(path, "" | "/") => return Err(bad("; leave out the path")),
        "grpc" | "grpcs" => Over::Grpc,
        _ => Over::Tcp,
    };
    Ok((address, over, says))
}

fn path(text: &str) -> Option<Arc<str>> {
    let is_good = |byte: u8| byte.is_ascii_graphic() && !b"#\"<>\\^`{|}".contains(&byte);
    match text {
        "" => Some(WEBSOCKET_PATH.into()),
        text => (text.len() <= PATH_BYTES_MAX && text.bytes().all(is_good)).then(|| text.into()),
    }
}

impl fmt::Display for RelayAddress {
    /// As it may be written in a file, but for what stands beside it there. Tells relays apart.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let (address, s) = (&self.address, if self.tls.is_some() { "s" } else { "" });
        match &self.over {
            Over::Tcp => address.fmt(f),
            Over::WebSocket { path } => write!(f, "ws{s}://{address}{path}"),
            Over::Grpc => write!(f, "grpc{s}://{address}"),
        }
    }
}

/// Where a relay is that is named as `RelayAddress` shows itself: `host:port`.
#[must_use]
pub fn place(relay: &str) -> &str {
    let rest = relay.split_once("://").map_or(relay, |(_, rest)| rest);
    rest.find('/').map_or(rest, |at| &rest[..at])
}

impl RelayAddress {
    /// Returns a relay that is dialled in this way.
    pub(super) fn by(
        address: HostPort,
        over: Over,
        says: Says,
        tls: Option<Arc<ClientTls>>,
    ) -> Self {
        let is_tls = match says {
            Says::Tls => true,
            Says::Plain => false,
            Says::Nothing => tls.is_some() || !address.is_loopback(),
        };
        let tls = is_tls.then(|| tls.unwrap_or_default());
        Self { over, tls, ..Self::new(address) }
    }
}

/// An HTTP proxy on the way to a relay.
#[derive(Clone, PartialEq, Eq)]
pub struct Proxy {
    /// Where.
    pub address: HostPort,
    /// Who we are to it: `user:password`.
    pub credentials: Option<Secret>,
}

impl fmt::Debug for Proxy {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Proxy({self})")
    }
}

impl fmt::Display for Proxy {
    /// Without what it knows us by.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let credentials = if self.credentials.is_some() { "***@" } else { "" };
        write!(f, "http://{credentials}{}", self.address)
    }
}

impl Proxy {
    /// Parses `http://proxy:3128`, `http://user:password@proxy:3128`, or `proxy:3128`.
    ///
    /// # Errors
    /// What is accepted, without a word of the text: it may hold a password.
    pub(super) fn parse(text: &str) -> Result<Self, String> {
        let bad = |what: &str| {
            format!("{what} (accepted: http://host:port or http://user:password@host:port)")
        };
        let rest = match text.split_once("://") {
            Some(("http", rest)) => rest,
            Some((scheme, _)) if scheme.bytes().all(|byte| byte.is_ascii_alphanumeric()) => {
                return Err(bad(&format!("a proxy by {scheme}:// cannot be used")));
            }
            Some(_) => return Err(bad("is no proxy")),
            None => text,
        };
        let rest = rest.strip_suffix('/').unwrap_or(rest);
        let (credentials, address) = match rest.rsplit_once('@') {
            Some((credentials, address)) => (Some(credentials), address),
            None => (None, rest),
        };
        let address = value::host_port(address)
            .or_else(|_| value::host_port(&format!("{address}:80")))
            .map_err(|_| bad("is no proxy"))?;
        let credentials = match credentials {
            None => None,
            Some(text) => Some(credentials_of(text).ok_or_else(|| bad("has no user"))?),
        };
        if text.len() > PROXY_BYTES_MAX {
            return Err(bad("is longer than 4096 bytes"));
        }
        Ok(Self { address, credentials })
    }
}

/// What Basic says of `user:password`, each percent-encoded; a user may have no password.
fn credentials_of(text: &str) -> Option<Secret> {
    let (user, password) = text.split_once(':').unwrap_or((text, ""));
    let decoded = |part| percent_decode_str(part).decode_utf8().ok();
    let (user, password) = (decoded(user)?, decoded(password)?);
    let is_good = |text: &str| !text.contains(char::is_control);
    let holds = !user.is_empty() && !user.contains(':') && is_good(&user) && is_good(&password);
    holds.then(|| Secret::new(&format!("{user}:{password}")))
}

/// Whether `NO_PROXY` says that an address is dialled without one: `*`, names with all that is below
/// them, addresses, networks; each with a port or without. Entries are parted by commas.
pub(super) fn bypasses(no_proxy: &str, address: &HostPort) -> bool {
    no_proxy.split(',').map(str::trim).any(|entry| {
        if entry == "*" {
            return true;
        }
        if let Ok(network) = entry.parse::<IpNet>() {
            return address.host.parse().is_ok_and(|ip: IpAddr| network.contains(&ip));
        }
        let bare = |entry: &str| -> Option<IpAddr> {
            entry.trim_start_matches('[').trim_end_matches(']').parse().ok()
        };
        if let Some(ip) = bare(entry) {
            return address.host.parse().is_ok_and(|host: IpAddr| host == ip);
        }
        let (name, port) = match entry.rsplit_once(':') {
            Some((name, port)) => match port.parse::<u16>() {
                Ok(port) => (name, Some(port)),
                Err(_) => return false,
            },
            None => (entry, None),
        };
        if port.is_some_and(|port| port != address.port) {
            return false;
        }
        if let Some(ip) = bare(name) {
            return address.host.parse().is_ok_and(|host: IpAddr| host == ip);
        }
        let name = name.trim_start_matches("*.").trim_start_matches('.').to_ascii_lowercase();
        let above = address.host.strip_suffix(&name);
        !name.is_empty() && above.is_some_and(|above| above.is_empty() || above.ends_with('.'))
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn shown(text: &str) -> Result<String, String> {
        let (address, over, says) = relay(text)?;
        let relay = RelayAddress::by(address, over, says, None);
        Ok(format!("{relay} {}", if relay.tls.is_some() { "tls" } else { "plain" }))
    }

    #[test]
    fn a_scheme_says_what_carries_and_whether_by_tls() {
        for (text, expected) in [
            ("relay.example.org:9081", "relay.example.org:9081 tls"),
            ("127.0.0.1:9081", "127.0.0.1:9081 plain"),
            ("tcp://127.0.0.1:9081", "127.0.0.1:9081 plain"),
            ("tcp://Relay.example.org:9081/", "relay.example.org:9081 tls"),
            ("tls://127.0.0.1:9081", "127.0.0.1:9081 tls"),
            ("ws://127.0.0.1:9081", "ws://127.0.0.1:9081/tunnel plain"),
            ("ws://relay.example.org", "ws://relay.example.org:80/tunnel plain"),
            ("wss://relay.example.org/a/b?c=d", "wss://relay.example.org:443/a/b?c=d tls"),
            ("wss://localhost:8443/", "wss://localhost:8443/ tls"),
            ("grpc://[::1]:9081", "grpc://[::1]:9081 plain"),
            ("grpc://[2001:db8::1]", "grpc://[2001:db8::1]:80 plain"),
            ("grpcs://relay.example.org/", "grpcs://relay.example.org:443 tls"),
        ] {
            assert_eq!(shown(text).as_deref(), Ok(expected), "{text}");
            let shown = shown(text).unwrap();
            let shown = shown.split(' ').next().unwrap();
            assert_eq!(relay(shown).map(|parsed| parsed.0), relay(text).map(|parsed| parsed.0));
            assert_eq!(value::host_port(place(shown)), relay(text).map(|parsed| parsed.0));
        }
        for (text, expected) in [
            ("http://relay.example.org", "did you mean \"ws://relay.example.org\"?"),
            ("https://relay.example.org/x", "did you mean \"wss://relay.example.org/x\"?"),
            ("quic://relay.example.org:1", "ws://, wss://"),
            ("tcp://relay.example.org", "host:port"),
            ("grpc://relay.example.org/path", "leave out the path"),
            ("wss://user:secret@relay.example.org", "set sidecar.token"),
            ("wss://relay.example.org/a b", "visible characters"),
            ("wss://", "is not a relay"),
            ("wss://relay.example.org:0", "is not a relay"),
            ("relay.example.org", "ws://, wss://"),
        ] {
            let error = shown(text).expect_err(text);
            assert!(error.contains(expected), "{error}");
        }
    }

    #[test]
    fn a_proxy_is_a_url_and_shows_no_password() {
        for (text, expected, credentials) in [
            ("http://proxy:3128", "http://proxy:3128", None),
            ("proxy:3128", "http://proxy:3128", None),
            ("http://proxy/", "http://proxy:80", None),
            ("http://me:pass@proxy:3128/", "http://***@proxy:3128", Some("me:pass")),
            ("http://me@[::1]:3128", "http://***@[::1]:3128", Some("me:")),
            ("http://me:p%40%3ass@proxy:1", "http://***@proxy:1", Some("me:p@:ss")),
        ] {
            let proxy = Proxy::parse(text).expect(text);
            assert_eq!(proxy.to_string(), expected);
            assert_eq!(proxy.credentials.as_ref().map(Secret::expose), credentials);
            assert!(!format!("{proxy:?}").contains("pass"));
        }
        for text in [
            "",
            "https://me:secret@proxy:3128",
            "socks5://proxy:1080",
            "http://secret:@",
            "http://:secret@proxy:1",
            "http://m%3ae:secret@proxy:1",
            "http://me:secret%0a@proxy:1",
            "http://me:secret@proxy:port",
        ] {
            let error = Proxy::parse(text).expect_err(text);
            assert!(error.contains("http://user:password@host:port"), "{error}");
            assert!(!error.contains("secret"), "{error}");
        }
    }

    #[test]
    fn no_proxy_names_what_is_dialled_directly() {
        let address = |text: &str| value::host_port(text).unwrap();
        for (entries, relay, expected) in [
            ("", "relay.example.org:443", false),
            ("*", "relay.example.org:443", true),
            ("example.org", "relay.example.org:443", true),
            ("example.org", "example.org:443", true),
            (".Example.org", "relay.example.org:443", true),
            ("*.example.org", "relay.example.org:443", true),
            ("example.org", "badexample.org:443", false),
            ("a, relay.example.org:443", "relay.example.org:443", true),
            ("relay.example.org:9081", "relay.example.org:443", false),
            ("10.0.0.0/8,192.0.2.1", "10.1.2.3:443", true),
            ("10.0.0.0/8,192.0.2.1", "192.0.2.1:443", true),
            ("192.0.2.1:9081", "192.0.2.1:443", false),
            ("10.0.0.0/8", "relay.example.org:443", false),
            ("[2001:db8::1]:443,::1", "[2001:db8::1]:443", true),
            ("2001:db8::1", "[2001:db8::1]:443", true),
        ] {
            assert_eq!(bypasses(entries, &address(relay)), expected, "{entries} {relay}");
        }
    }
}

//! What a TLS handshake says of a client's connection: for which hosts it is, and who the client is.
//!
//! Pure. How a handshake is made is the relay's business.

use std::net::IpAddr;
use std::sync::Arc;

use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;
use http::{HeaderMap, HeaderName, HeaderValue};
use rustls::pki_types::CertificateDer;
use sidelane_tunnel::proto;

use crate::plugin::lend::Meta;
use crate::tls::identity::Identity;

/// The client's certificate (RFC 9440 §2.2).
const CLIENT_CERT: HeaderName = HeaderName::from_static("client-cert");

/// What it is signed by (RFC 9440 §2.3).
const CLIENT_CERT_CHAIN: HeaderName = HeaderName::from_static("client-cert-chain");

/// Longest value of `Client-Cert-Chain`; a longer one is left out. Chains of two to four certificates
/// are two to eight thousand bytes, and most services take heads of no more than that.
const CHAIN_BYTES_MAX: usize = 16 * 1024;

/// Facts of a TLS handshake; empty where the client sent none.
#[derive(Clone, Debug, Default)]
pub struct TlsFacts {
    /// Server name.
    pub sni: Arc<str>,
    /// Application protocol.
    pub alpn: Arc<str>,
    /// Subject of the client's certificate.
    pub client: Arc<str>,
    /// SHA-256 of the client's certificate.
    pub client_sha256: Option<[u8; 32]>,
    /// What the connection may be asked for.
    pub hosts: Hosts,
    /// The service is told of the client's certificate by this relay, and by nobody before it.
    pub forwards_client: bool,
    /// The client's certificate as the service is told of it, where that is configured.
    pub client_fields: Option<ClientFields>,
}

impl TlsFacts {
    /// Takes note of the client's certificates, the end's own first; `forward`: the service is told.
    pub fn set_client(&mut self, chain: &[CertificateDer<'_>], forward: bool) {
        let Some((end, rest)) = chain.split_first() else { return };
        if let Some(identity) = Identity::of(end) {
            self.client = identity.subject;
            self.client_sha256 = Some(identity.sha256);
        }
        self.client_fields = forward.then(|| ClientFields::new(end, rest));
    }

    /// Says in `meta` what is known.
    pub(crate) fn tell(&self, meta: &mut Meta) {
        meta.tls_sni = Arc::clone(&self.sni).into();
        meta.tls_alpn = Arc::clone(&self.alpn).into();
        meta.tls_client = Arc::clone(&self.client).into();
    }

    /// As the tunnel carries it.
    pub(crate) fn to_proto(&self) -> proto::TlsFacts {
        proto::TlsFacts {
            sni: String::from(&*self.sni),
            alpn: String::from(&*self.alpn),
            client_subject: String::from(&*self.client),
            client_certificate_sha256: self.client_sha256.map(Vec::from).unwrap_or_default().into(),
        }
    }
}

/// The hosts that a connection may be asked for (RFC 9110 §15.5.20).
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub enum Hosts {
    /// The one that the client named in its hello (SNI), for which the certificate is.
    Named(Arc<str>),
    /// The client named none: those of the certificate that it was shown.
    Shown(Arc<[Arc<str>]>),
    /// None: the certificate is not for the one that the client named.
    #[default]
    Uncovered,
}

impl Hosts {
    /// Returns the hosts of a connection on which the client named `sni`, and was shown a certificate of
    /// these names.
    #[must_use]
    pub fn new(sni: Option<&Arc<str>>, names: &Arc<[Arc<str>]>) -> Self {
        match sni {
            None => Self::Shown(Arc::clone(names)),
            Some(sni) if names.iter().any(|name| covers(name, without_dot(sni))) => {
                Self::Named(Arc::clone(sni))
            }
            Some(_) => Self::Uncovered,
        }
    }

    /// Returns whether a request for `authority` belongs here.
    #[must_use]
    pub fn allow(&self, authority: &[u8]) -> bool {
        match self {
            Self::Named(name) => {
                authority == name.as_bytes()
                    || host_of(authority).is_some_and(|host| {
                        without_dot(host).eq_ignore_ascii_case(without_dot(name))
                    })
            }
            Self::Shown(names) => host_of(authority).is_some_and(|host| {
                let host = without_dot(host);
                names.iter().any(|name| covers(name, host))
            }),
            Self::Uncovered => false,
        }
    }

    /// Returns why a request that does not belong here does not.
    #[must_use]
    pub const fn why_not(&self) -> &'static str {
        match self {
            Self::Named(_) => {
                "this connection's TLS is for another host: that of the handshake (SNI) differs"
            }
            Self::Shown(_) => {
                "this connection's TLS is for another host: the handshake named none (SNI), and the \
                 certificate shown is not for this one"
            }
            Self::Uncovered => "no certificate here is for the host that the handshake named (SNI)",
        }
    }
}

/// Returns whether a certificate's name stands for a host, as a client would judge it (RFC 9525 §6.3):
/// a star for one whole label, an address for itself.
fn covers(name: &str, host: &str) -> bool {
    let address = host.strip_prefix('[').and_then(|host| host.strip_suffix(']')).unwrap_or(host);
    if let Ok(address) = address.parse::<IpAddr>() {
        return name.parse() == Ok(address);
    }
    match name.strip_prefix("*.") {
        Some(parent) => host
            .split_once('.')
            .is_some_and(|(label, rest)| !label.is_empty() && rest.eq_ignore_ascii_case(parent)),
        None => host.eq_ignore_ascii_case(name),
    }
}

/// Returns an authority without its port; `None`: it is no text.
fn host_of(authority: &[u8]) -> Option<&str> {
    let authority = str::from_utf8(authority).ok()?;
    // An IPv6 address has colons within its brackets.
    Some(match authority.rsplit_once(':') {
        Some((host, port)) if !port.contains(']') => host,
        _ => authority,
    })
}

/// `a.example.` is the same host as `a.example`.
fn without_dot(host: &str) -> &str {
    host.strip_suffix('.').unwrap_or(host)
}

/// A client's certificate as fields of a request (RFC 9440), made once for a connection.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ClientFields {
    certificate: HeaderValue,
    chain: Option<HeaderValue>,
}

impl ClientFields {
    /// Returns the fields of a certificate and of those that it is signed by.
    #[must_use]
    pub fn new(end: &CertificateDer<'_>, rest: &[CertificateDer<'_>]) -> Self {
        let chain = rest.iter().map(byte_sequence).collect::<Vec<_>>().join(", ");
        let is_told = !chain.is_empty() && chain.len() <= CHAIN_BYTES_MAX;
        Self { certificate: value(byte_sequence(end)), chain: is_told.then(|| value(chain)) }
    }
}

/// A byte sequence of structured fields (RFC 9651 §3.3.5).
fn byte_sequence(certificate: &CertificateDer<'_>) -> String {
    format!(":{}:", STANDARD.encode(certificate))
}

fn value(text: String) -> HeaderValue {
    HeaderValue::try_from(text).expect("base64 and its marks are fit for a field")
}

/// Takes out what a client says of its certificate by itself, and puts in what is known of it (RFC 9440
/// §2.4, §4). Names with `_` too: many services take `Client_Cert` for the same field.
pub(crate) fn set_client_cert(headers: &mut HeaderMap, fields: Option<&ClientFields>) {
    remove_client_cert(headers);
    let Some(ClientFields { certificate, chain }) = fields else { return };
    let chain = chain.as_ref().map(|chain| (CLIENT_CERT_CHAIN, chain));
    for (name, value) in std::iter::once((CLIENT_CERT, certificate)).chain(chain) {
        if headers.try_insert(name, value.clone()).is_err() {
            tracing::warn!("a head has too many fields to tell of the client's certificate");
        }
    }
}

/// Takes out what is said of a client's certificate: of trailers whoever sends them, since the fields may
/// not stand there (RFC 9440 §2.2), and some services take trailers for fields of the head.
pub(super) fn remove_client_cert(headers: &mut HeaderMap) {
    // Nearly no request has one; looking costs less than removing.
    if headers.keys().any(is_client_cert) {
        let theirs: Vec<HeaderName> =
            headers.keys().filter(|name| is_client_cert(name)).cloned().collect();
        for name in theirs {
            headers.remove(name);
        }
    }
}

fn is_client_cert(name: &HeaderName) -> bool {
    let name = name.as_str().as_bytes();
    let is = |own: &HeaderName| {
        let own = own.as_str().as_bytes();
        name.len() == own.len()
            && name.iter().zip(own).all(|(a, b)| a == b || (*a == b'_' && *b == b'-'))
    };
    name.starts_with(b"client") && (is(&CLIENT_CERT) || is(&CLIENT_CERT_CHAIN))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn names(names: &[&str]) -> Arc<[Arc<str>]> {
        names.iter().map(|name| Arc::from(*name)).collect()
    }

    #[track_caller]
    fn check(sni: Option<&str>, shown: &[&str], authority: &str, expected: bool) {
        let hosts = Hosts::new(sni.map(Arc::from).as_ref(), &names(shown));
        assert_eq!(hosts.allow(authority.as_bytes()), expected, "{sni:?} {shown:?} {authority}");
    }

    #[test]
    fn a_host_is_that_of_the_hello() {
        let shown = ["*.example.org"];
        for host in ["a.example.org", "A.Example.ORG", "a.example.org.", "a.example.org:8443"] {
            check(Some("a.example.org"), &shown, host, true);
        }
        check(Some("a.example.org."), &shown, "a.example.org", true);
        for host in ["b.example.org", "example.org", "a.example.org.evil", "[::1]", "a.example", ""]
        {
            check(Some("a.example.org"), &shown, host, false);
        }
    }

    #[test]
    fn a_certificate_that_is_not_for_the_hellos_name_takes_nothing() {
        let hosts = Hosts::new(Some(&"a.b.example.org".into()), &names(&["*.example.org"]));
        assert!(hosts.why_not().contains("no certificate"), "{hosts:?}");
        check(Some("a.example.com"), &["*.example.org"], "a.example.com", false);
        check(Some("a.example.com"), &["*.example.org"], "a.example.org", false);
        check(Some("a.b.example.org"), &["*.example.org"], "a.b.example.org", false);
        check(Some("example.org"), &["*.example.org"], "example.org", false);
    }

    #[test]
    fn without_a_name_the_certificate_says_the_hosts() {
        let shown = ["example.org", "*.example.org", "192.0.2.1", "2001:db8::1"];
        for host in [
            "example.org",
            "EXAMPLE.org:443",
            "a.example.org",
            "a.example.org.",
            "192.0.2.1",
            "192.0.2.1:8443",
            "[2001:db8::1]",
            "[2001:DB8:0::1]:8443",
        ] {
            check(None, &shown, host, true);
        }
        for host in ["a.b.example.org", ".example.org", "192.0.2.2", "[2001:db8::2]", "2.0.2.1"] {
            check(None, &shown, host, false);
        }
        check(None, &["*.0.2.1"], "192.0.2.1", false);
        check(None, &[], "example.org", false);
    }

    #[test]
    fn a_clients_certificate_is_told_as_structured_fields() {
        let der = |bytes: &'static [u8]| CertificateDer::from(bytes);
        let one = ClientFields::new(&der(b"\x30\x01\x02"), &[]);
        let mut headers = HeaderMap::new();
        set_client_cert(&mut headers, Some(&one));
        assert_eq!(headers["client-cert"], ":MAEC:");
        assert!(!headers.contains_key("client-cert-chain"));
        let three = ClientFields::new(&der(b"\x30"), &[der(b"\x31"), der(b"\x32\x33")]);
        set_client_cert(&mut headers, Some(&three));
        assert_eq!(headers["client-cert"], ":MA==:");
        assert_eq!(headers["client-cert-chain"], ":MQ==:, :MjM=:");
        static LONG: [u8; CHAIN_BYTES_MAX] = [0; CHAIN_BYTES_MAX];
        let long = ClientFields::new(&der(b"\x30"), &[der(&LONG)]);
        set_client_cert(&mut headers, Some(&long));
        assert!(!headers.contains_key("client-cert-chain"));
    }

    #[test]
    fn what_a_client_says_of_its_certificate_is_taken_out() {
        let mut headers = HeaderMap::new();
        for name in ["client-cert", "client_cert", "client-cert-chain", "client_cert-chain"] {
            headers.append(HeaderName::from_static(name), HeaderValue::from_static(":MA==:"));
            headers.append(HeaderName::from_static(name), HeaderValue::from_static(":MQ==:"));
        }
        for name in ["client-id", "client-certs", "client-cert-"] {
            headers.insert(HeaderName::from_static(name), HeaderValue::from_static("stays"));
        }
        set_client_cert(&mut headers, None);
        let mut left: Vec<_> = headers.keys().map(HeaderName::as_str).collect();
        left.sort_unstable();
        assert_eq!(left, ["client-cert-", "client-certs", "client-id"]);
    }
}

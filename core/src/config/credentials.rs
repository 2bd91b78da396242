//! Credentials as a configuration says them: who a sidecar is, and what it may claim.
//!
//! Data, and the patterns over names; who presents what is `crate::credentials`' business.

use std::fmt;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use sha2::{Digest as _, Sha256};

use super::HostMatch;
use super::tls::Authorities;

/// Everybody that a relay knows.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Credentials {
    /// In the file's order: the first that fits is it. Names are unique.
    pub principals: Vec<Arc<Principal>>,
    /// Who signs tokens (JWT); names are unique.
    pub issuers: Vec<Arc<Issuer>>,
}

/// Who a sidecar is, and what it may claim.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Principal {
    /// For people: logs, metrics and pages show it.
    pub name: Arc<str>,
    /// Hashes of tokens; any of them will do.
    pub tokens: Vec<TokenHash>,
    /// Names in a client's certificate; any of them will do.
    pub certificates: Vec<CertificatePattern>,
    /// Signed tokens; any of them will do.
    pub jwt: Vec<JwtRule>,
    /// What it may claim.
    pub claims: Claims,
}

/// SHA-256 of a token.
#[derive(Clone, Copy, PartialEq, Eq, Hash)]
pub struct TokenHash(pub [u8; 32]);

impl TokenHash {
    /// Returns a token's.
    #[must_use]
    pub fn of(token: &str) -> Self {
        Self(Sha256::digest(token).into())
    }

    /// Returns it as it stands in a file: `sha256:…`. For whoever makes it; nobody else is shown it.
    #[must_use]
    pub fn to_text(self) -> String {
        self.0.iter().fold("sha256:".to_owned(), |text, byte| format!("{text}{byte:02x}"))
    }
}

impl fmt::Debug for TokenHash {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("***")
    }
}

/// A name in a certificate's subjectAltName.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum CertificatePattern {
    /// `dns:shop.example.org`, `dns:*.example.org`.
    Dns(Pattern),
    /// `spiffe://example.org/ns/shop/sa/*`, `uri:…`.
    Uri(Pattern),
}

/// What a signed token must say.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct JwtRule {
    /// Name of an issuer.
    pub issuer: Arc<str>,
    /// `sub`.
    pub subject: Option<Pattern>,
    /// Of a Kubernetes ServiceAccount token: its namespace.
    pub namespace: Option<Pattern>,
    /// Of a Kubernetes ServiceAccount token: its account.
    pub service_account: Option<Pattern>,
}

/// Who signs tokens.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Issuer {
    /// Unique.
    pub name: Arc<str>,
    /// `iss`.
    pub issuer: Arc<str>,
    /// One of these is in `aud`; never empty.
    pub audiences: Vec<Arc<str>>,
    /// Its keys.
    pub keys: Keys,
    /// Clocks may differ by this.
    pub leeway: Duration,
}

/// Where an issuer's keys are (RFC 7517).
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Keys {
    /// A file's contents; a set of keys.
    Set(Arc<str>),
    /// Fetched, and fetched again now and then, and where a token names a key that is not known.
    Url {
        /// `https://…`; `http://…` on loopback only.
        url: Arc<str>,
        /// Who signs the server's certificate; `None`: the system's authorities.
        authorities: Option<Authorities>,
        /// A file whose contents are sent as a bearer token, read anew each time.
        token_file: Option<PathBuf>,
        /// How often it is fetched.
        interval: Duration,
    },
}

/// What a principal may claim: names by pattern. The default allows nothing.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Claims {
    /// Subdomains of any base domain.
    pub subdomains: Vec<Pattern>,
    /// Whole hosts.
    pub hosts: Vec<Pattern>,
    /// Tunnels.
    pub tunnels: Vec<Pattern>,
    /// Listeners, by name, as a whole: routes that take no host.
    pub listeners: Vec<Pattern>,
}

impl Claims {
    /// Returns what whoever is trusted with everything may claim.
    #[must_use]
    pub fn everything() -> Self {
        let all = || vec![Pattern::new("*")];
        Self { subdomains: all(), hosts: all(), tunnels: all(), listeners: all() }
    }

    /// Returns whether a tunnel of that name may be served.
    #[must_use]
    pub fn has_tunnel(&self, name: &str) -> bool {
        self.tunnels.iter().any(|pattern| pattern.fits(name))
    }

    /// Returns whether a route may take these hosts, on this listener; `base_domains` are the relay's.
    #[must_use]
    pub fn has_hosts(
        &self,
        hosts: &HostMatch,
        listener: Option<&str>,
        base_domains: &[Arc<str>],
    ) -> bool {
        let covers = |patterns: &[Pattern], name: &str| patterns.iter().any(|p| p.fits(name));
        let covers_below =
            |patterns: &[Pattern], suffix: &str| patterns.iter().any(|p| p.fits_below(suffix));
        // `shop.example.org` is `shop` of the base domain `example.org`, however it is written.
        let below_base = |host: &str| {
            base_domains
                .iter()
                .filter_map(|base| host.strip_suffix(&**base)?.strip_suffix('.').map(str::to_owned))
                .collect::<Vec<_>>()
        };
        match hosts {
            HostMatch::Any => listener.is_some_and(|name| covers(&self.listeners, name)),
            HostMatch::Subdomain(name) => covers(&self.subdomains, name),
            HostMatch::Wildcard(suffix) => covers_below(&self.subdomains, suffix),
            HostMatch::Exact(host) => {
                covers(&self.hosts, host)
                    || below_base(host).iter().any(|name| covers(&self.subdomains, name))
            }
            HostMatch::HostWildcard(suffix) => {
                covers_below(&self.hosts, suffix)
                    || base_domains.iter().any(|base| **base == **suffix)
                        && covers_below(&self.subdomains, "")
                    || below_base(suffix).iter().any(|name| covers_below(&self.subdomains, name))
            }
        }
    }
}

/// A pattern over names of labels, separated by dots: `*` stands for any characters of a label, and
/// as the whole first label for one label or more, as in a route's wildcard; alone for any name.
#[derive(Clone, PartialEq, Eq)]
pub struct Pattern(Arc<str>);

impl fmt::Debug for Pattern {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.fmt(f)
    }
}

impl fmt::Display for Pattern {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

impl Pattern {
    /// Returns the pattern of this text.
    #[must_use]
    pub fn new(text: &str) -> Self {
        Self(text.into())
    }

    /// Returns the text.
    #[must_use]
    pub fn as_str(&self) -> &str {
        &self.0
    }

    /// Returns whether a name fits.
    #[must_use]
    pub fn fits(&self, name: &str) -> bool {
        if name.is_empty() {
            return false;
        }
        if &*self.0 == "*" {
            return true;
        }
        let Some(rest) = self.0.strip_prefix("*.") else { return labels_fit(&self.0, name) };
        // One label or more in front of what fits the rest.
        let mut name = name;
        while let Some((_, below)) = name.split_once('.') {
            if labels_fit(rest, below) {
                return true;
            }
            name = below;
        }
        false
    }

    /// Returns whether every name below `suffix` fits; of an empty one, every name.
    #[must_use]
    pub fn fits_below(&self, suffix: &str) -> bool {
        if &*self.0 == "*" {
            return true;
        }
        let Some(rest) = self.0.strip_prefix("*.") else { return false };
        !suffix.is_empty() && (labels_fit(rest, suffix) || self.fits(suffix))
    }

    /// Returns whether a URI fits: `*` stands for any characters of one of its segments.
    #[must_use]
    pub fn fits_uri(&self, uri: &str) -> bool {
        let (mut patterns, mut segments) = (self.0.split('/'), uri.split('/'));
        loop {
            match (patterns.next(), segments.next()) {
                (None, None) => return true,
                (Some(pattern), Some(segment)) if glob(pattern.as_bytes(), segment.as_bytes()) => {}
                _ => return false,
            }
        }
    }

    /// Returns whether a text that has no labels fits: `*` stands for any characters.
    #[must_use]
    pub fn fits_text(&self, text: &str) -> bool {
        glob(self.0.as_bytes(), text.as_bytes())
    }
}

/// Whether as many labels fit one by one.
fn labels_fit(pattern: &str, name: &str) -> bool {
    let (mut patterns, mut labels) = (pattern.split('.'), name.split('.'));
    loop {
        match (patterns.next(), labels.next()) {
            (None, None) => return true,
            (Some(pattern), Some(label)) if glob(pattern.as_bytes(), label.as_bytes()) => {}
            _ => return false,
        }
    }
}

/// `*` stands for any bytes, none too. In time of at most the product of the lengths.
fn glob(pattern: &[u8], text: &[u8]) -> bool {
    let (mut p, mut t) = (0, 0);
    let mut star: Option<(usize, usize)> = None;
    while t < text.len() {
        if pattern.get(p) == Some(&b'*') {
            star = Some((p, t));
            p += 1;
        } else if pattern.get(p) == Some(&text[t]) {
            p += 1;
            t += 1;
        } else if let Some((at, taken)) = star {
            p = at + 1;
            t = taken + 1;
            star = Some((at, t));
        } else {
            return false;
        }
    }
    pattern[p..].iter().all(|byte| *byte == b'*')
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn patterns_fit_labels() {
        let table: &[(&str, &str, bool)] = &[
            ("shop", "shop", true),
            ("shop", "shops", false),
            ("shop-*", "shop-7", true),
            ("shop-*", "shop-", true),
            ("shop-*", "shop-7.x", false),
            ("*-shop", "a-b-shop", true),
            ("*", "a", true),
            ("*", "a.b", true),
            ("*", "", false),
            ("*.apps", "x.apps", true),
            ("*.apps", "y.x.apps", true),
            ("*.apps", "apps", false),
            ("*.apps", "xapps", false),
            ("a.*.c", "a.b.c", true),
            ("a.*.c", "a.b.b.c", false),
        ];
        assert!(!table.is_empty());
        for (pattern, name, fits) in table {
            assert_eq!(Pattern::new(pattern).fits(name), *fits, "{pattern} {name}");
        }
    }

    #[test]
    fn a_star_stays_within_a_segment_of_a_uri() {
        let pattern = Pattern::new("spiffe://example.org/ns/shop/sa/*");
        assert!(pattern.fits_uri("spiffe://example.org/ns/shop/sa/web"));
        assert!(!pattern.fits_uri("spiffe://example.org/ns/shop/sa/web/admin"));
        assert!(!pattern.fits_uri("spiffe://example.org/ns/bank/sa/web"));
        let pattern = Pattern::new("spiffe://example.org/ns/*/sa/web");
        assert!(!pattern.fits_uri("spiffe://example.org/ns/a/sa/b/sa/web"));
    }

    #[test]
    fn a_wildcard_is_covered_by_wildcards_only() {
        let table: &[(&str, &str, bool)] = &[
            ("*", "", true),
            ("*", "apps", true),
            ("*.apps", "", false),
            ("*.apps", "apps", true),
            ("*.apps", "x.apps", true),
            ("*.apps", "app", false),
            ("apps", "apps", false),
            ("a*.apps", "apps", false),
            ("*.a*", "apps", true),
        ];
        assert!(!table.is_empty());
        for (pattern, suffix, fits) in table {
            assert_eq!(Pattern::new(pattern).fits_below(suffix), *fits, "{pattern} {suffix}");
        }
    }

    #[test]
    fn a_host_below_a_base_domain_is_a_subdomain() {
        let claims = Claims {
            subdomains: vec![Pattern::new("shop"), Pattern::new("*.apps")],
            ..Claims::default()
        };
        let base: [Arc<str>; 1] = ["example.org".into()];
        let table: &[(HostMatch, bool)] = &[
            (HostMatch::Subdomain("shop".into()), true),
            (HostMatch::Subdomain("bank".into()), false),
            (HostMatch::Exact("shop.example.org".into()), true),
            (HostMatch::Exact("bank.example.org".into()), false),
            (HostMatch::Exact("shop.example.net".into()), false),
            (HostMatch::Exact("shopexample.org".into()), false),
            (HostMatch::Wildcard("apps".into()), true),
            (HostMatch::Wildcard("".into()), false),
            (HostMatch::HostWildcard("apps.example.org".into()), true),
            (HostMatch::HostWildcard("example.org".into()), false),
            (HostMatch::Any, false),
        ];
        assert!(!table.is_empty());
        for (hosts, fits) in table {
            assert_eq!(claims.has_hosts(hosts, Some("web"), &base), *fits, "{hosts:?}");
        }
        assert!(Claims::everything().has_hosts(&HostMatch::Any, Some("web"), &base));
    }
}

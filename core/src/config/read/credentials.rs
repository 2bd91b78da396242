//! `relay.credentials` and `relay.token_issuers`: who sidecars are, by what they are known, and what
//! each may claim.

use std::collections::HashMap;
use std::sync::Arc;
use std::time::Duration;

use super::placeholders::{self, PLACEHOLDERS};
use super::tls::https_or_loopback_url;
use super::{Names, Reader, arcs, at, items, one_of_keys, refer, timeout, twice, unique};
use crate::config::credentials::{
    CertificatePattern, Claims, Issuer, JwtRule, Keys, Pattern, Principal, TokenHash,
};
use crate::config::raw::{Field, Section};
use crate::config::{Relay, duration_text, value};

pub(crate) const PRINCIPAL_KEYS: &[&str] =
    &["principal", "tokens", "certificates", "jwt", "subdomains", "hosts", "tunnels", "listeners"];
pub(crate) const JWT_KEYS: &[&str] = &["issuer", "subject", "namespace", "service_account"];
pub(crate) const ISSUER_KEYS: &[&str] = &[
    "name",
    "issuer",
    "audiences",
    "jwks_file",
    "jwks_url",
    "ca",
    "token_file",
    "refresh",
    "leeway",
];

/// Names of principals that stand for those whom no entry names.
const RESERVED: [&str; 3] = ["embedded", "local", "token"];

/// Most of each that a principal is known by, or may claim: all are looked at for each that comes in.
pub(crate) const PATTERNS_MAX: usize = 256;

/// Longest pattern and longest text of an issuer.
const TEXT_BYTES_MAX: usize = 1024;

/// Largest set of keys; a cluster has two or three.
const KEYS_BYTES_MAX: u64 = 256 * 1024;

/// As the API server rotates its keys in days.
pub(crate) const REFRESH: Duration = Duration::from_secs(5 * 60);
/// An authority is asked by all relays.
const REFRESH_MIN: Duration = Duration::from_secs(10);
pub(crate) const LEEWAY: Duration = Duration::from_secs(60);
/// A token that ended longer ago is not that of a wrong clock.
const LEEWAY_MAX: Duration = Duration::from_secs(10 * 60);

impl Reader<'_> {
    /// Reads whom the relay knows. `tunnel` is the field of `relay.tunnel`.
    pub(super) fn credentials(
        &mut self,
        section: &Section<'_>,
        tunnel: Option<&Field<'_>>,
        relay: &mut Relay,
    ) {
        let issuers_field = section.field("token_issuers");
        if let Some(field) = &issuers_field {
            let issuers = items(field, |item| self.issuer(item));
            unique(field, "issuer", &issuers, |issuer| &issuer.name);
            relay.credentials.issuers = arcs(issuers);
        }
        let declared = issuers_field.as_ref().map(Field::item_names).unwrap_or_default();
        let known = Known {
            issuers: Names::new(declared),
            has_certificates: tunnel
                .and_then(|tunnel| tunnel.child("tls")?.child("client_ca"))
                .is_some(),
        };
        let Some(field) = section.field("credentials") else {
            unused_issuers(issuers_field.as_ref(), &[]);
            return;
        };
        let principals = items(&field, |item| principal(item, &known));
        named_once(&field, &principals);
        placeholders::called_alike(&field, &principals);
        hashes_once(&field, &principals, relay);
        for (index, principal) in &principals {
            if let Some(place) = field.item(*index) {
                unlikely(&place, principal, relay);
                placeholders::ambiguous(&place, principal);
            }
        }
        let used: Vec<&str> = principals
            .iter()
            .flat_map(|(_, principal)| &principal.jwt)
            .map(|rule| &*rule.issuer)
            .collect();
        unused_issuers(issuers_field.as_ref(), &used);
        if known.has_certificates
            && !field.is_told("relay.credentials")
            && principals.iter().all(|(_, principal)| principal.certificates.is_empty())
            && let Some(field) = tunnel.and_then(|tunnel| tunnel.child("tls")?.child("client_ca"))
        {
            field.warn("has no effect: no entry of relay.credentials has certificates");
        }
        relay.credentials.principals = arcs(principals);
    }

    fn issuer(&mut self, field: &Field<'_>) -> Option<Issuer> {
        let section = field.section(ISSUER_KEYS)?;
        let name = section.require("name", "text").and_then(|f| f.parse(value::name));
        let issuer = section
            .require("issuer", "what tokens have as `iss`, as in https://issuer.example.org")
            .and_then(|f| f.parse(text));
        let audiences = section
            .require("audiences", "a list of what tokens have as `aud`, as in [sidelane]")
            .and_then(|field| {
                let audiences = field.list_of(|item| item.parse(text))?;
                if field.is_empty() {
                    field.fail(
                        "is empty (accepted: at least one audience; a token that is for somebody else \
                         is not one for this relay)",
                    );
                }
                bounded(&field, audiences.len());
                twice(&field, &audiences);
                Some(audiences)
            });
        let mut leeway = LEEWAY;
        section.set("leeway", &mut leeway, |f| {
            let leeway = timeout(f, Duration::ZERO)?;
            if leeway > LEEWAY_MAX {
                let (given, max) = (duration_text(leeway), duration_text(LEEWAY_MAX));
                f.fail(format!("{given} is out of bounds (accepted: 0s to {max})"));
            }
            Some(leeway)
        });
        let keys = self.keys(&section);
        Some(Issuer { name: name?, issuer: issuer?, audiences: audiences?, keys: keys?, leeway })
    }

    fn keys(&mut self, section: &Section<'_>) -> Option<Keys> {
        let mut interval = REFRESH;
        section.set("refresh", &mut interval, |f| timeout(f, REFRESH_MIN));
        match one_of_keys(section, &["jwks_file", "jwks_url"])? {
            Some("jwks_file") => {
                for key in ["ca", "token_file", "refresh"] {
                    if let Some(field) = section.field(key) {
                        field.fail("goes with jwks_url (accepted: with jwks_file, leave it out)");
                    }
                }
                let field = section.field("jwks_file")?;
                let path = field.text()?;
                match self.files.read_file(path, KEYS_BYTES_MAX) {
                    Ok(text) => match key_set(&text) {
                        Ok(()) => return Some(Keys::Set(text.into())),
                        Err(message) => {
                            field.fail(format!("{}: {message}", self.files.path(path).display()));
                        }
                    },
                    Err(message) => field.fail(message),
                }
                None
            }
            Some(_) => {
                let url = section.field("jwks_url")?.parse(https_or_loopback_url);
                let mut authorities = None;
                if let Some(field) = section.field("ca") {
                    authorities = self.authorities(&field);
                }
                let mut token_file = None;
                section
                    .set("token_file", &mut token_file, |f| Some(Some(self.files.path(f.text()?))));
                Some(Keys::Url { url: url?, authorities, token_file, interval })
            }
            None => {
                if !section.is_mistyped("jwks_file") && !section.is_mistyped("jwks_url") {
                    section.fail("has no keys (accepted: one of jwks_file, jwks_url)");
                }
                None
            }
        }
    }
}

/// What a principal's references are checked against.
struct Known<'a> {
    issuers: Names<'a>,
    /// `relay.tunnel.tls.client_ca` is there.
    has_certificates: bool,
}

fn principal(field: &Field<'_>, known: &Known<'_>) -> Option<Principal> {
    let section = field.section(PRINCIPAL_KEYS)?;
    let name = section.require("principal", "a name").and_then(|f| {
        f.parse(|text| {
            let name = value::name(text)?;
            if RESERVED.contains(&text) {
                return Err(format!(
                    "\"{text}\" is what sidecars without an entry are called (accepted: another name)"
                ));
            }
            Ok(name)
        })
    });
    let mut tokens = Vec::new();
    list_set(&section, "tokens", &mut tokens, token_hash);
    let mut certificates = Vec::new();
    list_set(&section, "certificates", &mut certificates, |f| f.parse(certificate));
    if let Some(field) = section.field("certificates")
        && !known.has_certificates
        && !field.is_empty()
    {
        field.fail(
            "nobody is asked for a certificate (accepted: with relay.tunnel.tls.client_ca, the PEM file of \
             those who sign them)",
        );
    }
    let mut jwt = Vec::new();
    list_set(&section, "jwt", &mut jwt, |f| jwt_rule(f, known));
    let is_account = !jwt.is_empty()
        || section.field("jwt").is_some()
        || certificates.iter().any(is_service_account);
    let mut claims = Claims::default();
    let hosts = |f: &Field<'_>| f.parse(|text| host_pattern(text, is_account));
    list_set(&section, "subdomains", &mut claims.subdomains, hosts);
    list_set(&section, "hosts", &mut claims.hosts, hosts);
    list_set(&section, "tunnels", &mut claims.tunnels, |f| {
        f.parse(|text| name_pattern(text, is_account))
    });
    list_set(&section, "listeners", &mut claims.listeners, |f| {
        f.parse(|text| name_pattern(text, false))
    });
    Some(Principal { name: name?, tokens, certificates, jwt, claims })
}

fn list_set<T>(
    section: &Section<'_>,
    key: &str,
    target: &mut Vec<T>,
    read: impl FnMut(&Field<'_>) -> Option<T>,
) {
    section.set(key, target, |field| {
        let list = field.list_of(read)?;
        bounded(field, list.len());
        Some(list)
    });
}

fn bounded(field: &Field<'_>, count: usize) {
    if count > PATTERNS_MAX {
        field.fail(format!("has {count} items (accepted: at most {PATTERNS_MAX})"));
    }
}

/// A token may stand in its hash's place, so that nothing of it is told.
fn token_hash(field: &Field<'_>) -> Option<TokenHash> {
    let text = field.secret()?;
    let hash = text.strip_prefix("sha256:").and_then(|hex| value::sha256(hex).ok());
    if hash.is_none() {
        field.fail_hidden(
            "is not a token's hash (accepted: sha256: and 64 hexadecimal digits, as `sidelane token hash` \
             prints it)"
                .to_owned(),
        );
    }
    hash.map(TokenHash)
}

fn certificate(text: &str) -> Result<CertificatePattern, String> {
    let uri = |uri: &str| {
        let is_good = (1..=TEXT_BYTES_MAX).contains(&uri.len())
            && uri.bytes().all(|byte| byte.is_ascii_graphic())
            && uri.split_once(':').is_some_and(|(scheme, rest)| {
                !scheme.is_empty() && !scheme.contains('*') && !rest.trim_matches('/').is_empty()
            });
        is_good.then(|| CertificatePattern::Uri(Pattern::new(uri))).ok_or_else(|| {
            format!(
                "\"{text}\" is not a URI (accepted: a scheme and visible characters, `*` for any of them, \
                 as in spiffe://example.org/ns/shop/sa/*)"
            )
        })
    };
    if let Some(name) = text.strip_prefix("dns:") {
        return host_pattern(name, false).map(CertificatePattern::Dns);
    }
    if let Some(text) = text.strip_prefix("uri:") {
        return uri(text);
    }
    if text.starts_with("spiffe://") {
        return uri(text);
    }
    let hint = if host_pattern(text, false).is_ok() {
        format!("; did you mean \"dns:{text}\"?")
    } else {
        String::new()
    };
    Err(format!(
        "\"{text}\" is not a name in a certificate (accepted: spiffe://…, uri:… or dns:…, `*` for any \
         characters){hint}"
    ))
}

/// Returns whether it is a SPIFFE id that says a namespace and an account.
fn is_service_account(pattern: &CertificatePattern) -> bool {
    let CertificatePattern::Uri(pattern) = pattern else { return false };
    let Some(rest) = pattern.as_str().strip_prefix("spiffe://") else { return false };
    let mut parts = rest.split('/').skip(1);
    matches!(
        (parts.next(), parts.next(), parts.next(), parts.next(), parts.next()),
        (Some("ns"), Some(_), Some("sa"), Some(_), None)
    )
}

fn jwt_rule(field: &Field<'_>, known: &Known<'_>) -> Option<JwtRule> {
    let section = field.section(JWT_KEYS)?;
    let issuer = section.require("issuer", "the name of one of relay.token_issuers");
    let issuer = issuer.and_then(|field| {
        let name = field.parse(value::name)?;
        refer(&field, "issuer", &known.issuers);
        Some(name)
    });
    let mut subject = None;
    section.set("subject", &mut subject, |f| {
        f.parse(|text| self::text(text).map(|text| Some(Pattern::new(&text))))
    });
    let label = |f: &Field<'_>| f.parse(label_pattern).map(Some);
    let (mut namespace, mut service_account) = (None, None);
    section.set("namespace", &mut namespace, label);
    section.set("service_account", &mut service_account, label);
    let says = ["subject", "namespace", "service_account"];
    if says.iter().all(|key| section.field(key).is_none()) && !section.has_unknown() {
        section.fail(
            "takes every token of the issuer (accepted: one or more of subject, namespace, \
             service_account; subject: \"*\" where every token is meant)",
        );
    }
    Some(JwtRule { issuer: issuer?, subject, namespace, service_account })
}

fn text(text: &str) -> Result<Arc<str>, String> {
    let is_good = (1..=TEXT_BYTES_MAX).contains(&text.len())
        && text.bytes().all(|byte| byte.is_ascii_graphic());
    is_good.then(|| text.into()).ok_or_else(|| {
        format!("\"{text}\" is not accepted (accepted: 1 to {TEXT_BYTES_MAX} visible characters)")
    })
}

/// Parses a pattern over a DNS label.
fn label_pattern(text: &str) -> Result<Pattern, String> {
    let is_good = (1..=63).contains(&text.len())
        && text.bytes().all(|byte| {
            byte.is_ascii_lowercase() || byte.is_ascii_digit() || matches!(byte, b'-' | b'.' | b'*')
        });
    is_good.then(|| Pattern::new(text)).ok_or_else(|| {
        format!(
            "\"{text}\" is not a pattern over names (accepted: lower-case letters, digits and '-', `*` for \
             any of them, as in shop or shop-*)"
        )
    })
}

/// Parses a pattern over hosts: labels with `*`, and placeholders where there is somebody to fill them in.
fn host_pattern(text: &str, has_placeholders: bool) -> Result<Pattern, String> {
    let label = |label: &str| {
        (1..=63).contains(&label.len())
            && label.bytes().all(|byte| {
                byte.is_ascii_lowercase()
                    || byte.is_ascii_digit()
                    || matches!(byte, b'-' | b'_' | b'*')
            })
    };
    let bad = |hint: String| {
        let placeholders =
            if has_placeholders { ", {namespace} and {service_account}" } else { "" };
        format!(
            "\"{text}\" is not a pattern over names (accepted: labels of lower-case letters, digits, '-' \
             and '*'{placeholders}, joined by dots, as in shop, shop-* or *.shop){hint}"
        )
    };
    pattern(text, has_placeholders, bad, |plain| {
        plain.len() <= value::HOST_BYTES_MAX && plain.split('.').all(label)
    })
}

/// Parses a pattern over names of tunnels or listeners.
fn name_pattern(text: &str, has_placeholders: bool) -> Result<Pattern, String> {
    let bad = |hint: String| {
        let placeholders =
            if has_placeholders { ", {namespace} and {service_account}" } else { "" };
        format!(
            "\"{text}\" is not a pattern over names (accepted: letters, digits, '-', '_', '.', '/' and \
             '*'{placeholders}, as in shop or shop-*){hint}"
        )
    };
    pattern(text, has_placeholders, bad, |plain| {
        (1..=63).contains(&plain.len())
            && plain.bytes().all(|byte| {
                byte.is_ascii_alphanumeric() || matches!(byte, b'-' | b'_' | b'.' | b'/' | b'*')
            })
    })
}

fn pattern(
    text: &str,
    has_placeholders: bool,
    bad: impl Fn(String) -> String,
    is_good: impl Fn(&str) -> bool,
) -> Result<Pattern, String> {
    let mut plain = text.to_owned();
    for placeholder in PLACEHOLDERS {
        plain = plain.replace(placeholder, "x");
    }
    if plain != text && !has_placeholders {
        return Err(bad(
            "; a placeholder stands for what a jwt or a spiffe://…/ns/…/sa/… certificate says"
                .to_owned(),
        ));
    }
    if plain.contains("**") {
        return Err(bad(format!("; did you mean \"{}\"?", text.replace("**", "*"))));
    }
    if is_good(&plain) {
        return Ok(Pattern::new(text));
    }
    let lower = text.to_ascii_lowercase();
    let hint = if lower != text && is_good(&plain.to_ascii_lowercase()) {
        format!("; did you mean \"{lower}\"?")
    } else {
        String::new()
    };
    Err(bad(hint))
}

/// Checks a set of keys (RFC 7517): one at least verifies signatures, and none is a shared secret.
fn key_set(text: &str) -> Result<(), String> {
    use jsonwebtoken::jwk::{AlgorithmParameters, JwkSet};
    let accepted = "(accepted: {\"keys\": […]} with RSA, EC or Ed25519 keys, RFC 7517)";
    let set: JwkSet = serde_json::from_str(text)
        .map_err(|error| format!("is not a set of keys: {error} {accepted}"))?;
    let is_shared =
        |key: &&jsonwebtoken::jwk::Jwk| matches!(key.algorithm, AlgorithmParameters::OctetKey(_));
    if set.keys.iter().any(|key| is_shared(&key)) {
        return Err(format!(
            "holds a shared secret, with which anybody who verifies can sign {accepted}"
        ));
    }
    crate::credentials::jwks::parse(text).map(drop)
}

fn named_once(field: &Field<'_>, principals: &[(usize, Principal)]) {
    let mut first: HashMap<&str, usize> = HashMap::new();
    for (index, principal) in principals {
        let Some(earlier) = first.get(&*principal.name) else {
            first.insert(&principal.name, *index);
            continue;
        };
        if let Some(place) = field.item(*index).and_then(|item| item.child("principal")) {
            place.fail(format!(
                "principal \"{}\" is declared already, as {}[{earlier}]{} (accepted: a name of its own)",
                principal.name,
                field.path(),
                at(field, *earlier)
            ));
        }
    }
}

/// Tells hashes that two principals have: one of them would never be it.
fn hashes_once(field: &Field<'_>, principals: &[(usize, Principal)], relay: &Relay) {
    let everything = relay.tunnel.token.as_ref().map(|token| TokenHash::of(token.expose()));
    let mut first: HashMap<TokenHash, (usize, usize)> = HashMap::new();
    for (index, principal) in principals {
        let tokens = field.item(*index).and_then(|item| item.child("tokens"));
        for (at_token, hash) in principal.tokens.iter().enumerate() {
            let Some(tokens) = &tokens else { continue };
            // Faulty items are left out, so an index is a place only where there are none.
            let place =
                tokens.item(at_token).filter(|_| tokens.item(principal.tokens.len()).is_none());
            let place = place.as_ref().unwrap_or(tokens);
            if everything == Some(*hash) {
                place.fail(
                    "is the hash of relay.tunnel's token, with which everything may be claimed already \
                     (accepted: a token of its own)",
                );
            } else if let Some((earlier, at_earlier)) = first.get(hash) {
                place.fail(format!(
                    "is the same hash as {}[{earlier}].tokens[{at_earlier}] (accepted: a token of its own)",
                    field.path()
                ));
            } else {
                first.insert(*hash, (*index, at_token));
            }
        }
    }
}

/// Tells entries that are likely a mistake.
fn unlikely(place: &Field<'_>, principal: &Principal, relay: &Relay) {
    let Claims { subdomains, hosts, listeners, .. } = &principal.claims;
    let is_given = |key: &str| place.child(key).is_some();
    if !is_given("tokens") && !is_given("certificates") && !is_given("jwt") {
        place.warn("nobody can be this: it has none of tokens, certificates, jwt");
    } else if principal.tokens.is_empty()
        && principal.certificates.is_empty()
        && principal.jwt.is_empty()
        && !place.is_told(place.path())
    {
        place.warn("nobody can be this: what it is known by is empty");
    }
    let has_names = is_given("subdomains") || is_given("hosts") || is_given("listeners");
    match (is_given("tunnels"), has_names) {
        (false, false) => place.warn(
            "may claim nothing (accepted: patterns in tunnels, and in subdomains, hosts or listeners)",
        ),
        (true, false) => place.warn(
            "may serve tunnels and claim no name: only routes in the relay's own file lead to it",
        ),
        (false, true) => place.warn("may claim names and serve no tunnel behind them"),
        (true, true) => {}
    }
    let patterns = |key: &str| place.child(key).and_then(|f| f.items()).unwrap_or_default();
    if subdomains.len() == patterns("subdomains").len() {
        for (pattern, field) in subdomains.iter().zip(patterns("subdomains")) {
            let base = relay.base_domains.iter().find(|base| {
                let rest = pattern.as_str().strip_suffix(&***base);
                rest.is_some_and(|rest| rest.is_empty() || rest.ends_with('.'))
            });
            if let Some(base) = base {
                field.warn(format!(
                    "\"{pattern}\" is for names below {base}, with the base domain twice; a whole host goes \
                     to hosts"
                ));
            }
        }
    }
    if hosts.len() == patterns("hosts").len() {
        for (pattern, field) in hosts.iter().zip(patterns("hosts")) {
            let text = pattern.as_str();
            if !text.contains('.') && text != "*" && text != "localhost" {
                field.warn(format!(
                    "\"{pattern}\" has no dot, as every host has; a name below a base domain goes to \
                     subdomains"
                ));
            }
        }
    }
    if listeners.len() == patterns("listeners").len() && !place.is_told("relay.listeners") {
        for (pattern, field) in listeners.iter().zip(patterns("listeners")) {
            if !relay.listeners.iter().any(|listener| pattern.fits(&listener.name)) {
                field.warn(format!("\"{pattern}\" fits no listener"));
            }
        }
    }
}

fn unused_issuers(field: Option<&Field<'_>>, used: &[&str]) {
    for item in field.and_then(Field::items).unwrap_or_default() {
        if let Some(name) = item.child("name")
            && let Some(text) = name.node().text()
            && !used.contains(&text)
        {
            name.warn(format!("no entry of relay.credentials takes tokens of issuer \"{text}\""));
        }
    }
}

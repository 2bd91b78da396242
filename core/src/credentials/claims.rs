//! What a principal may claim, with what its credential says in place of placeholders; and in words, why
//! something is beyond that.

use std::sync::Arc;

use super::Grant;
use crate::config::credentials::{Claims, Pattern};
use crate::config::{HostMatch, Route};

/// Stand in claims for what a credential says.
const NAMESPACE: &str = "{namespace}";
const SERVICE_ACCOUNT: &str = "{service_account}";

/// Longest label of a DNS name (RFC 1035 §2.3.4).
const LABEL_BYTES_MAX: usize = 63;

/// Patterns that a reason lists; more of them help nobody.
const PATTERNS_TOLD_MAX: usize = 8;

/// A Kubernetes ServiceAccount. Both are single labels of a DNS name, so that neither widens a pattern.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Placeholders {
    pub(super) namespace: Arc<str>,
    pub(super) service_account: Arc<str>,
}

impl Placeholders {
    /// Returns the account; `None` where one of the two is not a label.
    pub(super) fn new(namespace: &str, service_account: &str) -> Option<Self> {
        (is_label(namespace) && is_label(service_account))
            .then(|| Self { namespace: namespace.into(), service_account: service_account.into() })
    }

    /// Returns the account that `spiffe://<trust domain>/ns/<namespace>/sa/<account>` names.
    pub(super) fn of_spiffe_id(id: &str) -> Option<Self> {
        let mut parts = id.strip_prefix("spiffe://")?.split('/');
        let _trust_domain = parts.next()?;
        match [parts.next(), parts.next(), parts.next(), parts.next(), parts.next()] {
            [Some("ns"), Some(namespace), Some("sa"), Some(account), None] => {
                Self::new(namespace, account)
            }
            _ => None,
        }
    }
}

fn is_label(text: &str) -> bool {
    let is_inner = |byte: u8| byte.is_ascii_lowercase() || byte.is_ascii_digit() || byte == b'-';
    !text.is_empty()
        && text.len() <= LABEL_BYTES_MAX
        && text.bytes().all(is_inner)
        && !text.starts_with('-')
        && !text.ends_with('-')
}

fn all(claims: &Claims) -> [&Vec<Pattern>; 4] {
    let Claims { subdomains, hosts, tunnels, listeners } = claims;
    [subdomains, hosts, tunnels, listeners]
}

/// Returns whether any claim stands for another name with each credential.
pub(super) fn has_placeholders(claims: &Claims) -> bool {
    all(claims).into_iter().flatten().any(|pattern| pattern.as_str().contains('{'))
}

/// Returns the claims with `placeholders` filled in. A pattern that cannot be filled fits nothing and is
/// left out.
pub(super) fn filled(claims: &Claims, placeholders: Option<&Placeholders>) -> Claims {
    let fill = |patterns: &Vec<Pattern>| -> Vec<Pattern> {
        let filled = patterns.iter().filter_map(|pattern| {
            let text = pattern.as_str();
            if !text.contains('{') {
                return Some(pattern.clone());
            }
            let Placeholders { namespace, service_account } = placeholders?;
            let text = text.replace(NAMESPACE, namespace).replace(SERVICE_ACCOUNT, service_account);
            (!text.contains('{')).then(|| Pattern::new(&text))
        });
        filled.collect()
    };
    let [subdomains, hosts, tunnels, listeners] = all(claims).map(fill);
    Claims { subdomains, hosts, tunnels, listeners }
}

/// Returns whether both are one in what they may share: the same principal, or two who may each claim
/// everything.
#[must_use]
pub fn is_one_of(a: &Grant, b: &Grant) -> bool {
    let everything = Claims::everything();
    a.principal == b.principal || (a.claims == everything && b.claims == everything)
}

/// By which a reason is known that is of a tunnel's name.
pub const NOT_TUNNEL: &str = "may not claim tunnel";

/// Returns why a tunnel of that name may not be served; `None`: it may.
#[must_use]
pub fn why_not_tunnel(grant: &Grant, name: &str) -> Option<String> {
    let claims = &grant.claims;
    (!claims.has_tunnel(name)).then(|| {
        format!(
            "tunnel {name}: principal {} {NOT_TUNNEL} {name}; its tunnels: {}",
            grant.principal,
            told(&claims.tunnels)
        )
    })
}

/// Returns why the route may not take what it takes; `None`: it may.
#[must_use]
pub fn why_not_route(grant: &Grant, route: &Route, base_domains: &[Arc<str>]) -> Option<String> {
    let (claims, matches) = (&grant.claims, &route.matches);
    if claims.has_hosts(&matches.host, matches.listener.as_deref(), base_domains) {
        return None;
    }
    let subdomains = || format!("its subdomains: {}", told(&claims.subdomains));
    let hosts = || format!("its hosts: {}; {}", told(&claims.hosts), subdomains());
    let (what, own) = match &matches.host {
        HostMatch::Subdomain(name) => (format!("subdomain {name}"), subdomains()),
        HostMatch::Wildcard(suffix) if suffix.is_empty() => ("wildcard *".to_owned(), subdomains()),
        HostMatch::Wildcard(suffix) => (format!("wildcard *.{suffix}"), subdomains()),
        HostMatch::Exact(host) => (format!("host {host}"), hosts()),
        HostMatch::HostWildcard(suffix) => (format!("host *.{suffix}"), hosts()),
        HostMatch::Any => {
            let listener = matches.listener.as_deref().unwrap_or_default();
            let own = format!("its listeners: {}", told(&claims.listeners));
            (format!("listener {listener} as a whole"), own)
        }
    };
    let (name, principal) = (&route.name, &grant.principal);
    Some(format!("route {name}: principal {principal} may not claim {what}; {own}"))
}

/// `shop, shop-*`, `none`.
fn told(patterns: &[Pattern]) -> String {
    if patterns.is_empty() {
        return "none".to_owned();
    }
    let shown: Vec<_> = patterns.iter().take(PATTERNS_TOLD_MAX).map(Pattern::as_str).collect();
    let more = patterns.len() - shown.len();
    let text = shown.join(", ");
    if more > 0 { format!("{text} and {more} more") } else { text }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::config::{Match, MatchSpec};

    fn patterns(texts: &[&str]) -> Vec<Pattern> {
        texts.iter().map(|text| Pattern::new(text)).collect()
    }

    #[test]
    fn spiffe_ids_of_accounts_are_read() {
        let known = Placeholders::new("shop", "web");
        assert!(known.is_some());
        let table = [
            ("spiffe://example.org/ns/shop/sa/web", known),
            ("spiffe://example.org/ns/shop/sa/web/more", None),
            ("spiffe://example.org/ns/shop/sa", None),
            ("spiffe://example.org/ns/shop/sa/", None),
            ("spiffe://example.org/ns/*/sa/web", None),
            ("spiffe://example.org/ns/a.b/sa/web", None),
            ("spiffe://example.org/ns/Shop/sa/web", None),
            ("spiffe://example.org/sa/shop/ns/web", None),
            ("https://example.org/ns/shop/sa/web", None),
        ];
        assert!(!table.is_empty());
        for (id, expected) in table {
            assert_eq!(Placeholders::of_spiffe_id(id), expected, "{id}");
        }
    }

    #[test]
    fn placeholders_are_filled_by_labels_only() {
        let claims = Claims {
            subdomains: patterns(&["{service_account}.{namespace}", "shared"]),
            hosts: patterns(&["*.{namespace}.example.org"]),
            tunnels: patterns(&["{namespace}-*", "{other}"]),
            listeners: vec![],
        };
        assert!(has_placeholders(&claims));
        let known = Placeholders::new("shop", "web").expect("labels");
        let expected = Claims {
            subdomains: patterns(&["web.shop", "shared"]),
            hosts: patterns(&["*.shop.example.org"]),
            tunnels: patterns(&["shop-*"]),
            listeners: vec![],
        };
        assert_eq!(filled(&claims, Some(&known)), expected);
        assert_eq!(
            filled(&claims, None),
            Claims { subdomains: patterns(&["shared"]), ..Claims::default() }
        );
        for (namespace, account) in [("*", "web"), ("a.b", "web"), ("shop", ""), ("-a", "b")] {
            assert_eq!(Placeholders::new(namespace, account), None, "{namespace} {account}");
        }
    }

    #[test]
    fn a_reason_says_which_claim_is_missing() {
        let grant = Grant {
            principal: "shop".into(),
            claims: Claims { subdomains: patterns(&["shop", "shop-*"]), ..Claims::default() },
        };
        let route = |spec: MatchSpec<'_>| Route {
            name: "bank".into(),
            tunnels: vec![],
            matches: Match::parse(&spec).expect("a valid match"),
            options: Default::default(),
            policies: None,
        };
        let spec = MatchSpec { subdomain: Some("bank"), ..MatchSpec::default() };
        assert_eq!(
            why_not_route(&grant, &route(spec), &[]).as_deref(),
            Some(
                "route bank: principal shop may not claim subdomain bank; its subdomains: shop, shop-*"
            )
        );
        let spec = MatchSpec { listener: Some("lines"), ..MatchSpec::default() };
        assert_eq!(
            why_not_route(&grant, &route(spec), &[]).as_deref(),
            Some(
                "route bank: principal shop may not claim listener lines as a whole; its listeners: none"
            )
        );
        let spec = MatchSpec { subdomain: Some("shop-7"), ..MatchSpec::default() };
        assert_eq!(why_not_route(&grant, &route(spec), &[]), None);
        assert_eq!(
            why_not_tunnel(&grant, "t").as_deref(),
            Some("tunnel t: principal shop may not claim tunnel t; its tunnels: none")
        );
    }
}

//! Where clients reach routes, told once to whoever reads the log.
//!
//! Pure but for the telling.

use std::net::SocketAddr;
use std::sync::Arc;

use crate::config::{self, Carries, HostMatch, Route};

/// Lines told at once; a relay may have thousands of routes.
const LINES_MAX: usize = 20;

/// A listener and where it is bound.
type Bound = (Arc<config::Listener>, SocketAddr);

/// Tells the public address of each route, a line each.
pub(super) fn tell<'a>(
    routes: impl IntoIterator<Item = &'a Arc<Route>>,
    base_domains: &[Arc<str>],
    listeners: &[Bound],
) {
    let mut more = 0_usize;
    let mut told = 0;
    for route in routes {
        let Some(address) = address(route, base_domains, listeners) else { continue };
        if told == LINES_MAX {
            more += 1;
            continue;
        }
        told += 1;
        match route.tunnels.is_empty() {
            true => tracing::info!(route = &*route.name, "public address {address} redirects"),
            false => tracing::info!(
                route = &*route.name,
                "public address {address} → tunnel {}",
                route.tunnels_text()
            ),
        }
    }
    if more > 0 {
        tracing::info!("and {more} more public addresses: /routes of the admin listener has all");
    }
}

/// Returns what a client asks for to be taken by the route: by the first listener that it comes in by,
/// and the first base domain. `None`: there is no such listener.
fn address(route: &Route, base_domains: &[Arc<str>], listeners: &[Bound]) -> Option<String> {
    let matches = &route.matches;
    let (listener, bound) = listeners.iter().find(|(listener, _)| {
        let is_named = matches.listener.as_ref().is_none_or(|name| *name == listener.name);
        let is_carried = match (&matches.protocol_type, &listener.carries) {
            (Some(wanted), Carries::Type(carried)) => wanted == carried,
            // A host is asked for by requests; a route of a listener alone takes what comes.
            (None, Carries::Type(_)) => matches.host == HostMatch::Any,
            (_, Carries::Http | Carries::Sniffed) => true,
        };
        is_named && is_carried
    })?;
    if let Carries::Type(protocol_type) = &listener.carries {
        return Some(format!("{bound} ({protocol_type})"));
    }
    let domain = base_domains.first()?;
    let host = match &matches.host {
        HostMatch::Any => bound.ip().to_string(),
        HostMatch::Exact(host) => host.to_string(),
        HostMatch::Subdomain(name) => format!("{name}.{domain}"),
        HostMatch::Wildcard(suffix) if suffix.is_empty() => format!("*.{domain}"),
        HostMatch::Wildcard(suffix) => format!("*.{suffix}.{domain}"),
        HostMatch::HostWildcard(suffix) => format!("*.{suffix}"),
    };
    let port = match bound.port() {
        80 => String::new(),
        port => format!(":{port}"),
    };
    let path = if matches.path_prefix.is_empty() { "/" } else { &*matches.path_prefix };
    Some(format!("http://{host}{port}{path}"))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::config::{Balance, Match};

    #[track_caller]
    fn check(matches: Match, expected: Option<&str>) {
        let listener = |name: &str, carries| {
            Arc::new(config::Listener {
                name: name.into(),
                address: "127.0.0.1:0".parse().unwrap(),
                carries,
                proxy_protocol: false,
                balance: Balance::Kernel,
            })
        };
        let listeners = [
            (listener("lines", Carries::Type("LINE".into())), "127.0.0.1:7000".parse().unwrap()),
            (listener("web", Carries::Http), "127.0.0.1:9080".parse().unwrap()),
            (listener("plain", Carries::Http), "127.0.0.1:80".parse().unwrap()),
        ];
        let route = Route {
            name: "r".into(),
            tunnels: Vec::new(),
            matches,
            options: std::collections::BTreeMap::new(),
            policies: None,
        };
        let domains = ["example.org".into()];
        assert_eq!(address(&route, &domains, &listeners).as_deref(), expected);
    }

    #[test]
    fn a_public_address_is_what_a_client_types() {
        let host = |host| Match { host, ..Match::default() };
        let demo = || HostMatch::Subdomain("demo".into());
        check(host(demo()), Some("http://demo.example.org:9080/"));
        check(host(HostMatch::Exact("a.test".into())), Some("http://a.test:9080/"));
        check(host(HostMatch::Wildcard("".into())), Some("http://*.example.org:9080/"));
        check(
            Match { path_prefix: "/api".into(), listener: Some("plain".into()), ..host(demo()) },
            Some("http://demo.example.org/api"),
        );
        check(
            Match { listener: Some("lines".into()), ..Match::default() },
            Some("127.0.0.1:7000 (LINE)"),
        );
        check(Match { listener: Some("gone".into()), ..host(demo()) }, None);
    }
}

//! What must hold between routes, tunnels and listeners: every route takes something that no other
//! takes, and what it asks for can be done for what it takes.

use std::collections::{HashMap, HashSet};
use std::sync::Arc;

use super::at;
use crate::config::error::list;
use crate::config::policy::{Policies, Rate};
use crate::config::raw::Field;
use crate::config::tls::ServerTls;
use crate::config::{
    Config, HostMatch, Listener, Relay, Relays, Route, Sidecar, Tunnel, network_text,
};
use crate::router::RouteTable;

/// Routes with their indices in the file.
type Routes = [(usize, Route)];

/// Tells routes that take the same exchanges.
///
/// Returns whether there are none.
pub(super) fn ambiguous(field: &Field<'_>, routes: &Routes, relay: Option<&Relay>) -> bool {
    let placeholder = [Arc::from("localhost")];
    let base_domains = relay.map_or(placeholder.as_slice(), |relay| &relay.base_domains);
    let arcs: Vec<Arc<Route>> = routes.iter().map(|(_, route)| Arc::new(route.clone())).collect();
    let Err(ambiguity) = RouteTable::build(&arcs, base_domains) else { return true };
    let indices: HashMap<*const Route, usize> =
        arcs.iter().map(Arc::as_ptr).zip(routes.iter().map(|(index, _)| *index)).collect();
    for (first, second) in &ambiguity.pairs {
        let index = |route| indices.get(&Arc::as_ptr(route)).copied().unwrap_or_default();
        let Some(place) = field.item(index(second)) else { continue };
        place.fail(format!(
            "route \"{}\" takes the same exchanges as \"{}\", {} (accepted: another host, \
             path_prefix, listener or protocol_type)",
            second.name,
            first.name,
            named(field, index(first)),
        ));
    }
    false
}

/// Returns `routes[2], at sidecar.yaml:14:3`.
fn named(field: &Field<'_>, index: usize) -> String {
    format!("{}[{index}]{}", field.path(), at(field, index))
}

/// Tells routes that no exchange can take, and policies that cannot be carried out.
pub(super) fn unreachable(field: &Field<'_>, routes: &Routes, config: &Config) {
    let tunnels: HashMap<&str, &Tunnel> =
        config.tunnels.iter().map(|tunnel| (&*tunnel.name, &**tunnel)).collect();
    let listeners: HashMap<&str, &Listener> = config
        .relay
        .iter()
        .flat_map(|relay| &relay.listeners)
        .map(|listener| (&*listener.name, &**listener))
        .collect();
    let no_front = config.relay.as_ref().is_some_and(|relay| {
        // A listener with a fault is not among them.
        !field.is_told("relay.listeners")
            && relay.listeners.iter().all(|listener| has_no_hosts(listener))
    });
    for (index, route) in routes {
        let Some(place) = field.item(*index) else { continue };
        let listener = route.matches.listener.as_ref().and_then(|name| listeners.get(&**name));
        let bound = listener.and_then(|listener| listener.protocol_type());
        if let (Some(listener), Some(bound)) = (listener, bound) {
            byte_born(&place, route, bound, has_no_hosts(listener));
        }
        if let Some(relay) = &config.relay {
            if route.matches.listener.is_none() && no_front {
                place.fail(
                    "takes nothing: every listener has a protocol_type, whose connections ask for \
                     no host (accepted: `listener`, or a listener without protocol_type or with tls)",
                );
            }
            below_base_domain(&place, route, relay);
        }
        let (key, wanted) = match (&route.matches.protocol_type, bound) {
            (Some(wanted), Some(bound)) if wanted != bound => {
                fail(
                    &place,
                    "protocol_type",
                    format!("the listener takes {bound} only (accepted: {bound})"),
                );
                continue;
            }
            (Some(wanted), _) => ("protocol_type", wanted),
            (None, Some(bound)) => ("listener", bound),
            (None, None) => continue,
        };
        let tunnels = route.tunnels.iter().filter_map(|share| tunnels.get(&*share.tunnel));
        for tunnel in tunnels.filter(|tunnel| !tunnel.carries(wanted)) {
            let carried = tunnel.protocols.iter().flatten().map(AsRef::as_ref);
            fail(
                &place,
                key,
                format!(
                    "tunnel \"{}\" does not carry {wanted} (accepted: {})",
                    tunnel.name,
                    list(carried)
                ),
            );
        }
    }
}

fn fail(place: &Field<'_>, key: &str, message: String) {
    match place.child(key) {
        Some(field) => field.fail(message),
        None => place.fail(message),
    }
}

/// Whether a listener's connections are of a protocol of bytes, and name no host in TLS.
fn has_no_hosts(listener: &Listener) -> bool {
    listener.protocol_type().is_some() && listener.tls.is_none()
}

/// Tells what a route of a listener asks for whose connections have no heads, and `no_hosts` either.
fn byte_born(place: &Field<'_>, route: &Route, protocol_type: &str, no_hosts: bool) {
    let host = &route.matches.host;
    let matched = [
        ("host", no_hosts && matches!(host, HostMatch::Exact(_) | HostMatch::HostWildcard(_))),
        ("subdomain", no_hosts && matches!(host, HostMatch::Subdomain(_))),
        ("wildcard", no_hosts && matches!(host, HostMatch::Wildcard(_))),
        ("path_prefix", !route.matches.path_prefix.is_empty()),
    ];
    let (nothing, accepted) =
        if no_hosts { ("host or path", "`listener` alone") } else { ("path", "a host") };
    for (key, given) in matched {
        if given {
            fail(
                place,
                key,
                format!(
                    "takes nothing: connections of the listener are {protocol_type} and ask for no \
                     {nothing} (accepted: {accepted})"
                ),
            );
        }
    }
    let Some(policies) = route.policies.as_deref() else { return };
    let Policies { timeouts, retries, request_headers, response_headers, rewrite, .. } = policies;
    let asked = [
        ("timeouts.response_head", timeouts.response_head.is_some()),
        ("retries", retries.is_some()),
        ("request_headers", !request_headers.is_empty()),
        ("response_headers", !response_headers.is_empty()),
        ("rewrite", rewrite.host.is_some() || rewrite.path_prefix.is_some()),
        ("redirect", policies.redirect.is_some()),
        ("basic_auth", policies.basic_auth.is_some()),
        ("limits.body", policies.limits.body.is_some()),
        ("compression", policies.compression.is_some()),
        ("hsts", policies.hsts.is_some()),
        ("affinity", policies.affinity.is_some()),
    ];
    for (path, asked) in asked {
        if asked {
            let mut field = place.child(path.split('.').next().unwrap_or(path));
            if let Some((_, key)) = path.split_once('.') {
                field = field.and_then(|field| field.child(key));
            }
            let message = format!(
                "is for HTTP, and connections of the listener are {protocol_type} (accepted: leave \
                 it out)"
            );
            field.map_or_else(|| place.fail(message.clone()), |field| field.fail(message.clone()));
        }
    }
}

/// Tells a subdomain that has the base domain in it.
fn below_base_domain(place: &Field<'_>, route: &Route, relay: &Relay) {
    let (key, text, star) = match &route.matches.host {
        HostMatch::Subdomain(subdomain) => ("subdomain", subdomain, ""),
        HostMatch::Wildcard(suffix) => ("wildcard", suffix, "*."),
        _ => return,
    };
    for base in &relay.base_domains {
        let Some(label) = text.strip_suffix(&**base) else { continue };
        let meant = match (label.strip_suffix('.'), star) {
            (Some(label), _) => format!("{star}{label}"),
            (None, "*.") if label.is_empty() => "*".to_owned(),
            (None, _) => continue,
        };
        let full = format!("{star}{text}.{base}");
        fail(
            place,
            key,
            format!(
                "\"{star}{text}\" takes {full}, with the base domain twice (accepted: labels below \
             {base}); did you mean \"{meant}\"?"
            ),
        );
        return;
    }
}

/// Tells routes of which others take every exchange.
pub(super) fn shadowed(field: &Field<'_>, routes: &Routes, relay: &Relay) {
    // With a fault among these more may be taken than is seen here.
    if field.is_told("relay.listeners") || field.is_told("relay.base_domains") {
        return;
    }
    let mut by_place: HashMap<(&HostMatch, &str), Vec<&(usize, Route)>> = HashMap::new();
    for route in routes {
        let matches = &route.1.matches;
        by_place.entry((&matches.host, &matches.path_prefix)).or_default().push(route);
    }
    // A byte-born listener's exchanges have no host without TLS: a route that gives one loses nothing to them.
    let listeners: Vec<&Arc<str>> = relay
        .listeners
        .iter()
        .filter(|listener| !has_no_hosts(listener))
        .map(|listener| &listener.name)
        .collect();
    for (index, route) in routes {
        let matches = &route.matches;
        let mut by: Option<usize> = None;
        if let HostMatch::Subdomain(subdomain) = &matches.host {
            // An exact host comes first, whatever its path prefix.
            by = relay
                .base_domains
                .iter()
                .map(|base| {
                    let host = HostMatch::Exact(format!("{subdomain}.{base}").into());
                    let candidates = prefixes(&matches.path_prefix)
                        .filter_map(|prefix| by_place.get(&(&host, prefix)))
                        .flatten()
                        .copied();
                    covered(route, &candidates.collect::<Vec<_>>(), &listeners)
                })
                .reduce(|all, one| all.and(one))
                .flatten();
        }
        if by.is_none() && matches.listener.is_none() && matches.host != HostMatch::Any {
            let same = by_place.get(&(&matches.host, &*matches.path_prefix));
            let narrower: Vec<_> = same
                .into_iter()
                .flatten()
                .copied()
                .filter(|(_, other)| other.matches.listener.is_some())
                .collect();
            by = covered(route, &narrower, &listeners);
        }
        if let (Some(by), Some(place)) = (by, field.item(*index)) {
            let first = routes.iter().find(|(index, _)| *index == by);
            let first = first.map_or("", |(_, route)| &*route.name);
            place.fail(format!(
                "route \"{}\" takes nothing: \"{first}\", {}, comes before it for all that it would \
                 take (accepted: another host, path_prefix, listener or protocol_type)",
                route.name,
                named(field, by),
            ));
        }
    }
}

/// Returns `/a/b/c`, `/a/b`, `/a` and nothing.
fn prefixes(path: &str) -> impl Iterator<Item = &str> {
    std::iter::successors(Some(path), |path| path.rfind('/').map(|end| &path[..end]))
}

/// Returns a route that, with the others, takes every exchange of `route` on these listeners.
fn covered(route: &Route, others: &[&(usize, Route)], listeners: &[&Arc<str>]) -> Option<usize> {
    let fits = |other: &Route, listener: Option<&Arc<str>>| {
        let (matches, wanted) = (&other.matches, &route.matches);
        (matches.protocol_type.is_none() || matches.protocol_type == wanted.protocol_type)
            && (matches.listener.is_none() || matches.listener.as_ref() == listener)
    };
    let by = |listener: Option<&Arc<str>>| {
        others.iter().find(|(_, other)| fits(other, listener)).map(|(index, _)| *index)
    };
    match &route.matches.listener {
        Some(listener) => by(Some(listener)),
        None => by(None).or_else(|| {
            listeners.iter().map(|listener| by(Some(listener))).reduce(|all, one| all.and(one))?
        }),
    }
}

/// Tells what runs and is likely a mistake.
pub(super) fn unlikely(
    tunnels: Option<&Field<'_>>,
    routes: Option<(&Field<'_>, &Routes)>,
    sidecar: Option<&Field<'_>>,
    config: &Config,
) {
    if let Some((field, routes)) = routes {
        for (index, route) in routes {
            if let Some(place) = field.item(*index) {
                unlikely_policies(&place, route);
                if let Some(relay) = &config.relay {
                    unlikely_tls(&place, route, relay);
                }
            }
        }
    }
    // Where only one role is here, the other's file may use what is not used here.
    let embedded = |sidecar: &Sidecar| sidecar.relays == Relays::Embedded;
    if config.relay.is_some() && config.sidecar.as_ref().is_some_and(embedded) {
        unused(tunnels, routes);
    }
    if let (Some(Sidecar { relays: Relays::Listed(relays), .. }), Some(field)) =
        (&config.sidecar, sidecar.and_then(|field| field.child("resolve_interval")))
        && relays.iter().all(|relay| relay.address.host.parse::<std::net::IpAddr>().is_ok())
    {
        field.warn("has no effect: no relay is given by a name");
    }
}

/// Tells hosts that clients come to by TLS and no certificate is for, and TLS that is asked for where there
/// is none.
fn unlikely_tls(place: &Field<'_>, route: &Route, relay: &Relay) {
    if place.is_told("relay.listeners") || place.is_told("relay.base_domains") {
        return;
    }
    let is_taken = |listener: &&Arc<Listener>| {
        route.matches.listener.as_ref().is_none_or(|name| *name == listener.name)
            && listener.protocol_type().is_none()
    };
    let ends: Vec<&ServerTls> =
        relay.listeners.iter().filter(is_taken).filter_map(|one| one.tls.as_ref()).collect();
    if ends.is_empty() {
        // Where a proxy ends TLS, it may pass on what is for clients.
        let asks = route.policies.as_ref().is_some_and(|policies| policies.hsts.is_some());
        if asks
            && relay.trusted_proxies.is_empty()
            && let Some(field) = place.child("hsts")
        {
            field.warn("has no effect: no listener that the route is taken at has tls");
        }
        return;
    }
    let (key, hosts) = match &route.matches.host {
        HostMatch::Exact(host) => ("host", vec![host.to_string()]),
        HostMatch::Subdomain(name) => {
            let below = |base: &Arc<str>| format!("{name}.{base}");
            ("subdomain", relay.base_domains.iter().map(below).collect())
        }
        _ => return,
    };
    let is_covered = |host: &String| ends.iter().any(|tls| tls.covers(host));
    if !hosts.iter().any(is_covered)
        && let Some(field) = place.child(key)
    {
        field.warn(format!(
            "no listener with tls has a certificate for {}: browsers refuse what is shown",
            list(hosts.iter().map(String::as_str))
        ));
    }
}

fn unused(tunnels: Option<&Field<'_>>, routes: Option<(&Field<'_>, &Routes)>) {
    let routes = routes.map_or(&[][..], |(_, routes)| routes);
    let used: HashSet<&str> =
        routes.iter().flat_map(|(_, route)| &route.tunnels).map(|share| &*share.tunnel).collect();
    for item in tunnels.and_then(Field::items).unwrap_or_default() {
        if let Some(name) = item.child("name")
            && let Some(text) = name.node().text()
            && !used.contains(text)
        {
            name.warn(format!("no route goes to tunnel \"{text}\""));
        }
    }
}

fn unlikely_policies(place: &Field<'_>, route: &Route) {
    let Some(policies) = route.policies.as_deref() else { return };
    let at = |path: [&str; 2]| place.child(path[0]).and_then(|field| field.child(path[1]));
    if route.matches.path_prefix.is_empty()
        && policies.rewrite.path_prefix.as_deref() == Some("")
        && let Some(field) = at(["rewrite", "path_prefix"])
    {
        field.warn("changes nothing: the route has no path_prefix that it would take away");
    }
    let limits = &policies.limits;
    if let (Some(all), Some(one)) = (limits.rate, limits.rate_per_client) {
        let slower = |a: Rate, b: Rate| {
            u128::from(a.count) * b.per.as_nanos() <= u128::from(b.count) * a.per.as_nanos()
        };
        if slower(all, one)
            && all.burst <= one.burst
            && let Some(field) = at(["limits", "rate_per_client"])
        {
            field.warn("has no effect: `rate` gives all clients together no more");
        }
    }
    if policies.redirect.is_some() {
        let others = [
            ("timeouts", policies.timeouts != Default::default()),
            ("retries", policies.retries.is_some()),
            ("rewrite", policies.rewrite != Default::default()),
            ("compression", policies.compression.is_some()),
        ];
        for (key, given) in others {
            if given && let Some(field) = place.child(key) {
                field.warn("has no effect: the route redirects and asks no service");
            }
        }
    }
    let addresses = &policies.addresses;
    for deny in &addresses.deny {
        let outside = !addresses.allow.is_empty()
            && !addresses.allow.iter().any(|allow| allow.contains(deny) || deny.contains(allow));
        if outside && let Some(field) = at(["addresses", "deny"]) {
            field.warn(format!(
                "{} is not allowed anyway: `allow` has none of it",
                network_text(deny)
            ));
        }
    }
}

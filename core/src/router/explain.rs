//! Why a route takes an exchange, and why others do not: the rules of [`find`](super::find) applied to
//! one route after the other, and said in words. For people; exchanges are routed by `find`, and a
//! test holds the two against each other.

use std::sync::Arc;

use super::{HostBuffer, Query, normalize, path};
use crate::config::{HostMatch, Route, near_miss};

/// Routes that are told beside the one that takes the exchange; the nearest come first.
const OTHERS_MAX: usize = 10;

/// What would become of an exchange.
#[derive(Clone, Debug)]
pub struct Explanation {
    /// The route that takes it.
    pub route: Option<Arc<Route>>,
    /// Why it fits, a line for each part of its match; empty without a route.
    pub because: Vec<String>,
    /// Routes that came close, the nearest first; ten at most.
    pub others: Vec<Other>,
    /// Routes that came close and are not told.
    pub more: usize,
    /// What may have been meant, where no route takes it.
    pub hint: Option<String>,
}

/// A route that does not take the exchange.
#[derive(Clone, Debug)]
pub struct Other {
    /// The route.
    pub route: Arc<Route>,
    /// Why not.
    pub why: String,
}

/// How well a route fits; the greatest wins.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
struct Rank {
    host: HostRank,
    prefix: usize,
    names_type: bool,
    names_listener: bool,
}

/// How specific a host is, the most specific last.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
enum HostRank {
    Any,
    /// Length of what follows the star.
    Wildcard(usize),
    Subdomain,
    Exact,
}

/// How near a route came, the nearest first.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
enum Nearness {
    /// It fits, and a more specific one takes the exchange.
    Fits,
    /// Its host fits, another part does not.
    Host,
    /// Its host is another, but nearly the same.
    NearHost,
}

/// Explains which of `routes` takes the exchange. They are free of ambiguities, as those of a
/// [`RouteTable`](super::RouteTable); `base_domains` are lower case.
#[must_use]
pub fn explain(routes: &[Arc<Route>], base_domains: &[Arc<str>], query: &Query<'_>) -> Explanation {
    let mut buffer = HostBuffer::default();
    let asked = Asked {
        host: query.host.and_then(|host| normalize(host, &mut buffer)),
        path: query.path.split(['?', '#']).next().unwrap_or_default(),
        query,
        base_domains,
    };
    let taken = routes
        .iter()
        .filter_map(|route| Some((asked.rank(route)?, route)))
        .max_by_key(|(rank, _)| *rank);
    let mut others: Vec<(Nearness, Option<Rank>, Other)> = routes
        .iter()
        .filter(|route| taken.is_none_or(|(_, taken)| !Arc::ptr_eq(taken, route)))
        .filter_map(|route| {
            let (nearness, why) = asked.why_not(route, taken)?;
            let other = Other { route: Arc::clone(route), why };
            Some((nearness, asked.rank(route), other))
        })
        .collect();
    others.sort_by(|(a, a_rank, a_other), (b, b_rank, b_other)| {
        // Of those that fit, the runner-up first.
        (a, std::cmp::Reverse(a_rank), &a_other.route.name).cmp(&(
            b,
            std::cmp::Reverse(b_rank),
            &b_other.route.name,
        ))
    });
    let more = others.len().saturating_sub(OTHERS_MAX);
    let unclear = taken.and_then(|(_, route)| asked.unclear(routes, route));
    let taken = taken.filter(|_| unclear.is_none());
    Explanation {
        route: taken.map(|(_, route)| Arc::clone(route)),
        because: taken.map(|(rank, route)| asked.because(rank, route)).unwrap_or_default(),
        hint: unclear.or_else(|| taken.is_none().then(|| asked.hint(routes)).flatten()),
        others: others.into_iter().take(OTHERS_MAX).map(|(.., other)| other).collect(),
        more,
    }
}

/// A query as it is compared.
struct Asked<'a> {
    /// Without port and final dot, lower case.
    host: Option<&'a str>,
    path: &'a str,
    query: &'a Query<'a>,
    base_domains: &'a [Arc<str>],
}

impl Asked<'_> {
    /// Says by what reading of the path it is not this route's, as [`is_clear`](super::is_clear) finds.
    fn unclear(&self, routes: &[Arc<Route>], found: &Arc<Route>) -> Option<String> {
        let mut unclear = None;
        let is_alike = path::is_read_alike(self.path, |path| {
            let asked = Asked { path, ..*self };
            let ranked = routes.iter().filter_map(|route| Some((asked.rank(route)?, route)));
            let other = ranked.max_by_key(|(rank, _)| *rank).map(|(_, route)| route);
            if other.is_some_and(|other| Arc::ptr_eq(other, found)) {
                return true;
            }
            let whose = other.map_or_else(
                || "no route's".to_owned(),
                |other| format!("route \"{}\"'s", other.name),
            );
            unclear = Some(format!(
                "as written the path is route \"{}\"'s, but a service may read it as {path}, which is \
                 {whose}: refused with 400",
                found.name
            ));
            false
        });
        if !is_alike && unclear.is_none() {
            unclear =
                Some("the path is too long to be read in every way: refused with 400".to_owned());
        }
        unclear
    }

    /// Returns how well the route fits; `None`: it does not.
    fn rank(&self, route: &Route) -> Option<Rank> {
        let matches = &route.matches;
        let host = self.host_rank(&matches.host)?;
        let fits = self.path_fits(route) && self.type_fits(route) && self.listener_fits(route);
        fits.then(|| Rank {
            host,
            prefix: matches.path_prefix.len(),
            names_type: matches.protocol_type.is_some(),
            names_listener: matches.listener.is_some(),
        })
    }

    fn host_rank(&self, wanted: &HostMatch) -> Option<HostRank> {
        let host = self.host;
        match wanted {
            HostMatch::Any => Some(HostRank::Any),
            HostMatch::Exact(name) => (host? == &**name).then_some(HostRank::Exact),
            HostMatch::Subdomain(name) => {
                let rest = host?.strip_prefix(&**name)?.strip_prefix('.')?;
                let is_known = self.base_domains.iter().any(|base| **base == *rest);
                is_known.then_some(HostRank::Subdomain)
            }
            HostMatch::HostWildcard(suffix) => {
                is_below(host?, suffix).then_some(HostRank::Wildcard(suffix.len()))
            }
            HostMatch::Wildcard(suffix) => {
                let suffixes = self.base_domains.iter().map(|base| below_base(suffix, base));
                let longest = suffixes.filter(|suffix| is_below(host.unwrap_or(""), suffix));
                longest.map(|suffix| HostRank::Wildcard(suffix.len())).max()
            }
        }
    }

    fn path_fits(&self, route: &Route) -> bool {
        let rest = self.path.strip_prefix(&*route.matches.path_prefix);
        let is_whole = |rest: &str| rest.is_empty() || rest.starts_with('/');
        route.matches.path_prefix.is_empty() || rest.is_some_and(is_whole)
    }

    fn type_fits(&self, route: &Route) -> bool {
        let wanted = &route.matches.protocol_type;
        wanted.as_ref().is_none_or(|wanted| **wanted == *self.query.protocol_type)
    }

    fn listener_fits(&self, route: &Route) -> bool {
        let wanted = &route.matches.listener;
        wanted.as_ref().is_none_or(|wanted| **wanted == *self.query.listener)
    }

    /// Says why the route fits.
    fn because(&self, rank: Rank, route: &Route) -> Vec<String> {
        let matches = &route.matches;
        let host = self.host.unwrap_or_default();
        let mut lines = vec![match (&matches.host, rank.host) {
            (HostMatch::Subdomain(name), _) => {
                let base = host.get(name.len() + 1..).unwrap_or_default();
                format!("the host is its subdomain \"{name}\" below the base domain {base}")
            }
            (_, HostRank::Exact) => format!("the host is {host}, exactly"),
            (_, HostRank::Wildcard(length)) => {
                let suffix = &host[host.len().saturating_sub(length)..];
                format!("the host is below its wildcard *.{suffix}")
            }
            _ if self.host.is_none() => "it takes connections without a host".to_owned(),
            _ => "it takes any host".to_owned(),
        }];
        if !matches.path_prefix.is_empty() {
            lines.push(format!("the path begins with its path_prefix {}", matches.path_prefix));
        }
        if let Some(protocol_type) = &matches.protocol_type {
            lines.push(format!("the protocol is its protocol_type {protocol_type}"));
        }
        if let Some(listener) = &matches.listener {
            lines.push(format!("the client came in by its listener {listener}"));
        }
        lines
    }

    /// Says why the route does not take the exchange; `None`: it is too far from it to be told.
    fn why_not(
        &self,
        route: &Route,
        taken: Option<(Rank, &Arc<Route>)>,
    ) -> Option<(Nearness, String)> {
        if let Some(rank) = self.rank(route) {
            let (winner, by) = taken?;
            return Some((Nearness::Fits, shadowed(rank, route, winner, by)));
        }
        if self.host_rank(&route.matches.host).is_some() {
            return Some((Nearness::Host, self.misfits(route)));
        }
        self.near_host(route).map(|why| (Nearness::NearHost, why))
    }

    /// Says which parts beside the host do not fit.
    fn misfits(&self, route: &Route) -> String {
        let matches = &route.matches;
        let mut parts = Vec::new();
        if !self.path_fits(route) {
            parts.push(format!(
                "path {} does not begin with its path_prefix {} (whole segments)",
                self.path, matches.path_prefix
            ));
        }
        if let Some(wanted) = matches.protocol_type.as_deref().filter(|_| !self.type_fits(route)) {
            let given = self.query.protocol_type;
            parts.push(format!("it takes protocol_type {wanted} only, this is {given}"));
        }
        if let Some(wanted) = matches.listener.as_deref().filter(|_| !self.listener_fits(route)) {
            let given = self.query.listener;
            parts.push(format!("it takes listener {wanted} only, this is {given}"));
        }
        parts.join("; ")
    }

    /// Says what is nearly right about a host that is not the route's.
    fn near_host(&self, route: &Route) -> Option<String> {
        let host = self.host?;
        match &route.matches.host {
            HostMatch::Any => None,
            HostMatch::Exact(name) => {
                is_near(host, [&**name]).then(|| format!("its host is {name}"))
            }
            HostMatch::Subdomain(name) => {
                let foreign = host.strip_prefix(&**name).and_then(|rest| rest.strip_prefix('.'));
                if let Some(rest) = foreign {
                    return Some(format!(
                        "its subdomain is \"{name}\", but {rest} is no base domain (those are {})",
                        self.bases()
                    ));
                }
                let label = self.below_any_base(host)?;
                is_near(label, [&**name]).then(|| format!("its subdomain is \"{name}\""))
            }
            HostMatch::Wildcard(suffix) => {
                let mut suffixes = self.base_domains.iter().map(|base| below_base(suffix, base));
                let suffix = suffixes.find(|suffix| *suffix == host)?;
                Some(format!("its wildcard *.{suffix} wants a label before {suffix}"))
            }
            HostMatch::HostWildcard(suffix) => (host == &**suffix)
                .then(|| format!("its wildcard *.{suffix} wants a label before {suffix}")),
        }
    }

    /// Says what may have been meant.
    fn hint(&self, routes: &[Arc<Route>]) -> Option<String> {
        let host = self.host?;
        let best = routes.iter().filter_map(|route| self.host_rank(&route.matches.host)).max();
        if best.is_some_and(|best| best >= HostRank::Subdomain) {
            return None;
        }
        let names: Vec<String> = routes
            .iter()
            .flat_map(|route| match &route.matches.host {
                HostMatch::Exact(name) => vec![name.to_string()],
                HostMatch::Subdomain(name) => {
                    self.base_domains.iter().map(|base| format!("{name}.{base}")).collect()
                }
                _ => Vec::new(),
            })
            .filter(|name| self.is_near_name(host, name))
            .collect();
        let hint = near_miss(host, names.iter().map(String::as_str));
        if !hint.is_empty() {
            return Some(hint.trim_start_matches("; ").to_owned());
        }
        let is_known = self.below_any_base(host).is_some()
            || self.base_domains.iter().any(|base| **base == *host);
        (!is_known && best.is_none())
            .then(|| format!("{host} is not below a base domain (those are {})", self.bases()))
    }

    /// The whole of two hosts is near where most of it is the base domain; what stands before it must
    /// be near as well.
    fn is_near_name(&self, host: &str, name: &str) -> bool {
        match (self.below_any_base(host), self.below_any_base(name)) {
            (Some(asked), Some(known)) => is_near(asked, [known]),
            _ => true,
        }
    }

    fn below_any_base<'h>(&self, host: &'h str) -> Option<&'h str> {
        self.base_domains
            .iter()
            .find_map(|base| host.strip_suffix(&**base)?.strip_suffix('.'))
            .filter(|label| !label.is_empty())
    }

    fn bases(&self) -> String {
        self.base_domains.iter().map(AsRef::as_ref).collect::<Vec<&str>>().join(", ")
    }
}

/// Says why a route that fits is not the one.
fn shadowed(rank: Rank, route: &Route, winner: Rank, by: &Route) -> String {
    let name = &by.name;
    if rank.host != winner.host {
        let (own, others) = (host_words(rank.host), host_words(winner.host));
        return match (rank.host, winner.host) {
            (HostRank::Wildcard(_), HostRank::Wildcard(_)) => {
                format!("it fits, but its wildcard is shorter than that of {name}")
            }
            _ => format!("it fits, but {own} is less specific than {others} of {name}"),
        };
    }
    if rank.prefix != winner.prefix {
        let longer = &by.matches.path_prefix;
        return match &*route.matches.path_prefix {
            "" => format!("it fits, but {name} has the path_prefix {longer}"),
            own => format!("it fits, but its path_prefix {own} is shorter than {longer} of {name}"),
        };
    }
    let what = if rank.names_type == winner.names_type { "listener" } else { "protocol_type" };
    format!("it fits, but {name} names the {what}")
}

fn host_words(rank: HostRank) -> &'static str {
    match rank {
        HostRank::Any => "any host",
        HostRank::Wildcard(_) => "a wildcard",
        HostRank::Subdomain => "a subdomain",
        HostRank::Exact => "the exact host",
    }
}

fn below_base(suffix: &str, base: &str) -> String {
    if suffix.is_empty() { base.to_owned() } else { format!("{suffix}.{base}") }
}

/// Returns whether one label at least stands before `.suffix`.
fn is_below(host: &str, suffix: &str) -> bool {
    host.strip_suffix(suffix).is_some_and(|rest| rest.len() > 1 && rest.ends_with('.'))
}

fn is_near<'a>(value: &str, names: impl IntoIterator<Item = &'a str>) -> bool {
    !near_miss(value, names).is_empty()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::config::{Match, MatchSpec, Share};

    fn route(name: &str, spec: &MatchSpec<'_>) -> Arc<Route> {
        Arc::new(Route {
            name: name.into(),
            tunnels: vec![Share { tunnel: "t".into(), weight: 1 }],
            matches: Match::parse(spec).unwrap(),
            options: Default::default(),
            policies: None,
        })
    }

    fn routes() -> Vec<Arc<Route>> {
        let none = MatchSpec::default();
        vec![
            route("exact", &MatchSpec { host: Some("shop.example.org"), ..none }),
            route("shop", &MatchSpec { subdomain: Some("shop"), ..none }),
            route("api", &MatchSpec { subdomain: Some("shop"), path_prefix: Some("/api"), ..none }),
            route(
                "rpc",
                &MatchSpec { subdomain: Some("shop"), protocol_type: Some("GRPC"), ..none },
            ),
            route("apps", &MatchSpec { wildcard: Some("*.apps"), ..none }),
            route("all", &MatchSpec { wildcard: Some("*"), ..none }),
            route("lines", &MatchSpec { listener: Some("lines"), ..none }),
        ]
    }

    /// Checks the route, and lines that the explanation has.
    #[track_caller]
    fn check(host: &str, path: &str, expected: Option<&str>, lines: &[&str]) {
        check_among(&routes(), host, path, expected, lines);
    }

    #[track_caller]
    fn check_among(
        routes: &[Arc<Route>],
        host: &str,
        path: &str,
        expected: Option<&str>,
        lines: &[&str],
    ) {
        let bases = ["localhost".into(), "example.org".into()];
        let query = Query { host: Some(host), path, listener: "web", protocol_type: "HTTP" };
        let explanation = explain(routes, &bases, &query);
        assert_eq!(explanation.route.as_ref().map(|route| &*route.name), expected);
        let mut told = explanation.because.clone();
        told.extend(
            explanation.others.iter().map(|other| format!("{}: {}", other.route.name, other.why)),
        );
        told.extend(explanation.hint);
        for line in lines {
            assert!(told.iter().any(|told| told == line), "no line {line:?} in {told:#?}");
        }
    }

    #[test]
    fn a_path_with_two_readings_is_told_with_the_other() {
        check(
            "shop.localhost",
            "/x/%2e%2e/api/y?q",
            None,
            &[
                "as written the path is route \"shop\"'s, but a service may read it as /api/y, which is route \
             \"api\"'s: refused with 400",
            ],
        );
        check("shop.localhost", "/x//y/../z", Some("shop"), &[]);
    }

    #[test]
    fn the_winner_says_which_parts_fit() {
        check(
            "Shop.localhost:9080",
            "/api/x?y",
            Some("api"),
            &[
                "the host is its subdomain \"shop\" below the base domain localhost",
                "the path begins with its path_prefix /api",
            ],
        );
        check("shop.example.org", "/", Some("exact"), &["the host is shop.example.org, exactly"]);
        check(
            "a.apps.localhost",
            "/",
            Some("apps"),
            &["the host is below its wildcard *.apps.localhost"],
        );
    }

    #[test]
    fn those_that_fit_say_what_shadows_them() {
        check(
            "shop.example.org",
            "/api",
            Some("exact"),
            &[
                "api: it fits, but a subdomain is less specific than the exact host of exact",
                "all: it fits, but a wildcard is less specific than the exact host of exact",
            ],
        );
        check(
            "shop.localhost",
            "/api",
            Some("api"),
            &["shop: it fits, but api has the path_prefix /api"],
        );
        check(
            "a.apps.localhost",
            "/",
            Some("apps"),
            &["all: it fits, but its wildcard is shorter than that of apps"],
        );
    }

    #[test]
    fn those_of_the_host_say_which_part_does_not_fit() {
        check(
            "shop.localhost",
            "/apix",
            Some("shop"),
            &[
                "api: path /apix does not begin with its path_prefix /api (whole segments)",
                "rpc: it takes protocol_type GRPC only, this is HTTP",
                "lines: it takes listener lines only, this is web",
            ],
        );
    }

    #[test]
    fn an_unknown_host_says_what_is_near() {
        let routes = &routes()[1..4];
        check_among(
            routes,
            "shpo.localhost",
            "/",
            None,
            &["shop: its subdomain is \"shop\"", "did you mean \"shop.localhost\"?"],
        );
        check_among(
            routes,
            "shop.example.com",
            "/",
            None,
            &["shop: its subdomain is \"shop\", but example.com is no base domain (those are \
               localhost, example.org)"],
        );
        check_among(
            routes,
            "www.example.com",
            "/",
            None,
            &["www.example.com is not below a base domain (those are localhost, example.org)"],
        );
        check_among(routes, "bank.localhost", "/", None, &[]);
    }

    #[test]
    fn what_came_close_is_bounded() {
        let routes: Vec<_> = (0..30)
            .map(|index| {
                let prefix = format!("/{index}");
                let spec = MatchSpec {
                    subdomain: Some("d"),
                    path_prefix: Some(&prefix),
                    ..MatchSpec::default()
                };
                route(&index.to_string(), &spec)
            })
            .collect();
        let query = Query { host: Some("d.localhost"), path: "/", ..Query::default() };
        let explanation = explain(&routes, &["localhost".into()], &query);
        assert_eq!((explanation.others.len(), explanation.more), (OTHERS_MAX, 20));
    }
}

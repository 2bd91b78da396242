use proptest::prelude::*;

use super::*;
use crate::config::{Match, MatchSpec, Share};

const BASES: [&str; 2] = ["localhost", "example.org"];

fn bases() -> Vec<Arc<str>> {
    BASES.iter().map(|base| (*base).into()).collect()
}

fn route(name: &str, spec: &MatchSpec<'_>) -> Arc<Route> {
    Arc::new(Route {
        name: name.into(),
        tunnels: vec![Share { tunnel: "t".into(), weight: 1 }],
        matches: Match::parse(spec).unwrap(),
        options: Default::default(),
        policies: None,
    })
}

fn subdomain(name: &str) -> MatchSpec<'_> {
    MatchSpec { subdomain: Some(name), ..MatchSpec::default() }
}

fn host(name: &str) -> MatchSpec<'_> {
    MatchSpec { host: Some(name), ..MatchSpec::default() }
}

fn wildcard(name: &str) -> MatchSpec<'_> {
    MatchSpec { wildcard: Some(name), ..MatchSpec::default() }
}

/// Checks which of `specs` (by index) takes `host` and `path` on listener web as HTTP.
#[track_caller]
fn check(specs: &[MatchSpec<'_>], host: &str, path: &str, expected: Option<usize>) {
    let query = Query { host: Some(host), path, listener: "web", protocol_type: "HTTP" };
    check_query(specs, &query, expected);
}

#[track_caller]
fn check_query(specs: &[MatchSpec<'_>], query: &Query<'_>, expected: Option<usize>) {
    let routes: Vec<_> =
        specs.iter().enumerate().map(|(index, spec)| route(&index.to_string(), spec)).collect();
    // In either order: precedence is not the file's order.
    for routes in [routes.clone(), routes.into_iter().rev().collect()] {
        let table = RouteTable::build(&routes, &bases()).unwrap();
        let found = find(&table, query).map(|route| route.name.parse::<usize>().unwrap());
        assert_eq!(found, expected, "{query:?}");
    }
}

#[test]
fn more_specific_host_wins() {
    let all = [
        host("a.apps.localhost"),
        subdomain("a.apps"),
        wildcard("*.apps"),
        wildcard("*"),
        MatchSpec { listener: Some("web"), ..MatchSpec::default() },
    ];
    for skip in 0..all.len() {
        check(&all[skip..], "a.apps.localhost", "/", Some(0));
    }
    check(&all, "b.apps.localhost", "/", Some(2));
    check(&all, "x.b.apps.example.org", "/", Some(2));
    check(&all, "apps.localhost", "/", Some(3));
    check(&all, "localhost", "/", Some(4));
    check(&all[..4], "localhost", "/", None);
}

#[test]
fn longest_wildcard_suffix_wins() {
    let specs = [host("*.b.example.com"), host("*.example.com"), host("*.a.b.example.com")];
    check(&specs, "x.a.b.example.com", "/", Some(2));
    check(&specs, "a.b.example.com", "/", Some(0));
    check(&specs, "b.example.com", "/", Some(1));
    check(&specs, "example.com", "/", None);
    check(&specs, ".example.com", "/", None);
}

#[test]
fn longer_path_prefix_wins_by_whole_segments() {
    let prefix = |path_prefix| MatchSpec { path_prefix: Some(path_prefix), ..subdomain("d") };
    let specs = [prefix("/a"), prefix("/a/b"), prefix("/"), prefix("/ä/ö")];
    for (path, expected) in [
        ("/a", 0),
        ("/a/", 0),
        ("/ab", 2),
        ("/a/b", 1),
        ("/a/b/c/d/e", 1),
        ("/a/bc", 0),
        ("/a?x=/a/b", 0),
        ("/a#/b", 0),
        ("/", 2),
        ("", 2),
        ("*", 2),
        ("//a", 2),
        ("/ä/ö", 3),
        ("/ä/öö", 2),
        ("/äääää", 2),
    ] {
        check(&specs, "d.localhost", path, Some(expected));
    }
    check(&[prefix("/a")], "d.localhost", "/b", None);
}

#[test]
fn a_path_that_others_read_as_another_routes_is_not_clear() {
    let prefix = |path_prefix| MatchSpec { path_prefix: Some(path_prefix), ..subdomain("d") };
    let specs = [subdomain("d"), prefix("/admin"), prefix("/a/b"), subdomain("e")];
    let routes: Vec<_> =
        specs.iter().enumerate().map(|(index, spec)| route(&index.to_string(), spec)).collect();
    let table = RouteTable::build(&routes, &bases()).unwrap();
    for (host, path, expected) in [
        ("d.localhost", "/x/../admin", false),
        ("d.localhost", "/x/%2e%2e/admin?q", false),
        ("d.localhost", "//admin", false),
        ("d.localhost", "/%61dmin", false),
        ("d.localhost", "/admin%2Fx", false),
        ("d.localhost", "/admin;a/x", false),
        ("d.localhost", "/x/..;/admin", false),
        ("d.localhost", "/\\admin", false),
        ("d.localhost", "/admin/../x", false),
        ("d.localhost", "/a/b/%2e%2e", false),
        // What is read in two ways, but as the same route's.
        ("d.localhost", "/x//y/../z%2Fq;a", true),
        ("d.localhost", "/admin//x/../y%2fz", true),
        ("d.localhost", "/administrator", true),
        ("d.localhost", "/?/../admin", true),
        ("d.localhost", "/%20admin", true),
        ("e.localhost", "/x/../admin", true),
    ] {
        let query = Query { host: Some(host), path, listener: "web", protocol_type: "HTTP" };
        let found = find(&table, &query).unwrap();
        assert_eq!(is_clear(&table, &query, found), expected, "{path}");
    }
}

#[test]
fn less_specific_host_takes_what_the_more_specific_one_leaves() {
    let specs = [MatchSpec { path_prefix: Some("/api"), ..host("d.localhost") }, wildcard("*")];
    check(&specs, "d.localhost", "/api/x", Some(0));
    check(&specs, "d.localhost", "/", Some(1));
}

#[test]
fn hosts_are_compared_without_port_case_and_final_dot() {
    let specs = [subdomain("demo"), host("::1"), host("192.0.2.1")];
    for host in ["demo.localhost", "DEMO.Localhost:9080", "demo.example.org.", "demo.localhost.:80"]
    {
        check(&specs, host, "/", Some(0));
    }
    for host in ["[::1]", "[::1]:80", "[0:0:0:0:0:0:0:1]:80"] {
        check(&specs, host, "/", Some(1));
    }
    check(&specs, "192.0.2.1:80", "/", Some(2));
    for host in ["", ".", ":80", "[::1", "[x]", "demo", "localhost", "xdemo.localhost"] {
        check(&specs, host, "/", None);
    }
    check(&specs, &"A".repeat(300), "/", None);
    check(&[wildcard("*")], &format!("{}.localhost", "a".repeat(300)), "/", None);
}

#[test]
fn protocol_type_and_listener_restrict() {
    let specs = [
        MatchSpec { protocol_type: Some("HTTP"), ..subdomain("d") },
        MatchSpec { protocol_type: Some("GRPC"), ..subdomain("d") },
        MatchSpec { listener: Some("web"), ..subdomain("d") },
        MatchSpec { listener: Some("lines"), ..MatchSpec::default() },
    ];
    let query = |listener, protocol_type| Query {
        host: Some("d.localhost"),
        path: "/",
        listener,
        protocol_type,
    };
    check_query(&specs, &query("web", "HTTP"), Some(0));
    check_query(&specs, &query("web", "GRPC"), Some(1));
    check_query(&specs, &query("web", "WEBSOCKET"), Some(2));
    check_query(&specs, &query("other", "WEBSOCKET"), None);
    let born_of_bytes = Query { listener: "lines", protocol_type: "LINE", ..Query::default() };
    check_query(&specs, &born_of_bytes, Some(3));
}

#[test]
fn equal_routes_are_ambiguous() {
    let routes = [
        route("one", &subdomain("d")),
        route("two", &MatchSpec { path_prefix: Some("/"), ..subdomain("D") }),
        route("three", &wildcard("*.example")),
        route("four", &subdomain("e")),
        route("five", &wildcard("*.example")),
    ];
    let ambiguity = RouteTable::build(&routes, &bases()).unwrap_err();
    assert_eq!(
        ambiguity.to_string(),
        "routes \"one\" and \"two\" take the same exchanges; routes \"three\" and \"five\" take \
         the same exchanges"
    );
}

#[test]
fn one_host_by_two_routes_of_different_kind_is_no_ambiguity() {
    check(&[host("d.localhost"), subdomain("d")], "d.localhost", "/", Some(0));
    check(&[host("*.localhost"), subdomain("d")], "d.localhost", "/", Some(1));
}

/// The routing rules read literally: every route is tried, the best rank wins.
fn model<'r>(routes: &'r [Arc<Route>], query: &Query<'_>) -> Option<&'r Arc<Route>> {
    let host = query.host.map(|host| {
        let name = host.split(':').next().unwrap().to_lowercase();
        name.strip_suffix('.').unwrap_or(&name).to_owned()
    });
    let below = |suffix: &str| {
        host.as_ref().is_some_and(|host| {
            host.strip_suffix(suffix).is_some_and(|rest| rest.len() > 1 && rest.ends_with('.'))
        })
    };
    let rank_of_host =
        |matches: &Match| match &matches.host {
            HostMatch::Any => Some((0, 0)),
            HostMatch::Exact(name) => (host.as_deref() == Some(&**name)).then_some((3, 0)),
            HostMatch::Subdomain(name) => {
                BASES.iter().any(|base| host == Some(format!("{name}.{base}"))).then_some((2, 0))
            }
            HostMatch::HostWildcard(suffix) => below(suffix).then_some((1, suffix.len())),
            HostMatch::Wildcard(suffix) => BASES
                .iter()
                .map(|base| {
                    if suffix.is_empty() { (*base).to_owned() } else { format!("{suffix}.{base}") }
                })
                .filter(|suffix| below(suffix))
                .map(|suffix| (1, suffix.len()))
                .max(),
        };
    let path = query.path.split('?').next().unwrap();
    let rank = |route: &Arc<Route>| {
        let matches = &route.matches;
        let prefix = &*matches.path_prefix;
        let rest = path.strip_prefix(prefix)?;
        (prefix.is_empty() || rest.is_empty() || rest.starts_with('/')).then_some(())?;
        matches.protocol_type.as_deref().is_none_or(|t| t == query.protocol_type).then_some(())?;
        matches.listener.as_deref().is_none_or(|l| l == query.listener).then_some(())?;
        Some((
            rank_of_host(matches)?,
            prefix.len(),
            matches.protocol_type.is_some(),
            matches.listener.is_some(),
        ))
    };
    routes
        .iter()
        .filter_map(|route| Some((rank(route)?, route)))
        .max_by_key(|(rank, _)| *rank)
        .map(|(_, route)| route)
}

fn name() -> impl Strategy<Value = String> {
    proptest::collection::vec(
        prop_oneof![Just("a"), Just("b"), Just("localhost"), Just("example.org")],
        1..4,
    )
    .prop_map(|labels| labels.join("."))
}

fn path() -> impl Strategy<Value = String> {
    proptest::collection::vec(
        prop_oneof![Just("/"), Just("/a"), Just("/b"), Just("/ab"), Just("é")],
        0..5,
    )
    .prop_map(|segments| segments.concat())
}

fn any_match() -> impl Strategy<Value = Match> {
    let host = prop_oneof![
        Just(HostMatch::Any),
        name().prop_map(|name| HostMatch::Exact(name.into())),
        name().prop_map(|name| HostMatch::Subdomain(name.into())),
        name().prop_map(|name| HostMatch::Wildcard(name.into())),
        Just(HostMatch::Wildcard("".into())),
        name().prop_map(|name| HostMatch::HostWildcard(name.into())),
    ];
    let prefix = path().prop_map(|path| {
        let path = format!("/{}", path.trim_start_matches('/'));
        path.trim_end_matches('/').to_owned()
    });
    let listener = proptest::option::of(prop_oneof![Just("web"), Just("lines")]);
    let protocol_type = proptest::option::of(prop_oneof![Just("HTTP"), Just("LINE")]);
    (host, prefix, listener, protocol_type).prop_map(
        |(host, prefix, listener, protocol_type): (_, String, Option<&str>, Option<&str>)| Match {
            host,
            path_prefix: prefix.into(),
            listener: listener.map(Into::into),
            protocol_type: protocol_type.map(Into::into),
        },
    )
}

proptest! {
    #[test]
    fn the_table_finds_what_the_model_finds(
        matches in proptest::collection::vec(any_match(), 1..24),
        queries in proptest::collection::vec((proptest::option::of(name()), path(), any::<[bool; 4]>()), 1..16),
    ) {
        let mut routes: Vec<Arc<Route>> = Vec::new();
        for (index, matches) in matches.into_iter().enumerate() {
            let route = Arc::new(Route {
                name: index.to_string().into(),
                tunnels: vec![Share { tunnel: "t".into(), weight: 1 }],
                matches,
                options: Default::default(),
                policies: None,
            });
            routes.push(route);
            // What would be ambiguous stays out: the model has no opinion on it.
            if RouteTable::build(&routes, &bases()).is_err() {
                routes.pop();
            }
        }
        let table = RouteTable::build(&routes, &bases()).unwrap();
        for (host, path, [upper, port, web, http]) in queries {
            let host = host.map(|host| {
                let host = if upper { host.to_uppercase() } else { host };
                if port { format!("{host}.:80") } else { host }
            });
            let query = Query {
                host: host.as_deref(),
                path: &path,
                listener: if web { "web" } else { "lines" },
                protocol_type: if http { "HTTP" } else { "LINE" },
            };
            let found = find(&table, &query);
            let name = found.map(|route| &route.name);
            prop_assert_eq!(name, model(&routes, &query).map(|route| &route.name), "{:?}", query);
            let found = found.filter(|route| is_clear(&table, &query, route));
            let found = found.map(|route| &route.name);
            let explained = explain(table.routes(), &bases(), &query).route;
            prop_assert_eq!(found, explained.as_ref().map(|route| &route.name), "{:?}", query);
        }
    }
}

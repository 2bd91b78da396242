//! What it costs to find a route: must not grow with the number of routes beyond a hash look-up.

#![allow(missing_docs, reason = "a bench's names say what they measure")]

use std::sync::Arc;

use divan::{Bencher, black_box};
use sidelane::config::{Match, MatchSpec, Route, Share};
use sidelane::router::{Query, RouteTable, find, is_clear};

const ROUTES: [usize; 2] = [10, 10_000];

fn main() {
    divan::main();
}

fn table(count: usize, spec: impl Fn(&str) -> Match) -> RouteTable {
    let routes: Vec<Arc<Route>> = (0..count)
        .map(|index| {
            let name = format!("name{index}");
            Arc::new(Route {
                matches: spec(&name),
                name: name.into(),
                tunnels: vec![Share { tunnel: "tunnel".into(), weight: 1 }],
                options: Default::default(),
                policies: None,
            })
        })
        .collect();
    RouteTable::build(&routes, &["localhost".into()]).expect("names differ")
}

fn parse(spec: &MatchSpec<'_>) -> Match {
    Match::parse(spec).expect("the match is good")
}

fn bench(bencher: Bencher<'_, '_>, table: &RouteTable, host: &str, path: &str, found: bool) {
    let query = Query { host: Some(host), path, listener: "web", protocol_type: "HTTP" };
    assert_eq!(find(table, &query).is_some(), found);
    bencher.bench(|| find(black_box(table), black_box(&query)).is_some());
}

#[divan::bench(args = ROUTES)]
fn subdomain(bencher: Bencher<'_, '_>, count: usize) {
    let table =
        table(count, |name| parse(&MatchSpec { subdomain: Some(name), ..Default::default() }));
    bench(bencher, &table, "name7.localhost:9080", "/some/path?query", true);
}

#[divan::bench(args = ROUTES)]
fn upper_case_host(bencher: Bencher<'_, '_>, count: usize) {
    let table =
        table(count, |name| parse(&MatchSpec { subdomain: Some(name), ..Default::default() }));
    bench(bencher, &table, "NAME7.LOCALHOST:9080", "/", true);
}

#[divan::bench(args = ROUTES)]
fn unknown_host(bencher: Bencher<'_, '_>, count: usize) {
    let table =
        table(count, |name| parse(&MatchSpec { subdomain: Some(name), ..Default::default() }));
    bench(bencher, &table, "nobody.localhost", "/", false);
}

#[divan::bench(args = ROUTES)]
fn wildcard(bencher: Bencher<'_, '_>, count: usize) {
    let table = table(count, |name| {
        parse(&MatchSpec { wildcard: Some(&format!("*.{name}")), ..Default::default() })
    });
    bench(bencher, &table, "a.b.name7.localhost", "/", true);
}

#[divan::bench(args = ROUTES)]
fn path_prefix(bencher: Bencher<'_, '_>, count: usize) {
    let table = table(count, |name| {
        let prefix = format!("/api/{name}");
        parse(&MatchSpec {
            subdomain: Some("one"),
            path_prefix: Some(&prefix),
            ..Default::default()
        })
    });
    bench(bencher, &table, "one.localhost", "/api/name7/and/more/of/it", true);
}

/// Beside [`path_prefix`]: whether services read the path alike, where nobody could read it otherwise, and
/// where twelve readings must be compared.
#[divan::bench(args = ["/api/name7/and/more/of/it", "/api/name7/group%2Fproject/of/it"])]
fn clear_path(bencher: Bencher<'_, '_>, path: &str) {
    let spec =
        MatchSpec { subdomain: Some("one"), path_prefix: Some("/api/name7"), ..Default::default() };
    let table = table(1, |_| parse(&spec));
    let query = Query { host: Some("one.localhost"), path, listener: "web", protocol_type: "HTTP" };
    let found = find(&table, &query).expect("the path begins so");
    assert!(is_clear(&table, &query, found));
    bencher.bench(|| is_clear(black_box(&table), black_box(&query), found));
}

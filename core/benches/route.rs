//! What it costs to find a route: must not grow with the number of routes beyond a hash look-up.

#![allow(missing_docs, reason = "a bench's names say what they measure")]

use std::sync::Arc;

use divan::{Bencher, black_box};
use sidelane::config::{Match, MatchSpec, Route, Share};
use sidelane::router::{Query, RouteTable, find};

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

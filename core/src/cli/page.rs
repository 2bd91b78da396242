//! `config`, `routes`, `tunnels`, `plugins`: a running process's admin pages, as tables.
//!
//! Knows the pages' fields (docs/operations.md). A field that an older or newer process does not send is
//! shown as not known, never an error.

use std::collections::HashMap;

use serde_json::Value as Json;

use super::text::{Table, age, printable};
use super::{Asked, Failed, Form, ask, print, print_json, terminal_width, yaml};
use crate::config::value;

/// Which page.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Page {
    Config,
    Routes,
    Tunnels,
    Plugins,
}

pub(super) fn run(page: Page, asked: &Asked) -> Result<(), Failed> {
    let address = ask::address(asked.admin.as_deref(), asked.file.as_deref())?;
    let path = match page {
        Page::Config => "/config",
        Page::Routes => "/routes",
        Page::Tunnels => "/tunnels",
        Page::Plugins => "/plugins",
    };
    let json = ask::get(&address, path)?;
    if asked.output == Form::Json {
        return print_json(&json);
    }
    print(&render(page, &json, terminal_width()))
}

fn render(page: Page, json: &Json, width: Option<usize>) -> String {
    match page {
        Page::Config => config(json),
        Page::Routes => routes(json).render(width),
        Page::Tunnels => tunnels(json, width),
        Page::Plugins => plugins(json).render(width),
    }
}

/// The configuration as YAML, after what is to be known of it.
fn config(json: &Json) -> String {
    let mut text = String::new();
    let mut json = json.clone();
    let map = json.as_object_mut();
    let facts = map.map(|map| (map.remove("last_reload_error"), map.remove("pending_restart")));
    let (error, pending) = facts.unwrap_or_default();
    for line in error.iter().flat_map(|error| error.as_str().unwrap_or_default().lines()) {
        text.push_str(&format!("# not in force, the last edit: {}\n", printable(line)));
    }
    for what in pending.iter().flat_map(items) {
        text.push_str(&format!("# only after a restart: {}\n", printable(&plain(what))));
    }
    let routes = json.get_mut("routes").and_then(Json::as_array_mut);
    for route in routes.into_iter().flatten() {
        // A default name, `*.apps` say, that no file may give.
        let is_default = route["name"].as_str().is_some_and(|name| value::name(name).is_err());
        if let (true, Some(map)) = (is_default, route.as_object_mut()) {
            map.remove("name");
        }
    }
    let written = yaml::of(&json);
    if written.contains("***") {
        text.push_str("# secrets stand as ***\n");
    }
    text + &written
}

fn routes(json: &Json) -> Table {
    let mut table = Table::new(&["ROUTE", "MATCH", "TUNNELS", "POLICIES", "FROM", "STATE"]);
    // Those that are the same as another are told in its line.
    let mut same: HashMap<(String, String), Vec<String>> = HashMap::new();
    for route in items(json).filter(|route| route["same_as"].is_object()) {
        let by = &route["same_as"];
        let by = (plain(&by["from"]), plain(&by["route"]));
        same.entry(by).or_default().push(plain(&route["from"]));
    }
    for route in items(json).filter(|route| !route["same_as"].is_object()) {
        let mut from = vec![plain(&route["from"])];
        let own = (plain(&route["from"]), plain(&route["name"]));
        for other in same.remove(&own).unwrap_or_default() {
            // Replicas share a name.
            if !from.contains(&other) {
                from.push(other);
            }
        }
        table.row([
            plain(&route["name"]),
            matched(route),
            shares(route),
            items(&route["policies"]).map(plain).collect::<Vec<_>>().join(" "),
            from.join(", "),
            state(route),
        ]);
    }
    table
}

/// `http://shop.example.org/api/ (+1)`, or the file's keys where the addresses are not known.
fn matched(route: &Json) -> String {
    let mut text = match &route["urls"] {
        Json::Array(urls) if !urls.is_empty() => {
            let more = urls.len() - 1;
            let more = if more > 0 { format!(" (+{more})") } else { String::new() };
            format!("{}{more}", plain(&urls[0]))
        }
        _ => {
            let keys = ["subdomain", "host", "wildcard"];
            let host = keys.iter().map(|key| plain(&route[*key])).collect::<String>();
            let listener = if host.is_empty() { plain(&route["listener"]) } else { String::new() };
            format!("{host}{listener}{}", plain(&route["path_prefix"]))
        }
    };
    if let Some(protocol_type) = route["protocol_type"].as_str() {
        text.push_str(&format!(" {protocol_type}"));
    }
    text
}

/// `web`, `web 90, canary 10`.
fn shares(route: &Json) -> String {
    let shares: Vec<&Json> = items(&route["serving"]).collect();
    match shares.as_slice() {
        [] => plain(&route["tunnel"]),
        [share] => plain(&share["tunnel"]),
        shares => {
            let share = |share: &&Json| format!("{} {}", plain(&share["tunnel"]), share["weight"]);
            shares.iter().map(share).collect::<Vec<_>>().join(", ")
        }
    }
}

/// What is to be known of a route that is not simply in force.
fn state(route: &Json) -> String {
    let by = &route["overruled_by"];
    if by.is_object() {
        return format!("overruled by {} (from {})", plain(&by["route"]), plain(&by["from"]));
    }
    if route["waits_for"].is_array() {
        let reasons: Vec<String> = items(&route["waits_for"]).map(plain).collect();
        return format!("waiting: {}", reasons.join("; "));
    }
    if route["forbidden"].is_array() {
        let reasons: Vec<String> = items(&route["forbidden"]).map(plain).collect();
        return format!("not claimed: {}", reasons.join("; "));
    }
    let told: Vec<String> = items(&route["announced"]).filter_map(not_accepted).collect();
    if !told.is_empty() {
        return told.join("; ");
    }
    let shares: Vec<&Json> = items(&route["serving"]).collect();
    let (unserved, others): (Vec<&Json>, Vec<&Json>) =
        shares.iter().copied().partition(|share| share["served"] == Json::Bool(false));
    let names = unserved.into_iter().map(unserved_share).collect::<Vec<_>>().join(", ");
    if names.is_empty() {
        return "in force".to_owned();
    }
    // The weight is 0 for what is there to serve where nothing else does.
    let is_fallback = |share: &&Json| share["weight"] == 0;
    if others.is_empty() {
        format!("not served: {names}")
    } else if others.iter().all(is_fallback) {
        let by: Vec<String> =
            others.iter().map(|share| format!("{} (weight 0)", plain(&share["tunnel"]))).collect();
        format!("served by {}; not served: {names}", by.join(", "))
    } else {
        format!("in force, but not served: {names}")
    }
}

/// `web`, `web (unavailable at laptop: waiting for the service)`.
fn unserved_share(share: &Json) -> String {
    let tunnel = plain(&share["tunnel"]);
    match unavailable(&share["unavailable"]) {
        reason if reason.is_empty() => tunnel,
        reason => format!("{tunnel} ({reason})"),
    }
}

/// `unavailable at laptop: waiting for the service; at ci: HTTP 500`; empty: it is nowhere so.
fn unavailable(sidecars: &Json) -> String {
    let at = |told: &Json| format!("at {}: {}", plain(&told["sidecar"]), plain(&told["reason"]));
    let told: Vec<String> = items(sidecars).map(at).collect();
    if told.is_empty() { String::new() } else { format!("unavailable {}", told.join("; ")) }
}

/// What a relay said of a sidecar's route, where it did not simply accept it.
fn not_accepted(relay: &Json) -> Option<String> {
    let said = |key: &str| items(&relay[key]).map(plain).collect::<Vec<_>>().join("; ");
    let (name, state) = (plain(&relay["relay"]), plain(&relay["state"]));
    match &*state {
        "accepted" if said("notes").is_empty() => None,
        "accepted" => Some(format!("{name}: {}", said("notes"))),
        "refused" if said("reasons").is_empty() => {
            Some(format!("{name}: refused with others of the file"))
        }
        "refused" => Some(format!("{name}: refused: {}", said("reasons"))),
        _ => Some(format!("{name}: {state}")),
    }
}

fn tunnels(json: &Json, width: Option<usize>) -> String {
    let mut table =
        Table::new(&["TUNNEL", "SERVICE", "HEALTH", "SIDECARS", "SESSIONS", "LANES", "IN FLIGHT"]);
    for tunnel in items(&json["tunnels"]) {
        let aside = |name: &str| {
            items(&tunnel["serving"]).any(|one| one["sidecar"] == name && one["left_aside"] == true)
        };
        let sidecar = |name: &Json| match plain(name) {
            name if aside(&name) => format!("{name} (left aside)"),
            name => name,
        };
        let sidecars: Vec<String> = items(&tunnel["sidecars"]).map(sidecar).collect();
        table.row([
            plain(&tunnel["name"]),
            plain(&tunnel["service"]),
            health(tunnel, &json["services"]),
            sidecars.join(", "),
            plain(&tunnel["sessions"]),
            plain(&tunnel["lanes"]),
            plain(&tunnel["in_flight"]),
        ]);
    }
    let mut text = table.render(width);
    if json["sessions"].is_array() {
        let mut table = Table::new(&[
            "SIDECAR",
            "PRINCIPAL",
            "CREDENTIAL",
            "EXPIRES",
            "PEER",
            "UP FOR",
            "LANES",
            "IN FLIGHT",
            "TUNNELS",
            "ANNOUNCEMENT",
        ]);
        for session in items(&json["sessions"]) {
            let tunnels: Vec<String> = items(&session["tunnels"]).map(plain).collect();
            table.row([
                plain(&session["sidecar"]),
                plain(&session["principal"]),
                session_credential(session),
                plain(&session["expires"]),
                plain(&session["peer"]),
                up_for(session),
                lanes(session),
                in_flight(session),
                tunnels.join(", "),
                session_announcement(session),
            ]);
        }
        text = text + "\n" + &table.render(width);
    }
    if json["relays"].is_array() {
        let mut table =
            Table::new(&["RELAY", "STATE", "UP FOR", "LANES", "IN FLIGHT", "ANNOUNCEMENT"]);
        for relay in items(&json["relays"]) {
            table.row([
                relay_name(relay),
                relay_state(relay),
                up_for(relay),
                lanes(relay),
                in_flight(relay),
                relay_announcement(relay),
            ]);
        }
        text = text + "\n" + &table.render(width);
    }
    for name in items(&json["names"]).filter(|name| !name["last_error"].is_null()) {
        let (name, error) = (plain(&name["relay"]), plain(&name["last_error"]));
        text.push_str(&printable(&format!("{name} cannot be resolved: {error}")));
        text.push('\n');
    }
    text
}

/// What the sidecar of this process has found out, or what a relay was told.
fn health(tunnel: &Json, services: &Json) -> String {
    let service = items(services).find(|service| service["tunnel"] == tunnel["name"]);
    let text = |key: &str| service.map(|service| plain(&service[key])).unwrap_or_default();
    let (health, reason) = (text("health"), text("unavailable"));
    match (health.is_empty(), reason.is_empty()) {
        (true, true) => unavailable(&tunnel["unavailable"]),
        (_, true) => health,
        (true, false) => reason,
        (false, false) => format!("{health}: {reason}"),
    }
}

/// `relay.example.org:9081`, or one of the addresses that it stands for.
fn relay_name(relay: &Json) -> String {
    match relay["address"].as_str() {
        Some(address) => format!("{} at {address}", plain(&relay["relay"])),
        None => plain(&relay["relay"]),
    }
}

/// What counts, and why a newer one does not.
fn session_credential(session: &Json) -> String {
    let credential = plain(&session["credential"]);
    match session["credential_refused"].as_str() {
        Some(reason) => format!("{credential}; a newer one is refused: {reason}"),
        None => credential,
    }
}

fn session_announcement(session: &Json) -> String {
    let waiting = &session["waiting"];
    if waiting.is_object() {
        let reasons: Vec<String> = items(&waiting["reasons"]).map(plain).collect();
        return format!("{} waits: {}", plain(&waiting["announcement"]), reasons.join("; "));
    }
    let forbidden = &session["forbidden"];
    if forbidden.is_object() {
        let reasons: Vec<String> = items(&forbidden["reasons"]).map(plain).collect();
        return format!("{} refused: {}", plain(&forbidden["announcement"]), reasons.join("; "));
    }
    plain(&session["announcement"])
}

fn relay_state(relay: &Json) -> String {
    if relay["connected"] == Json::Bool(true) {
        return match relay["credential_refused"].as_str() {
            Some(reason) => format!("connected; refuses the newest credential: {reason}"),
            None => "connected".to_owned(),
        };
    }
    match relay["last_error"].as_str() {
        Some(error) => format!("not connected: {error}"),
        None => "not connected".to_owned(),
    }
}

fn relay_announcement(relay: &Json) -> String {
    let refused: Vec<String> = items(&relay["announcement_refused"]).map(plain).collect();
    let accepted = plain(&relay["announcement_accepted"]);
    match (refused.is_empty(), accepted.is_empty()) {
        (false, _) => format!("refused: {}", refused.join("; ")),
        (true, false) => format!("accepted {accepted}"),
        (true, true) => String::new(),
    }
}

fn up_for(session: &Json) -> String {
    session["connected_for_seconds"].as_u64().map(age).unwrap_or_default()
}

fn lanes(session: &Json) -> String {
    session["lanes"].as_array().map_or_else(String::new, |lanes| lanes.len().to_string())
}

fn in_flight(session: &Json) -> String {
    let sum: u64 = items(&session["lanes"]).filter_map(|lane| lane["exchanges"].as_u64()).sum();
    sum.to_string()
}

fn plugins(json: &Json) -> Table {
    let mut table = Table::new(&[
        "PLUGIN",
        "PROTOCOL TYPES",
        "VERSION",
        "STATE",
        "IN FLIGHT",
        "PANICS",
        "SHA256",
        "TOOLCHAIN",
    ]);
    for plugin in items(json) {
        let types: Vec<String> = items(&plugin["protocol_types"]).map(plain).collect();
        let quarantined = plugin["quarantined"] == Json::Bool(true);
        let state = plain(&plugin["state"]);
        table.row([
            plain(&plugin["name"]),
            types.join(", "),
            plain(&plugin["version"]),
            if quarantined { "quarantined".to_owned() } else { state },
            plain(&plugin["exchanges"]),
            plain(&plugin["panics"]),
            plain(&plugin["sha256"]).chars().take(12).collect(),
            plain(&plugin["toolchain"]),
        ]);
    }
    table
}

fn items(json: &Json) -> impl Iterator<Item = &Json> {
    json.as_array().into_iter().flatten()
}

/// Returns a value without quotes; nothing for null.
fn plain(json: &Json) -> String {
    match json {
        Json::Null => String::new(),
        Json::String(text) => text.clone(),
        other => other.to_string(),
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    fn relay_routes() -> Json {
        let share = |tunnel: &str, weight: u32, served: bool| json!({ "tunnel": tunnel, "weight": weight, "service": null, "served": served });
        json!([
            {
                "name": "shop", "subdomain": "shop", "path_prefix": "/api", "from": "file",
                "urls": ["http://shop.localhost:9080/api/", "http://shop.example.org:9080/api/"],
                "serving": [share("web", 90, true), share("canary", 10, false)],
                "policies": ["limits", "timeouts"],
            },
            {
                "name": "rpc", "urls": ["http://rpc.localhost:9080/"], "protocol_type": "GRPC",
                "from": "laptop\u{1b}[2J", "serving": [share("rpc", 1, true)], "policies": [],
            },
            { "name": "a", "urls": [], "subdomain": "a", "tunnel": "t",
              "overruled_by": { "from": "file", "route": "own" } },
            { "name": "c", "subdomain": "c", "from": "ci" },
            { "name": "c", "subdomain": "c", "from": "vm", "same_as": { "from": "ci", "route": "c" } },
            { "name": "x", "subdomain": "c", "from": "qa", "same_as": { "from": "ci", "route": "c" } },
            { "name": "d", "subdomain": "d", "serving": [share("d", 1, false)] },
            { "name": "e", "subdomain": "e", "serving": [share("e1", 1, false), share("e2", 0, true)] },
            { "name": "f", "subdomain": "f", "serving": [{
                "tunnel": "f", "weight": 1, "served": false,
                "unavailable": [{ "sidecar": "laptop", "reason": "waiting for the service" }],
            }] },
            { "name": "b", "listener": "lines", "waits_for": ["route b: taken by sidecar x"] },
            { "name": "old", "host": "old.example.org", "serving": [], "policies": ["redirect"] },
        ])
    }

    #[test]
    fn a_shown_configuration_is_accepted_again() {
        for yaml in [
            "version: 1\nrelay: {}\nsidecar: {}\ntunnels: [{ name: a, service: 127.0.0.1:1 }]\n\
             routes: [{ subdomain: a, tunnel: a }]\n",
            "version: 1\nrelay:\n  trusted_proxies: [10.0.0.0/8]\n  max_connection_age: 1h\n  listeners:\n  \
             - { name: a, address: '127.0.0.1:1', sniff: true }\n  \
             - { name: b, address: '127.0.0.1:2', protocol_type: LINE, balance: exact }\n\
             health: { address: '127.0.0.1:3' }\nlog: { format: json, level: 'debug,x=trace' }\n",
            "version: 1\nsidecar: { relays: ['127.0.0.1:9081'], name: s }\ntunnels:\n\
             - { name: a, service: 'unix:/x', wait: 30s, pool: { idle: 3 }, proxy_protocol: v2,\n    \
             protocols: [HTTP], health_check: { type: http } }\n\
             - { name: b, service: '[::1]:3', http_version: 2, health_check: { type: grpc } }\n\
             - { name: c, service: 'h:3', health_check: { type: tcp } }\n\
             routes:\n\
             - { host: '*.x.test', path_prefix: /a, tunnels: [{ name: a, weight: 0 }, { name: b }],\n    \
             timeouts: { total: 1m30s }, retries: {}, compression: {}, rewrite: { path_prefix: / },\n    \
             request_headers: { set: { a: b }, add: { c: [d, e] }, remove: [f] },\n    \
             limits: { rate: { count: 1 }, body: 1MiB }, addresses: { allow: ['::/0'] },\n    \
             options: { HTTP: { a: null } } }\n\
             - { wildcard: '*', redirect: { status: 308, host: new.test } }\n",
        ] {
            let read = |text: &str| {
                let source = crate::config::Source::from_text("c.yaml".as_ref(), text);
                crate::config::parse(&source, &|_| None)
                    .unwrap_or_else(|errors| panic!("{}\n{text}", errors.report()))
            };
            let config = read(yaml);
            let shown = super::config(&config.to_masked_json());
            assert_eq!(read(&shown).to_masked_json(), config.to_masked_json(), "{shown}");
        }
    }

    #[test]
    fn routes_of_a_relay() {
        insta::assert_snapshot!(render(Page::Routes, &relay_routes(), None), @r#"
        ROUTE  MATCH                                 TUNNELS            POLICIES         FROM        STATE
        shop   http://shop.localhost:9080/api/ (+1)  web 90, canary 10  limits timeouts  file        in force, but not served: canary
        rpc    http://rpc.localhost:9080/ GRPC       rpc                -                laptop?[2J  in force
        a      a                                     t                  -                -           overruled by own (from file)
        c      c                                     -                  -                ci, vm, qa  in force
        d      d                                     d                  -                -           not served: d
        e      e                                     e1 1, e2 0         -                -           served by e2 (weight 0); not served: e1
        f      f                                     f                  -                -           not served: f (unavailable at laptop: waiting for the service)
        b      lines                                 -                  -                -           waiting: route b: taken by sidecar x
        old    old.example.org                       -                  redirect         -           in force
        "#);
    }

    #[test]
    fn routes_of_a_sidecar() {
        let route = |name: &str, state: &str, reasons: &[&str]| {
            json!({
                "name": name, "subdomain": name, "tunnel": "web", "from": "file", "urls": [],
                "announced": [{
                    "relay": "r:9081", "state": state, "reasons": reasons, "notes": [],
                }],
            })
        };
        let json = json!([
            route("good", "accepted", &[]),
            route("bad", "refused", &["route bad: taken by sidecar x for tunnel y"]),
            route("other", "refused", &[]),
            route("waits", "announced", &[]),
            route("gone", "not connected", &[]),
        ]);
        insta::assert_snapshot!(render(Page::Routes, &json, None), @r#"
        ROUTE  MATCH  TUNNELS  POLICIES  FROM  STATE
        good   good   web      -         file  in force
        bad    bad    web      -         file  r:9081: refused: route bad: taken by sidecar x for tunnel y
        other  other  web      -         file  r:9081: refused with others of the file
        waits  waits  web      -         file  r:9081: announced
        gone   gone   web      -         file  r:9081: not connected
        "#);
    }

    #[test]
    fn tunnels_of_relay_and_sidecar() {
        let json = json!({
            "tunnels": [
                {
                    "name": "web", "service": "127.0.0.1:3000", "sidecars": ["laptop", "ci"],
                    "sessions": 2, "lanes": 4, "in_flight": 7,
                    "serving": [{ "sidecar": "laptop" }, { "sidecar": "ci", "left_aside": true }],
                },
                { "name": "rpc", "service": "unix:/run/rpc.sock" },
                { "name": "shop", "unavailable": [
                    { "sidecar": "shop", "reason": "waiting for the service" },
                    { "sidecar": "ci", "reason": "HTTP 500" },
                ] },
            ],
            "services": [
                { "tunnel": "web", "health": "unhealthy", "unavailable": "connection refused" },
                { "tunnel": "rpc", "health": "healthy", "unavailable": null },
            ],
            "names": [{ "relay": "t:9081", "last_error": "no such name" }],
            "sessions": [{
                "sidecar": "laptop", "principal": "shop",
                "credential": "token sha256:0e5751c0…", "expires": null, "peer": "192.0.2.1:4711", "connected_for_seconds": 3700,
                "tunnels": ["web"], "announcement": 3,
                "lanes": [{ "exchanges": 3 }, { "exchanges": 4 }],
            }, {
                "sidecar": "ci", "principal": "cluster/shop/web", "credential": "jwt k8s ci",
                "expires": "Sun, 06 Nov 1994 08:49:37 GMT", "credential_refused": "another audience",
                "peer": "192.0.2.2:4711", "lanes": [],
            }],
            "relays": [
                {
                    "relay": "r:9081", "connected": true, "connected_for_seconds": 12,
                    "lanes": [], "announcement_accepted": 2, "announcement_refused": [],
                },
                {
                    "relay": "q:9081", "connected": true, "connected_for_seconds": 12,
                    "lanes": [], "announcement_accepted": 2, "announcement_refused": [],
                    "credential_refused": "not known",
                },
                {
                    "relay": "s:9081", "address": "192.0.2.7:9081", "connected": false, "lanes": [],
                    "announcement_refused": ["route a: taken"], "last_error": "no answer",
                },
            ],
        });
        insta::assert_snapshot!(render(Page::Tunnels, &json, None), @r#"
        TUNNEL  SERVICE             HEALTH                                                         SIDECARS                 SESSIONS  LANES  IN FLIGHT
        web     127.0.0.1:3000      unhealthy: connection refused                                  laptop, ci (left aside)  2         4      7
        rpc     unix:/run/rpc.sock  healthy                                                        -                        -         -      -
        shop    -                   unavailable at shop: waiting for the service; at ci: HTTP 500  -                        -         -      -

        SIDECAR  PRINCIPAL         CREDENTIAL                                            EXPIRES                        PEER            UP FOR  LANES  IN FLIGHT  TUNNELS  ANNOUNCEMENT
        laptop   shop              token sha256:0e5751c0…                                -                              192.0.2.1:4711  1h1m    2      7          web      3
        ci       cluster/shop/web  jwt k8s ci; a newer one is refused: another audience  Sun, 06 Nov 1994 08:49:37 GMT  192.0.2.2:4711  -       0      0          -        -

        RELAY                     STATE                                                UP FOR  LANES  IN FLIGHT  ANNOUNCEMENT
        r:9081                    connected                                            12s     0      0          accepted 2
        q:9081                    connected; refuses the newest credential: not known  12s     0      0          accepted 2
        s:9081 at 192.0.2.7:9081  not connected: no answer                             -       0      0          refused: route a: taken
        t:9081 cannot be resolved: no such name
        "#);
    }

    #[test]
    fn plugins_with_their_generations() {
        let json = json!([
            {
                "name": "http", "protocol_types": ["HTTP"], "version": "0.1.0", "state": "current",
                "exchanges": 3, "panics": 0, "quarantined": false, "toolchain": "rustc 1.89",
                "sha256": "0123456789abcdef0123",
            },
            {
                "name": "line", "protocol_types": null, "version": "2", "state": "draining",
                "exchanges": 1, "panics": 9, "quarantined": true, "toolchain": "", "sha256": "ff",
            },
        ]);
        insta::assert_snapshot!(render(Page::Plugins, &json, None), @r#"
        PLUGIN  PROTOCOL TYPES  VERSION  STATE        IN FLIGHT  PANICS  SHA256        TOOLCHAIN
        http    HTTP            0.1.0    current      3          0       0123456789ab  rustc 1.89
        line    -               2        quarantined  1          9       ff            -
        "#);
    }

    #[test]
    fn configuration_is_yaml_after_what_is_to_be_known_of_it() {
        let json = json!({
            "version": 1,
            "relay": { "base_domains": ["localhost"], "token": "***" },
            "last_reload_error": "c.yaml:1:1: bad\nc.yaml:2:1: worse",
            "pending_restart": ["relay.threads"],
        });
        insta::assert_snapshot!(render(Page::Config, &json, None), @r#"
        # not in force, the last edit: c.yaml:1:1: bad
        # not in force, the last edit: c.yaml:2:1: worse
        # only after a restart: relay.threads
        # secrets stand as ***
        version: 1
        relay:
          base_domains:
          - localhost
          token: "***"
        "#);
    }

    #[test]
    fn a_page_of_another_version_is_shown_as_far_as_it_goes() {
        for json in [json!(null), json!([]), json!({}), json!([1, "x", {}]), json!({"tunnels": 1})]
        {
            for page in [Page::Config, Page::Routes, Page::Tunnels, Page::Plugins] {
                render(page, &json, Some(80));
            }
        }
    }
}

//! A configuration's tunnels and routes as a sidecar announces them, and back.
//!
//! Pure. What a relay makes of a document is `relay::document`'s business.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;

use sidelane_tunnel::proto;

use crate::config::policy::Policies;
use crate::config::{Block, Config, HostMatch, Match, MatchSpec, Route, Share, value};
use crate::error::is_obeyed;

/// Bytes of one route's policies as JSON: as many users, ranges of addresses and changes of fields as a
/// file may name, at their usual lengths. Bounds what is parsed.
const POLICIES_BYTES_MAX: usize = 512 * 1024;

/// Tunnels that one route is split between.
pub const SHARES_MAX: usize = 16;

/// Bytes of the reason why a tunnel is unavailable: clients are told it, and logs.
const UNAVAILABLE_BYTES_MAX: usize = 256;

/// Largest weight of a sidecar; a larger one counts as this.
pub const WEIGHT_MAX: u32 = crate::config::SIDECAR_WEIGHT_MAX;

/// Protocol types of a tunnel; `None`: all that the sidecar carries.
pub type Protocols = Option<Arc<[Arc<str>]>>;

/// Returns the document of a configuration.
#[must_use]
pub fn encode(version: u64, config: &Config) -> proto::Announce {
    let tunnels = config.tunnels.iter().map(|tunnel| proto::AnnouncedTunnel {
        name: tunnel.name.to_string(),
        protocols: tunnel.protocols.iter().flatten().map(ToString::to_string).collect(),
        unavailable: String::new(),
        weight: tunnel.weight,
    });
    let routes = config.routes.iter().map(|route| encode_route(route));
    proto::Announce { version, tunnels: tunnels.collect(), routes: routes.collect() }
}

fn encode_route(route: &Route) -> proto::AnnouncedRoute {
    let text = |text: &Option<Arc<str>>| text.as_deref().unwrap_or_default().to_owned();
    let (tunnel, tunnels) = match route.tunnels.as_slice() {
        [Share { tunnel, weight: 1 }] => (tunnel.to_string(), Vec::new()),
        shares => (String::new(), shares.iter().map(encode_share).collect()),
    };
    let policies = route.policies.as_ref().map(|policies| policies.to_json().to_string());
    let mut announced = proto::AnnouncedRoute {
        name: route.name.to_string(),
        tunnel,
        tunnels,
        policies: policies.unwrap_or_default(),
        path_prefix: route.matches.path_prefix.to_string(),
        listener: text(&route.matches.listener),
        protocol_type: text(&route.matches.protocol_type),
        ..proto::AnnouncedRoute::default()
    };
    match &route.matches.host {
        HostMatch::Any => {}
        HostMatch::Exact(host) => announced.host = host.to_string(),
        HostMatch::Subdomain(subdomain) => announced.subdomain = subdomain.to_string(),
        HostMatch::Wildcard(suffix) if suffix.is_empty() => "*".clone_into(&mut announced.wildcard),
        HostMatch::Wildcard(suffix) => announced.wildcard = format!("*.{suffix}"),
        HostMatch::HostWildcard(suffix) => announced.host = format!("*.{suffix}"),
    }
    let options = route.options.iter().map(|(protocol_type, block)| proto::RouteOptions {
        protocol_type: protocol_type.to_string(),
        json: block.text.to_string(),
    });
    announced.options = options.collect();
    announced
}

fn encode_share(share: &Share) -> proto::TunnelShare {
    proto::TunnelShare { tunnel: share.tunnel.to_string(), weight: share.weight }
}

/// A tunnel that a sidecar announces.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Tunnel {
    /// Its name.
    pub name: Arc<str>,
    /// What it carries.
    pub protocols: Protocols,
    /// Why its service cannot be served now; `None`: it can.
    pub unavailable: Option<Arc<str>>,
    /// Its share beside others that serve the tunnel, 1 to [`WEIGHT_MAX`].
    pub weight: u32,
}

/// Reads an announced tunnel.
///
/// # Errors
/// What is wrong with its name or a protocol type, on one line.
pub fn tunnel(announced: &proto::AnnouncedTunnel) -> Result<Tunnel, String> {
    let fault = |message: String| one_line(&format!("tunnel {}: {message}", announced.name));
    let name = value::name(&announced.name).map_err(fault)?;
    let protocols: Vec<Arc<str>> = announced
        .protocols
        .iter()
        .map(|name| value::protocol_type(name).map_err(fault))
        .collect::<Result<_, _>>()?;
    let mut unavailable = one_line(&announced.unavailable);
    while unavailable.len() > UNAVAILABLE_BYTES_MAX {
        unavailable.pop();
    }
    Ok(Tunnel {
        name,
        protocols: (!protocols.is_empty()).then(|| protocols.into()),
        unavailable: (!unavailable.is_empty()).then(|| unavailable.into()),
        weight: announced.weight.clamp(1, WEIGHT_MAX),
    })
}

/// Returns a text that others wrote without what would end a line of a log or command a terminal.
fn one_line(text: &str) -> String {
    text.chars().map(|c| if is_obeyed(c) { '?' } else { c }).collect()
}

/// Reads an announced route.
///
/// # Errors
/// One line each: which route, which part, what is wrong with it.
pub fn route(announced: &proto::AnnouncedRoute) -> Result<Route, Vec<String>> {
    fn given(text: &str) -> Option<&str> {
        (!text.is_empty()).then_some(text)
    }
    let spec = MatchSpec {
        subdomain: given(&announced.subdomain),
        host: given(&announced.host),
        wildcard: given(&announced.wildcard),
        path_prefix: given(&announced.path_prefix),
        listener: given(&announced.listener),
        protocol_type: given(&announced.protocol_type),
    };
    let fault = |part: &str, message: &str| {
        one_line(&format!("route {}: {part} {message}", announced.name))
    };
    let matches = Match::parse(&spec).map_err(|(part, message)| vec![fault(part, &message)])?;
    let mut options = BTreeMap::new();
    for block in &announced.options {
        // Nothing behind the key is a block of nothing.
        let value = match block.json.as_str() {
            "" => serde_json::Value::Null,
            text => serde_json::from_str(text)
                .map_err(|error| vec![fault("options", &format!("are not JSON: {error}"))])?,
        };
        let protocol_type = value::protocol_type(&block.protocol_type)
            .map_err(|message| vec![fault("options", &message)])?;
        options.insert(protocol_type, Block::new(value));
    }
    // What a file gives without a name has one that is no name by a file's rules, `*.apps` say.
    let default = matches.to_string();
    let name = match given(&announced.name) {
        Some(name) if *name != default => {
            value::name(name).map_err(|message| vec![fault("name", &message)])?
        }
        _ => default.into(),
    };
    let policies = match given(&announced.policies) {
        None => None,
        Some(text) if text.len() > POLICIES_BYTES_MAX => {
            let message = format!("are longer than {POLICIES_BYTES_MAX} bytes");
            return Err(vec![fault("policies", &message)]);
        }
        Some(text) => {
            let policies = Policies::parse_json(text).map_err(|faults| -> Vec<String> {
                faults.iter().map(|message| fault("policies", message)).collect()
            })?;
            (!policies.is_default()).then(|| Arc::new(policies))
        }
    };
    let tunnels = shares(announced, policies.as_deref())
        .map_err(|(part, message)| vec![fault(part, &message)])?;
    Ok(Route { name, tunnels, matches, options, policies })
}

/// Reads where a route's exchanges go: one tunnel, some by weight, or none where they are redirected.
fn shares(
    announced: &proto::AnnouncedRoute,
    policies: Option<&Policies>,
) -> Result<Vec<Share>, (&'static str, String)> {
    let is_redirect = policies.is_some_and(|policies| policies.redirect.is_some());
    let of = |tunnel: &str, weight| Share { tunnel: tunnel.into(), weight };
    let shares: Vec<Share> = match announced.tunnel.as_str() {
        "" => announced.tunnels.iter().map(|share| of(&share.tunnel, share.weight)).collect(),
        tunnel if announced.tunnels.is_empty() => vec![of(tunnel, 1)],
        _ => return Err(("tunnels", "are given beside a tunnel".to_owned())),
    };
    if shares.len() > SHARES_MAX {
        let message = format!("are {}, at most {SHARES_MAX} are accepted", shares.len());
        return Err(("tunnels", message));
    }
    let names: BTreeSet<&str> = shares.iter().map(|share| &*share.tunnel).collect();
    if names.len() < shares.len() {
        return Err(("tunnels", "name one twice".to_owned()));
    }
    match (shares.is_empty(), is_redirect) {
        (true, false) => Err(("tunnel", "is missing, and there is no redirect".to_owned())),
        (false, true) => Err(("tunnel", "is given beside a redirect".to_owned())),
        _ => Ok(shares),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_kind_of_match_comes_back_as_it_was() {
        let specs = [
            MatchSpec { subdomain: Some("demo"), ..MatchSpec::default() },
            MatchSpec { host: Some("demo.example.org"), ..MatchSpec::default() },
            MatchSpec { host: Some("*.example.org"), ..MatchSpec::default() },
            MatchSpec { wildcard: Some("*"), path_prefix: Some("/api"), ..MatchSpec::default() },
            MatchSpec {
                wildcard: Some("*.apps"),
                protocol_type: Some("HTTP"),
                ..MatchSpec::default()
            },
            MatchSpec { listener: Some("lines"), ..MatchSpec::default() },
        ];
        for spec in specs {
            let matches = Match::parse(&spec).expect("a valid match");
            let options = [("HTTP".into(), Block::new(serde_json::json!({ "a": 1 })))].into();
            let original = Route {
                name: "r".into(),
                tunnels: vec![Share { tunnel: "t".into(), weight: 1 }],
                matches,
                options,
                policies: None,
            };
            assert_eq!(route(&encode_route(&original)), Ok(original));
        }
    }

    #[test]
    fn options_come_back_as_they_were_but_for_what_may_be_secret() {
        let source = crate::config::Source::from_text(
            "c.yaml".as_ref(),
            "version: 1\nsidecar: { relays: ['127.0.0.1:1'] }\ntunnels: [{ name: t, service: 'h:1' }]\n\
             routes: [{ subdomain: a, tunnel: t, options: { A: , B: {}, \
             C: { max: 4MiB, wait: 1m30s, n: 3, pass: hunter2, list: [x, true] } } }]\n",
        );
        let config = crate::config::parse(&source, &|_| None).expect("a valid file");
        let original = &config.routes[0];
        let read = route(&encode_route(original)).expect("what a file may say is taken");
        assert!(read.is_same_as(original), "{read:?}");
        let masked = serde_json::json!(
            { "max": "4MiB", "wait": "1m30s", "n": 3, "pass": "***", "list": ["***", true] }
        );
        assert_eq!(read.options["C"].masked, masked);
        assert_eq!(read.options["C"].text, original.options["C"].text);
        let mut other = read.clone();
        other.options.insert("A".into(), Block::new(serde_json::json!({})));
        assert!(!read.is_same_as(&other));
    }

    #[test]
    fn a_bad_route_says_which_part() {
        let announced = proto::AnnouncedRoute {
            name: "r".to_owned(),
            subdomain: "not a label".to_owned(),
            ..proto::AnnouncedRoute::default()
        };
        let reasons = route(&announced).expect_err("refused");
        assert!(reasons[0].starts_with("route r: subdomain "), "{reasons:?}");
    }

    #[test]
    fn names_hold_to_the_rules_of_a_file() {
        let forged = "x\n2026-01-01T00:00:00Z ERROR forged\x1b[2J";
        let named =
            |name: &str| proto::AnnouncedRoute { name: name.to_owned(), ..announced("web", &[]) };
        let reasons = route(&named(forged)).expect_err("refused");
        assert!(reasons[0].contains("is not a name"), "{reasons:?}");
        assert!(!reasons[0].contains(char::is_control), "{reasons:?}");
        // What a file would have called it.
        let wildcard = proto::AnnouncedRoute {
            name: "*.apps".to_owned(),
            subdomain: String::new(),
            wildcard: "*.apps".to_owned(),
            ..announced("web", &[])
        };
        assert_eq!(&*route(&wildcard).expect("a valid route").name, "*.apps");
        let mut options = announced("web", &[]);
        options
            .options
            .push(proto::RouteOptions { protocol_type: forged.into(), json: "{}".into() });
        let reasons = route(&options).expect_err("refused");
        assert!(reasons[0].contains("is not a protocol type"), "{reasons:?}");

        let tunnel_of = |name: &str, protocol: &str, unavailable: String| {
            tunnel(&proto::AnnouncedTunnel {
                name: name.to_owned(),
                protocols: vec![protocol.to_owned()],
                unavailable,
                weight: 0,
            })
        };
        for (name, protocol) in [(forged, "HTTP"), ("", "HTTP"), ("web", forged), ("web", "")] {
            let reason = tunnel_of(name, protocol, String::new()).expect_err("refused");
            assert!(!reason.contains(char::is_control), "{reason}");
        }
        let tunnel = tunnel_of("web", "HTTP", format!("{forged}{}", "é".repeat(1000)));
        let reason = tunnel.expect("a valid tunnel").unavailable.expect("a reason");
        assert!(reason.len() <= UNAVAILABLE_BYTES_MAX && !reason.contains(char::is_control));
    }

    fn announced(tunnel: &str, tunnels: &[(&str, u32)]) -> proto::AnnouncedRoute {
        proto::AnnouncedRoute {
            name: "r".to_owned(),
            subdomain: "r".to_owned(),
            tunnel: tunnel.to_owned(),
            tunnels: tunnels
                .iter()
                .map(|(tunnel, weight)| proto::TunnelShare {
                    tunnel: (*tunnel).to_owned(),
                    weight: *weight,
                })
                .collect(),
            ..proto::AnnouncedRoute::default()
        }
    }

    #[test]
    fn a_split_comes_back_as_it_was() {
        for shares in
            [vec![("web", 90), ("canary", 10)], vec![("web", 0), ("b", 0)], vec![("a", 7)]]
        {
            let original = route(&announced("", &shares)).expect("a valid route");
            assert_eq!(original.tunnels.len(), shares.len());
            assert_eq!(route(&encode_route(&original)), Ok(original));
        }
    }

    #[test]
    fn where_a_route_goes_is_checked() {
        let many: Vec<String> = (0..=SHARES_MAX).map(|number| format!("t{number}")).collect();
        let many: Vec<(&str, u32)> = many.iter().map(|name| (&**name, 1)).collect();
        type Shares<'a> = &'a [(&'a str, u32)];
        let table: &[(&str, Shares<'_>, &str)] = &[
            ("", &[], "tunnel is missing"),
            ("web", &[("web", 1)], "tunnels are given beside a tunnel"),
            ("", &[("web", 1), ("web", 2)], "tunnels name one twice"),
            ("", &many, "tunnels are 17, at most 16 are accepted"),
        ];
        assert!(!table.is_empty());
        for (tunnel, tunnels, expected) in table {
            let reasons = route(&announced(tunnel, tunnels)).expect_err("refused");
            assert!(reasons[0].contains(expected), "{reasons:?}");
        }
        let long = proto::AnnouncedRoute {
            policies: " ".repeat(POLICIES_BYTES_MAX + 1),
            ..announced("web", &[])
        };
        let reasons = route(&long).expect_err("refused");
        assert!(reasons[0].contains("policies are longer than 524288 bytes"), "{reasons:?}");
    }
}

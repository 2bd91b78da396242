//! A configuration's tunnels and routes as a sidecar announces them, and back.
//!
//! Pure. What a relay makes of a document is `relay::document`'s business.

use std::collections::BTreeMap;
use std::sync::Arc;

use sidelane_tunnel::proto;

use crate::config::{Block, Config, HostMatch, Match, MatchSpec, Route, Share};

/// Protocol types of a tunnel; `None`: all that the sidecar carries.
pub type Protocols = Option<Arc<[Arc<str>]>>;

/// Returns the document of a configuration.
#[must_use]
pub fn encode(version: u64, config: &Config) -> proto::Announce {
    let tunnels = config.tunnels.iter().map(|tunnel| proto::AnnouncedTunnel {
        name: tunnel.name.to_string(),
        protocols: tunnel.protocols.iter().flatten().map(ToString::to_string).collect(),
        unavailable: String::new(),
    });
    let routes = config.routes.iter().map(|route| encode_route(route));
    proto::Announce { version, tunnels: tunnels.collect(), routes: routes.collect() }
}

fn encode_route(route: &Route) -> proto::AnnouncedRoute {
    let text = |text: &Option<Arc<str>>| text.as_deref().unwrap_or_default().to_owned();
    let mut announced = proto::AnnouncedRoute {
        name: route.name.to_string(),
        tunnel: route.tunnels.first().map(|share| share.tunnel.to_string()).unwrap_or_default(),
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

/// Reads an announced tunnel: its name and what it carries.
#[must_use]
pub fn tunnel(announced: &proto::AnnouncedTunnel) -> (Arc<str>, Protocols) {
    let protocols = (!announced.protocols.is_empty())
        .then(|| announced.protocols.iter().map(|name| name.as_str().into()).collect());
    (announced.name.as_str().into(), protocols)
}

/// Reads an announced route.
///
/// # Errors
/// One line: which route, which part, what is wrong with it.
pub fn route(announced: &proto::AnnouncedRoute) -> Result<Route, String> {
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
    let fault = |part: &str, message: &str| format!("route {:?}: {part} {message}", announced.name);
    let matches = Match::parse(&spec).map_err(|(part, message)| fault(part, &message))?;
    let mut options = BTreeMap::new();
    for block in &announced.options {
        let value = serde_json::from_str(&block.json)
            .map_err(|error| fault("options", &format!("are not JSON: {error}")))?;
        options.insert(block.protocol_type.as_str().into(), Block::new(value));
    }
    let name = match given(&announced.name) {
        Some(name) => name.into(),
        None => matches.to_string().into(),
    };
    let tunnels = vec![Share { tunnel: announced.tunnel.as_str().into(), weight: 1 }];
    Ok(Route { name, tunnels, matches, options, policies: None })
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
    fn a_bad_route_says_which_part() {
        let announced = proto::AnnouncedRoute {
            name: "r".to_owned(),
            subdomain: "not a label".to_owned(),
            ..proto::AnnouncedRoute::default()
        };
        let reason = route(&announced).expect_err("refused");
        assert!(reason.starts_with("route \"r\": subdomain "), "{reason}");
    }
}

//! What a sidecar announces: its tunnels and routes, taken whole or refused whole.

use std::collections::HashMap;
use std::sync::Arc;

use sidelane_tunnel::proto;

use crate::announcement::{self, Protocols};
use crate::config::{Match, Route};
use crate::plugin::ConfigFault;
use crate::tunnel::session::Session;

/// Routes of one document. Bounds what a sidecar can make the relay hold.
const ROUTES_MAX: usize = 10_000;

/// Tunnels of one document.
const TUNNELS_MAX: usize = 1_000;

/// Reasons of a refusal that are told; the first ones suffice to mend the file.
const REASONS_MAX: usize = 32;

/// Bytes of one reason: it quotes what a sidecar sent, which may be as long as a message.
const REASON_BYTES_MAX: usize = 512;

/// A document in force, or one that waits for another to go.
pub(super) struct Document {
    pub(super) session: Arc<Session>,
    pub(super) version: u64,
    pub(super) tunnels: Vec<(Arc<str>, Protocols)>,
    pub(super) routes: Vec<Arc<Route>>,
}

impl Document {
    /// Reads an announcement.
    ///
    /// # Errors
    /// Everything that is wrong with it, one line each.
    pub(super) fn parse(
        session: &Arc<Session>,
        announce: &proto::Announce,
    ) -> Result<Self, Vec<String>> {
        let counts = [
            ("tunnels", announce.tunnels.len(), TUNNELS_MAX),
            ("routes", announce.routes.len(), ROUTES_MAX),
        ];
        for (what, count, max) in counts {
            if count > max {
                return Err(vec![format!("{count} {what}, at most {max} are accepted")]);
            }
        }
        let tunnels: Vec<(Arc<str>, Protocols)> =
            announce.tunnels.iter().map(announcement::tunnel).collect();
        let mut reasons = Vec::new();
        let mut routes = Vec::with_capacity(announce.routes.len());
        for announced in &announce.routes {
            match announcement::route(announced) {
                Ok(route) if announces(&tunnels, &route) => {
                    routes.push(Arc::new(route));
                }
                Ok(route) => reasons.push(format!(
                    "route {}: tunnel {:?} is not announced",
                    route.name,
                    route.tunnels_text()
                )),
                Err(reason) => reasons.push(reason),
            }
        }
        let mut by_match: HashMap<&Match, &Arc<str>> = HashMap::new();
        for route in &routes {
            if let Some(other) = by_match.insert(&route.matches, &route.name) {
                reasons.push(format!("routes {other} and {} take the same", route.name));
            }
        }
        if reasons.is_empty() {
            Ok(Self { session: Arc::clone(session), version: announce.version, tunnels, routes })
        } else {
            reasons.truncate(REASONS_MAX);
            Err(reasons.into_iter().map(shorten).collect())
        }
    }

    /// Returns what `others` hold already and for another tunnel, one line each. Replicas that
    /// announce the same for the same tunnel share it.
    pub(super) fn conflicts<'a>(&self, others: impl Iterator<Item = &'a Self>) -> Vec<String> {
        let ours: HashMap<&Match, &Arc<Route>> =
            self.routes.iter().map(|route| (&route.matches, route)).collect();
        let theirs = others.flat_map(|other| other.routes.iter().map(move |route| (other, route)));
        theirs
            .filter_map(|(other, theirs)| {
                let ours =
                    ours.get(&theirs.matches).filter(|ours| ours.tunnels != theirs.tunnels)?;
                Some(format!(
                    "route {}: taken by sidecar {} for tunnel {}",
                    ours.name,
                    other.session.name,
                    theirs.tunnels_text()
                ))
            })
            .take(REASONS_MAX)
            .map(shorten)
            .collect()
    }

    pub(super) fn tunnel_names(&self) -> Vec<&str> {
        self.tunnels.iter().map(|(name, _)| &**name).collect()
    }
}

/// Returns what is wrong with the options of `routes` in the eyes of `asked`, which is told a protocol
/// type and its options, one line each.
pub(super) fn refused_options(
    routes: &[Arc<Route>],
    asked: impl Fn(&str, &str) -> Result<(), ConfigFault>,
) -> Vec<String> {
    let blocks = routes.iter().flat_map(|route| {
        route.options.iter().map(move |(protocol_type, block)| (route, protocol_type, block))
    });
    blocks
        .filter_map(|(route, protocol_type, block)| {
            let ConfigFault { message, path } = asked(protocol_type, &block.text).err()?;
            let dot = if path.is_empty() { "" } else { "." };
            Some(format!("route {}: options.{protocol_type}{dot}{path}: {message}", route.name))
        })
        .take(REASONS_MAX)
        .map(shorten)
        .collect()
}

/// Returns whether the route goes to tunnels of the same document only.
fn announces(tunnels: &[(Arc<str>, Protocols)], route: &Route) -> bool {
    route.tunnels.iter().all(|share| tunnels.iter().any(|(name, _)| *name == share.tunnel))
}

fn shorten(mut reason: String) -> String {
    if reason.len() > REASON_BYTES_MAX {
        let cut = (0..=REASON_BYTES_MAX).rev().find(|at| reason.is_char_boundary(*at));
        reason.truncate(cut.unwrap_or_default());
        reason.push('…');
    }
    reason
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn refused_options_name_route_type_and_place() {
        let route = |name: &str, json: &str| {
            let announced = proto::AnnouncedRoute {
                name: name.to_owned(),
                subdomain: name.to_owned(),
                options: vec![proto::RouteOptions {
                    protocol_type: "WEBSOCKET".to_owned(),
                    json: json.to_owned(),
                }],
                ..proto::AnnouncedRoute::default()
            };
            Arc::new(announcement::route(&announced).expect("a valid route"))
        };
        let routes = [route("good", "{}"), route("bad", r#"{"max":"x"}"#)];
        let reasons = refused_options(&routes, |protocol_type, options| match options {
            "{}" => Ok(()),
            _ => Err(ConfigFault {
                message: format!("{protocol_type} wants a size"),
                path: "max".to_owned(),
            }),
        });
        assert_eq!(reasons, ["route bad: options.WEBSOCKET.max: WEBSOCKET wants a size"]);
    }
}

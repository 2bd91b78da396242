//! What a sidecar announces: its tunnels and routes, taken whole or refused whole.

use std::collections::{HashMap, HashSet};
use std::sync::Arc;

use sidelane_tunnel::proto;

use super::sources::Earlier;
use crate::announcement::{self, Tunnel};
use crate::config::policy::{HeaderChanges, Policies};
use crate::config::{Match, Route};
use crate::credentials::{Grant, why_not_route, why_not_tunnel};
use crate::plugin::ConfigFault;
use crate::tunnel::session::Session;

/// Routes of one document. Bounds what a sidecar can make the relay hold.
const ROUTES_MAX: usize = 10_000;

/// Tunnels of one document.
const TUNNELS_MAX: usize = 1_000;

/// Users of all routes of one document together; each is about a hundred bytes, with its hash.
const USERS_MAX: usize = 10_000;

/// Changes of fields of all routes of one document together, and ranges of addresses likewise.
const CHANGES_MAX: usize = 20_000;

/// Routes of one document that remember clients (`rate_per_client`, `basic_auth`): each may hold a
/// table of [`CLIENTS_MAX`](super::policy) of them, half a megabyte.
const CLIENT_TABLES_MAX: usize = 256;

/// Why the relay's file comes before what is announced; a note to the sidecar.
const OWN_WINS: &str = "the relay's own routes win";

/// Reasons of a refusal that are told; the first ones suffice to mend the file.
pub(super) const REASONS_MAX: usize = 32;

/// Bytes of one reason: it quotes what a sidecar sent, which may be as long as a message.
const REASON_BYTES_MAX: usize = 512;

/// A document in force, or one that waits for another to go.
pub(super) struct Document {
    pub(super) session: Arc<Session>,
    /// What it is in force by, or was looked at by last.
    pub(super) grant: Arc<Grant>,
    pub(super) version: u64,
    pub(super) tunnels: Vec<Tunnel>,
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
        let mut reasons = Vec::new();
        let mut tunnels = Vec::with_capacity(announce.tunnels.len());
        let mut names = HashSet::new();
        for announced in &announce.tunnels {
            match announcement::tunnel(announced) {
                Ok(tunnel) if names.insert(Arc::clone(&tunnel.name)) => tunnels.push(tunnel),
                Ok(tunnel) => reasons.push(format!("tunnel {} is announced twice", tunnel.name)),
                Err(fault) => reasons.push(fault),
            }
        }
        let mut routes = Vec::with_capacity(announce.routes.len());
        for announced in &announce.routes {
            match announcement::route(announced) {
                Ok(route) if announces(&names, &route) => {
                    routes.push(Arc::new(route));
                }
                Ok(route) => reasons.push(format!(
                    "route {}: tunnel {:?} is not announced",
                    route.name,
                    route.tunnels_text()
                )),
                Err(faults) => reasons.extend(faults),
            }
        }
        let mut by_match: HashMap<&Match, &Arc<str>> = HashMap::new();
        for route in &routes {
            if let Some(other) = by_match.insert(&route.matches, &route.name) {
                reasons.push(format!("routes {other} and {} take the same", route.name));
            }
        }
        reasons.extend(above_bounds(&routes));
        if reasons.is_empty() {
            let (session, grant) = (Arc::clone(session), session.grant());
            Ok(Self { session, grant, version: announce.version, tunnels, routes })
        } else {
            Err(shortened(reasons))
        }
    }

    /// Returns what it claims that its principal may not, one line each.
    pub(super) fn beyond_claims(&self, base_domains: &[Arc<str>]) -> Vec<String> {
        let tunnels =
            self.tunnels.iter().filter_map(|tunnel| why_not_tunnel(&self.grant, &tunnel.name));
        let routes =
            self.routes.iter().filter_map(|route| why_not_route(&self.grant, route, base_domains));
        tunnels.chain(routes).take(REASONS_MAX).map(shorten).collect()
    }

    /// Returns what is worth knowing of the document where it is in force, one line each: routes that
    /// the relay's `own` win over, and those that `others`, of older sessions, announce with other
    /// policies, options or weights, which are in force as long as they last.
    pub(super) fn notes<'a>(
        &self,
        own: &Earlier<'_>,
        others: impl Iterator<Item = &'a Self>,
    ) -> Vec<String> {
        let ours = self.by_match();
        let shared = others
            .flat_map(|other| other.routes.iter().map(move |route| (other, route)))
            .filter_map(|(other, theirs)| {
                let ours = ours.get(&theirs.matches)?;
                let is_same = ours.policies == theirs.policies
                    && ours.options == theirs.options
                    && ours.tunnels == theirs.tunnels;
                (!is_same).then(|| {
                    format!(
                        "route {}: sidecar {} announced it with other settings; those of the older \
                         session are in force until it ends",
                        ours.name, other.session.name
                    )
                })
            });
        overruled(&self.routes, own).chain(shared).take(REASONS_MAX).map(shorten).collect()
    }

    /// Its routes, to be given to a document that follows.
    pub(super) fn routes_by_match(&self) -> HashMap<Match, Arc<Route>> {
        self.routes.iter().map(|route| (route.matches.clone(), Arc::clone(route))).collect()
    }

    /// Keeps the routes of a document before that are the same: the same objects, whose policies go on
    /// with what they remember.
    pub(super) fn keep_routes(&mut self, known: &HashMap<Match, Arc<Route>>) {
        for route in &mut self.routes {
            if let Some(same) = known.get(&route.matches).filter(|known| ***known == **route) {
                *route = Arc::clone(same);
            }
        }
    }

    fn by_match(&self) -> HashMap<&Match, &Arc<Route>> {
        self.routes.iter().map(|route| (&route.matches, route)).collect()
    }

    /// Tunnels that cannot be served now, and why.
    pub(super) fn unavailable(&self) -> HashMap<&str, &str> {
        self.tunnels
            .iter()
            .filter_map(|tunnel| Some((&*tunnel.name, tunnel.unavailable.as_deref()?)))
            .collect()
    }

    pub(super) fn tunnel_names(&self) -> Vec<&str> {
        self.tunnels.iter().map(|tunnel| &*tunnel.name).collect()
    }
}

/// Returns which of a document's routes the relay's `own` win over, one line each.
fn overruled<'a>(
    ours: &'a [Arc<Route>],
    own: &'a Earlier<'_>,
) -> impl Iterator<Item = String> + 'a {
    ours.iter().filter_map(|ours| {
        // A process with both roles announces its own routes to itself.
        let own = own.over(ours).filter(|own| !ours.is_same_as(own))?;
        let (ours, own) = (&ours.name, &own.name);
        Some(format!("route {ours}: overruled by route {own} of the relay; {OWN_WINS}"))
    })
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
            let message = block.without_secrets(message);
            Some(format!("route {}: options.{protocol_type}{dot}{path}: {message}", route.name))
        })
        .take(REASONS_MAX)
        .map(shorten)
        .collect()
}

/// Returns whether the route goes to tunnels of the same document only.
fn announces(tunnels: &HashSet<Arc<str>>, route: &Route) -> bool {
    route.tunnels.iter().all(|share| tunnels.contains(&*share.tunnel))
}

/// Returns whether both go to the same tunnels, by whatever weights, or both nowhere.
pub(super) fn is_same_goal(a: &Route, b: &Route) -> bool {
    let goes_to =
        |route: &Route, tunnel: &str| route.tunnels.iter().any(|share| *share.tunnel == *tunnel);
    a.tunnels.len() == b.tunnels.len() && a.tunnels.iter().all(|share| goes_to(b, &share.tunnel))
}

/// Returns which bounds on policies the routes together are above, one line each.
fn above_bounds(routes: &[Arc<Route>]) -> Vec<String> {
    let policies = || routes.iter().filter_map(|route| route.policies.as_deref());
    let users =
        |policies: &Policies| policies.basic_auth.as_ref().map_or(0, |auth| auth.users.len());
    let changes =
        |changes: &HeaderChanges| changes.set.len() + changes.add.len() + changes.remove.len();
    let remembers = |policies: &&Policies| {
        policies.limits.rate_per_client.is_some() || policies.basic_auth.is_some()
    };
    let counts = [
        ("users", policies().map(users).sum::<usize>(), USERS_MAX),
        (
            "changes of fields",
            policies().map(|p| changes(&p.request_headers) + changes(&p.response_headers)).sum(),
            CHANGES_MAX,
        ),
        (
            "ranges of addresses",
            policies().map(|p| p.addresses.allow.len() + p.addresses.deny.len()).sum(),
            CHANGES_MAX,
        ),
        (
            "routes with basic_auth or rate_per_client",
            policies().filter(remembers).count(),
            CLIENT_TABLES_MAX,
        ),
    ];
    let above = counts.into_iter().filter(|(_, count, max)| count > max);
    above.map(|(what, count, max)| format!("{count} {what}, at most {max} are accepted")).collect()
}

/// Returns as many reasons as are told, none too long.
pub(super) fn shortened(mut reasons: Vec<String>) -> Vec<String> {
    reasons.truncate(REASONS_MAX);
    reasons.into_iter().map(shorten).collect()
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
    use crate::config::policy::{Addresses, BasicAuth};
    use crate::config::{MatchSpec, Share};

    #[test]
    fn refused_options_name_route_type_and_place() {
        let route = |name: &str, json: &str| {
            let announced = proto::AnnouncedRoute {
                name: name.to_owned(),
                subdomain: name.to_owned(),
                tunnel: "t".to_owned(),
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
        // Both ends log a reason.
        let routes = [route("bad", r#"{"api_token":"hunter2"}"#)];
        let reasons = refused_options(&routes, |_, options| {
            let (message, path) = (format!("{options} is not accepted"), String::new());
            Err(ConfigFault { message, path })
        });
        assert_eq!(reasons, ["route bad: options.WEBSOCKET: \"***\" is not accepted"]);
    }

    fn route(name: &str, tunnels: &[(&str, u32)], policies: Policies) -> Arc<Route> {
        let spec = MatchSpec { subdomain: Some(name), ..MatchSpec::default() };
        Arc::new(Route {
            name: name.into(),
            tunnels: tunnels
                .iter()
                .map(|(tunnel, weight)| Share { tunnel: (*tunnel).into(), weight: *weight })
                .collect(),
            matches: Match::parse(&spec).expect("a valid match"),
            options: Default::default(),
            policies: (!policies.is_default()).then(|| Arc::new(policies)),
        })
    }

    #[test]
    fn replicas_go_to_the_same_tunnels_by_whatever_weights() {
        type Shares<'a> = &'a [(&'a str, u32)];
        let table: &[(Shares<'_>, Shares<'_>, bool)] = &[
            (&[("a", 1)], &[("a", 1)], true),
            (&[("a", 1)], &[("b", 1)], false),
            (&[("a", 9), ("b", 1)], &[("b", 5), ("a", 5)], true),
            (&[("a", 9), ("b", 1)], &[("a", 1)], false),
            (&[], &[], true),
            (&[], &[("a", 1)], false),
        ];
        assert!(!table.is_empty());
        for (a, b, same) in table {
            let (a, b) = (route("r", a, Policies::default()), route("r", b, Policies::default()));
            assert_eq!(is_same_goal(&a, &b), *same, "{:?} {:?}", a.tunnels, b.tunnels);
            assert_eq!(is_same_goal(&b, &a), *same, "{:?} {:?}", a.tunnels, b.tunnels);
        }
    }

    #[test]
    fn notes_name_what_the_relays_own_routes_win_over() {
        let denied = Policies {
            addresses: Addresses { allow: vec![], deny: vec!["10.0.0.0/8".parse().unwrap()] },
            ..Policies::default()
        };
        let announced = [
            route("same", &[("t", 1)], Policies::default()),
            route("other", &[("t", 1)], Policies::default()),
            route("free", &[("t", 1)], Policies::default()),
        ];
        let own = [
            route("same", &[("t", 1)], Policies::default()),
            route("other", &[("t", 1)], denied),
            route("elsewhere", &[("t", 1)], Policies::default()),
        ];
        let base_domains = ["example.org".into()];
        let own = Earlier::of(own.iter(), &base_domains);
        let notes: Vec<String> = overruled(&announced, &own).collect();
        let expected =
            "route other: overruled by route other of the relay; the relay's own routes win";
        assert_eq!(notes, [expected]);
    }

    #[test]
    fn policies_of_a_document_are_bounded() {
        let user = |number: usize| (number.to_string().into(), "$2y$05$x".into());
        let auth = |users: usize| Policies {
            basic_auth: Some(BasicAuth {
                realm: "r".into(),
                users: (0..users).map(user).collect(),
            }),
            ..Policies::default()
        };
        let fine = route("fine", &[("t", 1)], auth(USERS_MAX));
        assert!(above_bounds(std::slice::from_ref(&fine)).is_empty());
        let more = [fine, route("more", &[("t", 1)], auth(1))];
        let reasons = above_bounds(&more);
        assert_eq!(reasons, ["10001 users, at most 10000 are accepted"]);
        let many: Vec<_> = (0..=CLIENT_TABLES_MAX)
            .map(|number| route(&format!("r{number}"), &[("t", 1)], auth(0)))
            .collect();
        let reasons = above_bounds(&many);
        let expected = "257 routes with basic_auth or rate_per_client, at most 256 are accepted";
        assert_eq!(reasons, [expected]);
    }
}

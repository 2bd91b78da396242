//! What the admin page says of the relay's routing, and the addresses that a sidecar is told.

use std::collections::{BTreeMap, HashMap};
use std::net::SocketAddr;
use std::sync::Arc;

use serde_json::{Value as Json, json};
use sidelane_tunnel::proto;

use super::document::{REASONS_MAX, shortened};
use super::routing::{Routing, Serving};
use super::sources::{Accepted, Earlier, Sources};
use super::{Relay, policy};
use crate::config::{Listener, Match, Route};
use crate::explain::{self, Facts, NotInForce, Public, PublicListener, Question};
use crate::tunnel::session::Session;

/// Addresses told in one answer to an announcement. A page of them helps nobody, and the answer must
/// stay a message.
const ADDRESSES_MAX: usize = 32;

/// Where routes come from, and who serves their tunnels.
struct Known<'a> {
    from: HashMap<*const Route, &'a str>,
    /// Sidecars that do not serve a tunnel of theirs now, and why.
    unavailable: HashMap<&'a str, Vec<(&'a str, &'a str)>>,
    routing: &'a Routing,
    protocol_types: Vec<Arc<str>>,
}

impl<'a> Known<'a> {
    fn of(relay: &Relay, sources: &'a Sources, routing: &'a Routing) -> Self {
        let own = sources.own.iter().map(|route| (route, "file"));
        let lost = sources.lost.iter().map(|(_, lost)| lost);
        let held = sources.held.values().map(|held| &held.document);
        let documents = sources.documents.values().chain(held).chain(lost);
        let announced = documents.flat_map(|document| {
            document.routes.iter().map(|route| (route, &*document.session.name))
        });
        let from = own.chain(announced).map(|(route, from)| (Arc::as_ptr(route), from)).collect();
        let protocol_types = relay.plugins.types();
        Self { from, unavailable: unavailable(sources), routing, protocol_types }
    }
}

impl Facts for Known<'_> {
    fn from(&self, route: &Route) -> String {
        self.from.get(&std::ptr::from_ref(route)).copied().unwrap_or_default().to_owned()
    }

    fn protocol_types(&self) -> Option<Vec<Arc<str>>> {
        Some(self.protocol_types.clone())
    }

    fn service(&self, _: &str) -> Option<String> {
        // The sidecar's business.
        None
    }

    fn is_served(&self, tunnel: &str, protocol_type: Option<&str>) -> Option<bool> {
        let tunnel = self.routing.tunnel(tunnel);
        let carries = |serving: &Serving| {
            protocol_type.is_none_or(|protocol_type| serving.carries(protocol_type).is_some())
        };
        Some(tunnel.is_some_and(|tunnel| tunnel.all().iter().any(carries)))
    }

    fn unavailable(&self, tunnel: &str) -> Vec<(String, String)> {
        owned(self.unavailable.get(tunnel))
    }

    fn carries(&self, _: &str, _: &str) -> Option<bool> {
        // The sidecar's business too.
        None
    }
}

/// Returns, by tunnel, the sidecars that do not serve it now, and why.
fn unavailable(sources: &Sources) -> HashMap<&str, Vec<(&str, &str)>> {
    let mut all: HashMap<&str, Vec<(&str, &str)>> = HashMap::new();
    for document in sources.documents.values() {
        for (tunnel, reason) in document.unavailable() {
            all.entry(tunnel).or_default().push((&*document.session.name, reason));
        }
    }
    all
}

fn owned(sidecars: Option<&Vec<(&str, &str)>>) -> Vec<(String, String)> {
    let sidecars = sidecars.into_iter().flatten();
    sidecars.map(|(sidecar, reason)| ((*sidecar).to_owned(), (*reason).to_owned())).collect()
}

impl Relay {
    /// Says what would become of a request.
    ///
    /// # Errors
    /// A listener that is not there, or a protocol type that no plugin serves.
    pub fn explain(&self, question: &Question) -> Result<Json, String> {
        let sources = self.lock_sources();
        let routing = self.routing.load();
        let known = Known::of(self, &sources, &routing);
        let public = self.public(&sources);
        let mut answer = explain::answer(routing.table.routes(), &public, question, &known)?;
        let held = sources.held.values().filter_map(|held| {
            let route = explain::taken(&held.document.routes, &public, question)?;
            Some(NotInForce {
                sidecar: held.document.session.name.to_string(),
                route: route.name.to_string(),
                reasons: held.reasons.clone(),
            })
        });
        explain::tell_not_in_force(&mut answer, held.collect());
        Ok(answer)
    }

    /// What the admin page says of routes: those of the file, those announced, those of documents that
    /// wait. `from` says whose a route is; `overruled_by` whose takes its place, `same_as` whose is the same, and `waits_for` why its
    /// document is not in force, `forbidden` what it claims that its principal may not.
    #[must_use]
    pub fn describe_routes(&self) -> Json {
        let sources = self.lock_sources();
        let routing = self.routing.load();
        let known = Known::of(self, &sources, &routing);
        let public = self.public(&sources);
        // The first to take something has it.
        let mut taken: HashMap<&Match, &Arc<Route>> = HashMap::new();
        let own = Earlier::of(sources.own.iter(), &sources.base_domains);
        let announced = sources.documents.values().flat_map(|document| &document.routes);
        let mut all = Vec::new();
        for (index, route) in sources.own.iter().chain(announced).enumerate() {
            let mut described = explain::described(route, &public, &known);
            let by = *taken.entry(&route.matches).or_insert(route);
            // A whole host may be a subdomain of the file, said otherwise.
            let by = own.over(route).filter(|_| index >= sources.own.len()).unwrap_or(by);
            if !Arc::ptr_eq(by, route) {
                // Replicas that announce the same overrule nobody.
                let key = if by == route { "same_as" } else { "overruled_by" };
                let by = json!({ "from": known.from(by), "route": &*by.name });
                described.insert(key.to_owned(), by);
            }
            all.push(Json::from(described));
        }
        for held in sources.held.values() {
            let key = if held.is_forbidden { "forbidden" } else { "waits_for" };
            for route in &held.document.routes {
                let mut described = explain::described(route, &public, &known);
                described.insert(key.to_owned(), held.reasons.clone().into());
                all.push(described.into());
            }
        }
        all.into()
    }

    /// What the admin page says of the tunnels that sidecars serve, sorted by name.
    #[must_use]
    pub fn describe_tunnels(&self) -> Vec<Json> {
        let sources = self.lock_sources();
        let mut tunnels: BTreeMap<&str, Vec<&Arc<Session>>> = BTreeMap::new();
        for document in sources.documents.values() {
            for name in document.tunnel_names() {
                tunnels.entry(name).or_default().push(&document.session);
            }
        }
        let unavailable = unavailable(&sources);
        let (routing, now) = (self.routing.load(), policy::now());
        let describe = |(name, sessions): (&str, Vec<&Arc<Session>>)| {
            let lanes: Vec<_> =
                sessions.iter().flat_map(|session| session.lanes().to_vec()).collect();
            json!({
                "name": name,
                "sidecars": sessions.iter().map(|session| &*session.name).collect::<Vec<_>>(),
                "sessions": sessions.len(),
                "lanes": lanes.len(),
                "unavailable": explain::unavailable(owned(unavailable.get(name))),
                "serving": routing.tunnel(name).map(|tunnel| {
                    tunnel.all().iter().map(|one| described(one, now)).collect::<Vec<_>>()
                }),
                "in_flight": lanes.iter().map(|link| link.load()).sum::<usize>(),
            })
        };
        tunnels.into_iter().map(describe).collect()
    }

    /// Returns addresses of the session's routes that are in force.
    pub(super) fn addresses(&self, sources: &Sources, epoch: u64) -> Vec<String> {
        let routing = self.routing.load();
        let public = self.public(sources);
        let is_in_force = |route: &&Arc<Route>| {
            let mut routes = routing.table.routes().iter();
            // Replicas that announce the same share it.
            routes.any(|other| other.matches == route.matches && other.tunnels == route.tunnels)
        };
        let routes =
            sources.documents.get(&epoch).into_iter().flat_map(|document| &document.routes);
        let in_force = routes.take(ADDRESSES_MAX).filter(is_in_force);
        in_force.flat_map(|route| public.urls(route)).take(ADDRESSES_MAX).collect()
    }

    /// Returns what sidecars are told whose documents have come into force.
    pub(super) fn accepted(
        &self,
        sources: &Sources,
        accepted: Vec<Accepted>,
    ) -> Vec<(Arc<Session>, proto::Announced)> {
        let answer = |Accepted { session, version, mut notes }| {
            notes.extend(self.uncovered(sources, session.epoch));
            let announced = proto::Announced {
                version,
                accepted: true,
                notes,
                addresses: self.addresses(sources, session.epoch),
                ..proto::Announced::default()
            };
            (session, announced)
        };
        accepted.into_iter().map(answer).collect()
    }

    /// Returns which hosts of the session's routes clients come to by TLS without a certificate for them, one
    /// line each.
    pub(super) fn uncovered(&self, sources: &Sources, epoch: u64) -> Vec<String> {
        let Some(document) = sources.documents.get(&epoch) else { return Vec::new() };
        let listeners = self.listeners.addresses();
        let listeners: Vec<&Listener> = listeners.iter().map(|(listener, _)| &**listener).collect();
        let all = document.routes.iter();
        let all = all.flat_map(|route| uncovered(route, &sources.base_domains, &listeners));
        shortened(all.take(REASONS_MAX).collect())
    }

    pub(super) fn public(&self, sources: &Sources) -> Public {
        Public {
            base_domains: sources.base_domains.clone(),
            listeners: self.listeners.addresses().iter().map(public_listener).collect(),
        }
    }
}

/// What is told of a sidecar's part in a tunnel.
fn described(serving: &Serving, now: u64) -> Json {
    let standing = &serving.standing;
    json!({
        "sidecar": &*serving.session.name,
        "epoch": serving.session.epoch,
        "weight": serving.weight,
        "open": serving.is_open(),
        "in_flight": standing.in_flight(),
        "exchanges": standing.opened(),
        "share_percent": standing.share_percent(now),
        "left_aside": standing.is_ejected(now),
    })
}

fn public_listener((listener, bound): &(Arc<Listener>, SocketAddr)) -> PublicListener {
    PublicListener { port: bound.port(), ..PublicListener::of(listener) }
}

/// Returns which hosts of a route no certificate is for, of the listeners with TLS at which it is taken.
fn uncovered(route: &Route, base_domains: &[Arc<str>], listeners: &[&Listener]) -> Vec<String> {
    let matches = &route.matches;
    let is_taken = |listener: &&&Listener| {
        // A protocol of bytes has no 421.
        listener.protocol_type().is_none()
            && matches.listener.as_ref().is_none_or(|name| *name == listener.name)
    };
    let ends: Vec<_> = listeners
        .iter()
        .filter(is_taken)
        .filter_map(|listener| Some((&*listener.name, listener.tls.as_ref()?)))
        .collect();
    if ends.is_empty() {
        return Vec::new();
    }
    let plural = if ends.len() == 1 { "" } else { "s" };
    let names = ends.iter().map(|(name, _)| *name).collect::<Vec<&str>>().join(", ");
    let hosts = matches.host.hosts(base_domains).into_iter();
    hosts
        .filter(|host| !ends.iter().any(|(_, tls)| tls.covers(host)))
        .map(|host| {
            format!(
                "route {}: no certificate of listener{plural} {names} is for {host}; clients are \
                 answered 421",
                route.name
            )
        })
        .collect()
}

#[cfg(test)]
mod tests;

//! What would become of a request, as JSON for the admin page and the command: the route, what its
//! policies do, and what client and service would see.
//!
//! Pure. Why a route fits is `router::explain`'s business; who serves a tunnel is asked of [`Facts`].

use std::sync::Arc;

use serde_json::{Map, Value as Json, json};

use crate::config::policy::{HeaderChanges, Policies, Rate};
use crate::config::{
    self, Config, HostMatch, Listener, Route, Share, duration_text, near_miss, size_text,
};
use crate::front::is_authority;
use crate::router::{self, Query, location, replace_prefix};
use crate::sidecar::RelayAnswer;

/// Addresses told of one route. A relay may have many base domains.
const URLS_MAX: usize = 8;

/// Types that a URL's scheme stands for.
const SCHEME_TYPES: [&str; 3] = ["HTTP", "WEBSOCKET", "GRPC"];

/// Sidecars told that do not serve a tunnel. Replicas of a service often fail for the same reason.
const UNAVAILABLE_MAX: usize = 8;

/// Routes told that would take it and are not in force.
const NOT_IN_FORCE_MAX: usize = 8;

/// What only a role knows.
pub trait Facts {
    /// Returns where the route comes from: `file`, or a sidecar's name.
    fn from(&self, route: &Route) -> String;
    /// Returns the protocol types that plugins serve here; `None`: not known.
    fn protocol_types(&self) -> Option<Vec<Arc<str>>>;
    /// Returns the tunnel's service as its file has it.
    fn service(&self, tunnel: &str) -> Option<String>;
    /// Returns whether a sidecar serves the tunnel, for this protocol type where one is given; `None`: not
    /// known here.
    fn is_served(&self, tunnel: &str, protocol_type: Option<&str>) -> Option<bool>;
    /// Returns the sidecars that have the tunnel and do not serve it now, by name, and why.
    fn unavailable(&self, tunnel: &str) -> Vec<(String, String)>;
    /// Returns whether the tunnel's file lets it carry the protocol type.
    fn carries(&self, tunnel: &str, protocol_type: &str) -> Option<bool>;
}

/// What is asked: a URL, or a host, and how it comes in.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Question {
    /// `http` or `https`.
    pub scheme: String,
    /// Host and port as a client sends them; `None`: byte-born.
    pub host: Option<String>,
    /// Path and query.
    pub target: String,
    /// Listener; `None`: by the URL's port, else the first of HTTP.
    pub listener: Option<String>,
    /// Protocol type.
    pub protocol_type: String,
}

impl Question {
    /// Reads `https://demo.example.org/api`, `demo.example.org:9080/api`, `demo.example.org`; empty: no
    /// host, as on a listener of a byte-born protocol. Without a protocol type the scheme says it.
    ///
    /// # Errors
    /// What is wrong with the URL or the protocol type, and what is accepted.
    pub fn parse(
        url: &str,
        protocol_type: Option<&str>,
        listener: Option<&str>,
    ) -> Result<Self, String> {
        let bad = |why: &str| {
            format!("\"{url}\" {why} (accepted: a URL or a host, as in http://demo.localhost/api)")
        };
        let (scheme, rest) = url.split_once("://").unwrap_or(("http", url));
        let (scheme, by_scheme) = match scheme.to_ascii_lowercase().as_str() {
            "http" => ("http", "HTTP"),
            "https" => ("https", "HTTP"),
            "ws" => ("http", "WEBSOCKET"),
            "wss" => ("https", "WEBSOCKET"),
            "grpc" => ("http", "GRPC"),
            "grpcs" => ("https", "GRPC"),
            _ => return Err(bad("has an unknown scheme")),
        };
        if url.bytes().any(|byte| byte.is_ascii_control() || byte == b' ') {
            return Err(bad("has white space or control characters in it"));
        }
        let end = rest.find(['/', '?', '#']).unwrap_or(rest.len());
        let (authority, target) = rest.split_at(end);
        let host = authority.rsplit_once('@').map_or(authority, |(_, host)| host);
        if host.is_empty() && (!url.is_empty() || listener.is_none()) {
            return Err(bad("has no host"));
        }
        // What no client gets past the front (400), no route takes.
        if !host.is_empty() && !is_authority(host.as_bytes()) {
            return Err(bad("has a host or port that no client sends"));
        }
        let target = target.split('#').next().unwrap_or_default();
        let target = if target.starts_with('/') { target.to_owned() } else { format!("/{target}") };
        // As browsers send it.
        let escaped = |c: char| match c.is_ascii() {
            true => c.to_string(),
            false => c.to_string().bytes().map(|byte| format!("%{byte:02X}")).collect(),
        };
        let target: String = target.chars().map(escaped).collect();
        if let Some(protocol_type) = protocol_type {
            config::parse_protocol_type(protocol_type)?;
        }
        Ok(Self {
            scheme: scheme.to_owned(),
            host: (!host.is_empty()).then(|| host.to_owned()),
            target,
            listener: listener.map(str::to_owned),
            protocol_type: protocol_type.unwrap_or(by_scheme).to_owned(),
        })
    }

    /// Returns the name of the listener that the request would come in by, of those of a relay with the
    /// ports that they are bound to.
    fn listener<'a>(&'a self, listeners: &'a [PublicListener]) -> &'a str {
        if let Some(listener) = &self.listener {
            return listener;
        }
        let port = self.host.as_deref().and_then(port_of);
        let http = || listeners.iter().filter(|listener| listener.is_http);
        // Who names no port is not asking about a redirect to https.
        let serving = || http().filter(|listener| !listener.redirects);
        let is_tls = self.scheme == "https";
        let found = http()
            .find(|listener| Some(listener.port) == port)
            .or_else(|| serving().find(|listener| listener.is_tls == is_tls))
            .or_else(|| serving().next())
            .or_else(|| http().next());
        found.map_or("web", |listener| &listener.name)
    }

    /// Refuses what no client can do: a listener or a protocol type that is not there.
    fn check(&self, public: &Public, served: Option<&[Arc<str>]>) -> Result<(), String> {
        let names = || public.listeners.iter().map(|listener| &*listener.name);
        if let Some(listener) = self.listener.as_deref().filter(|_| !public.listeners.is_empty())
            && !names().any(|name| name == listener)
        {
            return Err(format!(
                "there is no listener \"{listener}\" (those are {}){}",
                names().collect::<Vec<_>>().join(", "),
                near_miss(listener, names())
            ));
        }
        let own = &*self.protocol_type;
        match served {
            Some(served) if !served.iter().any(|name| **name == *own) => {
                let names = || served.iter().map(AsRef::as_ref);
                let list = names().collect::<Vec<&str>>().join(", ");
                let list = if list.is_empty() { "none" } else { &list };
                let hint = near_miss(own, names());
                Err(format!("no plugin serves protocol type \"{own}\" (served: {list}){hint}"))
            }
            _ => Ok(()),
        }
    }

    /// Says what is odd about the question and yet may be meant.
    fn notes(&self, public: &Public, served: Option<&[Arc<str>]>) -> Vec<String> {
        let mut notes = Vec::new();
        if served.is_none() && !SCHEME_TYPES.contains(&&*self.protocol_type) {
            let own = &self.protocol_type;
            notes.push(format!("whether a plugin serves {own} is not known from the file"));
        }
        let port = self.host.as_deref().and_then(port_of).filter(|_| self.listener.is_none());
        let http = || public.listeners.iter().filter(|listener| listener.is_http);
        if let Some(port) = port
            && http().next().is_some()
            && !http().any(|listener| listener.port == port)
        {
            let there: Vec<String> =
                http().map(|listener| format!("{} {}", listener.name, listener.port)).collect();
            notes.push(format!(
                "no listener for HTTP has port {port} (those are {}); taken for {}",
                there.join(", "),
                self.listener(&public.listeners)
            ));
        }
        let name = self.listener(&public.listeners);
        if public.listeners.iter().any(|listener| *listener.name == *name && listener.redirects) {
            notes.push(format!(
                "listener {name} sends every request to https; what is told here is for what comes then"
            ));
        }
        notes
    }
}

/// A relay's listener as clients know it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct PublicListener {
    /// Name.
    pub name: Arc<str>,
    /// Port that it is bound to.
    pub port: u16,
    /// It takes HTTP.
    pub is_http: bool,
    /// It takes TLS.
    pub is_tls: bool,
    /// It sends every request to `https`.
    pub redirects: bool,
}

impl PublicListener {
    /// Returns the listener as its file has it; a port that the system chose is to be filled in.
    #[must_use]
    pub fn of(listener: &Listener) -> Self {
        Self {
            name: Arc::clone(&listener.name),
            port: listener.address.port(),
            is_http: listener.protocol_type().is_none(),
            is_tls: listener.tls.is_some(),
            redirects: listener.https_redirect.is_some(),
        }
    }
}

/// A relay as clients know it.
#[derive(Clone, Debug, Default)]
pub struct Public {
    /// Lower case.
    pub base_domains: Vec<Arc<str>>,
    /// In the file's order.
    pub listeners: Vec<PublicListener>,
}

impl Public {
    /// Returns the addresses by which clients reach the route, eight at most: by the listener that
    /// it names, or the first of HTTP that does more than to redirect; none where that is not there. A star stands for what a wildcard
    /// takes.
    #[must_use]
    pub fn urls(&self, route: &Route) -> Vec<String> {
        let matches = &route.matches;
        let named = matches.listener.as_deref();
        let serves = |listener: &&PublicListener| match named {
            Some(name) => *listener.name == *name,
            None => listener.is_http && !listener.redirects,
        };
        let first = || self.listeners.iter().find(|listener| named.is_none() && listener.is_http);
        let listener = self.listeners.iter().find(serves).or_else(first);
        if named.is_some() && listener.is_none() && !self.listeners.is_empty() {
            return Vec::new();
        }
        let is_http = listener.is_none_or(|listener| listener.is_http);
        let hosts = match &matches.host {
            HostMatch::Any => vec!["*".to_owned()],
            host => host.hosts(&self.base_domains),
        };
        let is_tls = listener.is_some_and(|listener| listener.is_tls);
        let (scheme, default) = match (is_http, is_tls) {
            (true, false) => ("http", Some(80)),
            (true, true) => ("https", Some(443)),
            (false, false) => ("tcp", None),
            (false, true) => ("tls", None),
        };
        let port = match listener {
            Some(listener) if Some(listener.port) != default => format!(":{}", listener.port),
            _ => String::new(),
        };
        let path = if is_http { format!("{}/", matches.path_prefix) } else { String::new() };
        let url = |host: String| {
            let host = if host.contains(':') { format!("[{host}]") } else { host };
            format!("{scheme}://{host}{port}{path}")
        };
        hosts.into_iter().take(URLS_MAX).map(url).collect()
    }
}

/// Answers the question; the fields are told in docs/operations.md.
///
/// # Errors
/// A listener that is not there, or a protocol type that nothing serves.
pub fn answer(
    routes: &[Arc<Route>],
    public: &Public,
    question: &Question,
    facts: &dyn Facts,
) -> Result<Json, String> {
    let served = facts.protocol_types();
    question.check(public, served.as_deref())?;
    let query = Query {
        host: question.host.as_deref(),
        path: &question.target,
        listener: question.listener(&public.listeners),
        protocol_type: &question.protocol_type,
    };
    let explanation = router::explain(routes, &public.base_domains, &query);
    let mut answer = json!({
        "asked": {
            "host": question.host,
            "path": question.target,
            "listener": query.listener,
            "protocol_type": question.protocol_type,
        },
        "notes": question.notes(public, served.as_deref()),
        "route": null,
        "others": explanation.others.iter().map(|other| json!({
            "route": &*other.route.name,
            "urls": public.urls(&other.route),
            "why": other.why,
        })).collect::<Vec<_>>(),
        "more_others": explanation.more,
        "hint": explanation.hint,
    });
    let (Some(route), Some(map)) = (&explanation.route, answer.as_object_mut()) else {
        return Ok(answer);
    };
    map.insert("route".into(), (*route.name).into());
    map.insert("from".into(), facts.from(route).into());
    map.insert("urls".into(), public.urls(route).into());
    map.insert("because".into(), explanation.because.into());
    map.insert("tunnels".into(), tunnels(route, facts, Some(&question.protocol_type)));
    map.insert("policies".into(), policies(route).into());
    map.insert("options".into(), options(route, &question.protocol_type));
    let redirected =
        route.policies.as_ref().and_then(|policies| redirect(route, policies, question));
    match redirected {
        Some(redirect) => map.insert("client_sees".into(), redirect.into()),
        None => map.insert("service_sees".into(), service_sees(route, question)),
    };
    Ok(answer)
}

/// Returns which of `routes` alone would take what is asked.
#[must_use]
pub fn taken<'a>(
    routes: &'a [Arc<Route>],
    public: &Public,
    question: &Question,
) -> Option<&'a Arc<Route>> {
    let query = Query {
        host: question.host.as_deref(),
        path: &question.target,
        listener: question.listener(&public.listeners),
        protocol_type: &question.protocol_type,
    };
    let taken = router::explain(routes, &public.base_domains, &query).route?;
    routes.iter().find(|route| Arc::ptr_eq(route, &taken))
}

/// A route that would take what is asked, of a document that is not in force.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct NotInForce {
    /// Whose document.
    pub sidecar: String,
    /// The route's name.
    pub route: String,
    /// Why the document is not in force.
    pub reasons: Vec<String>,
}

/// Says in an answer which routes would take it and are not in force.
pub fn tell_not_in_force(answer: &mut Json, all: Vec<NotInForce>) {
    if all.is_empty() {
        return;
    }
    let told = all.into_iter().take(NOT_IN_FORCE_MAX);
    answer["not_in_force"] = told
        .map(|NotInForce { sidecar, route, reasons }| {
            json!({ "sidecar": sidecar, "route": route, "reasons": reasons })
        })
        .collect();
}

/// Says in a sidecar's answer what relays say of its document.
pub fn tell_refusals(answer: &mut Json, relays: &[RelayAnswer]) {
    let Some(notes) = answer["notes"].as_array_mut() else { return };
    for relay in relays.iter().filter(|relay| relay.is_connected && !relay.refused.is_empty()) {
        let before = match relay.accepted {
            Some(version) => format!("version {version} of it is in force there"),
            None => "nothing of it is in force there".to_owned(),
        };
        notes.push(Json::from(format!(
            "relay {} refuses what this sidecar announces, and {before}: {}",
            relay.relay,
            relay.refused.join("; ")
        )));
    }
}

/// Returns the tunnels of a route with what is known of each, for one protocol type or for all.
fn tunnels(route: &Route, facts: &dyn Facts, protocol_type: Option<&str>) -> Json {
    let describe = |share: &Share| {
        let mut described = json!({
            "tunnel": &*share.tunnel,
            "weight": share.weight,
            "service": facts.service(&share.tunnel),
            "served": facts.is_served(&share.tunnel, protocol_type),
        });
        let unavailable = unavailable(facts.unavailable(&share.tunnel));
        if !unavailable.is_null() {
            described["unavailable"] = unavailable;
        }
        let carries = protocol_type.and_then(|name| facts.carries(&share.tunnel, name));
        if let Some(carries) = carries {
            described["carries"] = carries.into();
        }
        described
    };
    route.tunnels.iter().map(describe).collect()
}

/// Returns sidecars that do not serve a tunnel with their reasons; null: there are none.
#[must_use]
pub fn unavailable(sidecars: Vec<(String, String)>) -> Json {
    let told = sidecars.into_iter().take(UNAVAILABLE_MAX);
    let told: Vec<Json> =
        told.map(|(sidecar, reason)| json!({ "sidecar": sidecar, "reason": reason })).collect();
    if told.is_empty() { Json::Null } else { told.into() }
}

/// Answers the question by a file alone: nobody is known to serve anything. Without a relay in it the
/// base domains are not known either, and every ending of the host is taken for one. `served` are the
/// protocol types of loaded plugins; `None`: as far as the file tells them.
///
/// # Errors
/// As of [`answer`].
pub fn from_config(
    config: &Config,
    question: &Question,
    served: Option<Vec<Arc<str>>>,
) -> Result<Json, String> {
    let public = match &config.relay {
        Some(relay) => Public {
            base_domains: relay.base_domains.clone(),
            listeners: relay
                .listeners
                .iter()
                .map(|listener| PublicListener::of(listener))
                .collect(),
        },
        None => Public { base_domains: endings(question), listeners: Vec::new() },
    };
    let served = served.or_else(|| types_of(config));
    let mut answer = answer(&config.routes, &public, question, &FromConfig { config, served })?;
    if let (Some(_), Some(notes)) = (&config.relay, answer["notes"].as_array_mut()) {
        notes.push("by the file alone: what sidecars announce to the relay is not in it".into());
    }
    if let (None, Some(map)) = (&config.relay, answer.as_object_mut()) {
        map.insert("assumed_base_domains".to_owned(), true.into());
        // They would be told as if they were known.
        map.insert("hint".to_owned(), Json::Null);
    }
    Ok(answer)
}

/// Returns the protocol types that the file's plugins may serve; `None`: one of them serves whatever it
/// says when it is loaded, or there are none.
fn types_of(config: &Config) -> Option<Vec<Arc<str>>> {
    let libraries = &config.plugins.libraries;
    let types: Option<Vec<&Vec<Arc<str>>>> =
        libraries.iter().map(|library| library.protocol_types.as_ref()).collect();
    types
        .filter(|types| !types.is_empty())
        .map(|types| types.into_iter().flatten().cloned().collect())
}

/// Returns what follows each dot of the host.
fn endings(question: &Question) -> Vec<Arc<str>> {
    let host = question.host.as_deref().unwrap_or_default().to_ascii_lowercase();
    let host =
        port_of(&host).map_or(&*host, |_| host.rsplit_once(':').map_or("", |(host, _)| host));
    let host = host.strip_suffix('.').unwrap_or(host);
    host.match_indices('.').map(|(dot, _)| host[dot + 1..].into()).collect()
}

struct FromConfig<'a> {
    config: &'a Config,
    served: Option<Vec<Arc<str>>>,
}

impl Facts for FromConfig<'_> {
    fn from(&self, _: &Route) -> String {
        "file".to_owned()
    }

    fn protocol_types(&self) -> Option<Vec<Arc<str>>> {
        self.served.clone()
    }

    fn service(&self, tunnel: &str) -> Option<String> {
        self.config.tunnel(tunnel).map(|tunnel| tunnel.service.to_string())
    }

    fn is_served(&self, _: &str, _: Option<&str>) -> Option<bool> {
        None
    }

    fn unavailable(&self, _: &str) -> Vec<(String, String)> {
        Vec::new()
    }

    fn carries(&self, tunnel: &str, protocol_type: &str) -> Option<bool> {
        self.config.tunnel(tunnel).map(|tunnel| tunnel.carries(protocol_type))
    }
}

/// Returns what the admin page of a sidecar says of its routes, and what relays said of them.
#[must_use]
pub fn announced(config: &Config, answers: &[RelayAnswer]) -> Json {
    let public = Public::default();
    let describe = |route: &Arc<Route>| {
        let mut map = described(route, &public, &FromConfig { config, served: None });
        let about = format!("route {}: ", route.name);
        let relays = answers.iter().map(|answer| {
            let of_route = |reason: &&String| reason.starts_with(&about);
            let reasons: Vec<&String> = answer.refused.iter().filter(of_route).collect();
            json!({
                "relay": answer.relay,
                "state": announcement_state(answer),
                "version": answer.accepted,
                "reasons": reasons,
                "notes": answer.notes.iter().filter(of_route).collect::<Vec<_>>(),
            })
        });
        map.insert("announced".to_owned(), relays.collect());
        map.insert("urls".to_owned(), told_urls(route, config, answers).into());
        Json::from(map)
    };
    config.routes.iter().map(describe).collect()
}

/// Returns the addresses, eight at most, that relays told and that can be those of this route alone.
fn told_urls(route: &Route, config: &Config, answers: &[RelayAnswer]) -> Vec<String> {
    let others = || config.routes.iter().filter(|other| other.name != route.name);
    let mut urls: Vec<String> = Vec::new();
    for url in answers.iter().flat_map(|answer| &answer.addresses) {
        if urls.len() < URLS_MAX
            && may_be_of(url, route)
            && !others().any(|other| may_be_of(url, other))
            && !urls.contains(url)
        {
            urls.push(url.clone());
        }
    }
    urls
}

/// Returns whether [`Public::urls`] of a relay, whose base domains are not known, may have this one for
/// the route.
fn may_be_of(url: &str, route: &Route) -> bool {
    let Some((_, rest)) = url.split_once("://") else { return false };
    let (authority, path) = rest.split_at(rest.find('/').unwrap_or(rest.len()));
    let host = port_of(authority).and_then(|_| Some(authority.rsplit_once(':')?.0));
    let host = host.unwrap_or(authority).trim_matches(['[', ']']);
    let path = path.strip_suffix('/').unwrap_or(path);
    let star = host.strip_prefix("*.");
    let is_below = |name: &str, host: Option<&str>| {
        host.and_then(|host| host.strip_prefix(name)).is_some_and(|rest| rest.starts_with('.'))
    };
    let fits = match &route.matches.host {
        HostMatch::Any => host == "*",
        HostMatch::Exact(name) => host == &**name,
        HostMatch::HostWildcard(suffix) => star == Some(suffix),
        HostMatch::Subdomain(name) => is_below(name, Some(host)),
        HostMatch::Wildcard(suffix) if suffix.is_empty() => star.is_some(),
        HostMatch::Wildcard(suffix) => is_below(suffix, star),
    };
    fits && *path == *route.matches.path_prefix
}

fn announcement_state(answer: &RelayAnswer) -> &'static str {
    match answer {
        RelayAnswer { is_connected: false, .. } => "not connected",
        RelayAnswer { refused, .. } if !refused.is_empty() => "refused",
        RelayAnswer { accepted: Some(_), .. } => "accepted",
        _ => "announced",
    }
}

/// Adds the services of a configuration to tunnels that sidecars serve, and those that none does.
pub fn with_services(tunnels: &mut Vec<Json>, config: &Config) {
    for tunnel in &config.tunnels {
        if !tunnels.iter().any(|known| known["name"] == *tunnel.name) {
            tunnels.push(json!({ "name": &*tunnel.name }));
        }
    }
    for known in tunnels {
        let name = known["name"].as_str().unwrap_or_default();
        if let Some(tunnel) = config.tunnel(name) {
            known["service"] = tunnel.service.to_string().into();
        }
    }
}

/// Fills in services that the configuration knows.
pub fn fill_services(tunnels: &mut Json, config: &Config) {
    for known in tunnels.as_array_mut().into_iter().flatten() {
        if let Some(tunnel) = known["tunnel"].as_str().and_then(|name| config.tunnel(name)) {
            known["service"] = tunnel.service.to_string().into();
        }
    }
}

fn options(route: &Route, protocol_type: &str) -> Json {
    route.options.get(protocol_type).map_or(Json::Null, |block| block.masked.clone())
}

/// Returns the names of the policies that a route has, in the order in which they are told.
#[must_use]
pub fn policy_names(route: &Route) -> Vec<&'static str> {
    route
        .policies
        .as_deref()
        .map(lines)
        .unwrap_or_default()
        .into_iter()
        .map(|(name, _)| name)
        .collect()
}

/// Returns each policy of a route with what it does, in a line.
fn policies(route: &Route) -> Vec<Json> {
    let lines = route.policies.as_deref().map(lines).unwrap_or_default();
    lines.into_iter().map(|(name, says)| json!({ "policy": name, "says": says })).collect()
}

/// Values of fields stay out: they may be credentials.
fn lines(policies: &Policies) -> Vec<(&'static str, String)> {
    let mut lines = Vec::new();
    let addresses = &policies.addresses;
    if !addresses.is_empty() {
        let nets = |nets: &[ipnet::IpNet]| {
            nets.iter().map(ToString::to_string).collect::<Vec<_>>().join(", ")
        };
        let mut parts = Vec::new();
        if !addresses.allow.is_empty() {
            parts.push(format!("only from {}", nets(&addresses.allow)));
        }
        if !addresses.deny.is_empty() {
            parts.push(format!("not from {}", nets(&addresses.deny)));
        }
        lines.push(("addresses", format!("{}; else 403", parts.join(", "))));
    }
    if let Some(auth) = &policies.basic_auth {
        let (realm, users) = (&auth.realm, auth.users.len());
        lines.push(("basic_auth", format!("realm \"{realm}\", users: {users}; else 401")));
    }
    if let Some(redirect) = &policies.redirect {
        let parts = [
            Some(format!("status {}", redirect.status)),
            redirect.scheme.as_ref().map(|scheme| format!("scheme {scheme}")),
            redirect.host.as_ref().map(|host| format!("host {host}")),
            redirect.path_prefix.as_deref().map(prefix_text),
        ];
        push_joined(&mut lines, "redirect", parts);
    }
    let limits = &policies.limits;
    let limits = [
        limits.rate.map(|rate| format!("{}, else 429", rate_text(&rate))),
        limits.rate_per_client.map(|rate| format!("{} per client, else 429", rate_text(&rate))),
        limits.concurrent.map(|count| format!("{count} at once, else 503")),
        limits.body.map(|body| format!("bodies of {}, else 413", size_text(body))),
    ];
    push_joined(&mut lines, "limits", limits);
    let timeouts = &policies.timeouts;
    let timeouts = [
        ("connect", timeouts.connect),
        ("response_head", timeouts.response_head),
        ("idle", timeouts.idle),
        ("total", timeouts.total),
    ];
    let timeouts =
        timeouts.map(|(name, value)| value.map(|value| format!("{name} {}", duration_text(value))));
    push_joined(&mut lines, "timeouts", timeouts);
    if let Some(retries) = &policies.retries {
        let says = format!(
            "{} times at most, {} % of the route's exchanges or {} per second",
            retries.attempts, retries.budget_percent, retries.budget_min
        );
        lines.push(("retries", says));
    }
    for (name, changes) in [
        ("request_headers", &policies.request_headers),
        ("response_headers", &policies.response_headers),
    ] {
        push_joined(&mut lines, name, changes_text(changes));
    }
    let rewrite = &policies.rewrite;
    let rewrite = [
        rewrite.host.as_ref().map(|host| format!("host {host}")),
        rewrite.path_prefix.as_deref().map(prefix_text),
    ];
    push_joined(&mut lines, "rewrite", rewrite);
    if let Some(compression) = &policies.compression {
        let (level, min_size) = (compression.level, size_text(compression.min_size));
        lines.push(("compression", format!("gzip level {level}, from {min_size}")));
    }
    if let Some(hsts) = &policies.hsts {
        let parts = [
            Some(format!("max_age {}, on https alone", duration_text(hsts.max_age))),
            hsts.include_subdomains.then(|| "include_subdomains".to_owned()),
            hsts.preload.then(|| "preload".to_owned()),
        ];
        push_joined(&mut lines, "hsts", parts);
    }
    if let Some(affinity) = &policies.affinity {
        let parts = [
            Some(format!("one sidecar for each client, by the cookie {}", affinity.cookie)),
            (!affinity.max_age.is_zero())
                .then(|| format!("max_age {}", duration_text(affinity.max_age))),
        ];
        push_joined(&mut lines, "affinity", parts);
    }
    lines
}

fn prefix_text(prefix: &str) -> String {
    format!("path_prefix {}", if prefix.is_empty() { "removed" } else { prefix })
}

fn push_joined<const N: usize>(
    lines: &mut Vec<(&'static str, String)>,
    name: &'static str,
    parts: [Option<String>; N],
) {
    let parts: Vec<String> = parts.into_iter().flatten().collect();
    if !parts.is_empty() {
        lines.push((name, parts.join("; ")));
    }
}

fn changes_text(changes: &HeaderChanges) -> [Option<String>; 3] {
    let text = |verb: &str, names: Vec<&str>| {
        (!names.is_empty()).then(|| format!("{verb} {}", names.join(", ")))
    };
    let names = |fields: &'_ [(http::HeaderName, http::HeaderValue)]| {
        fields.iter().map(|(name, _)| name.to_string()).collect::<Vec<_>>()
    };
    let (set, add) = (names(&changes.set), names(&changes.add));
    [
        text("remove", changes.remove.iter().map(http::HeaderName::as_str).collect()),
        text("set", set.iter().map(String::as_str).collect()),
        text("add", add.iter().map(String::as_str).collect()),
    ]
}

fn rate_text(rate: &Rate) -> String {
    let text = format!("{} per {}", rate.count, duration_text(rate.per));
    if rate.burst == rate.count { text } else { format!("{text}, {} at once", rate.burst) }
}

/// Returns where the client is sent, as the relay would say it.
fn redirect(route: &Route, policies: &Policies, question: &Question) -> Option<String> {
    let redirect = policies.redirect.as_ref()?;
    let asked = question.host.as_deref().unwrap_or_default().as_bytes();
    let location =
        location(redirect, &route.matches.path_prefix, asked, question.target.as_bytes())?;
    Some(format!("{} to {}", redirect.status, String::from_utf8_lossy(location.as_bytes())))
}

fn service_sees(route: &Route, question: &Question) -> Json {
    let Some(host) = &question.host else { return json!({}) };
    let rewrite = route.policies.as_ref().map(|policies| &policies.rewrite);
    let host = rewrite.and_then(|rewrite| rewrite.host.as_deref()).unwrap_or(host);
    let target = match rewrite.and_then(|rewrite| rewrite.path_prefix.as_deref()) {
        Some(prefix) if question.target.starts_with('/') => {
            let target = question.target.as_bytes();
            let replaced = replace_prefix(target, &route.matches.path_prefix, prefix);
            String::from_utf8_lossy(&replaced).into_owned()
        }
        _ => question.target.clone(),
    };
    json!({ "host": host, "path": target })
}

fn port_of(host: &str) -> Option<u16> {
    let after = host.rfind(']').map_or(host, |bracket| &host[bracket..]);
    after.rsplit_once(':')?.1.parse().ok()
}

/// Returns what the admin page says of a route in force: the route as in a file, and what it comes to.
#[must_use]
pub fn described(route: &Route, public: &Public, facts: &dyn Facts) -> Map<String, Json> {
    let mut map = match route.to_json() {
        Json::Object(map) => map,
        _ => Map::new(),
    };
    map.insert("from".to_owned(), facts.from(route).into());
    map.insert("urls".to_owned(), public.urls(route).into());
    map.insert("serving".to_owned(), tunnels(route, facts, None));
    map.insert("policies".to_owned(), policy_names(route).into());
    map
}

#[cfg(test)]
mod tests;

//! From the document's tree to a [`Config`]: the language's keys, their bounds, and what must hold
//! between them. Goes on after a fault, with a default in its place, so that all are told.

use std::cell::RefCell;
use std::collections::HashSet;
use std::net::{IpAddr, Ipv4Addr, SocketAddr};
use std::path::PathBuf;
use std::sync::Arc;
use std::time::{Duration, SystemTime};

use ipnet::IpNet;

use super::error::{Position, Sink, did_you_mean, list};
use super::files::Files;
use super::policy::Policies;
use super::raw::{self, Field, Section};
use super::substitute::{self, Context};
use super::{
    Block, Config, ConfigErrors, Draft, Log, LogFormat, Origin, Plugins, Relays, Secret, Source,
    duplicates, duration_text, merge, size_text, value,
};

mod credentials;
mod meaning;
mod placeholders;
mod plugins;
pub(super) mod policies;
mod relay;
mod routes;
mod sidecar;
mod tls;
mod tunnels;

pub(super) use policies::{ATTEMPTS_MAX, REALM, USERS_MAX};
pub(super) use routes::WEIGHT_MAX;
pub(super) use tls::ACME_DIRECTORY;
pub(crate) use tunnels::SIDECAR_WEIGHT_MAX;
pub(super) use tunnels::{CHECKS_MAX, CONNECTIONS_MAX};

/// Keys by section, for the schema's test.
#[cfg(test)]
pub(crate) const SECTIONS: &[(&str, &[&str])] = &[
    ("", ROOT_KEYS),
    ("relay", RELAY_KEYS),
    ("relay.listeners[]", LISTENER_KEYS),
    ("relay.listeners[].tls", tls::LISTENER_TLS_KEYS),
    ("relay.listeners[].tls.certificates[]", tls::CERTIFICATES_KEYS),
    ("relay.listeners[].tls.client_certificates", tls::CLIENT_CERTIFICATES_KEYS),
    ("relay.tunnel", RELAY_TUNNEL_KEYS),
    ("relay.tunnel.tls", tls::TUNNEL_TLS_KEYS),
    ("relay.tunnel.tls.certificates[]", tls::CERTIFICATES_KEYS),
    ("relay.credentials[]", credentials::PRINCIPAL_KEYS),
    ("relay.credentials[].jwt[]", credentials::JWT_KEYS),
    ("relay.token_issuers[]", credentials::ISSUER_KEYS),
    ("relay.acme", tls::ACME_KEYS),
    ("relay.acme.external_account", tls::EXTERNAL_ACCOUNT_KEYS),
    ("relay.warmup", WARMUP_KEYS),
    ("relay.limits", RELAY_LIMITS_KEYS),
    ("relay.timeouts", RELAY_TIMEOUTS_KEYS),
    ("sidecar", SIDECAR_KEYS),
    ("sidecar.relays[]", RELAY_ADDRESS_KEYS),
    ("sidecar.relays[].tls", tls::RELAY_TLS_KEYS),
    ("sidecar.relays[].tls.certificate", tls::CERTIFICATE_KEYS),
    ("sidecar.limits", SIDECAR_LIMITS_KEYS),
    ("sidecar.timeouts", SIDECAR_TIMEOUTS_KEYS),
    ("tunnels[]", TUNNEL_KEYS),
    ("tunnels[].tls", tls::SERVICE_TLS_KEYS),
    ("tunnels[].tls.certificate", tls::CERTIFICATE_KEYS),
    ("tunnels[].pool", POOL_KEYS),
    ("tunnels[].health_check", HEALTH_CHECK_KEYS),
    ("routes[]", ROUTE_KEYS),
    ("routes[].tunnels[]", SHARE_KEYS),
    ("routes[].timeouts", policies::TIMEOUTS_KEYS),
    ("routes[].retries", policies::RETRIES_KEYS),
    ("routes[].request_headers", policies::HEADERS_KEYS),
    ("routes[].response_headers", policies::HEADERS_KEYS),
    ("routes[].rewrite", policies::REWRITE_KEYS),
    ("routes[].redirect", policies::REDIRECT_KEYS),
    ("routes[].basic_auth", policies::BASIC_AUTH_KEYS),
    ("routes[].addresses", policies::ADDRESSES_KEYS),
    ("routes[].limits", policies::LIMITS_KEYS),
    ("routes[].limits.rate", policies::RATE_KEYS),
    ("routes[].limits.rate_per_client", policies::RATE_KEYS),
    ("routes[].compression", policies::COMPRESSION_KEYS),
    ("routes[].hsts", policies::HSTS_KEYS),
    ("routes[].affinity", policies::AFFINITY_KEYS),
    ("plugins", PLUGINS_KEYS),
    ("plugins.libraries[]", LIBRARY_KEYS),
    ("health", HEALTH_KEYS),
    ("admin", ADMIN_KEYS),
    ("log", LOG_KEYS),
];

/// How often an issuer's keys are fetched, and by how much clocks may differ.
pub(super) const ISSUER_TIMES: (Duration, Duration) = (credentials::REFRESH, credentials::LEEWAY);

/// Version of the language.
const VERSION: u32 = 1;

/// Most data-path threads: beyond the cores they only cost.
pub(crate) const THREADS_MAX: usize = 256;

/// Most lanes of a session (the tunnel's own bound).
pub(crate) const LANES_MAX: usize = 16;

/// Most connections of a session that wait for an exchange each.
pub(crate) const DEDICATED_MAX: usize = crate::tunnel::dedicated::WAITING_PER_SESSION_MAX;

/// Longest timeout. Longer ones are a mistaken unit.
const TIMEOUT_MAX: Duration = Duration::from_secs(24 * 3600);

/// Most of any one thing in a list; bounds metric labels and the watch on a relay.
const ITEMS_MAX: usize = 65_536;

/// Most of anything that is counted at once or per time: beyond any machine's means.
pub(crate) const COUNT_MAX: u32 = 1_000_000;

/// Most networks of trusted proxies: each connection's address is compared with all of them.
const PROXIES_MAX: usize = 256;

/// Shortest token. Guessing 16 characters over a network is hopeless, shorter ones are typed by hand.
const TOKEN_BYTES_MIN: usize = 16;

/// Longest token; it travels in the hello.
pub(crate) const TOKEN_BYTES_MAX: usize = 4096;

const fn loopback(port: u16) -> SocketAddr {
    SocketAddr::new(IpAddr::V4(Ipv4Addr::LOCALHOST), port)
}

/// Defaults of the addresses: loopback, so that a file says so before the world may come in.
const WEB_ADDRESS: SocketAddr = loopback(9080);
const TUNNEL_ADDRESS: SocketAddr = loopback(9081);

/// How long a relay waits for a lane.
const GRACE: Duration = Duration::from_secs(15);

/// Longest such time: what a lane holds for its exchanges is held for so long.
const GRACE_MAX: Duration = Duration::from_secs(300);

/// What a lane may keep for its return.
const REPLAY_BYTES_MIN: u64 = 64 << 10;
const REPLAY_BYTES_MAX: u64 = 256 << 20;
const HEALTH_ADDRESS: SocketAddr = loopback(9082);
const ADMIN_ADDRESS: SocketAddr = loopback(9083);

/// As long as a cluster's name service keeps an answer, usually.
const RESOLVE_INTERVAL: Duration = Duration::from_secs(30);
const DRAIN_TIMEOUT: Duration = Duration::from_secs(25);
/// Nobody who ends a process by hand wants to wait; a balancer's operator says how long it takes.
const WITHDRAW_TIMEOUT: Duration = Duration::ZERO;

/// Two, so that a lost segment stalls half of the exchanges only.
const LANES: usize = 2;

pub(crate) const ROOT_KEYS: &[&str] = &[
    "version",
    "relay",
    "sidecar",
    "tunnels",
    "routes",
    "plugins",
    "health",
    "admin",
    "log",
    "drain_timeout",
    "withdraw_timeout",
];
pub(crate) const RELAY_KEYS: &[&str] = &[
    "listeners",
    "base_domains",
    "trusted_proxies",
    "max_connection_age",
    "tunnel",
    "credentials",
    "token_issuers",
    "acme",
    "warmup",
    "threads",
    "limits",
    "timeouts",
];
pub(crate) const WARMUP_KEYS: &[&str] = &["time", "sessions"];
pub(crate) const LISTENER_KEYS: &[&str] = &[
    "name",
    "address",
    "tls",
    "https_redirect",
    "protocol_type",
    "sniff",
    "proxy_protocol",
    "balance",
];
pub(crate) const RELAY_TUNNEL_KEYS: &[&str] = &[
    "address",
    "listener",
    "tls",
    "insecure",
    "token",
    "token_file",
    "token_env",
    "advertise",
    "grace",
    "replay",
    "peers",
];
pub(crate) const RELAY_LIMITS_KEYS: &[&str] = &[
    "connections",
    "sessions",
    "sessions_per_principal",
    "lanes_per_session",
    "exchanges_per_session",
    "streams_per_connection",
    "request_head",
    "request_headers",
    "queued",
    "window",
    "handshakes_per_second",
    "handshakes_per_second_per_address",
    "failed_handshakes_per_minute_per_address",
    "tls_handshakes",
    "tls_handshakes_per_address",
];
pub(crate) const RELAY_TIMEOUTS_KEYS: &[&str] =
    &["request_head", "idle", "open_wait", "handshake", "tls_handshake"];
pub(crate) const SIDECAR_KEYS: &[&str] = &[
    "name",
    "relays",
    "proxy",
    "follow_peers",
    "resolve_interval",
    "token",
    "token_file",
    "token_env",
    "lanes",
    "dedicated",
    "threads",
    "limits",
    "timeouts",
];
pub(crate) const RELAY_ADDRESS_KEYS: &[&str] = &["address", "tls", "insecure", "fallback", "proxy"];
pub(crate) const SIDECAR_LIMITS_KEYS: &[&str] =
    &["exchanges_per_session", "queued", "window", "replay"];
pub(crate) const SIDECAR_TIMEOUTS_KEYS: &[&str] = &["dial", "handshake"];
pub(crate) const TUNNEL_KEYS: &[&str] = &[
    "name",
    "service",
    "protocols",
    "connect_timeout",
    "tls",
    "http_version",
    "pool",
    "proxy_protocol",
    "health_check",
    "wait",
    "weight",
];
pub(crate) const POOL_KEYS: &[&str] = &["idle_timeout", "idle", "connections"];
pub(crate) const HEALTH_CHECK_KEYS: &[&str] =
    &["type", "path", "host", "service", "interval", "timeout", "healthy_after", "unhealthy_after"];
pub(crate) const ROUTE_KEYS: &[&str] = &[
    "name",
    "subdomain",
    "host",
    "wildcard",
    "path_prefix",
    "listener",
    "protocol_type",
    "tunnel",
    "tunnels",
    "timeouts",
    "retries",
    "request_headers",
    "response_headers",
    "rewrite",
    "redirect",
    "basic_auth",
    "addresses",
    "limits",
    "compression",
    "hsts",
    "affinity",
    "options",
];
pub(crate) const SHARE_KEYS: &[&str] = &["name", "weight"];
pub(crate) const PLUGINS_KEYS: &[&str] =
    &["directory", "libraries", "generations", "panics", "panics_within", "slow_poll"];
pub(crate) const LIBRARY_KEYS: &[&str] =
    &["name", "library", "sha256", "required", "protocol_types", "config"];
pub(crate) const HEALTH_KEYS: &[&str] = &["address"];
pub(crate) const ADMIN_KEYS: &[&str] = &["address"];
pub(crate) const LOG_KEYS: &[&str] = &["level", "format"];

/// Reads the configuration as far as it goes.
///
/// # Errors
/// What keeps the files from being read as YAML.
pub(super) fn read(
    source: &Source,
    env: &dyn Fn(&str) -> Option<String>,
) -> Result<Draft, ConfigErrors> {
    let names = merge::names(source);
    let texts: Vec<&str> = source.files.iter().map(|file| file.text.as_str()).collect();
    let sink = RefCell::new(Sink::new(names.clone()));
    let mut documents = Vec::new();
    let mut values = 0;
    for (index, text) in texts.iter().enumerate() {
        let file = u16::try_from(index).unwrap_or(u16::MAX);
        match raw::parse(text, file) {
            Ok(mut document) => {
                raw::once(&mut document, "", &mut sink.borrow_mut());
                values += document.count();
                documents.push(document);
            }
            Err((position, message)) => sink.borrow_mut().push(position, "", message),
        }
    }
    if values > raw::NODES_MAX {
        let position = Position { file: sink.borrow().whole(), ..Position::default() };
        let message = format!("is too large (accepted: {} values in all files)", raw::NODES_MAX);
        sink.borrow_mut().push(position, "", message);
    }
    if documents.len() < texts.len() || values > raw::NODES_MAX {
        // What stands in a file that cannot be read would be missed in the others.
        return Err(sink.into_inner().into_parts(&texts).0.expect("an error was pushed"));
    }
    let mut root = merge::merge(documents, &sink);
    let mut files = Files::new(source);
    let mut context = Context { env, files: &mut files };
    substitute::substitute(&mut root, "", &mut context, &mut sink.borrow_mut());

    let mut reader = Reader { env, files, now: SystemTime::now(), plugins_mistyped: false };
    let mut config = reader.config(&Field::new(&root, "", &sink));
    let plugins_whole = !sink.borrow().has_errors_at("plugins") && !reader.plugins_mistyped;
    // Of more errors than are told, one may be there.
    let admin_whole = !sink.borrow().is_full() && !sink.borrow().has_errors_at("admin");
    let (errors, warnings) = sink.into_inner().into_parts(&texts);
    config.warnings = warnings;
    config.files = reader.files.read;
    config.files.sort();
    config.files.dedup();
    config.origin = Origin { files: names, root: Arc::new(root) };
    Ok(Draft { config, errors, source: source.clone(), plugins_whole, admin_whole })
}

/// Reads policies as an announcement carries them: JSON with the keys of a route in a file.
pub(super) fn read_policies(json: &str) -> Result<Policies, Vec<String>> {
    let value: serde_json::Value =
        serde_json::from_str(json).map_err(|error| vec![format!("not valid JSON: {error}")])?;
    let sink = RefCell::new(Sink::new(vec!["".into()]));
    let root = raw::Node::from(value);
    let field = Field::new(&root, "", &sink);
    let mut policies = field.section(policies::POLICY_KEYS).map(|s| policies::policies(&s, None));
    for changes in
        policies.iter_mut().flat_map(|p| [&mut p.request_headers, &mut p.response_headers])
    {
        let values = changes.set.iter_mut().chain(&mut changes.add);
        values.for_each(|(_, value)| value.set_sensitive(true));
    }
    let texts = sink.borrow().texts();
    match policies {
        Some(policies) if texts.is_empty() => Ok(policies),
        _ => Err(texts),
    }
}

struct Reader<'a> {
    env: &'a dyn Fn(&str) -> Option<String>,
    files: Files<'a>,
    /// What certificates' times are compared with.
    now: SystemTime,
    /// A key that seems to mean `plugins` was told as unknown.
    plugins_mistyped: bool,
}

impl Reader<'_> {
    /// Returns the configuration; where a fault was told, parts of it are defaults.
    fn config(&mut self, field: &Field<'_>) -> Config {
        let mut config = Config {
            relay: None,
            sidecar: None,
            tunnels: Vec::new(),
            routes: Vec::new(),
            plugins: Plugins::default(),
            health: None,
            admin: None,
            log: Log::default(),
            drain_timeout: DRAIN_TIMEOUT,
            withdraw_timeout: WITHDRAW_TIMEOUT,
            files: Vec::new(),
            warnings: Vec::new(),
            origin: Origin {
                files: Vec::new(),
                root: Arc::new(raw::Node {
                    position: Position::default(),
                    value: raw::Value::Null,
                }),
            },
        };
        let Some(root) = field.section(ROOT_KEYS) else { return config };
        self.plugins_mistyped = root.is_mistyped("plugins");
        if let Some(version) = root.require("version", "1") {
            version.parse(|text| {
                if text.parse() == Ok(VERSION) {
                    Ok(())
                } else {
                    Err(format!("\"{text}\" is not a known version (accepted: {VERSION})"))
                }
            });
        }
        if root.field("relay").is_none()
            && root.field("sidecar").is_none()
            && !root.is_mistyped("relay")
            && !root.is_mistyped("sidecar")
        {
            root.fail(
                "has nothing to run (accepted: a `relay` section, a `sidecar` section, or both)",
            );
        }
        config.relay = root.field("relay").and_then(|field| self.relay(&field));
        let has_relay = root.field("relay").is_some();
        config.sidecar = root.field("sidecar").and_then(|field| self.sidecar(&field, has_relay));
        embedded(&root, &config);
        let tunnels_field = root.field("tunnels");
        if let Some(field) = &tunnels_field {
            let tunnels = items(field, |item| self.tunnel(item));
            unique(field, "tunnel", &tunnels, |tunnel| &tunnel.name);
            config.tunnels = arcs(tunnels);
        }
        if let Some(field) = root.field("routes") {
            // Names as written, so that a tunnel with another fault is not unknown as well.
            let known = routes::Known {
                tunnels: ((root.field("sidecar").is_some() || tunnels_field.is_some())
                    && !root.is_mistyped("tunnels"))
                .then(|| {
                    Names::new(tunnels_field.as_ref().map(Field::item_names).unwrap_or_default())
                }),
                listeners: root.field("relay").map(|relay| {
                    let listeners = relay.child("listeners");
                    Names::new(listeners.as_ref().map_or_else(|| vec!["web"], Field::item_names))
                }),
            };
            let routes = items(&field, |item| routes::route(item, &known, &mut self.files));
            if meaning::ambiguous(&field, &routes, config.relay.as_ref()) {
                // Routes without a name that take the same are called the same as well.
                unique(&field, "route", &routes, |route| &route.name);
                if let Some(relay) = &config.relay {
                    meaning::shadowed(&field, &routes, relay);
                }
            }
            meaning::unreachable(&field, &routes, &config);
            meaning::unlikely(
                tunnels_field.as_ref(),
                Some((&field, &routes)),
                root.field("sidecar").as_ref(),
                &config,
            );
            config.routes = arcs(routes);
        } else {
            meaning::unlikely(
                tunnels_field.as_ref(),
                None,
                root.field("sidecar").as_ref(),
                &config,
            );
        }

        if let Some(field) = root.field("plugins") {
            config.plugins = self.plugins(&field);
        }
        config.health = root.field("health").and_then(|field| {
            let section = field.section(HEALTH_KEYS)?;
            let mut address = HEALTH_ADDRESS;
            section.set("address", &mut address, |f| f.parse(value::socket_address));
            Some(address)
        });
        config.admin = root.field("admin").and_then(|field| admin(&field));
        if let Some(field) = root.field("log") {
            config.log = log(&field);
        }
        root.set("drain_timeout", &mut config.drain_timeout, |f| timeout(f, Duration::ZERO));
        root.set("withdraw_timeout", &mut config.withdraw_timeout, |f| timeout(f, Duration::ZERO));
        Self::distinct_addresses(&root, &config);
        config
    }

    /// Reads one of `token`, `token_file`, `token_env`. Returns the file it came from, where it came from one;
    /// `None` after a fault.
    fn token(
        &mut self,
        section: &Section<'_>,
        target: &mut Option<Secret>,
    ) -> Option<Option<PathBuf>> {
        let keys = ["token", "token_file", "token_env"];
        let Some((field, text)) = self.secret(section, keys)? else { return Some(None) };
        if let Err(message) = token(&text) {
            field.fail(message);
            return None;
        }
        *target = Some(Secret::new(&text));
        let file = section.field("token_file").and_then(|field| field.text());
        Some(file.map(|path| self.files.path(path)))
    }

    /// Two sockets on one address: the second could not be bound.
    fn distinct_addresses(root: &Section<'_>, config: &Config) {
        let mut places: Vec<(SocketAddr, String, Option<Field<'_>>)> = Vec::new();
        if let Some(relay) = &config.relay {
            let field = root.field("relay");
            let listeners = field.as_ref().and_then(|field| field.child("listeners"));
            for (index, listener) in relay.listeners.iter().enumerate() {
                let item = listeners.as_ref().and_then(|listeners| listeners.item(index));
                let path = format!("relay.listeners[{index}].address");
                places.push((listener.address, path, item.and_then(|item| item.child("address"))));
            }
            let tunnel = field.and_then(|field| field.child("tunnel"));
            let tunnel = tunnel.and_then(|tunnel| tunnel.child("address"));
            if let Some(address) = relay.tunnel.address {
                places.push((address, "relay.tunnel.address".to_owned(), tunnel));
            }
        }
        for (key, address) in [("health", config.health), ("admin", config.admin)] {
            if let Some(address) = address {
                let field = root.field(key).map(|field| field.child("address").unwrap_or(field));
                places.push((address, format!("{key}.address"), field));
            }
        }
        for (index, (address, path, field)) in places.iter().enumerate() {
            let earlier = places[..index].iter().find(|(earlier, ..)| earlier == address);
            // Port 0 is another port each time.
            if let (Some((_, other, other_field)), true) = (earlier, address.port() != 0) {
                // A default has no place in the file; then the other's place is told.
                match (field, other_field) {
                    (Some(field), _) => field.fail(format!("{address} is taken by {other}")),
                    (None, Some(field)) => field.fail(format!("{address} is taken by {path}")),
                    (None, None) => root.fail(&format!("{address} is taken by {other} and {path}")),
                }
            }
        }
    }
}

/// Returns what is wrong with a token, of which it says nothing.
pub(crate) fn token(text: &str) -> Result<(), String> {
    if !(TOKEN_BYTES_MIN..=TOKEN_BYTES_MAX).contains(&text.len()) {
        return Err(format!(
            "is a token of {} bytes (accepted: {TOKEN_BYTES_MIN} to {TOKEN_BYTES_MAX})",
            text.len()
        ));
    }
    if text.chars().any(|c| c.is_whitespace() || c.is_control()) {
        return Err(
            "is a token with white space or control characters in it (accepted: none)".to_owned()
        );
    }
    Ok(())
}

/// Tells a sidecar that would have to dial the relay of its own process where that has no address.
fn embedded(root: &Section<'_>, config: &Config) {
    let (Some(relay), Some(sidecar)) = (&config.relay, &config.sidecar) else { return };
    let tunnel = root.field("relay").and_then(|relay| relay.child("tunnel"));
    let relays = root.field("sidecar").and_then(|sidecar| sidecar.child("relays"));
    if sidecar.relays == Relays::Embedded
        && relay.tunnel.address.is_none()
        && relays.is_none()
        && let Some(tunnel) = tunnel
        && !tunnel.is_told("relay.tunnel.address")
    {
        tunnel.child("listener").unwrap_or(tunnel).fail(
            "leaves the sidecar of this process no way in (accepted: `address` beside it, a loopback \
             address say, or sidecar.relays)",
        );
    }
}

/// Returns which of the keys is there. `None`: more than one is, which is told; `Some(None)`: none.
fn one_of_keys(section: &Section<'_>, keys: &[&'static str]) -> Option<Option<&'static str>> {
    let given: Vec<&'static str> =
        keys.iter().copied().filter(|key| section.field(key).is_some()).collect();
    if given.len() > 1 {
        section.fail(&format!(
            "has {} at once (accepted: one of {})",
            given.join(" and "),
            keys.join(", ")
        ));
        return None;
    }
    Some(given.first().copied())
}

fn protocol_types(field: &Field<'_>) -> Option<Vec<Arc<str>>> {
    let types = field.list_of(|item| item.parse(value::protocol_type))?;
    if field.is_empty() {
        field.fail(
            "is empty (accepted: at least one protocol type, as in HTTP; without the key: all)",
        );
    }
    twice(field, &types);
    Some(types)
}

/// Names that may be referred to.
struct Names<'a> {
    set: HashSet<&'a str>,
    sorted: Vec<&'a str>,
}

impl<'a> Names<'a> {
    fn new(mut names: Vec<&'a str>) -> Self {
        names.sort_unstable();
        names.dedup();
        Self { set: names.iter().copied().collect(), sorted: names }
    }
}

fn refer(field: &Field<'_>, kind: &str, declared: &Names<'_>) {
    field.parse(|text| {
        if declared.set.contains(text) {
            return Ok(());
        }
        // Whoever has thousands of wrong names has the time for a hundred suggestions only.
        if field.is_full() {
            return Err(String::new());
        }
        let near = did_you_mean(text, declared.sorted.iter().copied());
        let declared = list(declared.sorted.iter().copied());
        Err(format!("unknown {kind} \"{text}\" (declared: {declared}){near}"))
    });
}

fn block(field: &Field<'_>) -> Block {
    let value = field.node().to_json();
    let text = if value.is_null() { String::new() } else { value.to_string() };
    Block { text: text.into(), masked: field.node().to_masked_json(), value }
}

fn admin(field: &Field<'_>) -> Option<SocketAddr> {
    let section = field.section(ADMIN_KEYS)?;
    let mut address = ADMIN_ADDRESS;
    section.set("address", &mut address, |f| {
        f.parse(|text| {
            let address = value::socket_address(text)?;
            if address.ip().is_loopback() {
                Ok(address)
            } else {
                Err(format!("{text} is open to others (accepted: a loopback address)"))
            }
        })
    });
    Some(address)
}

fn log(field: &Field<'_>) -> Log {
    let mut log = Log::default();
    let Some(section) = field.section(LOG_KEYS) else { return log };
    section.set("level", &mut log.level, |f| f.parse(log_level));
    section.set("format", &mut log.format, |f| {
        f.one_of(&[("text", LogFormat::Text), ("json", LogFormat::Json)])
    });
    log
}

/// A word alone would be a target to tracing's filter, and its typing error no error.
fn log_level(text: &str) -> Result<Arc<str>, String> {
    const LEVELS: [&str; 6] = ["error", "warn", "info", "debug", "trace", "off"];
    for directive in text.split(',') {
        let level = directive.rsplit_once('=').map_or(directive, |(_, level)| level);
        if !LEVELS.contains(&level) {
            return Err(format!(
                "\"{level}\" is not a level (accepted: {}; also target=level, joined by commas){}",
                list(LEVELS),
                did_you_mean(level, LEVELS)
            ));
        }
    }
    text.parse::<tracing_subscriber::filter::Targets>()
        .map(|_| text.into())
        .map_err(|error| format!("\"{text}\" is not accepted: {error}"))
}

/// Reads a list of named things, with their indices in the file.
fn items<T>(field: &Field<'_>, mut read: impl FnMut(&Field<'_>) -> Option<T>) -> Vec<(usize, T)> {
    let items = field.items().unwrap_or_default();
    if items.len() > ITEMS_MAX {
        field.fail(format!("has {} items (accepted: at most {ITEMS_MAX})", items.len()));
        return Vec::new();
    }
    items.iter().enumerate().filter_map(|(index, item)| Some((index, read(item)?))).collect()
}

fn arcs<T>(items: Vec<(usize, T)>) -> Vec<Arc<T>> {
    items.into_iter().map(|(_, item)| Arc::new(item)).collect()
}

/// Tells each text that stands in a list again.
fn twice(field: &Field<'_>, texts: &[Arc<str>]) {
    for (_, again) in duplicates(texts.iter().map(AsRef::as_ref)) {
        // Faulty items are left out of `texts`, so an index is a place only where there are none.
        let place = field.item(again).filter(|_| field.item(texts.len()).is_none());
        place.as_ref().unwrap_or(field).fail(format!("\"{}\" stands here twice", texts[again]));
    }
}

/// Returns `, at FILE:LINE:COLUMN` of a list's item.
fn at(field: &Field<'_>, index: usize) -> String {
    field.item(index).map_or_else(String::new, |item| format!(", at {}", item.place()))
}

/// Tells each name that an earlier item has.
fn unique<T>(field: &Field<'_>, kind: &str, items: &[(usize, T)], name: fn(&T) -> &str) {
    for (first, again) in duplicates(items.iter().map(|(_, item)| name(item))) {
        let (first, (again, item)) = (items[first].0, &items[again]);
        let Some(place) = field.item(*again) else { continue };
        let message = format!(
            "{kind} \"{}\" is declared already, as {}[{first}]{} (accepted: a name of its own)",
            name(item),
            field.path(),
            at(field, first)
        );
        place.child("name").unwrap_or(place).fail(message);
    }
}

fn timeout(field: &Field<'_>, min: Duration) -> Option<Duration> {
    duration_within(field, min, TIMEOUT_MAX)
}

fn duration_within(field: &Field<'_>, min: Duration, max: Duration) -> Option<Duration> {
    field.parse(|text| {
        let value = value::duration(text)?;
        if (min..=max).contains(&value) {
            Ok(value)
        } else {
            Err(format!(
                "{text} is out of bounds (accepted: {} to {})",
                duration_text(min),
                duration_text(max)
            ))
        }
    })
}

fn size(field: &Field<'_>, min: u64, max: u64) -> Option<u64> {
    field.parse(|text| {
        let value = value::size(text)?;
        if (min..=max).contains(&value) {
            Ok(value)
        } else {
            Err(format!(
                "{text} is out of bounds (accepted: {} to {})",
                size_text(min),
                size_text(max)
            ))
        }
    })
}

/// Reads a list of networks.
fn networks(field: &Field<'_>, max: usize) -> Option<Vec<IpNet>> {
    let networks = field.list_of(|item| item.parse(value::network))?;
    if networks.len() > max {
        field.fail(format!("has {} networks (accepted: at most {max})", networks.len()));
        return None;
    }
    Some(networks)
}

/// The machine's name, as far as it is a name for us.
fn host_name() -> Arc<str> {
    let uname = rustix::system::uname();
    let name = uname.nodename().to_string_lossy();
    value::name(&name).unwrap_or_else(|_| "sidecar".into())
}

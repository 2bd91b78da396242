//! From the document's tree to a [`Config`]: the language's keys, their bounds, and what must hold
//! between them. Goes on after a fault, with a default in its place, so that all are told.

use std::cell::RefCell;
use std::collections::BTreeMap;
use std::net::{IpAddr, Ipv4Addr, SocketAddr};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use super::error::{Sink, did_you_mean, list};
use super::raw::{self, Field, Section};
use super::substitute::{self, Context};
use super::{
    Balance, Block, Carries, Config, ConfigErrors, HttpVersion, Library, Listener, Log, LogFormat,
    Match, MatchSpec, Origin, Plugins, Pool, Relay, RelayLimits, RelayTimeouts, RelayTunnel,
    Relays, Route, Secret, ServiceAddress, Share, Sidecar, SidecarLimits, SidecarTimeouts, Source,
    Tunnel, duplicates, duration_text, size_text, value,
};
use crate::router::RouteTable;

/// Version of the language.
const VERSION: u32 = 1;

/// Most data-path threads: beyond the cores they only cost.
const THREADS_MAX: usize = 256;

/// Most lanes of a session (the tunnel's own bound).
const LANES_MAX: usize = 16;

/// Longest timeout. Longer ones are a mistaken unit.
const TIMEOUT_MAX: Duration = Duration::from_secs(24 * 3600);

/// Most of any one thing in a list; bounds metric labels and the watch on a relay.
const ITEMS_MAX: usize = 65_536;

/// Shortest token. Guessing 16 characters over a network is hopeless, shorter ones are typed by hand.
const TOKEN_BYTES_MIN: usize = 16;

/// Longest token; it travels in the hello.
const TOKEN_BYTES_MAX: usize = 4096;

const fn loopback(port: u16) -> SocketAddr {
    SocketAddr::new(IpAddr::V4(Ipv4Addr::LOCALHOST), port)
}

/// Defaults of the addresses: loopback, so that a file says so before the world may come in.
const WEB_ADDRESS: SocketAddr = loopback(9080);
const TUNNEL_ADDRESS: SocketAddr = loopback(9081);
const HEALTH_ADDRESS: SocketAddr = loopback(9082);
const ADMIN_ADDRESS: SocketAddr = loopback(9083);

const CONNECT_TIMEOUT: Duration = Duration::from_secs(5);
/// Below the time that a cluster's name service keeps an answer, usually 30 s.
const RESOLVE_INTERVAL: Duration = Duration::from_secs(30);
const DRAIN_TIMEOUT: Duration = Duration::from_secs(25);

/// Two, so that a lost segment stalls half of the exchanges only.
const LANES: usize = 2;

pub(super) const ROOT_KEYS: &[&str] = &[
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
];
pub(super) const RELAY_KEYS: &[&str] =
    &["listeners", "base_domains", "tunnel", "threads", "limits", "timeouts"];
pub(super) const LISTENER_KEYS: &[&str] = &["name", "address", "protocol_type"];
pub(super) const RELAY_TUNNEL_KEYS: &[&str] = &["address", "token", "token_file", "token_env"];
pub(super) const RELAY_LIMITS_KEYS: &[&str] = &[
    "connections",
    "sessions",
    "lanes_per_session",
    "exchanges_per_session",
    "streams_per_connection",
    "request_head",
    "request_headers",
    "queued",
    "window",
    "handshakes_per_second",
    "handshakes_per_second_per_address",
];
pub(super) const RELAY_TIMEOUTS_KEYS: &[&str] = &["request_head", "idle", "open_wait", "handshake"];
pub(super) const SIDECAR_KEYS: &[&str] = &[
    "name",
    "relays",
    "token",
    "token_file",
    "token_env",
    "lanes",
    "threads",
    "limits",
    "timeouts",
];
pub(super) const SIDECAR_LIMITS_KEYS: &[&str] = &["exchanges_per_session", "queued", "window"];
pub(super) const SIDECAR_TIMEOUTS_KEYS: &[&str] = &["dial", "handshake"];
pub(super) const TUNNEL_KEYS: &[&str] = &["name", "service", "protocols", "connect_timeout"];
pub(super) const ROUTE_KEYS: &[&str] = &[
    "name",
    "subdomain",
    "host",
    "wildcard",
    "path_prefix",
    "listener",
    "protocol_type",
    "tunnel",
    "options",
];
pub(super) const PLUGINS_KEYS: &[&str] =
    &["directory", "libraries", "generations", "panics", "panics_within", "slow_poll"];
pub(super) const LIBRARY_KEYS: &[&str] =
    &["name", "library", "sha256", "required", "protocol_types", "config"];
pub(super) const HEALTH_KEYS: &[&str] = &["address"];
pub(super) const ADMIN_KEYS: &[&str] = &["address"];
pub(super) const LOG_KEYS: &[&str] = &["level", "format"];

/// Reads the configuration.
pub(super) fn read(
    source: &Source,
    env: &dyn Fn(&str) -> Option<String>,
) -> Result<Config, ConfigErrors> {
    let file: Arc<str> = source.path.display().to_string().into();
    let mut sink = Sink::new(file.clone());
    let mut root = match raw::parse(&source.text) {
        Ok(root) => root,
        Err((position, message)) => {
            sink.push(position, "", message);
            return Err(sink.into_result(&source.text).expect_err("an error was pushed"));
        }
    };
    let directory = source.path.parent().unwrap_or_else(|| Path::new(""));
    let mut context = Context { env, directory, files: Vec::new() };
    substitute::substitute(&mut root, "", &mut context, &mut sink);

    let sink = RefCell::new(sink);
    let mut reader = Reader { env, directory, files: context.files };
    let mut config = reader.config(&Field::new(&root, "", &sink));
    sink.into_inner().into_result(&source.text)?;
    config.files = reader.files;
    config.files.sort();
    config.files.dedup();
    config.origin = Origin { file, root: Arc::new(root) };
    Ok(config)
}

struct Reader<'a> {
    env: &'a dyn Fn(&str) -> Option<String>,
    directory: &'a Path,
    files: Vec<PathBuf>,
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
            files: Vec::new(),
            origin: Origin {
                file: "".into(),
                root: Arc::new(raw::Node {
                    position: super::Position::default(),
                    value: raw::Value::Null,
                }),
            },
        };
        let Some(root) = field.section(ROOT_KEYS) else { return config };
        if let Some(version) = root.require("version", "1") {
            version.parse(|text| {
                if text.parse() == Ok(VERSION) {
                    Ok(())
                } else {
                    Err(format!("\"{text}\" is not a known version (accepted: {VERSION})"))
                }
            });
        }
        if root.field("relay").is_none() && root.field("sidecar").is_none() {
            root.fail(
                "has nothing to run (accepted: a `relay` section, a `sidecar` section, or both)",
            );
        }
        config.relay = root.field("relay").and_then(|field| self.relay(&field));
        let has_relay = root.field("relay").is_some();
        config.sidecar = root
            .field("sidecar")
            .and_then(|field| self.sidecar(&field, has_relay, config.relay.as_ref()));
        let tunnels_field = root.field("tunnels");
        if let Some(field) = &tunnels_field {
            let tunnels = items(field, tunnel);
            unique(field, "tunnel", &tunnels, |tunnel| &tunnel.name);
            config.tunnels = arcs(tunnels);
        }
        if let Some(field) = root.field("routes") {
            // Names as written, so that a tunnel with another fault is not unknown as well.
            let known = Known {
                tunnels: (root.field("sidecar").is_some() || tunnels_field.is_some())
                    .then(|| tunnels_field.as_ref().map(Field::item_names).unwrap_or_default()),
                listeners: root.field("relay").map(|relay| {
                    relay.child("listeners").as_ref().map_or_else(|| vec!["web"], Field::item_names)
                }),
            };
            let routes = items(&field, |item| route(item, &known));
            if ambiguous(&field, &routes, config.relay.as_ref()) {
                // Routes without a name that take the same are called the same as well.
                unique(&field, "route", &routes, |route| &route.name);
            }
            unreachable(&field, &routes, &config);
            config.routes = arcs(routes);
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
        Self::distinct_addresses(&root, &config);
        config
    }

    fn relay(&mut self, field: &Field<'_>) -> Option<Relay> {
        let section = field.section(RELAY_KEYS)?;
        let mut relay = Relay {
            listeners: vec![Arc::new(Listener {
                name: "web".into(),
                address: WEB_ADDRESS,
                carries: Carries::Http,
                proxy_protocol: false,
                balance: Balance::Kernel,
            })],
            base_domains: vec!["localhost".into()],
            trusted_proxies: Vec::new(),
            max_connection_age: None,
            tunnel: RelayTunnel { address: TUNNEL_ADDRESS, token: None },
            threads: 0,
            limits: RelayLimits::default(),
            timeouts: RelayTimeouts::default(),
        };
        if let Some(field) = section.field("listeners") {
            let listeners = items(&field, listener);
            unique(&field, "listener", &listeners, |listener| &listener.name);
            relay.listeners = arcs(listeners);
            if field.is_empty() {
                field.fail("is empty (accepted: at least one listener; without the key: web on 127.0.0.1:9080)");
            }
        }
        section.set("base_domains", &mut relay.base_domains, |field| {
            let domains = field.list_of(|item| item.parse(value::host))?;
            twice(field, &domains);
            if field.is_empty() {
                field.fail("is empty (accepted: at least one domain, as in localhost)");
            }
            Some(domains)
        });
        if let Some(field) = section.field("tunnel")
            && let Some(section) = field.section(RELAY_TUNNEL_KEYS)
        {
            self.relay_tunnel(&section, &mut relay.tunnel);
        }
        section.set("threads", &mut relay.threads, |f| f.integer(0, THREADS_MAX));
        if let Some(field) = section.field("limits") {
            relay_limits(&field, &mut relay.limits);
        }
        if let Some(field) = section.field("timeouts")
            && let Some(section) = field.section(RELAY_TIMEOUTS_KEYS)
        {
            let timeouts = &mut relay.timeouts;
            let positive = |f: &Field<'_>| timeout(f, Duration::from_millis(1));
            section.set("request_head", &mut timeouts.request_head, positive);
            section.set("idle", &mut timeouts.idle, positive);
            section.set("open_wait", &mut timeouts.open_wait, |f| timeout(f, Duration::ZERO));
            section.set("handshake", &mut timeouts.handshake, positive);
        }
        Some(relay)
    }

    fn relay_tunnel(&mut self, section: &Section<'_>, tunnel: &mut RelayTunnel) {
        section.set("address", &mut tunnel.address, |f| f.parse(value::socket_address));
        let as_written = self.token(section, &mut tunnel.token);
        if as_written
            && tunnel.token.is_none()
            && !tunnel.address.ip().is_loopback()
            && let Some(field) = section.field("address")
        {
            field.fail(format!(
                "{} is open to others and asks for no token (accepted: a loopback address, or one \
                 of token, token_file, token_env beside it)",
                tunnel.address
            ));
        }
    }

    fn sidecar(
        &mut self,
        field: &Field<'_>,
        has_relay: bool,
        relay: Option<&Relay>,
    ) -> Option<Sidecar> {
        let section = field.section(SIDECAR_KEYS)?;
        let mut sidecar = Sidecar {
            name: host_name(),
            relays: Relays::Embedded,
            resolve_interval: RESOLVE_INTERVAL,
            token: None,
            lanes: LANES,
            threads: 1,
            limits: SidecarLimits::default(),
            timeouts: SidecarTimeouts::default(),
        };
        section.set("name", &mut sidecar.name, |f| f.parse(value::name));
        let token_as_written = self.token(&section, &mut sidecar.token);
        match section.field("relays") {
            Some(relays) => {
                if let Some(listed) = relays.list_of(|item| item.parse(value::host_port)) {
                    if relays.is_empty() {
                        relays.fail("is empty (accepted: at least one relay as host:port)");
                    }
                    if let Some(open) = listed.iter().find(|relay| !relay.is_loopback())
                        && sidecar.token.is_none()
                        && token_as_written
                    {
                        relays.fail(format!(
                            "{open} is another machine and gets no token (accepted: loopback \
                             addresses, or one of token, token_file, token_env)"
                        ));
                    }
                    sidecar.relays = Relays::Listed(listed);
                }
            }
            None if !has_relay => section.fail(
                "`relays` is missing (accepted: a list of host:port; only beside a `relay` section \
                 it may be left out)",
            ),
            None => {
                if sidecar.token.is_none() {
                    sidecar.token = relay.and_then(|relay| relay.tunnel.token.clone());
                }
            }
        }
        section.set("lanes", &mut sidecar.lanes, |f| f.integer(1, LANES_MAX));
        section.set("threads", &mut sidecar.threads, |f| f.integer(0, THREADS_MAX));
        if let Some(field) = section.field("limits")
            && let Some(section) = field.section(SIDECAR_LIMITS_KEYS)
        {
            let limits = &mut sidecar.limits;
            section.set("exchanges_per_session", &mut limits.exchanges_per_session, |f| {
                f.integer(1, 1_000_000)
            });
            section.set("queued", &mut limits.queued, |f| size(f, 1 << 20, 1 << 40));
            section.set("window", &mut limits.window, |f| size(f, 64 << 10, 64 << 20));
        }
        if let Some(field) = section.field("timeouts")
            && let Some(section) = field.section(SIDECAR_TIMEOUTS_KEYS)
        {
            let timeouts = &mut sidecar.timeouts;
            let positive = |f: &Field<'_>| timeout(f, Duration::from_millis(1));
            section.set("dial", &mut timeouts.dial, positive);
            section.set("handshake", &mut timeouts.handshake, positive);
        }
        Some(sidecar)
    }

    /// Reads one of `token`, `token_file`, `token_env`. Returns whether `target` is what the file
    /// says: false after a fault.
    fn token(&mut self, section: &Section<'_>, target: &mut Option<Secret>) -> bool {
        let given: Vec<&str> = ["token", "token_file", "token_env"]
            .into_iter()
            .filter(|key| section.field(key).is_some())
            .collect();
        let [key] = given.as_slice() else {
            if given.len() > 1 {
                section.fail(&format!(
                    "has {} at once (accepted: one of token, token_file, token_env)",
                    given.join(" and ")
                ));
            }
            return given.is_empty();
        };
        let Some(field) = section.field(key) else { return false };
        let text = match *key {
            "token" => field.secret().map(str::to_owned),
            "token_file" => field.text().and_then(|path| {
                let path = self.directory.join(path);
                let text = substitute::read_secret(&path);
                self.files.push(path);
                text.map_err(|message| field.fail(message)).ok()
            }),
            _ => field.text().and_then(|name| {
                let text = (self.env)(name);
                if text.is_none() {
                    field.fail(format!("environment variable \"{name}\" is not set"));
                }
                text
            }),
        };
        let Some(text) = text else { return false };
        if !(TOKEN_BYTES_MIN..=TOKEN_BYTES_MAX).contains(&text.len()) {
            field.fail(format!(
                "is a token of {} bytes (accepted: {TOKEN_BYTES_MIN} to {TOKEN_BYTES_MAX})",
                text.len()
            ));
            return false;
        }
        if text.chars().any(|c| c.is_whitespace() || c.is_control()) {
            field.fail("is a token with white space or control characters in it");
            return false;
        }
        *target = Some(Secret::new(&text));
        true
    }

    fn plugins(&self, field: &Field<'_>) -> Plugins {
        let mut plugins = Plugins::default();
        let Some(section) = field.section(PLUGINS_KEYS) else { return plugins };
        let mut directory = self.directory.to_owned();
        section.set("directory", &mut directory, |f| Some(self.directory.join(f.text()?)));
        if let Some(field) = section.field("libraries") {
            let libraries = items(&field, |item| library(item, &directory));
            unique(&field, "plugin", &libraries, |library| &library.name);
            plugins.libraries = libraries.into_iter().map(|(_, library)| library).collect();
        }
        section.set("generations", &mut plugins.generations, |f| f.integer(1, 256));
        section.set("panics", &mut plugins.panics, |f| f.integer(1, 1_000_000));
        let positive = |f: &Field<'_>| timeout(f, Duration::from_millis(1));
        section.set("panics_within", &mut plugins.panics_within, positive);
        section.set("slow_poll", &mut plugins.slow_poll, positive);
        plugins
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
            places.push((relay.tunnel.address, "relay.tunnel.address".to_owned(), tunnel));
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

fn listener(field: &Field<'_>) -> Option<Listener> {
    let section = field.section(LISTENER_KEYS)?;
    let name = section.require("name", "text").and_then(|f| f.parse(value::name));
    let address = section
        .require("address", "IP:port, as in 127.0.0.1:9080")
        .and_then(|f| f.parse(value::socket_address));
    let mut protocol_type = None;
    section.set("protocol_type", &mut protocol_type, |f| f.parse(value::protocol_type).map(Some));
    let carries = protocol_type.map_or(Carries::Http, Carries::Type);
    let (proxy_protocol, balance) = (false, Balance::Kernel);
    Some(Listener { name: name?, address: address?, carries, proxy_protocol, balance })
}

fn relay_limits(field: &Field<'_>, limits: &mut RelayLimits) {
    let Some(section) = field.section(RELAY_LIMITS_KEYS) else { return };
    section.set("connections", &mut limits.connections, |f| f.integer(1, 10_000_000));
    section.set("sessions", &mut limits.sessions, |f| f.integer(1, 1_000_000));
    section.set("lanes_per_session", &mut limits.lanes_per_session, |f| f.integer(1, LANES_MAX));
    section.set("exchanges_per_session", &mut limits.exchanges_per_session, |f| {
        f.integer(1, 1_000_000)
    });
    section.set("streams_per_connection", &mut limits.streams_per_connection, |f| {
        f.integer(1, 10_000)
    });
    section.set("request_head", &mut limits.request_head, |f| {
        usize::try_from(size(f, 8 << 10, 64 << 10)?).ok()
    });
    section.set("request_headers", &mut limits.request_headers, |f| f.integer(16, 128));
    section.set("queued", &mut limits.queued, |f| size(f, 1 << 20, 1 << 40));
    section.set("window", &mut limits.window, |f| size(f, 64 << 10, 64 << 20));
    section.set("handshakes_per_second", &mut limits.handshakes_per_second, |f| {
        f.integer(1, 1_000_000)
    });
    section.set(
        "handshakes_per_second_per_address",
        &mut limits.handshakes_per_second_per_address,
        |f| f.integer(1, 1_000_000),
    );
}

fn tunnel(field: &Field<'_>) -> Option<Tunnel> {
    let section = field.section(TUNNEL_KEYS)?;
    let name = section.require("name", "text").and_then(|f| f.parse(value::name));
    let service = section
        .require("service", "host:port, as in 127.0.0.1:3000")
        .and_then(|f| f.parse(value::host_port));
    let mut protocols = None;
    section.set("protocols", &mut protocols, |f| protocol_types(f).map(Some));
    let mut connect_timeout = CONNECT_TIMEOUT;
    section.set("connect_timeout", &mut connect_timeout, |f| timeout(f, Duration::from_millis(1)));
    Some(Tunnel {
        name: name?,
        service: ServiceAddress::Tcp(service?),
        protocols,
        connect_timeout,
        http_version: HttpVersion::Http1,
        pool: Pool::default(),
        proxy_protocol: None,
        health_check: None,
        wait: Duration::ZERO,
    })
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

/// What a route's references are checked against; `None`: not known in this process.
struct Known<'a> {
    tunnels: Option<Vec<&'a str>>,
    listeners: Option<Vec<&'a str>>,
}

fn route(field: &Field<'_>, known: &Known<'_>) -> Option<Route> {
    let section = field.section(ROUTE_KEYS)?;
    let texts = ["subdomain", "host", "wildcard", "path_prefix", "listener", "protocol_type"]
        .map(|key| section.field(key).map(|field| field.text()));
    // A part that is there but no text is told already.
    let shapes_good = texts.iter().all(|text| !matches!(text, Some(None)));
    let [subdomain, host, wildcard, path_prefix, listener, protocol_type] =
        texts.map(Option::flatten);
    let spec = MatchSpec { subdomain, host, wildcard, path_prefix, listener, protocol_type };
    let matches = match Match::parse(&spec) {
        _ if !shapes_good => None,
        Ok(matches) => Some(matches),
        Err((key, message)) => {
            match section.field(key) {
                // Through the field, so that what came from a file stays hidden.
                Some(field) => drop(field.parse(|_| Err::<(), _>(message))),
                None => section.fail(&message),
            }
            None
        }
    };
    if let (Some(listeners), Some(name)) = (&known.listeners, section.field("listener")) {
        refer(&name, "listener", listeners);
    }
    let tunnel = section.require("tunnel", "the name of a tunnel").and_then(|field| {
        let name = field.parse(value::name)?;
        if let Some(tunnels) = &known.tunnels {
            refer(&field, "tunnel", tunnels);
        }
        Some(name)
    });
    let mut name = None;
    section.set("name", &mut name, |f| f.parse(value::name).map(Some));
    let mut options = BTreeMap::new();
    section.set("options", &mut options, |f| {
        let mut options = BTreeMap::new();
        for (entry, field) in f.entries()? {
            match value::protocol_type(&entry.key) {
                Ok(protocol_type) => {
                    options.insert(protocol_type, block(&field));
                }
                Err(message) => field.fail(message),
            }
        }
        Some(options)
    });
    let matches = matches?;
    Some(Route {
        name: name.unwrap_or_else(|| matches.to_string().into()),
        tunnels: vec![Share { tunnel: tunnel?, weight: 1 }],
        matches,
        options,
        policies: None,
    })
}

fn refer(field: &Field<'_>, kind: &str, declared: &[&str]) {
    field.parse(|text| {
        if declared.contains(&text) {
            return Ok(());
        }
        let near = did_you_mean(text, declared.iter().copied());
        let declared = list(declared.iter().copied());
        Err(format!("unknown {kind} \"{text}\" (declared: {declared}){near}"))
    });
}

fn library(field: &Field<'_>, directory: &Path) -> Option<Library> {
    let section = field.section(LIBRARY_KEYS)?;
    let name = section.require("name", "text").and_then(|f| f.parse(value::name));
    let path = section.require("library", "the path of a shared library").and_then(|f| {
        f.parse(|text| {
            if text.is_empty() {
                Err("is empty (accepted: the path of a shared library)".into())
            } else {
                Ok(directory.join(text))
            }
        })
    });
    let mut sha256 = None;
    section.set("sha256", &mut sha256, |f| f.parse(value::sha256).map(Some));
    let mut required = true;
    section.set("required", &mut required, Field::boolean);
    let mut types = None;
    section.set("protocol_types", &mut types, |f| protocol_types(f).map(Some));
    let config = section.field("config").map(|field| block(&field)).unwrap_or_default();
    Some(Library { name: name?, path: path?, sha256, required, protocol_types: types, config })
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
fn items<T>(field: &Field<'_>, read: impl Fn(&Field<'_>) -> Option<T>) -> Vec<(usize, T)> {
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

/// Tells each name that an earlier item has.
fn unique<T>(field: &Field<'_>, kind: &str, items: &[(usize, T)], name: fn(&T) -> &str) {
    for (first, again) in duplicates(items.iter().map(|(_, item)| name(item))) {
        let (first, (again, item)) = (items[first].0, &items[again]);
        let Some(place) = field.item(*again) else { continue };
        let message = format!(
            "{kind} \"{}\" is declared already, as {}[{first}] (accepted: a name of its own)",
            name(item),
            field.path()
        );
        place.child("name").unwrap_or(place).fail(message);
    }
}

/// Tells routes that take the same exchanges.
///
/// Returns whether there are none.
fn ambiguous(field: &Field<'_>, routes: &[(usize, Route)], relay: Option<&Relay>) -> bool {
    let placeholder = [Arc::from("localhost")];
    let base_domains = relay.map_or(placeholder.as_slice(), |relay| &relay.base_domains);
    let arcs: Vec<Arc<Route>> = routes.iter().map(|(_, route)| Arc::new(route.clone())).collect();
    let Err(ambiguity) = RouteTable::build(&arcs, base_domains) else { return true };
    let index = |route: &Arc<Route>| {
        arcs.iter().position(|other| Arc::ptr_eq(other, route)).map_or(0, |at| routes[at].0)
    };
    for (first, second) in &ambiguity.pairs {
        let (first_index, second_index) = (index(first), index(second));
        let Some(place) = field.item(second_index) else { continue };
        place.fail(format!(
            "route \"{}\" takes the same exchanges as \"{}\", {}[{first_index}] (accepted: another \
             host, path_prefix, listener or protocol_type)",
            second.name,
            first.name,
            field.path(),
        ));
    }
    false
}

/// Tells routes that no exchange can take, because of what they point at.
fn unreachable(field: &Field<'_>, routes: &[(usize, Route)], config: &Config) {
    for (index, route) in routes {
        let Some(place) = field.item(*index) else { continue };
        let Some(wanted) = &route.matches.protocol_type else { continue };
        let tunnel = route.tunnels.first().and_then(|share| config.tunnel(&share.tunnel));
        if let Some(tunnel) = tunnel.filter(|tunnel| !tunnel.carries(wanted)) {
            let carried = tunnel.protocols.iter().flatten().map(AsRef::as_ref);
            place.child("protocol_type").unwrap_or(place).fail(format!(
                "tunnel \"{}\" does not carry {wanted} (accepted: {})",
                tunnel.name,
                list(carried)
            ));
            continue;
        }
        let listener = config
            .relay
            .iter()
            .flat_map(|relay| &relay.listeners)
            .find(|listener| Some(&listener.name) == route.matches.listener.as_ref());
        if let Some(bound) = listener.and_then(|listener| listener.protocol_type())
            && bound != wanted
        {
            place
                .child("protocol_type")
                .unwrap_or(place)
                .fail(format!("the listener takes {bound} only (accepted: {bound})"));
        }
    }
}

fn timeout(field: &Field<'_>, min: Duration) -> Option<Duration> {
    field.parse(|text| {
        let value = value::duration(text)?;
        if (min..=TIMEOUT_MAX).contains(&value) {
            Ok(value)
        } else {
            Err(format!(
                "{text} is out of bounds (accepted: {} to {})",
                duration_text(min),
                duration_text(TIMEOUT_MAX)
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

/// The machine's name, as far as it is a name for us.
fn host_name() -> Arc<str> {
    let uname = rustix::system::uname();
    let name = uname.nodename().to_string_lossy();
    value::name(&name).unwrap_or_else(|_| "sidecar".into())
}

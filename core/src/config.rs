//! The configuration: parsed, not validated. A [`Config`] is whole and consistent, or it is not
//! made; every fault of the file is told at once, with its place.
//!
//! Knows the language and its defaults (`docs/config.md`), not what plugins accept: that is asked
//! of a [`PluginCheck`]. Does no I/O but to read the file and those it names.

mod ask;
pub mod credentials;
mod diff;
mod error;
mod files;
mod merge;
pub mod policy;
mod raw;
mod read;
mod schema;
mod show;
mod show_tls;
mod source;
mod substitute;
pub mod tls;
mod tunnel;
pub(crate) mod value;
pub mod watch;
mod way;

use std::collections::{BTreeMap, HashMap, HashSet};
use std::fmt;
use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use ipnet::IpNet;
use serde_json::Value as Json;

pub use diff::{Changes, Delta, diff, hold_back};
pub use error::{ConfigError, ConfigErrors, Position};
pub(crate) use read::{ROOT_KEYS, SIDECAR_WEIGHT_MAX, TOKEN_BYTES_MAX, token as check_token};
pub use schema::schema;
pub use source::{FILE_BYTES_MAX, FILES_MAX, Source, SourceFile};
pub use tunnel::{HealthCheck, HttpVersion, Pool, Probe, ProxyVersion, ServiceAddress, Tunnel};
pub use value::{HostPort, Secret, duration_text, network_text, size_text};
pub use way::{Over, Proxy, WEBSOCKET_PATH, place};

pub(crate) use error::did_you_mean as near_miss;
pub(crate) use value::protocol_type as parse_protocol_type;

use credentials::Credentials;
use policy::Policies;
use tls::{Acme, ClientTls, ServerTls};

/// Reads and parses the file or directory, with the process's environment.
///
/// # Errors
/// All that is wrong with it, but for what plugins would say.
pub fn load(path: &Path) -> Result<(Source, Config), ConfigErrors> {
    let source = Source::read(path)?;
    let config = parse(&source, &|name| std::env::var(name).ok())?;
    Ok((source, config))
}

/// Parses a configuration; `env` gives the environment's variables.
///
/// # Errors
/// All that is wrong with it, but for what plugins would say.
pub fn parse(
    source: &Source,
    env: &dyn Fn(&str) -> Option<String>,
) -> Result<Config, ConfigErrors> {
    read::read(source, env)?.finish(Vec::new())
}

/// Parses a configuration as far as it goes, so that plugins can be asked about a faulty one too.
///
/// # Errors
/// What keeps the files from being read as YAML.
pub fn draft(source: &Source, env: &dyn Fn(&str) -> Option<String>) -> Result<Draft, ConfigErrors> {
    read::read(source, env)
}

/// A configuration of which not all need be right.
#[derive(Debug)]
pub struct Draft {
    config: Config,
    errors: Option<ConfigErrors>,
    /// What it was made of, for the lines that errors show.
    source: Source,
    /// Nothing below `plugins` is at fault.
    plugins_whole: bool,
    /// Nothing below `admin` is at fault.
    admin_whole: bool,
}

impl Draft {
    /// Returns the configuration to ask plugins with, where its section on them is right. Of its
    /// other parts those at fault are missing.
    #[must_use]
    pub fn to_ask(&self) -> Option<&Config> {
        self.plugins_whole.then_some(&self.config)
    }

    /// Returns where administration is served, as far as the file says it rightly.
    #[must_use]
    pub fn admin(&self) -> Option<SocketAddr> {
        self.config.admin.filter(|_| self.admin_whole)
    }

    /// Returns whether nothing was found that is wrong.
    #[must_use]
    pub fn is_good(&self) -> bool {
        self.errors.is_none()
    }

    /// Returns the configuration.
    ///
    /// # Errors
    /// What is wrong with it, with what plugins `refused`, in the order of places.
    pub fn finish(self, mut refused: Vec<ConfigError>) -> Result<Config, ConfigErrors> {
        for error in refused.iter_mut().filter(|error| error.snippet.is_none()) {
            let file = self.source.files.get(usize::from(error.position.file));
            error.snippet = file.and_then(|file| error::snippet(&file.text, error));
        }
        match ConfigErrors::join(self.errors, refused) {
            Some(errors) => Err(errors.with_files(self.config.files)),
            None => Ok(self.config),
        }
    }
}

/// A configuration, valid by construction.
#[derive(Clone, Debug)]
pub struct Config {
    /// The relay's role, where this process has it.
    pub relay: Option<Relay>,
    /// The sidecar's role, where this process has it. One of the two is there.
    pub sidecar: Option<Sidecar>,
    /// In the file's order; names are unique.
    pub tunnels: Vec<Arc<Tunnel>>,
    /// In the file's order; names are unique. With a sidecar, or with any tunnel, each names one of
    /// `tunnels`.
    pub routes: Vec<Arc<Route>>,
    /// Plugins.
    pub plugins: Plugins,
    /// Health and metrics; `None`: not served.
    pub health: Option<SocketAddr>,
    /// Administration; `None`: not served. Loopback.
    pub admin: Option<SocketAddr>,
    /// Logs.
    pub log: Log,
    /// How long running exchanges may take after SIGTERM.
    pub drain_timeout: Duration,
    /// How long a relay that is withdrawn takes new clients at least.
    pub withdraw_timeout: Duration,
    /// What runs and is yet likely a mistake, sorted by place.
    pub warnings: Vec<ConfigError>,
    /// Files that values were read from; their contents belong to the configuration.
    pub files: Vec<PathBuf>,
    /// Where everything stands.
    pub origin: Origin,
}

/// The relay's role.
#[derive(Clone, Debug, PartialEq)]
pub struct Relay {
    /// For clients; names and addresses are unique.
    pub listeners: Vec<Arc<Listener>>,
    /// Subdomains of these are routed; lower case, never empty.
    pub base_domains: Vec<Arc<str>>,
    /// Whose word on the client's address is taken: PROXY protocol and `X-Forwarded-For`.
    pub trusted_proxies: Vec<IpNet>,
    /// A client's connection is asked to end at about this age (shortened by up to a tenth, at
    /// random); `None`: at none.
    pub max_connection_age: Option<Duration>,
    /// The tunnel's public end.
    pub tunnel: RelayTunnel,
    /// Who sidecars are, and what they may claim.
    pub credentials: Credentials,
    /// Certificates by ACME; there where a listener, or the tunnel, asks for one.
    pub acme: Option<Acme>,
    /// How long after a start it is not ready.
    pub warmup: Warmup,
    /// Data-path threads; 0: one per core.
    pub threads: usize,
    /// Limits.
    pub limits: RelayLimits,
    /// Timeouts.
    pub timeouts: RelayTimeouts,
}

/// How long a relay that has just started is not ready: sidecars are on their way.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Warmup {
    /// At most.
    pub time: Duration,
    /// Not longer than until so many sessions serve something; 0: until the time is over.
    pub sessions: usize,
}

/// Where clients come in.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Listener {
    /// Unique.
    pub name: Arc<str>,
    /// Address.
    pub address: SocketAddr,
    /// What its connections are.
    pub carries: Carries,
    /// Every connection begins with a PROXY protocol header, version 1 or 2.
    pub proxy_protocol: bool,
    /// How connections are spread over data-path threads.
    pub balance: Balance,
    /// TLS; `None`: connections are plain.
    pub tls: Option<ServerTls>,
    /// Every request is sent to `https` at this port; there is no TLS then.
    pub https_redirect: Option<u16>,
}

/// What the connections of a listener are.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Carries {
    /// The HTTP front.
    Http,
    /// What plugins recognise in the first bytes; else the HTTP front.
    Sniffed,
    /// All of this type.
    Type(Arc<str>),
}

impl Listener {
    /// Returns the type that all connections are of, where the file says so.
    #[must_use]
    pub fn protocol_type(&self) -> Option<&Arc<str>> {
        match &self.carries {
            Carries::Type(protocol_type) => Some(protocol_type),
            Carries::Http | Carries::Sniffed => None,
        }
    }
}

/// How connections are spread over data-path threads.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Balance {
    /// By the kernel, which hashes addresses: no connection crosses a thread.
    #[default]
    Kernel,
    /// To the thread that has the fewest: for few, long-lived connections.
    Exact,
}

/// Where sidecars come in: at an address of their own, on a listener that clients come to as well, or
/// both. Where nobody is asked who they are the address is loopback and there is no listener.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct RelayTunnel {
    /// Address of their own.
    pub address: Option<SocketAddr>,
    /// Name of a listener with TLS, on which they are known by their ALPN.
    pub listener: Option<Arc<str>>,
    /// TLS at `address`; on `listener` only its client certificates count, and what is shown is the
    /// listener's. `None`: plain, on loopback or with `insecure`.
    pub tls: Option<ServerTls>,
    /// Plain beyond loopback: anybody on the way reads and changes everything.
    pub insecure: bool,
    /// A token with which everything may be claimed.
    pub token: Option<Secret>,
    /// Other relays that sidecars are told of, which dial them too.
    pub peers: Vec<HostPort>,
    /// Where sidecars dial further lanes, and those that come back; `None`: where they dialled the session.
    pub advertise: Option<HostPort>,
    /// How long a lane that has lost its connection is waited for; zero: not at all.
    pub grace: Duration,
    /// Bytes kept for that, per lane and direction, at most.
    pub replay: u64,
}

/// Bytes that a lane keeps, per direction, until the other end has acknowledged them: a window of 4 MiB of
/// a few exchanges at once.
pub const REPLAY_BYTES: u64 = 16 << 20;

/// Bounds of a relay.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct RelayLimits {
    /// Clients' connections at once.
    pub connections: usize,
    /// Sessions at once.
    pub sessions: usize,
    /// Sessions of one principal at once.
    pub sessions_per_principal: usize,
    /// Lanes of one session.
    pub lanes_per_session: usize,
    /// Exchanges of one session at once.
    pub exchanges_per_session: usize,
    /// HTTP/2 streams of one connection at once.
    pub streams_per_connection: u32,
    /// Bytes of a request's head.
    pub request_head: usize,
    /// Fields of a request's head.
    pub request_headers: usize,
    /// Bytes of messages queued or held for replay in the process.
    pub queued: u64,
    /// Largest credit window of an exchange and direction, in bytes.
    pub window: u64,
    /// Handshakes of sidecars per second.
    pub handshakes_per_second: u32,
    /// The same, from one address.
    pub handshakes_per_second_per_address: u32,
    /// Handshakes of sidecars from one address that may fail in a minute; beyond, it is turned away.
    pub failed_handshakes_per_minute_per_address: u32,
    /// TLS handshakes of clients and sidecars under way at once; beyond, connections are closed.
    pub tls_handshakes: usize,
    /// The same, from one address that is no trusted proxy's.
    pub tls_handshakes_per_address: usize,
}

impl Default for RelayLimits {
    fn default() -> Self {
        Self {
            connections: 65_536,
            sessions: 4_096,
            sessions_per_principal: 2_048,
            lanes_per_session: 16,
            exchanges_per_session: 10_000,
            streams_per_connection: 256,
            request_head: 64 * 1024,
            request_headers: 128,
            queued: 2 << 30,
            window: 4 << 20,
            handshakes_per_second: 200,
            handshakes_per_second_per_address: 20,
            failed_handshakes_per_minute_per_address: 60,
            tls_handshakes: 1_024,
            tls_handshakes_per_address: 128,
        }
    }
}

/// Timeouts of a relay.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct RelayTimeouts {
    /// For a client to send a whole request head.
    pub request_head: Duration,
    /// For a client's connection without an exchange.
    pub idle: Duration,
    /// An exchange waits this long for a session that is on its way.
    pub open_wait: Duration,
    /// For a sidecar to send its hello.
    pub handshake: Duration,
    /// For a TLS handshake, from the connection's begin.
    pub tls_handshake: Duration,
}

impl Default for RelayTimeouts {
    fn default() -> Self {
        Self {
            request_head: Duration::from_secs(30),
            idle: Duration::from_secs(75),
            open_wait: Duration::from_secs(1),
            handshake: Duration::from_secs(10),
            tls_handshake: Duration::from_secs(10),
        }
    }
}

/// The sidecar's role.
#[derive(Clone, Debug, PartialEq)]
pub struct Sidecar {
    /// For people, beside the instance's random id.
    pub name: Arc<str>,
    /// Which relays it dials.
    pub relays: Relays,
    /// The proxy on the way to relays that name none of their own; `None`: there is none.
    pub proxy: Option<Arc<Proxy>>,
    /// Relays that relays tell of are dialled too.
    pub follow_peers: bool,
    /// How often the relays' names are resolved anew.
    pub resolve_interval: Duration,
    /// What is presented to relays; `None`: nothing, and to the embedded relay what that made for it.
    pub token: Option<Secret>,
    /// Where `token` came from, to be read anew at each dial.
    pub token_file: Option<PathBuf>,
    /// Connections per session.
    pub lanes: usize,
    /// Connections per session that are dialled ahead, each for one exchange's bytes; `None`: as routes
    /// ask. 0: none at all.
    pub dedicated: Option<usize>,
    /// Data-path threads; 0: one per core.
    pub threads: usize,
    /// Limits.
    pub limits: SidecarLimits,
    /// Timeouts.
    pub timeouts: SidecarTimeouts,
}

/// Which relays a sidecar dials.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Relays {
    /// The relay of this process, at the address it is bound to.
    Embedded,
    /// Never empty.
    Listed(Vec<RelayAddress>),
}

/// A relay that is dialled.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct RelayAddress {
    /// Where.
    pub address: HostPort,
    /// What carries a lane's bytes.
    pub over: Over,
    /// TLS; `None`: plain, which is dialled on loopback only, or with `insecure`.
    pub tls: Option<Arc<ClientTls>>,
    /// Plain beyond loopback: anybody on the way reads and changes everything.
    pub insecure: bool,
    /// The proxy on the way; `None`: it is dialled directly.
    pub proxy: Option<Arc<Proxy>>,
    /// Other ways, in turn, where the one before fails. They have none of their own.
    pub fallback: Vec<Self>,
}

impl RelayAddress {
    /// Returns a relay as it is where the file gives no more than its address: plain on loopback, by TLS
    /// elsewhere.
    #[must_use]
    pub fn new(address: HostPort) -> Self {
        let tls = (!address.is_loopback()).then(Arc::default);
        Self { address, over: Over::Tcp, tls, insecure: false, proxy: None, fallback: Vec::new() }
    }
}

/// Bounds of a sidecar.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct SidecarLimits {
    /// Exchanges of one session at once.
    pub exchanges_per_session: usize,
    /// Bytes of messages queued or held for replay in the process.
    pub queued: u64,
    /// Largest credit window of an exchange and direction, in bytes.
    pub window: u64,
    /// Bytes kept for a lane's return, per lane and direction, at most.
    pub replay: u64,
}

impl Default for SidecarLimits {
    fn default() -> Self {
        Self {
            exchanges_per_session: 10_000,
            queued: 256 << 20,
            window: 4 << 20,
            replay: REPLAY_BYTES,
        }
    }
}

/// Timeouts of a sidecar.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct SidecarTimeouts {
    /// For a connection to a relay.
    pub dial: Duration,
    /// For a relay's welcome.
    pub handshake: Duration,
}

impl Default for SidecarTimeouts {
    fn default() -> Self {
        Self { dial: Duration::from_secs(10), handshake: Duration::from_secs(10) }
    }
}

/// What a client asks for, and the tunnel it goes to.
#[derive(Clone, Debug, PartialEq)]
pub struct Route {
    /// Unique.
    pub name: Arc<str>,
    /// Where its exchanges go; empty where `policies` redirect them.
    pub tunnels: Vec<Share>,
    /// Which exchanges it takes.
    pub matches: Match,
    /// Per protocol type, checked by its plugin.
    pub options: BTreeMap<Arc<str>, Block>,
    /// Policies; `None`: none, so that most exchanges look at nothing else.
    pub policies: Option<Arc<Policies>>,
}

/// A tunnel's share of a route's exchanges.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Share {
    /// The tunnel's name.
    pub tunnel: Arc<str>,
    /// Of the sum of the route's weights; 0: only where no other tunnel is served.
    pub weight: u32,
}

impl Route {
    /// Returns the tunnels for people: `web`, or `web 90, canary 10`; empty for a redirect.
    #[must_use]
    pub fn tunnels_text(&self) -> String {
        match self.tunnels.as_slice() {
            [share] => share.tunnel.to_string(),
            shares => shares
                .iter()
                .map(|share| format!("{} {}", share.tunnel, share.weight))
                .collect::<Vec<_>>()
                .join(", "),
        }
    }

    /// Returns whether both take and do the same, whatever is known of what is secret in them.
    #[must_use]
    pub fn is_same_as(&self, other: &Self) -> bool {
        let Self { name, tunnels, matches, options, policies } = self;
        let values = |options: &BTreeMap<Arc<str>, Block>| -> Vec<(Arc<str>, Json)> {
            options.iter().map(|(name, block)| (Arc::clone(name), block.value.clone())).collect()
        };
        (name, tunnels, matches) == (&other.name, &other.tunnels, &other.matches)
            && *policies == other.policies
            && values(options) == values(&other.options)
    }

    /// Returns the options for this protocol as JSON, or empty text.
    #[must_use]
    pub fn options_for(&self, protocol_type: &str) -> Arc<str> {
        self.options.get(protocol_type).map(|block| block.text.clone()).unwrap_or_default()
    }
}

/// Which exchanges a route takes: those that fit every part that is given.
#[derive(Clone, Debug, Default, PartialEq, Eq, Hash)]
pub struct Match {
    /// Host.
    pub host: HostMatch,
    /// Whole segments: `/a` takes `/a` and `/a/b`, not `/ab`. No final `/`; empty: every path.
    pub path_prefix: Arc<str>,
    /// Name of a listener; `None`: any.
    pub listener: Option<Arc<str>>,
    /// `None`: any.
    pub protocol_type: Option<Arc<str>>,
}

/// Which hosts a route takes. Names are lower case.
#[derive(Clone, Debug, Default, PartialEq, Eq, Hash)]
pub enum HostMatch {
    /// Any host, or none.
    #[default]
    Any,
    /// This host.
    Exact(Arc<str>),
    /// This label (or labels) below any base domain.
    Subdomain(Arc<str>),
    /// One label or more below `<suffix>.<base domain>`; empty: below any base domain.
    Wildcard(Arc<str>),
    /// One label or more below this host.
    HostWildcard(Arc<str>),
}

impl HostMatch {
    /// Returns the hosts that it takes, a star for what a wildcard does; none: any.
    #[must_use]
    pub fn hosts(&self, base_domains: &[Arc<str>]) -> Vec<String> {
        let below = |prefix: &str| -> Vec<String> {
            base_domains.iter().map(|base| format!("{prefix}.{base}")).collect()
        };
        match self {
            Self::Any => Vec::new(),
            Self::Exact(host) => vec![host.to_string()],
            Self::HostWildcard(suffix) => vec![format!("*.{suffix}")],
            Self::Subdomain(name) => below(name),
            Self::Wildcard(suffix) if suffix.is_empty() => below("*"),
            Self::Wildcard(suffix) => below(&format!("*.{suffix}")),
        }
    }

    /// Returns the key and value that stand for it in a file or an announcement.
    #[must_use]
    pub fn to_key_value(&self) -> Option<(&'static str, String)> {
        match self {
            Self::Any => None,
            Self::Exact(host) => Some(("host", host.to_string())),
            Self::Subdomain(subdomain) => Some(("subdomain", subdomain.to_string())),
            Self::Wildcard(suffix) if suffix.is_empty() => Some(("wildcard", "*".to_owned())),
            Self::Wildcard(suffix) => Some(("wildcard", format!("*.{suffix}"))),
            Self::HostWildcard(suffix) => Some(("host", format!("*.{suffix}"))),
        }
    }
}

/// A match as it stands in a file or an announcement.
#[derive(Clone, Copy, Debug, Default)]
pub struct MatchSpec<'a> {
    /// `demo`.
    pub subdomain: Option<&'a str>,
    /// `demo.example.org`, `*.example.org`.
    pub host: Option<&'a str>,
    /// `*.apps`, `*`.
    pub wildcard: Option<&'a str>,
    /// `/api`.
    pub path_prefix: Option<&'a str>,
    /// `web`.
    pub listener: Option<&'a str>,
    /// `HTTP`.
    pub protocol_type: Option<&'a str>,
}

impl Match {
    /// Parses a match; the error is the part at fault (empty: the whole) and what is wrong with it.
    pub fn parse(spec: &MatchSpec<'_>) -> Result<Self, (&'static str, String)> {
        let part = |name: &'static str| move |message: String| (name, message);
        let given = [
            ("subdomain", spec.subdomain.is_some()),
            ("host", spec.host.is_some()),
            ("wildcard", spec.wildcard.is_some()),
        ];
        let given: Vec<&str> =
            given.into_iter().filter_map(|(name, given)| given.then_some(name)).collect();
        if given.len() > 1 {
            let message = format!(
                "has {} at once (accepted: one of subdomain, host, wildcard)",
                given.join(" and ")
            );
            return Err(("", message));
        }
        if given.is_empty() && spec.listener.is_none() {
            let message = "takes nothing (accepted: one of subdomain, host, wildcard, or listener)";
            return Err(("", message.to_owned()));
        }
        let host = if let Some(text) = spec.subdomain {
            HostMatch::Subdomain(value::subdomain(text).map_err(part("subdomain"))?)
        } else if let Some(text) = spec.wildcard {
            HostMatch::Wildcard(value::wildcard(text).map_err(part("wildcard"))?)
        } else if let Some(text) = spec.host {
            match text.strip_prefix("*.") {
                Some(suffix) => HostMatch::HostWildcard(value::host(suffix).map_err(part("host"))?),
                None => HostMatch::Exact(value::host(text).map_err(part("host"))?),
            }
        } else {
            HostMatch::Any
        };
        Ok(Self {
            host,
            path_prefix: spec.path_prefix.map_or_else(
                || Ok(Arc::from("")),
                |text| value::route_prefix(text).map_err(part("path_prefix")),
            )?,
            listener: spec
                .listener
                .map(|text| value::name(text).map_err(part("listener")))
                .transpose()?,
            protocol_type: spec
                .protocol_type
                .map(|text| value::protocol_type(text).map_err(part("protocol_type")))
                .transpose()?,
        })
    }
}

/// As in the file: `demo/api`, `*.apps`, `listener lines`; a route's default name.
impl fmt::Display for Match {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match (&self.host, &self.listener) {
            (HostMatch::Exact(host) | HostMatch::Subdomain(host), _) => f.write_str(host)?,
            (HostMatch::Wildcard(suffix), _) if suffix.is_empty() => f.write_str("*")?,
            (HostMatch::Wildcard(suffix) | HostMatch::HostWildcard(suffix), _) => {
                write!(f, "*.{suffix}")?;
            }
            (HostMatch::Any, Some(listener)) => f.write_str(listener)?,
            (HostMatch::Any, None) => {}
        }
        f.write_str(&self.path_prefix)
    }
}

/// A block of a plugin's own.
#[derive(Clone, PartialEq)]
pub struct Block {
    /// The block.
    pub value: Json,
    /// The block as JSON text.
    pub text: Arc<str>,
    /// For people: secrets are `***`.
    pub masked: Json,
}

impl Block {
    /// Returns a block of this value, of which nobody knows what came from a file.
    #[must_use]
    pub fn new(value: Json) -> Self {
        let text = if value.is_null() { "".into() } else { value.to_string().into() };
        Self { text, masked: masked(&value), value }
    }
}

impl Block {
    /// Returns what a plugin says of the block, or what is left of it where it quotes the value of a key that
    /// calls it a secret.
    #[must_use]
    pub fn without_secrets(&self, message: String) -> String {
        raw::Node::from(self.value.clone()).without_secrets(message)
    }
}

/// Returns the value for people, where any text in it may be a secret: sizes and durations are shown.
fn masked(value: &Json) -> Json {
    match value {
        Json::String(text) if value::size(text).is_err() && value::duration(text).is_err() => {
            "***".into()
        }
        Json::Array(items) => items.iter().map(masked).collect(),
        Json::Object(map) => {
            let entries = map.iter().map(|(key, value)| (key.clone(), masked(value)));
            entries.collect::<serde_json::Map<_, _>>().into()
        }
        _ => value.clone(),
    }
}

impl Default for Block {
    fn default() -> Self {
        Self { value: Json::Null, text: "".into(), masked: Json::Null }
    }
}

/// The block may hold secrets.
impl fmt::Debug for Block {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.masked.fmt(f)
    }
}

/// Plugins to load.
#[derive(Clone, Debug, PartialEq)]
pub struct Plugins {
    /// In the file's order; names are unique.
    pub libraries: Vec<Library>,
    /// Distinct libraries in the process's life (nothing is ever unloaded).
    pub generations: usize,
    /// A plugin that panics this often within `panics_within` is quarantined.
    pub panics: u32,
    /// See `panics`.
    pub panics_within: Duration,
    /// A poll that takes longer is logged.
    pub slow_poll: Duration,
}

impl Default for Plugins {
    fn default() -> Self {
        Self {
            libraries: Vec::new(),
            generations: 8,
            panics: 5,
            panics_within: Duration::from_secs(60),
            slow_poll: Duration::from_millis(100),
        }
    }
}

/// One plugin.
#[derive(Clone, Debug, PartialEq)]
pub struct Library {
    /// Unique.
    pub name: Arc<str>,
    /// The file: absolute, or relative to the working directory.
    pub path: PathBuf,
    /// The file must have this hash.
    pub sha256: Option<[u8; 32]>,
    /// Without it nothing starts; else it is logged.
    pub required: bool,
    /// Only these of the types it serves; `None`: all.
    pub protocol_types: Option<Vec<Arc<str>>>,
    /// The plugin's own settings.
    pub config: Block,
}

/// Logs.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Log {
    /// Directives as tracing's filter takes them: `info`, `info,sidelane::tunnel=debug`.
    pub level: Arc<str>,
    /// Form.
    pub format: LogFormat,
}

impl Default for Log {
    fn default() -> Self {
        Self { level: "info".into(), format: LogFormat::Text }
    }
}

/// Form of the logs.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum LogFormat {
    /// For people.
    Text,
    /// One object a line.
    Json,
}

/// Where the parts of a configuration stand in their files.
#[derive(Clone)]
pub struct Origin {
    /// By [`Position::file`].
    files: Vec<Arc<str>>,
    root: Arc<raw::Node>,
}

/// The tree holds secrets.
impl fmt::Debug for Origin {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Origin").field("files", &self.files).finish_non_exhaustive()
    }
}

impl Origin {
    /// Returns the place of `path` (`routes[2].options.HTTP.mode`), or of its nearest ancestor.
    #[must_use]
    pub fn locate(&self, path: &str) -> Position {
        self.root.locate(path)
    }

    /// Returns an error at `path`.
    #[must_use]
    pub fn error(&self, path: &str, message: impl Into<String>) -> ConfigError {
        let position = self.locate(path);
        ConfigError {
            file: self.files.get(usize::from(position.file)).cloned().unwrap_or_default(),
            position,
            path: path.to_owned(),
            message: message.into(),
            snippet: None,
        }
    }
}

/// What a plugin finds wrong with a block.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Fault {
    /// What is wrong.
    pub message: String,
    /// Where in the block: `limits.idle`, `rules[1]`; empty: the block as a whole.
    pub path: String,
}

/// What plugins know of a configuration.
pub trait PluginCheck {
    /// Returns the protocol types that plugins serve.
    fn types(&self) -> Vec<Arc<str>>;
    /// Returns whether all plugins could be asked: else an unknown protocol type is not told.
    fn are_all(&self) -> bool {
        true
    }
    /// Checks a route's options for this protocol.
    fn validate_route(&self, protocol_type: &str, options_json: &str) -> Result<(), Fault>;
}

impl Config {
    /// Returns the tunnel of that name.
    #[must_use]
    pub fn tunnel(&self, name: &str) -> Option<&Arc<Tunnel>> {
        self.tunnels.iter().find(|tunnel| *tunnel.name == *name)
    }

    /// Checks what only plugins know: protocol types and routes' options.
    ///
    /// # Errors
    /// All that they do not know or refuse.
    pub fn check_plugins(&self, plugins: &dyn PluginCheck) -> Result<(), ConfigErrors> {
        ConfigErrors::join(None, self.refused_by(plugins)).map_or(Ok(()), Err)
    }

    /// Returns what plugins do not know or refuse; of a faulty configuration too, since it is the
    /// file that is asked about and not what was made of it.
    #[must_use]
    pub fn refused_by(&self, plugins: &dyn PluginCheck) -> Vec<ConfigError> {
        ask::refused(self, plugins)
    }

    /// Returns the error of a plugin that refuses its own `config`.
    #[must_use]
    pub fn library_fault(&self, name: &str, fault: &Fault) -> ConfigError {
        let index = self.plugins.libraries.iter().position(|library| *library.name == *name);
        let path =
            index.map_or_else(|| "plugins".into(), |i| format!("plugins.libraries[{i}].config"));
        self.fault(&path, fault)
    }

    /// Returns an error at a library of the list itself: it cannot be loaded.
    pub fn library_error(&self, name: &str, message: impl Into<String>) -> ConfigError {
        let index = self.plugins.libraries.iter().position(|library| *library.name == *name);
        let path =
            index.map_or_else(|| "plugins".into(), |i| format!("plugins.libraries[{i}].library"));
        self.origin.error(&path, message.into())
    }

    /// Returns the error of a directory that is not there, in which a library was looked for: at
    /// `plugins.directory` where the file gives it.
    #[must_use]
    pub fn directory_error(&self, name: &str, directory: &Path) -> ConfigError {
        let message = format!(
            "no such directory: {} (accepted: where the plugins' libraries are)",
            directory.display()
        );
        let given = self.origin.root.child("plugins").and_then(|node| node.child("directory"));
        match given {
            Some(_) => self.origin.error("plugins.directory", message),
            None => self.library_error(name, message),
        }
    }

    /// Returns what a plugin says of the block at `path`, without the block's secrets, which it may quote.
    fn fault(&self, path: &str, fault: &Fault) -> ConfigError {
        let separator = if fault.path.is_empty() || fault.path.starts_with('[') { "" } else { "." };
        let full = format!("{path}{separator}{}", fault.path);
        let message = ask::in_our_words(&fault.message);
        let message = match self.origin.root.find(path) {
            Some(block) => block.without_secrets(message),
            None => message,
        };
        self.origin.error(&full, message)
    }

    /// Takes over from `old` each route, tunnel and listener that is unchanged, so that it stays
    /// the same object.
    pub fn reuse(&mut self, old: &Self) {
        reuse(&mut self.tunnels, &old.tunnels, |tunnel| &tunnel.name);
        reuse(&mut self.routes, &old.routes, |route| &route.name);
        if let (Some(relay), Some(old)) = (&mut self.relay, &old.relay) {
            reuse(&mut relay.listeners, &old.listeners, |listener| &listener.name);
        }
    }
}

fn reuse<T: PartialEq>(new: &mut [Arc<T>], old: &[Arc<T>], name: fn(&T) -> &Arc<str>) {
    let old: HashMap<&str, &Arc<T>> = old.iter().map(|item| (&**name(item), item)).collect();
    for item in new {
        if let Some(same) = old.get(&**name(item)).filter(|old| ***old == *item) {
            *item = Arc::clone(same);
        }
    }
}

/// Returns the first item whose key another item has as well, with that other's index.
fn duplicates<'a>(keys: impl IntoIterator<Item = &'a str>) -> Vec<(usize, usize)> {
    let mut first = HashMap::new();
    let mut seen = HashSet::new();
    let mut found = Vec::new();
    for (index, key) in keys.into_iter().enumerate() {
        if seen.insert(key) {
            first.insert(key, index);
        } else {
            found.push((first[key], index));
        }
    }
    found
}

#[cfg(test)]
mod tests;

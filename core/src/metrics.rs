//! What is counted, for `/metrics`.
//!
//! The families and their names are an API boundary (docs/operations.md). Labels are bounded:
//! names from the configuration, types, codes; never a path or a free host. What the hot path
//! touches is looked up once per exchange and is an atomic from there on.

use std::cell::RefCell;
use std::collections::HashSet;
use std::sync::atomic::{AtomicBool, AtomicU32, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, OnceLock, PoisonError};
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use arc_swap::ArcSwap;
use prometheus_client::encoding::{EncodeLabelSet, text};
use prometheus_client::metrics::counter::Counter;
use prometheus_client::metrics::family::Family;
use prometheus_client::metrics::gauge::Gauge;
use prometheus_client::metrics::info::Info;
use prometheus_client::registry::{Registry, Unit};
use sidelane_abi::failure;
use tokio::sync::broadcast;

use crate::plugin::MetricSink;
use crate::tunnel::carrier::Kind;

mod acme;
mod balance;
mod cell;
mod credentials;
mod dedicated;
mod ended;
mod lanes;
mod plugins;
mod process;
mod routes;
mod sidecar;
mod tls;

pub use acme::AcmeMetrics;
pub use balance::{BalanceMetrics, MoveReason};
pub use credentials::CredentialMetrics;
pub use dedicated::DedicatedMetrics;
pub use ended::Ended;
pub use lanes::LaneMetrics;

use cell::Timing;
use ended::{Details, Tally};
use plugins::PluginMetrics;
pub use routes::RouteMetrics;
use routes::{RouteFamilies, RouteLabel, StatusLabels, TIMED_ROUTES_MAX};
pub use sidecar::SidecarMetrics;
pub use tls::TlsMetrics;

/// Most names of routes, and of tunnels, that have rows of their own; later ones share [`OTHER`].
/// Sidecars announce names, and announce others later: bounds the memory they can take in a relay.
const NAMES_MAX: usize = 10_000;

/// Why handshakes are refused: by the relay's bounds, and by the tunnel's protocol
/// (`RefuseReason`).
const HANDSHAKE_REASONS: [&str; 12] = [
    "rate",
    "failures",
    "tls",
    "hello",
    "http",
    "VERSION",
    "CREDENTIAL",
    "UNKNOWN_SESSION",
    "WRONG_RELAY",
    "OVERLOADED",
    "GOING_AWAY",
    "MALFORMED",
];

/// Stands for names beyond the bound.
const OTHER: &str = "other";

#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
struct ExchangeLabels {
    role: &'static str,
    route: Arc<str>,
    tunnel: Arc<str>,
    protocol_type: Arc<str>,
    code: &'static str,
}

#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
struct FlowLabels {
    role: &'static str,
    protocol_type: Arc<str>,
    direction: &'static str,
}

#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
struct ProtocolLabels {
    role: &'static str,
    protocol_type: Arc<str>,
}

#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
struct RoleLabel {
    role: &'static str,
}

#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
struct CarrierLabel {
    role: &'static str,
    carrier: &'static str,
}

#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
struct ListenerLabel {
    listener: Arc<str>,
}

#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
struct ReasonLabel {
    reason: &'static str,
}

#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
struct ListenerReasonLabels {
    listener: Arc<str>,
    reason: &'static str,
}

#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
struct ResultLabel {
    result: &'static str,
}

#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
struct PluginLabels {
    plugin: String,
    plugin_version: String,
}

#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
struct GenerationLabels {
    plugin: String,
    state: &'static str,
}

/// What exchanges of one role and protocol type are counted in; looked up without a lock.
struct TypeMetrics {
    labels: ProtocolLabels,
    in_flight: cell::Gauge,
    duration: Timing,
}

/// All metrics of the process.
pub struct Metrics {
    registry: Arc<Mutex<Registry>>,
    /// The process's own metrics, whose usual names bear no prefix.
    process: Registry,
    plugins: Arc<PluginMetrics>,
    exchanges: Family<ExchangeLabels, Counter>,
    in_flight: Family<ProtocolLabels, cell::Gauge>,
    durations: Family<ProtocolLabels, Timing>,
    /// The two above by role and type: few, made once.
    by_type: ArcSwap<Vec<Arc<TypeMetrics>>>,
    names: Mutex<HashSet<Arc<str>>>,
    messages: Family<FlowLabels, cell::Counter>,
    bytes: Family<FlowLabels, cell::Counter>,
    crossing: cell::Counter,
    sessions: Family<RoleLabel, Gauge>,
    lanes_up: Family<RoleLabel, Gauge>,
    lane_connections: Family<CarrierLabel, Gauge>,
    lanes_lost: Family<RoleLabel, Counter>,
    reconnects: Counter,
    handshakes_refused: Family<ReasonLabel, Counter>,
    connections: Family<ListenerLabel, Gauge>,
    connections_refused: Family<ListenerLabel, Counter>,
    connections_aged: Family<ListenerLabel, Counter>,
    proxy_headers_refused: Family<ListenerReasonLabels, Counter>,
    front_answers: Family<ReasonLabel, Counter>,
    informational_dropped: Counter,
    reloads: Family<ResultLabel, Counter>,
    reload_ok: Gauge,
    reload_time: Gauge,
    restart_pending: Gauge,
    draining: Gauge,
    announcements: Family<ResultLabel, Counter>,
    announcements_waiting: Gauge,
    routes: RouteFamilies,
    /// Routes that have a histogram of their own.
    timed: Mutex<HashSet<Arc<str>>>,
    panics: Family<PluginLabels, Gauge>,
    generations: Family<GenerationLabels, Gauge>,
    quarantined: Family<PluginLabels, Gauge>,
    /// What is counted of sidecars that share tunnels.
    pub balance: BalanceMetrics,
    /// What is counted of sidecars' credentials.
    pub credentials: CredentialMetrics,
    /// What is counted of lanes' connections.
    pub lanes: LaneMetrics,
    /// What the sidecar's end counts beside exchanges.
    pub sidecar: SidecarMetrics,
    /// What is counted of TLS.
    pub tls: TlsMetrics,
    /// What is counted of dedicated connections.
    pub dedicated: DedicatedMetrics,
    /// Certificates by ACME.
    pub acme: AcmeMetrics,
    /// Set where somebody follows what ends.
    followed: OnceLock<broadcast::Sender<Arc<Ended>>>,
}

impl Default for Metrics {
    fn default() -> Self {
        Self::new()
    }
}

impl Metrics {
    /// Returns metrics that have counted nothing.
    #[must_use]
    pub fn new() -> Self {
        let mut registry = Registry::with_prefix("sidelane");
        let version = vec![("version", env!("CARGO_PKG_VERSION"))];
        registry.register("build", "This program", Info::new(version));
        let registry = Arc::new(Mutex::new(registry));
        let mut process = Registry::default();
        process.register_collector(Box::new(process::Process::new()));
        let metrics = Self {
            process,
            plugins: Arc::new(PluginMetrics::new(Arc::clone(&registry))),
            exchanges: Family::default(),
            in_flight: Family::default(),
            durations: Family::default(),
            by_type: ArcSwap::default(),
            names: Mutex::default(),
            messages: Family::default(),
            bytes: Family::default(),
            crossing: cell::Counter::default(),
            sessions: Family::default(),
            lanes_up: Family::default(),
            lane_connections: Family::default(),
            lanes_lost: Family::default(),
            reconnects: Counter::default(),
            handshakes_refused: Family::default(),
            connections: Family::default(),
            connections_refused: Family::default(),
            connections_aged: Family::default(),
            proxy_headers_refused: Family::default(),
            front_answers: Family::default(),
            informational_dropped: Counter::default(),
            reloads: Family::default(),
            reload_ok: Gauge::default(),
            reload_time: Gauge::default(),
            restart_pending: Gauge::default(),
            draining: Gauge::default(),
            announcements: Family::default(),
            announcements_waiting: Gauge::default(),
            routes: RouteFamilies::default(),
            timed: Mutex::default(),
            panics: Family::default(),
            generations: Family::default(),
            quarantined: Family::default(),
            balance: BalanceMetrics::default(),
            credentials: CredentialMetrics::default(),
            lanes: LaneMetrics::default(),
            sidecar: SidecarMetrics::default(),
            dedicated: DedicatedMetrics::default(),
            tls: TlsMetrics::default(),
            acme: AcmeMetrics::default(),
            followed: OnceLock::new(),
            registry,
        };
        metrics.register(&mut metrics.lock_registry());
        metrics.begin();
        metrics
    }

    fn register(&self, r: &mut Registry) {
        r.register("exchanges", "Exchanges that have ended, by how", self.exchanges.clone());
        r.register("exchanges_in_flight", "Exchanges that run", self.in_flight.clone());
        r.register_with_unit(
            "exchange_duration",
            "From an exchange's begin to its end",
            Unit::Seconds,
            self.durations.clone(),
        );
        r.register("messages", "Messages of exchanges on lanes", self.messages.clone());
        r.register_with_unit(
            "message",
            "Payload of these messages",
            Unit::Bytes,
            self.bytes.clone(),
        );
        r.register(
            "exchanges_cross_thread",
            "Exchanges opened on a lane of another thread",
            self.crossing.clone(),
        );
        r.register(
            "sessions",
            "Sidecars connected to this relay, or relays that this sidecar is connected to",
            self.sessions.clone(),
        );
        r.register("lanes", "Lanes that are up", self.lanes_up.clone());
        r.register(
            "lane_connections",
            "Connections on which lanes run, by what carries them",
            self.lane_connections.clone(),
        );
        r.register(
            "lanes_lost",
            "Lanes that ended without being asked to",
            self.lanes_lost.clone(),
        );
        r.register("session_dials", "Sessions begun anew with a relay", self.reconnects.clone());
        r.register(
            "handshakes_refused",
            "Connections to the tunnel's port that were not let in",
            self.handshakes_refused.clone(),
        );
        r.register("connections", "Clients' connections that are open", self.connections.clone());
        r.register(
            "connections_refused",
            "Clients' connections closed because there were too many",
            self.connections_refused.clone(),
        );
        r.register(
            "connections_aged",
            "Clients' connections asked to end for their age",
            self.connections_aged.clone(),
        );
        r.register(
            "proxy_headers_refused",
            "Connections closed for want of a PROXY header that holds",
            self.proxy_headers_refused.clone(),
        );
        r.register(
            "front_answers",
            "Requests answered before any plugin saw them",
            self.front_answers.clone(),
        );
        r.register(
            "informational_dropped",
            "Interim responses that were not sent: HTTP/1.0, or a client that does not read",
            self.informational_dropped.clone(),
        );
        r.register(
            "config_reloads",
            "Times the configuration was read again",
            self.reloads.clone(),
        );
        r.register(
            "config_last_reload_successful",
            "1 where the file as it stands is in force",
            self.reload_ok.clone(),
        );
        r.register_with_unit(
            "config_last_reload_success_timestamp",
            "When the configuration in force was read",
            Unit::Seconds,
            self.reload_time.clone(),
        );
        r.register(
            "config_restart_pending",
            "1 where the file says something that takes effect only after a restart",
            self.restart_pending.clone(),
        );
        r.register(
            "draining",
            "1 once the process is withdrawn, 2 while it ends",
            self.draining.clone(),
        );
        r.register(
            "announcements",
            "Documents of sidecars, by what became of them",
            self.announcements.clone(),
        );
        r.register(
            "announcements_waiting",
            "Documents that are not in force because an older session holds what they take",
            self.announcements_waiting.clone(),
        );
        self.routes.register(r);
        r.register("plugin_panics", "Panics of a plugin's current version", self.panics.clone());
        r.register("plugin_generations", "Generations that are loaded", self.generations.clone());
        r.register(
            "plugin_quarantined",
            "1 where a plugin panicked too often and takes nothing",
            self.quarantined.clone(),
        );
        self.balance.register(r);
        self.credentials.register(r);
        self.lanes.register(r);
        self.sidecar.register(r);
        self.tls.register(r);
        self.dedicated.register(r);
        self.acme.register(r);
    }

    /// Makes the rows of what is known beforehand, so that a rate over the first event is seen.
    fn begin(&self) {
        for result in ["success", "failure"] {
            drop(self.reloads.get_or_create(&ResultLabel { result }));
        }
        for result in ["accepted", "refused"] {
            drop(self.announcements.get_or_create(&ResultLabel { result }));
        }
    }

    /// The process has this role: its rows stand from here on.
    pub fn role(&self, role: &'static str) {
        drop(self.sessions.get_or_create(&RoleLabel { role }));
        drop(self.lanes_up.get_or_create(&RoleLabel { role }));
        drop(self.lanes_lost.get_or_create(&RoleLabel { role }));
        self.dedicated.role(role);
        for carrier in Kind::ALL.map(Kind::label) {
            drop(self.lane_connections.get_or_create(&CarrierLabel { role, carrier }));
        }
        self.lanes.begin(role);
        if role == "relay" {
            self.credentials.begin();
            for reason in HANDSHAKE_REASONS {
                drop(self.handshakes_refused.get_or_create(&ReasonLabel { reason }));
            }
        }
    }

    /// A listener is there: its rows stand from here on.
    pub fn listener(&self, listener: &Arc<str>) {
        let label = || ListenerLabel { listener: Arc::clone(listener) };
        drop(self.connections.get_or_create(&label()));
        drop(self.connections_refused.get_or_create(&label()));
        drop(self.connections_aged.get_or_create(&label()));
    }

    fn lock_registry(&self) -> std::sync::MutexGuard<'_, Registry> {
        self.registry.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Writes all metrics in the OpenMetrics text format.
    pub fn encode(&self, out: &mut String) {
        let written = text::encode_registry(out, &self.process)
            .and_then(|()| text::encode(out, &self.lock_registry()));
        if let Err(error) = written {
            tracing::error!(%error, "metrics cannot be written");
        }
    }

    /// Where plugins' own metrics go.
    #[must_use]
    pub fn sink(&self) -> Arc<dyn MetricSink> {
        Arc::clone(&self.plugins) as Arc<dyn MetricSink>
    }

    /// Begins to count an exchange.
    #[must_use]
    pub fn exchange(self: &Arc<Self>, role: &'static str, protocol_type: &Arc<str>) -> Record {
        let by_type = self.of_type(role, protocol_type);
        by_type.in_flight.inc();
        Record {
            metrics: Arc::clone(self),
            by_type,
            began: Instant::now(),
            routed: OnceLock::new(),
            details: self.followed.get().map(|_| Box::default()),
            unopened: AtomicU32::new(failure::NONE),
            answered: AtomicU64::new(0),
            is_ended: AtomicBool::new(false),
        }
    }

    /// Returns whether somebody follows exchanges as they end.
    #[must_use]
    pub fn is_followed(&self) -> bool {
        self.followed.get().is_some()
    }

    /// Follows exchanges as they end, from those on that begin after this. Whoever reads too slowly
    /// misses some, and is told how many.
    #[must_use]
    pub fn follow(&self) -> broadcast::Receiver<Arc<Ended>> {
        let followers = self.followed.get_or_init(|| broadcast::Sender::new(ended::WAITING_MAX));
        followers.subscribe()
    }

    fn of_type(&self, role: &'static str, protocol_type: &Arc<str>) -> Arc<TypeMetrics> {
        let known = |all: &[Arc<TypeMetrics>]| {
            let mut all = all.iter();
            let found =
                all.find(|m| m.labels.role == role && m.labels.protocol_type == *protocol_type);
            found.map(Arc::clone)
        };
        if let Some(metrics) = known(&self.by_type.load()) {
            return metrics;
        }
        let labels = ProtocolLabels { role, protocol_type: Arc::clone(protocol_type) };
        // Two threads that meet here get the same cells from the families.
        let metrics = Arc::new(TypeMetrics {
            in_flight: self.in_flight.get_or_create_owned(&labels),
            duration: self.durations.get_or_create_owned(&labels),
            labels,
        });
        self.by_type.rcu(|all| {
            let mut all = Vec::clone(all);
            if known(&all).is_none() {
                all.push(Arc::clone(&metrics));
            }
            all
        });
        metrics
    }

    /// Returns the name as a label, or [`OTHER`] past the bound.
    fn name(&self, name: &Arc<str>) -> Arc<str> {
        let mut names = self.names.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(known) = names.get(name) {
            return Arc::clone(known);
        }
        if names.len() == NAMES_MAX {
            return OTHER.into();
        }
        names.insert(Arc::clone(name));
        Arc::clone(name)
    }

    /// What a route's responses of one kind of status are counted in.
    fn response(&self, route: &Arc<str>, status: &'static str) -> (Counter, Timing) {
        let route = self.name(route);
        let labels = StatusLabels { route: Arc::clone(&route), status };
        let responses = self.routes.responses.get_or_create_owned(&labels);
        let mut timed = self.timed.lock().unwrap_or_else(PoisonError::into_inner);
        let route = if timed.contains(&route) || timed.len() < TIMED_ROUTES_MAX {
            timed.insert(Arc::clone(&route));
            route
        } else {
            OTHER.into()
        };
        drop(timed);
        (responses, self.routes.heads.get_or_create_owned(&RouteLabel { route }))
    }

    /// Counters of messages of one protocol type.
    #[must_use]
    pub fn flow(&self, role: &'static str, protocol_type: &Arc<str>) -> Flow {
        let counters = |direction| {
            let protocol_type = Arc::clone(protocol_type);
            let labels = FlowLabels { role, protocol_type, direction };
            (self.messages.get_or_create_owned(&labels), self.bytes.get_or_create_owned(&labels))
        };
        let (messages_sent, bytes_sent) = counters("sent");
        let (messages_received, bytes_received) = counters("received");
        Flow { messages_sent, bytes_sent, messages_received, bytes_received, tally: None }
    }

    /// An exchange's client is on another thread than its lane.
    pub fn exchange_crosses_threads(&self) {
        self.crossing.inc();
    }

    /// How many peers this role is connected to.
    pub fn set_sessions(&self, role: &'static str, count: usize) {
        let count = i64::try_from(count).unwrap_or(i64::MAX);
        self.sessions.get_or_create(&RoleLabel { role }).set(count);
    }

    /// A sidecar's session with a relay is up until the guard goes.
    #[must_use]
    pub fn session_up(&self, role: &'static str) -> Up {
        Up::new(self.sessions.get_or_create_owned(&RoleLabel { role }))
    }

    /// A lane is up until the guard goes.
    #[must_use]
    pub fn lane_up(&self, role: &'static str) -> Up {
        Up::new(self.lanes_up.get_or_create_owned(&RoleLabel { role }))
    }

    /// A connection carries a lane until the guard goes.
    #[must_use]
    pub fn carrier_up(&self, role: &'static str, carrier: Kind) -> Up {
        Up::new(
            self.lane_connections
                .get_or_create_owned(&CarrierLabel { role, carrier: carrier.label() }),
        )
    }

    /// A lane ended without being asked to.
    pub fn lane_lost(&self, role: &'static str) {
        self.lanes_lost.get_or_create(&RoleLabel { role }).inc();
    }

    /// A session with a relay began.
    pub fn session_begun(&self) {
        self.reconnects.inc();
    }

    /// A dialler was turned away.
    pub fn handshake_refused(&self, reason: &'static str) {
        self.handshakes_refused.get_or_create(&ReasonLabel { reason }).inc();
    }

    /// A client's connection is open until the guard goes.
    #[must_use]
    pub fn connection_open(&self, listener: &Arc<str>) -> Up {
        let listener = Arc::clone(listener);
        Up::new(self.connections.get_or_create_owned(&ListenerLabel { listener }))
    }

    /// A client's connection was closed at once.
    pub fn connection_refused(&self, listener: &Arc<str>) {
        let listener = Arc::clone(listener);
        self.connections_refused.get_or_create(&ListenerLabel { listener }).inc();
    }

    /// A client's connection was asked to end for its age.
    pub fn connection_aged(&self, listener: &Arc<str>) {
        let listener = Arc::clone(listener);
        self.connections_aged.get_or_create(&ListenerLabel { listener }).inc();
    }

    /// A connection was closed: its PROXY header did not hold.
    pub fn proxy_header_refused(&self, listener: &Arc<str>, reason: &'static str) {
        let listener = Arc::clone(listener);
        self.proxy_headers_refused.get_or_create(&ListenerReasonLabels { listener, reason }).inc();
    }

    /// The front answered by itself.
    pub fn front_answered(&self, code: u32) {
        let reason = failure::name(code);
        self.front_answers.get_or_create(&ReasonLabel { reason }).inc();
    }

    /// An interim response could not be sent.
    pub fn informational_dropped(&self) {
        self.informational_dropped.inc();
    }

    /// The configuration was read, at start or later.
    pub fn reloaded(&self, is_good: bool) {
        let result = if is_good { "success" } else { "failure" };
        self.reloads.get_or_create(&ResultLabel { result }).inc();
        self.reload_ok.set(i64::from(is_good));
        if is_good {
            let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
            self.reload_time.set(i64::try_from(now.as_secs()).unwrap_or(i64::MAX));
        }
    }

    /// Whether the file says something that only a restart puts in force.
    pub fn set_restart_pending(&self, is_pending: bool) {
        self.restart_pending.set(i64::from(is_pending));
    }

    /// How far the process is on its way out: 1 withdrawn, 2 ending.
    pub fn set_draining(&self, phase: i64) {
        self.draining.set(phase);
    }

    /// A sidecar's document was taken or refused.
    pub fn announced(&self, is_accepted: bool) {
        let result = if is_accepted { "accepted" } else { "refused" };
        self.announcements.get_or_create(&ResultLabel { result }).inc();
    }

    /// How many documents wait for an older session to go.
    pub fn set_announcements_waiting(&self, count: usize) {
        self.announcements_waiting.set(i64::try_from(count).unwrap_or(i64::MAX));
    }

    /// Takes the plugins' state as it is now; called before the metrics are written.
    pub fn set_plugins(&self, infos: &[crate::plugin::GenerationInfo]) {
        self.generations.clear();
        self.quarantined.clear();
        self.panics.clear();
        for info in infos {
            let labels = PluginLabels {
                plugin: info.name.to_string(),
                plugin_version: info.version.clone(),
            };
            let panics = i64::try_from(info.panics).unwrap_or(i64::MAX);
            self.panics.get_or_create(&labels).inc_by(panics);
            self.quarantined.get_or_create(&labels).inc_by(i64::from(info.quarantined));
            let state = info.state.name();
            self.generations
                .get_or_create(&GenerationLabels { plugin: info.name.to_string(), state })
                .inc();
        }
    }
}

/// One exchange as it is counted; ended once, at the latest when it is dropped.
pub struct Record {
    metrics: Arc<Metrics>,
    by_type: Arc<TypeMetrics>,
    began: Instant,
    routed: OnceLock<(Arc<str>, Arc<str>)>,
    /// `None` where nobody follows.
    details: Option<Box<Details>>,
    /// Why it was not opened; the plugin that says so to the client ends well by itself.
    unopened: AtomicU32,
    /// Status of the response to an HTTP client, and above its 16 bits the nanoseconds until it; 0:
    /// none.
    answered: AtomicU64,
    is_ended: AtomicBool,
}

impl Record {
    /// The route and tunnel are known.
    pub fn routed(&self, route: &Arc<str>, tunnel: &Arc<str>) {
        self.routed.get_or_init(|| (Arc::clone(route), Arc::clone(tunnel)));
    }

    /// It was not opened, for this reason of [`failure`].
    pub fn unopened(&self, code: u32) {
        self.unopened.store(code, Ordering::Relaxed);
    }

    /// An HTTP client was answered; the first answer counts.
    pub fn answered(&self, status: http::StatusCode) {
        let ns = u64::try_from(self.began.elapsed().as_nanos()).unwrap_or(u64::MAX);
        let answered = (ns.min(u64::MAX >> 16) << 16) | u64::from(status.as_u16());
        let first = self.answered.load(Ordering::Relaxed) == 0;
        if first {
            self.answered.store(answered, Ordering::Relaxed);
        }
    }

    /// Whether an HTTP client was answered.
    #[must_use]
    pub fn is_answered(&self) -> bool {
        self.answered.load(Ordering::Relaxed) != 0
    }

    /// Returns whether somebody follows what ends.
    #[must_use]
    pub fn is_followed(&self) -> bool {
        self.details.is_some()
    }

    /// The request's method and target are known.
    pub fn asked(&self, method: &str, target: &[u8]) {
        if let Some(details) = &self.details {
            details.asked(method, target);
        }
    }

    /// Returns counters that count for this exchange as well, where somebody follows.
    #[must_use]
    pub fn tallied(&self, flow: Arc<Flow>) -> Arc<Flow> {
        let Some(details) = &self.details else { return flow };
        Arc::new(Flow { tally: Some(details.tally()), ..Flow::clone(&flow) })
    }

    /// Ends it with one of [`failure`].
    pub fn end(&self, code: u32) {
        if self.is_ended.swap(true, Ordering::Relaxed) {
            return;
        }
        let code = match code {
            failure::NONE => self.unopened.load(Ordering::Relaxed),
            code => code,
        };
        self.by_type.in_flight.dec();
        self.by_type.duration.observe(self.began.elapsed());
        let (route, tunnel) = self.routed.get().cloned().unwrap_or_default();
        let code = failure::name(code);
        let answered = self.answered.load(Ordering::Relaxed);
        #[expect(clippy::cast_possible_truncation, reason = "the status stands in the low 16 bits")]
        let answered_with = (answered != 0).then_some(answered as u16);
        let status = answered_with.map(routes::class);
        if let (Some(details), Some(followers)) = (&self.details, self.metrics.followed.get()) {
            let labels = &self.by_type.labels;
            let ended = details.ended(
                labels.role,
                &labels.protocol_type,
                &route,
                code,
                self.began,
                answered_with,
            );
            // Followers may have gone.
            let _ = followers.send(Arc::new(ended));
        }
        let counted = RECENT.try_with(|recent| {
            let recent = recent.borrow();
            let known = recent.iter().find(|row| row.is_of(self, &route, &tunnel, code, status));
            known.map(|row| row.count(answered >> 16))
        });
        if matches!(counted, Ok(Some(()))) {
            return;
        }
        let counter = self.counter(Arc::clone(&route), Arc::clone(&tunnel), code);
        let response = status.map(|status| self.metrics.response(&route, status));
        let by_type = Arc::clone(&self.by_type);
        let row = Row { by_type, route, tunnel, code, status, counter, response };
        row.count(answered >> 16);
        // An error means that the thread ends.
        let _ = RECENT.try_with(|recent| {
            let mut recent = recent.borrow_mut();
            recent.truncate(RECENT_MAX - 1);
            recent.insert(0, row);
        });
    }

    fn counter(&self, route: Arc<str>, tunnel: Arc<str>, code: &'static str) -> Counter {
        let mut labels = ExchangeLabels {
            role: self.by_type.labels.role,
            route,
            tunnel,
            protocol_type: Arc::clone(&self.by_type.labels.protocol_type),
            code,
        };
        let exchanges = &self.metrics.exchanges;
        if let Some(counter) = exchanges.get(&labels) {
            return counter.clone();
        }
        labels.route = self.metrics.name(&labels.route);
        labels.tunnel = self.metrics.name(&labels.tunnel);
        exchanges.get_or_create_owned(&labels)
    }
}

/// A row of the exchanges that have ended, by the very texts that its exchanges share.
struct Row {
    by_type: Arc<TypeMetrics>,
    route: Arc<str>,
    tunnel: Arc<str>,
    code: &'static str,
    status: Option<&'static str>,
    counter: Counter,
    response: Option<(Counter, Timing)>,
}

impl Row {
    fn is_of(
        &self,
        record: &Record,
        route: &Arc<str>,
        tunnel: &Arc<str>,
        code: &str,
        status: Option<&str>,
    ) -> bool {
        Arc::ptr_eq(&self.route, route)
            && Arc::ptr_eq(&self.tunnel, tunnel)
            && Arc::ptr_eq(&self.by_type, &record.by_type)
            && self.code == code
            && self.status == status
    }

    /// Counts an exchange whose response, if it has one, began after so many nanoseconds.
    fn count(&self, answered_ns: u64) {
        self.counter.inc();
        if let Some((responses, heads)) = &self.response {
            responses.inc();
            heads.observe(Duration::from_nanos(answered_ns));
        }
    }
}

/// Rows that a thread keeps at hand: enough for the few routes that are busy at a time, few enough
/// to look through.
const RECENT_MAX: usize = 16;

thread_local! {
    /// The rows that this thread last looked up, the latest first.
    static RECENT: RefCell<Vec<Row>> = const { RefCell::new(Vec::new()) };
}

impl Drop for Record {
    /// Whoever drops an exchange unfinished no longer wants it.
    fn drop(&mut self) {
        self.end(failure::CANCELLED);
    }
}

/// Counters of messages, held by an exchange's halves.
#[derive(Clone)]
pub struct Flow {
    messages_sent: cell::Counter,
    bytes_sent: cell::Counter,
    messages_received: cell::Counter,
    bytes_received: cell::Counter,
    /// Of one exchange, where somebody follows.
    tally: Option<Arc<Tally>>,
}

impl Flow {
    /// A message was queued for the peer.
    pub fn sent(&self, bytes: usize) {
        self.messages_sent.inc();
        self.bytes_sent.add(bytes as u64);
        if let Some(tally) = &self.tally {
            tally.sent(bytes as u64);
        }
    }

    /// A message was taken from the peer.
    pub fn received(&self, bytes: usize) {
        self.messages_received.inc();
        self.bytes_received.add(bytes as u64);
        if let Some(tally) = &self.tally {
            tally.received(bytes as u64);
        }
    }
}

impl Flow {
    /// Bytes passed beside the messages: the exchange has a connection of its own.
    pub fn passed(&self, sent: u64, received: u64) {
        self.bytes_sent.add(sent);
        self.bytes_received.add(received);
        if let Some(tally) = &self.tally {
            tally.passed(sent, received);
        }
    }
}

/// The message counters of one role, by protocol type: few, made once, read without a lock.
pub struct Flows {
    role: &'static str,
    by_type: ArcSwap<Vec<(Arc<str>, Arc<Flow>)>>,
}

impl Flows {
    /// Returns none yet.
    #[must_use]
    pub fn new(role: &'static str) -> Self {
        Self { role, by_type: ArcSwap::default() }
    }

    /// Returns the counters of a type.
    #[must_use]
    pub fn of(&self, metrics: &Metrics, protocol_type: &Arc<str>) -> Arc<Flow> {
        let known = |flows: &[(Arc<str>, Arc<Flow>)]| {
            let found = flows.iter().find(|(name, _)| name == protocol_type);
            found.map(|(_, flow)| Arc::clone(flow))
        };
        if let Some(flow) = known(&self.by_type.load()) {
            return flow;
        }
        // Two threads that meet here make the same counters; one list wins.
        let flow = Arc::new(metrics.flow(self.role, protocol_type));
        self.by_type.rcu(|flows| {
            let mut flows = Vec::clone(flows);
            if known(&flows).is_none() {
                flows.push((Arc::clone(protocol_type), Arc::clone(&flow)));
            }
            flows
        });
        flow
    }
}

/// Something that is up, counted in a gauge until dropped.
pub struct Up(Gauge);

impl Up {
    fn new(gauge: Gauge) -> Self {
        gauge.inc();
        Self(gauge)
    }
}

impl Drop for Up {
    fn drop(&mut self) {
        self.0.dec();
    }
}

#[cfg(test)]
mod tests;

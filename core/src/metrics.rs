//! What is counted, for `/metrics`.
//!
//! The families and their names are an API boundary (docs/operations.md). Labels are bounded:
//! names from the configuration, types, codes; never a path or a free host. What the hot path
//! touches is looked up once per exchange and is an atomic from there on.

use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, OnceLock, PoisonError};
use std::time::{Instant, SystemTime, UNIX_EPOCH};

use arc_swap::ArcSwap;
use prometheus_client::encoding::{EncodeLabelSet, text};
use prometheus_client::metrics::counter::Counter;
use prometheus_client::metrics::family::Family;
use prometheus_client::metrics::gauge::Gauge;
use prometheus_client::metrics::histogram::{Histogram, exponential_buckets};
use prometheus_client::metrics::info::Info;
use prometheus_client::registry::{Registry, Unit};
use sidelane_abi::failure;

use crate::plugin::MetricSink;

mod plugins;

use plugins::PluginMetrics;

/// Lower bound of the first bucket of durations, in seconds; each is 4 times the one before. Eleven
/// of them span 100 µs to 105 s: from a local answer to a stream.
const DURATION_FIRST_S: f64 = 0.0001;

/// Buckets of durations.
const DURATION_BUCKETS: u16 = 11;

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
struct ListenerLabel {
    listener: Arc<str>,
}

#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
struct ReasonLabel {
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

type Durations = Family<ProtocolLabels, Histogram, fn() -> Histogram>;

/// All metrics of the process.
pub struct Metrics {
    registry: Arc<Mutex<Registry>>,
    plugins: Arc<PluginMetrics>,
    exchanges: Family<ExchangeLabels, Counter>,
    in_flight: Family<ProtocolLabels, Gauge>,
    durations: Durations,
    messages: Family<FlowLabels, Counter>,
    bytes: Family<FlowLabels, Counter>,
    crossing: Counter,
    sessions: Gauge,
    lanes: Family<RoleLabel, Gauge>,
    lanes_lost: Family<RoleLabel, Counter>,
    reconnects: Counter,
    handshakes_refused: Family<ReasonLabel, Counter>,
    connections: Family<ListenerLabel, Gauge>,
    connections_refused: Family<ListenerLabel, Counter>,
    front_answers: Family<ReasonLabel, Counter>,
    informational_dropped: Counter,
    reloads: Family<ResultLabel, Counter>,
    reload_ok: Gauge,
    reload_time: Gauge,
    announcements: Family<ResultLabel, Counter>,
    panics: Family<PluginLabels, Gauge>,
    generations: Family<GenerationLabels, Gauge>,
    quarantined: Family<PluginLabels, Gauge>,
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
        let buckets: fn() -> Histogram =
            || Histogram::new(exponential_buckets(DURATION_FIRST_S, 4.0, DURATION_BUCKETS));
        let registry = Arc::new(Mutex::new(registry));
        let metrics = Self {
            plugins: Arc::new(PluginMetrics::new(Arc::clone(&registry))),
            exchanges: Family::default(),
            in_flight: Family::default(),
            durations: Family::new_with_constructor(buckets),
            messages: Family::default(),
            bytes: Family::default(),
            crossing: Counter::default(),
            sessions: Gauge::default(),
            lanes: Family::default(),
            lanes_lost: Family::default(),
            reconnects: Counter::default(),
            handshakes_refused: Family::default(),
            connections: Family::default(),
            connections_refused: Family::default(),
            front_answers: Family::default(),
            informational_dropped: Counter::default(),
            reloads: Family::default(),
            reload_ok: Gauge::default(),
            reload_time: Gauge::default(),
            announcements: Family::default(),
            panics: Family::default(),
            generations: Family::default(),
            quarantined: Family::default(),
            registry,
        };
        metrics.register(&mut metrics.lock_registry());
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
        r.register("sessions", "Sidecars connected to this relay", self.sessions.clone());
        r.register("lanes", "Lanes that are up", self.lanes.clone());
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
            "front_answers",
            "Requests answered before any plugin saw them",
            self.front_answers.clone(),
        );
        r.register(
            "informational_dropped",
            "Interim responses that HTTP/1.1 clients could not be sent",
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
            "announcements",
            "Documents of sidecars, by what became of them",
            self.announcements.clone(),
        );
        r.register("plugin_panics", "Panics of a plugin's current version", self.panics.clone());
        r.register("plugin_generations", "Generations that are loaded", self.generations.clone());
        r.register(
            "plugin_quarantined",
            "1 where a plugin panicked too often and takes nothing",
            self.quarantined.clone(),
        );
    }

    fn lock_registry(&self) -> std::sync::MutexGuard<'_, Registry> {
        self.registry.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Writes all metrics in the OpenMetrics text format.
    pub fn encode(&self, out: &mut String) {
        if let Err(error) = text::encode(out, &self.lock_registry()) {
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
        let labels = ProtocolLabels { role, protocol_type: Arc::clone(protocol_type) };
        let in_flight = self.in_flight.get_or_create_owned(&labels);
        in_flight.inc();
        Record {
            metrics: Arc::clone(self),
            labels,
            in_flight,
            began: Instant::now(),
            routed: OnceLock::new(),
            is_ended: AtomicBool::new(false),
        }
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
        Flow { messages_sent, bytes_sent, messages_received, bytes_received }
    }

    /// An exchange's client is on another thread than its lane.
    pub fn exchange_crosses_threads(&self) {
        self.crossing.inc();
    }

    /// How many sidecars are connected.
    pub fn set_sessions(&self, count: usize) {
        self.sessions.set(i64::try_from(count).unwrap_or(i64::MAX));
    }

    /// A lane is up until the guard goes.
    #[must_use]
    pub fn lane_up(&self, role: &'static str) -> Up {
        Up::new(self.lanes.get_or_create_owned(&RoleLabel { role }))
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

    /// A sidecar's document was taken or refused.
    pub fn announced(&self, is_accepted: bool) {
        let result = if is_accepted { "accepted" } else { "refused" };
        self.announcements.get_or_create(&ResultLabel { result }).inc();
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
    labels: ProtocolLabels,
    in_flight: Gauge,
    began: Instant,
    routed: OnceLock<(Arc<str>, Arc<str>)>,
    is_ended: AtomicBool,
}

impl Record {
    /// The route and tunnel are known.
    pub fn routed(&self, route: &Arc<str>, tunnel: &Arc<str>) {
        self.routed.get_or_init(|| (Arc::clone(route), Arc::clone(tunnel)));
    }

    /// Ends it with one of [`failure`].
    pub fn end(&self, code: u32) {
        if self.is_ended.swap(true, Ordering::Relaxed) {
            return;
        }
        self.in_flight.dec();
        let (route, tunnel) = self.routed.get().cloned().unwrap_or_else(|| ("".into(), "".into()));
        let labels = ExchangeLabels {
            role: self.labels.role,
            route,
            tunnel,
            protocol_type: Arc::clone(&self.labels.protocol_type),
            code: failure::name(code),
        };
        self.metrics.exchanges.get_or_create(&labels).inc();
        let took = self.began.elapsed().as_secs_f64();
        self.metrics.durations.get_or_create(&self.labels).observe(took);
    }
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
    messages_sent: Counter,
    bytes_sent: Counter,
    messages_received: Counter,
    bytes_received: Counter,
}

impl Flow {
    /// A message was queued for the peer.
    pub fn sent(&self, bytes: usize) {
        self.messages_sent.inc();
        self.bytes_sent.inc_by(bytes as u64);
    }

    /// A message was taken from the peer.
    pub fn received(&self, bytes: usize) {
        self.messages_received.inc();
        self.bytes_received.inc_by(bytes as u64);
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

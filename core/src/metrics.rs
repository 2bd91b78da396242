//! What passed, and what is there: recorded without locks, encoded when somebody asks.
//!
//! Labels are bounded: names from the configuration and announcements, protocol types, codes; never
//! a path or a client's host. Whoever records per exchange or message looks its [`ExchangeMetrics`]
//! up once per route and keeps it. Knows nothing of who serves the text.

mod cell;
mod plugin;
mod process;

use std::collections::{HashMap, HashSet};
use std::fmt;
use std::sync::{Arc, Mutex, OnceLock, PoisonError};
use std::time::{Instant, SystemTime, UNIX_EPOCH};

use prometheus_client::metrics::family::Family;
use prometheus_client::metrics::info::Info;
use prometheus_client::registry::Registry;
use sidelane_abi::failure;

pub use cell::{Counter, Gauge, Held, Timing};
pub use plugin::{PLUGIN_METRICS_MAX, PluginMetrics};

/// Most different values of a label that comes from files, announcements or peers; later ones are
/// [`OTHER`]. Bounds the memory that names can take and the size of a scrape.
const LABEL_VALUES_MAX: usize = 10_000;

/// Stands for label values beyond the bound.
const OTHER: &str = "other";

/// Codes of [`failure`], with room for more.
const CODES: usize = 32;

/// Content type of [`Metrics::encode`].
pub const CONTENT_TYPE: &str = "application/openmetrics-text; version=1.0.0; charset=utf-8";

/// Which role records.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Role {
    /// Relay.
    Relay,
    /// Sidecar.
    Sidecar,
}

impl Role {
    /// Returns the label.
    #[must_use]
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::Relay => "relay",
            Self::Sidecar => "sidecar",
        }
    }
}

/// Which way a message goes.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Direction {
    /// From the client to the service.
    ToService,
    /// From the service to the client.
    ToClient,
}

impl Direction {
    /// Returns the label.
    #[must_use]
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::ToService => "to-service",
            Self::ToClient => "to-client",
        }
    }
}

/// A label and its value.
type Label = (&'static str, Arc<str>);

/// A family of metrics with `N` labels.
type Labelled<M, const N: usize> = Family<[Label; N], M>;

/// All metrics of the process.
#[derive(Debug)]
pub struct Metrics {
    registry: Registry,
    exchanges: Labelled<Counter, 5>,
    durations: Labelled<Timing, 2>,
    in_flight: Labelled<Gauge, 2>,
    messages: Labelled<Counter, 3>,
    message_bytes: Labelled<Counter, 3>,
    sessions: Labelled<Gauge, 1>,
    lanes: Labelled<Gauge, 1>,
    connections: Labelled<Gauge, 1>,
    handshakes_refused: Labelled<Counter, 1>,
    reloads: Labelled<Counter, 1>,
    reload_successful: prometheus_client::metrics::gauge::Gauge,
    reload_time: prometheus_client::metrics::gauge::Gauge<f64, std::sync::atomic::AtomicU64>,
    plugin_panics: Labelled<Counter, 1>,
    plugin_generations: Labelled<prometheus_client::metrics::gauge::Gauge, 2>,
    plugin_quarantined: Labelled<prometheus_client::metrics::gauge::Gauge, 1>,
    /// Lanes that were dialled again after a loss.
    pub lane_reconnects: Counter,
    /// Exchanges whose client and lane live on different threads.
    pub exchanges_cross_thread: Counter,
    /// What plugins register.
    pub plugins: Arc<PluginMetrics>,
    names: Mutex<Names>,
}

/// Role, route, tunnel, protocol type.
type ExchangeKey = (Role, Arc<str>, Arc<str>, Arc<str>);

/// Label values seen, and what is kept for them.
#[derive(Debug, Default)]
struct Names {
    seen: HashMap<&'static str, HashSet<Arc<str>>>,
    exchanges: HashMap<ExchangeKey, Arc<ExchangeMetrics>>,
}

impl Names {
    /// Returns the value as a label, or [`OTHER`] past the bound.
    fn value(&mut self, label: &'static str, value: &str) -> Arc<str> {
        let seen = self.seen.entry(label).or_default();
        if let Some(known) = seen.get(value) {
            return known.clone();
        }
        if seen.len() == LABEL_VALUES_MAX {
            return OTHER.into();
        }
        let value: Arc<str> = value.into();
        seen.insert(value.clone());
        value
    }
}

impl Default for Metrics {
    fn default() -> Self {
        Self::new()
    }
}

impl Metrics {
    /// Returns metrics that count nothing yet.
    #[must_use]
    pub fn new() -> Self {
        let mut metrics = Self {
            registry: Registry::default(),
            exchanges: Family::default(),
            durations: Family::default(),
            in_flight: Family::default(),
            messages: Family::default(),
            message_bytes: Family::default(),
            sessions: Family::default(),
            lanes: Family::default(),
            connections: Family::default(),
            handshakes_refused: Family::default(),
            reloads: Family::default(),
            reload_successful: Default::default(),
            reload_time: Default::default(),
            plugin_panics: Family::default(),
            plugin_generations: Family::default(),
            plugin_quarantined: Family::default(),
            lane_reconnects: Counter::default(),
            exchanges_cross_thread: Counter::default(),
            plugins: Arc::default(),
            names: Mutex::default(),
        };
        metrics.register();
        metrics
    }

    fn register(&mut self) {
        let registry = &mut self.registry;
        macro_rules! register {
            ($($name:literal, $help:literal, $metric:expr;)*) => {
                $(registry.register(concat!("sidelane_", $name), $help, $metric.clone());)*
            };
        }
        // Counters get their `_total` when they are encoded.
        register! {
            "exchanges", "Exchanges that have ended", self.exchanges;
            "exchange_duration_seconds", "Time from open to end of an exchange", self.durations;
            "exchanges_in_flight", "Exchanges that run", self.in_flight;
            "exchanges_cross_thread",
                "Exchanges whose client and lane live on different threads",
                self.exchanges_cross_thread;
            "messages", "Messages of exchanges", self.messages;
            "message_bytes", "Encoded bytes of messages of exchanges", self.message_bytes;
            "sessions", "Sessions", self.sessions;
            "lanes", "Lanes", self.lanes;
            "lane_reconnects", "Lanes dialled again after a loss", self.lane_reconnects;
            "handshakes_refused", "Handshakes refused", self.handshakes_refused;
            "connections", "Connections of clients", self.connections;
            "config_reloads", "Reloads of the configuration", self.reloads;
            "config_last_reload_successful", "1: the last reload was taken", self.reload_successful;
            "config_last_reload_success_timestamp_seconds",
                "When the configuration in use was taken, seconds since 1970",
                self.reload_time;
            "plugin_panics", "Panics of plugins", self.plugin_panics;
            "plugin_generations", "Resident generations of plugins", self.plugin_generations;
            "plugin_quarantined", "1: the plugin is in quarantine", self.plugin_quarantined;
        }
        let build = Info::new([("version", env!("CARGO_PKG_VERSION"))]);
        registry.register("sidelane_build", "The program", build);
        registry.register_collector(Box::new(self.plugins.clone()));
        registry.register_collector(Box::new(process::Process::new()));
    }

    /// Returns the text of all metrics, in the OpenMetrics format.
    #[must_use]
    pub fn encode(&self) -> String {
        let mut text = String::new();
        prometheus_client::encoding::text::encode(&mut text, &self.registry)
            .expect("writing to a string does not fail");
        text
    }

    /// Returns the metrics of one route's exchanges of one protocol type. Takes a lock: keep them.
    #[must_use]
    pub fn exchange(
        &self,
        role: Role,
        route: &str,
        tunnel: &str,
        protocol_type: &str,
    ) -> Arc<ExchangeMetrics> {
        let mut names = self.names();
        let route = names.value("route", route);
        let tunnel = names.value("tunnel", tunnel);
        let protocol_type = names.value("protocol_type", protocol_type);
        let key = (role, route.clone(), tunnel.clone(), protocol_type.clone());
        let flow = |direction: Direction| {
            let labels = [
                ("role", role.as_str().into()),
                ("protocol_type", protocol_type.clone()),
                ("direction", direction.as_str().into()),
            ];
            Flow {
                messages: self.messages.get_or_create_owned(&labels),
                bytes: self.message_bytes.get_or_create_owned(&labels),
            }
        };
        let by_type = [("role", role.as_str().into()), ("protocol_type", protocol_type.clone())];
        names
            .exchanges
            .entry(key)
            .or_insert_with(|| {
                Arc::new(ExchangeMetrics {
                    to_service: flow(Direction::ToService),
                    to_client: flow(Direction::ToClient),
                    family: self.exchanges.clone(),
                    labels: [
                        ("role", role.as_str().into()),
                        ("route", route),
                        ("tunnel", tunnel),
                        ("protocol_type", protocol_type.clone()),
                    ],
                    by_code: std::array::from_fn(|_| OnceLock::new()),
                    duration: self.durations.get_or_create_owned(&by_type),
                    in_flight: self.in_flight.get_or_create_owned(&by_type),
                })
            })
            .clone()
    }

    /// Drops what is kept for routes that are gone. Exchanges that still run on one are counted
    /// into metrics that are no longer shown.
    pub fn retain_routes(&self, keep: impl Fn(&str) -> bool) {
        let mut names = self.names();
        let mut kept = HashSet::new();
        names.exchanges.retain(|(_, route, ..), metrics| {
            let keep = **route == *OTHER || keep(route);
            if keep {
                kept.insert(route.clone());
            } else {
                metrics.forget();
            }
            keep
        });
        names.seen.insert("route", kept);
    }

    /// Returns the gauge of a role's sessions.
    #[must_use]
    pub fn sessions(&self, role: Role) -> Gauge {
        self.sessions.get_or_create_owned(&[("role", role.as_str().into())])
    }

    /// Returns the gauge of a role's lanes.
    #[must_use]
    pub fn lanes(&self, role: Role) -> Gauge {
        self.lanes.get_or_create_owned(&[("role", role.as_str().into())])
    }

    /// Returns the gauge of a listener's connections.
    #[must_use]
    pub fn connections(&self, listener: &str) -> Gauge {
        let listener = self.names().value("listener", listener);
        self.connections.get_or_create_owned(&[("listener", listener)])
    }

    /// Counts a handshake that was refused.
    pub fn handshake_refused(&self, reason: &'static str) {
        self.handshakes_refused.get_or_create(&[("reason", reason.into())]).inc();
    }

    /// Counts a reload. The first load counts as none, but sets the gauges.
    pub fn reloaded(&self, outcome: Reload) {
        let result = match outcome {
            Reload::Started => None,
            Reload::Taken => Some("success"),
            Reload::Refused => Some("failure"),
        };
        if let Some(result) = result {
            self.reloads.get_or_create(&[("result", result.into())]).inc();
        }
        let taken = outcome != Reload::Refused;
        self.reload_successful.set(taken.into());
        if taken {
            let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
            self.reload_time.set(now.as_secs_f64());
        }
    }

    /// Counts a plugin's panic.
    pub fn plugin_panicked(&self, plugin: &str) {
        let plugin = self.names().value("plugin", plugin);
        self.plugin_panics.get_or_create(&[("plugin", plugin)]).inc();
    }

    /// Sets how many generations of which plugin are in which state, and which plugins are in
    /// quarantine.
    pub fn set_plugins<'a>(
        &self,
        generations: impl IntoIterator<Item = (&'a str, &'static str)>,
        quarantined: impl IntoIterator<Item = (&'a str, bool)>,
    ) {
        let mut names = self.names();
        self.plugin_generations.clear();
        for (plugin, state) in generations {
            let labels = [("plugin", names.value("plugin", plugin)), ("state", state.into())];
            self.plugin_generations.get_or_create(&labels).inc();
        }
        self.plugin_quarantined.clear();
        for (plugin, quarantined) in quarantined {
            let labels = [("plugin", names.value("plugin", plugin))];
            self.plugin_quarantined.get_or_create(&labels).set(quarantined.into());
        }
    }

    fn names(&self) -> std::sync::MutexGuard<'_, Names> {
        self.names.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// How a reload ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Reload {
    /// The process starts with this configuration.
    Started,
    /// The new configuration is in use.
    Taken,
    /// The last good configuration stays.
    Refused,
}

/// Messages of one direction.
#[derive(Clone, Debug)]
pub struct Flow {
    /// Messages.
    pub messages: Counter,
    /// Their encoded bytes.
    pub bytes: Counter,
}

impl Flow {
    /// Counts a message of `bytes` encoded bytes.
    pub fn record(&self, bytes: usize) {
        self.messages.inc();
        self.bytes.add(bytes as u64);
    }
}

/// Metrics of one route's exchanges of one protocol type, at one role.
pub struct ExchangeMetrics {
    /// From client to service.
    pub to_service: Flow,
    /// From service to client.
    pub to_client: Flow,
    family: Labelled<Counter, 5>,
    labels: [Label; 4],
    /// By code; made when an exchange first ends with it, so that a scrape holds no empty rows.
    by_code: [OnceLock<Counter>; CODES],
    duration: Timing,
    in_flight: Gauge,
}

impl fmt::Debug for ExchangeMetrics {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("ExchangeMetrics").field("labels", &self.labels).finish_non_exhaustive()
    }
}

impl ExchangeMetrics {
    /// Counts an exchange that begins.
    #[must_use]
    pub fn begin(self: &Arc<Self>) -> Running {
        self.in_flight.inc();
        Running { metrics: self.clone(), started: Instant::now(), code: failure::CANCELLED }
    }

    fn ended(&self, code: u32) -> &Counter {
        // A code that this build does not know is counted as the last one.
        let index = (code as usize).min(CODES - 1);
        self.by_code[index].get_or_init(|| self.family.get_or_create_owned(&self.labels_with(code)))
    }

    fn labels_with(&self, code: u32) -> [Label; 5] {
        let [role, route, tunnel, protocol_type] = self.labels.clone();
        [role, route, tunnel, protocol_type, ("code", failure::name(code).into())]
    }

    fn forget(&self) {
        for (code, _) in (0..).zip(&self.by_code).filter(|(_, counter)| counter.get().is_some()) {
            self.family.remove(&self.labels_with(code));
        }
    }
}

/// An exchange that runs; dropped without [`Running::end`] it counts as cancelled.
#[derive(Debug)]
pub struct Running {
    metrics: Arc<ExchangeMetrics>,
    started: Instant,
    code: u32,
}

impl Running {
    /// Counts the exchange as ended with this code of [`failure`].
    pub fn end(mut self, code: u32) {
        self.code = code;
    }

    /// Returns the metrics it is counted in.
    #[must_use]
    pub fn metrics(&self) -> &Arc<ExchangeMetrics> {
        &self.metrics
    }
}

impl Drop for Running {
    fn drop(&mut self) {
        self.metrics.in_flight.dec();
        self.metrics.ended(self.code).inc();
        self.metrics.duration.observe(self.started.elapsed());
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Checks that the text has each line.
    #[track_caller]
    fn check(metrics: &Metrics, lines: &[&str]) {
        let text = metrics.encode();
        for line in lines {
            assert!(text.lines().any(|l| l == *line), "no line {line}\n{text}");
        }
    }

    #[test]
    fn an_exchange_is_counted_once_with_its_code() {
        let metrics = Metrics::new();
        let exchange = metrics.exchange(Role::Relay, "demo", "d", "HTTP");
        let running = exchange.begin();
        let labels = "role=\"relay\",protocol_type=\"HTTP\"";
        check(&metrics, &[&format!("sidelane_exchanges_in_flight{{{labels}}} 1")]);
        exchange.to_service.record(100);
        running.end(failure::NONE);
        drop(exchange.begin());
        let total = "sidelane_exchanges_total{role=\"relay\",route=\"demo\",tunnel=\"d\",protocol_type=\"HTTP\"";
        check(
            &metrics,
            &[
                &format!("sidelane_exchanges_in_flight{{{labels}}} 0"),
                &format!("{total},code=\"none\"}} 1"),
                &format!("{total},code=\"cancelled\"}} 1"),
                &format!("sidelane_messages_total{{{labels},direction=\"to-service\"}} 1"),
                &format!("sidelane_message_bytes_total{{{labels},direction=\"to-service\"}} 100"),
                &format!("sidelane_exchange_duration_seconds_count{{{labels}}} 2"),
                &format!("sidelane_exchange_duration_seconds_bucket{{le=\"+Inf\",{labels}}} 2"),
            ],
        );
    }

    #[test]
    fn one_route_is_looked_up_once() {
        let metrics = Metrics::new();
        let one = metrics.exchange(Role::Relay, "demo", "d", "HTTP");
        assert!(Arc::ptr_eq(&one, &metrics.exchange(Role::Relay, "demo", "d", "HTTP")));
        assert!(!Arc::ptr_eq(&one, &metrics.exchange(Role::Sidecar, "demo", "d", "HTTP")));
    }

    #[test]
    fn label_values_are_bounded() {
        let metrics = Metrics::new();
        for index in 0..LABEL_VALUES_MAX {
            let _ = metrics.exchange(Role::Relay, &format!("r{index}"), "d", "HTTP");
        }
        let _running = metrics.exchange(Role::Relay, "one-too-many", "d", "HTTP").begin();
        metrics.exchange(Role::Relay, "r0", "d", "HTTP").begin().end(failure::NONE);
        metrics.exchange(Role::Relay, "x", "d", "HTTP").begin().end(failure::NONE);
        let text = metrics.encode();
        assert!(text.contains("route=\"other\"") && text.contains("route=\"r0\""));
        assert!(!text.contains("route=\"x\""));
    }

    #[test]
    fn removed_routes_leave_no_rows() {
        let metrics = Metrics::new();
        for route in ["stays", "goes"] {
            metrics.exchange(Role::Relay, route, "d", "HTTP").begin().end(failure::NO_SIDECAR);
        }
        metrics.retain_routes(|route| route == "stays");
        let text = metrics.encode();
        assert!(text.contains("route=\"stays\"") && !text.contains("route=\"goes\""), "{text}");
        metrics.exchange(Role::Relay, "goes", "d", "HTTP").begin().end(failure::NONE);
        assert!(metrics.encode().contains("route=\"goes\""));
    }

    #[test]
    fn reloads_tell_their_result() {
        let metrics = Metrics::new();
        metrics.reloaded(Reload::Started);
        check(&metrics, &["sidelane_config_last_reload_successful 1"]);
        assert!(!metrics.encode().contains("sidelane_config_reloads_total{"));
        metrics.reloaded(Reload::Refused);
        check(
            &metrics,
            &[
                "sidelane_config_last_reload_successful 0",
                "sidelane_config_reloads_total{result=\"failure\"} 1",
            ],
        );
        metrics.reloaded(Reload::Taken);
        check(&metrics, &["sidelane_config_last_reload_successful 1"]);
    }

    #[test]
    fn plugins_and_their_metrics_are_shown() {
        let metrics = Metrics::new();
        metrics.set_plugins(
            [("http", "current"), ("http", "draining"), ("http", "draining")],
            [("http", false)],
        );
        metrics.plugin_panicked("http");
        let counter = metrics
            .plugins
            .register("http", sidelane_abi::metric::COUNTER, "reused", "Help")
            .unwrap();
        metrics.plugins.add(counter, 2.0);
        let seconds = metrics
            .plugins
            .register("http", sidelane_abi::metric::HISTOGRAM, "wait_seconds", "Help")
            .unwrap();
        metrics.plugins.add(seconds, 0.5);
        check(
            &metrics,
            &[
                "sidelane_plugin_generations{plugin=\"http\",state=\"draining\"} 2",
                "sidelane_plugin_quarantined{plugin=\"http\"} 0",
                "sidelane_plugin_panics_total{plugin=\"http\"} 1",
                "sidelane_plugin_reused_total{plugin=\"http\"} 2.0",
                "sidelane_plugin_wait_seconds_bucket{le=\"0.1\",plugin=\"http\"} 0",
                "sidelane_plugin_wait_seconds_bucket{le=\"1.0\",plugin=\"http\"} 1",
            ],
        );
        metrics.set_plugins([("http", "current")], [("http", true)]);
        assert!(!metrics.encode().contains("draining"));
    }

    #[test]
    fn the_rest_has_rows_of_its_own() {
        let metrics = Metrics::new();
        let _session = metrics.sessions(Role::Relay).hold();
        let _connection = metrics.connections("web").hold();
        metrics.handshake_refused("credential");
        metrics.lane_reconnects.inc();
        check(
            &metrics,
            &[
                "sidelane_sessions{role=\"relay\"} 1",
                "sidelane_connections{listener=\"web\"} 1",
                "sidelane_handshakes_refused_total{reason=\"credential\"} 1",
                "sidelane_lane_reconnects_total 1",
                &format!("sidelane_build_info{{version=\"{}\"}} 1", env!("CARGO_PKG_VERSION")),
                "# EOF",
            ],
        );
        for name in
            ["process_cpu_seconds_total", "process_resident_memory_bytes", "process_open_fds"]
        {
            assert!(metrics.encode().lines().any(|line| line.starts_with(name)), "{name}");
        }
    }
}

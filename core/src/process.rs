//! One process: puts the roles together as the file says, reloads it, and ends them in order.
//!
//! Knows who is started in which order; what they do is theirs.

use std::io;
use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use serde_json::json;
use sidelane_tunnel::{LaneConfig, Side};
use thiserror::Error;
use tokio::signal::unix::{SignalKind, signal};
use tokio::sync::{broadcast, mpsc};
use tokio::time::MissedTickBehavior;

use crate::admin::{self, AdminState, Readiness, ReloadRequest};
use crate::config::watch::{Reload, Watcher};
use crate::config::{self, Changes, Config, ConfigError, ConfigErrors, Fault, PluginCheck, Relays};
use crate::error::chain;
use crate::explain::{self, Question};
use crate::front::FrontConfig;
use crate::metrics::{Ended, Metrics};
use crate::plugin::{
    GenerationState, HostContext, Limits, LoadError, LoadFault, PluginSpec, Plugins,
};
use crate::relay::Relay;
use crate::shard::Shards;
use crate::sidecar::{self, Sidecar};
use crate::tunnel::accept::Bounds;
use crate::tunnel::pressure::PRESSURE_TICK;
use crate::tunnel::{dial, session};

mod check;
mod log;
mod sockets;

pub use check::{Checked, check};
use sockets::Sockets;

/// How often the end of running exchanges is looked for during shutdown.
const DRAIN_TICK: Duration = Duration::from_millis(20);

/// What is left of the deadline for lanes to write what is queued, after the exchanges.
const CLOSE_GRACE: Duration = Duration::from_millis(500);

/// How often what has its time is looked at: replaced plugins, whose exchanges end past the drain
/// timeout, and routes of lost sidecars.
const EXPIRY_TICK: Duration = Duration::from_secs(1);

/// Reload requests that wait; more are refused, since one that waits covers them.
const RELOADS_MAX: usize = 8;

/// Why the process did not start, or ended.
#[derive(Debug, Error)]
pub enum RunError {
    /// The file does not hold.
    #[error(transparent)]
    Config(#[from] ConfigErrors),
    /// An address cannot be bound.
    #[error("{what}: cannot listen on {address}")]
    Bind {
        /// Path in the file.
        what: String,
        /// The address.
        address: SocketAddr,
        /// Why.
        #[source]
        source: io::Error,
    },
    /// The ports file cannot be written.
    #[error("cannot write {}", .path.display())]
    PortsFile {
        /// Where.
        path: PathBuf,
        /// Why.
        #[source]
        source: io::Error,
    },
    /// A thread, runtime or signal handler cannot be made.
    #[error("cannot start")]
    Start(#[source] io::Error),
    /// Who follows the process ended it.
    #[error("{0}")]
    Stopped(String),
}

/// A process that runs, as who follows it sees it.
pub struct Followed {
    /// The sidecar's role.
    pub sidecar: Option<Arc<Sidecar>>,
    /// Exchanges as they end.
    pub exchanges: broadcast::Receiver<Arc<Ended>>,
    /// Ends the process in order, which fails for the reason sent.
    pub stop: mpsc::Sender<String>,
}

/// Follows a process once it has started; must not wait, but may start a thread that does.
pub type Follow = Box<dyn FnOnce(Followed) -> io::Result<()>>;

/// Runs the process until a signal ends it.
///
/// # Errors
/// Why it did not start.
pub fn run(file: &Path, ports_file: Option<&Path>) -> Result<(), RunError> {
    let (source, config) = check::load(file)?;
    run_config(&source, config, ports_file, None)
}

/// Runs the process of a configuration until a signal ends it. One that is followed comes from no file,
/// and is not read again.
///
/// # Errors
/// Why it did not start, or why `follow` ended it.
pub fn run_config(
    source: &config::Source,
    config: Config,
    ports_file: Option<&Path>,
    follow: Option<Follow>,
) -> Result<(), RunError> {
    let file = &source.path;
    let log = log::init(&config.log);
    tracing::info!(version = env!("CARGO_PKG_VERSION"), file = %file.display(), "starting");
    check::warn(&config);
    let metrics = Arc::new(Metrics::new());
    let exchanges = follow.is_some().then(|| metrics.follow());
    let relay_threads = config.relay.as_ref().map_or(0, |relay| threads(relay.threads));
    let sidecar_threads = config.sidecar.as_ref().map_or(0, |sidecar| threads(sidecar.threads));
    let total = relay_threads + sidecar_threads;
    let host = HostContext::new(metrics.sink()).with_shards(
        u32::try_from(total).map_err(|error| RunError::Start(io::Error::other(error)))?,
    );
    let plugins = Arc::new(Plugins::new(host, limits(&config.plugins)));
    check::ask(&plugins, &config)?;
    let sockets = Sockets::bind(&config)?;
    let start =
        |name, count, first| Shards::start(name, count, first, total).map_err(RunError::Start);
    let relay_shards = start("relay", relay_threads, 0)?;
    let sidecar_shards = start("sidecar", sidecar_threads, relay_threads)?;

    if let Some(path) = ports_file {
        sockets.write(path)?;
    }
    let relay = config.relay.as_ref().map(|section| {
        let relay = Relay::new(
            section.base_domains.clone(),
            session_settings(section, &plugins),
            section.timeouts.open_wait,
            Arc::clone(&plugins),
            Arc::clone(&metrics),
        );
        relay.configure(&config);
        relay
    });
    let sidecar = config.sidecar.as_ref().map(|section| {
        let sidecar = Sidecar::new(
            sidecar_settings(section),
            relay_addresses(section, &sockets),
            Arc::clone(&plugins),
            Arc::clone(&metrics),
            Arc::clone(&sidecar_shards.all),
        );
        sidecar.configure(&config);
        sidecar
    });

    let (reloads, reload_requests) = mpsc::channel(RELOADS_MAX);
    let process = Arc::new(Process {
        relay,
        sidecar,
        plugins,
        metrics,
        config: Mutex::new(Arc::new(config)),
        last_error: Mutex::new(None),
        draining: AtomicBool::new(false),
        reloads,
    });
    process.metrics.reloaded(true);
    process.start(sockets, &relay_shards)?;
    let (stop, stops) = mpsc::channel(1);
    let watched = if let (Some(follow), Some(exchanges)) = (follow, exchanges) {
        let sidecar = process.sidecar.clone();
        follow(Followed { sidecar, exchanges, stop }).map_err(RunError::Start)?;
        None
    } else {
        Some(source)
    };
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()
        .map_err(RunError::Start)?;
    let ended = runtime.block_on(process.control(watched, reload_requests, stops, &log));
    relay_shards.stop();
    sidecar_shards.stop();
    match ended.map_err(RunError::Start)? {
        Some(reason) => Err(RunError::Stopped(reason)),
        None => Ok(()),
    }
}

struct Process {
    relay: Option<Arc<Relay>>,
    sidecar: Option<Arc<Sidecar>>,
    plugins: Arc<Plugins>,
    metrics: Arc<Metrics>,
    config: Mutex<Arc<Config>>,
    /// Why the last reload failed; the configuration before it is in force.
    last_error: Mutex<Option<String>>,
    draining: AtomicBool,
    reloads: mpsc::Sender<ReloadRequest>,
}

impl Process {
    /// Starts what the file asks for.
    fn start(self: &Arc<Self>, sockets: Sockets, relay_shards: &Shards) -> Result<(), RunError> {
        let config = self.config();
        let Sockets { listeners, tunnel, health, admin, .. } = sockets;
        let state: Arc<dyn AdminState> = Arc::clone(self) as Arc<dyn AdminState>;
        admin::start(state, health, admin).map_err(RunError::Start)?;
        if let (Some(relay), Some(section), Some(tunnel)) = (&self.relay, &config.relay, tunnel) {
            relay.start(
                &relay_shards.all,
                listeners,
                tunnel,
                front_config(section),
                section.limits.connections,
                handshake_bounds(section),
            );
        }
        if let Some(sidecar) = &self.sidecar {
            sidecar.start();
        }
        Ok(())
    }

    /// Holds each role to its bound on queued bytes.
    fn balance(&self) {
        let config = self.config();
        if let (Some(relay), Some(section)) = (&self.relay, &config.relay) {
            relay.balance(section.limits.queued);
        }
        if let (Some(sidecar), Some(section)) = (&self.sidecar, &config.sidecar) {
            sidecar.balance(section.limits.queued);
        }
    }

    /// Whether the sidecar serves the relay of this process, and no other.
    fn is_embedded(&self) -> bool {
        let config = self.config();
        self.relay.is_some()
            && config
                .sidecar
                .as_ref()
                .is_some_and(|section| matches!(section.relays, Relays::Embedded))
    }

    /// Reloads and waits for a signal; then ends what runs, in order. Without a source there is nothing
    /// to read again. Returns why it was stopped, where that was no signal.
    async fn control(
        &self,
        source: Option<&config::Source>,
        mut requests: mpsc::Receiver<ReloadRequest>,
        mut stops: mpsc::Receiver<String>,
        log: &log::Handle,
    ) -> io::Result<Option<String>> {
        let (reloads, mut reloads_due) = mpsc::channel(1);
        let watch = |source| Watcher::start(source, &self.config().files, reloads);
        let watcher = source.map(watch).transpose()?;
        if let Some(source) = source
            && config::watch::is_sub_path_mount(&source.path)
        {
            tracing::warn!(file = %source.path.display(),
                "the file is a subPath mount, which Kubernetes never updates: mount its directory"
            );
        }
        let trigger = || watcher.as_ref().map(Watcher::trigger);
        let mut stopped = None;
        // Who asked, in order; each trigger yields one reload.
        let mut asked: Vec<ReloadRequest> = Vec::new();
        let mut tick = tokio::time::interval(EXPIRY_TICK);
        let mut pressure_tick = tokio::time::interval(PRESSURE_TICK);
        pressure_tick.set_missed_tick_behavior(MissedTickBehavior::Delay);
        let mut terminate = signal(SignalKind::terminate())?;
        let mut interrupt = signal(SignalKind::interrupt())?;
        let mut hangup = signal(SignalKind::hangup())?;
        loop {
            tokio::select! {
                _ = terminate.recv() => break,
                _ = interrupt.recv() => break,
                _ = hangup.recv() => {
                    tracing::info!("SIGHUP: reading the configuration again");
                    trigger();
                }
                Some(reason) = stops.recv() => {
                    stopped = Some(reason);
                    break;
                }
                Some(Reload { source, .. }) = reloads_due.recv() => {
                    let result = self.reload(source, log);
                    if let Some(watcher) = &watcher {
                        watcher.set_files(self.config().files.clone());
                    }
                    for request in asked.drain(..) {
                        // Whoever asked may have gone.
                        let _ = request.reply.send(result.clone());
                    }
                }
                _ = pressure_tick.tick() => self.balance(),
                _ = tick.tick() => {
                    self.plugins.end_drained(self.config().drain_timeout);
                    if let Some(relay) = &self.relay {
                        relay.expire(Instant::now());
                    }
                }
                Some(request) = requests.recv() => {
                    if trigger().is_some() {
                        asked.push(request);
                    } else {
                        // Whoever asked may have gone.
                        let _ = request.reply.send(Err("there is no file to read again".to_owned()));
                    }
                }
            }
        }
        tracing::info!("shutting down: running exchanges may end");
        tokio::select! {
            () = self.drain() => {}
            _ = terminate.recv() => tracing::warn!("second signal: exiting at once"),
            _ = interrupt.recv() => tracing::warn!("second signal: exiting at once"),
        }
        Ok(stopped)
    }

    /// Ends in order: nobody new, then running exchanges, then lanes.
    async fn drain(&self) {
        let deadline = Instant::now() + self.config().drain_timeout;
        self.draining.store(true, Ordering::Relaxed);
        if let Some(relay) = &self.relay {
            relay.drain();
        }
        // Long-lived exchanges do not end by themselves: their plugins take leave in time.
        self.plugins.take_leave(deadline);
        let at_relay =
            || self.relay.as_ref().map_or(0, |relay| relay.exchanges() + relay.connections());
        if let Some(sidecar) = &self.sidecar {
            if self.is_embedded() {
                // What the relay of this process has accepted is still to be delivered.
                wait_until(deadline, || at_relay() == 0).await;
            }
            sidecar.drain();
        }
        let running =
            || at_relay() + self.sidecar.as_ref().map_or(0, |sidecar| sidecar.exchanges());
        wait_until(deadline, || running() == 0).await;
        let left = running();
        if left > 0 {
            tracing::warn!(exchanges = left, "deadline passed: ending what still runs");
        }
        if let Some(relay) = &self.relay {
            relay.close();
        }
        if let Some(sidecar) = &self.sidecar {
            sidecar.close();
        }
        let lanes = || {
            self.relay.as_ref().map_or(0, |relay| relay.sessions())
                + self.sidecar.as_ref().map_or(0, |sidecar| sidecar.lanes())
        };
        wait_until(Instant::now() + CLOSE_GRACE, || lanes() == 0).await;
        tracing::info!("ended");
    }

    /// Takes a new configuration, or keeps the old one and says why.
    fn reload(
        &self,
        source: Result<config::Source, ConfigErrors>,
        log: &log::Handle,
    ) -> Result<String, String> {
        let result = source
            .and_then(|source| check::reread(&source, &self.plugins, &self.config()))
            .map_err(RunError::from)
            .and_then(|config| self.take(config, log));
        match result {
            Ok(summary) => {
                self.metrics.reloaded(true);
                *self.lock_error() = None;
                tracing::info!(summary, "configuration reloaded");
                Ok(summary)
            }
            Err(error) => Err(self.reload_failed(&error)),
        }
    }

    fn reload_failed(&self, error: &dyn std::error::Error) -> String {
        let text = chain(error);
        self.metrics.reloaded(false);
        tracing::error!(
            error = text,
            "configuration not reloaded: the last good one stays in force"
        );
        *self.lock_error() = Some(text.clone());
        text
    }

    fn take(&self, mut config: Config, log: &log::Handle) -> Result<String, RunError> {
        let old = self.config();
        config.reuse(&old);
        let changes = config::diff(&old, &config);
        // Always: a library's file may be another one under the same name.
        let loaded = load_plugins(&self.plugins, &config)?;
        if let Err(errors) = config.check_plugins(&Asked(&self.plugins)) {
            // Only plugins that are loaded can be asked; what they refuse brings back those before.
            if let Err(error) = load_plugins(&self.plugins, &old) {
                tracing::error!(error = chain(&error), "the plugins before cannot be brought back");
            }
            return Err(errors.into());
        }
        if changes.is_empty() && loaded.is_empty() {
            return Ok("nothing has changed".to_owned());
        }
        check::warn(&config);
        for what in &changes.needs_restart {
            tracing::warn!(setting = what, "changed, and takes effect only after a restart");
        }
        if let Some(relay) = &self.relay {
            relay.configure(&config);
        }
        if let Some(sidecar) = &self.sidecar {
            sidecar.configure(&config);
        }
        log.update(&config.log);
        *self.config.lock().unwrap_or_else(PoisonError::into_inner) = Arc::new(config);
        Ok(summary(&changes, &loaded))
    }

    fn config(&self) -> Arc<Config> {
        Arc::clone(&self.config.lock().unwrap_or_else(PoisonError::into_inner))
    }

    fn lock_error(&self) -> std::sync::MutexGuard<'_, Option<String>> {
        self.last_error.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Waits until `done`, or the deadline.
async fn wait_until(deadline: Instant, done: impl Fn() -> bool) {
    while !done() && Instant::now() < deadline {
        tokio::time::sleep(DRAIN_TICK).await;
    }
}

fn summary(changes: &Changes, loaded: &[String]) -> String {
    let count = |added: usize, removed: usize, changed: usize, what: &str| {
        format!("{what}: {added} added, {removed} removed, {changed} changed")
    };
    let routes = &changes.routes;
    let tunnels = &changes.tunnels;
    let mut text = format!(
        "{}; {}",
        count(routes.added.len(), routes.removed.len(), routes.changed.len(), "routes"),
        count(tunnels.added.len(), tunnels.removed.len(), tunnels.changed.len(), "tunnels"),
    );
    let others = [
        (changes.base_domains, "relay.base_domains"),
        (changes.plugins, "plugins"),
        (changes.log, "log"),
        (changes.drain_timeout, "drain_timeout"),
    ];
    let others: Vec<_> =
        others.into_iter().filter_map(|(differs, what)| differs.then_some(what)).collect();
    if !others.is_empty() {
        text += &format!("; changed: {}", others.join(", "));
    }
    if !loaded.is_empty() {
        text += &format!("; plugins loaded: {}", loaded.join(", "));
    }
    if !changes.needs_restart.is_empty() {
        text += &format!("; only after a restart: {}", changes.needs_restart.join(", "));
    }
    text
}

/// Loads what the file names. Returns the names of those that were not running before.
fn load_plugins(plugins: &Plugins, config: &Config) -> Result<Vec<String>, RunError> {
    let specs: Vec<PluginSpec> = config.plugins.libraries.iter().map(spec).collect();
    let applied = plugins.apply(&specs, config.drain_timeout).map_err(|faults| {
        ConfigErrors::join(None, refused(config, &faults)).map_or_else(
            || RunError::Start(io::Error::other("no plugin was loaded and none refused")),
            RunError::Config,
        )
    })?;
    for error in &applied.failed {
        tracing::error!(error = chain(error), "a plugin that is not required is left out");
    }
    Ok(applied.loaded)
}

/// Returns which plugins cannot be loaded or refuse their block, each with its place in the file.
fn refused(config: &Config, faults: &[LoadError]) -> Vec<ConfigError> {
    let error = |error: &LoadError| match &error.fault {
        LoadFault::Refused(fault) => {
            let fault = Fault { message: fault.message.clone(), path: fault.path.clone() };
            config.library_fault(&error.plugin, &fault)
        }
        _ => config.library_error(&error.plugin, chain(error)),
    };
    faults.iter().map(error).collect()
}

fn spec(library: &config::Library) -> PluginSpec {
    PluginSpec {
        name: library.name.to_string(),
        library: library.path.clone(),
        sha256: library.sha256,
        required: library.required,
        config: library.config.value.clone(),
        types: library
            .protocol_types
            .as_ref()
            .map(|types| types.iter().map(ToString::to_string).collect()),
    }
}

/// Asks the loaded plugins about a configuration.
struct Asked<'a>(&'a Plugins);

impl PluginCheck for Asked<'_> {
    fn types(&self) -> Vec<Arc<str>> {
        self.0.types()
    }

    fn validate_route(&self, protocol_type: &str, options_json: &str) -> Result<(), Fault> {
        self.0
            .validate_route(protocol_type, options_json)
            .map_err(|fault| Fault { message: fault.message, path: fault.path })
    }
}

fn limits(plugins: &config::Plugins) -> Limits {
    Limits {
        generations_max: plugins.generations,
        panics_max: plugins.panics,
        panics_window: plugins.panics_within,
        slow_poll: plugins.slow_poll,
    }
}

fn threads(configured: usize) -> usize {
    if configured > 0 {
        return configured;
    }
    std::thread::available_parallelism().map_or(1, std::num::NonZero::get)
}

fn session_settings(section: &config::Relay, plugins: &Plugins) -> session::Settings {
    let limits = &section.limits;
    session::Settings {
        token: section.tunnel.token.as_ref().map(|token| token.expose().as_bytes().into()),
        sessions_max: limits.sessions,
        lanes_max: u32::try_from(limits.lanes_per_session).unwrap_or(u32::MAX),
        lane: LaneConfig {
            exchanges_max: limits.exchanges_per_session,
            ..windows(LaneConfig::new(Side::Relay), limits.window)
        },
        protocols: plugins.types(),
    }
}

fn sidecar_settings(section: &config::Sidecar) -> sidecar::Settings {
    sidecar::Settings {
        name: section.name.to_string(),
        token: section.token.as_ref().map(|token| token.expose().as_bytes().into()),
        lanes: u32::try_from(section.lanes).unwrap_or(u32::MAX),
        lane: LaneConfig {
            exchanges_max: section.limits.exchanges_per_session,
            ..windows(LaneConfig::new(Side::Sidecar), section.limits.window)
        },
        timeouts: dial::Timeouts {
            connect: section.timeouts.dial,
            answer: section.timeouts.handshake,
        },
    }
}

/// Bounds an exchange's credit, that which it begins with too.
fn windows(lane: LaneConfig, max: u64) -> LaneConfig {
    LaneConfig { receive_window: lane.receive_window.min(max), window_max: max, ..lane }
}

fn handshake_bounds(section: &config::Relay) -> Bounds {
    Bounds {
        timeout: section.timeouts.handshake,
        per_second: section.limits.handshakes_per_second,
        per_second_and_address: section.limits.handshakes_per_second_per_address,
    }
}

fn relay_addresses(section: &config::Sidecar, sockets: &Sockets) -> Vec<String> {
    match &section.relays {
        Relays::Embedded => sockets.tunnel_address.iter().map(ToString::to_string).collect(),
        Relays::Listed(relays) => relays.iter().map(ToString::to_string).collect(),
    }
}

fn front_config(section: &config::Relay) -> FrontConfig {
    let limits = &section.limits;
    FrontConfig {
        request_head_timeout: section.timeouts.request_head,
        idle_timeout: section.timeouts.idle,
        head_bytes_max: u32::try_from(limits.request_head).unwrap_or(u32::MAX),
        headers_max: limits.request_headers,
        h2_streams_max: limits.streams_per_connection,
        ..FrontConfig::default()
    }
}

impl AdminState for Process {
    fn is_live(&self) -> bool {
        true
    }

    fn readiness(&self) -> Readiness {
        let mut reasons = Vec::new();
        if self.draining.load(Ordering::Relaxed) {
            reasons.push("shutting down".to_owned());
        }
        if let Some(sidecar) = &self.sidecar
            && !sidecar.is_connected()
        {
            reasons.push("no session with any relay".to_owned());
        }
        if self.relay.as_ref().is_some_and(|relay| !relay.is_served()) {
            reasons.push("no sidecar has announced a tunnel".to_owned());
        }
        Readiness { ready: reasons.is_empty(), reasons }
    }

    fn metrics(&self, out: &mut String) {
        self.metrics.set_plugins(&self.plugins.generations());
        self.metrics.encode(out);
    }

    fn config(&self) -> serde_json::Value {
        let mut config = self.config().to_masked_json();
        if let Some(map) = config.as_object_mut() {
            map.insert("last_reload_error".to_owned(), json!(*self.lock_error()));
        }
        config
    }

    fn routes(&self) -> serde_json::Value {
        match &self.relay {
            Some(relay) => relay.describe_routes(),
            None => {
                let sidecar = self.sidecar.as_ref().map(|sidecar| sidecar.relay_answers());
                explain::announced(&self.config(), &sidecar.unwrap_or_default())
            }
        }
    }

    fn tunnels(&self) -> serde_json::Value {
        let config = self.config();
        let mut tunnels = self.relay.as_ref().map(|relay| relay.describe_tunnels());
        explain::with_services(tunnels.get_or_insert_default(), &config);
        json!({
            "tunnels": tunnels,
            "sessions": self.relay.as_ref().map(|relay| relay.describe_sessions()),
            "relays": self.sidecar.as_ref().map(|sidecar| {
                sidecar.peers().iter().map(|peer| peer.describe()).collect::<Vec<_>>()
            }),
        })
    }

    fn plugins(&self) -> serde_json::Value {
        let describe = |info: crate::plugin::GenerationInfo| {
            json!({
                "name": &*info.name,
                "protocol_types": match info.state {
                    GenerationState::Current => Some(self.plugins.types_of(&info.name)),
                    _ => None,
                },
                "version": info.version,
                "toolchain": info.toolchain,
                "sha256": info.sha256,
                "state": info.state.name(),
                "exchanges": info.exchanges,
                "panics": info.panics,
                "quarantined": info.quarantined,
            })
        };
        self.plugins.generations().into_iter().map(describe).collect()
    }

    fn explain(&self, question: &Question) -> serde_json::Value {
        let config = self.config();
        let Some(relay) = &self.relay else { return explain::from_config(&config, question) };
        let mut answer = relay.explain(question);
        if let Some(tunnels) = answer.get_mut("tunnels") {
            explain::fill_services(tunnels, &config);
        }
        answer
    }

    fn reloads(&self) -> mpsc::Sender<ReloadRequest> {
        self.reloads.clone()
    }
}

//! One process: puts the roles together as the file says, reloads it, and ends them in order.
//!
//! Knows who is started in which order; what they do is theirs.

use std::io;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, OnceLock, PoisonError};
use std::time::{Duration, Instant, SystemTime};

use serde_json::json;
use sidelane_tunnel::{Budget, LaneConfig, Side};
use thiserror::Error;
use tokio::signal::unix::{Signal, SignalKind, signal};
use tokio::sync::{broadcast, mpsc};
use tokio::time::MissedTickBehavior;

use crate::acme::Acme;
use crate::admin::{self, AdminState, Readiness, ReloadRequest};
use crate::config::watch::{Reload, Watcher};
use crate::config::{self, Config, ConfigError, ConfigErrors, Fault, PluginCheck, Relays};
use crate::error::chain;
use crate::explain::{self, Question};
use crate::metrics::{Ended, Metrics};
use crate::plugin::{
    GenerationState, HostContext, Limits, LoadError, LoadFault, PluginSpec, Plugins,
};
use crate::relay::Relay;
use crate::shard::Shards;
use crate::sidecar::{self, Sidecar};
use crate::tunnel::dial;
use crate::tunnel::pressure::PRESSURE_TICK;

mod certificates;
mod check;
mod drain;
mod log;
mod reload;
mod sockets;

pub use check::{Checked, check};
use drain::Drain;
use sockets::{Addresses, Sockets};

/// How often what has its time is looked at: replaced plugins, whose exchanges end past the drain
/// timeout, and routes of lost sidecars.
const EXPIRY_TICK: Duration = Duration::from_secs(1);

/// Reload requests that wait for the one that runs; who asks beyond that waits for a place.
const RELOADS_MAX: usize = 8;

/// Why the process did not start, or ended.
#[derive(Debug, Error)]
pub enum RunError {
    /// The file does not hold.
    #[error(transparent)]
    Config(#[from] ConfigErrors),
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
    let relay = config.relay.as_ref().map(|section| {
        let relay = Relay::new(section, Arc::clone(&plugins), Arc::clone(&metrics));
        relay.configure(&config);
        relay
    });
    let acme = relay.as_ref().zip(config.relay.as_ref()).map(|(relay, section)| {
        let acme = Acme::new(Arc::clone(relay.issued()), Arc::clone(&metrics));
        acme.set(section);
        acme
    });
    let sockets = Sockets::bind(&config, relay.as_deref(), relay_threads)?;
    let start =
        |name, count, first| Shards::start(name, count, first, total).map_err(RunError::Start);
    let relay_shards = start("relay", relay_threads, 0)?;
    let sidecar_shards = start("sidecar", sidecar_threads, relay_threads)?;

    if let Some(path) = ports_file {
        sockets.addresses.write(path)?;
    }
    let sidecar = config.sidecar.as_ref().map(|section| {
        let sidecar = Sidecar::new(
            sidecar_settings(section),
            sidecar::Access::new(section, own_relay(section, relay.as_deref()), None),
            relay_addresses(section, config.relay.as_ref(), &sockets.addresses),
            Arc::clone(&plugins),
            Arc::clone(&metrics),
            Arc::clone(&sidecar_shards.all),
        );
        sidecar.configure(&config);
        sidecar
    });

    let (reloads, reload_requests) = mpsc::channel(RELOADS_MAX);
    let config = Arc::new(config);
    let process = Arc::new(Process {
        relay,
        relay_threads,
        acme,
        sidecar,
        plugins,
        metrics,
        started: Arc::clone(&config),
        config: Mutex::new(config),
        taken: Mutex::new(reload::Taken::at_start()),
        last_error: Mutex::new(None),
        drain: Drain::new(),
        reloads,
        admin: OnceLock::new(),
        addresses: Mutex::new(sockets.addresses.clone()),
        ports_file: ports_file.map(Path::to_owned),
    });
    process.metrics.reloaded(true);
    for (role, is_there) in
        [("relay", process.relay.is_some()), ("sidecar", process.sidecar.is_some())]
    {
        if is_there {
            process.metrics.role(role);
        }
    }
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()
        .map_err(RunError::Start)?;
    // Before anybody can see that the process runs, and so signal it.
    let signals = {
        let _context = runtime.enter();
        Signals::new().map_err(RunError::Start)?
    };
    process.start(sockets, &relay_shards)?;
    // After the listeners, at which authorities look for proofs.
    if let Some(acme) = &process.acme {
        runtime.spawn(acme.keep());
    }
    let (stop, stops) = mpsc::channel(1);
    let watched = if let (Some(follow), Some(exchanges)) = (follow, exchanges) {
        let sidecar = process.sidecar.clone();
        follow(Followed { sidecar, exchanges, stop }).map_err(RunError::Start)?;
        None
    } else {
        Some(source)
    };
    let ended = runtime.block_on(process.control(watched, reload_requests, stops, signals, &log));
    relay_shards.stop();
    sidecar_shards.stop();
    match ended.map_err(RunError::Start)? {
        Some(reason) => Err(RunError::Stopped(reason)),
        None => Ok(()),
    }
}

/// What the system may ask of the process.
struct Signals {
    terminate: Signal,
    interrupt: Signal,
    hangup: Signal,
}

impl Signals {
    fn new() -> io::Result<Self> {
        Ok(Self {
            terminate: signal(SignalKind::terminate())?,
            interrupt: signal(SignalKind::interrupt())?,
            hangup: signal(SignalKind::hangup())?,
        })
    }
}

struct Process {
    relay: Option<Arc<Relay>>,
    relay_threads: usize,
    /// There with the relay.
    acme: Option<Acme>,
    sidecar: Option<Arc<Sidecar>>,
    plugins: Arc<Plugins>,
    metrics: Arc<Metrics>,
    /// What takes effect at a start only is as it says.
    started: Arc<Config>,
    /// In force.
    config: Mutex<Arc<Config>>,
    taken: Mutex<reload::Taken>,
    /// Why the last reload failed; the configuration before it is in force.
    last_error: Mutex<Option<String>>,
    drain: Drain,
    reloads: mpsc::Sender<ReloadRequest>,
    /// Set once it is served.
    admin: OnceLock<admin::Listeners>,
    addresses: Mutex<Addresses>,
    /// Where `addresses` are written.
    ports_file: Option<PathBuf>,
}

impl Process {
    /// Starts what the file asks for.
    fn start(self: &Arc<Self>, sockets: Sockets, relay_shards: &Shards) -> Result<(), RunError> {
        let Sockets { listeners, tunnel, health, admin, .. } = sockets;
        let state: Arc<dyn AdminState> = Arc::clone(self) as Arc<dyn AdminState>;
        let listening = admin::start(state, health, admin).map_err(RunError::Start)?;
        // The process starts once.
        let _ = self.admin.set(listening);
        if let (Some(relay), Some(listeners)) = (&self.relay, listeners) {
            relay.start(&relay_shards.all, listeners, tunnel);
            relay.tell_addresses();
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
        signals: Signals,
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
        // Whoever ends it by hand waits for no balancer.
        let mut is_patient = true;
        // Who asked, in order, with the number that answers them. No more than the admin listener has
        // connections: whoever gave up is let go.
        let mut asked: Vec<(u64, ReloadRequest)> = Vec::new();
        let mut tick = tokio::time::interval(EXPIRY_TICK);
        // What a start and a reload find they tell themselves.
        let first_look = tokio::time::Instant::now() + certificates::LOOK;
        let mut certificates_tick = tokio::time::interval_at(first_look, certificates::LOOK);
        certificates_tick.set_missed_tick_behavior(MissedTickBehavior::Delay);
        let mut told = certificates::Told::default();
        let mut pressure_tick = tokio::time::interval(PRESSURE_TICK);
        pressure_tick.set_missed_tick_behavior(MissedTickBehavior::Delay);
        let Signals { mut terminate, mut interrupt, mut hangup } = signals;
        loop {
            tokio::select! {
                _ = terminate.recv() => break,
                _ = interrupt.recv() => {
                    is_patient = false;
                    break;
                }
                () = self.drain.end_asked() => break,
                _ = hangup.recv() => {
                    tracing::info!("SIGHUP: reading the configuration again");
                    trigger();
                }
                Some(reason) = stops.recv() => {
                    stopped = Some(reason);
                    break;
                }
                Some(Reload { source, asked: reached, .. }) = reloads_due.recv() => {
                    let (result, files) = self.reload(source, log);
                    if let Some(watcher) = &watcher {
                        watcher.set_files(files, result.is_ok());
                    }
                    // Whoever asked after the contents were read means later ones.
                    let answered = asked.partition_point(|(number, _)| *number <= reached);
                    for (_, request) in asked.drain(..answered) {
                        // Whoever asked may have gone.
                        let _ = request.reply.send(result.clone());
                    }
                }
                _ = pressure_tick.tick() => self.balance(),
                _ = certificates_tick.tick() => told.look(&self.config(), SystemTime::now()),
                _ = tick.tick() => {
                    self.plugins.end_drained(self.config().drain_timeout);
                    if let Some(relay) = &self.relay {
                        relay.expire(Instant::now());
                    }
                }
                Some(request) = requests.recv() => {
                    asked.retain(|(_, request)| !request.reply.is_closed());
                    let mut next = Some(request);
                    // All that wait: one look answers them.
                    while let Some(request) = next {
                        if let Some(number) = trigger() {
                            asked.push((number, request));
                        } else {
                            // Whoever asked may have gone.
                            let _ =
                                request.reply.send(Err("there is no file to read again".to_owned()));
                        }
                        next = requests.try_recv().ok();
                    }
                }
            }
        }
        tokio::select! {
            () = self.end(is_patient) => {}
            _ = terminate.recv() => tracing::warn!("second signal: exiting at once"),
            _ = interrupt.recv() => tracing::warn!("second signal: exiting at once"),
        }
        Ok(stopped)
    }

    fn config(&self) -> Arc<Config> {
        Arc::clone(&self.config.lock().unwrap_or_else(PoisonError::into_inner))
    }

    fn lock_taken(&self) -> std::sync::MutexGuard<'_, reload::Taken> {
        self.taken.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn lock_error(&self) -> std::sync::MutexGuard<'_, Option<String>> {
        self.last_error.lock().unwrap_or_else(PoisonError::into_inner)
    }
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
        LoadFault::NotFound => match error.library.parent() {
            // One error, however many libraries are looked for there.
            Some(directory) if directory != Path::new("") && !directory.is_dir() => {
                let directory = std::path::absolute(directory).unwrap_or_else(|_| directory.into());
                config.directory_error(&error.plugin, &directory)
            }
            _ => config.library_error(&error.plugin, chain(error)),
        },
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

/// The relay of this process, where the sidecar serves that.
fn own_relay(section: &config::Sidecar, relay: Option<&Relay>) -> Option<sidecar::Own> {
    let relay = relay.filter(|_| section.relays == Relays::Embedded)?;
    Some(sidecar::Own { tls: relay.embedded_tls(), token: relay.embedded_token().clone() })
}

fn sidecar_settings(section: &config::Sidecar) -> sidecar::Settings {
    let lane = LaneConfig::new(Side::Sidecar);
    sidecar::Settings {
        name: section.name.to_string(),
        lanes: u32::try_from(section.lanes).unwrap_or(u32::MAX),
        lane: LaneConfig {
            exchanges_max: section.limits.exchanges_per_session,
            replay_bytes_min: lane.replay_bytes_min.min(section.limits.replay),
            replay_bytes_max: section.limits.replay,
            replay_budget: Some(Arc::new(Budget::new(section.limits.queued))),
            ..windows(lane, section.limits.window)
        },
        timeouts: dial::Timeouts {
            connect: section.timeouts.dial,
            answer: section.timeouts.handshake,
        },
        resolve_interval: section.resolve_interval,
        resolve: sidecar::system_resolver(),
    }
}

/// Bounds an exchange's credit, that which it begins with too.
fn windows(lane: LaneConfig, max: u64) -> LaneConfig {
    LaneConfig { receive_window: lane.receive_window.min(max), window_max: max, ..lane }
}

fn relay_addresses(
    section: &config::Sidecar,
    relay: Option<&config::Relay>,
    addresses: &Addresses,
) -> Vec<String> {
    match &section.relays {
        // At the listener that sidecars share with clients, where it has no address of its own.
        Relays::Embedded => {
            let name = relay.and_then(|relay| relay.tunnel.listener.as_ref());
            let shared = addresses.listeners.iter().find(|(listener, _)| Some(listener) == name);
            let address = addresses.tunnel.or_else(|| shared.map(|(_, address)| *address));
            address.iter().map(ToString::to_string).collect()
        }
        Relays::Listed(relays) => relays.iter().map(ToString::to_string).collect(),
    }
}

impl AdminState for Process {
    fn is_live(&self) -> bool {
        true
    }

    fn readiness(&self) -> Readiness {
        let mut reasons = Vec::new();
        reasons.extend(self.drain.reason().map(str::to_owned));
        reasons.extend(self.sidecar.as_ref().and_then(|sidecar| sidecar.no_session()));
        if let Some(refusal) = self.sidecar.as_ref().and_then(|sidecar| sidecar.refused_by_all()) {
            reasons.push(format!("every relay refuses what this sidecar announces: {refusal}"));
        }
        reasons.extend(self.relay.as_ref().and_then(|relay| relay.warming()));
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
            map.insert("pending_restart".to_owned(), json!(self.lock_taken().pending));
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
            "names": self.sidecar.as_ref().map(|sidecar| sidecar.describe_names()),
            "services": self.sidecar.as_ref().map(|sidecar| sidecar.describe_services()),
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

    fn explain(&self, question: &Question) -> Result<serde_json::Value, String> {
        let config = self.config();
        let Some(relay) = &self.relay else {
            let served = Some(self.plugins.types());
            let mut answer = explain::from_config(&config, question, served)?;
            let relays = self.sidecar.as_ref().map(|sidecar| sidecar.relay_answers());
            explain::tell_refusals(&mut answer, &relays.unwrap_or_default());
            return Ok(answer);
        };
        let mut answer = relay.explain(question)?;
        if let Some(tunnels) = answer.get_mut("tunnels") {
            explain::fill_services(tunnels, &config);
        }
        Ok(answer)
    }

    fn reloads(&self) -> mpsc::Sender<ReloadRequest> {
        self.reloads.clone()
    }

    fn drain(&self, is_end: bool) -> serde_json::Value {
        self.drain_to(is_end)
    }

    fn draining(&self) -> serde_json::Value {
        Self::draining(self)
    }
}

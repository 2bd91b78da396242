//! The relay's role: takes clients, routes them, and opens their exchanges on sidecars' sessions.
//!
//! Knows routes, sessions and documents; what a protocol says is the plugins' business.

use std::sync::atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, OnceLock, PoisonError};
use std::time::{Duration, Instant, SystemTime};

use arc_swap::ArcSwap;
use sidelane_tunnel::Budget;
use tokio::net::TcpListener;
use tokio::sync::watch;

use crate::config;
use crate::credentials::Authenticator;
use crate::metrics::{Flows, Metrics};
use crate::plugin::lend::{Meta, Text};
use crate::plugin::{Plugins, Protocol};
use crate::shard::Shard;
use crate::tls::Issued;
use crate::tunnel::pressure;
use crate::tunnel::session::{Session, Sessions};

mod affinity;
mod aim;
mod announce;
mod bounds;
mod dedicated;
mod document;
mod door;
mod eject;
mod entry;
mod explain;
mod knock;
mod lanes;
mod listen;
mod listeners;
mod moving;
mod open;
mod plain;
mod policy;
mod proxy_header;
mod public;
mod revoke;
mod routing;
mod sources;
mod stream;
mod summary;
mod tls;
mod tunnels;
mod warmup;

pub use listen::bind;
pub use listeners::{BindError, Prepared, Settings as EntrySettings};

use bounds::{credential_rules, millis, session_settings};
use door::Door;
use entry::HttpEntry;
use listeners::Listeners;
use moving::KeptBytes;
use routing::Routing;
use sources::{Settled, Sources};
use tls::Handshakes;
use warmup::Warmup;

/// How long a name that a lost sidecar announced answers 503 (come back) before it answers 404
/// (never heard of it). Longer than a rollout of a Deployment with its images to pull.
const LOST_ROUTES_KEPT: Duration = Duration::from_secs(600);

/// The relay's role of this process.
pub struct Relay {
    plugins: Arc<Plugins>,
    metrics: Arc<Metrics>,
    sessions: Sessions,
    /// What all lanes may keep for their return.
    budget: Arc<Budget>,
    routing: ArcSwap<Routing>,
    /// As clients know them.
    sources: Mutex<Sources>,
    stopping: watch::Sender<bool>,
    /// All sessions are ended: no lane comes back either.
    closed: watch::Sender<bool>,
    /// Clients are asked to go elsewhere.
    withdrawn: AtomicBool,
    /// Told whenever an exchange that could not be opened might be now.
    changes: watch::Sender<()>,
    /// In milliseconds; see [`config::RelayTimeouts::open_wait`].
    open_wait_ms: AtomicU64,
    listeners: Listeners,
    /// The HTTP front's way in, made once.
    entry: OnceLock<Arc<HttpEntry>>,
    /// Where sidecars knock.
    door: Door,
    authenticator: Arc<Authenticator>,
    /// What is obtained by ACME.
    issued: Arc<Issued>,
    /// Under way, on listeners of clients.
    tls_handshakes: Arc<Handshakes>,
    /// Of clients, on all listeners.
    connections: AtomicUsize,
    warmup: Warmup,
    /// Held while a sidecar is left aside.
    ejecting: Mutex<()>,
    /// Of exchanges that may move.
    kept_bytes: KeptBytes,
    flows: Flows,
}

impl Relay {
    /// Returns the role; nobody is let in before [`Relay::start`].
    pub fn new(section: &config::Relay, plugins: Arc<Plugins>, metrics: Arc<Metrics>) -> Arc<Self> {
        let budget = Arc::new(Budget::new(section.limits.queued));
        let settings = session_settings(section, &plugins, &budget);
        let rules = credential_rules(section);
        let authenticator = Arc::new(Authenticator::new(rules, Arc::clone(&metrics)));
        let issued = Arc::default();
        let door = Door::new(section, &issued, &metrics);
        let sessions = Sessions::new(settings);
        sessions.dedicate(&metrics, section.timeouts.open_wait);
        Arc::new(Self {
            plugins,
            metrics,
            sessions,
            budget,
            routing: ArcSwap::default(),
            sources: Mutex::new(Sources {
                base_domains: section.base_domains.clone(),
                own: Vec::new(),
                ..Sources::default()
            }),
            stopping: watch::Sender::new(false),
            closed: watch::Sender::new(false),
            withdrawn: AtomicBool::new(false),
            changes: watch::Sender::new(()),
            open_wait_ms: AtomicU64::new(millis(section.timeouts.open_wait)),
            listeners: Listeners::new(EntrySettings::of(section)),
            entry: OnceLock::new(),
            door,
            authenticator,
            issued,
            tls_handshakes: Arc::default(),
            connections: AtomicUsize::new(0),
            warmup: Warmup::new(section.warmup, Instant::now()),
            ejecting: Mutex::default(),
            kept_bytes: KeptBytes::default(),
            flows: Flows::new("relay"),
        })
    }

    /// Takes a configuration's routes and base domains, for new exchanges.
    pub fn configure(&self, config: &config::Config) {
        self.sessions.carry(&self.plugins.types());
        let mut sources = self.lock_sources();
        sources.own.clone_from(&config.routes);
        if let Some(section) = &config.relay {
            sources.base_domains.clone_from(&section.base_domains);
        }
        // What a document claims, and what others have of that, depends on base domains.
        let settled = sources.settle();
        self.reroute(&sources);
        self.tell(sources, settled);
    }

    /// Takes a configuration's limits and timeouts: for new connections and sessions, and where a
    /// limit is on what runs, for that at once.
    pub fn limit(&self, section: &config::Relay) {
        self.listeners.set_settings(EntrySettings::of(section));
        self.listeners.set_tunnel(&section.tunnel, &self.issued);
        self.budget.set_max(section.limits.queued);
        self.sessions.set(session_settings(section, &self.plugins, &self.budget));
        self.sessions.dedicate(&self.metrics, section.timeouts.open_wait);
        self.door.set(section, &self.issued, &self.metrics);
        self.authenticator.set(credential_rules(section));
        self.recheck();
        self.open_wait_ms.store(millis(section.timeouts.open_wait), Ordering::Relaxed);
    }

    /// Binds a configuration's listeners that are not bound yet, for `threads` threads; nobody is
    /// accepted before [`Relay::listen`].
    ///
    /// # Errors
    /// The first that cannot be bound, or whose TLS cannot be had.
    pub fn prepare(&self, section: &config::Relay, threads: usize) -> Result<Prepared, BindError> {
        self.listeners.prepare(&section.listeners, &section.tunnel, &self.issued, threads)
    }

    /// Puts listeners in force: new ones accept before those that are gone stop. Connections of these
    /// end with what runs on them; nobody else's are touched.
    pub fn listen(self: &Arc<Self>, prepared: Prepared) {
        self.listeners.apply(self, prepared);
    }

    /// Serves clients on `listeners`, and sidecars on `tunnel` where they have an address of their own.
    pub fn start(
        self: &Arc<Self>,
        shards: &Arc<[Shard]>,
        listeners: Prepared,
        tunnel: Option<std::net::TcpListener>,
    ) {
        self.listeners.set_threads(shards);
        self.keep_credentials(&shards[0]);
        self.listen(listeners);
        let Some(tunnel) = tunnel else { return };
        let relay = Arc::clone(self);
        shards[0].spawn(async move {
            match TcpListener::from_std(tunnel) {
                Ok(socket) => {
                    let closed = relay.closed.subscribe();
                    tunnels::accept(relay, socket, closed).await;
                }
                Err(error) => tracing::error!(%error, "the tunnel's listener is lost"),
            }
        });
    }

    /// Certificates that are obtained meanwhile.
    pub fn issued(&self) -> &Arc<Issued> {
        &self.issued
    }

    /// By which this process's own sidecar dials; `None`: plain.
    pub fn embedded_tls(&self) -> Option<Arc<rustls::ClientConfig>> {
        self.door.embedded()
    }

    /// What this process's own sidecar presents.
    pub fn embedded_token(&self) -> &config::Secret {
        self.authenticator.embedded_token()
    }

    /// Tells in the log where clients reach the file's routes.
    pub fn tell_addresses(&self) {
        let sources = self.lock_sources();
        public::tell(&sources.own, &self.public(&sources));
    }

    /// The HTTP front's way in.
    fn entry(self: &Arc<Self>) -> Arc<HttpEntry> {
        Arc::clone(self.entry.get_or_init(|| Arc::new(HttpEntry { relay: Arc::clone(self) })))
    }

    /// Asks clients to go elsewhere: connections end with what runs on them. Whoever comes all the same is
    /// served, and sessions stay.
    pub fn withdraw(&self) {
        self.withdrawn.store(true, Ordering::Release);
        self.listeners.withdraw();
    }

    /// Whether clients are asked to go elsewhere.
    pub(super) fn is_withdrawn(&self) -> bool {
        self.withdrawn.load(Ordering::Acquire)
    }

    /// Accepts no client and no new lane from here on, asks clients' connections to end with their exchanges,
    /// and tells sidecars to look for another relay. Lanes that lose their connections come back, so that what
    /// runs on them comes to its end.
    pub fn drain(&self) {
        self.stopping.send_replace(true);
        self.listeners.stop();
        for session in self.sessions.all() {
            session.foretell("the relay is shutting down");
        }
    }

    /// Ends all sessions for good once what is queued has been written.
    pub fn close(&self) {
        self.closed.send_replace(true);
        for session in self.sessions.all() {
            session.end("the relay has ended");
        }
    }

    /// Exchanges that run.
    pub fn exchanges(&self) -> usize {
        let sessions = self.sessions.all();
        sessions.iter().flat_map(|session| session.lanes().to_vec()).map(|link| link.load()).sum()
    }

    /// Bounds what all sessions have queued; called every [`PRESSURE_TICK`].
    ///
    /// [`PRESSURE_TICK`]: crate::tunnel::pressure::PRESSURE_TICK
    pub fn balance(&self, queued_max: u64) {
        let sessions = self.sessions.all();
        let links: Vec<_> = sessions.iter().flat_map(|session| session.lanes().to_vec()).collect();
        let held = pressure::balance(&links, queued_max);
        self.metrics.lanes.set_held("relay", &held, queued_max);
    }

    /// Clients' connections that are open.
    pub fn connections(&self) -> usize {
        self.connections.load(Ordering::Relaxed)
    }

    /// Sessions that are up.
    pub fn sessions(&self) -> usize {
        self.sessions.len()
    }

    /// Whether a sidecar serves at least one tunnel.
    pub fn is_served(&self) -> bool {
        !self.routing.load().is_empty()
    }

    /// What the admin page says of the sessions.
    pub fn describe_sessions(&self) -> serde_json::Value {
        let sources = self.lock_sources();
        let describe = |session: &Arc<Session>| {
            let document = sources.documents.get(&session.epoch);
            let held = |is_forbidden: bool| {
                let held = sources.held.get(&session.epoch);
                let held = held.filter(|held| held.is_forbidden == is_forbidden);
                held.map(|held| {
                    serde_json::json!({
                        "announcement": held.document.version,
                        "reasons": held.reasons,
                    })
                })
            };
            let lanes = session.lanes();
            let authenticated = session.authenticated();
            let expires = authenticated.expires.map(httpdate::fmt_http_date);
            serde_json::json!({
                "sidecar": &*session.name,
                "principal": &*authenticated.grant.principal,
                "credential": authenticated.credential(),
                "expires": expires,
                "credential_refused": session.refused_credential(),
                "peer": session.peer.to_string(),
                "epoch": session.epoch,
                "connected_for_seconds": session.since.elapsed().as_secs(),
                "tunnels": document.map(|document| document.tunnel_names()),
                "unavailable": document.map(|document| document.unavailable()),
                "announcement": document.map(|document| document.version),
                "waiting": held(false),
                "forbidden": held(true),
                "notes": document.map(|document| sources.notes(document)),
                "lanes": lanes.iter().map(|link| link.describe()).collect::<Vec<_>>(),
            })
        };
        self.sessions.all().iter().map(describe).collect()
    }

    fn lock_sources(&self) -> std::sync::MutexGuard<'_, Sources> {
        self.sources.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn reroute(&self, sources: &Sources) {
        let routing = Routing::build(sources, &self.routing.load(), &self.metrics);
        self.routing.store(Arc::new(routing));
        self.count_held(sources);
        self.notice();
    }

    fn count_held(&self, sources: &Sources) {
        let (waiting, forbidden) = sources.held_counts();
        self.metrics.set_announcements_waiting(waiting);
        self.metrics.credentials.set_forbidden(forbidden);
    }

    /// Whether an exchange may wait for a session that is on its way.
    fn waits_for_sessions(&self) -> bool {
        !self.open_wait().is_zero() && !self.is_draining()
    }

    /// Whether new sessions and lanes are turned away, since the relay ends soon.
    fn is_draining(&self) -> bool {
        *self.stopping.borrow()
    }

    /// How long an exchange may.
    fn open_wait(&self) -> Duration {
        Duration::from_millis(self.open_wait_ms.load(Ordering::Relaxed))
    }

    /// Lets exchanges that wait for a session look again.
    fn notice(&self) {
        self.changes.send_replace(());
    }

    fn session_begun(&self, session: &Arc<Session>) {
        self.metrics.set_sessions("relay", self.sessions.len());
        let authenticated = session.authenticated();
        tracing::info!(
            sidecar = &*session.name,
            principal = &*authenticated.grant.principal,
            credential = authenticated.credential(),
            peer = %session.peer,
            epoch = session.epoch,
            "session begun"
        );
    }

    fn session_ended(&self, session: &Arc<Session>) {
        self.metrics.set_sessions("relay", self.sessions.len());
        tracing::info!(sidecar = &*session.name, epoch = session.epoch, "session ended");
        let mut sources = self.lock_sources();
        if sources.lose(session.epoch, Instant::now()) {
            let settled = sources.settle();
            self.reroute(&sources);
            self.tell(sources, settled);
        }
    }

    /// Forgets the routes of sidecars that have been gone for long, and ends sessions whose credential has
    /// expired; called every second.
    pub fn expire(&self, now: Instant) {
        self.end_expired(SystemTime::now());
        self.look_at_ejected();
        let mut sources = self.lock_sources();
        let before = sources.lost.len();
        sources.lost.retain(|(since, _)| now.duration_since(*since) < LOST_ROUTES_KEPT);
        let mut settled = Settled::default();
        if sources.look_at_silent(now) {
            settled = sources.settle();
        }
        if sources.lost.len() != before || settled.is_changed {
            self.reroute(&sources);
        }
        self.tell(sources, settled);
    }

    /// What is known of an exchange before it is opened.
    fn meta(
        &self,
        plugin: &Protocol,
        client_address: &Arc<str>,
        listener: &Arc<str>,
        scheme: &Arc<str>,
    ) -> Meta {
        let empty = Text::default;
        Meta {
            request_id: empty(),
            protocol_type: Arc::clone(plugin.name()),
            route: empty(),
            tunnel: empty(),
            client_address: Arc::clone(client_address).into(),
            listener: Arc::clone(listener).into(),
            scheme: Arc::clone(scheme).into(),
            tls_sni: empty(),
            tls_alpn: empty(),
            tls_client: empty(),
            trace_parent: empty(),
            trusted_proxy: false,
            peer_address: empty(),
            response_head_timeout: None,
            options: empty(),
            deadline: None,
        }
    }
}
